//! The receiving half of a connection.
//!
//! Owns the bytes between socket and completion: headers through a small buffer, payload straight
//! into the buffer that the caller gets. It must never touch the queues, except to say that a
//! place became free. One reader runs for each connection, on the thread of its keeper.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use hikkoshi_nbd::client::{ClientError, ClientErrorKind, Header, Outcome, Reply, Step};
use hikkoshi_nbd::wire::{CHUNK_BYTES, REQUEST_BYTES};

use super::job::Job;
use super::line::Line;
use super::wire::Wire;
use crate::source::{SourceError, SourceErrorKind};

/// Bytes received at a time while looking for headers: several small replies at once, and little
/// of a large payload, which is copied a second time.
const BUFFER_BYTES: usize = 16 << 10;

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
    Answer(&'static str),
}

impl ReadError {
    pub(super) fn kind(&self) -> SourceErrorKind {
        match self {
            Self::Closed | Self::Stalled(_) | Self::Io(_) => SourceErrorKind::Disconnected,
            Self::Protocol(_) | Self::Answer(_) => SourceErrorKind::Untrusted,
        }
    }
}

/// A reply of which something has come.
struct Active {
    job: Job,
    reply: Reply,
    data: Vec<u8>,
    wire_bytes: u64,
}

/// The reader of one connection.
pub(super) struct Reader<'a> {
    line: &'a Line,
    receiver: Receiver<'a>,
    active: HashMap<u64, Active>,
    /// The job whose answer broke the protocol.
    broken: Option<Job>,
    /// How many replies were complete so far.
    pub(super) answered: u64,
}

impl<'a> Reader<'a> {
    pub(super) fn new(line: &'a Line, progress_timeout: Option<Duration>) -> io::Result<Self> {
        // Often enough to notice a stall in good time, seldom enough to cost nothing.
        let tick = progress_timeout.map(|limit| (limit / 4).max(Duration::from_millis(10)));
        line.wire.set_patience(tick)?;
        Ok(Self {
            line,
            receiver: Receiver {
                wire: &*line.wire,
                line,
                progress_timeout,
                last_byte: Instant::now(),
                buffer: vec![0; BUFFER_BYTES],
                start: 0,
                end: 0,
            },
            active: HashMap::new(),
            broken: None,
            answered: 0,
        })
    }

    /// Receives and answers until the connection ends, and says why it did.
    pub(super) fn run(&mut self) -> ReadError {
        loop {
            if let Err(error) = self.reply() {
                return error;
            }
        }
    }

    /// The jobs whose replies have begun and will not end.
    pub(super) fn take_unfinished(&mut self) -> Vec<Job> {
        let mut active: Vec<(u64, Active)> = self.active.drain().collect();
        active.sort_unstable_by_key(|(cookie, _)| *cookie);
        let active = active.into_iter().map(|(_, active)| active.job);
        self.broken.take().into_iter().chain(active).collect()
    }

    /// Receives one simple reply or one chunk.
    fn reply(&mut self) -> Result<(), ReadError> {
        let structured = self.line.negotiated.structured;
        let (header, header_len) = self.receiver.header(structured)?;
        let (Header::Simple { cookie, .. } | Header::Chunk { cookie, .. }) = header;
        if !self.active.contains_key(&cookie) {
            let Some(job) = self.line.claim(cookie) else {
                return Err(ReadError::Answer("the server answered what nobody asked"));
            };
            let reply = job.reply(structured, self.line.negotiated.allocation_context);
            self.active.insert(
                cookie,
                Active {
                    job,
                    reply,
                    data: Vec::new(),
                    wire_bytes: wire(REQUEST_BYTES),
                },
            );
        }
        let active = self.active.get_mut(&cookie).expect("just put there");
        active.wire_bytes += wire(header_len);
        let mut step = match header {
            Header::Simple { error, .. } => active.reply.on_simple(error)?,
            Header::Chunk { chunk, .. } => active.reply.on_chunk(chunk)?,
        };
        if let Step::Body(len) = step {
            active.wire_bytes += wire(len);
            step = self
                .receiver
                .body(len, |body| active.reply.on_body(body))??;
        }
        match step {
            Step::Data { at, len } => {
                active.wire_bytes += u64::from(len);
                let (at, len, total) = (size(at)?, size(len)?, size(active.job.len)?);
                make_room(&mut active.data, at, total);
                self.receiver.data(&mut active.data, at, len)?;
            }
            Step::Hole(hole) => {
                let (at, len, total) = (size(hole.at)?, size(hole.len)?, size(active.job.len)?);
                make_room(&mut active.data, at, total);
                if active.data.len() == at {
                    active.data.resize(at + len, 0);
                }
                active.data[at..at + len].fill(0);
            }
            Step::Body(_) | Step::Nothing => {}
        }
        if active.reply.is_done() {
            let active = self.active.remove(&cookie).expect("just looked at");
            self.finish(active)?;
        }
        Ok(())
    }

    /// A reply is complete: its answer goes to the caller.
    fn finish(&mut self, active: Active) -> Result<(), ReadError> {
        let Active {
            job,
            reply,
            data,
            wire_bytes,
        } = active;
        match reply.finish() {
            Ok(outcome) => {
                self.line.answered(&job);
                self.answered += 1;
                match outcome {
                    Outcome::Read(holes) => job.deliver_data(data, holes, wire_bytes),
                    Outcome::Status(extents) => job.deliver_status(&extents, wire_bytes),
                }
                Ok(())
            }
            Err(error) if error.kind() == ClientErrorKind::Refused => {
                self.line.answered(&job);
                self.answered += 1;
                let what = if job.is_read() {
                    "reading"
                } else {
                    "extents of"
                };
                let message = format!("{what} {} bytes at {}: {error}", job.len, job.offset);
                job.fail(SourceError::new(SourceErrorKind::Refused, message));
                Ok(())
            }
            Err(error) => {
                // The connection ends; the job fails with the others.
                self.broken = Some(job);
                Err(error.into())
            }
        }
    }
}

/// Makes bytes up to `at` exist. In order, as servers answer, nothing is zeroed in vain: the data
/// is appended. A piece out of order first makes all of the buffer.
fn make_room(data: &mut Vec<u8>, at: usize, total: usize) {
    if data.capacity() == 0 {
        data.reserve_exact(total);
    }
    if data.len() != at {
        data.resize(total, 0);
    }
}

fn wire(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

fn size(len: u32) -> Result<usize, ReadError> {
    usize::try_from(len).map_err(|_| ReadError::Answer("a length beyond this machine"))
}

/// A wire with a small buffer in front.
struct Receiver<'a> {
    wire: &'a dyn Wire,
    line: &'a Line,
    progress_timeout: Option<Duration>,
    last_byte: Instant,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Receiver<'_> {
    fn header(&mut self, structured: bool) -> Result<(Header, usize), ReadError> {
        loop {
            let bytes = &self.buffer[self.start..self.end];
            if let Some((header, len)) = Header::decode(bytes, structured)? {
                self.start += len;
                return Ok((header, len));
            }
            if bytes.len() >= CHUNK_BYTES {
                return Err(ReadError::Answer("a reply header that never ends"));
            }
            self.fill()?;
        }
    }

    /// Receives `len` bytes that are only looked at.
    fn body<T>(&mut self, len: usize, look: impl FnOnce(&[u8]) -> T) -> Result<T, ReadError> {
        if len > BUFFER_BYTES {
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
    fn data(&mut self, data: &mut Vec<u8>, at: usize, len: usize) -> Result<(), ReadError> {
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
