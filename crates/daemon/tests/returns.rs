//! Returns before all of the disk is at the other site: daemons in this process, on real files.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::path::Path;

use guest::Guest;
use hikkoshi_daemon::config::HandoffPolicy;
use hikkoshi_daemon::status::LifeState;
use site::{On, Site, Wanted};
use support::{pattern, wait_until};
use tempfile::TempDir;

const SIZE: usize = 8 << 20;
const BLOCK: usize = 4096;

/// What frames and questions take beside blocks.
const FEW_BYTES: u64 = 256 << 10;

/// A destination that fetches only what is read there.
fn lazily(a: &Site, way_back: bool) -> Wanted {
    let mut wanted = Wanted::from(On::Unix, &a.uri());
    wanted.source().background = false;
    wanted.source().way_back = way_back;
    wanted
}

/// What is at A and at B, of a disk of which B fetches only what is read there.
struct Moved {
    dir: TempDir,
    data: Vec<u8>,
    a: Option<Site>,
    b: Option<Site>,
    way_back: bool,
}

/// Where what is written there lies: whole blocks, parts of blocks, and across two.
const WRITES: [(usize, usize); 5] = [
    (0, BLOCK),
    (3 << 20, 3 * BLOCK),
    ((5 << 20) + 512, 1024),
    ((6 << 20) - 512, 1024),
    (SIZE - BLOCK, BLOCK),
];

impl Moved {
    fn new(way_back: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let data = pattern(SIZE);
        let a = Site::with(dir.path(), "a", &data, On::Unix);
        let mut this = Self {
            b: Some(Site::start(dir.path(), "b", lazily(&a, way_back))),
            a: Some(a),
            dir,
            data,
            way_back,
        };
        this.change(0xb1);
        // What is only read there is not different there.
        this.read_at_b((1 << 20)..(2 << 20));
        this
    }

    fn a(&self) -> &Site {
        self.a.as_ref().unwrap()
    }

    fn b(&self) -> &Site {
        self.b.as_ref().unwrap()
    }

    fn change(&mut self, value: u8) {
        let mut guest = Guest::connect(&self.b().address());
        for (at, len) in WRITES {
            guest.write(at as u64, &vec![value; len]);
            self.data[at..at + len].fill(value);
        }
    }

    fn read_at_b(&self, range: std::ops::Range<usize>) {
        let bytes = Guest::connect(&self.b().address()).read(range.start as u64, range.len());
        assert!(bytes == self.data[range], "B reads something else");
    }

    /// A stands by for the return.
    fn begin_return(&mut self) {
        self.a.take().unwrap().stop();
        self.start_return();
    }

    fn start_return(&mut self) {
        let a = Site::start(self.dir.path(), "a", self.returning());
        assert_eq!(a.status().state, LifeState::Standby);
        self.a = Some(a);
    }

    fn returning(&self) -> Wanted {
        let mut wanted = Wanted::from(On::Unix, &self.b().uri());
        wanted.source().comes_back = true;
        wanted.source().way_back = self.way_back;
        wanted.source().handoff = HandoffPolicy::Command;
        wanted
    }

    fn restart_b(&mut self) {
        let wanted = lazily(self.a(), self.way_back);
        self.b.take().unwrap().stop();
        self.b = Some(Site::start(self.dir.path(), "b", wanted));
    }

    /// All that A serves now.
    fn check_a(&self) {
        let bytes = Guest::connect(&self.a().address()).read(0, SIZE);
        assert!(bytes == self.data, "A serves something else");
    }

    /// The end of a return that was handed off.
    fn finish(mut self) {
        self.check_a();
        wait_until("all is at A", || self.a().is_local());
        assert_eq!(self.b().status().state, LifeState::Departed);
        self.b.take().unwrap().stop();
        self.check_a();
        assert!(self.a().contents() == self.data);
        self.a.unwrap().stop();
        assert!(!self.dir.path().join("a.hikkoshi/lacking").exists());
    }
}

#[test]
fn a_disk_comes_back_before_all_of_it_was_there() {
    for way_back in [true, false] {
        let mut moved = Moved::new(way_back);
        moved.begin_return();
        let absent = moved.b().status().absent_bytes;
        assert!(absent > SIZE as u64 / 2, "B has most of it: {absent}");
        // The VM goes on at B, which still fetches from the old copy.
        moved.change(0xb2);
        moved.read_at_b((5 << 20)..(6 << 20));
        // What reads at A meanwhile sees what is at B, from the old copy or not.
        moved.check_a();
        // Nothing of that is written into the old copy.
        assert!(moved.a().contents() == pattern(SIZE));
        let before = moved.a().status().wire_bytes;
        moved.a().export().handoff().unwrap();
        let mut guest = Guest::connect(&moved.b().address());
        assert!(!guest.try_write(0, &[0; BLOCK]), "B takes writes");
        // Written at A at once, over what is at B and over what is only here.
        let mut guest = Guest::connect(&moved.a().address());
        for (at, len) in [
            (2 * BLOCK, 1024),
            (SIZE - BLOCK + 512, 512),
            (4 << 20, BLOCK),
        ] {
            guest.write(at as u64, &vec![0xa1; len]);
            moved.data[at..at + len].fill(0xa1);
        }
        moved.check_a();
        wait_until("all is at A", || moved.a().is_local());
        let crossed = moved.a().status().wire_bytes - before;
        let most = match way_back {
            // What was written there alone.
            true => FEW_BYTES,
            // And what was read there.
            false => FEW_BYTES + SIZE as u64,
        };
        assert!(crossed <= most, "{crossed} bytes crossed the link");
        moved.finish();
    }
}
