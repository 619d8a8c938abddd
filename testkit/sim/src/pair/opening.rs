//! How a process of one of the two sites begins: by what the durable state says, in the order of the
//! product's own opening, of which all that needs no files is called.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hikkoshi_daemon::config::{ExportConfig, SourceConfig};
use hikkoshi_daemon::volume::Volume;
use hikkoshi_daemon::volume::arrival::Arrival;
use hikkoshi_daemon::volume::assemble::{Moving, Parts};
use hikkoshi_daemon::volume::open::OpenError;
use hikkoshi_daemon::volume::ties::{
    Course, Returning, course_of, old_copy, overwritten_of, settle_base, settle_doubt,
    settle_lacking, settle_record, settle_way_back,
};
use hikkoshi_daemon::volume::wayback::NoSource;
use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::Store;
use hikkoshi_store::live::{
    OpenedMap, has_survived_in, open_complete_in, open_map_in, return_map_in,
};
use hikkoshi_store::state::{Identity, Life, StateDir, StateError};
use hikkoshi_wan::transport::session::{Stance, Tell};
use hikkoshi_wan::{MoveLink, SourceErrorKind, Ticket};

use crate::disk::Disk;
use crate::fiber::{self, Wait};
use crate::sim::Sim;
use crate::statedir::{SimDirectory, SimMemory};

use super::link::{End, Net, SimLink};
use super::source::PairSource;

/// How often a move that was given up is told of.
const TELL_AFTER_US: u64 = 200_000;

/// How often a return is begun until its source can be reached.
const BEGIN_AFTER_US: u64 = 200_000;

/// How long whoever opens waits for the source's word.
const LAST_WORD: Duration = Duration::from_secs(5);

/// How far the process is.
#[derive(Default)]
pub enum Stage {
    #[default]
    Opening,
    Opened(Arc<Volume>),
    /// The move was given up: it is not served, and the source is told.
    GivenUp,
    /// A return that was given up has overwritten some of it: it is not served.
    Spoilt,
    /// The disk cannot come back into it: nothing was changed, and it is not served.
    Refused,
    /// It was closed in good order.
    Closed,
    /// It could not be opened.
    Failed(OpenError),
    /// The world has looked.
    Known,
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

/// A process that begins.
pub struct Opening {
    pub sim: Arc<Sim>,
    pub dir: SimDirectory,
    pub memory: SimMemory,
    pub store: Arc<Disk>,
    pub geometry: Geometry,
    pub config: ExportConfig,
    pub source: Arc<Mutex<Option<Arc<PairSource>>>>,
    pub has_told: Arc<AtomicBool>,
    pub wanted: Wanted,
    pub log_limit: u64,
    pub began_us: u64,
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

    fn draw(&self) -> [u8; 16] {
        let draw = self.sim.chance(|rng| [rng.any(), rng.any()]);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&draw[0].to_le_bytes());
        bytes[8..].copy_from_slice(&draw[1].to_le_bytes());
        bytes
    }

    fn seed(&self) -> u64 {
        self.sim.chance(|rng| rng.any())
    }

    /// Opens; whoever cannot begin a return because its source is away begins it again.
    pub fn open(&self) -> Stage {
        loop {
            match self.run() {
                Ok(Some(stage)) => return stage,
                Ok(None) => fiber::pause(Wait::Until(self.sim.now_us() + BEGIN_AFTER_US)),
                Err(error) => return Stage::Failed(error),
            }
        }
    }

    /// As the product opens: by what the durable state says. `None`: the source must be there, and is
    /// not.
    fn run(&self) -> Result<Option<Stage>, OpenError> {
        let mut state = StateDir::open_in(Box::new(self.dir.clone()), None)?;
        state.limit_log(self.log_limit);
        if state.identity().life == Life::GivenUp || state.identity().ties.gave_up {
            state.confirm()?;
        }
        if state.identity().ties.gave_up {
            self.say_that_the_return_was_given_up(&mut state)?;
        }
        let identity = state.identity().clone();
        match identity.life {
            Life::GivenUp => {
                self.say_that_it_was_given_up(&identity);
                Ok(Some(Stage::GivenUp))
            }
            Life::Local if identity.ties.departed.is_some() && self.wanted.source.comes_back => {
                let begun = self.open_return(state);
                // Of this one nothing was to be told so far.
                self.has_told.store(false, Ordering::Release);
                begun
            }
            Life::Local => {
                if !identity.ties.gave_up {
                    // There is nothing, or nothing more, to be told.
                    self.has_told.store(true, Ordering::Release);
                }
                self.open_complete(state).map(Some)
            }
            Life::Standby | Life::Arriving => self.go_on(state).map(Some),
        }
    }

