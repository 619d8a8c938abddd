//! Short programs that make the frames of a client or a server: mostly well formed, and always with
//! the right checksums. An instruction is a byte and its operands; every byte sequence is a program.

use hikkoshi_wan::transport::message::{self, Extent};
use hikkoshi_wan::transport::pack::{Packer, Packing};
use hikkoshi_wan::transport::session::{
    Attached, Boots, HandedOver, MoveId, OldCopy, Stance, Tell, Told,
};

use crate::input::Input;
use crate::nbd_server::script::range;

/// Bytes that a program makes at most. They fit into a socket's buffer.
pub const MOST_BYTES: usize = 96 << 10;

/// The instructions of a client, by their numbers. The seeds are written in them.
pub mod ask {
    /// Priority, packing, range.
    pub const READ: u8 = 0;
    /// Priority, range.
    pub const EXTENTS: u8 = 1;
    /// Priority, grain, range.
    pub const HASH: u8 = 2;
    /// How many requests back.
    pub const CANCEL: u8 = 3;
    /// How many requests back, priority.
    pub const PROMOTE: u8 = 4;
    /// Priority; with the top bit it is FLUSH.
    pub const PING: u8 = 5;
    /// Message, move, number.
    pub const TELL: u8 = 6;
    /// By how much: the next number is higher.
    pub const SKIP: u8 = 7;
    /// Any frame.
    pub const FRAME: u8 = 8;
    /// Length, bytes: as they are.
    pub const BYTES: u8 = 9;
    /// How many instructions there are.
    pub const COUNT: u8 = 10;
}

/// The instructions of a server.
pub mod say {
    /// Question: the right answer, packing.
    pub const WHOLE: u8 = 0;
    /// Question, place, count, last, packing: some of its bytes.
    pub const DATA: u8 = 1;
    /// Question, place, count, last: zeroes.
    pub const ZERO: u8 = 2;
    /// Question, count, state, last: extents.
    pub const EXTENTS: u8 = 3;
    /// Question, count, last: hashes.
    pub const HASHES: u8 = 4;
    /// Question, error.
    pub const ERROR: u8 = 5;
    /// Question.
    pub const END: u8 = 6;
    /// Answer, number, last: about a move.
    pub const TOLD: u8 = 7;
    /// Any frame.
    pub const FRAME: u8 = 8;
    /// Length, bytes: as they are.
    pub const BYTES: u8 = 9;
    /// Question, place, count, codec, length, bytes: bytes that are called compressed.
    pub const PACKED: u8 = 10;
    /// How many instructions there are.
    pub const COUNT: u8 = 11;
}

mod kind {
    pub const READ: u8 = 0x01;
    pub const EXTENTS: u8 = 0x02;
    pub const HASH: u8 = 0x03;
    pub const CANCEL: u8 = 0x04;
    pub const PROMOTE: u8 = 0x05;
    pub const PING: u8 = 0x06;
    pub const FLUSH: u8 = 0x07;
    pub const TELL: u8 = 0x10;
    pub const DATA: u8 = 0x81;
    pub const ZERO: u8 = 0x82;
    pub const EXTENT_LIST: u8 = 0x83;
    pub const HASHES: u8 = 0x84;
    pub const ERROR: u8 = 0x85;
    pub const END: u8 = 0x86;
    pub const TOLD: u8 = 0x90;
}

const LAST: u16 = 1;

/// A frame by its numbers, with its checksums made right.
#[derive(Clone, Copy, Default)]
struct Numbers {
    kind: u8,
    priority: u8,
    flags: u16,
    id: u64,
    offset: u64,
    span: u32,
}

