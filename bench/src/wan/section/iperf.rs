//! iperf3: what plain TCP gets from a link.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::process::{Process, listens_on};
use serde_json::Value;
use tempfile::TempDir;

use crate::wan::Bench;
use crate::wan::site::Sites;

const PORT: u16 = 5201;
const SOON: Duration = Duration::from_secs(20);

/// Its connections, where nothing else is compared: as many as hikkoshi has.
pub(super) const STREAMS: usize = 4;

/// How much it sends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Amount {
    /// So many bytes, the start of TCP included.
    Bytes(u64),
    /// For so long, after a start that is not counted.
    Time(Duration, Duration),
}

/// One that listens at the new site.
pub(super) struct Listening {
    /// Until dropped.
    _server: Process,
    /// After the processes that write there.
    dir: TempDir,
}

/// One that sends from the old site.
pub(super) struct Sending {
    client: Process,
    listening: Listening,
}

impl Listening {
    pub fn start(bench: &Bench<'_>, sites: &Sites) -> Result<Self> {
        let dir = bench.scratch(bench.fast_dir())?;
        let address = sites.link.address_b.to_string();
        let port = PORT.to_string();
        let log = dir.path().join("server");
        let arguments = ["--server", "--one-off", "--bind", &address, "--port", &port];
        let mut server = Process::start(Some(&sites.new), "iperf3", arguments, &log)?;
        server.wait_until("listening socket", SOON, |server| {
            listens_on(server.pid(), PORT)
        })?;
        Ok(Self {
            _server: server,
            dir,
        })
    }

    /// Begins to send to it, over so many connections.
    pub fn send(self, sites: &Sites, streams: usize, amount: Amount) -> Result<Sending> {
        let address = sites.link.address_b.to_string();
        let port = PORT.to_string();
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
        let log = self.said();
        let client = Process::start(Some(&sites.old), "iperf3", &arguments, &log)?;
        Ok(Sending {
            client,
            listening: self,
        })
    }

    /// Where the one that sends says what it got.
    fn said(&self) -> PathBuf {
        self.dir.path().join("client")
    }
}

impl Sending {
    /// Fails if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        self.client.check_alive()
    }

    /// What it got once all is sent, in 10^6 bytes a second.
    pub fn rate(mut self, limit: Duration) -> Result<f64> {
        let status = self.client.wait(limit)?;
        let said = std::fs::read_to_string(self.listening.said())?;
        ensure!(status.success(), "iperf3 failed, {status}: {said}");
        let report: Value = serde_json::from_str(&said).context("read iperf3's report")?;
        let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(bits.context("no rate in iperf3's report")? / 8e6)
    }
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
    let listening = Listening::start(bench, sites)?;
    listening.send(sites, streams, amount)?.rate(limit)
}
