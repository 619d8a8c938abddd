//! The local image and the durable state beside it.
//!
//! [`Store`] is the seam: bytes at offsets, with holes and a way to make them durable. It knows
//! nothing of sources or residency.

mod behind;
mod blockdev;
mod extent_cache;
mod faulty;
mod file;
mod identity;
mod image;
pub mod live;
mod lock;
pub mod medium;
mod memory;
mod open;
mod pool;
mod range;
pub mod state;
pub mod suspect;
mod sync_gate;
mod uring;
mod zero;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod conformance;

pub use faulty::{Fault, FaultyStore, StoreOp, When};
pub use file::FileStore;
pub use identity::{ImageIdentity, VOLUME_TAG_MAX_BYTES};
pub use memory::{Chooser, MemoryStore};
pub use open::{EngineChoice, OpenOptions, StoreError};

use std::io;
use std::os::fd::BorrowedFd;

/// What an extent of a store holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, as far as anybody knows.
    Data,
    /// Allocated and known to read as zeroes.
    Zero,
    /// Not allocated; reads as zeroes.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes, above zero.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
}

/// How zeroes are to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// A hole may be punched (preferred), else zeroes are written by the quickest means.
    MayPunch,
    /// The range must stay or become allocated.
    Allocate,
    /// Only if it is quicker than writing zeroes (a hole or a kernel primitive); otherwise fails
    /// with [`io::ErrorKind::Unsupported`] and changes nothing.
    FastOnly,
}

/// Called with the buffer when a submitted read ends.
pub type ReadDone = Box<dyn FnOnce(io::Result<Vec<u8>>) + Send>;

/// A local disk image. Ranges have been checked against [`Store::size_bytes`] by the caller; an
/// implementation answers [`io::ErrorKind::InvalidInput`] to one that was not, and touches nothing.
///
/// A write that has returned is seen by every later read, and survives the end of the process.
/// It survives a power cut once a [`Store::sync`] that began after it has returned `Ok`.
pub trait Store: Send + Sync + 'static {
    /// The size in bytes.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` if that needs no waiting. `Ok(false)` means it would wait, and `buf` then holds
    /// nothing of meaning.
    ///
    /// # Errors
    /// The error of the medium.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool>;

    /// Fills `buf`, waiting as long as it takes.
    ///
    /// # Errors
    /// The error of the medium; a short read is [`io::ErrorKind::UnexpectedEof`].
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Hands up to `len` bytes to a socket without bringing them into this process, waiting for
    /// the medium and for the socket; tells how many. What is written to the range before the
    /// peer takes it may show there, as it may for any read under way.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where that cannot be done, and nothing was sent; the error
    /// of the medium or of the socket.
    fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
        let _ = (socket, offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads `len` bytes somewhere else (a ring, a pool of threads) and calls `done` there.
    /// Returns at once.
    fn submit_read(&self, offset: u64, len: usize, done: ReadDone);

    /// Writes `data`, waiting as long as it takes.
    ///
    /// # Errors
    /// The error of the medium.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// The same for what nobody has asked for yet: it is brought to the medium soon, so that a sync finds
    /// little of it to write. It is no more durable than what is written otherwise.
    ///
    /// # Errors
    /// The error of the medium.
    fn write_behind(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data)
    }

    /// Whether the medium is so far behind that [`Store::write_behind`] should rest for a while.
    fn is_far_behind(&self) -> bool {
        false
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The error of the medium; [`io::ErrorKind::Unsupported`] only with [`ZeroMode::FastOnly`].
    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> io::Result<()>;

    /// Makes all that was written before the call durable (`fdatasync`).
    ///
    /// # Errors
    /// The error of the medium. After one, nothing is known of what is durable: the caller must
    /// not call again and believe the answer.
    fn sync(&self) -> io::Result<()>;

    /// Lets go of the medium, and of its lock, while others may still hold this. Whatever is asked of
    /// it from then on fails; nobody may rely on it any more.
    ///
    /// # Errors
    /// It is still held.
    fn let_go(&self) -> io::Result<()> {
        Ok(())
    }

    /// When it was written last, in nanoseconds since 1970; `None` where that cannot be told.
    ///
    /// # Errors
    /// The medium failed.
    fn modified(&self) -> io::Result<Option<i64>> {
        Ok(None)
    }

    /// Extents from `offset` on, in order and without gaps, at most `max` of them, covering at
    /// most `len` bytes (fewer when `max` is reached). Neighbours of one kind are merged.
    ///
    /// # Errors
    /// The error of the medium.
    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<Extent>>;
}
