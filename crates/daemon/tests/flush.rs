//! What was written at the old site is durable there before a flush at the new one is answered: two
//! daemons, over frames and over plain NBD. That the old one's sync is what is waited for, and what
//! becomes of a flush when it fails, is in `testkit/tests/flushes.rs`, with real processes.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
mod site;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use guest::Guest;
use hikkoshi_daemon::config::{HandoffPolicy, SourceConfig, Transport};
use hikkoshi_daemon::status::LifeState;
use site::{On, Site, Wanted, noise};

const DISK: u64 = 1 << 20;

/// Nothing depends on how long something takes; this only ends a test that hangs.
const LONG: Duration = Duration::from_secs(60);

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what}: not within {LONG:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn old_site(dir: &Path) -> Site {
    Site::with(dir, "old", &noise(DISK), On::Unix)
}

/// A destination that stands by.
fn new_site(dir: &Path, old: &Site, transport: Transport, handoff: HandoffPolicy) -> Site {
    let wanted = Wanted {
        transport,
        source: Some(SourceConfig {
            handoff,
            ..SourceConfig::new(old.uri())
        }),
        ..Wanted::plain(On::Unix)
    };
    Site::start(dir, "new", wanted)
}

fn flushes(site: &Site) -> u64 {
    site.status().counters.flushes
}

/// The VM wrote at the old site, where its hypervisor did not flush, and flushes at the new one.
#[test]
fn a_flush_at_a_standby_is_one_at_the_source_and_no_handoff() {
    for transport in [Transport::Auto, Transport::Nbd] {
        for handoff in [HandoffPolicy::FirstWrite, HandoffPolicy::Command] {
            let dir = tempfile::tempdir().unwrap();
            let old = old_site(dir.path());
            let new = new_site(dir.path(), &old, transport, handoff);
            let mut there = Guest::connect(&old.address());
            there.write(4096, &[7; 4096]);
            assert_eq!(flushes(&old), 0);

            let mut here = Guest::connect(&new.address());
            here.flush();
            assert_eq!(flushes(&old), 1, "{transport:?}");
            assert_eq!(new.status().state, LifeState::Standby);
            assert_ne!(old.status().state, LifeState::Departed);
            // The VM there was not disturbed.
            there.write(8192, &[8; 4096]);
            here.flush();
            assert_eq!(flushes(&old), 2, "{transport:?}");
            assert!(here.read(8192, 4096) == [8; 4096]);
            new.stop();
            old.stop();
        }
    }
}

/// A source without a fence is asked once more after the handoff, and not for every flush; one of
/// ours has synced behind its fence.
#[test]
fn after_the_handoff_a_flush_asks_the_source_once_at_most() {
    for (transport, most) in [(Transport::Auto, 0), (Transport::Nbd, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let old = old_site(dir.path());
        let wanted = Wanted {
            transport,
            source: Some(SourceConfig {
                // The move is not over before its flushes.
                background: false,
                ..SourceConfig::new(old.uri())
            }),
            ..Wanted::plain(On::Unix)
        };
        let new = Site::start(dir.path(), "new", wanted);
        let mut guest = Guest::connect(&new.address());
        guest.write_fua(0, &[9; 512]);
        assert_eq!(flushes(&old), most, "{transport:?}");
        assert_eq!(new.status().state, LifeState::Arriving);
        for _ in 0..3 {
            guest.flush();
        }
        assert_eq!(flushes(&old), most, "{transport:?}");
        new.stop();
        old.stop();
    }
}

/// The old site fetches from one before it: what it has not yet is durable only when that one says so.
#[test]
fn a_flush_goes_along_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    let first = old_site(dir.path());
    let second = new_site(dir.path(), &first, Transport::Auto, HandoffPolicy::Command);
    let wanted = Wanted {
        source: Some(SourceConfig::new(second.uri())),
        ..Wanted::plain(On::Unix)
    };
    let third = Site::start(dir.path(), "third", wanted);
    let mut guest = Guest::connect(&third.address());
    guest.flush();
    assert_eq!((flushes(&first), flushes(&second)), (1, 1));
    third.stop();
    second.stop();
    first.stop();
}

/// The source is gone, and with it whatever it had not made durable: nobody may say that it did.
#[test]
fn a_flush_waits_while_the_source_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let old = old_site(dir.path());
    let new = new_site(dir.path(), &old, Transport::Auto, HandoffPolicy::Command);
    old.stop();
    wait_until("the source is missed", || {
        new.status().source_connected == Some(false)
    });
    let address = new.address();
    let flushing = thread::spawn(move || Guest::connect(&address).try_flush());
    wait_until("the flush has come", || flushes(&new) == 1);
    wait_until("it is told that a flush waits", || {
        new.status().notes.iter().any(|note| note.contains("flush"))
    });
    assert!(!flushing.is_finished());
    let old = Site::start(dir.path(), "old", Wanted::plain(On::Unix));
    assert!(flushing.join().unwrap(), "the flush failed");
    assert!(flushes(&old) >= 1);
    new.stop();
    old.stop();
}
