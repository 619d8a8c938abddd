//! The open image and the system calls on it: whole reads, whole writes, reads that do not wait.
//! Owns the descriptor (and with it the lock). Knows nothing of engines, caches or zeroing
//! policy. Called by the file store and by the engines that read for it.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::buffer::spare_capacity;
use rustix::io::{DupFlags, Errno, ReadWriteFlags};

use crate::range::len_u64;

/// What the image is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Medium {
    /// A regular file on a file system.
    Regular,
    /// A regular file in memory (tmpfs, ramfs): a read never waits for a disk.
    RegularInMemory,
    /// A block device.
    Block,
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) size: u64,
    pub(crate) medium: Medium,
    pub(crate) read_only: bool,
    /// The file system does not know `RWF_NOWAIT`; asked once.
    nowait_unsupported: AtomicBool,
}

impl Image {
    pub(crate) fn new(
        file: File,
        path: PathBuf,
        size: u64,
        medium: Medium,
        read_only: bool,
    ) -> Self {
        let nowait_unsupported = AtomicBool::new(false);
        Self {
            file,
            path,
            size,
            medium,
            read_only,
            nowait_unsupported,
        }
    }

    /// Fills `buf` if the page cache has all of it. The range is within the image.
    pub(crate) fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.medium == Medium::RegularInMemory {
            return self.read_exact(offset, buf).map(|()| true);
        }
        if self.nowait_unsupported.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let wanted = buf.len();
        let mut parts = [IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.file, &mut parts, offset, ReadWriteFlags::NOWAIT) {
            // A short read means that the rest is not in the cache.
            Ok(got) => Ok(got == wanted),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.nowait_unsupported.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Fills `buf`, waiting. The range is within the image.
    pub(crate) fn read_exact(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match rustix::io::pread(&self.file, &mut *buf, offset) {
                Ok(0) => return Err(self.unexpected_end(offset)),
                Ok(got) => {
                    offset += len_u64(got);
                    buf = &mut buf[got..];
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Reads `len` bytes into a buffer of its own, without zeroing that first.
    pub(crate) fn read_vec(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = allocate(len)?;
        while buf.len() < len {
            let at = offset + len_u64(buf.len());
            match rustix::io::pread(&self.file, spare_capacity(&mut buf), at) {
                Ok(0) => return Err(self.unexpected_end(at)),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        buf.truncate(len); // an allocation may be larger than what was asked for
        Ok(buf)
    }

    /// Writes all of `data`. The range is within the image.
    pub(crate) fn write_all(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            match rustix::io::pwrite(&self.file, data, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(put) => {
                    offset += len_u64(put);
                    data = &data[put..];
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Puts nothing in the place of the image, in one step: what is read from here on has come to its
    /// end, and what is written fails. The lock goes with what was open.
    pub(crate) fn let_go(&self) -> io::Result<()> {
        let nothing = File::open("/dev/null")?;
        // SAFETY: the descriptor is ours and open for as long as `self.file` lives, which goes on
        // owning it: this other owner of it is never dropped. dup3 replaces what it refers to
        // atomically, so that nobody who uses it meanwhile meets a closed one.
        let mut held = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(self.file.as_raw_fd()) });
        Ok(rustix::io::dup3(&nothing, &mut held, DupFlags::CLOEXEC)?)
    }

    pub(crate) fn unexpected_end(&self, offset: u64) -> io::Error {
        io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!(
                "{} ended at {offset} of {} bytes: has it been truncated?",
                self.path.display(),
                self.size
            ),
        )
    }
}

/// An empty buffer with room for `len` bytes.
///
/// # Errors
/// `ENOMEM` instead of the abort that an allocation ends in otherwise.
pub(crate) fn allocate(len: usize) -> io::Result<Vec<u8>> {
    let mut buf = Vec::new();
    buf.try_reserve_exact(len)
        .map_err(|_| io::Error::from(Errno::NOMEM))?;
    Ok(buf)
}
