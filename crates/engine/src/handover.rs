//! Who may write: the rules of a handoff between two daemons.
//!
//! Both sides keep one durable word. The source: whether, and to whom, the disk has departed; while
//! it has, no write is accepted. The destination: whether it stands by, has arrived, or has given
//! up; only an arrived one accepts writes. The order of events keeps the two apart:
//!
//! 1. the destination asks for the handoff;
//! 2. the source lets writes under way end, accepts no more, **and records that durably**;
//! 3. it answers, and only then does the destination record, durably, that it has arrived.
//!
//! The way back before 3. is the same in mirror image: the destination gives up **durably**, and
//! only then does the source accept writes again. Every message may be lost, doubled or repeated
//! after a crash of either side; the answers here depend on the durable words alone. What follows
//! from them is explored exhaustively in the tests.

use crate::journal::VolumeId;

/// Where a destination stands, as far as the source must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stance {
    /// Before the handoff.
    Standby,
    /// After it.
    Arriving,
}

/// Why a source refuses a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The disk has gone elsewhere.
    #[error(
        "this disk has moved on to another volume already; look there, or, if that copy will never \
         be used again, lift the fence here with `hikkoshi release --force`"
    )]
    MovedOn,
    /// The destination took the disk over, but the fence is gone.
    #[error(
        "this is not the copy that was handed over: it is another disk, or its fence was lifted \
         and it may have been written since; nothing is taken from it; serve the right disk there \
         again, as it was at the handoff"
    )]
    FenceGone,
    /// The destination has given this move up, or a person has at the source.
    #[error(
        "this move was given up, or its fence was lifted by hand at the source: the disk stays there; \
         say `hikkoshi abort` here, and begin anew"
    )]
    GivenUp,
}

/// What a source does about a handoff that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handoff {
    /// Stop writes, record it, answer.
    Close,
    /// It is recorded already: answer again.
    Repeat,
}

/// Whether a destination may read.
///
/// # Errors
/// See [`Refusal`].
pub fn attach(departed: Option<VolumeId>, id: VolumeId, stance: Stance) -> Result<(), Refusal> {
    match (departed, stance) {
        (Some(to), _) if to == id => Ok(()),
        (Some(_), _) => Err(Refusal::MovedOn),
        (None, Stance::Standby) => Ok(()),
        (None, Stance::Arriving) => Err(Refusal::FenceGone),
    }
}

/// What becomes of a request for the handoff. `given_up`: this move was given up before, or its fence
/// was lifted by hand: the VM has gone on at the source, and must not be stopped by a write that has
/// waited at the destination since.
///
/// # Errors
/// See [`Refusal`].
pub fn handoff(
    departed: Option<VolumeId>,
    id: VolumeId,
    given_up: bool,
) -> Result<Handoff, Refusal> {
    match departed {
        Some(to) if to == id => Ok(Handoff::Repeat),
        Some(_) => Err(Refusal::MovedOn),
        None if given_up => Err(Refusal::GivenUp),
        None => Ok(Handoff::Close),
    }
}

/// Whose source an old copy still is while the disk comes back into it before all of it had left:
/// what was never fetched from it is nowhere else. `stance`: where the return stands; one that was
/// given up stands where it stood before. Its source can be that only as long as nothing is written
/// here, and needs it only as long as it may write itself.
pub fn source_of(old_copy_of: Option<VolumeId>, stance: Stance) -> Option<VolumeId> {
    match stance {
        Stance::Standby => old_copy_of,
        Stance::Arriving => None,
    }
}

