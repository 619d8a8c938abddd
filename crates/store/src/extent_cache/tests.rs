use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{ExtentCache, MAX_RUNS, REGION_BYTES, TOO_FRAGMENTED};
use crate::{Extent, ExtentKind};

const HOLE: ExtentKind = ExtentKind::Hole;
const DATA: ExtentKind = ExtentKind::Data;

fn file(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

fn extent(offset: u64, len: u64, kind: ExtentKind) -> Extent {
    Extent { offset, len, kind }
}

#[test]
fn what_is_known_is_not_asked_again_until_a_write() {
    let size = 3 * REGION_BYTES;
    let file = file(size);
    let cache = ExtentCache::new(size);
    assert_eq!(
        cache.extents(&file, 0, size, 9).unwrap(),
        [extent(0, size, HOLE)]
    );
    // Behind the cache's back: a proof that it does not look.
    file.write_all_at(&[1; 4096], REGION_BYTES).unwrap();
    assert_eq!(
        cache.extents(&file, 5, size - 5, 9).unwrap(),
        [extent(5, size - 5, HOLE)]
    );
    // A write elsewhere changes nothing; one in that region does.
    drop(cache.writing(0, 4096));
    assert_eq!(
        cache.extents(&file, 0, size, 9).unwrap(),
        [extent(0, size, HOLE)]
    );
    drop(cache.writing(REGION_BYTES + 100_000, 1));
    let now = cache.extents(&file, 0, size, 9).unwrap();
    assert_eq!(now[0], extent(0, REGION_BYTES, HOLE));
    assert_eq!(now[1], extent(REGION_BYTES, 4096, DATA));
}

#[test]
fn nothing_is_remembered_while_a_write_is_under_way() {
    let file = file(REGION_BYTES);
    let cache = ExtentCache::new(REGION_BYTES);
    let hole = [extent(0, REGION_BYTES, HOLE)];
    let writing = cache.writing(0, 4096);
    assert_eq!(cache.extents(&file, 0, REGION_BYTES, 9).unwrap(), hole);
    file.write_all_at(&[1; 4096], 0).unwrap();
    // The write has not returned, yet whoever asks after its bytes arrived is told.
    assert_eq!(
        cache.extents(&file, 0, 4096, 9).unwrap(),
        [extent(0, 4096, DATA)]
    );
    drop(writing);
    assert_eq!(
        cache.extents(&file, 0, 4096, 9).unwrap(),
        [extent(0, 4096, DATA)]
    );
}

#[test]
fn a_write_over_more_regions_than_slots_reaches_all() {
    let size = 1 << 40;
    let file = file(size);
    let cache = ExtentCache::new(size);
    assert_eq!(
        cache.extents(&file, 0, size, 9).unwrap(),
        [extent(0, size, HOLE)]
    );
    file.write_all_at(&[1; 4096], 200 * REGION_BYTES).unwrap();
    drop(cache.writing(0, size));
    let data = extent(200 * REGION_BYTES, 4096, DATA);
    assert_eq!(cache.extents(&file, 0, size, 9).unwrap()[1], data);
}

#[test]
fn a_file_with_too_many_holes_is_told_right_and_not_kept() {
    let size = REGION_BYTES + 8192;
    let file = file(size);
    let runs = u64::try_from(MAX_RUNS).unwrap() + 100;
    for run in (0..runs).step_by(2) {
        file.write_all_at(&[1; 4096], run * 4096).unwrap();
    }
    let cache = ExtentCache::new(size);
    let mut expected: Vec<_> = (0..runs)
        .map(|run| extent(run * 4096, 4096, if run % 2 == 0 { DATA } else { HOLE }))
        .collect();
    expected.last_mut().unwrap().len = size - (runs - 1) * 4096;
    for _ in 0..2 {
        assert_eq!(cache.extents(&file, 0, size, usize::MAX).unwrap(), expected);
        assert_eq!(cache.lock()[0].mark, TOO_FRAGMENTED);
        assert!(cache.lock()[0].runs.is_empty());
    }
}
