//! An NBD server as a source; over frames where it knows them, over plain NBD else.
//!
//! Owns several connections to one export, each with a thread that receives and answers, and a
//! thread for news that no connection can bring. Every connection that is lost is dialled again,
//! and must lead to the same disk. The volume submits and is called back; no lock is held then.
//!
//! What is the same in both dialects is in `dial`, `keeper`, `shared`, `line`, `replies` and
//! `receive`; requests are written by `job`, replies are read by `reader` (NBD) and `frames`.

mod address;
mod attach;
#[cfg(test)]
mod attach_tests;
mod bare;
#[cfg(test)]
mod cancel_tests;
mod choice;
mod coding;
mod dial;
#[cfg(test)]
mod flush_tests;
mod frames;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod herald;
mod job;
mod keeper;
#[cfg(test)]
mod level_tests;
mod line;
mod reader;
mod receive;
mod replies;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod script;
mod shared;
mod wire;

use std::cell::Cell;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use hikkoshi_engine::mover::PathSeen;

pub use address::{Address, MAX_CONNECTIONS, MAX_IN_FLIGHT, NbdSourceConfig};
pub use attach::{MoveLine, MoveLink, Ticket};
pub use bare::{BareConnection, Undone};
pub use coding::Coding;
pub use wire::Wire;

use self::herald::News;
use self::job::Job;
use self::shared::Shared;
use crate::source::{
    Completion, ExtentsAnswer, Fetched, Hashes, Lane, Source, SourceError, SourceErrorKind,
    SourceExtent, SourceInfo, SourceWatcher, hash_by_reading,
};
use crate::transport::{limits, message};

/// How long closing waits for threads to end. Only the lookup of a host name or a completion that
/// takes its time can make it wait; what is left then ends by itself.
const CLOSE_WAIT: Duration = Duration::from_secs(2);
/// The longest read that is split for the server's sake, in bytes; longer ones are refused.
pub const MAX_SPLIT_READ_BYTES: u32 = 256 << 20;

thread_local! {
    /// The id of the source whose thread this is; 0 if none.
    static SOURCE_THREAD: Cell<u64> = const { Cell::new(0) };
}

/// An export of an NBD server, read over several connections.
pub struct NbdSource {
    shared: Arc<Shared>,
}

impl NbdSource {
    /// Connects; fails if no connection stands. All are dialled at once where several are allowed
    /// whatever the server promises, and with them one for what there is to say of the move.
    pub fn connect(config: NbdSourceConfig) -> Result<Arc<Self>, SourceError> {
        let source = Self::start(config.clamped(), None)?;
        // Dropped after a failure, it ends what was started.
        source.shared.wait_until_open()?;
        Ok(source)
    }

    /// Returns at once and connects in the background, to a disk that is as `expected` says
    /// (size, read-only, extents); the watcher hears when it stands.
    pub fn connect_lazily(
        config: NbdSourceConfig,
        expected: SourceInfo,
    ) -> Result<Arc<Self>, SourceError> {
        let config = config.clamped();
        let sane = expected.min_block_bytes.is_power_of_two()
            && expected.max_read_bytes >= expected.min_block_bytes;
        if !sane {
            return Err(SourceError::new(
                SourceErrorKind::Refused,
                "the expected block sizes are impossible",
            ));
        }
        let uri = config.shown_uri();
        Self::start(config, Some(SourceInfo { uri, ..expected }))
    }

    fn start(
        config: NbdSourceConfig,
        expected: Option<SourceInfo>,
    ) -> Result<Arc<Self>, SourceError> {
        let no_thread = |error: std::io::Error| {
            let message = format!("cannot start a thread for the source: {error}");
            SourceError::new(SourceErrorKind::Disconnected, message)
        };
        let id = Shared::fresh_id();
        let watcher = Arc::new(Mutex::new(None));
        let herald = herald::start(Arc::clone(&watcher), move || SOURCE_THREAD.set(id))
            .map_err(no_thread)?;
        let connections = config.connections;
        let opening = expected.is_none();
        let at_once = if !opening {
            0
        } else if !config.several_without_promise {
            1
        } else {
            let ticket = config.ticket.as_ref();
            let talks = ticket.filter(|_| config.frames && connections > 1);
            if let Some(ticket) = talks {
                ticket.expect_spare();
            }
            connections + usize::from(talks.is_some())
        };
        let shared = Shared::new(config, expected, watcher, herald, id);
        shared.begin_opening(at_once);
        // From here on, dropping ends what was started.
        let source = Arc::new(Self {
            shared: Arc::clone(&shared),
        });
        for number in 0..at_once.max(connections) {
            let keeper = Arc::clone(&shared);
            keeper.thread_begins();
            let spawned = thread::Builder::new()
                .name(format!("source-{number}"))
                .spawn(move || {
                    SOURCE_THREAD.set(id);
                    keeper::keep(&keeper, number, number < at_once);
                    keeper.thread_ends();
                });
            if let Err(error) = spawned {
                shared.thread_ends();
                return Err(no_thread(error));
            }
        }
        Ok(source)
    }

