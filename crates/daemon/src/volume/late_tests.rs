//! An answer to a handoff that was held up for too long, at the side that asked for it and at the one that
//! gave it: never taken by the one after the other may have been let go on.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use hikkoshi_wan::transport::session::{Stance, Tell, Told};
use hikkoshi_wan::{MoveLink, SourceError, Ticket};

use super::arrival::Arrival;
use super::departure::Bound;
use super::departure::tests::plain;
use super::tests::World;
use crate::boot::tests::AHEAD;
use crate::config::{HandoffPolicy, SourceConfig};
use crate::export::Export;
use crate::registry::{CommandError, Controlled as _};
use crate::status::LifeState;

/// A source that hands over, and an answer that is on its way for so long.
struct Slow(Duration);

impl MoveLink for Slow {
    fn tell(&self, tell: &Tell, _: Duration) -> Result<Told, SourceError> {
        assert!(matches!(tell, Tell::Handoff { .. }), "{tell:?}");
        AHEAD.set(AHEAD.get() + self.0);
        Ok(Told::Fenced {
            generation: 7,
            ranges: None,
        })
    }

    fn interrupt(&self) {}

    fn hang_up(&self) {}
}

/// Whether the answer is acted on.
fn is_taken(world: &World, on_its_way: Duration, before_it_is_looked_at: Duration) -> bool {
    let ticket = Ticket::new([1; 16], None, Stance::Standby, true);
    let wanted = SourceConfig::new("memory");
    let link = Arc::new(Slow(on_its_way));
    let arrival = Arrival::new(ticket, link, &wanted, world.geometry);
    let takeover = world.volume.take_over(&arrival).unwrap();
    AHEAD.set(AHEAD.get() + before_it_is_looked_at);
    world.volume.record_handoff(Some(takeover)).unwrap()
}

/// The fence was lifted by hand while the answer waited, for the network or for a process that stood
/// still, and there were two writers.
#[test]
fn an_answer_that_was_held_up_is_not_taken_and_one_in_time_is() {
    const NOTHING: Duration = Duration::ZERO;
    const TOO_LONG: Duration = Duration::from_secs(30);
    let world = World::new(None, HandoffPolicy::FirstWrite);
    for (on_its_way, before) in [(TOO_LONG, NOTHING), (NOTHING, TOO_LONG)] {
        assert!(!is_taken(&world, on_its_way, before));
        assert_eq!(world.volume.life(), LifeState::Standby);
    }
    // Asked again, it says how it stands.
    assert!(is_taken(&world, NOTHING, NOTHING));
    assert_eq!(world.volume.life(), LifeState::Arriving);
}

const MOVE: [u8; 16] = [6; 16];

fn attach(export: &Export, stance: Stance) {
    let tell = Tell::Attach {
        id: MOVE,
        stance,
        epoch: 0,
        base: None,
    };
    let told = export.volume().answer(tell, &mut Bound::default());
    assert!(matches!(told, Told::Attached(_)), "{told:?}");
}

fn hand_over(export: &Export) {
    let tell = Tell::Handoff { id: MOVE, epoch: 0 };
    let told = export.volume().answer(tell, &mut Bound::default());
    assert!(matches!(told, Told::Fenced { .. }), "{told:?}");
}

fn is_released(export: &Export) -> bool {
    match export.release(true) {
        Ok(()) => true,
        Err(CommandError::Conflict(why)) => {
            assert!(why.contains("may still take that answer"), "{why}");
            assert!(export.volume().has_departed());
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// Every last answer, and every start of the process, begins the time anew.
#[test]
fn the_fence_is_not_lifted_by_hand_while_an_answer_may_be_taken() {
    // However slow the machine is.
    const ALMOST: Duration = Duration::from_secs(15);
    const ENOUGH: Duration = Duration::from_secs(40);
    let dir = tempfile::tempdir().unwrap();
    let export = plain(&dir);
    attach(&export, Stance::Standby);
    hand_over(&export);
    assert!(!is_released(&export));
    AHEAD.set(AHEAD.get() + ALMOST);
    assert!(!is_released(&export));
    // It asks again: the answer before was lost.
    hand_over(&export);
    AHEAD.set(AHEAD.get() + ALMOST);
    assert!(!is_released(&export));
    export.close().unwrap();
    drop(export);

    let export = plain(&dir);
    let left = export.status().release_in_s.unwrap();
    assert!((16..=40).contains(&left), "{left}");
    AHEAD.set(AHEAD.get() + ALMOST);
    assert!(!is_released(&export));
    AHEAD.set(AHEAD.get() + ENOUGH);
    assert_eq!(export.status().release_in_s, None);
    assert_eq!(export.status().taken_over, Some(false));
    assert!(is_released(&export));
    let tell = Tell::Handoff { id: MOVE, epoch: 0 };
    let told = export.volume().answer(tell, &mut Bound::default());
    assert!(matches!(told, Told::Refused(_)), "{told:?}");
    export.close().unwrap();
}

/// Of a destination that has said that it took the disk nothing is waited for: a person is told.
#[test]
fn a_disk_that_is_known_to_be_taken_over_is_released_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let export = plain(&dir);
    attach(&export, Stance::Standby);
    hand_over(&export);
    assert_eq!(export.status().taken_over, Some(false));
    attach(&export, Stance::Arriving);
    assert_eq!(export.status().taken_over, Some(true));
    let refused = export.release(false).unwrap_err().to_string();
    assert!(
        refused.contains("has said that it took it over"),
        "{refused}"
    );
    assert!(is_released(&export));
    assert_eq!(export.status().taken_over, None);
    let events = export.events(0);
    let told = &events.last().unwrap().text;
    assert!(told.contains("HAS TAKEN THE DISK OVER"), "{told}");
    export.close().unwrap();
}
