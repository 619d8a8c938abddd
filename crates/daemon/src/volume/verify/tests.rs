//! When the source may go, and a block that a guest writes while it is looked at.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hikkoshi_engine::geometry::{BlockRange, Geometry};
use hikkoshi_engine::residency::Residency;
use hikkoshi_engine::sync::AtomicU64;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::{MemoryStore, Store};
use hikkoshi_wan::{MemorySource, Source, SourceErrorKind};

use super::super::assemble::{Moving, Parts};
use super::super::relocation::Relocation;
use super::super::{Volume, system_clock};
use super::run::add;
use super::*;
use crate::config::{Engine, ExportConfig, HandoffPolicy, SourceConfig, Transport};
use crate::verification::{Difference, MAX_DIFFERENCES, VerifyMethod};

const BLOCK: u64 = 4096;
const DISK: u64 = 300 << 10;

/// Nothing depends on how long something takes; this only ends a test that hangs.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct World {
    volume: Arc<Volume>,
    source: Arc<MemorySource>,
    store: Arc<MemoryStore>,
    relocation: Arc<Relocation>,
}

/// A volume with everything but its last block here, and clean.
fn world(required: bool) -> World {
    let data: Vec<u8> = (0..DISK).map(|n| n.to_le_bytes()[1] | 1).collect();
    let geometry = Geometry::new(DISK, 4096).unwrap();
    let source = MemorySource::new(data.clone(), None);
    let store = Arc::new(MemoryStore::new(DISK));
    store.write(0, &data).unwrap();
    let words: Vec<AtomicU64> = (0..Residency::required_words(geometry))
        .map(|_| AtomicU64::new(0))
        .collect();
    let residency = Arc::new(Residency::new(geometry, Box::new(words)));
    residency.mark_clean(BlockRange::new(0, geometry.blocks() - 1));
    let config = ExportConfig {
        name: "disk".into(),
        image: PathBuf::from("memory"),
        state_dir: None,
        block_bytes: 4096,
        read_only: false,
        engine: Engine::Auto,
        transport: Transport::Auto,
        compress: crate::config::Packing::Auto,
        source: Some(SourceConfig {
            handoff: HandoffPolicy::Now,
            verify: required,
            background: false,
            ..SourceConfig::new("memory")
        }),
    };
    let parts = Parts {
        config: &config,
        geometry,
        store: Arc::clone(&store) as Arc<dyn Store>,
        state: None,
        had_source: true,
        clock: system_clock(),
        heat_place: None,
        make_state: None,
    };
    let volume = parts.moving(Moving {
        arrival: None,
        wanted: config.source.as_ref().unwrap(),
        source: Arc::clone(&source) as Arc<dyn Source>,
        residency,
        witnesses: Witnesses::new(1),
        at_completion: Box::new(|| ()),
        at_release: Box::new(|| ()),
    });
    let relocation = volume.relocation().unwrap();
    relocation.start();
    World {
        volume,
        source,
        store,
        relocation,
    }
}

impl World {
    /// Answers what the comparison asks until it ends.
    fn finish(&self) -> VerifyStatus {
        until("the comparison ends", || {
            self.source.complete_all();
            self.volume.verify_status().state != VerifyState::Running
        });
        self.volume.verify_status()
    }
}

#[test]
fn a_block_written_while_it_is_looked_at_is_no_difference() {
    let w = world(false);
    w.volume.begin_verify().unwrap();
    until("it asks", || w.source.pending() > 0);
    // The source's bytes are on their way when the guest writes.
    let written = vec![0xee; 4096];
    let relocation = Some(&w.relocation);
    w.volume.write(relocation, 5 * BLOCK, &written).unwrap();
    let status = w.finish();
    assert_eq!(status.state, VerifyState::Equal);
    assert_eq!(status.method, Some(VerifyMethod::DataOverLink));
    assert_eq!(status.owned_bytes, BLOCK);
    assert_eq!(status.absent_bytes, BLOCK);
    assert_eq!(status.verified_bytes, DISK - 2 * BLOCK);
    assert_eq!(status.checked_bytes, DISK);
}

#[test]
fn what_differs_is_found_to_the_block_whichever_side_is_wrong() {
    let w = world(false);
    w.store.write(7 * BLOCK + 100, &[0]).unwrap();
    let there = usize::try_from(8 * BLOCK + 4095).unwrap();
    w.source.write(there, &[0]);
    w.source.write(there + (100 << 10), &[0]);
    w.volume.begin_verify().unwrap();
    let status = w.finish();
    assert_eq!(status.state, VerifyState::Differs);
    let at = |offset, len| Difference { offset, len };
    let expected = [at(7 * BLOCK, 2 * BLOCK), at(33 * BLOCK, BLOCK)];
    assert_eq!(status.differences, expected);
    assert_eq!(status.differing_bytes, 3 * BLOCK);
    assert!(!status.withheld, "not everything is here yet");
}

