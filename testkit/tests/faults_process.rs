//! Two daemons on one image, a dead control socket, signals.
//!
//! `docs/reliability.md` has a row for each of these tests.

#![allow(clippy::unwrap_used)]

use hikkoshi_testkit::client::Answer;
use hikkoshi_testkit::daemon::Daemon;
use hikkoshi_testkit::faults::{content, make_image};
use rustix::process::Signal;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 4096;
const OLD: u8 = 1;
const NEW: u8 = 2;
/// Longer than an orderly end takes that is not stuck; its patience with clients is ten seconds.
const END: Duration = Duration::from_secs(90);

fn image(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    make_image(&path, OLD, 4 * MIB).unwrap();
    path
}

fn says_who(said: &str, holder: &Daemon, file: &str) {
    assert!(said.contains("in use"), "{said}");
    assert!(said.contains(file), "{said}");
    assert!(said.contains(&holder.pid().to_string()), "{said}");
}

#[test]
fn two_daemons_on_one_plain_image() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk.img");
    let first = Daemon::start(dir.path(), "first", &disk, &[]).unwrap();
    let (soft, hard) = (dir.path().join("soft.img"), dir.path().join("hard.img"));
    std::os::unix::fs::symlink(&disk, &soft).unwrap();
    std::fs::hard_link(&disk, &hard).unwrap();
    for (path, name) in [
        (&disk, "disk.img"),
        (&soft, "soft.img"),
        (&hard, "hard.img"),
    ] {
        let said = Daemon::refusal(dir.path(), "second", path, &[]).unwrap();
        says_who(&said, &first, name);
        let said = Daemon::refusal(dir.path(), "second", path, &["--read-only"]).unwrap();
        says_who(&said, &first, name);
    }
    // The first is none the worse for it.
    let mut client = first.client().unwrap();
    client.write(0, &content(NEW, 0, 4096)).unwrap();
    client.flush().unwrap();
    first.stop().unwrap();
    Daemon::start(dir.path(), "second", &soft, &[])
        .unwrap()
        .stop()
        .unwrap();
}

#[test]
fn two_daemons_on_one_moving_image() {
    let dir = tempfile::tempdir().unwrap();
    let source = Daemon::start(dir.path(), "old", &image(dir.path(), "old.img"), &[]).unwrap();
    let disk = dir.path().join("new.img");
    let uri = source.uri();
    let from = ["--from", &uri, "--handoff", "now", "--no-background"];
    let first = Daemon::start(dir.path(), "first", &disk, &from).unwrap();
    let mut client = first.client().unwrap();
    client.write(0, &content(NEW, 0, 4096)).unwrap();
    let said = Daemon::refusal(dir.path(), "second", &disk, &from).unwrap();
    says_who(&said, &first, "lock");
    // With a state of its own, by a link, or as if it were a plain image.
    let elsewhere = dir.path().join("elsewhere").display().to_string();
    let with_state = [&from[..], &["--state", &elsewhere]].concat();
    let said = Daemon::refusal(dir.path(), "second", &disk, &with_state).unwrap();
    says_who(&said, &first, "new.img");
    assert!(
        !Path::new(&elsewhere).join("volume").exists(),
        "it left a state"
    );
    let hard = dir.path().join("hard.img");
    std::fs::hard_link(&disk, &hard).unwrap();
    for arguments in [&from[..], &[]] {
        let said = Daemon::refusal(dir.path(), "second", &hard, arguments).unwrap();
        says_who(&said, &first, "hard.img");
    }
    assert!(client.read(0, BLOCK).unwrap() == content(NEW, 0, BLOCK.into()));
    first.stop().unwrap();
}

#[test]
fn the_control_socket_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let here = Daemon::start(dir.path(), "disk", &image(dir.path(), "disk.img"), &[]).unwrap();
    std::fs::remove_file(&here.control).unwrap();
    let output = here.try_command(&["status"]).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("no daemon answers"), "{said}");
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 4096)).unwrap();
    client.flush().unwrap();
    here.stop().unwrap();
}

/// A stopped process accepts connections (the kernel does) and answers none.
#[test]
fn a_stopped_daemon_is_an_error_in_bounded_time() {
    let dir = tempfile::tempdir().unwrap();
    let here = Daemon::start(dir.path(), "disk", &image(dir.path(), "disk.img"), &[]).unwrap();
    here.freeze().unwrap();
    let began = Instant::now();
    let output = here.try_command(&["status"]).unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("did not answer"), "{said}");
    here.signal(Signal::CONT).unwrap();
    here.command(&["status"]).unwrap();
    here.stop().unwrap();
}

/// Clients that ask for nothing take all places of the control interface.
#[test]
fn the_control_interface_is_flooded() {
    let dir = tempfile::tempdir().unwrap();
    let here = Daemon::start(dir.path(), "disk", &image(dir.path(), "disk.img"), &[]).unwrap();
    let flood: Vec<_> = (0..120)
        .filter_map(|_| std::os::unix::net::UnixStream::connect(&here.control).ok())
        .collect();
    assert!(flood.len() > 64);
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 4096)).unwrap();
    client.flush().unwrap();
    let output = here.try_command(&["status"]).unwrap();
    if !output.status.success() {
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("did not answer"), "{said}");
    }
    // Those that say nothing are hung up on, and then it answers again.
    here.wait_status_patiently().unwrap();
    drop(flood);
    here.stop().unwrap();
}

