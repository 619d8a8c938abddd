//! The power cut of a move: both ends of one are recorded, from before the destination comes until
//! it is complete, and both are started on what their media may hold after a cut at any instant: of
//! the source's power, of the destination's, or of both.
//!
//! Both recordings have the same clock, so what both media hold at an instant is what the order of
//! their syncs and of the messages between them has made of it. Whatever is found: exactly one side
//! accepts writes, or none, and then the destination's status names the ways on, of which one is taken;
//! and whoever accepts writes has all that was flushed.

use super::DISK_SECTORS;
use super::check;
use super::counts::Kind;
use super::daemon::{PATIENCE, POLL, forget_memory};
use super::disk::{Content, Expected, SECTOR, make_original, now_ns};
use super::load::{Load, Tally, Work};
use super::medium::{Cut, Medium};
use super::record::{self, Call, Change};
use super::sweep::Sweep;
use crate::daemon::Daemon;
use crate::nbd::{Client, Request};
use crate::pattern::{Random, mix};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Cuts of one recording: it takes as long to make as ten of them.
const CUTS: u64 = 25;
/// How much work each part does, in answered requests.
const REQUESTS: u64 = 40;
/// EPERM.
const REFUSED: u32 = 1;
/// What is written again to see whether writes are accepted.
const PROBE_BYTES: u32 = 4096;
/// The sector that the first write at the destination goes to.
const FIRST_WRITE: u64 = 8;

/// Whose power is cut. The others are killed, and have all that they wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Source,
    Destination,
    Both,
}

/// One end.
struct Side {
    name: &'static str,
    /// Where its image and state are, and nothing else.
    dir: PathBuf,
    arguments: Vec<String>,
    /// What was there before the recording began.
    before: Vec<Call>,
    recording: Option<(PathBuf, u32)>,
}

struct Session<'a> {
    sweep: &'a Sweep<'a>,
    dir: PathBuf,
    traces: PathBuf,
    random: Random,
    disk: Arc<Expected>,
    sides: [Side; 2],
}

/// Makes a recording and replays cuts of it.
///
/// # Errors
/// Something is lost that was flushed, a start is refused, or two accept writes, or none without a
/// way on. The directory stays, and has all that is needed to look into it.
pub fn run(sweep: &Sweep<'_>, seed: u64, stop: &dyn Fn() -> bool) -> Result<()> {
    let dir = sweep.file_system.dir.join(format!("{seed:016x}"));
    fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    let traces = sweep.traces.join(format!("{seed:016x}"));
    fs::create_dir(&traces)?;
    let mut session = Session::new(sweep, &dir, &traces, seed)?;
    let outcome = session.play(seed, stop);
    if outcome.is_err() {
        session.disk.dump(&dir.join("expected.txt"))?;
        for (trace, _) in session.sides.iter().filter_map(|s| s.recording.as_ref()) {
            let name = trace.file_name().context("a trace has a name")?;
            fs::copy(trace, dir.join(name))?;
        }
        return outcome;
    }
    fs::remove_dir_all(&dir)?;
    fs::remove_dir_all(&traces)?;
    Ok(())
}

