//! What the source of a complete move may not have heard: that it is needed no more.
//!
//! Who completes a move says so until it is heard, or until the daemon ends. Then the next start says it
//! once more, beside all else: neither the start nor any guest waits for it. That it is heard is recorded
//! by striking out that the source keeps a fence, of which nothing else asks once all is here.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hikkoshi_store::state::{Identity, Life, StateError};
use hikkoshi_wan::transport::session::{MoveId, Tell};
use hikkoshi_wan::{MoveLine, MoveLink, NbdSourceConfig, SourceErrorKind};

use super::storage::ImageAddress;
use super::{Volume, lock};

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The pause before it is said again.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// A source that cannot be reached for so long is told at the next start, if ever.
const SAY_FOR: Duration = Duration::from_secs(600);

/// Whether it is to be said: by whom all has been fetched from a source that keeps a fence. One that is
/// another image of this machine knows by other ways.
pub(super) fn is_due(identity: &Identity) -> bool {
    identity.life == Life::Local
        && identity.ties.fenced_source
        && ImageAddress::parse(&identity.source_uri).is_none()
}

/// The thread that says it.
pub(super) struct LastWord {
    line: Arc<MoveLine>,
    ends: Sender<()>,
    thread: JoinHandle<()>,
}

impl LastWord {
    /// Begins to say of the move `id` to whoever answers there that all is here.
    pub fn begin(volume: &Arc<Volume>, id: MoveId, to: NbdSourceConfig) -> io::Result<Self> {
        let line = Arc::new(MoveLine::new(to));
        let (ends, ended) = channel();
        let (volume, saying) = (Arc::clone(volume), Arc::clone(&line));
        let thread = std::thread::Builder::new()
            .name("last-word".into())
            .spawn(move || say(&volume, id, &saying, &ended))?;
        Ok(Self { line, ends, thread })
    }

    /// Says it no more.
    pub fn end(self) {
        drop(self.ends);
        self.line.hang_up();
        let _ = self.thread.join();
    }
}

fn say(volume: &Volume, id: MoveId, line: &MoveLine, ended: &Receiver<()>) {
    // Who completed it may have been killed while it recorded that: nobody may let go of the source for
    // what a power cut takes back.
    if let Err(error) = record(volume, |_| ()) {
        return tracing::warn!("its source is not told that all is here: {error}");
    }
    let begun = Instant::now();
    while begun.elapsed() < SAY_FOR {
        match line.tell(&Tell::Done { id }, PATIENCE) {
            Err(error) if error.kind == SourceErrorKind::Disconnected => {
                tracing::debug!("its source has not heard yet that all is here: {error}");
            }
            // Said again at the next start.
            Err(error) if error.kind != SourceErrorKind::Untrusted => {
                return tracing::debug!("its source does not hear that all is here: {error}");
            }
            // It has heard; or it is another disk by now, or its fence is gone, and nobody waits for it.
            _ => {
                if let Err(error) = record(volume, |i| i.ties.fenced_source = false) {
                    tracing::warn!("its source is told once more that all is here: {error}");
                }
                return;
            }
        }
        if ended.recv_timeout(RETRY_AFTER) != Err(RecvTimeoutError::Timeout) {
            return;
        }
    }
}

fn record(volume: &Volume, change: impl FnOnce(&mut Identity)) -> Result<(), StateError> {
    let mut journal = lock(&volume.journal);
    journal.state.as_mut().map_or(Ok(()), |s| s.change(change))
}
