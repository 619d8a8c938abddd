//! Opening a volume from its configuration, and closing it.
//!
//! Most of this is refusing: an image whose state is gone, a state whose image is gone, a source
//! that is another one, data that would be overwritten. Nothing is guessed, and nothing is changed
//! before all of it is known to fit.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::geometry::{DEFAULT_BLOCK_BYTES, Geometry, GeometryError};
use hikkoshi_engine::mover::Mover;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_nbd::uri::NbdUri;
use hikkoshi_nbd::wire;
use hikkoshi_store::live::{self, LiveFile, OpenedMap};
use hikkoshi_store::state::{Found, Identity, Life, StateDir, StateError, Ties};
use hikkoshi_store::suspect::{self, Mark as _, RewriteError};
use hikkoshi_store::{EngineChoice, FileStore, OpenOptions, Store, StoreError};
use hikkoshi_wan::nbd_source::{NbdSource, NbdSourceConfig};
use hikkoshi_wan::transport::session::{Stance, Tell};
use hikkoshi_wan::{MoveLine, MoveLink, Source, SourceError, SourceErrorKind, SourceInfo, Ticket};

use super::arrival::Arrival;
use super::assemble::{Moving, Parts};
use super::commit::Beats;
use super::departure::MakeState;
use super::last_word::{self, LastWord};
use super::open_tied::{check_for_return, open_recorded, open_return, tell_doubt};
use super::seeding::SeedImage;
use super::storage::{self, ImageAddress};
use super::ties::{
    first_life, overwritten_of, settle_base, settle_doubt, settle_lacking, settle_way_back,
};
use super::{Volume, system_clock};
use crate::config::{
    Engine, ExportConfig, HandoffPolicy, MAX_SEED_IMAGES, SourceConfig, SourceLoss, Transport,
};
use crate::events::EventKind;
use crate::heat::{self, HeatFileError};

/// Why an export cannot be opened. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The image.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The durable state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The disk at the source has a shape that is not supported.
    #[error("the source's disk cannot be taken over: {0}")]
    Geometry(#[from] GeometryError),
    /// The source cannot be reached for the first time.
    #[error("cannot reach the source {uri}: {source}")]
    Source {
        /// Its address.
        uri: String,
        /// Why.
        source: SourceError,
    },
    /// An operation on the image failed.
    #[error("{what} the image failed: {source}")]
    Image {
        /// What was tried.
        what: &'static str,
        /// What happened.
        source: io::Error,
    },
    /// A sync failed before this start, and what it left cannot be mended.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    /// The heat map that was named.
    #[error(transparent)]
    Heat(#[from] HeatFileError),
    /// The source did not agree to the handoff that was to happen at once.
    #[error("the handoff at the start failed: {0}")]
    Handoff(io::Error),
    /// A thread could not be started.
    #[error("a thread could not be started: {0}")]
    Thread(io::Error),
    /// What is there does not fit together, or with what was asked for.
    #[error("{0}")]
    Refused(String),
}

impl OpenError {
    /// Whether nothing is wrong but that the source is away: the same may succeed later.
    pub fn is_source_away(&self) -> bool {
        matches!(self, Self::Source { source, .. } if source.kind == SourceErrorKind::Disconnected)
    }
}

/// How long a restart waits for a source before it serves what is here without it. A handshake
/// takes two round trips, and up to seven where options must go one by one.
const FIRST_CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);

/// How long a source may take to make durable that a move was given up.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(5);

/// A source that says nothing for less than this may only be busy.
const SHORTEST_SILENCE: Duration = Duration::from_secs(5);

/// How often the time is told to a volume that only records for the way back.
const QUIET_BEAT: Duration = Duration::from_millis(100);

pub(super) fn refuse<T>(why: impl Into<String>) -> Result<T, OpenError> {
    Err(OpenError::Refused(why.into()))
}

/// A volume with the threads that keep it going.
pub struct Running {
    volume: Arc<Volume>,
    live: Option<Arc<LiveFile>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// The image at this site that the disk leaves, while it is still needed.
    old: Option<Box<Self>>,
    last_word: Option<Box<LastWord>>,
}

