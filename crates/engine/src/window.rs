//! How many bytes on their way fill a path.
//!
//! By a model of it: the rate at which bytes arrive when the window is full, times the round trip of an
//! empty queue, and a little on top. (The idea is that of TCP BBR. A window that merely shrinks when round trips
//! grow, as LEDBAT's does, takes TCP's own slow start for a queue, and at long round trips never gets going.)
//!
//! The same at both ends: a destination bounds with it what it asks for, a sender of ours what it
//! hands to TCP. No clock and no I/O: rounds are told.

use std::collections::VecDeque;
use std::time::Duration;

/// Bounds of the window. The upper one fills 2.5 Gbit/s at 200 ms.
pub const MIN_WINDOW_BYTES: u64 = 64 << 10;
/// See [`MIN_WINDOW_BYTES`].
pub const MAX_WINDOW_BYTES: u64 = 64 << 20;

/// The window that a path begins with.
const FIRST_WINDOW_BYTES: u64 = 1 << 20;

/// Where the round trip is known before, the path is thought to be of this rate (200 Mbit/s), within bounds: the window
/// grows by a factor of two in two round trips, which takes its time where they are long, and TCP
/// begins slowly by itself. Where the path is half as fast, the queue is one of a round trip.
const FIRST_RATE: u64 = 25_000_000;
const LEAST_FIRST_BYTES: u64 = 256 << 10;
const MOST_FIRST_BYTES: u64 = 8 << 20;

/// What the window is above the measured product: a sixteenth of it, and what the caller needs at least.
/// It keeps the pipe full between two arrivals, and lets the rate be found again after it has grown.
const SLACK: u64 = 16;

/// While the rate is still being found: the window over the product so far. It doubles with every
/// round trip, as TCP's does at the source.
const START_GAIN: u64 = 2;

/// The rate counts as found when it has grown by less than a quarter over so many full rounds.
const FLAT_ROUNDS: u32 = 3;

/// Once it is found, a larger window is tried after so many full rounds. If more arrives, the rate is
/// looked for anew: the path has become faster, or it was the source's TCP that was slow before,
/// and a TCP grows only while somebody asks for more than it can send.
const CRUISE_ROUNDS: u32 = 16;

/// How much larger (in eighths), and how much more must arrive (in sixteenths).
const PROBE_GAIN_8TH: u64 = 10;
const PROBE_SUCCESS_16TH: u64 = 18;

/// The shortest round: over less, the rate of a few chunks says nothing.
pub const MIN_ROUND: Duration = Duration::from_millis(40);

/// Full rounds whose rates are remembered. The second best of them counts: one that was measured
/// too high, because arrivals were held up and then came at once, does not.
const RATE_ROUNDS: usize = 8;

/// Beside others what a single round brings says little: of so many, after the first, it must be more in two.
const BESIDE_PROBE_ROUNDS: u32 = 4;
const BESIDE_PROBE_SUCCESSES: u32 = 2;

/// A queue counts as one that stays when there was one so much more often than none, in rounds. By then the rates from before it
/// are forgotten, and the window follows them, once: if it was ours, it goes.
const QUEUED_ROUNDS: u32 = 8;

/// A round trip that is longer than an empty one by what the window is above the product, and this, is a queue; and over a long
/// way by as much as a rate may be measured too high: a part of the way.
const QUEUE_TIME: Duration = Duration::from_millis(1);
const QUEUE_PART: u32 = 32;

/// Where it does not go, whose it is is seen with a window of three quarters of the product: once what was on its way before has
/// come, and a mean of round trips has followed, for so many rounds.
const LOOK_ROUNDS: u32 = 2;

/// How much of the window is given up each time that others are still there (in eighths): with what is tried after that it
/// stays, or it was more than they leave.
const LOOK_YIELD_8TH: u64 = 1;

