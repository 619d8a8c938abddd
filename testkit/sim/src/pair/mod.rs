//! A world of two sites: a disk that moves from one to the other, with the session between them.
//!
//! Both volumes are the product's own, from their guests' calls down to the stores, with the move's
//! own thread and the source's answers; simulated are the media of both sites, the link, the VM and
//! time. One oracle knows what the VM was promised, wherever it ran. What must hold at every moment:
//! never do both accept writes. And when trouble ends: what the status names ends the move.
//!
//! In half of these worlds ([`BACK`]) the disk also comes back into its old copy, by what differs, and
//! before all of it was at the other site; processes are ended in good order; and somebody writes into
//! old copies that nobody needs.

mod check;
mod events;
mod link;
mod opening;
mod side;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use hikkoshi_daemon::config::{HandoffPolicy, Prepare};
use hikkoshi_daemon::status::LifeState;
use hikkoshi_daemon::volume::Volume;
use hikkoshi_store::Store;

use crate::client::Ask;
use crate::fiber::{self, Fiber, Wait};
use crate::oracle::{Oracle, Time};
use crate::plan::{Plan, Trouble};
use crate::rng::{Rng, mix};
use crate::sim::{News, Sim};
use crate::world::{Options, Outcome, Tally, original, text_of};

use link::Net;
use opening::Wanted;
use side::Side;

/// Seeds with this bit are worlds of two sites.
pub const PAIR: u64 = 1 << 63;

/// Those of them with this bit are worlds in which the disk comes back.
pub const BACK: u64 = 1 << 62;

const A: usize = 0;
const B: usize = 1;

/// So much time passes at most where nobody can go on, in microseconds.
const SLEEP_US: u64 = 20_000;

/// A request of a guest.
struct Request {
    ask: Ask,
    site: usize,
    began: Time,
    must_succeed: bool,
    /// It was asked at a destination that has not taken over since.
    elsewhere: bool,
    /// What it tells counts no more: it may be of a disk that a crash of the other site has ended since.
    unchecked: bool,
}

struct PairWorld {
    plan: Plan,
    policy: HandoffPolicy,
    sims: [Arc<Sim>; 2],
    sides: [Side; 2],
    net: Arc<Net>,
    oracle: Oracle,
    now: Time,
    /// Counts what other than looking in vain has happened.
    progress: u64,
    next_id: u64,
    requests: BTreeMap<u64, Request>,
    /// Reads that nobody waits for any more.
    forsaken: BTreeSet<u64>,
    /// Where the disk is: who accepted writes last, which is durable.
    owner: usize,
    /// A move from there to the other site has begun.
    moving: bool,
    /// It was given up, which is durable.
    given_up: bool,
    /// That move is one back: the other site has the old copy.
    returning: bool,
    /// What is at the other site once was all of the disk, so that it can come back into it.
    old_copy: bool,
    /// Where a process is begun so that the disk comes back, and whether also over what is no old copy
    /// any more.
    comes_back: [Option<bool>; 2],
    /// The disk comes back at all in this world.
    may_come_back: bool,
    /// But not before all of it is at the other site.
    patient: bool,
    /// Moves that were begun.
    moves: u8,
    /// Where the VM runs.
    at: usize,
    /// No new requests: it is about to run elsewhere.
    leaves: bool,
    /// Crashes that no opening has come to terms with yet, and whether one was a power cut.
    unsettled: [Option<bool>; 2],
    /// Commands that have not come back.
    commands: Arc<()>,
    /// The same of those that pause and cap.
    controls: Arc<()>,
    tally: Tally,
}

/// Plays the world of a seed.
pub fn play(seed: u64, options: Options) -> Outcome {
    fiber::begin(seed);
    let mut world = PairWorld::new(seed, options);
    if options.shown {
        println!("{:#?}", world.plan);
    }
    let result = catch_unwind(AssertUnwindSafe(|| world.run()));
    let failure = match result {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(why),
        Err(panic) => Some(format!("a panic: {}", text_of(&*panic))),
    };
    let traces = [A, B].map(|n| world.sims[n].trace());
    let tally = world.tally;
    // Whatever holds fibers goes before the pause does.
    for site in [A, B] {
        world.net.serve(site, None);
        world.sides[site].end();
    }
    drop(world);
    fiber::end();
    Outcome {
        hash: mix(traces[A].0) ^ traces[B].0,
        events: traces[A].1 + traces[B].1,
        tally,
        failure,
    }
}

/// So many of a thousand worlds have no crashes, after which the tracking of changes begins anew: in these
/// much is copied ahead, and moves are quick.
const CALM: u64 = 450;

/// So many of a thousand worlds copy without being asked.
const BACKGROUND: u64 = 850;

