//! A disk that changes its storage under a client (`hikkoshi move`): the daemon killed at every named
//! step of it and at random, and a new disk without room.
//!
//! After a kill exactly one of the two images is served and accepts writes; the other is refused, and
//! says which it is. Each row of the table is printed.

#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use hikkoshi_testkit::client::Answer;
use hikkoshi_testkit::daemon::Daemon;
use hikkoshi_testkit::faults::{SmallDisk, content, make_image};
use hikkoshi_testkit::moving::{Dice, Guest, Site};
use hikkoshi_testkit::rows::play_rows;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const SIZE: u64 = 4 << 20;
const MIB: u64 = 1 << 20;

/// A kill at a point and at which passing of it. `volume` is written when the old volume gets a state
/// (1), for the new one (2), at the fence (3), at the switch (4), and at the end (5).
const ROWS: &[&str] = &[
    "volume.renamed:1",
    "new.image:1",
    "log.renamed:1",
    "map.renamed:1",
    "volume.renamed:2",
    "new.tagged:1",
    "prepare.written:2",
    "fence.closed:1",
    "fence.synced:1",
    "volume.written:3",
    "volume.synced:3",
    "volume.renamed:3",
    "volume.done:3",
    "fence.recorded:1",
    "takeover.fenced:1",
    "handoff.begun:1",
    "volume.written:4",
    "volume.synced:4",
    "volume.renamed:4",
    "volume.done:4",
    "handoff.recorded:1",
    "handoff.taken:1",
    "handoff.done:1",
    "storage.switched:1",
    "install.written:2",
    "change.marked:2",
    "completion.begun:1",
    "completion.recorded:1",
    "completion.log-removed:1",
    "completion.tag-removed:1",
    "storage.released:1",
];

/// The disk in one image, or the other.
struct Disk {
    a: Site,
    b: Site,
}

/// Serves one of the images: the other must refuse, and say which it is.
fn serve_again(disk: &mut Disk) -> Result<bool> {
    let Disk { a, b } = disk;
    if !b.image().exists() {
        a.start()?;
        return Ok(false);
    }
    // An image without a state is nobody's disk: it was just being made.
    if b.recorded().is_err() {
        a.start()?;
        return Ok(false);
    }
    match b.start() {
        Ok(()) => {
            let said = a.refusal()?;
            let named = b.image().display().to_string();
            ensure!(said.contains(&named), "{said} does not name {named}");
            Ok(true)
        }
        Err(error) => {
            let said = format!("{error:#}");
            ensure!(said.contains("exit status: 1"), "no clean failure: {said}");
            let named = a.image().display().to_string();
            ensure!(said.contains(&named), "{said} does not name {named}");
            a.start()?;
            Ok(false)
        }
    }
}

fn sites(dir: &Path, seed: u64) -> Result<(Guest, Disk)> {
    let mut guest = Guest::new(SIZE, seed);
    let mut a = Site::new(dir, "a", &[], true);
    guest.make_image(a.image())?;
    a.start()?;
    guest.work(&mut a.client()?, 40)?;
    let b = Site::new(dir, "b", &[], true);
    Ok((guest, Disk { a, b }))
}

fn order(disk: &Disk, more: &[&str]) -> Vec<String> {
    let to = disk.b.image().display().to_string();
    let words = ["move", &to, "--detach"];
    words
        .iter()
        .chain(more)
        .map(|&word| word.to_owned())
        .collect()
}

fn command(daemon: &Daemon, words: &[String]) -> Result<std::process::Output> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    daemon.try_command(&words)
}

/// To its end, wherever the disk is, and everything compared.
fn come_to_the_end(guest: &mut Guest, disk: &mut Disk, moved: bool) -> Result<()> {
    let site = if moved { &mut disk.b } else { &mut disk.a };
    guest.insist(site)?;
    guest.check(&mut site.client()?)?;
    guest.work(&mut site.client()?, 20)?;
    if !moved {
        // It can be begun again, over what is left of it, without a word more.
        let to = disk.b.image().display().to_string();
        disk.a.daemon().command(&["move", &to, "--json"])?;
        guest.work(&mut disk.a.client()?, 20)?;
        disk.a.take()?.stop()?;
        disk.b.start()?;
    }
    disk.b.wait_state("local")?;
    guest.check(&mut disk.b.client()?)?;
    guest.work(&mut disk.b.client()?, 20)?;
    disk.b.take()?.stop()?;
    guest.check_image(disk.b.image())?;
    let said = disk.a.refusal()?;
    ensure!(said.contains("hikkoshi move"), "{said}");
    Ok(())
}

