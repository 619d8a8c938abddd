//! One of the two sites: its media, the process that serves the disk there, and its flows of control.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hikkoshi_daemon::config::ExportConfig;
use hikkoshi_daemon::volume::Volume;
use hikkoshi_daemon::volume::commit::Beats;
use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::mover::Mover;
use hikkoshi_store::state::{Identity, Life, StateDir, Ties};

use crate::crash;
use crate::disk::Disk;
use crate::fiber::{self, Fiber, Wait};
use crate::sim::Sim;
use crate::statedir::{SimDirectory, SimMemory};

use super::opening::{Opening, Stage, Wanted};
use super::source::PairSource;

/// How often the time is told to a volume that only records for the way back.
const QUIET_BEAT_US: u64 = 100_000;

/// A site.
pub struct Side {
    pub sim: Arc<Sim>,
    pub disk: Arc<Disk>,
    pub dir: SimDirectory,
    pub memory: SimMemory,
    pub fibers: Vec<Fiber>,
    pub volume: Option<Arc<Volume>>,
    pub stage: Arc<Mutex<Stage>>,
    /// The source has heard that the move was given up.
    pub has_told: Arc<AtomicBool>,
    /// Nobody serves it, and nobody is about to.
    pub rests: bool,
    /// What is being closed in good order.
    closing: Option<Arc<Volume>>,
    /// Held by the threads of the process, which end when it is set.
    ending: Arc<AtomicBool>,
    source: Arc<Mutex<Option<Arc<PairSource>>>>,
    geometry: Geometry,
}

impl Side {
    /// A site with a blank image and the state of a new volume: the destination of move `number`, or
    /// its source. `way_back`: what is written there is recorded for it.
    pub fn new(
        sim: &Arc<Sim>,
        geometry: Geometry,
        number: u8,
        destination: bool,
        way_back: bool,
    ) -> Self {
        let dir = SimDirectory::new(sim);
        let identity = Identity {
            volume_id: [2 * number + u8::from(destination); 16],
            geometry,
            generation: 0,
            life: if destination {
                Life::Standby
            } else {
                Life::Local
            },
            source_uri: "simulated".into(),
            incarnation: [number; 16],
            image_inode: None,
            ties: Ties {
                fenced_source: destination,
                way_back: way_back && destination,
                ..Ties::default()
            },
        };
        StateDir::create_in(Box::new(dir.clone()), identity, None).expect("nothing is wrong yet");
        Self {
            disk: Disk::new(geometry.size_bytes(), sim),
            memory: SimMemory::new(sim),
            fibers: Vec::new(),
            volume: None,
            stage: Arc::default(),
            has_told: Arc::default(),
            rests: false,
            closing: None,
            ending: Arc::default(),
            source: Arc::default(),
            sim: Arc::clone(sim),
            dir,
            geometry,
        }
    }

    /// The process ends, or with `power` the machine.
    pub fn crash(&mut self, power: bool) {
        crash::strike(
            &self.sim,
            power,
            &mut self.disk,
            &mut self.dir,
            &mut self.memory,
        );
        self.end();
    }

    /// What the process held is given back: its flows of control, and the circles in which a volume, who
    /// waits for it and its source hold each other. Its media are others' by now, or nobody's.
    pub fn end(&mut self) {
        if let Some(source) = self.known_source() {
            source.die();
        }
        self.fibers.clear();
        let volumes = [self.volume.take(), self.closing.take()];
        for volume in volumes.into_iter().flatten() {
            volume.stop();
            volume.run_committer();
        }
        self.sim.forget();
    }

    fn known_source(&self) -> Option<Arc<PairSource>> {
        let mut source = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        source.take()
    }

    /// A process begins.
    pub fn start(&mut self, config: &ExportConfig, wanted: Wanted, log_limit: u64) {
        self.stage = Arc::default();
        self.has_told = Arc::default();
        self.rests = false;
        self.ending = Arc::default();
        self.source = Arc::default();
        let opening = Opening {
            sim: Arc::clone(&self.sim),
            dir: self.dir.clone(),
            memory: self.memory.clone(),
            store: Arc::clone(&self.disk),
            geometry: self.geometry,
            config: config.clone(),
            source: Arc::clone(&self.source),
            has_told: Arc::clone(&self.has_told),
            wanted,
            log_limit,
            began_us: self.sim.now_us(),
        };
        let stage = Arc::clone(&self.stage);
        let open = move || {
            let outcome = opening.open();
            *stage.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
        };
        self.sim.spawn("open", Box::new(open));
    }

    /// The threads of a process whose volume was opened.
    pub fn serve(&mut self, volume: &Arc<Volume>) {
        self.volume = Some(Arc::clone(volume));
        let committing = Arc::clone(volume);
        self.thread("commit", move || committing.run_committer());
        let Some(relocation) = volume.relocation() else {
            return;
        };
        if !volume.is_local() {
            relocation.start();
        }
        let (timed, sim) = (Arc::clone(volume), Arc::clone(&self.sim));
        let ending = Arc::clone(&self.ending);
        let tick = move || {
            let mut beats = Beats::default();
            while !ending.load(Ordering::Acquire) && timed.keep_time(&mut beats) {
                let beat = if timed.is_local() {
                    QUIET_BEAT_US
                } else {
                    u64::try_from(Mover::<()>::TICK.as_micros()).unwrap_or(1)
                };
                fiber::pause(Wait::Until(sim.now_us() + beat));
            }
        };
        self.thread("tick", tick);
        let moved = Arc::clone(volume);
        self.thread("move", move || moved.keep_move());
    }

    /// Begins one that the end in good order waits for.
    fn thread(&self, name: &'static str, body: impl FnOnce() + Send + 'static) {
        let ending = Arc::clone(&self.ending);
        let run = move || {
            body();
            drop(ending);
        };
        self.sim.spawn(name, Box::new(run));
    }

    /// Whether its state says that all of the disk is here.
    pub fn was_whole(&self) -> bool {
        let identity = self.dir.peek("volume");
        let identity = identity.and_then(|content| Identity::decode(&content).ok());
        identity.is_some_and(|identity| identity.life == Life::Local)
    }

    /// Whether nobody but the process itself is at its volume.
    pub fn is_quiet(&self) -> bool {
        let own = |fiber: &Fiber| ["commit", "tick", "move", "keeper"].contains(&fiber.name);
        self.volume.is_some() && self.fibers.iter().all(own)
    }

    /// The daemon is stopped in good order: makes everything durable, and says so.
    pub fn close(&mut self) {
        let Some(volume) = self.volume.take() else {
            return;
        };
        let (memory, stage) = (self.memory.clone(), Arc::clone(&self.stage));
        let ending = Arc::clone(&self.ending);
        self.closing = Some(Arc::clone(&volume));
        ending.store(true, Ordering::Release);
        let close = move || {
            volume.stop();
            // Its own, and this site's.
            while Arc::strong_count(&ending) > 2 {
                fiber::pause(Wait::Others);
            }
            if volume.settle().is_ok() {
                // Only now: while it is there, it is what a restart believes.
                memory.remove();
            }
            *stage.lock().unwrap_or_else(PoisonError::into_inner) = Stage::Closed;
        };
        self.sim.spawn("close", Box::new(close));
    }
}
