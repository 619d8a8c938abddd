//! A virtual machine with two disks goes from A to B, and back to A before B has all of its disks, by
//! `hikkoshi migrate` both times.
//!
//! The guest works on both disks all the time, and B copies nothing in the background, so that most of
//! each disk never leaves A. The first way back is interrupted: the VM runs on at B, whose disks still
//! lean on the old copies at A. The second one goes through. At the end both disks at A are compared
//! with what QEMU saw the guest write at all three places, byte for byte, the first with what the guest
//! believes to have written, and what crossed the link with what was written at B.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, bail, ensure};
use hikkoshi_testkit::group::{SECOND_DISK_BYTES, Servers, machine};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::process::Process;
use hikkoshi_testkit::qemu::Machine;
use hikkoshi_testkit::{cache, offline, writelog};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);
/// What the headers of frames, messages and handshakes may add to what was written, in percent, and
/// on top of that, for a disk to which next to nothing was.
const HEADERS: u64 = 10;
const SLACK_BYTES: u64 = 64 << 10;
const BLOCK_BYTES: u64 = 4096;

/// `hikkoshi migrate --json` from one machine and its disks to another, which listens at `uri`.
fn migrate(
    output: PathBuf,
    uri: &str,
    machines: [&Machine; 2],
    disks: [&Servers; 2],
    more: &[&str],
) -> Result<Process> {
    let [from, to] = machines.map(|vm| format!("unix:{}", vm.second_qmp().display()));
    let mut arguments: Vec<String> = ["migrate", "--json", "--qmp", &from, "--to-qmp", &to]
        .map(Into::into)
        .into();
    arguments.extend(["--uri".into(), uri.into()]);
    for (old, new) in disks[0].0.iter().zip(&disks[1].0) {
        let pair = format!("{}#={}#", old.control(), new.control());
        arguments.extend(["--disk".into(), pair]);
    }
    // QEMU's logs of the writes are this test's own.
    for log in ["log-file", "log-file2"] {
        arguments.extend(["--leave-out".into(), log.into()]);
    }
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    Process::start(None, cache::hikkoshi()?, &arguments, &output)
}

/// What was said in JSON up to now.
fn said(output: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(output)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    Ok(lines.collect())
}

/// Waits for the end; returns whether it was a good one, all that was said, and the last of it.
fn end(mut process: Process, output: &Path) -> Result<(bool, Vec<Value>, Value)> {
    let status = process.wait(LONG)?;
    let said = said(output)?;
    let last = said.last().with_context(|| process.tail())?.clone();
    ensure!(last["event"] == "end", "no outcome: {}", process.tail());
    Ok((status.success(), said, last))
}

/// Interrupts it as soon as some of the VM's memory was sent.
fn interrupt_under_way(process: &mut Process, output: &Path) -> Result<()> {
    let begun = Instant::now();
    let under_way = |news: &Value| {
        news["event"] == "progress" && news["step"] == "migrate" && news["done_bytes"] != 0
    };
    while !said(output)?.iter().any(under_way) {
        process.check_alive()?;
        if begun.elapsed() > LONG {
            bail!("it never began: {}", process.tail());
        }
        std::thread::sleep(POLL);
    }
    let pid = rustix::process::Pid::from_raw(i32::try_from(process.pid())?).context("no pid")?;
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    Ok(())
}

/// B lacks most of both disks.
fn is_not_complete(b: &Servers) -> Result<()> {
    for status in b.status()? {
        let (absent, size) = (status.number("absent_bytes")?, status.number("size_bytes")?);
        ensure!(absent > size / 4, "B has nearly all of it: {status:?}");
    }
    Ok(())
}

