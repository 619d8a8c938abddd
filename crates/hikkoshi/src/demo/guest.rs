//! The guest: workers that read, write and flush all the time, and check every byte they read
//! against an oracle, a second copy of the disk that gets the same writes.
//!
//! Each worker writes a part of the database of its own, so the oracle needs no lock and is exact.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::client::Client;
use super::disk::{BLOCK_BYTES, Disk};
use super::random::Random;

/// Workers, each with a connection of its own and one request at a time.
const WORKERS: usize = 4;

/// The longest pause between two requests of a worker; half of it on average.
const MAX_THINK_TIME_US: usize = 4000;

/// The longest request: 64 KiB.
const MAX_BLOCKS: usize = 16;

/// How long a failed demo waits for requests under way.
const END_PATIENCE: Duration = Duration::from_secs(3);

/// Of a hundred requests, how many are reads of the file system, and of the own database.
const FIXED_READS: usize = 50;
const OWN_READS: usize = 20;
/// And writes; the rest are flushes.
const WRITES: usize = 25;

/// At which site the guest runs, and whether it goes on.
#[derive(Debug)]
struct Site {
    /// Counts moves.
    generation: u64,
    /// Where the disk is; `None` while the guest is on its way.
    socket: Option<PathBuf>,
    /// Workers that have left the old site and flushed there.
    departed: usize,
    /// Workers that have had an answer at the site.
    running: usize,
    stop: bool,
    /// What went wrong, the first time.
    failure: Option<String>,
}

#[derive(Debug)]
struct Shared {
    site: Mutex<Site>,
    changed: Condvar,
    /// Something is to be looked at under the lock.
    attention: AtomicBool,
    size_bytes: u64,
    oracle: File,
    began: Instant,
    fixed: Vec<(u64, u64)>,
}

/// What a request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
}

/// A request that was answered.
#[derive(Clone, Copy, Debug)]
pub struct Answered {
    /// When it was asked, since the guest began.
    pub asked: Duration,
    /// How long the answer took.
    pub took: Duration,
    /// What it was.
    pub kind: Kind,
}

/// A guest that runs. Stops when dropped.
#[derive(Debug)]
pub struct Guest {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<Vec<Answered>>>,
}

impl Guest {
    /// Starts the guest on the disk behind `socket`; `oracle` is an exact copy of that disk.
    ///
    /// # Errors
    /// The oracle cannot be opened, or there are no threads.
    pub fn start(disk: &Disk, socket: &Path, oracle: &Path) -> anyhow::Result<Self> {
        let oracle = File::options()
            .read(true)
            .write(true)
            .open(oracle)
            .context("opening the oracle")?;
        let shared = Arc::new(Shared {
            site: Mutex::new(Site {
                generation: 0,
                socket: Some(socket.into()),
                departed: 0,
                running: 0,
                stop: false,
                failure: None,
            }),
            changed: Condvar::new(),
            attention: AtomicBool::new(false),
            size_bytes: disk.size_bytes,
            oracle,
            began: Instant::now(),
            fixed: chunks(&disk.fixed),
        });
        let share = disk.database.len().div_ceil(WORKERS);
        let mut workers = Vec::new();
        for (own, seed) in disk.database.chunks(share).zip(1..) {
            let worker = Worker {
                shared: Arc::clone(&shared),
                random: Random::seeded(seed),
                own: own.to_vec(),
                own_order: order(own.len(), seed),
                fixed_order: order(shared.fixed.len(), seed),
                answered: Vec::new(),
                unannounced: false,
                buf: Vec::new(),
                expected: Vec::new(),
            };
            let thread = thread::Builder::new()
                .name("demo-guest".into())
                .spawn(move || worker.run())
                .context("starting the guest")?;
            workers.push(thread);
        }
        Ok(Self { shared, workers })
    }

    /// Now, as the guest's requests are timed.
    pub fn now(&self) -> Duration {
        self.shared.began.elapsed()
    }

