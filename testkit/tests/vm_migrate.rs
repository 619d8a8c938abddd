//! `hikkoshi migrate`: one command moves a running virtual machine with two disks as a group.
//!
//! The guest boots at site A and works on both disks all the time. Three moves are tried: in one
//! the QEMU at the new site is killed, one is interrupted, and each time the VM runs on at A as if
//! nothing had been. The third goes through. It goes back from disks that qemu-nbd serves, by a
//! command that is killed while the VM is on its way, and that another one takes up; and once more to
//! B, by one that is killed when the disks have moved and the VM does not run yet, and with the QEMU
//! at A killed in the same instant. Whatever fails, the last thing said must tell where the VM is.
//! At the end both disks are compared with what QEMU saw the guest write at all places, byte for
//! byte, and the first with what the guest believes to have written.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, bail, ensure};
use hikkoshi_testkit::deaf::Deaf;
use hikkoshi_testkit::group::{PORTS, SECOND_DISK_BYTES, Servers, machine};
use hikkoshi_testkit::guest::Guest;
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::process::Process;
use hikkoshi_testkit::qemu::Machine;
use hikkoshi_testkit::server::Server;
use hikkoshi_testkit::{cache, offline, writelog};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);
/// Each attempt has its own: the end of one need not be waited for.
const MIGRATION_PORTS: [u16; 5] = [4444, 4445, 4446, 4447, 4448];
/// As little of the VM's memory in a second that an attempt does not come to its end.
const SLOWLY: &str = "2MB/s";

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

    /// Waits for its end, which must be a failure before anything was done; returns what it said.
    fn refusal(mut self) -> Result<String> {
        let status = self.process.wait(LONG)?;
        let said = self.process.tail();
        ensure!(status.code() == Some(1), "{status}: {said}");
        ensure!(said.contains("nothing was changed"), "{said}");
        Ok(said)
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

/// `hikkoshi migrate` between two machines, by their QMP sockets, of which the second waits at
/// `address`, and the control
/// sockets of the disks at both sites. Those at the old one are empty where it has none.
fn command(
    dir: &Path,
    attempt: usize,
    address: Ipv4Addr,
    [from, to]: [&Path; 2],
    disks: &[[String; 2]; 2],
    more: &[&str],
) -> Result<Command> {
    static COMMANDS: AtomicU32 = AtomicU32::new(0);
    let qmp = |socket: &Path| format!("unix:{}", socket.display());
    let mut arguments: Vec<String> = ["migrate", "--json", "--qmp"].map(Into::into).into();
    arguments.extend([qmp(from), "--to-qmp".into(), qmp(to)]);
    let uri = format!("tcp:{address}:{}", MIGRATION_PORTS[attempt]);
    arguments.extend(["--uri".into(), uri]);
    for (old, new) in disks[0].iter().zip(&disks[1]) {
        let ends = [old, new].map(|control| match control.as_str() {
            "" => String::new(),
            control => format!("{control}#"),
        });
        arguments.extend(["--disk".into(), ends.join("=")]);
    }
    // QEMU's logs of the writes are this test's own.
    for log in ["log-file", "log-file2"] {
        arguments.extend(["--leave-out".into(), log.into()]);
    }
    arguments.extend(more.iter().map(|word| (*word).to_owned()));
    let number = COMMANDS.fetch_add(1, Ordering::Relaxed);
    Command::start(&arguments, dir.join(format!("migrate-{number}.log")))
}

/// What `end` tells a person must contain all of these.
fn says(end: &Value, wanted: &[&str]) -> Result<()> {
    let said = format!("{} {} {}", end["reason"], end["text"], end["advice"]);
    for words in wanted {
        ensure!(said.contains(words), "no {words:?} in {said}");
    }
    Ok(())
}

/// The logs of what a machine's guest wrote to its two disks.
fn logs_of(machine: &Machine) -> [PathBuf; 2] {
    [
        machine.write_log().to_path_buf(),
        machine.second_write_log(),
    ]
}

/// The VM goes from B, where its disks are those `images`, to A, from disks that qemu-nbd serves; the
/// command is killed while the VM is on its way.
fn goes_back_from_a_plain_source(
    dir: &Path,
    (guest, sites, link): (&Guest, [&Namespace; 2], &Link),
    (mut vm, servers, images): (Machine, Servers, &[PathBuf; 2]),
    new: &[PathBuf; 2],
) -> Result<(Machine, Servers)> {
    let [a, b] = sites;
    // The disk of a volume that is whole is a plain image. The VM's client reconnects.
    servers.kill()?;
    let plain = [0, 1].map(|disk| {
        let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORTS[disk]);
        Server::qemu_nbd(b, &images[disk], address)
    });
    let [first, second] = plain;
    let plain = [first?, second?];
    vm.console.wait_for_rounds(2, LONG)?;

    let servers = Servers::start(a, new, Some(link.address_b), &[])?;
    let mut to = machine(a, guest, dir, "vm-a2", true)?;
    let disks = [<[String; 2]>::default(), servers.controls()];
    let start = |vm: &Machine, to: &Machine, more: &[&str]| {
        let more = [&["--plain-source"], more].concat();
        let machines = [vm.second_qmp(), to.second_qmp()];
        command(dir, 3, link.address_a, machines, &disks, &more)
    };
    let mut moving = start(&vm, &to, &["--bandwidth", SLOWLY])?;
    moving.wait_until_under_way()?;
    moving.process.kill()?;
    // While QEMU sends there is nothing to take up: said, and nothing done.
    let (status, end) = start(&vm, &to, &["--resume"])?.end()?;
    ensure!(status == Some(1) && end["vm"] == "old", "{status:?} {end}");
    says(
        &end,
        &["there is nothing to resume: the VM runs at the old site"],
    )?;
    ensure!(servers.states()? == ["standby"; 2]);

    let quickly = json!({"max-bandwidth": 1_000_000_000, "downtime-limit": 1000});
    vm.qmp().execute("migrate-set-parameters", quickly)?;
    let begun = Instant::now();
    for machine in [&mut vm, &mut to] {
        while machine.qmp().execute("query-migrate", json!({}))?["status"] != "completed" {
            ensure!(begun.elapsed() < LONG, "the VM does not arrive");
            std::thread::sleep(POLL);
        }
    }
    // It stands still at both sites now, and stays so.
    let said = start(&vm, &to, &[])?.refusal()?;
    ensure!(
        said.contains("it is postmigrate") && said.contains("arrived there already: --resume"),
        "{said}"
    );
    ensure!(servers.states()? == ["standby"; 2]);
    let (status, end) = start(&vm, &to, &["--resume", "--quit-old"])?.end()?;
    ensure!(
        status == Some(0) && end["disks"] == "new",
        "{status:?} {end}"
    );
    says(
        &end,
        &["The VM runs at the new site; its disks are there whole"],
    )?;
    ensure!(servers.states()? == ["local"; 2]);
    vm.wait_end()?;
    for server in plain {
        server.kill()?;
    }
    to.console.wait_for_rounds(2, LONG)?;
    Ok((to, servers))
}