#[test]
fn what_cannot_be_compared_is_a_failure_and_a_lost_source_is_waited_for() {
    let w = world(false);
    w.volume.begin_verify().unwrap();
    until("it asks", || w.source.pending() > 0);
    w.source.set_connected(false);
    w.source.set_connected(true);
    until("it asks again", || w.source.pending() > 0);
    w.source.fail(0, SourceErrorKind::Untrusted);
    until("and again", || w.source.pending() > 0);
    w.source.fail(0, SourceErrorKind::Refused);
    let status = w.finish();
    assert_eq!(status.state, VerifyState::Failed);
    assert!(status.unreadable_bytes > 0 && !status.message.is_empty());
    assert_eq!(status.checked_bytes, DISK);
}

#[test]
fn it_can_be_ended_and_a_standby_has_nothing_to_compare() {
    let w = world(false);
    w.volume.begin_verify().unwrap();
    until("it asks", || w.source.pending() > 0);
    w.volume.verification.end();
    assert_eq!(w.volume.verify_status().state, VerifyState::Stopped);
    w.volume.set_life(LifeState::Standby);
    let refused = w.volume.begin_verify().unwrap_err().to_string();
    assert!(refused.contains("still runs at the source"), "{refused}");
}

/// Fetches the last block, so that everything is here.
fn all_here(w: &World) {
    let last = w.volume.geometry().blocks() - 1;
    let bytes = w.volume.geometry().bytes(BlockRange::new(last, last + 1));
    w.relocation.read(bytes, Box::new(|_| {}));
    w.source.complete_all();
    until("everything is here", || {
        w.relocation.tick();
        w.relocation.with_mover(|m| m.phase()) == Phase::Complete
    });
}

#[test]
fn a_required_comparison_comes_before_the_end() {
    let w = world(true);
    // One that began too early does not count.
    w.volume.begin_verify().unwrap();
    assert_eq!(w.finish().state, VerifyState::Equal);
    all_here(&w);
    w.volume.complete().unwrap();
    assert!(!w.volume.is_local(), "compared first");
    assert!(w.volume.verify_status().withheld);
    let status = w.finish();
    assert_eq!(status.state, VerifyState::Equal);
    assert_eq!(status.verified_bytes, DISK);
    w.volume.complete().unwrap();
    assert!(w.volume.is_local());
}

#[test]
fn differences_keep_the_source_until_somebody_decides() {
    for required in [true, false] {
        let w = world(required);
        w.source.write(5000, &[0]);
        if !required {
            w.volume.begin_verify().unwrap();
            assert_eq!(w.finish().state, VerifyState::Differs);
        }
        all_here(&w);
        w.volume.complete().unwrap();
        assert_eq!(w.finish().state, VerifyState::Differs);
        for _ in 0..2 {
            w.volume.complete().unwrap();
            assert!(!w.volume.is_local() && w.volume.verify_status().withheld);
        }
        let note = w.volume.verify_note().unwrap();
        assert!(note.contains("4096 bytes differ"), "{note}");
        if required {
            // What was wrong is put right, and compared again.
            w.source.write(5000, &[(5000_u64.to_le_bytes()[1]) | 1]);
            w.volume.begin_verify().unwrap();
            assert_eq!(w.finish().state, VerifyState::Equal);
            assert!(w.volume.accept_differences().is_err(), "there are none");
        } else {
            w.volume.accept_differences().unwrap();
        }
        w.volume.complete().unwrap();
        assert!(w.volume.is_local());
    }
}

#[test]
fn the_gate_opens_for_good_reasons_only() {
    use VerifyState::{Differs, Equal, Failed, None, Running, Stopped};
    for (state, whole, gate, gate_if_required) in [
        (None, false, Gate::Open, Gate::CompareFirst),
        (Running, true, Gate::Shut, Gate::Shut),
        (Equal, false, Gate::Open, Gate::CompareFirst),
        (Equal, true, Gate::Open, Gate::Open),
        (Differs, true, Gate::Shut, Gate::Shut),
        (Failed, true, Gate::Open, Gate::Shut),
        (Stopped, true, Gate::Open, Gate::CompareFirst),
    ] {
        let mut now = State {
            whole,
            ..State::default()
        };
        now.status.state = state;
        assert_eq!(now.gate(false), gate, "{state:?}");
        assert_eq!(now.gate(true), gate_if_required, "{state:?}");
        now.accepted = true;
        assert_eq!(now.gate(true), Gate::Open);
    }
}

#[test]
fn the_list_of_differences_is_ordered_joined_and_bounded() {
    let mut list = Vec::new();
    for offset in [40, 10, 30, 20, 100] {
        add(&mut list, Difference { offset, len: 10 });
    }
    let at = |offset, len| Difference { offset, len };
    assert_eq!(list, [at(10, 40), at(100, 10)]);
    for n in 0..200 {
        add(&mut list, at(1000 + n * 20, 10));
    }
    assert_eq!(list.len(), MAX_DIFFERENCES);
}
