//! The crash sweep: the real binary, killed at any instant and at named points, and its power cut.
//!
//! - [`sweep`] carries volumes through kills, and compares after every restart;
//! - [`record`] and [`powercut`] record what the binary does to its files, and start it on what a
//!   medium may hold after a cut at any instant;
//! - [`movecut`] does so with both ends of a move;
//! - [`soak`] does both on several file systems until enough is done.
//!
//! A kill at a random instant cannot be repeated exactly: the seed repeats the volume, the
//! arguments and the clients' requests, not the instant. A named point is repeated by its name and
//! number; a power cut, exactly, from its recording and seed.

pub mod check;
pub mod counts;
pub mod daemon;
pub mod disk;
pub mod filesystem;
pub mod load;
pub mod medium;
pub mod movecut;
pub mod powercut;
pub mod record;
pub mod soak;
pub mod sources;
pub mod sweep;

use std::path::PathBuf;

/// The size of the disks that are moved: 8 MiB. Large enough for a volume to live through dozens
/// of kills before it is complete, small enough for all of it to be compared each time.
pub const DISK_SECTORS: u64 = 16_384;

/// The programs under test.
#[derive(Clone, Debug)]
pub struct Programs {
    /// As it is released.
    pub hikkoshi: PathBuf,
    /// The same, built with the feature `crash-points`.
    pub armed: Option<PathBuf>,
}
