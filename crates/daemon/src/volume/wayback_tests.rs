//! The way back: what differs from the disk at the handoff is never told too small.

#![allow(
    clippy::cast_possible_truncation,
    reason = "a disk of a few hundred KiB"
)]

use std::sync::Arc;

use hikkoshi_engine::blocks::BlockSet;
use hikkoshi_engine::geometry::{BlockIndex, BlockRange, ByteRange};
use hikkoshi_engine::residency::Residency;
use hikkoshi_store::state::{StateDir, Ties};
use hikkoshi_store::{Fault, FaultyStore, MemoryStore, Store as _, StoreOp, ZeroMode};

use super::tests::{DISK, World, assemble, words};
use crate::config::HandoffPolicy;
use crate::verification::VerifyState;

/// The id of the world's volume, and so of the move that brought the disk.
const OWN: [u8; 16] = [1; 16];
const OLDER: [u8; 16] = [3; 16];

/// The first block.
const FIRST: BlockRange = BlockRange { start: 0, end: 1 };

fn recording() -> World {
    let ties = Ties {
        way_back: true,
        ..Ties::default()
    };
    World::with_ties(None, HandoffPolicy::Now, ties)
}

struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % n
    }
}

/// Every block that differs from the disk at the handoff must be told. `handed_on` is what an older
/// copy lacked besides.
fn check(world: &World, handed_on: Option<&BlockSet>) {
    let geometry = world.geometry;
    let seen = world.read_all();
    for (base, more) in [(OWN, None), (OLDER, handed_on)] {
        let Some(told) = world.volume.since(base) else {
            continue;
        };
        let told: BlockSet = told.into_iter().collect();
        for block in 0..geometry.blocks() {
            let range = BlockRange::one(BlockIndex(block));
            let bytes = geometry.bytes(range);
            let at = bytes.start as usize..bytes.end as usize;
            let differs = seen[at.clone()] != world.original[at];
            let lacked = more.is_some_and(|set: &BlockSet| set.holds(range));
            assert!(
                !(differs || lacked) || told.holds(range),
                "block {block} has changed and is not told"
            );
        }
    }
}

fn change(world: &mut World, chance: &mut Chance) {
    let sectors = DISK / 512;
    let at = chance.below(sectors);
    let count = (1 + chance.below(20)).min(sectors - at);
    let value = 1 + chance.below(200) as u8;
    let data = vec![value; (count * 512) as usize];
    match chance.below(5) {
        0 => world.zero(ByteRange::at(at * 512, count * 512)),
        // By somebody who does not know that anything is recorded.
        1 if world.volume.is_local() => {
            world.write_past(at * 512, &data);
        }
        _ => world.write(at * 512, &data),
    }
}

/// One life: changes, flushes, kills, and power cuts in some, before completion and after it.
fn life(seed: u64) {
    let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let cuts = chance.below(3) == 0;
    let mut cut = false;
    let mut world = recording();
    let set: BlockSet = (0..chance.below(4))
        .map(|_| BlockRange::one(BlockIndex(chance.below(world.geometry.blocks()))))
        .collect();
    let runs = set.runs(world.geometry.blocks());
    let inherits = chance.below(2) == 0;
    if inherits {
        world.volume.inherit(vec![(OLDER, runs)]).unwrap();
    }
    let completes_at = chance.below(20);
    for step in 0..40 {
        if step == completes_at {
            world.finish();
            assert_eq!(world.volume.is_plain(), cut);
        }
        match chance.below(12) {
            0 => world.kill(),
            1 if cuts => {
                world.power_cut(chance.below(u64::MAX) | 1);
                cut = true;
            }
            2 | 3 => world.flush(),
            4 => world.pass_time(20),
            5 => world.read(chance.below(DISK / 512) * 512, 512),
            _ => change(&mut world, &mut chance),
        }
        // What was not flushed may be there after a power cut, and nothing tells which.
        assert_eq!(world.volume.since(OWN).is_none(), cut);
        assert_eq!(world.volume.since(OLDER).is_none(), cut || !inherits);
        check(&world, inherits.then_some(&set));
    }
    world.finish();
    check(&world, inherits.then_some(&set));
}

