//! Mutations of the product that the simulator must catch: the proof that it bites.
//!
//! Each is applied to a copy of the tree below `target/`, built there (all share one target
//! directory), and its simulator must find a broken promise within [`LIMIT_S`]. A mutation whose
//! text is not found any more has rotted, which is an error as well.

mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::runner::Session;
use table::{FIRST, MUTATIONS, Mutation};

/// How long the simulator may look for what is wrong.
const LIMIT_S: u64 = 60;

/// How one mutation fared.
struct Fate {
    name: &'static str,
    /// Seconds and worlds until it was caught, or why it was not.
    caught: Result<(f64, u64), String>,
}

/// Tries the first mutations, all of them, or those whose names contain a text. True when all
/// were caught.
///
/// # Errors
/// The copy cannot be made, or a mutation has rotted.
pub fn run(session: &Session, arguments: &[String]) -> Result<bool> {
    let chosen: Vec<&Mutation> = match arguments {
        [] => MUTATIONS.iter().take(FIRST).collect(),
        [flag] if flag == "--all" => MUTATIONS.iter().collect(),
        [flag] if flag == "--list" => {
            MUTATIONS.iter().for_each(|m| println!("{}", m.name));
            return Ok(true);
        }
        words => MUTATIONS
            .iter()
            .filter(|m| words.iter().any(|word| m.name.contains(word.as_str())))
            .collect(),
    };
    if chosen.is_empty() {
        bail!("no mutation is named so; `cargo xtask mutants --list` lists them");
    }
    let copy = session.target_dir().join("mutants/tree");
    copy_tree(session, &copy)?;
    build(session, &copy).context("the tree does not build even without a mutation")?;
    let mut fates = Vec::new();
    for mutation in chosen {
        println!("==> {}", mutation.name);
        let fate = try_one(session, &copy, mutation)?;
        match &fate {
            Ok((seconds, worlds)) => println!("    caught after {seconds:.1} s, {worlds} worlds"),
            Err(why) => println!("    NOT CAUGHT: {why}"),
        }
        fates.push(Fate {
            name: mutation.name,
            caught: fate,
        });
    }
    Ok(print(&fates))
}

/// Brings the copy up to date. What is the same stays untouched, so that it is not built again.
fn copy_tree(session: &Session, copy: &Path) -> Result<()> {
    let listed = session
        .command("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .context("cannot run git to list the tree")?;
    if !listed.status.success() {
        bail!(
            "git cannot list the tree: {}",
            String::from_utf8_lossy(&listed.stderr)
        );
    }
    let names = String::from_utf8(listed.stdout).context("a file's name is no text")?;
    for name in names.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (session.root.join(name), copy.join(name));
        // A link to nowhere, or a file that was removed and is still in the index.
        let Ok(content) = fs::read(&from) else {
            continue;
        };
        write_if_new(&to, &content)?;
    }
    Ok(())
}

fn write_if_new(to: &Path, content: &[u8]) -> Result<()> {
    if fs::read(to).is_ok_and(|there| there == content) {
        return Ok(());
    }
    let folder = to.parent().context("a file is in a folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(to, content))
        .with_context(|| format!("cannot write {}", to.display()))
}

fn build(session: &Session, copy: &Path) -> Result<PathBuf> {
    let target = session.target_dir().join("mutants/target");
    let status = session
        .cargo("build")
        .args(["--quiet", "--profile", "sim", "--package", "hikkoshi-sim"])
        .arg("--target-dir")
        .arg(&target)
        .current_dir(copy)
        // A mutation may leave something unused.
        .env("RUSTFLAGS", "-A warnings")
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo build in {} ended with {status}", copy.display());
    }
    Ok(target.join("sim/hikkoshi-sim"))
}

/// Applies, builds, runs, and takes back.
fn try_one(
    session: &Session,
    copy: &Path,
    mutation: &Mutation,
) -> Result<Result<(f64, u64), String>> {
    let original = fs::read_to_string(session.root.join(mutation.file))
        .with_context(|| format!("cannot read {}", mutation.file))?;
    let place = copy.join(mutation.file);
    fs::write(&place, mutate(mutation, &original)?)
        .with_context(|| format!("cannot write {}", place.display()))?;
    let fate = match build(session, copy) {
        Ok(binary) => hunt(session, &binary),
        Err(error) => Ok(Err(format!("it does not compile: {error}"))),
    };
    fs::write(&place, original).with_context(|| format!("cannot restore {}", place.display()))?;
    fate
}

/// The file with the mutation in it.
fn mutate(mutation: &Mutation, original: &str) -> Result<String> {
    let mut text = original.to_owned();
    for (piece, instead) in mutation.edits {
        let count = text.matches(piece).count();
        if count != 1 {
            bail!(
                "the mutation {:?} has rotted: its text is in {} {count} times instead of once; \
                 bring xtask/src/mutants/table.rs up to date:\n{piece}",
                mutation.name,
                mutation.file
            );
        }
        text = text.replace(piece, instead);
    }
    Ok(text)
}

/// Runs the simulator until it fails or time is up.
fn hunt(session: &Session, binary: &Path) -> Result<Result<(f64, u64), String>> {
    let started = Instant::now();
    let output = session
        .command(&binary.to_string_lossy())
        .args(["--seconds", &LIMIT_S.to_string(), "--no-shortest"])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", binary.display()))?;
    let seconds = started.elapsed().as_secs_f64();
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(line) = text.lines().find(|line| line.contains("FAILED")) {
        println!("    {}", line.chars().take(150).collect::<String>());
    }
    let worlds = text
        .lines()
        .find_map(|line| line.split_once(" worlds in ")?.0.parse().ok());
    Ok(match (output.status.code(), worlds) {
        (Some(1), Some(worlds)) => Ok((seconds, worlds)),
        (Some(0), Some(worlds)) => Err(format!(
            "{worlds} worlds in {seconds:.0} s kept all promises"
        )),
        _ => Err(format!("the simulator ended with {}", output.status)),
    })
}

fn print(fates: &[Fate]) -> bool {
    println!("\n| mutation | caught after | worlds |\n|---|---|---|");
    for fate in fates {
        match &fate.caught {
            Ok((seconds, worlds)) => println!("| {} | {seconds:.1} s | {worlds} |", fate.name),
            Err(why) => println!("| {} | NOT CAUGHT | {why} |", fate.name),
        }
    }
    let missed = fates.iter().filter(|fate| fate.caught.is_err()).count();
    println!("\n{} caught, {missed} not caught", fates.len() - missed);
    missed == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mutation that has rotted is noticed with the next edit, not with the next whole run.
    #[test]
    fn every_mutation_can_be_applied() {
        let session = Session::new(false).expect("the tests run inside the workspace");
        for mutation in MUTATIONS {
            let original = fs::read_to_string(session.root.join(mutation.file))
                .expect("the file of a mutation");
            let mutated = mutate(mutation, &original).expect("it has not rotted");
            assert_ne!(mutated, original, "{} changes nothing", mutation.name);
        }
    }
}
