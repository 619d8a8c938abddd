//! Readers that wait: which fetches each of them needs, and when it is woken.
//!
//! A reader attaches to whatever is in flight for its blocks, whoever asked for it, and only the
//! rest is asked for: that is what merges duplicates.

use std::time::Duration;

use super::flights::Purpose;
use super::{Action, MAX_FETCH_BYTES, MERGE_GAP_BYTES, Mover, ReadFailure};
use crate::geometry::BlockRange;
use crate::residency::Residency;

/// A reader and how many fetches it still waits for.
#[derive(Debug)]
pub(super) struct Waiter<W> {
    pub who: W,
    pub range: BlockRange,
    pub outstanding: usize,
    pub since: Duration,
}

impl<W> Mover<W> {
    /// A reader needs these blocks. It is woken at once if all are here.
    pub fn read(
        &mut self,
        now: Duration,
        who: W,
        range: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let id = self.next_waiter;
        self.next_waiter += 1;
        self.waiters.insert(
            id,
            Waiter {
                who,
                range,
                outstanding: 0,
                since: now,
            },
        );
        if self.phase.passes_through() {
            self.launch_for(now, id, range, Purpose::PassThrough, out);
        } else {
            for run in self.missing_runs(residency, range) {
                self.await_run(now, id, run, out);
            }
        }
        self.wake_if_ready(id, out);
    }

    /// Reads that pass by to a source which from now on has only what is missing here: they are
    /// answered from what is here, and wait for the rest as reads of now.
    pub(super) fn settle_passing(
        &mut self,
        now: Duration,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        for id in self.flights.passing() {
            let Some(passing) = self.flights.remove(id) else {
                continue;
            };
            for waiter in passing.waiters {
                let Some(range) = self.waiters.get_mut(&waiter).map(|w| {
                    w.outstanding = 0;
                    w.range
                }) else {
                    continue;
                };
                for run in self.missing_runs(residency, range) {
                    self.await_run(now, waiter, run, out);
                }
                self.wake_if_ready(waiter, out);
            }
        }
    }

    /// The missing runs of `range`, those with a small gap between them joined.
    fn missing_runs(&self, residency: &Residency, range: BlockRange) -> Vec<BlockRange> {
        let gap = match self.policy.exact {
            true => 0,
            false => MERGE_GAP_BYTES / self.geometry.block_bytes(),
        };
        let mut runs: Vec<BlockRange> = Vec::new();
        let mut at = range.start;
        while let Some(run) = residency.next_missing(at, range.end) {
            at = run.end;
            match runs.last_mut() {
                Some(last) if run.start - last.end <= gap => last.end = run.end,
                _ => runs.push(run),
            }
        }
        runs
    }

    /// Attaches a reader to what is in flight for `run`, and launches the rest.
    fn await_run(&mut self, now: Duration, id: u64, run: BlockRange, out: &mut Vec<Action<W>>) {
        let mut at = run.start;
        while at < run.end {
            match self.flights.covering(at, run.end) {
                Some((flight, covered)) if covered.start <= at => {
                    if self.flights.attach(flight, id) {
                        self.expect_one_more(id);
                    }
                    if self.flights.promote(flight) {
                        out.push(Action::Promote { range: covered });
                    }
                    at = covered.end;
                }
                next => {
                    let gap_end = next.map_or(run.end, |(_, r)| r.start.min(run.end));
                    let step = self.blocks_in(MAX_FETCH_BYTES);
                    let end = gap_end.min(at + step);
                    let range = BlockRange::new(at, end);
                    self.launch_for(now, id, range, Purpose::Demand, out);
                    at = end;
                }
            }
        }
    }

    fn expect_one_more(&mut self, id: u64) {
        if let Some(waiter) = self.waiters.get_mut(&id) {
            waiter.outstanding += 1;
        }
    }

    pub(super) fn launch_for(
        &mut self,
        now: Duration,
        id: u64,
        range: BlockRange,
        purpose: Purpose,
        out: &mut Vec<Action<W>>,
    ) {
        let flight = self.launch(now, range, purpose, out);
        self.flights.attach(flight, id);
        self.expect_one_more(id);
    }

    pub(super) fn one_landed(&mut self, id: u64, out: &mut Vec<Action<W>>) {
        if let Some(waiter) = self.waiters.get_mut(&id) {
            waiter.outstanding = waiter.outstanding.saturating_sub(1);
            self.wake_if_ready(id, out);
        }
    }

    fn wake_if_ready(&mut self, id: u64, out: &mut Vec<Action<W>>) {
        if self.waiters.get(&id).is_some_and(|w| w.outstanding == 0)
            && let Some(waiter) = self.waiters.remove(&id)
        {
            out.push(Action::Wake(waiter.who));
        }
    }

    pub(super) fn fail_waiter(&mut self, id: u64, why: ReadFailure, out: &mut Vec<Action<W>>) {
        if let Some(waiter) = self.waiters.remove(&id) {
            self.flights.detach(id, waiter.range);
            out.push(Action::Fail(waiter.who, why));
        }
    }
}
