//! What has gone wrong once, or must never, told one case at a time: on one thread where that
//! does, over media in memory, with a source that answers when the test says so. Whole lives, with
//! everything that can happen to them at once, are the simulator's (`testkit/sim`).

#![allow(
    clippy::cast_possible_truncation,
    reason = "a disk of a few hundred KiB"
)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64 as StdAtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_engine::geometry::{ByteRange, Geometry};
use hikkoshi_engine::residency::{PlaneMemory, Residency};
use hikkoshi_engine::sync::AtomicU64;
use hikkoshi_store::medium::MemoryDirectory;
use hikkoshi_store::state::{Identity, Life, StateDir, Ties};
use hikkoshi_store::{MemoryStore, Store, ZeroMode};
use hikkoshi_wan::{MemorySource, Source};

use super::assemble::{Moving, Parts};
use super::guest::ReadNow;
use super::relocation::{ReadEnd, Relocation};
use super::{Clock, Volume, lock};
use crate::config::{Engine, ExportConfig, HandoffPolicy, SourceConfig, Transport};
use crate::status::LifeState;

pub(super) const DISK: u64 = 96 * 4096 + 512;
const SECTOR: usize = 512;

/// Words that outlive the volume, as a shared mapping outlives a process.
#[derive(Clone)]
pub(super) struct SharedWords(Arc<Vec<AtomicU64>>);

impl PlaneMemory for SharedWords {
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

pub(super) fn words(g: Geometry) -> SharedWords {
    SharedWords(Arc::new(
        (0..Residency::required_words(g))
            .map(|_| AtomicU64::new(0))
            .collect(),
    ))
}

/// What a byte range may hold.
pub(super) struct Oracle {
    /// What a read must give: the last write that was answered.
    pub(super) now: Vec<u8>,
    /// What every sector held at the last flush, and everything that was written to it since.
    since_flush: HashMap<usize, Vec<[u8; SECTOR]>>,
}

impl Oracle {
    pub(super) fn new(now: Vec<u8>) -> Self {
        Self {
            now,
            since_flush: HashMap::new(),
        }
    }

    fn sector(&self, n: usize) -> [u8; SECTOR] {
        self.now[n * SECTOR..(n + 1) * SECTOR].try_into().unwrap()
    }

    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        let sectors = offset / SECTOR..(offset + data.len()).div_ceil(SECTOR);
        for n in sectors.clone() {
            let before = self.sector(n);
            self.since_flush.entry(n).or_insert_with(|| vec![before]);
        }
        self.now[offset..offset + data.len()].copy_from_slice(data);
        for n in sectors {
            let after = self.sector(n);
            self.since_flush.get_mut(&n).unwrap().push(after);
        }
    }

    pub(super) fn flushed(&mut self) {
        self.since_flush.clear();
    }

    /// After a power cut: every sector holds what was flushed or something written since.
    pub(super) fn settle(&mut self, found: &[u8]) -> Result<(), String> {
        for n in 0..self.now.len() / SECTOR {
            let sector = &found[n * SECTOR..(n + 1) * SECTOR];
            let allowed = match self.since_flush.get(&n) {
                Some(values) => values.iter().any(|v| v == sector),
                None => self.sector(n) == sector,
            };
            if !allowed {
                return Err(format!(
                    "sector {n} holds what nobody wrote, or lost a flushed write"
                ));
            }
        }
        self.now.copy_from_slice(found);
        self.since_flush.clear();
        Ok(())
    }
}

/// How a read ended: in the image, with bytes of its own, or not at all.
pub(super) enum End {
    Resident,
    Bytes(Vec<u8>),
    Failed,
}

/// A read that waits, and how it ended.
pub(super) struct Waiting {
    bytes: ByteRange,
    /// What may be read: what was there when it was asked, and each later state of it.
    allowed: Vec<Vec<u8>>,
    end: Arc<Mutex<Option<End>>>,
}

pub(super) struct World {
    pub(super) geometry: Geometry,
    pub(super) config: ExportConfig,
    pub(super) store: Arc<MemoryStore>,
    pub(super) dir: MemoryDirectory,
    pub(super) words: SharedWords,
    pub(super) source: Arc<MemorySource>,
    pub(super) volume: Arc<Volume>,
    pub(super) clock_ms: Arc<StdAtomicU64>,
    pub(super) oracle: Oracle,
    pub(super) waiting: Vec<Waiting>,
    pub(super) original: Vec<u8>,
    pub(super) granularity: Option<u32>,
}

