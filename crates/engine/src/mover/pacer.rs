//! How much may be in flight.
//!
//! The window follows the bandwidth-delay product, by a model of the path: the rate at which
//! bytes land when the window is full, times the round trip of an empty queue, and a little on
//! top. What lands lets the next request go, so requests leave at the pace of the bottleneck, and
//! the queue in front of it, in which demand would have to wait, stays at that little. (The idea is
//! that of TCP BBR. A window that merely shrinks when round trips grow, as LEDBAT's does, takes
//! TCP's own slow start at the source for a queue, and at long round trips never gets going.)
//!
//! Demand counts as in flight but never waits for room: what a guest asks for takes the place of
//! read-ahead and of the background copy.
//!
//! Where the source compresses, what is asked for and what crosses the link are not the same. The
//! path is measured in bytes that cross it; how many of them a byte of the disk will be is taken from
//! what came last. So the window of disk bytes grows over what compresses well, and shrinks at once over
//! what does not: what was asked for before that waits at the source, where demand passes it.

use std::collections::VecDeque;
use std::time::Duration;

/// The smallest and largest chunk of the background copy.
const MIN_CHUNK_BYTES: u64 = 16 << 10;
const MAX_CHUNK_BYTES: u64 = 1 << 20;

/// How long one chunk may occupy the link: what a demand read may find in front of it.
const CHUNK_TIME: Duration = Duration::from_millis(2);

/// At long round trips chunks may be longer: a window is at least so many of them. A source has a
/// bounded number of requests in flight (48 on three connections), and each costs time at both ends.
const CHUNKS_IN_WINDOW: u64 = 28;

/// Bounds of the window. The upper one fills 2.5 Gbit/s at 200 ms.
const MIN_WINDOW_BYTES: u64 = 4 * MIN_CHUNK_BYTES;
const MAX_WINDOW_BYTES: u64 = 64 << 20;

/// The window that a path begins with.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;

/// What the window is above the measured product: a sixteenth of it, and one chunk at least, so that
/// one is on its way while another is installed. It keeps the pipe full between two landings, and
/// lets the rate be found again after it has grown.
const SLACK: u64 = 16;

/// While the rate is still being found: the window over the product so far. It doubles with every
/// round trip, as TCP's does at the source.
const START_GAIN: u64 = 2;

/// The rate counts as found when it has grown by less than a quarter over so many full rounds.
const FLAT_ROUNDS: u32 = 3;

/// Once it is found, a larger window is tried after so many full rounds. If more lands, the rate is
/// looked for anew: the path has become faster, or it was the source's TCP that was slow before,
/// and a TCP grows only while somebody asks for more than it can send.
const CRUISE_ROUNDS: u32 = 8;

/// How much larger (in eighths), and how much more must land (in sixteenths).
const PROBE_GAIN_8TH: u64 = 10;
const PROBE_SUCCESS_16TH: u64 = 18;

/// The shortest round: over less, the rate of a few chunks says nothing.
const MIN_ROUND: Duration = Duration::from_millis(40);

/// Full rounds whose rates are remembered. The second best of them counts: one that was measured
/// too high, because landings were held up and then came at once, does not.
const RATE_ROUNDS: usize = 8;

/// How long the shortest round trip is believed.
const BASE_LIFETIME: Duration = Duration::from_secs(20);

/// How often the window is halved for a round, so that the queue empties and the shortest round
/// trip can be seen again. A window computed from a round trip with a queue in it keeps the queue.
const DRAIN_EVERY: Duration = Duration::from_secs(8);

/// Chunks are shorter then: their own time on the wire counts as distance.
const DRAIN_CHUNKS_IN_WINDOW: u64 = 64;

/// What the window is being used for. Rounds are full rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// To find the rate: the best so far, and for how many rounds it has been that.
    Start { best: u64, rounds: u32 },
    /// To keep the pipe full, for so many rounds now.
    Cruise { rounds: u32 },
    /// To see whether more would land. What a larger window brings lands a round trip later, so
    /// the first round does not count.
    Probe { before: u64, rounds: u32 },
}

/// Part of the window over which the ratio of compression is averaged: what comes within half a round
/// trip or so tells of what is under way.
const RATIO_PART: u64 = 2;

/// The least that this is.
const MIN_RATIO_BYTES: u64 = 256 << 10;

/// The scale of the ratio: this many are one byte on the wire for a byte of the disk.
const RATIO_ONE: u64 = 1 << 16;

/// The best compression that is reckoned with: beyond it the disk and the memory of both sides count
/// for more than the link.
const MIN_RATIO: u64 = RATIO_ONE / 16;

