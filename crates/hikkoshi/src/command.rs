//! `pause`, `resume`, `limit`, `handoff`, `abort` and `release`: commands to an export of a running daemon.

use hikkoshi_daemon::control::client::Command;

use crate::choose;
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

/// `release [EXPORT] [--force]`.
///
/// # Errors
/// As [`run`].
pub fn release(args: Release) -> Result<(), Failure> {
    let target = Target {
        export: args.export,
        control: args.control,
    };
    run(&target, Command::Release { force: args.force })
}