/// How often it is looked, by the clock of the host, and the next power of two of it where it is less than so many round
/// trips: others that send over the same path have that clock, too, and whoever looks alone takes what the others send for
/// somebody else's queue.
const LOOK_EVERY: Duration = Duration::from_secs(4);
const LOOK_TRIPS: u32 = 32;

/// What the window is being used for. Rounds are full rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// To find the rate: the best so far, and for how many rounds it has been that.
    Start { best: u64, rounds: u32 },
    /// To keep the pipe full, for so many rounds now.
    Cruise { rounds: u32 },
    /// To see whether more would arrive.
    Probe(Probe),
    /// To see whose the queue is.
    Look(Look),
}

/// A larger window that is tried. What it brings arrives a round trip later, so the first round does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Probe {
    /// The rate before.
    before: u64,
    /// The window before.
    bytes: u64,
    /// For how many rounds it has been tried.
    rounds: u32,
    /// In how many of them more arrived.
    brought: u32,
}

/// A window that leaves no queue of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Look {
    /// The window before.
    bytes: u64,
    /// For how long what was sent with that may still come.
    left: Duration,
    /// For how many rounds it has been looked since.
    rounds: u32,
    /// In how many of them there was a queue.
    queued: u32,
}

/// What a round was like.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// Bytes that arrived.
    pub bytes: u64,
    /// How long it was.
    pub took: Duration,
    /// The window, and nothing else, held something back.
    pub full: bool,
    /// There was a queue in front of the path, whoever made it.
    pub queue: bool,
    /// The round trip.
    pub trip: Duration,
    /// That of an empty queue.
    pub base: Duration,
    /// The least that the window is to be above the product.
    pub slack_bytes: u64,
    /// It is time to see whose a queue is that stays; see [`is_time_to_look`].
    pub look: bool,
}

/// A window; see the [module](self).
#[derive(Debug)]
pub struct Window {
    bytes: u64,
    /// Rates of the last full rounds, bytes per second.
    rates: VecDeque<u64>,
    stage: Stage,
    /// How much more often than not there was a queue lately; see [`QUEUED_ROUNDS`].
    queued: u32,
    /// The window has followed what arrives since there was none.
    has_followed: bool,
    /// The window when there was none last.
    free_bytes: u64,
    /// It stayed when hardly anything of ours was in it, and the round trip was this: somebody else keeps it, or the way has
    /// become longer.
    beside_others: Option<Duration>,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            bytes: FIRST_WINDOW_BYTES,
            rates: VecDeque::with_capacity(RATE_ROUNDS),
            stage: Stage::Start { best: 0, rounds: 0 },
            queued: 0,
            has_followed: false,
            free_bytes: 0,
            beside_others: None,
        }
    }
}

impl Window {
    /// For a path of this round trip.
    pub fn across(base: Duration) -> Self {
        let product = bytes_in(FIRST_RATE, base);
        Self {
            bytes: product.clamp(LEAST_FIRST_BYTES, MOST_FIRST_BYTES),
            ..Self::default()
        }
    }

    /// How much fills the path, as far as it is known.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the rate has been found.
    pub fn is_cruising(&self) -> bool {
        matches!(self.stage, Stage::Cruise { .. })
    }

    /// Whether no more than a part of what fills the path is to be on its way, to see whose a queue is.
    pub fn is_looking(&self) -> bool {
        matches!(self.stage, Stage::Look(_))
    }

    /// Whether it is being looked for.
    pub fn is_starting(&self) -> bool {
        matches!(self.stage, Stage::Start { .. })
    }

