//! Moves back by difference: daemons in this process, on real files.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
#[path = "site/late.rs"]
mod late;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::path::Path;

use guest::Guest;
use hikkoshi_daemon::config::HandoffPolicy;
use hikkoshi_daemon::events::EventKind;
use hikkoshi_daemon::status::LifeState;
use hikkoshi_store::state::StateDir;
use hikkoshi_wan::transport::session::Told;
use late::{assert_is_released, handoff_to, release_by_hand};
use site::{On, Site, Wanted};
use support::{pattern, wait_until};
use tempfile::TempDir;

const SIZE: usize = 8 << 20;

/// Far more than frames and questions take, and far less than the disk.
const FEW_BYTES: u64 = 1 << 20;

fn recording(from: &Site) -> Wanted {
    let mut wanted = Wanted::from(On::Unix, &from.uri());
    wanted.source().way_back = true;
    wanted
}

/// A return that waits for its handoff.
fn returning(from: &Site) -> Wanted {
    let mut wanted = recording(from);
    wanted.source().comes_back = true;
    wanted.source().handoff = HandoffPolicy::Command;
    wanted
}

fn moved(dir: &Path, name: &str, wanted: Wanted) -> Site {
    let site = Site::start(dir, name, wanted);
    wait_until("every block is here", || site.is_local());
    site
}

/// Writes at both ends and in the middle; gives what the disk holds then.
fn change(site: &Site, data: &mut [u8], value: u8) {
    let mut guest = Guest::connect(&site.address());
    for at in [0, 3 << 20, (5 << 20) + 512, SIZE - 4096] {
        let bytes = [value; 4096];
        let len = if at % 4096 == 0 { 4096 } else { 512 };
        guest.write(at as u64, &bytes[..len]);
        data[at..at + len].fill(value);
    }
}

fn come_back(site: &Site) {
    wait_until("it is prepared", || site.status().prepared == Some(true));
    site.export().handoff().unwrap();
    wait_until("every block is back", || site.is_local());
}

fn told(site: &Site, kind: EventKind) -> bool {
    site.export().events(0).iter().any(|e| e.kind == kind)
}

fn changed(image: &Path) {
    // Something that opens the image and writes what is there already.
    let bytes = std::fs::read(image).unwrap();
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(&bytes[..512], 0).unwrap();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    file.set_modified(later).unwrap();
}

#[test]
fn a_disk_goes_there_and_back_and_there_again() {
    let dir = TempDir::new().unwrap();
    let mut data = pattern(SIZE);
    let mut there = Site::with(dir.path(), "a", &data, On::Unix);
    let mut here = moved(dir.path(), "b", recording(&there));
    for round in 0..3 {
        assert!(here.status().way_back.kept);
        change(&here, &mut data, 0xa0 + round);
        let name = there
            .image
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        there.stop();
        let back = Site::start(dir.path(), &name, returning(&here));
        assert_eq!(back.status().state, LifeState::Standby);
        // What is written while it is prepared comes as well.
        change(&here, &mut data, 0xb0 + round);
        come_back(&back);
        let wire = back.status().counters;
        assert!(back.status().wire_bytes < FEW_BYTES, "{wire:?}");
        assert!(back.contents() == data, "round {round}");
        assert_eq!(here.status().state, LifeState::Departed);
        (there, here) = (here, back);
    }
}

#[test]
fn a_disk_comes_back_from_a_third_place() {
    let dir = TempDir::new().unwrap();
    let mut data = pattern(SIZE);
    let a = Site::with(dir.path(), "a", &data, On::Unix);
    let b = moved(dir.path(), "b", recording(&a));
    change(&b, &mut data, 0x11);
    let mut guest = Guest::connect(&b.address());
    guest.write(1 << 20, &[0x77; 4096]);
    data[1 << 20..(1 << 20) + 4096].fill(0x77);
    // A restart in between.
    let uri = a.uri();
    b.stop();
    let b = Site::start(dir.path(), "b", {
        let mut wanted = Wanted::from(On::Unix, &uri);
        wanted.source().way_back = true;
        wanted
    });
    assert!(b.status().way_back.kept && b.status().way_back.changed_bytes == 5 * 4096);
    let mut wanted = recording(&b);
    wanted.source().handoff = HandoffPolicy::Command;
    wanted.source().background = false;
    let c = Site::start(dir.path(), "c", wanted);
    c.export().handoff().unwrap();
    // What the older copies lack is told before all is here.
    let bases = dir.path().join("c.hikkoshi/bases");
    wait_until("it is told of the older copies", || bases.exists());
    c.stop();
    let c = moved(dir.path(), "c", recording(&b));
    assert!(bases.exists());
    change(&c, &mut data, 0x22);
    a.stop();
    let a = Site::start(dir.path(), "a", returning(&c));
    come_back(&a);
    assert!(a.status().wire_bytes < FEW_BYTES);
    assert!(a.contents() == data);
    // B as well, although its copy is older than A's.
    let bases = dir.path().join("a.hikkoshi/bases");
    wait_until("it is told of the older copies", || bases.exists());
    change(&a, &mut data, 0x33);
    b.stop();
    let b = Site::start(dir.path(), "b", returning(&a));
    come_back(&b);
    assert!(b.contents() == data);
}

