//! The exports' numbers in the text format of Prometheus.
//!
//! Made from the same status that `status --json` shows, when it is asked for: nothing is counted
//! twice. A writer of our own, because a library would want to own the counters, which belong to the
//! volumes, and the format is four rules: `# HELP`, `# TYPE`, one line a sample, labels escaped.

use std::fmt::Write as _;

use crate::status::{BackgroundState, ExportStatus, LifeState};

/// What the answer is, for the header.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A metric: its name without the prefix, its type, its help, and its value for an export that has
/// one.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&ExportStatus) -> Option<u64>,
}

const fn gauge(
    name: &'static str,
    help: &'static str,
    value: fn(&ExportStatus) -> Option<u64>,
) -> Metric {
    let kind = "gauge";
    Metric {
        name,
        kind,
        help,
        value,
    }
}

const fn counter(
    name: &'static str,
    help: &'static str,
    value: fn(&ExportStatus) -> Option<u64>,
) -> Metric {
    let kind = "counter";
    Metric {
        name,
        kind,
        help,
        value,
    }
}

/// All but the states, which have a label more.
const METRICS: &[Metric] = &[
    gauge("size_bytes", "Size of the disk.", |s| Some(s.size_bytes)),
    gauge("resident_bytes", "What is here.", |s| {
        Some(s.resident_bytes)
    }),
    gauge(
        "owned_bytes",
        "What was written here since the handoff.",
        |s| Some(s.owned_bytes),
    ),
    gauge("absent_bytes", "What only the source has.", |s| {
        Some(s.absent_bytes)
    }),
    gauge(
        "copy_rate_bytes_per_second",
        "How fast blocks become resident, over the last seconds.",
        |s| Some(s.rate_bytes_per_s),
    ),
    gauge(
        "copy_limit_bytes_per_second",
        "The cap on the background copy; no sample without one.",
        |s| s.limit_bytes_per_s,
    ),
    gauge(
        "copy_common_limit_bytes_per_second",
        "The cap on the background copy of all disks of the daemon together; no sample without one.",
        |s| s.common_limit_bytes_per_s,
    ),
    gauge(
        "source_connected",
        "Whether the source is reachable and believed to be the same disk; no sample without one.",
        |s| s.source_connected.map(u64::from),
    ),
    gauge(
        "source_down_seconds",
        "For how long the source has been away; 0 while it is there, no sample without one.",
        |s| {
            s.source_connected
                .map(|_| s.source_down_s.unwrap_or_default())
        },
    ),
    gauge(
        "waiting_for_source_seconds",
        "For how long the source has been waited for before the disk can begin; 0 while it is not.",
        |s| Some(s.waiting.as_ref().map_or(0, |w| w.waited_s)),
    ),
    gauge(
        "waiting_for_source_attempts",
        "How often it was tried in vain since then.",
        |s| Some(s.waiting.as_ref().map_or(0, |w| w.attempts)),
    ),
    gauge(
        "reads_waiting",
        "Reads that wait for the source now.",
        |s| Some(s.reads_waiting),
    ),
    gauge(
        "poisoned",
        "Whether a sync failed: writes and flushes are refused until a restart.",
        |s| Some(s.poisoned.into()),
    ),
    gauge(
        "disk_full",
        "Whether something did not fit onto the disk a short while ago.",
        |s| Some(s.disk_full.into()),
    ),
    gauge("clients", "Clients connected now.", |s| Some(s.clients)),
    gauge(
        "storage_copied_bytes",
        "Bytes of the disk that are in the new image of the last `hikkoshi move`; no sample without one.",
        |s| s.storage_move.as_ref().map(|m| m.copied_bytes),
    ),
    gauge(
        "storage_switch_us",
        "For how long writes were held up when clients went over to that image, in microseconds.",
        |s| s.storage_move.as_ref().and_then(|m| m.switch_us),
    ),
    counter(
        "wire_bytes_total",
        "Bytes that crossed the link to the source, requests included.",
        |s| Some(s.wire_bytes),
    ),
    counter(
        "source_losses_total",
        "Times that the source was lost.",
        |s| Some(s.counters.source_losses),
    ),
    counter(
        "source_refusals_total",
        "Times that what answered in the source's place was not believed.",
        |s| Some(s.counters.source_refusals),
    ),
    counter(
        "reads_local_total",
        "Reads answered from the image alone.",
        |s| Some(s.counters.reads_local),
    ),
    counter(
        "reads_remote_total",
        "Reads that waited for the source.",
        |s| Some(s.counters.reads_remote),
    ),
    counter(
        "reads_failed_total",
        "Reads that failed because the source was away for longer than allowed.",
        |s| Some(s.counters.reads_failed),
    ),
    counter("writes_total", "Writes.", |s| Some(s.counters.writes)),
    counter("flushes_total", "Flushes, and writes with FUA.", |s| {
        Some(s.counters.flushes)
    }),
    counter("zeroes_total", "Trims and zeroings.", |s| {
        Some(s.counters.zeroes)
    }),
    counter(
        "blocks_installed_total",
        "Blocks installed from the source.",
        |s| Some(s.counters.blocks_installed),
    ),
    counter(
        "zero_bytes_skipped_total",
        "Bytes that were zero at the source and so were not sent.",
        |s| Some(s.counters.zero_bytes_skipped),
    ),
    counter(
        "hole_bytes_skipped_total",
        "Of these, bytes that the source told to be zero before any data was asked for.",
        |s| Some(s.counters.hole_bytes_skipped),
    ),
    counter(
        "overwritten_bytes_total",
        "Bytes that were written here before they came, and so were not needed.",
        |s| Some(s.counters.overwritten_bytes),
    ),
    counter(
        "data_bytes_total",
        "Bytes of the disk that came as data.",
        |s| Some(s.counters.data_bytes),
    ),
    counter(
        "data_wire_bytes_total",
        "What those were on the link: the quotient is the ratio of compression.",
        |s| Some(s.counters.data_wire_bytes),
    ),
    counter(
        "seeded_bytes_total",
        "Bytes that were found in a seed image and so were not sent.",
        |s| Some(s.seeded_bytes),
    ),
    counter(
        "packed_bytes_saved_total",
        "Bytes that did not cross the link because what did was compressed.",
        |s| Some(s.counters.packed_bytes_saved),
    ),
    counter(
        "cancelled_bytes_total",
        "Bytes that were asked for and then not sent, because they were wanted no more.",
        |s| Some(s.counters.cancelled_bytes),
    ),
    counter(
        "disk_errors_total",
        "Requests that the image's medium failed.",
        |s| Some(s.counters.disk_errors),
    ),
    gauge(
        "longest_remote_read_microseconds",
        "The longest that a read has waited for the source.",
        |s| Some(s.counters.longest_remote_read_us),
    ),
];

