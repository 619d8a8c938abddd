#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::medium::MemoryDirectory;
use hikkoshi_engine::geometry::{BlockIndex, BlockRange};
use hikkoshi_engine::residency::{BlockState, SectorMask};
use hikkoshi_engine::sync::AtomicU64;
use proptest::prelude::*;

fn identity() -> Identity {
    Identity {
        volume_id: [3; 16],
        geometry: Geometry::new(1000 * 4096, 4096).unwrap(),
        generation: 0,
        life: Life::Standby,
        source_uri: "nbd://old.example/disk%\nx".into(),
        incarnation: [9; 16],
        image_inode: Some(77),
    }
}

fn fresh(g: Geometry) -> Residency {
    let words = (0..Residency::required_words(g))
        .map(|_| AtomicU64::new(0))
        .collect::<Vec<_>>();
    Residency::new(g, Box::new(words))
}

fn reopen(dir: MemoryDirectory) -> Result<(StateDir, Residency), StateError> {
    let state = StateDir::open_in(Box::new(dir), None)?;
    let residency = fresh(state.identity().geometry);
    state.load(&residency)?;
    Ok((state, residency))
}

#[test]
fn every_flipped_bit_of_an_identity_is_found() {
    let good = identity().encode();
    assert_eq!(Identity::decode(&good), Ok(identity()));
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Identity::decode(&bad).is_err(), "bit {bit} went unnoticed");
    }
    for len in 0..good.len() {
        assert!(Identity::decode(&good[..len]).is_err());
    }
    let longer = [good, b"x".to_vec()].concat();
    assert!(Identity::decode(&longer).is_err());
}

/// Fuzzing of `state`: an identity with `generation = +7` and a right checksum was read, although
/// no program of ours writes it. What is believed is now what would be written again, byte for byte.
#[test]
fn an_identity_that_nobody_wrote_is_refused_though_its_checksum_is_right() {
    let good = String::from_utf8(identity().encode()).unwrap();
    let body = &good[..good.rfind("crc32c").unwrap()];
    for (right, wrong) in [
        ("generation = 0", "generation = +7"),
        ("generation = 0", "generation = 007"),
        ("block-bytes = 4096", "block-bytes = 04096"),
        ("image-inode = 77", "image-inode = +77"),
        ("0303", "+303"),
        ("%25", "%"),
    ] {
        assert!(body.contains(right), "{right}");
        let body = body.replacen(right, wrong, 1);
        let sealed = format!("{body}crc32c = {:08x}\n", crc32c::crc32c(body.as_bytes()));
        let outcome = Identity::decode(sealed.as_bytes());
        assert!(outcome.is_err(), "{wrong} was believed: {outcome:?}");
    }
}

/// Fuzzing of `state`: the largest epoch was followed by epoch 0, whose log may still hold commits of
/// long ago, and the largest generation by generation 0. Refusing to read the largest was no cure: the
/// one before it then led to a state that was not read any more. Counting on is what is refused.
#[test]
fn nothing_follows_the_last_epoch_and_the_last_generation() {
    let dir = MemoryDirectory::default();
    let last = Identity {
        generation: u64::MAX - 1,
        ..identity()
    };
    StateDir::create_in(Box::new(dir.clone()), last.clone(), None).unwrap();
    let map = journal::empty_snapshot(last.volume_id, u64::MAX - 1, last.geometry);
    dir.replace(MAP, &map).unwrap();

    let (mut state, residency) = reopen(dir.clone()).unwrap();
    state.record_arriving().unwrap();
    state.checkpoint(&residency, &mut || Ok(())).unwrap();
    let (mut state, residency) = reopen(dir.clone()).unwrap();
    let epoch = state.checkpoint(&residency, &mut || Ok(())).unwrap_err();
    assert!(matches!(epoch, StateError::Journal { .. }), "{epoch}");
    let (mut state, _) = reopen(dir.clone()).unwrap();
    let generation = state.record_arriving().unwrap_err();
    assert!(
        matches!(generation, StateError::Identity { .. }),
        "{generation}"
    );
    // And what is there is still what it was.
    assert_eq!(reopen(dir).unwrap().0.identity().generation, u64::MAX);
}

#[test]
fn a_state_with_a_file_missing_is_refused_and_not_begun_anew() {
    for name in [VOLUME, MAP, LOG] {
        let dir = MemoryDirectory::default();
        StateDir::create_in(Box::new(dir.clone()), identity(), None).unwrap();
        dir.remove(name).unwrap();
        let outcome = reopen(dir).map(|_| ()).unwrap_err();
        assert!(outcome.to_string().contains(name), "{outcome}");
    }
}

