//! The client's handshake (section "Protocol phases", "Fixed newstyle negotiation").
//!
//! Owns the order of options and what to do without those that a server lacks: no structured
//! replies leads to simple ones, no `base:allocation` to none, no frames of ours to plain NBD, no
//! GO to EXPORT_NAME. Options go out one by one, each after the answer to the one before, or all
//! at once and ahead of the greeting ([`Handshake::at_once`]), which saves three round trips. The
//! caller receives exactly [`Handshake::needed`] bytes at a time, so no byte of the transmission phase
//! is ever taken by mistake.

use std::collections::VecDeque;

use super::{ClientError, be_u16, be_u32, be_u64, shown};
use crate::wire::{
    self, BASE_ALLOCATION, INIT_MAGIC, MAX_STRING_BYTES, OPENING, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    TRANSPORT, info, option, reply,
};

/// What stands in place of [`OPTION_MAGIC`] in an oldstyle greeting.
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// The longest payload of an option reply that is listened to, in bytes: an error text or a name
/// of [`MAX_STRING_BYTES`] with room for numbers around it, and generous to chatty servers.
const MAX_OPTION_REPLY_BYTES: u32 = 64 << 10;
/// How many replies one option may have: far more than there are kinds of information.
const MAX_REPLIES_PER_OPTION: u32 = 256;
/// Unused zeroes after the answer to EXPORT_NAME, unless both sides do without.
const EXPORT_NAME_ZEROES: usize = 124;
/// The largest minimum block size that the protocol allows (section "Block size constraints").
const MAX_MIN_BLOCK_BYTES: u32 = 64 << 10;
/// The smallest maximum that a server may set, unless the whole export is smaller (the same
/// section). Below it a read would become so many requests that it costs more to keep them than to
/// keep the data.
const LEAST_MAX_BLOCK_BYTES: u32 = 512;
/// Sizes above are negative as a file offset, so no server can mean them.
const MAX_EXPORT_BYTES: u64 = i64::MAX.unsigned_abs();

/// What to ask a server for.
#[derive(Clone, Debug)]
pub struct HandshakeConfig {
    /// The export's name; empty for the default export.
    pub export: String,
    /// Ask for structured replies.
    pub structured: bool,
    /// Ask for `base:allocation`; needs structured replies.
    pub allocation: bool,
    /// Ask to speak frames (`docs/wire.md`) instead of NBD afterwards; needs structured replies.
    pub transport: bool,
    /// What is to be said first in frames, said with the question for them already; empty for
    /// nothing, at most [`wire::OPENING_BYTES`].
    pub opening: Vec<u8>,
}

impl HandshakeConfig {
    fn asks_for_contexts(&self) -> bool {
        self.allocation || self.transport
    }

    fn has_opening(&self) -> bool {
        self.transport && !self.opening.is_empty()
    }
}

/// Block size constraints, in bytes (section "Block size constraints").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it; a power of two up to 64 KiB.
    pub min: u32,
    /// What the server likes best.
    pub preferred: u32,
    /// The largest payload; a multiple of `min`, at most 32 MiB whatever the server said.
    pub max: u32,
}

impl BlockSizes {
    /// What a careful client assumes when the server says nothing.
    pub const DEFAULT: Self = Self {
        min: 512,
        preferred: 4096,
        max: wire::MAX_PAYLOAD_BYTES,
    };

    /// Checks what a server said.
    fn from_wire(min: u32, preferred: u32, max: u32) -> Result<Self, ClientError> {
        if !min.is_power_of_two() || min > MAX_MIN_BLOCK_BYTES || max < min {
            return Err(ClientError::violation(format!(
                "impossible block sizes: minimum {min}, preferred {preferred}, maximum {max}"
            )));
        }
        let max = max.min(wire::MAX_PAYLOAD_BYTES);
        Ok(Self {
            min,
            preferred: preferred.clamp(min, max),
            max: max - max % min,
        })
    }
}

/// What both sides agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export's size in bytes, at most `i64::MAX`.
    pub size_bytes: u64,
    /// Transmission flags, [`wire::export`].
    pub flags: u16,
    /// Block sizes: the server's, or careful ones.
    pub block_sizes: BlockSizes,
    /// Reads are answered in structured replies.
    pub structured: bool,
    /// The id of `base:allocation`, if the server has it.
    pub allocation_context: Option<u32>,
    /// Frames follow, and no NBD.
    pub transport: bool,
    /// The server has taken the opening: it is not to be sent again, and is answered first.
    pub opened: bool,
}

