//! Several disks over one link, driven by a model of it: who gets how much.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::path::Seat;
use super::tests::{MS, disk, policy};
use super::*;
use crate::precopy::{CopyId, Precopy, Wanted};

pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) struct Disk {
    pub mover: Mover<u32>,
    residency: Residency,
    landed_bytes: u64,
    /// When its readers were woken, and who.
    pub woken: Vec<(Duration, u32)>,
}

/// Whose a fetch is.
#[derive(Clone, Copy)]
enum Fetch {
    Mover(FlightId),
    Ahead(CopyId),
}

/// A link that carries one fetch after the other, whoever asked, 50 ms there and back.
pub(super) struct Link {
    rate: u64,
    pub now: Duration,
    free_at: Duration,
    ticked: Duration,
    pub geometry: Geometry,
    pub disks: Vec<Disk>,
    /// What is copied of a disk that stands by.
    pub ahead: Option<(usize, Precopy)>,
    /// By when it lands, and a number that tells equal times apart.
    under_way: BTreeMap<(Duration, u64), (usize, Fetch, BlockRange)>,
    number: u64,
}

const RTT: Duration = Duration::from_millis(50);

impl Link {
    /// With as many disks, none of which has a source yet.
    pub fn new(mbit: u64, policies: &[Policy]) -> Self {
        let path = Arc::new(Path::default());
        let (geometry, _) = disk(1024);
        let disks = policies.iter().map(|policy| {
            let (_, residency) = disk(1024);
            let mut mover = Mover::new(geometry, Phase::Arriving, *policy);
            mover.share(&path, Duration::ZERO);
            Disk {
                mover,
                residency,
                landed_bytes: 0,
                woken: Vec::new(),
            }
        });
        Self {
            rate: mbit * 125_000,
            now: MS,
            free_at: Duration::ZERO,
            ticked: MS,
            geometry,
            disks: disks.collect(),
            ahead: None,
            under_way: BTreeMap::new(),
            number: 0,
        }
    }

