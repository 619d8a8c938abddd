//! A snapshot: the whole residency at once, from which a log goes on.
//!
//! Pages of 4096 blocks that are alike throughout take a few bytes, others their two planes.

use super::{JournalError, Reader, Record, VolumeId, put_varint};
use crate::geometry::{BlockRange, Geometry};
use crate::residency::Residency;

const MAGIC: [u8; 8] = *b"HKKMAP01";
const HEADER_BYTES: usize = 48;
const CRC_BYTES: usize = 4;

/// Blocks in a page, and words in each of its planes.
const PAGE_BLOCKS: u64 = 4096;
const PAGE_WORDS: u64 = PAGE_BLOCKS / 64;

const END: u8 = 0;
const ALL_CLEAN: u8 = 1;
const ALL_OWNED: u8 = 2;
const RAW: u8 = 3;

/// The snapshot of a disk of which nothing is here.
pub fn empty_snapshot(volume: VolumeId, epoch: u64, geometry: Geometry) -> Vec<u8> {
    let mut out = header(volume, epoch, geometry);
    out.push(END);
    seal(out)
}

/// The snapshot of a residency as it is now, partial blocks included.
pub fn encode_snapshot(volume: VolumeId, epoch: u64, residency: &Residency) -> Vec<u8> {
    let geometry = residency.geometry();
    // The partial blocks before the pages: one that is completed in between is in both then, and
    // not in neither.
    let partials = residency.partials();
    let mut out = header(volume, epoch, geometry);
    let words = geometry.blocks().div_ceil(64);
    for page in 0..geometry.blocks().div_ceil(PAGE_BLOCKS) {
        let first = page * PAGE_WORDS;
        encode_page(
            &mut out,
            page,
            residency,
            first,
            words.min(first + PAGE_WORDS),
        );
    }
    out.push(END);
    for (block, mask) in partials {
        Record::Partial { block, mask }.encode(&mut out);
    }
    seal(out)
}

fn encode_page(out: &mut Vec<u8>, page: u64, residency: &Residency, first: u64, end: u64) {
    let blocks = residency.geometry().blocks();
    let (mut any, mut all_resident, mut any_owned, mut all_owned) = (0, true, 0, true);
    for word in first..end {
        let (resident, owned) = residency.raw_words(word);
        let full = u64::MAX >> (64 - (blocks - word * 64).min(64));
        any |= resident;
        any_owned |= owned;
        all_resident &= resident == full;
        all_owned &= owned & resident == full;
    }
    // Most pages of a large disk are alike throughout, so a page that is not is looked at twice.
    // It may have grown in between: then the second look tells more, and never less.
    let kind = match (all_resident, any_owned, all_owned) {
        _ if any == 0 => return,
        (true, _, true) => ALL_OWNED,
        (true, 0, _) => ALL_CLEAN,
        _ => RAW,
    };
    out.push(kind);
    put_varint(out, page);
    if kind == RAW {
        for word in first..end {
            let (resident, owned) = residency.raw_words(word);
            out.extend_from_slice(&resident.to_le_bytes());
            // Partial blocks go into the list behind the pages.
            out.extend_from_slice(&(owned & resident).to_le_bytes());
        }
    }
}

fn header(volume: VolumeId, epoch: u64, geometry: Geometry) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&volume);
    out.extend_from_slice(&epoch.to_le_bytes());
    out.extend_from_slice(&geometry.size_bytes().to_le_bytes());
    out.extend_from_slice(&geometry.block_bytes().to_le_bytes());
    out
}

