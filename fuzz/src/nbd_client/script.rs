//! A short program that makes a server's bytes: a handshake and replies that are mostly well
//! formed, with what is asked for known.

use hikkoshi_nbd::server::ReplyStyle;
use hikkoshi_nbd::server::reply::{
    Last, data_header, done_chunk, hole_chunk, push_block_status, simple_reply,
};
use hikkoshi_nbd::wire::{self, Errno, info, option, reply};

use super::{Question, REGION};
use crate::input::Input;

/// The instructions, by their numbers. The seeds are written in them.
pub mod op {
    /// Flags: the greeting.
    pub const GREETING: u8 = 0;
    /// Option, code, length, bytes: any reply to an option.
    pub const REPLY: u8 = 1;
    /// Option: its acknowledgement.
    pub const ACK: u8 = 2;
    /// Id: `base:allocation`.
    pub const CONTEXT: u8 = 3;
    /// Size, flags: about the export.
    pub const EXPORT: u8 = 4;
    /// Shifts: its block sizes.
    pub const BLOCK_SIZES: u8 = 5;
    /// Option, code: a refusal.
    pub const REFUSAL: u8 = 6;
    /// Size, flags: the answer to EXPORT_NAME.
    pub const EXPORT_NAME: u8 = 7;
    /// Cookie: all data of that question, in a simple reply.
    pub const SIMPLE: u8 = 8;
    /// Cookie, place, length, last: a chunk of data.
    pub const DATA: u8 = 9;
    /// Cookie, place, length, last: a chunk of zeroes.
    pub const HOLE: u8 = 10;
    /// Cookie: the last chunk.
    pub const DONE: u8 = 11;
    /// Cookie, id, number, lengths and flags, last: extents.
    pub const STATUS: u8 = 12;
    /// Cookie, error: an error.
    pub const ERROR: u8 = 13;
    /// Cookie: all data of that question, in one chunk.
    pub const WHOLE: u8 = 14;
    /// Flags, kind, cookie, length, bytes: any chunk.
    pub const CHUNK: u8 = 15;
    /// Length, bytes: as they are.
    pub const BYTES: u8 = 16;
    /// How many instructions there are.
    pub const COUNT: u8 = 17;
}

/// The bytes that a program makes.
pub fn server_bytes(program: &mut Input<'_>, questions: &[Question]) -> Vec<u8> {
    let mut out = Vec::new();
    while !program.is_empty() && out.len() < super::MOST_SERVER_BYTES {
        step(program, questions, &mut out);
    }
    out
}

