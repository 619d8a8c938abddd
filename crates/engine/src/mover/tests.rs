#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::time::Duration;

use super::*;
use crate::geometry::BlockIndex;
use crate::residency::Residency;
use crate::sync::AtomicU64;

pub(super) const MS: Duration = Duration::from_millis(1);

pub(super) fn disk(mib: u64) -> (Geometry, Residency) {
    let g = Geometry::new(mib << 20, 4096).unwrap();
    let words = (0..Residency::required_words(g))
        .map(|_| AtomicU64::new(0))
        .collect::<Vec<_>>();
    (g, Residency::new(g, Box::new(words)))
}

pub(super) fn policy() -> Policy {
    Policy {
        exact: false,
        background: true,
        max_rate: None,
        loss_timeout: None,
        has_extents: false,
    }
}

/// What was asked of the source, and who was woken.
#[derive(Default)]
struct Seen {
    fetches: Vec<(FlightId, BlockRange, Lane)>,
    woken: Vec<u32>,
    failed: Vec<(u32, ReadFailure)>,
    complete: bool,
    promoted: Vec<BlockRange>,
    cancelled: Vec<(BlockRange, Lane)>,
}

fn sort(actions: Vec<Action<u32>>) -> Seen {
    let mut seen = Seen::default();
    for action in actions {
        match action {
            Action::Fetch {
                flight,
                range,
                lane,
                ..
            } => seen.fetches.push((flight, range, lane)),
            Action::Wake(who) => seen.woken.push(who),
            Action::Fail(who, why) => seen.failed.push((who, why)),
            Action::Complete => seen.complete = true,
            Action::Promote { range } => seen.promoted.push(range),
            Action::Cancel { range, lane } => seen.cancelled.push((range, lane)),
            Action::InstallZero { .. } | Action::QueryExtents { .. } => {}
        }
    }
    seen
}

fn arriving(g: Geometry, r: &Residency, policy: Policy) -> (Mover<u32>, Seen) {
    let mut mover = Mover::new(g, Phase::Arriving, policy);
    let mut out = Vec::new();
    mover.source_up(Duration::ZERO, r, &mut out);
    (mover, sort(out))
}

/// A guest has written all of one fetch, part of another, and waits for a third.
#[test]
fn what_a_guest_has_written_meanwhile_is_taken_back_once() {
    let (g, r) = disk(4);
    let (mut mover, begun) = arriving(g, &r, policy());
    let [(written, range, lane), (_, partly, _), (_, awaited, _)] = begun.fetches[..3] else {
        panic!("{:?}", begun.fetches);
    };
    let mut out = Vec::new();
    mover.read(
        MS,
        1,
        BlockRange::one(BlockIndex(awaited.start)),
        &r,
        &mut out,
    );
    r.mark_owned(range);
    r.mark_owned(BlockRange::new(partly.start + 1, partly.end));
    r.mark_owned(awaited);
    mover.tick(MS, &r, &mut out);
    assert_eq!(sort(std::mem::take(&mut out)).cancelled, [(range, lane)]);
    mover.tick(MS * 2, &r, &mut out);
    assert!(sort(std::mem::take(&mut out)).cancelled.is_empty());
    // It makes room for something else, and is not asked for again.
    mover.failed(MS * 3, written, FetchFailure::Cancelled, &r, &mut out);
    mover.tick(MS * 4, &r, &mut out);
    let seen = sort(out);
    assert!(!seen.fetches.is_empty() && seen.failed.is_empty());
    assert!(
        seen.fetches
            .iter()
            .all(|(_, again, _)| !again.overlaps(range))
    );
}

