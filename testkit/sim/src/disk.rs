//! The image on a simulated disk: slow, full, failing, torn.
//!
//! Wraps the store in memory, which knows what a kill and a power cut leave. Others get their turn
//! before and after each step of an operation, so the world may end between any two of them.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hikkoshi_store::suspect::{self, MemoryMark};
use hikkoshi_store::{Extent, MemoryStore, ReadDone, Store, ZeroMode};

use crate::plan::SECTOR;
use crate::rng::mix;
use crate::sim::{News, Sim};

/// Errors of the medium.
pub const EIO: i32 = 5;
/// The medium is full.
pub const ENOSPC: i32 = 28;

/// What is wrong with the medium for a while. Outlives the process.
#[derive(Debug, Default)]
pub struct Ailing {
    /// Full until this time.
    pub full_until_us: u64,
    /// These bytes cannot be written until that time.
    pub bad: Option<(Range<u64>, u64)>,
}

/// The image.
pub struct Disk {
    inner: MemoryStore,
    sim: Arc<Sim>,
    ailing: Arc<Mutex<Ailing>>,
    mark: MemoryMark,
    modified: Mutex<Modified>,
}

/// When it was written last, as its file system tells. No sync of the data makes that durable.
#[derive(Clone, Debug)]
struct Modified {
    /// The times that a power cut may leave, the last of which counts now.
    times: Vec<i64>,
    /// No time is ever told twice.
    next: i64,
}

/// So many times at most may come back.
const KEPT_TIMES: usize = 64;

/// In one of so many power cuts an older time comes back.
const OLDER_TIME: usize = 8;

impl Modified {
    /// Asks no chance of the world: which time is left depends on what was written.
    fn after_power_cut(&self) -> Self {
        let drawn = usize::try_from(mix(self.next.unsigned_abs()) >> 33).unwrap_or(0);
        let last = self.times.len() - 1;
        let left = if drawn.is_multiple_of(OLDER_TIME) {
            drawn / OLDER_TIME % self.times.len()
        } else {
            last
        };
        Self {
            times: vec![self.times[left]],
            next: self.next,
        }
    }

    fn touch(&mut self) {
        if self.times.len() >= KEPT_TIMES {
            self.times.remove(0);
        }
        self.times.push(self.next);
        self.next += 1;
    }
}

