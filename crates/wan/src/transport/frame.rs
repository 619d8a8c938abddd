//! Frames: a header of 40 bytes that tells all about what follows, and a payload.
//!
//! Owns the bytes of a header and every check that can be made of one by itself: its checksum,
//! its bounds, and that each kind has what it needs and nothing else. It never looks at payloads,
//! except for their checksum. The table is in `docs/wire.md`.

use super::limits;
use super::pack::{self, Codec, Packing};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 40;

/// `HKF5`: the last byte is the version.
pub const MAGIC: u32 = 0x484b_4635;

/// In the last frame of a reply.
pub const FLAG_LAST: u16 = 1 << 0;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Request: the bytes of a range.
    Read = 0x01,
    /// Request: which parts of a range read as zeroes.
    Extents = 0x02,
    /// Request: the hash of each grain of a range.
    Hash = 0x03,
    /// Request: the answer to an earlier request is wanted no more.
    Cancel = 0x04,
    /// Request: an earlier request has this frame's priority from now on.
    Promote = 0x05,
    /// Request: an answer, and nothing else.
    Ping = 0x06,
    /// Request: what was written is made durable, as for a client that flushes.
    Flush = 0x07,
    /// Request: something about the move.
    Tell = 0x10,
    /// Reply: bytes of a range.
    Data = 0x81,
    /// Reply: a range reads as zeroes.
    Zero = 0x82,
    /// Reply: extents, from the start of what was asked.
    ExtentList = 0x83,
    /// Reply: hashes, of what was asked.
    Hashes = 0x84,
    /// Reply: the request failed.
    Error = 0x85,
    /// Reply: nothing more comes.
    End = 0x86,
    /// Reply: a piece of an answer about the move.
    Told = 0x90,
}

impl Kind {
    fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            0x01 => Self::Read,
            0x02 => Self::Extents,
            0x03 => Self::Hash,
            0x04 => Self::Cancel,
            0x05 => Self::Promote,
            0x06 => Self::Ping,
            0x07 => Self::Flush,
            0x10 => Self::Tell,
            0x81 => Self::Data,
            0x82 => Self::Zero,
            0x83 => Self::ExtentList,
            0x84 => Self::Hashes,
            0x85 => Self::Error,
            0x86 => Self::End,
            0x90 => Self::Told,
            _ => return None,
        })
    }

    /// Whether a client sends it.
    pub fn is_request(self) -> bool {
        (self as u8) < 0x80
    }
}

/// In which order a sender serves what was asked: lower numbers first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(u8);

impl Priority {
    /// A guest waits for it.
    pub const DEMAND: Self = Self(0);
    /// The rest of a block that a guest has written in part.
    pub const REST: Self = Self(1);
    /// A guest will probably read it next.
    pub const READ_AHEAD: Self = Self(2);
    /// It is read often.
    pub const READ_HOT: Self = Self(3);
    /// The background copy.
    pub const COLD: Self = Self(4);
    /// It is likely to be overwritten before anyone reads it.
    pub const WRITE_HOT: Self = Self(5);
    /// Comparing what is there already.
    pub const CHECK: Self = Self(6);

    /// How many there are.
    pub const LEVELS: usize = 7;

    fn from_wire(byte: u8) -> Option<Self> {
        (usize::from(byte) < Self::LEVELS).then_some(Self(byte))
    }

    /// Its number, from 0 for the most urgent.
    pub fn level(self) -> usize {
        usize::from(self.0)
    }

    /// Whether a guest waits for it; the rest makes use of what room the path has.
    pub fn is_waited_for(self) -> bool {
        self <= Self::REST
    }
}

/// Why bytes are no frame. Nothing that follows on this connection can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first bytes are not those of a frame.
    #[error("a frame begins with {0:#010x}: the stream is out of step")]
    Magic(u32),
    /// A header whose checksum is wrong.
    #[error("the checksum of a frame's header is wrong: it was changed on its way")]
    HeaderChecksum,
    /// A payload whose checksum is wrong.
    #[error(
        "the checksum of {len} bytes for offset {offset} is wrong: they were changed on their way"
    )]
    PayloadChecksum {
        /// Where they belong.
        offset: u64,
        /// How many they are.
        len: u32,
    },
    /// A kind, priority or flag that this version does not know.
    #[error("a frame of an unknown kind, priority or flag")]
    Unknown,
    /// Numbers that are out of bounds, or make no sense for the kind.
    #[error("a {0:?} frame with impossible numbers")]
    Numbers(Kind),
}

