//! Read-ahead and the copy order, driven by a small model of a source: what is fetched, in which
//! order, how much of it at once, and nothing twice.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::tests::{MS, disk, policy};
use super::*;
use crate::geometry::BlockIndex;
use crate::heat::Heat;
use crate::readahead::{Advance, Detector, Shape};

/// A source that answers in order, 20 ms after it was asked, and what it was asked.
struct World {
    geometry: Geometry,
    residency: Residency,
    mover: Mover<u32>,
    detector: Detector,
    now: Duration,
    under_way: VecDeque<(Duration, FlightId, BlockRange)>,
    fetched: Vec<(BlockRange, Lane)>,
    times: Vec<u8>,
    most_in_flight: u64,
    woken: Vec<u32>,
    complete: bool,
    questions: Vec<BlockRange>,
    cancelled: Vec<(BlockRange, Lane)>,
}

const RTT: Duration = Duration::from_millis(20);

impl World {
    fn new(mib: u64, policy: Policy) -> Self {
        let (geometry, residency) = disk(mib);
        let mut world = Self {
            geometry,
            mover: Mover::new(geometry, Phase::Arriving, policy),
            detector: Detector::new(0),
            now: MS,
            under_way: VecDeque::new(),
            fetched: Vec::new(),
            times: vec![0; usize::try_from(geometry.blocks()).unwrap()],
            most_in_flight: 0,
            woken: Vec::new(),
            complete: false,
            questions: Vec::new(),
            cancelled: Vec::new(),
            residency,
        };
        world.tell(|m, now, r, out| m.source_up(now, r, out));
        world
    }

    fn tell(
        &mut self,
        event: impl FnOnce(&mut Mover<u32>, Duration, &Residency, &mut Vec<Action<u32>>),
    ) {
        let mut out = Vec::new();
        event(&mut self.mover, self.now, &self.residency, &mut out);
        for action in out {
            match action {
                Action::Fetch {
                    flight,
                    range,
                    lane,
                    keep,
                } => {
                    assert!(keep);
                    // (Small runs that are here already may be fetched along with their
                    // neighbours: `MERGE_GAP_BYTES`.)
                    let here = |b: &u64| self.residency.state(BlockIndex(*b)).is_resident();
                    for block in (range.start..range.end).filter(|b| !here(b)) {
                        self.times[usize::try_from(block).unwrap()] += 1;
                    }
                    self.fetched.push((range, lane));
                    self.under_way.push_back((self.now + RTT, flight, range));
                }
                Action::Wake(who) => self.woken.push(who),
                Action::Complete => self.complete = true,
                Action::Promote { .. } => {}
                Action::Cancel { range, lane } => self.cancelled.push((range, lane)),
                Action::QueryExtents { range } => self.questions.push(range),
                other => panic!("{other:?}"),
            }
        }
        let in_flight = self.under_way.iter().map(|(_, _, r)| r.len()).sum();
        self.most_in_flight = self.most_in_flight.max(in_flight);
    }

    /// The next answer arrives. False if none is on its way.
    fn land_one(&mut self) -> bool {
        let Some((at, flight, range)) = self.under_way.pop_front() else {
            return false;
        };
        self.now = self.now.max(at);
        self.residency.mark_clean(range);
        let bytes = self.geometry.bytes(range).len();
        self.tell(|m, now, r, out| m.landed(now, flight, bytes, r, out));
        true
    }

    /// A guest reads bytes and waits for them. Tells whether it had to wait.
    fn read(&mut self, start: u64, len: u32) -> bool {
        let range = self
            .geometry
            .covering(crate::geometry::ByteRange::at(start, len.into()));
        let missing = !self.residency.all_resident(range);
        let woken = self.woken.len();
        if missing {
            self.tell(|m, now, r, out| m.read(now, 0, range, r, out));
        }
        if let Some(told) = self.detector.note(start, len, missing) {
            self.tell(|m, now, r, out| m.read_ahead(now, told, r, out));
        }
        while missing && self.woken.len() == woken {
            assert!(self.land_one(), "a reader waits for nothing");
        }
        self.now += Duration::from_micros(100);
        missing
    }

