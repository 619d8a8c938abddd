//! Tests of the client side: each way a server can answer, honest or not.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::wire::{self, chunk, info, option, reply};

/// What an honest server says, piece by piece.
fn greeting(flags: u16) -> Vec<u8> {
    let mut bytes = wire::INIT_MAGIC.to_be_bytes().to_vec();
    bytes.extend(wire::OPTION_MAGIC.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes
}

fn option_reply(option: u32, code: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(code.to_be_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn info_export(size: u64, flags: u16) -> Vec<u8> {
    let mut bytes = info::EXPORT.to_be_bytes().to_vec();
    bytes.extend(size.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes
}

fn info_sizes(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    let mut bytes = info::BLOCK_SIZE.to_be_bytes().to_vec();
    for size in [min, preferred, max] {
        bytes.extend(size.to_be_bytes());
    }
    bytes
}

fn context(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes(), name.as_bytes()].concat()
}

/// Feeds `bytes` to a handshake; `None` if they end too early.
fn shake(bytes: &[u8]) -> Result<Option<Negotiated>, ClientError> {
    shake_for(bytes, false).map(|(negotiated, _)| negotiated)
}

/// The same, and what was sent meanwhile.
fn shake_for(bytes: &[u8], transport: bool) -> Result<(Option<Negotiated>, Vec<u8>), ClientError> {
    converse(Handshake::new(disk(transport))?, bytes)
}

/// The same with all options in one go.
fn shake_at_once(
    bytes: &[u8],
    transport: bool,
) -> Result<(Option<Negotiated>, Vec<u8>), ClientError> {
    converse(Handshake::at_once(disk(transport))?, bytes)
}

fn disk(transport: bool) -> HandshakeConfig {
    HandshakeConfig {
        export: "disk".to_owned(),
        structured: true,
        allocation: true,
        transport,
        opening: Vec::new(),
    }
}

fn converse(
    mut handshake: Handshake,
    bytes: &[u8],
) -> Result<(Option<Negotiated>, Vec<u8>), ClientError> {
    let mut sent = handshake.take_output();
    let mut at = 0;
    loop {
        let needed = handshake.needed();
        let Some(piece) = bytes.get(at..at + needed) else {
            return Ok((None, sent));
        };
        at += needed;
        if let Progress::Done(negotiated) = handshake.receive(piece)? {
            return Ok((Some(negotiated), sent));
        }
        sent.extend(handshake.take_output());
    }
}

const FIXED: u16 = wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES;
const FLAGS: u16 = wire::export::HAS_FLAGS | wire::export::READ_ONLY;

fn up_to_go() -> Vec<u8> {
    [
        greeting(FIXED),
        option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]),
        option_reply(
            option::SET_META_CONTEXT,
            reply::META_CONTEXT,
            &context(7, wire::BASE_ALLOCATION),
        ),
        option_reply(option::SET_META_CONTEXT, reply::ACK, &[]),
    ]
    .concat()
}

#[test]
fn a_complete_server_is_taken_at_its_word() {
    let bytes = [
        up_to_go(),
        option_reply(option::GO, reply::INFO, &info_export(1 << 20, FLAGS)),
        option_reply(option::GO, reply::INFO, &info_sizes(4096, 65536, u32::MAX)),
        option_reply(option::GO, reply::INFO, &[0, 99, 1, 2, 3]),
        option_reply(option::GO, reply::ACK, &[]),
    ]
    .concat();
    let negotiated = shake(&bytes).unwrap().unwrap();
    assert_eq!(negotiated.size_bytes, 1 << 20);
    assert_eq!(negotiated.flags, FLAGS);
    assert!(negotiated.structured);
    assert_eq!(negotiated.allocation_context, Some(7));
    let sizes = negotiated.block_sizes;
    assert_eq!(
        (sizes.min, sizes.preferred, sizes.max),
        (4096, 65536, 32 << 20)
    );
    for end in 0..bytes.len() {
        assert_eq!(shake(&bytes[..end]).unwrap(), None, "cut at {end}");
    }
}

/// Fuzzing of `nbd_client`: a server that said "at most 1 byte a request" was believed. A fetch of
/// 1 MiB became a million requests, which took hundreds of megabytes.
#[test]
fn a_server_that_takes_a_byte_at_a_time_is_refused() {
    let with = |size: u64, max: u32| {
        let bytes = [
            up_to_go(),
            option_reply(option::GO, reply::INFO, &info_sizes(1, 4096, max)),
            option_reply(option::GO, reply::INFO, &info_export(size, FLAGS)),
            option_reply(option::GO, reply::ACK, &[]),
        ];
        shake(&bytes.concat())
    };
    for max in [1, 511] {
        let refused = with(1 << 20, max).unwrap_err();
        assert_eq!(refused.kind(), ClientErrorKind::Violation, "{refused}");
    }
    assert!(with(1 << 20, 512).unwrap().is_some());
    assert!(with(100, 100).unwrap().is_some());
}

#[test]
fn a_server_without_options_is_asked_the_old_way() {
    for (flags, zeroes) in [(FIXED, 0), (wire::handshake::FIXED_NEWSTYLE, 124)] {
        let bytes = [
            greeting(flags),
            option_reply(option::STRUCTURED_REPLY, reply::ERR_UNSUP, b"no"),
            option_reply(option::GO, reply::ERR_UNSUP, &[]),
            (4096u64).to_be_bytes().to_vec(),
            FLAGS.to_be_bytes().to_vec(),
            vec![0; zeroes],
        ]
        .concat();
        let negotiated = shake(&bytes).unwrap().unwrap();
        assert_eq!(negotiated.size_bytes, 4096);
        assert!(!negotiated.structured);
        assert_eq!(negotiated.allocation_context, None);
        assert_eq!(negotiated.block_sizes, BlockSizes::DEFAULT);
    }
}

#[test]
fn newstyle_that_is_not_fixed_goes_straight_to_the_export() {
    let bytes = [
        greeting(0),
        [0; 8].to_vec(),
        FLAGS.to_be_bytes().to_vec(),
        vec![0; 124],
    ];
    assert_eq!(shake(&bytes.concat()).unwrap().unwrap().size_bytes, 0);
}

#[test]
fn frames_are_spoken_only_by_who_grants_them() {
    let granted = [
        option_reply(option::GO, reply::INFO, &info_export(1 << 20, FLAGS)),
        option_reply(option::GO, reply::ACK, &[]),
    ]
    .concat();
    let frames = context(9, wire::TRANSPORT);
    let grant = option_reply(option::SET_META_CONTEXT, reply::META_CONTEXT, &frames);
    let structured = option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]);
    let settled = option_reply(option::SET_META_CONTEXT, reply::ACK, &[]);
    let hello = greeting(FIXED);
    let ours = [&hello, &structured, &grant, &settled, &granted].map(|p| &p[..]);
    let (negotiated, sent) = shake_for(&ours.concat(), true).unwrap();
    let negotiated = negotiated.unwrap();
    assert!(negotiated.transport && negotiated.allocation_context.is_none());
    let asks = |sent: &[u8]| {
        let name = wire::TRANSPORT.as_bytes();
        sent.windows(name.len()).filter(|w| *w == name).count()
    };
    assert_eq!(asks(&sent), 1);
    assert!(shake(&ours.concat()).is_err(), "granted to who did not ask");

    let theirs = [up_to_go(), granted.clone()].concat();
    let (negotiated, _) = shake_for(&theirs, true).unwrap();
    let negotiated = negotiated.unwrap();
    assert!(!negotiated.transport && negotiated.allocation_context == Some(7));

    // A server that fails at a name it does not know is asked without it.
    let sour = option_reply(option::SET_META_CONTEXT, reply::ERR_INVALID, b"what?");
    let base = context(7, wire::BASE_ALLOCATION);
    let base = option_reply(option::SET_META_CONTEXT, reply::META_CONTEXT, &base);
    let parts = [
        &hello,
        &structured,
        &grant,
        &sour,
        &base,
        &settled,
        &granted,
    ];
    let (negotiated, sent) = shake_for(&parts.map(|p| &p[..]).concat(), true).unwrap();
    let negotiated = negotiated.unwrap();
    assert!(!negotiated.transport && negotiated.allocation_context == Some(7));
    assert_eq!(asks(&sent), 1);

    // Without GO there are no frames, whatever was granted before.
    let old = option_reply(option::GO, reply::ERR_UNSUP, &[]);
    let export = [&(4096u64).to_be_bytes()[..], &FLAGS.to_be_bytes()].concat();
    let parts = [&hello, &structured, &grant, &settled, &old, &export];
    let (negotiated, _) = shake_for(&parts.map(|p| &p[..]).concat(), true).unwrap();
    assert!(!negotiated.unwrap().transport);
}

