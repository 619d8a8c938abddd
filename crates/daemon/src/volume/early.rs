//! What is asked of the source before it has answered the handoff.
//!
//! With `--handoff now` the handoff and the first questions for data go out together, which saves a
//! round trip. What comes before the handoff is settled is set aside: nothing of it is believed, put
//! into the image or told to the mover before the source has said, behind its fence, what has changed
//! since its tracking of changes began, and that is recorded here. What was asked for under that
//! tracking and has not changed is what the disk is from then on. All else is asked for again.
//!
//! A guest that reads here meanwhile waits for the handoff. How much is set aside is bounded by what the
//! mover asks for without an answer.

use std::sync::{Arc, Mutex};

use hikkoshi_engine::geometry::BlockRange;
use hikkoshi_wan::{SourceError, SourceErrorKind};

use super::lock;
use super::relocation::Relocation;

type SetAside = Box<dyn FnOnce(&Verdict) + Send>;

/// Whether anything is asked early.
#[derive(Default)]
pub(super) struct Early(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    No,
    /// The handoff is on its way.
    Waiting {
        /// The source's tracking of changes, which began before anything was asked.
        tracking: u64,
        /// The answers that have come.
        set_aside: Vec<SetAside>,
    },
    /// It is behind us. Some that was asked early may still come.
    Settled(Arc<Verdict>),
    /// The source was let go of.
    Over,
}

/// What the source has said at the handoff, under one tracking, of what has changed since that began.
pub(super) struct Changes {
    pub tracking: u64,
    pub blocks: Vec<BlockRange>,
}

/// What that means for what was asked early; `None`: nobody knows what has changed.
struct Verdict(Option<Changes>);

impl Verdict {
    fn of<T>(
        &self,
        tracking: u64,
        range: BlockRange,
        outcome: Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        let counts = self.0.as_ref().is_some_and(|told| {
            told.tracking == tracking && !told.blocks.iter().any(|c| c.overlaps(range))
        });
        outcome
            .and_then(|answer| {
                let why = "it may have changed before the handoff";
                let again = SourceError::new(SourceErrorKind::Disconnected, why);
                counts.then_some(answer).ok_or(again)
            })
            // What had come of one that failed was in time for nothing.
            .map_err(|error| SourceError {
                come: None,
                ..error
            })
    }
}

impl Early {
    fn end(&self) {
        let before = std::mem::replace(&mut *lock(&self.0), State::Over);
        // Outside of the lock: they own what may do more when it goes.
        drop(before);
    }

    /// Under which tracking it is, if what is asked now is asked early.
    pub(super) fn tracking(&self) -> Option<u64> {
        match &*lock(&self.0) {
            State::Waiting { tracking, .. } => Some(*tracking),
            State::No | State::Settled(_) | State::Over => None,
        }
    }
}

impl Relocation {
    /// The handoff is about to be asked for, and the source tracks changes: asks for data already. Where
    /// that was begun under another tracking, which the source has lost, what was asked then counts for
    /// nothing.
    pub(super) fn ask_early(self: &Arc<Self>, tracking: u64) {
        {
            let mut state = lock(&self.early.0);
            match &mut *state {
                State::No => {
                    let set_aside = Vec::new();
                    *state = State::Waiting {
                        tracking,
                        set_aside,
                    };
                }
                State::Waiting { tracking: old, .. } => *old = tracking,
                State::Settled(_) | State::Over => return,
            }
        }
        self.drive(|m, now, out| m.handoff(now, &self.residency, out));
    }

    /// The handoff is recorded here; the source has told with it what has changed, if that is known.
    pub(super) fn settle_early(&self, changes: Option<Changes>) {
        let verdict = Arc::new(Verdict(changes));
        let set_aside = {
            let mut state = lock(&self.early.0);
            let State::Waiting { set_aside, .. } = &mut *state else {
                return;
            };
            let set_aside = std::mem::take(set_aside);
            *state = State::Settled(Arc::clone(&verdict));
            set_aside
        };
        for hand_on in set_aside {
            hand_on(&verdict);
        }
    }

    /// Hands on the answer to a question about `range`: at once, or if it was asked early, under that
    /// tracking, when it is known whether it counts.
    pub(super) fn once_settled<T: Send + 'static>(
        &self,
        tracking: Option<u64>,
        range: BlockRange,
        outcome: Result<T, SourceError>,
        hand_on: impl FnOnce(Result<T, SourceError>) + Send + 'static,
    ) {
        let Some(tracking) = tracking else {
            return hand_on(outcome);
        };
        let verdict = {
            let mut state = lock(&self.early.0);
            match &mut *state {
                State::Waiting { set_aside, .. } => {
                    set_aside.push(Box::new(move |verdict: &Verdict| {
                        hand_on(verdict.of(tracking, range, outcome));
                    }));
                    return;
                }
                State::Settled(verdict) => Arc::clone(verdict),
                State::No | State::Over => return,
            }
        };
        hand_on(verdict.of(tracking, range, outcome));
    }

    /// Nobody waits for it any more.
    pub(super) fn forget_early(&self) {
        self.early.end();
    }
}
