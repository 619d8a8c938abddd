//! The durable state of a volume that is not complete: identity, snapshot, log.
//!
//! Three files in the state directory, described in `docs/on-disk.md`: `volume` says whose state
//! it is, `map` is the residency at the start of an epoch, `log` the commits since. Every write
//! here is durable when it returns. A failed one makes the state unusable until it is opened
//! again: what reached the medium is not known then, and is not guessed at.
//!
//! With one exception: where there is no space ([`StateError::is_no_space`]), it is known. A file
//! that is replaced is still the one before, and a commit that was not synced is claimed by nobody and
//! is written again to the same place. The state stays usable, and the same may be tried again.

mod identity;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::blocks::BlockSet;
use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::journal::{
    self, Bases, FRAME_ALIGN, JournalError, Record, VolumeId, encode_frame, encode_snapshot,
};
use hikkoshi_engine::residency::Residency;
use hikkoshi_engine::witness::Witnesses;

use crate::lock::{self, Locked};
use crate::medium::{self, Directory, DurableFile, FsDirectory};
pub use identity::{Departure, Identity, IdentityError, Life, Ties, hex};

const VOLUME: &str = "volume";
const MAP: &str = "map";
const LOG: &str = "log";
const LOCK: &str = "lock";
const WITNESSES: &str = "witnesses";
const BASES: &str = "bases";
const OVERWRITTEN: &str = "overwritten";
/// Not kept here; but it goes with the state.
const HEAT: &str = "heat";
const LACKING: &str = "lacking";

/// Bounds of the log, in bytes. It may grow to a quarter of the map before a snapshot is written,
/// so that snapshots cost at most a few times what the commits do.
const MIN_LOG_BYTES: u64 = 4 << 20;
const MAX_LOG_BYTES: u64 = 256 << 20;

/// How many times its bound the log may have while there is no space for a snapshot: all of it is
/// read at the start, and recorded blocks do not repeat, so that more would only be waste.
const LOG_PATIENCE: u64 = 4;

/// So much of the log is written with zeroes beforehand: appending there changes no metadata.
const PREALLOCATED_BYTES: usize = 4 << 20;

/// Why a state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The medium failed.
    #[error("{what} {path} failed: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// A file that must be there is not.
    #[error(
        "{path} is missing, so nothing is known of which blocks are here; restore the state \
         directory from where it went, or discard it together with the image"
    )]
    Missing {
        /// Which.
        path: PathBuf,
    },
    /// The identity cannot be read.
    #[error("{path} cannot be believed: {source}; restore it, or discard it with the image")]
    Identity {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: IdentityError,
    },
    /// The snapshot or the log cannot be read.
    #[error("{path} cannot be believed: {source}; restore it, or discard it with the image")]
    Journal {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: JournalError,
    },
    /// What proves that a source is the right one cannot be read.
    #[error(
        "{path} cannot be believed: {source}; restore it, or, if you are sure of the source, remove \
         this file alone: it only serves to recognise the source's disk"
    )]
    Witnesses {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: JournalError,
    },
    /// Another process uses it.
    #[error(
        "{path} is in use by {holder}: stop that first; two daemons on one image would destroy it"
    )]
    InUse {
        /// The lock file.
        path: PathBuf,
        /// Who has it, as well as it is known.
        holder: String,
    },
    /// The memory of the running volume cannot be had.
    #[error("{0}")]
    Live(String),
    /// An earlier write failed.
    #[error("an earlier write of the durable state failed; restart the daemon")]
    Poisoned,
}

impl StateError {
    /// Whether there was no room for it: nothing is spoilt, and it may be tried again.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if medium::is_no_space(source))
    }

    /// The same as an `io::Error`, with the number that says most.
    pub fn into_io(self) -> io::Error {
        if self.is_no_space() {
            return io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        }
        io::Error::other(self)
    }
}

/// What there is of a state, before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// What a crash in [`StateDir::create`] leaves: nothing was ever recorded in it, and it is made
    /// anew by the next [`StateDir::create`].
    Begun,
    /// A state, whole or not.
    State,
}

