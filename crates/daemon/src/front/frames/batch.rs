//! What is being sent: frames that leave with one system call, and nothing behind them yet.
//!
//! Holds one quantum or a few small answers, never more, so that what is more urgent than all
//! that waits has at most this much in front of it. Data is sent from where it was read to.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use hikkoshi_wan::transport::frame::{Header, Kind};
use hikkoshi_wan::transport::pack::{Codec, Packer, Packing};
use hikkoshi_wan::transport::{HEADER_BYTES, Priority, limits};
use socket2::Socket;

use crate::volume::relocation::zero_runs;

/// Pieces handed to the kernel at once; a quantum of alternating data and zeroes has thirty.
const MAX_SLICES: usize = 128;

/// MSG_NOSIGNAL, MSG_DONTWAIT.
const NO_SIGNAL: i32 = 0x4000;
const DONT_WAIT: i32 = 0x40;

/// Bytes that were read for an answer.
#[derive(Clone, Debug)]
pub(super) enum Bytes {
    /// In the batch's own buffer.
    Read(Range<usize>),
    /// In a buffer that came from elsewhere.
    Fetched(Arc<Vec<u8>>, Range<usize>),
}

/// To which request bytes belong, and where on the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub id: u64,
    pub priority: Priority,
    pub offset: u64,
    /// With them the request is answered.
    pub last: bool,
}

enum Part {
    Header([u8; HEADER_BYTES]),
    Payload(Vec<u8>),
    Data(Bytes),
}

/// Frames on their way out.
pub(super) struct Batch {
    parts: VecDeque<Part>,
    /// How much of the first part is sent.
    sent: usize,
    buffer: Vec<u8>,
    used: usize,
}

