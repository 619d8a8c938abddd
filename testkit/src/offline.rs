//! The disk after the guest is gone: is the file system clean, and is everything in it?
//!
//! Reads the image with e2fsprogs, without mounting it.

use crate::packages;
use crate::pattern::{Checksum, Random, fill, fill_sector};
use crate::process;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const SECTOR: usize = 512;
/// How much is compared at a time.
const CHUNK: usize = 1 << 20;

/// What was verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Files that the guest wrote.
    pub written_files: usize,
    /// Sectors of the file that it wrote in place.
    pub sectors: usize,
    /// Files that were on the disk from the start.
    pub content_files: usize,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// Checks that the file system in `image` is clean.
///
/// # Errors
/// `e2fsck -fn` finds anything; the message has what it said.
pub fn file_system_is_clean(image: &Path) -> Result<()> {
    let mut command = Command::new(packages::require("e2fsck")?);
    command.arg("-fn").arg(image);
    let said = process::output(&mut command).context("the file system is not clean")?;
    ensure!(
        !said.contains("recovering journal"),
        "the journal was not empty:\n{said}"
    );
    Ok(())
}

/// Reads every file out of `image` and checks it: what the workload wrote against its final list,
/// whose digest the guest has reported, and the rest against `tree`.
///
/// # Errors
/// Anything differs, is missing, or is too much.
pub fn content_is_right(image: &Path, tree: &Path, digest: &str) -> Result<Verified> {
    let dump = tempfile::tempdir()?;
    let mut command = Command::new(packages::require("debugfs")?);
    command
        .arg("-R")
        .arg(format!("rdump / {}", dump.path().display()))
        .arg(image);
    process::output(&mut command)?;
    let mut verified = Verified::default();
    check_work(&dump.path().join("work"), digest, &mut verified)?;
    let list = fs::read_to_string(tree.join("content.list"))?;
    for line in list.lines() {
        let (sum, path) = line.split_once(' ').context("bad content list")?;
        let bytes = fs::read(dump.path().join(path)).with_context(|| format!("{path} is gone"))?;
        ensure!(
            format!("{:x}", Checksum::of(&bytes)) == sum,
            "{path} has changed"
        );
        ensure!(bytes == fs::read(tree.join(path))?, "{path} has changed");
        verified.content_files += 1;
        verified.bytes += u64::try_from(bytes.len())?;
    }
    Ok(verified)
}

fn check_work(work: &Path, digest: &str, verified: &mut Verified) -> Result<()> {
    let text = fs::read(work.join("final")).context("the workload's final list is gone")?;
    let found = format!("{:x}", Checksum::of(&text));
    ensure!(
        found == digest,
        "the final list has the digest {found}, the guest said {digest}"
    );
    let mut expected = BTreeMap::new();
    let mut generations: Vec<u64> = Vec::new();
    for line in std::str::from_utf8(&text)?.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["file", slot, seed, len] => {
                let what = (u64::from_str_radix(seed, 16)?, len.parse::<usize>()?);
                expected.insert(format!("file-{slot}"), what);
            }
            ["sector", generation] => generations.push(generation.parse()?),
            _ => bail!("bad line in the final list: {line}"),
        }
    }
    for (name, (seed, len)) in &expected {
        let mut right = vec![0; *len];
        fill(*seed, &mut right);
        let got = fs::read(work.join(name)).with_context(|| format!("{name} is gone"))?;
        ensure!(got == right, "{name} differs");
        verified.bytes += u64::try_from(got.len())?;
    }
    for entry in fs::read_dir(work)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let known = expected.contains_key(&name)
            || ["final", "journal", "sectors"].contains(&name.as_str());
        ensure!(known, "{name} should not be there");
    }
    let bytes = fs::read(work.join("sectors"))?;
    ensure!(
        bytes.len() == generations.len() * SECTOR,
        "the sector file has {} bytes",
        bytes.len()
    );
    let mut right = [0; SECTOR];
    for ((sector, generation), got) in (0u64..).zip(&generations).zip(bytes.chunks(SECTOR)) {
        fill_sector(sector, *generation, &mut right);
        ensure!(
            got == right,
            "sector {sector} is not of generation {generation}"
        );
    }
    verified.written_files = expected.len();
    verified.sectors = generations.len();
    verified.bytes += u64::try_from(bytes.len())?;
    ensure!(
        !expected.is_empty() && !generations.is_empty(),
        "the workload wrote nothing"
    );
    Ok(())
}

/// Compares two images of the same size, byte for byte.
///
/// # Errors
/// They differ; the message has how many blocks of 4 KiB do, and the first ones.
pub fn images_are_equal(right: &Path, image: &Path) -> Result<u64> {
    let (a, b) = (File::open(right)?, File::open(image)?);
    let size = a.metadata()?.len();
    ensure!(
        size == b.metadata()?.len(),
        "the images have different sizes"
    );
    let (mut left, mut other) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut different = Vec::new();
    let mut at = 0;
    while at < size {
        let len = CHUNK.min(usize::try_from(size - at)?);
        a.read_exact_at(&mut left[..len], at)?;
        b.read_exact_at(&mut other[..len], at)?;
        if left[..len] != other[..len] {
            let blocks = left[..len].chunks(4096).zip(other[..len].chunks(4096));
            let first = at / 4096;
            different.extend(
                (first..)
                    .zip(blocks)
                    .filter(|(_, (a, b))| a != b)
                    .map(|(n, _)| n),
            );
        }
        at += u64::try_from(len)?;
    }
    if !different.is_empty() {
        let some = &different[..different.len().min(16)];
        bail!(
            "{} blocks of {} differ, first {some:?}",
            different.len(),
            size / 4096
        );
    }
    Ok(size)
}

/// A seeded selection used to spoil an image on purpose: flips one byte in the given range, to
/// show that a comparison notices.
///
/// # Errors
/// The image cannot be written.
pub fn spoil(image: &Path, seed: u64, start: u64, end: u64) -> Result<u64> {
    let at = start + Random::new(seed).below(end - start);
    let file = fs::OpenOptions::new().read(true).write(true).open(image)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x10], at)?;
    Ok(at)
}
