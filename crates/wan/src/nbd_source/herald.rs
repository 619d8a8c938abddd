//! The thread that tells callers what no reader can.
//!
//! Owns the order of news: the failures of a connection, then that it was the last one, then that
//! one stands again. It must never wait for anything but its queue. Readers, keepers and
//! submitters hand it news, also under locks, because handing over never waits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::job::Job;
use crate::source::{SourceError, SourceWatcher};

/// What is to be told.
pub(super) enum News {
    /// Jobs failed.
    Failed(Vec<Job>, SourceError),
    /// Something a caller asked for that needs no server.
    Answer(Box<dyn FnOnce() + Send>),
    /// The first connection stands.
    Up(Untold),
    /// The last connection is gone, or the wrong disk answered.
    Down(SourceError, Untold),
}

/// News of connections that the watcher has not heard. Until it has, it takes what stands now for what
/// stood before, and nothing may be asked of that.
pub(super) struct Untold(Arc<AtomicUsize>);

impl Untold {
    /// One more, of so many.
    pub fn of(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Untold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Who is told of connections.
pub(super) type WatcherSlot = Arc<Mutex<Option<Arc<dyn SourceWatcher>>>>;

/// Starts the thread; it ends when the last sender is gone. `mark` runs on it first.
pub(super) fn start(
    watcher: WatcherSlot,
    mark: impl FnOnce() + Send + 'static,
) -> std::io::Result<Sender<News>> {
    let (sender, receiver) = channel();
    thread::Builder::new()
        .name("source-herald".to_owned())
        .spawn(move || {
            mark();
            tell(&receiver, &watcher);
        })?;
    Ok(sender)
}

pub(super) fn tell(receiver: &Receiver<News>, watcher: &WatcherSlot) {
    let current = || {
        let slot = watcher.lock().unwrap_or_else(PoisonError::into_inner);
        slot.clone()
    };
    while let Ok(news) = receiver.recv() {
        match news {
            News::Failed(jobs, error) => jobs.into_iter().for_each(|job| job.fail(error.clone())),
            News::Answer(answer) => answer(),
            News::Up(untold) => {
                // It may ask in the call.
                drop(untold);
                if let Some(watcher) = current() {
                    watcher.source_up();
                }
            }
            News::Down(error, untold) => {
                if let Some(watcher) = current() {
                    watcher.source_down(&error);
                }
                drop(untold);
            }
        }
    }
}
