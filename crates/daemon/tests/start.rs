//! How many round trips a move takes until data flows.
#![allow(clippy::unwrap_used)]

#[path = "site/rounds.rs"]
mod rounds;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::net::SocketAddr;
use std::time::Duration;

use hikkoshi_daemon::config::Transport;
use hikkoshi_wan::Address;
use rounds::{Rounds, Seen};
use site::{On, Site, Wanted, noise};
use support::wait_until;
use tempfile::TempDir;

/// Connections over which the background copy comes at first.
const LINES: usize = 3;

/// What is seen of a move that begins at once, until so many connections have brought data.
fn a_move(transport: Transport, lines: usize, quiet: Duration) -> Vec<Seen> {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("old"), noise(24 << 20)).unwrap();
    let old = Site::start(
        dir.path(),
        "old",
        Wanted {
            transport,
            ..Wanted::plain(On::Tcp)
        },
    );
    let Address::Tcp { host, port } = old.address() else {
        panic!("not over TCP");
    };
    let to: SocketAddr = format!("{host}:{port}").parse().unwrap();
    let link = Rounds::start(to, quiet);
    let uri = format!("nbd://127.0.0.1:{}/", link.port());
    let new = Site::start(dir.path(), "new", Wanted::from(On::Tcp, &uri));
    let with_data = |seen: &[Seen]| seen.iter().filter(|s| s.data.is_some()).count();
    wait_until("data comes over all connections", || {
        with_data(&link.seen()) >= lines
    });
    let seen = link.seen();
    drop(link);
    new.stop();
    old.stop();
    seen
}

/// Counts with longer and longer rounds: a machine that stalls makes a count too high. Demand keeps a
/// connection to itself for a while.
fn count(transport: Transport, first_at: usize, all_at: usize) {
    let mut told = String::new();
    for quiet_ms in [50, 400, 2000] {
        let seen = a_move(transport, LINES, Duration::from_millis(quiet_ms));
        let mut data: Vec<usize> = seen.iter().filter_map(|s| s.data).collect();
        data.sort_unstable();
        let at_once = seen.iter().all(|s| s.began == 1);
        if at_once && data[0] <= first_at && data[LINES - 1] <= all_at {
            return;
        }
        told = format!("data in rounds {data:?}: {seen:#?}");
    }
    panic!("{told}");
}

/// Connect; greeting, options and attach; handoff and data. One at a time it took 16 and 17.
#[test]
fn frames_bring_data_after_three_round_trips() {
    count(Transport::Auto, 3, 4);
}

/// Connect; greeting and options; data. One at a time it took 7 and 11.
#[test]
fn plain_nbd_brings_data_after_three_round_trips() {
    count(Transport::Nbd, 3, 4);
}
