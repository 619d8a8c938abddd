//! Sets of blocks of a disk, small where they are sparse and where they are solid.
//!
//! For what is kept for long and grows slowly: which blocks differ from an older copy. Not shared
//! between threads; what guests change is marked in [`crate::changes`] and [`crate::residency`].

use std::collections::BTreeMap;

use crate::changes::push_bits;
use crate::geometry::BlockRange;

/// Blocks in a page, and words of its bits.
pub(crate) const PAGE_BLOCKS: u64 = 4096;
pub(crate) const PAGE_WORDS: usize = 64;

/// What a set holds of a page that it holds anything of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// Every block, those beyond the end of the disk included.
    All,
    /// A bit for each block, the lowest first.
    Some(Box<[u64; PAGE_WORDS]>),
}

impl Page {
    fn empty() -> Self {
        Self::Some(Box::new([0; PAGE_WORDS]))
    }

    fn insert(&mut self, range: BlockRange) {
        let Self::Some(words) = self else {
            return;
        };
        if range.len() == PAGE_BLOCKS {
            *self = Self::All;
            return;
        }
        for (word, mask) in crate::changes::masks(range) {
            words[word] |= mask;
        }
        if words.iter().all(|word| *word == u64::MAX) {
            *self = Self::All;
        }
    }
}

/// Some blocks of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSet {
    pub(crate) pages: BTreeMap<u64, Page>,
}

impl BlockSet {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Adds blocks.
    pub fn insert(&mut self, range: BlockRange) {
        let mut at = range.start;
        while at < range.end {
            let page = at / PAGE_BLOCKS;
            let first = page * PAGE_BLOCKS;
            let end = range.end.min(first + PAGE_BLOCKS);
            let within = BlockRange::new(at - first, end - first);
            self.pages
                .entry(page)
                .or_insert_with(Page::empty)
                .insert(within);
            at = end;
        }
    }

    /// Whether it holds every one of these blocks.
    pub fn holds(&self, range: BlockRange) -> bool {
        let mut at = range.start;
        while at < range.end {
            let page = at / PAGE_BLOCKS;
            let first = page * PAGE_BLOCKS;
            let end = range.end.min(first + PAGE_BLOCKS);
            let held = match self.pages.get(&page) {
                None => false,
                Some(Page::All) => true,
                Some(Page::Some(words)) => {
                    crate::changes::masks(BlockRange::new(at - first, end - first))
                        .all(|(word, mask)| words[word] & mask == mask)
                }
            };
            if !held {
                return false;
            }
            at = end;
        }
        true
    }

    /// The runs of blocks that it holds, in order, neighbours joined; none beyond `blocks`.
    pub fn runs(&self, blocks: u64) -> Vec<BlockRange> {
        let mut runs: Vec<BlockRange> = Vec::new();
        for (page, content) in &self.pages {
            let first = page * PAGE_BLOCKS;
            match content {
                Page::All => {
                    let run = BlockRange::new(first, first + PAGE_BLOCKS);
                    match runs.last_mut() {
                        Some(last) if last.end == run.start => last.end = run.end,
                        _ => runs.push(run),
                    }
                }
                Page::Some(words) => {
                    for (word, base) in words.iter().zip((first..).step_by(64)) {
                        push_bits(&mut runs, base, *word);
                    }
                }
            }
        }
        runs.retain_mut(|run| {
            run.end = run.end.min(blocks);
            run.start < run.end
        });
        runs
    }
}

impl Extend<BlockRange> for BlockSet {
    fn extend<T: IntoIterator<Item = BlockRange>>(&mut self, ranges: T) {
        ranges.into_iter().for_each(|range| self.insert(range));
    }
}

impl FromIterator<BlockRange> for BlockSet {
    fn from_iter<T: IntoIterator<Item = BlockRange>>(ranges: T) -> Self {
        let mut set = Self::new();
        set.extend(ranges);
        set
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const BLOCKS: u64 = 3 * PAGE_BLOCKS + 100;

    fn ranges() -> impl Strategy<Value = Vec<BlockRange>> {
        let range = (0..BLOCKS, prop_oneof![1..80_u64, 1..9000_u64])
            .prop_map(|(start, len)| BlockRange::new(start, (start + len).min(BLOCKS)));
        prop::collection::vec(range, 0..12)
    }

    proptest! {
        #[test]
        fn a_set_holds_what_was_put_into_it(ranges in ranges()) {
            let set: BlockSet = ranges.iter().copied().collect();
            let wanted: BTreeSet<u64> = ranges.iter().flat_map(|r| r.start..r.end).collect();
            let runs = set.runs(BLOCKS);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let found: BTreeSet<u64> = runs.iter().flat_map(|r| r.start..r.end).collect();
            prop_assert_eq!(&found, &wanted);
            prop_assert!(ranges.iter().all(|range| set.holds(*range)));
            let absent = (0..BLOCKS).find(|block| !wanted.contains(block));
            if let Some(block) = absent {
                prop_assert!(!set.holds(BlockRange::new(block, block + 1)));
            }
            prop_assert_eq!(set.is_empty(), wanted.is_empty());
        }
    }

    #[test]
    fn no_run_reaches_beyond_the_disk() {
        let set: BlockSet = [BlockRange::new(0, PAGE_BLOCKS)].into_iter().collect();
        assert_eq!(set.runs(100), [BlockRange::new(0, 100)]);
    }
}
