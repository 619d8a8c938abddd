//! The source goes away, for a while or for ever, comes back as something else, fails, or falls
//! silent: what the guest sees, what the operator sees, and what is on the disk at the end.
//!
//! `docs/reliability.md` has a row for each of these tests.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::client::{Answer, Client};
use hikkoshi_testkit::daemon::{Daemon, LONG};
use hikkoshi_testkit::faults::{content, make_image};
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::process::Process;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const BLOCK: u32 = 4096;
/// What the source's disk is called in [`content`], and what is written here.
const OLD: u8 = 1;
const NEW: u8 = 2;

/// A source, a destination that has fetched a little and copies nothing by itself, and a client.
struct Move {
    dir: tempfile::TempDir,
    source: Option<Daemon>,
    here: Daemon,
    client: Client,
}

/// Where blocks are fetched: every quarter of a MiB once, in an order in which no read-ahead sees a
/// stream (triangular numbers), so that nothing else comes.
fn scattered() -> impl Iterator<Item = u64> {
    (0..16).map(|n| n * (n + 1) / 2 % 16 * MIB / 4)
}

impl Move {
    fn begin(extra: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        make_image(&dir.path().join("old.img"), OLD, SIZE)?;
        let source = serve_old(dir.path(), &dir.path().join("old.img"), &[])?;
        let here = arrive(dir.path(), &source.uri(), extra)?;
        let mut client = here.client()?;
        // In pieces, so that each leaves a witness.
        for at in scattered() {
            ensure!(client.read(at, BLOCK)? == content(OLD, at, BLOCK.into()));
        }
        Ok(Self {
            dir,
            source: Some(source),
            here,
            client,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The old site dies without a word.
    fn lose_source(&mut self) -> Result<()> {
        self.source.take().context("a source")?.kill()?;
        self.here.wait_event("source-lost")
    }

    /// Something is served at the old address.
    fn serve_there(&mut self, image: &Path, extra: &[&str]) -> Result<()> {
        self.source = Some(serve_old(self.dir.path(), image, extra)?);
        Ok(())
    }

    /// What is here is read, written and flushed, while something else waits.
    fn use_what_is_here(&mut self) -> Result<()> {
        for at in scattered() {
            let data = self.client.read(at, BLOCK)?;
            ensure!(
                data == content(OLD, at, BLOCK.into()) || data == content(NEW, at, BLOCK.into())
            );
            self.client.write(at, &content(NEW, at, BLOCK.into()))?;
            // Blocks that are not here, and parts of them, are written all the same.
            self.client
                .write(at + 8192, &content(NEW, at + 8192, 4096))?;
            self.client
                .write(at + 16896, &content(NEW, at + 16896, 1024))?;
            self.client.flush()?;
        }
        Ok(())
    }

    /// The rest comes, and every byte is what it should be.
    fn finish(mut self) -> Result<()> {
        self.use_what_is_here()?;
        self.here.stop()?;
        let uri = self.source.as_ref().context("a source")?.uri();
        let image = self.dir.path().join("new.img");
        // The background copy this time.
        let here = Daemon::start(self.dir.path(), "new", &image, &["--from", &uri])?;
        here.command(&["wait", "--timeout", "100s"])?;
        here.stop()?;
        let mut right = content(OLD, 0, SIZE);
        for n in 0..16 {
            let at = n * MIB / 4;
            for (at, len) in [(at, 4096), (at + 8192, 4096), (at + 16896, 1024)] {
                let start = usize::try_from(at)?;
                let data = content(NEW, at, len);
                right[start..start + data.len()].copy_from_slice(&data);
            }
        }
        ensure!(
            std::fs::read(&image)? == right,
            "the disk is not what was written"
        );
        Ok(())
    }
}

fn serve_old(dir: &Path, image: &Path, extra: &[&str]) -> Result<Daemon> {
    Daemon::start(dir, "old", image, extra)
}

fn arrive(dir: &Path, uri: &str, extra: &[&str]) -> Result<Daemon> {
    let mut arguments = vec!["--from", uri, "--handoff", "now", "--no-background"];
    arguments.extend(extra);
    Daemon::start(dir, "new", &dir.join("new.img"), &arguments)
}

/// Somewhere that nobody has read yet.
const ABSENT: u64 = 10 * MIB;

fn is(status: &serde_json::Value, field: &str, value: impl Into<serde_json::Value>) -> bool {
    status[field] == value.into()
}

#[test]
fn gone_for_60_seconds() {
    let mut moving = Move::begin(&[]).unwrap();
    moving.lose_source().unwrap();
    let began = Instant::now();
    let mut waiting = moving.here.client().unwrap();
    let cookie = waiting.ask(ABSENT, BLOCK).unwrap();
    while began.elapsed() < Duration::from_secs(60) {
        moving.use_what_is_here().unwrap();
        std::thread::sleep(Duration::from_secs(5));
    }
    assert!(waiting.is_silent_for(Duration::from_millis(50)).unwrap());
    let status = moving.here.status().unwrap();
    assert!(is(&status, "source_connected", false), "{status}");
    assert!(is(&status, "reads_waiting", 1), "{status}");
    assert!(status["source_down_s"].as_u64().unwrap() >= 59, "{status}");
    assert!(status["notes"].to_string().contains("unreachable"));
    assert!(moving.here.metric("source_down_seconds").unwrap() >= 59);
    assert_eq!(moving.here.metric("source_connected").unwrap(), 0);
    assert_eq!(moving.here.metric("reads_waiting").unwrap(), 1);

    let old = moving.path("old.img");
    moving.serve_there(&old, &[]).unwrap();
    let (answer, data) = waiting.read_answer(cookie, BLOCK).unwrap();
    assert_eq!(answer, Answer::OK);
    assert!(data == content(OLD, ABSENT, BLOCK.into()));
    let status = moving.here.status().unwrap();
    assert!(is(&status, "source_connected", true), "{status}");
    assert!(status["source_down_s"].is_null() && is(&status, "reads_waiting", 0));
    assert_eq!(
        moving.here.event_kinds().unwrap(),
        [
            "opened",
            "source-back",
            "handoff",
            "source-lost",
            "source-back"
        ],
    );
    assert_eq!(moving.here.metric("source_losses_total").unwrap(), 1);
    moving.finish().unwrap();
}

#[test]
fn gone_for_ever() {
    let mut moving = Move::begin(&["--on-source-loss", "error:2"]).unwrap();
    moving.use_what_is_here().unwrap();
    moving.lose_source().unwrap();
    let began = Instant::now();
    let (answer, _) = moving.client.try_read(ABSENT, BLOCK).unwrap();
    assert_eq!(answer, Answer::EIO);
    assert!(
        began.elapsed() >= Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    moving.here.wait_event("reads-failed").unwrap();
    assert_eq!(moving.here.metric("reads_failed_total").unwrap(), 1);
    moving.use_what_is_here().unwrap();
    // A restart without the source: what is here is served, and was kept.
    moving.here.stop().unwrap();
    let here = arrive(
        moving.dir.path(),
        "nbd+unix:///?socket=/nowhere",
        &["--source-moved"],
    );
    let here = here.unwrap();
    let mut client = here.client().unwrap();
    assert!(client.read(0, BLOCK).unwrap() == content(NEW, 0, BLOCK.into()));
    assert!(client.read(MIB / 4 + 16896, 1024).unwrap() == content(NEW, MIB / 4 + 16896, 1024));
    // Its policy is to wait now.
    let cookie = client.ask(ABSENT, BLOCK).unwrap();
    assert!(client.is_silent_for(Duration::from_secs(3)).unwrap());
    // An orderly end hangs up on it: a client that connects again asks again.
    here.stop().unwrap();
    assert!(client.read_answer(cookie, BLOCK).is_err());
}

#[test]
fn back_with_another_image_and_then_the_right_one() {
    let mut moving = Move::begin(&[]).unwrap();
    let other = moving.path("other.img");
    make_image(&other, 77, SIZE).unwrap();
    moving.lose_source().unwrap();
    let mut waiting = moving.here.client().unwrap();
    let cookie = waiting.ask(ABSENT, BLOCK).unwrap();
    moving.serve_there(&other, &[]).unwrap();
    moving.here.wait_event("source-refused").unwrap();
    moving.use_what_is_here().unwrap();
    assert!(waiting.is_silent_for(Duration::from_secs(3)).unwrap());
    let status = moving.here.status().unwrap();
    assert!(is(&status, "source_connected", false), "{status}");
    let notes = status["notes"].to_string();
    assert!(
        notes.contains("another disk") && notes.contains("serve the right disk"),
        "{notes}"
    );
    assert_eq!(moving.here.metric("source_refusals_total").unwrap(), 1);
    moving.source.take().unwrap().kill().unwrap();

    let old = moving.path("old.img");
    moving.serve_there(&old, &[]).unwrap();
    let (answer, data) = waiting.read_answer(cookie, BLOCK).unwrap();
    assert_eq!(answer, Answer::OK);
    assert!(
        data == content(OLD, ABSENT, BLOCK.into()),
        "of the other disk"
    );
    moving.finish().unwrap();
}

/// At a restart of the daemon nothing in memory knows the disk any more.
#[test]
fn another_image_after_a_restart() {
    let mut moving = Move::begin(&[]).unwrap();
    moving.use_what_is_here().unwrap();
    let other = moving.path("other.img");
    make_image(&other, 77, SIZE).unwrap();
    moving.lose_source().unwrap();
    moving.serve_there(&other, &[]).unwrap();
    let Move {
        dir, source, here, ..
    } = moving;
    let source = source.unwrap();
    here.stop().unwrap();
    let here = arrive(dir.path(), &source.uri(), &[]).unwrap();
    here.wait_event("source-refused").unwrap();
    let mut client = here.client().unwrap();
    let cookie = client.ask(ABSENT, BLOCK).unwrap();
    assert!(client.is_silent_for(Duration::from_secs(2)).unwrap());
    source.kill().unwrap();
    let _source = serve_old(dir.path(), &dir.path().join("old.img"), &[]).unwrap();
    let (answer, data) = client.read_answer(cookie, BLOCK).unwrap();
    assert_eq!(answer, Answer::OK);
    assert!(data == content(OLD, ABSENT, BLOCK.into()));
    here.stop().unwrap();
}

#[test]
fn back_smaller() {
    let mut moving = Move::begin(&[]).unwrap();
    let smaller = moving.path("smaller.img");
    make_image(&smaller, OLD, SIZE - MIB).unwrap();
    moving.lose_source().unwrap();
    let mut waiting = moving.here.client().unwrap();
    let cookie = waiting.ask(ABSENT, BLOCK).unwrap();
    moving.serve_there(&smaller, &[]).unwrap();
    moving.here.wait_event("source-refused").unwrap();
    let notes = moving.here.status().unwrap()["notes"].to_string();
    assert!(notes.contains("another disk"), "{notes}");
    moving.use_what_is_here().unwrap();
    assert!(waiting.is_silent_for(Duration::from_secs(1)).unwrap());
    // A restart with it serves what is here.
    let uri = moving.source.as_ref().unwrap().uri();
    moving.here.stop().unwrap();
    let _ = waiting.read_answer(cookie, BLOCK);
    let here = arrive(moving.dir.path(), &uri, &[]).unwrap();
    here.wait_event("source-refused").unwrap();
    let mut client = here.client().unwrap();
    assert!(client.read(0, BLOCK).unwrap() == content(NEW, 0, BLOCK.into()));
    here.stop().unwrap();
}

#[test]
fn back_read_only() {
    let mut moving = Move::begin(&[]).unwrap();
    moving.lose_source().unwrap();
    let old = moving.path("old.img");
    moving.serve_there(&old, &["--read-only"]).unwrap();
    // Nothing is ever written there, so nothing is missed.
    assert!(moving.client.read(ABSENT, BLOCK).unwrap() == content(OLD, ABSENT, BLOCK.into()));
    moving.finish().unwrap();
}

/// nbdkit with a filter whose reads fail while a file is there.
fn failing_source(dir: &Path) -> Result<(Process, String)> {
    let socket = dir.join("failing.nbd");
    let image = dir.join("old.img").display().to_string();
    let switch = format!("error-file={}", dir.join("fail").display());
    let arguments = [
        "--foreground",
        "--unix",
        &socket.display().to_string(),
        "--filter=error",
        "file",
        &image,
        "error-pread=EIO",
        "error-pread-rate=100%",
        &switch,
    ];
    let mut source = Process::start(None, "nbdkit", arguments, &dir.join("failing.log"))?;
    source.wait_until("socket", LONG, |_| socket.exists())?;
    Ok((source, format!("nbd+unix:///?socket={}", socket.display())))
}

/// EIO from the source's disk.
#[test]
fn its_disk_fails() {
    let dir = tempfile::tempdir().unwrap();
    make_image(&dir.path().join("old.img"), OLD, SIZE).unwrap();
    let (source, uri) = failing_source(dir.path()).unwrap();
    let here = arrive(dir.path(), &uri, &[]).unwrap();
    let mut client = here.client().unwrap();
    client.read(0, BLOCK).unwrap();
    std::fs::write(dir.path().join("fail"), "").unwrap();
    let (answer, _) = client.try_read(ABSENT, BLOCK).unwrap();
    assert_eq!(answer, Answer::EIO);
    here.wait_event("source-error").unwrap();
    // The connection stands, and what is here is served.
    assert!(is(&here.status().unwrap(), "source_connected", true));
    assert!(client.read(0, BLOCK).unwrap() == content(OLD, 0, BLOCK.into()));
    assert_eq!(
        client
            .try_write(ABSENT, &content(NEW, ABSENT, 4096))
            .unwrap(),
        Answer::OK
    );
    std::fs::remove_file(dir.path().join("fail")).unwrap();
    let next = ABSENT + 4096;
    assert!(client.read(next, BLOCK).unwrap() == content(OLD, next, BLOCK.into()));
    assert!(client.read(ABSENT, BLOCK).unwrap() == content(NEW, ABSENT, BLOCK.into()));
    here.stop().unwrap();
    drop(source);
}

/// Two sites and a link between them that can be cut without anybody being told.
struct Sites {
    old: Namespace,
    new: Namespace,
    link: Link,
    dir: tempfile::TempDir,
}

impl Sites {
    fn new() -> Result<Self> {
        let (old, new) = (Namespace::new("old")?, Namespace::new("new")?);
        let link = Link::new(&old, &new, LinkSpec::wan(4, 400))?;
        let dir = tempfile::tempdir()?;
        make_image(&dir.path().join("old.img"), OLD, SIZE)?;
        Ok(Self {
            old,
            new,
            link,
            dir,
        })
    }

    fn serve_old(&self) -> Result<Daemon> {
        let listen = format!("tcp://{}:10809", self.link.address_a);
        let image = self.dir.path().join("old.img");
        let extra = ["--listen", &listen];
        Daemon::start_in(Some(&self.old), self.dir.path(), "old", &image, &extra)
    }

    fn arrive(&self, extra: &[&str]) -> Result<Daemon> {
        let uri = format!("nbd://{}/", self.link.address_a);
        let mut arguments = vec!["--from", &uri, "--handoff", "now"];
        arguments.extend(extra);
        let image = self.dir.path().join("new.img");
        Daemon::start_in(Some(&self.new), self.dir.path(), "new", &image, &arguments)
    }
}

/// Packets are dropped: no reset, no answer. The connection seems to stand for a while.
#[test]
fn the_link_falls_silent_and_reads_wait() {
    let sites = Sites::new().unwrap();
    let _source = sites.serve_old().unwrap();
    // The background is at work when it happens, but slow enough not to be done before.
    let here = sites.arrive(&["--max-rate", "256kB/s"]).unwrap();
    let mut client = here.client().unwrap();
    client.read(0, BLOCK).unwrap();
    sites.link.cut();
    let mut waiting = here.client().unwrap();
    let at = SIZE - 4096;
    let cookie = waiting.ask(at, BLOCK).unwrap();
    let (began, cpu_s) = (Instant::now(), here.cpu_s().unwrap());
    client.write(MIB, &content(NEW, MIB, 4096)).unwrap();
    client.flush().unwrap();
    here.wait_event("source-lost").unwrap();
    assert!(client.read(0, BLOCK).unwrap() == content(OLD, 0, BLOCK.into()));
    // Nobody turns round in circles meanwhile.
    std::thread::sleep(Duration::from_secs(3));
    let share = (here.cpu_s().unwrap() - cpu_s) / began.elapsed().as_secs_f64();
    assert!(
        share < 0.3,
        "{share} of a processor while nothing can be done"
    );
    assert!(waiting.is_silent_for(Duration::from_millis(10)).unwrap());
    let wire_bytes = here.status().unwrap()["wire_bytes"].clone();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(here.status().unwrap()["wire_bytes"], wire_bytes);

    sites.link.restore();
    let (answer, data) = waiting.read_answer(cookie, BLOCK).unwrap();
    assert_eq!(answer, Answer::OK);
    assert!(data == content(OLD, at, BLOCK.into()));
    here.command(&["limit", "none"]).unwrap();
    here.command(&["wait", "--timeout", "100s"]).unwrap();
    here.stop().unwrap();
    let mut right = content(OLD, 0, SIZE);
    let start = usize::try_from(MIB).unwrap();
    right[start..start + 4096].copy_from_slice(&content(NEW, MIB, 4096));
    assert!(std::fs::read(sites.dir.path().join("new.img")).unwrap() == right);
}

#[test]
fn the_link_falls_silent_and_reads_fail_by_policy() {
    let sites = Sites::new().unwrap();
    let _source = sites.serve_old().unwrap();
    let here = sites
        .arrive(&["--no-background", "--on-source-loss", "error:5"])
        .unwrap();
    let mut client = here.client().unwrap();
    client.read(0, BLOCK).unwrap();
    sites.link.cut();
    let began = Instant::now();
    let (answer, _) = client.try_read(ABSENT, BLOCK).unwrap();
    assert_eq!(answer, Answer::EIO);
    assert!(
        began.elapsed() >= Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    assert!(client.read(0, BLOCK).unwrap() == content(OLD, 0, BLOCK.into()));
    here.wait_event("reads-failed").unwrap();
    let kinds = here.event_kinds().unwrap();
    assert!(
        kinds.ends_with(&["source-lost".into(), "reads-failed".into()]),
        "{kinds:?}"
    );
    sites.link.restore();
    here.wait_status("connected", |s| is(s, "source_connected", true))
        .unwrap();
    assert!(client.read(ABSENT, BLOCK).unwrap() == content(OLD, ABSENT, BLOCK.into()));
    here.stop().unwrap();
}
