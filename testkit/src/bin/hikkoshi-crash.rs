//! The crash sweep's command line; `cargo xtask crash` builds what it needs and runs it.

use anyhow::{Context, Result, bail};
use hikkoshi_testkit::cache;
use hikkoshi_testkit::crash::Programs;
use hikkoshi_testkit::crash::filesystem::{NAMES, separate_mounts};
use hikkoshi_testkit::crash::soak::{self, Plan};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const USAGE: &str = "\
Kills the real binary at any instant, cuts its power, and compares

Usage: hikkoshi-crash [OPTION]...
  --restarts N         crashes in all [default: 10000]
  --seconds N          not longer than this, even if that means fewer
  --seed N             names everything that is random [default: the time]
  --jobs N             threads [default: 2]
  --file-systems LIST  of tmpfs,ext4,xfs,btrfs [default: all; the others need root]
  --armed PATH         the binary with crash points [default: it is built]
  --no-points          no kills at named points
  --moves              nothing but power cuts of moves, at both ends
  --root DIR           a directory in memory [default: /dev/shm]
  --evidence DIR       where what belongs to a failure is kept
                       [default: crash-evidence in cargo's target directory]

HIKKOSHI_BIN names the binary; without it, it is built.";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hikkoshi-crash: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut restarts = 10_000;
    let mut limit = None;
    let mut seed = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut jobs = 2;
    let mut file_systems = NAMES.to_vec();
    let mut armed = None;
    let mut points = true;
    let mut only_moves = false;
    let mut root = PathBuf::from("/dev/shm");
    let mut evidence = None;
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--restarts" => restarts = value()?.parse()?,
            "--seconds" => limit = Some(Duration::from_secs(value()?.parse()?)),
            "--seed" => seed = value()?.parse()?,
            "--jobs" => jobs = value()?.parse()?,
            "--file-systems" => file_systems = soak::parse_file_systems(&value()?)?,
            "--armed" => armed = Some(PathBuf::from(value()?)),
            "--no-points" => points = false,
            "--moves" => (only_moves, points) = (true, false),
            "--root" => root = value()?.into(),
            "--evidence" => evidence = Some(PathBuf::from(value()?)),
            "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("unknown argument {other:?}\n\n{USAGE}"),
        }
    }
    // First of all: no other thread may run yet.
    if file_systems != ["tmpfs"] {
        separate_mounts()?;
    }
    if points && armed.is_none() {
        armed = Some(cache::armed_hikkoshi()?);
    }
    let evidence = match evidence {
        Some(dir) => dir,
        None => cache::target_dir()?.join("crash-evidence"),
    };
    let scratch = tempfile::Builder::new()
        .prefix("hikkoshi-crash-")
        .tempdir_in(&root)
        .with_context(|| format!("make a directory in {}", root.display()))?;
    soak::run(&Plan {
        programs: Programs {
            hikkoshi: cache::hikkoshi()?,
            armed,
        },
        seed,
        restarts,
        limit,
        jobs,
        file_systems,
        only_moves,
        root: scratch.path().to_path_buf(),
        evidence,
    })
}
