//! Replies, byte by byte, as the document draws them.

use super::*;

const COOKIE: u64 = 0x0102_0304_0506_0708;
const COOKIE_BYTES: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

/// The header of a chunk, spelt out.
fn chunk(flags: u16, kind: u16, payload_bytes: u32) -> Vec<u8> {
    [
        &[0x66, 0x8e, 0x33, 0xef][..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &COOKIE_BYTES,
        &payload_bytes.to_be_bytes(),
    ]
    .concat()
}

fn simple(error: u32) -> Vec<u8> {
    [
        &[0x67, 0x44, 0x66, 0x98][..],
        &error.to_be_bytes(),
        &COOKIE_BYTES,
    ]
    .concat()
}

#[test]
fn reads_in_one_piece() {
    for (style, expected) in [
        (ReplyStyle::Simple, simple(0)),
        (
            ReplyStyle::Structured,
            [chunk(1, 1, 8 + 4096), 0x1000_u64.to_be_bytes().to_vec()].concat(),
        ),
    ] {
        assert_eq!(expected.len(), style.read_header_bytes());
        let mut laid_out = [0xee; 40];
        style.put_read_header(&mut laid_out, COOKIE, 0x1000, 4096);
        assert_eq!(laid_out[..expected.len()], expected);
        assert!(laid_out[expected.len()..].iter().all(|byte| *byte == 0xee));
        let mut pushed = Vec::new();
        style.push_read_header(&mut pushed, COOKIE, 0x1000, 4096);
        assert_eq!(pushed, expected);
    }
}

#[test]
fn reads_in_pieces() {
    let offset = 0x2000_u64.to_be_bytes();
    assert_eq!(
        data_header(COOKIE, 0x2000, 512, Last::No)[..],
        [&chunk(0, 1, 520)[..], &offset].concat()
    );
    assert_eq!(
        hole_chunk(COOKIE, 0x2000, u32::MAX, Last::Yes)[..],
        [&chunk(1, 2, 12)[..], &offset, &[0xff; 4]].concat()
    );
    assert_eq!(done_chunk(COOKIE)[..], chunk(1, 0, 0));
}

#[test]
fn nothing_to_tell() {
    let mut out = Vec::new();
    ReplyStyle::Simple.push_done(&mut out, COOKIE);
    assert_eq!(out, simple(0));
    out.clear();
    ReplyStyle::Structured.push_done(&mut out, COOKIE);
    assert_eq!(out, chunk(1, 0, 0));
}

#[test]
fn errors() {
    let mut out = Vec::new();
    ReplyStyle::Simple.push_error(&mut out, COOKIE, Errno::NoSpc, "ignored");
    assert_eq!(out, simple(28));
    out.clear();
    ReplyStyle::Simple.push_error_at(&mut out, COOKIE, Errno::Io, "ignored", 5);
    assert_eq!(out, simple(5));

    out.clear();
    ReplyStyle::Structured.push_error(&mut out, COOKIE, Errno::NoSpc, "full");
    let body = b"\0\0\0\x1c\0\x04full";
    assert_eq!(out, [&chunk(1, 0x8001, 10)[..], body].concat());

    out.clear();
    ReplyStyle::Structured.push_error_at(&mut out, COOKIE, Errno::Io, "bad", 512);
    let body = b"\0\0\0\x05\0\x03bad\0\0\0\0\0\0\x02\0";
    assert_eq!(out, [&chunk(1, 0x8002, 17)[..], body].concat());
}

#[test]
fn messages_are_cut_between_characters_to_what_a_buffer_was_made_for() {
    let mut out = Vec::with_capacity(MAX_ERROR_BYTES);
    let place = out.as_ptr();
    ReplyStyle::Structured.push_error_at(&mut out, COOKIE, Errno::Io, &"x".repeat(70_000), 0);
    assert_eq!(out.len(), MAX_ERROR_BYTES);
    assert_eq!(out.as_ptr(), place, "no allocation");

    assert_eq!(cut("xéé", 4), "xé");
    assert_eq!(cut("xéé", 5), "xéé");
    assert_eq!(cut("é", 1), "");
}

#[test]
fn block_status() {
    let mut out = Vec::new();
    push_block_status(&mut out, COOKIE, 2, &[(4096, 3), (512, 0)], Last::No);
    let body = b"\0\0\0\x02\0\0\x10\0\0\0\0\x03\0\0\x02\0\0\0\0\0";
    assert_eq!(out, [&chunk(0, 5, 20)[..], body].concat());
    assert_eq!(out.len(), STATUS_HEADER_BYTES + 2 * EXTENT_BYTES);
}
