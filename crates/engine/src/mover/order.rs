//! The order of the background copy: what is hot, then the disk from its start to its end, then
//! what is likely to be overwritten before anyone reads it.
//!
//! Owns three lists of ranges and how far each has been worked off; which blocks of them are
//! missing is the residency's to say. Finding the next chunk never looks at more of the disk than
//! lies between two chunks: what is passed over is not looked at again, unless somebody says so
//! ([`CopyOrder::revisit`]). Without any heat it is a cursor that moves along the disk.

use super::scan::Scan;
use crate::geometry::BlockRange;

/// The most ranges of a list: with regions of 1 MiB, 64 GiB of hot data that is nowhere connected.
/// What is beyond is copied with the cold data.
const MAX_RANGES: usize = 1 << 16;

/// The longest range that is looked through at once, in blocks.
const MAX_RANGE_BLOCKS: u64 = 1 << 16;

/// Which of the three lists a range is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Hot,
    Cold,
    Late,
}

/// An order in which to copy a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyOrder {
    hot: Vec<BlockRange>,
    /// By position, without overlaps.
    late: Vec<BlockRange>,
    hot_next: usize,
    late_next: usize,
    /// The linear pass has come so far.
    cursor: u64,
}

impl CopyOrder {
    /// First the `hot` ranges, in the order given, last the `late` ones. `late` need not be
    /// sorted.
    pub fn new(
        hot: impl IntoIterator<Item = BlockRange>,
        late: impl IntoIterator<Item = BlockRange>,
    ) -> Self {
        let mut late: Vec<BlockRange> = late.into_iter().take(MAX_RANGES).collect();
        late.sort_unstable();
        let mut end = 0;
        for range in &mut late {
            *range = BlockRange::new(range.start.max(end), range.end);
            end = end.max(range.end);
        }
        late.retain(|range| !range.is_empty());
        Self {
            hot: joined(hot),
            late: joined(late),
            ..Self::default()
        }
    }

    /// The hot ranges, in order.
    pub fn hot(&self) -> &[BlockRange] {
        &self.hot
    }

    /// The ranges that come last, in order.
    pub fn late(&self) -> &[BlockRange] {
        &self.late
    }

    /// Another order from here on. What the linear pass has done stays done, except where
    /// something was left for later that is not left any more.
    pub(super) fn replace(&mut self, order: CopyOrder) {
        let left = self.late.iter().map(|range| range.start).min();
        let cursor = self.cursor.min(left.unwrap_or(self.cursor));
        *self = Self { cursor, ..order };
    }

    /// `range` was passed over or lost, and is to be found again.
    pub(super) fn revisit(&mut self, range: BlockRange) {
        self.cursor = self.cursor.min(range.start);
        if self.late.first().is_some_and(|l| l.start < range.end)
            && self.late.last().is_some_and(|l| l.end > range.start)
        {
            self.late_next = 0;
        }
    }

    /// Begins anew, as if nothing had been looked at.
    pub(super) fn rewind(&mut self) {
        (self.cursor, self.hot_next, self.late_next) = (0, 0, 0);
    }

    /// Whether the linear pass has got to `end`.
    pub(super) fn passed(&self, end: u64) -> bool {
        self.cursor >= end
    }

    /// The next range to fetch, at most `chunk` blocks long. `free(from, to)` finds the first run
    /// in there that is missing, not in flight, and may be asked for. Nothing is given where the scan
    /// has not been, because it may be known to be zero soon, nor past `seeded_to`, if anything is
    /// held there, because it may be here soon without being fetched.
    pub(super) fn next(
        &mut self,
        chunk: u64,
        scan: &Scan,
        seeded_to: Option<u64>,
        free: impl Fn(u64, u64) -> Option<BlockRange>,
    ) -> Option<(BlockRange, Turn)> {
        let held_from = seeded_to.unwrap_or(u64::MAX);
        while let Some(range) = self.hot.get(self.hot_next) {
            let Some(run) = free(range.start, range.end) else {
                self.hot_next += 1;
                continue;
            };
            let known_to = scan.hot_known_to(run.start).min(run.end).min(held_from);
            if known_to <= run.start {
                // The source is being asked about it, or a seed looked in, and what is colder goes
                // on meanwhile.
                break;
            }
            let run = BlockRange::new(run.start, known_to);
            return Some((cut(run, chunk), Turn::Hot));
        }
        loop {
            let known_to = scan.cold_known_to(self.cursor).min(held_from);
            let to = match self.late_from(self.cursor) {
                Some(late) if late.start <= self.cursor => {
                    self.cursor = late.end;
                    continue;
                }
                Some(late) => late.start.min(known_to),
                None => known_to,
            };
            if self.cursor >= to {
                break;
            }
            match free(self.cursor, to) {
                Some(run) => {
                    let range = cut(run, chunk);
                    self.cursor = range.end;
                    return Some((range, Turn::Cold));
                }
                None => self.cursor = to,
            }
        }
        if !scan.is_done() || seeded_to.is_some() {
            return None;
        }
        while let Some(range) = self.late.get(self.late_next) {
            if let Some(run) = free(range.start, range.end) {
                return Some((cut(run, chunk), Turn::Late));
            }
            self.late_next += 1;
        }
        None
    }

    /// The first late range that ends after `at`.
    fn late_from(&self, at: u64) -> Option<BlockRange> {
        let index = self.late.partition_point(|range| range.end <= at);
        self.late.get(index).copied()
    }
}

/// Neighbours become one range, up to a length.
fn joined(ranges: impl IntoIterator<Item = BlockRange>) -> Vec<BlockRange> {
    let mut out: Vec<BlockRange> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end == range.start && last.len() < MAX_RANGE_BLOCKS => {
                last.end = range.end;
            }
            _ => {
                if out.len() == MAX_RANGES {
                    break;
                }
                out.push(range);
            }
        }
    }
    out
}

/// Chunks end at multiples of their size, so that neighbours stay whole.
fn cut(run: BlockRange, chunk: u64) -> BlockRange {
    BlockRange::new(run.start, run.end.min((run.start / chunk + 1) * chunk))
}
