//! What `serve` is told to do, by its options or by a configuration file.

use std::path::PathBuf;

use hikkoshi_daemon::config::{ExportConfig, Listen};

use crate::cli::ControlPlace;

/// An empty image that is to be created before it is served.
#[derive(Debug, PartialEq, Eq)]
pub struct NewImage {
    /// Where.
    pub path: PathBuf,
    /// How large, in bytes.
    pub bytes: u64,
}

/// What is to be served, before what was left out is filled in.
#[derive(Debug)]
pub struct Plan {
    /// Where clients are listened for; may be empty.
    pub listen: Vec<Listen>,
    /// Where the daemon is controlled; `None` for the default place.
    pub control: Option<ControlPlace>,
    /// Where metrics can be read over TCP.
    pub metrics: Option<String>,
    /// The exports.
    pub exports: Vec<ExportConfig>,
    /// Images to create.
    pub new_images: Vec<NewImage>,
    /// Most client connections at once.
    pub max_clients: usize,
    /// The cap on what all exports copy in the background together.
    pub max_rate_all: Option<u64>,
    /// The congestion control of what is sent over TCP.
    pub congestion: Option<String>,
}