/// Bytes are those of the disk unless they are called wire bytes.
#[derive(Debug)]
pub(crate) struct Pacer {
    /// In wire bytes.
    window: u64,
    in_flight_bytes: u64,
    /// Wire bytes for a byte of the disk, by what came last, in parts of [`RATIO_ONE`].
    ratio: u64,
    /// The shortest round trip of this and of the previous period.
    base: Option<Duration>,
    next_base: Option<Duration>,
    base_since: Duration,
    /// Wire bytes landed in this round, and when it began.
    round_bytes: u64,
    round_started: Duration,
    /// Rates of the last full rounds, wire bytes per second.
    rates: VecDeque<u64>,
    stage: Stage,
    drained_at: Duration,
    draining: bool,
    /// The window, and not the cap or the disk, held something back in this round.
    held_back: bool,
}

impl Pacer {
    pub fn new() -> Self {
        Self {
            window: FIRST_WINDOW_BYTES,
            in_flight_bytes: 0,
            ratio: RATIO_ONE,
            base: None,
            next_base: None,
            base_since: Duration::ZERO,
            round_bytes: 0,
            round_started: Duration::ZERO,
            rates: VecDeque::with_capacity(RATE_ROUNDS),
            stage: Stage::Start { best: 0, rounds: 0 },
            drained_at: Duration::ZERO,
            draining: false,
            held_back: false,
        }
    }

    /// Forgets the path: the source was away and may be reached differently.
    pub fn restart(&mut self, now: Duration) {
        *self = Self {
            in_flight_bytes: self.in_flight_bytes,
            base_since: now,
            round_started: now,
            drained_at: now,
            ..Self::new()
        };
    }

    /// How long a chunk of the background copy should be.
    pub fn chunk_bytes(&self) -> u64 {
        let wanted = self.of_disk(self.wire_chunk());
        1 << wanted.clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES).ilog2()
    }

    fn wire_chunk(&self) -> u64 {
        let wanted = if self.draining {
            self.window / DRAIN_CHUNKS_IN_WINDOW
        } else {
            bytes_in(self.rate(), CHUNK_TIME).max(self.window / CHUNKS_IN_WINDOW)
        };
        wanted.clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
    }

    /// How much fills the path, as far as it is known.
    pub fn window_bytes(&self) -> u64 {
        self.of_disk(self.window)
    }

    /// How many bytes of the disk are so many on the wire.
    fn of_disk(&self, wire_bytes: u64) -> u64 {
        (wire_bytes.saturating_mul(RATIO_ONE) / self.ratio).min(MAX_WINDOW_BYTES)
    }

    /// The shortest round trip; zero while there was none.
    pub fn base(&self) -> Duration {
        self.base.unwrap_or(Duration::ZERO)
    }

    /// Whether what nobody waits for may go now.
    pub fn may_send(&mut self) -> bool {
        let room = self.in_flight_bytes < self.open_bytes();
        self.held_back |= !room;
        room
    }

    /// How much may be in flight now.
    pub fn open_bytes(&self) -> u64 {
        if self.draining {
            self.window_bytes() / 2
        } else {
            self.window_bytes()
        }
    }

    /// How much is.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// Something more would have been sent.
    pub fn hold_back(&mut self) {
        self.held_back = true;
    }

    pub fn sent(&mut self, bytes: u64) {
        self.in_flight_bytes += bytes;
    }

    pub fn lost(&mut self, bytes: u64) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
    }

    /// A fetch of `bytes` came back after `rtt`, and was so many on the wire. Tells whether a round
    /// ended with it.
    pub fn landed(&mut self, now: Duration, rtt: Duration, bytes: u64, wire_bytes: u64) -> bool {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
        self.learn_base(now, rtt);
        self.learn_ratio(bytes, wire_bytes);
        self.round_bytes += wire_bytes;
        let over = now.saturating_sub(self.round_started) >= self.base().max(MIN_ROUND);
        if over {
            self.end_round(now);
        }
        over
    }

    /// A mean that forgets, over so many bytes: a small read counts for little.
    fn learn_ratio(&mut self, bytes: u64, wire_bytes: u64) {
        let memory = (self.window_bytes() / RATIO_PART).max(MIN_RATIO_BYTES);
        let seen = u128::from(self.ratio) * u128::from(memory)
            + u128::from(wire_bytes) * u128::from(RATIO_ONE);
        let ratio = seen.div_ceil(u128::from(memory + bytes).max(1));
        self.ratio = u64::try_from(ratio)
            .unwrap_or(RATIO_ONE)
            .clamp(MIN_RATIO, RATIO_ONE);
    }

    /// A chunk's own time on the wire counts as distance. To take it off one would have to know the
    /// rate, and with a rate that is far too low, as it is at the start, nothing would be left. The
    /// small reads of guests show the distance without it, and so do the short chunks that are
    /// asked for while the queue empties.
    fn learn_base(&mut self, now: Duration, rtt: Duration) {
        if now.saturating_sub(self.base_since) > BASE_LIFETIME {
            self.base = self.next_base.take();
            self.base_since = now;
        }
        self.base = Some(self.base.map_or(rtt, |b| b.min(rtt)));
        self.next_base = Some(self.next_base.map_or(rtt, |b| b.min(rtt)));
    }

    /// The rate of the path, wire bytes per second; zero while it is not known.
    fn rate(&self) -> u64 {
        let (mut best, mut second) = (0, 0);
        for &rate in &self.rates {
            if rate > best {
                (best, second) = (rate, best);
            } else {
                second = second.max(rate);
            }
        }
        if self.rates.len() < 3 { best } else { second }
    }

    fn end_round(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.round_started).as_micros().max(1);
        let rate = u128::from(self.round_bytes) * 1_000_000 / elapsed;
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        let full = self.held_back && !self.draining;
        // A round in which there was little to fetch tells nothing, unless it is the best.
        if full || rate > self.rate() {
            if self.rates.len() == RATE_ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.round_bytes = 0;
        self.round_started = now;
        self.held_back = false;
        self.draining = false;
        if full {
            let started = matches!(self.stage, Stage::Start { .. });
            self.fit_window(rate);
            let cruising = matches!(self.stage, Stage::Cruise { .. });
            if cruising && (started || now.saturating_sub(self.drained_at) >= DRAIN_EVERY) {
                self.drained_at = now;
                self.draining = true;
            }
        }
    }

    /// After a full round: what fills the path.
    fn fit_window(&mut self, rate: u64) {
        self.stage = self.next_stage(rate);
        let product = bytes_in(self.rate(), self.base());
        let window = match self.stage {
            Stage::Start { best, .. } => {
                let product = bytes_in(best, self.base());
                self.window.max(product * START_GAIN)
            }
            Stage::Cruise { .. } => product + (product / SLACK).max(self.wire_chunk()),
            Stage::Probe { rounds: 0, .. } => self.window / 8 * PROBE_GAIN_8TH,
            Stage::Probe { .. } => self.window,
        };
        self.window = window.clamp(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES);
    }

    fn next_stage(&self, rate: u64) -> Stage {
        match self.stage {
            Stage::Start { best, .. } if rate > best + best / 4 => Stage::Start {
                best: rate,
                rounds: 0,
            },
            Stage::Start { best, rounds } if rounds + 1 < FLAT_ROUNDS => Stage::Start {
                best,
                rounds: rounds + 1,
            },
            Stage::Start { .. } => Stage::Cruise { rounds: 0 },
            Stage::Cruise { rounds } if rounds + 1 < CRUISE_ROUNDS => {
                Stage::Cruise { rounds: rounds + 1 }
            }
            Stage::Cruise { .. } => Stage::Probe {
                before: self.rate(),
                rounds: 0,
            },
            Stage::Probe { before, rounds: 0 } => Stage::Probe { before, rounds: 1 },
            Stage::Probe { before, .. } if rate > before / 16 * PROBE_SUCCESS_16TH => {
                Stage::Start {
                    best: rate,
                    rounds: 0,
                }
            }
            Stage::Probe { .. } => Stage::Cruise { rounds: 0 },
        }
    }
}

