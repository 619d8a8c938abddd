//! How much a disk is read and written, region by region: what to copy first, and what last.
//!
//! A [`Heat`] is counted into on the data path of every volume, all the time, so counting is two
//! plain loads and a store of memory that is nearly always cached: no lock, no atomic addition. Of
//! two clients that count in the same region at the same instant one may be lost, which does not
//! matter. Counters fall by half every [`HALF_LIFE`]. A [`HeatMap`] is a copy of it that can be
//! written down ([`HeatMap::encode`]), handed over, and turned into an order ([`CopyOrder`]).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::geometry::{BlockRange, ByteRange, Geometry};
use crate::mover::CopyOrder;

/// The usual region: small enough that what is hot is told from what is beside it, large enough
/// that the source's disk reads a region about as fast as a part of it.
const MIN_REGION_BYTES: u64 = 1 << 20;

/// The most regions: beyond 1 TiB regions grow, so that a map has at most some MiB.
const MAX_REGIONS: u64 = 1 << 20;

/// What one access counts: above one, so that some half-lives leave something of it.
pub const ACCESS: u32 = 16;

/// How long until a counter has fallen by half: what a VM does every day stays known, what it did
/// once last week does not.
pub const HALF_LIFE: Duration = Duration::from_secs(12 * 3600);

/// Regions whose counters are allocated together, when the first of them is touched.
const PAGE_REGIONS: usize = 512;

const MAGIC: [u8; 8] = *b"HKKHEAT1";
const HEADER_BYTES: usize = 40;
const CRC_BYTES: usize = 4;

/// The longest map that is believed: every region, with numbers of the longest form.
pub const MAX_MAP_BYTES: usize = HEADER_BYTES + CRC_BYTES + (1 << 20) * 11;

/// Writes from which on a region that is written more than read counts as write-hot.
const WRITE_HOT: u32 = 4 * ACCESS;

/// Reads, as powers of four, that make the classes of read-hot regions: the hottest first.
const HOT_CLASSES: u32 = 5;

#[derive(Debug, Default)]
struct Counter {
    reads: AtomicU32,
    writes: AtomicU32,
}

type Page = [Counter; PAGE_REGIONS];

/// The counters of one disk.
#[derive(Debug)]
pub struct Heat {
    size_bytes: u64,
    region_shift: u32,
    /// When the counters fell last, in seconds of whatever clock the caller has; 0 for never.
    decayed_at_s: AtomicU64,
    pages: Box<[OnceLock<Box<Page>>]>,
}

fn region_shift(size_bytes: u64) -> u32 {
    let needed = size_bytes.div_ceil(MAX_REGIONS).max(MIN_REGION_BYTES);
    needed.next_power_of_two().trailing_zeros()
}

impl Heat {
    /// Counters at zero for a disk of this size.
    pub fn new(size_bytes: u64) -> Self {
        let region_shift = region_shift(size_bytes);
        let regions = size_bytes.div_ceil(1 << region_shift);
        let pages = usize::try_from(regions).map_or(0, |n| n.div_ceil(PAGE_REGIONS));
        Self {
            size_bytes,
            region_shift,
            decayed_at_s: AtomicU64::new(0),
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
        }
    }

    /// A read of `len` bytes at `offset`.
    #[inline]
    pub fn read(&self, offset: u64, len: u64) {
        self.count(offset, len, |counter| &counter.reads);
    }

    /// A write, a trim or a zeroing of `len` bytes at `offset`.
    #[inline]
    pub fn written(&self, offset: u64, len: u64) {
        self.count(offset, len, |counter| &counter.writes);
    }

    #[inline]
    fn count(&self, offset: u64, len: u64, which: impl Fn(&Counter) -> &AtomicU32) {
        if len == 0 {
            return;
        }
        let first = offset >> self.region_shift;
        let last = (offset + len - 1) >> self.region_shift;
        for region in first..=last {
            if let Some(counter) = self.counter(region) {
                let count = which(counter);
                let now = count.load(Ordering::Relaxed);
                count.store(now.saturating_add(ACCESS), Ordering::Relaxed);
            }
        }
    }

    #[inline]
    fn counter(&self, region: u64) -> Option<&Counter> {
        let region = usize::try_from(region).ok()?;
        let page = self.pages.get(region / PAGE_REGIONS)?;
        let page = page.get_or_init(|| Box::new(std::array::from_fn(|_| Counter::default())));
        Some(&page[region % PAGE_REGIONS])
    }

