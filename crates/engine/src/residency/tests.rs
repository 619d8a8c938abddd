#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use proptest::prelude::*;

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
        let partial = model.iter().filter(|s| **s == BlockState::Partial).count();
        prop_assert_eq!(r.partials().len(), partial);
    }
}
