//! Read-ahead: fetching what sequential streams will ask for next.
//!
//! Owns, for each stream that a [`Detector`](crate::readahead::Detector) told of, how far it has
//! read and how far has been asked for. The window between the two is at most twice what the
//! stream has read, so that what is fetched in vain stays in proportion to what was of use; it is
//! bounded by what may be in flight over the path (as the pacer measures it) and shrinks for everybody when streams
//! end before they have read what was fetched for them. What is in flight is bounded by the pacer,
//! together with the background copy, which read-ahead goes before; where the source itself sends what is urgent
//! first, by a window of its own.

use std::collections::VecDeque;
use std::time::Duration;

use super::flights::Purpose;
use super::path::Seat;
use super::{Action, Mover, Phase};
use crate::geometry::{BlockRange, ByteRange};
use crate::readahead::{Advance, Shape};
use crate::residency::Residency;

/// Streams that are remembered, of all clients together.
const MAX_STREAMS: usize = 32;

/// The largest window of one stream, whatever the path: bounds what is fetched in vain.
const MAX_WINDOW_BYTES: u64 = 64 << 20;

/// The largest window where little is known of the path: what a guest's own read-ahead asks for in
/// a few steps.
const MIN_CAP_BYTES: u64 = 1 << 20;

/// The shortest piece of a sequential stream that is worth a request.
const MIN_PIECE_BYTES: u64 = 16 << 10;

/// Pieces of a strided stream that are asked for ahead.
const MAX_STRIDES: u64 = 64;

/// A stream that was not heard of for so long, and eight round trips, is forgotten.
const IDLE: Duration = Duration::from_secs(2);
const IDLE_ROUND_TRIPS: u32 = 8;

/// The window as a share of what a stream has read, in quarters: at most twice as much.
const MAX_GENEROSITY: u64 = 8;
const MIN_GENEROSITY: u64 = 1;

#[derive(Clone, Copy, Debug)]
struct Stream {
    told: Advance,
    told_at: Duration,
    /// How far beyond the front everything has been asked for (or is here): bytes; of a strided
    /// stream, pieces.
    ahead: u64,
    /// How far that should be.
    window: u64,
}

/// The streams, the one to be served next first.
#[derive(Debug)]
pub(super) struct Streams {
    all: VecDeque<Stream>,
    generosity: u64,
}

impl Streams {
    pub fn new() -> Self {
        Self {
            all: VecDeque::new(),
            generosity: MAX_GENEROSITY,
        }
    }

    pub fn clear(&mut self) {
        self.all.clear();
    }

    /// A stream has got on.
    fn advance(&mut self, now: Duration, told: Advance, pacer: &Seat) {
        let window = self.window(told, pacer);
        if let Some(stream) = self.all.iter_mut().find(|s| s.told.stream == told.stream) {
            stream.ahead = stream.ahead.saturating_sub(progress(&stream.told, &told));
            (stream.told, stream.told_at, stream.window) = (told, now, window);
            return;
        }
        if self.all.len() == MAX_STREAMS {
            let oldest = (0..self.all.len()).min_by_key(|i| self.all[*i].told_at);
            if let Some(ended) = oldest.and_then(|i| self.all.remove(i)) {
                self.learn(&ended);
            }
        }
        self.all.push_back(Stream {
            told,
            told_at: now,
            ahead: 0,
            window,
        });
    }

    /// How far beyond its front a stream should be fetched.
    fn window(&self, told: Advance, pacer: &Seat) -> u64 {
        let earned = told.read_bytes / 4 * self.generosity;
        // All that may be in flight, and what fills the path once more: landed, and not read yet.
        let cap = pacer.open_bytes() + pacer.window_bytes();
        let cap = cap.clamp(MIN_CAP_BYTES, MAX_WINDOW_BYTES);
        let bytes = earned.min(cap);
        match told.shape {
            Shape::Forward | Shape::Backward => bytes,
            Shape::Strided { len, .. } => (bytes / u64::from(len.max(1))).min(MAX_STRIDES),
        }
    }

    /// Forgets streams that nobody reads any more; gives what was asked for ahead of them.
    pub fn expire(&mut self, now: Duration, base: Duration) -> Vec<ByteRange> {
        let limit = IDLE + base * IDLE_ROUND_TRIPS;
        let over = |s: &Stream| now.saturating_sub(s.told_at) > limit;
        let mut dropped = Vec::new();
        while let Some(index) = self.all.iter().position(over) {
            if let Some(ended) = self.all.remove(index) {
                self.learn(&ended);
                dropped.push(ended.fetched_ahead());
            }
        }
        dropped
    }

