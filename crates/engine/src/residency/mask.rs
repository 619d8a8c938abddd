//! Which sectors of a partly written block are valid here.

use std::ops::Range;

/// A bit for each sector of a block, up to 2048.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectorMask {
    words: Vec<u64>,
}

impl SectorMask {
    /// No sector of a block of `sectors` is valid.
    pub fn empty(sectors: u32) -> Self {
        Self {
            words: vec![0; words_for(sectors)],
        }
    }

    /// A mask of these words; the lowest bit of the first is the first sector.
    pub fn from_words(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// The words of the mask.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Makes sectors valid. Those beyond the mask are passed over.
    pub fn add(&mut self, sectors: Range<u32>) {
        for sector in sectors {
            if let Some(word) = self.words.get_mut(sector as usize / 64) {
                *word |= 1 << (sector % 64);
            }
        }
    }

    /// Makes valid what is so in `other`.
    pub fn merge(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// Whether a sector is valid.
    pub fn has(&self, sector: u32) -> bool {
        self.words
            .get(sector as usize / 64)
            .is_some_and(|w| w >> (sector % 64) & 1 == 1)
    }

    /// Whether the first `sectors` are all valid.
    pub fn is_full(&self, sectors: u32) -> bool {
        (0..sectors).all(|s| self.has(s))
    }

    /// Whether any of the first `sectors` is valid.
    pub fn has_any(&self, sectors: u32) -> bool {
        (0..sectors).any(|s| self.has(s))
    }

    /// Whether none is valid.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Runs of sectors below `sectors` that are not valid.
    pub fn missing(&self, sectors: u32) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < sectors && self.has(at) {
                at += 1;
            }
            let start = at;
            while at < sectors && !self.has(at) {
                at += 1;
            }
            (start < at).then_some(start..at)
        })
    }
}

/// How many words a mask of `sectors` takes.
pub(crate) fn words_for(sectors: u32) -> usize {
    (sectors as usize).div_ceil(64)
}
