//! Fuzzing: builds the targets with what libFuzzer needs, runs them, and says how to see a finding
//! again. No nightly compiler and no cargo-fuzz: the passes that count coverage are in every
//! compiler, and all else is a handful of flags.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::runner::Session;

/// The targets, and the longest input that is made for each. Heads of HTTP may have 16 KiB.
const TARGETS: [(&str, u32); 7] = [
    ("config", 4096),
    ("control", 24 << 10),
    ("frames", 4096),
    ("nbd_client", 4096),
    ("nbd_server", 4096),
    ("state", 8192),
    ("transport", 8192),
];

/// How long each target runs when nothing else is said, and in CI.
const DEFAULT_SECONDS: u64 = 15;

/// An input that takes longer is a finding. Far above what any takes, on any machine.
const INPUT_TIMEOUT_S: u32 = 120;

/// What a process may take; what single inputs may take the targets watch themselves.
const RSS_LIMIT_MB: u32 = 2048;

/// Counts edges, and lets libFuzzer see what is compared with what.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

/// The triple must be named: only then do flags stay away from build scripts.
const TRIPLE: &str = if cfg!(target_arch = "aarch64") {
    "aarch64-unknown-linux-gnu"
} else {
    "x86_64-unknown-linux-gnu"
};

/// What is to be done, from the command line.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    targets: Vec<(&'static str, u32)>,
    seconds: u64,
    merge: bool,
    coverage: bool,
}

impl Wanted {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut wanted = Self {
            targets: Vec::new(),
            seconds: DEFAULT_SECONDS,
            merge: false,
            coverage: false,
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--seconds" => {
                    let text = rest.next().context("--seconds needs a number")?;
                    wanted.seconds = text
                        .parse()
                        .with_context(|| format!("{text:?} is no number of seconds"))?;
                }
                "--merge" => wanted.merge = true,
                "--coverage" => wanted.coverage = true,
                name => {
                    let target = TARGETS.iter().find(|(target, _)| *target == name);
                    let names = TARGETS.map(|(name, _)| name).join(" ");
                    wanted.targets.push(*target.with_context(|| {
                        format!("there is no target {name:?}; there are: {names}")
                    })?);
                }
            }
        }
        if wanted.targets.is_empty() {
            wanted.targets = TARGETS.to_vec();
        }
        Ok(wanted)
    }
}

/// `cargo xtask fuzz`. True when nothing was found.
///
/// # Errors
/// The arguments make no sense, or a program cannot be run.
pub fn run(session: &Session, arguments: &[String]) -> Result<bool> {
    let wanted = Wanted::parse(arguments)?;
    if wanted.coverage {
        return coverage(session);
    }
    let started = Instant::now();
    if !build(session)?.success() {
        return Ok(false);
    }
    println!("built in {:.0} s", started.elapsed().as_secs_f64());
    let mut all_well = true;
    for (target, max_len) in &wanted.targets {
        let place = Place::new(session, target)?;
        all_well &= if wanted.merge {
            place.merge(*max_len)?
        } else {
            place.fuzz(*max_len, Duration::from_secs(wanted.seconds))?
        };
    }
    Ok(all_well)
}

fn build(session: &Session) -> Result<std::process::ExitStatus> {
    let mut command = session.cargo("build");
    command.args(["--package", "hikkoshi-fuzz", "--features", "libfuzzer"]);
    command.args(["--profile", "fuzz", "--bins", "--target", TRIPLE]);
    // Flags change every crate's fingerprint: the ordinary directory stays warm.
    command.arg("--target-dir").arg(directory(session));
    command.env("RUSTFLAGS", FLAGS);
    command.status().context("cannot run cargo")
}

fn directory(session: &Session) -> PathBuf {
    session.target_dir().join("fuzz")
}

/// Where one target has what.
struct Place<'a> {
    session: &'a Session,
    target: &'a str,
    binary: PathBuf,
    /// Inputs that this machine has found so far. Not committed; `--merge` picks from them.
    found: PathBuf,
    corpus: PathBuf,
    regressions: PathBuf,
    artifacts: PathBuf,
}

impl<'a> Place<'a> {
    fn new(session: &'a Session, target: &'a str) -> Result<Self> {
        let place = Self {
            session,
            target,
            binary: directory(session).join(TRIPLE).join("fuzz").join(target),
            found: directory(session).join("found").join(target),
            corpus: session.root.join("fuzz/corpus").join(target),
            regressions: session.root.join("fuzz/regressions").join(target),
            artifacts: session.root.join("fuzz/artifacts").join(target),
        };
        for made in [&place.found, &place.regressions, &place.artifacts] {
            std::fs::create_dir_all(made)
                .with_context(|| format!("cannot create {}", made.display()))?;
        }
        Ok(place)
    }

