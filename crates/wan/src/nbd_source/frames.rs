//! The receiving half of a connection that speaks frames.
//!
//! Owns the way from frames to completions, and the proof that an answer is what was asked for:
//! data comes in order, gapless, and each piece fits the checksum that the other end made of what
//! it read. A byte that is handed on is one that the source had at that place.

use std::io;
use std::time::Duration;

use hikkoshi_nbd::client::{Hole, StatusExtent};

use super::attach::{TAKEN_BACK, Ticket};
use super::coding::Coding;
use super::job::{Answer, Job};
use super::line::Line;
use super::receive::{ReadError, Receiver, size, wire};
use super::replies::{Begun, Ended, Others, Replies};
use crate::source::{SourceError, SourceErrorKind};
use crate::transport::message::{Hash, parse_error, parse_extents, parse_hashes};
use crate::transport::pack::{Codec, Unpacker};
use crate::transport::session::Told;
use crate::transport::{HEADER_BYTES, Header, Kind, limits};

/// Bytes received at a time while looking for headers: a small answer at once, and a sixteenth of
/// a quantum at most, which is copied a second time.
const BUFFER_BYTES: usize = 4096 + 2 * HEADER_BYTES;

/// What has come in answer to a request.
struct Active {
    job: Job,
    data: Vec<u8>,
    /// So much of it has its checksum right.
    checked: usize,
    holes: Vec<Hole>,
    extents: Vec<StatusExtent>,
    hashes: Vec<Hash>,
    error: Option<SourceError>,
    wire_bytes: u64,
}

impl Begun for Active {
    fn begin(job: Job, _: &Line) -> Self {
        Self {
            wire_bytes: wire(job.frame_bytes()),
            job,
            data: Vec::new(),
            checked: 0,
            holes: Vec::new(),
            extents: Vec::new(),
            hashes: Vec::new(),
            error: None,
        }
    }

    fn give_up(mut self) -> Job {
        if self.checked > 0 {
            self.data.truncate(self.checked);
            self.job.has_come(self.data, self.holes, self.wire_bytes);
        }
        self.job
    }
}

/// Receives and answers until the connection ends.
pub(super) fn read(
    line: &Line,
    others: &dyn Others,
    progress_timeout: Option<Duration>,
) -> io::Result<Ended> {
    let mut replies = Replies::<Active>::new(line, others, progress_timeout, BUFFER_BYTES)?;
    if let Some(ticket) = &line.attaching {
        // Before anything that was asked for: what follows a refusal is not even looked at.
        if let Err(error) = attached(&mut replies.receiver, ticket, line) {
            return Ok(replies.end(error));
        }
    }
    let mut unpacker = Unpacker::default();
    Ok(replies.run(|replies| frame(replies, &mut unpacker)))
}

fn next_header(receiver: &mut Receiver<'_>) -> Result<Header, ReadError> {
    let decode = |bytes: &[u8]| {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        Ok(Some((Header::decode(header)?, HEADER_BYTES)))
    };
    Ok(receiver.header(HEADER_BYTES, decode)?.0)
}

/// Receives what the source has to say to being read from for a move.
fn attached(receiver: &mut Receiver<'_>, ticket: &Ticket, line: &Line) -> Result<(), ReadError> {
    let mut told = Vec::new();
    loop {
        let header = next_header(receiver)?;
        let len = size(header.payload_len)?;
        if header.kind != Kind::Told || told.len() + len > limits::TOLD_BYTES {
            return Err(ReadError::Answer("an answer to something else was given"));
        }
        receiver.body(len, |payload| {
            header.check_payload(payload)?;
            told.extend_from_slice(payload);
            Ok::<_, ReadError>(())
        })??;
        if header.last {
            break;
        }
    }
    match Told::decode(&told, line.negotiated.size_bytes) {
        Some(Told::Attached(attached)) if ticket.is_off(&attached) => {
            return Err(ReadError::Refused(TAKEN_BACK.to_owned()));
        }
        Some(Told::Attached(attached)) => ticket.was_told(attached),
        Some(Told::Refused(why)) => return Err(ReadError::Refused(why)),
        _ => return Err(ReadError::Answer("an answer that makes no sense")),
    }
    line.is_attached();
    Ok(())
}

/// Receives one frame.
fn frame(replies: &mut Replies<'_, Active>, unpacker: &mut Unpacker) -> Result<(), ReadError> {
    let header = next_header(&mut replies.receiver)?;
    let (active, receiver) = replies.of(header.id)?;
    active.wire_bytes += wire(HEADER_BYTES) + u64::from(header.payload_len);
    take(receiver, unpacker, active, &header)?;
    active.checked = active.data.len();
    if header.kind == Kind::Data {
        let codec = Codec::from_flags(header.packing).ok().flatten();
        let coding = Coding::of(codec, unpacker.level());
        replies.line.came(coding, u64::from(header.span));
    }
    if header.last {
        return finish(replies, header.id);
    }
    Ok(())
}

