//! The server's half of the protocol.
//!
//! A connection goes through these in order, driven by whoever owns the socket:
//!
//! 1. [`handshake`]: bytes in, bytes out, until it ends with a [`Session`] or a close.
//! 2. [`request`]: 28 bytes become a [`Request`]; [`Rules`] made from the session turn it into a
//!    [`Verdict`]: a [`Command`] to run, an error to answer, or the end.
//! 3. [`reply`]: what was decided becomes bytes again, in the session's [`ReplyStyle`];
//!    [`extents`] makes lists of extents legal.
//!
//! Nothing here knows a socket, a file or a clock. Timers (a handshake must end in time), caps on
//! connections and the order of replies are the caller's.

pub mod extents;
pub mod handshake;
pub mod reply;
pub mod request;

pub use extents::StatusExtents;
pub use handshake::{Context, ExportInfo, Exports, Handshake, Outcome, Progress, Session};
pub use reply::ReplyStyle;
pub use request::{BadMagic, Command, Request, Rules, Verdict};
