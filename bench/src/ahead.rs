//! `bench ahead`: what a guest sees of a disk that is still at the other end of a wide-area link.
//!
//! Each measurement has a link of its own (two network namespaces and the testkit's emulator
//! between them, real TCP across it), a source at one end, and a destination at the other that has
//! nothing yet. The guest is one connection at depth 1, which is how a boot, a `cp` or a database
//! that follows pointers reads. Several binaries can be measured in turn, round by round. Needs root.

use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use hikkoshi_nbd::wire::command;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::process::Process;
use hikkoshi_testkit::server::Server;
use serde::Serialize;

use crate::client::{Connection, Content, Endpoint, Random};
use crate::report::median;

/// How long a destination may take until it answers: a handshake is five round trips.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// The port of the source, in a namespace where nobody else is.
const PORT: u16 = 10809;

/// TCP's slow start on connections that are still being made, and the windows above it, find the
/// rate in some twenty round trips; that is not measured.
const WARM_UP_ROUND_TRIPS: u32 = 20;

/// Options of `bench ahead`.
#[derive(Args, Debug)]
pub struct Options {
    /// A hikkoshi binary to measure; several are measured in turn
    /// [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    hikkoshi: Vec<PathBuf>,
    /// Round trips, in milliseconds
    #[arg(long, value_name = "MS", value_delimiter = ',', default_values_t = [10, 50, 200])]
    rtt: Vec<u64>,
    /// The link's rate in Mbit/s
    #[arg(long, default_value_t = 400)]
    mbit: u64,
    /// Seconds of one measurement, after the warm-up
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Rounds; medians are taken over them
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Workloads [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Workload>,
    /// Who serves the source
    #[arg(long, value_enum, default_value_t = Source::Nbdkit)]
    source: Source,
    /// More options of the destination's `serve`, in one word: --extra='--connections 8'
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    extra: String,
    /// Size of the disk in MiB
    #[arg(long, value_name = "MIB", default_value_t = 768)]
    size: u64,
    /// Where the images live
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    dir: PathBuf,
    /// Also write every sample to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Source {
    Nbdkit,
    QemuNbd,
    Hikkoshi,
}

/// What the guest does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Workload {
    /// 128 KiB sequential reads, nothing copied in the background.
    #[value(name = "seq-128k")]
    Seq128k,
    /// 4 KiB sequential reads, nothing copied in the background.
    #[value(name = "seq-4k")]
    Seq4k,
    /// 128 KiB sequential reads, backwards, nothing copied in the background.
    #[value(name = "back-128k")]
    Back128k,
    /// 128 KiB sequential reads from the middle of the disk while the background copies.
    #[value(name = "seq-128k-bg")]
    Seq128kBackground,
    /// 4 KiB random reads, nothing copied in the background: what is fetched in vain?
    #[value(name = "rand-4k")]
    Rand4k,
    /// 4 KiB random reads while the background copies as fast as it can.
    #[value(name = "rand-4k-bg")]
    Rand4kBackground,
}

impl Workload {
    const ALL: [Self; 6] = [
        Self::Seq128k,
        Self::Seq4k,
        Self::Back128k,
        Self::Seq128kBackground,
        Self::Rand4k,
        Self::Rand4kBackground,
    ];

    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |v| v.get_name().to_owned())
    }

    fn background(self) -> bool {
        matches!(self, Self::Seq128kBackground | Self::Rand4kBackground)
    }

    fn length(self) -> u32 {
        match self {
            Self::Seq128k | Self::Back128k | Self::Seq128kBackground => 128 << 10,
            Self::Seq4k | Self::Rand4k | Self::Rand4kBackground => 4096,
        }
    }

    /// The place of read number `n` among `places`.
    fn place(self, n: u64, places: u64, random: &mut Random) -> u64 {
        match self {
            Self::Seq128k | Self::Seq4k => n % places,
            Self::Back128k => places - 1 - n % places,
            Self::Seq128kBackground => (places / 2 + n) % places,
            Self::Rand4k | Self::Rand4kBackground => random.next() % places,
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    binary: usize,
    workload: Workload,
    rtt_ms: u64,
    round: usize,
    /// What the guest read, as a share of what the link could carry.
    guest_share: f64,
    /// What the link carried, of what it could.
    link_share: f64,
    /// Bytes on the link for each byte that the guest read.
    wire_per_byte: f64,
    p50_ms: f64,
    p99_ms: f64,
    reads: usize,
    /// Packets that the link lost: its queue was full.
    lost: u64,
}

/// Runs what was asked for and prints a table.
pub fn run(options: &Options) -> Result<()> {
    let binaries = if options.hikkoshi.is_empty() {
        vec![std::env::current_exe()?.with_file_name("hikkoshi")]
    } else {
        options.hikkoshi.clone()
    };
    let dir = tempfile::Builder::new()
        .prefix("hikkoshi-ahead-")
        .tempdir_in(&options.dir)?;
    let content = Content::new();
    let source = dir.path().join("source.img");
    content.write_image(&source, options.size << 20)?;
    let bench = Bench {
        options,
        content,
        source,
        dir: dir.path(),
    };
    let workloads = if options.only.is_empty() {
        Workload::ALL.to_vec()
    } else {
        options.only.clone()
    };
    let mut samples = Vec::new();
    for &workload in &workloads {
        for &rtt_ms in &options.rtt {
            for round in 0..options.rounds.max(1) {
                for turn in 0..binaries.len() {
                    let binary = (turn + round) % binaries.len();
                    let sample = bench
                        .measure(&binaries[binary], binary, workload, rtt_ms, round)
                        .with_context(|| format!("{} at {rtt_ms} ms", workload.name()))?;
                    eprintln!("… {} {sample:?}", workload.name());
                    samples.push(sample);
                }
            }
        }
    }
    print(&binaries, options, &workloads, &samples);
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_vec_pretty(&samples)?)?;
    }
    Ok(())
}

