//! A guest that boots, and one that compiles, right after the switch: recorded once, replayed in
//! every way.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::cache::copy_image;

use super::{Attempt, Findings, Section, columns, each, movers, rows};
use crate::client::Endpoint;
use crate::report::Role;
use crate::trace::{DiskMap, Replay, Thinking, Trace, replay};
use crate::wan::disk::Disk;
use crate::wan::grid::{Better, Bound, Grid, Row};
use crate::wan::mover::{How, Mover};
use crate::wan::moving::{Moving, source_socket};
use crate::wan::plot::{Chart, Series};
use crate::wan::site::{Sites, start_server};
use crate::wan::watch::watch;
use crate::wan::{Bench, CUT_OFF};

const DISK: &[u8] = include_bytes!("../../../traces/disk.map");
/// What is replayed, and what the source has seen before where it may know the guest: another
/// recording of the same, since no two boots are alike.
const WORK: [(&str, &[u8]); 2] = [
    ("boot", include_bytes!("../../../traces/boot-1.trace")),
    ("compile", include_bytes!("../../../traces/compile-1.trace")),
];
const SEEN_BEFORE: [&[u8]; 2] = [
    include_bytes!("../../../traces/boot-2.trace"),
    include_bytes!("../../../traces/compile-2.trace"),
];
/// The guest thinks no longer than this at once.
const THINK_CAP: Duration = Duration::from_millis(500);
/// What has not ended by then, and the guest's own time on top, is projected from the requests answered.
const LIMIT: Duration = Duration::from_secs(14);

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let map = DiskMap::decode(DISK).context("read disk.map")?;
    let disk = Disk::traced(&map)?;
    let traces: Vec<(&str, Trace)> = WORK
        .into_iter()
        .map(|(name, bytes)| Ok((name, Trace::decode(bytes).context(name)?)))
        .collect::<Result<_>>()?;
    let ours = vec![
        Mover::ours_with_heat(),
        Mover::ours(),
        Mover::ours_from_nbdkit(),
    ];
    let movers = movers(bench, ours, &[How::Stream, How::Scan, How::Nbdcopy]);
    let local = movers.len();
    let mut columns = columns(&movers);
    columns.push(("local disk".into(), Role::Other));
    let mut table = Vec::new();
    let mut charts = Vec::new();
    for (name, trace) in &traces {
        let thinking = Thinking {
            scale: bench.options.think * 1e6 / trace.think_us() as f64,
            cap: THINK_CAP,
        };
        let [mut time, mut extra] = rows(
            [
                (format!("{name}, s").as_str(), Better::Less),
                (
                    format!("{name}, slowdown: time beyond a local disk's, %").as_str(),
                    Better::Less,
                ),
            ],
            columns.len(),
        );
        for _ in 0..bench.rounds() {
            bench.progress(&format!("{}, trace: {name}, local disk", sites.case.name()));
            let outcome = on_local_disk(bench, &disk, trace, thinking)?;
            time.cells[local].values.push(outcome.seconds);
        }
        let base = time.cells[local].middle().context("no local disk")?;
        let mut lines = Vec::new();
        let dir = bench.fast_dir();
        each(
            bench,
            sites,
            Section::Trace,
            &movers,
            &disk,
            dir,
            true,
            |index, attempt| {
                let (seconds, complete, outcome) = measure(attempt, sites, trace, thinking, base)?;
                let cell = &mut time.cells[index];
                cell.values.push(seconds);
                cell.projected |= !complete;
                let cell = &mut extra.cells[index];
                cell.values.push(100.0 * (seconds - base) / base);
                cell.projected |= !complete;
                if let Some(outcome) = outcome {
                    lines.push((attempt.mover.name.clone(), progress_of(&outcome)));
                }
                Ok(())
            },
        )?;
        extra.bound = third_of_best_peer(&extra, &movers);
        lines.dedup_by(|a, b| a.0 == b.0);
        charts.push(Chart {
            file: format!("trace-{name}-{}-{}ms", sites.case.mbit, sites.case.rtt_ms),
            title: format!("Reads of a {name} answered, {}", sites.case.name()),
            x_label: "seconds from the switch".into(),
            y_label: "reads answered".into(),
            y_max: None,
            log: false,
            marks: Vec::new(),
            series: lines
                .into_iter()
                .map(|(name, points)| Series::line(&name, points))
                .collect(),
        });
        table.extend([time, extra]);
    }
    let grid = Grid {
        section: "trace",
        title: format!(
            "Boot and compile right after the switch: {}",
            sites.case.name()
        ),
        note: format!(
            "Recorded requests of a Debian that boots and of one that compiles Lua (bench/traces), each asked \
             when what it followed has been answered and the guest has thought in between: {} s in all, in the \
             recorded proportions, {} ms at most at once. Where heat is known the source has served \
             another recording of both before. nbdcopy's guest starts when the copy has ended. The local \
             disk is a plain nbdkit on the same file system. ≈ is projected from what was \
             answered within {} s, by peers within {} s unless --full, or copied.",
            bench.options.think,
            THINK_CAP.as_millis(),
            limit(bench).as_secs(),
            CUT_OFF.as_secs(),
        ),
        columns,
        rows: table,
    };
    Ok(Findings { grid, charts })
}

