//! Child processes that cannot outlive their test.
//!
//! Owns starting a program, in a network namespace if asked, with its output in a file, and
//! killing it by its process id when the value is dropped. A process also dies with the thread
//! that started it (parent-death signal), so that a test that is itself killed leaves nothing.

use crate::netns::Namespace;
use crate::packages;
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How often a condition is looked at again while waiting.
const POLL: Duration = Duration::from_millis(10);
/// How much of a log an error shows, in lines.
const TAIL_LINES: usize = 40;

/// A running program.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with `arguments`, in `site` if given; standard output and error go to
    /// `log`. Must be called on a thread that lives as long as the process should.
    ///
    /// # Errors
    /// The program is missing (the message names its package) or cannot be started.
    pub fn start<S: AsRef<OsStr>>(
        site: Option<&Namespace>,
        program: impl AsRef<Path>,
        arguments: impl IntoIterator<Item = S>,
        log: &Path,
    ) -> Result<Self> {
        let program = program.as_ref();
        let name = program.display().to_string();
        let program = if program.is_absolute() {
            program.to_path_buf()
        } else {
            packages::require(&name)?
        };
        let mut command = Command::new(packages::require("setpriv")?);
        command.args(["--pdeathsig", "KILL", "--"]);
        if let Some(site) = site {
            // `ip netns exec` replaces itself by the program: the process id stays the child's.
            command.arg(packages::require("ip")?);
            command.args(["netns", "exec", site.name()]);
        }
        command.arg(program).args(arguments);
        let output = File::create(log).with_context(|| format!("create {}", log.display()))?;
        command.stdin(Stdio::null());
        command.stderr(output.try_clone()?).stdout(output);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self {
            name,
            child,
            log: log.to_path_buf(),
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last lines of what it printed.
    pub fn tail(&self) -> String {
        tail(&self.log)
    }

    /// All that it printed.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn log(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| self.log.display().to_string())
    }

    /// Fails if the process has ended.
    ///
    /// # Errors
    /// It has; the message has its status and the end of its output.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}:\n{}", self.name, self.tail());
        }
        Ok(())
    }

    /// Waits until `ready` holds, for `timeout` at most, while the process lives.
    ///
    /// # Errors
    /// It ended, or the time is over; the message has the end of its output.
    pub fn wait_until(
        &mut self,
        what: &str,
        timeout: Duration,
        mut ready: impl FnMut(&Self) -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        while !ready(self) {
            self.check_alive()?;
            if start.elapsed() > timeout {
                bail!(
                    "{}: no {what} within {timeout:?}:\n{}",
                    self.name,
                    self.tail()
                );
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits for its end by itself.
    ///
    /// # Errors
    /// It has not ended after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(
                start.elapsed() < timeout,
                "{} has not ended within {timeout:?}:\n{}",
                self.name,
                self.tail()
            );
            std::thread::sleep(POLL);
        }
    }

    /// Kills it with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// It had already ended, which nobody expects who kills it.
    pub fn kill(mut self) -> Result<()> {
        self.check_alive()?;
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has been waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// It is missing, or its status is not 0; the message has what it said.
pub fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<String> {
    let mut command = Command::new(packages::require(program)?);
    command.args(arguments).stdin(Stdio::null());
    output(&mut command)
}

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// It cannot be started, or its status is not 0; the message has what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed, {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The last lines of the file at `path`, for messages; empty if there is none.
pub fn tail(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// Whether `pid`'s network namespace has a TCP listener on `port`. Nothing is connected to, so a
/// server that counts or limits connections sees none.
pub fn listens_on(pid: u32, port: u16) -> bool {
    let wanted = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        text.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next().unwrap_or_default();
            // State 0A is LISTEN.
            local.ends_with(&wanted) && fields.nth(1) == Some("0A")
        })
    })
}
