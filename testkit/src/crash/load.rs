//! Clients that work on a disk until its server goes away, and know what it must hold.
//!
//! Each client owns a share of the sectors and is alone in writing them, so that the order of the
//! writes of a sector is known. In the first half of the disk the shares alternate every few
//! sectors: clients meet in one block, and most writes cover blocks in part. In the second half a
//! share is 64 KiB: whole blocks, trims, long writes.

use super::disk::{Content, Expected, SECTOR, now_ns};
use crate::nbd::{self, Client, Request};
use crate::pattern::{Random, fill};
use anyhow::{Context, Result, bail, ensure};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Clients at once.
pub const CLIENTS: u64 = 3;
/// How long a share is in the first half, in sectors: less than a block of 4 KiB, and not a
/// divisor of it.
const FINE: u64 = 3;
/// And in the second half: 64 KiB.
const COARSE: u64 = 128;
/// Requests that a client has in flight at most.
const MAX_BATCH: u64 = 6;

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Everything.
    All,
    /// Reads alone: before the handoff, a write would be it.
    Reads,
    /// Many short writes with FUA, each of which is a commit of its own.
    Commits,
}

/// What was done, over all lives.
#[derive(Debug, Default)]
pub struct Tally {
    /// Requests that were answered.
    pub answered: AtomicU64,
    /// Writes, zeroes and trims among them.
    pub changes: AtomicU64,
    /// Flushes, and changes with FUA.
    pub durable: AtomicU64,
}

/// Clients at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    /// Starts the clients against the server at `socket`.
    pub fn start(
        socket: &Path,
        disk: &Arc<Expected>,
        block_sectors: u64,
        work: Work,
        seed: u64,
        tally: &Arc<Tally>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..CLIENTS)
            .map(|number| {
                let worker = Worker {
                    number,
                    disk: Arc::clone(disk),
                    block_sectors,
                    work,
                    random: Random::new(seed ^ (number + 1) << 56),
                    tally: Arc::clone(tally),
                };
                let (stop, socket) = (Arc::clone(&stop), socket.to_path_buf());
                std::thread::spawn(move || worker.run(&socket, &stop))
            })
            .collect();
        Self { stop, clients }
    }

    /// Waits until all have ended because their server went away.
    ///
    /// # Errors
    /// A client saw something wrong.
    pub fn wait(mut self) -> Result<()> {
        self.join()
    }

    /// Lets each finish what it has in flight, and waits for that.
    ///
    /// # Errors
    /// A client saw something wrong.
    pub fn finish(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        for client in self.clients.drain(..) {
            match client.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) if nbd::is_hang_up(&error) => {}
                Ok(Err(error)) => outcome = Err(error),
                Err(_) => outcome = Err(anyhow::anyhow!("a client panicked")),
            }
        }
        outcome
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // The outcome was wanted by nobody.
        let _ = self.join();
    }
}

struct Worker {
    number: u64,
    disk: Arc<Expected>,
    block_sectors: u64,
    work: Work,
    random: Random,
    tally: Arc<Tally>,
}

/// A request, and the sectors that it changes or must find as they are.
struct Planned {
    request: Request,
    sectors: Range<u64>,
    changes: bool,
    asked_ns: u64,
}

impl Worker {
    fn run(mut self, socket: &Path, stop: &AtomicBool) -> Result<()> {
        let mut client = match Client::connect(socket) {
            Ok(client) => client,
            // Killed while we connected.
            Err(_) => return Ok(()),
        };
        ensure!(
            client.size_bytes() == self.disk.sectors() * SECTOR as u64,
            "the export has {} bytes",
            client.size_bytes()
        );
        while !stop.load(Ordering::Relaxed) {
            let batch = self.plan();
            let requests: Vec<Request> = batch.iter().map(|p| p.request.clone()).collect();
            client.send(&requests)?;
            while client.in_flight() > 0 {
                let answer = client.receive()?;
                let planned = batch.get(answer.index).context("an answer too many")?;
                self.check(planned, answer.errno, &answer.data)?;
            }
        }
        Ok(())
    }

    fn owner(&self, sector: u64) -> u64 {
        let share = if sector < self.disk.sectors() / 2 {
            FINE
        } else {
            COARSE
        };
        sector / share % CLIENTS
    }

    /// A run of our own sectors that touches none of `taken`.
    fn pick(&mut self, taken: &[Range<u64>], longest: u64) -> Option<Range<u64>> {
        let all = self.disk.sectors();
        let start = self.random.below(all);
        if self.owner(start) != self.number {
            return None;
        }
        let longest = 1 + self.random.below(longest);
        let half = all / 2;
        let mut end = start + 1;
        while end < all && end != half && end - start < longest && self.owner(end) == self.number {
            end += 1;
        }
        let free = taken.iter().all(|t| end <= t.start || t.end <= start);
        free.then_some(start..end)
    }

