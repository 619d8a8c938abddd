//! Where missing blocks come from.
//!
//! [`Source`] is the seam: reads and extents, asked for without waiting and answered by a callback
//! on a thread of the source.

pub mod memory;
pub mod nbd_source;
pub mod source;

pub use memory::MemorySource;
pub use source::{
    Completion, ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind, SourceExtent,
    SourceInfo, SourceWatcher,
};
