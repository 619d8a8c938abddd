//! The main job, end to end: a running virtual machine moves to another site, and its disk
//! follows it.
//!
//! A guest boots from a disk at site A and works on it all the time. It is live migrated across
//! an emulated link to site B, where its disk is a destination that has nothing yet. When all has
//! come, the old server is killed, and the guest goes on. At the end the disk is compared with
//! what QEMU saw the guest write, byte for byte, and with what the guest believes to have
//! written, file by file.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::qemu::{Disk, Machine, Start};
use hikkoshi_testkit::server::{Hikkoshi, Server};
use hikkoshi_testkit::{cache, offline, writelog};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(180);
const PORT: u16 = 10809;
const MIGRATION_PORT: u16 = 4444;
/// How much the guest does before and after each step, in rounds of its workload.
const ROUNDS: u64 = 15;

/// An emulated CPU takes a whole one: the tests run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// All addresses of a site: a server is reached across the link that it came by, from its own
/// site, and across the link that its disk leaves by.
const ANYWHERE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT);
/// A site's own server.
const OWN_SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT);

/// A copy that takes five minutes, unless it is told otherwise.
const SLOWLY: [&str; 2] = ["--max-rate", "1MB/s"];

/// The server of the disk at the site that the guest leaves.
enum OldSite {
    Hikkoshi(Hikkoshi),
    Peer(Server),
}

impl OldSite {
    fn kill(self) -> Result<()> {
        match self {
            OldSite::Hikkoshi(server) => server.kill(),
            OldSite::Peer(server) => server.kill(),
        }
    }
}

/// Where the guest is now.
struct Here {
    server: OldSite,
    machine: Machine,
    image: PathBuf,
}

/// What all moves of one test share.
struct Journey {
    guest: Guest,
    dir: tempfile::TempDir,
    /// What the disk must hold: the original, and the writes of every machine up to now.
    right: PathBuf,
}

impl Journey {
    fn new() -> Result<Self> {
        let guest = Guest::build()?;
        let dir = cache::scratch()?;
        let right = dir.path().join("right.img");
        cache::copy_image(&guest.disk, &right)?;
        Ok(Self { guest, dir, right })
    }

    fn image(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.img"))
    }

    /// The guest boots at `site` from `server`, which serves a copy of the disk.
    fn boot(&self, site: &Namespace, serve: impl FnOnce(&Path) -> Result<OldSite>) -> Result<Here> {
        let image = self.image("a");
        cache::copy_image(&self.guest.disk, &image)?;
        let server = serve(&image)?;
        let start = Start::Boot(Disk::Tcp(OWN_SERVER));
        let machine = Machine::start(site, &self.guest, self.dir.path(), "vm-a", &start)?;
        machine.console.wait_for("WL start", LONG)?;
        machine.console.wait_for_rounds(ROUNDS, LONG)?;
        Ok(Here {
            server,
            machine,
            image,
        })
    }

    /// The guest moves across `link` to `site`, its disk follows, and the old site is gone.
    fn go_on(&self, here: Here, name: &str, site: &Namespace, link: &Link) -> Result<Here> {
        self.go_on_with(here, name, site, (link, &[]), |server, _| Ok(server))
    }

    /// The same with options of the new site's server, and `trouble`, which happens when the guest
    /// has just arrived.
    fn go_on_with(
        &self,
        mut here: Here,
        name: &str,
        site: &Namespace,
        (link, options): (&Link, &[&str]),
        trouble: impl FnOnce(Hikkoshi, &Machine) -> Result<Hikkoshi>,
    ) -> Result<Here> {
        let image = self.image(name);
        let start = Instant::now();
        let new = Hikkoshi::serve(site, &image, ANYWHERE, Some(&source_uri(link)), options)?;
        new.wait_state("standby", LONG)?;
        let waiting = Start::Incoming(Disk::Tcp(OWN_SERVER));
        let vm = format!("vm-{name}");
        let mut machine = Machine::start(site, &self.guest, self.dir.path(), &vm, &waiting)?;
        ensure!(
            new.status()?.state()? == "standby",
            "a VM that only waits is no handoff"
        );

        let migration = here
            .machine
            .migrate(&mut machine, link.address_b, MIGRATION_PORT, LONG)?;
        let arrived = start.elapsed();
        let old_log = here.machine.write_log().to_path_buf();
        let before = here
            .machine
            .console
            .longest_silence()
            .context("no tick before the move")?;
        here.machine.quit()?;
        // The first write is the handoff: the guest writes all the time.
        machine.console.wait_for_rounds(1, LONG)?;
        let status = new.status()?;
        ensure!(
            status.state()? != "standby",
            "the guest wrote, and this is no handoff"
        );
        let absent = status.number("absent_bytes")?;

        let new = trouble(new, &machine)?;
        let status = new.wait_resident(LONG)?;
        let resident = start.elapsed();
        machine.check()?;
        here.server.kill()?;
        machine.console.wait_for_rounds(ROUNDS, LONG)?;
        ensure!(
            new.status()?.state()? == "local",
            "not an ordinary disk, with its source gone"
        );

        let after = machine
            .console
            .longest_silence()
            .context("no tick after the move")?;
        println!(
            "to {name}: VM there after {arrived:.1?}, disk after {resident:.1?}; \
             {} MB were still to come after the handoff; {migration:?}",
            absent / 1_000_000,
        );
        println!(
            "  longest time between two reports of the guest (it makes four a second): \
             before {:.0?}, at the move {:.0?}, after it {:.0?}; longest step {:?}",
            before.2,
            after.0 - before.1,
            after.2,
            machine.console.last_tick().unwrap_or_default().longest,
        );
        println!(
            "  link: {:?} there, {:?} back; status: {}",
            link.a_to_b(),
            link.b_to_a(),
            status.0
        );

        // Since the handoff nobody may have written to the old image.
        let applied = writelog::apply(&old_log, &self.right)?;
        offline::images_are_equal(&self.right, &here.image).context("the old site's image")?;
        println!("  old image as written there: {applied:?}");
        Ok(Here {
            server: OldSite::Hikkoshi(new),
            machine,
            image,
        })
    }