/// The open state of a volume.
#[derive(Debug)]
pub struct StateDir {
    dir: Box<dyn Directory>,
    identity: Identity,
    log: Box<dyn DurableFile>,
    epoch: u64,
    seq: u64,
    log_bytes: u64,
    /// A log of so many bytes is due for a snapshot.
    log_limit: u64,
    /// There is a map, to be loaded and to be added to.
    has_map: bool,
    poisoned: bool,
    /// Held, not read: the lock ends with it.
    _lock: Option<File>,
}

impl StateDir {
    /// Looks for a state at `path`, complete or not.
    ///
    /// # Errors
    /// The medium fails.
    pub fn look(path: &Path) -> Result<Found, StateError> {
        Self::look_in(&FsDirectory::new(path))
    }

    /// [`StateDir::look`] in any directory.
    ///
    /// # Errors
    /// The medium fails.
    pub fn look_in(dir: &dyn Directory) -> Result<Found, StateError> {
        let read = |name| {
            dir.read(name).map_err(|source| StateError::Io {
                what: "reading",
                path: dir.path(name),
                source,
            })
        };
        if read(VOLUME)?.is_some() {
            return Ok(Found::State);
        }
        // The files of a new state are made in the order log, map, volume. Without the last one,
        // and with nothing in the others, this is a creation that was cut short; with anything in
        // them it is a state that has lost its identity.
        let (map, log) = (read(MAP)?, read(LOG)?);
        let is_empty = match (&map, &log) {
            (None, None) => return Ok(Found::Nothing),
            (_, None) => false,
            (map, Some(log)) => {
                log.iter().all(|byte| *byte == 0)
                    && map.as_ref().is_none_or(|map| journal::is_new_snapshot(map))
            }
        };
        Ok(if is_empty { Found::Begun } else { Found::State })
    }

    /// Whose state is at `path`, without opening it: nothing of it is kept from others.
    ///
    /// # Errors
    /// The medium fails, or it cannot be believed.
    pub fn whose(path: &Path) -> Result<Option<Identity>, StateError> {
        let dir = FsDirectory::new(path);
        let content = dir.read(VOLUME).map_err(|source| StateError::Io {
            what: "reading",
            path: dir.path(VOLUME),
            source,
        })?;
        let decode = |content: Vec<u8>| {
            Identity::decode(&content).map_err(|source| StateError::Identity {
                path: dir.path(VOLUME),
                source,
            })
        };
        content.map(decode).transpose()
    }

    /// Removes the state at `path`, and the directory if nothing else is in it. Nobody may have it
    /// open.
    ///
    /// # Errors
    /// The medium fails; what is left is refused, or begun anew.
    pub fn discard(path: &Path) -> Result<(), StateError> {
        let dir = FsDirectory::new(path);
        // Whose it is goes last: anything without it counts as damaged.
        for name in [
            MAP,
            LOG,
            WITNESSES,
            BASES,
            OVERWRITTEN,
            LACKING,
            HEAT,
            VOLUME,
            LOCK,
        ] {
            remove(&dir, name)?;
        }
        // Not empty, it is somebody else's as well.
        let _ = std::fs::remove_dir(path);
        Ok(())
    }

    /// Makes the state of a plain image, all of which is here: its identity and nothing else.
    ///
    /// # Errors
    /// The medium fails, or another process uses it.
    pub fn create_complete(path: &Path, identity: Identity) -> Result<Self, StateError> {
        make_directory(path)?;
        let lock = take_lock(path)?;
        let dir: Box<dyn Directory> = Box::new(FsDirectory::new(path));
        put(&*dir, VOLUME, &identity.encode())?;
        Ok(Self::complete(dir, identity, Some(lock)))
    }

    /// Makes the state of a new volume, of which nothing is here.
    ///
    /// # Errors
    /// The medium fails, or another process uses it.
    pub fn create(path: &Path, identity: Identity) -> Result<Self, StateError> {
        make_directory(path)?;
        let lock = take_lock(path)?;
        Self::create_in(Box::new(FsDirectory::new(path)), identity, Some(lock))
    }

