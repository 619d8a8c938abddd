//! A client's bytes through the loop that serves frames, over a real socket, onto a volume in
//! memory. What must hold, whatever the client sends:
//! - what the daemon sends are frames of a server;
//! - each request is answered exactly once, in order and in whole, or the connection ends because
//!   the client broke the rules;
//! - data, hashes and extents are those of the disk;
//! - nothing a client says changes the disk, and a move comes to its end all the same, unless the
//!   disk was handed on;
//! - memory is bounded.

use std::collections::{BTreeMap, HashSet};

use hikkoshi_daemon::config::Transport;
use hikkoshi_daemon::front::Table;
use hikkoshi_nbd::client::{HandshakeConfig, Progress};
use hikkoshi_nbd::server::Outcome;
use hikkoshi_nbd::{client, server};
use hikkoshi_wan::transport::frame::Side;
use hikkoshi_wan::transport::message::{self, Request, Wish};
use hikkoshi_wan::transport::session::{Tell, Told};
use hikkoshi_wan::transport::{Decoder, Frame, Kind};

use super::{PROGRAM, script};
use crate::input::Input;
use crate::memory;
use crate::nbd_server::conversation;
use crate::nbd_server::disk::{Disk, Kind as DiskKind};
use crate::nbd_server::model::Model;

/// What is read elsewhere and waits (16 MiB), reads under way at the source, codecs, and what this
/// harness keeps itself.
const MEMORY_BOUND: usize = 96 << 20;

/// The way in.
pub fn run(how: u8, input: &mut Input<'_>) {
    let (kind, pace, luck) = (input.byte(), input.byte(), input.byte());
    let disk = Disk::new(DiskKind::of(kind), luck, Transport::Auto);
    let (mut sent, answered) = shake_hands(&disk.table);
    let start = sent.len();
    if how & PROGRAM == 0 {
        sent.extend_from_slice(input.rest());
    } else {
        sent.extend(script::client_bytes(input, disk.size()));
    }
    let asked = Asked::of(&sent[start..], disk.size());
    let bound = MEMORY_BOUND + 4 * sent.len();
    let mut replies = Replies::new(answered);
    let received = memory::within(bound, "a connection", || {
        conversation::hold_until(&disk, &sent, pace, |received| {
            replies.take(received);
            replies.ended >= asked.count()
        })
    });
    replies.take(&received);
    asked.check(&disk, replies.frames);
    disk.check(&Model::new(disk.content()), 0, 0);
}

/// What our client says until frames follow, and how many bytes the server says.
fn shake_hands(table: &Table) -> (Vec<u8>, usize) {
    let mut client = client::Handshake::new(HandshakeConfig {
        export: String::new(),
        structured: true,
        allocation: true,
        transport: true,
        opening: Vec::new(),
    })
    .unwrap();
    let mut server = server::Handshake::new();
    let (mut sent, mut taken) = (Vec::new(), 0);
    let (mut told, mut heard) = (Vec::new(), 0);
    loop {
        sent.extend(client.take_output());
        while taken < sent.len() {
            told.append(server.output());
            let progress = server.input(&sent[taken..], table);
            taken += progress.consumed;
            if matches!(progress.outcome, Outcome::NeedMore) {
                break;
            }
        }
        told.append(server.output());
        let next = heard + client.needed();
        let progress = client.receive(&told[heard..next]).unwrap();
        heard = next;
        if let Progress::Done(negotiated) = progress {
            assert!(negotiated.transport, "frames were not agreed on");
            assert_eq!(heard, told.len());
            sent.extend(client.take_output());
            return (sent, heard);
        }
    }
}

/// The frames that have come, and how many of them are the last of an answer.
struct Replies {
    decoder: Decoder,
    at: usize,
    frames: Vec<Frame>,
    ended: usize,
}

impl Replies {
    fn new(start: usize) -> Self {
        Self {
            decoder: Decoder::new(Side::Server),
            at: start,
            frames: Vec::new(),
            ended: 0,
        }
    }

    fn take(&mut self, received: &[u8]) {
        let Some(fresh) = received.get(self.at..) else {
            return;
        };
        self.decoder.push(fresh);
        self.at = received.len();
        while let Some(frame) = self.decoder.next_frame().expect("a frame of a server") {
            self.ended += usize::from(frame.header.last);
            self.frames.push(frame);
        }
    }
}

/// What a client has asked for, until it ended or broke the rules.
#[derive(Default)]
struct Asked {
    /// By number.
    wishes: BTreeMap<u64, Option<(Wish, u64, u32)>>,
    cancelled: HashSet<u64>,
    tells: Vec<u64>,
    /// Answers may be missing.
    broken: bool,
}

