//! A minimal writer of FAT32, for machines without mke2fs: files in the root directory, each in one
//! run of clusters. The reference is Microsoft's "FAT File System Specification", cited by section.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::disk::Entry;

const SECTOR_BYTES: u64 = 512;

/// Sectors before the first FAT (section 3.1: 32 is usual), a whole number of 4 KiB blocks.
const RESERVED_SECTORS: u64 = 32;

/// Above this size clusters are larger, so that there are not too many for FAT32.
const SMALL_CLUSTERS_UP_TO: u64 = 8 << 30;

/// Marks the last cluster of a chain (section 4).
const END_OF_CHAIN: u32 = 0x0fff_ffff;

/// The first cluster that holds data (section 4).
const FIRST_CLUSTER: u32 = 2;

/// Bytes of a directory entry (section 6).
const ENTRY_BYTES: u64 = 32;

/// 1 January 2026, as FAT writes dates (section 6.4).
const DATE: u16 = ((2026 - 1980) << 9) | (1 << 5) | 1;

/// Where things are.
struct Layout {
    cluster_bytes: u64,
    fat_sectors: u64,
    clusters: u64,
    total_sectors: u64,
}

impl Layout {
    fn of(size_bytes: u64) -> Self {
        let cluster_bytes: u64 = match size_bytes {
            0..=SMALL_CLUSTERS_UP_TO => 4096,
            _ => 32 << 10,
        };
        let total_sectors = size_bytes / SECTOR_BYTES;
        // Enough for all of the disk, so a little too much; rounded so that clusters are aligned.
        let entries = size_bytes / cluster_bytes + u64::from(FIRST_CLUSTER);
        let fat_sectors = (entries * 4).div_ceil(SECTOR_BYTES).next_multiple_of(8);
        let data_sectors = total_sectors - RESERVED_SECTORS - 2 * fat_sectors;
        Self {
            cluster_bytes,
            fat_sectors,
            clusters: data_sectors * SECTOR_BYTES / cluster_bytes,
            total_sectors,
        }
    }

    fn data_offset(&self, cluster: u32) -> u64 {
        let before = (RESERVED_SECTORS + 2 * self.fat_sectors) * SECTOR_BYTES;
        before + u64::from(cluster - FIRST_CLUSTER) * self.cluster_bytes
    }

    fn clusters_for(&self, bytes: u64) -> io::Result<u32> {
        u32::try_from(bytes.div_ceil(self.cluster_bytes)).map_err(io::Error::other)
    }
}

