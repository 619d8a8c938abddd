//! Keeps one connection of a source standing.
//!
//! Owns the life of a connection: dialled, agreed with the others, read until it dies, its
//! requests failed, dialled again after a pause. One keeper runs for each connection wanted; they
//! meet only in [`Shared`]. At the start they all dial at the same time, and whichever has shaken
//! hands first is the first: the server may take only one. Where it is to be said for which move they
//! are, the first that is connected says so while it shakes hands, and leads those that get frames.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::attach::{announce, attach, opening};
use super::dial::{Dialed, dial};
use super::line::Line;
use super::shared::{Installed, Shared, Turn};
use super::{frames, reader};
use crate::source::{SourceError, SourceErrorKind};

/// The pause before a connection beyond the first is tried again that the server did not admit.
const EXTRA_RETRY: Duration = Duration::from_secs(60);

/// Keeper number `keeper`, until the source is closed. `opening`: nothing is known of the source yet,
/// and this is one of those that dial at once.
pub(super) fn keep(shared: &Arc<Shared>, keeper: usize, opening: bool) {
    let mut backoff = Backoff::new(shared.config.backoff_min, shared.config.backoff_max);
    let seat = if opening {
        open(shared, keeper, &mut backoff)
    } else {
        shared.wait_for_seat()
    };
    let Some(slot) = seat else {
        return;
    };
    while shared.wait_for_turn(slot) {
        let epoch = shared.epoch();
        let outcome =
            dial_one(shared, keeper).and_then(|dialed| stand(shared, keeper, slot, dialed));
        if !go_on(shared, slot, outcome, epoch, &mut backoff) {
            return;
        }
    }
}

/// The first attempt of a source of which nothing is known yet, and what comes of it up to its end.
/// Gives the place to keep from then on; `None`: there is none left, or the source is closed.
fn open(shared: &Arc<Shared>, keeper: usize, backoff: &mut Backoff) -> Option<usize> {
    let epoch = shared.epoch();
    let dialed = match dial_one(shared, keeper) {
        Ok(dialed) => dialed,
        Err(error) => {
            shared.attempt_over(Some(&error));
            shared.has_no_spare();
            // Not before: the server may have taken the one connection that it takes, and that is
            // to have a place.
            let slot = shared.wait_for_seat()?;
            return pause(shared, slot, &error, epoch, backoff).then_some(slot);
        }
    };
    let Some(slot) = shared.take_seat(keeper) else {
        shared.keep_spare(keeper, dialed);
        return None;
    };
    let outcome = stand(shared, keeper, slot, dialed);
    if let Err(error) = &outcome {
        shared.attempt_over(Some(error));
    }
    go_on(shared, slot, outcome, epoch, backoff).then_some(slot)
}

/// What follows from an attempt, until there is to be another one. False when the source is closed.
fn go_on(
    shared: &Shared,
    slot: usize,
    outcome: Result<Option<Arc<Line>>, SourceError>,
    epoch: u64,
    backoff: &mut Backoff,
) -> bool {
    match outcome {
        Ok(Some(line)) => {
            if read(shared, slot, &line) > 0 {
                backoff.reset();
            }
            shared.pause(backoff.next(), None)
        }
        Ok(None) => false,
        Err(error) => pause(shared, slot, &error, epoch, backoff),
    }
}

fn dial_one(shared: &Shared, keeper: usize) -> Result<Dialed, SourceError> {
    let opened = |socket: &Arc<_>| shared.dialing(keeper, socket);
    let first_said = || match shared.take_lead(keeper) {
        true => opening(&shared.config),
        false => Vec::new(),
    };
    let outcome = dial(&shared.config, &shared.manners, &opened, &first_said);
    if outcome.is_err() {
        shared.dialed(keeper);
        shared.has_led(keeper);
    }
    outcome
}

