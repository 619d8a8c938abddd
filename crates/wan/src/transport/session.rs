//! What two daemons tell each other of a move: who it is, what the VM still changes, and the
//! handoff. One message is one TELL frame, its answer one TOLD in one or more frames
//! (`docs/wire.md`).
//!
//! A codec and nothing else: what a message means for a disk is decided by
//! [`hikkoshi_engine::handover`] and the daemon.

use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_engine::journal::VolumeId;

use super::limits;

/// A move, by the volume that the disk moves to.
pub type MoveId = VolumeId;

/// One run of a machine, from its start to its end: what was written there and not made durable does
/// not outlive it.
pub type BootId = [u8; 16];

/// Under which boots those machines run that hold what was written to a disk: the source's first, then
/// that of its own source, and so on. What is not known is left out at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Boots {
    ids: [BootId; limits::TOLD_BOOTS],
    count: usize,
}

impl Boots {
    /// Nothing is known, or nothing can be lost.
    pub const NONE: Self = Self {
        ids: [[0; 16]; limits::TOLD_BOOTS],
        count: 0,
    };

    /// A machine, and those that it fetches from in turn. The last one of too many is left out.
    #[must_use]
    pub fn of(own: BootId, before: Self) -> Self {
        let mut boots = Self::NONE;
        for boot in std::iter::once(&own).chain(before.known()) {
            boots.push(*boot);
        }
        boots
    }

    /// Those that are known.
    pub fn known(&self) -> &[BootId] {
        &self.ids[..self.count]
    }

    /// Whether one of the machines was started anew between these boots and `later`.
    pub fn ended_before(&self, later: &Self) -> bool {
        let both = self.known().iter().zip(later.known());
        both.into_iter().any(|(was, is)| was != is)
    }

    /// What is known with `later`, which is newer, but may know less.
    #[must_use]
    pub fn followed_by(&self, later: Self) -> Self {
        let mut boots = later;
        for boot in self.known().iter().skip(later.count) {
            boots.push(*boot);
        }
        boots
    }

    fn push(&mut self, boot: BootId) {
        if let Some(free) = self.ids.get_mut(self.count) {
            *free = boot;
            self.count += 1;
        }
    }
}

/// Where the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stance {
    /// The VM still runs at the source.
    Standby,
    /// The handoff is behind it.
    Arriving,
}

/// What a destination says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tell {
    /// Who reads over this connection. The first message of every connection.
    Attach {
        /// The move.
        id: MoveId,
        /// Where it stands.
        stance: Stance,
        /// The tracking of changes that it goes on with; 0 for none.
        epoch: u64,
        /// It has the disk as it was at the handoff to this volume.
        base: Option<MoveId>,
    },
    /// What has changed since it asked last?
    Changes {
        /// The move.
        id: MoveId,
        /// The tracking it goes on with.
        epoch: u64,
        /// Grows by one with each answer that was taken; the same again if the answer was lost.
        number: u64,
    },
    /// From here on the VM runs at the destination.
    Handoff {
        /// The move.
        id: MoveId,
        /// The tracking its copy relies on.
        epoch: u64,
    },
    /// The move is given up, and will never take a write.
    Abort {
        /// The move.
        id: MoveId,
    },
    /// Which older copies can take the disk back by a difference?
    Bases {
        /// The move.
        id: MoveId,
    },
    /// In which blocks does the disk, which was handed over, differ from the old copy `base`, from
    /// this byte on? Asked of a source that still fetched from that copy.
    Differs {
        /// The move.
        id: MoveId,
        /// The old copy.
        base: MoveId,
        /// From where.
        from: u64,
    },
    /// Everything has arrived: the source is needed no more.
    Done {
        /// The move.
        id: MoveId,
    },
    /// The VM may change so much in a second from now on; 0 lifts the bound.
    Slow {
        /// The move.
        id: MoveId,
        /// Bytes per second.
        bytes_per_s: u64,
    },
    /// How much is read and written where?
    Heat {
        /// The move.
        id: MoveId,
    },
}

