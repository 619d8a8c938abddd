//! How much of all that is sent to one host may be on its way.
//!
//! A destination asks for more than the link carries at a time, because it cannot know how well what it
//! asks for will compress. What would fill the queue in front of the link, where demand has to wait, stays
//! here instead: what nobody waits for is sent while less is unacknowledged, over all connections to that host, than
//! fills the path ([`Window`]). TCP says how much that is, which rate it was acknowledged at, and what the
//! shortest round trip was. Demand counts, and never waits.
//!
//! What is let go is not to go all at once, either: TCP sends a window in bursts while it begins, takes the queue that
//! they make in front of the link for the end of the link, and grows slowly from then on, or overruns it. So
//! over a long way the kernel spreads what is sent over the round trip ([`spread`]).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use hikkoshi_engine::window::{MIN_ROUND, Round, Window, bytes_in, is_time_to_look, time_of};
use hikkoshi_wan::tcp::{TcpInfo, is_queue, since_epoch};
use hikkoshi_wan::transport::limits;
use socket2::Socket;

use super::backlog::{unacknowledged, unsent};

/// A connection that was held back asks again when there should be room, but not sooner than this, and not
/// later. Where they are more than [`FEW`], each waits longer, so that all together ask no more often.
const SOONEST: Duration = Duration::from_micros(50);
const LATEST: Duration = Duration::from_millis(1);
const FEW: usize = 8;

/// What was found on its way is believed for so long, for each connection that has to be asked.
const BELIEVED: Duration = Duration::from_micros(5);

/// What must be on its way besides what fills the path, or it runs dry while whoever sends next wakes up: so
/// much time's worth, and what is sent at once.
const SLACK_TIME: Duration = Duration::from_micros(250);
const SLACK_BYTES: u64 = limits::BULK_BYTES as u64 * 3 / 2;

/// Over a short way the product says little: so much may always be on its way.
const LEAST_BYTES: u64 = 64 << 10;

/// For how long the window may send at once at the rate of the path.
const LEAST_TIME: Duration = Duration::from_millis(1);

/// A connection on which something is on its way and nothing was acknowledged for so long, and some round
/// trips, does not count: its client stands still or has vanished, and what it was sent is on no path.
/// Others would be held back for as long as the kernel believes in it.
const SILENCE: Duration = Duration::from_secs(1);
const SILENT_TRIPS: u32 = 4;

/// For so long after something was lost the window does not hold back what TCP itself holds back: while less than
/// this is unsent on a connection, it may have another piece.
const LOSS_LASTS: Duration = Duration::from_secs(10);
const MOST_UNSENT: u64 = limits::BULK_BYTES as u64;

/// From this round trip on what is sent is spread over it. Below, TCP has found its window before anybody notices,
/// and timers cost.
const SPREAD_FROM: Duration = Duration::from_millis(2);
/// And once so much went over a connection that nobody waited for. Of less a burst is short, and the one that is kept
/// for demand carries less, as long as it is not lent: what it has to bring is to go at once, however small its window is.
const SPREAD_AFTER: u64 = 512 << 10;

/// The hosts that are sent to.
static PATHS: LazyLock<Mutex<HashMap<IpAddr, Weak<Path>>>> = LazyLock::new(Mutex::default);

#[derive(Debug)]
struct Path {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    seats: BTreeMap<u64, Seat>,
    next_seat: u64,
    window: Window,
    round_started: Instant,
    /// The same by the clock of the host, since the epoch.
    round_started_at: Duration,
    /// The shortest round trip, and that of the last round.
    base: Duration,
    trip: Duration,
    /// Acknowledged in this round on connections that have ended since.
    left_bytes: u64,
    /// Something was held back in this round.
    held_back: bool,
    /// There was no queue on the path in the last round, and when something was lost.
    is_free: bool,
    lost_at: Option<Instant>,
    /// When the connections were asked what is on its way.
    asked_at: Option<Instant>,
    /// That, and what was admitted since.
    on_their_way: u64,
}

