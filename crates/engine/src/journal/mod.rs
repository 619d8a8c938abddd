//! The durable form of a residency, as bytes: records, log frames, snapshots.
//!
//! Pure functions; files belong to the callers. The layout is that of `docs/on-disk.md`. Decoders
//! take any bytes and answer with an error, never with a guess.

mod bases;
mod frame;
mod pending;
mod record;
mod snapshot;
#[cfg(all(test, not(loom)))]
mod tests;

pub use bases::{Bases, MAX_BASES, decode_bases, encode_bases};
pub use frame::{FRAME_ALIGN, LogEnd, encode_frame, read_log};
pub use pending::{Gathered, Pending};
pub use record::Record;
pub use snapshot::{
    apply_snapshot, empty_snapshot, encode_snapshot, is_new_snapshot, snapshot_epoch,
};

/// Marks everything that belongs to one volume.
pub type VolumeId = [u8; 16];

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Not written by this program, or of a version it does not know.
    #[error("it is not of a format this version knows")]
    Format,
    /// It belongs to another volume, or to a disk of another shape.
    #[error("it belongs to another volume")]
    Foreign,
    /// It does not add up.
    #[error("it is damaged: {0}")]
    Corrupt(&'static str),
}

/// Appends a number in seven-bit groups, the lowest first.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = value.to_le_bytes()[0] & 0x7f;
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

/// Takes bytes apart from the front.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], JournalError> {
        if len > self.0.len() {
            return Err(JournalError::Corrupt("it ends too early"));
        }
        let (front, rest) = self.0.split_at(len);
        self.0 = rest;
        Ok(front)
    }

    fn byte(&mut self) -> Result<u8, JournalError> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, JournalError> {
        Ok(u32::from_le_bytes(
            self.take(4)?.try_into().expect("four bytes"),
        ))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, JournalError> {
        Ok(u64::from_le_bytes(
            self.take(8)?.try_into().expect("eight bytes"),
        ))
    }

    fn varint(&mut self) -> Result<u64, JournalError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(JournalError::Corrupt("a number is too long"))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
