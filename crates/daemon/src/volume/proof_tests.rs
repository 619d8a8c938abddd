//! A source that comes back: the right disk, another one, one that cannot tell.

use std::time::Duration;

use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_wan::{Lane, SourceErrorKind};

use super::lock;
use super::relocation::Reader;
use super::tests::{DISK, World};
use crate::config::HandoffPolicy;
use crate::registry::Controlled;

/// A move of which so many fetches have come in.
fn half_moved(fetches: usize) -> World {
    let mut world = World::new(None, HandoffPolicy::Now);
    // The background would bring a disk as small as this at once.
    let relocation = world.relocation().expect("a move");
    relocation.drive(|m, _, _| m.pause());
    world.source.set_connected(false);
    world.source.set_connected(true);
    // In pieces, as guests' reads would bring them: one witness is drawn of each.
    for block in (2..40).step_by(2).take(fetches) {
        world.read(block * 4096, 4096);
        let all = world.source.requests();
        let mine = all.iter().position(|r| r.lane == Lane::Demand);
        let mine = mine.expect("the read was asked for");
        world.source.complete(mine);
    }
    world.check_reads();
    assert!(world.waiting.is_empty());
    world
}

fn asked(world: &World) -> Vec<u64> {
    world.source.requests().iter().map(|r| r.offset).collect()
}

/// Another image in the place of the source's.
fn replace(world: &World) {
    for at in (0..DISK).step_by(512) {
        world
            .source
            .write(usize::try_from(at).unwrap(), b"other disk");
    }
}

fn bring_back(world: &World) {
    world.source.write(0, &world.original);
}

#[test]
fn the_same_disk_is_believed_after_one_round_trip() {
    let mut world = half_moved(12);
    world.source.set_connected(false);
    assert_eq!(world.volume.status().source_connected, Some(false));
    world.read(80 * 4096, 4096);
    world.source.set_connected(true);
    // The proof, and nothing else, is under way.
    let requests = world.source.requests();
    assert!((5..=32).contains(&requests.len()), "{}", requests.len());
    assert!(
        requests
            .iter()
            .all(|r| r.lane == Lane::Demand && r.len <= 4096)
    );
    assert!(!asked(&world).contains(&(80 * 4096)));
    assert_eq!(world.volume.status().source_connected, Some(false));
    for _ in 0..requests.len() {
        world.source.complete(0);
    }
    assert!(asked(&world).contains(&(80 * 4096)));
    assert_eq!(world.volume.status().source_connected, Some(true));
    world.finish();
}

/// A source was believed by the size of its disk alone: after an outage another image of the same
/// size was fetched from, and the guest's disk became a mixture of two.
#[test]
fn another_disk_is_not_fetched_from_and_the_right_one_is_found_again() {
    let mut world = half_moved(12);
    world.source.set_connected(false);
    world.read(80 * 4096, 4096);
    replace(&world);
    world.source.set_connected(true);
    world.source.complete_all();
    for _ in 0..200 {
        world.pass_time(20);
        world.source.complete_all();
    }
    world.check_reads();
    assert_eq!(world.waiting.len(), 1, "the read goes on waiting");
    let status = world.volume.status();
    assert_eq!(status.source_connected, Some(false));
    let notes = status.notes.join("\n");
    assert!(notes.contains("another disk"), "{notes}");
    assert!(notes.contains("offset 8192"), "{notes}");

    // What is here is served and written meanwhile.
    world.write(2 * 4096, &[0x77; 4096]);
    world.read(2 * 4096, 4096);
    assert_eq!(world.waiting.len(), 1);

    // The right one again, on the same connection: found without any news of it.
    bring_back(&world);
    world.finish();
}

/// A fetch was decided on while the source was believed, and the thread that was to ask for it lost the
/// processor: when it had it again, another disk stood in the source's place and answered.
#[test]
fn what_was_to_be_asked_of_the_source_is_not_taken_from_another_disk() {
    let world = half_moved(12);
    let relocation = world.relocation().expect("a move");
    let bytes = ByteRange::at(80 * 4096, 4096);
    let blocks = relocation.geometry.covering(bytes);
    let reader = Reader {
        bytes,
        since: Duration::ZERO,
        done: Box::new(|_| panic!("nothing can be answered")),
    };
    let mut actions = Vec::new();
    lock(&relocation.mover).read(
        Duration::ZERO,
        reader,
        blocks,
        &relocation.residency,
        &mut actions,
    );
    world.source.set_connected(false);
    replace(&world);
    world.source.set_connected(true);
    relocation.carry_out(actions);
    world.source.complete_all();
    assert_eq!(relocation.residency.next_missing(80, 81), Some(blocks));
    assert_eq!(relocation.with_mover(|m| m.waiting()), 1);
}

