//! Opening both ends of a move from one image of this machine to another.
//!
//! Live, the old volume is served already and the new one is opened beside it ([`open_beside`]). After a
//! restart the new image is what is served, and brings the old one with it (`open_old`), which
//! nobody else may serve any more (`check_not_left`). As in [`crate::volume::open`], whose steps these
//! use: nothing is changed before all of it is known to fit.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::state::{Found, Identity, Life, StateDir, Ties};
use hikkoshi_store::{FileStore, live};
use hikkoshi_wan::transport::session::{Stance, Told};
use hikkoshi_wan::{MoveLink, Source, SourceError, SourceErrorKind, Ticket};

use super::ImageAddress;
use super::link::ImageLink;
use super::source::ImageSource;
use crate::config::{ExportConfig, SourceConfig};
use crate::volume::Volume;
use crate::volume::open::{
    OpenError, Running, check_blank, check_state_place, check_untagged, create_image, fitting,
    inode_of, move_in, open_complete, open_existing, refuse, seed, set_tag, settle_image,
    state_path, tell_rewritten,
};

/// What a source answers at once.
const NO_PATIENCE: std::time::Duration = std::time::Duration::ZERO;

// Live

/// A new volume beside the one that is served, and whether its image was made for it.
pub struct Beside {
    /// The volume, which stands by.
    pub running: Running,
    /// Nobody misses the image if the move is given up.
    pub made: bool,
}

/// Opens the image that the disk of `old` is to move to. `config` is that of the new volume.
///
/// # Errors
/// It cannot be; the old volume is as before.
pub fn open_beside(
    config: &ExportConfig,
    wanted: &SourceConfig,
    old: &Arc<Volume>,
) -> Result<Beside, OpenError> {
    let state_path = state_path(config)?;
    check_state_place(config, &state_path)?;
    let address = ImageAddress::new(&config.image, config.state_dir.as_deref());
    let address = address.map_err(OpenError::Refused)?;
    check_other(&config.image, old.image())?;
    let is_ours = check_state(config, wanted, &state_path)?;
    let overwrite = wanted.overwrite || is_ours;
    // A file of no size is what a power cut leaves of one that was being made.
    let begun = |meta: &std::fs::Metadata| meta.is_file() && meta.len() == 0;
    let existing = match std::fs::metadata(&config.image) {
        Ok(meta) if !begun(&meta) => Some(open_existing(config)?),
        _ => None,
    };
    let made = existing.is_none();
    let volume_id = live::random()?;
    old.expect_storage_move(volume_id, address)
        .map_err(OpenError::Refused)?;
    let opened = (|| {
        if let Some(store) = existing.as_ref().filter(|_| !overwrite) {
            check_untagged(config, store)?;
        }
        let store = match existing {
            Some(store) => fitting(config, store, old.geometry())?,
            None => create_image(config, old.geometry())?,
        };
        crash_point!("new.image");
        if !made && !overwrite {
            check_blank(config, &store)?;
        }
        open_new(config, wanted, old, store, &state_path, volume_id)
    })();
    match opened {
        Ok(running) => Ok(Beside { running, made }),
        Err(error) => {
            old.forget_storage_move();
            if made {
                let _ = std::fs::remove_file(&config.image);
            }
            Err(error)
        }
    }
}

fn open_new(
    config: &ExportConfig,
    wanted: &SourceConfig,
    old: &Arc<Volume>,
    store: FileStore,
    state_path: &Path,
    volume_id: [u8; 16],
) -> Result<Running, OpenError> {
    let rewritten = settle_image(config, &store)?;
    let identity = Identity {
        volume_id,
        geometry: old.geometry(),
        generation: 0,
        life: Life::Standby,
        source_uri: wanted.uri.clone(),
        incarnation: live::random()?,
        image_inode: inode_of(&store)?,
        ties: Ties {
            fenced_source: true,
            way_back: wanted.way_back,
            released: old.released(),
            ..Ties::default()
        },
    };
    let ticket = Ticket::new(volume_id, None, Stance::Standby, true);
    // The old volume begins to note what changes, and needs a state to be fenced in.
    let (source, _, link) = reach(old, &identity, Some(&ticket))?;
    let map = live::create_map(state_path, &live::default_dir(), identity)?;
    set_tag(&store, &volume_id)?;
    crash_point!("new.tagged");
    let kept = (map, Witnesses::new(seed()?), Vec::new());
    let running = move_in(config, wanted, store, source, kept, Some(ticket), link)?;
    tell_rewritten(&running, rewritten);
    Ok(running)
}

