//! What two daemons of ours say to each other, from bytes: frames, requests, answers, messages about
//! the move, compressed payloads, heat maps and witnesses.
//!
//! The first byte chooses the way in. Checksums are put right, or nothing would ever come past them.
//! What must hold:
//! - nothing panics, and memory is bounded;
//! - frames do not depend on how their bytes are cut;
//! - what is understood says the same again when it is written out and read back;
//! - a scheduler gives each request's bytes once, in order, from the first to the last;
//! - whatever is told of a disk is inside it; what is decompressed has the length that was announced,
//!   and the checksum.

use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::heat::HeatMap;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_wan::transport::frame::Side;
use hikkoshi_wan::transport::message::{self, Request, parse_error, parse_extents, parse_hashes};
use hikkoshi_wan::transport::pack::{Codec, Packer, Packing, Unpacker};
use hikkoshi_wan::transport::session::{Tell, Told};
use hikkoshi_wan::transport::{Decoder, Frame, HEADER_BYTES, Kind, Scheduler, Work, limits};

use crate::input::Input;
use crate::memory;

/// The disk that is spoken of.
const DISK_BYTES: u64 = 64 << 20;

/// A quantum, its compressed form, and what a decoder holds.
const MEMORY_BOUND: usize = 8 << 20;

/// Steps of a scheduler that are looked at.
const MOST_STEPS: usize = 4096;

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.byte();
    let bound = MEMORY_BOUND + 64 * data.len();
    memory::within(bound, "what was sent", || match how % 6 {
        0 => requests(&mut input),
        1 => replies(&mut input),
        2 => messages(&mut input),
        3 => packed(&mut input),
        4 => maps(&mut input),
        _ => raw(&mut input),
    });
}

/// Bytes as they come, cut anyhow.
fn raw(input: &mut Input<'_>) {
    let side = [Side::Client, Side::Server][input.below(2)];
    let mut decoder = Decoder::new(side);
    while !input.is_empty() {
        let len = input.below(64) + 1;
        decoder.push(input.take(len));
        while let Ok(Some(_)) = decoder.next_frame() {}
    }
}

/// The bytes of a frame whose numbers are any, and whose checksums are right.
fn a_frame(input: &mut Input<'_>) -> Vec<u8> {
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&hikkoshi_wan::transport::frame::MAGIC.to_be_bytes());
    header[4] = input.byte();
    header[5] = input.byte();
    header[6..8].copy_from_slice(&input.u16().to_be_bytes());
    header[8..16].copy_from_slice(&u64::from(input.byte()).to_be_bytes());
    let offset = u64::from(input.u16()) << input.below(32);
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    let span = u32::from(input.u16()) << input.below(16);
    header[24..28].copy_from_slice(&span.to_be_bytes());
    let len = usize::from(input.u16());
    let payload = input.take(len % 2048);
    let len = u32::try_from(payload.len()).expect("short");
    header[28..32].copy_from_slice(&len.to_be_bytes());
    header[32..36].copy_from_slice(&crc32c::crc32c(payload).to_be_bytes());
    let crc = crc32c::crc32c(&header[..36]);
    header[36..].copy_from_slice(&crc.to_be_bytes());
    [&header[..], payload].concat()
}

/// The frames in bytes, cut into pieces in two ways, which must not matter.
fn frames(side: Side, bytes: &[u8], cut: usize) -> Vec<Frame> {
    let decode = |piece: usize| {
        let mut decoder = Decoder::new(side);
        let mut frames = Vec::new();
        let mut failed = None;
        for piece in bytes.chunks(piece.max(1)) {
            decoder.push(piece);
            while failed.is_none() {
                match decoder.next_frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => failed = Some(error),
                }
            }
        }
        (frames, failed)
    };
    let whole = decode(bytes.len());
    assert_eq!(
        decode(cut),
        whole,
        "how bytes are cut decides what they say"
    );
    whole.0
}

fn requests(input: &mut Input<'_>) {
    let cut = input.below(100) + 1;
    let mut bytes = Vec::new();
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        bytes.extend(a_frame(input));
    }
    let mut scheduler = Scheduler::new(DISK_BYTES);
    for frame in frames(Side::Client, &bytes, cut) {
        if frame.header.kind == Kind::Tell {
            if let Some(tell) = Tell::decode(&frame.payload) {
                assert_eq!(Tell::decode(&tell.encode()), Some(tell));
            }
            continue;
        }
        let Ok(request) = Request::parse(&frame) else {
            return;
        };
        let again = frames(Side::Client, &request.encode(), 7);
        assert_eq!(again.len(), 1, "a request that is written out is one");
        assert_eq!(Request::parse(&again[0]).ok(), Some(request));
        if scheduler.submit(request).is_err() {
            return;
        }
    }
    let mut reached = std::collections::HashMap::new();
    for _ in 0..MOST_STEPS {
        let Some(step) = scheduler.peek() else {
            break;
        };
        if let Work::Wish(_) = step.work {
            assert!(step.offset + u64::from(step.len) <= DISK_BYTES);
            let next = reached.entry(step.id).or_insert(step.offset);
            assert_eq!(*next, step.offset, "bytes are skipped or come twice");
            *next += u64::from(step.len);
        }
        scheduler.done(&step);
    }
}