impl Numbers {
    fn put(self, payload: &[u8], out: &mut Vec<u8>) {
        let mut header = b"HKF5".to_vec();
        header.extend_from_slice(&[self.kind, self.priority]);
        header.extend_from_slice(&self.flags.to_be_bytes());
        header.extend_from_slice(&self.id.to_be_bytes());
        header.extend_from_slice(&self.offset.to_be_bytes());
        header.extend_from_slice(&self.span.to_be_bytes());
        header.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        header.extend_from_slice(&crc32c::crc32c(payload).to_be_bytes());
        let crc = crc32c::crc32c(&header);
        header.extend_from_slice(&crc.to_be_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(payload);
    }
}

fn any_frame(program: &mut Input<'_>, out: &mut Vec<u8>) {
    let numbers = Numbers {
        kind: program.byte(),
        priority: program.byte(),
        flags: program.u16(),
        id: program.byte().into(),
        offset: u64::from(program.u16()) << (program.byte() % 64),
        span: u32::from(program.u16()) << (program.byte() % 32),
    };
    let len = program.byte();
    numbers.put(program.take(len.into()), out);
}

fn as_they_are(program: &mut Input<'_>, out: &mut Vec<u8>) {
    let len = program.byte();
    out.extend_from_slice(program.take(len.into()));
}

fn move_id(program: &mut Input<'_>) -> MoveId {
    [program.byte(); 16]
}

// A client's

/// The frames of a client of a disk of `size` bytes.
pub fn client_bytes(program: &mut Input<'_>, size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    let mut next_id = 0;
    while !program.is_empty() && out.len() < MOST_BYTES {
        request(program, size, &mut next_id, &mut out);
    }
    out
}

fn request(program: &mut Input<'_>, size: u64, next_id: &mut u64, out: &mut Vec<u8>) {
    let op = program.byte() % ask::COUNT;
    let mut numbers = Numbers::default();
    let mut payload = Vec::new();
    match op {
        ask::READ | ask::EXTENTS | ask::HASH => {
            numbers.kind = [kind::READ, kind::EXTENTS, kind::HASH][usize::from(op)];
            numbers.priority = program.byte() % 7;
            match op {
                ask::READ => numbers.flags = packing(program).flags(),
                ask::HASH => payload = (512_u32 << (program.byte() % 8)).to_be_bytes().to_vec(),
                _ => {}
            }
            (numbers.offset, numbers.span) = range(program, size);
        }
        ask::CANCEL | ask::PROMOTE => {
            numbers.kind = [kind::CANCEL, kind::PROMOTE][usize::from(op - ask::CANCEL)];
            numbers.id = next_id.saturating_sub(program.byte().into());
            numbers.priority = program.byte() % 7;
            return numbers.put(&[], out);
        }
        ask::PING => {
            let byte = program.byte();
            numbers.kind = [kind::PING, kind::FLUSH][usize::from(byte >> 7)];
            numbers.priority = byte % 7;
        }
        ask::TELL => {
            numbers.kind = kind::TELL;
            numbers.id = *next_id;
            return numbers.put(&tell(program).encode(), out);
        }
        ask::SKIP => {
            *next_id = next_id.saturating_add(program.u16().into());
            return;
        }
        ask::FRAME => return any_frame(program, out),
        _ => return as_they_are(program, out),
    }
    numbers.id = *next_id;
    *next_id += 1;
    numbers.put(&payload, out);
}

/// Any wish of a client about compression.
pub fn packing(program: &mut Input<'_>) -> Packing {
    match program.byte() {
        0 => Packing::None,
        1 => Packing::Lz4,
        2 => Packing::Auto,
        level => Packing::Zstd(level % 4 + 1),
    }
}

/// Any message about a move.
pub fn tell(program: &mut Input<'_>) -> Tell {
    let (which, id, epoch) = (program.byte(), move_id(program), program.byte().into());
    match which % 8 {
        0 | 1 => Tell::Attach {
            id,
            stance: [Stance::Standby, Stance::Arriving][usize::from(which % 2)],
            epoch,
            base: (which & 0x80 != 0).then_some([which; 16]),
        },
        2 => Tell::Changes {
            id,
            epoch,
            number: epoch,
        },
        3 => Tell::Handoff { id, epoch },
        4 => Tell::Abort { id },
        5 => Tell::Bases { id },
        6 => Tell::Done { id },
        _ => Tell::Heat { id },
    }
}

// A server's

/// A question that a server answers: its number on the wire, and what it is about.
#[derive(Clone, Copy)]
pub struct Known {
    /// From where.
    pub offset: u64,
    /// How much.
    pub len: u32,
    /// What of it.
    pub what: What,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The bytes.
    Data,
    /// The extents.
    Extents,
    /// The hashes of grains.
    Hashes {
        /// Bytes of each.
        grain: u32,
    },
}

/// What a disk holds there: every byte tells its place, and it can be compressed.
pub fn content(offset: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|n| ((offset + n) / 16 % 251) as u8)
        .collect()
}

/// The frames of a server that was asked `questions`, most of which have their place as number.
pub fn server_bytes(program: &mut Input<'_>, questions: &[Known]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut packer = Packer::default();
    while !program.is_empty() && out.len() < MOST_BYTES {
        reply(program, questions, &mut packer, &mut out);
    }
    out
}