/// Not the image that it leaves, by whatever name.
fn check_other(new: &Path, old: &Path) -> Result<(), OpenError> {
    let (Ok(new_meta), Ok(old_meta)) = (std::fs::metadata(new), std::fs::metadata(old)) else {
        return Ok(());
    };
    let device = |meta: &std::fs::Metadata| meta.file_type().is_block_device().then(|| meta.rdev());
    let same = match (device(&new_meta), device(&old_meta)) {
        (Some(new), Some(old)) => new == old,
        (None, None) => (new_meta.dev(), new_meta.ino()) == (old_meta.dev(), old_meta.ino()),
        _ => false,
    };
    if same {
        return refuse(format!(
            "{} is the image that the disk is in already ({}); name another one",
            new.display(),
            old.display()
        ));
    }
    Ok(())
}

/// Whether what the state of the new image speaks of may go; `true` if it is what an earlier attempt
/// at the same move left.
fn check_state(
    config: &ExportConfig,
    wanted: &SourceConfig,
    state_path: &Path,
) -> Result<bool, OpenError> {
    let (image, state) = (config.image.display(), state_path.display());
    let identity = match (StateDir::look(state_path)?, StateDir::whose(state_path)?) {
        (Found::Nothing | Found::Begun, _) => return Ok(false),
        (Found::State, Some(identity)) => identity,
        (Found::State, None) => {
            return refuse(format!(
                "{state} is a state that has lost its identity, and {image} may be only partly \
                 somewhere; if neither is needed, remove the state"
            ));
        }
    };
    match identity.life {
        // It has never taken a write, and the old image is not fenced: else it would not be served.
        Life::Standby | Life::GivenUp if identity.source_uri == wanted.uri => Ok(true),
        Life::Local if wanted.overwrite => Ok(false),
        Life::Local => refuse(format!(
            "{image} was a disk already, as its state {state} says, and it would be overwritten; name \
             another image, or give --overwrite"
        )),
        Life::Standby | Life::GivenUp | Life::Arriving => refuse(format!(
            "{image} belongs to another move, as its state {state} says; name another image, or, if \
             it is not needed, remove both"
        )),
    }
}

/// Throws away what a move that was given up has left.
pub fn discard(config: &ExportConfig, made: bool) {
    if made && let Err(error) = std::fs::remove_file(&config.image) {
        tracing::warn!("{} could not be removed: {error}", config.image.display());
    }
    let Ok(state_path) = state_path(config) else {
        return;
    };
    if !made {
        // It has no part of a disk that anybody could miss.
        let options = hikkoshi_store::OpenOptions::default();
        let unmarked = FileStore::open(&config.image, options)
            .map_err(OpenError::from)
            .and_then(|store| set_tag(&store, &[]));
        if let Err(error) = unmarked {
            tracing::warn!("the mark of a move could not be taken off the image: {error}");
        }
    }
    // After the image: what is begun anew over an image without a state would be refused.
    if let Err(error) = StateDir::discard(&state_path) {
        tracing::warn!("what is left of the move could not be removed: {error}");
    }
}

/// The old volume as a source and as the one that keeps the fence; it is told who comes.
type Reached = (
    Arc<dyn Source>,
    Option<SourceError>,
    Option<Arc<dyn MoveLink>>,
);

/// Reaches the old volume, which is in this process.
pub(in crate::volume) fn reach(
    old: &Arc<Volume>,
    identity: &Identity,
    ticket: Option<&Arc<Ticket>>,
) -> Result<Reached, OpenError> {
    let failed = |source| OpenError::Source {
        uri: identity.source_uri.clone(),
        source,
    };
    let link = ImageLink::new(old);
    if let Some(ticket) = ticket {
        match link.tell(&ticket.tell(), NO_PATIENCE) {
            Ok(Told::Attached(attached)) => ticket.was_told(attached),
            Ok(_) => {
                let why = "it answered something else";
                return Err(failed(SourceError::new(SourceErrorKind::Untrusted, why)));
            }
            Err(error) => return Err(failed(error)),
        }
    }
    let source = ImageSource::start(old, identity.source_uri.clone());
    let source = source.map_err(OpenError::Thread)?;
    Ok((source, None, Some(link)))
}

