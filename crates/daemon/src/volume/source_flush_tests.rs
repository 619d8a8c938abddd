//! Flushes in which the source has a part, with a source that answers when the test says so.
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_store::state::Ties;
use hikkoshi_wan::{Source, SourceErrorKind};

use super::lock;
use super::tests::World;
use crate::config::{HandoffPolicy, SourceLoss};
use crate::status::LifeState;

type Answer = Arc<Mutex<Option<io::Result<()>>>>;

/// A world whose source can be asked to flush.
fn world(handoff: HandoffPolicy) -> World {
    let world = World::new(None, handoff);
    world.source.set_can_flush(true);
    world
}

fn flush(world: &World) -> Answer {
    let answer: Answer = Arc::default();
    let told = Arc::clone(&answer);
    assert!(
        world.volume.flush_inline().is_none(),
        "it must be asked for"
    );
    world.volume.flush(Box::new(move |outcome| {
        let before = lock(&told).replace(outcome);
        assert!(before.is_none(), "answered twice");
    }));
    attend(world);
    answer
}

/// What the threads of the volume do.
fn attend(world: &World) {
    world.volume.attend_source_flushes();
    world.volume.attend_commits();
}

fn is_answered(answer: &Answer) -> bool {
    lock(answer).is_some()
}

fn flushes_asked(world: &World) -> usize {
    let requests = world.source.requests();
    requests.iter().filter(|request| request.flush).count()
}

/// Lets the source answer one flush; `kind`: fail it.
fn source_answers(world: &World, kind: Option<SourceErrorKind>) {
    let index = world.source.requests().iter().position(|r| r.flush);
    let index = index.expect("the source was asked");
    match kind {
        None => world.source.complete(index),
        Some(kind) => world.source.fail(index, kind),
    }
    attend(world);
}

/// The guest wrote at the old site, was moved with that in the page cache there, and flushed at the
/// new site, where nothing had been written: it was answered at once, and a power cut at the old
/// site lost what it had been told is durable.
#[test]
fn a_flush_before_the_handoff_is_answered_when_the_source_has() {
    for handoff in [HandoffPolicy::FirstWrite, HandoffPolicy::Command] {
        let world = world(handoff);
        let answer = flush(&world);
        assert!(!is_answered(&answer));
        assert_eq!(flushes_asked(&world), 1);
        // One that comes later may be for a write that this one does not cover.
        let later = flush(&world);
        assert_eq!(flushes_asked(&world), 1);
        source_answers(&world, None);
        assert!(lock(&answer).take().unwrap().is_ok());
        assert!(!is_answered(&later));
        source_answers(&world, None);
        assert!(lock(&later).take().unwrap().is_ok());
        assert_eq!(flushes_asked(&world), 0);
        assert_eq!(world.volume.life(), LifeState::Standby);
        assert_eq!(world.source.counters().flushes, 2);
    }
}

#[test]
fn a_source_that_cannot_flush_fails_the_flush() {
    let world = world(HandoffPolicy::FirstWrite);
    let answer = flush(&world);
    source_answers(&world, Some(SourceErrorKind::Refused));
    assert!(lock(&answer).take().unwrap().is_err());
    // The next one is asked for anew, and nothing here is poisoned by it.
    let answer = flush(&world);
    source_answers(&world, None);
    assert!(lock(&answer).take().unwrap().is_ok());
    assert_eq!(world.volume.life(), LifeState::Standby);
}

#[test]
fn a_flush_waits_for_a_source_that_is_away() {
    let mut world = world(HandoffPolicy::FirstWrite);
    let answer = flush(&world);
    // It was on its way.
    world.source.set_connected(false);
    attend(&world);
    world.pass_time(600_000);
    attend(&world);
    assert!(!is_answered(&answer));
    let later = flush(&world);
    world.source.set_connected(true);
    attend(&world);
    source_answers(&world, None);
    assert!(lock(&answer).take().unwrap().is_ok());
    assert!(lock(&later).take().unwrap().is_ok());
}

