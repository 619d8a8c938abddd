//! Connecting to a control socket within a bounded time.
//!
//! A blocking connect to a Unix socket waits without end while the listener's backlog is full, as
//! that of a stopped daemon becomes. So it is tried without blocking, again and again.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

/// The pause between two attempts while the backlog is full.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// Connects, or gives up at `deadline`.
pub(super) fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SockAddr::unix(path)?;
    loop {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&address) {
            Ok(()) => {
                socket.set_nonblocking(false)?;
                return Ok(socket.into());
            }
            // The backlog is full: unix(7).
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "it accepts no connections: too many wait already",
                    ));
                }
                std::thread::sleep(RETRY_EVERY);
            }
            Err(error) => return Err(error),
        }
    }
}