/// A reader may come to what was taken back: over a gap of what is here.
#[test]
fn a_reader_of_what_was_taken_back_is_woken() {
    let (g, r) = disk(4);
    let (mut mover, begun) = arriving(g, &r, policy());
    let (flight, range, _) = begun.fetches[1];
    let mut out = Vec::new();
    r.mark_owned(BlockRange::new(range.start, range.end));
    mover.tick(MS, &r, &mut out);
    let around = BlockRange::new(range.start - 1, range.end + 1);
    mover.read(MS, 7, around, &r, &mut out);
    let all: Vec<FlightId> = begun.fetches.iter().map(|(id, ..)| *id).collect();
    mover.failed(MS, flight, FetchFailure::Cancelled, &r, &mut out);
    for (id, range, _) in begun.fetches {
        r.mark_clean(range);
        mover.landed(MS, id, 4096, &r, &mut out);
    }
    assert!(all.contains(&flight));
    assert_eq!(sort(out).woken, [7]);
}

/// Of a fetch that a reader waits for, a part had come before the connection was lost.
#[test]
fn only_what_has_not_come_is_asked_for_again() {
    let (g, r) = disk(4);
    let quiet = Policy {
        background: false,
        ..policy()
    };
    let (mut mover, _) = arriving(g, &r, quiet);
    let mut out = Vec::new();
    mover.read(MS, 1, BlockRange::new(0, 256), &r, &mut out);
    let (flight, range, _) = sort(std::mem::take(&mut out)).fetches[0];
    assert_eq!(range, BlockRange::new(0, 256));
    r.mark_clean(BlockRange::new(0, 96));
    mover.failed(MS, flight, FetchFailure::Disconnected, &r, &mut out);
    mover.tick(MS * 2, &r, &mut out);
    let again = sort(std::mem::take(&mut out)).fetches;
    let [(flight, range, Lane::Demand)] = again[..] else {
        panic!("{again:?}");
    };
    assert_eq!(range, BlockRange::new(96, 256));
    // All the rest has come, and the connection is lost before the end is told.
    r.mark_clean(range);
    mover.failed(MS * 3, flight, FetchFailure::Disconnected, &r, &mut out);
    assert_eq!(sort(out).woken, [1]);
}

#[test]
fn a_reader_makes_the_bulk_it_waits_for_urgent_once() {
    let (g, r) = disk(4);
    let (mut mover, begun) = arriving(g, &r, policy());
    let (_, bulk, lane) = begun.fetches[1];
    assert_eq!(lane, Lane::Bulk);
    let inside = BlockRange::new(bulk.start + 1, bulk.start + 2);
    let mut out = Vec::new();
    mover.read(MS, 1, inside, &r, &mut out);
    mover.read(MS, 2, inside, &r, &mut out);
    let seen = sort(out);
    assert_eq!(seen.promoted, [bulk]);
    assert!(seen.fetches.is_empty() && seen.woken.is_empty());
    // What travels in the demand lane is urgent already.
    let mut out = Vec::new();
    let far = BlockRange::new(g.blocks() - 1, g.blocks());
    mover.read(MS, 3, far, &r, &mut out);
    mover.read(MS, 4, far, &r, &mut out);
    assert!(sort(out).promoted.is_empty());
}

#[test]
fn two_readers_of_a_block_make_one_fetch() {
    let (g, r) = disk(1);
    let (mut mover, _) = arriving(
        g,
        &r,
        Policy {
            background: false,
            ..policy()
        },
    );
    let mut out = Vec::new();
    mover.read(MS, 1, BlockRange::new(4, 8), &r, &mut out);
    mover.read(MS, 2, BlockRange::new(6, 10), &r, &mut out);
    let seen = sort(out);
    let ranges: Vec<_> = seen.fetches.iter().map(|f| f.1).collect();
    assert_eq!(ranges, [BlockRange::new(4, 8), BlockRange::new(8, 10)]);
    assert!(seen.fetches.iter().all(|f| f.2 == Lane::Demand));

    let mut out = Vec::new();
    r.mark_clean(BlockRange::new(4, 8));
    mover.landed(MS * 2, seen.fetches[0].0, 4096, &r, &mut out);
    assert_eq!(sort(std::mem::take(&mut out)).woken, [1]);
    r.mark_clean(BlockRange::new(8, 10));
    mover.landed(MS * 2, seen.fetches[1].0, 4096, &r, &mut out);
    assert_eq!(sort(out).woken, [2]);
}

