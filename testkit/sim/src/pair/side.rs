//! One of the two sites: its media, the process that serves the disk there, and its flows of control.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hikkoshi_daemon::config::{ExportConfig, SourceConfig};
use hikkoshi_daemon::volume::Volume;
use hikkoshi_daemon::volume::arrival::Arrival;
use hikkoshi_daemon::volume::assemble::{Moving, Parts};
use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::mover::Mover;
use hikkoshi_store::Store;
use hikkoshi_store::live::{OpenedMap, open_complete_in, open_map_in};
use hikkoshi_store::state::{Identity, Life, StateDir, StateError, Ties};
use hikkoshi_wan::transport::session::{Stance, Tell};
use hikkoshi_wan::{MoveLink, SourceErrorKind, Ticket};

use crate::crash;
use crate::disk::Disk;
use crate::fiber::{self, Fiber, Wait};
use crate::sim::Sim;
use crate::statedir::{SimDirectory, SimMemory};

use super::link::{End, Net, SimLink};
use super::source::PairSource;

/// How often a move that was given up is told of.
const TELL_AFTER_US: u64 = 200_000;

/// How far the process is.
#[derive(Default)]
pub enum Stage {
    #[default]
    Opening,
    Opened(Arc<Volume>),
    /// The move was given up: it is not served, and the source is told.
    GivenUp,
    /// It could not be opened.
    Failed(StateError),
    /// The world has looked.
    Known,
}

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
    source: Arc<Mutex<Option<Arc<PairSource>>>>,
    geometry: Geometry,
}

/// What a process of the destination knows of its source.
#[derive(Clone)]
pub struct Wanted {
    pub source: SourceConfig,
    pub net: Arc<Net>,
    /// The source's site.
    pub to: usize,
    pub there: Arc<Sim>,
}

impl Side {
    /// A site with a blank image and the state of a new volume: the destination of move `number`, or
    /// its source.
    pub fn new(sim: &Arc<Sim>, geometry: Geometry, number: u8, destination: bool) -> Self {
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
        if let Some(volume) = self.volume.take() {
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
            let outcome = opening.run().unwrap_or_else(Stage::Failed);
            *stage.lock().unwrap_or_else(PoisonError::into_inner) = outcome;
        };
        self.sim.spawn("open", Box::new(open));
    }

    /// The threads of a process whose volume was opened.
    pub fn serve(&mut self, volume: &Arc<Volume>) {
        self.volume = Some(Arc::clone(volume));
        let committing = Arc::clone(volume);
        self.sim
            .spawn("commit", Box::new(move || committing.run_committer()));
        let Some(relocation) = volume.relocation() else {
            return;
        };
        relocation.start();
        let (timed, sim) = (Arc::clone(volume), Arc::clone(&self.sim));
        let tick = move || {
            let tick = u64::try_from(Mover::<()>::TICK.as_micros()).unwrap_or(1);
            let mut committed = Duration::ZERO;
            while timed.keep_time(&mut committed) {
                fiber::pause(Wait::Until(sim.now_us() + tick));
            }
        };
        self.sim.spawn("tick", Box::new(tick));
        let moved = Arc::clone(volume);
        self.sim.spawn("move", Box::new(move || moved.keep_move()));
    }
}

struct Opening {
    sim: Arc<Sim>,
    dir: SimDirectory,
    memory: SimMemory,
    store: Arc<Disk>,
    geometry: Geometry,
    config: ExportConfig,
    source: Arc<Mutex<Option<Arc<PairSource>>>>,
    has_told: Arc<AtomicBool>,
    wanted: Wanted,
    log_limit: u64,
    began_us: u64,
}

impl Opening {
    fn parts(&self, state: StateDir, had_source: bool) -> Parts<'_> {
        Parts {
            config: &self.config,
            geometry: self.geometry,
            store: Arc::clone(&self.store) as Arc<dyn Store>,
            state: Some(state),
            had_source,
            clock: self.clock(),
            heat_place: None,
            make_state: None,
        }
    }

    /// The time of a process begins with it.
    fn clock(&self) -> Arc<dyn Fn() -> Duration + Send + Sync> {
        let (sim, began) = (Arc::clone(&self.sim), self.began_us);
        Arc::new(move || Duration::from_micros(sim.now_us() - began))
    }

    fn end(&self, ticket: Arc<Ticket>) -> End {
        End {
            net: Arc::clone(&self.wanted.net),
            to: self.wanted.to,
            here: Arc::clone(&self.sim),
            there: Arc::clone(&self.wanted.there),
            ticket,
        }
    }

    /// As the product opens: by what the durable state says.
    fn run(&self) -> Result<Stage, StateError> {
        let mut state = StateDir::open_in(Box::new(self.dir.clone()), None)?;
        state.limit_log(self.log_limit);
        let identity = state.identity().clone();
        let stance = match identity.life {
            Life::GivenUp => {
                state.confirm()?;
                self.say_that_it_was_given_up(&identity);
                return Ok(Stage::GivenUp);
            }
            Life::Local => {
                open_complete_in(&mut state, &self.memory)?;
                let had_source = !identity.source_uri.is_empty();
                return Ok(Stage::Opened(self.parts(state, had_source).plain()));
            }
            Life::Standby => Stance::Standby,
            Life::Arriving => Stance::Arriving,
        };
        let ticket = Ticket::new(identity.volume_id, None, stance, true);
        let end = self.end(Arc::clone(&ticket));
        let source = PairSource::new(end.clone(), self.geometry.size_bytes());
        *self.source.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&source));
        let draw = self.sim.chance(|rng| [rng.any(), rng.any()]);
        let mut incarnation = [0; 16];
        incarnation[..8].copy_from_slice(&draw[0].to_le_bytes());
        incarnation[8..].copy_from_slice(&draw[1].to_le_bytes());
        let witnesses = state.witnesses(draw[0])?;
        let mut sync = || self.store.sync();
        let OpenedMap {
            residency,
            state,
            live,
            ..
        } = open_map_in(state, &self.memory, incarnation, &mut sync)?;
        let wanted = &self.wanted.source;
        let arrival = Arrival::new(ticket, SimLink::new(end), wanted, self.geometry);
        let moving = Moving {
            arrival: Some(arrival),
            wanted,
            source,
            residency,
            witnesses,
            at_completion: Box::new(|| ()),
            at_release: Box::new(move || live.remove()),
        };
        Ok(Stage::Opened(self.parts(state, true).moving(moving)))
    }

    /// What a start does that refuses to serve, again and again until it has been heard.
    fn say_that_it_was_given_up(&self, identity: &Identity) {
        let id = identity.volume_id;
        let ticket = Ticket::new(id, None, Stance::Standby, true);
        let (link, sim) = (SimLink::new(self.end(ticket)), Arc::clone(&self.sim));
        let has_told = Arc::clone(&self.has_told);
        let say = move || {
            while let Err(error) = link.tell(&Tell::Abort { id }, Duration::from_secs(5)) {
                // It has moved on by another move, or has it in writing.
                if error.kind == SourceErrorKind::Untrusted {
                    break;
                }
                fiber::pause(Wait::Until(sim.now_us() + TELL_AFTER_US));
            }
            has_told.store(true, Ordering::Release);
        };
        self.sim.spawn("says", Box::new(say));
    }
}
