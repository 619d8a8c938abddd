//! What is on the disk, so that any answer can be checked without a second copy of the disk.
//!
//! Owns the layout of a 4 KiB block: its offset (8 bytes), the number of the write that put it
//! there (8 bytes, zero for the initial image), then bytes of a pool chosen by both. A write needs
//! no copying (the pool is sent from where it is), a check is one comparison of memory.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Bytes in a block of the pattern.
pub const BLOCK_BYTES: usize = 4096;
/// Bytes at the start of a block that say what the rest is.
pub const STAMP_BYTES: usize = 16;
/// Blocks in the pool: enough that a wrong block is told from the right one, and small enough
/// (256 KiB) to stay in the second-level cache of the client's core.
const POOL_BLOCKS: u64 = 64;

/// The pool that blocks are made from.
pub struct Content {
    pool: Vec<u8>,
}

impl Content {
    /// Makes the pool; always the same.
    pub fn new() -> Self {
        let mut random = Random::new(0x0068_696b_6b6f_7368);
        let words = POOL_BLOCKS * 512;
        let pool = (0..words)
            .flat_map(|_| random.next().to_le_bytes())
            .collect();
        Self { pool }
    }

    /// The first bytes of the block at `offset` as put there by write number `number`.
    pub fn stamp(offset: u64, number: u64) -> [u8; STAMP_BYTES] {
        let mut stamp = [0; STAMP_BYTES];
        stamp[..8].copy_from_slice(&offset.to_le_bytes());
        stamp[8..].copy_from_slice(&number.to_le_bytes());
        stamp
    }

    /// What follows the stamp, as a place in [`Self::bytes`].
    pub fn tail(offset: u64, number: u64) -> Range<usize> {
        let choice = mix(offset ^ number.rotate_left(32)) % POOL_BLOCKS;
        let start = usize::try_from(choice).expect("less than 64") * BLOCK_BYTES;
        start + STAMP_BYTES..start + BLOCK_BYTES
    }

    /// The bytes at a place that [`Self::tail`] told.
    pub fn bytes(&self, place: Range<usize>) -> &[u8] {
        &self.pool[place]
    }

    /// Checks that `data`, read at `offset` (both multiples of a block), is whole blocks that
    /// belong there; returns the number of the write that made the first one.
    pub fn check(&self, offset: u64, data: &[u8]) -> Result<u64> {
        let mut first = None;
        for (index, block) in (0_u64..).zip(data.chunks(BLOCK_BYTES)) {
            let here = offset + index * 4096;
            ensure!(
                block.len() == BLOCK_BYTES,
                "a read at {offset} ends inside a block"
            );
            let found = u64::from_le_bytes(block[..8].try_into().expect("eight bytes"));
            let number = u64::from_le_bytes(block[8..16].try_into().expect("eight bytes"));
            ensure!(
                found == here,
                "wrong data at {here}: it says it belongs at {found}"
            );
            ensure!(
                block[STAMP_BYTES..] == *self.bytes(Self::tail(here, number)),
                "corrupt data at {here}"
            );
            first.get_or_insert(number);
        }
        first.context("an empty read has nothing to check")
    }

    /// Writes the initial image of `size_bytes`, a multiple of 1 MiB, to `path`.
    pub fn write_image(&self, path: &Path, size_bytes: u64) -> Result<()> {
        let what = || format!("write the image {}", path.display());
        let mut file = File::create(path).with_context(what)?;
        let mut buffer = Vec::with_capacity(1 << 20);
        let mut offset = 0;
        while offset < size_bytes {
            buffer.clear();
            while buffer.len() < 1 << 20 {
                buffer.extend_from_slice(&Self::stamp(offset, 0));
                buffer.extend_from_slice(self.bytes(Self::tail(offset, 0)));
                offset += 4096;
            }
            file.write_all(&buffer).with_context(what)?;
        }
        Ok(())
    }
}

/// A small generator (xorshift64*), the same sequence for the same seed on every machine.
pub struct Random(u64);

impl Random {
    /// A generator; a zero seed is replaced, because it would give zeros for ever.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed).max(1))
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Spreads the bits of a number (the finaliser of splitmix64).
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn block(content: &Content, offset: u64, number: u64) -> Vec<u8> {
        [
            &Content::stamp(offset, number)[..],
            content.bytes(Content::tail(offset, number)),
        ]
        .concat()
    }

    #[test]
    fn right_blocks_pass_and_tell_their_write() {
        let content = Content::new();
        let data = [block(&content, 8192, 7), block(&content, 12288, 9)].concat();
        assert_eq!(content.check(8192, &data).unwrap(), 7);
    }

    #[test]
    fn misplaced_torn_and_damaged_blocks_are_found() {
        let content = Content::new();
        assert!(content.check(4096, &block(&content, 0, 7)).is_err());
        let mut torn = block(&content, 4096, 1);
        let other = (2..)
            .map(|n| block(&content, 4096, n))
            .find(|b| b[16..] != torn[16..]);
        torn[512..].copy_from_slice(&other.unwrap()[512..]);
        assert!(content.check(4096, &torn).is_err());
        let mut damaged = block(&content, 4096, 1);
        damaged[4095] ^= 1;
        assert!(content.check(4096, &damaged).is_err());
        assert!(content.check(4096, &damaged[..100]).is_err());
    }
}
