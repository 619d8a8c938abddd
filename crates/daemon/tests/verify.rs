//! Comparing a disk that moved with its source: two daemons, over frames and over plain NBD.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guest::Guest;
use hikkoshi_daemon::config::{HandoffPolicy, Transport};
use hikkoshi_daemon::verification::{Difference, VerifyMethod, VerifyState, VerifyStatus};
use hikkoshi_wan::Source as _;
use site::{On, Site, Wanted};
use support::{pattern, wait_until};
use tempfile::TempDir;

const SIZE: usize = 5 << 20;

fn change_byte(image: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(image)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn verified(site: &Site) -> VerifyStatus {
    wait_until("it was compared", || {
        let state = site.export().verification().state;
        !matches!(state, VerifyState::None | VerifyState::Running)
    });
    site.export().verification()
}

/// A move that keeps its source because of two bytes: one changed here, one there.
fn withheld(dir: &Path, on: On, transport: Transport) -> (Site, Site, Vec<u8>) {
    let data = pattern(SIZE);
    std::fs::write(dir.join("old"), &data).unwrap();
    let plain = Wanted {
        transport,
        ..Wanted::plain(on)
    };
    let old = Site::start(dir, "old", plain);
    let mut wanted = Wanted::from(On::Unix, &old.uri());
    wanted.source().verify = true;
    wanted.source().background = false;
    let new = Site::start(dir, "new", wanted);
    // What is read is kept; then a byte of it changes, here and there.
    let read = |offset: u64| {
        let client = hikkoshi_wan::NbdSource::connect(new.client()).unwrap();
        let len = 64 << 10;
        let answer = support::submit_read(&*client, hikkoshi_wan::Lane::Demand, offset, len);
        support::outcome(&answer).unwrap();
    };
    read(0);
    change_byte(&new.image, 9000);
    read(2 << 20);
    change_byte(&old.image, (2 << 20) + 70);
    // Written here: newer than the source, and no difference.
    let mut guest = Guest::connect(&new.address());
    guest.write(3 << 20, &[0xab; 8192]);
    guest.write((1 << 20) + 512, &[0xcd; 512]);
    for offset in (0..SIZE as u64).step_by(64 << 10) {
        read(offset);
    }
    (old, new, data)
}

#[test]
fn differences_are_found_and_what_was_written_here_is_none() {
    for (on, transport) in [
        (On::Tcp, Transport::Auto),
        (On::Unix, Transport::Auto),
        (On::Tcp, Transport::Nbd),
    ] {
        let dir = TempDir::new().unwrap();
        let (old, new, data) = withheld(dir.path(), on, transport);
        let status = verified(&new);
        assert_eq!(status.state, VerifyState::Differs, "{status:?}");
        let method = match transport {
            Transport::Auto => VerifyMethod::HashesAtSource,
            Transport::Nbd => VerifyMethod::DataOverLink,
        };
        assert_eq!(status.method, Some(method));
        let at = |offset| Difference { offset, len: 4096 };
        assert_eq!(status.differences, [at(8192), at(2 << 20)]);
        assert_eq!(status.owned_bytes, 8192 + 4096);
        let size = u64::try_from(SIZE).unwrap();
        assert_eq!(status.verified_bytes, size - 5 * 4096);
        if transport == Transport::Auto {
            assert!(status.wire_bytes < 16 << 10, "{}", status.wire_bytes);
        }
        assert!(status.required && status.withheld && !new.is_local());
        let notes = new.status().notes.join("\n");
        assert!(notes.contains("8192 bytes differ"), "{notes}");

        // Put right again, it is compared again, and then the source goes.
        change_byte(&new.image, 9000);
        change_byte(&old.image, (2 << 20) + 70);
        new.export().verify(false).unwrap();
        wait_until("it is local", || new.is_local());
        assert_eq!(verified(&new).state, VerifyState::Equal);
        assert!(
            new.export().verify(false).is_err(),
            "nothing to compare with"
        );
        let mut expected = data;
        expected[3 << 20..(3 << 20) + 8192].fill(0xab);
        expected[(1 << 20) + 512..(1 << 20) + 1024].fill(0xcd);
        assert!(new.contents() == expected);
        new.daemon.shutdown().unwrap();
        old.daemon.shutdown().unwrap();
    }
}

#[test]
fn after_a_restart_it_begins_again_until_somebody_accepts() {
    let dir = TempDir::new().unwrap();
    let (old, mut new, _) = withheld(dir.path(), On::Tcp, Transport::Auto);
    verified(&new);
    // What differs at the source may be among what it is known by again after a restart; what differs here is not.
    change_byte(&old.image, (2 << 20) + 70);
    for _ in 0..2 {
        let status = verified(&new);
        assert_eq!(status.state, VerifyState::Differs);
        assert!(status.withheld && !new.is_local());
        new.daemon.shutdown().unwrap();
        let mut wanted = Wanted::from(On::Unix, &old.uri());
        wanted.source().verify = true;
        new = Site::start(dir.path(), "new", wanted);
    }
    verified(&new);
    new.export().verify(true).unwrap();
    wait_until("it is local", || new.is_local());
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}

#[test]
fn it_can_be_asked_for_in_the_middle_and_not_before_the_handoff() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(SIZE));
    let old = Site::with(dir.path(), "old", &data, On::Tcp);
    assert!(old.export().verify(false).is_err(), "it has no source");
    let mut wanted = Wanted::from(On::Unix, &old.uri());
    wanted.source().handoff = HandoffPolicy::FirstWrite;
    wanted.source().background = false;
    let new = Site::start(dir.path(), "new", wanted);
    let refused = new.export().verify(false).unwrap_err().to_string();
    assert!(
        refused.contains("the VM still runs at the source"),
        "{refused}"
    );
    new.export().handoff().unwrap();
    let client = hikkoshi_wan::NbdSource::connect(new.client()).unwrap();
    let read = support::submit_read(&*client, hikkoshi_wan::Lane::Demand, 0, 1 << 20);
    support::outcome(&read).unwrap();
    new.export().verify(false).unwrap();
    let status = verified(&new);
    assert_eq!(status.state, VerifyState::Equal);
    assert!(status.verified_bytes >= 1 << 20 && !status.withheld);
    assert_eq!(
        status.verified_bytes + status.absent_bytes,
        status.size_bytes
    );
    client.close();
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}