impl Running {
    /// Opens an export, new or known.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(config: &ExportConfig) -> Result<Self, OpenError> {
        let state_path = state_path(config)?;
        match (StateDir::look(&state_path)?, &config.source) {
            (Found::State, _) => open_known(config, &state_path),
            (Found::Nothing, None) => open_plain(config, None, false),
            (Found::Nothing | Found::Begun, Some(source)) => open_new(config, source, &state_path),
            (Found::Begun, None) => refuse(format!(
                "a move into {} was begun and cut short before anything had come; give its source \
                 (--from) to begin it anew, or remove {}",
                config.image.display(),
                state_path.display()
            )),
        }
    }

    /// The volume.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    fn start(volume: Arc<Volume>, live: Option<Arc<LiveFile>>) -> Result<Self, OpenError> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let committing = Arc::clone(&volume);
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(run)
                .map_err(OpenError::Thread)
        };
        volume.event(
            EventKind::Opened,
            format!("{} is served", volume.image.display()),
        );
        threads.push(spawn(
            "commit",
            Box::new(move || committing.run_committer()),
        )?);
        if let Some(relocation) = volume.relocation() {
            let (timed, stop) = (Arc::clone(&volume), Arc::clone(&stop));
            threads.push(spawn("tick", Box::new(move || keep_time(&timed, &stop)))?);
            if !volume.is_local() {
                relocation.start();
            }
        }
        if volume.has_seeds() {
            let (volume, stop) = (Arc::clone(&volume), Arc::clone(&stop));
            threads.push(spawn("seed", Box::new(move || volume.run_seeding(&stop)))?);
        }
        if volume.has_arrival() {
            let moving = Arc::clone(&volume);
            threads.push(spawn("move", Box::new(move || moving.keep_move()))?);
        }
        Ok(Self {
            volume,
            live,
            stop,
            threads,
            old: None,
            last_word: None,
        })
    }

    /// Tells the source of this complete move that it is, in the background.
    fn say_that_all_is_here(&mut self, config: &ExportConfig, identity: &Identity) {
        let id = identity.volume_id;
        let ticket = Ticket::new(id, None, Stance::Arriving, true);
        let source = SourceConfig::new(identity.source_uri.clone());
        let begun = source_config(&source, config, Some(&ticket))
            .map_err(|error| error.to_string())
            .and_then(|to| {
                LastWord::begin(&self.volume, id, to).map_err(|error| error.to_string())
            });
        match begun {
            Ok(word) => self.last_word = Some(Box::new(word)),
            Err(why) => tracing::warn!("its source cannot be told that all is here: {why}"),
        }
    }

    /// The image at this site that the disk leaves, if it was opened together with this one.
    pub(crate) fn take_old(&mut self) -> Option<Self> {
        self.old.take().map(|old| *old)
    }

    /// Makes everything durable and lets go of it.
    ///
    /// # Errors
    /// It could not be made durable. What a guest flushed before is.
    pub fn close(mut self) -> io::Result<()> {
        let old = self.take_old();
        let closed = self.close_alone();
        // After the one that reads it.
        let old_closed = old.map_or(Ok(()), Self::close);
        closed.and(old_closed)
    }

    fn close_alone(mut self) -> io::Result<()> {
        self.stop.store(true, Ordering::Release);
        self.volume.stop();
        if let Some(word) = self.last_word.take() {
            word.end();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.volume.settle()?;
        crash_point!("close.recorded");
        if let Err(error) = self.volume.save_heat() {
            tracing::warn!("what was counted of reads and writes is not kept: {error}");
        }
        // Only now: while it is there, it is what a restart believes.
        if let Some(live) = &self.live {
            live.remove();
        }
        crash_point!("close.forgotten");
        Ok(())
    }
}

/// The thread that keeps the time.
fn keep_time(volume: &Arc<Volume>, stop: &AtomicBool) {
    let mut beats = Beats::default();
    while !stop.load(Ordering::Acquire) && volume.keep_time(&mut beats) {
        // Where all is here, there is only a commit to ask for now and then.
        let beat = if volume.is_local() {
            QUIET_BEAT
        } else {
            Mover::<()>::TICK
        };
        std::thread::sleep(beat);
    }
}

pub(super) fn state_path(config: &ExportConfig) -> Result<PathBuf, OpenError> {
    if let Some(path) = &config.state_dir {
        return Ok(path.clone());
    }
    let Some(name) = config.image.file_name() else {
        return refuse(format!(
            "{} is no file; name an image",
            config.image.display()
        ));
    };
    let mut name = name.to_owned();
    name.push(".hikkoshi");
    Ok(config.image.with_file_name(name))
}

/// Whether the disk is to come from a source, and nothing of it has yet; or is to come back, which
/// cannot begin without the source either.
pub(crate) fn is_first_start(config: &ExportConfig) -> bool {
    let Some(source) = &config.source else {
        return false;
    };
    let found = state_path(config).and_then(|path| Ok(StateDir::look(&path)?));
    source.comes_back || matches!(found, Ok(Found::Nothing | Found::Begun))
}

fn heat_place(config: &ExportConfig) -> Result<Option<PathBuf>, OpenError> {
    Ok(heat::place_of(config, &state_path(config)?))
}

fn engine(config: &ExportConfig) -> EngineChoice {
    match config.engine {
        Engine::Auto => EngineChoice::Auto,
        Engine::Threads => EngineChoice::Threads,
        Engine::IoUring => EngineChoice::IoUring,
    }
}

// The three ways to open