    fn touched(&self) -> impl Iterator<Item = (usize, &Counter)> {
        let pages = self.pages.iter().enumerate();
        pages
            .filter_map(|(n, page)| Some((n, page.get()?)))
            .flat_map(|(n, page)| {
                let counters = page.iter().enumerate();
                counters.map(move |(at, counter)| (n * PAGE_REGIONS + at, counter))
            })
    }

    /// It is `now_s` seconds after the epoch of the caller's clock: counters fall for the time since
    /// they fell last. A clock that was set back begins anew. One caller at a time.
    pub fn decay_to(&self, now_s: u64) {
        let since = now_s.checked_sub(self.decayed_at_s.load(Ordering::Relaxed));
        let half_life = HALF_LIFE.as_secs();
        let (half_lives, at) = match since {
            Some(since) if since < now_s => (since / half_life, now_s - since % half_life),
            _ => (0, now_s),
        };
        if half_lives > 0 {
            self.fall(u32::try_from(half_lives).unwrap_or(u32::MAX));
        }
        self.decayed_at_s.store(at, Ordering::Relaxed);
    }

    fn fall(&self, half_lives: u32) {
        for (_, counter) in self.touched() {
            for count in [&counter.reads, &counter.writes] {
                let now = count.load(Ordering::Relaxed);
                if now > 0 {
                    let then = now.checked_shr(half_lives).unwrap_or(0);
                    count.store(then, Ordering::Relaxed);
                }
            }
        }
    }

    /// A copy as of now.
    pub fn map(&self) -> HeatMap {
        let regions = self.touched().filter_map(|(n, counter)| {
            let region = RegionHeat {
                region: u64::try_from(n).ok()?,
                reads: counter.reads.load(Ordering::Relaxed),
                writes: counter.writes.load(Ordering::Relaxed),
            };
            (region.reads > 0 || region.writes > 0).then_some(region)
        });
        HeatMap {
            size_bytes: self.size_bytes,
            region_bytes: 1 << self.region_shift,
            decayed_at_s: self.decayed_at_s.load(Ordering::Relaxed),
            regions: regions.collect(),
        }
    }

