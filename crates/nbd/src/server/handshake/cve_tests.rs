//! What once broke other servers during the handshake. Each test begins with its story.
//!
//! Not here, because they are about what surrounds a handshake: access lists (CVE-2013-6410), and
//! idle clients that keep a server from shutting down (CVE-2024-7409), which the owner of the
//! sockets prevents with a timer and a cap.

use super::test_client::*;
use super::*;

/// CVE-2013-7441 (nbd-server): asking for an export that does not exist, or hanging up in the
/// middle of the negotiation, ended the whole server. Here the one ends the one handshake, and the
/// other leaves a value behind that can be dropped at any point.
#[test]
fn cve_2013_7441_unknown_export_or_hang_up_concerns_one_connection() {
    let mut talk = Talk::new();
    let outcome = talk.input(&option(opt::EXPORT_NAME, b"nosuch")).outcome;
    assert_eq!(outcome, Outcome::Close);

    let script = option(opt::GO, &named("disk", &[]));
    for len in 0..script.len() {
        let mut talk = Talk::new();
        let progress = talk.input(&script[..len]);
        assert_eq!(progress.outcome, Outcome::NeedMore);
        drop(talk);
    }
}

/// CVE-2017-7539 (qemu-nbd): a client that hung up after its flags, or in the middle of an option,
/// ran into an assertion. Here any tail that is missing is just not there, and what came before it
/// has been answered.
#[test]
fn cve_2017_7539_hanging_up_between_options() {
    let mut talk = Talk::new();
    assert_eq!(talk.ask(opt::LIST, &[]).len(), 3);
    let progress = talk.input(&option_header(opt::GO, 6)[..5]);
    assert_eq!(
        (progress.consumed, progress.outcome),
        (5, Outcome::NeedMore)
    );
    assert!(talk.server.output().is_empty());
}

/// CVE-2017-15118 (qemu-nbd): a name of up to 4096 bytes was read into a buffer of 256 on the
/// stack. The longest legal name, and the one after it, by every option that has one.
#[test]
fn cve_2017_15118_long_export_names() {
    for (len, code) in [(4096, reply::ERR_UNKNOWN), (4097, reply::ERR_TOO_BIG)] {
        let name = "n".repeat(len);
        let mut talk = Talk::new();
        for option in [opt::INFO, opt::GO] {
            assert_eq!(talk.kind_of(option, &named(&name, &[])), code);
        }
        let contexts = queries(&name, &[wire::BASE_ALLOCATION]);
        assert_eq!(talk.kind_of(opt::LIST_META_CONTEXT, &contexts), code);
        let outcome = talk
            .input(&option(opt::EXPORT_NAME, name.as_bytes()))
            .outcome;
        assert_eq!(outcome, Outcome::Close);
    }
}

/// CVE-2017-15119 (qemu-nbd): options with lengths of up to 4 GiB, one after the other, kept the
/// server busy reading them. Beyond 32 MiB the connection ends with the header; below, only so
/// many options are taken.
#[test]
fn cve_2017_15119_floods_of_long_options() {
    for option in 0..20 {
        let mut talk = Talk::new();
        let header = option_header(option, limits::OPTION_SKIPPED_BYTES + 1);
        assert_eq!(talk.input(&header).outcome, Outcome::Close);
    }
    let mut talk = Talk::new();
    let flood = option(99, &[0; 100]);
    let taken = (0..10_000)
        .take_while(|_| {
            let outcome = talk.input(&flood).outcome;
            talk.server.output().clear();
            outcome == Outcome::NeedMore
        })
        .count();
    assert_eq!(taken, limits::OPTIONS as usize);
}

/// CVE-2020-10761 (qemu-nbd): the error message quoted the unknown name; with a name of nearly 4096
/// bytes the message became longer than a string may be, and an assertion ended the server. Here
/// messages are fixed, and quote nothing.
#[test]
fn cve_2020_10761_error_messages_do_not_grow_with_the_name() {
    let mut talk = Talk::new();
    let message = |talk: &mut Talk, name: &str| talk.ask(opt::INFO, &named(name, &[]));
    let short = message(&mut talk, "x");
    assert!(short[0].payload.len() < 100);
    for len in [4000, 4095, 4096] {
        assert_eq!(message(&mut talk, &"x".repeat(len)), short);
    }
}

