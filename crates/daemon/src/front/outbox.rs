//! The sending side of a connection.
//!
//! Replies come from the connection's own thread (what was served at once) and from others (what
//! had to wait). One of them sends at a time. Whoever brings a reply sends it, if that needs no
//! waiting; else a thread of the connection takes over, so that a client that does not read never
//! holds up a thread that serves others.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hikkoshi_nbd::server::ReplyStyle;
use hikkoshi_nbd::wire::Errno;
use hikkoshi_store::Store;
use socket2::Socket;

use crate::volume::lock;

/// Requests of one connection that may wait at once.
const MAX_WAITING_REQUESTS: usize = 256;

/// Bytes of replies that one connection's waiting requests may come to.
const MAX_WAITING_BYTES: usize = 64 << 20;

/// MSG_NOSIGNAL, MSG_DONTWAIT.
const NO_SIGNAL: i32 = 0x4000;
const DONT_WAIT: i32 = 0x40;

/// Where a connection's replies go.
pub(super) struct Outbox {
    socket: Socket,
    is_unix: bool,
    style: ReplyStyle,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    /// How much of the first in the queue is sent.
    sent: usize,
    /// Somebody is sending; only they take from the queue.
    sending: bool,
    /// The sender gave up waiting for the client; the writer thread is to go on.
    handed_over: bool,
    has_writer: bool,
    waiting_requests: usize,
    waiting_bytes: usize,
    broken: bool,
    closed: bool,
    /// Threads that wait for a change. Waking none is a system call, too, and there is one reply for each request.
    waiters: usize,
}

impl Outbox {
    pub fn new(socket: Socket, style: ReplyStyle) -> Arc<Self> {
        let is_unix = socket.local_addr().is_ok_and(|address| address.is_unix());
        Arc::new(Self {
            socket,
            is_unix,
            style,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    pub fn style(&self) -> ReplyStyle {
        self.style
    }

    /// Ends the receiving side: the connection finishes what it has, and closes.
    pub fn hang_up(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Read);
    }

    /// A place among the waiting requests; waits until there is one.
    pub fn admit(self: &Arc<Self>, cookie: u64, reply_bytes: usize) -> Ticket {
        let mut state = lock(&self.state);
        while state.waiting_requests > 0
            && !state.broken
            && (state.waiting_requests >= MAX_WAITING_REQUESTS
                || state.waiting_bytes + reply_bytes > MAX_WAITING_BYTES)
        {
            state = self.wait(state);
        }
        state.waiting_requests += 1;
        state.waiting_bytes += reply_bytes;
        Ticket {
            outbox: Some(Arc::clone(self)),
            cookie,
            reply_bytes,
        }
    }

    /// Sends from the connection's own thread, waiting for the client as long as it takes.
    ///
    /// # Errors
    /// The client is gone.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.begin()?.send(bytes)
    }

    /// Takes the right to send until the guard is dropped: a reply that goes out in pieces must
    /// not have another one in its middle.
    ///
    /// # Errors
    /// The client is gone.
    pub fn begin(&self) -> io::Result<Sending<'_>> {
        let mut state = lock(&self.state);
        while state.sending && !state.broken {
            state = self.wait(state);
        }
        if state.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.sending = true;
        Ok(Sending {
            outbox: self,
            failed: false,
        })
    }

    /// Sends what others queued meanwhile, waiting for the client; then lets go.
    fn drain_queue(&self, failed: bool) {
        let mut state = lock(&self.state);
        state.broken |= failed;
        while !state.broken
            && let Some(next) = state.queue.pop_front()
        {
            let from = std::mem::take(&mut state.sent);
            drop(state);
            let outcome = send_all(&self.socket, &next[from..]);
            state = lock(&self.state);
            state.broken |= outcome.is_err();
        }
        if state.broken {
            state.queue.clear();
        }
        state.sending = false;
        self.wake(&state);
    }

    /// Takes a reply from any thread, without waiting for the client.
    fn deliver(self: &Arc<Self>, parts: [Vec<u8>; 2], reply_bytes: usize) {
        let mut state = lock(&self.state);
        state.waiting_requests -= 1;
        state.waiting_bytes -= reply_bytes;
        if !state.broken {
            state
                .queue
                .extend(parts.into_iter().filter(|p| !p.is_empty()));
        }
        if state.sending || state.broken {
            self.wake(&state);
            return;
        }
        state.sending = true;
        while let Some(next) = state.queue.pop_front() {
            let from = state.sent;
            drop(state);
            let outcome = self
                .socket
                .send_with_flags(&next[from..], NO_SIGNAL | DONT_WAIT);
            state = lock(&self.state);
            match outcome {
                Ok(n) if from + n == next.len() => state.sent = 0,
                Ok(n) => {
                    state.sent = from + n;
                    state.queue.push_front(next);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => state.queue.push_front(next),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    state.queue.push_front(next);
                    self.hand_over(&mut state);
                    return;
                }
                Err(_) => {
                    state.broken = true;
                    state.queue.clear();
                }
            }
        }
        state.sending = false;
        self.wake(&state);
    }

