//! What a huge sparse disk costs before a byte of it has moved: time to start, memory.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Bench;
use crate::report::{align, median, short};
use crate::server::{Kind, Server, nbdkit};

/// Sizes, with what is aimed at.
const DISKS: [(&str, &str); 2] = [("1T", "100 MiB"), ("16T", "1.1 GiB")];
/// How long the volume is watched after it has started: the background copy runs meanwhile, and
/// what it touches counts.
const WATCH: Duration = Duration::from_secs(5);

/// Memory that a process answers for, in bytes.
#[derive(Clone, Copy, Default)]
struct Memory {
    /// Resident, of any kind.
    resident: u64,
    /// Resident and private to it or shared out fairly.
    proportional: u64,
    /// Pages of the tmpfs files it maps, mapped or not.
    tmpfs: u64,
    /// Private memory and the tmpfs files.
    all: u64,
}

/// One table, printed here; returns the figures.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Value>> {
    let kinds = [Kind::Hikkoshi, Kind::Nbdkit];
    if !bench.wanted("memory", "start") || !kinds.iter().all(|k| bench.kinds.contains(k)) {
        return Ok(Vec::new());
    }
    let head = [
        "disk",
        "start ms",
        "nbdinfo ms",
        "RSS MiB",
        "PSS MiB",
        "tmpfs MiB",
        "all MiB",
        "all, copying MiB",
        "aim",
    ];
    let mut lines = vec![head.map(str::to_owned).to_vec()];
    let mut figures = Vec::new();
    for (size, aim) in DISKS {
        bench.progress(&format!("memory, {size}"));
        let mut runs = Vec::new();
        for _ in 0..bench.rounds().min(3) {
            runs.push(start(bench, size)?);
        }
        let middle = |pick: fn(&Run) -> f64| median(runs.iter().map(pick));
        lines.push(vec![
            size.to_owned(),
            short(middle(|r| r.ready.as_secs_f64() * 1e3)),
            short(middle(|r| r.nbdinfo.as_secs_f64() * 1e3)),
            short(middle(|r| mebibytes(r.first.resident))),
            short(middle(|r| mebibytes(r.first.proportional))),
            short(middle(|r| mebibytes(r.first.tmpfs))),
            short(middle(|r| mebibytes(r.first.all))),
            short(middle(|r| mebibytes(r.most))),
            format!("1 s, {aim}"),
        ]);
        figures.extend(runs.iter().map(|run| {
            json!({ "disk": size, "ready_s": run.ready.as_secs_f64(),
                "nbdinfo_s": run.nbdinfo.as_secs_f64(), "rss_bytes": run.first.resident,
                "pss_bytes": run.first.proportional, "tmpfs_bytes": run.first.tmpfs,
                "all_bytes": run.first.all, "all_copying_bytes": run.most })
        }));
    }
    println!(
        "\n### A huge sparse disk with a source\n\nFrom the start of the process until the export \
         is described to a client, and memory then and at most in the next {WATCH:?}, while the \
         background copy runs (the source is all holes). All = private memory and the whole of the \
         tmpfs files it maps.\n\n{}",
        align(&lines)
    );
    Ok(figures)
}

struct Run {
    ready: Duration,
    nbdinfo: Duration,
    first: Memory,
    most: u64,
}

fn start(bench: &Bench<'_>, size: &str) -> Result<Run> {
    let dir = tempfile::tempdir_in(bench.dir.path())?;
    let source_at = bench.unix("huge-source");
    let mut command = nbdkit(&source_at);
    command.arg("null").arg(format!("size={size}"));
    let source = bench.start("huge source", command, source_at)?;
    let at = bench.unix("huge");
    let mut command = bench.programs.hikkoshi(&dir.path().join("image"), &at);
    command.args(["--from", &source.endpoint.uri(), "--handoff", "now"]);
    let server = bench.start("huge", command, at)?;
    let first = memory(&server)?;
    let asked = Instant::now();
    let info = Command::new("nbdinfo")
        .args(["--size", &server.endpoint.uri()])
        .stdout(Stdio::null())
        .status()
        .context("run nbdinfo (Debian package libnbd-bin)")?;
    ensure!(info.success(), "nbdinfo failed");
    let nbdinfo = server.ready_after + asked.elapsed();
    let mut most = first.all;
    let end = Instant::now() + WATCH;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
        most = most.max(memory(&server)?.all);
    }
    Ok(Run {
        ready: server.ready_after,
        nbdinfo,
        first,
        most,
    })
}

fn memory(server: &Server) -> Result<Memory> {
    let proc = format!("/proc/{}", server.pid());
    let rollup = fs::read_to_string(format!("{proc}/smaps_rollup")).context("read smaps_rollup")?;
    let field = |name: &str| -> u64 {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    let files = server.mapped_tmpfs_files();
    let tmpfs = files
        .iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|m| m.blocks() * 512);
    let tmpfs = tmpfs.sum();
    Ok(Memory {
        resident: field("Rss:"),
        proportional: field("Pss:"),
        tmpfs,
        all: field("Pss_Anon:") + field("Pss_File:") + tmpfs,
    })
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
