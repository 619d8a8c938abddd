//! Ways to make things fail: system calls of a running process, and file systems that become full.

use crate::packages;
use crate::process::{self, Process};
use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

/// System calls of a process that fail from now on, until this is dropped or [`Injection::end`]ed.
pub struct Injection {
    tracer: Option<Process>,
    victim: u32,
}

impl Injection {
    /// Makes calls of `pid` fail as `rule` says (the rules of `strace --inject`); with `path`, only
    /// those on that file.
    ///
    /// # Errors
    /// `strace` is missing, or the process cannot be traced.
    pub fn start(pid: u32, rule: &str, path: Option<&Path>, log: &Path) -> Result<Self> {
        let (calls, _) = rule.split_once(':').context("a rule names calls first")?;
        let mut arguments = vec![
            "-f".to_owned(),
            "-p".to_owned(),
            pid.to_string(),
            "-e".to_owned(),
            format!("trace={calls}"),
            "-e".to_owned(),
            format!("inject={rule}"),
        ];
        if let Some(path) = path {
            arguments.extend(["-P".to_owned(), path.display().to_string()]);
        }
        let mut tracer = Process::start(None, packages::require("strace")?, &arguments, log)?;
        tracer.wait_until("attached threads", LONG, |_| all_traced(pid))?;
        Ok(Self {
            tracer: Some(tracer),
            victim: pid,
        })
    }

    /// Lets all calls succeed again.
    ///
    /// # Errors
    /// The tracer does not let go.
    pub fn end(mut self) -> Result<()> {
        self.detach()
    }

    fn detach(&mut self) -> Result<()> {
        let Some(mut tracer) = self.tracer.take() else {
            return Ok(());
        };
        // A tracer that is killed takes nothing with it, but one that is asked detaches in order.
        let pid = Pid::from_raw(i32::try_from(tracer.pid())?).context("a process id")?;
        kill_process(pid, Signal::INT)?;
        tracer.wait(LONG)?;
        let start = Instant::now();
        while any_traced(self.victim) {
            if start.elapsed() > LONG {
                bail!("process {} stays traced", self.victim);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("an injection stays: {error:#}");
        }
    }
}

fn tracers(pid: u32) -> Vec<bool> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
        .map(|status| !status.contains("TracerPid:\t0\n"))
        .collect()
}

fn all_traced(pid: u32) -> bool {
    let tracers = tracers(pid);
    !tracers.is_empty() && tracers.iter().all(|traced| *traced)
}

fn any_traced(pid: u32) -> bool {
    tracers(pid).iter().any(|traced| *traced)
}

/// A small file system in memory that can be filled. Unmounted when dropped.
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// One of `mebibytes`, mounted at `path`, which is made.
    ///
    /// # Errors
    /// Not root, or it cannot be mounted.
    pub fn mount(path: &Path, mebibytes: u32) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let size = format!("size={mebibytes}m");
        let at = path.display().to_string();
        process::run("mount", ["-t", "tmpfs", "-o", &size, "tmpfs", &at])?;
        Ok(Self {
            path: path.to_path_buf(),
        })
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Takes all the space that is left.
    ///
    /// # Errors
    /// It cannot be written to.
    pub fn fill(&self) -> Result<()> {
        use std::io::Write;
        let mut file = std::fs::File::create(self.filler())?;
        let page = [0xff; 4096];
        loop {
            match file.write_all(&page) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives it back.
    ///
    /// # Errors
    /// It was not filled.
    pub fn free(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let at = self.path.display().to_string();
        // Lazily, since a daemon that the same test drops may live for a moment longer.
        if let Err(error) = process::run("umount", ["--lazy", &at]) {
            eprintln!("{at} stays mounted: {error:#}");
        }
    }
}

/// Bytes that tell where they are and which disk they are of; never a block of zeroes. The range is
/// of whole sectors.
pub fn content(disk: u8, offset: u64, len: u64) -> Vec<u8> {
    let sectors = offset / 512..(offset + len) / 512;
    let words = sectors.flat_map(|sector| {
        let word = (sector << 8 | u64::from(disk)).to_le_bytes();
        std::iter::repeat_n(word, 512 / 8)
    });
    words.flatten().collect()
}

/// Makes an image of `size` bytes of [`content`].
///
/// # Errors
/// It cannot be written.
pub fn make_image(path: &Path, disk: u8, size: u64) -> Result<()> {
    std::fs::write(path, content(disk, 0, size)).with_context(|| path.display().to_string())
}
