//! A server's bytes through our client: the handshake, the receiving loop, and the way from
//! replies to what the volume gets.
//!
//! The first bytes say what is asked for; the rest are the server's, as they are or made by a
//! [`script`]. What must hold, whatever the server sends:
//! - every request ends exactly once, well or badly;
//! - a read that ended well has just the bytes that the server sent for just that place, all of
//!   them, and zeroes only where the server said so (`reference.rs` reads the stream once more, in
//!   another way);
//! - extents come in order and without gaps, and lie within what was asked;
//! - memory is bounded by what was asked for.

mod reference;
pub mod script;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use hikkoshi_nbd::client::{Handshake, HandshakeConfig, Negotiated, Progress};
use hikkoshi_nbd::wire::REQUEST_BYTES;
use hikkoshi_wan::nbd_source::fuzzing::converse;
use hikkoshi_wan::{Address, ExtentsAnswer, Fetched, Lane, NbdSourceConfig, Source, SourceError};
use socket2::Socket;

use crate::input::Input;
use crate::memory;
use reference::Reference;

/// Reads are asked for from regions of their own, so that each byte on the wire has one reader.
/// A multiple of the largest minimum block, and longer than a read and its rounding.
pub const REGION: u64 = 256 << 10;

/// The server's bytes must fit into a socket's buffer: they are all sent before anybody reads.
const MOST_SERVER_BYTES: usize = 64 << 10;

/// Buffers, one reply to an option (64 KiB), the extents of one answer.
const MEMORY_BOUND: usize = 1 << 20;

/// What rounding to the largest minimum block adds to a read, both ends together.
const MOST_ROUNDING: usize = 128 << 10;

/// What is asked of the server.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// In which queue.
    pub lane: Lane,
    /// Extents, not data.
    pub extents: bool,
    /// Where.
    pub offset: u64,
    /// How much.
    pub len: u32,
}

/// How a question ended.
enum End {
    Data(Fetched),
    Extents(ExtentsAnswer),
    Failed(SourceError),
}

/// The questions that an input begins with.
pub fn questions(input: &mut Input<'_>) -> Vec<Question> {
    (0..input.below(8))
        .map(|n| {
            let how = input.byte();
            let (skew, len) = (u64::from(input.byte()), u32::from(input.u16()));
            Question {
                lane: if how & 1 == 0 {
                    Lane::Demand
                } else {
                    Lane::Bulk
                },
                extents: how & 6 == 6,
                offset: n as u64 * REGION + skew * [512, 1][usize::from(how >> 3 & 1)],
                len: len * [2, 1][usize::from(how >> 4 & 1)],
            }
        })
        .collect()
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.byte();
    let questions = questions(&mut input);
    let mut server = if how & 0x80 == 0 {
        input.rest().to_vec()
    } else {
        script::server_bytes(&mut input, &questions)
    };
    server.truncate(MOST_SERVER_BYTES);
    let mut config = NbdSourceConfig::new(
        Address::Unix("fuzzed".into()),
        ["", "web"][usize::from(how & 1)],
    );
    // The end of the bytes ends the connection; no clock is needed.
    config.progress_timeout = None;
    // Plain NBD: the frames have a target of their own.
    config.frames = false;
    config.in_flight = [64, 2][usize::from(how >> 1 & 1)];
    let asked: usize = questions
        .iter()
        .map(|q| q.len as usize + MOST_ROUNDING)
        .sum();
    let at_once = how & 4 != 0;
    let bound = MEMORY_BOUND + 4 * asked;
    attempt(&server, config, at_once, &questions, bound);
}

fn attempt(
    server: &[u8],
    config: NbdSourceConfig,
    at_once: bool,
    questions: &[Question],
    bound: usize,
) {
    let ends: Arc<Mutex<Vec<Option<End>>>> =
        Arc::new(Mutex::new(questions.iter().map(|_| None).collect()));
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.write_all(server).unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    let export = config.export.clone();
    let agreed = memory::within(bound, "a source", || {
        converse(
            Socket::from(OwnedFd::from(ours)),
            config,
            at_once,
            |source| {
                for (n, question) in questions.iter().enumerate() {
                    ask(source, *question, n, &ends);
                }
            },
        )
    });
    let rehearsed = rehearse(server, export, at_once);
    let mut ends = ends.lock().unwrap();
    let Ok(()) = agreed else {
        assert!(rehearsed.is_none(), "a handshake failed that can succeed");
        assert!(
            ends.iter().all(Option::is_none),
            "an answer without a question"
        );
        return;
    };
    let (negotiated, sent, output) = rehearsed.expect("it succeeded before");
    let wire_requests = received(&mut theirs, output);
    let reference = Reference::read(&server[sent..], &negotiated, &wire_requests);
    for (n, (question, end)) in questions.iter().zip(ends.iter_mut()).enumerate() {
        match end.take() {
            None => panic!("question {n} never ended"),
            Some(End::Failed(error)) => {
                assert!(!error.message.is_empty(), "an error without words")
            }
            Some(End::Data(fetched)) => check_data(*question, &fetched, &reference),
            Some(End::Extents(answer)) => check_extents(*question, &answer),
        }
    }
}

