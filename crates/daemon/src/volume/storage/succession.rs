//! Who takes the place of a volume whose disk has changed its storage.
//!
//! While the two volumes agree, the old one's gate is closed: a write that comes then waits here, and
//! is made again where the disk is afterwards. Everything else goes on at the old volume, which has
//! all that was written until then and is not changed any more. Once the successor is known, every
//! request that begins goes to it; whoever asks after a write was answered there sees it.
//!
//! A request that has begun before may still use the old volume, however long it takes. So that one
//! is let go of only when each of its clients has been seen between two requests since ([`Presence`]):
//! the next one goes to the successor. An idle client keeps nothing.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};

use hikkoshi_engine::sync::wait;

use crate::volume::{Volume, lock};

/// What becomes of a volume.
#[derive(Default)]
pub struct Succession {
    next: OnceLock<Arc<Volume>>,
    stage: Mutex<Stage>,
    decided: Condvar,
    /// Clients that have not gone over.
    present: Mutex<Vec<Weak<Presence>>>,
    /// Requests that are answered on other threads.
    deferred: AtomicU64,
}

/// Whether a client is in the middle of requests.
#[derive(Debug, Default)]
pub struct Presence {
    busy: AtomicBool,
    /// Of what was written at the source, and may be lost there, it has seen so many losses: those
    /// that there were when it connected ([`Volume::source_losses`]).
    pub(in crate::volume) losses: AtomicU64,
}

impl Presence {
    /// Requests are about to be served. Before [`Volume::successor`] is looked at.
    pub fn begin(&self) {
        self.busy.store(true, Ordering::SeqCst);
        // Either this is seen by who lets go of the volume, or its successor is seen here.
        fence(Ordering::SeqCst);
    }

    /// All that came are served, or wait for another thread.
    pub fn end(&self) {
        self.busy.store(false, Ordering::Release);
    }
}

/// A volume that a request uses on another thread.
pub struct Deferred(Arc<Volume>);

impl Deref for Deferred {
    type Target = Volume;

    fn deref(&self) -> &Volume {
        &self.0
    }
}

impl Drop for Deferred {
    fn drop(&mut self) {
        self.0.succession.deferred.fetch_sub(1, Ordering::AcqRel);
    }
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

    /// A client uses the volume from now on.
    pub fn enter(&self, presence: &Arc<Presence>) {
        let mut present = lock(&self.succession.present);
        present.retain(|one| one.strong_count() > 0);
        present.push(Arc::downgrade(presence));
    }

    /// Of those who use it now, how many are so.
    pub(in crate::volume) fn count_clients(&self, is_so: impl Fn(&Presence) -> bool) -> usize {
        let present = lock(&self.succession.present);
        let present = present.iter().filter_map(Weak::upgrade);
        present.filter(|one| is_so(one)).count()
    }

    /// It has gone over to another.
    pub fn leave(&self, presence: &Arc<Presence>) {
        let mut present = lock(&self.succession.present);
        present.retain(|one| !std::ptr::eq(one.as_ptr(), Arc::as_ptr(presence)));
    }

    /// The volume, for a request that is answered on another thread.
    pub fn deferred(self: &Arc<Self>) -> Deferred {
        self.succession.deferred.fetch_add(1, Ordering::AcqRel);
        Deferred(Arc::clone(self))
    }

    /// With a successor: whether nobody uses this volume any more, nor will.
    pub fn is_deserted(&self) -> bool {
        fence(Ordering::SeqCst);
        let present = lock(&self.succession.present);
        let busy = |one: Arc<Presence>| one.busy.load(Ordering::SeqCst);
        // In this order: what is deferred was begun by somebody who was busy.
        !present.iter().filter_map(Weak::upgrade).any(busy)
            && self.succession.deferred.load(Ordering::Acquire) == 0
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
        // Another site may be taking the disk over: nobody is let in here then, however often he asks.
        let stays = *stage == Stage::Decided && self.lets_in();
        self.successor().is_some() || stays
    }

    /// Whether clients may count on writing, although this volume itself takes no more writes.
    pub fn hands_on(&self) -> bool {
        *lock(&self.succession.stage) == Stage::Switching || self.successor().is_some()
    }
}