    /// The guest finishes, and its disk is compared.
    fn arrive(&self, here: Here) -> Result<()> {
        let log = here.machine.write_log().to_path_buf();
        let (digest, _console) = here.machine.finish(LONG)?;
        here.server.kill()?;
        let applied = writelog::apply(&log, &self.right)?;
        offline::images_are_equal(&self.right, &here.image).context("the last site's image")?;
        offline::file_system_is_clean(&here.image)?;
        let verified = offline::content_is_right(&here.image, &self.guest.tree, &digest)?;
        println!("verified: every byte of the disk; {applied:?}; {verified:?}");
        Ok(())
    }
}

/// The disk at the near end of `link`, as its far end sees it.
fn source_uri(link: &Link) -> String {
    format!("nbd://{}", SocketAddrV4::new(link.address_a, PORT))
}

/// A link between cities: 50 ms round trip, 400 Mbit/s.
fn wan(from: &Namespace, to: &Namespace) -> Result<Link> {
    Link::new(from, to, LinkSpec::wan(50, 400))
}

#[test]
fn vm_moves_between_sites() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let journey = Journey::new()?;
    let (a, b, c) = (
        Namespace::new("a")?,
        Namespace::new("b")?,
        Namespace::new("c")?,
    );
    let (to_b, to_c) = (wan(&a, &b)?, wan(&b, &c)?);
    let here = journey.boot(&a, |image| {
        Ok(OldSite::Hikkoshi(Hikkoshi::serve(
            &a,
            image,
            ANYWHERE,
            None,
            &[],
        )?))
    })?;
    let here = journey.go_on(here, "b", &b, &to_b)?;
    journey.arrive(journey.go_on(here, "c", &c, &to_c)?)
}

#[test]
fn vm_moves_away_from_qemu_nbd() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let journey = Journey::new()?;
    let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
    let link = wan(&a, &b)?;
    let here = journey.boot(&a, |image| {
        Ok(OldSite::Peer(Server::qemu_nbd(&a, image, ANYWHERE)?))
    })?;
    journey.arrive(journey.go_on(here, "b", &b, &link)?)
}

#[test]
fn vm_moves_away_from_nbdkit() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let journey = Journey::new()?;
    let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
    let link = wan(&a, &b)?;
    let here = journey.boot(&a, |image| {
        Ok(OldSite::Peer(Server::nbdkit(&a, image, ANYWHERE)?))
    })?;
    journey.arrive(journey.go_on(here, "b", &b, &link)?)
}

#[test]
fn vm_goes_on_when_the_destination_is_killed_and_the_link_is_cut() -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let journey = Journey::new()?;
    let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
    let link = wan(&a, &b)?;
    let here = journey.boot(&a, |image| {
        Ok(OldSite::Hikkoshi(Hikkoshi::serve(
            &a,
            image,
            ANYWHERE,
            None,
            &[],
        )?))
    })?;
    let from = source_uri(&link);
    let trouble = |mut server: Hikkoshi, machine: &Machine| -> Result<Hikkoshi> {
        // A slow link from here on: memory would not get across it while the guest works.
        link.set(LinkSpec::wan(50, 60));
        for round in 0..3 {
            let before = server.status()?;
            ensure!(
                before.state()? == "arriving",
                "the copy is over before the trouble: {before:?}"
            );
            server.kill()?;
            if round == 1 {
                // The source can not be reached while the destination comes back.
                link.cut();
            }
            let start = Instant::now();
            server = Hikkoshi::serve(&b, &journey.image("b"), ANYWHERE, Some(&from), &SLOWLY)?;
            let back = start.elapsed();
            if round == 1 {
                std::thread::sleep(Duration::from_secs(2));
                link.restore();
            }
            let after = server.status()?;
            ensure!(
                after.number("owned_bytes")? >= before.number("owned_bytes")?,
                "owned blocks are gone: {before:?} became {after:?}"
            );
            println!(
                "killed: {} absent, then {}; back after {:.1?}",
                before.0["absent_bytes"], after.0["absent_bytes"], back,
            );
            machine.console.wait_for_rounds(3, LONG)?;
        }
        link.set(LinkSpec::wan(50, 400));
        let after = server.status()?;
        ensure!(
            after.state()? == "arriving",
            "the copy is over before the trouble is: {after:?}"
        );
        server.command(&["limit", "none"])?;
        Ok(server)
    };
    // Nothing ahead of the handoff, and slowly then, so that the copy is under way all through the
    // trouble, on a slow machine too.
    let bare = [&["--prepare", "none"], &SLOWLY[..]].concat();
    journey.arrive(journey.go_on_with(here, "b", &b, (&link, &bare), trouble)?)
}
