//! What is here: the residency of every block.
//!
//! Two bits a block, in two planes whose words alternate, so that both bits of a block share a
//! cache line:
//!
//! | resident | owned | state |
//! |---|---|---|
//! | 0 | 0 | absent: only the source has it |
//! | 0 | 1 | partial: some sectors are valid here, see [`SectorMask`] |
//! | 1 | 0 | clean: copied from the source |
//! | 1 | 1 | owned: written, zeroed or trimmed here |
//!
//! While a residency is in use no bit is ever cleared. Data is in the store before the resident
//! bit is set with Release, and readers load it with Acquire: who sees the bit sees the data. Who
//! sets it holds the range's lock ([`crate::range_lock`]); who merely reads, or owns what is
//! resident already, needs none.
//!
//! The memory belongs to the caller and may outlive the process. That is why, on the way from
//! absent to owned, the owned bit is set first: a kill in between leaves a partial block without
//! sectors, which counts as absent, and never a block that passes for an unchanged copy.

mod mask;
mod partials;
#[cfg(all(test, not(loom)))]
mod tests;

use std::fmt;
use std::ops::Range;

use hikkoshi_crashpoint::crash_point;

use crate::geometry::{BlockIndex, BlockRange, ByteRange, Geometry, SECTOR_BYTES};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

pub use mask::SectorMask;
pub use partials::PartialTableFull;
use partials::{Index, Layout};

/// Memory for a residency: [`Residency::required_words`] words.
pub trait PlaneMemory: Send + Sync {
    /// The words.
    fn words(&self) -> &[AtomicU64];
}

impl PlaneMemory for Vec<AtomicU64> {
    fn words(&self) -> &[AtomicU64] {
        self
    }
}

/// Where a block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Only at the source.
    Absent,
    /// Some sectors here, the rest only at the source.
    Partial,
    /// Here, equal to the source.
    Clean,
    /// Here; the source does not matter any more.
    Owned,
}

impl BlockState {
    fn of(resident: bool, owned: bool) -> Self {
        match (resident, owned) {
            (false, false) => Self::Absent,
            (false, true) => Self::Partial,
            (true, false) => Self::Clean,
            (true, true) => Self::Owned,
        }
    }

    /// Whether all of the block is here.
    pub fn is_resident(self) -> bool {
        matches!(self, Self::Clean | Self::Owned)
    }
}

/// The residency of all blocks of a disk.
pub struct Residency {
    geometry: Geometry,
    memory: Box<dyn PlaneMemory>,
    layout: Layout,
    partials: Mutex<Index>,
    resident: AtomicU64,
    owned: AtomicU64,
}

impl fmt::Debug for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Residency")
            .field("geometry", &self.geometry)
            .field("resident_blocks", &self.resident_blocks())
            .field("owned_blocks", &self.owned_blocks())
            .finish_non_exhaustive()
    }
}

const WORD_BLOCKS: u64 = 64;

fn plane_words(geometry: Geometry) -> usize {
    let words = geometry.blocks().div_ceil(WORD_BLOCKS) * 2;
    usize::try_from(words).expect("planes of a disk of 2^56 bytes fit into the address space")
}

/// The bits of `range` in the word that holds block `word * 64`.
fn bits(range: BlockRange, word: u64) -> u64 {
    let base = word * WORD_BLOCKS;
    let low = range.start.saturating_sub(base).min(WORD_BLOCKS);
    let high = range.end.saturating_sub(base).min(WORD_BLOCKS);
    ones(high) & !ones(low)
}

/// The lowest `n` bits, for `n` up to 64.
fn ones(n: u64) -> u64 {
    if n >= WORD_BLOCKS {
        u64::MAX
    } else {
        (1 << n) - 1
    }
}

impl Residency {
    /// How many words of memory a disk of this shape needs.
    pub fn required_words(geometry: Geometry) -> usize {
        let planes = plane_words(geometry);
        planes + Layout::new(geometry, planes).words()
    }

    /// A residency over memory that is all zero: everything is absent.
    ///
    /// # Panics
    /// The memory is too small.
    pub fn new(geometry: Geometry, memory: Box<dyn PlaneMemory>) -> Self {
        assert!(memory.words().len() >= Self::required_words(geometry));
        Self {
            geometry,
            layout: Layout::new(geometry, plane_words(geometry)),
            memory,
            partials: Mutex::new(Index::default()),
            resident: AtomicU64::new(0),
            owned: AtomicU64::new(0),
        }
    }

