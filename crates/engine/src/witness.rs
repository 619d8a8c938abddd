//! How a source that comes back is known to be the same disk.
//!
//! From the handoff on nobody writes at the source, so a block that came from there once must
//! read the same for ever. A [`Witness`] is the checksum of such a block; a few dozen of them are
//! kept, and a source that was away has to read them all the same before it is believed again.
//!
//! Checksums of what the source sent, and not the image's blocks, because these change: the guest
//! writes over them, and after a power cut nobody can tell whether a block that counts as clean
//! holds a write that was never flushed. And the same few every time, because an old copy that
//! differs in one block of twenty would pass sooner or later if every attempt drew new ones.
//!
//! What they cannot see: a disk that differs only where no witness is, and any disk at all before
//! the first blocks have come.

use crate::geometry::{BlockIndex, BlockRange, Geometry};
use crate::journal::{JournalError, Reader, VolumeId};

/// How much of a block is looked at: what a file system keeps in one block, and little enough that
/// all witnesses are asked for in one round trip.
const WITNESS_BYTES: usize = 4096;

/// Witnesses drawn at random from everything that came. With the outermost two that makes 32:
/// 128 KiB to ask for. A disk that differs in one block of ten passes 3 times in 100.
const MAX_DRAWN: usize = 30;

const MAGIC: [u8; 8] = *b"HKKWIT01";

/// What the source sent once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Witness {
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; above zero.
    pub len: u32,
    crc: u32,
}

impl Witness {
    /// Whether `data` is what was there.
    pub fn agrees(&self, data: &[u8]) -> bool {
        u32::try_from(data.len()) == Ok(self.len) && crc32c::crc32c(data) == self.crc
    }
}

/// The witnesses of a move: the outermost two, which on most disks are a partition table or the
/// head of a file system and change with every mount, and others drawn evenly from all that came.
#[derive(Clone, Debug)]
pub struct Witnesses {
    random: u64,
    /// Blocks that came, zeroes included.
    seen: u64,
    outermost: Option<(Witness, Witness)>,
    drawn: Vec<Witness>,
    changed: bool,
}

impl Witnesses {
    /// None yet. `seed` decides which are drawn.
    pub fn new(seed: u64) -> Self {
        Self {
            // Zero is the one state that the generator never leaves.
            random: seed | 1,
            seen: 0,
            outermost: None,
            drawn: Vec::new(),
            changed: false,
        }
    }

    /// Whether there is nothing to compare with.
    pub fn is_empty(&self) -> bool {
        self.outermost.is_none()
    }

    /// All of them, in the order of the disk.
    pub fn all(&self) -> Vec<Witness> {
        let mut all: Vec<Witness> = self
            .outermost
            .into_iter()
            .flat_map(|(first, last)| [first, last])
            .chain(self.drawn.iter().copied())
            .collect();
        all.sort_unstable();
        all.dedup_by_key(|w| w.offset);
        all
    }

    /// Whether they have changed since they were last asked this.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// `data`, the content of `run`, came from the source after the handoff. Zeroes bear no
    /// witness: every disk has some.
    pub fn came(&mut self, geometry: Geometry, run: BlockRange, data: &[u8]) {
        if run.is_empty() {
            return;
        }
        let base = geometry.bytes(run).start;
        let head = |block: u64| {
            let of_block = geometry.bytes(BlockRange::one(BlockIndex(block)));
            let start = usize::try_from(of_block.start - base).ok()?;
            let len = usize::try_from(of_block.len()).ok()?.min(WITNESS_BYTES);
            let bytes = data.get(start..start.checked_add(len)?)?;
            let witness = Witness {
                offset: of_block.start,
                len: u32::try_from(len).ok()?,
                crc: crc32c::crc32c(bytes),
            };
            bytes.iter().any(|b| *b != 0).then_some(witness)
        };
        self.seen = self.seen.saturating_add(run.len());
        let lower = self.outermost.is_none_or(|(w, _)| base < w.offset);
        if lower && let Some(found) = (run.start..run.end).find_map(head) {
            let last = self.outermost.map_or(found, |(_, last)| last);
            self.outermost = Some((found, last));
            self.changed = true;
        }
        let end = geometry.bytes(run).end;
        let higher = self.outermost.is_some_and(|(_, w)| end > w.offset);
        if higher
            && let Some(found) = (run.start..run.end).rev().find_map(head)
            && let Some((first, _)) = self.outermost
        {
            self.outermost = Some((first, found));
            self.changed = true;
        }
        self.draw(run, head);
    }

    /// Reservoir sampling, one draw a run: each block that ever came is kept with the same chance.
    fn draw(&mut self, run: BlockRange, head: impl Fn(u64) -> Option<Witness>) {
        let room = self.drawn.len() < MAX_DRAWN;
        let chance = run.len().saturating_mul(MAX_DRAWN as u64);
        if !room && self.random_below(self.seen) >= chance {
            return;
        }
        let Some(witness) = head(run.start + self.random_below(run.len())) else {
            return;
        };
        if room {
            self.drawn.push(witness);
        } else {
            let place = self.random_below(MAX_DRAWN as u64);
            let place = usize::try_from(place).expect("below a small constant");
            self.drawn[place] = witness;
        }
        self.changed = true;
    }

    fn random_below(&mut self, bound: u64) -> u64 {
        // Xorshift: even enough, and the same for the same seed.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % bound.max(1)
    }