    fn command(&self) -> Command {
        let mut command = self.session.command(&self.binary.to_string_lossy());
        let mut prefix = self.artifacts.clone().into_os_string();
        prefix.push("/");
        command.arg(format!("-artifact_prefix={}", prefix.to_string_lossy()));
        command.arg(format!("-timeout={INPUT_TIMEOUT_S}"));
        command.arg(format!("-rss_limit_mb={RSS_LIMIT_MB}"));
        let dictionary = self
            .session
            .root
            .join("fuzz/dictionaries")
            .join(self.target);
        if dictionary.is_file() {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        command
    }

    /// All that is kept first, then new inputs for as long as was asked for.
    fn fuzz(&self, max_len: u32, time: Duration) -> Result<bool> {
        let log = directory(self.session).join(format!("{}.log", self.target));
        let file = std::fs::File::create(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = self.command();
        command.arg(format!("-max_len={max_len}"));
        command.arg(format!("-max_total_time={}", time.as_secs()));
        command.args([&self.found, &self.corpus, &self.regressions]);
        command.stdout(Stdio::null()).stderr(file);
        let status = command
            .status()
            .with_context(|| format!("cannot run {}", self.binary.display()))?;
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        if status.success() {
            let last = said.lines().rev().find(|line| line.contains("DONE"));
            println!(
                "{:<11} {}",
                self.target,
                last.unwrap_or("ended without a word")
            );
            return Ok(last.is_some());
        }
        println!("{:<11} FAILED: {status}; {}", self.target, log.display());
        for line in said.lines().filter(|line| !line.starts_with('#')).take(40) {
            println!("  {line}");
        }
        if let Some(input) = said
            .lines()
            .find_map(|line| line.split("Test unit written to ").nth(1))
        {
            println!("the input is    {input}");
            println!("see it again    {} {input}", self.binary.display());
            println!("keep it         mv {input} {}", self.regressions.display());
        }
        Ok(false)
    }

    /// Adds to the corpus, from what was found, inputs that reach code that it does not. How often
    /// code is reached does not count here: by that, there would be thousands.
    fn merge(&self, max_len: u32) -> Result<bool> {
        let mut command = self.command();
        command.args(["-merge=1", "-use_counters=0"]);
        command.arg(format!("-max_len={max_len}"));
        command.args([&self.corpus, &self.found]);
        let status = command.status().context("cannot merge")?;
        Ok(status.success())
    }
}

/// Lines of our own code that the kept inputs, and those found on this machine, reach.
fn coverage(session: &Session) -> Result<bool> {
    let version = session
        .command("rustc")
        .arg("-vV")
        .output()
        .context("cannot run rustc")?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let major = version
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next())
        .context("rustc does not say which LLVM it has")?;
    let tool = |name: &str| format!("{name}-{major}");
    let present = session.command(&tool("llvm-cov")).arg("--version").output();
    if !present.is_ok_and(|output| output.status.success()) {
        bail!(
            "llvm-cov-{major} is missing; install Debian's llvm-{major}, the version of the compiler"
        );
    }
    let dir = session.target_dir().join("fuzz-coverage");
    let profiles = dir.join("profiles");
    // Counts of an earlier run would be added to those of this one.
    let _ = std::fs::remove_dir_all(&profiles);
    let mut test = session.cargo("test");
    test.args([
        "--package",
        "hikkoshi-fuzz",
        "--test",
        "replay",
        "--target",
        TRIPLE,
    ]);
    test.arg("--target-dir").arg(&dir);
    test.env("RUSTFLAGS", "-Cinstrument-coverage");
    test.env("HIKKOSHI_FUZZ_FOUND", directory(session).join("found"));
    test.env("LLVM_PROFILE_FILE", profiles.join("%p-%m.profraw"));
    if !test.status().context("cannot run cargo")?.success() {
        return Ok(false);
    }
    let merged = dir.join("merged.profdata");
    let mut merge = session.command(&tool("llvm-profdata"));
    merge
        .args(["merge", "--sparse", "-o"])
        .arg(&merged)
        .arg(&profiles);
    if !merge.status().context("cannot merge profiles")?.success() {
        return Ok(false);
    }
    let mut report = session.command(&tool("llvm-cov"));
    report
        .arg("report")
        .arg(format!("--instr-profile={}", merged.display()))
        .arg("--ignore-filename-regex=tests?\\.rs")
        .args(["--show-branch-summary=false", "--use-color=false"])
        .arg(replay_binary(&dir.join(TRIPLE).join("debug/deps"))?)
        .arg(session.root.join("crates"));
    Ok(report.status().context("cannot run llvm-cov")?.success())
}

/// The newest program that the test was built as.
fn replay_binary(deps: &Path) -> Result<PathBuf> {
    let mut newest = None;
    for entry in std::fs::read_dir(deps).context("the test was not built")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("replay-") && !name.contains('.') {
            newest = newest.max(Some((entry.metadata()?.modified()?, entry.path())));
        }
    }
    newest
        .map(|(_, path)| path)
        .context("the test's program is not where cargo puts it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Wanted> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Wanted::parse(&words)
    }

    #[test]
    fn targets_and_their_time_are_understood() {
        let all = parse("").unwrap();
        assert_eq!(all.targets.len(), TARGETS.len());
        assert_eq!(all.seconds, DEFAULT_SECONDS);
        let one = parse("state --seconds 3600").unwrap();
        assert_eq!((one.targets[0].0, one.seconds), ("state", 3600));
        assert!(
            parse("nothing")
                .unwrap_err()
                .to_string()
                .contains("nbd_server")
        );
        assert!(parse("--seconds").is_err());
        assert!(parse("--seconds soon").is_err());
    }

    /// A target that only one of the two lists has is never run in CI.
    #[test]
    fn the_targets_are_those_of_the_fuzz_crate() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/fuzz_targets");
        let mut files: Vec<String> = std::fs::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, TARGETS.map(|(name, _)| format!("{name}.rs")));
    }
}
