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
use std::time::Duration;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::journal::Gathered;
use hikkoshi_engine::mover::Phase;
use hikkoshi_engine::sync::wait;
use hikkoshi_store::state::{StateDir, StateError};

use super::relocation::Relocation;
use super::{Volume, lock};
use crate::events::EventKind;
use crate::status::LifeState;

/// Called once with the outcome of a flush.
pub type FlushDone = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Records that may gather before a commit is made without anyone asking: bounds memory.
pub(super) const MAX_PENDING_RECORDS: usize = 1 << 16;

/// How often the thread that keeps the time looks whether something is to be asked for.
const BEAT: Duration = Duration::from_secs(2);

/// How long records may gather: bounds what a power cut makes the background copy fetch again. A guest
/// that writes meanwhile notices the sync, so it is seldom. Only the first, which may be of all that was copied before
/// the handoff, is made at the next beat.
const LAZY_COMMIT_AFTER: Duration = Duration::from_secs(10);

/// How often the witnesses of the source's disk are written anew while they change: seldom, since
/// flushes wait for it, and older ones serve as well.
const KEEP_WITNESSES_AFTER: Duration = Duration::from_secs(30);

/// A sync that takes less than this costs less than handing it to another thread.
const INLINE_SYNC_US: u64 = 30;

/// The pause before a snapshot that found no space is tried again: it may be large, and those who
/// flush wait for it.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(5);

/// The durable state, and what is not in it yet.
#[derive(Default)]
pub struct Journal {
    /// Absent for a plain image that never had a source.
    pub state: Option<StateDir>,
    /// Until when no snapshot is tried.
    snapshot_rests_until: Option<Duration>,
}

impl Journal {
    /// With this state, if there is one.
    pub fn new(state: Option<StateDir>) -> Self {
        Self {
            state,
            snapshot_rests_until: None,
        }
    }
}

/// What the thread that keeps the time remembers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beats {
    last: Duration,
    /// When it last asked for a commit.
    asked: Option<Duration>,
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

impl Volume {
    /// Makes all completed writes durable and then calls `done`, on another thread: also those that
    /// were made at the source, where the source must be asked for that.
    pub fn flush(&self, done: FlushDone) {
        if self.source_has_a_part() {
            return self.flush_with_source(done);
        }
        self.flush_here(vec![done]);
    }

    /// The same for what was written here.
    pub(super) fn flush_here(&self, mut waiting: Vec<FlushDone>) {
        if !waiting.is_empty() {
            lock(&self.committer.queue).waiting.append(&mut waiting);
            self.committer.wake.notify_one();
        }
    }

