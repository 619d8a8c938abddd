//! Compression of what crosses the link: which codecs there are, and how much effort is worth it.
//!
//! A quantum is compressed by itself, so that what is urgent can go between any two. It is sent
//! compressed only where that is smaller; the receiver decompresses into exactly as many bytes as
//! were announced, and compares them with a checksum that was made of the bytes that were read: a
//! codec that is wrong must not write to the only copy of a disk.
//!
//! How much effort follows the link, by what the sender sees of it: where it stands and waits for
//! the socket, the link is what limits and a byte saved is time saved; where the socket never makes
//! it wait, its own work is what limits.

use std::time::Duration;

use super::limits;

/// How bytes are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// LZ4, as a block.
    Lz4,
    /// Zstandard, as a frame.
    Zstd,
}

/// Flags that name no codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a codec that is not known")]
pub struct UnknownCodec;

/// What a destination takes and asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Whatever seems best to the source.
    #[default]
    Auto,
    /// LZ4 where it saves something.
    Lz4,
    /// Zstandard at this level, from 1 to [`MAX_LEVEL`], where it saves something.
    Zstd(u8),
    /// Nothing is compressed.
    None,
}

/// The highest level of Zstandard: above it compressing is slower than any link that needs it.
pub const MAX_LEVEL: u8 = 19;

/// Bit 1 of a frame's flags: LZ4.
const FLAG_LZ4: u16 = 1 << 1;
/// Bit 2: Zstandard.
const FLAG_ZSTD: u16 = 1 << 2;
/// Bits 4 to 8: the level of Zstandard; zero leaves it to the source.
const LEVEL_SHIFT: u32 = 4;

/// All flags that speak of compression.
pub(super) const FLAGS: u16 = FLAG_LZ4 | FLAG_ZSTD | 0x1f << LEVEL_SHIFT;

impl Packing {
    /// The flags of a request.
    pub fn flags(self) -> u16 {
        match self {
            Self::Auto => FLAG_LZ4 | FLAG_ZSTD,
            Self::Lz4 => FLAG_LZ4,
            Self::Zstd(level) => FLAG_ZSTD | u16::from(level.clamp(1, MAX_LEVEL)) << LEVEL_SHIFT,
            Self::None => 0,
        }
    }

    /// The flags of a request, read; `None` for those that none has.
    pub fn from_flags(flags: u16) -> Option<Self> {
        let level = u8::try_from(flags >> LEVEL_SHIFT & 0x1f).ok()?;
        match (flags & FLAG_LZ4 != 0, flags & FLAG_ZSTD != 0, level) {
            (true, true, 0) => Some(Self::Auto),
            (true, false, 0) => Some(Self::Lz4),
            (false, true, 1..=MAX_LEVEL) => Some(Self::Zstd(level)),
            (false, false, 0) => Some(Self::None),
            _ => None,
        }
    }
}

impl Codec {
    /// The flags of a frame with data.
    pub fn flags(codec: Option<Self>) -> u16 {
        match codec {
            None => 0,
            Some(Self::Lz4) => FLAG_LZ4,
            Some(Self::Zstd) => FLAG_ZSTD,
        }
    }

    /// The flags of a frame with data, read.
    ///
    /// # Errors
    /// No frame has them.
    pub fn from_flags(flags: u16) -> Result<Option<Self>, UnknownCodec> {
        match flags {
            0 => Ok(None),
            FLAG_LZ4 => Ok(Some(Self::Lz4)),
            FLAG_ZSTD => Ok(Some(Self::Zstd)),
            _ => Err(UnknownCodec),
        }
    }
}

/// Bytes in front of what is compressed: CRC-32C of what it was made of.
pub const RAW_CRC_BYTES: usize = 4;

/// Puts back what was compressed: appends exactly `len` bytes to `out`. `None`: it is not that.
pub fn unpack(codec: Codec, payload: &[u8], len: usize, out: &mut Vec<u8>) -> Option<()> {
    let (crc, packed) = payload.split_first_chunk::<RAW_CRC_BYTES>()?;
    let start = out.len();
    out.resize(start + len, 0);
    let place = &mut out[start..];
    let written = match codec {
        Codec::Lz4 => lz4_flex::block::decompress_into(packed, place).ok(),
        Codec::Zstd => zstd::bulk::decompress_to_buffer(packed, place).ok(),
    };
    let whole = written == Some(len) && crc32c::crc32c(place) == u32::from_be_bytes(*crc);
    if !whole {
        out.truncate(start);
        return None;
    }
    Some(())
}

/// The steps of effort that a sender takes by itself.
const LADDER: [Option<(Codec, i32)>; 6] = [
    None,
    Some((Codec::Lz4, 0)),
    Some((Codec::Zstd, 1)),
    Some((Codec::Zstd, 3)),
    Some((Codec::Zstd, 6)),
    Some((Codec::Zstd, 9)),
];

/// Where it begins: cheap, and better than nothing on every link but the fastest.
const FIRST_STEP: usize = 2;