/// A block that had come wrong, or had been damaged since, was found, and accepted: it was in no difference, and
/// the guest would have had another one after the way back.
#[test]
fn differences_that_were_accepted_end_the_recording() {
    let mut world = recording();
    world.source.set_connected(true);
    world.source.complete_all();
    world.read(0, 4096);
    world.source.complete_all();
    world.check_reads();
    let wrong = [0x55; 512];
    world.store.write(512, &wrong).unwrap();
    world.oracle.write(512, &wrong);
    world.volume.begin_verify().unwrap();
    while world.volume.verify_status().state == VerifyState::Running {
        world.source.complete_all();
        std::thread::yield_now();
    }
    assert_eq!(world.volume.verify_status().state, VerifyState::Differs);
    assert!(world.volume.since(OWN).is_some());
    world.volume.accept_differences().unwrap();
    assert_eq!(world.volume.since(OWN), None);
    world.finish();
    assert!(world.volume.is_plain());
}

/// A world in which block 0 is clean and all else absent, over a store that can be told to fail.
fn one_clean() -> (World, Arc<FaultyStore<MemoryStore>>) {
    let mut world = recording();
    let store = Arc::new(FaultyStore::new(MemoryStore::new(DISK)));
    store.write(0, &world.original[..4096]).unwrap();
    world.dir = world.dir.kill();
    let state = StateDir::open_in(Box::new(world.dir.clone()), None).unwrap();
    let residency = Residency::new(world.geometry, Box::new(words(world.geometry)));
    residency.mark_clean(FIRST);
    let (config, source, clock) = (&world.config, &world.source, &world.clock_ms);
    world.volume = assemble(config, &store, source, state, residency, clock);
    assert_eq!(world.volume.since(OWN), Some(Vec::new()));
    (world, store)
}

/// Simulator, seed 13835058055283003724: a write over a block that was here and one that was not changed the
/// first before it was marked. The process was killed there; the next one served what had been written, and
/// the disk came back to the old copy with what had been there before.
#[test]
fn what_is_here_is_marked_before_it_changes_also_beside_what_is_missing() {
    for zeroes in [false, true] {
        let (world, store) = one_clean();
        let (volume, relocation) = (&world.volume, world.relocation());
        let op = if zeroes {
            StoreOp::WriteZeroes
        } else {
            StoreOp::Write
        };
        store.hold(op);
        let told = std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                if zeroes {
                    volume.zero(relocation.as_ref(), 0, 8192, ZeroMode::MayPunch)
                } else {
                    volume.write(relocation.as_ref(), 0, &[7; 8192])
                }
            });
            store.wait_held(op, 1);
            let told = volume.since(OWN);
            store.release(op);
            writing.join().unwrap().unwrap();
            told
        });
        assert_eq!(told, Some(vec![FIRST]), "zeroes: {zeroes}");
        assert_eq!(volume.since(OWN), Some(vec![BlockRange::new(0, 2)]));
    }
}

/// The same without a kill: a write that fails half way, as on a disk that becomes full.
#[test]
fn what_a_failed_write_has_changed_is_told() {
    let (world, store) = one_clean();
    let (bytes, errno) = (4096, 28);
    store.fail_next(StoreOp::Write, Fault::Torn { bytes, errno });
    let relocation = world.relocation();
    let failed = world.volume.write(relocation.as_ref(), 0, &[7; 8192]);
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(errno));
    assert_eq!(store.inner().content()[..4096], [7; 4096]);
    assert_eq!(world.volume.since(OWN), Some(vec![FIRST]));
}

#[test]
fn no_difference_is_ever_too_small() {
    let lives = std::env::var("HIKKOSHI_LIVES").ok();
    let lives = lives.and_then(|n| n.parse().ok()).unwrap_or(2000);
    for seed in 0..lives {
        if let Err(panic) = std::panic::catch_unwind(|| life(seed)) {
            eprintln!("life {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
