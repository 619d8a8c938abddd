//! What the fuzz targets do with their input. `docs/testing.md` tells how to run them.
//!
//! A target is a function from bytes to nothing that panics when an invariant is broken. Bytes go
//! through the real state machines, front ends and decoders of the product; only what would make a
//! run slow or different each time is replaced: files, clocks, and the source's server. The
//! binaries in `fuzz_targets/` hand these functions to libFuzzer; `tests/replay.rs` runs the same
//! functions over the corpus in an ordinary test.

#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "as in tests: disks of a few hundred KiB, and a panic is how a finding is told"
)]

pub mod config;
pub mod control;
pub mod frames;
pub mod input;
pub mod memory;
pub mod nbd_client;
pub mod nbd_server;
pub mod seeds;
pub mod state;
pub mod transport;

// What the command line reads is in the binary, which is no library: these are its own files.
#[allow(dead_code)]
#[path = "../../crates/hikkoshi/src/address.rs"]
mod address;
#[allow(dead_code)]
#[path = "../../crates/hikkoshi/src/cli.rs"]
mod cli;
#[allow(dead_code)]
#[path = "../../crates/hikkoshi/src/config_file.rs"]
mod config_file;
#[allow(dead_code)]
mod migrate;
#[allow(dead_code)]
#[path = "../../crates/hikkoshi/src/plan.rs"]
mod plan;
#[allow(dead_code)]
#[path = "../../crates/hikkoshi/src/quantity.rs"]
mod quantity;

/// A target by its name.
pub type Run = fn(&[u8]);

/// All targets, in alphabetical order.
pub const TARGETS: [(&str, Run); 7] = [
    ("config", config::run),
    ("control", control::run),
    ("frames", frames::run),
    ("nbd_client", nbd_client::run),
    ("nbd_server", nbd_server::run),
    ("state", state::run),
    ("transport", transport::run),
];
