//! A process of the daemon, from opening to its end.
//!
//! Opens as the product does, from the same parts in the same order, with the media of the world;
//! and holds what a restart finds against what was promised.

use std::sync::{Arc, Mutex, PoisonError};

use hikkoshi_daemon::status::LifeState;
use hikkoshi_daemon::volume::Volume;
use hikkoshi_daemon::volume::assemble::{Moving, Parts};
use hikkoshi_daemon::volume::commit::Beats;
use hikkoshi_daemon::volume::relocation::Relocation;
use hikkoshi_engine::geometry::{BlockIndex, BlockRange};
use hikkoshi_engine::mover::Mover;
use hikkoshi_store::Store;
use hikkoshi_store::live::{OpenedMap, open_complete_in, open_map_in};
use hikkoshi_store::state::{Identity, Life, StateDir, StateError, Ties};
use hikkoshi_store::suspect;
use hikkoshi_wan::{Source, SourceInfo};

use crate::disk::Disk;
use crate::fiber::{self, Wait};
use crate::oracle::Time;
use crate::plan::{Plan, SECTOR};
use crate::server::Server;
use crate::sim::Sim;
use crate::source::SimSource;
use crate::statedir::{SimDirectory, SimMemory};
use crate::world::World;

/// How far the opening, or the closing, is.
#[derive(Default)]
pub enum Stage {
    /// Under way.
    #[default]
    Opening,
    /// There is a volume, of which nothing was asked yet.
    Opened(Arc<Volume>),
    /// The world has looked at it.
    Checked,
    /// It serves.
    Serving,
    /// It could not be opened.
    Failed(StateError),
    /// The source is another disk now.
    Refused,
    /// It is being stopped.
    Closing,
    /// All of its threads have ended.
    Stopped,
    /// It ended in good order; `false` if it could not make everything durable.
    Closed(bool),
}

/// Shared with the fibers.
pub type SharedStage = Arc<Mutex<Stage>>;

/// A process.
pub struct Process {
    pub stage: SharedStage,
    pub volume: Option<Arc<Volume>>,
    pub source: Option<Arc<SimSource>>,
    /// What each client holds of the relocation.
    pub clients: Vec<Option<Arc<Relocation>>>,
    /// Since when no flush may succeed.
    pub sync_failed_at: Option<Time>,
    /// When its closing began.
    pub close_began: Time,
}

pub fn set(stage: &SharedStage, to: Stage) {
    *stage.lock().unwrap_or_else(PoisonError::into_inner) = to;
}

pub fn is(stage: &SharedStage, what: impl FnOnce(&Stage) -> bool) -> bool {
    what(&stage.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Opening {
    plan: Plan,
    sim: Arc<Sim>,
    server: Arc<Server>,
    dir: SimDirectory,
    memory: SimMemory,
    store: Arc<Disk>,
    stage: SharedStage,
    source: Arc<Mutex<Option<Arc<SimSource>>>>,
}

impl Opening {
    /// On a fiber: opens, waits until the world has looked, and serves.
    fn run(self) {
        let stage = Arc::clone(&self.stage);
        match self.open() {
            Err(e) => set(&stage, Stage::Failed(e)),
            Ok(None) => set(&stage, Stage::Refused),
            Ok(Some(volume)) => {
                set(&stage, Stage::Opened(Arc::clone(&volume)));
                while !is(&stage, |s| matches!(s, Stage::Checked)) {
                    fiber::pause(Wait::Others);
                }
                if let Some(relocation) = volume.relocation() {
                    relocation.start();
                }
                set(&stage, Stage::Serving);
            }
        }
    }

    fn open(&self) -> Result<Option<Arc<Volume>>, StateError> {
        let mut state = StateDir::open_in(Box::new(self.dir.clone()), None)?;
        state.limit_log(self.plan.log_limit);
        let (config, geometry) = (&self.plan.config, self.plan.geometry);
        let parts = |state| Parts {
            config,
            geometry,
            store: Arc::clone(&self.store) as Arc<dyn Store>,
            state: Some(state),
            had_source: true,
            clock: self.sim.clock(),
            heat_place: None,
            make_state: None,
        };
        if state.identity().life == Life::Local {
            self.settle_disk()?;
            open_complete_in(&mut state, &self.memory)?;
            return Ok(Some(parts(state).plain()));
        }
        let source = SimSource::new(&self.server, self.expected(), &self.sim);
        *self.source.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&source));
        if self.server.is_up() && !source.dial() {
            return Ok(None);
        }
        let incarnation = self.sim.chance(|rng| [rng.any(), rng.any()]);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&incarnation[0].to_le_bytes());
        bytes[8..].copy_from_slice(&incarnation[1].to_le_bytes());
        self.settle_disk()?;
        let mut sync = || self.store.sync();
        let OpenedMap {
            residency,
            state,
            live,
            ..
        } = open_map_in(state, &self.memory, bytes, &mut sync)?;
        let wanted = config.source.as_ref().expect("every plan has one");
        let witnesses = state.witnesses(incarnation[0])?;
        Ok(Some(parts(state).moving(Moving {
            arrival: None,
            wanted,
            source,
            residency,
            witnesses,
            at_completion: Box::new(|| ()),
            at_release: Box::new(move || live.remove()),
        })))
    }

    /// Before anything is read of it: what syncs that failed have left.
    fn settle_disk(&self) -> Result<(), StateError> {
        suspect::settle(&*self.store, self.store.mark(), &mut |_| ())
            .map(drop)
            .map_err(|error| StateError::Io {
                what: "rewriting",
                path: "simulated".into(),
                source: std::io::Error::other(error),
            })
    }

    /// What is taken of a source that can't be reached now.
    fn expected(&self) -> SourceInfo {
        SourceInfo {
            size_bytes: self.plan.geometry.size_bytes(),
            read_only: false,
            can_multi_conn: false,
            has_extents: true,
            can_flush: true,
            min_block_bytes: 1,
            max_read_bytes: 32 << 20,
            uri: "simulated".into(),
        }
    }
}