impl Side {
    fn image(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    /// Starts it; `tracer` if it is to be recorded.
    fn start(&self, more: &[&str], tracer: &[std::ffi::OsString]) -> Result<Daemon> {
        let words = self.arguments.iter().map(String::as_str);
        let words: Vec<&str> = words.chain(more.iter().copied()).collect();
        let dir = self.dir.parent().context("it is in another one")?;
        Daemon::start_recorded(dir, self.name, &self.image(), &words, tracer)
            .with_context(|| format!("the start of {}", self.name))
    }

    fn clear(&self) -> Result<()> {
        forget_memory(&self.dir);
        fs::remove_dir_all(&self.dir)?;
        Ok(fs::create_dir(&self.dir)?)
    }
}

/// Whether a side accepts writes: something is written that is there already.
fn accepts_writes(daemon: &Daemon) -> Result<bool> {
    let mut client = Client::connect(&daemon.socket)?;
    let data = client.read(0, PROBE_BYTES)?;
    let write = Request::Write {
        offset: 0,
        data,
        fua: false,
    };
    client.send(&[write])?;
    match client.receive()?.errno {
        0 => Ok(true),
        REFUSED => Ok(false),
        errno => bail!("a write failed with {errno}: {:?}", daemon.status()),
    }
}

fn state(daemon: &Daemon) -> Result<String> {
    let status = daemon.status()?;
    Ok(status["state"].as_str().unwrap_or_default().to_owned())
}

/// As if a file of these bytes had been there for ever.
fn there_before(root: &Path, image: &Path) -> Result<Vec<Call>> {
    let path = image.to_path_buf();
    let changes = [
        Change::Open {
            path: path.clone(),
            truncate: false,
        },
        Change::Write {
            path: path.clone(),
            offset: Some(0),
            data: fs::read(image)?,
        },
        Change::Sync { path, all: true },
        Change::Sync {
            path: root.to_path_buf(),
            all: true,
        },
    ];
    let call = |(n, change)| Call {
        begun_ns: n,
        ended_ns: Some(n),
        change,
    };
    Ok((1..).zip(changes).map(call).collect())
}

impl<'a> Session<'a> {
    fn new(sweep: &'a Sweep<'a>, dir: &Path, traces: &Path, seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        let side = |name, arguments| -> Result<Side> {
            let dir = dir.join(name);
            fs::create_dir(&dir)?;
            Ok(Side {
                name,
                dir,
                arguments,
                before: Vec::new(),
                recording: None,
            })
        };
        // A plain image; or one that has not arrived itself, with a journal of its own.
        let from = &sweep.source;
        let arriving = ["--from", from, "--handoff", "now", "--no-background"];
        let plain = random.below(3) > 0;
        let arguments = match plain {
            true => Vec::new(),
            false => arriving.map(str::to_owned).to_vec(),
        };
        let mut source = side("a", arguments)?;
        if plain {
            make_original(&source.image(), DISK_SECTORS)?;
            source.before = there_before(&source.dir, &source.image())?;
        }
        let socket = dir.join("a.nbd");
        let from = format!("nbd+unix:///?socket={}", socket.display());
        let destination = side("b", vec!["--from".to_owned(), from])?;
        Ok(Self {
            sweep,
            dir: dir.to_path_buf(),
            traces: traces.to_path_buf(),
            random,
            disk: Arc::new(Expected::new(DISK_SECTORS, true)),
            sides: [source, destination],
        })
    }

    fn play(&mut self, seed: u64, stop: &dyn Fn() -> bool) -> Result<()> {
        let (began_ns, ended_ns) = self.record()?;
        let media = [self.medium(0, ended_ns)?, self.medium(1, ended_ns)?];
        self.sweep.counts.recording();
        // Images keep their inodes, which the states know.
        for side in &self.sides {
            fs::rename(side.image(), self.kept(side))?;
        }
        for number in 0..CUTS {
            if stop() {
                break;
            }
            let mut random = Random::new(mix(seed ^ mix(number)));
            let at_ns = instant(&media, began_ns, &mut random)?;
            let whose = [Whose::Source, Whose::Destination, Whose::Both];
            let whose = whose[usize::try_from(random.below(3))?];
            let cuts = [Whose::Destination, Whose::Source].map(|other| Cut {
                at_ns,
                seed: random.next(),
                spares: whose == other,
            });
            self.replay(&media, cuts, &mut random)
                .with_context(|| format!("{whose:?} cut: {cuts:?}"))?;
            let fs = self.sweep.file_system.name;
            self.sweep.counts.restart(Kind::MoveCut, fs);
        }
        for side in &self.sides {
            forget_memory(&side.dir);
        }
        Ok(())
    }

    fn kept(&self, side: &Side) -> PathBuf {
        self.dir.join(format!("{}.kept", side.name))
    }

    /// Starts a side, recorded.
    fn start(&mut self, side: usize) -> Result<Daemon> {
        let trace = self.traces.join(format!("{}.trace", self.sides[side].name));
        let tracer = record::tracer(&trace)?;
        let daemon = self.sides[side].start(&[], &tracer)?;
        self.sides[side].recording = Some((trace, daemon.pid()));
        Ok(daemon)
    }

    /// A move, from before the destination comes until it is complete. Tells from when on, and
    /// until when.
    fn record(&mut self) -> Result<(u64, u64)> {
        let a = self.start(0)?;
        self.work(&a)?;
        let began_ns = now_ns();
        let b = self.start(1)?;
        b.wait_status("prepared", |s| s["prepared"] == true)?;
        self.work(&a)?;
        // The handoff is a flush of all that was answered before.
        let asked_ns = now_ns();
        let content = Content::Generation(self.random.next() | 1 << 63);
        let data = content.bytes(FIRST_WRITE).to_vec();
        self.disk.ask(FIRST_WRITE, content, false);
        Client::connect(&b.socket)?.ask(Request::Write {
            offset: FIRST_WRITE * SECTOR as u64,
            data,
            fua: false,
        })?;
        self.disk.answer(FIRST_WRITE);
        self.disk.flushed(asked_ns);
        self.work(&b)?;
        b.wait_status("complete", |s| s["state"] == "local")?;
        self.work(&b)?;
        b.kill()?;
        a.kill()?;
        Ok((began_ns, now_ns()))
    }

