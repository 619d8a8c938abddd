//! What is asked for, how much of it at once, for how long; and what came of it.
//!
//! Owns the loop that keeps requests in flight. Called by the workloads in `local`. One thread
//! drives all connections: a blocking receive with one of them, epoll with several.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hikkoshi_nbd::wire::command;
use rustix::event::epoll;
use serde::Serialize;

use super::connection::{Connection, Endpoint};
use super::content::{BLOCK_BYTES, Content, Random};
use crate::cpu;
use crate::server::Server;

/// One request in so many has its data checked.
const SAMPLE_EVERY: u64 = 64;
/// Written blocks that are read again and checked after a run.
const MAX_CHECKED_WRITES: usize = 64;
/// The part of a run, from its start, that is not counted: one in so many.
const WARM_UP_PART: u32 = 10;

/// Numbers every write of this process, so that a block tells which one it came from.
static WRITES: AtomicU64 = AtomicU64::new(1);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Write, wait for the answer, flush, wait for the answer: one operation.
    WriteFlush,
}

/// Where to do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Anywhere, evenly spread.
    Random,
    /// One after the other, from the start again at the end.
    Sequential,
    /// Anywhere, but no place twice in a run.
    Fresh,
}

/// A workload.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Load {
    /// What.
    pub operation: Operation,
    /// Where.
    pub pattern: Pattern,
    /// Bytes of a request, whole blocks of 4 KiB.
    pub length: u32,
    /// Requests in flight on each connection.
    pub depth: usize,
    /// Connections.
    pub connections: usize,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    /// Operations answered.
    pub operations: u64,
    /// Bytes read or written by them.
    pub bytes: u64,
    /// Time they took.
    pub seconds: f64,
    /// CPU time of the server's processes meanwhile.
    pub server_cpu_s: f64,
    /// CPU time of the client's thread meanwhile.
    pub client_cpu_s: f64,
    /// Part of all cores that neither the server nor the client used but somebody did; `None`
    /// where more programs than these two belong to the measurement.
    pub others: Option<f64>,
}

/// How a run is done, whatever the load.
pub struct Terms<'a> {
    /// What the disk holds.
    pub content: &'a Content,
    /// How long.
    pub duration: Duration,
    /// Ask for structured replies.
    pub structured: bool,
    /// Chooses the places; the same for every server of a round.
    pub seed: u64,
}

/// Puts `load` on `server`, and checks a sample of what it answers.
pub fn run(server: &Server, load: &Load, terms: &Terms<'_>) -> Result<Sample> {
    let mut driver = Driver::open(&server.endpoint, load, terms)?;
    let start = Instant::now();
    let warm = start + terms.duration / WARM_UP_PART;
    let end = start + terms.duration;
    driver.start()?;
    driver.until(warm)?;
    let before = Reading::take(server)?;
    let counted = driver.operations;
    driver.until(end)?;
    let after = Reading::take(server)?;
    let operations = driver.operations - counted;
    driver.finish()?;
    ensure!(
        operations > 0,
        "no operation was answered in {:?}",
        terms.duration
    );
    Ok(after.since(&before, operations, operations * u64::from(load.length)))
}

/// The clocks at one moment.
pub struct Reading {
    at: Instant,
    server: Duration,
    client: Duration,
    machine: (u64, u64),
}

impl Reading {
    /// Reads them all.
    pub fn take(server: &Server) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            server: server.cpu_time()?,
            client: cpu::this_thread(),
            machine: cpu::machine()?,
        })
    }

    /// What happened between `before` and now.
    pub fn since(&self, before: &Self, operations: u64, bytes: u64) -> Sample {
        let seconds = (self.at - before.at).as_secs_f64();
        let server_cpu_s = (self.server - before.server).as_secs_f64();
        let client_cpu_s = (self.client - before.client).as_secs_f64();
        let all = (self.machine.1 - before.machine.1).max(1) as f64;
        let busy = (self.machine.0 - before.machine.0) as f64 / all;
        let cores = cpu::cores() as f64;
        let others = (busy - (server_cpu_s + client_cpu_s) / (seconds * cores)).max(0.0);
        Sample {
            operations,
            bytes,
            seconds,
            server_cpu_s,
            client_cpu_s,
            others: Some(others),
        }
    }
}

struct Driver<'a> {
    load: Load,
    content: &'a Content,
    connections: Vec<Connection>,
    random: Random,
    /// Requests issued, to step through the disk.
    issued: u64,
    operations: u64,
    /// Blocks of the disk that requests begin at.
    places: u64,
    /// Sampled writes: where, and the oldest write that may be found there from then on.
    written: VecDeque<(u64, u64)>,
    done: Vec<usize>,
    epoll: Option<std::os::fd::OwnedFd>,
    draining: bool,
}

