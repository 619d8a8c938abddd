//! What two volumes of one process tell each other of a move: a call.
//!
//! The messages and their meaning are those of two daemons (`wan::transport::session`), so that the
//! fence is closed, repeated and lifted by the same code, in the same order.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_wan::transport::session::{Tell, Told};
use hikkoshi_wan::{MoveLink, SourceError, SourceErrorKind};

use crate::volume::departure::Bound;
use crate::volume::{Volume, lock};

/// The way to the old volume.
pub struct ImageLink {
    /// Let go of when it is needed no more: the new volume keeps its link for as long as it lives.
    old: Mutex<Option<Arc<Volume>>>,
}

impl ImageLink {
    /// To `old`.
    pub fn new(old: &Arc<Volume>) -> Arc<Self> {
        Arc::new(Self {
            old: Mutex::new(Some(Arc::clone(old))),
        })
    }
}

impl MoveLink for ImageLink {
    /// Waits for nothing but the old volume's medium, and for writes that are under way there.
    fn tell(&self, tell: &Tell, _: Duration) -> Result<Told, SourceError> {
        let Some(old) = lock(&self.old).clone() else {
            let message = "the old image was let go of";
            return Err(SourceError::new(SourceErrorKind::Disconnected, message));
        };
        match old.answer(*tell, &mut Bound::default()) {
            Told::Refused(why) => Err(SourceError::new(SourceErrorKind::Refused, why)),
            told => Ok(told),
        }
    }

    /// Nobody waits for an answer that does not come.
    fn interrupt(&self) {}

    fn hang_up(&self) {
        lock(&self.old).take();
    }
}
