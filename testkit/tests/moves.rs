//! Moves between two daemons of ours: the plain course, chains, giving up, releasing.
//!
//! `docs/reliability.md` has a row for each of these tests; those that kill at named points are in
//! `moves_killed.rs`.

#![allow(clippy::unwrap_used)]

use hikkoshi_testkit::client::{Answer, Client};
use hikkoshi_testkit::faults::content;
use hikkoshi_testkit::moving::{Guest, Site};
use rustix::process::Signal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const SECTORS: u64 = SIZE / 512;

/// A guest that has worked at A, which is served.
fn at_home(dir: &Path, seed: u64) -> (Guest, Site) {
    let mut guest = Guest::new(SIZE, seed);
    let mut a = Site::new(dir, "a", &[], false);
    guest.make_image(a.image()).unwrap();
    a.start().unwrap();
    guest.work(&mut a.client().unwrap(), 100).unwrap();
    (guest, a)
}

fn refuses_writes(site: &Site) {
    let mut client = site.client().unwrap();
    let answer = client.try_write(0, &content(9, 0, 4096)).unwrap();
    assert_eq!(answer, Answer::EPERM, "{}", site.story());
}

/// B serves everything without A, and its image is right.
fn is_whole(guest: &Guest, b: &mut Site) {
    b.wait_state("local").unwrap();
    guest.check(&mut b.client().unwrap()).unwrap();
    b.take().unwrap().stop().unwrap();
    guest.check_image(b.image()).unwrap();
}

/// A site that copies from `a` and stands by, everything copied ahead.
fn prepared(dir: &Path, name: &str, a: &Site, arguments: &[&str]) -> Site {
    let mut b = Site::moving(dir, name, a, arguments, false);
    b.start().unwrap();
    b.wait_prepared().unwrap();
    b
}

/// A write that is sent on a thread, for it may have to wait.
fn write_on_a_thread(mut client: Client) -> std::thread::JoinHandle<anyhow::Result<Answer>> {
    std::thread::spawn(move || client.try_write(0, &content(9, 0, 4096)))
}

fn counter(site: &Site, name: &str) -> u64 {
    let status = site.daemon().status().unwrap();
    status["counters"][name].as_u64().unwrap()
}

fn number(site: &Site, name: &str) -> u64 {
    site.daemon().status().unwrap()[name].as_u64().unwrap()
}

/// The guest works all the time; at the switch-over it stops at A and goes on at B.
#[test]
fn a_guest_moves_while_it_works() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut a) = at_home(dir.path(), 1);
    let mut b = Site::moving(dir.path(), "b", &a, &[], false);
    b.start().unwrap();
    assert_eq!(b.state().unwrap(), "standby");
    a.wait_state("departing").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            let mut client = a.client().unwrap();
            while !stop.load(Ordering::Relaxed) {
                guest.work(&mut client, 20).unwrap();
            }
        });
        b.wait_prepared().unwrap();
        stop.store(true, Ordering::Relaxed);
        working.join().unwrap();
    });
    // Until the switch-over B reads what A has now, whatever was copied.
    guest.check(&mut b.client().unwrap()).unwrap();
    let mut client = b.client().unwrap();
    guest.work(&mut client, 100).unwrap();
    a.wait_state("departed").unwrap();
    refuses_writes(&a);
    guest.check(&mut client).unwrap();
    b.wait_state("local").unwrap();
    a.daemon()
        .wait_status("told that all has arrived", |s| {
            s["notes"].to_string().contains("needed no more")
        })
        .unwrap();
    a.kill().unwrap();
    is_whole(&guest, &mut b);
    // The fence outlives all that.
    a.start().unwrap();
    assert_eq!(a.state().unwrap(), "departed");
    refuses_writes(&a);
}