/// One connection.
#[derive(Debug)]
struct Seat {
    socket: Socket,
    /// Acknowledged when this round began.
    acknowledged: u64,
    /// Packets sent again until then.
    sent_again: u32,
    /// When something was acknowledged last, or nothing was on its way.
    heard_at: Instant,
    /// Bytes admitted.
    admitted: u64,
    /// What is sent over it is spread.
    is_spread: bool,
}

/// One connection's part in it. Given back when dropped.
#[derive(Debug)]
pub(super) struct Pace {
    path: Arc<Path>,
    seat: u64,
}

impl Pace {
    /// A connection, which begins. `None`: it is not TCP, or the kernel tells nothing of it.
    pub fn of(socket: &Socket) -> Option<Self> {
        let peer = socket.peer_addr().ok()?.as_socket()?.ip();
        let told = TcpInfo::of(socket)?;
        let base = told.shortest_round_trip.unwrap_or(Duration::ZERO);
        let seat = Seat {
            socket: socket.try_clone().ok()?,
            acknowledged: told.acknowledged,
            sent_again: told.sent_again,
            heard_at: Instant::now(),
            admitted: 0,
            is_spread: false,
        };
        let path = {
            let mut paths = lock(&PATHS);
            paths.retain(|_, path| path.strong_count() > 0);
            let known = paths.get(&peer).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let fresh = Arc::new(Path {
                    state: Mutex::new(State {
                        seats: BTreeMap::new(),
                        next_seat: 0,
                        window: Window::across(base),
                        round_started: Instant::now(),
                        round_started_at: since_epoch(),
                        base,
                        trip: base,
                        left_bytes: 0,
                        held_back: false,
                        is_free: false,
                        lost_at: None,
                        asked_at: None,
                        on_their_way: 0,
                    }),
                });
                paths.insert(peer, Arc::downgrade(&fresh));
                fresh
            })
        };
        let mut state = lock(&path.state);
        let number = state.next_seat;
        state.next_seat += 1;
        state.seats.insert(number, seat);
        drop(state);
        Some(Self { path, seat: number })
    }

    /// Takes room for so many bytes that nobody waits for, which are sent at once.
    ///
    /// # Errors
    /// There is none now; after so long there should be.
    pub fn admit(&self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let mut state = lock(&self.path.state);
        if now.saturating_duration_since(state.round_started) >= MIN_ROUND {
            state.look(now);
        }
        let rate = state.window.rate();
        let window = state.window.bytes();
        let window = window.max(bytes_in(rate, LEAST_TIME)).max(LEAST_BYTES);
        let seats = state.seats.len();
        let believed = BELIEVED * u32::try_from(seats).unwrap_or(u32::MAX);
        let asked = state.asked_at;
        if asked.is_none_or(|at| now.saturating_duration_since(at) >= believed) {
            state.ask(now);
        }
        let wanted = state.on_their_way + bytes;
        let fits = wanted <= window || state.on_their_way == 0;
        state.held_back |= !fits;
        if fits || state.tcp_holds_back(now, self.seat) {
            state.on_their_way = wanted;
            state.admitted(self.seat, bytes);
            return Ok(());
        }
        let often = u32::try_from(seats.div_ceil(FEW)).unwrap_or(1).max(1);
        Err(time_of(wanted - window, rate).clamp(SOONEST, LATEST) * often)
    }
}

impl Drop for Pace {
    fn drop(&mut self) {
        let mut state = lock(&self.path.state);
        if let Some(seat) = state.seats.remove(&self.seat) {
            let now = TcpInfo::of(&seat.socket).map_or(0, |told| told.acknowledged);
            state.left_bytes += now.saturating_sub(seat.acknowledged);
        }
    }
}

impl State {
    fn silence(&self) -> Duration {
        SILENCE.max(self.base * SILENT_TRIPS)
    }

    fn ask(&mut self, now: Instant) {
        let silence = self.silence();
        let seats = self.seats.values();
        let heard = seats.filter(|seat| now.saturating_duration_since(seat.heard_at) < silence);
        self.on_their_way = heard.map(|seat| unacknowledged(&seat.socket)).sum();
        self.asked_at = Some(now);
    }

