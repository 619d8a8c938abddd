//! Whatever is encoded comes back; whatever is changed on its way does not.
#![allow(clippy::unwrap_used)]

use hikkoshi_nbd::wire::Errno;
use proptest::collection::vec;
use proptest::prelude::*;

use super::super::message::{
    Extent, Request, Wish, encode_error, encode_extents, grain_fits, hashes_of, parse_error,
    parse_extents, parse_hashes,
};
use super::*;
use crate::transport::pack::Packing;

fn priority() -> impl Strategy<Value = Priority> {
    (0..u8::try_from(Priority::LEVELS).unwrap()).prop_map(|n| Priority::from_wire(n).unwrap())
}

fn request() -> impl Strategy<Value = Request> {
    let range = (any::<u64>(), 0..1u64 << 62, 1..=limits::READ_BYTES);
    let wish = prop_oneof![
        Just(Wish::Read {
            packing: Packing::Zstd(7)
        }),
        Just(Wish::Read {
            packing: Packing::None
        }),
        Just(Wish::Extents),
        (9..=16u32).prop_map(|log| Wish::Hash { grain: 1 << log }),
    ];
    prop_oneof![
        (range, priority(), wish).prop_map(|((id, offset, len), priority, wish)| {
            let most = match wish {
                Wish::Hash { grain } => grain * limits::HASHES,
                _ => limits::READ_BYTES,
            };
            Request::Wish {
                id,
                priority,
                wish,
                offset,
                len: len.min(most).min(limits::HASH_BYTES),
            }
        }),
        any::<u64>().prop_map(Request::Cancel),
        (any::<u64>(), priority()).prop_map(|(id, p)| Request::Promote(id, p)),
        (any::<u64>(), priority()).prop_map(|(id, p)| Request::Ping(id, p)),
        (any::<u64>(), priority()).prop_map(|(id, p)| Request::Flush(id, p)),
    ]
}

/// A reply as a server makes them.
fn reply() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let kinds = prop_oneof![
        (1..5000u32).prop_map(|n| (Kind::Data, n, n, false)),
        (1..=limits::READ_BYTES).prop_map(|span| (Kind::Zero, span, 0, false)),
        (1..9u32).prop_map(|n| (Kind::ExtentList, 1 << 20, n * limits::EXTENT_LEN, true)),
        (1..9u32).prop_map(|n| (Kind::Hashes, 1 << 20, n * limits::HASH_LEN, true)),
        (4..200u32).prop_map(|n| (Kind::Error, 0, n, true)),
        Just((Kind::End, 0, 0, true)),
    ];
    let more = (
        priority(),
        any::<u64>(),
        0..1u64 << 60,
        any::<bool>(),
        any::<u8>(),
    );
    (kinds, more).prop_map(
        |((kind, span, len, last), (priority, id, offset, end, fill))| {
            let payload = vec![fill; usize::try_from(len).unwrap()];
            let offset = if span == 0 { 0 } else { offset };
            let mut header = Header::request(kind, priority, id, offset, span);
            header.last = last || end;
            (header.with_payload(&payload), payload)
        },
    )
}

fn decode_all(side: Side, bytes: &[u8], cuts: &[usize]) -> Result<Vec<Frame>, FrameError> {
    let mut decoder = Decoder::new(side);
    let mut frames = Vec::new();
    let mut rest = bytes;
    let mut cuts = cuts.iter().copied().cycle();
    while !rest.is_empty() {
        let cut = cuts.next().unwrap_or(1).clamp(1, rest.len());
        decoder.push(&rest[..cut]);
        rest = &rest[cut..];
        while let Some(frame) = decoder.next_frame()? {
            frames.push(frame);
        }
    }
    Ok(frames)
}