    /// The rate of the path, bytes per second; zero while it is not known.
    pub fn rate(&self) -> u64 {
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

    /// A round is over.
    pub fn end_round(&mut self, round: Round) {
        let took = round.took.as_micros().max(1);
        let rate = u128::from(round.bytes) * 1_000_000 / took;
        let rate = u64::try_from(rate).unwrap_or(u64::MAX);
        // Whoever makes a queue has filled the path: where TCP keeps a sender below the window that is
        // tried, the window is never full, and no more need be tried.
        let filled = round.full || (round.queue && !self.is_cruising() && !self.queue_stays());
        // A round in which there was little to fetch tells nothing, unless it is the best; nor does one in which little was to be
        // on its way.
        if !self.is_looking() && (filled || rate > self.rate()) {
            if self.rates.len() == RATE_ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.count_queue(round);
        if filled || (self.queue_stays() && round.bytes > 0) {
            self.stage = self.next_stage(rate, round);
            self.fit(rate, round);
        }
    }

    /// Whether the round trip was longer than the window explains that fills the path.
    fn is_longer(&self, round: Round) -> bool {
        let slack = time_of(round.slack_bytes, self.rate()).max(round.base / 16);
        round.trip > round.base + slack + QUEUE_TIME.max(round.base / QUEUE_PART)
    }

    fn count_queue(&mut self, round: Round) {
        if !self.is_cruising() {
            return;
        }
        if self.is_longer(round) {
            self.queued = QUEUED_ROUNDS.min(self.queued + 1);
        } else {
            self.queued = self.queued.saturating_sub(1);
        }
        if self.queued == 0 {
            self.free_bytes = self.bytes;
            self.has_followed = false;
        }
    }

    fn fit(&mut self, rate: u64, round: Round) {
        let window = match self.stage {
            Stage::Start { best, .. } => {
                let product = bytes_in(best, round.base);
                self.bytes.max(product * START_GAIN)
            }
            Stage::Cruise { .. } => self.cruising(rate, round),
            Stage::Probe(probe) if probe.rounds == 0 => probe.bytes / 8 * PROBE_GAIN_8TH,
            Stage::Probe(_) | Stage::Look(_) => self.bytes,
        };
        self.bytes = window.clamp(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES);
    }

    /// What fills the path; no less than the window is, while there is a queue that may be somebody else's: what arrives beside
    /// it, over the way without it, is less than what was sent, and would be less again each time.
    fn cruising(&mut self, rate: u64, round: Round) -> u64 {
        let way = self.beside_others.unwrap_or(round.base);
        let fills = |rate| {
            let product = bytes_in(rate, way);
            product + (product / SLACK).max(round.slack_bytes)
        };
        let queue = self.is_longer(round);
        let follows = queue && self.queue_stays() && !self.has_followed;
        self.has_followed |= follows;
        let kept = if !self.can_look(round) || follows && self.beside_others.is_none() {
            0
        } else if queue || self.beside_others.is_some() {
            self.bytes
        } else {
            // It is this round that tells of the path, and not those with a queue before it.
            self.bytes.min(fills(rate))
        };
        fills(self.rate()).max(kept)
    }

    /// With less than the least window there may be a queue in front of a slow path, and nothing would be seen.
    fn can_look(&self, round: Round) -> bool {
        bytes_in(self.rate(), round.base) >= MIN_WINDOW_BYTES
    }

    fn next_stage(&mut self, rate: u64, round: Round) -> Stage {
        if !self.can_look(round) {
            self.beside_others = None;
            if self.is_looking() {
                return self.cruise(0);
            }
        }
        if let Some(look) = self.begin_look(rate, round) {
            return look;
        }
        match self.stage {
            Stage::Start { best, rounds } => self.after_start(best, rounds, rate),
            Stage::Cruise { rounds } if rounds + 1 < CRUISE_ROUNDS => {
                Stage::Cruise { rounds: rounds + 1 }
            }
            Stage::Cruise { .. } => self.probe(self.bytes),
            Stage::Probe(probe) => self.after_probe(probe, rate, round),
            Stage::Look(look) => self.after_look(look, rate, round),
        }
    }

    fn after_start(&mut self, best: u64, rounds: u32, rate: u64) -> Stage {
        if rate > best + best / 4 {
            return Stage::Start {
                best: rate,
                rounds: 0,
            };
        }
        let rounds = rounds + 1;
        if rounds < FLAT_ROUNDS {
            return Stage::Start { best, rounds };
        }
        self.cruise(0)
    }

    fn after_probe(&mut self, probe: Probe, rate: u64, round: Round) -> Stage {
        let rounds = probe.rounds + 1;
        if probe.rounds == 0 {
            return Stage::Probe(Probe { rounds, ..probe });
        }
        let more = rate > probe.before / 16 * PROBE_SUCCESS_16TH;
        if self.beside_others.is_none() {
            return match more {
                true => Stage::Start {
                    best: rate,
                    rounds: 0,
                },
                false => self.cruise(probe.bytes),
            };
        }
        let brought = probe.brought + u32::from(more && round.full);
        if brought == BESIDE_PROBE_SUCCESSES {
            return self.probe(self.bytes);
        }
        if rounds > BESIDE_PROBE_ROUNDS {
            return self.cruise(probe.bytes);
        }
        Stage::Probe(Probe {
            rounds,
            brought,
            ..probe
        })
    }

    /// The first round of a look, if this is the time for one.
    fn begin_look(&mut self, rate: u64, round: Round) -> Option<Stage> {
        // TCP may send less than the window by now.
        let product = bytes_in(rate.min(self.rate()), round.base);
        if !round.look || !self.queue_stays() || product < MIN_WINDOW_BYTES {
            return None;
        }
        let bytes = match self.stage {
            Stage::Cruise { .. } => self.bytes,
            Stage::Probe(probe) => probe.bytes,
            Stage::Start { .. } | Stage::Look(_) => return None,
        };
        self.bytes = product / 4 * 3;
        Some(Stage::Look(Look {
            bytes,
            left: round.trip + round.base,
            rounds: 0,
            queued: 0,
        }))
    }

    fn after_look(&mut self, look: Look, rate: u64, round: Round) -> Stage {
        // Nothing came, which tells nothing.
        if round.bytes == 0 {
            return self.stage;
        }
        if !look.left.is_zero() {
            let left = look.left.saturating_sub(round.took);
            return Stage::Look(Look { left, ..look });
        }
        // Demand is not held back, and may be more than that.
        let is_ours = bytes_in(rate, round.trip) > self.bytes * 2;
        let queued = look.queued + u32::from(self.is_longer(round) && !is_ours);
        let rounds = look.rounds + 1;
        if rounds < LOOK_ROUNDS {
            return Stage::Look(Look {
                rounds,
                queued,
                ..look
            });
        }
        self.end_look(look.bytes, (queued == LOOK_ROUNDS).then_some(round.trip))
    }

    /// The window was `bytes`; when hardly anything was on its way, there was a queue and the round trip was `others`, or there
    /// was none.
    fn end_look(&mut self, bytes: u64, others: Option<Duration>) -> Stage {
        let newly = self.beside_others.is_none();
        self.beside_others = others;
        self.queued = 0;
        match others {
            // What was lost to them meanwhile is to come back. (Since then the path may have become another.)
            Some(trip) if newly => {
                let most = bytes_in(self.rate(), trip) * 2;
                self.probe(bytes.max(self.free_bytes.min(most)))
            }
            Some(_) => self.probe(bytes / 8 * (8 - LOOK_YIELD_8TH)),
            None => self.cruise(0),
        }
    }

    /// Keeps the pipe full from now on. Where there is a queue, with no less than `bytes`.
    fn cruise(&mut self, bytes: u64) -> Stage {
        self.bytes = bytes;
        Stage::Cruise { rounds: 0 }
    }

    fn queue_stays(&self) -> bool {
        self.beside_others.is_some() || self.queued == QUEUED_ROUNDS
    }

    fn probe(&self, bytes: u64) -> Stage {
        Stage::Probe(Probe {
            before: self.rate(),
            bytes,
            rounds: 0,
            brought: 0,
        })
    }
}

/// Whether between two times since the epoch (1970) one came at which everybody looks whose a queue is, where a round trip is
/// now `trip`.
pub fn is_time_to_look(before: Duration, now: Duration, trip: Duration) -> bool {
    let trips = u64::try_from((trip * LOOK_TRIPS).as_millis()).unwrap_or(u64::MAX / 2);
    let every = LOOK_EVERY.as_secs().max(trips.div_ceil(1000));
    let every = every.next_power_of_two();
    now.as_secs() / every > before.as_secs() / every
}

/// How many bytes pass in `time` at `rate` bytes per second.
pub fn bytes_in(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

/// How long so many bytes take at `rate` bytes per second: for ever, nearly, where that is not known.
pub fn time_of(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_millis(200);
    const RATE: u64 = 50_000_000;

    /// What a round is like behind a TCP that never has more than `tcp_bytes` on its way.
    fn round(window: &Window, tcp_bytes: u64) -> Round {
        let product = bytes_in(RATE, BASE);
        let on_their_way = window.bytes().min(tcp_bytes);
        Round {
            bytes: on_their_way.min(product),
            took: BASE,
            full: window.bytes() <= tcp_bytes,
            queue: on_their_way > product + product / SLACK,
            trip: BASE,
            base: BASE,
            slack_bytes: 0,
            look: false,
        }
    }

    /// A TCP with less on its way than the window that is tried, and more than fills the path: the window
    /// was never full, and the queue that TCP made in front of the path stayed for ever.
    #[test]
    fn a_queue_that_tcp_makes_ends_the_trial_of_a_larger_window() {
        let product = bytes_in(RATE, BASE);
        let tcp_bytes = product / 8 * 9;
        let mut window = Window::default();
        let mut queued = 0;
        for number in 0..400 {
            let next = round(&window, tcp_bytes);
            queued += usize::from(number >= 100 && next.queue);
            window.end_round(next);
        }
        // For two rounds in eighteen a larger one is tried.
        assert!((1..=300 / 18 * 2 + 2).contains(&queued), "{queued} of 300");
        assert!(window.bytes() >= product);
    }

    /// Beside others it counts in how many rounds of four more arrived than before, the last one too.
    #[test]
    fn beside_others_two_rounds_of_four_must_bring_more() {
        let slow = bytes_in(RATE, BASE) / 2;
        let trial = |brought: [bool; 5]| {
            let mut window = Window {
                bytes: slow,
                rates: VecDeque::from([RATE / 2; RATE_ROUNDS]),
                beside_others: Some(BASE),
                ..Window::default()
            };
            window.stage = window.probe(slow);
            for more in brought {
                window.end_round(Round {
                    bytes: if more { slow / 4 * 5 } else { slow },
                    trip: BASE * 2,
                    full: true,
                    ..round(&window, u64::MAX)
                });
            }
            window.stage
        };
        let goes_on = |stage| matches!(stage, Stage::Probe(Probe { rounds: 0, .. }));
        assert!(goes_on(trial([false, false, false, true, true])));
        assert!(!goes_on(trial([true, false, false, false, true])));
        assert!(!goes_on(trial([true, false, false, false, false])));
    }

    /// And one that never fills the path says nothing: the window leaves room for it to grow.
    #[test]
    fn a_tcp_that_is_slow_is_not_held_back() {
        let product = bytes_in(RATE, BASE);
        let mut window = Window::default();
        let mut tcp_bytes = 64 << 10;
        for _ in 0..200 {
            window.end_round(round(&window, tcp_bytes));
            // It grows no further than it is let.
            let grown = (tcp_bytes + tcp_bytes / 32).min(product / 2);
            tcp_bytes = grown.min(window.bytes());
        }
        assert_eq!(tcp_bytes, product / 2);
    }
}