    /// What went wrong, if something did.
    pub fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    /// Moves the guest: it ends its requests and flushes at the old site, then goes on with the
    /// disk behind `socket`. Returns when every worker had an answer there.
    ///
    /// # Errors
    /// What went wrong with the guest.
    pub fn move_to(&self, socket: &Path) -> anyhow::Result<()> {
        let mut site = self.lock();
        site.generation += 1;
        site.socket = None;
        site.departed = 0;
        site.running = 0;
        self.shared.attention.store(true, Ordering::SeqCst);
        site = self.wait(site, |site| site.departed)?;
        site.socket = Some(socket.into());
        self.shared.attention.store(false, Ordering::SeqCst);
        self.shared.changed.notify_all();
        drop(self.wait(site, |site| site.running)?);
        Ok(())
    }

    /// Stops the guest, flushing, and tells what it did.
    ///
    /// # Errors
    /// What went wrong with the guest.
    pub fn stop(mut self) -> anyhow::Result<Vec<Answered>> {
        self.end();
        let mut all = Vec::new();
        for worker in self.workers.drain(..) {
            all.extend(
                worker
                    .join()
                    .map_err(|_| anyhow::anyhow!("the guest panicked"))?,
            );
        }
        match self.failure() {
            Some(failure) => anyhow::bail!("{failure}"),
            None => Ok(all),
        }
    }

