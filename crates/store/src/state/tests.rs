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
        ties: Ties::default(),
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
    state.record_arriving(0).unwrap();
    state.checkpoint(&residency, &mut || Ok(())).unwrap();
    let (mut state, residency) = reopen(dir.clone()).unwrap();
    let epoch = state.checkpoint(&residency, &mut || Ok(())).unwrap_err();
    assert!(matches!(epoch, StateError::Journal { .. }), "{epoch}");
    let (mut state, _) = reopen(dir.clone()).unwrap();
    let generation = state.record_arriving(0).unwrap_err();
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

/// A daemon that was killed while it made the state of a new volume left a log and a map without a
/// `volume`. The next start refused that as a state that has lost its identity, for ever, though
/// nothing had been recorded in it and the move had only to begin anew.
#[test]
fn a_creation_that_was_cut_short_is_no_state_that_has_lost_its_identity() {
    let dir = MemoryDirectory::default();
    assert_eq!(StateDir::look_in(&dir).unwrap(), Found::Nothing);
    let (mut state, residency) = {
        let state = StateDir::create_in(Box::new(dir.clone()), identity(), None).unwrap();
        (state, fresh(identity().geometry))
    };
    assert_eq!(StateDir::look_in(&dir).unwrap(), Found::State);
    // In the order in which the files are made: log, map, volume.
    dir.remove(VOLUME).unwrap();
    assert_eq!(StateDir::look_in(&dir).unwrap(), Found::Begun);
    let map = dir.read(MAP).unwrap().unwrap();
    dir.remove(MAP).unwrap();
    assert_eq!(StateDir::look_in(&dir).unwrap(), Found::Begun);
    dir.replace(MAP, &map).unwrap();
    // With anything recorded it is one, and must not be begun anew.
    let clean = Record::Clean(BlockRange::new(1, 2));
    state.append(&[clean]).unwrap();
    assert_eq!(StateDir::look_in(&dir).unwrap(), Found::State);
    dir.replace(LOG, &vec![0; PREALLOCATED_BYTES]).unwrap();
    assert_eq!(StateDir::look_in(&dir).unwrap(), Found::Begun);
    let later = journal::encode_snapshot([3; 16], 1, &residency);
    for bad in [&later[..], &map[..map.len() - 1], b""] {
        dir.replace(MAP, bad).unwrap();
        assert_eq!(StateDir::look_in(&dir).unwrap(), Found::State);
    }
    dir.remove(LOG).unwrap();
    assert_eq!(StateDir::look_in(&dir).unwrap(), Found::State);
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
                Step::Arrive => if state.record_arriving(0).is_err() { cut = Some(13); },
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

/// A snapshot that did not fit poisoned the volume until the daemon was restarted, although the
/// old snapshot and the log were whole. Nor does a commit that was cut short for want of space do
/// any harm: nobody was told that it is durable.
#[test]
fn where_there_is_no_space_nothing_is_spoilt() {
    let dir = MemoryDirectory::default();
    let mut state = StateDir::create_in(Box::new(dir.clone()), identity(), None).unwrap();
    let residency = fresh(state.identity().geometry);
    let leave = |state: &mut StateDir, block: u64| {
        let run = BlockRange::one(BlockIndex(block));
        residency.mark_owned(run);
        state.append(&[Record::Owned(run)])
    };
    state.record_arriving(0).unwrap();
    leave(&mut state, 1).unwrap();
    dir.set_full(true);
    let outcome = state.change(|identity| identity.generation = 99);
    assert!(outcome.unwrap_err().is_no_space());
    assert_eq!(state.identity().generation, 1);
    let outcome = leave(&mut state, 2);
    assert!(outcome.unwrap_err().is_no_space());
    // A kill and a power cut right now find what was durable.
    for after in [dir.kill(), dir.power_cut(&mut |n| n - 1)] {
        let (_, found) = reopen(after).unwrap();
        assert_eq!(found.state(BlockIndex(1)), BlockState::Owned);
        // The other one may have reached the medium, though nobody was told so: it is true.
    }
    dir.set_full(false);
    leave(&mut state, 2).unwrap();
    leave(&mut state, 3).unwrap();
    let (_, found) = reopen(dir.power_cut(&mut |_| 0)).unwrap();
    for block in 1..=3 {
        assert_eq!(found.state(BlockIndex(block)), BlockState::Owned);
    }
    dir.set_full(true);
    let outcome = state.checkpoint(&fresh(identity().geometry), &mut || Ok(()));
    assert!(outcome.unwrap_err().is_no_space());
    dir.set_full(false);
    // The epoch goes on: its log is still the one that counts.
    state
        .append(&[Record::Owned(BlockRange::new(7, 9))])
        .unwrap();
    let (_, found) = reopen(dir.power_cut(&mut |_| 0)).unwrap();
    assert_eq!(found.owned_blocks(), 5);
}

/// Without space for a snapshot the log grows, but not for ever.
#[test]
fn a_log_that_cannot_be_replaced_is_bounded() {
    let dir = MemoryDirectory::default();
    let large = Identity {
        geometry: Geometry::new(1_000_000 * 4096, 4096).unwrap(),
        ..identity()
    };
    let geometry = large.geometry;
    let mut state = StateDir::create_in(Box::new(dir), large, None).unwrap();
    // Nobody leaves such records; they are only long.
    let records: Vec<Record> = (0..300_000)
        .map(|n| Record::Owned(BlockRange::one(BlockIndex(n * 2))))
        .collect();
    let mut commits = 0;
    let error = loop {
        match state.append(&records) {
            Ok(()) => commits += 1,
            Err(error) => break error,
        }
        assert!(commits < 100, "it grows without bound");
    };
    assert!(error.is_no_space(), "{error}");
    assert!(state.needs_checkpoint() && commits > 4);
    let residency = fresh(geometry);
    state.checkpoint(&residency, &mut || Ok(())).unwrap();
    state.append(&records).unwrap();
}

/// A first start that finds no space leaves nothing that the next would take for a damaged state.
#[test]
fn a_state_that_could_not_be_made_leaves_nothing() {
    for steps in 0..3 {
        let dir = MemoryDirectory::default();
        // One step removes left-overs.
        dir.fail_after(Some(1 + steps));
        let made = StateDir::create_in(Box::new(dir.clone()), identity(), None);
        assert!(made.is_err());
        dir.fail_after(None);
        StateDir::create_in(Box::new(dir), identity(), None).unwrap();
    }
}

fn states(residency: &Residency) -> Vec<BlockState> {
    (0..residency.geometry().blocks())
        .map(|block| residency.state(BlockIndex(block)))
        .collect()
}

/// Every bit of a small map, of a log of three commits and of the witnesses. What is not refused
/// is harmless: padding, and what lies behind the last commit. With one exception, which no format
/// can help: a flip in the last commit looks like a commit that a power cut interrupted.
#[test]
fn every_flipped_bit_of_a_state_is_refused_or_harmless() {
    let dir = MemoryDirectory::default();
    let mut state = StateDir::create_in(Box::new(dir.clone()), identity(), None).unwrap();
    let residency = fresh(identity().geometry);
    residency.mark_clean(BlockRange::new(0, 300));
    residency.mark_owned(BlockRange::new(310, 320));
    state.checkpoint(&residency, &mut || Ok(())).unwrap();
    let mut after_commit = Vec::new();
    for block in [400, 500, 600] {
        let run = BlockRange::new(block, block + 3);
        residency.mark_owned(run);
        state.append(&[Record::Owned(run)]).unwrap();
        after_commit.push(states(&residency));
    }
    let map = dir.read(MAP).unwrap().unwrap();
    for bit in 0..map.len() * 8 {
        let mut bad = map.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let copy = dir.kill();
        copy.replace(MAP, &bad).unwrap();
        assert!(reopen(copy).is_err(), "bit {bit} of the map went unnoticed");
    }
    let log = dir.read(LOG).unwrap().unwrap();
    let end = 3 * FRAME_ALIGN;
    // A shorter file, so that two hundred thousand copies take seconds.
    let log = log[..end + FRAME_ALIGN].to_vec();
    let content_bytes = 64;
    for byte in 0..log.len() {
        let frame = byte / FRAME_ALIGN;
        let in_padding = byte % FRAME_ALIGN >= content_bytes || byte >= end;
        // Padding is not looked at: one bit of each byte will do.
        for bit in 0..if in_padding { 1 } else { 8 } {
            let mut bad = log.clone();
            bad[byte] ^= 1 << bit;
            let copy = dir.kill();
            copy.replace(LOG, &bad).unwrap();
            match reopen(copy) {
                Err(error) => assert!(frame < 2 && !in_padding, "byte {byte}: {error}"),
                Ok((_, found)) => {
                    let found = states(&found);
                    let whole = found == after_commit[2];
                    let last_is_gone = frame == 2 && !in_padding && found == after_commit[1];
                    assert!(whole || last_is_gone, "bit {bit} of byte {byte}");
                }
            }
        }
    }
}

#[test]
fn where_a_disk_has_moved_to_is_kept_with_its_departure() {
    let mut departed = Identity {
        ties: Ties {
            departed: Some(Departure {
                to: [9; 16],
                image_mtime: None,
                intact: true,
            }),
            moved_to: Some("image:/a%3F\n?state=/%25".into()),
            ..Ties::default()
        },
        ..identity()
    };
    let decoded = Identity::decode(&departed.encode()).unwrap();
    assert_eq!(decoded, departed);
    departed.ties.departed = None;
    assert!(
        Identity::decode(&departed.encode()).is_err(),
        "a place without a departure"
    );
}

#[test]
fn a_handoff_by_command_is_kept() {
    let mut by_command = identity();
    by_command.ties.by_command = true;
    let content = by_command.encode();
    assert!(
        content
            .windows(18)
            .any(|line| line == b"handoff = command\n")
    );
    assert_eq!(Identity::decode(&content).unwrap(), by_command);
}

#[test]
fn what_is_discarded_leaves_nothing_but_what_is_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.hikkoshi");
    assert_eq!(StateDir::whose(&path).unwrap(), None);
    drop(StateDir::create(&path, identity()).unwrap());
    assert_eq!(StateDir::whose(&path).unwrap(), Some(identity()));
    std::fs::write(path.join("notes"), "mine").unwrap();
    StateDir::discard(&path).unwrap();
    let left: Vec<_> = std::fs::read_dir(&path).unwrap().flatten().collect();
    assert!(left.len() == 1 && left[0].file_name() == "notes");
    assert_eq!(StateDir::look(&path).unwrap(), Found::Nothing);
    std::fs::remove_file(path.join("notes")).unwrap();
    drop(StateDir::create(&path, identity()).unwrap());
    StateDir::discard(&path).unwrap();
    assert!(!path.exists());
}
