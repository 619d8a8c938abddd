//! Replies to requests (sections "Simple reply message", "Structured reply chunk message").
//!
//! Owns the proof that a read is answered with exactly its bytes: each once, none outside, none
//! missing. The caller looks up the request by the cookie of a [`Header`] (an unknown cookie is
//! the end of the connection) and does what each [`Step`] says, so that payload can be received
//! straight to where it belongs.

use super::{ClientError, be_u16, be_u32, be_u64, shown};
use crate::wire::{
    CHUNK_BYTES, Errno, MAX_STRING_BYTES, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, allocation, chunk,
};

/// How many extents one answer to BLOCK_STATUS may have, as servers must limit themselves to.
pub const MAX_STATUS_EXTENTS: u32 = 1 << 20;
/// The longest error chunk: number, text length, text, offset.
const MAX_ERROR_BODY_BYTES: u32 = 4 + 2 + 4096 + 8;
/// How many separate runs of a read may be answered before the gaps between them are. Servers
/// answer nearly in order; this only bounds the memory and time a hostile one can cost.
const MAX_RUNS: usize = 4096;

const _: () = assert!(MAX_STRING_BYTES == 4096);

/// What begins a reply or a piece of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// A whole simple reply; after a successful read its data follows.
    Simple {
        /// Zero, or an error number.
        error: u32,
        /// The request's.
        cookie: u64,
    },
    /// A chunk of a structured reply; `len` bytes follow.
    Chunk {
        /// The request's.
        cookie: u64,
        /// The rest of the header.
        chunk: ChunkHeader,
    },
}

/// The header of a structured reply chunk, without magic and cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`chunk::FLAG_DONE`] and flags to come.
    pub flags: u16,
    /// One of [`chunk`].
    pub kind: u16,
    /// Bytes that follow.
    pub len: u32,
}

impl Header {
    /// Reads a header from the start of `bytes`, and how many bytes it took. `None`: more bytes
    /// are needed (never more than [`CHUNK_BYTES`]).
    pub fn decode(bytes: &[u8], structured: bool) -> Result<Option<(Self, usize)>, ClientError> {
        let Some(magic) = be_u32(bytes, 0) else {
            return Ok(None);
        };
        match magic {
            SIMPLE_REPLY_MAGIC => {
                let (Some(error), Some(cookie)) = (be_u32(bytes, 4), be_u64(bytes, 8)) else {
                    return Ok(None);
                };
                Ok(Some((Self::Simple { error, cookie }, SIMPLE_REPLY_BYTES)))
            }
            STRUCTURED_REPLY_MAGIC if structured => {
                let (Some(flags), Some(kind), Some(cookie), Some(len)) = (
                    be_u16(bytes, 4),
                    be_u16(bytes, 6),
                    be_u64(bytes, 8),
                    be_u32(bytes, 16),
                ) else {
                    return Ok(None);
                };
                let chunk = ChunkHeader { flags, kind, len };
                Ok(Some((Self::Chunk { cookie, chunk }, CHUNK_BYTES)))
            }
            other => Err(ClientError::violation(format!(
                "a reply begins with {other:#010x}"
            ))),
        }
    }
}

/// What the caller does next for a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Receive that many bytes and hand them to [`Reply::on_body`].
    Body(usize),
    /// Receive `len` bytes of data; they belong at `at` of what was asked for. A reply of which
    /// this fails midway must be dropped.
    Data {
        /// Bytes from the start of the request.
        at: u32,
        /// Bytes, above zero.
        len: u32,
    },
    /// Zeroes belong there.
    Hole(Hole),
    /// Nothing; look at [`Reply::is_done`].
    Nothing,
}

/// A run of zeroes in answer to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// Bytes from the start of the request.
    pub at: u32,
    /// Bytes, above zero.
    pub len: u32,
}

/// A run of one state in answer to BLOCK_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes, above zero.
    pub len: u32,
    /// It reads as zeroes.
    pub zero: bool,
}

/// What a request brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every byte asked for was received or is in one of these holes (in order of arrival).
    Read(Vec<Hole>),
    /// Extents from the start of the request, gapless, at most as long as it.
    Status(Vec<StatusExtent>),
    /// It was done: there is nothing else to say of a FLUSH.
    Done,
}

#[derive(Debug)]
enum Asked {
    Read {
        runs: Runs,
        holes: Vec<Hole>,
    },
    Status {
        context: u32,
        extents: Vec<StatusExtent>,
    },
    Flush,
}

/// The state of one request's reply.
#[derive(Debug)]
pub struct Reply {
    asked: Asked,
    offset: u64,
    len: u32,
    structured: bool,
    /// The kind of chunk whose body was asked for.
    body: Option<ChunkHeader>,
    error: Option<ClientError>,
    done: bool,
}

