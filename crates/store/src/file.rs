//! [`FileStore`]: a raw image in a regular file or on a block device, through the page cache.
//! Owns the image, its lock and what is known of its extents. It never changes the image's size
//! and never writes what it was not told to write. Called by volumes.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::behind::{Behind, OpenFile, Witnesses};
use crate::extent_cache::ExtentCache;
use crate::image::{Image, Medium};
use crate::live;
use crate::open::{self, EngineChoice, OpenOptions, Opened, StoreError};
use crate::pool::Pool;
use crate::range::{self, len_u64};
use crate::suspect::{self, MarkFile};
use crate::sync_gate::SyncGate;
use crate::uring::Ring;
use crate::zero::Zeroer;
use crate::{Extent, ExtentKind, ReadDone, Store, ZeroMode, blockdev};

/// A raw image in a regular file or on a block device, locked against other daemons for as long
/// as this lives and reads are under way.
pub struct FileStore {
    image: Arc<Image>,
    engine: Engine,
    created: bool,
    zeroer: Zeroer,
    gate: Arc<SyncGate>,
    /// Left by a failed sync, for the process after this one.
    mark: Arc<MarkFile>,
    behind: Mutex<WriteBehind>,
    extents: ExtentCache,
}

/// What brings to the medium what was written behind.
enum WriteBehind {
    /// Nothing was yet.
    Unused,
    /// There is nothing to it, or it cannot be done.
    None,
    On(Arc<Behind>, JoinHandle<()>),
}

#[derive(Clone, Copy)]
enum Engine {
    Threads(&'static Pool),
    IoUring(&'static Ring),
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore")
            .field("image", &self.image)
            .field("engine", &self.engine_name())
            .finish_non_exhaustive()
    }
}

impl FileStore {
    /// Opens an image, or creates it when [`OpenOptions::create_with_size`] says so.
    ///
    /// # Errors
    /// See [`StoreError`]. Nothing has been created or changed then.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let engine = Engine::choose(options.engine)?;
        let Opened { image, created } = open::open(path, options)?;
        let logical_block_bytes = if image.medium == Medium::Block {
            blockdev::logical_block_bytes(&image.file).map_err(|source| StoreError::Io {
                path: path.to_owned(),
                what: "find the logical block size of",
                source,
            })?
        } else {
            1
        };
        let extents = ExtentCache::new(image.size);
        let identity = image.identity().map_err(|source| StoreError::Io {
            path: path.to_owned(),
            what: "look at",
            source,
        })?;
        let store = Self {
            image: Arc::new(image),
            engine,
            created,
            zeroer: Zeroer::new(logical_block_bytes),
            gate: Arc::default(),
            mark: Arc::new(MarkFile::new(&live::default_dir(), identity)),
            behind: Mutex::new(WriteBehind::Unused),
            extents,
        };
        tracing::debug!(image = %path.display(), engine = store.engine_name(), created, "image open");
        Ok(store)
    }

    /// Whether this call of [`FileStore::open`] made the image what it is: it holds no data.
    pub fn is_new(&self) -> bool {
        self.created
    }

    /// Whether the image is a block device.
    pub fn is_block_device(&self) -> bool {
        self.image.medium == Medium::Block
    }

    /// What serves reads that would wait: `threads` or `io_uring`.
    pub fn engine_name(&self) -> &'static str {
        match self.engine {
            Engine::Threads(_) => "threads",
            Engine::IoUring(_) => "io_uring",
        }
    }

    pub(crate) fn image(&self) -> &Image {
        &self.image
    }

    /// What a failed sync leaves.
    pub fn mark(&self) -> &MarkFile {
        &self.mark
    }

    /// One sync at a time; one that fails is the last, and leaves the mark.
    pub(crate) fn run_sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.gate.run(|| suspect::guarded(&*self.mark, sync))
    }

    fn begin_write_behind(&self) -> io::Result<(Arc<Behind>, JoinHandle<()>)> {
        if self.image.medium == Medium::RegularInMemory {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let file = OpenFile::of(&self.image.file)?;
        let told = Witnesses {
            gate: Arc::clone(&self.gate),
            mark: Arc::clone(&self.mark) as _,
        };
        Behind::new(Box::new(file), told)
    }

    fn end_write_behind(&self) {
        let mut held = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        let had = std::mem::replace(&mut *held, WriteBehind::None);
        drop(held);
        if let WriteBehind::On(behind, thread) = had {
            behind.end();
            // What it may learn of a failure is to be noted before anybody else opens the image.
            let _ = thread.join();
        }
    }

    fn write_behind_of(&self) -> Option<Arc<Behind>> {
        let mut behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*behind, WriteBehind::Unused) {
            *behind = match self.begin_write_behind() {
                Ok((behind, thread)) => WriteBehind::On(behind, thread),
                Err(error) => {
                    tracing::debug!("nothing is written behind: {error}");
                    WriteBehind::None
                }
            };
        }
        match &*behind {
            WriteBehind::On(behind, _) => Some(Arc::clone(behind)),
            WriteBehind::Unused | WriteBehind::None => None,
        }
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        range::check(self.image.size, offset, len)
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.image.read_only {
            Err(Errno::ROFS.into())
        } else {
            Ok(())
        }
    }
}

