//! States that earlier versions wrote must still open, and say what they said then. A new version
//! of the format gets a folder of its own beside `v1`; the files of the old ones never change.
//!
//! `v1` was written on Linux 6.18 by version 0.1.0: `standby` is a new volume, `arriving` one in
//! the middle of its move, `local` one after it. Logs were cut behind their last commit; the zeroes
//! that were written beforehand are left out but for a page.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use hikkoshi_engine::geometry::{BlockIndex, Geometry};
use hikkoshi_engine::residency::{BlockState, Residency};
use hikkoshi_engine::sync::AtomicU64;
use hikkoshi_store::medium::{Directory, MemoryDirectory};
use hikkoshi_store::state::{Life, StateDir};

fn directory(name: &str) -> MemoryDirectory {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/v1")
        .join(name);
    let dir = MemoryDirectory::default();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        dir.replace(&name, &std::fs::read(entry.path()).unwrap())
            .unwrap();
    }
    dir
}

/// A state in memory: the fixture itself is never written to.
fn open(name: &str) -> StateDir {
    let state = StateDir::open_in(Box::new(directory(name)), None).unwrap();
    let identity = state.identity();
    let id = 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210_u128;
    assert_eq!(identity.volume_id, id.to_be_bytes());
    assert_eq!(
        identity.geometry,
        Geometry::new(12_287 * 4096 + 1536, 4096).unwrap()
    );
    assert_eq!(
        identity.source_uri,
        "nbd://old.example:10809/web%20disk\nsecond line"
    );
    assert_eq!(identity.incarnation, [0x5a; 16]);
    assert_eq!(identity.image_inode, Some(123_456_789));
    state
}

fn load(state: &StateDir) -> Residency {
    let geometry = state.identity().geometry;
    let words: Vec<AtomicU64> = (0..Residency::required_words(geometry))
        .map(|_| AtomicU64::new(0))
        .collect();
    let residency = Residency::new(geometry, Box::new(words));
    state.load(&residency).unwrap();
    residency
}

#[test]
fn a_standby_volume_of_version_1_opens() {
    let state = open("standby");
    assert_eq!(state.identity().life, Life::Standby);
    assert_eq!(state.identity().generation, 0);
    assert_eq!(load(&state).resident_blocks(), 0);
}

#[test]
fn an_arriving_volume_of_version_1_opens_with_every_block_where_it_was() {
    use BlockState::{Absent, Clean, Owned, Partial};
    let mut state = open("arriving");
    assert_eq!(state.identity().life, Life::Arriving);
    assert_eq!(state.identity().generation, 1);
    let residency = load(&state);
    let runs: Vec<_> = residency
        .runs(residency.geometry().all())
        .map(|(run, state)| (run.start, run.end, state))
        .collect();
    let expected = [
        // A page that is all clean, but for what the log says of block 5.
        (0, 5, Clean),
        (5, 6, Owned),
        (6, 4096, Clean),
        // One that is all owned, and one told word by word.
        (4096, 8192, Owned),
        (8192, 8198, Clean),
        (8198, 8300, Owned),
        (8300, 9000, Absent),
        (9000, 9001, Partial),
        (9001, 10_000, Absent),
        // From the log.
        (10_000, 10_010, Clean),
        (10_010, 12_287, Absent),
        (12_287, 12_288, Partial),
    ];
    assert_eq!(runs, expected);
    let sectors = |block| {
        let mask = residency.partial_mask(BlockIndex(block)).unwrap();
        (0..8).filter(|s| mask.has(*s)).collect::<Vec<_>>()
    };
    assert_eq!(sectors(9000), [1, 2]);
    assert_eq!(sectors(12_287), [0]);
    // And it can be gone on with.
    state.checkpoint(&residency, &mut || Ok(())).unwrap();
    assert_eq!(load(&state).resident_blocks(), residency.resident_blocks());
}

#[test]
fn a_complete_volume_of_version_1_opens() {
    let state = open("local");
    assert_eq!(state.identity().life, Life::Local);
    assert_eq!(state.identity().generation, 1);
}