/// Whatever was copied ahead and not changed since is read at B without A.
#[test]
fn what_was_copied_ahead_is_not_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 2);
    let mut b = prepared(dir.path(), "b", &a, &[]);
    let all = |s: &serde_json::Value| s["ahead_bytes"] == s["size_bytes"];
    b.daemon().wait_status("copied", all).unwrap();
    // Written, told of, and copied again: then all of it is there once more.
    let mut client = a.client().unwrap();
    assert_eq!(guest.write(&mut client, 8000, 64).unwrap(), Answer::OK);
    b.daemon()
        .wait_status("copied again", |s| {
            s["repeated_bytes"] == 64 * 512 && all(s)
        })
        .unwrap();
    b.daemon().command(&["pause"]).unwrap();
    // What changes now is not copied again, and must be found out at the handoff.
    guest.within = MIB;
    for _ in 0..20 {
        assert_eq!(
            guest.write_somewhere(&mut a.client().unwrap()).unwrap(),
            Answer::OK
        );
    }
    guest.within = SIZE;
    let changed = 20 * 61 * 512 + MIB;
    b.daemon().command(&["handoff"]).unwrap();
    let status = b.daemon().status().unwrap();
    assert_eq!(status["state"], "arriving");
    let absent = status["absent_bytes"].as_u64().unwrap();
    assert!(0 < absent && absent < changed, "{absent} bytes are absent");
    let mut client = b.client().unwrap();
    for at in (MIB..SIZE).step_by(65536) {
        guest.compare(at, &client.read(at, 65536).unwrap()).unwrap();
    }
    assert_eq!(counter(&b, "reads_remote"), 0, "{}", b.story());
    guest.check(&mut client).unwrap();
    assert!(counter(&b, "reads_remote") > 0);
    // Now that all was read, all is here.
    is_whole(&guest, &mut b);
}

/// A guest that rewrites one region for ever does not have it copied for ever.
#[test]
fn what_changes_for_ever_is_copied_a_few_times() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 3);
    let mut b = Site::moving(dir.path(), "b", &a, &[], false);
    b.start().unwrap();
    guest.within = 256 << 10;
    let mut client = a.client().unwrap();
    // Twenty rounds of asking for changes, at least; a bound from above holds for any number.
    let began = Instant::now();
    let mut written = 0;
    while began.elapsed() < Duration::from_secs(5) || written <= 100 {
        assert_eq!(guest.write_somewhere(&mut client).unwrap(), Answer::OK);
        written += 1;
    }
    guest.within = SIZE;
    b.wait_prepared().unwrap();
    let repeated = number(&b, "repeated_bytes");
    assert!(0 < repeated && repeated <= 4 * (256 << 10), "{repeated}");
    let wire = number(&b, "wire_bytes");
    assert!(wire < SIZE + 5 * MIB, "{wire} bytes crossed the link");
    guest.insist(&b).unwrap();
    is_whole(&guest, &mut b);
}

/// C takes over from B while B is not complete and has partly written blocks; all are killed in
/// between.
#[test]
fn a_chain_is_complete_and_right() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut a) = at_home(dir.path(), 4);
    let mut b = Site::moving(dir.path(), "b", &a, &["--no-background"], false);
    b.start().unwrap();
    for _ in 0..100 {
        guest.insist(&b).unwrap();
    }
    let mut c = Site::moving(dir.path(), "c", &b, &[], false);
    c.start().unwrap();
    c.wait_prepared().unwrap();
    for _ in 0..50 {
        guest.insist(&b).unwrap();
    }
    a.restart().unwrap();
    b.restart().unwrap();
    c.restart().unwrap();
    for _ in 0..50 {
        guest.insist(&c).unwrap();
    }
    refuses_writes(&a);
    refuses_writes(&b);
    assert_eq!(b.state().unwrap(), "departed");
    c.restart().unwrap();
    b.restart().unwrap();
    a.restart().unwrap();
    refuses_writes(&a);
    refuses_writes(&b);
    guest.work(&mut c.client().unwrap(), 50).unwrap();
    c.wait_state("local").unwrap();
    b.kill().unwrap();
    a.kill().unwrap();
    is_whole(&guest, &mut c);
}

/// An unaligned write at B waits for A, which is frozen; meanwhile C asks for the handoff. That
/// must not make B refuse the writes that need nobody, nor lose what is under way.
#[test]
fn a_write_that_waits_for_its_source_does_not_block_a_handoff() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 5);
    let mut b = Site::moving(dir.path(), "b", &a, &["--no-background"], false);
    b.start().unwrap();
    guest.insist(&b).unwrap();
    let c = Site::moving(dir.path(), "c", &b, &["--prepare", "none"], false);
    let mut c = c;
    c.start().unwrap();
    a.daemon().freeze().unwrap();
    let mut waits = b.client().unwrap();
    let waiting = std::thread::spawn(move || waits.try_write(SIZE - 4096 + 5, &[1; 7]));
    b.daemon()
        .wait_status("waiting for A", |s| s["reads_waiting"] != 0)
        .unwrap();
    c.daemon().command(&["handoff"]).unwrap();
    assert_eq!(c.state().unwrap(), "arriving");
    a.daemon().signal(Signal::CONT).unwrap();
    // It came too late: it was not made.
    assert_eq!(waiting.join().unwrap().unwrap(), Answer::EPERM);
    guest.insist(&c).unwrap();
    is_whole(&guest, &mut c);
}