/// An image that needs nobody: it never had a source, or has everything from it.
pub(super) fn open_plain(
    config: &ExportConfig,
    mut state: Option<StateDir>,
    had_source: bool,
) -> Result<Running, OpenError> {
    let options = OpenOptions {
        read_only: config.read_only,
        create_with_size: None,
        engine: engine(config),
    };
    let store = FileStore::open(&config.image, options)?;
    if !had_source && tag_of(&store)?.is_some() {
        return refuse(format!(
            "{} is only partly here: a move into it has begun, and its state directory is gone; \
             bring that back (or name it with --state), or discard the image",
            config.image.display()
        ));
    }
    let rewritten = if config.read_only {
        None
    } else {
        settle_image(config, &store)?
    };
    if let Some(state) = state.as_mut().filter(|_| !config.read_only) {
        live::open_complete(state, &state_path(config)?, &live::default_dir())?;
        set_tag(&store, &[])?;
        crash_point!("local.tag-removed");
    }
    let make_state = Some(state_maker(config, &store)?);
    // A device may be larger than the disk that moved onto it.
    let size_bytes = match state.as_ref().filter(|_| had_source) {
        Some(state) => state
            .identity()
            .geometry
            .size_bytes()
            .min(store.size_bytes()),
        None => store.size_bytes(),
    };
    let geometry = Geometry::new(size_bytes, config.block_bytes)?;
    let parts = Parts {
        config,
        geometry,
        store: Arc::new(store),
        state,
        had_source,
        clock: system_clock(),
        heat_place: heat_place(config)?,
        make_state,
    };
    let running = Running::start(parts.plain(), None)?;
    tell_rewritten(&running, rewritten);
    Ok(running)
}

/// What makes the state of a plain image, once a move away from it begins.
fn state_maker(config: &ExportConfig, store: &FileStore) -> Result<MakeState, OpenError> {
    let path = state_path(config)?;
    let size_bytes = store.size_bytes();
    let (block_bytes, image_inode) = (config.block_bytes, inode_of(store)?);
    let lasting = check_state_place(config, &path).map_err(|e| e.to_string());
    Ok(Box::new(move || {
        if let Err(why) = &lasting {
            return Err(StateError::Live(why.clone()));
        }
        let geometry = Geometry::new(size_bytes, block_bytes)
            .map_err(|error| StateError::Live(error.to_string()))?;
        let identity = Identity {
            volume_id: live::random()?,
            geometry,
            generation: 0,
            life: Life::Local,
            source_uri: String::new(),
            incarnation: live::random()?,
            image_inode,
            ties: Ties::default(),
        };
        StateDir::create_complete(&path, identity)
    }))
}

/// The first start of a move.
fn open_new(
    config: &ExportConfig,
    wanted: &SourceConfig,
    state_path: &Path,
) -> Result<Running, OpenError> {
    check_state_place(config, state_path)?;
    // What is wrong here is said before anybody else is asked.
    let seeds = open_seeds(wanted, &config.image)?;
    // A file of no size is what a power cut leaves of one that was being made.
    let begun = |meta: &std::fs::Metadata| meta.is_file() && meta.len() == 0;
    let existing = match std::fs::metadata(&config.image) {
        Ok(meta) if !begun(&meta) => Some(open_existing(config)?),
        _ => None,
    };
    if let Some(store) = existing.as_ref().filter(|_| !wanted.overwrite) {
        check_untagged(config, store)?;
    }
    let volume_id = live::random()?;
    let ticket = Ticket::new(volume_id, None, Stance::Standby, false);
    let source = connect(wanted, config, &ticket).map_err(|source| OpenError::Source {
        uri: wanted.uri.clone(),
        source,
    })?;
    let fenced_source = ticket.settle();
    let geometry = Geometry::new(source.info().size_bytes, config.block_bytes)?;
    let store = match existing {
        Some(store) => fitting(config, store, geometry)?,
        None => fitting(config, create_image(config, geometry)?, geometry)?,
    };
    crash_point!("new.image");
    if !store.is_new() && !wanted.overwrite {
        check_blank(config, &store)?;
    }
    let rewritten = settle_image(config, &store)?;
    let now = wanted.handoff == HandoffPolicy::Now;
    let identity = Identity {
        volume_id,
        geometry,
        generation: 0,
        life: first_life(now, fenced_source),
        source_uri: wanted.uri.clone(),
        incarnation: live::random()?,
        image_inode: inode_of(&store)?,
        ties: Ties {
            fenced_source,
            source_flush_owed: now && !fenced_source && source.info().can_flush,
            by_command: wanted.handoff == HandoffPolicy::Command,
            way_back: wanted.way_back,
            ..Ties::default()
        },
    };
    let tag = identity.volume_id;
    let map = live::create_map(state_path, &live::default_dir(), identity)?;
    set_tag(&store, &tag)?;
    crash_point!("new.tagged");
    let kept = (map, Witnesses::new(seed()?), seeds);
    let running = move_in(config, wanted, store, source, kept, Some(ticket), None)?;
    tell_rewritten(&running, rewritten);
    hand_off_now(&running, now)?;
    Ok(running)
}

