//! What the connections of a source have in common.
//!
//! Owns which connections stand, what every one of them must agree on, and the order in which
//! the watcher hears of it. It must never call a completion or the watcher itself: that is the
//! herald's, who is given the news under the lock, so that their order is the order of events.

use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hikkoshi_engine::mover::PathSeen;
use hikkoshi_nbd::client::Negotiated;
use hikkoshi_nbd::wire::export;
use socket2::Socket;

use super::address::NbdSourceConfig;
use super::choice::{Busy, Quiet, overloaded, quickest};
use super::coding::{Coding, Lately};
use super::dial::{Dialed, Manners};
use super::herald::{News, Untold, WatcherSlot};
use super::job::Job;
use super::line::Line;
use super::replies::Others;
use crate::source::{Lane, SourceError, SourceErrorKind, SourceInfo};
use crate::tcp::{is_queue, since_epoch};

/// How long a connection that has shaken hands waits for another that was to be the first and has not:
/// both were dialled at the same time, but a packet may have been lost.
const LEAD_WAIT: Duration = Duration::from_secs(1);

/// How often it is looked whether one connection has far more to bring than the others.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Shared by the source, its keepers and their connections.
pub(super) struct Shared {
    pub(super) config: NbdSourceConfig,
    pub(super) uri: String,
    pub(super) watcher: WatcherSlot,
    pub(super) manners: Manners,
    herald: Sender<News>,
    /// News of connections that the watcher has not heard.
    untold: Arc<AtomicUsize>,
    /// Tells sources apart in thread-local marks.
    pub(super) id: u64,
    /// Connections that were given up because bytes were changed on their way.
    checksum_failures: AtomicU64,
    /// Of connections that are gone: bytes that were not sent because they were cancelled.
    cancelled_bytes: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
    /// See [`Others::moving`].
    moving: Mutex<()>,
}

struct State {
    /// What every connection must agree with.
    info: SourceInfo,
    /// The first attempts of a source of which nothing is known yet: no info counts before one of
    /// them stands.
    opening: Option<Opening>,
    /// Places that have a keeper.
    seats: usize,
    /// Who is to be the first to stand, while none does.
    lead: Option<Lead>,
    lines: Vec<Option<Arc<Line>>>,
    dialing: Vec<Option<Arc<Socket>>>,
    standing: usize,
    quiet: Quiet,
    /// When it was looked last whether one connection has far more to bring than the others.
    looked_at: Option<Instant>,
    /// Grows when the first connection stands and when the last is lost: whoever pauses because of
    /// how things were looks again.
    epoch: u64,
    /// That the wrong disk answers was told already.
    told_differs: bool,
    threads: usize,
    closed: bool,
}

/// Whoever asks the source whether it may be read from, for all.
#[derive(Clone, Copy, Debug)]
struct Lead {
    keeper: usize,
    /// It has shaken hands, and waits for the answer.
    asks: bool,
}

/// How the first attempts go.
#[derive(Debug)]
struct Opening {
    pending: usize,
    error: Option<SourceError>,
}

/// How a connection that has shaken hands comes to stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// None stands: the source is asked first whether it may be read from.
    First,
    /// Beside others: it goes to work at once.
    Beside,
    /// The source was closed meanwhile.
    Closed,
}

/// What became of a fresh connection.
pub(super) enum Installed {
    /// It stands.
    Yes,
    /// The source was closed meanwhile.
    Closed,
    /// Another disk answered than before.
    Differs(SourceError),
}

/// What a handshake says of a source.
pub(super) fn info_of(uri: &str, negotiated: &Negotiated) -> SourceInfo {
    SourceInfo {
        size_bytes: negotiated.size_bytes,
        read_only: negotiated.flags & export::READ_ONLY != 0,
        can_multi_conn: negotiated.flags & export::CAN_MULTI_CONN != 0,
        has_extents: negotiated.allocation_context.is_some(),
        can_flush: negotiated.transport || negotiated.flags & export::SEND_FLUSH != 0,
        min_block_bytes: negotiated.block_sizes.min,
        max_read_bytes: negotiated.block_sizes.max,
        uri: uri.to_owned(),
    }
}

