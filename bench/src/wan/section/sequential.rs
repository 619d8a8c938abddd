//! A guest that reads a large file which is not there yet.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Findings, Section, columns, each, guest_of, movers, rows};
use crate::wan::Bench;
use crate::wan::grid::{Better, Bound, Grid};
use crate::wan::mover::{How, Mover};
use crate::wan::site::Sites;

/// Round trips in which TCP and the windows above it find the link's rate; not counted.
const WARM_UP_ROUND_TRIPS: u32 = 12;
/// How long is measured, at most.
const TIME: Duration = Duration::from_secs(4);

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let case = &sites.case;
    let disk = bench.noise()?;
    let movers = movers(bench, vec![Mover::ours()], &[How::Stream, How::Scan]);
    let mut both = rows(
        [
            ("nothing copied, share of the link", Better::More),
            ("while copying, share of the link", Better::More),
        ],
        movers.len(),
    );
    for (row, background) in both.iter_mut().zip([false, true]) {
        let dir = bench.fast_dir();
        each(
            bench,
            sites,
            Section::Sequential,
            &movers,
            &disk,
            dir,
            background,
            |index, attempt| {
                let moving = attempt.start()?;
                let mut guest = guest_of(&moving)?;
                // Not where a copy in the order of the disk begins.
                let start = if background { disk.size_bytes / 2 } else { 0 };
                let warm_up = WARM_UP_ROUND_TRIPS * case.rtt();
                let (skipped, _) = guest.read_sequentially(start, disk.size_bytes, warm_up)?;
                let (bytes, seconds) =
                    guest.read_sequentially(start + skipped, disk.size_bytes, TIME)?;
                guest.close()?;
                ensure!(bytes > 1 << 20, "only {bytes} bytes could be measured");
                row.cells[index]
                    .values
                    .push(bytes as f64 / seconds / case.bytes_per_s());
                Ok(())
            },
        )?;
        row.bound = Some(Bound {
            text: "of the link".into(),
            limit: Some(0.85),
        });
    }
    let grid = Grid {
        section: "sequential",
        title: format!("Cold sequential read by the guest: {}", case.name()),
        note: format!(
            "Incompressible data, 128 KiB at a time and two at once, as the kernel reads ahead for a \
             program; counted after {WARM_UP_ROUND_TRIPS} round trips, {} s at most. While copying it \
             begins in the middle of the disk. The link's rate counts headers (4 %), the guest's does not; \
             what the copy had brought already is read at the disk's speed, so a share can be above 1.",
            TIME.as_secs()
        ),
        columns: columns(&movers),
        rows: both.into(),
    };
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}