/// What a source answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// To ATTACH.
    Attached(Attached),
    /// To CHANGES: what was changed.
    Changes {
        /// Changed since the answer before.
        ranges: Vec<ByteRange>,
    },
    /// To HANDOFF: no write is accepted here from now on, durably.
    Fenced {
        /// The source's generation.
        generation: u64,
        /// What was changed since the last answer to CHANGES; `None`: nobody knows, take it that
        /// everything was.
        ranges: Option<Vec<ByteRange>>,
    },
    /// To BASES: of each older copy what differs from it now.
    Bases(Vec<(MoveId, Vec<ByteRange>)>),
    /// To HEAT: a heat map, as it is on disk.
    Heat(Vec<u8>),
    /// To DIFFERS: exactly these, all of which the source has, durably.
    Differs {
        /// In order.
        ranges: Vec<ByteRange>,
        /// There are more behind the last one.
        more: bool,
    },
    /// Done.
    Fine,
    /// It cannot be, with a reason for people.
    Refused(String),
}

/// What a source says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Its generation.
    pub generation: u64,
    /// The tracking of changes that goes on from here; 0: changes are not tracked.
    pub epoch: u64,
    /// Whether it has handed over to this move.
    pub handed_over: HandedOver,
    /// What the old copy that was named is to it.
    pub old_copy: OldCopy,
    /// The machines that lose what was not flushed when they lose their power.
    pub boots: Boots,
}

/// Whether a source has handed its disk over to a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HandedOver {
    /// It has not, and may when it is asked.
    #[default]
    NotYet,
    /// It has, and says so again when it is asked.
    Already,
    /// The move is off: it was given up, or released by hand. A HANDOFF is refused, and that says why.
    Never,
}

/// What an old copy is to a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OldCopy {
    /// It does not know in what its disk differs from it.
    #[default]
    Unknown,
    /// It knows: what differs is what CHANGES tells first.
    Known,
    /// It still needs it: what it has not fetched from there yet is nowhere else. Nothing may be
    /// written into it before the handoff, and what differs then is told to DIFFERS.
    Needed {
        /// The bytes of a block there: what it has, it has in whole blocks.
        block_bytes: u32,
    },
}

const ATTACH: u8 = 1;
const CHANGES: u8 = 2;
const HANDOFF: u8 = 3;
const ABORT: u8 = 4;
const BASES: u8 = 5;
const DONE: u8 = 6;
const HEAT: u8 = 7;
const SLOW: u8 = 8;
const DIFFERS: u8 = 9;
const REFUSED: u8 = 0xff;

const NO_BASE: MoveId = [0; 16];

/// Longest text of a refusal, in bytes.
const TEXT_BYTES: usize = 1024;

/// Bytes of a range: offset and length.
const RANGE_BYTES: usize = 16;

impl Tell {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let begun = |tag: u8, id: &MoveId| [&[tag][..], id].concat();
        match self {
            Self::Attach {
                id,
                stance,
                epoch,
                base,
            } => {
                let mut out = begun(ATTACH, id);
                out.push(u8::from(*stance == Stance::Arriving));
                out.extend_from_slice(&epoch.to_be_bytes());
                out.extend_from_slice(&base.unwrap_or(NO_BASE));
                out
            }
            Self::Changes { id, epoch, number } => {
                let mut out = begun(CHANGES, id);
                out.extend_from_slice(&epoch.to_be_bytes());
                out.extend_from_slice(&number.to_be_bytes());
                out
            }
            Self::Handoff { id, epoch } => {
                let mut out = begun(HANDOFF, id);
                out.extend_from_slice(&epoch.to_be_bytes());
                out
            }
            Self::Abort { id } => begun(ABORT, id),
            Self::Bases { id } => begun(BASES, id),
            Self::Differs { id, base, from } => {
                let mut out = begun(DIFFERS, id);
                out.extend_from_slice(base);
                out.extend_from_slice(&from.to_be_bytes());
                out
            }
            Self::Done { id } => begun(DONE, id),
            Self::Heat { id } => begun(HEAT, id),
            Self::Slow { id, bytes_per_s } => {
                let mut out = begun(SLOW, id);
                out.extend_from_slice(&bytes_per_s.to_be_bytes());
                out
            }
        }
    }

    /// A payload as a message; `None` if it is none.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let mut input = Input(payload);
        let tag = input.byte()?;
        // The zero id means that there is none.
        let id = input.id().filter(|id| *id != NO_BASE)?;
        let tell = match tag {
            ATTACH => Self::Attach {
                id,
                stance: match input.byte()? {
                    0 => Stance::Standby,
                    1 => Stance::Arriving,
                    _ => return None,
                },
                epoch: input.u64()?,
                base: Some(input.id()?).filter(|base| *base != NO_BASE),
            },
            CHANGES => Self::Changes {
                id,
                epoch: input.u64()?,
                number: input.u64()?,
            },
            HANDOFF => Self::Handoff {
                id,
                epoch: input.u64()?,
            },
            ABORT => Self::Abort { id },
            BASES => Self::Bases { id },
            DIFFERS => Self::Differs {
                id,
                base: input.id().filter(|base| *base != NO_BASE)?,
                from: input.u64()?,
            },
            DONE => Self::Done { id },
            HEAT => Self::Heat { id },
            SLOW => Self::Slow {
                id,
                bytes_per_s: input.u64()?,
            },
            _ => return None,
        };
        input.is_empty().then_some(tell)
    }
}

