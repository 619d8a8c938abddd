//! What a running virtual machine feels of the switch from one site to the other.
//!
//! The guest works on its disk all the time. First it is migrated between two QEMUs that are both
//! on one export, there and back: what QEMU takes by itself. Then it moves to the new site and its
//! disk with it, all of which was copied ahead (`--prepare full`), and the switch is compared with
//! the first one; and back, with what `--prepare ahead` has copied, across a link that is so long in
//! the moment of the handoff that its round trips can be counted by the clock of any machine. After
//! each move the new site's daemon tells of every read that missed something there: it may only
//! have been what the guest wrote at the old site while the copy went on.
//!
//! Longer: `HIKKOSHI_SWITCH_SECONDS=60` (how long reads are watched after each move),
//! `HIKKOSHI_SWITCH_ROUNDS=5` (how often the first three steps are gone through).

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::client::Client;
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::qemu::{Disk, Machine, Migration, Start};
use hikkoshi_testkit::server::Hikkoshi;
use hikkoshi_testkit::writelog::{self, Times};
use hikkoshi_testkit::{cache, offline};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(180);
const PORT: u16 = 10809;
const MIGRATION_PORT: u16 = 4444;
/// The link, but for the moment in which round trips are counted.
const LINK: (u64, u64) = (20, 800);
/// The link then. One round trip must be far more than a busy machine takes for all the rest.
const LONG_ROUND_TRIP: Duration = Duration::from_secs(5);
/// What may be missing at the handoff after `--prepare full` (docs/design/011-moves.md).
const NEARLY_ALL_BYTES: u64 = 8 << 20;
/// How old a write may be that was not copied ahead with `--prepare full`. It takes a second.
const LAST_WRITES: Duration = Duration::from_secs(30);
const ANYWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT);
const OWN_SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT);
const EVERY_MISS: &str = "info,hikkoshi_daemon::volume::relocation=trace";
const A_MISS: &str = "a read misses bytes here";

fn setting(name: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text}")),
        Err(_) => Ok(otherwise),
    }
}

/// Two sites, a link, and the guest that goes to and fro.
struct Journey {
    guest: Guest,
    dir: tempfile::TempDir,
    sites: [Namespace; 2],
    link: Link,
    /// The guest, its disk's server, and where they are.
    vm: Machine,
    at: usize,
    disk: Option<Hikkoshi>,
    image: PathBuf,
    /// The logs of what was written to the image since it has been here.
    logs: Vec<PathBuf>,
    right: PathBuf,
    machines: u32,
}

/// A switch, by the one clock that all of this has.
struct Switch {
    /// As QEMU reports it.
    downtime: Duration,
    /// From the stop at the old site until the guest runs at the new one.
    until_run: Duration,
    /// From the stop at the old site until the first write is answered at the new one.
    until_write: Duration,
}

impl std::fmt::Display for Switch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            downtime,
            until_run,
            until_write,
        } = self;
        write!(
            f,
            "downtime by QEMU {downtime:.0?}; runs after {until_run:.0?}, has a write answered after \
             {until_write:.0?}"
        )
    }
}

impl Journey {
    fn new() -> Result<Self> {
        let guest = Guest::build()?;
        let dir = cache::scratch()?;
        let sites = [Namespace::new("a")?, Namespace::new("b")?];
        let link = Link::new(&sites[0], &sites[1], LinkSpec::wan(LINK.0, LINK.1))?;
        let [right, image] = ["right.img", "disk0.img"].map(|name| dir.path().join(name));
        cache::copy_image(&guest.disk, &right)?;
        cache::copy_image(&guest.disk, &image)?;
        let disk = Hikkoshi::serve(&sites[0], &image, ANYWHERE, None, &[])?;
        let start = Start::Boot(Disk::Tcp(OWN_SERVER));
        let vm = Machine::start(&sites[0], &guest, dir.path(), "vm0", &start)?;
        vm.console.wait_for("WL start", LONG)?;
        vm.console.wait_for("WL sectors are laid out", LONG)?;
        vm.console.wait_for_rounds(3, LONG)?;
        let logs = vec![vm.write_log().to_path_buf()];
        Ok(Self {
            guest,
            dir,
            sites,
            link,
            vm,
            at: 0,
            disk: Some(disk),
            image,
            logs,
            right,
            machines: 0,
        })
    }

    fn address(&self, site: usize) -> Ipv4Addr {
        [self.link.address_a, self.link.address_b][site]
    }

    /// A QEMU at `site` that waits, on the export at `disk`.
    fn waiting(&mut self, site: usize, disk: SocketAddrV4) -> Result<Machine> {
        self.machines += 1;
        let name = format!("vm{}", self.machines);
        let start = Start::Incoming(Disk::Tcp(disk));
        Machine::start(
            &self.sites[site],
            &self.guest,
            self.dir.path(),
            &name,
            &start,
        )
    }

