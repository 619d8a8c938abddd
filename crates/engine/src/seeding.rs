//! Whether it pays to look for blocks in seed images, rather than to fetch them.
//!
//! The [`Gauge`] is told how fast blocks are looked at, how many of them are found, and now and then
//! how fast a plain fetch is; it says when that is to be measured, and when to leave it. It knows
//! no clock and does nothing itself.
//!
//! The background copy goes on behind seeding with what was not found. So with a share `p` found,
//! a byte of the disk takes `max(1 / looked, (1 - p) / fetched)`, and `1 / fetched` without seeds:
//! seeding saves time exactly if blocks are looked at faster than they are fetched and some are
//! found. How fast they are *found* does not matter for that.

use std::time::Duration;

/// How much is looked at before anything is judged.
const SPAN_BYTES: u64 = 32 << 20;

/// The same for what is found: so much in a row without anything to be found.
const BARREN_BYTES: u64 = 64 << 20;

/// Less than one in so many bytes found is not worth the hashes.
const LEAST_SHARE: u64 = 64;

/// The first, cheap measurement of a plain fetch.
const FIRST_BYTES: u64 = 256 << 10;

/// The thorough one.
const THOROUGH_BYTES: u64 = 4 << 20;

/// A measurement takes at most this part of the disk.
const LEAST_PART: u64 = 256;

/// A short fetch is mostly delay. One that is slower than looking by this factor needs no second,
/// longer one to say so.
const CLEARLY: u64 = 16;

/// How long a measurement of a plain fetch holds.
const MEASURED_FOR: Duration = Duration::from_secs(60);

/// How long seeding rests when it does not pay.
pub const REST: Duration = Duration::from_secs(30);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Go on looking.
    Look,
    /// Fetch so many bytes plainly, with nothing else under way, and tell how long it took.
    Measure(u64),
    /// Rest for [`REST`].
    Rest(Why),
}

/// Why seeding does not pay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Fetching is faster than looking.
    FastLink {
        /// Bytes looked at in a second.
        looked: u64,
        /// Bytes fetched in a second.
        fetched: u64,
    },
    /// Next to nothing is found.
    Barren,
}

/// Judges seeding by what is told of it.
#[derive(Clone, Debug)]
pub struct Gauge {
    disk_bytes: u64,
    /// Whatever it costs in time, bytes are to be saved.
    always: bool,
    /// Since when, and how much, was looked at without a break.
    span: Option<(Duration, u64)>,
    /// Bytes looked at in a second, as of the last whole span.
    looked: Option<u64>,
    /// Bytes fetched in a second, when that was measured, and whether thoroughly.
    fetched: Option<(u64, Duration, bool)>,
    /// Looked at and found since something was judged by it.
    searched: u64,
    found: u64,
}

impl Gauge {
    /// For a disk of this size. `always`: a fast link is no reason to rest.
    pub fn new(disk_bytes: u64, always: bool) -> Self {
        Self {
            disk_bytes,
            always,
            span: None,
            looked: None,
            fetched: None,
            searched: 0,
            found: 0,
        }
    }

    /// So many bytes were looked at, and so many of them found.
    pub fn looked(&mut self, now: Duration, bytes: u64, found: u64) {
        self.searched += bytes;
        self.found += found;
        if self.searched >= 2 * BARREN_BYTES {
            // What was long ago counts less and less.
            (self.searched, self.found) = (self.searched / 2, self.found / 2);
        }
        let Some((since, sum)) = &mut self.span else {
            // The first answer only starts the watch: what came before it was delay.
            self.span = Some((now, 0));
            return;
        };
        *sum += bytes;
        if *sum >= SPAN_BYTES
            && let Some(rate) = rate(*sum, now.saturating_sub(*since))
        {
            self.looked = Some(rate);
            self.span = Some((now, 0));
        }
    }

    /// Looking was interrupted, by whatever: the time until it goes on says nothing.
    pub fn interrupted(&mut self) {
        self.span = None;
    }

    /// A measurement has ended: `bytes` came in `took`; of a hole, none did.
    pub fn measured(&mut self, now: Duration, took: Duration, bytes: u64) {
        self.interrupted();
        let thorough = match self.fetched {
            Some((_, at, false)) if now.saturating_sub(at) < MEASURED_FOR => true,
            _ => self.first_bytes() == self.thorough_bytes(),
        };
        // Nothing came: it was in a hole, which says nothing. Taken for slow until the next time.
        let fetched = rate(bytes, took).unwrap_or(0);
        self.fetched = Some((fetched, now, thorough));
    }

    /// What to do now.
    pub fn advice(&self, now: Duration) -> Advice {
        if self.searched >= BARREN_BYTES && self.found < self.searched / LEAST_SHARE {
            return Advice::Rest(Why::Barren);
        }
        let Some(looked) = self.looked.filter(|_| !self.always) else {
            return Advice::Look;
        };
        match self.fetched {
            Some((fetched, at, thorough)) if now.saturating_sub(at) < MEASURED_FOR => {
                if !thorough && fetched.saturating_mul(CLEARLY) >= looked {
                    Advice::Measure(self.thorough_bytes())
                } else if thorough && looked < fetched - fetched / 4 {
                    // Not for a few per cent: what is found also spares the link.
                    Advice::Rest(Why::FastLink { looked, fetched })
                } else {
                    Advice::Look
                }
            }
            _ => Advice::Measure(self.first_bytes()),
        }
    }