impl Told {
    /// The payload, to be cut into frames.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Attached(attached) => {
                let mut out = vec![ATTACH];
                out.extend_from_slice(&attached.generation.to_be_bytes());
                out.extend_from_slice(&attached.epoch.to_be_bytes());
                out.push(match attached.handed_over {
                    HandedOver::NotYet => 0,
                    HandedOver::Already => 1,
                    HandedOver::Never => 2,
                });
                match attached.old_copy {
                    OldCopy::Unknown => out.push(0),
                    OldCopy::Known => out.push(1),
                    OldCopy::Needed { block_bytes } => {
                        out.push(2);
                        out.extend_from_slice(&block_bytes.to_be_bytes());
                    }
                }
                out.extend_from_slice(attached.boots.known().as_flattened());
                out
            }
            Self::Changes { ranges } => {
                let mut out = vec![CHANGES];
                put_ranges(&mut out, ranges);
                out
            }
            Self::Fenced { generation, ranges } => {
                let mut out = vec![HANDOFF];
                out.extend_from_slice(&generation.to_be_bytes());
                out.push(u8::from(ranges.is_some()));
                put_ranges(&mut out, ranges.as_deref().unwrap_or_default());
                out
            }
            Self::Bases(bases) => {
                let mut out = vec![BASES];
                for (id, ranges) in bases {
                    out.extend_from_slice(id);
                    out.extend_from_slice(&(ranges.len() as u64).to_be_bytes());
                    put_ranges(&mut out, ranges);
                }
                out
            }
            Self::Heat(map) => [&[HEAT][..], map].concat(),
            Self::Differs { ranges, more } => {
                let mut out = vec![DIFFERS, u8::from(*more)];
                put_ranges(&mut out, ranges);
                out
            }
            Self::Fine => vec![DONE],
            Self::Refused(text) => [&[REFUSED][..], cut(text).as_bytes()].concat(),
        }
    }

    /// A payload as an answer about a disk of `size_bytes`; `None` if it is none. Ranges are inside
    /// the disk, in order, and do not touch each other's bytes.
    pub fn decode(payload: &[u8], size_bytes: u64) -> Option<Self> {
        let mut input = Input(payload);
        let told = match input.byte()? {
            ATTACH => Self::Attached(Attached {
                generation: input.u64()?,
                epoch: input.u64()?,
                handed_over: match input.byte()? {
                    0 => HandedOver::NotYet,
                    1 => HandedOver::Already,
                    2 => HandedOver::Never,
                    _ => return None,
                },
                old_copy: match input.byte()? {
                    0 => OldCopy::Unknown,
                    1 => OldCopy::Known,
                    2 => OldCopy::Needed {
                        block_bytes: input.take().map(u32::from_be_bytes)?,
                    },
                    _ => return None,
                },
                boots: input.boots()?,
            }),
            CHANGES => Self::Changes {
                ranges: input.ranges(u64::MAX, size_bytes)?,
            },
            HANDOFF => {
                let generation = input.u64()?;
                let known = input.flag()?;
                let ranges = input.ranges(u64::MAX, size_bytes)?;
                Self::Fenced {
                    generation,
                    ranges: known.then_some(ranges),
                }
            }
            BASES => {
                let mut bases = Vec::new();
                while !input.is_empty() && bases.len() < limits::TOLD_BASES {
                    let id = input.id()?;
                    let count = input.u64()?;
                    bases.push((id, input.ranges(count, size_bytes)?));
                }
                Self::Bases(bases)
            }
            DIFFERS => Self::Differs {
                more: input.flag()?,
                ranges: input.ranges(u64::MAX, size_bytes)?,
            },
            DONE => Self::Fine,
            HEAT => return Some(Self::Heat(input.0.to_vec())),
            REFUSED => {
                let text = input.0.get(..input.0.len().min(TEXT_BYTES))?;
                let text = String::from_utf8_lossy(text);
                let shown = |c: char| if c.is_control() { ' ' } else { c };
                let text: String = text.chars().map(shown).collect();
                // What was no text has become longer.
                return Some(Self::Refused(cut(&text).to_owned()));
            }
            _ => return None,
        };
        input.is_empty().then_some(told)
    }
}