    /// A residency over what a killed process left. Blocks that it was about to mark are absent.
    ///
    /// # Panics
    /// The memory is too small.
    pub fn recover(geometry: Geometry, memory: Box<dyn PlaneMemory>) -> Self {
        let this = Self::new(geometry, memory);
        let keep = |block: BlockIndex| {
            block.0 < geometry.blocks() && this.state(block) == BlockState::Partial
        };
        let mut index = Index::recover(this.layout, &*this.memory, keep);
        let (mut resident, mut owned) = (0, 0);
        for word in 0..geometry.blocks().div_ceil(WORD_BLOCKS) {
            let valid = bits(geometry.all(), word);
            let (mut r, mut o) = (
                this.resident_word(word) & valid,
                this.owned_word(word) & valid,
            );
            let mut partial = o & !r;
            while partial != 0 {
                let bit = partial & partial.wrapping_neg();
                let block = BlockIndex(word * WORD_BLOCKS + u64::from(bit.trailing_zeros()));
                let sectors = geometry.sectors_in(block);
                match index.mask(this.layout, &*this.memory, block) {
                    // Killed between the last sector's mark and the block's.
                    Some(mask) if mask.is_full(sectors) => {
                        index.remove(this.layout, &*this.memory, block.0);
                        r |= bit;
                    }
                    Some(mask) if mask.has_any(sectors) => {}
                    _ => {
                        index.remove(this.layout, &*this.memory, block.0);
                        o &= !bit;
                    }
                }
                partial &= !bit;
            }
            // Bits beyond the last block go as well: a snapshot that has them is refused.
            this.owned_at(word).store(o, Ordering::Release);
            this.resident_at(word).store(r, Ordering::Release);
            resident += u64::from(r.count_ones());
            owned += u64::from((r & o).count_ones());
        }
        this.resident.store(resident, Ordering::Relaxed);
        this.owned.store(owned, Ordering::Relaxed);
        *lock(&this.partials) = index;
        this
    }

    fn resident_at(&self, word: u64) -> &AtomicU64 {
        &self.memory.words()[plane_index(word, 0)]
    }

    fn owned_at(&self, word: u64) -> &AtomicU64 {
        &self.memory.words()[plane_index(word, 1)]
    }

    fn resident_word(&self, word: u64) -> u64 {
        self.resident_at(word).load(Ordering::Acquire)
    }

    fn owned_word(&self, word: u64) -> u64 {
        self.owned_at(word).load(Ordering::Acquire)
    }

    /// The shape of the disk.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The resident and the owned bits of blocks `64 * word` and up.
    pub fn raw_words(&self, word: u64) -> (u64, u64) {
        // Resident first: the owned bit was set before it, so no owned block shows as clean.
        let resident = self.resident_word(word);
        (resident, self.owned_word(word))
    }

    /// Whether all of these blocks are here.
    #[inline]
    pub fn all_resident(&self, range: BlockRange) -> bool {
        words_of(range).all(|word| {
            let wanted = bits(range, word);
            self.resident_word(word) & wanted == wanted
        })
    }

    /// Whether all of these bytes are here: in blocks that are, or in valid sectors of partial ones. What is
    /// here once stays.
    #[inline]
    pub fn holds(&self, bytes: ByteRange) -> bool {
        let blocks = self.geometry.covering(bytes);
        self.all_resident(blocks) || self.holds_sectors(blocks, bytes)
    }

    #[cold]
    fn holds_sectors(&self, blocks: BlockRange, bytes: ByteRange) -> bool {
        let valid = |block: BlockIndex| {
            let of_block = self.geometry.bytes(BlockRange::one(block));
            let first = (bytes.start.max(of_block.start) - of_block.start) / SECTOR_BYTES;
            let end = (bytes.end.min(of_block.end) - of_block.start).div_ceil(SECTOR_BYTES);
            match self.partial_mask(block) {
                Some(mask) => {
                    (first..end).all(|s| u32::try_from(s).is_ok_and(|sector| mask.has(sector)))
                }
                // It has just become whole.
                None => self.state(block).is_resident(),
            }
        };
        self.runs(blocks).all(|(run, state)| match state {
            BlockState::Absent => false,
            BlockState::Partial => (run.start..run.end).map(BlockIndex).all(valid),
            BlockState::Clean | BlockState::Owned => true,
        })
    }

    /// Whether all of these blocks are owned.
    #[inline]
    pub fn all_owned(&self, range: BlockRange) -> bool {
        words_of(range).all(|word| {
            let wanted = bits(range, word);
            let (resident, owned) = self.raw_words(word);
            resident & owned & wanted == wanted
        })
    }

