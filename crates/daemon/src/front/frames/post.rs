//! Where the outcome of what had to be waited for elsewhere is left for the session.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use hikkoshi_nbd::wire::Errno;
use rustix::event::{EventfdFlags, eventfd};

use crate::volume::lock;

/// How waiting ended.
pub(super) enum Outcome {
    /// With these bytes.
    Bytes(Vec<u8>),
    /// It is in the image now.
    Here,
    /// What was asked for is done; there are no bytes to it.
    Done,
    /// It cannot be had.
    Failed(Errno, String),
}

/// An outcome and whose it is.
pub(super) struct Letter {
    pub id: u64,
    /// Where the request had come to, in bytes.
    pub offset: u64,
    /// What was set aside for it.
    pub reserved_bytes: usize,
    pub outcome: Outcome,
}

/// Letters to one session. What comes after its end is dropped with it.
pub(super) struct Post {
    letters: Mutex<Vec<Letter>>,
    bell: OwnedFd,
}

impl Post {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            letters: Mutex::default(),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Readable while there are letters.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Leaves a letter, from any thread, without waiting.
    pub fn leave(&self, letter: Letter) {
        lock(&self.letters).push(letter);
        // It fails only when the bell has been rung 2^64 times and nobody has looked.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Takes all letters.
    pub fn take(&self) -> Vec<Letter> {
        // Silenced first: who rings after this is heard again.
        let _ = rustix::io::read(&self.bell, &mut [0_u8; 8]);
        std::mem::take(&mut lock(&self.letters))
    }
}
