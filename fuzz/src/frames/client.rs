//! A server's bytes through our client's dialect of frames. What must hold, whatever the server
//! sends:
//! - every request ends exactly once, well or badly;
//! - a read that ended well has just the bytes that frames with its number brought, in order, from
//!   its first to its last, and zeroes where it is said that there is a hole;
//! - hashes are those that were sent, as many as there are grains; extents come in order and lie
//!   within what was asked;
//! - memory is bounded by what was asked for.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_nbd::client::{Handshake, HandshakeConfig, Progress};
use hikkoshi_nbd::wire::{self, info, option, reply};
use hikkoshi_wan::nbd_source::fuzzing::{converse, exchange};
use hikkoshi_wan::transport::frame::Side;
use hikkoshi_wan::transport::message::{Request, Wish};
use hikkoshi_wan::transport::{Decoder, Frame, Kind};
use hikkoshi_wan::{
    Address, ExtentsAnswer, Fetched, Hashes, Lane, NbdSourceConfig, Source, SourceError,
};
use socket2::Socket;

use super::script::{self, Known, What};
use super::{PROGRAM, frames_of, unpacked};
use crate::input::Input;
use crate::memory;
use crate::nbd_client::script::option_reply;

/// Bit of the first byte: behind the questions it is asked to flush.
const FLUSH: u8 = 0x10;

/// Where the number of that is kept: no region is there.
const FLUSH_REGION: u64 = u64::MAX;

/// Each question has a region of its own.
const REGION: u64 = 256 << 10;

/// The disk that the server says it has.
const DISK_BYTES: u64 = 64 * REGION;

/// Buffers, a frame, what is made of it.
const MEMORY_BOUND: usize = 2 << 20;

/// No end of patience: the end of the bytes is the end of the connection.
const PATIENCE: Duration = Duration::from_secs(600);

/// A question, and how it is asked.
struct Question {
    known: Known,
    lane: Lane,
    /// Told to be urgent after it was asked.
    promoted: bool,
}

enum End {
    Data(Fetched),
    Extents(ExtentsAnswer),
    Hashes(Hashes),
    Failed(SourceError),
}

fn questions(input: &mut Input<'_>) -> Vec<Question> {
    (0..input.below(8))
        .map(|n| {
            let how = input.byte();
            let (skew, len) = (u64::from(input.byte()), u32::from(input.u16()));
            Question {
                known: Known {
                    offset: n as u64 * REGION + skew * 512,
                    len: len * [2, 1][usize::from(how >> 4 & 1)],
                    what: match how >> 1 & 3 {
                        0 | 1 => What::Data,
                        2 => What::Extents,
                        _ => What::Hashes {
                            grain: 512 << (how >> 5),
                        },
                    },
                },
                lane: [Lane::Demand, Lane::Bulk][usize::from(how & 1)],
                promoted: how & 8 == 8,
            }
        })
        .collect()
}

/// The way in.
pub fn run(how: u8, input: &mut Input<'_>) {
    let questions = questions(input);
    let known: Vec<Known> = questions.iter().map(|q| q.known).collect();
    let mut server = handshake();
    let start = server.len();
    if how & PROGRAM == 0 {
        server.extend_from_slice(input.rest());
    } else {
        server.extend(script::server_bytes(input, &known));
    }
    server.truncate(script::MOST_BYTES);
    let mut config = NbdSourceConfig::new(Address::Unix("fuzzed".into()), "");
    config.progress_timeout = None;
    config.in_flight = [64, 2][usize::from(how >> 3 & 1)];
    let ends: Arc<Mutex<Vec<Option<End>>>> =
        Arc::new(Mutex::new(questions.iter().map(|_| None).collect()));
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.write_all(&server).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let flushed = Arc::new(Mutex::new(None));
    let asked: usize = known.iter().map(|known| known.len as usize).sum();
    memory::within(MEMORY_BOUND + 4 * asked, "a source", || {
        converse(Socket::from(OwnedFd::from(ours)), config, true, |source| {
            for (n, question) in questions.iter().enumerate() {
                ask(source, question, n, &ends);
            }
            if how & FLUSH != 0 {
                let told = Arc::clone(&flushed);
                source.flush(Box::new(move |end: Result<_, _>| {
                    let before = told.lock().unwrap().replace(end.is_ok());
                    assert!(before.is_none(), "the flush ended twice");
                }));
            }
        })
    })
    .expect("a handshake that is right");
    let wire = received(&mut theirs);
    let frames = unpacked(frames_of(&server[start..]));
    let flushed = *flushed.lock().unwrap();
    assert_eq!(flushed.is_some(), how & FLUSH != 0, "the flush never ended");
    if flushed == Some(true) {
        let answer = brought(wire[&FLUSH_REGION], &frames);
        let done = |frame: &&&Frame| frame.header.kind == Kind::End && frame.header.last;
        assert!(
            answer.last().filter(done).is_some(),
            "nobody said that the flush was done"
        );
    }
    let mut ends = ends.lock().unwrap();
    for (n, (question, end)) in questions.iter().zip(ends.iter_mut()).enumerate() {
        let brought = wire
            .get(&(question.known.offset / REGION))
            .map(|id| brought(*id, &frames))
            .unwrap_or_default();
        match end.take() {
            None => panic!("question {n} never ended"),
            Some(End::Failed(error)) => {
                assert!(!error.message.is_empty(), "an error without words");
            }
            Some(End::Data(fetched)) => check_data(question.known, &fetched, &brought),
            Some(End::Extents(answer)) => check_extents(question.known, &answer),
            Some(End::Hashes(hashes)) => check_hashes(question.known, &hashes, &brought),
        }
    }
}

