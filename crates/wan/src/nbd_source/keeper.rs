//! Keeps one connection of a source standing.
//!
//! Owns the life of a connection: dialled, agreed with the others, read until it dies, its
//! requests failed, dialled again after a pause. One keeper runs for each connection wanted; they
//! meet only in [`Shared`].

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::dial::dial;
use super::line::Line;
use super::shared::{Installed, Shared};
use super::{frames, reader};
use crate::source::{SourceError, SourceErrorKind};

/// The pause before a connection beyond the first is tried again that the server did not admit.
const EXTRA_RETRY: Duration = Duration::from_secs(60);

/// Runs until the source is closed. `line` is the connection that stands already.
pub(super) fn keep(shared: &Arc<Shared>, slot: usize, mut line: Option<Arc<Line>>) {
    let mut backoff = Backoff::new(shared.config.backoff_min, shared.config.backoff_max);
    loop {
        if let Some(line) = line.take() {
            if read(shared, slot, &line) > 0 {
                backoff.reset();
            }
            if !shared.pause(backoff.next(), None) {
                return;
            }
        }
        if !shared.wait_for_turn(slot) {
            return;
        }
        let epoch = shared.epoch();
        let failed = match dial(&shared.config, &|socket| shared.dialing(slot, socket)) {
            Ok(dialed) => {
                let fresh = dialed.into_line(&shared.config);
                match shared.install(slot, &fresh, true) {
                    Installed::Yes => {
                        line = Some(fresh);
                        continue;
                    }
                    Installed::Closed => return,
                    Installed::Differs(error) => error,
                }
            }
            Err(error) => error,
        };
        let others_stand = shared.standing() > 0;
        if failed.kind == SourceErrorKind::Untrusted {
            shared.tell_untrusted(&failed);
        }
        tracing::debug!(slot, others_stand, error = %failed, "no connection to the source");
        let wait = if others_stand {
            EXTRA_RETRY
        } else if failed.kind == SourceErrorKind::Untrusted {
            shared.config.backoff_max
        } else {
            backoff.next()
        };
        if !shared.pause(wait, others_stand.then_some(epoch)) {
            return;
        }
    }
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
            frames::read(line, patience)
        } else {
            reader::read(line, patience)
        };
        match outcome {
            Ok(ended) => {
                answered = ended.answered;
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
