//! Waiting, with `--prepare full`, until all of the disk is here: it ends where nothing more can come.
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use hikkoshi_wan::transport::session::{Attached, Boots, HandedOver, OldCopy, Stance, Tell, Told};
use hikkoshi_wan::{MoveLink, SourceError, SourceErrorKind, Ticket};

use super::arrival::Arrival;
use super::tests::World;
use crate::config::{HandoffPolicy, Prepare, SourceConfig};

/// Far more than what takes no time.
const LIMIT: Duration = Duration::from_secs(60);

/// So long that who does not wait has ended, on most machines.
const A_WHILE: Duration = Duration::from_millis(500);

/// Nobody is there.
struct Nobody;

impl MoveLink for Nobody {
    fn tell(&self, _: &Tell, _: Duration) -> Result<Told, SourceError> {
        Err(SourceError::new(
            SourceErrorKind::Disconnected,
            "not connected",
        ))
    }

    fn interrupt(&self) {}

    fn hang_up(&self) {}
}

/// Where it ends is told.
fn begin_to_wait(world: &World, ticket: Arc<Ticket>) -> Receiver<io::Result<()>> {
    let wanted = SourceConfig {
        prepare: Prepare::Full,
        ..SourceConfig::new("memory")
    };
    let arrival = Arrival::new(ticket, Arc::new(Nobody), &wanted, world.geometry);
    let volume = Arc::clone(&world.volume);
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(volume.await_prepared(&arrival)));
    receiver
}

fn wait(world: &World, ticket: Arc<Ticket>) -> io::Result<()> {
    begin_to_wait(world, ticket)
        .recv_timeout(LIMIT)
        .unwrap_or_else(|_| Err(io::Error::other("it waits for ever")))
}

/// What a source says that marks no changes.
fn untracked(handed_over: HandedOver) -> Attached {
    Attached {
        generation: 0,
        epoch: 0,
        handed_over,
        old_copy: OldCopy::Unknown,
        boots: Boots::NONE,
    }
}

fn ticket() -> Arc<Ticket> {
    Ticket::new([1; 16], None, Stance::Standby, true)
}

/// Simulated worlds of two sites. The answer to a handoff was lost, and both sites were started again:
/// the source, fenced, had nothing more to tell of changes, and the handoff that was said again waited
/// for a preparation that never came. The VM could write nowhere.
#[test]
fn a_source_that_is_fenced_already_is_not_waited_for() {
    let world = World::new(None, HandoffPolicy::FirstWrite);
    let ticket = ticket();
    ticket.was_told(untracked(HandedOver::Already));
    wait(&world, ticket).unwrap();
}

/// A move that was released by hand at its source: nothing is tracked there for it any more, and the
/// handoff waited for ever for a preparation that could not come, instead of being refused. A source
/// that does not track for the moment is waited for all the same.
#[test]
fn a_move_that_is_off_at_the_source_is_not_waited_for() {
    let world = World::new(None, HandoffPolicy::FirstWrite);
    let ticket = ticket();
    ticket.was_told(untracked(HandedOver::NotYet));
    let waiting = begin_to_wait(&world, Arc::clone(&ticket));
    let early = waiting.recv_timeout(A_WHILE);
    assert!(early.is_err(), "it did not wait: {early:?}");
    ticket.was_told(untracked(HandedOver::Never));
    waiting.recv_timeout(LIMIT).unwrap().unwrap();
}

/// The same worlds. The source started again, so that all was to be copied anew, while one handoff was
/// under way and a write waited for the preparation: it waited for ever, since nothing is prepared
/// after a handoff.
#[test]
fn who_waits_goes_on_when_somebody_else_has_handed_off() {
    let world = World::new(None, HandoffPolicy::FirstWrite);
    world.volume.hand_off().unwrap();
    wait(&world, ticket()).unwrap();
}
