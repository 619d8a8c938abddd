//! The way back: which blocks differ from older copies of this disk.
//!
//! Each move has an id, that of the volume the disk moved to. What has changed here since the handoff
//! to this volume is what the residency has as owned or partial: during the move in any case, and
//! after completion, where that was asked for, because then residency, journal and the marks of the
//! write path go on. Copies that are older still were handed on by the source ([`Volume::inherit`]):
//! what differed from them then, and what has changed since.
//!
//! A difference must never be too small. Whatever casts doubt on it ends it durably, and a way back
//! copies everything: a power cut (data that nobody flushed may be on the medium without its record),
//! an image that was written by something else, a damaged file. See `docs/design/010-way-back.md`.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use hikkoshi_engine::blocks::BlockSet;
use hikkoshi_engine::geometry::BlockRange;
use hikkoshi_engine::journal::{Bases, MAX_BASES, VolumeId};
use hikkoshi_engine::residency::{BlockState, Residency};
use hikkoshi_store::state::{Life, StateDir};
use hikkoshi_wan::{
    Completion, ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind, SourceInfo,
    SourceWatcher,
};
use std::sync::Arc;

use super::{AtCompletion, Volume, lock};
use crate::events::EventKind;
use crate::status::{LifeState, WayBackStatus};

/// What a volume knows of older copies.
#[derive(Default)]
pub struct WayBack {
    /// Whose handoff brought the disk here; `None` for one that has always been here.
    id: Option<VolumeId>,
    /// All that changes here is recorded, and has been since that handoff.
    kept: AtomicBool,
    /// What differed from older copies at that handoff.
    inherited: Mutex<Bases>,
    /// Gives back the memory that outlives a kill, once there is no map any more.
    at_release: Mutex<Option<AtCompletion>>,
}

impl WayBack {
    /// Of a volume with this state. What cannot be read of it is told as the second part.
    pub fn new(
        state: Option<&StateDir>,
        at_release: Option<AtCompletion>,
    ) -> (Self, Option<String>) {
        let identity = state.map(StateDir::identity);
        let kept = identity.is_some_and(|i| i.ties.way_back);
        let (inherited, trouble) = match state.filter(|_| kept).map(StateDir::bases) {
            None => (Bases::new(), None),
            Some(Ok(bases)) => (bases, None),
            Some(Err(error)) => (Bases::new(), Some(error.to_string())),
        };
        let this = Self {
            id: identity.map(|i| i.volume_id),
            kept: AtomicBool::new(kept),
            inherited: Mutex::new(inherited),
            at_release: Mutex::new(at_release),
        };
        (this, trouble)
    }

    /// The move that brought the disk here.
    pub(super) fn own_id(&self) -> Option<VolumeId> {
        self.id
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Acquire)
    }

    /// There is no map any more: gives its memory back.
    pub(super) fn release(&self) {
        self.kept.store(false, Ordering::Release);
        lock(&self.inherited).clear();
        if let Some(finish) = lock(&self.at_release).take() {
            finish();
        }
    }
}

/// What differs from the disk at the handoff. A block that is clean here is what it was then.
fn changed(residency: &Residency) -> BlockSet {
    let runs = residency.runs(residency.geometry().all());
    runs.filter(|(_, state)| matches!(state, BlockState::Owned | BlockState::Partial))
        .map(|(run, _)| run)
        .collect()
}

impl Volume {
    /// What has changed here since the handoff; `None` where that is not known.
    fn changed_here(&self) -> Option<(VolumeId, BlockSet)> {
        if !self.way_back.is_kept() || self.life() == LifeState::Standby {
            return None;
        }
        let relocation = self.relocation()?;
        Some((self.way_back.id?, changed(&relocation.residency)))
    }

    /// In which blocks this disk may differ from what it was at the handoff to `base`; in all others
    /// it is the same. `None`: nothing is known of that.
    pub fn since(&self, base: VolumeId) -> Option<Vec<BlockRange>> {
        // What was inherited never changes, so that the two may be looked at one after the other.
        let (own, mut set) = self.changed_here()?;
        if base != own {
            let inherited = lock(&self.way_back.inherited);
            let (_, older) = inherited.iter().find(|(id, _)| *id == base)?;
            set.extend(older.runs(self.geometry.blocks()));
        }
        Some(set.runs(self.geometry.blocks()))
    }

