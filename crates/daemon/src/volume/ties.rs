//! What a volume's other copies are worth at a start: by what its state says, what the image looks
//! like, and what the source has told.
//!
//! Opens nothing: [`super::open`] and `open_tied` do, with files, and so does whoever brings another
//! store and another state. Nothing here is guessed: what is in doubt counts for nothing, durably.

use hikkoshi_engine::blocks::BlockSet;
use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::journal::VolumeId;
use hikkoshi_engine::residency::{BlockState, Residency};
use hikkoshi_store::Store;
use hikkoshi_store::live::OpenedMap;
use hikkoshi_store::state::{Departure, Identity, Life, StateDir, StateError, Ties};
use hikkoshi_wan::transport::session::{Attached, OldCopy};

use super::arrival::complement;
use super::open::{OpenError, refuse};
use super::wayback;
use crate::config::{HandoffPolicy, SourceConfig};

/// What was recorded of changes cannot be read, or says what cannot be.
pub(super) const DAMAGED: &str = "what was recorded of changes is damaged";

fn modified(store: &dyn Store) -> Result<Option<i64>, OpenError> {
    store.modified().map_err(|source| OpenError::Image {
        what: "looking at",
        source,
    })
}

/// Where a move begins. `now`: nobody uses the disk at the source any more; a source that keeps a
/// fence has to agree first all the same.
pub(super) fn first_life(now: bool, fenced_source: bool) -> Life {
    if now && !fenced_source {
        Life::Arriving
    } else {
        Life::Standby
    }
}

/// Ends the recording of what changes, if what was recorded is not to be relied on, and gives the reason.
/// `survived`: the memory of a killed process is there.
///
/// Before [`open_map`](hikkoshi_store::live::open_map), whose memory the next start would find: killed in
/// between, this one would leave nothing that tells of the power cut.
///
/// # Errors
/// The medium fails.
pub fn settle_doubt(
    state: &mut StateDir,
    store: &dyn Store,
    survived: bool,
) -> Result<Option<&'static str>, OpenError> {
    let doubt = wayback::doubt(state, modified(store)?, survived);
    if doubt.is_some() {
        state.end_way_back()?;
    }
    Ok(doubt)
}

/// For a complete image whose changes are recorded, after [`settle_doubt`]: why the record is not to be
/// relied on all the same, if so. Otherwise the recording goes on from here.
///
/// # Errors
/// The medium fails.
pub fn settle_record<L>(map: &mut OpenedMap<L>) -> Result<Option<&'static str>, OpenError> {
    if map.residency.missing_blocks() > 0 {
        return Ok(Some(DAMAGED));
    }
    // Also durable from here on, if it was recorded by a process that was killed then.
    map.state
        .change(|identity| identity.ties.closed_at = None)?;
    Ok(None)
}

/// For a move that goes on, after [`settle_doubt`]: the recording goes on from here, or begins.
///
/// # Errors
/// The medium fails.
pub fn settle_way_back<L>(map: &mut OpenedMap<L>, wanted: &SourceConfig) -> Result<(), OpenError> {
    let ties = &map.state.identity().ties;
    let before = map.state.identity().life == Life::Standby;
    if ties.only_here && before {
        // The time that the old copy was written last stays, since it is not.
        return Ok(());
    }
    if ties.closed_at.is_some() || (wanted.way_back && before && !ties.way_back) {
        map.state.change(|identity| {
            identity.ties.closed_at = None;
            // Later something may have been written that was not recorded.
            identity.ties.way_back |= wanted.way_back && before;
        })?;
    }
    Ok(())
}

/// For a disk that has come back over the old copy of which its source did not have all: what was
/// recorded as lacking at the handoff comes from there, and all else is here, whether the process
/// came to mark it or not.
///
/// Doing so again changes nothing: what is marked once never becomes missing.
///
/// # Errors
/// What is lacking is missing or damaged.
pub fn settle_lacking(state: &StateDir, residency: &Residency) -> Result<(), StateError> {
    let identity = state.identity();
    if !identity.ties.only_here || identity.life != Life::Arriving {
        return Ok(());
    }
    for range in complement(&state.lacking()?, residency.geometry()) {
        let runs: Vec<_> = residency.runs(range).collect();
        for (run, state) in runs {
            match state {
                BlockState::Absent => residency.mark_clean(run),
                // What a guest did not write of it is here as well.
                BlockState::Partial => residency.mark_owned(run),
                BlockState::Clean | BlockState::Owned => {}
            }
        }
    }
    Ok(())
}

/// For a return that goes on before its handoff: the old copy that is here. Where it is in doubt there
/// is none, durably, and everything is copied.
///
/// # Errors
/// The medium fails; or the source still needs the old copy as it was.
pub fn settle_base(state: &mut StateDir, store: &dyn Store) -> Result<Option<VolumeId>, OpenError> {
    let ties = &state.identity().ties;
    let Some(base) = ties.base else {
        return Ok(None);
    };
    let known = matches!(state.overwritten(base), Ok(Some(_)));
    let modified = modified(store)?;
    if ties.only_here && state.identity().life == Life::Standby && ties.closed_at != modified {
        return refuse(format!(
            "the old copy was changed by something else since this return began, and the source still \
             needs it as it was: bring the image back, with its time of modification ({}); nothing is \
             served until then",
            ties.closed_at.map_or("unknown".to_owned(), |time| format!(
                "{}.{:09} seconds since 1970, as `touch -d @SECONDS` sets it",
                time.div_euclid(1_000_000_000),
                time.rem_euclid(1_000_000_000)
            ))
        ));
    }
    if ties.only_here && state.identity().life == Life::Standby {
        // Nothing of it was overwritten, whatever has become of the file that says so.
        return Ok(Some(base));
    }
    if known && ties.closed_at.is_none_or(|time| modified == Some(time)) {
        return Ok(Some(base));
    }
    tracing::warn!(
        "the old copy was changed by something else, or it is not known what was overwritten of it: \
         all of the disk is copied"
    );
    state.change(|identity| identity.ties.base = None)?;
    Ok(None)
}

