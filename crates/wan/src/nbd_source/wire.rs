//! The bytes of a connection, in both directions.
//!
//! A seam: [`SocketWire`] is a socket, and a simulator brings bytes of its own. Everything above
//! (queues, cookies, decoder, assembly of answers) is the same for both.

use std::io;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use socket2::Socket;

use super::dial::send_all;
use crate::tcp::TcpInfo;

/// What a connection is made of. Receiving is for one thread at a time.
pub trait Wire: Send + Sync {
    /// Sends everything or fails. Called with locks held: it must not wait for the peer.
    ///
    /// # Errors
    /// The connection is broken.
    fn send(&self, bytes: &[u8]) -> io::Result<()>;

    /// Sends if that needs no waiting; whether it arrives does not matter.
    fn send_politely(&self, bytes: &[u8]);

    /// Ends both directions, which wakes whoever receives.
    fn hang_up(&self);

    /// Has receiving come back with `EAGAIN` after so long in vain.
    ///
    /// # Errors
    /// The connection is broken.
    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()>;

    /// Receives some bytes, or with `all` as many as there is room for unless the end comes first.
    /// None is the end.
    ///
    /// # Errors
    /// The connection is broken, or patience is over.
    fn receive(&self, room: &mut [u8], all: bool) -> Result<usize, Errno>;

    /// The same, appended to `data`: at most `more` bytes, for which there is capacity.
    ///
    /// # Errors
    /// The connection is broken, or patience is over.
    fn receive_more(&self, data: &mut Vec<u8>, more: usize) -> Result<usize, Errno>;

    /// What TCP tells of it; `None` where it is none.
    fn tcp(&self) -> Option<TcpInfo> {
        None
    }
}

/// A connected socket.
pub(super) struct SocketWire(pub(super) Arc<Socket>);

impl Wire for SocketWire {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        send_all(&self.0, bytes)
    }

    fn send_politely(&self, bytes: &[u8]) {
        let _ = rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }

    fn hang_up(&self) {
        // It fails only where the peer was faster.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(patience)
    }

    fn receive(&self, room: &mut [u8], all: bool) -> Result<usize, Errno> {
        let flags = if all {
            RecvFlags::WAITALL
        } else {
            RecvFlags::empty()
        };
        rustix::net::recv(&self.0, room, flags).map(|(_, received)| received)
    }

    fn receive_more(&self, data: &mut Vec<u8>, more: usize) -> Result<usize, Errno> {
        let room = &mut data.spare_capacity_mut()[..more];
        let ((received, _), _) = rustix::net::recv(&self.0, room, RecvFlags::WAITALL)?;
        let received = received.len();
        // SAFETY: `received` bytes after the old end, inside the capacity, were initialised by the
        // kernel just now.
        unsafe { data.set_len(data.len() + received) };
        Ok(received)
    }

    fn tcp(&self) -> Option<TcpInfo> {
        TcpInfo::of(&self.0)
    }
}
