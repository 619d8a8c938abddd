//! Guests that write while seeds are looked through, seeds that are wrong or change, a source that
//! goes in the middle, and a beginning anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hikkoshi_engine::geometry::{BlockRange, ByteRange, Geometry};
use hikkoshi_engine::mover::Phase;
use hikkoshi_engine::residency::{BlockState, Residency};
use hikkoshi_engine::sync::AtomicU64;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::{FileStore, MemoryStore, OpenOptions, Store};
use hikkoshi_wan::{
    Completion, ExtentsAnswer, Fetched, Hashes, Lane, MemorySource, Source, SourceErrorKind,
    SourceInfo, SourceWatcher,
};
use tempfile::TempDir;

use super::super::assemble::{Moving, Parts};
use super::super::relocation::Relocation;
use super::*;
use crate::config::{Engine, ExportConfig, HandoffPolicy, SourceConfig, Transport};

pub(super) const BLOCK: u64 = 4096;
pub(super) const DISK: u64 = (10 << 20) + 512;

/// Nothing depends on how long something takes; this only ends a test that hangs.
pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A source in memory that counts as one that hashes: the hashes are made of what it is asked to
/// read, and the questions for them are counted.
struct Hashing {
    memory: Arc<MemorySource>,
    frames: AtomicBool,
    questions: AtomicU64,
    /// Which bytes were asked about, from where and how many.
    asked_about: Mutex<Vec<(u64, u64)>>,
}

impl Source for Hashing {
    fn info(&self) -> SourceInfo {
        self.memory.info()
    }
    fn is_connected(&self) -> bool {
        self.memory.is_connected()
    }
    fn connections(&self) -> usize {
        self.memory.connections()
    }
    fn read(&self, lane: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        self.memory.read(lane, offset, len, done);
    }
    fn extents(&self, lane: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        self.memory.extents(lane, offset, len, done);
    }
    fn hashes(&self, lane: Lane, offset: u64, len: u32, grain: u32, done: Completion<Hashes>) {
        self.questions.fetch_add(1, Ordering::Relaxed);
        lock(&self.asked_about).push((offset, len.into()));
        self.memory.hashes(lane, offset, len, grain, done);
    }
    fn flush(&self, done: Completion<()>) {
        self.memory.flush(done);
    }
    fn speaks_frames(&self) -> bool {
        self.frames.load(Ordering::Relaxed)
    }
    fn watch(&self, watcher: Arc<dyn SourceWatcher>) {
        self.memory.watch(watcher);
    }
    fn close(&self) {
        self.memory.close();
    }
}

pub(super) struct World {
    pub(super) volume: Arc<Volume>,
    pub(super) memory: Arc<MemorySource>,
    source: Arc<Hashing>,
    store: Arc<dyn Store>,
    pub(super) relocation: Arc<Relocation>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

pub(super) fn data() -> Vec<u8> {
    let mut state = 1_u64;
    let word = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(11);
        (state >> 32).to_le_bytes()[0]
    };
    std::iter::repeat_with(word)
        .take(usize::try_from(DISK).unwrap())
        .collect()
}

fn words(geometry: Geometry) -> Vec<AtomicU64> {
    let words = 0..Residency::required_words(geometry);
    words.map(|_| AtomicU64::new(0)).collect()
}

pub(super) fn in_memory() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new(DISK))
}