impl<'a> Driver<'a> {
    fn open(endpoint: &Endpoint, load: &Load, terms: &Terms<'a>) -> Result<Self> {
        let connections = (0..load.connections)
            .map(|_| Connection::open(endpoint, load.depth, terms.structured))
            .collect::<Result<Vec<_>>>()?;
        let epoll = if connections.len() > 1 {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            for (index, connection) in (0_u64..).zip(&connections) {
                let data = epoll::EventData::new_u64(index);
                epoll::add(&epoll, connection.socket(), data, epoll::EventFlags::IN)?;
            }
            Some(epoll)
        } else {
            None
        };
        let size = connections.iter().map(|c| c.size_bytes).min().unwrap_or(0);
        let places = size / u64::from(load.length);
        ensure!(places > 0, "the export is smaller than one request");
        // A power of two, as fresh places need it. Images are of such a size, or end in a part that
        // is to be left alone.
        let places = 1 << places.ilog2();
        Ok(Self {
            load: *load,
            content: terms.content,
            connections,
            random: Random::new(terms.seed),
            issued: 0,
            operations: 0,
            places,
            written: VecDeque::new(),
            done: Vec::new(),
            epoll,
            draining: false,
        })
    }

    fn start(&mut self) -> Result<()> {
        for connection in 0..self.connections.len() {
            for slot in 0..self.load.depth {
                self.issue(connection, slot)?;
            }
            self.connections[connection].flush(self.content)?;
        }
        Ok(())
    }

    /// Where the next request goes.
    fn place(&mut self) -> Result<u64> {
        let place = match self.load.pattern {
            Pattern::Random => self.random.next() % self.places,
            Pattern::Sequential => self.issued % self.places,
            Pattern::Fresh => {
                ensure!(
                    self.issued < self.places,
                    "no fresh place is left: use a larger --size"
                );
                // An odd multiplier permutes a power of two; the golden ratio spreads it well.
                let spread = self.issued.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                spread % self.places
            }
        };
        self.issued += 1;
        Ok(place * u64::from(self.load.length))
    }

    fn issue(&mut self, connection_index: usize, slot: usize) -> Result<()> {
        let offset = self.place()?;
        let sampled = self.issued % SAMPLE_EVERY == 1;
        let length = self.load.length;
        let connection = &mut self.connections[connection_index];
        if self.load.operation == Operation::Read {
            connection.request(slot, command::READ, offset, length, sampled);
            return Ok(());
        }
        let number = WRITES.fetch_add(1, Ordering::Relaxed);
        connection.request(slot, command::WRITE, offset, length, false);
        for block in (0..u64::from(length)).step_by(BLOCK_BYTES) {
            connection.payload(offset + block, number);
        }
        self.connections[connection_index].slots[slot].write = number;
        if sampled {
            // Whatever was in flight when this one was sent may still be written over it.
            let in_flight = self.connections.iter().flat_map(|c| &c.slots);
            let oldest = in_flight.filter(|s| s.cookie != 0).map(|s| s.write).min();
            self.written.push_back((offset, oldest.unwrap_or(number)));
            if self.written.len() > MAX_CHECKED_WRITES {
                self.written.pop_front();
            }
        }
        Ok(())
    }

    /// Goes on until `end`.
    fn until(&mut self, end: Instant) -> Result<()> {
        let mut events = Vec::with_capacity(16);
        while Instant::now() < end {
            self.step(&mut events)?;
        }
        Ok(())
    }

    fn step(&mut self, events: &mut Vec<epoll::Event>) -> Result<()> {
        let Some(epoll) = &self.epoll else {
            return self.serve(0);
        };
        events.clear();
        epoll::wait(epoll, rustix::buffer::spare_capacity(events), None)?;
        for event in events.iter() {
            self.serve(usize::try_from(event.data.u64())?)?;
        }
        Ok(())
    }

    /// Takes the replies there are on one connection and sends as many new requests.
    fn serve(&mut self, index: usize) -> Result<()> {
        let mut done = std::mem::take(&mut self.done);
        self.connections[index].receive(&mut done)?;
        for slot in done.drain(..) {
            let state = &mut self.connections[index].slots[slot];
            let (command, offset) = (state.command, state.offset);
            if let Some(data) = state.sample.take() {
                self.content.check(offset, &data)?;
            }
            if command == command::WRITE && self.load.operation == Operation::WriteFlush {
                self.connections[index].request(slot, command::FLUSH, 0, 0, false);
                continue;
            }
            self.operations += 1;
            if !self.draining {
                self.issue(index, slot)?;
            }
        }
        self.done = done;
        self.connections[index].flush(self.content)
    }

    /// Waits for what is in flight, reads some of the written blocks again, and says goodbye.
    fn finish(mut self) -> Result<()> {
        self.draining = true;
        let mut events = Vec::with_capacity(16);
        while self
            .connections
            .iter()
            .any(|c| c.slots.iter().any(|slot| slot.cookie != 0))
        {
            self.step(&mut events)?;
        }
        // A block may have been written again since, but never by an earlier write, except one
        // that was in flight at the same time.
        let connection = &mut self.connections[0];
        for (offset, oldest) in std::mem::take(&mut self.written) {
            connection.request(0, command::READ, offset, self.load.length, true);
            connection.flush(self.content)?;
            let mut done = Vec::new();
            while done.is_empty() {
                connection.receive(&mut done)?;
            }
            let data = connection.slots[0].sample.take().unwrap_or_default();
            let found = self.content.check(offset, &data)?;
            ensure!(
                found >= oldest,
                "lost write at {offset}: write {oldest} or a later one was answered, write {found} is there"
            );
        }
        self.connections.into_iter().try_for_each(Connection::close)
    }
}

#[cfg(test)]
mod tests;
