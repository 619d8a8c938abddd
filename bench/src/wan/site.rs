//! Two sites and the emulated link between them, and what runs at them.
//!
//! Owns the namespaces, the link and TCP's settings for one link. Every measurement across a link
//! happens between these two: sources at the old site, destinations, and the programs that copy,
//! at the new one. What is on the wire is counted by the link, whatever the programs claim.

use std::fs;
use std::net::SocketAddrV4;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::process::{self, Process};
use serde::Serialize;

use crate::client::{Connection, Endpoint};

/// The port of the source, in a namespace where nobody else is.
const PORT: u16 = 10809;
/// How long a server may take until it answers. A handshake with a source is several round trips.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);
/// The least that a router queues.
const MIN_QUEUE_BYTES: u64 = 256 << 10;

/// One link of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LinkCase {
    /// Rate in 10^6 bits a second.
    pub mbit: u64,
    /// Round trip in milliseconds.
    pub rtt_ms: u64,
    /// Part of the packets that is lost by chance, in percent.
    pub loss_percent: f64,
    /// The queue in front of the line, in bandwidth-delay products.
    pub queue_bdp: f64,
}

impl LinkCase {
    /// For headings.
    pub fn name(&self) -> String {
        let loss = if self.loss_percent > 0.0 {
            format!(", {} % loss", self.loss_percent)
        } else {
            String::new()
        };
        format!("{} Mbit/s, {} ms{loss}", self.mbit, self.rtt_ms)
    }

    /// The round trip in seconds.
    pub fn rtt(&self) -> Duration {
        Duration::from_millis(self.rtt_ms)
    }

    /// The rate in bytes a second.
    pub fn bytes_per_s(&self) -> f64 {
        self.mbit as f64 * 1e6 / 8.0
    }

    /// Bytes that wait at most in front of the line.
    pub fn queue_bytes(&self) -> u64 {
        let product = self.mbit * 125 * self.rtt_ms;
        let per_mille = (self.queue_bdp * 1000.0).clamp(0.0, 1e6);
        // The float is a small whole number after rounding.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let per_mille = per_mille.round() as u64;
        (product * per_mille / 1000).max(MIN_QUEUE_BYTES)
    }

    fn spec(&self) -> LinkSpec {
        LinkSpec {
            rtt: self.rtt(),
            bits_per_s: self.mbit * 1_000_000,
            queue_bytes: self.queue_bytes(),
            loss: self.loss_percent / 100.0,
        }
    }
}

/// The two sites. Dropped, everything of them is gone.
pub struct Sites {
    /// What is between them; the old site is its first end.
    pub link: Link,
    /// What it is like.
    pub case: LinkCase,
    /// Where the disk is.
    pub old: Namespace,
    /// Where it goes.
    pub new: Namespace,
    real_time: bool,
}

impl Sites {
    /// Makes them, with this congestion control at both.
    pub fn new(case: LinkCase, congestion: &str) -> Result<Self> {
        let old = Namespace::new("wan-old")?;
        let new = Namespace::new("wan-new")?;
        let link = Link::new(&old, &new, case.spec())?;
        for site in [&old, &new] {
            site.enter(|| {
                // What one measurement learned of the link must not help the next.
                fs::write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1")
                    .context("switch off TCP's memory of destinations")
            })?;
            use_congestion_control(site, congestion)?;
        }
        let real_time = match link.run_first() {
            Ok(()) => true,
            Err(error) => {
                eprintln!("the emulator runs like anyone else: {error:#}");
                false
            }
        };
        Ok(Self {
            link,
            case,
            old,
            new,
            real_time,
        })
    }

    /// Whether the emulator runs before everything else.
    pub fn real_time(&self) -> bool {
        self.real_time
    }

    /// Where the source listens.
    pub fn source_address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.link.address_a, PORT)
    }

    /// The source as an NBD URI.
    pub fn source_uri(&self) -> String {
        format!("nbd://{}", self.source_address())
    }

    /// Starts the source, and waits until it listens.
    pub fn start_source(&self, program: &str, arguments: &[String], log: &Path) -> Result<Process> {
        let mut process = Process::start(Some(&self.old), program, arguments, log)?;
        process.wait_until("listening socket", START_TIMEOUT, |process| {
            process::listens_on(process.pid(), PORT)
        })?;
        Ok(process)
    }

    /// Starts a server at the new site, and waits until it describes its export to a client.
    pub fn start_destination(
        &self,
        program: &str,
        arguments: &[String],
        endpoint: &Endpoint,
        log: &Path,
    ) -> Result<Process> {
        start_server(Some(&self.new), program, arguments, endpoint, log)
    }
}

/// Starts a server, and waits until it describes its export to a client.
pub fn start_server(
    site: Option<&Namespace>,
    program: &str,
    arguments: &[String],
    endpoint: &Endpoint,
    log: &Path,
) -> Result<Process> {
    let mut process = Process::start(site, program, arguments, log)?;
    let start = Instant::now();
    loop {
        match Connection::open(endpoint, 1, false) {
            Ok(connection) => {
                connection.close()?;
                return Ok(process);
            }
            Err(error) => {
                process.check_alive()?;
                if start.elapsed() > START_TIMEOUT {
                    bail!(
                        "{program} does not answer ({error:#}); it said:\n{}",
                        process.tail()
                    );
                }
            }
        }
        std::thread::sleep(POLL);
    }
}

/// Makes all of a site's connections across its link use this congestion control. By its routes,
/// because the kernel lets a namespace have another default only if everyone may have it.
fn use_congestion_control(site: &Namespace, congestion: &str) -> Result<()> {
    for route in site.ip(&["route", "show"])?.lines() {
        let mut change = vec!["route", "replace"];
        change.extend(route.split_whitespace());
        change.extend(["congctl", congestion]);
        site.ip(&change)
            .with_context(|| format!("use congestion control {congestion}"))?;
    }
    Ok(())
}

/// How TCP is set at a site, for the record.
pub fn tcp_settings(site: &Namespace, congestion: &str) -> Result<String> {
    site.enter(|| {
        let read = |name: &str| {
            let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"));
            text.map(|text| text.split_whitespace().last().unwrap_or("?").to_owned())
        };
        Ok(format!(
            "congestion control {congestion}, buffers up to {} bytes to send and {} to receive",
            read("tcp_wmem")?,
            read("tcp_rmem")?,
        ))
    })
}