/// CVE-2021-3716 (nbdkit, and what STARTTLS injection is in general): what was sent in plain before
/// TLS began was acted upon after it. There is no TLS here: STARTTLS is refused, and what
/// follows it is what it would have been without.
#[test]
fn cve_2021_3716_starttls_with_options_behind_it() {
    let mut talk = Talk::new();
    let pipelined = [
        option(opt::STARTTLS, &[]),
        option(opt::STRUCTURED_REPLY, &[]),
    ];
    let progress = talk.input(&pipelined.concat());
    assert_eq!(progress.outcome, Outcome::NeedMore);
    let kinds: Vec<_> = replies(talk.server.output())
        .iter()
        .map(|r| (r.option, r.kind))
        .collect();
    assert_eq!(
        kinds,
        [
            (opt::STARTTLS, reply::ERR_UNSUP),
            (opt::STRUCTURED_REPLY, reply::ACK)
        ]
    );
}

/// CVE-2022-26495 (nbd-server): a name length of 0xffffffff plus one for the final zero became an
/// allocation of zero bytes, with the name written behind it. Lengths at both ends of 32 bits, in
/// each place where there is one.
#[test]
fn cve_2022_26495_lengths_that_wrap() {
    for len in [u32::MAX, u32::MAX - 1, u32::MAX - 3, 1 << 31] {
        let mut talk = Talk::new();
        let mut payload = len.to_be_bytes().to_vec();
        payload.extend_from_slice(b"disk\0\0\0\0");
        for option in [opt::INFO, opt::GO, opt::LIST_META_CONTEXT] {
            assert_eq!(talk.kind_of(option, &payload), reply::ERR_INVALID);
        }
        // As the number of queries, and as the length of a query.
        let count = [&string("disk")[..], &len.to_be_bytes()].concat();
        assert_eq!(
            talk.kind_of(opt::LIST_META_CONTEXT, &count),
            reply::ERR_INVALID
        );
        let query = [&string("disk")[..], &[0, 0, 0, 1], &len.to_be_bytes()].concat();
        assert_eq!(
            talk.kind_of(opt::LIST_META_CONTEXT, &query),
            reply::ERR_INVALID
        );
        // As the length of an option.
        let header = option_header(opt::EXPORT_NAME, len);
        assert_eq!(talk.input(&header).outcome, Outcome::Close);
    }
}

/// CVE-2022-26496 (nbd-server): the name in INFO and GO was read into a fixed buffer by its own
/// length, not by that of the option. A name that claims to go on behind its option must not eat
/// what follows.
#[test]
fn cve_2022_26496_a_name_longer_than_its_option() {
    let mut talk = Talk::new();
    let mut payload = 2000_u32.to_be_bytes().to_vec();
    payload.extend_from_slice(b"disk\0\0");
    let pipelined = [option(opt::INFO, &payload), option(opt::LIST, &[])].concat();
    assert_eq!(talk.input(&pipelined).consumed, pipelined.len());
    let kinds: Vec<_> = replies(talk.server.output())
        .iter()
        .map(|r| r.kind)
        .collect();
    let list = [reply::SERVER, reply::SERVER, reply::ACK];
    assert_eq!(kinds, [&[reply::ERR_INVALID][..], &list].concat());
}

/// CVE-2019-14850 (nbdkit): the disk behind an export was opened as soon as anyone connected, so
/// that mere connections could exhaust it. Here nothing is looked up until an option names it.
#[test]
fn cve_2019_14850_nothing_is_opened_before_it_is_named() {
    let mut talk = Talk::new();
    talk.ask(opt::STRUCTURED_REPLY, &[]);
    talk.ask(opt::LIST, &[]);
    talk.ask(opt::STARTTLS, &[]);
    let go = option(opt::GO, &named("disk", &[]));
    talk.input(&go[..go.len() - 1]);
    assert_eq!(talk.exports.lookups.get(), 0);
    talk.input(&go[go.len() - 1..]);
    assert_eq!(talk.exports.lookups.get(), 1);
}

/// CVE-2019-14851 (nbdkit): INFO opened the disk, and a second INFO or GO, perhaps of another
/// export, met an assertion that it was not open yet. Each one stands for itself here.
#[test]
fn cve_2019_14851_info_again_and_again() {
    let mut talk = Talk::new();
    for name in ["disk", "other", "nosuch", "disk", ""] {
        let expected = if name == "nosuch" {
            reply::ERR_UNKNOWN
        } else {
            reply::INFO
        };
        let replies = talk.ask(opt::INFO, &named(name, &[]));
        assert_eq!(replies[0].kind, expected);
    }
    assert_eq!(talk.go("other", &[]).0.export.canonical_name, "other");
}
