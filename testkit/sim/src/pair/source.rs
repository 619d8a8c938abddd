//! What a destination reads over: the source trait, whose requests another flow of control answers at
//! the source, from that volume.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use hikkoshi_daemon::volume::guest::ReadNow;
use hikkoshi_daemon::volume::relocation::ReadEnd;
use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_wan::{
    Completion, ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind, SourceExtent,
    SourceInfo, SourceWatcher,
};

use crate::fiber::{self, Wait};

use super::link::{End, Line, broken, whole};

/// How often the keeper of a connection looks, in microseconds.
const LOOK_AFTER_US: u64 = 20_000;

/// The longest that a request is under way, in microseconds.
const LATE_US: u64 = 2000;

/// The source of a destination's process.
pub struct PairSource {
    end: End,
    size_bytes: u64,
    state: Mutex<State>,
    this: Weak<Self>,
}

#[derive(Default)]
struct State {
    line: Option<Line>,
    /// The source has hung up.
    ended: bool,
    pending: BTreeMap<u64, Completion<Fetched>>,
    flushes: BTreeMap<u64, Completion<()>>,
    next: u64,
    watcher: Option<Arc<dyn SourceWatcher>>,
    closed: bool,
}

impl PairSource {
    /// Over this end; it is dialled when the keeper runs.
    pub fn new(end: End, size_bytes: u64) -> Arc<Self> {
        let this = Arc::new_cyclic(|this| Self {
            end,
            size_bytes,
            state: Mutex::default(),
            this: Weak::clone(this),
        });
        let keeper = Arc::clone(&this);
        let keep = move || keeper.keep();
        this.end.here.spawn("keeper", Box::new(keep));
        this
    }

    fn state(&self) -> MutexGuard<'_, State> {
        whole(&self.state)
    }

    fn standing(&self) -> Option<Line> {
        let line = {
            let state = self.state();
            state.line.clone().filter(|_| !state.ended)?
        };
        self.end.stands(&line).then_some(line)
    }

    /// The flow of control that keeps the connection, and tells of it.
    fn keep(&self) {
        loop {
            let closed = self.state().closed;
            if closed {
                return;
            }
            if self.standing().is_none() {
                self.lose();
                self.connect();
            }
            fiber::pause(Wait::Until(self.end.here.now_us() + LOOK_AFTER_US));
        }
    }

    fn connect(&self) {
        let dialled = self.end.dial(&|| self.state().closed);
        let watcher = self.state().watcher.clone();
        match dialled {
            Ok(line) => {
                self.state().line = Some(line);
                if let Some(watcher) = watcher {
                    watcher.source_up();
                }
            }
            Err(why) if why.kind == SourceErrorKind::Untrusted => {
                if let Some(watcher) = watcher {
                    watcher.source_down(&why);
                }
            }
            Err(_) => {}
        }
    }

    /// The process that asked is gone: nobody is told anything any more.
    pub fn die(&self) {
        let left = {
            let mut state = self.state();
            state.closed = true;
            let line = state.line.take();
            let pending = std::mem::take(&mut state.pending);
            let flushes = std::mem::take(&mut state.flushes);
            (line, pending, flushes, state.watcher.take())
        };
        drop(left);
    }

    fn lose(&self) {
        let (had, pending, flushes, watcher) = {
            let mut state = self.state();
            state.ended = false;
            let line = state.line.take();
            let pending = std::mem::take(&mut state.pending);
            let flushes = std::mem::take(&mut state.flushes);
            (line, pending, flushes, state.watcher.clone())
        };
        for done in pending.into_values() {
            done(Err(broken()));
        }
        for done in flushes.into_values() {
            done(Err(broken()));
        }
        if let Some(watcher) = watcher.filter(|_| had.is_some()) {
            watcher.source_down(&broken());
        }
    }

    /// At the source: reads, looks whether that is still welcome, and sends it.
    fn serve(self: &Arc<Self>, line: Line, id: u64, bytes: ByteRange) {
        let there = &self.end.there;
        fiber::pause(Wait::Until(there.now_us() + there.below(LATE_US)));
        let mut data = vec![0; usize::try_from(bytes.len()).unwrap_or(0)];
        let relocation = line.relocation.clone().filter(|_| !line.source.is_plain());
        let now = line
            .source
            .read_now(relocation.as_ref(), bytes.start, &mut data);
        match (now, relocation) {
            (Ok(ReadNow::Done), _) => self.send(&line, id, bytes, Ok(data)),
            (Ok(ReadNow::WouldBlock), _) => self.send_of_store(&line, id, bytes),
            (Ok(ReadNow::Missing), Some(relocation)) => {
                let this = Arc::clone(self);
                let done = move |end: ReadEnd<'_>| match end {
                    ReadEnd::Bytes(data) => this.send(&line, id, bytes, Ok(data.into_owned())),
                    ReadEnd::Resident => this.send_of_store(&line, id, bytes),
                    ReadEnd::Failed(why) => this.send(&line, id, bytes, Err(format!("{why:?}"))),
                };
                relocation.read(bytes, Box::new(done));
            }
            (Ok(ReadNow::Missing), None) => {
                self.send(&line, id, bytes, Err("there is no source".into()));
            }
            (Err(e), _) => self.send(&line, id, bytes, Err(e.to_string())),
        }
    }

    /// At the source: makes durable what was written there, and says so to whom that is still welcome.
    fn flush_there(self: &Arc<Self>, line: Line, id: u64) {
        let there = &self.end.there;
        fiber::pause(Wait::Until(there.now_us() + there.below(LATE_US)));
        let (this, source) = (Arc::clone(self), Arc::clone(&line.source));
        source.flush(Box::new(move |outcome| {
            if !this.may_send(&line) {
                return;
            }
            let Some(done) = this.state().flushes.remove(&id) else {
                return;
            };
            let outcome =
                outcome.map_err(|e| SourceError::new(SourceErrorKind::Refused, e.to_string()));
            let receive = move || done(outcome);
            this.end.here.spawn("receives", Box::new(receive));
        }));
    }

    fn send_of_store(&self, line: &Line, id: u64, bytes: ByteRange) {
        let mut data = vec![0; usize::try_from(bytes.len()).unwrap_or(0)];
        let read = line.source.store().read(bytes.start, &mut data);
        let read = read.map(|()| data).map_err(|e| e.to_string());
        self.send(line, id, bytes, read);
    }

    /// Looked at after reading: a fence is lifted before the first write behind it.
    fn may_send(&self, line: &Line) -> bool {
        if !line.still_serves() {
            self.state().ended = true;
            return false;
        }
        self.standing().is_some_and(|now| now.time == line.time)
    }

    fn send(&self, line: &Line, id: u64, bytes: ByteRange, read: Result<Vec<u8>, String>) {
        if !self.may_send(line) {
            return;
        }
        let Some(done) = self.state().pending.remove(&id) else {
            return;
        };
        let fetched = read.map(|data| Fetched {
            offset: bytes.start,
            data,
            holes: Vec::new(),
            wire_bytes: bytes.len(),
        });
        let fetched = fetched.map_err(|why| SourceError::new(SourceErrorKind::Refused, why));
        let receive = move || done(fetched);
        self.end.here.spawn("receives", Box::new(receive));
    }
}

