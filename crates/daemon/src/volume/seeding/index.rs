//! Where in the seed images a block's content is, by its hash.
//!
//! For disks whose content lies elsewhere in a seed: files that were copied, a file system that was
//! made anew, another VM of the same template. The table holds a part of each hash and a place. What
//! is found by it is only a hint: whoever reads there hashes what was read, as with any seed. So a seed
//! that changes, or two hashes that look alike here, cost a read and nothing else.
//!
//! It takes eight bytes a block and a quarter of that to spare, and is bounded ([`MAX_BYTES`]).

use hikkoshi_wan::transport::message::Hash;

/// The most that the table of a disk takes. That is 13.4 million blocks: 51 GiB of 4 KiB each.
pub(super) const MAX_BYTES: usize = 128 << 20;

const SLOT_BYTES: usize = 8;

/// Of five slots at most four are taken: beyond it long rows of neighbours form.
const TAKEN_OF: (u64, u64) = (4, 5);

/// Slots that are looked at for one hash at most. The usual is a few; of rows as long as this there are
/// none where so many slots are free.
const MAX_PROBES: usize = 1024;

/// A slot: from the top 28 bits of the hash, 3 of the seed's number, 33 of the grain's. No slot in
/// use is zero, since no tag is.
const GRAIN_BITS: u32 = 33;
const SEED_BITS: u32 = 3;
const TAG_MASK: u64 = (1 << 28) - 1;

/// A grain of a seed image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub seed: usize,
    /// Which grain of it.
    pub grain: u64,
}

impl Place {
    fn packed(self) -> Option<u64> {
        let seed = u64::try_from(self.seed).ok()?;
        let fits = seed < 1 << SEED_BITS && self.grain < 1 << GRAIN_BITS;
        fits.then_some(seed << GRAIN_BITS | self.grain)
    }

    fn unpacked(slot: u64) -> Option<Self> {
        let seed = slot >> GRAIN_BITS & ((1 << SEED_BITS) - 1);
        Some(Self {
            seed: usize::try_from(seed).ok()?,
            grain: slot & ((1 << GRAIN_BITS) - 1),
        })
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    slots: Vec<u64>,
    used: u64,
    most: u64,
}

impl Table {
    /// With room for so many grains, or for as many as `max_bytes` hold.
    pub fn with_room(grains: u64, max_bytes: usize) -> Self {
        let (taken, of) = TAKEN_OF;
        let wanted = grains.saturating_mul(of).div_ceil(taken).max(1);
        let slots = usize::try_from(wanted).unwrap_or(usize::MAX);
        let slots = slots.min(max_bytes / SLOT_BYTES).max(1);
        Self {
            most: u64::try_from(slots).unwrap_or(u64::MAX) * taken / of,
            slots: vec![0; slots],
            used: 0,
        }
    }

    /// Grains that it knows.
    pub fn len(&self) -> u64 {
        self.used
    }

    pub fn is_full(&self) -> bool {
        self.used >= self.most
    }

    pub fn bytes(&self) -> usize {
        self.slots.len() * SLOT_BYTES
    }

    /// Remembers where this is, unless it knows a place already. `false`: there is no room for it.
    pub fn insert(&mut self, hash: &Hash, place: Place) -> bool {
        let (tag, Some(place)) = (tag(hash), place.packed()) else {
            return false;
        };
        for slot in self.probes(hash) {
            let found = self.slots[slot];
            if found == 0 && !self.is_full() {
                self.slots[slot] = tag << (GRAIN_BITS + SEED_BITS) | place;
                self.used += 1;
                return true;
            }
            if found == 0 || found >> (GRAIN_BITS + SEED_BITS) == tag {
                return found != 0;
            }
        }
        false
    }

    /// Where this may be.
    pub fn find(&self, hash: &Hash) -> Option<Place> {
        let tag = tag(hash);
        let mut slots = self.probes(hash).map(|slot| self.slots[slot]);
        let found = slots.find(|slot| *slot == 0 || *slot >> (GRAIN_BITS + SEED_BITS) == tag);
        found.filter(|slot| *slot != 0).and_then(Place::unpacked)
    }

    fn probes(&self, hash: &Hash) -> impl Iterator<Item = usize> + use<> {
        let [a, b, c, d, e, f, g, h, ..] = *hash;
        let high = u128::from(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        let slots = self.slots.len();
        let home = (high * u128::try_from(slots).unwrap_or(1)) >> 64;
        let home = usize::try_from(home).unwrap_or(0);
        (0..MAX_PROBES.min(slots)).map(move |n| (home + n) % slots)
    }
}

fn tag(hash: &Hash) -> u64 {
    let [.., a, b, c, d] = *hash;
    (u64::from(u32::from_le_bytes([a, b, c, d])) & TAG_MASK).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hikkoshi_wan::transport::message::hashes_of;

    fn hash(n: u64) -> Hash {
        hashes_of(&n.to_le_bytes(), 64)[0]
    }

    fn place(n: u64) -> Place {
        Place {
            seed: usize::try_from(n % 8).unwrap(),
            grain: n * 77,
        }
    }

    #[test]
    fn what_it_knows_is_found_and_what_it_does_not_is_not() {
        let known = 50_000;
        let mut table = Table::with_room(known, MAX_BYTES);
        for n in 0..known {
            assert!(table.insert(&hash(n), place(n)));
        }
        assert_eq!(table.len(), known);
        assert!(table.bytes() <= 512 << 10, "{} bytes", table.bytes());
        for n in 0..known {
            assert_eq!(table.find(&hash(n)), Some(place(n)));
        }
        let strangers = (known..4 * known).filter(|n| table.find(&hash(*n)).is_some());
        assert_eq!(strangers.count(), 0);
        // The first place stays.
        assert!(table.insert(&hash(7), place(8)));
        assert_eq!(table.find(&hash(7)), Some(place(7)));
        assert_eq!(table.len(), known);
    }

    #[test]
    fn it_takes_no_more_than_it_may_and_says_that_it_is_full() {
        let mut table = Table::with_room(1 << 40, 8000);
        assert_eq!(table.bytes(), 8000);
        for n in 0..2000 {
            assert_eq!(table.is_full(), n >= 800);
            assert_eq!(table.insert(&hash(n), place(n)), n < 800);
        }
        assert_eq!(table.len(), 800);
        assert_eq!(table.find(&hash(799)), Some(place(799)));
        assert_eq!(table.find(&hash(800)), None);
        let mut none = Table::with_room(0, 0);
        assert!(!none.insert(&hash(1), place(1)));
        assert_eq!(none.find(&hash(1)), None);
    }

    #[test]
    fn places_keep_within_their_bits() {
        for (seed, grain) in [(0, 0), (7, (1 << 33) - 1), (3, 5)] {
            let place = Place { seed, grain };
            let packed = place.packed().unwrap();
            assert!(packed < 1 << 36);
            assert_eq!(Place::unpacked(packed | TAG_MASK << 36), Some(place));
        }
        let outside = |seed, grain| Place { seed, grain }.packed();
        assert_eq!((outside(8, 0), outside(0, 1 << 33)), (None, None));
    }
}