impl Disk {
    /// A blank image.
    pub fn new(size_bytes: u64, sim: &Arc<Sim>) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryStore::new(size_bytes),
            sim: Arc::clone(sim),
            ailing: Arc::default(),
            mark: MemoryMark::default(),
            modified: Mutex::new(Modified {
                times: vec![1],
                next: 2,
            }),
        })
    }

    fn times(&self) -> MutexGuard<'_, Modified> {
        self.modified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody sets the time.
    pub fn set_modified(&self, time: Option<i64>) {
        if let Some(time) = time {
            self.times().times = vec![time];
        }
    }

    /// Somebody else writes into it, and makes that durable.
    pub fn tamper(&self, offset: u64, data: &[u8]) {
        let written = self.inner.write(offset, data);
        let made = written.and_then(|()| self.inner.sync());
        made.expect("within the image, which nobody has taken away");
        let mut modified = self.times();
        modified.touch();
        let before = modified.times.len() - 1;
        modified.times.drain(..before);
    }

    /// What is wrong with it.
    pub fn ailing(&self) -> &Mutex<Ailing> {
        &self.ailing
    }

    /// The store below.
    pub fn inner(&self) -> &MemoryStore {
        &self.inner
    }

    /// What a failed sync leaves.
    pub fn mark(&self) -> &MemoryMark {
        &self.mark
    }

    /// What the end of the process leaves.
    pub fn kill(&self) -> Arc<Self> {
        let modified = self.times().clone();
        self.succeed(self.inner.kill(), self.mark.clone(), modified)
    }

    /// What the end of the boot leaves.
    pub fn power_cut(&self, choose: &mut dyn FnMut(u32) -> u32) -> Arc<Self> {
        let modified = self.times().after_power_cut();
        self.succeed(
            self.inner.power_cut(choose),
            MemoryMark::default(),
            modified,
        )
    }

    fn succeed(&self, inner: MemoryStore, mark: MemoryMark, modified: Modified) -> Arc<Self> {
        Arc::new(Self {
            inner,
            sim: Arc::clone(&self.sim),
            ailing: Arc::clone(&self.ailing),
            mark,
            modified: Mutex::new(modified),
        })
    }

    /// Fails now and then, and then the page cache may keep what the medium will never have.
    fn sync_inner(&self) -> io::Result<()> {
        if self.sim.strikes(|t| t.sync_error) {
            self.sim.note("disk: sync fails", 0, 0);
            if self.sim.below(2) == 0 {
                self.inner.lose_unsynced(&mut |n| choose(&self.sim, n));
            }
            self.sim.tell(News::SyncFailed);
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.inner.sync()
    }

    /// The error that a write of these bytes meets.
    fn write_error(&self, offset: u64, len: u64) -> Option<io::Error> {
        let now = self.sim.now_us();
        let ailing = self.ailing.lock().unwrap_or_else(PoisonError::into_inner);
        if now < ailing.full_until_us {
            return Some(io::Error::from_raw_os_error(ENOSPC));
        }
        let bad = ailing.bad.as_ref().is_some_and(|(range, until)| {
            now < *until && offset < range.end && range.start < offset + len
        });
        drop(ailing);
        (bad || self.sim.strikes(|t| t.write_error)).then(|| io::Error::from_raw_os_error(EIO))
    }

    /// Cuts `offset..offset + len` in two at a sector, at random; the second part may be empty.
    fn cut(&self, offset: u64, len: u64) -> u64 {
        let sector = SECTOR as u64;
        if len <= sector || self.sim.below(3) > 0 {
            return len;
        }
        let first = sector - offset % sector;
        first + self.sim.below(len.saturating_sub(first) / sector + 1) * sector
    }

    /// Writes in up to two parts, the second of which may fail.
    fn write_parts(
        &self,
        offset: u64,
        len: u64,
        write: impl Fn(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        self.sim.take_time();
        self.times().touch();
        let first = self.cut(offset, len).min(len);
        match self.write_error(offset, len) {
            Some(error) => {
                if first < len {
                    // Torn: some of it was written.
                    write(offset, first)?;
                    self.sim.take_time();
                }
                self.sim.note("disk: error", offset, len);
                return Err(error);
            }
            None => write(offset, first)?,
        }
        self.sim.take_time();
        if first < len {
            self.times().touch();
            write(offset + first, len - first)?;
            self.sim.take_time();
        }
        Ok(())
    }
}

impl Store for Disk {
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.sim.strikes(|t| t.would_block) {
            return Ok(false);
        }
        self.read(offset, buf).map(|()| true)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.sim.take_time();
        if self.sim.strikes(|t| t.read_error) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let first = usize::try_from(self.cut(offset, buf.len() as u64)).unwrap_or(buf.len());
        let (head, tail) = buf.split_at_mut(first.min(buf.len()));
        self.inner.read(offset, head)?;
        if !tail.is_empty() {
            self.sim.take_time();
            self.inner.read(offset + head.len() as u64, tail)?;
        }
        Ok(())
    }

    fn submit_read(&self, offset: u64, len: usize, done: ReadDone) {
        let sim = Arc::clone(&self.sim);
        let fails = self.sim.strikes(|t| t.read_error);
        let mut data = vec![0; len];
        let read = self.inner.read(offset, &mut data);
        self.sim.spawn(
            "disk",
            Box::new(move || {
                sim.take_time();
                done(match (read, fails) {
                    (Ok(()), false) => Ok(data),
                    (Ok(()), true) => Err(io::Error::from_raw_os_error(EIO)),
                    (Err(e), _) => Err(e),
                });
            }),
        );
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_parts(offset, data.len() as u64, |at, len| {
            let start = usize::try_from(at - offset).map_err(io::Error::other)?;
            let len = usize::try_from(len).map_err(io::Error::other)?;
            self.inner.write(at, &data[start..start + len])
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> io::Result<()> {
        if mode == ZeroMode::FastOnly && self.sim.below(4) == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.write_parts(offset, len, |at, len| {
            self.inner.write_zeroes(at, len, mode)
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.sim.take_time();
        suspect::guarded(&self.mark, || self.sync_inner())?;
        // What comes from here on until it is told is not covered.
        self.sim.take_time();
        Ok(())
    }

    fn modified(&self) -> io::Result<Option<i64>> {
        Ok(self.times().times.last().copied())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<Extent>> {
        self.inner.extents(offset, len, max)
    }
}

/// Chance, as the store in memory asks it.
pub fn choose(sim: &Sim, n: u32) -> u32 {
    u32::try_from(sim.below(n.into())).unwrap_or(0)
}
