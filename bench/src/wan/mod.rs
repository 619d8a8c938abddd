//! `bench wan`: a disk that moves across an emulated wide-area link, beside its peers.
//!
//! Owns the options, which links are emulated, the order of the sections and what they share. Real
//! programs, real kernel TCP; only the line between two network namespaces is emulated. Prints
//! tables, writes a report, and passes no verdict by its exit status. Needs root.

mod disk;
mod grid;
mod guest;
mod html;
mod mover;
mod moving;
mod plot;
mod section;
mod site;
mod watch;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use hikkoshi_testkit::cache;
use tempfile::TempDir;

use self::disk::Disk;
use self::mover::{Mover, serve_help};
use self::moving::SourceCopy;
use self::section::Section;
use self::site::{LinkCase, Sites, tcp_settings};

const FULL_MIB: u64 = 4096;
const QUICK_MIB: u64 = 512;
/// What need not be measured whole is cut off after this, and its end is projected.
const CUT_OFF: Duration = Duration::from_secs(8);
/// The round trip, of those that are measured, at which traces are replayed and writes are timed
/// unless that is asked for.
const TRACE_RTT_MS: u64 = 50;
/// Packets lost on the link of the section `loss`, in percent.
const LOSS_PERCENT: f64 = 0.1;
const MATRIX_MBIT: [u64; 2] = [100, 400];
const MATRIX_RTT_MS: [u64; 4] = [10, 50, 100, 200];

/// Options of `bench wan`.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A disk of 512 MiB and one round trip of 50 ms: a look, in about three minutes
    #[arg(long)]
    quick: bool,
    /// Only these sections
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SECTION")]
    only: Vec<Section>,
    /// Every link of {100, 400} Mbit/s x {10, 50, 100, 200} ms x {0, 0.1} % loss: hours
    #[arg(long, conflicts_with_all = ["rtt", "rate", "loss"])]
    matrix: bool,
    /// Round trips in milliseconds [default: 10,50,200, or 50 with --quick]
    #[arg(long, value_delimiter = ',', value_name = "MS")]
    rtt: Vec<u64>,
    /// Rates in Mbit/s
    #[arg(long, value_delimiter = ',', value_name = "MBIT", default_values_t = [400])]
    rate: Vec<u64>,
    /// Packets lost, in percent, in all sections
    #[arg(long, value_delimiter = ',', value_name = "PERCENT", default_values_t = [0.0])]
    loss: Vec<f64>,
    /// The queue in front of the line, in bandwidth-delay products (256 KiB at least)
    #[arg(long, default_value_t = 1.0)]
    queue: f64,
    /// TCP's congestion control at both sites
    #[arg(long, default_value = "cubic")]
    congestion: String,
    /// Rounds; medians are taken over them
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Let every peer copy to its end, instead of projecting it
    #[arg(long)]
    full: bool,
    /// Size of the disk in MiB [default: 4096, or 512 with --quick]
    #[arg(long, value_name = "MIB")]
    size: Option<u64>,
    /// Only columns whose name contains one of these
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    movers: Vec<String>,
    /// Another column: hikkoshi with these options at the new site, and a source that has seen the
    /// guest work; {heat} in them is the file that `hikkoshi heat` wrote there
    #[arg(long, value_name = "NAME=OPTIONS", value_parser = Mover::parse_variant)]
    variant: Vec<Mover>,
    /// How long the guest of the traces thinks in all: what its boot, or its compile, would take
    /// with a disk that takes no time
    #[arg(long, default_value_t = 4.0, value_name = "SECONDS")]
    think: f64,
    /// Where images live, for all that should not measure this machine's disk
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    dir: PathBuf,
    /// Where images live that are written and flushed [default: cargo's target directory]
    #[arg(long, value_name = "DIR")]
    disk: Option<PathBuf>,
    /// Also write every figure to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the report and its charts go [default: bench-wan in cargo's target directory]
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// The hikkoshi binary, at both sites [default: the one beside this program, built if cargo is
    /// at hand]
    #[arg(long, value_name = "FILE")]
    hikkoshi: Option<PathBuf>,
}

/// What all sections share.
struct Bench<'a> {
    options: &'a Options,
    hikkoshi: PathBuf,
    help: String,
    fast: TempDir,
    disk: TempDir,
    copies: Mutex<BTreeMap<PathBuf, Arc<SourceCopy>>>,
    /// What could not be measured in the section that runs, and why.
    failures: Mutex<Vec<String>>,
    started: Instant,
}