/// Everything is sent before the server has said a word, and what comes of it is the same.
#[test]
fn all_options_at_once_lead_to_the_same() {
    let granted = [
        option_reply(option::GO, reply::INFO, &info_export(1 << 20, FLAGS)),
        option_reply(option::GO, reply::ACK, &[]),
    ]
    .concat();
    for server in [
        [up_to_go(), granted.clone()].concat(),
        [
            greeting(FIXED),
            option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]),
            option_reply(
                option::SET_META_CONTEXT,
                reply::META_CONTEXT,
                &context(9, wire::TRANSPORT),
            ),
            option_reply(option::SET_META_CONTEXT, reply::ACK, &[]),
            granted.clone(),
        ]
        .concat(),
        // Structured replies, but no contexts at all.
        [
            greeting(FIXED),
            option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]),
            option_reply(option::SET_META_CONTEXT, reply::ERR_UNSUP, &[]),
            granted.clone(),
        ]
        .concat(),
    ] {
        let (one_by_one, mut sent) = shake_for(&server, true).unwrap();
        assert!(one_by_one.is_some());
        // The flags alone differ: a server that has not greeted has not offered much.
        sent[..4].copy_from_slice(&wire::handshake::C_FIXED_NEWSTYLE.to_be_bytes());
        assert_eq!(
            shake_at_once(&server, true).unwrap(),
            (one_by_one, sent.clone())
        );
        let (nothing, early) = shake_at_once(&[], true).unwrap();
        assert_eq!((nothing, early), (None, sent), "it waited for an answer");
        for end in 0..server.len() {
            assert_eq!(shake_at_once(&server[..end], true).unwrap().0, None);
        }
    }
}

