//! The disk at the new site becomes full, fails to read or write, or to sync.
//!
//! `docs/reliability.md` has a row for each of these tests.

#![allow(clippy::unwrap_used)]

use hikkoshi_testkit::client::Answer;
use hikkoshi_testkit::daemon::Daemon;
use hikkoshi_testkit::faults::{Injection, SmallDisk, content, make_image};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const BLOCK: u32 = 4096;
const OLD: u8 = 1;
const NEW: u8 = 2;

fn serve_old(dir: &Path, size: u64) -> Daemon {
    let image = dir.join("old.img");
    make_image(&image, OLD, size).unwrap();
    Daemon::start(dir, "old", &image, &[]).unwrap()
}

/// Full in the middle of a move, then space again: nobody does anything but making space.
#[test]
fn full_in_the_middle_of_a_move_then_space_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(&dir.path().join("small"), 80).unwrap();
    let source = serve_old(dir.path(), 40 * MIB);
    let image = dir.path().join("small/new.img");
    let extra = [
        "--from",
        &source.uri(),
        "--handoff",
        "now",
        "--max-rate",
        "1MB/s",
    ];
    let here = Daemon::start(dir.path(), "new", &image, &extra).unwrap();
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 8192)).unwrap();
    client.flush().unwrap();
    here.wait_status("on its way", |s| {
        s["absent_bytes"].as_u64() < Some(37 * MIB)
    })
    .unwrap();
    here.command(&["pause"]).unwrap();
    disk.fill().unwrap();
    here.command(&["limit", "none"]).unwrap();
    here.command(&["resume"]).unwrap();
    here.wait_event("disk-full").unwrap();

    // What is here is served; what is not is read through; what is allocated can be written.
    let far = 39 * MIB;
    assert!(client.read(0, BLOCK).unwrap() == content(NEW, 0, BLOCK.into()));
    assert!(client.read(far, BLOCK).unwrap() == content(OLD, far, BLOCK.into()));
    client.write(4096, &content(NEW, 4096, 4096)).unwrap();
    // A block of its own that needs space is refused as on any full disk.
    assert_eq!(
        client.try_write(far, &content(NEW, far, 4096)).unwrap(),
        Answer::ENOSPC
    );
    // Half a block that is not here likewise, and nothing of it stays.
    assert_eq!(
        client
            .try_write(far + 512, &content(NEW, far, 512))
            .unwrap(),
        Answer::ENOSPC
    );
    assert!(client.read(far, BLOCK).unwrap() == content(OLD, far, BLOCK.into()));
    // The log has its space already.
    client.flush().unwrap();
    let status = here.status().unwrap();
    assert_eq!(status["disk_full"], true, "{status}");
    assert_eq!(status["poisoned"], false, "{status}");
    assert!(status["notes"].to_string().contains("no space"), "{status}");
    assert_eq!(here.metric("disk_full").unwrap(), 1);
    // The link is not used for what would be thrown away.
    let wire = || here.status().unwrap()["wire_bytes"].as_u64().unwrap();
    let before = wire();
    std::thread::sleep(Duration::from_secs(6));
    assert!(
        wire() - before < 4 * MIB,
        "{} bytes for nothing",
        wire() - before
    );

    disk.free().unwrap();
    here.command(&["wait", "--timeout", "100s"]).unwrap();
    client.write(far, &content(NEW, far, 4096)).unwrap();
    client.flush().unwrap();
    here.wait_event("complete").unwrap();
    here.stop().unwrap();
    let mut right = content(OLD, 0, 40 * MIB);
    right[..8192].copy_from_slice(&content(NEW, 0, 8192));
    let start = usize::try_from(far).unwrap();
    right[start..start + 4096].copy_from_slice(&content(NEW, far, 4096));
    assert!(
        std::fs::read(&image).unwrap() == right,
        "the disk is not what was written"
    );
}