fn ask(source: &dyn Source, question: Question, n: usize, ends: &Arc<Mutex<Vec<Option<End>>>>) {
    let told = Arc::clone(ends);
    let tell = move |end| {
        let before = told.lock().unwrap()[n].replace(end);
        assert!(before.is_none(), "question {n} ended twice");
    };
    let Question {
        lane, offset, len, ..
    } = question;
    if question.extents {
        let done = move |answer: Result<_, _>| tell(answer.map_or_else(End::Failed, End::Extents));
        source.extents(lane, offset, len.into(), Box::new(done));
    } else {
        let done = move |answer: Result<_, _>| tell(answer.map_or_else(End::Failed, End::Data));
        source.read(lane, offset, len, Box::new(done));
    }
}

/// The handshake once more, without a socket: what it leads to, how many bytes of the server's it
/// takes, and how many of ours it sends.
fn rehearse(server: &[u8], export: String, at_once: bool) -> Option<(Negotiated, usize, usize)> {
    let wanted = HandshakeConfig {
        export,
        structured: true,
        allocation: true,
        transport: false,
        opening: Vec::new(),
    };
    let mut handshake = if at_once {
        Handshake::at_once(wanted).unwrap()
    } else {
        Handshake::new(wanted).unwrap()
    };
    let (mut at, mut sent) = (0, 0);
    loop {
        sent += handshake.take_output().len();
        let bytes = server.get(at..at + handshake.needed())?;
        at += bytes.len();
        if let Progress::Done(negotiated) = handshake.receive(bytes).ok()? {
            return Some((negotiated, at, sent + handshake.take_output().len()));
        }
    }
}

/// The requests that the server got: offset and length, by cookie.
fn received(theirs: &mut UnixStream, handshake_bytes: usize) -> Vec<(u64, u32)> {
    theirs.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    match theirs.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset) => {}
        Err(e) => panic!("{e}"),
    }
    let requests = bytes.get(handshake_bytes..).unwrap_or_default();
    requests
        .chunks_exact(REQUEST_BYTES)
        .enumerate()
        .map(|(n, request)| {
            let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
            assert_eq!(cookie, n as u64, "cookies are counted");
            let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
            let len = u32::from_be_bytes(request[24..].try_into().unwrap());
            (offset, len)
        })
        .collect()
}

fn check_data(question: Question, fetched: &Fetched, reference: &Reference) {
    assert_eq!(fetched.offset, question.offset);
    assert_eq!(
        fetched.data.len(),
        question.len as usize,
        "a read of the wrong length"
    );
    for (at, byte) in (question.offset..).zip(&fetched.data) {
        assert_eq!(
            Some(*byte),
            reference.byte(at),
            "byte {at} of the disk is not what the server sent"
        );
    }
    let mut before = question.offset;
    for (offset, len) in &fetched.holes {
        assert!(*len > 0 && *offset >= before, "holes overlap, or are empty");
        before = offset + len;
        let start = (offset - question.offset) as usize;
        let hole = &fetched.data[start..start + *len as usize];
        assert!(hole.iter().all(|byte| *byte == 0), "a hole with data in it");
    }
    let most = reference.wire_bytes() + 2 * u64::from(question.len) + 28;
    assert!(
        fetched.wire_bytes <= most,
        "more bytes than crossed the wire"
    );
}

fn check_extents(question: Question, answer: &ExtentsAnswer) {
    assert!(!answer.extents.is_empty(), "an answer that tells nothing");
    let mut at = question.offset;
    for extent in &answer.extents {
        assert_eq!(extent.offset, at, "a gap between extents");
        assert!(extent.len > 0, "an empty extent");
        at += extent.len;
    }
    assert!(
        at <= question.offset + u64::from(question.len),
        "extents past what was asked for"
    );
}
