//! The one place that says which ranges a store accepts. Called by every store before it touches
//! its medium.

use std::io;

/// The smallest unit that a medium writes whole, in bytes. Image sizes are multiples of it.
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Checks that `offset..offset + len` lies within `size` bytes.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] when it does not, or when the sum overflows.
pub(crate) fn check(size: u64, offset: u64, len: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("range of {len} bytes at {offset} is outside of an image of {size} bytes"),
        )),
    }
}

/// The length of a buffer as the width that offsets have.
pub(crate) fn len_u64(len: usize) -> u64 {
    u64::try_from(len).expect("no supported machine has pointers wider than 64 bits")
}

/// A length that is known to be at most that of a buffer in memory.
pub(crate) fn len_usize(len: u64) -> usize {
    usize::try_from(len).expect("bounded by a buffer's length, which is a usize")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::check;

    #[test]
    fn accepts_up_to_the_end_and_refuses_beyond() {
        assert!(check(1024, 0, 1024).is_ok());
        assert!(check(1024, 1024, 0).is_ok());
        assert!(check(1024, 1024, 1).is_err());
        assert!(check(1024, 1025, 0).is_err());
        assert!(check(1024, u64::MAX, 2).is_err());
    }
}
