//! QEMU's log of a guest's writes (`blklogwrites`), applied to an image: what the disk must hold.
//!
//! The log is made between the guest's disk controller and the NBD client, so it is independent
//! of every server. Its format is that of Linux's dm-log-writes: little-endian, a superblock in
//! the first sector, then for each request an entry of one sector and the data it wrote. (The
//! entry's data length is for marks; a write has as much data as it has sectors.)

use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const SECTOR: usize = 512;
const FLAG_DISCARD: u64 = 4;
/// The longest data of one entry, to notice a log that is not one.
const MAX_DATA_BYTES: u64 = 64 << 20;
/// How often a log is looked at whose times are wanted.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a log held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Requests, flushes among them.
    pub entries: u64,
    /// Bytes written.
    pub bytes: u64,
}

/// Applies all writes of the log at `log` to the image at `image`.
///
/// # Errors
/// The file is no log, is cut short, or the guest has discarded something: what a disk holds
/// after that is not determined.
pub fn apply(log: &Path, image: &Path) -> Result<Applied> {
    let target = fs::OpenOptions::new().write(true).open(image)?;
    let size = target.metadata()?.len();
    each_write(log, size, |offset, data| {
        Ok(target.write_all_at(data, offset)?)
    })
}

/// Adds the blocks of 4096 bytes that the log at `log` has written to, by number.
///
/// # Errors
/// As [`apply`].
pub fn blocks_written(log: &Path, size: u64, blocks: &mut BTreeSet<u64>) -> Result<()> {
    each_write(log, size, |offset, data| {
        let end = offset + data.len() as u64;
        blocks.extend(offset / 4096..end.div_ceil(4096));
        Ok(())
    })?;
    Ok(())
}

/// Which entry of the log at `log` was the last to write to a block of 4096 bytes, by its number;
/// entries count from 0, and those before `first` are passed over.
///
/// # Errors
/// As [`apply`].
pub fn last_writes(log: &Path, size: u64, first: u64) -> Result<BTreeMap<u64, u64>> {
    let mut last = BTreeMap::new();
    let mut entry = 0;
    each_write(log, size, |offset, data| {
        let end = offset + data.len() as u64;
        if entry >= first {
            last.extend((offset / 4096..end.div_ceil(4096)).map(|block| (block, entry)));
        }
        entry += 1;
        Ok(())
    })?;
    Ok(last)
}

/// When the entries of a log that grows were made.
pub struct Times {
    /// How many entries there were at a time.
    seen: Arc<Mutex<Vec<(SystemTime, u64)>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Times {
    /// Follows the log at `log` from now on.
    ///
    /// # Errors
    /// It is no log.
    pub fn follow(log: &Path) -> Result<Self> {
        let first = (SystemTime::now(), entries(log).context("no write log")?);
        let (seen, stop) = (
            Arc::new(Mutex::new(vec![first])),
            Arc::new(AtomicBool::new(false)),
        );
        let (into, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let log: PathBuf = log.to_path_buf();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let now = SystemTime::now();
                if let Some(entries) = entries(&log) {
                    let mut seen = into.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.push((now, entries));
                }
                std::thread::sleep(LOOK_EVERY);
            }
        });
        Ok(Self {
            seen,
            stop,
            thread: Some(thread),
        })
    }

    /// No entry before this one is younger than the time at which the log was followed.
    pub fn first_entry(&self) -> u64 {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.first().map_or(0, |(_, entries)| *entries)
    }

    /// A time at which this entry had not been made yet; `None`: the log was not followed then.
    pub fn not_before(&self, entry: u64) -> Option<SystemTime> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let before = seen.iter().rev().find(|(_, entries)| *entries <= entry);
        before.map(|(at, _)| *at)
    }
}

impl Drop for Times {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed.
            let _ = thread.join();
        }
    }
}

/// How many entries a log has by its superblock; `None`: it has none yet.
fn entries(log: &Path) -> Option<u64> {
    let mut sector = [0; SECTOR];
    let file = File::open(log).ok()?;
    file.read_exact_at(&mut sector, 0).ok()?;
    (field(&sector, 0) == MAGIC).then(|| field(&sector, 16))
}

/// Calls `write` for each write of a log, of a disk of `size` bytes.
fn each_write(
    log: &Path,
    size: u64,
    mut write: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<Applied> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(log)?);
    let mut sector = [0; SECTOR];
    reader
        .read_exact(&mut sector)
        .context("the write log has no superblock")?;
    ensure!(
        field(&sector, 0) == MAGIC && field(&sector, 8) == VERSION,
        "not a write log"
    );
    let entries = field(&sector, 16);
    let sector_bytes = u32::from_le_bytes([sector[24], sector[25], sector[26], sector[27]]);
    ensure!(
        sector_bytes == 512,
        "the write log has sectors of {sector_bytes} bytes"
    );
    let mut applied = Applied { entries, bytes: 0 };
    let mut data = Vec::new();
    for number in 0..entries {
        reader
            .read_exact(&mut sector)
            .with_context(|| format!("entry {number} of {entries}"))?;
        let (offset, sectors) = (field(&sector, 0).saturating_mul(512), field(&sector, 8));
        let flags = field(&sector, 16);
        if flags & FLAG_DISCARD != 0 {
            bail!("entry {number} is a discard of {sectors} sectors at {offset}");
        }
        let len = sectors.saturating_mul(512);
        ensure!(
            len <= MAX_DATA_BYTES,
            "entry {number} has {sectors} sectors"
        );
        ensure!(
            offset.checked_add(len).is_some_and(|end| end <= size),
            "entry {number} has {sectors} sectors at {offset}, past the end of the disk"
        );
        data.resize(usize::try_from(len)?, 0);
        reader
            .read_exact(&mut data)
            .with_context(|| format!("data of entry {number}"))?;
        write(offset, &data)?;
        applied.bytes += len;
    }
    Ok(applied)
}

fn field(sector: &[u8; SECTOR], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&sector[at..at + 8]);
    u64::from_le_bytes(bytes)
}
