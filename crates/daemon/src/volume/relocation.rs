//! What a volume has while its blocks are still coming: the residency, the source, and the mover
//! that decides what to ask for.
//!
//! Carries out the mover's actions, outside its lock. The one place where fetched blocks are
//! installed is here (`Relocation::install`); its rule is invariant no. 1: only what is still
//! absent is installed, under the lock of the range, so that a guest's write in between wins.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::geometry::{BlockIndex, BlockRange, ByteRange, Geometry, SECTOR_BYTES};
use hikkoshi_engine::journal::{Pending, Record};
use hikkoshi_engine::mover::{self, Action, CopyOrder, FetchFailure, FlightId, Mover, ReadFailure};
use hikkoshi_engine::range_lock::RangeLocks;
use hikkoshi_engine::readahead::Advance;
use hikkoshi_engine::residency::{BlockState, Residency};
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::{Store, ZeroMode};
use hikkoshi_wan::{
    ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind, SourceWatcher,
};

use super::commit::MAX_PENDING_RECORDS;
use super::early::Early;
use super::proof::Proof;
use super::{Clock, Volume, lock};
use crate::events::EventKind;

/// Zeroes inside fetched data are looked for at this grain: the usual block of a file system.
const ZERO_GRAIN_BYTES: usize = 4096;

/// How a waiting read ended.
pub enum ReadEnd<'a> {
    /// All of it is in the image now.
    Resident,
    /// The source's bytes of the range that was asked for: before the handoff, or because they
    /// are in memory still.
    Bytes(Cow<'a, [u8]>),
    /// It cannot be served.
    Failed(ReadFailure),
}

/// A read that waits for the source.
pub struct Reader {
    /// The bytes that are wanted.
    pub bytes: ByteRange,
    /// When it began to wait.
    pub since: Duration,
    /// Called once.
    pub done: Box<dyn FnOnce(ReadEnd<'_>) + Send>,
}

/// What is counted of a relocation.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Bytes that crossed the link.
    pub wire_bytes: AtomicU64,
    /// Blocks that were installed.
    pub blocks_installed: AtomicU64,
    /// Bytes that were zero at the source and so were not sent.
    pub zero_bytes_skipped: AtomicU64,
    /// Bytes that were in a seed image and so were not sent.
    pub seeded_bytes: AtomicU64,
    /// Of these, bytes that the source told to be zero before any data was asked for.
    pub hole_bytes_skipped: AtomicU64,
    /// Bytes that guests wrote here before they came.
    pub overwritten_bytes: AtomicU64,
    /// Bytes of the disk that came as data, and what they were on the link.
    pub data_bytes: AtomicU64,
    /// See there.
    pub data_wire_bytes: AtomicU64,
    /// Bytes that did not cross the link because what did was compressed.
    pub packed_bytes_saved: AtomicU64,
    /// Connections given up because bytes were changed on their way, once the move is over.
    pub checksum_failures: AtomicU64,
    /// Bytes that were asked for and, being cancelled, not sent, once the move is over.
    pub cancelled_bytes: AtomicU64,
    /// The longest that a read has waited, in microseconds.
    pub longest_wait_us: AtomicU64,
}

