//! The decisions of a disk move: what is here, what is missing, what to fetch next.
//!
//! Nothing in this crate does I/O, reads a clock or draws a random number. Callers hand in events
//! and the time, and carry out the actions that come back.

pub mod blocks;
pub mod changes;
pub mod geometry;
pub mod handover;
pub mod heat;
pub mod journal;
pub mod mover;
pub mod precopy;
pub mod range_lock;
pub mod readahead;
pub mod residency;
pub mod seeding;
pub mod sync;
pub mod window;
#[cfg(all(test, not(loom)))]
mod window_tests;
pub mod witness;
