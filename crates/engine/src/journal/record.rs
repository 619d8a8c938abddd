//! What a commit tells of blocks.

use super::{JournalError, Reader, put_varint};
use crate::geometry::{BlockIndex, BlockRange, Geometry};
use crate::residency::{BlockState, Residency, SectorMask};

const CLEAN: u8 = 1;
const OWNED: u8 = 2;
const PARTIAL: u8 = 3;

/// Blocks that became resident, or partly so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Copied from the source.
    Clean(BlockRange),
    /// Written, zeroed or trimmed here.
    Owned(BlockRange),
    /// Some sectors are valid here.
    Partial {
        /// The block.
        block: BlockIndex,
        /// All its valid sectors so far.
        mask: SectorMask,
    },
}

impl Record {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Clean(range) => put_range(out, CLEAN, *range),
            Self::Owned(range) => put_range(out, OWNED, *range),
            Self::Partial { block, mask } => {
                out.push(PARTIAL);
                put_varint(out, block.0);
                put_varint(out, mask.words().len() as u64);
                for word in mask.words() {
                    out.extend_from_slice(&word.to_le_bytes());
                }
            }
        }
    }

    pub(super) fn decode(reader: &mut Reader<'_>, g: Geometry) -> Result<Self, JournalError> {
        let kind = reader.byte()?;
        let start = reader.varint()?;
        let count = reader.varint()?;
        if kind == PARTIAL {
            let words = u64::from(g.sectors_per_block()).div_ceil(64);
            if start >= g.blocks() || count != words {
                return Err(JournalError::Corrupt("a partial block is out of bounds"));
            }
            let mask = (0..count)
                .map(|_| reader.u64())
                .collect::<Result<Vec<_>, _>>()?;
            return Ok(Self::Partial {
                block: BlockIndex(start),
                mask: SectorMask::from_words(mask),
            });
        }
        let end = start.checked_add(count).filter(|end| *end <= g.blocks());
        let range = BlockRange::new(
            start,
            end.ok_or(JournalError::Corrupt("a range is out of bounds"))?,
        );
        match kind {
            CLEAN => Ok(Self::Clean(range)),
            OWNED => Ok(Self::Owned(range)),
            _ => Err(JournalError::Corrupt("a record is of no known kind")),
        }
    }

    /// Brings it into a residency that nobody else uses yet. What is there already is never
    /// taken back, so that the order of records and their repetition do not matter.
    ///
    /// # Errors
    /// More blocks are partly here than there is room for, which no volume ever recorded.
    pub fn apply(&self, residency: &Residency) -> Result<(), JournalError> {
        match self {
            Self::Clean(range) => {
                let runs: Vec<_> = residency.runs(*range).collect();
                for (run, state) in runs {
                    match state {
                        BlockState::Absent => residency.mark_clean(run),
                        // It was completed after sectors of it had been written here.
                        BlockState::Partial => residency.mark_owned(run),
                        BlockState::Clean | BlockState::Owned => {}
                    }
                }
            }
            Self::Owned(range) => residency.mark_owned(*range),
            Self::Partial { block, mask } => {
                if residency.state(*block).is_resident() {
                    return Ok(());
                }
                let sectors = residency.geometry().sectors_in(*block);
                for sector in (0..sectors).filter(|s| mask.has(*s)) {
                    residency
                        .mark_partial(*block, sector..sector + 1)
                        .map_err(|_| JournalError::Corrupt("too many blocks are partly here"))?;
                }
            }
        }
        Ok(())
    }
}

fn put_range(out: &mut Vec<u8>, kind: u8, range: BlockRange) {
    out.push(kind);
    put_varint(out, range.start);
    put_varint(out, range.len());
}

/// The same records, sorted, with neighbours and overlaps of a kind joined.
pub(super) fn joined(records: &[Record]) -> Vec<Record> {
    let mut clean = Vec::new();
    let mut owned = Vec::new();
    let mut partial = Vec::new();
    for record in records {
        match record {
            Record::Clean(range) => clean.push(*range),
            Record::Owned(range) => owned.push(*range),
            Record::Partial { .. } => partial.push(record.clone()),
        }
    }
    let clean = join(clean).into_iter().map(Record::Clean);
    let owned = join(owned).into_iter().map(Record::Owned);
    // Partial blocks last: for one that was completed meanwhile they say nothing any more.
    clean.chain(owned).chain(partial).collect()
}

fn join(mut ranges: Vec<BlockRange>) -> Vec<BlockRange> {
    ranges.sort_unstable();
    let mut out: Vec<BlockRange> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}