/// What [`Handshake::receive`] led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send what [`Handshake::take_output`] has, then receive again.
    More,
    /// Transmission begins with the next byte, in both directions.
    Done(Negotiated),
}

/// What comes next from the server.
#[derive(Clone, Copy, Debug)]
enum Awaiting {
    Greeting,
    Flags,
    ReplyHeader,
    ReplyPayload { code: u32, len: usize },
    ExportNameAnswer,
    Nothing,
}

/// The option that was sent last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    StructuredReply,
    MetaContext,
    Go,
}

impl Asked {
    fn number(self) -> u32 {
        match self {
            Self::StructuredReply => option::STRUCTURED_REPLY,
            Self::MetaContext => option::SET_META_CONTEXT,
            Self::Go => option::GO,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::StructuredReply => "NBD_OPT_STRUCTURED_REPLY",
            Self::MetaContext => "NBD_OPT_SET_META_CONTEXT",
            Self::Go => "NBD_OPT_GO",
        }
    }
}

/// A handshake in progress.
#[derive(Debug)]
pub struct Handshake {
    config: HandshakeConfig,
    awaiting: Awaiting,
    asked: Asked,
    /// Sent behind it, and not answered yet.
    behind: VecDeque<Asked>,
    at_once: bool,
    replies: u32,
    no_zeroes: bool,
    structured: bool,
    allocation_context: Option<u32>,
    transport: bool,
    opened: bool,
    export: Option<(u64, u16)>,
    block_sizes: Option<BlockSizes>,
    output: Vec<u8>,
}

impl Handshake {
    /// A handshake before its first byte. Fails if the export's name is too long for the wire.
    ///
    /// # Panics
    /// If the opening is longer than [`wire::OPENING_BYTES`].
    pub fn new(config: HandshakeConfig) -> Result<Self, ClientError> {
        if config.export.len() > MAX_STRING_BYTES {
            return Err(ClientError::NameTooLong(config.export.len()));
        }
        assert!(
            config.opening.len() <= wire::OPENING_BYTES,
            "an opening is short"
        );
        Ok(Self {
            config,
            awaiting: Awaiting::Greeting,
            asked: Asked::Go,
            behind: VecDeque::new(),
            at_once: false,
            replies: 0,
            no_zeroes: false,
            structured: false,
            allocation_context: None,
            transport: false,
            opened: false,
            export: None,
            block_sizes: None,
            output: Vec::new(),
        })
    }

    /// The same, with flags and all options in one go, before the server has greeted: as far as
    /// [`Handshake::new`] would get with a server of fixed newstyle that grants everything or says of
    /// what it lacks that it is not supported. With others it fails with [`ClientError::AtOnce`], or by
    /// the server's hanging up, and [`Handshake::new`] may get further over another connection.
    ///
    /// That is harmless whoever listens: a server of fixed newstyle takes it when it has greeted;
    /// one that does not know options takes it for a request without its magic number, or for flags
    /// that it does not know, and hangs up. Nothing secret is in it.
    pub fn at_once(config: HandshakeConfig) -> Result<Self, ClientError> {
        let mut this = Self {
            at_once: true,
            ..Self::new(config)?
        };
        // Whoever takes options as they come offers this flag. The other one is for the answer to
        // EXPORT_NAME alone, and is not worth being turned away by a server that does not offer it.
        this.output
            .extend_from_slice(&wire::handshake::C_FIXED_NEWSTYLE.to_be_bytes());
        let mut options = vec![Asked::Go];
        if this.config.structured {
            options.insert(0, Asked::StructuredReply);
            if this.config.asks_for_contexts() {
                options.insert(1, Asked::MetaContext);
            }
        }
        for asked in options {
            this.send(asked);
            this.behind.push_back(asked);
        }
        Ok(this)
    }

    /// Whether the server has begun to speak.
    pub fn is_greeted(&self) -> bool {
        !matches!(self.awaiting, Awaiting::Greeting)
    }

