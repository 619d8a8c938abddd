//! A virtual machine whose disk's daemon is killed again and again, and which never notices.
//!
//! The guest boots from a destination that has nothing yet, and works on its disk all the time.
//! Every now and then, at a random instant, the destination is killed with SIGKILL and started
//! again; QEMU waits for it and sends again what was not answered. First most of the disk is
//! still to come, in the end it is all there. The guest may never see an error; at the end the
//! file system is clean and every byte is what QEMU saw the guest write.

#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::pattern::Random;
use hikkoshi_testkit::qemu::{Disk, Machine, Start};
use hikkoshi_testkit::server::Hikkoshi;
use hikkoshi_testkit::{cache, offline, writelog};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(240);
const OLD: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 10810);
const NEW: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 10809);
/// Kills while the copy is under way, and after it.
const KILLS_ARRIVING: u64 = 9;
const KILLS_LOCAL: u64 = 3;
/// The longest time between two kills, beside that in which the guest gets something done.
const MAX_PAUSE_MS: u64 = 700;

#[test]
fn vm_never_notices_that_its_destination_is_killed() -> Result<()> {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    println!("seed {seed} (the instants of the kills are not repeated by it)");
    let mut random = Random::new(seed);
    let guest = Guest::build()?;
    let dir = cache::scratch()?;
    let site = Namespace::new("killed")?;
    let (right, old_image) = (dir.path().join("right.img"), dir.path().join("old.img"));
    cache::copy_image(&guest.disk, &right)?;
    cache::copy_image(&guest.disk, &old_image)?;
    let old = Hikkoshi::serve(&site, &old_image, OLD, None, &[])?;
    let image = dir.path().join("new.img");
    let from = old.uri();
    // Slow enough for the copy to outlast the kills that are to hit it.
    let slowly = ["--max-rate", "500kB/s"];
    let serve = |extra: &[&str]| Hikkoshi::serve(&site, &image, NEW, Some(&from), extra);

    let mut new = serve(&slowly)?;
    let start = Start::Boot(Disk::Tcp(NEW));
    let mut machine = Machine::start(&site, &guest, dir.path(), "vm", &start)?;
    machine.console.wait_for("WL start", LONG)?;
    machine.console.wait_for_rounds(3, LONG)?;
    ensure!(
        new.status()?.state()? == "arriving",
        "the guest wrote, and this is no handoff"
    );

    let mut longest = Duration::ZERO;
    for kill in 0..KILLS_ARRIVING + KILLS_LOCAL {
        let arriving = kill < KILLS_ARRIVING;
        if kill == KILLS_ARRIVING {
            drop(new);
            new = serve(&[])?;
            new.wait_resident(LONG)?;
        }
        std::thread::sleep(Duration::from_millis(random.below(MAX_PAUSE_MS)));
        let state = new.status()?.state()?.to_owned();
        let wanted = if arriving { "arriving" } else { "local" };
        ensure!(state == wanted, "kill {kill} would find the disk {state}");
        let away = Instant::now();
        new.kill()?;
        new = serve(if arriving { &slowly } else { &[] })?;
        longest = longest.max(away.elapsed());
        // It goes on: its reads and writes are answered again.
        machine.console.wait_for_rounds(2, LONG)?;
        machine.check()?;
    }
    println!(
        "{} kills, the disk away for {longest:.2?} at most; longest step of the guest {:?}",
        KILLS_ARRIVING + KILLS_LOCAL,
        machine.console.last_tick().unwrap_or_default().longest,
    );

    let log = machine.write_log().to_path_buf();
    let (digest, _console) = machine.finish(LONG)?;
    new.kill()?;
    old.kill()?;
    offline::images_are_equal(&guest.disk, &old_image)?;
    let applied = writelog::apply(&log, &right)?;
    offline::images_are_equal(&right, &image)?;
    offline::file_system_is_clean(&image)?;
    let verified = offline::content_is_right(&image, &guest.tree, &digest)?;
    println!("verified: every byte of the disk; {applied:?}; {verified:?}");
    Ok(())
}
