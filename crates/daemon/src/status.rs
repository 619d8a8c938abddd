//! What a volume tells about itself. The fields of the JSON form are stable: scripts read them.

use serde::{Deserialize, Serialize};

/// Where a volume stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LifeState {
    /// A plain disk image; needs nobody.
    Local,
    /// Waits for the handoff; the VM still runs at the source.
    Standby,
    /// The VM runs here; blocks are still coming.
    Arriving,
    /// A plain disk image that a new site prepares to take over; the VM still runs here.
    Departing,
    /// The disk has moved on: this is its old copy, and takes no writes.
    Departed,
    /// The move here was given up before the handoff.
    #[serde(rename = "given-up")]
    GivenUp,
    /// Not served yet: it is being opened, or waits for its source, without which it cannot be.
    Opening,
}

/// A source that is waited for, because without it the disk cannot begin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingStatus {
    /// Since when, in milliseconds since 1970 (UTC).
    pub since_unix_ms: u64,
    /// For how many seconds.
    pub waited_s: u64,
    /// How often it was tried in vain since then.
    pub attempts: u64,
    /// What happened the last time.
    pub last_error: String,
}

/// What is recorded of changes, so that a move back copies only these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayBackStatus {
    /// Whether it is.
    pub kept: bool,
    /// Bytes that have changed since the disk came here.
    pub changed_bytes: u64,
}

/// How far a move to another image of the same machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoragePhase {
    /// The disk is in the old image, and is copied ahead.
    Preparing,
    /// Clients are about to go over.
    Switching,
    /// The disk is in the new image, which still lacks something.
    Copying,
    /// All of it is in the new image.
    Done,
    /// It was given up or failed before the switch: the disk is in the old image.
    Failed,
}

/// The last move to another image of the same machine, since the daemon started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageMoveStatus {
    /// The old image.
    pub from: String,
    /// The new image.
    pub to: String,
    /// How far it is.
    pub phase: StoragePhase,
    /// Bytes that are in the new image.
    pub copied_bytes: u64,
    /// How long writes were held up at the switch, in microseconds; `null` before it.
    pub switch_us: Option<u64>,
    /// Why it failed; empty otherwise.
    pub message: String,
}

/// What the background copy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackgroundState {
    /// There is nothing to copy, or it may not begin yet.
    Idle,
    /// Copying.
    Running,
    /// Stopped by `pause`.
    Paused,
    /// Switched off by `--no-background`.
    Off,
}

