//! How much of the background copy is in flight.
//!
//! The window follows the bandwidth-delay product: it grows while round trips stay near the
//! shortest that was seen, and shrinks when they grow, so that the pipe is full and the queue in
//! front of it, in which demand would have to wait, is short. (The idea is that of TCP Vegas and
//! LEDBAT.) Chunks shrink with the link's speed, so that one of them delays demand by little.

use std::time::Duration;

/// The smallest and largest chunk of the background copy.
const MIN_CHUNK_BYTES: u64 = 64 << 10;
const MAX_CHUNK_BYTES: u64 = 512 << 10;

/// How long one chunk may occupy the link.
const CHUNK_TIME: Duration = Duration::from_millis(5);

/// Bounds of the window. The upper one fills 2.5 Gbit/s at 200 ms.
const MIN_WINDOW_BYTES: u64 = 2 * MIN_CHUNK_BYTES;
const MAX_WINDOW_BYTES: u64 = 64 << 20;

/// Queueing that is tolerated: the larger of this and a share of the shortest round trip.
const QUEUE_FLOOR: Duration = Duration::from_millis(4);
const QUEUE_SHARE: u32 = 8;

/// How long the shortest round trip is believed.
const BASE_LIFETIME: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Pacer {
    window_bytes: u64,
    in_flight_bytes: u64,
    /// The shortest round trip of this and of the previous period.
    base: Option<Duration>,
    next_base: Option<Duration>,
    base_since: Duration,
    /// Bytes landed in this round, and when it began: one round is one window.
    round_bytes: u64,
    round_started: Duration,
    /// The shortest round trip in this round: a queue shows in the best case, jitter does not.
    round_best: Option<Duration>,
    rate_bytes_per_s: u64,
    slow_start: bool,
    /// The window, and not the cap or the disk, held something back in this round.
    held_back: bool,
}

impl Pacer {
    pub fn new() -> Self {
        Self {
            window_bytes: 4 * MIN_CHUNK_BYTES,
            in_flight_bytes: 0,
            base: None,
            next_base: None,
            base_since: Duration::ZERO,
            round_bytes: 0,
            round_started: Duration::ZERO,
            round_best: None,
            rate_bytes_per_s: 0,
            slow_start: true,
            held_back: false,
        }
    }

    /// Forgets the path: the source was away and may be reached differently.
    pub fn restart(&mut self) {
        let in_flight_bytes = self.in_flight_bytes;
        *self = Self {
            in_flight_bytes,
            ..Self::new()
        };
    }

    pub fn chunk_bytes(&self) -> u64 {
        let ms = u64::try_from(CHUNK_TIME.as_millis()).unwrap_or(1);
        let wanted = self.rate_bytes_per_s / 1000 * ms;
        let chunk = wanted.clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES);
        1 << chunk.ilog2()
    }

    pub fn may_send(&mut self) -> bool {
        let room = self.in_flight_bytes < self.window_bytes;
        self.held_back |= !room;
        room
    }

    pub fn sent(&mut self, bytes: u64) {
        self.in_flight_bytes += bytes;
    }

    pub fn lost(&mut self, bytes: u64) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
    }

    /// A fetch came back after `rtt`. Demand teaches the base; only bulk moves the window.
    pub fn landed(&mut self, now: Duration, rtt: Duration, bytes: u64, bulk: bool) {
        self.learn_base(now, rtt);
        if !bulk {
            return;
        }
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
        self.round_best = Some(self.round_best.map_or(rtt, |b| b.min(rtt)));
        self.round_bytes += bytes;
        if self.round_bytes >= self.window_bytes {
            self.end_round(now);
        }
    }

    fn learn_base(&mut self, now: Duration, rtt: Duration) {
        if now.saturating_sub(self.base_since) > BASE_LIFETIME {
            self.base = self.next_base.take();
            self.base_since = now;
        }
        self.base = Some(self.base.map_or(rtt, |b| b.min(rtt)));
        self.next_base = Some(self.next_base.map_or(rtt, |b| b.min(rtt)));
    }

    fn end_round(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.round_started).as_micros().max(1);
        let rate = u128::from(self.round_bytes) * 1_000_000 / elapsed;
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        self.rate_bytes_per_s = self.rate_bytes_per_s / 2 + rate / 2;

        let base = self.base.unwrap_or(Duration::ZERO);
        // A chunk's own time on the wire is part of its round trip and no queue.
        let on_wire = Duration::from_secs_f64(
            self.chunk_bytes() as f64 / (self.rate_bytes_per_s.max(1)) as f64,
        );
        let queue = self
            .round_best
            .unwrap_or(base)
            .saturating_sub(base + on_wire);
        let tolerated = QUEUE_FLOOR.max(base / QUEUE_SHARE);
        if queue > tolerated {
            self.slow_start = false;
            self.window_bytes -= self.window_bytes / 8;
        } else if !self.held_back {
            // Growing a window that nobody fills would only save up a burst.
        } else if self.slow_start {
            self.window_bytes *= 2;
        } else {
            self.window_bytes += self.window_bytes / 16 + self.chunk_bytes() / 2;
        }
        self.window_bytes = self.window_bytes.clamp(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES);
        self.round_bytes = 0;
        self.round_started = now;
        self.round_best = None;
        self.held_back = false;
    }
}
