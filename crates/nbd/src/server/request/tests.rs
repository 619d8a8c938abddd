//! Every rule for requests, and the arithmetic at its edges.

use proptest::prelude::*;

use super::*;
use crate::server::{Context, ExportInfo};
use crate::wire::{BASE_ALLOCATION, MAX_PAYLOAD_BYTES};

const SIZE: u64 = 1 << 30;
const ALL: u16 = export::HAS_FLAGS
    | export::SEND_FLUSH
    | export::SEND_FUA
    | export::SEND_TRIM
    | export::SEND_WRITE_ZEROES
    | export::SEND_DF
    | export::SEND_CACHE
    | export::SEND_FAST_ZERO;

fn session(flags: u16) -> Session {
    Session {
        export_name: String::new(),
        export: ExportInfo {
            canonical_name: "disk".to_owned(),
            description: String::new(),
            size_bytes: SIZE,
            flags,
            min_block: 1,
            preferred_block: 4096,
            max_payload: MAX_PAYLOAD_BYTES,
            block_size_required: false,
            contexts: vec![BASE_ALLOCATION],
        },
        structured: true,
        contexts: vec![Context {
            id: 1,
            name: BASE_ALLOCATION,
        }],
        opening: Vec::new(),
        max_payload_bytes: MAX_PAYLOAD_BYTES,
    }
}

fn rules(flags: u16) -> Rules {
    Rules::new(&session(flags))
}

fn request(command: u16, flags: u16, offset: u64, len: u32) -> Request {
    Request {
        flags,
        command,
        cookie: 7,
        offset,
        len,
    }
}

fn refuse(errno: Errno) -> Verdict {
    Verdict::Refuse {
        errno,
        payload_bytes: 0,
    }
}

/// The refusal of `r`, its payload being skipped if it is a WRITE.
fn refused(r: &Request, errno: Errno) -> Verdict {
    Verdict::Refuse {
        errno,
        payload_bytes: if r.command == command::WRITE {
            r.len
        } else {
            0
        },
    }
}

const RANGED: [u16; 6] = [
    command::READ,
    command::WRITE,
    command::TRIM,
    command::CACHE,
    command::WRITE_ZEROES,
    command::BLOCK_STATUS,
];

