//! A `hikkoshi serve` on Unix sockets, for tests of faults: its signals, events, metrics and log.

use crate::cache;
use crate::client::Client;
use crate::netns::Namespace;
use crate::process::Process;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything takes that is not stuck.
pub const LONG: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// A running daemon. Killed when dropped.
pub struct Daemon {
    process: Process,
    binary: PathBuf,
    /// Its NBD socket.
    pub socket: PathBuf,
    /// Its control socket.
    pub control: PathBuf,
}

impl Daemon {
    /// Serves `image`; sockets and log are in `dir` under the name `name`. `extra` goes to the
    /// command line.
    ///
    /// # Errors
    /// It does not build, does not start, or does not listen in time; the message has its log.
    pub fn start(dir: &Path, name: &str, image: &Path, extra: &[&str]) -> Result<Self> {
        Self::start_in(None, dir, name, image, extra)
    }

    /// The same in a network namespace.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_in(
        site: Option<&Namespace>,
        dir: &Path,
        name: &str,
        image: &Path,
        extra: &[&str],
    ) -> Result<Self> {
        Self::launch(site, cache::hikkoshi()?, &[], dir, name, image, extra)
    }

    /// One whose system calls are recorded: `tracer` is a program with its arguments that starts
    /// ours and leaves it its process id.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_recorded(
        dir: &Path,
        name: &str,
        image: &Path,
        extra: &[&str],
        tracer: &[OsString],
    ) -> Result<Self> {
        Self::launch(None, cache::hikkoshi()?, tracer, dir, name, image, extra)
    }

    /// The binary with crash points, which kills itself at `point` (`NAME:N`; none: nowhere).
    ///
    /// # Errors
    /// As [`Daemon::start`]; also when it is killed before it serves.
    pub fn start_armed(
        dir: &Path,
        name: &str,
        image: &Path,
        extra: &[&str],
        point: Option<&str>,
    ) -> Result<Self> {
        let binary = cache::armed_hikkoshi()?;
        // It replaces itself by the program: the process id stays the child's.
        let order = point.map(|point| ["env".into(), format!("HIKKOSHI_CRASH_AT={point}").into()]);
        let before: Vec<OsString> = order.into_iter().flatten().collect();
        Self::launch(None, binary, &before, dir, name, image, extra)
    }

    fn launch(
        site: Option<&Namespace>,
        binary: PathBuf,
        before: &[OsString],
        dir: &Path,
        name: &str,
        image: &Path,
        extra: &[&str],
    ) -> Result<Self> {
        let socket = dir.join(format!("{name}.nbd"));
        let control = dir.join(format!("{name}.control"));
        let mut arguments = vec![
            "serve".to_owned(),
            image.display().to_string(),
            "--listen".to_owned(),
            format!("unix:{}", socket.display()),
            "--control".to_owned(),
            format!("unix:{}", control.display()),
        ];
        arguments.extend(extra.iter().map(|&word| word.to_owned()));
        let log = dir.join(format!("{name}.log"));
        let mut words = before.to_vec();
        words.push(binary.clone().into());
        words.extend(arguments.into_iter().map(OsString::from));
        let program = PathBuf::from(words.remove(0));
        let process = Process::start(site, &program, &words, &log)?;
        let mut daemon = Self {
            process,
            binary,
            socket,
            control,
        };
        let (socket, control) = (daemon.socket.clone(), daemon.control.clone());
        daemon.process.wait_until("sockets", LONG, |_| {
            [&socket, &control]
                .iter()
                .all(|path| UnixStream::connect(path).is_ok())
        })?;
        Ok(daemon)
    }

    /// Starts one that is expected to refuse, and returns what it said.
    ///
    /// # Errors
    /// It did not end by itself, or did not fail.
    pub fn refusal(dir: &Path, name: &str, image: &Path, extra: &[&str]) -> Result<String> {
        match Self::start(dir, name, image, extra) {
            Ok(daemon) => bail!("it was not refused:\n{}", daemon.log()),
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(text.contains("exit status: 1"), "no clean failure: {text}");
                ensure!(!text.contains("panicked"), "{text}");
                Ok(text)
            }
        }
    }

    /// Its NBD URI.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// A new client of its export.
    ///
    /// # Errors
    /// It does not answer.
    pub fn client(&self) -> Result<Client> {
        Client::connect(&self.socket)
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        self.process.tail()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid())?).context("a process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Stops it with SIGSTOP, and waits until every thread stands still.
    ///
    /// # Errors
    /// It is gone, or does not stop.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let start = Instant::now();
        let stands = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat"));
            // A thread that ended meanwhile does nothing either.
            stat.map_or(true, |stat| {
                stat.rsplit_once(')')
                    .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
            })
        };
        loop {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()))?;
            if tasks.flatten().all(stands) {
                return Ok(());
            }
            ensure!(start.elapsed() < LONG, "it does not stop");
            std::thread::sleep(POLL);
        }
    }

    /// Waits for its end by itself and returns its exit status.
    ///
    /// # Errors
    /// It does not end within `limit`, or was killed.
    pub fn exit_status(mut self, limit: Duration) -> Result<i32> {
        let status = self.process.wait(limit)?;
        status
            .code()
            .with_context(|| format!("killed by a signal: {status}"))
    }

    /// Waits until it has been killed, by itself or others.
    ///
    /// # Errors
    /// It is not within minutes, or ended in another way.
    pub fn wait_killed(mut self) -> Result<()> {
        let status = self.process.wait(LONG)?;
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        ensure!(signal == Some(9), "not killed, {status}:\n{}", self.log());
        Ok(())
    }

    /// Ends it with SIGTERM, cleanly.
    ///
    /// # Errors
    /// It does not end, or not with status 0.
    pub fn stop(self) -> Result<()> {
        self.signal(Signal::TERM)?;
        let log = self.log();
        let status = self.exit_status(LONG)?;
        ensure!(status == 0, "exit status {status}:\n{log}");
        Ok(())
    }

    /// Kills it with SIGKILL.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(self) -> Result<()> {
        self.process.kill()
    }

    /// Runs another of `hikkoshi`'s commands against it, whatever comes of it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn try_command(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.binary);
        command.args(arguments);
        command.args(["--control", &format!("unix:{}", self.control.display())]);
        Ok(command.stdin(Stdio::null()).output()?)
    }

    /// The same, and it must succeed.
    ///
    /// # Errors
    /// It does not.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let output = self.try_command(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{arguments:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The export's status.
    ///
    /// # Errors
    /// The command fails.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.command(&["status", "--json"])?)?)
    }

    /// Waits until `status` is answered at all, however often it fails before.
    ///
    /// # Errors
    /// It is not within minutes.
    pub fn wait_status_patiently(&self) -> Result<Value> {
        let start = Instant::now();
        loop {
            match self.status() {
                Ok(status) => return Ok(status),
                Err(error) if start.elapsed() > LONG => return Err(error),
                Err(_) => std::thread::sleep(POLL),
            }
        }
    }

    /// Waits until the status is as wanted, and returns it.
    ///
    /// # Errors
    /// It is not within minutes.
    pub fn wait_status(&self, what: &str, mut wanted: impl FnMut(&Value) -> bool) -> Result<Value> {
        let start = Instant::now();
        loop {
            let status = self.status()?;
            if wanted(&status) {
                return Ok(status);
            }
            if start.elapsed() > LONG {
                bail!("never {what}: {status}\n{}", self.log());
            }
            std::thread::sleep(POLL);
        }
    }

    /// The kinds of the events so far, in order.
    ///
    /// # Errors
    /// The command fails.
    pub fn event_kinds(&self) -> Result<Vec<String>> {
        let text = self.command(&["events", "--json"])?;
        let kinds = text.lines().map(|line| {
            let event: Value = serde_json::from_str(line)?;
            let kind = event["kind"].as_str().context("a kind")?;
            Ok(kind.to_owned())
        });
        kinds.collect()
    }

    /// Waits until an event of this kind has come.
    ///
    /// # Errors
    /// It has not within minutes.
    pub fn wait_event(&self, kind: &str) -> Result<()> {
        let start = Instant::now();
        while !self.event_kinds()?.iter().any(|k| k == kind) {
            if start.elapsed() > LONG {
                bail!("no event {kind}: {:?}\n{}", self.event_kinds()?, self.log());
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// A metric of the export, by its name without the prefix.
    ///
    /// # Errors
    /// It is not there.
    pub fn metric(&self, name: &str) -> Result<u64> {
        let mut stream = UnixStream::connect(&self.control)?;
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let start = format!("hikkoshi_{name}{{");
        let line = answer.lines().find(|line| line.starts_with(&start));
        let line = line.with_context(|| format!("no metric {name} in {answer}"))?;
        let (_, value) = line.rsplit_once(' ').context("a sample")?;
        Ok(value.parse()?)
    }

    /// What it has used of the processors, in seconds.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu_s(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        let (_, rest) = stat.rsplit_once(')').context("a process's name")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let ticks: u32 = fields[11].parse::<u32>()? + fields[12].parse::<u32>()?;
        Ok(f64::from(ticks) / 100.0)
    }
}
