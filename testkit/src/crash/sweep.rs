//! Volumes carried from Standby to their end through kills at random instants.
//!
//! One volume after the other: started, worked on, killed, started again and compared with all
//! that was answered, until every block is here; then killed some more as an ordinary disk; at the
//! end the image file is compared byte for byte.

use super::check::{self, Extent};
use super::counts::{Counts, Kind};
use super::daemon::{Daemon, Launch, PATIENCE, POLL, forget_memory, recorded};
use super::disk::Expected;
use super::filesystem::FileSystem;
use super::load::{Load, Tally, Work};
use super::{DISK_SECTORS, Programs};
use crate::nbd;
use crate::pattern::Random;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Lives of a volume before its copy may run at full speed, so that most kills hit a disk that is
/// partly here.
const SLOW_LIVES: u64 = 12;
/// Kills of a volume that is complete.
const RESIDENT_KILLS: u64 = 4;
/// Lives after which a volume has long been complete.
const MAX_LIVES: u64 = 2000;
/// The longest pauses before a kill, one of which is chosen: most of them short.
const PAUSES_US: [u64; 4] = [500, 2_000, 6_000, 25_000];
/// The longest pause before a kill that is to hit the start; a start takes 10 ms.
const START_US: u64 = 14_000;
/// How much work a step of a volume that is to reach a named point does, in answered requests.
const STEP_REQUESTS: u64 = 400;
/// The log is long enough for a snapshot after 1024 frames of 4 KiB, each for up to three clients'
/// writes with FUA: so many at a time, and by far enough.
const LOG_REQUESTS: u64 = 500;
const MAX_LOG_REQUESTS: u64 = 12_000;

/// What all volumes of one thread share.
pub struct Sweep<'a> {
    /// The programs.
    pub programs: &'a Programs,
    /// Where volumes are made.
    pub file_system: &'a FileSystem,
    /// Where recordings are put: not on the file system that is recorded.
    pub traces: PathBuf,
    /// Where the disk comes from.
    pub source: String,
    /// What has been done.
    pub counts: &'a Counts,
    /// Requests that were answered.
    pub tally: Arc<Tally>,
}

/// A volume on its way.
pub struct Volume<'a> {
    sweep: &'a Sweep<'a>,
    /// What it must hold.
    pub disk: Arc<Expected>,
    /// Its directory.
    pub dir: PathBuf,
    source: String,
    block_bytes: u64,
    handoff: &'static str,
    random: Random,
}

/// How a life is lived.
#[derive(Clone, Debug, Default)]
struct Life {
    arguments: Vec<String>,
    crash_at: Option<String>,
}

impl<'a> Sweep<'a> {
    /// A new volume, named after its seed, of which nothing exists yet.
    ///
    /// # Errors
    /// Its directory cannot be made.
    pub fn volume(&'a self, seed: u64, block_bytes: Option<u64>) -> Result<Volume<'a>> {
        let mut random = Random::new(seed);
        let dir = self.file_system.dir.join(format!("{seed:016x}"));
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let random_bytes = match random.below(10) {
            0 => 512,
            1 => 16 << 10,
            2 => 64 << 10,
            3 => 1 << 20,
            _ => 4096,
        };
        let handoff = match random.below(8) {
            0 => "now",
            _ => "first-write",
        };
        Ok(Volume {
            disk: Arc::new(Expected::new(DISK_SECTORS, false)),
            dir,
            source: self.source.clone(),
            block_bytes: block_bytes.unwrap_or(random_bytes),
            handoff,
            random,
            sweep: self,
        })
    }

    /// Carries a volume through random kills to its end.
    ///
    /// # Errors
    /// Something is lost, or a start is refused. The volume's directory stays.
    pub fn random_volume(&'a self, seed: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        let mut volume = self.volume(seed, None)?;
        let mut lives = 0;
        let mut resident = 0;
        while resident < RESIDENT_KILLS && !stop() {
            ensure!(
                lives < MAX_LIVES,
                "not complete after {lives} lives: {}",
                recorded(&volume.dir).life
            );
            if recorded(&volume.dir).life == "local" {
                resident += 1;
            }
            volume
                .random_life(lives)
                .with_context(|| format!("life {lives}"))?;
            lives += 1;
        }
        if resident >= RESIDENT_KILLS {
            volume.end()?;
            self.counts.volume();
        }
        forget_memory(&volume.dir);
        fs::remove_dir_all(&volume.dir)?;
        Ok(())
    }

    /// Carries a volume to the `nth` passing of the named point `name`, and on to its end. Tells
    /// whether the point was reached.
    ///
    /// # Errors
    /// Something is lost, or a start is refused. The volume's directory stays.
    pub fn named_volume(&'a self, seed: u64, name: &str, nth: u64) -> Result<bool> {
        let snapshot = name.starts_with("snapshot-due");
        // With large blocks everything would be here before some points are come to.
        let block_bytes = if snapshot { 512 } else { 4096 };
        let mut volume = self.volume(seed, Some(block_bytes))?;
        if name.starts_with("handoff") {
            volume.handoff = "first-write";
        }
        let reached = volume.through_all_steps(name, nth, snapshot)?;
        volume.end()?;
        self.counts.volume();
        forget_memory(&volume.dir);
        fs::remove_dir_all(&volume.dir)?;
        Ok(reached)
    }
}

impl Volume<'_> {
    fn launch(&self, life: &Life) -> Launch {
        let programs = self.sweep.programs;
        let binary = match (&life.crash_at, &programs.armed) {
            (Some(_), Some(armed)) => armed,
            _ => &programs.hikkoshi,
        };
        Launch {
            binary: binary.clone(),
            dir: self.dir.clone(),
            arguments: life.arguments.clone(),
            crash_at: life.crash_at.clone(),
            tracer: Vec::new(),
        }
    }

