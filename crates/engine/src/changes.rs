//! What a guest has changed since somebody looked last: a bit for each block.
//!
//! The rule that makes a copy made meanwhile right: **a change is marked after it is made and
//! before it is answered.** Whoever takes the marks and reads afterwards has either read the change,
//! or finds its mark when it takes them the next time; once no change is under way, and all marks
//! are taken, what was read since is right.

use crate::geometry::{BlockRange, Geometry};
use crate::sync::{AtomicU64, Ordering};

const BITS: u64 = 64;

/// Blocks that were changed. Marking costs an atomic operation for each 64 blocks, and waits for
/// nobody.
#[derive(Debug)]
pub struct ChangeMap {
    geometry: Geometry,
    words: Vec<AtomicU64>,
}

impl ChangeMap {
    /// Nothing has changed.
    pub fn new(geometry: Geometry) -> Self {
        let words = usize::try_from(geometry.blocks().div_ceil(BITS)).expect("fits into memory");
        Self {
            geometry,
            words: std::iter::repeat_with(|| AtomicU64::new(0))
                .take(words)
                .collect(),
        }
    }

    /// The shape of the disk.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// These blocks have changed.
    pub fn mark(&self, range: BlockRange) {
        for (word, mask) in masks(range) {
            // Also where it is marked: a mark that is about to be taken says nothing of a change
            // that whoever takes it may not see yet.
            self.words[word].fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Takes all marks, in order, neighbours joined.
    pub fn take(&self) -> Vec<BlockRange> {
        let mut runs = Vec::new();
        for (at, word) in (0_u64..).zip(&self.words) {
            if word.load(Ordering::Acquire) != 0 {
                push_bits(&mut runs, at * BITS, word.swap(0, Ordering::AcqRel));
            }
        }
        runs
    }

    /// How many blocks are marked.
    pub fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.words.iter().map(ones).sum()
    }
}

/// The words that a range touches, and its bits in each.
pub(crate) fn masks(range: BlockRange) -> impl Iterator<Item = (usize, u64)> {
    let words = range.start / BITS..range.end.div_ceil(BITS);
    words.filter_map(move |word| {
        let from = range.start.max(word * BITS) - word * BITS;
        let to = range.end.min((word + 1) * BITS).checked_sub(word * BITS)?;
        let len = to.checked_sub(from).filter(|len| *len > 0)?;
        let ones = if len == BITS {
            u64::MAX
        } else {
            (1 << len) - 1
        };
        Some((usize::try_from(word).ok()?, ones << from))
    })
}

/// Appends the runs of ones of a word whose first bit is block `base`.
pub(crate) fn push_bits(runs: &mut Vec<BlockRange>, base: u64, mut word: u64) {
    while word != 0 {
        let from = u64::from(word.trailing_zeros());
        let len = u64::from((word >> from).trailing_ones());
        let run = BlockRange::new(base + from, base + from + len);
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
        if from + len == BITS {
            break;
        }
        word &= u64::MAX << (from + len);
    }
}

/// The same blocks and some between them, in at most `most` runs. `runs` are in order.
pub fn coarsened(mut runs: Vec<BlockRange>, most: usize) -> Vec<BlockRange> {
    let mut gap = 1;
    while runs.len() > most.max(1) {
        let mut wider: Vec<BlockRange> = Vec::with_capacity(runs.len() / 2 + 1);
        for run in runs {
            match wider.last_mut() {
                Some(last) if run.start - last.end <= gap => last.end = run.end,
                _ => wider.push(run),
            }
        }
        runs = wider;
        gap *= 2;
    }
    runs
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const BLOCKS: u64 = 1000;

    fn geometry() -> Geometry {
        Geometry::new(BLOCKS * 4096, 4096).expect("a good shape")
    }

    fn blocks_of(runs: &[BlockRange]) -> BTreeSet<u64> {
        runs.iter().flat_map(|run| run.start..run.end).collect()
    }

    fn some_ranges() -> impl Strategy<Value = Vec<BlockRange>> {
        let range = (0..BLOCKS, 1..200_u64)
            .prop_map(|(start, len)| BlockRange::new(start, (start + len).min(BLOCKS)));
        prop::collection::vec(range, 0..20)
    }

    proptest! {
        #[test]
        fn what_was_marked_is_taken_once(ranges in some_ranges()) {
            let map = ChangeMap::new(geometry());
            for range in &ranges {
                map.mark(*range);
            }
            let wanted = blocks_of(&ranges);
            prop_assert_eq!(map.count(), wanted.len() as u64);
            let taken = map.take();
            prop_assert!(taken.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(blocks_of(&taken), wanted);
            prop_assert!(map.take().is_empty() && map.count() == 0);
        }

        #[test]
        fn fewer_runs_never_lose_a_block(ranges in some_ranges(), most in 1_usize..10) {
            let map = ChangeMap::new(geometry());
            for range in &ranges {
                map.mark(*range);
            }
            let exact = map.take();
            let coarse = coarsened(exact.clone(), most);
            prop_assert!(coarse.len() <= most);
            prop_assert!(blocks_of(&coarse).is_superset(&blocks_of(&exact)));
        }
    }
}