impl Traffic {
    /// Keeps what another has counted.
    pub(super) fn take_over(&self, other: &Self) {
        for (to, from) in [
            (&self.wire_bytes, &other.wire_bytes),
            (&self.blocks_installed, &other.blocks_installed),
            (&self.zero_bytes_skipped, &other.zero_bytes_skipped),
            (&self.hole_bytes_skipped, &other.hole_bytes_skipped),
            (&self.overwritten_bytes, &other.overwritten_bytes),
            (&self.data_bytes, &other.data_bytes),
            (&self.data_wire_bytes, &other.data_wire_bytes),
            (&self.seeded_bytes, &other.seeded_bytes),
            (&self.packed_bytes_saved, &other.packed_bytes_saved),
            (&self.checksum_failures, &other.checksum_failures),
            (&self.cancelled_bytes, &other.cancelled_bytes),
            (&self.longest_wait_us, &other.longest_wait_us),
        ] {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
}

/// No time.
const NEVER: u64 = u64::MAX;

/// The copy waits for a slow medium for moments at a time: for so long it is told that it does.
const BEHIND_FOR: Duration = Duration::from_secs(5);

/// A volume's move, while it lasts.
pub struct Relocation {
    pub(super) geometry: Geometry,
    pub(super) store: Arc<dyn Store>,
    /// What is here.
    pub residency: Arc<Residency>,
    pub(super) locks: RangeLocks,
    pub(super) source: Arc<dyn Source>,
    /// Locked before the mover, where both are.
    pub(super) proof: Mutex<Proof>,
    /// What the source must still read the same.
    pub(super) witnesses: Mutex<Witnesses>,
    pub(super) mover: Mutex<Mover<Reader>>,
    pub(super) pending: Pending,
    pub(super) clock: Clock,
    /// The volume, to ask it for commits. Weak: the volume owns the relocation.
    pub(super) volume: Weak<Volume>,
    /// What is counted.
    pub traffic: Traffic,
    /// Why the source is away, as it said last.
    pub(super) trouble: Mutex<Option<SourceError>>,
    pub(super) retired: AtomicBool,
    pub(super) early: Early,
    /// When the image's medium had too much to write last, or [`NEVER`].
    behind_at_ms: AtomicU64,
}

impl Relocation {
    /// A relocation that is not wired to its source yet: see [`Relocation::start`].
    pub fn new(
        volume: Weak<Volume>,
        store: Arc<dyn Store>,
        residency: Arc<Residency>,
        source: Arc<dyn Source>,
        mover: Mover<Reader>,
        clock: Clock,
    ) -> Self {
        Self {
            geometry: residency.geometry(),
            store,
            residency,
            locks: RangeLocks::new(),
            source,
            proof: Mutex::default(),
            witnesses: Mutex::new(Witnesses::new(0)),
            mover: Mutex::new(mover),
            pending: Pending::default(),
            clock,
            volume,
            traffic: Traffic::default(),
            trouble: Mutex::new(None),
            retired: AtomicBool::new(false),
            early: Early::default(),
            behind_at_ms: AtomicU64::new(NEVER),
        }
    }

    /// With the witnesses of an earlier run, and the seed that draws more.
    #[must_use]
    pub fn with_witnesses(mut self, witnesses: Witnesses) -> Self {
        self.witnesses = Mutex::new(witnesses);
        self
    }

    /// Listens to the source.
    pub fn start(self: &Arc<Self>) {
        self.source.watch(Arc::new(Watch(Arc::downgrade(self))));
        self.look_for_source();
    }

    /// Lets go of the source. Whatever still waits fails.
    pub(super) fn retire(self: &Arc<Self>) {
        if !self.retired.swap(true, Ordering::AcqRel) {
            self.drive(|m, _, out| m.abandon(out));
            self.source.close();
            self.forget_early();
        }
    }

    /// The disk's source.
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// The source is away, or not believed, and why.
    pub(super) fn source_told(self: &Arc<Self>, error: &SourceError) {
        *lock(&self.trouble) = Some(error.clone());
        self.source_went(error);
        if error.kind == SourceErrorKind::Untrusted && self.went_back() {
            // The disk goes on there: what is missing here will not come any more.
            self.drive(|m, _, out| m.abandon(out));
        }
    }

    pub(super) fn went_back(&self) -> bool {
        self.volume().is_some_and(|volume| volume.went_back())
    }

    /// Looks at the mover, for the status.
    pub(super) fn with_mover<R>(&self, look: impl FnOnce(&Mover<Reader>) -> R) -> R {
        look(&lock(&self.mover))
    }

    /// Tells the mover something that leads to nothing.
    pub(super) fn with_mover_at<R>(
        &self,
        event: impl FnOnce(&mut Mover<Reader>, Duration) -> R,
    ) -> R {
        event(&mut lock(&self.mover), (self.clock)())
    }

    /// The volume, while there is one.
    pub(super) fn volume(&self) -> Option<Arc<Volume>> {
        self.volume.upgrade()
    }

    /// Whether the source was let go.
    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Tells the mover something and carries out what it answers.
    pub(super) fn drive(
        self: &Arc<Self>,
        event: impl FnOnce(&mut Mover<Reader>, Duration, &mut Vec<Action<Reader>>),
    ) {
        let mut actions = Vec::new();
        event(&mut lock(&self.mover), (self.clock)(), &mut actions);
        self.carry_out(actions);
    }

    /// A read of what is not all here.
    pub fn read(self: &Arc<Self>, bytes: ByteRange, done: Box<dyn FnOnce(ReadEnd<'_>) + Send>) {
        let range = self.geometry.covering(bytes);
        let reader = Reader {
            bytes,
            since: (self.clock)(),
            done,
        };
        self.drive(|m, now, out| m.read(now, reader, range, &self.residency, out));
        // Nobody else would end a wait that began after the source was let go of.
        if self.is_retired() {
            self.drive(|m, _, out| m.abandon(out));
        }
    }

    /// Tells the log, if it is to have everything, which blocks a guest's read misses here.
    pub fn trace_missing(&self, bytes: ByteRange) {
        if !tracing::enabled!(tracing::Level::TRACE) {
            return;
        }
        let range = self.geometry.covering(bytes);
        for (run, state) in self.residency.runs(range) {
            if matches!(state, BlockState::Absent | BlockState::Partial) {
                let missing = self.geometry.bytes(run);
                tracing::trace!(missing.start, missing.end, "a read misses bytes here");
            }
        }
    }

    /// A client reads sequentially and has got on.
    pub fn read_ahead(self: &Arc<Self>, told: Advance) {
        self.drive(|m, now, out| m.read_ahead(now, told, &self.residency, out));
    }

    /// The order of the background copy from here on.
    pub fn set_order(self: &Arc<Self>, order: CopyOrder) {
        self.drive(|m, now, out| m.set_order(now, order, &self.residency, out));
    }

    /// Its bytes come over a link that other disks use, too.
    /// `behind`: by how much its clock is behind the one that is common to them.
    pub fn share(&self, link: &Arc<mover::Path>, behind: Duration) {
        lock(&self.mover).share(link, behind);
    }

    /// A cap holds for what it and other disks copy together.
    pub fn share_cap(&self, cap: &Arc<mover::Cap>, behind: Duration) {
        lock(&self.mover).share_cap(cap, behind);
    }

    /// Time has passed.
    pub fn tick(self: &Arc<Self>) {
        self.tick_proof();
        let source = self.source();
        source.tick();
        let path = source.path();
        let behind = self.is_store_behind();
        self.drive(|m, now, out| {
            m.path_is_seen(now, path);
            m.store_is_behind(behind);
            m.tick(now, &self.residency, out);
        });
    }

    /// What is here in part is to be whole soon.
    pub(super) fn need_rests(self: &Arc<Self>) {
        self.drive(|m, now, out| m.need_rests(now, &self.residency, out));
    }

    /// Whether the image's medium has more to write than is good for whoever flushes.
    pub(super) fn is_store_behind(&self) -> bool {
        let behind = self.store.is_far_behind();
        if behind {
            let ms = u64::try_from((self.clock)().as_millis()).unwrap_or(u64::MAX);
            self.behind_at_ms.store(ms, Ordering::Relaxed);
        }
        behind
    }

    /// Whether that was so a short while ago.
    pub(super) fn was_store_behind(&self) -> bool {
        let at = self.behind_at_ms.load(Ordering::Relaxed);
        let at = (at != NEVER).then(|| Duration::from_millis(at));
        at.is_some_and(|at| (self.clock)().saturating_sub(at) < BEHIND_FOR)
    }

    /// Worked off in a queue and not by recursion: installing zeroes lands at once and brings
    /// further actions.
    pub(super) fn carry_out(self: &Arc<Self>, actions: Vec<Action<Reader>>) {
        let mut queue = VecDeque::from(actions);
        while let Some(action) = queue.pop_front() {
            match action {
                Action::Fetch {
                    flight,
                    range,
                    lane,
                    keep,
                } => {
                    self.fetch(flight, range, lane, keep);
                }
                Action::InstallZero { flight, range } => {
                    queue.extend(self.install_zero(flight, range));
                }
                Action::QueryExtents { range } => self.query_extents(range),
                Action::Promote { range } => {
                    let bytes = self.geometry.bytes(range);
                    self.source.promote(bytes.start, bytes.len());
                }
                Action::Cancel { range, lane } => {
                    let bytes = self.geometry.bytes(range);
                    self.source
                        .cancel(source_lane(lane), bytes.start, bytes.len());
                }
                Action::Wake(reader) => {
                    self.note_wait(reader.since);
                    (reader.done)(ReadEnd::Resident);
                }
                Action::Fail(reader, why) => {
                    if why == ReadFailure::SourceLost {
                        self.note_reads_failed();
                    }
                    (reader.done)(ReadEnd::Failed(why));
                }
                Action::Complete => {
                    if let Some(volume) = self.volume.upgrade() {
                        volume.complete_soon();
                    }
                }
            }
        }
    }

    fn note_wait(&self, since: Duration) {
        let waited = (self.clock)().saturating_sub(since).as_micros();
        let waited = u64::try_from(waited).unwrap_or(u64::MAX);
        self.traffic
            .longest_wait_us
            .fetch_max(waited, Ordering::Relaxed);
    }

    fn fetch(self: &Arc<Self>, flight: FlightId, range: BlockRange, lane: mover::Lane, keep: bool) {
        let bytes = self.geometry.bytes(range);
        let lane = source_lane(lane);
        let len = u32::try_from(bytes.len()).expect("a fetch is at most 32 MiB and a block");
        let (this, believed) = (Arc::clone(self), self.belief());
        // What a reader is waiting for passes by, and is not kept.
        let early = keep.then(|| self.early.tracking()).flatten();
        let done = move |outcome| {
            let outcome = this.vouched(believed, outcome);
            let then = Arc::clone(&this);
            this.once_settled(early, range, outcome, move |outcome| {
                then.fetched(flight, range, keep, outcome);
            });
        };
        self.source.read(lane, bytes.start, len, Box::new(done));
    }

    /// On a thread of the source.
    fn fetched(
        self: &Arc<Self>,
        flight: FlightId,
        range: BlockRange,
        keep: bool,
        outcome: Result<Fetched, SourceError>,
    ) {
        match outcome {
            Ok(fetched) => {
                self.count_wire(&fetched);
                if keep {
                    let installed = self.install(range, &fetched);
                    let installed = self.note_write(installed);
                    self.tell_landed(flight, range, installed, fetched);
                } else {
                    self.pass_through(flight, &fetched);
                }
            }
            Err(error) => {
                if let Some(come) = error.come.as_deref().filter(|_| keep) {
                    self.keep_what_has_come(range, come);
                }
                let why = self.note_failure(&error);
                self.drive(|m, now, out| m.failed(now, flight, why, &self.residency, out));
            }
        }
    }

    /// The connection was lost in the middle of a fetch: what had come of it until then is installed by
    /// the same rule, and not asked for again.
    fn keep_what_has_come(&self, range: BlockRange, come: &Fetched) {
        self.count_wire(come);
        let len = u64::try_from(come.data.len()).unwrap_or(0);
        let whole = self.geometry.within(ByteRange::at(come.offset, len));
        let whole = whole.intersection(range);
        if whole.is_empty() {
            return;
        }
        let installed = self.install(whole, come);
        if let Err(error) = self.note_write(installed) {
            tracing::debug!("keeping what had come of a fetch failed: {error}");
        }
    }

    pub(super) fn count_wire(&self, fetched: &Fetched) {
        self.traffic
            .wire_bytes
            .fetch_add(fetched.wire_bytes, Ordering::Relaxed);
        let holes: u64 = fetched.holes.iter().map(|(_, len)| len).sum();
        let data = (fetched.data.len() as u64).saturating_sub(holes);
        let traffic = &self.traffic;
        traffic
            .packed_bytes_saved
            .fetch_add(data.saturating_sub(fetched.wire_bytes), Ordering::Relaxed);
        if data > 0 {
            traffic.data_bytes.fetch_add(data, Ordering::Relaxed);
            traffic
                .data_wire_bytes
                .fetch_add(fetched.wire_bytes, Ordering::Relaxed);
        }
    }

    fn note_failure(&self, error: &SourceError) -> FetchFailure {
        match error.kind {
            SourceErrorKind::Refused => {
                let known = lock(&self.trouble).replace(error.clone());
                // A disk with a bad spot says the same again and again.
                if known.is_none_or(|known| known.message != error.message) {
                    let text = format!("the source refused a read: {error}");
                    self.event(EventKind::SourceError, text);
                }
                FetchFailure::Refused
            }
            SourceErrorKind::Disconnected => FetchFailure::Disconnected,
            SourceErrorKind::Cancelled => FetchFailure::Cancelled,
            SourceErrorKind::Untrusted => {
                *lock(&self.trouble) = Some(error.clone());
                FetchFailure::Disconnected
            }
        }
    }

    fn note_write<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        match self.volume.upgrade() {
            Some(volume) => volume.note_write(outcome),
            None => outcome,
        }
    }

    /// Tells everybody what happened.
    pub(super) fn event(&self, kind: EventKind, text: impl Into<String>) {
        if let Some(volume) = self.volume.upgrade() {
            volume.event(kind, text);
        }
    }

    fn tell_landed(
        self: &Arc<Self>,
        flight: FlightId,
        range: BlockRange,
        installed: io::Result<bool>,
        fetched: Fetched,
    ) {
        match installed {
            Ok(whole) => {
                let mut actions = Vec::new();
                let (now, wire_bytes) = ((self.clock)(), fetched.wire_bytes);
                let behind = self.is_store_behind();
                let mut mover = lock(&self.mover);
                mover.store_is_behind(behind);
                mover.landed(now, flight, wire_bytes, &self.residency, &mut actions);
                drop(mover);
                if whole {
                    self.answer_from(fetched, &mut actions);
                }
                self.carry_out(actions);
            }
            Err(error) => self.not_kept(flight, range, &error, &fetched),
        }
    }

    /// The local image did not take what was fetched: those who wait for it get it all the same.
    fn not_kept(
        self: &Arc<Self>,
        flight: FlightId,
        range: BlockRange,
        error: &io::Error,
        fetched: &Fetched,
    ) {
        let at = self.geometry.bytes(range).start;
        tracing::debug!("keeping fetched blocks at offset {at} failed: {error}");
        let mut actions = Vec::new();
        let readers =
            lock(&self.mover).unkept((self.clock)(), flight, &self.residency, &mut actions);
        for reader in readers {
            self.answer_unkept(reader, fetched);
        }
        self.carry_out(actions);
    }

    fn answer_unkept(&self, reader: Reader, fetched: &Fetched) {
        self.note_wait(reader.since);
        match self.assemble(reader.bytes, fetched) {
            Ok(data) => (reader.done)(ReadEnd::Bytes(Cow::Owned(data))),
            Err(error) => {
                tracing::debug!("a read of fetched and local blocks failed: {error}");
                (reader.done)(ReadEnd::Failed(ReadFailure::StoreFailed));
            }
        }
    }

    /// Bytes of now: the image's where they are here, the fetched ones where they are not.
    fn assemble(&self, bytes: ByteRange, fetched: &Fetched) -> io::Result<Vec<u8>> {
        let mut data = slice_of(fetched, bytes.start, bytes.len())?.to_vec();
        let range = self.geometry.covering(bytes);
        let mut overlay = |part: ByteRange| -> io::Result<()> {
            let (start, end) = (part.start.max(bytes.start), part.end.min(bytes.end));
            if start >= end {
                return Ok(());
            }
            let at = usize::try_from(start - bytes.start).map_err(io::Error::other)?;
            let len = usize::try_from(end - start).map_err(io::Error::other)?;
            self.store.read(start, &mut data[at..at + len])
        };
        let guard = self.locks.lock(range);
        for (run, state) in self.residency.runs(range) {
            match state {
                BlockState::Absent => {}
                BlockState::Clean | BlockState::Owned => overlay(self.geometry.bytes(run))?,
                BlockState::Partial => {
                    for block in (run.start..run.end).map(BlockIndex) {
                        let Some(mask) = self.residency.partial_mask(block) else {
                            continue;
                        };
                        let base = self.geometry.bytes(BlockRange::one(block)).start;
                        for sector in 0..self.geometry.sectors_in(block) {
                            if mask.has(sector) {
                                let at = base + u64::from(sector) * SECTOR_BYTES;
                                overlay(ByteRange::at(at, SECTOR_BYTES))?;
                            }
                        }
                    }
                }
            }
        }
        drop(guard);
        Ok(data)
    }

    /// Answers readers from what was fetched, which saves reading it back. Only if all of it was
    /// installed: then it is what the image holds, or held a moment ago while the reader waited.
    fn answer_from(&self, fetched: Fetched, actions: &mut Vec<Action<Reader>>) {
        let Fetched {
            offset, mut data, ..
        } = fetched;
        let mut rest = Vec::new();
        for action in actions.drain(..) {
            let Action::Wake(reader) = action else {
                rest.push(action);
                continue;
            };
            let start = reader
                .bytes
                .start
                .checked_sub(offset)
                .and_then(|s| usize::try_from(s).ok());
            let len = usize::try_from(reader.bytes.len()).ok();
            let place = start
                .zip(len)
                .map(|(start, len)| start..start.saturating_add(len));
            match place.filter(|place| place.end <= data.len()) {
                Some(place) if place == (0..data.len()) => {
                    self.note_wait(reader.since);
                    // The usual case is one reader of just this: it gets the buffer itself.
                    (reader.done)(ReadEnd::Bytes(Cow::Owned(std::mem::take(&mut data))));
                }
                Some(place) => {
                    self.note_wait(reader.since);
                    (reader.done)(ReadEnd::Bytes(Cow::Borrowed(&data[place])));
                }
                None => rest.push(Action::Wake(reader)),
            }
        }
        *actions = rest;
    }

    /// What may not be kept, before the handoff, or cannot be: the bytes go to those who asked, and
    /// nowhere else.
    fn pass_through(self: &Arc<Self>, flight: FlightId, fetched: &Fetched) {
        let readers = lock(&self.mover).landed_unkept(flight);
        for reader in readers {
            // After the handoff, where there was no space to keep it: what is here is newer.
            self.answer_unkept(reader, fetched);
        }
    }

    /// Installs what was fetched where it is still missing. The one place where blocks become
    /// clean. Tells whether all of it was.
    ///
    /// # Errors
    /// The local image refused a write. Blocks installed before it stay.
    fn install(&self, range: BlockRange, fetched: &Fetched) -> io::Result<bool> {
        let guard = self.locks.lock(range);
        let runs: Vec<_> = self.residency.runs(range).collect();
        let mut whole = true;
        for (run, state) in runs {
            whole &= state == BlockState::Absent;
            match state {
                BlockState::Absent => self.install_absent(run, fetched)?,
                BlockState::Partial => {
                    for block in run.start..run.end {
                        self.merge_partial(BlockIndex(block), |at, len| {
                            slice_of(fetched, at, len)
                        })?;
                    }
                }
                // Written here in the meantime, or installed by another fetch: the source's
                // bytes are the older ones.
                BlockState::Clean | BlockState::Owned => {}
            }
        }
        drop(guard);
        Ok(whole)
    }

    /// Installs bytes of a seed that have the hash of what the source has: the same rule, the same
    /// place.
    ///
    /// # Errors
    /// The local image refused a write.
    pub(super) fn install_seed(&self, range: BlockRange, bytes: &Fetched) -> io::Result<()> {
        let installed = self.install(range, bytes);
        self.note_write(installed).map(|_| ())
    }

    /// Of `range`, what is absent and lies in the image all the same, as an older copy left it,
    /// becomes clean where it has the hash of what the source has (`equal` says so of the bytes).
    /// Read under the lock of the range: whoever writes here marks the blocks under it. Tells how
    /// many bytes became clean by it.
    ///
    /// # Errors
    /// The local image cannot be read.
    pub(super) fn keep_equal(
        &self,
        range: BlockRange,
        buffer: &mut [u8],
        equal: impl FnOnce(&[u8]) -> Vec<BlockRange>,
    ) -> io::Result<u64> {
        let guard = self.locks.lock(range);
        let start = self.geometry.bytes(range).start;
        self.store.read(start, buffer)?;
        let mut kept = 0;
        for found in &equal(buffer) {
            let runs: Vec<_> = self.residency.runs(*found).collect();
            for (run, _) in runs.into_iter().filter(|(_, s)| *s == BlockState::Absent) {
                let bytes = self.geometry.bytes(run);
                let at = usize::try_from(bytes.start - start).map_err(io::Error::other)?;
                let len = usize::try_from(bytes.len()).map_err(io::Error::other)?;
                self.now_clean(run);
                kept += bytes.len();
                lock(&self.witnesses).came(self.geometry, run, &buffer[at..at + len]);
            }
        }
        drop(guard);
        Ok(kept)
    }

    fn install_absent(&self, run: BlockRange, fetched: &Fetched) -> io::Result<()> {
        let bytes = self.geometry.bytes(run);
        let data = slice_of(fetched, bytes.start, bytes.len())?;
        for (offset, piece, zero) in zero_runs(bytes.start, data) {
            if zero {
                let len = piece.len() as u64;
                self.store.write_zeroes(offset, len, ZeroMode::MayPunch)?;
                self.traffic
                    .zero_bytes_skipped
                    .fetch_add(hole_bytes_within(fetched, offset, len), Ordering::Relaxed);
            } else {
                self.store.write_behind(offset, piece)?;
            }
        }
        crash_point!("install.written");
        self.now_clean(run);
        crash_point!("install.marked");
        lock(&self.witnesses).came(self.geometry, run, data);
        Ok(())
    }

    /// The data is in the image: say so.
    pub(super) fn now_clean(&self, run: BlockRange) {
        self.leave(|| {
            self.residency.mark_clean(run);
            Some(Record::Clean(run))
        });
        self.traffic
            .blocks_installed
            .fetch_add(run.len(), Ordering::Relaxed);
    }

    /// Fills the sectors of a partially written block that the guest has not written, and leaves
    /// those that it has alone.
    fn merge_partial<'a>(
        &self,
        block: BlockIndex,
        data: impl Fn(u64, u64) -> io::Result<&'a [u8]>,
    ) -> io::Result<()> {
        let Some(mask) = self.residency.partial_mask(block) else {
            return Ok(());
        };
        let base = self.geometry.bytes(BlockRange::one(block)).start;
        for sectors in mask.missing(self.geometry.sectors_in(block)) {
            let at = base + u64::from(sectors.start) * SECTOR_BYTES;
            let len = u64::from(sectors.end - sectors.start) * SECTOR_BYTES;
            self.store.write(at, data(at, len)?)?;
        }
        crash_point!("install.merged");
        self.now_owned(BlockRange::one(block));
        Ok(())
    }

    /// The blocks are all here and differ from the source: say so.
    pub(super) fn now_owned(&self, run: BlockRange) {
        self.leave(|| {
            self.residency.mark_owned(run);
            Some(Record::Owned(run))
        });
    }

    /// Marks blocks and leaves the record of it, as one step: see [`Pending`].
    pub(super) fn leave(&self, mark: impl FnOnce() -> Option<Record>) {
        if self.pending.leave(mark) >= MAX_PENDING_RECORDS
            && let Some(volume) = self.volume.upgrade()
        {
            volume.commit_soon();
        }
    }

    fn install_zero(self: &Arc<Self>, flight: FlightId, range: BlockRange) -> Vec<Action<Reader>> {
        let outcome = self.zero_missing(range);
        let outcome = self.note_write(outcome);
        let mut out = Vec::new();
        let mut mover = lock(&self.mover);
        let now = (self.clock)();
        match outcome {
            Ok(()) => mover.landed(now, flight, 0, &self.residency, &mut out),
            Err(error) => {
                tracing::debug!("zeroing blocks that are zero at the source failed: {error}");
                let why = FetchFailure::StoreFailed;
                mover.failed(now, flight, why, &self.residency, &mut out);
            }
        }
        out
    }

    fn zero_missing(&self, range: BlockRange) -> io::Result<()> {
        let guard = self.locks.lock(range);
        let runs: Vec<_> = self.residency.runs(range).collect();
        let zeroes = [0_u8; ZERO_GRAIN_BYTES];
        for (run, state) in runs {
            let bytes = self.geometry.bytes(run);
            match state {
                BlockState::Absent => {
                    self.store
                        .write_zeroes(bytes.start, bytes.len(), ZeroMode::MayPunch)?;
                    crash_point!("install.zeroed");
                    for skipped in [
                        &self.traffic.zero_bytes_skipped,
                        &self.traffic.hole_bytes_skipped,
                    ] {
                        skipped.fetch_add(bytes.len(), Ordering::Relaxed);
                    }
                    self.now_clean(run);
                }
                BlockState::Partial => {
                    for block in run.start..run.end {
                        self.zero_rest(BlockIndex(block), &zeroes)?;
                    }
                }
                BlockState::Clean | BlockState::Owned => {}
            }
        }
        drop(guard);
        Ok(())
    }

    fn zero_rest(&self, block: BlockIndex, zeroes: &[u8]) -> io::Result<()> {
        let Some(mask) = self.residency.partial_mask(block) else {
            return Ok(());
        };
        let base = self.geometry.bytes(BlockRange::one(block)).start;
        for sector in mask.missing(self.geometry.sectors_in(block)).flatten() {
            let sector_zeroes = &zeroes[..512];
            self.store
                .write(base + u64::from(sector) * SECTOR_BYTES, sector_zeroes)?;
        }
        self.now_owned(BlockRange::one(block));
        Ok(())
    }

    fn query_extents(self: &Arc<Self>, range: BlockRange) {
        let bytes = self.geometry.bytes(range);
        let (this, believed) = (Arc::clone(self), self.belief());
        let early = self.early.tracking();
        let done = move |answer: Result<ExtentsAnswer, SourceError>| {
            let answer = this.vouched(believed, answer);
            let then = Arc::clone(&this);
            this.once_settled(early, range, answer, move |answer| match answer {
                Ok(answer) => then.learn_extents(range, &answer),
                Err(error) => {
                    let why = then.note_failure(&error);
                    then.drive(|m, now, out| {
                        m.extents_failed(now, why, range, &then.residency, out);
                    });
                }
            });
        };
        self.source
            .extents(Lane::Hot, bytes.start, bytes.len(), Box::new(done));
    }

    fn learn_extents(self: &Arc<Self>, asked: BlockRange, answer: &ExtentsAnswer) {
        self.traffic
            .wire_bytes
            .fetch_add(answer.wire_bytes, Ordering::Relaxed);
        let end = answer
            .extents
            .last()
            .map_or(0, |e| e.offset.saturating_add(e.len));
        let told = ByteRange {
            start: self.geometry.bytes(asked).start,
            end,
        };
        let mut answered = self.geometry.within(told).intersection(asked);
        if answered.is_empty() {
            // Less than a block was answered: the first block counts as data, so that the scan
            // gets on.
            answered = BlockRange::new(asked.start, (asked.start + 1).min(asked.end));
        }
        let zeroes: Vec<BlockRange> = merged_zeroes(answer)
            .map(|bytes| self.geometry.within(bytes).intersection(answered))
            .filter(|blocks| !blocks.is_empty())
            .collect();
        self.drive(|m, now, out| m.extents(now, answered, &zeroes, &self.residency, out));
    }
}

fn source_lane(lane: mover::Lane) -> Lane {
    match lane {
        mover::Lane::Demand => Lane::Demand,
        mover::Lane::Rest => Lane::Rest,
        mover::Lane::Ahead => Lane::Ahead,
        mover::Lane::Hot => Lane::Hot,
        mover::Lane::Bulk => Lane::Bulk,
        mover::Lane::Late => Lane::Late,
    }
}

/// Neighbouring zero extents joined: a block may span two of them.
pub(super) fn merged_zeroes(answer: &ExtentsAnswer) -> impl Iterator<Item = ByteRange> {
    let mut runs: Vec<ByteRange> = Vec::new();
    for extent in answer.extents.iter().filter(|e| e.zero) {
        let next = ByteRange::at(extent.offset, extent.len);
        match runs.last_mut() {
            Some(last) if last.end == next.start => last.end = next.end,
            _ => runs.push(next),
        }
    }
    runs.into_iter()
}

pub(super) fn slice_of(fetched: &Fetched, offset: u64, len: u64) -> io::Result<&[u8]> {
    let start = offset
        .checked_sub(fetched.offset)
        .and_then(|o| usize::try_from(o).ok());
    let len = usize::try_from(len).ok();
    start
        .zip(len)
        .and_then(|(start, len)| fetched.data.get(start..start.checked_add(len)?))
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the source sent too little"))
}

/// Cuts data into runs that are all zero and runs that are not, at the grain of a page.
pub(crate) fn zero_runs(offset: u64, data: &[u8]) -> Vec<(u64, &[u8], bool)> {
    let mut runs = Vec::new();
    let (mut start, mut at, mut current) = (0, 0, None);
    for grain in data.chunks(ZERO_GRAIN_BYTES) {
        let zero = is_zero(grain);
        if let Some(previous) = current.filter(|c| *c != zero) {
            runs.push((offset + start as u64, &data[start..at], previous));
            start = at;
        }
        current = Some(zero);
        at += grain.len();
    }
    if let Some(zero) = current {
        runs.push((offset + start as u64, &data[start..], zero));
    }
    runs
}

fn is_zero(data: &[u8]) -> bool {
    // Most data shows in its first word; the rest is compared in wide steps.
    data.first().is_none_or(|b| *b == 0) && data.iter().fold(0, |acc, b| acc | b) == 0
}

/// How many of these bytes the source did not send because they are a hole.
fn hole_bytes_within(fetched: &Fetched, offset: u64, len: u64) -> u64 {
    let end = offset + len;
    fetched
        .holes
        .iter()
        .map(|(at, hole)| {
            at.saturating_add(*hole)
                .min(end)
                .saturating_sub(offset.max(*at))
        })
        .sum()
}

/// Tells the mover of the source's comings and goings.
struct Watch(Weak<Relocation>);

impl SourceWatcher for Watch {
    fn source_up(&self) {
        if let Some(relocation) = self.0.upgrade() {
            relocation.source_came();
        }
    }

    fn source_down(&self, error: &SourceError) {
        if let Some(relocation) = self.0.upgrade()
            && !relocation.retired.load(Ordering::Acquire)
        {
            relocation.source_told(error);
        }
    }
}