pub(super) fn config(handoff: HandoffPolicy) -> ExportConfig {
    ExportConfig {
        name: String::new(),
        image: PathBuf::from("memory"),
        state_dir: None,
        block_bytes: 4096,
        read_only: false,
        engine: Engine::Auto,
        transport: Transport::Auto,
        compress: crate::config::Packing::Auto,
        source: Some(SourceConfig {
            handoff,
            ..SourceConfig::new("memory")
        }),
    }
}

pub(super) fn original() -> Vec<u8> {
    let mut data: Vec<u8> = (0..DISK).map(|n| (n / 512 % 251) as u8 | 1).collect();
    // Holes, some aligned to blocks and some not.
    data[4096 * 10..4096 * 20].fill(0);
    data[4096 * 40 + 512..4096 * 47 + 1024].fill(0);
    data
}

impl World {
    pub(super) fn new(granularity: Option<u32>, handoff: HandoffPolicy) -> Self {
        Self::with_ties(granularity, handoff, Ties::default())
    }

    pub(super) fn with_ties(granularity: Option<u32>, handoff: HandoffPolicy, ties: Ties) -> Self {
        let geometry = Geometry::new(DISK, 4096).unwrap();
        let dir = MemoryDirectory::default();
        let life = if handoff == HandoffPolicy::Now {
            Life::Arriving
        } else {
            Life::Standby
        };
        let identity = Identity {
            volume_id: [1; 16],
            geometry,
            generation: 0,
            life,
            source_uri: "memory".into(),
            incarnation: [2; 16],
            image_inode: None,
            ties,
        };
        let state = StateDir::create_in(Box::new(dir.clone()), identity, None).unwrap();
        let store = Arc::new(MemoryStore::new(DISK));
        let words = words(geometry);
        let residency = Residency::new(geometry, Box::new(words.clone()));
        let clock_ms = Arc::new(StdAtomicU64::new(0));
        let source = MemorySource::new(original(), granularity);
        let config = config(handoff);
        let volume = assemble(&config, &store, &source, state, residency, &clock_ms);
        let original = original();
        let oracle = Oracle::new(original.clone());
        Self {
            geometry,
            config,
            store,
            dir,
            words,
            source,
            volume,
            clock_ms,
            oracle,
            waiting: Vec::new(),
            original,
            granularity,
        }
    }

    pub(super) fn relocation(&self) -> Option<Arc<Relocation>> {
        self.volume.relocation()
    }

    /// What the committing thread would do.
    pub(super) fn duties(&self) {
        let due = std::mem::take(&mut lock(&self.volume.committer.queue).complete);
        if due {
            self.volume.complete().unwrap();
        }
        self.volume.keep_witnesses(false);
    }

    pub(super) fn pass_time(&mut self, ms: u64) {
        self.clock_ms.fetch_add(ms, Ordering::Relaxed);
        if let Some(relocation) = self.relocation() {
            relocation.tick();
        }
        self.duties();
    }

    fn changed(&mut self, bytes: ByteRange) {
        for waiting in &mut self.waiting {
            if waiting.bytes.start < bytes.end && bytes.start < waiting.bytes.end {
                let now =
                    &self.oracle.now[waiting.bytes.start as usize..waiting.bytes.end as usize];
                waiting.allowed.push(now.to_vec());
            }
        }
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        self.mutate(ByteRange::at(offset, data.len() as u64), data, |v, r| {
            v.write(r, offset, data)
        });
    }

    pub(super) fn zero(&mut self, bytes: ByteRange) {
        let zeroes = vec![0; bytes.len() as usize];
        self.mutate(bytes, &zeroes, |v, r| {
            v.zero(r, bytes.start, bytes.len(), ZeroMode::MayPunch)
        });
    }

    /// A write by somebody who knows of no relocation.
    pub(super) fn write_past(&mut self, offset: u64, data: &[u8]) {
        self.volume.write(None, offset, data).unwrap();
        self.oracle.write(offset as usize, data);
    }

