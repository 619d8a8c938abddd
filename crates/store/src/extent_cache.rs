//! Which parts of a file are data, asked of the file system and remembered within bounds.
//!
//! `SEEK_DATA` and `SEEK_HOLE` are dear on tmpfs (they look at every page of a run) and on
//! fragmented files, and clients ask again and again. What is remembered is kept per region of
//! the file, in a fixed number of slots. Every write marks the slots that it touches before it
//! begins and after it has ended, with one atomic operation each; what was learned about a region
//! counts only if no write touched its slot since, and none was under way. So an extent reported
//! as a hole was one at some instant during the call that reports it.
//!
//! Called by the file store: [`ExtentCache::writing`] around every change, and
//! [`ExtentCache::extents`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::range::len_usize;
use crate::{Extent, ExtentKind};

/// A region: small enough that a busy file keeps most of what is known, large enough that a
/// request of 32 MiB (the usual most of a client) meets at most two.
const REGION_BYTES: u64 = 64 << 20;

/// Slots, each for one region at a time: 16 GiB of a disk are remembered.
const SLOTS: usize = 256;

/// Runs remembered of one region. One that is more fragmented is asked anew each time. With
/// [`SLOTS`] this bounds the cache to 24 MiB, in a file that has a hole every 16 KiB.
const MAX_RUNS: usize = 4096;

/// A write's mark: in the lower bits the writes under way (one a thread at most), above them
/// those that have begun.
const BEGUN: u64 = 1 << 20;
const UNDER_WAY: u64 = BEGUN - 1;

/// The mark of a slot whose region had too many runs to remember; never one of a write.
const TOO_FRAGMENTED: u64 = u64::MAX;

/// A run of data or hole.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    range: Range<u64>,
    hole: bool,
}

#[derive(Default)]
struct Slot {
    region: u64,
    /// The slot's mark when the runs were learned.
    mark: u64,
    /// The region's runs in order and without gaps; empty when nothing is known.
    runs: Vec<Run>,
}

/// See the module.
pub(crate) struct ExtentCache {
    size: u64,
    marks: Box<[AtomicU64]>,
    slots: Mutex<Box<[Slot]>>,
}