/// A daemon that is killed while its disk is full starts again on the full disk, or says why not,
/// and goes on once there is space.
#[test]
fn killed_while_the_disk_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(&dir.path().join("small"), 40).unwrap();
    let source = serve_old(dir.path(), 16 * MIB);
    let image = dir.path().join("small/new.img");
    let uri = source.uri();
    let extra = ["--from", &uri, "--handoff", "now", "--no-background"];
    let here = Daemon::start(dir.path(), "new", &image, &extra).unwrap();
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 8192)).unwrap();
    client.flush().unwrap();
    disk.fill().unwrap();
    assert!(client.read(MIB, BLOCK).unwrap() == content(OLD, MIB, BLOCK.into()));
    here.kill().unwrap();
    // A start makes a snapshot, for which there is no space.
    let said = Daemon::refusal(dir.path(), "new", &image, &extra).unwrap();
    assert!(said.contains("No space left"), "{said}");
    disk.free().unwrap();
    let here = Daemon::start(dir.path(), "new", &image, &["--from", &uri]).unwrap();
    here.command(&["wait", "--timeout", "100s"]).unwrap();
    here.stop().unwrap();
    let mut right = content(OLD, 0, 16 * MIB);
    right[..8192].copy_from_slice(&content(NEW, 0, 8192));
    assert!(std::fs::read(&image).unwrap() == right);
}

/// EIO from the destination's own disk, for reads and for writes.
#[test]
fn it_fails_to_read_and_to_write() {
    let dir = tempfile::tempdir().unwrap();
    let source = serve_old(dir.path(), 16 * MIB);
    let image = dir.path().join("new.img");
    let extra = [
        "--from",
        &source.uri(),
        "--handoff",
        "now",
        "--no-background",
    ];
    let here = Daemon::start(dir.path(), "new", &image, &extra).unwrap();
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 8192)).unwrap();
    let log = dir.path().join("strace.log");

    let rule = "preadv2,preadv,pread64:error=EIO";
    let failing = Injection::start(here.pid(), rule, Some(&image), &log).unwrap();
    assert_eq!(client.try_read(0, BLOCK).unwrap().0, Answer::EIO);
    // Others are served meanwhile, and what comes from the source needs no read here.
    client.write(8192, &content(NEW, 8192, 4096)).unwrap();
    assert!(client.read(MIB, BLOCK).unwrap() == content(OLD, MIB, BLOCK.into()));
    failing.end().unwrap();
    assert!(client.read(0, BLOCK).unwrap() == content(NEW, 0, BLOCK.into()));
    here.wait_event("disk-error").unwrap();
    assert!(here.metric("disk_errors_total").unwrap() >= 1);

    let rule = "pwritev2,pwritev,pwrite64:error=EIO";
    let failing = Injection::start(here.pid(), rule, Some(&image), &log).unwrap();
    assert_eq!(client.try_write(0, &[9; 4096]).unwrap(), Answer::EIO);
    let far = 8 * MIB;
    assert_eq!(client.try_write(far, &[9; 4096]).unwrap(), Answer::EIO);
    // A read of what is not here is answered, though it cannot be kept.
    assert!(client.read(far, BLOCK).unwrap() == content(OLD, far, BLOCK.into()));
    failing.end().unwrap();
    // The block was not taken for written, and can be.
    assert!(client.read(far, BLOCK).unwrap() == content(OLD, far, BLOCK.into()));
    client.write(far, &content(NEW, far, 4096)).unwrap();
    client.flush().unwrap();
    assert_eq!(here.status().unwrap()["poisoned"], false);
    here.stop().unwrap();
}