    /// Whether it is known in what an older copy differs.
    pub(super) fn knows_base(&self, base: VolumeId) -> bool {
        self.way_back.is_kept()
            && (self.way_back.id == Some(base)
                || lock(&self.way_back.inherited)
                    .iter()
                    .any(|(id, _)| *id == base))
    }

    /// From a byte on, the blocks in which this disk, of which maybe not all is here, differs from the
    /// copy that it comes from. All of them are here, and there are none between the runs that are told:
    /// whoever has that copy can ask for these and for no others. At most `most` runs, and one more
    /// if there is one. Only once nothing is written here any more.
    ///
    /// What is absent is that copy's. What is clean is, too, while it is recorded what is written;
    /// after a doubt (a power cut: what nobody flushed may have reached a clean block without its
    /// record) or without such a record it counts as other than that copy.
    ///
    /// # Errors
    /// Blocks are here in part.
    pub(super) fn differs_exactly(
        &self,
        from: u64,
        most: usize,
    ) -> Result<Vec<BlockRange>, String> {
        let from = self.blocks_from(from);
        let Some(relocation) = self.relocation() else {
            // It has become whole, and nothing is known of what has changed.
            return Ok(vec![from]);
        };
        let kept = self.way_back.is_kept();
        let mut runs: Vec<BlockRange> = Vec::new();
        for (run, state) in relocation.residency.runs(from) {
            match state {
                BlockState::Absent => continue,
                BlockState::Clean if kept => continue,
                BlockState::Clean | BlockState::Owned => {}
                BlockState::Partial => {
                    return Err(format!(
                        "block {} is here in part, and its rest is only in the old copy",
                        run.start
                    ));
                }
            }
            let enough = runs.len() > most;
            match runs.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ if enough => break,
                _ => runs.push(run),
            }
        }
        Ok(runs)
    }

    /// All blocks from a byte on.
    pub(super) fn blocks_from(&self, from: u64) -> BlockRange {
        let blocks = self.geometry.blocks();
        BlockRange::new((from / self.geometry.block_bytes()).min(blocks), blocks)
    }

    /// All older copies of which it is known in what they differ, for whoever takes the disk over.
    /// Only once nothing is written here any more.
    pub fn bases(&self) -> Vec<(VolumeId, Vec<BlockRange>)> {
        let Some((own, _)) = self.changed_here() else {
            return Vec::new();
        };
        let mut ids = vec![own];
        ids.extend(lock(&self.way_back.inherited).iter().map(|(id, _)| *id));
        ids.truncate(MAX_BASES);
        let known = ids.into_iter();
        known.filter_map(|id| Some((id, self.since(id)?))).collect()
    }

    /// Takes over what is known of older copies: in which blocks they differed from this disk at the
    /// handoff to this volume. The newest come first, and the oldest are forgotten.
    ///
    /// # Errors
    /// It is not durable: nothing is known of them.
    pub fn inherit(&self, bases: Vec<(VolumeId, Vec<BlockRange>)>) -> io::Result<()> {
        if !self.way_back.is_kept() {
            return Ok(());
        }
        let all = self.geometry.all();
        let mut known: Bases = Bases::new();
        // One place is this volume's own when it hands on.
        for (id, runs) in bases.into_iter().take(MAX_BASES - 1) {
            let within = runs.into_iter().map(|run| run.intersection(all));
            let set: BlockSet = within.filter(|run| !run.is_empty()).collect();
            // Told twice, both count.
            match known.iter_mut().find(|(other, _)| *other == id) {
                Some((_, other)) => other.extend(set.runs(self.geometry.blocks())),
                None => known.push((id, set)),
            }
        }
        known.retain(|(id, _)| Some(*id) != self.way_back.id);
        let journal = lock(&self.journal);
        // Under the lock: it may have ended meanwhile.
        let Some(state) = journal.state.as_ref().filter(|_| self.way_back.is_kept()) else {
            return Ok(());
        };
        self.check_poison()?;
        state.keep_bases(&known).map_err(|e| e.into_io())?;
        *lock(&self.way_back.inherited) = known;
        Ok(())
    }

    /// Ends the recording of what changes: a way back will copy everything.
    ///
    /// # Errors
    /// It is not recorded; all stays as it was.
    pub(super) fn end_way_back(&self, why: &str) -> io::Result<()> {
        let mut journal = lock(&self.journal);
        if !self.way_back.is_kept() {
            return Ok(());
        }
        self.check_poison()?;
        if let Some(state) = journal.state.as_mut() {
            let outcome = state.end_way_back();
            self.note_state("recording that the way back is closed", outcome)?;
        }
        if self.is_local() {
            self.let_go_of_map();
            self.way_back.release();
        } else {
            self.way_back.kept.store(false, Ordering::Release);
            lock(&self.way_back.inherited).clear();
        }
        drop(journal);
        self.event(
            EventKind::WayBack,
            format!("the way back is closed: {why}; a move back copies everything"),
        );
        Ok(())
    }

    /// Records, as the last thing before the end, when the image was written last.
    pub(super) fn note_close(&self, state: &mut StateDir) -> io::Result<()> {
        let ties = &state.identity().ties;
        // An old copy that is not written into before the handoff has its time already.
        let standing = ties.only_here && state.identity().life == Life::Standby;
        if standing || !ties.way_back && ties.base.is_none() {
            return Ok(());
        }
        let written = self.store.modified()?;
        let outcome = state.change(|identity| identity.ties.closed_at = written);
        self.note_state("recording that the image was closed", outcome)
    }

    pub(super) fn way_back_status(&self) -> WayBackStatus {
        let relocation = self.relocation().filter(|_| self.way_back.is_kept());
        WayBackStatus {
            kept: relocation.is_some(),
            changed_bytes: relocation.map_or(0, |r| {
                let partial = r.residency.partial_blocks() as u64;
                r.residency.owned_bytes() + partial * self.geometry.block_bytes()
            }),
        }
    }
}

