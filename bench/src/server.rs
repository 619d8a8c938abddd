//! The servers that are measured, and how each is started.
//!
//! Owns their command lines and their processes. A server is started with the cores it may use,
//! and is ended (by its own id) when dropped.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::client::{Connection, Endpoint};
use crate::cpu;

/// How long a server may take until it answers.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Whose server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Ours.
    Hikkoshi,
    /// nbdkit with its file plugin.
    Nbdkit,
    /// qemu-nbd.
    QemuNbd,
}

impl Kind {
    /// The name in tables and of the program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hikkoshi => "hikkoshi",
            Self::Nbdkit => "nbdkit",
            Self::QemuNbd => "qemu-nbd",
        }
    }
}

/// A running server.
pub struct Server {
    /// What tables call it.
    pub name: String,
    /// Where it listens.
    pub endpoint: Endpoint,
    /// From the start of the process until it described its export to a client.
    pub ready_after: Duration,
    child: Child,
    processes: Vec<u32>,
}

impl Server {
    /// Starts `command` on `cores` and waits until `endpoint` answers an NBD client.
    pub fn start(
        name: &str,
        mut command: Command,
        endpoint: Endpoint,
        cores: &cpu::Cores,
        log: &Path,
    ) -> Result<Self> {
        if let Endpoint::Unix(path) = &endpoint {
            // A server that was killed leaves its socket behind, and nbdkit does not replace it.
            let _ = fs::remove_file(path);
        }
        let output = File::create(log).context("create a server's log")?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        // A process inherits the affinity of the thread that starts it.
        cpu::pin(&cores.servers)?;
        let started = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"));
        cpu::pin(&cores.client)?;
        let mut server = Self {
            name: name.to_owned(),
            endpoint,
            ready_after: Duration::ZERO,
            child: child?,
            processes: Vec::new(),
        };
        loop {
            match Connection::open(&server.endpoint, 1, false) {
                Ok(connection) => {
                    server.ready_after = started.elapsed();
                    connection.close()?;
                    break;
                }
                Err(error) => {
                    let ended = server.child.try_wait()?;
                    if ended.is_some() || started.elapsed() > START_TIMEOUT {
                        let said = fs::read_to_string(log).unwrap_or_default();
                        bail!("{name} does not answer ({error:#}); {command:?} said:\n{said}");
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        server.processes = cpu::process_tree(server.child.id());
        Ok(server)
    }

    /// The id of the server's first process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time of all its processes since they began.
    pub fn cpu_time(&self) -> Result<Duration> {
        self.processes.iter().map(|&pid| cpu::of_process(pid)).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Programs, and where to find ours.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The `hikkoshi` binary.
    pub hikkoshi: PathBuf,
}

impl Programs {
    /// Whether `kind` can be started; if not, why.
    pub fn available(&self, kind: Kind) -> Result<()> {
        let program = match kind {
            Kind::Hikkoshi => self.hikkoshi.as_os_str(),
            Kind::Nbdkit => "nbdkit".as_ref(),
            Kind::QemuNbd => "qemu-nbd".as_ref(),
        };
        let status = Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| match kind {
                Kind::Hikkoshi => "cargo build --release -p hikkoshi".to_owned(),
                Kind::Nbdkit => "Debian package nbdkit".to_owned(),
                Kind::QemuNbd => "Debian package qemu-utils".to_owned(),
            })?;
        ensure!(
            status.success(),
            "{} --version failed",
            program.to_string_lossy()
        );
        Ok(())
    }

    /// The command that serves the plain file `image` at `endpoint` with server `kind`.
    pub fn plain(&self, kind: Kind, image: &Path, endpoint: &Endpoint) -> Command {
        match kind {
            Kind::Hikkoshi => self.hikkoshi(image, endpoint),
            Kind::Nbdkit => {
                let mut command = nbdkit(endpoint);
                command.arg("file").arg(image);
                command
            }
            Kind::QemuNbd => {
                let mut command = qemu_nbd(endpoint);
                command
                    .args(["--cache=writeback", qemu_aio(), "-f", "raw"])
                    .arg(image);
                command
            }
        }
    }

    /// `hikkoshi serve IMAGE` at `endpoint`, to be completed.
    pub fn hikkoshi(&self, image: &Path, endpoint: &Endpoint) -> Command {
        let mut command = Command::new(&self.hikkoshi);
        command
            .arg("serve")
            .arg(image)
            .args(["--listen", &endpoint.listen()]);
        let control = format!("unix:{}.control", image.display());
        command.args(["--control", &control]);
        command
    }

    /// A command that talks to the daemon that serves `image`.
    pub fn control(&self, image: &Path, words: &[&str]) -> Result<()> {
        let output = Command::new(&self.hikkoshi)
            .args(words)
            .arg("--control")
            .arg(format!("unix:{}.control", image.display()))
            .output()
            .context("run hikkoshi")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "hikkoshi {} failed: {said}",
            words.join(" ")
        );
        Ok(())
    }
}

/// nbdkit in the foreground at `endpoint`; plugin and filters follow.
pub fn nbdkit(endpoint: &Endpoint) -> Command {
    let mut command = Command::new("nbdkit");
    command.arg("-f");
    match endpoint {
        Endpoint::Unix(path) => command.arg("-U").arg(path),
        Endpoint::Tcp(port) => command.args(["-i", "127.0.0.1", "-p", &port.to_string()]),
    };
    command
}

/// qemu-nbd in the foreground at `endpoint`; the image follows.
pub fn qemu_nbd(endpoint: &Endpoint) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "16"]);
    match endpoint {
        Endpoint::Unix(path) => command.arg("-k").arg(path),
        Endpoint::Tcp(port) => command.args(["-b", "127.0.0.1", "-p", &port.to_string()]),
    };
    command
}

/// io_uring where the kernel allows it, threads elsewhere.
pub fn qemu_aio() -> &'static str {
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    if disabled.trim() == "0" {
        "--aio=io_uring"
    } else {
        "--aio=threads"
    }
}

/// A port on 127.0.0.1 that nobody uses now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))
        .context("find a free port")?
        .local_addr()?
        .port())
}
