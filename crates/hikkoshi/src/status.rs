//! `hikkoshi status`: how exports stand, for people and as JSON.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::time::Duration;

use hikkoshi_daemon::status::{BackgroundState, Counters, ExportStatus, LifeState};

use crate::choose::{self, Found};
use crate::cli;
use crate::failure::Failure;
use crate::quantity::{show_rate, show_seconds, show_size};

/// How often whoever watches looks again.
pub(crate) const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Clears a terminal and goes to its top left.
pub(crate) const CLEAR: &str = "\x1b[H\x1b[2J";

/// Shows the exports, once or again and again.
///
/// # Errors
/// No daemon answers, or none has the export.
pub fn run(args: &cli::Status) -> Result<(), Failure> {
    let clear = !args.json && std::io::stdout().is_terminal();
    loop {
        let found = select(args.control.control.as_deref(), args.export.as_deref())?;
        let mut text = String::new();
        if args.watch && clear {
            text.push_str(CLEAR);
        }
        for one in &found {
            if args.json {
                text.push_str(&json(&one.status)?);
            } else {
                text.push_str(&describe(one, args.control.control.is_none()));
            }
        }
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()?;
        drop(out);
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

/// All exports, or all that bear the name.
fn select(control: Option<&Path>, name: Option<&str>) -> Result<Vec<Found>, Failure> {
    let found = choose::all(control)?;
    let Some(name) = name else {
        return Ok(found);
    };
    let named: Vec<Found> = found
        .iter()
        .filter(|one| one.status.export == name)
        .cloned()
        .collect();
    match named.is_empty() {
        false => Ok(named),
        true => choose::pick(found, Some(name)).map(|one| vec![one]),
    }
}

/// A status as one line of JSON.
///
/// # Errors
/// Never: the status holds nothing that JSON cannot say.
pub fn json(status: &ExportStatus) -> Result<String, serde_json::Error> {
    serde_json::to_string(status).map(|line| line + "\n")
}

/// A state in a word.
pub fn life(state: LifeState) -> &'static str {
    match state {
        LifeState::Local => "local",
        LifeState::Standby => "standby",
        LifeState::Arriving => "arriving",
        LifeState::Departing => "departing",
        LifeState::Departed => "departed",
        LifeState::GivenUp => "given up",
        LifeState::Opening => "not served yet",
    }
}

/// Tenths of a percent that are here.
pub(crate) fn permille(status: &ExportStatus) -> u64 {
    if status.size_bytes == 0 {
        return 1000;
    }
    let part = u128::from(status.resident_bytes) * 1000 / u128::from(status.size_bytes);
    u64::try_from(part).unwrap_or(1000)
}

fn describe(one: &Found, with_daemon: bool) -> String {
    let status = &one.status;
    let mut lines = vec![format!(
        "{:?}  {}  {}  {}",
        status.export,
        life(status.state),
        show_size(status.size_bytes),
        status.image,
    )];
    if status.source.is_some() && status.state != LifeState::Opening {
        let here = permille(status);
        lines.push(format!(
            "  here     {} of {} ({}.{}%), {} of it written here",
            show_size(status.resident_bytes),
            show_size(status.size_bytes),
            here / 10,
            here % 10,
            show_size(status.owned_bytes),
        ));
        lines.push(format!("  copy     {}", copying(status)));
    }
    if let Some(source) = &status.source {
        let link = match status.source_connected {
            Some(true) => "connected",
            Some(false) => "NOT CONNECTED",
            None => "needed no more",
        };
        let counters = &status.counters;
        let saved = match counters.packed_bytes_saved {
            0 => String::new(),
            saved => format!(", {} saved by compression", show_size(saved)),
        };
        lines.push(format!(
            "  source   {source} {link}, {} came over the link{saved}",
            show_size(status.wire_bytes)
        ));
        lines.extend(coding(status).map(|text| format!("  data     {text}")));
        lines.extend(not_sent(status).map(|text| format!("  not sent {text}")));
    }
    let counters = &status.counters;
    lines.push(format!(
        "  clients  {}; {} reads local, {} waited for the source; {} writes, {} flushes",
        status.clients,
        counters.reads_local,
        counters.reads_remote,
        counters.writes,
        counters.flushes
    ));
    if with_daemon {
        lines.push(format!("  control  unix:{}", one.daemon.path().display()));
    }
    for note in &status.notes {
        lines.push(format!("  note     {note}"));
    }
    lines.join("\n") + "\n"
}

/// How data crosses the link, and how much smaller it is there.
fn coding(status: &ExportStatus) -> Option<String> {
    let Counters {
        data_bytes,
        data_wire_bytes,
        ..
    } = status.counters;
    let ratio = (data_bytes > 0).then(|| {
        let percent = u128::from(data_wire_bytes) * 100 / u128::from(data_bytes);
        let data = show_size(data_bytes);
        format!("{data} came in {percent}% of their size")
    });
    let codec = match status.codec.as_deref() {
        None => return ratio,
        Some("none") => "as it is".to_owned(),
        Some(codec) => format!("as {codec}"),
    };
    Some(match ratio {
        None => format!("comes {codec}"),
        Some(ratio) => format!("comes {codec}; {ratio}"),
    })
}

/// What did not have to be sent, and why.
fn not_sent(status: &ExportStatus) -> Option<String> {
    let counters = &status.counters;
    let holes = counters.hole_bytes_skipped;
    let reasons = [
        (holes, "of holes"),
        (
            counters.zero_bytes_skipped.saturating_sub(holes),
            "of zeroes",
        ),
        (counters.overwritten_bytes, "written here before"),
        (status.seeded_bytes, "from seed images"),
        (counters.cancelled_bytes, "taken back in time"),
    ];
    let reasons: Vec<String> = reasons
        .iter()
        .filter(|(bytes, _)| *bytes > 0)
        .map(|(bytes, why)| format!("{} {why}", show_size(*bytes)))
        .collect();
    (!reasons.is_empty()).then(|| reasons.join(", "))
}

fn copying(status: &ExportStatus) -> String {
    let mut text = match status.background {
        BackgroundState::Idle => "idle".to_owned(),
        BackgroundState::Running => format!("running, {}", show_rate(status.rate_bytes_per_s)),
        BackgroundState::Paused => "paused; `hikkoshi resume` lets it go on".to_owned(),
        BackgroundState::Off => "off; only what is read is fetched".to_owned(),
    };
    if let Some(eta_s) = status.eta_s {
        text.push_str(&format!(", about {} left", show_seconds(eta_s)));
    }
    if let Some(limit) = status.limit_bytes_per_s {
        text.push_str(&format!(", limited to {}", show_rate(limit)));
    }
    if let Some(limit) = status.common_limit_bytes_per_s {
        let limit = show_rate(limit);
        text.push_str(&format!(", all disks together to {limit}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choose::tests::status;
    use hikkoshi_daemon::control::client::ControlClient;

    #[test]
    fn people_see_what_matters() {
        let mut one = Found {
            daemon: ControlClient::new("/run/c.sock"),
            status: status("web", LifeState::Arriving),
        };
        one.status.notes.push("look here".into());
        assert_eq!(
            describe(&one, true),
            "\"web\"  arriving  20.0 GiB  disk.img\n\
             \x20 here     5.0 GiB of 20.0 GiB (25.0%), 1.0 GiB of it written here\n\
             \x20 copy     running, 41.0 MB/s, about 3 min 20 s left\n\
             \x20 source   nbd://old/ connected, 4.0 GiB came over the link\n\
             \x20 clients  1; 0 reads local, 0 waited for the source; 0 writes, 0 flushes\n\
             \x20 control  unix:/run/c.sock\n\
             \x20 note     look here\n"
        );
    }

    #[test]
    fn people_see_how_it_comes_and_what_need_not() {
        let mut one = status("web", LifeState::Arriving);
        one.codec = Some("zstd:3".into());
        one.seeded_bytes = 3 << 30;
        one.counters = Counters {
            data_bytes: 2 << 30,
            data_wire_bytes: 3 << 28,
            packed_bytes_saved: 5 << 28,
            zero_bytes_skipped: 6 << 30,
            hole_bytes_skipped: 5 << 30,
            overwritten_bytes: 7 << 30,
            cancelled_bytes: 1 << 20,
            ..one.counters
        };
        let expected = "2.0 GiB came in 37% of their size";
        assert_eq!(coding(&one), Some(format!("comes as zstd:3; {expected}")));
        assert_eq!(
            not_sent(&one).as_deref(),
            Some(
                "5.0 GiB of holes, 1.0 GiB of zeroes, 7.0 GiB written here before, 3.0 GiB from \
                 seed images, 1.0 MiB taken back in time"
            )
        );
        one.codec = Some("none".into());
        assert_eq!(coding(&one), Some(format!("comes as it is; {expected}")));
        // Over plain NBD.
        one.codec = None;
        assert_eq!(coding(&one).as_deref(), Some(expected));
    }

    #[test]
    fn scripts_see_the_documented_fields() {
        let line = json(&status("web", LifeState::Standby)).unwrap();
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line.matches('\n').count(), 1);
        for field in [
            "export",
            "size_bytes",
            "state",
            "resident_bytes",
            "owned_bytes",
            "absent_bytes",
            "wire_bytes",
            "source_connected",
            "background",
            "rate_bytes_per_s",
            "eta_s",
        ] {
            assert!(value.get(field).is_some(), "{field}");
        }
        // Whatever is printed is documented.
        let page = include_str!("../../../docs/control-api.md");
        for field in value.as_object().unwrap().keys() {
            assert!(page.contains(&format!("| `{field}` |")), "{field}");
        }
        for counter in value["counters"].as_object().unwrap().keys() {
            assert!(page.contains(&format!("`{counter}`")), "{counter}");
        }
        assert_eq!(value["state"], "standby");
        assert_eq!(value["background"], "running");
    }
}
