//! Who takes the place of a volume whose disk has changed its storage.
//!
//! While the two volumes agree, the old one's gate is closed: a write that comes then waits here, and
//! is made again where the disk is afterwards. Everything else goes on at the old volume, which has
//! all that was written until then and is not changed any more. Once the successor is known, every
//! request that begins goes to it; whoever asks after a write was answered there sees it.

use std::sync::{Arc, Condvar, Mutex, OnceLock};

use hikkoshi_engine::sync::wait;

use crate::volume::{Volume, lock};

/// What becomes of a volume.
#[derive(Default)]
pub struct Succession {
    next: OnceLock<Arc<Volume>>,
    stage: Mutex<Stage>,
    decided: Condvar,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// There was never a switch from here.
    #[default]
    Before,
    Switching,
    Decided,
}

impl Volume {
    /// The volume that has taken this one's place.
    #[inline]
    pub fn successor(&self) -> Option<&Arc<Volume>> {
        self.succession.next.get()
    }

    /// Writes that come from now on and are not let in wait for [`Volume::end_switch`].
    pub fn begin_switch(&self) {
        *lock(&self.succession.stage) = Stage::Switching;
    }

    /// It is decided: the disk is at `successor` from now on, or stays here.
    pub fn end_switch(&self, successor: Option<&Arc<Volume>>) {
        let mut stage = lock(&self.succession.stage);
        if let Some(successor) = successor {
            // It is set once: nobody switches twice from a volume that has departed.
            let _ = self.succession.next.set(Arc::clone(successor));
        }
        *stage = Stage::Decided;
        drop(stage);
        self.succession.decided.notify_all();
    }

    /// For a write that was not let in: whether it is to be made again, here or at the successor,
    /// once it is known which. Waits for that.
    pub fn awaits_switch(&self) -> bool {
        let mut stage = lock(&self.succession.stage);
        while *stage == Stage::Switching {
            stage = wait(&self.succession.decided, &self.succession.stage, stage);
        }
        let stays = *stage == Stage::Decided && !self.has_departed();
        self.successor().is_some() || stays
    }

    /// Whether clients may count on writing, although this volume itself takes no more writes.
    pub fn hands_on(&self) -> bool {
        *lock(&self.succession.stage) == Stage::Switching || self.successor().is_some()
    }
}
