//! Who used how much CPU, and on which core it may run.
//!
//! Owns the clocks of other processes, core affinity and the machine's total. Called around every
//! measurement; must stay cheap (a few microseconds) because it runs while the load does.

use std::collections::BTreeMap;
use std::fs;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::setpriority_process;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// How the kernel shares cores out to the session of this process.
const AUTOGROUP: &str = "/proc/self/autogroup";

/// CPU time of the calling thread.
pub fn this_thread() -> Duration {
    duration(clock_gettime(ClockId::ThreadCPUTime))
}

/// CPU time, user and kernel, that process `pid` has used in all its threads, ended ones
/// included. Nanosecond resolution, where `/proc/PID/stat` counts in ticks of 10 ms.
pub fn of_process(pid: u32) -> Result<Duration> {
    let pid = libc::pid_t::try_from(pid).context("process id out of range")?;
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is a valid place for one clock id; no other memory is touched.
    let status = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if status != 0 {
        bail!(
            "no CPU clock for process {pid}: {}",
            std::io::Error::from_raw_os_error(status)
        );
    }
    let mut now = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: `now` is a valid place for one timespec, which the call fills in when it returns 0.
    let status = unsafe { libc::clock_gettime(clock, now.as_mut_ptr()) };
    if status != 0 {
        return Err(std::io::Error::last_os_error()).context("read the CPU clock of a process");
    }
    // SAFETY: the call above returned 0 and so has written the whole value.
    let now = unsafe { now.assume_init() };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Ok(
        Duration::from_secs(seconds)
            + Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or(0)),
    )
}

/// `pid` and all processes descended from it.
pub fn process_tree(pid: u32) -> Vec<u32> {
    let mut parents: BTreeMap<u32, u32> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(child) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The command is in brackets and may hold anything; the parent is second after it.
        let parent = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
        if let Some(parent) = parent {
            parents.insert(child, parent);
        }
    }
    let mut tree = vec![pid];
    let mut next = 0;
    while let Some(&parent) = tree.get(next) {
        tree.extend(
            parents
                .iter()
                .filter(|(_, p)| **p == parent)
                .map(|(c, _)| *c),
        );
        next += 1;
    }
    tree
}

/// Time all cores of the machine together have been busy since boot, in ticks, and ticks in all.
pub fn machine() -> Result<(u64, u64)> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|t| t.parse().ok())
        .collect();
    let all: u64 = ticks.iter().take(8).sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    Ok((all - idle, all))
}

/// The cores this process may use, cut in two: the first part for servers, the second for the
/// client. With one core alone both parts are that core.
#[derive(Clone, Debug)]
pub struct Cores {
    /// Where servers run.
    pub servers: Vec<usize>,
    /// Where the client runs.
    pub client: Vec<usize>,
    /// All of them.
    pub all: Vec<usize>,
}

impl Cores {
    /// Cuts the cores the process has at its start: the last one is the client's.
    pub fn split() -> Result<Self> {
        let set = sched_getaffinity(None).context("read the core affinity")?;
        let all: Vec<usize> = (0..CpuSet::MAX_CPU)
            .filter(|&core| set.is_set(core))
            .collect();
        let last = *all.last().context("no core to run on")?;
        let others: Vec<usize> = all.iter().copied().filter(|&core| core != last).collect();
        let servers = if others.is_empty() {
            all.clone()
        } else {
            others
        };
        Ok(Self {
            servers,
            client: vec![last],
            all,
        })
    }

    /// Cuts them into two halves, for two sites.
    pub fn halves(&self) -> (&[usize], &[usize]) {
        match self.all.len() {
            1 => (&self.all, &self.all),
            len => self.all.split_at(len / 2),
        }
    }

    /// No pinning: everybody anywhere.
    pub fn shared() -> Result<Self> {
        Ok(Self::shared_by(&Self::split()?))
    }

    /// The same cores, not cut.
    pub fn shared_by(cut: &Self) -> Self {
        let all = cut.all.clone();
        Self {
            servers: all.clone(),
            client: all.clone(),
            all,
        }
    }
}

/// Nice values of this process, and of the servers it starts, until dropped.
pub struct Preference {
    group: Option<String>,
}

impl Preference {
    /// Sets them. Where the kernel shares cores out by session first (autogroup), a nice value
    /// counts within the session only, so the session gets the same one.
    pub fn set(nice: i32) -> Result<Self> {
        let mut group = None;
        if nice != 0 {
            setpriority_process(None, nice).context("set the nice value")?;
            // "/autogroup-12 nice 0"; the file does not exist where there are no such groups.
            if let Ok(before) = fs::read_to_string(AUTOGROUP) {
                group = before.split_whitespace().last().map(str::to_owned);
                fs::write(AUTOGROUP, nice.to_string())
                    .with_context(|| format!("write {AUTOGROUP}"))?;
            }
        }
        Ok(Self { group })
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        if let Some(before) = &self.group {
            // The kernel takes a second change only a tenth of a second later; it is long past.
            let _ = fs::write(AUTOGROUP, before);
        }
    }
}

/// Restricts the calling thread, and the processes it starts from now on, to `cores`.
pub fn pin(cores: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for &core in cores {
        set.set(core);
    }
    sched_setaffinity(None, &set).context("set the core affinity")
}

fn duration(time: rustix::time::Timespec) -> Duration {
    Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0))
        + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Cores of the machine, whatever this process is restricted to.
pub fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        stat.lines()
            .filter(|line| line.starts_with("cpu"))
            .count()
            .saturating_sub(1)
            .max(1)
    })
}