/// The handoff that is to happen at the start, where nobody need be asked. Where a source must agree, the
/// thread that keeps the move asks it, so that nothing here waits for one that is away.
pub(super) fn hand_off_now(running: &Running, now: bool) -> Result<(), OpenError> {
    if now && !running.volume.has_arrival() {
        running.volume.hand_off().map_err(OpenError::Handoff)?;
    }
    Ok(())
}

/// An image with a state: the move goes on, or is complete.
fn open_known(config: &ExportConfig, state_path: &Path) -> Result<Running, OpenError> {
    if !config.image.exists() {
        return refuse(format!(
            "{} is gone, but its state {} is there; bring the image back, or remove the state as \
             well to begin anew",
            config.image.display(),
            state_path.display()
        ));
    }
    let mut state = StateDir::open(state_path)?;
    if state.identity().life == Life::GivenUp || state.identity().ties.gave_up {
        // Before the source hears of it: from there on the VM goes on where it was.
        state.confirm()?;
    }
    if state.identity().ties.gave_up {
        say_that_the_return_was_given_up(config, &mut state)?;
    }
    let identity = state.identity().clone();
    if identity.life == Life::Local {
        let returns = config.source.as_ref().filter(|source| source.comes_back);
        if let (Some(_), Some(wanted)) = (identity.ties.departed, returns) {
            return open_return(config, wanted, state, state_path);
        }
        storage::open::check_not_left(config, &identity, state_path)?;
        check_complete(config, &identity, state_path)?;
        let mut running = open_complete(config, state, state_path)?;
        if last_word::is_due(&identity) && !config.read_only {
            running.say_that_all_is_here(config, &identity);
        }
        return Ok(running);
    }
    let origin = ImageAddress::parse(&identity.source_uri);
    if let Some(origin) = &origin {
        storage::open::check_begun(config, &identity, origin, state_path)?;
    }
    if identity.life == Life::GivenUp {
        return open_given_up(config, state, state_path);
    }
    let wanted = source_of(config, &identity)?;
    if identity.ties.only_here {
        check_for_return(&wanted)?;
    }
    let seeds = open_seeds(&wanted, &config.image)?;
    if wanted.uri != identity.source_uri {
        state.change(|identity| identity.source_uri = wanted.uri.clone())?;
    }
    let by_command = wanted.handoff == HandoffPolicy::Command;
    if config.source.is_some() && by_command != identity.ties.by_command {
        state.change(|identity| identity.ties.by_command = by_command)?;
    }
    let asked = u64::from(config.block_bytes);
    if asked != u64::from(DEFAULT_BLOCK_BYTES) && asked != identity.geometry.block_bytes() {
        return refuse(format!(
            "the move has begun with blocks of {} bytes; leave --block-size away",
            identity.geometry.block_bytes()
        ));
    }
    let store = fitting(config, open_existing(config)?, identity.geometry)?;
    check_belongs(config, &store, &identity, state_path)?;
    let base = settle_base(&mut state, &store)?;
    let ticket = identity.ties.fenced_source.then(|| {
        let stance = if identity.life == Life::Standby {
            Stance::Standby
        } else {
            Stance::Arriving
        };
        Ticket::new(identity.volume_id, base, stance, true)
    });
    let mut old = match &origin {
        Some(origin) => Some(storage::open::open_old(config, &identity, origin)?),
        None => None,
    };
    let (source, refused, link) = match &old {
        Some(old) => storage::open::reach(old.volume(), &identity, ticket.as_ref())?,
        None => {
            let (source, refused) = reconnect(&wanted, config, identity.geometry, ticket.as_ref())?;
            (source, refused, None)
        }
    };
    // Before anything is changed: if they are damaged, all is left as it is.
    let witnesses = state.witnesses(seed()?)?;
    forget_what_a_failed_sync_lost(config, &store, &state, state_path)?;
    let rewritten = settle_image(config, &store)?;
    let survived = live::has_survived(&state, state_path, &live::default_dir())?;
    let doubt = settle_doubt(&mut state, &store, survived)?;
    let mut sync = || store.sync();
    let mut map = live::open_map(state, state_path, &live::default_dir(), &mut sync)?;
    settle_lacking(&map.state, &map.residency)?;
    settle_way_back(&mut map, &wanted)?;
    set_tag(&store, &identity.volume_id)?;
    crash_point!("open.tagged");
    let kept = (map, witnesses, seeds);
    let mut running = move_in(config, &wanted, store, source, kept, ticket, link)?;
    tell_doubt(&running, doubt);
    tell_rewritten(&running, rewritten);
    if let (Some(refused), Some(relocation)) = (refused, running.volume.relocation()) {
        relocation.source_told(&refused);
    }
    if origin.is_some() {
        // What was fenced for this image is to be had here and nowhere else, and that is at hand.
        running.volume.hand_off().map_err(OpenError::Handoff)?;
    }
    hand_off_now(&running, wanted.handoff == HandoffPolicy::Now)?;
    running.old = old.take().map(Box::new);
    Ok(running)
}