    /// The guest is where it was sent to.
    fn is_at(&mut self, site: usize, vm: Machine) -> Result<()> {
        std::mem::replace(&mut self.vm, vm).quit()?;
        self.at = site;
        self.logs.push(self.vm.write_log().to_path_buf());
        Ok(())
    }

    /// To the other site, its disk stays where it is.
    fn with_the_disk_shared(&mut self, disk_at: usize) -> Result<Switch> {
        let site = 1 - self.at;
        let disk = match disk_at == site {
            true => OWN_SERVER,
            false => SocketAddrV4::new(self.address(disk_at), PORT),
        };
        let mut to = self.waiting(site, disk)?;
        let address = self.address(site);
        let migration = self.vm.migrate(&mut to, address, MIGRATION_PORT, LONG)?;
        let switch = switch(&migration, &mut to)?;
        self.is_at(site, to)?;
        self.vm.console.wait_for_rounds(2, LONG)?;
        Ok(switch)
    }

    /// The new site's server, when as much is copied as it was told to; from when on what is written
    /// at the old site may be missing at the new one.
    fn prepare(&mut self, how: &str) -> Result<(Hikkoshi, PathBuf, Times)> {
        let image = self
            .dir
            .path()
            .join(format!("disk{}.img", self.machines + 1));
        let times = Times::follow(self.vm.write_log())?;
        let socket = image.with_extension("nbd");
        let listen = format!("unix:{}", socket.display());
        let from = format!("nbd://{}", SocketAddrV4::new(self.address(self.at), PORT));
        let new = Hikkoshi::serve_and_log(
            &self.sites[1 - self.at],
            &image,
            ANYWHERE,
            (Some(&from), &["--prepare", how, "--listen", &listen]),
            Some(EVERY_MISS),
        )?;
        let limit = format!("{}s", LONG.as_secs());
        new.command(&["wait", "--for", "prepared", "--timeout", &limit])?;
        // One that misses something, for `watch_reads` to see that it is told of.
        Client::connect(&socket)?.read(0, 4096)?;
        Ok((new, image, times))
    }

    /// The guest lives on the other site's disk.
    fn disk_is(&mut self, new: Hikkoshi, image: PathBuf) -> Result<()> {
        let own = self.logs.pop().context("the guest's log here")?;
        new.wait_resident(LONG)?;
        let old = self.disk.replace(new).context("the old disk's server")?;
        let state = old.wait_state("departed", LONG)?;
        ensure!(state.state()? == "departed", "{state:?}");
        old.kill()?;
        for log in self.logs.drain(..) {
            writelog::apply(&log, &self.right)?;
        }
        offline::images_are_equal(&self.right, &self.image).context("the old site's image")?;
        std::fs::remove_file(&self.image)?;
        self.image = image;
        self.logs.push(own);
        Ok(())
    }

    /// To the other site with its disk; the first write is the handoff.
    fn with_its_disk(&mut self, watch: Duration) -> Result<Switch> {
        let (new, image, times) = self.prepare("full")?;
        let old_log = self.vm.write_log().to_path_buf();
        let site = 1 - self.at;
        let mut to = self.waiting(site, OWN_SERVER)?;
        let address = self.address(site);
        let migration = self.vm.migrate(&mut to, address, MIGRATION_PORT, LONG)?;
        let switch = switch(&migration, &mut to)?;
        self.is_at(site, to)?;
        let misses = self.watch_reads(&new, watch)?;
        let ages = ages(&misses, &old_log, &self.image, &times, migration.stopped_at)?;
        tell("full", &misses, &ages);
        let bytes: u64 = ages.len() as u64 * 4096;
        ensure!(
            bytes <= NEARLY_ALL_BYTES,
            "{bytes} bytes were read from the source after --prepare full"
        );
        ensure!(
            ages.iter().all(|age| *age < LAST_WRITES),
            "not only what was written last was read from the source: {ages:?}"
        );
        self.disk_is(new, image)?;
        Ok(switch)
    }

    /// The same with the handoff while the guest stands still, across a very long link: returns how
    /// long it took.
    fn with_a_long_handoff(&mut self, watch: Duration) -> Result<Duration> {
        let (new, image, times) = self.prepare("ahead")?;
        let old_log = self.vm.write_log().to_path_buf();
        let site = 1 - self.at;
        let mut to = self.waiting(site, OWN_SERVER)?;
        let address = self.address(site);
        let migration = self
            .vm
            .migrate_and_hold(&mut to, address, MIGRATION_PORT, LONG)?;
        let long = LinkSpec {
            rtt: LONG_ROUND_TRIP,
            ..self.link.spec()
        };
        let usual = self.link.spec();
        self.link.set(long);
        let start = Instant::now();
        new.command(&["handoff"])?;
        let took = start.elapsed();
        self.link.set(usual);
        println!(
            "handoff across a link of {LONG_ROUND_TRIP:?}: {took:.2?}; {} bytes absent",
            new.status()?.number("absent_bytes")?
        );
        ensure!(
            took >= LONG_ROUND_TRIP && took < 2 * LONG_ROUND_TRIP,
            "the handoff takes one round trip of {LONG_ROUND_TRIP:?}, and this one took {took:?}"
        );
        to.go_on()?;
        self.is_at(site, to)?;
        let misses = self.watch_reads(&new, watch)?;
        let ages = ages(&misses, &old_log, &self.image, &times, migration.stopped_at)?;
        tell("ahead", &misses, &ages);
        self.disk_is(new, image)?;
        Ok(took)
    }

