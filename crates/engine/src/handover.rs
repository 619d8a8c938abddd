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

use std::time::Duration;

use crate::journal::VolumeId;

/// So long an answer to a handoff counts, from before it was asked for, by the destination's clock. One that
/// comes later is thrown away, and the handoff is asked for again. Far more than a sync of a disk and any
/// round trip take.
pub const ANSWER_COUNTS_FOR: Duration = Duration::from_secs(30);

/// So long after its last answer, by its own clock, a source does not let a person lift the fence: then no
/// answer of its counts any more anywhere, wherever it still is. A third longer, which is more than two
/// clocks differ.
pub const NO_ANSWER_COUNTS_AFTER: Duration = Duration::from_secs(40);

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

/// Whether the answer to a handoff that was asked for at `asked` may be taken at `now`.
pub fn answer_counts(asked: Duration, now: Duration) -> bool {
    now.saturating_sub(asked) < ANSWER_COUNTS_FOR
}

/// In what time a person may lift the fence, that is, say that whoever the disk was handed over to is of no
/// account. `answered`: when a handoff was last answered; `taken`: the destination has said since that it
/// took the disk over, so that no answer is waited for any more. What a person says of one that has taken
/// it nobody can check from here.
pub fn release_in(answered: Option<Duration>, taken: bool, now: Duration) -> Option<Duration> {
    let answered = answered.filter(|_| !taken)?;
    let left = NO_ANSWER_COUNTS_AFTER.saturating_sub(now.saturating_sub(answered));
    (!left.is_zero()).then_some(left)
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

    /// When a person lifts the fence, if ever: always that of a destination that has not taken the disk.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum Releases {
        /// Once no answer counts any more.
        WhenNoAnswerCounts,
        /// At any time: what [`release_in`] is there to prevent.
        AtAnyTime,
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
        /// Durable at the source: the last move whose fence was lifted by hand, of one that had not taken
        /// the disk.
        released: Option<u8>,
        /// It may be.
        releases: Releases,
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
        fn new(crashes: u8, releases: Releases) -> Self {
            Self {
                departed: None,
                gate_closed: false,
                given_up: BTreeSet::new(),
                released: None,
                releases,
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
            if let Some(to) = self.departed
                && self.lives[usize::from(to)] != Life::Arriving
            {
                let mut released = self.clone();
                released.departed = None;
                released.gate_closed = false;
                released.released = Some(to);
                if self.releases == Releases::WhenNoAnswerCounts {
                    // They may still come, and are thrown away.
                    released.messages.remove(&Message::Fenced(to));
                }
                next.push(released);
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
                    let given_up = self.given_up.contains(&number) || self.released == Some(number);
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

        fn writers(&self) -> usize {
            let arrived = self.lives.iter().filter(|life| **life == Life::Arriving);
            arrived.count() + usize::from(self.source_accepts_writes())
        }

        fn check(&self) {
            assert!(self.writers() <= 1, "two copies accept writes: {self:?}");
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

    /// Looks at every world that can be, until one is not to be looked beyond.
    fn explore(first: World, mut goes_on: impl FnMut(&World) -> bool) {
        let mut seen = HashSet::new();
        let mut todo = vec![first];
        while let Some(world) = todo.pop() {
            if seen.insert(world.clone()) && goes_on(&world) {
                todo.extend(world.next());
            }
        }
        assert!(seen.len() > 1000, "only {} worlds", seen.len());
    }

    #[test]
    fn never_two_writers_and_never_none_without_a_way_on() {
        let (mut handed_over, mut given_up, mut released) = (0, 0, 0);
        explore(World::new(2, Releases::WhenNoAnswerCounts), |world| {
            world.check();
            assert!(world.can_go_on(), "nobody can ever write again: {world:?}");
            handed_over += usize::from(world.lives.contains(&Life::Arriving));
            given_up += usize::from(world.lives == [Life::GivenUp; 2]);
            released += usize::from(world.released.is_some());
            true
        });
        assert!(handed_over > 0 && given_up > 0 && released > 0);
    }

    /// The fence was lifted by hand while an answer was on its way, and who had asked took it.
    #[test]
    fn with_an_answer_that_counts_on_its_way_a_release_makes_two_writers() {
        let mut twice = 0;
        explore(World::new(0, Releases::AtAnyTime), |world| {
            twice += usize::from(world.writers() > 1);
            world.writers() <= 1
        });
        assert!(twice > 0);
    }

    /// Seconds at which something may happen.
    const INSTANTS: std::ops::RangeInclusive<u32> = 0..=100;

    /// Plays every history of an answer: when it is given, when a person wants to lift the fence, and when the
    /// destination, whose process may have stood still meanwhile, looks at it. The clocks go at these paces,
    /// in hundredths. Counts the histories in which the answer is taken after the fence was lifted.
    fn taken_too_late(source_pace: u32, destination_pace: u32) -> usize {
        let shown = |at: u32, pace: u32| Duration::from_millis(u64::from(at * pace * 10));
        let mut late = 0;
        // Asked for at 0. An answer before it is asked for there is none.
        for answered in INSTANTS {
            let lifted = INSTANTS.filter(|at| *at >= answered).find(|at| {
                let stamp = Some(shown(answered, source_pace));
                release_in(stamp, false, shown(*at, source_pace)).is_none()
            });
            for looked in INSTANTS.filter(|at| *at >= answered) {
                let taken = answer_counts(Duration::ZERO, shown(looked, destination_pace));
                late += usize::from(taken && lifted.is_some_and(|lifted| lifted <= looked));
            }
        }
        late
    }

    #[test]
    fn no_answer_counts_once_the_fence_may_be_lifted() {
        for (source, destination) in [(100, 100), (133, 100), (100, 76), (60, 100), (100, 160)] {
            assert_eq!(
                taken_too_late(source, destination),
                0,
                "{source} {destination}"
            );
        }
        // And it would be noticed.
        assert!(taken_too_late(150, 100) > 0);
        assert!(taken_too_late(100, 60) > 0);
    }

    #[test]
    fn whoever_has_said_that_it_took_the_disk_is_not_waited_for() {
        let answered = Some(Duration::from_secs(5));
        let now = Duration::from_secs(6);
        assert_eq!(
            release_in(answered, false, now),
            Some(Duration::from_secs(39))
        );
        assert_eq!(release_in(answered, true, now), None);
        assert_eq!(release_in(None, false, now), None);
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