/// A volume after the handoff, with nothing here, that looks in these files.
pub(super) fn world(store: Arc<dyn Store>, image: &Path, seeds: &[PathBuf]) -> World {
    let geometry = Geometry::new(DISK, 4096).unwrap();
    let memory = MemorySource::new(data(), None);
    let source = Arc::new(Hashing {
        memory: Arc::clone(&memory),
        frames: AtomicBool::new(true),
        questions: AtomicU64::new(0),
        asked_about: Mutex::default(),
    });
    let residency = Arc::new(Residency::new(geometry, Box::new(words(geometry))));
    let config = ExportConfig {
        name: "disk".into(),
        image: image.to_owned(),
        state_dir: None,
        block_bytes: 4096,
        read_only: false,
        engine: Engine::Auto,
        transport: Transport::Auto,
        compress: crate::config::Packing::Auto,
        source: Some(SourceConfig {
            handoff: HandoffPolicy::Now,
            seed_always: true,
            ..SourceConfig::new("memory")
        }),
    };
    let parts = Parts {
        config: &config,
        geometry,
        store: Arc::clone(&store),
        state: None,
        had_source: true,
        // It stands still: seeding that gets nowhere for a time lets the background copy pass, and
        // a thread that lost the processor for so long would count as that.
        clock: Arc::new(|| Duration::ZERO),
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
    let open = |path: &PathBuf| SeedImage::open(path, image).unwrap();
    volume.seed_from(seeds.iter().map(open).collect());
    let relocation = volume.relocation().unwrap();
    relocation.start();
    World {
        volume,
        memory,
        source,
        store,
        relocation,
        stop: Arc::default(),
        thread: None,
    }
}

impl World {
    /// Lets the thread begin.
    pub(super) fn begin(&mut self) {
        let (volume, stop) = (Arc::clone(&self.volume), Arc::clone(&self.stop));
        self.thread = Some(std::thread::spawn(move || volume.run_seeding(&stop)));
    }

    /// Waits for the first question.
    pub(super) fn asked(&self) {
        until("it asks", || self.memory.pending() > 0);
    }

    /// Fails the next question about a window, once there is one. What proves that the source is the
    /// right disk, once something has come from it, is asked before, and answered.
    fn fail_question(&self, kind: SourceErrorKind) {
        until("it asks about a window", || {
            let requests = self.memory.requests();
            let question =
                |r: &hikkoshi_wan::memory::PendingRequest| r.lane == Lane::Bulk && r.len > BLOCK;
            match requests.iter().position(question) {
                Some(index) => self.memory.fail(index, kind),
                None if !requests.is_empty() => self.memory.complete(0),
                None => {}
            }
            requests.iter().any(question)
        });
    }

    /// Answers questions for hashes, and nothing that is fetched, until this holds.
    pub(super) fn answer_hashes_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        until(what, || {
            let is_question = |r: &hikkoshi_wan::memory::PendingRequest| {
                let mut asked = lock(&self.source.asked_about);
                let at = asked.iter().position(|asked| *asked == (r.offset, r.len));
                at.map(|at| asked.swap_remove(at)).is_some()
            };
            while let Some(at) = self.memory.requests().iter().position(is_question) {
                self.memory.complete(at);
            }
            self.relocation.tick();
            holds()
        });
    }

    /// Answers everything until everything is here. Tells how many bytes were fetched plainly.
    pub(super) fn finish(&mut self) {
        until("everything is here", || {
            self.memory.complete_all();
            self.relocation.tick();
            self.relocation.with_mover(|m| m.phase()) == Phase::Complete
        });
        until("the thread ends", || {
            self.memory.complete_all();
            self.thread.as_ref().is_none_or(JoinHandle::is_finished)
        });
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub(super) fn image(&self) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(DISK).unwrap()];
        self.store.read(0, &mut image).unwrap();
        image
    }

    pub(super) fn seeded(&self) -> u64 {
        self.volume.seeded_bytes()
    }

    pub(super) fn kinds(&self) -> Vec<String> {
        let events = self.volume.events.since(0).into_iter();
        let seeding = events.filter(|e| e.kind == EventKind::Seeding);
        seeding.map(|e| e.text).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.memory.close();
        if let Some(thread) = self.thread.take() {
            // What went wrong is told already.
            let _ = thread.join();
        }
    }
}

pub(super) fn seed(dir: &TempDir, name: &str, data: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, data).unwrap();
    path
}

/// The disk with these blocks changed.
fn changed(blocks: &[u64]) -> Vec<u8> {
    let mut data = data();
    for block in blocks {
        let at = usize::try_from(block * BLOCK + 77).unwrap();
        data[at] ^= 1;
    }
    data
}

pub(super) const ELSEWHERE: &str = "/nowhere/image";

#[test]
fn what_is_in_a_seed_is_installed_and_the_rest_is_fetched() {
    let dir = TempDir::new().unwrap();
    let changed_blocks = [0, 100, 101, 1500, DISK / BLOCK];
    let old = seed(&dir, "old", &changed(&changed_blocks));
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[old]);
    w.begin();
    w.finish();
    assert!(w.image() == data());
    // The last block has 512 bytes.
    assert_eq!(w.seeded(), DISK - 4 * BLOCK - 512);
    // The index of other offsets may be told of anywhere among them.
    let told = w.kinds();
    let begun = told.iter().position(|t| t.starts_with("looking in "));
    let ended = told.iter().position(|t| t.contains("has ended"));
    assert!(begun.is_some() && begun < ended, "{told:?}");
}

#[test]
fn several_seeds_are_looked_in_whatever_their_size() {
    let dir = TempDir::new().unwrap();
    let all = data();
    let (third, half) = (all.len() / 3, all.len() / 2);
    let mut longer = vec![7; all.len() + 100_000];
    longer[half..all.len()].copy_from_slice(&all[half..]);
    let empty = seed(&dir, "empty", &[]);
    let short = seed(&dir, "short", &all[..third + 5]);
    let long = seed(&dir, "long", &longer);
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[empty, short, long]);
    w.begin();
    w.finish();
    assert!(w.image() == all);
    let (third, half) = (u64::try_from(third).unwrap(), u64::try_from(half).unwrap());
    let in_seeds = third / BLOCK * BLOCK + DISK - half.next_multiple_of(BLOCK);
    assert_eq!(w.seeded(), in_seeds);
}

