//! The guest: a kernel, an initramfs, and a disk with a root file system.
//!
//! Owns building them, once for each version of what they are made from. The kernel is Debian's
//! for cloud machines, unpacked and not installed. The root file system has real content, copied
//! from the machine that builds it, so that moving it is real work; /content.list has each file's
//! checksum. What runs inside is `testkit/guest/`.

use crate::cache;
use crate::packages;
use crate::pattern::Checksum;
use crate::process;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";
/// In the order in which they can be loaded.
const MODULES: &[&str] = &[
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "nbd",
];
/// Where the content of the root file system comes from.
const CONTENT_DIRECTORIES: &[&str] = &["/usr/bin", "/usr/sbin", "/usr/share"];
/// How much content: some seconds' worth on a line of 400 Mbit/s.
const CONTENT_BYTES: u64 = 288 << 20;
/// Smaller files are left out, for there are so many of them, and larger ones, for variety.
const CONTENT_FILE_BYTES: std::ops::RangeInclusive<u64> = (8 << 10)..=(6 << 20);
/// The disk's size: half of it stays empty, so that holes are part of the move.
const DISK_BYTES: u64 = 640 << 20;
/// Programs that the guest runs, with the libraries that they are linked against.
const GUEST_PROGRAMS: &[&str] = &["cp", "e2fsck", "nbd-client"];
const WORKLOAD_SOURCE: &str = include_str!("../guest/workload.rs");
const PATTERN_SOURCE: &str = include_str!("../guest/pattern.rs");
const INITRAMFS_INIT: &str = include_str!("../guest/initramfs-init.sh");
const GUEST_INIT: &str = include_str!("../guest/guest-init.sh");
/// Raise this when the code below changes what is built.
const FORMAT: &str = "2";

/// Everything that a guest boots from.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The disk, to be copied and never written: an ext4 root file system without partitions.
    pub disk: PathBuf,
    /// A directory tree with the disk's original content, below the same paths.
    pub tree: PathBuf,
}

impl Guest {
    /// Finds or builds all of it. The first time takes some ten seconds and downloads the kernel.
    ///
    /// # Errors
    /// A tool is missing (named with its package), or something could not be built.
    pub fn build() -> Result<Self> {
        let workload = workload()?;
        let (version, kernel_tree) = kernel()?;
        let key = cache::key(&[FORMAT, &version, INITRAMFS_INIT]);
        let initramfs = cache::entry(&format!("initramfs-{key}.cpio"), |path| {
            build_initramfs(&kernel_tree, &version, path)
        })?;
        let key = cache::key(&[FORMAT, WORKLOAD_SOURCE, PATTERN_SOURCE, GUEST_INIT]);
        let tree = cache::entry(&format!("rootfs-{key}"), |path| build_tree(&workload, path))?;
        let disk = cache::entry(&format!("rootfs-{key}.img"), |path| build_disk(&tree, path))?;
        let kernel = kernel_tree.join(format!("boot/vmlinuz-{version}"));
        Ok(Self {
            kernel,
            initramfs,
            disk,
            tree,
        })
    }
}

/// Compiles the workload without any library that the guest would need.
fn workload() -> Result<PathBuf> {
    let key = cache::key(&[WORKLOAD_SOURCE, PATTERN_SOURCE]);
    cache::entry(&format!("workload-{key}"), |path| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/workload.rs");
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let mut command = Command::new(rustc);
        command.args(["--edition", "2024", "-O", "-C", "strip=symbols"]);
        command
            .args(["-C", "target-feature=+crt-static", "-o"])
            .arg(path)
            .arg(source);
        process::output(&mut command)
            .context("compile the guest's workload (needs the package libc6-dev)")
            .map(drop)
    })
}

/// The newest version of the kernel that can be had, and its unpacked package.
fn kernel() -> Result<(String, PathBuf)> {
    if let Some(version) = installed_kernel() {
        return Ok((version, PathBuf::from("/")));
    }
    let dir = cache::target_dir()?.join("testkit");
    // A kernel that was unpacked before is good enough: the package index may be gone by now.
    let unpacked = fs::read_dir(&dir)
        .into_iter()
        .flatten()
        .flatten()
        .find_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix("kernel-")?;
            let complete = entry
                .path()
                .join(format!("boot/vmlinuz-{version}"))
                .exists();
            complete.then(|| (version.to_owned(), entry.path()))
        });
    if let Some(found) = unpacked {
        return Ok(found);
    }
    let package = kernel_package()?;
    let Some(version) = package.strip_prefix("linux-image-") else {
        bail!("{package} is not named like a kernel");
    };
    let tree = cache::entry(&format!("kernel-{version}"), |path| unpack(&package, path))?;
    Ok((version.to_owned(), tree))
}

fn installed_kernel() -> Option<String> {
    let mut versions: Vec<String> = fs::read_dir("/boot")
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix("vmlinuz-")?;
            let modules = Path::new("/lib/modules").join(version).join("kernel");
            (version.ends_with("-cloud-amd64") && modules.exists()).then(|| version.to_owned())
        })
        .collect();
    // By number: 6.1.0-9 is older than 6.1.0-56.
    let numbers = |version: &String| -> Vec<u64> {
        version
            .split(['.', '-'])
            .filter_map(|part| part.parse().ok())
            .collect()
    };
    versions.sort_by_key(numbers);
    versions.pop()
}

/// The package that the meta package stands for now.
fn kernel_package() -> Result<String> {
    let text = process::run("apt-cache", ["depends", KERNEL_META_PACKAGE]).with_context(|| {
        format!("look up {KERNEL_META_PACKAGE}: `apt-get update` may be needed")
    })?;
    let name = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
    match name {
        Some(version) => Ok(format!("linux-image-{version}")),
        None => bail!("{KERNEL_META_PACKAGE} is not known: `apt-get update` may be needed"),
    }
}

