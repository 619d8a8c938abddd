//! What to fetch, in which order, and who waits for it.
//!
//! The [`Mover`] is the one owner of a relocation's state. Events are method calls that carry the
//! time; what is to be done comes back as [`Action`]s. It does no I/O and holds no data, so that a
//! seeded test can drive every interleaving. Callers keep it behind a lock, call it for a moment,
//! and carry the actions out after the lock is released. The same events give the same actions in
//! the same order: nothing is told in the order of a hash map.
//!
//! It must never be told that a fetch landed before the residency shows it: a read that comes in
//! between looks there first.

mod ahead;
mod background;
#[cfg(all(test, not(loom)))]
mod background_tests;
mod bucket;
mod cap;
#[cfg(all(test, not(loom)))]
mod cap_tests;
mod check;
mod failures;
mod flights;
mod order;
mod pacer;
mod path;
#[cfg(all(test, not(loom)))]
mod path_tests;
mod readers;
mod rests;
#[cfg(all(test, not(loom)))]
mod rests_tests;
mod scan;
mod seeds;
#[cfg(all(test, not(loom)))]
mod seeds_tests;
#[cfg(all(test, not(loom)))]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::geometry::{BlockRange, ByteRange, Geometry};
use crate::residency::Residency;

use ahead::Streams;
pub(crate) use cap::Allowance;
pub use cap::Cap;
pub use flights::FlightId;
use flights::{Flight, Flights, Purpose};
pub use order::CopyOrder;
pub use pacer::{PathSeen, REQUESTS_IN_WINDOW};
pub use path::Path;
pub(crate) use path::Seat;
use readers::Waiter;
use rests::Rests;
use scan::Scan;
pub use seeds::SeedStep;
use seeds::Seeds;

/// Two missing runs with at most this much resident data between them are fetched as one: the
/// data costs less time on the wire than a further request costs at both ends.
const MERGE_GAP_BYTES: u64 = 16 << 10;

/// The longest single fetch. Longer demand reads become several, which land independently.
const MAX_FETCH_BYTES: u64 = 1 << 20;

/// The most blocks of zeroes that are installed in one step: bounds how long the range is locked.
const ZERO_STEP_BYTES: u64 = 64 << 20;

/// How long a range that the source or the local store refused is left alone by the background.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

/// How long the background copy rests after the local store could not take what was fetched. Its
/// disk is full, most likely: whatever else were fetched would be thrown away as well.
const STORE_PAUSE: Duration = Duration::from_secs(5);

/// The most refused ranges remembered; beyond it the background as a whole rests.
const MAX_REFUSED: usize = 1024;

/// How urgent a fetch is, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// A guest waits for it.
    Demand,
    /// The rest of a partially written block.
    Rest,
    /// A guest will likely ask for it soon. It must not hold demand up.
    Ahead,
    /// The background copy of what is read often.
    Hot,
    /// The background copy.
    Bulk,
    /// The background copy of what is likely to be overwritten before anyone reads it.
    Late,
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
    /// It was cancelled ([`Action::Cancel`]).
    Cancelled,
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
    /// A reader waits for these blocks of a fetch now: it is as urgent as demand.
    Promote {
        /// The blocks, all of the fetch.
        range: BlockRange,
    },
    /// These blocks, all of a fetch, are wanted no more. It may come all the same, or fail as cancelled.
    Cancel {
        /// The blocks.
        range: BlockRange,
        /// The queue that they were asked for in.
        lane: Lane,
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
    /// The handoff is asked for, and what is fetched without a reader is set aside by whoever carries that out, until it is
    /// answered. Reads pass through, as before.
    HandingOver,
    /// After it.
    Arriving,
    /// Everything is here.
    Complete,
}

