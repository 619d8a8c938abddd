//! A flush at the new site before the handoff: the old site's sync is what it waits for, and that
//! one's failure is its own.
//!
//! `docs/reliability.md` has a row for each of these tests.

#![allow(clippy::unwrap_used)]

use hikkoshi_testkit::client::Answer;
use hikkoshi_testkit::faults::{Injection, content};
use hikkoshi_testkit::moving::{Guest, Site};
use std::path::Path;
use std::time::{Duration, Instant};

const SIZE: u64 = 4 << 20;

/// How the two talk: as two of ours, and as with any NBD server.
const WAYS: [&str; 2] = ["auto", "nbd"];

/// A, at which a guest has worked, and B, which stands by and copies nothing.
fn sites(dir: &Path, way: &str) -> (Guest, Site, Site) {
    let mut guest = Guest::new(SIZE, 1);
    let mut a = Site::new(dir, "a", &[], false);
    guest.make_image(a.image()).unwrap();
    a.start().unwrap();
    guest.work(&mut a.client().unwrap(), 20).unwrap();
    let arguments = ["--transport", way, "--no-background"];
    let mut b = Site::moving(dir, "b", &a, &arguments, false);
    b.start().unwrap();
    (guest, a, b)
}

/// The guest wrote at A, moved, and flushed at B: that was answered although a power cut at A would
/// have taken what it wrote there.
#[test]
fn a_flush_at_a_standby_waits_for_the_sync_at_the_source() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let (guest, a, b) = sites(dir.path(), way);
        a.client().unwrap().write(0, &content(9, 0, 4096)).unwrap();
        let held = Duration::from_secs(1);
        let rule = format!("fdatasync,fsync:delay_enter={}", held.as_micros());
        let log = dir.path().join("strace.log");
        let slow = Injection::start(a.daemon().pid(), &rule, None, &log).unwrap();
        let mut client = b.client().unwrap();
        let start = Instant::now();
        client.flush().unwrap();
        assert!(start.elapsed() >= held, "{way}: nothing was synced at A");
        slow.end().unwrap();
        assert_eq!(b.state().unwrap(), "standby", "{}", b.story());
        drop((guest, a, b));
    }
}

#[test]
fn a_sync_that_fails_at_the_source_fails_the_flush_at_a_standby() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let (_, a, b) = sites(dir.path(), way);
        let log = dir.path().join("strace.log");
        let rule = "fdatasync,fsync:error=EIO:when=1";
        let failing = Injection::start(a.daemon().pid(), rule, None, &log).unwrap();
        let mut client = b.client().unwrap();
        assert_eq!(client.try_flush().unwrap(), Answer::EIO, "{way}");
        failing.end().unwrap();
        // Nothing is known there from then on of what is durable.
        assert_eq!(client.try_flush().unwrap(), Answer::EIO, "{way}");
        b.daemon().wait_event("source-error").unwrap();
        let status = b.daemon().status().unwrap();
        assert_eq!(status["state"], "standby", "{status}");
        assert_eq!(status["poisoned"], false, "{status}");
    }
}

/// A source without a fence fails when it is asked once more after the handoff: the guest is not told
/// that all is durable before all is at B.
#[test]
fn a_sync_that_fails_at_the_source_fails_flushes_until_all_is_here() {
    let dir = tempfile::tempdir().unwrap();
    let (_, a, b) = sites(dir.path(), "nbd");
    let log = dir.path().join("strace.log");
    let rule = "fdatasync,fsync:error=EIO:when=1";
    let failing = Injection::start(a.daemon().pid(), rule, None, &log).unwrap();
    let mut client = b.client().unwrap();
    client.write(0, &content(9, 0, 4096)).unwrap();
    b.wait_state("arriving").unwrap();
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    failing.end().unwrap();
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    // Everything is read at B, and so comes to it.
    let chunk = 1 << 20;
    for at in (0..SIZE).step_by(chunk) {
        client.read(at, u32::try_from(chunk).unwrap()).unwrap();
    }
    b.wait_state("local").unwrap();
    client.flush().unwrap();
}
