//! Volumes, their NBD front end, and the control interface.

pub mod status;
