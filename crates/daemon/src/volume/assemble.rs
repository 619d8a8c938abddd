//! Putting a volume together from its parts.
//!
//! Opens nothing and starts nothing: [`super::open`] does, with files and threads, and so does
//! whoever brings other parts and runs the duties ([`Volume::run_committer`],
//! [`Volume::keep_time`]) in its own way.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::heat::Heat;
use hikkoshi_engine::mover::{Mover, Phase, Policy};
use hikkoshi_engine::residency::Residency;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::Store;
use hikkoshi_store::state::{Life, StateDir};
use hikkoshi_wan::Source;

use super::arrival::Arrival;
use super::commit::{Committer, Journal};
use super::departure::{Departures, MakeState};
use super::relocation::{Relocation, Traffic};
use super::report::RateMeter;
use super::seeding::Seeding;
use super::source_flush::SourceFlushes;
use super::source_power::SourcePower;
use super::space::DiskTrouble;
use super::storage::ImageAddress;
use super::storage::succession::Succession;
use super::verify::Verification;
use super::wayback::WayBack;
use super::{AtCompletion, Clock, Tally, Volume};
use crate::config::{ExportConfig, HandoffPolicy, Packing, SourceConfig, SourceLoss, Transport};
use crate::events::{EventKind, EventLog};
use crate::heat;
use crate::status::LifeState;

/// What every volume is made of.
pub struct Parts<'a> {
    /// What was asked for.
    pub config: &'a ExportConfig,
    /// The shape of the disk.
    pub geometry: Geometry,
    /// The image.
    pub store: Arc<dyn Store>,
    /// The durable state. A plain image that never had a source has none.
    pub state: Option<StateDir>,
    /// It came from elsewhere, now or once.
    pub had_source: bool,
    /// The time.
    pub clock: Clock,
    /// Where the heat is kept over a restart.
    pub heat_place: Option<PathBuf>,
    /// Makes the durable state of a plain image, when a move away begins.
    pub make_state: Option<MakeState>,
}

/// What a volume has besides while its blocks are still coming.
pub struct Moving<'a> {
    /// Where they come from, as it was asked for.
    pub wanted: &'a SourceConfig,
    /// The same, to be asked.
    pub source: Arc<dyn Source>,
    /// What is here.
    pub residency: Arc<Residency>,
    /// What the source must still read the same, and the seed that draws more.
    pub witnesses: Witnesses,
    /// Called once all is here and that is durable.
    pub at_completion: AtCompletion,
    /// Called before that, or, where the way back is kept, when that ends: gives the memory back.
    pub at_release: AtCompletion,
    /// The source's side of the move, where it is one of ours.
    pub arrival: Option<Arrival>,
}

