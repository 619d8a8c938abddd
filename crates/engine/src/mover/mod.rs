//! What to fetch, in which order, and who waits for it.
//!
//! The [`Mover`] is the one owner of a relocation's state. Events are method calls that carry the
//! time; what is to be done comes back as [`Action`]s. It does no I/O and holds no data, so that a
//! seeded test can drive every interleaving. Callers keep it behind a lock, call it for a moment,
//! and carry the actions out after the lock is released.
//!
//! It must never be told that a fetch landed before the residency shows it: a read that comes in
//! between looks there first.

mod bucket;
mod check;
mod flights;
mod pacer;
#[cfg(all(test, not(loom)))]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::geometry::{BlockIndex, BlockRange, Geometry};
use crate::residency::{BlockState, Residency};

use bucket::TokenBucket;
pub use flights::FlightId;
use flights::{Flight, Flights, Purpose};
use pacer::Pacer;

/// Two missing runs with at most this much resident data between them are fetched as one: the
/// data costs less time on the wire than a further request costs at both ends.
const MERGE_GAP_BYTES: u64 = 16 << 10;

/// The longest single fetch. Longer demand reads become several, which land independently.
const MAX_FETCH_BYTES: u64 = 1 << 20;

/// How much of the disk one question for extents covers.
const EXTENTS_BYTES: u64 = 1 << 30;

/// The most blocks of zeroes that are installed in one step: bounds how long the range is locked.
const ZERO_STEP_BYTES: u64 = 64 << 20;

/// Rests of partially written blocks that are fetched at once, without a guest waiting for them.
const MAX_REST_FLIGHTS: usize = 32;

/// How long a range that the source or the local store refused is left alone by the background.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

/// The most refused ranges remembered; beyond it the background as a whole rests.
const MAX_REFUSED: usize = 1024;

/// In which queue a fetch travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// A guest waits for it, or will.
    Demand,
    /// The background copy.
    Bulk,
}

/// Why a fetch came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchFailure {
    /// The connection is gone; the same fetch may succeed later.
    Disconnected,
    /// The source cannot read this range.
    Refused,
    /// The local store could not take it (its disk is full, say).
    StoreFailed,
}

/// Why a read cannot be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFailure {
    /// The source refused the range.
    SourceRefused,
    /// The source has been unreachable for longer than the policy allows.
    SourceLost,
    /// The local store failed.
    StoreFailed,
}

/// What is to be done. `W` is whatever the caller needs to answer a reader.
#[derive(Debug)]
pub enum Action<W> {
    /// Read these blocks from the source. Then, if `keep`: install them where they are still
    /// missing and call [`Mover::landed`]; else call [`Mover::landed_unkept`] for the readers.
    Fetch {
        /// What to say when it is done.
        flight: FlightId,
        /// The blocks.
        range: BlockRange,
        /// In which queue.
        lane: Lane,
        /// Whether the blocks may be kept.
        keep: bool,
    },
    /// Make these blocks zero where they are still missing, and call [`Mover::landed`].
    InstallZero {
        /// What to say when it is done.
        flight: FlightId,
        /// The blocks.
        range: BlockRange,
    },
    /// A reader waits for these blocks of a fetch in the bulk lane now: it is as urgent as demand.
    Promote {
        /// The blocks, all of the fetch.
        range: BlockRange,
    },
    /// Ask the source for the extents of these blocks; answer with [`Mover::extents`].
    QueryExtents {
        /// The blocks.
        range: BlockRange,
    },
    /// All that this reader needs is here.
    Wake(W),
    /// This reader cannot be served.
    Fail(W, ReadFailure),
    /// Every block is here. Said once.
    Complete,
}

/// Where the relocation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the handoff: reads pass through and nothing is kept.
    Standby,
    /// After it.
    Arriving,
    /// Everything is here.
    Complete,
}

/// What the mover is told once.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Whether the background copy runs at all.
    pub background: bool,
    /// The cap on the background copy, bytes per second.
    pub max_rate: Option<u64>,
    /// How long a read waits for an unreachable source; `None` for as long as it takes.
    pub loss_timeout: Option<Duration>,
    /// Whether the source tells holes and zeroes.
    pub has_extents: bool,
}

/// A reader and how many fetches it still waits for.
#[derive(Debug)]
struct Waiter<W> {
    who: W,
    range: BlockRange,
    outstanding: usize,
    since: Duration,
}