#[test]
fn what_is_refused_among_options_at_once_is_done_without() {
    let refused = |number| option_reply(number, reply::ERR_UNSUP, &[]);
    let granted = [
        option_reply(option::GO, reply::INFO, &info_export(4096, FLAGS)),
        option_reply(option::GO, reply::ACK, &[]),
    ]
    .concat();
    let plain = |server: Vec<Vec<u8>>| {
        let (negotiated, _) = shake_at_once(&server.concat(), true).unwrap();
        let negotiated = negotiated.unwrap();
        assert_eq!(negotiated.size_bytes, 4096);
        assert!(!negotiated.structured && !negotiated.transport);
        assert_eq!(negotiated.allocation_context, None);
    };
    let invalid = option_reply(option::SET_META_CONTEXT, reply::ERR_INVALID, b"first");
    for context in [refused(option::SET_META_CONTEXT), invalid] {
        let hello = [greeting(FIXED), refused(option::STRUCTURED_REPLY)];
        plain([&hello[..], &[context, granted.clone()]].concat());
    }
    // Nothing but the oldest option: with its zeroes, which were not declined.
    let export = [&4096u64.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat();
    plain(vec![
        greeting(FIXED),
        refused(option::STRUCTURED_REPLY),
        refused(option::SET_META_CONTEXT),
        refused(option::GO),
        export,
        vec![0; 124],
    ]);
}

/// A server from before options were fixed is none to send them to.
#[test]
fn who_does_not_take_options_is_asked_the_old_way_over_another_connection() {
    let failed = shake_at_once(&greeting(0), true).unwrap_err();
    assert!(matches!(failed, ClientError::AtOnce(_)), "{failed}");
    let mut oldstyle = wire::INIT_MAGIC.to_be_bytes().to_vec();
    oldstyle.extend(0x0000_4202_8186_1253_u64.to_be_bytes());
    let failed = shake_at_once(&oldstyle, true).unwrap_err();
    assert_eq!(failed, ClientError::Oldstyle);
}

/// What is said first in frames goes with the question for them, and only a server that takes both has
/// heard it.
#[test]
fn an_opening_goes_with_the_question_for_frames() {
    let opening = (0..=255).collect::<Vec<u8>>();
    let with = |transport| HandshakeConfig {
        opening: opening.clone(),
        ..disk(transport)
    };
    let query = wire::opening_query(&opening);
    let asked = |sent: &[u8]| sent.windows(query.len()).any(|w| w == query.as_bytes());
    let granted = [
        option_reply(option::GO, reply::INFO, &info_export(4096, FLAGS)),
        option_reply(option::GO, reply::ACK, &[]),
    ]
    .concat();
    let server = |names: &[&str]| {
        let mut bytes = greeting(FIXED);
        bytes.extend(option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]));
        for name in names {
            let context = context(3, name);
            bytes.extend(option_reply(
                option::SET_META_CONTEXT,
                reply::META_CONTEXT,
                &context,
            ));
        }
        bytes.extend(option_reply(option::SET_META_CONTEXT, reply::ACK, &[]));
        [bytes, granted.clone()].concat()
    };
    for at_once in [true, false] {
        let shake = |config, bytes: &[u8]| {
            let handshake = match at_once {
                true => Handshake::at_once(config),
                false => Handshake::new(config),
            };
            converse(handshake.unwrap(), bytes)
        };
        let both = server(&[wire::TRANSPORT, wire::OPENING]);
        let (negotiated, sent) = shake(with(true), &both).unwrap();
        let negotiated = negotiated.unwrap();
        assert!(negotiated.transport && negotiated.opened && asked(&sent));
        // An older one of ours.
        let (negotiated, _) = shake(with(true), &server(&[wire::TRANSPORT])).unwrap();
        let negotiated = negotiated.unwrap();
        assert!(negotiated.transport && !negotiated.opened);
        // Who wants no frames has nothing to say in them.
        let (negotiated, sent) = shake(with(false), &server(&[wire::BASE_ALLOCATION])).unwrap();
        assert!(!negotiated.unwrap().opened && !asked(&sent));
        // Taken without frames, or without having been asked.
        assert!(shake(with(true), &server(&[wire::OPENING])).is_err());
        assert!(shake(disk(true), &both).is_err());
    }
}

