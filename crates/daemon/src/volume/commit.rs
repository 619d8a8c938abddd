//! Making things durable: the one order in which it happens.
//!
//! A commit is, in this order:
//! 1. take the records that writes and installs have left so far;
//! 2. sync the image, so that the data of these records (written before they were left) is stable;
//! 3. append the records to the log and sync the log;
//! 4. tell those who waited.
//!
//! A record therefore never gets ahead of its data, and a flush with no new record costs one sync.
//! Commits of several clients are shared: all who wait when one begins are served by it. A failed
//! step poisons the volume; nothing is tried again in silence.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use hikkoshi_engine::geometry::BlockRange;
use hikkoshi_engine::journal::Record;
use hikkoshi_store::state::StateDir;

use super::{Volume, lock};

/// Called once with the outcome of a flush.
pub type FlushDone = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Records that may gather before a commit is made without anyone asking: bounds memory.
const MAX_PENDING_RECORDS: usize = 1 << 16;

/// How long records may gather: bounds what a power cut makes the background copy fetch again.
pub const LAZY_COMMIT_AFTER: Duration = Duration::from_secs(2);

/// A sync that takes less than this costs less than handing it to another thread.
const INLINE_SYNC_US: u64 = 30;

/// The durable state, and what is not in it yet.
#[derive(Default)]
pub struct Journal {
    /// Absent for a plain image that never had a source.
    pub state: Option<StateDir>,
}

/// Records of what became resident since the last commit, in the order of their writes.
#[derive(Debug, Default)]
pub struct Pending {
    records: Mutex<Vec<Record>>,
}

impl Pending {
    /// Leaves a record for the next commit. The data it speaks of must have been written.
    /// True if a commit should be made soon.
    pub fn leave(&self, record: Record) -> bool {
        let mut records = lock(&self.records);
        match (records.last_mut(), &record) {
            (Some(Record::Owned(last)), Record::Owned(next))
            | (Some(Record::Clean(last)), Record::Clean(next))
                if last.end == next.start =>
            {
                *last = BlockRange::new(last.start, next.end);
            }
            _ => records.push(record),
        }
        records.len() >= MAX_PENDING_RECORDS
    }

    fn take(&self) -> Vec<Record> {
        std::mem::take(&mut lock(&self.records))
    }

    fn is_empty(&self) -> bool {
        lock(&self.records).is_empty()
    }
}

/// Who waits for a commit, and the thread that makes it.
#[derive(Default)]
pub struct Committer {
    pub(super) queue: Mutex<Queue>,
    wake: Condvar,
    last_sync_us: AtomicU64,
}

#[derive(Default)]
pub(super) struct Queue {
    waiting: Vec<FlushDone>,
    lazy: bool,
    pub(super) complete: bool,
    stop: bool,
}

impl Committer {
    /// Makes every wait end once `stop` was said and all who waited were served.
    pub fn stop(&self) {
        lock(&self.queue).stop = true;
        self.wake.notify_all();
    }
}

impl Volume {
    /// Makes all completed writes durable and then calls `done`, on another thread.
    pub fn flush(&self, done: FlushDone) {
        lock(&self.committer.queue).waiting.push(done);
        self.committer.wake.notify_one();
    }

    /// The same within the call, where that is cheaper than asking another thread: the medium
    /// syncs in no time and nobody else commits. `None` if it is not so.
    pub fn flush_inline(&self) -> Option<io::Result<()>> {
        if self.committer.last_sync_us.load(Ordering::Relaxed) > INLINE_SYNC_US {
            return None;
        }
        // Behind a commit or a snapshot that runs already, the connection's other requests would
        // have to wait as well.
        let mut journal = self.journal.try_lock().ok()?;
        Some(self.commit_locked(&mut journal))
    }

    /// Asks for a commit for which nobody waits.
    pub fn commit_soon(&self) {
        let mut queue = lock(&self.committer.queue);
        if !queue.lazy {
            queue.lazy = true;
            self.committer.wake.notify_one();
        }
    }

    /// Asks for the last commit of a relocation.
    pub(super) fn complete_soon(&self) {
        lock(&self.committer.queue).complete = true;
        self.committer.wake.notify_one();
    }

    /// One commit, in the order told above.
    ///
    /// # Errors
    /// The error of the medium; the volume is poisoned then.
    pub fn commit(&self) -> io::Result<()> {
        let mut journal = lock(&self.journal);
        self.commit_locked(&mut journal)
    }

