//! Seeds that have the disk's content at other offsets: what is found, and that nothing wrong ever is.

use super::index::{MAX_BYTES, Place, Table};
use super::indexing::{Built, make};
use super::tests::{BLOCK, DISK, ELSEWHERE, World, data, in_memory, seed, until, world};
use super::*;
use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_engine::mover::Phase;
use hikkoshi_wan::Lane;
use hikkoshi_wan::transport::message::hashes_of;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

const GRAIN: u32 = 4096;

fn block() -> usize {
    usize::try_from(BLOCK).unwrap()
}

/// The whole blocks of the disk in an order by lot, from a number that decides it.
fn shuffled(of: &[u8], mut lot: u64) -> Vec<u8> {
    let mut blocks: Vec<&[u8]> = of.chunks_exact(block()).collect();
    for n in (1..blocks.len()).rev() {
        lot = lot.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(11);
        let to = usize::try_from(lot >> 33).unwrap() % (n + 1);
        blocks.swap(n, to);
    }
    blocks.concat()
}

/// A volume whose index is there before anything is looked for.
fn indexed(seeds: &[PathBuf]) -> World {
    let w = world(in_memory(), Path::new(ELSEWHERE), seeds);
    w.volume.seeding.index.want();
    w.volume.index_seeds(|| false);
    assert!(w.volume.seeding.index.built().is_some());
    w
}

fn opened(path: &Path) -> SeedImage {
    SeedImage::open(path, Path::new(ELSEWHERE)).unwrap()
}

#[test]
fn a_seed_with_the_blocks_in_another_order_has_all_of_them() {
    let dir = TempDir::new().unwrap();
    for lot in 1..4 {
        let mixed = seed(&dir, "mixed", &shuffled(&data(), lot));
        let mut w = indexed(&[mixed]);
        w.begin();
        w.finish();
        assert!(w.image() == data());
        // The last block has 512 bytes, and is in no index.
        assert_eq!(w.seeded(), DISK / BLOCK * BLOCK);
        let told = w.kinds();
        assert!(told[0].contains("at any offset"), "{told:?}");
        assert!(
            told.last().unwrap().contains("at other offsets"),
            "{told:?}"
        );
    }
}

/// Files that lie elsewhere, in two seeds, with other content between them.
#[test]
fn files_at_other_offsets_are_found() {
    let dir = TempDir::new().unwrap();
    let data = data();
    let at = |block: u64| usize::try_from(block * BLOCK).unwrap();
    // From block, how many blocks: of the disk's 2560 only the last 510 are in no seed.
    let files = [(0, 700), (700, 3), (703, 500), (1203, 847)];
    let (mut one, mut two) = (vec![0xee_u8; at(5)], vec![0_u8; at(1)]);
    for (n, (start, len)) in files.into_iter().enumerate() {
        let file = &data[at(start)..at(start + len)];
        let into = if n % 2 == 0 { &mut one } else { &mut two };
        into.extend_from_slice(file);
        into.extend(std::iter::repeat_n(0x77, at(1 + start % 5)));
    }
    let seeds = [seed(&dir, "one", &one), seed(&dir, "two", &two)];
    let mut w = indexed(&seeds);
    w.begin();
    w.finish();
    assert!(w.image() == data);
    assert_eq!(w.seeded(), 2050 * BLOCK);
}

/// The index is only made when much is not at the same offset. What was passed over until then and is
/// not fetched yet is looked for again.
#[test]
fn what_was_passed_over_before_the_index_came_is_looked_for_again() {
    let dir = TempDir::new().unwrap();
    let mixed = seed(&dir, "mixed", &shuffled(&data(), 9));
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[mixed]);
    w.begin();
    // All but what the background copy has asked for until then, and waits for: four of the first windows.
    w.answer_hashes_until("most is found", || w.seeded() > DISK / 2);
    assert!(w.volume.seeding.index.is_wanted());
    w.finish();
    assert!(w.image() == data());
}

#[test]
fn a_seed_at_the_same_offset_is_not_indexed() {
    let dir = TempDir::new().unwrap();
    let mut old = data();
    for n in 0..25 {
        old[n * 409_600 + 5] ^= 1;
    }
    let old = seed(&dir, "old", &old);
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[old]);
    w.begin();
    w.finish();
    assert!(w.image() == data());
    assert!(!w.volume.seeding.index.is_wanted());
    let told = w.kinds();
    assert!(
        told.iter().all(|text| !text.contains("at any offset")),
        "{told:?}"
    );
    assert_eq!(w.seeded(), DISK - 25 * BLOCK);
}