    fn work(&mut self, daemon: &Daemon) -> Result<()> {
        let wanted = Arc::new(Tally::default());
        let seed = self.random.next();
        let load = Load::start(&daemon.socket, &self.disk, 8, Work::All, seed, &wanted);
        let start = Instant::now();
        while wanted.answered.load(Ordering::Relaxed) < REQUESTS {
            ensure!(start.elapsed() < PATIENCE, "the clients are stuck");
            std::thread::sleep(POLL);
        }
        load.finish()?;
        let answered = wanted.answered.load(Ordering::Relaxed);
        let all = &self.sweep.tally.answered;
        all.fetch_add(answered, Ordering::Relaxed);
        Ok(())
    }

    fn medium(&self, side: usize, ended_ns: u64) -> Result<Medium> {
        let side = &self.sides[side];
        let (trace, pid) = side.recording.as_ref().context("it was recorded")?;
        record::wait_for_end(trace, *pid)?;
        let mut calls = side.before.clone();
        calls.extend(record::read(trace, &side.dir)?);
        Medium::new(&side.dir, &calls, ended_ns)
    }

    fn replay(&self, media: &[Medium; 2], cuts: [Cut; 2], random: &mut Random) -> Result<()> {
        for ((side, medium), cut) in self.sides.iter().zip(media).zip(cuts) {
            side.clear()?;
            medium.lay_out(cut, &side.dir, &self.kept(side))?;
            forget_memory(&side.dir);
        }
        let [a, b] = &self.sides;
        let a = a.start(&[], &[])?;
        let b = b.start(&["--no-background"], &[])?;
        let writer = self.writer(&a, &b, random)?;
        check::after_cut(&writer.socket, &self.disk, cuts[0].at_ns)?;
        if std::ptr::eq(writer, &a) && state(&b)? == "standby" {
            // The move can still be made, with the same outcome.
            ensure!(accepts_writes(&b)?, "no handoff: {:?}", b.status());
            ensure!(!accepts_writes(&a)?, "both: {:?}", a.status());
            check::after_cut(&b.socket, &self.disk, cuts[0].at_ns)?;
        }
        a.kill()?;
        b.kill()
    }

    /// Who accepts writes; if nobody does, once one of the ways on has been taken that the status
    /// names.
    fn writer<'d>(&self, a: &'d Daemon, b: &'d Daemon, random: &mut Random) -> Result<&'d Daemon> {
        let here = accepts_writes(a)?;
        if state(b)? != "standby" {
            let there = accepts_writes(b)?;
            self.sweep.counts.writer("destination");
            ensure!(
                there && !here,
                "a accepts {here}, b {there}: {:?}",
                b.status()
            );
            return Ok(b);
        }
        if here {
            self.sweep.counts.writer("source");
            return Ok(a);
        }
        self.sweep.counts.writer("nobody");
        let notes = b.status()?["notes"].to_string();
        for way in [
            "`hikkoshi handoff`",
            "the VM's first write",
            "`hikkoshi abort`",
        ] {
            ensure!(notes.contains(way), "no way on is named: {notes}");
        }
        match random.below(3) {
            0 => {
                b.command(&["abort"])?;
                ensure!(
                    accepts_writes(a)?,
                    "given up, and refused: {:?}",
                    a.status()
                );
                ensure!(
                    !accepts_writes(b)?,
                    "given up, and accepted: {:?}",
                    b.status()
                );
                Ok(a)
            }
            1 => {
                b.command(&["handoff"])?;
                ensure!(
                    accepts_writes(b)?,
                    "taken over, and refused: {:?}",
                    b.status()
                );
                ensure!(!accepts_writes(a)?, "both: {:?}", a.status());
                Ok(b)
            }
            _ => {
                ensure!(
                    accepts_writes(b)?,
                    "a first write is refused: {:?}",
                    b.status()
                );
                ensure!(!accepts_writes(a)?, "both: {:?}", a.status());
                Ok(b)
            }
        }
    }
}

/// An instant within or between calls of either side, from `began_ns` on; mostly at calls on the
/// states.
fn instant(media: &[Medium; 2], began_ns: u64, random: &mut Random) -> Result<u64> {
    let of_state = random.below(4) > 0;
    let all: Vec<_> = media
        .iter()
        .flat_map(|medium| medium.instants())
        .filter(|(begun, _, state)| *begun >= began_ns && (*state || !of_state))
        .collect();
    ensure!(!all.is_empty(), "an empty recording");
    let (begun, ended, _) = *all[usize::try_from(random.below(all.len() as u64))?];
    Ok(match random.below(4) {
        0 => ended + 1,
        1 => begun.saturating_sub(1),
        _ => begun + random.below(ended.saturating_sub(begun) + 1),
    })
}