impl Asked {
    /// As the rules say.
    fn of(bytes: &[u8], size: u64) -> Self {
        let mut asked = Self::default();
        let mut decoder = Decoder::new(Side::Client);
        decoder.push(bytes);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) if asked.take(&frame, size).is_some() => {}
                Ok(None) => return asked,
                _ => {
                    asked.broken = true;
                    return asked;
                }
            }
        }
    }

    fn take(&mut self, frame: &Frame, size: u64) -> Option<()> {
        if frame.header.kind == Kind::Tell {
            Tell::decode(&frame.payload)?;
            self.tells.push(frame.header.id);
            return Some(());
        }
        let highest = self.wishes.last_key_value().map(|(id, _)| *id);
        let rises = |id: u64| highest.is_none_or(|highest| id > highest);
        match Request::parse(frame).ok()? {
            Request::Wish {
                id,
                wish,
                offset,
                len,
                ..
            } => {
                let inside = offset.checked_add(len.into())? <= size;
                (inside && rises(id)).then_some(())?;
                self.wishes.insert(id, Some((wish, offset, len)));
            }
            Request::Ping(id, _) | Request::Flush(id, _) => {
                rises(id).then_some(())?;
                self.wishes.insert(id, None);
            }
            Request::Cancel(id) => {
                (!rises(id)).then_some(())?;
                self.cancelled.insert(id);
            }
            Request::Promote(id, _) => (!rises(id)).then_some(())?,
        }
        Some(())
    }

    /// How many answers are due; more than there can be if the daemon is to hang up by itself.
    fn count(&self) -> usize {
        if self.broken {
            usize::MAX
        } else {
            self.wishes.len() + self.tells.len()
        }
    }

    fn check(&self, disk: &Disk, frames: Vec<Frame>) {
        let count = frames.len();
        let frames = super::unpacked(frames);
        assert_eq!(frames.len(), count, "our own packing does not add up");
        let mut answers: BTreeMap<u64, Vec<Frame>> = BTreeMap::new();
        let mut told = Vec::new();
        for frame in frames {
            if frame.header.kind == Kind::Told {
                told.push(frame);
            } else {
                let answer = answers.entry(frame.header.id).or_default();
                assert!(
                    answer.last().is_none_or(|before| !before.header.last),
                    "something follows the end of an answer"
                );
                answer.push(frame);
            }
        }
        self.check_told(disk, &told);
        for (id, answer) in &answers {
            let wish = self.wishes.get(id).expect("an answer to what was asked");
            self.check_answer(disk, *id, wish.as_ref(), answer);
        }
        // A volume may turn a client out that has said for which move it reads.
        let may_miss = self.broken || !self.tells.is_empty();
        for id in self.wishes.keys() {
            let whole = answers
                .get(id)
                .and_then(|answer| answer.last())
                .is_some_and(|frame| frame.header.last);
            assert!(whole || may_miss, "request {id} has no answer");
        }
    }

    fn check_told(&self, disk: &Disk, told: &[Frame]) {
        let mut due = self.tells.iter();
        let mut payload = Vec::new();
        for frame in told {
            payload.extend_from_slice(&frame.payload);
            if frame.header.last {
                assert_eq!(due.next(), Some(&frame.header.id), "told what nobody asked");
                let told = Told::decode(&payload, disk.size());
                assert!(told.is_some(), "an answer that our own client refuses");
                payload.clear();
            }
        }
    }

    fn check_answer(
        &self,
        disk: &Disk,
        id: u64,
        wish: Option<&(Wish, u64, u32)>,
        answer: &[Frame],
    ) {
        let cancelled = self.cancelled.contains(&id);
        let content = disk.content();
        let mut at = wish.map_or(0, |(_, offset, _)| *offset);
        for Frame { header, payload } in answer {
            match (header.kind, wish) {
                (Kind::End, None) => {}
                (Kind::End, Some(_)) => assert!(cancelled, "request {id} was not cancelled"),
                // None: FLUSH, which a source has a part in as well.
                (Kind::Error, Some(_) | None) => {
                    let why = message::parse_error(payload);
                    assert!(disk.has_refused(), "request {id} failed: {why:?}");
                }
                (Kind::Data | Kind::Zero, Some((Wish::Read { .. }, offset, len))) => {
                    assert_eq!(header.offset, at, "data out of order");
                    let (start, span) = (at as usize, header.span as usize);
                    at += u64::from(header.span);
                    let end = offset + u64::from(*len);
                    assert!(at <= end, "more than was asked for");
                    assert_eq!(header.last, at == end, "the end is told in the wrong place");
                    let bytes = match header.kind {
                        Kind::Zero => vec![0; span],
                        _ => payload.clone(),
                    };
                    assert!(content[start..start + span] == bytes, "other bytes");
                }
                (Kind::Hashes, Some((Wish::Hash { grain }, offset, len))) => {
                    assert_eq!((header.offset, header.span), (*offset, *len));
                    let start = *offset as usize;
                    let right = message::hashes_of(&content[start..start + *len as usize], *grain);
                    assert!(right.concat() == *payload, "hashes of something else");
                }
                (Kind::ExtentList, Some((Wish::Extents, offset, len))) => {
                    assert!(header.offset == *offset && header.span <= *len);
                    let extents = message::parse_extents(payload, header.span);
                    let mut at = *offset as usize;
                    for extent in extents.expect("extents that add up") {
                        let end = at + extent.len as usize;
                        let zero = content[at..end].iter().all(|byte| *byte == 0);
                        assert!(zero || !extent.zero, "data that is called zeroes");
                        at = end;
                    }
                }
                _ => panic!("a {:?} in answer to {wish:?}", header.kind),
            }
        }
    }
}
