use super::*;
use crate::{EngineChoice, Fault, FaultyStore, FileStore, MemoryStore, OpenOptions, StoreOp, When};

const SIZE: u64 = 3 << 20;
const EIO: i32 = 5;

struct Place {
    _dir: tempfile::TempDir,
    mark: MarkFile,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let image = ImageIdentity {
        device: 7,
        inode: 8,
    };
    Place {
        mark: MarkFile::new(&dir.path().join("live"), image),
        _dir: dir,
    }
}

/// An image whose last writes are in the page cache alone, and will never be written.
fn ghost() -> MemoryStore {
    let store = MemoryStore::new(SIZE);
    store.write(0, &[1; 4096]).unwrap();
    store.sync().unwrap();
    store.write(512, &[2; 512]).unwrap();
    store.write(SIZE - 512, &[3; 512]).unwrap();
    store.lose_unsynced(&mut |_| 1);
    store.kill()
}

#[test]
fn a_failed_sync_leaves_the_mark_and_a_good_one_does_not() {
    let p = place();
    guarded(&p.mark, || Ok(())).unwrap();
    assert!(!p.mark.is_raised().unwrap());
    guarded(&p.mark, || Err(io::Error::from_raw_os_error(EIO))).unwrap_err();
    assert!(p.mark.is_raised().unwrap());
    p.mark.clear().unwrap();
    assert!(!p.mark.is_raised().unwrap());
}

#[test]
fn what_only_the_page_cache_has_is_written_again() {
    let p = place();
    let store = ghost();
    p.mark.raise().unwrap();
    let written = settle(&store, &p.mark, &mut |_| ()).unwrap();
    assert_eq!(written, Some(2 * 4096));
    assert!(!p.mark.is_raised().unwrap());
    let after = store.power_cut(&mut |_| 0).content();
    assert_eq!(after[512..1024], [2; 512]);
    assert_eq!(after[after.len() - 512..], [3; 512]);
    assert_eq!(after[1024..4096], [1; 3072]);
}

/// Which is the hole that the mark is for.
#[test]
fn without_the_mark_nothing_is_written_and_a_sync_does_not_help() {
    let p = place();
    let store = ghost();
    assert_eq!(settle(&store, &p.mark, &mut |_| ()).unwrap(), None);
    store.sync().unwrap();
    let after = store.power_cut(&mut |_| 0).content();
    assert_eq!(after[512..1024], [1; 512]);
}

#[test]
fn the_mark_stays_when_the_medium_fails_again() {
    for op in [StoreOp::Read, StoreOp::Write, StoreOp::Sync] {
        let p = place();
        let store = FaultyStore::new(ghost());
        store.fail(op, When::Always, Fault::Error(EIO));
        p.mark.raise().unwrap();
        let error = settle(&store, &p.mark, &mut |_| ())
            .unwrap_err()
            .to_string();
        assert!(p.mark.is_raised().unwrap(), "{op:?}");
        assert_eq!(
            error.contains("at offset 0"),
            op != StoreOp::Sync,
            "{error}"
        );
    }
}

#[test]
fn data_in_what_is_called_a_hole_is_written_and_holes_stay() {
    let p = place();
    let dir = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        read_only: false,
        create_with_size: Some(SIZE),
        engine: EngineChoice::Threads,
    };
    let store = FileStore::open(dir.path().join("disk"), options).unwrap();
    store.write(1 << 20, &[5; 4096]).unwrap();
    p.mark.raise().unwrap();
    let written = settle(&store, &p.mark, &mut |_| ()).unwrap().unwrap();
    assert!((4096..SIZE).contains(&written), "{written}");
    let mut seen = [0; 4096];
    store.read(1 << 20, &mut seen).unwrap();
    assert_eq!(seen, [5; 4096]);
}