/// An image with a state of which every block is here.
pub(super) fn open_complete(
    config: &ExportConfig,
    state: StateDir,
    state_path: &Path,
) -> Result<Running, OpenError> {
    let identity = state.identity();
    if identity.ties.departed.is_some_and(|d| !d.intact) {
        return refuse(format!(
            "{} is partly overwritten by a return that was given up, and so no copy of anything; the \
             disk can still come back into it: give --from and --return",
            config.image.display()
        ));
    }
    if identity.ties.way_back && !config.read_only {
        return open_recorded(config, state, state_path);
    }
    let had_source = !identity.source_uri.is_empty();
    open_plain(config, Some(state), had_source)
}

/// A move that was given up before the handoff: nothing here is worth anything.
fn open_given_up(
    config: &ExportConfig,
    state: StateDir,
    state_path: &Path,
) -> Result<Running, OpenError> {
    // It may have been killed before the source heard of it, which may have closed its fence.
    let unheard = match say_that_it_was_given_up(config, state.identity()) {
        Ok(()) => String::new(),
        Err(error) => format!(
            "; its source {} could not be told so ({error}): if it takes no writes, start this \
             again when it can be reached, or lift its fence there with `hikkoshi release --force`",
            state.identity().source_uri
        ),
    };
    let Some(source) = config.source.as_ref().filter(|source| source.overwrite) else {
        return refuse(format!(
            "the move into {} was given up before the VM came here; remove it and {}, or begin \
             anew with --from and --overwrite{unheard}",
            config.image.display(),
            state_path.display()
        ));
    };
    // Its lock goes with it.
    drop(state);
    open_new(config, source, state_path)
}

/// The same of a return into this old copy, which may have been killed before its source heard of it.
fn say_that_the_return_was_given_up(
    config: &ExportConfig,
    state: &mut StateDir,
) -> Result<(), OpenError> {
    let identity = state.identity();
    let ticket = Ticket::new(identity.volume_id, None, Stance::Standby, true);
    let source = SourceConfig::new(identity.source_uri.clone());
    match say_that_it_is_off(config, &source, &ticket) {
        // What answers there is nobody who keeps a fence for it; the right one may be there later.
        Ok(false) => {}
        Ok(true) => state.change(|identity| identity.ties.gave_up = false)?,
        Err(error) => tracing::warn!(
            "the return from {} was given up, and that could not be told there ({error}): if it takes \
             no writes, start this again when it can be reached",
            identity.source_uri
        ),
    }
    Ok(())
}

/// Lets the source of a move that was given up take writes again. Does nothing where it does.
fn say_that_it_was_given_up(config: &ExportConfig, identity: &Identity) -> Result<(), SourceError> {
    if !identity.ties.fenced_source {
        return Ok(());
    }
    let id = identity.volume_id;
    let ticket = Ticket::new(id, identity.ties.base, Stance::Standby, true);
    let wanted = SourceConfig::new(identity.source_uri.clone());
    say_that_it_is_off(config, &wanted, &ticket).map(drop)
}

/// Tells a source that a move will not come about. Whether it has heard; if not, nothing is fenced
/// there for this move.
pub(super) fn say_that_it_is_off(
    config: &ExportConfig,
    wanted: &SourceConfig,
    ticket: &Arc<Ticket>,
) -> Result<bool, SourceError> {
    let id = ticket.id();
    let line = MoveLine::new(NbdSourceConfig {
        connect_timeout: FIRST_CONNECT_TIMEOUT,
        handshake_timeout: FIRST_CONNECT_TIMEOUT,
        ..source_config(wanted, config, Some(ticket))?
    });
    match line.tell(&Tell::Abort { id }, LAST_WORD_TIMEOUT) {
        // It has moved on by another move, or is another disk: nothing is fenced for this one.
        Err(error) if error.kind == SourceErrorKind::Untrusted => Ok(false),
        told => told.map(|_| true),
    }
}

/// What draws the witnesses.
pub(super) fn seed() -> Result<u64, OpenError> {
    let random: [u8; 16] = live::random()?;
    Ok(u64::from_le_bytes(
        random[..8].try_into().expect("eight of sixteen"),
    ))
}

