//! Replies under way on one connection, whatever its dialect.
//!
//! Owns which jobs something has come for, and that each of them is either answered or given back
//! when the connection ends. A dialect's reader owns what a reply is made of.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::job::Job;
use super::line::Line;
use super::receive::{ReadError, Receiver};
use crate::source::{Lane, SourceError, SourceErrorKind};

/// A reply of which something has come.
pub(super) trait Begun {
    /// Nothing of it was looked at yet.
    fn begin(job: Job, line: &Line) -> Self;
    /// What it was for, with what has come of it as far as that is proven; it will not end.
    fn give_up(self) -> Job;
}

/// The other connections of the same source.
pub(super) trait Others {
    /// While this is held, nothing becomes urgent and nothing is cancelled: what goes from one connection to another would be
    /// found on neither.
    fn moving(&self) -> MutexGuard<'_, ()>;
    /// This was taken back from here, for one of them.
    fn take(&self, job: Job);
}

/// There are none.
#[derive(Default)]
pub(super) struct Alone(Mutex<()>);

impl Others for Alone {
    fn moving(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, job: Job) {
        let message = format!("{}: taken back", job.what());
        job.fail(SourceError::new(SourceErrorKind::Cancelled, message));
    }
}

/// The replies under way, and where they come from.
pub(super) struct Replies<'a, B> {
    pub(super) line: &'a Line,
    pub(super) others: &'a dyn Others,
    pub(super) receiver: Receiver<'a>,
    begun: HashMap<u64, B>,
    /// The job whose answer broke the protocol.
    broken: Option<Job>,
    answered: u64,
}

/// How the reading of a connection ended.
pub(super) struct Ended {
    pub(super) why: ReadError,
    /// How many replies were complete.
    pub(super) answered: u64,
    /// The jobs whose replies have begun and will not end.
    pub(super) unfinished: Vec<Job>,
}

impl<'a, B: Begun> Replies<'a, B> {
    pub(super) fn new(
        line: &'a Line,
        others: &'a dyn Others,
        progress_timeout: Option<Duration>,
        buffer_bytes: usize,
    ) -> io::Result<Self> {
        Ok(Self {
            line,
            others,
            receiver: Receiver::new(line, progress_timeout, buffer_bytes)?,
            begun: HashMap::new(),
            broken: None,
            answered: 0,
        })
    }

    /// Receives with `step` until the connection ends.
    pub(super) fn run(mut self, mut step: impl FnMut(&mut Self) -> Result<(), ReadError>) -> Ended {
        loop {
            if let Err(error) = step(&mut self) {
                return self.end(error);
            }
        }
    }

    /// The connection has ended.
    pub(super) fn end(self, why: ReadError) -> Ended {
        // In the order in which they were asked for, so that a simulated world is its seed.
        let mut begun: Vec<(u64, B)> = self.begun.into_iter().collect();
        begun.sort_unstable_by_key(|(id, _)| *id);
        let begun = begun.into_iter().map(|(_, begun)| begun.give_up());
        let mut unfinished: Vec<Job> = self.broken.into_iter().chain(begun).collect();
        if why.kind() != SourceErrorKind::Disconnected {
            // Where one thing was damaged, nobody knows what else was.
            unfinished.iter_mut().for_each(Job::forget_what_has_come);
        }
        Ended {
            why,
            answered: self.answered,
            unfinished,
        }
    }

    /// The reply with this number, and where the rest of it comes from.
    pub(super) fn of(&mut self, id: u64) -> Result<(&mut B, &mut Receiver<'a>), ReadError> {
        if !self.begun.contains_key(&id) {
            let Some(job) = self.line.claim(id) else {
                return Err(ReadError::Answer("the server answered what nobody asked"));
            };
            self.begun.insert(id, B::begin(job, self.line));
        }
        let begun = self.begun.get_mut(&id).expect("just put there");
        Ok((begun, &mut self.receiver))
    }

    /// A reply that is complete, to be finished.
    pub(super) fn take(&mut self, id: u64) -> Result<B, ReadError> {
        let begun = self.begun.remove(&id);
        begun.ok_or(ReadError::Answer("a reply ended that never began"))
    }

    /// A job has its answer: its place goes to the next one.
    pub(super) fn answered(&mut self, id: u64, job: &Job) {
        self.line.answered(id, job);
        self.answered += 1;
    }

    /// A job that has ended without all of its bytes goes over another connection, if it was taken back for that; else it
    /// is given back.
    pub(super) fn pass_on(&mut self, id: u64, mut job: Job) -> Option<Job> {
        let _moving = self.others.moving();
        let Some(waited_for) = self.line.is_relieved_of(id) else {
            return Some(job);
        };
        self.answered(id, &job);
        if waited_for {
            job.lane = Lane::Demand;
        }
        self.others.take(job);
        None
    }

    /// The answer to a job broke the protocol: it fails with the others when the connection ends.
    pub(super) fn broke(&mut self, job: Job, why: impl Into<ReadError>) -> Result<(), ReadError> {
        self.broken = Some(job);
        Err(why.into())
    }
}