/// How long a replay may take.
fn limit(bench: &Bench<'_>) -> Duration {
    LIMIT + Duration::from_secs_f64(bench.options.think.clamp(0.0, 1e6))
}

fn third_of_best_peer(extra: &Row, movers: &[Mover]) -> Option<Bound> {
    let peers = movers.iter().zip(&extra.cells);
    let peers = peers.filter(|(mover, _)| mover.role() == Role::Reference);
    let best = peers
        .filter_map(|(_, cell)| cell.middle())
        .min_by(f64::total_cmp);
    Some(Bound {
        text: "a third of the best peer's".into(),
        limit: best.map(|best| best / 3.0),
    })
}

/// Seconds, whether all requests were answered, and what there is to draw.
fn measure(
    attempt: &Attempt<'_>,
    sites: &Sites,
    trace: &Trace,
    thinking: Thinking,
    local_s: f64,
) -> Result<(f64, bool, Option<Replay>)> {
    let (bench, mover, terms) = (attempt.bench, attempt.mover, attempt.terms());
    let source = mover.start_source(&terms)?;
    if mover.wants_heat() {
        let at_source = Endpoint::Unix(source_socket(terms.dir));
        let hurried = Thinking {
            scale: 0.0,
            cap: Duration::ZERO,
        };
        for seen in SEEN_BEFORE {
            let seen = Trace::decode(seen)?;
            let outcome =
                replay(&seen, &at_source, hurried, limit(bench)).context("at the source")?;
            ensure!(outcome.complete, "the source is too slow");
        }
    }
    let moving: Moving = mover.start(&terms, source)?;
    let Some(endpoint) = moving.endpoint.clone() else {
        let patience = bench.watched_for(false, terms.disk, &sites.case);
        let seen = watch(sites, terms.disk, patience, false, || Ok(moving))?;
        let (copied, _, projected) = seen
            .until_resident(&sites.case)
            .context("nothing has arrived")?;
        return Ok((copied + local_s, !projected, None));
    };
    let limit = match mover.role() {
        Role::Reference if !bench.options.full => CUT_OFF,
        _ => limit(bench),
    };
    let outcome = replay(trace, &endpoint, thinking, limit)?;
    ensure!(outcome.answered > 0, "nothing was answered");
    let all = trace.requests.len() as f64;
    let seconds = if outcome.complete {
        outcome.seconds
    } else {
        outcome.seconds * all / outcome.answered as f64
    };
    Ok((seconds, outcome.complete, Some(outcome)))
}

fn on_local_disk(
    bench: &Bench<'_>,
    disk: &Disk,
    trace: &Trace,
    thinking: Thinking,
) -> Result<Replay> {
    let dir = bench.scratch(bench.fast_dir())?;
    let image = dir.path().join("image");
    copy_image(&disk.path, &image)?;
    let socket = dir.path().join("sock");
    let arguments = [
        "--foreground".to_owned(),
        "-U".to_owned(),
        socket.display().to_string(),
        "file".to_owned(),
        image.display().to_string(),
    ];
    let endpoint = Endpoint::Unix(socket);
    let log = dir.path().join("log");
    let _server = start_server(None, "nbdkit", &arguments, &endpoint, &log)?;
    let outcome = replay(trace, &endpoint, thinking, limit(bench))?;
    ensure!(outcome.complete, "the local disk is too slow");
    Ok(outcome)
}

/// Reads answered against time.
fn progress_of(outcome: &Replay) -> Vec<(f64, f64)> {
    let mut ends: Vec<f64> = outcome.reads.iter().map(|(at, took)| at + took).collect();
    ends.sort_by(f64::total_cmp);
    let counted = (1_u32..).zip(&ends).map(|(n, end)| (*end, f64::from(n)));
    std::iter::once((0.0, 0.0)).chain(counted).collect()
}
