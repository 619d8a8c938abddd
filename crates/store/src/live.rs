//! The memory of a running volume that outlives its process, but not the boot.
//!
//! A killed process leaves its data in the page cache; here it leaves which blocks that data
//! belongs to, in a file of a memory file system (`/dev/shm`). The next process believes it only
//! if the boot, the volume, its incarnation and the state directory are the same. Whatever else
//! happens in between (another machine, a restored copy of the state, a boot), the durable records
//! count alone.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::residency::{PlaneMemory, Residency};
use hikkoshi_engine::sync::AtomicU64;
use rustix::fs::{FallocateFlags, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::state::{Identity, StateDir, StateError, hex};

const MAGIC: [u8; 8] = *b"HKKLIVE1";

/// The header has a page for itself.
const HEADER_BYTES: usize = 4096;

/// Where the memory lies when nothing else is said: gone with the boot, never written to a disk.
const SHARED_MEMORY: &str = "/dev/shm";

/// The directory that is used when none is given.
pub fn default_dir() -> PathBuf {
    Path::new(SHARED_MEMORY).join(format!("hikkoshi-{}", rustix::process::geteuid().as_raw()))
}

/// How much of a volume's past was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// The volume is new.
    New,
    /// All that a killed process had answered.
    AfterKill,
    /// What is durable.
    FromDisk,
}

/// The memory of a volume, and what it is known by.
pub type Found<P> = (<P as LivePlace>::Handle, <P as LivePlace>::Memory);

/// Where the memory of a running volume lies: a seam, so that a simulator can end the process, or
/// the boot, between any two of the steps.
pub trait LivePlace {
    /// The memory, while the process lasts.
    type Memory: PlaneMemory + 'static;
    /// What it is known by, to publish it and to remove it.
    type Handle;

    /// The memory that a killed process of this boot and incarnation left, if it did.
    ///
    /// # Errors
    /// It is there and cannot be had.
    fn find(&self, identity: &Identity) -> Result<Option<Found<Self>>, StateError>;

    /// Fresh memory, all of it allocated, that nobody believes yet. What was there before is gone.
    ///
    /// # Errors
    /// There is not enough.
    fn make(&self, identity: &Identity) -> Result<Found<Self>, StateError>;

    /// Says whose memory it is. Not before it holds all that is durable: from here on the next
    /// process believes it.
    ///
    /// # Errors
    /// That could not be said.
    fn publish(&self, handle: &Self::Handle, identity: &Identity) -> Result<(), StateError>;

    /// Removes the memory of a volume, if there is any.
    fn discard(&self, identity: &Identity);
}

/// Shared memory of this machine.
struct SharedMemory<'a> {
    live_dir: &'a Path,
    state_dir: &'a Path,
}

impl LivePlace for SharedMemory<'_> {
    type Memory = Mapping;
    type Handle = LiveFile;

    fn find(&self, identity: &Identity) -> Result<Option<(LiveFile, Mapping)>, StateError> {
        find(self.live_dir, self.state_dir, identity)
    }

    fn make(&self, identity: &Identity) -> Result<(LiveFile, Mapping), StateError> {
        make(self.live_dir, identity)
    }

    fn publish(&self, live: &LiveFile, identity: &Identity) -> Result<(), StateError> {
        live.publish(self.state_dir, identity)
    }

    fn discard(&self, identity: &Identity) {
        let _ = fs::remove_file(self.live_dir.join(hex(&identity.volume_id)));
    }
}

/// The residency of a volume and the state behind it, ready for use.
#[derive(Debug)]
pub struct OpenedMap<L = LiveFile> {
    /// Which blocks are here.
    pub residency: Arc<Residency>,
    /// What makes that durable.
    pub state: StateDir,
    /// How much of the past was found.
    pub recovered: Recovered,
    /// The file to be removed once everything is durable and the volume closes.
    pub live: L,
}

/// The file of the shared memory.
#[derive(Debug)]
pub struct LiveFile {
    path: PathBuf,
    file: File,
}

impl LiveFile {
    /// Says whose memory it is. Not before it holds all that is durable: from here on the next
    /// process believes it.
    fn publish(&self, state_dir: &Path, identity: &Identity) -> Result<(), StateError> {
        let header = header(state_dir, identity)?;
        self.file
            .write_all_at(&header, 0)
            .map_err(|e| trouble("writing", &self.path, e))
    }

