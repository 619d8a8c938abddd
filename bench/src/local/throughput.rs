//! Plain exports of the same content: hikkoshi, nbdkit and qemu-nbd, over Unix sockets and TCP.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Bench, Client, role};
use crate::client::{Load, Operation, Pattern, Reading, Sample};
use crate::report::{Row, Table, Unit};
use crate::server::Server;

/// Name, operation, pattern, bytes, depth, connections.
const WORKLOADS: [(&str, Operation, Pattern, u32, usize, usize); 8] = [
    ("read-4k-qd1", Operation::Read, Pattern::Random, 4096, 1, 1),
    (
        "read-4k-qd32",
        Operation::Read,
        Pattern::Random,
        4096,
        32,
        1,
    ),
    (
        "read-4k-4xqd32",
        Operation::Read,
        Pattern::Random,
        4096,
        32,
        4,
    ),
    (
        "write-4k-qd1",
        Operation::Write,
        Pattern::Random,
        4096,
        1,
        1,
    ),
    (
        "write-4k-qd32",
        Operation::Write,
        Pattern::Random,
        4096,
        32,
        1,
    ),
    (
        "write-4k-4xqd32",
        Operation::Write,
        Pattern::Random,
        4096,
        32,
        4,
    ),
    (
        "read-1m-qd8",
        Operation::Read,
        Pattern::Sequential,
        1 << 20,
        8,
        1,
    ),
    (
        "write-1m-qd8",
        Operation::Write,
        Pattern::Sequential,
        1 << 20,
        8,
        1,
    ),
];

/// One table for each transport.
pub fn run(bench: &Bench<'_>, show: &mut impl FnMut(Table)) -> Result<()> {
    for transport in ["unix", "tcp"] {
        let wanted: Vec<_> = WORKLOADS
            .iter()
            .filter(|workload| bench.wanted(transport, workload.0))
            .collect();
        if wanted.is_empty() {
            continue;
        }
        let mut servers = Vec::new();
        for &kind in &bench.kinds {
            // Each has a file of its own: servers lock images, and differently.
            let image = bench.image(bench.dir.path(), &format!("{}.img", kind.name()))?;
            let endpoint = if transport == "unix" {
                bench.unix(kind.name())
            } else {
                Bench::tcp()?
            };
            let command = bench.programs.plain(kind, &image, &endpoint);
            servers.push(bench.start(kind.name(), command, endpoint)?);
        }
        let mut rows = Vec::new();
        for &&(workload, operation, pattern, length, depth, connections) in &wanted {
            bench.progress(&format!("{transport} {workload}"));
            let load = Load {
                operation,
                pattern,
                length,
                depth,
                connections,
            };
            let samples = match bench.options.client {
                Client::Own => bench.interleave(&servers.iter().collect::<Vec<_>>(), &load)?,
                Client::Fio => interleave_fio(bench, &servers, &load)?,
            };
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
        show(Table {
            title: format!("Plain exports, {transport}"),
            note: format!(
                "{} MiB in the page cache; {} rounds of {:?}, interleaved: median (least–greatest). \
                 CPU in µs an operation. Ratios against the better peer. † the client is the limit.",
                bench.options.size,
                bench.rounds(),
                bench.duration()
            ),
            columns: bench
                .kinds
                .iter()
                .map(|&k| (k.name().to_owned(), role(k)))
                .collect(),
            rows,
        });
    }
    Ok(())
}

fn interleave_fio(bench: &Bench<'_>, servers: &[Server], load: &Load) -> Result<Vec<Vec<Sample>>> {
    let mut samples = vec![Vec::new(); servers.len()];
    for _ in 0..bench.rounds() {
        for (server, samples) in servers.iter().zip(&mut samples) {
            samples.push(fio(bench, server, load)?);
        }
    }
    Ok(samples)
}

/// The same load from fio's nbd engine, as a cross-check. fio runs a thread for each connection,
/// all of them on the client's core, and starts and ends within what is measured, so CPU figures
/// are a little high.
fn fio(bench: &Bench<'_>, server: &Server, load: &Load) -> Result<Sample> {
    let kind = match (load.operation, load.pattern) {
        (Operation::Read, Pattern::Sequential) => "read",
        (Operation::Read, _) => "randread",
        (_, Pattern::Sequential) => "write",
        _ => "randwrite",
    };
    let before = Reading::take(server)?;
    let output = std::process::Command::new("fio")
        .args([
            "--name=x",
            "--ioengine=nbd",
            "--thread",
            "--time_based",
            "--group_reporting",
        ])
        .args(["--output-format=json", "--norandommap"])
        .arg(format!("--uri={}", server.endpoint.uri()))
        .arg(format!("--rw={kind}"))
        .arg(format!("--bs={}", load.length))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--numjobs={}", load.connections))
        .arg(format!("--runtime={}ms", bench.duration().as_millis()))
        .current_dir(bench.dir.path())
        .output()
        .context("run fio (Debian package fio)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio failed: {said}");
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').map_or("", |start| &text[start..]);
    let report: Value = serde_json::from_str(json).context("read fio's report")?;
    let job = &report["jobs"][0];
    let part = &job[if load.operation == Operation::Read {
        "read"
    } else {
        "write"
    }];
    let operations = part["total_ios"]
        .as_u64()
        .context("fio's report has no total_ios")?;
    let bytes = part["io_bytes"]
        .as_u64()
        .context("fio's report has no io_bytes")?;
    let seconds = part["runtime"]
        .as_f64()
        .context("fio's report has no runtime")?
        / 1000.0;
    let threads = load.connections as f64;
    let cpu = |name: &str| job[name].as_f64().unwrap_or(0.0) / 100.0;
    let mut sample = Reading::take(server)?.since(&before, operations, bytes);
    sample.seconds = seconds;
    sample.client_cpu_s = (cpu("usr_cpu") + cpu("sys_cpu")) * seconds * threads;
    Ok(sample)
}