/// Whatever was answered is there after an orderly end, flushed or not, and what was in flight is
/// answered.
#[test]
fn an_orderly_end_answers_what_is_in_flight() {
    for signal in [Signal::TERM, Signal::INT] {
        let dir = tempfile::tempdir().unwrap();
        let source = Daemon::start(dir.path(), "old", &image(dir.path(), "old.img"), &[]).unwrap();
        let disk = dir.path().join("new.img");
        let uri = source.uri();
        let from = ["--from", &uri, "--handoff", "now", "--no-background"];
        let here = Daemon::start(dir.path(), "new", &disk, &from).unwrap();
        let mut client = here.client().unwrap();
        let mut second = here.client().unwrap();
        let writer = std::thread::spawn(move || {
            let mut answered = 0_u64;
            while answered < 512 {
                let at = answered * 4096;
                match second.try_write(at, &content(NEW, at, 4096)) {
                    Ok(Answer::OK) => answered += 1,
                    _ => break,
                }
            }
            answered
        });
        client.write(3 * MIB, &content(NEW, 3 * MIB, 4096)).unwrap();
        here.signal(signal).unwrap();
        assert_eq!(here.exit_status(END).unwrap(), 0);
        let answered = writer.join().unwrap();
        // Nothing in memory is needed: the durable state says all of it.
        let memory = std::fs::read_dir("/dev/shm/hikkoshi-0");
        let ours = |entry: &std::fs::DirEntry| {
            let id = entry.file_name().to_string_lossy().into_owned();
            let state = std::fs::read_to_string(dir.path().join("new.img.hikkoshi/volume"));
            state.is_ok_and(|state| state.contains(&id))
        };
        let left = memory.map_or(0, |m| m.flatten().filter(ours).count());
        assert_eq!(left, 0, "the memory of the process is still there");
        let here = Daemon::start(dir.path(), "new", &disk, &from).unwrap();
        let mut client = here.client().unwrap();
        for n in 0..answered {
            assert!(client.read(n * 4096, BLOCK).unwrap() == content(NEW, n * 4096, 4096));
        }
        assert!(client.read(3 * MIB, BLOCK).unwrap() == content(NEW, 3 * MIB, 4096));
        here.stop().unwrap();
    }
}

/// A read that waits for a source that is gone does not hold up the end.
#[test]
fn an_orderly_end_while_the_source_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let source = Daemon::start(dir.path(), "old", &image(dir.path(), "old.img"), &[]).unwrap();
    let disk = dir.path().join("new.img");
    let uri = source.uri();
    let from = ["--from", &uri, "--handoff", "now", "--no-background"];
    let here = Daemon::start(dir.path(), "new", &disk, &from).unwrap();
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 4096)).unwrap();
    source.kill().unwrap();
    here.wait_event("source-lost").unwrap();
    let cookie = client.ask(2 * MIB, BLOCK).unwrap();
    here.wait_status("waiting", |s| s["reads_waiting"] == 1)
        .unwrap();
    here.signal(Signal::TERM).unwrap();
    let answer = client.read_answer(cookie, BLOCK);
    assert!(answer.is_err() || answer.unwrap().0 != Answer::OK);
    assert_eq!(here.exit_status(END).unwrap(), 0);
    let here = Daemon::start(dir.path(), "new", &disk, &from).unwrap();
    assert!(here.client().unwrap().read(0, BLOCK).unwrap() == content(NEW, 0, 4096));
}

/// A client that asks for much and reads nothing is waited for, but not for ever; a second signal
/// does not wait at all, and loses nothing that was answered.
#[test]
fn a_client_that_does_not_read_and_a_second_signal() {
    for second in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(dir.path(), "disk.img");
        let here = Daemon::start(dir.path(), "disk", &disk, &[]).unwrap();
        let mut client = here.client().unwrap();
        client.write(0, &content(NEW, 0, 4096)).unwrap();
        let mut stuck = here.client().unwrap();
        for _ in 0..64 {
            stuck.ask(0, 1 << 20).unwrap();
        }
        here.signal(Signal::TERM).unwrap();
        if second {
            let began = Instant::now();
            while !here.log().contains("a second signal ends at once") {
                assert!(began.elapsed() < END, "no word of the first signal");
                std::thread::sleep(Duration::from_millis(10));
            }
            here.signal(Signal::INT).unwrap();
        }
        // An orderly end waits for that client, so it is not over yet when the second one comes.
        assert_eq!(here.exit_status(END).unwrap(), i32::from(second));
        let found = std::fs::read(&disk).unwrap();
        assert!(
            found[..4096] == content(NEW, 0, 4096),
            "an answered write is lost"
        );
        drop(stuck);
    }
}
