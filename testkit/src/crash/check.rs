//! Reading a disk back after a crash, and comparing it with what it must hold.

use super::disk::{Expected, SECTOR, Wrong, none_wrong};
use crate::nbd::{Client, Request};
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

/// How much is read in one request, in sectors, and how many requests are in flight.
const RUN: u64 = 256;
const BATCH: usize = 16;

/// Which sectors are read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Those that were ever written: reading the others would fetch them all.
    Touched,
    /// All.
    Whole,
}

fn runs(disk: &Expected, extent: Extent) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for sector in 0..disk.sectors() {
        if extent == Extent::Touched && !disk.is_touched(sector) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == sector && last.end - last.start < RUN => last.end += 1,
            _ => runs.push(sector..sector + 1),
        }
    }
    runs
}

/// Reads sectors through `client` and hands each to `check`.
fn read(
    client: &mut Client,
    runs: &[Range<u64>],
    mut check: impl FnMut(u64, &[u8]) -> Result<(), Wrong>,
) -> Result<()> {
    let mut wrong = Vec::new();
    for some in runs.chunks(BATCH) {
        let requests = some
            .iter()
            .map(|run| {
                Ok(Request::Read {
                    offset: run.start * SECTOR as u64,
                    len: u32::try_from((run.end - run.start) * SECTOR as u64)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        client.send(&requests)?;
        for _ in some {
            let answer = client.receive()?;
            let run = some.get(answer.index).context("an answer too many")?;
            ensure!(
                answer.errno == 0,
                "reading sectors {run:?} back: error {}",
                answer.errno
            );
            for (sector, found) in run.clone().zip(answer.data.chunks(SECTOR)) {
                wrong.extend(check(sector, found).err());
            }
        }
    }
    none_wrong(&wrong)
}

/// Reads back after a kill, and takes what was in flight as it is found.
///
/// # Errors
/// Something is lost, or the server went away.
pub fn after_kill(socket: &Path, disk: &Expected, extent: Extent) -> Result<()> {
    let mut client = Client::connect(socket)?;
    let runs = runs(disk, extent);
    read(&mut client, &runs, |sector, found| {
        disk.settle(sector, found)
    })
}

/// Reads all back after a power cut at `cut_ns`.
///
/// # Errors
/// Something is lost that was flushed by then, or the server went away.
pub fn after_cut(socket: &Path, disk: &Expected, cut_ns: u64) -> Result<()> {
    let mut client = Client::connect(socket)?;
    let runs = runs(disk, Extent::Whole);
    read(&mut client, &runs, |sector, found| {
        disk.check_after_cut(sector, found, cut_ns)
    })
}

/// Compares the image of a complete volume, byte for byte, without any server.
///
/// # Errors
/// It differs.
pub fn image(path: &Path, disk: &Expected) -> Result<()> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    ensure!(
        bytes.len() as u64 == disk.sectors() * SECTOR as u64,
        "the image has {} bytes",
        bytes.len()
    );
    let mut wrong = Vec::new();
    for (sector, found) in (0..disk.sectors()).zip(bytes.chunks(SECTOR)) {
        wrong.extend(disk.settle(sector, found).err());
    }
    none_wrong(&wrong).context("the image after completion")
}