#[test]
fn a_header_is_taken_apart() {
    let mut bytes = [0; wire::REQUEST_BYTES];
    bytes[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
    for (at, byte) in bytes.iter_mut().enumerate().skip(4) {
        *byte = u8::try_from(at).expect("below 28");
    }
    let expected = Request {
        flags: 0x0405,
        command: 0x0607,
        cookie: 0x0809_0a0b_0c0d_0e0f,
        offset: 0x1011_1213_1415_1617,
        len: 0x1819_1a1b,
    };
    assert_eq!(Request::parse(&bytes), Ok(expected));
    bytes[3] ^= 1;
    let error = Request::parse(&bytes).expect_err("not the magic");
    assert_eq!(
        error.to_string(),
        "a request begins with 0x25609512 instead of the magic number 0x25609513"
    );
}

#[test]
fn commands_carry_what_was_asked() {
    let rules = rules(ALL);
    let (offset, len) = (4096, 512);
    for (command, flags, expected) in [
        (
            command::READ,
            flag::DF | flag::FUA,
            Command::Read {
                offset,
                len,
                df: true,
            },
        ),
        (
            command::WRITE,
            flag::FUA,
            Command::Write {
                offset,
                len,
                fua: true,
            },
        ),
        (
            command::WRITE,
            0,
            Command::Write {
                offset,
                len,
                fua: false,
            },
        ),
        (command::FLUSH, flag::FUA, Command::Flush),
        (
            command::TRIM,
            flag::FUA,
            Command::Trim {
                offset,
                len,
                fua: true,
            },
        ),
        (command::CACHE, flag::FUA, Command::Cache { offset, len }),
        (
            command::WRITE_ZEROES,
            flag::NO_HOLE,
            Command::WriteZeroes {
                offset,
                len,
                fua: false,
                no_hole: true,
                fast: false,
            },
        ),
        (
            command::WRITE_ZEROES,
            flag::FAST_ZERO | flag::FUA,
            Command::WriteZeroes {
                offset,
                len,
                fua: true,
                no_hole: false,
                fast: true,
            },
        ),
        (
            command::BLOCK_STATUS,
            flag::REQ_ONE,
            Command::BlockStatus {
                offset,
                len,
                one: true,
            },
        ),
        (command::DISC, 0xffff, Command::Disconnect),
    ] {
        let request = request(command, flags, offset, len);
        assert_eq!(rules.check(&request), Verdict::Run(expected));
    }
}

#[test]
fn past_the_end_also_by_way_of_2_to_the_64() {
    let rules = rules(ALL);
    for command in RANGED {
        let errno = match command {
            command::WRITE | command::WRITE_ZEROES => Errno::NoSpc,
            _ => Errno::Inval,
        };
        for (offset, len) in [
            (SIZE, 1),
            (SIZE - 1, 2),
            (SIZE + 1, 1),
            (u64::MAX, 1),
            (u64::MAX - 511, 512),
            (u64::MAX - 511, 1024),
            (0, u32::MAX),
        ] {
            let request = request(command, 0, offset, len);
            let expected = match (command, len) {
                (command::WRITE, u32::MAX) => Verdict::Close,
                _ => refused(&request, errno),
            };
            assert_eq!(rules.check(&request), expected, "{request:?}");
        }
        for (offset, len) in [(SIZE - 1, 1), (0, 1), (SIZE - 4096, 4096)] {
            let verdict = rules.check(&request(command, 0, offset, len));
            assert!(matches!(verdict, Verdict::Run(_)), "{verdict:?}");
        }
    }
}

#[test]
fn requests_of_no_bytes_touch_nothing() {
    let rules = rules(ALL);
    for command in RANGED {
        for offset in [0, 1, SIZE] {
            let expected = match command {
                command::BLOCK_STATUS => refuse(Errno::Inval),
                _ => Verdict::Done,
            };
            assert_eq!(rules.check(&request(command, 0, offset, 0)), expected);
        }
        for (flags, offset) in [(0, SIZE + 1), (0, u64::MAX), (1 << 15, 0)] {
            let verdict = rules.check(&request(command, flags, offset, 0));
            assert!(matches!(verdict, Verdict::Refuse { .. }), "{verdict:?}");
        }
    }
}

#[test]
fn payloads_are_bounded_but_what_has_none_is_not() {
    let rules = rules(ALL);
    let check = |command, len| rules.check(&request(command, 0, 0, len));
    let over = MAX_PAYLOAD_BYTES + 1;
    for command in [command::READ, command::WRITE] {
        assert!(matches!(check(command, MAX_PAYLOAD_BYTES), Verdict::Run(_)));
    }
    assert_eq!(check(command::READ, over), refuse(Errno::Overflow));
    assert_eq!(
        check(command::WRITE, 33 << 20),
        Verdict::Refuse {
            errno: Errno::Inval,
            payload_bytes: 33 << 20
        }
    );
    let skipped = limits::WRITE_SKIPPED_BYTES;
    assert!(matches!(
        check(command::WRITE, skipped),
        Verdict::Refuse { .. }
    ));
    assert_eq!(check(command::WRITE, skipped + 1), Verdict::Close);
    for command in [
        command::TRIM,
        command::CACHE,
        command::WRITE_ZEROES,
        command::BLOCK_STATUS,
    ] {
        assert!(matches!(check(command, 1 << 30), Verdict::Run(_)));
    }
}

#[test]
fn a_read_only_export_permits_no_change() {
    // Also where the commands are not offered: the reason that is told is the plain one.
    for flags in [ALL | export::READ_ONLY, export::READ_ONLY] {
        let rules = rules(flags);
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            let request = request(command, 0, 0, 512);
            assert_eq!(rules.check(&request), refused(&request, Errno::Perm));
        }
        let read = request(command::READ, 0, 0, 512);
        assert!(matches!(rules.check(&read), Verdict::Run(_)));
    }
}

