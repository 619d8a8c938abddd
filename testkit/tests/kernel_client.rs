//! The kernel's own NBD client on a destination whose disk is still on its way.
//!
//! Inside a guest, nbd.ko and `nbd-client` make /dev/nbd0 of the destination's export; the file
//! system on it is mounted, verified and written to while its blocks arrive over a slow link. The
//! source is killed when all is there, and the guest goes on.

#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::qemu::{Machine, Start};
use hikkoshi_testkit::server::Hikkoshi;
use hikkoshi_testkit::{cache, offline};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(180);
const PORT: u16 = 10809;

#[test]
fn kernel_client_on_dev_nbd0() -> Result<()> {
    let guest = Guest::build()?;
    let dir = cache::scratch()?;
    let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
    let link = Link::new(&a, &b, LinkSpec::wan(50, 60))?;
    let (image_a, image_b) = (dir.path().join("a.img"), dir.path().join("b.img"));
    cache::copy_image(&guest.disk, &image_a)?;
    let source = Hikkoshi::serve(
        &a,
        &image_a,
        SocketAddrV4::new(link.address_a, PORT),
        None,
        &[],
    )?;
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORT);
    // The copy waits for the guest to be at work, however slow this machine is.
    let slowly = ["--max-rate", "500kB/s"];
    let destination = Hikkoshi::serve(&b, &image_b, address, Some(&source.uri()), &slowly)?;

    let start = Instant::now();
    let machine = Machine::start(
        &b,
        &guest,
        dir.path(),
        "vm",
        &Start::KernelClient(address.port()),
    )?;
    machine.console.wait_for("WL mounted", LONG)?;
    machine.console.wait_for_rounds(5, LONG)?;
    let status = destination.status()?;
    println!(
        "after five rounds of work, {:.1?}: {}",
        start.elapsed(),
        status.0
    );
    ensure!(status.state()? == "arriving", "{status:?}");
    ensure!(
        status.number("absent_bytes")? > 0,
        "all is here already: {status:?}"
    );
    destination.command(&["limit", "none"])?;
    let status = destination.wait_resident(LONG)?;
    println!("all here after {:.1?}: {}", start.elapsed(), status.0);
    source.kill()?;
    machine.console.wait_for_rounds(10, LONG)?;
    let (digest, console) = machine.finish(LONG)?;
    println!(
        "{:?}, silence {:?}",
        console.last_tick(),
        console.longest_silence().map(|s| s.2)
    );
    destination.kill()?;

    offline::images_are_equal(&guest.disk, &image_a)?;
    offline::file_system_is_clean(&image_b)?;
    println!(
        "{:?}",
        offline::content_is_right(&image_b, &guest.tree, &digest)?
    );
    Ok(())
}
