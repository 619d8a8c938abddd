//! `bench local`: servers side by side on this machine.
//!
//! Owns the options, the order of the sections and what they share (images, programs, cores).
//! Each section is a module that gives back tables.

mod cold;
mod durable;
mod memory;
mod outage;
mod throughput;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use tempfile::TempDir;

use crate::client::{Content, Endpoint, Load, Sample, Terms, run as put_load};
use crate::cpu::{self, Cores};
use crate::report::{Role, Table};
use crate::server::{Kind, Programs, Server, free_port};

/// Options of `bench local`.
#[derive(Args, Debug)]
pub struct Options {
    /// Fewer rounds and shorter runs: a look, not a result
    #[arg(long)]
    quick: bool,
    /// Only sections or workloads whose name contains this: unix, tcp, flush, resident, cold,
    /// memory, or part of a workload's name
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Rounds; medians are taken over them [default: 7, or 3 with --quick]
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of one measurement [default: 1, or 0.3 with --quick]
    #[arg(long)]
    seconds: Option<f64>,
    /// Also write every sample to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Who puts the load on: the bench itself, or fio as a cross-check (throughput only)
    #[arg(long, value_enum, default_value = "own")]
    client: Client,
    /// Servers to measure
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["hikkoshi", "nbdkit", "qemu-nbd"])]
    servers: Vec<Kind>,
    /// Where the images live, for all that should not measure a disk
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    dir: PathBuf,
    /// Where images live for flushes that reach a disk; `none` leaves those out
    #[arg(long, value_name = "DIR", default_value = "target")]
    disk: PathBuf,
    /// Size of the images in MiB, a power of two
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    size: u64,
    /// Ask for simple replies, like the kernel's client, instead of structured ones
    #[arg(long)]
    simple: bool,
    /// The hikkoshi binary [default: the one beside this program, built if cargo is at hand]
    #[arg(long, value_name = "FILE")]
    hikkoshi: Option<PathBuf>,
    /// Nice value of the servers and the client; below 0 (root only) a busy machine disturbs the
    /// measurement less, and the measurement disturbs the machine more
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-20..=19))]
    nice: i32,
    /// Who may run where
    #[arg(long, value_enum, default_value = "split")]
    pin: Pin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Client {
    Own,
    Fio,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pin {
    /// The client on the last core, servers on the others.
    Split,
    /// Everybody anywhere.
    None,
}

/// What all sections share.
struct Bench<'a> {
    options: &'a Options,
    programs: Programs,
    kinds: Vec<Kind>,
    content: Content,
    cores: Cores,
    dir: TempDir,
}