impl World {
    /// The state of a new move.
    pub fn create(&mut self) {
        use hikkoshi_daemon::config::HandoffPolicy;
        let source = self.plan.config.source.as_ref();
        let now = source.is_some_and(|s| s.handoff == HandoffPolicy::Now);
        let identity = Identity {
            volume_id: [1; 16],
            geometry: self.plan.geometry,
            generation: 0,
            life: if now { Life::Arriving } else { Life::Standby },
            source_uri: "simulated".into(),
            incarnation: [2; 16],
            image_inode: None,
            ties: Ties {
                source_flush_owed: now && self.plan.can_flush,
                ..Ties::default()
            },
        };
        if now {
            (self.touched, self.handed_off) = (true, true);
        }
        StateDir::create_in(Box::new(self.dir.clone()), identity, None)
            .expect("nothing is wrong yet");
    }

    /// A process begins to open the volume.
    pub fn start(&mut self) {
        let stage = SharedStage::default();
        let source = Arc::default();
        let opening = Opening {
            plan: self.plan.clone(),
            sim: Arc::clone(&self.sim),
            server: Arc::clone(&self.server),
            dir: self.dir.clone(),
            memory: self.memory.clone(),
            store: Arc::clone(&self.disk),
            stage: Arc::clone(&stage),
            source: Arc::clone(&source),
        };
        self.process = Some(Process {
            stage,
            volume: None,
            source: None,
            clients: vec![None; self.plan.clients],
            sync_failed_at: None,
            close_began: 0,
        });
        self.opening_source = source;
        self.sim.spawn("open", Box::new(move || opening.run()));
    }

