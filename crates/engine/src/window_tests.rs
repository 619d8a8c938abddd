//! A window among others: behind one link with a queue in front of it, beside other windows and a TCP that fills that queue, over
//! a way that becomes longer.

use std::collections::VecDeque;
use std::time::Duration;

use crate::window::{MIN_WINDOW_BYTES, Round, Window, bytes_in, is_time_to_look, time_of};

const BASE_MS: u64 = 200;
const BASE: Duration = Duration::from_millis(BASE_MS);
const RATE: u64 = 50_000_000;

/// Several senders behind one link with a queue in front of it, another stream that fills that queue, and a way that may
/// become longer. Runs in steps, and a round trip is a round.
struct Street {
    senders: Vec<Sender>,
    /// The stream of others, if it is there: a TCP with all the bytes that it may send.
    others: Option<Tcp>,
    rate: u64,
    /// How many products the queue in front of the link holds.
    room: u64,
    /// By how much the way is longer, whoever sends.
    longer: Duration,
    /// By how much more at most, every second another part of it, in percent of the way.
    jitter_percent: u64,
    jitter: Duration,
    draws: u64,
    now: Duration,
    /// When the link will have sent all that waits.
    free_at: Duration,
}

struct Sender {
    window: Window,
    tcp: Tcp,
    /// The window was less than TCP would have sent.
    held_back: bool,
    /// Arrived in this round, and in all.
    round_bytes: u64,
    bytes: u64,
}

struct Tcp {
    window: u64,
    /// When what is on its way was sent, when it will have come, and how much it is.
    sent: VecDeque<(Duration, Duration, u64)>,
    on_its_way: u64,
    /// Of what came last.
    trip: Duration,
    lost_at: Duration,
}

impl Tcp {
    fn new() -> Self {
        Self {
            window: 64 << 10,
            sent: VecDeque::new(),
            on_its_way: 0,
            trip: BASE,
            lost_at: Duration::ZERO,
        }
    }

    /// What has come by now.
    fn receive(&mut self, now: Duration) -> u64 {
        let mut bytes = 0;
        while self.sent.front().is_some_and(|(_, due, _)| *due <= now) {
            if let Some((sent, _, len)) = self.sent.pop_front() {
                self.trip = now - sent;
                bytes += len;
            }
        }
        self.on_its_way -= bytes;
        bytes
    }

    /// Sends what may be, spread over the way, and learns whether the queue was full. Grows only if it sends all that it
    /// may.
    fn send(&mut self, queue: &mut Queue, most: u64) {
        let room = self.window.min(most).saturating_sub(self.on_its_way);
        let mut room = room.min(self.window * 5 / 4 * STEP_MS / BASE_MS);
        while room > 0 {
            let piece = room.min(queue.product / 512);
            let Some(due) = queue.take(piece) else {
                if queue.now - self.lost_at > self.trip {
                    self.window = self.on_its_way / 10 * 7;
                    self.lost_at = queue.now;
                }
                return;
            };
            self.sent.push_back((queue.now, due, piece));
            self.on_its_way += piece;
            room -= piece;
        }
        if most > self.window {
            // Twice as much in a round trip, and later on a twentieth of the product more.
            let grown = self.window.min(queue.product / 20);
            self.window += grown * STEP_MS / BASE_MS;
        }
    }
}

/// The queue, for one step.
struct Queue {
    now: Duration,
    free_at: Duration,
    delay: Duration,
    rate: u64,
    product: u64,
    room: u64,
}

impl Queue {
    /// When so much more will have come; `None` if there is no room.
    fn take(&mut self, bytes: u64) -> Option<Duration> {
        let starts = self.free_at.max(self.now);
        if bytes_in(self.rate, starts - self.now) > self.product * self.room {
            return None;
        }
        self.free_at = starts + time_of(bytes, self.rate);
        Some(self.free_at + self.delay)
    }
}

const STEP_MS: u64 = 5;
const STEP: Duration = Duration::from_millis(STEP_MS);

impl Sender {
    fn new() -> Self {
        Self {
            window: Window::across(BASE),
            tcp: Tcp::new(),
            held_back: false,
            round_bytes: 0,
            bytes: 0,
        }
    }

