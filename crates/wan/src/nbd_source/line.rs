//! One connection to a server: its queues, its requests in flight, its sending half.
//!
//! Owns the order in which requests leave (demand before bulk, never more in flight than is
//! good) and who waits for which cookie. It must never call a completion: submitters and the
//! reader hold no lock of it when they do.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hikkoshi_nbd::client::{Negotiated, encode_request};
use hikkoshi_nbd::wire::{REQUEST_BYTES, command};

use super::address::NbdSourceConfig;
use super::attach::Ticket;
use super::choice::Busy;
use super::coding::{Coding, Lately};
use super::job::Job;
use super::wire::Wire;
use crate::source::Lane;
use crate::transport::Priority;
use crate::transport::message::Request;
use crate::transport::pack::Packing;

/// How many requests wait on one connection at most, those in flight not counted. Callers bound
/// what they ask for far below; this is only against their mistakes.
const MAX_QUEUED: usize = 1 << 16;

/// Over how long a connection's pace is measured: some round trips of a long way.
const PACE_ROUND: Duration = Duration::from_millis(250);

/// One connection.
pub(super) struct Line {
    pub(super) wire: Arc<dyn Wire>,
    pub(super) negotiated: Negotiated,
    /// What the source has to say to this comes first.
    pub(super) attaching: Option<Arc<Ticket>>,
    in_flight_max: usize,
    bulk_max: usize,
    packing: Packing,
    dead: AtomicBool,
    /// Bytes asked for and not answered, queued ones included, by lane.
    loads: [AtomicU64; Lane::COUNT],
    /// Of these, bulk bytes that were not sent yet.
    queued_bulk: AtomicU64,
    /// Bytes that were not sent because they were cancelled.
    cancelled_bytes: AtomicU64,
    lately: Mutex<Lately>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next_cookie: u64,
    /// Sent, and no byte of the reply seen yet.
    unanswered: HashMap<u64, Job>,
    /// Reads whose reply has begun: lane, offset and length.
    begun: HashMap<u64, (Lane, u64, u32)>,
    /// Of both, what has become urgent since it was sent.
    promoted: HashSet<u64>,
    /// Of both, what the server was told is wanted no more.
    cancelled: HashSet<u64>,
    /// Of that, what is to go over another connection.
    relieved: HashSet<u64>,
    in_flight: usize,
    bulk_in_flight: usize,
    demand: VecDeque<Job>,
    bulk: VecDeque<Job>,
    /// Since when something is in flight without a break.
    waiting_since: Option<Instant>,
    /// Bytes per second that it has brought lately, once that is known.
    pace: Option<u64>,
    /// Bytes that were brought without a break since then, for the next pace.
    brought: u64,
    brought_since: Option<Instant>,
    closed: bool,
}

impl State {
    /// For how long it has been measured what is brought: while there was something to bring.
    fn elapsed(&self, now: Instant) -> Duration {
        let since = self.brought_since.max(self.waiting_since);
        since.map_or(Duration::ZERO, |at| now.saturating_duration_since(at))
    }

    /// Measures the pace.
    fn brings(&mut self, bytes: u64, now: Instant) {
        if self.brought_since < self.waiting_since {
            (self.brought, self.brought_since) = (0, self.waiting_since);
        }
        self.brought += bytes;
        let elapsed = self.elapsed(now);
        if elapsed >= PACE_ROUND {
            self.pace = Some(per_second(self.brought, elapsed));
            (self.brought, self.brought_since) = (0, Some(now));
        }
    }
}

impl Line {
    pub(super) fn new(
        wire: Arc<dyn Wire>,
        negotiated: Negotiated,
        config: &NbdSourceConfig,
    ) -> Arc<Self> {
        Self::attaching(wire, negotiated, config, None)
    }