/// An answer about a move, as it is waited for.
pub fn answer_about_a_move(how: u8, input: &mut Input<'_>) {
    let tell = script::tell(input);
    let mut server = if how & PROGRAM == 0 {
        input.rest().to_vec()
    } else {
        script::server_bytes(input, &[])
    };
    server.truncate(script::MOST_BYTES);
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.write_all(&server).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let ours = Socket::from(OwnedFd::from(ours));
    let told = memory::within(MEMORY_BOUND, "an answer about a move", || {
        exchange(&ours, &tell, DISK_BYTES, PATIENCE)
    });
    let Ok(told) = told else { return };
    let frames = frames_of(&server);
    let end = frames.iter().position(|frame| frame.header.last).unwrap();
    let payload: Vec<u8> = frames[..=end]
        .iter()
        .flat_map(|frame| frame.payload.clone())
        .collect();
    let reference = hikkoshi_wan::transport::session::Told::decode(&payload, DISK_BYTES);
    assert_eq!(Some(told), reference, "an answer that nobody gave");
}

/// What a server of ours says until frames follow.
fn handshake() -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(&wire::INIT_MAGIC.to_be_bytes());
    out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&3_u16.to_be_bytes());
    option_reply(&mut out, option::STRUCTURED_REPLY, reply::ACK, &[]);
    for (id, name) in [(0_u32, wire::BASE_ALLOCATION), (1, wire::TRANSPORT)] {
        let payload = [&id.to_be_bytes()[..], name.as_bytes()].concat();
        option_reply(
            &mut out,
            option::SET_META_CONTEXT,
            reply::META_CONTEXT,
            &payload,
        );
    }
    option_reply(&mut out, option::SET_META_CONTEXT, reply::ACK, &[]);
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend_from_slice(&DISK_BYTES.to_be_bytes());
    export.extend_from_slice(&1_u16.to_be_bytes());
    option_reply(&mut out, option::GO, reply::INFO, &export);
    option_reply(&mut out, option::GO, reply::ACK, &[]);
    out
}

/// How many bytes our client says until frames follow.
fn handshake_output() -> usize {
    let server = handshake();
    let mut handshake = Handshake::new(HandshakeConfig {
        export: String::new(),
        structured: true,
        allocation: true,
        transport: true,
        opening: Vec::new(),
    })
    .unwrap();
    let (mut at, mut sent) = (0, 0);
    loop {
        sent += handshake.take_output().len();
        let next = at + handshake.needed();
        let progress = handshake.receive(&server[at..next]).unwrap();
        at = next;
        if let Progress::Done(negotiated) = progress {
            assert!(negotiated.transport && at == server.len());
            return sent + handshake.take_output().len();
        }
    }
}

