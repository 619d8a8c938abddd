//! The Debian packages that the tests need: installed when we are root, named when we are not.
//!
//! Nothing here edits the system's configuration of its package manager.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A package, and why the tests cannot do without it.
#[derive(Debug, PartialEq, Eq)]
pub struct Package {
    /// Its name in Debian 12 and later.
    pub name: &'static str,
    /// A program in it, by which it is recognised where there is no dpkg.
    pub program: &'static str,
    /// What uses it.
    pub purpose: &'static str,
}

const fn package(name: &'static str, program: &'static str, purpose: &'static str) -> Package {
    Package {
        name,
        program,
        purpose,
    }
}

/// Everything that the steps `test`, `fuzz`, `e2e` and `interop` use.
pub const PACKAGES: &[Package] = &[
    package(
        "nbdkit",
        "nbdkit",
        "a source that is not ours; the peer in calibrations",
    ),
    package(
        "qemu-utils",
        "qemu-nbd",
        "qemu-nbd as a source; qemu-img and qemu-io as clients",
    ),
    package(
        "qemu-system-x86",
        "qemu-system-x86_64",
        "the virtual machine whose disk moves",
    ),
    package(
        "libnbd-bin",
        "nbdcopy",
        "nbdinfo, nbdcopy and nbddump as clients",
    ),
    package(
        "python3-libnbd",
        "nbdsh",
        "scripted requests, flags and errors",
    ),
    package("python3", "python3", "the interop scripts"),
    package("fio", "fio", "random I/O with verification"),
    package(
        "nbd-client",
        "nbd-client",
        "the kernel's client, inside the guest",
    ),
    package(
        "nbd-server",
        "nbd-server",
        "a source with simple replies only",
    ),
    package(
        "iperf3",
        "iperf3",
        "what a link can carry, in the test of `bench wan`",
    ),
    package("busybox-static", "busybox", "the guest's userland"),
    package(
        "e2fsprogs",
        "mkfs.ext4",
        "the guest's file system, and its check",
    ),
    package("xfsprogs", "mkfs.xfs", "the crash sweep on XFS"),
    package("btrfs-progs", "mkfs.btrfs", "the crash sweep on btrfs"),
    package("iproute2", "ip", "network namespaces for the two sites"),
    package("mount", "mount", "small file systems that become full"),
    package(
        "strace",
        "strace",
        "makes system calls of a running daemon fail; records them for power cuts",
    ),
    package("cpio", "cpio", "the guest's initial RAM disk"),
    package("xz-utils", "xz", "unpacks kernel modules and sources"),
    package("gcc", "gcc", "builds the suites of libnbd and nbd"),
    package("g++", "g++", "builds the fuzzer"),
    package("make", "make", "builds the suites of libnbd and nbd"),
    package("libc6-dev", "gcc", "builds the suites of libnbd and nbd"),
    package(
        "pkg-config",
        "pkg-config",
        "builds the suites of libnbd and nbd",
    ),
    package("libglib2.0-dev", "glib-mkenums", "builds nbd-tester-client"),
    package("dpkg-dev", "dpkg-source", "unpacks the suites' sources"),
];

/// The packages of `wanted` that are not installed.
///
/// # Errors
/// `dpkg-query` exists but cannot be run.
pub fn missing(wanted: &'static [Package]) -> Result<Vec<&'static Package>> {
    let has_dpkg = on_path("dpkg-query");
    let mut missing = Vec::new();
    for package in wanted {
        let present = if has_dpkg {
            is_installed(package.name)?
        } else {
            on_path(package.program)
        };
        if !present {
            missing.push(package);
        }
    }
    Ok(missing)
}

/// Sees to it that `wanted` is installed.
///
/// # Errors
/// Something is missing, and we may not install it (not root, no apt-get, or `install` is false),
/// or the installation failed. The error names the packages and the command that installs them.
pub fn ensure(wanted: &'static [Package], install: bool) -> Result<()> {
    let lacking = missing(wanted)?;
    if lacking.is_empty() {
        if install && is_root()? && !knows_the_kernel() {
            apt_get(&["update"])?;
        }
        return Ok(());
    }
    let names: Vec<&str> = lacking.iter().map(|package| package.name).collect();
    let command = format!(
        "apt-get install --no-install-recommends {}",
        names.join(" ")
    );
    if !install || !is_root()? || !on_path("apt-get") {
        let reasons: Vec<String> = lacking
            .iter()
            .map(|p| format!("  {:<18} {}", p.name, p.purpose))
            .collect();
        bail!(
            "these Debian packages are missing:\n{}\ninstall them as root, then try again:\n  {command}",
            reasons.join("\n")
        );
    }
    apt_get(&["update"])?;
    apt_install(&names)?;
    // One of them may have driven out another, which was there in a version that it cannot be beside.
    let driven_out: Vec<&str> = missing(wanted)?.iter().map(|p| p.name).collect();
    if driven_out.is_empty() {
        return Ok(());
    }
    apt_install(&driven_out)?;
    let still: Vec<&str> = missing(wanted)?.iter().map(|p| p.name).collect();
    if !still.is_empty() {
        bail!(
            "these Debian packages cannot be installed beside the others: {}",
            still.join(" ")
        );
    }
    Ok(())
}

fn apt_install(names: &[&str]) -> Result<()> {
    println!(
        "installing {} Debian packages: {}",
        names.len(),
        names.join(" ")
    );
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(names);
    apt_get(&arguments)
}

/// Whether the package manager has an index: the end-to-end tests download a kernel, which is
/// never installed.
fn knows_the_kernel() -> bool {
    let look = Command::new("apt-cache")
        .args(["show", "linux-image-cloud-amd64"])
        .stdin(Stdio::null())
        .output();
    look.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .arg("--quiet=2")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .status()
        .context("cannot run apt-get")?;
    if !status.success() {
        bail!("`apt-get {}` failed with {status}", arguments.join(" "));
    }
    Ok(())
}

fn is_installed(name: &str) -> Result<bool> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}\n", name])
        .stdin(Stdio::null())
        .output()
        .context("cannot run dpkg-query")?;
    // A package of several architectures has a line for each.
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().any(|line| line == "installed"))
}

/// Whether we may install packages, mount, and make namespaces.
///
/// # Errors
/// `id` cannot be run.
pub fn is_root() -> Result<bool> {
    let output = Command::new("id")
        .arg("-u")
        .output()
        .context("cannot run id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Administrators' programs live where an ordinary user's PATH does not look.
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(|directory| Path::new(directory).to_path_buf()))
        .any(|directory| directory.join(program).is_file())
}