impl Phase {
    /// Whether the handoff is still to come, and reads are answered by the source alone.
    pub fn passes_through(self) -> bool {
        matches!(self, Self::Standby | Self::HandingOver)
    }
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
    /// The source has what is missing here and nothing else: not a block more is asked for.
    pub exact: bool,
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
    /// How much may be in flight.
    pacer: Arc<Seat>,
    bucket: Arc<Allowance>,
    /// Where the background copy looks next.
    order: CopyOrder,
    /// What is read sequentially.
    streams: Streams,
    /// Which holes and zeroes are known, and what is being asked.
    scan: Scan,
    /// When the rests of partly written blocks are fetched.
    rests: Rests,
    /// Ranges the background leaves alone, and until when.
    refused: Vec<(BlockRange, Duration)>,
    /// The local store could not take a fetch: until when nothing is fetched that nobody waits
    /// for. After that a single fetch tries it, and only when it lands do others follow.
    store_rests_until: Option<Duration>,
    /// The local medium has more to write than is good for whoever flushes.
    store_is_behind: bool,
    /// What the background copy leaves alone because a seed image may have it.
    seeds: Option<Seeds>,
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
            pacer: Arc::new(Seat::alone()),
            bucket: Arc::new(Allowance::new(policy.max_rate)),
            order: CopyOrder::default(),
            streams: Streams::new(),
            scan: Scan::new(geometry, policy.has_extents),
            rests: Rests::default(),
            refused: Vec::new(),
            store_rests_until: None,
            store_is_behind: false,
            seeds: None,
        }
    }

    /// Its bytes come over a link that other disks use, too. `behind`: by how much its clock is
    /// behind the one that is common to all.
    pub fn share(&mut self, path: &Arc<Path>, behind: Duration) {
        self.pacer.move_to(path, behind);
    }

    /// A cap holds for what it and other disks copy in the background together. `behind` as for
    /// [`Mover::share`].
    pub fn share_cap(&mut self, cap: &Arc<Cap>, behind: Duration) {
        self.bucket.share(cap, behind);
    }

    /// Its place at the link, and what it may copy: for what is copied before the handoff.
    pub(crate) fn on_link(&self) -> (Arc<Seat>, Arc<Allowance>) {
        (Arc::clone(&self.pacer), Arc::clone(&self.bucket))
    }

    /// The source sends no more than fills the link, whatever it is asked for; or it does not.
    pub fn source_paces(&mut self, paces: bool) {
        self.pacer.source_paces(paces);
    }

    /// TCP tells how the path to the source is.
    pub fn path_is_seen(&mut self, now: Duration, seen: Option<PathSeen>) {
        self.pacer.sees(now, seen);
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

    /// The cap on what it and others copy together, bytes per second.
    pub fn common_limit(&self) -> Option<u64> {
        self.bucket.common_rate()
    }

    /// Whether the background rests because the local store could not take what was fetched.
    pub fn store_rests(&self) -> bool {
        self.store_rests_until.is_some()
    }

    /// Whether the local medium has so much to write that the background copy is to wait for it. To be
    /// told before time passes and before something lands.
    pub fn store_is_behind(&mut self, behind: bool) {
        self.store_is_behind = behind;
    }

    /// Since when the source is away, while it is.
    pub fn lost_at(&self) -> Option<Duration> {
        self.lost_at
    }

    /// Readers that wait.
    pub fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// Ranges that the background leaves alone for now because they were refused.
    pub fn refused(&self) -> usize {
        self.refused.len()
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
            self.send(flight, range, purpose, out);
        }
        flight
    }

    fn send(
        &mut self,
        flight: FlightId,
        range: BlockRange,
        purpose: Purpose,
        out: &mut Vec<Action<W>>,
    ) {
        if purpose.is_paced() {
            self.pacer.sent(self.geometry.bytes(range).len());
        }
        out.push(action_for(flight, range, purpose));
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

    /// Takes back what guests have written meanwhile, and, unless the background copy wants it anyway,
    /// what was fetched ahead for streams that have ended.
    fn cancel_unwanted(
        &mut self,
        dropped: &[ByteRange],
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let copies = self.policy.background && !self.paused;
        let dropped: Vec<BlockRange> = dropped
            .iter()
            .filter(|_| !copies)
            .map(|bytes| self.geometry.covering(*bytes))
            .collect();
        let unwanted = self.flights.cancel(|range, purpose| {
            let ahead = purpose == Purpose::Ahead;
            residency.all_resident(range) || ahead && dropped.iter().any(|d| d.overlaps(range))
        });
        for (range, purpose) in unwanted {
            let lane = lane_of(purpose);
            out.push(Action::Cancel { range, lane });
        }
    }

    /// What a kept fetch or a zeroing brought is installed: the residency shows it. `wire_bytes` of it
    /// crossed the link.
    pub fn landed(
        &mut self,
        now: Duration,
        flight: FlightId,
        wire_bytes: u64,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        let Some(done) = self.flights.remove(flight) else {
            return;
        };
        if done.purpose != Purpose::Zero {
            self.store_rests_until = None;
        }
        if done.is_charged() {
            let bytes = self.geometry.bytes(done.range).len();
            let rtt = now.saturating_sub(done.sent_at);
            self.pacer.landed(now, rtt, bytes, wire_bytes);
        }
        for id in done.waiters {
            self.one_landed(id, out);
        }
        if done.purpose == Purpose::Rest {
            self.rest_landed(now, residency, out);
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

    /// The handoff is about to be asked for: what it would ask for then goes with it.
    pub fn ask_early(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        if self.phase == Phase::Standby {
            self.phase = Phase::HandingOver;
        }
        self.pump(now, residency, out);
    }

    /// The VM runs here from now on.
    pub fn handoff(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        if self.phase.passes_through() {
            self.phase = Phase::Arriving;
            self.seeds_may_move(now);
            if self.policy.exact {
                self.settle_passing(now, residency, out);
            }
        }
        self.pump(now, residency, out);
    }

    /// Connections stand (again).
    pub fn source_up(&mut self, now: Duration, residency: &Residency, out: &mut Vec<Action<W>>) {
        self.connected = true;
        self.lost_at = None;
        self.pacer.restart(now);
        self.seeds_may_move(now);
        self.send_held(now, out);
        self.pump(now, residency, out);
    }

    fn send_held(&mut self, now: Duration, out: &mut Vec<Action<W>>) {
        for (flight, range, purpose) in self.flights.send_all(now) {
            self.send(flight, range, purpose, out);
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
        self.seeds_may_move(now);
        self.pump(now, residency, out);
    }

    /// The order of the background copy from here on; without one it goes along the disk.
    pub fn set_order(
        &mut self,
        now: Duration,
        order: CopyOrder,
        residency: &Residency,
        out: &mut Vec<Action<W>>,
    ) {
        self.order.replace(order);
        self.scan.order_changed();
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
        let dropped = self.streams.expire(now, self.pacer.base());
        let order = &mut self.order;
        self.refused.retain(|(range, until)| {
            if *until <= now {
                order.revisit(*range);
            }
            *until > now
        });
        if self.phase == Phase::Arriving {
            self.land_resident(residency, out);
            self.cancel_unwanted(&dropped, residency, out);
        }
        if self.connected {
            self.send_held(now, out);
        }
        if let (Some(limit), Some(lost_at)) = (self.policy.loss_timeout, self.lost_at) {
            let mut expired: Vec<u64> = self
                .waiters
                .iter()
                .filter(|(_, w)| now.saturating_sub(w.since.max(lost_at)) >= limit)
                .map(|(id, _)| *id)
                .collect();
            expired.sort_unstable();
            for id in expired {
                self.fail_waiter(id, ReadFailure::SourceLost, out);
            }
        }
        self.fetch_rests(now, residency, out);
        self.pump(now, residency, out);
    }

    /// How often [`Mover::tick`] should be called.
    pub const TICK: Duration = Duration::from_millis(20);

    /// Ends every wait; for a daemon that goes down.
    pub fn abandon(&mut self, out: &mut Vec<Action<W>>) {
        let mut waiters: Vec<_> = self.waiters.drain().collect();
        waiters.sort_unstable_by_key(|(id, _)| *id);
        for (_, waiter) in waiters {
            out.push(Action::Fail(waiter.who, ReadFailure::SourceLost));
        }
        self.streams.clear();
    }

    fn blocks_in(&self, bytes: u64) -> u64 {
        (bytes / self.geometry.block_bytes()).max(1)
    }
}

fn action_for<W>(flight: FlightId, range: BlockRange, purpose: Purpose) -> Action<W> {
    match purpose {
        Purpose::Zero => Action::InstallZero { flight, range },
        _ => Action::Fetch {
            flight,
            range,
            lane: lane_of(purpose),
            keep: purpose != Purpose::PassThrough,
        },
    }
}

/// The queue that a fetch goes into.
fn lane_of(purpose: Purpose) -> Lane {
    match purpose {
        Purpose::Demand | Purpose::PassThrough | Purpose::Zero => Lane::Demand,
        Purpose::Rest => Lane::Rest,
        Purpose::Ahead => Lane::Ahead,
        Purpose::Hot => Lane::Hot,
        Purpose::Bulk => Lane::Bulk,
        Purpose::Late => Lane::Late,
    }
}