/// The state of one relocation. `W` stands for a reader that waits.
#[derive(Debug)]
pub struct Mover<W> {
    geometry: Geometry,
    policy: Policy,
    phase: Phase,
    connected: bool,
    /// When the source was lost, while it is.
    lost_at: Option<Duration>,
    paused: bool,
    flights: Flights,
    waiters: HashMap<u64, Waiter<W>>,
    next_waiter: u64,
    pacer: Pacer,
    bucket: TokenBucket,
    /// Where the background copy looks next, a block number.
    cursor: u64,
    /// Zeroes before this block have been installed (or are being).
    scanned_to: u64,
    /// A question for extents is under way.
    scanning: bool,
    /// Blocks that are partly written here and whose rest nobody fetches yet.
    rests: BTreeSet<BlockIndex>,
    /// Ranges the background leaves alone, and until when.
    refused: Vec<(BlockRange, Duration)>,
}

impl<W> Mover<W> {
    /// A mover for a disk of this shape. It takes the source to be unreachable until told.
    pub fn new(geometry: Geometry, phase: Phase, policy: Policy) -> Self {
        Self {
            geometry,
            policy,
            phase,
            connected: false,
            lost_at: Some(Duration::ZERO),
            paused: false,
            flights: Flights::default(),
            waiters: HashMap::new(),
            next_waiter: 0,
            pacer: Pacer::new(),
            bucket: TokenBucket::new(policy.max_rate),
            cursor: 0,
            scanned_to: 0,
            scanning: false,
            rests: BTreeSet::new(),
            refused: Vec::new(),
        }
    }

    /// Where the relocation stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the background copy is stopped by [`Mover::pause`].
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The cap on the background copy, bytes per second.
    pub fn limit(&self) -> Option<u64> {
        self.bucket.rate()
    }

    /// Readers that wait.
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// Ranges that the background leaves alone for now because they were refused.
    pub fn refused(&self) -> usize {
        self.refused.len()
    }

    /// A reader needs these blocks. It is woken at once if all are here.
    pub fn read(
        &mut self,
        now: Duration,
        who: W,
        range: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let id = self.next_waiter;
        self.next_waiter += 1;
        self.waiters.insert(
            id,
            Waiter {
                who,
                range,
                outstanding: 0,
                since: now,
            },
        );
        if self.phase == Phase::Standby {
            self.launch_for(now, id, range, Purpose::PassThrough, out);
        } else {
            for run in missing_runs(self.geometry, residency, range) {
                self.await_run(now, id, run, out);
            }
        }
        self.wake_if_ready(id, out);
    }

    /// Attaches a reader to what is in flight for `run`, and launches the rest.
    fn await_run(&mut self, now: Duration, id: u64, run: BlockRange, out: &mut Vec<Action<W>>) {
        let mut at = run.start;
        while at < run.end {
            match self.flights.covering(at, run.end) {
                Some((flight, covered)) if covered.start <= at => {
                    if self.flights.attach(flight, id) {
                        self.expect_one_more(id);
                    }
                    if self.flights.promote(flight) {
                        out.push(Action::Promote { range: covered });
                    }
                    at = covered.end;
                }
                next => {
                    let gap_end = next.map_or(run.end, |(_, r)| r.start.min(run.end));
                    let step = self.blocks_in(MAX_FETCH_BYTES);
                    let end = gap_end.min(at + step);
                    let range = BlockRange::new(at, end);
                    self.launch_for(now, id, range, Purpose::Demand, out);
                    at = end;
                }
            }
        }
    }

    fn expect_one_more(&mut self, id: u64) {
        if let Some(waiter) = self.waiters.get_mut(&id) {
            waiter.outstanding += 1;
        }
    }

    fn launch_for(
        &mut self,
        now: Duration,
        id: u64,
        range: BlockRange,
        purpose: Purpose,
        out: &mut Vec<Action<W>>,
    ) {
        let flight = self.launch(now, range, purpose, out);
        self.flights.attach(flight, id);
        self.expect_one_more(id);
    }

    /// Puts a fetch under way, or keeps it for when the source is back.
    fn launch(
        &mut self,
        now: Duration,
        range: BlockRange,
        purpose: Purpose,
        out: &mut Vec<Action<W>>,
    ) -> FlightId {
        let sent = self.connected || purpose == Purpose::Zero;
        let flight = self.flights.insert(Flight::new(range, purpose, now, sent));
        if sent {
            out.push(action_for(flight, range, purpose));
        }
        flight
    }

    /// A write left these blocks partly here; their rest should come soon.
    pub fn partial(
        &mut self,
        now: Duration,
        blocks: impl IntoIterator<Item = BlockIndex>,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        self.rests.extend(blocks);
        self.pump(now, residency, out);
    }