    fn fetched_blocks(&self, lane: Lane) -> u64 {
        let these = self.fetched.iter().filter(|(_, l)| *l == lane);
        these.map(|(range, _)| range.len()).sum()
    }

    fn nothing_twice(&self) {
        assert!(
            self.times.iter().all(|n| *n <= 1),
            "a block was fetched twice"
        );
    }
}

fn on_demand() -> Policy {
    Policy {
        background: false,
        ..policy()
    }
}

const K: u64 = 1 << 10;

/// How long `reads` take, in round trips.
fn round_trips(world: &mut World, reads: impl IntoIterator<Item = (u64, u32)>) -> u128 {
    let started = world.now;
    for (at, len) in reads {
        world.read(at, len);
    }
    (world.now - started).as_nanos() / RTT.as_nanos()
}

/// Read one by one they would take 512 round trips.
#[test]
fn a_sequential_reader_is_not_held_up_by_round_trips() {
    for backwards in [false, true] {
        let mut world = World::new(64, on_demand());
        let reads = (0..512_u64).map(|n| if backwards { 511 - n } else { n } * 128 * K);
        let took = round_trips(&mut world, reads.map(|at| (at, 128 << 10)));
        assert!(took < 40, "{took} round trips, backwards: {backwards}");
        world.nothing_twice();
        assert_eq!(world.fetched_blocks(Lane::Bulk), 0);
    }
}

#[test]
fn a_strided_reader_is_not_held_up_and_the_gaps_are_left() {
    let mut world = World::new(128, on_demand());
    let reads = (0..256_u64).map(|n| (n * 512 * K, 4096));
    let took = round_trips(&mut world, reads);
    assert!(took < 40, "{took} round trips for 256 reads");
    let fetched: u64 = world.times.iter().map(|n| u64::from(*n)).sum();
    assert!(
        fetched <= 256 + MAX_STRIDES_AHEAD,
        "{fetched} blocks for 256 reads"
    );
    world.nothing_twice();
}

/// What a strided stream may have asked for beyond its end.
const MAX_STRIDES_AHEAD: u64 = 64;

/// Read one by one they would take 768 round trips.
#[test]
fn three_streams_at_once_are_all_read_ahead() {
    let mut world = World::new(192, on_demand());
    let reads = (0..256_u64).flat_map(|n| {
        let back = (128 << 20) - (n + 1) * 128 * K;
        let other = (140 << 20) + n * 128 * K;
        [n * 128 * K, back, other].map(|at| (at, 128 << 10))
    });
    let took = round_trips(&mut world, reads);
    assert!(took < 60, "{took} round trips");
    world.nothing_twice();
}

/// Random reads cause almost no read-ahead; what a stream that ends leaves unread is at most what
/// it had earned.
#[test]
fn random_reads_cause_almost_no_read_ahead() {
    let mut world = World::new(1024, on_demand());
    let mut random: u64 = 7;
    for _ in 0..2000 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        world.read((random >> 33) % (1024 * 256) * 4096, 4096);
    }
    let ahead = world.fetched_blocks(Lane::Ahead);
    assert!(ahead <= 40, "{ahead} blocks ahead of 2000 random reads");
}

/// Many short files, each read in a row and no further: less and less is fetched beyond their end.
#[test]
fn streams_that_end_early_make_the_window_smaller() {
    let mut world = World::new(1024, on_demand());
    let mut wasted = Vec::new();
    for file in 0..200_u64 {
        let (before, start) = (world.fetched_blocks(Lane::Ahead), file * 5 * 1024 * K);
        (0..4).for_each(|n| {
            world.read(start + n * 64 * K, 64 << 10);
        });
        while world.land_one() {}
        let ahead = world.fetched_blocks(Lane::Ahead) - before;
        wasted.push(ahead);
        world.now += Duration::from_secs(3);
        world.tell(|m, now, r, out| m.tick(now, r, out));
    }
    let (first, last) = (wasted[0], wasted[199]);
    assert!(
        last * 2 < first,
        "{first} blocks ahead of the first file, {last} of the last"
    );
}