/// A stray client's write at a Standby that waits for a command is refused, and A's guest notices
/// nothing.
#[test]
fn with_handoff_by_command_a_stray_write_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 6);
    let mut b = prepared(dir.path(), "b", &a, &["--handoff", "command"]);
    let mut client = a.client().unwrap();
    for _ in 0..5 {
        refuses_writes(&b);
        guest.work(&mut client, 20).unwrap();
    }
    assert_eq!(b.state().unwrap(), "standby");
    assert_eq!(a.state().unwrap(), "departing");
    // That it waits for a command outlives its daemon.
    b.restart_alone().unwrap();
    b.wait_prepared().unwrap();
    refuses_writes(&b);
    guest.work(&mut client, 20).unwrap();
    b.daemon().command(&["handoff"]).unwrap();
    guest.work(&mut b.client().unwrap(), 20).unwrap();
    refuses_writes(&a);
    is_whole(&guest, &mut b);
}

/// The first writes of several clients come at once: one handoff, and all are taken.
#[test]
fn several_clients_write_first() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 7);
    let mut b = prepared(dir.path(), "b", &a, &[]);
    let clients: Vec<Client> = (0..8).map(|_| b.client().unwrap()).collect();
    let writes = (0_u64..).zip(clients).map(|(n, mut client)| {
        std::thread::spawn(move || {
            client
                .try_write((8 + n) * MIB, &content(9, 0, 4096))
                .unwrap()
        })
    });
    let writes: Vec<_> = writes.collect();
    for write in writes {
        assert_eq!(write.join().unwrap(), Answer::OK);
    }
    let kinds = b.daemon().event_kinds().unwrap();
    assert_eq!(kinds.iter().filter(|kind| *kind == "handoff").count(), 1);
    let mut client = b.client().unwrap();
    for n in 0..8 {
        assert!(client.read((8 + n) * MIB, 4096).unwrap() == content(9, 0, 4096));
        // For the comparison at the end.
        assert_eq!(
            guest.write(&mut client, (8 + n) * MIB / 512, 8).unwrap(),
            Answer::OK
        );
    }
    is_whole(&guest, &mut b);
}

/// Two destinations stand by: whoever is first has it, and the other says so.
#[test]
fn of_two_destinations_one_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 8);
    let mut b = prepared(dir.path(), "b", &a, &[]);
    let c = prepared(dir.path(), "c", &a, &[]);
    assert!(a.notes().unwrap().contains("2 new sites"), "{}", a.story());
    guest.work(&mut a.client().unwrap(), 20).unwrap();
    guest.insist(&b).unwrap();
    let answer = write_on_a_thread(c.client().unwrap()).join().unwrap();
    assert_eq!(answer.unwrap(), Answer::EIO);
    assert_eq!(c.state().unwrap(), "standby");
    c.daemon()
        .wait_status("told why", |s| s["notes"].to_string().contains("moved on"))
        .unwrap();
    is_whole(&guest, &mut b);
}

// Giving up

fn goes_on_at_a(guest: &mut Guest, a: &mut Site, b: &mut Site) {
    guest.work(&mut a.client().unwrap(), 50).unwrap();
    a.restart().unwrap();
    guest.insist(a).unwrap();
    assert_eq!(a.state().unwrap(), "local", "{}", a.story());
    let said = b.refusal().unwrap();
    assert!(said.contains("given up"), "{said}");
    guest.work(&mut a.client().unwrap(), 50).unwrap();
    guest.check(&mut a.client().unwrap()).unwrap();
    a.take().unwrap().stop().unwrap();
    guest.check_image(a.image()).unwrap();
}