    /// After a loss TCP sends less than the path carries, and grows only while it has more to send than it may. So
    /// while there is no queue, each connection has something unsent.
    fn tcp_holds_back(&self, now: Instant, seat: u64) -> bool {
        let lossy = |at| now.saturating_duration_since(at) < LOSS_LASTS;
        if !self.is_free || !self.lost_at.is_some_and(lossy) || self.window.is_looking() {
            return false;
        }
        let Some(Seat { socket, .. }) = self.seats.get(&seat) else {
            return false;
        };
        // A round is long enough for a queue.
        let is_free = |told: TcpInfo| !is_queue(told.round_trip, self.base);
        unsent(socket) < MOST_UNSENT && TcpInfo::of(socket).is_some_and(is_free)
    }

    /// Whether something that was lost in a round of that length says that TCP is below what the path carries. What is
    /// lost while TCP decides may be its own doing, or that of a window that is being looked for, in a queue too short to
    /// be seen: so the window that was found decides before the next loss counts.
    fn is_by_chance(&self, now: Instant, took: Duration) -> bool {
        let calm = LOSS_LASTS + took * 2;
        let decides = |at| now.saturating_duration_since(at) < calm;
        self.window.is_cruising() && self.is_free && !self.lost_at.is_some_and(decides)
    }

    fn admitted(&mut self, seat: u64, bytes: u64) {
        let far = self.base >= SPREAD_FROM;
        if let Some(seat) = self.seats.get_mut(&seat) {
            seat.admitted += bytes;
            if far && !seat.is_spread && seat.admitted > SPREAD_AFTER {
                spread(&seat.socket);
                seat.is_spread = true;
            }
        }
    }

    /// Ends the round, if it was as long as a round trip.
    fn look(&mut self, now: Instant) {
        let told: BTreeMap<u64, TcpInfo> = self
            .seats
            .iter()
            .filter_map(|(number, seat)| Some((*number, TcpInfo::of(&seat.socket)?)))
            .collect();
        let trips = told.values().filter_map(|told| told.shortest_round_trip);
        let base = trips.min().unwrap_or(Duration::ZERO);
        let took = now.saturating_duration_since(self.round_started);
        // What goes one way in bursts comes back in bursts.
        if took < base.max(self.trip) {
            return;
        }
        self.base = base;
        // For so long nobody has asked, and nobody was looked at.
        let unseen = took >= self.silence();
        let mut bytes = std::mem::take(&mut self.left_bytes);
        let mut lost = false;
        let mut trip: Option<Duration> = None;
        for (number, told) in told {
            if let Some(seat) = self.seats.get_mut(&number) {
                let fresh = told.acknowledged.saturating_sub(seat.acknowledged);
                if unseen || fresh > 0 || unacknowledged(&seat.socket) == 0 {
                    seat.heard_at = now;
                }
                bytes += fresh;
                seat.acknowledged = told.acknowledged;
                // What nobody hears of any more is sent again for minutes, and a queue that is full loses, too.
                if fresh > 0 {
                    trip = Some(trip.map_or(told.round_trip, |trip| trip.min(told.round_trip)));
                    let again = told.sent_again != seat.sent_again;
                    lost |= again && !is_queue(told.round_trip, base);
                    seat.sent_again = told.sent_again;
                }
            }
        }
        let queue = trip.is_some_and(|trip| is_queue(trip, base));
        if lost && !queue && self.is_by_chance(now, took) {
            self.lost_at = Some(now);
        }
        if trip.is_some() {
            self.is_free = !queue;
        }
        self.trip = trip.unwrap_or(base);
        let between = bytes_in(self.window.rate(), SLACK_TIME);
        let round_ended_at = since_epoch();
        self.window.end_round(Round {
            bytes,
            took,
            full: self.held_back,
            queue,
            trip: self.trip,
            base,
            slack_bytes: between + SLACK_BYTES,
            look: is_time_to_look(self.round_started_at, round_ended_at, self.trip),
        });
        self.round_started_at = round_ended_at;
        self.round_started = now;
        self.held_back = false;
    }
}

