//! On real block devices and full file systems, which need root, loop devices and mounts. Run with
//! `cargo test -p hikkoshi-store -- --ignored`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::FileStore;
use crate::open::{OpenOptions, StoreError};
use crate::{Extent, ExtentKind, Store, ZeroMode, conformance};

/// A loop device, detached when dropped.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn attach(file: &Path, sector_bytes: u32) -> Self {
        let output = Command::new("losetup")
            .args([
                "--find",
                "--show",
                "--sector-size",
                &sector_bytes.to_string(),
            ])
            .arg(file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

fn image(directory: &Path, size: u64) -> PathBuf {
    let path = directory.join("backing");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// A store whose device has just the size that a test asked for.
struct OnLoop {
    store: FileStore,
    // After the store, so that the device is closed before it is detached.
    _device: LoopDevice,
}

impl Store for OnLoop {
    fn size_bytes(&self) -> u64 {
        self.store.size_bytes()
    }
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<bool> {
        self.store.try_read(offset, buf)
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.store.read(offset, buf)
    }
    fn submit_read(&self, offset: u64, len: usize, done: crate::ReadDone) {
        self.store.submit_read(offset, len, done);
    }
    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.store.write(offset, data)
    }
    fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> std::io::Result<()> {
        self.store.write_zeroes(offset, len, mode)
    }
    fn sync(&self) -> std::io::Result<()> {
        self.store.sync()
    }
    fn extents(&self, offset: u64, len: u64, max: usize) -> std::io::Result<Vec<Extent>> {
        self.store.extents(offset, len, max)
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn conforms_on_a_block_device() {
    for sector_bytes in [512, 4096] {
        let directory = tempfile::tempdir().unwrap();
        conformance::run(
            &|size| {
                // A device has whole sectors, also where the suite asks for half a one.
                let path = image(
                    directory.path(),
                    size.next_multiple_of(u64::from(sector_bytes)),
                );
                let device = LoopDevice::attach(&path, sector_bytes);
                let store = FileStore::open(&device.0, OpenOptions::default()).unwrap();
                assert!(store.is_block_device());
                Arc::new(OnLoop {
                    store,
                    _device: device,
                })
            },
            u64::from(sector_bytes),
            10,
        );
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn a_block_device_is_blank_until_written_and_may_be_larger_than_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), 64 << 20);
    let device = LoopDevice::attach(&path, 512);
    let wanted = |size| OpenOptions {
        create_with_size: Some(size),
        ..OpenOptions::default()
    };
    let error = FileStore::open(&device.0, wanted(128 << 20)).unwrap_err();
    assert!(matches!(error, StoreError::WrongSize { .. }));
    let store = FileStore::open(&device.0, wanted(10 << 20)).unwrap();
    assert_eq!(store.size_bytes(), 64 << 20);
    assert!(!store.is_new() && store.looks_blank().unwrap());
    assert_eq!(
        store.volume_tag().unwrap_err().kind(),
        std::io::ErrorKind::Unsupported
    );
    let all = Extent {
        offset: 0,
        len: 64 << 20,
        kind: ExtentKind::Data,
    };
    assert_eq!(store.extents(0, 64 << 20, 9).unwrap(), [all]);
    let busy = FileStore::open(&device.0, OpenOptions::default()).unwrap_err();
    assert!(
        matches!(
            busy,
            StoreError::DeviceBusy { .. } | StoreError::InUse { .. }
        ),
        "{busy}"
    );
    for offset in [0, (64 << 20) - 1] {
        store.write(offset, &[1]).unwrap();
        assert!(!store.looks_blank().unwrap());
        store.write_zeroes(offset, 1, ZeroMode::MayPunch).unwrap();
        assert!(store.looks_blank().unwrap());
    }
}

/// A tmpfs of its own, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(directory.path());
        assert!(mount.status().unwrap().success());
        Self(directory)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(self.0.path())
            .status();
    }
}

#[test]
#[ignore = "needs root and a mount"]
fn a_full_file_system_is_told_as_such_and_what_is_there_goes_on() {
    let mounted = Tmpfs::mount("size=1m");
    let options = OpenOptions {
        create_with_size: Some(8 << 20),
        ..OpenOptions::default()
    };
    let store = FileStore::open(mounted.0.path().join("image"), options).unwrap();
    store.write(0, &[1; 65_536]).unwrap();
    assert_eq!(
        store
            .write(1 << 20, &vec![2; 4 << 20])
            .unwrap_err()
            .raw_os_error(),
        Some(28)
    );
    // Tmpfs has no zero range, so allocating zeroes means writing them.
    let zeroes = store.write_zeroes(6 << 20, 2 << 20, ZeroMode::Allocate);
    assert_eq!(zeroes.unwrap_err().raw_os_error(), Some(28));
    store
        .write_zeroes(1 << 20, 7 << 20, ZeroMode::MayPunch)
        .unwrap();
    store.write(1 << 20, &[3; 65_536]).unwrap();
    let mut buf = [0; 65_536];
    store.read(0, &mut buf).unwrap();
    assert_eq!(buf, [1; 65_536]);
}