    fn arguments(&self, rest: &[&str]) -> Vec<String> {
        let block = self.block_bytes.to_string();
        let first = ["--from", &self.source, "--handoff", self.handoff];
        let second = ["--block-size", block.as_str()];
        let all = first.iter().chain(&second).chain(rest);
        all.map(|argument| (*argument).to_owned()).collect()
    }

    /// The copy at a random speed, so that kills find all mixtures.
    fn random_arguments(&mut self, lives: u64) -> Vec<String> {
        let rate = format!("{}kB/s", 500 + self.random.below(20_000));
        match self.random.below(10) {
            0..4 if lives < 4 * SLOW_LIVES => self.arguments(&["--no-background"]),
            0..8 if lives < 8 * SLOW_LIVES => self.arguments(&["--max-rate", &rate]),
            _ if lives < SLOW_LIVES => self.arguments(&["--no-background"]),
            // A volume that is complete needs no source, nor be told of one.
            8 if recorded(&self.dir).life == "local" => Vec::new(),
            _ => self.arguments(&[]),
        }
    }

    fn pause(&mut self, longest_us: u64) {
        std::thread::sleep(Duration::from_micros(self.random.below(longest_us)));
    }

    fn random_life(&mut self, lives: u64) -> Result<()> {
        let sweep = self.sweep;
        let fs = sweep.file_system.name;
        let resident = recorded(&self.dir).life == "local";
        let life = Life {
            arguments: self.random_arguments(lives),
            crash_at: None,
        };
        let mut daemon = self.launch(&life).spawn()?;
        if self.random.below(6) == 0 {
            self.pause(START_US);
            daemon.kill()?;
            sweep.counts.restart(Kind::AtStart, fs);
            return Ok(());
        }
        ensure!(daemon.wait_until_up()?, "killed by somebody else");
        check::after_kill(daemon.socket(), &self.disk, Extent::Touched)?;
        let work = match self.random.below(8) {
            0 => Work::Commits,
            1 => Work::Reads,
            _ => Work::All,
        };
        let seed = self.random.next();
        let longest = PAUSES_US[usize::try_from(self.random.below(4))?];
        if self.random.below(24) == 0 {
            let load = self.load(&daemon, work, seed);
            self.pause(longest);
            load.finish()?;
            ensure!(daemon.terminate()?, "killed by somebody else");
            sweep.counts.restart(Kind::Orderly, fs);
            return Ok(());
        }
        let load = self.load(&daemon, work, seed);
        self.pause(longest);
        daemon.kill()?;
        load.wait()?;
        let kind = if resident {
            Kind::Resident
        } else {
            Kind::UnderLoad
        };
        sweep.counts.restart(kind, fs);
        Ok(())
    }

