//! What a guest says on its serial console, with the time at which it came.
//!
//! Owns a thread that follows the file QEMU writes the console to. Any line that tells of an I/O
//! error, a broken file system, a crash or a failed check is an alarm: every wait ends with it.

use crate::process;
use anyhow::{Result, bail};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the file is looked at: the precision of [`Console::longest_silence`].
const POLL: Duration = Duration::from_millis(5);
/// What must never be on the console.
const ALARMS: &[&str] = &[
    "WL FAIL",
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "Aborting journal",
    "Remounting filesystem read-only",
    "Kernel panic",
    "Oops",
    "BUG:",
    "blocked for more than",
    "rcu_sched self-detected stall",
];

type Lines = Arc<Mutex<Vec<(Instant, String)>>>;

/// A guest's console.
pub struct Console {
    path: PathBuf,
    lines: Lines,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    /// Follows the file at `path`, which is made if it does not exist.
    ///
    /// # Errors
    /// The file can be neither made nor opened.
    pub fn follow(path: &Path) -> Result<Self> {
        File::create(path)?;
        let mut file = File::open(path)?;
        let lines = Lines::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (into, stopped) = (lines.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut partial = Vec::new();
            loop {
                let last = stopped.load(Ordering::Relaxed);
                if file.read_to_end(&mut partial).is_err() {
                    return;
                }
                take_lines(&mut partial, &into);
                if last {
                    return;
                }
                std::thread::sleep(POLL);
            }
        });
        Ok(Self {
            path: path.to_path_buf(),
            lines,
            stop,
            thread: Some(thread),
        })
    }

    fn lines(&self) -> MutexGuard<'_, Vec<(Instant, String)>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if there was an alarm.
    ///
    /// # Errors
    /// There was; the message has it and the end of the console.
    pub fn check(&self) -> Result<()> {
        for (_, line) in self.lines().iter() {
            if ALARMS.iter().any(|alarm| line.contains(alarm)) {
                bail!("the guest says {line:?}:\n{}", process::tail(&self.path));
            }
        }
        Ok(())
    }

    /// The first line that contains `text`, if it came already.
    pub fn find(&self, text: &str) -> Option<String> {
        self.lines()
            .iter()
            .find(|(_, line)| line.contains(text))
            .map(|(_, line)| line.clone())
    }

    /// Waits for a line that contains `text`, new or old, and returns it.
    ///
    /// # Errors
    /// An alarm, or the time is over; the message has the end of the console.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<String> {
        let start = Instant::now();
        loop {
            self.check()?;
            if let Some(line) = self.find(text) {
                return Ok(line);
            }
            if start.elapsed() > timeout {
                bail!(
                    "no {text:?} on the console in {timeout:?}:\n{}",
                    process::tail(&self.path)
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// The workload's newest numbers.
    pub fn last_tick(&self) -> Option<Tick> {
        self.lines()
            .iter()
            .rev()
            .find_map(|(_, line)| Tick::parse(line))
    }

    /// Waits until the workload has done `rounds` more rounds of each kind than at the last tick.
    ///
    /// # Errors
    /// As [`Console::wait_for`].
    pub fn wait_for_rounds(&self, rounds: u64, timeout: Duration) -> Result<Tick> {
        let from = self.last_tick().unwrap_or_default();
        let start = Instant::now();
        loop {
            self.check()?;
            let now = self.last_tick().unwrap_or_default();
            let least = [
                now.files - from.files,
                now.writes - from.writes,
                now.content - from.content,
            ];
            if least.iter().all(|done| *done >= rounds) {
                return Ok(now);
            }
            if start.elapsed() > timeout {
                bail!(
                    "the workload stands at {now:?}:\n{}",
                    process::tail(&self.path)
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// When the first and the last tick came, and the longest time between two.
    pub fn longest_silence(&self) -> Option<(Instant, Instant, Duration)> {
        let lines = self.lines();
        let mut ticks = lines
            .iter()
            .filter(|(_, line)| line.contains("WL tick"))
            .map(|(at, _)| *at);
        let first = ticks.next()?;
        let mut last = first;
        let mut longest = Duration::ZERO;
        for at in ticks {
            longest = longest.max(at - last);
            last = at;
        }
        Some((first, last, longest))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was printed.
            let _ = thread.join();
        }
    }
}

fn take_lines(partial: &mut Vec<u8>, into: &Lines) {
    let now = Instant::now();
    while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
        let line: Vec<u8> = partial.drain(..=end).collect();
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        into.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((now, line));
    }
}

/// What the workload counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tick {
    /// Rounds of the files thread.
    pub files: u64,
    /// Rounds of the sectors thread.
    pub writes: u64,
    /// Files verified that were on the disk from the start.
    pub content: u64,
    /// The longest step so far, by the guest's clock (which stands still while the guest does).
    pub longest: Duration,
}

impl Tick {
    fn parse(line: &str) -> Option<Self> {
        let line = line.get(line.find("WL tick ")?..)?;
        let field = |name: &str| -> Option<u64> {
            let rest = line.split(name).nth(1)?;
            rest.split_whitespace().next()?.parse().ok()
        };
        Some(Self {
            files: field(" files=")?,
            writes: field(" writes=")?,
            content: field(" content=")?,
            longest: Duration::from_micros(field(" longest_us=")?),
        })
    }
}
