//! Watching a move: what crosses the link, what has arrived, what a guest feels, against time.
//!
//! Owns the samples of one move. The link's own counters are read, never what a program claims.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::disk::Disk;
use super::guest::{Felt, percentile, probe};
use super::moving::{Moving, arrived_share};
use super::site::{LinkCase, Sites};

/// Time between samples.
const INTERVAL: Duration = Duration::from_millis(250);
/// An answer that took less than this part of a round trip did not come from the old site.
const COLD_PART: f64 = 0.9;
/// Round trips in which TCP and the windows above it find the link's rate.
const WARM_UP_ROUND_TRIPS: f64 = 10.0;
/// The same where packets are lost: TCP begins far above the rate that it can keep there, and goes down to it loss by loss.
pub const LOSSY_WARM_UP: Duration = Duration::from_secs(8);

/// A moment of a move.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Moment {
    /// Seconds from the start.
    pub at_s: f64,
    /// Bytes that have come to the new site, as counted by the link.
    pub wire_bytes: u64,
    /// The part of the disk's data that is there, 0 to 1.
    pub arrived: f64,
}

/// A move, as watched.
#[derive(Clone, Debug, Serialize)]
pub struct Watched {
    /// Seconds until all was there; `None` if it was cut off.
    pub seconds: Option<f64>,
    /// How long it was watched.
    pub watched_s: f64,
    /// Bytes on the wire towards the new site, and back.
    pub wire_bytes: [u64; 2],
    /// Samples.
    pub moments: Vec<Moment>,
    /// Reads of a guest.
    pub felt: Vec<Felt>,
    /// CPU of the link's emulator, in cores.
    pub emulator_cores: f64,
}

/// Starts a move with `start` and watches it until it is over, `limit` at most. With `probes`, guests
/// read meanwhile.
pub fn watch(
    sites: &Sites,
    disk: &Disk,
    limit: Duration,
    probes: bool,
    start: impl FnOnce() -> Result<Moving>,
) -> Result<Watched> {
    let before = [sites.link.a_to_b().bytes, sites.link.b_to_a().bytes];
    let cpu = sites.link.cpu_time();
    let mut moving = start()?;
    let started = moving.started();
    let arrived_in = moving.arrived_in();
    let endpoint = moving.endpoint.clone().filter(|_| probes);
    let stop = AtomicBool::new(false);
    let sample = || Moment {
        at_s: started.elapsed().as_secs_f64(),
        wire_bytes: sites.link.a_to_b().bytes - before[0],
        arrived: arrived_share(&arrived_in, disk),
    };
    let (seconds, wire_bytes, moments, (felt, problem)) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut moments = vec![sample()];
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(INTERVAL);
                moments.push(sample());
            }
            moments
        });
        let guests = scope.spawn(|| match &endpoint {
            Some(endpoint) => probe(endpoint, disk, started, &stop),
            None => (Vec::new(), Ok(())),
        });
        let seconds = moving.wait(sites, limit);
        let wire = [
            sites.link.a_to_b().bytes - before[0],
            sites.link.b_to_a().bytes - before[1],
        ];
        stop.store(true, Ordering::Relaxed);
        (seconds, wire, join(sampler), join(guests))
    });
    let seconds = seconds?;
    if let Err(error) = problem {
        eprintln!("a guest gave up: {error:#}; {}", moving.tail());
    }
    let watched_s = started.elapsed().as_secs_f64();
    let emulator_cores = (sites.link.cpu_time() - cpu).as_secs_f64() / watched_s;
    Ok(Watched {
        seconds,
        watched_s,
        wire_bytes,
        moments,
        felt,
        emulator_cores,
    })
}

fn join<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

impl Watched {
    /// When the link's rate has been found, and when the move was over or cut off.
    fn full_speed(&self, case: &LinkCase) -> (f64, f64) {
        let end = self.seconds.unwrap_or(self.watched_s);
        let mut start = WARM_UP_ROUND_TRIPS * case.rtt().as_secs_f64();
        if case.loss_percent > 0.0 {
            start = start.max(LOSSY_WARM_UP.as_secs_f64());
        }
        (start.min(end / 2.0), end)
    }

    /// The median part of the link that was used at full speed, samples taken in turn.
    pub fn link_use(&self, case: &LinkCase) -> Option<f64> {
        let (start, end) = self.full_speed(case);
        let pairs = self.moments.windows(2);
        let inside = pairs.filter(|pair| pair[0].at_s >= start && pair[1].at_s <= end);
        let rates = inside.map(|pair| {
            let bytes = pair[1].wire_bytes - pair[0].wire_bytes;
            bytes as f64 / (pair[1].at_s - pair[0].at_s)
        });
        Some(percentile(rates, 0.5)? / case.bytes_per_s())
    }