/// What was overwritten of the old copy so far.
pub fn overwritten_of(state: &StateDir) -> BlockSet {
    let base = state.identity().ties.base;
    let set = base.and_then(|base| state.overwritten(base).ok()?);
    set.unwrap_or_default()
}

// The return

/// What was overwritten of an old copy by returns that were given up, or why it is none any more.
/// `same_file`: the image is the one that the state was made for.
///
/// # Errors
/// The medium fails.
pub fn old_copy(
    state: &StateDir,
    store: &dyn Store,
    departure: Departure,
    same_file: bool,
) -> Result<Result<BlockSet, String>, OpenError> {
    let modified = modified(store)?;
    if departure.image_mtime.is_none() || modified.is_none() {
        return Ok(Err(
            "when it was written last is not known (that cannot be told of a device), so that \
             something else may have changed it"
                .to_owned(),
        ));
    }
    if departure.image_mtime != modified || !same_file {
        return Ok(Err("it was changed by something else".to_owned()));
    }
    Ok(match state.overwritten(departure.to) {
        Ok(Some(set)) => Ok(set),
        Ok(None) if departure.intact => Ok(BlockSet::new()),
        Ok(None) => Err("what a return that was given up has overwritten is not known".to_owned()),
        Err(error @ StateError::Journal { .. }) => Err(error.to_string()),
        Err(error) => return Err(error.into()),
    })
}

/// How a disk comes back into its old copy.
#[derive(Debug, PartialEq, Eq)]
pub enum Course {
    /// What differs is copied, and then the disk taken over.
    Difference,
    /// The source lacks what is only here: the disk is taken over first.
    Rest,
    /// There is no old copy any more: everything is copied over what is here.
    Everything,
    /// There is one, and the source does not know in what it differs.
    Unknown,
    /// Not now, with the reason; the source is to be told so.
    Not(String),
}

/// How a disk comes back into the old copy `base` (or why that is none), by what its source has told of
/// it. `geometry`: of the old copy.
pub fn course_of(told: &Attached, base: &Result<BlockSet, String>, geometry: Geometry) -> Course {
    let OldCopy::Needed { block_bytes } = told.old_copy else {
        return match base {
            Ok(_) if told.old_copy == OldCopy::Known => Course::Difference,
            Ok(_) => Course::Unknown,
            Err(_) => Course::Everything,
        };
    };
    let here = geometry.block_bytes();
    if told.epoch == 0 {
        return Course::Not(
            "the disk has not arrived there, and is only here: `hikkoshi abort` there takes the move \
             back"
                .to_owned(),
        );
    }
    if !u64::from(block_bytes).is_multiple_of(here) {
        return Course::Not(format!(
            "not all of the disk has arrived there, and what has is kept in blocks of {block_bytes} \
             bytes, here in blocks of {here}: wait until all of it is there"
        ));
    }
    let why = match base {
        Ok(overwritten) if overwritten.is_empty() => return Course::Rest,
        Ok(_) => "a return that was given up has written into it",
        Err(why) => why.as_str(),
    };
    Course::Not(format!(
        "not all of the disk has arrived there, and what is missing is fetched from this old copy, which \
         is not what it was: {why}"
    ))
}

/// Who begins a return, and from where.
#[derive(Debug)]
pub struct Returning<'a> {
    /// What was asked for.
    pub wanted: &'a SourceConfig,
    /// The volume that is made for it.
    pub volume_id: VolumeId,
    /// Whose memory will be believed.
    pub incarnation: [u8; 16],
    /// Of the image, where that is known.
    pub image_inode: Option<u64>,
    /// The source keeps a fence.
    pub fenced_source: bool,
    /// The source can be asked to flush.
    pub can_flush: bool,
}

impl Returning<'_> {
    /// The state of the volume that takes the disk back, made of that of its old copy, which departed so.
    /// `base`: that old copy counts.
    pub fn identity(
        &self,
        old: Identity,
        departure: Departure,
        base: Option<VolumeId>,
        only_here: bool,
    ) -> Identity {
        let now = self.wanted.handoff == HandoffPolicy::Now;
        Identity {
            volume_id: self.volume_id,
            life: first_life(now, self.fenced_source),
            source_uri: self.wanted.uri.clone(),
            incarnation: self.incarnation,
            image_inode: self.image_inode,
            ties: Ties {
                base,
                fenced_source: self.fenced_source,
                source_flush_owed: now && !self.fenced_source && self.can_flush,
                only_here,
                by_command: self.wanted.handoff == HandoffPolicy::Command,
                // Once the disk is here again, it still is not for whom it was not then.
                released: old.ties.released,
                way_back: self.wanted.way_back,
                // Nothing is written into it before the handoff.
                closed_at: departure.image_mtime.filter(|_| only_here),
                ..Ties::default()
            },
            ..old
        }
    }
}
