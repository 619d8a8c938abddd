//! What is not at the same offset of a seed, found by the index of all that is in the seeds.
//!
//! The same offset is tried first, and costs what it did. When much is not there the index is asked
//! for, which takes a while; what was passed over until then, and has not been fetched meanwhile, is
//! looked for once more.

use std::io;
use std::sync::atomic::Ordering;

use super::index::Place;
use super::run::{Run, STEP_BYTES, Unit};

/// So much is not at the same offset of a seed, or this part of the disk where that is less, and more
/// than one in so many bytes: then a read of all seeds is worth it.
const MISSED_BYTES: u64 = 32 << 20;
const MISSED_PART: u64 = 64;
const MISSED_SHARE: u64 = 16;

impl Run<'_> {
    /// Asks for the index if it is worth it.
    pub(super) fn may_want_index(&self) {
        let of_disk = self.volume.geometry.size_bytes() / MISSED_PART;
        let much = self.missed >= MISSED_BYTES.min(of_disk);
        if much && self.missed >= self.searched / MISSED_SHARE {
            self.volume.seeding.index.want();
        }
    }

    /// Whether there is an index that is not used yet.
    pub(super) fn index_came(&self) -> bool {
        self.index.is_none() && self.volume.seeding.index.built().is_some()
    }

    /// Looks everywhere from now on, for what was passed over, too.
    pub(super) fn take_up_index(&mut self) {
        if self.index.is_some() {
            return;
        }
        self.index = self.volume.seeding.index.built();
        if self.index.is_none() {
            return;
        }
        if self.missed > 0 {
            self.relocation.with_mover_at(|m, now| m.seed_again(now));
            self.at_end = false;
        }
        // Whether it pays is another question now.
        self.gauge.rested();
        self.fine = (0, 0);
    }

    /// Takes what is anywhere in the seeds, and out of `wanted`. Tells how many bytes came.
    pub(super) fn look_elsewhere(
        &mut self,
        grain: u32,
        wanted: &mut Vec<Unit<'_>>,
    ) -> io::Result<u64> {
        let volume = self.volume;
        let Some(index) = self.index.clone().filter(|index| index.grain == grain) else {
            return Ok(0);
        };
        let whole = |unit: &Unit<'_>| unit.bytes.len() >= u64::from(grain);
        let place = |unit: &Unit<'_>| {
            let hash = unit.hashes.first().filter(|_| whole(unit))?;
            index.table.find(hash)
        };
        let mut came = 0;
        let mut rest = Vec::new();
        let units = std::mem::take(wanted).into_iter();
        let mut units = units.map(|unit| (place(&unit), unit)).peekable();
        while let Some((place, unit)) = units.next() {
            let Some(Place { seed, grain: first }) = place else {
                rest.push(unit);
                continue;
            };
            let start = unit.bytes.start;
            let mut end = unit.bytes.end;
            let mut run = vec![unit];
            // A file is in one piece, mostly: what goes on here and there is read at once.
            while let Some((Some(next_place), next)) = units.peek()
                && next.bytes.start == end
                && next.bytes.end - start <= STEP_BYTES
                && next_place.seed == seed
                && next_place.grain == first + (end - start) / u64::from(grain)
                && let Some((_, next)) = units.next()
            {
                end = next.bytes.end;
                run.push(next);
            }
            let from = first * u64::from(grain);
            // The index is a hint. What is installed has the hash, all of it.
            let equal = self.install(seed, from, &run, grain, &mut came)?;
            let found = run.into_iter().zip(equal);
            rest.extend(found.filter(|(_, equal)| !equal).map(|(unit, _)| unit));
        }
        *wanted = rest;
        let traffic = &self.relocation.traffic;
        traffic.seeded_bytes.fetch_add(came, Ordering::Relaxed);
        let elsewhere = &volume.seeding.elsewhere_bytes;
        elsewhere.fetch_add(came, Ordering::Relaxed);
        Ok(came)
    }
}
