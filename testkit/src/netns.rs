//! Network namespaces: each is a site of its own.
//!
//! Owns their creation and removal. A site starts with nothing but a loopback device; what
//! connects it to others is a [`crate::link::Link`], or [`join`] for a plain local network.

use crate::process;
use anyhow::{Context, Result};
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// How the names of all namespaces made here start.
const PREFIX: &str = "hikkoshi";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A number that is unique in this process, for names.
pub(crate) fn unique() -> u32 {
    COUNTER.fetch_add(1, Ordering::Relaxed)
}

/// A network namespace. Removed when dropped.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one whose name contains `label`, with its loopback device up.
    ///
    /// # Errors
    /// `ip` is missing or refuses, which it does to anyone but root.
    pub fn new(label: &str) -> Result<Self> {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let name = format!("{PREFIX}-{label}-{}-{}", std::process::id(), unique());
        process::run("ip", ["netns", "add", &name]).context("make a network namespace")?;
        let namespace = Self { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` with `arguments` inside.
    ///
    /// # Errors
    /// It failed; the message has what it said.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        let inside = ["-netns", &self.name];
        process::run("ip", inside.iter().chain(arguments))
    }

    /// Runs `work` on a thread of its own inside the namespace: sockets that it makes belong
    /// there, and stay there when they are returned.
    ///
    /// # Errors
    /// The namespace cannot be entered, or `work` fails.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(format!("/run/netns/{}", self.name))?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                rustix::thread::move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&file),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )
                .context("enter the network namespace")?;
                work()
            });
            match inside.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = process::run("ip", ["netns", "del", &self.name]) {
            eprintln!("network namespace {} stays: {error:#}", self.name);
        }
    }
}

/// Removes what a test left behind that was killed: namespaces whose name has the number of a
/// process that no longer lives.
fn sweep() {
    for entry in std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let parts: Vec<&str> = name.split('-').collect();
        let [PREFIX, .., pid, _] = parts[..] else {
            continue;
        };
        let dead = pid
            .parse::<u32>()
            .is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if dead {
            // Another test may be sweeping too, and be first.
            let _ = process::run("ip", ["netns", "del", &name]);
        }
    }
}

/// Two addresses for a new connection between two sites. Namespaces share no routes, so they only
/// have to differ within one test.
pub(crate) fn address_pair() -> (Ipv4Addr, Ipv4Addr) {
    let [_, _, third, fourth] = unique().to_be_bytes();
    (
        Ipv4Addr::new(10, third, fourth, 1),
        Ipv4Addr::new(10, third, fourth, 2),
    )
}

/// Joins two sites by an ordinary local network, without delay or limit, and returns their
/// addresses on it.
///
/// # Errors
/// `ip` failed.
pub fn join(a: &Namespace, b: &Namespace) -> Result<(Ipv4Addr, Ipv4Addr)> {
    let (address_a, address_b) = address_pair();
    let number = unique();
    let (end_a, end_b) = (format!("lan{number}a"), format!("lan{number}b"));
    a.ip(&[
        "link",
        "add",
        &end_a,
        "type",
        "veth",
        "peer",
        "name",
        &end_b,
        "netns",
        b.name(),
    ])?;
    for (site, end, address) in [(a, &end_a, address_a), (b, &end_b, address_b)] {
        site.ip(&["address", "add", &format!("{address}/24"), "dev", end])?;
        site.ip(&["link", "set", end, "up"])?;
    }
    Ok((address_a, address_b))
}
