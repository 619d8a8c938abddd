//! Virtual machines: one QEMU process each, without hardware acceleration.
//!
//! Owns the command line, the control connection and live migration. A machine's disk is an NBD
//! export; between the disk and the guest QEMU keeps a log of every write
//! ([`crate::writelog`]), which knows nothing of the server under test.

use crate::console::Console;
use crate::guest::Guest;
use crate::netns::Namespace;
use crate::process::Process;
use crate::qmp::Qmp;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// The guest's memory: 256 MiB, enough for the workload and little to migrate, and 8 KiB.
///
/// Those 8 KiB are what makes live migration under TCG work. When a RAM block is a multiple of
/// 256 KiB, QEMU (7.2 at least) collects its dirty pages on a short cut that forgets to reset the
/// emulated CPU's TLB. What the guest then writes to a page once sent is not seen as dirty, and
/// the guest crashes at the destination, whatever its disk is. An odd size takes the other way.
const MEMORY: &str = "262152k";
/// How long a state may take to come about that QEMU reaches at once on an idle machine.
const SOON: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
/// The same while the guest stands still: the precision of [`Machine::first_write`].
const QUICK_POLL: Duration = Duration::from_millis(1);
/// How long QEMU waits for its disk's server to come back, in seconds.
const RECONNECT_S: u32 = 60;
/// The pause that a live migration may make at its end.
const DOWNTIME_LIMIT_MS: u64 = 300;
/// How long a migration may try to keep to that, and the pause that it may make from then on: on
/// an overloaded machine the link's emulation may be too slow for the guest.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENT_DOWNTIME_LIMIT_MS: u64 = 3000;
/// More than any link has, so that the link is the limit, in bytes per second.
const MIGRATION_BANDWIDTH: u64 = 1_000_000_000;

/// Where an NBD export is, as seen from the machine's site.
#[derive(Clone, Debug)]
pub enum Disk {
    /// A server on TCP.
    Tcp(SocketAddrV4),
    /// A server on a Unix socket.
    Unix(PathBuf),
}

impl Disk {
    fn server(&self) -> Value {
        match self {
            Disk::Tcp(address) => json!({
                "type": "inet",
                "host": address.ip().to_string(),
                "port": address.port().to_string(),
            }),
            Disk::Unix(path) => json!({"type": "unix", "path": path}),
        }
    }
}

/// What a machine does when it starts.
#[derive(Clone, Debug)]
pub enum Start {
    /// Boots from this disk.
    Boot(Disk),
    /// Waits for a migration, with this disk.
    Incoming(Disk),
    /// Boots without a disk of its own, and has the kernel's NBD client connect to this port of
    /// its site's loopback address.
    KernelClient(u16),
}

/// How a live migration went, by QEMU's account.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// From the command to the end.
    pub total: Duration,
    /// How long the guest stood still.
    pub downtime: Duration,
    /// Bytes of memory and device state sent.
    pub ram_bytes: u64,
    /// When the old QEMU stopped it.
    pub stopped_at: SystemTime,
}

/// A virtual machine. Its process is killed when dropped.
pub struct Machine {
    process: Process,
    qmp: Qmp,
    orders: UnixStream,
    write_log: PathBuf,
    second_qmp: PathBuf,
    /// What it says.
    pub console: Console,
}

impl Machine {
    /// Starts a machine at `site`; its sockets and logs are in `dir`, their names start with
    /// `name`.
    ///
    /// # Errors
    /// QEMU does not start, or has ended; the message has what it said.
    pub fn start(
        site: &Namespace,
        guest: &Guest,
        dir: &Path,
        name: &str,
        start: &Start,
    ) -> Result<Self> {
        Self::start_with_second_disk(site, guest, dir, name, start, None)
    }