#[test]
fn given_up_before_the_handoff() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut a) = at_home(dir.path(), 9);
    let mut b = prepared(dir.path(), "b", &a, &[]);
    b.daemon().command(&["abort"]).unwrap();
    assert_eq!(b.state().unwrap(), "given-up");
    a.wait_state("local").unwrap();
    refuses_writes(&b);
    // A connection that comes again does not make A prepare for it anew.
    a.restart().unwrap();
    b.daemon()
        .wait_status("connected again", |s| s["source_connected"] == true)
        .unwrap();
    refuses_writes(&b);
    goes_on_at_a(&mut guest, &mut a, &mut b);
}

/// The handoff waits for a source that does not answer; the move is given up meanwhile.
#[test]
fn given_up_while_the_handoff_waits_for_a_frozen_source() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut a) = at_home(dir.path(), 10);
    let mut b = prepared(dir.path(), "b", &a, &[]);
    a.daemon().freeze().unwrap();
    let writing = write_on_a_thread(b.client().unwrap());
    b.daemon()
        .wait_status("a client", |s| s["clients"] == 1)
        .unwrap();
    let began = Instant::now();
    b.daemon().command(&["abort"]).unwrap();
    // Well below the half minute for which the handoff itself may wait.
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(writing.join().unwrap().unwrap(), Answer::EPERM);
    assert_eq!(b.state().unwrap(), "given-up");
    a.daemon().signal(Signal::CONT).unwrap();
    // It hears of the handoff or not, and of its end for certain.
    a.wait_state("local").unwrap();
    guest.insist(&a).unwrap();
    goes_on_at_a(&mut guest, &mut a, &mut b);
}

#[test]
fn given_up_while_the_handoff_waits_for_a_dead_source() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut a) = at_home(dir.path(), 11);
    let mut b = prepared(dir.path(), "b", &a, &[]);
    a.kill().unwrap();
    let writing = write_on_a_thread(b.client().unwrap());
    b.daemon()
        .wait_status("a client", |s| s["clients"] == 1)
        .unwrap();
    b.daemon().command(&["abort"]).unwrap();
    assert_eq!(writing.join().unwrap().unwrap(), Answer::EPERM);
    a.start().unwrap();
    goes_on_at_a(&mut guest, &mut a, &mut b);
}

/// An orderly end while the handoff waits.
#[test]
fn stopped_while_the_handoff_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut a) = at_home(dir.path(), 12);
    let mut b = prepared(dir.path(), "b", &a, &[]);
    a.kill().unwrap();
    let writing = write_on_a_thread(b.client().unwrap());
    b.daemon()
        .wait_status("a client", |s| s["clients"] == 1)
        .unwrap();
    b.take().unwrap().stop().unwrap();
    // Refused or hung up on; in any case not taken.
    assert_ne!(writing.join().unwrap().ok(), Some(Answer::OK));
    a.start().unwrap();
    guest.work(&mut a.client().unwrap(), 20).unwrap();
    b.start().unwrap();
    guest.insist(&b).unwrap();
    refuses_writes(&a);
    is_whole(&guest, &mut b);
}

// Releasing