/// Has the kernel spread what is sent over the round trip, at the rate that its own window comes to: asked for by
/// bounding that rate, by more than any link carries (socket(7), `SO_MAX_PACING_RATE`). Cannot be taken back.
fn spread(socket: &Socket) {
    let most: u64 = u64::MAX - 1;
    let len = libc::socklen_t::try_from(size_of_val(&most)).unwrap_or_default();
    // SAFETY: the kernel reads `len` bytes of `most`. Where it cannot, everything is as without it.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const most).cast(),
            len,
        );
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{ErrorKind, Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use hikkoshi_engine::window::MAX_WINDOW_BYTES;
    use socket2::{Domain, Type};

    use super::*;

    /// A path is that to the host of the client, and whoever tests at the same time is not to be on it.
    fn connect_from(host: [u8; 4], to: &TcpListener) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((host, 0)).into()).unwrap();
        socket.connect(&to.local_addr().unwrap().into()).unwrap();
        socket.into()
    }

    fn is_spread(socket: &Socket) -> bool {
        // All of it is written, or half: where the kernel is older.
        let mut most = u64::MAX;
        let mut len = libc::socklen_t::try_from(size_of_val(&most)).unwrap();
        // SAFETY: the kernel writes at most `len` bytes to `most`, and to `len` how many.
        let outcome = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MAX_PACING_RATE,
                (&raw mut most).cast(),
                &raw mut len,
            )
        };
        assert_eq!(outcome, 0);
        most != u64::MAX
    }

    #[test]
    fn much_that_nobody_waits_for_is_spread_over_a_long_way() {
        for (base, wanted) in [(SPREAD_FROM, true), (Duration::from_millis(1), false)] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let _here = connect_from([127, 77, 0, 3], &listener);
            let socket = Socket::from(listener.accept().unwrap().0);
            let pace = Pace::of(&socket).unwrap();
            let now = {
                let mut state = lock(&pace.path.state);
                state.base = base;
                // Before the round ends, and the true one is seen.
                state.round_started
            };
            pace.admit(now, SPREAD_AFTER).unwrap();
            assert!(!is_spread(&socket));
            // What was admitted was not sent, so that there is room.
            lock(&pace.path.state).asked_at = None;
            pace.admit(now, 1).unwrap();
            assert_eq!(is_spread(&socket), wanted, "{base:?}");
        }
    }

    /// Over a socket of which nothing is read and acknowledged, more is admitted until the window is full,
    /// by one connection for all; what is acknowledged makes room again.
    #[test]
    fn what_is_unacknowledged_over_all_connections_is_bounded() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ends: Vec<(TcpStream, TcpStream, Pace)> = (0..2)
            .map(|_| {
                let here = connect_from([127, 77, 0, 1], &listener);
                let (there, _) = listener.accept().unwrap();
                // The one that serves is the one that sends.
                there.set_nonblocking(true).unwrap();
                let pace = Pace::of(&Socket::from(there.try_clone().unwrap())).unwrap();
                (there, here, pace)
            })
            .collect();
        let piece_bytes = u64::from(limits::BULK_BYTES);
        let admits = |pace: &Pace, at: Instant| pace.admit(at, piece_bytes).is_ok();
        assert!(ends.iter().all(|(_, _, pace)| admits(pace, Instant::now())));
        let piece = vec![7; 64 << 10];
        let mut sent = 0_usize;
        let sender = &mut ends[0];
        loop {
            match sender.0.write(&piece) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
        }
        // As much as both buffers hold: far more than a window of loopback.
        let first = u64::try_from(sent).unwrap();
        let waiting = unacknowledged(&Socket::from(sender.0.try_clone().unwrap()));
        assert!(waiting > 0 && waiting <= first);
        if waiting >= 1 << 20 {
            let now = Instant::now();
            for (_, _, pace) in &ends {
                let wait = pace.admit(now, piece_bytes).unwrap_err();
                assert!((SOONEST..=LATEST).contains(&wait), "{wait:?}");
            }
            // A client that goes on reading nothing holds the other one back no longer.
            let later = (1..1000).map(|n| now + MIN_ROUND * n);
            let admitted = later
                .map(|at| admits(&ends[1].2, at))
                .position(|admits| admits);
            let rounds = admitted.expect("it is held back for ever");
            assert!(MIN_ROUND * u32::try_from(rounds + 1).unwrap() >= SILENCE);
        }
        let mut rest = vec![0; sent];
        ends[0].1.read_exact(&mut rest).unwrap();
        while !admits(&ends[1].2, Instant::now()) {
            std::thread::yield_now();
        }
    }

    /// However many look at the same moment, no more is admitted than fits; and more connections look less often.
    #[test]
    fn many_connections_are_admitted_what_one_would_be() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ends: Vec<(TcpStream, Pace)> = (0..20)
            .map(|_| {
                let here = connect_from([127, 77, 0, 2], &listener);
                let (there, _) = listener.accept().unwrap();
                (here, Pace::of(&Socket::from(there)).unwrap())
            })
            .collect();
        let now = Instant::now();
        let window = Window::across(Duration::ZERO).bytes().max(LEAST_BYTES);
        let twelfth = window / 12;
        let answers = ends.iter().map(|(_, pace)| pace.admit(now, twelfth));
        let (admitted, held_back): (Vec<_>, Vec<_>) = answers.partition(Result::is_ok);
        assert_eq!(admitted.len(), 12);
        // Nobody knows the rate yet.
        assert!(held_back.iter().all(|answer| *answer == Err(LATEST * 3)));
        // Nothing was sent, which is seen when they are asked again.
        let later = now + BELIEVED * 20;
        assert_eq!(ends[19].1.admit(later, twelfth), Ok(()));
    }

    /// After a loss, and while there is no queue, each connection is given more beyond the window until it has a
    /// piece unsent.
    #[test]
    fn after_a_loss_tcp_is_what_holds_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _here = connect_from([127, 77, 0, 4], &listener);
        let mut there = listener.accept().unwrap().0;
        there.set_nonblocking(true).unwrap();
        let pace = Pace::of(&Socket::from(there.try_clone().unwrap())).unwrap();
        let piece_bytes = u64::from(limits::BULK_BYTES);
        let now = Instant::now() + LOSS_LASTS;
        let admits = |is_free, lost_before: Option<Duration>| {
            let mut state = lock(&pace.path.state);
            // The round is not over, and the window is full.
            state.round_started = now;
            state.asked_at = Some(now);
            state.on_their_way = MAX_WINDOW_BYTES;
            state.is_free = is_free;
            state.lost_at = lost_before.map(|before| now - before);
            drop(state);
            pace.admit(now, piece_bytes).is_ok()
        };
        let lately = Some(LOSS_LASTS - Duration::from_millis(1));
        assert!(admits(true, lately));
        assert!(!admits(true, None));
        assert!(!admits(true, Some(LOSS_LASTS)));
        assert!(!admits(false, lately));
        // The peer reads nothing, so that TCP holds back what comes after this.
        let piece = vec![7; 64 << 10];
        while there.write(&piece).is_ok() {}
        assert!(!admits(true, lately));
    }

    /// What is lost while a window is looked for, beside a queue, or while TCP decides, counts for nothing.
    #[test]
    fn a_loss_counts_where_the_window_decides() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _here = connect_from([127, 77, 0, 5], &listener);
        let pace = Pace::of(&Socket::from(listener.accept().unwrap().0)).unwrap();
        let mut state = lock(&pace.path.state);
        let now = Instant::now() + LOSS_LASTS * 2;
        state.is_free = true;
        assert!(!state.is_by_chance(now, MIN_ROUND));
        while !state.window.is_cruising() {
            state.window.end_round(Round {
                bytes: 1 << 20,
                took: MIN_ROUND,
                full: true,
                queue: false,
                trip: MIN_ROUND,
                base: MIN_ROUND,
                slack_bytes: 0,
                look: false,
            });
        }
        assert!(state.is_by_chance(now, MIN_ROUND));
        state.lost_at = Some(now - LOSS_LASTS - MIN_ROUND);
        assert!(!state.is_by_chance(now, MIN_ROUND));
        assert!(state.is_by_chance(now + MIN_ROUND, MIN_ROUND));
        state.is_free = false;
        assert!(!state.is_by_chance(now + MIN_ROUND, MIN_ROUND));
    }

    #[test]
    fn a_unix_socket_has_no_pace() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(Pace::of(&Socket::from(one)).is_none());
    }
}