#[test]
fn an_opening_is_read_as_it_was_written() {
    for len in [1, 2, 255, wire::OPENING_BYTES] {
        let opening: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let query = wire::opening_query(&opening);
        assert!(query.len() <= wire::MAX_STRING_BYTES);
        assert_eq!(wire::opening_of(query.as_bytes()), Some(opening));
    }
    let long = wire::opening_query(&[7; wire::OPENING_BYTES + 1]);
    let name = wire::OPENING;
    let wrong = ["", ":", ":0", ":0g", "x:00", "00", ":00 ", ": 00"].map(|w| format!("{name}{w}"));
    for query in wrong.iter().chain([&long]) {
        assert_eq!(wire::opening_of(query.as_bytes()), None, "{query}");
    }
}

/// Where only another question would get what there is, GO must not have been sent yet.
#[test]
fn what_options_at_once_would_cost_is_left_to_one_by_one() {
    let structured = option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]);
    let unknown = option_reply(option::SET_META_CONTEXT, reply::ERR_UNKNOWN, &[]);
    let sour = [greeting(FIXED), structured, unknown].concat();
    let failed = shake_at_once(&sour, true).unwrap_err();
    assert!(matches!(failed, ClientError::AtOnce(_)), "{failed}");
    // Contexts without structured replies, which cannot be.
    let generous = [
        greeting(FIXED),
        option_reply(option::STRUCTURED_REPLY, reply::ERR_UNSUP, &[]),
        option_reply(
            option::SET_META_CONTEXT,
            reply::META_CONTEXT,
            &context(7, wire::BASE_ALLOCATION),
        ),
        option_reply(option::SET_META_CONTEXT, reply::ACK, &[]),
    ];
    let failed = shake_at_once(&generous.concat(), true).unwrap_err();
    assert!(matches!(failed, ClientError::AtOnce(_)), "{failed}");
}

#[test]
fn a_failed_context_leaves_none() {
    let bytes = [
        greeting(FIXED),
        option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]),
        option_reply(
            option::SET_META_CONTEXT,
            reply::META_CONTEXT,
            &context(7, wire::BASE_ALLOCATION),
        ),
        option_reply(option::SET_META_CONTEXT, reply::ERR_INVALID, &[]),
        option_reply(option::GO, reply::INFO, &info_export(512, FLAGS)),
        option_reply(option::GO, reply::ACK, &[]),
    ];
    let negotiated = shake(&bytes.concat()).unwrap().unwrap();
    assert_eq!(negotiated.allocation_context, None);
}

#[test]
fn oldstyle_is_refused_by_name() {
    let mut bytes = wire::INIT_MAGIC.to_be_bytes().to_vec();
    bytes.extend(0x0000_4202_8186_1253u64.to_be_bytes());
    assert_eq!(shake(&bytes), Err(ClientError::Oldstyle));
}

