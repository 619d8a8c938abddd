//! Where built things are kept between runs: below cargo's target directory.
//!
//! Owns finding that directory, making an entry once even when several tests want it at the same
//! moment, and finding the `hikkoshi` binary. An entry's name must contain a hash of all that it
//! was made from; entries are never changed.

use crate::pattern::Checksum;
use crate::{packages, process};
use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Cargo's target directory: the one above the running test that has cargo's marker.
///
/// # Errors
/// The running program was not built by cargo.
pub fn target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find the running program")?;
    match program
        .ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").exists())
    {
        Some(dir) => Ok(dir.to_path_buf()),
        None => bail!(
            "{} is not below a target directory of cargo's",
            program.display()
        ),
    }
}

/// The cached file or directory `name`; `build` makes it, at the path it is given, if it is not
/// there yet.
///
/// # Errors
/// `build` failed, or the file system did.
pub fn entry(name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let dir = target_dir()?.join("testkit");
    fs::create_dir_all(&dir)?;
    let path = dir.join(name);
    let lock = File::create(dir.join(format!("{name}.lock")))?;
    flock(&lock, FlockOperation::LockExclusive).context("lock the cache")?;
    if !path.exists() {
        let partial = dir.join(format!("{name}.partial"));
        remove(&partial)?;
        build(&partial).with_context(|| format!("build {}", path.display()))?;
        fs::rename(&partial, &path)?;
    }
    Ok(path)
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path)?,
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    Ok(())
}

/// A short hash of `parts`, for the name of an entry.
pub fn key(parts: &[&str]) -> String {
    format!("{:016x}", Checksum::of(parts.join("\0").as_bytes()))
}

/// The `hikkoshi` program: what `HIKKOSHI_BIN` names, or else built from this workspace now.
///
/// # Errors
/// It does not build; the message has what cargo said.
pub fn hikkoshi() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("HIKKOSHI_BIN") {
        return Ok(path.into());
    }
    let target = target_dir()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build
        .args([
            "build",
            "--quiet",
            "--profile",
            "test",
            "--package",
            "hikkoshi",
        ])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    process::output(&mut build).context("build hikkoshi")?;
    Ok(target.join("debug/hikkoshi"))
}

/// The `hikkoshi` program with crash points, built from this workspace now: beside the release,
/// never in its place. Or what `HIKKOSHI_ARMED_BIN` names.
///
/// # Errors
/// It does not build; the message has what cargo said.
pub fn armed_hikkoshi() -> Result<PathBuf> {
    static BUILT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    if let Some(path) = std::env::var_os("HIKKOSHI_ARMED_BIN") {
        return Ok(path.into());
    }
    if let Some(path) = BUILT.get() {
        return Ok(path.clone());
    }
    let target = target_dir()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build
        .args(["build", "--quiet", "--profile", "crash"])
        .args(["--package", "hikkoshi", "--features", "crash-points"])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    process::output(&mut build).context("build hikkoshi with crash points")?;
    Ok(BUILT.get_or_init(|| target.join("crash/hikkoshi")).clone())
}

/// Copies `image` to `to`, holes kept.
///
/// # Errors
/// The copy failed.
pub fn copy_image(image: &Path, to: &Path) -> Result<()> {
    let mut command = Command::new(packages::require("cp")?);
    command
        .args(["--sparse=always", "--reflink=auto"])
        .arg(image)
        .arg(to);
    process::output(&mut command).map(drop)
}

/// A directory for one test, removed when dropped unless `HIKKOSHI_TEST_KEEP` is set. Not below
/// the target directory, whose path may be too long for a Unix socket.
///
/// # Errors
/// It cannot be made.
pub fn scratch() -> Result<tempfile::TempDir> {
    let keep = std::env::var_os("HIKKOSHI_TEST_KEEP").is_some();
    let dir = tempfile::Builder::new()
        .prefix("hikkoshi-")
        .disable_cleanup(keep)
        .tempdir()?;
    if keep {
        eprintln!("kept: {}", dir.path().display());
    }
    Ok(dir)
}