fn step(program: &mut Input<'_>, questions: &[Question], out: &mut Vec<u8>) {
    match program.byte() % op::COUNT {
        op::GREETING => {
            out.extend_from_slice(&wire::INIT_MAGIC.to_be_bytes());
            out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
            out.extend_from_slice(&u16::from(program.byte()).to_be_bytes());
        }
        op::REPLY => {
            let (asked, code, len) = (program.byte(), program.u32(), program.byte());
            option_reply(out, asked.into(), code, program.take(len.into()));
        }
        op::ACK => option_reply(out, program.byte().into(), reply::ACK, &[]),
        op::CONTEXT => {
            let mut payload = u32::from(program.byte()).to_be_bytes().to_vec();
            payload.extend_from_slice(wire::BASE_ALLOCATION.as_bytes());
            option_reply(out, option::SET_META_CONTEXT, reply::META_CONTEXT, &payload);
        }
        op::EXPORT => {
            let mut payload = info::EXPORT.to_be_bytes().to_vec();
            payload.extend_from_slice(&export(program));
            option_reply(out, option::GO, reply::INFO, &payload);
        }
        op::BLOCK_SIZES => {
            let mut payload = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for _ in 0..3 {
                payload.extend_from_slice(&(1_u32 << (program.byte() % 32)).to_be_bytes());
            }
            option_reply(out, option::GO, reply::INFO, &payload);
        }
        op::REFUSAL => {
            let (asked, code) = (program.byte(), program.byte());
            let code = reply::ERROR_BIT | u32::from(code % 12);
            option_reply(out, asked.into(), code, b"no");
        }
        op::EXPORT_NAME => out.extend_from_slice(&export(program)),
        op::SIMPLE => {
            let (cookie, question) = known(program, questions);
            out.extend_from_slice(&simple_reply(cookie, None));
            put_data(out, question.offset, question.len);
        }
        op::DATA => {
            let (cookie, offset, len, last) = part(program, questions);
            out.extend_from_slice(&data_header(cookie, offset, len, last));
            put_data(out, offset, len);
        }
        op::HOLE => {
            let (cookie, offset, len, last) = part(program, questions);
            out.extend_from_slice(&hole_chunk(cookie, offset, len, last));
        }
        op::DONE => out.extend_from_slice(&done_chunk(known(program, questions).0)),
        op::STATUS => {
            let (cookie, _) = known(program, questions);
            let id = program.byte();
            let extents: Vec<(u32, u32)> = (0..program.below(6))
                .map(|_| (u32::from(program.u16()), u32::from(program.byte())))
                .collect();
            let last = last(program);
            push_block_status(out, cookie, id.into(), &extents, last);
        }
        op::ERROR => {
            let (cookie, _) = known(program, questions);
            let how = program.byte();
            let errno = Errno::from_code(u32::from(how) >> 1);
            if how & 1 == 0 {
                ReplyStyle::Structured.push_error(out, cookie, errno, "no");
            } else {
                ReplyStyle::Simple.push_error(out, cookie, errno, "no");
            }
        }
        op::WHOLE => {
            let (cookie, question) = known(program, questions);
            let header = data_header(cookie, question.offset, question.len, Last::Yes);
            out.extend_from_slice(&header);
            put_data(out, question.offset, question.len);
        }
        op::CHUNK => {
            out.extend_from_slice(&wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
            out.extend_from_slice(&program.u16().to_be_bytes());
            out.extend_from_slice(&program.u16().to_be_bytes());
            out.extend_from_slice(&u64::from(program.byte()).to_be_bytes());
            out.extend_from_slice(&program.u32().to_be_bytes());
            let len = program.byte();
            out.extend_from_slice(program.take(len.into()));
        }
        _ => {
            let len = program.byte();
            out.extend_from_slice(program.take(len.into()));
        }
    }
}

/// A question by its cookie. Most are what the client sends: one request for each, in order.
fn known(program: &mut Input<'_>, questions: &[Question]) -> (u64, Question) {
    let cookie = program.byte();
    let none = Question {
        lane: hikkoshi_wan::Lane::Demand,
        extents: false,
        offset: u64::from(cookie) * REGION,
        len: 512,
    };
    let question = questions.get(usize::from(cookie)).copied();
    (cookie.into(), question.unwrap_or(none))
}

/// A part of a question: place and length in sixteenths of it.
fn part(program: &mut Input<'_>, questions: &[Question]) -> (u64, u64, u32, Last) {
    let (cookie, question) = known(program, questions);
    let (place, count) = (u32::from(program.byte()), u32::from(program.byte()));
    let grain = (question.len / 16).max(1);
    let offset = question.offset + u64::from(place * grain);
    (cookie, offset, count * grain, last(program))
}

fn last(program: &mut Input<'_>) -> Last {
    if program.byte() & 1 == 0 {
        Last::No
    } else {
        Last::Yes
    }
}

/// A size that fits the questions, mostly, and flags.
fn export(program: &mut Input<'_>) -> Vec<u8> {
    let size = match program.byte() {
        0 => program.u64(),
        n => u64::from(n) * (64 << 10),
    };
    let mut bytes = size.to_be_bytes().to_vec();
    bytes.extend_from_slice(&program.u16().to_be_bytes());
    bytes
}

/// What a disk holds there: every byte tells its place.
fn put_data(out: &mut Vec<u8>, offset: u64, len: u32) {
    let room = super::MOST_SERVER_BYTES as u64;
    out.extend((0..u64::from(len).min(room)).map(|n| ((offset + n) % 251) as u8));
}

/// Appends a reply to an option as a server sends it.
pub fn option_reply(out: &mut Vec<u8>, asked: u32, code: u32, payload: &[u8]) {
    out.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&asked.to_be_bytes());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
}
