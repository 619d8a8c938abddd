use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::FileStore;
use crate::open::{EngineChoice, OpenOptions, StoreError};
use crate::uring::Ring;
use crate::{Extent, ExtentKind, Store, ZeroMode, conformance};

const MIB: u64 = 1 << 20;

fn sized(size: u64) -> OpenOptions {
    OpenOptions {
        create_with_size: Some(size),
        ..OpenOptions::default()
    }
}

/// Runs the suite on new files in a directory.
fn conform(directory: &Path, engine: EngineChoice, cases: u32) {
    let path = directory.join("image");
    conformance::run(
        &|size| {
            // The one before may still be locked by a read under way; a new file has a new lock.
            let _ = fs::remove_file(&path);
            let options = OpenOptions {
                engine,
                ..sized(size)
            };
            Arc::new(FileStore::open(&path, options).unwrap())
        },
        512,
        cases,
    );
}

#[test]
fn conforms_on_disk_with_threads() {
    conform(
        tempfile::tempdir().unwrap().path(),
        EngineChoice::Threads,
        60,
    );
}

#[test]
fn conforms_on_tmpfs_with_threads() {
    conform(
        tempfile::tempdir_in("/dev/shm").unwrap().path(),
        EngineChoice::Threads,
        60,
    );
}

#[test]
fn conforms_with_io_uring_where_the_kernel_has_it() {
    let directory = tempfile::tempdir().unwrap();
    if Ring::shared().is_ok() {
        conform(directory.path(), EngineChoice::IoUring, 60);
        let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
        conform(in_memory.path(), EngineChoice::IoUring, 20);
    } else {
        // Then that has to be said to who insists, and nobody else may notice.
        let insist = OpenOptions {
            engine: EngineChoice::IoUring,
            ..sized(MIB)
        };
        let error = FileStore::open(directory.path().join("image"), insist).unwrap_err();
        assert!(matches!(error, StoreError::NoIoUring { .. }));
        FileStore::open(directory.path().join("image"), sized(MIB)).unwrap();
    }
}

fn new_image(size: u64) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    drop(FileStore::open(&path, sized(size)).unwrap());
    (directory, path)
}

#[test]
fn a_new_image_is_sparse_private_and_blank_and_an_old_one_is_not_new() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let store = FileStore::open(&path, sized(1 << 40)).unwrap();
    assert!(store.is_new() && store.looks_blank().unwrap() && !store.is_block_device());
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.len(), found.mode() & 0o777), (1 << 40, 0o600));
    assert!(found.blocks() < 64, "{} blocks", found.blocks());
    assert_eq!(store.identity().unwrap().inode, found.ino());
    let hole = Extent {
        offset: 0,
        len: 1 << 40,
        kind: ExtentKind::Hole,
    };
    assert_eq!(store.extents(0, 1 << 40, 100).unwrap(), [hole]);
    store.write(1 << 39, &[0]).unwrap();
    assert!(!store.looks_blank().unwrap());
    drop(store);
    assert!(!FileStore::open(&path, sized(1 << 40)).unwrap().is_new());
}

#[test]
fn an_empty_file_takes_the_size_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    fs::write(&path, []).unwrap();
    let error = FileStore::open(&path, OpenOptions::default()).unwrap_err();
    assert!(matches!(error, StoreError::Empty { .. }));
    let store = FileStore::open(&path, sized(MIB)).unwrap();
    assert!(store.is_new());
    assert_eq!(store.size_bytes(), MIB);
}