/// So many of a thousand worlds in which the disk comes back record what is written for that.
const RECORDS: u64 = 800;

/// So many wait with that until all of the disk is at the other site.
const PATIENT: u64 = 500;

/// So many of the others copy slowly, or only what is read.
const SLOW: u64 = 800;

/// So often a process is ended in good order there.
const CLOSES: u64 = 4;

/// Media do not fail here; worlds of one volume are for that.
fn trouble_of(plan: &Plan, is_calm: bool) -> Trouble {
    let t = plan.trouble;
    let crashes = |n: u64| if is_calm { 0 } else { n };
    Trouble {
        kill: crashes(t.kill / 2),
        power_cut: crashes(t.power_cut / 2),
        crash_in_replace: crashes(t.crash_in_replace),
        would_block: t.would_block,
        slow_us: t.slow_us,
        reset: t.reset,
        control: t.control,
        torn_marks: t.torn_marks,
        ..Trouble::NONE
    }
}

impl PairWorld {
    fn new(seed: u64, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let mut plan = Plan::new(&mut rng);
        plan.steps = options.steps.unwrap_or(plan.steps);
        plan.trouble = trouble_of(&plan, rng.permille(CALM));
        let policy = rng.pick(&[
            HandoffPolicy::FirstWrite,
            HandoffPolicy::FirstWrite,
            HandoffPolicy::Command,
        ]);
        let source = plan.config.source.as_mut().expect("every plan has one");
        source.handoff = policy;
        source.background = rng.permille(BACKGROUND);
        source.prepare = rng.pick(&[Prepare::None, Prepare::Ahead, Prepare::Ahead, Prepare::Full]);
        let may_come_back = seed & BACK != 0;
        let patient = may_come_back && rng.permille(PATIENT);
        if may_come_back {
            source.way_back = rng.permille(RECORDS);
            plan.trouble.close = CLOSES;
        }
        if patient {
            // The record of what is written ends with the first power cut.
            plan.trouble.power_cut /= 2;
        } else if may_come_back && rng.permille(SLOW) {
            // So that most is still missing when it comes back.
            source.background = rng.permille(200);
            source.max_rate = Some(rng.within(4, 64) << 10);
        }
        let way_back = source.way_back;
        let geometry = plan.geometry;
        let disk = original(geometry.size_bytes(), &mut rng);
        let sims = [A, B].map(|_| Sim::new(Rng::new(rng.any()), Trouble::NONE, options.shown));
        let sides = [A, B].map(|n| Side::new(&sims[n], geometry, 1, n == B, way_back));
        let image = sides[A].disk.inner();
        let made = image.write(0, &disk).and_then(|()| image.sync());
        made.expect("nothing is wrong yet");
        Self {
            oracle: Oracle::new(&disk),
            net: Net::new(),
            policy,
            sides,
            sims,
            plan,
            now: 1,
            progress: 0,
            next_id: 1,
            requests: BTreeMap::new(),
            forsaken: BTreeSet::new(),
            owner: A,
            moving: true,
            given_up: false,
            returning: false,
            old_copy: false,
            patient,
            comes_back: [None, None],
            may_come_back,
            moves: 1,
            at: A,
            leaves: false,
            unsettled: [None, None],
            commands: Arc::new(()),
            controls: Arc::new(()),
            tally: Tally::default(),
        }
    }

    fn run(&mut self) -> Result<(), String> {
        self.start(A);
        self.start(B);
        self.live_until("a site never serves", Self::both_serve)?;
        for sim in &self.sims {
            sim.set_trouble(self.plan.trouble);
        }
        for _ in 0..self.plan.steps {
            self.pass(self.below(20));
            let nobody = self.ready().is_empty();
            if !nobody && self.below(10) < 7 {
                self.get_on()?;
            } else {
                self.tally.steps += 1;
                self.progress += 1;
                self.happen();
                self.look()?;
            }
        }
        self.finish()
    }

    fn tick(&mut self) -> Time {
        self.now += 1;
        self.now
    }

    fn below(&self, n: u64) -> u64 {
        self.sims[A].below(n)
    }

    /// Both sites have one time.
    fn pass(&self, us: u64) {
        self.sims[A].pass(us);
        self.sims[B].pass(us);
    }

    /// Where a move goes to.
    fn other(&self) -> usize {
        1 - self.owner
    }

    fn volume(&self, site: usize) -> Option<&Arc<Volume>> {
        self.sides[site].volume.as_ref()
    }

    /// The destination's volume, while it stands by.
    fn standby(&self) -> Option<&Arc<Volume>> {
        let standby = |v: &&Arc<Volume>| v.life() == LifeState::Standby && !v.has_given_up();
        let volume = self.volume(self.other()).filter(standby);
        volume.filter(|_| self.moving && !self.given_up)
    }

