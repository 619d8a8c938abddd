//! `hikkoshi migrate`: one command moves a running virtual machine with two disks as a group.
//!
//! The guest boots at site A and works on both disks all the time. Three moves are tried: in one
//! the QEMU at the new site is killed, one is interrupted, and each time the VM runs on at A as if
//! nothing had been. The third goes through. At the end both disks are compared with what QEMU saw
//! the guest write, byte for byte, and the first with what the guest believes to have written.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, bail, ensure};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::process::Process;
use hikkoshi_testkit::qemu::{Disk, Machine, Start};
use hikkoshi_testkit::server::Hikkoshi;
use hikkoshi_testkit::{cache, offline, writelog};
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);
const PORTS: [u16; 2] = [10809, 10810];
/// Each attempt has its own: the end of one need not be waited for.
const MIGRATION_PORTS: [u16; 3] = [4444, 4445, 4446];
const SECOND_DISK_BYTES: u64 = 48 << 20;
/// As little of the VM's memory in a second that an attempt does not come to its end.
const SLOWLY: &str = "2MB/s";

/// The servers of both disks at a site.
struct Servers([Hikkoshi; 2]);

impl Servers {
    fn start(site: &Namespace, images: &[PathBuf; 2], from: Option<Ipv4Addr>) -> Result<Self> {
        let serve = |disk: usize| {
            let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORTS[disk]);
            let from = from.map(|host| format!("nbd://{host}:{}", PORTS[disk]));
            Hikkoshi::serve(site, &images[disk], address, from.as_deref(), &[])
        };
        let servers = Self([serve(0)?, serve(1)?]);
        if from.is_some() {
            for server in &servers.0 {
                server.wait_state("standby", LONG)?;
            }
        }
        Ok(servers)
    }

    fn states(&self) -> Result<[String; 2]> {
        let state =
            |disk: usize| -> Result<String> { Ok(self.0[disk].status()?.state()?.to_owned()) };
        Ok([state(0)?, state(1)?])
    }

    fn kill(self) -> Result<()> {
        self.0.into_iter().try_for_each(Hikkoshi::kill)
    }
}

fn disk(number: usize) -> Disk {
    Disk::Tcp(SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORTS[number]))
}

/// A machine at `site` with both disks.
fn machine(site: &Namespace, guest: &Guest, dir: &Path, name: &str, wait: bool) -> Result<Machine> {
    let start = match wait {
        true => Start::Incoming(disk(0)),
        false => Start::Boot(disk(0)),
    };
    Machine::start_with_second_disk(site, guest, dir, name, &start, Some(&disk(1)))
}

/// `hikkoshi migrate`, running.
struct Command {
    process: Process,
    output: PathBuf,
}

impl Command {
    fn start(arguments: &[String], output: PathBuf) -> Result<Self> {
        let process = Process::start(None, cache::hikkoshi()?, arguments, &output)?;
        Ok(Self { process, output })
    }

    /// What it has said in JSON up to now.
    fn said(&self) -> Result<Vec<Value>> {
        let text = std::fs::read_to_string(&self.output)?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Ok(whole
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect())
    }

