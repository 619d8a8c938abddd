#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::journal::{apply_snapshot, encode_snapshot};
use proptest::prelude::*;
use std::sync::{Arc, OnceLock, Weak};

fn fresh(g: Geometry) -> Residency {
    let words = (0..Residency::required_words(g))
        .map(|_| AtomicU64::new(0))
        .collect::<Vec<_>>();
    Residency::new(g, Box::new(words))
}

#[test]
fn a_partial_block_becomes_owned_with_its_last_sector() {
    let g = Geometry::new(1 << 20, 4096).unwrap();
    let r = fresh(g);
    let b = BlockIndex(5);
    assert!(!r.mark_partial(b, 0..4).unwrap().is_full(8));
    assert_eq!(r.state(b), BlockState::Partial);
    assert_eq!(
        r.partial_mask(b).unwrap().missing(8).collect::<Vec<_>>(),
        vec![4..8]
    );
    assert_eq!(r.missing_blocks(), 256);
    r.mark_partial(b, 4..8).unwrap();
    assert_eq!(r.state(b), BlockState::Owned);
    assert_eq!(r.partial_mask(b), None);
    assert!(r.partials().is_empty());
    assert_eq!((r.missing_blocks(), r.owned_blocks()), (255, 1));
}

/// Blocks 4 and 6 are clean; of 5 the sectors 2 and 3 are valid.
#[test]
fn valid_sectors_are_here_and_their_neighbours_are_not() {
    let g = Geometry::new(1 << 20, 4096).unwrap();
    let r = fresh(g);
    r.mark_clean(BlockRange::one(BlockIndex(4)));
    r.mark_clean(BlockRange::one(BlockIndex(6)));
    r.mark_partial(BlockIndex(5), 2..4).unwrap();
    let five = 5 * 4096;
    for (from, to, here) in [
        (five + 1024, five + 2048, true),
        // Not all of its sectors, or only bytes of them.
        (five + 1536, five + 2048, true),
        (five + 1100, five + 1101, true),
        (five + 1023, five + 2048, false),
        (five + 1024, five + 2049, false),
        (five, five + 512, false),
        (five - 512, five + 1, false),
        (five - 512, five, true),
        (five + 3584, five + 4097, false),
        (five - 4096, five + 8192, false),
        (3 * 4096, five, false),
    ] {
        let bytes = ByteRange::at(from, to - from);
        assert_eq!(r.holds(bytes), here, "{from} to {to}");
    }
    r.mark_partial(BlockIndex(5), 0..2).unwrap();
    assert!(r.holds(ByteRange::at(five - 4096, 4096 + 2048)));
    r.mark_partial(BlockIndex(5), 4..8).unwrap();
    assert!(r.holds(ByteRange::at(five - 4096, 3 * 4096)));
}

#[test]
fn the_table_of_partials_is_bounded() {
    let g = Geometry::new(64 << 30, 1 << 20).unwrap();
    let r = fresh(g);
    let slots = (0..g.blocks())
        .take_while(|b| r.mark_partial(BlockIndex(*b), 0..1).is_ok())
        .count();
    assert_eq!(slots as u64, (6 << 20) / (8 * 33));
    let next = BlockIndex(slots as u64);
    assert_eq!(r.state(next), BlockState::Absent);
    r.mark_owned(BlockRange::one(BlockIndex(0)));
    assert!(r.mark_partial(next, 0..1).is_ok());
}

