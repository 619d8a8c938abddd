//! A soak: threads that each carry volumes to their end, one after the other, on one file system
//! after the other, until enough was done or something went wrong.

use super::Programs;
use super::counts::Counts;
use super::filesystem::{self, FileSystem};
use super::load::Tally;
use super::movecut;
use super::powercut;
use super::sources::Sources;
use super::sweep::Sweep;
use crate::pattern::{Random, mix};
use crate::process;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the progress is shown.
const REPORT_EVERY: Duration = Duration::from_secs(10);

/// Every so many volumes one is moved and both its ends recorded. Odd: there are four file systems.
const MOVES_EVERY: u64 = 15;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The programs under test.
    pub programs: Programs,
    /// Names everything that is random.
    pub seed: u64,
    /// Crashes, at least.
    pub restarts: u64,
    /// Not longer than this, even if that means fewer.
    pub limit: Option<Duration>,
    /// Threads at work.
    pub jobs: u64,
    /// File systems.
    pub file_systems: Vec<&'static str>,
    /// Nothing but power cuts of moves.
    pub only_moves: bool,
    /// A directory in memory; everything is below it.
    pub root: PathBuf,
    /// Where what belongs to a failure is kept.
    pub evidence: PathBuf,
}

/// What all threads share.
struct Shared<'a> {
    plan: &'a Plan,
    counts: Counts,
    tally: Arc<Tally>,
    file_systems: Vec<FileSystem>,
    stop: AtomicBool,
    next: AtomicU64,
    points: AtomicU64,
    failures: Mutex<Vec<String>>,
    deadline: Option<Instant>,
}

/// Runs a soak; prints its progress and its counts.
///
/// # Errors
/// Something was lost or refused, or the soak could not be run.
pub fn run(plan: &Plan) -> Result<()> {
    let start = Instant::now();
    println!(
        "crash sweep: seed {}, {} crashes, on {}",
        plan.seed,
        plan.restarts,
        plan.file_systems.join(", ")
    );
    let file_systems = plan
        .file_systems
        .iter()
        .map(|name| FileSystem::make(&plan.root, name))
        .collect::<Result<Vec<_>>>()?;
    let shared = Shared {
        plan,
        counts: Counts::default(),
        tally: Arc::default(),
        file_systems,
        stop: AtomicBool::new(false),
        next: AtomicU64::new(0),
        points: AtomicU64::new(0),
        failures: Mutex::default(),
        deadline: plan.limit.map(|limit| start + limit),
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.jobs)
            .map(|job| {
                let shared = &shared;
                scope.spawn(move || shared.work(job))
            })
            .collect();
        let mut shown = Instant::now();
        while !workers.iter().all(|worker| worker.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
            if shown.elapsed() >= REPORT_EVERY {
                shown = Instant::now();
                let seconds = start.elapsed().as_secs();
                println!("{seconds:>6} s  {}", shared.counts.line());
            }
        }
    });
    let answered = shared.tally.answered.load(Ordering::Relaxed);
    println!("\n{}", shared.counts.table(&plan.file_systems));
    println!(
        "requests answered: {answered}, changes {}, durable {}",
        shared.tally.changes.load(Ordering::Relaxed),
        shared.tally.durable.load(Ordering::Relaxed)
    );
    println!("time: {:.1?}, seed {}", start.elapsed(), plan.seed);
    let failures = shared
        .failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if plan.programs.armed.is_some() && failures.is_empty() {
        let names = hikkoshi_crashpoint::NAMES.iter();
        let missed: Vec<_> = names.filter(|n| shared.counts.reached(n) == 0).collect();
        println!("named points not visited: {missed:?}");
        ensure!(
            missed.is_empty() || plan.limit.is_some(),
            "seed {}: points were not visited: {missed:?}",
            plan.seed
        );
    }
    if !failures.is_empty() {
        bail!("seed {}: {}", plan.seed, failures.join("\n"));
    }
    Ok(())
}

