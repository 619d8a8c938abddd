//! [`MemoryStore`]: an image in memory that knows what a power cut or a killed process leaves of
//! it. For tests; meant for disks of some MiB.

use std::io;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::io::Errno;

use crate::pool::Pool;
use crate::range::{self, len_u64, len_usize};
use crate::{Extent, ExtentKind, ReadDone, Store, ZeroMode};

const SECTOR: usize = 512;

/// The unit in which holes are kept, in bytes, as on the usual file systems.
const BLOCK: usize = 4096;

/// Unsynced writes are remembered up to so many bytes; beyond, the oldest become durable early,
/// as a kernel that is short of memory would have them.
const MAX_UNSYNCED_BYTES: usize = 256 << 20;

/// What a remembered write weighs beside its data.
const WRITE_OVERHEAD_BYTES: usize = 64;

/// Asked for a number below its argument: how the medium decides what becomes of a write.
pub type Chooser<'a> = dyn FnMut(u32) -> u32 + 'a;

/// An image in memory.
///
/// After [`MemoryStore::power_cut`] or [`MemoryStore::kill`] the store that they return goes on;
/// the old one answers every call with `ENODEV`, so that a thread left over from before the crash
/// cannot write into the time after it.
#[derive(Debug)]
pub struct MemoryStore {
    size: u64,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    full: bool,
    far_behind: bool,
    /// What a read sees.
    now: Vec<u8>,
    /// What is on the medium for sure.
    durable: Vec<u8>,
    kinds: Vec<ExtentKind>,
    /// In the order in which they were made.
    unsynced: std::collections::VecDeque<Write>,
    unsynced_bytes: usize,
    gone: bool,
}

#[derive(Debug)]
struct Write {
    offset: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Bytes(Box<[u8]>),
    Zeroes(usize),
}

impl Write {
    fn end(&self) -> usize {
        self.offset
            + match &self.data {
                Data::Bytes(bytes) => bytes.len(),
                Data::Zeroes(len) => *len,
            }
    }

    fn apply(&self, image: &mut [u8]) {
        let target = &mut image[self.offset..self.end()];
        match &self.data {
            Data::Bytes(bytes) => target.copy_from_slice(bytes),
            Data::Zeroes(_) => target.fill(0),
        }
    }

    fn weight(&self) -> usize {
        WRITE_OVERHEAD_BYTES
            + match &self.data {
                Data::Bytes(bytes) => bytes.len(),
                Data::Zeroes(_) => 0,
            }
    }
}