    fn sync(&self) -> impl FnMut() -> std::io::Result<()> {
        let store = Arc::clone(&self.store);
        move || store.sync()
    }

    /// A move that goes on.
    fn go_on(&self, mut state: StateDir) -> Result<Stage, OpenError> {
        let stance = match state.identity().life {
            Life::Standby => Stance::Standby,
            _ => Stance::Arriving,
        };
        self.set_time_back(state.identity());
        let base = settle_base(&mut state, &*self.store)?;
        let ticket = Ticket::new(state.identity().volume_id, base, stance, true);
        let source = self.reach(&ticket);
        let incarnation = self.draw();
        let witnesses = state.witnesses(self.seed())?;
        let survived = has_survived_in(&state, &self.memory)?;
        settle_doubt(&mut state, &*self.store, survived)?;
        let mut map = open_map_in(state, &self.memory, incarnation, &mut self.sync())?;
        settle_lacking(&map.state, &map.residency)?;
        settle_way_back(&mut map, &self.wanted.source)?;
        Ok(self.move_in(map, ticket, source, witnesses))
    }

    /// What a person does whom the product tells that the old copy, which the source still needs, has
    /// another time of modification: here it only can be a power cut that has left an older one.
    fn set_time_back(&self, identity: &Identity) {
        if identity.ties.only_here && identity.life == Life::Standby {
            self.store.set_modified(identity.ties.closed_at);
        }
    }

    fn reach(&self, ticket: &Arc<Ticket>) -> Arc<PairSource> {
        let end = self.end(Arc::clone(ticket));
        let source = PairSource::new(end, self.geometry.size_bytes());
        let mut known = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        *known = Some(Arc::clone(&source));
        source
    }

    fn move_in(
        &self,
        map: OpenedMap<SimMemory>,
        ticket: Arc<Ticket>,
        source: Arc<PairSource>,
        witnesses: Witnesses,
    ) -> Stage {
        let OpenedMap {
            residency,
            state,
            live,
            ..
        } = map;
        let wanted = &self.wanted.source;
        let overwritten = overwritten_of(&state);
        let parts = self.parts(state, true);
        let link = SimLink::new(self.end(Arc::clone(&ticket)));
        let mut arrival =
            Arrival::new(ticket, link, wanted, self.geometry).with_overwritten(overwritten);
        if parts.only_here() {
            arrival = arrival.with_old_copy_needed(parts.life() != Some(Life::Standby));
        }
        Stage::Opened(parts.moving(Moving {
            arrival: Some(arrival),
            wanted,
            source,
            residency,
            witnesses,
            at_completion: Box::new(|| ()),
            at_release: Box::new(move || live.remove()),
        }))
    }

    /// A state of which every block is here.
    fn open_complete(&self, state: StateDir) -> Result<Stage, OpenError> {
        let ties = &state.identity().ties;
        if ties.departed.is_some_and(|d| !d.intact) {
            return Ok(Stage::Spoilt);
        }
        if ties.way_back {
            return self.open_recorded(state);
        }
        self.open_plain(state)
    }

    fn open_plain(&self, mut state: StateDir) -> Result<Stage, OpenError> {
        open_complete_in(&mut state, &self.memory)?;
        let had_source = !state.identity().source_uri.is_empty();
        Ok(Stage::Opened(self.parts(state, had_source).plain()))
    }

