//! How a move is told while it lasts: what data is coded as, and what need not be sent, by reason.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::os::unix::fs::FileExt;

use guest::Guest;
use hikkoshi_daemon::config::{Packing, Transport};
use site::{On, Site, Wanted, noise};
use support::wait_until;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A disk of 12 MiB: a third each what compresses to about a half, zeroes that are allocated, and a hole.
fn disk(path: &std::path::Path) -> Vec<u8> {
    let third = usize::try_from(4 * MIB).unwrap();
    let mut data = noise(12 * MIB);
    data[third..].fill(0);
    for pair in data[..third].chunks_mut(512) {
        pair[256..].fill(7);
    }
    let file = std::fs::File::create(path).unwrap();
    file.set_len(12 * MIB).unwrap();
    file.write_all_at(&data[..2 * third], 0).unwrap();
    data
}

/// A move that has copied a little and then stands still until it is let go on.
fn begun(dir: &TempDir, compress: Packing, transport: Transport) -> (Site, Site) {
    let old = Site::start(dir.path(), "old", Wanted::plain(On::Unix));
    let mut wanted = Wanted::from(On::Unix, &old.uri());
    wanted.compress = compress;
    wanted.transport = transport;
    wanted.source().max_rate = Some(64 << 10);
    let new = Site::start(dir.path(), "new", wanted);
    wait_until("some of it has come", || {
        new.status().counters.data_bytes > 0
    });
    (old, new)
}

#[test]
fn a_move_tells_its_codec_and_its_ratio() {
    for (compress, codec, percent) in [
        (Packing::Zstd(3), "zstd:3", 50..65),
        (Packing::Zstd(1), "zstd:1", 50..65),
        (Packing::Lz4, "lz4", 50..65),
        (Packing::None, "none", 100..102),
    ] {
        let dir = TempDir::new().unwrap();
        let data = disk(&dir.path().join("old"));
        let (old, new) = begun(&dir, compress, Transport::Auto);
        assert_eq!(new.status().codec.as_deref(), Some(codec));
        new.export().set_limit(None).unwrap();
        wait_until("every block is here", || new.is_local());
        let status = new.status();
        // There is none that is used now, and what was reached stays.
        assert_eq!(status.codec, None);
        let counters = status.counters;
        assert_eq!(counters.data_bytes, 4 * MIB, "{codec}");
        let ratio = counters.data_wire_bytes * 100 / counters.data_bytes;
        assert!(percent.contains(&ratio), "{ratio}% with {codec}");
        assert!(counters.data_wire_bytes <= status.wire_bytes);
        assert_eq!(counters.hole_bytes_skipped, 4 * MIB, "{codec}");
        assert_eq!(counters.zero_bytes_skipped, 8 * MIB, "{codec}");
        assert!(new.contents() == data);
        new.stop();
        old.stop();
    }
}

#[test]
fn plain_nbd_has_no_codec() {
    let dir = TempDir::new().unwrap();
    disk(&dir.path().join("old"));
    let (old, new) = begun(&dir, Packing::Auto, Transport::Nbd);
    assert_eq!(new.status().codec, None);
    new.stop();
    old.stop();
}

#[test]
fn what_is_written_before_it_comes_is_told() {
    let dir = TempDir::new().unwrap();
    disk(&dir.path().join("old"));
    let old = Site::start(dir.path(), "old", Wanted::plain(On::Unix));
    let mut wanted = Wanted::from(On::Unix, &old.uri());
    wanted.source().background = false;
    let new = Site::start(dir.path(), "new", wanted);
    let mut guest = Guest::connect(&new.address());
    let overwritten = || new.status().counters.overwritten_bytes;
    guest.write(MIB, &[7; 64 << 10]);
    assert_eq!(overwritten(), 64 << 10);
    // A second time it is nothing that could still come.
    guest.write(MIB, &[8; 64 << 10]);
    assert_eq!(overwritten(), 64 << 10);
    // A block in eight pieces counts once, with the last one. Nobody fetches the rest of it before.
    old.stop();
    wait_until("the source is missed", || {
        new.status().source_connected == Some(false)
    });
    for n in 0..8 {
        assert_eq!(overwritten(), 64 << 10);
        guest.write(2 * MIB + n * 512, &[9; 512]);
    }
    assert_eq!(overwritten(), 68 << 10);
    new.stop();
}
