//! What is fetched without anyone waiting for it: the background copy in its order, and known zeroes,
//! which are only installed.

use std::time::Duration;

use super::flights::Purpose;
use super::order::Turn;
use super::{Action, FetchFailure, Mover, Phase, ZERO_STEP_BYTES};
use crate::geometry::BlockRange;
use crate::residency::Residency;

impl<W> Mover<W> {
    /// The source answered a question for extents: `zeroes` are whole blocks that read as zero,
    /// within `range`; the rest of `range` is data. Call with the part that was really answered.
    pub fn extents(
        &mut self,
        now: Duration,
        range: BlockRange,
        zeroes: &[BlockRange],
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        if self.scan.answer(range) && self.phase == Phase::Arriving {
            for zero in zeroes {
                self.install_zeroes(now, *zero, residency, out);
            }
        }
        self.pump(now, residency, out);
    }

    /// The question for extents failed.
    pub fn extents_failed(
        &mut self,
        now: Duration,
        why: FetchFailure,
        range: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        // A source that cannot say is asked for the data.
        let for_good = why != FetchFailure::Disconnected;
        self.scan.unanswered(range, for_good);
        if for_good {
            // (Else the next tick asks again: see `failed`.)
            self.pump(now, residency, out);
        }
    }

    pub(super) fn install_zeroes(
        &mut self,
        now: Duration,
        zero: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let step = self.blocks_in(ZERO_STEP_BYTES);
        let mut at = zero.start;
        while let Some(run) = self.next_free(at, zero.end, residency) {
            let range = BlockRange::new(run.start, run.end.min(run.start + step));
            self.launch(now, range, Purpose::Zero, out);
            at = range.end;
        }
    }

    /// Launches what may go now, in this order: read-ahead, questions, the background copy.
    pub(super) fn pump(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        if !matches!(self.phase, Phase::HandingOver | Phase::Arriving) {
            return;
        }
        if residency.missing_blocks() == 0 {
            // Readers whose blocks a guest's writes completed need no fetch any more; those that
            // are under way still land and wake them.
            let over = self.phase == Phase::Arriving && self.waiters.is_empty();
            if over && !self.flights.any_zeroing() {
                self.phase = Phase::Complete;
                out.push(Action::Complete);
            }
            return;
        }
        if !self.connected || self.must_rest(now) {
            return;
        }
        self.pump_ahead(now, residency, out);
        if self.paused || !self.policy.background {
            return;
        }
        self.pump_scan(out);
        self.pump_bulk(now, residency, out);
    }

    /// Whether nothing may be fetched that nobody waits for. While the store is in trouble, one
    /// fetch at a time tries it once the pause is over.
    pub(super) fn must_rest(&self, now: Duration) -> bool {
        self.store_rests_until
            .is_some_and(|until| now < until || self.own_flights() > 0)
    }

    /// Fetches under way that nobody asked for.
    fn own_flights(&self) -> usize {
        let own = Purpose::OWN.into_iter();
        own.map(|p| self.flights.count(p)).sum()
    }

    fn pump_scan(&mut self, out: &mut Vec<Action<W>>) {
        while let Some(range) = self.scan.next_question(self.order.hot()) {
            out.push(Action::QueryExtents { range });
        }
    }

    fn pump_bulk(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        let chunk = self.blocks_in(self.pacer.chunk_bytes());
        loop {
            let rests = self.must_rest(now) || self.store_is_behind;
            let may_send = if self.flights.count(Purpose::Ahead) > 0 {
                self.pacer.may_copy_beside()
            } else {
                self.pacer.may_send()
            };
            if rests || !may_send || !self.bucket.has_room(now) {
                return;
            }
            let Some((range, turn)) = self.next_bulk(now, chunk, residency) else {
                return;
            };
            let purpose = match turn {
                Turn::Hot => Purpose::Hot,
                Turn::Cold => Purpose::Bulk,
                Turn::Late => Purpose::Late,
            };
            self.bucket.take(self.geometry.bytes(range).len());
            self.launch(now, range, purpose, out);
        }
    }

    fn next_bulk(
        &mut self,
        now: Duration,
        chunk: u64,
        residency: &Residency,
    ) -> Option<(BlockRange, Turn)> {
        let blocks = self.geometry.blocks();
        let mut order = std::mem::take(&mut self.order);
        if order.passed(blocks) && self.flights.is_empty() && self.refused.is_empty() {
            // Nothing should be left then, and nothing is on its way: look once more.
            order.rewind();
        }
        let free = |from, to| self.next_wanted(from, to, residency);
        let next = order.next(chunk, &self.scan, self.seeded_to(now), free);
        self.order = order;
        next
    }

    /// The next run from `at` on, before `end`, that is missing, not in flight, and not refused.
    pub(super) fn next_wanted(
        &self,
        mut at: u64,
        end: u64,
        residency: &Residency,
    ) -> Option<BlockRange> {
        while let Some(run) = self.next_free(at, end, residency) {
            let refused = self.refused.iter().map(|(range, _)| *range);
            let first = refused
                .filter(|range| range.overlaps(run))
                .min_by_key(|range| range.start);
            match first {
                None => return Some(run),
                Some(range) if range.start > run.start => {
                    return Some(BlockRange::new(run.start, range.start));
                }
                Some(range) => at = range.end,
            }
        }
        None
    }

    /// The next run from `at` on, before `end`, that is missing and not in flight.
    pub(super) fn next_free(&self, at: u64, end: u64, residency: &Residency) -> Option<BlockRange> {
        let mut at = at;
        while at < end {
            let run = residency.next_missing(at, end)?;
            match self.flights.covering(run.start, run.end) {
                Some((_, flying)) if flying.start <= run.start => at = flying.end,
                Some((_, flying)) => return Some(BlockRange::new(run.start, flying.start)),
                None => return Some(run),
            }
        }
        None
    }

    pub(super) fn is_refused(&self, range: BlockRange) -> bool {
        self.refused.iter().any(|(r, _)| r.overlaps(range))
    }
}
