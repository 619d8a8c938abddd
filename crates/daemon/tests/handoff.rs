//! A handoff between two daemons, on a link of which one direction can be held.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
#[path = "site/late.rs"]
mod late;
mod site;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use guest::Guest;
use hikkoshi_daemon::config::{Prepare, SourceConfig};
use hikkoshi_daemon::status::LifeState;
use hikkoshi_store::state::StateDir;
use hikkoshi_wan::transport::session::Told;
use late::handoff_to;
use site::{On, Site, Wanted};

/// Far more than anything takes here that does not wait for an answer, and less than the 30 s for
/// which an answer is waited for.
const SOON: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

/// What passes a link.
#[derive(Default)]
struct Held {
    /// Nothing comes back to the client.
    answers: AtomicBool,
    /// Bytes that the client has said.
    said: AtomicUsize,
}

/// A link to `to`; returns its port. Its threads end with their connections.
fn link(to: (String, u16), held: &Arc<Held>) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let held = Arc::clone(held);
    thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, TcpStream::connect(&to)) else {
                return;
            };
            client.set_nodelay(true).unwrap();
            server.set_nodelay(true).unwrap();
            let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
            let (there, home) = (Arc::clone(&held), Arc::clone(&held));
            thread::spawn(move || {
                pass(client, server, |n| {
                    there.said.fetch_add(n, Ordering::SeqCst);
                });
            });
            thread::spawn(move || {
                pass(back.0, back.1, |_| {
                    while home.answers.load(Ordering::SeqCst) {
                        thread::sleep(POLL);
                    }
                });
            });
        }
    });
    port
}

fn pass(mut from: TcpStream, mut to: TcpStream, before: impl Fn(usize)) {
    let mut chunk = vec![0; 32 << 10];
    while let Ok(n) = from.read(&mut chunk) {
        before(n);
        if n == 0 || to.write_all(&chunk[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < SOON, "{what}: not within {SOON:?}");
        thread::sleep(POLL);
    }
}

/// While it stands by, a destination asks four times a second what has changed. A handoff that came
/// while such an answer was on its way was not said before it had arrived: on a long link nearly
/// two round trips in which the VM stands still, instead of one.
#[test]
fn a_handoff_does_not_wait_for_the_answer_to_another_question() {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..1_u32 << 20).map(|n| (n % 251) as u8).collect();
    let old = Site::with(dir.path(), "old", &data, On::Tcp);
    let hikkoshi_wan::Address::Tcp { host, port } = old.address() else {
        panic!("it listens on TCP");
    };
    let held = Arc::new(Held::default());
    let uri = format!("nbd://127.0.0.1:{}/", link((host, port), &held));
    let wanted = Wanted {
        source: Some(hikkoshi_daemon::config::SourceConfig::new(&uri)),
        ..Wanted::plain(On::Unix)
    };
    let new = Site::start(dir.path(), "new", wanted);
    wait_until("all is copied ahead", || {
        new.status().prepared == Some(true)
    });

    held.answers.store(true, Ordering::SeqCst);
    let said = held.said.load(Ordering::SeqCst);
    wait_until("it asks what has changed", || {
        held.said.load(Ordering::SeqCst) > said
    });
    let export = new.export();
    let handoff = thread::spawn(move || export.handoff());
    wait_until("the source hears of the handoff", || {
        old.status().state == LifeState::Departed
    });
    assert_eq!(new.status().state, LifeState::Standby);

    held.answers.store(false, Ordering::SeqCst);
    handoff.join().unwrap().unwrap();
    wait_until("all is here", || new.status().state == LifeState::Local);
    new.stop();
    assert!(std::fs::read(dir.path().join("new")).unwrap() == data);
    old.stop();
}

