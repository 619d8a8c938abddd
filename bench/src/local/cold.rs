//! One sequential pass through a destination that has nothing yet, beside other people's
//! copy-on-read proxies: all fetch from the same nbdkit over TCP on loopback, keep what they
//! fetch in the same tmpfs, and are read by nbdcopy.
//!
//! Three programs work at once here, so nobody is pinned.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::Bench;
use crate::client::{Endpoint, Load, Operation, Pattern, Reading, Sample, Terms, run as put_load};
use crate::cpu::{self, Cores};
use crate::report::{Role, Row, Table, Unit};
use crate::server::{Kind, Server, nbdkit, qemu_nbd};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// Fetches only what is asked for.
    OnDemand,
    /// As users run it: the background copy works too.
    Background,
    Cow,
    Cache,
    Qemu,
    /// From a source of ours, over frames.
    Frames,
    /// From the same source, over plain NBD.
    Plain,
}

impl Variant {
    const ALL: [Self; 5] = [
        Self::OnDemand,
        Self::Background,
        Self::Cow,
        Self::Cache,
        Self::Qemu,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::OnDemand => "hikkoshi on demand",
            Self::Background => "hikkoshi",
            Self::Cow => "nbdkit cow",
            Self::Cache => "nbdkit cache",
            Self::Qemu => "qemu copy-on-read",
            Self::Frames => "frames",
            Self::Plain => "plain NBD",
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::OnDemand | Self::Background | Self::Frames | Self::Plain => Kind::Hikkoshi,
            Self::Cow | Self::Cache => Kind::Nbdkit,
            Self::Qemu => Kind::QemuNbd,
        }
    }

    fn role(self) -> Role {
        match self {
            Self::OnDemand | Self::Background | Self::Frames => Role::Subject,
            Self::Cow | Self::Plain => Role::Reference,
            Self::Cache | Self::Qemu => Role::Other,
        }
    }

    /// The command that serves `source` at `endpoint`, keeping what it fetches in `dir`.
    fn command(
        self,
        bench: &Bench<'_>,
        dir: &Path,
        source: &Endpoint,
        endpoint: &Endpoint,
    ) -> Result<Command> {
        let filter = |name: &str, parameter: &str| {
            let mut command = nbdkit(endpoint);
            command.arg(format!("--filter={name}")).arg("nbd");
            command
                .arg(format!("uri={}", source.uri()))
                .arg(parameter)
                .env("TMPDIR", dir);
            command
        };
        Ok(match self {
            Self::OnDemand | Self::Background | Self::Frames | Self::Plain => {
                let mut command = bench.programs.hikkoshi(&dir.join("image"), endpoint);
                command.args(["--from", &source.uri(), "--handoff", "now"]);
                if self == Self::OnDemand {
                    command.arg("--no-background");
                }
                if self == Self::Plain {
                    command.args(["--transport", "nbd"]);
                }
                command
            }
            Self::Cow => filter("cow", "cow-on-read=true"),
            Self::Cache => filter("cache", "cache-on-read=true"),
            Self::Qemu => {
                let overlay = dir.join("overlay.qcow2");
                let made = Command::new("qemu-img")
                    .args([
                        "create",
                        "-q",
                        "-f",
                        "qcow2",
                        "-F",
                        "raw",
                        "-b",
                        &source.uri(),
                    ])
                    .arg(&overlay)
                    .status()
                    .context("run qemu-img")?;
                ensure!(made.success(), "qemu-img create failed");
                let mut command = qemu_nbd(endpoint);
                command.args(["--image-opts"]).arg(format!(
                    "driver=copy-on-read,file.driver=qcow2,file.file.driver=file,\
                     file.file.filename={}",
                    overlay.display()
                ));
                command
            }
        })
    }
}

/// One table.
pub fn run(bench: &Bench<'_>, show: &mut impl FnMut(Table)) -> Result<()> {
    let others = Variant::ALL.into_iter();
    let pass = Pass {
        workload: "cold-pass",
        source: Kind::Nbdkit,
        title: "Cold sequential pass through a destination",
        cpu: "the destination",
        against: "nbdkit's cow filter",
        variants: others.filter(|v| bench.kinds.contains(&v.kind())).collect(),
    };
    pass.run(bench, show)
}