/// The background takes what nobody has asked for yet, and never the same block twice.
#[test]
fn the_background_covers_every_block_once() {
    let (g, r) = disk(16);
    let (mut mover, seen) = arriving(g, &r, policy());
    let mut under_way = seen.fetches;
    let mut covered = vec![0; usize::try_from(g.blocks()).unwrap()];
    let mut complete = seen.complete;
    let mut now = MS;
    while let Some((flight, range, lane)) = under_way.pop() {
        assert_eq!(lane, Lane::Bulk);
        (range.start..range.end).for_each(|b| covered[usize::try_from(b).unwrap()] += 1);
        r.mark_clean(range);
        now += MS;
        let mut out = Vec::new();
        mover.landed(now, flight, 4096, &r, &mut out);
        let seen = sort(out);
        complete |= seen.complete;
        under_way.extend(seen.fetches);
    }
    assert!(covered.iter().all(|n| *n == 1));
    assert!(complete);
    assert_eq!(mover.phase(), Phase::Complete);
}

#[test]
fn a_lost_connection_keeps_readers_waiting_and_asks_again() {
    let (g, r) = disk(1);
    let (mut mover, _) = arriving(
        g,
        &r,
        Policy {
            background: false,
            ..policy()
        },
    );
    let mut out = Vec::new();
    mover.read(MS, 1, BlockRange::new(0, 1), &r, &mut out);
    let flight = sort(std::mem::take(&mut out)).fetches[0].0;
    mover.source_down(MS);
    mover.failed(MS, flight, FetchFailure::Disconnected, &r, &mut out);
    assert!(out.is_empty(), "nothing is asked of a source that is away");
    mover.source_up(MS * 900, &r, &mut out);
    let seen = sort(std::mem::take(&mut out));
    assert_eq!(seen.fetches.len(), 1);
    r.mark_clean(BlockRange::new(0, 1));
    mover.landed(MS * 950, seen.fetches[0].0, 4096, &r, &mut out);
    assert_eq!(sort(out).woken, [1]);
}

#[test]
fn a_reader_gives_up_when_the_policy_says_so() {
    let (g, r) = disk(1);
    let loss_timeout = Some(Duration::from_secs(3));
    let (mut mover, _) = arriving(
        g,
        &r,
        Policy {
            background: false,
            loss_timeout,
            ..policy()
        },
    );
    mover.source_down(MS * 500);
    let mut out = Vec::new();
    mover.read(MS * 1000, 7, BlockRange::new(0, 1), &r, &mut out);
    mover.tick(MS * 3999, &r, &mut out);
    assert!(out.is_empty());
    mover.tick(MS * 4000, &r, &mut out);
    assert_eq!(sort(out).failed, [(7, ReadFailure::SourceLost)]);
}

/// A write that covers the block answers a reader that waits for a source which is away.
#[test]
fn a_reader_is_woken_by_a_write_that_completes_its_block() {
    let (g, r) = disk(1);
    let (mut mover, _) = arriving(
        g,
        &r,
        Policy {
            background: false,
            ..policy()
        },
    );
    mover.source_down(MS);
    let mut out = Vec::new();
    mover.read(MS, 1, BlockRange::new(0, 1), &r, &mut out);
    r.mark_owned(BlockRange::new(0, 1));
    mover.tick(MS * 20, &r, &mut out);
    assert_eq!(sort(out).woken, [1]);
}

