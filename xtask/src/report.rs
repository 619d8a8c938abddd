//! What the steps did: their times, their tests' own closing lines, and the sum of it all.

use std::time::Duration;

use crate::room;

/// How many tests passed, failed and were left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that were not run.
    pub skipped: u64,
}

impl Counts {
    /// Reads a closing line such as cargo prints:
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; …`. `None` for any other line.
    pub fn from_closing_line(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("test result: ")?;
        let (_, numbers) = rest.split_once(". ")?;
        let mut counts = Self::default();
        for part in numbers.split(';') {
            let mut words = part.split_whitespace();
            let (Some(number), Some(what)) = (words.next(), words.next()) else {
                continue;
            };
            let Ok(number) = number.parse() else { continue };
            match what {
                "passed" => counts.passed = number,
                "failed" => counts.failed = number,
                "ignored" => counts.skipped = number,
                _ => {}
            }
        }
        Some(counts)
    }

    /// Adds the tests of another run.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// How one step went.
#[derive(Debug)]
pub struct Outcome {
    /// The step's name.
    pub step: &'static str,
    /// Wall clock time.
    pub elapsed: Duration,
    /// Why it failed; `None` when it did not.
    pub failure: Option<String>,
    /// Its tests; `None` for a step that has none and so counts as one check.
    pub counts: Option<Counts>,
    /// The closing lines of its tests, as they printed them.
    pub closing_lines: Vec<String>,
    /// The least room that its disks had meanwhile, in bytes; `None` when nobody looked.
    pub least_room: Option<u64>,
    /// It is of a second run: in the first one the disk was full.
    pub again: bool,
}

impl Outcome {
    /// Whether it failed while the disk was full, which says nothing of the project.
    pub fn had_no_room(&self) -> bool {
        self.failure.is_some() && self.least_room.is_some_and(|room| room < room::TOO_LITTLE)
    }

    /// This counts and not `first`, which failed on a full disk; the time and the room are of both.
    pub fn in_place_of(self, first: Self) -> Self {
        Self {
            elapsed: first.elapsed + self.elapsed,
            least_room: first.least_room.min(self.least_room),
            again: true,
            ..self
        }
    }

    /// What is said of it in the summary.
    fn verdict(&self) -> String {
        let verdict = match &self.failure {
            None => "ok".to_owned(),
            Some(why) => format!("FAILED: {why}"),
        };
        match (self.again, self.had_no_room()) {
            (true, _) => verdict + " (the second time: the disk was full)",
            (false, true) => verdict + " (the disk was full meanwhile)",
            (false, false) => verdict,
        }
    }

    /// What the step adds to the sum: its tests, and one failure more when it failed although
    /// every test in it passed (it did not compile, was killed, skipped what it may not).
    fn contribution(&self) -> Counts {
        let mut counts = self.counts.unwrap_or(Counts {
            passed: 1,
            ..Counts::default()
        });
        if self.failure.is_some() && counts.failed == 0 {
            counts.failed = 1;
            if self.counts.is_none() {
                counts.passed = 0;
            }
        }
        counts
    }
}

/// Prints the summary. True when nothing failed.
pub fn print(outcomes: &[Outcome]) -> bool {
    let mut total = Counts::default();
    let mut elapsed = Duration::ZERO;
    println!("\nclosing lines of the tests:");
    for outcome in outcomes {
        for line in &outcome.closing_lines {
            println!("  {:<8} {line}", outcome.step);
        }
    }
    println!("\nsteps:");
    for outcome in outcomes {
        total.add(outcome.contribution());
        elapsed += outcome.elapsed;
        println!(
            "  {:<8} {:>7.1} s  {}",
            outcome.step,
            outcome.elapsed.as_secs_f64(),
            outcome.verdict()
        );
    }
    println!("  {:<8} {:>7.1} s", "total", elapsed.as_secs_f64());
    if let Some(least) = outcomes
        .iter()
        .filter_map(|outcome| outcome.least_room)
        .min()
    {
        println!("\nthe disk had room for {} MB at least", least / 1_000_000);
    }
    if total.skipped > 0 {
        println!("\n{} skipped", total.skipped);
    }
    println!("\n{} passed, {} failed", total.passed, total.failed);
    total.failed == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_closing_line_of_a_test_binary() {
        let line = "test result: FAILED. 12 passed; 2 failed; 3 ignored; 0 measured; 1 filtered \
                    out; finished in 0.31s";
        assert_eq!(
            Counts::from_closing_line(line),
            Some(Counts {
                passed: 12,
                failed: 2,
                skipped: 3
            })
        );
        assert_eq!(Counts::from_closing_line("running 12 tests"), None);
    }

    fn outcome(failure: Option<&str>, counts: Option<Counts>) -> Outcome {
        Outcome {
            step: "x",
            elapsed: Duration::ZERO,
            failure: failure.map(str::to_owned),
            counts,
            closing_lines: Vec::new(),
            least_room: None,
            again: false,
        }
    }

    #[test]
    fn what_failed_on_a_full_disk_is_told_from_what_failed() {
        let with = |failure, least_room| Outcome {
            least_room,
            ..outcome(failure, None)
        };
        assert!(with(Some("exit status 101"), Some(0)).had_no_room());
        assert!(!with(Some("exit status 101"), Some(room::TOO_LITTLE)).had_no_room());
        assert!(!with(Some("exit status 101"), None).had_no_room());
        assert!(!with(None, Some(0)).had_no_room());
        // And does not go without a word when it went well the second time.
        let first = with(Some("exit status 101"), Some(0));
        let again = with(None, Some(1 << 40)).in_place_of(first);
        assert_eq!(again.least_room, Some(0));
        assert_eq!(again.contribution().failed, 0);
        assert_eq!(again.verdict(), "ok (the second time: the disk was full)");
    }

    #[test]
    fn a_step_without_tests_counts_as_one_check() {
        assert_eq!(outcome(None, None).contribution().passed, 1);
        let failed = outcome(Some("exit status 1"), None).contribution();
        assert_eq!((failed.passed, failed.failed), (0, 1));
    }

    #[test]
    fn a_step_that_fails_beside_its_tests_is_not_lost() {
        let counts = Counts {
            passed: 9,
            failed: 0,
            skipped: 0,
        };
        let failed = outcome(Some("did not compile"), Some(counts)).contribution();
        assert_eq!((failed.passed, failed.failed), (9, 1));
        let counts = Counts {
            passed: 9,
            failed: 2,
            skipped: 0,
        };
        assert_eq!(
            outcome(Some("exit status 101"), Some(counts))
                .contribution()
                .failed,
            2
        );
    }
}