    /// A write that has to wait for the source needs somebody who lets the source answer.
    fn mutate(
        &mut self,
        bytes: ByteRange,
        data: &[u8],
        run: impl Fn(&Volume, Option<&Arc<Relocation>>) -> std::io::Result<()> + Sync,
    ) {
        let relocation = self.relocation();
        let sectors = bytes.start.is_multiple_of(512) && bytes.end.is_multiple_of(512);
        if sectors || relocation.is_none() {
            run(&self.volume, relocation.as_ref()).unwrap();
        } else {
            self.source.set_connected(true);
            let (volume, source) = (&self.volume, &self.source);
            std::thread::scope(|scope| {
                let writing = scope.spawn(|| run(volume, relocation.as_ref()).unwrap());
                while !writing.is_finished() {
                    source.complete_all();
                    self.clock_ms.fetch_add(20, Ordering::Relaxed);
                    if let Some(relocation) = volume.relocation() {
                        relocation.tick();
                    }
                    std::thread::yield_now();
                }
            });
        }
        self.oracle.write(bytes.start as usize, data);
        self.changed(bytes);
        self.duties();
    }

    pub(super) fn read(&mut self, offset: u64, len: usize) {
        let bytes = ByteRange::at(offset, len as u64);
        let relocation = self.relocation();
        let mut buf = vec![0; len];
        match self
            .volume
            .read_now(relocation.as_ref(), offset, &mut buf)
            .unwrap()
        {
            ReadNow::Done => {
                assert!(
                    buf == self.oracle.now[offset as usize..][..len],
                    "a stale or torn read"
                );
            }
            ReadNow::WouldBlock => panic!("memory never blocks"),
            ReadNow::Missing => {
                let end = Arc::new(Mutex::new(None));
                let told = Arc::clone(&end);
                let done = move |how: ReadEnd<'_>| {
                    let previous = lock(&told).replace(match how {
                        ReadEnd::Resident => End::Resident,
                        ReadEnd::Bytes(bytes) => End::Bytes(bytes.to_vec()),
                        ReadEnd::Failed(_) => End::Failed,
                    });
                    assert!(previous.is_none(), "answered twice");
                };
                relocation.unwrap().read(bytes, Box::new(done));
                let allowed = vec![self.oracle.now[offset as usize..][..len].to_vec()];
                self.waiting.push(Waiting {
                    bytes,
                    allowed,
                    end,
                });
            }
        }
        self.check_reads();
    }

    /// Reads that have ended must have seen one of the states that were there in between, in
    /// every sector.
    pub(super) fn check_reads(&mut self) {
        let store = Arc::clone(&self.store);
        self.waiting.retain(|waiting| {
            let Some(end) = lock(&waiting.end).take() else {
                return true;
            };
            let data = match end {
                End::Failed => return false,
                End::Bytes(data) => data,
                End::Resident => {
                    let mut buf = vec![0; waiting.bytes.len() as usize];
                    store.read(waiting.bytes.start, &mut buf).unwrap();
                    buf
                }
            };
            for at in 0..data.len() {
                assert!(
                    waiting.allowed.iter().any(|a| a[at] == data[at]),
                    "a wrong byte was read"
                );
            }
            false
        });
    }

    pub(super) fn flush(&mut self) {
        self.volume.commit().unwrap();
        self.oracle.flushed();
        self.duties();
    }

    fn restart(&mut self, store: MemoryStore, dir: MemoryDirectory, kill: bool) {
        self.waiting.clear();
        let connected = self.source.is_connected();
        let can_flush = self.source.info().can_flush;
        self.store = Arc::new(store);
        self.dir = dir;
        let mut state = StateDir::open_in(Box::new(self.dir.clone()), None).unwrap();
        let has_map = state.identity().keeps_map();
        if state.identity().life == Life::Local {
            self.source = MemorySource::new(vec![0xee; DISK as usize], None);
        } else {
            self.source = MemorySource::new(self.original.clone(), self.granularity);
            self.source.set_connected(connected);
            self.source.set_can_flush(can_flush);
        }
        let residency = if kill {
            Residency::recover(self.geometry, Box::new(self.words.clone()))
        } else {
            self.words = words(self.geometry);
            let residency = Residency::new(self.geometry, Box::new(self.words.clone()));
            if has_map {
                state.load(&residency).unwrap();
            }
            residency
        };
        if has_map {
            let store = Arc::clone(&self.store);
            state.checkpoint(&residency, &mut || store.sync()).unwrap();
        }
        if super::wayback::doubt(&state, self.store.modified().unwrap(), kill).is_some() {
            state.end_way_back().unwrap();
        }
        self.volume = assemble(
            &self.config,
            &self.store,
            &self.source,
            state,
            residency,
            &self.clock_ms,
        );
    }

    pub(super) fn kill(&mut self) {
        let (store, dir) = (self.store.kill(), self.dir.kill());
        self.restart(store, dir, true);
        // Nothing was lost and nothing is durable that was not: the oracle stays as it is.
    }

    pub(super) fn power_cut(&mut self, mut seed: u64) {
        let mut choose = move |n: u32| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % u64::from(n)) as u32
        };
        let (store, dir) = (
            self.store.power_cut(&mut choose),
            self.dir.power_cut(&mut choose),
        );
        self.restart(store, dir, false);
        let found = self.read_all();
        self.oracle.settle(&found).unwrap();
    }

    /// What a guest sees: the image where blocks are here, the source where they are not.
    pub(super) fn read_all(&self) -> Vec<u8> {
        let image = self.store.content();
        let Some(relocation) = self.relocation().filter(|_| !self.volume.is_local()) else {
            return image;
        };
        let mut seen = image;
        for (run, state) in relocation.residency.runs(self.geometry.all()) {
            for block in run.start..run.end {
                let block = hikkoshi_engine::geometry::BlockIndex(block);
                if state.is_resident() {
                    continue;
                }
                let mask = relocation.residency.partial_mask(block);
                let bytes = self
                    .geometry
                    .bytes(hikkoshi_engine::geometry::BlockRange::one(block));
                for sector in 0..self.geometry.sectors_in(block) {
                    if !mask.as_ref().is_some_and(|m| m.has(sector)) {
                        let at = bytes.start as usize + sector as usize * SECTOR;
                        seen[at..at + SECTOR].copy_from_slice(&self.original[at..at + SECTOR]);
                    }
                }
            }
        }
        seen
    }

    /// Lets everything come in, and compares every byte.
    pub(super) fn finish(&mut self) {
        self.source.set_connected(true);
        if let Some(relocation) = self.relocation() {
            relocation.drive(|m, now, out| m.resume(now, &relocation.residency, out));
        }
        if self.volume.life() == LifeState::Standby {
            self.volume.hand_off().unwrap();
        }
        for _ in 0..10_000 {
            if self.volume.is_local() {
                break;
            }
            self.source.complete_all();
            self.pass_time(20);
        }
        assert!(self.volume.is_local(), "the move never ends");
        self.check_reads();
        assert!(self.waiting.is_empty(), "a read was never answered");
        assert!(
            self.store.content() == self.oracle.now,
            "the image is not what was written"
        );
    }
}

