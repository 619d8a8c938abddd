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
    /// A time, in microseconds of the world.
    Until(u64),
}

type Run = Coroutine<(), Wait, ()>;

thread_local! {
    /// The way out of the fiber that runs; null outside of fibers.
    static CURRENT: Cell<*const Yielder<(), Wait>> = const { Cell::new(std::ptr::null()) };
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

/// What a fiber does where a thread would stand and wait for another one.
pub fn pause_for_others() {
    pause(Wait::Others);
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
