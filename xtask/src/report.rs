//! What the steps did: their times, their tests' own closing lines, and the sum of it all.

use std::time::Duration;

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
}

impl Outcome {
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
        let verdict = match &outcome.failure {
            None => "ok".to_owned(),
            Some(why) => format!("FAILED: {why}"),
        };
        println!(
            "  {:<8} {:>7.1} s  {verdict}",
            outcome.step,
            outcome.elapsed.as_secs_f64()
        );
    }
    println!("  {:<8} {:>7.1} s", "total", elapsed.as_secs_f64());
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
        }
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
