//! What has gone wrong once, or must never, told one case at a time: on one thread where that
//! does, over media in memory, with a source that answers when the test says so. Whole lives, with
//! everything that can happen to them at once, are the simulator's (`testkit/sim`).

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64 as StdAtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_engine::geometry::{ByteRange, Geometry};
use hikkoshi_engine::residency::{PlaneMemory, Residency};
use hikkoshi_engine::sync::AtomicU64;
use hikkoshi_store::medium::MemoryDirectory;
use hikkoshi_store::state::{Identity, Life, StateDir};
use hikkoshi_store::{MemoryStore, Store};
use hikkoshi_wan::{MemorySource, Source};

use super::assemble::{Moving, Parts};
use super::relocation::{ReadEnd, Relocation};
use super::{Volume, lock};
use crate::config::{Engine, ExportConfig, HandoffPolicy, SourceConfig};
use crate::status::LifeState;

const DISK: usize = 96 * 4096 + 512;

/// Words that outlive the volume, as a shared mapping outlives a process.
#[derive(Clone)]
struct SharedWords(Arc<Vec<AtomicU64>>);

impl PlaneMemory for SharedWords {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

fn words(g: Geometry) -> SharedWords {
    let words = (0..Residency::required_words(g)).map(|_| AtomicU64::new(0));
    SharedWords(Arc::new(words.collect()))
}

fn geometry() -> Geometry {
    Geometry::new(DISK as u64, 4096).unwrap()
}

/// The disk at the source: data everywhere, another byte in each sector.
fn original() -> Vec<u8> {
    (0..DISK)
        .map(|n| u8::try_from(n / 512 % 251).unwrap() | 1)
        .collect()
}

struct World {
    config: ExportConfig,
    store: Arc<MemoryStore>,
    dir: MemoryDirectory,
    words: SharedWords,
    source: Arc<MemorySource>,
    volume: Arc<Volume>,
    clock_ms: Arc<StdAtomicU64>,
}

/// How a read ended: with these bytes of the source, or with what the image holds now.
type End = Arc<Mutex<Option<Vec<u8>>>>;

impl World {
    fn new(handoff: HandoffPolicy) -> Self {
        let dir = MemoryDirectory::default();
        let identity = Identity {
            volume_id: [1; 16],
            geometry: geometry(),
            generation: 0,
            life: if handoff == HandoffPolicy::Now {
                Life::Arriving
            } else {
                Life::Standby
            },
            source_uri: "memory".into(),
            incarnation: [2; 16],
            image_inode: None,
        };
        let state = StateDir::create_in(Box::new(dir.clone()), identity, None).unwrap();
        let config = ExportConfig {
            name: String::new(),
            image: PathBuf::from("memory"),
            state_dir: None,
            block_bytes: 4096,
            read_only: false,
            engine: Engine::Auto,
            source: Some(SourceConfig {
                handoff,
                ..SourceConfig::new("memory")
            }),
        };
        let (store, words) = (Arc::new(MemoryStore::new(DISK as u64)), words(geometry()));
        let residency = Residency::new(geometry(), Box::new(words.clone()));
        let source = MemorySource::new(original(), None);
        let clock_ms = Arc::default();
        let volume = assemble(&config, &store, &source, state, residency, &clock_ms);
        Self {
            config,
            store,
            dir,
            words,
            source,
            volume,
            clock_ms,
        }
    }

    fn relocation(&self) -> Option<Arc<Relocation>> {
        self.volume.relocation()
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let relocation = self.relocation();
        self.volume
            .write(relocation.as_ref(), offset, data)
            .unwrap();
    }

    /// A read of what is not all here.
    fn read(&self, offset: u64, len: u64) -> End {
        let end = End::default();
        let (told, store) = (Arc::clone(&end), Arc::clone(&self.store));
        let done = move |how: ReadEnd<'_>| {
            let bytes = match how {
                ReadEnd::Bytes(bytes) => bytes.into_owned(),
                ReadEnd::Resident => {
                    let mut bytes = vec![0; usize::try_from(len).unwrap()];
                    store.read(offset, &mut bytes).unwrap();
                    bytes
                }
                ReadEnd::Failed(why) => panic!("a read failed: {why:?}"),
            };
            assert!(lock(&told).replace(bytes).is_none(), "answered twice");
        };
        let relocation = self.relocation().unwrap();
        relocation.read(ByteRange::at(offset, len), Box::new(done));
        end
    }