    fn step(&mut self, queue: &mut Queue) {
        self.round_bytes += self.tcp.receive(queue.now);
        self.held_back |= self.window.bytes() <= self.tcp.window;
        self.tcp.send(queue, self.window.bytes());
    }

    fn end_round(&mut self, took: Duration, look: bool) {
        let bytes = std::mem::take(&mut self.round_bytes);
        self.bytes += bytes;
        let trip = self.tcp.trip;
        self.window.end_round(Round {
            bytes,
            took,
            full: std::mem::take(&mut self.held_back),
            queue: trip > BASE + BASE / 16 + Duration::from_millis(2),
            trip,
            base: BASE,
            slack_bytes: 64 << 10,
            look,
        });
    }
}

impl Street {
    fn of(senders: usize) -> Self {
        Self {
            senders: (0..senders).map(|_| Sender::new()).collect(),
            others: None,
            rate: RATE,
            room: 1,
            longer: Duration::ZERO,
            jitter_percent: 0,
            jitter: Duration::ZERO,
            draws: 1,
            now: Duration::ZERO,
            free_at: Duration::ZERO,
        }
    }

    fn step(&mut self) {
        if self.now.subsec_millis() == 0 {
            let factor = 6_364_136_223_846_793_005;
            self.draws = self.draws.wrapping_mul(factor).wrapping_add(1);
            let percent = (self.draws >> 33) % (self.jitter_percent + 1);
            self.jitter = BASE.mul_f64(percent as f64 / 100.0);
        }
        let mut queue = Queue {
            now: self.now,
            free_at: self.free_at,
            delay: BASE + self.longer + self.jitter,
            rate: self.rate,
            product: bytes_in(self.rate, BASE),
            room: self.room,
        };
        for sender in &mut self.senders {
            sender.step(&mut queue);
        }
        if let Some(others) = &mut self.others {
            others.receive(queue.now);
            others.send(&mut queue, u64::MAX);
        }
        self.free_at = queue.free_at;
        self.now += STEP;
    }

    /// What part of the link each used in so many rounds, and how long the round trip was in the mean.
    fn drive(&mut self, rounds: u32) -> (Vec<f64>, Duration) {
        let mut trips = Duration::ZERO;
        for sender in &mut self.senders {
            sender.bytes = 0;
        }
        let began = self.now;
        for _ in 0..rounds {
            let before = self.now;
            let trips_now = self.senders.iter().map(|sender| sender.tcp.trip);
            let took = trips_now.max().unwrap_or(BASE).max(BASE);
            while self.now < before + took {
                self.step();
            }
            let look = is_time_to_look(before, self.now, took);
            for sender in &mut self.senders {
                sender.end_round(took, look);
            }
            trips += self.free_at.saturating_sub(self.now) + BASE + self.longer + self.jitter;
        }
        let could = bytes_in(self.rate, self.now - began);
        let shares = self.senders.iter();
        let shares = shares.map(|sender| sender.bytes as f64 / could as f64);
        (shares.collect(), trips / rounds)
    }

    /// After some time without anybody else, the link is full and the queue short; longer, where several try to find more.
    fn is_as_if_nothing_had_been(&mut self) {
        self.others = None;
        self.longer = Duration::ZERO;
        self.jitter_percent = 0;
        self.drive(100);
        let (shares, trip) = self.drive(400);
        let all: f64 = shares.iter().sum();
        let most = match shares.len() {
            1 => BASE * 9 / 8,
            _ => BASE * 3 / 2,
        };
        assert!(all > 0.95 && trip < most, "{shares:.2?}, {trip:?}");
    }
}

/// Another way is taken, and all of it becomes longer: that is no queue that a smaller window would make shorter.
#[test]
fn a_way_that_becomes_longer_is_filled() {
    // Where it is three times as long, each look takes its time, and TCP a while to grow again.
    for (longer, least) in [(BASE / 4, 0.85), (BASE / 2, 0.85), (BASE * 2, 0.5)] {
        let mut street = Street::of(1);
        street.drive(200);
        street.longer = longer;
        street.drive(200);
        let (shares, trip) = street.drive(400);
        assert!(shares[0] > least, "{longer:?}: {shares:.2?}, {trip:?}");
        assert!(trip < (BASE + longer) * 3 / 2, "{longer:?}: {trip:?}");
        street.is_as_if_nothing_had_been();
    }
}

