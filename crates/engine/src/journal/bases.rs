//! Which blocks differ from older copies of the disk, as bytes: a few sets, each under the id of the
//! volume whose handoff made that copy the old one.
//!
//! A set that is too small would lose data, so whatever is not exactly as it was written is an
//! error, and no set at all.

use super::snapshot::{open_sealed, seal};
use super::{JournalError, VolumeId, put_varint};
use crate::blocks::{BlockSet, PAGE_BLOCKS, PAGE_WORDS, Page};
use crate::geometry::Geometry;

const MAGIC: [u8; 8] = *b"HKKBASE1";

/// Old copies that are remembered at most, the newest first.
pub const MAX_BASES: usize = 8;

const END: u8 = 0;
const ALL: u8 = 1;
const SOME: u8 = 2;

/// What differs from each old copy.
pub type Bases = Vec<(VolumeId, BlockSet)>;

/// The bytes of `bases`, of which the first [`MAX_BASES`] count, for the state of `volume`.
pub fn encode_bases(
    volume: VolumeId,
    geometry: Geometry,
    bases: &[(VolumeId, BlockSet)],
) -> Vec<u8> {
    let bases = &bases[..bases.len().min(MAX_BASES)];
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&volume);
    out.extend_from_slice(&geometry.size_bytes().to_le_bytes());
    out.extend_from_slice(&geometry.block_bytes().to_le_bytes());
    put_varint(&mut out, bases.len() as u64);
    for (base, set) in bases {
        out.extend_from_slice(base);
        for (number, page) in &set.pages {
            match page {
                Page::All => {
                    out.push(ALL);
                    put_varint(&mut out, *number);
                }
                Page::Some(words) => {
                    out.push(SOME);
                    put_varint(&mut out, *number);
                    for word in words.iter() {
                        out.extend_from_slice(&word.to_le_bytes());
                    }
                }
            }
        }
        out.push(END);
    }
    seal(out)
}

/// Reads what [`encode_bases`] wrote.
///
/// # Errors
/// Anything else, or of another volume.
pub fn decode_bases(
    bytes: &[u8],
    volume: VolumeId,
    geometry: Geometry,
) -> Result<Bases, JournalError> {
    let mut reader = open_sealed(bytes, MAGIC)?;
    if reader.take(16)? != volume
        || reader.u64()? != geometry.size_bytes()
        || reader.u64()? != geometry.block_bytes()
    {
        return Err(JournalError::Foreign);
    }
    let count = reader.varint()?;
    if count > MAX_BASES as u64 {
        return Err(JournalError::Corrupt("it tells of too many copies"));
    }
    let pages = geometry.blocks().div_ceil(PAGE_BLOCKS);
    let mut bases = Bases::new();
    for _ in 0..count {
        let base = reader.take(16)?.try_into().expect("sixteen bytes");
        let mut set = BlockSet::new();
        let mut next = 0;
        loop {
            let kind = reader.byte()?;
            if kind == END {
                break;
            }
            let number = reader.varint()?;
            if number < next || number >= pages {
                return Err(JournalError::Corrupt("a page is out of bounds or of order"));
            }
            next = number + 1;
            let page = match kind {
                ALL => Page::All,
                SOME => {
                    let mut words = Box::new([0; PAGE_WORDS]);
                    for word in words.iter_mut() {
                        *word = reader.u64()?;
                    }
                    Page::Some(words)
                }
                _ => return Err(JournalError::Corrupt("a page is of no known kind")),
            };
            set.pages.insert(number, page);
        }
        bases.push((base, set));
    }
    if !reader.is_empty() {
        return Err(JournalError::Corrupt("something follows its end"));
    }
    Ok(bases)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::geometry::BlockRange;
    use proptest::prelude::*;

    const BLOCKS: u64 = 2 * PAGE_BLOCKS + 100;
    const VOLUME: VolumeId = [7; 16];

    fn geometry() -> Geometry {
        Geometry::new(BLOCKS * 4096, 4096).expect("a good shape")
    }

    fn some_bases() -> impl Strategy<Value = Bases> {
        let range = (0..BLOCKS, prop_oneof![1..80_u64, 1..9000_u64])
            .prop_map(|(start, len)| BlockRange::new(start, (start + len).min(BLOCKS)));
        let set = prop::collection::vec(range, 0..8).prop_map(|r| r.into_iter().collect());
        prop::collection::vec((any::<VolumeId>(), set), 0..MAX_BASES + 3)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(bases in some_bases()) {
            let bytes = encode_bases(VOLUME, geometry(), &bases);
            let mut wanted = bases;
            wanted.truncate(MAX_BASES);
            prop_assert_eq!(decode_bases(&bytes, VOLUME, geometry()).unwrap(), wanted);
            prop_assert_eq!(
                decode_bases(&bytes, [8; 16], geometry()),
                Err(JournalError::Foreign)
            );
        }

        #[test]
        fn whatever_is_changed_or_cut_is_refused(
            bases in some_bases(), at in any::<prop::sample::Index>(), flip in 1..=255_u8
        ) {
            let bytes = encode_bases(VOLUME, geometry(), &bases);
            let at = at.index(bytes.len());
            prop_assert!(decode_bases(&bytes[..at], VOLUME, geometry()).is_err());
            let mut changed = bytes;
            changed[at] ^= flip;
            prop_assert!(decode_bases(&changed, VOLUME, geometry()).is_err());
        }

        #[test]
        fn any_bytes_are_taken(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = encode_bases(VOLUME, geometry(), &[]);
            // Behind a good header, under a good checksum.
            bytes.truncate(40);
            bytes.extend(body);
            let _ = decode_bases(&seal(bytes), VOLUME, geometry());
        }
    }
}