    fn restart(&mut self, store: MemoryStore, dir: MemoryDirectory, kill: bool) {
        let connected = self.source.is_connected();
        (self.store, self.dir) = (Arc::new(store), dir);
        let mut state = StateDir::open_in(Box::new(self.dir.clone()), None).unwrap();
        self.source = MemorySource::new(original(), None);
        self.source.set_connected(connected);
        let residency = if kill {
            Residency::recover(geometry(), Box::new(self.words.clone()))
        } else {
            self.words = words(geometry());
            let residency = Residency::new(geometry(), Box::new(self.words.clone()));
            state.load(&residency).unwrap();
            residency
        };
        let (config, source, clock) = (&self.config, &self.source, &self.clock_ms);
        state
            .checkpoint(&residency, &mut || self.store.sync())
            .unwrap();
        self.volume = assemble(config, &self.store, source, state, residency, clock);
    }

    /// Lets everything come in, and compares every byte.
    fn finish(&self, expected: &[u8]) {
        self.source.set_connected(true);
        self.volume.hand_off().unwrap();
        let mut committed = Duration::ZERO;
        for _ in 0..1000 {
            self.source.complete_all();
            self.clock_ms.fetch_add(20, Ordering::Relaxed);
            if !self.volume.keep_time(&mut committed) {
                break;
            }
            // Something to do, so that it does not wait for it.
            self.volume.commit_soon();
            self.volume.do_duties();
        }
        assert!(self.volume.is_local(), "the move never ends");
        assert!(
            self.store.content() == expected,
            "the image is not what was written"
        );
    }
}

fn assemble(
    config: &ExportConfig,
    store: &Arc<MemoryStore>,
    source: &Arc<MemorySource>,
    state: StateDir,
    residency: Residency,
    clock_ms: &Arc<StdAtomicU64>,
) -> Arc<Volume> {
    let ms = Arc::clone(clock_ms);
    let parts = Parts {
        config,
        geometry: geometry(),
        store: Arc::clone(store) as Arc<dyn Store>,
        state: Some(state),
        had_source: true,
        clock: Arc::new(move || Duration::from_millis(ms.load(Ordering::Relaxed))),
    };
    let volume = parts.moving(Moving {
        wanted: config.source.as_ref().unwrap(),
        source: Arc::clone(source) as Arc<dyn Source>,
        residency: Arc::new(residency),
        at_completion: Box::new(|| {}),
    });
    volume.relocation().unwrap().start();
    volume
}

/// Before the handoff a read shows the source's bytes of now, and leaves nothing behind: the VM
/// still writes there.
#[test]
fn nothing_that_was_read_before_the_handoff_is_kept() {
    let world = World::new(HandoffPolicy::FirstWrite);
    let mut expected = original();
    let end = world.read(0, 4096);
    world.source.complete_all();
    assert_eq!(lock(&end).take().unwrap(), expected[..4096]);
    assert!(
        world.store.content().iter().all(|b| *b == 0),
        "a block was kept"
    );
    world.source.write(0, &[0x55; 4096]);
    expected[..4096].fill(0x55);
    let end = world.read(0, 4096);
    world.source.complete_all();
    assert_eq!(lock(&end).take().unwrap(), expected[..4096]);
    assert_eq!(world.volume.life(), LifeState::Standby);
    world.finish(&expected);
}

/// A block that was asked for before the handoff, and answered after it, is as old as the
/// question: the VM may have written it at the source in between.
#[test]
fn an_answer_from_before_the_handoff_is_not_kept_after_it() {
    let world = World::new(HandoffPolicy::FirstWrite);
    let end = world.read(8192, 4096);
    world.volume.hand_off().unwrap();
    // The answer to the first question comes last.
    while world.source.pending() > 1 {
        world.source.complete(1);
    }
    let residency = Arc::clone(&world.relocation().unwrap().residency);
    let before = residency.resident_blocks();
    world.source.complete(0);
    assert_eq!(lock(&end).take().unwrap(), original()[8192..][..4096]);
    assert_eq!(
        residency.resident_blocks(),
        before,
        "the old answer was kept"
    );
    world.finish(&original());
}