/// What is on its way for a stream that has ended is taken back, unless it is copied anyway.
#[test]
fn what_was_fetched_ahead_of_a_stream_that_ended_is_taken_back() {
    for (policy, some) in [(on_demand(), true), (policy(), false)] {
        let mut world = World::new(64, policy);
        (0..32_u64).for_each(|n| {
            world.read(n * 128 * K, 128 << 10);
        });
        let ahead = world.fetched_blocks(Lane::Ahead);
        assert!(ahead > 0 && !world.under_way.is_empty());
        world.now += Duration::from_secs(3);
        world.tell(|m, now, r, out| m.tick(now, r, out));
        assert_eq!(!world.cancelled.is_empty(), some, "{:?}", world.cancelled);
        let on_its_way = |range: BlockRange| world.under_way.iter().any(|(.., r)| *r == range);
        let ahead = |(range, lane): &(_, Lane)| *lane == Lane::Ahead && on_its_way(*range);
        assert!(world.cancelled.iter().all(ahead), "{:?}", world.cancelled);
    }
}

#[test]
fn before_the_handoff_nothing_is_read_ahead() {
    let (g, r) = disk(16);
    let mut mover: Mover<u32> = Mover::new(g, Phase::Standby, policy());
    let mut out = Vec::new();
    mover.source_up(MS, &r, &mut out);
    let mut detector = Detector::new(0);
    for n in 0..16 {
        if let Some(told) = detector.note(n * 65536, 65536, true) {
            mover.read_ahead(MS, told, &r, &mut out);
        }
    }
    assert!(out.is_empty(), "{out:?}");
}

/// What a stream wants goes before the background copy.
#[test]
fn read_ahead_goes_before_the_background_copy() {
    let mut world = World::new(512, policy());
    let start = 256 << 20;
    (0..64_u64).for_each(|n| {
        world.read(start + n * 128 * K, 128 << 10);
    });
    let mut late = world.fetched.clone();
    late.drain(..late.len() / 2);
    let ahead: u64 = late
        .iter()
        .filter(|f| f.1 == Lane::Ahead)
        .map(|f| f.0.len())
        .sum();
    let bulk: u64 = late
        .iter()
        .filter(|f| f.1 == Lane::Bulk)
        .map(|f| f.0.len())
        .sum();
    assert!(
        ahead > bulk,
        "{ahead} blocks ahead, {bulk} in the background"
    );
    world.nothing_twice();
}

/// A source that paces itself sends what a stream wants before the copy that was asked for earlier:
/// nothing of that need have come. Another source would not.
#[test]
fn of_a_source_that_paces_itself_a_stream_asks_at_once() {
    for paces in [false, true] {
        let (g, r) = disk(512);
        let mut mover: Mover<u32> = Mover::new(g, Phase::Arriving, policy());
        mover.source_paces(paces);
        let mut out = Vec::new();
        mover.source_up(MS, &r, &mut out);
        assert!(!out.is_empty(), "the copy has begun");
        out.clear();
        let told = Advance {
            stream: 1,
            shape: Shape::Forward,
            front: 256 << 20,
            read_bytes: 64 << 20,
        };
        mover.read_ahead(MS, told, &r, &mut out);
        let asked = out.iter().filter_map(|action| match action {
            Action::Fetch { range, lane, .. } => {
                assert_eq!(*lane, Lane::Ahead);
                Some(g.bytes(*range).len())
            }
            _ => None,
        });
        let asked: u64 = asked.sum();
        assert_eq!(asked > 0, paces, "{asked} bytes asked for");
        // Nothing has come yet: the window is the first one, and four of it are asked for.
        assert!(asked <= 4 << 20, "{asked} bytes asked for");
    }
}

