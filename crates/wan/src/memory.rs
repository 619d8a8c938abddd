//! A source in memory, for tests that decide what is answered when.
//!
//! Owns a disk as bytes and the requests that were made of it; nothing is answered until the test
//! says so, in whatever order, with whatever outcome. There are no threads: completions run on
//! the caller of [`MemorySource::complete`] and its like, without any lock held, so that they may
//! submit again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::source::{
    Completion, ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind, SourceExtent,
    SourceInfo, SourceWatcher,
};

/// What a request header and a reply header cost on the wire, for counting.
const HEADERS_BYTES: u64 = 28 + 16;
/// The largest read that the memory source tells it serves.
const MAX_READ_BYTES: u32 = 32 << 20;

/// What a pending request asks for, as the test sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingRequest {
    /// Its queue.
    pub lane: Lane,
    /// Where from, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u64,
    /// A question for extents, not a read.
    pub extents: bool,
    /// A flush, of everything.
    pub flush: bool,
}

/// What was asked of a [`MemorySource`] so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCounters {
    /// Reads submitted.
    pub reads: u64,
    /// Questions for extents submitted.
    pub extents: u64,
    /// Bytes of reads that were completed successfully.
    pub read_bytes: u64,
    /// Flushes that were completed successfully.
    pub flushes: u64,
    /// Requests that were answered with an error.
    pub failed: u64,
}

enum Done {
    Read(Completion<Fetched>),
    Extents(Completion<ExtentsAnswer>),
    Flush(Completion<()>),
}

struct Pending {
    request: PendingRequest,
    done: Done,
    /// Decided at submission: the source was away, or the request makes no sense.
    doomed: Option<SourceErrorKind>,
}

struct State {
    data: Vec<u8>,
    read_only: bool,
    can_flush: bool,
    connected: bool,
    closed: bool,
    pending: VecDeque<Pending>,
    watcher: Option<Arc<dyn SourceWatcher>>,
    counters: MemoryCounters,
}

/// A disk in memory behind the [`Source`] seam.
pub struct MemorySource {
    granularity: Option<u64>,
    state: Mutex<State>,
}