    /// How many bytes to receive next; 0 only after [`Progress::Done`]. Never above 64 KiB.
    pub fn needed(&self) -> usize {
        match self.awaiting {
            Awaiting::Greeting => 16,
            Awaiting::Flags => 2,
            Awaiting::ReplyHeader => 20,
            Awaiting::ReplyPayload { len, .. } => len,
            Awaiting::ExportNameAnswer if self.no_zeroes => 10,
            Awaiting::ExportNameAnswer => 10 + EXPORT_NAME_ZEROES,
            Awaiting::Nothing => 0,
        }
    }

    /// What is to be sent now; empty if nothing.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes exactly the bytes that [`Self::needed`] asked for.
    ///
    /// # Panics
    /// If the caller hands in another number of bytes.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Progress, ClientError> {
        assert_eq!(bytes.len(), self.needed(), "receive exactly what is needed");
        let short = || ClientError::violation("a message is too short");
        match self.awaiting {
            Awaiting::Greeting => {
                let magic = be_u64(bytes, 0).ok_or_else(short)?;
                let style = be_u64(bytes, 8).ok_or_else(short)?;
                self.on_greeting(magic, style)
            }
            Awaiting::Flags => {
                let flags = be_u16(bytes, 0).ok_or_else(short)?;
                self.on_flags(flags)
            }
            Awaiting::ReplyHeader => self.on_reply_header(bytes),
            Awaiting::ReplyPayload { code, .. } => self.on_reply(code, bytes),
            Awaiting::ExportNameAnswer => {
                let size = be_u64(bytes, 0).ok_or_else(short)?;
                let flags = be_u16(bytes, 8).ok_or_else(short)?;
                self.export = Some((size, flags));
                self.finish()
            }
            Awaiting::Nothing => Err(ClientError::violation("bytes after the handshake")),
        }
    }

    fn on_greeting(&mut self, magic: u64, style: u64) -> Result<Progress, ClientError> {
        if magic != INIT_MAGIC {
            return Err(ClientError::NotNbd(magic));
        }
        match style {
            OPTION_MAGIC => {
                self.awaiting = Awaiting::Flags;
                Ok(Progress::More)
            }
            OLDSTYLE_MAGIC => Err(ClientError::Oldstyle),
            other => Err(ClientError::NotNbd(other)),
        }
    }

    fn on_flags(&mut self, flags: u16) -> Result<Progress, ClientError> {
        let fixed = flags & wire::handshake::FIXED_NEWSTYLE != 0;
        if self.at_once {
            // Such a server knows no option but EXPORT_NAME and answers no other.
            let first = self.behind.pop_front().filter(|_| fixed);
            self.wait_for(first.ok_or(ClientError::AtOnce("the options"))?);
            return Ok(Progress::More);
        }
        self.no_zeroes = flags & wire::handshake::NO_ZEROES != 0;
        let mut answer = 0;
        if fixed {
            answer |= wire::handshake::C_FIXED_NEWSTYLE;
        }
        if self.no_zeroes {
            answer |= wire::handshake::C_NO_ZEROES;
        }
        self.output.extend_from_slice(&answer.to_be_bytes());
        if !fixed {
            self.ask_export_name();
        } else if self.config.structured {
            self.ask(Asked::StructuredReply);
        } else {
            self.ask(Asked::Go);
        }
        Ok(Progress::More)
    }

    /// Queues an option and waits for its reply.
    fn ask(&mut self, asked: Asked) {
        self.send(asked);
        self.wait_for(asked);
    }

    /// Waits for the reply to what was sent already, or else asks `next`.
    fn go_on_with(&mut self, next: Asked) {
        match self.behind.pop_front() {
            Some(sent) => self.wait_for(sent),
            None => self.ask(next),
        }
    }

    fn wait_for(&mut self, asked: Asked) {
        self.asked = asked;
        self.replies = 0;
        self.awaiting = Awaiting::ReplyHeader;
    }

    fn send(&mut self, asked: Asked) {
        let name = self.config.export.as_bytes();
        let mut payload = Vec::new();
        match asked {
            Asked::StructuredReply => {}
            Asked::MetaContext => {
                put_string(&mut payload, name);
                let opening = wire::opening_query(&self.config.opening);
                let wanted = [
                    (self.config.allocation, BASE_ALLOCATION),
                    (self.config.transport, TRANSPORT),
                    (self.config.has_opening(), &opening),
                ];
                let wanted = || wanted.iter().filter(|(wanted, _)| *wanted);
                let count = u32::try_from(wanted().count()).expect("at most three");
                payload.extend_from_slice(&count.to_be_bytes());
                for (_, context) in wanted() {
                    put_string(&mut payload, context.as_bytes());
                }
            }
            Asked::Go => {
                put_string(&mut payload, name);
                payload.extend_from_slice(&1u16.to_be_bytes());
                payload.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
            }
        }
        put_option(&mut self.output, asked.number(), &payload);
    }

    fn ask_export_name(&mut self) {
        put_option(
            &mut self.output,
            option::EXPORT_NAME,
            self.config.export.as_bytes(),
        );
        // Only GO leads to frames: a server that does not know it is none of ours.
        self.transport = false;
        self.opened = false;
        self.awaiting = Awaiting::ExportNameAnswer;
    }

    fn on_reply_header(&mut self, bytes: &[u8]) -> Result<Progress, ClientError> {
        let fields = (be_u64(bytes, 0), be_u32(bytes, 8), be_u32(bytes, 12));
        let (Some(magic), Some(answered), Some(code)) = fields else {
            return Err(ClientError::violation("a message is too short"));
        };
        let len = be_u32(bytes, 16).unwrap_or(u32::MAX);
        if magic != OPTION_REPLY_MAGIC {
            return Err(ClientError::violation(format!(
                "an option reply begins with {magic:#018x}"
            )));
        }
        if answered != self.asked.number() {
            return Err(ClientError::violation(format!(
                "a reply to option {answered} while {} was asked",
                self.asked.name()
            )));
        }
        self.replies += 1;
        if len > MAX_OPTION_REPLY_BYTES || self.replies > MAX_REPLIES_PER_OPTION {
            return Err(ClientError::violation(format!(
                "reply {} to {} has {len} bytes",
                self.replies,
                self.asked.name()
            )));
        }
        match usize::try_from(len) {
            Ok(0) => self.on_reply(code, &[]),
            Ok(len) => {
                self.awaiting = Awaiting::ReplyPayload { code, len };
                Ok(Progress::More)
            }
            Err(_) => Err(ClientError::violation("a length beyond this machine")),
        }
    }

    fn on_reply(&mut self, code: u32, payload: &[u8]) -> Result<Progress, ClientError> {
        self.awaiting = Awaiting::ReplyHeader;
        if code & reply::ERROR_BIT != 0 {
            return self.on_refusal(code, payload);
        }
        match (self.asked, code) {
            (Asked::StructuredReply, reply::ACK) => {
                self.structured = true;
                self.go_on_with(if self.config.asks_for_contexts() {
                    Asked::MetaContext
                } else {
                    Asked::Go
                });
            }
            (Asked::MetaContext, reply::META_CONTEXT) => self.on_context(payload)?,
            // It had to be refused: nobody knows what the server means by it.
            (Asked::MetaContext, reply::ACK) if !self.structured => {
                return Err(ClientError::AtOnce(self.asked.name()));
            }
            (Asked::MetaContext, reply::ACK) => self.go_on_with(Asked::Go),
            (Asked::Go, reply::INFO) => self.on_info(payload)?,
            (Asked::Go, reply::ACK) => return self.finish(),
            _ => {
                return Err(ClientError::violation(format!(
                    "reply {code:#x} to {}",
                    self.asked.name()
                )));
            }
        }
        Ok(Progress::More)
    }

    /// An option was refused: do without it, or say why that is impossible.
    fn on_refusal(&mut self, code: u32, payload: &[u8]) -> Result<Progress, ClientError> {
        let message = shown(payload);
        match (self.asked, code) {
            (_, reply::ERR_TLS_REQD) => Err(ClientError::TlsRequired),
            (_, reply::ERR_SHUTDOWN) => Err(ClientError::OptionRefused {
                option: self.asked.name(),
                code,
                message: ": it is shutting down".to_owned(),
            }),
            (Asked::StructuredReply | Asked::MetaContext, _) => {
                // A failed SET_META_CONTEXT leaves no context selected, whatever was sent before.
                self.allocation_context = None;
                self.transport = false;
                self.opened = false;
                // It may have failed for the name it does not know: a server should pass over it,
                // and one that does not must not cost us what it does know.
                let once_more = self.asked == Asked::MetaContext
                    && std::mem::take(&mut self.config.transport)
                    && self.config.allocation
                    && self.structured
                    && code != reply::ERR_UNSUP;
                if once_more && !self.behind.is_empty() {
                    return Err(ClientError::AtOnce(self.asked.name()));
                }
                self.go_on_with(if once_more {
                    Asked::MetaContext
                } else {
                    Asked::Go
                });
                Ok(Progress::More)
            }
            (Asked::Go, reply::ERR_UNSUP) => {
                self.ask_export_name();
                Ok(Progress::More)
            }
            (Asked::Go, reply::ERR_UNKNOWN) => Err(ClientError::UnknownExport {
                name: self.config.export.clone(),
                message,
            }),
            (Asked::Go, _) => Err(ClientError::OptionRefused {
                option: self.asked.name(),
                code,
                message,
            }),
        }
    }

    fn on_context(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        let (Some(id), Some(name)) = (be_u32(payload, 0), payload.get(4..)) else {
            return Err(ClientError::violation("a metadata context without an id"));
        };
        if self.config.transport && name == TRANSPORT.as_bytes() {
            self.transport = true;
            return Ok(());
        }
        if self.config.has_opening() && name == OPENING.as_bytes() {
            self.opened = true;
            return Ok(());
        }
        if !self.config.allocation || name != BASE_ALLOCATION.as_bytes() {
            return Err(ClientError::violation(format!(
                "a metadata context nobody asked for{}",
                shown(name)
            )));
        }
        if self.allocation_context.replace(id).is_some() {
            return Err(ClientError::violation("base:allocation has two ids"));
        }
        Ok(())
    }

    fn on_info(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        let malformed = || ClientError::violation("malformed information about the export");
        match be_u16(payload, 0).ok_or_else(malformed)? {
            info::EXPORT => {
                let size = be_u64(payload, 2).ok_or_else(malformed)?;
                let flags = be_u16(payload, 10).ok_or_else(malformed)?;
                if payload.len() != 12 || self.export.replace((size, flags)).is_some() {
                    return Err(malformed());
                }
            }
            info::BLOCK_SIZE => {
                let min = be_u32(payload, 2).ok_or_else(malformed)?;
                let preferred = be_u32(payload, 6).ok_or_else(malformed)?;
                let max = be_u32(payload, 10).ok_or_else(malformed)?;
                let sizes = BlockSizes::from_wire(min, preferred, max)?;
                if payload.len() != 14 || self.block_sizes.replace(sizes).is_some() {
                    return Err(malformed());
                }
            }
            // Names, descriptions and whatever is invented later.
            _ => {}
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Progress, ClientError> {
        let Some((size_bytes, flags)) = self.export else {
            return Err(ClientError::violation(
                "the export was granted without telling its size",
            ));
        };
        if size_bytes > MAX_EXPORT_BYTES {
            return Err(ClientError::violation(format!(
                "an export of {size_bytes} bytes"
            )));
        }
        if flags & wire::export::HAS_FLAGS == 0 {
            return Err(ClientError::violation(
                "transmission flags without HAS_FLAGS",
            ));
        }
        let block_sizes = self.block_sizes.unwrap_or(BlockSizes::DEFAULT);
        let max = block_sizes.max;
        if max < LEAST_MAX_BLOCK_BYTES && u64::from(max) < size_bytes {
            return Err(ClientError::violation(format!(
                "requests of at most {max} bytes"
            )));
        }
        if self.opened && !self.transport {
            return Err(ClientError::violation(
                "it has taken what is to be said in frames, and speaks none",
            ));
        }
        self.awaiting = Awaiting::Nothing;
        Ok(Progress::Done(Negotiated {
            size_bytes,
            flags,
            block_sizes,
            structured: self.structured,
            allocation_context: self.allocation_context,
            transport: self.transport,
            opened: self.opened,
        }))
    }
}

fn put_option(output: &mut Vec<u8>, number: u32, payload: &[u8]) {
    output.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    output.extend_from_slice(&number.to_be_bytes());
    put_string(output, payload);
}

/// A length of 32 bits, then the bytes.
fn put_string(output: &mut Vec<u8>, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("names are at most 4096 bytes");
    output.extend_from_slice(&len.to_be_bytes());
    output.extend_from_slice(bytes);
}