fn ask(source: &dyn Source, question: &Question, n: usize, ends: &Arc<Mutex<Vec<Option<End>>>>) {
    let told = Arc::clone(ends);
    let tell = move |end| {
        let before = told.lock().unwrap()[n].replace(end);
        assert!(before.is_none(), "question {n} ended twice");
    };
    let Known { offset, len, what } = question.known;
    let lane = question.lane;
    match what {
        What::Data => {
            let done = move |end: Result<_, _>| tell(end.map_or_else(End::Failed, End::Data));
            source.read(lane, offset, len, Box::new(done));
        }
        What::Extents => {
            let done = move |end: Result<_, _>| tell(end.map_or_else(End::Failed, End::Extents));
            source.extents(lane, offset, len.into(), Box::new(done));
        }
        What::Hashes { grain } => {
            let done = move |end: Result<_, _>| tell(end.map_or_else(End::Failed, End::Hashes));
            source.hashes(lane, offset, len, grain, Box::new(done));
        }
    }
    if question.promoted {
        source.promote(offset, len.into());
    }
}

/// The numbers that questions had on the wire, by region.
fn received(theirs: &mut UnixStream) -> HashMap<u64, u64> {
    theirs.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    match theirs.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset) => {}
        Err(e) => panic!("{e}"),
    }
    let mut decoder = Decoder::new(Side::Client);
    decoder.push(bytes.get(handshake_output()..).unwrap_or_default());
    let mut ids = HashMap::new();
    while let Some(frame) = decoder.next_frame().expect("frames of a client") {
        let request = Request::parse(&frame).expect("a request");
        if let Request::Flush(id, _) = request {
            ids.insert(FLUSH_REGION, id);
        }
        if let Request::Wish {
            id, offset, wish, ..
        } = request
        {
            let before = ids.insert(offset / REGION, id);
            // Hashes of what frames cannot ask for are made here, of what is read.
            assert!(before.is_none() || matches!(wish, Wish::Read { .. }));
        }
    }
    ids
}

/// The frames with this number, up to the last of the answer.
fn brought(id: u64, frames: &[Frame]) -> Vec<&Frame> {
    let mut brought = Vec::new();
    for frame in frames.iter().filter(|frame| frame.header.id == id) {
        brought.push(frame);
        if frame.header.last {
            break;
        }
    }
    brought
}

fn check_data(question: Known, fetched: &Fetched, brought: &[&Frame]) {
    assert_eq!(fetched.offset, question.offset);
    assert_eq!(
        fetched.data.len(),
        question.len as usize,
        "a read of the wrong length"
    );
    if question.len == 0 {
        return;
    }
    let first = brought.first().expect("bytes came from somewhere");
    let start = first.header.offset;
    let (mut at, mut bytes, mut crossed) = (start, Vec::new(), 40);
    for Frame { header, payload } in brought {
        crossed += 40 + u64::from(header.payload_len);
        let span = header.span as usize;
        match header.kind {
            Kind::Zero => bytes.resize(bytes.len() + span, 0),
            Kind::Data => bytes.extend_from_slice(payload),
            Kind::End => {}
            other => panic!("{other:?} was taken for data"),
        }
        assert!(span == 0 || header.offset == at, "a gap was taken");
        at += u64::from(header.span);
    }
    let skew = (question.offset - start) as usize;
    assert!(
        bytes[skew..skew + fetched.data.len()] == fetched.data[..],
        "bytes of the disk are not what the server sent"
    );
    let mut before = question.offset;
    for (offset, len) in &fetched.holes {
        assert!(*len > 0 && *offset >= before, "holes overlap, or are empty");
        before = offset + len;
        let start = (offset - question.offset) as usize;
        let hole = &fetched.data[start..start + *len as usize];
        assert!(hole.iter().all(|byte| *byte == 0), "a hole with data in it");
    }
    assert_eq!(fetched.wire_bytes, crossed, "the wire is miscounted");
}

fn check_extents(question: Known, answer: &ExtentsAnswer) {
    assert!(!answer.extents.is_empty(), "an answer that tells nothing");
    let mut at = question.offset;
    for extent in &answer.extents {
        assert_eq!(extent.offset, at, "a gap between extents");
        assert!(extent.len > 0, "an empty extent");
        at += extent.len;
    }
    let end = question.offset + u64::from(question.len);
    assert!(at <= end, "extents past what was asked for");
}

fn check_hashes(question: Known, hashes: &Hashes, brought: &[&Frame]) {
    let What::Hashes { grain } = question.what else {
        panic!("hashes in answer to something else");
    };
    assert_eq!((hashes.offset, hashes.grain), (question.offset, grain));
    assert_eq!(hashes.hashes.len(), question.len.div_ceil(grain) as usize);
    if hashes.at_source {
        let sent = brought.last().expect("they came from somewhere");
        assert!(hashes.hashes.concat() == sent.payload, "other hashes");
    }
}
