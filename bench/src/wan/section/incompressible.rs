//! A disk that cannot be compressed: how much of the link becomes disk.

use std::time::Duration;

use anyhow::{Context, Result};

use super::iperf::{Amount, STREAMS, iperf3};
use super::{Findings, Section, columns, each, movers, rows, seed_of};
use crate::report::Role;
use crate::wan::Bench;
use crate::wan::disk::Disk;
use crate::wan::grid::{Better, Bound, Cell, Grid};
use crate::wan::mover::{How, Mover};
use crate::wan::site::Sites;
use crate::wan::watch::watch;

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let ours = vec![Mover::ours(), Mover::ours_from_nbdkit()];
    let movers = movers(bench, ours, &[How::Nbdcopy]);
    let disk = bench.noise()?;
    let (mut grid, iperf) = table(
        bench,
        sites,
        Section::Incompressible,
        &movers,
        &disk,
        (STREAMS, Amount::Bytes(disk.size_bytes)),
        bench.patience(&disk, &sites.case),
    )?;
    grid.section = "incompressible";
    grid.title = format!("Incompressible data: {}", sites.case.name());
    grid.rows[0].bound = Some(Bound {
        text: "95 % of iperf3's".into(),
        limit: iperf.map(|rate| 0.95 * rate),
    });
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}

/// Moves `disk` in every way, beside iperf3 with so many connections.
pub(super) fn table(
    bench: &Bench<'_>,
    sites: &Sites,
    section: Section,
    movers: &[Mover],
    disk: &Disk,
    (streams, amount): (usize, Amount),
    limit: Duration,
) -> Result<(Grid, Option<f64>)> {
    let case = &sites.case;
    let [mut rate, mut used] = rows(
        [
            ("disk bytes, MB/s", Better::More),
            ("link used meanwhile", Better::More),
        ],
        movers.len() + 1,
    );
    let dir = bench.fast_dir();
    each(
        bench,
        sites,
        section,
        movers,
        disk,
        dir,
        true,
        |index, attempt| {
            let seen = watch(sites, disk, limit, false, || attempt.start())?;
            let (seconds, _, projected) =
                seen.until_resident(case).context("nothing has arrived")?;
            rate.cells[index]
                .values
                .push(disk.data_bytes() as f64 / seconds / 1e6);
            rate.cells[index].projected |= projected;
            if let Some(share) = seen.link_use(case) {
                used.cells[index].values.push(share);
            }
            Ok(())
        },
    )?;
    let mut iperf = Cell::default();
    for round in 0..bench.rounds() {
        bench.progress(&format!("{}, {}: iperf3", case.name(), section.name()));
        sites.link.draw_losses(seed_of(round));
        match iperf3(bench, sites, streams, amount, limit) {
            Ok(rate) => iperf.values.push(rate),
            Err(error) => bench.failed("iperf3", &error),
        }
    }
    let reached = iperf.middle();
    if let Some(last) = rate.cells.last_mut() {
        *last = iperf;
    }
    let mut columns = columns(movers);
    columns.push(("iperf3".into(), Role::Other));
    let grid = Grid {
        section: "",
        title: String::new(),
        note: format!(
            "{} MiB of noise, from nothing until all is there, the start of TCP included; iperf3 {} over \
             {streams} connections.",
            disk.size_bytes >> 20,
            match amount {
                Amount::Bytes(_) => "sends as many bytes".to_owned(),
                Amount::Time(time, _) => format!("sends for {} s once started", time.as_secs()),
            }
        ),
        columns,
        rows: vec![rate, used],
    };
    Ok((grid, reached))
}
