//! The [`Source`] trait and what crosses it.

use std::fmt;
use std::sync::Arc;

use hikkoshi_engine::mover::PathSeen;

use crate::nbd_source::Coding;
use crate::transport::message::{Hash, hashes_of};

/// What is known of a source once it has been reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceInfo {
    /// Size in bytes.
    pub size_bytes: u64,
    /// It refuses writes from us; says nothing of writes by others.
    pub read_only: bool,
    /// It promises that several connections see one coherent disk.
    pub can_multi_conn: bool,
    /// It tells holes and zeroes (`base:allocation`).
    pub has_extents: bool,
    /// It can be asked to make durable what was written to it.
    pub can_flush: bool,
    /// The smallest request it serves, in bytes.
    pub min_block_bytes: u32,
    /// The largest read it serves, in bytes.
    pub max_read_bytes: u32,
    /// Address and export, as given, for people and for the recorded identity.
    pub uri: String,
}

impl SourceInfo {
    /// Whether the source that was as `before` may be back as this. Its manners may change while
    /// it is away (another program serves the same disk, or serves it read-only); its size may not.
    pub fn may_succeed(&self, before: &Self) -> bool {
        self.size_bytes == before.size_bytes
    }
}

/// How urgent a request is, the most urgent first. Demand never waits behind what nobody waits for.
/// Frames tell the source; with a plain NBD server only the order in which it is asked is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// A guest waits for it.
    Demand,
    /// The rest of a block that a guest has written in part.
    Rest,
    /// A guest will probably read it next.
    Ahead,
    /// It is read often; questions by which the copy gets on.
    Hot,
    /// The background copy.
    Bulk,
    /// It is likely to be overwritten before anyone reads it.
    Late,
}

impl Lane {
    /// How many there are.
    pub(crate) const COUNT: usize = Self::Late as usize + 1;

    /// Whether it may use what is kept free for demand. There is little of it at a time.
    pub fn is_urgent(self) -> bool {
        matches!(self, Self::Demand | Self::Rest)
    }
}

/// What a read brought.
#[derive(Debug)]
pub struct Fetched {
    /// The offset that was asked for, in bytes.
    pub offset: u64,
    /// All bytes that were asked for; holes are filled with zeroes.
    pub data: Vec<u8>,
    /// Runs (absolute offset, length) that the source said are holes, in order.
    pub holes: Vec<(u64, u64)>,
    /// Bytes that crossed the link for it, headers included.
    pub wire_bytes: u64,
}

/// A run of bytes at the source, of one allocation state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceExtent {
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes, above zero.
    pub len: u64,
    /// It reads as zeroes.
    pub zero: bool,
}

/// The answer to a question for extents: in order, gapless, from the offset asked for; it may end
/// before the length asked for (then ask again from there), never after it.
#[derive(Debug)]
pub struct ExtentsAnswer {
    /// The extents, at least one.
    pub extents: Vec<SourceExtent>,
    /// Bytes that crossed the link for it.
    pub wire_bytes: u64,
}

/// The hashes of a range at the source.
#[derive(Debug, PartialEq, Eq)]
pub struct Hashes {
    /// The offset that was asked for, in bytes.
    pub offset: u64,
    /// Bytes of a grain.
    pub grain: u32,
    /// The hash of each grain (BLAKE3); the last grain may be short.
    pub hashes: Vec<Hash>,
    /// They were made there; else the data crossed the link and was hashed here.
    pub at_source: bool,
    /// Bytes that crossed the link for it.
    pub wire_bytes: u64,
}

/// What went wrong, as far as the caller must tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceErrorKind {
    /// The connection is gone. The request may be asked again once the source is back.
    Disconnected,
    /// The source answered with an error for this range (its medium failed, say).
    Refused,
    /// The source broke the protocol, or is not the disk it was. Nothing of it is to be believed.
    Untrusted,
    /// [`Source::cancel`] took it back.
    Cancelled,
}

/// Why a request to the source failed.
#[derive(Clone, Debug)]
pub struct SourceError {
    /// The kind to match on.
    pub kind: SourceErrorKind,
    /// What was tried and what happened, for people.
    pub message: Arc<str>,
    /// Of a read whose connection was lost: what had come of it from its beginning on, each piece with
    /// its checksum. It is what the source had when it was asked.
    pub come: Option<Arc<Fetched>>,
}

