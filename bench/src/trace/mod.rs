//! Recorded requests of a guest to its disk, and their replay.
//!
//! Owns the files below `bench/traces` (whose README describes the format and how they were
//! recorded) and putting their requests to a server again (`replay.rs`). A trace has places and
//! sizes and no content; [`DiskMap::fill`] makes a disk that has data where the recorded one had.

mod replay;

pub use replay::{Replay, Thinking, replay};

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::client::{Random, mix};

const TRACE_MAGIC: &[u8; 8] = b"HKKTRC01";
const MAP_MAGIC: &[u8; 8] = b"HKKEXT01";
/// Magic, size of the disk, number of entries.
const HEADER_BYTES: usize = 20;
const CHECKSUM_BYTES: usize = 4;
/// More entries than a trace of hours has.
const MAX_ENTRIES: u32 = 10_000_000;
/// Longer than a guest's requests are: virtio's limits and the kernel's are far below.
const MAX_REQUEST_BYTES: u64 = 32 << 20;
/// Larger than any disk that is worth replaying.
const MAX_DISK_BYTES: u64 = 1 << 44;
const SECTOR_BYTES: u64 = 512;
const MAP_UNIT_BYTES: u64 = 4096;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data.
    Read,
    /// Put data.
    Write,
    /// Make writes durable.
    Flush,
    /// Forget a range.
    Trim,
    /// Put zeroes.
    Zero,
}

/// One recorded request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub kind: Kind,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes; 0 for a flush.
    pub length: u32,
    /// How many requests before this one stands the one whose answer came last before this was
    /// asked; `None` at the start.
    pub after: Option<usize>,
    /// How long the guest thought after that answer (or after the start), in microseconds.
    pub think_us: u64,
}

/// A recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Size of the disk.
    pub disk_bytes: u64,
    /// In the order in which they were asked.
    pub requests: Vec<Request>,
}

impl Trace {
    /// Reads a trace file's content.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (disk_bytes, count, mut body) = open(bytes, TRACE_MAGIC)?;
        let mut requests = Vec::new();
        let mut previous_end = 0_u64;
        for index in 0..count {
            let kind = match body.byte()? {
                0 => Kind::Read,
                1 => Kind::Write,
                2 => Kind::Flush,
                3 => Kind::Trim,
                4 => Kind::Zero,
                other => bail!("request {index} is of kind {other}, which nobody knows"),
            };
            let sector = previous_end
                .checked_add_signed(unzigzag(body.varint()?))
                .with_context(|| format!("request {index} lies before the disk"))?;
            let sectors = body.varint()?;
            let back = usize::try_from(body.varint()?)?;
            let think_us = body.varint()?;
            previous_end = sector
                .checked_add(sectors)
                .filter(|end| *end <= disk_bytes / SECTOR_BYTES)
                .with_context(|| format!("request {index} ends beyond the disk"))?;
            ensure!(
                sectors * SECTOR_BYTES <= MAX_REQUEST_BYTES,
                "request {index} is longer than {MAX_REQUEST_BYTES} bytes"
            );
            ensure!(
                back <= requests.len(),
                "request {index} follows one before the first"
            );
            requests.push(Request {
                kind,
                offset: sector * SECTOR_BYTES,
                length: u32::try_from(sectors * SECTOR_BYTES)?,
                after: (back > 0).then(|| requests.len() - back),
                think_us,
            });
        }
        body.end()?;
        Ok(Self {
            disk_bytes,
            requests,
        })
    }

    /// All thinking that lies on the longest chain of requests: how long the guest would take if
    /// its disk took no time.
    pub fn think_us(&self) -> u64 {
        let mut ends: Vec<u64> = Vec::with_capacity(self.requests.len());
        for request in &self.requests {
            let start = request.after.map_or(0, |after| ends[after]);
            ends.push(start + request.think_us);
        }
        ends.into_iter().max().unwrap_or(0)
    }
}

/// Where a disk has data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskMap {
    /// Size of the disk.
    pub disk_bytes: u64,
    /// First byte and length of each range with data.
    pub extents: Vec<(u64, u64)>,
}