    fn plan(&mut self) -> Vec<Planned> {
        let mut batch = Vec::new();
        let mut taken = Vec::new();
        let wanted = match self.work {
            Work::Commits => 1,
            _ => 1 + self.random.below(MAX_BATCH),
        };
        while batch.len() as u64 <= wanted {
            if self.work == Work::All && self.random.below(12) == 0 {
                batch.push(Planned {
                    request: Request::Flush,
                    sectors: 0..0,
                    changes: false,
                    asked_ns: 0,
                });
                continue;
            }
            let longest = if self.work == Work::Commits {
                1
            } else {
                COARSE
            };
            if let Some(run) = self.pick(&taken, longest)
                && let Some(planned) = self.plan_one(&run)
            {
                taken.push(run);
                batch.push(planned);
            }
        }
        for planned in &mut batch {
            planned.asked_ns = now_ns();
        }
        batch
    }

    fn plan_one(&mut self, run: &Range<u64>) -> Option<Planned> {
        let offset = run.start * SECTOR as u64;
        let len = u32::try_from((run.end - run.start) * SECTOR as u64).ok()?;
        let fua = self.random.below(5) == 0;
        let kind = match self.work {
            Work::All => self.random.below(100),
            Work::Reads => 0,
            Work::Commits => 99,
        };
        let (request, changes) = match kind {
            0..20 => (Request::Read { offset, len }, false),
            20..30 => {
                let no_hole = self.random.below(2) == 0;
                self.ask_all(run, fua, |_| Content::Zero);
                (
                    Request::Zero {
                        offset,
                        len,
                        fua,
                        no_hole,
                    },
                    true,
                )
            }
            // Only whole blocks: what else a trim does is nobody's business.
            30..40 => {
                let block = self.block_sectors;
                let whole = run.start.next_multiple_of(block)..run.end - run.end % block;
                if whole.start >= whole.end {
                    return None;
                }
                self.ask_all(&whole, fua, |_| Content::Zero);
                let len = u32::try_from((whole.end - whole.start) * SECTOR as u64).ok()?;
                let offset = whole.start * SECTOR as u64;
                let request = Request::Trim { offset, len, fua };
                return Some(Planned {
                    request,
                    sectors: whole,
                    changes: true,
                    asked_ns: 0,
                });
            }
            40..45 => (self.plan_bytes(run.start, fua), true),
            _ => {
                let fua = fua || self.work == Work::Commits;
                let generation = 1 + self.random.next() % (1 << 48);
                self.ask_all(run, fua, |_| Content::Generation(generation));
                let data = run
                    .clone()
                    .flat_map(|sector| Content::Generation(generation).bytes(sector))
                    .collect();
                (Request::Write { offset, data, fua }, true)
            }
        };
        let sectors = match &request {
            Request::Write { data, .. } if data.len() < SECTOR => run.start..run.start + 1,
            _ => run.clone(),
        };
        Some(Planned {
            request,
            sectors,
            changes,
            asked_ns: 0,
        })
    }

    /// A write of a few bytes within a sector.
    fn plan_bytes(&mut self, sector: u64, fua: bool) -> Request {
        let start = usize::try_from(self.random.below(SECTOR as u64 - 1)).unwrap_or(0);
        let longest = SECTOR as u64 - 1 - start as u64;
        let len = 1 + usize::try_from(self.random.below(longest.max(1))).unwrap_or(0);
        let mut data = vec![0; len];
        fill(self.random.next(), &mut data);
        let mut bytes = self.disk.now(sector).bytes(sector);
        bytes[start..start + len].copy_from_slice(&data);
        self.disk.ask(sector, Content::Bytes(Box::new(bytes)), fua);
        Request::Write {
            offset: sector * SECTOR as u64 + start as u64,
            data,
            fua,
        }
    }

    fn ask_all(&self, run: &Range<u64>, fua: bool, content: impl Fn(u64) -> Content) {
        for sector in run.clone() {
            self.disk.ask(sector, content(sector), fua);
        }
    }

    fn check(&self, planned: &Planned, errno: u32, data: &[u8]) -> Result<()> {
        if errno != 0 {
            bail!("sectors {:?}: answered with error {errno}", planned.sectors);
        }
        self.tally.answered.fetch_add(1, Ordering::Relaxed);
        match &planned.request {
            Request::Read { .. } => {
                for (sector, found) in planned.sectors.clone().zip(data.chunks(SECTOR)) {
                    let right = self.disk.now(sector);
                    ensure!(
                        right.bytes(sector)[..] == *found,
                        "a read while nothing was wrong: sector {sector} is not {right:?}"
                    );
                }
            }
            Request::Flush => {
                self.disk.flushed(planned.asked_ns);
                self.tally.durable.fetch_add(1, Ordering::Relaxed);
            }
            Request::Write { fua, .. } | Request::Zero { fua, .. } | Request::Trim { fua, .. } => {
                let fua = u64::from(*fua);
                self.tally.durable.fetch_add(fua, Ordering::Relaxed);
            }
        }
        if planned.changes {
            self.tally.changes.fetch_add(1, Ordering::Relaxed);
            for sector in planned.sectors.clone() {
                self.disk.answer(sector);
            }
        }
        Ok(())
    }
}