    /// One whose changes are recorded for the way back.
    fn open_recorded(&self, mut state: StateDir) -> Result<Stage, OpenError> {
        let survived = has_survived_in(&state, &self.memory)?;
        if settle_doubt(&mut state, &*self.store, survived)?.is_some() {
            return self.open_plain(state);
        }
        let mut map = open_map_in(state, &self.memory, self.draw(), &mut self.sync())?;
        if settle_record(&mut map)?.is_some() {
            map.live.remove();
            let mut state = map.state;
            state.end_way_back()?;
            return self.open_plain(state);
        }
        let OpenedMap {
            residency,
            state,
            live,
            ..
        } = map;
        let size_bytes = self.geometry.size_bytes();
        Ok(Stage::Opened(self.parts(state, true).moving(Moving {
            arrival: None,
            wanted: &self.wanted.source,
            source: Arc::new(NoSource { size_bytes }),
            residency,
            witnesses: Witnesses::new(self.seed()),
            at_completion: Box::new(|| ()),
            at_release: Box::new(move || live.remove()),
        })))
    }

    /// An old copy whose disk comes back.
    fn open_return(&self, mut state: StateDir) -> Result<Option<Stage>, OpenError> {
        let wanted = &self.wanted.source;
        let identity = state.identity().clone();
        let Some(departure) = identity.ties.departed else {
            return Ok(Some(Stage::Refused));
        };
        let base = old_copy(&state, &*self.store, departure, true)?;
        if base.is_err() && !wanted.overwrite {
            return Ok(Some(Stage::Refused));
        }
        if identity.ties.gave_up && !self.say_that_the_return_was_given_up(&mut state)? {
            return Ok(None);
        }
        let volume_id = self.draw();
        let Some(mut ticket) = self.dial(volume_id, Some(departure.to)) else {
            return Ok(None);
        };
        let told = ticket.attached().unwrap_or_default();
        let course = course_of(&told, &base, self.geometry);
        self.sim
            .note("comes back", u64::from(course == Course::Rest), 0);
        let only_here = course == Course::Rest;
        let base = match course {
            Course::Not(_) => {
                let link = SimLink::new(self.end(ticket));
                // Whether it is heard or not, it is not begun.
                let _ = link.tell(&Tell::Abort { id: volume_id }, LAST_WORD);
                return Ok(Some(Stage::Refused));
            }
            Course::Rest | Course::Difference => base.ok().map(|set| (departure.to, set)),
            Course::Unknown if !wanted.overwrite => return Ok(Some(Stage::Refused)),
            Course::Unknown | Course::Everything => {
                let Some(anew) = self.dial(volume_id, None) else {
                    return Ok(None);
                };
                ticket = anew;
                None
            }
        };
        let returning = Returning {
            wanted,
            volume_id,
            incarnation: self.draw(),
            image_inode: None,
            fenced_source: ticket.settle(),
            can_flush: true,
        };
        let base_id = base.as_ref().map(|(id, _)| *id);
        let returning = returning.identity(identity, departure, base_id, only_here);
        if let Some((id, overwritten)) = &base {
            state.keep_overwritten(*id, overwritten)?;
        }
        let mut map = return_map_in(state, &self.memory, returning)?;
        map.state.limit_log(self.log_limit);
        let source = self.reach(&ticket);
        let witnesses = Witnesses::new(self.seed());
        Ok(Some(self.move_in(map, ticket, source, witnesses)))
    }

    /// Connects to the source for the first time, with this old copy.
    fn dial(&self, volume_id: [u8; 16], base: Option<[u8; 16]>) -> Option<Arc<Ticket>> {
        let ticket = Ticket::new(volume_id, base, Stance::Standby, false);
        let dialled = self.end(Arc::clone(&ticket)).dial(&|| false);
        dialled.is_ok().then_some(ticket)
    }

    /// Tells the source once, if it can be reached; else the next start does. Whether it was told.
    fn say_that_the_return_was_given_up(&self, state: &mut StateDir) -> Result<bool, StateError> {
        let id = state.identity().volume_id;
        let ticket = Ticket::new(id, None, Stance::Standby, true);
        let link = SimLink::new(self.end(ticket));
        match link.tell(&Tell::Abort { id }, LAST_WORD) {
            Ok(_) => state.change(|identity| identity.ties.gave_up = false)?,
            // It has moved on by another move: nothing is fenced there for this one.
            Err(error) if error.kind == SourceErrorKind::Untrusted => {}
            Err(_) => return Ok(false),
        }
        self.has_told.store(true, Ordering::Release);
        Ok(true)
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