#[test]
fn a_pause_stops_the_background_and_not_demand() {
    let (g, r) = disk(64);
    let (mut mover, first) = arriving(g, &r, policy());
    mover.pause();
    let mut out = Vec::new();
    for (flight, range, _) in first.fetches {
        r.mark_clean(range);
        mover.landed(MS * 30, flight, 4096, &r, &mut out);
    }
    assert!(
        out.is_empty(),
        "nothing more is asked for in the background"
    );
    mover.read(MS * 31, 1, BlockRange::new(9000, 9001), &r, &mut out);
    assert_eq!(sort(std::mem::take(&mut out)).fetches[0].2, Lane::Demand);
    mover.resume(MS * 40, &r, &mut out);
    assert!(sort(out).fetches.iter().any(|f| f.2 == Lane::Bulk));
}

/// A cap of 1 MB/s lets about that through, whatever the source could do, and demand beside it.
#[test]
fn the_cap_holds_the_background_to_its_rate() {
    let (g, r) = disk(64);
    let (mut mover, first) = arriving(
        g,
        &r,
        Policy {
            max_rate: Some(1_000_000),
            ..policy()
        },
    );
    let mut under_way = first.fetches;
    let mut bytes = 0;
    for step in 1..500 {
        let now = MS * 20 * step;
        let mut out = Vec::new();
        for (flight, range, _) in std::mem::take(&mut under_way) {
            bytes += g.bytes(range).len();
            r.mark_clean(range);
            mover.landed(now, flight, 4096, &r, &mut out);
        }
        mover.tick(now, &r, &mut out);
        under_way = sort(out).fetches;
    }
    assert!(
        (9_000_000..11_500_000).contains(&bytes),
        "{bytes} bytes in ten seconds"
    );
}

#[test]
fn zeroes_that_the_source_tells_are_never_fetched() {
    let (g, r) = disk(64);
    let mut mover: Mover<u32> = Mover::new(
        g,
        Phase::Arriving,
        Policy {
            has_extents: true,
            ..policy()
        },
    );
    let mut out = Vec::new();
    mover.source_up(MS, &r, &mut out);
    let asked = out.iter().find_map(|a| match a {
        Action::QueryExtents { range } => Some(*range),
        _ => None,
    });
    // What was asked for before anything was known is at the disk's start.
    let blind = BlockRange::new(0, (256 << 10) / 4096);
    let zero = BlockRange::new(blind.end, 16000);
    let mut queue = out;
    mover.extents(MS, asked.unwrap(), &[zero], &r, &mut queue);
    while let Some(action) = queue.pop() {
        let (flight, range) = match action {
            Action::Fetch { flight, range, .. } => {
                assert!(!range.overlaps(zero), "{range:?} was fetched");
                (flight, range)
            }
            Action::InstallZero { flight, range } => {
                assert_eq!(range.intersection(zero), range);
                (flight, range)
            }
            Action::Complete => break,
            _ => continue,
        };
        r.mark_clean(range);
        mover.landed(MS * 2, flight, 4096, &r, &mut queue);
    }
    assert_eq!(mover.phase(), Phase::Complete);
}

/// A fetch that the store could not keep answers those who need nothing else; a reader over several
/// fetches is asked for anew, as a whole, and answered by what passes through.
#[test]
fn what_cannot_be_kept_is_handed_on() {
    let (g, r) = disk(16);
    let only_demand = Policy {
        background: false,
        ..policy()
    };
    let (mut mover, _) = arriving(g, &r, only_demand);
    let mut out = Vec::new();
    mover.read(MS, 1, BlockRange::new(4, 8), &r, &mut out);
    mover.read(MS, 2, BlockRange::new(6, 12), &r, &mut out);
    let seen = sort(std::mem::take(&mut out));
    let [(first, ..), (second, ..)] = seen.fetches[..] else {
        panic!("two fetches: {:?}", seen.fetches);
    };
    assert_eq!(mover.unkept(MS * 2, first, &r, &mut out), [1]);
    let [(whole, range, Lane::Demand)] = sort(std::mem::take(&mut out)).fetches[..] else {
        panic!("the second reader is asked for anew");
    };
    assert_eq!(range, BlockRange::new(6, 12));
    // The fetch that it waited for besides has nobody to answer any more.
    assert!(mover.unkept(MS * 3, second, &r, &mut out).is_empty());
    assert_eq!(mover.landed_unkept(whole), [2]);
    assert_eq!(mover.waiting(), 0);
}

