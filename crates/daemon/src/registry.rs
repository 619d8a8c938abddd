//! The exports of a daemon by name, as the control interface and the front end see them.

use hikkoshi_engine::heat::HeatMap;

use crate::config::StorageOrder;
use crate::events::Event;
use crate::status::ExportStatus;
use crate::verification::VerifyStatus;

/// Why a command to an export was refused. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// There is no such export.
    #[error("no export is named {0:?}; `hikkoshi status` lists those that are served")]
    NoSuchExport(String),
    /// The command makes no sense in the state the export is in.
    #[error("{0}")]
    Conflict(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
}

/// What the control interface can ask of an export.
pub trait Controlled: Send + Sync {
    /// How it stands. Never waits.
    fn status(&self) -> ExportStatus;
    /// How much it is read and written, region by region. Never waits.
    fn heat(&self) -> HeatMap;
    /// Stops the background copy; demand goes on. No error when it is stopped already.
    ///
    /// # Errors
    /// The export has no source.
    fn pause(&self) -> Result<(), CommandError>;
    /// Lets the background copy go on.
    ///
    /// # Errors
    /// The export has no source.
    fn resume(&self) -> Result<(), CommandError>;
    /// Caps the background copy, in bytes per second; `None` lifts the cap.
    ///
    /// # Errors
    /// The export has no source.
    fn set_limit(&self, bytes_per_s: Option<u64>) -> Result<(), CommandError>;
    /// From here on the VM runs here. Returns once that is durable. No error when it is so already.
    ///
    /// # Errors
    /// The export has no source, or the record could not be made durable.
    fn handoff(&self) -> Result<(), CommandError>;
    /// Gives the move here up before the handoff: the source is as it was. Returns once that is
    /// durable here.
    ///
    /// # Errors
    /// It is too late, or there is no move from one of ours.
    fn abort(&self) -> Result<(), CommandError>;
    /// Lifts the fence of the old copy of a disk that has moved on. Only with `force`.
    ///
    /// # Errors
    /// There is none, it could not be recorded, or `force` is missing.
    fn release(&self, force: bool) -> Result<(), CommandError>;
    /// Begins to move the disk to another image of this machine; clients stay. Returns once the copy
    /// has begun. The rest is in the status.
    ///
    /// # Errors
    /// The export's disk, or that image, makes it impossible; nothing has changed then.
    fn move_storage(&self, order: &StorageOrder) -> Result<(), CommandError> {
        let _ = order;
        Err(CommandError::Conflict(
            "this export cannot change its storage".to_owned(),
        ))
    }

    /// What has happened to it, with numbers above `since`, as far as it is kept. Never waits.
    fn events(&self, since: u64) -> Vec<Event>;

    /// Begins to compare what is clean with the source, unless that goes on already; with `accept`
    /// instead lets the source go whatever the last comparison has found. Does not wait.
    ///
    /// # Errors
    /// There is nothing to compare with, the VM still runs there, or nothing to accept was found.
    fn verify(&self, accept: bool) -> Result<VerifyStatus, CommandError>;
    /// How the last comparison stands. Never waits.
    fn verification(&self) -> VerifyStatus;
}

/// The exports of a daemon.
pub trait Exports: Send + Sync + 'static {
    /// All of them, in the order of the configuration.
    fn all(&self) -> Vec<std::sync::Arc<dyn Controlled>>;

    /// Caps what all of them copy in the background together, in bytes per second; `None` lifts the
    /// cap.
    fn set_common_limit(&self, bytes_per_s: Option<u64>);

    /// The one of this name. The empty name also finds the only export there is.
    ///
    /// # Errors
    /// There is none of this name.
    fn find(&self, name: &str) -> Result<std::sync::Arc<dyn Controlled>, CommandError>;
}
