//! One `fdatasync` at a time, shared by all who wait for it, and never believed again after it
//! has failed. Called by the file store.
//!
//! The kernel reports a failed write-back once per open file: of two callers that sync at the same
//! moment one gets the error and the other gets `Ok` for data that is lost. So only one call is
//! ever under way, everyone who waits for it gets its result, and a failure stays.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Rounds {
    begun: u64,
    ended: u64,
    running: bool,
    failed: Option<i32>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct SyncGate {
    rounds: Mutex<Rounds>,
    round_ended: Condvar,
}

impl SyncGate {
    /// Returns once a call of `sync` that began after this call has returned; it may have been
    /// another caller's.
    ///
    /// # Errors
    /// The error of `sync`, and from then on the same error for ever.
    pub(crate) fn run(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut rounds = self.lock();
        // A round that runs already may have begun before our caller's write, so it does not do.
        let wanted = rounds.begun + 1;
        loop {
            if let Some(errno) = rounds.failed {
                return Err(io::Error::from_raw_os_error(errno));
            }
            if rounds.ended >= wanted {
                return Ok(());
            }
            if !rounds.running {
                break;
            }
            rounds = self
                .round_ended
                .wait(rounds)
                .unwrap_or_else(PoisonError::into_inner);
        }
        rounds.running = true;
        rounds.begun += 1;
        drop(rounds);

        let result = sync();

        let mut rounds = self.lock();
        rounds.running = false;
        match &result {
            Ok(()) => rounds.ended = rounds.begun,
            Err(error) => {
                let errno = error.raw_os_error();
                rounds.failed = Some(errno.unwrap_or(rustix::io::Errno::IO.raw_os_error()));
            }
        }
        drop(rounds);
        self.round_ended.notify_all();
        result
    }

    fn lock(&self) -> MutexGuard<'_, Rounds> {
        // Nothing panics while it is held; the state is whole at every step.
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    use super::SyncGate;

    #[test]
    fn a_failure_stays() {
        let gate = SyncGate::default();
        gate.run(|| Ok(())).unwrap();
        let first = gate
            .run(|| Err(io::Error::from_raw_os_error(28)))
            .unwrap_err();
        assert_eq!(first.raw_os_error(), Some(28));
        let later = gate.run(|| panic!("must not be asked again")).unwrap_err();
        assert_eq!(later.raw_os_error(), Some(28));
    }

    #[test]
    fn those_who_wait_get_the_failure_of_the_round_under_way() {
        let gate = SyncGate::default();
        let (entered_tx, entered_rx) = mpsc::channel();
        let (go_tx, go_rx) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let gate = &gate;
            let first = scope.spawn(move || {
                gate.run(|| {
                    entered_tx.send(()).unwrap();
                    go_rx.recv().unwrap();
                    Err(io::Error::from_raw_os_error(5))
                })
            });
            entered_rx.recv().unwrap();
            let second = scope.spawn(|| gate.run(|| Ok(())));
            go_tx.send(()).unwrap();
            assert!(first.join().unwrap().is_err());
            assert_eq!(second.join().unwrap().unwrap_err().raw_os_error(), Some(5));
        });
    }

    #[test]
    fn a_caller_never_shares_a_round_that_began_before_it() {
        let gate = SyncGate::default();
        let calls = AtomicU32::new(0);
        let (entered_tx, entered_rx) = mpsc::channel();
        let (go_tx, go_rx) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let gate = &gate;
            let calls = &calls;
            let first = scope.spawn(move || {
                gate.run(|| {
                    entered_tx.send(()).unwrap();
                    go_rx.recv().unwrap();
                    calls.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
            });
            entered_rx.recv().unwrap();
            let second = scope.spawn(|| {
                gate.run(|| {
                    calls.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                })
            });
            // The second must not return before the first round ends, whatever the scheduling.
            go_tx.send(()).unwrap();
            first.join().unwrap().unwrap();
            second.join().unwrap().unwrap();
        });
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }
}
