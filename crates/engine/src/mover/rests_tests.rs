//! When the rests of partly written blocks are fetched, and how many at once.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::time::Duration;

use super::tests::{MS, policy};
use super::*;
use crate::geometry::BlockIndex;
use crate::sync::AtomicU64;

const TICK: Duration = Mover::<u32>::TICK;
const SECOND: Duration = Duration::from_secs(1);

/// A disk of 512 MiB, and a source that answers in order, a tick after it was asked.
struct World {
    residency: Residency,
    mover: Mover<u32>,
    now: Duration,
    under_way: VecDeque<(FlightId, BlockRange)>,
    /// The rests that were asked for.
    asked: Vec<BlockIndex>,
    most: usize,
    failed: Vec<u32>,
}

impl World {
    fn new(background: bool) -> Self {
        Self::of(4096, background)
    }

    fn of(block_bytes: u32, background: bool) -> Self {
        let geometry = Geometry::new(512 << 20, block_bytes).unwrap();
        let words: Vec<_> = (0..Residency::required_words(geometry))
            .map(|_| AtomicU64::new(0))
            .collect();
        let residency = Residency::new(geometry, Box::new(words));
        let policy = Policy {
            background,
            ..policy()
        };
        let mut world = Self {
            mover: Mover::new(geometry, Phase::Arriving, policy),
            residency,
            now: SECOND,
            under_way: VecDeque::new(),
            asked: Vec::new(),
            most: 0,
            failed: Vec::new(),
        };
        // What is copied in the background waits for the local medium, so that only rests are asked for.
        world.mover.store_is_behind(true);
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
                    ..
                } => {
                    self.under_way.push_back((flight, range));
                    if lane == Lane::Rest {
                        assert_eq!(range.len(), 1);
                        self.asked.push(BlockIndex(range.start));
                    }
                }
                Action::Fail(who, ReadFailure::SourceRefused) => self.failed.push(who),
                Action::Wake(_) => {}
                other => panic!("{other:?}"),
            }
        }
        self.most = self.most.max(self.under_way.len());
    }

    /// A guest writes the first sector of each.
    fn leave(&mut self, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            self.residency
                .mark_partial(BlockIndex(block), 0..1)
                .unwrap();
        }
    }

    fn land_all(&mut self) {
        for (flight, range) in std::mem::take(&mut self.under_way) {
            self.residency.mark_owned(range);
            self.tell(|m, now, r, out| m.landed(now, flight, 4096, r, out));
        }
    }

    fn tick(&mut self) {
        self.now += TICK;
        self.land_all();
        self.tell(|m, now, r, out| m.tick(now, r, out));
    }

    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.tick();
        }
    }
}

#[test]
fn a_guest_that_goes_on_leaving_some_causes_no_fetch() {
    let mut world = World::new(false);
    for block in 0..500 {
        world.leave([block]);
        world.tick();
    }
    assert!(world.asked.is_empty(), "{:?}", world.asked);
}

#[test]
fn once_it_is_quiet_one_comes_after_the_other_and_each_once() {
    let mut world = World::new(false);
    world.leave(100..120);
    world.pass(SECOND / 4);
    assert!(world.asked.is_empty(), "{:?}", world.asked);
    world.pass(SECOND);
    assert_eq!(world.asked, (100..120).map(BlockIndex).collect::<Vec<_>>());
    assert_eq!(world.most, 1);
    assert_eq!(world.residency.partial_blocks(), 0);
}

/// A source that is slow to answer has no more than a few before it.
#[test]
fn no_more_than_a_few_are_under_way() {
    let mut world = World::new(false);
    world.leave(0..100);
    for _ in 0..200 {
        world.now += TICK;
        world.tell(|m, now, r, out| m.tick(now, r, out));
    }
    assert_eq!(world.asked, [0, 1, 2, 3].map(BlockIndex));
}

#[test]
fn those_that_the_background_copy_comes_by_wait_for_it() {
    let mut world = World::new(true);
    world.leave(0..100);
    world.pass(SECOND * 3);
    assert!(world.asked.is_empty(), "{:?}", world.asked);
    // Paused it does not come by.
    world.mover.pause();
    world.pass(SECOND * 3);
    assert_eq!(world.asked.len(), 100);
}

#[test]
fn too_many_do_not_wait_for_anything() {
    let mut world = World::new(true);
    let many = 131_072 / 4;
    world.leave(0..many);
    world.pass(SECOND);
    assert!(world.asked.is_empty());
    world.leave(many..many + 500);
    world.pass(SECOND);
    assert!((500..564).contains(&world.asked.len()));
    assert_eq!(world.most, 64);
}

/// The table is never full for want of ticks.
#[test]
fn of_too_many_each_that_comes_brings_another() {
    let mut world = World::new(true);
    world.leave(0..40_000);
    world.tick();
    for _ in 0..50 {
        world.land_all();
    }
    assert!(world.asked.len() > 2000, "{}", world.asked.len());
}

#[test]
fn of_large_blocks_fewer_may_wait_and_fewer_are_under_way() {
    let mut world = World::of(1 << 20, true);
    world.leave(0..200);
    world.pass(SECOND * 10);
    // (Three more had been asked for.)
    assert_eq!(world.residency.partial_blocks(), 512 / 4 - 3);
    assert_eq!(world.most, 4);
}

#[test]
fn all_come_at_once_when_they_are_needed_and_as_before_when_they_are_not() {
    let mut world = World::new(true);
    world.leave(0..2000);
    world.tick();
    for _ in 0..20 {
        world.now += MS * 2;
        world.tell(|m, now, r, out| m.need_rests(now, r, out));
    }
    assert_eq!(world.under_way.len(), 1024);
    world.pass(SECOND);
    assert_eq!(world.residency.partial_blocks(), 0);
    assert_eq!(world.asked.len(), 2000);
    // Nobody has said it again since.
    world.leave(5000..5100);
    world.pass(SECOND * 2);
    assert_eq!(world.asked.len(), 2000);
}

/// One is being read by a guest, one is refused, one was completed by the guest.
#[test]
fn what_is_on_its_way_or_refused_or_here_is_passed_over() {
    let mut world = World::new(false);
    world.leave([1, 2, 3, 4]);
    let block = |b| BlockRange::one(BlockIndex(b));
    world.tell(|m, now, r, out| m.read(now, 7, block(1), r, out));
    world.tell(|m, now, r, out| m.read(now, 8, block(2), r, out));
    let (refused, _) = world.under_way.pop_back().unwrap();
    world.tell(|m, now, r, out| m.failed(now, refused, FetchFailure::Refused, r, out));
    assert_eq!(world.failed, [8]);
    world.residency.mark_partial(BlockIndex(3), 1..8).unwrap();
    for _ in 0..50 {
        world.now += TICK;
        world.tell(|m, now, r, out| m.tick(now, r, out));
    }
    assert_eq!(world.asked, [BlockIndex(4)]);
    // It is tried again later.
    world.pass(SECOND * 10);
    assert_eq!(world.asked, [BlockIndex(4), BlockIndex(2)]);
}
