//! A full disk, and its end.
//!
//! Nothing is spoilt by a lack of space: a guest's write that does not fit is refused, a flush
//! whose records do not fit is refused and its records stay, what is fetched is handed to whoever
//! asked for it and not kept. All of it goes on by itself once there is space. Here is only what
//! is said about it: that it is so, once, and that it is over.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hikkoshi_store::medium::is_no_space;

use super::{Volume, lock};
use crate::events::EventKind;

/// A disk that took something this long after it refused something counts as having space again:
/// an overwrite needs none, so that the first success says little.
const QUIET: Duration = Duration::from_secs(3);

/// Errors of the disk are told at most this often; each is counted.
const TELL_ERRORS_EVERY: Duration = Duration::from_secs(60);

/// What is known of the local disk's troubles.
#[derive(Debug, Default)]
pub struct DiskTrouble {
    full: AtomicBool,
    refused_at: Mutex<Duration>,
    told_at: Mutex<Option<Duration>>,
}

impl Volume {
    /// Whether something did not fit a short while ago.
    pub fn is_disk_full(&self) -> bool {
        self.disk.full.load(Ordering::Relaxed)
    }

    /// Looks at the outcome of a write to the image or its state, and passes it on.
    pub(super) fn note_write<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        match &outcome {
            Ok(_) => {
                // The usual case is one load.
                if self.is_disk_full() {
                    self.note_space();
                }
            }
            Err(error) if is_no_space(error) => self.note_full(error),
            Err(error) => self.note_disk_error("written", error),
        }
        outcome
    }

    fn note_full(&self, error: &io::Error) {
        *lock(&self.disk.refused_at) = self.now();
        if !self.disk.full.swap(true, Ordering::Relaxed) {
            self.event(
                EventKind::DiskFull,
                format!(
                    "there is no space for the image {} or its state ({error}): writes that need \
                     more are refused, and nothing is copied; make space, and all goes on",
                    self.image.display()
                ),
            );
        }
    }

    fn note_space(&self) {
        let quiet = self.now().saturating_sub(*lock(&self.disk.refused_at)) >= QUIET;
        if quiet && self.disk.full.swap(false, Ordering::Relaxed) {
            self.event(EventKind::DiskSpace, "the disk takes writes again");
        }
    }

    /// The image could not be `what` ("read", "written"): told now and then, counted always.
    pub fn note_disk_error(&self, what: &str, error: &io::Error) {
        // A refusal of ours (unsupported, not permitted, poisoned) is no trouble of the disk.
        let Some(errno) = error.raw_os_error() else {
            return;
        };
        if matches!(errno, 1 | 95) {
            return;
        }
        self.tally.disk_errors.fetch_add(1, Ordering::Relaxed);
        let now = self.now();
        let mut told_at = lock(&self.disk.told_at);
        if told_at.is_none_or(|at| now.saturating_sub(at) >= TELL_ERRORS_EVERY) {
            *told_at = Some(now);
            drop(told_at);
            self.event(
                EventKind::DiskError,
                format!(
                    "the image {} could not be {what}: {error}; the guest was told; check the \
                     medium",
                    self.image.display()
                ),
            );
        }
    }
}
