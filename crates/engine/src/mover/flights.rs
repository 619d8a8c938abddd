//! Fetches under way, by number and by place. Kept fetches never overlap one another, which is
//! what merges duplicates; those that pass through are kept apart by number only.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::geometry::BlockRange;

/// The number of a fetch, never used twice by one mover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlightId(pub u64);

/// Why a fetch was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A reader waits.
    Demand,
    /// The rest of a partially written block.
    Rest,
    /// A stream that is read sequentially will want it.
    Ahead,
    /// The background copy: of what is read often, of most of the disk, and of what is likely to be
    /// overwritten.
    Hot,
    Bulk,
    Late,
    /// No fetch at all: known zeroes are being installed.
    Zero,
    /// A read before the handoff: not kept.
    PassThrough,
}

impl Purpose {
    /// Whether it is counted among what fills the path: all that is kept.
    pub fn is_paced(self) -> bool {
        !matches!(self, Self::Zero | Self::PassThrough)
    }

    /// Whether nobody has asked for it.
    pub fn is_own(self) -> bool {
        Self::OWN.contains(&self)
    }

    /// What nobody has asked for.
    pub const OWN: [Self; 5] = [Self::Rest, Self::Ahead, Self::Hot, Self::Bulk, Self::Late];
}

#[derive(Debug)]
pub(super) struct Flight {
    pub range: BlockRange,
    pub purpose: Purpose,
    pub waiters: Vec<u64>,
    /// When it was handed to the source.
    pub sent_at: Duration,
    sent: bool,
    /// A reader waits for it, and the source was told.
    promoted: bool,
    /// Nobody wants it, and the source was told.
    cancelled: bool,
}

impl Flight {
    pub fn new(range: BlockRange, purpose: Purpose, now: Duration, sent: bool) -> Self {
        Self {
            range,
            purpose,
            waiters: Vec::new(),
            sent_at: now,
            sent,
            promoted: false,
            cancelled: false,
        }
    }

    /// Whether the pacer was told of it.
    pub fn is_charged(&self) -> bool {
        self.sent && self.purpose.is_paced()
    }
}

#[derive(Debug, Default)]
pub(super) struct Flights {
    next: u64,
    /// In the order of their numbers: whoever goes through them looks at the residency in between, and
    /// the order in which it does must be the same in each run.
    all: BTreeMap<FlightId, Flight>,
    /// Kept flights by their first block; they do not overlap.
    by_start: BTreeMap<u64, FlightId>,
    counts: [usize; 8],
}

impl Flights {
    pub fn insert(&mut self, flight: Flight) -> FlightId {
        let id = FlightId(self.next);
        self.next += 1;
        self.counts[flight.purpose as usize] += 1;
        if flight.purpose != Purpose::PassThrough {
            self.by_start.insert(flight.range.start, id);
        }
        self.all.insert(id, flight);
        id
    }

    pub fn remove(&mut self, id: FlightId) -> Option<Flight> {
        let flight = self.all.remove(&id)?;
        self.counts[flight.purpose as usize] -= 1;
        if flight.purpose != Purpose::PassThrough {
            self.by_start.remove(&flight.range.start);
        }
        Some(flight)
    }

    pub fn count(&self, purpose: Purpose) -> usize {
        self.counts[purpose as usize]
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn any_zeroing(&self) -> bool {
        self.count(Purpose::Zero) > 0
    }

    /// The first kept flight that shares a block with `start..end`.
    pub fn covering(&self, start: u64, end: u64) -> Option<(FlightId, BlockRange)> {
        let before = self.by_start.range(..=start).next_back();
        let candidates = before
            .into_iter()
            .chain(self.by_start.range(start + 1..end.max(start + 1)));
        for (_, id) in candidates {
            let range = self.all.get(id)?.range;
            if range.overlaps(BlockRange::new(start, end)) {
                return Some((*id, range));
            }
        }
        None
    }

    /// Adds a reader; false if it was there already.
    pub fn attach(&mut self, id: FlightId, waiter: u64) -> bool {
        let Some(flight) = self.all.get_mut(&id) else {
            return false;
        };
        if flight.waiters.last() == Some(&waiter) {
            return false;
        }
        flight.waiters.push(waiter);
        true
    }

    /// A reader waits for it from now on. True if the source is to be told: once, and only of what
    /// was asked for without one.
    pub fn promote(&mut self, id: FlightId) -> bool {
        self.all.get_mut(&id).is_some_and(|flight| {
            let early = flight.purpose.is_own();
            early && flight.sent && !std::mem::replace(&mut flight.promoted, true)
        })
    }

    /// Marks what `unwanted` names of that which the source was asked for by itself and nobody waits
    /// for, and gives each once.
    pub fn cancel(
        &mut self,
        unwanted: impl Fn(BlockRange, Purpose) -> bool,
    ) -> Vec<(BlockRange, Purpose)> {
        let mut cancelled = Vec::new();
        for flight in self.all.values_mut() {
            let idle = flight.sent && flight.waiters.is_empty() && flight.purpose.is_own();
            if idle && !flight.cancelled && unwanted(flight.range, flight.purpose) {
                flight.cancelled = true;
                cancelled.push((flight.range, flight.purpose));
            }
        }
        cancelled.sort_unstable_by_key(|(range, _)| range.start);
        cancelled
    }

    /// Takes a reader off all that it waits for. Nobody but readers needs what passes through.
    pub fn detach(&mut self, waiter: u64, range: BlockRange) {
        for flight in self.all.values_mut().filter(|f| f.range.overlaps(range)) {
            flight.waiters.retain(|w| *w != waiter);
        }
    }

    /// Kept flights that were not handed to the source yet.
    pub fn unsent(&self) -> Vec<FlightId> {
        self.those(|f| !f.sent && f.purpose != Purpose::PassThrough)
    }

    /// Those that pass through.
    pub fn passing(&self) -> Vec<FlightId> {
        self.those(|f| f.purpose == Purpose::PassThrough)
    }

    /// In the order of their numbers.
    fn those(&self, wanted: impl Fn(&Flight) -> bool) -> Vec<FlightId> {
        let those = self.all.iter().filter(|(_, f)| wanted(f));
        those.map(|(id, _)| *id).collect()
    }

    pub fn range(&self, id: FlightId) -> Option<BlockRange> {
        self.all.get(&id).map(|f| f.range)
    }

    /// Marks all as sent and names those that were not.
    pub fn send_all(&mut self, now: Duration) -> Vec<(FlightId, BlockRange, Purpose)> {
        let unsent = self.all.iter_mut().filter(|(_, f)| !f.sent);
        unsent
            .map(|(id, f)| {
                f.sent = true;
                f.sent_at = now;
                (*id, f.range, f.purpose)
            })
            .collect()
    }
}