/// B has taken over and is not complete; A's fence is lifted by hand, and A is written again. B
/// never reads a byte of that, over none of its connections, and says why it gets no further.
#[test]
fn a_released_source_is_never_read_from_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, mut a) = at_home(dir.path(), 13);
    let arguments = ["--no-background", "--prepare", "none", "--connections", "4"];
    let mut b = Site::moving(dir.path(), "b", &a, &arguments, false);
    b.start().unwrap();
    guest.write(&mut b.client().unwrap(), 0, 1).unwrap();
    let refused = a.daemon().try_command(&["release"]).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("--force"), "{said}");
    refuses_writes(&a);

    // Readers all over half of the disk, in flight all the time; but they may be quick. So something is left
    // that is only asked for after the release, and no two steps of theirs are the same, so that nothing
    // is read ahead.
    let (half, late) = (SIZE / 2, SIZE - 65536);
    let newer = vec![0xab; 1 << 20];
    let readers: Vec<_> = (0..6)
        .map(|n| {
            let mut client = b.client().unwrap();
            std::thread::spawn(move || {
                let mut seen = Vec::new();
                let pieces = half / 65536;
                for step in 0..pieces {
                    let at = (step * (step + 1) / 2 + n * pieces / 6) % pieces * 65536;
                    match client.try_read(at, 65536) {
                        Ok((Answer::OK, bytes)) => seen.push((at, bytes)),
                        Ok(_) | Err(_) => return seen,
                    }
                }
                seen
            })
        })
        .collect();
    // Else it is waited for, and is not gone.
    a.daemon()
        .wait_status("taken over", |s| s["taken_over"] == true)
        .unwrap();
    a.daemon().command(&["release", "--force"]).unwrap();
    let mut client = a.client().unwrap();
    for at in (0..SIZE).step_by(1 << 20) {
        assert_eq!(client.try_write(at, &newer).unwrap(), Answer::OK);
    }
    let mut waits = b.client().unwrap();
    waits.ask(late, 4096).unwrap();
    b.daemon()
        .wait_status("cut off", |s| s["notes"].to_string().contains("was lifted"))
        .unwrap();
    // Those that still wait are hung up on.
    let uri = a.uri();
    b.kill().unwrap();
    for reader in readers {
        for (at, bytes) in reader.join().unwrap() {
            guest.compare(at, &bytes).unwrap();
        }
    }
    // A restart serves what is here, and says the same.
    b.start().unwrap();
    let notes = b.notes().unwrap();
    assert!(
        notes.contains("was lifted") && notes.contains(&uri),
        "{notes}"
    );
    guest
        .compare(0, &b.client().unwrap().read(0, 512).unwrap())
        .unwrap();
    b.kill().unwrap();
    // What is in B's image and counts as copied is what A had; nothing newer ever came.
    let image = std::fs::read(b.image()).unwrap();
    assert!(!image.chunks(512).any(|sector| sector == [0xab; 512]));
    a.restart().unwrap();
    assert_eq!(a.state().unwrap(), "local");
    assert_eq!(
        a.client().unwrap().try_write(0, &newer).unwrap(),
        Answer::OK
    );
}

#[test]
fn there_is_nothing_to_release_where_nothing_has_departed() {
    let dir = tempfile::tempdir().unwrap();
    let (_, a) = at_home(dir.path(), 14);
    let refused = a.daemon().try_command(&["release", "--force"]).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("neither a fence"), "{said}");
    let refused = a.daemon().try_command(&["abort"]).unwrap();
    assert_eq!(refused.status.code(), Some(1));
}

// Preparing

/// `--prepare full`: what changes again and again is copied as often, more often than is worth it
/// ahead of any other handoff; the first write waits until all is here, and not for ever.
#[test]
fn prepared_in_full_although_all_changes_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 15);
    let mut b = prepared(dir.path(), "b", &a, &["--prepare", "full"]);
    let mut client = a.client().unwrap();
    for round in 1..=6 {
        for at in (0..SECTORS).step_by(2048) {
            assert_eq!(guest.write(&mut client, at, 2048).unwrap(), Answer::OK);
        }
        b.daemon()
            .wait_status("all copied again", |s| {
                s["repeated_bytes"].as_u64().unwrap() >= round * SECTORS * 512
                    && s["ahead_bytes"] == s["size_bytes"]
            })
            .unwrap();
    }
    guest.insist(&b).unwrap();
    is_whole(&guest, &mut b);
}

/// A destination of a disk that itself only stands by cannot copy ahead; when that disk has
/// arrived, it can.
#[test]
fn a_destination_of_a_standby_prepares_once_that_has_arrived() {
    let dir = tempfile::tempdir().unwrap();
    let (mut guest, a) = at_home(dir.path(), 16);
    let b = prepared(dir.path(), "b", &a, &[]);
    let mut c = Site::moving(dir.path(), "c", &b, &[], false);
    c.start().unwrap();
    let mut client = c.client().unwrap();
    // It cannot arrive before B has: refused, and nobody is fenced.
    assert_eq!(
        c.daemon().try_command(&["handoff"]).unwrap().status.code(),
        Some(1)
    );
    guest.check(&mut client).unwrap();
    guest.work(&mut a.client().unwrap(), 20).unwrap();
    guest.insist(&b).unwrap();
    c.wait_prepared().unwrap();
    guest.work(&mut b.client().unwrap(), 20).unwrap();
    guest.insist(&c).unwrap();
    refuses_writes(&a);
    refuses_writes(&b);
    b.wait_state("departed").unwrap();
    is_whole(&guest, &mut c);
}