impl MemorySource {
    /// A connected source of `data`, writable by others. With a `granularity` (bytes, above zero)
    /// it tells which runs of that size are zeroes; without, it has no extents.
    ///
    /// # Panics
    /// If the granularity is zero.
    pub fn new(data: Vec<u8>, granularity: Option<u32>) -> Arc<Self> {
        assert_ne!(granularity, Some(0), "a granularity of zero bytes");
        Arc::new(Self {
            granularity: granularity.map(u64::from),
            state: Mutex::new(State {
                data,
                read_only: false,
                can_flush: false,
                connected: true,
                closed: false,
                pending: VecDeque::new(),
                watcher: None,
                counters: MemoryCounters::default(),
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many requests wait for an answer.
    pub fn pending(&self) -> usize {
        self.state().pending.len()
    }

    /// The requests that wait, oldest first; positions are those of [`Self::complete`].
    pub fn requests(&self) -> Vec<PendingRequest> {
        self.state().pending.iter().map(|p| p.request).collect()
    }

    /// Answers request `index` with the disk's bytes of now. Requests behind it move up by one.
    /// One that was submitted while the source was away fails as disconnected all the same.
    ///
    /// # Panics
    /// If there is no such request.
    pub fn complete(&self, index: usize) {
        self.answer(index, None);
    }

    /// Fails request `index` with `kind`.
    ///
    /// # Panics
    /// If there is no such request.
    pub fn fail(&self, index: usize, kind: SourceErrorKind) {
        self.answer(index, Some(kind));
    }

    /// Completes requests, oldest first, until there are none: also those submitted meanwhile.
    pub fn complete_all(&self) {
        while self.answer_one(0, None) {}
    }

    /// Sets whether the export is read-only.
    pub fn set_read_only(&self, read_only: bool) {
        self.state().read_only = read_only;
    }

    /// Sets whether it can be asked to flush; at first it cannot.
    pub fn set_can_flush(&self, can_flush: bool) {
        self.state().can_flush = can_flush;
    }

    /// Connects or disconnects. On a disconnect every pending request fails as disconnected, then
    /// the watcher is told; on a connect the watcher is told. No change, no call.
    pub fn set_connected(&self, connected: bool) {
        let (orphans, watcher) = {
            let mut state = self.state();
            if state.connected == connected || state.closed {
                return;
            }
            state.connected = connected;
            let orphans = if connected {
                VecDeque::new()
            } else {
                std::mem::take(&mut state.pending)
            };
            state.counters.failed += u64::try_from(orphans.len()).unwrap_or(u64::MAX);
            (orphans, state.watcher.clone())
        };
        let error = error_of(SourceErrorKind::Disconnected);
        for orphan in orphans {
            orphan.done.fail(error.clone());
        }
        match watcher {
            Some(watcher) if connected => watcher.source_up(),
            Some(watcher) => watcher.source_down(&error),
            None => {}
        }
    }

    /// Overwrites bytes, as a VM still running at the source would.
    ///
    /// # Panics
    /// If they reach past the end.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.state().data[offset..][..bytes.len()].copy_from_slice(bytes);
    }

    /// What was asked so far.
    pub fn counters(&self) -> MemoryCounters {
        self.state().counters
    }

    fn submit(&self, lane: Lane, offset: u64, len: u64, done: Done) {
        let mut state = self.state();
        let size = u64::try_from(state.data.len()).unwrap_or(u64::MAX);
        let extents = matches!(done, Done::Extents(_));
        let flush = matches!(done, Done::Flush(_));
        let fits = offset.checked_add(len).is_some_and(|end| end <= size);
        let doomed = if !state.connected || state.closed {
            Some(SourceErrorKind::Disconnected)
        } else if !fits || (extents && len == 0) {
            Some(SourceErrorKind::Refused)
        } else {
            None
        };
        match done {
            Done::Read(_) => state.counters.reads += 1,
            Done::Extents(_) => state.counters.extents += 1,
            Done::Flush(_) => {}
        }
        state.pending.push_back(Pending {
            request: PendingRequest {
                lane,
                offset,
                len,
                extents,
                flush,
            },
            done,
            doomed,
        });
    }

    fn answer(&self, index: usize, kind: Option<SourceErrorKind>) {
        assert!(self.answer_one(index, kind), "a pending request");
    }

    /// `false` if there is no such request.
    fn answer_one(&self, index: usize, kind: Option<SourceErrorKind>) -> bool {
        let mut state = self.state();
        let Some(pending) = state.pending.remove(index) else {
            return false;
        };
        let PendingRequest { offset, len, .. } = pending.request;
        if let Some(kind) = pending.doomed.or(kind) {
            state.counters.failed += 1;
            drop(state);
            pending.done.fail(error_of(kind));
            return true;
        }
        let start = usize::try_from(offset).expect("checked at submission");
        let count = usize::try_from(len).expect("checked at submission");
        match pending.done {
            Done::Read(done) => {
                state.counters.read_bytes += len;
                let data = state.data[start..start + count].to_vec();
                drop(state);
                done(Ok(Fetched {
                    offset,
                    data,
                    holes: Vec::new(),
                    wire_bytes: HEADERS_BYTES + len,
                }));
            }
            Done::Extents(done) => {
                let extents = extents_of(&state.data, self.granularity, offset, len);
                drop(state);
                done(Ok(ExtentsAnswer {
                    extents,
                    wire_bytes: HEADERS_BYTES,
                }));
            }
            Done::Flush(done) => {
                state.counters.flushes += 1;
                drop(state);
                done(Ok(()));
            }
        }
        true
    }
}

impl Done {
    fn fail(self, error: SourceError) {
        match self {
            Self::Read(done) => done(Err(error)),
            Self::Extents(done) => done(Err(error)),
            Self::Flush(done) => done(Err(error)),
        }
    }
}

fn error_of(kind: SourceErrorKind) -> SourceError {
    SourceError::new(kind, format!("the source in memory was told so: {kind:?}"))
}

/// The extents of `offset..offset + len`, cut at multiples of the granularity, neighbours merged.
fn extents_of(data: &[u8], granularity: Option<u64>, offset: u64, len: u64) -> Vec<SourceExtent> {
    let end = offset + len;
    let Some(granularity) = granularity else {
        let zero = false;
        return vec![SourceExtent { offset, len, zero }];
    };
    let mut extents: Vec<SourceExtent> = Vec::new();
    let mut at = offset;
    while at < end {
        let next = (at - at % granularity).saturating_add(granularity).min(end);
        let bytes = usize::try_from(at).unwrap_or(0)..usize::try_from(next).unwrap_or(0);
        let zero = data[bytes].iter().all(|&byte| byte == 0);
        match extents.last_mut() {
            Some(last) if last.zero == zero => last.len += next - at,
            _ => extents.push(SourceExtent {
                offset: at,
                len: next - at,
                zero,
            }),
        }
        at = next;
    }
    extents
}

impl Source for MemorySource {
    fn info(&self) -> SourceInfo {
        let state = self.state();
        SourceInfo {
            size_bytes: u64::try_from(state.data.len()).unwrap_or(u64::MAX),
            read_only: state.read_only,
            can_multi_conn: true,
            has_extents: self.granularity.is_some(),
            can_flush: state.can_flush,
            min_block_bytes: 1,
            max_read_bytes: MAX_READ_BYTES,
            uri: "memory:".to_owned(),
        }
    }

    fn is_connected(&self) -> bool {
        self.connections() > 0
    }

    fn connections(&self) -> usize {
        let state = self.state();
        usize::from(state.connected && !state.closed)
    }

    fn read(&self, lane: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        self.submit(lane, offset, u64::from(len), Done::Read(done));
    }

    fn extents(&self, lane: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        self.submit(lane, offset, len, Done::Extents(done));
    }

    fn flush(&self, done: Completion<()>) {
        self.submit(Lane::Demand, 0, 0, Done::Flush(done));
    }

    fn watch(&self, watcher: Arc<dyn SourceWatcher>) {
        self.state().watcher = Some(watcher);
    }

    fn close(&self) {
        let orphans = {
            let mut state = self.state();
            state.closed = true;
            state.watcher = None;
            std::mem::take(&mut state.pending)
        };
        for orphan in orphans {
            orphan.done.fail(error_of(SourceErrorKind::Disconnected));
        }
    }
}
