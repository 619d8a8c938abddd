//! What the background copy leaves alone because it may be here already, in a seed image.
//!
//! The caller compares; here is where it is in the disk, and what it holds. Seeding goes along the
//! disk in windows, behind the scan for zeroes and ahead of the background copy, which takes only
//! what seeding has passed. Nothing else waits for it: what a guest asks for, and what it will ask
//! for soon, is fetched at once, inside a window too. And the background copy waits only while
//! seeding gets on: see [`HOLD`].

use std::time::Duration;

use super::{Action, Mover, Phase};
use crate::geometry::BlockRange;
use crate::residency::Residency;

/// How long the background copy holds off while seeding gets nowhere.
const HOLD: Duration = Duration::from_secs(5);

/// Where seeding is.
#[derive(Debug)]
pub(super) struct Seeds {
    /// Seeding has begun everything before this.
    cursor: u64,
    /// What it has begun and not ended.
    windows: Vec<BlockRange>,
    /// When it got on last.
    moved_at: Duration,
    resting: bool,
}

/// What seeding may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeedStep {
    /// Look for these blocks; they are held until [`Mover::seed_passed`].
    Look(BlockRange),
    /// Nothing for now.
    Wait,
    /// There is nothing left to look for.
    End,
}

impl<W> Mover<W> {
    /// There are seed images: the background copy holds off from the start.
    pub fn expect_seeds(&mut self, now: Duration) {
        self.seeds = Some(Seeds {
            cursor: 0,
            windows: Vec::new(),
            moved_at: now,
            resting: false,
        });
    }

    /// Whether the source may be asked about what is in a seed now.
    pub fn may_seed(&mut self, now: Duration) -> bool {
        self.phase == Phase::Arriving
            && self.connected
            && !self.paused
            && !self.must_rest(now)
            && self.bucket.has_room(now)
    }

    /// The next window, of at most `most` blocks. `cost` is what asking about it brings over the
    /// link: the cap of the background copy holds for that.
    pub fn seed_next(
        &mut self,
        now: Duration,
        most: u64,
        cost: u64,
        residency: &Residency,
    ) -> SeedStep {
        if !self.policy.background || self.phase == Phase::Complete {
            return SeedStep::End;
        }
        if !self.may_seed(now) {
            return SeedStep::Wait;
        }
        let Some(cursor) = self.seeds.as_ref().map(|s| s.cursor) else {
            return SeedStep::End;
        };
        // What is known to be zero soon is not looked for.
        let known_to = self.scan.known_to(cursor);
        let next = self.next_free(cursor, known_to, residency);
        let blocks = self.geometry.blocks();
        let Some(seeds) = self.seeds.as_mut() else {
            return SeedStep::End;
        };
        let Some(run) = next else {
            seeds.cursor = known_to;
            return if known_to >= blocks {
                SeedStep::End
            } else {
                SeedStep::Wait
            };
        };
        // Not only the run: a hash of what is here already costs less than one more question.
        let range = BlockRange::new(run.start, known_to.min(run.start + most.max(1)));
        seeds.cursor = range.end;
        seeds.moved_at = now;
        seeds.windows.push(range);
        self.bucket.take(cost);
        SeedStep::Look(range)
    }

    /// More can be found from now on: what was passed and is missing still is looked for again.
    pub fn seed_again(&mut self, now: Duration) {
        if let Some(seeds) = &mut self.seeds {
            seeds.cursor = 0;
            seeds.moved_at = now;
        }
    }

    /// All of a window that a seed has is installed; the rest is for the background copy.
    pub fn seed_passed(
        &mut self,
        now: Duration,
        window: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        if let Some(seeds) = &mut self.seeds {
            seeds.windows.retain(|w| *w != window);
            seeds.moved_at = now;
        }
        self.pump(now, residency, out);
    }

    /// Seeding rests, or goes on. While it rests the background copy holds off from nothing.
    pub fn seed_rest(
        &mut self,
        now: Duration,
        resting: bool,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        if let Some(seeds) = &mut self.seeds {
            seeds.resting = resting;
            seeds.moved_at = now;
        }
        self.pump(now, residency, out);
    }

    /// Seeding has ended.
    pub fn seeds_over(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        self.seeds = None;
        self.pump(now, residency, out);
    }

    /// The time during which seeding could not get on does not count.
    pub(super) fn seeds_may_move(&mut self, now: Duration) {
        if let Some(seeds) = &mut self.seeds {
            seeds.moved_at = now;
        }
    }

    /// Up to where the background copy may take what is missing, where that is not everywhere.
    pub(super) fn seeded_to(&self, now: Duration) -> Option<u64> {
        let seeds = self.seeds.as_ref()?;
        if seeds.resting || now.saturating_sub(seeds.moved_at) >= HOLD {
            return None;
        }
        let first = seeds.windows.iter().map(|w| w.start).min();
        Some(first.unwrap_or(seeds.cursor))
    }
}
