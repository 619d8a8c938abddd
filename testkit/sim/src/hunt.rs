//! Playing many worlds: those that ever failed, then new ones, on all cores, until time is up or
//! one fails; and the shortest beginning of one that does.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::world::{Options, Outcome, Tally, play};

/// Seeds that failed once, each with a line of why. Always played first.
const FAILED: &str = include_str!("../failed-seeds.txt");

/// How many worlds are played to find the shortest beginning that fails.
const MAX_TRIES: u32 = 16;

/// The seeds that failed once, and why.
///
/// # Panics
/// The list is malformed.
pub fn failed_seeds() -> Vec<(u64, &'static str)> {
    FAILED
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let (seed, why) = line.split_once(' ').unwrap_or((line, ""));
            let seed = seed.parse().expect("every line begins with a seed");
            (seed, why.trim())
        })
        .collect()
}

/// Which new seeds are played, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// The first.
    pub first: u64,
    /// How many; `None`: until time is up.
    pub count: Option<u64>,
    /// When time is up.
    pub limit: Option<Duration>,
}

/// What a hunt brought.
#[derive(Debug)]
pub struct Catch {
    /// Worlds that were played.
    pub worlds: u64,
    /// What happened in them.
    pub tally: Tally,
    /// How long it took.
    pub elapsed: Duration,
    /// A seed that fails, and how.
    pub failed: Option<(u64, String)>,
}

/// Plays the seeds that failed once and then those of a range, on so many threads, until one
/// fails.
pub fn hunt(range: Range, threads: usize, options: Options) -> Catch {
    let started = Instant::now();
    let old = failed_seeds();
    let (next, worlds) = (AtomicU64::new(0), AtomicU64::new(0));
    let over = AtomicBool::new(false);
    let found = Mutex::new((Tally::default(), None));
    let seed_of = |n: u64| {
        let n_old = old.len() as u64;
        if n < n_old {
            usize::try_from(n).ok().map(|n| old[n].0)
        } else if range.count.is_none_or(|count| n - n_old < count)
            && range.limit.is_none_or(|limit| started.elapsed() < limit)
        {
            Some(range.first.wrapping_add(n - n_old))
        } else {
            None
        }
    };
    let work = || {
        while !over.load(Ordering::Relaxed) {
            let Some(seed) = seed_of(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            let outcome = play(seed, options);
            worlds.fetch_add(1, Ordering::Relaxed);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.0.add(&outcome.tally);
            if let Some(why) = outcome.failure {
                over.store(true, Ordering::Relaxed);
                found.1.get_or_insert((seed, why));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let (tally, failed) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    Catch {
        worlds: worlds.into_inner(),
        tally,
        elapsed: started.elapsed(),
        failed,
    }
}

/// The shortest beginning of a world that fails which halving finds: so many steps, and how it
/// fails then. More steps need not fail as well, so a shorter one may be missed.
pub fn shorten(seed: u64, options: Options) -> Option<(u64, Outcome)> {
    let whole = play(seed, options);
    whole.failure.as_ref()?;
    let mut best = (options.steps.unwrap_or(whole.tally.steps), whole);
    let (mut low, mut high) = (0, best.0);
    for _ in 0..MAX_TRIES {
        if low >= high {
            break;
        }
        let middle = low + (high - low) / 2;
        let steps = Some(middle);
        let outcome = play(seed, Options { steps, ..options });
        if outcome.failure.is_some() {
            high = middle;
            best = (middle, outcome);
        } else {
            low = middle + 1;
        }
    }
    Some(best)
}
