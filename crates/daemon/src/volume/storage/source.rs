//! A volume of this process as a source.
//!
//! Owns a few threads that read the old image, so that no caller waits, and calls back on them. One
//! of them reads only what a guest waits for, so that it never waits behind the copy. The old volume
//! is complete (nothing else may change its storage), so that its image has every block.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex};

use hikkoshi_engine::sync::wait;
use hikkoshi_nbd::wire;
use hikkoshi_store::ExtentKind;
use hikkoshi_wan::{
    Completion, ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind, SourceExtent,
    SourceInfo, SourceWatcher,
};

use crate::volume::{Volume, lock};

/// Threads that read anything, besides the one for demand: reading and writing disks overlap, and
/// more than this keep no disk busier.
const THREADS: usize = 3;

/// Extents of one answer; the rest is asked for again.
const MAX_EXTENTS: usize = 1024;

enum Work {
    Read(u32, Completion<Fetched>),
    Extents(u64, Completion<ExtentsAnswer>),
    Flush(Completion<()>),
}

struct Job {
    offset: u64,
    work: Work,
}

#[derive(Default)]
struct Queue {
    /// What a guest waits for, or will soon.
    urgent: VecDeque<Job>,
    other: VecDeque<Job>,
    /// Nothing more is read.
    closed: bool,
    /// Nobody can ask any more.
    gone: bool,
}

struct Shared {
    old: Mutex<Option<Arc<Volume>>>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

/// The image that a disk leaves.
pub struct ImageSource {
    shared: Arc<Shared>,
    info: SourceInfo,
}

impl ImageSource {
    /// Reads `old`, whose address is `uri`.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(old: &Arc<Volume>, uri: String) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            old: Mutex::new(Some(Arc::clone(old))),
            queue: Mutex::default(),
            wake: Condvar::new(),
        });
        let source = Arc::new(Self {
            info: SourceInfo {
                size_bytes: old.geometry().size_bytes(),
                read_only: false,
                can_multi_conn: true,
                has_extents: true,
                can_flush: true,
                min_block_bytes: 1,
                max_read_bytes: wire::MAX_PAYLOAD_BYTES,
                uri,
            },
            shared,
        });
        for n in 0..=THREADS {
            let shared = Arc::clone(&source.shared);
            std::thread::Builder::new()
                .name("old-image".into())
                .spawn(move || shared.work(n == 0))?;
        }
        Ok(source)
    }

    fn submit(&self, lane: Lane, job: Job) {
        let mut queue = lock(&self.shared.queue);
        if lane <= Lane::Ahead {
            queue.urgent.push_back(job);
        } else {
            queue.other.push_back(job);
        }
        drop(queue);
        // The one for demand may be woken by what is none of its business.
        self.shared.wake.notify_all();
    }
}

impl Drop for ImageSource {
    fn drop(&mut self) {
        lock(&self.shared.queue).gone = true;
        self.shared.wake.notify_all();
    }
}

impl Shared {
    /// The loop of a thread. `urgent`: it does nothing else.
    fn work(&self, urgent: bool) {
        loop {
            let (job, closed) = {
                let mut queue = lock(&self.queue);
                loop {
                    let next = match queue.urgent.pop_front() {
                        None if !urgent => queue.other.pop_front(),
                        next => next,
                    };
                    match next {
                        Some(job) => break (job, queue.closed),
                        None if queue.gone => return,
                        None => queue = wait(&self.wake, &self.queue, queue),
                    }
                }
            };
            let old = lock(&self.old).clone().filter(|_| !closed);
            job.run(old.as_deref());
        }
    }
}

impl Job {
    fn run(self, old: Option<&Volume>) {
        let offset = self.offset;
        match self.work {
            Work::Read(len, done) => done(read(old, offset, len)),
            Work::Extents(len, done) => done(extents(old, offset, len)),
            Work::Flush(done) => flush(old, done),
        }
    }
}

fn held(old: Option<&Volume>) -> Result<&Volume, SourceError> {
    old.ok_or_else(|| {
        let message = "the old image was let go of";
        SourceError::new(SourceErrorKind::Disconnected, message)
    })
}

fn refused(what: &str, offset: u64, error: &io::Error) -> SourceError {
    let message = format!("{what} the old image at offset {offset} failed: {error}");
    SourceError::new(SourceErrorKind::Refused, message)
}

fn read(old: Option<&Volume>, offset: u64, len: u32) -> Result<Fetched, SourceError> {
    let old = held(old)?;
    let failed = |error: io::Error| refused("reading", offset, &error);
    let len = usize::try_from(len).map_err(|e| failed(io::Error::other(e)))?;
    let mut data = Vec::new();
    data.try_reserve_exact(len)
        .map_err(|e| failed(io::Error::other(e)))?;
    data.resize(len, 0);
    old.store().read(offset, &mut data).map_err(failed)?;
    Ok(Fetched {
        offset,
        data,
        holes: Vec::new(),
        // There is no link; what counts is what was read.
        wire_bytes: len as u64,
    })
}

fn extents(old: Option<&Volume>, offset: u64, len: u64) -> Result<ExtentsAnswer, SourceError> {
    let found = held(old)?.store().extents(offset, len, MAX_EXTENTS);
    let found = found.map_err(|e| refused("looking for holes in", offset, &e))?;
    let mut extents: Vec<SourceExtent> = found
        .into_iter()
        .map(|extent| SourceExtent {
            offset: extent.offset,
            len: extent.len,
            zero: extent.kind != ExtentKind::Data,
        })
        .collect();
    if extents.is_empty() {
        let zero = false;
        extents.push(SourceExtent { offset, len, zero });
    }
    Ok(ExtentsAnswer {
        extents,
        wire_bytes: 0,
    })
}

/// As a client that flushes does.
fn flush(old: Option<&Volume>, done: Completion<()>) {
    let old = match held(old) {
        Ok(old) => old,
        Err(error) => return done(Err(error)),
    };
    let failed = |error: io::Error| {
        let message = format!("making the old image durable failed: {error}");
        SourceError::new(SourceErrorKind::Refused, message)
    };
    old.flush(Box::new(move |outcome| done(outcome.map_err(failed))));
}

impl Source for ImageSource {
    fn info(&self) -> SourceInfo {
        self.info.clone()
    }

    fn is_connected(&self) -> bool {
        self.connections() > 0
    }

    fn connections(&self) -> usize {
        usize::from(!lock(&self.shared.queue).closed)
    }

    fn read(&self, lane: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        let work = Work::Read(len, done);
        self.submit(lane, Job { offset, work });
    }

    fn extents(&self, lane: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        let work = Work::Extents(len, done);
        self.submit(lane, Job { offset, work });
    }

    fn flush(&self, done: Completion<()>) {
        let work = Work::Flush(done);
        self.submit(Lane::Demand, Job { offset: 0, work });
    }

    fn promote(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let mut queue = lock(&self.shared.queue);
        let queue = &mut *queue;
        for job in std::mem::take(&mut queue.other) {
            let wanted = match job.work {
                Work::Read(len, _) => job.offset < end && offset < job.offset + u64::from(len),
                Work::Extents(..) | Work::Flush(_) => false,
            };
            if wanted {
                queue.urgent.push_back(job);
            } else {
                queue.other.push_back(job);
            }
        }
        self.shared.wake.notify_all();
    }

    /// It neither goes nor comes back: there is no news.
    fn watch(&self, _: Arc<dyn SourceWatcher>) {}

    fn close(&self) {
        lock(&self.shared.queue).closed = true;
        lock(&self.shared.old).take();
        // What still waits fails, on the threads.
        self.shared.wake.notify_all();
    }
}
