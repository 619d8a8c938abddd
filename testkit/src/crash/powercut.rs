//! The power cut: recordings of the real binary at work, and starts on what a medium may hold after
//! a cut at any instant of them.

use super::DISK_SECTORS;
use super::check;
use super::counts::Kind;
use super::daemon::{Daemon, Launch, PATIENCE, POLL, forget_memory, recorded};
use super::disk::{Expected, now_ns};
use super::load::{Load, Work};
use super::medium::{Cut, Medium};
use super::record;
use super::sweep::Sweep;
use crate::nbd::{Client, Request};
use crate::pattern::{Random, mix};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Cuts of one recording: it takes as long to make as some fifty cuts.
pub const CUTS: u64 = 150;
/// How much work each part of a recording does, in answered requests.
const MIN_REQUESTS: u64 = 40;
const MAX_REQUESTS: u64 = 300;

/// A recording under way, and then the place where it is replayed.
struct Session<'a> {
    sweep: &'a Sweep<'a>,
    dir: PathBuf,
    random: Random,
    disk: Arc<Expected>,
    block_bytes: u64,
    handoff: &'static str,
    traces: Vec<(PathBuf, u32)>,
    ends: Vec<u64>,
}

/// Makes a recording and replays `cuts` cuts of it.
///
/// # Errors
/// Something is lost that was flushed, or a start is refused. The directory stays, and has all
/// that is needed to look into it: the traces, what was written and flushed when, the cut, and what
/// the medium held.
pub fn run(sweep: &Sweep<'_>, seed: u64, stop: &dyn Fn() -> bool) -> Result<()> {
    let dir = sweep.file_system.dir.join(format!("{seed:016x}"));
    fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    let traces = sweep.traces.join(format!("{seed:016x}"));
    fs::create_dir(&traces)?;
    let mut random = Random::new(seed);
    let block_bytes = [4096, 4096, 4096, 512, 16 << 10, 1 << 20];
    let block_bytes = block_bytes[usize::try_from(random.below(6))?];
    let handoff = if random.below(8) == 0 {
        "now"
    } else {
        "first-write"
    };
    let mut session = Session {
        sweep,
        dir,
        random,
        disk: Arc::new(Expected::new(DISK_SECTORS, true)),
        block_bytes,
        handoff,
        traces: Vec::new(),
        ends: Vec::new(),
    };
    let outcome = session.record(&traces).and_then(|()| {
        let medium = session.read()?;
        sweep.counts.recording();
        session.replay(&medium, seed, stop)
    });
    if outcome.is_err() {
        session.disk.dump(&session.dir.join("expected.txt"))?;
        for (trace, _) in &session.traces {
            let name = trace.file_name().context("a trace has a name")?;
            fs::copy(trace, session.dir.join(name))?;
        }
        return outcome;
    }
    forget_memory(&session.dir);
    fs::remove_dir_all(&session.dir)?;
    fs::remove_dir_all(&traces)?;
    Ok(())
}

