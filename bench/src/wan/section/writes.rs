//! A guest's writes during the move, beside those to a plain local volume: one that has the machine to
//! itself, one beside which the same disk moves for somebody else, and one beside which iperf3 receives as many bytes
//! and does nothing with them. The latter two say how much of the
//! difference is the load, and ours with nothing copied how much is the way of a write. The new site, with the guest, has
//! processors of its own; the disk is shared.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hikkoshi_testkit::cache::copy_image;
use hikkoshi_testkit::process::Process;
use tempfile::TempDir;

use super::iperf::{Amount, Listening, STREAMS, Sending};
use super::{Attempt, Findings, Section, columns, each, movers, rows};
use crate::client::{Endpoint, Random};
use crate::cpu::{Cores, pin};
use crate::report::Role;
use crate::wan::Bench;
use crate::wan::disk::{Disk, arrived_fully};
use crate::wan::grid::{Better, Bound, Grid};
use crate::wan::guest::{Guest, percentile};
use crate::wan::mover::{How, Mover};
use crate::wan::moving::Moving;
use crate::wan::site::{Sites, start_server};

/// As a guest would, it leaves the processor to others between its writes.
const BREATH: Duration = Duration::from_micros(200);
/// Between the flushes of a guest that has other things to do: a journal, a database that is hardly used.
const PAUSE: Duration = Duration::from_millis(50);

/// Bytes of a write, whether each is followed by a flush, and what passes until the next.
const KINDS: [(usize, bool, Duration); 5] = [
    (512, false, BREATH),
    (4096, false, BREATH),
    (512, true, BREATH),
    (4096, true, BREATH),
    (4096, true, PAUSE),
];

/// The column of a plain volume that has the machine to itself.
const PLAIN: &str = "plain volume";
/// The column of one beside which another disk moves.
const BESIDE: &str = "plain volume, beside the same load";
/// The column of one beside which as many bytes are received.
const BESIDE_IPERF: &str = "plain volume, beside iperf3";
/// Until it has the whole link.
const WARM_UP: Duration = Duration::from_secs(1);
/// It is stopped long before.
const FOR_LONG: Duration = Duration::from_secs(600);

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let disk = bench.files()?;
    let dir = bench.disk_dir();
    let cores = Cores::split()?;
    let apart = Apart::new(sites, &cores)?;
    let movers = movers(
        bench,
        vec![Mover::ours(), Mover::ours_on_demand()],
        &[How::Stream, How::Scan],
    );
    let plain = movers.len();
    let beside = plain + 1;
    let beside_iperf = beside + 1;
    // Who makes the load takes its turn like all others.
    let mut turns = movers.clone();
    turns.push(Mover {
        name: BESIDE.into(),
        how: Mover::ours().how,
    });
    let figures = [
        ("512 B, p99, ms", Better::Less),
        ("4 KiB, p99, ms", Better::Less),
        ("512 B and flush, p99, ms", Better::Less),
        ("4 KiB and flush, p99, ms", Better::Less),
        ("4 KiB and flush every 50 ms, longest, ms", Better::Less),
        ("512 B, 4 KiB, longest, ms", Better::Less),
    ];
    let mut table = rows(figures, beside_iperf + 1);
    let mut note = |column: usize, tails: Vec<f64>| {
        for (row, tail) in table.iter_mut().zip(tails) {
            row.cells[column].values.push(tail);
        }
    };
    for _ in 0..bench.rounds() {
        bench.progress(&format!("{}, writes: a plain volume", sites.case.name()));
        let volume = PlainVolume::start(bench, &disk)?;
        note(plain, measure(bench, &volume.endpoint, &disk)?);
        drop(volume);
        bench.progress(&format!("{}, writes: {BESIDE_IPERF}", sites.case.name()));
        // The writes of before are in the cache of the other, and were to the same places.
        let volume = PlainVolume::start(bench, &disk)?;
        let mut load = apart.receive(bench)?;
        std::thread::sleep(WARM_UP + 10 * sites.case.rtt());
        note(beside_iperf, measure(bench, &volume.endpoint, &disk)?);
        load.check_alive()?;
    }
    each(
        bench,
        sites,
        Section::Writes,
        &turns,
        &disk,
        dir,
        true,
        |turn, attempt| {
            // Before there is a move: the copy takes a while.
            let volume = (turn == movers.len())
                .then(|| PlainVolume::start(bench, &disk))
                .transpose()?;
            let moving = apart.start(attempt)?;
            let column = if volume.is_some() { beside } else { turn };
            let endpoint = match &volume {
                Some(volume) => &volume.endpoint,
                None => moving.endpoint.as_ref().context("it serves nobody")?,
            };
            let tails = measure(bench, endpoint, &disk)?;
            if arrived_fully(&moving.arrived_in(), &disk) {
                eprintln!("  the move was over before the writes were");
            }
            note(column, tails);
            Ok(())
        },
    )?;
    for row in &mut table {
        row.bound = Some(Bound {
            text: "1.2 of a plain volume's".into(),
            limit: row.cells[plain].middle().map(|middle| 1.2 * middle),
        });
    }
    let mut columns = columns(&movers);
    columns.extend([PLAIN, BESIDE, BESIDE_IPERF].map(|name| (name.to_owned(), Role::Other)));
    let grid = Grid {
        section: "writes",
        title: format!("Writes during the move: {}", sites.case.name()),
        note: format!(
            "One guest writes where the disk has data, one write after the other, {:.1} s of each \
             kind (twice that with pauses); images in {}. A plain volume is hikkoshi's, of the same content: with nothing else going on, \
             while the same disk moves to another image in the same place, and while iperf3 receives at the new site. The old site and the link have one half of the \
             cores, the new site and the guest the other. nbdkit's cow filter ignores flushes.",
            bench.write_time().as_secs_f64(),
            if bench.options.disk.is_some() {
                "--disk"
            } else {
                "cargo's target directory"
            },
        ),
        columns,
        rows: table.into(),
    };
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}