    /// The state of a block.
    pub fn state(&self, block: BlockIndex) -> BlockState {
        let (resident, owned) = self.raw_words(block.0 / WORD_BLOCKS);
        let bit = 1 << (block.0 % WORD_BLOCKS);
        BlockState::of(resident & bit != 0, owned & bit != 0)
    }

    /// Runs of blocks of one state, in order, neighbours merged.
    pub fn runs(&self, range: BlockRange) -> Runs<'_> {
        Runs {
            residency: self,
            at: range.start,
            end: range.end,
        }
    }

    /// The first run of blocks from `from` on, before `end`, that are not (wholly) here.
    pub fn next_missing(&self, from: u64, end: u64) -> Option<BlockRange> {
        let start = self.next_with(from, end, |resident| !resident)?;
        let stop = self
            .next_with(start, end, |resident| resident)
            .unwrap_or(end);
        // A block that comes in between the two looks is told as it was at the first one.
        Some(BlockRange::new(start, stop.max(start + 1)))
    }

    /// The first block from `from` on, before `end`, whose resident bits, seen through `wanted`,
    /// are set.
    fn next_with(&self, from: u64, end: u64, wanted: impl Fn(u64) -> u64) -> Option<u64> {
        let range = BlockRange::new(from, end);
        words_of(range).find_map(|word| {
            let found = wanted(self.resident_word(word)) & bits(range, word);
            (found != 0).then(|| word * WORD_BLOCKS + u64::from(found.trailing_zeros()))
        })
    }

    /// Takes blocks that are all here as owned. Needs no lock. True if any was not owned before.
    #[inline]
    pub fn own_resident(&self, range: BlockRange) -> bool {
        let mut added = 0;
        for word in words_of(range) {
            let wanted = bits(range, word);
            if self.owned_word(word) & wanted != wanted {
                let before = self.owned_at(word).fetch_or(wanted, Ordering::AcqRel);
                added += u64::from((wanted & !before).count_ones());
            }
        }
        if added > 0 {
            self.owned.fetch_add(added, Ordering::Relaxed);
        }
        added > 0
    }

    /// Absent blocks are copies of the source's now. The caller holds their lock, has seen that
    /// they are absent, and has written their data.
    pub fn mark_clean(&self, range: BlockRange) {
        let mut added = 0;
        for word in words_of(range) {
            let wanted = bits(range, word);
            let before = self.resident_at(word).fetch_or(wanted, Ordering::AcqRel);
            added += u64::from((wanted & !before).count_ones());
        }
        self.resident.fetch_add(added, Ordering::Release);
    }

    /// What was copied and is not known to another residency is absent again. Only before anybody relies
    /// on this one. Tells how many blocks that are.
    pub fn forget_copies_but(&self, known: &Self) -> u64 {
        let mut forgotten = 0;
        for word in 0..self.geometry.blocks().div_ceil(WORD_BLOCKS) {
            let (resident, owned) = self.raw_words(word);
            let lost = resident & !owned & !known.resident_word(word);
            if lost != 0 {
                self.resident_at(word).fetch_and(!lost, Ordering::AcqRel);
                forgotten += u64::from(lost.count_ones());
            }
        }
        self.resident.fetch_sub(forgotten, Ordering::Release);
        forgotten
    }

    /// Blocks of any state are here and owned now. The caller holds their lock and has written
    /// their data.
    pub fn mark_owned(&self, range: BlockRange) {
        let (mut new_resident, mut new_owned) = (0, 0);
        for word in words_of(range) {
            let wanted = bits(range, word);
            let owned = self.owned_at(word).fetch_or(wanted, Ordering::AcqRel);
            crash_point!("mark.owned-half");
            let resident = self.resident_at(word).fetch_or(wanted, Ordering::AcqRel);
            new_resident += u64::from((wanted & !resident).count_ones());
            new_owned += u64::from((wanted & !(owned & resident)).count_ones());
        }
        self.owned.fetch_add(new_owned, Ordering::Relaxed);
        self.resident.fetch_add(new_resident, Ordering::Release);
        self.forget_partials(range);
    }

    fn forget_partials(&self, range: BlockRange) {
        let mut index = lock(&self.partials);
        index.remove_all(self.layout, &*self.memory, range.start, range.end);
    }

    /// Some sectors of a block that is not (wholly) here are valid now; gives all that are. With
    /// the last one the block is owned. The caller holds its lock and has written the sectors.
    ///
    /// # Errors
    /// There is no room to remember one more block; nothing was changed.
    pub fn mark_partial(
        &self,
        block: BlockIndex,
        sectors: Range<u32>,
    ) -> Result<SectorMask, PartialTableFull> {
        let mask = lock(&self.partials).add(self.layout, &*self.memory, block, sectors)?;
        if mask.is_full(self.geometry.sectors_in(block)) {
            self.mark_owned(BlockRange::one(block));
        } else {
            let bit = 1 << (block.0 % WORD_BLOCKS);
            self.owned_at(block.0 / WORD_BLOCKS)
                .fetch_or(bit, Ordering::AcqRel);
        }
        Ok(mask)
    }

    /// The valid sectors of a partial block; `None` for one of any other state.
    pub fn partial_mask(&self, block: BlockIndex) -> Option<SectorMask> {
        if self.state(block) != BlockState::Partial {
            return None;
        }
        lock(&self.partials).mask(self.layout, &*self.memory, block)
    }

    /// All partial blocks, in order.
    pub fn partials(&self) -> Vec<(BlockIndex, SectorMask)> {
        let index = lock(&self.partials);
        let mask = |b| {
            Some((
                BlockIndex(b),
                index.mask(self.layout, &*self.memory, BlockIndex(b))?,
            ))
        };
        index.blocks().filter_map(mask).collect()
    }

    /// How many blocks are partly here.
    pub fn partial_blocks(&self) -> usize {
        lock(&self.partials).len()
    }

    /// How many may be.
    pub fn most_partial_blocks(&self) -> usize {
        self.layout.slots
    }

    /// The first partial block from `block` on.
    pub fn next_partial(&self, block: BlockIndex) -> Option<BlockIndex> {
        lock(&self.partials).next(block.0).map(BlockIndex)
    }

    /// How many blocks are here.
    pub fn resident_blocks(&self) -> u64 {
        self.resident.load(Ordering::Acquire)
    }

    /// How many blocks are here and owned.
    pub fn owned_blocks(&self) -> u64 {
        self.owned.load(Ordering::Acquire)
    }

    /// How many blocks are not (wholly) here.
    pub fn missing_blocks(&self) -> u64 {
        self.geometry
            .blocks()
            .saturating_sub(self.resident_blocks())
    }

    /// How many bytes are not here; of a partial block all count as missing.
    pub fn missing_bytes(&self) -> u64 {
        self.blocks_to_bytes(self.missing_blocks(), |s| !s.is_resident())
    }

    /// How many bytes are here and owned.
    pub fn owned_bytes(&self) -> u64 {
        self.blocks_to_bytes(self.owned_blocks(), |s| s == BlockState::Owned)
    }

    /// Bytes in `blocks` blocks, a short last one counted right if it is among them.
    fn blocks_to_bytes(&self, blocks: u64, counts: impl Fn(BlockState) -> bool) -> u64 {
        let full = blocks * self.geometry.block_bytes();
        let Some(last) = self.geometry.blocks().checked_sub(1).map(BlockIndex) else {
            return 0;
        };
        let short = self.geometry.block_bytes() - self.geometry.bytes(BlockRange::one(last)).len();
        let bytes = if counts(self.state(last)) {
            full.saturating_sub(short)
        } else {
            full
        };
        // The last block may have changed its state after the count was taken.
        bytes.min(self.geometry.size_bytes())
    }
}

fn plane_index(word: u64, plane: usize) -> usize {
    usize::try_from(word).map_or(usize::MAX, |w| w * 2 + plane)
}

fn words_of(range: BlockRange) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / WORD_BLOCKS..(range.end - 1) / WORD_BLOCKS + 1
}

/// Runs of blocks of one state. See [`Residency::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    residency: &'a Residency,
    at: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = (BlockRange, BlockState);

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let start = self.at;
        let state = self.residency.state(BlockIndex(start));
        while self.at < self.end {
            let word = self.at / WORD_BLOCKS;
            let (resident, owned) = self.residency.raw_words(word);
            let differs = match state {
                BlockState::Absent => resident | owned,
                BlockState::Partial => resident | !owned,
                BlockState::Clean => !resident | owned,
                BlockState::Owned => !(resident & owned),
            };
            let found = differs & bits(BlockRange::new(self.at, self.end), word);
            if found != 0 {
                self.at = word * WORD_BLOCKS + u64::from(found.trailing_zeros());
                break;
            }
            self.at = ((word + 1) * WORD_BLOCKS).min(self.end);
        }
        // A block that changed between the two looks is told as it was at the first one.
        self.at = self.at.max(start + 1);
        Some((BlockRange::new(start, self.at), state))
    }
}