fn play(dir: &Path, point: &str, seed: u64) -> Result<String> {
    let (mut guest, mut disk) = sites(dir, seed)?;
    disk.a.take()?.stop()?;
    disk.a.start_to_die(Some(point))?;
    let dies = disk.a.take()?;
    let mut client = dies.client()?;
    // What comes after the switch has something to do only if not all was copied before.
    let late = ["storage.switched", "install", "change", "completion"];
    let more: &[&str] = if late.iter().any(|start| point.starts_with(start)) {
        &["--prepare", "none", "--max-rate", "8MB/s"]
    } else {
        &[]
    };
    let words = order(&disk, more);
    std::thread::scope(|scope| -> Result<()> {
        let guest = &mut guest;
        let working = scope.spawn(move || while guest.work(&mut client, 5).is_ok() {});
        // It may not live to answer.
        let _ = command(&dies, &words)?;
        dies.wait_killed()?;
        working.join().unwrap();
        Ok(())
    })?;
    let moved = serve_again(&mut disk)?;
    come_to_the_end(&mut guest, &mut disk, moved)?;
    Ok((if moved {
        "in the new image"
    } else {
        "in the old image"
    })
    .to_owned())
}

/// Plays rows on three threads; prints each.
#[test]
fn killed_at_every_step() {
    play_rows(
        ROWS,
        3,
        |point| (*point).to_owned(),
        |dir, point, seed| play(dir, point, seed),
    );
}

/// Random kills before, at and after the switch, until the time is over: `HIKKOSHI_MOVES_SEED`,
/// `HIKKOSHI_MOVES_SECONDS`.
#[test]
fn killed_at_random() {
    let number = |name: &str, default: u64| {
        let set = std::env::var(name).ok();
        set.map_or(default, |text| text.parse().unwrap())
    };
    let seed = number("HIKKOSHI_MOVES_SEED", 20_261_125);
    let most = Duration::from_secs(number("HIKKOSHI_MOVES_SECONDS", 10));
    let began = Instant::now();
    let (mut moves, mut there) = (0, 0);
    while began.elapsed() < most {
        let seed = seed + moves;
        match random_move(seed) {
            Ok(moved) => there += u64::from(moved),
            Err(error) => panic!("seed {seed}: {error:#}"),
        }
        moves += 1;
    }
    println!("{moves} moves, {there} killed after the switch");
    assert!(moves > 0);
}

fn random_move(seed: u64) -> Result<bool> {
    let dir = tempfile::tempdir()?;
    let mut dice = Dice::new(seed);
    let (mut guest, mut disk) = sites(dir.path(), seed)?;
    let rate = format!("{}MB/s", 8 << dice.below(5));
    let prepare = ["none", "ahead"][usize::try_from(dice.below(2))?];
    let words = order(&disk, &["--max-rate", &rate, "--prepare", prepare]);
    let wait = Duration::from_micros(dice.below(600_000));
    let dies = disk.a.take()?;
    let mut client = dies.client()?;
    std::thread::scope(|scope| -> Result<()> {
        let guest = &mut guest;
        let working = scope.spawn(move || while guest.work(&mut client, 5).is_ok() {});
        let began = command(&dies, &words)?;
        std::thread::sleep(wait);
        dies.kill()?;
        working.join().unwrap();
        let said = String::from_utf8_lossy(&began.stderr).into_owned();
        ensure!(began.status.success(), "it was refused: {said}");
        Ok(())
    })?;
    let moved = serve_again(&mut disk)?;
    if moved {
        // Once more while it goes on.
        std::thread::sleep(Duration::from_micros(dice.below(20_000)));
        disk.b.restart()?;
    }
    come_to_the_end(&mut guest, &mut disk, moved)?;
    Ok(moved)
}

fn small_disk(dir: &Path, mebibytes: u32) -> (SmallDisk, PathBuf) {
    let small = SmallDisk::mount(&dir.join("small"), mebibytes).unwrap();
    let image = dir.join("small/new.img");
    (small, image)
}

fn served(dir: &Path, mib: u64) -> Daemon {
    let image = dir.join("old.img");
    make_image(&image, 1, mib * MIB).unwrap();
    Daemon::start(dir, "old", &image, &[]).unwrap()
}

/// Before the switch a full new disk is no matter of the guest's.
#[test]
fn no_room_before_the_switch() {
    let dir = tempfile::tempdir().unwrap();
    let (small, image) = small_disk(dir.path(), 30);
    let daemon = served(dir.path(), 40);
    let mut client = daemon.client().unwrap();
    let to = image.display().to_string();
    daemon.command(&["move", &to, "--detach"]).unwrap();
    let full = |s: &serde_json::Value| s["disk_full"] == true;
    let status = daemon.wait_status("full", full).unwrap();
    assert_eq!(status["storage_move"]["phase"], "preparing", "{status}");
    assert!(status["notes"].to_string().contains("no space"), "{status}");
    client.write(0, &content(2, 0, 8192)).unwrap();
    client.flush().unwrap();
    assert!(client.read(39 * MIB, 4096).unwrap() == content(1, 39 * MIB, 4096));
    daemon.command(&["abort"]).unwrap();
    assert!(
        !image.exists(),
        "it still takes up what little room there is"
    );
    let status = daemon.status().unwrap();
    assert_eq!(status["storage_move"]["phase"], "failed", "{status}");
    drop(small);
    // With room it comes to its end.
    let (_large, image) = small_disk(dir.path(), 80);
    let to = image.display().to_string();
    let said = daemon.command(&["move", &to]).unwrap();
    assert!(said.contains(&to), "{said}");
    assert!(client.read(0, 4096).unwrap() == content(2, 0, 4096));
    assert!(client.read(39 * MIB, 4096).unwrap() == content(1, 39 * MIB, 4096));
    daemon.stop().unwrap();
}