#[test]
fn a_return_that_was_given_up_can_be_begun_again() {
    let dir = TempDir::new().unwrap();
    let mut data = pattern(SIZE);
    let a = Site::with(dir.path(), "a", &data, On::Unix);
    let b = moved(dir.path(), "b", recording(&a));
    change(&b, &mut data, 0x44);
    a.stop();
    let a = Site::start(dir.path(), "a", returning(&b));
    wait_until("it is prepared", || a.status().prepared == Some(true));
    // A restart before the handoff begins with what is known to be overwritten.
    a.stop();
    let a = Site::start(dir.path(), "a", returning(&b));
    wait_until("it is prepared", || a.status().prepared == Some(true));
    a.export().abort().unwrap();
    a.stop();
    assert_eq!(b.status().state, LifeState::Local);
    change(&b, &mut data, 0x55);
    // A mixture of two disks is served to nobody.
    let refused = Site::try_start(dir.path(), "a", Wanted::plain(On::Unix))
        .err()
        .unwrap();
    assert!(refused.contains("--return"), "{refused}");
    let a = Site::start(dir.path(), "a", returning(&b));
    come_back(&a);
    assert!(a.status().wire_bytes < FEW_BYTES);
    assert!(a.contents() == data);
}

#[test]
fn an_old_copy_that_something_else_has_written_is_no_base() {
    let dir = TempDir::new().unwrap();
    let mut data = pattern(SIZE);
    let a = Site::with(dir.path(), "a", &data, On::Unix);
    let b = moved(dir.path(), "b", recording(&a));
    change(&b, &mut data, 0x66);
    let image = a.image.clone();
    a.stop();
    changed(&image);
    let refused = Site::try_start(dir.path(), "a", returning(&b))
        .err()
        .unwrap();
    assert!(refused.contains("--overwrite"), "{refused}");
    // Refused, it is what it was.
    let a = Site::start(dir.path(), "a", Wanted::plain(On::Unix));
    assert_eq!(a.status().state, LifeState::Departed);
    a.stop();
    let mut wanted = returning(&b);
    wanted.source().overwrite = true;
    let a = Site::start(dir.path(), "a", wanted);
    come_back(&a);
    assert!(a.contents() == data);
}

#[test]
fn a_difference_ends_when_something_else_writes_the_image() {
    let dir = TempDir::new().unwrap();
    let data = pattern(SIZE);
    let a = Site::with(dir.path(), "a", &data, On::Unix);
    let b = moved(dir.path(), "b", recording(&a));
    let image = b.image.clone();
    b.stop();
    changed(&image);
    let b = Site::start(dir.path(), "b", Wanted::plain(On::Unix));
    assert!(!b.status().way_back.kept && told(&b, EventKind::WayBack));
    assert_eq!(b.status().state, LifeState::Local);
    a.stop();
    let refused = Site::try_start(dir.path(), "a", returning(&b))
        .err()
        .unwrap();
    assert!(refused.contains("--overwrite"), "{refused}");
}

