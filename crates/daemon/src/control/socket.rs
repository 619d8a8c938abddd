//! The listening Unix socket: created with mode 0600 from its first moment, never stolen from a
//! live daemon, removed at the end if it is still ours.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::Mode;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

use super::{ControlError, dial};

/// Bytes a socket's path may have on Linux: `sun_path` less its closing zero.
const MAX_PATH_BYTES: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// A bound, listening socket and the file it has.
#[derive(Debug)]
pub(super) struct BoundSocket {
    socket: Socket,
    path: PathBuf,
    /// Device and inode of the file, to remove no other one's at the end.
    file: (u64, u64),
}

impl BoundSocket {
    /// Binds at `path`, replacing a socket that nobody listens on.
    pub(super) fn bind(path: &Path) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Io {
            path: path.to_path_buf(),
            source,
        };
        if path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(ControlError::PathTooLong(path.into(), MAX_PATH_BYTES));
        }
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
        // The file takes the socket's mode when it is bound, so it is never open to others, not
        // even between bind and a later chmod; and the process's umask is left alone.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed(error.into()))?;
        let address = SockAddr::unix(path).map_err(failed)?;
        if let Err(error) = socket.bind(&address) {
            if error.kind() != io::ErrorKind::AddrInUse {
                return Err(failed(error));
            }
            remove_if_stale(path)?;
            socket.bind(&address).map_err(failed)?;
        }
        socket.listen(BACKLOG).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let meta = std::fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            socket,
            path: path.to_path_buf(),
            file: (meta.dev(), meta.ino()),
        })
    }

    /// The socket for the runtime that is current.
    pub(super) fn listener(&self) -> io::Result<UnixListener> {
        let fd: OwnedFd = self.socket.try_clone()?.into();
        UnixListener::from_std(fd.into())
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if let Ok(meta) = std::fs::symlink_metadata(&self.path)
            && (meta.dev(), meta.ino()) == self.file
        {
            // Nothing more can be done about it; the next daemon replaces a stale socket.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes the socket at `path` if nobody answers there.
fn remove_if_stale(path: &Path) -> Result<(), ControlError> {
    let failed = |source| ControlError::Io {
        path: path.to_path_buf(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(ControlError::NotASocket(path.into()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    match dial::connect(path, Instant::now()) {
        Ok(_) => Err(ControlError::InUse(path.into())),
        // Its backlog is full: a daemon that is stopped, but not gone.
        Err(error) if error.kind() == io::ErrorKind::TimedOut => {
            Err(ControlError::InUse(path.into()))
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}