/// Fuzzing of `state`: planes that said of a partial block only what lies beyond its sectors, or of
/// blocks beyond the last one, came out of the recovery as they were. The snapshot written next then
/// said something else than the residency, or was refused by the next start.
#[test]
fn planes_of_any_content_are_in_order_after_a_recovery() {
    let g = Geometry::new(10 * 4096, 4096).unwrap();
    let table = plane_words(g);
    let words: Vec<AtomicU64> = (0..Residency::required_words(g))
        .map(|_| AtomicU64::new(0))
        .collect();
    let set = |word: usize, value| words[word].store(value, Ordering::Relaxed);
    // Block 1 is clean, 2 to 4 are partial; so is something beyond the last block, 9.
    set(0, 0b10 | 1 << 40);
    set(1, 0b1_1100 | 1 << 41);
    // Sectors: of block 2 one, of block 3 only beyond its eight, of block 4 all.
    for (slot, (block, mask)) in [(2, 0b100), (3, 0x0500), (4, 0xff)].into_iter().enumerate() {
        set(table + 2 * slot, block + 1);
        set(table + 2 * slot + 1, mask);
    }
    let r = Residency::recover(g, Box::new(words));
    let states: Vec<BlockState> = (0..5).map(|b| r.state(BlockIndex(b))).collect();
    use BlockState::{Absent, Clean, Owned, Partial};
    assert_eq!(states, [Absent, Clean, Partial, Absent, Owned]);
    assert_eq!(r.raw_words(0), (0b1_0010, 0b1_0100));
    assert_eq!((r.resident_blocks(), r.owned_blocks()), (2, 1));
    assert_eq!(r.partials().len(), 1);
}

#[test]
fn a_short_last_block_counts_its_bytes() {
    let g = Geometry::new(4096 * 3 + 512, 4096).unwrap();
    let r = fresh(g);
    assert_eq!(r.missing_bytes(), 4096 * 3 + 512);
    r.mark_owned(BlockRange::new(3, 4));
    assert_eq!((r.missing_bytes(), r.owned_bytes()), (4096 * 3, 512));
}

proptest! {
    /// Every query against a plain list of states.
    #[test]
    fn residency_is_what_was_marked(ops in prop::collection::vec((0_u8..4, 0_u64..300, 1_u64..90), 1..60)) {
        let g = Geometry::new(300 * 4096, 4096).unwrap();
        let r = fresh(g);
        let mut model = vec![BlockState::Absent; 300];
        for (op, start, len) in ops {
            let range = BlockRange::new(start, (start + len).min(300));
            let cells = start as usize..range.end as usize;
            match op {
                0 => for b in cells {
                    if model[b] == BlockState::Absent {
                        r.mark_clean(BlockRange::one(BlockIndex(b as u64)));
                        model[b] = BlockState::Clean;
                    }
                },
                1 => { r.mark_owned(range); model[cells].fill(BlockState::Owned); }
                2 => if r.all_resident(range) { r.own_resident(range); model[cells].fill(BlockState::Owned); },
                _ => if !model[start as usize].is_resident() {
                    r.mark_partial(BlockIndex(start), 2..3).unwrap();
                    model[start as usize] = BlockState::Partial;
                },
            }
        }
        for (b, state) in model.iter().enumerate() {
            prop_assert_eq!(r.state(BlockIndex(b as u64)), *state);
        }
        let mut at = 0;
        for (run, state) in r.runs(g.all()) {
            prop_assert_eq!(run.start, at);
            prop_assert!((run.start..run.end).all(|b| model[b as usize] == state));
            prop_assert!(run.end == 300 || model[run.end as usize] != state);
            at = run.end;
        }
        prop_assert_eq!(at, 300);
        let missing: Vec<u64> = (0..300).filter(|b| !model[*b as usize].is_resident()).collect();
        prop_assert_eq!(r.missing_blocks(), missing.len() as u64);
        prop_assert_eq!(r.next_missing(0, 300).map(|m| m.start), missing.first().copied());
        let owned = model.iter().filter(|s| **s == BlockState::Owned).count();
        prop_assert_eq!(r.owned_blocks(), owned as u64);
        let partial: Vec<u64> = (0..300).filter(|b| model[*b as usize] == BlockState::Partial).collect();
        prop_assert_eq!(r.partial_blocks(), partial.len());
        prop_assert_eq!(r.partials().into_iter().map(|(b, _)| b.0).collect::<Vec<_>>(), &partial[..]);
        for from in [0, 150, 299] {
            let next = partial.iter().find(|b| **b >= from);
            prop_assert_eq!(r.next_partial(BlockIndex(from)), next.map(|b| BlockIndex(*b)));
        }
    }
}

type Hook = Box<dyn Fn(&Residency) + Send + Sync>;

