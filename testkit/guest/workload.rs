//! What runs inside the guest: it writes, syncs, reads back and verifies until told to finish.
//!
//! Three threads on one file system, each of which knows byte for byte what it must read:
//! - *files*: whole files created, rewritten, renamed over and removed, each fsynced;
//! - *sectors*: one file written in place with O_DIRECT, in runs of 512-byte sectors at any
//!   alignment, so that the disk sees writes smaller than a block and across blocks;
//! - *content*: the files that were on the disk from the start, which nobody may have changed.
//!
//! Each pauses between its rounds, so that on a quick machine too they dirty memory more slowly
//! than a link carries it away: else a live migration would never end.
//!
//! Caches are dropped again and again, so that reads reach the disk. Every line on standard
//! output starts with `WL`; the first wrong byte or failed call prints `WL FAIL` and ends it.
//!
//! Usage: `workload WORKDIR CONTENT-LIST CONTENT-ROOT ORDERS`. ORDERS is a terminal; the line
//! `finish` there ends the run, verifies everything once more and writes WORKDIR/final, which
//! says what WORKDIR must hold.

mod pattern;

use pattern::{Checksum, Random, fill, fill_sector, mix};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SECTOR: usize = 512;
/// Sectors of the file that is written in place: 8 MiB.
const SECTORS: u64 = 16_384;
/// The longest write of the sectors thread, in sectors: 24 KiB, six blocks of the usual size.
const MAX_RUN: u64 = 48;
/// How many files the files thread keeps.
const SLOTS: usize = 64;
/// The longest of them, in bytes.
const MAX_FILE: u64 = 160 << 10;
/// O_DIRECT on x86-64.
const O_DIRECT: i32 = 0o40000;
const TICK: Duration = Duration::from_millis(250);

static STOP: AtomicBool = AtomicBool::new(false);
static FILES: AtomicU64 = AtomicU64::new(0);
static WRITES: AtomicU64 = AtomicU64::new(0);
static READS: AtomicU64 = AtomicU64::new(0);
static CONTENT: AtomicU64 = AtomicU64::new(0);
/// The longest step of any thread, with what it did. Microseconds.
static LONGEST: Mutex<(u64, &'static str)> = Mutex::new((0, "nothing"));

fn say(line: &str) {
    let mut out = io::stdout().lock();
    // The console is all there is to report to: if it fails, nobody can be told.
    let _ = writeln!(out, "WL {line}");
    let _ = out.flush();
}

fn fail(what: &str) -> ! {
    say(&format!("FAIL {what}"));
    std::process::exit(1)
}

/// Times a step, and ends the run when it fails.
fn step<T>(what: &'static str, run: impl FnOnce() -> io::Result<T>) -> T {
    let start = Instant::now();
    let result = run();
    let took = start.elapsed().as_micros() as u64;
    let mut longest = LONGEST.lock().expect("no thread panics while it holds this");
    if took > longest.0 {
        *longest = (took, what);
    }
    drop(longest);
    match result {
        Ok(value) => value,
        Err(error) => fail(&format!("{what}: {error}")),
    }
}

/// What one file must hold.
#[derive(Clone, Copy)]
struct Expected {
    seed: u64,
    len: u64,
}

impl Expected {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        fill(self.seed, &mut bytes);
        bytes
    }
}

fn check(path: &Path, expected: Expected) {
    let got = step("read a file", || fs::read(path));
    if got != expected.bytes() {
        let at = got.iter().zip(expected.bytes()).position(|(a, b)| *a != b);
        fail(&format!(
            "{}: {} bytes, wanted {} of seed {:x}; first difference at {at:?}",
            path.display(),
            got.len(),
            expected.len,
            expected.seed
        ));
    }
}

