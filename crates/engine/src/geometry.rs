//! The shape of a disk: its size and its blocks.
//!
//! Owns the arithmetic between byte offsets and blocks, so that nobody else does it by hand.
//! The last block of a disk may be short: a disk's size is a multiple of the sector, not of the
//! block.

use std::fmt;

/// Bytes in a sector, the smallest unit whose validity is tracked.
pub const SECTOR_BYTES: u64 = 512;

/// The smallest block that can be asked for.
pub const MIN_BLOCK_BYTES: u32 = 512;

/// The largest block that can be asked for.
pub const MAX_BLOCK_BYTES: u32 = 1 << 20;

/// The block that is used when nothing else is asked for: a page, and the usual cluster of a
/// guest's file system.
pub const DEFAULT_BLOCK_BYTES: u32 = 4096;

/// The largest disk: 2^56 bytes, so that sums of offsets and lengths never wrap.
pub const MAX_DISK_BYTES: u64 = 1 << 56;

/// The number of a block, counted from the start of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// A half-open run of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockRange {
    /// The first block.
    pub start: u64,
    /// The block after the last one.
    pub end: u64,
}

impl fmt::Debug for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl BlockRange {
    /// The run from `start` up to, not including, `end`. An inverted run becomes an empty one.
    pub fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            end: end.max(start),
        }
    }

    /// A run of a single block.
    pub fn one(block: BlockIndex) -> Self {
        Self {
            start: block.0,
            end: block.0 + 1,
        }
    }

    /// How many blocks it holds.
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether it holds none.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// Whether `block` lies in it.
    pub fn contains(self, block: BlockIndex) -> bool {
        self.start <= block.0 && block.0 < self.end
    }

    /// Whether the two share a block.
    pub fn overlaps(self, other: BlockRange) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The blocks that both hold.
    pub fn intersection(self, other: BlockRange) -> BlockRange {
        BlockRange::new(self.start.max(other.start), self.end.min(other.end))
    }
}

/// A half-open run of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// The offset of the first byte.
    pub start: u64,
    /// The offset after the last byte.
    pub end: u64,
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl ByteRange {
    /// The run of `len` bytes at `offset`. The sum must not wrap: callers have checked both
    /// against a disk's size, which is at most [`MAX_DISK_BYTES`].
    pub fn at(offset: u64, len: u64) -> Self {
        Self {
            start: offset,
            end: offset.saturating_add(len),
        }
    }

    /// How many bytes it holds.
    pub fn len(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it holds none.
    pub fn is_empty(self) -> bool {
        self.start >= self.end
    }
}

/// Why a geometry was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The block size is not one of those that are supported.
    #[error(
        "block size {0} is not a power of two from {MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES} bytes"
    )]
    BlockSize(u32),
    /// The disk is not a whole number of sectors.
    #[error("disk size {0} is not a multiple of the sector ({SECTOR_BYTES} bytes)")]
    NotSectors(u64),
    /// The disk is larger than any that is supported.
    #[error("disk size {0} is above the largest that is supported ({MAX_DISK_BYTES} bytes)")]
    TooLarge(u64),
}

/// The size of a disk and of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    size_bytes: u64,
    block_shift: u32,
}

