//! What is asked of the source together with the handoff: nothing of it counts before the source has
//! said what changed, and of that nothing but what did not.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_engine::geometry::{ByteRange, Geometry};
use hikkoshi_engine::residency::Residency;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::medium::MemoryDirectory;
use hikkoshi_store::state::{Identity, Life, StateDir, Ties};
use hikkoshi_store::{MemoryStore, Store};
use hikkoshi_wan::transport::session::{Attached, Boots, HandedOver, OldCopy, Stance, Tell, Told};
use hikkoshi_wan::{MemorySource, MoveLink, Source, SourceError, SourceErrorKind, Ticket};

use super::arrival::Arrival;
use super::assemble::{Moving, Parts};
use super::relocation::ReadEnd;
use super::tests::{DISK, config, original, words};
use super::{Volume, lock};
use crate::config::HandoffPolicy;
use crate::status::LifeState;

const BLOCK: u64 = 4096;
const EPOCH: u64 = 7;

type Answered = Result<Told, SourceError>;

/// What is said of the move is answered by the test. Under which tracking the handoff was asked for last.
#[derive(Default)]
struct Script(
    Mutex<Option<Box<dyn FnOnce() -> Answered + Send>>>,
    AtomicU64,
);

impl MoveLink for Script {
    fn tell(&self, tell: &Tell, _: Duration) -> Answered {
        let Tell::Handoff { epoch, .. } = tell else {
            panic!("{tell:?}");
        };
        self.1.store(*epoch, Ordering::Relaxed);
        let answer = lock(&self.0).take();
        answer.expect("asked for once")()
    }

    fn interrupt(&self) {}

    fn hang_up(&self) {}
}

fn attached(epoch: u64) -> Attached {
    Attached {
        generation: 0,
        epoch,
        handed_over: HandedOver::NotYet,
        old_copy: OldCopy::Unknown,
        boots: Boots::NONE,
    }
}

/// A destination that is about to hand off as it starts.
struct Start {
    volume: Arc<Volume>,
    store: Arc<MemoryStore>,
    source: Arc<MemorySource>,
    script: Arc<Script>,
    ticket: Arc<Ticket>,
    clock_ms: Arc<AtomicU64>,
}

impl Start {
    fn new() -> Self {
        Self::with(EPOCH)
    }

    fn with(epoch: u64) -> Self {
        let geometry = Geometry::new(DISK, 4096).unwrap();
        let identity = Identity {
            volume_id: [1; 16],
            geometry,
            generation: 0,
            life: Life::Standby,
            source_uri: "memory".into(),
            incarnation: [2; 16],
            image_inode: None,
            ties: Ties {
                fenced_source: true,
                ..Ties::default()
            },
        };
        let dir = Box::new(MemoryDirectory::default());
        let state = StateDir::create_in(dir, identity, None).unwrap();
        let config = config(HandoffPolicy::Now);
        let wanted = config.source.clone().unwrap();
        let ticket = Ticket::new([1; 16], None, Stance::Standby, true);
        ticket.was_told(attached(epoch));
        let script = Arc::new(Script::default());
        let link = Arc::clone(&script) as Arc<dyn MoveLink>;
        let store = Arc::new(MemoryStore::new(DISK));
        let source = MemorySource::new(original(), Some(4096));
        let clock_ms = Arc::new(AtomicU64::new(0));
        let ms = Arc::clone(&clock_ms);
        let parts = Parts {
            config: &config,
            geometry,
            store: Arc::clone(&store) as Arc<dyn Store>,
            state: Some(state),
            had_source: true,
            clock: Arc::new(move || Duration::from_millis(ms.load(Ordering::Relaxed))),
            heat_place: None,
            make_state: None,
        };
        let volume = parts.moving(Moving {
            arrival: Some(Arrival::new(Arc::clone(&ticket), link, &wanted, geometry)),
            wanted: &wanted,
            source: Arc::clone(&source) as Arc<dyn Source>,
            residency: Arc::new(Residency::new(geometry, Box::new(words(geometry)))),
            witnesses: Witnesses::new(1),
            at_completion: Box::new(|| ()),
            at_release: Box::new(|| ()),
        });
        volume.relocation().unwrap().start();
        Self {
            volume,
            store,
            source,
            script,
            ticket,
            clock_ms,
        }
    }

    /// Hands off; the source answers by this.
    fn hand_off(&self, answer: impl FnOnce() -> Answered + Send + 'static) -> std::io::Result<()> {
        *lock(&self.script.0) = Some(Box::new(answer));
        self.volume.hand_off()
    }

    fn image(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(DISK).unwrap()];
        self.store.read(0, &mut bytes).unwrap();
        bytes
    }

    fn missing(&self) -> u64 {
        self.volume.relocation().unwrap().residency.missing_blocks()
    }

    /// Lets the source answer until all is here.
    fn arrive(&self) {
        for _ in 0..1000 {
            self.source.complete_all();
            self.clock_ms.fetch_add(20, Ordering::Relaxed);
            let relocation = self.volume.relocation().unwrap();
            relocation.tick();
            if relocation.residency.missing_blocks() == 0 {
                return;
            }
        }
        panic!("{} blocks never come", self.missing());
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        if let Some(relocation) = self.volume.relocation() {
            relocation.retire();
        }
    }
}

