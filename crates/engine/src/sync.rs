//! The synchronisation primitives of this crate: those of the standard library, or, under
//! `--cfg loom`, those of the model checker.
//!
//! [`lock`] and [`wait`] are the two places where a thread of a volume can come to stand for
//! another one, so they are where a scheduler takes part that runs all threads of a volume on one,
//! in an order of its own ([`schedule_by`]). Without one they are what the standard library has.

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
    /// Who decides when this thread goes on, if it is not the system.
    static SCHEDULER: Cell<Option<Scheduler>> = const { Cell::new(None) };
}

/// What a thread calls that runs many flows of control, and would stand for ever if one of them
/// waited for another.
#[cfg(not(loom))]
#[derive(Clone, Copy, Debug)]
pub struct Scheduler {
    /// Called before each lock is taken: a thread may always lose the processor there.
    pub before_lock: fn(),
    /// Called where the thread would stand and wait; it looks again afterwards.
    pub instead_of_waiting: fn(),
}

/// From now on this thread calls `scheduler`; with `None` it stands and waits again.
#[cfg(not(loom))]
pub fn schedule_by(scheduler: Option<Scheduler>) {
    SCHEDULER.set(scheduler);
}

/// Locks, and goes on after a panic elsewhere: what these locks guard is whole between statements.
#[cfg(not(loom))]
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    use std::sync::{PoisonError, TryLockError};
    let scheduler = SCHEDULER.get();
    if let Some(scheduler) = scheduler {
        (scheduler.before_lock)();
    }
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(e)) => return e.into_inner(),
            Err(TryLockError::WouldBlock) => {}
        }
        match scheduler {
            Some(scheduler) => (scheduler.instead_of_waiting)(),
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

/// Lets some time pass, to look again at what nobody tells of. A scheduler has its own time, and may
/// return sooner.
#[cfg(not(loom))]
pub fn pause_for(most: std::time::Duration) {
    match SCHEDULER.get() {
        Some(scheduler) => (scheduler.instead_of_waiting)(),
        None => std::thread::sleep(most),
    }
}

/// Waits for `changed` with `mutex`, whose guard is given and given back. Returns in vain as well.
#[cfg_attr(loom, allow(unused_variables))]
pub fn wait<'a, T>(
    changed: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
) -> MutexGuard<'a, T> {
    #[cfg(not(loom))]
    if let Some(scheduler) = SCHEDULER.get() {
        drop(guard);
        (scheduler.instead_of_waiting)();
        return lock(mutex);
    }
    changed
        .wait(guard)
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The same, for at most `most`. A scheduler has its own time, and may return sooner.
#[cfg_attr(loom, allow(unused_variables))]
pub fn wait_for<'a, T>(
    changed: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    most: std::time::Duration,
) -> MutexGuard<'a, T> {
    #[cfg(not(loom))]
    if SCHEDULER.get().is_some() {
        return wait(changed, mutex, guard);
    }
    changed
        .wait_timeout(guard, most)
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .0
}