    pub fn tell(
        &mut self,
        index: usize,
        event: impl FnOnce(&mut Mover<u32>, Duration, &Residency, &mut Vec<Action<u32>>),
    ) {
        let mut out = Vec::new();
        let disk = &mut self.disks[index];
        event(&mut disk.mover, self.now, &disk.residency, &mut out);
        for action in out {
            match action {
                Action::Fetch { flight, range, .. } => {
                    self.carry(index, Fetch::Mover(flight), range);
                }
                Action::Wake(who) => self.disks[index].woken.push((self.now, who)),
                Action::Promote { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn carry(&mut self, index: usize, fetch: Fetch, range: BlockRange) {
        let bytes = self.geometry.bytes(range).len();
        let time = Duration::from_nanos(bytes * 1_000_000_000 / self.rate);
        self.free_at = self.free_at.max(self.now + RTT / 2) + time;
        let lands = (self.free_at + RTT / 2, self.number);
        self.under_way.insert(lands, (index, fetch, range));
        self.number += 1;
    }

    /// Asks for what may be copied ahead now.
    fn copy_ahead(&mut self) {
        let now = self.now;
        while let Some((index, precopy)) = &mut self.ahead
            && let Some(wanted) = precopy.next_paced(now)
        {
            let index = *index;
            match wanted {
                Wanted::Extents(id, range) => precopy.scanned(id, range.end, &[]),
                Wanted::Data(id, range) => self.carry(index, Fetch::Ahead(id), range),
            }
        }
    }

    /// What was to be copied ahead comes no more.
    pub fn forget_ahead(&mut self) {
        self.under_way
            .retain(|_, (_, fetch, _)| matches!(fetch, Fetch::Mover(_)));
    }

    pub fn begin(&mut self, index: usize) {
        self.tell(index, |m, now, r, out| m.source_up(now, r, out));
    }

    /// Lets time pass, and tells how much of each disk landed in it, as a share of what could.
    pub fn run(&mut self, time: Duration) -> Vec<f64> {
        let until = self.now + time;
        let before: Vec<u64> = self.disks.iter().map(|d| d.landed_bytes).collect();
        loop {
            let tick = self.ticked + Mover::<u32>::TICK;
            let lands = self.under_way.keys().next().copied();
            let next = lands.map_or(tick, |(at, _)| at.min(tick));
            if next > until {
                self.now = until;
                break;
            }
            self.now = next;
            match lands.filter(|(at, _)| *at <= tick) {
                Some(key) => {
                    let (index, fetch, range) = self.under_way.remove(&key).unwrap();
                    let disk = &mut self.disks[index];
                    let bytes = self.geometry.bytes(range).len();
                    disk.landed_bytes += bytes;
                    match (fetch, &mut self.ahead) {
                        (Fetch::Mover(flight), _) => {
                            disk.residency.mark_clean(range);
                            self.tell(index, |m, now, r, out| m.landed(now, flight, bytes, r, out));
                        }
                        (Fetch::Ahead(id), Some((_, precopy))) => {
                            precopy.arrived(self.now, id, Some(bytes));
                            precopy.landed(id);
                        }
                        (Fetch::Ahead(_), None) => {}
                    }
                    self.copy_ahead();
                }
                None => {
                    self.ticked = tick;
                    for index in 0..self.disks.len() {
                        self.tell(index, |m, now, r, out| m.tick(now, r, out));
                    }
                    self.copy_ahead();
                }
            }
        }
        let could = self.rate as f64 * time.as_secs_f64();
        let landed = self.disks.iter().zip(before);
        landed
            .map(|(disk, before)| (disk.landed_bytes - before) as f64 / could)
            .collect()
    }
}

pub(super) fn is_near(share: f64, wanted: f64) -> bool {
    (share - wanted).abs() < 0.05
}

/// The second of two disks begins when the first has the link to itself. Six round trips later both
/// have the same, and together all of it; when one is capped or pauses, the other has the rest, and when it
/// goes on, they have the same again.
#[test]
fn two_disks_come_to_equal_shares() {
    let mut link = Link::new(400, &[policy(), policy()]);
    link.begin(0);
    link.run(3 * SECOND);
    let alone = link.run(SECOND);
    assert!(alone[0] > 0.92, "{alone:?}");
    let settle = RTT * 6;
    link.begin(1);
    link.run(settle);
    let both = link.run(2 * SECOND);
    assert!(both.iter().all(|share| is_near(*share, 0.48)), "{both:?}");
    let capped = Some(5_000_000);
    link.tell(0, |m, now, r, out| m.set_limit(now, capped, r, out));
    link.run(settle);
    let rest = link.run(2 * SECOND);
    assert!(is_near(rest[0], 0.1) && rest[1] > 0.75, "{rest:?}");
    link.tell(0, |m, now, r, out| m.set_limit(now, None, r, out));
    link.disks[0].mover.pause();
    link.run(settle);
    let one = link.run(2 * SECOND);
    assert!(one[0] == 0.0 && one[1] > 0.92, "{one:?}");
    link.tell(0, |m, now, r, out| m.resume(now, r, out));
    link.run(settle);
    let both = link.run(2 * SECOND);
    assert!(both.iter().all(|share| is_near(*share, 0.48)), "{both:?}");
}

#[test]
fn what_a_capped_disk_leaves_is_the_others() {
    let capped = Policy {
        max_rate: Some(5_000_000),
        ..policy()
    };
    let mut link = Link::new(400, &[policy(), capped, policy()]);
    (0..3).for_each(|index| link.begin(index));
    link.run(4 * SECOND);
    let shares = link.run(4 * SECOND);
    assert!(is_near(shares[1], 0.1), "{shares:?}");
    assert!(
        is_near(shares[0], 0.43) && is_near(shares[2], 0.43),
        "{shares:?}"
    );
    assert!(shares.iter().sum::<f64>() > 0.92, "{shares:?}");
}

/// A disk that is gone leaves nothing behind, whatever it had in flight.
#[test]
fn a_disk_that_goes_gives_its_share_back() {
    let mut link = Link::new(400, &[policy(), policy()]);
    (0..2).for_each(|index| link.begin(index));
    link.run(3 * SECOND);
    link.under_way.retain(|_, (index, ..)| *index == 0);
    let path = Arc::new(Path::default());
    link.disks[1].mover.share(&path, Duration::ZERO);
    link.disks[1].mover.source_down(link.now);
    link.run(RTT * 6);
    let shares = link.run(2 * SECOND);
    assert!(shares[0] > 0.92, "{shares:?}");
}

/// What the guest of one disk reads goes past the background copies of both.
#[test]
fn demand_of_one_is_not_behind_the_copy_of_another() {
    let mut link = Link::new(400, &[policy(), policy()]);
    (0..2).for_each(|index| link.begin(index));
    link.run(3 * SECOND);
    let mut worst = Duration::ZERO;
    for n in 0..40_u64 {
        let block = link.geometry.blocks() - 1 - n * 64;
        let asked = link.now;
        let range = BlockRange::new(block, block + 1);
        link.tell(0, |m, now, r, out| m.read(now, 1, range, r, out));
        link.run(100 * MS);
        let (at, _) = *link.disks[0].woken.last().unwrap();
        assert!(at > asked, "the read was not answered");
        worst = worst.max(at - asked);
    }
    assert!(worst < RTT * 3 / 2 + 10 * MS, "{worst:?}");
}

/// A source that paces itself is asked for more than fills the path (here, at the start, for four times that); another
/// one of the same host is not.
#[test]
fn only_a_source_that_paces_itself_is_over_asked() {
    let path = Arc::new(Path::default());
    let seats = [Seat::alone(), Seat::alone()];
    seats[1].source_paces(true);
    for seat in &seats {
        seat.move_to(&path, Duration::ZERO);
    }
    let asked = [1, 0].map(|index: usize| {
        let mut asked = 0_u64;
        while seats[index].may_send() {
            seats[index].sent(4096);
            asked += 4096;
        }
        asked
    });
    let shares = [1, 0].map(|index: usize| seats[index].window_bytes());
    assert!(
        asked[0].abs_diff(shares[0] * 4) <= 16384,
        "{asked:?} of {shares:?}"
    );
    assert!(
        asked[1].abs_diff(shares[1]) <= 4096,
        "{asked:?} of {shares:?}"
    );
}

/// Each disk's connections tell of themselves alone: what one has lost is no loss of another.
#[test]
fn a_loss_is_told_by_the_connections_that_had_it() {
    let path = Arc::new(Path::default());
    let seats = [0_u64, 900].map(|out_of_order| {
        let seat = Seat::alone();
        seat.move_to(&path, Duration::ZERO);
        (seat, out_of_order)
    });
    let tell = |now, more| {
        for (seat, out_of_order) in &seats {
            let seen = PathSeen {
                out_of_order: out_of_order + more,
                ..PathSeen::default()
            };
            seat.sees(now, Some(seen));
        }
        seats[0].0.lost_at()
    };
    assert_eq!(tell(MS, 0), None);
    assert_eq!(tell(MS * 2, 0), None);
    assert_eq!(tell(MS * 3, 1), Some(MS * 3));
    // Connections that have ended take what they told along.
    assert_eq!(tell(MS * 4, 0), Some(MS * 3));
}

/// What was told by connections that are gone is forgotten with the last of them.
#[test]
fn a_queue_is_that_of_whoever_still_tells() {
    let path = Arc::new(Path::default());
    let [one, other] = [0; 2].map(|_| {
        let seat = Seat::alone();
        seat.move_to(&path, Duration::ZERO);
        seat
    });
    let seen = |queue, ms| PathSeen {
        queue,
        trip: MS * ms,
        ..PathSeen::default()
    };
    one.sees(MS, Some(seen(true, 70)));
    other.sees(MS * 2, Some(seen(false, 50)));
    assert_eq!(one.seen(), Some(seen(true, 70)));
    let later = PathSeen {
        since_epoch: Duration::from_millis(1001),
        ..seen(false, 52)
    };
    other.sees(MS * 3, Some(later));
    assert_eq!(one.seen(), Some(later));
    one.sees(
        MS * 3,
        Some(PathSeen {
            since_epoch: Duration::from_secs(60),
            ..seen(true, 70)
        }),
    );
    other.sees(MS * 3, Some(later));
    assert_eq!(one.seen(), Some(later), "the clock was set back");
    one.sees(MS * 3, None);
    other.sees(MS * 4, Some(seen(false, 51)));
    assert_eq!(one.seen(), Some(seen(false, 51)));
    other.sees(MS * 5, None);
    assert_eq!(one.seen(), None);
}

/// After a loss more is asked for than the window, but not of the background copy while a stream is read ahead.
#[test]
fn after_a_loss_the_copy_asks_for_no_more_beside_what_is_read_ahead() {
    let (seat, mut now) = (Seat::alone(), Duration::ZERO);
    let mut fill = |seat: &Seat, room: fn(&Seat) -> bool, losses: u64| {
        let mut asked = Vec::new();
        while room(seat) {
            asked.push(seat.chunk_bytes());
            seat.sent(seat.chunk_bytes());
        }
        now += RTT;
        let seen = PathSeen {
            out_of_order: losses,
            ..PathSeen::default()
        };
        seat.sees(now, Some(seen));
        // No more than 100 Mbit/s carry in a round trip, over and over.
        let carried = RTT.as_secs_f64() * 12.5e6;
        let all: u64 = asked.iter().sum();
        let trips = (all as f64 / carried).ceil().max(1.0);
        now += RTT.mul_f64(trips - 1.0);
        for bytes in asked {
            seat.landed(now, RTT, bytes, bytes);
        }
        all
    };
    for _ in 0..60 {
        fill(&seat, Seat::may_send, 0);
    }
    let (mut most, mut most_beside) = (0, 0);
    for losses in 1..40 {
        most = most.max(fill(&seat, Seat::may_send, losses));
        most_beside = most_beside.max(fill(&seat, Seat::may_copy_beside, losses));
    }
    assert!(most > most_beside * 3 / 2, "{most} and {most_beside}");
}