/// The word of the new volume does not fit, when the old one is fenced already: the fence is lifted, and
/// the guest has only waited.
#[test]
fn no_room_for_the_switch_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (small, image) = small_disk(dir.path(), 80);
    let daemon = served(dir.path(), 40);
    let mut client = daemon.client().unwrap();
    let to = image.display().to_string();
    let slowly = ["move", &to, "--max-rate", "1MB/s", "--detach"];
    daemon.command(&slowly).unwrap();
    small.fill().unwrap();
    let mut writer = daemon.client().unwrap();
    let said = std::thread::scope(|scope| {
        let writing = scope.spawn(move || {
            for n in 0..200 {
                let at = n * 8192;
                writer.write(at, &content(2, at, 8192)).unwrap();
                writer.flush().unwrap();
            }
        });
        let switched = daemon.try_command(&["handoff"]).unwrap();
        writing.join().unwrap();
        assert_eq!(switched.status.code(), Some(1));
        String::from_utf8(switched.stderr).unwrap()
    });
    assert!(said.contains("stays where it is"), "{said}");
    let status = daemon.status().unwrap();
    assert_eq!(status["storage_move"]["phase"], "failed", "{status}");
    assert_eq!(status["state"], "local", "{status}");
    client.write(0, &content(3, 0, 8192)).unwrap();
    let old = dir.path().join("old.img");
    daemon.stop().unwrap();
    let daemon = Daemon::start(dir.path(), "old", &old, &[]).unwrap();
    let mut client = daemon.client().unwrap();
    assert!(client.read(0, 8192).unwrap() == content(3, 0, 8192));
    assert!(client.read(8192, 8192).unwrap() == content(2, 8192, 8192));
    daemon.stop().unwrap();
}

/// After the switch what is there is served, what is missing is read from the old image, and a write
/// that needs room is refused; all goes on once there is room.
#[test]
fn no_room_after_the_switch() {
    let dir = tempfile::tempdir().unwrap();
    let (small, image) = small_disk(dir.path(), 80);
    let daemon = served(dir.path(), 40);
    let mut client = daemon.client().unwrap();
    let to = image.display().to_string();
    let slowly = ["--prepare", "none", "--max-rate", "1MB/s", "--detach"];
    daemon
        .command(&[&["move", &to], &slowly[..]].concat())
        .unwrap();
    let copying = |s: &serde_json::Value| s["storage_move"]["phase"] == "copying";
    daemon.wait_status("after the switch", copying).unwrap();
    client.write(0, &content(2, 0, 8192)).unwrap();
    client.flush().unwrap();
    small.fill().unwrap();
    daemon.command(&["limit", "none"]).unwrap();
    daemon.wait_event("disk-full").unwrap();
    let far = 39 * MIB;
    assert!(client.read(0, 4096).unwrap() == content(2, 0, 4096));
    assert!(client.read(far, 4096).unwrap() == content(1, far, 4096));
    let refused = client.try_write(far, &content(2, far, 4096)).unwrap();
    assert_eq!(refused, Answer::ENOSPC);
    let status = daemon.status().unwrap();
    assert_eq!(status["disk_full"], true, "{status}");
    assert_eq!(status["poisoned"], false, "{status}");
    small.free().unwrap();
    let done = |s: &serde_json::Value| s["storage_move"]["phase"] == "done";
    daemon.wait_status("in the new image", done).unwrap();
    assert!(client.read(0, 4096).unwrap() == content(2, 0, 4096));
    assert!(client.read(far, 4096).unwrap() == content(1, far, 4096));
    daemon.stop().unwrap();
}

/// Nothing is left of it, and the old image is served as before.
#[test]
fn a_daemon_that_ends_before_the_switch_gives_the_move_up() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = served(dir.path(), 40);
    let new = dir.path().join("new.img");
    let to = new.display().to_string();
    let slowly = ["move", &to, "--max-rate", "1MB/s", "--detach"];
    daemon.command(&slowly).unwrap();
    daemon.stop().unwrap();
    assert!(!new.exists() && !dir.path().join("new.img.hikkoshi").exists());
    let old = dir.path().join("old.img");
    let daemon = Daemon::start(dir.path(), "old", &old, &[]).unwrap();
    let mut client = daemon.client().unwrap();
    client.write(0, &content(2, 0, 4096)).unwrap();
    daemon.stop().unwrap();
}
