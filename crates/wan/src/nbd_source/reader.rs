//! The receiving half of a connection that speaks NBD.
//!
//! Owns the way from replies to completions. It must never touch the queues, except to say that a
//! place became free. One reader runs for each connection, on the thread of its keeper.

use std::io;
use std::time::Duration;

use hikkoshi_nbd::client::{ClientErrorKind, Header, Negotiated, Outcome, Reply, Step};
use hikkoshi_nbd::wire::{CHUNK_BYTES, REQUEST_BYTES};

use super::job::Job;
use super::line::Line;
use super::receive::{ReadError, size, wire};
use super::replies::{Begun, Ended, Others, Replies};
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

impl Begun for Active {
    fn begin(job: Job, line: &Line) -> Self {
        let Negotiated {
            structured,
            allocation_context,
            ..
        } = line.negotiated;
        Self {
            reply: job.reply(structured, allocation_context),
            job,
            data: Vec::new(),
            wire_bytes: wire(REQUEST_BYTES),
        }
    }

    fn give_up(self) -> Job {
        self.job
    }
}

/// Receives and answers until the connection ends.
pub(super) fn read(
    line: &Line,
    others: &dyn Others,
    progress_timeout: Option<Duration>,
) -> io::Result<Ended> {
    Ok(Replies::new(line, others, progress_timeout, BUFFER_BYTES)?.run(reply))
}

/// Receives one simple reply or one chunk.
fn reply(replies: &mut Replies<'_, Active>) -> Result<(), ReadError> {
    let structured = replies.line.negotiated.structured;
    let (header, header_len) = replies
        .receiver
        .header(CHUNK_BYTES, |bytes| Ok(Header::decode(bytes, structured)?))?;
    let (Header::Simple { cookie, .. } | Header::Chunk { cookie, .. }) = header;
    let (active, receiver) = replies.of(cookie)?;
    active.wire_bytes += wire(header_len);
    let mut step = match header {
        Header::Simple { error, .. } => active.reply.on_simple(error)?,
        Header::Chunk { chunk, .. } => active.reply.on_chunk(chunk)?,
    };
    if let Step::Body(len) = step {
        active.wire_bytes += wire(len);
        step = receiver.body(len, |body| active.reply.on_body(body))??;
    }
    match step {
        Step::Data { at, len } => {
            active.wire_bytes += u64::from(len);
            let (at, len, total) = (size(at)?, size(len)?, size(active.job.len)?);
            make_room(&mut active.data, at, total);
            receiver.data(&mut active.data, at, len)?;
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
        return finish(replies, cookie);
    }
    Ok(())
}

/// A reply is complete: its answer goes to the caller.
fn finish(replies: &mut Replies<'_, Active>, cookie: u64) -> Result<(), ReadError> {
    let Active {
        job,
        reply,
        data,
        wire_bytes,
    } = replies.take(cookie)?;
    match reply.finish() {
        Ok(outcome) => {
            replies.answered(cookie, &job);
            match outcome {
                Outcome::Read(holes) => job.deliver_data(data, holes, wire_bytes),
                Outcome::Status(extents) => job.deliver_status(&extents, wire_bytes),
                Outcome::Done => job.deliver_done(),
            }
            Ok(())
        }
        Err(error) if error.kind() == ClientErrorKind::Refused => {
            replies.answered(cookie, &job);
            let message = format!("{}: {error}", job.what());
            job.fail(SourceError::new(SourceErrorKind::Refused, message));
            Ok(())
        }
        Err(error) => replies.broke(job, error),
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
