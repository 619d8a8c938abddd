//! `pause`, `resume`, `limit`, `handoff`, `abort` and `release`: commands to an export of a running daemon.

use std::time::Duration;

use hikkoshi_daemon::control::client::Command;
use hikkoshi_daemon::events::EventKind;

use crate::choose::{self, Found};
use crate::cli::{Limit, Release, Target};
use crate::failure::Failure;
use crate::quantity;

/// Commands the export that `target` means.
///
/// # Errors
/// It is not clear which export, the daemon does not answer, or it refuses.
pub fn run(target: &Target, command: Command) -> Result<(), Failure> {
    let found = choose::all(target.control.control.as_deref())?;
    let found = choose::pick(found, target.export.as_deref())?;
    found.daemon.command(&found.status.export, command)?;
    Ok(())
}

/// `limit [EXPORT] RATE`, `limit --all RATE`.
///
/// # Errors
/// As [`run`], or the rate is none.
pub fn limit(args: Limit) -> Result<(), Failure> {
    if args.all {
        let [rate] = args.words.as_slice() else {
            return Err(Failure::Usage(
                "limit --all RATE|none: the cap is on all exports together".into(),
            ));
        };
        let rate = quantity::parse_rate(rate).map_err(Failure::Usage)?;
        let daemon = choose::daemon(args.control.control.as_deref())?;
        daemon.limit_all(rate)?;
        return Ok(());
    }
    let (export, rate) = match args.words.as_slice() {
        [rate] => (None, rate),
        [export, rate] => (Some(export.clone()), rate),
        _ => return Err(Failure::Usage("limit [EXPORT] RATE|none".into())),
    };
    let rate = quantity::parse_rate(rate).map_err(Failure::Usage)?;
    let target = Target {
        export,
        control: args.control,
    };
    run(&target, Command::Limit(rate))
}

/// How often it is looked at whether a fence may be lifted.
const RELEASE_BEAT: Duration = Duration::from_millis(500);

/// `release [EXPORT] [--force]`. Waits until no answer to a handoff counts any more, and says what a person
/// has to see to.
///
/// # Errors
/// As [`run`], or the new site was heard of meanwhile.
pub fn release(args: Release) -> Result<(), Failure> {
    let found = choose::all(args.control.control.as_deref())?;
    let Found { daemon, status } = choose::pick(found, args.export.as_deref())?;
    let name = status.export.clone();
    let mut now = status;
    let mut told = false;
    while args.force
        && let Some(seconds) = now.release_in_s
    {
        if !told {
            eprintln!(
                "hikkoshi: the handoff was answered a moment ago (or the daemon was restarted), and the new \
                 site may still take that answer: waiting for {seconds} s"
            );
            told = true;
        }
        std::thread::sleep(RELEASE_BEAT);
        now = daemon.export(&name)?;
        if now.taken_over == Some(true) {
            return Err(Failure::failed(
                "the fence stays: the new site has just said that it took the disk over, so it is not gone; \
                 if it is to be ended all the same, say it again",
            ));
        }
    }
    daemon.command(&name, Command::Release { force: args.force })?;
    let events = daemon.events(&name, 0)?;
    let lifted = events.iter().rfind(|e| e.kind == EventKind::FenceLifted);
    if let Some(event) = lifted.filter(|_| args.force) {
        eprintln!("hikkoshi: {}", event.text);
    }
    Ok(())
}