impl Geometry {
    /// Checks and keeps a disk size and a block size, both in bytes.
    ///
    /// # Errors
    /// The block size is no power of two from 512 to 1 MiB, or the disk is no whole number of
    /// sectors, or larger than [`MAX_DISK_BYTES`].
    pub fn new(size_bytes: u64, block_bytes: u32) -> Result<Self, GeometryError> {
        if !block_bytes.is_power_of_two()
            || !(MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&block_bytes)
        {
            return Err(GeometryError::BlockSize(block_bytes));
        }
        if !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(GeometryError::NotSectors(size_bytes));
        }
        if size_bytes > MAX_DISK_BYTES {
            return Err(GeometryError::TooLarge(size_bytes));
        }
        Ok(Self {
            size_bytes,
            block_shift: block_bytes.trailing_zeros(),
        })
    }

    /// The disk's size in bytes.
    pub fn size_bytes(self) -> u64 {
        self.size_bytes
    }

    /// The block's size in bytes.
    pub fn block_bytes(self) -> u64 {
        1 << self.block_shift
    }

    /// How many blocks there are, a short last one included.
    pub fn blocks(self) -> u64 {
        self.size_bytes.div_ceil(self.block_bytes())
    }

    /// All blocks.
    pub fn all(self) -> BlockRange {
        BlockRange::new(0, self.blocks())
    }

    /// How many sectors a full block has, 1 to 2048.
    pub fn sectors_per_block(self) -> u32 {
        1 << (self.block_shift - SECTOR_BYTES.trailing_zeros())
    }

    /// How many sectors `block` has: fewer than usual where the disk ends within it.
    pub fn sectors_in(self, block: BlockIndex) -> u32 {
        let sectors = self.bytes(BlockRange::one(block)).len() / SECTOR_BYTES;
        u32::try_from(sectors).expect("a block has at most 2048 sectors")
    }

    /// The block that holds the byte at `offset`.
    pub fn block_of(self, offset: u64) -> BlockIndex {
        BlockIndex(offset >> self.block_shift)
    }

    /// The blocks that `bytes` touches, even in part.
    pub fn covering(self, bytes: ByteRange) -> BlockRange {
        if bytes.is_empty() {
            let at = bytes.start >> self.block_shift;
            return BlockRange::new(at, at);
        }
        BlockRange::new(
            bytes.start >> self.block_shift,
            ((bytes.end - 1) >> self.block_shift) + 1,
        )
    }

    /// The blocks that lie wholly within `bytes`. A short last block counts as whole when `bytes`
    /// reaches the end of the disk.
    pub fn within(self, bytes: ByteRange) -> BlockRange {
        let start = bytes.start.div_ceil(self.block_bytes());
        let end = if bytes.end >= self.size_bytes {
            self.blocks()
        } else {
            bytes.end >> self.block_shift
        };
        BlockRange::new(start, end)
    }

    /// The bytes of `blocks`, cut at the end of the disk.
    pub fn bytes(self, blocks: BlockRange) -> ByteRange {
        ByteRange {
            start: (blocks.start << self.block_shift).min(self.size_bytes),
            end: (blocks.end << self.block_shift).min(self.size_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_last_block_counts() {
        let g = Geometry::new(4096 * 3 + 512, 4096).unwrap();
        assert_eq!(g.blocks(), 4);
        assert_eq!(g.bytes(BlockRange::one(BlockIndex(3))).len(), 512);
        assert_eq!(g.sectors_in(BlockIndex(3)), 1);
        assert_eq!(g.sectors_in(BlockIndex(2)), 8);
        assert_eq!(
            g.within(ByteRange::at(4096 * 3, 512)),
            BlockRange::new(3, 4)
        );
        assert_eq!(g.within(ByteRange::at(1, 4096 * 2)), BlockRange::new(1, 2));
        assert_eq!(g.within(ByteRange::at(1, 100)), BlockRange::new(1, 1));
        assert_eq!(g.covering(ByteRange::at(1, 4096)), BlockRange::new(0, 2));
        assert_eq!(g.covering(ByteRange::at(8192, 0)).len(), 0);
    }

    #[test]
    fn bad_geometries_are_refused() {
        assert_eq!(
            Geometry::new(4096, 1000),
            Err(GeometryError::BlockSize(1000))
        );
        assert_eq!(
            Geometry::new(4096, 2 << 20),
            Err(GeometryError::BlockSize(2 << 20))
        );
        assert_eq!(
            Geometry::new(1000, 4096),
            Err(GeometryError::NotSectors(1000))
        );
        assert!(Geometry::new(!511_u64, 4096).is_err());
    }
}