    /// The content of the file `witnesses`.
    pub fn encode(&self, volume: VolumeId) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&volume);
        out.extend_from_slice(&self.seen.to_le_bytes());
        let outermost = self.outermost.into_iter().flat_map(|(a, b)| [a, b]);
        let all: Vec<Witness> = outermost.chain(self.drawn.iter().copied()).collect();
        out.extend_from_slice(&(all.len() as u64).to_le_bytes());
        for witness in all {
            out.extend_from_slice(&witness.offset.to_le_bytes());
            out.extend_from_slice(&witness.len.to_le_bytes());
            out.extend_from_slice(&witness.crc.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads what [`Witnesses::encode`] wrote for this volume, and goes on with `seed`.
    ///
    /// # Errors
    /// Anything else.
    pub fn decode(
        content: &[u8],
        volume: VolumeId,
        geometry: Geometry,
        seed: u64,
    ) -> Result<Self, JournalError> {
        let body_len = content
            .len()
            .checked_sub(4)
            .ok_or(JournalError::Corrupt("it ends too early"))?;
        let (body, crc) = content.split_at(body_len);
        let mut read = Reader::new(body);
        if read.take(MAGIC.len())? != MAGIC {
            return Err(JournalError::Format);
        }
        if crc != crc32c::crc32c(body).to_le_bytes() {
            return Err(JournalError::Corrupt("its checksum is wrong"));
        }
        if read.take(volume.len())? != volume {
            return Err(JournalError::Foreign);
        }
        let mut these = Self::new(seed);
        these.seen = read.u64()?;
        let count = read.u64()?;
        if count == 1 || count > 2 + MAX_DRAWN as u64 {
            return Err(JournalError::Corrupt("it has too many witnesses, or one"));
        }
        let mut all = Vec::new();
        for _ in 0..count {
            let witness = Witness {
                offset: read.u64()?,
                len: read.u32()?,
                crc: read.u32()?,
            };
            let end = witness.offset.checked_add(u64::from(witness.len));
            let sound = witness.len > 0
                && usize::try_from(witness.len).is_ok_and(|len| len <= WITNESS_BYTES)
                && end.is_some_and(|end| end <= geometry.size_bytes());
            if !sound {
                return Err(JournalError::Corrupt("a witness is not on the disk"));
            }
            all.push(witness);
        }
        if !read.is_empty() {
            return Err(JournalError::Corrupt("it is too long"));
        }
        if let [first, last, drawn @ ..] = &all[..] {
            these.outermost = Some((*first, *last));
            these.drawn = drawn.to_vec();
        }
        Ok(these)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const BLOCK: usize = 4096;

    fn geometry() -> Geometry {
        Geometry::new(1000 * BLOCK as u64 + 512, 4096).expect("a small disk")
    }

    fn content(block: u64) -> Vec<u8> {
        let tag = block.to_le_bytes();
        tag.iter().copied().cycle().take(BLOCK).collect()
    }

    /// Blocks whose content tells their number, a run at a time.
    fn bring(witnesses: &mut Witnesses, run: BlockRange) {
        let mut data: Vec<u8> = (run.start..run.end).flat_map(content).collect();
        let len = usize::try_from(geometry().bytes(run).len()).expect("a small disk");
        data.truncate(len);
        witnesses.came(geometry(), run, &data);
    }

    #[test]
    fn the_outermost_are_kept_and_the_rest_is_spread() {
        let mut witnesses = Witnesses::new(7);
        for at in (100..900).step_by(4) {
            bring(&mut witnesses, BlockRange::new(at, at + 4));
        }
        let all = witnesses.all();
        assert!(all.len() > 25 && all.len() <= 32, "{}", all.len());
        assert_eq!(all[0].offset, 100 * 4096);
        assert_eq!(all.last().unwrap().offset, 899 * 4096);
        for witness in &all {
            let block = witness.offset / 4096;
            assert!(witness.agrees(&content(block)));
            assert!(!witness.agrees(&content(block + 1)));
            assert!(!witness.agrees(&content(block)[1..]));
        }
        let upper_half = all.iter().filter(|w| w.offset > 500 * 4096).count();
        assert!((8..=24).contains(&upper_half), "{upper_half} of {all:?}");
    }

    #[test]
    fn zeroes_bear_no_witness() {
        let mut witnesses = Witnesses::new(7);
        let run = BlockRange::new(1, 3);
        witnesses.came(geometry(), run, &[0; 2 * BLOCK]);
        assert!(witnesses.is_empty() && witnesses.all().is_empty());
        let mut data = vec![0; 2 * BLOCK];
        data[BLOCK + 5] = 1;
        witnesses.came(geometry(), run, &data);
        assert_eq!(witnesses.all().len(), 1);
        assert_eq!(witnesses.all()[0].offset, 2 * 4096);
    }

    #[test]
    fn the_short_last_block_can_be_one() {
        let mut witnesses = Witnesses::new(7);
        bring(&mut witnesses, BlockRange::new(1000, 1001));
        assert_eq!(witnesses.all()[0].len, 512);
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let mut witnesses = Witnesses::new(7);
        let read = |bytes: &[u8]| Witnesses::decode(bytes, [3; 16], geometry(), 9);
        assert!(read(&witnesses.encode([3; 16])).unwrap().is_empty());
        for at in 0..200 {
            bring(&mut witnesses, BlockRange::new(at, at + 1));
        }
        let bytes = witnesses.encode([3; 16]);
        let back = read(&bytes).unwrap();
        assert_eq!(back.all(), witnesses.all());
        assert_eq!(back.encode([3; 16]), bytes);
        assert_eq!(
            Witnesses::decode(&bytes, [4; 16], geometry(), 9).unwrap_err(),
            JournalError::Foreign
        );
        for at in 0..bytes.len() {
            assert!(read(&bytes[..at]).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << bit;
                assert!(read(&bad).is_err(), "bit {bit} of byte {at}");
            }
        }
    }
}
