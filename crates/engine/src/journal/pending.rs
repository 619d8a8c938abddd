//! Records of what became resident since the last commit.
//!
//! A mark and its record come into being as one step, behind one lock. Were the mark visible
//! first, another client could write into the block, see nothing left to mark, flush, and have its
//! flush answered by a commit that does not know of the block yet: a power cut would then lose a
//! flushed write. Were the record first, a snapshot between the two could end the epoch that holds
//! the record without knowing of the mark, to the same effect.

use hikkoshi_crashpoint::crash_point;

use super::Record;
use crate::geometry::BlockRange;
use crate::sync::{Mutex, lock};

/// Records that gather while they cannot be written, for want of space. Beyond it they are let go:
/// a snapshot of the residency has all that they say.
const MAX_KEPT_RECORDS: usize = 1 << 20;

/// What a commit has to make durable.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Records in the order of their writes.
    pub records: Vec<Record>,
    /// There were too many to keep: only a snapshot will do.
    pub needs_snapshot: bool,
}

impl Gathered {
    /// Whether there is nothing to make durable.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && !self.needs_snapshot
    }

    fn add(&mut self, record: Record) {
        match (self.records.last_mut(), &record) {
            (Some(Record::Owned(last)), Record::Owned(next))
            | (Some(Record::Clean(last)), Record::Clean(next))
                if last.end == next.start =>
            {
                *last = BlockRange::new(last.start, next.end);
            }
            _ => self.records.push(record),
        }
    }

    fn bound(&mut self) {
        if self.needs_snapshot || self.records.len() > MAX_KEPT_RECORDS {
            self.needs_snapshot = true;
            self.records = Vec::new();
        }
    }
}

/// Records that wait for the next commit.
#[derive(Debug, Default)]
pub struct Pending {
    gathered: Mutex<Gathered>,
}

impl Pending {
    /// Runs `mark`, which marks blocks in the residency and tells what to record of it. The data
    /// must have been written already where the mark makes a block resident. Gives back how many
    /// records wait now.
    pub fn leave(&self, mark: impl FnOnce() -> Option<Record>) -> usize {
        let mut gathered = lock(&self.gathered);
        if let Some(record) = mark() {
            crash_point!("mark.marked");
            gathered.add(record);
        }
        let waiting = gathered.records.len();
        gathered.bound();
        waiting
    }

    /// Takes all of it. Of every mark that can be seen now, the record is among them or was taken
    /// before.
    pub fn take(&self) -> Gathered {
        std::mem::take(&mut lock(&self.gathered))
    }

    /// Puts back what could not be written, before what has gathered since.
    pub fn put_back(&self, mut earlier: Gathered) {
        let mut gathered = lock(&self.gathered);
        earlier.records.append(&mut gathered.records);
        earlier.needs_snapshot |= gathered.needs_snapshot;
        earlier.bound();
        *gathered = earlier;
    }

    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        lock(&self.gathered).is_empty()
    }
}