    /// The same with a second disk, whose writes are logged in [`Machine::second_write_log`]. The
    /// guest writes to it in place.
    ///
    /// # Errors
    /// As [`Machine::start`].
    pub fn start_with_second_disk(
        site: &Namespace,
        guest: &Guest,
        dir: &Path,
        name: &str,
        start: &Start,
        second: Option<&Disk>,
    ) -> Result<Self> {
        let file = |suffix: &str| dir.join(format!("{name}.{suffix}"));
        let console = Console::follow(&file("console"))?;
        let (qmp, orders, write_log) = (file("qmp"), file("orders"), file("writes"));
        let second_qmp = file("qmp2");
        let mut arguments = base_arguments(guest, start);
        arguments.extend([
            "-chardev".into(),
            format!(
                "file,id=console,append=on,path={}",
                file("console").display()
            ),
            "-chardev".into(),
            format!(
                "socket,id=orders,server=on,wait=off,path={}",
                orders.display()
            ),
            "-qmp".into(),
            format!("unix:{},server=on,wait=off", qmp.display()),
            "-qmp".into(),
            format!("unix:{},server=on,wait=off", second_qmp.display()),
        ]);
        match start {
            Start::Boot(disk) => arguments.extend(disk_arguments(disk, "", &write_log)?),
            Start::Incoming(disk) => {
                arguments.extend(disk_arguments(disk, "", &write_log)?);
                arguments.extend(["-incoming".into(), "defer".into()]);
            }
            Start::KernelClient(_) => {
                arguments.extend(
                    [
                        "-netdev",
                        "user,id=net",
                        "-device",
                        "virtio-net-pci,netdev=net,romfile=",
                    ]
                    .map(Into::into),
                );
            }
        }
        if let Some(disk) = second {
            arguments.extend(disk_arguments(disk, "2", &second_log(&write_log))?);
        }
        let mut process = Process::start(
            Some(site),
            "qemu-system-x86_64",
            &arguments,
            &file("qemu.log"),
        )?;
        let orders = knock(&mut process, &orders)?;
        let qmp = Qmp::start(knock(&mut process, &qmp)?).with_context(|| process.tail())?;
        Ok(Self {
            process,
            qmp,
            orders,
            write_log,
            second_qmp,
            console,
        })
    }

    /// Where QEMU logs the guest's writes.
    pub fn write_log(&self) -> &Path {
        &self.write_log
    }

    /// Where QEMU logs what the guest writes to its second disk.
    pub fn second_write_log(&self) -> PathBuf {
        second_log(&self.write_log)
    }

    /// A QMP socket for others: QEMU serves one client on each.
    pub fn second_qmp(&self) -> &Path {
        &self.second_qmp
    }

    /// Waits until QEMU has ended by itself.
    ///
    /// # Errors
    /// It does not, or with another status than 0.
    pub fn wait_end(mut self) -> Result<()> {
        let status = self.process.wait(SOON)?;
        ensure!(
            status.success(),
            "QEMU ended with {status}:\n{}",
            self.process.tail()
        );
        Ok(())
    }