/// The files thread. Returns what each slot must hold.
fn files(dir: &Path) -> Vec<Option<Expected>> {
    let mut slots: Vec<Option<Expected>> = vec![None; SLOTS];
    let mut random = Random::new(1);
    let mut journal = step("open the journal", || File::create(dir.join("journal")));
    let mut round = 0u64;
    while !STOP.load(Ordering::Relaxed) {
        round += 1;
        let slot = random.below(SLOTS as u64) as usize;
        let path = dir.join(format!("file-{slot}"));
        if slots[slot].is_some() && random.below(8) == 0 {
            step("remove a file", || fs::remove_file(&path));
            slots[slot] = None;
        } else {
            let new = Expected { seed: mix(round), len: 1 + random.below(MAX_FILE) };
            write_file(dir, &path, new, random.below(2) == 0);
            slots[slot] = Some(new);
            let sum = Checksum::of(&new.bytes());
            step("write the journal", || {
                writeln!(journal, "{round} file-{slot} {:x} {} {sum:x}", new.seed, new.len)
            });
            if round.is_multiple_of(8) {
                step("sync the journal", || journal.sync_all());
            }
        }
        let other = random.below(SLOTS as u64) as usize;
        if let Some(expected) = slots[other] {
            check(&dir.join(format!("file-{other}")), expected);
        }
        if round.is_multiple_of(16) {
            step("drop caches", || fs::write("/proc/sys/vm/drop_caches", "1"));
        }
        FILES.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(25));
    }
    for (slot, expected) in slots.iter().enumerate() {
        let path = dir.join(format!("file-{slot}"));
        match expected {
            Some(expected) => check(&path, *expected),
            None if path.exists() => fail(&format!("{} came back", path.display())),
            None => {}
        }
    }
    slots
}

fn write_file(dir: &Path, path: &Path, new: Expected, rename: bool) {
    let target = if rename { dir.join("temporary") } else { path.to_path_buf() };
    let mut file = step("create a file", || File::create(&target));
    step("write a file", || file.write_all(&new.bytes()));
    step("fsync a file", || file.sync_all());
    if rename {
        step("rename a file", || fs::rename(&target, path));
    }
}

/// A buffer that O_DIRECT accepts.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start }
    }

    fn run(&mut self, sectors: u64) -> &mut [u8] {
        let len = sectors as usize * SECTOR;
        &mut self.bytes[self.start..self.start + len]
    }
}

fn write_sectors(file: &File, buffer: &mut Aligned, first: u64, generations: &[u64]) {
    let bytes = buffer.run(generations.len() as u64);
    for (i, chunk) in bytes.chunks_mut(SECTOR).enumerate() {
        fill_sector(first + i as u64, generations[i], chunk);
    }
    step("write sectors", || file.write_all_at(bytes, first * SECTOR as u64));
}

fn check_sectors(file: &File, buffer: &mut Aligned, first: u64, generations: &[u64]) {
    let bytes = buffer.run(generations.len() as u64);
    step("read sectors", || file.read_exact_at(bytes, first * SECTOR as u64));
    let mut expected = [0; SECTOR];
    for (i, chunk) in bytes.chunks(SECTOR).enumerate() {
        let sector = first + i as u64;
        fill_sector(sector, generations[i], &mut expected);
        if chunk != expected {
            let found = u64::from_le_bytes(chunk[8..16].try_into().expect("eight bytes"));
            fail(&format!(
                "sector {sector}: wanted generation {}, found {found} ({:02x?}...)",
                generations[i],
                &chunk[..24]
            ));
        }
    }
}

/// The sectors thread. Returns the generation that each sector must hold.
fn sectors(dir: &Path) -> Vec<u64> {
    let path = dir.join("sectors");
    let mut buffer = Aligned::new(256 * SECTOR);
    let mut generations = vec![1; SECTORS as usize];
    let file = step("open the sector file", || {
        OpenOptions::new().read(true).write(true).create(true).truncate(true)
            .custom_flags(O_DIRECT).open(&path)
    });
    for first in (0..SECTORS).step_by(256) {
        write_sectors(&file, &mut buffer, first, &generations[first as usize..][..256]);
    }
    step("fsync the sector file", || file.sync_all());
    say("sectors are laid out");
    let mut random = Random::new(2);
    let mut generation = 1;
    while !STOP.load(Ordering::Relaxed) {
        generation += 1;
        let (first, len) = pick(&mut random, MAX_RUN);
        generations[first..first + len].fill(generation);
        write_sectors(&file, &mut buffer, first as u64, &generations[first..first + len]);
        if generation.is_multiple_of(4) {
            step("fdatasync", || file.sync_data());
        }
        let (first, len) = pick(&mut random, 128);
        check_sectors(&file, &mut buffer, first as u64, &generations[first..first + len]);
        WRITES.fetch_add(1, Ordering::Relaxed);
        READS.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(10));
    }
    step("fsync the sector file", || file.sync_all());
    for first in (0..SECTORS).step_by(256) {
        check_sectors(&file, &mut buffer, first, &generations[first as usize..][..256]);
    }
    generations
}