fn reply(program: &mut Input<'_>, questions: &[Known], packer: &mut Packer, out: &mut Vec<u8>) {
    let op = program.byte() % say::COUNT;
    match op {
        say::FRAME => return any_frame(program, out),
        say::BYTES => return as_they_are(program, out),
        _ => {}
    }
    let id = program.byte();
    let question = questions.get(usize::from(id)).copied().unwrap_or(Known {
        offset: u64::from(id) << 18,
        len: 512,
        what: What::Data,
    });
    let mut numbers = Numbers {
        id: id.into(),
        ..Numbers::default()
    };
    match op {
        say::WHOLE => whole(numbers, question, packing(program), packer, out),
        say::DATA | say::ZERO | say::PACKED => {
            (numbers.offset, numbers.span) = part(program, question);
            match op {
                say::DATA => {
                    let last = last(program);
                    let raw = content(numbers.offset, numbers.span as usize);
                    data(numbers, &raw, last, packing(program), packer, out);
                }
                say::ZERO => {
                    numbers.kind = kind::ZERO;
                    numbers.flags = last(program);
                    numbers.put(&[], out);
                }
                _ => {
                    numbers.kind = kind::DATA;
                    numbers.flags = [2, 4, 6, 3, 5][program.below(5)];
                    let len = program.byte();
                    numbers.put(program.take(len.into()), out);
                }
            }
        }
        say::EXTENTS => {
            let extents: Vec<Extent> = (0..program.below(6))
                .map(|_| Extent {
                    len: question.len / 4 + u32::from(program.byte()),
                    zero: program.byte() & 1 == 1,
                })
                .collect();
            numbers.kind = kind::EXTENT_LIST;
            numbers.flags = LAST ^ last(program);
            numbers.offset = question.offset;
            numbers.span = extents.iter().map(|e| e.len).sum();
            numbers.put(&message::encode_extents(&extents), out);
        }
        say::HASHES => {
            numbers.kind = kind::HASHES;
            numbers.flags = LAST ^ last(program);
            numbers.offset = question.offset;
            numbers.span = question.len;
            numbers.put(&vec![id; 32 * program.below(40)], out);
        }
        say::ERROR => {
            numbers.kind = kind::ERROR;
            numbers.flags = LAST;
            let code = u32::from(program.byte());
            numbers.put(&[&code.to_be_bytes()[..], b"no\n\xff"].concat(), out);
        }
        say::END => {
            numbers.kind = kind::END;
            numbers.flags = LAST;
            numbers.put(&[], out);
        }
        _ => {
            numbers.kind = kind::TOLD;
            numbers.flags = LAST ^ last(program);
            numbers.put(&told(program), out);
        }
    }
}

/// Any answer about a move.
fn told(program: &mut Input<'_>) -> Vec<u8> {
    let (which, number) = (program.byte(), u64::from(program.byte()));
    let ranges = vec![hikkoshi_engine::geometry::ByteRange::at(number * 512, 512)];
    let told = match which % 7 {
        0 => Told::Attached(Attached {
            generation: number,
            epoch: number,
            handed_over: match number % 3 {
                _ if which & 0x80 == 0 => HandedOver::NotYet,
                2 => HandedOver::Never,
                _ => HandedOver::Already,
            },
            old_copy: match which & 0x60 {
                0 => OldCopy::Unknown,
                0x20 => OldCopy::Needed { block_bytes: 4096 },
                _ => OldCopy::Known,
            },
            boots: match which & 0x10 {
                0 => Boots::NONE,
                _ => Boots::of([which; 16], Boots::of([1; 16], Boots::NONE)),
            },
        }),
        1 => Told::Changes { ranges },
        2 => Told::Fenced {
            generation: number,
            ranges: (which & 0x80 == 0).then_some(ranges),
        },
        3 => Told::Bases(vec![([which; 16], ranges)]),
        4 => Told::Heat(vec![which; number as usize]),
        5 => Told::Fine,
        _ => Told::Refused("no\n".into()),
    };
    told.encode()
}

fn whole(
    mut numbers: Numbers,
    question: Known,
    packing: Packing,
    packer: &mut Packer,
    out: &mut Vec<u8>,
) {
    let Known { offset, len, what } = question;
    let raw = content(offset, len as usize);
    (numbers.offset, numbers.span, numbers.flags) = (offset, len, LAST);
    match what {
        What::Data => {
            let pieces = raw.chunks(64 << 10);
            let count = pieces.len();
            for (n, piece) in pieces.enumerate() {
                let last = if n + 1 == count { LAST } else { 0 };
                data(numbers, piece, last, packing, packer, out);
                numbers.offset += piece.len() as u64;
            }
        }
        What::Extents => {
            numbers.kind = kind::EXTENT_LIST;
            let extent = Extent { len, zero: true };
            numbers.put(&message::encode_extents(&[extent]), out);
        }
        What::Hashes { grain } => {
            numbers.kind = kind::HASHES;
            numbers.put(&message::hashes_of(&raw, grain).concat(), out);
        }
    }
}

fn data(
    mut numbers: Numbers,
    raw: &[u8],
    last: u16,
    packing: Packing,
    packer: &mut Packer,
    out: &mut Vec<u8>,
) {
    use hikkoshi_wan::transport::pack::Codec;
    numbers.kind = kind::DATA;
    numbers.span = raw.len() as u32;
    numbers.flags = last;
    let small = raw.get(..raw.len().min(64 << 10)).unwrap_or_default();
    match packer.pack(packing, 0, small) {
        Some((codec, payload)) => {
            numbers.flags |= Codec::flags(Some(codec));
            numbers.put(&payload, out);
        }
        None => numbers.put(raw, out),
    }
}

/// A part of a question: place and length in sixteenths of it.
fn part(program: &mut Input<'_>, question: Known) -> (u64, u32) {
    let (place, count) = (u32::from(program.byte()), u32::from(program.byte()));
    let grain = (question.len / 16).max(1);
    let offset = question.offset + u64::from(place * grain);
    (offset, (count * grain).min(MOST_BYTES as u32))
}

fn last(program: &mut Input<'_>) -> u16 {
    u16::from(program.byte() & 1)
}
