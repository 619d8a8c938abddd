//! Records of what became resident since the last commit.
//!
//! A mark and its record come into being as one step, behind one lock. Were the mark visible
//! first, another client could write into the block, see nothing left to mark, flush, and have its
//! flush answered by a commit that does not know of the block yet: a power cut would then lose a
//! flushed write. Were the record first, a snapshot between the two could end the epoch that holds
//! the record without knowing of the mark, to the same effect.

use super::Record;
use crate::geometry::BlockRange;
use crate::sync::{Mutex, lock};

/// Records that wait for the next commit, in the order of their writes.
#[derive(Debug, Default)]
pub struct Pending {
    records: Mutex<Vec<Record>>,
}

impl Pending {
    /// Runs `mark`, which marks blocks in the residency and tells what to record of it. The data
    /// must have been written already where the mark makes a block resident. Gives back how many
    /// records wait now.
    pub fn leave(&self, mark: impl FnOnce() -> Option<Record>) -> usize {
        let mut records = lock(&self.records);
        if let Some(record) = mark() {
            match (records.last_mut(), &record) {
                (Some(Record::Owned(last)), Record::Owned(next))
                | (Some(Record::Clean(last)), Record::Clean(next))
                    if last.end == next.start =>
                {
                    *last = BlockRange::new(last.start, next.end);
                }
                _ => records.push(record),
            }
        }
        records.len()
    }

    /// Takes all records. Of every mark that can be seen now, the record is among them or was
    /// taken before.
    pub fn take(&self) -> Vec<Record> {
        std::mem::take(&mut lock(&self.records))
    }

    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        lock(&self.records).is_empty()
    }
}
