//! What is fetched in vain: what the guest has overwritten meanwhile, and what comes twice because a
//! connection was lost.
#![allow(clippy::unwrap_used)]

#[path = "site/gate.rs"]
mod gate;
#[path = "site/guest.rs"]
mod guest;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::net::SocketAddr;

use gate::Gate;
use guest::Guest;
use hikkoshi_daemon::config::Packing;
use hikkoshi_wan::{Address, Lane, NbdSource, Source};
use site::{On, Site, Wanted, noise};
use support::{outcome, submit_read, wait_until};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn tcp(site: &Site) -> SocketAddr {
    let Address::Tcp { host, port } = site.address() else {
        panic!("not over TCP");
    };
    format!("{host}:{port}").parse().unwrap()
}

/// The guest overwrites what the background copy has just asked for, before the source has heard of
/// it: it is taken back, and what was overwritten does not cross the link.
#[test]
fn what_the_guest_overwrites_is_taken_back_from_the_source() {
    let (dir, data) = (TempDir::new().unwrap(), noise(24 * MIB));
    let old = Site::with(dir.path(), "old", &data, On::Tcp);
    let gate = Gate::start(tcp(&old), u64::MAX);
    let mut wanted = Wanted::from(On::Unix, &gate.uri());
    wanted.compress = Packing::None;
    // Little comes before the link is held up.
    wanted.source().max_rate = Some(64 << 10);
    let new = Site::start(dir.path(), "new", wanted);
    wait_until("the first of it is here", || {
        new.status().resident_bytes > 0
    });
    gate.close(true);
    new.export().set_limit(None).unwrap();
    let before = new.status().wire_bytes;
    let written = 16 * MIB;
    let fresh = vec![0x77; 1 << 20];
    let mut guest = Guest::connect(&new.address());
    // The copy's requests are held, so what is overwritten is on its way.
    wait_until("all that was overwritten is taken back", || {
        (0..written / MIB).for_each(|n| guest.write(n * MIB, &fresh));
        gate.cancels() > 0 && gate.wanted_within(&(0..written)) == 0
    });
    gate.close(false);
    wait_until("every block is here", || new.is_local());
    let status = new.status();
    let cancelled = status.counters.cancelled_bytes;
    assert!(cancelled > 0, "nothing was saved");
    // What the source had begun to send by the time it heard of it.
    let most = before + (24 * MIB - written) + 2 * MIB;
    assert!(
        status.wire_bytes < most,
        "{} bytes crossed the link, {cancelled} were taken back",
        status.wire_bytes
    );
    new.stop();
    let arrived = std::fs::read(dir.path().join("new")).unwrap();
    let at = usize::try_from(written).unwrap();
    assert!(arrived[..at].iter().all(|byte| *byte == 0x77));
    assert!(arrived[at..] == data[at..]);
    old.stop();
}

/// Every connection is lost before a whole fetch of 1 MiB has come over it. What has come is kept: so
/// it gets on at all, and little crosses the link twice.
#[test]
fn what_had_come_before_a_connection_was_lost_is_not_fetched_again() {
    let (dir, data) = (TempDir::new().unwrap(), noise(8 * MIB));
    let old = Site::with(dir.path(), "old", &data, On::Tcp);
    let gate = Gate::start(tcp(&old), 700 << 10);
    let mut wanted = Wanted::from(On::Unix, &gate.uri());
    wanted.compress = Packing::None;
    wanted.source().connections = 1;
    wanted.source().background = false;
    let new = Site::start(dir.path(), "new", wanted);
    let mut client = new.client();
    client.frames = false;
    // No byte comes while the source is dialled again.
    client.progress_timeout = None;
    let guest = NbdSource::connect(client).unwrap();
    for n in 0..4 {
        let at = n * 2 * MIB;
        let read = submit_read(&*guest, Lane::Demand, at, u32::try_from(2 * MIB).unwrap());
        let fetched = outcome(&read).unwrap();
        let at = usize::try_from(at).unwrap();
        assert!(fetched.data == data[at..at + fetched.data.len()]);
    }
    guest.close();
    wait_until("every block is here", || {
        new.is_local() || new.status().absent_bytes == 0
    });
    let (connections, bytes) = (gate.connections(), gate.to_client());
    assert!(connections > 8, "only {connections} connections");
    // A connection loses a quantum that is cut, and begins with a handshake and the witnesses.
    let most = 8 * MIB + connections * (192 << 10);
    assert!(bytes < most, "{bytes} bytes over {connections} connections");
    new.stop();
    old.stop();
}