impl MemoryStore {
    /// An image of `size_bytes` that is one hole.
    ///
    /// # Panics
    /// If the size does not fit into memory.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        let size = len_usize(size_bytes);
        Self::from_state(State {
            now: vec![0; size],
            durable: vec![0; size],
            kinds: vec![ExtentKind::Hole; size.div_ceil(BLOCK)],
            ..State::default()
        })
    }

    /// An image with durable content; its blocks of zeroes are holes.
    #[must_use]
    pub fn with_content(content: Vec<u8>) -> Self {
        let kinds = content.chunks(BLOCK).map(|block| {
            if block.iter().all(|&byte| byte == 0) {
                ExtentKind::Hole
            } else {
                ExtentKind::Data
            }
        });
        let kinds = kinds.collect();
        Self::from_state(State {
            durable: content.clone(),
            now: content,
            kinds,
            ..State::default()
        })
    }

    fn from_state(state: State) -> Self {
        Self {
            size: len_u64(state.now.len()),
            state: RwLock::new(state),
        }
    }

    /// What a read of everything gives.
    ///
    /// # Panics
    /// After a crash; look at the store that the crash returned.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        self.live()
            .expect("asked of the store that the crash returned")
            .now
            .clone()
    }

    /// Whether the medium has no space left: writes into holes fail, those over data do not.
    pub fn set_full(&self, full: bool) {
        self.write_lock().full = full;
    }

    /// Whether what is written behind should rest.
    pub fn set_far_behind(&self, far: bool) {
        self.write_lock().far_behind = far;
    }

    /// Writes that no sync has covered yet.
    #[must_use]
    pub fn unsynced_writes(&self) -> usize {
        self.write_lock().unsynced.len()
    }

    /// The machine loses its power: what was synced stays. Of each write since then `choose(3)`
    /// says whether it is lost (0), kept (1) or torn (2), and in a torn one `choose(2)` of each
    /// sector of 512 bytes whether that is kept (1). As in a page cache, a sector is kept with
    /// all that was written to it before.
    ///
    /// # Panics
    /// If the store is gone already.
    #[must_use]
    pub fn power_cut(&self, choose: &mut Chooser<'_>) -> Self {
        let mut state = self.take();
        let mut cache = state.durable.clone();
        for write in &state.unsynced {
            write.apply(&mut cache);
            let fate = choose(3) % 3;
            let sectors = write.offset / SECTOR..write.end().div_ceil(SECTOR);
            for sector in sectors {
                if fate == 1 || (fate == 2 && choose(2) % 2 == 1) {
                    let bytes = sector * SECTOR..cache.len().min((sector + 1) * SECTOR);
                    state.durable[bytes.clone()].copy_from_slice(&cache[bytes]);
                }
            }
        }
        for (kind, block) in state.kinds.iter_mut().zip(state.durable.chunks(BLOCK)) {
            if block.iter().any(|&byte| byte != 0) {
                *kind = ExtentKind::Data;
            }
        }
        state.now.copy_from_slice(&state.durable);
        state.unsynced.clear();
        state.unsynced_bytes = 0;
        Self::from_state(state)
    }

    /// The process is killed: everything written stays, and what was not synced is still not.
    ///
    /// # Panics
    /// If the store is gone already.
    #[must_use]
    pub fn kill(&self) -> Self {
        Self::from_state(self.take())
    }

    /// What a failed sync may leave: each write that was not synced yet for which `choose(2)` is 1
    /// is read as before, but will never reach the medium, whatever syncs succeed later, unless it
    /// is written again. (A kernel takes pages that could not be written for clean.) Holes are not
    /// among these: they are the file system's records, with which it would end as a whole.
    pub fn lose_unsynced(&self, choose: &mut Chooser<'_>) {
        let mut state = self.write_lock();
        let mut lost = 0;
        state.unsynced.retain(|write| {
            let loses = matches!(write.data, Data::Bytes(_)) && choose(2) % 2 == 1;
            lost += if loses { write.weight() } else { 0 };
            !loses
        });
        state.unsynced_bytes -= lost;
    }

    fn take(&self) -> State {
        let mut state = self.write_lock();
        assert!(!state.gone, "a crash ends a store only once");
        std::mem::replace(
            &mut state,
            State {
                gone: true,
                ..State::default()
            },
        )
    }

    fn live(&self) -> io::Result<RwLockReadGuard<'_, State>> {
        let state = self.state.read().expect("no panic while it is held");
        if state.gone {
            Err(Errno::NODEV.into())
        } else {
            Ok(state)
        }
    }

    fn live_mut(&self) -> io::Result<RwLockWriteGuard<'_, State>> {
        let state = self.write_lock();
        if state.gone {
            Err(Errno::NODEV.into())
        } else {
            Ok(state)
        }
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("no panic while it is held")
    }

    fn read_vec(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        range::check(self.size, offset, len_u64(len))?;
        let start = len_usize(offset);
        Ok(self.live()?.now[start..start + len].to_vec())
    }
}

