//! The disks that move.
//!
//! Owns making them, once, below cargo's target directory: an ext4 file system with this machine's
//! own files and one incompressible file; a disk of noise; and the disk that the recorded traces
//! belong to. And where a disk has data.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::{cache, packages, pattern, process};
use rustix::fs::{SeekFrom, seek};

use crate::client::Random;
use crate::trace::DiskMap;

/// Where the files on the disk come from, in this order, each in alphabetical order, until there is
/// enough.
const CONTENT: &[&str] = &["/usr/bin", "/usr/sbin", "/usr/share", "/usr/lib"];
/// Three eighths of the disk are files, one eighth is noise: 1.5 and 0.5 GiB of 4 GiB.
const FILES_EIGHTHS: u64 = 3;
/// Raise this when what is built changes.
const FORMAT: &str = "1";
const NOISE_SEED: u64 = 0x006e_6f69_7365;
const MIB: u64 = 1 << 20;

/// A disk image, never written.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The raw image.
    pub path: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Ranges with data: first byte and length.
    pub extents: Vec<(u64, u64)>,
}

impl Disk {
    fn at(path: PathBuf) -> Result<Self> {
        let file = File::open(&path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self {
            extents: extents(&file, size_bytes)?,
            path,
            size_bytes,
        })
    }

    /// The disk with a file system, of this size.
    pub fn files(mib: u64) -> Result<Self> {
        let path = cache::entry(&format!("wan-files-{mib}-{FORMAT}.img"), |path| {
            build_files(mib, path)
        })?;
        Self::at(path)
    }

    /// A disk of this size that cannot be compressed.
    pub fn noise(mib: u64) -> Result<Self> {
        let path = cache::entry(&format!("wan-noise-{mib}-{FORMAT}.img"), |path| {
            write_noise(path, mib)
        })?;
        Self::at(path)
    }

    /// The disk of the traces.
    pub fn traced(map: &DiskMap) -> Result<Self> {
        let key = cache::key(&[FORMAT, &format!("{map:?}")]);
        let path = cache::entry(&format!("wan-traced-{key}.img"), |path| map.fill(path))?;
        Self::at(path)
    }

    /// Bytes of data on it.
    pub fn data_bytes(&self) -> u64 {
        self.extents.iter().map(|(_, length)| length).sum()
    }

    /// A place of 4 KiB that has data.
    pub fn random_block(&self, random: &mut Random) -> u64 {
        let mut at = random.next() % (self.data_bytes() / 4096).max(1) * 4096;
        for &(start, length) in &self.extents {
            if at < length {
                return (start + at) / 4096 * 4096;
            }
            at -= length;
        }
        0
    }
}

/// Where `file` has data.
fn extents(file: &File, size_bytes: u64) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size_bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error).context("look for data"),
        };
        at = seek(file, SeekFrom::Hole(start)).context("look for holes")?;
        found.push((start, at - start));
    }
    ensure!(!found.is_empty(), "the disk is empty");
    Ok(found)
}

/// Bytes that the file system has allocated for a file, as a measure of how much has arrived in it.
pub fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

fn write_noise(path: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut chunk = vec![0; 1 << 20];
    for number in 0..mib {
        pattern::fill(NOISE_SEED + number, &mut chunk);
        file.write_all(&chunk)?;
    }
    Ok(())
}

fn build_files(mib: u64, to: &Path) -> Result<()> {
    eprintln!("… making a disk of {mib} MiB, once");
    let budget = mib * MIB / 8 * FILES_EIGHTHS;
    // On the same file system as the disk: what is on it too is linked and not copied.
    let parent = to.parent().context("the disk has a directory")?;
    let tree = tempfile::tempdir_in(parent)?;
    let mut left = budget;
    for from in CONTENT {
        gather(Path::new(from), tree.path(), &mut left)?;
    }
    ensure!(
        left < budget / 4,
        "this machine has too few files below {CONTENT:?} for a disk of {mib} MiB"
    );
    write_noise(&tree.path().join("noise"), mib / 8)?;
    let file = File::create(to)?;
    file.set_len(mib * MIB)?;
    let mut command = Command::new(packages::require("mkfs.ext4")?);
    command.args(["-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1"]);
    command.arg("-d").arg(tree.path()).arg(to);
    process::output(&mut command).map(drop)
}

/// Puts plain files below `from` to the same paths below `tree`, while `left` bytes last.
fn gather(from: &Path, tree: &Path, left: &mut u64) -> Result<()> {
    let mut directories = vec![from.to_path_buf()];
    while let Some(directory) = directories.pop() {
        let mut entries = fs::read_dir(&directory)?.collect::<std::io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        let inside = tree.join(directory.strip_prefix("/")?);
        fs::create_dir_all(&inside)?;
        for entry in entries {
            let meta = entry.metadata()?;
            if meta.is_dir() {
                directories.push(entry.path());
            } else if meta.is_file() {
                let Some(rest) = left.checked_sub(meta.len()) else {
                    return Ok(());
                };
                *left = rest;
                let target = inside.join(entry.file_name());
                if fs::hard_link(entry.path(), &target).is_err() {
                    fs::copy(entry.path(), &target)
                        .with_context(|| format!("copy {}", entry.path().display()))?;
                }
            }
        }
    }
    Ok(())
}

/// Whether all data of `disk` is in `file`, but for a rest that allocation cannot tell.
pub fn arrived_fully(file: &Path, disk: &Disk) -> bool {
    allocated_bytes(file) >= disk.data_bytes()
}