#[test]
fn a_flush_waits_for_a_source_no_longer_than_it_may() {
    let mut world = world(HandoffPolicy::FirstWrite);
    let after = Duration::from_secs(5);
    world.config.source.as_mut().unwrap().on_loss = SourceLoss::Error(after);
    world.kill();
    let answer = flush(&world);
    world.source.set_connected(false);
    attend(&world);
    world.pass_time(4_999);
    attend(&world);
    assert!(!is_answered(&answer));
    world.pass_time(1);
    attend(&world);
    assert!(lock(&answer).take().unwrap().is_err());
    // The time begins anew for the next one.
    let answer = flush(&world);
    world.pass_time(4_999);
    attend(&world);
    assert!(!is_answered(&answer));
}

/// Nobody else asks a source without a fence to make durable what the VM wrote there last.
#[test]
fn after_the_handoff_one_more_is_owed() {
    let mut world = world(HandoffPolicy::FirstWrite);
    // Asked before the handoff, it need not cover what was written at the source after it.
    let early = flush(&world);
    world.write(0, &[7; 4096]);
    source_answers(&world, None);
    assert!(lock(&early).take().unwrap().is_ok());
    // Asked for at once, so that the first flush finds it done if it can be.
    assert_eq!(flushes_asked(&world), 1);
    let answer = flush(&world);
    assert!(!is_answered(&answer));
    source_answers(&world, None);
    // The one under way was asked after the handoff, which is what counts.
    assert!(lock(&answer).take().unwrap().is_ok());
    assert!(!world.volume.source_has_a_part());
    world.flush();
    assert_eq!(world.source.counters().flushes, 2);
    world.finish();
}

#[test]
fn that_one_is_owed_outlives_a_restart_until_it_is_done() {
    let mut world = world(HandoffPolicy::Command);
    world.volume.hand_off().unwrap();
    source_answers(&world, Some(SourceErrorKind::Refused));
    for kill in [true, false] {
        if kill {
            world.kill();
        } else {
            world.power_cut(3);
        }
        assert!(world.volume.source_has_a_part(), "after a kill: {kill}");
        let answer = flush(&world);
        source_answers(&world, Some(SourceErrorKind::Refused));
        assert!(lock(&answer).take().unwrap().is_err());
    }
    let answer = flush(&world);
    source_answers(&world, None);
    assert!(lock(&answer).take().unwrap().is_ok());
    world.power_cut(5);
    assert!(!world.volume.source_has_a_part());
    attend(&world);
    assert_eq!(flushes_asked(&world), 0);
    world.finish();
}

/// What was at the source is here then, and durable.
#[test]
fn nothing_is_owed_once_all_is_here() {
    let mut world = world(HandoffPolicy::Command);
    world.volume.hand_off().unwrap();
    source_answers(&world, Some(SourceErrorKind::Refused));
    // It refuses for a while, and is not bothered with it again and again.
    attend(&world);
    assert_eq!(flushes_asked(&world), 0);
    let answer = flush(&world);
    world.finish();
    attend(&world);
    assert!(lock(&answer).take().unwrap().is_ok());
    assert!(!world.volume.source_has_a_part());
}

#[test]
fn a_source_that_knows_no_flush_is_not_asked() {
    let world = World::new(None, HandoffPolicy::FirstWrite);
    let answer = flush(&world);
    assert!(lock(&answer).take().unwrap().is_ok());
    assert_eq!(flushes_asked(&world), 0);
    world.volume.hand_off().unwrap();
    assert!(!world.volume.source_has_a_part());
    let told = world.volume.source_flush_note();
    assert!(told.is_none());
}

#[test]
fn whoever_waits_is_answered_at_the_end() {
    let world = World::with_ties(None, HandoffPolicy::Now, Ties::default());
    world.source.set_can_flush(true);
    world.volume.owes_a_flush();
    world.source.set_connected(false);
    let answer = flush(&world);
    world.volume.stop();
    assert!(lock(&answer).take().unwrap().is_err());
    assert!(!world.source.is_connected());
}
