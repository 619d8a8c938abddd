//! A source that says what it is told to, for tests of one connection.

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_nbd::client::{BlockSizes, Negotiated};
use hikkoshi_nbd::uri::Address;
use rustix::io::Errno;

use super::job::Job;
use super::line::Line;
use super::wire::Wire;
use super::{NbdSourceConfig, Ticket};
use crate::source::{Fetched, Lane, SourceError};
use crate::transport::frame::Side;
use crate::transport::message::Request;
use crate::transport::{Decoder, Header, Kind, Priority};

const DISK_BYTES: u64 = 1 << 20;

/// What the source says next, and what it was told.
#[derive(Default)]
pub(super) struct Script {
    says: Mutex<Vec<u8>>,
    heard: Mutex<Vec<u8>>,
    then: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Script {
    /// The source says this, and then no more: the connection ends there.
    pub(super) fn says(&self, bytes: &[u8]) {
        self.says.lock().unwrap().extend_from_slice(bytes);
    }

    /// What is done once all of that was received, before the end.
    pub(super) fn then(&self, act: impl FnOnce() + Send + 'static) {
        *self.then.lock().unwrap() = Some(Box::new(act));
    }

    fn wait(&self) {
        if self.says.lock().unwrap().is_empty() {
            let then = self.then.lock().unwrap().take();
            if let Some(then) = then {
                then();
            }
        }
    }

    /// Takes what it was told.
    pub(super) fn heard(&self) -> Vec<u8> {
        std::mem::take(&mut self.heard.lock().unwrap())
    }
}

impl Wire for Script {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.heard.lock().unwrap().extend_from_slice(bytes);
        Ok(())
    }

    fn send_politely(&self, _: &[u8]) {}

    fn hang_up(&self) {}

    fn set_patience(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn receive(&self, room: &mut [u8], _: bool) -> Result<usize, Errno> {
        self.wait();
        let mut left = self.says.lock().unwrap();
        let len = room.len().min(left.len());
        room[..len].copy_from_slice(&left[..len]);
        left.drain(..len);
        Ok(len)
    }

    fn receive_more(&self, data: &mut Vec<u8>, more: usize) -> Result<usize, Errno> {
        self.wait();
        let mut left = self.says.lock().unwrap();
        let len = more.min(left.len());
        data.extend(left.drain(..len));
        Ok(len)
    }
}

/// A connection to it that speaks frames.
pub(super) fn line_to(script: &Arc<Script>, attaching: Option<&Arc<Ticket>>) -> Arc<Line> {
    let negotiated = Negotiated {
        size_bytes: DISK_BYTES,
        flags: 1,
        block_sizes: BlockSizes::DEFAULT,
        structured: true,
        allocation_context: None,
        transport: true,
        opened: false,
    };
    let config = NbdSourceConfig::new(Address::Unix("/nowhere".into()), "");
    let wire = Arc::clone(script) as Arc<dyn Wire>;
    Line::attaching(wire, negotiated, &config, attaching.cloned())
}

/// Reads over it; the answer is there once the connection has ended.
pub(super) fn read(
    line: &Line,
    lane: Lane,
    offset: u64,
    len: u32,
) -> Receiver<Result<Fetched, SourceError>> {
    let (sender, receiver) = channel();
    let done = move |outcome| sender.send(outcome).unwrap();
    let limits = (1, u32::MAX, DISK_BYTES);
    for job in Job::reads(lane, offset, len, limits, Box::new(done)) {
        assert!(line.submit(job).is_ok());
    }
    receiver
}

/// What it was told.
pub(super) fn requests(bytes: &[u8]) -> Vec<Request> {
    let mut decoder = Decoder::new(Side::Client);
    decoder.push(bytes);
    std::iter::from_fn(|| decoder.next_frame().unwrap())
        .map(|frame| Request::parse(&frame).unwrap())
        .collect()
}

/// A frame of the source.
pub(super) fn frame(kind: Kind, id: u64, offset: u64, payload: &[u8], last: bool) -> Vec<u8> {
    let span = match kind {
        Kind::Data => u32::try_from(payload.len()).unwrap(),
        _ => 0,
    };
    let mut header = Header::request(kind, Priority::DEMAND, id, offset, span);
    header.last = last;
    [&header.with_payload(payload).encode()[..], payload].concat()
}