/// Whether the fence is to be lifted because a destination has given up.
pub fn abort(departed: Option<VolumeId>, id: VolumeId) -> bool {
    departed == Some(id)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::collections::{BTreeSet, HashSet};

    /// A destination's durable word.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
    enum Life {
        Standby,
        Arriving,
        GivenUp,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
    enum Message {
        Handoff(u8),
        Fenced(u8),
        Abort(u8),
    }

    /// A world of one source and two destinations that both want the disk. Messages are a set: each
    /// may be delivered any number of times, at any time, or never.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct World {
        /// Durable at the source.
        departed: Option<u8>,
        /// Not durable at the source: it accepts no writes, whatever is recorded.
        gate_closed: bool,
        /// Not durable at the source: moves that it knows were given up.
        given_up: BTreeSet<u8>,
        /// Durable at the destinations.
        lives: [Life; 2],
        messages: BTreeSet<Message>,
        /// How often a side may still crash.
        crashes: u8,
    }

    fn id(number: u8) -> VolumeId {
        [number; 16]
    }

    impl World {
        fn new(crashes: u8) -> Self {
            Self {
                departed: None,
                gate_closed: false,
                given_up: BTreeSet::new(),
                lives: [Life::Standby; 2],
                messages: BTreeSet::new(),
                crashes,
            }
        }

        fn source_accepts_writes(&self) -> bool {
            !self.gate_closed && self.departed.is_none()
        }

        /// Every world that one event leads to.
        fn next(&self) -> Vec<Self> {
            let mut next = Vec::new();
            for number in [0_u8, 1] {
                let life = self.lives[usize::from(number)];
                // A destination that stands by asks for the handoff, or is given up.
                if life == Life::Standby {
                    let mut asks = self.clone();
                    asks.messages.insert(Message::Handoff(number));
                    next.push(asks);
                    let mut gives_up = self.clone();
                    gives_up.lives[usize::from(number)] = Life::GivenUp;
                    next.push(gives_up);
                }
                // One that was given up says so, again and again.
                if life == Life::GivenUp {
                    let mut says = self.clone();
                    says.messages.insert(Message::Abort(number));
                    next.push(says);
                }
            }
            for message in &self.messages {
                next.extend(self.delivered(*message));
                let mut lost = self.clone();
                lost.messages.remove(message);
                next.push(lost);
            }
            if self.crashes > 0 {
                // What is durable stays. A crash may also come between closing and recording.
                let mut crashed = self.clone();
                crashed.crashes -= 1;
                crashed.gate_closed = false;
                crashed.given_up.clear();
                next.push(crashed);
            }
            next
        }

        fn delivered(&self, message: Message) -> Vec<Self> {
            let mut next = self.clone();
            match message {
                Message::Handoff(number) => {
                    let given_up = self.given_up.contains(&number);
                    match handoff(self.departed.map(id), id(number), given_up) {
                        Ok(Handoff::Close) => {
                            // Closed and not recorded yet: a state of its own, for crashes.
                            let mut closed = self.clone();
                            closed.gate_closed = true;
                            let mut recorded = closed.clone();
                            recorded.departed = Some(number);
                            let mut answered = recorded.clone();
                            answered.messages.insert(Message::Fenced(number));
                            return vec![closed, recorded, answered];
                        }
                        Ok(Handoff::Repeat) => {
                            next.messages.insert(Message::Fenced(number));
                        }
                        Err(_) => {}
                    }
                }
                Message::Fenced(number) => {
                    // Taken only by one that still stands by.
                    let life = &mut next.lives[usize::from(number)];
                    if *life == Life::Standby {
                        *life = Life::Arriving;
                    }
                }
                Message::Abort(number) => {
                    next.given_up.insert(number);
                    if abort(self.departed.map(id), id(number)) {
                        next.departed = None;
                        next.gate_closed = false;
                    }
                }
            }
            vec![next]
        }

        /// The destination is a return into the old copy from which the source still fetches: who may
        /// read there.
        fn may_fetch(&self, number: u8) -> bool {
            let source = [9; 16];
            let stance = match self.lives[usize::from(number)] {
                Life::Standby | Life::GivenUp => Stance::Standby,
                Life::Arriving => Stance::Arriving,
            };
            attach(source_of(Some(source), stance), source, Stance::Arriving).is_ok()
        }

        fn check(&self) {
            let arrived = self
                .lives
                .iter()
                .filter(|life| **life == Life::Arriving)
                .count();
            let writers = arrived + usize::from(self.source_accepts_writes());
            assert!(writers <= 1, "two copies accept writes: {self:?}");
            for number in [0_u8, 1] {
                // A source that is written, or may be again, has all that it lacks; and whoever
                // writes into the old copy has nobody who reads it.
                assert_eq!(
                    self.may_fetch(number),
                    self.lives[usize::from(number)] != Life::Arriving,
                    "{self:?}"
                );
                if self.lives[usize::from(number)] == Life::Arriving {
                    assert!(!self.source_accepts_writes(), "{self:?}");
                    assert_eq!(self.departed, Some(number), "{self:?}");
                    assert!(attach(self.departed.map(id), id(number), Stance::Arriving).is_ok());
                }
            }
        }

        /// Whether, with every message delivered from now on, somebody comes to accept writes.
        fn can_go_on(&self) -> bool {
            match self.departed {
                None => true,
                Some(to) => match self.lives[usize::from(to)] {
                    Life::Arriving => true,
                    // It asks again, and is answered again.
                    Life::Standby => handoff(Some(id(to)), id(to), false) == Ok(Handoff::Repeat),
                    // It says again that it gave up.
                    Life::GivenUp => abort(Some(id(to)), id(to)),
                },
            }
        }
    }

    #[test]
    fn never_two_writers_and_never_none_without_a_way_on() {
        let mut seen = HashSet::new();
        let mut todo = vec![World::new(2)];
        let mut handed_over = 0;
        let mut given_up = 0;
        while let Some(world) = todo.pop() {
            if !seen.insert(world.clone()) {
                continue;
            }
            world.check();
            assert!(world.can_go_on(), "nobody can ever write again: {world:?}");
            handed_over += usize::from(world.lives.contains(&Life::Arriving));
            given_up += usize::from(world.lives == [Life::GivenUp; 2]);
            todo.extend(world.next());
        }
        assert!(seen.len() > 1000, "only {} worlds", seen.len());
        assert!(handed_over > 0 && given_up > 0);
    }

    #[test]
    fn a_source_that_was_released_by_hand_is_not_read_from_any_more() {
        assert_eq!(
            attach(None, id(1), Stance::Arriving),
            Err(Refusal::FenceGone)
        );
        assert_eq!(
            attach(Some(id(2)), id(1), Stance::Arriving),
            Err(Refusal::MovedOn)
        );
    }
}