/// Runs the sections that were asked for and prints their tables.
pub fn run(options: &Options) -> Result<()> {
    ensure!(
        options.size.is_power_of_two(),
        "--size must be a power of two"
    );
    let programs = Programs {
        hikkoshi: hikkoshi_binary(options.hikkoshi.as_deref())?,
    };
    let mut kinds = Vec::new();
    for &kind in &options.servers {
        match programs.available(kind) {
            Ok(()) => kinds.push(kind),
            Err(error) => eprintln!("{} is left out: {error:#}", kind.name()),
        }
    }
    ensure!(!kinds.is_empty(), "no server to measure");
    let cores = match options.pin {
        Pin::Split => Cores::split()?,
        Pin::None => Cores::shared()?,
    };
    cpu::pin(&cores.client)?;
    let _preference = cpu::Preference::set(options.nice)?;
    let dir = tempfile::Builder::new()
        .prefix("hikkoshi-bench-")
        .tempdir_in(&options.dir)
        .with_context(|| format!("make a directory in {}", options.dir.display()))?;
    let bench = Bench {
        options,
        programs,
        kinds,
        content: Content::new(),
        cores,
        dir,
    };

    let mut tables = Vec::new();
    let mut show = |table: Table| {
        println!("{}", table.markdown());
        tables.push(table);
    };
    throughput::run(&bench, &mut show)?;
    let mut memory = Vec::new();
    if bench.options.client == Client::Own {
        durable::run(&bench, &mut show)?;
        outage::run(&bench, &mut show)?;
        cold::run(&bench, &mut show)?;
        cold::run_frames(&bench, &mut show)?;
        memory = memory::run(&bench)?;
    }
    if let Some(path) = &options.json {
        let all = serde_json::json!({ "tables": tables, "memory": memory });
        fs::write(path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

impl Bench<'_> {
    fn rounds(&self) -> usize {
        self.options
            .rounds
            .unwrap_or(if self.options.quick { 3 } else { 7 })
            .max(1)
    }

    fn duration(&self) -> Duration {
        let seconds = self
            .options
            .seconds
            .unwrap_or(if self.options.quick { 0.3 } else { 1.0 });
        Duration::from_secs_f64(seconds.max(0.05))
    }

    fn size_bytes(&self) -> u64 {
        self.options.size << 20
    }

    /// Whether `workload` of `section` was asked for.
    fn wanted(&self, section: &str, workload: &str) -> bool {
        self.options
            .only
            .as_ref()
            .is_none_or(|only| section.contains(only.as_str()) || workload.contains(only.as_str()))
    }

    /// A fresh image with the pattern on it.
    fn image(&self, dir: &Path, name: &str) -> Result<PathBuf> {
        let path = dir.join(name);
        self.content.write_image(&path, self.size_bytes())?;
        Ok(path)
    }

    fn unix(&self, name: &str) -> Endpoint {
        Endpoint::Unix(self.dir.path().join(format!("{name}.sock")))
    }

    fn tcp() -> Result<Endpoint> {
        Ok(Endpoint::Tcp(free_port()?))
    }

    fn start(&self, name: &str, command: Command, endpoint: Endpoint) -> Result<Server> {
        let log = self
            .dir
            .path()
            .join(format!("{}.log", name.replace(' ', "-")));
        Server::start(name, command, endpoint, &self.cores, &log)
    }

    /// Puts `load` on each server in turn, and again in every round, each time beginning with
    /// another: A B C, B C A, C A B. What comes first after a pause is a little slower.
    fn interleave(&self, servers: &[&Server], load: &Load) -> Result<Vec<Vec<Sample>>> {
        let mut samples = vec![Vec::new(); servers.len()];
        for round in 0..self.rounds() {
            self.round(servers, load, round, &mut samples)?;
        }
        Ok(samples)
    }

    /// One round of [`Self::interleave`].
    fn round(
        &self,
        servers: &[&Server],
        load: &Load,
        round: usize,
        samples: &mut [Vec<Sample>],
    ) -> Result<()> {
        let seed = u64::try_from(round)?;
        for turn in 0..servers.len() {
            let index = (round + turn) % servers.len();
            samples[index].push(self.measure(servers[index], load, seed)?);
        }
        Ok(())
    }

    fn measure(&self, server: &Server, load: &Load, seed: u64) -> Result<Sample> {
        let terms = Terms {
            content: &self.content,
            duration: self.duration(),
            structured: !self.options.simple,
            seed,
        };
        put_load(server, load, &terms).with_context(|| format!("{load:?} on {}", server.name))
    }

    /// Says on standard error what is going on.
    fn progress(&self, what: &str) {
        eprintln!("… {what}");
    }
}

/// The role a server's column has where hikkoshi is compared with its peers.
fn role(kind: Kind) -> Role {
    if kind == Kind::Hikkoshi {
        Role::Subject
    } else {
        Role::Reference
    }
}

/// Finds the binary to measure, and builds it first when cargo started this program.
pub fn hikkoshi_binary(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_path_buf());
    }
    let here = std::env::current_exe().context("find this program")?;
    let binary = here.with_file_name("hikkoshi");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--release", "--package", "hikkoshi"])
            .status()
            .context("build hikkoshi")?;
        if !status.success() {
            bail!("hikkoshi does not build; give --hikkoshi FILE or --servers nbdkit,qemu-nbd");
        }
    }
    Ok(binary)
}