// After a restart

/// Refuses the image that a disk has left for another one of this machine: whoever wrote to it would
/// have an old disk.
pub(in crate::volume) fn check_not_left(
    config: &ExportConfig,
    identity: &Identity,
    state_path: &Path,
) -> Result<(), OpenError> {
    let Some(moved_to) = &identity.ties.moved_to else {
        return Ok(());
    };
    let (image, arguments) = match ImageAddress::parse(moved_to) {
        Some(to) => (to.image.display().to_string(), to.arguments()),
        None => (moved_to.clone(), moved_to.clone()),
    };
    refuse(format!(
        "the disk has left {} for {image} (`hikkoshi move`), and what was written since is there; serve \
         that: `hikkoshi serve {arguments}`, or name it in the configuration file; it fetches from here \
         by itself what it still lacks; only if {image} is lost for good, and with it all that was written \
         since: remove {}, and this image is served as it was at the switch",
        config.image.display(),
        state_path.display()
    ))
}

/// Refuses the new image where the disk is not in it: before the switch.
pub(in crate::volume) fn check_begun(
    config: &ExportConfig,
    identity: &Identity,
    origin: &ImageAddress,
    state_path: &Path,
) -> Result<(), OpenError> {
    if identity.life == Life::Arriving {
        return Ok(());
    }
    let old_path = state_of(origin)?;
    let fenced = StateDir::whose(&old_path)?.and_then(|old| old.ties.departed);
    let fenced = fenced.is_some_and(|departed| departed.to == identity.volume_id);
    match (identity.life, fenced) {
        (Life::Standby, true) => return Ok(()),
        (Life::GivenUp, true) => {
            // Killed before the old volume heard of it.
            let mut old = StateDir::open(&old_path)?;
            old.change(|old| {
                old.ties.departed = None;
                old.ties.moved_to = None;
            })?;
        }
        _ => {}
    }
    refuse(format!(
        "the move into {} did not come to the switch, so the disk is in {}: `hikkoshi serve {}`; then \
         `hikkoshi move` may begin it anew, or {} and {} be removed",
        config.image.display(),
        origin.image.display(),
        origin.arguments(),
        config.image.display(),
        state_path.display()
    ))
}

fn config_of(config: &ExportConfig, origin: &ImageAddress) -> ExportConfig {
    ExportConfig {
        image: origin.image.clone(),
        state_dir: origin.state_dir.clone(),
        read_only: false,
        source: None,
        ..config.clone()
    }
}

fn state_of(origin: &ImageAddress) -> Result<std::path::PathBuf, OpenError> {
    match &origin.state_dir {
        Some(dir) => Ok(dir.clone()),
        None => {
            let mut name = origin.image.file_name().unwrap_or_default().to_owned();
            name.push(".hikkoshi");
            Ok(origin.image.with_file_name(name))
        }
    }
}

/// Opens the image that the disk has left, of which not all is in the new one: it is read, and
/// nothing else.
pub(in crate::volume) fn open_old(
    config: &ExportConfig,
    identity: &Identity,
    origin: &ImageAddress,
) -> Result<Running, OpenError> {
    let old = config_of(config, origin);
    let path = state_path(&old)?;
    let (new, from) = (config.image.display(), origin.image.display());
    if !old.image.exists() || StateDir::look(&path)? != Found::State {
        return refuse(format!(
            "not all of the disk is in {new} yet, and {from} with its state {}, where the rest is, \
             cannot be found; bring them back to where they were",
            path.display()
        ));
    }
    let state = StateDir::open(&path)?;
    let departed = state.identity().ties.departed;
    if !departed.is_some_and(|departed| departed.to == identity.volume_id && departed.intact)
        || state.identity().life != Life::Local
    {
        return refuse(format!(
            "not all of the disk is in {new} yet, and {from} is not the image that it has left any more: \
             it may have been written since; bring the right one back"
        ));
    }
    open_complete(&old, state, &path)
}