impl FrameError {
    /// Whether bytes were changed on their way, as opposed to sent wrong.
    pub fn is_checksum(self) -> bool {
        matches!(self, Self::HeaderChecksum | Self::PayloadChecksum { .. })
    }
}

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// How urgent; replies bear that of their request.
    pub priority: Priority,
    /// The last frame of a reply.
    pub last: bool,
    /// What it says of compression, as it is on the wire: see [`super::pack`].
    pub packing: u16,
    /// The number of the request that it is, belongs to or is about.
    pub id: u64,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// How much of the disk it speaks of, in bytes.
    pub span: u32,
    /// How many bytes follow.
    pub payload_len: u32,
    /// CRC-32C of these; zero if there are none.
    pub payload_crc: u32,
}

impl Header {
    /// A request without a payload.
    pub fn request(kind: Kind, priority: Priority, id: u64, offset: u64, span: u32) -> Self {
        Self {
            kind,
            priority,
            last: false,
            packing: 0,
            id,
            offset,
            span,
            payload_len: 0,
            payload_crc: 0,
        }
    }

    /// The same with the length and checksum of a payload.
    ///
    /// # Panics
    /// The payload is longer than any frame may have.
    #[must_use]
    pub fn with_payload(mut self, payload: &[u8]) -> Self {
        self.payload_len = u32::try_from(payload.len())
            .ok()
            .filter(|len| *len <= limits::REPLY_PAYLOAD_BYTES)
            .expect("senders make no longer payloads");
        self.payload_crc = checksum(payload);
        self
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4] = self.kind as u8;
        bytes[5] = self.priority.0;
        let flags = self.packing | if self.last { FLAG_LAST } else { 0 };
        bytes[6..8].copy_from_slice(&flags.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.id.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..28].copy_from_slice(&self.span.to_be_bytes());
        bytes[28..32].copy_from_slice(&self.payload_len.to_be_bytes());
        bytes[32..36].copy_from_slice(&self.payload_crc.to_be_bytes());
        let crc = checksum(&bytes[..36]);
        bytes[36..].copy_from_slice(&crc.to_be_bytes());
        bytes
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// It is none, was changed on its way, or is out of bounds.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        if checksum(&bytes[..36]) != u32_at(bytes, 36) {
            return Err(FrameError::HeaderChecksum);
        }
        let flags = u16::from_be_bytes([bytes[6], bytes[7]]);
        let (Some(kind), Some(priority)) =
            (Kind::from_wire(bytes[4]), Priority::from_wire(bytes[5]))
        else {
            return Err(FrameError::Unknown);
        };
        if flags & !(FLAG_LAST | pack::FLAGS) != 0 {
            return Err(FrameError::Unknown);
        }
        let header = Self {
            kind,
            priority,
            last: flags & FLAG_LAST != 0,
            packing: flags & pack::FLAGS,
            id: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            span: u32_at(bytes, 24),
            payload_len: u32_at(bytes, 28),
            payload_crc: u32_at(bytes, 32),
        };
        if header.makes_sense() {
            Ok(header)
        } else {
            Err(FrameError::Numbers(kind))
        }
    }

    /// What holds of every frame of its kind, whatever the disk and the request.
    fn makes_sense(&self) -> bool {
        let Self {
            span, payload_len, ..
        } = *self;
        if self.offset.checked_add(u64::from(span)).is_none()
            || (payload_len == 0 && self.payload_crc != 0)
        {
            return false;
        }
        let packing_fits = match self.kind {
            Kind::Read => Packing::from_flags(self.packing).is_some(),
            Kind::Data => Codec::from_flags(self.packing).is_ok(),
            _ => self.packing == 0,
        };
        if !packing_fits {
            return false;
        }
        let bare = payload_len == 0 && !self.last;
        let nothing = span == 0 && self.offset == 0;
        let listed = |unit: u32, most: u32| {
            payload_len > 0 && payload_len.is_multiple_of(unit) && payload_len / unit <= most
        };
        match self.kind {
            Kind::Read => bare && (1..=limits::READ_BYTES).contains(&span),
            Kind::Extents => bare && (1..=limits::EXTENTS_BYTES).contains(&span),
            Kind::Hash => {
                let of_grain = payload_len == limits::REQUEST_PAYLOAD_BYTES && !self.last;
                of_grain && (1..=limits::HASH_BYTES).contains(&span)
            }
            Kind::Cancel | Kind::Promote | Kind::Ping | Kind::Flush => bare && nothing,
            Kind::Data => {
                (1..=limits::QUANTUM_BYTES).contains(&span)
                    && match Codec::from_flags(self.packing) {
                        Ok(None) => payload_len == span,
                        Ok(Some(Codec::Lz4)) => (1..span).contains(&payload_len),
                        Ok(Some(Codec::Zstd)) => {
                            (1..=span + limits::PACKED_EXTRA_BYTES).contains(&payload_len)
                        }
                        Err(_) => false,
                    }
            }
            Kind::Zero => (1..=limits::READ_BYTES).contains(&span) && payload_len == 0,
            Kind::ExtentList => {
                (1..=limits::EXTENTS_BYTES).contains(&span)
                    && listed(limits::EXTENT_LEN, limits::EXTENTS)
                    && self.last
            }
            Kind::Hashes => {
                (1..=limits::HASH_BYTES).contains(&span)
                    && listed(limits::HASH_LEN, limits::HASHES)
                    && self.last
            }
            Kind::Error => {
                nothing && self.last && (4..=4 + limits::ERROR_TEXT_BYTES).contains(&payload_len)
            }
            Kind::End => nothing && self.last && payload_len == 0,
            Kind::Tell => nothing && !self.last && (1..=limits::TELL_BYTES).contains(&payload_len),
            Kind::Told => nothing && (1..=limits::QUANTUM_BYTES).contains(&payload_len),
        }
    }

    /// Checks a payload that has arrived.
    ///
    /// # Errors
    /// It was changed on its way.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), FrameError> {
        if checksum(payload) == self.payload_crc {
            return Ok(());
        }
        Err(FrameError::PayloadChecksum {
            offset: self.offset,
            len: self.payload_len,
        })
    }
}

