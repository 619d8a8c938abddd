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

/// What the window is being used for. Rounds are full rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// To find the rate: the best so far, and for how many rounds it has been that.
    Start { best: u64, rounds: u32 },
    /// To keep the pipe full, for so many rounds now.
    Cruise { rounds: u32 },
    /// To see whether more would arrive. What a larger window brings arrives a round trip later, so
    /// the first round does not count.
    Probe { before: u64, rounds: u32 },
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
    /// The round trip of an empty queue.
    pub base: Duration,
    /// The least that the window is to be above the product.
    pub slack_bytes: u64,
}

/// A window; see the [module](self).
#[derive(Debug)]
pub struct Window {
    bytes: u64,
    /// Rates of the last full rounds, bytes per second.
    rates: VecDeque<u64>,
    stage: Stage,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            bytes: FIRST_WINDOW_BYTES,
            rates: VecDeque::with_capacity(RATE_ROUNDS),
            stage: Stage::Start { best: 0, rounds: 0 },
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
        let filled = round.full || (round.queue && !self.is_cruising());
        // A round in which there was little to fetch tells nothing, unless it is the best.
        if filled || rate > self.rate() {
            if self.rates.len() == RATE_ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        if filled {
            self.stage = self.next_stage(rate);
            self.fit(round);
        }
    }

    fn fit(&mut self, round: Round) {
        let product = bytes_in(self.rate(), round.base);
        let window = match self.stage {
            Stage::Start { best, .. } => {
                let product = bytes_in(best, round.base);
                self.bytes.max(product * START_GAIN)
            }
            Stage::Cruise { .. } => product + (product / SLACK).max(round.slack_bytes),
            Stage::Probe { rounds: 0, .. } => self.bytes / 8 * PROBE_GAIN_8TH,
            Stage::Probe { .. } => self.bytes,
        };
        self.bytes = window.clamp(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES);
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
            base: BASE,
            slack_bytes: 0,
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