/// A reply is complete: its answer goes to the caller.
fn finish(replies: &mut Replies<'_, Active>, id: u64) -> Result<(), ReadError> {
    let Active {
        mut job,
        data,
        holes,
        extents,
        hashes,
        error,
        wire_bytes,
        ..
    } = replies.take(id)?;
    let whole = match job.answer() {
        Answer::Data => wire(data.len()) == u64::from(job.len),
        Answer::Extents => !extents.is_empty(),
        Answer::Hashes { .. } => !hashes.is_empty(),
        Answer::Done => true,
    };
    let incomplete = error.is_none() && !whole && job.is_read();
    if incomplete {
        match replies.pass_on(id, job) {
            Some(back) => job = back,
            None => return Ok(()),
        }
    }
    if incomplete && replies.line.is_cancelled(id) {
        let missing = u64::from(job.len).saturating_sub(wire(data.len()));
        replies.line.count_cancelled(missing);
        replies.answered(id, &job);
        let message = format!("{} bytes at {}: cancelled", job.len, job.offset);
        job.fail(SourceError::new(SourceErrorKind::Cancelled, message));
        return Ok(());
    }
    if error.is_none() && !whole {
        let why = "an answer was called done with something missing";
        return replies.broke(job, ReadError::Answer(why));
    }
    replies.answered(id, &job);
    match (error, job.answer()) {
        (Some(error), _) => job.fail(error),
        (None, Answer::Data) => job.deliver_data(data, holes, wire_bytes),
        (None, Answer::Extents) => job.deliver_status(&extents, wire_bytes),
        (None, Answer::Hashes { .. }) => job.deliver_hashes(hashes, wire_bytes),
        (None, Answer::Done) => job.deliver_done(),
    }
    Ok(())
}

/// Takes what belongs to a header, if it is what may come now.
fn take(
    receiver: &mut Receiver<'_>,
    unpacker: &mut Unpacker,
    active: &mut Active,
    header: &Header,
) -> Result<(), ReadError> {
    let unexpected = Err(ReadError::Answer("an answer to something else was given"));
    let payload_len = size(header.payload_len)?;
    match (header.kind, active.job.answer()) {
        (Kind::Data | Kind::Zero, Answer::Data) => {
            let at = check_place(active, header)?;
            let span = size(header.span)?;
            if active.data.capacity() == 0 {
                active.data.reserve_exact(size(active.job.len)?);
            }
            if header.kind == Kind::Zero {
                active.data.resize(at + span, 0);
                let at = u32::try_from(at).expect("less than the job's length");
                let len = header.span;
                active.holes.push(Hole { at, len });
                return Ok(());
            }
            let codec = Codec::from_flags(header.packing);
            let Some(codec) = codec.map_err(|_| ReadError::Answer("an unknown codec"))? else {
                receiver.data(&mut active.data, at, span)?;
                return Ok(header.check_payload(&active.data[at..])?);
            };
            receiver.body(payload_len, |payload| {
                header.check_payload(payload)?;
                unpacker
                    .unpack(codec, payload, span, &mut active.data)
                    .ok_or(ReadError::Answer("compressed data that does not add up"))
            })?
        }
        (Kind::ExtentList, Answer::Extents) => {
            let fits = header.offset == active.job.offset && header.span <= active.job.len;
            let extents = receiver.body(payload_len, |payload| {
                header.check_payload(payload)?;
                parse_extents(payload, header.span)
                    .filter(|_| fits)
                    .ok_or(ReadError::Answer("extents that do not add up"))
            })??;
            active.extents = extents;
            Ok(())
        }
        (Kind::Hashes, Answer::Hashes { grain }) => {
            let fits = header.offset == active.job.offset && header.span == active.job.len;
            let hashes = receiver.body(payload_len, |payload| {
                header.check_payload(payload)?;
                parse_hashes(payload, header.span, grain)
                    .filter(|_| fits)
                    .ok_or(ReadError::Answer("hashes of something else"))
            })??;
            active.hashes = hashes;
            Ok(())
        }
        (Kind::Error, _) => {
            let (errno, text) = receiver.body(payload_len, |payload| {
                header.check_payload(payload)?;
                parse_error(payload).ok_or(ReadError::Answer("a malformed error"))
            })??;
            let what = active.job.what();
            let message = format!("{what}: the source said {errno:?}: {text}");
            active.error = Some(SourceError::new(SourceErrorKind::Refused, message));
            Ok(())
        }
        (Kind::End, _) => Ok(()),
        _ => unexpected,
    }
}

/// Data comes in order and without gaps. Where it belongs, from the start of the request.
fn check_place(active: &Active, header: &Header) -> Result<usize, ReadError> {
    let Job { offset, len, .. } = active.job;
    let next = offset + wire(active.data.len());
    if header.offset != next {
        return Err(ReadError::Answer(
            "data came twice, not at all, or out of order",
        ));
    }
    if next + u64::from(header.span) > offset + u64::from(len) {
        return Err(ReadError::Answer("more data than was asked for"));
    }
    Ok(active.data.len())
}