/// Over another way, which is slower as well, the window of the one before is not what comes back; and in front of a queue
/// that holds much, what was sent before it is looked is not taken for others'.
#[test]
fn a_slower_link_is_followed_whatever_its_queue_holds() {
    for (part, longer) in [(4, Duration::ZERO), (4, BASE / 2), (2, BASE / 4)] {
        let mut street = Street::of(1);
        street.drive(200);
        street.rate = RATE / part;
        street.longer = longer;
        street.room = 16;
        street.drive(200);
        let (shares, trip) = street.drive(400);
        let told = format!("1/{part}, {longer:?} longer: {shares:.2?}, {trip:?}");
        assert!(shares[0] > 0.85, "{told}");
        assert!(trip < (BASE + longer) * 3 / 2, "{told}");
    }
}

/// A stream that fills the queue whatever that does to others does not get all.
#[test]
fn beside_others_there_is_a_share() {
    for (count, room) in [(1, 1), (3, 1), (1, 6)] {
        let mut street = Street::of(count);
        street.room = room;
        street.drive(200);
        street.others = Some(Tcp::new());
        street.drive(400);
        let (shares, trip) = street.drive(400);
        let all: f64 = shares.iter().sum();
        // As many of ours as one of the others, or more.
        assert!((0.25..0.9).contains(&all), "{shares:.2?}, {trip:?}");
        street.is_as_if_nothing_had_been();
    }
}

/// Round trips that change are no reason to send less and less.
#[test]
fn jitter_leaves_most_of_the_link() {
    for (jitter_percent, least) in [(20, 0.85), (50, 0.75)] {
        let mut street = Street::of(1);
        street.drive(200);
        street.jitter_percent = jitter_percent;
        let (shares, trip) = street.drive(2000);
        assert!(shares[0] > least, "{jitter_percent} %: {shares:.2?}");
        assert!(trip < BASE * 9 / 4, "{jitter_percent} %: {trip:?}");
        street.is_as_if_nothing_had_been();
    }
}

/// Each would take what the others send for somebody else's queue, and none would give way; they look at the same time.
#[test]
fn several_senders_make_no_queue_for_each_other() {
    let mut street = Street::of(0);
    for _ in 0..6 {
        street.senders.push(Sender::new());
        let (shares, trip) = street.drive(200);
        assert!(trip < BASE * 3 / 2, "{shares:.2?}, {trip:?}");
        street.is_as_if_nothing_had_been();
    }
}

/// The least window makes a queue in front of a slow link, and nobody else is there.
#[test]
fn a_slow_link_is_not_taken_for_a_queue_of_others() {
    for before in [300_000, RATE / 40] {
        let mut street = Street::of(1);
        street.rate = before;
        street.room = 16;
        street.drive(200);
        street.rate = 300_000;
        street.drive(200);
        for _ in 0..20 {
            street.drive(100);
            let bytes = street.senders[0].window.bytes();
            // The least product, and what is on top of it.
            assert!(bytes <= MIN_WINDOW_BYTES * 5 / 2, "{bytes}");
        }
    }
}

#[test]
fn it_is_looked_every_four_seconds_and_over_a_long_way_every_eight() {
    let ms = Duration::from_millis;
    for (before, now, trip_ms, wanted) in [
        (7990, 7999, 125, false),
        (7999, 8000, 125, true),
        (8000, 11_999, 125, false),
        (11_999, 12_000, 125, true),
        (7999, 8000, 126, true),
        (11_999, 12_000, 200, false),
        (11_999, 16_000, 200, true),
        (63_999, 64_000, 2000, true),
        (31_999, 32_000, 2000, false),
        // The clock was set back.
        (8000, 7999, 125, false),
    ] {
        let due = is_time_to_look(ms(before), ms(now), ms(trip_ms));
        assert_eq!(due, wanted, "{before}, {now}, {trip_ms}");
    }
}
