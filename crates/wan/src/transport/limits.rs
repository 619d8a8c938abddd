//! The bounds on everything that frames can make a side hold, read or send.

/// The most data that one frame carries, and the most that is read at a time: what demand may have
/// to wait behind. At 10 Mbit/s that is 52 ms, at 1 Gbit/s half of one.
pub const QUANTUM_BYTES: u32 = 64 << 10;

/// The most of what nobody waits for that a sender of ours puts into one frame. It goes whenever there is room for it
/// on the path, so the shorter it is the shorter may the queue be that keeps the path full; compressed in pieces
/// of half of this, a disk is a hundredth longer.
pub const BULK_BYTES: u32 = 32 << 10;

/// How much longer than what it was made of compressed data may be: what a stream puts around bytes
/// that do not compress.
pub const PACKED_EXTRA_BYTES: u32 = 1 << 10;

/// The longest range of one READ: what NBD lets every client ask for.
pub const READ_BYTES: u32 = 32 << 20;

/// The longest range of one question for extents: what the client asks a plain server for, too.
pub const EXTENTS_BYTES: u32 = 1 << 30;

/// The longest range of one question for hashes.
pub const HASH_BYTES: u32 = 32 << 20;

/// The shortest and the longest grain of hashes; a power of two between them. The longest is a
/// quantum, so that a hash never spans two.
pub const MIN_GRAIN_BYTES: u32 = 512;
/// See [`MIN_GRAIN_BYTES`].
pub const MAX_GRAIN_BYTES: u32 = QUANTUM_BYTES;

/// Hashes in one answer.
pub const HASHES: u32 = 4096;

/// Extents in one answer.
pub const EXTENTS: u32 = 4096;

/// Bytes of a hash (BLAKE3).
pub const HASH_LEN: u32 = 32;

/// Bytes of an extent on the wire.
pub const EXTENT_LEN: u32 = 8;

/// The longest text of an error, in bytes.
pub const ERROR_TEXT_BYTES: u32 = 256;

/// Requests of one connection that are asked and not answered. The server takes no more until it
/// has answered some.
pub const REQUESTS: usize = 256;

/// The longest message about a move.
pub const TELL_BYTES: u32 = 64;

/// The longest answer to one, all its frames together.
pub const TOLD_BYTES: usize = 32 << 20;

/// Runs of changed bytes in an answer: where there are more, neighbours are joined.
pub const TOLD_RANGES: usize = 64 << 10;

/// Older copies that an answer speaks of.
pub const TOLD_BASES: usize = 8;

/// Machines whose boots an answer tells of: the source, and those that it fetches from in turn.
pub const TOLD_BOOTS: usize = 4;

/// The longest payload of a request for something of the disk; only HASH has one.
pub const REQUEST_PAYLOAD_BYTES: u32 = 4;

/// The longest payload of a reply.
pub const REPLY_PAYLOAD_BYTES: u32 = HASHES * HASH_LEN;

const _: () = assert!(REPLY_PAYLOAD_BYTES >= QUANTUM_BYTES + PACKED_EXTRA_BYTES);
const _: () = assert!(REPLY_PAYLOAD_BYTES >= EXTENTS * EXTENT_LEN);