    /// Removes it: the durable records say everything.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The state and the memory of a new volume.
///
/// # Errors
/// The medium fails, or there is not enough memory.
pub fn create_map(
    state_dir: &Path,
    live_dir: &Path,
    identity: Identity,
) -> Result<OpenedMap, StateError> {
    let place = SharedMemory {
        live_dir,
        state_dir,
    };
    create_map_in(StateDir::create(state_dir, identity)?, &place)
}

/// [`create_map`] with memory from anywhere; `state` is fresh.
///
/// # Errors
/// As [`create_map`].
pub fn create_map_in<P: LivePlace>(
    state: StateDir,
    place: &P,
) -> Result<OpenedMap<P::Handle>, StateError> {
    crash_point!("new.state");
    let (live, memory) = place.make(state.identity())?;
    let residency = Residency::new(state.identity().geometry, Box::new(memory));
    crash_point!("new.memory");
    place.publish(&live, state.identity())?;
    crash_point!("new.published");
    Ok(OpenedMap {
        residency: Arc::new(residency),
        state,
        recovered: Recovered::New,
        live,
    })
}

/// The state and the memory of the volume `identity` that takes the disk back into its old copy,
/// whose state this was.
///
/// # Errors
/// As [`create_map`]; until the state is the new one, it is what it was.
pub fn return_map(
    state: StateDir,
    state_dir: &Path,
    live_dir: &Path,
    identity: Identity,
) -> Result<OpenedMap, StateError> {
    let place = SharedMemory {
        live_dir,
        state_dir,
    };
    return_map_in(state, &place, identity)
}

/// [`return_map`] with memory from anywhere.
///
/// # Errors
/// As [`return_map`].
pub fn return_map_in<P: LivePlace>(
    state: StateDir,
    place: &P,
    identity: Identity,
) -> Result<OpenedMap<P::Handle>, StateError> {
    let old = state.identity().clone();
    let state = state.begin_return(identity)?;
    place.discard(&old);
    create_map_in(state, place)
}

/// The state and the memory of a volume that was opened before and is not complete. Everything it
/// knows is durable when it returns; `sync_data` syncs the image for that.
///
/// # Errors
/// The state is missing, damaged or in use, the medium fails, or there is not enough memory.
pub fn open_map(
    state: StateDir,
    state_dir: &Path,
    live_dir: &Path,
    sync_data: &mut dyn FnMut() -> io::Result<()>,
) -> Result<OpenedMap, StateError> {
    let place = SharedMemory {
        live_dir,
        state_dir,
    };
    open_map_in(state, &place, random()?, sync_data)
}

/// Whether [`open_map`] would find the memory of a killed process. Once it has returned, the next process
/// finds its memory: what follows from there having been none must be durable before it is called.
///
/// # Errors
/// It is there and cannot be had.
pub fn has_survived(
    state: &StateDir,
    state_dir: &Path,
    live_dir: &Path,
) -> Result<bool, StateError> {
    let place = SharedMemory {
        live_dir,
        state_dir,
    };
    has_survived_in(state, &place)
}

/// [`has_survived`] with memory from anywhere.
///
/// # Errors
/// As [`has_survived`].
pub fn has_survived_in<P: LivePlace>(state: &StateDir, place: &P) -> Result<bool, StateError> {
    Ok(place.find(state.identity())?.is_some())
}

/// [`open_map`] with memory from anywhere. `incarnation` is one that no memory has carried.
///
/// # Errors
/// As [`open_map`].
pub fn open_map_in<P: LivePlace>(
    mut state: StateDir,
    place: &P,
    incarnation: [u8; 16],
    sync_data: &mut dyn FnMut() -> io::Result<()>,
) -> Result<OpenedMap<P::Handle>, StateError> {
    let geometry = state.identity().geometry;
    let (residency, recovered, live) = match place.find(state.identity())? {
        Some((live, memory)) => {
            let residency = Residency::recover(geometry, Box::new(memory));
            (residency, Recovered::AfterKill, live)
        }
        None => {
            let (live, memory) = place.make(state.identity())?;
            let residency = Residency::new(geometry, Box::new(memory));
            crash_point!("open.memory");
            // A state that is refused is left exactly as it was.
            if let Err(error) = state.load(&residency) {
                place.discard(state.identity());
                return Err(error);
            }
            // The order matters: the new incarnation is durable before memory that carries it is
            // published, and memory of the old one is never believed again.
            crash_point!("open.loaded");
            state.change(|identity| identity.incarnation = incarnation)?;
            crash_point!("open.incarnation");
            place.publish(&live, state.identity())?;
            crash_point!("open.published");
            (residency, Recovered::FromDisk, live)
        }
    };
    // The memory of a killed process is ahead of its records, and a log that a power cut tore
    // must not be continued: a new epoch settles both.
    state.checkpoint(&residency, sync_data)?;
    crash_point!("open.recorded");
    Ok(OpenedMap {
        residency: Arc::new(residency),
        state,
        recovered,
        live,
    })
}

/// For an image whose syncs have failed: what a killed process had marked as copied, and has not
/// recorded, is absent again and is copied once more. It may be nowhere: the kernel takes a page that it
/// could not write for clean, and lets go of it when it likes. Before [`open_map`], and before anybody forgets
/// that the syncs failed. Tells how many blocks that are.
///
/// # Errors
/// The state is missing or damaged, or the memory cannot be had.
pub fn forget_unrecorded(
    state: &StateDir,
    state_dir: &Path,
    live_dir: &Path,
) -> Result<u64, StateError> {
    let Some((_, memory)) = find(live_dir, state_dir, state.identity())? else {
        return Ok(0);
    };
    let geometry = state.identity().geometry;
    let words = (0..Residency::required_words(geometry)).map(|_| AtomicU64::new(0));
    let recorded = Residency::new(geometry, Box::new(words.collect::<Vec<_>>()));
    state.load(&recorded)?;
    let marked = Residency::recover(geometry, Box::new(memory));
    Ok(marked.forget_copies_but(&recorded))
}

/// The state of a volume that is complete: settles what a crash right after the completion left.
///
/// # Errors
/// The medium fails.
pub fn open_complete(
    state: &mut StateDir,
    state_dir: &Path,
    live_dir: &Path,
) -> Result<(), StateError> {
    let place = SharedMemory {
        live_dir,
        state_dir,
    };
    open_complete_in(state, &place)
}

/// [`open_complete`] with memory from anywhere.
///
/// # Errors
/// As [`open_complete`].
pub fn open_complete_in<P: LivePlace>(state: &mut StateDir, place: &P) -> Result<(), StateError> {
    // From here on people rely on the completion: the source is switched off.
    state.confirm()?;
    crash_point!("local.recorded");
    place.discard(state.identity());
    crash_point!("local.memory-removed");
    Ok(())
}

/// Sixteen random bytes.
///
/// # Errors
/// The system has none.
pub fn random() -> Result<[u8; 16], StateError> {
    let mut bytes = [0; 16];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(16) => Ok(bytes),
        _ => Err(StateError::Live(
            "the system gives no random numbers".into(),
        )),
    }
}