pub(super) fn move_in(
    config: &ExportConfig,
    wanted: &SourceConfig,
    store: FileStore,
    source: Arc<dyn Source>,
    (map, witnesses, seeds): (OpenedMap, Witnesses, Vec<SeedImage>),
    ticket: Option<Arc<Ticket>>,
    link: Option<Arc<dyn MoveLink>>,
) -> Result<Running, OpenError> {
    tracing::debug!("residency found: {:?}", map.recovered);
    let OpenedMap {
        residency,
        state,
        live,
        ..
    } = map;
    let (store, live) = (Arc::new(store), Arc::new(live));
    let parts = Parts {
        config,
        geometry: residency.geometry(),
        store: Arc::clone(&store) as Arc<dyn Store>,
        state: Some(state),
        had_source: true,
        clock: system_clock(),
        heat_place: heat_place(config)?,
        make_state: None,
    };
    let overwritten = parts.state.as_ref().map(overwritten_of).unwrap_or_default();
    let arrival = match ticket.filter(|_| parts.fenced_source()) {
        Some(ticket) => {
            let arrival = match link {
                Some(link) => Arrival::new(ticket, link, wanted, parts.geometry),
                None => arrival(config, wanted, ticket, parts.geometry)?,
            };
            let arrival = arrival.with_overwritten(overwritten);
            Some(match parts.only_here() {
                true => arrival.with_old_copy_needed(parts.life() != Some(Life::Standby)),
                false => arrival,
            })
        }
        None => None,
    };
    let memory = Arc::clone(&live);
    let volume = parts.moving(Moving {
        wanted,
        source,
        residency,
        witnesses,
        arrival,
        at_release: Box::new(move || {
            memory.remove();
            crash_point!("completion.memory-removed");
        }),
        at_completion: Box::new(move || {
            if let Err(e) = set_tag(&store, &[]) {
                tracing::warn!("the mark of a move could not be taken off the image: {e}");
            }
            crash_point!("completion.tag-removed");
        }),
    });
    volume.seed_from(seeds);
    if let Some(recorded) = &wanted.heat {
        heat::replay(volume.heat(), recorded)?;
    }
    if let Some(relocation) = volume.relocation() {
        relocation.set_order(volume.heat().map().order(volume.geometry()));
    }
    Running::start(volume, Some(live))
}

fn arrival(
    config: &ExportConfig,
    wanted: &SourceConfig,
    ticket: Arc<Ticket>,
    geometry: Geometry,
) -> Result<Arrival, OpenError> {
    let failed = |source| OpenError::Source {
        uri: wanted.uri.clone(),
        source,
    };
    let line = source_config(wanted, config, Some(&ticket)).map_err(failed)?;
    let link = Arc::new(MoveLine::new(line));
    Ok(Arrival::new(ticket, link, wanted, geometry))
}

pub(super) fn open_seeds(wanted: &SourceConfig, image: &Path) -> Result<Vec<SeedImage>, OpenError> {
    if wanted.seed_images.len() > MAX_SEED_IMAGES {
        return refuse(format!(
            "{} seed images are too many: at most {MAX_SEED_IMAGES} can be looked through",
            wanted.seed_images.len()
        ));
    }
    let open = |path: &PathBuf| {
        SeedImage::open(path, image).or_else(|error| {
            refuse(format!(
                "the seed image {} cannot be read: {error}; name an image file or a block device \
                 that can, or leave it away",
                path.display()
            ))
        })
    };
    wanted.seed_images.iter().map(open).collect()
}

// The image

pub(super) fn open_existing(config: &ExportConfig) -> Result<FileStore, OpenError> {
    let options = OpenOptions {
        read_only: false,
        create_with_size: None,
        engine: engine(config),
    };
    Ok(FileStore::open(&config.image, options)?)
}

pub(super) fn create_image(
    config: &ExportConfig,
    geometry: Geometry,
) -> Result<FileStore, OpenError> {
    let options = OpenOptions {
        read_only: false,
        create_with_size: Some(geometry.size_bytes()),
        engine: engine(config),
    };
    Ok(FileStore::open(&config.image, options)?)
}

/// The image, if it can hold the disk.
pub(super) fn fitting(
    config: &ExportConfig,
    store: FileStore,
    geometry: Geometry,
) -> Result<FileStore, OpenError> {
    let size = geometry.size_bytes();
    let fits = store.size_bytes() == size || store.is_block_device() && store.size_bytes() > size;
    if !fits {
        return refuse(format!(
            "{} has {} bytes, and the disk has {size}; they must be the same",
            config.image.display(),
            store.size_bytes()
        ));
    }
    Ok(store)
}

/// Writes everything once more that syncs of an earlier process may have left in the page cache
/// alone. Tells how many bytes, if any had failed.
pub(super) fn settle_image(
    config: &ExportConfig,
    store: &FileStore,
) -> Result<Option<u64>, RewriteError> {
    let image = config.image.display();
    let mut told = None;
    let mut progress = |at: u64| {
        let gib = at >> 30;
        if told != Some(gib) {
            told = Some(gib);
            tracing::warn!(
                "a sync of {image} failed before this start: all of it is written once more, {gib} \
                 GiB of {} done",
                store.size_bytes() >> 30
            );
        }
    };
    suspect::settle(store, store.mark(), &mut progress)
}

