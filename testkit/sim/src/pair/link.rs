//! What is between the two sites: messages about the move that are lost, late and cut off.
//!
//! Nothing is in bytes here: what is said in frames has tests of its own. A message is heard by a
//! flow of control of the source, which goes on when whoever sent it has given up, or has died.
//! Several may be under way over one connection; they are heard in order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hikkoshi_daemon::volume::Volume;
use hikkoshi_daemon::volume::departure::Bound;
use hikkoshi_daemon::volume::relocation::Relocation;
use hikkoshi_engine::sync::lock;
use hikkoshi_wan::transport::session::{Tell, Told};
use hikkoshi_wan::{MoveLink, SourceError, SourceErrorKind, Ticket};

use crate::fiber::{self, Wait};
use crate::sim::Sim;

/// The longest that a message is under way, or a loss unnoticed, in microseconds.
const LATE_US: u64 = 400_000;
/// The same where nothing is wrong.
const PROMPT_US: u64 = 300;
/// How long the first message of a connection may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Never held while the product runs: its locks let others take their turn, and these do not.
pub fn whole<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// There is no connection.
pub fn broken() -> SourceError {
    SourceError::new(SourceErrorKind::Disconnected, "not connected")
}

/// The link between the sites, and who answers at each.
pub struct Net(Mutex<State>);

struct State {
    up: bool,
    /// Connections to a site of an earlier time are gone.
    times: [u64; 2],
    servers: [Option<Arc<Volume>>; 2],
}

impl Net {
    /// A link between two sites at which nobody answers yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            up: true,
            times: [0, 0],
            servers: [None, None],
        })))
    }

    /// Who answers at a site from now on. Connections to it end.
    pub fn serve(&self, site: usize, volume: Option<Arc<Volume>>) {
        let before = {
            let mut state = whole(&self.0);
            state.times[site] += 1;
            std::mem::replace(&mut state.servers[site], volume)
        };
        drop(before);
    }

    /// It carries something, or not. Connections end.
    pub fn set_up(&self, up: bool) {
        let mut state = whole(&self.0);
        state.times = state.times.map(|time| time + 1);
        state.up = up;
    }

    /// Whether it carries something.
    pub fn is_up(&self) -> bool {
        whole(&self.0).up
    }

    /// Whom a connection to a site would reach, and its time.
    fn reach(&self, site: usize) -> Option<(u64, Arc<Volume>)> {
        let state = whole(&self.0);
        let server = state.servers[site].clone().filter(|_| state.up)?;
        Some((state.times[site], server))
    }

    fn is_of(&self, site: usize, time: u64) -> bool {
        self.reach(site).is_some_and(|(now, _)| now == time)
    }
}

/// The destination's end of a connection to the source.
#[derive(Clone)]
pub struct End {
    pub net: Arc<Net>,
    /// The source's site.
    pub to: usize,
    /// The destination's part of the world, and the source's.
    pub here: Arc<Sim>,
    pub there: Arc<Sim>,
    pub ticket: Arc<Ticket>,
}

/// A connection: its time, what the source knows of who reads over it, and what was said over it.
#[derive(Clone)]
pub struct Line {
    pub time: u64,
    pub source: Arc<Volume>,
    bound: Arc<Mutex<Bound>>,
    /// Whether it reads through the volume, and not the old copy below: settled when it attaches.
    pub relocation: Option<Arc<Relocation>>,
    talk: Arc<Mutex<Talk>>,
}

/// What was said over a connection, in order.
#[derive(Default)]
struct Talk {
    said: u64,
    heard: u64,
    /// Something was lost, and with it everything behind it.
    lost: bool,
}

impl Line {
    /// Whether whoever reads over it may go on.
    pub fn still_serves(&self) -> bool {
        // A copy: see `whole`.
        let bound = *whole(&self.bound);
        self.source.still_serves(&bound)
    }

    /// At the source: hears message number `number` when its turn has come.
    fn hear(&self, number: u64, tell: Tell) -> Option<Told> {
        loop {
            let (turn, lost) = {
                let talk = whole(&self.talk);
                (talk.heard == number, talk.lost)
            };
            if lost {
                return None;
            }
            if turn {
                break;
            }
            fiber::pause(Wait::Others);
        }
        let mut bound = *whole(&self.bound);
        let answer = self.source.answer(tell, &mut bound);
        *whole(&self.bound) = bound;
        whole(&self.talk).heard += 1;
        Some(answer)
    }
}

impl End {
    /// Whether a connection stands.
    pub fn stands(&self, line: &Line) -> bool {
        self.net.is_of(self.to, line.time)
    }

