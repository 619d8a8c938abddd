//! A running virtual machine with two disks lives at A, moves to B, on to C while B has next to
//! nothing, and comes back to A, into the old copies there, by what has changed since.
//!
//! The guest works on both disks all the time. At the end both are compared with what QEMU saw the
//! guest write at all four places, byte for byte, and the first with what the guest believes to have
//! written.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::group::{SECOND_DISK_BYTES, Servers, machine};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::qemu::Machine;
use hikkoshi_testkit::{cache, offline, writelog};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(180);
const MIGRATION_PORT: u16 = 4444;
/// What the headers of frames, messages and handshakes may add to what has changed, in percent.
const HEADERS: u64 = 10;

#[test]
fn vm_comes_back_by_what_has_changed() -> Result<()> {
    let guest = Guest::build()?;
    let dir = cache::scratch()?;
    let dir = dir.path();
    let (a, b, c) = (
        Namespace::new("a")?,
        Namespace::new("b")?,
        Namespace::new("c")?,
    );
    let wan = || LinkSpec::wan(20, 400);
    let (a_b, b_c, c_a) = (
        Link::new(&a, &b, wan())?,
        Link::new(&b, &c, wan())?,
        Link::new(&c, &a, wan())?,
    );
    let image = |name: &str| dir.join(format!("{name}.img"));
    let (right, at_a) = (["right1", "right2"].map(image), ["a1", "a2"].map(image));
    for path in [&right, &at_a] {
        cache::copy_image(&guest.disk, &path[0])?;
        std::fs::File::create(&path[1])?.set_len(SECOND_DISK_BYTES)?;
    }
    let logs_of = |vm: &Machine| [vm.write_log().to_path_buf(), vm.second_write_log()];
    let mut logs = Vec::new();

    let servers_a = Servers::start(&a, &at_a, None, &[])?;
    let mut vm = machine(&a, &guest, dir, "vm-a", false)?;
    vm.console.wait_for("WL start", LONG)?;
    vm.console.wait_for_rounds(2, LONG)?;
    logs.push(logs_of(&vm));

    // A to B, which fetches only what is read.
    let at_b = ["b1", "b2"].map(image);
    let lazily = ["--no-background", "--way-back"];
    let servers_b = Servers::start(&b, &at_b, Some(a_b.address_a), &lazily)?;
    let mut moved = machine(&b, &guest, dir, "vm-b", true)?;
    let to_b = vm.migrate(&mut moved, a_b.address_b, MIGRATION_PORT, LONG)?;
    vm.quit()?;
    vm = moved;
    servers_b.wait("arriving")?;
    servers_a.wait("departed")?;
    vm.console.wait_for_rounds(2, LONG)?;
    logs.push(logs_of(&vm));

    // B to C, which takes all of it, what B does not have from A.
    let at_c = ["c1", "c2"].map(image);
    let servers_c = Servers::start(&c, &at_c, Some(b_c.address_a), &["--way-back"])?;
    let mut moved = machine(&c, &guest, dir, "vm-c", true)?;
    let absent = servers_b.0[0].status()?.number("absent_bytes")?;
    ensure!(absent > 0, "B has everything before C takes over");
    let to_c = vm.migrate(&mut moved, b_c.address_b, MIGRATION_PORT, LONG)?;
    vm.quit()?;
    vm = moved;
    servers_b.wait("departed")?;
    servers_c.wait("local")?;
    servers_b.kill()?;
    servers_a.kill()?;
    vm.console.wait_for_rounds(2, LONG)?;
    logs.push(logs_of(&vm));

    // And back to A.
    let back = ["--return", "--prepare", "none", "--compress", "none"];
    let servers_a = Servers::start(&a, &at_a, Some(c_a.address_a), &back)?;
    let mut moved = machine(&a, &guest, dir, "vm-a2", true)?;
    let to_a = vm.migrate(&mut moved, c_a.address_b, MIGRATION_PORT, LONG)?;
    vm.quit()?;
    vm = moved;
    servers_a.wait("local")?;
    let wire: Vec<u64> = servers_a
        .0
        .iter()
        .map(|server| server.status()?.number("wire_bytes"))
        .collect::<Result<_>>()?;
    servers_c.kill()?;
    vm.console.wait_for_rounds(2, LONG)?;
    logs.push(logs_of(&vm));
    println!("to B {to_b:?}; to C {to_c:?}; back {to_a:?}");

    let (digest, _console) = vm.finish(LONG)?;
    servers_a.kill()?;
    for number in 0..2 {
        let size = std::fs::metadata(&right[number])?.len();
        let mut changed = BTreeSet::new();
        for log in &logs[1..3] {
            writelog::blocks_written(&log[number], size, &mut changed)?;
        }
        let changed = changed.len() as u64 * 4096;
        println!(
            "disk {number} of {size} bytes: {changed} have changed away from A, {} crossed the \
             link on the way back",
            wire[number]
        );
        ensure!(changed > 0 && changed < size / 2, "nothing to be shown");
        ensure!(
            wire[number] <= changed + changed * HEADERS / 100 + (64 << 10),
            "more crossed the link than has changed"
        );
        for log in &logs {
            writelog::apply(&log[number], &right[number])?;
        }
        offline::images_are_equal(&right[number], &at_a[number])?;
    }
    offline::file_system_is_clean(&at_a[0])?;
    let verified = offline::content_is_right(&at_a[0], &guest.tree, &digest)?;
    println!("verified: every byte of both disks; {verified:?}");
    lives_here(&at_a).context("the state at A")?;
    Ok(())
}

/// What is left beside the images at the end: no fence, for the disk lives there again.
fn lives_here(images: &[PathBuf; 2]) -> Result<()> {
    for image in images {
        let mut state = image.clone().into_os_string();
        state.push(".hikkoshi/volume");
        let text = std::fs::read_to_string(state)?;
        ensure!(
            text.contains("life = local") && !text.contains("departed"),
            "{text}"
        );
    }
    Ok(())
}