    /// The same, on which it was said for which move it is, and no answer has come yet.
    pub(super) fn attaching(
        wire: Arc<dyn Wire>,
        negotiated: Negotiated,
        config: &NbdSourceConfig,
        attaching: Option<Arc<Ticket>>,
    ) -> Arc<Self> {
        let state = State {
            waiting_since: attaching.is_some().then(Instant::now),
            ..State::default()
        };
        Arc::new(Self {
            wire,
            negotiated,
            attaching,
            in_flight_max: config.in_flight,
            bulk_max: config.bulk_in_flight,
            packing: config.packing,
            dead: AtomicBool::new(false),
            loads: Default::default(),
            queued_bulk: AtomicU64::new(0),
            cancelled_bytes: AtomicU64::new(0),
            lately: Mutex::default(),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether frames are spoken here, and not NBD.
    pub(super) fn speaks_frames(&self) -> bool {
        self.negotiated.transport
    }

    /// Whether requests can still be submitted; may change at any time.
    pub(super) fn is_alive(&self) -> bool {
        !self.dead.load(Ordering::Acquire)
    }

    /// How many bytes a new request of `lane` would wait behind. What is less urgent is not among them where the
    /// source answers what is urgent first, but for demand: that would wait behind what was sent already, too. (What
    /// has become urgent since it was asked for counts as what it was.)
    pub(super) fn load(&self, lane: Lane) -> u64 {
        let sum = |loads: &[AtomicU64]| loads.iter().map(|load| load.load(Ordering::Relaxed)).sum();
        let all: u64 = sum(&self.loads);
        if lane.is_urgent() {
            all.saturating_sub(self.queued_bulk.load(Ordering::Relaxed))
        } else if self.speaks_frames() {
            sum(&self.loads[..=lane as usize])
        } else {
            all
        }
    }

    fn takes_on(&self, job: &Job) {
        self.loads[job.lane as usize].fetch_add(u64::from(job.weight()), Ordering::Relaxed);
    }

    fn is_rid_of(&self, lane: Lane, weight: u32) {
        self.loads[lane as usize].fetch_sub(u64::from(weight), Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn brings(&self, bytes_per_s: u64) {
        self.state().pace = Some(bytes_per_s);
    }

    /// What it has to do before a request of `lane`, and how fast it is by now: less than was measured where it has brought little
    /// since then.
    pub(super) fn busy(&self, lane: Lane, now: Instant) -> Busy {
        let state = self.state();
        let elapsed = state.elapsed(now);
        let slower = state.waiting_since.is_some() && elapsed >= PACE_ROUND;
        let by_now = per_second(state.brought, elapsed);
        Busy {
            load: self.load(lane),
            backlog: self.load(Lane::Late),
            pace: state.pace.map(|p| if slower { p.min(by_now) } else { p }),
        }
    }

    /// Sends or queues a job; gives it back if the connection is dead or its queue is full.
    // The job itself is the error: it must not be lost.
    #[allow(clippy::result_large_err)]
    pub(super) fn submit(&self, job: Job) -> Result<(), Job> {
        let mut state = self.state();
        let queued = state.demand.len() + state.bulk.len();
        if state.closed || queued >= MAX_QUEUED {
            return Err(job);
        }
        self.takes_on(&job);
        if job.lane.is_urgent() {
            enqueue(&mut state.demand, job);
        } else {
            self.queued_bulk
                .fetch_add(u64::from(job.weight()), Ordering::Relaxed);
            enqueue(&mut state.bulk, job);
        }
        self.pump(&mut state);
        Ok(())
    }

    /// Bulk reads of this range are waited for by a guest: what is queued goes with the demand, and
    /// of what the server has been asked for it is told, if it speaks frames. Of a reply that has begun,
    /// too: the server may hold back the rest of it.
    pub(super) fn promote(&self, offset: u64, len: u64) {
        let mut guard = self.state();
        let state = &mut *guard;
        if state.closed {
            return;
        }
        let mut stay = VecDeque::with_capacity(state.bulk.len());
        for mut job in state.bulk.drain(..) {
            if job.is_bulk_of(offset, len) {
                self.is_rid_of(job.lane, job.weight());
                job.lane = Lane::Demand;
                self.takes_on(&job);
                self.queued_bulk
                    .fetch_sub(u64::from(job.len), Ordering::Relaxed);
                enqueue(&mut state.demand, job);
            } else {
                stay.push_back(job);
            }
        }
        state.bulk = stay;
        if self.speaks_frames() {
            let end = offset.saturating_add(len);
            let overlaps = |begun: &(Lane, u64, u32)| {
                begun.0 != Lane::Demand && begun.1 < end && offset < begun.1 + u64::from(begun.2)
            };
            let asked = state.unanswered.iter();
            let asked = asked.filter(|(_, job)| job.is_bulk_of(offset, len));
            let begun = state.begun.iter().filter(|(_, begun)| overlaps(begun));
            let mut ids: Vec<u64> = asked.map(|(id, _)| *id).collect();
            ids.extend(begun.map(|(id, _)| *id));
            state.promoted.extend(&ids);
            ids.sort_unstable();
            let output: Vec<u8> = ids
                .into_iter()
                .flat_map(|id| Request::Promote(id, Priority::DEMAND).encode())
                .collect();
            if !output.is_empty() && self.wire.send(&output).is_err() {
                // The reader notices.
                self.wire.hang_up();
            }
        }
        self.pump(state);
    }

    /// Reads of `lane` within this range are wanted no more. Hands out what was not sent yet; of what the
    /// server has been asked for it is told, if it speaks frames.
    pub(super) fn cancel(&self, lane: Lane, offset: u64, len: u64) -> Vec<Job> {
        let mut guard = self.state();
        let state = &mut *guard;
        if state.closed {
            return Vec::new();
        }
        let mut unsent = Vec::new();
        for queue in [&mut state.demand, &mut state.bulk] {
            let mut stay = VecDeque::with_capacity(queue.len());
            for job in queue.drain(..) {
                if job.is_within(lane, offset, len) {
                    unsent.push(job);
                } else {
                    stay.push_back(job);
                }
            }
            *queue = stay;
        }
        for job in &unsent {
            self.is_rid_of(job.lane, job.weight());
            if !job.lane.is_urgent() {
                self.queued_bulk
                    .fetch_sub(u64::from(job.len), Ordering::Relaxed);
            }
            self.cancelled_bytes
                .fetch_add(u64::from(job.len), Ordering::Relaxed);
        }
        if self.speaks_frames() {
            let end = offset.saturating_add(len);
            let within = |begun: &(Lane, u64, u32)| {
                begun.0 == lane && begun.1 >= offset && begun.1 + u64::from(begun.2) <= end
            };
            let asked = state.unanswered.iter();
            let asked = asked.filter(|(_, job)| job.is_within(lane, offset, len));
            let asked = asked.map(|(id, job)| (*id, job.lane, job.len));
            let begun = state.begun.iter().filter(|(_, begun)| within(begun));
            let begun = begun.map(|(id, (lane, _, len))| (*id, *lane, *len));
            let mut asked: Vec<(u64, Lane, u32)> = asked.chain(begun).collect();
            asked.sort_unstable_by_key(|(id, ..)| *id);
            for (id, ..) in &asked {
                // Over no other connection either.
                state.relieved.remove(id);
            }
            self.take_back(state, &asked);
        }
        unsent
    }

    /// Tells the server what is wanted no more, unless it was told. It is no load from then on.
    fn take_back(&self, state: &mut State, asked: &[(u64, Lane, u32)]) {
        let mut output = Vec::new();
        for (id, lane, len) in asked {
            if state.cancelled.insert(*id) {
                self.is_rid_of(*lane, *len);
                output.extend(Request::Cancel(*id).encode());
            }
        }
        if !output.is_empty() && self.wire.send(&output).is_err() {
            // The reader notices.
            self.wire.hang_up();
        }
    }

    /// Of what nobody waits for and has not begun to come over this connection, what it would bring last is to go over
    /// another: so many bytes of it at most. Hands out what was not sent yet; of what the server has been asked for it is
    /// told, if it speaks frames, and when that is answered, [`Self::is_relieved_of`] it. What guests wait for stays.
    pub(super) fn relieve(&self, bytes: u64) -> Vec<Job> {
        let mut guard = self.state();
        let state = &mut *guard;
        if state.closed {
            return Vec::new();
        }
        let mut left = bytes;
        let mut unsent = Vec::new();
        let mut stay = VecDeque::with_capacity(state.bulk.len());
        while let Some(job) = state.bulk.pop_back() {
            if u64::from(job.len) <= left && job.is_read() {
                left -= u64::from(job.len);
                self.is_rid_of(job.lane, job.weight());
                self.queued_bulk
                    .fetch_sub(job.len.into(), Ordering::Relaxed);
                unsent.push(job);
            } else {
                stay.push_front(job);
            }
        }
        state.bulk = stay;
        if self.speaks_frames() {
            let asked = state.unanswered.iter();
            let mut asked: Vec<(u64, Lane, u32)> = asked
                .filter(|(id, job)| {
                    let wanted = !state.cancelled.contains(id) && !state.promoted.contains(id);
                    wanted && job.is_read() && !job.lane.is_urgent()
                })
                .map(|(id, job)| (*id, job.lane, job.len))
                .collect();
            asked.sort_unstable_by_key(|(id, lane, _)| Reverse((*lane, *id)));
            asked.retain(|(_, _, len)| {
                let fits = u64::from(*len) <= left;
                left -= if fits { u64::from(*len) } else { 0 };
                fits
            });
            state.relieved.extend(asked.iter().map(|(id, ..)| *id));
            self.take_back(state, &asked);
        }
        // In the order in which they were asked for.
        unsent.reverse();
        unsent
    }

    /// Whether a request that the server was told is wanted no more is to go over another connection, and
    /// whether a guest waits for it by now.
    pub(super) fn is_relieved_of(&self, cookie: u64) -> Option<bool> {
        let state = self.state();
        let relieved = state.relieved.contains(&cookie);
        relieved.then(|| state.promoted.contains(&cookie))
    }

    /// Whether the server was told that this request is wanted no more.
    pub(super) fn is_cancelled(&self, cookie: u64) -> bool {
        self.state().cancelled.contains(&cookie)
    }

    /// So many bytes of a cancelled request were not sent.
    pub(super) fn count_cancelled(&self, bytes: u64) {
        self.cancelled_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many bytes of the disk have come, coded like this.
    pub(super) fn came(&self, coding: Coding, bytes: u64) {
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        lately.came(coding, bytes);
    }

    /// How data came lately.
    pub(super) fn lately(&self) -> Lately {
        *self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that were asked for and, being cancelled, not sent.
    pub(super) fn cancelled_bytes(&self) -> u64 {
        self.cancelled_bytes.load(Ordering::Relaxed)
    }

    /// Sends what may be sent now.
    fn pump(&self, state: &mut State) {
        let mut output = Vec::new();
        while let Some(job) = self.next(state) {
            let cookie = state.next_cookie;
            state.next_cookie = cookie.wrapping_add(1);
            if self.speaks_frames() {
                output.extend(job.frame(cookie, self.packing));
            } else {
                output.reserve(REQUEST_BYTES);
                output.extend_from_slice(&encode_request(
                    0,
                    job.command(),
                    cookie,
                    job.offset,
                    job.len,
                ));
            }
            state.in_flight += 1;
            if !job.lane.is_urgent() {
                state.bulk_in_flight += 1;
            }
            state.waiting_since.get_or_insert_with(Instant::now);
            state.unanswered.insert(cookie, job);
        }
        if !output.is_empty() && self.wire.send(&output).is_err() {
            // The reader notices, and fails these requests with all the others.
            self.wire.hang_up();
        }
    }

    /// Takes the next job from the queues if it may go.
    fn next(&self, state: &mut State) -> Option<Job> {
        if state.in_flight >= self.in_flight_max {
            return None;
        }
        if let Some(job) = state.demand.pop_front() {
            return Some(job);
        }
        if state.bulk_in_flight >= self.bulk_max {
            return None;
        }
        let job = state.bulk.pop_front()?;
        self.queued_bulk
            .fetch_sub(u64::from(job.weight()), Ordering::Relaxed);
        Some(job)
    }

    /// Takes out the job that a reply has begun for; it counts as in flight until
    /// [`Self::answered`].
    pub(super) fn claim(&self, cookie: u64) -> Option<Job> {
        let mut state = self.state();
        let job = state.unanswered.remove(&cookie)?;
        if job.is_read() {
            state.begun.insert(cookie, (job.lane, job.offset, job.len));
        }
        Some(job)
    }

    /// A claimed job has its whole reply: its place goes to the next one.
    pub(super) fn answered(&self, cookie: u64, job: &Job) {
        let mut state = self.state();
        state.begun.remove(&cookie);
        state.promoted.remove(&cookie);
        state.relieved.remove(&cookie);
        // What was cancelled has not all come, and tells nothing of the pace.
        if !state.cancelled.remove(&cookie) {
            self.is_rid_of(job.lane, job.weight());
            state.brings(job.weight().into(), Instant::now());
        }
        state.in_flight -= 1;
        if !job.lane.is_urgent() {
            state.bulk_in_flight -= 1;
        }
        if state.in_flight == 0 {
            state.waiting_since = None;
        }
        self.pump(&mut state);
    }

    /// The source has said that it may be read from for the move.
    pub(super) fn is_attached(&self) {
        let mut state = self.state();
        if state.in_flight == 0 {
            state.waiting_since = None;
        }
    }

    /// Since when an answer is waited for, if one is.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.state().waiting_since
    }

    /// Declares the connection dead and hands out every job that was not claimed.
    pub(super) fn bury(&self) -> Vec<Job> {
        self.dead.store(true, Ordering::Release);
        let mut guard = self.state();
        let state = &mut *guard;
        state.closed = true;
        self.wire.hang_up();
        let mut sent: Vec<(u64, Job)> = state.unanswered.drain().collect();
        sent.sort_unstable_by_key(|(cookie, _)| *cookie);
        let mut jobs: Vec<Job> = sent.into_iter().map(|(_, job)| job).collect();
        jobs.extend(state.demand.drain(..));
        jobs.extend(state.bulk.drain(..));
        jobs
    }

    /// Says goodbye (section "Terminating the transmission phase") and hangs up. In frames the
    /// end of the stream says it.
    pub(super) fn disconnect(&self) {
        let mut state = self.state();
        if !state.closed {
            state.closed = true;
            self.dead.store(true, Ordering::Release);
            if !self.speaks_frames() {
                let goodbye = encode_request(0, command::DISC, state.next_cookie, 0, 0);
                // Only politeness: nothing depends on its arrival.
                self.wire.send_politely(&goodbye);
            }
        }
        self.wire.hang_up();
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let rate = u128::from(bytes) * 1000 / time.as_millis().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Puts a job behind those that are as urgent.
fn enqueue(queue: &mut VecDeque<Job>, job: Job) {
    let ahead = queue.iter().rposition(|other| other.lane <= job.lane);
    queue.insert(ahead.map_or(0, |index| index + 1), job);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::script::{Script, line_to, read};
    use super::*;

    /// Or what a guest will read next all goes to the connections that copy least, and the others copy on.
    #[test]
    fn read_ahead_waits_behind_nothing_that_is_copied() {
        let line = line_to(&Arc::new(Script::default()), None);
        let lanes = [(Lane::Bulk, 100), (Lane::Ahead, 20), (Lane::Late, 3)];
        for (at, (lane, len)) in (0..).zip(lanes) {
            drop(read(&line, lane, at << 12, len));
        }
        let loads = [Lane::Ahead, Lane::Hot, Lane::Bulk, Lane::Late].map(|lane| line.load(lane));
        assert_eq!(loads, [20, 20, 120, 123]);
        // Of these it is not known how much has been sent.
        assert_eq!(line.load(Lane::Demand), 123);
        assert!(line.cancel(Lane::Late, 2 << 12, 3).is_empty());
        assert_eq!(line.load(Lane::Late), 120);
    }

    /// One that stands still is slow at once, and what had nothing to do is not.
    #[test]
    fn a_pace_is_of_the_time_in_which_there_was_something_to_bring() {
        let line = line_to(&Arc::new(Script::default()), None);
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        let pace = |at| line.busy(Lane::Bulk, ms(at)).pace;
        line.state().waiting_since = Some(ms(0));
        line.state().brings(100_000, ms(100));
        assert_eq!(pace(249), None);
        line.state().brings(150_000, ms(250));
        assert_eq!(pace(499), Some(1_000_000));
        line.state().brings(50_000, ms(450));
        assert_eq!(pace(500), Some(200_000));
        assert_eq!(pace(1250), Some(50_000));
        line.state().brings(0, ms(1250));
        assert_eq!(pace(1250), Some(50_000));
        line.state().waiting_since = None;
        assert_eq!(pace(9000), Some(50_000));
        line.state().waiting_since = Some(ms(9000));
        line.state().brings(1_000_000, ms(9250));
        assert_eq!(pace(9250), Some(4_000_000));
    }

    #[test]
    fn what_is_promoted_before_it_is_sent_is_waited_behind_as_demand() {
        let line = line_to(&Arc::new(Script::default()), None);
        let bulk_max = u64::try_from(line.bulk_max).unwrap();
        for at in 0..=bulk_max {
            drop(read(&line, Lane::Bulk, at << 12, 10));
        }
        assert_eq!(line.load(Lane::Demand), bulk_max * 10);
        assert_eq!(line.load(Lane::Ahead), 0);
        line.promote(bulk_max << 12, 10);
        assert_eq!(line.load(Lane::Demand), bulk_max * 10 + 10);
        assert_eq!(line.load(Lane::Ahead), 10);
        assert_eq!(line.load(Lane::Bulk), bulk_max * 10 + 10);
    }
}