fn unpack(package: &str, to: &Path) -> Result<()> {
    let download = tempfile::tempdir()?;
    let mut get = Command::new(packages::require("apt-get")?);
    // The sandbox user may not write into a temporary directory of ours.
    get.args(["-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(&download);
    process::output(&mut get)?;
    let Some(archive) = fs::read_dir(&download)?.flatten().next() else {
        bail!("{package} was downloaded, but is not there");
    };
    let mut unpack = Command::new(packages::require("dpkg")?);
    unpack.arg("-x").arg(archive.path()).arg(to);
    process::output(&mut unpack).map(drop)
}

fn build_initramfs(kernel: &Path, version: &str, to: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    let root = work.path();
    for dir in ["bin", "modules", "etc"] {
        fs::create_dir_all(root.join(dir))?;
    }
    install(&packages::require("busybox")?, &root.join("bin/busybox"))?;
    install_with_libraries(root, &packages::require("nbd-client")?)?;
    write_script(&root.join("init"), INITRAMFS_INIT)?;
    let modules = kernel.join("lib/modules").join(version).join("kernel");
    let mut order = String::new();
    for name in MODULES {
        let file = find_file(&modules, &format!("{name}.ko"))?
            .with_context(|| format!("the kernel {version} has no module {name}"))?;
        install(&file, &root.join(format!("modules/{name}.ko")))?;
        writeln!(order, "{name}")?;
    }
    fs::write(root.join("modules/order"), order)?;
    let archive = fs::File::create(to)?;
    let mut find = Command::new("find")
        .arg(".")
        .current_dir(root)
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let names = find.stdout.take().context("find has no output")?;
    let mut cpio = Command::new(packages::require("busybox")?);
    cpio.args(["cpio", "-o", "-H", "newc"])
        .current_dir(root)
        .stdin(names)
        .stdout(archive);
    cpio.stderr(std::process::Stdio::null());
    let status = cpio.status()?;
    ensure!(
        status.success() && find.wait()?.success(),
        "cpio failed: {status}"
    );
    Ok(())
}

fn find_file(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find_file(&entry.path(), name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn install(from: &Path, to: &Path) -> Result<()> {
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    Ok(())
}

fn write_script(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Copies a program and all libraries that `ldd` says it needs, to the same paths below `root`.
fn install_with_libraries(root: &Path, program: &Path) -> Result<()> {
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    install(program, &below(program))?;
    for line in process::run("ldd", [program])?.lines() {
        // "name => /path (address)", or "/path (address)" for the loader itself.
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        if let Some(path) = path {
            install(Path::new(path), &below(Path::new(path)))?;
        }
    }
    Ok(())
}

fn build_tree(workload: &Path, root: &Path) -> Result<()> {
    for dir in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "work",
        "mnt",
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    for dir in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{dir}"), root.join(dir))?;
    }
    for program in GUEST_PROGRAMS {
        install_with_libraries(root, &packages::require(program)?)?;
    }
    install(
        &packages::require("busybox")?,
        &root.join("usr/bin/busybox"),
    )?;
    for applet in ["sh", "mount", "sync", "poweroff", "cat", "sleep"] {
        symlink("busybox", root.join("usr/bin").join(applet))?;
    }
    install(workload, &root.join("usr/sbin/workload"))?;
    write_script(&root.join("usr/sbin/guest-init"), GUEST_INIT)?;
    let mut content = BTreeSet::new();
    for dir in CONTENT_DIRECTORIES {
        collect(Path::new(dir), CONTENT_BYTES / 3, &mut content)?;
    }
    let mut list = String::new();
    for path in &content {
        let inside = Path::new("content").join(path.strip_prefix("/")?);
        let bytes = fs::read(path)?;
        let to = root.join(&inside);
        fs::create_dir_all(to.parent().context("a content file has a directory")?)?;
        fs::write(to, &bytes)?;
        writeln!(list, "{:x} {}", Checksum::of(&bytes), inside.display())?;
    }
    ensure!(
        content.len() > 100,
        "found only {} files to fill the disk with",
        content.len()
    );
    fs::write(root.join("content.list"), list)?;
    Ok(())
}

/// Adds plain files below `dir` in alphabetical order, up to `budget` bytes.
fn collect(dir: &Path, budget: u64, into: &mut BTreeSet<PathBuf>) -> Result<()> {
    let mut left = budget;
    let mut stack = vec![dir.to_path_buf()];
    while let Some(dir) = stack.pop() {
        let mut entries = fs::read_dir(&dir)?.collect::<std::io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let meta = entry.metadata()?;
            let path = entry.path();
            // The list has one path a line, separated from the checksum by a space.
            let plain = path
                .to_str()
                .is_some_and(|path| !path.contains(['\n', ' ']));
            if meta.is_dir() {
                stack.push(path);
            } else if meta.is_file() && plain && CONTENT_FILE_BYTES.contains(&meta.len()) {
                let Some(rest) = left.checked_sub(meta.len()) else {
                    return Ok(());
                };
                left = rest;
                into.insert(path);
            }
        }
    }
    Ok(())
}

fn build_disk(tree: &Path, to: &Path) -> Result<()> {
    let file = fs::File::create(to)?;
    file.set_len(DISK_BYTES)?;
    let mut command = Command::new(packages::require("mkfs.ext4")?);
    command.args(["-q", "-F", "-m", "0", "-L", "hikkoshi", "-E", "nodiscard"]);
    command.arg("-d").arg(tree).arg(to);
    process::output(&mut command).map(drop)
}