    fn load(&self, daemon: &Daemon, work: Work, seed: u64) -> Load {
        Load::start(
            daemon.socket(),
            &self.disk,
            self.block_bytes / 512,
            work,
            seed,
            &self.sweep.tally,
        )
    }

    /// Carries the volume to its end, whatever was done to it, and compares its image.
    fn end(&mut self) -> Result<()> {
        let mut steps = Steps::new(self, None);
        steps.up(&[])?;
        steps.hand_off()?;
        steps.check(Extent::Whole)?;
        steps.wait_until_local()?;
        steps.orderly_end()?;
        check::image(&self.dir.join("disk.img"), &self.disk)
    }

    /// All that a volume goes through, with the `nth` passing of the point `name` as its death.
    /// Tells whether it came to that.
    fn through_all_steps(&mut self, name: &str, nth: u64, snapshot: bool) -> Result<bool> {
        let mut steps = Steps::new(self, Some(format!("{name}:{nth}")));
        steps.up(&["--no-background"])?;
        if snapshot {
            steps.fill_the_log()?;
        }
        steps.work(Work::Reads, STEP_REQUESTS / 8)?;
        steps.work(Work::All, STEP_REQUESTS)?;
        steps.orderly_end()?;
        steps.up(&["--max-rate", "2MB/s"])?;
        steps.work(Work::All, STEP_REQUESTS)?;
        // The memory of a killed process is found by the next one,
        steps.kill()?;
        steps.up(&["--max-rate", "2MB/s"])?;
        steps.work(Work::All, STEP_REQUESTS)?;
        // and after a boot there is only what is durable.
        steps.boot()?;
        steps.up(&["--max-rate", "2MB/s"])?;
        steps.orderly_end()?;
        steps.up(&[])?;
        steps.work(Work::All, STEP_REQUESTS / 4)?;
        steps.wait_until_local()?;
        steps.work(Work::All, STEP_REQUESTS / 4)?;
        steps.orderly_end()?;
        steps.up(&[])?;
        steps.orderly_end()?;
        let reached = steps.reached;
        if reached {
            self.sweep.counts.point(name);
        }
        Ok(reached)
    }
}

/// A volume and the daemon that serves it, step by step. Each step may be the daemon's last, if
/// it comes to the named point; the next one starts it again, without a point.
struct Steps<'v, 'a> {
    volume: &'v mut Volume<'a>,
    daemon: Option<Daemon>,
    arguments: Vec<String>,
    crash_at: Option<String>,
    reached: bool,
}

impl<'v, 'a> Steps<'v, 'a> {
    fn new(volume: &'v mut Volume<'a>, crash_at: Option<String>) -> Self {
        Self {
            volume,
            daemon: None,
            arguments: Vec::new(),
            crash_at,
            reached: false,
        }
    }

    /// The daemon is dead, as it should be at the point and nowhere else.
    fn note_death(&mut self) -> Result<()> {
        ensure!(self.crash_at.take().is_some(), "killed by somebody else");
        self.daemon = None;
        self.reached = true;
        let fs = self.volume.sweep.file_system.name;
        self.volume.sweep.counts.restart(Kind::Named, fs);
        Ok(())
    }