    /// [`StateDir::create`] in any directory.
    ///
    /// # Errors
    /// The medium fails.
    pub fn create_in(
        dir: Box<dyn Directory>,
        identity: Identity,
        lock: Option<File>,
    ) -> Result<Self, StateError> {
        let map = journal::empty_snapshot(identity.volume_id, 0, identity.geometry);
        // Those of a volume that was here before would be taken for damage.
        for name in [WITNESSES, BASES, OVERWRITTEN, LACKING] {
            remove(&*dir, name)?;
        }
        let made = put(&*dir, LOG, &vec![0; PREALLOCATED_BYTES])
            .and_then(|()| put(&*dir, MAP, &map))
            // Last: with it the state counts as there.
            .and_then(|()| put(&*dir, VOLUME, &identity.encode()));
        if let Err(error) = made {
            // Half a state would be taken for a damaged one at the next attempt.
            for name in [VOLUME, MAP, LOG] {
                let _ = dir.remove(name);
            }
            return Err(error);
        }
        Self::opened(dir, identity, 0, lock)
    }

    fn opened(
        dir: Box<dyn Directory>,
        identity: Identity,
        epoch: u64,
        lock: Option<File>,
    ) -> Result<Self, StateError> {
        let log = dir.open(LOG).map_err(|source| {
            let path = dir.path(LOG);
            if source.kind() == io::ErrorKind::NotFound {
                return StateError::Missing { path };
            }
            StateError::Io {
                what: "opening",
                path,
                source,
            }
        })?;
        Ok(Self {
            log_limit: log_limit(identity.geometry),
            dir,
            identity,
            log,
            epoch,
            seq: 0,
            log_bytes: 0,
            has_map: true,
            poisoned: false,
            _lock: lock,
        })
    }