/// A sync fails once. The next one would succeed, and say nothing of what was lost before it.
#[test]
fn a_sync_fails_once() {
    let dir = tempfile::tempdir().unwrap();
    let source = serve_old(dir.path(), 16 * MIB);
    let image = dir.path().join("new.img");
    let uri = source.uri();
    let extra = ["--from", &uri, "--handoff", "now", "--no-background"];
    let here = Daemon::start(dir.path(), "new", &image, &extra).unwrap();
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 8192)).unwrap();
    client.flush().unwrap();
    let log = dir.path().join("strace.log");
    let rule = "fdatasync,fsync:error=EIO:when=1";
    let failing = Injection::start(here.pid(), rule, None, &log).unwrap();
    client.write(16384, &content(NEW, 16384, 4096)).unwrap();
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    failing.end().unwrap();
    // From here on nothing is promised, whatever the medium says now.
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    assert_eq!(client.try_write(0, &[1; 512]).unwrap(), Answer::EIO);
    assert!(client.read(0, BLOCK).unwrap() == content(NEW, 0, BLOCK.into()));
    here.wait_event("poisoned").unwrap();
    let status = here.status().unwrap();
    assert_eq!(status["poisoned"], true, "{status}");
    assert!(
        status["notes"].to_string().contains("sync failed"),
        "{status}"
    );
    assert_eq!(here.metric("poisoned").unwrap(), 1);
    // It does not end well, and says so.
    here.signal(rustix::process::Signal::TERM).unwrap();
    assert_eq!(here.exit_status(Duration::from_secs(60)).unwrap(), 1);

    let here = Daemon::start(dir.path(), "new", &image, &["--from", &uri]).unwrap();
    // What the page cache holds is not believed before it was written once more.
    here.wait_event("rewritten").unwrap();
    let mut client = here.client().unwrap();
    assert!(
        client.read(0, 8192).unwrap() == content(NEW, 0, 8192),
        "flushed bytes are lost"
    );
    client.write(20480, &content(NEW, 20480, 4096)).unwrap();
    client.flush().unwrap();
    here.command(&["wait", "--timeout", "100s"]).unwrap();
    here.stop().unwrap();
}

/// The same on a volume that never had a source.
#[test]
fn a_sync_of_a_plain_image_fails_once() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("plain.img");
    make_image(&image, OLD, MIB).unwrap();
    let here = Daemon::start(dir.path(), "plain", &image, &[]).unwrap();
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 4096)).unwrap();
    let log = dir.path().join("strace.log");
    let rule = "fdatasync,fsync:error=EIO:when=1";
    let failing = Injection::start(here.pid(), rule, None, &log).unwrap();
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    failing.end().unwrap();
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    assert_eq!(here.event_kinds().unwrap(), ["opened", "poisoned"]);
    here.signal(rustix::process::Signal::KILL).unwrap();
    drop(here);
    // Once, and not again.
    let here = Daemon::start(dir.path(), "plain", &image, &[]).unwrap();
    here.wait_event("rewritten").unwrap();
    here.stop().unwrap();
    let here = Daemon::start(dir.path(), "plain", &image, &[]).unwrap();
    assert_eq!(here.event_kinds().unwrap(), ["opened"]);
    here.stop().unwrap();
}

/// What is copied is brought to the disk before anybody flushes, and that fails. The kernel may tell nobody
/// else of it: a flush behind that would find nothing to do, and succeed.
#[test]
fn what_is_copied_does_not_get_to_the_disk() {
    // In memory there would be nothing to bring anywhere.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = serve_old(dir.path(), 40 * MIB);
    let image = dir.path().join("new.img");
    let uri = source.uri();
    let extra = ["--from", &uri, "--handoff", "now", "--max-rate", "1MB/s"];
    let here = Daemon::start(dir.path(), "new", &image, &extra).unwrap();
    let mut client = here.client().unwrap();
    client.write(0, &content(NEW, 0, 8192)).unwrap();
    client.flush().unwrap();
    // The kernel was found to understand.
    here.wait_status("on its way", |s| {
        s["absent_bytes"].as_u64() < Some(39 * MIB)
    })
    .unwrap();
    let log = dir.path().join("strace.log");
    let failing = Injection::start(here.pid(), "sync_file_range:error=EIO", None, &log).unwrap();
    here.command(&["limit", "none"]).unwrap();
    // Nobody need flush.
    here.wait_event("poisoned").unwrap();
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    failing.end().unwrap();
    assert_eq!(client.try_flush().unwrap(), Answer::EIO);
    here.signal(rustix::process::Signal::KILL).unwrap();
    drop((client, here));

    let here = Daemon::start(dir.path(), "new", &image, &["--from", &uri]).unwrap();
    here.wait_event("rewritten").unwrap();
    here.command(&["wait", "--timeout", "100s"]).unwrap();
    let mut client = here.client().unwrap();
    assert!(
        client.read(0, 8192).unwrap() == content(NEW, 0, 8192),
        "flushed bytes are lost"
    );
    for at in (8192..40 * MIB).step_by(1 << 20) {
        assert!(client.read(at, BLOCK).unwrap() == content(OLD, at, BLOCK.into()));
    }
    client.flush().unwrap();
    here.stop().unwrap();
}
