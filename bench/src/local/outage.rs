//! What an outage of the source costs what is here: nothing, or it would be a fault.
//!
//! A destination in the middle of its move: all is here but the last MiB. Its source is killed, and a
//! client waits for a block of that MiB all the while. Beside it a plain volume of the same content.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hikkoshi_nbd::wire::command;

use super::Bench;
use crate::client::{Connection, Load, Operation, Pattern};
use crate::report::{Role, Row, Table, Unit};
use crate::server::{Kind, Server};

/// What never comes, in bytes; the loads leave it alone.
const TAIL_BYTES: u64 = 1 << 20;

/// Passes over the disk that are tried until all is here.
const MAX_PASSES: usize = 100;

/// Name, operation, depth; all of 4 KiB, anywhere.
const WORKLOADS: [(&str, Operation, usize); 4] = [
    ("outage-read-4k-qd1", Operation::Read, 1),
    ("outage-read-4k-qd32", Operation::Read, 32),
    ("outage-write-4k-qd1", Operation::Write, 1),
    ("outage-write-4k-qd32", Operation::Write, 32),
];

/// The table.
pub fn run(bench: &Bench<'_>, show: &mut impl FnMut(Table)) -> Result<()> {
    let wanted: Vec<_> = WORKLOADS
        .into_iter()
        .filter(|workload| bench.wanted("outage", workload.0))
        .collect();
    let possible = bench.kinds.contains(&Kind::Hikkoshi) && bench.kinds.contains(&Kind::Nbdkit);
    if wanted.is_empty() || !possible {
        return Ok(());
    }
    bench.progress("moving all but a MiB, and ending the source");
    let dir = tempfile::tempdir_in(bench.dir.path())?;
    let image = |name: &str| -> Result<std::path::PathBuf> {
        let path = dir.path().join(name);
        let bytes = bench.size_bytes() + TAIL_BYTES;
        bench.content.write_image(&path, bytes)?;
        Ok(path)
    };
    let serve = |kind: Kind, name: &str| -> Result<Server> {
        let at = bench.unix(name);
        let serving = bench.programs.plain(kind, &image(name)?, &at);
        bench.start(name, serving, at)
    };
    let plain = serve(Kind::Hikkoshi, "outage-plain")?;
    let source = serve(Kind::Nbdkit, "outage-source")?;
    let destination = dir.path().join("outage.img");
    let at = bench.unix("outage");
    let mut serving = bench.programs.hikkoshi(&destination, &at);
    serving.args(["--from", &source.endpoint.uri(), "--handoff", "now"]);
    serving.arg("--no-background");
    let moving = bench.start("outage", serving, at)?;
    fetch_all_but_the_tail(bench, &moving, &destination)?;
    drop(source);

    let mut waiting = Connection::open(&moving.endpoint, 1, true)?;
    let last = bench.size_bytes() + TAIL_BYTES - 4096;
    waiting.request(0, command::READ, last, 4096, false);
    waiting.flush(&bench.content)?;

    let mut rows = Vec::new();
    for (workload, operation, depth) in wanted {
        bench.progress(workload);
        let load = Load {
            operation,
            pattern: Pattern::Random,
            length: 4096,
            depth,
            connections: 1,
        };
        rows.push(Row {
            workload: workload.to_owned(),
            unit: Unit::Iops,
            samples: bench.interleave(&[&plain, &moving], &load)?,
        });
    }
    ensure!(
        absent_bytes(bench, &destination)? == TAIL_BYTES,
        "the tail has come, so there was no outage"
    );
    drop(waiting);
    show(Table {
        title: "What is here, while the source is gone and a read waits for it".to_owned(),
        note: format!(
            "4 KiB, anywhere; at depth 1 the latency is the inverse of the rate. {} rounds of {:?}; \
             CPU in µs an operation; ratios against the plain volume.",
            bench.rounds(),
            bench.duration()
        ),
        columns: vec![
            ("plain".to_owned(), Role::Reference),
            ("in the outage".to_owned(), Role::Subject),
        ],
        rows,
    });
    Ok(())
}

fn fetch_all_but_the_tail(bench: &Bench<'_>, moving: &Server, image: &Path) -> Result<()> {
    let pass = Load {
        operation: Operation::Read,
        // A short pass in order would never get beyond what came before.
        pattern: Pattern::Random,
        length: 1 << 20,
        depth: 8,
        connections: 1,
    };
    let mut absent = 0;
    for seed in 0..MAX_PASSES {
        bench.measure(moving, &pass, u64::try_from(seed)?)?;
        absent = absent_bytes(bench, image)?;
        if absent == TAIL_BYTES {
            return Ok(());
        }
    }
    anyhow::bail!("{absent} bytes have not come in {MAX_PASSES} passes, not {TAIL_BYTES}")
}

fn absent_bytes(bench: &Bench<'_>, image: &Path) -> Result<u64> {
    let control = format!("unix:{}.control", image.display());
    let output = Command::new(&bench.programs.hikkoshi)
        .args(["status", "--json", "--control", &control])
        .output()
        .context("run hikkoshi")?;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    status["absent_bytes"].as_u64().context("absent_bytes")
}