    /// The reads that missed something here since the handoff, after the guest has worked for `time`.
    fn watch_reads(&mut self, new: &Hikkoshi, time: Duration) -> Result<Vec<Miss>> {
        let before = self.vm.console.last_tick().unwrap_or_default();
        let start = Instant::now();
        while start.elapsed() < time {
            self.vm.check()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        let now = self.vm.console.wait_for_rounds(5, LONG)?;
        ensure!(now.content > before.content, "the guest reads nothing");
        let log = new.log()?;
        let (before, since) = log
            .split_once("handoff: the disk lives here")
            .with_context(|| format!("no handoff: {}", new.tail()))?;
        ensure!(before.contains(A_MISS), "what reads miss is not told");
        let lines = since.lines().filter(|line| line.contains(A_MISS));
        lines.map(Miss::parse).collect()
    }
}

/// What a read missed at the new site.
#[derive(Clone, Copy, Debug)]
struct Miss {
    start: u64,
    end: u64,
}

impl Miss {
    fn parse(line: &str) -> Result<Self> {
        let field = |name: &str| -> Option<u64> {
            let rest = line.split_once(name)?.1;
            rest.split(|c: char| !c.is_ascii_digit())
                .next()?
                .parse()
                .ok()
        };
        let (start, end) = (field("missing.start="), field("missing.end="));
        let (Some(start), Some(end)) = (start, end) else {
            anyhow::bail!("not understood: {line}");
        };
        Ok(Self { start, end })
    }
}

fn switch(migration: &Migration, to: &mut Machine) -> Result<Switch> {
    let (written_at, began_at) = to.first_write()?;
    let since = |at: SystemTime| at.duration_since(migration.stopped_at).unwrap_or_default();
    Ok(Switch {
        downtime: migration.downtime,
        until_run: since(began_at),
        until_write: since(written_at),
    })
}

/// How long before the switch each block was written that was missed after it.
///
/// # Errors
/// One was not written at the old site while it was copied.
fn ages(
    misses: &[Miss],
    old_log: &Path,
    image: &Path,
    times: &Times,
    switch: SystemTime,
) -> Result<Vec<Duration>> {
    let size = std::fs::metadata(image)?.len();
    let written = writelog::last_writes(old_log, size, times.first_entry())?;
    ensure!(
        !written.is_empty(),
        "the guest has written nothing meanwhile"
    );
    let mut blocks: Vec<u64> = misses
        .iter()
        .flat_map(|miss| miss.start / 4096..miss.end.div_ceil(4096))
        .collect();
    blocks.sort_unstable();
    blocks.dedup();
    let age = |block: &u64| {
        let entry = written.get(block).with_context(|| {
            format!("block {block} was read from the source, and was there when the copy began")
        })?;
        let at = times.not_before(*entry).context("a write of no time")?;
        Ok(switch.duration_since(at).unwrap_or_default())
    };
    blocks.iter().map(age).collect()
}

fn tell(how: &str, misses: &[Miss], ages: &[Duration]) {
    println!(
        "--prepare {how}: {} pieces of {} blocks were read from the source after the switch, written \
         {:.1?} before it at the most",
        misses.len(),
        ages.len(),
        ages.iter().max().copied().unwrap_or_default()
    );
}

#[test]
fn switch_takes_one_round_trip_and_then_reads_are_local() -> Result<()> {
    let watch = Duration::from_secs(setting("HIKKOSHI_SWITCH_SECONDS", 6)?);
    let rounds = setting("HIKKOSHI_SWITCH_ROUNDS", 1)?;
    let mut journey = Journey::new()?;
    for _ in 0..rounds {
        let home = journey.at;
        let there = journey.with_the_disk_shared(home)?;
        let back = journey.with_the_disk_shared(home)?;
        let moved = journey.with_its_disk(watch)?;
        println!(
            "one export, there: {there}\none export, back:  {back}\nits disk moves:    {moved}"
        );
    }
    journey.with_a_long_handoff(watch)?;

    let Journey {
        vm,
        disk,
        right,
        image,
        logs,
        guest,
        ..
    } = journey;
    let (digest, _console) = vm.finish(LONG)?;
    disk.context("the disk's server")?.kill()?;
    for log in logs {
        writelog::apply(&log, &right)?;
    }
    offline::images_are_equal(&right, &image).context("the last site's image")?;
    offline::file_system_is_clean(&image)?;
    let verified = offline::content_is_right(&image, &guest.tree, &digest)?;
    println!("verified: every byte of the disk; {verified:?}");
    Ok(())
}
