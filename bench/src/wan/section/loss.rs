//! A link that loses packets: nobody gets much, and ours no less than nbdcopy; but for whoever takes a loss for a loss.

use std::time::Duration;

use anyhow::Result;

use super::incompressible::table;
use super::iperf::Amount;
use super::{Findings, Section, movers};
use crate::wan::Bench;
use crate::wan::disk::Disk;
use crate::wan::grid::{Bound, Grid};
use crate::wan::mover::{How, Mover};
use crate::wan::site::Sites;
use crate::wan::watch::LOSSY_WARM_UP;

/// As many connections as ours has by default.
const CONNECTIONS: usize = 4;
/// nbdcopy gives each connection 128 MiB at a time: less would not use all of them.
const DISK_MIB: u64 = 512;
/// What has not ended by then is projected.
const LIMIT: Duration = Duration::from_secs(24);
/// How long iperf3 sends, after a start that is not counted.
const IPERF_TIME: Duration = Duration::from_secs(12);

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let mut ours = vec![
        Mover::ours(),
        Mover::ours_with_congestion("bbr"),
        Mover::ours_from_nbdkit(),
    ];
    for mover in &mut ours {
        if let How::Hikkoshi { options, .. } = &mut mover.how {
            options.push(format!("--connections={CONNECTIONS}"));
        }
    }
    let movers = movers(bench, ours, &[How::NbdcopyConnections(CONNECTIONS)]);
    let disk = Disk::noise(DISK_MIB.min(bench.mib()))?;
    let (grid, _) = table(
        bench,
        sites,
        Section::Loss,
        &movers,
        &disk,
        (CONNECTIONS, Amount::Time(IPERF_TIME, LOSSY_WARM_UP)),
        LIMIT,
    )?;
    let peer = |mover: &Mover| matches!(mover.how, How::NbdcopyConnections(_));
    let nbdcopy = movers.iter().position(peer);
    let limit = nbdcopy.and_then(|index| grid.rows[0].cells[index].middle());
    let mut rows = grid.rows;
    rows[0].bound = Some(Bound {
        text: "nbdcopy's".into(),
        limit,
    });
    let grid = Grid {
        section: "loss",
        title: format!("A link that loses packets: {}", sites.case.name()),
        note: format!(
            "{} What has not ended after {} s is projected (≈) from its pace after the first {} s, in which TCP comes \
             down to what it can keep. Congestion control: {}, where a column \
             does not name another. Each packet is lost by a seeded draw of its own.",
            grid.note,
            LIMIT.as_secs(),
            LOSSY_WARM_UP.as_secs(),
            bench.options.congestion
        ),
        columns: grid.columns,
        rows,
    };
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}