#[test]
fn an_unknown_export_and_tls_are_told_apart() {
    let unknown = [
        up_to_go(),
        option_reply(option::GO, reply::ERR_UNKNOWN, b"what\x1b?"),
    ];
    match shake(&unknown.concat()) {
        Err(ClientError::UnknownExport { name, message }) => {
            assert_eq!((name.as_str(), message.as_str()), ("disk", ": what ?"));
        }
        other => panic!("{other:?}"),
    }
    let tls = [
        greeting(FIXED),
        option_reply(option::STRUCTURED_REPLY, reply::ERR_TLS_REQD, &[]),
    ];
    assert_eq!(shake(&tls.concat()), Err(ClientError::TlsRequired));
}

/// CVE-2021-20286: GO acknowledged without the export's information met an assertion.
#[test]
fn cve_2021_20286_granted_without_a_size() {
    let bytes = [up_to_go(), option_reply(option::GO, reply::ACK, &[])];
    violates(shake(&bytes.concat()));
}

/// CVE-2023-5215: sizes above `i64::MAX` turned negative.
#[test]
fn cve_2023_5215_a_size_that_is_negative_as_an_offset() {
    for size in [1 << 63, u64::MAX] {
        let bytes = [
            up_to_go(),
            option_reply(option::GO, reply::INFO, &info_export(size, FLAGS)),
            option_reply(option::GO, reply::ACK, &[]),
        ];
        violates(shake(&bytes.concat()));
    }
}

#[test]
fn hostile_handshakes_are_violations() {
    let huge = {
        let mut bytes = option_reply(option::STRUCTURED_REPLY, reply::ACK, &[]);
        bytes[16..20].fill(0xff);
        bytes
    };
    for tail in [
        huge,
        option_reply(option::GO, reply::ACK, &[]),
        option_reply(option::STRUCTURED_REPLY, reply::SERVER, &[]),
        vec![0; 20],
    ] {
        violates(shake(&[greeting(FIXED), tail].concat()));
    }
    for sizes in [
        info_sizes(0, 0, 0),
        info_sizes(3, 4096, 4096),
        info_sizes(4096, 4096, 512),
    ] {
        let bytes = [up_to_go(), option_reply(option::GO, reply::INFO, &sizes)];
        violates(shake(&bytes.concat()));
    }
    let endless: Vec<u8> = (0..1000)
        .flat_map(|_| option_reply(option::GO, reply::INFO, &[0, 99]))
        .collect();
    violates(shake(&[up_to_go(), endless].concat()));
}

fn violates<T: std::fmt::Debug>(result: Result<T, ClientError>) {
    let kind = result.as_ref().err().map(ClientError::kind);
    assert_eq!(kind, Some(ClientErrorKind::Violation), "{result:?}");
}

/// One chunk, as a server sends it after the cookie.
fn give(
    reply: &mut Reply,
    kind: u16,
    done: bool,
    body: &[u8],
    data: u32,
) -> Result<Step, ClientError> {
    let len = u32::try_from(body.len()).unwrap() + data;
    let flags = if done { chunk::FLAG_DONE } else { 0 };
    match reply.on_chunk(ChunkHeader { flags, kind, len })? {
        Step::Body(n) => {
            assert_eq!(n, body.len(), "the body that was asked for");
            reply.on_body(body)
        }
        step => Ok(step),
    }
}

fn data(reply: &mut Reply, offset: u64, len: u32, done: bool) -> Result<Step, ClientError> {
    give(reply, chunk::OFFSET_DATA, done, &offset.to_be_bytes(), len)
}

fn hole(reply: &mut Reply, offset: u64, len: u32, done: bool) -> Result<Step, ClientError> {
    let body = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
    give(reply, chunk::OFFSET_HOLE, done, &body, 0)
}

fn read() -> Reply {
    Reply::to_read(1000, 100, true)
}

#[test]
fn chunks_in_any_order_make_a_read() {
    let mut reply = read();
    assert_eq!(
        data(&mut reply, 1050, 50, false).unwrap(),
        Step::Data { at: 50, len: 50 }
    );
    assert_eq!(
        data(&mut reply, 1000, 10, false).unwrap(),
        Step::Data { at: 0, len: 10 }
    );
    let expected = Hole { at: 10, len: 40 };
    assert_eq!(
        hole(&mut reply, 1010, 40, false).unwrap(),
        Step::Hole(expected)
    );
    assert!(!reply.is_done());
    give(&mut reply, chunk::NONE, true, &[], 0).unwrap();
    assert!(reply.is_done());
    assert_eq!(reply.finish().unwrap(), Outcome::Read(vec![expected]));
}