    /// Gives the workload an order.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn order(&mut self, order: &str) -> Result<()> {
        writeln!(self.orders, "{order}").context("give the guest an order")
    }

    /// Fails if QEMU has ended or the guest has raised an alarm.
    ///
    /// # Errors
    /// As said.
    pub fn check(&mut self) -> Result<()> {
        self.console.check()?;
        self.process.check_alive()
    }

    /// The control connection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Moves the running guest to `to`, which must have been started [`Start::Incoming`]; it
    /// listens at `address`, an address of its own site.
    ///
    /// # Errors
    /// The migration fails, or is not done within `timeout`.
    pub fn migrate(
        &mut self,
        to: &mut Machine,
        address: Ipv4Addr,
        port: u16,
        timeout: Duration,
    ) -> Result<Migration> {
        let done = self.send(to, address, port, timeout)?;
        to.wait_until_running()?;
        Ok(done)
    }

    /// The same, and the guest stands still at `to` until [`Machine::go_on`].
    ///
    /// # Errors
    /// As [`Machine::migrate`].
    pub fn migrate_and_hold(
        &mut self,
        to: &mut Machine,
        address: Ipv4Addr,
        port: u16,
        timeout: Duration,
    ) -> Result<Migration> {
        to.qmp.execute("stop", json!({}))?;
        let done = self.send(to, address, port, timeout)?;
        let start = Instant::now();
        while to.qmp.execute("query-migrate", json!({}))?["status"] != "completed" {
            to.check()?;
            ensure!(start.elapsed() < SOON, "it does not arrive");
            std::thread::sleep(QUICK_POLL);
        }
        Ok(done)
    }

    /// Lets a guest that stands still go on.
    ///
    /// # Errors
    /// It does not.
    pub fn go_on(&mut self) -> Result<()> {
        self.qmp.execute("cont", json!({}))?;
        self.wait_until_running()
    }

    /// Waits until a write of the guest was answered here, and tells when it was and when the guest
    /// had begun to run here.
    ///
    /// # Errors
    /// It does not come.
    pub fn first_write(&mut self) -> Result<(SystemTime, SystemTime)> {
        let start = Instant::now();
        loop {
            let answer = self.qmp.execute("query-blockstats", json!({}))?;
            let disks = answer.as_array().context("no list of disks")?;
            let writes = disks.iter().map(|d| d["stats"]["wr_operations"].as_u64());
            if writes.flatten().sum::<u64>() > 0 {
                let began = self.qmp.resumed_at().context("it never began to run")?;
                return Ok((SystemTime::now(), began));
            }
            self.check()?;
            ensure!(start.elapsed() < SOON, "no write is answered: {answer}");
            std::thread::sleep(QUICK_POLL);
        }
    }

    /// Waits until all of the guest was sent.
    fn send(
        &mut self,
        to: &mut Machine,
        address: Ipv4Addr,
        port: u16,
        timeout: Duration,
    ) -> Result<Migration> {
        let uri = format!("tcp:{}", SocketAddr::from((address, port)));
        to.qmp.execute("migrate-incoming", json!({"uri": uri}))?;
        self.qmp.execute(
            "migrate-set-parameters",
            json!({"downtime-limit": DOWNTIME_LIMIT_MS, "max-bandwidth": MIGRATION_BANDWIDTH}),
        )?;
        self.qmp.execute("migrate", json!({"uri": uri}))?;
        let start = Instant::now();
        let mut patient = false;
        loop {
            if start.elapsed() > PATIENCE && !patient {
                patient = true;
                let limit = json!({"downtime-limit": PATIENT_DOWNTIME_LIMIT_MS});
                self.qmp.execute("migrate-set-parameters", limit)?;
            }
            let state = self.qmp.execute("query-migrate", json!({}))?;
            let mut pause = QUICK_POLL;
            match state["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => {
                    bail!(
                        "migration failed: {state}\n{}\n{}",
                        self.process.tail(),
                        to.process.tail()
                    )
                }
                Some("setup" | "active") => pause = POLL,
                _ => {}
            }
            self.check()?;
            to.check()?;
            ensure!(
                start.elapsed() < timeout,
                "migration not done in {timeout:?}: {state}"
            );
            std::thread::sleep(pause);
        }
        // Asked again: the times are filled in a moment after the state.
        let done = self.qmp.execute("query-migrate", json!({}))?;
        let millis = |name: &str| Duration::from_millis(done[name].as_u64().unwrap_or_default());
        Ok(Migration {
            total: millis("total-time"),
            downtime: millis("downtime"),
            ram_bytes: done["ram"]["transferred"].as_u64().unwrap_or_default(),
            stopped_at: self.qmp.stopped_at().context("it never stood still")?,
        })
    }

    fn wait_until_running(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let state = self.qmp.execute("query-status", json!({}))?;
            if state["status"] == "running" {
                return Ok(());
            }
            self.check()?;
            ensure!(
                start.elapsed() < SOON,
                "the guest does not run: {state}\n{}",
                self.process.tail()
            );
            std::thread::sleep(QUICK_POLL);
        }
    }

    /// Has QEMU end by itself, as after a migration, its disk closed.
    ///
    /// # Errors
    /// It does not, or with another status than 0.
    pub fn quit(mut self) -> Result<()> {
        self.console.check()?;
        self.qmp.execute("quit", json!({}))?;
        self.wait_end()
    }

    /// Orders the workload to finish, waits until the guest has unmounted its disk and switched
    /// itself off, and returns the digest of what the workload says it has written.
    ///
    /// # Errors
    /// An alarm, or it is not done within `timeout`.
    pub fn finish(mut self, timeout: Duration) -> Result<(String, Console)> {
        self.order("finish")?;
        let line = self.console.wait_for("WL digest ", timeout)?;
        self.console.wait_for("WL unmounted", timeout)?;
        self.console.wait_for("WL end", timeout)?;
        let status = self.process.wait(SOON)?;
        ensure!(
            status.success(),
            "QEMU ended with {status}:\n{}",
            self.process.tail()
        );
        self.console.check()?;
        let digest = line
            .split("WL digest ")
            .nth(1)
            .context("no digest")?
            .trim()
            .to_owned();
        Ok((digest, self.console))
    }
}

