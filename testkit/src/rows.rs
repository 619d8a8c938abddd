//! Plays the rows of a table of faults, several at a time.

use anyhow::Result;
use std::path::Path;

/// Plays each row in a directory of its own, on so many threads, and prints what came of it. `play` is
/// told the row's seed, which is its number in the table, from 1 on.
///
/// # Panics
/// Rows failed; the text has all of them.
pub fn play_rows<R: Sync>(
    rows: &[R],
    threads: usize,
    name: impl Fn(&R) -> String + Sync,
    play: impl Fn(&Path, &R, u64) -> Result<String> + Sync,
) {
    let play_some = |first: usize| {
        let mut failed = Vec::new();
        for (seed, row) in (1..).zip(rows).skip(first).step_by(threads) {
            let dir = tempfile::tempdir().expect("a directory for a row");
            let name = name(row);
            match play(dir.path(), row, seed) {
                Ok(said) => println!("{name} | {said}"),
                Err(error) => {
                    println!("{name} | FAILED: {error:#}");
                    failed.push(format!("{name} | {error:#}"));
                }
            }
        }
        failed
    };
    let failed: Vec<String> = std::thread::scope(|scope| {
        let play_some = &play_some;
        let plays: Vec<_> = (0..threads)
            .map(|first| scope.spawn(move || play_some(first)))
            .collect();
        let ended = plays.into_iter().map(|play| play.join());
        ended
            .flat_map(|failed| failed.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    assert!(
        failed.is_empty(),
        "{} rows failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}
