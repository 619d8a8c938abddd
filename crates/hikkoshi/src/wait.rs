//! `hikkoshi wait`: until a disk has come as far as asked.

use std::io::Write as _;
use std::time::{Duration, Instant};

use hikkoshi_daemon::status::{BackgroundState, ExportStatus, LifeState};
use indicatif::{ProgressBar, ProgressStyle};

use crate::choose::Found;
use crate::cli::{self, Goal};
use crate::failure::Failure;
use crate::{choose, status};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(200);

/// Waits. The progress bar goes to standard error, and only to a terminal.
///
/// # Errors
/// The time is over, or the daemon is gone.
pub fn run(args: &cli::Wait) -> Result<(), Failure> {
    let deadline = args.timeout.map(|timeout| Instant::now() + timeout);
    let found = choose::all(args.control.control.as_deref())?;
    if let Some(done) = all_reached(args, &found) {
        // On a machine with several disks that are here there is nothing to choose from.
        for status in done {
            print_json(args, status)?;
        }
        return Ok(());
    }
    let found = choose::pick(found, args.export.as_deref())?;
    let name = found.status.export.clone();
    let mut now = found.status;
    let bar = progress_bar(&now);
    let mut warned = false;
    while !reached(args.goal, &now) {
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            bar.abandon();
            return Err(Failure::failed(format!(
                "export {name:?} is not {} after the timeout: it is {}, {} bytes are still \
                 missing{}",
                goal_word(args.goal),
                status::life(now.state),
                now.absent_bytes,
                notes(&now),
            )));
        }
        if !warned && let Some(obstacle) = obstacle(args.goal, &now) {
            bar.suspend(|| eprintln!("hikkoshi: {obstacle}"));
            warned = true;
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        std::thread::sleep(left.unwrap_or(INTERVAL).min(INTERVAL));
        now = found.daemon.export(&name)?;
        bar.set_position(now.resident_bytes);
        bar.set_message(status::life(now.state));
    }
    bar.finish_and_clear();
    print_json(args, &now)
}

/// The exports that may be meant, if all of them have come as far as asked.
fn all_reached<'a>(args: &cli::Wait, found: &'a [Found]) -> Option<Vec<&'a ExportStatus>> {
    let name = args.export.as_deref();
    let meant: Vec<_> = found
        .iter()
        .map(|one| &one.status)
        .filter(|status| name.is_none_or(|name| status.export == name))
        .collect();
    let all = !meant.is_empty() && meant.iter().all(|status| reached(args.goal, status));
    all.then_some(meant)
}

fn print_json(args: &cli::Wait, now: &ExportStatus) -> Result<(), Failure> {
    if args.json {
        std::io::stdout().write_all(status::json(now)?.as_bytes())?;
    }
    Ok(())
}

/// Whether the goal is reached. An arriving disk counts as resident only once it is local: until
/// then what came last may not be durable, and the source must not be switched off.
fn reached(goal: Goal, now: &ExportStatus) -> bool {
    if now.state == LifeState::Opening {
        return false;
    }
    match goal {
        Goal::Local => now.state == LifeState::Local,
        Goal::Arriving => !matches!(now.state, LifeState::Standby | LifeState::GivenUp),
        Goal::Prepared => now.state != LifeState::Standby || now.prepared == Some(true),
        Goal::Resident => match now.state {
            LifeState::Local | LifeState::Departing => true,
            LifeState::Standby | LifeState::Departed => now.absent_bytes == 0,
            LifeState::Arriving | LifeState::GivenUp | LifeState::Opening => false,
        },
    }
}

/// Why the goal may not be reached by waiting alone.
fn obstacle(goal: Goal, now: &ExportStatus) -> Option<&'static str> {
    match (now.state, now.background) {
        (LifeState::Opening | LifeState::Standby, _) if now.waiting.is_some() => Some(
            "the disk waits for its source before it can begin; `hikkoshi status` says why",
        ),
        (LifeState::Standby, _) if goal == Goal::Prepared => now.prepared.is_none().then_some(
            "nothing is copied before the handoff: the source is not hikkoshi, or --prepare none, or \
             --seed-image",
        ),
        (LifeState::GivenUp, _) => Some("the move here was given up; it will not come further"),
        (LifeState::Standby, _) if goal != Goal::Arriving => {
            Some("the disk is on standby: it begins to move with the handoff (`hikkoshi handoff`)")
        }
        // Nothing is missing, and it is still not local, for a reason.
        (LifeState::Arriving, _) if now.absent_bytes == 0 && !now.notes.is_empty() => {
            Some("everything is here, but the source is still kept; `hikkoshi status` says why")
        }
        (LifeState::Arriving, BackgroundState::Paused) => {
            Some("the background copy is paused; `hikkoshi resume` lets it go on")
        }
        (LifeState::Arriving, BackgroundState::Off) => {
            Some("there is no background copy; what nobody reads will not come")
        }
        _ => None,
    }
}

fn goal_word(goal: Goal) -> &'static str {
    match goal {
        Goal::Resident => "resident",
        Goal::Arriving => "arriving",
        Goal::Local => "local",
        Goal::Prepared => "prepared",
    }
}

fn notes(now: &ExportStatus) -> String {
    now.notes.iter().map(|note| format!("; {note}")).collect()
}

/// Hidden by indicatif itself when standard error is no terminal.
fn progress_bar(now: &ExportStatus) -> ProgressBar {
    let template =
        "{msg:>9} [{bar:32}] {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is a good one");
    let bar = ProgressBar::new(now.size_bytes).with_style(style.progress_chars("=> "));
    bar.set_message(status::life(now.state));
    bar.set_position(now.resident_bytes);
    bar.reset_eta();
    bar
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choose::tests::status;

    #[test]
    fn an_arriving_disk_is_resident_only_when_it_is_local() {
        let mut now = status("", LifeState::Arriving);
        now.absent_bytes = 0;
        assert!(!reached(Goal::Resident, &now));
        assert!(reached(Goal::Arriving, &now));
        now.state = LifeState::Local;
        for goal in [Goal::Resident, Goal::Arriving, Goal::Local] {
            assert!(reached(goal, &now));
        }
        now.state = LifeState::Standby;
        assert!(reached(Goal::Resident, &now));
        assert!(!reached(Goal::Arriving, &now) && !reached(Goal::Local, &now));
        now.absent_bytes = 4096;
        assert!(!reached(Goal::Resident, &now));
    }

    #[test]
    fn a_disk_that_is_not_served_yet_has_reached_nothing() {
        let mut now = status("", LifeState::Opening);
        now.absent_bytes = 0;
        for goal in [Goal::Resident, Goal::Arriving, Goal::Local, Goal::Prepared] {
            assert!(!reached(goal, &now));
        }
    }
}
