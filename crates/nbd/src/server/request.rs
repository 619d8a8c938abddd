//! Requests: 28 bytes, and what may be done about them (sections "Request message", "Request
//! types").
//!
//! [`Request::parse`] takes a header apart; [`Rules`] hold it against the export and against what
//! the handshake agreed on. Neither allocates or waits. What comes out as [`Verdict::Run`] is
//! within the disk, aligned, allowed and not longer than agreed: whoever runs it need not check
//! again.

use super::handshake::Session;
use crate::limits;
use crate::wire::{self, Errno, command, command_flag as flag, export};

/// The bytes are no request: the stream is out of step, and the connection must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a request begins with {0:#010x} instead of the magic number {magic:#010x}", magic = wire::REQUEST_MAGIC)]
pub struct BadMagic(pub u32);

/// A request as it came, not yet judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// The command.
    pub command: u16,
    /// Goes back in the reply, as it is.
    pub cookie: u64,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes; for a WRITE, of the payload that follows.
    pub len: u32,
}

impl Request {
    /// Takes a header apart.
    ///
    /// # Errors
    /// [`BadMagic`], if it does not begin as a request does.
    pub fn parse(bytes: &[u8; wire::REQUEST_BYTES]) -> Result<Self, BadMagic> {
        let magic = u32::from_be_bytes(at(bytes, 0));
        if magic != wire::REQUEST_MAGIC {
            return Err(BadMagic(magic));
        }
        Ok(Self {
            flags: u16::from_be_bytes(at(bytes, 4)),
            command: u16::from_be_bytes(at(bytes, 6)),
            cookie: u64::from_be_bytes(at(bytes, 8)),
            offset: u64::from_be_bytes(at(bytes, 16)),
            len: u32::from_be_bytes(at(bytes, 24)),
        })
    }

    fn has(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }
}

/// `N` bytes of a header from `start` on, which every caller keeps within it.
#[inline]
fn at<const N: usize>(bytes: &[u8; wire::REQUEST_BYTES], start: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[start..start + N]);
    field
}

/// A request that may run. Offsets and lengths are in bytes, within the disk, and never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answer with data.
    Read {
        /// Where.
        offset: u64,
        /// How much, at most the session's largest payload.
        len: u32,
        /// In a single chunk, or not at all.
        df: bool,
    },
    /// Take the payload, which follows the header.
    Write {
        /// Where.
        offset: u64,
        /// How much, at most the session's largest payload.
        len: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make durable what was completed, on this connection and, with CAN_MULTI_CONN, on all.
    Flush,
    /// The contents are needed no more.
    Trim {
        /// Where.
        offset: u64,
        /// How much; may be longer than any payload.
        len: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Fetch what will be read.
    Cache {
        /// Where.
        offset: u64,
        /// How much; may be longer than any payload.
        len: u32,
    },
    /// Make it read as zeroes.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How much; may be longer than any payload.
        len: u32,
        /// Durable before the reply.
        fua: bool,
        /// Must stay or become allocated.
        no_hole: bool,
        /// [`Errno::NotSup`] if it would be no quicker than writing.
        fast: bool,
    },
    /// Describe extents, in every context of the session.
    BlockStatus {
        /// Where.
        offset: u64,
        /// How much; may be longer than any payload.
        len: u32,
        /// One extent only.
        one: bool,
    },
    /// Finish what is in flight, answer this with nothing, close.
    Disconnect,
}

/// What to do about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Run it.
    Run(Command),
    /// It is about no bytes at all: answer that it is done, touch nothing.
    Done,
    /// Answer with an error, having skipped the payload that follows the header.
    Refuse {
        /// The error.
        errno: Errno,
        /// Bytes to skip; above zero only for a WRITE.
        payload_bytes: u32,
    },
    /// Close: what would have to be skipped is absurdly long.
    Close,
}

/// What requests are judged by. Made once a connection.
#[derive(Clone, Debug)]
pub struct Rules {
    size_bytes: u64,
    flags: u16,
    max_payload_bytes: u32,
    /// The bits that must be zero in offsets and lengths.
    unaligned: u64,
    has_contexts: bool,
}

impl Rules {
    /// The rules of a session.
    pub fn new(session: &Session) -> Self {
        Self {
            size_bytes: session.export.size_bytes,
            flags: session.export.flags,
            max_payload_bytes: session.max_payload_bytes.min(limits::PAYLOAD_CEILING_BYTES),
            unaligned: u64::from(session.export.min_block.max(1)) - 1,
            has_contexts: !session.contexts.is_empty(),
        }
    }

    /// The largest payload that comes with a command to run, in bytes.
    pub fn max_payload_bytes(&self) -> u32 {
        self.max_payload_bytes
    }

