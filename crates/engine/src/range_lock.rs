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
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<BlockRange>,
    /// Threads that wait for one to be freed. Waking none is a system call, too.
    waiters: usize,
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
            state: Mutex::new(State::default()),
            freed: Condvar::new(),
        }
    }

    /// Waits until nobody else holds a block of `range`, and holds them all.
    pub fn lock(&self, range: BlockRange) -> RangeGuard<'_> {
        let mut state = lock(&self.state);
        while state.held.iter().any(|other| other.overlaps(range)) {
            state.waiters += 1;
            state = wait(&self.freed, &self.state, state);
            state.waiters -= 1;
        }
        state.held.push(range);
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
        let mut state = lock(&self.locks.state);
        if let Some(at) = state.held.iter().position(|r| *r == self.range) {
            state.held.swap_remove(at);
        }
        let waited_for = state.waiters > 0;
        drop(state);
        if waited_for {
            self.locks.freed.notify_all();
        }
    }
}
