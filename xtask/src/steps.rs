//! The steps of the tests, in the order in which they fail soonest, and what each of them runs.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::debian;
use crate::report::{self, Outcome};
use crate::runner::Session;

/// Crashes in the sample that is part of the tests; a soak is `cargo xtask crash`.
const CRASH_SAMPLE: u64 = 2000;

/// How long new worlds are simulated.
const SIM_SECONDS: &str = "90";

/// One step of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The source is formatted.
    Fmt,
    /// No lint complains.
    Clippy,
    /// Unit, model and integration tests of every crate but the testkit.
    Test,
    /// The lock-free parts under every interleaving.
    Loom,
    /// The documentation builds without a warning.
    Doc,
    /// New simulated worlds, after those that ever failed.
    Sim,
    /// The simulator notices what is broken on purpose.
    Mutants,
    /// Each fuzz target over all that is kept, and for some seconds more.
    Fuzz,
    /// The release binary, which the last two steps use.
    Build,
    /// Whole moves with real virtual machines and peers.
    EndToEnd,
    /// The binary killed at any instant, and its power cut: a sample.
    Crash,
    /// Other people's clients and test suites.
    Interop,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Fmt,
        Self::Clippy,
        Self::Test,
        Self::Loom,
        Self::Doc,
        Self::Sim,
        Self::Mutants,
        Self::Fuzz,
        Self::Build,
        Self::EndToEnd,
        Self::Crash,
        Self::Interop,
    ];

    /// Those that need no package and no release build.
    const QUICK: [Self; 3] = [Self::Fmt, Self::Clippy, Self::Test];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Clippy => "clippy",
            Self::Test => "test",
            Self::Loom => "loom",
            Self::Doc => "doc",
            Self::Sim => "sim",
            Self::Mutants => "mutants",
            Self::Fuzz => "fuzz",
            Self::Build => "build",
            Self::EndToEnd => "e2e",
            Self::Crash => "crash",
            Self::Interop => "interop",
        }
    }

    /// The step of this name.
    ///
    /// # Errors
    /// There is none; the error lists those that there are.
    pub fn from_name(name: &str) -> Result<Self> {
        let names: Vec<&str> = Self::ALL.iter().map(|step| step.name()).collect();
        Self::ALL
            .into_iter()
            .find(|step| step.name() == name)
            .with_context(|| format!("there is no step {name:?}; there are: {}", names.join(" ")))
    }

    /// How long it may take under CI's rules, on two cores and with nothing built before. Far
    /// above what it takes (docs/testing.md), so that only what hangs is ended.
    fn limit(self) -> Duration {
        let minutes = match self {
            Self::Fmt => 2,
            Self::Clippy | Self::Doc | Self::Sim => 10,
            Self::Test | Self::Loom | Self::Build | Self::Fuzz => 15,
            Self::Crash | Self::Interop | Self::Mutants => 20,
            Self::EndToEnd => 30,
        };
        Duration::from_secs(minutes * 60)
    }

    /// Whether it uses the release binary.
    fn needs_binary(self) -> bool {
        matches!(self, Self::EndToEnd | Self::Crash | Self::Interop)
    }

    /// Whether it uses programs that Debian packages bring. Unit tests do too, some of them.
    fn needs_packages(self) -> bool {
        matches!(
            self,
            Self::Test | Self::Fuzz | Self::EndToEnd | Self::Crash | Self::Interop
        )
    }
}

/// Which steps are run.
#[derive(Debug)]
pub enum Selection {
    /// All.
    Everything,
    /// Those that a developer runs between two edits.
    Quick,
    /// These, and what they need.
    Only(Vec<Step>),
}

impl Selection {
    fn steps(&self) -> Vec<Step> {
        let mut steps = match self {
            Self::Everything => Step::ALL.to_vec(),
            Self::Quick => Step::QUICK.to_vec(),
            Self::Only(steps) => steps.clone(),
        };
        if steps.iter().any(|step| step.needs_binary()) && !steps.contains(&Step::Build) {
            steps.push(Step::Build);
        }
        let order = |step: &Step| Step::ALL.iter().position(|other| other == step);
        steps.sort_by_key(order);
        steps.dedup();
        steps
    }
}