/// Memory in which something happens between two looks of whoever reads it.
struct Eventful {
    words: Vec<AtomicU64>,
    looks: Arc<AtomicU64>,
    at: u64,
    residency: Arc<OnceLock<Weak<Residency>>>,
    hook: Hook,
}

impl PlaneMemory for Eventful {
    fn words(&self) -> &[AtomicU64] {
        let look = self.looks.fetch_add(1, Ordering::Relaxed);
        let residency = self.residency.get().and_then(Weak::upgrade);
        // Not while the table is locked: nothing can change it then.
        if let Some(residency) = residency
            && look >= self.at
            && residency.partials.try_lock().is_ok()
            && self.looks.swap(NEVER_AGAIN, Ordering::Relaxed) < NEVER_AGAIN
        {
            (self.hook)(&residency);
        }
        &self.words
    }
}

/// Above every count of looks; the hook's own looks add to it.
const NEVER_AGAIN: u64 = 1 << 32;

/// A residency, prepared, in which `hook` happens at look `at` after that.
fn eventful(g: Geometry, at: u64, prepare: impl Fn(&Residency), hook: Hook) -> Arc<Residency> {
    let words = (0..Residency::required_words(g))
        .map(|_| AtomicU64::new(0))
        .collect();
    let cell = Arc::new(OnceLock::new());
    let looks = Arc::new(AtomicU64::new(0));
    let memory = Eventful {
        words,
        looks: Arc::clone(&looks),
        at,
        residency: Arc::clone(&cell),
        hook,
    };
    let residency = Arc::new(Residency::new(g, Box::new(memory)));
    prepare(&residency);
    looks.store(0, Ordering::Relaxed);
    let _ = cell.set(Arc::downgrade(&residency));
    residency
}

/// A snapshot read the planes first and the table of partial blocks after them. A block that a
/// fetch completed in between was in neither: sectors of it that a guest had flushed were gone
/// after a power cut. (Seed 6793 of the simulator.)
#[test]
fn a_snapshot_tells_of_a_block_that_is_completed_meanwhile() {
    let g = Geometry::new(4096 * 8, 4096).unwrap();
    for at in 0..40 {
        let residency = eventful(
            g,
            at,
            |r| {
                r.mark_partial(BlockIndex(3), 2..4).unwrap();
            },
            Box::new(|r| r.mark_owned(BlockRange::new(3, 4))),
        );
        let map = encode_snapshot([7; 16], 1, &residency);
        let words: Vec<AtomicU64> = (0..Residency::required_words(g))
            .map(|_| AtomicU64::new(0))
            .collect();
        let found = Residency::new(g, Box::new(words));
        apply_snapshot(&map, [7; 16], &found).unwrap();
        let there = found.state(BlockIndex(3)) == BlockState::Owned
            || found.partial_mask(BlockIndex(3)).is_some_and(|m| m.has(2));
        assert!(there, "forgotten when it happens at look {at}");
    }
}

/// The search looked twice, and when the block had come in between it told an empty run, for which
/// a fetch of nothing was sent. (Seed 1186 of the simulator.)
#[test]
fn a_missing_run_is_never_empty() {
    let g = Geometry::new(4096 * 200, 4096).unwrap();
    for at in 0..12 {
        let residency = eventful(
            g,
            at,
            |r| r.mark_clean(BlockRange::new(0, 70)),
            Box::new(|r| r.mark_clean(BlockRange::new(70, 80))),
        );
        if let Some(run) = residency.next_missing(0, 100) {
            assert!(!run.is_empty(), "{run:?} when it happens at look {at}");
        }
    }
}

/// The count was taken before the last, short block came, and its state looked at after: more
/// than the disk was told to be missing, and the thread that keeps time panicked over it. (Seed
/// 7391 of the simulator.)
#[test]
fn no_more_is_missing_than_the_disk_has() {
    let g = Geometry::new(4096 * 7 + 512, 4096).unwrap();
    for at in 0..6 {
        let residency = eventful(
            g,
            at,
            |_| {},
            Box::new(|r| r.mark_clean(BlockRange::new(7, 8))),
        );
        assert!(residency.missing_bytes() <= g.size_bytes());
    }
}
