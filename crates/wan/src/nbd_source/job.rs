//! What is asked of a connection, and what becomes of the answer.
//!
//! Owns the way from what a caller asked (any alignment, any length) to what a server serves
//! (whole blocks, limited length) and back. A [`Job`] is answered exactly once, by value.

use std::sync::{Arc, Mutex, PoisonError};

use hikkoshi_nbd::client::{Hole, Reply, StatusExtent};
use hikkoshi_nbd::wire::command;

use crate::source::{
    Completion, ExtentsAnswer, Fetched, Hashes, Lane, SourceError, SourceErrorKind, SourceExtent,
};
use crate::transport::message::{Hash, Request, Wish};
use crate::transport::pack::Packing;
use crate::transport::{HEADER_BYTES, Priority, limits};

/// The longest question for extents that goes over the wire, in bytes; a multiple of every
/// minimum block, and far inside 32 bits.
const MAX_STATUS_BYTES: u64 = 1 << 30;

/// See [`Job::weight`].
const STATUS_WEIGHT: u32 = 64 << 10;

/// One request on the wire.
pub(super) struct Job {
    pub(super) lane: Lane,
    pub(super) offset: u64,
    pub(super) len: u32,
    op: Op,
    /// What has come of a read whose connection was lost.
    come: Option<Box<Come>>,
}

/// The beginning of a reply.
struct Come {
    data: Vec<u8>,
    holes: Vec<Hole>,
    wire_bytes: u64,
}

enum Op {
    Read {
        wanted: Wanted,
        done: Completion<Fetched>,
    },
    Status {
        wanted: Wanted,
        done: Completion<ExtentsAnswer>,
    },
    /// Only over a connection that speaks frames.
    Hash {
        grain: u32,
        done: Completion<Hashes>,
    },
    Flush {
        done: Completion<()>,
    },
}

/// What answers a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Data,
    Extents,
    Hashes {
        grain: u32,
    },
    /// Nothing but that it was done.
    Done,
}

/// The bytes that the caller asked for, inside those of the job.
#[derive(Clone, Copy)]
struct Wanted {
    offset: u64,
    len: u64,
}

/// `offset..offset + len` grown to whole blocks, but not past the end of the disk.
fn widen(offset: u64, len: u64, block: u32, size: u64) -> (u64, u64) {
    let block = u64::from(block);
    let start = offset - offset % block;
    let end = (offset + len)
        .checked_next_multiple_of(block)
        .map_or(size, |end| end.min(size));
    (start, end - start)
}

impl Job {
    /// Jobs that together read `len` bytes (above zero, inside the disk) at `offset`.
    pub(super) fn reads(
        lane: Lane,
        offset: u64,
        len: u32,
        (block, max, size): (u32, u32, u64),
        done: Completion<Fetched>,
    ) -> Vec<Self> {
        let (start, total) = widen(offset, u64::from(len), block, size);
        let wanted = Wanted {
            offset,
            len: u64::from(len),
        };
        if let Ok(whole) = u32::try_from(total)
            && whole <= max
        {
            let op = Op::Read { wanted, done };
            return vec![Self {
                lane,
                offset: start,
                len: whole,
                op,
                come: None,
            }];
        }
        let end = start + total;
        let count = total.div_ceil(u64::from(max));
        let parts = Parts::new(wanted, usize::try_from(count).unwrap_or(usize::MAX), done);
        let mut jobs = Vec::new();
        let mut at = start;
        while at < end {
            let step = u32::try_from(end - at).unwrap_or(u32::MAX).min(max);
            let next = at + u64::from(step);
            let part = Wanted {
                offset: at.max(offset),
                len: next.min(offset + wanted.len) - at.max(offset),
            };
            let parts = Arc::clone(&parts);
            jobs.push(Self {
                lane,
                offset: at,
                len: step,
                op: Op::Read {
                    wanted: part,
                    done: Box::new(move |result| parts.add(result)),
                },
                come: None,
            });
            at = next;
        }
        jobs
    }

