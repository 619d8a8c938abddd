//! Where control sockets are when nobody said: a directory of the user's own, one socket a daemon.
//!
//! Reads no environment: the command line passes in what it found.

use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::Uid;

use super::dial;

/// Most sockets that are looked at in a directory.
const MAX_SOCKETS: usize = 1024;

/// Why a directory for control sockets is not used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It belongs to someone else, or others can enter it.
    #[error(
        "directory {0} is not used for control sockets: it must be a directory of this user that \
         nobody else can enter (mode 0700); remove it, or say --control unix:PATH"
    )]
    NotPrivate(PathBuf),
    /// The system refused.
    #[error("directory {path} for control sockets cannot be used: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The directories for control sockets, the preferred one first. A daemon uses the first that can
/// be had; commands look into all of them.
///
/// For root that is `/run/hikkoshi` whatever `runtime_dir` says: a daemon that systemd started
/// and root's login shell must agree.
pub fn directories(runtime_dir: Option<&Path>) -> Vec<PathBuf> {
    let uid = rustix::process::geteuid();
    let mut all = Vec::new();
    if uid == Uid::ROOT {
        all.push(PathBuf::from("/run/hikkoshi"));
    } else if let Some(dir) = runtime_dir
        && dir.is_absolute()
    {
        all.push(dir.join("hikkoshi"));
    }
    all.push(PathBuf::from(format!("/tmp/hikkoshi-{}", uid.as_raw())));
    all
}

/// The socket of the daemon with process number `pid`, in the first of `directories` that can be
/// had; the directory is created when it is missing.
///
/// # Errors
/// The last directory's, when none can be had.
pub fn socket_for(directories: &[PathBuf], pid: u32) -> Result<PathBuf, PlaceError> {
    let mut last = None;
    for dir in directories {
        match ensure(dir) {
            Ok(()) => return Ok(dir.join(format!("{pid}.sock"))),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| PlaceError::NotPrivate(PathBuf::new())))
}

/// The sockets in `directories` that somebody listens on, sorted. A directory that others could
/// have written to is left out.
pub fn live_sockets(directories: &[PathBuf]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for dir in directories {
        if check(dir).is_err() {
            continue;
        }
        let Ok(entries) = std::fs::read_dir(dir) else {
            continue;
        };
        for entry in entries.flatten().take(MAX_SOCKETS) {
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            // One whose backlog is full counts: somebody listens, if only nominally.
            let answers = is_socket
                && match dial::connect(&entry.path(), Instant::now()) {
                    Ok(_) => true,
                    Err(error) => error.kind() == io::ErrorKind::TimedOut,
                };
            if answers {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

fn ensure(dir: &Path) -> Result<(), PlaceError> {
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => check(dir),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => check(dir),
        Err(source) => Err(PlaceError::Io {
            path: dir.into(),
            source,
        }),
    }
}

/// In `/tmp` anyone could have made the directory first, so it is believed only if it is ours.
fn check(dir: &Path) -> Result<(), PlaceError> {
    let meta = std::fs::symlink_metadata(dir).map_err(|source| PlaceError::Io {
        path: dir.into(),
        source,
    })?;
    let ours = meta.uid() == rustix::process::geteuid().as_raw();
    if !meta.is_dir() || !ours || meta.mode() & 0o077 != 0 {
        return Err(PlaceError::NotPrivate(dir.into()));
    }
    Ok(())
}
