//! The rules of the handshake, one test each.

use proptest::prelude::*;

use super::test_client::*;
use super::*;
use crate::wire::{BASE_ALLOCATION, RESIDENCY};

fn kinds(replies: &[Reply]) -> Vec<u32> {
    replies.iter().map(|r| r.kind).collect()
}

fn info_kinds(replies: &[Reply]) -> Vec<u16> {
    replies
        .iter()
        .filter(|r| r.kind == reply::INFO)
        .map(|r| u16::from_be_bytes([r.payload[0], r.payload[1]]))
        .collect()
}

#[test]
fn the_greeting_is_fixed_newstyle() {
    let mut server = Handshake::new();
    assert_eq!(server.output(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn unknown_client_flags_close() {
    let mut server = Handshake::new();
    let flags = (MODERN | 1 << 7).to_be_bytes();
    let outcome = server.input(&flags, &TwoExports::default()).outcome;
    assert_eq!(outcome, Outcome::Close);
}

#[test]
fn export_name_answers_with_or_without_zeroes() {
    for (flags, zeroes) in [(MODERN, 0), (handshake::C_FIXED_NEWSTYLE, 124), (0, 124)] {
        let mut talk = Talk::with_flags(flags);
        let progress = talk.input(&option(opt::EXPORT_NAME, b"disk"));
        let Outcome::Begin(session) = progress.outcome else {
            panic!("{progress:?}");
        };
        assert_eq!(session.export_name, "disk");
        assert_eq!(session.max_payload_bytes, wire::MAX_PAYLOAD_BYTES);
        assert!(!session.structured && session.contexts.is_empty());
        let mut expected = (1_u64 << 30).to_be_bytes().to_vec();
        expected.extend_from_slice(&session.export.flags.to_be_bytes());
        expected.extend_from_slice(&vec![0; zeroes]);
        assert_eq!(*talk.server.output(), expected);
    }
}

#[test]
fn export_name_that_fails_closes_without_a_word() {
    for name in [&b"nosuch"[..], b"\xff\xfe", b"disk\0", &[b'x'; 4096]] {
        let mut talk = Talk::new();
        let outcome = talk.input(&option(opt::EXPORT_NAME, name)).outcome;
        assert_eq!(outcome, Outcome::Close);
        assert!(talk.server.output().is_empty());
    }
}

#[test]
fn an_old_newstyle_client_may_only_choose_an_export() {
    let mut talk = Talk::with_flags(0);
    let outcome = talk.input(&option(opt::LIST, &[])).outcome;
    assert_eq!(outcome, Outcome::Close);
}

#[test]
fn abort_is_acknowledged_then_closed() {
    for payload in [&b""[..], b"bye"] {
        let mut talk = Talk::new();
        let outcome = talk.input(&option(opt::ABORT, payload)).outcome;
        assert_eq!(outcome, Outcome::Close);
        assert_eq!(kinds(&replies(talk.server.output())), [reply::ACK]);
    }
}

#[test]
fn list_tells_names_and_descriptions() {
    let mut talk = Talk::new();
    let replies = talk.ask(opt::LIST, &[]);
    assert_eq!(kinds(&replies), [reply::SERVER, reply::SERVER, reply::ACK]);
    assert_eq!(replies[0].payload, b"\0\0\0\x04diska disk");
    assert_eq!(talk.kind_of(opt::LIST, b"x"), reply::ERR_INVALID);
    assert_eq!(talk.ask(opt::LIST, &[]), replies, "still in step");
}

#[test]
fn list_is_cut_where_it_grows_too_long() {
    struct Many;
    impl Exports for Many {
        fn find(&self, _: &str) -> Option<ExportInfo> {
            None
        }
        fn list(&self) -> Vec<(String, String)> {
            (0..2000)
                .map(|n| (format!("{n:04}"), "é".repeat(5000)))
                .collect()
        }
    }
    let mut server = Handshake::new();
    server.output().clear();
    server.input(&MODERN.to_be_bytes(), &Many);
    let progress = server.input(&option(opt::LIST, &[]), &Many);
    assert_eq!(progress.outcome, Outcome::SendFirst);
    assert!(server.output().len() <= limits::HANDSHAKE_OUTPUT_MAX_BYTES);
    let replies = replies(server.output());
    let last = replies.last().expect("at least an end");
    assert_eq!(last.kind, reply::ERR_TOO_BIG);
    assert!(replies.len() > 200);
    for entry in &replies[..replies.len() - 1] {
        let text = std::str::from_utf8(&entry.payload[4..]).expect("cut between characters");
        assert_eq!(text.len(), 4 + 4096);
    }
}

#[test]
fn info_and_go_tell_the_same() {
    let wanted = [
        info::BLOCK_SIZE,
        info::NAME,
        info::DESCRIPTION,
        info::BLOCK_SIZE,
        999,
    ];
    let mut talk = Talk::new();
    let payload = named("", &wanted);
    let told = talk.ask(opt::INFO, &payload);
    assert_eq!(
        info_kinds(&told),
        [
            info::EXPORT,
            info::NAME,
            info::DESCRIPTION,
            info::BLOCK_SIZE
        ]
    );
    assert_eq!(told.last().map(|r| r.kind), Some(reply::ACK));
    assert_eq!(told[0].payload[2..10], (1_u64 << 30).to_be_bytes());
    assert_eq!(told[1].payload[2..], *b"disk");
    assert_eq!(told[2].payload[2..], *b"a disk");
    assert_eq!(told[3].payload[2..6], 1_u32.to_be_bytes());
    assert_eq!(told[3].payload[6..10], 4096_u32.to_be_bytes());
    assert_eq!(told[3].payload[10..], (1_u32 << 20).to_be_bytes());

    let (session, told_by_go) = talk.go("", &wanted);
    let payloads = |replies: Vec<Reply>| -> Vec<_> {
        replies.into_iter().map(|r| (r.kind, r.payload)).collect()
    };
    assert_eq!(payloads(told_by_go), payloads(told));
    assert_eq!(session.export_name, "");
    assert_eq!(session.export.canonical_name, "disk");
    assert_eq!(session.max_payload_bytes, 1 << 20, "the client was told");
}

#[test]
fn size_and_flags_are_told_unasked() {
    let mut talk = Talk::new();
    let (session, replies) = talk.go("disk", &[]);
    assert_eq!(kinds(&replies), [reply::INFO, reply::ACK]);
    assert_eq!(info_kinds(&replies), [info::EXPORT]);
    assert_eq!(session.max_payload_bytes, wire::MAX_PAYLOAD_BYTES);
}

#[test]
fn an_export_that_is_unknown_or_not_served_yet_is_refused_and_the_handshake_goes_on() {
    let mut talk = Talk::new();
    for (name, code) in [("nosuch", reply::ERR_UNKNOWN), ("later", reply::ERR_POLICY)] {
        for option in [opt::INFO, opt::GO] {
            assert_eq!(talk.kind_of(option, &named(name, &[])), code);
        }
        assert_eq!(
            talk.kind_of(opt::LIST_META_CONTEXT, &queries(name, &[])),
            code
        );
    }
    talk.go("other", &[]);
}

#[test]
fn lengths_that_disagree_are_invalid() {
    let good = named("disk", &[info::NAME]);
    let mut long_name = good.clone();
    long_name[3] += 1;
    let mut short_name = good.clone();
    short_name[3] -= 1;
    let mut huge_name = good.clone();
    huge_name[..4].fill(0xff);
    let mut more_kinds = good.clone();
    more_kinds[9] += 1;
    let mut longer = good.clone();
    longer.push(0);
    let mut malformed = vec![long_name, short_name, huge_name, more_kinds, longer];
    malformed.extend((0..good.len()).map(|len| good[..len].to_vec()));
    malformed.push([&[0, 0, 0, 2, 0xff, 0xfe][..], &[0, 0]].concat());
    let mut talk = Talk::new();
    for payload in &malformed {
        for option in [opt::INFO, opt::GO] {
            assert_eq!(talk.kind_of(option, payload), reply::ERR_INVALID);
        }
    }
    talk.go("disk", &[]);
}

#[test]
fn information_requests_are_bounded() {
    let bound = usize::from(limits::INFO_REQUESTS);
    let mut talk = Talk::new();
    let too_many = named("disk", &vec![info::NAME; bound + 1]);
    assert_eq!(talk.kind_of(opt::INFO, &too_many), reply::ERR_TOO_BIG);
    let most = talk.ask(opt::INFO, &named("disk", &vec![info::NAME; bound]));
    assert_eq!(info_kinds(&most), [info::EXPORT, info::NAME], "told once");
}

#[test]
fn a_client_that_must_know_block_sizes_has_to_ask() {
    let mut talk = Talk::new();
    talk.exports.block_size_required = true;
    for option in [opt::INFO, opt::GO] {
        let replies = talk.ask(option, &named("disk", &[info::NAME]));
        assert_eq!(kinds(&replies), [reply::INFO, reply::ERR_BLOCK_SIZE_REQD]);
        assert_eq!(info_kinds(&replies), [info::BLOCK_SIZE]);
    }
    talk.go("disk", &[info::BLOCK_SIZE]);

    let mut talk = Talk::new();
    talk.exports.block_size_required = true;
    let outcome = talk.input(&option(opt::EXPORT_NAME, b"disk")).outcome;
    assert_eq!(outcome, Outcome::Close);
}

#[test]
fn df_is_offered_only_with_structured_replies() {
    let flags =
        |replies: &[Reply]| u16::from_be_bytes([replies[0].payload[10], replies[0].payload[11]]);
    let mut talk = Talk::new();
    let plain = flags(&talk.ask(opt::INFO, &named("disk", &[])));
    assert_eq!(plain & export::SEND_DF, 0);
    assert_ne!(plain & export::HAS_FLAGS, 0);
    assert_eq!(
        talk.kind_of(opt::STRUCTURED_REPLY, b"x"),
        reply::ERR_INVALID
    );
    assert_eq!(talk.kind_of(opt::STRUCTURED_REPLY, b""), reply::ACK);
    let (session, replies) = talk.go("disk", &[]);
    assert_eq!(flags(&replies), plain | export::SEND_DF);
    assert_eq!(session.export.flags, plain | export::SEND_DF);
    assert!(session.structured);
}

#[test]
fn what_is_not_known_is_unsupported_and_skipped() {
    let mut talk = Talk::new();
    for option in [opt::STARTTLS, opt::EXTENDED_HEADERS, 0, 4, 12, u32::MAX] {
        for payload in [0, 1, 4096, limits::OPTION_KEPT_BYTES as usize + 1] {
            assert_eq!(talk.kind_of(option, &vec![0xaa; payload]), reply::ERR_UNSUP);
        }
    }
    talk.go("disk", &[]);
}

#[test]
fn contexts_are_listed_by_name_namespace_or_all() {
    let mut talk = Talk::new();
    let mut listed = |asked: &[&str]| -> Vec<String> {
        let replies = talk.ask(opt::LIST_META_CONTEXT, &queries("disk", asked));
        assert_eq!(replies.last().map(|r| r.kind), Some(reply::ACK));
        replies[..replies.len() - 1]
            .iter()
            .map(|r| {
                assert_eq!(r.kind, reply::META_CONTEXT);
                assert_eq!(r.payload[..4], [0; 4]);
                String::from_utf8(r.payload[4..].to_vec()).expect("ours are text")
            })
            .collect()
    };
    assert_eq!(listed(&[]), [BASE_ALLOCATION, RESIDENCY]);
    assert_eq!(listed(&["base:"]), [BASE_ALLOCATION]);
    assert_eq!(listed(&["x-hikkoshi:"]), [RESIDENCY]);
    assert_eq!(
        listed(&["x-hikkoshi:", RESIDENCY, "base:allocation"]),
        [BASE_ALLOCATION, RESIDENCY],
        "each once"
    );
    assert!(listed(&["base", "qemu:", "base:alloc", "", "base:allocation:x"]).is_empty());
}

#[test]
fn contexts_are_set_by_full_name_only() {
    let mut talk = Talk::new();
    let both = queries("disk", &[RESIDENCY, "qemu:dirty-bitmap:a", BASE_ALLOCATION]);
    assert_eq!(
        talk.kind_of(opt::SET_META_CONTEXT, &both),
        reply::ERR_INVALID,
        "structured replies come first"
    );
    talk.ask(opt::STRUCTURED_REPLY, &[]);
    let replies = talk.ask(opt::SET_META_CONTEXT, &both);
    assert_eq!(
        kinds(&replies),
        [reply::META_CONTEXT, reply::META_CONTEXT, reply::ACK]
    );
    assert_eq!(replies[0].payload, b"\0\0\0\x01base:allocation");
    assert_eq!(replies[1].payload, b"\0\0\0\x02x-hikkoshi:residency");

    let wildcards = queries("disk", &["base:", "x-hikkoshi:"]);
    assert_eq!(talk.kind_of(opt::SET_META_CONTEXT, &wildcards), reply::ACK);
    let (session, _) = talk.go("disk", &[]);
    assert!(session.contexts.is_empty(), "the second replaces the first");
}

#[test]
fn contexts_count_for_the_export_they_were_set_for() {
    for (name, kept) in [("disk", true), ("other", false), ("", false)] {
        let mut talk = Talk::new();
        talk.ask(opt::STRUCTURED_REPLY, &[]);
        talk.ask(opt::SET_META_CONTEXT, &queries("disk", &[RESIDENCY]));
        talk.kind_of(opt::GO, &named("nosuch", &[]));
        let (session, _) = talk.go(name, &[]);
        let expected = if kept {
            vec![Context {
                id: 2,
                name: RESIDENCY,
            }]
        } else {
            vec![]
        };
        assert_eq!(session.contexts, expected);
    }
}

#[test]
fn setting_contexts_discards_the_old_ones_even_if_it_fails() {
    let too_long = vec![0; limits::OPTION_KEPT_BYTES as usize + 1];
    let long_query = "q".repeat(wire::MAX_STRING_BYTES + 1);
    for (failing, code) in [
        (queries("nosuch", &[RESIDENCY]), reply::ERR_UNKNOWN),
        (b"\xff\xff\xff\xff".to_vec(), reply::ERR_INVALID),
        (too_long, reply::ERR_TOO_BIG),
        (queries("disk", &[&long_query]), reply::ERR_TOO_BIG),
    ] {
        let mut talk = Talk::new();
        talk.ask(opt::STRUCTURED_REPLY, &[]);
        talk.ask(opt::SET_META_CONTEXT, &queries("disk", &[RESIDENCY]));
        assert_eq!(talk.kind_of(opt::SET_META_CONTEXT, &failing), code);
        assert!(talk.go("disk", &[]).0.contexts.is_empty());
    }
}

#[test]
fn contexts_may_be_chosen_before_export_name_too() {
    let mut talk = Talk::new();
    talk.ask(opt::STRUCTURED_REPLY, &[]);
    talk.ask(opt::SET_META_CONTEXT, &queries("disk", &[BASE_ALLOCATION]));
    let progress = talk.input(&option(opt::EXPORT_NAME, b"disk"));
    let Outcome::Begin(session) = progress.outcome else {
        panic!("{progress:?}");
    };
    assert!(session.structured);
    assert_eq!(session.contexts.len(), 1);
}

#[test]
fn frames_are_for_those_who_name_them_and_never_listed() {
    let mut talk = Talk::new();
    talk.ask(opt::STRUCTURED_REPLY, &[]);
    for asked in [&[][..], &["x-hikkoshi:"], &[wire::TRANSPORT]] {
        let listed = talk.ask(opt::LIST_META_CONTEXT, &queries("disk", asked));
        let shown = |r: &Reply| r.payload.ends_with(wire::TRANSPORT.as_bytes());
        assert!(!listed.iter().any(shown), "{asked:?}");
    }
    let wanted = queries("disk", &[BASE_ALLOCATION, wire::TRANSPORT]);
    let replies = talk.ask(opt::SET_META_CONTEXT, &wanted);
    assert_eq!(replies[1].payload, b"\0\0\0\x03x-hikkoshi:transport-5");
    assert!(talk.go("disk", &[]).0.speaks_frames());

    for wanted in [
        queries("disk", &["x-hikkoshi:", "x-hikkoshi:transport-1"]),
        queries("other", &[wire::TRANSPORT]),
    ] {
        let mut talk = Talk::new();
        talk.ask(opt::STRUCTURED_REPLY, &[]);
        talk.ask(opt::SET_META_CONTEXT, &wanted);
        assert!(!talk.go("disk", &[]).0.speaks_frames());
    }
    let mut talk = Talk::new();
    talk.ask(opt::STRUCTURED_REPLY, &[]);
    talk.ask(
        opt::SET_META_CONTEXT,
        &queries("disk", &[wire::TRANSPORT, RESIDENCY]),
    );
    let progress = talk.input(&option(opt::EXPORT_NAME, b"disk"));
    let Outcome::Begin(session) = progress.outcome else {
        panic!("{progress:?}");
    };
    assert!(!session.speaks_frames() && session.contexts.len() == 1);
}

/// What a client says first in frames is taken with the question for them, if it gets them.
#[test]
fn an_opening_is_taken_by_who_grants_frames() {
    let opening = wire::opening_query(b"HKF and more");
    let ask = |export: &str, names: &[&str]| {
        let mut talk = Talk::new();
        talk.ask(opt::STRUCTURED_REPLY, &[]);
        let replies = talk.ask(opt::SET_META_CONTEXT, &queries(export, names));
        let told = |r: &Reply| r.payload.ends_with(wire::OPENING.as_bytes());
        (talk, replies.iter().any(told))
    };
    let (mut talk, told) = ask("disk", &[wire::TRANSPORT, &opening]);
    assert!(told);
    let (session, _) = talk.go("disk", &[]);
    assert!(session.speaks_frames() && session.contexts.len() == 1);
    assert_eq!(session.opening, b"HKF and more");
    // Not without frames, not twice, and nothing but what makes sense.
    let bad = format!("{}:0x", wire::OPENING);
    for names in [
        &[BASE_ALLOCATION, &opening][..],
        &[wire::TRANSPORT, &opening, &opening],
        &[wire::TRANSPORT, &bad],
        &[wire::TRANSPORT, wire::OPENING],
        &[wire::TRANSPORT],
    ] {
        let (mut talk, told) = ask("disk", names);
        assert!(!told, "{names:?}");
        assert_eq!(talk.go("disk", &[]).0.opening, b"", "{names:?}");
    }
    // A choice for another export, or discarded by another one, says nothing.
    let (mut talk, _) = ask("other", &[wire::TRANSPORT, &opening]);
    assert_eq!(talk.go("disk", &[]).0.opening, b"");
    let (mut talk, _) = ask("disk", &[wire::TRANSPORT, &opening]);
    talk.ask(opt::SET_META_CONTEXT, &queries("disk", &[wire::TRANSPORT]));
    assert_eq!(talk.go("disk", &[]).0.opening, b"");
    let (mut talk, _) = ask("disk", &[wire::TRANSPORT, &opening]);
    let progress = talk.input(&option(opt::EXPORT_NAME, b"disk"));
    assert!(matches!(progress.outcome, Outcome::Begin(session) if session.opening.is_empty()));
}

#[test]
fn a_wrong_magic_closes() {
    let mut bytes = option(opt::LIST, &[]);
    bytes[7] ^= 1;
    let mut talk = Talk::new();
    assert_eq!(talk.input(&bytes).outcome, Outcome::Close);
    assert_eq!(talk.input(&bytes).outcome, Outcome::Close, "and stays so");
}

#[test]
fn the_number_of_options_is_bounded() {
    let mut talk = Talk::new();
    for _ in 0..limits::OPTIONS {
        talk.ask(opt::STRUCTURED_REPLY, &[]);
    }
    let outcome = talk.input(&option(opt::STRUCTURED_REPLY, &[])).outcome;
    assert_eq!(outcome, Outcome::Close);
}

/// A client that pipelines options and never reads makes no output pile up.
#[test]
fn nothing_is_taken_while_much_waits_to_be_sent() {
    struct Talkative;
    impl Exports for Talkative {
        fn find(&self, name: &str) -> Option<ExportInfo> {
            let description = "x".repeat(wire::MAX_STRING_BYTES);
            Some(ExportInfo {
                description,
                ..disk(name)
            })
        }
        fn list(&self) -> Vec<(String, String)> {
            Vec::new()
        }
    }
    let one_answer_bytes = 4096 + 256;
    let mut server = Handshake::new();
    server.output().clear();
    server.input(&MODERN.to_be_bytes(), &Talkative);
    let script = option(opt::INFO, &named("disk", &[0, 1, 2, 3])).repeat(200);
    let (mut rest, mut rounds) = (&script[..], 0);
    loop {
        let progress = server.input(rest, &Talkative);
        rest = &rest[progress.consumed..];
        let waiting = server.output().len();
        assert!(waiting < limits::HANDSHAKE_OUTPUT_BYTES + one_answer_bytes);
        if progress.outcome == Outcome::NeedMore {
            break;
        }
        // Before the output is gone, asking again changes nothing.
        let again = server.input(rest, &Talkative);
        assert_eq!((again.consumed, again.outcome), (0, Outcome::SendFirst));
        assert_eq!(server.output().len(), waiting);
        server.output().clear();
        rounds += 1;
    }
    assert!(rest.is_empty());
    assert!(rounds > 10, "the bound was met {rounds} times");
}

/// Handshakes with all that there is, each ending in GO or EXPORT_NAME.
fn whole_handshakes() -> Vec<Vec<u8>> {
    let begin = MODERN.to_be_bytes().to_vec();
    let everything = [
        begin.clone(),
        option(opt::STARTTLS, &[]),
        option(opt::EXTENDED_HEADERS, &[]),
        option(opt::STRUCTURED_REPLY, &[]),
        option(opt::LIST, &[]),
        option(opt::LIST, b"no data here"),
        option(opt::INFO, &named("nosuch", &[1])),
        option(opt::INFO, &named("disk", &[0, 1, 2, 3])),
        option(opt::LIST_META_CONTEXT, &queries("disk", &["base:"])),
        option(opt::SET_META_CONTEXT, &queries("disk", &[RESIDENCY])),
        option(77, b"unknown"),
        option(opt::GO, &named("disk", &[3])),
    ];
    let plain = [begin.clone(), option(opt::GO, &named("", &[]))];
    let old = [begin, option(opt::EXPORT_NAME, b"other")];
    let older = [0_u32.to_be_bytes().to_vec(), option(opt::EXPORT_NAME, b"")];
    vec![
        everything.concat(),
        plain.concat(),
        old.concat(),
        older.concat(),
    ]
}

/// Feeds pieces as a socket would, sending all output as it comes.
fn feed<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, usize, Outcome) {
    let exports = TwoExports::default();
    let mut server = Handshake::new();
    let (mut sent, mut consumed, mut pending) = (Vec::new(), 0, Vec::new());
    for piece in pieces {
        pending.extend_from_slice(piece);
        loop {
            let progress = server.input(&pending, &exports);
            sent.append(server.output());
            pending.drain(..progress.consumed);
            consumed += progress.consumed;
            match progress.outcome {
                Outcome::NeedMore => break,
                Outcome::SendFirst => {}
                end => return (sent, consumed, end),
            }
        }
    }
    (sent, consumed, Outcome::NeedMore)
}

#[test]
fn every_split_gives_the_same_answer() {
    for script in whole_handshakes() {
        let whole = feed([&script[..]].into_iter());
        assert!(matches!(whole.2, Outcome::Begin(_)));
        assert_eq!(feed(script.chunks(1)), whole);
        for at in 0..=script.len() {
            let (front, back) = script.split_at(at);
            assert_eq!(feed([front, back].into_iter()), whole, "split at {at}");
        }
    }
}

#[test]
fn what_comes_behind_the_handshake_is_left_alone() {
    for script in whole_handshakes() {
        let alone = feed([&script[..]].into_iter());
        let pipelined = [&script[..], b"requests of the transmission phase"].concat();
        assert_eq!(feed([&pipelined[..]].into_iter()), alone);
        assert_eq!(alone.1, script.len());
    }
}

#[test]
fn a_client_that_hangs_up_anywhere_has_begun_nothing() {
    for script in whole_handshakes() {
        for len in 0..script.len() {
            let (_, consumed, outcome) = feed([&script[..len]].into_iter());
            assert_eq!((consumed, outcome), (len, Outcome::NeedMore));
        }
    }
}

#[test]
fn what_is_held_is_bounded_by_what_came_and_by_the_cap() {
    for (option, len) in [
        (opt::GO, limits::OPTION_KEPT_BYTES),
        (opt::GO, limits::OPTION_KEPT_BYTES + 1),
        (opt::SET_META_CONTEXT, limits::OPTION_SKIPPED_BYTES),
        (0xdead, limits::OPTION_SKIPPED_BYTES),
    ] {
        let mut talk = Talk::new();
        talk.input(&option_header(option, len));
        assert!(talk.server.held.capacity() <= 64, "nothing on credit");
        let block = [0; 8192];
        let mut left = len as usize - 1;
        while left > 0 {
            let piece = &block[..left.min(block.len())];
            assert_eq!(talk.input(piece).consumed, piece.len());
            left -= piece.len();
            assert!(talk.server.held.capacity() <= 2 * limits::OPTION_KEPT_BYTES as usize);
        }
        assert!(talk.server.output().is_empty());
        talk.input(&[0]);
        let replies = replies(talk.server.output());
        assert_eq!(replies.len(), 1);
        assert!(replies[0].is_error());
    }
}

/// Bytes that look like options often enough to get past the magic.
fn hostile_bytes() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![0_u32..64, any::<u32>()];
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        Just(named("disk", &[0, 1, 2, 3])),
        Just(queries("disk", &[RESIDENCY, "base:"])),
    ];
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        (0_u32..14, payload.clone()).prop_map(|(o, p)| option(o, &p)),
        (0_u32..14, length, payload).prop_map(|(o, len, p)| {
            let mut bytes = option_header(o, len);
            bytes.extend_from_slice(&p);
            bytes
        }),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn hostile_bytes_do_no_harm(flags in 0_u32..5, bytes in hostile_bytes(), cut in 1_usize..50) {
        let script = [&flags.to_be_bytes()[..], &bytes].concat();
        let (sent, consumed, outcome) = feed([&script[..]].into_iter());
        prop_assert!(consumed <= script.len());
        // No answer is longer than a LIST of two, or four kinds of information.
        prop_assert!(sent.len() <= wire::GREETING_BYTES + 256 * (1 + script.len() / 16));
        prop_assert_eq!(feed(script.chunks(cut)), (sent, consumed, outcome));
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(script in prop::collection::vec(any::<u8>(), 0..200)) {
        let (sent, _, outcome) = feed(script.chunks(7));
        prop_assert!(sent.len() < 4096);
        prop_assert_eq!(matches!(outcome, Outcome::NeedMore | Outcome::Close), true);
    }
}
