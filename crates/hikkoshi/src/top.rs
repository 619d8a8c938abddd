//! `hikkoshi top`: all disks of this machine at a glance, a line each, for whoever empties a host.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hikkoshi_daemon::status::{BackgroundState, ExportStatus, LifeState};

use crate::choose::{self, Found};
use crate::cli;
use crate::failure::Failure;
use crate::quantity::{show_rate, show_seconds, show_size};
use crate::status::{CLEAR, WATCH_INTERVAL, life, permille};

/// Lines around those of the disks: what it is all together, the head of the table, how many are not
/// shown, and where the cursor stands.
const LINES_AROUND: usize = 5;

/// A terminal that does not tell its size.
const USUAL_LINES: usize = 24;

/// The width of a bar.
const BAR_CELLS: u64 = 10;

/// Shows the disks again every second until interrupted; once where nobody looks.
///
/// # Errors
/// No daemon answers.
pub fn run(args: &cli::Top) -> Result<(), Failure> {
    let is_watched = std::io::stdout().is_terminal();
    let mut seen = Seen::default();
    loop {
        let found = choose::all(args.control.control.as_deref())?;
        let rate = seen.rate(&found, Instant::now());
        let most = is_watched.then(|| terminal_lines().saturating_sub(LINES_AROUND).max(1));
        let screen = if is_watched { CLEAR } else { "" };
        let text = format!("{screen}{}", draw(found, rate, most));
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()?;
        drop(out);
        if !is_watched {
            return Ok(());
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn terminal_lines() -> usize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout());
    let told = size.ok().map(|size| usize::from(size.ws_row));
    told.filter(|rows| *rows > 0).unwrap_or(USUAL_LINES)
}

/// What had crossed the link when it was last looked at.
#[derive(Default)]
struct Seen {
    at: Option<Instant>,
    wire_bytes: HashMap<(PathBuf, String), u64>,
}

impl Seen {
    /// Bytes a second over the link, of all disks together, since the last look. `None` at the first.
    fn rate(&mut self, found: &[Found], now: Instant) -> Option<u64> {
        let mut fresh = 0_u64;
        let mut next = HashMap::new();
        for one in found {
            let key = (one.daemon.path().to_owned(), one.status.export.clone());
            let bytes = one.status.wire_bytes;
            // A daemon that was restarted, or has just come, begins anew.
            let before = self.wire_bytes.get(&key).copied().unwrap_or(bytes);
            fresh = fresh.saturating_add(bytes.saturating_sub(before));
            next.insert(key, bytes);
        }
        self.wire_bytes = next;
        let took = now.duration_since(self.at.replace(now)?);
        Some(per_second(fresh, took))
    }
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    let rate = u128::from(bytes) * 1000 / took.as_millis().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// At most so many disks, those first that are on their way or need somebody.
fn draw(mut found: Vec<Found>, rate: Option<u64>, most: Option<usize>) -> String {
    found.sort_by_cached_key(|one| {
        let status = &one.status;
        (Reverse(urgency(status)), status.export.clone())
    });
    let moving = found.iter().filter(|one| is_moving(&one.status)).count();
    let left: u64 = found.iter().map(|one| one.status.absent_bytes).sum();
    let mut head = format!("{}, {moving} on their way", disks(found.len()));
    if left > 0 {
        head.push_str(&format!(", {} to come", show_size(left)));
    }
    if let Some(rate) = rate {
        head.push_str(&format!(", {} over the link", show_rate(rate)));
    }
    let shown = most.unwrap_or(found.len()).min(found.len());
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    rows.extend(found[..shown].iter().map(|one| row(&one.status)));
    let mut text = format!("{head}\n\n{}", table(&rows));
    if shown < found.len() {
        text.push_str(&format!("and {} more\n", found.len() - shown));
    }
    text
}

fn disks(count: usize) -> String {
    match count {
        1 => "1 disk".to_owned(),
        _ => format!("{count} disks"),
    }
}

fn is_moving(status: &ExportStatus) -> bool {
    matches!(
        status.state,
        LifeState::Standby | LifeState::Arriving | LifeState::Departing | LifeState::Opening
    )
}

/// What is looked for first.
fn urgency(status: &ExportStatus) -> u8 {
    match status.state {
        _ if trouble(status).is_some() => 3,
        LifeState::Arriving => 2,
        LifeState::Standby | LifeState::Departing | LifeState::Opening => 1,
        _ => 0,
    }
}

/// What somebody should look after, in a word or two; `hikkoshi status` says more.
fn trouble(status: &ExportStatus) -> Option<String> {
    if status.poisoned {
        return Some("POISONED".to_owned());
    }
    if status.disk_full {
        return Some("DISK FULL".to_owned());
    }
    if let Some(waiting) = &status.waiting {
        let waited = show_seconds(waiting.waited_s);
        return Some(format!("WAITS FOR SOURCE {waited}"));
    }
    let away = status.source_connected == Some(false);
    away.then(|| match status.source_down_s {
        Some(seconds) => format!("SOURCE AWAY {}", show_seconds(seconds)),
        None => "SOURCE AWAY".to_owned(),
    })
}

const COLUMNS: [&str; 9] = [
    "DISK",
    "STATE",
    "SIZE",
    "HERE",
    "",
    "TO COME",
    "COPY",
    "TIME LEFT",
    "WAITING",
];

/// Columns whose ends are in line.
const TO_THE_RIGHT: [bool; 9] = [false, false, true, false, true, true, true, true, true];

fn row(status: &ExportStatus) -> [String; 9] {
    let name = match status.export.as_str() {
        "" => status.image.clone(),
        name => name.to_owned(),
    };
    let state = match trouble(status) {
        Some(trouble) => format!("{}, {trouble}", life(status.state)),
        None => life(status.state).to_owned(),
    };
    let size = show_size(status.size_bytes);
    // Nothing is to come to a disk that comes from nowhere, and nothing is known of one that is not
    // served yet.
    if status.source.is_none() || status.state == LifeState::Opening {
        let [a, b, c, d, e, f] = Default::default();
        return [name, state, size, a, b, c, d, e, f];
    }
    let here = permille(status);
    let copy = match status.background {
        BackgroundState::Idle => "idle".to_owned(),
        BackgroundState::Running => show_rate(status.rate_bytes_per_s),
        BackgroundState::Paused => "paused".to_owned(),
        BackgroundState::Off => "off".to_owned(),
    };
    [
        name,
        state,
        size,
        bar(here),
        format!("{}.{}%", here / 10, here % 10),
        show_size(status.absent_bytes),
        copy,
        status.eta_s.map(show_seconds).unwrap_or_default(),
        status.reads_waiting.to_string(),
    ]
}

fn bar(permille: u64) -> String {
    let full = permille * BAR_CELLS / 1000;
    let cells = (0..BAR_CELLS).map(|cell| if cell < full { '█' } else { '░' });
    cells.collect()
}

/// Columns as wide as what is in them.
fn table(rows: &[[String; 9]]) -> String {
    let width = |text: &String| text.chars().count();
    let mut widths = [0; 9];
    for row in rows {
        for (widest, cell) in widths.iter_mut().zip(row) {
            *widest = width(cell).max(*widest);
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for ((cell, widest), to_the_right) in row.iter().zip(widths).zip(TO_THE_RIGHT) {
            let pad = " ".repeat(widest - width(cell));
            match to_the_right {
                true => line.extend([&pad, cell.as_str(), "  "]),
                false => line.extend([cell.as_str(), &pad, "  "]),
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choose::tests::status;
    use hikkoshi_daemon::control::client::ControlClient;

    fn found(name: &str, state: LifeState) -> Found {
        Found {
            daemon: ControlClient::new("/run/c.sock"),
            status: status(name, state),
        }
    }

    #[test]
    fn a_line_a_disk_and_what_needs_somebody_first() {
        let mut plain = found("old", LifeState::Local);
        plain.status.source = None;
        plain.status.absent_bytes = 0;
        let mut away = found("mail", LifeState::Standby);
        away.status.source_connected = Some(false);
        away.status.source_down_s = Some(12);
        away.status.background = BackgroundState::Paused;
        away.status.eta_s = None;
        away.status.reads_waiting = 3;
        let all = vec![plain, found("web", LifeState::Arriving), away];
        assert_eq!(
            draw(all.clone(), Some(41_200_000), None),
            "3 disks, 2 on their way, 30.0 GiB to come, 41.2 MB/s over the link\n\
             \n\
             DISK  STATE                          SIZE  HERE                TO COME       COPY   TIME LEFT  WAITING\n\
             mail  standby, SOURCE AWAY 12 s  20.0 GiB  ██░░░░░░░░  25.0%  15.0 GiB     paused                    3\n\
             web   arriving                   20.0 GiB  ██░░░░░░░░  25.0%  15.0 GiB  41.0 MB/s  3 min 20 s        0\n\
             old   local                      20.0 GiB\n"
        );
        let one = draw(all, None, Some(1));
        assert!(one.ends_with("\nand 2 more\n"), "{one}");
        assert!(one.contains("mail") && !one.contains("web"), "{one}");
    }

    #[test]
    fn the_rate_is_of_what_has_come_since() {
        let now = Instant::now();
        let mut seen = Seen::default();
        let mut disks = vec![
            found("a", LifeState::Arriving),
            found("b", LifeState::Arriving),
        ];
        assert_eq!(seen.rate(&disks, now), None);
        disks[0].status.wire_bytes += 3000;
        // Restarted.
        disks[1].status.wire_bytes = 7;
        disks.push(found("c", LifeState::Arriving));
        let later = now + Duration::from_millis(1500);
        assert_eq!(seen.rate(&disks, later), Some(2000));
    }
}
