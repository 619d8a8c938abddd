//! Flushes in which the source has a part.
//!
//! A guest that flushes is told that everything it wrote is durable, also what it wrote at the old
//! site before it came here. Nobody else sees to that: its hypervisor may have let it go there
//! without a flush. So
//! - before the handoff a flush is passed on to the source, and answered when the source has
//!   answered. It says nothing about where the VM runs, and is no handoff;
//! - after it one more is owed to a source that keeps no fence, before the first flush here is
//!   answered: one that was answered before the handoff need not cover what was written after it. A
//!   source of ours has made all durable before it answers to the handoff, and is owed none.
//!
//! That one is owed is recorded with the handoff, so that a restart does not forget it, and struck out
//! once the source has answered. Where the source is away a flush waits for it, or fails, as a
//! read does ([`SourceLoss`]). No lock is held while the source or a guest is called.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_engine::sync::pause_for;
use hikkoshi_wan::{SourceError, SourceErrorKind};

use super::commit::FlushDone;
use super::relocation::Relocation;
use super::{Volume, lock};
use crate::config::SourceLoss;
use crate::events::EventKind;
use crate::status::LifeState;

/// The pause before one that is owed and for which nobody waits is tried again, after the source has
/// refused it.
const REST: Duration = Duration::from_secs(5);

/// How long a handoff to the next site waits for the one that is owed, and how often it looks.
const OWED_LIMIT: Duration = Duration::from_secs(10);
const OWED_BEAT: Duration = Duration::from_millis(2);

/// Those that wait for the source.
#[derive(Debug, Default)]
pub(super) struct SourceFlushes {
    state: Mutex<State>,
    /// The handoff is behind us, and the source has not said since that all is durable there.
    owed: AtomicBool,
    /// It has, and that is to be recorded.
    settled: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The one that the source is asked now.
    asked: Option<Asked>,
    /// Guests' flushes that came after that was asked: it need not cover what was written between.
    waiting: Vec<FlushDone>,
    /// Since when they wait for a source that is away.
    lost_since: Option<Duration>,
    rests_until: Duration,
    /// How many were asked so far: tells late answers of an earlier one.
    number: u64,
    stopped: bool,
}

struct Asked {
    number: u64,
    /// It was asked after the handoff.
    after_handoff: bool,
    covered: Vec<FlushDone>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("asked", &self.asked.as_ref().map(|asked| asked.number))
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl SourceFlushes {
    /// Of a volume that stands after a handoff, or not: `owed` as it was recorded.
    pub fn new(owed: bool) -> Self {
        Self {
            owed: AtomicBool::new(owed),
            ..Self::default()
        }
    }
}

impl State {
    /// All that wait, whatever was asked for them.
    fn take_all(&mut self) -> Vec<FlushDone> {
        let asked = self.asked.take();
        let mut all = asked.map(|asked| asked.covered).unwrap_or_default();
        all.append(&mut self.waiting);
        self.lost_since = None;
        all
    }
}

impl Volume {
    /// Whether a flush here must not be answered before the source was asked.
    pub(super) fn source_has_a_part(&self) -> bool {
        match self.life() {
            LifeState::Standby => true,
            LifeState::Arriving => self.source_flushes.owed.load(Ordering::Acquire),
            _ => false,
        }
    }

    /// Whether its source must be asked once more after the handoff.
    pub(super) fn will_owe_a_flush(&self, relocation: &Relocation) -> bool {
        // One that keeps a fence has synced behind it.
        !self.has_arrival() && !self.from_image && relocation.source().info().can_flush
    }

    /// From here on one is owed. Before a guest can flush behind the handoff.
    pub(super) fn owes_a_flush(&self) {
        self.source_flushes.owed.store(true, Ordering::Release);
    }

    /// Asks the source and then, after the handoff, makes durable what is here; calls `done` with
    /// the outcome, on another thread or within the call.
    pub(super) fn flush_with_source(&self, done: FlushDone) {
        lock(&self.source_flushes.state).waiting.push(done);
        self.attend_source_flushes();
    }

    /// Does what is to be done now: asks the source, if it can be asked; answers those whose flushes
    /// are none of its business any more, or have waited for it too long. To be called now and then,
    /// and when something has changed that they wait for.
    pub(super) fn attend_source_flushes(&self) {
        let Some(relocation) = self.relocation() else {
            return self.flush_here(self.take_source_flushes());
        };
        if !self.source_has_a_part() {
            return self.flush_here(self.take_source_flushes());
        }
        if !relocation.source().info().can_flush {
            // Nothing more can be done.
            self.source_answered_for_good();
            return self.flush_here(self.take_source_flushes());
        }
        let now = self.now();
        // After the handoff another disk may answer in its place, whose word is worth nothing.
        let usable = relocation.is_source_usable();
        let (number, too_late) = {
            let mut state = lock(&self.source_flushes.state);
            if state.stopped {
                (None, state.take_all())
            } else if usable {
                state.lost_since = None;
                (self.next_source_flush(&mut state, now), Vec::new())
            } else {
                (None, self.given_up_on(&mut state, now))
            }
        };
        for done in too_late {
            done(Err(io::Error::other(
                "the source is unreachable, so nobody knows whether what was written there is \
                 durable",
            )));
        }
        if let Some(number) = number {
            let Some(volume) = relocation.volume() else {
                return;
            };
            let (asked, believed) = (Arc::clone(&relocation), relocation.belief());
            let done =
                move |outcome| volume.source_flushed(number, asked.vouched(believed, outcome));
            relocation.source().flush(Box::new(done));
        }
    }

