//! The power cut of a disk that changes its storage (`hikkoshi move`): the daemon is recorded with clients
//! that stay, from before the move until all is in the new image, and started on what both media may
//! hold after a cut at any instant.
//!
//! Whatever is found: one of the two images is served, the other is refused and says which it is; and what is
//! served accepts writes and has all that was flushed, wherever it was flushed to.

use super::DISK_SECTORS;
use super::check;
use super::counts::Kind;
use super::daemon::{PATIENCE, POLL, forget_memory};
use super::disk::{Expected, make_original, now_ns};
use super::load::{Load, Tally, Work};
use super::medium::{Cut, Medium};
use super::movecut::{Times, accepts_writes, instant, there_before};
use super::record;
use super::sweep::Sweep;
use crate::daemon::Daemon;
use crate::pattern::{Random, mix};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Cuts of one recording: it takes as long to make as ten of them.
const CUTS: u64 = 25;
/// How much work each part does, in answered requests.
const REQUESTS: u64 = 40;

struct Session<'a> {
    sweep: &'a Sweep<'a>,
    dir: PathBuf,
    trace: PathBuf,
    /// Where the old image and the new one are, each with its state and nothing else.
    places: [PathBuf; 2],
    random: Random,
    disk: Arc<Expected>,
}

/// Makes a recording and replays cuts of it.
///
/// # Errors
/// Something is lost that was flushed, or it is not so that one image is served and the other refused.
/// The directory stays, and has all that is needed to look into it.
pub fn run(sweep: &Sweep<'_>, seed: u64, stop: &dyn Fn() -> bool) -> Result<()> {
    let dir = sweep.file_system.dir.join(format!("{seed:016x}"));
    fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    let trace = sweep.traces.join(format!("{seed:016x}.trace"));
    let places = ["old", "new"].map(|name| dir.join(name));
    for place in &places {
        fs::create_dir(place)?;
    }
    let mut session = Session {
        sweep,
        dir: dir.clone(),
        trace: trace.clone(),
        places,
        random: Random::new(seed),
        disk: Arc::new(Expected::new(DISK_SECTORS, true)),
    };
    let outcome = session.play(seed, stop);
    if outcome.is_err() {
        session.disk.dump(&dir.join("expected.txt"))?;
        fs::copy(&trace, dir.join("trace"))?;
        return outcome;
    }
    fs::remove_dir_all(&dir)?;
    fs::remove_file(&trace)?;
    Ok(())
}

fn image(place: &Path) -> PathBuf {
    place.join("disk.img")
}

