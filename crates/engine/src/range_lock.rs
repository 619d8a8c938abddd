//! Locks on runs of blocks.
//!
//! Taken by whoever changes blocks of which some are missing: guests' writes into them, and
//! installs of what was fetched. What is resident is never locked. Exact and not hashed: two
//! holders never wait for each other unless their ranges overlap, and whoever holds one range
//! takes no second, so there is no deadlock. Few are held at a time, so a list is quicker than a
//! tree.

use crate::geometry::BlockRange;
use crate::sync::{Condvar, Mutex, lock, wait};

/// The runs of blocks that are locked now.
#[derive(Debug)]
pub struct RangeLocks {
    held: Mutex<Vec<BlockRange>>,
    freed: Condvar,
}

impl Default for RangeLocks {
    fn default() -> Self {
        Self::new()
    }
}

impl RangeLocks {
    /// No run is locked.
    pub fn new() -> Self {
        Self {
            held: Mutex::new(Vec::new()),
            freed: Condvar::new(),
        }
    }

    /// Waits until nobody else holds a block of `range`, and holds them all.
    pub fn lock(&self, range: BlockRange) -> RangeGuard<'_> {
        let mut held = lock(&self.held);
        while held.iter().any(|other| other.overlaps(range)) {
            held = wait(&self.freed, &self.held, held);
        }
        held.push(range);
        RangeGuard { locks: self, range }
    }
}

/// Holds a run of blocks until it is dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: BlockRange,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.locks.held);
        if let Some(at) = held.iter().position(|r| *r == self.range) {
            held.swap_remove(at);
        }
        drop(held);
        self.locks.freed.notify_all();
    }
}
