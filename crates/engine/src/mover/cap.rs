//! The cap of a whole daemon, and what a disk may copy by that and by its own.
//!
//! What the common cap earns is divided among the disks that want to copy now: each has an equal
//! part, and what one does not use, because its own cap or its link allows less, is the others'. A disk
//! that wants nothing for a moment gets nothing and leaves nothing unused.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::bucket::{BURST, TokenBucket};

/// A disk that has not asked for so long wants nothing. Movers that are held back ask every tick, and
/// with whatever lands.
const WANTS_FOR: Duration = Duration::from_millis(200);

const NANOS: u128 = 1_000_000_000;

/// A cap on what several disks copy together, for [`Mover::share_cap`](super::Mover::share_cap).
#[derive(Debug, Default)]
pub struct Cap {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rate: Option<u64>,
    filled_at: Option<Duration>,
    parts: BTreeMap<u64, Part>,
    next_part: u64,
}

/// What one disk has of it.
#[derive(Debug, Default)]
struct Part {
    /// Bytes that it may copy; below zero after a chunk larger than what was there.
    level: i128,
    asked_at: Option<Duration>,
}

impl Cap {
    /// Of so many bytes per second; `None` for none.
    pub fn new(rate: Option<u64>) -> Self {
        let this = Self::default();
        this.set_rate(rate);
        this
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes per second.
    pub fn rate(&self) -> Option<u64> {
        self.state().rate
    }

    /// Changes it. What is under way still comes.
    pub fn set_rate(&self, rate: Option<u64>) {
        let mut state = self.state();
        state.rate = rate;
        state.filled_at = None;
        for part in state.parts.values_mut() {
            part.level = 0;
        }
    }

    /// A place for one more disk. Its clock is behind the clock that is common to all by so much.
    fn take_part(self: &Arc<Self>, behind: Duration) -> CapSeat {
        let mut state = self.state();
        let number = state.next_part;
        state.next_part += 1;
        state.parts.insert(number, Part::default());
        drop(state);
        CapSeat {
            cap: Arc::clone(self),
            number,
            behind,
        }
    }
}

impl State {
    /// Divides what was earned since the last time.
    fn fill(&mut self, now: Duration) {
        let Some(rate) = self.rate.map(u128::from) else {
            return;
        };
        let since = *self.filled_at.get_or_insert(now);
        let wants = |part: &&mut Part| {
            let asked = part.asked_at;
            asked.is_some_and(|at| now.saturating_sub(at) < WANTS_FOR)
        };
        let mut wanting: Vec<&mut Part> = self.parts.values_mut().filter(wants).collect();
        let count = i128::try_from(wanting.len()).unwrap_or(1).max(1);
        let earned = rate * now.saturating_sub(since).as_nanos() / NANOS;
        let mut left = i128::try_from(earned).unwrap_or(i128::MAX);
        if left < count {
            return;
        }
        self.filled_at = Some(now);
        let burst = i128::try_from(rate * BURST.as_nanos() / NANOS).unwrap_or(i128::MAX);
        // A pause is not made up for.
        left = left.min(burst.max(count));
        let most = (burst / count).max(1);
        // Whoever has the most gets the least more, so that what is left is for those after it.
        wanting.sort_by_key(|part| std::cmp::Reverse(part.level));
        let mut others = count;
        for part in wanting {
            let added = (left / others).min(most - part.level).max(0);
            part.level += added;
            left -= added;
            others -= 1;
        }
    }
}

/// One disk's place under a common cap. Given back when dropped.
#[derive(Debug)]
struct CapSeat {
    cap: Arc<Cap>,
    number: u64,
    behind: Duration,
}

impl CapSeat {
    fn has_room(&self, now: Duration) -> bool {
        let now = now + self.behind;
        let mut state = self.cap.state();
        if state.rate.is_none() {
            return true;
        }
        if let Some(part) = state.parts.get_mut(&self.number) {
            part.asked_at = Some(now);
        }
        state.fill(now);
        let part = state.parts.get(&self.number);
        part.is_some_and(|part| part.level > 0)
    }

    fn take(&self, bytes: u64) {
        let mut state = self.cap.state();
        if state.rate.is_some()
            && let Some(part) = state.parts.get_mut(&self.number)
        {
            part.level -= i128::from(bytes);
        }
    }
}

impl Drop for CapSeat {
    fn drop(&mut self) {
        self.cap.state().parts.remove(&self.number);
    }
}

/// What a disk may copy by its own cap and by the common one. Shared by its mover and by what is
/// copied of it before the handoff.
#[derive(Debug)]
pub(crate) struct Allowance {
    state: Mutex<(TokenBucket, Option<CapSeat>)>,
}

impl Allowance {
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            state: Mutex::new((TokenBucket::new(rate), None)),
        }
    }

    fn state(&self) -> MutexGuard<'_, (TokenBucket, Option<CapSeat>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn share(&self, cap: &Arc<Cap>, behind: Duration) {
        self.state().1 = Some(cap.take_part(behind));
    }

    /// Its own cap.
    pub fn rate(&self) -> Option<u64> {
        self.state().0.rate()
    }

    /// The common one.
    pub fn common_rate(&self) -> Option<u64> {
        let state = self.state();
        state.1.as_ref().and_then(|seat| seat.cap.rate())
    }

    pub fn set_rate(&self, now: Duration, rate: Option<u64>) {
        self.state().0.set_rate(now, rate);
    }

    /// Whether a chunk may go now. Who is held back by its own cap wants nothing of the common one.
    pub fn has_room(&self, now: Duration) -> bool {
        let mut state = self.state();
        let (own, common) = &mut *state;
        own.has_room(now) && common.as_ref().is_none_or(|seat| seat.has_room(now))
    }

    pub fn take(&self, bytes: u64) {
        let mut state = self.state();
        state.0.take(bytes);
        if let Some(seat) = &state.1 {
            seat.take(bytes);
        }
    }
}