/// Writes a file system with `entries` into the image at `path`, which is all zeroes. What cannot
/// be read is left out, of `entries` too.
///
/// # Errors
/// The image cannot be written, or the content does not fit.
pub fn write(path: &Path, size_bytes: u64, entries: &mut Vec<Entry>) -> io::Result<()> {
    let image = OpenOptions::new().write(true).open(path)?;
    let layout = Layout::of(size_bytes);
    let count = u64::try_from(entries.len()).map_err(io::Error::other)?;
    let root_clusters = layout.clusters_for((count + 1) * ENTRY_BYTES)?;
    let mut fat = vec![0x0fff_fff8, END_OF_CHAIN];
    chain(&mut fat, root_clusters)?;
    let mut root = directory_entry(b"HIKKOSHI   ", 0x08, 0, 0).to_vec();
    let mut number = 0_u32;
    let mut failure = None;
    entries.retain(|entry| {
        let copied = copy(&image, &layout, &mut fat, entry).and_then(|first| {
            let name = match number {
                0 => *b"GUEST   DB ",
                n => file_name(n),
            };
            let len = u32::try_from(entry.len).map_err(io::Error::other)?;
            root.extend(directory_entry(&name, 0x20, first, len));
            Ok(())
        });
        number += 1;
        match copied {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => false,
            Err(error) => {
                failure = Some(error);
                false
            }
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    image.write_all_at(&root, layout.data_offset(FIRST_CLUSTER))?;
    let used = u64::try_from(fat.len()).map_err(io::Error::other)? - u64::from(FIRST_CLUSTER);
    let table: Vec<u8> = fat.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    for copy in 0..2 {
        let at = (RESERVED_SECTORS + copy * layout.fat_sectors) * SECTOR_BYTES;
        image.write_all_at(&table, at)?;
    }
    let boot = boot_sector(&layout)?;
    let information = information_sector(layout.clusters - used, fat.len())?;
    // The second copies are at sector 6 and 7 (section 3.1, BPB_BkBootSec).
    for at in [0, 6] {
        image.write_all_at(&boot, at * SECTOR_BYTES)?;
        image.write_all_at(&information, (at + 1) * SECTOR_BYTES)?;
    }
    image.sync_all()
}

/// Copies a file into the next free clusters; tells the first of them.
fn copy(image: &File, layout: &Layout, fat: &mut Vec<u32>, entry: &Entry) -> io::Result<u32> {
    let from = File::open(&entry.path)?;
    let mut data = Vec::new();
    from.take(entry.len).read_to_end(&mut data)?;
    // One that became shorter meanwhile is filled up with zeroes.
    data.resize(usize::try_from(entry.len).map_err(io::Error::other)?, 0);
    let first = chain(fat, layout.clusters_for(entry.len)?)?;
    let used = u64::try_from(fat.len()).map_err(io::Error::other)?;
    if used > layout.clusters + u64::from(FIRST_CLUSTER) {
        return Err(io::ErrorKind::StorageFull.into());
    }
    image.write_all_at(&data, layout.data_offset(first))?;
    Ok(first)
}

/// Appends a chain of `count` neighbours to the FAT; tells the first of them.
fn chain(fat: &mut Vec<u32>, count: u32) -> io::Result<u32> {
    let first = u32::try_from(fat.len()).map_err(io::Error::other)?;
    fat.extend((1..count).map(|n| first + n));
    fat.push(END_OF_CHAIN);
    Ok(first)
}

fn file_name(number: u32) -> [u8; 11] {
    let mut name = *b"F0000000BIN";
    name[1..8].copy_from_slice(format!("{:07}", number % 10_000_000).as_bytes());
    name
}

/// Section 6.
fn directory_entry(name: &[u8; 11], attributes: u8, cluster: u32, len: u32) -> [u8; 32] {
    let mut entry = [0; 32];
    let cluster = cluster.to_le_bytes();
    entry[..11].copy_from_slice(name);
    entry[11] = attributes;
    entry[16..18].copy_from_slice(&DATE.to_le_bytes());
    entry[18..20].copy_from_slice(&DATE.to_le_bytes());
    entry[20..22].copy_from_slice(&cluster[2..]);
    entry[24..26].copy_from_slice(&DATE.to_le_bytes());
    entry[26..28].copy_from_slice(&cluster[..2]);
    entry[28..].copy_from_slice(&len.to_le_bytes());
    entry
}

/// Sections 3.1 to 3.3.
fn boot_sector(layout: &Layout) -> io::Result<[u8; 512]> {
    let sectors = |n: u64| {
        u32::try_from(n)
            .map(u32::to_le_bytes)
            .map_err(io::Error::other)
    };
    let mut boot = [0; 512];
    boot[..3].copy_from_slice(&[0xeb, 0x58, 0x90]);
    boot[3..11].copy_from_slice(b"MSWIN4.1");
    boot[11..13].copy_from_slice(&512_u16.to_le_bytes());
    boot[13] = u8::try_from(layout.cluster_bytes / SECTOR_BYTES).map_err(io::Error::other)?;
    boot[14..16].copy_from_slice(&sectors(RESERVED_SECTORS)?[..2]);
    boot[16] = 2; // FATs
    boot[21] = 0xf8; // a fixed disk
    boot[24..26].copy_from_slice(&63_u16.to_le_bytes()); // geometry for old BIOSes
    boot[26..28].copy_from_slice(&255_u16.to_le_bytes());
    boot[32..36].copy_from_slice(&sectors(layout.total_sectors)?);
    boot[36..40].copy_from_slice(&sectors(layout.fat_sectors)?);
    boot[44..48].copy_from_slice(&FIRST_CLUSTER.to_le_bytes()); // the root directory
    boot[48] = 1; // the information sector
    boot[50] = 6; // the second boot sector
    boot[64] = 0x80;
    boot[66] = 0x29;
    boot[67..71].copy_from_slice(b"HKSH");
    boot[71..82].copy_from_slice(b"HIKKOSHI   ");
    boot[82..90].copy_from_slice(b"FAT32   ");
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    Ok(boot)
}

/// Section 5.
fn information_sector(free: u64, next_free: usize) -> io::Result<[u8; 512]> {
    let free = u32::try_from(free).map_err(io::Error::other)?;
    let next_free = u32::try_from(next_free).map_err(io::Error::other)?;
    let mut sector = [0; 512];
    sector[..4].copy_from_slice(b"RRaA");
    sector[484..488].copy_from_slice(b"rrAa");
    sector[488..492].copy_from_slice(&free.to_le_bytes());
    sector[492..496].copy_from_slice(&next_free.to_le_bytes());
    sector[508..].copy_from_slice(&[0, 0, 0x55, 0xaa]);
    Ok(sector)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads files back by following the table and the root directory.
    #[test]
    fn files_are_where_the_tables_say() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        let size = 300 << 20;
        File::create(&image).unwrap().set_len(size).unwrap();
        let lens = [10_000, 1, 4096, 4097, 100_000];
        let mut entries = Vec::new();
        for (n, len) in lens.into_iter().enumerate() {
            let path = dir.path().join(n.to_string());
            std::fs::write(&path, vec![u8::try_from(n).unwrap() + 1; len]).unwrap();
            let len = u64::try_from(len).unwrap();
            entries.push(Entry { path, len });
        }
        write(&image, size, &mut entries).unwrap();
        let bytes = std::fs::read(&image).unwrap();
        let layout = Layout::of(size);
        assert_eq!(layout.data_offset(2) % 4096, 0);
        let number = |at: usize, len: usize| {
            let mut wide = [0; 8];
            wide[..len].copy_from_slice(&bytes[at..at + len]);
            usize::try_from(u64::from_le_bytes(wide)).unwrap()
        };
        let offset = |cluster: usize| {
            usize::try_from(layout.data_offset(u32::try_from(cluster).unwrap())).unwrap()
        };
        let fat = number(14, 2) * 512;
        for (n, len) in lens.into_iter().enumerate() {
            let entry = offset(number(44, 4)) + 32 * (n + 1);
            assert_eq!(number(entry + 28, 4), len);
            let mut cluster = number(entry + 26, 2) | number(entry + 20, 2) << 16;
            let mut content: Vec<u8> = Vec::new();
            while cluster < 0x0fff_fff8 {
                content.extend(&bytes[offset(cluster)..offset(cluster) + 4096]);
                cluster = number(fat + 4 * cluster, 4);
            }
            content.truncate(len);
            assert!(
                content == vec![u8::try_from(n).unwrap() + 1; len],
                "file {n}"
            );
        }
    }
}