    /// Whether a write would be accepted at a site now.
    fn accepts(&self, site: usize) -> bool {
        let accepts = |v: &Arc<Volume>| v.life() != LifeState::Standby && !v.has_departed();
        self.volume(site).is_some_and(accepts)
    }

    fn both_serve(&self) -> bool {
        self.sides.iter().all(|side| side.volume.is_some())
    }

    /// Whether nobody is about to begin or to end.
    fn all_stand(&self) -> bool {
        self.sides.iter().all(|s| s.volume.is_some() || s.rests)
    }

    /// A process begins.
    fn start(&mut self, site: usize) {
        let source = self.plan.config.source.clone();
        let mut source = source.expect("every plan has one");
        source.comes_back = self.comes_back[site].is_some();
        source.overwrite = self.comes_back[site] == Some(true);
        let wanted = Wanted {
            source,
            net: Arc::clone(&self.net),
            to: 1 - site,
            there: Arc::clone(&self.sims[1 - site]),
        };
        self.sides[site].start(&self.plan.config, wanted, self.plan.log_limit);
    }

    // Turns

    fn ready(&self) -> Vec<(usize, usize)> {
        let now = self.sims[A].now_us();
        let may = |fiber: &Fiber| match fiber.wait {
            Wait::Turn => true,
            Wait::Others => fiber.looked_at < self.progress,
            Wait::Busy(events) => fiber.looked_at + events <= self.progress,
            Wait::Until(us) => us <= now,
        };
        let mut ready = Vec::new();
        for (site, side) in self.sides.iter().enumerate() {
            let fibers = side.fibers.iter().enumerate();
            ready.extend(fibers.filter(|(_, f)| may(f)).map(|(n, _)| (site, n)));
        }
        ready
    }

    /// Somebody goes on; where nobody can, time passes.
    fn get_on(&mut self) -> Result<(), String> {
        self.tally.steps += 1;
        let mut ready = self.ready();
        if ready.is_empty() {
            self.progress += 1;
            let now = self.sims[A].now_us();
            let wakes = |f: &Fiber| match f.wait {
                Wait::Until(us) => Some(us),
                _ => None,
            };
            let next = self.sides.iter().flat_map(|s| &s.fibers).filter_map(wakes);
            let next = next.min().map_or(SLEEP_US, |us| us.saturating_sub(now));
            self.pass(next.clamp(1, SLEEP_US));
        } else {
            // Mostly one that has something to do, and not one that only looks.
            let looks =
                |(site, n): &(usize, usize)| self.sides[*site].fibers[*n].wait == Wait::Others;
            if self.below(4) > 0 && !ready.iter().all(looks) {
                ready.retain(|at| !looks(at));
            }
            let (site, n) = ready[self.sims[A].chance(|rng| rng.index(ready.len()))];
            self.resume(site, n)?;
        }
        self.look()
    }

    fn resume(&mut self, site: usize, n: usize) -> Result<(), String> {
        let fibers = &mut self.sides[site].fibers;
        let fiber = &mut fibers[n];
        self.sims[site].note(fiber.name, n as u64, site as u64);
        let waited = fiber.wait == Wait::Others;
        let ended = catch_unwind(AssertUnwindSafe(|| fiber.resume()))
            .map_err(|panic| format!("a panic in {}: {}", fiber.name, text_of(&*panic)))?;
        // Having looked in vain is nothing that others need to look at.
        if ended || !waited || fiber.wait != Wait::Others {
            self.progress += 1;
        }
        if ended {
            fibers.swap_remove(n);
        } else {
            fibers[n].looked_at = self.progress;
        }
        Ok(())
    }

    /// Takes up what was begun and told, and looks who accepts writes.
    fn look(&mut self) -> Result<(), String> {
        for site in [A, B] {
            loop {
                let sim = Arc::clone(&self.sims[site]);
                let (spawned, news) = (sim.take_spawned(), sim.take_news());
                if spawned.is_empty() && news.is_empty() {
                    break;
                }
                self.progress += 1;
                for (name, body) in spawned {
                    self.sides[site].fibers.push(Fiber::new(name, body));
                }
                for item in news {
                    match item {
                        News::Answered(id, answer) => self.answered(id, answer)?,
                        News::Crash { power } => {
                            self.crash(site, power);
                            break;
                        }
                        News::HandedOff(_) | News::SyncFailed => {}
                    }
                }
            }
            self.look_at_stage(site)?;
        }
        self.look_at_writers()?;
        let failure = self.sims.iter().find_map(|sim| sim.failure());
        failure.map_or(Ok(()), Err)
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