    /// Waits until some of the VM's memory has been sent.
    fn wait_until_under_way(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let under_way = |news: &Value| {
                news["event"] == "progress"
                    && news["step"] == "migrate"
                    && news["done_bytes"].as_u64() > Some(0)
            };
            if self.said()?.iter().any(under_way) {
                return Ok(());
            }
            self.process.check_alive()?;
            if start.elapsed() > LONG {
                bail!("it never began: {}", self.process.tail());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Waits for its end; returns its exit status and the last thing it said.
    fn end(mut self) -> Result<(Option<i32>, Value)> {
        let status = self.process.wait(LONG)?;
        let said = self.said()?;
        let last = said.last().with_context(|| self.process.tail())?.clone();
        ensure!(
            last["event"] == "end",
            "no outcome: {}",
            self.process.tail()
        );
        Ok((status.code(), last))
    }
}

#[test]
fn vm_and_its_disks_move_by_one_command() -> Result<()> {
    let guest = Guest::build()?;
    let dir = cache::scratch()?;
    let dir = dir.path();
    let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
    let link = Link::new(&a, &b, LinkSpec::wan(20, 800))?;
    let image = |name: &str| dir.join(format!("{name}.img"));
    let (right, old) = (["right1", "right2"].map(image), ["a1", "a2"].map(image));
    for path in [&right, &old] {
        cache::copy_image(&guest.disk, &path[0])?;
        std::fs::File::create(&path[1])?.set_len(SECOND_DISK_BYTES)?;
    }
    let old_servers = Servers::start(&a, &old, None)?;
    let vm = machine(&a, &guest, dir, "vm-a", false)?;
    vm.console.wait_for("WL start", LONG)?;
    vm.console.wait_for_rounds(3, LONG)?;

    let given_up = ["b1", "b2"].map(image);
    let servers = Servers::start(&b, &given_up, Some(link.address_a))?;
    let command = |attempt: usize, to: (&Servers, &Machine), more: &[&str]| -> Result<Command> {
        let (new_servers, to) = to;
        let qmp = |machine: &Machine| format!("unix:{}", machine.second_qmp().display());
        let mut arguments: Vec<String> = ["migrate", "--json", "--qmp"].map(Into::into).into();
        arguments.extend([qmp(&vm), "--to-qmp".into(), qmp(to)]);
        let uri = format!("tcp:{}:{}", link.address_b, MIGRATION_PORTS[attempt]);
        arguments.extend(["--uri".into(), uri]);
        for number in 0..2 {
            let ends = [&old_servers, new_servers].map(|s| format!("{}#", s.0[number].control()));
            arguments.extend(["--disk".into(), ends.join("=")]);
        }
        // QEMU's logs of the writes are this test's own.
        for log in ["log-file", "log-file2"] {
            arguments.extend(["--leave-out".into(), log.into()]);
        }
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        Command::start(&arguments, dir.join(format!("migrate-{attempt}.log")))
    };

    // 0: everything is checked, and nothing is changed.
    let to = machine(&b, &guest, dir, "vm-b0", true)?;
    let mut check = command(0, (&servers, &to), &["--dry-run"])?;
    ensure!(
        check.process.wait(LONG)?.success(),
        "{}",
        check.process.tail()
    );
    let said = check.process.tail();
    ensure!(
        said.contains("Nothing was changed") && said.contains("640.0 MiB"),
        "{said}"
    );

    // 1: the QEMU at the new site is killed on the way.
    let more = ["--bandwidth", SLOWLY, "--keep-standby", "--no-prepare"];
    let mut moving = command(0, (&servers, &to), &more)?;
    moving.wait_until_under_way()?;
    drop(to);
    let (status, end) = moving.end()?;
    ensure!(status == Some(1) && end["vm"] == "old", "{status:?} {end}");
    ensure!(end["disks"] == "old-standby", "{end}");
    ensure!(servers.states()? == ["standby"; 2]);
    vm.console.wait_for_rounds(2, LONG)?;

    // 2: somebody presses Ctrl-C.
    let to = machine(&b, &guest, dir, "vm-b1", true)?;
    let mut moving = command(1, (&servers, &to), &["--bandwidth", SLOWLY, "--no-prepare"])?;
    moving.wait_until_under_way()?;
    let pid = rustix::process::Pid::from_raw(i32::try_from(moving.process.pid())?).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
    let (status, end) = moving.end()?;
    ensure!(status == Some(1) && end["vm"] == "old", "{status:?} {end}");
    let reason = end["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("interrupted"), "{end}");
    ensure!(end["disks"] == "old-given-up", "{end}");
    ensure!(servers.states()? == ["given-up"; 2]);
    vm.console.wait_for_rounds(2, LONG)?;
    drop(to);
    servers.kill()?;

    // 3: it goes through.
    let new = ["c1", "c2"].map(image);
    let new_servers = Servers::start(&b, &new, Some(link.address_a))?;
    let to = machine(&b, &guest, dir, "vm-b2", true)?;
    let moving = command(
        2,
        (&new_servers, &to),
        &["--bandwidth", "1GB/s", "--downtime", "1s", "--quit-old"],
    )?;
    let (status, end) = moving.end()?;
    ensure!(
        status == Some(0) && end["vm"] == "new" && end["disks"] == "new",
        "{status:?} {end}"
    );
    ensure!(new_servers.states()? == ["local"; 2]);
    let old_logs = [vm.write_log().to_path_buf(), vm.second_write_log()];
    let before = vm.console.longest_silence().context("no tick at A")?;
    vm.wait_end()?;
    old_servers.kill()?;
    to.console.wait_for_rounds(3, LONG)?;
    let after = to.console.longest_silence().context("no tick at B")?;
    println!(
        "longest time between two reports of the guest (it makes four a second): {:.0?} before, \
         {:.0?} at the move, {:.0?} after",
        before.2,
        after.0 - before.1,
        after.2
    );

    let new_logs = [to.write_log().to_path_buf(), to.second_write_log()];
    let (digest, _console) = to.finish(LONG)?;
    new_servers.kill()?;
    for number in 0..2 {
        let there = writelog::apply(&old_logs[number], &right[number])?;
        offline::images_are_equal(&right[number], &old[number]).context("at the old site")?;
        let here = writelog::apply(&new_logs[number], &right[number])?;
        offline::images_are_equal(&right[number], &new[number]).context("at the new site")?;
        ensure!(
            there.bytes > 0 && here.bytes > 0,
            "disk {number}: {there:?} {here:?}"
        );
    }
    offline::file_system_is_clean(&new[0])?;
    let verified = offline::content_is_right(&new[0], &guest.tree, &digest)?;
    println!("verified: every byte of both disks; {verified:?}");
    Ok(())
}
