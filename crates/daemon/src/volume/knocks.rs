//! A handoff that does not get through: since when, how often it was asked for, and why not.
//!
//! Whoever asks tells it ([`Volume::take_over`]); the status, the events and whoever starts the volume
//! look at it. Nothing is decided by it.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use hikkoshi_wan::SourceError;

use super::{Volume, lock};
use crate::config::HandoffPolicy;
use crate::events::{EventKind, unix_ms};
use crate::status::{LifeState, WaitingStatus};

/// A start waits so long for a source that does not answer before it serves what is here without the
/// handoff. Many times what a lost connection costs.
const GRACE: Duration = Duration::from_secs(3);

/// How often whoever starts looks at whether it is to end.
const BEAT: Duration = Duration::from_millis(50);

/// What is known of a handoff that is asked for.
#[derive(Debug, Default)]
pub(super) struct Knocks(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The first attempt in vain since the last that was answered.
    since: Option<(Duration, u64)>,
    attempts: u64,
    last_error: String,
    /// The last answer was this refusal.
    refused: Option<String>,
}

impl Knocks {
    /// Nobody was heard. Whether that is news.
    pub fn unheard(&self, now: Duration, error: &SourceError) -> bool {
        let mut state = lock(&self.0);
        let is_news = state.since.is_none();
        if is_news {
            *state = State {
                since: Some((now, unix_ms())),
                ..State::default()
            };
        }
        state.attempts += 1;
        state.last_error = error.to_string();
        is_news
    }

    /// The source has answered, and agrees.
    pub fn agreed(&self) {
        *lock(&self.0) = State::default();
    }

    /// The source has answered, or something here stands in the way. Whether that is news.
    pub fn refused(&self, why: &str) -> bool {
        let mut state = lock(&self.0);
        let is_news = state.refused.as_deref() != Some(why);
        *state = State {
            refused: Some(why.to_owned()),
            ..State::default()
        };
        is_news
    }

    fn waiting(&self, now: Duration) -> Option<WaitingStatus> {
        let state = lock(&self.0);
        let (since, since_unix_ms) = state.since?;
        Some(WaitingStatus {
            since_unix_ms,
            waited_s: now.saturating_sub(since).as_secs(),
            attempts: state.attempts,
            last_error: state.last_error.clone(),
        })
    }
}

impl Volume {
    /// The source that a handoff waits for, if one does.
    pub(super) fn awaited(&self) -> Option<WaitingStatus> {
        let arrival = self.arrival.as_ref()?;
        let stands_by = self.life() == LifeState::Standby && !self.has_given_up();
        arrival
            .knocks
            .waiting(self.now())
            .filter(|_| stands_by && !self.from_image)
    }

    /// Whether a handoff waits for a source that is away.
    pub fn awaits_source(&self) -> bool {
        self.awaited().is_some()
    }

    /// A handoff was asked for, and nobody was heard.
    pub(super) fn handoff_unheard(&self, knocks: &Knocks, error: &SourceError) {
        tracing::debug!("the handoff did not get through: {error}");
        if knocks.unheard(self.now(), error) && !self.from_image {
            self.event(
                EventKind::Waiting,
                format!(
                    "the handoff does not get through to the source, and is asked for until it does: \
                     {error}"
                ),
            );
        }
    }

    /// The same for people, and what to do.
    pub(super) fn awaited_note(&self) -> Option<String> {
        let WaitingStatus {
            waited_s,
            attempts,
            last_error,
            ..
        } = self.awaited()?;
        Some(format!(
            "the handoff waits for the source (attempts: {attempts}, in {waited_s} s; the last one: \
             {last_error}), and writes here wait with it; it happens by itself once the source can be \
             reached: see to its daemon and to the link; `hikkoshi abort` here gives the move up"
        ))
    }

    /// Whether the handoff is to happen by itself, as soon as this runs.
    pub(super) fn takes_over_at_once(&self) -> bool {
        self.handoff_policy == HandoffPolicy::Now && self.has_arrival()
    }

    /// Waits for the handoff that is to happen at the start: until it has, or (unless `patient`) its
    /// source does not answer, or `ends`. It is asked for on another thread, and goes on there.
    ///
    /// # Errors
    /// It is refused, or could not be recorded here.
    pub(crate) fn await_first_handoff(
        &self,
        patient: bool,
        ends: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        let Some(arrival) = self.arrival.as_ref() else {
            return Ok(());
        };
        // What a source still needs that is here it can have only once this is served.
        if !self.takes_over_at_once() || self.rest_is_here() {
            return Ok(());
        }
        while self.life() == LifeState::Standby && !self.has_given_up() && !ends() {
            {
                let state = lock(&arrival.knocks.0);
                if let Some(why) = &state.refused {
                    return Err(io::Error::other(why.clone()));
                }
                let away = state.since.map(|(since, _)| self.now() - since);
                if !patient && away.is_some_and(|away| away >= GRACE) {
                    return Ok(());
                }
            }
            arrival.pause(BEAT);
        }
        Ok(())
    }
}