impl Shared<'_> {
    fn is_done(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
            || self.counts.crashes() >= self.plan.restarts && self.have_all_points_begun()
            || self
                .deadline
                .is_some_and(|deadline| Instant::now() > deadline)
    }

    /// However few crashes are asked for, every named point has its turn.
    fn have_all_points_begun(&self) -> bool {
        let begun = self.points.load(Ordering::Relaxed);
        self.plan.programs.armed.is_none() || begun >= hikkoshi_crashpoint::NAMES.len() as u64
    }

    /// One thread: sources of its own, a volume after the other.
    fn work(&self, job: u64) {
        if let Err(error) = self.work_inner(job) {
            self.fail(&format!("thread {job}"), None, &error);
        }
    }

    fn work_inner(&self, job: u64) -> Result<()> {
        let dir = self.plan.root.join(format!("sources-{job}"));
        let mut sources = Sources::start(&self.plan.programs.hikkoshi, &dir)?;
        while !self.is_done() {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let source = sources.pick(mix(self.plan.seed ^ number))?.to_owned();
            self.one(number, source);
        }
        Ok(())
    }

    fn one(&self, number: u64, source: String) {
        let seed = mix(self.plan.seed ^ mix(number));
        let all = self.file_systems.len() as u64;
        let at = usize::try_from(number % all).unwrap_or(0);
        let sweep = Sweep {
            programs: &self.plan.programs,
            file_system: &self.file_systems[at],
            traces: self.plan.root.clone(),
            source,
            counts: &self.counts,
            tally: Arc::clone(&self.tally),
        };
        let dir = sweep.file_system.dir.join(format!("{seed:016x}"));
        let mut what = format!("volume {seed:016x} on {}", sweep.file_system.name);
        // By number, so that a sample has some, on all file systems.
        let of_move = self.plan.only_moves || number % MOVES_EVERY == MOVES_EVERY / 2;
        let point = if of_move { None } else { self.next_point(seed) };
        let outcome = match point {
            None if of_move => {
                what.push_str(", moved, and the power cut");
                movecut::run(&sweep, seed, &|| self.is_done())
            }
            Some((name, nth)) => {
                what.push_str(&format!(", killed at {name}:{nth}"));
                sweep.named_volume(seed, name, nth).and_then(|reached| {
                    // Every point is passed once in a volume's life, or the sweep misses a step.
                    ensure!(reached || nth > 1, "the point was never reached");
                    Ok(())
                })
            }
            // As many power cuts as kills, about: a recording has more of them than a volume.
            None if seed.is_multiple_of(4) => {
                what.push_str(", its power cut");
                powercut::run(&sweep, seed, &|| self.is_done())
            }
            None => sweep.random_volume(seed, &|| self.is_done()),
        };
        if let Err(error) = outcome {
            self.fail(&what, Some(&dir), &error);
        }
    }

    /// The named point whose turn it is: all of them once as early as can be, later ones now and
    /// then, at a random passing.
    fn next_point(&self, seed: u64) -> Option<(&'static str, u64)> {
        self.plan.programs.armed.as_ref()?;
        let names = hikkoshi_crashpoint::NAMES;
        let mut random = Random::new(!seed);
        if let Ok(at) = usize::try_from(self.points.fetch_add(1, Ordering::Relaxed))
            && at < names.len()
        {
            return Some((names[at], 1));
        }
        let at = usize::try_from(random.below(names.len() as u64)).ok()?;
        let range = 1 << random.below(7);
        let nth = 2 + random.below(range);
        (random.below(4) == 0).then_some((names[at], nth))
    }

    /// Notes a failure, keeps what belongs to it, and ends the soak.
    fn fail(&self, what: &str, dir: Option<&Path>, error: &anyhow::Error) {
        self.stop.store(true, Ordering::Relaxed);
        let refused = format!("{error:#}").contains("ended by itself");
        self.counts.failure(refused);
        let mut text = format!("{what}: {error:#}");
        if let Some(dir) = dir {
            match keep(dir, &self.plan.evidence) {
                Ok(kept) => text.push_str(&format!("\n  kept: {}", kept.display())),
                Err(error) => text.push_str(&format!("\n  not kept: {error:#}")),
            }
        }
        println!("FAILED: {text}");
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text);
    }
}

/// Copies a directory to where it outlives our mounts.
fn keep(dir: &Path, evidence: &Path) -> Result<PathBuf> {
    fs::create_dir_all(evidence)?;
    let name = dir.file_name().context("a directory has a name")?;
    let target = evidence.join(name);
    let (from, to) = (dir.display().to_string(), target.display().to_string());
    process::run("cp", ["--archive", "--sparse=always", &from, &to])?;
    Ok(target)
}

/// The file systems of these names, separated by commas.
///
/// # Errors
/// One is not known.
pub fn parse_file_systems(text: &str) -> Result<Vec<&'static str>> {
    text.split(',')
        .map(|name| {
            filesystem::NAMES
                .into_iter()
                .find(|known| *known == name)
                .with_context(|| format!("no file system {name:?}"))
        })
        .collect()
}