fn fenced(ranges: Option<Vec<ByteRange>>) -> Answered {
    Ok(Told::Fenced {
        generation: 3,
        ranges,
    })
}

fn blocks(first: u64, count: u64) -> ByteRange {
    ByteRange::at(first * BLOCK, count * BLOCK)
}

/// The round trip that this is for: the source is asked for data while the handoff is on its way, and
/// what has come is not asked for again. Until then it is as if nothing had come.
#[test]
fn what_comes_before_the_handoff_is_settled_counts_afterwards() {
    let start = Arc::new(Start::new());
    assert_eq!(start.source.pending(), 0);
    let during = Arc::clone(&start);
    let answer = move || {
        assert!(start_has_asked(&during) > 0);
        during.source.complete_all();
        assert!(during.image().iter().all(|byte| *byte == 0), "it was kept");
        assert_eq!(during.missing(), DISK.div_ceil(BLOCK));
        assert_eq!(during.volume.life(), LifeState::Standby);
        fenced(Some(Vec::new()))
    };
    start.hand_off(answer).unwrap();
    assert_eq!(start.volume.life(), LifeState::Arriving);
    let image = start.image();
    assert!(image[..4096] == original()[..4096], "it was thrown away");
    let read = start.source.counters().read_bytes;
    start.arrive();
    assert!(start.image() == original());
    let read_in_all = start.source.counters().read_bytes;
    assert!(read > 0 && read_in_all <= DISK, "{read_in_all} bytes");
}

fn start_has_asked(start: &Start) -> usize {
    let requests = start.source.requests();
    requests.iter().filter(|request| !request.extents).count()
}

/// What the VM has written between the first question and the fence is asked for again, zeroes that it
/// has filled included.
#[test]
fn what_has_changed_meanwhile_is_asked_for_again() {
    for late in [false, true] {
        let start = Arc::new(Start::new());
        let during = Arc::clone(&start);
        let answer = move || {
            if !late {
                during.source.complete_all();
            }
            during.source.write(2 * 4096, &[0xab; 4096]);
            // Of what was told to be zero.
            during.source.write(12 * 4096, &[0xcd; 4096]);
            fenced(Some(vec![blocks(2, 1), blocks(12, 1)]))
        };
        start.hand_off(answer).unwrap();
        start.arrive();
        let mut now = original();
        now[2 * 4096..3 * 4096].fill(0xab);
        now[12 * 4096..13 * 4096].fill(0xcd);
        assert!(start.image() == now, "late: {late}");
    }
}

/// A source that has lost count (it was started anew) says so, and nothing counts.
#[test]
fn where_nobody_knows_what_has_changed_all_is_asked_for_again() {
    let start = Arc::new(Start::new());
    let during = Arc::clone(&start);
    let all_new = vec![0x5a; usize::try_from(DISK).unwrap()];
    let disk = all_new.clone();
    let answer = move || {
        during.source.complete_all();
        during.source.write(0, &disk);
        fenced(None)
    };
    start.hand_off(answer).unwrap();
    assert_eq!(start.missing(), DISK.div_ceil(BLOCK));
    start.arrive();
    assert!(start.image() == all_new);
}

/// The source was started anew between two attempts at the handoff. What it tells at the second one is
/// what has changed under its new tracking, and nothing of what was written before that.
#[test]
fn what_was_asked_under_another_tracking_does_not_count() {
    for answered_late in [false, true] {
        let start = Arc::new(Start::new());
        let during = Arc::clone(&start);
        let answer = move || {
            if !answered_late {
                during.source.complete_all();
            }
            Err(SourceError::new(SourceErrorKind::Refused, "not now"))
        };
        assert!(start.hand_off(answer).is_err());
        assert_eq!(start.script.1.load(Ordering::Relaxed), EPOCH);
        start.ticket.was_told(attached(EPOCH + 1));
        let during = Arc::clone(&start);
        let answer = move || {
            if answered_late {
                during.source.complete_all();
            }
            // Written after it was read, and before the new tracking began.
            during.source.write(0, &[0xab; 8 * 4096]);
            fenced(Some(Vec::new()))
        };
        start.hand_off(answer).unwrap();
        assert_eq!(start.script.1.load(Ordering::Relaxed), EPOCH + 1);
        start.arrive();
        let mut now = original();
        now[..8 * 4096].fill(0xab);
        assert!(start.image() == now, "answered late: {answered_late}");
    }
}

