//! The receiving side of a connection: one buffer, filled by as few receives as possible.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hikkoshi_nbd::wire::REQUEST_BYTES;
use socket2::Socket;

/// Holds a batch of requests, and payloads in pieces of this.
const INBOX_BYTES: usize = (256 << 10) + REQUEST_BYTES;

/// What is waited for at least, of a payload that is longer. Taking what one receive brought costs
/// less than waiting for a full buffer, which would have to be moved to its front first.
const PIECE_BYTES: usize = 64 << 10;

/// How long the next request is looked for before the thread sleeps. Falling asleep and being
/// woken costs more than that in CPU, and as much in latency.
const SPIN: Duration = Duration::from_micros(50);

/// Pauses of the processor between two looks.
const SPIN_PAUSES: usize = 32;

/// A request that came within this, the wake-up included, would have been worth looking for.
const WORTH_SPINNING: Duration = Duration::from_micros(100);

/// MSG_DONTWAIT.
const DONT_WAIT: i32 = 0x40;

/// After looking in vain, the thread sleeps this many times before it looks again; twice as many
/// after each further time. Where the client needs this very processor, looking keeps it from
/// answering, and that must not cost more than a trial now and then.
const FIRST_REST: u32 = 4;
const LONGEST_REST: u32 = 4096;

/// Threads that are looking now. At most half of the processors do, so that clients on the same
/// machine are not kept from running.
static SPINNING: AtomicUsize = AtomicUsize::new(0);
static MAX_SPINNING: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(1, |n| (n.get() / 2).max(1)));

/// Whether to look for the next request before sleeping.
#[derive(Debug, Default)]
struct Briskness {
    /// The last request came so soon that looking for the next one is worth it.
    brisk: bool,
    /// Sleeps until the next trial, and how many there were before this one.
    rest: u32,
    last_rest: u32,
}

impl Briskness {
    fn should_look(&mut self) -> bool {
        if self.rest > 0 {
            self.rest -= 1;
            return false;
        }
        self.brisk
    }

    fn looked(&mut self, found: bool) {
        if found {
            self.last_rest = 0;
        } else {
            self.last_rest = (self.last_rest * 2).clamp(FIRST_REST, LONGEST_REST);
            self.rest = self.last_rest;
        }
    }
}

pub(super) struct Inbox {
    socket: Socket,
    briskness: Briskness,
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// An inbox that already holds what came early, behind the handshake.
    pub fn new(socket: Socket, early: &[u8]) -> Self {
        let mut buf = vec![0; INBOX_BYTES.max(early.len())];
        buf[..early.len()].copy_from_slice(early);
        Self {
            socket,
            briskness: Briskness::default(),
            buf,
            start: 0,
            end: early.len(),
        }
    }

    /// Bytes that are here and were not consumed.
    pub fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The next request header, if all of it is here.
    pub fn take_header(&mut self) -> Option<[u8; REQUEST_BYTES]> {
        let header = self.buf.get(self.start..self.start + REQUEST_BYTES)?;
        if self.buffered() < REQUEST_BYTES {
            return None;
        }
        let header = header.try_into().ok()?;
        self.start += REQUEST_BYTES;
        Some(header)
    }

    /// Receives what there is, at least a byte. False at the end of the stream.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn receive(&mut self) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buf.len() || self.buf.len() - self.start < REQUEST_BYTES {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let received = match self.look_for_more()? {
            Some(received) => received,
            None => self.wait_for_more()?,
        };
        self.end += received;
        Ok(received > 0)
    }

    /// Looks for bytes without sleeping, if they can be expected soon.
    fn look_for_more(&mut self) -> io::Result<Option<usize>> {
        if !self.briskness.should_look() {
            return Ok(None);
        }
        if SPINNING.fetch_add(1, Ordering::Relaxed) >= *MAX_SPINNING {
            SPINNING.fetch_sub(1, Ordering::Relaxed);
            return Ok(None);
        }
        let outcome = self.spin();
        SPINNING.fetch_sub(1, Ordering::Relaxed);
        self.briskness.looked(matches!(outcome, Ok(Some(_))));
        outcome
    }

    fn spin(&mut self) -> io::Result<Option<usize>> {
        let started = Instant::now();
        loop {
            let buf = &mut self.buf[self.end..];
            // SAFETY: initialised bytes may be taken for uninitialised ones by a call that only
            // ever writes to them.
            let buf = unsafe { &mut *(std::ptr::from_mut(buf) as *mut [MaybeUninit<u8>]) };
            match self.socket.recv_with_flags(buf, DONT_WAIT) {
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if started.elapsed() > SPIN {
                return Ok(None);
            }
            // Whoever else wants this processor has it first: only idle time is spent here.
            std::thread::yield_now();
            for _ in 0..SPIN_PAUSES {
                std::hint::spin_loop();
            }
        }
    }

    fn wait_for_more(&mut self) -> io::Result<usize> {
        let started = Instant::now();
        loop {
            match self.socket.read(&mut self.buf[self.end..]) {
                Ok(n) => {
                    self.briskness.brisk = started.elapsed() < WORTH_SPINNING;
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Up to `wanted` bytes, and at least as many of them as a piece has; waits for these.
    ///
    /// # Errors
    /// The connection is broken, or ended before.
    pub fn fill(&mut self, wanted: usize) -> io::Result<&[u8]> {
        let least = wanted.min(PIECE_BYTES);
        if self.start + least > self.buf.len() {
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        while self.buffered() < least {
            if !self.receive()? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let here = wanted.min(self.buffered());
        Ok(&self.buf[self.start..self.start + here])
    }

    /// Lets go of bytes that [`Inbox::fill`] gave.
    pub fn consume(&mut self, len: usize) {
        self.start += len;
    }

    /// Passes over `len` bytes, waiting for them.
    ///
    /// # Errors
    /// The connection is broken, or ended before.
    pub fn skip(&mut self, mut len: usize) -> io::Result<()> {
        while len > 0 {
            let here = self.fill(len)?.len();
            self.consume(here);
            len -= here;
        }
        Ok(())
    }
}