impl State {
    fn take_seat(&mut self) -> Option<usize> {
        let seat = self.seats;
        if seat == self.lines.len() {
            return None;
        }
        self.seats += 1;
        Some(seat)
    }

    /// The connections that take requests, of those that `may`.
    fn alive(&self, may: impl Fn(&Line) -> bool) -> Vec<&Arc<Line>> {
        let lines = self.lines.iter().flatten();
        lines.filter(|line| line.is_alive() && may(line)).collect()
    }

    fn is_led_by(&self, keeper: usize) -> bool {
        self.lead.is_some_and(|lead| lead.keeper == keeper)
    }
}

impl Shared {
    /// `info`: what the disk is known to be; else the first connection says it.
    pub(super) fn new(
        config: NbdSourceConfig,
        info: Option<SourceInfo>,
        watcher: WatcherSlot,
        herald: Sender<News>,
        id: u64,
    ) -> Arc<Self> {
        let connections = config.connections;
        let uri = config.shown_uri();
        let opening = info.is_none().then_some(Opening {
            pending: 0,
            error: None,
        });
        // Nobody sees it before one stands.
        let nothing = || SourceInfo {
            size_bytes: 0,
            read_only: false,
            can_multi_conn: false,
            has_extents: false,
            can_flush: false,
            min_block_bytes: 1,
            max_read_bytes: 1,
            uri: uri.clone(),
        };
        let info = info.unwrap_or_else(nothing);
        Arc::new(Self {
            uri,
            config,
            watcher,
            manners: Manners::default(),
            herald,
            untold: Arc::default(),
            id,
            checksum_failures: AtomicU64::new(0),
            cancelled_bytes: AtomicU64::new(0),
            state: Mutex::new(State {
                info,
                opening,
                seats: 0,
                lead: None,
                lines: vec![None; connections],
                // One more may be dialled for what is said of the move.
                dialing: vec![None; connections + 1],
                standing: 0,
                quiet: Quiet::default(),
                looked_at: None,
                epoch: 0,
                told_differs: false,
                threads: 0,
                closed: false,
            }),
            changed: Condvar::new(),
            moving: Mutex::default(),
        })
    }

    /// A number that no other source in this process has.
    pub(super) fn fresh_id() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands news to the herald.
    pub(super) fn tell(&self, news: News) {
        // The herald ends only after the last sender, and we are one.
        let _ = self.herald.send(news);
    }

    /// The last connection is gone, or what answers is not to be believed. Under the lock.
    fn tell_down(&self, error: &SourceError) {
        self.tell(News::Down(error.clone(), Untold::of(&self.untold)));
    }

    /// Whether the watcher has heard of what stands now.
    fn all_is_told(&self) -> bool {
        self.untold.load(Ordering::SeqCst) == 0
    }

    pub(super) fn info(&self) -> SourceInfo {
        self.state().info.clone()
    }