    /// Lands what waits for the source in vain: a guest's writes have completed the blocks.
    fn land_resident(&mut self, residency: &Residency, out: &mut Vec<Action<W>>) {
        for id in self.flights.unsent() {
            let done = self
                .flights
                .range(id)
                .is_some_and(|r| residency.all_resident(r));
            if done && let Some(flight) = self.flights.remove(id) {
                for waiter in flight.waiters {
                    self.one_landed(waiter, out);
                }
            }
        }
    }

    /// What a kept fetch or a zeroing brought is installed: the residency shows it.
    pub fn landed(
        &mut self,
        now: Duration,
        flight: FlightId,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let Some(done) = self.flights.remove(flight) else {
            return;
        };
        if done.purpose != Purpose::Zero {
            let bytes = self.geometry.bytes(done.range).len();
            let rtt = now.saturating_sub(done.sent_at);
            self.pacer
                .landed(now, rtt, bytes, done.purpose == Purpose::Bulk);
        }
        for id in done.waiters {
            self.one_landed(id, out);
        }
        self.pump(now, residency, out);
    }

    /// A fetch that may not be kept is done: its readers, to be answered from its data.
    pub fn landed_unkept(&mut self, flight: FlightId) -> Vec<W> {
        let Some(done) = self.flights.remove(flight) else {
            return Vec::new();
        };
        done.waiters
            .into_iter()
            .filter_map(|id| self.waiters.remove(&id))
            .map(|w| w.who)
            .collect()
    }

    /// A fetch came to nothing.
    pub fn failed(
        &mut self,
        now: Duration,
        flight: FlightId,
        why: FetchFailure,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let Some(mut lost) = self.flights.remove(flight) else {
            return;
        };
        if lost.purpose == Purpose::Bulk {
            self.pacer.lost(self.geometry.bytes(lost.range).len());
        }
        match why {
            FetchFailure::Disconnected => {
                // Nothing is launched now: the next tick does, so that a source that refuses at
                // once is not asked in a tight loop.
                if lost.waiters.is_empty() {
                    self.forget(residency, &lost);
                } else {
                    self.hold(now, lost);
                }
                return;
            }
            FetchFailure::Refused | FetchFailure::StoreFailed => {
                let why = match why {
                    FetchFailure::StoreFailed => ReadFailure::StoreFailed,
                    _ => ReadFailure::SourceRefused,
                };
                for id in std::mem::take(&mut lost.waiters) {
                    self.fail_waiter(id, why, out);
                }
                if lost.purpose != Purpose::PassThrough {
                    self.refuse(now, lost.range);
                    self.forget(residency, &lost);
                }
            }
        }
        self.pump(now, residency, out);
    }

    /// Keeps what readers wait for until it can be asked for again. A read that began before the
    /// handoff still passes through after it: it was there first, so it may show the disk of then.
    fn hold(&mut self, now: Duration, lost: Flight) {
        let purpose = match lost.purpose {
            Purpose::PassThrough => Purpose::PassThrough,
            _ => Purpose::Demand,
        };
        let flight = self
            .flights
            .insert(Flight::new(lost.range, purpose, now, false));
        for id in lost.waiters {
            self.flights.attach(flight, id);
        }
    }

    /// Lets the background find the blocks of a lost fetch again.
    fn forget(&mut self, residency: &Residency, lost: &Flight) {
        self.cursor = self.cursor.min(lost.range.start);
        for (run, state) in residency.runs(lost.range) {
            if state == BlockState::Partial {
                self.rests.extend((run.start..run.end).map(BlockIndex));
            }
        }
    }

    fn refuse(&mut self, now: Duration, range: BlockRange) {
        if self.refused.len() < MAX_REFUSED {
            self.refused.push((range, now + REFUSED_PAUSE));
        } else if let Some(last) = self.refused.last_mut() {
            // Too many to tell apart: leave the whole disk alone for a while.
            *last = (self.geometry.all(), now + REFUSED_PAUSE);
        }
    }

    /// The source answered a question for extents: `zeroes` are whole blocks that read as zero,
    /// within `range`; the rest of `range` is data. Call with the part that was really answered.
    pub fn extents(
        &mut self,
        now: Duration,
        range: BlockRange,
        zeroes: &[BlockRange],
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        self.scanning = false;
        if self.phase == Phase::Arriving && range.start <= self.scanned_to {
            self.scanned_to = self.scanned_to.max(range.end);
            for zero in zeroes {
                self.install_zeroes(now, *zero, residency, out);
            }
        }
        self.pump(now, residency, out);
    }

