//! A link that the movers of several disks share.
//!
//! Owns one pacer for all of them, and how much of its window each may fill. Every disk that has more
//! to fetch than its share gets an equal one; what a disk needs less of, because it is capped, paused or
//! nearly here, is the others'. Shares are made anew at the end of each of the pacer's rounds, from what
//! was in flight in it, and when a disk comes or goes. A disk that begins is held back by the little that
//! it was left, and has its full share a round later.
//!
//! Demand counts and never waits: what a guest of one disk asks for takes the place of the background
//! copy of all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::pacer::{Pacer, PathSeen};

/// Fractions of the window are counted in these.
const WHOLE: u64 = 1 << 16;

/// What a disk's connections told is believed for so long, where another's tell: the disk may have arrived.
const TOLD_FOR: Duration = Duration::from_secs(1);

/// A link, for [`Mover::share`](super::Mover::share).
#[derive(Debug, Default)]
pub struct Path {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pacer: Pacer,
    seats: BTreeMap<u64, Use>,
    next_seat: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            pacer: Pacer::new(),
            seats: BTreeMap::new(),
            next_seat: 0,
        }
    }
}

/// How one disk uses the link.
#[derive(Clone, Copy, Debug)]
struct Use {
    in_flight: u64,
    /// The most in flight in this round.
    peak: u64,
    /// It had more to fetch than it might, in this round.
    held_back: bool,
    /// What it may fill, in parts of [`WHOLE`].
    share: u64,
    /// Its source sends no more than fills the path, whatever it is asked for.
    source_paces: bool,
    /// What TCP told last of its connections.
    seen: Option<PathSeen>,
}

/// One disk's place at a link, which may become another. Given back when dropped. It is shared by the
/// disk's mover and by what is copied before the handoff.
#[derive(Debug)]
pub(crate) struct Seat {
    place: Mutex<Place>,
}

#[derive(Debug)]
struct Place {
    path: Arc<Path>,
    number: u64,
    /// By how much the disk's clock is behind the one that is common to the path.
    behind: Duration,
}

impl Path {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more disk, which has so many bytes in flight.
    fn seat(self: &Arc<Self>, in_flight: u64, source_paces: bool, behind: Duration) -> Place {
        let mut state = self.state();
        let number = state.next_seat;
        state.next_seat += 1;
        let seat = Use {
            in_flight,
            peak: in_flight,
            held_back: true,
            share: 0,
            source_paces,
            seen: None,
        };
        state.seats.insert(number, seat);
        state.pacer.sent(in_flight);
        state.divide();
        drop(state);
        Place {
            path: Arc::clone(self),
            number,
            behind,
        }
    }
}

impl State {
    /// How much may be in flight in all, if all is asked of the source of this disk; `more`: after a loss more.
    fn open_for(&self, seat: &Use, more: bool) -> u64 {
        let more = more && seat.seen.is_some();
        self.pacer.open_bytes(seat.source_paces, more)
    }

    /// Makes the shares anew, and begins to look at what is needed.
    fn divide(&mut self) {
        let window = self.pacer.window_bytes().max(1);
        let chunk = self.pacer.chunk_bytes();
        let part = |bytes: u64| {
            let part = u128::from(bytes) * u128::from(WHOLE) / u128::from(window);
            u64::try_from(part).unwrap_or(WHOLE).clamp(1, WHOLE)
        };
        // From the least need to the greatest: what one leaves is the others'.
        let mut needs: Vec<(u64, u64)> = self
            .seats
            .iter()
            .map(|(number, seat)| {
                let need = if seat.held_back {
                    WHOLE
                } else {
                    part(seat.peak + chunk)
                };
                (need, *number)
            })
            .collect();
        needs.sort_unstable();
        let mut left = WHOLE;
        let mut seats = u64::try_from(needs.len()).unwrap_or(1);
        for (index, (need, number)) in needs.iter().enumerate() {
            let equal = left / seats.max(1);
            // What nobody needs is the last one's.
            let share = if index + 1 == needs.len() {
                left
            } else {
                equal.min(*need)
            };
            left -= share;
            seats -= 1;
            if let Some(seat) = self.seats.get_mut(number) {
                seat.share = share;
                seat.peak = seat.in_flight;
                seat.held_back = false;
            }
        }
    }
}

