//! The synchronisation primitives of this crate: those of the standard library, or, under
//! `--cfg loom`, those of the model checker.
//!
//! [`lock`] and [`wait`] are the two places where a thread of a volume can come to stand for
//! another one, so they are where a scheduler takes part that runs all threads of a volume on one,
//! in an order of its own ([`pause_instead`]). Without one they are what the standard library has.

#[cfg(not(loom))]
use std::cell::Cell;

#[cfg(loom)]
pub use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU64, Ordering};
/// The atomic word that residency planes are made of.
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(not(loom))]
thread_local! {
    /// What this thread does where it would come to stand.
    static PAUSE: Cell<Option<fn()>> = const { Cell::new(None) };
}

/// From now on, wherever this thread would stand and wait for another one, it calls `pause` and
/// looks again. For a scheduler that runs many flows of control on one thread, where standing
/// would be for ever. `None`: it stands again.
#[cfg(not(loom))]
pub fn pause_instead(pause: Option<fn()>) {
    PAUSE.set(pause);
}

/// Locks, and goes on after a panic elsewhere: what these locks guard is whole between statements.
#[cfg(not(loom))]
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    use std::sync::{PoisonError, TryLockError};
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(e)) => return e.into_inner(),
            Err(TryLockError::WouldBlock) => {}
        }
        match PAUSE.get() {
            Some(pause) => pause(),
            None => return mutex.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// Locks, and goes on after a panic elsewhere: what these locks guard is whole between statements.
#[cfg(loom)]
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits for `changed` with `mutex`, whose guard is given and given back. Returns in vain as well.
#[cfg_attr(loom, allow(unused_variables))]
pub fn wait<'a, T>(
    changed: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
) -> MutexGuard<'a, T> {
    #[cfg(not(loom))]
    if let Some(pause) = PAUSE.get() {
        drop(guard);
        pause();
        return lock(mutex);
    }
    changed
        .wait(guard)
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