fn replies(input: &mut Input<'_>) {
    let cut = input.below(100) + 1;
    let mut bytes = Vec::new();
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        bytes.extend(a_frame(input));
    }
    for frame in frames(Side::Server, &bytes, cut) {
        let span = frame.header.span;
        match frame.header.kind {
            Kind::ExtentList => {
                if let Some(extents) = parse_extents(&frame.payload, span) {
                    let all: u64 = extents.iter().map(|extent| u64::from(extent.len)).sum();
                    assert_eq!(all, u64::from(span));
                    assert_eq!(message::encode_extents(&extents), frame.payload);
                }
            }
            Kind::Hashes => {
                if let Some(hashes) = parse_hashes(&frame.payload, span, 4096) {
                    assert_eq!(hashes.len(), span.div_ceil(4096) as usize);
                }
            }
            Kind::Error => {
                if let Some((_, text)) = parse_error(&frame.payload) {
                    assert!(!text.contains(char::is_control));
                }
            }
            Kind::Data => {
                let codec = Codec::from_flags(frame.header.packing).expect("checked already");
                if let Some(codec) = codec {
                    check_unpacked(codec, &frame.payload, span as usize);
                }
            }
            _ => {}
        }
    }
}

fn check_unpacked(codec: Codec, payload: &[u8], len: usize) {
    let len = len.min(limits::QUANTUM_BYTES as usize);
    let mut out = vec![1, 2, 3];
    match Unpacker::default().unpack(codec, payload, len, &mut out) {
        Some(()) => {
            assert_eq!(out.len(), 3 + len);
            assert_eq!(payload[..4], crc32c::crc32c(&out[3..]).to_be_bytes());
        }
        None => assert_eq!(out, [1, 2, 3]),
    }
}

fn messages(input: &mut Input<'_>) {
    let bytes = input.rest();
    if let Some(tell) = Tell::decode(bytes) {
        assert_eq!(tell.encode(), bytes, "a message that nobody would write");
    }
    let Some(told) = Told::decode(bytes, DISK_BYTES) else {
        return;
    };
    if let Told::Changes { ranges }
    | Told::Differs { ranges, .. }
    | Told::Fenced {
        ranges: Some(ranges),
        ..
    } = &told
    {
        assert!(ranges.iter().all(|range| range.end <= DISK_BYTES));
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
    assert_eq!(Told::decode(&told.encode(), DISK_BYTES), Some(told));
}

fn packed(input: &mut Input<'_>) {
    let codec = [Codec::Lz4, Codec::Zstd][input.below(2)];
    let packing = [
        Packing::Auto,
        Packing::Lz4,
        Packing::Zstd(3),
        Packing::Zstd(12),
    ][input.below(4)];
    let len = usize::from(input.u16());
    let bytes = input.rest();
    check_unpacked(codec, bytes, len);
    // With the right checksum for what it would be, if it is something.
    let raw = &bytes[..bytes.len().min(limits::QUANTUM_BYTES as usize)];
    if let Some((codec, payload)) = Packer::default().pack(packing, 0, raw) {
        let most = raw.len() + limits::PACKED_EXTRA_BYTES as usize;
        assert!(payload.len() <= most);
        let mut out = Vec::new();
        Unpacker::default()
            .unpack(codec, &payload, raw.len(), &mut out)
            .expect("what was packed comes out");
        assert_eq!(out, raw);
    }
}

fn maps(input: &mut Input<'_>) {
    let fixed = input.below(2) == 1;
    let which = input.below(2);
    let mut bytes = input.rest().to_vec();
    if fixed && bytes.len() > 4 {
        let end = bytes.len() - 4;
        let crc = crc32c::crc32c(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&crc);
    }
    if which == 0 {
        if let Ok(map) = HeatMap::decode(&bytes) {
            assert_eq!(HeatMap::decode(&map.encode()).as_ref(), Ok(&map));
        }
        return;
    }
    let geometry = Geometry::new(DISK_BYTES, 4096).expect("a good shape");
    let id = [3; 16];
    if let Ok(witnesses) = Witnesses::decode(&bytes, id, geometry, 7) {
        assert_eq!(
            witnesses.encode(id),
            bytes,
            "witnesses that nobody would write"
        );
    }
}
