//! Opening what is tied to other copies of the disk: a complete image whose changes are recorded, and
//! an old copy that takes its disk back. Called by [`super::open`], with its manners: nothing is
//! changed before all of it is known to fit.

use std::path::Path;
use std::sync::Arc;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::geometry::DEFAULT_BLOCK_BYTES;
use hikkoshi_engine::journal::VolumeId;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::live::{self, OpenedMap};
use hikkoshi_store::state::{Identity, StateDir, StateError};
use hikkoshi_store::{FileStore, Store};
use hikkoshi_wan::transport::session::{OldCopy, Stance};
use hikkoshi_wan::{Source, Ticket};

use super::open::{
    OpenError, Running, connect, fitting, hand_off_now, inode_of, move_in, open_existing,
    open_plain, open_seeds, refuse, say_that_it_is_off, seed, set_tag, settle_image,
    tell_rewritten,
};
use super::ties::{Course, DAMAGED, Returning, course_of, old_copy, settle_doubt, settle_record};
use super::wayback::NoSource;
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
    mut state: StateDir,
    state_path: &Path,
) -> Result<(ItsMap, Option<&'static str>), OpenError> {
    let identity = state.identity().clone();
    let size = identity.geometry.size_bytes();
    let fits = store.size_bytes() == size || store.is_block_device() && store.size_bytes() > size;
    if !fits || inode_of(&store)? != identity.image_inode {
        return Ok((Err(state), Some("the image is another one")));
    }
    if !state.has_map() {
        return Ok((Err(state), Some(DAMAGED)));
    }
    let survived = live::has_survived(&state, state_path, &live::default_dir())?;
    if let Some(why) = settle_doubt(&mut state, &store, survived)? {
        return Ok((Err(state), Some(why)));
    }
    let mut sync = || store.sync();
    let map = live::open_map(state, state_path, &live::default_dir(), &mut sync);
    let mut map = match map {
        Ok(map) => map,
        Err(StateError::Journal { .. } | StateError::Missing { .. }) => {
            return Ok((Err(StateDir::open(state_path)?), Some(DAMAGED)));
        }
        Err(error) => return Err(error.into()),
    };
    Ok(match settle_record(&mut map)? {
        Some(why) => {
            map.live.remove();
            (Err(map.state), Some(why))
        }
        None => (Ok((map, store)), None),
    })
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
    mut state: StateDir,
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
    let same_file = inode_of(&store)? == identity.image_inode;
    let base = old_copy(&state, &store, departure, same_file)?;
    if let (Err(why), false) = (&base, wanted.overwrite) {
        return refuse_difference(config, why);
    }
    let seeds = open_seeds(wanted, &config.image)?;
    settle_given_up(config, wanted, &mut state)?;
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
    let course = course_of(&told, &base, identity.geometry);
    let only_here = matches!(told.old_copy, OldCopy::Needed { .. });
    if only_here {
        let options = check_for_return(wanted);
        if options.is_err() || matches!(course, Course::Not(_)) {
            source.close();
            // Or it would go on waiting for a return that never comes.
            let _ = say_that_it_is_off(config, wanted, &ticket);
        }
        options?;
    }
    let base = match course {
        Course::Not(why) => {
            return refuse(format!(
                "the disk cannot come back into {} now: {why}; nothing was changed here",
                config.image.display()
            ));
        }
        Course::Rest | Course::Difference => base.ok().map(|set| (departure.to, set)),
        Course::Unknown if !wanted.overwrite => {
            source.close();
            return refuse_difference(
                config,
                "the source does not know what has changed since it took the disk over (only a \
                 hikkoshi that was started with --way-back does, until a doubt or `release` ends it)",
            );
        }
        Course::Unknown | Course::Everything => {
            source.close();
            (source, ticket) = dial(None)?;
            None
        }
    };
    let fenced_source = ticket.settle();
    check_size(wanted, &*source, &identity)?;
    let now = wanted.handoff == HandoffPolicy::Now;
    let returning = Returning {
        wanted,
        volume_id,
        incarnation: live::random()?,
        image_inode: inode_of(&store)?,
        fenced_source,
        can_flush: source.info().can_flush,
    };
    let base_id = base.as_ref().map(|(id, _)| *id);
    let returning = returning.identity(identity, departure, base_id, only_here);
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

/// A return that was given up before, and of which the source has not heard so: a handoff of that one may
/// still be on its way there, and its fence would be closed for nobody once this state is another's.
fn settle_given_up(
    config: &ExportConfig,
    wanted: &SourceConfig,
    state: &mut StateDir,
) -> Result<(), OpenError> {
    if !state.identity().ties.gave_up {
        return Ok(());
    }
    let ticket = Ticket::new(state.identity().volume_id, None, Stance::Standby, true);
    match say_that_it_is_off(config, wanted, &ticket) {
        Ok(true) => state.change(|identity| identity.ties.gave_up = false)?,
        // Nothing is fenced there for that one.
        Ok(false) => {}
        Err(error) => {
            return refuse(format!(
                "an earlier return into {} was given up, and {} could not be told so yet ({error}); start \
                 this again when it can be reached",
                config.image.display(),
                wanted.uri
            ));
        }
    }
    Ok(())
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
