//! An image at this site that may hold blocks of a disk that moves here. It is only ever read, and
//! nothing that is read is believed before it was hashed.

use std::fs::{File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where blocks may be found.
#[derive(Debug)]
pub struct SeedImage {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    own: bool,
}

impl SeedImage {
    /// Opens the image at `path`. `image` is the one that the disk moves into: it may be its own
    /// seed.
    ///
    /// # Errors
    /// It cannot be read, or is neither a file nor a block device.
    pub fn open(path: &Path, image: &Path) -> io::Result<Self> {
        let kind = std::fs::metadata(path)?;
        // Opening a pipe would wait for whoever writes into it.
        if !kind.is_file() && !kind.file_type().is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a file nor a block device",
            ));
        }
        let mut file = File::open(path)?;
        let size_bytes = file.seek(SeekFrom::End(0))?;
        let own = std::fs::metadata(image).is_ok_and(|image| same(&kind, &image));
        Ok(Self {
            path: path.to_owned(),
            file,
            size_bytes,
            own,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the image that the disk moves into.
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// The next bytes at or behind `offset` that are no hole, from where to where; all that is left, where
    /// nobody tells. One at a time asks: the answer comes by way of the file's position.
    pub(super) fn data_from(&self, offset: u64) -> Option<(u64, u64)> {
        if offset >= self.size_bytes {
            return None;
        }
        let seek = |to| rustix::fs::seek(&self.file, to);
        match seek(rustix::fs::SeekFrom::Data(offset)) {
            Ok(start) => {
                let hole = seek(rustix::fs::SeekFrom::Hole(start));
                let end = hole.unwrap_or(self.size_bytes).min(self.size_bytes);
                // It may have been cut or have grown meanwhile.
                (start < end).then_some((start, end))
            }
            Err(rustix::io::Errno::NXIO) => None,
            Err(_) => Some((offset, self.size_bytes)),
        }
    }

    /// How much of it is no hole.
    pub(super) fn data_bytes(&self) -> u64 {
        let (mut at, mut bytes) = (0, 0);
        while let Some((start, end)) = self.data_from(at) {
            bytes += end - start;
            at = end;
        }
        bytes
    }

    /// Reads at `offset`; tells how much of `buf` is filled. It may end, or have been cut, anywhere.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buf.len() && offset < self.size_bytes {
            let at = offset + u64::try_from(filled).map_err(io::Error::other)?;
            match self.file.read_at(&mut buf[filled..], at) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(filled)
    }
}

fn same(a: &Metadata, b: &Metadata) -> bool {
    if a.file_type().is_block_device() {
        b.file_type().is_block_device() && a.rdev() == b.rdev()
    } else {
        (a.dev(), a.ino()) == (b.dev(), b.ino())
    }
}
