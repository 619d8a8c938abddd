//! The bytes of a connection, received.
//!
//! Owns the way from the wire to where bytes belong: headers through a small buffer, payload
//! straight into the buffer that the caller gets. It knows no protocol; the readers of both
//! dialects do. Decides when a silent peer is given up.

use std::io;
use std::time::{Duration, Instant};

use hikkoshi_nbd::client::ClientError;

use super::line::Line;
use super::wire::Wire;
use crate::source::SourceErrorKind;
use crate::transport::FrameError;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("the server closed the connection")]
    Closed,
    #[error("no byte came for {0:?} while requests waited")]
    Stalled(Duration),
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(#[from] ClientError),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Answer(&'static str),
    /// It is not to be read from for this move.
    #[error("{0}")]
    Refused(String),
}

impl ReadError {
    pub(super) fn kind(&self) -> SourceErrorKind {
        match self {
            Self::Closed | Self::Stalled(_) | Self::Io(_) => SourceErrorKind::Disconnected,
            Self::Protocol(_) | Self::Frame(_) | Self::Answer(_) | Self::Refused(_) => {
                SourceErrorKind::Untrusted
            }
        }
    }

    /// Whether bytes were changed on their way.
    pub(super) fn is_checksum(&self) -> bool {
        matches!(self, Self::Frame(error) if error.is_checksum())
    }
}

/// A wire with a small buffer in front.
pub(super) struct Receiver<'a> {
    wire: &'a dyn Wire,
    line: &'a Line,
    progress_timeout: Option<Duration>,
    last_byte: Instant,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<'a> Receiver<'a> {
    /// With a buffer of `buffer_bytes`: several small replies at once, and little of a large
    /// payload, which is copied a second time.
    pub(super) fn new(
        line: &'a Line,
        progress_timeout: Option<Duration>,
        buffer_bytes: usize,
    ) -> io::Result<Self> {
        // Often enough to notice a stall in good time, seldom enough to cost nothing.
        let tick = progress_timeout.map(|limit| (limit / 4).max(Duration::from_millis(10)));
        line.wire.set_patience(tick)?;
        Ok(Self {
            wire: &*line.wire,
            line,
            progress_timeout,
            last_byte: Instant::now(),
            buffer: vec![0; buffer_bytes],
            start: 0,
            end: 0,
        })
    }

    /// Receives a header of at most `most` bytes. `decode` takes it from the start of what is
    /// there and tells how long it was; `None`: there is more to come.
    pub(super) fn header<T>(
        &mut self,
        most: usize,
        decode: impl Fn(&[u8]) -> Result<Option<(T, usize)>, ReadError>,
    ) -> Result<(T, usize), ReadError> {
        loop {
            let bytes = &self.buffer[self.start..self.end];
            if let Some((header, len)) = decode(bytes)? {
                self.start += len;
                return Ok((header, len));
            }
            if bytes.len() >= most {
                return Err(ReadError::Answer("a reply header that never ends"));
            }
            self.fill()?;
        }
    }

    /// Receives `len` bytes that are only looked at.
    pub(super) fn body<T>(
        &mut self,
        len: usize,
        look: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, ReadError> {
        if len > self.buffer.len() {
            let mut body = Vec::with_capacity(len);
            self.data(&mut body, 0, len)?;
            return Ok(look(&body));
        }
        while self.end - self.start < len {
            self.fill()?;
        }
        let body = &self.buffer[self.start..self.start + len];
        self.start += len;
        Ok(look(body))
    }

    /// Receives more into the buffer, which has less in it than the message it begins.
    fn fill(&mut self) -> Result<(), ReadError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            let room = &mut self.buffer[self.end..];
            match self.wire.receive(room, false) {
                Ok(received) => {
                    self.end += received;
                    return self.progress(received);
                }
                Err(error) => self.pause(error)?,
            }
        }
    }

    /// Receives `len` bytes to `at` of `data`: over bytes that are there, or appended if `at` is
    /// its end.
    pub(super) fn data(
        &mut self,
        data: &mut Vec<u8>,
        at: usize,
        len: usize,
    ) -> Result<(), ReadError> {
        let buffered = len.min(self.end - self.start);
        let bytes = &self.buffer[self.start..self.start + buffered];
        self.start += buffered;
        if at < data.len() {
            data[at..at + buffered].copy_from_slice(bytes);
            let mut filled = at + buffered;
            while filled < at + len {
                let room = &mut data[filled..at + len];
                match self.wire.receive(room, true) {
                    Ok(received) => {
                        filled += received;
                        self.progress(received)?;
                    }
                    Err(error) => self.pause(error)?,
                }
            }
            return Ok(());
        }
        data.reserve(len);
        data.extend_from_slice(bytes);
        while data.len() < at + len {
            let missing = at + len - data.len();
            match self.wire.receive_more(data, missing) {
                Ok(received) => self.progress(received)?,
                Err(error) => self.pause(error)?,
            }
        }
        Ok(())
    }

    fn progress(&mut self, received: usize) -> Result<(), ReadError> {
        if received == 0 {
            return Err(ReadError::Closed);
        }
        if self.progress_timeout.is_some() {
            self.last_byte = Instant::now();
        }
        Ok(())
    }

    /// A receive brought nothing: decides whether that is the end.
    fn pause(&self, error: rustix::io::Errno) -> Result<(), ReadError> {
        match (error, self.progress_timeout) {
            (rustix::io::Errno::INTR, _) => Ok(()),
            (rustix::io::Errno::AGAIN, Some(limit)) => match self.line.waiting_since() {
                Some(since) if since.max(self.last_byte).elapsed() >= limit => {
                    Err(ReadError::Stalled(limit))
                }
                _ => Ok(()),
            },
            _ => Err(ReadError::Io(error.into())),
        }
    }
}

pub(super) fn wire(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

pub(super) fn size(len: u32) -> Result<usize, ReadError> {
    usize::try_from(len).map_err(|_| ReadError::Answer("a length beyond this machine"))
}