    /// Opens what [`StateDir::create`] made. What it knows is brought into memory by
    /// [`StateDir::load`]; nothing may be appended before a [`StateDir::checkpoint`].
    ///
    /// # Errors
    /// Anything is missing, damaged, or in use. Nothing is changed then.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let lock = take_lock(path)?;
        Self::open_in(Box::new(FsDirectory::new(path)), Some(lock))
    }

    /// [`StateDir::open`] in any directory.
    ///
    /// # Errors
    /// As [`StateDir::open`].
    pub fn open_in(dir: Box<dyn Directory>, lock: Option<File>) -> Result<Self, StateError> {
        let identity =
            Identity::decode(&get(&*dir, VOLUME)?).map_err(|source| StateError::Identity {
                path: dir.path(VOLUME),
                source,
            })?;
        if !identity.keeps_map() {
            return Ok(Self::complete(dir, identity, lock));
        }
        let epoch = get(&*dir, MAP).and_then(|map| {
            journal::snapshot_epoch(&map, identity.volume_id, identity.geometry).map_err(|source| {
                StateError::Journal {
                    path: dir.path(MAP),
                    source,
                }
            })
        });
        // All of the disk is here: that the map is damaged must not keep anybody from it.
        let spare = identity.life == Life::Local;
        match epoch {
            Err(StateError::Missing { .. } | StateError::Journal { .. }) if spare => {
                Ok(Self::complete(dir, identity, lock))
            }
            epoch => Self::opened(dir, identity, epoch?, lock),
        }
    }

    /// Whether it tells which blocks are here. One that should and does not was damaged.
    pub fn has_map(&self) -> bool {
        self.has_map
    }

    fn complete(dir: Box<dyn Directory>, identity: Identity, lock: Option<File>) -> Self {
        Self {
            log: Box::new(NoLog),
            log_limit: log_limit(identity.geometry),
            dir,
            identity,
            epoch: 0,
            seq: 0,
            log_bytes: 0,
            has_map: false,
            poisoned: false,
            _lock: lock,
        }
    }

    /// Brings the snapshot and the log into an empty residency.
    ///
    /// # Errors
    /// Anything is missing or damaged; the residency is not to be used then.
    pub fn load(&self, residency: &Residency) -> Result<(), StateError> {
        let map = get(&*self.dir, MAP)?;
        let bad = |name| {
            let path = self.dir.path(name);
            move |source| StateError::Journal { path, source }
        };
        journal::apply_snapshot(&map, self.volume_id(), residency).map_err(bad(MAP))?;
        let log = get(&*self.dir, LOG)?;
        let end = journal::read_log(&log, self.volume_id(), self.epoch, self.geometry())
            .map_err(bad(LOG))?;
        for record in end.records {
            record.apply(residency).map_err(bad(LOG))?;
        }
        Ok(())
    }

    /// The witnesses that were kept, with `seed` for those to come; none if none were kept.
    ///
    /// # Errors
    /// They are damaged or of another volume.
    pub fn witnesses(&self, seed: u64) -> Result<Witnesses, StateError> {
        let path = self.dir.path(WITNESSES);
        match self.dir.read(WITNESSES) {
            Ok(None) => Ok(Witnesses::new(seed)),
            Ok(Some(content)) => {
                Witnesses::decode(&content, self.volume_id(), self.geometry(), seed)
                    .map_err(|source| StateError::Witnesses { path, source })
            }
            Err(source) => Err(self.failed("reading", WITNESSES, source)),
        }
    }

    /// Keeps witnesses. Nothing else depends on them, so that a failure spoils nothing: those kept
    /// before are still there.
    ///
    /// # Errors
    /// The medium fails.
    pub fn keep_witnesses(&self, witnesses: &Witnesses) -> Result<(), StateError> {
        put(&*self.dir, WITNESSES, &witnesses.encode(self.volume_id()))
    }

    /// Makes this, the state of an old copy, that of the volume that takes the disk back. Until the
    /// last step it is what it was, whatever happens.
    ///
    /// # Errors
    /// The medium fails.
    pub fn begin_return(mut self, identity: Identity) -> Result<Self, StateError> {
        // 1. what was recorded for a way back to here is nobody's now: the disk is elsewhere
        self.end_way_back()?;
        remove(&*self.dir, WITNESSES)?;
        remove(&*self.dir, LACKING)?;
        // 2. a map of which nothing is here
        let map = journal::empty_snapshot(identity.volume_id, 0, identity.geometry);
        put(&*self.dir, LOG, &vec![0; PREALLOCATED_BYTES])?;
        put(&*self.dir, MAP, &map)?;
        crash_point!("return.begun");
        // 3. whose it is
        put(&*self.dir, VOLUME, &identity.encode())?;
        Self::opened(self.dir, identity, 0, self._lock)
    }

    /// What differs from older copies elsewhere; nothing if nothing was kept.
    ///
    /// # Errors
    /// It is damaged or of another volume.
    pub fn bases(&self) -> Result<Bases, StateError> {
        let bases = self.read_bases(BASES, self.volume_id())?;
        Ok(bases.unwrap_or_default())
    }

    /// Keeps what differs from older copies. Nothing else depends on it.
    ///
    /// # Errors
    /// The medium fails: what was kept before is there, or this.
    pub fn keep_bases(&self, bases: &[(VolumeId, BlockSet)]) -> Result<(), StateError> {
        let content = journal::encode_bases(self.volume_id(), self.geometry(), bases);
        put(&*self.dir, BASES, &content)
    }

    /// What may have been overwritten of the old copy that is here, the one since the handoff to
    /// `base`; `None` if that was never recorded.
    ///
    /// # Errors
    /// It is damaged.
    pub fn overwritten(&self, base: VolumeId) -> Result<Option<BlockSet>, StateError> {
        let found = match self.read_bases(OVERWRITTEN, base) {
            // A left-over of an earlier move.
            Err(StateError::Journal {
                source: JournalError::Foreign,
                ..
            }) => None,
            found => found?,
        };
        Ok(found.and_then(|found| Some(found.into_iter().next()?.1)))
    }

    /// Records what may be overwritten of the old copy that is here, before it is.
    ///
    /// # Errors
    /// The medium fails: nothing more may be overwritten.
    pub fn keep_overwritten(&self, base: VolumeId, set: &BlockSet) -> Result<(), StateError> {
        let content = journal::encode_bases(base, self.geometry(), &[(base, set.clone())]);
        put(&*self.dir, OVERWRITTEN, &content)
    }

    /// What is to come from the source, of a disk that has come back over its old copy: all else was
    /// here at the handoff.
    ///
    /// # Errors
    /// It is missing or damaged: then nobody knows what is here.
    pub fn lacking(&self) -> Result<BlockSet, StateError> {
        let found = self.read_bases(LACKING, self.volume_id())?;
        let found = found.and_then(|found| found.into_iter().next());
        found.map(|(_, set)| set).ok_or(StateError::Missing {
            path: self.dir.path(LACKING),
        })
    }

    fn read_bases(&self, name: &str, owner: VolumeId) -> Result<Option<Bases>, StateError> {
        let content = self.dir.read(name);
        let Some(content) = content.map_err(|source| self.failed("reading", name, source))? else {
            return Ok(None);
        };
        let bases = journal::decode_bases(&content, owner, self.geometry());
        bases.map(Some).map_err(|source| StateError::Journal {
            path: self.dir.path(name),
            source,
        })
    }

    /// Whose state it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    fn volume_id(&self) -> VolumeId {
        self.identity.volume_id
    }

    fn geometry(&self) -> Geometry {
        self.identity.geometry
    }

    /// Adds a commit. Durable when it returns. The data of the records must be durable already.
    ///
    /// # Errors
    /// The medium fails; the state is unusable then, except for want of space.
    pub fn append(&mut self, records: &[Record]) -> Result<(), StateError> {
        self.guarded(|this| {
            let frame = encode_frame(this.volume_id(), this.epoch, this.seq, records);
            if this.log_bytes + frame.len() as u64 > LOG_PATIENCE * this.log_limit {
                let full = io::Error::from(io::ErrorKind::StorageFull);
                return Err(this.failed("making room (for a snapshot) in", LOG, full));
            }
            this.log
                .write_at(this.log_bytes, &frame)
                .map_err(|source| this.failed("writing", LOG, source))?;
            crash_point!("commit.appended");
            // What failed here is not to be believed again, whatever the reason: the kernel may
            // have let go of pages that never reached the medium.
            this.log.sync().map_err(|source| {
                let told = io::Error::other(source);
                this.failed("syncing", LOG, told)
            })?;
            crash_point!("commit.recorded");
            this.seq += 1;
            this.log_bytes += frame.len() as u64;
            Ok(())
        })
    }

    /// Whether the log is so long that a snapshot should be made.
    pub fn needs_checkpoint(&self) -> bool {
        self.log_bytes >= self.log_limit
    }

    /// Has snapshots made of a log of so many bytes already, however small the disk is.
    pub fn limit_log(&mut self, bytes: u64) {
        self.log_limit = bytes;
    }

    /// Begins a new epoch with a snapshot of `residency`, in this order:
    /// 1. the residency is copied; it may speak of data that is not durable yet;
    /// 2. `sync_data` makes that data durable;
    /// 3. the snapshot takes the place of the one before;
    /// 4. the log begins anew. What it held is in the snapshot, and of an epoch that is over.
    ///
    /// # Errors
    /// The medium fails, or `sync_data`; the state is unusable then. Where there is no space for
    /// the snapshot the epoch goes on, with its snapshot and its log.
    pub fn checkpoint(
        &mut self,
        residency: &Residency,
        sync_data: &mut dyn FnMut() -> io::Result<()>,
    ) -> Result<(), StateError> {
        self.guarded(|this| {
            let last = || StateError::Journal {
                path: this.dir.path(MAP),
                source: JournalError::Corrupt("its epoch is the last one there is"),
            };
            let epoch = this.epoch.checked_add(1).ok_or_else(last)?;
            let map = encode_snapshot(this.volume_id(), epoch, residency);
            crash_point!("snapshot.copied");
            sync_data().map_err(|source| {
                this.failed("syncing the image of", VOLUME, io::Error::other(source))
            })?;
            crash_point!("snapshot.synced");
            put(&*this.dir, MAP, &map)?;
            crash_point!("snapshot.done");
            this.epoch = epoch;
            this.seq = 0;
            this.log_bytes = 0;
            Ok(())
        })
    }

    /// Records that the VM runs here. `at_source` is the generation of the source, where it has one.
    ///
    /// # Errors
    /// The medium fails; the state is unusable then.
    pub fn record_arriving(&mut self, at_source: u64) -> Result<(), StateError> {
        self.record_arriving_but(at_source, None, false)
    }

    /// The same for a disk that comes back over the old copy that its source still needed
    /// ([`Ties::only_here`]): `lacking` is to come from there, and all else is here. In this order:
    /// 1. what is lacking; before the next step it counts for nothing;
    /// 2. that the VM runs here, and whether the source owes a flush ([`Ties::source_flush_owed`]).
    ///
    /// # Errors
    /// As [`StateDir::record_arriving`].
    pub fn record_arriving_but(
        &mut self,
        at_source: u64,
        lacking: Option<&BlockSet>,
        source_flush_owed: bool,
    ) -> Result<(), StateError> {
        if let Some(set) = lacking {
            let id = self.volume_id();
            let content = journal::encode_bases(id, self.geometry(), &[(id, set.clone())]);
            self.guarded(|this| put(&*this.dir, LACKING, &content))?;
            crash_point!("handoff.lacking");
        }
        let last = || StateError::Identity {
            path: self.dir.path(VOLUME),
            source: IdentityError::Line("generation"),
        };
        let before = self.identity.generation.max(at_source);
        let generation = before.checked_add(1).ok_or_else(last)?;
        self.change(|identity| {
            identity.life = Life::Arriving;
            identity.generation = generation;
            identity.ties.source_flush_owed = source_flush_owed;
            // From here on the image is no copy of what it was.
            identity.ties.base = None;
            if identity.ties.only_here {
                // When the old copy was written last.
                identity.ties.closed_at = None;
            }
        })?;
        let _ = self.dir.remove(OVERWRITTEN);
        Ok(())
    }

    /// Records that the move is given up before the handoff. What was the old copy of the disk that
    /// comes back is that again; `intact` says whether nothing of it was overwritten, `image_mtime`
    /// when the image was written last.
    ///
    /// # Errors
    /// The medium fails; the state is unusable then.
    pub fn give_up(&mut self, image_mtime: Option<i64>, intact: bool) -> Result<(), StateError> {
        self.change(|identity| match identity.ties.base {
            Some(to) => {
                identity.life = Life::Local;
                // Of a map that says that nothing is here there is nothing to be kept.
                identity.ties = Ties {
                    departed: Some(Departure {
                        to,
                        image_mtime,
                        intact,
                    }),
                    gave_up: true,
                    released: identity.ties.released,
                    ..Ties::default()
                };
            }
            None => identity.life = Life::GivenUp,
        })
    }

    /// Records that everything is here, and drops what said which blocks are, unless that is kept
    /// for the way back.
    ///
    /// # Errors
    /// The medium fails; the state is unusable then.
    pub fn record_local(&mut self) -> Result<(), StateError> {
        self.change(|identity| {
            identity.life = Life::Local;
            identity.ties.only_here = false;
            identity.ties.source_flush_owed = false;
        })?;
        crash_point!("completion.recorded");
        let _ = self.dir.remove(LACKING);
        if !self.identity.keeps_map() {
            self.drop_map();
        }
        let _ = self.dir.remove(WITNESSES);
        Ok(())
    }

    fn drop_map(&self) {
        // Left-overs do no harm: the identity says that they do not count.
        let _ = self.dir.remove(MAP);
        crash_point!("completion.map-removed");
        let _ = self.dir.remove(LOG);
        crash_point!("completion.log-removed");
        let _ = self.dir.remove(BASES);
    }

    /// Records that nothing is known any more of what was written here: whoever has an older copy
    /// of this disk needs all of it anew.
    ///
    /// # Errors
    /// The medium fails; the state is unusable then.
    pub fn end_way_back(&mut self) -> Result<(), StateError> {
        self.change(|identity| {
            identity.ties.way_back = false;
            identity.ties.closed_at = None;
        })?;
        crash_point!("way-back.ended");
        if self.identity.keeps_map() {
            let _ = self.dir.remove(BASES);
        } else {
            self.drop_map();
        }
        Ok(())
    }

    /// Changes the identity, durably.
    ///
    /// # Errors
    /// The medium fails; the state is unusable then.
    pub fn change(&mut self, change: impl FnOnce(&mut Identity)) -> Result<(), StateError> {
        self.guarded(|this| {
            let mut identity = this.identity.clone();
            change(&mut identity);
            put(&*this.dir, VOLUME, &identity.encode())?;
            this.identity = identity;
            Ok(())
        })
    }

    /// Makes durable what it says. A process that was killed while it recorded that may have left it
    /// in the kernel alone, and others are about to rely on it.
    ///
    /// # Errors
    /// The medium fails; the state is unusable then.
    pub fn confirm(&mut self) -> Result<(), StateError> {
        self.change(|_| ())
    }

    fn guarded(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        if self.poisoned {
            return Err(StateError::Poisoned);
        }
        // A panic in between leaves it poisoned as well.
        self.poisoned = true;
        let outcome = step(self);
        self.poisoned = matches!(&outcome, Err(error) if !error.is_no_space());
        outcome
    }

    fn failed(&self, what: &'static str, name: &str, source: io::Error) -> StateError {
        StateError::Io {
            what,
            path: self.dir.path(name),
            source,
        }
    }
}