    fn hand_over(self: &Arc<Self>, state: &mut State) {
        state.handed_over = true;
        if !state.has_writer {
            state.has_writer = true;
            let this = Arc::clone(self);
            let spawned = std::thread::Builder::new()
                .name("nbd-writer".into())
                .spawn(move || this.write_on());
            if let Err(e) = spawned {
                tracing::warn!("no thread for a slow client could be started: {e}");
                state.broken = true;
                state.sending = false;
                state.queue.clear();
            }
        }
        self.wake(state);
    }

    /// The writer thread: takes over whenever the client was too slow for somebody else.
    fn write_on(&self) {
        let mut state = lock(&self.state);
        loop {
            if state.handed_over {
                state.handed_over = false;
                drop(state);
                self.drain_queue(false);
                state = lock(&self.state);
            } else if state.closed {
                return;
            } else {
                state = self.wait(state);
            }
        }
    }

    /// Waits until nothing is in flight, but not for longer than `most`.
    pub fn settle(&self, most: Duration) {
        let deadline = Instant::now() + most;
        let mut state = lock(&self.state);
        while !state.broken && (state.waiting_requests > 0 || state.sending) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state.waiters += 1;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            state.waiters -= 1;
        }
    }

    /// Closes the connection. Replies that still come are dropped.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.broken = true;
        state.closed = true;
        state.queue.clear();
        self.wake(&state);
        drop(state);
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiters += 1;
        let mut state = self
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
        state.waiters -= 1;
        state
    }

    /// Wakes whoever waits for a change.
    fn wake(&self, state: &State) {
        if state.waiters > 0 {
            self.changed.notify_all();
        }
    }
}

/// The right to send; what others queued meanwhile follows when it is dropped.
pub(super) struct Sending<'a> {
    outbox: &'a Outbox,
    failed: bool,
}

impl Sending<'_> {
    /// Hands up to `len` bytes of `store` from `offset` on to the socket; tells how many. Only to
    /// a Unix socket: TCP on loopback takes twice the CPU for it that copying takes.
    ///
    /// # Errors
    /// As [`Store::send_to`].
    pub fn send_from(&self, store: &dyn Store, offset: u64, len: u64) -> io::Result<u64> {
        if !self.outbox.is_unix {
            return Err(io::ErrorKind::Unsupported.into());
        }
        store.send_to(self.outbox.socket.as_fd(), offset, len)
    }

    /// Sends all of `bytes`, waiting for the client as long as it takes.
    ///
    /// # Errors
    /// The client is gone.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let outcome = send_all(&self.outbox.socket, bytes);
        self.failed |= outcome.is_err();
        outcome
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.outbox.drain_queue(self.failed);
    }
}

fn send_all(socket: &Socket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.send_with_flags(bytes, NO_SIGNAL) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The right, and the duty, to answer one request that waits. Dropped unused it answers EIO, so
/// that no client waits for ever.
pub(super) struct Ticket {
    outbox: Option<Arc<Outbox>>,
    cookie: u64,
    reply_bytes: usize,
}

impl Ticket {
    /// Answers a read.
    pub fn data(mut self, offset: u64, data: Vec<u8>) {
        if let Some(outbox) = self.outbox.take() {
            let mut header = Vec::new();
            let len = u32::try_from(data.len()).expect("a read is at most 32 MiB");
            outbox
                .style
                .push_read_header(&mut header, self.cookie, offset, len);
            outbox.deliver([header, data], self.reply_bytes);
        }
    }

    /// Answers that it is done.
    pub fn done(mut self) {
        if let Some(outbox) = self.outbox.take() {
            let mut reply = Vec::new();
            outbox.style.push_done(&mut reply, self.cookie);
            outbox.deliver([reply, Vec::new()], self.reply_bytes);
        }
    }

    /// Answers that it failed.
    pub fn fail(mut self, errno: Errno, message: &str) {
        self.answer_error(errno, message);
    }

    /// Answers with the outcome of a flush or of anything else without data.
    pub fn outcome(self, outcome: io::Result<()>) {
        match outcome {
            Ok(()) => self.done(),
            Err(e) => self.fail(errno_of(&e), &e.to_string()),
        }
    }

    fn answer_error(&mut self, errno: Errno, message: &str) {
        if let Some(outbox) = self.outbox.take() {
            let mut reply = Vec::new();
            outbox
                .style
                .push_error(&mut reply, self.cookie, errno, message);
            outbox.deliver([reply, Vec::new()], self.reply_bytes);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.answer_error(Errno::Io, "the request was dropped");
    }
}

/// What an error is on the wire.
pub(super) fn errno_of(error: &io::Error) -> Errno {
    match (error.raw_os_error(), error.kind()) {
        (Some(raw), _) => Errno::from_raw_os_error(raw),
        (None, io::ErrorKind::Unsupported) => Errno::NotSup,
        (None, io::ErrorKind::PermissionDenied) => Errno::Perm,
        (None, io::ErrorKind::OutOfMemory) => Errno::NoMem,
        (None, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => Errno::NoSpc,
        _ => Errno::Io,
    }
}