fn pick(random: &mut Random, longest: u64) -> (usize, usize) {
    let len = 1 + random.below(longest);
    (random.below(SECTORS - len) as usize, len as usize)
}

/// The content thread: reads what was there from the start, in a random order.
fn content(list: &[(u64, PathBuf)]) {
    let mut random = Random::new(3);
    while !STOP.load(Ordering::Relaxed) {
        let (expected, path) = &list[random.below(list.len() as u64) as usize];
        check_content(*expected, path);
        CONTENT.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn check_content(expected: u64, path: &Path) {
    let mut file = step("open content", || File::open(path));
    let mut sum = Checksum::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut len = 0;
        while len < buffer.len() {
            match step("read content", || file.read(&mut buffer[len..])) {
                0 => break,
                more => len += more,
            }
        }
        sum.update(&buffer[..len]);
        if len < buffer.len() {
            break;
        }
    }
    if sum.value() != expected {
        fail(&format!("{} has changed: {:x}, not {expected:x}", path.display(), sum.value()));
    }
}

fn read_list(list: &Path, root: &Path) -> Vec<(u64, PathBuf)> {
    let text = step("read the content list", || fs::read_to_string(list));
    text.lines()
        .map(|line| {
            let (sum, path) = line.split_once(' ').unwrap_or_else(|| fail("bad content list"));
            let sum = u64::from_str_radix(sum, 16).unwrap_or_else(|_| fail("bad content list"));
            (sum, root.join(path))
        })
        .collect()
}

fn tick() {
    let (longest, what) = *LONGEST.lock().expect("no thread panics while it holds this");
    say(&format!(
        "tick files={} writes={} reads={} content={} longest_us={longest} ({what})",
        FILES.load(Ordering::Relaxed),
        WRITES.load(Ordering::Relaxed),
        READS.load(Ordering::Relaxed),
        CONTENT.load(Ordering::Relaxed),
    ));
}

fn finish(dir: &Path, files: &[Option<Expected>], generations: &[u64]) {
    let mut text = String::new();
    for (slot, expected) in files.iter().enumerate() {
        if let Some(Expected { seed, len }) = expected {
            text.push_str(&format!("file {slot} {seed:x} {len}\n"));
        }
    }
    for generation in generations {
        text.push_str(&format!("sector {generation}\n"));
    }
    let path = dir.join("final");
    step("write the final list", || {
        let mut file = File::create(&path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    tick();
    say(&format!("digest {:x}", Checksum::of(text.as_bytes())));
}

fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [dir, list, root, orders] = &arguments[..] else {
        fail("usage: workload WORKDIR CONTENT-LIST CONTENT-ROOT ORDERS");
    };
    step("make the work directory", || fs::create_dir_all(dir));
    let list = read_list(list, root);
    say("start");
    std::thread::scope(|scope| {
        let files_thread = scope.spawn(|| files(dir));
        let sectors_thread = scope.spawn(|| sectors(dir));
        let content_thread = scope.spawn(|| content(&list));
        scope.spawn(|| {
            while !STOP.load(Ordering::Relaxed) {
                tick();
                std::thread::sleep(TICK);
            }
        });
        let terminal = step("open the orders", || File::open(orders));
        for line in BufReader::new(terminal).lines() {
            if step("read an order", || line).trim() == "finish" {
                break;
            }
        }
        say("finishing");
        STOP.store(true, Ordering::Relaxed);
        let slots = files_thread.join().unwrap_or_else(|_| fail("the files thread panicked"));
        let generations =
            sectors_thread.join().unwrap_or_else(|_| fail("the sectors thread panicked"));
        content_thread.join().unwrap_or_else(|_| fail("the content thread panicked"));
        finish(dir, &slots, &generations);
    });
}