/// Simulator, seed 13835058055282166843: the power was cut, and the next start failed after it had made its
/// memory and before it had recorded that the way back is closed. The start after that found that memory,
/// as after a kill, and believed what had been recorded.
#[test]
fn a_start_that_fails_after_a_power_cut_does_not_keep_the_way_back() {
    for all in [true, false] {
        let dir = TempDir::new().unwrap();
        let a = Site::with(dir.path(), "a", &pattern(SIZE), On::Unix);
        let wanted = || {
            let mut wanted = recording(&a);
            wanted.source().background = all;
            wanted
        };
        let b = Site::start(dir.path(), "b", wanted());
        Guest::connect(&b.address()).write(0, &[0x91; 4096]);
        wait_until("every block is here", || !all || b.is_local());
        assert!(b.status().way_back.kept);
        // What a power cut leaves: no word of a close, and no memory.
        let path = dir.path().join("b.hikkoshi");
        let state = std::fs::read(path.join("volume")).unwrap();
        b.stop();
        std::fs::write(path.join("volume"), state).unwrap();
        // The snapshot cannot be written.
        let in_the_way = path.join("map.new");
        std::fs::create_dir(&in_the_way).unwrap();
        if let Ok(started) = Site::try_start(dir.path(), "b", wanted()) {
            assert!(all, "without a snapshot");
            started.stop();
        }
        std::fs::remove_dir(&in_the_way).unwrap();
        let b = Site::start(dir.path(), "b", wanted());
        assert!(!b.status().way_back.kept, "all: {all}");
    }
}

#[test]
fn a_released_way_back_is_recorded_no_more() {
    let dir = TempDir::new().unwrap();
    let mut data = pattern(SIZE);
    let a = Site::with(dir.path(), "a", &data, On::Unix);
    let b = moved(dir.path(), "b", recording(&a));
    let mut guest = Guest::connect(&b.address());
    guest.write(0, &[1; 512]);
    b.export().release(false).unwrap();
    guest.write(512, &[2; 512]);
    data[..512].fill(1);
    data[512..1024].fill(2);
    assert!(!b.status().way_back.kept);
    assert!(b.export().release(false).is_err(), "there is nothing more");
    for left in ["map", "log", "bases"] {
        assert!(!dir.path().join("b.hikkoshi").join(left).exists(), "{left}");
    }
    b.stop();
    let b = Site::start(dir.path(), "b", Wanted::plain(On::Unix));
    assert!(b.contents() == data);
    assert!(!b.status().way_back.kept);
}

/// A move whose fence was lifted by hand gets the disk no more, also after the disk has gone away and
/// come back. It was forgotten, and its VM would have gone on with memory of an older disk.
#[test]
fn a_move_that_was_released_by_hand_stays_so_over_a_return() {
    let dir = TempDir::new().unwrap();
    let data = pattern(SIZE);
    let a = Site::with(dir.path(), "a", &data, On::Unix);
    release_by_hand(&a);
    let b = moved(dir.path(), "b", recording(&a));
    a.stop();
    // One that is given up, and one that is not.
    let a = Site::start(dir.path(), "a", returning(&b));
    a.export().abort().unwrap();
    a.stop();
    let a = Site::start(dir.path(), "a", returning(&b));
    come_back(&a);
    assert_is_released(&a);
    assert_eq!(a.status().state, LifeState::Local);
    assert!(a.contents() == data);
}

/// A return was given up, and its source, fenced for it by then, could not be told so. Then the source was
/// given up for lost by hand. When it came back it was told, and took writes as well.
#[test]
fn whoever_was_released_against_by_hand_is_not_told_to_go_on() {
    let dir = TempDir::new().unwrap();
    let data = pattern(SIZE);
    let a = Site::with(dir.path(), "a", &data, On::Unix);
    let b = moved(dir.path(), "b", recording(&a));
    a.stop();
    let a = Site::start(dir.path(), "a", returning(&b));
    let state = dir.path().join("a.hikkoshi");
    let id = StateDir::whose(&state).unwrap().unwrap().volume_id;
    let told = handoff_to(&b, id);
    assert!(matches!(told, Ok(Told::Fenced { .. })), "{told:?}");
    b.stop();
    a.export().abort().unwrap();
    a.stop();
    assert!(StateDir::whose(&state).unwrap().unwrap().ties.gave_up);
    let a = Site::start(dir.path(), "a", Wanted::plain(On::Unix));
    a.daemon.let_answers_grow_old();
    a.export().release(true).unwrap();
    a.stop();
    let b = Site::start(dir.path(), "b", Wanted::plain(On::Unix));
    let a = Site::start(dir.path(), "a", Wanted::plain(On::Unix));
    Guest::connect(&a.address()).write(0, &[1; 512]);
    assert_eq!(b.status().state, LifeState::Departed);
}
