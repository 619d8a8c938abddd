//! Threads for reads that would wait: one pool for the whole process, grown when needed, shrunk
//! when idle. Called by the stores' `submit_read`. Always there; nothing can switch it off.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

/// Threads at most. A thread waits for one read of the disk, so this is the queue depth that the
/// disk sees; beyond about this many an NVMe device gains little and a spinning one loses.
pub(crate) const MAX_THREADS: usize = 32;

/// Jobs that may wait for a thread. The callers bound what they have in flight far below it; one
/// that does not is made to wait, so it must hold no lock that a job takes.
const MAX_QUEUED: usize = 16 * 1024;

/// After this long without work a thread ends.
const IDLE_EXIT: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    work: Condvar,
    room: Condvar,
}

impl Pool {
    /// The pool of this process.
    pub(crate) fn shared() -> &'static Pool {
        static POOL: OnceLock<Pool> = OnceLock::new();
        POOL.get_or_init(Pool::default)
    }

    /// Runs `job` on a thread of the pool. Returns at once unless [`MAX_QUEUED`] jobs wait.
    pub(crate) fn submit(&'static self, job: Job) {
        let mut state = self.lock();
        while state.queue.len() >= MAX_QUEUED {
            state = self
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.queue.push_back(job);
        if state.idle >= state.queue.len() || state.threads >= MAX_THREADS {
            drop(state);
            self.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        if let Err(error) = self.spawn() {
            self.do_without(&error);
        }
    }

    fn spawn(&'static self) -> io::Result<()> {
        thread::Builder::new()
            .name("store-read".to_owned())
            .spawn(move || self.serve())
            .map(drop)
    }

    /// The system gives no more threads. Those that are there do the work; if there is none, the
    /// caller has to, as nobody else would ever answer.
    fn do_without(&self, error: &io::Error) {
        let mut state = self.lock();
        state.threads -= 1;
        if state.threads > 0 {
            drop(state);
            self.work.notify_one();
            return;
        }
        tracing::warn!(%error, "no thread can be started for reads; reading in place");
        let jobs = std::mem::take(&mut state.queue);
        drop(state);
        self.room.notify_all();
        jobs.into_iter().for_each(run);
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                let was_full = state.queue.len() + 1 == MAX_QUEUED;
                drop(state);
                if was_full {
                    self.room.notify_all();
                }
                run(job);
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (woken, timeout) = self
                .work
                .wait_timeout(state, IDLE_EXIT)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if timeout.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No job runs while it is held, so the counts are whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs a job; a panic in it (a caller's callback) must not take the thread from everyone else.
pub(crate) fn run(job: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        tracing::error!("a callback of a read panicked; this is a bug in hikkoshi");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::HashSet;
    use std::sync::mpsc;
    use std::thread;

    use super::{MAX_THREADS, Pool};

    /// A pool of its own, so that a test sees no other's threads.
    fn pool() -> &'static Pool {
        Box::leak(Box::default())
    }

    #[test]
    fn jobs_that_wait_run_side_by_side_up_to_the_bound() {
        let pool = pool();
        let (arrived_tx, arrived_rx) = mpsc::channel();
        let mut gates = Vec::new();
        for _ in 0..2 * MAX_THREADS {
            let (open, gate) = mpsc::channel::<()>();
            gates.push(open);
            let arrived = arrived_tx.clone();
            pool.submit(Box::new(move || {
                arrived.send(thread::current().id()).unwrap();
                let _ = gate.recv();
            }));
        }
        let first: HashSet<_> = (0..MAX_THREADS)
            .map(|_| arrived_rx.recv().unwrap())
            .collect();
        assert_eq!(first.len(), MAX_THREADS);
        assert_eq!(pool.lock().threads, MAX_THREADS);
        drop(gates);
        assert_eq!(arrived_rx.iter().take(MAX_THREADS).count(), MAX_THREADS);
    }

    #[test]
    fn a_panicking_job_takes_nothing_with_it() {
        let pool = pool();
        let (tx, rx) = mpsc::channel();
        pool.submit(Box::new(|| panic!("on purpose")));
        pool.submit(Box::new(move || tx.send(7).unwrap()));
        assert_eq!(rx.recv().unwrap(), 7);
    }
}