/// Why what was recorded of changes is not to be relied on any more, if so. Asked when a volume is
/// opened; `modified` is when the image was written last, `survived` whether the memory of a killed
/// process was there.
pub fn doubt(state: &StateDir, modified: Option<i64>, survived: bool) -> Option<&'static str> {
    let identity = state.identity();
    let ties = &identity.ties;
    if !ties.way_back || matches!(identity.life, Life::Standby | Life::GivenUp) {
        return None;
    }
    match ties.closed_at {
        Some(time) if modified != Some(time) => Some("the image was changed by something else"),
        Some(_) => None,
        None if survived => None,
        // Nothing was written since all was made durable.
        None if ties
            .departed
            .is_some_and(|d| modified.is_some() && d.image_mtime == modified) =>
        {
            None
        }
        None => Some(
            "it was not closed in good order, so that something may have been written that is not \
             recorded",
        ),
    }
}

/// The source of a volume that needs none.
#[derive(Debug)]
pub struct NoSource {
    /// Of the disk.
    pub size_bytes: u64,
}

impl NoSource {
    fn gone() -> SourceError {
        SourceError::new(SourceErrorKind::Disconnected, "there is no source any more")
    }
}

impl Source for NoSource {
    fn info(&self) -> SourceInfo {
        SourceInfo {
            size_bytes: self.size_bytes,
            read_only: true,
            can_multi_conn: false,
            has_extents: false,
            can_flush: false,
            min_block_bytes: 1,
            max_read_bytes: hikkoshi_nbd::wire::MAX_PAYLOAD_BYTES,
            uri: String::new(),
        }
    }

    fn is_connected(&self) -> bool {
        false
    }

    fn connections(&self) -> usize {
        0
    }

    fn read(&self, _: Lane, _: u64, _: u32, done: Completion<Fetched>) {
        done(Err(Self::gone()));
    }

    fn extents(&self, _: Lane, _: u64, _: u64, done: Completion<ExtentsAnswer>) {
        done(Err(Self::gone()));
    }

    fn flush(&self, done: Completion<()>) {
        done(Err(Self::gone()));
    }

    fn watch(&self, _: Arc<dyn SourceWatcher>) {}

    fn close(&self) {}
}
