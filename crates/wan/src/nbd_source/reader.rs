//! The receiving half of a connection that speaks NBD.
//!
//! Owns the way from replies to completions. It must never touch the queues, except to say that a
//! place became free. One reader runs for each connection, on the thread of its keeper.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use hikkoshi_nbd::client::{ClientErrorKind, Header, Outcome, Reply, Step};
use hikkoshi_nbd::wire::{CHUNK_BYTES, REQUEST_BYTES};

use super::job::Job;
use super::line::Line;
use super::receive::{ReadError, Receiver, size, wire};
use crate::source::{SourceError, SourceErrorKind};

/// Bytes received at a time while looking for headers: several small replies at once, and little
/// of a large payload, which is copied a second time.
const BUFFER_BYTES: usize = 16 << 10;

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
        Ok(Self {
            line,
            receiver: Receiver::new(line, progress_timeout, BUFFER_BYTES)?,
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
        let active = self.active.drain().map(|(_, active)| active.job);
        self.broken.take().into_iter().chain(active).collect()
    }

    /// Receives one simple reply or one chunk.
    fn reply(&mut self) -> Result<(), ReadError> {
        let structured = self.line.negotiated.structured;
        let (header, header_len) = self
            .receiver
            .header(CHUNK_BYTES, |bytes| Ok(Header::decode(bytes, structured)?))?;
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
pub(super) fn make_room(data: &mut Vec<u8>, at: usize, total: usize) {
    if data.capacity() == 0 {
        data.reserve_exact(total);
    }
    if data.len() != at {
        data.resize(total, 0);
    }
}