    /// The question for extents failed.
    pub fn extents_failed(
        &mut self,
        now: Duration,
        why: FetchFailure,
        range: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        self.scanning = false;
        if why == FetchFailure::Disconnected {
            // The next tick asks again: see `failed`.
            return;
        }
        if range.start <= self.scanned_to {
            // A source that cannot say is asked for the data.
            self.scanned_to = self.scanned_to.max(range.end);
        }
        self.pump(now, residency, out);
    }

    fn install_zeroes(
        &mut self,
        now: Duration,
        zero: BlockRange,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let step = self.blocks_in(ZERO_STEP_BYTES);
        let mut at = zero.start;
        while let Some(run) = self.next_free(at, zero.end, residency) {
            let range = BlockRange::new(run.start, run.end.min(run.start + step));
            self.launch(now, range, Purpose::Zero, out);
            at = range.end;
        }
    }

    /// The VM runs here from now on.
    pub fn handoff(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        if self.phase == Phase::Standby {
            self.phase = Phase::Arriving;
        }
        self.pump(now, residency, out);
    }

    /// Connections stand (again).
    pub fn source_up(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        self.connected = true;
        self.lost_at = None;
        self.pacer.restart();
        self.send_held(now, out);
        self.pump(now, residency, out);
    }

    fn send_held(&mut self, now: Duration, out: &mut Vec<Action<W>>) {
        for (flight, range, purpose) in self.flights.send_all(now) {
            out.push(action_for(flight, range, purpose));
        }
    }

    /// The last connection is gone. Fetches under way fail one by one besides.
    pub fn source_down(&mut self, now: Duration) {
        self.connected = false;
        self.lost_at.get_or_insert(now);
    }

    /// Stops the background copy; what is under way still lands.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Lets the background copy go on.
    pub fn resume(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        self.paused = false;
        self.pump(now, residency, out);
    }

    /// Caps the background copy, in bytes per second.
    pub fn set_limit(
        &mut self,
        now: Duration,
        bytes_per_s: Option<u64>,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        self.bucket.set_rate(now, bytes_per_s);
        self.pump(now, residency, out);
    }

    /// Time has passed: time-outs, the cap, and blocks that writes completed. To be called every
    /// [`Mover::TICK`] or so.
    pub fn tick(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        self.refused.retain(|(_, until)| *until > now);
        if self.phase == Phase::Arriving {
            self.land_resident(residency, out);
        }
        if self.connected {
            self.send_held(now, out);
        }
        if let (Some(limit), Some(lost_at)) = (self.policy.loss_timeout, self.lost_at) {
            let expired: Vec<u64> = self
                .waiters
                .iter()
                .filter(|(_, w)| now.saturating_sub(w.since.max(lost_at)) >= limit)
                .map(|(id, _)| *id)
                .collect();
            for id in expired {
                self.fail_waiter(id, ReadFailure::SourceLost, out);
            }
        }
        self.pump(now, residency, out);
    }

    /// How often [`Mover::tick`] should be called.
    pub const TICK: Duration = Duration::from_millis(20);

    /// Ends every wait; for a daemon that goes down.
    pub fn abandon(&mut self, out: &mut Vec<Action<W>>) {
        for (_, waiter) in self.waiters.drain() {
            out.push(Action::Fail(waiter.who, ReadFailure::SourceLost));
        }
    }

    /// Launches what may go now: rests, questions, bulk.
    fn pump(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        if self.phase != Phase::Arriving {
            return;
        }
        if residency.missing_blocks() == 0 {
            // Readers whose blocks a guest's writes completed need no fetch any more; those that
            // are under way still land and wake them.
            if self.waiters.is_empty() && !self.flights.any_zeroing() {
                self.phase = Phase::Complete;
                out.push(Action::Complete);
            }
            return;
        }
        if !self.connected {
            return;
        }
        self.pump_rests(now, residency, out);
        if self.paused || !self.policy.background {
            return;
        }
        self.pump_scan(out);
        self.pump_bulk(now, residency, out);
    }

    fn pump_rests(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        while self.flights.count(Purpose::Rest) < MAX_REST_FLIGHTS {
            let Some(block) = self.rests.pop_first() else {
                return;
            };
            let range = BlockRange::one(block);
            let wanted = residency.partial_mask(block).is_some();
            if wanted && self.flights.covering(range.start, range.end).is_none() {
                if self.is_refused(range) {
                    self.rests.insert(block);
                    return;
                }
                self.launch(now, range, Purpose::Rest, out);
            }
        }
    }