    /// A stream has ended: was it of use to fetch ahead?
    fn learn(&mut self, ended: &Stream) {
        let unread = match ended.told.shape {
            Shape::Forward | Shape::Backward => ended.ahead,
            Shape::Strided { len, .. } => ended.ahead * u64::from(len),
        };
        if unread > ended.told.read_bytes / 2 {
            self.generosity = (self.generosity / 2).max(MIN_GENEROSITY);
        } else if unread < ended.told.read_bytes / 4 {
            self.generosity = (self.generosity * 2).min(MAX_GENEROSITY);
        }
    }
}

/// How far a stream has moved, in the unit of its window.
fn progress(before: &Advance, after: &Advance) -> u64 {
    match after.shape {
        Shape::Forward => after.front.saturating_sub(before.front),
        Shape::Backward => before.front.saturating_sub(after.front),
        Shape::Strided { step, .. } => {
            let moved = after.front.abs_diff(before.front);
            moved / step.unsigned_abs().max(1)
        }
    }
}

impl Stream {
    /// What lies between what was read and what was asked for.
    fn fetched_ahead(&self) -> ByteRange {
        let front = self.told.front;
        let (start, end) = match self.told.shape {
            Shape::Forward => (front, front.saturating_add(self.ahead)),
            Shape::Backward => (front.saturating_sub(self.ahead), front),
            Shape::Strided { step, len } => {
                let far = i64::try_from(self.ahead).unwrap_or(i64::MAX);
                let far = front.saturating_add_signed(step.saturating_mul(far));
                (front.min(far), front.max(far).saturating_add(len.into()))
            }
        };
        ByteRange { start, end }
    }

    /// The next piece to look at, at most `chunk` bytes long, and how much further that brings it.
    fn piece(&self, chunk: u64, size_bytes: u64) -> Option<(ByteRange, u64)> {
        let room = self.window.checked_sub(self.ahead).filter(|r| *r > 0)?;
        // Several pieces in a window: what lands of it is read while the rest is on its way.
        let most = 1 << chunk.min((self.window / 4).max(MIN_PIECE_BYTES)).ilog2();
        let front = self.told.front;
        let (start, end, by) = match self.told.shape {
            Shape::Forward => {
                let start = front.saturating_add(self.ahead);
                // Pieces end at multiples of their length, so that they do not get shorter for
                // ever; a short rest of the window waits until there is more of it.
                let end = (start / most + 1) * most;
                if end > start + room && self.ahead > 0 {
                    return None;
                }
                let end = end.min(start + room);
                (start, end, end - start)
            }
            Shape::Backward => {
                let end = front.saturating_sub(self.ahead);
                let start = end.saturating_sub(1) / most * most;
                if end - start > room && self.ahead > 0 {
                    return None;
                }
                let start = start.max(end.saturating_sub(room));
                (start, end, end - start)
            }
            Shape::Strided { step, len } => {
                let ahead = i64::try_from(self.ahead).ok()?;
                let start = front.checked_add_signed(step.checked_mul(ahead)?)?;
                (start, start.saturating_add(len.into()), 1)
            }
        };
        let end = end.min(size_bytes);
        (start < end).then_some((ByteRange { start, end }, by))
    }
}

impl<W> Mover<W> {
    /// A client's sequential stream has got on; see [`crate::readahead`].
    pub fn read_ahead(
        &mut self,
        now: Duration,
        told: Advance,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        if self.phase != Phase::Arriving {
            // Nothing that is fetched before the handoff is kept.
            return;
        }
        self.streams.advance(now, told, &self.pacer);
        self.pump(now, residency, out);
    }

    /// Asks for what streams will want, a piece for each in turn.
    pub(super) fn pump_ahead(
        &mut self,
        now: Duration,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let mut idle = 0;
        while idle < self.streams.all.len() {
            let flights = u64::try_from(self.flights.count(Purpose::Ahead)).unwrap_or(u64::MAX);
            let in_flight = flights.saturating_mul(self.pacer.chunk_bytes());
            if self.must_rest(now) || !self.pacer.may_read_ahead(in_flight) {
                return;
            }
            let Some(mut stream) = self.streams.all.pop_front() else {
                return;
            };
            match stream.piece(self.pacer.chunk_bytes(), self.geometry.size_bytes()) {
                Some((bytes, by)) => {
                    idle = 0;
                    stream.ahead += by;
                    self.fetch_ahead(now, self.geometry.covering(bytes), residency, out);
                }
                None => idle += 1,
            }
            self.streams.all.push_back(stream);
        }
    }

    fn fetch_ahead(
        &mut self,
        now: Duration,
        blocks: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let mut at = blocks.start;
        while !self.must_rest(now)
            && let Some(run) = self.next_wanted(at, blocks.end, residency)
        {
            self.launch(now, run, Purpose::Ahead, out);
            at = run.end;
        }
    }
}
