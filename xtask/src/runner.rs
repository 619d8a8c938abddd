//! Runs the commands of a step: shows their output as it comes, picks the tests' closing lines
//! out of it, and under CI's rules ends what takes too long.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::report::{Counts, Outcome};

/// What holds for all steps of one invocation.
#[derive(Debug)]
pub struct Session {
    /// The workspace's root.
    pub root: PathBuf,
    /// CI's rules: a skipped test is a failure, `Cargo.lock` is fixed, steps have limits.
    pub ci: bool,
}

impl Session {
    /// Finds the workspace.
    ///
    /// # Errors
    /// The program was not built inside the workspace.
    pub fn new(ci: bool) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask is not inside the workspace")?
            .to_path_buf();
        Ok(Self { root, ci })
    }

    /// Where cargo puts what it builds.
    pub fn target_dir(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| self.root.join("target"), PathBuf::from)
    }

    /// A cargo command in the workspace; under CI's rules with a fixed `Cargo.lock`.
    pub fn cargo(&self, subcommand: &str) -> Command {
        let mut command = self.command(std::env::var("CARGO").as_deref().unwrap_or("cargo"));
        command.arg(subcommand);
        if self.ci && subcommand != "fmt" {
            command.arg("--locked");
        }
        command
    }

    /// Any command in the workspace's root, without standard input.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root).stdin(Stdio::null());
        if self.ci {
            command.env("CI", "true");
        }
        command
    }

    /// Runs `command` as the step `step`.
    pub fn run(&self, step: &'static str, limit: Duration, mut command: Command) -> Outcome {
        println!("\n==> {step}: {}", describe(&command));
        let started = Instant::now();
        let mut closing_lines = Vec::new();
        let mut counts: Option<Counts> = None;
        let result = self.run_watched(&mut command, limit, |line| {
            if let Some(more) = Counts::from_closing_line(line) {
                counts.get_or_insert_with(Counts::default).add(more);
                // Documentation without examples makes many empty runs.
                if more != Counts::default() {
                    closing_lines.push(line.to_owned());
                }
            }
        });
        let mut failure = match result {
            Ok(Some(status)) if status.success() => None,
            Ok(Some(status)) => Some(status.to_string()),
            Ok(None) => Some(format!("not finished after {} s", limit.as_secs())),
            Err(error) => Some(format!("{error:#}")),
        };
        let skipped = counts.map_or(0, |counts| counts.skipped);
        if self.ci && skipped > 0 && failure.is_none() {
            failure = Some(format!("{skipped} tests were skipped"));
        }
        Outcome {
            step,
            elapsed: started.elapsed(),
            failure,
            counts,
            closing_lines,
        }
    }

    /// Runs a command and hands each line of its standard output to `watch`, after showing it.
    /// `None` when it was ended because it took longer than `limit`.
    fn run_watched(
        &self,
        command: &mut Command,
        limit: Duration,
        mut watch: impl FnMut(&str),
    ) -> Result<Option<ExitStatus>> {
        if self.ci {
            // A group of its own, so that all of it can be ended; by hand it stays in ours, so
            // that Ctrl-C reaches it.
            command.process_group(0);
        }
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        let output = child
            .stdout
            .take()
            .context("the child's output is not piped")?;
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { break };
                if sender
                    .send(String::from_utf8_lossy(&line).into_owned())
                    .is_err()
                {
                    break;
                }
            }
        });
        let deadline = Instant::now() + limit;
        loop {
            let patience = if self.ci {
                deadline.saturating_duration_since(Instant::now())
            } else {
                // By hand there is somebody to press Ctrl-C.
                Duration::from_secs(3600)
            };
            match receiver.recv_timeout(patience) {
                Ok(line) => {
                    let mut stdout = std::io::stdout().lock();
                    writeln!(stdout, "{line}").context("cannot write to standard output")?;
                    watch(&line);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return child.wait().map(Some).context("cannot wait for the child");
                }
                Err(mpsc::RecvTimeoutError::Timeout) if self.ci => {
                    end_group(&mut child);
                    return Ok(None);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Ends a child that leads a process group, with everything it started.
fn end_group(child: &mut Child) {
    let group = format!("-{}", child.id());
    let killed = Command::new("kill").args(["-KILL", "--", &group]).status();
    if killed.is_err() {
        // No `kill` program: at least the child itself ends.
        let _ = child.kill();
    }
    let _ = child.wait();
}

/// The command as a person would type it.
fn describe(command: &Command) -> String {
    let mut words: Vec<String> = command
        .get_envs()
        .filter_map(|(key, value)| {
            let value = value?.to_string_lossy().into_owned();
            let value = if value.contains(' ') {
                format!("'{value}'")
            } else {
                value
            };
            Some(format!("{}={value}", key.to_string_lossy()))
        })
        .collect();
    let program = Path::new(command.get_program());
    words.push(
        program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
    );
    words.extend(
        command
            .get_args()
            .map(|argument| argument.to_string_lossy().into_owned()),
    );
    words.join(" ")
}
