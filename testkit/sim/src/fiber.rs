//! Flows of control that take turns on one thread.
//!
//! What the daemon runs on threads (a client's request, the thread that commits, the one that
//! receives from the source) runs here on stacks of its own, and goes on only when the world says
//! so. Wherever such a thread might lose the processor for long, or would stand and wait, the
//! fiber pauses: at each operation on a medium, and at contended locks. All of it is ordinary code
//! of the product; nothing in it knows.

use std::cell::{Cell, RefCell};

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use hikkoshi_engine::sync::{Scheduler, schedule_by};

use crate::rng::{Rng, mix};

/// The stack of a fiber. A debug build of the deepest call takes a few tens of KiB.
const STACK_BYTES: usize = 256 << 10;

/// Stacks that are kept for the next fiber of this thread.
const KEPT_STACKS: usize = 64;

/// What a fiber that paused waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing: it may go on at any time.
    Turn,
    /// Something that another fiber or an event does; looking again costs nothing.
    Others,
    /// So many events of others: the processor is busy elsewhere.
    Busy(u64),
    /// A time, in microseconds of the world.
    Until(u64),
}

type Run = Coroutine<(), Wait, ()>;

thread_local! {
    /// The way out of the fiber that runs; null outside of fibers.
    static CURRENT: Cell<*const Yielder<(), Wait>> = const { Cell::new(std::ptr::null()) };
    /// The state of the chance that takes turns away.
    static TURNS: Cell<u64> = const { Cell::new(0) };
    /// How often it does, in this world.
    static LOSES: Cell<u64> = const { Cell::new(0) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Lets others take their turn. Outside of a fiber it returns at once.
pub fn pause(wait: Wait) {
    let current = CURRENT.get();
    if current.is_null() {
        return;
    }
    // SAFETY: it is not null only while the fiber whose yielder it is runs on this thread: the
    // fiber sets it on entry and after each turn, and `Fiber::resume` clears it after each turn.
    // The yielder lives on the fiber's stack until its closure returns.
    let yielder = unsafe { &*current };
    yielder.suspend(wait);
    CURRENT.set(current);
}

/// In one of these many cases out of [`OF`] a fiber loses its turn before it takes a lock; which, is
/// the world's.
const LOSES_TURN: [u64; 4] = [0, 3, 14, 20];
const OF: u64 = 64;

/// The most events for which it does.
const MAX_BUSY: u64 = 250;

fn before_lock() {
    if CURRENT.get().is_null() {
        return;
    }
    // Its own stream of chance: locks are taken where the world's must not be asked.
    let n = TURNS.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
    TURNS.set(n);
    let n = mix(n);
    if n % OF < LOSES.get() {
        // Mostly for a moment, sometimes for long: whole requests of others come in between.
        let long = (n >> 8).is_multiple_of(3);
        pause(if long {
            Wait::Busy((n >> 16) % MAX_BUSY)
        } else {
            Wait::Turn
        });
    }
}

fn instead_of_waiting() {
    pause(Wait::Others);
}

/// From here on this thread runs the fibers of the world of a seed, until [`end`].
pub fn begin(seed: u64) {
    TURNS.set(mix(seed));
    LOSES.set(Rng::new(!seed).pick(&LOSES_TURN));
    schedule_by(Some(Scheduler {
        before_lock,
        instead_of_waiting,
    }));
}

/// The world is over.
pub fn end() {
    schedule_by(None);
}

/// One flow of control.
pub struct Fiber {
    /// What it is, for the trace.
    pub name: &'static str,
    /// What it waits for.
    pub wait: Wait,
    /// The count of events when it last looked in vain.
    pub looked_at: u64,
    run: Option<Run>,
}

impl Fiber {
    /// A fiber that has not begun.
    pub fn new(name: &'static str, body: Box<dyn FnOnce() + Send>) -> Self {
        let stack = STACKS.with_borrow_mut(Vec::pop).unwrap_or_else(|| {
            DefaultStack::new(STACK_BYTES).expect("memory for a stack can be had")
        });
        let run = Coroutine::with_stack(stack, move |yielder: &Yielder<(), Wait>, ()| {
            CURRENT.set(std::ptr::from_ref(yielder));
            body();
        });
        Self {
            name,
            wait: Wait::Turn,
            looked_at: 0,
            run: Some(run),
        }
    }

    /// Gives it a turn. True when it has ended. A panic in it comes out here.
    pub fn resume(&mut self) -> bool {
        let Some(run) = self.run.as_mut() else {
            return true;
        };
        let outcome = run.resume(());
        CURRENT.set(std::ptr::null());
        match outcome {
            CoroutineResult::Yield(wait) => {
                self.wait = wait;
                false
            }
            CoroutineResult::Return(()) => {
                self.keep_stack();
                true
            }
        }
    }

    fn keep_stack(&mut self) {
        if let Some(run) = self.run.take()
            && run.done()
        {
            STACKS.with_borrow_mut(|stacks| {
                if stacks.len() < KEPT_STACKS {
                    stacks.push(run.into_stack());
                }
            });
        }
    }
}

impl Drop for Fiber {
    /// The process is gone: what the fiber held is dropped, and nothing more of it runs.
    fn drop(&mut self) {
        CURRENT.set(std::ptr::null());
        if let Some(run) = self.run.as_mut()
            && run.started()
            && !run.done()
        {
            run.force_unwind();
        }
        self.keep_stack();
    }
}
