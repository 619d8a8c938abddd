//! A volume: a disk that is served, wherever its blocks are.
//!
//! `Volume = geometry + store + maybe a relocation`. A plain image has no relocation; a
//! destination has one until every block is here, and is a plain image from then on. Front ends
//! call it from their own threads: what needs no waiting is answered in the call, the rest through
//! a callback that is called exactly once.
//!
//! The durability order is that of [`commit`]; the races between fetched blocks and guests' writes
//! are settled in [`relocation`] and [`guest`].

pub mod arrival;
pub mod assemble;
pub mod commit;
pub mod departure;
mod early;
#[cfg(test)]
mod early_tests;
mod extents;
#[cfg(test)]
mod full_tests;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gate;
pub mod guest;
mod knocks;
mod last_word;
#[cfg(test)]
mod late_tests;
pub mod open;
mod open_tied;
#[cfg(test)]
mod prepared_tests;
pub mod proof;
#[cfg(test)]
mod proof_tests;
pub mod relocation;
mod report;
#[cfg(test)]
mod return_tests;
pub mod seeding;
mod source_flush;
#[cfg(test)]
mod source_flush_tests;
mod source_power;
mod space;
pub mod storage;
#[cfg(test)]
mod tests;
pub mod ties;
pub mod verify;
pub mod wayback;
#[cfg(test)]
mod wayback_tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::heat::Heat;
use hikkoshi_store::Store;

use crate::config::{HandoffPolicy, Packing, SourceLoss};
use crate::events::{EventKind, EventLog};
use crate::heat;
use crate::status::LifeState;
use arrival::Arrival;
use commit::{Committer, Journal};
use departure::Departures;
use relocation::{Relocation, Traffic};
use report::RateMeter;
use seeding::Seeding;
use source_flush::SourceFlushes;
use source_power::SourcePower;
use space::DiskTrouble;
use storage::succession::Succession;
use verify::Verification;
use wayback::WayBack;

/// Tells how long the volume has been open. A seam, so that tests own the time.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The clock of the machine.
pub fn system_clock() -> Clock {
    let start = Instant::now();
    Arc::new(move || start.elapsed())
}

/// Called once, when a volume is complete and that is durable.
pub type AtCompletion = Box<dyn FnOnce() + Send>;

/// Counters that grow from the start of the daemon.
#[derive(Debug, Default)]
pub struct Tally {
    /// Reads answered from the image alone.
    pub reads_local: AtomicU64,
    /// Reads that waited for the source.
    pub reads_remote: AtomicU64,
    /// Writes.
    pub writes: AtomicU64,
    /// Flushes and writes with FUA.
    pub flushes: AtomicU64,
    /// Trims and zeroings.
    pub zeroes: AtomicU64,
    /// Clients connected now.
    pub clients: AtomicU64,
    /// Requests to the image that its medium failed.
    pub disk_errors: AtomicU64,
    /// Times that the source was lost.
    pub source_losses: AtomicU64,
    /// Times that the source was refused as another disk.
    pub source_refusals: AtomicU64,
    /// Reads that failed because the source was away, by policy.
    pub reads_failed: AtomicU64,
}

