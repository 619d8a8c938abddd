//! In which order a sender serves what was asked of it.
//!
//! Owns the requests of one connection that are not answered yet, cut into quanta. Whoever has
//! room for another quantum asks for the most urgent one, so what has just arrived waits behind
//! one quantum at most, however much bulk was asked for before. No I/O, no clock, no data.
//!
//! Within a level the oldest request is served first, so that the first of many chunks of bulk is
//! there early; demand takes turns, so that a small read does not wait for all of a large one.

use std::collections::{HashMap, VecDeque};

use super::frame::Priority;
use super::limits;
use super::message::{Request, Wish};

/// What a step brings about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Something of the disk.
    Wish(Wish),
    /// Making what was written durable.
    Flush,
    /// Nothing but the end of the answer.
    End,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The request's number.
    pub id: u64,
    /// How urgent it is now.
    pub priority: Priority,
    /// What.
    pub work: Work,
    /// From where, in bytes.
    pub offset: u64,
    /// How much; at most a quantum, but for extents.
    pub len: u32,
    /// With this the request is answered.
    pub last: bool,
}

/// What a client does that no client of ours does. The connection is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misuse {
    /// A number that is not above all earlier ones: a request came twice, or out of order.
    #[error("request {0} came twice or out of order")]
    Number(u64),
    /// A range beyond the end of the disk.
    #[error("request {0} reaches past the end of the disk")]
    Range(u64),
    /// More than [`limits::REQUESTS`] at once.
    #[error("more than {} requests at once", limits::REQUESTS)]
    TooMany,
    /// Cancels or promotes what was never asked.
    #[error("request {0} was never made")]
    Unknown(u64),
}

#[derive(Clone, Copy, Debug)]
struct Job {
    priority: Priority,
    work: Work,
    at: u64,
    end: u64,
    parked: bool,
}

/// The requests of one connection.
#[derive(Debug)]
pub struct Scheduler {
    disk_bytes: u64,
    last_id: Option<u64>,
    jobs: HashMap<u64, Job>,
    /// Those that can go on now, by level.
    ready: [VecDeque<u64>; Priority::LEVELS],
}

impl Scheduler {
    /// For a disk of this size.
    pub fn new(disk_bytes: u64) -> Self {
        Self {
            disk_bytes,
            last_id: None,
            jobs: HashMap::new(),
            ready: Default::default(),
        }
    }

    /// Whether no request may be taken before one is answered.
    pub fn is_full(&self) -> bool {
        self.jobs.len() >= limits::REQUESTS
    }

    /// Requests that are not answered.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Whether everything is answered.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Takes a request.
    ///
    /// # Errors
    /// See [`Misuse`].
    pub fn submit(&mut self, request: Request) -> Result<(), Misuse> {
        match request {
            Request::Wish {
                id,
                priority,
                wish,
                offset,
                len,
            } => {
                let end = offset
                    .checked_add(u64::from(len))
                    .filter(|end| *end <= self.disk_bytes)
                    .ok_or(Misuse::Range(id))?;
                self.add(id, priority, Work::Wish(wish), offset, end)
            }
            Request::Ping(id, priority) => self.add(id, priority, Work::End, 0, 0),
            Request::Flush(id, priority) => self.add(id, priority, Work::Flush, 0, 0),
            Request::Cancel(id) => {
                self.check_known(id)?;
                if let Some(job) = self.jobs.get_mut(&id) {
                    job.work = Work::End;
                    job.at = job.end;
                    self.resume(id);
                    // It costs nothing, and may be waited for: what was to come with it may be asked for elsewhere.
                    self.promote(id, Priority::DEMAND);
                }
                Ok(())
            }
            Request::Promote(id, priority) => {
                self.check_known(id)?;
                self.promote(id, priority);
                Ok(())
            }
        }
    }

    fn add(
        &mut self,
        id: u64,
        priority: Priority,
        work: Work,
        at: u64,
        end: u64,
    ) -> Result<(), Misuse> {
        if self.last_id.is_some_and(|last| id <= last) {
            return Err(Misuse::Number(id));
        }
        if self.is_full() {
            return Err(Misuse::TooMany);
        }
        self.last_id = Some(id);
        let job = Job {
            priority,
            work,
            at,
            end,
            parked: false,
        };
        self.jobs.insert(id, job);
        self.ready[priority.level()].push_back(id);
        Ok(())
    }

    /// What was answered a moment ago may still be cancelled or promoted: the two cross.
    fn check_known(&self, id: u64) -> Result<(), Misuse> {
        match self.last_id {
            Some(last) if id <= last => Ok(()),
            _ => Err(Misuse::Unknown(id)),
        }
    }

    /// Only ever upwards: what a guest waits for stays urgent.
    fn promote(&mut self, id: u64, priority: Priority) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        let before = job.priority;
        if priority >= before {
            return;
        }
        job.priority = priority;
        if !job.parked {
            self.ready[before.level()].retain(|other| *other != id);
            self.ready[priority.level()].push_back(id);
        }
    }

    /// The most urgent step, without taking it.
    pub fn peek(&self) -> Option<Step> {
        let id = *self.ready.iter().find_map(VecDeque::front)?;
        self.step_of(id)
    }

    fn step_of(&self, id: u64) -> Option<Step> {
        let job = self.jobs.get(&id)?;
        let left = u32::try_from(job.end - job.at).unwrap_or(u32::MAX);
        let len = match job.work {
            Work::Wish(Wish::Read { .. }) if !job.priority.is_waited_for() => {
                left.min(limits::BULK_BYTES)
            }
            Work::Wish(Wish::Read { .. } | Wish::Hash { .. }) => left.min(limits::QUANTUM_BYTES),
            Work::Wish(Wish::Extents) | Work::Flush | Work::End => left,
        };
        Some(Step {
            id,
            priority: job.priority,
            work: job.work,
            offset: job.at,
            len,
            last: len == left,
        })
    }

    /// A step of [`Scheduler::peek`] is done: the request goes on behind it, or is answered.
    pub fn done(&mut self, step: &Step) {
        if step.last {
            return self.forget(step.id);
        }
        if let Some(job) = self.jobs.get_mut(&step.id) {
            job.at += u64::from(step.len);
            if job.priority == Priority::DEMAND {
                let turn = &mut self.ready[job.priority.level()];
                turn.retain(|other| *other != step.id);
                turn.push_back(step.id);
            }
        }
    }

    /// A request is answered, or failed, as a whole.
    pub fn forget(&mut self, id: u64) {
        if let Some(job) = self.jobs.remove(&id) {
            self.ready[job.priority.level()].retain(|other| *other != id);
        }
    }

    /// What the next step of a request needs is being fetched: the others go on without it.
    pub fn park(&mut self, id: u64) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.parked = true;
            self.ready[job.priority.level()].retain(|other| *other != id);
        }
    }

    /// It has come. `false` if nobody wants it any more.
    pub fn resume(&mut self, id: u64) -> bool {
        let Some(job) = self.jobs.get_mut(&id) else {
            return false;
        };
        if std::mem::take(&mut job.parked) {
            // In front: it has waited once already.
            self.ready[job.priority.level()].push_front(id);
        }
        !matches!(job.work, Work::End)
    }

    /// How much of a request is left from its next step on, in bytes.
    pub fn left(&self, id: u64) -> u64 {
        self.jobs.get(&id).map_or(0, |job| job.end - job.at)
    }
}

#[cfg(test)]
mod tests;
