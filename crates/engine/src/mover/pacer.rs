//! How much may be in flight.
//!
//! The window follows the bandwidth-delay product ([`Window`]). What lands lets the next request go, so
//! requests leave at the pace of the bottleneck, and the queue in front of it, in which demand would have to
//! wait, stays at the little that the window is above the product.
//!
//! Demand counts as in flight but never waits for room: what a guest asks for takes the place of
//! read-ahead and of the background copy.
//!
//! Where the source compresses, what is asked for and what crosses the link are not the same. The
//! path is measured in bytes that cross it; how many of them a byte of the disk will be is taken from
//! what came last. So the window of disk bytes grows over what compresses well, and shrinks at once over
//! what does not: what was asked for before that waits at the source, where demand passes it.

use std::time::Duration;

use crate::window::{MAX_WINDOW_BYTES, MIN_ROUND, Round, Window, bytes_in, is_time_to_look};

/// The smallest and largest chunk of the background copy.
const MIN_CHUNK_BYTES: u64 = 16 << 10;
const MAX_CHUNK_BYTES: u64 = 1 << 20;

/// How long one chunk may occupy the link: what a demand read may find in front of it.
const CHUNK_TIME: Duration = Duration::from_millis(2);

/// At long round trips chunks may be longer: a window is at least so many of them, for each costs time at both
/// ends.
const CHUNKS_IN_WINDOW: u64 = 28;

/// How long the shortest round trip is believed.
const BASE_LIFETIME: Duration = Duration::from_secs(20);

/// How often the window is made smaller for a round, so that the queue empties and the shortest round
/// trip can be seen again. A window computed from a round trip with a queue in it keeps the queue.
const DRAIN_EVERY: Duration = Duration::from_secs(8);

/// What is in flight besides the window has to have come before that: it is waited for while a round brings so much of it,
/// in parts of the window.
const REST_PART: u64 = 4;

/// Chunks are shorter then: their own time on the wire counts as distance.
const DRAIN_CHUNKS_IN_WINDOW: u64 = 64;

/// A window is never more requests than this, where nothing is compressed, and some are left for what was asked for in
/// shorter ones before.
pub const REQUESTS_IN_WINDOW: usize = 80;

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

/// How many windows are asked of a source that itself sends no more than fills the path. What
/// is more than one waits there, behind demand, and keeps the path full while the ratio changes.
const OVER_ASKED: u64 = 2;

/// And while the window is being looked for: the source's own grows sooner than what comes of it is seen here.
const OVER_ASKED_AT_FIRST: u64 = 4;

/// For so long after something was lost on the path, TCP at the source is thought to be below what the path
/// carries: some seconds pass until it has come back from a loss over a long way.
const LOSS_LASTS: Duration = Duration::from_secs(10);

/// So much more may be in flight meanwhile, in eighths of a window, or of as many chunks as a window has over a long
/// way: over a short one it is so few that each connection would often be without. One more with each full round.
const MOST_SURPLUS_8TH: u64 = 8;

/// How the path to a source is, as TCP here tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathSeen {
    /// More is on its way than fills it.
    pub queue: bool,
    /// The round trip.
    pub trip: Duration,
    /// How many packets have come out of order so far. More of them: some were lost.
    pub out_of_order: u64,
    /// When that was, by the clock of the host, since the epoch.
    pub since_epoch: Duration,
}

impl PathSeen {
    /// Whether something was lost since. (Connections that end take what they told along.)
    pub(super) fn shows_loss_since(&self, before: &Self) -> bool {
        self.out_of_order > before.out_of_order
    }
}

/// What is done to see how far away the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lull {
    No,
    /// No more than the window may be in flight; so much was when the round began.
    Rest {
        in_flight: u64,
    },
    /// Less than that.
    Drain,
}

/// Bytes are those of the disk unless they are called wire bytes.
#[derive(Debug)]
pub(crate) struct Pacer {
    /// In wire bytes.
    window: Window,
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
    drained_at: Option<Duration>,
    lull: Lull,
    /// The window, and not the cap or the disk, held something back in this round.
    held_back: bool,
    /// What TCP told last, and when it told of a loss.
    seen: Option<PathSeen>,
    lost_at: Option<Duration>,
    /// What may be in flight besides the window, in eighths of the most.
    surplus_8th: u64,
    /// What the clock of the host was when the round began, as far as TCP told.
    round_started_at: Duration,
}

