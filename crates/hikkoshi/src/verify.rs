//! `hikkoshi verify`: compares a disk that moves here with its source.

use std::io::Write as _;
use std::time::Duration;

use hikkoshi_daemon::verification::{MAX_DIFFERENCES, VerifyMethod, VerifyState, VerifyStatus};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::quantity::show_size;
use crate::{choose, cli};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(200);

/// Has the daemon compare, and waits for the end of it. The progress bar goes to standard error,
/// and only to a terminal. Interrupted, the comparison goes on without us.
///
/// # Errors
/// Something differs or could not be compared, or there is nothing to compare with.
pub fn run(args: &cli::Verify) -> Result<(), Failure> {
    let found = choose::all(args.control.control.as_deref())?;
    let found = choose::pick(found, args.export.as_deref())?;
    let name = found.status.export.clone();
    let mut now = found.daemon.verify(&name, args.accept)?;
    if args.accept {
        return print(args.json, &now, || {
            "the source is let go of; what differed stays as it is here\n".into()
        });
    }
    let bar = progress_bar(&now);
    while now.state == VerifyState::Running {
        std::thread::sleep(INTERVAL);
        now = found.daemon.verification(&name)?;
        bar.set_position(now.checked_bytes);
    }
    bar.finish_and_clear();
    print(args.json, &now, || describe(&now))?;
    match now.state {
        VerifyState::Equal => Ok(()),
        _ => Err(Failure::failed(verdict(&now))),
    }
}

fn print(json: bool, now: &VerifyStatus, text: impl FnOnce() -> String) -> Result<(), Failure> {
    let text = if json {
        serde_json::to_string(now)? + "\n"
    } else {
        text()
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// Why the exit status is not 0.
fn verdict(now: &VerifyStatus) -> String {
    let kept = if now.withheld {
        "; the source is kept until `hikkoshi verify` finds nothing, or `hikkoshi verify --accept` \
         lets it go regardless"
    } else {
        ""
    };
    match now.state {
        VerifyState::Differs => format!(
            "{} bytes of export {:?} differ from the source{kept}",
            now.differing_bytes, now.export
        ),
        VerifyState::Failed => format!(
            "{} bytes of export {:?} could not be compared: {}{kept}",
            now.unreadable_bytes, now.export, now.message
        ),
        _ => format!("comparing export {:?} was ended before its end", now.export),
    }
}

fn describe(now: &VerifyStatus) -> String {
    let how = match now.method {
        Some(VerifyMethod::HashesAtSource) => "by hashes made at the source",
        Some(VerifyMethod::DataOverLink) => "by reading the source's data over the link",
        None => "nothing had to be asked",
    };
    let mut text = format!(
        "verified {} of {} ({how}, {} crossed the link)\n",
        show_size(now.verified_bytes),
        show_size(now.size_bytes),
        show_size(now.wire_bytes)
    );
    for (bytes, what) in [
        (now.owned_bytes, "written here, so not compared"),
        (now.absent_bytes, "not here yet"),
        (now.unreadable_bytes, "could not be read"),
        (now.differing_bytes, "DIFFER"),
    ] {
        if bytes > 0 {
            text.push_str(&format!("  {} {what}\n", show_size(bytes)));
        }
    }
    for one in &now.differences {
        text.push_str(&format!("    {} bytes at offset {}\n", one.len, one.offset));
    }
    if now.differences.len() >= MAX_DIFFERENCES {
        text.push_str("    and maybe more\n");
    }
    text
}

/// Hidden by indicatif itself when standard error is no terminal.
fn progress_bar(now: &VerifyStatus) -> ProgressBar {
    let template =
        "verifying [{bar:32}] {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is a good one");
    let bar = ProgressBar::new(now.size_bytes).with_style(style.progress_chars("=> "));
    bar.set_position(now.checked_bytes);
    bar
}

#[cfg(test)]
mod tests {
    use super::*;
    use hikkoshi_daemon::verification::Difference;

    #[test]
    fn people_see_what_was_found_and_how() {
        let now = VerifyStatus {
            export: "web".into(),
            state: VerifyState::Differs,
            method: Some(VerifyMethod::HashesAtSource),
            size_bytes: 20 << 30,
            verified_bytes: 19 << 30,
            owned_bytes: 1 << 30,
            differing_bytes: 4096,
            differences: vec![Difference {
                offset: 8192,
                len: 4096,
            }],
            wire_bytes: 3 << 20,
            withheld: true,
            ..VerifyStatus::default()
        };
        assert_eq!(
            describe(&now),
            "verified 19.0 GiB of 20.0 GiB (by hashes made at the source, 3.0 MiB crossed the \
             link)\n\
             \x20 1.0 GiB written here, so not compared\n\
             \x20 4.0 KiB DIFFER\n\
             \x20   4096 bytes at offset 8192\n"
        );
        assert!(verdict(&now).contains("--accept"));
        // Whatever is printed is documented.
        let page = include_str!("../../../docs/control-api.md");
        let value = serde_json::to_value(&now).unwrap();
        for field in value.as_object().unwrap().keys() {
            assert!(page.contains(&format!("| `{field}` |")), "{field}");
        }
        assert_eq!(value["method"], "hashes-at-source");
        assert_eq!(value["state"], "differs");
    }
}