/// One export, as `status --json` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// The export's name; empty for the default export.
    pub export: String,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Where the volume stands.
    pub state: LifeState,
    /// Bytes that are here (clean or owned).
    pub resident_bytes: u64,
    /// Bytes that were written, zeroed or trimmed here since the handoff.
    pub owned_bytes: u64,
    /// Bytes that only the source has.
    pub absent_bytes: u64,
    /// Bytes that crossed the link, requests included, since the daemon started.
    pub wire_bytes: u64,
    /// Bytes that were found in a seed image, and so did not cross the link, since the daemon
    /// started.
    #[serde(default)]
    pub seeded_bytes: u64,
    /// How data crosses the link now, written as `--compress` is; `null` while none has come, and
    /// where plain NBD is spoken.
    #[serde(default)]
    pub codec: Option<String>,
    /// Whether the source is reachable; `null` when there is none.
    pub source_connected: Option<bool>,
    /// For how many seconds the source has been away; `null` while it is there, or with none.
    #[serde(default)]
    pub source_down_s: Option<u64>,
    /// The source is waited for before the disk can begin: for the first time, or for the handoff;
    /// `null` otherwise.
    #[serde(default)]
    pub waiting: Option<WaitingStatus>,
    /// Reads that wait for the source now.
    #[serde(default)]
    pub reads_waiting: u64,
    /// A sync failed: writes and flushes are refused until a restart.
    #[serde(default)]
    pub poisoned: bool,
    /// Something did not fit onto the disk a short while ago.
    #[serde(default)]
    pub disk_full: bool,
    /// While the disk stands by: whether all that can be copied before the handoff is here; `null`
    /// where nothing is copied before it.
    #[serde(default)]
    pub prepared: Option<bool>,
    /// While the disk stands by: bytes that are here ahead of the handoff.
    #[serde(default)]
    pub ahead_bytes: u64,
    /// While the disk stands by: bytes that were copied again because the VM had changed them.
    #[serde(default)]
    pub repeated_bytes: u64,
    /// While the disk stands by to come back: not all of it is at the source, and the rest is only
    /// in the old copy that is here, which is served to the source.
    #[serde(default)]
    pub old_copy_needed: bool,
    /// Of an old copy: whether the new site has said, since this runs, that it took the disk over;
    /// `null` elsewhere.
    #[serde(default)]
    pub taken_over: Option<bool>,
    /// Of an old copy: in how many seconds the fence may be lifted by hand; `null`: now, or there is none.
    #[serde(default)]
    pub release_in_s: Option<u64>,
    /// What is recorded for a way back.
    #[serde(default)]
    pub way_back: WayBackStatus,
    /// The background copy.
    pub background: BackgroundState,
    /// How fast blocks become resident, bytes per second, over the last seconds.
    pub rate_bytes_per_s: u64,
    /// Seconds until all is here at that rate; `null` when unknown or done.
    pub eta_s: Option<u64>,
    /// The cap on the background copy in bytes per second; `null` without one.
    pub limit_bytes_per_s: Option<u64>,
    /// The cap on what all disks of this daemon copy in the background together, in bytes per second;
    /// `null` without one, and for a disk that has no source.
    #[serde(default)]
    pub common_limit_bytes_per_s: Option<u64>,
    /// The image file or block device.
    pub image: String,
    /// The last move to another image of this machine; `null` if there was none since the daemon
    /// started.
    #[serde(default)]
    pub storage_move: Option<StorageMoveStatus>,
    /// The source's address; `null` when there is none.
    pub source: Option<String>,
    /// What a person should know: what is waited for, or what is wrong. Empty when all is well.
    pub notes: Vec<String>,
    /// Clients connected now.
    pub clients: u64,
    /// Counters since the daemon started.
    pub counters: Counters,
}

/// Counters of one export since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Reads answered from the local image alone.
    pub reads_local: u64,
    /// Reads that waited for the source.
    pub reads_remote: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes, and writes with FUA.
    pub flushes: u64,
    /// Trims and zeroings.
    pub zeroes: u64,
    /// Blocks installed from the source.
    pub blocks_installed: u64,
    /// Bytes found to be zero at the source, so never sent.
    pub zero_bytes_skipped: u64,
    /// Of these, bytes that the source told to be zero before any data was asked for: holes.
    #[serde(default)]
    pub hole_bytes_skipped: u64,
    /// Bytes that were written here before they came, so that they were not needed any more.
    #[serde(default)]
    pub overwritten_bytes: u64,
    /// Bytes of the disk that came as data.
    #[serde(default)]
    pub data_bytes: u64,
    /// What those were on the link, requests included.
    #[serde(default)]
    pub data_wire_bytes: u64,
    /// Bytes that did not cross the link because what did was compressed.
    #[serde(default)]
    pub packed_bytes_saved: u64,
    /// Connections to the source given up because bytes were changed on their way.
    #[serde(default)]
    pub checksum_failures: u64,
    /// Bytes that were asked for and then not sent, because they were wanted no more.
    #[serde(default)]
    pub cancelled_bytes: u64,
    /// The longest a guest read waited for the source, in microseconds.
    pub longest_remote_read_us: u64,
    /// Times that the source was lost.
    #[serde(default)]
    pub source_losses: u64,
    /// Times that what answered in the source's place was not believed.
    #[serde(default)]
    pub source_refusals: u64,
    /// Reads that failed because the source was away for longer than the policy allows.
    #[serde(default)]
    pub reads_failed: u64,
    /// Requests that the image's medium failed.
    #[serde(default)]
    pub disk_errors: u64,
}
