//! A short program that makes a client's bytes: options and requests that are mostly well formed,
//! so that the fuzzer spends its time behind the parsers as well as in them.
//!
//! An instruction is a byte and its operands. Every byte sequence is a program.

use hikkoshi_nbd::client::encode_request;
use hikkoshi_nbd::wire::{self, command, command_flag, option};

use super::disk::READ_ONLY_NAME;
use crate::input::Input;

/// A program makes at most so many bytes.
const MOST_BYTES: usize = 2 << 20;

/// The instructions, by their numbers. The seeds are written in them.
pub mod op {
    /// Flags: the client's handshake flags.
    pub const FLAGS: u8 = 0;
    /// Kind, length, bytes: any option.
    pub const OPTION: u8 = 1;
    /// Asks for structured replies.
    pub const STRUCTURED: u8 = 2;
    /// Name, queries: chooses contexts.
    pub const SET_CONTEXTS: u8 = 3;
    /// Name, kinds: begins transmission.
    pub const GO: u8 = 4;
    /// Name: begins transmission, the old way.
    pub const EXPORT_NAME: u8 = 5;
    /// Name, kinds: asks about an export.
    pub const INFO: u8 = 6;
    /// Asks for the exports.
    pub const LIST: u8 = 7;
    /// Name, queries: lists contexts.
    pub const LIST_CONTEXTS: u8 = 8;
    /// Ends the handshake.
    pub const ABORT: u8 = 9;
    /// Range, flags.
    pub const READ: u8 = 10;
    /// Range, flags, fill.
    pub const WRITE: u8 = 11;
    /// Range, flags.
    pub const TRIM: u8 = 12;
    /// Range, flags.
    pub const ZEROES: u8 = 13;
    /// Flags.
    pub const FLUSH: u8 = 14;
    /// Range, flags.
    pub const CACHE: u8 = 15;
    /// Range, flags.
    pub const STATUS: u8 = 16;
    /// Ends politely.
    pub const DISCONNECT: u8 = 17;
    /// Flags, command, offset, length: any request, without a payload.
    pub const REQUEST: u8 = 18;
    /// Length, bytes: as they are.
    pub const BYTES: u8 = 19;
    /// How many instructions there are.
    pub const COUNT: u8 = 20;
}

/// The bytes that a program makes for a disk of `size` bytes.
pub fn client_bytes(program: &mut Input<'_>, size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while !program.is_empty() && out.len() < MOST_BYTES {
        step(program, size, &mut out);
    }
    out
}

fn step(program: &mut Input<'_>, size: u64, out: &mut Vec<u8>) {
    match program.byte() % op::COUNT {
        op::FLAGS => out.extend_from_slice(&u32::from(program.byte()).to_be_bytes()),
        op::OPTION => {
            let kind = u32::from(program.byte());
            let len = program.byte();
            put_option(out, kind, program.take(len.into()));
        }
        op::STRUCTURED => put_option(out, option::STRUCTURED_REPLY, &[]),
        op::SET_CONTEXTS => {
            let payload = contexts(program);
            put_option(out, option::SET_META_CONTEXT, &payload);
        }
        op::GO => {
            let payload = about(program);
            put_option(out, option::GO, &payload);
        }
        op::EXPORT_NAME => put_option(out, option::EXPORT_NAME, name(program).as_bytes()),
        op::INFO => {
            let payload = about(program);
            put_option(out, option::INFO, &payload);
        }
        op::LIST => put_option(out, option::LIST, &[]),
        op::LIST_CONTEXTS => {
            let payload = contexts(program);
            put_option(out, option::LIST_META_CONTEXT, &payload);
        }
        op::ABORT => put_option(out, option::ABORT, &[]),
        op::READ => ranged(program, size, command::READ, out),
        op::WRITE => {
            let (offset, len) = range(program, size);
            let (flags, fill) = (flags(program), program.byte());
            out.extend_from_slice(&encode_request(flags, command::WRITE, 0, offset, len));
            // Every sector differs, so that one in the wrong place is noticed.
            out.extend((0..len).map(|n| fill.wrapping_add((n / 512) as u8)));
        }
        op::TRIM => ranged(program, size, command::TRIM, out),
        op::ZEROES => ranged(program, size, command::WRITE_ZEROES, out),
        op::FLUSH => {
            let flags = flags(program);
            out.extend_from_slice(&encode_request(flags, command::FLUSH, 0, 0, 0));
        }
        op::CACHE => ranged(program, size, command::CACHE, out),
        op::STATUS => ranged(program, size, command::BLOCK_STATUS, out),
        op::DISCONNECT => out.extend_from_slice(&encode_request(0, command::DISC, 0, 0, 0)),
        op::REQUEST => {
            let (flags, command) = (program.u16(), program.u16());
            let (offset, len) = (program.u64(), program.u32());
            out.extend_from_slice(&encode_request(flags, command, 0, offset, len));
        }
        _ => {
            let len = program.byte();
            out.extend_from_slice(program.take(len.into()));
        }
    }
}

fn ranged(program: &mut Input<'_>, size: u64, command: u16, out: &mut Vec<u8>) {
    let (offset, len) = range(program, size);
    let flags = flags(program);
    out.extend_from_slice(&encode_request(flags, command, 0, offset, len));
}

/// Unit, offset and length in units: mostly inside the disk, now and then across its end.
pub(crate) fn range(program: &mut Input<'_>, size: u64) -> (u64, u32) {
    let unit = [512, 1, 4096, 333][program.below(4)];
    let (offset, len) = (u64::from(program.u16()), u32::from(program.byte()));
    (offset * unit % (size + 1024), len * unit as u32)
}

/// One flag at most is what most requests have.
fn flags(program: &mut Input<'_>) -> u16 {
    match program.byte() {
        0..128 => 0,
        byte => [
            command_flag::FUA,
            command_flag::NO_HOLE,
            command_flag::DF,
            command_flag::REQ_ONE,
            command_flag::FAST_ZERO,
            command_flag::FUA | command_flag::NO_HOLE,
            command_flag::FUA | command_flag::FAST_ZERO,
            u16::from(byte),
        ][usize::from(byte % 8)],
    }
}

fn name(program: &mut Input<'_>) -> &'static str {
    ["", READ_ONLY_NAME, "none", ""][program.below(4)]
}

fn about(program: &mut Input<'_>) -> Vec<u8> {
    let mut payload = Vec::new();
    put_string(&mut payload, name(program).as_bytes());
    let kinds = program.byte();
    let wanted: Vec<u16> = (0..8).filter(|bit| kinds >> bit & 1 == 1).collect();
    payload.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
    wanted
        .iter()
        .for_each(|kind| payload.extend_from_slice(&kind.to_be_bytes()));
    payload
}

fn contexts(program: &mut Input<'_>) -> Vec<u8> {
    let queries = [
        wire::BASE_ALLOCATION,
        wire::RESIDENCY,
        "base:",
        "x-hikkoshi:",
        "qemu:x",
    ];
    let mut payload = Vec::new();
    put_string(&mut payload, name(program).as_bytes());
    let chosen = program.byte();
    let wanted: Vec<&str> = (0..queries.len())
        .filter(|bit| chosen >> bit & 1 == 1)
        .map(|bit| queries[bit])
        .collect();
    payload.extend_from_slice(&(wanted.len() as u32).to_be_bytes());
    for query in wanted {
        put_string(&mut payload, query.as_bytes());
    }
    payload
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text);
}

/// Appends an option as a client sends it.
pub fn put_option(out: &mut Vec<u8>, kind: u32, payload: &[u8]) {
    out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    put_string(out, payload);
}
