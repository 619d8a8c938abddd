//! A virtual machine with two disks, and the daemons that serve both of them at a site.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::guest::Guest;
use crate::netns::Namespace;
use crate::qemu::{Disk, Machine, Start};
use crate::server::{Hikkoshi, Status};

/// Where the disks are served, at each site.
pub const PORTS: [u16; 2] = [10809, 10810];
/// Size of the second disk; the first is the guest's own.
pub const SECOND_DISK_BYTES: u64 = 48 << 20;

/// Longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);

/// The servers of both disks at a site.
pub struct Servers(pub [Hikkoshi; 2]);

impl Servers {
    /// Serves both images, with `more` options; those that come `from` another site stand by then.
    ///
    /// # Errors
    /// One does not start, or does not stand by in time.
    pub fn start(
        site: &Namespace,
        images: &[PathBuf; 2],
        from: Option<Ipv4Addr>,
        more: &[&str],
    ) -> Result<Self> {
        let serve = |disk: usize| {
            let address = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORTS[disk]);
            let from = from.map(|host| format!("nbd://{host}:{}", PORTS[disk]));
            Hikkoshi::serve(site, &images[disk], address, from.as_deref(), more)
        };
        let servers = Self([serve(0)?, serve(1)?]);
        if from.is_some() {
            servers.wait("standby")?;
        }
        Ok(servers)
    }

    /// Waits until both are in `state`.
    ///
    /// # Errors
    /// One is not in time.
    pub fn wait(&self, state: &str) -> Result<()> {
        for server in &self.0 {
            server.wait_state(state, LONG)?;
        }
        Ok(())
    }

    /// How both stand.
    ///
    /// # Errors
    /// One does not answer.
    pub fn status(&self) -> Result<[Status; 2]> {
        Ok([self.0[0].status()?, self.0[1].status()?])
    }

    /// The state of both, in a word each.
    ///
    /// # Errors
    /// One does not answer.
    pub fn states(&self) -> Result<[String; 2]> {
        let state =
            |disk: usize| -> Result<String> { Ok(self.0[disk].status()?.state()?.to_owned()) };
        Ok([state(0)?, state(1)?])
    }

    /// The control sockets of both, as a command takes them.
    pub fn controls(&self) -> [String; 2] {
        [0, 1].map(|disk| self.0[disk].control().to_owned())
    }

    /// Waits until the source of both is there.
    ///
    /// # Errors
    /// One is not in time.
    pub fn wait_for_the_source(&self) -> Result<()> {
        let begun = Instant::now();
        while self
            .status()?
            .iter()
            .any(|s| s.0["source_connected"] != true)
        {
            ensure!(begun.elapsed() < LONG, "no source: {:?}", self.status()?);
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Kills both.
    ///
    /// # Errors
    /// One cannot be killed.
    pub fn kill(self) -> Result<()> {
        self.0.into_iter().try_for_each(Hikkoshi::kill)
    }
}

/// How a machine finds a disk at its own site.
pub fn disk(number: usize) -> Disk {
    Disk::Tcp(SocketAddrV4::new(Ipv4Addr::LOCALHOST, PORTS[number]))
}

/// A machine at `site` with both disks; `wait`: for one that comes from elsewhere.
///
/// # Errors
/// It does not start.
pub fn machine(
    site: &Namespace,
    guest: &Guest,
    dir: &Path,
    name: &str,
    wait: bool,
) -> Result<Machine> {
    let start = match wait {
        true => Start::Incoming(disk(0)),
        false => Start::Boot(disk(0)),
    };
    Machine::start_with_second_disk(site, guest, dir, name, &start, Some(&disk(1)))
}