impl Seat {
    /// At a path of its own.
    pub fn alone() -> Self {
        Self {
            place: Mutex::new(Arc::new(Path::default()).seat(0, false, Duration::ZERO)),
        }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what is in flight along to another path.
    pub fn move_to(&self, path: &Arc<Path>, behind: Duration) {
        let mut place = self.place();
        let (in_flight, source_paces) = {
            let state = place.path.state();
            let seat = state.seats.get(&place.number);
            seat.map_or((0, false), |seat| (seat.in_flight, seat.source_paces))
        };
        *place = path.seat(in_flight, source_paces, behind);
    }

    /// Forgets the path, unless others are using it.
    pub fn restart(&self, now: Duration) {
        let place = self.place();
        let mut state = place.path.state();
        let alone = state
            .seats
            .iter()
            .all(|(number, seat)| *number == place.number || seat.in_flight == 0);
        if alone {
            state.pacer.restart(now + place.behind);
            state.divide();
        }
    }

    /// The disk's source sends no more than fills the path, whatever it is asked for; or it does not.
    pub fn source_paces(&self, paces: bool) {
        let place = self.place();
        if let Some(seat) = place.path.state().seats.get_mut(&place.number) {
            seat.source_paces = paces;
        }
    }

    /// TCP tells how the path is, by this disk's connections; or it does not.
    pub fn sees(&self, now: Duration, seen: Option<PathSeen>) {
        let place = self.place();
        let mut guard = place.path.state();
        let state = &mut *guard;
        let Some(seat) = state.seats.get_mut(&place.number) else {
            return;
        };
        let before = std::mem::replace(&mut seat.seen, seen);
        let mut all = state.seats.values().filter_map(|seat| seat.seen);
        let Some(seen) = seen else {
            if all.next().is_none() {
                state.pacer.sees_nothing();
            }
            return;
        };
        // (The clock may have been set back.)
        let lately = all.filter(|told| told.since_epoch.abs_diff(seen.since_epoch) <= TOLD_FOR);
        let worst = lately.max_by_key(|told| (told.queue, told.trip));
        let lost = before.is_some_and(|before| seen.shows_loss_since(&before));
        let all = PathSeen {
            since_epoch: seen.since_epoch,
            ..worst.unwrap_or(seen)
        };
        state.pacer.sees(now + place.behind, all, lost);
    }

    /// When something was lost last on the path.
    #[cfg(all(test, not(loom)))]
    pub fn lost_at(&self) -> Option<Duration> {
        self.place().path.state().pacer.lost_at()
    }

    /// How the path is, as was told last.
    #[cfg(all(test, not(loom)))]
    pub fn seen(&self) -> Option<PathSeen> {
        self.place().path.state().pacer.seen()
    }

    /// See [`Pacer::chunk_bytes`].
    pub fn chunk_bytes(&self) -> u64 {
        self.place().path.state().pacer.chunk_bytes()
    }

    /// How much of what fills the path is this disk's.
    pub fn window_bytes(&self) -> u64 {
        let place = self.place();
        let state = place.path.state();
        let share = state.seats.get(&place.number).map_or(0, |seat| seat.share);
        part_of(state.pacer.window_bytes(), share)
    }

    /// How much this disk may have in flight: more than that where its source sends no more than fills the path, and
    /// after a loss where TCP here tells of it.
    pub fn open_bytes(&self) -> u64 {
        let place = self.place();
        let state = place.path.state();
        let seat = state.seats.get(&place.number);
        seat.map_or(0, |seat| part_of(state.open_for(seat, true), seat.share))
    }

    /// See [`Pacer::base`].
    pub fn base(&self) -> Duration {
        self.place().path.state().pacer.base()
    }

    /// Whether what nobody waits for may go now.
    pub fn may_send(&self) -> bool {
        self.has_room(true)
    }

    /// The same for the background copy beside what is read ahead, which would else lose what of the link goes to what the
    /// copy is asked for besides after a loss.
    pub fn may_copy_beside(&self) -> bool {
        self.has_room(false)
    }

    fn has_room(&self, more: bool) -> bool {
        let place = self.place();
        let mut guard = place.path.state();
        let state = &mut *guard;
        let count = u64::try_from(state.seats.len()).unwrap_or(1);
        // What is asked of those that pace themselves is not on the path yet, and takes nobody's place there.
        let all = state.seats.values();
        let all = all.map(|seat| state.open_for(seat, more)).max();
        let all = all.unwrap_or(0);
        let window = state
            .seats
            .get(&place.number)
            .map(|seat| state.open_for(seat, more));
        let (Some(window), Some(seat)) = (window, state.seats.get_mut(&place.number)) else {
            return false;
        };
        // Each may be a chunk above its share; else whoever is would keep the others below theirs.
        let slack = if count > 1 {
            count * state.pacer.chunk_bytes()
        } else {
            0
        };
        let in_flight = state.pacer.in_flight_bytes();
        let room = seat.in_flight < part_of(window, seat.share) && in_flight < all + slack;
        if !room {
            seat.held_back = true;
            // What others have left unused of it says nothing of the path.
            if in_flight + slack >= all {
                state.pacer.hold_back();
            }
        }
        room
    }

    /// Whether what a stream will read soon may go now, of which so much is in flight. A source that paces
    /// itself sends it before whatever of the background copy waits there: that need not have come first.
    pub fn may_read_ahead(&self, in_flight: u64) -> bool {
        self.may_send() || self.source_is_paced() && in_flight < self.open_bytes()
    }

    fn source_is_paced(&self) -> bool {
        let place = self.place();
        let state = place.path.state();
        let seat = state.seats.get(&place.number);
        seat.is_some_and(|seat| seat.source_paces)
    }

    /// A fetch is under way.
    pub fn sent(&self, bytes: u64) {
        let place = self.place();
        let mut state = place.path.state();
        state.pacer.sent(bytes);
        if let Some(seat) = state.seats.get_mut(&place.number) {
            seat.in_flight += bytes;
            seat.peak = seat.peak.max(seat.in_flight);
        }
    }

    /// It came to nothing.
    pub fn lost(&self, bytes: u64) {
        let place = self.place();
        let mut state = place.path.state();
        state.pacer.lost(bytes);
        if let Some(seat) = state.seats.get_mut(&place.number) {
            seat.in_flight = seat.in_flight.saturating_sub(bytes);
        }
    }

    /// It came back after `rtt`, and was so many bytes on the wire.
    pub fn landed(&self, now: Duration, rtt: Duration, bytes: u64, wire_bytes: u64) {
        let place = self.place();
        let now = now + place.behind;
        let mut state = place.path.state();
        if let Some(seat) = state.seats.get_mut(&place.number) {
            seat.in_flight = seat.in_flight.saturating_sub(bytes);
        }
        if state.pacer.landed(now, rtt, bytes, wire_bytes) {
            state.divide();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.path.state();
        if let Some(seat) = state.seats.remove(&self.number) {
            state.pacer.lost(seat.in_flight);
            state.divide();
        }
    }
}

fn part_of(bytes: u64, share: u64) -> u64 {
    let part = u128::from(bytes) * u128::from(share) / u128::from(WHOLE);
    u64::try_from(part).unwrap_or(u64::MAX)
}
