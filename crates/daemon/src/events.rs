//! What has happened to an export, for people and for programs that watch it.
//!
//! Owns a bounded ring of events for each export; the oldest ones go. Each event is logged once,
//! here, at the level of its kind. Events have no part in any decision, so that their time stamps
//! do no harm to tests that own the clock.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::volume::lock;

/// Events kept for each export. Hours of a source that comes and goes every minute.
const MAX_EVENTS: usize = 256;

/// What happened. The names are stable: scripts read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The export is served.
    Opened,
    /// The source cannot be reached any more.
    SourceLost,
    /// The source is waited for before the disk can begin.
    Waiting,
    /// The source is reachable, and the right one.
    SourceBack,
    /// Another disk answers in the source's place, or one that cannot prove what it is.
    SourceRefused,
    /// The source could not read a range.
    SourceError,
    /// What was written at the source and flushed by nobody may be lost: its machine was started anew
    /// before the handoff.
    SourceRestarted,
    /// Reads failed because the source was away for longer than the policy allows.
    ReadsFailed,
    /// The VM runs here from now on.
    Handoff,
    /// Every block is here.
    Complete,
    /// There is no space where the image or its state is.
    DiskFull,
    /// There is space again.
    DiskSpace,
    /// The image could not be read or written.
    DiskError,
    /// A sync failed: nothing more is written until a restart.
    Poisoned,
    /// A sync had failed before this start, so all of the image was written once more.
    Rewritten,
    /// Something of the state could not be kept; nothing is lost by it.
    StateTrouble,
    /// A new site prepares to take the disk over.
    Departing,
    /// The disk has moved on.
    Departed,
    /// A move was given up before the handoff.
    MoveGivenUp,
    /// The fence of an old copy was lifted by hand.
    FenceLifted,
    /// The VM's writes are slowed down, so that all can be copied before the handoff.
    Slowed,
    /// All that can be copied before the handoff is here.
    Prepared,
    /// Looking for blocks in seed images has begun, rests, goes on or has ended.
    Seeding,
    /// What differs from older copies is not recorded any more.
    WayBack,
}

impl EventKind {
    /// Its name as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::SourceLost => "source-lost",
            Self::Waiting => "waiting",
            Self::SourceBack => "source-back",
            Self::SourceRefused => "source-refused",
            Self::SourceError => "source-error",
            Self::SourceRestarted => "source-restarted",
            Self::ReadsFailed => "reads-failed",
            Self::Handoff => "handoff",
            Self::Complete => "complete",
            Self::DiskFull => "disk-full",
            Self::DiskSpace => "disk-space",
            Self::DiskError => "disk-error",
            Self::Poisoned => "poisoned",
            Self::Rewritten => "rewritten",
            Self::StateTrouble => "state-trouble",
            Self::Departing => "departing",
            Self::Departed => "departed",
            Self::MoveGivenUp => "move-given-up",
            Self::FenceLifted => "fence-lifted",
            Self::Slowed => "slowed",
            Self::Prepared => "prepared",
            Self::Seeding => "seeding",
            Self::WayBack => "way-back",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts from 1 within an export and a run of the daemon.
    pub number: u64,
    /// When, in milliseconds since 1970 (UTC).
    pub unix_ms: u64,
    /// The export.
    pub export: String,
    /// What.
    pub kind: EventKind,
    /// The same for people, and what to do where something is to be done.
    pub text: String,
}

impl Ring {
    fn push(&mut self, mut event: Event) {
        self.last += 1;
        event.number = self.last;
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }
}

/// The last events of an export.
#[derive(Debug, Default)]
pub struct EventLog {
    /// Shared by two volumes of one export, while the disk changes its storage and after.
    ring: Mutex<Arc<Mutex<Ring>>>,
}

#[derive(Debug, Default)]
struct Ring {
    last: u64,
    events: VecDeque<Event>,
}

/// Milliseconds since 1970, for people.
pub(crate) fn unix_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    let ms = since_1970.map_or(0, |time| time.as_millis());
    u64::try_from(ms).unwrap_or(u64::MAX)
}

