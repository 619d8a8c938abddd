//! What a guest would feel: reads and writes at a destination, each timed.
//!
//! Owns the loops that put such requests and what is noted of each. A guest here is one or a few
//! connections at depth 1; the bench's throughput client is `client::load`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use hikkoshi_nbd::wire::command;
use serde::Serialize;

use super::disk::Disk;
use crate::client::{Connection, Content, Endpoint, Random};

/// Guests that read while a disk is copied; each waits between its reads.
const PROBES: u64 = 4;
const PROBE_PAUSE: Duration = Duration::from_millis(50);
/// How often a probe that pauses looks whether it should stop.
const READ_BYTES: u32 = 4096;

/// One request.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Felt {
    /// When it was asked, in seconds from the start.
    pub at_s: f64,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// One request at a time on a connection.
pub struct Guest {
    connection: Connection,
    content: Content,
    done: Vec<usize>,
}

impl Guest {
    /// Connects.
    pub fn open(endpoint: &Endpoint) -> Result<Self> {
        Ok(Self {
            connection: Connection::open(endpoint, 2, true)?,
            content: Content::new(),
            done: Vec::new(),
        })
    }

    fn answer(&mut self, count: usize) -> Result<()> {
        self.connection.flush(&self.content)?;
        self.done.clear();
        while self.done.len() < count {
            self.connection.receive(&mut self.done)?;
        }
        Ok(())
    }

    /// Reads, and returns how long that took in milliseconds.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<f64> {
        let start = Instant::now();
        self.connection
            .request(0, command::READ, offset, length, false);
        self.answer(1)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// Writes (and flushes when the answer is there, if asked for); milliseconds.
    pub fn write(&mut self, offset: u64, data: &[u8], flush: bool) -> Result<f64> {
        let start = Instant::now();
        let length = u32::try_from(data.len())?;
        self.connection
            .request(0, command::WRITE, offset, length, false);
        self.connection.payload_bytes(data);
        self.answer(1)?;
        if flush {
            self.connection.request(0, command::FLUSH, 0, 0, false);
            self.answer(1)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// Reads from `start` on to `end`, 128 KiB at a time and two at once, as the kernel's
    /// read-ahead does for a program that reads a file; for `limit` at most. Returns bytes, seconds.
    pub fn read_sequentially(
        &mut self,
        start: u64,
        end: u64,
        limit: Duration,
    ) -> Result<(u64, f64)> {
        const LENGTH: u32 = 128 << 10;
        let began = Instant::now();
        let (mut next, mut bytes) = (start, 0_u64);
        let mut in_flight = 0;
        for slot in 0..2 {
            self.connection
                .request(slot, command::READ, next, LENGTH, false);
            next += u64::from(LENGTH);
            in_flight += 1;
        }
        self.connection.flush(&self.content)?;
        while in_flight > 0 {
            self.done.clear();
            self.connection.receive(&mut self.done)?;
            for slot in std::mem::take(&mut self.done) {
                in_flight -= 1;
                bytes += u64::from(LENGTH);
                if next + u64::from(LENGTH) <= end && began.elapsed() < limit {
                    self.connection
                        .request(slot, command::READ, next, LENGTH, false);
                    next += u64::from(LENGTH);
                    in_flight += 1;
                }
            }
            self.connection.flush(&self.content)?;
        }
        Ok((bytes, began.elapsed().as_secs_f64()))
    }

    /// Says goodbye.
    pub fn close(self) -> Result<()> {
        self.connection.close()
    }
}

/// Reads 4 KiB here and there where `disk` has data, from several connections, until `stop`.
/// Times count from `started`. What could be measured before an error is returned with it.
pub fn probe(
    endpoint: &Endpoint,
    disk: &Disk,
    started: Instant,
    stop: &AtomicBool,
) -> (Vec<Felt>, Result<()>) {
    let probe = |number: u64| {
        let mut felt = Vec::new();
        let mut run = || -> Result<()> {
            let mut guest = Guest::open(endpoint)?;
            let mut random = Random::new(0x7072_6f62 + number);
            while !stop.load(Ordering::Relaxed) {
                let offset = disk.random_block(&mut random);
                let at_s = started.elapsed().as_secs_f64();
                let ms = guest.read(offset, READ_BYTES)?;
                felt.push(Felt { at_s, ms });
                std::thread::sleep(PROBE_PAUSE);
            }
            guest.close()
        };
        let result = run();
        (felt, result)
    };
    let all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..PROBES)
            .map(|number| scope.spawn(move || probe(number)))
            .collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut felt = Vec::new();
    let mut outcome = Ok(());
    for one in all {
        match one {
            Ok((some, result)) => {
                felt.extend(some);
                outcome = outcome.and(result);
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    felt.sort_by(|a: &Felt, b| a.at_s.total_cmp(&b.at_s));
    (felt, outcome)
}

/// The figure below which this part of `figures` lies; `None` of none.
pub fn percentile(figures: impl IntoIterator<Item = f64>, part: f64) -> Option<f64> {
    let mut figures: Vec<f64> = figures.into_iter().collect();
    figures.sort_by(f64::total_cmp);
    let last = figures.len().checked_sub(1)?;
    // A rank within the list: small and not negative.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let rank = (part.clamp(0.0, 1.0) * last as f64).round() as usize;
    figures.get(rank).copied()
}
