//! Opening what is tied to other copies of the disk: a complete image whose changes are recorded, and
//! an old copy that takes its disk back. Called by [`super::open`], with its manners: nothing is
//! changed before all of it is known to fit.

use std::path::Path;
use std::sync::Arc;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::blocks::BlockSet;
use hikkoshi_engine::geometry::DEFAULT_BLOCK_BYTES;
use hikkoshi_engine::journal::VolumeId;
use hikkoshi_engine::residency::{BlockState, Residency};
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::live::{self, OpenedMap, Recovered};
use hikkoshi_store::state::{Departure, Identity, Life, StateDir, StateError, Ties};
use hikkoshi_store::{FileStore, Store};
use hikkoshi_wan::transport::session::{OldCopy, Stance};
use hikkoshi_wan::{Source, Ticket};

use super::arrival::complement;
use super::open::{
    OpenError, Running, connect, first_life, fitting, hand_off_now, inode_of, move_in,
    open_existing, open_plain, open_seeds, refuse, say_that_it_is_off, seed, set_tag, settle_image,
    tell_rewritten,
};
use super::wayback::{self, NoSource};
use crate::config::{ExportConfig, HandoffPolicy, SourceConfig};
use crate::events::EventKind;

/// A complete image whose changes are recorded for the way back.
pub(super) fn open_recorded(
    config: &ExportConfig,
    state: StateDir,
    state_path: &Path,
) -> Result<Running, OpenError> {
    let store = open_existing(config)?;
    let rewritten = settle_image(config, &store)?;
    let (opened, why) = open_its_map(store, state, state_path)?;
    match opened {
        Ok((map, store)) => {
            set_tag(&store, &[])?;
            let identity = map.state.identity();
            let (uri, size_bytes) = (identity.source_uri.clone(), identity.geometry.size_bytes());
            let wanted = config.source.clone().unwrap_or(SourceConfig::new(uri));
            let source = Arc::new(NoSource { size_bytes });
            let kept = (map, Witnesses::new(seed()?), Vec::new());
            let running = move_in(config, &wanted, store, source, kept, None, None)?;
            tell_rewritten(&running, rewritten);
            Ok(running)
        }
        Err(mut state) => {
            state.end_way_back()?;
            let running = open_plain(config, Some(state), true)?;
            tell_doubt(&running, why);
            tell_rewritten(&running, rewritten);
            Ok(running)
        }
    }
}

/// The map and the image, or the state alone with the reason why the map is not to be used.
type ItsMap = Result<(OpenedMap, FileStore), StateDir>;

fn open_its_map(
    store: FileStore,
    state: StateDir,
    state_path: &Path,
) -> Result<(ItsMap, Option<&'static str>), OpenError> {
    const DAMAGED: &str = "what was recorded of changes is damaged";
    let identity = state.identity().clone();
    let size = identity.geometry.size_bytes();
    let fits = store.size_bytes() == size || store.is_block_device() && store.size_bytes() > size;
    if !fits || inode_of(&store)? != identity.image_inode {
        return Ok((Err(state), Some("the image is another one")));
    }
    if !state.has_map() {
        return Ok((Err(state), Some(DAMAGED)));
    }
    let mut sync = || store.sync();
    let map = live::open_map(state, state_path, &live::default_dir(), &mut sync);
    let mut map = match map {
        Ok(map) if map.residency.missing_blocks() == 0 => map,
        Ok(map) => {
            map.live.remove();
            return Ok((Err(map.state), Some(DAMAGED)));
        }
        Err(StateError::Journal { .. } | StateError::Missing { .. }) => {
            return Ok((Err(StateDir::open(state_path)?), Some(DAMAGED)));
        }
        Err(error) => return Err(error.into()),
    };
    match wayback::doubt(&map.state, modified(&store)?, survived(&map)) {
        Some(why) => {
            map.live.remove();
            Ok((Err(map.state), Some(why)))
        }
        None => {
            // Also durable from here on, if it was recorded by a process that was killed then.
            map.state
                .change(|identity| identity.ties.closed_at = None)?;
            Ok((Ok((map, store)), None))
        }
    }
}

fn modified(store: &FileStore) -> Result<Option<i64>, OpenError> {
    store.modified().map_err(|source| OpenError::Image {
        what: "looking at",
        source,
    })
}

fn survived(map: &OpenedMap) -> bool {
    map.recovered == Recovered::AfterKill
}

