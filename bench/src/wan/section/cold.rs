//! A guest's cold 4 KiB reads while nothing is copied in the background.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Findings, Section, columns, each, guest_of, movers, rows};
use crate::client::Random;
use crate::wan::Bench;
use crate::wan::grid::{Better, Bound, Grid};
use crate::wan::guest::percentile;
use crate::wan::mover::{How, Mover};
use crate::wan::site::Sites;
use crate::wan::watch::is_cold;

/// Reads that a median needs...
const MIN_READS: usize = 30;
/// ...and how long it goes on when that took less.
const TIME: Duration = Duration::from_secs(3);
/// A way that is so slow is judged by what it did.
const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let case = &sites.case;
    let disk = bench.files()?;
    let movers = movers(bench, vec![Mover::ours()], &[How::Stream, How::Scan]);
    let [mut median, mut tail] = rows(
        [
            ("cold 4 KiB read, median, ms", Better::Less),
            ("cold 4 KiB read, p99, ms", Better::Less),
        ],
        movers.len(),
    );
    each(
        bench,
        sites,
        Section::Cold,
        &movers,
        &disk,
        bench.fast_dir(),
        false,
        |index, attempt| {
            let moving = attempt.start()?;
            let mut guest = guest_of(&moving)?;
            let mut random = Random::new(0x636f_6c64);
            let start = Instant::now();
            let mut cold = Vec::new();
            while start.elapsed() < LIMIT && (cold.len() < MIN_READS || start.elapsed() < TIME) {
                let ms = guest.read(disk.random_block(&mut random), 4096)?;
                if is_cold(ms, case) {
                    cold.push(ms);
                }
            }
            guest.close()?;
            let of = |part| percentile(cold.iter().copied(), part).context("no read was cold");
            median.cells[index].values.push(of(0.5)?);
            tail.cells[index].values.push(of(0.99)?);
            Ok(())
        },
    )?;
    median.bound = Some(Bound {
        text: "one round trip + 2 ms".into(),
        limit: Some(case.rtt_ms as f64 + 2.0),
    });
    let grid = Grid {
        section: "cold",
        title: format!("Cold reads, nothing else going on: {}", case.name()),
        note: "One guest reads 4 KiB where the disk has data, one read after the other; hikkoshi with \
               --no-background, qemu with copy-on-read and no stream, nbdkit with cow and no scan."
            .into(),
        columns: columns(&movers),
        rows: vec![median, tail],
    };
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}
