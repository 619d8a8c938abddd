//! The log: one frame a commit.
//!
//! A frame begins on a page boundary and shares no page with another, so that appending never
//! rewrites what an earlier commit has made stable. A log is read from its start; the first frame
//! that does not fit ends it, as a commit that was cut off by a power cut looks. If a valid frame
//! of a later commit follows, it was no cut: the log is damaged, and refused.

use super::record::joined;
use super::{JournalError, Reader, Record, VolumeId};
use crate::geometry::Geometry;

/// Frames begin at multiples of this, in bytes: the largest sector of common media, and the page
/// of the page cache.
pub const FRAME_ALIGN: usize = 4096;

const MAGIC: [u8; 8] = *b"HKKLOG01";
const HEADER_BYTES: usize = 48;
const CRC_AT: usize = 44;

/// A commit's records as a frame, a whole number of pages long.
///
/// # Panics
/// The records take 4 GiB or more; a commit has at most some 100,000.
pub fn encode_frame(volume: VolumeId, epoch: u64, seq: u64, records: &[Record]) -> Vec<u8> {
    let mut out = vec![0; HEADER_BYTES];
    for record in joined(records) {
        record.encode(&mut out);
    }
    let payload = u32::try_from(out.len() - HEADER_BYTES).expect("a commit is below 4 GiB");
    out[..8].copy_from_slice(&MAGIC);
    out[8..24].copy_from_slice(&volume);
    out[24..32].copy_from_slice(&epoch.to_le_bytes());
    out[32..40].copy_from_slice(&seq.to_le_bytes());
    out[40..44].copy_from_slice(&payload.to_le_bytes());
    let crc = crc32c::crc32c(&out);
    out[CRC_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    out.resize(out.len().next_multiple_of(FRAME_ALIGN), 0);
    out
}

/// Where a log ends and what it said.
#[derive(Debug, PartialEq, Eq)]
pub struct LogEnd {
    /// The records of all its commits.
    pub records: Vec<Record>,
    /// How many commits.
    pub frames: u64,
    /// How many bytes they take.
    pub bytes: usize,
}

/// Reads the log of `epoch`. Frames of other epochs are left-overs of a recycled file.
///
/// # Errors
/// A frame in the middle is damaged, or a valid one says what cannot be.
pub fn read_log(
    log: &[u8],
    volume: VolumeId,
    epoch: u64,
    geometry: Geometry,
) -> Result<LogEnd, JournalError> {
    let mut end = LogEnd {
        records: Vec::new(),
        frames: 0,
        bytes: 0,
    };
    while let Some(frame) = parse(&log[end.bytes..], volume, epoch) {
        if frame.seq != end.frames {
            break;
        }
        let mut reader = Reader(frame.payload);
        while !reader.is_empty() {
            end.records.push(Record::decode(&mut reader, geometry)?);
        }
        end.frames += 1;
        end.bytes += frame.bytes;
    }
    let mut at = end.bytes;
    while at < log.len() {
        if parse(&log[at..], volume, epoch).is_some_and(|f| f.seq >= end.frames && at > end.bytes) {
            return Err(JournalError::Corrupt(
                "a commit in the middle of the log is unreadable",
            ));
        }
        at += FRAME_ALIGN;
    }
    Ok(end)
}

struct Frame<'a> {
    seq: u64,
    payload: &'a [u8],
    bytes: usize,
}

/// The frame that these bytes begin with, if they do.
fn parse(bytes: &[u8], volume: VolumeId, epoch: u64) -> Option<Frame<'_>> {
    let header = bytes.get(..HEADER_BYTES)?;
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
    let half = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    if header[..8] != MAGIC || header[8..24] != volume || word(24) != epoch {
        return None;
    }
    let end = HEADER_BYTES.checked_add(usize::try_from(half(40)).ok()?)?;
    let payload = bytes.get(HEADER_BYTES..end)?;
    let crc = crc32c::crc32c(&header[..CRC_AT]);
    let crc = crc32c::crc32c_append(crc, &[0; HEADER_BYTES - CRC_AT]);
    let crc = crc32c::crc32c_append(crc, payload);
    (crc == half(CRC_AT)).then(|| Frame {
        seq: word(32),
        payload,
        bytes: end.next_multiple_of(FRAME_ALIGN).min(bytes.len()),
    })
}