#[test]
fn a_state_of_another_volume_is_refused() {
    let (ours, theirs) = (MemoryDirectory::default(), MemoryDirectory::default());
    StateDir::create_in(Box::new(ours.clone()), identity(), None).unwrap();
    let other = Identity {
        volume_id: [4; 16],
        ..identity()
    };
    StateDir::create_in(Box::new(theirs.clone()), other, None).unwrap();
    ours.replace(MAP, &theirs.read(MAP).unwrap().unwrap())
        .unwrap();
    let outcome = reopen(ours).map(|_| ()).unwrap_err();
    assert!(matches!(
        outcome,
        StateError::Journal {
            source: JournalError::Foreign,
            ..
        }
    ));
}

/// After a failed write nobody knows what reached the medium. A retry that succeeds must not make
/// the state believed again.
#[test]
fn a_failed_write_poisons_the_state() {
    let dir = MemoryDirectory::default();
    let mut state = StateDir::create_in(Box::new(dir.clone()), identity(), None).unwrap();
    dir.fail_after(Some(1));
    let records = [Record::Owned(BlockRange::new(0, 1))];
    assert!(matches!(state.append(&records), Err(StateError::Io { .. })));
    dir.fail_after(None);
    assert!(matches!(state.append(&records), Err(StateError::Poisoned)));
    assert!(matches!(state.record_local(), Err(StateError::Poisoned)));
}

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<Record>),
    Checkpoint,
    Arrive,
    PowerCut(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0_u64..1000, 1_u64..50).prop_map(|(s, l)| BlockRange::new(s, (s + l).min(1000)));
    let record = prop_oneof![
        range.clone().prop_map(Record::Clean),
        range.prop_map(Record::Owned),
        (0_u64..1000, 1_u64..255).prop_map(|(b, m)| Record::Partial {
            block: BlockIndex(b),
            mask: SectorMask::from_words(vec![m]),
        }),
    ];
    prop_oneof![
        6 => prop::collection::vec(record, 1..6).prop_map(Step::Append),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Arrive),
        2 => any::<u64>().prop_map(Step::PowerCut),
    ]
}

/// Only what happens: copies are made of absent blocks, sectors kept of blocks that are not here.
fn as_they_come(records: Vec<Record>, now: &Residency) -> Vec<Record> {
    let mut out = Vec::new();
    for record in records {
        let happens = match &record {
            Record::Clean(range) => now.runs(*range).all(|(_, s)| s == BlockState::Absent),
            Record::Owned(_) => true,
            Record::Partial { block, .. } => !now.state(*block).is_resident(),
        };
        if happens {
            record.apply(now).unwrap();
            out.push(record);
        }
    }
    out
}

fn at_least(found: &Residency, promised: &Residency) -> bool {
    let g = found.geometry();
    (0..g.blocks()).map(BlockIndex).all(|b| {
        let enough = match promised.state(b) {
            BlockState::Absent => true,
            BlockState::Clean => found.state(b).is_resident(),
            BlockState::Owned => found.state(b) == BlockState::Owned,
            BlockState::Partial => found.state(b) != BlockState::Absent,
        };
        let sectors = match (promised.partial_mask(b), found.partial_mask(b)) {
            (Some(p), Some(f)) => (0..8).all(|s| !p.has(s) || f.has(s)),
            _ => true,
        };
        enough && sectors
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever an append has said `Ok` to is there after any power cut, and nothing that was
    /// never recorded is; also when the cut falls into the middle of an operation.
    #[test]
    fn a_power_cut_loses_no_commit(
        steps in prop::collection::vec(step(), 1..30),
        fail_after in prop::option::of(0_u64..25),
    ) {
        let g = identity().geometry;
        let mut dir = MemoryDirectory::default();
        let mut state = StateDir::create_in(Box::new(dir.clone()), identity(), None).unwrap();
        let (mut promised, mut possible) = (fresh(g), fresh(g));
        dir.fail_after(fail_after);
        for step in steps {
            let mut cut = None;
            match step {
                Step::Append(records) => {
                    let records = as_they_come(records, &possible);
                    match state.append(&records) {
                        Ok(()) => records.iter().for_each(|r| r.apply(&promised).unwrap()),
                        Err(_) => cut = Some(7),
                    }
                }
                Step::Checkpoint => {
                    if state.checkpoint(&promised, &mut || Ok(())).is_err() { cut = Some(11); }
                }
                Step::Arrive => if state.record_arriving().is_err() { cut = Some(13); },
                Step::PowerCut(seed) => cut = Some(seed | 1),
            }
            if let Some(mut seed) = cut {
                let mut choose = move |n: u32| {
                    seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
                    (seed % u64::from(n)) as u32
                };
                dir = dir.power_cut(&mut choose);
                let (reopened, found) = reopen(dir.clone()).unwrap();
                prop_assert!(at_least(&found, &promised));
                prop_assert!(at_least(&possible, &found));
                state = reopened;
                state.checkpoint(&found, &mut || Ok(())).unwrap();
                promised = fresh(g);
                state.load(&promised).unwrap();
                possible = found;
            }
        }
    }
}
