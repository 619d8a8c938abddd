//! The programs that the tests drive, and the Debian packages that bring them.
//!
//! Owns the list, so that a missing program is reported the same way everywhere and whoever
//! prepares a machine can install all of it at once ([`all`]). Installs nothing itself.

use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Each program and the package that holds it.
const TOOLS: &[(&str, &str)] = &[
    ("apt-cache", "apt"),
    ("apt-get", "apt"),
    ("busybox", "busybox-static"),
    ("chrt", "util-linux"),
    ("cp", "coreutils"),
    ("debugfs", "e2fsprogs"),
    ("dpkg", "dpkg"),
    ("e2fsck", "e2fsprogs"),
    ("env", "coreutils"),
    ("find", "findutils"),
    ("ip", "iproute2"),
    ("iperf3", "iperf3"),
    ("ldd", "libc-bin"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mount", "mount"),
    ("nbd-client", "nbd-client"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("qemu-img", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("setpriv", "util-linux"),
    ("strace", "strace"),
    ("umount", "mount"),
];

/// Packages without a program of their own: the C library to link guests against statically.
const LIBRARIES: &[&str] = &["libc6-dev"];

/// Where programs are looked for when `PATH` lacks the administrator's directories.
const SYSTEM_DIRECTORIES: &[&str] = &["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// All Debian packages that the tests need, in alphabetical order.
pub fn all() -> Vec<&'static str> {
    let tools = TOOLS.iter().map(|(_, package)| *package);
    let set: BTreeSet<_> = tools.chain(LIBRARIES.iter().copied()).collect();
    set.into_iter().collect()
}

/// The packages of [`all`] whose programs are not there.
pub fn missing() -> Vec<&'static str> {
    let absent = TOOLS.iter().filter(|(tool, _)| find(tool).is_none());
    let set: BTreeSet<_> = absent.map(|(_, package)| *package).collect();
    set.into_iter().collect()
}

/// Where `tool` is.
///
/// # Errors
/// It is not installed; the message names the package to install.
pub fn require(tool: &str) -> Result<PathBuf> {
    if let Some(path) = find(tool) {
        return Ok(path);
    }
    match TOOLS.iter().find(|(name, _)| *name == tool) {
        Some((_, package)) => bail!("{tool} is not installed: run `apt-get install {package}`"),
        None => bail!("{tool} is not installed, and no package is known that brings it"),
    }
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from))
        .map(|dir| dir.join(tool))
        .find(|candidate| is_program(candidate))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        assert!(require("cp").is_ok());
        let error = require("no-such-program").unwrap_err().to_string();
        assert!(error.contains("no-such-program"), "{error}");
        assert!(all().contains(&"nbdkit"));
    }
}