impl State {
    /// Whether `start..end` can be written.
    fn check_space(&self, start: usize, end: usize) -> io::Result<()> {
        let blocks = start / BLOCK..end.div_ceil(BLOCK);
        if self.full && self.kinds[blocks].contains(&ExtentKind::Hole) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn record(&mut self, write: Write) {
        write.apply(&mut self.now);
        let write = self.widened(write);
        self.unsynced_bytes += write.weight();
        self.unsynced.push_back(write);
        while self.unsynced_bytes > MAX_UNSYNCED_BYTES {
            let Some(oldest) = self.unsynced.pop_front() else {
                break;
            };
            self.unsynced_bytes -= oldest.weight();
            oldest.apply(&mut self.durable);
        }
    }

    /// A medium gets whole sectors, with all that the cache holds of them.
    fn widened(&self, write: Write) -> Write {
        let start = write.offset / SECTOR * SECTOR;
        let end = self.now.len().min(write.end().next_multiple_of(SECTOR));
        if start == write.offset && end == write.end() {
            return write;
        }
        Write {
            offset: start,
            data: Data::Bytes(self.now[start..end].into()),
        }
    }

    /// Sets the kind of whole blocks in a range; blocks partly in it become data unless they are
    /// known to hold zeroes and zeroes are what is written.
    fn set_kind(&mut self, offset: usize, end: usize, kind: ExtentKind) {
        for block in offset / BLOCK..end.div_ceil(BLOCK) {
            let whole = block * BLOCK >= offset && self.now.len().min((block + 1) * BLOCK) <= end;
            if whole || kind == ExtentKind::Data {
                self.kinds[block] = kind;
            } else if kind == ExtentKind::Zero && self.kinds[block] == ExtentKind::Hole {
                self.kinds[block] = ExtentKind::Zero; // part of it must be allocated now
            }
        }
    }
}

impl Store for MemoryStore {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read(offset, buf).map(|()| true)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        range::check(self.size, offset, len_u64(buf.len()))?;
        let start = len_usize(offset);
        buf.copy_from_slice(&self.live()?.now[start..start + buf.len()]);
        Ok(())
    }

    fn submit_read(&self, offset: u64, len: usize, done: ReadDone) {
        // Read now, so that nothing of the store is kept; told elsewhere, as the trait says.
        let result = self.read_vec(offset, len);
        Pool::shared().submit(Box::new(move || done(result)));
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        range::check(self.size, offset, len_u64(data.len()))?;
        let mut state = self.live_mut()?;
        if data.is_empty() {
            return Ok(());
        }
        let offset = len_usize(offset);
        state.check_space(offset, offset + data.len())?;
        state.set_kind(offset, offset + data.len(), ExtentKind::Data);
        state.record(Write {
            offset,
            data: Data::Bytes(data.into()),
        });
        Ok(())
    }

    fn is_far_behind(&self) -> bool {
        self.write_lock().far_behind
    }

    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> io::Result<()> {
        range::check(self.size, offset, len)?;
        let mut state = self.live_mut()?;
        if len == 0 {
            return Ok(());
        }
        let (offset, len) = (len_usize(offset), len_usize(len));
        let kind = match mode {
            ZeroMode::MayPunch | ZeroMode::FastOnly => ExtentKind::Hole,
            ZeroMode::Allocate => {
                state.check_space(offset, offset + len)?;
                ExtentKind::Zero
            }
        };
        state.set_kind(offset, offset + len, kind);
        state.record(Write {
            offset,
            data: Data::Zeroes(len),
        });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.live_mut()?;
        let state = &mut *state;
        for write in state.unsynced.drain(..) {
            write.apply(&mut state.durable);
        }
        state.unsynced_bytes = 0;
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<Extent>> {
        range::check(self.size, offset, len)?;
        let state = self.live()?;
        let (mut at, end) = (offset, offset + len);
        let mut extents: Vec<Extent> = Vec::new();
        while at < end {
            let block = len_usize(at) / BLOCK;
            let kind = state.kinds[block];
            let until = end.min(len_u64((block + 1) * BLOCK));
            let full = extents.len() == max;
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.len += until - at,
                _ if full => break,
                _ => extents.push(Extent {
                    offset: at,
                    len: until - at,
                    kind,
                }),
            }
            at = until;
        }
        Ok(extents)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