/// The numbers of all exports.
pub(super) fn render(exports: &[ExportStatus]) -> String {
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        writeln!(out, "{text}").expect("writing to a String does not fail");
    };
    for metric in METRICS {
        let Metric {
            name, kind, help, ..
        } = metric;
        line(format_args!("# HELP hikkoshi_{name} {help}"));
        line(format_args!("# TYPE hikkoshi_{name} {kind}"));
        for status in exports {
            if let Some(value) = (metric.value)(status) {
                let export = escape(&status.export);
                line(format_args!(
                    "hikkoshi_{name}{{export=\"{export}\"}} {value}"
                ));
            }
        }
    }
    line(format_args!(
        "# HELP hikkoshi_state Where the export stands: 1 for the state that it is in."
    ));
    line(format_args!("# TYPE hikkoshi_state gauge"));
    for status in exports {
        for (name, state) in [
            ("local", LifeState::Local),
            ("standby", LifeState::Standby),
            ("arriving", LifeState::Arriving),
            ("departing", LifeState::Departing),
            ("departed", LifeState::Departed),
            ("given-up", LifeState::GivenUp),
            ("opening", LifeState::Opening),
        ] {
            let export = escape(&status.export);
            let is = u8::from(status.state == state);
            line(format_args!(
                "hikkoshi_state{{export=\"{export}\",state=\"{name}\"}} {is}"
            ));
        }
    }
    line(format_args!(
        "# HELP hikkoshi_background What the background copy does: 1 for what it is."
    ));
    line(format_args!("# TYPE hikkoshi_background gauge"));
    for status in exports {
        for (name, state) in [
            ("idle", BackgroundState::Idle),
            ("running", BackgroundState::Running),
            ("paused", BackgroundState::Paused),
            ("off", BackgroundState::Off),
        ] {
            let export = escape(&status.export);
            let is = u8::from(status.background == state);
            line(format_args!(
                "hikkoshi_background{{export=\"{export}\",state=\"{name}\"}} {is}"
            ));
        }
    }
    line(format_args!(
        "# HELP hikkoshi_codec How data crosses the link: 1 for what is used now."
    ));
    line(format_args!("# TYPE hikkoshi_codec gauge"));
    for status in exports {
        if let Some(codec) = &status.codec {
            let export = escape(&status.export);
            let codec = escape(codec);
            line(format_args!(
                "hikkoshi_codec{{export=\"{export}\",codec=\"{codec}\"}} 1"
            ));
        }
    }
    out
}

/// A label's value, as the format wants it.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
