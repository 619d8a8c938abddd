//! What tells one image from another: the inode, a mark in an extended attribute, and whether
//! there is anything in it at all. Called by who ties durable state to an image.

use std::io;

use rustix::fs::{SeekFrom, XattrFlags};
use rustix::io::Errno;

use crate::file::FileStore;
use crate::image::{Image, Medium};

/// Bytes that a volume's mark may have at most.
pub const VOLUME_TAG_MAX_BYTES: usize = 1024;

const VOLUME_TAG: &str = "user.hikkoshi.volume";

/// Looked at on either end of a block device, in bytes: where partition tables, file systems, LVM
/// and RAID keep what identifies them.
const BLANK_EDGE_BYTES: u64 = 1 << 20;
/// Looked at in between: so many samples, evenly spread, of so many bytes.
const BLANK_SAMPLES: u64 = 64;
const BLANK_SAMPLE_BYTES: u64 = 4096;

/// Which file an image is, in this boot of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageIdentity {
    /// The device number of the file system, or of the block device itself.
    pub device: u64,
    /// The inode; 0 for a block device, whose node is made anew with every boot.
    pub inode: u64,
}

impl Image {
    pub(crate) fn identity(&self) -> io::Result<ImageIdentity> {
        let stat = rustix::fs::fstat(&self.file)?;
        Ok(if self.medium == Medium::Block {
            ImageIdentity {
                device: stat.st_rdev,
                inode: 0,
            }
        } else {
            ImageIdentity {
                device: stat.st_dev,
                inode: stat.st_ino,
            }
        })
    }
}

impl FileStore {
    /// Which file this is. Stays across renames, not across copies; device numbers may change
    /// with a reboot.
    ///
    /// # Errors
    /// The error of `fstat`.
    pub fn identity(&self) -> io::Result<ImageIdentity> {
        self.image().identity()
    }

    /// The mark that [`FileStore::set_volume_tag`] left, if any.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where images cannot be marked;
    /// [`io::ErrorKind::InvalidData`] for one longer than [`VOLUME_TAG_MAX_BYTES`].
    pub fn volume_tag(&self) -> io::Result<Option<Vec<u8>>> {
        self.check_taggable()?;
        let mut tag = vec![0; VOLUME_TAG_MAX_BYTES];
        match rustix::fs::fgetxattr(&self.image().file, VOLUME_TAG, &mut tag[..]) {
            Ok(len) => {
                tag.truncate(len);
                Ok(Some(tag))
            }
            Err(Errno::NODATA) => Ok(None),
            Err(Errno::RANGE) => Err(io::ErrorKind::InvalidData.into()),
            Err(errno) => Err(tag_error(errno)),
        }
    }

    /// Marks the image, durably. The mark goes with the file when it is renamed, and is lost when
    /// its content is replaced by that of another.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where images cannot be marked (block devices, file systems
    /// without user attributes); [`io::ErrorKind::InvalidInput`] for one longer than
    /// [`VOLUME_TAG_MAX_BYTES`]; the error of the file system.
    pub fn set_volume_tag(&self, tag: &[u8]) -> io::Result<()> {
        if tag.len() > VOLUME_TAG_MAX_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.check_taggable()?;
        let file = &self.image().file;
        rustix::fs::fsetxattr(file, VOLUME_TAG, tag, XattrFlags::empty()).map_err(tag_error)?;
        // Through the gate: a failed write-back of data that shows here must not be forgotten.
        self.run_sync(|| file.sync_all())
    }

    /// The node of a block device has no user attributes, though some kernels let one ask for
    /// them and find none; and it would be another node after the next boot.
    fn check_taggable(&self) -> io::Result<()> {
        if self.image().medium == Medium::Block {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    /// Whether the image seems to hold nothing. For a file that is certain: it has no data at all,
    /// not even zeroes. A block device has no record of what was written, so its first and last
    /// MiB and 64 samples of 4 KiB in between must read as zeroes.
    ///
    /// # Errors
    /// The error of the medium.
    pub fn looks_blank(&self) -> io::Result<bool> {
        if self.image().medium == Medium::Block {
            return self.samples_are_zero();
        }
        match rustix::fs::seek(&self.image().file, SeekFrom::Data(0)) {
            Ok(_) => Ok(false),
            Err(Errno::NXIO) => Ok(true),
            // A file system that cannot tell: then data may be anywhere.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    pub(crate) fn samples_are_zero(&self) -> io::Result<bool> {
        let size = self.image().size;
        let edge = BLANK_EDGE_BYTES.min(size);
        if !self.reads_zero(0, edge)? || !self.reads_zero(size - edge, edge)? {
            return Ok(false);
        }
        let step = size / (BLANK_SAMPLES + 1);
        for sample in 1..=BLANK_SAMPLES {
            // Within the image, as `step * 64` leaves a step before the end.
            let offset = step * sample;
            let len = BLANK_SAMPLE_BYTES.min(size - offset);
            if !self.reads_zero(offset, len)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn reads_zero(&self, offset: u64, len: u64) -> io::Result<bool> {
        let data = self
            .image()
            .read_vec(offset, crate::range::len_usize(len))?;
        Ok(data.iter().all(|&byte| byte == 0))
    }
}

fn tag_error(errno: Errno) -> io::Error {
    match errno {
        Errno::OPNOTSUPP | Errno::NOSYS => io::ErrorKind::Unsupported.into(),
        errno => errno.into(),
    }
}
