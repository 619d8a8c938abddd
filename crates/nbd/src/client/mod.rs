//! The client's side of the protocol: handshake, requests, replies.
//!
//! Owns every check of what a server says; a byte that passed is one the server really promised
//! for that place. It must never receive or send: `hikkoshi-wan` does, asking here how many bytes
//! come next and where they belong. Nothing a server can send makes it panic, and everything a
//! server can make it remember has a bound.

mod handshake;
mod reply;
mod request;
#[cfg(test)]
mod tests;

pub use handshake::{BlockSizes, Handshake, HandshakeConfig, Negotiated, Progress};
pub use reply::{
    ChunkHeader, Header, Hole, MAX_STATUS_EXTENTS, Outcome, Reply, StatusExtent, Step,
};
pub use request::encode_request;

use crate::wire::Errno;

/// The longest piece of a server's text that is shown to people, in characters.
const MAX_SHOWN_CHARS: usize = 256;

/// What went wrong, as far as the caller must tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientErrorKind {
    /// The server said no, in a way the protocol foresees.
    Refused,
    /// The server broke the protocol: nothing more of this connection is to be believed.
    Violation,
}

/// Why a handshake or a request cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The first bytes are not those of an NBD server.
    #[error("this is no NBD server: its greeting begins with {0:#018x}")]
    NotNbd(u64),
    /// A server from before options existed (section "Oldstyle negotiation").
    #[error(
        "the server speaks only the oldstyle NBD handshake, which cannot name an export; \
         start it with newstyle negotiation"
    )]
    Oldstyle,
    /// The export's name is longer than the protocol allows, in bytes.
    #[error("the export name has {0} bytes, the protocol allows 4096")]
    NameTooLong(usize),
    /// The server insists on TLS.
    #[error("the server wants TLS, which is not supported yet; allow it to serve without")]
    TlsRequired,
    /// The server has no export of that name.
    #[error("the server has no export named {name:?}{message}")]
    UnknownExport {
        /// The name that was asked for.
        name: String,
        /// What the server said, with a separator in front, or empty.
        message: String,
    },
    /// An option that cannot be done without was refused.
    #[error("the server refused {option} (reply {code:#x}){message}")]
    OptionRefused {
        /// The option's name in the protocol.
        option: &'static str,
        /// The reply's number.
        code: u32,
        /// What the server said, with a separator in front, or empty.
        message: String,
    },
    /// An option was refused while others were on their way behind it. One by one they may lead
    /// further.
    #[error("the server refused {0} among options that were sent at once")]
    AtOnce(&'static str),
    /// A request was answered with an error.
    #[error("the server answered with {errno:?}{message}")]
    Request {
        /// The error.
        errno: Errno,
        /// What the server said, with a separator in front, or empty.
        message: String,
    },
    /// The protocol was broken.
    #[error("the server broke the NBD protocol: {0}")]
    Violation(String),
}

impl ClientError {
    /// A broken protocol, told by `message`.
    pub(crate) fn violation(message: impl Into<String>) -> Self {
        Self::Violation(message.into())
    }

    /// The kind to match on.
    pub fn kind(&self) -> ClientErrorKind {
        match self {
            Self::NotNbd(_) | Self::Violation(_) => ClientErrorKind::Violation,
            Self::Oldstyle
            | Self::NameTooLong(_)
            | Self::TlsRequired
            | Self::UnknownExport { .. }
            | Self::OptionRefused { .. }
            | Self::AtOnce(_)
            | Self::Request { .. } => ClientErrorKind::Refused,
        }
    }
}

/// A server's text as it may be shown and logged: no control characters, cut to a bound, with
/// `: ` in front unless it is empty.
fn shown(text: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(text)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_SHOWN_CHARS)
        .collect();
    let text = text.trim();
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

/// The big-endian number at `at`, if `bytes` reaches that far.
fn be_u16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at.checked_add(2)?)?
        .try_into()
        .ok()
        .map(u16::from_be_bytes)
}

/// The big-endian number at `at`, if `bytes` reaches that far.
fn be_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at.checked_add(4)?)?
        .try_into()
        .ok()
        .map(u32::from_be_bytes)
}

/// The big-endian number at `at`, if `bytes` reaches that far.
fn be_u64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at.checked_add(8)?)?
        .try_into()
        .ok()
        .map(u64::from_be_bytes)
}
