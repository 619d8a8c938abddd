//! The receiving side of a connection: one buffer, filled by as few receives as possible.

use std::io::{self, Read};

use hikkoshi_nbd::wire::REQUEST_BYTES;
use socket2::Socket;

/// Holds a batch of requests, and payloads in pieces of this.
const INBOX_BYTES: usize = (256 << 10) + REQUEST_BYTES;

pub(super) struct Inbox {
    socket: Socket,
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// An inbox that already holds what came early, behind the handshake.
    pub fn new(socket: Socket, early: &[u8]) -> Self {
        let mut buf = vec![0; INBOX_BYTES.max(early.len())];
        buf[..early.len()].copy_from_slice(early);
        Self {
            socket,
            buf,
            start: 0,
            end: early.len(),
        }
    }

    /// Bytes that are here and were not consumed.
    pub fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The next request header, if all of it is here.
    pub fn take_header(&mut self) -> Option<[u8; REQUEST_BYTES]> {
        let header = self.buf.get(self.start..self.start + REQUEST_BYTES)?;
        if self.buffered() < REQUEST_BYTES {
            return None;
        }
        let header = header.try_into().ok()?;
        self.start += REQUEST_BYTES;
        Some(header)
    }

    /// Receives what there is, at least a byte. False at the end of the stream.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn receive(&mut self) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buf.len() || self.buf.len() - self.start < REQUEST_BYTES {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        loop {
            match self.socket.read(&mut self.buf[self.end..]) {
                Ok(0) => return Ok(false),
                Ok(n) => {
                    self.end += n;
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The next `wanted` bytes, or as many of them as the buffer takes; waits for them.
    ///
    /// # Errors
    /// The connection is broken, or ended before.
    pub fn fill(&mut self, wanted: usize) -> io::Result<&[u8]> {
        let wanted = wanted.min(self.buf.len());
        if self.start + wanted > self.buf.len() {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.buffered() < wanted {
            if !self.receive()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(&self.buf[self.start..self.start + wanted])
    }

    /// Lets go of bytes that [`Inbox::fill`] gave.
    pub fn consume(&mut self, len: usize) {
        self.start += len;
    }

    /// Passes over `len` bytes, waiting for them.
    ///
    /// # Errors
    /// The connection is broken, or ended before.
    pub fn skip(&mut self, mut len: usize) -> io::Result<()> {
        while len > 0 {
            let here = self.fill(len)?.len();
            self.consume(here);
            len -= here;
        }
        Ok(())
    }
}