/// CRC-32C, which is zero for nothing.
fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes of forty"))
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes of forty"))
}

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The header.
    pub header: Header,
    /// The payload, which its checksum fits.
    pub payload: Vec<u8>,
}

/// Which end of the connection bytes come from, and thereby what they may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Requests.
    Client,
    /// Replies.
    Server,
}

/// Takes bytes as they come and gives whole frames. Holds at most one frame and what was pushed
/// behind it.
#[derive(Debug)]
pub struct Decoder {
    from: Side,
    held: Vec<u8>,
    start: usize,
    failed: Option<FrameError>,
}

impl Decoder {
    /// For the bytes of one end.
    pub fn new(from: Side) -> Self {
        Self {
            from,
            held: Vec::new(),
            start: 0,
            failed: None,
        }
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.held.drain(..std::mem::take(&mut self.start));
            self.held.extend_from_slice(bytes);
        }
    }

    /// Bytes that are held and belong to no frame that was given out.
    pub fn held(&self) -> usize {
        self.held.len() - self.start
    }

    /// The next frame, if all of it is here.
    ///
    /// # Errors
    /// What is here is no frame. It stays so: nothing after it can be understood.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let outcome = self.look();
        if let Err(error) = &outcome {
            self.failed = Some(*error);
            self.held = Vec::new();
            self.start = 0;
        }
        outcome
    }

    fn look(&mut self) -> Result<Option<Frame>, FrameError> {
        let here = &self.held[self.start..];
        let Some((header, rest)) = here.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let header = Header::decode(header)?;
        if header.kind.is_request() != (self.from == Side::Client) {
            return Err(FrameError::Unknown);
        }
        let Some(payload) = usize::try_from(header.payload_len)
            .ok()
            .and_then(|len| rest.get(..len))
        else {
            return Ok(None);
        };
        header.check_payload(payload)?;
        let payload = payload.to_vec();
        self.start += HEADER_BYTES + payload.len();
        Ok(Some(Frame { header, payload }))
    }
}

#[cfg(test)]
mod tests;
