//! The disk with files until every block is at the new site, while a guest reads here and there.

use anyhow::Result;

use super::{Findings, Section, columns, each, movers, rows};
use crate::wan::grid::{Better, Bound, Grid, Row};
use crate::wan::guest::percentile;
use crate::wan::mover::{How, Mover};
use crate::wan::plot::{Chart, Series};
use crate::wan::site::Sites;
use crate::wan::watch::{Watched, watch};
use crate::wan::{Bench, CUT_OFF};

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let case = &sites.case;
    let disk = bench.files()?;
    let ours = vec![Mover::ours(), Mover::ours_from_nbdkit()];
    let peers = [How::Nbdcopy, How::Convert, How::Stream, How::Scan];
    let movers = movers(bench, ours, &peers);
    let [
        mut time,
        mut bytes,
        mut used,
        mut median,
        mut tail,
        mut reads,
    ] = rows(
        [
            ("until resident, s", Better::Less),
            ("on the wire, MB", Better::Less),
            ("link used meanwhile", Better::More),
            ("cold 4 KiB read meanwhile, median, ms", Better::Less),
            ("cold 4 KiB read meanwhile, p99, ms", Better::Less),
            ("cold reads measured", Better::More),
        ],
        movers.len(),
    );
    let mut watched: Vec<(String, Watched)> = Vec::new();
    let mut emulator = Vec::new();
    each(
        bench,
        sites,
        Section::Copy,
        &movers,
        &disk,
        bench.fast_dir(),
        true,
        |index, attempt| {
            let mover = attempt.mover;
            let whole = *mover == Mover::ours() || mover.how == How::Nbdcopy;
            let limit = bench.watched_for(whole, &disk, case);
            let seen = watch(sites, &disk, limit, mover.serves(), || attempt.start())?;
            emulator.push(seen.emulator_cores);
            if seen.seconds.is_some() && matches!(mover.how, How::Hikkoshi { .. } | How::Nbdcopy) {
                let image = attempt.dir.path().join("image");
                hikkoshi_testkit::offline::images_are_equal(&disk.path, &image)?;
            }
            if let Some((seconds, on_wire, projected)) = seen.until_resident(case) {
                put(&mut time, index, seconds, projected);
                put(&mut bytes, index, on_wire / 1e6, projected);
            }
            if let Some(share) = seen.link_use(case) {
                put(&mut used, index, share, false);
            }
            if mover.serves() {
                let cold = seen.cold_reads(case);
                if let (Some(half), Some(most)) = (
                    percentile(cold.iter().copied(), 0.5),
                    percentile(cold.iter().copied(), 0.99),
                ) {
                    put(&mut median, index, half, false);
                    put(&mut tail, index, most, false);
                }
                put(&mut reads, index, cold.len() as f64, false);
            }
            if watched.iter().all(|(name, _)| *name != mover.name) {
                watched.push((mover.name.clone(), seen));
            }
            Ok(())
        },
    )?;

    let nbdcopy = movers.iter().position(|mover| mover.how == How::Nbdcopy);
    let half_of = |row: &Row| Some(nbdcopy.and_then(|index| row.cells[index].middle())? / 2.0);
    let rtt = case.rtt_ms as f64;
    time.bound = Some(Bound {
        text: "half of nbdcopy's".into(),
        limit: half_of(&time),
    });
    bytes.bound = Some(Bound {
        text: "half of nbdcopy's".into(),
        limit: half_of(&bytes),
    });
    used.bound = Some(Bound {
        text: "of the link".into(),
        limit: Some(0.9),
    });
    median.bound = Some(Bound {
        text: "1.15 round trips".into(),
        limit: Some(1.15 * rtt),
    });
    tail.bound = Some(Bound {
        text: "1.5 round trips + 10 ms".into(),
        limit: Some(1.5 * rtt + 10.0),
    });
    let note = format!(
        "{} MiB disk, {} MB of data. Four guests each read 4 KiB where the disk has data, pause \
         50 ms, and so on; cold is what took at least 0.9 round trips, counted once ten round trips \
         have passed. Link used: median of samples of 250 ms, of the link's rate with headers. ≈ is \
         projected from the pace of the first {} s. nbdcopy and convert serve no guest. The \
         emulator used {:.0} % of a core.",
        disk.size_bytes >> 20,
        disk.data_bytes() / 1_000_000,
        CUT_OFF.as_secs(),
        100.0 * crate::report::median(emulator),
    );
    let charts = charts(sites, &watched);
    let grid = Grid {
        section: "copy",
        title: format!("Until resident: {}", case.name()),
        note,
        columns: columns(&movers),
        rows: vec![time, bytes, used, median, tail, reads],
    };
    Ok(Findings { grid, charts })
}

fn put(row: &mut Row, index: usize, value: f64, projected: bool) {
    row.cells[index].values.push(value);
    row.cells[index].projected |= projected;
}

fn charts(sites: &Sites, watched: &[(String, Watched)]) -> Vec<Chart> {
    let case = &sites.case;
    let name = format!("{}-{}ms", case.mbit, case.rtt_ms);
    let line = |of: fn(&Watched) -> Vec<(f64, f64)>| -> Vec<Series> {
        let series = watched.iter();
        series
            .map(|(name, watched)| Series::line(name, of(watched)))
            .collect()
    };
    let throughput = Chart {
        file: format!("copy-{name}-throughput"),
        title: format!("Throughput on the wire, {}", case.name()),
        x_label: "seconds from the start".into(),
        y_label: "Mbit/s".into(),
        y_max: None,
        log: false,
        marks: vec![("the link's rate".into(), case.mbit as f64)],
        series: line(|watched| {
            // Over a second, so that the lines can be told apart.
            let pairs = watched.moments.iter().zip(watched.moments.iter().skip(4));
            pairs
                .map(|(a, b)| {
                    let bits = (b.wire_bytes - a.wire_bytes) as f64 * 8.0;
                    (
                        f64::midpoint(a.at_s, b.at_s),
                        bits / (b.at_s - a.at_s) / 1e6,
                    )
                })
                .collect()
        }),
    };
    let resident = Chart {
        file: format!("copy-{name}-resident"),
        title: format!("Data at the new site, {}", case.name()),
        x_label: "seconds from the start".into(),
        y_label: "% of the disk's data".into(),
        y_max: Some(100.0),
        log: false,
        marks: Vec::new(),
        series: line(|watched| {
            let moments = watched.moments.iter();
            moments.map(|m| (m.at_s, 100.0 * m.arrived)).collect()
        }),
    };
    let felt = watched
        .iter()
        .filter(|(_, watched)| !watched.felt.is_empty());
    let latency = Chart {
        file: format!("copy-{name}-latency"),
        title: format!("A guest's 4 KiB reads meanwhile, {}", case.name()),
        x_label: "seconds from the start".into(),
        y_label: "ms, logarithmic".into(),
        y_max: None,
        log: true,
        marks: vec![("one round trip".into(), case.rtt_ms as f64)],
        series: felt
            .map(|(name, watched)| {
                let points = watched.felt.iter().map(|felt| (felt.at_s, felt.ms));
                Series::dots(name, points.collect())
            })
            .collect(),
    };
    vec![throughput, resident, latency]
}