    pub(super) fn count_checksum_failure(&self) {
        self.checksum_failures.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn checksum_failures(&self) -> u64 {
        self.checksum_failures.load(Ordering::Relaxed)
    }

    /// Whether the connections that stand speak frames.
    pub(super) fn speaks_frames(&self) -> bool {
        let state = self.state();
        let mut alive = state.lines.iter().flatten().filter(|line| line.is_alive());
        alive.next().is_some_and(|line| line.speaks_frames())
    }

    /// How many connections take requests: none that the watcher takes for others.
    pub(super) fn serving(&self) -> usize {
        let standing = self.standing();
        if self.all_is_told() { standing } else { 0 }
    }

    /// How many connections stand.
    pub(super) fn standing(&self) -> usize {
        let state = self.state();
        if state.closed {
            return 0;
        }
        state
            .lines
            .iter()
            .flatten()
            .filter(|line| line.is_alive())
            .count()
    }

    /// So many connections are dialled for the first time, all at once.
    pub(super) fn begin_opening(&self, attempts: usize) {
        if let Some(opening) = &mut self.state().opening {
            opening.pending = attempts;
        }
    }

    /// Waits until one of the first attempts stands, or all have failed.
    pub(super) fn wait_until_open(&self) -> Result<(), SourceError> {
        let mut state = self.state();
        loop {
            match &state.opening {
                None => return Ok(()),
                Some(Opening {
                    pending: 0,
                    error: Some(error),
                }) => return Err(error.clone()),
                Some(_) => {}
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One of the first attempts failed, or (`None`) will not stand because enough others may. Once
    /// one stands nobody asks any more.
    pub(super) fn attempt_over(&self, failed: Option<&SourceError>) {
        let mut state = self.state();
        if let Some(opening) = &mut state.opening {
            opening.pending = opening.pending.saturating_sub(1);
            opening.error = opening.error.take().or_else(|| failed.cloned());
            self.changed.notify_all();
        }
    }

    /// A place to keep a connection in, right after its first handshake; `None`: as many as are wanted
    /// have a keeper, or will have.
    pub(super) fn take_seat(&self, keeper: usize) -> Option<usize> {
        let mut state = self.state();
        // The one that leads must not be without a place: it is to be the first that stands.
        let waited_for = state.lead.is_some_and(|l| l.keeper != keeper && !l.asks);
        let last = state.seats + 1 == state.lines.len();
        if waited_for && last && state.opening.is_some() {
            return None;
        }
        state.take_seat()
    }

    /// Whether a connection, connected a moment ago, is to say for all which move they are for.
    pub(super) fn take_lead(&self, keeper: usize) -> bool {
        let mut state = self.state();
        if state.is_led_by(keeper) {
            // It was dialled once more.
            return true;
        }
        let leads = state.standing == 0 && state.lead.is_none() && !state.closed;
        let asks = false;
        if leads && self.config.frames && self.config.ticket.is_some() {
            state.lead = Some(Lead { keeper, asks });
            return true;
        }
        false
    }

    /// The same, once one of the first attempts stands; `None` also when the source is closed.
    pub(super) fn wait_for_seat(&self) -> Option<usize> {
        let mut state = self.state();
        while !state.closed && state.opening.is_some() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return None;
        }
        state.take_seat()
    }

    /// Waits until it is known how a connection that has shaken hands comes to stand. Over plain NBD
    /// nothing is asked, and whoever leads may never be admitted.
    pub(super) fn wait_to_stand(&self, keeper: usize, frames: bool) -> Turn {
        let deadline = Instant::now() + LEAD_WAIT;
        let mut state = self.state();
        loop {
            if state.closed {
                return Turn::Closed;
            }
            if state.standing > 0 {
                return Turn::Beside;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let (wait, may_lead) = match state.lead {
                None => (None, true),
                Some(lead) if lead.keeper == keeper => (None, true),
                Some(lead) if !lead.asks => (Some(left), !frames || left.is_zero()),
                Some(_) => (None, false),
            };
            if may_lead {
                let asks = true;
                state.lead = Some(Lead { keeper, asks });
                return Turn::First;
            }
            state = match wait {
                Some(wait) => {
                    let waited = self.changed.wait_timeout(state, wait);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    /// Whoever was to be the first stands, or does not.
    pub(super) fn has_led(&self, keeper: usize) {
        let mut state = self.state();
        if state.is_led_by(keeper) {
            state.lead = None;
        }
        self.changed.notify_all();
    }

    /// None of those that were dialled first will be left for what there is to say of the move.
    pub(super) fn has_no_spare(&self) {
        if let Some(ticket) = &self.config.ticket {
            ticket.has_no_spare();
        }
    }

    /// A connection more than are wanted to read over, of those that were dialled first: kept for
    /// what there is to say of the move, if the source understands that.
    pub(super) fn keep_spare(&self, keeper: usize, dialed: Dialed) {
        self.attempt_over(None);
        let stands = {
            let mut state = self.state();
            while !state.closed && state.standing == 0 {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            // It may be needed for longer than the source.
            state.dialing[keeper] = None;
            !state.closed
        };
        let negotiated = &dialed.negotiated;
        let usable = stands && negotiated.transport && !negotiated.opened;
        match &self.config.ticket {
            Some(ticket) if usable => ticket.keep_spare(dialed),
            _ => {
                self.has_no_spare();
                dialed.into_line(&self.config, None).disconnect();
            }
        }
    }

    /// Waits until a connection may be dialled for `seat`: the first at any time, the others only
    /// beside one that stands, and to a server that promises a coherent disk. `false`: closed.
    pub(super) fn wait_for_turn(&self, seat: usize) -> bool {
        let mut state = self.state();
        loop {
            let several = state.info.can_multi_conn || self.config.several_without_promise;
            if state.closed || seat == 0 || (state.standing > 0 && several) {
                return !state.closed;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a job to the best connection, or fails it.
    pub(super) fn dispatch(&self, mut job: Job) {
        while let Some(line) = self.pick(&job) {
            match line.submit(job) {
                Ok(()) => return,
                Err(back) if line.is_alive() => {
                    let error = SourceError::new(
                        SourceErrorKind::Refused,
                        "too many requests wait on one connection",
                    );
                    return self.tell(News::Failed(vec![back], error));
                }
                Err(back) => job = back,
            }
        }
        let error = SourceError::new(
            SourceErrorKind::Disconnected,
            format!("{}: not connected", self.uri),
        );
        self.tell(News::Failed(vec![job], error));
    }

    /// The connection on which it would be answered first; bulk leaves the first one to demand. Over
    /// frames it is lent while nobody demands anything: there the source sends what is urgent before
    /// what it was asked for earlier.
    fn pick(&self, job: &Job) -> Option<Arc<Line>> {
        let lane = job.lane;
        let mut state = self.state();
        // Another disk may answer by now: whether it is the right one is asked by who hears the news.
        if state.closed || !self.all_is_told() {
            return None;
        }
        let now = Instant::now();
        let lent = state.quiet.note(lane, now);
        // Looked at once: a connection may die at any time.
        let alive = state.alive(|line| line.speaks_frames() || !job.needs_frames());
        if lane.is_urgent() {
            return alive
                .iter()
                .min_by_key(|line| line.load(lane))
                .map(|line| Arc::clone(line));
        }
        let lines = &alive[spared(&alive, lent)..];
        let busy: Vec<Busy> = lines.iter().map(|line| line.busy(lane, now)).collect();
        let index = quickest(&busy, job.offset, job.len)?;
        lines.get(index).map(|line| Arc::clone(line))
    }

    /// Has others bring what a connection was asked for and would bring much later. It may have become slow since, by what it
    /// lost or by what else goes its way; and others would be idle meanwhile, for nothing more is asked for until that has come.
    pub(super) fn level(&self) {
        let now = Instant::now();
        let (line, bytes) = {
            let mut state = self.state();
            let looked = state.looked_at;
            if looked.is_some_and(|at| now.saturating_duration_since(at) < LOOK_EVERY) {
                return;
            }
            state.looked_at = Some(now);
            let lent = state.quiet.is_long(now);
            let alive = state.alive(|_| true);
            let all = alive.iter().map(|line| line.busy(Lane::Late, now));
            let busy: Vec<Busy> = all.collect();
            let Some((index, bytes)) = overloaded(&busy, spared(&alive, lent)) else {
                return;
            };
            (Arc::clone(alive[index]), bytes)
        };
        let _moving = self.moving();
        for job in line.relieve(bytes) {
            self.dispatch(job);
        }
    }

    /// How the path is, by what is under way over it; see [`Source::path`](crate::Source::path). Not where demand would
    /// stand behind all that is asked for.
    pub(super) fn path(&self) -> Option<PathSeen> {
        let lines: Vec<_> = self.state().alive(|_| true).into_iter().cloned().collect();
        // Over frames demand stands behind nothing.
        let passes = lines.iter().any(|line| line.speaks_frames());
        if lines.len() < 2 && !passes {
            return None;
        }
        let (mut base, mut trip, mut out_of_order) = (None, None, 0);
        for (index, line) in lines.iter().enumerate() {
            let told = line.wire.tcp()?;
            out_of_order += u64::from(told.out_of_order?);
            base = base.into_iter().chain(told.shortest_round_trip).min();
            // What the one for demand tells may be of long ago.
            let tells = (index > 0 || passes) && line.waiting_since().is_some();
            trip = trip
                .into_iter()
                .chain(tells.then_some(told.round_trip))
                .min();
        }
        let (base, trip) = (base?, trip?);
        Some(PathSeen {
            // What is asked for over frames waits there, and not on the path.
            queue: is_queue(trip, base) && !passes,
            trip,
            out_of_order,
            since_epoch: since_epoch(),
        })
    }

    /// Makes bulk reads of this range urgent, on whichever connection they are.
    pub(super) fn promote(&self, offset: u64, len: u64) {
        let _moving = self.moving();
        let lines: Vec<_> = self.state().lines.iter().flatten().cloned().collect();
        for line in lines {
            line.promote(offset, len);
        }
    }

    /// Takes reads back, on whichever connection they are.
    pub(super) fn cancel(&self, lane: Lane, offset: u64, len: u64) {
        let _moving = self.moving();
        let lines: Vec<_> = self.state().lines.iter().flatten().cloned().collect();
        for line in lines {
            let unsent = line.cancel(lane, offset, len);
            if !unsent.is_empty() {
                let error = SourceError::new(SourceErrorKind::Cancelled, "cancelled");
                self.tell(News::Failed(unsent, error));
            }
        }
    }

    /// Bytes that were asked for and, being cancelled, not sent.
    pub(super) fn cancelled_bytes(&self) -> u64 {
        let state = self.state();
        let lines = state.lines.iter().flatten();
        let now: u64 = lines.map(|line| line.cancelled_bytes()).sum();
        now + self.cancelled_bytes.load(Ordering::Relaxed)
    }

    /// How data came lately, over what is connected.
    pub(super) fn coding(&self) -> Option<Coding> {
        let state = self.state();
        let lines = state.lines.iter().flatten();
        let all = lines.map(|line| line.lately());
        all.fold(Lately::default(), Lately::and).mostly()
    }

    /// Remembers a socket being connected, so that closing can interrupt it; `false`: closed.
    pub(super) fn dialing(&self, keeper: usize, socket: &Arc<Socket>) -> bool {
        let mut state = self.state();
        if !state.closed {
            state.dialing[keeper] = Some(Arc::clone(socket));
        }
        !state.closed
    }

    /// What a keeper has dialled is somebody else's to interrupt, or gone.
    pub(super) fn dialed(&self, keeper: usize) {
        self.state().dialing[keeper] = None;
    }

    /// Puts a fresh connection to work, if it leads to the same disk. The watcher hears of the
    /// first one, but for the very first of all.
    pub(super) fn install(&self, slot: usize, line: &Arc<Line>) -> Installed {
        let mut state = self.state();
        if state.closed {
            line.disconnect();
            return Installed::Closed;
        }
        let fresh = info_of(&self.uri, &line.negotiated);
        // Requests are cut for the block sizes known; they may change only while nothing stands.
        let same_sizes = fresh.min_block_bytes == state.info.min_block_bytes
            && fresh.max_read_bytes == state.info.max_read_bytes;
        let same = if state.opening.is_some() {
            true
        } else if state.standing == 0 {
            fresh.may_succeed(&state.info)
        } else {
            let same_tongue = state
                .lines
                .iter()
                .flatten()
                .all(|other| other.speaks_frames() == line.speaks_frames());
            same_disk(&fresh, &state.info) && same_sizes && same_tongue
        };
        // Two keepers may have dialled the first connection at once: the promise is asked again.
        let several = fresh.can_multi_conn || self.config.several_without_promise;
        if !same || (state.standing > 0 && !several) {
            line.disconnect();
            return Installed::Differs(self.differs(&mut state, &fresh, same));
        }
        if state.standing == 0 {
            state.info = fresh;
            state.epoch += 1;
            state.told_differs = false;
            if state.opening.take().is_none() {
                self.tell(News::Up(Untold::of(&self.untold)));
            }
            self.changed.notify_all();
        }
        state.lines[slot] = Some(Arc::clone(line));
        state.standing += 1;
        Installed::Yes
    }

    /// What answers is not to be believed: says so once, if it is all there is.
    pub(super) fn tell_untrusted(&self, error: &SourceError) {
        let mut state = self.state();
        if state.standing == 0 && !state.closed && !state.told_differs {
            state.told_differs = true;
            self.tell_down(error);
        }
    }

    /// Another disk answered: says so once, if it is all there is.
    fn differs(&self, state: &mut State, fresh: &SourceInfo, same: bool) -> SourceError {
        let (kind, message) = if same {
            let message = format!("{}: it promises nothing about a second client", self.uri);
            (SourceErrorKind::Refused, message)
        } else {
            let message = format!(
                "{}: another disk answers than before ({} bytes, read-only: {}, extents: {}; \
                 it was {} bytes, {}, {}); serve the right one there again",
                self.uri,
                fresh.size_bytes,
                fresh.read_only,
                fresh.has_extents,
                state.info.size_bytes,
                state.info.read_only,
                state.info.has_extents,
            );
            (SourceErrorKind::Untrusted, message)
        };
        let error = SourceError::new(kind, message);
        if !same && state.standing == 0 && !state.told_differs {
            state.told_differs = true;
            self.tell_down(&error);
        }
        error
    }

    /// Takes out a dead connection; its jobs fail before anybody hears that it was the last.
    pub(super) fn remove(&self, slot: usize, jobs: Vec<Job>, error: &SourceError) {
        let mut state = self.state();
        self.tell(News::Failed(jobs, error.clone()));
        if let Some(line) = state.lines[slot].take() {
            self.cancelled_bytes
                .fetch_add(line.cancelled_bytes(), Ordering::Relaxed);
            state.standing -= 1;
            if state.standing == 0 && !state.closed {
                state.epoch += 1;
                self.changed.notify_all();
                self.tell_down(error);
            }
        }
    }

    /// A number that grows when the first connection stands and when the last is lost.
    pub(super) fn epoch(&self) -> u64 {
        self.state().epoch
    }

    /// Waits, unless the source is closed (then `false`); with `epoch`, only while that is the
    /// current one.
    pub(super) fn pause(&self, pause: Duration, epoch: Option<u64>) -> bool {
        let deadline = Instant::now() + pause;
        let mut state = self.state();
        while !state.closed && epoch.is_none_or(|epoch| epoch == state.epoch) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        !state.closed
    }

    /// A keeper's thread begins.
    pub(super) fn thread_begins(&self) {
        self.state().threads += 1;
    }

    /// A keeper's thread ends.
    pub(super) fn thread_ends(&self) {
        self.state().threads -= 1;
        self.changed.notify_all();
    }

    /// Ends every connection and wakes every keeper.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        for line in state.lines.iter().flatten() {
            line.disconnect();
        }
        for socket in state.dialing.iter().flatten() {
            // Not connected yet is no reason to complain.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    /// Waits until every keeper has ended, for at most `limit`.
    pub(super) fn wait_for_threads(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.state();
        while state.threads > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Others for Shared {
    fn moving(&self) -> MutexGuard<'_, ()> {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, job: Job) {
        self.dispatch(job);
    }
}

/// How many connections are not for bulk: the first is left to demand, unless it is lent.
fn spared(alive: &[&Arc<Line>], lent: bool) -> usize {
    let kept = |first: &&Arc<Line>| !(lent && first.speaks_frames());
    usize::from(alive.len() > 1 && alive.first().is_some_and(kept))
}

/// Whether two handshakes can have been with the same disk.
fn same_disk(a: &SourceInfo, b: &SourceInfo) -> bool {
    a.size_bytes == b.size_bytes && a.read_only == b.read_only && a.has_extents == b.has_extents
}