/// Where a sync has failed before this start: what was copied since the last one that did not, and may
/// be nowhere, is copied once more. What guests wrote cannot be had again, and is kept as it is read.
fn forget_what_a_failed_sync_lost(
    config: &ExportConfig,
    store: &FileStore,
    state: &StateDir,
    state_path: &Path,
) -> Result<(), OpenError> {
    let raised = store.mark().is_raised();
    if !raised.map_err(|source| OpenError::Image {
        what: "looking for failed syncs of",
        source,
    })? {
        return Ok(());
    }
    let blocks = live::forget_unrecorded(state, state_path, &live::default_dir())?;
    if blocks > 0 {
        tracing::warn!(
            "a sync of {} failed before this start: {} bytes that had been copied and were not recorded \
             are copied once more",
            config.image.display(),
            blocks.saturating_mul(state.identity().geometry.block_bytes())
        );
    }
    Ok(())
}

pub(super) fn tell_rewritten(running: &Running, bytes: Option<u64>) {
    if let Some(bytes) = bytes {
        running.volume.event(
            EventKind::Rewritten,
            format!(
                "a sync failed before this start: {bytes} bytes of the image were written once \
                 more and are durable"
            ),
        );
    }
}

pub(super) fn check_untagged(config: &ExportConfig, store: &FileStore) -> Result<(), OpenError> {
    if tag_of(store)?.is_some() {
        return refuse(format!(
            "{} is only partly here: a move into it has begun, and its state directory is gone; \
             bring that back (or name it with --state); to throw away what was written here and \
             begin anew, give --overwrite",
            config.image.display()
        ));
    }
    Ok(())
}

pub(super) fn check_blank(config: &ExportConfig, store: &FileStore) -> Result<(), OpenError> {
    let blank = store.looks_blank().map_err(|source| OpenError::Image {
        what: "looking for data in",
        source,
    })?;
    if !blank {
        return refuse(format!(
            "{} holds data already, and the source's would take its place; name another image, or \
             give --overwrite",
            config.image.display()
        ));
    }
    Ok(())
}

/// The state must outlive a power cut, which nothing below /dev does.
pub(super) fn check_state_place(config: &ExportConfig, state_path: &Path) -> Result<(), OpenError> {
    if config.state_dir.is_none()
        && state_path.starts_with("/dev")
        && !state_path.starts_with("/dev/shm")
    {
        return refuse(format!(
            "{} is a device, and a state beside it would be gone after a restart; say with --state \
             where the state is to be kept",
            config.image.display()
        ));
    }
    Ok(())
}

fn check_belongs(
    config: &ExportConfig,
    store: &FileStore,
    identity: &Identity,
    state_path: &Path,
) -> Result<(), OpenError> {
    let foreign = || {
        refuse(format!(
            "{} is not the image that the state {} belongs to; bring the right one back, or \
             discard the state together with what was written here",
            config.image.display(),
            state_path.display()
        ))
    };
    match tag_of(store)? {
        Some(tag) if tag == identity.volume_id => Ok(()),
        Some(_) => foreign(),
        // No mark: a file system without them, or another file.
        None if identity.image_inode.is_some() && inode_of(store)? != identity.image_inode => {
            foreign()
        }
        None => Ok(()),
    }
}

pub(super) fn inode_of(store: &FileStore) -> Result<Option<u64>, OpenError> {
    if store.is_block_device() {
        return Ok(None);
    }
    let identity = store.identity().map_err(|source| OpenError::Image {
        what: "looking at",
        source,
    })?;
    Ok(Some(identity.inode))
}

/// The mark of an image that is not complete.
fn tag_of(store: &FileStore) -> Result<Option<Vec<u8>>, OpenError> {
    match store.volume_tag() {
        Ok(tag) => Ok(tag.filter(|t| !t.is_empty())),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(None),
        Err(source) => Err(OpenError::Image {
            what: "reading the mark of",
            source,
        }),
    }
}

pub(super) fn set_tag(store: &FileStore, tag: &[u8]) -> Result<(), OpenError> {
    match store.set_volume_tag(tag) {
        Err(e) if e.kind() != io::ErrorKind::Unsupported => Err(OpenError::Image {
            what: "marking",
            source: e,
        }),
        _ => Ok(()),
    }
}

// The source

