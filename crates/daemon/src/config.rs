//! What a daemon is told to do. Filled by the command line or a configuration file; checked here,
//! so that both give the same errors.

use std::path::PathBuf;
use std::time::Duration;

pub use hikkoshi_wan::transport::pack::{MAX_LEVEL as MAX_COMPRESSION_LEVEL, Packing};

/// Where clients are listened for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A host and a port; port 0 lets the system choose.
    Tcp(String, u16),
    /// A Unix socket at this path. A stale socket is replaced, a live one is an error.
    Unix(PathBuf),
    /// An already listening socket that a supervisor passed on (socket activation), by number.
    Inherited(i32),
}

/// When the VM counts as running here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HandoffPolicy {
    /// The first write, trim or write-zeroes, or the explicit command.
    #[default]
    FirstWrite,
    /// Only the explicit command; a write before it is refused.
    Command,
    /// At the start: nobody uses the disk at the source any more.
    Now,
}

/// What is copied before the handoff, from a source of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prepare {
    /// Nothing.
    None,
    /// As much as there is time for.
    #[default]
    Ahead,
    /// Everything: the handoff waits for it.
    Full,
}

/// What a read that needs an unreachable source does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceLoss {
    /// Waits until the source is back.
    #[default]
    Wait,
    /// Waits this long, then fails with EIO.
    Error(Duration),
}

/// What is spoken with other daemons of ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Frames (`docs/wire.md`), where the other side knows them.
    #[default]
    Auto,
    /// Plain NBD.
    Nbd,
}

/// Which engine reads what is not in the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// The best that works here.
    #[default]
    Auto,
    /// A pool of threads.
    Threads,
    /// io_uring; an error where it is forbidden.
    IoUring,
}

/// The disk elsewhere that a volume moves from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceConfig {
    /// The address as given (`nbd://…`, `nbd+unix://…`, or a path to a Unix socket).
    pub uri: String,
    /// When the VM counts as running here.
    pub handoff: HandoffPolicy,
    /// Connections to the source, at least 1.
    pub connections: usize,
    /// Whether the background copy runs at all.
    pub background: bool,
    /// The cap on the background copy, bytes per second.
    pub max_rate: Option<u64>,
    /// What happens while the source is unreachable.
    pub on_loss: SourceLoss,
    /// Data that is already in the image may be overwritten by the source's.
    pub overwrite: bool,
    /// The recorded source may be reached at another address from now on.
    pub moved: bool,
    /// A recorded heat map that says what to copy first.
    pub heat: Option<PathBuf>,
    /// Everything is compared with the source before it is let go.
    pub verify: bool,
    /// What is copied before the handoff.
    pub prepare: Prepare,
    /// Images at this site that may hold blocks of the disk.
    pub seed_images: Vec<PathBuf>,
    /// Bytes are to be saved even where fetching them is faster than finding them.
    pub seed_always: bool,
    /// What is written here is recorded after completion as well.
    pub way_back: bool,
    /// The image is the old copy of this disk, which comes back.
    pub comes_back: bool,
}

impl SourceConfig {
    /// The source at `uri`, with what is usual.
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            handoff: HandoffPolicy::FirstWrite,
            connections: DEFAULT_CONNECTIONS,
            background: true,
            max_rate: None,
            on_loss: SourceLoss::Wait,
            overwrite: false,
            moved: false,
            heat: None,
            verify: false,
            prepare: Prepare::Ahead,
            seed_images: Vec::new(),
            seed_always: false,
            way_back: false,
            comes_back: false,
        }
    }
}

/// A move of a disk to another image of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageOrder {
    /// The new image file or block device; a file is made when there is none.
    pub image: PathBuf,
    /// Where its state lives; `IMAGE.hikkoshi` when not given.
    pub state_dir: Option<PathBuf>,
    /// What is copied before the switch.
    pub prepare: Prepare,
    /// The cap on the copy, bytes per second.
    pub max_rate: Option<u64>,
    /// What is in the new image may be overwritten.
    pub overwrite: bool,
}

/// One export: a disk image, maybe with a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    /// The export's name; empty for the default export.
    pub name: String,
    /// The image file or block device.
    pub image: PathBuf,
    /// Where the durable state lives; `IMAGE.hikkoshi` when not given.
    pub state_dir: Option<PathBuf>,
    /// The block size of residency in bytes.
    pub block_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Which engine reads what is not in the page cache.
    pub engine: Engine,
    /// What is spoken with its source, and with destinations that it moves to.
    pub transport: Transport,
    /// How what comes from its source is to be compressed; with `None` nothing is compressed for
    /// destinations either.
    pub compress: Packing,
    /// Where the disk moves from.
    pub source: Option<SourceConfig>,
}

/// A whole daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonConfig {
    /// Where clients are listened for, at least one.
    pub listen: Vec<Listen>,
    /// The control socket; `None` for none.
    pub control: Option<PathBuf>,
    /// A TCP address, HOST:PORT, at which metrics alone can be read; `None` for none.
    pub metrics: Option<String>,
    /// The exports, at least one, of distinct names.
    pub exports: Vec<ExportConfig>,
    /// Most client connections at once.
    pub max_clients: usize,
    /// The cap on what all exports copy in the background together, bytes per second.
    pub max_rate_all: Option<u64>,
    /// The congestion control of what is sent to clients over TCP; `None` for the system's own.
    pub congestion: Option<String>,
}

/// Most seed images of an export.
pub const MAX_SEED_IMAGES: usize = 8;

/// Connections to a source when nothing else is asked for: one for demand, three for bulk.
pub const DEFAULT_CONNECTIONS: usize = 4;

/// Most client connections when nothing else is asked for.
pub const DEFAULT_MAX_CLIENTS: usize = 1024;
