//! Replies as bytes (sections "Simple reply message", "Structured reply chunk message").
//!
//! A session speaks one [`ReplyStyle`]. Headers come as arrays, to be put wherever the caller has
//! room, or are appended to a buffer; nothing is allocated as long as that buffer has capacity.
//! Data never passes through here: a read's header is laid out first, with
//! [`ReplyStyle::put_read_header`], and the data is read straight to the place behind it. If
//! reading fails, the header is overwritten by an error before anything was sent.

use super::handshake::Session;
use crate::limits;
use crate::wire::{
    self, CHUNK_BYTES, Errno, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};

/// Bytes before the data of an OFFSET_DATA chunk: chunk header, offset.
pub const DATA_HEADER_BYTES: usize = CHUNK_BYTES + 8;
/// Bytes in an OFFSET_HOLE chunk: chunk header, offset, length.
pub const HOLE_BYTES: usize = CHUNK_BYTES + 8 + 4;
/// Bytes before the message of an ERROR chunk: chunk header, error, length of the message.
pub const ERROR_HEADER_BYTES: usize = CHUNK_BYTES + 4 + 2;
/// The most bytes that an error takes, in either style, with an offset or without.
pub const MAX_ERROR_BYTES: usize = ERROR_HEADER_BYTES + limits::ERROR_MESSAGE_BYTES + 8;
/// Bytes before the extents of a BLOCK_STATUS chunk: chunk header, context id.
pub const STATUS_HEADER_BYTES: usize = CHUNK_BYTES + 4;
/// Bytes in an extent of a BLOCK_STATUS chunk: length, flags.
pub const EXTENT_BYTES: usize = 8;

/// Whether a chunk is the last one of its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// More chunks follow.
    No,
    /// The reply is complete.
    Yes,
}

/// How a session's requests are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyStyle {
    /// A header, and for a read that succeeded the data.
    Simple,
    /// Chunks.
    Structured,
}

impl From<&Session> for ReplyStyle {
    fn from(session: &Session) -> Self {
        if session.structured {
            Self::Structured
        } else {
            Self::Simple
        }
    }
}

impl ReplyStyle {
    /// Bytes before the data of a read that is answered in one piece.
    pub const fn read_header_bytes(self) -> usize {
        match self {
            Self::Simple => SIMPLE_REPLY_BYTES,
            Self::Structured => DATA_HEADER_BYTES,
        }
    }

    /// Lays out the header of a read that is answered in one piece: `len` bytes of data from
    /// `offset`, at least one, go right behind it.
    ///
    /// # Panics
    /// If `out` has fewer than [`ReplyStyle::read_header_bytes`].
    #[inline]
    pub fn put_read_header(self, out: &mut [u8], cookie: u64, offset: u64, len: u32) {
        let place = &mut out[..self.read_header_bytes()];
        match self {
            Self::Simple => place.copy_from_slice(&simple_reply(cookie, None)),
            Self::Structured => {
                place.copy_from_slice(&data_header(cookie, offset, len, Last::Yes));
            }
        }
    }

    /// Appends the header that [`ReplyStyle::put_read_header`] lays out.
    #[inline]
    pub fn push_read_header(self, out: &mut Vec<u8>, cookie: u64, offset: u64, len: u32) {
        match self {
            Self::Simple => out.extend_from_slice(&simple_reply(cookie, None)),
            Self::Structured => {
                out.extend_from_slice(&data_header(cookie, offset, len, Last::Yes));
            }
        }
    }

    /// Appends the answer that a request was done and has nothing to tell: also a read of no
    /// bytes.
    #[inline]
    pub fn push_done(self, out: &mut Vec<u8>, cookie: u64) {
        match self {
            Self::Simple => out.extend_from_slice(&simple_reply(cookie, None)),
            Self::Structured => out.extend_from_slice(&done_chunk(cookie)),
        }
    }

    /// Appends the answer that a request failed: at most [`MAX_ERROR_BYTES`]. The message is for
    /// people; a simple reply has no room for it.
    pub fn push_error(self, out: &mut Vec<u8>, cookie: u64, errno: Errno, message: &str) {
        match self {
            Self::Simple => out.extend_from_slice(&simple_reply(cookie, Some(errno))),
            Self::Structured => push_error_chunk(out, cookie, errno, message, None),
        }
    }