#[test]
fn commands_that_are_not_offered_or_not_known_are_invalid() {
    let mut bare = session(export::HAS_FLAGS);
    bare.contexts.clear();
    let bare = Rules::new(&bare);
    for command in [
        command::FLUSH,
        command::TRIM,
        command::CACHE,
        command::WRITE_ZEROES,
        command::BLOCK_STATUS,
    ] {
        assert_eq!(
            bare.check(&request(command, 0, 0, 512)),
            refuse(Errno::Inval)
        );
    }
    for command in [command::RESIZE, 9, 100, u16::MAX] {
        assert_eq!(
            rules(ALL).check(&request(command, 0, 0, 512)),
            refuse(Errno::Inval)
        );
    }
}

/// For each command, exactly the flags of the document pass, and only if they were offered.
#[test]
fn flags_belong_to_their_commands() {
    let allowed = |command: u16| match command {
        command::READ => flag::FUA | flag::DF,
        command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
        _ => flag::FUA,
    };
    let withdrawn = export::SEND_FUA | export::SEND_DF | export::SEND_FAST_ZERO;
    let not_offered = flag::FUA | flag::DF | flag::FAST_ZERO;
    for command in RANGED.into_iter().chain([command::FLUSH]) {
        for bit in 0..16 {
            let request = request(command, 1 << bit, 0, 512);
            let offered = rules(ALL).check(&request);
            let plain = rules(ALL & !withdrawn).check(&request);
            if request.flags & allowed(command) == 0 {
                assert_eq!(offered, refused(&request, Errno::Inval));
            } else {
                assert!(matches!(offered, Verdict::Run(_)), "{request:?}");
            }
            if request.flags & allowed(command) & !not_offered == 0 {
                assert_eq!(plain, refused(&request, Errno::Inval));
            }
        }
    }
}

#[test]
fn offsets_and_lengths_keep_to_the_smallest_block() {
    let mut session = session(ALL);
    session.export.min_block = 512;
    let rules = Rules::new(&session);
    for command in RANGED {
        for (offset, len, fits) in [(512, 512, true), (1, 512, false), (512, 513, false)] {
            let request = request(command, 0, offset, len);
            let verdict = rules.check(&request);
            if fits {
                assert!(matches!(verdict, Verdict::Run(_)));
            } else {
                assert_eq!(verdict, refused(&request, Errno::Inval));
            }
        }
    }
}

fn range_of(command: Command) -> Option<(u64, u32)> {
    match command {
        Command::Read { offset, len, .. }
        | Command::Write { offset, len, .. }
        | Command::Trim { offset, len, .. }
        | Command::Cache { offset, len }
        | Command::WriteZeroes { offset, len, .. }
        | Command::BlockStatus { offset, len, .. } => Some((offset, len)),
        Command::Flush | Command::Disconnect => None,
    }
}

proptest! {
    /// Whatever bytes come: what may run lies within the disk, and what is refused has a payload
    /// that can be skipped.
    #[test]
    fn verdicts_keep_their_word(
        mut bytes in any::<[u8; wire::REQUEST_BYTES]>(),
        export_flags in any::<u16>(),
        likely in any::<bool>(),
    ) {
        if likely {
            bytes[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
            bytes[4] = 0;
            bytes[5] &= 0x1f;
            bytes[6] = 0;
            bytes[7] %= 9;
            bytes[16..20].fill(0);
            bytes[24] &= 3;
        }
        let Ok(request) = Request::parse(&bytes) else {
            return Ok(());
        };
        match rules(export_flags).check(&request) {
            Verdict::Run(command) => {
                if let Some((offset, len)) = range_of(command) {
                    prop_assert!(len > 0);
                    prop_assert!(offset.checked_add(len.into()).is_some_and(|end| end <= SIZE));
                }
                if let Command::Read { len, .. } | Command::Write { len, .. } = command {
                    prop_assert!(len <= MAX_PAYLOAD_BYTES);
                }
                if export_flags & export::READ_ONLY != 0 {
                    let changes = matches!(
                        command,
                        Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. }
                    );
                    prop_assert!(!changes);
                }
            }
            Verdict::Done => prop_assert_eq!(request.len, 0),
            Verdict::Refuse { payload_bytes, .. } => {
                let is_write = request.command == command::WRITE;
                prop_assert_eq!(payload_bytes, if is_write { request.len } else { 0 });
                prop_assert!(payload_bytes <= limits::WRITE_SKIPPED_BYTES);
            }
            Verdict::Close => prop_assert!(request.len > limits::WRITE_SKIPPED_BYTES),
        }
    }
}