/// Memory shared with a file.
struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is plain shared memory of atomics, valid until drop from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; all access goes through atomics.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all of `file` behind its header.
    fn new(file: &File, words: usize) -> io::Result<Self> {
        // SAFETY: a fresh shared mapping of a file that is fully allocated; nothing else in this
        // process refers to it, and other processes are kept out by the lock of the state.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                words * 8,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                HEADER_BYTES as u64,
            )?
        };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, words })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and no reference outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.words * 8) };
    }
}

impl PlaneMemory for Mapping {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping holds so many words, page-aligned, for as long as `self` lives, and
        // they are only ever accessed as atomics.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

fn trouble(what: &str, path: &Path, e: impl std::fmt::Display) -> StateError {
    StateError::Live(format!("{what} {} failed: {e}", path.display()))
}

/// The directory, ours alone.
pub(crate) fn prepare_dir(dir: &Path) -> Result<(), StateError> {
    if let Err(e) = fs::create_dir(dir)
        && e.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(trouble("creating", dir, e));
    }
    let meta = fs::symlink_metadata(dir).map_err(|e| trouble("looking at", dir, e))?;
    if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(StateError::Live(format!(
            "{} is not a directory of ours; remove it",
            dir.display()
        )));
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
        .map_err(|e| trouble("protecting", dir, e))
}

