//! The demo's disk: a real file system with real content from the machine it runs on.
//!
//! In it is one file that the guest rewrites (a database, say). Its blocks bear a mark, so they
//! are found in the image whatever the file system; the guest writes only there, and the file
//! system stays sound.

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::fat;
use super::random::Random;

/// The smallest disk; FAT32 cannot be much smaller.
pub const MIN_DISK_BYTES: u64 = 300 << 20;

/// The largest disk: the comparison at the end reads all of it.
pub const MAX_DISK_BYTES: u64 = 1 << 40;

/// Bytes of content, the database included, as long as they fit the disk.
const CONTENT_BYTES: u64 = 300 << 20;

/// Bytes of the database.
const DATABASE_BYTES: u64 = 32 << 20;

/// Most files that are copied.
const MAX_FILES: usize = 20_000;

/// Larger files are left out, so that there are many.
const MAX_FILE_BYTES: u64 = 32 << 20;

/// Directories that are looked into, at most.
const MAX_DIRECTORIES: usize = 20_000;

/// Where content is taken from; each gives the same share.
const ORIGINS: [&str; 3] = ["/usr/bin", "/usr/lib", "/usr/share"];

/// The unit in which the guest writes and marks are looked for.
pub const BLOCK_BYTES: u64 = 4096;

/// The name of the database in the file system (8.3, for FAT).
const DATABASE_NAME: &str = "GUEST.DB";

/// The disk, before it moves.
#[derive(Debug)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// What was made, for people.
    pub file_system: String,
    /// Bytes of content.
    pub content_bytes: u64,
    /// Offsets of the database's blocks, ascending.
    pub database: Vec<u64>,
    /// Runs of other data, (offset, length), in whole blocks, ascending.
    pub fixed: Vec<(u64, u64)>,
}

/// A file for the disk.
#[derive(Debug)]
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// How long it was when it was found.
    pub len: u64,
}

/// Makes the disk at `path`; `work` is for what is needed meanwhile.
///
/// # Errors
/// No space, or a tool fails.
pub fn build(path: &Path, size_bytes: u64, work: &Path) -> anyhow::Result<Disk> {
    ensure!(
        (MIN_DISK_BYTES..=MAX_DISK_BYTES).contains(&size_bytes)
            && size_bytes.is_multiple_of(BLOCK_BYTES),
        "--size must be from 300MiB to 1T, in whole blocks of 4 KiB"
    );
    let content = CONTENT_BYTES.min(size_bytes / 2);
    for place in [work, path.parent().unwrap_or(work)] {
        // The content once staged, then at both sites and in the oracle.
        check_space(place, 4 * content)?;
    }
    let stage = work.join("content");
    std::fs::create_dir(&stage).context("creating a directory for the content")?;
    let mut entries = choose_files(content - DATABASE_BYTES);
    let mark = write_database(&stage.join(DATABASE_NAME)).context("writing the database")?;
    File::create_new(path)
        .and_then(|file| file.set_len(size_bytes))
        .with_context(|| format!("creating {}", path.display()))?;
    let file_system = match find_tool("mke2fs") {
        Some(mke2fs) => {
            stage_files(&stage, &mut entries)?;
            make_ext4(&mke2fs, path, &stage)?;
            "ext4"
        }
        None => {
            let database = Entry {
                path: stage.join(DATABASE_NAME),
                len: DATABASE_BYTES,
            };
            entries.insert(0, database);
            fat::write(path, size_bytes, &mut entries).context("writing a FAT32 file system")?;
            "FAT32 (there is no mke2fs here)"
        }
    };
    std::fs::remove_dir_all(&stage).context("removing the staged content")?;
    let copied: u64 = entries
        .iter()
        .filter(|entry| !entry.path.starts_with(&stage))
        .map(|entry| entry.len)
        .sum();
    let (database, fixed) = survey(path, size_bytes, &mark)?;
    ensure!(
        u64::try_from(database.len())? == DATABASE_BYTES / BLOCK_BYTES && !fixed.is_empty(),
        "the database's blocks were not found in the image"
    );
    Ok(Disk {
        path: path.into(),
        size_bytes,
        file_system: file_system.into(),
        content_bytes: copied + DATABASE_BYTES,
        database,
        fixed,
    })
}

/// Whether the file system on the image is sound; `None` when there is no tool that could say.
pub fn check_file_system(disk: &Disk, image: &Path) -> Option<bool> {
    if !disk.file_system.starts_with("ext4") {
        return None;
    }
    let e2fsck = find_tool("e2fsck")?;
    let status = Command::new(e2fsck)
        .args(["-f", "-n"])
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .ok()?;
    Some(status.success())
}

fn check_space(place: &Path, needed: u64) -> anyhow::Result<()> {
    let stat = rustix::fs::statvfs(place)
        .with_context(|| format!("looking at the space in {}", place.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    ensure!(
        free >= needed,
        "the demo needs {} in {}, and there are {}; set TMPDIR, or use --keep DIR, to a place \
         with more",
        crate::quantity::show_size(needed),
        place.display(),
        crate::quantity::show_size(free)
    );
    Ok(())
}

/// The tool's path. `sbin` is often not in a user's PATH.
fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|tool| tool.is_file())
}