#[test]
fn a_handoff_that_is_refused_leaves_nothing() {
    let start = Arc::new(Start::new());
    let during = Arc::clone(&start);
    let answer = move || {
        during.source.complete(0);
        Err(SourceError::new(SourceErrorKind::Refused, "it is off"))
    };
    assert!(start.hand_off(answer).is_err());
    start.source.complete_all();
    start.volume.relocation().unwrap().tick();
    assert_eq!(start.volume.life(), LifeState::Standby);
    assert!(start.image().iter().all(|byte| *byte == 0), "it was kept");
    assert_eq!(start.missing(), DISK.div_ceil(BLOCK));
}

/// Whoever stands by is served, and a handoff at the start may not get through for long: what is read meanwhile is
/// answered by the source, and so it is once the move was given up. What was asked early still counts for nothing.
#[test]
fn reads_are_answered_while_no_handoff_is() {
    let start = Arc::new(Start::new());
    let read = |block: u64| {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&answers);
        let done = move |end: ReadEnd<'_>| {
            let ReadEnd::Bytes(bytes) = end else {
                panic!("it was not the source that answered");
            };
            lock(&told).push(bytes.to_vec());
        };
        let relocation = start.volume.relocation().unwrap();
        relocation.read(blocks(block, 1), Box::new(done));
        start.source.complete_all();
        relocation.tick();
        let at = usize::try_from(block * BLOCK).unwrap();
        assert_eq!(*lock(&answers), [&original()[at..at + 4096]]);
    };
    let refused = || -> Answered { Err(SourceError::new(SourceErrorKind::Refused, "not now")) };
    assert!(start.hand_off(refused).is_err());
    read(40);
    // What the copy has asked for as well.
    read(0);
    assert!(start.hand_off(refused).is_err());
    read(41);
    // It does not wait for the source to hear of it.
    start.volume.arrival.as_ref().unwrap().stop();
    start.volume.give_up().unwrap();
    read(42);
    let relocation = start.volume.relocation().unwrap();
    for _ in 0..100 {
        start.source.complete_all();
        start.clock_ms.fetch_add(20, Ordering::Relaxed);
        relocation.tick();
    }
    read(43);
    assert!(start.image().iter().all(|byte| *byte == 0), "it was kept");
    assert_eq!(start.missing(), DISK.div_ceil(BLOCK));
}

/// What had come of an answer when its connection was lost counts for nothing, and neither does what
/// comes from a source that does not track changes.
#[test]
fn what_cannot_be_vouched_for_is_not_kept() {
    let start = Arc::new(Start::new());
    let during = Arc::clone(&start);
    let answer = move || {
        during.source.set_connected(false);
        during.source.set_connected(true);
        fenced(Some(Vec::new()))
    };
    start.hand_off(answer).unwrap();
    assert_eq!(start.missing(), DISK.div_ceil(BLOCK));
    start.arrive();
    assert!(start.image() == original());

    let untracked = Start::with(0);
    untracked.volume.relocation().unwrap().tick();
    assert_eq!(untracked.source.pending(), 0);
    let Some(arrival) = &untracked.volume.arrival else {
        panic!("it has a source of ours");
    };
    untracked.volume.ask_early(arrival);
    assert_eq!(untracked.source.pending(), 0);
}

struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % n
    }
}

/// Whatever the VM writes and whatever is answered before the fence: what arrives is the disk as it was
/// behind the fence.
#[test]
fn the_disk_that_arrives_is_that_behind_the_fence() {
    for seed in 0..300_u64 {
        let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let start = Arc::new(Start::new());
        let disk = Arc::new(Mutex::new(original()));
        let (during, now) = (Arc::clone(&start), Arc::clone(&disk));
        let answer = move || {
            let source = &during.source;
            let mut changed = Vec::new();
            for _ in 0..chance.below(40) {
                let pending = u64::try_from(source.pending()).unwrap();
                let mut any = || usize::try_from(chance.below(pending)).unwrap();
                let which = if pending > 0 { any() } else { 0 };
                match chance.below(9) {
                    0..=3 if pending > 0 => source.complete(which),
                    4 if pending > 0 => source.fail(which, SourceErrorKind::Disconnected),
                    5 => {
                        during.clock_ms.fetch_add(20, Ordering::Relaxed);
                        during.volume.relocation().unwrap().tick();
                    }
                    0..=4 => {}
                    _ => {
                        let first = chance.below(96);
                        let range = blocks(first, 1 + chance.below((96 - first).min(8)));
                        let (from, to) = (range.start, range.end);
                        let with = u8::try_from(chance.below(256)).unwrap();
                        let from = usize::try_from(from).unwrap();
                        let bytes = from..usize::try_from(to).unwrap();
                        source.write(from, &vec![with; bytes.len()]);
                        lock(&now)[bytes].fill(with);
                        changed.push(range);
                    }
                }
            }
            // One that was started anew meanwhile does not know.
            fenced((chance.below(5) > 0).then_some(changed))
        };
        start.hand_off(answer).unwrap();
        start.arrive();
        assert!(start.image() == *lock(&disk), "seed {seed}");
    }
}
