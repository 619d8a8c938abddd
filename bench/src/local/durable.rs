//! What a move costs those who flush, and what is left of that cost when it is over.
//!
//! Three volumes of ours: a plain one, one in the middle of a move (nothing is fetched, so every
//! write meets an absent block), and one that has completed its move and lost its source.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Bench;
use crate::client::{Endpoint, Load, Operation, Pattern};
use crate::report::{Role, Row, Table, Unit};
use crate::server::{Kind, Server};

/// How long the move of the resident volume may take.
const MOVE_TIMEOUT: &str = "120s";

/// Tables for flushes in memory and on a disk, and for a resident volume.
pub fn run(bench: &Bench<'_>, show: &mut impl FnMut(Table)) -> Result<()> {
    if !bench.kinds.contains(&Kind::Hikkoshi) || !bench.kinds.contains(&Kind::Nbdkit) {
        return Ok(());
    }
    let flush: Vec<_> = [("write-flush-4k-qd1", 1), ("write-flush-4k-qd8", 8)]
        .into_iter()
        .filter(|(name, _)| bench.wanted("flush", name))
        .collect();
    let resident: Vec<_> = RESIDENT_WORKLOADS
        .into_iter()
        .filter(|workload| bench.wanted("resident", workload.0))
        .collect();
    if flush.is_empty() && resident.is_empty() {
        return Ok(());
    }
    {
        let volumes = Volumes::start(bench, bench.dir.path())?;
        if !flush.is_empty() {
            show(flushes(
                bench,
                &volumes,
                &flush,
                "tmpfs, where flushing itself is free",
            )?);
        }
        if !resident.is_empty() {
            show(residents(bench, &volumes, &resident)?);
        }
    }
    if !flush.is_empty() && bench.options.disk != Path::new("none") {
        std::fs::create_dir_all(&bench.options.disk)?;
        let dir = tempfile::Builder::new()
            .prefix("hikkoshi-bench-")
            .tempdir_in(&bench.options.disk)?;
        let volumes = Volumes::start(bench, dir.path())?;
        show(flushes(bench, &volumes, &flush, "a disk")?);
    }
    Ok(())
}

/// Name, operation, pattern, bytes, depth.
const RESIDENT_WORKLOADS: [(&str, Operation, Pattern, u32, usize); 5] = [
    (
        "resident-read-4k-qd1",
        Operation::Read,
        Pattern::Random,
        4096,
        1,
    ),
    (
        "resident-read-4k-qd32",
        Operation::Read,
        Pattern::Random,
        4096,
        32,
    ),
    (
        "resident-write-4k-qd32",
        Operation::Write,
        Pattern::Random,
        4096,
        32,
    ),
    (
        "resident-read-1m-qd8",
        Operation::Read,
        Pattern::Sequential,
        1 << 20,
        8,
    ),
    (
        "resident-write-1m-qd8",
        Operation::Write,
        Pattern::Sequential,
        1 << 20,
        8,
    ),
];

/// The volumes that live as long as a table, and the source that one of them moves from.
struct Volumes<'a> {
    dir: &'a Path,
    source: Server,
    plain: Server,
    resident: Server,
    nbdkit: Server,
}

impl<'a> Volumes<'a> {
    fn start(bench: &Bench<'_>, dir: &'a Path) -> Result<Self> {
        bench.progress("completing a move");
        let serve = |kind: Kind, name: &str| -> Result<Server> {
            let image = bench.image(dir, &format!("{name}.img"))?;
            let endpoint = bench.unix(name);
            bench.start(
                name,
                bench.programs.plain(kind, &image, &endpoint),
                endpoint,
            )
        };
        let source = serve(Kind::Nbdkit, "source")?;
        let plain = serve(Kind::Hikkoshi, "plain")?;
        let nbdkit = serve(Kind::Nbdkit, "nbdkit-plain")?;
        let gone = serve(Kind::Nbdkit, "source-gone")?;
        let image = dir.join("resident.img");
        let at = bench.unix("resident");
        let resident = bench.start("resident", destination(bench, &image, &gone, &at), at)?;
        bench.programs.control(
            &image,
            &["wait", "--for", "resident", "--timeout", MOVE_TIMEOUT],
        )?;
        drop(gone);
        std::fs::remove_file(dir.join("source-gone.img"))?;
        Ok(Self {
            dir,
            source,
            plain,
            resident,
            nbdkit,
        })
    }
}

fn destination(bench: &Bench<'_>, image: &Path, source: &Server, at: &Endpoint) -> Command {
    let mut command = bench.programs.hikkoshi(image, at);
    command.args(["--from", &source.endpoint.uri(), "--handoff", "now"]);
    command
}

fn flushes(
    bench: &Bench<'_>,
    volumes: &Volumes<'_>,
    workloads: &[(&str, usize)],
    medium: &str,
) -> Result<Table> {
    let mut rows = Vec::new();
    for &(workload, depth) in workloads {
        bench.progress(&format!("{workload} on {medium}"));
        let load = Load {
            operation: Operation::WriteFlush,
            pattern: Pattern::Fresh,
            length: 4096,
            depth,
            connections: 1,
        };
        let mut samples = vec![Vec::new(); 4];
        for round in 0..bench.rounds() {
            // A new destination each round, or the blocks would not be absent any more.
            let dir = tempfile::tempdir_in(volumes.dir)?;
            let at = bench.unix("moving");
            let mut command = destination(bench, &dir.path().join("image"), &volumes.source, &at);
            command.arg("--no-background");
            let moving = bench.start("moving", command, at)?;
            let servers = [&volumes.plain, &moving, &volumes.resident, &volumes.nbdkit];
            bench.round(&servers, &load, round, &mut samples)?;
        }
        rows.push(Row {
            workload: workload.to_owned(),
            unit: Unit::Iops,
            samples,
        });
    }
    Ok(Table {
        title: format!("4 KiB random writes, each followed by a flush, on {medium}"),
        note: format!(
            "An operation is a write, its answer, a flush, its answer. During the move every write \
             meets an absent block. {} rounds of {:?}; CPU in µs an operation; ratios against the \
             plain volume.",
            bench.rounds(),
            bench.duration()
        ),
        columns: vec![
            ("plain".to_owned(), Role::Reference),
            ("during a move".to_owned(), Role::Subject),
            ("resident".to_owned(), Role::Subject),
            ("nbdkit".to_owned(), Role::Other),
        ],
        rows,
    })
}

fn residents(
    bench: &Bench<'_>,
    volumes: &Volumes<'_>,
    workloads: &[(&str, Operation, Pattern, u32, usize)],
) -> Result<Table> {
    let mut rows = Vec::new();
    for &(workload, operation, pattern, length, depth) in workloads {
        bench.progress(workload);
        let load = Load {
            operation,
            pattern,
            length,
            depth,
            connections: 1,
        };
        let samples = bench.interleave(&[&volumes.plain, &volumes.resident], &load)?;
        let unit = if length == 4096 {
            Unit::Iops
        } else {
            Unit::MegabytesPerSecond
        };
        rows.push(Row {
            workload: workload.to_owned(),
            unit,
            samples,
        });
    }
    Ok(Table {
        title: "A resident volume whose source is gone".to_owned(),
        note: format!(
            "{} rounds of {:?}; CPU in µs an operation; ratios against the plain volume.",
            bench.rounds(),
            bench.duration()
        ),
        columns: vec![
            ("plain".to_owned(), Role::Reference),
            ("resident".to_owned(), Role::Subject),
        ],
        rows,
    })
}