impl Source for PairSource {
    fn info(&self) -> SourceInfo {
        SourceInfo {
            size_bytes: self.size_bytes,
            read_only: false,
            can_multi_conn: false,
            can_flush: true,
            has_extents: false,
            min_block_bytes: 1,
            max_read_bytes: 32 << 20,
            uri: "simulated".into(),
        }
    }

    fn is_connected(&self) -> bool {
        self.standing().is_some()
    }

    fn connections(&self) -> usize {
        usize::from(self.is_connected())
    }

    fn read(&self, _: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        let (Some(line), Some(this)) = (self.standing(), self.this.upgrade()) else {
            let fail = move || done(Err(broken()));
            return self.end.here.spawn("receives", Box::new(fail));
        };
        let id = {
            let mut state = self.state();
            state.next += 1;
            let id = state.next;
            state.pending.insert(id, done);
            id
        };
        let bytes = ByteRange::at(offset, len.into());
        let serve = move || this.serve(line, id, bytes);
        self.end.there.spawn("serves", Box::new(serve));
    }

    fn extents(&self, _: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        let zero = false;
        let answer = ExtentsAnswer {
            extents: vec![SourceExtent { offset, len, zero }],
            wire_bytes: 0,
        };
        let tell = move || done(Ok(answer));
        self.end.here.spawn("receives", Box::new(tell));
    }

    fn flush(&self, done: Completion<()>) {
        let (Some(line), Some(this)) = (self.standing(), self.this.upgrade()) else {
            let fail = move || done(Err(broken()));
            return self.end.here.spawn("receives", Box::new(fail));
        };
        let id = {
            let mut state = self.state();
            state.next += 1;
            let id = state.next;
            state.flushes.insert(id, done);
            id
        };
        let flush = move || this.flush_there(line, id);
        self.end.there.spawn("serves", Box::new(flush));
    }

    fn watch(&self, watcher: Arc<dyn SourceWatcher>) {
        self.state().watcher = Some(watcher);
    }

    fn close(&self) {
        let (pending, flushes, left) = {
            let mut state = self.state();
            state.closed = true;
            let pending = std::mem::take(&mut state.pending);
            let flushes = std::mem::take(&mut state.flushes);
            (pending, flushes, (state.line.take(), state.watcher.take()))
        };
        drop(left);
        let fail = move || {
            for done in pending.into_values() {
                done(Err(broken()));
            }
            for done in flushes.into_values() {
                done(Err(broken()));
            }
        };
        self.end.here.spawn("receives", Box::new(fail));
    }
}