/// While the store takes nothing, one fetch at a time tries it, with pauses; when one lands, the
/// background is back to what it was.
#[test]
fn the_background_rests_while_the_store_takes_nothing() {
    let (g, r) = disk(16);
    let (mut mover, seen) = arriving(g, &r, policy());
    let mut now = MS;
    assert!(seen.fetches.len() > 1);
    let mut out = Vec::new();
    for (flight, ..) in seen.fetches {
        assert!(mover.unkept(now, flight, &r, &mut out).is_empty());
    }
    assert!(out.is_empty() && mover.store_rests());
    for attempt in 0..3 {
        for _ in 0..4 {
            now += Duration::from_secs(1);
            mover.tick(now, &r, &mut out);
            assert!(out.is_empty(), "it does not rest");
        }
        now += Duration::from_secs(2);
        mover.tick(now, &r, &mut out);
        mover.tick(now + MS, &r, &mut out);
        let [(flight, range, Lane::Bulk)] = sort(std::mem::take(&mut out)).fetches[..] else {
            panic!("one fetch tries it");
        };
        if attempt < 2 {
            assert!(mover.unkept(now, flight, &r, &mut out).is_empty());
        } else {
            r.mark_clean(range);
            mover.landed(now + MS, flight, 4096, &r, &mut out);
        }
    }
    assert!(!mover.store_rests());
    assert!(sort(out).fetches.len() > 1, "the others follow");
}

/// A source that has only what is missing here is never asked for a block between two of those.
#[test]
fn nothing_but_what_is_missing_is_asked_of_an_exact_source() {
    let (g, r) = disk(1);
    for (from, to) in [(0, 4), (5, 6), (8, 40), (41, 256)] {
        r.mark_clean(BlockRange::new(from, to));
    }
    let exact = Policy {
        exact: true,
        background: false,
        ..policy()
    };
    let (mut mover, _) = arriving(g, &r, exact);
    let mut out = Vec::new();
    mover.read(MS, 1, BlockRange::new(0, 64), &r, &mut out);
    let asked: Vec<BlockRange> = sort(out).fetches.iter().map(|fetch| fetch.1).collect();
    let missing = [(4, 5), (6, 8), (40, 41)].map(|(from, to)| BlockRange::new(from, to));
    assert_eq!(asked, missing);
}

/// Reads that pass by to the source when the disk comes are answered from what is here then.
#[test]
fn what_passes_by_at_the_handoff_is_not_left_to_an_exact_source() {
    let (g, r) = disk(1);
    let exact = Policy {
        exact: true,
        background: false,
        ..policy()
    };
    let mut mover = Mover::new(g, Phase::Standby, exact);
    let mut out = Vec::new();
    mover.source_up(MS, &r, &mut out);
    mover.read(MS, 1, BlockRange::new(0, 4), &r, &mut out);
    mover.read(MS, 2, BlockRange::new(3, 10), &r, &mut out);
    out.clear();
    for run in [(0, 5), (6, 256)] {
        r.mark_clean(BlockRange::new(run.0, run.1));
    }
    mover.handoff(MS, &r, &mut out);
    let seen = sort(std::mem::take(&mut out));
    assert_eq!(seen.woken, [1]);
    let [(flight, range, lane)] = seen.fetches[..] else {
        panic!("not one fetch: {:?}", seen.fetches);
    };
    assert_eq!((range, lane), (BlockRange::new(5, 6), Lane::Demand));
    r.mark_clean(range);
    mover.landed(MS, flight, 4096, &r, &mut out);
    assert!(matches!(out[..], [Action::Wake(2), Action::Complete]));
    assert_eq!(mover.waiting(), 0);
}