impl Drop for FileStore {
    fn drop(&mut self) {
        self.end_write_behind();
    }
}

impl Engine {
    fn choose(choice: EngineChoice) -> Result<Self, StoreError> {
        match choice {
            EngineChoice::Threads | EngineChoice::Auto => Ok(Self::Threads(Pool::shared())),
            EngineChoice::IoUring => match Ring::shared() {
                Ok(ring) => Ok(Self::IoUring(ring)),
                Err(source) => Err(StoreError::NoIoUring { source }),
            },
        }
    }
}

impl FileStore {
    /// Whether a range is a hole for certain. Looking takes a microsecond; punching a hole where
    /// there is one takes ext4 a millisecond, and most zeroes that arrive meet a hole.
    fn is_hole(&self, offset: u64, len: u64) -> bool {
        self.image.medium != Medium::Block
            && match rustix::fs::seek(&self.image.file, SeekFrom::Data(offset)) {
                Ok(data) => data >= offset + len,
                Err(errno) => errno == Errno::NXIO,
            }
    }
}

impl Store for FileStore {
    fn size_bytes(&self) -> u64 {
        self.image.size
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.check(offset, len_u64(buf.len()))?;
        self.image.try_read(offset, buf)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.check(offset, len_u64(buf.len()))?;
        self.image.read_exact(offset, buf)
    }

    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
        self.check(offset, len)?;
        let mut at = offset;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        match rustix::fs::sendfile(socket, &self.image.file, Some(&mut at), len) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(sent) => Ok(len_u64(sent)),
            // A file system or a kind of socket that cannot.
            Err(Errno::INVAL | Errno::NOSYS) => Err(io::ErrorKind::Unsupported.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn submit_read(&self, offset: u64, len: usize, done: ReadDone) {
        if let Err(error) = self.check(offset, len_u64(len)) {
            // Elsewhere too: the caller may hold a lock that `done` takes.
            return Pool::shared().submit(Box::new(move || done(Err(error))));
        }
        let image = Arc::clone(&self.image);
        match self.engine {
            Engine::Threads(pool) => {
                pool.submit(Box::new(move || done(image.read_vec(offset, len))));
            }
            Engine::IoUring(ring) => ring.submit(image, offset, len, done),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, len_u64(data.len()))?;
        self.check_writable()?;
        let _writing = self.extents.writing(offset, len_u64(data.len()));
        self.image.write_all(offset, data)
    }

    fn write_behind(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data)?;
        if let Some(behind) = self.write_behind_of() {
            behind.wrote(offset..offset + len_u64(data.len()));
        }
        Ok(())
    }

    fn is_far_behind(&self) -> bool {
        let behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(&*behind, WriteBehind::On(behind, _) if behind.is_far())
    }

    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> io::Result<()> {
        self.check(offset, len)?;
        self.check_writable()?;
        if len == 0 || (mode != ZeroMode::Allocate && self.is_hole(offset, len)) {
            return Ok(());
        }
        let _writing = self.extents.writing(offset, len);
        self.zeroer.zero(&self.image, offset, len, mode)
    }

    fn sync(&self) -> io::Result<()> {
        self.run_sync(|| {
            loop {
                match rustix::fs::fdatasync(&self.image.file) {
                    Err(Errno::INTR) => {}
                    result => return Ok(result?),
                }
            }
        })
    }

    fn let_go(&self) -> io::Result<()> {
        self.end_write_behind();
        self.image.let_go()
    }

    fn modified(&self) -> io::Result<Option<i64>> {
        if self.image.medium == Medium::Block {
            return Ok(None);
        }
        let stat = rustix::fs::fstat(&self.image.file)?;
        let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
        Ok(stat
            .st_mtime
            .checked_mul(1_000_000_000)
            .map(|s| s + nanoseconds))
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<Extent>> {
        self.check(offset, len)?;
        if self.image.medium == Medium::Block && len > 0 && max > 0 {
            // A block device keeps no record of what was written.
            return Ok(vec![Extent {
                offset,
                len,
                kind: ExtentKind::Data,
            }]);
        }
        self.extents.extents(&self.image.file, offset, len, max)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod device_tests;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