pub(super) fn assemble<S: Store + 'static>(
    config: &ExportConfig,
    store: &Arc<S>,
    source: &Arc<MemorySource>,
    state: StateDir,
    residency: Residency,
    clock_ms: &Arc<StdAtomicU64>,
) -> Arc<Volume> {
    let has_map = state.identity().keeps_map();
    let ms = Arc::clone(clock_ms);
    let clock: Clock = Arc::new(move || Duration::from_millis(ms.load(Ordering::Relaxed)));
    let witnesses = state.witnesses(1).unwrap();
    let parts = Parts {
        config,
        geometry: residency.geometry(),
        store: Arc::clone(store) as Arc<dyn Store>,
        state: Some(state),
        had_source: true,
        clock,
        heat_place: None,
        make_state: None,
    };
    if !has_map {
        return parts.plain();
    }
    let volume = parts.moving(Moving {
        arrival: None,
        wanted: config.source.as_ref().unwrap(),
        source: Arc::clone(source) as Arc<dyn Source>,
        residency: Arc::new(residency),
        witnesses,
        at_completion: Box::new(|| ()),
        at_release: Box::new(|| ()),
    });
    if !volume.is_local() {
        volume.relocation().unwrap().start();
    }
    volume
}

/// Before the handoff a read shows the source's bytes of now, and leaves nothing behind: the VM
/// still writes there.
#[test]
fn nothing_that_was_read_before_the_handoff_is_kept() {
    let mut world = World::new(None, HandoffPolicy::FirstWrite);
    world.read(0, 4096);
    world.source.complete_all();
    world.check_reads();
    assert!(world.waiting.is_empty());
    assert!(
        world.store.content().iter().all(|b| *b == 0),
        "a block was kept"
    );
    world.source.write(0, &[0x55; 4096]);
    world.oracle.now[..4096].fill(0x55);
    world.original[..4096].fill(0x55);
    world.read(0, 4096);
    world.source.complete_all();
    world.check_reads();
    assert_eq!(world.volume.life(), LifeState::Standby);
    world.finish();
}