/// Connects to a socket of a process that is just starting.
fn knock(process: &mut Process, path: &Path) -> Result<UnixStream> {
    let mut open = None;
    process.wait_until("control socket", SOON, |_| {
        open = UnixStream::connect(path).ok();
        open.is_some()
    })?;
    open.context("the socket was open")
}

fn base_arguments(guest: &Guest, start: &Start) -> Vec<String> {
    let mode = match start {
        Start::Boot(_) | Start::Incoming(_) => "hikkoshi.mode=disk".to_owned(),
        // 10.0.2.2 is the site's loopback address, seen through QEMU's own network.
        Start::KernelClient(port) => {
            format!("hikkoshi.mode=nbd hikkoshi.host=10.0.2.2 hikkoshi.port={port}")
        }
    };
    let append = format!("console=ttyS0 quiet loglevel=5 panic=-1 net.ifnames=0 {mode}");
    let mut arguments: Vec<String> = [
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        "pc,accel=tcg",
        "-cpu",
        "max",
        "-smp",
        "1",
        "-m",
        MEMORY,
        "-serial",
        "chardev:console",
        "-serial",
        "chardev:orders",
    ]
    .map(Into::into)
    .into();
    arguments.extend(["-kernel".into(), guest.kernel.display().to_string()]);
    arguments.extend(["-initrd".into(), guest.initramfs.display().to_string()]);
    arguments.extend(["-append".into(), append]);
    arguments
}

fn second_log(write_log: &Path) -> PathBuf {
    write_log.with_extension("writes2")
}

/// A disk: NBD without QEMU's cache, below a log of the writes. `suffix` tells its nodes from those
/// of other disks.
fn disk_arguments(disk: &Disk, suffix: &str, write_log: &Path) -> Result<Vec<String>> {
    std::fs::File::create(write_log)?;
    let network = json!({
        "driver": "nbd",
        "node-name": format!("network{suffix}"),
        "server": disk.server(),
        // A server that is killed and started again is no error to the guest.
        "reconnect-delay": RECONNECT_S,
        "cache": {"direct": true, "no-flush": false},
    });
    let log = json!({
        "driver": "file",
        "node-name": format!("log-file{suffix}"),
        "filename": write_log,
        // The log has to survive QEMU, not the machine.
        "cache": {"direct": false, "no-flush": true},
    });
    let logged = json!({
        "driver": "blklogwrites",
        "node-name": format!("disk{suffix}"),
        "file": format!("network{suffix}"),
        "log": format!("log-file{suffix}"),
        "log-sector-size": 512,
        "log-super-update-interval": 1,
    });
    let nodes = [network, log, logged].into_iter();
    let mut arguments: Vec<String> = nodes
        .flat_map(|node| ["-blockdev".into(), node.to_string()])
        .collect();
    arguments.extend([
        "-device".into(),
        format!("virtio-blk-pci,drive=disk{suffix},write-cache=on"),
    ]);
    Ok(arguments)
}
