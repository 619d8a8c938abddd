//! Which daemon, and which of its exports, a command is about.

use std::path::{Path, PathBuf};

use hikkoshi_daemon::control::client::ControlClient;
use hikkoshi_daemon::control::place;
use hikkoshi_daemon::status::{ExportStatus, LifeState};

use crate::failure::Failure;

/// An export, how it stood, and the daemon that has it.
#[derive(Clone, Debug)]
pub struct Found {
    /// The daemon.
    pub daemon: ControlClient,
    /// How the export stood when it was found.
    pub status: ExportStatus,
}

/// Where control sockets are when nobody said.
pub fn directories() -> Vec<PathBuf> {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    place::directories(runtime_dir.as_deref())
}

/// All exports of the daemon at `control`, or of all daemons of this user.
///
/// # Errors
/// No daemon answers.
pub fn all(control: Option<&Path>) -> Result<Vec<Found>, Failure> {
    if let Some(path) = control {
        let daemon = ControlClient::new(path);
        let exports = daemon.status()?;
        return Ok(exports
            .into_iter()
            .map(|status| Found {
                daemon: daemon.clone(),
                status,
            })
            .collect());
    }
    let places = directories();
    let mut found = Vec::new();
    let mut last_error = None;
    for path in place::live_sockets(&places) {
        let daemon = ControlClient::new(path);
        match daemon.status() {
            Ok(exports) => found.extend(exports.into_iter().map(|status| Found {
                daemon: daemon.clone(),
                status,
            })),
            // It may have ended this moment; the others still count.
            Err(error) => last_error = Some(error),
        }
    }
    match last_error {
        Some(error) if found.is_empty() => Err(error.into()),
        _ if found.is_empty() => {
            let places: Vec<_> = places.iter().map(|dir| dir.display().to_string()).collect();
            Err(Failure::failed(format!(
                "no running daemon was found in {}; start one with `hikkoshi serve`, or say where \
                 it is controlled with --control unix:PATH",
                places.join(" or ")
            )))
        }
        _ => Ok(found),
    }
}

/// The daemon at `control`, or the only one of this user that has a disk with a source.
///
/// # Errors
/// None answers, or it is not clear which; the text lists the candidates.
pub fn daemon(control: Option<&Path>) -> Result<ControlClient, Failure> {
    let found = all(control)?;
    only_daemon(&found)
}

fn only_daemon(found: &[Found]) -> Result<ControlClient, Failure> {
    let of = |one: &Found| one.daemon.path().to_owned();
    let mut daemons: Vec<PathBuf> = found.iter().map(of).collect();
    let with_source = found.iter().filter(|one| one.status.source.is_some());
    let mut busy: Vec<PathBuf> = with_source.map(of).collect();
    daemons.dedup();
    busy.dedup();
    match (busy.as_slice(), daemons.as_slice()) {
        ([only], _) | ([], [only]) => Ok(ControlClient::new(only)),
        _ => Err(Failure::failed(format!(
            "say which daemon, with --control unix:PATH: {}",
            list(found)
        ))),
    }
}

/// The export called `name`; without a name the only one that is moving here, else the only one.
///
/// # Errors
/// There is none, or it is not clear which; the text lists the candidates.
pub fn pick(found: Vec<Found>, name: Option<&str>) -> Result<Found, Failure> {
    let listed = list(&found);
    let named: Vec<Found> = match name {
        None => found,
        Some("") if found.len() == 1 => found,
        Some(name) => found
            .into_iter()
            .filter(|one| one.status.export == name)
            .collect(),
    };
    let moving: Vec<&Found> = named
        .iter()
        .filter(|one| one.status.state != LifeState::Local)
        .collect();
    match (moving.as_slice(), named.as_slice()) {
        ([only], _) => return Ok((*only).clone()),
        ([], [only]) => return Ok(only.clone()),
        _ => {}
    }
    Err(Failure::failed(match (name, named.is_empty()) {
        (Some(name), true) => format!("no export is named {name:?}; there are: {listed}"),
        (None, true) => "the daemon has no exports".into(),
        (Some(name), false) => format!(
            "several daemons have an export named {name:?}; say which with --control unix:PATH: \
             {}",
            list(&named)
        ),
        (None, false) => {
            format!("say which export (and which daemon, with --control unix:PATH): {listed}")
        }
    }))
}

