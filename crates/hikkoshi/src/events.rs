//! `hikkoshi events`: what has happened to an export.

use std::io::Write as _;
use std::time::Duration;

use hikkoshi_daemon::events::Event;

use crate::choose;
use crate::cli;
use crate::failure::Failure;

/// How often `--follow` looks again.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

/// Shows the events that are kept, and with `--follow` those that come.
///
/// # Errors
/// No daemon answers, or it is not clear which export.
pub fn run(args: &cli::Events) -> Result<(), Failure> {
    let found = choose::all(args.control.control.as_deref())?;
    let found = choose::pick(found, args.export.as_deref())?;
    let mut since = 0;
    loop {
        let events = found.daemon.events(&found.status.export, since)?;
        let mut out = std::io::stdout().lock();
        for event in &events {
            since = since.max(event.number);
            let line = if args.json {
                serde_json::to_string(event)?
            } else {
                describe(event)
            };
            writeln!(out, "{line}")?;
        }
        out.flush()?;
        drop(out);
        if !args.follow {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_INTERVAL);
    }
}

fn describe(event: &Event) -> String {
    format!(
        "{}  {:<14}  {}",
        utc(event.unix_ms),
        event.kind.name(),
        event.text
    )
}

/// A time as in RFC 3339, to the second. Howard Hinnant's algorithm from days to a date, for times
/// after 1970.
fn utc(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March, so that the leap day is a year's last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let of_era_year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * of_era_year + of_era_year / 4 - of_era_year / 100);
    let march_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = of_era_year + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60
    )
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399_000, "2000-02-28T23:59:59Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (951_868_800_000, "2000-03-01T00:00:00Z"),
            (1_767_225_599_999, "2025-12-31T23:59:59Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }
}