/// What a measurement had fetched when seeding was left for a while kept its place in the window for ever. After
/// some of them nothing was copied any more, of no disk that came over the same link.
#[test]
fn a_measurement_that_nobody_waits_for_any_more_takes_no_place_in_the_window() {
    let dir = TempDir::new().unwrap();
    let none = seed(&dir, "none", &[]);
    let w = world(in_memory(), Path::new(ELSEWHERE), &[none]);
    // Until it is known what is zero.
    w.memory.complete_all();
    for turn in 0..100 {
        w.relocation.with_mover_at(|m, now| m.seed_again(now));
        let mut run = Run::new(&w.volume, &w.relocation, &w.stop);
        run.measure(1 << 20);
        assert!(w.memory.pending() > 0, "nothing was asked in turn {turn}");
        drop(run);
        w.memory.complete_all();
    }
}

#[test]
fn a_wrong_seed_does_no_harm() {
    let dir = TempDir::new().unwrap();
    let wrong = seed(&dir, "wrong", &vec![0x55; data().len()]);
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[wrong]);
    w.begin();
    w.finish();
    assert!(w.image() == data());
    assert_eq!(w.seeded(), 0);
}

#[test]
fn a_seed_that_changes_while_it_is_read_does_no_harm() {
    let dir = TempDir::new().unwrap();
    let path = seed(&dir, "changing", &data());
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (path, stop) = (path.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            use std::os::unix::fs::FileExt;
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            let good = data();
            let mut n = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                n = n.wrapping_mul(25_214_903_917).wrapping_add(11);
                let at = usize::try_from(n % DISK).unwrap();
                let end = good.len().min(at + 3000);
                let bad = vec![n.to_le_bytes()[3]; end - at];
                let at_byte = u64::try_from(at).unwrap();
                file.write_all_at(&bad, at_byte).unwrap();
                file.write_all_at(&good[at..end], at_byte).unwrap();
                if n.is_multiple_of(64) {
                    // Cut short, and back.
                    file.set_len(at_byte).unwrap();
                    file.write_all_at(&good[at..], at_byte).unwrap();
                }
            }
        })
    };
    for _ in 0..5 {
        let mut w = world(
            in_memory(),
            Path::new(ELSEWHERE),
            std::slice::from_ref(&path),
        );
        w.begin();
        w.finish();
        assert!(w.image() == data());
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[test]
fn what_a_guest_writes_meanwhile_stays() {
    let dir = TempDir::new().unwrap();
    let old = seed(&dir, "old", &data());
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[old]);
    let mut expected = data();
    let write = |w: &World, expected: &mut Vec<u8>, at: u64, len: usize, byte: u8| {
        let new = vec![byte; len];
        w.volume.write(Some(&w.relocation), at, &new).unwrap();
        let at = usize::try_from(at).unwrap();
        expected[at..at + len].copy_from_slice(&new);
    };
    w.begin();
    w.asked();
    // The answer is on its way: whole blocks, and parts of one.
    write(&w, &mut expected, 5 * BLOCK, 8192, 0xe1);
    write(&w, &mut expected, 9 * BLOCK + 512, 512, 0xe2);
    // And a guest that never stops while it is installed.
    let mut n = 3_u64;
    until("everything is here", || {
        for _ in 0..20 {
            n = n.wrapping_mul(25_214_903_917).wrapping_add(11);
            let at = (n >> 8) % (DISK / 512 - 8) * 512;
            write(&w, &mut expected, at, 512 * 3, (n >> 24).to_le_bytes()[0]);
            w.memory.complete_all();
        }
        w.relocation.tick();
        w.relocation.with_mover(|m| m.phase()) == Phase::Complete
    });
    w.finish();
    assert!(w.image() == expected);
}

#[test]
fn the_image_may_be_its_own_seed() {
    let dir = TempDir::new().unwrap();
    let stale = [3, 4, 900];
    let path = seed(&dir, "image", &changed(&stale));
    let store: Arc<dyn Store> = Arc::new(FileStore::open(&path, OpenOptions::default()).unwrap());
    let mut w = world(store, &path, std::slice::from_ref(&path));
    w.begin();
    w.asked();
    // What was written before the answer came is not mistaken for the old copy, and no block
    // counts as the source's that is half a guest's.
    let relocation = Some(&w.relocation);
    w.volume.write(relocation, 50 * BLOCK, &[9; 4096]).unwrap();
    w.volume.write(relocation, 60 * BLOCK, &[9; 512]).unwrap();
    w.finish();
    let mut expected = data();
    let at = |block: u64| usize::try_from(block * BLOCK).unwrap();
    expected[at(50)..at(51)].fill(9);
    expected[at(60)..at(60) + 512].fill(9);
    assert!(w.image() == expected);
    let residency = &w.relocation.residency;
    let state = |block| residency.state(hikkoshi_engine::geometry::BlockIndex(block));
    assert_eq!(state(50), BlockState::Owned);
    assert_eq!(state(60), BlockState::Owned);
    assert_eq!(state(61), BlockState::Clean);
    assert_eq!(w.seeded(), DISK - 5 * BLOCK);
}