/// How long a step is tried before it is judged.
const JUDGE_AFTER: Duration = Duration::from_millis(100);

/// Above this share of time spent waiting for the socket, in percent, there is time for more effort.
const MUCH_WAITING: u128 = 40;

/// Below it there is too much.
const LITTLE_WAITING: u128 = 8;

/// How much effort compression is worth: follows what the sender sees of the link. Pure; the times
/// are told.
#[derive(Debug)]
pub struct Effort {
    step: usize,
    waited: Duration,
    worked: Duration,
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            step: FIRST_STEP,
            waited: Duration::ZERO,
            worked: Duration::ZERO,
        }
    }
}

impl Effort {
    /// While there was something to send: how long the socket had no room for it, and how long was
    /// spent on what it then took.
    pub fn note(&mut self, waited: Duration, worked: Duration) {
        self.waited += waited;
        self.worked += worked;
        let all = self.waited + self.worked;
        if all < JUDGE_AFTER {
            return;
        }
        let percent = self.waited.as_nanos() * 100 / all.as_nanos().max(1);
        if percent > MUCH_WAITING {
            self.step = (self.step + 1).min(LADDER.len() - 1);
        } else if percent < LITTLE_WAITING {
            self.step = self.step.saturating_sub(1);
        }
        self.waited = Duration::ZERO;
        self.worked = Duration::ZERO;
    }

    fn choice(&self) -> Option<(Codec, i32)> {
        LADDER[self.step]
    }
}

/// The most quanta that are sent as they are, after some that did not compress, before another one
/// is tried.
const MOST_PASSED_OVER: u32 = 16;

/// Compresses quanta, one after the other.
#[derive(Default)]
pub struct Packer {
    effort: Effort,
    zstd: Option<(i32, zstd::bulk::Compressor<'static>)>,
    /// Quanta that are not tried, because those before did not compress.
    passed_over: u32,
    left_to_pass: u32,
}

impl Packer {
    /// See [`Effort::note`].
    pub fn note(&mut self, waited: Duration, worked: Duration) {
        self.effort.note(waited, worked);
    }

    /// What is to be sent for `raw`, if something smaller is: the codec and the payload.
    pub fn pack(&mut self, packing: Packing, raw: &[u8]) -> Option<(Codec, Vec<u8>)> {
        let (codec, level) = match packing {
            Packing::None => return None,
            Packing::Lz4 => (Codec::Lz4, 0),
            Packing::Zstd(level) => (Codec::Zstd, i32::from(level)),
            Packing::Auto => self.effort.choice()?,
        };
        if self.left_to_pass > 0 {
            self.left_to_pass -= 1;
            return None;
        }
        // A sixteenth must be saved, and a byte of the shortest: less is not worth the work at the
        // other end, and what is not shorter is no compressed frame.
        let most = raw.len() - raw.len().div_ceil(16);
        let packed = match codec {
            Codec::Lz4 => lz4(raw),
            Codec::Zstd => self.zstd(level, raw),
        };
        match packed.filter(|packed| packed.len() <= most) {
            Some(packed) => {
                self.passed_over = 0;
                Some((codec, packed))
            }
            None => {
                self.passed_over = (self.passed_over * 2 + 1).min(MOST_PASSED_OVER);
                self.left_to_pass = self.passed_over;
                None
            }
        }
    }

