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