#[test]
fn attempts_get_rarer() {
    let mut world = half_moved(3);
    world.source.set_connected(false);
    replace(&world);
    world.source.set_connected(true);
    world.source.complete_all();
    let before = world.source.counters().reads;
    for _ in 0..3600 {
        world.pass_time(1000);
        world.source.complete_all();
    }
    let attempts = (world.source.counters().reads - before) / 3;
    assert!((55..80).contains(&attempts), "{attempts} in an hour");
}

/// Comparing with the image would refuse the right source here: the guest has written there.
#[test]
fn what_the_guest_wrote_over_is_no_witness_against_the_source() {
    let mut world = half_moved(5);
    for block in 0..96 {
        world.write(block * 4096, &[9; 4096]);
        world.pass_time(1);
    }
    world.source.set_connected(false);
    world.source.set_connected(true);
    world.source.complete_all();
    assert_eq!(world.volume.status().source_connected, Some(true));
    world.finish();
}

/// After a power cut the witnesses are those that were kept, whatever became of the writes.
#[test]
fn a_restart_asks_before_it_fetches() {
    for kill in [true, false] {
        let mut world = half_moved(8);
        world.flush();
        world.volume.keep_witnesses(true);
        for block in (0..60).step_by(3) {
            world.write(block * 4096, &[5; 4096]);
        }
        world.source.set_connected(false);
        if kill {
            world.kill();
        } else {
            world.power_cut(12345);
        }
        let residency = std::sync::Arc::clone(&world.relocation().unwrap().residency);
        let here = residency.resident_blocks();
        replace(&world);
        world.source.set_connected(true);
        world.source.complete_all();
        assert_eq!(world.volume.status().source_connected, Some(false));
        assert_eq!(residency.resident_blocks(), here, "it was fetched from");
        bring_back(&world);
        world.finish();
    }
}

#[test]
fn answers_of_an_earlier_attempt_do_not_count() {
    let mut world = half_moved(4);
    world.source.set_connected(false);
    world.source.set_connected(true);
    let first = world.source.pending();
    world.source.complete(0);
    // Cut off in the middle of it: the rest fails, and the attempt after it starts from nothing.
    world.source.set_connected(false);
    world.source.set_connected(true);
    assert_eq!(world.source.pending(), first);
    for _ in 0..first - 1 {
        world.source.complete(0);
    }
    assert_eq!(world.volume.status().source_connected, Some(false));
    world.source.complete(0);
    assert_eq!(world.volume.status().source_connected, Some(true));
    world.finish();
}

#[test]
fn a_bad_sector_is_no_other_disk_but_only_bad_sectors_prove_nothing() {
    let mut world = half_moved(4);
    world.source.set_connected(false);
    world.source.set_connected(true);
    while world.source.pending() > 1 {
        world.source.fail(0, SourceErrorKind::Refused);
    }
    world.source.complete(0);
    assert_eq!(world.volume.status().source_connected, Some(true));

    world.source.set_connected(false);
    world.source.set_connected(true);
    while world.source.pending() > 0 {
        world.source.fail(0, SourceErrorKind::Refused);
    }
    assert_eq!(world.volume.status().source_connected, Some(false));
    let notes = world.volume.status().notes.join("\n");
    assert!(notes.contains("cannot read any"), "{notes}");
    world.finish();
}

/// One of several connections breaks while it is asked: nobody tells that the source is gone, so
/// it has to be asked again without being told.
#[test]
fn an_attempt_that_is_cut_off_is_made_again() {
    let mut world = half_moved(4);
    world.source.set_connected(false);
    world.source.set_connected(true);
    world.source.fail(0, SourceErrorKind::Disconnected);
    world.source.complete_all();
    assert_eq!(world.volume.status().source_connected, Some(false));
    world.pass_time(1500);
    world.source.complete_all();
    assert_eq!(world.volume.status().source_connected, Some(true));
    world.finish();
}

/// To a read, a source that is not believed is one that is away.
#[test]
fn reads_fail_by_policy_while_another_disk_answers() {
    let mut world = half_moved(4);
    let policy = hikkoshi_engine::mover::Policy {
        background: true,
        max_rate: None,
        loss_timeout: Some(Duration::from_secs(5)),
        has_extents: false,
        exact: false,
    };
    let relocation = world.relocation().unwrap();
    *lock(&relocation.mover) = hikkoshi_engine::mover::Mover::new(
        world.geometry,
        hikkoshi_engine::mover::Phase::Arriving,
        policy,
    );
    world.source.set_connected(false);
    replace(&world);
    world.source.set_connected(true);
    world.source.complete_all();
    world.read(80 * 4096, 4096);
    world.pass_time(4900);
    world.source.complete_all();
    assert_eq!(world.waiting.len(), 1);
    world.pass_time(200);
    world.check_reads();
    assert!(
        world.waiting.is_empty(),
        "it failed and did not wait longer"
    );
}