#[test]
fn a_write_before_the_commanded_handoff_is_refused_and_changes_nothing() {
    let world = World::new(HandoffPolicy::Command);
    let relocation = world.relocation();
    let error = world
        .volume
        .write(relocation.as_ref(), 0, &[1; 512])
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(1));
    assert_eq!(world.volume.life(), LifeState::Standby);
    assert!(world.store.content().iter().all(|b| *b == 0));
}

/// A sub-block write into an absent block is answered while the source is away, and the rest of
/// the block comes around it later.
#[test]
fn a_small_write_never_waits_for_the_source() {
    let mut world = World::new(HandoffPolicy::Now);
    world.source.set_connected(false);
    world.write(4096 * 3 + 512, &[0xab; 1024]);
    world.volume.commit().unwrap();
    let (store, dir) = (world.store.kill(), world.dir.kill());
    world.restart(store, dir, true);
    // Nothing that was not synced is left.
    let (store, dir) = (
        world.store.power_cut(&mut |_| 0),
        world.dir.power_cut(&mut |_| 0),
    );
    world.restart(store, dir, false);
    let mut expected = original();
    expected[4096 * 3 + 512..][..1024].fill(0xab);
    world.finish(&expected);
}

/// A read over many separate absent runs ended the process of an ancestor of this program, which
/// had room for 32.
#[test]
fn a_read_over_many_absent_runs_is_answered() {
    let world = World::new(HandoffPolicy::Now);
    world.source.set_connected(false);
    let mut expected = original();
    for block in (0..96).step_by(2) {
        world.write(block * 4096, &[7; 4096]);
        let at = usize::try_from(block).unwrap() * 4096;
        expected[at..at + 4096].fill(7);
    }
    let end = world.read(0, 96 * 4096);
    assert!(lock(&end).is_none());
    world.finish(&expected);
    assert_eq!(lock(&end).take().unwrap(), expected[..96 * 4096]);
}

#[test]
fn a_failed_sync_poisons_the_volume() {
    let world = World::new(HandoffPolicy::Now);
    world.dir.fail_after(Some(0));
    world.write(0, &[1; 4096]);
    assert!(world.volume.commit().is_err());
    world.dir.fail_after(None);
    assert!(world.volume.commit().is_err(), "a retry made it believed");
    let relocation = world.relocation();
    assert!(
        world
            .volume
            .write(relocation.as_ref(), 0, &[1; 4096])
            .is_err()
    );
}

/// Between the durable handoff and the mover's knowing of it, a read of a partly written block
/// could pass by the write to the source. The simulator steps between the two as well; here it is real
/// threads that try.
#[test]
fn no_read_passes_by_the_first_write() {
    for _ in 0..200 {
        let world = World::new(HandoffPolicy::FirstWrite);
        let relocation = world.relocation();
        let (volume, source) = (&world.volume, &world.source);
        std::thread::scope(|scope| {
            for sector in 0..2_u64 {
                let relocation = relocation.as_ref();
                scope.spawn(move || {
                    let value = 0xa0 + u8::try_from(sector).unwrap();
                    volume
                        .write(relocation, sector * 512, &[value; 512])
                        .unwrap();
                    let end = Arc::new(Mutex::new(None));
                    let told = Arc::clone(&end);
                    let bytes = ByteRange::at(sector * 512, 512);
                    let done = move |how: ReadEnd<'_>| {
                        *lock(&told) = Some(match how {
                            ReadEnd::Bytes(bytes) => bytes.to_vec(),
                            _ => Vec::new(),
                        });
                    };
                    relocation.unwrap().read(bytes, Box::new(done));
                    while lock(&end).is_none() {
                        if source.pending() > 0 {
                            source.complete_all();
                        }
                        std::thread::yield_now();
                    }
                    let seen = lock(&end).take().unwrap();
                    assert!(
                        seen.is_empty(),
                        "a read went to the source after a write was answered"
                    );
                });
            }
        });
    }
}