    /// A question for extents of `offset..offset + len` (not empty, inside the disk), or of as
    /// much of its beginning as one request may ask for.
    pub(super) fn status(
        lane: Lane,
        offset: u64,
        len: u64,
        (block, size): (u32, u64),
        done: Completion<ExtentsAnswer>,
    ) -> Self {
        let (start, total) = widen(offset, len, block, size);
        let total = total.min(MAX_STATUS_BYTES);
        let wanted = Wanted {
            offset,
            len: len.min(start + total - offset),
        };
        Self {
            lane,
            offset: start,
            len: u32::try_from(total).expect("capped far inside 32 bits"),
            op: Op::Status { wanted, done },
            come: None,
        }
    }

    /// A question for the hash of each grain of `offset..offset + len`, which must be one that
    /// frames can ask.
    pub(super) fn hashes(
        lane: Lane,
        offset: u64,
        len: u32,
        grain: u32,
        done: Completion<Hashes>,
    ) -> Self {
        let op = Op::Hash { grain, done };
        Self {
            lane,
            offset,
            len,
            op,
            come: None,
        }
    }

    /// A request to make durable what was written.
    pub(super) fn flush(done: Completion<()>) -> Self {
        Self {
            lane: Lane::Demand,
            offset: 0,
            len: 0,
            op: Op::Flush { done },
            come: None,
        }
    }

    /// The bytes of a read that would keep the server as busy, more or less: an answer about extents is hardly any data.
    pub(super) fn weight(&self) -> u32 {
        match self.op {
            Op::Read { .. } | Op::Hash { .. } => self.len,
            Op::Status { .. } => self.len.min(STATUS_WEIGHT),
            Op::Flush { .. } => 0,
        }
    }

    /// What it is, for people.
    pub(super) fn what(&self) -> String {
        let Self { len, offset, .. } = self;
        match self.op {
            Op::Read { .. } => format!("reading {len} bytes at {offset}"),
            Op::Status { .. } => format!("extents of {len} bytes at {offset}"),
            Op::Hash { .. } => format!("hashes of {len} bytes at {offset}"),
            Op::Flush { .. } => "a flush".to_owned(),
        }
    }

    /// What answers it.
    pub(super) fn answer(&self) -> Answer {
        match self.op {
            Op::Read { .. } => Answer::Data,
            Op::Status { .. } => Answer::Extents,
            Op::Hash { grain, .. } => Answer::Hashes { grain },
            Op::Flush { .. } => Answer::Done,
        }
    }

    /// Whether it brings bytes of this range, and not as demand.
    pub(super) fn is_bulk_of(&self, offset: u64, len: u64) -> bool {
        let end = self.offset + u64::from(self.len);
        let overlaps = self.offset < offset.saturating_add(len) && offset < end;
        self.lane != Lane::Demand && self.is_read() && overlaps
    }

    /// Whether all that the caller wanted of it lies in this range, and is wanted in this lane.
    pub(super) fn is_within(&self, lane: Lane, offset: u64, len: u64) -> bool {
        let Op::Read { wanted, .. } = &self.op else {
            return false;
        };
        let end = offset.saturating_add(len);
        self.lane == lane && wanted.offset >= offset && wanted.offset + wanted.len <= end
    }

    /// Keeps what has come of it, from its beginning on.
    pub(super) fn has_come(&mut self, data: Vec<u8>, holes: Vec<Hole>, wire_bytes: u64) {
        self.come = Some(Box::new(Come {
            data,
            holes,
            wire_bytes,
        }));
    }

    /// Whether something of it has come that counts.
    pub(super) fn has_part(&self) -> bool {
        self.come.is_some()
    }

    /// What has come of it is not to be believed.
    pub(super) fn forget_what_has_come(&mut self) {
        self.come = None;
    }

    /// Whether plain NBD cannot ask it.
    pub(super) fn needs_frames(&self) -> bool {
        matches!(self.op, Op::Hash { .. })
    }

