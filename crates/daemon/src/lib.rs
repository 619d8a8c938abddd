//! Volumes, their NBD front end, and the control interface.

mod boot;
pub mod config;
pub mod control;
pub mod daemon;
pub mod events;
pub mod export;
pub mod front;
mod heat;
mod links;
pub mod registry;
mod slot;
mod starting;
pub mod status;
mod transfer;
pub mod verification;
pub mod volume;

pub use daemon::{Daemon, DaemonError};
pub use starting::Starting;
