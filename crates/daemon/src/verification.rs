//! What the comparison of a disk with its source tells. The fields of the JSON form are stable.

use serde::{Deserialize, Serialize};

/// How a comparison stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyState {
    /// There was none since the daemon started.
    #[default]
    None,
    /// It is going on.
    Running,
    /// What was compared is equal.
    Equal,
    /// Something differs.
    Differs,
    /// Something could not be compared.
    Failed,
    /// It was ended before its end.
    Stopped,
}

/// How it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyMethod {
    /// The source tells the hashes of what it has.
    HashesAtSource,
    /// What the source has crosses the link, and is hashed here.
    DataOverLink,
}

/// A run of bytes that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A comparison, as `verify --json` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyStatus {
    /// The export's name.
    pub export: String,
    /// How it stands.
    pub state: VerifyState,
    /// How it is done; `null` before the first answer.
    pub method: Option<VerifyMethod>,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Bytes that were looked at; the sum of the next five.
    pub checked_bytes: u64,
    /// Bytes that are equal here and there.
    pub verified_bytes: u64,
    /// Bytes that were written here, which are not compared.
    pub owned_bytes: u64,
    /// Bytes that were not here yet.
    pub absent_bytes: u64,
    /// Bytes that differ, in whole grains of at most 64 KiB.
    pub differing_bytes: u64,
    /// Bytes that could not be read there or here.
    pub unreadable_bytes: u64,
    /// Where they differ, in order, the first [`MAX_DIFFERENCES`] runs of it.
    pub differences: Vec<Difference>,
    /// Bytes that crossed the link for it.
    pub wire_bytes: u64,
    /// It must end well before the source is let go (`serve --verify`).
    pub required: bool,
    /// Everything is here, but the source is kept because of this.
    pub withheld: bool,
    /// What went wrong; empty when nothing did.
    pub message: String,
}

/// Runs that are listed at most.
pub const MAX_DIFFERENCES: usize = 64;