/// Runs the selected steps and prints the summary. A failed step does not stop the others, so
/// that one run tells everything. True when all went well.
///
/// # Errors
/// Packages are missing and cannot be installed: nothing was run.
pub fn test(session: &Session, selection: &Selection, install: bool) -> Result<bool> {
    let steps = selection.steps();
    let mut outcomes = Vec::new();
    let quick = matches!(selection, Selection::Quick);
    if !quick && steps.iter().any(|step| step.needs_packages()) {
        let started = Instant::now();
        debian::ensure(debian::PACKAGES, install)?;
        outcomes.push(passed("packages", started.elapsed()));
    }
    let mut built = true;
    for step in steps {
        let outcome = if step.needs_binary() && !built {
            failed(step.name(), "there is no release binary")
        } else {
            session.run(step.name(), step.limit(), command(session, step)?)
        };
        if step == Step::Build {
            built = outcome.failure.is_none();
        }
        if let Some(why) = &outcome.failure {
            println!("==> {} FAILED: {why}", step.name());
        }
        outcomes.push(outcome);
    }
    Ok(report::print(&outcomes))
}

/// What a step runs.
fn command(session: &Session, step: Step) -> Result<Command> {
    let mut command;
    match step {
        Step::Fmt => {
            command = session.cargo("fmt");
            command.args(["--all", "--check"]);
        }
        Step::Clippy => {
            command = session.cargo("clippy");
            command.args(["--workspace", "--all-targets", "--", "-D", "warnings"]);
        }
        Step::Test => {
            command = session.cargo("test");
            // The testkit's tests are the step `e2e`: they want the release binary.
            command.args([
                "--workspace",
                "--exclude",
                "hikkoshi-testkit",
                "--no-fail-fast",
            ]);
            if session.ci || debian::is_root()? {
                // Some want loop devices and mounts.
                command.args(["--", "--include-ignored"]);
            }
        }
        Step::Loom => {
            command = session.cargo("test");
            command.args([
                "--package",
                "hikkoshi-engine",
                "--release",
                "--no-fail-fast",
            ]);
            // Other tests use the same types outside a model, where loom forbids it.
            command.args(["--test", "loom"]);
            // Flags change every crate's fingerprint: a target directory of its own keeps the
            // ordinary one warm.
            command
                .arg("--target-dir")
                .arg(session.target_dir().join("loom"));
            command.env("RUSTFLAGS", "--cfg loom");
        }
        Step::Doc => {
            command = session.cargo("doc");
            command.args(["--workspace", "--no-deps"]);
            command.env("RUSTDOCFLAGS", "-D warnings");
        }
        Step::Sim => {
            command = session.cargo("run");
            command.args(["--profile", "sim", "--package", "hikkoshi-sim", "--"]);
            command.args(["--seconds", SIM_SECONDS]);
        }
        Step::Mutants => {
            // Ourselves, so that the step is shown, timed and ended like the others.
            let this = std::env::current_exe().context("where is this program?")?;
            command = session.command(&this.to_string_lossy());
            command.arg("mutants");
        }
        Step::Fuzz => {
            let this = std::env::current_exe().context("this program has no path")?;
            command = session.command(&this.to_string_lossy());
            command.arg("fuzz");
        }
        Step::Build => {
            command = session.cargo("build");
            command.args(["--release", "--package", "hikkoshi"]);
        }
        Step::EndToEnd => {
            command = session.cargo("test");
            command.args(["--package", "hikkoshi-testkit", "--no-fail-fast"]);
            command.env("HIKKOSHI_BIN", binary(session));
        }
        Step::Crash => {
            // Counted, not timed: what is visited must not depend on the machine's speed.
            let sample = ["--restarts".to_owned(), CRASH_SAMPLE.to_string()];
            command = crash_command(session, &sample);
        }
        Step::Interop => command = interop_command(session, &[])?,
    }
    if session.ci && matches!(step, Step::Clippy | Step::Test | Step::EndToEnd) {
        // What is built once needs nothing kept for the next time, which is most of the room that
        // a build takes.
        command.env("CARGO_INCREMENTAL", "0");
    }
    Ok(command)
}

/// Runs the crash sweep alone, with arguments of its own.
///
/// # Errors
/// Packages are missing and cannot be installed.
pub fn crash(session: &Session, arguments: &[String]) -> Result<bool> {
    debian::ensure(debian::PACKAGES, true)?;
    let mut outcomes = Vec::new();
    let limit = Step::Crash.limit();
    if std::env::var_os("HIKKOSHI_BIN").is_none() {
        outcomes.push(session.run("build", limit, command(session, Step::Build)?));
    }
    if outcomes.iter().all(|outcome| outcome.failure.is_none()) {
        // A soak takes as long as it is told to.
        let limit = Duration::from_secs(24 * 60 * 60);
        outcomes.push(session.run("crash", limit, crash_command(session, arguments)));
    }
    Ok(report::print(&outcomes))
}