#[test]
fn the_copy_follows_the_heat() {
    let heat = Heat::new(64 << 20);
    (0..100).for_each(|_| heat.read(40 << 20, 4096));
    heat.read(10 << 20, 4096);
    (0..10).for_each(|_| heat.written(5 << 20, 4096));
    let mut world = World::new(
        64,
        Policy {
            background: false,
            ..policy()
        },
    );
    let order = heat.map().order(world.geometry);
    world.mover = Mover::new(world.geometry, Phase::Arriving, policy());
    world.tell(|m, now, r, out| m.set_order(now, order, r, out));
    world.tell(|m, now, r, out| m.source_up(now, r, out));
    while world.land_one() {}
    assert!(world.complete);
    let place = |mib: u64| {
        let at = mib * 256;
        world
            .fetched
            .iter()
            .position(|(r, _)| r.start <= at && at < r.end)
            .unwrap()
    };
    assert!(place(40) < place(10) && place(10) < place(0));
    assert!(
        world.fetched[place(5)..]
            .iter()
            .all(|(r, _)| (1280..1536).contains(&r.start))
    );
    assert!(place(63) < place(5));
    assert!(world.times.iter().all(|n| *n == 1));
    // The source is told, so that it sends in this order, too.
    let lane = |mib: u64| world.fetched[place(mib)].1;
    let lanes = [40, 10, 0, 5].map(lane);
    assert_eq!(lanes, [Lane::Hot, Lane::Hot, Lane::Bulk, Lane::Late]);
}

/// What a guest writes over or trims before its turn has come, hot, cold or write-hot, never crosses
/// the link. A region that is written all the time has the most time for that: it comes last.
#[test]
fn what_is_owned_here_is_never_fetched() {
    let heat = Heat::new(64 << 20);
    heat.read(50 << 20, 4096);
    (0..10).for_each(|_| heat.written(5 << 20, 4096));
    let mut world = World::new(64, on_demand());
    let order = heat.map().order(world.geometry);
    world.mover = Mover::new(world.geometry, Phase::Arriving, policy());
    world.tell(|m, now, r, out| m.set_order(now, order, r, out));
    let owned = |mib: u64| BlockRange::new(mib * 256 + 16, (mib + 1) * 256);
    // Before the source is there, and while the copy runs.
    world.residency.mark_owned(owned(50));
    world.tell(|m, now, r, out| m.source_up(now, r, out));
    world.residency.mark_owned(owned(40));
    while world.fetched_blocks(Lane::Bulk) < 50 * 256 {
        assert!(world.land_one());
    }
    assert_eq!(world.fetched_blocks(Lane::Late), 0, "write-hot comes last");
    world.residency.mark_owned(owned(5));
    while world.land_one() {}
    assert!(world.complete);
    for mib in [50, 40, 5] {
        let own = owned(mib);
        let fetched =
            (own.start..own.end).filter(|b| world.times[usize::try_from(*b).unwrap()] > 0);
        assert_eq!(
            fetched.count(),
            0,
            "blocks of MiB {mib} that are owned here"
        );
    }
    assert_eq!(world.fetched_blocks(Lane::Late), 16);
    world.nothing_twice();
}

