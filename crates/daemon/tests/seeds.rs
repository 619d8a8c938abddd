//! A disk whose older copy is at the new site already: two daemons, over frames and plain NBD.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};

use guest::Guest;
use hikkoshi_daemon::config::{HandoffPolicy, Packing, Transport};
use hikkoshi_daemon::events::EventKind;
use site::{On, Site, Wanted};
use support::{pattern, wait_until};
use tempfile::TempDir;

const SIZE: usize = 64 << 20;
const BLOCK: usize = 4096;

/// An older copy: one block in a hundred differs, scattered.
fn older(disk: &[u8]) -> Vec<u8> {
    let mut old = disk.to_vec();
    let blocks = disk.len() / BLOCK;
    for n in 0..blocks / 100 {
        // Odd, so that none comes twice: there are a power of two of them.
        let at = n * 7919 % blocks * BLOCK;
        old[at..at + BLOCK].fill(0xa5);
    }
    let pairs = old.chunks(BLOCK).zip(disk.chunks(BLOCK));
    assert_eq!(pairs.filter(|(a, b)| a != b).count(), blocks / 100);
    old
}

/// Seeds are looked in however fast the link is, or the figures would be chance.
fn wanted(uri: &str, seeds: &[PathBuf]) -> Wanted {
    let mut wanted = Wanted::from(On::Unix, uri);
    wanted.source().seed_images = seeds.to_vec();
    wanted.source().seed_always = true;
    wanted.compress = Packing::None;
    wanted
}

fn seeding_events(site: &Site) -> Vec<String> {
    let events = site.export().events(0).into_iter();
    let seeding = events.filter(|e| e.kind == EventKind::Seeding);
    seeding.map(|e| e.text).collect()
}

/// The disk at the old site.
fn source(dir: &Path, transport: Transport) -> (Site, Vec<u8>) {
    let data = pattern(SIZE);
    std::fs::write(dir.join("old"), &data).unwrap();
    let plain = Wanted {
        transport,
        // Or little would cross whatever happens.
        compress: Packing::None,
        ..Wanted::plain(On::Tcp)
    };
    (Site::start(dir, "old", plain), data)
}

fn assert_cheap(new: &Site) {
    let status = new.status();
    let size = u64::try_from(SIZE).unwrap();
    println!("{} of {size} bytes crossed", status.wire_bytes);
    assert!(
        status.wire_bytes * 100 <= size * 3,
        "{} bytes crossed",
        status.wire_bytes
    );
    // What a guest has written first is neither seeded nor fetched.
    assert!(status.seeded_bytes >= size / 100 * 97, "{status:?}");
}

#[test]
fn with_the_previous_copy_little_crosses_the_wire() {
    let dir = TempDir::new().unwrap();
    let (old, data) = source(dir.path(), Transport::Auto);
    let previous = dir.path().join("previous");
    std::fs::write(&previous, older(&data)).unwrap();
    let new = Site::start(
        dir.path(),
        "new",
        wanted(&old.uri(), std::slice::from_ref(&previous)),
    );
    wait_until("it is local", || new.is_local());
    assert_cheap(&new);
    assert!(new.contents() == data);
    assert!(
        std::fs::read(previous).unwrap() == older(&data),
        "only read"
    );
    // The index of other offsets is built meanwhile: what it says may come before.
    let events = seeding_events(&new);
    let mut said = events.iter();
    assert!(
        said.any(|text| text.starts_with("looking in ")),
        "{events:?}"
    );
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}

#[test]
fn the_old_copy_itself_is_the_cheap_way_back() {
    let dir = TempDir::new().unwrap();
    let (old, data) = source(dir.path(), Transport::Auto);
    let image = dir.path().join("new");
    std::fs::write(&image, older(&data)).unwrap();
    let mut wanted = wanted(&old.uri(), &[image]);
    wanted.source().overwrite = true;
    let new = Site::start(dir.path(), "new", wanted);
    wait_until("it is local", || new.is_local());
    assert_cheap(&new);
    assert!(new.contents() == data);
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}