fn check_complete(
    config: &ExportConfig,
    identity: &Identity,
    state_path: &Path,
) -> Result<(), OpenError> {
    if identity.ties.departed.is_some()
        && let Some(source) = &config.source
        && source.uri != identity.source_uri
    {
        return refuse(format!(
            "{} is the old copy of a disk that has moved on; to bring it back from {}, give \
             --return: only what has changed since is copied",
            config.image.display(),
            source.uri
        ));
    }
    match &config.source {
        Some(source) if source.uri != identity.source_uri => refuse(format!(
            "{} is complete already: it came from {}; to let a disk from {} take its place, remove \
             {} and give --overwrite",
            config.image.display(),
            identity.source_uri,
            source.uri,
            state_path.display()
        )),
        _ => Ok(()),
    }
}

/// The source to go on with: the recorded one, unless it is said to have moved.
fn source_of(config: &ExportConfig, identity: &Identity) -> Result<SourceConfig, OpenError> {
    let Some(source) = &config.source else {
        return Ok(SourceConfig::new(identity.source_uri.clone()));
    };
    if source.uri != identity.source_uri && !source.moved {
        return refuse(format!(
            "the move has begun from {}, and cannot go on from {}; if that is the same disk at a \
             new address, give --source-moved",
            identity.source_uri, source.uri
        ));
    }
    Ok(source.clone())
}

fn source_config(
    wanted: &SourceConfig,
    export: &ExportConfig,
    ticket: Option<&Arc<Ticket>>,
) -> Result<NbdSourceConfig, SourceError> {
    let bad = |why: String| SourceError::new(SourceErrorKind::Untrusted, why);
    let parsed: NbdUri = match wanted.uri.parse() {
        Ok(parsed) => parsed,
        Err(_) if !wanted.uri.contains("://") => NbdUri::unix(Path::new(&wanted.uri), ""),
        Err(e) => return Err(bad(e.to_string())),
    };
    if parsed.tls {
        return Err(bad(
            "TLS is not supported yet; use nbd:// over a tunnel".into()
        ));
    }
    let mut config = NbdSourceConfig::new(parsed.address, parsed.export);
    config.uri.clone_from(&wanted.uri);
    config.connections = wanted.connections.max(1);
    config.frames = export.transport == Transport::Auto;
    config.packing = export.compress;
    config.ticket = ticket.cloned();
    // After the handoff nobody writes at the source, so connections cannot disagree; before it,
    // nothing that is read is kept.
    config.several_without_promise = true;
    if let SourceLoss::Error(after) = wanted.on_loss {
        // A source that falls silent without hanging up is to be noticed in about that time too.
        let silence = after.clamp(SHORTEST_SILENCE, config.dead_peer_timeout);
        config.progress_timeout = Some(silence);
        config.dead_peer_timeout = silence;
    }
    Ok(config)
}

pub(super) fn connect(
    wanted: &SourceConfig,
    export: &ExportConfig,
    ticket: &Arc<Ticket>,
) -> Result<Arc<dyn Source>, SourceError> {
    let config = source_config(wanted, export, Some(ticket))?;
    Ok(NbdSource::connect(config)?)
}

/// A source that may be away right now, or not be believed, and then why not.
fn reconnect(
    wanted: &SourceConfig,
    export: &ExportConfig,
    geometry: Geometry,
    ticket: Option<&Arc<Ticket>>,
) -> Result<(Arc<dyn Source>, Option<SourceError>), OpenError> {
    let failed = |source| OpenError::Source {
        uri: wanted.uri.clone(),
        source,
    };
    let config = source_config(wanted, export, ticket).map_err(failed)?;
    // What is here is to be served soon, wherever the source is.
    let soon = NbdSourceConfig {
        connect_timeout: FIRST_CONNECT_TIMEOUT,
        handshake_timeout: FIRST_CONNECT_TIMEOUT,
        ..config.clone()
    };
    match NbdSource::connect(soon) {
        Ok(source) if source.info().size_bytes == geometry.size_bytes() => Ok((source, None)),
        Ok(source) => refuse(format!(
            "the disk at {} has {} bytes now, and had {} when the move began; it is another one",
            wanted.uri,
            source.info().size_bytes,
            geometry.size_bytes()
        )),
        Err(e) if e.kind == SourceErrorKind::Disconnected || ticket.is_some() => {
            tracing::warn!("nothing can be fetched yet: {e}; what is here is served");
            let expected = SourceInfo {
                size_bytes: geometry.size_bytes(),
                read_only: false,
                can_multi_conn: false,
                // Asked anew once it is there; one that cannot say answers that all is data.
                has_extents: true,
                // The same: nothing is owed by one that cannot.
                can_flush: true,
                min_block_bytes: 1,
                max_read_bytes: wire::MAX_PAYLOAD_BYTES,
                uri: wanted.uri.clone(),
            };
            let source = NbdSource::connect_lazily(config, expected).map_err(failed)?;
            Ok((source, (e.kind == SourceErrorKind::Untrusted).then_some(e)))
        }
        Err(e) => Err(failed(e)),
    }
}