/// Measures what was asked for, prints the tables and writes the report.
pub fn run(options: &Options) -> Result<()> {
    let bench = Bench::new(options)?;
    let mut findings = Vec::new();
    let mut facts = bench.facts();
    for (case, sections) in cases_of(options) {
        let sites = Sites::new(case, &options.congestion)?;
        if findings.is_empty() {
            facts.push(format!(
                "TCP at both sites: {}.",
                tcp_settings(&sites.new, &options.congestion)?
            ));
            if !sites.real_time() {
                facts.push("The emulator had no real-time priority.".into());
            }
            for fact in &facts {
                println!("{fact}");
            }
        }
        for section in sections {
            match section.run(&bench, &sites) {
                Ok(mut found) => {
                    found.grid.note.push_str(&bench.take_failures());
                    println!("{}", found.grid.markdown());
                    findings.push((found.grid, found.charts));
                }
                Err(error) => eprintln!("{}: {error:#}", section.name()),
            }
        }
    }
    ensure!(!findings.is_empty(), "nothing could be measured");
    let report = match &options.report {
        Some(report) => report.clone(),
        None => cache::target_dir()?.join("bench-wan"),
    };
    html::write(&report, &facts, &findings)?;
    if let Some(path) = &options.json {
        let grids: Vec<_> = findings.iter().map(|(grid, _)| grid).collect();
        let all = serde_json::json!({ "facts": facts, "tables": grids });
        fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    println!("report: {}", report.join("index.html").display());
    Ok(())
}

/// The links, and what is measured on each.
fn cases_of(options: &Options) -> Vec<(LinkCase, Vec<Section>)> {
    let (rates, rtts, losses) = if options.matrix {
        (
            MATRIX_MBIT.to_vec(),
            MATRIX_RTT_MS.to_vec(),
            vec![0.0, LOSS_PERCENT],
        )
    } else {
        let rtts = match (options.rtt.is_empty(), options.quick) {
            (false, _) => options.rtt.clone(),
            (true, true) => vec![50],
            (true, false) => vec![10, 50, 200],
        };
        (options.rate.clone(), rtts, options.loss.clone())
    };
    let asked = |section: Section| options.only.contains(&section);
    let traced = if rtts.contains(&TRACE_RTT_MS) {
        Some(TRACE_RTT_MS)
    } else {
        rtts.first().copied()
    };
    let mut cases = Vec::new();
    for &mbit in &rates {
        for &rtt_ms in &rtts {
            for &loss_percent in &losses {
                let case = LinkCase {
                    mbit,
                    rtt_ms,
                    loss_percent,
                    queue_bdp: options.queue,
                };
                let wanted = |section: &Section| match section {
                    // It has a link of its own.
                    Section::Loss => false,
                    // It needs more than the time that is left.
                    Section::Company => asked(Section::Company),
                    Section::Writes | Section::Trace | Section::Seed if options.only.is_empty() => {
                        options.matrix || Some(rtt_ms) == traced
                    }
                    _ => options.only.is_empty() || asked(*section),
                };
                let sections: Vec<Section> = [
                    Section::Link,
                    Section::Incompressible,
                    Section::Copy,
                    Section::Cold,
                    Section::Sequential,
                    Section::Writes,
                    Section::Trace,
                    Section::Seed,
                    Section::Company,
                ]
                .into_iter()
                .filter(wanted)
                .collect();
                if !sections.is_empty() {
                    cases.push((case, sections));
                }
            }
        }
    }
    if options.only.is_empty() || asked(Section::Loss) {
        for &mbit in &rates {
            let rtts = if options.matrix {
                rtts.clone()
            } else {
                Vec::from_iter(traced)
            };
            for rtt_ms in rtts {
                let case = LinkCase {
                    mbit,
                    rtt_ms,
                    loss_percent: LOSS_PERCENT,
                    queue_bdp: options.queue,
                };
                cases.push((case, vec![Section::Loss]));
            }
        }
    }
    cases
}

impl<'a> Bench<'a> {
    fn new(options: &'a Options) -> Result<Self> {
        let hikkoshi = crate::local::hikkoshi_binary(options.hikkoshi.as_deref())?;
        let hikkoshi =
            fs::canonicalize(&hikkoshi).with_context(|| format!("find {}", hikkoshi.display()))?;
        let scratch = |parent: &Path| {
            let made = tempfile::Builder::new()
                .prefix("hikkoshi-wan-")
                .tempdir_in(parent);
            made.with_context(|| format!("make a directory in {}", parent.display()))
        };
        let disk = match &options.disk {
            Some(disk) => scratch(disk)?,
            None => scratch(&cache::target_dir()?)?,
        };
        Ok(Self {
            help: serve_help(&hikkoshi)?,
            hikkoshi,
            fast: scratch(&options.dir)?,
            disk,
            copies: Mutex::default(),
            failures: Mutex::default(),
            started: Instant::now(),
            options,
        })
    }

    /// What the reader of the report has to know.
    fn facts(&self) -> Vec<String> {
        let options = self.options;
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        vec![
            format!(
                "Linux {}, {} cores; load of the machine at the start: {}.",
                kernel.trim(),
                crate::cpu::cores(),
                fs::read_to_string("/proc/loadavg")
                    .unwrap_or_default()
                    .trim()
            ),
            format!(
                "Each direction of the link is one first-in-first-out queue of {} bandwidth-delay \
                 products (256 KiB at least) in front of a line. {} rounds.",
                options.queue,
                self.rounds()
            ),
        ]
    }

    fn rounds(&self) -> usize {
        self.options.rounds.max(1)
    }

    fn mib(&self) -> u64 {
        let usual = if self.options.quick {
            QUICK_MIB
        } else {
            FULL_MIB
        };
        self.options.size.unwrap_or(usual)
    }

    /// The disk with a file system.
    fn files(&self) -> Result<Disk> {
        Disk::files(self.mib())
    }

    /// The disk that cannot be compressed.
    fn noise(&self) -> Result<Disk> {
        // Enough that the start of TCP is a small part.
        Disk::noise((self.mib() / 8).max(self.mib().min(128)))
    }

    /// How long one of each kind of writes takes.
    fn write_time(&self) -> Duration {
        Duration::from_millis(if self.options.quick { 700 } else { 1500 })
    }

    /// How long a move may take before it is given up.
    fn patience(&self, disk: &Disk, case: &LinkCase) -> Duration {
        let ideal = disk.data_bytes() as f64 / case.bytes_per_s();
        Duration::from_secs_f64(60.0 + 6.0 * ideal)
    }

    /// How long a move is watched: as long as it may take, or, where less is enough, until its end can be projected.
    fn watched_for(&self, whole: bool, disk: &Disk, case: &LinkCase) -> Duration {
        if whole || self.options.full {
            self.patience(disk, case)
        } else {
            CUT_OFF
        }
    }

    fn fast_dir(&self) -> &Path {
        self.fast.path()
    }

    fn disk_dir(&self) -> &Path {
        self.disk.path()
    }

    fn scratch(&self, dir: &Path) -> Result<TempDir> {
        tempfile::tempdir_in(dir).context("make a directory for a measurement")
    }

    /// A copy of `disk` for sources; made once.
    fn source_copy(&self, disk: &Disk) -> Result<Arc<SourceCopy>> {
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(copy) = copies.get(&disk.path) {
            return Ok(copy.clone());
        }
        let path = self.fast_dir().join(format!("source-{}.img", copies.len()));
        let copy = Arc::new(SourceCopy::make(disk, path)?);
        copies.insert(disk.path.clone(), copy.clone());
        Ok(copy)
    }

    /// Whether it can be measured here; says why if not.
    fn can(&self, mover: &Mover) -> bool {
        match mover.available(&self.help) {
            Ok(()) => true,
            Err(error) => {
                eprintln!("{} is left out: {error:#}", mover.name);
                false
            }
        }
    }

    /// Notes that something could not be measured, and goes on.
    fn failed(&self, what: &str, error: &anyhow::Error) {
        eprintln!("        not measured: {error:#}");
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        // The end of a server's output is for the terminal.
        let reason = format!("{error:#}");
        let reason = reason.lines().next().unwrap_or_default();
        failures.push(format!(" Not measured: {what} ({reason})."));
    }

    /// What was noted since the last call, for a table's note.
    fn take_failures(&self) -> String {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *failures).concat()
    }

    /// Says on standard error what is going on.
    fn progress(&self, what: &str) {
        eprintln!("{:4.0} s  {what}", self.started.elapsed().as_secs_f64());
    }
}