    /// Looks at how far opening and closing are.
    pub fn look_at_process(&mut self) -> Result<(), String> {
        self.look_at_life();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        let stage = {
            let mut guard = process.stage.lock().unwrap_or_else(PoisonError::into_inner);
            match &*guard {
                Stage::Opened(_) => std::mem::replace(&mut *guard, Stage::Checked),
                Stage::Failed(_) | Stage::Refused | Stage::Closed(_) => std::mem::take(&mut *guard),
                _ => return Ok(()),
            }
        };
        match stage {
            Stage::Opened(volume) => self.check_opened(&volume),
            Stage::Failed(why) => self.failed_to_open(&why),
            Stage::Refused if self.finishing => {
                Err("the right source was refused as another disk".into())
            }
            Stage::Refused => {
                self.tally.failed_opens += 1;
                // Somebody reads the message.
                let resized = self.sim.below(2) == 0;
                self.server.set_resized(resized);
                self.crash(false);
                Ok(())
            }
            Stage::Closed(well) => {
                if well {
                    let began = process.close_began;
                    self.oracle.flushed(began);
                }
                self.tally.closes += 1;
                self.sim.note("closed", u64::from(well), 0);
                let power = self.sim.below(3) == 0;
                self.crash(power);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn failed_to_open(&mut self, why: &StateError) -> Result<(), String> {
        self.sim.note("open failed", 0, 0);
        if self.finishing || !matches!(why, StateError::Io { .. } | StateError::Poisoned) {
            return Err(format!("its own state was refused: {why}"));
        }
        self.tally.failed_opens += 1;
        self.crash(false);
        Ok(())
    }

    /// What was found is what was promised; the threads of the process begin.
    fn check_opened(&mut self, volume: &Arc<Volume>) -> Result<(), String> {
        let life = volume.life();
        if self.handed_off && life == LifeState::Standby {
            return Err("a handoff that was answered is forgotten".into());
        }
        if self.complete && life != LifeState::Local {
            return Err("a move that was complete is not complete any more".into());
        }
        let seen = self.peek(volume);
        let now = self.tick();
        self.oracle.found(&seen, self.unsettled, now)?;
        self.unsettled = false;
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        process.volume = Some(Arc::clone(volume));
        process.source = self
            .opening_source
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        process.clients.fill(volume.relocation());
        let committing = Arc::clone(volume);
        self.sim
            .spawn("commit", Box::new(move || committing.run_committer()));
        if volume.relocation().is_some() {
            let (timed, sim) = (Arc::clone(volume), Arc::clone(&self.sim));
            let stage = Arc::clone(&process.stage);
            self.sim.spawn(
                "tick",
                Box::new(move || {
                    let tick = u64::try_from(Mover::<()>::TICK.as_micros()).unwrap_or(1);
                    let mut beats = Beats::default();
                    while !is(&stage, |s| matches!(s, Stage::Closing))
                        && timed.keep_time(&mut beats)
                    {
                        fiber::pause(Wait::Until(sim.now_us() + tick));
                    }
                }),
            );
        }
        Ok(())
    }

    /// What a guest would read of everything, without asking the volume: the image where blocks
    /// are here, the source where they are not.
    pub fn peek(&self, volume: &Volume) -> Vec<u8> {
        let mut seen = self.disk.inner().content();
        let Some(relocation) = volume.relocation() else {
            return seen;
        };
        let original = self.server.disk();
        let geometry = self.plan.geometry;
        let standby = volume.life() == LifeState::Standby;
        for block in 0..geometry.blocks() {
            let index = BlockIndex(block);
            if !standby && relocation.residency.state(index).is_resident() {
                continue;
            }
            let mask = relocation
                .residency
                .partial_mask(index)
                .filter(|_| !standby);
            let bytes = geometry.bytes(BlockRange::one(index));
            let start = usize::try_from(bytes.start).unwrap_or(0);
            for sector in 0..geometry.sectors_in(index) {
                if !mask.as_ref().is_some_and(|m| m.has(sector)) {
                    let at = start + usize::try_from(sector).unwrap_or(0) * SECTOR;
                    seen[at..at + SECTOR].copy_from_slice(&original[at..at + SECTOR]);
                }
            }
        }
        seen
    }

    fn look_at_life(&mut self) {
        let volume = self.process.as_ref().and_then(|p| p.volume.as_ref());
        if let Some(volume) = volume
            && volume.is_local()
            && !self.complete
        {
            self.sim.note("complete", 0, 0);
            self.complete = true;
            // The old site can be switched off, and its disk used for something else.
            self.server.set_up(false);
        }
    }

    /// Begins to stop the daemon in good order. Its clients are gone.
    pub fn close(&mut self) {
        let now = self.tick();
        let Some(process) = &mut self.process else {
            return;
        };
        let Some(volume) = process.volume.clone() else {
            return;
        };
        self.sim.note("close", 0, 0);
        process.close_began = now;
        process.clients.fill(None);
        set(&process.stage, Stage::Closing);
        let (stage, memory) = (Arc::clone(&process.stage), self.memory.clone());
        self.sim.spawn(
            "close",
            Box::new(move || {
                volume.stop();
                while !is(&stage, |s| matches!(s, Stage::Stopped)) {
                    fiber::pause(Wait::Others);
                }
                let well = volume.settle().is_ok();
                if well {
                    memory.remove();
                }
                set(&stage, Stage::Closed(well));
            }),
        );
    }

    /// Whether the volume serves clients now.
    pub fn serves(&self) -> bool {
        let serving = |s: &Stage| matches!(s, Stage::Serving);
        self.process.as_ref().is_some_and(|p| is(&p.stage, serving))
    }

    /// Whether the volume is to be opened by somebody else: it does nothing that is durable now.
    pub fn is_ill(&self) -> bool {
        self.process
            .as_ref()
            .and_then(|p| p.volume.as_ref())
            .is_some_and(|v| v.is_poisoned())
    }

    /// The source of the process, if it has one.
    pub fn source(&self) -> Option<Arc<SimSource>> {
        let process = self.process.as_ref()?;
        process
            .source
            .clone()
            .or_else(|| {
                self.opening_source
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone()
            })
            .filter(|source| source.connections() > 0 || !self.complete)
    }
}
