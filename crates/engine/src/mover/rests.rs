//! The rests of partly written blocks, and when they are fetched.
//!
//! A guest that writes less than a block leaves one, thousands a second if it does so all the time.
//! Most often it writes the rest of the block itself a moment later, or never reads it, and a fetch for each at once takes
//! more of the machine than all else that a write does. So they wait: for the background copy, which comes by anyway,
//! or else until the guest leaves no more, and then one comes after the other. What does not wait is the table that
//! remembers the sectors: before it is full it is emptied; and a disk that is to go back where it came from.
//!
//! Which blocks they are is the residency's to say, so that a guest's write need not tell the mover anything.

use std::time::Duration;

use super::flights::Purpose;
use super::{Action, Mover, Phase};
use crate::geometry::{BlockIndex, BlockRange};
use crate::residency::{BlockState, Residency};

/// What part of the residency's table of them may wait.
const WAITING_PART: usize = 4;

/// For how long there were not more of them than before, when the first is fetched.
const QUIET: Duration = Duration::from_millis(500);

/// How long after somebody said that they are needed they are.
const NEED_LASTS: Duration = Duration::from_secs(1);

/// How many are under way at most, and how many are asked for at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pace {
    flights: usize,
    step: usize,
}

/// One after the other, while nobody needs any.
const TRICKLE: Pace = Pace {
    flights: 4,
    step: 1,
};
/// Too many wait.
const DRAIN: Pace = Pace {
    flights: 64,
    step: 64,
};
/// All are needed.
const HURRY: Pace = Pace {
    flights: 1024,
    step: 64,
};
/// No more bytes are under way at any pace, but those of so many blocks.
const MOST_BYTES: u64 = 4 << 20;
const LEAST_FLIGHTS: usize = 4;

/// When which rests are fetched.
#[derive(Debug, Default)]
pub(super) struct Rests {
    /// How many there were when last looked.
    seen: usize,
    /// When there were more than before.
    grew_at: Duration,
    /// When somebody last said that they are needed.
    needed_at: Option<Duration>,
    /// Where to look for the next.
    cursor: u64,
}

impl Rests {
    /// Whether and how they are fetched now that there are `waiting`, of `room` at most. `copied`: the background
    /// copy fetches them.
    fn pace(&mut self, now: Duration, waiting: usize, room: usize, copied: bool) -> Option<Pace> {
        if waiting > self.seen {
            self.grew_at = now;
        }
        self.seen = waiting;
        let since = |then| now.saturating_sub(then);
        if self.needed_at.is_some_and(|at| since(at) < NEED_LASTS) {
            Some(HURRY)
        } else if waiting > room / WAITING_PART {
            Some(DRAIN)
        } else if copied || since(self.grew_at) < QUIET {
            None
        } else {
            Some(TRICKLE)
        }
    }
}

impl<W> Mover<W> {
    /// All that is partly here is to be whole soon. To be said again every second while that is so,
    /// and more often to have more of it come at once.
    pub fn need_rests(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        self.rests.needed_at = Some(now);
        self.fetch_rests(now, residency, out);
    }

    /// A few more.
    pub(super) fn fetch_rests(
        &mut self,
        now: Duration,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        if let Some(pace) = self.pace_of_rests(now, residency) {
            self.launch_rests(now, pace, residency, out);
        }
    }

    /// One has come. Where they trickle, the next is a matter of time.
    pub(super) fn rest_landed(
        &mut self,
        now: Duration,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let pace = self.pace_of_rests(now, residency);
        if let Some(pace) = pace.filter(|pace| *pace != TRICKLE) {
            self.launch_rests(now, pace, residency, out);
        }
    }

    fn pace_of_rests(&mut self, now: Duration, residency: &Residency) -> Option<Pace> {
        if self.phase != Phase::Arriving || !self.connected {
            return None;
        }
        let copied = self.policy.background && !self.paused;
        let (waiting, room) = (residency.partial_blocks(), residency.most_partial_blocks());
        self.rests.pace(now, waiting, room, copied)
    }

    fn launch_rests(
        &mut self,
        now: Duration,
        pace: Pace,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let fit = usize::try_from(MOST_BYTES / self.geometry.block_bytes()).unwrap_or(usize::MAX);
        let flights = pace.flights.min(fit.max(LEAST_FLIGHTS));
        for _ in 0..pace.step.min(self.rests.seen) {
            if self.must_rest(now) || self.flights.count(Purpose::Rest) >= flights {
                return;
            }
            let next = residency.next_partial(BlockIndex(self.rests.cursor));
            let Some(block) = next.or_else(|| residency.next_partial(BlockIndex(0))) else {
                return;
            };
            self.rests.cursor = block.0 + 1;
            let range = BlockRange::one(block);
            if residency.state(block) == BlockState::Partial
                && self.flights.covering(range.start, range.end).is_none()
                && !self.is_refused(range)
            {
                self.launch(now, range, Purpose::Rest, out);
            }
        }
    }
}