/// For a move that goes on: whether what was recorded for the way back still holds. Gives the reason
/// why it was ended.
pub(super) fn settle_way_back(
    map: &mut OpenedMap,
    store: &FileStore,
    wanted: &SourceConfig,
) -> Result<Option<&'static str>, OpenError> {
    let doubt = wayback::doubt(&map.state, modified(store)?, survived(map));
    let ties = &map.state.identity().ties;
    let before = map.state.identity().life == Life::Standby;
    if ties.only_here && before {
        // The time that the old copy was written last stays, since it is not.
        return Ok(None);
    }
    if doubt.is_some() {
        map.state.end_way_back()?;
    } else if ties.closed_at.is_some() || (wanted.way_back && before && !ties.way_back) {
        map.state.change(|identity| {
            identity.ties.closed_at = None;
            // Later something may have been written that was not recorded.
            identity.ties.way_back |= wanted.way_back && before;
        })?;
    }
    Ok(doubt)
}

/// For a disk that has come back over the old copy of which its source did not have all: what was
/// recorded as lacking at the handoff comes from there, and all else is here, whether the process
/// came to mark it or not.
///
/// Doing so again changes nothing: what is marked once never becomes missing.
pub(super) fn settle_lacking(state: &StateDir, residency: &Residency) -> Result<(), StateError> {
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

pub(super) fn tell_doubt(running: &Running, doubt: Option<&str>) {
    if let Some(why) = doubt {
        running.volume().event(
            EventKind::WayBack,
            format!("the way back is closed: {why}; a move back copies everything"),
        );
    }
}

// The return

/// An old copy whose disk comes back. Before the state is replaced, as the last step, it is the old
/// copy whatever happens.
pub(super) fn open_return(
    config: &ExportConfig,
    wanted: &SourceConfig,
    state: StateDir,
    state_path: &Path,
) -> Result<Running, OpenError> {
    let identity = state.identity().clone();
    let Some(departure) = identity.ties.departed else {
        return refuse("the disk has not moved on from here, so that it could come back");
    };
    let asked = u64::from(config.block_bytes);
    if asked != u64::from(DEFAULT_BLOCK_BYTES) && asked != identity.geometry.block_bytes() {
        return refuse(format!(
            "the old copy is kept with blocks of {} bytes; leave --block-size away",
            identity.geometry.block_bytes()
        ));
    }
    let store = fitting(config, open_existing(config)?, identity.geometry)?;
    let rewritten = settle_image(config, &store)?;
    let mut base = match old_copy(&state, &store, departure)? {
        Ok(overwritten) => Ok((departure.to, overwritten)),
        Err(why) if wanted.overwrite => Err(why),
        Err(why) => return refuse_difference(config, why),
    };
    let seeds = open_seeds(wanted, &config.image)?;
    let volume_id = live::random()?;
    let dial = |base: Option<VolumeId>| {
        let ticket = Ticket::new(volume_id, base, Stance::Standby, false);
        let source = connect(wanted, config, &ticket);
        let source = source.map_err(|source| OpenError::Source {
            uri: wanted.uri.clone(),
            source,
        })?;
        Ok::<_, OpenError>((source, ticket))
    };
    // Also where it is none any more: whoever still needs it must say so.
    let (mut source, mut ticket) = dial(Some(departure.to))?;
    let told = ticket.attached().unwrap_or_default();
    let only_here = matches!(told.old_copy, OldCopy::Needed { .. });
    if let OldCopy::Needed { block_bytes } = told.old_copy {
        let here = identity.geometry.block_bytes();
        let why = if told.epoch == 0 {
            Some(
                "the disk has not arrived there, and is only here: `hikkoshi abort` there takes the move \
                 back"
                    .to_owned(),
            )
        } else if !u64::from(block_bytes).is_multiple_of(here) {
            Some(format!(
                "not all of the disk has arrived there, and what has is kept in blocks of {block_bytes} \
                 bytes, here in blocks of {here}: wait until all of it is there"
            ))
        } else {
            not_as_it_was(&base)
        };
        let options = check_for_return(wanted);
        if why.is_some() || options.is_err() {
            source.close();
            // Or it would go on waiting for a return that never comes.
            let _ = say_that_it_is_off(config, wanted, &ticket);
        }
        options?;
        if let Some(why) = why {
            return refuse(format!(
                "the disk cannot come back into {} now: {why}; nothing was changed here",
                config.image.display()
            ));
        }
    } else if base.is_ok() && told.old_copy != OldCopy::Known {
        source.close();
        if !wanted.overwrite {
            return refuse_difference(
                config,
                "the source does not know what has changed since it took the disk over (only a \
                 hikkoshi that was started with --way-back does, until a doubt or `release` ends it)",
            );
        }
        base = Err(String::new());
        (source, ticket) = dial(None)?;
    } else if base.is_err() {
        source.close();
        (source, ticket) = dial(None)?;
    }
    let base = base.ok();
    let fenced_source = ticket.settle();
    check_size(wanted, &*source, &identity)?;
    let now = wanted.handoff == HandoffPolicy::Now;
    let returning = Identity {
        volume_id,
        life: first_life(now, fenced_source),
        source_uri: wanted.uri.clone(),
        incarnation: live::random()?,
        image_inode: inode_of(&store)?,
        ties: Ties {
            base: base.as_ref().map(|(id, _)| *id),
            fenced_source,
            source_flush_owed: now && !fenced_source && source.info().can_flush,
            only_here,
            by_command: wanted.handoff == HandoffPolicy::Command,
            // Once the disk is here again, it still is not for whom it was not then.
            released: identity.ties.released,
            way_back: wanted.way_back,
            // Nothing is written into it before the handoff.
            closed_at: departure.image_mtime.filter(|_| only_here),
            ..Ties::default()
        },
        ..identity
    };
    if let Some((id, overwritten)) = &base {
        state.keep_overwritten(*id, overwritten)?;
    }
    let map = live::return_map(state, state_path, &live::default_dir(), returning)?;
    set_tag(&store, &volume_id)?;
    crash_point!("new.tagged");
    let kept = (map, Witnesses::new(seed()?), seeds);
    let running = move_in(config, wanted, store, source, kept, Some(ticket), None)?;
    tell_rewritten(&running, rewritten);
    hand_off_now(&running, now)?;
    Ok(running)
}

/// Why an old copy cannot be what a source still needs.
fn not_as_it_was(base: &Result<(VolumeId, BlockSet), String>) -> Option<String> {
    let why = match base {
        Ok((_, overwritten)) if overwritten.is_empty() => return None,
        Ok(_) => "a return that was given up has written into it",
        Err(why) => why.as_str(),
    };
    Some(format!(
        "not all of the disk has arrived there, and what is missing is fetched from this old copy, which \
         is not what it was: {why}"
    ))
}

/// What cannot be while the rest of a disk is only here.
pub(super) fn check_for_return(wanted: &SourceConfig) -> Result<(), OpenError> {
    const NOT_ALL: &str = "the disk comes back before all of it was at the other site";
    if wanted.verify {
        return refuse(format!(
            "{NOT_ALL}, so there is nothing whole to compare it with; leave --verify away"
        ));
    }
    if !wanted.seed_images.is_empty() {
        return refuse(format!(
            "{NOT_ALL}: only what was written there comes, and seed images are not looked through for \
             that; leave --seed-image away"
        ));
    }
    Ok(())
}

fn refuse_difference<T>(
    config: &ExportConfig,
    why: impl std::fmt::Display,
) -> Result<T, OpenError> {
    refuse(format!(
        "the disk cannot come back into {} by its difference alone: {why}; with --overwrite all of it \
         is copied over what is there",
        config.image.display()
    ))
}

fn check_size(
    wanted: &SourceConfig,
    source: &dyn Source,
    identity: &Identity,
) -> Result<(), OpenError> {
    let (there, here) = (source.info().size_bytes, identity.geometry.size_bytes());
    if there != here {
        source.close();
        return refuse(format!(
            "the disk at {} has {there} bytes, and the old copy {here}: it is another disk, or was \
             resized; to copy it, remove the old copy and its state",
            wanted.uri
        ));
    }
    Ok(())
}

/// What was overwritten of the old copy by returns that were given up, or why it is none any more.
fn old_copy(
    state: &StateDir,
    store: &FileStore,
    departure: Departure,
) -> Result<Result<BlockSet, String>, OpenError> {
    let modified = modified(store)?;
    if departure.image_mtime.is_none() || modified.is_none() {
        return Ok(Err(
            "when it was written last is not known (that cannot be told of a device), so that \
             something else may have changed it"
                .to_owned(),
        ));
    }
    let same_file = inode_of(store)? == state.identity().image_inode;
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

/// For a return that goes on before its handoff: the old copy that is here. Where it is in doubt there
/// is none, durably, and everything is copied.
pub(super) fn settle_base(
    state: &mut StateDir,
    store: &FileStore,
) -> Result<Option<VolumeId>, OpenError> {
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
pub(super) fn overwritten_of(state: &StateDir) -> BlockSet {
    let base = state.identity().ties.base;
    let set = base.and_then(|base| state.overwritten(base).ok()?);
    set.unwrap_or_default()
}