impl Reply {
    /// For a READ of `len` bytes at `offset`.
    pub fn to_read(offset: u64, len: u32, structured: bool) -> Self {
        let asked = Asked::Read {
            runs: Runs::default(),
            holes: Vec::new(),
        };
        Self::new(asked, offset, len, structured)
    }

    /// For a BLOCK_STATUS of `len` bytes at `offset` with the single context `context`.
    pub fn to_block_status(offset: u64, len: u32, context: u32) -> Self {
        let asked = Asked::Status {
            context,
            extents: Vec::new(),
        };
        Self::new(asked, offset, len, true)
    }

    /// For a FLUSH. It may be answered either way, whatever was agreed on for reads.
    pub fn to_flush(structured: bool) -> Self {
        Self::new(Asked::Flush, 0, 0, structured)
    }

    fn new(asked: Asked, offset: u64, len: u32, structured: bool) -> Self {
        Self {
            asked,
            offset,
            len,
            structured,
            body: None,
            error: None,
            done: false,
        }
    }

    /// Whether nothing more comes, once the last step was carried out.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// A simple reply has come. Whether it succeeded or not, it is the whole reply.
    pub fn on_simple(&mut self, error: u32) -> Result<Step, ClientError> {
        if self.body.is_some() || self.done {
            return Err(ClientError::violation(
                "a simple reply inside another reply",
            ));
        }
        self.done = true;
        if error != 0 {
            self.set_error(error, &[]);
            return Ok(Step::Nothing);
        }
        match &mut self.asked {
            Asked::Read { runs, .. } if !self.structured => {
                runs.insert(0, self.len)?;
                Ok(Step::Data {
                    at: 0,
                    len: self.len,
                })
            }
            Asked::Flush => Ok(Step::Nothing),
            _ => Err(ClientError::violation(
                "a simple reply where a structured one was agreed on",
            )),
        }
    }

    /// The header of a chunk has come.
    pub fn on_chunk(&mut self, header: ChunkHeader) -> Result<Step, ClientError> {
        if self.body.is_some() || self.done || !self.structured {
            return Err(ClientError::violation("an unexpected chunk"));
        }
        self.done = header.flags & chunk::FLAG_DONE != 0;
        let body_len = match (&self.asked, header.kind) {
            (_, chunk::NONE) => {
                if !self.done || header.len != 0 {
                    return Err(ClientError::violation("a malformed NONE chunk"));
                }
                return Ok(Step::Nothing);
            }
            (Asked::Read { .. }, chunk::OFFSET_DATA) if header.len > 8 => 8,
            (Asked::Read { .. }, chunk::OFFSET_HOLE) if header.len == 12 => 12,
            (Asked::Status { .. }, chunk::BLOCK_STATUS)
                if header.len >= 12
                    && header.len % 8 == 4
                    && header.len / 8 <= MAX_STATUS_EXTENTS =>
            {
                header.len
            }
            (_, kind)
                if kind & chunk::ERROR_BIT != 0
                    && (6..=MAX_ERROR_BODY_BYTES).contains(&header.len) =>
            {
                header.len
            }
            (_, kind) => {
                return Err(ClientError::violation(format!(
                    "a chunk of kind {kind:#x} with {} bytes",
                    header.len
                )));
            }
        };
        self.body = Some(header);
        usize::try_from(body_len)
            .map(Step::Body)
            .map_err(|_| ClientError::violation("a length beyond this machine"))
    }

    /// The bytes have come that [`Step::Body`] asked for.
    pub fn on_body(&mut self, body: &[u8]) -> Result<Step, ClientError> {
        let Some(header) = self.body.take() else {
            return Err(ClientError::violation("a body without a chunk"));
        };
        match header.kind {
            chunk::OFFSET_DATA => {
                let (at, len) = self.place(body, header.len.saturating_sub(8))?;
                Ok(Step::Data { at, len })
            }
            chunk::OFFSET_HOLE => {
                let (at, len) = self.place(body, be_u32(body, 8).unwrap_or(0))?;
                let hole = Hole { at, len };
                if let Asked::Read { holes, .. } = &mut self.asked {
                    holes.push(hole);
                }
                Ok(Step::Hole(hole))
            }
            chunk::BLOCK_STATUS => self.on_status(body),
            kind => self.on_error(kind, body),
        }
    }

    /// Where `len` bytes belong that a chunk claims for the offset that `body` begins with.
    fn place(&mut self, body: &[u8], len: u32) -> Result<(u32, u32), ClientError> {
        let outside = || ClientError::violation("a chunk outside of what was asked for");
        let offset = be_u64(body, 0).ok_or_else(outside)?;
        let at = offset.checked_sub(self.offset).ok_or_else(outside)?;
        let at = u32::try_from(at).map_err(|_| outside())?;
        let end = at.checked_add(len).ok_or_else(outside)?;
        if len == 0 || end > self.len {
            return Err(outside());
        }
        if let Asked::Read { runs, .. } = &mut self.asked {
            runs.insert(at, end)?;
        }
        Ok((at, len))
    }

