//! Numbers on the wire: magics, options, flags, commands, error codes.
//!
//! Values are those of the protocol document, section "Values".

/// `NBDMAGIC`, the first eight bytes a server sends.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, in the greeting and before every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Bytes in what a server sends first: [`INIT_MAGIC`], [`OPTION_MAGIC`], its handshake flags.
pub const GREETING_BYTES: usize = 18;
/// Bytes in the client's handshake flags.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes before the data of an option.
pub const OPTION_BYTES: usize = 16;
/// Bytes before the data of a reply to an option.
pub const OPTION_REPLY_BYTES: usize = 20;
/// Zero bytes after the answer to EXPORT_NAME, unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Bytes in a request header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes in a simple reply header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes in the header of a structured reply chunk.
pub const CHUNK_BYTES: usize = 20;

/// The longest string that is allowed on the wire (section "Values"): names, descriptions.
pub const MAX_STRING_BYTES: usize = 4096;
/// The largest payload a side must accept unless it advertised otherwise.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// The default port.
pub const DEFAULT_PORT: u16 = 10809;

/// Handshake flags (server, then client).
pub mod handshake {
    /// The server speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zero bytes after EXPORT_NAME may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
    /// The client speaks fixed newstyle.
    pub const C_FIXED_NEWSTYLE: u32 = 1 << 0;
    /// The client wants no 124 zero bytes.
    pub const C_NO_ZEROES: u32 = 1 << 1;
}

/// Options a client can send in the handshake.
pub mod option {
    /// Ends the handshake with the old form of choosing an export.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the handshake without an export.
    pub const ABORT: u32 = 2;
    /// Asks for the names of the exports.
    pub const LIST: u32 = 3;
    /// Asks for TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks about an export.
    pub const INFO: u32 = 6;
    /// Asks about an export and begins transmission.
    pub const GO: u32 = 7;
    /// Asks for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Asks which metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Asks for extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export, in answer to LIST.
    pub const SERVER: u32 = 2;
    /// A piece of information, in answer to INFO or GO.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error reply.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The option is forbidden.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// The option is malformed.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// The option is not supported on this platform.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS is needed first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
}

/// Kinds of information in answer to INFO and GO.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium rotates.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one coherent disk; FLUSH covers all of them.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// RESIZE is understood.
    pub const SEND_RESIZE: u16 = 1 << 9;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Requests.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the data follows.
    pub const WRITE: u16 = 1;
    /// Disconnect; no reply.
    pub const DISC: u16 = 2;
    /// All that was completed is made durable.
    pub const FLUSH: u16 = 3;
    /// The contents are no longer needed.
    pub const TRIM: u16 = 4;
    /// Fetch what will be needed.
    pub const CACHE: u16 = 5;
    /// Write zeroes, without sending them.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe extents.
    pub const BLOCK_STATUS: u16 = 7;
    /// Change the size.
    pub const RESIZE: u16 = 8;
}

/// Flags of a request.
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: allocate, leave no hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one chunk, or an error.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fast or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The payload length form of extended headers.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Structured replies.
pub mod chunk {
    /// Flag: the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing more to say.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of a hole.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Set in every error chunk.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// An error for the whole request.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// Status flags of `base:allocation`.
pub mod allocation {
    /// Nothing is allocated here.
    pub const HOLE: u32 = 1 << 0;
    /// Reads give zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Values of `x-hikkoshi:residency`.
pub mod residency {
    /// Only the source has it (or part of it).
    pub const ABSENT: u32 = 0;
    /// Copied from the source, equal to it.
    pub const CLEAN: u32 = 1;
    /// Written, zeroed or trimmed here.
    pub const OWNED: u32 = 2;
}

/// The name of the context that tells holes and zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The name of the context that tells what is here already.
pub const RESIDENCY: &str = "x-hikkoshi:residency";
/// The name under which the frames of `docs/wire.md` are agreed on. It is chosen like a metadata
/// context, because whoever does not know a context passes over it, but it is none: it is never
/// listed, and whoever is granted it speaks no NBD once GO is answered.
pub const TRANSPORT: &str = "x-hikkoshi:transport-5";
/// The name that stands for what a client has to say first in frames, if they are granted. In the
/// question what it says follows, behind a colon, in hexadecimal digits: so it needs no round trip of
/// its own, and whoever does not know it passes over it. Never listed.
pub const OPENING: &str = "x-hikkoshi:opening-5";
/// The longest that it may be, in bytes: a frame or two, and within [`MAX_STRING_BYTES`] in hexadecimal.
pub const OPENING_BYTES: usize = 1024;

/// How a client asks that `opening` is taken as what it says first.
pub fn opening_query(opening: &[u8]) -> String {
    let mut query = format!("{OPENING}:");
    for byte in opening {
        for digit in [byte >> 4, byte & 15] {
            query.extend(char::from_digit(digit.into(), 16));
        }
    }
    query
}

/// What a client has to say first, if that is what `query` asks for, and it makes sense.
pub fn opening_of(query: &[u8]) -> Option<Vec<u8>> {
    let digits = query.strip_prefix(OPENING.as_bytes())?.strip_prefix(b":")?;
    let fits =
        !digits.is_empty() && digits.len().is_multiple_of(2) && digits.len() <= 2 * OPENING_BYTES;
    if !fits {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16);
    let byte = |pair: &[u8]| u8::try_from(value(pair[0])? << 4 | value(pair[1])?).ok();
    digits.chunks_exact(2).map(byte).collect()
}

/// The error codes that may cross the wire (section "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted: the export is read-only.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left.
    NoSpc = 28,
    /// Value too large.
    Overflow = 75,
    /// Not supported (only for FAST_ZERO).
    NotSup = 95,
    /// The server is shutting down.
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// The error a code stands for; unknown codes count as [`Errno::Inval`], as the protocol says.
    pub fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpc,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }

    /// The error that a failed system call becomes on the wire: EDQUOT and EFBIG become ENOSPC,
    /// EROFS becomes EPERM, whatever has no code becomes EIO.
    pub fn from_raw_os_error(raw: i32) -> Self {
        match raw {
            1 | 13 | 30 => Self::Perm,
            12 => Self::NoMem,
            22 => Self::Inval,
            27 | 28 | 122 => Self::NoSpc,
            _ => Self::Io,
        }
    }
}
