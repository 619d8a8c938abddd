//! [`FaultyStore`]: a store that fails when told to. For tests of everything above a store.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::pool::Pool;
use crate::range::{len_u64, len_usize};
use crate::{Extent, ReadDone, Store, ZeroMode};

/// A kind of call on a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreOp {
    /// [`Store::try_read`]; a fault other than [`Fault::WouldBlock`] is the medium's error.
    TryRead,
    /// [`Store::read`] and [`Store::submit_read`].
    Read,
    /// [`Store::write`].
    Write,
    /// [`Store::write_zeroes`].
    WriteZeroes,
    /// [`Store::sync`].
    Sync,
    /// [`Store::extents`].
    Extents,
}

const OPS: usize = 6;

/// Which calls of a kind a fault strikes. Calls are counted from 1, from the day of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// The one with this number, as [`FaultyStore::calls`] counts.
    Nth(u64),
    /// All from this number on, until [`FaultyStore::heal`].
    From(u64),
    /// All that touch a byte of this range, like a bad sector. Never strikes a sync.
    Touching(Range<u64>),
    /// All.
    Always,
}

/// What happens instead of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this `errno`, and the store below is not called.
    Error(i32),
    /// The first so many bytes of a write (or of zeroes) reach the store below, then it fails with
    /// this `errno`. Of other calls only the failure remains.
    Torn {
        /// Bytes that are still written.
        bytes: u64,
        /// The error then.
        errno: i32,
    },
    /// A `try_read` answers that it would wait. Other calls are not touched.
    WouldBlock,
}

#[derive(Debug)]
struct Rule {
    op: StoreOp,
    when: When,
    fault: Fault,
}

#[derive(Debug, Default)]
struct Plan {
    rules: Vec<Rule>,
    calls: [u64; OPS],
    held: [bool; OPS],
    waiting: [usize; OPS],
}

#[derive(Debug, Default)]
struct Control {
    plan: Mutex<Plan>,
    changed: Condvar,
}

/// A store that passes calls on to another one, except where a fault has been set.
#[derive(Debug)]
pub struct FaultyStore<S> {
    inner: Arc<S>,
    control: Arc<Control>,
}

impl<S: Store> FaultyStore<S> {
    /// Wraps a store; no fault is set.
    pub fn new(inner: S) -> Self {
        Self {
            inner: Arc::new(inner),
            control: Arc::default(),
        }
    }

    /// The store below.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Sets a fault. Of several that strike one call, the one set first counts.
    pub fn fail(&self, op: StoreOp, when: When, fault: Fault) {
        self.control.lock().rules.push(Rule { op, when, fault });
    }

    /// Sets a fault for the next call of a kind.
    pub fn fail_next(&self, op: StoreOp, fault: Fault) {
        let mut plan = self.control.lock();
        let when = When::Nth(plan.calls[index(op)] + 1);
        plan.rules.push(Rule { op, when, fault });
    }

    /// Takes all faults away, and releases all that is held.
    pub fn heal(&self) {
        let mut plan = self.control.lock();
        plan.rules.clear();
        plan.held = [false; OPS];
        drop(plan);
        self.control.changed.notify_all();
    }

    /// Calls of a kind so far, failed ones and those now held included.
    pub fn calls(&self, op: StoreOp) -> u64 {
        self.control.lock().calls[index(op)]
    }

    /// From now on calls of a kind stop before they reach the store below, until
    /// [`FaultyStore::release`]. For tests that need a certain order.
    pub fn hold(&self, op: StoreOp) {
        self.control.lock().held[index(op)] = true;
    }

    /// Lets the calls of a kind go on.
    pub fn release(&self, op: StoreOp) {
        self.control.lock().held[index(op)] = false;
        self.control.changed.notify_all();
    }

    /// Returns once so many calls of a kind are held at the same time.
    pub fn wait_held(&self, op: StoreOp, count: usize) {
        let mut plan = self.control.lock();
        while plan.waiting[index(op)] < count {
            plan = self.control.wait(plan);
        }
    }
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, plan: MutexGuard<'a, Plan>) -> MutexGuard<'a, Plan> {
        self.changed
            .wait(plan)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, waits while its kind is held, and says what is to happen to it.
    fn enter(&self, op: StoreOp, offset: u64, len: u64) -> Option<Fault> {
        let touched = offset..offset.saturating_add(len);
        let mut plan = self.lock();
        plan.calls[index(op)] += 1;
        let number = plan.calls[index(op)];
        if plan.held[index(op)] {
            plan.waiting[index(op)] += 1;
            self.changed.notify_all();
            while plan.held[index(op)] {
                plan = self.wait(plan);
            }
            plan.waiting[index(op)] -= 1;
        }
        let strikes = |rule: &&Rule| {
            rule.op == op
                && match &rule.when {
                    When::Nth(nth) => *nth == number,
                    When::From(first) => number >= *first,
                    When::Touching(bad) => touched.start < bad.end && bad.start < touched.end,
                    When::Always => true,
                }
        };
        plan.rules.iter().find(strikes).map(|rule| rule.fault)
    }

    /// [`Control::enter`] for calls of which nothing can be half done.
    fn pass(&self, op: StoreOp, offset: u64, len: u64) -> io::Result<()> {
        match self.enter(op, offset, len) {
            Some(Fault::Error(errno) | Fault::Torn { errno, .. }) => {
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(Fault::WouldBlock) | None => Ok(()),
        }
    }
}

fn index(op: StoreOp) -> usize {
    match op {
        StoreOp::TryRead => 0,
        StoreOp::Read => 1,
        StoreOp::Write => 2,
        StoreOp::WriteZeroes => 3,
        StoreOp::Sync => 4,
        StoreOp::Extents => 5,
    }
}

impl<S: Store> Store for FaultyStore<S> {
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        match self
            .control
            .enter(StoreOp::TryRead, offset, len_u64(buf.len()))
        {
            Some(Fault::Error(errno) | Fault::Torn { errno, .. }) => {
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(Fault::WouldBlock) => Ok(false),
            None => self.inner.try_read(offset, buf),
        }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.control
            .pass(StoreOp::Read, offset, len_u64(buf.len()))?;
        self.inner.read(offset, buf)
    }

    fn submit_read(&self, offset: u64, len: usize, done: ReadDone) {
        let (inner, control) = (Arc::clone(&self.inner), Arc::clone(&self.control));
        // On the pool, as a held call waits here.
        Pool::shared().submit(Box::new(move || {
            match control.pass(StoreOp::Read, offset, len_u64(len)) {
                Ok(()) => inner.submit_read(offset, len, done),
                Err(error) => done(Err(error)),
            }
        }));
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self
            .control
            .enter(StoreOp::Write, offset, len_u64(data.len()))
        {
            Some(Fault::Error(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Fault::Torn { bytes, errno }) => {
                let kept = len_usize(bytes.min(len_u64(data.len())));
                self.inner.write(offset, &data[..kept])?;
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(Fault::WouldBlock) | None => self.inner.write(offset, data),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> io::Result<()> {
        match self.control.enter(StoreOp::WriteZeroes, offset, len) {
            Some(Fault::Error(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Fault::Torn { bytes, errno }) => {
                self.inner.write_zeroes(offset, bytes.min(len), mode)?;
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(Fault::WouldBlock) | None => self.inner.write_zeroes(offset, len, mode),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.control.pass(StoreOp::Sync, 0, 0)?;
        self.inner.sync()
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> io::Result<Vec<Extent>> {
        self.control.pass(StoreOp::Extents, offset, len)?;
        self.inner.extents(offset, len, max)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