    /// The same within the call, where that is cheaper than asking another thread: the medium
    /// syncs in no time and nobody else commits. `None` if it is not so.
    pub fn flush_inline(&self) -> Option<io::Result<()>> {
        let slow = self.committer.last_sync_us.load(Ordering::Relaxed) > INLINE_SYNC_US;
        if slow || self.source_has_a_part() {
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

    pub(super) fn commit_locked(&self, journal: &mut Journal) -> io::Result<()> {
        self.check_poison()?;
        let relocation = self.relocation();
        let started = self.now();
        // 1. the records first: whatever is left after this waits for the next commit
        let gathered = relocation
            .as_ref()
            .map(|r| r.pending.take())
            .unwrap_or_default();
        crash_point!("commit.taken");
        // 2. their data
        self.sync_image()?;
        crash_point!("commit.synced");
        // 3. the records
        if let Some(relocation) = relocation.filter(|_| !gathered.is_empty())
            && let Err(error) = self.write_records(journal, &relocation, &gathered)
        {
            // Not one of them is durable, and nobody is told so: they wait for the next attempt.
            relocation.pending.put_back(gathered);
            return Err(error);
        }
        crash_point!("commit.done");
        let took = self.now().saturating_sub(started);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let mean = self.committer.last_sync_us.load(Ordering::Relaxed);
        // Rises at once and falls slowly: one slow sync is enough to stop trying inline.
        self.committer
            .last_sync_us
            .store(us.max(mean / 8 * 7), Ordering::Relaxed);
        Ok(())
    }

    fn write_records(
        &self,
        journal: &mut Journal,
        relocation: &Relocation,
        gathered: &Gathered,
    ) -> io::Result<()> {
        let Some(state) = journal.state.as_mut() else {
            return Ok(());
        };
        if gathered.needs_snapshot {
            let rests = |until| self.now() < until;
            if journal.snapshot_rests_until.is_some_and(rests) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            return self.snapshot(journal, relocation);
        }
        let outcome = state.append(&gathered.records);
        self.note_state("writing the durable state", outcome)?;
        if state.needs_checkpoint() {
            self.commit_soon();
        }
        Ok(())
    }

    /// What becomes of a step of the durable state: for want of space it is refused, and may be
    /// tried again; whatever else goes wrong poisons the volume.
    pub(super) fn note_state(&self, what: &str, outcome: Result<(), StateError>) -> io::Result<()> {
        let outcome = outcome.map_err(|error| {
            if !error.is_no_space() {
                self.poison(what, &error);
            }
            error.into_io()
        });
        self.note_write(outcome)
    }

    /// Begins a new epoch.
    fn snapshot(&self, journal: &mut Journal, relocation: &Relocation) -> io::Result<()> {
        let Some(state) = journal.state.as_mut() else {
            return Ok(());
        };
        let mut sync = || self.store.sync();
        let outcome = state.checkpoint(&relocation.residency, &mut sync);
        let full = matches!(&outcome, Err(error) if error.is_no_space());
        journal.snapshot_rests_until = full.then(|| self.now() + SNAPSHOT_PAUSE);
        self.note_state("writing a snapshot of the durable state", outcome)
    }

    fn sync_image(&self) -> io::Result<()> {
        self.store
            .sync()
            .inspect_err(|e| self.poison("syncing the image", e))
    }

    /// Writes a snapshot when the log has grown enough. Those who flush meanwhile wait for it.
    /// Without space for it the log goes on growing, up to a bound of its own, beyond which
    /// flushes are refused.
    fn checkpoint_if_due(&self) {
        let mut journal = lock(&self.journal);
        if self.is_snapshot_due(&journal)
            && let Some(relocation) = self.relocation()
        {
            crash_point!("snapshot-due.begun");
            if let Err(e) = self.snapshot(&mut journal, &relocation) {
                tracing::debug!(export = %self.name, "no snapshot of the durable state: {e}");
            }
            crash_point!("snapshot-due.done");
        }
    }

    fn is_snapshot_due(&self, journal: &Journal) -> bool {
        let wanted = journal
            .state
            .as_ref()
            .is_some_and(StateDir::needs_checkpoint);
        let rests = journal
            .snapshot_rests_until
            .is_some_and(|until| self.now() < until);
        wanted && !rests && !self.poisoned.load(Ordering::Acquire)
    }

    /// Whether a snapshot is due that nobody else will ask for.
    pub(super) fn snapshot_is_due(&self) -> bool {
        let journal = self.journal.try_lock();
        journal.is_ok_and(|journal| self.is_snapshot_due(&journal))
    }

    /// Keeps the witnesses of the source's disk, when there are new ones. `at_once`: the last chance.
    pub(super) fn keep_witnesses(&self, at_once: bool) {
        let journal = lock(&self.journal);
        let (Some(relocation), Some(state)) = (self.relocation(), journal.state.as_ref()) else {
            return;
        };
        let now = self.now();
        let mut kept_at = lock(&self.witnesses_kept_at);
        let soon = kept_at.is_some_and(|at| now.saturating_sub(at) < KEEP_WITNESSES_AFTER);
        if soon && !at_once || self.poisoned.load(Ordering::Acquire) {
            return;
        }
        let witnesses = {
            let mut witnesses = lock(&relocation.witnesses);
            if !witnesses.take_changed() {
                return;
            }
            witnesses.clone()
        };
        *kept_at = Some(now);
        if let Err(e) = state.keep_witnesses(&witnesses) {
            // Nothing depends on it but the proof after a power cut; the next change tries again.
            self.event(
                EventKind::StateTrouble,
                format!("what proves that the source is the same disk is not kept: {e}"),
            );
        }
    }

    /// Ends the relocation: everything durable, recorded as complete, the source let go. Does
    /// nothing while a comparison with the source is awaited.
    ///
    /// # Errors
    /// The error of the medium; the relocation goes on existing. Unless there was no space, which
    /// is tried again, the volume is poisoned.
    pub fn complete(&self) -> io::Result<()> {
        if self.unfinished().is_some() && !self.may_let_go() {
            return Ok(());
        }
        let mut journal = lock(&self.journal);
        let Some(relocation) = self.unfinished() else {
            return Ok(());
        };
        crash_point!("completion.begun");
        self.commit_locked(&mut journal)?;
        crash_point!("completion.committed");
        if let Some(state) = journal.state.as_mut() {
            let outcome = state.record_local();
            self.note_state("recording that the move is complete", outcome)?;
        }
        // Before anybody sees that it is complete: from there on these are the figures of the move.
        let changed = relocation.source().checksum_failures();
        let traffic = &relocation.traffic;
        traffic.checksum_failures.store(changed, Ordering::Relaxed);
        let cancelled = relocation.source().cancelled_bytes();
        traffic.cancelled_bytes.store(cancelled, Ordering::Relaxed);
        self.last_traffic.take_over(traffic);
        self.set_life(crate::status::LifeState::Local);
        // For the way back residency, journal and marks go on, without a source.
        let kept = self.way_back.is_kept();
        let old = if kept { None } else { self.let_go_of_map() };
        drop(journal);
        relocation.retire();
        drop(old);
        // Everything that was at the source is here, durably.
        self.attend_source_flushes();
        if !kept {
            self.way_back.release();
        }
        if let Some(finish) = lock(&self.at_completion).take() {
            finish();
        }
        self.event(
            EventKind::Complete,
            if self.from_image {
                "every block is in the new image; the old one is no longer needed"
            } else {
                "every block is here; the source is no longer needed"
            },
        );
        Ok(())
    }

    /// The loop of the thread that commits. Returns after [`Volume::stop`].
    pub fn run_committer(self: Arc<Self>) {
        loop {
            let (waiting, lazy, complete, stop) = self.await_duties();
            self.do_duties(waiting, lazy || stop, complete);
            self.record_source_flush();
            self.keep_witnesses(stop);
            if stop {
                return;
            }
        }
    }

    fn do_duties(&self, waiting: Vec<FlushDone>, lazy: bool, complete: bool) {
        if !waiting.is_empty() || lazy {
            self.commit_for(waiting);
            self.checkpoint_if_due();
        }
        if complete && let Err(e) = self.complete() {
            tracing::debug!(export = %self.name, "the move could not be completed: {e}");
        }
    }

    /// One turn of that loop, if there is anything to do; for callers without that thread.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn attend_commits(&self) {
        let (waiting, lazy, complete) = {
            let mut queue = lock(&self.committer.queue);
            (
                std::mem::take(&mut queue.waiting),
                std::mem::take(&mut queue.lazy),
                std::mem::take(&mut queue.complete),
            )
        };
        self.do_duties(waiting, lazy, complete);
        self.record_source_flush();
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
            queue = wait(&self.committer.wake, &self.committer.queue, queue);
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

    /// One beat of the thread that keeps the time, to be called every [`Mover::TICK`] or so: tells
    /// the mover the time, and asks for a commit now and then. `false` when there is nothing left to keep
    /// the time for.
    ///
    /// [`Mover::TICK`]: hikkoshi_engine::mover::Mover::TICK
    pub fn keep_time(&self, beats: &mut Beats) -> bool {
        // Also when there is nothing left to come.
        self.tell_source_losses();
        let Some(relocation) = self.relocation() else {
            return false;
        };
        let now = self.now();
        if !self.is_local() {
            self.tick_return(&relocation);
            relocation.tick();
            self.attend_source_flushes();
        }
        let resident = self.geometry.size_bytes() - relocation.residency.missing_bytes();
        self.rate.sample(now, resident);
        if now.saturating_sub(beats.last) < BEAT {
            return true;
        }
        beats.last = now;
        let due = |asked| now.saturating_sub(asked) >= LAZY_COMMIT_AFTER;
        if beats.asked.is_none_or(due) && (!relocation.pending.is_empty() || self.snapshot_is_due())
        {
            beats.asked = (self.life() != LifeState::Standby).then_some(now);
            self.commit_soon();
        }
        // Its last step failed for want of space, say.
        if !self.is_local() && relocation.with_mover(|m| m.phase() == Phase::Complete) {
            self.complete_soon();
        }
        true
    }

    /// Begins the end: lets go of the source, and lets [`Volume::run_committer`] return once all
    /// who waited were served.
    pub fn stop(&self) {
        if let Some(arrival) = &self.arrival {
            arrival.stop();
        }
        if let Some(relocation) = self.relocation() {
            relocation.retire();
        }
        self.end_source_flushes();
        self.verification.end();
        lock(&self.committer.queue).stop = true;
        self.committer.wake.notify_all();
    }

    /// Makes everything durable, after [`Volume::stop`] and the end of all that it ended. Then
    /// what is durable says all that the memory that outlives a kill does.
    ///
    /// # Errors
    /// It could not be made durable. What a guest flushed before is.
    pub fn settle(&self) -> io::Result<()> {
        self.commit()?;
        crash_point!("close.committed");
        let Some(relocation) = self.relocation() else {
            return Ok(());
        };
        let mut journal = lock(&self.journal);
        if let Some(state) = journal.state.as_mut() {
            let mut sync = || self.store.sync();
            state
                .checkpoint(&relocation.residency, &mut sync)
                .map_err(io::Error::other)?;
            self.note_close(state)?;
        }
        Ok(())
    }
}

/// The same error for several waiters; keeps the number that goes onto the wire.
fn copy_of(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(raw) => io::Error::from_raw_os_error(raw),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}