#[test]
fn nothing_is_copied_ahead_and_a_guest_that_writes_keeps_what_it_wrote() {
    let dir = TempDir::new().unwrap();
    let (old, mut data) = source(dir.path(), Transport::Auto);
    let previous = dir.path().join("previous");
    std::fs::write(&previous, older(&data)).unwrap();
    let mut wanted = wanted(&old.uri(), &[previous]);
    wanted.source().handoff = HandoffPolicy::FirstWrite;
    let new = Site::start(dir.path(), "new", wanted);
    let status = new.status();
    assert_eq!(status.prepared, None, "{status:?}");
    assert!(status.notes.join("\n").contains("after the handoff"));
    let mut guest = Guest::connect(&new.address());
    for n in 0..200 {
        let at = n * 313_856;
        guest.write(u64::try_from(at).unwrap(), &[0xee; 1024]);
        data[at..at + 1024].fill(0xee);
    }
    wait_until("it is local", || new.is_local());
    assert_cheap(&new);
    assert!(new.contents() == data);
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}

/// Cuts the disk into files of random lengths and lays them out in another order, with other bytes
/// between them: an image whose file system was made anew.
fn relaid(disk: &[u8], longest: usize) -> Vec<u8> {
    let mut lot = 0x2545_f491_4f6c_dd1d_u64;
    let mut draw = |below: usize| {
        lot ^= lot << 13;
        lot ^= lot >> 7;
        lot ^= lot << 17;
        usize::try_from(lot >> 33).unwrap() % below
    };
    let (mut files, mut rest) = (Vec::new(), disk);
    while !rest.is_empty() {
        let len = (1 + draw(longest)) * BLOCK;
        let (file, after) = rest.split_at(len.min(rest.len()));
        files.push(file);
        rest = after;
    }
    for n in (1..files.len()).rev() {
        files.swap(n, draw(n + 1));
    }
    let mut image = vec![0x11; 3 * BLOCK];
    for file in files {
        image.extend_from_slice(file);
        if draw(4) == 0 {
            image.resize(image.len() + BLOCK, 0x22);
        }
    }
    image
}

#[test]
fn with_an_image_that_has_its_files_elsewhere_little_crosses_the_wire() {
    for longest in [1, 300] {
        let dir = TempDir::new().unwrap();
        let (old, data) = source(dir.path(), Transport::Auto);
        let other = dir.path().join("other");
        std::fs::write(&other, relaid(&data, longest)).unwrap();
        let mut wanted = wanted(&old.uri(), &[other]);
        wanted.source().handoff = HandoffPolicy::Command;
        let new = Site::start(dir.path(), "new", wanted);
        // There is time for it while the disk stands by.
        wait_until("the seed is indexed", || {
            let events = seeding_events(&new);
            events.iter().any(|text| text.contains("at any offset"))
        });
        new.export().handoff().unwrap();
        wait_until("it is local", || new.is_local());
        let (status, size) = (new.status(), u64::try_from(SIZE).unwrap());
        println!("{} of {size} bytes crossed", status.wire_bytes);
        assert!(status.wire_bytes * 100 <= size * 2, "{status:?}");
        // A third of it is zeroes, which the source told.
        assert!(status.seeded_bytes >= size / 100 * 65, "{status:?}");
        assert!(new.contents() == data);
        let events = seeding_events(&new);
        let last = events.last().unwrap();
        assert!(last.contains("at other offsets"), "{events:?}");
        new.daemon.shutdown().unwrap();
        old.daemon.shutdown().unwrap();
    }
}

#[test]
fn a_restart_goes_on_with_the_seed() {
    let dir = TempDir::new().unwrap();
    let (old, data) = source(dir.path(), Transport::Auto);
    let previous = dir.path().join("previous");
    std::fs::write(&previous, older(&data)).unwrap();
    let seeds = [previous];
    let new = Site::start(dir.path(), "new", wanted(&old.uri(), &seeds));
    wait_until("something came", || new.status().seeded_bytes > 0);
    new.daemon.shutdown().unwrap();
    let new = Site::start(dir.path(), "new", wanted(&old.uri(), &seeds));
    wait_until("it is local", || new.is_local());
    let size = u64::try_from(SIZE).unwrap();
    assert!(new.status().wire_bytes * 100 <= size * 3);
    assert!(new.contents() == data);
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}

#[test]
fn a_plain_source_has_no_hashes_and_that_is_said() {
    let dir = TempDir::new().unwrap();
    let (old, data) = source(dir.path(), Transport::Nbd);
    let previous = dir.path().join("previous");
    std::fs::write(&previous, &data).unwrap();
    let new = Site::start(dir.path(), "new", wanted(&old.uri(), &[previous]));
    wait_until("it is local", || new.is_local());
    assert!(new.contents() == data);
    assert_eq!(new.status().seeded_bytes, 0);
    let events = seeding_events(&new);
    assert!(events[0].contains("plain NBD"), "{events:?}");
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}