/// The old site and the link on one half of the cores; the new site, and this thread, on the other: neither a source nor a
/// link takes the time of a host far away. Until dropped.
struct Apart<'a> {
    sites: &'a Sites,
    cores: &'a Cores,
}

impl<'a> Apart<'a> {
    fn new(sites: &'a Sites, cores: &'a Cores) -> Result<Self> {
        let (old, new) = cores.halves();
        let apart = Self { sites, cores };
        sites.link.run_on(old)?;
        pin(new)?;
        Ok(apart)
    }

    fn start(&self, attempt: &Attempt<'_>) -> Result<Moving> {
        let terms = attempt.terms();
        let (old, new) = self.cores.halves();
        // A process inherits the affinity of the thread that starts it.
        pin(old)?;
        let source = attempt.mover.start_source(&terms);
        pin(new)?;
        attempt.mover.start(&terms, source?)
    }

    /// As many bytes come to the new site as the link carries.
    fn receive(&self, bench: &Bench<'_>) -> Result<Sending> {
        let listening = Listening::start(bench, self.sites)?;
        let (old, new) = self.cores.halves();
        pin(old)?;
        let amount = Amount::Time(FOR_LONG, Duration::ZERO);
        let sending = listening.send(self.sites, STREAMS, amount);
        pin(new)?;
        sending
    }
}

impl Drop for Apart<'_> {
    fn drop(&mut self) {
        let all = &self.cores.all;
        if let Err(error) = self.sites.link.run_on(all).and_then(|()| pin(all)) {
            eprintln!("what follows is kept to some cores: {error:#}");
        }
    }
}

/// A volume that never moved, of the disk's content.
struct PlainVolume {
    endpoint: Endpoint,
    /// Before its files go.
    _server: Process,
    _dir: TempDir,
}

impl PlainVolume {
    fn start(bench: &Bench<'_>, disk: &Disk) -> Result<Self> {
        let dir = bench.scratch(bench.disk_dir())?;
        let image = dir.path().join("image");
        copy_image(&disk.path, &image)?;
        // A flush is to find what the guest wrote, and not the copy.
        let copied = File::open(&image).context("open the copy")?;
        copied.sync_all().context("sync the copy")?;
        let endpoint = Endpoint::Unix(dir.path().join("sock"));
        let arguments = [
            "serve".to_owned(),
            image.display().to_string(),
            "--listen".to_owned(),
            endpoint.listen(),
            "--control".to_owned(),
            format!("unix:{}", dir.path().join("control").display()),
        ];
        let program = bench.hikkoshi.display().to_string();
        let log = dir.path().join("log");
        let server = start_server(None, &program, &arguments, &endpoint, &log)?;
        Ok(Self {
            endpoint,
            _server: server,
            _dir: dir,
        })
    }
}

/// In milliseconds: the 99th percentile of each kind, of the last the longest, and the longest of those
/// without a flush.
fn measure(bench: &Bench<'_>, endpoint: &Endpoint, disk: &Disk) -> Result<Vec<f64>> {
    let mut guest = Guest::open(endpoint)?;
    let mut random = Random::new(0x7772_6974);
    let data: Vec<u8> = (0..512).flat_map(|_| random.next().to_le_bytes()).collect();
    let mut tails = Vec::new();
    let mut longest = 0.0_f64;
    for (length, flush, pause) in KINDS {
        // Few come of those that pause: twice the time, and the longest of them.
        let rare = pause >= PAUSE;
        let limit = bench.write_time() * if rare { 2 } else { 1 };
        let start = Instant::now();
        let mut times = Vec::new();
        while start.elapsed() < limit {
            let inside = random.next() % 8 * 512;
            let within = if length < 4096 { inside } else { 0 };
            let offset = disk.random_block(&mut random) + within;
            times.push(guest.write(offset, &data[..length], flush)?);
            std::thread::sleep(pause);
        }
        if !flush {
            longest = times.iter().copied().fold(longest, f64::max);
        }
        let part = if rare { 1.0 } else { 0.99 };
        tails.push(percentile(times, part).context("no write was answered")?);
    }
    guest.close()?;
    tails.push(longest);
    Ok(tails)
}