    /// What a step gave, if the daemon lives; nothing if it died at the point.
    fn unless_dead<R>(&mut self, outcome: Result<R>) -> Result<Option<R>> {
        match outcome {
            Ok(value) => Ok(Some(value)),
            Err(error) if nbd::is_hang_up(&error) => {
                // It is dying; there is nothing to wait for but that.
                let start = Instant::now();
                while let Some(daemon) = &mut self.daemon {
                    if daemon.has_been_killed()? {
                        self.note_death()?;
                        return Ok(None);
                    }
                    ensure!(
                        start.elapsed() < PATIENCE,
                        "it hung up, and lives: {error:#}"
                    );
                    std::thread::sleep(POLL);
                }
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Starts with these arguments, and compares what is there.
    fn up(&mut self, rest: &[&str]) -> Result<()> {
        self.arguments = self.volume.arguments(rest);
        self.daemon = None;
        self.daemon().map(drop)
    }

    /// The daemon, started if it is dead.
    fn daemon(&mut self) -> Result<&mut Daemon> {
        while self.daemon.is_none() {
            let life = Life {
                arguments: self.arguments.clone(),
                crash_at: self.crash_at.clone(),
            };
            let mut daemon = self.volume.launch(&life).spawn()?;
            let up = daemon.wait_until_up()?;
            self.daemon = Some(daemon);
            if up {
                self.check(Extent::Touched)?;
            } else {
                self.note_death()?;
            }
        }
        self.daemon.as_mut().context("it was just started")
    }

    /// Compares; nothing if the daemon dies meanwhile.
    fn check(&mut self, extent: Extent) -> Result<()> {
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let outcome = check::after_kill(daemon.socket(), &self.volume.disk, extent);
        self.unless_dead(outcome).map(drop)
    }

    /// Works until so many requests were answered.
    fn work(&mut self, work: Work, requests: u64) -> Result<()> {
        self.daemon()?;
        let Some(daemon) = self.daemon.as_mut() else {
            return Ok(());
        };
        let tally = Arc::new(Tally::default());
        let load = Load::start(
            daemon.socket(),
            &self.volume.disk,
            self.volume.block_bytes / 512,
            work,
            self.volume.random.next(),
            &tally,
        );
        let start = Instant::now();
        let mut dead = false;
        while !dead && tally.answered.load(Ordering::Relaxed) < requests {
            ensure!(start.elapsed() < PATIENCE, "the clients are stuck");
            std::thread::sleep(POLL);
            dead = daemon.has_been_killed()?;
        }
        load.finish()?;
        let answered = tally.answered.load(Ordering::Relaxed);
        let all = &self.volume.sweep.tally.answered;
        all.fetch_add(answered, Ordering::Relaxed);
        if dead || daemon.has_been_killed()? {
            self.note_death()?;
        }
        Ok(())
    }

    /// Makes commits until the log is so long that a snapshot takes its place, while there are
    /// blocks enough that have no record yet.
    fn fill_the_log(&mut self) -> Result<()> {
        let map = self.volume.dir.join("disk.img.hikkoshi/map");
        let inode = |path: &Path| fs::metadata(path).map(|meta| meta.ino()).ok();
        self.daemon()?;
        let before = inode(&map);
        let mut requests = 0;
        while !self.reached && inode(&map) == before {
            ensure!(requests < MAX_LOG_REQUESTS, "no snapshot of a long log");
            self.work(Work::Commits, LOG_REQUESTS)?;
            requests += LOG_REQUESTS;
        }
        Ok(())
    }

    /// One write, which is the handoff where there has been none.
    fn hand_off(&mut self) -> Result<()> {
        if recorded(&self.volume.dir).life == "standby" {
            self.work(Work::Commits, 1)?;
        }
        Ok(())
    }

    fn wait_until_local(&mut self) -> Result<()> {
        self.daemon()?;
        let start = Instant::now();
        while recorded(&self.volume.dir).life != "local" {
            ensure!(start.elapsed() < PATIENCE, "it is never complete");
            std::thread::sleep(POLL);
            if self.daemon()?.has_been_killed()? {
                self.note_death()?;
            }
        }
        Ok(())
    }

    fn orderly_end(&mut self) -> Result<()> {
        self.daemon()?;
        if let Some(daemon) = self.daemon.take() {
            if daemon.terminate()? {
                let fs = self.volume.sweep.file_system.name;
                self.volume.sweep.counts.restart(Kind::Orderly, fs);
            } else {
                self.note_death()?;
            }
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<()> {
        self.daemon()?;
        if let Some(mut daemon) = self.daemon.take() {
            if daemon.has_been_killed()? {
                return self.note_death();
            }
            daemon.kill()?;
            let fs = self.volume.sweep.file_system.name;
            self.volume.sweep.counts.restart(Kind::UnderLoad, fs);
        }
        Ok(())
    }

    /// What is left after a boot, for who has flushed everything.
    fn boot(&mut self) -> Result<()> {
        self.daemon()?;
        let Some(daemon) = &self.daemon else {
            return Ok(());
        };
        let flush = || nbd::Client::connect(daemon.socket())?.ask(nbd::Request::Flush);
        let outcome = flush();
        if self.unless_dead(outcome)?.is_some() {
            self.kill()?;
            forget_memory(&self.volume.dir);
        }
        Ok(())
    }
}
