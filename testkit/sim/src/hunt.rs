//! Playing many worlds: those that ever failed, then new ones, on all cores, until time is up or
//! one fails; and the shortest beginning of one that does.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::pair::{BACK, PAIR};
use crate::world::{Options, Outcome, Tally, play};

/// Seeds that failed once, each with a line of why. Always played first.
const FAILED: &str = include_str!("../failed-seeds.txt");

/// How many worlds are played to find the shortest beginning that fails.
const MAX_TRIES: u32 = 16;

/// Thousands of times what a world takes. In one that takes longer somebody waits for good in a way that
/// the simulator does not see.
const WORLD_LIMIT: Duration = Duration::from_secs(120);

/// How often it is looked for such worlds, and for the end.
const LOOK_AFTER: Duration = Duration::from_millis(50);

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
            let n = n - n_old;
            let seed = range.first.wrapping_add(n);
            // A quarter each are of two sites, and of two between which the disk comes back; all are
            // where such a one was asked for.
            Some(match n % 4 {
                2 => seed | PAIR,
                3 => seed | PAIR | BACK,
                _ => seed,
            })
        } else {
            None
        }
    };
    let playing: Vec<Mutex<Option<(u64, Instant)>>> =
        (0..threads).map(|_| Mutex::default()).collect();
    let left = AtomicUsize::new(threads);
    let work = |thread: usize| {
        let _leaves = Leaves(&left);
        while !over.load(Ordering::Relaxed) {
            let Some(seed) = seed_of(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            let place = &playing[thread];
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Some((seed, Instant::now()));
            let outcome = play(seed, options);
            *place.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
        for thread in 0..threads {
            let work = &work;
            scope.spawn(move || work(thread));
        }
        while left.load(Ordering::Acquire) > 0 {
            std::thread::sleep(LOOK_AFTER);
            playing.iter().for_each(end_what_stands_still);
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

/// A thread that plays no more.
struct Leaves<'a>(&'a AtomicUsize);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Nothing can end a thread that stands still, so the process ends, and says why.
fn end_what_stands_still(playing: &Mutex<Option<(u64, Instant)>>) {
    let playing = *playing.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((seed, since)) = playing
        && since.elapsed() > WORLD_LIMIT
    {
        eprintln!("seed {seed} FAILED: the world stands still, or does not end");
        std::process::exit(1);
    }
}

/// The shortest beginning of a world that fails which halving finds: so many steps, and how it
/// fails then. More steps need not fail as well, so a shorter one may be missed.
pub fn shorten(seed: u64, options: Options) -> Option<(u64, Outcome)> {
    let whole = play(seed, options);
    whole.failure.as_ref()?;
    let (mut low, mut high) = (0, options.steps.unwrap_or(whole.tally.steps));
    let mut best = options.steps.map(|steps| (steps, whole));
    for _ in 0..MAX_TRIES {
        if low >= high {
            break;
        }
        let middle = low + (high - low) / 2;
        let steps = Some(middle);
        let outcome = play(seed, Options { steps, ..options });
        if outcome.failure.is_some() {
            high = middle;
            best = Some((middle, outcome));
        } else {
            low = middle + 1;
        }
    }
    best
}
