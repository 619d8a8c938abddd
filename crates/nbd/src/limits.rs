//! The bounds on everything a peer can make this side hold, send or skip.
//!
//! A length on the wire is 32 bits, so a peer can claim 4 GiB with sixteen bytes. Each claim is
//! measured against a constant of this module before anything is allocated for it. What is above
//! the first bound is skipped without being kept, so that the connection stays in step; what is
//! above the second costs the peer its connection.

use crate::wire::MAX_STRING_BYTES;

/// The longest option payload that is kept. The longest sensible one is a SET_META_CONTEXT: a
/// name and a dozen queries, each at most [`MAX_STRING_BYTES`].
pub const OPTION_KEPT_BYTES: u32 = 64 << 10;

/// The longest option payload that is skipped and answered; a longer one closes the connection.
/// It is the largest payload the protocol has for anything else.
pub const OPTION_SKIPPED_BYTES: u32 = 32 << 20;

/// How many options one handshake may have. A client that looks into every corner (libnbd's test
/// suite) sends some dozens.
pub const OPTIONS: u32 = 256;

/// How many kinds of information one INFO or GO may ask for. The protocol knows four.
pub const INFO_REQUESTS: u16 = 64;

/// The answer to one LIST is cut (with ERR_TOO_BIG) before it grows beyond this.
pub const LIST_BYTES: usize = 1 << 20;

/// A handshake takes no further option while this much waits to be sent, so that a client that
/// sends and never reads makes nothing grow.
pub const HANDSHAKE_OUTPUT_BYTES: usize = 64 << 10;

/// The most a handshake's output can hold: the answer that began just below
/// [`HANDSHAKE_OUTPUT_BYTES`], a LIST with its last line being the longest.
pub const HANDSHAKE_OUTPUT_MAX_BYTES: usize = HANDSHAKE_OUTPUT_BYTES + LIST_BYTES + 1024;

/// The longest payload of a refused WRITE that is skipped; a longer one closes the connection.
/// Four times the largest payload that every server accepts: a client that errs by a little keeps
/// its connection, one that claims gigabytes does not.
pub const WRITE_SKIPPED_BYTES: u32 = 128 << 20;

/// The largest payload that an export may allow. Far from where adding a header could wrap.
pub const PAYLOAD_CEILING_BYTES: u32 = 1 << 30;

/// How many extents one BLOCK_STATUS reply may have (section "Block status reply chunk").
pub const STATUS_EXTENTS: usize = 1 << 20;

/// The longest message in an error chunk: it is for people, and goes into a fixed-size buffer.
pub const ERROR_MESSAGE_BYTES: usize = 256;

/// The longest path of a Unix socket: `sun_path` less its final zero.
pub const SOCKET_PATH_BYTES: usize = 107;

/// The longest name of an export, in bytes of UTF-8.
pub const EXPORT_NAME_BYTES: usize = MAX_STRING_BYTES;
