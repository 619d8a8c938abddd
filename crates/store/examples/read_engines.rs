//! Measures how fast reads come back: inline from the page cache, and through each engine, cached
//! and not. `cargo run --release -p hikkoshi-store --example read_engines -- PATH [MIB]` makes a
//! file of random data at PATH, which should be on a disk, and removes it in the end.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hikkoshi_store::{EngineChoice, FileStore, OpenOptions, Store};
use rustix::fs::Advice;
use rustix::time::{ClockId, clock_gettime};

const READ_BYTES: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: read_engines PATH [MIB]")?;
    let mib: u64 = args.next().map_or(Ok(1024), |it| it.parse())?;
    let path = Path::new(&path);
    fill(path, mib)?;
    let result = measure(path, mib << 20);
    fs::remove_file(path)?;
    result
}

fn fill(path: &Path, mib: u64) -> Result<(), Box<dyn Error>> {
    let mut file = fs::File::create_new(path)?;
    let mut random = Random(88_172_645_463_325_252);
    for _ in 0..mib {
        let words = (0..(1 << 20) / 8).flat_map(|_| random.next().to_ne_bytes());
        file.write_all(&words.collect::<Vec<u8>>())?;
    }
    Ok(file.sync_all()?)
}

fn measure(path: &Path, size: u64) -> Result<(), Box<dyn Error>> {
    for round in 1..=3 {
        for engine in [EngineChoice::Threads, EngineChoice::IoUring] {
            let store = FileStore::open(
                path,
                OpenOptions {
                    engine,
                    ..OpenOptions::default()
                },
            )?;
            for depth in [1, 8, 32, 128] {
                forget_cache(path)?;
                let cold = submitted(&store, size, depth, 20_000)?;
                report(round, &store, "cold", depth, cold);
            }
            warm(&store, size)?;
            for depth in [1, 32] {
                let warm = submitted(&store, size, depth, 200_000)?;
                report(round, &store, "cached", depth, warm);
            }
            report(round, &store, "inline", 0, inline(&store, size, 1_000_000)?);
        }
    }
    Ok(())
}

fn forget_cache(path: &Path) -> Result<(), Box<dyn Error>> {
    let file = fs::File::open(path)?;
    Ok(rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?)
}

fn warm(store: &FileStore, size: u64) -> Result<(), Box<dyn Error>> {
    let mut buf = vec![0; 1 << 20];
    for offset in (0..size).step_by(1 << 20) {
        store.read(offset, &mut buf)?;
    }
    Ok(())
}

struct Figures {
    reads: u32,
    wall: Duration,
    cpu: Duration,
}

fn submitted(
    store: &FileStore,
    size: u64,
    depth: u32,
    reads: u32,
) -> Result<Figures, Box<dyn Error>> {
    let (tx, rx) = mpsc::channel();
    let mut random = Random(u64::from(depth) + 1);
    let mut submit = || {
        let tx = tx.clone();
        let done = move |result: std::io::Result<Vec<u8>>| {
            let _ = tx.send(result.map(drop));
        };
        store.submit_read(random.offset(size), READ_BYTES, Box::new(done));
    };
    let (start, cpu) = (Instant::now(), cpu_time());
    (0..depth).for_each(|_| submit());
    for answered in 0..reads {
        rx.recv()??;
        if answered + depth < reads {
            submit();
        }
    }
    Ok(Figures {
        reads,
        wall: start.elapsed(),
        cpu: cpu_time() - cpu,
    })
}

fn inline(store: &FileStore, size: u64, reads: u32) -> Result<Figures, Box<dyn Error>> {
    let mut random = Random(77);
    let mut buf = [0; READ_BYTES];
    let (start, cpu) = (Instant::now(), cpu_time());
    for _ in 0..reads {
        let offset = random.offset(size);
        if !store.try_read(offset, &mut buf)? {
            store.read(offset, &mut buf)?; // the cache lost a page
        }
    }
    Ok(Figures {
        reads,
        wall: start.elapsed(),
        cpu: cpu_time() - cpu,
    })
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        now.tv_sec
            .try_into()
            .expect("a process's time is not negative"),
        now.tv_nsec.try_into().expect("nanoseconds are below 10^9"),
    )
}

fn report(round: u32, store: &FileStore, what: &str, depth: u32, figures: Figures) {
    let reads = f64::from(figures.reads);
    println!(
        "round {round} {:8} {what:6} depth {depth:3}: {:9.0} reads/s, {:6.2} us CPU a read",
        store.engine_name(),
        reads / figures.wall.as_secs_f64(),
        figures.cpu.as_secs_f64() * 1e6 / reads,
    );
}

/// xorshift64: offsets need no better.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn offset(&mut self, size: u64) -> u64 {
        let reads = size / 4096;
        self.next() % reads * 4096
    }
}
