//! Makes the index of the seed images: reads them through once, in the background.
//!
//! That costs a read of all that is in them, so it is done only when it is worth it: while the disk
//! stands by, when nobody else wants the seeds and there is time, and after the handoff when much of
//! the disk is not at the same offset of a seed (`run` says so). It has the lowest priority, and
//! leaves a disk that is slow, because others read from it too, alone for as long as a read took.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hikkoshi_wan::transport::message::hashes_of;

use super::super::{Volume, lock};
use super::image::SeedImage;
use super::index::{MAX_BYTES, Place, Table};
use crate::events::EventKind;
use crate::status::LifeState;

/// What is read and hashed at once.
const STEP_BYTES: usize = 1 << 20;

/// A read that takes longer has waited for the medium.
const SLOW_READ: Duration = Duration::from_millis(5);

/// The longest pause after one.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// How often it looks whether it may go on.
const PATIENCE: Duration = Duration::from_millis(20);

/// How much less than all others this thread wants the processor.
const NICENESS: i32 = 19;

/// The index of the seeds of a volume, and how it stands.
#[derive(Debug, Default)]
pub(super) struct Index {
    built: Mutex<Option<Arc<Built>>>,
    wanted: AtomicBool,
    /// There will be none.
    given_up: AtomicBool,
}

/// An index.
#[derive(Debug)]
pub(super) struct Built {
    pub table: Table,
    /// Bytes of a grain: a block, or less.
    pub grain: u32,
}

impl Index {
    /// It is worth it.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::Release);
    }

    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    /// It cannot be made.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    /// It is worth it and not there yet.
    pub fn is_awaited(&self) -> bool {
        self.is_wanted() && self.built().is_none() && !self.given_up.load(Ordering::Acquire)
    }

    /// The whole index, once it is there.
    pub fn built(&self) -> Option<Arc<Built>> {
        lock(&self.built).clone()
    }

    pub fn set(&self, built: Built) {
        *lock(&self.built) = Some(Arc::new(built));
    }

    /// Gives the memory back.
    pub fn end(&self) {
        self.give_up();
        lock(&self.built).take();
    }
}

impl Volume {
    /// The loop of the thread that makes the index; returns when it is made, or `over` says so.
    pub(super) fn index_seeds(&self, over: impl Fn() -> bool) {
        // Also after a panic: nobody is to wait for it then.
        let _ends = super::Guard(|| self.seeding.index.give_up());
        // For this thread alone. That it fails hurts nobody.
        let _ = rustix::process::setpriority_process(None, NICENESS);
        let index = &self.seeding.index;
        let has_hashes = || {
            let relocation = self.relocation();
            relocation.is_some_and(|r| r.source.speaks_frames())
        };
        let may_go = || (index.is_wanted() || self.life() == LifeState::Standby) && has_hashes();
        // `false`: it ends.
        let go_on = || {
            while !over() {
                if may_go() {
                    return true;
                }
                std::thread::sleep(PATIENCE);
            }
            false
        };
        let grain = fine_grain(self.geometry.block_bytes());
        let images = self.seeding.images();
        if !go_on() {
            return;
        }
        let since = Instant::now();
        let Some(made) = make(images, grain, MAX_BYTES, go_on) else {
            return;
        };
        let mib = |bytes: u64| bytes >> 20;
        let blocks = made.table.len() * u64::from(grain);
        let tenths = (made.table.bytes() * 10) >> 20;
        let part = match made.left_out {
            0 => String::new(),
            left => format!(
                "; {} MiB more of them are left out, since an index may take {} MiB of memory",
                mib(left),
                MAX_BYTES >> 20
            ),
        };
        self.event(
            EventKind::Seeding,
            format!(
                "{} MiB of the seed images can be found at any offset now; the index took {:.1} s and \
                 takes {}.{} MiB of memory{part}",
                mib(blocks),
                since.elapsed().as_secs_f64(),
                tenths / 10,
                tenths % 10
            ),
        );
        let table = made.table;
        index.set(Built { table, grain });
    }
}

/// What is asked about and found by itself: a block, or the longest grain where that is shorter.
pub(super) fn fine_grain(block_bytes: u64) -> u32 {
    let most = hikkoshi_wan::transport::limits::MAX_GRAIN_BYTES;
    u32::try_from(block_bytes).unwrap_or(most).min(most)
}

/// What came of reading the seeds through.
pub(super) struct Made {
    pub table: Table,
    /// Bytes of the seeds that there was no room for.
    pub left_out: u64,
}

/// Reads the seeds through, in their order. `None`: `go_on` ended it.
pub(super) fn make(
    images: &[SeedImage],
    grain: u32,
    max_bytes: usize,
    go_on: impl Fn() -> bool,
) -> Option<Made> {
    let grain_bytes = u64::from(grain);
    let in_data = |image: &SeedImage| image.data_bytes().div_ceil(grain_bytes);
    let mut table = Table::with_room(images.iter().map(in_data).sum(), max_bytes);
    let mut left_out = 0;
    let mut data = vec![0; STEP_BYTES.next_multiple_of(usize::try_from(grain).ok()?)];
    for (seed, image) in images.iter().enumerate() {
        let mut at = 0;
        while let Some((start, end)) = image.data_from(at) {
            if table.is_full() {
                left_out += end - start;
                at = end;
                continue;
            }
            if !go_on() {
                return None;
            }
            let from = start / grain_bytes * grain_bytes;
            let began = Instant::now();
            let Ok(filled @ 1..) = image.read(from, &mut data) else {
                // It cannot be read here, or was cut: there may be more behind it.
                at = from + u64::try_from(data.len()).ok()?;
                continue;
            };
            let took = began.elapsed();
            if took >= SLOW_READ {
                std::thread::sleep(took.min(MAX_PAUSE));
            }
            let grains = data[..filled].chunks_exact(usize::try_from(grain).ok()?);
            for (n, bytes) in (from / grain_bytes..).zip(grains) {
                // Zeroes cross the link as next to nothing.
                if bytes.iter().any(|byte| *byte != 0) {
                    let hash = hashes_of(bytes, grain)[0];
                    if !table.insert(&hash, Place { seed, grain: n }) {
                        left_out += grain_bytes;
                    }
                }
            }
            // What is behind the hole that may be within is found by looking again.
            at = (from + u64::try_from(filled).ok()?).max(start + 1);
        }
    }
    Some(Made { table, left_out })
}