    /// The request in frames.
    pub(super) fn frame(&self, id: u64, packing: Packing) -> Vec<u8> {
        let wish = match self.op {
            Op::Read { .. } => Wish::Read { packing },
            Op::Status { .. } => Wish::Extents,
            Op::Hash { grain, .. } => Wish::Hash { grain },
            Op::Flush { .. } => return Request::Flush(id, Priority::DEMAND).encode(),
        };
        let priority = match (self.lane, wish) {
            (Lane::Demand, _) => Priority::DEMAND,
            (_, Wish::Hash { .. }) => Priority::CHECK,
            (Lane::Rest, _) => Priority::REST,
            (Lane::Ahead, _) => Priority::READ_AHEAD,
            (Lane::Hot, _) => Priority::READ_HOT,
            (Lane::Bulk, _) => Priority::COLD,
            (Lane::Late, _) => Priority::WRITE_HOT,
        };
        Request::Wish {
            id,
            priority,
            wish,
            offset: self.offset,
            len: self.len,
        }
        .encode()
    }

    /// How many bytes [`Self::frame`] has.
    pub(super) fn frame_bytes(&self) -> usize {
        HEADER_BYTES
            + match self.op {
                Op::Hash { .. } => limits::REQUEST_PAYLOAD_BYTES as usize,
                Op::Read { .. } | Op::Status { .. } | Op::Flush { .. } => 0,
            }
    }

    /// Whether it is a read.
    pub(super) fn is_read(&self) -> bool {
        matches!(self.op, Op::Read { .. })
    }

    /// The command on the wire.
    pub(super) fn command(&self) -> u16 {
        match self.op {
            Op::Read { .. } => command::READ,
            Op::Status { .. } | Op::Hash { .. } => command::BLOCK_STATUS,
            Op::Flush { .. } => command::FLUSH,
        }
    }

    /// The decoder for its reply. Without a context, a question for extents cannot succeed.
    pub(super) fn reply(&self, structured: bool, context: Option<u32>) -> Reply {
        match self.op {
            Op::Read { .. } => Reply::to_read(self.offset, self.len, structured),
            Op::Status { .. } | Op::Hash { .. } => {
                Reply::to_block_status(self.offset, self.len, context.unwrap_or(u32::MAX))
            }
            Op::Flush { .. } => Reply::to_flush(structured),
        }
    }

    /// Answers with an error, and with what has come all the same.
    pub(super) fn fail(self, mut error: SourceError) {
        if let (Op::Read { wanted, .. }, Some(come)) = (&self.op, self.come) {
            let end = self.offset + u64::try_from(come.data.len()).unwrap_or(0);
            let wanted = Wanted {
                offset: wanted.offset,
                len: wanted.len.min(end.saturating_sub(wanted.offset)),
            };
            if wanted.len > 0 {
                error.come = self::fetched(wanted, self.offset, *come).ok().map(Arc::new);
            }
        }
        match self.op {
            Op::Read { done, .. } => done(Err(error)),
            Op::Status { done, .. } => done(Err(error)),
            Op::Hash { done, .. } => done(Err(error)),
            Op::Flush { done } => done(Err(error)),
        }
    }

    /// Answers a flush.
    pub(super) fn deliver_done(self) {
        let Op::Flush { done } = self.op else {
            return self.fail(untold("nothing in answer to a question"));
        };
        done(Ok(()));
    }

    /// Answers a question for hashes.
    pub(super) fn deliver_hashes(self, hashes: Vec<Hash>, wire_bytes: u64) {
        let Op::Hash { grain, done } = self.op else {
            return self.fail(untold("hashes in answer to another question"));
        };
        done(Ok(Hashes {
            offset: self.offset,
            grain,
            hashes,
            at_source: true,
            wire_bytes,
        }));
    }

    /// Answers a read with all bytes of the job; `holes` in any order.
    pub(super) fn deliver_data(self, data: Vec<u8>, holes: Vec<Hole>, wire_bytes: u64) {
        let Op::Read { wanted, done } = self.op else {
            return self.fail(untold("data in answer to a question for extents"));
        };
        let come = Come {
            data,
            holes,
            wire_bytes,
        };
        done(fetched(wanted, self.offset, come));
    }