/// The VM goes from A to B; when its disks have moved and it does not run yet, the command is killed,
/// and the QEMU at A.
fn goes_on_without_the_old_machine(
    dir: &Path,
    (guest, sites, link): (&Guest, [&Namespace; 2], &Link),
    (vm, old_servers): (Machine, Servers),
    new: &[PathBuf; 2],
) -> Result<(Machine, Servers)> {
    let servers = Servers::start(sites[1], new, Some(link.address_a), &[])?;
    let to = machine(sites[1], guest, dir, "vm-b3", true)?;
    let old_controls = old_servers.controls();
    let deaf = [0, 1]
        .map(|disk| Deaf::before(servers.0[disk].control(), &dir.join(format!("deaf{disk}"))));
    let [first, second] = deaf;
    let deaf = [first?, second?];
    let disks = [
        old_controls.clone(),
        [0, 1].map(|disk| deaf[disk].control()),
    ];
    let more = ["--bandwidth", "1GB/s", "--downtime", "1s", "--no-prepare"];
    let moving = command(
        dir,
        4,
        link.address_b,
        [vm.second_qmp(), to.second_qmp()],
        &disks,
        &more,
    )?;
    let begun = Instant::now();
    while servers.states()?.iter().any(|state| state == "standby") {
        ensure!(
            begun.elapsed() < LONG,
            "no handoff: {}",
            moving.process.tail()
        );
        std::thread::sleep(POLL);
    }
    moving.process.kill()?;
    ensure!(to.console.last_tick().is_none(), "it runs already");
    let old_qmp = vm.second_qmp().to_path_buf();
    drop(vm);
    drop(deaf);

    let disks = [old_controls, servers.controls()];
    let resume = |more: &[&str]| {
        let more = [&["--resume"], more].concat();
        command(
            dir,
            4,
            link.address_b,
            [&old_qmp, to.second_qmp()],
            &disks,
            &more,
        )
    };
    let (status, end) = resume(&[])?.end()?;
    ensure!(
        status == Some(1) && end["vm"]["unknown"].is_string(),
        "{status:?} {end}"
    );
    says(
        &end,
        &[
            "the QEMU at the old site does not answer",
            "It is not certain where the VM is (all of it is at the new site, stopped",
            "if you know it is, add --old-is-gone",
            "its disks are handed off to the new site",
        ],
    )?;
    ensure!(to.console.last_tick().is_none(), "it runs already");
    let (status, end) = resume(&["--old-is-gone"])?.end()?;
    ensure!(status == Some(0) && end["vm"] == "new", "{status:?} {end}");
    says(
        &end,
        &["The VM runs at the new site; its disks are there whole"],
    )?;
    ensure!(old_servers.states()? == ["departed"; 2]);
    old_servers.kill()?;
    to.console.wait_for_rounds(2, LONG)?;
    Ok((to, servers))
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
    let old_servers = Servers::start(&a, &old, None, &[])?;
    let vm = machine(&a, &guest, dir, "vm-a", false)?;
    vm.console.wait_for("WL start", LONG)?;
    vm.console.wait_for_rounds(3, LONG)?;

    let given_up = ["b1", "b2"].map(image);
    let servers = Servers::start(&b, &given_up, Some(link.address_a), &[])?;
    let command = |attempt: usize, to: (&Servers, &Machine), more: &[&str]| -> Result<Command> {
        let disks = [old_servers.controls(), to.0.controls()];
        let machines = [vm.second_qmp(), to.1.second_qmp()];
        command(dir, attempt, link.address_b, machines, &disks, more)
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
    says(
        &end,
        &[
            "The VM runs at the old site, as before; its disks are at the old site, and the new site stands by for them",
        ],
    )?;
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
    says(
        &end,
        &[
            "The VM runs at the old site, as before; its disks are at the old site, and the new site has given them up",
        ],
    )?;
    ensure!(servers.states()? == ["given-up"; 2]);
    vm.console.wait_for_rounds(2, LONG)?;
    drop(to);
    servers.kill()?;

    // 3: it goes through.
    let new = ["c1", "c2"].map(image);
    let new_servers = Servers::start(&b, &new, Some(link.address_a), &[])?;
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
    says(
        &end,
        &["The VM runs at the new site; its disks are there whole: they need the old site no more"],
    )?;
    ensure!(new_servers.states()? == ["local"; 2]);
    let mut logs = vec![logs_of(&vm)];
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

    logs.push(logs_of(&to));
    let (back, there) = (["d1", "d2"].map(image), ["e1", "e2"].map(image));
    let world = (&guest, [&a, &b], &link);
    let (vm, servers) = goes_back_from_a_plain_source(dir, world, (to, new_servers, &new), &back)?;
    logs.push(logs_of(&vm));
    let (vm, servers) = goes_on_without_the_old_machine(dir, world, (vm, servers), &there)?;
    logs.push(logs_of(&vm));

    let (digest, _console) = vm.finish(LONG)?;
    servers.kill()?;
    for number in 0..2 {
        for (stay, images) in [&old, &new, &back, &there].into_iter().enumerate() {
            let written = writelog::apply(&logs[stay][number], &right[number])?;
            offline::images_are_equal(&right[number], &images[number])
                .with_context(|| format!("disk {number} after stay {stay}"))?;
            ensure!(written.bytes > 0, "disk {number}, stay {stay}: {written:?}");
        }
    }
    offline::file_system_is_clean(&there[0])?;
    let verified = offline::content_is_right(&there[0], &guest.tree, &digest)?;
    println!("verified: every byte of both disks; {verified:?}");
    Ok(())
}
