//! A link that others fill as well, and a way that becomes longer: a round trip grows for two reasons that are not ours.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hikkoshi_testkit::link::LinkSpec;

use super::iperf::{Amount, Listening};
use super::{Findings, Section, columns, each, movers, rows};
use crate::wan::Bench;
use crate::wan::disk::Disk;
use crate::wan::grid::{Better, Grid};
use crate::wan::mover::{How, Mover};
use crate::wan::moving::{Moving, arrived_share};
use crate::wan::site::Sites;

/// As many connections as ours has by default.
const CONNECTIONS: usize = 4;
/// What crosses a link of 400 Mbit/s meanwhile, and some.
const DISK_MIB: u64 = 2048;
/// The round trip in the end, over what it was.
const TIMES_LONGER: f64 = 1.5;

/// How long each part takes: until the move goes at its speed, until that of both has been found again, and how
/// long is measured.
struct Times {
    alone: Duration,
    found: Duration,
    measured: Duration,
}

const USUAL: Times = Times {
    alone: Duration::from_secs(3),
    found: Duration::from_secs(6),
    measured: Duration::from_secs(6),
};
/// With a small disk it is only seen that it works.
const QUICK: Times = Times {
    alone: Duration::from_millis(200),
    found: Duration::from_secs(1),
    measured: Duration::from_secs(1),
};

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let case = &sites.case;
    let ours = vec![Mover::ours(), Mover::ours_from_nbdkit()];
    let movers = movers(bench, ours, &[How::NbdcopyConnections(CONNECTIONS)]);
    let disk = Disk::noise(DISK_MIB.min(bench.mib()))?;
    let times = if bench.mib() < DISK_MIB { QUICK } else { USUAL };
    let [mut beside, mut stream, mut after, mut longer] = rows(
        [
            ("beside a stream of iperf3, MB/s", Better::More),
            ("what that stream got, MB/s", Better::More),
            ("after it, MB/s", Better::More),
            ("over a way half as long again, MB/s", Better::More),
        ],
        movers.len(),
    );
    each(
        bench,
        sites,
        Section::Company,
        &movers,
        &disk,
        bench.fast_dir(),
        true,
        |index, attempt| {
            let moving = attempt.start()?;
            let pace = || pace(&moving, &disk, times.measured);
            sleep(times.alone);
            let amount = Amount::Time(times.measured, times.found);
            let other = Listening::start(bench, sites)?.send(sites, 1, amount)?;
            sleep(times.found);
            beside.cells[index].values.push(pace()?);
            stream.cells[index]
                .values
                .push(other.rate(times.measured * 4)?);
            sleep(times.alone);
            after.cells[index].values.push(pace()?);
            let way = Longer::make(sites);
            sleep(times.found);
            longer.cells[index].values.push(pace()?);
            drop(way);
            Ok(())
        },
    )?;
    let grid = Grid {
        section: "company",
        title: format!("Not alone on the link: {}", case.name()),
        note: format!(
            "{} MiB of noise. After {:?} one stream of iperf3 (cubic) begins to fill the link from the old site to the new one; {:?} \
             later what both get is measured for {:?}; then, after {:?}, what the move gets alone; then the round trip becomes half as \
             long again, and after {:?} it is measured once more. Disk bytes.",
            disk.size_bytes >> 20,
            times.alone,
            times.found,
            times.measured,
            times.alone,
            times.found,
        ),
        columns: columns(&movers),
        rows: vec![beside, stream, after, longer],
    };
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}

/// How many bytes of the disk come in a second, in 10^6.
fn pace(moving: &Moving, disk: &Disk, time: Duration) -> Result<f64> {
    let file = moving.arrived_in();
    let (began, before) = (Instant::now(), arrived_share(&file, disk));
    sleep(time);
    let (took, now) = (began.elapsed(), arrived_share(&file, disk));
    ensure!(now < 1.0, "the disk is too small: all of it was there");
    Ok((now - before) * disk.data_bytes() as f64 / took.as_secs_f64() / 1e6)
}

/// The link while its round trip is longer. As it was once dropped.
struct Longer<'a>(&'a Sites, LinkSpec);

impl<'a> Longer<'a> {
    fn make(sites: &'a Sites) -> Self {
        let spec = sites.link.spec();
        sites.link.set(LinkSpec {
            rtt: spec.rtt.mul_f64(TIMES_LONGER),
            ..spec
        });
        Self(sites, spec)
    }
}

impl Drop for Longer<'_> {
    fn drop(&mut self) {
        self.0.link.set(self.1);
    }
}