impl Session<'_> {
    fn launch(&self, rest: &[&str]) -> Launch {
        let block = self.block_bytes.to_string();
        let first = ["--from", &self.sweep.source, "--handoff", self.handoff];
        let second = ["--block-size", block.as_str()];
        let all = first.iter().chain(&second).chain(rest);
        Launch {
            binary: self.sweep.programs.hikkoshi.clone(),
            dir: self.dir.clone(),
            arguments: all.map(|argument| (*argument).to_owned()).collect(),
            crash_at: None,
            tracer: Vec::new(),
        }
    }

    /// Starts the recorded daemon.
    fn start(&mut self, traces: &Path, rest: &[&str]) -> Result<Daemon> {
        let trace = traces.join(format!("{}.trace", self.traces.len()));
        let mut launch = self.launch(rest);
        launch.tracer = record::tracer(&trace)?;
        let mut daemon = launch.spawn()?;
        self.traces.push((trace, daemon.pid()));
        ensure!(daemon.wait_until_up()?, "killed by somebody else");
        Ok(daemon)
    }

    /// What a VM does, and what befalls its disk's daemon, with nothing in flight at a kill.
    fn record(&mut self, traces: &Path) -> Result<()> {
        let rate = format!("{}kB/s", 500 + self.random.below(8000));
        let slowly: &[&str] = match self.random.below(3) {
            0 => &["--no-background"],
            _ => &["--max-rate", &rate],
        };
        let mut daemon = self.start(traces, slowly)?;
        self.work(&mut daemon, Work::Reads)?;
        self.work(&mut daemon, Work::All)?;
        if self.random.below(2) == 0 {
            self.end(daemon, false)?;
            daemon = self.start(traces, slowly)?;
            self.work(&mut daemon, Work::All)?;
        }
        self.end(daemon, true)?;
        let mut daemon = self.start(traces, &[])?;
        self.work(&mut daemon, Work::All)?;
        let start = Instant::now();
        while recorded(&self.dir).life != "local" {
            ensure!(start.elapsed() < PATIENCE, "it is never complete");
            ensure!(!daemon.has_been_killed()?, "killed by somebody else");
            std::thread::sleep(POLL);
        }
        self.work(&mut daemon, Work::All)?;
        let orderly = self.random.below(2) == 0;
        self.end(daemon, orderly)
    }

    fn work(&mut self, daemon: &mut Daemon, work: Work) -> Result<()> {
        let span = MAX_REQUESTS - MIN_REQUESTS;
        let mut requests = MIN_REQUESTS + self.random.below(span);
        if work == Work::Reads {
            requests = 8;
        }
        let tally = &self.sweep.tally;
        let wanted = Arc::new(super::load::Tally::default());
        let load = Load::start(
            daemon.socket(),
            &self.disk,
            self.block_bytes / 512,
            work,
            self.random.next(),
            &wanted,
        );
        let start = Instant::now();
        while wanted.answered.load(Ordering::Relaxed) < requests {
            ensure!(start.elapsed() < PATIENCE, "the clients are stuck");
            ensure!(!daemon.has_been_killed()?, "killed by somebody else");
            std::thread::sleep(POLL);
        }
        load.finish()?;
        let answered = wanted.answered.load(Ordering::Relaxed);
        tally.answered.fetch_add(answered, Ordering::Relaxed);
        Ok(())
    }

    fn end(&mut self, daemon: Daemon, orderly: bool) -> Result<()> {
        if orderly {
            // Flushed before, so that the cut may fall between the flush and the end.
            let asked_ns = now_ns();
            Client::connect(daemon.socket())?.ask(Request::Flush)?;
            self.disk.flushed(asked_ns);
            ensure!(daemon.terminate()?, "killed by somebody else");
        } else {
            daemon.kill()?;
        }
        self.ends.push(now_ns());
        Ok(())
    }

    fn read(&self) -> Result<Medium> {
        let mut calls = Vec::new();
        let mut last = 0;
        for ((trace, pid), end_ns) in self.traces.iter().zip(&self.ends) {
            record::wait_for_end(trace, *pid)?;
            let mut more = record::read(trace, &self.dir)?;
            for call in &mut more {
                // Killed in it: it was over then, done or not.
                call.ended_ns.get_or_insert(*end_ns);
            }
            calls.extend(more);
            last = *end_ns;
        }
        Medium::new(&self.dir, &calls, last)
    }

    fn replay(&mut self, medium: &Medium, seed: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        let image = self.dir.join("keep");
        fs::rename(self.dir.join("disk.img"), &image)?;
        for number in 0..CUTS {
            if stop() {
                break;
            }
            let cut = medium.random_cut(mix(seed ^ mix(number)))?;
            self.replay_one(medium, cut, &image).or_else(|error| {
                let again = self.dir.join("medium");
                self.clear()?;
                medium.lay_out(cut, &self.dir, &image)?;
                fs::create_dir(&again)?;
                for name in ["disk.img", "disk.img.hikkoshi"] {
                    // Not there if its making was lost.
                    let _ = fs::rename(self.dir.join(name), again.join(name));
                }
                Err(error.context(format!("{cut:?}")))
            })?;
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        forget_memory(&self.dir);
        for name in ["disk.img", "disk.img.hikkoshi"] {
            let path = self.dir.join(name);
            match fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() => fs::remove_dir_all(&path)?,
                Ok(_) => fs::remove_file(&path)?,
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn replay_one(&mut self, medium: &Medium, cut: Cut, image: &Path) -> Result<()> {
        self.clear()?;
        medium.lay_out(cut, &self.dir, image)?;
        forget_memory(&self.dir);
        let mut daemon = self.launch(&["--no-background"]).spawn()?;
        ensure!(daemon.wait_until_up()?, "killed by somebody else");
        check::after_cut(daemon.socket(), &self.disk, cut.at_ns)?;
        daemon.kill()?;
        let fs = self.sweep.file_system.name;
        self.sweep.counts.restart(Kind::PowerCut, fs);
        Ok(())
    }
}