pub(super) fn seal(mut out: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// Whether this is the first snapshot of some volume, with nothing in it: what
/// [`empty_snapshot`] makes for epoch 0.
pub fn is_new_snapshot(bytes: &[u8]) -> bool {
    let (Some(volume), Some(epoch)) = (bytes.get(8..24), bytes.get(24..32)) else {
        return false;
    };
    bytes.len() == HEADER_BYTES + 1 + CRC_BYTES
        && bytes[..8] == MAGIC
        && epoch.iter().all(|byte| *byte == 0)
        && bytes[HEADER_BYTES] == END
        // A volume of zeroes is nobody's.
        && volume.iter().any(|byte| *byte != 0)
        && crc32c::crc32c(&bytes[..HEADER_BYTES + 1]).to_le_bytes() == bytes[HEADER_BYTES + 1..]
}

/// The epoch of a snapshot that is whole and belongs to this volume.
///
/// # Errors
/// It is none, is damaged, or belongs elsewhere.
pub fn snapshot_epoch(
    bytes: &[u8],
    volume: VolumeId,
    geometry: Geometry,
) -> Result<u64, JournalError> {
    open(bytes, volume, geometry).map(|(epoch, _)| epoch)
}

fn open(
    bytes: &[u8],
    volume: VolumeId,
    geometry: Geometry,
) -> Result<(u64, Reader<'_>), JournalError> {
    let mut reader = open_sealed(bytes, MAGIC)?;
    if reader.take(16)? != volume {
        return Err(JournalError::Foreign);
    }
    let epoch = reader.u64()?;
    if reader.u64()? != geometry.size_bytes() || reader.u64()? != geometry.block_bytes() {
        return Err(JournalError::Foreign);
    }
    Ok((epoch, reader))
}

/// What is between the magic and the checksum.
pub(super) fn open_sealed(bytes: &[u8], magic: [u8; 8]) -> Result<Reader<'_>, JournalError> {
    if bytes.get(..8) != Some(&magic[..]) {
        return Err(JournalError::Format);
    }
    if bytes.len() < magic.len() + CRC_BYTES {
        return Err(JournalError::Corrupt("it ends too early"));
    }
    let (body, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return Err(JournalError::Corrupt("its checksum is wrong"));
    }
    Ok(Reader(&body[8..]))
}

/// Brings a snapshot into a residency that is empty and that nobody else uses yet.
///
/// # Errors
/// As [`snapshot_epoch`], or it says what cannot be.
pub fn apply_snapshot(
    bytes: &[u8],
    volume: VolumeId,
    residency: &Residency,
) -> Result<(), JournalError> {
    let geometry = residency.geometry();
    let (_, mut reader) = open(bytes, volume, geometry)?;
    loop {
        let kind = reader.byte()?;
        if kind == END {
            break;
        }
        let page = reader.varint()?;
        if page >= geometry.blocks().div_ceil(PAGE_BLOCKS) {
            return Err(JournalError::Corrupt("a page is out of bounds"));
        }
        let start = page * PAGE_BLOCKS;
        let all = BlockRange::new(start, geometry.blocks().min(start + PAGE_BLOCKS));
        match kind {
            ALL_CLEAN => residency.mark_clean(all),
            ALL_OWNED => residency.mark_owned(all),
            RAW => apply_raw(&mut reader, all, residency)?,
            _ => return Err(JournalError::Corrupt("a page is of no known kind")),
        }
    }
    while !reader.is_empty() {
        Record::decode(&mut reader, geometry)?.apply(residency)?;
    }
    Ok(())
}

fn apply_raw(
    reader: &mut Reader<'_>,
    blocks: BlockRange,
    residency: &Residency,
) -> Result<(), JournalError> {
    for first in (blocks.start..blocks.end).step_by(64) {
        let (resident, owned) = (reader.u64()?, reader.u64()?);
        let beyond = if blocks.end - first >= 64 {
            0
        } else {
            u64::MAX << (blocks.end - first)
        };
        if owned & !resident != 0 || resident & beyond != 0 {
            return Err(JournalError::Corrupt("a page says what cannot be"));
        }
        for (start, end) in runs_of(resident & !owned) {
            residency.mark_clean(BlockRange::new(first + start, first + end));
        }
        for (start, end) in runs_of(owned) {
            residency.mark_owned(BlockRange::new(first + start, first + end));
        }
    }
    Ok(())
}

/// The runs of set bits in a word.
fn runs_of(word: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = 0_u32;
    std::iter::from_fn(move || {
        let rest = word.checked_shr(at)?;
        if rest == 0 {
            return None;
        }
        let start = at + rest.trailing_zeros();
        let len = (word >> start).trailing_ones();
        at = start + len;
        Some((u64::from(start), u64::from(at)))
    })
}
