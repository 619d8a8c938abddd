//! The harness itself, without any server of ours: a guest boots from `qemu-nbd`, moves to a
//! second QEMU that has the same export, goes on, and what it wrote is on the disk. Another guest
//! uses the disk with the kernel's NBD client.
//!
//! When this fails, the tests of `hikkoshi` cannot tell anything.

#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::qemu::{Disk, Machine, Start};
use hikkoshi_testkit::server::Server;
use hikkoshi_testkit::{cache, offline, process, writelog};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

#[test]
fn a_guest_moves_between_two_qemus_that_share_a_disk() -> Result<()> {
    let guest = Guest::build()?;
    let dir = cache::scratch()?;
    let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
    let link = Link::new(&a, &b, LinkSpec::wan(50, 400))?;
    let image = dir.path().join("disk.img");
    let right = dir.path().join("right.img");
    cache::copy_image(&guest.disk, &image)?;
    cache::copy_image(&guest.disk, &right)?;
    let server = Server::qemu_nbd(&a, &image, SocketAddrV4::new(link.address_a, 10809))?;
    let disk = Disk::Tcp(server.address());

    let mut first = Machine::start(&a, &guest, dir.path(), "first", &Start::Boot(disk.clone()))?;
    first.console.wait_for("WL start", LONG)?;
    first.console.wait_for_rounds(30, LONG)?;
    let mut second = Machine::start(&b, &guest, dir.path(), "second", &Start::Incoming(disk))?;
    let migration = first.migrate(&mut second, link.address_b, 4444, LONG)?;
    println!("{migration:?}");
    let logs = [
        first.write_log().to_path_buf(),
        second.write_log().to_path_buf(),
    ];
    first.quit()?;
    second.console.wait_for_rounds(30, LONG)?;
    let (digest, console) = second.finish(LONG)?;
    println!("{:?}, {:?}", console.last_tick(), console.longest_silence());
    server.kill()?;

    offline::file_system_is_clean(&image)?;
    println!(
        "{:?}",
        offline::content_is_right(&image, &guest.tree, &digest)?
    );
    for log in &logs {
        println!("{:?}", writelog::apply(log, &right)?);
    }
    offline::images_are_equal(&right, &image)?;

    // The comparisons notice a file that is gone, and a single byte.
    let list = std::fs::read_to_string(guest.tree.join("content.list"))?;
    let (_, path) = list.lines().next().unwrap().split_once(' ').unwrap();
    process::run(
        "debugfs",
        ["-w", "-R", &format!("rm /{path}"), image.to_str().unwrap()],
    )?;
    let spoilt = offline::content_is_right(&image, &guest.tree, &digest);
    ensure!(spoilt.is_err(), "{path} is gone, unnoticed");
    ensure!(
        offline::file_system_is_clean(&image).is_ok(),
        "debugfs has spoilt more than that"
    );
    cache::copy_image(&right, &image)?;
    offline::images_are_equal(&right, &image)?;
    let at = offline::spoil(&image, 1, 0, image.metadata()?.len())?;
    ensure!(
        offline::images_are_equal(&right, &image).is_err(),
        "byte {at} is wrong, unnoticed"
    );
    Ok(())
}

#[test]
fn the_kernel_client_uses_a_disk() -> Result<()> {
    let guest = Guest::build()?;
    let dir = cache::scratch()?;
    let site = Namespace::new("a")?;
    let image = dir.path().join("disk.img");
    cache::copy_image(&guest.disk, &image)?;
    let server = Server::qemu_nbd(&site, &image, SocketAddrV4::new(Ipv4Addr::LOCALHOST, 10809))?;
    let start = Start::KernelClient(server.address().port());
    let machine = Machine::start(&site, &guest, dir.path(), "machine", &start)?;
    machine.console.wait_for("WL start", LONG)?;
    machine.console.wait_for_rounds(20, LONG)?;
    let (digest, console) = machine.finish(LONG)?;
    println!("{:?}", console.last_tick());
    server.kill()?;
    offline::file_system_is_clean(&image)?;
    println!(
        "{:?}",
        offline::content_is_right(&image, &guest.tree, &digest)?
    );
    Ok(())
}
