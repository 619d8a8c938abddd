//! Making ranges of an image read as zeroes: with the kernel's primitives where they work, by
//! writing zeroes where they do not. Remembers what does not work here. Called by the file store.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::ZeroMode;
use crate::image::{Image, Medium};
use crate::range::{len_u64, len_usize};

/// Zeroes are written in pieces of so many bytes at most.
const WRITE_PIECE_BYTES: usize = 1 << 20;

/// The smallest page of any machine.
const PAGE_BYTES: usize = 4096;

/// What the primitives are aligned to inwards, at least: the block of the usual file systems and
/// the page of the cache. The kernel could do the edges of a file by itself, but for a range
/// without a whole block a write is cheaper than a transaction of the file system.
const MIN_BLOCK_BYTES: u64 = 4096;

/// Zeroes to write, beginning at a page.
///
/// They are pages that the kernel gave zeroed and nobody has touched, so that they cost nothing
/// until they are written from. Therefore a write from them faults at every page, and there, and
/// only there, can a kill end it: on a page of ours, which must not lie within a sector of the
/// image, or that sector would be left half zeroed.
struct Zeroes {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Zeroes {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + PAGE_BYTES];
        let start = memory.as_ptr().align_offset(PAGE_BYTES).min(PAGE_BYTES);
        Self { memory, start, len }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

/// How an image is zeroed, and what has been found not to work.
#[derive(Debug)]
pub(crate) struct Zeroer {
    block_bytes: u64,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
}

#[derive(Clone, Copy)]
enum Primitive {
    /// Deallocates.
    Punch,
    /// Keeps or makes the range allocated.
    ZeroRange,
}

impl Zeroer {
    /// `logical_block_bytes` is that of the device, and anything for a file.
    pub(crate) fn new(logical_block_bytes: u64) -> Self {
        Self {
            block_bytes: MIN_BLOCK_BYTES.max(logical_block_bytes),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
        }
    }

    /// See [`Store::write_zeroes`](crate::Store::write_zeroes). The range is within the image.
    pub(crate) fn zero(
        &self,
        image: &Image,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> io::Result<()> {
        let end = offset + len;
        let inner = offset.next_multiple_of(self.block_bytes)..end - end % self.block_bytes;
        if inner.start >= inner.end {
            return self.zero_small(image, offset, len, mode);
        }
        // The middle first: should there be no quick way, nothing has been changed yet.
        if !self.try_primitives(image, inner.start, inner.end - inner.start, mode)? {
            if mode == ZeroMode::FastOnly {
                return Err(io::ErrorKind::Unsupported.into());
            }
            return write_zeroes(image, offset, len);
        }
        write_zeroes(image, offset, inner.start - offset)?;
        write_zeroes(image, inner.end, end - inner.end)
    }

    /// A range without a whole block, for which writing is the quick way.
    fn zero_small(&self, image: &Image, offset: u64, len: u64, mode: ZeroMode) -> io::Result<()> {
        // So that the answer to "only if quick" does not depend on the length once it is known.
        let quick = Self::candidates(image.medium, mode)
            .iter()
            .any(|&it| !self.known(it));
        if mode == ZeroMode::FastOnly && !quick {
            return Err(io::ErrorKind::Unsupported.into());
        }
        write_zeroes(image, offset, len)
    }

    /// `Ok(false)` when no primitive works here; then nothing has been changed.
    fn try_primitives(
        &self,
        image: &Image,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> io::Result<bool> {
        for &primitive in Self::candidates(image.medium, mode) {
            if self.run(image, offset, len, primitive)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What may be tried for a mode, best first.
    fn candidates(medium: Medium, mode: ZeroMode) -> &'static [Primitive] {
        match (mode, medium) {
            (ZeroMode::Allocate, _) => &[Primitive::ZeroRange],
            // On a block device without an offload the kernel writes the zeroes itself for a zero
            // range: right, but not quick.
            (ZeroMode::FastOnly, Medium::Block) => &[Primitive::Punch],
            (ZeroMode::MayPunch | ZeroMode::FastOnly, _) => {
                &[Primitive::Punch, Primitive::ZeroRange]
            }
        }
    }

    fn run(&self, image: &Image, offset: u64, len: u64, primitive: Primitive) -> io::Result<bool> {
        if self.known(primitive) {
            return Ok(false);
        }
        let flags = FallocateFlags::KEEP_SIZE
            | match primitive {
                Primitive::Punch => FallocateFlags::PUNCH_HOLE,
                Primitive::ZeroRange => FallocateFlags::ZERO_RANGE,
            };
        loop {
            match rustix::fs::fallocate(&image.file, flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    self.flag(primitive).store(true, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether a primitive is known not to work.
    fn known(&self, primitive: Primitive) -> bool {
        self.flag(primitive).load(Ordering::Relaxed)
    }

    fn flag(&self, primitive: Primitive) -> &AtomicBool {
        match primitive {
            Primitive::Punch => &self.no_punch,
            Primitive::ZeroRange => &self.no_zero_range,
        }
    }
}

/// Writes zeroes in bounded pieces.
fn write_zeroes(image: &Image, mut offset: u64, mut len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let piece_bytes = len.min(len_u64(WRITE_PIECE_BYTES));
    let zeroes = Zeroes::new(len_usize(piece_bytes));
    while len > 0 {
        let piece = len.min(piece_bytes);
        image.write_all(offset, &zeroes.bytes()[..len_usize(piece)])?;
        offset += piece;
        len -= piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{PAGE_BYTES, Zeroes};

    /// A daemon that was killed while it zeroed 64 KiB left a sector of which the first 480 bytes
    /// were zero and the last 32 were not: the buffer it wrote from began 16 bytes into a page, was
    /// never touched, and the kill came at a fault in it. No disk tears a sector like that.
    #[test]
    fn zeroes_begin_at_a_page() {
        for len in [1, 512, 4096, 65_536, 1 << 20] {
            let zeroes = Zeroes::new(len);
            assert_eq!(zeroes.bytes().len(), len);
            assert_eq!(zeroes.bytes().as_ptr().align_offset(PAGE_BYTES), 0);
        }
    }
}
