//! The blocks that are partly here, and which of their sectors are.
//!
//! The table lies in the caller's memory, in fixed slots of a block number plus one and its mask,
//! so that it is found again after a kill; where each block's slot is, is kept beside it. Order of
//! stores within a slot: the mask first, then the block; on the way out only the block.

use std::collections::BTreeMap;
use std::ops::Range;

use hikkoshi_crashpoint::crash_point;

use super::PlaneMemory;
use super::mask::{SectorMask, words_for};
use crate::geometry::{BlockIndex, Geometry};
use crate::sync::{AtomicU64, Ordering};

/// The most blocks that may be partly here.
const MAX_PARTIALS: u64 = 1 << 18;

/// The most memory, in bytes, that the table may take.
const MAX_TABLE_BYTES: u64 = 6 << 20;

/// So many blocks are partly here that one more could not be remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many blocks are partly written")]
pub struct PartialTableFull;

/// Where the table lies and how large it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub first_word: usize,
    pub slots: usize,
    mask_words: usize,
}

impl Layout {
    pub fn new(geometry: Geometry, first_word: usize) -> Self {
        let mask_words = words_for(geometry.sectors_per_block());
        let slot_bytes = 8 * (1 + mask_words as u64);
        let slots = MAX_PARTIALS
            .min(MAX_TABLE_BYTES / slot_bytes)
            .min(geometry.blocks());
        // A block of one sector is never partly here.
        let slots = if geometry.sectors_per_block() == 1 {
            0
        } else {
            slots
        };
        Self {
            first_word,
            slots: usize::try_from(slots).unwrap_or(0),
            mask_words,
        }
    }

    pub fn words(self) -> usize {
        self.slots * (1 + self.mask_words)
    }

    fn slot(self, memory: &dyn PlaneMemory, slot: usize) -> &[AtomicU64] {
        let start = self.first_word + slot * (1 + self.mask_words);
        &memory.words()[start..start + 1 + self.mask_words]
    }
}

/// Where each block's slot is.
#[derive(Debug, Default)]
pub(super) struct Index {
    slots: BTreeMap<u64, usize>,
    /// Slots that were used and are free again; those from `fresh` on were never used.
    free: Vec<usize>,
    fresh: usize,
}

impl Index {
    /// Finds the table of a killed process. `keep` tells whether a block may still be partly here.
    pub fn recover(
        layout: Layout,
        memory: &dyn PlaneMemory,
        keep: impl Fn(BlockIndex) -> bool,
    ) -> Self {
        let mut index = Self {
            fresh: layout.slots,
            ..Self::default()
        };
        for slot in 0..layout.slots {
            let block = layout.slot(memory, slot)[0].load(Ordering::Acquire);
            let known = block != 0 && keep(BlockIndex(block - 1));
            if known && !index.slots.contains_key(&(block - 1)) {
                index.slots.insert(block - 1, slot);
            } else {
                if block != 0 {
                    layout.slot(memory, slot)[0].store(0, Ordering::Release);
                }
                index.free.push(slot);
            }
        }
        index
    }

    pub fn mask(
        &self,
        layout: Layout,
        memory: &dyn PlaneMemory,
        block: BlockIndex,
    ) -> Option<SectorMask> {
        let slot = layout.slot(memory, *self.slots.get(&block.0)?);
        Some(SectorMask::from_words(
            slot[1..]
                .iter()
                .map(|w| w.load(Ordering::Acquire))
                .collect(),
        ))
    }

    pub fn add(
        &mut self,
        layout: Layout,
        memory: &dyn PlaneMemory,
        block: BlockIndex,
        sectors: Range<u32>,
    ) -> Result<SectorMask, PartialTableFull> {
        let known = self.slots.get(&block.0).copied();
        let slot = match known {
            Some(slot) => slot,
            None => self.allocate(layout).ok_or(PartialTableFull)?,
        };
        let words = layout.slot(memory, slot);
        let mut mask = match known {
            Some(_) => SectorMask::from_words(
                words[1..]
                    .iter()
                    .map(|w| w.load(Ordering::Acquire))
                    .collect(),
            ),
            None => SectorMask::from_words(vec![0; layout.mask_words]),
        };
        mask.add(sectors);
        for (word, value) in words[1..].iter().zip(mask.words()) {
            word.store(*value, Ordering::Release);
        }
        crash_point!("mark.partial-mask");
        if known.is_none() {
            words[0].store(block.0 + 1, Ordering::Release);
            self.slots.insert(block.0, slot);
        }
        crash_point!("mark.partial-slot");
        Ok(mask)
    }

    fn allocate(&mut self, layout: Layout) -> Option<usize> {
        self.free.pop().or_else(|| {
            let slot = self.fresh;
            (slot < layout.slots).then(|| {
                self.fresh += 1;
                slot
            })
        })
    }

    pub fn remove(&mut self, layout: Layout, memory: &dyn PlaneMemory, block: u64) {
        if let Some(slot) = self.slots.remove(&block) {
            layout.slot(memory, slot)[0].store(0, Ordering::Release);
            self.free.push(slot);
        }
    }

    /// Forgets those from `start` on, before `end`.
    pub fn remove_all(&mut self, layout: Layout, memory: &dyn PlaneMemory, start: u64, end: u64) {
        while let Some(block) = self.next(start).filter(|block| *block < end) {
            self.remove(layout, memory, block);
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// The first from `block` on.
    pub fn next(&self, block: u64) -> Option<u64> {
        self.slots.range(block..).next().map(|(block, _)| *block)
    }

    pub fn blocks(&self) -> impl Iterator<Item = u64> {
        self.slots.keys().copied()
    }
}
