//! The project's own tasks. `cargo xtask test` is the one command that runs all that CI runs.
//!
//! This file owns the command line; [`steps`] knows what there is to run, [`runner`] runs it,
//! [`debian`] sees to the packages it needs. Nothing here is part of the product.

mod debian;
mod fuzz;
mod mutants;
mod report;
mod runner;
mod steps;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::runner::Session;
use crate::steps::{Selection, Step};

const USAGE: &str = "\
The project's own tasks

Usage: cargo xtask COMMAND

Commands:
  test [--quick] [--only STEP]... [--no-install]
                        everything that CI runs, with a summary at the end
  ci                    the same under CI's rules: a skipped test is a failure, Cargo.lock is
                        fixed, every step has a time limit
  interop [ARG]...      other people's clients and test suites against the release binary;
                        the arguments go to tests/interop/run.py (--list names the tests)
  mutants [--all | --list | NAME...]
                        breaks the product on purpose, in a copy, and sees the simulator notice:
                        five ways, all of them, or those whose names contain NAME
  crash [ARG]...        the crash sweep of the release binary, 10000 crashes if nothing else is
                        said: --restarts N, --seconds N, --seed N, --jobs N (--help has all)
  fuzz [TARGET]... [--seconds N]
                        fuzz targets, all or some, each for 15 s or as long as said;
                        --merge adds to the corpus what was found here and reaches more,
                        --coverage prints the lines that the inputs reach
  packages [--install]  the Debian packages that the tests need, and which are missing
  deny                  licences, advisories and duplicate crates (installs cargo-deny if missing)

Options of test:
  --quick               only fmt, clippy and test: no packages, no release build
  --only STEP           only this step (repeatable): fmt clippy test loom doc sim mutants
                        fuzz build e2e crash interop
  --no-install          never install packages, even as root
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs one command. `Ok(false)` when it ran and something in it failed.
fn run(arguments: &[String]) -> Result<bool> {
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", arguments),
    };
    match command {
        "test" => test(
            rest,
            std::env::var_os("CI").is_some_and(|value| value == "true"),
        ),
        "ci" => test(rest, true),
        "interop" => {
            let session =
                Session::new(std::env::var_os("CI").is_some_and(|value| value == "true"))?;
            steps::interop(&session, rest)
        }
        "crash" => {
            let session =
                Session::new(std::env::var_os("CI").is_some_and(|value| value == "true"))?;
            steps::crash(&session, rest)
        }
        "mutants" => {
            let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
            mutants::run(&Session::new(ci)?, rest)
        }
        "fuzz" => {
            let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
            fuzz::run(&Session::new(ci)?, rest)
        }
        "packages" => packages(rest),
        "deny" => steps::deny(&Session::new(false)?),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            Ok(true)
        }
        other => bail!("there is no command {other:?}; `cargo xtask help` lists them"),
    }
}

fn test(arguments: &[String], ci: bool) -> Result<bool> {
    let mut selection = Selection::Everything;
    let mut install = true;
    let mut only = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--quick" => selection = Selection::Quick,
            "--no-install" => install = false,
            "--only" => {
                let name = rest.next().context("--only needs the name of a step")?;
                only.push(Step::from_name(name)?);
            }
            other => bail!("unknown argument {other:?}; `cargo xtask help` lists them"),
        }
    }
    if !only.is_empty() {
        selection = Selection::Only(only);
    }
    steps::test(&Session::new(ci)?, &selection, install)
}

fn packages(arguments: &[String]) -> Result<bool> {
    let install = match arguments {
        [] => false,
        [flag] if flag == "--install" => true,
        _ => bail!("`packages` takes only --install"),
    };
    let missing = debian::missing(debian::PACKAGES)?;
    for package in debian::PACKAGES {
        let mark = if missing.contains(&package) {
            "missing"
        } else {
            "present"
        };
        println!("{mark}  {:<24} {}", package.name, package.purpose);
    }
    if install {
        debian::ensure(debian::PACKAGES, true)?;
        return Ok(true);
    }
    Ok(missing.is_empty())
}
