//! Whether guests may write, and waiting until none does.
//!
//! Entering and leaving are an atomic operation each, and wait for nobody.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

use hikkoshi_engine::sync::wait;

use super::lock;

const CLOSED: u64 = 1 << 63;

/// Writes under way, and whether more may begin.
#[derive(Debug, Default)]
pub struct Gate {
    /// The top bit says that it is closed, the others how many are inside.
    state: AtomicU64,
    closing: Mutex<()>,
    left: Condvar,
}

/// Somebody inside.
pub struct Inside<'a>(&'a Gate);

impl Gate {
    /// Enters, unless it is closed.
    #[inline]
    pub fn enter(&self) -> Option<Inside<'_>> {
        let before = self.state.fetch_add(1, Ordering::AcqRel);
        let inside = Inside(self);
        // Dropped, it leaves again.
        (before & CLOSED == 0).then_some(inside)
    }

    /// Lets nobody in from now on, and returns when nobody is inside.
    pub fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        let mut closing = lock(&self.closing);
        while self.state.load(Ordering::Acquire) != CLOSED {
            closing = wait(&self.left, &self.closing, closing);
        }
    }

    /// Whether whoever comes is let in.
    pub fn is_open(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED == 0
    }

    /// Lets everybody in again.
    pub fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        let before = self.0.state.fetch_sub(1, Ordering::AcqRel);
        if before == CLOSED | 1 {
            // Under the lock, so that it cannot fall between somebody's look and wait.
            drop(lock(&self.0.closing));
            self.0.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn closing_waits_for_those_inside_and_lets_nobody_in() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter().expect("it is open");
        let closing = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || gate.close())
        };
        while gate.enter().is_some() {
            std::thread::yield_now();
        }
        assert!(!closing.is_finished());
        drop(inside);
        closing.join().expect("closed");
        assert!(gate.enter().is_none());
        gate.open();
        assert!(gate.enter().is_some());
    }
}
