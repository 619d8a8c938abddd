//! What is in payloads: requests, extents, hashes, errors.
//!
//! Every list is checked against the range it was asked for, so that what comes out is something
//! the other end really said about that range.

pub use hikkoshi_nbd::client::StatusExtent as Extent;
use hikkoshi_nbd::wire::Errno;

use super::frame::{Frame, FrameError, Header, Kind, Priority};
use super::limits;
use super::pack::Packing;

/// What a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The bytes of a range.
    Read {
        /// How they may be compressed.
        packing: Packing,
    },
    /// Which parts of a range read as zeroes.
    Extents,
    /// The hash of each grain of a range; a power of two.
    Hash {
        /// Bytes of a grain.
        grain: u32,
    },
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Something of a range of the disk.
    Wish {
        /// Its number, above those of all earlier ones.
        id: u64,
        /// How urgent.
        priority: Priority,
        /// What.
        wish: Wish,
        /// From where, in bytes.
        offset: u64,
        /// How much, in bytes, above zero.
        len: u32,
    },
    /// An earlier request is wanted no more.
    Cancel(u64),
    /// An earlier request is more urgent now.
    Promote(u64, Priority),
    /// A sign of life.
    Ping(u64, Priority),
    /// What was written is to be made durable.
    Flush(u64, Priority),
}

impl Request {
    /// A client's frame as a request.
    ///
    /// # Errors
    /// A reply, or a grain that is out of bounds.
    pub fn parse(frame: &Frame) -> Result<Self, FrameError> {
        let Header {
            kind,
            priority,
            id,
            offset,
            span: len,
            ..
        } = frame.header;
        let wish = match kind {
            Kind::Read => Wish::Read {
                packing: Packing::from_flags(frame.header.packing)
                    .ok_or(FrameError::Numbers(kind))?,
            },
            Kind::Extents => Wish::Extents,
            Kind::Hash => {
                let grain = <[u8; 4]>::try_from(&frame.payload[..])
                    .map(u32::from_be_bytes)
                    .ok()
                    .filter(|grain| grain_fits(*grain, len))
                    .ok_or(FrameError::Numbers(kind))?;
                Wish::Hash { grain }
            }
            Kind::Cancel => return Ok(Self::Cancel(id)),
            Kind::Promote => return Ok(Self::Promote(id, priority)),
            Kind::Ping => return Ok(Self::Ping(id, priority)),
            Kind::Flush => return Ok(Self::Flush(id, priority)),
            _ => return Err(FrameError::Unknown),
        };
        Ok(Self::Wish {
            id,
            priority,
            wish,
            offset,
            len,
        })
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        match *self {
            Self::Wish {
                id,
                priority,
                wish,
                offset,
                len,
            } => {
                let (kind, grain) = match wish {
                    Wish::Read { .. } => (Kind::Read, None),
                    Wish::Extents => (Kind::Extents, None),
                    Wish::Hash { grain } => (Kind::Hash, Some(grain.to_be_bytes())),
                };
                let mut header = Header::request(kind, priority, id, offset, len);
                if let Wish::Read { packing } = wish {
                    header.packing = packing.flags();
                }
                let payload = grain.as_ref().map_or(&[][..], |g| &g[..]);
                [&header.with_payload(payload).encode()[..], payload].concat()
            }
            Self::Cancel(id) => bare(Kind::Cancel, Priority::DEMAND, id),
            Self::Promote(id, priority) => bare(Kind::Promote, priority, id),
            Self::Ping(id, priority) => bare(Kind::Ping, priority, id),
            Self::Flush(id, priority) => bare(Kind::Flush, priority, id),
        }
    }
}

fn bare(kind: Kind, priority: Priority, id: u64) -> Vec<u8> {
    Header::request(kind, priority, id, 0, 0).encode().to_vec()
}

/// Whether a grain may be asked for, over `len` bytes.
pub fn grain_fits(grain: u32, len: u32) -> bool {
    grain.is_power_of_two()
        && (limits::MIN_GRAIN_BYTES..=limits::MAX_GRAIN_BYTES).contains(&grain)
        && len.div_ceil(grain) <= limits::HASHES
}

/// A hash of a grain.
pub type Hash = [u8; limits::HASH_LEN as usize];

/// The hash of each grain of `data`; the last grain may be short.
pub fn hashes_of(data: &[u8], grain: u32) -> Vec<Hash> {
    let grain = usize::try_from(grain.max(1)).unwrap_or(usize::MAX);
    data.chunks(grain)
        .map(|grain| *blake3::hash(grain).as_bytes())
        .collect()
}

/// Hashes from a payload, which must be as many as `len` bytes have grains.
pub fn parse_hashes(payload: &[u8], len: u32, grain: u32) -> Option<Vec<Hash>> {
    let (hashes, rest) = payload.as_chunks::<{ limits::HASH_LEN as usize }>();
    let wanted = usize::try_from(len.div_ceil(grain.max(1))).ok()?;
    (rest.is_empty() && hashes.len() == wanted).then(|| hashes.to_vec())
}

/// Bit 0 of an extent's state: it reads as zeroes.
const STATE_ZERO: u32 = 1;

/// The payload of a list of extents.
pub fn encode_extents(extents: &[Extent]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(extents.len() * limits::EXTENT_LEN as usize);
    for extent in extents {
        payload.extend_from_slice(&extent.len.to_be_bytes());
        payload.extend_from_slice(&(u32::from(extent.zero) * STATE_ZERO).to_be_bytes());
    }
    payload
}

/// Extents from a payload, which must be exactly `span` bytes together.
pub fn parse_extents(payload: &[u8], span: u32) -> Option<Vec<Extent>> {
    let (pairs, rest) = payload.as_chunks::<{ limits::EXTENT_LEN as usize }>();
    let mut extents: Vec<Extent> = Vec::with_capacity(pairs.len());
    let mut left = span;
    for pair in pairs {
        let [a, b, c, d, state @ ..] = *pair;
        let len = u32::from_be_bytes([a, b, c, d]);
        let state = u32::from_be_bytes(state);
        left = left.checked_sub(len).filter(|_| len > 0)?;
        if state & !STATE_ZERO != 0 {
            return None;
        }
        extents.push(Extent {
            len,
            zero: state & STATE_ZERO != 0,
        });
    }
    (rest.is_empty() && left == 0 && !extents.is_empty()).then_some(extents)
}

/// The payload of an error.
pub fn encode_error(errno: Errno, text: &str) -> Vec<u8> {
    let mut end = text.len().min(limits::ERROR_TEXT_BYTES as usize);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    [&errno.code().to_be_bytes()[..], &text.as_bytes()[..end]].concat()
}

/// An error from a payload: its number and its text, fit to be shown.
pub fn parse_error(payload: &[u8]) -> Option<(Errno, String)> {
    let (code, text) = payload.split_first_chunk::<4>()?;
    let text = String::from_utf8_lossy(text)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    Some((Errno::from_code(u32::from_be_bytes(*code)), text))
}