/// Puts a connection to work that has shaken hands; `None`: the source was closed.
fn stand(
    shared: &Shared,
    keeper: usize,
    slot: usize,
    dialed: Dialed,
) -> Result<Option<Arc<Line>>, SourceError> {
    let turn = shared.wait_to_stand(keeper, dialed.negotiated.transport);
    let outcome = match turn {
        Turn::Closed => return Ok(None),
        // Nobody may rely on a source that would refuse: its answer is waited for.
        Turn::First => attach(&dialed, &shared.config).map(|()| None),
        // It agreed a moment ago. What it would say now comes before anything that is asked.
        Turn::Beside => announce(&dialed, &shared.config),
    };
    let outcome = outcome.and_then(|attaching| {
        let fresh = dialed.into_line(&shared.config, attaching);
        match shared.install(slot, &fresh) {
            Installed::Yes => Ok(Some(fresh)),
            Installed::Closed => Ok(None),
            Installed::Differs(error) => Err(error),
        }
    });
    shared.dialed(keeper);
    shared.has_led(keeper);
    outcome
}

/// Rests after a failure. False when the source is closed.
fn pause(
    shared: &Shared,
    slot: usize,
    failed: &SourceError,
    epoch: u64,
    backoff: &mut Backoff,
) -> bool {
    let others_stand = shared.standing() > 0;
    if failed.kind == SourceErrorKind::Untrusted {
        shared.tell_untrusted(failed);
    }
    tracing::debug!(slot, others_stand, error = %failed, "no connection to the source");
    let wait = if others_stand {
        EXTRA_RETRY
    } else if failed.kind == SourceErrorKind::Untrusted {
        shared.config.backoff_max
    } else {
        backoff.next()
    };
    shared.pause(wait, others_stand.then_some(epoch))
}

/// Reads a connection until it dies and settles what is left of it. Returns how many requests it
/// answered.
pub(super) fn read(shared: &Shared, slot: usize, line: &Line) -> u64 {
    let mut answered = 0;
    let mut jobs = Vec::new();
    let mut error = SourceError::new(
        SourceErrorKind::Disconnected,
        "a completion panicked; the connection was given up",
    );
    // A caller whose completion panics must not take with it the answers of all the others.
    let calm = catch_unwind(AssertUnwindSafe(|| {
        let patience = shared.config.progress_timeout;
        let outcome = if line.speaks_frames() {
            frames::read(line, shared, patience)
        } else {
            reader::read(line, shared, patience)
        };
        match outcome {
            Ok(ended) => {
                // What has come in part is kept, and so the next connection gets further.
                let parts = ended.unfinished.iter().filter(|job| job.has_part()).count();
                answered = ended.answered + u64::try_from(parts).unwrap_or(0);
                jobs = ended.unfinished;
                let ended = ended.why;
                if ended.is_checksum() {
                    shared.count_checksum_failure();
                    tracing::warn!(
                        slot,
                        "{}: {ended}; nothing of it was kept, and it is asked for again over a \
                         new connection; memory or network hardware between here and there is \
                         failing",
                        shared.uri
                    );
                }
                let message = format!("{}: {ended}", shared.uri);
                error = SourceError::new(ended.kind(), message);
            }
            Err(broken) => {
                let message = format!("{}: {broken}", shared.uri);
                error = SourceError::new(SourceErrorKind::Disconnected, message);
            }
        }
    }));
    if calm.is_err() {
        tracing::error!(slot, "a completion of the source panicked");
    }
    jobs.extend(line.bury());
    shared.remove(slot, jobs, &error);
    answered
}

/// Pauses that double up to a bound, each shortened by up to a quarter so that many clients of a
/// server that comes back do not come all at once.
struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
    random: u64,
}

impl Backoff {
    fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            next: min,
            // Seeded by the standard library from the system's randomness.
            random: RandomState::new().build_hasher().finish() | 1,
        }
    }

    fn reset(&mut self) {
        self.next = self.min;
    }

    fn next(&mut self) -> Duration {
        let full = self.next;
        self.next = full.saturating_mul(2).min(self.max);
        // Xorshift; nothing depends on its quality.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let percent = u32::try_from(self.random % 26).unwrap_or(0);
        full - full * percent / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_bound_and_start_again() {
        let (min, max) = (Duration::from_millis(250), Duration::from_secs(10));
        let mut backoff = Backoff::new(min, max);
        let mut full = min;
        for _ in 0..20 {
            let pause = backoff.next();
            assert!(
                pause <= full && pause >= full * 3 / 4,
                "{pause:?} of {full:?}"
            );
            full = (full * 2).min(max);
        }
        backoff.reset();
        assert!(backoff.next() <= min);
    }
}
