//! Compression of what crosses the link: which codecs there are, and how much effort is worth it.
//!
//! Quanta are compressed one by one, so that what is urgent can go between any two. All that is sent as
//! Zstandard over one connection is one stream, each quantum flushed: it refers to what went before it,
//! which saves a tenth of what is left otherwise. The receiver decompresses into exactly as many bytes
//! as were announced, and compares them with a checksum that was made of the bytes that were read: a
//! codec that is wrong must not write to the only copy of a disk.
//!
//! How much effort follows the link, by what the sender sees of it: where it has little to do, the link
//! is what limits, and a byte saved is time saved; where it is busy all the time, its own work
//! is what limits. That it waits for the socket would say less: a destination asks for no more than the
//! link carries, and the socket always has room.

use std::time::Duration;

use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

use super::limits;

/// How bytes are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// LZ4, as a block.
    Lz4,
    /// Zstandard, as the next piece of the connection's stream.
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

/// How far back the stream refers, as a power of two: what both ends keep of every connection.
const WINDOW_LOG: u32 = 21;

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

    /// What comes nearest to it and is no part of the connection's stream.
    #[must_use]
    pub fn outside_of_stream(self) -> Self {
        match self {
            Self::Auto | Self::Lz4 => Self::Lz4,
            Self::Zstd(_) | Self::None => Self::None,
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

/// Puts back what was compressed on one connection, in the order in which it came.
#[derive(Default)]
pub struct Unpacker {
    zstd: Option<DCtx<'static>>,
    /// A Zstandard frame has begun and not ended.
    within: bool,
    level: Option<u8>,
}

impl Unpacker {
    /// Appends exactly `len` bytes to `out`. `None`: it is not that, and nothing more of this connection
    /// can be understood.
    pub fn unpack(
        &mut self,
        codec: Codec,
        payload: &[u8],
        len: usize,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        let (crc, packed) = payload.split_first_chunk::<RAW_CRC_BYTES>()?;
        let start = out.len();
        out.resize(start + len, 0);
        let place = &mut out[start..];
        let written = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(packed, place).ok(),
            Codec::Zstd => self.zstd(packed, place),
        };
        let whole = written == Some(len) && crc32c::crc32c(place) == u32::from_be_bytes(*crc);
        if !whole {
            out.truncate(start);
            return None;
        }
        Some(())
    }

    /// The level of the stream, as it told last.
    pub fn level(&self) -> Option<u8> {
        self.level
    }

    /// The next bytes of the stream, all of them used up.
    fn zstd(&mut self, packed: &[u8], place: &mut [u8]) -> Option<usize> {
        if self.zstd.is_none() {
            let mut fresh = DCtx::try_create()?;
            fresh
                .set_parameter(DParameter::WindowLogMax(WINDOW_LOG))
                .ok()?;
            self.zstd = Some(fresh);
        }
        let stream = self.zstd.as_mut()?;
        let mut input = InBuffer::around(packed);
        let mut output = OutBuffer::around(place);
        while input.pos() < packed.len() {
            let before = (input.pos(), output.pos());
            if !self.within
                && let Some(level) = level_note(&packed[before.0..])
            {
                self.level = Some(level);
            }
            let left = stream.decompress_stream(&mut output, &mut input).ok()?;
            self.within = left > 0;
            if (input.pos(), output.pos()) == before {
                return None;
            }
        }
        Some(output.pos())
    }
}

/// A skippable frame of Zstandard (RFC 8878, 3.1.2) of one byte: the level of the frame behind it.
/// Whoever does not know it passes over it.
const LEVEL_NOTE: [u8; 8] = [0x5a, 0x2a, 0x4d, 0x18, 1, 0, 0, 0];

/// The level that is told at the beginning of a Zstandard frame.
fn level_note(bytes: &[u8]) -> Option<u8> {
    let level = *bytes.strip_prefix(&LEVEL_NOTE)?.first()?;
    (1..=MAX_LEVEL).contains(&level).then_some(level)
}

/// A step of effort. A sender goes up where it would be busy for less than a part of its time, and
/// down where it is for more.
struct Step {
    how: Option<(Codec, i32)>,
    /// Percent of its time that a sender may be busy one step below, to come here.
    enter_below: u128,
    /// Percent above which it leaves for the step below.
    leave_above: u128,
}

/// The steps that a sender takes by itself. Up to level 3 only what a faster link would be worth counts;
/// the last three save little more, so they may not cost much, either: other machines run on this
/// host.
const LADDER: [Step; 8] = [
    step(None, 100, 100),
    step(Some((Codec::Lz4, 0)), 15, 92),
    step(Some((Codec::Zstd, 1)), 60, 94),
    step(Some((Codec::Zstd, 2)), 60, 88),
    step(Some((Codec::Zstd, 3)), 50, 80),
    step(Some((Codec::Zstd, 5)), 18, 45),
    step(Some((Codec::Zstd, 6)), 15, 40),
    step(Some((Codec::Zstd, 9)), 8, 30),
];

const fn step(how: Option<(Codec, i32)>, enter_below: u128, leave_above: u128) -> Step {
    Step {
        how,
        enter_below,
        leave_above,
    }
}

/// Where it begins: cheap, and better than nothing on every link but the fastest.
const FIRST_STEP: usize = 2;

/// How long a step is tried before it is judged. Another level begins another Zstandard frame, which knows nothing of
/// what went before it, so what is busy for a moment should not change it.
const JUDGE_AFTER: Duration = Duration::from_millis(400);

/// And over how many quanta.
const JUDGED_QUANTA: u32 = 4;

/// A wait counts as no longer than this: a connection on which nothing happens tells nothing.
const LONGEST_WAIT: Duration = Duration::from_millis(25);

/// How much effort compression is worth: follows how busy the sender is. Pure; the times are told.
#[derive(Debug)]
pub struct Effort {
    step: usize,
    waited: Duration,
    worked: Duration,
    /// Quanta that compressed: what does not is hardly tried, and costs nothing.
    quanta: u32,
    /// The last quantum was one of those, so that the time since then tells of this step.
    tells: bool,
}

impl Default for Effort {
    fn default() -> Self {
        Self {
            step: FIRST_STEP,
            waited: Duration::ZERO,
            worked: Duration::ZERO,
            quanta: 0,
            tells: false,
        }
    }
}

impl Effort {
    /// How long the sender had nothing to do, for want of requests or of room in the socket, and how
    /// long it worked then.
    pub fn note(&mut self, waited: Duration, worked: Duration) {
        if !self.tells {
            return;
        }
        self.waited += waited.min(LONGEST_WAIT);
        self.worked += worked;
        let all = self.waited + self.worked;
        if all < JUDGE_AFTER || self.quanta < JUDGED_QUANTA {
            return;
        }
        let busy = self.worked.as_nanos() * 100 / all.as_nanos().max(1);
        let above = LADDER.get(self.step + 1);
        if above.is_some_and(|above| busy < above.enter_below) {
            self.step += 1;
        } else if busy > LADDER[self.step].leave_above {
            self.step = self.step.saturating_sub(1);
        }
        self.waited = Duration::ZERO;
        self.worked = Duration::ZERO;
        self.quanta = 0;
    }

    /// A quantum was compressed, or it was no use.
    fn tried(&mut self, pays: bool) {
        self.quanta += u32::from(pays);
        self.tells = pays;
    }

    fn choice(&self) -> Option<(Codec, i32)> {
        LADDER[self.step].how
    }
}

/// The most quanta that are sent as they are, after many that did not compress, before another one is
/// tried. After the first ones it is one: what compresses may lie between what does not, as files do.
const MOST_PASSED_OVER: u32 = 16;

/// So many quanta that did not compress pass over one more.
const FAILURES_A_PASS: u32 = 8;

/// What does not compress says nothing of what is further away than this on the disk. Several connections share
/// what lies together, so what one of them sends next may be some parts further on.
const NOISE_REACH_BYTES: u64 = 4 << 20;

/// What did not compress, and how much of what lies around it is therefore not tried.
#[derive(Debug, Default)]
struct Noise {
    /// Where the last of it lies on the disk.
    at: u64,
    /// Quanta tried there since the last one that compressed.
    failures: u32,
    /// Quanta there that are not tried.
    left_to_pass: u32,
}

impl Noise {
    fn is_near(&self, place: u64) -> bool {
        place.abs_diff(self.at) <= NOISE_REACH_BYTES
    }

    /// Whether what lies at `place` is sent as it is.
    fn passes(&mut self, place: u64) -> bool {
        let passes = self.left_to_pass > 0 && self.is_near(place);
        self.left_to_pass -= u32::from(passes);
        passes
    }

    fn tried(&mut self, place: u64, pays: bool) {
        let near = self.is_near(place);
        if pays {
            self.failures = if near { 0 } else { self.failures };
            return;
        }
        self.failures = if near {
            self.failures.saturating_add(1)
        } else {
            1
        };
        self.left_to_pass = (self.failures / FAILURES_A_PASS).clamp(1, MOST_PASSED_OVER);
        self.at = place;
    }
}

/// What is shorter is sent as it is.
const LEAST_PACKED_BYTES: usize = 512;

/// Compresses quanta of one connection, in the order in which they are sent.
#[derive(Default)]
pub struct Packer {
    effort: Effort,
    /// The stream, and its level.
    zstd: Option<(i32, CCtx<'static>)>,
    noise: Noise,
}

impl Packer {
    /// See [`Effort::note`].
    pub fn note(&mut self, waited: Duration, worked: Duration) {
        self.effort.note(waited, worked);
    }

    /// What is to be sent for `raw`, which lies at `place` on the disk: the codec and the payload, or `raw`
    /// itself. What is returned must be sent, and before anything that is packed later.
    pub fn pack(&mut self, packing: Packing, place: u64, raw: &[u8]) -> Option<(Codec, Vec<u8>)> {
        let how = match packing {
            Packing::None => return None,
            Packing::Lz4 => Some((Codec::Lz4, 0)),
            Packing::Zstd(level) => Some((Codec::Zstd, i32::from(level))),
            Packing::Auto => self.effort.choice(),
        };
        // What is packed otherwise says nothing of the step.
        let follows = packing == Packing::Auto;
        if self.noise.passes(place) {
            if follows {
                self.effort.tried(false);
            }
            return None;
        }
        let Some((codec, level)) = how else {
            self.effort.tried(true);
            return None;
        };
        if raw.len() < LEAST_PACKED_BYTES {
            return None;
        }
        // A sixteenth must be saved: less is not worth the work at the other end.
        let most = raw.len() - raw.len().div_ceil(16);
        let packed = match codec {
            Codec::Lz4 => lz4(raw),
            Codec::Zstd => self.zstd(level, raw),
        };
        let pays = packed.as_ref().is_some_and(|packed| packed.len() <= most);
        self.noise.tried(place, pays);
        if follows {
            self.effort.tried(pays);
        }
        // What went into the stream is a part of it, whether it pays or not.
        let packed = packed.filter(|_| pays || codec == Codec::Zstd)?;
        Some((codec, packed))
    }

    /// Another level begins another Zstandard frame within the same stream, and says which it is.
    fn zstd(&mut self, level: i32, raw: &[u8]) -> Option<Vec<u8>> {
        let mut out = begun(raw, limits::PACKED_EXTRA_BYTES as usize + raw.len());
        let mut start = RAW_CRC_BYTES;
        if self.zstd.as_ref().is_none_or(|(known, _)| *known != level) {
            let mut stream = match self.zstd.take() {
                Some((_, mut stream)) => {
                    let mut output = OutBuffer::around(&mut out[start..]);
                    let mut nothing = InBuffer::around(&[]);
                    let end = ZSTD_EndDirective::ZSTD_e_end;
                    let left = stream.compress_stream2(&mut output, &mut nothing, end);
                    assert_eq!(left, Ok(0), "three bytes end a frame, and there is room");
                    start += output.pos();
                    stream
                }
                None => CCtx::try_create()?,
            };
            for parameter in [
                CParameter::CompressionLevel(level),
                CParameter::WindowLog(WINDOW_LOG),
            ] {
                stream
                    .set_parameter(parameter)
                    .expect("levels and windows are within bounds");
            }
            self.zstd = Some((level, stream));
            let told = u8::try_from(level).ok()?;
            for byte in LEVEL_NOTE.into_iter().chain([told]) {
                *out.get_mut(start)? = byte;
                start += 1;
            }
        }
        let (_, stream) = self.zstd.as_mut()?;
        let mut output = OutBuffer::around(&mut out[start..]);
        let mut input = InBuffer::around(raw);
        let flush = ZSTD_EndDirective::ZSTD_e_flush;
        let left = stream.compress_stream2(&mut output, &mut input, flush);
        assert_eq!(left, Ok(0), "what does not compress is only framed");
        let written = output.pos();
        out.truncate(start + written);
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

    fn unpacked(unpacker: &mut Unpacker, packed: &(Codec, Vec<u8>), len: usize) -> Option<Vec<u8>> {
        let mut out = vec![7];
        let whole = unpacker.unpack(packed.0, &packed.1, len, &mut out);
        assert_eq!(out[0], 7);
        assert!(whole.is_some() || out.len() == 1);
        whole.map(|()| out.split_off(1))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever is packed on a connection, by whatever codec and level in turn, comes out again.
        #[test]
        fn what_is_packed_comes_out_again(
            quanta in prop::collection::vec(
                (
                    0..ASKED.len(),
                    0..3 * NOISE_REACH_BYTES,
                    prop::collection::vec((any::<bool>(), 1..3000_usize), 1..20),
                ),
                1..8,
            ),
        ) {
            let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
            for (which, place, pieces) in quanta {
                let mut raw = Vec::new();
                for (noisy, len) in pieces {
                    raw.extend(if noisy { noise(len) } else { text(len) });
                }
                raw.truncate(limits::QUANTUM_BYTES as usize);
                if let Some(packed) = packer.pack(ASKED[which], place, &raw) {
                    let most = raw.len() + limits::PACKED_EXTRA_BYTES as usize;
                    prop_assert!(packed.1.len() <= most);
                    let out = unpacked(&mut unpacker, &packed, raw.len());
                    prop_assert_eq!(out.as_ref(), Some(&raw));
                }
            }
        }

        #[test]
        fn any_bytes_are_survived_and_nothing_wrong_comes_out(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            len in 0..5000_usize,
        ) {
            for codec in [Codec::Lz4, Codec::Zstd] {
                let packed = (codec, bytes.clone());
                if let Some(out) = unpacked(&mut Unpacker::default(), &packed, len) {
                    prop_assert_eq!(out.len(), len);
                    let crc = crc32c::crc32c(&out).to_be_bytes();
                    prop_assert_eq!(&crc[..], &bytes[..4]);
                }
            }
        }
    }

    #[test]
    fn a_changed_payload_or_length_is_found() {
        let raw = text(20_000);
        for packing in [Packing::Lz4, Packing::Zstd(3)] {
            let packed = Packer::default().pack(packing, 0, &raw).expect("text");
            for len in [raw.len() - 1, raw.len() + 1, 0] {
                assert!(unpacked(&mut Unpacker::default(), &packed, len).is_none());
            }
            let mut wrong = packed.clone();
            wrong.1[0] ^= 1;
            assert!(unpacked(&mut Unpacker::default(), &wrong, raw.len()).is_none());
        }
    }

    /// A piece that is left out, or comes twice, is found by what comes next.
    #[test]
    fn a_stream_with_a_gap_is_found() {
        let mut packer = Packer::default();
        let raws = [noise(9000), text(9000), [noise(5000), text(3000)].concat()];
        let pieces: Vec<_> = raws
            .iter()
            .map(|raw| {
                packer.noise.left_to_pass = 0;
                packer.pack(Packing::Zstd(3), 0, raw).expect("long enough")
            })
            .collect();
        let mut unpacker = Unpacker::default();
        for (raw, piece) in raws.iter().zip(&pieces) {
            assert_eq!(
                unpacked(&mut unpacker, piece, raw.len()).as_ref(),
                Some(raw)
            );
        }
        for (first, then) in [(0, 2), (0, 0)] {
            let mut unpacker = Unpacker::default();
            assert!(unpacked(&mut unpacker, &pieces[first], raws[first].len()).is_some());
            assert!(unpacked(&mut unpacker, &pieces[then], raws[then].len()).is_none());
        }
    }

    /// The receiver knows how much effort the sender takes, and one that looks at no notes passes over
    /// them.
    #[test]
    fn the_level_is_told_with_each_frame_of_the_stream() {
        let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
        let mut stranger = DCtx::try_create().expect("memory");
        let raw = text(9000);
        for level in [1, 1, 9, 3, MAX_LEVEL] {
            let packed = packer.pack(Packing::Zstd(level), 0, &raw).expect("text");
            let out = unpacked(&mut unpacker, &packed, raw.len());
            assert_eq!(out.as_ref(), Some(&raw));
            assert_eq!(unpacker.level(), Some(level));
            let mut place = vec![0; raw.len()];
            let mut output = OutBuffer::around(&mut place[..]);
            let mut input = InBuffer::around(&packed.1[RAW_CRC_BYTES..]);
            while input.pos() < packed.1.len() - RAW_CRC_BYTES {
                let read = stranger.decompress_stream(&mut output, &mut input);
                assert!(read.is_ok());
            }
            assert!(place == raw);
        }
    }

    #[test]
    fn only_a_whole_note_of_a_known_level_counts() {
        let note = |level: u8| [&LEVEL_NOTE[..], &[level, 7]].concat();
        assert_eq!(level_note(&note(3)), Some(3));
        for level in [0, MAX_LEVEL + 1, 255] {
            assert_eq!(level_note(&note(level)), None);
        }
        assert_eq!(level_note(&LEVEL_NOTE), None);
        assert_eq!(level_note(&[]), None);
    }

    /// What came before, within the window, is not sent again.
    #[test]
    fn a_stream_refers_to_what_went_before() {
        let (mut packer, raw) = (Packer::default(), noise(60_000));
        let first = packer.pack(Packing::Zstd(3), 0, &raw).expect("long enough");
        assert!(first.1.len() <= raw.len() + limits::PACKED_EXTRA_BYTES as usize);
        packer.noise.left_to_pass = 0;
        let again = packer.pack(Packing::Zstd(3), 0, &raw).expect("long enough");
        assert!(again.1.len() < 100, "{}", again.1.len());
    }

    /// A run of 15 equal bytes takes 15 bytes as LZ4, the checksum included. A frame that says so
    /// is refused at the other end, and would have been sent again over each new connection.
    #[test]
    fn an_lz4_block_is_shorter_than_what_it_was_made_of() {
        for len in 1..1500 {
            let packed = Packer::default().pack(Packing::Lz4, 0, &vec![7; len]);
            assert!(
                packed.is_none_or(|(_, payload)| payload.len() < len),
                "{len}"
            );
        }
    }

    #[test]
    fn noise_is_hardly_tried() {
        let mut packer = Packer::default();
        let (raw, part) = (noise(60_000), 60_000);
        let mut tries = 0;
        for piece in 0..2000 {
            let packed = packer.pack(Packing::Auto, piece * part, &raw);
            tries += usize::from(packed.is_some() && piece >= 1000);
            if packed.is_some() {
                // The same noise again would be found in the window.
                packer.zstd = None;
            }
        }
        assert!((50..70).contains(&tries), "{tries} of 1000");
        // What compresses is found again soon.
        let found = (2000..=2000 + u64::from(MOST_PASSED_OVER)).any(|piece| {
            packer
                .pack(Packing::Auto, piece * part, &text(60_000))
                .is_some()
        });
        assert!(found);
    }

    #[test]
    fn noise_and_text_do_not_count_for_one_another_from_afar() {
        let mut packer = Packer::default();
        let (noise, text, far) = (noise(60_000), text(60_000), 2 * NOISE_REACH_BYTES);
        let mut tries = 0;
        for piece in 0..2000 {
            let place = piece * 4096 % NOISE_REACH_BYTES;
            if packer.pack(Packing::Auto, place, &noise).is_some() {
                tries += u32::from(piece >= 1000);
                // The same noise again would be found in the window.
                packer.zstd = None;
            }
            let packed = packer.pack(Packing::Auto, far + place, &text);
            assert!(packed.is_some_and(|(_, packed)| packed.len() < 10_000));
        }
        assert!((50..70).contains(&tries), "{tries} of 1000");
    }

    /// A sender that works for so many percent of its time, and waits for the others, until it is judged.
    fn worked(effort: &mut Effort, percent: u32) {
        let part = JUDGE_AFTER / 16;
        let busy = part * percent / 100;
        for _ in 0..16 {
            effort.tried(true);
            effort.note(part - busy, busy);
        }
    }

    #[test]
    fn effort_grows_on_a_slow_link_and_falls_on_a_fast_one() {
        let mut effort = Effort::default();
        for _ in 0..20 {
            worked(&mut effort, 3);
        }
        assert_eq!(effort.choice(), Some((Codec::Zstd, 9)));
        for _ in 0..20 {
            worked(&mut effort, 99);
        }
        assert_eq!(effort.choice(), None);
        // The same link as the work grows with the step: it comes to rest.
        let mut seen = std::collections::BTreeSet::new();
        for n in 0..50 {
            let work = match effort.choice() {
                None => 3,
                Some((Codec::Lz4, _)) => 12,
                Some((_, 1)) => 15,
                Some((_, 3)) => 20,
                Some(_) => 60,
            };
            worked(&mut effort, work);
            if n > 10 {
                seen.insert(effort.step);
            }
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [3]);
    }

    /// What does not compress costs nothing, which says nothing of what it costs to compress.
    #[test]
    fn the_time_of_noise_does_not_count() {
        let mut packer = Packer::default();
        let (text, noise) = (text(60_000), noise(60_000));
        for piece in 0..4000 {
            let is_text = piece / 100 % 2 == 0;
            let raw = if is_text { &text } else { &noise };
            packer.pack(Packing::Auto, piece * 60_000, raw);
            if !is_text {
                // The same noise again would be found in the window.
                packer.zstd = None;
            }
            let busy = if is_text { 15 } else { 1 };
            packer.note(
                Duration::from_millis(20 - busy),
                Duration::from_millis(busy),
            );
        }
        assert_eq!(packer.effort.step, FIRST_STEP);
    }

    /// A connection that is hardly used says nothing of the link.
    #[test]
    fn a_quiet_connection_is_not_judged() {
        let mut effort = Effort::default();
        effort.tried(true);
        for _ in 0..1000 {
            effort.note(Duration::from_secs(1), Duration::from_micros(50));
        }
        assert_eq!(effort.step, FIRST_STEP);
    }
}