/// Both ends of a move are ours: frames against plain NBD.
pub fn run_frames(bench: &Bench<'_>, show: &mut impl FnMut(Table)) -> Result<()> {
    let pass = Pass {
        workload: "cold-frames",
        source: Kind::Hikkoshi,
        title: "Cold sequential pass, both ends ours",
        cpu: "source and destination together",
        against: "plain NBD",
        variants: vec![Variant::Frames, Variant::Plain],
    };
    pass.run(bench, show)
}

/// One table's passes.
struct Pass {
    workload: &'static str,
    source: Kind,
    title: &'static str,
    /// Whose CPU is shown.
    cpu: &'static str,
    /// What the ratios are against.
    against: &'static str,
    variants: Vec<Variant>,
}

impl Pass {
    fn run(&self, bench: &Bench<'_>, show: &mut impl FnMut(Table)) -> Result<()> {
        let workload = self.workload;
        if !bench.wanted("cold", workload) || !bench.kinds.contains(&self.source) {
            return Ok(());
        }
        let cores = Cores::shared_by(&bench.cores);
        let image = bench.image(bench.dir.path(), &format!("{workload}.img"))?;
        let source_at = Bench::tcp()?;
        let mut command = bench.programs.plain(self.source, &image, &source_at);
        if self.source == Kind::Hikkoshi {
            // Many move from it, one after the other: what is read-only has no fence.
            command.arg("--read-only");
        }
        let log = bench.dir.path().join(format!("{workload}.log"));
        let source = Server::start("source", command, source_at, &cores, &log)?;

        let mut samples = vec![Vec::new(); self.variants.len()];
        for round in 0..bench.rounds() {
            bench.progress(&format!("{workload}, round {}", round + 1));
            for (variant, samples) in self.variants.iter().zip(&mut samples) {
                let before = source.cpu_time()?;
                let mut sample = pass(bench, *variant, &source, &cores)
                    .with_context(|| format!("a cold pass through {}", variant.name()))?;
                if self.source == Kind::Hikkoshi {
                    sample.server_cpu_s += (source.cpu_time()? - before).as_secs_f64();
                }
                samples.push(sample);
            }
        }
        cpu::pin(&bench.cores.client)?;
        let columns = self.variants.iter();
        show(Table {
            title: self.title.to_owned(),
            note: format!(
                "{} MiB, source: {} over TCP on loopback, nbdcopy to null:, each time from \
                 nothing; {} rounds: median (least–greatest). CPU of {} in ms a GiB. Ratios \
                 against {}.",
                bench.options.size,
                self.source.name(),
                bench.rounds(),
                self.cpu,
                self.against
            ),
            columns: columns.map(|v| (v.name().to_owned(), v.role())).collect(),
            rows: vec![Row {
                workload: workload.to_owned(),
                unit: Unit::Pass,
                samples,
            }],
        });
        Ok(())
    }
}

fn pass(bench: &Bench<'_>, variant: Variant, source: &Server, cores: &Cores) -> Result<Sample> {
    // A directory of its own, gone with everything in it when the pass is over.
    let dir = tempfile::tempdir_in(bench.dir.path()).context("make a directory")?;
    let endpoint = Endpoint::Unix(dir.path().join("sock"));
    let command = variant.command(bench, dir.path(), &source.endpoint, &endpoint)?;
    let log = dir.path().join("log");
    let server = Server::start(variant.name(), command, endpoint, cores, &log)?;
    let before = Reading::take(&server)?;
    let mut copy = Command::new("nbdcopy")
        .arg(server.endpoint.uri())
        .arg("null:")
        .stdin(Stdio::null())
        .spawn()
        .context("run nbdcopy (Debian package libnbd-bin)")?;
    // Wait without reaping, so that its CPU clock can still be read.
    let pid = Pid::from_child(&copy);
    waitid(
        WaitId::Pid(pid),
        WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
    )?;
    let client = cpu::of_process(copy.id()).unwrap_or(Duration::ZERO);
    let after = Reading::take(&server)?;
    ensure!(copy.wait()?.success(), "nbdcopy failed");
    let bytes = bench.size_bytes();
    let mut sample = after.since(&before, 1, bytes);
    sample.client_cpu_s = client.as_secs_f64();
    sample.others = None;
    // nbdcopy does not look at what it copies, so some of it is read again and checked.
    let load = Load {
        operation: Operation::Read,
        pattern: Pattern::Random,
        length: 4096,
        depth: 8,
        connections: 1,
    };
    let terms = Terms {
        content: &bench.content,
        duration: Duration::from_millis(50),
        structured: !bench.options.simple,
        seed: 1,
    };
    put_load(&server, &load, &terms).context("check the content")?;
    Ok(sample)
}