proptest! {
    #[test]
    fn requests_come_back_however_they_are_cut(
        requests in vec(request(), 1..8),
        cuts in vec(1usize..90, 1..5),
    ) {
        let bytes: Vec<u8> = requests.iter().flat_map(Request::encode).collect();
        let frames = decode_all(Side::Client, &bytes, &cuts).unwrap();
        let back: Vec<Request> = frames.iter().map(|f| Request::parse(f).unwrap()).collect();
        prop_assert_eq!(back, requests);
        prop_assert!(decode_all(Side::Server, &bytes, &cuts).is_err());
    }

    #[test]
    fn replies_come_back_however_they_are_cut(
        replies in vec(reply(), 1..8),
        cuts in vec(1usize..900, 1..5),
    ) {
        let bytes: Vec<u8> = replies
            .iter()
            .flat_map(|(header, payload)| [&header.encode()[..], payload].concat())
            .collect();
        let frames = decode_all(Side::Server, &bytes, &cuts).unwrap();
        let back: Vec<_> = frames.into_iter().map(|f| (f.header, f.payload)).collect();
        prop_assert_eq!(back, replies);
    }

    /// CRC-32C finds every burst of up to 32 bits, so a byte that changed is found every time.
    #[test]
    fn a_changed_byte_is_never_taken(
        (header, payload) in reply(),
        at in any::<proptest::sample::Index>(),
        change in 1..=255u8,
    ) {
        let mut bytes = [&header.encode()[..], &payload].concat();
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        match decode_all(Side::Server, &bytes, &[bytes.len()]) {
            Ok(frames) => prop_assert!(frames.is_empty(), "taken: {:?}", frames),
            Err(error) => prop_assert!(error.is_checksum() || at < 4, "{}", error),
        }
    }

    #[test]
    fn garbage_is_refused_and_holds_nothing(bytes in vec(any::<u8>(), 0..300)) {
        for side in [Side::Client, Side::Server] {
            let mut decoder = Decoder::new(side);
            decoder.push(&bytes);
            match decoder.next_frame() {
                Ok(_) => prop_assert!(bytes.len() < HEADER_BYTES),
                Err(error) => {
                    decoder.push(&bytes);
                    prop_assert_eq!(decoder.next_frame(), Err(error));
                    prop_assert_eq!(decoder.held(), 0);
                }
            }
        }
    }

    /// A header with a good checksum may still say anything.
    #[test]
    fn lies_with_a_good_checksum_stay_in_bounds(
        mut bytes in proptest::array::uniform32(any::<u8>()),
        kind in 0..=0x90u8,
        small in any::<bool>(),
    ) {
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4] = kind;
        if small {
            bytes[5] %= 7;
            bytes[6..8].fill(0);
            bytes[24..26].fill(0);
        }
        let crc = crc32c::crc32c(&[&bytes[..], &[0; 4]].concat());
        let whole = [&bytes[..], &[0; 4], &crc.to_be_bytes()].concat();
        if let Ok(header) = Header::decode(whole[..].try_into().unwrap()) {
            prop_assert!(header.payload_len <= limits::REPLY_PAYLOAD_BYTES);
            prop_assert!(header.span <= limits::EXTENTS_BYTES);
            prop_assert!(header.offset.checked_add(header.span.into()).is_some());
        }
    }

    #[test]
    fn extents_come_back_and_must_add_up(
        extents in vec((1..1u32 << 20, any::<bool>()), 1..50),
        cut in 1..8usize,
    ) {
        let extents: Vec<_> = extents.iter().map(|&(len, zero)| Extent { len, zero }).collect();
        let span = extents.iter().map(|e| e.len).sum();
        let payload = encode_extents(&extents);
        prop_assert_eq!(parse_extents(&payload, span), Some(extents));
        prop_assert_eq!(parse_extents(&payload, span + 1), None);
        prop_assert_eq!(parse_extents(&payload, span - 1), None);
        prop_assert_eq!(parse_extents(&payload[..payload.len() - cut], span), None);
    }
}

#[test]
fn a_header_is_these_bytes() {
    // Written down, so that a change of the format does not go unnoticed: see docs/wire.md.
    let header = Header {
        kind: Kind::Data,
        priority: Priority::COLD,
        packing: 0,
        last: true,
        id: 0x0102_0304_0506_0708,
        offset: 0x1000,
        span: 4,
        payload_len: 0,
        payload_crc: 0,
    }
    .with_payload(b"abcd");
    let expected = [
        0x48, 0x4b, 0x46, 0x35, 0x81, 4, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
        0, 0, 0, 4, 0, 0, 0, 4, 0x92, 0xc8, 0x0a, 0x31,
    ];
    let bytes = header.encode();
    assert_eq!(bytes[..36], expected);
    assert_eq!(bytes[36..], crc32c::crc32c(&expected).to_be_bytes());
}

#[test]
fn a_payload_belongs_where_its_header_says() {
    let data = vec![7; 512];
    let good = Header::request(Kind::Data, Priority::DEMAND, 1, 512, 512).with_payload(&data);
    assert_eq!(good.check_payload(&data), Ok(()));
    let wrong = FrameError::PayloadChecksum {
        offset: 512,
        len: 512,
    };
    assert_eq!(good.check_payload(&data[1..]), Err(wrong));
    for bad in [
        Header { span: 513, ..good },
        Header {
            payload_len: 0,
            ..good
        },
        Header {
            offset: u64::MAX,
            ..good
        },
        Header {
            kind: Kind::End,
            ..good
        },
        Header {
            kind: Kind::Read,
            ..good
        },
    ] {
        let error = Header::decode(&bad.encode()).unwrap_err();
        assert!(matches!(error, FrameError::Numbers(_)), "{bad:?}");
    }
}

#[test]
fn hashes_are_of_the_grains() {
    let data: Vec<u8> = (0..3000u32).map(|n| n.to_le_bytes()[0]).collect();
    let hashes = hashes_of(&data, 1024);
    assert_eq!(hashes.len(), 3);
    assert_eq!(&hashes[2], blake3::hash(&data[2048..]).as_bytes());
    let payload = hashes.concat();
    assert_eq!(parse_hashes(&payload, 3000, 1024), Some(hashes));
    assert_eq!(parse_hashes(&payload, 2048, 1024), None);
    assert_eq!(parse_hashes(&payload[1..], 3000, 1024), None);
    assert!(grain_fits(65536, limits::HASH_BYTES) && !grain_fits(65536 * 2, 1));
    assert!(!grain_fits(512, limits::HASH_BYTES) && !grain_fits(0, 1) && !grain_fits(768, 1));
}

#[test]
fn errors_are_short_and_shown_safely() {
    let payload = encode_error(Errno::Io, &"é".repeat(1000));
    assert!(payload.len() <= 4 + limits::ERROR_TEXT_BYTES as usize);
    let (errno, text) = parse_error(&payload).unwrap();
    assert_eq!((errno, text.as_str()), (Errno::Io, &*"é".repeat(128)));
    let rude = parse_error(b"\0\0\0\x05\x1b[31mred\xff").unwrap();
    assert_eq!(rude, (Errno::Io, " [31mred\u{fffd}".to_owned()));
    assert_eq!(parse_error(&[0, 0, 0]), None);
}
