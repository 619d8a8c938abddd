//! What the demo tells at its end.

use std::time::Duration;

use hikkoshi_daemon::status::ExportStatus;
use serde::Serialize;

use super::guest::{Answered, Kind};
use crate::quantity::show_size;

/// How a phase felt to the guest.
#[derive(Debug, Serialize)]
pub struct Felt {
    /// Requests in it.
    pub requests: usize,
    /// Reads in it.
    pub reads: usize,
    /// The middle of the reads' times, in microseconds.
    pub read_p50_us: u64,
    /// All but a hundredth of the reads were quicker, in microseconds.
    pub read_p99_us: u64,
    /// The longest write or flush, in microseconds.
    pub longest_write_us: u64,
    /// The longest request, in microseconds.
    pub longest_us: u64,
}

impl Felt {
    /// Of the requests asked from `start` on, before `end`.
    pub fn between(all: &[Answered], start: Duration, end: Duration) -> Self {
        let phase: Vec<_> = all
            .iter()
            .filter(|one| (start..end).contains(&one.asked))
            .copied()
            .collect();
        let mut reads: Vec<_> = phase
            .iter()
            .filter(|one| one.kind == Kind::Read)
            .map(|one| one.took)
            .collect();
        reads.sort();
        let rank = |hundredths: usize| {
            let at = (reads.len() * hundredths / 100).min(reads.len().saturating_sub(1));
            reads.get(at).copied().map_or(0, micros)
        };
        let longest = |wanted: fn(Kind) -> bool| {
            phase
                .iter()
                .filter(|one| wanted(one.kind))
                .map(|one| micros(one.took))
                .max()
        };
        Self {
            requests: phase.len(),
            reads: reads.len(),
            read_p50_us: rank(50),
            read_p99_us: rank(99),
            longest_write_us: longest(|kind| kind != Kind::Read).unwrap_or(0),
            longest_us: longest(|_| true).unwrap_or(0),
        }
    }
}

/// All that happened.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Bytes of files on it.
    pub content_bytes: u64,
    /// The file system on it.
    pub file_system: String,
    /// The link's round trip in milliseconds.
    pub rtt_ms: u128,
    /// The link's rate each way, in bytes per second.
    pub link_bytes_per_s: u64,
    /// From the start of the destination until the guest had answers there, in milliseconds.
    pub running_after_ms: u128,
    /// From the start of the destination until the source was needed no more, in milliseconds.
    pub source_free_after_ms: u128,
    /// Reads of the guest at the destination that were answered there.
    pub reads_local: u64,
    /// Reads of the guest at the destination that waited for the source.
    pub reads_remote: u64,
    /// Bytes from the source to the destination, as the link counted them.
    pub link_down_bytes: u64,
    /// Bytes from the destination to the source, as the link counted them.
    pub link_up_bytes: u64,
    /// Bytes from the source, as the destination counted them.
    pub wire_bytes: u64,
    /// How the disk felt at the source.
    pub before: Felt,
    /// How it felt while it moved.
    pub moving: Felt,
    /// How it felt with the source switched off.
    pub after: Felt,
    /// Bytes that were compared.
    pub compared_bytes: u64,
    /// The first offset where the disk is not what the guest wrote; `null` when all is right.
    pub first_difference: Option<u64>,
    /// Whether the file system is sound; `null` when there was no tool to tell.
    pub file_system_clean: Option<bool>,
}

impl Report {
    /// Whether all is right.
    pub fn is_good(&self) -> bool {
        self.first_difference.is_none() && self.file_system_clean != Some(false)
    }

    /// Takes over what the destination counted.
    pub fn set_counters(&mut self, status: &ExportStatus) {
        self.reads_local = status.counters.reads_local;
        self.reads_remote = status.counters.reads_remote;
        self.wire_bytes = status.wire_bytes;
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let reads = (self.reads_local + self.reads_remote).max(1);
        let rows = [
            (
                "disk",
                format!(
                    "{}, {}, {} of this machine's files",
                    show_size(self.size_bytes),
                    self.file_system,
                    show_size(self.content_bytes)
                ),
            ),
            (
                "link",
                format!(
                    "{} ms round trip, {} Mbit/s",
                    self.rtt_ms,
                    self.link_bytes_per_s * 8 / 1_000_000
                ),
            ),
            (
                "VM ran at the new site after",
                seconds(self.running_after_ms),
            ),
            (
                "old site needed no more after",
                seconds(self.source_free_after_ms),
            ),
            (
                "reads at the new site",
                format!(
                    "{} local ({}), {} from the old site",
                    self.reads_local,
                    percent(self.reads_local, reads),
                    self.reads_remote
                ),
            ),
            (
                "over the link",
                format!(
                    "{} of a disk of {} ({})",
                    show_size(self.link_down_bytes),
                    show_size(self.size_bytes),
                    percent(self.link_down_bytes, self.size_bytes)
                ),
            ),
            ("longest pause of a request", millis(self.moving.longest_us)),
            (
                "  of a write or flush",
                millis(self.moving.longest_write_us),
            ),
            ("reads before the move", felt(&self.before)),
            ("      while it moved", felt(&self.moving)),
            ("      old site off", felt(&self.after)),
            ("verdict", self.verdict()),
        ];
        let mut text = String::new();
        for (what, how) in rows {
            text.push_str(&format!("  {what:<31}{how}\n"));
        }
        text
    }

    fn verdict(&self) -> String {
        let bytes = match self.first_difference {
            None => format!(
                "every byte is right ({} compared)",
                show_size(self.compared_bytes)
            ),
            Some(offset) => format!("WRONG DATA at offset {offset}"),
        };
        match self.file_system_clean {
            None => bytes,
            Some(true) => bytes + ", file system clean (e2fsck)",
            Some(false) => bytes + ", FILE SYSTEM DAMAGED (e2fsck)",
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn felt(felt: &Felt) -> String {
    format!(
        "half within {}, 99% within {} ({} reads)",
        millis(felt.read_p50_us),
        millis(felt.read_p99_us),
        felt.reads
    )
}

fn millis(us: u64) -> String {
    match us {
        0..10_000 => format!("{}.{:02} ms", us / 1000, us % 1000 / 10),
        _ => format!("{} ms", us / 1000),
    }
}

fn seconds(ms: u128) -> String {
    format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)
}

fn percent(part: u64, whole: u64) -> String {
    let permille = u128::from(part) * 1000 / u128::from(whole.max(1));
    format!("{}.{}%", permille / 10, permille % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_told_apart() {
        let at = |asked_ms, took_ms, kind| Answered {
            asked: Duration::from_millis(asked_ms),
            took: Duration::from_millis(took_ms),
            kind,
        };
        let all = [
            at(1, 5, Kind::Read),
            at(10, 1, Kind::Read),
            at(11, 3, Kind::Read),
            at(12, 2, Kind::Flush),
            at(20, 9, Kind::Write),
        ];
        let felt = Felt::between(&all, Duration::from_millis(10), Duration::from_millis(20));
        assert_eq!((felt.requests, felt.reads), (3, 2));
        assert_eq!((felt.longest_us, felt.longest_write_us), (3000, 2000));
        let none = Felt::between(&all, Duration::from_secs(1), Duration::from_secs(2));
        assert_eq!((none.requests, none.read_p99_us), (0, 0));
        assert_eq!(percent(1, 8), "12.5%");
        assert_eq!(millis(1234), "1.23 ms");
        assert_eq!(seconds(1234), "1.23 s");
    }
}