    /// Takes over what a map of the same disk tells, where it tells more than was counted here:
    /// doing so twice changes nothing. Counters that never fell yet go on from the map's time.
    ///
    /// # Errors
    /// It is the map of a disk of another size.
    pub fn merge(&self, map: &HeatMap) -> Result<(), HeatError> {
        if map.size_bytes != self.size_bytes || map.region_bytes != 1 << self.region_shift {
            return Err(HeatError::OtherDisk {
                recorded: map.size_bytes,
                this: self.size_bytes,
            });
        }
        let never = self.decayed_at_s.load(Ordering::Relaxed) == 0;
        if never {
            self.decayed_at_s.store(map.decayed_at_s, Ordering::Relaxed);
        }
        for region in &map.regions {
            if let Some(counter) = self.counter(region.region) {
                counter.reads.fetch_max(region.reads, Ordering::Relaxed);
                counter.writes.fetch_max(region.writes, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// Why a map cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeatError {
    /// Not written by this program, or of a version it does not know.
    #[error("it is no heat map of a version that is known")]
    Format,
    /// It does not add up.
    #[error("it is damaged: {0}")]
    Corrupt(&'static str),
    /// It was recorded on another disk.
    #[error("it was recorded on a disk of {recorded} bytes, and this one has {this}")]
    OtherDisk {
        /// The size it was recorded for.
        recorded: u64,
        /// The size of the disk it is to be used for.
        this: u64,
    },
}

/// What is known of a region: decayed counts, 16 for each access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionHeat {
    /// Its number.
    pub region: u64,
    /// Reads.
    pub reads: u32,
    /// Writes.
    pub writes: u32,
}

/// A copy of the counters of one disk; only regions that were touched are in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeatMap {
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// A region's size in bytes.
    pub region_bytes: u64,
    /// When the counters fell last: seconds since 1970 where the daemon wrote it.
    pub decayed_at_s: u64,
    /// The regions, in order.
    pub regions: Vec<RegionHeat>,
}

impl HeatMap {
    /// As bytes; the layout is in `docs/on-disk.md`.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + CRC_BYTES + self.regions.len() * 6);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.size_bytes.to_le_bytes());
        out.extend_from_slice(&self.region_bytes.to_le_bytes());
        out.extend_from_slice(&self.decayed_at_s.to_le_bytes());
        let count = u64::try_from(self.regions.len()).unwrap_or(u64::MAX);
        out.extend_from_slice(&count.to_le_bytes());
        let mut next = 0;
        for region in &self.regions {
            put_varint(&mut out, region.region - next);
            put_varint(&mut out, region.reads.into());
            put_varint(&mut out, region.writes.into());
            next = region.region + 1;
        }
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// From bytes of any origin.
    ///
    /// # Errors
    /// They are no map, or a damaged one.
    pub fn decode(bytes: &[u8]) -> Result<Self, HeatError> {
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(HeatError::Format);
        }
        if bytes.len() < HEADER_BYTES + CRC_BYTES || bytes.len() > MAX_MAP_BYTES {
            return Err(HeatError::Corrupt("its length is impossible"));
        }
        let (body, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
        if crc32c::crc32c(body).to_le_bytes() != crc {
            return Err(HeatError::Corrupt("its checksum is wrong"));
        }
        let word = |at: usize| {
            let bytes = body.get(at..at + 8).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let (size_bytes, region_bytes, count) = (word(8), word(16), word(32));
        if region_bytes != 1 << region_shift(size_bytes) {
            return Err(HeatError::Corrupt("its regions do not fit its disk"));
        }
        let all = size_bytes.div_ceil(region_bytes);
        if count > all {
            return Err(HeatError::Corrupt("it has more regions than its disk"));
        }
        let mut numbers = &body[HEADER_BYTES..];
        let mut next_number =
            || take_varint(&mut numbers).ok_or(HeatError::Corrupt("it is cut off"));
        let mut regions = Vec::new();
        let mut next = 0_u64;
        for _ in 0..count {
            let region = next.checked_add(next_number()?).filter(|r| *r < all);
            let region = region.ok_or(HeatError::Corrupt("a region is beyond its disk"))?;
            let mut counted = || {
                u32::try_from(next_number()?)
                    .map_err(|_| HeatError::Corrupt("a count is impossible"))
            };
            regions.push(RegionHeat {
                region,
                reads: counted()?,
                writes: counted()?,
            });
            next = region + 1;
        }
        if !numbers.is_empty() {
            return Err(HeatError::Corrupt("something follows its end"));
        }
        Ok(Self {
            size_bytes,
            region_bytes,
            decayed_at_s: word(24),
            regions,
        })
    }

    /// The bytes of the disk that `region` covers.
    pub fn bytes_of(&self, region: u64) -> ByteRange {
        let start = (region * self.region_bytes).min(self.size_bytes);
        ByteRange {
            start,
            end: (start.saturating_add(self.region_bytes)).min(self.size_bytes),
        }
    }

    /// The order in which to copy a disk that is used like this: what is read, the hottest first
    /// and within a class as it lies on the disk; then what nothing is known of; last what is
    /// written more than read, because it will likely be overwritten before anyone reads it.
    pub fn order(&self, geometry: Geometry) -> CopyOrder {
        let mut hot: Vec<(u32, BlockRange)> = Vec::new();
        let mut late = Vec::new();
        for region in &self.regions {
            let blocks = geometry.covering(self.bytes_of(region.region));
            if region.writes >= WRITE_HOT && region.writes > region.reads {
                late.push(blocks);
            } else if region.reads > 0 {
                let class = (region.reads / ACCESS).max(1).ilog2() / 2;
                hot.push((HOT_CLASSES.saturating_sub(class + 1), blocks));
            }
        }
        hot.sort_by_key(|(class, blocks)| (*class, blocks.start));
        CopyOrder::new(hot.into_iter().map(|(_, blocks)| blocks), late)
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        value |= part << shift;
        if byte < 0x80 {
            return (part << shift >> shift == part).then_some(value);
        }
    }
    None
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn counts_fall_by_half_and_vanish() {
        let heat = Heat::new(64 * MIB);
        heat.read(3 * MIB - 1, 2);
        heat.written(5 * MIB, 4096);
        let map = heat.map();
        let seen: Vec<_> = map
            .regions
            .iter()
            .map(|r| (r.region, r.reads, r.writes))
            .collect();
        assert_eq!(seen, [(2, 16, 0), (3, 16, 0), (5, 0, 16)]);
        let (start, half) = (1_000_000, HALF_LIFE.as_secs());
        heat.decay_to(start);
        heat.decay_to(start + half - 1);
        assert_eq!(heat.map().regions[0].reads, 16, "not yet");
        heat.decay_to(start + half + 7);
        assert_eq!(heat.map().regions[0].reads, 8);
        // In steps or at once, restarted in between or not, it comes to the same.
        let again = Heat::new(64 * MIB);
        again.merge(&heat.map()).unwrap();
        again.decay_to(start + 2 * half);
        assert_eq!(again.map().regions[0].reads, 4);
        again.decay_to(5);
        assert_eq!(again.map().regions[0].reads, 4, "a clock that was set back");
        heat.decay_to(start + 60 * half);
        assert!(heat.map().regions.is_empty());
    }

    #[test]
    fn regions_grow_with_the_disk() {
        let huge = Heat::new(16 << 40);
        huge.read((16 << 40) - 512, 512);
        let map = huge.map();
        assert_eq!(map.region_bytes, 16 * MIB);
        assert_eq!(map.regions[0].region, (1 << 20) - 1);
        assert_eq!(map.bytes_of((1 << 20) - 1).end, 16 << 40);
        // Beyond the end there is nothing to count, and nothing breaks.
        huge.read(17 << 40, 512);
        assert!(Heat::new(0).map().regions.is_empty());
    }

    #[test]
    fn a_map_of_another_disk_is_refused() {
        let error = Heat::new(8 * MIB).merge(&Heat::new(9 * MIB).map());
        assert!(matches!(error, Err(HeatError::OtherDisk { .. })));
    }

    #[test]
    fn what_is_read_comes_first_and_what_is_overwritten_last() {
        let heat = Heat::new(64 * MIB);
        (0..100).for_each(|_| heat.read(40 * MIB, 4096));
        heat.read(10 * MIB, 4096);
        heat.read(9 * MIB, 4096);
        (0..10).for_each(|_| heat.written(20 * MIB, 4096));
        // Read and written alike: somebody reads it.
        (0..10).for_each(|_| heat.written(30 * MIB, 4096));
        (0..10).for_each(|_| heat.read(30 * MIB, 4096));
        let geometry = Geometry::new(64 * MIB, 4096).unwrap();
        let order = heat.map().order(geometry);
        let hot: Vec<_> = order.hot().iter().map(|r| r.start / 256).collect();
        assert_eq!(hot, [40, 30, 9]);
        assert_eq!(
            order.hot()[2].len(),
            512,
            "neighbours of a class are one range"
        );
        assert_eq!(order.late(), [BlockRange::new(20 * 256, 21 * 256)]);
    }

    /// A file of the first version must open for ever.
    #[test]
    fn the_first_version_is_read() {
        let mut bytes = b"HKKHEAT1".to_vec();
        for word in [64 * MIB, MIB, 1_700_000_000, 2] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        // Region 2: 16 reads, 0 writes; two passed over; region 5: 0 reads, 300 writes.
        bytes.extend_from_slice(&[2, 16, 0, 2, 0, 0xac, 0x02]);
        bytes.extend_from_slice(&[0xc0, 0xff, 0x20, 0xee]);
        let map = HeatMap::decode(&bytes).unwrap();
        assert_eq!(map.decayed_at_s, 1_700_000_000);
        let seen = map.regions.iter().map(|r| (r.region, r.reads, r.writes));
        assert_eq!(seen.collect::<Vec<_>>(), [(2, 16, 0), (5, 0, 300)]);
        assert_eq!(map.encode(), bytes);
    }

    proptest! {
        #[test]
        fn maps_survive_being_written_down(
            touches in prop::collection::vec((0_u64..4096, 1_u64..(4 << 20), any::<bool>()), 0..200),
        ) {
            let size = 4096 * MIB;
            let heat = Heat::new(size);
            for (region, len, write) in touches {
                let len = len.min(size - region * MIB);
                if write { heat.written(region * MIB, len) } else { heat.read(region * MIB, len) }
            }
            let map = heat.map();
            let bytes = map.encode();
            prop_assert!(bytes.len() <= MAX_MAP_BYTES);
            prop_assert_eq!(&HeatMap::decode(&bytes).unwrap(), &map);
            let fresh = Heat::new(size);
            fresh.merge(&map).unwrap();
            fresh.merge(&map).unwrap();
            prop_assert_eq!(fresh.map(), map);
        }

        /// A flipped bit anywhere is noticed, and nothing that is thrown at the decoder breaks it.
        #[test]
        fn damage_is_noticed(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let heat = Heat::new(64 * MIB);
            (0..64).for_each(|n| heat.read(n * MIB, 4096 * (n + 1)));
            let mut bytes = heat.map().encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(HeatMap::decode(&bytes).is_err());
            prop_assert!(HeatMap::decode(&bytes[..at]).is_err());
        }

        #[test]
        fn any_bytes_are_an_error_or_a_map(
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
            sealed in any::<bool>(),
        ) {
            if sealed && bytes.len() >= 16 {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..16].copy_from_slice(&(64 * MIB).to_le_bytes());
                let crc = crc32c::crc32c(&bytes);
                bytes.extend_from_slice(&crc.to_le_bytes());
            }
            if let Ok(map) = HeatMap::decode(&bytes) {
                prop_assert!(Heat::new(map.size_bytes).merge(&map).is_ok());
            }
        }
    }
}