#[test]
fn a_source_that_goes_is_waited_for_and_asked_again() {
    let dir = TempDir::new().unwrap();
    let old = seed(&dir, "old", &changed(&[7]));
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[old]);
    w.begin();
    w.asked();
    w.memory.complete(0);
    w.memory.set_connected(false);
    w.memory.set_connected(true);
    w.fail_question(SourceErrorKind::Untrusted);
    w.fail_question(SourceErrorKind::Refused);
    w.finish();
    assert!(w.image() == data());
    // What is refused is fetched; but what is refused here may have been asked while the source was
    // away, and then it only counts as lost, and is found.
    assert!(w.seeded() > 0 && w.seeded() < DISK);
}

#[test]
fn reads_wait_for_no_seed() {
    let dir = TempDir::new().unwrap();
    let old = seed(&dir, "old", &data());
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[old]);
    w.begin();
    w.asked();
    let told = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&told);
    w.relocation.read(
        ByteRange::at(8 << 20, BLOCK),
        Box::new(move |_| done.store(true, Ordering::Release)),
    );
    let requests = w.memory.requests();
    let demand = requests.iter().position(|r| r.lane == Lane::Demand);
    w.memory.complete(demand.unwrap());
    assert!(told.load(Ordering::Acquire));
    w.finish();
    assert!(w.image() == data());
}

#[test]
fn it_can_be_stopped_and_begins_anew_with_what_is_absent() {
    let dir = TempDir::new().unwrap();
    let old = seed(&dir, "old", &data());
    let first = {
        let mut w = world(
            in_memory(),
            Path::new(ELSEWHERE),
            std::slice::from_ref(&old),
        );
        w.begin();
        w.asked();
        w.memory.complete(0);
        until("something came", || w.seeded() > 0);
        w.stop.store(true, Ordering::Release);
        w.thread.take().unwrap().join().unwrap();
        assert!(w.relocation.residency.missing_blocks() > 0);
        w.image()
    };
    // As after a restart: what was marked is here, the rest is not.
    let store = in_memory();
    store.write(0, &first).unwrap();
    let mut w = world(store, Path::new(ELSEWHERE), &[old]);
    let here = 4 << 20;
    w.relocation
        .residency
        .mark_clean(BlockRange::new(0, here / BLOCK));
    w.begin();
    w.finish();
    assert!(w.image() == data());
    assert_eq!(w.seeded(), DISK - here);
}

#[test]
fn without_hashes_at_the_source_everything_is_fetched_and_that_is_said() {
    let dir = TempDir::new().unwrap();
    let old = seed(&dir, "old", &data());
    let mut w = world(in_memory(), Path::new(ELSEWHERE), &[old]);
    w.source.frames.store(false, Ordering::Relaxed);
    w.begin();
    until("it rests", || {
        w.volume
            .seed_note()
            .is_some_and(|note| note.contains("plain NBD"))
    });
    w.finish();
    assert!(w.image() == data());
    assert_eq!(w.source.questions.load(Ordering::Relaxed), 0);
    assert_eq!(w.seeded(), 0);
    assert!(w.kinds()[0].contains("plain NBD"), "{:?}", w.kinds());
}

#[test]
fn only_files_and_devices_are_seeds() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("image");
    assert!(SeedImage::open(&dir.path().join("none"), &image).is_err());
    assert!(SeedImage::open(dir.path(), &image).is_err());
    let file = seed(&dir, "file", &[1, 2, 3]);
    assert!(!SeedImage::open(&file, &image).unwrap().is_own());
    std::os::unix::fs::symlink(&file, &image).unwrap();
    assert!(SeedImage::open(&file, &image).unwrap().is_own());
    let seed = SeedImage::open(&file, &image).unwrap();
    let mut buffer = [9; 4];
    assert_eq!(seed.read(1, &mut buffer).unwrap(), 2);
    assert_eq!(buffer, [2, 3, 9, 9]);
    assert_eq!(seed.read(3, &mut buffer).unwrap(), 0);
    assert_eq!(seed.read(u64::MAX, &mut buffer).unwrap(), 0);
}