    /// Like [`ReplyStyle::push_error`], and tells the offset in bytes that could not be served,
    /// which must lie within the request.
    pub fn push_error_at(
        self,
        out: &mut Vec<u8>,
        cookie: u64,
        errno: Errno,
        message: &str,
        offset: u64,
    ) {
        match self {
            Self::Simple => out.extend_from_slice(&simple_reply(cookie, Some(errno))),
            Self::Structured => push_error_chunk(out, cookie, errno, message, Some(offset)),
        }
    }
}

/// A simple reply, before the data if there is any.
#[inline]
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, Errno::code).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The OFFSET_DATA chunk of `len` bytes, which go right behind it. `offset` is that of the data
/// on the disk.
///
/// # Panics
/// If `len` is above [`limits::PAYLOAD_CEILING_BYTES`], which no verdict lets pass.
#[inline]
pub fn data_header(cookie: u64, offset: u64, len: u32, last: Last) -> [u8; DATA_HEADER_BYTES] {
    assert!(len <= limits::PAYLOAD_CEILING_BYTES);
    let mut bytes = [0; DATA_HEADER_BYTES];
    let header = chunk_header(last, chunk::OFFSET_DATA, cookie, len + 8);
    bytes[..CHUNK_BYTES].copy_from_slice(&header);
    bytes[CHUNK_BYTES..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

/// The OFFSET_HOLE chunk: `len` zero bytes from `offset`, at least one.
#[inline]
pub fn hole_chunk(cookie: u64, offset: u64, len: u32, last: Last) -> [u8; HOLE_BYTES] {
    let mut bytes = [0; HOLE_BYTES];
    let header = chunk_header(last, chunk::OFFSET_HOLE, cookie, 12);
    bytes[..CHUNK_BYTES].copy_from_slice(&header);
    bytes[CHUNK_BYTES..CHUNK_BYTES + 8].copy_from_slice(&offset.to_be_bytes());
    bytes[CHUNK_BYTES + 8..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// The NONE chunk, which ends a reply.
#[inline]
pub fn done_chunk(cookie: u64) -> [u8; CHUNK_BYTES] {
    chunk_header(Last::Yes, chunk::NONE, cookie, 0)
}

/// Appends a BLOCK_STATUS chunk: lengths and flags of the extents of one context, from the
/// request's offset on. There must be at least one (see [`super::StatusExtents`]).
///
/// # Panics
/// If there are more than [`limits::STATUS_EXTENTS`].
pub fn push_block_status(
    out: &mut Vec<u8>,
    cookie: u64,
    context_id: u32,
    extents: &[(u32, u32)],
    last: Last,
) {
    assert!(extents.len() <= limits::STATUS_EXTENTS);
    let payload_bytes =
        u32::try_from(4 + extents.len() * EXTENT_BYTES).expect("2^20 extents take 8 MiB");
    out.reserve(STATUS_HEADER_BYTES + extents.len() * EXTENT_BYTES);
    out.extend_from_slice(&chunk_header(
        last,
        chunk::BLOCK_STATUS,
        cookie,
        payload_bytes,
    ));
    out.extend_from_slice(&context_id.to_be_bytes());
    for (len, flags) in extents {
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(&flags.to_be_bytes());
    }
}

/// An ERROR chunk, or with an offset an ERROR_OFFSET one. It ends the reply.
fn push_error_chunk(
    out: &mut Vec<u8>,
    cookie: u64,
    errno: Errno,
    message: &str,
    offset: Option<u64>,
) {
    let message = cut(message, limits::ERROR_MESSAGE_BYTES).as_bytes();
    let message_bytes = u16::try_from(message.len()).expect("cut to 256 bytes");
    let (kind, offset_bytes) = match offset {
        None => (chunk::ERROR, 0),
        Some(_) => (chunk::ERROR_OFFSET, 8),
    };
    let payload_bytes = 4 + 2 + u32::from(message_bytes) + offset_bytes;
    out.extend_from_slice(&chunk_header(Last::Yes, kind, cookie, payload_bytes));
    out.extend_from_slice(&errno.code().to_be_bytes());
    out.extend_from_slice(&message_bytes.to_be_bytes());
    out.extend_from_slice(message);
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

#[inline]
fn chunk_header(last: Last, kind: u16, cookie: u64, payload_bytes: u32) -> [u8; CHUNK_BYTES] {
    let flags = match last {
        Last::No => 0,
        Last::Yes => wire::chunk::FLAG_DONE,
    };
    let mut bytes = [0; CHUNK_BYTES];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&payload_bytes.to_be_bytes());
    bytes
}

/// The front of `text`, at most `max` bytes, cut between characters.
pub(super) fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests;
