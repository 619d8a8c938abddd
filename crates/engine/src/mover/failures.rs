//! Fetches that came to nothing: who is told, what is asked for again, and what is left alone for a
//! while.

use std::time::Duration;

use super::flights::{Flight, FlightId, Purpose};
use super::{Action, FetchFailure, MAX_REFUSED, Mover, REFUSED_PAUSE, ReadFailure, STORE_PAUSE};
use crate::geometry::BlockRange;
use crate::residency::Residency;

/// From the first to the last block of a range that is not here; `None` if all are.
fn missing_of(residency: &Residency, range: BlockRange) -> Option<BlockRange> {
    let first = residency.next_missing(range.start, range.end)?;
    let mut end = first.end;
    while let Some(run) = residency.next_missing(end, range.end) {
        end = run.end;
    }
    Some(BlockRange::new(first.start, end))
}

impl<W> Mover<W> {
    /// A fetch came, but the local store could not keep it. Returns the readers that need nothing
    /// else: they are to be answered from its data, together with what is here. Those that need
    /// more are asked for anew, as reads that pass through, or fail where none can.
    pub fn unkept(
        &mut self,
        now: Duration,
        flight: FlightId,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) -> Vec<W> {
        let Some(mut lost) = self.flights.remove(flight) else {
            return Vec::new();
        };
        if lost.is_charged() {
            self.pacer.lost(self.geometry.bytes(lost.range).len());
        }
        let mut answered = Vec::new();
        for id in std::mem::take(&mut lost.waiters) {
            let Some(waiter) = self.waiters.get_mut(&id) else {
                continue;
            };
            let range = waiter.range;
            if lost.range.start <= range.start && range.end <= lost.range.end {
                answered.extend(self.waiters.remove(&id).map(|w| w.who));
            } else if self.policy.exact {
                // The source does not have all that it needs.
                self.fail_waiter(id, ReadFailure::StoreFailed, out);
            } else {
                waiter.outstanding = 0;
                self.flights.detach(id, range);
                self.launch_for(now, id, range, Purpose::PassThrough, out);
            }
        }
        self.forget(&lost);
        self.store_rests_until = Some(now + STORE_PAUSE);
        self.pump(now, residency, out);
        answered
    }

    /// A fetch came to nothing.
    pub fn failed(
        &mut self,
        now: Duration,
        flight: FlightId,
        why: FetchFailure,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let Some(mut lost) = self.flights.remove(flight) else {
            return;
        };
        if lost.is_charged() {
            self.pacer.lost(self.geometry.bytes(lost.range).len());
        }
        match why {
            // What was cancelled because all of it is here has nothing to wait for, whoever came since.
            FetchFailure::Disconnected | FetchFailure::Cancelled => {
                // Nothing is launched now: the next tick does, so that a source that refuses at
                // once is not asked in a tight loop.
                if lost.waiters.is_empty() {
                    self.forget(&lost);
                } else {
                    self.hold(now, lost, residency, out);
                }
                return;
            }
            FetchFailure::Refused | FetchFailure::StoreFailed => {
                let why = match why {
                    FetchFailure::StoreFailed => ReadFailure::StoreFailed,
                    _ => ReadFailure::SourceRefused,
                };
                for id in std::mem::take(&mut lost.waiters) {
                    self.fail_waiter(id, why, out);
                }
                if lost.purpose != Purpose::PassThrough {
                    if why == ReadFailure::StoreFailed {
                        self.store_rests_until = Some(now + STORE_PAUSE);
                    } else {
                        self.refuse(now, lost.range);
                    }
                    self.forget(&lost);
                }
            }
        }
        self.pump(now, residency, out);
    }

    /// Keeps what readers wait for until it can be asked for again. A read that began before the
    /// handoff still passes through after it: it was there first, so it may show the disk of then.
    /// What is here of it by now, because guests wrote it or a part had come, is not asked for again.
    fn hold(
        &mut self,
        now: Duration,
        lost: Flight,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let (purpose, range) = match lost.purpose {
            Purpose::PassThrough => (Purpose::PassThrough, Some(lost.range)),
            _ => (Purpose::Demand, missing_of(residency, lost.range)),
        };
        let Some(range) = range else {
            for id in lost.waiters {
                self.one_landed(id, out);
            }
            return;
        };
        let flight = self.flights.insert(Flight::new(range, purpose, now, false));
        for id in lost.waiters {
            self.flights.attach(flight, id);
        }
    }

    /// Lets the background find the blocks of a lost fetch again.
    fn forget(&mut self, lost: &Flight) {
        self.order.revisit(lost.range);
    }

    fn refuse(&mut self, now: Duration, range: BlockRange) {
        if self.refused.len() < MAX_REFUSED {
            self.refused.push((range, now + REFUSED_PAUSE));
        } else if let Some(last) = self.refused.last_mut() {
            // Too many to tell apart: leave the whole disk alone for a while.
            *last = (self.geometry.all(), now + REFUSED_PAUSE);
        }
    }
}