    fn submit_read(&self, lane: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        let info = self.shared.info();
        if let Err(error) = check(&info, offset, u64::from(len)) {
            return self.answer(move || done(Err(error)));
        }
        if len == 0 {
            let nothing = Fetched {
                offset,
                data: Vec::new(),
                holes: Vec::new(),
                wire_bytes: 0,
            };
            return self.answer(move || done(Ok(nothing)));
        }
        if len > MAX_SPLIT_READ_BYTES {
            let error = SourceError::new(
                SourceErrorKind::Refused,
                format!("a read of {len} bytes; the limit is {MAX_SPLIT_READ_BYTES}"),
            );
            return self.answer(move || done(Err(error)));
        }
        let limits = (info.min_block_bytes, info.max_read_bytes, info.size_bytes);
        for job in Job::reads(lane, offset, len, limits, done) {
            self.shared.dispatch(job);
        }
    }

    fn submit_extents(&self, lane: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        let info = self.shared.info();
        if let Err(error) = check(&info, offset, len) {
            return self.answer(move || done(Err(error)));
        }
        if len == 0 {
            let error = SourceError::new(SourceErrorKind::Refused, "extents of nothing");
            return self.answer(move || done(Err(error)));
        }
        if !info.has_extents {
            let extents = vec![SourceExtent {
                offset,
                len,
                zero: false,
            }];
            return self.answer(move || {
                done(Ok(ExtentsAnswer {
                    extents,
                    wire_bytes: 0,
                }))
            });
        }
        let limits = (info.min_block_bytes, info.size_bytes);
        self.shared
            .dispatch(Job::status(lane, offset, len, limits, done));
    }

    fn submit_hashes(
        &self,
        lane: Lane,
        offset: u64,
        len: u32,
        grain: u32,
        done: Completion<Hashes>,
    ) {
        let in_frames = message::grain_fits(grain, len) && len <= limits::HASH_BYTES && len > 0;
        if !in_frames || !self.shared.speaks_frames() {
            return hash_by_reading(self, lane, offset, len, grain, done);
        }
        if let Err(error) = check(&self.shared.info(), offset, u64::from(len)) {
            return self.answer(move || done(Err(error)));
        }
        self.shared
            .dispatch(Job::hashes(lane, offset, len, grain, done));
    }

    fn submit_flush(&self, done: Completion<()>) {
        // Of one that was not reached yet nothing is known; it cannot be asked now either.
        if self.shared.serving() > 0 && !self.shared.info().can_flush {
            return self.answer(move || done(Ok(())));
        }
        self.shared.dispatch(Job::flush(done));
    }

    /// Runs `answer` on the herald's thread.
    fn answer(&self, answer: impl FnOnce() + Send + 'static) {
        self.shared.tell(News::Answer(Box::new(answer)));
    }
}

/// Whether a range is inside the disk.
fn check(info: &SourceInfo, offset: u64, len: u64) -> Result<(), SourceError> {
    match offset.checked_add(len) {
        Some(end) if end <= info.size_bytes => Ok(()),
        _ => Err(SourceError::new(
            SourceErrorKind::Refused,
            format!(
                "{len} bytes at {offset} reach past the end at {}",
                info.size_bytes
            ),
        )),
    }
}

impl Source for NbdSource {
    fn info(&self) -> SourceInfo {
        self.shared.info()
    }

    fn is_connected(&self) -> bool {
        self.connections() > 0
    }

    fn connections(&self) -> usize {
        self.shared.serving()
    }

    fn read(&self, lane: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        self.submit_read(lane, offset, len, done);
    }

    fn extents(&self, lane: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        self.submit_extents(lane, offset, len, done);
    }

    fn hashes(&self, lane: Lane, offset: u64, len: u32, grain: u32, done: Completion<Hashes>) {
        self.submit_hashes(lane, offset, len, grain, done);
    }

    fn flush(&self, done: Completion<()>) {
        self.submit_flush(done);
    }

    fn promote(&self, offset: u64, len: u64) {
        self.shared.promote(offset, len);
    }

    fn cancel(&self, lane: Lane, offset: u64, len: u64) {
        self.shared.cancel(lane, offset, len);
    }

    fn tick(&self) {
        self.shared.level();
    }

    fn path(&self) -> Option<PathSeen> {
        self.shared.path()
    }

    fn cancelled_bytes(&self) -> u64 {
        self.shared.cancelled_bytes()
    }

    fn coding(&self) -> Option<Coding> {
        self.shared.coding()
    }

    fn speaks_frames(&self) -> bool {
        self.shared.speaks_frames()
    }

    fn checksum_failures(&self) -> u64 {
        self.shared.checksum_failures()
    }

    fn watch(&self, watcher: Arc<dyn SourceWatcher>) {
        let mut slot = self
            .shared
            .watcher
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *slot = Some(watcher);
    }

    /// Waits until outstanding requests have failed, so hold no lock that completions take. On a
    /// thread of the source itself it does not wait. The watcher hears nothing of it.
    fn close(&self) {
        self.shared.close();
        let old = {
            let mut slot = self
                .shared
                .watcher
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            slot.take()
        };
        // Outside of the lock: the watcher may own things that do more when they go.
        drop(old);
        if SOURCE_THREAD.get() == self.shared.id {
            return;
        }
        self.shared.wait_for_threads(CLOSE_WAIT);
        let (sender, receiver) = channel();
        self.answer(move || {
            // Nobody waits any more, at worst.
            let _ = sender.send(());
        });
        // A completion that takes longer than this is its caller's affair.
        let _ = receiver.recv_timeout(CLOSE_WAIT);
    }
}

impl Drop for NbdSource {
    fn drop(&mut self) {
        self.close();
    }
}