    /// A rest is over: everything is to be found out anew.
    pub fn rested(&mut self) {
        *self = Self::new(self.disk_bytes, self.always);
    }

    fn first_bytes(&self) -> u64 {
        FIRST_BYTES.min(self.disk_bytes / LEAST_PART).max(1)
    }

    fn thorough_bytes(&self) -> u64 {
        THOROUGH_BYTES.min(self.disk_bytes / LEAST_PART).max(1)
    }
}

/// Bytes per second.
fn rate(bytes: u64, took: Duration) -> Option<u64> {
    let micros = took.as_micros().max(1);
    (bytes > 0).then(|| u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const DISK: u64 = 4 << 30;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Looks at `mib_per_s` for a second, from `at` on, with this many of 100 bytes found.
    fn look(gauge: &mut Gauge, at: Duration, mib_per_s: u64, percent: u64) -> Duration {
        for n in 0..=100 {
            let bytes = mib_per_s * MIB / 100;
            gauge.looked(at + ms(10 * n), bytes, bytes * percent / 100);
        }
        at + ms(1000)
    }

    #[test]
    fn a_slow_link_is_seen_by_a_short_fetch() {
        let mut gauge = Gauge::new(DISK, false);
        assert_eq!(gauge.advice(ms(0)), Advice::Look);
        let now = look(&mut gauge, ms(500), 400, 99);
        assert_eq!(gauge.advice(now), Advice::Measure(256 << 10));
        // 20 MiB/s.
        gauge.measured(now, ms(12), 256 << 10);
        assert_eq!(gauge.advice(now), Advice::Look);
        // It is measured again after a while.
        let later = look(&mut gauge, now + MEASURED_FOR, 400, 99);
        assert_eq!(gauge.advice(later), Advice::Measure(256 << 10));
    }

    #[test]
    fn a_link_faster_than_looking_makes_it_rest_after_a_thorough_look() {
        for (took_ms, rests) in [(4, true), (10, true), (14, false), (100, false)] {
            let mut gauge = Gauge::new(DISK, false);
            let now = look(&mut gauge, ms(0), 250, 100);
            gauge.measured(now, ms(1), 256 << 10);
            assert_eq!(gauge.advice(now), Advice::Measure(4 << 20));
            gauge.measured(now, ms(took_ms), 4 << 20);
            let advice = gauge.advice(now);
            let fast = matches!(advice, Advice::Rest(Why::FastLink { .. }));
            assert_eq!(fast, rests, "{advice:?} after {took_ms} ms");
            assert!(rests || advice == Advice::Look);
            gauge.rested();
            assert_eq!(gauge.advice(now), Advice::Look, "found out anew");
        }
    }

    #[test]
    fn whoever_wants_to_save_bytes_always_is_not_stopped_by_a_fast_link() {
        let mut gauge = Gauge::new(DISK, true);
        let now = look(&mut gauge, ms(0), 250, 50);
        assert_eq!(gauge.advice(now), Advice::Look);
        let now = look(&mut gauge, now, 8000, 0);
        assert_eq!(gauge.advice(now), Advice::Rest(Why::Barren));
    }

    #[test]
    fn a_wrong_seed_is_given_up_and_a_poor_one_is_not() {
        for (percent, advice) in [(0, Advice::Rest(Why::Barren)), (3, Advice::Look)] {
            let mut gauge = Gauge::new(DISK, true);
            let now = look(&mut gauge, ms(0), 60, percent);
            assert_eq!(gauge.advice(now), Advice::Look, "too early to tell");
            let now = look(&mut gauge, now, 60, percent);
            assert_eq!(gauge.advice(now), advice);
        }
    }

    #[test]
    fn breaks_do_not_count_and_a_hole_says_nothing() {
        let mut gauge = Gauge::new(DISK, false);
        gauge.looked(ms(0), MIB, MIB);
        gauge.looked(ms(10), 16 * MIB, 16 * MIB);
        gauge.interrupted();
        gauge.looked(ms(60_000), MIB, MIB);
        gauge.looked(ms(60_100), 32 * MIB, 32 * MIB);
        assert_eq!(gauge.looked, Some(320 * MIB));
        gauge.measured(ms(60_100), ms(1), 0);
        assert_eq!(gauge.advice(ms(60_100)), Advice::Look);
    }

    #[test]
    fn a_small_disk_is_not_spent_on_measuring() {
        let mut gauge = Gauge::new(32 * MIB, false);
        let now = look(&mut gauge, ms(0), 64, 100);
        assert_eq!(gauge.advice(now), Advice::Measure(128 << 10));
        gauge.measured(now, ms(1), 128 << 10);
        let advice = gauge.advice(now);
        assert!(
            matches!(advice, Advice::Rest(Why::FastLink { .. })),
            "{advice:?}"
        );
    }
}
