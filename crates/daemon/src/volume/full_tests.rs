//! A full disk: nothing is spoilt, and all goes on once there is space.

use super::tests::World;
use crate::config::HandoffPolicy;
use crate::events::EventKind;
use crate::registry::Controlled;

fn kinds(world: &World) -> Vec<EventKind> {
    let events = Controlled::events(&*world.volume, 0);
    events.into_iter().map(|event| event.kind).collect()
}

fn answer_all(world: &mut World) {
    world.source.complete_all();
    world.check_reads();
}

/// A read whose blocks could not be kept failed, although its bytes had come.
#[test]
fn a_read_is_answered_though_there_is_no_space_to_keep_it() {
    let mut world = World::new(None, HandoffPolicy::Now);
    // Written here, wholly and in part, before the disk is full.
    world.write(4096 * 4, &[1; 4096]);
    world.write(4096 * 5 + 512, &[2; 1024]);
    world.store.set_full(true);
    world.read(0, 4096);
    world.read(4096 * 3, 4 * 4096);
    world.read(4096 * 5 + 512, 512);
    // Over several fetches, and what lies between.
    world.read(0, 96 * 4096);
    answer_all(&mut world);
    for _ in 0..100 {
        world.pass_time(20);
        answer_all(&mut world);
    }
    assert!(world.waiting.is_empty(), "a read was not answered");
    assert_eq!(kinds(&world), [EventKind::SourceBack, EventKind::DiskFull]);
    assert!(world.volume.status().disk_full);

    world.store.set_full(false);
    world.finish();
    assert!(kinds(&world).contains(&EventKind::DiskSpace));
    assert!(!world.volume.status().disk_full);
}

/// With the disk full the background fetched everything again every few seconds.
#[test]
fn the_background_rests_while_the_disk_is_full() {
    let mut world = World::new(None, HandoffPolicy::Now);
    world.store.set_full(true);
    answer_all(&mut world);
    let before = world.source.counters().read_bytes;
    for _ in 0..500 {
        world.pass_time(20);
        answer_all(&mut world);
    }
    // Ten seconds: one fetch after each pause of five.
    let fetched = world.source.counters().read_bytes - before;
    assert!(fetched <= 3 * (512 << 10), "{fetched} bytes for nothing");
    assert!(fetched > 0, "it never tries");
    world.store.set_full(false);
    world.finish();
}

/// A flush whose records found no space poisoned the volume. It fails now, says so, and its records
/// are written by the next one.
#[test]
fn a_flush_without_space_is_refused_and_loses_nothing() {
    let mut world = World::new(None, HandoffPolicy::Now);
    for round in 0..3_u8 {
        world.write(4096 * u64::from(round), &[round; 4096]);
        world.dir.set_full(true);
        let error = world.volume.commit().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "{error}");
        world.write(4096 * u64::from(round) + 40960, &[round; 512]);
        assert!(world.volume.commit().is_err());
        world.dir.set_full(false);
        world.flush();
        world.power_cut(77 + u64::from(round));
    }
    world.finish();
}

/// Nothing of the move may be believed before it is recorded.
#[test]
fn a_handoff_and_a_completion_without_space_wait() {
    let mut world = World::new(None, HandoffPolicy::FirstWrite);
    world.dir.set_full(true);
    let relocation = world.relocation();
    let refused = world.volume.write(relocation.as_ref(), 0, &[1; 4096]);
    assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(
        world.volume.life(),
        crate::status::LifeState::Standby,
        "handed over without a record"
    );
    world.dir.set_full(false);
    world.write(0, &[1; 4096]);

    while world
        .relocation()
        .is_none_or(|r| r.residency.missing_blocks() > 0)
    {
        world.source.complete(0);
    }
    world.dir.set_full(true);
    assert!(world.volume.complete().is_err());
    assert!(!world.volume.is_local());
    world.dir.set_full(false);
    world.volume.complete().unwrap();
    world.finish();
}

/// Guests' flushes would wait for all that the disk has still before it.
#[test]
fn the_background_waits_for_a_disk_that_is_behind_and_guests_do_not() {
    let mut world = World::new(None, HandoffPolicy::FirstWrite);
    let said = |world: &World| {
        let notes = world.volume.status().notes;
        notes.iter().any(|note| note.contains("copying waits"))
    };
    assert!(!said(&world));
    world.store.set_far_behind(true);
    world.pass_time(20);
    world.write(0, &[1; 4096]);
    let before = world.source.counters().read_bytes;
    for _ in 0..100 {
        world.pass_time(20);
        answer_all(&mut world);
    }
    assert_eq!(world.source.counters().read_bytes, before);
    assert!(said(&world));
    let missing = world.relocation().map(|r| r.residency.missing_bytes());
    assert!(missing > Some(0), "it was all here before");

    let relocation = world.relocation().unwrap();
    let absent = relocation
        .residency
        .next_missing(0, world.geometry.blocks())
        .unwrap();
    world.read(absent.start * 4096, 4096);
    answer_all(&mut world);
    assert!(world.waiting.is_empty(), "a guest waits for it, too");

    world.store.set_far_behind(false);
    world.pass_time(6000);
    assert!(!said(&world));
    world.finish();
}
