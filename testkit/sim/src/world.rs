//! A world: one seed, played from the first request to the last comparison.
//!
//! The world owns what outlives a process (disk, state directory, shared memory, the old site, the
//! oracle) and the flows of control of the process that runs now. Each step it lets one of these
//! go on, or something happens: a client asks, the server speaks, time passes, somebody pulls the
//! plug. Who and what is chance's choice.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use crate::client::Ask;
use crate::crash;
use crate::disk::Disk;
use crate::fiber::{self, Fiber, Wait};
use crate::oracle::{NEVER, Oracle, Time};
use crate::pair;
use crate::plan::{Plan, SECTOR, Trouble};
use crate::process::Process;
use crate::rng::Rng;
use crate::server::Server;
use crate::sim::{News, Sim};
use crate::source::SimSource;
use crate::statedir::{SimDirectory, SimMemory};

/// What happened in a world, to see that it was one worth living in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Steps taken.
    pub steps: u64,
    /// Requests of clients that were answered.
    pub answered: u64,
    /// Of these, with an error.
    pub failed: u64,
    /// Kills.
    pub kills: u64,
    /// Power cuts.
    pub power_cuts: u64,
    /// Closings in good order.
    pub closes: u64,
    /// Openings that a failing medium or a source of another size did not let succeed.
    pub failed_opens: u64,
    /// Disks that were taken over by another site.
    pub handoffs: u64,
    /// Moves to another site that were given up.
    pub given_up: u64,
    /// Times that a disk was to come back into its old copy.
    pub returns: u64,
    /// Of these, those that were refused.
    pub refused: u64,
    /// Those by which the disk came back, after all of it had been at the other site.
    pub late_takeovers: u64,
    /// The same before that.
    pub early_takeovers: u64,
}

impl Tally {
    /// Adds another world's.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.answered += other.answered;
        self.failed += other.failed;
        self.kills += other.kills;
        self.power_cuts += other.power_cuts;
        self.closes += other.closes;
        self.failed_opens += other.failed_opens;
        self.handoffs += other.handoffs;
        self.given_up += other.given_up;
        self.returns += other.returns;
        self.refused += other.refused;
        self.late_takeovers += other.late_takeovers;
        self.early_takeovers += other.early_takeovers;
    }
}

/// How a world ended.
#[derive(Debug)]
pub struct Outcome {
    /// The trace as a number: the same seed gives the same.
    pub hash: u64,
    /// Events in the trace.
    pub events: u64,
    /// What happened.
    pub tally: Tally,
    /// The promise that was broken.
    pub failure: Option<String>,
}

/// A request under way.
pub struct Request {
    pub ask: Ask,
    pub began: Time,
    /// The sectors it writes; `true` where it is not sure to.
    pub writes: Vec<(usize, bool)>,
    /// It must succeed: nothing is wrong with the world any more.
    pub must_succeed: bool,
}

/// A world.
pub struct World {
    pub plan: Plan,
    pub sim: Arc<Sim>,
    pub oracle: Oracle,
    pub server: Arc<Server>,
    pub disk: Arc<Disk>,
    pub dir: SimDirectory,
    pub memory: SimMemory,
    pub process: Option<Process>,
    /// The source of the process while it opens.
    pub opening_source: Arc<Mutex<Option<Arc<SimSource>>>>,
    pub fibers: Vec<Fiber>,
    /// Counts what other than looking in vain has happened.
    pub progress: u64,
    pub now: Time,
    pub next_id: u64,
    pub requests: BTreeMap<u64, Request>,
    /// Sectors that are being written in part.
    pub torn: BTreeSet<usize>,
    pub tally: Tally,
    /// A power cut that no opening has come to terms with yet.
    pub unsettled: bool,
    /// Somebody has begun to use the disk here: nobody does at the source any more.
    pub touched: bool,
    /// That was answered, so it is durable.
    pub handed_off: bool,
    /// All was here, which is durable.
    pub complete: bool,
    /// No new requests: the daemon is about to be stopped.
    pub draining: bool,
    pub finishing: bool,
    seed: u64,
}