struct Bench<'a> {
    options: &'a Options,
    content: Content,
    source: PathBuf,
    dir: &'a Path,
}

impl Bench<'_> {
    fn measure(
        &self,
        program: &Path,
        binary: usize,
        workload: Workload,
        rtt_ms: u64,
        round: usize,
    ) -> Result<Sample> {
        let (there, here) = (Namespace::new("ahead-a")?, Namespace::new("ahead-b")?);
        let link = Link::new(&there, &here, LinkSpec::wan(rtt_ms, self.options.mbit))?;
        let at = SocketAddrV4::new(link.address_a, PORT);
        let source = self.start_source(program, &there, at)?;
        let work = tempfile::tempdir_in(self.dir)?;
        let (mut destination, endpoint) =
            self.start_destination(program, &here, work.path(), at, workload.background())?;
        let mut guest = connect(&endpoint, &mut destination)?;
        let sample = self.read(&mut guest, &link, workload, rtt_ms, round, binary);
        let sample = sample.with_context(|| format!("the daemon said:\n{}", destination.tail()))?;
        guest.close()?;
        end(destination)?;
        drop(source);
        Ok(sample)
    }

    fn start_source(
        &self,
        program: &Path,
        site: &Namespace,
        at: SocketAddrV4,
    ) -> Result<Box<dyn std::any::Any>> {
        Ok(match self.options.source {
            Source::Nbdkit => Box::new(Server::nbdkit(site, &self.source, at)?),
            Source::QemuNbd => Box::new(Server::qemu_nbd(site, &self.source, at)?),
            Source::Hikkoshi => {
                let image = self.source.display().to_string();
                let listen = format!("tcp://{at}");
                // Many move from it, one after the other: what is read-only has no fence.
                let arguments = [
                    "serve",
                    &image,
                    "--listen",
                    &listen,
                    "--control",
                    "none",
                    "--read-only",
                ];
                let log = self.dir.join("source.log");
                let mut process = Process::start(Some(site), program, arguments, &log)?;
                process.wait_until("listening socket", START_TIMEOUT, |p| {
                    hikkoshi_testkit::process::listens_on(p.pid(), at.port())
                })?;
                Box::new(process)
            }
        })
    }

    fn start_destination(
        &self,
        program: &Path,
        site: &Namespace,
        dir: &Path,
        source: SocketAddrV4,
        background: bool,
    ) -> Result<(Process, Endpoint)> {
        let socket = dir.join("nbd.sock");
        let endpoint = Endpoint::Unix(socket);
        let image = dir.join("image").display().to_string();
        let from = format!("nbd://{source}");
        let listen = endpoint.listen();
        let mut arguments = vec![
            "serve",
            &image,
            "--listen",
            &listen,
            "--from",
            &from,
            "--handoff",
            "now",
            "--control",
            "none",
        ];
        if !background {
            arguments.push("--no-background");
        }
        arguments.extend(self.options.extra.split_whitespace());
        let process = Process::start(Some(site), program, arguments, &dir.join("log"))?;
        Ok((process, endpoint))
    }

    /// Reads until the time is over or the disk is at its end. What comes before `from` is warm-up.
    fn read(
        &self,
        guest: &mut Connection,
        link: &Link,
        workload: Workload,
        rtt_ms: u64,
        round: usize,
        binary: usize,
    ) -> Result<Sample> {
        let length = workload.length();
        let places = (self.options.size << 20) / u64::from(length);
        let mut random = Random::new(0x6168_6561_6400 + u64::try_from(round)?);
        let warm_up =
            (Duration::from_millis(rtt_ms) * WARM_UP_ROUND_TRIPS).max(Duration::from_millis(500));
        let started = Instant::now();
        let end = warm_up + Duration::from_secs_f64(self.options.seconds);
        let mut waits = Vec::new();
        let mut from = None;
        let mut done = Vec::new();
        for n in 0..places {
            let asked = Instant::now();
            if from.is_none() && asked - started >= warm_up {
                from = Some((asked, link.a_to_b()));
            }
            let offset = workload.place(n, places, &mut random) * u64::from(length);
            guest.request(0, command::READ, offset, length, n % 16 == 0);
            guest.flush(&self.content)?;
            while done.is_empty() {
                guest.receive(&mut done)?;
            }
            done.clear();
            if let Some(data) = guest.slots[0].sample.take() {
                self.content.check(offset, &data)?;
            }
            if from.is_some() {
                waits.push(asked.elapsed().as_secs_f64() * 1e3);
            }
            if started.elapsed() >= end {
                break;
            }
        }
        let (from, carried) = from.context("the disk was at its end before the warm-up was")?;
        ensure!(waits.len() > 1, "too few reads in the time given");
        let seconds = from.elapsed().as_secs_f64();
        let could = seconds * self.options.mbit as f64 * 1e6 / 8.0;
        let traffic = link.a_to_b();
        let wire = (traffic.bytes - carried.bytes) as f64;
        let read = waits.len() as f64 * f64::from(length);
        let reads = waits.len();
        waits.sort_by(f64::total_cmp);
        Ok(Sample {
            binary,
            workload,
            rtt_ms,
            round,
            guest_share: read / could,
            link_share: wire / could,
            wire_per_byte: wire / read,
            p50_ms: waits[reads / 2],
            p99_ms: waits[reads * 99 / 100],
            reads,
            lost: traffic.lost,
        })
    }
}

