//! The emulated link itself: does it give what it promises? Everything else rests on that.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::iperf::{Amount, STREAMS, iperf3};
use super::{Findings, Section, rows};
use crate::report::Role;
use crate::wan::Bench;
use crate::wan::grid::{Better, Grid};
use crate::wan::guest::percentile;
use crate::wan::site::Sites;

/// How long each part takes, and how long TCP has to find the rate before that.
const TIME: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(10);
/// Payload of a full packet of 1500 bytes with time stamps.
const PAYLOAD_PART: f64 = 1448.0 / 1500.0;
/// More than any round trip that is emulated, waiting included.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let case = &sites.case;
    bench.progress(&format!("{}, {}", case.name(), Section::Link.name()));
    let [
        mut rate,
        mut idle,
        mut idle_tail,
        mut busy,
        mut busy_tail,
        mut cores,
    ] = rows(
        [
            ("iperf3, of what packets can carry", Better::More),
            ("round trip, idle, median, ms", Better::Less),
            ("round trip, idle, p99, ms", Better::Less),
            ("round trip, under load, median, ms", Better::Less),
            ("round trip, under load, p99, ms", Better::Less),
            ("emulator, cores, under load", Better::Less),
        ],
        1,
    );
    for _ in 0..bench.rounds() {
        let mut echo = Echo::open(sites)?;
        let quiet = echo.round_trips(|so_far| so_far < TIME / 2)?;
        let stop = AtomicBool::new(false);
        let (load, loaded, used) = std::thread::scope(|scope| {
            let echo = &mut echo;
            let stop = &stop;
            let pinging = scope.spawn(move || {
                std::thread::sleep(TIME / 2 + 10 * case.rtt());
                let (cpu, start) = (sites.link.cpu_time(), Instant::now());
                let trips = echo.round_trips(|_| !stop.load(Ordering::Relaxed));
                let used = (sites.link.cpu_time() - cpu).as_secs_f64();
                (trips, used / start.elapsed().as_secs_f64())
            });
            let warm_up = TIME / 2 + 10 * case.rtt();
            let load = iperf3(
                bench,
                sites,
                STREAMS,
                Amount::Time(TIME, warm_up),
                ANSWER_LIMIT * 3,
            );
            stop.store(true, Ordering::Relaxed);
            match pinging.join() {
                Ok((trips, used)) => (load, trips, used),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        let loaded = loaded?;
        let possible = case.bytes_per_s() * PAYLOAD_PART / 1e6;
        match load {
            Ok(load) => rate.cells[0].values.push(load / possible),
            Err(error) => bench.failed("iperf3", &error),
        }
        for (row, trips, part) in [
            (&mut idle, &quiet, 0.5),
            (&mut idle_tail, &quiet, 0.99),
            (&mut busy, &loaded, 0.5),
            (&mut busy_tail, &loaded, 0.99),
        ] {
            let figure = percentile(trips.iter().copied(), part).context("no round trip")?;
            row.cells[0].values.push(figure);
        }
        cores.cells[0].values.push(used);
    }
    let grid = Grid {
        section: "link",
        title: format!("The link itself: {}", case.name()),
        note: format!(
            "One byte there and back over TCP, first alone, then while iperf3 fills the link towards the \
             new site with {STREAMS} connections. The queue holds {} KiB, so a full one adds {:.0} ms. The \
             emulator's time includes the receiving kernels' TCP.",
            case.queue_bytes() >> 10,
            case.queue_bytes() as f64 / case.bytes_per_s() * 1e3
        ),
        columns: vec![("link".into(), Role::Other)],
        rows: vec![rate, idle, idle_tail, busy, busy_tail, cores],
    };
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}

/// A connection whose other end sends back what it gets.
struct Echo(TcpStream);

impl Echo {
    fn open(sites: &Sites) -> Result<Self> {
        let listener = sites
            .old
            .enter(|| Ok(TcpListener::bind((sites.link.address_a, 0))?))?;
        let address = listener.local_addr()?;
        let near = sites.new.enter(|| Ok(TcpStream::connect(address)?))?;
        let (mut far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        near.set_read_timeout(Some(ANSWER_LIMIT))?;
        far.set_nodelay(true)?;
        std::thread::spawn(move || {
            let mut byte = [0];
            // Ends when the other end does.
            while far.read_exact(&mut byte).is_ok() && far.write_all(&byte).is_ok() {}
        });
        Ok(Self(near))
    }

    /// Round trips in milliseconds, one after the other while `go_on` says so, one at least.
    fn round_trips(&mut self, go_on: impl Fn(Duration) -> bool) -> Result<Vec<f64>> {
        let start = Instant::now();
        let mut trips = Vec::new();
        while trips.is_empty() || go_on(start.elapsed()) {
            let sent = Instant::now();
            self.0.write_all(&[1])?;
            self.0
                .read_exact(&mut [0])
                .context("the echo does not come")?;
            trips.push(sent.elapsed().as_secs_f64() * 1e3);
            std::thread::sleep(PAUSE);
        }
        Ok(trips)
    }
}
