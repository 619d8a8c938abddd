//! What the background copy leaves alone while seeding looks for it, and for how long.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use super::tests::{MS, disk, policy};
use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// A mover that expects seeds, connected, of a disk of 4 MiB.
fn seeding(policy: Policy) -> (Mover<u32>, Residency) {
    let (geometry, residency) = disk(4);
    let mut mover = Mover::new(geometry, Phase::Arriving, policy);
    mover.expect_seeds(MS);
    let out = &mut Vec::new();
    mover.source_up(MS, &residency, out);
    assert!(fetched(out).is_empty(), "all of it may be in a seed");
    (mover, residency)
}

fn fetched(out: &mut Vec<Action<u32>>) -> Vec<(BlockRange, Lane)> {
    let ranges = out.drain(..).filter_map(|action| match action {
        Action::Fetch { range, lane, .. } => Some((range, lane)),
        _ => None,
    });
    ranges.collect()
}

fn look(mover: &mut Mover<u32>, residency: &Residency) -> BlockRange {
    match mover.seed_next(MS, 256, 100, residency) {
        SeedStep::Look(range) => range,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_looked_for_is_not_copied_until_it_is_passed() {
    let (mut m, r) = seeding(policy());
    let (first, second) = (look(&mut m, &r), look(&mut m, &r));
    assert_eq!(
        (first, second),
        (BlockRange::new(0, 256), BlockRange::new(256, 512))
    );
    let out = &mut Vec::new();
    m.tick(MS, &r, out);
    // The second answer comes first: the first window still holds the copy.
    m.seed_passed(MS, second, &r, out);
    assert_eq!(fetched(out), []);
    // All but one block was found.
    r.mark_clean(BlockRange::new(0, 100));
    r.mark_clean(BlockRange::new(101, 512));
    m.seed_passed(MS, first, &r, out);
    assert_eq!(fetched(out), [(BlockRange::new(100, 101), Lane::Bulk)]);
}

/// More can be found than before: what was passed is looked for again, but what is on its way is not.
#[test]
fn what_was_passed_is_looked_for_again_where_it_is_still_missing() {
    let (mut m, r) = seeding(policy());
    let first = look(&mut m, &r);
    let out = &mut Vec::new();
    m.seed_passed(MS, first, &r, out);
    let flying = fetched(out);
    let until = flying.iter().map(|(range, _)| range.end).max().unwrap();
    assert!(until < 256, "all of it is on its way");
    look(&mut m, &r);
    m.seed_again(MS);
    assert_eq!(look(&mut m, &r).start, until);
    // And the copy holds off from it again.
    m.tick(MS, &r, out);
    assert_eq!(fetched(out), []);
}

#[test]
fn a_guest_waits_for_no_seed() {
    let (mut m, r) = seeding(policy());
    let window = look(&mut m, &r);
    let out = &mut Vec::new();
    m.read(MS, 1, BlockRange::new(7, 8), &r, out);
    assert_eq!(fetched(out), [(BlockRange::new(7, 8), Lane::Demand)]);
    // The seed has it first; the reader is woken when its fetch lands.
    r.mark_clean(window);
    m.landed(MS, FlightId(0), 4096, &r, out);
    assert!(matches!(out[0], Action::Wake(1)));
}

#[test]
fn seeding_that_gets_nowhere_holds_nothing_up() {
    let (mut m, r) = seeding(policy());
    look(&mut m, &r);
    let out = &mut Vec::new();
    m.tick(4 * SECOND, &r, out);
    assert_eq!(fetched(out), []);
    m.tick(6 * SECOND, &r, out);
    assert!(!fetched(out).is_empty());
}

#[test]
fn the_time_without_a_source_is_not_counted_against_it() {
    let (mut m, r) = seeding(policy());
    look(&mut m, &r);
    let out = &mut Vec::new();
    m.source_down(2 * SECOND);
    assert_eq!(m.seed_next(2 * SECOND, 256, 100, &r), SeedStep::Wait);
    m.source_up(100 * SECOND, &r, out);
    assert_eq!(fetched(out), []);
    m.pause();
    assert!(!m.may_seed(100 * SECOND), "pause holds for it too");
    m.resume(200 * SECOND, &r, out);
    assert_eq!(fetched(out), []);
    assert!(m.may_seed(200 * SECOND));
}

#[test]
fn while_it_rests_and_after_it_all_is_copied() {
    for rest in [true, false] {
        let (mut m, r) = seeding(policy());
        let window = look(&mut m, &r);
        let out = &mut Vec::new();
        if rest {
            m.seed_rest(MS, true, &r, out);
        } else {
            m.seeds_over(MS, &r, out);
            assert_eq!(m.seed_next(MS, 256, 100, &r), SeedStep::End);
        }
        assert_eq!(fetched(out)[0].0.start, window.start);
    }
}

#[test]
fn after_a_rest_it_goes_on_behind_what_was_copied_and_what_is_on_its_way() {
    let (mut m, r) = seeding(policy());
    let out = &mut Vec::new();
    m.seed_rest(MS, true, &r, out);
    let on_its_way = fetched(out).last().unwrap().0;
    m.seed_rest(MS, false, &r, out);
    r.mark_clean(BlockRange::new(0, on_its_way.start));
    assert_eq!(look(&mut m, &r).start, on_its_way.end);
}

#[test]
fn hot_blocks_are_looked_for_before_they_are_copied_first() {
    let (mut m, r) = seeding(policy());
    let out = &mut Vec::new();
    let hot = BlockRange::new(300, 310);
    m.set_order(MS, CopyOrder::new([hot], []), &r, out);
    let first = look(&mut m, &r);
    r.mark_clean(first);
    m.seed_passed(MS, first, &r, out);
    assert_eq!(fetched(out), []);
    let second = look(&mut m, &r);
    m.seed_passed(MS, second, &r, out);
    // Cut where chunks end, but before all that is colder.
    assert_eq!(fetched(out)[0].0.start, hot.start);
}

#[test]
fn it_ends_with_the_disk_and_where_nothing_is_copied() {
    let (mut m, r) = seeding(policy());
    for _ in 0..4 {
        look(&mut m, &r);
    }
    assert_eq!(m.seed_next(MS, 256, 100, &r), SeedStep::End);
    let on_demand_only = Policy {
        background: false,
        ..policy()
    };
    let (mut m, r) = seeding(on_demand_only);
    assert_eq!(m.seed_next(MS, 256, 100, &r), SeedStep::End);
}

#[test]
fn the_cap_holds_for_what_the_questions_cost() {
    let capped = Policy {
        max_rate: Some(1000),
        ..policy()
    };
    let (mut m, r) = seeding(capped);
    assert_eq!(
        m.seed_next(SECOND, 256, 2100, &r),
        SeedStep::Look(BlockRange::new(0, 256))
    );
    assert_eq!(m.seed_next(SECOND, 256, 2100, &r), SeedStep::Wait);
    assert_eq!(m.seed_next(2 * SECOND, 256, 2100, &r), SeedStep::Wait);
    let Some(range) = (match m.seed_next(4 * SECOND, 256, 2100, &r) {
        SeedStep::Look(range) => Some(range),
        _ => None,
    }) else {
        panic!("two seconds are enough");
    };
    assert_eq!(range, BlockRange::new(256, 512));
}