/// Files of this machine of about `budget` bytes, the same ones in every run.
fn choose_files(budget: u64) -> Vec<Entry> {
    let mut chosen = Vec::new();
    for origin in ORIGINS {
        let mut left = budget / 3;
        let mut directories = vec![PathBuf::from(origin)];
        let mut seen = 0;
        while let Some(dir) = directories.pop() {
            seen += 1;
            if seen > MAX_DIRECTORIES || chosen.len() >= MAX_FILES || left < BLOCK_BYTES {
                break;
            }
            let Ok(entries) = std::fs::read_dir(&dir) else {
                continue;
            };
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            for path in paths {
                let Ok(meta) = std::fs::symlink_metadata(&path) else {
                    continue;
                };
                if meta.is_dir() {
                    directories.push(path);
                    continue;
                }
                let room = meta.len().next_multiple_of(BLOCK_BYTES);
                let fits = (1..=MAX_FILE_BYTES).contains(&meta.len()) && room <= left;
                if meta.is_file() && fits && chosen.len() < MAX_FILES {
                    left -= room;
                    let len = meta.len();
                    chosen.push(Entry { path, len });
                }
            }
        }
    }
    chosen
}

/// Copies the files below `stage`, under their own paths; what cannot be read is left out.
fn stage_files(stage: &Path, entries: &mut Vec<Entry>) -> anyhow::Result<()> {
    let mut staged = Vec::with_capacity(entries.len());
    for entry in entries.drain(..) {
        let relative = entry.path.strip_prefix("/").unwrap_or(&entry.path);
        let to = stage.join(relative);
        if let Some(dir) = to.parent() {
            std::fs::create_dir_all(dir).context("staging the content")?;
        }
        let Ok(from) = File::open(&entry.path) else {
            continue;
        };
        let mut file = File::create(&to).context("staging the content")?;
        // A file that grows meanwhile must not break the budget.
        let len = io::copy(&mut from.take(entry.len), &mut file).context("staging the content")?;
        staged.push(Entry {
            path: entry.path,
            len,
        });
    }
    *entries = staged;
    Ok(())
}

/// Writes the database: every block begins with the mark that is returned.
fn write_database(path: &Path) -> io::Result<[u8; 16]> {
    let mut random = Random::seeded(u64::from(std::process::id()));
    let mut mark = *b"hikkoshi--------";
    random.fill(&mut mark[8..]);
    let mut file = io::BufWriter::new(File::create_new(path)?);
    let mut block = [0; 4096];
    for _ in 0..DATABASE_BYTES / BLOCK_BYTES {
        random.fill(&mut block);
        block[..16].copy_from_slice(&mark);
        file.write_all(&block)?;
    }
    file.flush()?;
    Ok(mark)
}

fn make_ext4(mke2fs: &Path, image: &Path, stage: &Path) -> anyhow::Result<()> {
    let output = Command::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-d"])
        .args([stage, image])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", mke2fs.display()))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}",
            mke2fs.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// The offsets of the database's blocks, and the runs (offset, length) of all other data.
type Survey = (Vec<u64>, Vec<(u64, u64)>);

/// Finds the database's blocks, and all other data.
fn survey(path: &Path, size_bytes: u64, mark: &[u8; 16]) -> anyhow::Result<Survey> {
    let file = File::open(path).context("opening the image")?;
    let mut database = Vec::new();
    let mut fixed: Vec<(u64, u64)> = Vec::new();
    let mut chunk = vec![0; 1 << 20];
    let mut at = 0;
    while let Some((start, end)) = next_data(&file, at, size_bytes)? {
        let mut offset = start / BLOCK_BYTES * BLOCK_BYTES;
        let end = end.next_multiple_of(BLOCK_BYTES).min(size_bytes);
        while offset < end {
            let len = usize::try_from(end - offset)?.min(chunk.len());
            file.read_exact_at(&mut chunk[..len], offset)
                .context("reading the image")?;
            for block in chunk[..len].chunks(4096) {
                if block.starts_with(mark) {
                    database.push(offset);
                } else {
                    match fixed.last_mut() {
                        Some((start, run)) if *start + *run == offset => *run += BLOCK_BYTES,
                        _ => fixed.push((offset, BLOCK_BYTES)),
                    }
                }
                offset += BLOCK_BYTES;
            }
        }
        at = end;
    }
    Ok((database, fixed))
}

/// The next run of data at or after `at`.
pub fn next_data(file: &File, at: u64, size_bytes: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= size_bytes {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_of_wrong_size_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for size in [0, 1 << 20, (1 << 30) + 512, 2 << 40] {
            assert!(build(&dir.path().join("a"), size, dir.path()).is_err());
        }
    }

    #[test]
    fn the_database_is_found_block_by_block() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        let disk = build(&image, MIN_DISK_BYTES, dir.path()).unwrap();
        assert!(disk.database.is_sorted() && disk.fixed.is_sorted());
        for &(start, len) in &disk.fixed {
            let at = disk.database.partition_point(|&offset| offset < start);
            assert!(
                disk.database
                    .get(at)
                    .is_none_or(|&offset| offset >= start + len)
            );
        }
        assert_ne!(check_file_system(&disk, &image), Some(false));
    }
}