    fn zstd(&mut self, level: i32, raw: &[u8]) -> Option<Vec<u8>> {
        if self.zstd.as_ref().is_none_or(|(known, _)| *known != level) {
            let mut fresh = zstd::bulk::Compressor::new(level).ok()?;
            // The length is known from the frame, and the checksum is ours.
            fresh.include_checksum(false).ok()?;
            self.zstd = Some((level, fresh));
        }
        let (_, compressor) = self.zstd.as_mut()?;
        let mut out = begun(raw, zstd::zstd_safe::compress_bound(raw.len()));
        let written = compressor
            .compress_to_buffer(raw, &mut out[RAW_CRC_BYTES..])
            .ok()?;
        out.truncate(RAW_CRC_BYTES + written);
        Some(out)
    }
}

fn lz4(raw: &[u8]) -> Option<Vec<u8>> {
    let mut out = begun(raw, lz4_flex::block::get_maximum_output_size(raw.len()));
    let written = lz4_flex::block::compress_into(raw, &mut out[RAW_CRC_BYTES..]).ok()?;
    out.truncate(RAW_CRC_BYTES + written);
    Some(out)
}

/// A payload with its checksum, and room for `most` bytes behind it.
fn begun(raw: &[u8], most: usize) -> Vec<u8> {
    debug_assert!(raw.len() <= limits::QUANTUM_BYTES as usize);
    let mut out = vec![0; RAW_CRC_BYTES + most];
    out[..RAW_CRC_BYTES].copy_from_slice(&crc32c::crc32c(raw).to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(len: usize) -> Vec<u8> {
        let words = b"the disk of a running machine moves to another site ";
        words.iter().copied().cycle().take(len).collect()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()[0]
        };
        std::iter::repeat_with(&mut next).take(len).collect()
    }

    const ASKED: [Packing; 5] = [
        Packing::Auto,
        Packing::Lz4,
        Packing::Zstd(1),
        Packing::Zstd(MAX_LEVEL),
        Packing::None,
    ];

    #[test]
    fn flags_are_what_they_were() {
        for packing in ASKED {
            assert_eq!(Packing::from_flags(packing.flags()), Some(packing));
        }
        for codec in [None, Some(Codec::Lz4), Some(Codec::Zstd)] {
            assert_eq!(Codec::from_flags(Codec::flags(codec)), Ok(codec));
        }
        assert_eq!(Packing::from_flags(FLAG_ZSTD), None);
        assert_eq!(Packing::from_flags(FLAG_LZ4 | 3 << LEVEL_SHIFT), None);
        assert!(Codec::from_flags(FLAG_LZ4 | FLAG_ZSTD).is_err());
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_out_again(
            pieces in prop::collection::vec((any::<bool>(), 1..3000_usize), 1..20),
            which in 0..ASKED.len(),
        ) {
            let mut raw = Vec::new();
            for (noisy, len) in pieces {
                raw.extend(if noisy { noise(len) } else { text(len) });
            }
            raw.truncate(limits::QUANTUM_BYTES as usize);
            let packed = Packer::default().pack(ASKED[which], &raw);
            if let Some((codec, payload)) = packed {
                prop_assert!(payload.len() < raw.len());
                let mut out = vec![7];
                unpack(codec, &payload, raw.len(), &mut out).expect("what was packed");
                prop_assert_eq!(&out[1..], &raw[..]);
            }
        }

        #[test]
        fn any_bytes_are_survived_and_nothing_wrong_comes_out(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            len in 0..5000_usize,
        ) {
            for codec in [Codec::Lz4, Codec::Zstd] {
                let mut out = Vec::new();
                if unpack(codec, &bytes, len, &mut out).is_some() {
                    prop_assert_eq!(out.len(), len);
                    let crc = crc32c::crc32c(&out).to_be_bytes();
                    prop_assert_eq!(&crc[..], &bytes[..4]);
                } else {
                    prop_assert!(out.is_empty());
                }
            }
        }
    }

    #[test]
    fn a_changed_payload_or_length_is_found() {
        let raw = text(20_000);
        for packing in [Packing::Lz4, Packing::Zstd(3)] {
            let (codec, payload) = Packer::default().pack(packing, &raw).expect("text");
            let mut out = Vec::new();
            for len in [raw.len() - 1, raw.len() + 1, 0] {
                assert!(unpack(codec, &payload, len, &mut out).is_none() && out.is_empty());
            }
            let mut wrong = payload.clone();
            wrong[0] ^= 1;
            assert!(unpack(codec, &wrong, raw.len(), &mut out).is_none() && out.is_empty());
        }
    }

    /// A run of 14 equal bytes takes 14 bytes as LZ4, the checksum included. A frame that says so
    /// is refused at the other end, and would have been sent again over each new connection.
    #[test]
    fn what_is_not_shorter_is_sent_as_it_is() {
        for len in 1..200 {
            for packing in ASKED {
                let raw = vec![7; len];
                let packed = Packer::default().pack(packing, &raw);
                assert!(
                    packed.is_none_or(|(_, payload)| payload.len() < len),
                    "{len}"
                );
            }
        }
    }

    #[test]
    fn noise_is_hardly_tried() {
        let mut packer = Packer::default();
        let raw = noise(60_000);
        let mut tries = 0;
        for _ in 0..200 {
            if packer.left_to_pass == 0 {
                tries += 1;
            }
            assert!(packer.pack(Packing::Auto, &raw).is_none());
        }
        assert!(tries <= 20, "{tries}");
        // What compresses is found again soon.
        let found =
            (0..=MOST_PASSED_OVER).any(|_| packer.pack(Packing::Auto, &text(60_000)).is_some());
        assert!(found);
    }

    #[test]
    fn effort_grows_on_a_slow_link_and_falls_on_a_fast_one() {
        let ms = Duration::from_millis;
        let mut effort = Effort::default();
        for _ in 0..20 {
            effort.note(ms(90), ms(20));
        }
        assert_eq!(effort.choice(), Some((Codec::Zstd, 9)));
        for _ in 0..20 {
            effort.note(ms(1), ms(109));
        }
        assert_eq!(effort.choice(), None);
        // A link that is a little slower than the work at one step, and faster than at the next.
        for _ in 0..50 {
            let work = match effort.choice() {
                None => 10,
                Some((Codec::Lz4, _)) => 30,
                Some((_, 1)) => 70,
                Some(_) => 108,
            };
            effort.note(ms(110 - work), ms(work));
        }
        assert!(
            matches!(effort.choice(), Some((Codec::Zstd, 1 | 3))),
            "{effort:?}"
        );
    }
}