/// CVE-2019-14842 and its companions: chunks outside of the request were written all the same.
#[test]
fn cve_2019_14842_chunks_outside_of_the_request() {
    for (offset, len) in [
        (999, 1),
        (999, 2),
        (1100, 1),
        (1099, 2),
        (0, 100),
        (u64::MAX, 1),
        (1000, u32::MAX - 8),
    ] {
        violates(data(&mut read(), offset, len, false));
    }
    for (offset, len) in [
        (1000, 0),
        (1000, 101),
        (1099, u32::MAX),
        (u64::MAX, u32::MAX),
    ] {
        violates(hole(&mut read(), offset, len, false));
    }
}

#[test]
fn bytes_answered_twice_are_a_violation() {
    for (offset, len) in [(1020, 10), (1010, 11), (1029, 1), (1000, 100)] {
        let mut reply = read();
        data(&mut reply, 1020, 10, false).unwrap();
        violates(data(&mut reply, offset, len, false));
    }
}

/// CVE-2022-0485 is silent corruption by errors that were overlooked; so is a short answer.
#[test]
fn cve_2022_0485_neither_short_nor_failed_reads_succeed() {
    let mut reply = read();
    data(&mut reply, 1000, 99, true).unwrap();
    violates(reply.finish());

    let mut reply = read();
    give(&mut reply, chunk::NONE, true, &[], 0).unwrap();
    violates(reply.finish());

    let mut reply = read();
    data(&mut reply, 1000, 100, false).unwrap();
    let body = [
        &5u32.to_be_bytes()[..],
        &2u16.to_be_bytes(),
        b"ow",
        &1050u64.to_be_bytes(),
    ];
    give(&mut reply, chunk::ERROR_OFFSET, true, &body.concat(), 0).unwrap();
    let error = reply.finish().unwrap_err();
    assert_eq!(error.kind(), ClientErrorKind::Refused);
    assert!(error.to_string().contains("Io: ow"), "{error}");

    let mut reply = Reply::to_read(0, 10, false);
    assert_eq!(reply.on_simple(5).unwrap(), Step::Nothing);
    assert_eq!(reply.finish().unwrap_err().kind(), ClientErrorKind::Refused);
}

#[test]
fn errors_of_unknown_kinds_are_errors_and_other_unknown_kinds_the_end() {
    let mut reply = read();
    let body = [&22u32.to_be_bytes()[..], &0u16.to_be_bytes(), &[1, 2, 3]].concat();
    give(&mut reply, chunk::ERROR_BIT | 77, true, &body, 0).unwrap();
    assert_eq!(reply.finish().unwrap_err().kind(), ClientErrorKind::Refused);
    violates(give(&mut read(), 77, true, &[0; 12], 0));
    violates(give(&mut read(), chunk::BLOCK_STATUS, true, &[0; 12], 0));
    violates(give(&mut read(), chunk::ERROR, true, &[0; 6], 0));
    let long = ChunkHeader {
        flags: 0,
        kind: chunk::ERROR,
        len: 1 << 20,
    };
    violates(read().on_chunk(long));
    violates(read().on_simple(0));
    violates(Reply::to_read(0, 1, false).on_chunk(long));
}

fn status(extents: &[(u32, u32)], id: u32) -> Result<Outcome, ClientError> {
    let mut reply = Reply::to_block_status(0, 1000, 7);
    let mut body = id.to_be_bytes().to_vec();
    for (len, flags) in extents {
        body.extend(len.to_be_bytes());
        body.extend(flags.to_be_bytes());
    }
    give(&mut reply, chunk::BLOCK_STATUS, true, &body, 0)?;
    reply.finish()
}

#[test]
fn extents_are_merged_and_cut_and_holes_without_zeroes_are_data() {
    let expected = [(300, false), (700, true)].map(|(len, zero)| StatusExtent { len, zero });
    assert_eq!(
        status(
            &[(100, 0), (200, wire::allocation::HOLE), (100, 2), (5000, 3)],
            7
        )
        .unwrap(),
        Outcome::Status(expected.to_vec())
    );
}