    /// Begins the next one, if there is one to ask and none is under way.
    fn next_source_flush(&self, state: &mut State, now: Duration) -> Option<u64> {
        let wanted = !state.waiting.is_empty()
            || self.life() == LifeState::Arriving && now >= state.rests_until;
        if state.asked.is_some() || !wanted {
            return None;
        }
        state.number += 1;
        state.asked = Some(Asked {
            number: state.number,
            after_handoff: self.life() == LifeState::Arriving,
            covered: std::mem::take(&mut state.waiting),
        });
        Some(state.number)
    }

    /// Those that have waited for a source that is away for longer than it may be.
    fn given_up_on(&self, state: &mut State, now: Duration) -> Vec<FlushDone> {
        if state.waiting.is_empty() && state.asked.is_none() {
            state.lost_since = None;
            return Vec::new();
        }
        let since = *state.lost_since.get_or_insert(now);
        match self.on_loss {
            SourceLoss::Error(after) if now.saturating_sub(since) >= after => state.take_all(),
            _ => Vec::new(),
        }
    }

    /// The source has answered. On a thread of it.
    fn source_flushed(&self, number: u64, outcome: Result<(), SourceError>) {
        let refused = {
            let mut state = lock(&self.source_flushes.state);
            let Some(asked) = state.asked.take_if(|asked| asked.number == number) else {
                // They were answered otherwise.
                return;
            };
            match outcome {
                Ok(()) => {
                    drop(state);
                    self.source_flush_succeeded(asked);
                    return self.attend_source_flushes();
                }
                Err(error) if error.kind == SourceErrorKind::Refused => {
                    state.rests_until = self.now() + REST;
                    Some((asked, error))
                }
                Err(_) => {
                    // Asked again as soon as it is back, for these and all that came meanwhile.
                    let mut waiting = asked.covered;
                    waiting.append(&mut state.waiting);
                    state.waiting = waiting;
                    None
                }
            }
        };
        if let Some((asked, error)) = refused {
            self.source_flush_failed(asked, &error);
        }
        self.attend_source_flushes();
    }

    fn source_flush_succeeded(&self, asked: Asked) {
        if asked.after_handoff {
            self.source_answered_for_good();
            return self.flush_here(asked.covered);
        }
        // They were asked for before the handoff, so nothing that was written here is behind them.
        for done in asked.covered {
            done(self.check_poison());
        }
    }

    fn source_flush_failed(&self, asked: Asked, error: &SourceError) {
        self.event(
            EventKind::SourceError,
            format!("the source could not make durable what was written there: {error}"),
        );
        for done in asked.covered {
            done(Err(io::Error::other(format!(
                "the source could not make durable what was written there: {error}"
            ))));
        }
    }

    /// Nothing is owed any more.
    fn source_answered_for_good(&self) {
        if self.source_flushes.owed.swap(false, Ordering::AcqRel) {
            self.source_flushes.settled.store(true, Ordering::Release);
            self.commit_soon();
        }
    }

    /// Records that nothing is owed any more, if that is so and not recorded. On the thread that
    /// commits: readers of the source wait for no medium.
    pub(super) fn record_source_flush(&self) {
        if !self.source_flushes.settled.swap(false, Ordering::AcqRel) {
            return;
        }
        let mut journal = lock(&self.journal);
        if let Some(state) = journal.state.as_mut()
            && state.identity().ties.source_flush_owed
        {
            let outcome = state.change(|identity| identity.ties.source_flush_owed = false);
            // Else the next start asks once more.
            let _ = self.note_state("recording that the source has flushed", outcome);
        }
    }

    fn take_source_flushes(&self) -> Vec<FlushDone> {
        lock(&self.source_flushes.state).take_all()
    }

    /// Waits until nothing is owed: whoever takes the disk over from here relies on what is still at
    /// the source as well.
    ///
    /// # Errors
    /// It is still owed; the text says why.
    pub(super) fn await_nothing_owed(&self) -> Result<(), String> {
        let begun = self.now();
        while self.life() == LifeState::Arriving && self.source_has_a_part() {
            if self.now().saturating_sub(begun) >= OWED_LIMIT {
                return Err(
                    "the source of this disk has not made durable yet what was written there, so \
                     the disk cannot move on; see whether it can be reached"
                        .to_owned(),
                );
            }
            pause_for(OWED_BEAT);
        }
        Ok(())
    }

    /// The end: nobody waits for the source any more.
    pub(super) fn end_source_flushes(&self) {
        let left = {
            let mut state = lock(&self.source_flushes.state);
            state.stopped = true;
            state.take_all()
        };
        for done in left {
            done(Err(io::Error::other(
                "this ends before the source could be asked to flush",
            )));
        }
    }

    /// What a person should know of it.
    pub(super) fn source_flush_note(&self) -> Option<String> {
        let relocation = self.relocation()?;
        if self.life() == LifeState::Standby && !relocation.source().info().can_flush {
            return Some(
                "the source cannot be asked to flush: a flush here does not make durable what was \
                 written there; have the old hypervisor flush before the VM leaves"
                    .to_owned(),
            );
        }
        let waiting = {
            let state = lock(&self.source_flushes.state);
            !state.waiting.is_empty() || state.asked.as_ref().is_some_and(|a| !a.covered.is_empty())
        };
        (waiting && self.source_has_a_part() && !relocation.is_source_usable()).then(|| {
            "a flush waits for the source, which cannot be reached: what was written there may not \
             be durable there yet"
                .to_owned()
        })
    }
}
