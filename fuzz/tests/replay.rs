//! Every input that is kept, through its target: the corpus, and whatever once was a finding
//! (`regressions/`, each with a named test of its own beside the code that was mended).

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

fn inputs(kind: &str, target: &str) -> Vec<PathBuf> {
    files(
        &Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(kind)
            .join(target),
    )
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Memory is counted for the whole process, so only one target runs at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn replay(target: &str) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, run) = hikkoshi_fuzz::TARGETS
        .iter()
        .find(|(name, _)| *name == target)
        .unwrap();
    let corpus = inputs("corpus", target);
    assert!(!corpus.is_empty(), "there is no corpus for {target}");
    // Where coverage is measured: what this machine has found.
    let found = std::env::var_os("HIKKOSHI_FUZZ_FOUND")
        .map(|dir| files(&Path::new(&dir).join(target)))
        .unwrap_or_default();
    let kept = corpus.into_iter().chain(inputs("regressions", target));
    for path in kept.chain(found) {
        let content = std::fs::read(&path).unwrap();
        // Shown only if the test fails, and then the last line names the input.
        println!("{}", path.display());
        run(&content);
    }
}

#[test]
fn config() {
    replay("config");
}

#[test]
fn control() {
    replay("control");
}

#[test]
fn frames() {
    replay("frames");
}

#[test]
fn nbd_client() {
    replay("nbd_client");
}

#[test]
fn transport() {
    replay("transport");
}

#[test]
fn nbd_server() {
    replay("nbd_server");
}

#[test]
fn state() {
    replay("state");
}

#[test]
fn the_seeds_are_those_that_the_program_makes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, name, content) in hikkoshi_fuzz::seeds::all() {
        let file = std::fs::read(corpus.join(target).join(&name)).unwrap_or_default();
        assert!(
            file == content,
            "{target}/{name} differs; run `cargo run -p hikkoshi-fuzz --example seeds`"
        );
    }
}