/// A text that is not too long.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn put_ranges(out: &mut Vec<u8>, ranges: &[ByteRange]) {
    for range in ranges {
        out.extend_from_slice(&range.start.to_be_bytes());
        out.extend_from_slice(&range.len().to_be_bytes());
    }
}

/// A payload that is taken apart from the front.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*front)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn id(&mut self) -> Option<MoveId> {
        self.take()
    }

    /// All that is left, as boots.
    fn boots(&mut self) -> Option<Boots> {
        let mut boots = Boots::NONE;
        while !self.is_empty() {
            if boots.count == limits::TOLD_BOOTS {
                return None;
            }
            boots.push(self.take()?);
        }
        Some(boots)
    }

    /// At most `most` ranges, as many as there are if that is [`u64::MAX`].
    fn ranges(&mut self, most: u64, size_bytes: u64) -> Option<Vec<ByteRange>> {
        let here = self.0.len() / RANGE_BYTES;
        let count = match most {
            u64::MAX => here,
            count => usize::try_from(count).ok().filter(|count| *count <= here)?,
        };
        let mut ranges = Vec::with_capacity(count);
        let mut end = 0;
        for _ in 0..count {
            let (start, len) = (self.u64()?, self.u64()?);
            let next = start.checked_add(len)?;
            if start < end || len == 0 || next > size_bytes {
                return None;
            }
            end = next;
            ranges.push(ByteRange::at(start, len));
        }
        Some(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: u64 = 1 << 30;

    fn a_tell() -> impl Strategy<Value = Tell> {
        let id = || any::<MoveId>().prop_filter("no id", |id| *id != NO_BASE);
        prop_oneof![
            (id(), any::<bool>(), any::<u64>(), any::<Option<[u8; 16]>>()).prop_map(
                |(id, arriving, epoch, base)| Tell::Attach {
                    id,
                    stance: if arriving {
                        Stance::Arriving
                    } else {
                        Stance::Standby
                    },
                    epoch,
                    base: base.filter(|base| *base != NO_BASE),
                }
            ),
            (id(), any::<u64>(), any::<u64>()).prop_map(|(id, epoch, number)| Tell::Changes {
                id,
                epoch,
                number
            }),
            (id(), any::<u64>()).prop_map(|(id, epoch)| Tell::Handoff { id, epoch }),
            id().prop_map(|id| Tell::Abort { id }),
            id().prop_map(|id| Tell::Bases { id }),
            (id(), id(), any::<u64>()).prop_map(|(id, base, from)| Tell::Differs {
                id,
                base,
                from
            }),
            id().prop_map(|id| Tell::Done { id }),
            id().prop_map(|id| Tell::Heat { id }),
            (id(), any::<u64>()).prop_map(|(id, bytes_per_s)| Tell::Slow { id, bytes_per_s }),
        ]
    }

    fn some_ranges() -> impl Strategy<Value = Vec<ByteRange>> {
        prop::collection::vec((0..4096_u64, 1..4096_u64), 0..20).prop_map(|steps| {
            let mut at = 0;
            let mut ranges = Vec::new();
            for (gap, len) in steps {
                ranges.push(ByteRange::at(at + gap, len));
                at += gap + len;
            }
            ranges
        })
    }

    fn some_boots() -> impl Strategy<Value = Boots> {
        prop::collection::vec(any::<BootId>(), 0..=limits::TOLD_BOOTS).prop_map(|ids| {
            let before = |boots, id: &BootId| Boots::of(*id, boots);
            ids.iter().fold(Boots::NONE, before)
        })
    }

    fn a_told() -> impl Strategy<Value = Told> {
        prop_oneof![
            (any::<(u64, u64, u8, u8, u32)>(), some_boots()).prop_map(
                |((generation, epoch, handed_over, old_copy, block_bytes), boots)| {
                    Told::Attached(Attached {
                        generation,
                        epoch,
                        handed_over: match handed_over % 3 {
                            0 => HandedOver::NotYet,
                            1 => HandedOver::Already,
                            _ => HandedOver::Never,
                        },
                        old_copy: match old_copy % 3 {
                            0 => OldCopy::Unknown,
                            1 => OldCopy::Known,
                            _ => OldCopy::Needed { block_bytes },
                        },
                        boots,
                    })
                }
            ),
            some_ranges().prop_map(|ranges| Told::Changes { ranges }),
            (any::<u64>(), some_ranges()).prop_map(|(generation, ranges)| Told::Fenced {
                generation,
                ranges: Some(ranges),
            }),
            any::<u64>().prop_map(|generation| Told::Fenced {
                generation,
                ranges: None,
            }),
            prop::collection::vec((any::<MoveId>(), some_ranges()), 0..limits::TOLD_BASES)
                .prop_map(Told::Bases),
            (some_ranges(), any::<bool>())
                .prop_map(|(ranges, more)| Told::Differs { ranges, more }),
            Just(Told::Fine),
            prop::collection::vec(any::<u8>(), 0..200).prop_map(Told::Heat),
            "[a-z é]{0,300}".prop_map(Told::Refused),
        ]
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in(tell in a_tell(), told in a_told()) {
            prop_assert!(tell.encode().len() <= limits::TELL_BYTES as usize);
            prop_assert_eq!(Tell::decode(&tell.encode()), Some(tell));
            prop_assert_eq!(Told::decode(&told.encode(), DISK), Some(told));
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Tell::decode(&bytes);
            if let Some(Told::Changes { ranges }) = Told::decode(&bytes, DISK) {
                prop_assert!(ranges.iter().all(|range| range.end <= DISK && !range.is_empty()));
            }
        }
    }

    #[test]
    fn more_boots_than_are_told_are_no_answer() {
        let boots = |n: u8| (0..n).fold(Boots::NONE, |boots, id| Boots::of([id; 16], boots));
        let most = boots(4);
        // Whose word counts least is left out.
        assert_eq!(boots(9).known(), [[8; 16], [7; 16], [6; 16], [5; 16]]);
        let attached = Told::Attached(Attached {
            boots: most,
            ..Attached::default()
        });
        let mut payload = attached.encode();
        assert_eq!(Told::decode(&payload, DISK), Some(attached));
        payload.extend_from_slice(&[9; 16]);
        assert_eq!(Told::decode(&payload, DISK), None);
        payload.truncate(payload.len() - 24);
        assert_eq!(Told::decode(&payload, DISK), None);
    }

    #[test]
    fn a_boot_that_is_not_told_has_not_ended() {
        let [one, two] = [[1; 16], [2; 16]].map(|id| Boots::of(id, Boots::NONE));
        let [far_one, far_two] = [one, two].map(|far| Boots::of([7; 16], far));
        let near = Boots::of([7; 16], Boots::NONE);
        assert!(one.ended_before(&two) && far_one.ended_before(&far_two));
        assert!(!far_one.ended_before(&near) && !near.ended_before(&far_two));
        assert!(!Boots::NONE.ended_before(&two) && !two.ended_before(&Boots::NONE));
        // What is not told for a while is not forgotten.
        assert!(far_one.followed_by(near).ended_before(&far_two));
        assert_eq!(far_one.followed_by(far_two), far_two);
    }

    #[test]
    fn ranges_beyond_the_disk_or_out_of_order_are_no_answer() {
        let answer = |ranges: Vec<ByteRange>| Told::Changes { ranges }.encode();
        let one = ByteRange::at(DISK - 512, 512);
        assert!(Told::decode(&answer(vec![one]), DISK).is_some());
        assert!(Told::decode(&answer(vec![one]), DISK - 1).is_none());
        assert!(Told::decode(&answer(vec![one, ByteRange::at(0, 512)]), DISK).is_none());
        assert!(Told::decode(&answer(vec![ByteRange::at(0, 0)]), DISK).is_none());
    }
}