/// CVE-2023-5871: extents that a server may not send met an assertion.
#[test]
fn cve_2023_5871_impossible_extents() {
    violates(status(&[], 7));
    violates(status(&[(0, 0)], 7));
    violates(status(&[(1000, 0), (1, 0)], 7));
    violates(status(&[(u32::MAX, 0), (u32::MAX, 0)], 7));
    violates(status(&[(1000, 0)], 8));
    let mut reply = Reply::to_block_status(0, 1000, 7);
    give(&mut reply, chunk::NONE, true, &[], 0).unwrap();
    violates(reply.finish());
    let huge = ChunkHeader {
        flags: 0,
        kind: chunk::BLOCK_STATUS,
        len: u32::MAX - 3,
    };
    violates(Reply::to_block_status(0, 1000, 7).on_chunk(huge));
}

#[test]
fn a_request_is_28_bytes_in_order() {
    let bytes = encode_request(1, 7, 0x0102_0304_0506_0708, 0x1112, 0x2122);
    assert_eq!(
        bytes,
        [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 7, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x11,
            0x12, 0, 0, 0x21, 0x22
        ]
    );
}

/// Option replies, well formed or not, which arbitrary bytes alone would hardly ever be.
fn some_option_reply() -> impl Strategy<Value = Vec<u8>> {
    let codes = prop_oneof![
        Just(reply::ACK),
        Just(reply::INFO),
        Just(reply::META_CONTEXT),
        Just(reply::ERR_UNSUP),
        any::<u32>()
    ];
    let options = prop_oneof![
        Just(option::STRUCTURED_REPLY),
        Just(option::SET_META_CONTEXT),
        Just(option::GO)
    ];
    let payloads = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        Just(context(1, wire::BASE_ALLOCATION)),
        any::<(u64, u16)>().prop_map(|(size, flags)| info_export(size, flags)),
        any::<(u32, u32, u32)>().prop_map(|(a, b, c)| info_sizes(a, b, c)),
    ];
    (options, codes, payloads).prop_map(|(o, c, p)| option_reply(o, c, &p))
}

proptest! {
    #[test]
    fn no_server_bytes_panic_a_handshake(
        raw in prop::collection::vec(any::<u8>(), 0..300),
        replies in prop::collection::vec(some_option_reply(), 0..8),
    ) {
        let _ = shake(&raw);
        let after = [greeting(FIXED), replies.concat(), raw].concat();
        if let Ok(Some(negotiated)) = shake(&after) {
            prop_assert!(negotiated.size_bytes <= i64::MAX.unsigned_abs());
            prop_assert!(negotiated.block_sizes.max % negotiated.block_sizes.min == 0);
        }
    }

    /// Whatever chunks come: a read that succeeds had each byte answered exactly once.
    #[test]
    fn a_read_that_succeeds_is_whole(
        chunks in prop::collection::vec((any::<bool>(), 990u64..1110, 0u32..60, any::<bool>()), 1..12),
    ) {
        let mut reply = read();
        let mut seen = [0u8; 100];
        for (is_hole, offset, len, done) in chunks {
            let step = if is_hole { hole(&mut reply, offset, len, done) } else { data(&mut reply, offset, len, done) };
            match step {
                Ok(Step::Data { at, len } | Step::Hole(Hole { at, len })) => {
                    for byte in &mut seen[at as usize..(at + len) as usize] {
                        *byte += 1;
                    }
                }
                Ok(step) => prop_assert!(false, "{step:?}"),
                Err(_) => return Ok(()),
            }
            if reply.is_done() {
                break;
            }
        }
        if reply.is_done() {
            prop_assert_eq!(reply.finish().is_ok(), seen.iter().all(|&n| n == 1));
        }
    }

    #[test]
    fn no_server_bytes_panic_a_reply(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        kind in prop_oneof![Just(1u16), Just(2), Just(5), Just(0x8001), Just(0x8002), any::<u16>()],
        len in 0u32..64,
        is_read: bool,
    ) {
        let _ = Header::decode(&bytes, true);
        let mut reply = if is_read { read() } else { Reply::to_block_status(1000, 100, 0) };
        if let Ok(Step::Body(n)) = reply.on_chunk(ChunkHeader { flags: 1, kind, len }) {
            let mut body = bytes;
            body.resize(n, 0);
            let _ = reply.on_body(&body);
            let _ = reply.finish();
        }
    }
}
