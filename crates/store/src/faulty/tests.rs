use std::sync::Arc;

use super::{Fault, FaultyStore, StoreOp, When};
use crate::{MemoryStore, Store, conformance};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;

#[test]
fn conforms_without_faults() {
    conformance::run(
        &|size| Arc::new(FaultyStore::new(MemoryStore::new(size))),
        512,
        30,
    );
}

#[test]
fn the_nth_write_fails_and_changes_nothing() {
    let store = FaultyStore::new(MemoryStore::new(4096));
    store.fail(StoreOp::Write, When::Nth(2), Fault::Error(ENOSPC));
    store.write(0, &[1; 512]).unwrap();
    assert_eq!(
        store.write(0, &[2; 512]).unwrap_err().raw_os_error(),
        Some(ENOSPC)
    );
    assert_eq!(store.inner().content()[..512], [1; 512]);
    store.write(0, &[3; 512]).unwrap();
    assert_eq!(store.calls(StoreOp::Write), 3);
}

#[test]
fn a_torn_write_leaves_its_beginning() {
    let store = FaultyStore::new(MemoryStore::new(4096));
    store.fail_next(
        StoreOp::Write,
        Fault::Torn {
            bytes: 512,
            errno: EIO,
        },
    );
    assert_eq!(
        store.write(0, &[1; 1024]).unwrap_err().raw_os_error(),
        Some(EIO)
    );
    assert_eq!(store.inner().content()[..512], [1; 512]);
    assert_eq!(store.inner().content()[512..1024], [0; 512]);
}

#[test]
fn a_failed_sync_makes_nothing_durable() {
    let store = FaultyStore::new(MemoryStore::new(4096));
    store.write(0, &[1; 512]).unwrap();
    store.fail_next(StoreOp::Sync, Fault::Error(EIO));
    assert!(store.sync().is_err());
    assert_eq!(store.inner().unsynced_writes(), 1);
    store.sync().unwrap();
    assert_eq!(store.inner().unsynced_writes(), 0);
}

#[test]
fn a_bad_sector_fails_those_who_touch_it_until_healed() {
    let store = FaultyStore::new(MemoryStore::new(8192));
    store.fail(StoreOp::Read, When::Touching(1024..1536), Fault::Error(EIO));
    store.fail(StoreOp::TryRead, When::Always, Fault::WouldBlock);
    store.read(0, &mut [0; 1024]).unwrap();
    assert!(store.read(0, &mut [0; 1025]).is_err());
    assert!(!store.try_read(0, &mut [0; 512]).unwrap());
    let (tx, rx) = std::sync::mpsc::channel();
    store.submit_read(1500, 512, Box::new(move |result| tx.send(result).unwrap()));
    assert_eq!(rx.recv().unwrap().unwrap_err().raw_os_error(), Some(EIO));
    store.heal();
    store.read(0, &mut [0; 1025]).unwrap();
    assert!(store.try_read(0, &mut [0; 512]).unwrap());
}

#[test]
fn held_calls_wait_until_released() {
    let store = FaultyStore::new(MemoryStore::new(4096));
    store.hold(StoreOp::Write);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| store.write(0, &[1; 512]));
        store.wait_held(StoreOp::Write, 1);
        assert_eq!(store.inner().content()[..512], [0; 512]);
        store.release(StoreOp::Write);
        writer.join().unwrap().unwrap();
    });
    assert_eq!(store.inner().content()[..512], [1; 512]);
}