impl EventLog {
    /// Keeps an event and logs it.
    pub fn add(&self, export: &str, kind: EventKind, text: impl Into<String>) {
        let text = text.into();
        let name = kind.name();
        match kind {
            // A person must act.
            EventKind::SourceRefused
            | EventKind::SourceRestarted
            | EventKind::DiskFull
            | EventKind::Poisoned => {
                tracing::error!(export, event = name, "{text}");
            }
            EventKind::SourceLost
            | EventKind::Waiting
            | EventKind::SourceError
            | EventKind::ReadsFailed
            | EventKind::DiskError
            | EventKind::Rewritten
            | EventKind::StateTrouble
            | EventKind::Slowed
            | EventKind::FenceLifted
            | EventKind::WayBack => tracing::warn!(export, event = name, "{text}"),
            EventKind::Opened => tracing::debug!(export, event = name, "{text}"),
            EventKind::SourceBack
            | EventKind::Handoff
            | EventKind::Complete
            | EventKind::DiskSpace
            | EventKind::Departing
            | EventKind::Departed
            | EventKind::MoveGivenUp
            | EventKind::Prepared
            | EventKind::Seeding => tracing::info!(export, event = name, "{text}"),
        }
        let event = Event {
            number: 0,
            unix_ms: unix_ms(),
            export: export.to_owned(),
            kind,
            text,
        };
        // Held while it is added, so that nothing is added to a log that was joined to another.
        let ring = lock(&self.ring);
        lock(&ring).push(event);
    }

    fn ring(&self) -> Arc<Mutex<Ring>> {
        Arc::clone(&lock(&self.ring))
    }

    /// From here on both are one log; what was in this one comes behind what is in the other.
    pub fn join(&self, other: &Self) {
        let shared = other.ring();
        let own = std::mem::replace(&mut *lock(&self.ring), Arc::clone(&shared));
        if Arc::ptr_eq(&own, &shared) {
            return;
        }
        let events = std::mem::take(&mut lock(&own).events);
        for event in events {
            lock(&shared).push(event);
        }
    }

    /// Those with a number above `since`, oldest first.
    pub fn since(&self, since: u64) -> Vec<Event> {
        let ring = self.ring();
        let ring = lock(&ring);
        let newer = |event: &&Event| event.number > since;
        ring.events.iter().filter(newer).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_and_numbered_without_gaps() {
        let log = EventLog::default();
        for n in 0..300 {
            log.add("web", EventKind::SourceBack, format!("number {n}"));
        }
        let all = log.since(0);
        assert_eq!(all.len(), MAX_EVENTS);
        assert_eq!(all.last().unwrap().number, 300);
        assert!(all.windows(2).all(|w| w[0].number + 1 == w[1].number));
        assert_eq!(log.since(298).len(), 2);
        assert!(log.since(300).is_empty());
    }

    #[test]
    fn two_logs_that_join_are_one_with_numbers_that_grow() {
        let (old, new) = (EventLog::default(), EventLog::default());
        old.add("web", EventKind::Opened, "1");
        old.add("web", EventKind::Departing, "2");
        new.add("web", EventKind::Opened, "3");
        new.join(&old);
        new.join(&old);
        new.add("web", EventKind::Handoff, "4");
        old.add("web", EventKind::Departed, "5");
        for log in [&old, &new] {
            let all = log.since(0);
            let texts: Vec<_> = all.iter().map(|e| e.text.as_str()).collect();
            assert_eq!(texts, ["1", "2", "3", "4", "5"]);
            assert!(all.iter().zip(1..).all(|(event, n)| event.number == n));
        }
    }

    #[test]
    fn the_names_are_those_of_the_json_form() {
        for kind in [
            EventKind::Opened,
            EventKind::SourceLost,
            EventKind::Waiting,
            EventKind::SourceRestarted,
            EventKind::StateTrouble,
            EventKind::Departing,
            EventKind::MoveGivenUp,
            EventKind::FenceLifted,
            EventKind::WayBack,
        ] {
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(json, format!("{:?}", kind.name()));
        }
    }
}
