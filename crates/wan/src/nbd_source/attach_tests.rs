//! A connection that was put to work before the source has said that it may be.
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_nbd::client::{BlockSizes, Negotiated};
use hikkoshi_nbd::uri::Address;
use rustix::io::Errno;

use super::job::Job;
use super::line::Line;
use super::wire::Wire;
use super::{NbdSourceConfig, Ticket, frames};
use crate::source::{Lane, SourceErrorKind};
use crate::transport::session::{Attached, Stance, Told};
use crate::transport::{Header, Kind, Priority};

/// What a source says, then its end.
struct Script(Mutex<Vec<u8>>);

impl Wire for Script {
    fn send(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn send_politely(&self, _: &[u8]) {}

    fn hang_up(&self) {}

    fn set_patience(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn receive(&self, room: &mut [u8], _: bool) -> Result<usize, Errno> {
        let mut left = self.0.lock().unwrap();
        let len = room.len().min(left.len());
        room[..len].copy_from_slice(&left[..len]);
        left.drain(..len);
        Ok(len)
    }

    fn receive_more(&self, data: &mut Vec<u8>, more: usize) -> Result<usize, Errno> {
        let mut left = self.0.lock().unwrap();
        let len = more.min(left.len());
        data.extend(left.drain(..len));
        Ok(len)
    }
}

fn frame(mut header: Header, payload: &[u8]) -> Vec<u8> {
    header.last = true;
    [&header.with_payload(payload).encode()[..], payload].concat()
}

/// What comes of a read that was sent behind [`Ticket::tell`]: its answer if it has one, and why the
/// connection ended.
fn read_behind(told: &Told, ticket: &Arc<Ticket>) -> (Option<Vec<u8>>, SourceErrorKind) {
    let told = frame(
        Header::request(Kind::Told, Priority::DEMAND, 0, 0, 0),
        &told.encode(),
    );
    let data = [0x5a; 512];
    let data = frame(
        Header::request(Kind::Data, Priority::DEMAND, 0, 4096, 512),
        &data,
    );
    let wire = Arc::new(Script(Mutex::new([told, data].concat())));
    let negotiated = Negotiated {
        size_bytes: 1 << 20,
        flags: 1,
        block_sizes: BlockSizes::DEFAULT,
        structured: true,
        allocation_context: None,
        transport: true,
    };
    let config = NbdSourceConfig::new(Address::Unix("/nowhere".into()), "");
    let line = Line::attaching(wire, negotiated, &config, Some(Arc::clone(ticket)));
    let (sender, receiver) = channel();
    let done = move |outcome| sender.send(outcome).unwrap();
    let limits = (1, 1 << 20, 1 << 20);
    for job in Job::reads(Lane::Demand, 4096, 512, limits, Box::new(done)) {
        assert!(line.submit(job).is_ok());
    }
    assert!(line.waiting_since().is_some());
    let ended = frames::read(&line, None).unwrap();
    let answer: Option<Result<crate::source::Fetched, _>> = receiver.try_recv().ok();
    (
        answer.map(|fetched| fetched.unwrap().data),
        ended.why.kind(),
    )
}

#[test]
fn what_was_asked_behind_a_refusal_is_not_believed() {
    let ticket = Ticket::new([1; 16], None, Stance::Arriving, true);
    let refused = Told::Refused("its fence is gone".to_owned());
    let (data, why) = read_behind(&refused, &ticket);
    assert_eq!((data, why), (None, SourceErrorKind::Untrusted));
    // Nor what comes behind something else than an answer.
    let (data, why) = read_behind(&Told::Fine, &ticket);
    assert_eq!((data, why), (None, SourceErrorKind::Untrusted));
    assert!(ticket.attached().is_none());
}

#[test]
fn what_was_asked_behind_a_welcome_is_answered() {
    let ticket = Ticket::new([1; 16], None, Stance::Arriving, true);
    let attached = Attached {
        generation: 7,
        ..Attached::default()
    };
    let (data, why) = read_behind(&Told::Attached(attached), &ticket);
    assert_eq!(data.unwrap(), [0x5a; 512]);
    assert_eq!(why, SourceErrorKind::Disconnected);
    assert_eq!(ticket.attached(), Some(attached));
}