fn crash_command(session: &Session, arguments: &[String]) -> Command {
    let mut command = session.cargo("run");
    command.args(["--release", "--quiet", "--package", "hikkoshi-testkit"]);
    command.args(["--bin", "hikkoshi-crash", "--"]);
    command.args(arguments);
    command.env("HIKKOSHI_BIN", binary(session));
    command
}

/// Runs the interop scripts alone, with arguments of their own.
///
/// # Errors
/// Packages are missing and cannot be installed.
pub fn interop(session: &Session, arguments: &[String]) -> Result<bool> {
    if arguments
        .iter()
        .any(|argument| argument == "--list" || argument == "--help")
    {
        let status = interop_command(session, arguments)?
            .status()
            .context("cannot run python3")?;
        return Ok(status.success());
    }
    debian::ensure(debian::PACKAGES, true)?;
    let mut outcomes = Vec::new();
    let limit = Step::Interop.limit();
    // HIKKOSHI_BIN lets another build be tested.
    if std::env::var_os("HIKKOSHI_BIN").is_none() {
        outcomes.push(session.run("build", limit, command(session, Step::Build)?));
    }
    if outcomes.iter().all(|outcome| outcome.failure.is_none()) {
        outcomes.push(session.run("interop", limit, interop_command(session, arguments)?));
    }
    Ok(report::print(&outcomes))
}

fn interop_command(session: &Session, arguments: &[String]) -> Result<Command> {
    // Debian's own Python: the bindings of libnbd are built for it and for no other.
    let mut command = session.command("/usr/bin/python3");
    command
        .arg(session.root.join("tests/interop/run.py"))
        .args(arguments);
    command.env("HIKKOSHI_BIN", binary(session));
    command.env("HIKKOSHI_INTEROP_DIR", session.target_dir().join("interop"));
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    let path = std::env::var_os("PATH").context("PATH is not set")?;
    let first = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let joined = std::env::join_paths(first.into_iter().chain(std::env::split_paths(&path)))
        .context("PATH has an entry that cannot be joined")?;
    command.env("PATH", joined);
    Ok(command)
}

/// The binary under test: the release build, unless the environment names another.
fn binary(session: &Session) -> PathBuf {
    std::env::var_os("HIKKOSHI_BIN").map_or_else(
        || session.target_dir().join("release/hikkoshi"),
        PathBuf::from,
    )
}

/// Checks licences, advisories and duplicates by `deny.toml`. Not part of `test`: building the
/// checker takes longer than all our own code.
///
/// # Errors
/// The checker is missing and cannot be installed.
pub fn deny(session: &Session) -> Result<bool> {
    let limit = Duration::from_secs(30 * 60);
    let present = session.cargo("deny").arg("--version").output();
    if !present.is_ok_and(|output| output.status.success()) {
        let mut install = session.cargo("install");
        install.args(["--locked", "cargo-deny"]);
        let outcome = session.run("install", limit, install);
        if let Some(why) = outcome.failure {
            bail!("cargo-deny is missing and cannot be installed: {why}");
        }
    }
    let mut check = session.cargo("deny");
    check.arg("check");
    Ok(report::print(&[session.run("deny", limit, check)]))
}

fn passed(step: &'static str, elapsed: Duration) -> Outcome {
    Outcome {
        step,
        elapsed,
        failure: None,
        counts: None,
        closing_lines: Vec::new(),
    }
}

fn failed(step: &'static str, why: &str) -> Outcome {
    Outcome {
        step,
        elapsed: Duration::ZERO,
        failure: Some(why.to_owned()),
        counts: None,
        closing_lines: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_found_by_its_name() {
        for step in Step::ALL {
            assert_eq!(Step::from_name(step.name()).ok(), Some(step));
        }
        assert!(Step::from_name("nothing").is_err());
    }

    #[test]
    fn what_needs_the_binary_builds_it_first() {
        let steps = Selection::Only(vec![Step::Interop, Step::Fmt]).steps();
        assert_eq!(steps, [Step::Fmt, Step::Build, Step::Interop]);
    }
}
