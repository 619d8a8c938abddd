//! What a disk may hold, and what each read may give, after a row of requests.
//!
//! Mutations take effect in the order of the requests. A read that had to wait may give any state
//! from its own place in the row on, byte by byte.

use hikkoshi_nbd::server::Session;
use hikkoshi_nbd::wire::{self, allocation};

use super::replies::StatusChunk;

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It took effect.
    Done,
    /// It had none.
    Refused,
    /// Nobody knows.
    Unknown,
}

#[derive(Clone)]
enum Value {
    Bytes(Vec<u8>),
    Zeroes,
    /// Some of it happened, or none.
    Unknown,
}

struct Change {
    when: usize,
    start: usize,
    end: usize,
    value: Value,
}

impl Change {
    /// Whether the byte at `at` may be `byte` because of this.
    fn allows(&self, at: usize, byte: u8) -> bool {
        (self.start..self.end).contains(&at)
            && match &self.value {
                Value::Bytes(bytes) => bytes[at - self.start] == byte,
                Value::Zeroes => byte == 0,
                Value::Unknown => true,
            }
    }
}

struct Read {
    when: usize,
    offset: usize,
    /// What differs from the state at the time it was asked for.
    differing: Vec<(usize, u8)>,
}

/// The disk as it must be.
pub struct Model {
    now: Vec<u8>,
    /// Bytes of which nothing is known.
    unknown: Vec<bool>,
    changes: Vec<Change>,
    reads: Vec<Read>,
}

fn place(offset: u64, len: u64) -> (usize, usize) {
    let start = usize::try_from(offset).unwrap();
    (start, start + usize::try_from(len).unwrap())
}

impl Model {
    /// A disk of this content.
    pub fn new(content: Vec<u8>) -> Self {
        Self {
            unknown: vec![false; content.len()],
            now: content,
            changes: Vec::new(),
            reads: Vec::new(),
        }
    }

    fn change(&mut self, when: usize, (start, end): (usize, usize), value: Value) {
        match &value {
            Value::Bytes(bytes) => self.now[start..end].copy_from_slice(bytes),
            Value::Zeroes => self.now[start..end].fill(0),
            Value::Unknown => {}
        }
        self.unknown[start..end].fill(matches!(value, Value::Unknown));
        self.changes.push(Change {
            when,
            start,
            end,
            value,
        });
    }

    /// A write.
    pub fn write(&mut self, when: usize, offset: u64, data: &[u8], fate: Fate) {
        let value = Value::Bytes(data.to_vec());
        self.end(when, place(offset, data.len() as u64), value, fate);
    }

    /// A write-zeroes.
    pub fn zero(&mut self, when: usize, offset: u64, len: u64, fate: Fate) {
        self.end(when, place(offset, len), Value::Zeroes, fate);
    }

    fn end(&mut self, when: usize, place: (usize, usize), value: Value, fate: Fate) {
        match fate {
            Fate::Done => self.change(when, place, value),
            Fate::Refused => {}
            Fate::Unknown => self.change(when, place, Value::Unknown),
        }
    }

    /// A trim: whole blocks of `grain` bytes become zero, the edges stay or become zero.
    pub fn trim(&mut self, when: usize, offset: u64, len: u64, grain: u64, fate: Fate) {
        let (start, end) = place(offset, len);
        let size = self.now.len();
        let grain = grain as usize;
        let inner_start = start.next_multiple_of(grain).min(end);
        // The last block of the disk may be short.
        let inner_end = if end == size {
            end
        } else {
            end / grain * grain
        };
        let inner_end = inner_end.max(inner_start);
        for edge in [(start, inner_start), (inner_end, end)] {
            if edge.0 < edge.1 && self.now[edge.0..edge.1].iter().any(|byte| *byte != 0) {
                self.end(when, edge, Value::Unknown, fate);
            }
        }
        if inner_start < inner_end {
            self.end(when, (inner_start, inner_end), Value::Zeroes, fate);
        }
    }

    /// Something unknown happened to these bytes.
    pub fn forget(&mut self, when: usize, offset: u64, len: u64) {
        self.change(when, place(offset, len), Value::Unknown);
    }

    /// A read asked for now gave `data`. What differs is looked into by [`Self::settle`].
    pub fn expect(&mut self, when: usize, offset: u64, data: &[u8]) {
        let (start, end) = place(offset, data.len() as u64);
        if self.now[start..end] == *data {
            return;
        }
        let differing = (start..end)
            .filter(|at| self.now[*at] != data[at - start] && !self.unknown[*at])
            .map(|at| (at, data[at - start]))
            .collect();
        self.reads.push(Read {
            when,
            offset: start,
            differing,
        });
    }

    /// What is said to read as zeroes does.
    pub fn expect_zeroes(&self, offset: u64, told: &[StatusChunk], session: &Session) {
        for chunk in told {
            let is_allocation = session
                .contexts
                .iter()
                .any(|c| c.id == chunk.context && c.name == wire::BASE_ALLOCATION);
            let mut at = offset as usize;
            for (len, flags) in &chunk.extents {
                let end = (at + *len as usize).min(self.now.len());
                if is_allocation && flags & allocation::ZERO != 0 {
                    let zero = (at..end).all(|at| self.now[at] == 0 || self.unknown[at]);
                    assert!(zero, "data at {at}..{end} was called zeroes");
                }
                at = end;
            }
        }
    }

    /// With all requests known: every byte that a read gave was there in its time.
    pub fn settle(&mut self) {
        for read in &self.reads {
            for (at, byte) in &read.differing {
                let later = self.changes.iter().filter(|c| c.when > read.when);
                assert!(
                    later.clone().any(|change| change.allows(*at, *byte)),
                    "request {}, a read at {}, gave {byte:#x} for byte {at}, which never held it",
                    read.when,
                    read.offset
                );
            }
        }
    }

    /// Panics if `content` is not what the disk must hold.
    pub fn check(&self, content: &[u8]) {
        assert_eq!(content.len(), self.now.len());
        if content == self.now {
            return;
        }
        let wrong =
            (0..content.len()).find(|at| content[*at] != self.now[*at] && !self.unknown[*at]);
        if let Some(at) = wrong {
            panic!(
                "byte {at} of the disk is {:#x} and must be {:#x}",
                content[at], self.now[at]
            );
        }
    }
}