impl SourceError {
    /// An error of `kind`, told by `message`.
    pub fn new(kind: SourceErrorKind, message: impl Into<Arc<str>>) -> Self {
        Self {
            kind,
            message: message.into(),
            come: None,
        }
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SourceError {}

/// Hashes of what is read from `source`.
pub(crate) fn hash_by_reading<S: Source + ?Sized>(
    source: &S,
    lane: Lane,
    offset: u64,
    len: u32,
    grain: u32,
    done: Completion<Hashes>,
) {
    let hash = move |read: Result<Fetched, SourceError>| {
        done(read.map(|fetched| Hashes {
            offset,
            grain,
            hashes: hashes_of(&fetched.data, grain),
            at_source: false,
            wire_bytes: fetched.wire_bytes,
        }));
    };
    source.read(lane, offset, len, Box::new(hash));
}

/// Called exactly once with the outcome of a request.
pub type Completion<T> = Box<dyn FnOnce(Result<T, SourceError>) + Send>;

/// Told of what happens to the connection as a whole. Called on a thread of the source, without
/// any lock of the source held, so that it may submit requests.
pub trait SourceWatcher: Send + Sync {
    /// The first connection stands (again) and requests will be answered.
    fn source_up(&self);
    /// The last connection is gone; the source tries again by itself.
    fn source_down(&self, error: &SourceError);
}

/// A disk elsewhere that can be read.
///
/// Requests never wait: they are sent or queued, and `done` is called exactly once, on a thread of
/// the source, never before `submit` returned to a caller on that same thread's stack. While the
/// source is unreachable, requests fail at once with [`SourceErrorKind::Disconnected`].
pub trait Source: Send + Sync + 'static {
    /// What is known of it.
    fn info(&self) -> SourceInfo;

    /// Whether a connection stands now.
    fn is_connected(&self) -> bool;

    /// How many connections stand now.
    fn connections(&self) -> usize;

    /// Reads `len` bytes at `offset`.
    fn read(&self, lane: Lane, offset: u64, len: u32, done: Completion<Fetched>);

    /// Asks for extents of at most `len` bytes from `offset` on.
    fn extents(&self, lane: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>);

    /// Asks for the hash of each grain (a power of two of bytes) of `len` bytes at `offset`. Where
    /// the source cannot hash, the data is read and hashed here.
    fn hashes(&self, lane: Lane, offset: u64, len: u32, grain: u32, done: Completion<Hashes>) {
        hash_by_reading(self, lane, offset, len, grain, done);
    }

    /// Asks it to make durable whatever was written to it, by whom ever, and answered. Where it
    /// cannot be asked ([`SourceInfo::can_flush`]) it succeeds: nothing more can be done.
    fn flush(&self, done: Completion<()>);

    /// A guest waits for `len` bytes at `offset` now: reads of these in the bulk lane are as urgent
    /// as demand from here on, as far as the source can still be told.
    fn promote(&self, offset: u64, len: u64) {
        let _ = (offset, len);
    }

    /// Reads of `lane` that lie within `len` bytes at `offset` are wanted no more. As far as they can still
    /// be taken back they fail with [`SourceErrorKind::Cancelled`]; others are answered all the same.
    fn cancel(&self, lane: Lane, offset: u64, len: u64) {
        let _ = (lane, offset, len);
    }

    /// Time has passed. To be called every 20 milliseconds or so.
    fn tick(&self) {}

    /// How the path to it is, where demand stands behind nothing that is asked for: it has a connection of its own, or frames
    /// are spoken. `None` where that is not known, or nothing is under way. Over frames no queue is
    /// looked for: what waits, waits at the source.
    fn path(&self) -> Option<PathSeen> {
        None
    }

    /// Bytes that were asked for and, being cancelled, not sent.
    fn cancelled_bytes(&self) -> u64 {
        0
    }

    /// How data came lately; `None` while nothing has, and where frames are not spoken.
    fn coding(&self) -> Option<Coding> {
        None
    }

    /// Whether frames of ours are spoken with it now: hashes are made there, and what crosses the
    /// link has checksums.
    fn speaks_frames(&self) -> bool {
        false
    }

    /// How often bytes were found to be changed on their way.
    fn checksum_failures(&self) -> u64 {
        0
    }

    /// Sets who is told of connection changes.
    fn watch(&self, watcher: Arc<dyn SourceWatcher>);

    /// Closes every connection politely. Outstanding requests fail as disconnected; the source
    /// does not come back.
    fn close(&self);
}