    /// Says something over a connection. The answer is in the slot when it has come.
    fn say(&self, line: &Line, tell: Tell) -> (Arc<Mutex<Option<Told>>>, u64) {
        let troubled = self.here.trouble().reset > 0;
        let fate = if troubled { self.here.below(16) } else { 15 };
        // Its first byte says what it is.
        let kind = tell.encode().first().copied().unwrap_or(0);
        self.here.note("tells", fate, kind.into());
        let late = match fate {
            0..=3 => self.here.below(LATE_US),
            _ => self.here.below(PROMPT_US),
        };
        let slot = Arc::new(Mutex::new(None));
        let number = {
            let mut talk = whole(&line.talk);
            talk.said += 1;
            // Not even heard, in the first case.
            talk.lost |= fate == 0;
            talk.said - 1
        };
        if fate > 0 {
            let (line, there) = (line.clone(), Arc::clone(&self.there));
            let told = Arc::clone(&slot);
            let hears = move || {
                fiber::pause(Wait::Until(there.now_us() + late));
                // An answer may be lost as well.
                if let Some(answer) = line.hear(number, tell).filter(|_| fate != 1) {
                    *whole(&told) = Some(answer);
                }
            };
            self.there.spawn("hears", Box::new(hears));
        }
        let limit = match fate {
            // The connection breaks: before, while or after the source hears it.
            0..=2 => self.here.below(LATE_US),
            _ => u64::MAX,
        };
        (slot, limit)
    }

    fn await_answer(
        &self,
        line: &Line,
        (slot, limit): (Arc<Mutex<Option<Told>>>, u64),
        patience: Duration,
        over: &dyn Fn() -> bool,
    ) -> Option<Told> {
        let patience = u64::try_from(patience.as_micros()).unwrap_or(u64::MAX);
        let until = self.here.now_us().saturating_add(patience.min(limit));
        loop {
            if over() || !self.stands(line) || self.here.now_us() >= until {
                return None;
            }
            if let Some(told) = whole(&slot).take() {
                return Some(told);
            }
            fiber::pause(Wait::Others);
        }
    }

    /// Connects, and says for which move.
    pub fn dial(&self, over: &dyn Fn() -> bool) -> Result<Line, SourceError> {
        let (time, source) = self.net.reach(self.to).ok_or_else(broken)?;
        let mut line = Line {
            time,
            source,
            bound: Arc::default(),
            relocation: None,
            talk: Arc::default(),
        };
        if !self.ticket.is_silent() {
            let said = self.say(&line, self.ticket.tell());
            match self.await_answer(&line, said, PATIENCE, over) {
                Some(Told::Attached(attached)) => self.ticket.was_told(attached),
                Some(Told::Refused(why)) => {
                    return Err(SourceError::new(SourceErrorKind::Untrusted, why));
                }
                _ => return Err(broken()),
            }
        }
        let bound = *whole(&line.bound);
        if !line.source.reads_old_copy(&bound) {
            line.relocation = line.source.relocation();
        }
        Ok(line)
    }
}

/// Where a destination talks to its source about the move.
pub struct SimLink {
    end: End,
    /// Held while something is said, and not while its answer is awaited.
    turn: Mutex<()>,
    state: Mutex<LinkState>,
}

#[derive(Default)]
struct LinkState {
    line: Option<Line>,
    interrupts: u64,
    closed: bool,
}

impl SimLink {
    /// Over this end.
    pub fn new(end: End) -> Arc<Self> {
        Arc::new(Self {
            end,
            turn: Mutex::new(()),
            state: Mutex::default(),
        })
    }

    fn line(&self, over: &dyn Fn() -> bool) -> Result<Line, SourceError> {
        let known = whole(&self.state).line.clone();
        if let Some(line) = known.filter(|line| self.end.stands(line)) {
            return Ok(line);
        }
        let line = self.end.dial(over)?;
        whole(&self.state).line = Some(line.clone());
        Ok(line)
    }

    fn forget(&self, line: &Line) {
        let known = {
            let mut state = whole(&self.state);
            let same = |known: &mut Line| Arc::ptr_eq(&known.talk, &line.talk);
            state.line.take_if(same)
        };
        drop(known);
    }
}

impl MoveLink for SimLink {
    fn tell(&self, tell: &Tell, patience: Duration) -> Result<Told, SourceError> {
        let turn = lock(&self.turn);
        let interrupts = whole(&self.state).interrupts;
        let over = || {
            let state = whole(&self.state);
            state.closed || state.interrupts != interrupts
        };
        if over() {
            return Err(broken());
        }
        let line = self.line(&over)?;
        let said = self.end.say(&line, *tell);
        drop(turn);
        match self.end.await_answer(&line, said, patience, &over) {
            Some(Told::Refused(why)) => {
                if matches!(tell, Tell::Attach { .. }) {
                    self.forget(&line);
                }
                Err(SourceError::new(SourceErrorKind::Refused, why))
            }
            Some(told) => Ok(told),
            None => {
                self.forget(&line);
                Err(broken())
            }
        }
    }

    fn interrupt(&self) {
        let line = {
            let mut state = whole(&self.state);
            state.interrupts += 1;
            state.line.take()
        };
        drop(line);
    }

    fn hang_up(&self) {
        whole(&self.state).closed = true;
    }
}