impl DiskMap {
    /// Reads a map file's content.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (disk_bytes, count, mut body) = open(bytes, MAP_MAGIC)?;
        let mut extents = Vec::new();
        let mut at = 0_u64;
        for index in 0..count {
            let (gap, length) = (body.varint()?, body.varint()?);
            let units = disk_bytes / MAP_UNIT_BYTES;
            let start = at.checked_add(gap);
            let end = start.and_then(|start| start.checked_add(length));
            let (Some(start), Some(end)) = (start, end.filter(|end| *end <= units)) else {
                bail!("extent {index} ends beyond the disk");
            };
            extents.push((start * MAP_UNIT_BYTES, length * MAP_UNIT_BYTES));
            at = end;
        }
        body.end()?;
        Ok(Self {
            disk_bytes,
            extents,
        })
    }

    /// Makes a sparse disk at `path` with data in the same places.
    pub fn fill(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
        file.set_len(self.disk_bytes)?;
        let mut buffer = Vec::with_capacity(1 << 20);
        for &(start, length) in &self.extents {
            let mut at = start;
            while at < start + length {
                buffer.clear();
                let first = at;
                while at < start + length && buffer.len() < 1 << 20 {
                    buffer.extend_from_slice(&block(at));
                    at += MAP_UNIT_BYTES;
                }
                file.write_all_at(&buffer, first).context("fill the disk")?;
            }
        }
        Ok(())
    }
}

/// The content of the block at `offset`: as compressible as what a root file system holds. Runs of
/// 64 KiB are alike, as files are: of eight, three are incompressible, three shrink to a half and
/// two to a quarter, about what zstd makes of /usr.
fn block(offset: u64) -> [u8; 4096] {
    let fresh_bytes = match mix(offset >> 16) % 8 {
        0..3 => 4096,
        3..6 => 2048,
        _ => 1024,
    };
    let mut random = Random::new(offset);
    let mut block = [0x20; 4096];
    for chunk in block[..fresh_bytes].chunks_exact_mut(8) {
        // Never 0, so that no block is taken for a hole.
        chunk.copy_from_slice(&(random.next() | 1).to_le_bytes());
    }
    block
}

/// Checks a file's frame; gives the disk's size, the number of entries and the entries.
fn open<'a>(bytes: &'a [u8], magic: &[u8; 8]) -> Result<(u64, u32, Body<'a>)> {
    ensure!(
        bytes.len() >= HEADER_BYTES + CHECKSUM_BYTES && bytes.starts_with(magic),
        "not a file that begins with {}",
        String::from_utf8_lossy(magic)
    );
    let (data, sum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    ensure!(
        crc32c::crc32c(data).to_le_bytes() == sum,
        "the checksum is wrong: the file is damaged"
    );
    let disk_bytes = u64::from_le_bytes(data[8..16].try_into().expect("eight bytes"));
    let count = u32::from_le_bytes(data[16..20].try_into().expect("four bytes"));
    ensure!(
        disk_bytes <= MAX_DISK_BYTES && count <= MAX_ENTRIES,
        "{count} entries of a disk of {disk_bytes} bytes are too many"
    );
    Ok((disk_bytes, count, Body(&data[HEADER_BYTES..])))
}

/// What is left to read.
struct Body<'a>(&'a [u8]);

impl Body<'_> {
    fn byte(&mut self) -> Result<u8> {
        let (first, rest) = self.0.split_first().context("the file ends too early")?;
        self.0 = rest;
        Ok(*first)
    }

    /// A number, seven bits a byte, the lowest first.
    fn varint(&mut self) -> Result<u64> {
        let mut number = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        bail!("a number of more than nine bytes")
    }

    fn end(&self) -> Result<()> {
        ensure!(self.0.is_empty(), "{} bytes too many", self.0.len());
        Ok(())
    }
}

fn unzigzag(number: u64) -> i64 {
    let half = i64::try_from(number >> 1).unwrap_or(i64::MAX);
    if number & 1 == 0 { half } else { -half - 1 }
}

#[cfg(test)]
mod tests;