/// Several questions cross the link at once, the hot parts of the disk first; what each answer tells
/// is copied at once, wherever it is, and nothing that nobody has told of.
#[test]
fn what_is_scanned_is_copied_while_the_scan_goes_on() {
    let mut world = World::new(2048, on_demand());
    let policy = Policy {
        has_extents: true,
        ..policy()
    };
    world.mover = Mover::new(world.geometry, Phase::Arriving, policy);
    let hot = [1900, 1500].map(|mib| BlockRange::new(mib * 256, (mib + 1) * 256));
    let order = CopyOrder::new(hot, []);
    world.tell(|m, now, r, out| m.set_order(now, order, r, out));
    world.tell(|m, now, r, out| m.source_up(now, r, out));
    let asked = world.questions.clone();
    let starts: Vec<u64> = asked.iter().map(|q| q.start).take(3).collect();
    assert_eq!(starts, [hot[0].start, hot[1].start, 0], "{asked:?}");
    // Until the first answer what is read often is believed to be data: a window of it.
    assert!(
        world
            .fetched
            .iter()
            .all(|(r, _)| r.intersection(hot[0]) == *r)
    );
    // The first answer to come is of the middle of the row.
    let middle = asked[3];
    world.tell(|m, now, r, out| m.extents(now, middle, &[], r, out));
    assert!(world.questions.len() > asked.len(), "it asks on");
    while world.land_one() {}
    assert_eq!(world.fetched_blocks(Lane::Hot), 256);
    assert_eq!(world.fetched_blocks(Lane::Bulk), 0, "the row begins before");
    world.tell(|m, now, r, out| m.extents(now, asked[1], &[], r, out));
    while world.land_one() {}
    assert_eq!(world.fetched_blocks(Lane::Hot), 512);
    world.tell(|m, now, r, out| m.extents(now, asked[2], &[], r, out));
    while world.land_one() {}
    let row = asked[2].len() + middle.len();
    assert_eq!(world.fetched_blocks(Lane::Bulk), row);
    world.nothing_twice();
}

proptest! {
    /// Whatever is hot, read, written, paused, lost and found: every block comes, none while it is
    /// in flight already, and never more is in flight than the window allows.
    #[test]
    fn every_block_comes_once(
        hot in prop::collection::vec((0_u64..32, 1_u64..200, any::<bool>()), 0..20),
        steps in prop::collection::vec((0_u8..7, 0_u64..8192, 1_u64..64), 0..120),
    ) {
        let mut world = World::new(32, policy());
        let heat = Heat::new(32 << 20);
        for (mib, times, write) in hot {
            for _ in 0..times {
                if write { heat.written(mib << 20, 512) } else { heat.read(mib << 20, 512) }
            }
        }
        let order = heat.map().order(world.geometry);
        world.tell(|m, now, r, out| m.set_order(now, order, r, out));
        let mut lost = std::collections::BTreeSet::new();
        for (what, at, n) in steps {
            let end = (at + n).min(world.geometry.blocks());
            match what {
                0 => { world.read(at * 4096, u32::try_from((end - at) * 4096).unwrap()); }
                1 => for k in 0..6 {
                    let start = at * 4096 + k * 65536;
                    if start + 65536 <= 32 << 20 { world.read(start, 65536); }
                },
                2 => { world.residency.mark_owned(BlockRange::new(at, end)); }
                3 => { world.land_one(); }
                4 | 5 => if let Some((_, flight, range)) = world.under_way.pop_front() {
                    let why = if what == 4 { FetchFailure::Refused } else { FetchFailure::Disconnected };
                    lost.extend(range.start..range.end);
                    world.tell(|m, now, r, out| m.failed(now, flight, why, r, out));
                },
                _ => {
                    world.now += Duration::from_secs(6);
                    heat.read(at * 4096, 4096);
                    let order = heat.map().order(world.geometry);
                    world.tell(|m, now, r, out| m.set_order(now, order, r, out));
                }
            }
            world.tell(|m, now, r, out| m.tick(now, r, out));
        }
        // Refused ranges are left alone for some seconds.
        for _ in 0..2000 {
            while world.land_one() {}
            world.now += Duration::from_millis(20);
            world.tell(|m, now, r, out| m.tick(now, r, out));
            if world.complete { break; }
        }
        prop_assert!(world.complete);
        for (block, times) in world.times.iter().enumerate() {
            let block = u64::try_from(block).unwrap();
            prop_assert!(*times <= 1 || lost.contains(&block), "block {} {} times", block, times);
        }
        prop_assert!(world.most_in_flight * 4096 <= (64 << 20) + (2 << 20));
    }
}