/// How a world is played.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Trouble ends after so many steps instead of when the plan says so.
    pub steps: Option<u64>,
    /// The trace is printed.
    pub shown: bool,
    /// The source comes back older, or as another disk of the same size. Off as long as the
    /// product has no means of noticing it.
    pub older: bool,
}

/// Plays the world of a seed.
pub fn play(seed: u64, options: Options) -> Outcome {
    if seed & pair::PAIR != 0 {
        return pair::play(seed, options);
    }
    fiber::begin(seed);
    let mut world = World::new(seed, options.shown);
    if let Some(steps) = options.steps {
        world.plan.steps = steps;
    }
    if options.older && world.plan.trouble.resize > 0 {
        world.plan.trouble.older = world.plan.trouble.resize;
    }
    if options.shown {
        println!("{:#?}", world.plan);
    }
    let result = catch_unwind(AssertUnwindSafe(|| world.run()));
    let failure = match result {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(why),
        Err(panic) => Some(format!("a panic: {}", text_of(&*panic))),
    };
    // Whatever holds fibers goes before the pause does.
    let (hash, events) = world.sim.trace();
    let tally = world.tally;
    world.fibers.clear();
    drop(world);
    fiber::end();
    Outcome {
        hash,
        events,
        tally,
        failure,
    }
}

pub fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_default()
}

/// The disk at the source when the world begins: data, zeroes, and runs of both that don't care
/// for blocks.
pub fn original(size: u64, rng: &mut Rng) -> Vec<u8> {
    let mut disk = Vec::new();
    let size = usize::try_from(size).unwrap_or(0);
    while disk.len() < size {
        let run = SECTOR * (1 + rng.index(64));
        let zero = rng.permille(400);
        let end = (disk.len() + run).min(size);
        while disk.len() < end {
            if zero {
                disk.resize(disk.len() + SECTOR, 0);
            } else {
                disk.extend_from_slice(&sector_of(rng.any()));
            }
        }
    }
    disk.truncate(size);
    disk
}

