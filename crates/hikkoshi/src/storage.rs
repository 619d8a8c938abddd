//! `hikkoshi move`: has a daemon move a disk to another image of its machine, and waits.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use hikkoshi_daemon::config::StorageOrder;
use hikkoshi_daemon::status::{ExportStatus, StorageMoveStatus, StoragePhase};
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;
use crate::{choose, cli, status};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(200);

/// Has the disk moved, and waits for the end of it. The progress bar goes to standard error, and only
/// to a terminal. Interrupted, the move goes on without us.
///
/// # Errors
/// The daemon refuses, or the disk stays where it is.
pub fn run(args: &cli::Move) -> Result<(), Failure> {
    let (export, image) = match args.words.as_slice() {
        [image] => (None, image),
        [export, image] => (Some(export), image),
        _ => return Err(Failure::Usage("move [EXPORT] NEWIMAGE".into())),
    };
    let export = export.map(|name| name.to_str().ok_or_else(no_text(name)));
    let export = export.transpose()?;
    // The daemon has a working directory of its own.
    let absolute = |path: &Path| {
        let path = std::path::absolute(path).map_err(anyhow::Error::from)?;
        path.to_str().ok_or_else(no_text(&path))?;
        Ok::<_, Failure>(path)
    };
    let order = StorageOrder {
        image: absolute(image)?,
        state_dir: args.state.as_deref().map(absolute).transpose()?,
        prepare: args.prepare.into(),
        max_rate: args.max_rate.and_then(|rate| rate.0),
        overwrite: args.overwrite,
    };
    let found = choose::all(args.control.control.as_deref())?;
    let found = choose::pick(found, export)?;
    let name = found.status.export.clone();
    let mut now = found.daemon.move_storage(&name, &order)?;
    if args.detach {
        return print(args, &now);
    }
    let bar = progress_bar(&now);
    loop {
        let Some(told) = now.storage_move.clone() else {
            bar.abandon();
            return Err(Failure::failed(format!(
                "the daemon was restarted; `hikkoshi status` says where the disk of export {name:?} is"
            )));
        };
        bar.set_position(told.copied_bytes);
        bar.set_message(word(told.phase));
        match told.phase {
            StoragePhase::Done => break,
            StoragePhase::Failed => {
                bar.abandon();
                return Err(stayed(&told));
            }
            StoragePhase::Preparing | StoragePhase::Switching | StoragePhase::Copying => {}
        }
        std::thread::sleep(INTERVAL);
        now = found.daemon.export(&name)?;
    }
    bar.finish_and_clear();
    print(args, &now)
}

fn no_text(path: &Path) -> impl FnOnce() -> Failure {
    let why = format!(
        "{} is no text in UTF-8; give it another name",
        path.display()
    );
    move || Failure::Usage(why)
}

fn stayed(told: &StorageMoveStatus) -> Failure {
    Failure::failed(format!(
        "the disk stays in {}, and did not move to {}: {}",
        told.from, told.to, told.message
    ))
}

fn print(args: &cli::Move, now: &ExportStatus) -> Result<(), Failure> {
    let text = if args.json {
        status::json(now)?
    } else {
        describe(now)
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn describe(now: &ExportStatus) -> String {
    let Some(told) = &now.storage_move else {
        return String::new();
    };
    let StorageMoveStatus { from, to, .. } = told;
    if told.phase != StoragePhase::Done {
        return format!(
            "the disk moves from {from} to {to}; `hikkoshi status` tells how far it is\n"
        );
    }
    // Not known where another process has made the switch.
    let waited = told.switch_us.map_or(String::new(), |us| {
        let (ms, tenths) = (us / 1000, us % 1000 / 100);
        format!("; clients waited for {ms}.{tenths} ms at the switch")
    });
    format!(
        "the disk is in {to}{waited}\n\
         the old image {from} is needed no more; where a configuration file or a unit names it, name \
         {to} there\n"
    )
}

fn word(phase: StoragePhase) -> &'static str {
    match phase {
        StoragePhase::Preparing => "preparing",
        StoragePhase::Switching => "switching",
        StoragePhase::Copying => "copying",
        StoragePhase::Done => "done",
        StoragePhase::Failed => "failed",
    }
}

/// Hidden by indicatif itself when standard error is no terminal.
fn progress_bar(now: &ExportStatus) -> ProgressBar {
    let template =
        "{msg:>9} [{bar:32}] {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).expect("the template is a good one");
    ProgressBar::new(now.size_bytes).with_style(style.progress_chars("=> "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choose::tests::status;
    use hikkoshi_daemon::status::LifeState;

    #[test]
    fn people_see_where_the_disk_is_and_what_is_left_to_do() {
        let mut now = status("web", LifeState::Local);
        now.storage_move = Some(StorageMoveStatus {
            from: "/old.img".into(),
            to: "/new.img".into(),
            phase: StoragePhase::Done,
            copied_bytes: now.size_bytes,
            switch_us: Some(2_345),
            message: String::new(),
        });
        assert_eq!(
            describe(&now),
            "the disk is in /new.img; clients waited for 2.3 ms at the switch\n\
             the old image /old.img is needed no more; where a configuration file or a unit names it, \
             name /new.img there\n"
        );
        // Whatever is printed is documented.
        let page = include_str!("../../../docs/control-api.md");
        let value = serde_json::to_value(&now.storage_move).unwrap();
        for field in value.as_object().unwrap().keys() {
            assert!(page.contains(&format!("`{field}`")), "{field}");
        }
        assert_eq!(value["phase"], "done");
    }
}
