//! One cap on what all disks of a daemon copy in the background: after the handoff, ahead of it, and
//! from one image to another of the same machine.
#![allow(clippy::unwrap_used)]

mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::path::Path;
use std::time::Instant;

use hikkoshi_daemon::Daemon;
use hikkoshi_daemon::config::{
    DEFAULT_MAX_CLIENTS, DaemonConfig, Engine, ExportConfig, HandoffPolicy, Listen, Packing,
    SourceConfig, StorageOrder, Transport,
};
use hikkoshi_daemon::status::{ExportStatus, LifeState, StoragePhase};
use site::{On, Site, noise};
use support::wait_until;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// Each disk.
const SIZE: u64 = 24 * MIB;

const RATE: u64 = 4 * MIB;

/// What may come at once above the rate: a tenth of a second, a chunk for each disk, and what was on its
/// way at the first look.
const SLACK: u64 = RATE / 10 + 5 * MIB;

fn export(dir: &Path, name: &str, source: Option<SourceConfig>) -> ExportConfig {
    ExportConfig {
        name: name.into(),
        image: dir.join(name),
        state_dir: None,
        block_bytes: 4096,
        read_only: false,
        engine: Engine::Threads,
        transport: Transport::Auto,
        compress: Packing::None,
        source,
    }
}

/// Bytes that were copied, wherever each disk is in its life.
fn copied(status: &ExportStatus) -> u64 {
    match (&status.storage_move, status.state) {
        (Some(storage), _) => storage.copied_bytes,
        (None, LifeState::Standby) => status.ahead_bytes,
        (None, _) => status.resident_bytes,
    }
}

#[test]
fn all_disks_of_a_daemon_keep_to_one_cap() {
    let dir = TempDir::new().unwrap();
    let data = noise(SIZE);
    let olds = [
        Site::with(dir.path(), "old-one", &data, On::Tcp),
        Site::with(dir.path(), "old-two", &data, On::Unix),
    ];
    std::fs::write(dir.path().join("three"), &data).unwrap();
    let from = |old: &Site, handoff| SourceConfig {
        handoff,
        ..SourceConfig::new(old.uri())
    };
    let daemon = Daemon::start(DaemonConfig {
        listen: vec![Listen::Unix(dir.path().join("new.sock"))],
        metrics: None,
        control: None,
        exports: vec![
            export(dir.path(), "one", Some(from(&olds[0], HandoffPolicy::Now))),
            export(
                dir.path(),
                "two",
                Some(from(&olds[1], HandoffPolicy::Command)),
            ),
            export(dir.path(), "three", None),
        ],
        max_clients: DEFAULT_MAX_CLIENTS,
        max_rate_all: Some(RATE),
        congestion: None,
    })
    .unwrap();
    let exports = daemon.exports();
    let find = |name: &str| exports.find(name).unwrap();
    let order = StorageOrder {
        image: dir.path().join("three-new"),
        state_dir: None,
        prepare: hikkoshi_daemon::config::Prepare::Ahead,
        max_rate: None,
        overwrite: false,
    };
    find("three").move_storage(&order).unwrap();
    let names = ["one", "two", "three"];
    let all = || names.map(|name| copied(&find(name).status()));
    for name in names {
        let limit = find(name).status().common_limit_bytes_per_s;
        assert_eq!(limit, Some(RATE), "{name}");
    }
    let (since, before) = (Instant::now(), all());
    wait_until("each has got on", || {
        let now = all();
        let each = now.iter().zip(before).map(|(now, before)| now - before);
        each.min().unwrap() > 3 * MIB
    });
    // Asked first, so that the time is what it took at least.
    let (sum, took) = (all().iter().sum::<u64>(), since.elapsed());
    let came = sum - before.iter().sum::<u64>();
    let most = u64::try_from(u128::from(RATE) * took.as_millis() / 1000).unwrap() + SLACK;
    assert!(came <= most, "{came} bytes in {took:?}, at most {most}");

    exports.set_common_limit(None);
    find("two").handoff().unwrap();
    wait_until("every block of one and two is here", || {
        names[..2]
            .iter()
            .all(|name| find(name).status().state == LifeState::Local)
    });
    wait_until("three has changed its image", || {
        let status = find("three").status();
        status
            .storage_move
            .is_some_and(|m| m.phase == StoragePhase::Done)
    });
    daemon.shutdown().unwrap();
    for name in ["one", "two", "three-new"] {
        assert!(
            std::fs::read(dir.path().join(name)).unwrap() == data,
            "{name}"
        );
    }
    olds.into_iter().for_each(Site::stop);
}
