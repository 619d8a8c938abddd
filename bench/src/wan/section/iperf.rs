//! iperf3: what plain TCP gets from a link.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::process::{Process, listens_on};
use serde_json::Value;

use crate::wan::Bench;
use crate::wan::site::Sites;

const PORT: u16 = 5201;
const SOON: Duration = Duration::from_secs(20);

/// How much it sends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Amount {
    /// So many bytes, the start of TCP included.
    Bytes(u64),
    /// For so long, after a start that is not counted.
    Time(Duration, Duration),
}

/// What iperf3 gets from the old site to the new one over so many connections, in 10^6 bytes a
/// second.
pub(super) fn iperf3(
    bench: &Bench<'_>,
    sites: &Sites,
    streams: usize,
    amount: Amount,
    limit: Duration,
) -> Result<f64> {
    let dir = bench.scratch(bench.fast_dir())?;
    let address = sites.link.address_b.to_string();
    let port = PORT.to_string();
    let log = dir.path().join("server");
    let arguments = ["--server", "--one-off", "--bind", &address, "--port", &port];
    let mut server = Process::start(Some(&sites.new), "iperf3", arguments, &log)?;
    server.wait_until("listening socket", SOON, |server| {
        listens_on(server.pid(), PORT)
    })?;
    let log = dir.path().join("client");
    let mut arguments: Vec<String> = ["--client", &address, "--port", &port, "--json"]
        .map(str::to_owned)
        .into();
    arguments.extend(["--parallel".into(), streams.to_string()]);
    match amount {
        Amount::Bytes(bytes) => arguments.extend(["--bytes".into(), bytes.to_string()]),
        Amount::Time(time, start) => {
            arguments.extend(["--time".into(), time.as_secs().max(1).to_string()]);
            arguments.extend(["--omit".into(), start.as_secs().max(1).to_string()]);
        }
    }
    let mut client = Process::start(Some(&sites.old), "iperf3", &arguments, &log)?;
    let status = client.wait(limit)?;
    let said = std::fs::read_to_string(&log)?;
    ensure!(status.success(), "iperf3 failed, {status}: {said}");
    let report: Value = serde_json::from_str(&said).context("read iperf3's report")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.context("no rate in iperf3's report")? / 8e6)
}
