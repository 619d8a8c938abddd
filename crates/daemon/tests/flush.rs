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
use hikkoshi_daemon::events::{Event, EventKind};
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

/// The old site, on a machine that runs under this boot.
fn old_site_under(dir: &Path, boot: u8) -> Site {
    let wanted = Wanted {
        boot: Some([boot; 16]),
        ..Wanted::plain(On::Unix)
    };
    Site::start(dir, "old", wanted)
}

fn is_connected(site: &Site) -> bool {
    site.status().source_connected == Some(true)
}

/// Ends the old site, and starts it again under this boot.
fn start_anew(dir: &Path, old: Site, boot: u8, new: &Site) -> Site {
    old.stop();
    wait_until("the source is missed", || !is_connected(new));
    let old = old_site_under(dir, boot);
    wait_until("the source is back", || is_connected(new));
    old
}

fn says(site: &Site, what: &str) -> bool {
    site.status().notes.iter().any(|note| note.contains(what))
}

fn has_told_of_it(site: &Site) -> bool {
    let events = site.export().events(0);
    let told = |event: &Event| event.kind == EventKind::SourceRestarted;
    events.iter().any(told)
}

/// The VM wrote at the old site, where nobody flushed, and was moved. The power went there and came
/// back, and its flush was answered: all that the old site had was durable. What it had lost was not.
#[test]
fn a_source_that_lost_its_power_fails_the_flushes_of_whoever_was_connected() {
    for handoff in [HandoffPolicy::FirstWrite, HandoffPolicy::Command] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("old"), noise(DISK)).unwrap();
        let old = old_site_under(dir.path(), 1);
        let new = new_site(dir.path(), &old, Transport::Auto, handoff);
        let mut moved = Guest::connect(&new.address());
        moved.flush();

        let old = start_anew(dir.path(), old, 2, &new);
        assert!(!moved.try_flush(), "what was lost was called durable");
        // It is not over with the handoff, neither for flushes nor for writes that are to be durable.
        new.export().handoff().unwrap();
        assert!(!moved.try_flush());
        assert!(!moved.try_write_fua(0, &[1; 4096]));
        assert!(moved.try_write(0, &[2; 4096]));
        assert!(!moved.try_flush());
        wait_until("it is told", || has_told_of_it(&new));
        assert!(says(&new, "restart it"));

        // Whoever connects later has lost nothing.
        let mut later = Guest::connect(&new.address());
        later.write_fua(4096, &[3; 4096]);
        later.flush();
        assert!(!moved.try_flush());
        wait_until("all is here", || new.is_local());
        assert!(!moved.try_flush());
        later.flush();
        drop(moved);
        wait_until("nobody is left", || !says(&new, "restart it"));
        new.stop();
        old.stop();
    }
}

/// Its machine ran on, with all that was written in memory.
#[test]
fn a_source_that_was_only_restarted_fails_no_flush() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("old"), noise(DISK)).unwrap();
    let old = old_site_under(dir.path(), 1);
    let wanted = Wanted {
        source: Some(SourceConfig {
            // The move is not over before the source has lost its power.
            background: false,
            ..SourceConfig::new(old.uri())
        }),
        ..Wanted::plain(On::Unix)
    };
    let new = Site::start(dir.path(), "new", wanted);
    let mut guest = Guest::connect(&new.address());
    guest.flush();
    let old = start_anew(dir.path(), old, 1, &new);
    guest.flush();
    guest.write_fua(0, &[4; 4096]);
    // Behind the handoff its power is of no account.
    let old = start_anew(dir.path(), old, 2, &new);
    guest.flush();
    assert!(!has_told_of_it(&new) && !says(&new, "restart it"));
    new.stop();
    old.stop();
}

/// The flush had been asked for when the power went, and was asked for again when it was back.
#[test]
fn a_flush_that_waits_while_the_power_goes_fails() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("old"), noise(DISK)).unwrap();
    let old = old_site_under(dir.path(), 1);
    let new = new_site(dir.path(), &old, Transport::Auto, HandoffPolicy::Command);
    let mut guest = Guest::connect(&new.address());
    old.stop();
    wait_until("the source is missed", || !is_connected(&new));
    let flushing = thread::spawn(move || guest.try_flush());
    wait_until("the flush has come", || flushes(&new) == 1);
    let old = old_site_under(dir.path(), 2);
    assert!(
        !flushing.join().unwrap(),
        "what was lost was called durable"
    );
    new.stop();
    old.stop();
}

/// Three sites, of which the last two stand by; the third takes the disk by `handoff`.
fn chain(dir: &Path, handoff: HandoffPolicy) -> [Site; 3] {
    std::fs::write(dir.join("old"), noise(DISK)).unwrap();
    let first = old_site_under(dir, 1);
    let second = new_site(dir, &first, Transport::Auto, HandoffPolicy::Command);
    let wanted = Wanted {
        source: Some(SourceConfig {
            handoff,
            ..SourceConfig::new(second.uri())
        }),
        ..Wanted::plain(On::Unix)
    };
    let third = Site::start(dir, "third", wanted);
    [first, second, third]
}

/// The second site stands by as well, and tells the third, whose own source never lost its power.
#[test]
fn power_that_is_lost_is_told_along_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second, third] = chain(dir.path(), HandoffPolicy::Command);
    let mut guest = Guest::connect(&third.address());
    guest.flush();
    // Only the second is asked for the handoff; what it tells the third counts until that is over.
    let first = start_anew(dir.path(), first, 2, &second);
    second.export().handoff().unwrap();
    // Refused until it has attached to what is no standby any more.
    wait_until("the third has the disk", || {
        third.export().handoff().is_ok()
    });
    assert!(!guest.try_flush(), "what was lost was called durable");
    let mut later = Guest::connect(&third.address());
    later.write_fua(0, &[5; 512]);
    later.flush();
    third.stop();
    second.stop();
    first.stop();
}

/// The same, with the flush on its way along all of them before the handoffs.
#[test]
fn a_flush_along_a_chain_fails_where_power_was_lost_at_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second, third] = chain(dir.path(), HandoffPolicy::FirstWrite);
    let mut guest = Guest::connect(&third.address());
    guest.flush();
    first.stop();
    wait_until("the source is missed", || !is_connected(&second));
    let flushing = thread::spawn(move || guest.try_flush());
    wait_until("the flush has come", || flushes(&second) >= 2);
    let first = old_site_under(dir.path(), 2);
    assert!(
        !flushing.join().unwrap(),
        "what was lost was called durable"
    );
    Guest::connect(&third.address()).flush();
    third.stop();
    second.stop();
    first.stop();
}
