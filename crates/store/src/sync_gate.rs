//! One `fdatasync` at a time, shared by all who wait for it, and never believed again after it
//! has failed. Called by the file store.
//!
//! The kernel reports a failed write-back once per open file: of two callers that sync at the same
//! moment one gets the error and the other gets `Ok` for data that is lost. So only one call is
//! ever under way, everyone who waits for it gets its result, and a failure stays.
//!
//! Whoever only has the kernel begin to write can be the only one to be told that what was written is lost: ext4 that
//! finds no place for it lets go of it and tells its caller, and a sync behind that finds nothing to
//! do. So that goes through the gate as well, never beside a sync, and its failure is one of the syncs.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Rounds {
    begun: u64,
    ended: u64,
    running: bool,
    /// Somebody has the kernel begin to write.
    beginning: bool,
    /// Somebody else who wants to has waited for a round, and goes before the next one.
    begins_next: bool,
    /// Somebody who syncs has waited for a beginning, and goes before the next one. Never at the same time: this
    /// is set in a beginning and ends with the start of a round, the other the other way round.
    sync_next: bool,
    failed: Option<i32>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct SyncGate {
    rounds: Mutex<Rounds>,
    changed: Condvar,
}

impl Rounds {
    fn fail(&mut self, error: &io::Error) {
        let errno = error.raw_os_error();
        self.failed = Some(errno.unwrap_or(rustix::io::Errno::IO.raw_os_error()));
    }
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
            if !rounds.running && !rounds.beginning && !rounds.begins_next {
                break;
            }
            rounds.sync_next |= rounds.beginning;
            rounds = self.wait(rounds);
        }
        rounds.running = true;
        rounds.sync_next = false;
        rounds.begun += 1;
        drop(rounds);

        let result = sync();

        let mut rounds = self.lock();
        rounds.running = false;
        if let Err(error) = &result {
            rounds.fail(error);
        }
        // Also where somebody else was told of a failure meanwhile.
        let failed = rounds.failed;
        if failed.is_none() {
            rounds.ended = rounds.begun;
        }
        drop(rounds);
        self.changed.notify_all();
        result.and(failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))))
    }

    /// Has the kernel begin to write, beside no sync. Between two rounds it has its turn; it must not take long,
    /// as a sync waits for it.
    ///
    /// # Errors
    /// The error of `begin`, and from then on, for syncs too, the same for ever.
    pub(crate) fn begin(&self, begin: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut rounds = self.lock();
        let must_wait = |rounds: &Rounds| rounds.running || rounds.beginning || rounds.sync_next;
        while rounds.failed.is_none() && must_wait(&rounds) {
            rounds.begins_next |= rounds.running;
            rounds = self.wait(rounds);
        }
        rounds.begins_next = false;
        if let Some(errno) = rounds.failed {
            drop(rounds);
            self.changed.notify_all();
            return Err(io::Error::from_raw_os_error(errno));
        }
        rounds.beginning = true;
        drop(rounds);

        let result = begin();

        let mut rounds = self.lock();
        rounds.beginning = false;
        if let Err(error) = &result {
            rounds.fail(error);
        }
        drop(rounds);
        self.changed.notify_all();
        result
    }

    /// Something that was written is lost, as somebody was told: no sync is believed any more.
    pub(crate) fn fail(&self, error: &io::Error) {
        self.lock().fail(error);
        self.changed.notify_all();
    }

    fn wait<'a>(&self, rounds: MutexGuard<'a, Rounds>) -> MutexGuard<'a, Rounds> {
        self.changed
            .wait(rounds)
            .unwrap_or_else(PoisonError::into_inner)
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
    fn what_failed_to_begin_fails_every_sync_from_then_on() {
        let gate = SyncGate::default();
        gate.begin(|| Ok(())).unwrap();
        gate.run(|| Ok(())).unwrap();
        let failed = gate.begin(|| Err(io::Error::from_raw_os_error(28)));
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(28));
        let later = gate.run(|| panic!("must not be asked again")).unwrap_err();
        assert_eq!(later.raw_os_error(), Some(28));
        let later = gate.begin(|| panic!("nor this")).unwrap_err();
        assert_eq!(later.raw_os_error(), Some(28));
    }

    /// A sync that has nothing left to do says so, while somebody else is about to say what was lost.
    #[test]
    fn a_sync_waits_for_what_is_begun_and_shares_its_failure() {
        let gate = SyncGate::default();
        let (entered_tx, entered_rx) = mpsc::channel();
        let (go_tx, go_rx) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let gate = &gate;
            let beginning = scope.spawn(move || {
                gate.begin(|| {
                    entered_tx.send(()).unwrap();
                    go_rx.recv().unwrap();
                    Err(io::Error::from_raw_os_error(5))
                })
            });
            entered_rx.recv().unwrap();
            let sync = scope.spawn(|| gate.run(|| Ok(())));
            go_tx.send(()).unwrap();
            assert!(beginning.join().unwrap().is_err());
            assert_eq!(sync.join().unwrap().unwrap_err().raw_os_error(), Some(5));
        });
    }

    #[test]
    fn a_failure_that_another_is_told_of_during_a_sync_is_its_own() {
        let gate = SyncGate::default();
        let told = io::Error::from_raw_os_error(5);
        let failed = gate.run(|| {
            gate.fail(&told);
            Ok(())
        });
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(5));
        assert!(gate.run(|| Ok(())).is_err());
    }

    /// Neither those that sync without end nor one that begins without end keeps the other from it.
    #[test]
    fn syncs_and_beginnings_take_turns() {
        let gate = SyncGate::default();
        let (busy, done, over) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
        let alone = || {
            assert_eq!(busy.fetch_add(1, Ordering::SeqCst), 0, "beside another");
            std::thread::yield_now();
            busy.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        gate.run(alone).unwrap();
                    }
                    // Goes on until the beginnings are over.
                    while done.load(Ordering::SeqCst) == 0 {
                        gate.run(alone).unwrap();
                    }
                    for _ in 0..200 {
                        gate.run(alone).unwrap();
                    }
                    over.fetch_add(1, Ordering::SeqCst);
                });
            }
            scope.spawn(|| {
                for _ in 0..200 {
                    gate.begin(alone).unwrap();
                }
                done.store(1, Ordering::SeqCst);
                // And on, until the syncs are over.
                while over.load(Ordering::SeqCst) < 3 {
                    gate.begin(alone).unwrap();
                }
            });
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