/// A block that was asked for before the handoff, and answered after it, is as old as the
/// question: the VM may have written it at the source in between.
#[test]
fn an_answer_from_before_the_handoff_is_not_kept_after_it() {
    let mut world = World::new(None, HandoffPolicy::FirstWrite);
    world.read(8192, 4096);
    world.volume.hand_off().unwrap();
    // The answer to the first question comes last.
    while world.source.pending() > 1 {
        world.source.complete(1);
        if world.volume.is_local() {
            break;
        }
    }
    let residency = Arc::clone(&world.relocation().unwrap().residency);
    let before = residency.resident_blocks();
    world.source.complete(0);
    assert_eq!(
        residency.resident_blocks(),
        before,
        "the old answer was kept"
    );
    world.check_reads();
    world.finish();
}

#[test]
fn a_write_before_the_commanded_handoff_is_refused_and_changes_nothing() {
    let world = World::new(None, HandoffPolicy::Command);
    let relocation = world.relocation();
    let error = world
        .volume
        .write(relocation.as_ref(), 0, &[1; 512])
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(1));
    assert_eq!(world.volume.life(), LifeState::Standby);
    assert!(world.store.content().iter().all(|b| *b == 0));
}

/// A read of what had been missing when the source was let go of (the disk has gone back, say) waited for
/// ever, whatever the policy, and was asked for in vain fifty times a second.
#[test]
fn a_read_that_begins_after_the_source_was_let_go_of_fails() {
    let mut world = World::new(None, HandoffPolicy::Now);
    world.write(4096 * 3, &[1; 4096]);
    let relocation = world.relocation().unwrap();
    relocation.retire();
    world.read(4096 * 3, 4096);
    world.read(4096 * 3, 4096 * 2);
    assert!(world.waiting.is_empty());
    assert_eq!(relocation.with_mover(|m| m.waiting()), 0);
}

/// A sub-block write into an absent block is answered while the source is away, and the rest of
/// the block comes around it later.
#[test]
fn a_small_write_never_waits_for_the_source() {
    let mut world = World::new(None, HandoffPolicy::Now);
    world.source.set_connected(false);
    world.write(4096 * 3 + 512, &[0xab; 1024]);
    world.flush();
    world.kill();
    world.power_cut(99);
    world.finish();
}

/// A read over many separate absent runs ended the process of an ancestor of this program, which
/// had room for 32.
#[test]
fn a_read_over_many_absent_runs_is_answered() {
    let mut world = World::new(None, HandoffPolicy::Now);
    world.source.set_connected(false);
    for block in (0..96).step_by(2) {
        world.write(block * 4096, &[7; 4096]);
    }
    world.read(0, 96 * 4096);
    assert_eq!(world.waiting.len(), 1);
    world.finish();
}

#[test]
fn a_failed_sync_poisons_the_volume() {
    let world = World::new(None, HandoffPolicy::Now);
    world.dir.fail_after(Some(0));
    let relocation = world.relocation();
    world
        .volume
        .write(relocation.as_ref(), 0, &[1; 4096])
        .unwrap();
    assert!(world.volume.commit().is_err());
    world.dir.fail_after(None);
    assert!(world.volume.commit().is_err(), "a retry made it believed");
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
        let world = World::new(None, HandoffPolicy::FirstWrite);
        let relocation = world.relocation();
        let (volume, source) = (&world.volume, &world.source);
        std::thread::scope(|scope| {
            for sector in 0..2_u64 {
                let relocation = relocation.as_ref();
                scope.spawn(move || {
                    let value = 0xa0 + sector as u8;
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
