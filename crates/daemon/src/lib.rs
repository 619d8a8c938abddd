//! Volumes, their NBD front end, and the control interface.

pub mod config;
pub mod control;
pub mod registry;
pub mod status;