impl Pacer {
    pub fn new() -> Self {
        Self {
            window: Window::default(),
            in_flight_bytes: 0,
            ratio: RATIO_ONE,
            base: None,
            next_base: None,
            base_since: Duration::ZERO,
            round_bytes: 0,
            round_started: Duration::ZERO,
            drained_at: None,
            lull: Lull::No,
            held_back: false,
            seen: None,
            lost_at: None,
            surplus_8th: 0,
            round_started_at: Duration::ZERO,
        }
    }

    /// Forgets the path: the source was away and may be reached differently.
    pub fn restart(&mut self, now: Duration) {
        *self = Self {
            in_flight_bytes: self.in_flight_bytes,
            base_since: now,
            round_started: now,
            ..Self::new()
        };
    }

    /// How long a chunk of the background copy should be.
    pub fn chunk_bytes(&self) -> u64 {
        let wanted = self.of_disk(self.wire_chunk());
        1 << wanted.clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES).ilog2()
    }

    fn wire_chunk(&self) -> u64 {
        let wanted = if self.lull == Lull::Drain {
            self.window.bytes() / DRAIN_CHUNKS_IN_WINDOW
        } else {
            bytes_in(self.window.rate(), CHUNK_TIME).max(self.window.bytes() / CHUNKS_IN_WINDOW)
        };
        1 << wanted.clamp(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES).ilog2()
    }

    /// How much fills the path, as far as it is known.
    pub fn window_bytes(&self) -> u64 {
        self.of_disk(self.window.bytes())
    }

    /// How many bytes of the disk are so many on the wire.
    fn of_disk(&self, wire_bytes: u64) -> u64 {
        (wire_bytes.saturating_mul(RATIO_ONE) / self.ratio).min(MAX_WINDOW_BYTES)
    }

    /// The shortest round trip; zero while there was none.
    pub fn base(&self) -> Duration {
        self.base.unwrap_or(Duration::ZERO)
    }

    /// What TCP told last, if there is a queue.
    fn queue(&self) -> Option<PathSeen> {
        self.seen.filter(|seen| seen.queue)
    }

    /// The round trip, with the queue that there is. (The shortest that is known here may be as long by now.)
    fn trip(&self) -> Duration {
        let base = self.base();
        self.queue().map_or(base, |seen| seen.trip.max(base))
    }

    /// Whether what nobody waits for may go now, with one disk at the link.
    #[cfg(all(test, not(loom)))]
    pub fn may_send(&mut self, source_paces: bool) -> bool {
        let room = self.in_flight_bytes < self.open_bytes(source_paces, true);
        self.held_back |= !room;
        room
    }

    /// How much may be in flight now; more where the source sends no more than fills the path,
    /// whatever it is asked for, and with `more` after a loss.
    pub fn open_bytes(&self, source_paces: bool, more: bool) -> u64 {
        let window = self.window_bytes();
        match self.lull {
            Lull::No => {}
            Lull::Rest { .. } => return window,
            Lull::Drain => return self.drained(window),
        }
        let windows = match (source_paces, self.window.is_starting()) {
            (false, _) => 1,
            (true, false) => OVER_ASKED,
            (true, true) => OVER_ASKED_AT_FIRST,
        };
        let surplus = if more && !self.window.is_looking() {
            self.surplus_bytes()
        } else {
            0
        };
        // What is in flight has a place in memory when it comes.
        (window * windows)
            .max(window + surplus)
            .min(MAX_WINDOW_BYTES)
    }

    /// What is left of the window while the queue empties: three quarters, since what is not on its way then is time
    /// lost; half over a short way, where a window is a few chunks.
    fn drained(&self, window: u64) -> u64 {
        let chunks = self.of_disk(bytes_in(self.window.rate(), CHUNK_TIME * 2));
        let left = window.saturating_sub(chunks);
        left.clamp(window / 2, window / 4 * 3)
    }

    /// What may be in flight besides the window while losses are remembered.
    fn surplus_bytes(&self) -> u64 {
        let most = self
            .window_bytes()
            .max(self.chunk_bytes() * CHUNKS_IN_WINDOW);
        most / 8 * self.surplus_8th
    }

    /// TCP tells how the path is, and whether something was lost since it told last.
    pub fn sees(&mut self, now: Duration, seen: PathSeen, lost: bool) {
        self.seen = Some(seen);
        if lost {
            self.lost_at = Some(now);
        }
    }

    /// TCP tells nothing of the path any more.
    pub fn sees_nothing(&mut self) {
        self.seen = None;
    }

    /// How the path is, as was told last.
    #[cfg(all(test, not(loom)))]
    pub fn seen(&self) -> Option<PathSeen> {
        self.seen
    }

    /// When something was lost last.
    #[cfg(all(test, not(loom)))]
    pub fn lost_at(&self) -> Option<Duration> {
        self.lost_at
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
        // What goes one way in bursts comes back in bursts.
        let over = now.saturating_sub(self.round_started) >= self.trip().max(MIN_ROUND);
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

    /// A window that is made for what TCP brings after a loss lets it bring no more: it grows only while somebody asks
    /// for more than it sends. What is asked for besides waits at the source, unless a queue shows that it does not.
    fn follow_losses(&mut self, now: Duration, full: bool) {
        let lossy = self
            .lost_at
            .is_some_and(|at| now.saturating_sub(at) < LOSS_LASTS);
        let is_free = self.seen.is_some_and(|seen| !seen.queue);
        self.surplus_8th = match (lossy && is_free, full) {
            (true, true) => MOST_SURPLUS_8TH.min(self.surplus_8th + 1),
            (true, false) => self.surplus_8th,
            (false, _) => 0,
        };
    }

    fn end_round(&mut self, now: Duration) {
        let full = self.held_back && self.lull != Lull::Drain;
        let trip = self.trip();
        let before = self.round_started_at;
        if let Some(seen) = self.seen {
            self.round_started_at = seen.since_epoch;
        }
        self.window.end_round(Round {
            bytes: self.round_bytes,
            took: now.saturating_sub(self.round_started),
            full,
            queue: self.queue().is_some(),
            trip,
            base: self.base(),
            slack_bytes: self.wire_chunk(),
            look: is_time_to_look(before, self.round_started_at, trip),
        });
        self.round_bytes = 0;
        self.round_started = now;
        self.held_back = false;
        self.follow_losses(now, full);
        self.lull = self.next_lull(now, full);
    }

    /// What is in flight besides the window has to be gone before that is made smaller: it would count as distance.
    /// (Some of it may not come soon: over a slow connection, or since others are served first.)
    fn next_lull(&mut self, now: Duration, full: bool) -> Lull {
        let due = |at| now.saturating_sub(at) >= DRAIN_EVERY;
        let goes_on = match self.lull {
            Lull::No => full && self.drained_at.is_none_or(due),
            Lull::Rest { .. } => true,
            Lull::Drain => false,
        };
        // A larger window that is being tried would not empty.
        if !goes_on || !self.window.is_cruising() {
            return Lull::No;
        }
        let (in_flight, window) = (self.in_flight_bytes, self.window_bytes());
        let comes = match self.lull {
            Lull::Rest { in_flight: before } => in_flight + window / REST_PART <= before,
            _ => true,
        };
        if comes && in_flight > window + self.chunk_bytes() {
            return Lull::Rest { in_flight };
        }
        self.drained_at = Some(now);
        if in_flight < window * 2 {
            Lull::Drain
        } else {
            // Nothing at all could be asked for in that round, and nothing would be seen.
            Lull::No
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::window::{MIN_WINDOW_BYTES, time_of};

    /// A link that carries one chunk after the other, and a source that always has something.
    struct Link {
        rate: u64,
        rtt: Duration,
        free_at: Duration,
        /// What is sent for 16 bytes of the disk.
        packed_16th: u64,
        /// How many requests can be under way.
        requests: usize,
        /// A guest reads something small now and then: that shows how far away the source is.
        guest: bool,
        /// The source sends no more than fills the path, whatever it is asked for.
        paces: bool,
        /// TCP tells of losses all the time, and of no queue.
        lossy: bool,
        /// TCP tells of queues, by the round trip that was the shortest.
        told_from: Option<Duration>,
        /// The farthest that the source ever seemed to be.
        farthest: Duration,
    }

    /// What came of some seconds: the share of the link used, and the mean time that a small read
    /// would have had to wait for the queue.
    fn drive(pacer: &mut Pacer, link: &mut Link, from: Duration, to: Duration) -> (f64, Duration) {
        let mut under_way: VecDeque<(Duration, Duration, u64, u64)> = VecDeque::new();
        let (mut now, mut bytes, mut queue, mut looks) = (from, 0, Duration::ZERO, 0);
        while now < to {
            // Half of what waits before and half of what waits after: the mean over time.
            queue += link.free_at.saturating_sub(now + link.rtt / 2) / 2;
            if link.lossy {
                pacer.sees(now, told(false), true);
            }
            if let Some(shortest) = link.told_from {
                let trip = link.rtt + link.free_at.saturating_sub(now + link.rtt / 2);
                let seen = PathSeen {
                    queue: trip > shortest + shortest / 16 + Duration::from_millis(2),
                    trip,
                    since_epoch: now,
                    ..PathSeen::default()
                };
                pacer.sees(now, seen, false);
            }
            while pacer.may_send(link.paces) {
                let chunk = pacer.chunk_bytes();
                pacer.sent(chunk);
                // One more than may be under way goes when one has come back.
                let too_many = under_way.len().checked_sub(link.requests);
                let goes = too_many.map_or(now, |index| under_way[index].0);
                let there = goes + link.rtt / 2;
                let wire = chunk * link.packed_16th / 16;
                link.free_at = link.free_at.max(there) + time_of(wire, link.rate);
                under_way.push_back((link.free_at + link.rtt / 2, now, chunk, wire));
            }
            let wait = link.free_at.saturating_sub(now + link.rtt / 2);
            queue += wait / 2;
            looks += 1;
            if link.guest && looks % 32 == 0 {
                pacer.sent(4096);
                pacer.landed(now, link.rtt + wait, 4096, 4096);
            }
            let (at, sent_at, chunk, wire) =
                under_way.pop_front().expect("a window has room for one");
            now = now.max(at);
            bytes += wire;
            pacer.landed(now, now - sent_at, chunk, wire);
            link.farthest = link.farthest.max(pacer.base());
        }
        for (_, _, chunk, _) in under_way {
            pacer.lost(chunk);
        }
        let could = link.rate as f64 * (now - from).as_secs_f64();
        (bytes as f64 / could, queue / looks)
    }

    fn told(queue: bool) -> PathSeen {
        PathSeen {
            queue,
            ..PathSeen::default()
        }
    }

    fn link(mbit: u64, rtt_ms: u64) -> Link {
        Link {
            rate: mbit * 125_000,
            rtt: Duration::from_millis(rtt_ms),
            free_at: Duration::ZERO,
            packed_16th: 16,
            requests: REQUESTS_IN_WINDOW,
            guest: true,
            paces: false,
            lossy: false,
            told_from: None,
            farthest: Duration::ZERO,
        }
    }

    /// From 10 to 200 ms, from 20 Mbit/s to 1 Gbit/s, over one connection: the link is full and the queue short.
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
            // A source that compresses is one of ours, and takes several connections.
            link.requests *= 3;
            let piece = link.rtt.max(MIN_ROUND) * 16;
            let warm = Duration::from_secs(4);
            drive(&mut pacer, &mut link, Duration::ZERO, warm);
            let mut from = warm;
            for packed_16th in [5, 16, 4, 16, 8, 3, 16] {
                link.packed_16th = packed_16th;
                let (share, _) = drive(&mut pacer, &mut link, from, from + piece);
                assert!(share > 0.6, "{rtt_ms} ms, {packed_16th}/16: {share:.2}");
                let settled = from + piece;
                let (share, queue) = drive(&mut pacer, &mut link, settled, settled + piece);
                let told = format!("{rtt_ms} ms, {packed_16th}/16: {share:.2}, {queue:?}");
                assert!(share > 0.9, "{told}");
                assert!(
                    queue < (link.rtt / 5).max(Duration::from_millis(5)),
                    "{told}"
                );
                from += piece * 2;
            }
        }
    }

    /// TCP is slow after a loss, and grows while it has more to send than it may.
    #[test]
    fn after_a_loss_more_is_asked_for_until_there_is_a_queue() {
        let (mut pacer, mut link, mut now) = (Pacer::new(), link(400, 50), Duration::ZERO);
        // Windows that may be in flight after so many rounds more, in eighths.
        let mut after = |rounds: u32, queue, lost| {
            pacer.sees(now, told(queue), lost);
            let to = now + link.rtt * rounds;
            drive(&mut pacer, &mut link, now, to);
            now = to;
            let window = pacer.window_bytes() / 8;
            (pacer.window_bytes() + pacer.surplus_bytes() + window / 2) / window
        };
        assert_eq!(after(80, false, false), 8);
        assert!((10..16).contains(&after(6, false, true)));
        assert_eq!(after(20, false, false), 16);
        assert_eq!(after(2, true, false), 8);
        // As long as the loss is remembered, and no longer.
        assert_eq!(after(20, false, false), 16);
        assert_eq!(after(200, false, false), 8);
        assert_eq!(after(20, false, true), 16);
    }

    /// Over a short way a window is a few chunks, and what may be in flight besides is more than that.
    #[test]
    fn after_a_loss_there_is_something_for_each_connection_over_a_short_way_too() {
        let (mut pacer, mut link) = (Pacer::new(), link(100, 5));
        let second = Duration::from_secs(1);
        drive(&mut pacer, &mut link, Duration::ZERO, second);
        pacer.sees(second, told(false), true);
        drive(&mut pacer, &mut link, second, second * 2);
        let chunk = pacer.chunk_bytes();
        assert!(pacer.window_bytes() < chunk * CHUNKS_IN_WINDOW / 2);
        let open = pacer.open_bytes(false, true);
        assert_eq!(open, pacer.window_bytes() + chunk * CHUNKS_IN_WINDOW);
        assert_eq!(pacer.open_bytes(false, false), pacer.window_bytes());
    }

    /// What waits at the source besides the window is not taken for distance, however long it waits there, and though
    /// nobody reads anything small.
    #[test]
    fn what_waits_at_the_source_does_not_make_the_way_longer() {
        for (paces, lossy) in [(false, false), (false, true), (true, false), (true, true)] {
            for (mbit, rtt_ms) in [(30, 50), (160, 50), (160, 10), (400, 200)] {
                let (mut pacer, mut link) = (Pacer::new(), link(mbit, rtt_ms));
                (link.guest, link.paces, link.lossy) = (false, paces, lossy);
                let minute = Duration::from_secs(60);
                for at in 0..10 {
                    let (share, _) = drive(&mut pacer, &mut link, minute * at, minute * (at + 1));
                    let (base, most) = (pacer.base(), link.rtt * 9 / 8);
                    let told =
                        format!("{paces}, {lossy}: {mbit} Mbit/s, {at} min: {share:.3}, {base:?}");
                    assert!(share > 0.9, "{told}");
                    assert!(base < most, "{told}");
                    assert!(link.farthest < link.rtt * 3 / 2, "{told}");
                }
                assert_eq!(pacer.surplus_8th == MOST_SURPLUS_8TH, lossy);
            }
        }
    }

    /// Much over a slow connection, or of a stream: the window is made smaller all the same, if anything can go then.
    #[test]
    fn what_does_not_come_is_not_waited_for() {
        for (halves, wanted) in [(1, 2..=3), (6, 0..=0)] {
            let (mut pacer, mut link) = (Pacer::new(), link(400, 50));
            let mut now = Duration::from_secs(5);
            drive(&mut pacer, &mut link, Duration::ZERO, now);
            let bytes = pacer.window_bytes();
            pacer.sent(bytes + bytes / 2 * halves);
            let (mut rests, mut drains) = (0, 0);
            for _ in 0..400 {
                now += link.rtt;
                pacer.hold_back();
                pacer.sent(bytes);
                pacer.landed(now, link.rtt, bytes, bytes);
                rests += u32::from(matches!(pacer.lull, Lull::Rest { .. }));
                drains += u32::from(pacer.lull == Lull::Drain);
            }
            assert!(wanted.contains(&drains), "{drains} times in 20 s");
            assert!((1..=3).contains(&rests), "{rests} rounds for it");
        }
    }

    /// As TCP tells: the window fills a way that has become longer, long before the round trips of the short one are forgotten,
    /// and is as it was when it is short again.
    #[test]
    fn a_way_that_becomes_longer_is_filled_where_tcp_tells() {
        for tells in [true, false] {
            let (mut pacer, mut link) = (Pacer::new(), link(400, 50));
            let (short, second) = (link.rtt, Duration::from_secs(1));
            link.told_from = tells.then_some(short);
            drive(&mut pacer, &mut link, Duration::ZERO, second * 4);
            link.rtt = short * 3 / 2;
            drive(&mut pacer, &mut link, second * 4, second * 10);
            let (share, queue) = drive(&mut pacer, &mut link, second * 10, second * 18);
            let there = format!("{tells}: {share:.2}, queue {queue:?}");
            link.rtt = short;
            drive(&mut pacer, &mut link, second * 18, second * 28);
            let (share_back, queue_back) = drive(&mut pacer, &mut link, second * 28, second * 60);
            if tells {
                assert!(share > 0.85 && queue < short, "{there}");
            } else {
                assert!(share < 0.5, "{there}");
            }
            let back = format!("{tells}: {share_back:.2}, queue {queue_back:?}");
            assert!(share_back > 0.92 && queue_back < short / 5, "{back}");
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
