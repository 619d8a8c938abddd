#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::geometry::{BlockIndex, BlockRange, Geometry};
use crate::residency::{Residency, SectorMask};
use crate::sync::AtomicU64;
use proptest::prelude::*;

const ID: VolumeId = [7; 16];

fn shape() -> Geometry {
    Geometry::new(10_000 * 4096 + 512, 4096).unwrap()
}

fn fresh() -> Residency {
    let words: Vec<_> = (0..Residency::required_words(shape()))
        .map(|_| AtomicU64::new(0))
        .collect();
    Residency::new(shape(), Box::new(words))
}

fn record() -> impl Strategy<Value = Record> {
    let range = (0_u64..10_001, 1_u64..6000)
        .prop_map(|(start, len)| BlockRange::new(start, (start + len).min(10_001)));
    prop_oneof![
        range.clone().prop_map(Record::Clean),
        range.prop_map(Record::Owned),
        (0_u64..10_000, 1_u64..255).prop_map(|(block, mask)| Record::Partial {
            block: BlockIndex(block),
            mask: SectorMask::from_words(vec![mask]),
        }),
    ]
}

fn same(a: &Residency, b: &Residency) -> bool {
    a.runs(shape().all()).eq(b.runs(shape().all())) && a.partials() == b.partials()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_snapshot_brings_back_what_was(records in prop::collection::vec(record(), 0..30)) {
        let before = fresh();
        records.iter().for_each(|r| r.apply(&before).unwrap());
        let bytes = encode_snapshot(ID, 3, &before);
        prop_assert_eq!(snapshot_epoch(&bytes, ID, shape()), Ok(3));
        let after = fresh();
        apply_snapshot(&bytes, ID, &after).unwrap();
        prop_assert!(same(&before, &after));
    }

    #[test]
    fn a_log_brings_back_every_commit(commits in prop::collection::vec(prop::collection::vec(record(), 1..20), 1..8)) {
        let (before, after) = (fresh(), fresh());
        let mut log = Vec::new();
        for (seq, records) in commits.iter().enumerate() {
            records.iter().for_each(|r| r.apply(&before).unwrap());
            log.extend(encode_frame(ID, 9, seq as u64, records));
        }
        log.extend([0; 2 * FRAME_ALIGN]);
        let end = read_log(&log, ID, 9, shape()).unwrap();
        prop_assert_eq!(end.frames, commits.len() as u64);
        end.records.iter().for_each(|r| r.apply(&after).unwrap());
        // Joining reorders records within a commit; what is here stays the same.
        prop_assert_eq!(before.missing_blocks(), after.missing_blocks());
    }

    #[test]
    fn arbitrary_bytes_are_refused_and_nothing_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..9000), magic in any::<bool>()) {
        if magic && bytes.len() > 8 { bytes[..8].copy_from_slice(b"HKKMAP01"); }
        prop_assert!(apply_snapshot(&bytes, ID, &fresh()).is_err());
        if magic && bytes.len() > 8 { bytes[..8].copy_from_slice(b"HKKLOG01"); }
        prop_assert_eq!(read_log(&bytes, ID, 0, shape()).unwrap().frames, 0);
    }
}

#[test]
fn every_flipped_bit_of_a_snapshot_is_found() {
    let r = fresh();
    Record::Clean(BlockRange::new(100, 5000)).apply(&r).unwrap();
    Record::Partial {
        block: BlockIndex(5),
        mask: SectorMask::from_words(vec![6]),
    }
    .apply(&r)
    .unwrap();
    let good = encode_snapshot(ID, 1, &r);
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(
            apply_snapshot(&bad, ID, &fresh()).is_err(),
            "bit {bit} went unnoticed"
        );
    }
    for len in 0..good.len() {
        assert!(
            apply_snapshot(&good[..len], ID, &fresh()).is_err(),
            "cut at {len}"
        );
    }
}

/// A damaged commit with a sound one behind it is damage and not a cut: refused. Only the last
/// commit can pass for one that a power cut interrupted.
#[test]
fn damage_in_the_middle_of_a_log_is_refused() {
    let frame = |seq| encode_frame(ID, 1, seq, &[Record::Owned(BlockRange::new(seq, seq + 1))]);
    let log: Vec<u8> = (0..3).flat_map(frame).collect();
    for at in [0, 9, 30, 41, 45, 50] {
        for seq in 0..3 {
            let mut bad = log.clone();
            bad[seq * FRAME_ALIGN + at] ^= 0x10;
            let outcome = read_log(&bad, ID, 1, shape());
            if seq < 2 {
                assert!(
                    matches!(outcome, Err(JournalError::Corrupt(_))),
                    "{seq} {at}: {outcome:?}"
                );
            } else {
                assert_eq!(outcome.unwrap().frames, 2);
            }
        }
    }
}

#[test]
fn a_recycled_log_forgets_the_epoch_before() {
    let old: Vec<u8> = (0..3).flat_map(|s| encode_frame(ID, 1, s, &[])).collect();
    let mut log = old;
    let new = encode_frame(ID, 2, 0, &[Record::Clean(BlockRange::new(0, 4))]);
    log[..new.len()].copy_from_slice(&new);
    let end = read_log(&log, ID, 2, shape()).unwrap();
    assert_eq!((end.frames, end.bytes), (1, FRAME_ALIGN));
}