/// Simulated worlds of two sites. A destination was killed between the steps in which a file takes
/// another's place, as it recorded that the move was given up. The next start believed it and told the
/// source, whose VM went on; a power cut took the record back, and the move that was given up stood by
/// again, for any stray write to end that VM. So it is recorded once more before anybody is told.
#[test]
fn that_a_move_was_given_up_is_durable_before_a_restart_tells_of_it() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let old = Site::with(dir.path(), "old", &site::noise(1 << 20), On::Unix);
    let wanted = || Wanted {
        source: Some(hikkoshi_daemon::config::SourceConfig::new(old.uri())),
        ..Wanted::plain(On::Unix)
    };
    let new = Site::start(dir.path(), "new", wanted());
    new.export().abort().unwrap();
    new.stop();
    let record = dir.path().join("new.hikkoshi/volume");
    let written = || {
        let meta = std::fs::metadata(&record).unwrap();
        (meta.ino(), meta.mtime(), meta.mtime_nsec())
    };
    let before = written();
    let refused = Site::try_start(dir.path(), "new", wanted()).err().unwrap();
    assert!(refused.contains("was given up"), "{refused}");
    assert_ne!(before, written(), "it was not written again");
    old.stop();
}

/// What comes of something that may never end.
fn within_time<T: Send + 'static>(what: &str, course: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(course()));
    let outcome = receiver.recv_timeout(SOON);
    outcome.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"))
}

/// The answer to a handoff was lost, and the source's fence was lifted by hand. The destination, started
/// again with `--prepare full`, waited for ever for what nobody copied any more, and so did the VM's first
/// write.
#[test]
fn a_move_that_was_released_by_hand_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let data = site::noise(1 << 20);
    let old = Site::with(dir.path(), "old", &data, On::Unix);
    let wanted = || {
        let mut source = SourceConfig::new(old.uri());
        source.prepare = Prepare::Full;
        Wanted {
            source: Some(source),
            ..Wanted::plain(On::Unix)
        }
    };
    Site::start(dir.path(), "new", wanted()).stop();
    let state = StateDir::whose(&dir.path().join("new.hikkoshi"));
    let id = state.unwrap().unwrap().volume_id;
    let told = handoff_to(&old, id);
    assert!(matches!(told, Ok(Told::Fenced { .. })), "{told:?}");
    old.daemon.let_answers_grow_old();
    old.export().release(true).unwrap();

    let new = Site::start(dir.path(), "new", wanted());
    let export = new.export();
    let handoff = within_time("the handoff", move || export.handoff());
    let why = handoff.unwrap_err().to_string();
    assert!(why.contains("`hikkoshi abort`"), "{why}");
    let address = new.address();
    let written = within_time("the first write", move || {
        Guest::connect(&address).try_write(0, &[1; 512])
    });
    assert!(!written);
    let status = new.status();
    assert_eq!(status.state, LifeState::Standby);
    let says = |text: &str| status.notes.iter().any(|note| note.contains(text));
    assert!(says("this move is off"), "{:?}", status.notes);
    assert!(!says("waiting for"), "{:?}", status.notes);
    assert_eq!(old.status().state, LifeState::Local);
    new.export().abort().unwrap();
    new.stop();
    assert!(old.contents() == data);
    old.stop();
}

/// A destination that ended between its completion and the source's hearing of it: the source said for ever
/// that it was still needed. The next start tells it, also where the source is away at first, and what is
/// here is served meanwhile.
#[test]
fn a_source_that_has_not_heard_that_all_is_there_is_told_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let data = site::noise(1 << 20);
    let old = Site::with(dir.path(), "old", &data, On::Unix);
    let new = Site::start(dir.path(), "new", Wanted::from(On::Unix, &old.uri()));
    wait_until("all is here", || new.is_local());
    new.stop();
    // What it has heard it does not remember.
    old.stop();

    let new = Site::start(dir.path(), "new", Wanted::plain(On::Unix));
    assert!(Guest::connect(&new.address()).read(0, data.len()) == data);
    let old = Site::start(dir.path(), "old", Wanted::plain(On::Unix));
    wait_until("the source hears that it is needed no more", || {
        let notes = old.status().notes;
        notes.iter().any(|note| note.contains("needed no more"))
    });
    // Nor does it say so again and again.
    let state = dir.path().join("new.hikkoshi");
    wait_until("that it was heard is recorded", || {
        let known = StateDir::whose(&state).unwrap().unwrap();
        !known.ties.fenced_source
    });
    new.stop();
    let new = Site::start(dir.path(), "new", Wanted::plain(On::Unix));
    assert!(new.is_local());
    new.stop();
    old.stop();
}