    fn end(&self) {
        self.lock().stop = true;
        self.shared.attention.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Site> {
        self.shared.site.lock().expect("no holder panics")
    }

    /// Waits until all workers are counted.
    fn wait<'a>(
        &self,
        site: std::sync::MutexGuard<'a, Site>,
        count: fn(&Site) -> usize,
    ) -> anyhow::Result<std::sync::MutexGuard<'a, Site>> {
        let all = self.workers.len();
        let waiting = |site: &mut Site| count(site) < all && site.failure.is_none();
        let site = self
            .shared
            .changed
            .wait_while(site, waiting)
            .expect("no holder panics");
        match &site.failure {
            Some(failure) => anyhow::bail!("{failure}"),
            None => Ok(site),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
        // A worker whose request is never answered ends with its connection, later.
        let until = Instant::now() + END_PATIENCE;
        while self.workers.iter().any(|worker| !worker.is_finished()) && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Cuts runs into pieces as long as the longest request.
fn chunks(runs: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let longest = BLOCK_BYTES * 16;
    let mut pieces = Vec::new();
    for &(start, len) in runs {
        let mut at = start;
        while at < start + len {
            let piece = longest.min(start + len - at);
            pieces.push((at, piece));
            at += piece;
        }
    }
    pieces
}

/// Which of `count` items are hot: an order of its own for every worker.
fn order(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    Random::seeded(seed ^ 0x5eed).shuffle(&mut order);
    order
}

struct Worker {
    shared: Arc<Shared>,
    random: Random,
    /// Offsets of the blocks that this worker may write.
    own: Vec<u64>,
    own_order: Vec<usize>,
    fixed_order: Vec<usize>,
    answered: Vec<Answered>,
    /// The next answer is the first at this site.
    unannounced: bool,
    buf: Vec<u8>,
    expected: Vec<u8>,
}

impl Worker {
    fn run(mut self) -> Vec<Answered> {
        if let Err(error) = self.work() {
            let mut site = self.shared.site.lock().expect("no holder panics");
            site.failure.get_or_insert(format!("the guest: {error:#}"));
            self.shared.changed.notify_all();
        }
        self.answered
    }

    /// Works at one site after the other.
    fn work(&mut self) -> anyhow::Result<()> {
        let mut generation = 0;
        loop {
            let socket = {
                let shared = Arc::clone(&self.shared);
                let site = shared.site.lock().expect("no holder panics");
                let site = shared
                    .changed
                    .wait_while(site, |site| site.socket.is_none() && !site.stop)
                    .expect("no holder panics");
                match (&site.socket, site.stop) {
                    (Some(socket), false) => socket.clone(),
                    _ => return Ok(()),
                }
            };
            let mut disk = Client::connect(&socket).context("connecting to the disk")?;
            anyhow::ensure!(
                disk.size_bytes() == self.shared.size_bytes,
                "the disk has {} bytes, and had {}",
                disk.size_bytes(),
                self.shared.size_bytes
            );
            self.unannounced = true;
            let goes_on = loop {
                self.request(&mut disk)?;
                if self.shared.attention.load(Ordering::Relaxed) {
                    let site = self.shared.site.lock().expect("no holder panics");
                    if site.stop || site.generation != generation {
                        generation = site.generation;
                        break !site.stop;
                    }
                }
                let pause = self.random.below(MAX_THINK_TIME_US);
                thread::sleep(Duration::from_micros(u64::try_from(pause)?));
            };
            self.timed(Kind::Flush, || disk.flush())
                .context("flushing at the end")?;
            disk.disconnect().context("disconnecting")?;
            if !goes_on {
                return Ok(());
            }
            self.shared.site.lock().expect("no holder panics").departed += 1;
            self.shared.changed.notify_all();
        }
    }

    fn request(&mut self, disk: &mut Client) -> anyhow::Result<()> {
        match self.random.below(100) {
            0..FIXED_READS => {
                let hot = self.fixed_order[self.random.skewed(self.fixed_order.len())];
                let (start, len) = self.shared.fixed[hot];
                let blocks = usize::try_from(len / BLOCK_BYTES)?;
                let first = self.random.below(blocks);
                let count = self.random.below(blocks - first) + 1;
                let offset = start + u64::try_from(first)? * BLOCK_BYTES;
                self.read(disk, offset, count)?;
            }
            pick if pick < FIXED_READS + OWN_READS => {
                let (offset, count) = self.own_run();
                self.read(disk, offset, count)?;
            }
            pick if pick < FIXED_READS + OWN_READS + WRITES => {
                let (offset, count) = self.own_run();
                self.write(disk, offset, count)?;
            }
            _ => self
                .timed(Kind::Flush, || disk.flush())
                .context("flushing")?,
        }
        if std::mem::take(&mut self.unannounced) {
            self.shared.site.lock().expect("no holder panics").running += 1;
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// A run of own blocks, 4 to 64 KiB, hot ones more often.
    fn own_run(&mut self) -> (u64, usize) {
        let first = self.own_order[self.random.skewed(self.own_order.len())];
        let wanted = self.random.below(MAX_BLOCKS) + 1;
        let run = self.own[first..].iter().zip(0_u64..).take(wanted);
        let offset = self.own[first];
        let count = run
            .take_while(|(at, n)| **at == offset + n * BLOCK_BYTES)
            .count();
        (offset, count)
    }

    fn read(&mut self, disk: &mut Client, offset: u64, blocks: usize) -> anyhow::Result<()> {
        let len = blocks * usize::try_from(BLOCK_BYTES)?;
        let mut buf = std::mem::take(&mut self.buf);
        buf.resize(len, 0);
        self.timed(Kind::Read, || disk.read(offset, &mut buf))
            .with_context(|| format!("reading {len} bytes at {offset}"))?;
        self.expected.resize(len, 0);
        self.shared
            .oracle
            .read_exact_at(&mut self.expected, offset)
            .context("reading the oracle")?;
        if let Some(at) = buf
            .iter()
            .zip(&self.expected)
            .position(|(is, should)| is != should)
        {
            anyhow::bail!(
                "WRONG DATA: the byte at {} is {:#04x} and should be {:#04x} (a read of {len} \
                 bytes at {offset})",
                offset + u64::try_from(at)?,
                buf[at],
                self.expected[at]
            );
        }
        self.buf = buf;
        Ok(())
    }

    fn write(&mut self, disk: &mut Client, offset: u64, blocks: usize) -> anyhow::Result<()> {
        let len = blocks * usize::try_from(BLOCK_BYTES)?;
        let mut buf = std::mem::take(&mut self.buf);
        buf.resize(len, 0);
        self.random.fill(&mut buf);
        self.shared
            .oracle
            .write_all_at(&buf, offset)
            .context("writing the oracle")?;
        self.timed(Kind::Write, || disk.write(offset, &buf))
            .with_context(|| format!("writing {len} bytes at {offset}"))?;
        self.buf = buf;
        Ok(())
    }

    fn timed(&mut self, kind: Kind, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let asked = self.shared.began.elapsed();
        act()?;
        let took = self.shared.began.elapsed() - asked;
        self.answered.push(Answered { asked, took, kind });
        Ok(())
    }
}