#[test]
fn vm_goes_back_in_the_middle_of_its_move() -> Result<()> {
    let guest = Guest::build()?;
    let dir = cache::scratch()?;
    let dir = dir.path();
    let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
    let link = Link::new(&a, &b, LinkSpec::wan(20, 400))?;
    let image = |name: &str| dir.join(format!("{name}.img"));
    let (right, at_a) = (["right1", "right2"].map(image), ["a1", "a2"].map(image));
    for path in [&right, &at_a] {
        cache::copy_image(&guest.disk, &path[0])?;
        std::fs::File::create(&path[1])?.set_len(SECOND_DISK_BYTES)?;
    }
    let logs_of = |vm: &Machine| [vm.write_log().to_path_buf(), vm.second_write_log()];
    let quickly = ["--bandwidth", "1GB/s", "--downtime", "1s"];

    let servers_a = Servers::start(&a, &at_a, None, &[])?;
    let vm = machine(&a, &guest, dir, "vm-a", false)?;
    vm.console.wait_for("WL start", LONG)?;
    vm.console.wait_for_rounds(2, LONG)?;
    let mut logs = vec![logs_of(&vm)];

    // A to B, where only what is read arrives.
    let at_b = ["b1", "b2"].map(image);
    let lazily = ["--no-background", "--way-back"];
    let servers_b = Servers::start(&b, &at_b, Some(link.address_a), &lazily)?;
    let to = machine(&b, &guest, dir, "vm-b", true)?;
    let output = dir.join("there.log");
    let uri = |address: Ipv4Addr, port: u16| format!("tcp:{address}:{port}");
    let more = [&quickly[..], &["--no-prepare", "--detach", "--quit-old"]].concat();
    let there = migrate(
        output.clone(),
        &uri(link.address_b, 4444),
        [&vm, &to],
        [&servers_a, &servers_b],
        &more,
    )?;
    let (good, _, last) = end(there, &output)?;
    ensure!(good && last["vm"] == "new", "{last}");
    vm.wait_end()?;
    to.console.wait_for_rounds(2, LONG)?;
    let vm = to;
    logs.push(logs_of(&vm));
    is_not_complete(&servers_b)?;

    // Back: the old copies are served again, and stand by.
    servers_a.kill()?;
    let back = ["--return", "--compress", "none"];
    let servers_a = Servers::start(&a, &at_a, Some(link.address_b), &back)?;
    servers_b.wait_for_the_source()?;
    for status in servers_a.status()? {
        let notes = status.0["notes"].to_string();
        ensure!(
            status.0["old_copy_needed"] == true
                && notes.contains("only in the old copy that is here"),
            "{status:?}"
        );
    }
    let to = machine(&a, &guest, dir, "vm-a2", true)?;

    // The first way back is interrupted.
    let output = dir.join("back0.log");
    let mut moving = migrate(
        output.clone(),
        &uri(link.address_a, 4445),
        [&vm, &to],
        [&servers_b, &servers_a],
        &["--bandwidth", "2MB/s", "--keep-standby"],
    )?;
    interrupt_under_way(&mut moving, &output)?;
    let (good, news, last) = end(moving, &output)?;
    ensure!(
        !good && last["vm"] == "old" && last["disks"] == "old-standby",
        "{last}"
    );
    for each in last["each"].as_array().context("not told of each disk")? {
        let text = each["text"].as_str().unwrap_or_default();
        ensure!(
            each["old"] == "arriving"
                && each["new"] == "standby"
                && text.contains("is at the old site, and the new site stands by for it")
                && text.contains("is only in the old copy at the new site"),
            "{last}"
        );
    }
    ensure!(
        last["advice"].to_string().contains("Keep that image"),
        "{last}"
    );
    let note = |words: &str| {
        let told = |news: &&Value| news["text"].as_str().is_some_and(|t| t.contains(words));
        news.iter().filter(told).count()
    };
    ensure!(
        note("comes back before all of it was at the old site") == 2
            && note("what was written there comes after") == 1,
        "{news:?}"
    );
    vm.console.wait_for_rounds(1, LONG)?;
    drop(to);

    // The second one goes through.
    let to = machine(&a, &guest, dir, "vm-a3", true)?;
    is_not_complete(&servers_b)?;
    let before = servers_a.status()?.map(|s| s.number("wire_bytes"));
    let output = dir.join("back.log");
    let more = [&quickly[..], &["--quit-old"]].concat();
    let moving = migrate(
        output.clone(),
        &uri(link.address_a, 4446),
        [&vm, &to],
        [&servers_b, &servers_a],
        &more,
    )?;
    let (good, _, last) = end(moving, &output)?;
    ensure!(
        good && last["vm"] == "new" && last["disks"] == "new",
        "{last}"
    );
    vm.wait_end()?;
    // B has gone back, and never had all of it.
    is_not_complete(&servers_b)?;
    for server in &servers_b.0 {
        let status = server.wait_state("departed", LONG)?;
        let notes = status.0["notes"].to_string();
        ensure!(notes.contains("the disk has gone back"), "{status:?}");
    }
    let after = servers_a.status()?;
    for status in &after {
        ensure!(
            status.state()? == "local"
                && status.number("absent_bytes")? == 0
                && status.0["old_copy_needed"] == false,
            "{status:?}"
        );
    }
    servers_b.kill()?;
    to.console.wait_for_rounds(2, LONG)?;
    logs.push(logs_of(&to));

    let (digest, _console) = to.finish(LONG)?;
    servers_a.kill()?;
    let whole_before: Vec<u64> = before.into_iter().collect::<Result<_>>()?;
    for number in 0..2 {
        let size = std::fs::metadata(&right[number])?.len();
        let mut written = BTreeSet::new();
        writelog::blocks_written(&logs[1][number], size, &mut written)?;
        let written = u64::try_from(written.len())? * BLOCK_BYTES;
        let wire = after[number].number("wire_bytes")?;
        println!(
            "disk {number} of {size} bytes: {written} were written at B, {wire} crossed the link on \
             the way back, {} of them before the second attempt",
            whole_before[number]
        );
        ensure!(written > 0 && written < size / 2, "nothing to be shown");
        ensure!(
            wire <= written + written * HEADERS / 100 + SLACK_BYTES,
            "more crossed the link than was written at B"
        );
        for log in &logs {
            writelog::apply(&log[number], &right[number])?;
        }
        offline::images_are_equal(&right[number], &at_a[number])?;
    }
    offline::file_system_is_clean(&at_a[0])?;
    let verified = offline::content_is_right(&at_a[0], &guest.tree, &digest)?;
    println!("verified: every byte of both disks; {verified:?}");
    Ok(())
}