impl Parts<'_> {
    /// Whether its source keeps a fence.
    pub fn fenced_source(&self) -> bool {
        let identity = self.state.as_ref().map(StateDir::identity);
        identity.is_some_and(|identity| identity.ties.fenced_source)
    }

    /// Where the durable state says that it stands.
    pub fn life(&self) -> Option<Life> {
        self.state.as_ref().map(|state| state.identity().life)
    }

    /// Whether its source has only a part of the disk, and the rest is here.
    pub fn only_here(&self) -> bool {
        let identity = self.state.as_ref().map(StateDir::identity);
        identity.is_some_and(|identity| identity.ties.only_here)
    }

    /// An image that needs nobody.
    pub fn plain(self) -> Arc<Volume> {
        Arc::new(self.volume(LifeState::Local, None))
    }

    /// A volume with a relocation, which stands where the durable state says. Nothing comes before
    /// [`Relocation::start`].
    pub fn moving(self, moving: Moving<'_>) -> Arc<Volume> {
        let (life, phase) = match self.life() {
            Some(Life::Standby) => (LifeState::Standby, Phase::Standby),
            // The way back is kept.
            Some(Life::Local) => (LifeState::Local, Phase::Complete),
            Some(Life::Arriving | Life::GivenUp) | None => (LifeState::Arriving, Phase::Arriving),
        };
        let Moving {
            wanted,
            source,
            residency,
            witnesses,
            at_completion,
            at_release,
            arrival,
        } = moving;
        let policy = Policy {
            background: wanted.background,
            max_rate: wanted.max_rate,
            loss_timeout: match wanted.on_loss {
                SourceLoss::Wait => None,
                SourceLoss::Error(after) => Some(after),
            },
            has_extents: source.info().has_extents,
            exact: self.only_here(),
        };
        let mover = Mover::new(self.geometry, phase, policy);
        if let Some(arrival) = &arrival {
            arrival.share(&mover);
        }
        // Each knows the other.
        Arc::new_cyclic(|weak| {
            let (store, clock) = (Arc::clone(&self.store), Arc::clone(&self.clock));
            let relocation = Relocation::new(weak.clone(), store, residency, source, mover, clock)
                .with_witnesses(witnesses);
            if life == LifeState::Local {
                relocation.retired.store(true, Ordering::Release);
            }
            Volume {
                plain: AtomicBool::new(false),
                relocation: RwLock::new(Some(Arc::new(relocation))),
                at_completion: Mutex::new(Some(at_completion)),
                arrival,
                ..self.volume(life, Some(at_release))
            }
        })
    }

    fn volume(self, life: LifeState, at_release: Option<AtCompletion>) -> Volume {
        let identity = self.state.as_ref().map(StateDir::identity);
        let departed = identity.and_then(|identity| identity.ties.departed);
        let moved_to = identity.and_then(|i| ImageAddress::parse(i.ties.moved_to.as_deref()?));
        let from_image = identity.is_some_and(|i| ImageAddress::parse(&i.source_uri).is_some());
        let released = identity.and_then(|identity| identity.ties.released);
        let owed = identity.is_some_and(|identity| identity.ties.source_flush_owed);
        // Started again by its image alone, it goes on as it began.
        let recorded = match identity.is_some_and(|identity| identity.ties.by_command) {
            true => HandoffPolicy::Command,
            false => HandoffPolicy::FirstWrite,
        };
        let source = self.config.source.as_ref();
        let (way_back, trouble) = WayBack::new(self.state.as_ref(), at_release);
        let volume = Volume {
            name: self.config.name.clone(),
            image: self.config.image.clone(),
            geometry: self.geometry,
            read_only: self.config.read_only,
            frames: self.config.transport == Transport::Auto,
            packs: self.config.compress != Packing::None,
            handoff_policy: source.map_or(recorded, |s| s.handoff),
            on_loss: source.map_or(SourceLoss::Wait, |s| s.on_loss),
            store: self.store,
            life: AtomicU8::new(0),
            poisoned: AtomicBool::new(false),
            disk: DiskTrouble::default(),
            events: EventLog::default(),
            relocation: RwLock::new(None),
            journal: Mutex::new(Journal::new(self.state)),
            committer: Committer::default(),
            source_flushes: SourceFlushes::new(owed),
            source_power: SourcePower::default(),
            witnesses_kept_at: Mutex::default(),
            clock: self.clock,
            background: source.is_none_or(|s| s.background),
            had_source: self.had_source,
            rate: RateMeter::default(),
            at_completion: Mutex::new(None),
            verification: Verification::new(source.is_some_and(|s| s.verify)),
            seeding: Seeding::new(source.is_some_and(|s| s.seed_always)),
            last_traffic: Traffic::default(),
            tally: Tally::default(),
            heat: Heat::new(self.geometry.size_bytes()),
            heat_place: self.heat_place,
            departures: Departures::new(departed, moved_to, released, self.make_state),
            arrival: None,
            plain: AtomicBool::new(true),
            way_back,
            from_image,
            succession: Succession::default(),
        };
        if let Some(trouble) = trouble {
            volume.event(
                EventKind::StateTrouble,
                format!(
                    "what older copies of this disk lack is not known any more, so a way back to them \
                     copies everything: {trouble}"
                ),
            );
        }
        if let Some(place) = &volume.heat_place {
            heat::restore(&volume.heat, place);
        }
        volume.set_life(life);
        volume
    }
}