impl Batch {
    pub fn new() -> Self {
        Self {
            parts: VecDeque::new(),
            sent: 0,
            buffer: vec![0; limits::QUANTUM_BYTES as usize],
            used: 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// How long it is on the wire.
    pub fn wire_bytes(&self) -> u64 {
        let parts = self.parts.iter();
        let bytes: usize = parts.map(|part| bytes_of(part, &self.buffer).len()).sum();
        bytes as u64
    }

    /// Room to read `len` bytes to, if there is so much.
    pub fn room(&mut self, len: usize) -> Option<&mut [u8]> {
        self.buffer.get_mut(self.used..)?.get_mut(..len)
    }

    /// `len` bytes were read to the room and are to stay there until they are sent.
    pub fn keep(&mut self, len: usize) -> Bytes {
        let start = self.used;
        self.used += len;
        Bytes::Read(start..self.used)
    }

    /// These, the last that were kept, are not sent: their room is free again.
    pub fn give_back(&mut self, bytes: Bytes) {
        if let Bytes::Read(place) = bytes
            && place.end == self.used
        {
            self.used = place.start;
        }
    }

    /// Whether there is as much room as there ever is, as there must be where nothing waits to be sent.
    pub fn has_all_room(&self) -> bool {
        self.used == 0
    }

    /// The bytes themselves.
    pub fn look<'a>(&'a self, bytes: &'a Bytes) -> &'a [u8] {
        look(&self.buffer, bytes)
    }

    /// Adds a frame with a payload of its own, or none.
    pub fn frame(&mut self, header: Header, payload: Vec<u8>) {
        let header = header.with_payload(&payload);
        self.parts.push_back(Part::Header(header.encode()));
        if !payload.is_empty() {
            self.parts.push_back(Part::Payload(payload));
        }
    }

    /// Adds the frames that carry `bytes`, which belong at a place. Runs of zeroes are told, not
    /// sent; others are compressed where that saves something. The checksums are made of what was
    /// read.
    pub fn data(&mut self, to: Place, bytes: &Bytes, packer: &mut Packer, packing: Packing) {
        let Place {
            id,
            priority,
            offset,
            last,
        } = to;
        let data = look(&self.buffer, bytes);
        let start = match bytes {
            Bytes::Read(range) | Bytes::Fetched(_, range) => range.start,
        };
        let mut at = 0;
        for (place, run, zero) in zero_runs(offset, data) {
            let end = at + run.len();
            let span = u32::try_from(run.len()).expect("at most a quantum");
            let kind = if zero { Kind::Zero } else { Kind::Data };
            let mut header = Header::request(kind, priority, id, place, span);
            header.last = last && end == data.len();
            if zero {
                self.parts.push_back(Part::Header(header.encode()));
            } else if let Some((codec, packed)) = packer.pack(packing, place, run) {
                header.packing = Codec::flags(Some(codec));
                let header = header.with_payload(&packed);
                self.parts.push_back(Part::Header(header.encode()));
                self.parts.push_back(Part::Payload(packed));
            } else {
                let header = header.with_payload(run);
                self.parts.push_back(Part::Header(header.encode()));
                let place = start + at..start + end;
                self.parts.push_back(Part::Data(match bytes {
                    Bytes::Read(_) => Bytes::Read(place),
                    Bytes::Fetched(buffer, _) => Bytes::Fetched(Arc::clone(buffer), place),
                }));
            }
            at = end;
        }
    }

    /// Hands over what the socket takes without waiting. Tells whether it took anything.
    ///
    /// # Errors
    /// The client is gone.
    pub fn send(&mut self, socket: &Socket) -> io::Result<bool> {
        let mut taken = self.parts.is_empty();
        while !self.parts.is_empty() {
            let parts = self.parts.iter().take(MAX_SLICES).enumerate();
            let slices: Vec<IoSlice<'_>> = parts
                .map(|(n, part)| {
                    let bytes = bytes_of(part, &self.buffer);
                    let sent = if n == 0 { self.sent } else { 0 };
                    IoSlice::new(&bytes[sent..])
                })
                .collect();
            match socket.send_vectored_with_flags(&slices, NO_SIGNAL | DONT_WAIT) {
                Ok(sent) => {
                    taken = true;
                    self.consume(sent);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(taken),
                Err(e) => return Err(e),
            }
        }
        self.used = 0;
        Ok(taken)
    }

    fn consume(&mut self, mut sent: usize) {
        while let Some(front) = self.parts.front() {
            let left = bytes_of(front, &self.buffer).len() - self.sent;
            if sent < left {
                self.sent += sent;
                return;
            }
            sent -= left;
            self.sent = 0;
            self.parts.pop_front();
        }
    }
}

fn look<'a>(buffer: &'a [u8], bytes: &'a Bytes) -> &'a [u8] {
    match bytes {
        Bytes::Read(range) => &buffer[range.clone()],
        Bytes::Fetched(buffer, range) => &buffer[range.clone()],
    }
}

fn bytes_of<'a>(part: &'a Part, buffer: &'a [u8]) -> &'a [u8] {
    match part {
        Part::Header(header) => header,
        Part::Payload(payload) => payload,
        Part::Data(bytes) => look(buffer, bytes),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What was hashed and is not sent took its room with it, and after some of it a guest's read was
    /// refused.
    #[test]
    fn what_is_given_back_leaves_all_the_room() {
        let mut batch = Batch::new();
        let most = limits::QUANTUM_BYTES as usize;
        for _ in 0..3 {
            for _ in 0..2 {
                batch.room(most / 2).unwrap().fill(7);
                let bytes = batch.keep(most / 2);
                assert_eq!(batch.look(&bytes), vec![7; most / 2]);
                batch.give_back(bytes);
                assert!(batch.has_all_room());
            }
            assert!(batch.room(most).is_some());
        }
        // What came from elsewhere has none here, and what lies before something else stays.
        let first = batch.keep(512);
        batch.give_back(Bytes::Fetched(Arc::new(vec![1; 512]), 0..512));
        let second = batch.keep(512);
        batch.give_back(first);
        assert_eq!(
            batch.room(most - 1024).map(|room| room.len()),
            Some(most - 1024)
        );
        assert!(batch.room(most - 1023).is_none());
        batch.give_back(second);
        assert!(batch.room(most - 512).is_some());
    }
}