#[test]
fn what_is_no_image_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let open = |options| FileStore::open(&path, options);
    assert!(matches!(
        open(OpenOptions::default()),
        Err(StoreError::NotFound { .. })
    ));
    let read_only = OpenOptions {
        read_only: true,
        ..sized(MIB)
    };
    assert!(matches!(open(read_only), Err(StoreError::NotFound { .. })));
    assert!(matches!(
        open(sized(1000)),
        Err(StoreError::PartialSector { .. })
    ));
    assert!(matches!(
        open(sized(u64::MAX - 511)),
        Err(StoreError::Io { .. })
    ));
    assert!(!path.exists());

    fs::write(&path, [1; 1000]).unwrap();
    let error = open(OpenOptions::default()).unwrap_err();
    assert!(matches!(
        error,
        StoreError::PartialSector {
            size: 1000,
            rounded: 1024,
            ..
        }
    ));
    assert!(error.to_string().contains("1000 bytes"), "{error}");
    let error = open(sized(MIB)).unwrap_err();
    assert!(matches!(
        error,
        StoreError::WrongSize {
            found: 1000,
            wanted: MIB,
            ..
        }
    ));
    assert_eq!(fs::read(&path).unwrap(), [1; 1000]);

    let error = FileStore::open(directory.path(), OpenOptions::default()).unwrap_err();
    assert!(matches!(
        error,
        StoreError::NotAnImage {
            what: "a directory",
            ..
        }
    ));
    let error = FileStore::open("/dev/null", OpenOptions::default()).unwrap_err();
    assert!(matches!(
        error,
        StoreError::NotAnImage {
            what: "a character device",
            ..
        }
    ));
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let (_directory, path) = new_image(MIB);
    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let writer = FileStore::open(&path, OpenOptions::default()).unwrap();
    for options in [OpenOptions::default(), read_only] {
        let error = FileStore::open(&path, options).unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }));
        assert!(
            error
                .to_string()
                .contains(&format!("process {}", std::process::id())),
            "{error}"
        );
    }
    drop(writer);
    let one = FileStore::open(&path, read_only).unwrap();
    let other = FileStore::open(&path, read_only).unwrap();
    assert!(matches!(
        FileStore::open(&path, OpenOptions::default()),
        Err(StoreError::InUse { .. })
    ));
    // EROFS, which clients are told as "not permitted".
    assert_eq!(one.write(0, &[1]).unwrap_err().raw_os_error(), Some(30));
    let zeroes = other.write_zeroes(0, 512, ZeroMode::MayPunch);
    assert_eq!(zeroes.unwrap_err().raw_os_error(), Some(30));
    other.read(0, &mut [0; 512]).unwrap();
    other.sync().unwrap();
}

#[test]
fn a_mark_stays_with_the_image() {
    let (directory, path) = new_image(MIB);
    let store = FileStore::open(&path, OpenOptions::default()).unwrap();
    assert_eq!(store.volume_tag().unwrap(), None);
    store.set_volume_tag(b"one").unwrap();
    store.set_volume_tag(b"another").unwrap();
    assert!(
        store
            .set_volume_tag(&[0; super::super::VOLUME_TAG_MAX_BYTES + 1])
            .is_err()
    );
    drop(store);
    let moved = directory.path().join("moved");
    fs::rename(&path, &moved).unwrap();
    let store = FileStore::open(&moved, OpenOptions::default()).unwrap();
    assert_eq!(store.volume_tag().unwrap().unwrap(), b"another");
}

#[test]
fn punching_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    let (_directory, path) = new_image(MIB);
    let store = FileStore::open(&path, OpenOptions::default()).unwrap();
    store.write(0, &vec![1; 1 << 20]).unwrap();
    store.sync().unwrap();
    let full = fs::metadata(&path).unwrap().blocks();
    store
        .write_zeroes(100, MIB - 200, ZeroMode::MayPunch)
        .unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() < full / 4);
    let kinds = store.extents(0, MIB, 9).unwrap();
    assert_eq!(kinds.len(), 3, "{kinds:?}");
}

/// Both engines get a short read first here, and have to go on to find the end.
#[test]
fn an_image_cut_short_behind_our_back_is_an_error() {
    let (_directory, path) = new_image(MIB);
    let mut engines = vec![EngineChoice::Threads];
    engines.extend(Ring::shared().is_ok().then_some(EngineChoice::IoUring));
    for engine in engines {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(MIB).unwrap();
        let options = OpenOptions {
            engine,
            ..OpenOptions::default()
        };
        let store = FileStore::open(&path, options).unwrap();
        file.set_len(4096).unwrap();
        let ended = |error: std::io::Error| error.kind() == std::io::ErrorKind::UnexpectedEof;
        assert!(store.read(0, &mut [0; 8192]).is_err_and(ended));
        let (tx, rx) = std::sync::mpsc::channel();
        store.submit_read(0, 8192, Box::new(move |result| tx.send(result).unwrap()));
        assert!(rx.recv().unwrap().is_err_and(ended), "{engine:?}");
    }
}

#[test]
fn a_failed_sync_is_never_followed_by_a_good_one() {
    let (_directory, path) = new_image(MIB);
    let store = FileStore::open(&path, OpenOptions::default()).unwrap();
    store
        .gate
        .run(|| Err(std::io::Error::from_raw_os_error(28)))
        .unwrap_err();
    for _ in 0..2 {
        assert_eq!(store.sync().unwrap_err().raw_os_error(), Some(28));
    }
    assert!(store.set_volume_tag(b"late").is_err());
}