impl Tally {
    /// Goes on from what another has counted, but for those who are connected.
    pub(crate) fn take_over(&self, other: &Self) {
        for (to, from) in [
            (&self.reads_local, &other.reads_local),
            (&self.reads_remote, &other.reads_remote),
            (&self.writes, &other.writes),
            (&self.flushes, &other.flushes),
            (&self.zeroes, &other.zeroes),
            (&self.disk_errors, &other.disk_errors),
            (&self.source_losses, &other.source_losses),
            (&self.source_refusals, &other.source_refusals),
            (&self.reads_failed, &other.reads_failed),
        ] {
            to.fetch_add(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

/// A disk that is served.
pub struct Volume {
    name: String,
    image: PathBuf,
    geometry: Geometry,
    read_only: bool,
    /// Frames may be spoken with destinations that know them.
    frames: bool,
    /// What destinations are sent may be compressed.
    packs: bool,
    handoff_policy: HandoffPolicy,
    on_loss: SourceLoss,
    store: Arc<dyn Store>,
    life: AtomicU8,
    /// Set by a failed sync: from then on nothing is known of what is durable.
    poisoned: AtomicBool,
    /// What is known of the local disk's troubles.
    disk: DiskTrouble,
    events: EventLog,
    relocation: RwLock<Option<Arc<Relocation>>>,
    journal: Mutex<Journal>,
    committer: Committer,
    /// Flushes that wait for the source.
    source_flushes: SourceFlushes,
    /// Whether those who flush may have lost something at the source.
    source_power: SourcePower,
    /// When the witnesses of the source's disk were written last.
    witnesses_kept_at: Mutex<Option<Duration>>,
    clock: Clock,
    /// Whether the background copy was asked for.
    background: bool,
    /// It came from elsewhere, now or once.
    had_source: bool,
    rate: RateMeter,
    /// What is left to do once the volume is complete: the image loses its mark.
    at_completion: Mutex<Option<AtCompletion>>,
    /// Comparing with the source.
    verification: Verification,
    /// Images that may hold blocks of it.
    seeding: Seeding,
    /// What the relocation had counted when it ended.
    last_traffic: Traffic,
    /// What is counted; front ends add to it.
    pub tally: Tally,
    /// How much is read and written where; front ends count into it.
    heat: Heat,
    /// Where that is kept over a restart.
    heat_place: Option<PathBuf>,
    /// Those who move the disk away.
    departures: Departures,
    /// Where the disk moves from, if that keeps a fence.
    arrival: Option<Arrival>,
    /// Whether front ends may write past the relocation: there is none.
    plain: AtomicBool,
    /// In what older copies of this disk differ.
    way_back: WayBack,
    /// It moves here, or moved, from another image of this machine.
    from_image: bool,
    /// Who takes its place when the disk changes its storage.
    succession: Succession,
}

const LIFE_LOCAL: u8 = 0;
const LIFE_STANDBY: u8 = 1;
const LIFE_ARRIVING: u8 = 2;

// Every structure behind these locks is kept whole between statements that can panic.
pub(crate) use hikkoshi_engine::sync::lock;

impl Volume {
    /// The export's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape of the disk.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether writes are refused as such.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether destinations may have it in frames.
    pub fn speaks_frames(&self) -> bool {
        self.frames
    }

    /// How a destination that asks for `packing` is served.
    pub fn packing_towards(&self, packing: Packing) -> Packing {
        if self.packs { packing } else { Packing::None }
    }

    /// Where it stands in its life.
    pub fn life(&self) -> LifeState {
        match self.life.load(Ordering::Acquire) {
            LIFE_STANDBY => LifeState::Standby,
            LIFE_ARRIVING => LifeState::Arriving,
            _ => LifeState::Local,
        }
    }

    /// Whether the disk needs nobody else.
    pub fn is_local(&self) -> bool {
        self.life.load(Ordering::Acquire) == LIFE_LOCAL
    }

    fn set_life(&self, life: LifeState) {
        let value = match life {
            LifeState::Local => LIFE_LOCAL,
            LifeState::Standby => LIFE_STANDBY,
            LifeState::Arriving => LIFE_ARRIVING,
            LifeState::Departing
            | LifeState::Departed
            | LifeState::GivenUp
            | LifeState::Opening => {
                unreachable!("these are looked up where they are known")
            }
        };
        self.life.store(value, Ordering::Release);
    }

    /// Whether it is nothing but an image: nothing is recorded of what is written.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.plain.load(Ordering::Acquire)
    }

    /// The relocation, while something is still to come.
    fn unfinished(&self) -> Option<Arc<Relocation>> {
        self.relocation().filter(|_| !self.is_local())
    }

    /// There is no map any more.
    fn let_go_of_map(&self) -> Option<Arc<Relocation>> {
        let old = self
            .relocation
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        self.plain.store(true, Ordering::Release);
        old
    }

    /// The relocation, while there is one: also after completion, where what is written is recorded
    /// for the way back. Front ends keep it and let go of it when [`Volume::is_plain`] says so.
    pub fn relocation(&self) -> Option<Arc<Relocation>> {
        self.relocation
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// How much is read and written where. Counting costs next to nothing and never waits.
    #[inline]
    pub fn heat(&self) -> &Heat {
        &self.heat
    }

    /// Writes down what was counted of reads and writes.
    pub(crate) fn save_heat(&self) -> io::Result<()> {
        match &self.heat_place {
            Some(place) => heat::save(&self.heat, place),
            None => Ok(()),
        }
    }

    /// The local image.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The image.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Whether what is written is recorded for a way back.
    pub(crate) fn keeps_way_back(&self) -> bool {
        self.way_back.is_kept()
    }

    /// Lets go of the image and its state, although somebody may still hold the volume. Nobody may use
    /// it any more.
    pub(crate) fn let_go(&self) {
        lock(&self.journal).state.take();
        if let Err(error) = self.store.let_go() {
            tracing::warn!(
                "the old image {} is still open until the daemon ends: {error}",
                self.image.display()
            );
        }
    }

    /// What happened to it is kept with what happened to `other` from now on.
    pub(crate) fn share_events(&self, other: &Self) {
        self.keep_events_in(&other.events);
    }

    /// What happened to it is kept there from now on, behind what is there already.
    pub(crate) fn keep_events_in(&self, log: &EventLog) {
        self.events.join(log);
    }

    /// Tells everybody what happened.
    pub fn event(&self, kind: EventKind, text: impl Into<String>) {
        self.events.add(&self.name, kind, text);
    }

    pub(crate) fn now(&self) -> Duration {
        (self.clock)()
    }

    /// Whether a sync has failed, so that nothing can be made durable before a restart.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// The error of everything that would have to be durable after a sync has failed.
    fn check_poison(&self) -> io::Result<()> {
        if self.is_poisoned() {
            return Err(io::Error::other(
                "an earlier sync failed, so nothing is known of what is durable; check the medium \
                 and restart the daemon",
            ));
        }
        Ok(())
    }

    fn poison(&self, what: &str, error: &dyn std::error::Error) {
        if !self.poisoned.swap(true, Ordering::AcqRel) {
            self.event(
                EventKind::Poisoned,
                format!(
                    "{what} failed: {error}; writes and flushes are refused from now on; check the \
                     medium and restart the daemon: what was flushed before is kept"
                ),
            );
        }
    }
}
