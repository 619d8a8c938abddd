//! A start after a sync has failed.
#![allow(clippy::unwrap_used)]

mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use hikkoshi_daemon::config::Transport;
use hikkoshi_engine::geometry::{BlockRange, Geometry};
use hikkoshi_store::state::{Identity, Life, Ties};
use hikkoshi_store::suspect::Mark as _;
use hikkoshi_store::{FileStore, OpenOptions, live};
use site::{On, Site, Wanted, noise};
use support::wait_until;

/// A block was copied, a sync failed, and the kernel let go of the page that it could not write. The daemon
/// was killed; the next one believed the mark, and served what had been in the image before.
#[test]
fn what_was_copied_and_lost_by_a_failed_sync_is_copied_again() {
    let dir = tempfile::TempDir::new().unwrap();
    let data = noise(1 << 20);
    std::fs::write(dir.path().join("old"), &data).unwrap();
    let plain = Wanted {
        transport: Transport::Nbd,
        ..Wanted::plain(On::Unix)
    };
    let old = Site::start(dir.path(), "old", plain);

    // What the killed daemon leaves.
    let image = dir.path().join("new");
    let options = OpenOptions {
        create_with_size: Some(1 << 20),
        ..OpenOptions::default()
    };
    let store = FileStore::open(&image, options).unwrap();
    let identity = Identity {
        volume_id: live::random().unwrap(),
        geometry: Geometry::new(1 << 20, 4096).unwrap(),
        generation: 1,
        life: Life::Arriving,
        source_uri: old.uri(),
        incarnation: live::random().unwrap(),
        image_inode: None,
        ties: Ties::default(),
    };
    let state = dir.path().join("new.hikkoshi");
    let map = live::create_map(&state, &live::default_dir(), identity).unwrap();
    map.residency.mark_clean(BlockRange::new(10, 20));
    store.mark().raise().unwrap();
    drop((map, store));

    let new = Site::start(dir.path(), "new", Wanted::from(On::Unix, &old.uri()));
    wait_until("all is here", || new.is_local());
    assert!(new.contents() == data);
    new.stop();
    old.stop();
}
