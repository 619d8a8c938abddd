//! The frames that two daemons of ours speak after an NBD handshake (`docs/wire.md`).
//!
//! Owns the codec and the order in which a sender serves what was asked. It does no I/O and knows
//! no clock: the client's end is a dialect of a connection of [`crate::nbd_source`], the server's
//! end is the daemon's front.

pub mod frame;
pub mod limits;
pub mod message;
pub mod pack;
pub mod scheduler;
pub mod session;

pub use frame::{Decoder, Frame, FrameError, HEADER_BYTES, Header, Kind, Priority};
pub use scheduler::{Misuse, Scheduler, Step, Work};
