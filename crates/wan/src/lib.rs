//! Where missing blocks come from.
//!
//! [`Source`] is the seam: reads and extents, asked for without waiting and answered by a callback
//! on a thread of the source. [`NbdSource`] is any standard NBD server, or one of ours, with which
//! it speaks the frames of [`transport`]; [`MemorySource`] is for tests that decide themselves what
//! is answered when.

pub mod memory;
pub mod nbd_source;
pub mod source;
pub mod tcp;
pub mod transport;

pub use memory::MemorySource;
pub use nbd_source::{Address, Coding, MoveLine, MoveLink, NbdSource, NbdSourceConfig, Ticket};
pub use source::{
    Completion, ExtentsAnswer, Fetched, Hashes, Lane, Source, SourceError, SourceErrorKind,
    SourceExtent, SourceInfo, SourceWatcher,
};