    fn pump_scan(&mut self, out: &mut Vec<Action<W>>) {
        let blocks = self.geometry.blocks();
        if !self.policy.has_extents {
            self.scanned_to = blocks;
        } else if !self.scanning && self.scanned_to < blocks {
            let end = blocks.min(self.scanned_to + self.blocks_in(EXTENTS_BYTES));
            self.scanning = true;
            out.push(Action::QueryExtents {
                range: BlockRange::new(self.scanned_to, end),
            });
        }
    }

    fn pump_bulk(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        let chunk = self.blocks_in(self.pacer.chunk_bytes());
        loop {
            if !self.pacer.may_send() || !self.bucket.has_room(now) {
                return;
            }
            let Some(range) = self.next_bulk(chunk, residency) else {
                return;
            };
            let bytes = self.geometry.bytes(range).len();
            self.pacer.sent(bytes);
            self.bucket.take(bytes);
            self.cursor = range.end;
            self.launch(now, range, Purpose::Bulk, out);
        }
    }

    /// The next chunk in the order of the disk, wrapping around once for what failed earlier.
    fn next_bulk(&mut self, chunk: u64, residency: &Residency) -> Option<BlockRange> {
        for _ in 0..2 {
            let mut at = self.cursor;
            while let Some(run) = self.next_free(at, self.scanned_to, residency) {
                // Chunks end at multiples of their size, so that neighbours stay whole.
                let end = run.end.min((run.start / chunk + 1) * chunk);
                let range = BlockRange::new(run.start, end);
                if !self.is_refused(range) {
                    return Some(range);
                }
                at = range.end;
            }
            if self.scanned_to < self.geometry.blocks() || self.cursor == 0 {
                return None;
            }
            self.cursor = 0;
        }
        None
    }

    /// The next run from `at` on, before `end`, that is missing and not in flight.
    fn next_free(&self, at: u64, end: u64, residency: &Residency) -> Option<BlockRange> {
        let mut at = at;
        while at < end {
            let run = residency.next_missing(at, end)?;
            match self.flights.covering(run.start, run.end) {
                Some((_, flying)) if flying.start <= run.start => at = flying.end,
                Some((_, flying)) => return Some(BlockRange::new(run.start, flying.start)),
                None => return Some(run),
            }
        }
        None
    }

    fn is_refused(&self, range: BlockRange) -> bool {
        self.refused.iter().any(|(r, _)| r.overlaps(range))
    }

    fn one_landed(&mut self, id: u64, out: &mut Vec<Action<W>>) {
        if let Some(waiter) = self.waiters.get_mut(&id) {
            waiter.outstanding = waiter.outstanding.saturating_sub(1);
            self.wake_if_ready(id, out);
        }
    }

    fn wake_if_ready(&mut self, id: u64, out: &mut Vec<Action<W>>) {
        if self.waiters.get(&id).is_some_and(|w| w.outstanding == 0)
            && let Some(waiter) = self.waiters.remove(&id)
        {
            out.push(Action::Wake(waiter.who));
        }
    }

    fn fail_waiter(&mut self, id: u64, why: ReadFailure, out: &mut Vec<Action<W>>) {
        if let Some(waiter) = self.waiters.remove(&id) {
            self.flights.detach(id, waiter.range);
            out.push(Action::Fail(waiter.who, why));
        }
    }

    fn blocks_in(&self, bytes: u64) -> u64 {
        (bytes / self.geometry.block_bytes()).max(1)
    }
}

fn action_for<W>(flight: FlightId, range: BlockRange, purpose: Purpose) -> Action<W> {
    match purpose {
        Purpose::Zero => Action::InstallZero { flight, range },
        Purpose::Bulk => Action::Fetch {
            flight,
            range,
            lane: Lane::Bulk,
            keep: true,
        },
        Purpose::Demand | Purpose::Rest => Action::Fetch {
            flight,
            range,
            lane: Lane::Demand,
            keep: true,
        },
        Purpose::PassThrough => Action::Fetch {
            flight,
            range,
            lane: Lane::Demand,
            keep: false,
        },
    }
}

/// The missing runs of `range`, those with a small gap between them joined.
fn missing_runs(geometry: Geometry, residency: &Residency, range: BlockRange) -> Vec<BlockRange> {
    let gap = MERGE_GAP_BYTES / geometry.block_bytes();
    let mut runs: Vec<BlockRange> = Vec::new();
    let mut at = range.start;
    while let Some(run) = residency.next_missing(at, range.end) {
        at = run.end;
        match runs.last_mut() {
            Some(last) if run.start - last.end <= gap => last.end = run.end,
            _ => runs.push(run),
        }
    }
    runs
}