/// Ends a write's mark when dropped.
pub(crate) struct Writing<'a> {
    cache: &'a ExtentCache,
    regions: Range<u64>,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        for mark in self.cache.marks_of(&self.regions) {
            mark.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl ExtentCache {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            marks: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            slots: Mutex::new((0..SLOTS).map(|_| Slot::default()).collect()),
        }
    }

    /// To be held while a range is changed.
    pub(crate) fn writing(&self, offset: u64, len: u64) -> Writing<'_> {
        let regions = offset / REGION_BYTES..(offset + len).div_ceil(REGION_BYTES);
        for mark in self.marks_of(&regions) {
            mark.fetch_add(BEGUN + 1, Ordering::SeqCst);
        }
        Writing {
            cache: self,
            regions,
        }
    }

    fn marks_of(&self, regions: &Range<u64>) -> impl Iterator<Item = &AtomicU64> {
        // More regions than slots touch every slot once.
        let count = (regions.end - regions.start).min(SLOTS as u64);
        (regions.start..regions.start + count).map(|region| &self.marks[slot_of(region)])
    }

    /// See [`Store::extents`](crate::Store::extents). The range is within the file.
    pub(crate) fn extents(
        &self,
        file: &File,
        offset: u64,
        len: u64,
        max: usize,
    ) -> io::Result<Vec<Extent>> {
        let mut found = Collector {
            end: offset + len,
            at: offset,
            max,
            extents: Vec::new(),
        };
        while found.wants_more() {
            if !self.recall(&mut found) {
                self.learn(file, &mut found)?;
            }
        }
        Ok(found.extents)
    }

    /// Adds what is known of the region at the collector's position; false if nothing is.
    fn recall(&self, found: &mut Collector) -> bool {
        let region = found.at / REGION_BYTES;
        let slots = self.lock();
        let slot = &slots[slot_of(region)];
        let mark = self.marks[slot_of(region)].load(Ordering::SeqCst);
        if slot.region != region || slot.mark != mark || slot.runs.is_empty() {
            return false;
        }
        let first = slot.runs.partition_point(|run| run.range.end <= found.at);
        slot.runs[first..].iter().all(|run| found.add(run));
        true
    }

    /// Asks the file system about the region at the collector's position, adds that, and
    /// remembers it if no write interfered.
    fn learn(&self, file: &File, found: &mut Collector) -> io::Result<()> {
        let region = found.at / REGION_BYTES;
        let region_end = self.size.min((region + 1) * REGION_BYTES);
        if self.is_too_fragmented(region) {
            return walk(file, self.size, region_end, found);
        }
        // Before the first look, of all the slots that a long run might fill.
        let marks: Vec<u64> = self
            .marks
            .iter()
            .map(|it| it.load(Ordering::SeqCst))
            .collect();
        let mut runs = Vec::new();
        let mut at = region * REGION_BYTES;
        while at < region_end && runs.len() < MAX_RUNS {
            let run = seek_run(file, at, self.size)?;
            at = run.range.end;
            runs.push(run);
        }
        let complete = at >= region_end;
        if complete {
            self.remember(region, &runs, &marks);
        } else {
            let slot = Slot {
                region,
                mark: TOO_FRAGMENTED,
                runs: Vec::new(),
            };
            self.lock()[slot_of(region)] = slot;
        }
        let first = runs.partition_point(|run| run.range.end <= found.at);
        runs[first..].iter().all(|run| found.add(run));
        if complete {
            Ok(())
        } else {
            walk(file, self.size, region_end, found)
        }
    }

    fn is_too_fragmented(&self, region: u64) -> bool {
        let slots = self.lock();
        let slot = &slots[slot_of(region)];
        slot.region == region && slot.mark == TOO_FRAGMENTED
    }

    /// Keeps the runs of a region, and of those after it as far as its last run goes: in a large
    /// run each look costs the file system as much as all of them.
    fn remember(&self, region: u64, runs: &[Run], marks: &[u64]) {
        let Some(last) = runs.last() else { return };
        let covered = if last.range.end == self.size {
            last.range.end.div_ceil(REGION_BYTES)
        } else {
            last.range.end / REGION_BYTES
        };
        let covered = covered.clamp(region + 1, region + SLOTS as u64);
        let mut slots = self.lock();
        for region in region..covered {
            let bounds = region * REGION_BYTES..self.size.min((region + 1) * REGION_BYTES);
            let index = slot_of(region);
            let mark = marks[index];
            if mark & UNDER_WAY != 0 || self.marks[index].load(Ordering::SeqCst) != mark {
                continue;
            }
            let first = runs.partition_point(|run| run.range.end <= bounds.start);
            let runs = runs[first..].iter().map(|run| Run {
                range: run.range.start.max(bounds.start)..run.range.end.min(bounds.end),
                hole: run.hole,
            });
            slots[index] = Slot {
                region,
                mark,
                runs: runs.collect(),
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Box<[Slot]>> {
        // A slot is replaced whole, so nothing half done can be seen.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn slot_of(region: u64) -> usize {
    len_usize(region % SLOTS as u64)
}

/// Adds what the file system says up to `end`, remembering nothing.
fn walk(file: &File, size: u64, end: u64, found: &mut Collector) -> io::Result<()> {
    while found.at < end && found.wants_more() {
        found.add(&seek_run(file, found.at, size)?);
    }
    Ok(())
}

/// The run that `at` is in, from `at` on; as far as the file system's answer goes.
fn seek_run(file: &File, at: u64, size: u64) -> io::Result<Run> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => data,
        Err(Errno::NXIO) => {
            return Ok(Run {
                range: at..size,
                hole: true,
            });
        }
        // Not known here: anything may be data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => {
            return Ok(Run {
                range: at..size,
                hole: false,
            });
        }
        Err(errno) => return Err(errno.into()),
    };
    if data > at {
        return Ok(Run {
            range: at..data.min(size),
            hole: true,
        });
    }
    let hole = match rustix::fs::seek(file, SeekFrom::Hole(at)) {
        Ok(hole) => hole,
        Err(Errno::NXIO) => size,
        Err(errno) => return Err(errno.into()),
    };
    // A hole punched at `at` between the two calls leaves nothing; what was data may be said to be.
    let end = if hole > at {
        hole.min(size)
    } else {
        size.min(at + crate::range::SECTOR_BYTES)
    };
    Ok(Run {
        range: at..end,
        hole: false,
    })
}

/// Runs, cut to what was asked for and merged.
struct Collector {
    end: u64,
    at: u64,
    max: usize,
    extents: Vec<Extent>,
}

impl Collector {
    fn wants_more(&self) -> bool {
        self.at < self.end && self.max > 0
    }

    /// Adds a run that begins at or before the position; false once no more is wanted.
    fn add(&mut self, run: &Run) -> bool {
        let end = run.range.end.min(self.end);
        if end <= self.at {
            return self.wants_more();
        }
        let kind = if run.hole {
            ExtentKind::Hole
        } else {
            ExtentKind::Data
        };
        let len = end - self.at;
        let full = self.extents.len() == self.max;
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => last.len += len,
            _ if full => {
                self.end = self.at; // full, and the next would be one too many
                return false;
            }
            _ => self.extents.push(Extent {
                offset: self.at,
                len,
                kind,
            }),
        }
        self.at = end;
        self.wants_more()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
