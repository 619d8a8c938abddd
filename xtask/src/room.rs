//! How much room the disk has while a step runs.
//!
//! A disk that is shared with others may be full for a while for nothing of ours. Owns the watch
//! over it, so that the summary tells such a failure from one of the project's.

use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// With less than this at any moment a failure says nothing of the project, in bytes: tests write
/// files of this size at once.
pub const TOO_LITTLE: u64 = 512 << 20;

/// What all steps together leave on the disk is less, in bytes.
const ENOUGH: u64 = 8 << 30;

const EVERY: Duration = Duration::from_millis(100);

/// The room of the fullest of `places`, in bytes, or more than any disk has where none can be
/// asked.
fn room(places: &[PathBuf]) -> u64 {
    let free = |place: &PathBuf| {
        // What is still to be made is on its parent's disk.
        let there = place.ancestors().find(|place| place.exists())?;
        let told = rustix::fs::statvfs(there).ok()?;
        Some(told.f_bavail.saturating_mul(told.f_frsize))
    };
    places.iter().filter_map(free).min().unwrap_or(u64::MAX)
}

/// Waits until there is room for what is run next, no longer than `patience`. Whether there is.
pub fn wait(places: &[PathBuf], patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while room(places) < ENOUGH {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(EVERY);
    }
    true
}

/// Looks at the room again and again.
#[derive(Debug)]
pub struct Watch {
    stop: mpsc::Sender<()>,
    watching: JoinHandle<u64>,
}

impl Watch {
    /// Begins to look at the disks of `places`.
    pub fn start(places: Vec<PathBuf>) -> Self {
        let (stop, stopped) = mpsc::channel();
        let watching = thread::spawn(move || {
            let mut least = room(&places);
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                least = least.min(room(&places));
            }
            least
        });
        Self { stop, watching }
    }

    /// Ends, and tells the least room that was seen, in bytes.
    pub fn least(self) -> u64 {
        drop(self.stop);
        self.watching.join().unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_of_a_disk_is_seen_also_where_nothing_is_yet() {
        let here = std::env::temp_dir();
        let seen = Watch::start(vec![here.join("not/made/yet")]).least();
        assert!(seen < u64::MAX);
        assert_eq!(room(&[]), u64::MAX);
    }
}
