//! What all parts of a world share: chance, time, the trace, what is told to the world.
//!
//! One thread runs a world, so none of the locks here is ever waited for; they are there because
//! the product's traits want to be shared between threads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hikkoshi_daemon::volume::Clock;

use crate::client::Answer;
use crate::fiber::{self, Wait};
use crate::plan::Trouble;
use crate::rng::{Rng, mix};

/// A new flow of control, which the world takes up after the step.
pub type Body = Box<dyn FnOnce() + Send>;

/// What a part of the world tells it; looked at after each step, in order.
pub enum News {
    /// It ends here: the process, or with `power` the machine.
    Crash {
        /// The power is cut.
        power: bool,
    },
    /// The handoff by command was answered.
    HandedOff(bool),
    /// A request of a client was answered.
    Answered(u64, Answer),
    /// A sync of the image failed: from here on no flush of this process may succeed.
    SyncFailed,
}

struct State {
    rng: Rng,
    now_us: u64,
    hash: u64,
    events: u64,
    shown: bool,
    spawned: Vec<(&'static str, Body)>,
    news: Vec<News>,
    trouble: Trouble,
    failure: Option<String>,
}

/// Shared by all parts of a world.
pub struct Sim(Mutex<State>);

impl Sim {
    /// A world's beginnings. `shown`: its trace is printed.
    pub fn new(rng: Rng, trouble: Trouble, shown: bool) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            rng,
            now_us: 0,
            hash: 0,
            events: 0,
            shown,
            spawned: Vec::new(),
            news: Vec::new(),
            trouble,
            failure: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Chance

    /// Asks chance.
    pub fn chance<T>(&self, ask: impl FnOnce(&mut Rng) -> T) -> T {
        ask(&mut self.state().rng)
    }

    /// A number below `n`.
    pub fn below(&self, n: u64) -> u64 {
        self.chance(|rng| rng.below(n))
    }

    /// True in so many of a thousand cases, and then without asking chance if `n` is 0.
    pub fn strikes(&self, amount: impl FnOnce(&Trouble) -> u64) -> bool {
        let mut state = self.state();
        let n = amount(&state.trouble);
        n > 0 && state.rng.permille(n)
    }

    /// What goes wrong now.
    pub fn trouble(&self) -> Trouble {
        self.state().trouble
    }

    /// Changes what goes wrong.
    pub fn set_trouble(&self, trouble: Trouble) {
        self.state().trouble = trouble;
    }

    // Time

    /// Microseconds since the world began.
    pub fn now_us(&self) -> u64 {
        self.state().now_us
    }

    /// Lets time pass.
    pub fn pass(&self, us: u64) {
        self.state().now_us += us;
    }

    /// The clock for a volume.
    pub fn clock(self: &Arc<Self>) -> Clock {
        let this = Arc::clone(self);
        Arc::new(move || Duration::from_micros(this.now_us()))
    }

    /// An operation on a medium takes its time: others get their turn.
    pub fn take_time(&self) {
        let wait = {
            let mut state = self.state();
            let slow_us = state.trouble.slow_us;
            // Most are quick even on a slow medium.
            if slow_us > 0 && state.rng.permille(150) {
                let us = state.rng.below(slow_us);
                Some(Wait::Until(state.now_us + us))
            } else {
                state.rng.permille(600).then_some(Wait::Turn)
            }
        };
        if let Some(wait) = wait {
            fiber::pause(wait);
        }
    }

    /// Here worlds like to end: the process, or the boot.
    pub fn tempt_fate(&self) {
        if self.strikes(|t| t.crash_in_replace) {
            let power = self.below(2) == 0;
            self.tell(News::Crash { power });
            // Not one step further.
            fiber::pause(Wait::Turn);
        }
    }

    // Trace

    /// Adds an event to the trace.
    pub fn note(&self, what: &'static str, a: u64, b: u64) {
        let mut state = self.state();
        state.events += 1;
        for byte in what.bytes() {
            state.hash = (state.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        state.hash = mix(state.hash ^ mix(a) ^ mix(b).rotate_left(17) ^ state.now_us);
        if state.shown {
            let (ms, us) = (state.now_us / 1000, state.now_us % 1000);
            println!("{ms:>7}.{us:03} {what} {a} {b}");
        }
    }

    /// The trace so far as a number, and how many events it has.
    pub fn trace(&self) -> (u64, u64) {
        let state = self.state();
        (state.hash, state.events)
    }

    // What is told

    /// Begins a flow of control.
    pub fn spawn(&self, name: &'static str, body: Body) {
        self.state().spawned.push((name, body));
    }

    /// What was begun since.
    pub fn take_spawned(&self) -> Vec<(&'static str, Body)> {
        std::mem::take(&mut self.state().spawned)
    }

    /// Tells the world.
    pub fn tell(&self, news: News) {
        self.state().news.push(news);
    }

    /// What was told since.
    pub fn take_news(&self) -> Vec<News> {
        std::mem::take(&mut self.state().news)
    }

    /// A promise was broken. The first one counts.
    pub fn fail(&self, why: impl Into<String>) {
        self.state().failure.get_or_insert(why.into());
    }

    /// The promise that was broken, if one was.
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    /// Forgets what a process that is gone has begun and told.
    pub fn forget(&self) {
        let (spawned, news) = {
            let mut state = self.state();
            (
                std::mem::take(&mut state.spawned),
                std::mem::take(&mut state.news),
            )
        };
        // Outside of the lock: what is dropped may come back here.
        drop((spawned, news));
    }
}