/// The rule above all: what was read is hashed before it is installed, wherever a hint led to.
#[test]
fn an_index_that_is_wrong_everywhere_installs_nothing() {
    let dir = TempDir::new().unwrap();
    let data = data();
    let mixed = shuffled(&data, 5);
    let path = seed(&dir, "mixed", &mixed);
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[path]);
    let mut table = Table::with_room(DISK / BLOCK, MAX_BYTES);
    let blocks = mixed.len() / block();
    for (n, bytes) in mixed.chunks(block()).enumerate() {
        // The next block, or one behind the end.
        let grain = match n % 3 {
            0 => blocks + n,
            _ => (n + 1) % blocks,
        };
        let grain = u64::try_from(grain).unwrap();
        let hash = hashes_of(bytes, GRAIN)[0];
        table.insert(&hash, Place { seed: 0, grain });
    }
    let grain = GRAIN;
    w.volume.seeding.index.set(Built { table, grain });
    w.begin();
    w.finish();
    assert!(w.image() == data);
    // What lies where it should by chance.
    let there = mixed.chunks(block()).zip(data.chunks(block()));
    let same = there.filter(|(a, b)| a == b).count();
    assert_eq!(w.seeded(), u64::try_from(same).unwrap() * BLOCK);
    assert_eq!(w.volume.seeding.elsewhere_bytes.load(Ordering::Relaxed), 0);
}

/// The seed is written after it was indexed, and while it is read.
#[test]
fn a_seed_that_changes_under_its_index_does_no_harm() {
    let dir = TempDir::new().unwrap();
    let mixed = shuffled(&data(), 3);
    let path = seed(&dir, "mixed", &mixed);
    for lot in 0..5 {
        std::fs::write(&path, &mixed).unwrap();
        let mut w = indexed(std::slice::from_ref(&path));
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (path, stop, mixed) = (path.clone(), Arc::clone(&stop), mixed.clone());
            std::thread::spawn(move || {
                use std::os::unix::fs::FileExt;
                let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
                let mut n: u64 = lot;
                while !stop.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(25_214_903_917_u64).wrapping_add(11);
                    let to = (n >> 16) % (DISK / BLOCK) * BLOCK;
                    let from = usize::try_from((n >> 40) % (DISK - BLOCK)).unwrap();
                    let other = &mixed[from.min(mixed.len() - block())..][..block()];
                    file.write_all_at(other, to).unwrap();
                    if n.is_multiple_of(64) {
                        file.set_len(to).unwrap();
                        file.set_len(DISK).unwrap();
                    }
                }
            })
        };
        w.begin();
        w.finish();
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        assert!(w.image() == data());
    }
}

#[test]
fn what_a_guest_writes_meanwhile_stays_wherever_the_rest_is_found() {
    let dir = TempDir::new().unwrap();
    let path = seed(&dir, "mixed", &shuffled(&data(), 4));
    let mut w = indexed(&[path]);
    let mut expected = data();
    w.begin();
    w.asked();
    let mut n = 3_u64;
    until("everything is here", || {
        for _ in 0..20 {
            n = n.wrapping_mul(25_214_903_917).wrapping_add(11);
            let at = (n >> 8) % (DISK / 512 - 8) * 512;
            let new = vec![(n >> 24).to_le_bytes()[0]; 512 * 3];
            w.volume.write(Some(&w.relocation), at, &new).unwrap();
            let at = usize::try_from(at).unwrap();
            expected[at..at + new.len()].copy_from_slice(&new);
            w.memory.complete_all();
        }
        w.relocation.tick();
        w.relocation.with_mover(|m| m.phase()) == Phase::Complete
    });
    w.finish();
    assert!(w.image() == expected);
}

/// Demand is asked for at once, whatever is being looked for.
#[test]
fn reads_wait_for_no_index() {
    let dir = TempDir::new().unwrap();
    let path = seed(&dir, "mixed", &shuffled(&data(), 6));
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[path]);
    w.begin();
    w.asked();
    w.relocation
        .read(ByteRange::at(5 * BLOCK, BLOCK), Box::new(|_| ()));
    let requests = w.memory.requests();
    assert!(requests.iter().any(|r| r.lane == Lane::Demand));
    w.finish();
    assert!(w.image() == data());
}

#[test]
fn zeroes_and_holes_are_left_out_and_what_there_is_no_room_for_is_told() {
    use std::os::unix::fs::FileExt;
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sparse");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    let data = data();
    file.write_all_at(&data[..100 * block()], 300 * BLOCK)
        .unwrap();
    file.write_all_at(&vec![0; 50 * block()], 1000 * BLOCK)
        .unwrap();
    file.write_all_at(&data[100 * block()..110 * block()], (1 << 30) - 10 * BLOCK)
        .unwrap();
    let images = [opened(&path), opened(&path)];
    let made = make(&images, GRAIN, MAX_BYTES, || true).unwrap();
    assert_eq!((made.table.len(), made.left_out), (110, 0));
    for (n, bytes) in (0..110).zip(data.chunks(block())) {
        let grain = match n {
            0..100 => 300 + n,
            _ => (1 << 18) - 110 + n,
        };
        let found = made.table.find(&hashes_of(bytes, GRAIN)[0]);
        assert_eq!(found, Some(Place { seed: 0, grain }));
    }
    assert_eq!(made.table.find(&hashes_of(&[0; 4096], GRAIN)[0]), None);
    // Room for 40 only.
    let made = make(&images, GRAIN, 50 * 8, || true).unwrap();
    assert_eq!(made.table.len(), 40);
    assert!(made.left_out >= 70 * BLOCK, "{}", made.left_out);
    // And it can be ended.
    assert!(make(&images, GRAIN, MAX_BYTES, || false).is_none());
}