    fn commit_locked(&self, journal: &mut Journal) -> io::Result<()> {
        self.check_poison()?;
        let relocation = self.relocation();
        let started = Instant::now();
        // 1. the records first: whatever is left after this waits for the next commit
        let records = relocation
            .as_ref()
            .map(|r| r.pending.take())
            .unwrap_or_default();
        // 2. their data
        self.sync_image()?;
        // 3. the records
        if let Some(state) = journal.state.as_mut().filter(|_| !records.is_empty()) {
            state.append(&records).map_err(|e| {
                self.poison("writing the durable state", &e);
                io::Error::other(e)
            })?;
            if state.needs_checkpoint() {
                self.commit_soon();
            }
        }
        let us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mean = self.committer.last_sync_us.load(Ordering::Relaxed);
        // Rises at once and falls slowly: one slow sync is enough to stop trying inline.
        self.committer
            .last_sync_us
            .store(us.max(mean / 8 * 7), Ordering::Relaxed);
        Ok(())
    }

    fn sync_image(&self) -> io::Result<()> {
        self.store
            .sync()
            .inspect_err(|e| self.poison("syncing the image", e))
    }

    /// Writes a snapshot when the log has grown enough. Those who flush meanwhile wait for it.
    fn checkpoint_if_due(&self) {
        let mut journal = lock(&self.journal);
        let (Some(relocation), Some(state)) = (self.relocation(), journal.state.as_mut()) else {
            return;
        };
        if state.needs_checkpoint() && !self.poisoned.load(Ordering::Acquire) {
            let mut sync = || self.store.sync();
            if let Err(e) = state.checkpoint(&relocation.residency, &mut sync) {
                self.poison("writing a snapshot of the durable state", &e);
            }
        }
    }

    /// Ends the relocation: everything durable, recorded as complete, the source let go. Does
    /// nothing while a comparison with the source is awaited.
    ///
    /// # Errors
    /// The error of the medium; the relocation goes on existing, and the volume is poisoned.
    pub fn complete(&self) -> io::Result<()> {
        if self.relocation().is_some() && !self.may_let_go() {
            return Ok(());
        }
        let mut journal = lock(&self.journal);
        let Some(relocation) = self.relocation() else {
            return Ok(());
        };
        self.commit_locked(&mut journal)?;
        if let Some(state) = journal.state.as_mut() {
            state.record_local().map_err(|e| {
                self.poison("recording that the move is complete", &e);
                io::Error::other(e)
            })?;
        }
        self.set_life(crate::status::LifeState::Local);
        let old = self
            .relocation
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        drop(journal);
        let changed = relocation.source().checksum_failures();
        let traffic = &relocation.traffic;
        traffic.checksum_failures.store(changed, Ordering::Relaxed);
        self.last_traffic.take_over(traffic);
        relocation.retire();
        drop(old);
        if let Some(finish) = lock(&self.at_completion).take() {
            finish();
        }
        tracing::info!(export = %self.name, "every block is here; the source is no longer needed");
        Ok(())
    }

    /// The loop of the thread that commits. Returns after [`Committer::stop`].
    pub(super) fn run_committer(self: Arc<Self>) {
        loop {
            let (waiting, lazy, complete, stop) = self.await_duties();
            if !waiting.is_empty() || lazy || stop {
                self.commit_for(waiting);
                self.checkpoint_if_due();
            }
            if complete && let Err(e) = self.complete() {
                tracing::error!(export = %self.name, "the move could not be completed: {e}");
            }
            if stop {
                return;
            }
        }
    }

    fn await_duties(&self) -> (Vec<FlushDone>, bool, bool, bool) {
        let mut queue = lock(&self.committer.queue);
        loop {
            let idle = queue.waiting.is_empty() && !queue.lazy && !queue.complete && !queue.stop;
            if !idle {
                let complete = std::mem::take(&mut queue.complete);
                let lazy = std::mem::take(&mut queue.lazy);
                return (
                    std::mem::take(&mut queue.waiting),
                    lazy,
                    complete,
                    queue.stop,
                );
            }
            queue = self
                .committer
                .wake
                .wait(queue)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn commit_for(&self, waiting: Vec<FlushDone>) {
        let outcome = self.commit();
        if let (Err(e), true) = (&outcome, waiting.is_empty()) {
            tracing::debug!(export = %self.name, "a commit that nobody waited for failed: {e}");
        }
        for done in waiting {
            done(match &outcome {
                Ok(()) => Ok(()),
                Err(e) => Err(copy_of(e)),
            });
        }
    }

    /// Whether records wait for a commit.
    pub(super) fn has_pending(&self) -> bool {
        self.relocation().is_some_and(|r| !r.pending.is_empty())
    }
}

/// The same error for several waiters; keeps the number that goes onto the wire.
fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(raw) => io::Error::from_raw_os_error(raw),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