fn connect(endpoint: &Endpoint, destination: &mut Process) -> Result<Connection> {
    let started = Instant::now();
    loop {
        match Connection::open(endpoint, 1, true) {
            Ok(connection) => return Ok(connection),
            Err(error) if started.elapsed() > START_TIMEOUT => {
                bail!("no answer ({error:#}):\n{}", destination.tail())
            }
            Err(_) => destination.check_alive()?,
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends it as a user would, so that it takes back the memory that outlives a kill.
fn end(mut destination: Process) -> Result<()> {
    let pid = i32::try_from(destination.pid()).context("a process id")?;
    let pid = rustix::process::Pid::from_raw(pid).context("a process id")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    destination.wait(START_TIMEOUT)?;
    Ok(())
}

fn print(binaries: &[PathBuf], options: &Options, workloads: &[Workload], samples: &[Sample]) {
    for (n, binary) in binaries.iter().enumerate() {
        println!("binary {n}: {}", binary.display());
    }
    println!(
        "\n{} Mbit/s, source {:?}, {} rounds of {} s after {WARM_UP_ROUND_TRIPS} round trips; \
         median (least to greatest)\n",
        options.mbit, options.source, options.rounds, options.seconds
    );
    println!("| workload | rtt | binary | guest % | link % | wire/byte | p50 ms | p99 ms |");
    println!("|---|---|---|---|---|---|---|---|");
    for &workload in workloads {
        for &rtt_ms in &options.rtt {
            for binary in 0..binaries.len() {
                let of = |what: fn(&Sample) -> f64| -> Vec<f64> {
                    let these = samples
                        .iter()
                        .filter(|s| (s.workload, s.rtt_ms, s.binary) == (workload, rtt_ms, binary));
                    these.map(what).collect()
                };
                println!(
                    "| {} | {rtt_ms} ms | {binary} | {} | {} | {} | {} | {} |",
                    workload.name(),
                    show(&of(|s| s.guest_share * 100.0)),
                    show(&of(|s| s.link_share * 100.0)),
                    show(&of(|s| s.wire_per_byte)),
                    show(&of(|s| s.p50_ms)),
                    show(&of(|s| s.p99_ms)),
                );
            }
        }
    }
}

fn show(figures: &[f64]) -> String {
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = figures.iter().copied().fold(0.0, f64::max);
    let middle = median(figures.iter().copied());
    format!("{middle:.1} ({least:.1} to {greatest:.1})")
}
