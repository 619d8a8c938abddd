//! The synchronisation primitives of this crate: those of the standard library, or, under
//! `--cfg loom`, those of the model checker.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicU64, Ordering};
/// The atomic word that residency planes are made of.
#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicU64, Ordering};

/// Locks, and goes on after a panic elsewhere: what these locks guard is whole between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