/// How many bytes pass in `time` at `rate` bytes per second.
fn bytes_in(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A link that carries one chunk after the other, and a source that always has something.
    struct Link {
        rate: u64,
        rtt: Duration,
        free_at: Duration,
        /// What is sent for 16 bytes of the disk.
        packed_16th: u64,
    }

    /// What came of some seconds: the share of the link used, and the mean time that a small read
    /// would have had to wait for the queue.
    fn drive(pacer: &mut Pacer, link: &mut Link, from: Duration, to: Duration) -> (f64, Duration) {
        let mut under_way: VecDeque<(Duration, Duration, u64, u64)> = VecDeque::new();
        let (mut now, mut bytes, mut queue, mut looks) = (from, 0, Duration::ZERO, 0);
        while now < to {
            // Half of what waits before and half of what waits after: the mean over time.
            queue += link.free_at.saturating_sub(now + link.rtt / 2) / 2;
            while pacer.may_send() {
                let chunk = pacer.chunk_bytes();
                pacer.sent(chunk);
                let there = now + link.rtt / 2;
                let wire = chunk * link.packed_16th / 16;
                link.free_at = link.free_at.max(there) + time_of(wire, link.rate);
                under_way.push_back((link.free_at + link.rtt / 2, now, chunk, wire));
            }
            let wait = link.free_at.saturating_sub(now + link.rtt / 2);
            queue += wait / 2;
            looks += 1;
            if looks % 32 == 0 {
                // A guest's small read: what shows how far away the source is.
                pacer.sent(4096);
                pacer.landed(now, link.rtt + wait, 4096, 4096);
            }
            let (at, sent_at, chunk, wire) =
                under_way.pop_front().expect("a window has room for one");
            now = now.max(at);
            bytes += wire;
            pacer.landed(now, now - sent_at, chunk, wire);
        }
        for (_, _, chunk, _) in under_way {
            pacer.lost(chunk);
        }
        let could = link.rate as f64 * (now - from).as_secs_f64();
        (bytes as f64 / could, queue / looks)
    }

    fn link(mbit: u64, rtt_ms: u64) -> Link {
        Link {
            rate: mbit * 125_000,
            rtt: Duration::from_millis(rtt_ms),
            free_at: Duration::ZERO,
            packed_16th: 16,
        }
    }

    fn time_of(bytes: u64, rate: u64) -> Duration {
        Duration::from_nanos(bytes * 1_000_000_000 / rate)
    }

    /// From 10 to 200 ms, from 20 Mbit/s to 1 Gbit/s: the link is full and the queue short.
    #[test]
    fn the_link_is_full_and_the_queue_short() {
        for rtt_ms in [1, 10, 50, 200] {
            for mbit in [20, 400, 1000] {
                let mut pacer = Pacer::new();
                let mut link = link(mbit, rtt_ms);
                let warm = Duration::from_secs(4);
                drive(&mut pacer, &mut link, Duration::ZERO, warm);
                let (share, queue) = drive(&mut pacer, &mut link, warm, warm * 4);
                let told = format!("{rtt_ms} ms, {mbit} Mbit/s: {share:.2}, queue {queue:?}");
                assert!(share > 0.92, "{told}");
                // The smallest window, a seventh of the round trip, or what nobody notices.
                let chunk = time_of(MIN_WINDOW_BYTES + MIN_CHUNK_BYTES, link.rate);
                let jitter = Duration::from_micros(2500);
                assert!(queue < (link.rtt / 7).max(chunk).max(jitter), "{told}");
            }
        }
    }

    /// A link that becomes four times as fast is found within seconds, and so is a slower one.
    #[test]
    fn a_change_of_the_link_is_found() {
        let mut pacer = Pacer::new();
        let mut link = link(100, 50);
        let second = Duration::from_secs(1);
        drive(&mut pacer, &mut link, Duration::ZERO, second * 3);
        link.rate *= 4;
        drive(&mut pacer, &mut link, second * 3, second * 8);
        let (share, _) = drive(&mut pacer, &mut link, second * 8, second * 12);
        assert!(share > 0.92, "{share:.2} of the faster link");
        link.rate /= 10;
        drive(&mut pacer, &mut link, second * 12, second * 30);
        let (share, queue) = drive(&mut pacer, &mut link, second * 30, second * 50);
        assert!(share > 0.92, "{share:.2} of the slower link");
        assert!(queue < Duration::from_millis(30), "{queue:?}");
    }

    /// The disk compresses well here and not at all there: the link is full over both.
    #[test]
    fn the_link_is_full_whatever_the_source_makes_of_the_bytes() {
        for rtt_ms in [10, 50, 200] {
            let (mut pacer, mut link) = (Pacer::new(), link(400, rtt_ms));
            let piece = link.rtt * 16;
            let warm = Duration::from_secs(4);
            drive(&mut pacer, &mut link, Duration::ZERO, warm);
            let mut from = warm;
            for packed_16th in [5, 16, 2, 16, 8, 4, 16] {
                link.packed_16th = packed_16th;
                let (share, _) = drive(&mut pacer, &mut link, from, from + piece);
                assert!(share > 0.85, "{rtt_ms} ms, {packed_16th}/16: {share:.2}");
                let settled = from + piece;
                let (share, queue) = drive(&mut pacer, &mut link, settled, settled + piece);
                let told = format!("{rtt_ms} ms, {packed_16th}/16: {share:.2}, {queue:?}");
                assert!(share > 0.92, "{told}");
                assert!(
                    queue < (link.rtt / 5).max(Duration::from_millis(5)),
                    "{told}"
                );
                from += piece * 2;
            }
        }
    }

    /// Little is asked for: the window stays, instead of shrinking to what is used.
    #[test]
    fn a_quiet_time_does_not_shrink_the_window() {
        let mut pacer = Pacer::new();
        let mut link = link(400, 50);
        let second = Duration::from_secs(1);
        drive(&mut pacer, &mut link, Duration::ZERO, second * 5);
        let before = pacer.window_bytes();
        for n in 0..1000 {
            pacer.sent(4096);
            pacer.landed(second * 5 + link.rtt * (n + 1), link.rtt, 4096, 4096);
        }
        let after = pacer.window_bytes();
        // (It may have been in the middle of a probe.)
        assert!(after > before * 3 / 4, "{after} after {before}");
    }
}