/// A sector's worth of bytes that no other number gives.
pub fn sector_of(n: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (place, word) in bytes.chunks_exact_mut(8).zip(0_u64..) {
        let word = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23) ^ (word << 40) ^ n;
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

impl World {
    fn new(seed: u64, shown: bool) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(&mut rng);
        let disk = original(plan.geometry.size_bytes(), &mut rng);
        let oracle = Oracle::new(&disk);
        // The first opening is spared, so that there is a state at all.
        let sim = Sim::new(rng, Trouble::NONE, shown);
        let server = Server::new(&plan, disk, &sim);
        let dir = SimDirectory::new(&sim);
        let mut world = Self {
            oracle,
            server,
            disk: Disk::new(plan.geometry.size_bytes(), &sim),
            memory: SimMemory::new(&sim),
            process: None,
            opening_source: Arc::default(),
            fibers: Vec::new(),
            progress: 0,
            now: 1,
            next_id: 1,
            requests: BTreeMap::new(),
            torn: BTreeSet::new(),
            tally: Tally::default(),
            unsettled: false,
            touched: false,
            handed_off: false,
            complete: false,
            draining: false,
            finishing: false,
            seed,
            dir,
            sim,
            plan,
        };
        world.create();
        world
    }

    /// The number of the next event.
    pub fn tick(&mut self) -> Time {
        self.now += 1;
        self.now
    }

    fn run(&mut self) -> Result<(), String> {
        self.sim.note("seed", self.seed, 0);
        self.start();
        self.sim.set_trouble(self.plan.trouble);
        for _ in 0..self.plan.steps {
            self.step()?;
        }
        self.finish()
    }

    /// One step: a fiber goes on, or something happens.
    pub fn step(&mut self) -> Result<(), String> {
        self.tally.steps += 1;
        self.sim.pass(self.sim.below(20));
        let ready = self.ready();
        if !ready.is_empty() && self.sim.below(10) < 7 {
            let n = self.choose_fiber(ready);
            self.resume(n)?;
        } else {
            if ready.is_empty() && self.sim.below(4) > 0 {
                // All wait for the time: a world of slow media is not to be one of waiting.
                self.sleep();
            }
            self.progress += 1;
            self.happen()?;
        }
        self.look()
    }

    /// One of these fibers; mostly one that has something to do, and not one that only looks.
    pub fn choose_fiber(&self, mut ready: Vec<usize>) -> usize {
        let looks = |n: &usize| self.fibers[*n].wait == Wait::Others;
        if self.sim.below(4) > 0 && !ready.iter().all(looks) {
            ready.retain(|n| !looks(n));
        }
        ready[self.sim.chance(|rng| rng.index(ready.len()))]
    }

    /// The fibers that may go on.
    pub fn ready(&self) -> Vec<usize> {
        let now = self.sim.now_us();
        (0..self.fibers.len())
            .filter(|&n| match self.fibers[n].wait {
                Wait::Turn => true,
                Wait::Others => self.fibers[n].looked_at < self.progress,
                Wait::Busy(events) => self.fibers[n].looked_at + events <= self.progress,
                Wait::Until(us) => us <= now,
            })
            .collect()
    }

    /// Lets a fiber go on.
    pub fn resume(&mut self, n: usize) -> Result<(), String> {
        let fiber = &mut self.fibers[n];
        self.sim.note(fiber.name, n as u64, 0);
        let waited = fiber.wait == Wait::Others;
        let outcome = catch_unwind(AssertUnwindSafe(|| fiber.resume()));
        let ended = outcome
            .map_err(|panic| format!("a panic in {}: {}", self.fibers[n].name, text_of(&*panic)))?;
        if ended {
            self.progress += 1;
            self.fibers.swap_remove(n);
        } else {
            // Having looked in vain is nothing that others need to look at.
            if !(waited && self.fibers[n].wait == Wait::Others) {
                self.progress += 1;
            }
            self.fibers[n].looked_at = self.progress;
        }
        Ok(())
    }

    /// Takes up what was begun and told in a step.
    pub fn look(&mut self) -> Result<(), String> {
        loop {
            let (spawned, news) = (self.sim.take_spawned(), self.sim.take_news());
            if spawned.is_empty() && news.is_empty() {
                break;
            }
            for (name, body) in spawned {
                self.progress += 1;
                self.fibers.push(Fiber::new(name, body));
            }
            for item in news {
                self.progress += 1;
                match item {
                    News::Answered(id, answer) => self.answered(id, answer)?,
                    News::HandedOff(done) => self.handed_off |= done,
                    News::Crash { power } => {
                        self.crash(power);
                        break;
                    }
                    News::SyncFailed => {
                        let now = self.tick();
                        if let Some(process) = &mut self.process {
                            process.sync_failed_at.get_or_insert(now);
                        }
                    }
                }
            }
        }
        self.look_at_process()?;
        self.sim.failure().map_or(Ok(()), Err)
    }

    /// The process ends, or with `power` the machine; and what was under way is gone.
    pub fn crash(&mut self, power: bool) {
        self.sim
            .note(if power { "power cut" } else { "kill" }, self.now, 0);
        let now = self.tick();
        let sim = Arc::clone(&self.sim);
        if power {
            self.tally.power_cuts += 1;
            self.unsettled = true;
        } else {
            self.tally.kills += 1;
        }
        crash::strike(&sim, power, &mut self.disk, &mut self.dir, &mut self.memory);
        self.fibers.clear();
        self.process = None;
        sim.forget();
        self.oracle.interrupted(now);
        self.requests.clear();
        self.torn.clear();
        self.draining = false;
        self.oracle.set_oldest_read(NEVER);
        self.start();
    }
}