fn list(found: &[Found]) -> String {
    let lines: Vec<_> = found
        .iter()
        .map(|one| {
            let Found { daemon, status } = one;
            let (name, state) = (&status.export, crate::status::life(status.state));
            format!(
                "\n  {name:?} ({state}), --control unix:{}",
                daemon.path().display()
            )
        })
        .collect();
    lines.concat()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use hikkoshi_daemon::status::{BackgroundState, Counters};

    pub(crate) fn status(name: &str, state: LifeState) -> ExportStatus {
        ExportStatus {
            export: name.into(),
            size_bytes: 20 << 30,
            state,
            resident_bytes: 5 << 30,
            owned_bytes: 1 << 30,
            absent_bytes: 15 << 30,
            wire_bytes: 4 << 30,
            codec: None,
            source_connected: Some(true),
            source_down_s: None,
            waiting: None,
            reads_waiting: 0,
            poisoned: false,
            disk_full: false,
            prepared: None,
            way_back: Default::default(),
            ahead_bytes: 0,
            seeded_bytes: 0,
            repeated_bytes: 0,
            background: BackgroundState::Running,
            rate_bytes_per_s: 41_000_000,
            eta_s: Some(200),
            limit_bytes_per_s: None,
            common_limit_bytes_per_s: None,
            image: "disk.img".into(),
            old_copy_needed: false,
            taken_over: None,
            release_in_s: None,
            storage_move: None,
            source: Some("nbd://old/".into()),
            notes: vec![],
            clients: 1,
            counters: Counters::default(),
        }
    }

    fn found(daemon: &str, name: &str, state: LifeState) -> Found {
        Found {
            daemon: ControlClient::new(daemon),
            status: status(name, state),
        }
    }

    #[test]
    fn the_daemon_is_the_one_that_copies() {
        use LifeState::{Arriving, Local};
        let mut local = found("a", "", Local);
        local.status.source = None;
        let two = [found("b", "one", Arriving), found("b", "two", Local)];
        let with_local = [&[local.clone()], &two[..]].concat();
        assert_eq!(only_daemon(&with_local).unwrap().path(), Path::new("b"));
        assert_eq!(only_daemon(&[local]).unwrap().path(), Path::new("a"));
        let unclear = [&two[..], &[found("c", "", Arriving)]].concat();
        let said = only_daemon(&unclear).unwrap_err().to_string();
        assert!(said.contains("unix:b") && said.contains("unix:c"), "{said}");
    }

    #[test]
    fn source_and_destination_on_one_machine_need_no_name() {
        use LifeState::{Arriving, Local, Standby};
        let both = vec![found("a", "", Local), found("b", "", Standby)];
        assert_eq!(
            pick(both.clone(), None).unwrap().daemon.path(),
            Path::new("b")
        );
        assert_eq!(pick(both, Some("")).unwrap().daemon.path(), Path::new("b"));
        let one = vec![found("a", "web", Local)];
        assert_eq!(pick(one.clone(), None).unwrap().status.export, "web");
        assert_eq!(pick(one.clone(), Some("")).unwrap().status.export, "web");
        assert!(
            pick(one, Some("db"))
                .unwrap_err()
                .to_string()
                .contains("\"web\"")
        );
        let two = vec![found("a", "web", Arriving), found("a", "db", Standby)];
        assert_eq!(pick(two.clone(), Some("db")).unwrap().status.export, "db");
        let error = pick(two, None).unwrap_err().to_string();
        assert!(
            error.contains("\"web\"") && error.contains("\"db\""),
            "{error}"
        );
        let plain = vec![found("a", "x", Local), found("b", "x", Local)];
        assert!(
            pick(plain, Some("x"))
                .unwrap_err()
                .to_string()
                .contains("unix:b")
        );
    }
}
