//! What block devices need beside `read` and `write`: their size and their logical block.
//! Called when an image is opened.

use std::fs::File;
use std::io;

use rustix::fs::SeekFrom;

/// The size of a block device in bytes.
///
/// # Errors
/// The error of the device.
pub(crate) fn size_bytes(file: &File) -> io::Result<u64> {
    // Exact for block devices (the kernel's own size), and needs no ioctl.
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// The logical block of a block device in bytes: what its zeroing primitives must be aligned to.
///
/// # Errors
/// The error of the device.
pub(crate) fn logical_block_bytes(file: &File) -> io::Result<u64> {
    Ok(u64::from(rustix::fs::ioctl_blksszget(file)?))
}