    /// Answers a question for extents; `extents` begin where the job does.
    pub(super) fn deliver_status(self, extents: &[StatusExtent], wire_bytes: u64) {
        let Op::Status { wanted, done } = self.op else {
            return self.fail(untold("extents in answer to a read"));
        };
        let wanted_end = wanted.offset + wanted.len;
        let mut answer = Vec::with_capacity(extents.len());
        let mut at = self.offset;
        for extent in extents {
            let next = at + u64::from(extent.len);
            let (start, end) = (at.max(wanted.offset), next.min(wanted_end));
            if start < end {
                answer.push(SourceExtent {
                    offset: start,
                    len: end - start,
                    zero: extent.zero,
                });
            }
            at = next;
        }
        if answer.is_empty() {
            return done(Err(untold(
                "the extents end before what was asked for begins",
            )));
        }
        done(Ok(ExtentsAnswer {
            extents: answer,
            wire_bytes,
        }));
    }
}

/// What is wanted of bytes that begin at `start`.
fn fetched(wanted: Wanted, start: u64, come: Come) -> Result<Fetched, SourceError> {
    let Come {
        mut data,
        mut holes,
        wire_bytes,
    } = come;
    let head = usize::try_from(wanted.offset - start);
    let len = usize::try_from(wanted.len);
    let (Ok(head), Ok(len)) = (head, len) else {
        return Err(untold("a length beyond this machine"));
    };
    if data.len() < head + len {
        return Err(untold("bytes are missing"));
    }
    data.truncate(head + len);
    if head > 0 {
        data.drain(..head);
    }
    holes.sort_unstable_by_key(|hole| hole.at);
    let wanted_end = wanted.offset + wanted.len;
    let mut runs: Vec<(u64, u64)> = Vec::with_capacity(holes.len());
    for hole in holes {
        let at = start + u64::from(hole.at);
        let end = (at + u64::from(hole.len)).min(wanted_end);
        let at = at.max(wanted.offset);
        if at < end {
            push_run(&mut runs, (at, end - at));
        }
    }
    Ok(Fetched {
        offset: wanted.offset,
        data,
        holes: runs,
        wire_bytes,
    })
}

fn untold(message: &'static str) -> SourceError {
    SourceError::new(SourceErrorKind::Untrusted, message)
}

/// Appends a run, joined to the one before where they touch.
fn push_run(runs: &mut Vec<(u64, u64)>, (start, len): (u64, u64)) {
    match runs.last_mut() {
        Some(last) if last.0 + last.1 == start => last.1 += len,
        _ => runs.push((start, len)),
    }
}

/// A read that crossed the wire in parts, being put together.
struct Parts {
    wanted: Wanted,
    state: Mutex<PartsState>,
}

struct PartsState {
    left: usize,
    got: Vec<Fetched>,
    error: Option<SourceError>,
    done: Option<Completion<Fetched>>,
}

impl Parts {
    fn new(wanted: Wanted, left: usize, done: Completion<Fetched>) -> Arc<Self> {
        let state = PartsState {
            left,
            got: Vec::new(),
            error: None,
            done: Some(done),
        };
        Arc::new(Self {
            wanted,
            state: Mutex::new(state),
        })
    }

    /// Takes a part's outcome; the last one answers the whole.
    fn add(&self, result: Result<Fetched, SourceError>) {
        let (mut got, error, done) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(part) => state.got.push(part),
                Err(error) => {
                    state.error.get_or_insert(error);
                }
            }
            state.left -= 1;
            if state.left > 0 {
                return;
            }
            let done = state.done.take();
            (std::mem::take(&mut state.got), state.error.take(), done)
        };
        let Some(done) = done else { return };
        if let Some(error) = error {
            return done(Err(error));
        }
        got.sort_unstable_by_key(|part| part.offset);
        let mut whole = Fetched {
            offset: self.wanted.offset,
            data: Vec::with_capacity(usize::try_from(self.wanted.len).unwrap_or(0)),
            holes: Vec::new(),
            wire_bytes: 0,
        };
        for part in got {
            whole.data.extend_from_slice(&part.data);
            whole.wire_bytes += part.wire_bytes;
            for run in part.holes {
                push_run(&mut whole.holes, run);
            }
        }
        done(Ok(whole));
    }
}