fn log_limit(geometry: Geometry) -> u64 {
    let map_bytes = geometry.blocks() / 4;
    (map_bytes / 4).clamp(MIN_LOG_BYTES, MAX_LOG_BYTES)
}

const _: () = assert!(PREALLOCATED_BYTES.is_multiple_of(FRAME_ALIGN));

/// The log of a volume that is complete: there is nothing to write.
#[derive(Debug)]
struct NoLog;

impl DurableFile for NoLog {
    fn write_at(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn make_directory(path: &Path) -> Result<(), StateError> {
    let made = std::fs::create_dir_all(path).and_then(|()| {
        let parent = path.canonicalize()?;
        File::open(parent.parent().unwrap_or(Path::new("/")))?.sync_all()
    });
    made.map_err(|source| StateError::Io {
        what: "creating",
        path: path.to_owned(),
        source,
    })
}

fn take_lock(path: &Path) -> Result<File, StateError> {
    let path = path.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = file.map_err(|source| StateError::Io {
        what: "opening",
        path: path.clone(),
        source,
    })?;
    match lock::acquire(&file, false) {
        Ok(Locked::Yes) => Ok(file),
        Ok(Locked::HeldBy(holder)) => Err(StateError::InUse { path, holder }),
        Err(source) => Err(StateError::Io {
            what: "locking",
            path,
            source,
        }),
    }
}

fn put(dir: &dyn Directory, name: &str, content: &[u8]) -> Result<(), StateError> {
    dir.replace(name, content).map_err(|source| StateError::Io {
        what: "writing",
        path: dir.path(name),
        source,
    })
}

fn remove(dir: &dyn Directory, name: &str) -> Result<(), StateError> {
    dir.remove(name).map_err(|source| StateError::Io {
        what: "removing",
        path: dir.path(name),
        source,
    })
}

fn get(dir: &dyn Directory, name: &str) -> Result<Vec<u8>, StateError> {
    match dir.read(name) {
        Ok(Some(content)) => Ok(content),
        Ok(None) => Err(StateError::Missing {
            path: dir.path(name),
        }),
        Err(source) => Err(StateError::Io {
            what: "reading",
            path: dir.path(name),
            source,
        }),
    }
}