impl Session<'_> {
    fn start(&self, place: &Path, tracer: &[std::ffi::OsString]) -> Result<Daemon> {
        let name = place.file_name().and_then(|name| name.to_str());
        let name = name.context("a place has a name")?;
        Daemon::start_recorded(&self.dir, name, &image(place), &[], tracer)
            .with_context(|| format!("the start of the {name} image"))
    }

    fn play(&mut self, seed: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        let [old, new] = self.places.clone();
        make_original(&image(&old), DISK_SECTORS)?;
        let before = there_before(&old, &image(&old))?;
        let (pid, times) = self.record()?;
        record::wait_for_end(&self.trace, pid)?;
        let old_calls = [before, record::read(&self.trace, &old)?].concat();
        let media = [
            Medium::new(&old, &old_calls, times.ended_ns)?,
            Medium::new(&new, &record::read(&self.trace, &new)?, times.ended_ns)?,
        ];
        self.sweep.counts.recording();
        // Images keep their inodes, which the states know.
        for place in &self.places {
            fs::rename(image(place), self.kept(place))?;
        }
        for number in 0..CUTS {
            if stop() {
                break;
            }
            let mut random = Random::new(mix(seed ^ mix(number)));
            let at_ns = instant(&media, &times, &mut random)?;
            // One machine, two disks.
            let cuts = [(); 2].map(|()| Cut {
                at_ns,
                seed: random.next(),
                spares: false,
            });
            self.replay(&media, cuts)
                .with_context(|| format!("cut: {cuts:?}"))?;
            let fs = self.sweep.file_system.name;
            self.sweep.counts.restart(Kind::MoveCut, fs);
        }
        for place in &self.places {
            forget_memory(place);
        }
        Ok(())
    }

    fn kept(&self, place: &Path) -> PathBuf {
        place.with_extension("kept")
    }

    /// A move under clients that stay. Gives the process, and when it was.
    fn record(&mut self) -> Result<(u32, Times)> {
        let tracer = record::tracer(&self.trace)?;
        let daemon = self.start(&self.places[0], &tracer)?;
        let began_ns = now_ns();
        let wanted = Arc::new(Tally::default());
        let seed = self.random.next();
        let load = Load::start(&daemon.socket, &self.disk, 8, Work::All, seed, &wanted);
        self.await_work(&wanted, REQUESTS)?;
        let asked_ns = now_ns();
        let to = image(&self.places[1]).display().to_string();
        let prepare = ["none", "ahead"][usize::try_from(self.random.below(2))?];
        daemon.command(&["move", &to, "--detach", "--prepare", prepare])?;
        daemon.wait_status("in the new image", |s| s["storage_move"]["phase"] == "done")?;
        let done_ns = now_ns();
        let so_far = wanted.answered.load(Ordering::Relaxed);
        self.await_work(&wanted, so_far + REQUESTS)?;
        load.finish()?;
        let all = &self.sweep.tally.answered;
        all.fetch_add(wanted.answered.load(Ordering::Relaxed), Ordering::Relaxed);
        let pid = daemon.pid();
        daemon.kill()?;
        let times = Times {
            began_ns,
            handoff_ns: asked_ns..done_ns,
            ended_ns: now_ns(),
        };
        Ok((pid, times))
    }

    fn await_work(&self, tally: &Tally, requests: u64) -> Result<()> {
        let start = Instant::now();
        while tally.answered.load(Ordering::Relaxed) < requests {
            ensure!(start.elapsed() < PATIENCE, "the clients are stuck");
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn replay(&self, media: &[Medium; 2], cuts: [Cut; 2]) -> Result<()> {
        for ((place, medium), cut) in self.places.iter().zip(media).zip(cuts) {
            forget_memory(place);
            fs::remove_dir_all(place)?;
            fs::create_dir(place)?;
            medium.lay_out(cut, place, &self.kept(place))?;
            forget_memory(place);
        }
        let [old, new] = &self.places;
        let (writer, other) = match self.start(old, &[]) {
            Ok(daemon) => {
                self.sweep.counts.writer("old image");
                (daemon, new)
            }
            Err(error) => {
                refused(&error, new)?;
                self.sweep.counts.writer("new image");
                (self.start(new, &[])?, old)
            }
        };
        check::after_cut(&writer.socket, &self.disk, cuts[0].at_ns)?;
        ensure!(accepts_writes(&writer)?, "refused: {:?}", writer.status());
        writer.wait_status("complete", |s| s["state"] == "local")?;
        check::after_cut(&writer.socket, &self.disk, cuts[0].at_ns)?;
        writer.stop()?;
        // A new image without a state is a file that nobody has written to.
        let is_known = other.join("disk.img.hikkoshi/volume").exists();
        if other == old || is_known {
            match self.start(other, &[]) {
                Ok(daemon) => anyhow::bail!("both are served: {:?}", daemon.status()),
                Err(error) => {
                    let served = if other == old { new } else { old };
                    refused(&error, served)?;
                }
            }
        }
        Ok(())
    }
}

/// A clean refusal that says which image it is.
fn refused(error: &anyhow::Error, named: &Path) -> Result<()> {
    let said = format!("{error:#}");
    ensure!(said.contains("exit status: 1"), "no clean refusal: {said}");
    let named = image(named).display().to_string();
    ensure!(said.contains(&named), "{said} does not name {named}");
    Ok(())
}