/// What the file system of `file` has left, in bytes. One without a bound, as a tmpfs may be, says that it has nothing at all.
fn room(file: &File) -> io::Result<u64> {
    let told = rustix::fs::fstatvfs(file)?;
    Ok(match told.f_blocks {
        0 => u64::MAX,
        _ => told.f_bavail.saturating_mul(told.f_frsize),
    })
}

/// Fresh memory, all of it allocated, so that it can never run out later.
fn make(live_dir: &Path, identity: &Identity) -> Result<(LiveFile, Mapping), StateError> {
    prepare_dir(live_dir)?;
    let path = live_dir.join(hex(&identity.volume_id));
    let words = Residency::required_words(identity.geometry);
    let _ = fs::remove_file(&path);
    let build = || -> io::Result<(File, Mapping)> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(no_follow())
            .open(&path)?;
        let bytes = (HEADER_BYTES + words * 8) as u64;
        // The kernel would take all that there is before it says that it is not enough: from others, and from the VMs here.
        if bytes > room(&file)? {
            return Err(io::ErrorKind::StorageFull.into());
        }
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
        let mapping = Mapping::new(&file, words)?;
        Ok((file, mapping))
    };
    match build() {
        Ok((file, mapping)) => Ok((LiveFile { path, file }, mapping)),
        Err(e) => {
            let _ = fs::remove_file(&path);
            let mib = (words * 8) >> 20;
            Err(StateError::Live(format!(
                "{mib} MiB of shared memory for which blocks are here could not be had in {}: {e}; \
                 free some, or choose larger blocks with --block-size",
                live_dir.display()
            )))
        }
    }
}

/// The memory that a killed process of this boot and incarnation left, if it did.
fn find(
    live_dir: &Path,
    state_dir: &Path,
    identity: &Identity,
) -> Result<Option<(LiveFile, Mapping)>, StateError> {
    let path = live_dir.join(hex(&identity.volume_id));
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(no_follow())
        .open(&path);
    let Ok(file) = opened else { return Ok(None) };
    let words = Residency::required_words(identity.geometry);
    let wanted = header(state_dir, identity)?;
    let mut found = vec![0; HEADER_BYTES];
    let meta = file
        .metadata()
        .map_err(|e| trouble("looking at", &path, e))?;
    let ours = meta.is_file()
        && meta.uid() == rustix::process::geteuid().as_raw()
        && meta.len() == (HEADER_BYTES + words * 8) as u64
        && file.read_exact_at(&mut found, 0).is_ok()
        && found == wanted;
    if !ours || !identity.keeps_map() {
        return Ok(None);
    }
    let mapping = Mapping::new(&file, words).map_err(|e| trouble("mapping", &path, e))?;
    Ok(Some((LiveFile { path, file }, mapping)))
}

fn no_follow() -> i32 {
    i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0)
}

/// What must be the same for the memory to be believed.
fn header(state_dir: &Path, identity: &Identity) -> Result<Vec<u8>, StateError> {
    let boot = fs::read("/proc/sys/kernel/random/boot_id")
        .map_err(|e| trouble("reading", Path::new("/proc/sys/kernel/random/boot_id"), e))?;
    let meta = fs::metadata(state_dir).map_err(|e| trouble("looking at", state_dir, e))?;
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&identity.volume_id);
    out.extend_from_slice(&identity.incarnation);
    out.extend_from_slice(&shape(identity.geometry));
    out.extend_from_slice(&meta.dev().to_le_bytes());
    out.extend_from_slice(&meta.ino().to_le_bytes());
    out.extend_from_slice(boot.trim_ascii());
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out.resize(HEADER_BYTES, 0);
    Ok(out)
}

fn shape(geometry: Geometry) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&geometry.size_bytes().to_le_bytes());
    out[8..].copy_from_slice(&geometry.block_bytes().to_le_bytes());
    out
}

#[cfg(test)]
mod tests;