    fn on_status(&mut self, body: &[u8]) -> Result<Step, ClientError> {
        let Asked::Status { context, extents } = &mut self.asked else {
            return Err(ClientError::violation("extents in answer to a read"));
        };
        if be_u32(body, 0) != Some(*context) {
            return Err(ClientError::violation("extents of an unknown context"));
        }
        if !extents.is_empty() {
            return Err(ClientError::violation("extents of one context twice"));
        }
        let mut left = self.len;
        for pair in body.get(4..).unwrap_or_default().chunks_exact(8) {
            let (Some(len), Some(flags)) = (be_u32(pair, 0), be_u32(pair, 4)) else {
                return Err(ClientError::violation("a truncated extent"));
            };
            // Only the last extent may reach past the end of what was asked for.
            if len == 0 || left == 0 {
                return Err(ClientError::violation(
                    "an empty extent, or one past what was asked for",
                ));
            }
            let len = len.min(left);
            left -= len;
            // A hole that does not promise zeroes may read as anything: that is data.
            let zero = flags & allocation::ZERO != 0;
            match extents.last_mut() {
                // The sum stays within the request's 32 bits.
                Some(last) if last.zero == zero => last.len += len,
                _ => extents.push(StatusExtent { len, zero }),
            }
        }
        Ok(Step::Nothing)
    }

    fn on_error(&mut self, kind: u16, body: &[u8]) -> Result<Step, ClientError> {
        let malformed = || ClientError::violation("a malformed error chunk");
        let code = be_u32(body, 0).ok_or_else(malformed)?;
        let text_len = usize::from(be_u16(body, 4).ok_or_else(malformed)?);
        let text_end = 6 + text_len;
        let text = body.get(6..text_end).ok_or_else(malformed)?;
        if code == 0 || text_len > MAX_STRING_BYTES {
            return Err(malformed());
        }
        match kind {
            chunk::ERROR if body.len() != text_end => return Err(malformed()),
            chunk::ERROR_OFFSET => {
                let offset = be_u64(body, text_end).ok_or_else(malformed)?;
                let end = self.offset.saturating_add(u64::from(self.len));
                if body.len() != text_end + 8 || !(self.offset..end).contains(&offset) {
                    return Err(malformed());
                }
            }
            _ => {}
        }
        self.set_error(code, text);
        Ok(Step::Nothing)
    }

    /// Keeps the first error; the later ones tell nothing more.
    fn set_error(&mut self, code: u32, text: &[u8]) {
        self.error.get_or_insert_with(|| ClientError::Request {
            errno: Errno::from_code(code),
            message: shown(text),
        });
    }

    /// The outcome, once [`Self::is_done`].
    pub fn finish(self) -> Result<Outcome, ClientError> {
        if !self.done || self.body.is_some() {
            return Err(ClientError::violation("an unfinished reply"));
        }
        if let Some(error) = self.error {
            return Err(error);
        }
        match self.asked {
            Asked::Read { runs, holes } if runs.cover(self.len) => Ok(Outcome::Read(holes)),
            Asked::Read { .. } => Err(ClientError::violation(
                "a read was called done with bytes missing",
            )),
            Asked::Flush => Ok(Outcome::Done),
            Asked::Status { extents, .. } if !extents.is_empty() => Ok(Outcome::Status(extents)),
            Asked::Status { .. } => Err(ClientError::violation(
                "a question for extents was called done without any",
            )),
        }
    }
}

/// Which bytes of a request were answered: sorted, disjoint, never touching, none empty.
#[derive(Debug, Default)]
struct Runs(Vec<(u32, u32)>);

impl Runs {
    /// Adds `start..end`; refuses bytes that are there already.
    fn insert(&mut self, start: u32, end: u32) -> Result<(), ClientError> {
        let at = self.0.partition_point(|&(_, e)| e <= start);
        if self.0.get(at).is_some_and(|&(s, _)| s < end) {
            return Err(ClientError::violation(
                "bytes of a read were answered twice",
            ));
        }
        let joins_next = self.0.get(at).is_some_and(|&(s, _)| s == end);
        let before = at.checked_sub(1).filter(|&b| self.0[b].1 == start);
        match (before, joins_next) {
            (Some(b), true) => {
                self.0[b].1 = self.0[at].1;
                self.0.remove(at);
            }
            (Some(b), false) => self.0[b].1 = end,
            (None, true) => self.0[at].0 = start,
            (None, false) if self.0.len() < MAX_RUNS => self.0.insert(at, (start, end)),
            (None, false) => {
                return Err(ClientError::violation("a read answered in too many pieces"));
            }
        }
        Ok(())
    }

    /// Whether all of `0..len` was answered.
    fn cover(&self, len: u32) -> bool {
        len == 0 || self.0 == [(0, len)]
    }
}
