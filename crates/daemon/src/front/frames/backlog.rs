//! Whether the kernel would take another quantum, asked where it does not say so by itself.
//!
//! `poll` calls a TCP socket writable only while a third of its buffer is free, and what was sent and is not
//! acknowledged is in that buffer, too. On a long way that is most of it: with Debian's 4 MiB a
//! connection never had more than 2.7 MiB on its way, 13 MB/s at 200 ms. So where the buffer is
//! half full the socket is asked how much of it is unsent, and how much is acknowledged late is no
//! reason to wait.

use std::ffi::c_int;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::ioctl::{Getter, ioctl};
use socket2::Socket;

use super::UNSENT_BYTES;

/// What `linux/sockios.h` calls SIOCOUTQ and SIOCOUTQNSD.
const SIOCOUTQ: u32 = 0x5411;
const SIOCOUTQNSD: u32 = 0x894b;

/// How long until a socket that would take nothing is asked again: `poll` may not tell.
const PATIENCE: Duration = Duration::from_millis(2);

/// How full the kernel's buffer of a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backlog {
    /// `poll` tells when there is room.
    Short,
    /// There is room, which `poll` would not tell of.
    Room,
    /// There is none now, and `poll` would not tell when there is.
    Full,
}

impl Backlog {
    /// Looks at a TCP socket. `refused`: it has just taken nothing.
    pub fn of(socket: &Socket, refused: bool) -> Self {
        let long = outstanding::<SIOCOUTQ>(socket)
            .zip(socket.send_buffer_size().ok())
            .is_some_and(|(queued, size)| queued > size / 2);
        let unsent = outstanding::<SIOCOUTQNSD>(socket);
        match unsent.and_then(|bytes| u32::try_from(bytes).ok()) {
            Some(unsent) if long && unsent < UNSENT_BYTES && !refused => Self::Room,
            Some(_) if long => Self::Full,
            _ => Self::Short,
        }
    }

    /// How long to wait for what `poll` tells.
    pub fn patience(self) -> Option<Duration> {
        match self {
            Self::Short => None,
            Self::Room => Some(Duration::ZERO),
            Self::Full => Some(PATIENCE),
        }
    }
}

/// Bytes of a TCP socket that are not sent yet.
pub(super) fn unsent(socket: &Socket) -> u64 {
    let bytes = outstanding::<SIOCOUTQNSD>(socket);
    bytes
        .and_then(|bytes| u64::try_from(bytes).ok())
        .unwrap_or(u64::MAX)
}

/// Bytes of a TCP socket that the other end has not acknowledged, sent or not.
pub(super) fn unacknowledged(socket: &Socket) -> u64 {
    let bytes = outstanding::<SIOCOUTQ>(socket);
    bytes
        .and_then(|bytes| u64::try_from(bytes).ok())
        .unwrap_or(0)
}

/// Bytes of a socket's buffer, of the kind that `WHICH` asks for; `None` where it cannot be asked.
fn outstanding<const WHICH: u32>(socket: &Socket) -> Option<usize> {
    // SAFETY: both requests write one int, and nothing else.
    let bytes = unsafe { ioctl(socket.as_fd(), Getter::<WHICH, c_int>::new()) };
    bytes.ok().and_then(|bytes| usize::try_from(bytes).ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A peer that reads nothing fills the buffer: no room. What is merely unsent for the same reason
    /// counts as a backlog, and when the peer reads on there is room again.
    #[test]
    fn a_full_buffer_has_no_room_until_the_peer_reads() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut there, _) = listener.accept().unwrap();
        here.set_nonblocking(true).unwrap();
        let socket = Socket::from(here.try_clone().unwrap());
        assert_eq!(Backlog::of(&socket, false), Backlog::Short);
        let piece = [7; 65536];
        let mut sent = 0;
        loop {
            match here.write(&piece) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
        }
        assert_eq!(Backlog::of(&socket, false), Backlog::Full);
        let mut rest = vec![0; sent];
        there.read_exact(&mut rest).unwrap();
        // Acknowledgements may take a moment.
        while Backlog::of(&socket, false) == Backlog::Full {
            std::thread::yield_now();
        }
    }
}
