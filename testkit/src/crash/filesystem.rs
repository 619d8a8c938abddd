//! File systems of our own, each in a file behind a loop device.
//!
//! Everything is mounted in a mount namespace of this process, so that nothing is left over,
//! however it ends.

use crate::process;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// The smallest that mkfs.xfs makes is 300 MiB. Sparse: little of it is ever used.
const IMAGE_BYTES: u64 = 512 << 20;

/// Where volumes are put.
#[derive(Debug)]
pub struct FileSystem {
    /// `tmpfs`, `ext4`, `xfs` or `btrfs`.
    pub name: &'static str,
    /// Its root.
    pub dir: PathBuf,
    mounted: bool,
}

/// All that are known, in the order in which they are used.
pub const NAMES: [&str; 4] = ["tmpfs", "ext4", "xfs", "btrfs"];

/// Gives this process, and the threads that it starts from here on, mounts of its own.
///
/// # Errors
/// Not root.
pub fn separate_mounts() -> Result<()> {
    // SAFETY: no thread runs yet that could rely on sharing its working directory and mounts
    // with this one; the caller says so by calling this first.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
        .context("a mount namespace needs root")?;
    process::run("mount", ["--make-rprivate", "/"]).map(drop)
}

impl FileSystem {
    /// Makes the one of this name below `root`, which is in memory.
    ///
    /// # Errors
    /// Its tools are missing, or it cannot be mounted.
    pub fn make(root: &Path, name: &str) -> Result<Self> {
        let Some(name) = NAMES.into_iter().find(|known| *known == name) else {
            bail!("no file system {name:?}; there are: {}", NAMES.join(" "));
        };
        let dir = root.join(name);
        fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
        let mut this = Self {
            name,
            dir,
            mounted: false,
        };
        let arguments: &[&str] = match name {
            "ext4" => &["-q", "-F"],
            "xfs" => &["-q"],
            "btrfs" => &["-q"],
            _ => return Ok(this),
        };
        let image = root.join(format!("{name}.fs"));
        fs::File::create(&image)?.set_len(IMAGE_BYTES)?;
        let image = image.display().to_string();
        let mkfs = format!("mkfs.{name}");
        process::run(&mkfs, arguments.iter().copied().chain([image.as_str()]))?;
        let target = this.dir.display().to_string();
        process::run("mount", ["-o", "loop", image.as_str(), target.as_str()])?;
        this.mounted = true;
        Ok(this)
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        if self.mounted {
            // The namespace ends with the process, and the mount with it.
            let dir = self.dir.display().to_string();
            let _ = process::run("umount", ["--lazy", dir.as_str()]);
        }
    }
}
