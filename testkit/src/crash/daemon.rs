//! The binary under test: started quickly, killed at any instant, and never outliving its test.

use crate::packages;
use crate::process;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Far above what a start or an orderly end takes.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often something is looked at that comes about soon. Short: thousands of starts wait for it.
pub const POLL: Duration = Duration::from_micros(300);

const SIGKILL: i32 = 9;

/// How a daemon is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program.
    pub binary: PathBuf,
    /// Where its image `disk.img`, the state, its socket and its log are.
    pub dir: PathBuf,
    /// What follows `serve disk.img`.
    pub arguments: Vec<String>,
    /// `NAME:N`, where the process is to kill itself.
    pub crash_at: Option<String>,
    /// A program, with its arguments, that starts ours and keeps its process id.
    pub tracer: Vec<OsString>,
}

impl Launch {
    /// The image.
    pub fn image(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    /// Starts it, and does not wait for anything.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self) -> Result<Daemon> {
        let socket = self.dir.join("nbd.sock");
        let log = self.dir.join("daemon.log");
        // Ends with us, even if we are killed.
        let mut command = Command::new(packages::require("setpriv")?);
        command.args(["--pdeathsig", "KILL", "--"]);
        command.args(&self.tracer);
        command.arg(&self.binary).arg("serve").arg(self.image());
        command.arg("--listen");
        command.arg(format!("unix:{}", socket.display()));
        command.args(["--control", "none"]).args(&self.arguments);
        if let Some(point) = &self.crash_at {
            command.env("HIKKOSHI_CRASH_AT", point);
        }
        let output = fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("open {}", log.display()))?;
        command.stdin(Stdio::null());
        command.stderr(output.try_clone()?).stdout(output);
        let child = command.spawn().context("start hikkoshi")?;
        Ok(Daemon { child, socket, log })
    }
}

/// A running `hikkoshi serve`. Killed when dropped.
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits until it serves. `false` if it was killed before.
    ///
    /// # Errors
    /// It ended by itself: it refuses what it found. Or it does not listen in time.
    pub fn wait_until_up(&mut self) -> Result<bool> {
        let start = Instant::now();
        loop {
            if UnixStream::connect(&self.socket).is_ok() {
                return Ok(true);
            }
            if self.has_been_killed()? {
                return Ok(false);
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "it does not listen:\n{}",
                process::tail(&self.log)
            );
            std::thread::sleep(POLL);
        }
    }

    /// Whether it was killed.
    ///
    /// # Errors
    /// It ended in any other way.
    pub fn has_been_killed(&mut self) -> Result<bool> {
        match self.child.try_wait()? {
            None => Ok(false),
            Some(status) if status.signal() == Some(SIGKILL) => Ok(true),
            Some(status) => bail!(
                "hikkoshi ended by itself, {status}:\n{}",
                process::tail(&self.log)
            ),
        }
    }

    /// Kills it, if it has not been killed already, and waits until it is gone.
    ///
    /// # Errors
    /// It had ended in another way.
    pub fn kill(mut self) -> Result<()> {
        if !self.has_been_killed()? {
            self.child.kill()?;
            let status = self.child.wait()?;
            ensure!(
                status.signal() == Some(SIGKILL),
                "it ended by itself, {status}:\n{}",
                process::tail(&self.log)
            );
        }
        Ok(())
    }

    /// Asks it to end. `false` if it was killed before it had.
    ///
    /// # Errors
    /// Its end is not an orderly one, or does not come.
    pub fn terminate(mut self) -> Result<bool> {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a process has an id")?;
        if !self.has_been_killed()? {
            // Our child, and not waited for yet: the id is still its own.
            kill_process(pid, Signal::TERM)?;
        }
        let status = self.wait_for_end()?;
        if status.signal() == Some(SIGKILL) {
            return Ok(false);
        }
        ensure!(
            status.success(),
            "no orderly end, {status}:\n{}",
            process::tail(&self.log)
        );
        Ok(true)
    }

    fn wait_for_end(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "it does not end:\n{}",
                process::tail(&self.log)
            );
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only if it has been waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the durable state of the image in `dir` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// `standby`, `arriving` or `local`; empty while there is no state.
    pub life: String,
    /// The volume's id.
    pub volume_id: String,
}

/// Reads the file `volume` below `dir`, without believing more of it than is needed here.
pub fn recorded(dir: &Path) -> Recorded {
    let text = fs::read_to_string(dir.join("disk.img.hikkoshi/volume")).unwrap_or_default();
    let field = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "))
            .unwrap_or_default()
            .to_owned()
    };
    Recorded {
        life: field("life"),
        volume_id: field("volume-id"),
    }
}

/// Takes away the memory that outlives a process, as a boot does.
pub fn forget_memory(dir: &Path) {
    let volume_id = recorded(dir).volume_id;
    if !volume_id.is_empty() {
        let uid = rustix::process::geteuid().as_raw();
        // It is not there if the volume was complete, or closed in order.
        let _ = fs::remove_file(format!("/dev/shm/hikkoshi-{uid}/{volume_id}"));
    }
}