    /// Times of the reads that had to cross the link at full speed, in milliseconds.
    pub fn cold_reads(&self, case: &LinkCase) -> Vec<f64> {
        let (start, end) = self.full_speed(case);
        let inside = |felt: &&Felt| felt.at_s >= start && felt.at_s <= end;
        let felt = self.felt.iter().filter(inside).map(|felt| felt.ms);
        felt.filter(|ms| is_cold(*ms, case)).collect()
    }

    /// The time until all is there, and the bytes that takes: measured, or projected from the pace
    /// of what was seen; and whether it was projected.
    pub fn until_resident(&self, case: &LinkCase) -> Option<(f64, f64, bool)> {
        if let Some(seconds) = self.seconds {
            return Some((seconds, self.wire_bytes[0] as f64, false));
        }
        let (start, _) = self.full_speed(case);
        let from = self.moments.iter().find(|moment| moment.at_s >= start)?;
        let to = self.moments.last()?;
        let share = to.arrived - from.arrived;
        if share <= 0.0 {
            return None;
        }
        let left = (1.0 - from.arrived) / share;
        let seconds = from.at_s + left * (to.at_s - from.at_s);
        let bytes = from.wire_bytes as f64 + left * (to.wire_bytes - from.wire_bytes) as f64;
        Some((seconds, bytes, true))
    }
}

/// Whether a read that took so long has crossed the link.
pub fn is_cold(ms: f64, case: &LinkCase) -> bool {
    ms >= COLD_PART * case.rtt_ms as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(seconds: Option<f64>) -> Watched {
        // 4 MB/s; a tenth of the disk a second.
        let moments = (0..=20_u32).map(|n| Moment {
            at_s: f64::from(n) / 4.0,
            wire_bytes: u64::from(n) * 1_000_000,
            arrived: f64::from(n) / 40.0,
        });
        let felt = |at_s, ms| Felt { at_s, ms };
        Watched {
            seconds,
            watched_s: 5.0,
            wire_bytes: [20_000_000, 1000],
            moments: moments.collect(),
            felt: vec![felt(0.1, 300.0), felt(2.0, 101.0), felt(3.0, 0.2)],
            emulator_cores: 0.0,
        }
    }

    const CASE: LinkCase = LinkCase {
        mbit: 40,
        rtt_ms: 100,
        loss_percent: 0.0,
        queue_bdp: 1.0,
    };

    #[test]
    fn what_is_cut_off_is_projected_from_its_pace() {
        let (seconds, bytes, projected) = watched(None).until_resident(&CASE).unwrap();
        assert!(projected);
        assert!(
            (seconds - 10.0).abs() < 1e-6 && (bytes - 40e6).abs() < 1.0,
            "{seconds} {bytes}"
        );
        let (seconds, bytes, projected) = watched(Some(4.5)).until_resident(&CASE).unwrap();
        assert!(!projected && (seconds - 4.5).abs() < 1e-6 && (bytes - 20e6).abs() < 1.0);
    }

    /// The start is no measure of what follows, but it counts as what it was.
    #[test]
    fn where_packets_are_lost_the_start_is_not_projected() {
        let case = LinkCase {
            loss_percent: 0.1,
            ..CASE
        };
        let mut seen = watched(None);
        // The first eight seconds brought three fifths of the disk, and each one from then on a hundredth.
        seen.watched_s = 20.0;
        seen.moments = (0..=20_u32)
            .map(|n| Moment {
                at_s: f64::from(n),
                wire_bytes: u64::from(n) * 1_000_000,
                arrived: 0.1 * f64::from(n.min(6)) + 0.01 * f64::from(n.saturating_sub(8)),
            })
            .collect();
        let (seconds, _, projected) = seen.until_resident(&case).unwrap();
        assert!(projected && (seconds - 48.0).abs() < 1e-6, "{seconds}");
    }

    #[test]
    fn only_reads_at_full_speed_that_crossed_the_link_count_as_cold() {
        let watched = watched(Some(5.0));
        assert_eq!(watched.cold_reads(&CASE), [101.0]);
        let used = watched.link_use(&CASE).unwrap();
        assert!((used - 0.8).abs() < 1e-6, "{used}");
    }
}
