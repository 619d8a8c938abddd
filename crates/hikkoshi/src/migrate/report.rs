//! What is told while a move goes on: lines for people, with a bar on a terminal, or JSON lines.
//!
//! The terminal may go away in the middle of a move, so nothing here fails when nobody reads.

use std::io::Write as _;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::outcome::Outcome;
use super::sites::{News, Step};

/// Tells what goes on.
pub struct Report {
    json: bool,
    bar: Option<ProgressBar>,
    last: Option<(Step, u64, u64)>,
}

impl Report {
    /// For people, or for programs.
    pub fn new(json: bool) -> Self {
        Self {
            json,
            bar: None,
            last: None,
        }
    }

    /// Tells one piece of news.
    pub fn tell(&mut self, news: &News) {
        match news {
            News::Begins(step) => {
                self.end_bar();
                match self.json {
                    true => line(&json!({"event": "step", "step": step}).to_string()),
                    false => line(title(*step)),
                }
            }
            News::Note(text) => match (self.json, &self.bar) {
                (true, _) => line(&json!({"event": "note", "text": text}).to_string()),
                (false, Some(bar)) => bar.suspend(|| line(&format!("  {text}"))),
                (false, None) => line(&format!("  {text}")),
            },
            News::Progress {
                step,
                done_bytes,
                of_bytes,
            } => self.progress(*step, *done_bytes, *of_bytes),
        }
    }

    fn progress(&mut self, step: Step, done: u64, of: u64) {
        if self.json {
            // States are asked for several times a second; programs hear of changes only.
            if self.last.replace((step, done, of)) != Some((step, done, of)) {
                let news = json!({
                    "event": "progress", "step": step, "done_bytes": done, "of_bytes": of,
                });
                line(&news.to_string());
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(new_bar);
        bar.set_length(of);
        bar.set_position(done);
    }

    fn end_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Tells the outcome, as far as it goes to standard output: all of it as JSON, and for people
    /// if all is done (else it is an error, and goes to standard error).
    pub fn end(&mut self, outcome: &Outcome) {
        self.end_bar();
        if self.json {
            line(&outcome_json(outcome).to_string());
        } else if outcome.done {
            line(&outcome.text());
        }
    }
}

fn outcome_json(outcome: &Outcome) -> Value {
    json!({
        "event": "end",
        "done": outcome.done,
        "vm": outcome.vm,
        "disks": outcome.disks,
        "each": outcome.each,
        "reason": outcome.reason,
        "text": outcome.place(),
        "advice": outcome.advice,
    })
}

fn title(step: Step) -> &'static str {
    match step {
        Step::Prepare => "preparing the disks",
        Step::Migrate => "migrating the VM",
        Step::Handoff => "handing the disks off",
        Step::Arrive => "the VM runs at the new site; the rest of its disks comes",
        Step::RollBack => "taking everything back",
    }
}

/// That nobody reads is no reason to leave a VM half moved.
fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Hidden by indicatif itself when standard error is no terminal.
fn new_bar() -> ProgressBar {
    let template = "  [{bar:32}] {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is a good one");
    ProgressBar::new(0).with_style(style.progress_chars("=> "))
}