    /// Judges a request.
    #[inline]
    pub fn check(&self, request: &Request) -> Verdict {
        match self.judge(request) {
            Ok(verdict) => verdict,
            Err(errno) => {
                let payload_bytes = match request.command {
                    command::WRITE => request.len,
                    _ => 0,
                };
                if payload_bytes > limits::WRITE_SKIPPED_BYTES {
                    return Verdict::Close;
                }
                Verdict::Refuse {
                    errno,
                    payload_bytes,
                }
            }
        }
    }

    fn judge(&self, r: &Request) -> Result<Verdict, Errno> {
        let Request { offset, len, .. } = *r;
        let fua = r.has(flag::FUA);
        let command = match r.command {
            command::READ => {
                self.flags_within(r, self.if_offered(export::SEND_DF, flag::DF))?;
                self.range(r, Errno::Inval)?;
                if len > self.max_payload_bytes {
                    return Err(Errno::Overflow);
                }
                Command::Read {
                    offset,
                    len,
                    df: r.has(flag::DF),
                }
            }
            command::WRITE => {
                self.writable()?;
                self.flags_within(r, 0)?;
                self.range(r, Errno::NoSpc)?;
                if len > self.max_payload_bytes {
                    return Err(Errno::Inval);
                }
                Command::Write { offset, len, fua }
            }
            // Its flags mean nothing: there is no reply that could refuse them.
            command::DISC => return Ok(Verdict::Run(Command::Disconnect)),
            command::FLUSH => {
                self.offered(export::SEND_FLUSH)?;
                self.flags_within(r, 0)?;
                // Offset and length are reserved. A client that sets them still wants a flush,
                // and one too many harms nobody.
                return Ok(Verdict::Run(Command::Flush));
            }
            command::TRIM => {
                self.writable()?;
                self.offered(export::SEND_TRIM)?;
                self.flags_within(r, 0)?;
                self.range(r, Errno::Inval)?;
                Command::Trim { offset, len, fua }
            }
            command::CACHE => {
                self.offered(export::SEND_CACHE)?;
                self.flags_within(r, 0)?;
                self.range(r, Errno::Inval)?;
                Command::Cache { offset, len }
            }
            command::WRITE_ZEROES => {
                self.writable()?;
                self.offered(export::SEND_WRITE_ZEROES)?;
                let fast = self.if_offered(export::SEND_FAST_ZERO, flag::FAST_ZERO);
                self.flags_within(r, flag::NO_HOLE | fast)?;
                self.range(r, Errno::NoSpc)?;
                Command::WriteZeroes {
                    offset,
                    len,
                    fua,
                    no_hole: r.has(flag::NO_HOLE),
                    fast: r.has(flag::FAST_ZERO),
                }
            }
            command::BLOCK_STATUS => {
                if !self.has_contexts || len == 0 {
                    return Err(Errno::Inval);
                }
                self.flags_within(r, flag::REQ_ONE)?;
                self.range(r, Errno::Inval)?;
                Command::BlockStatus {
                    offset,
                    len,
                    one: r.has(flag::REQ_ONE),
                }
            }
            _ => return Err(Errno::Inval),
        };
        if len == 0 {
            return Ok(Verdict::Done);
        }
        Ok(Verdict::Run(command))
    }

    fn writable(&self) -> Result<(), Errno> {
        if self.flags & export::READ_ONLY == 0 {
            Ok(())
        } else {
            Err(Errno::Perm)
        }
    }

    /// A command that was not advertised is not known.
    fn offered(&self, export_flag: u16) -> Result<(), Errno> {
        if self.flags & export_flag != 0 {
            Ok(())
        } else {
            Err(Errno::Inval)
        }
    }

    fn if_offered(&self, export_flag: u16, command_flag: u16) -> u16 {
        if self.flags & export_flag != 0 {
            command_flag
        } else {
            0
        }
    }

    /// Refuses flags other than `allowed`, and than FUA, which any command may carry once the
    /// export offers it.
    fn flags_within(&self, r: &Request, allowed: u16) -> Result<(), Errno> {
        let allowed = allowed | self.if_offered(export::SEND_FUA, flag::FUA);
        if r.flags & !allowed == 0 {
            Ok(())
        } else {
            Err(Errno::Inval)
        }
    }

    /// Refuses a range that leaves the disk, also by way of 2^64, or is not aligned.
    fn range(&self, r: &Request, past_end: Errno) -> Result<(), Errno> {
        let end = r.offset.checked_add(u64::from(r.len)).ok_or(past_end)?;
        if end > self.size_bytes {
            return Err(past_end);
        }
        if (r.offset | u64::from(r.len)) & self.unaligned != 0 {
            return Err(Errno::Inval);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
