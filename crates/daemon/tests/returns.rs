//! Returns before all of the disk is at the other site: daemons in this process, on real files.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
#[path = "site/late.rs"]
mod late;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::time::Duration;

use guest::Guest;
use hikkoshi_daemon::config::{HandoffPolicy, SourceLoss};
use hikkoshi_daemon::status::LifeState;
use hikkoshi_store::state::StateDir;
use hikkoshi_wan::SourceErrorKind;
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

#[test]
fn a_return_goes_on_after_either_site_was_restarted() {
    for way_back in [true, false] {
        let mut moved = Moved::new(way_back);
        moved.begin_return();
        moved.change(0xb3);
        // Before the handoff.
        let mut lazily = moved.returning();
        lazily.source().background = false;
        moved.a.take().unwrap().stop();
        moved.a = Some(Site::start(moved.dir.path(), "a", lazily));
        moved.restart_b();
        moved.check_a();
        moved.change(0xb4);
        moved.a().export().handoff().unwrap();
        // After it, with what comes from B still to come.
        let mut wanted = moved.returning();
        wanted.source().background = false;
        moved.a.take().unwrap().stop();
        moved.a = Some(Site::start(moved.dir.path(), "a", wanted));
        assert_eq!(moved.a().status().state, LifeState::Arriving);
        moved.restart_b();
        assert_eq!(moved.b().status().state, LifeState::Departed);
        let part = Guest::connect(&moved.a().address()).read(3 << 20, BLOCK);
        assert!(part == moved.data[3 << 20..(3 << 20) + BLOCK]);
        moved.a.take().unwrap().stop();
        moved.a = Some(Site::start(moved.dir.path(), "a", moved.returning()));
        moved.finish();
    }
}

/// All of the disk ends up at B, from the old copy at A.
fn all_arrives_at_b(mut moved: Moved) {
    moved.change(0xb7);
    moved.read_at_b(0..SIZE);
    wait_until("all is at B", || moved.b().is_local());
    moved.a.take().unwrap().stop();
    moved.read_at_b(0..SIZE);
    assert!(moved.b().contents() == moved.data);
}

#[test]
fn a_return_that_is_given_up_leaves_all_as_it_was() {
    for restarted in [false, true] {
        let mut moved = Moved::new(true);
        moved.begin_return();
        moved.a().export().abort().unwrap();
        assert_eq!(moved.a().status().state, LifeState::GivenUp);
        let told = moved.a().status().notes.join("; ");
        assert!(told.contains("keep the image"), "{told}");
        let mut guest = Guest::connect(&moved.a().address());
        assert!(
            !guest.try_write(0, &[0; BLOCK]),
            "the old copy takes writes"
        );
        moved.change(0xb5);
        moved.read_at_b((4 << 20)..(5 << 20));
        if restarted {
            moved.a.take().unwrap().stop();
            moved.a = Some(Site::start(moved.dir.path(), "a", Wanted::plain(On::Unix)));
            assert_eq!(moved.a().status().state, LifeState::Departed);
            // And once more.
            moved.begin_return();
            moved.change(0xb6);
            moved.a().export().abort().unwrap();
        }
        assert!(moved.a().contents() == pattern(SIZE));
        all_arrives_at_b(moved);
    }
}

/// A return was given up while its source was away, and that is to be told at the next start. There the
/// disk was to come back once more, from the source's new address, and that it was to be told was
/// forgotten: a handoff of the first return that came late closed the fence for nobody, and no site took
/// writes.
#[test]
fn the_source_hears_of_a_return_that_was_given_up_before_the_next_one_begins() {
    let mut moved = Moved::new(true);
    moved.begin_return();
    let state = moved.dir.path().join("a.hikkoshi");
    let id = StateDir::whose(&state).unwrap().unwrap().volume_id;
    let mut elsewhere = lazily(moved.a(), true);
    elsewhere.on = On::Tcp;
    moved.b.take().unwrap().stop();
    moved.a().export().abort().unwrap();
    moved.a.take().unwrap().stop();
    assert!(StateDir::whose(&state).unwrap().unwrap().ties.gave_up);
    moved.b = Some(Site::start(moved.dir.path(), "b", elsewhere));
    moved.start_return();
    let error = late::handoff_to(moved.b(), id).expect_err("the disk was handed over");
    assert_eq!(error.kind, SourceErrorKind::Refused, "{error}");
    moved.a().export().handoff().unwrap();
    moved.finish();
}

#[test]
fn all_may_arrive_while_a_return_stands_by() {
    for way_back in [true, false] {
        let mut moved = Moved::new(way_back);
        moved.begin_return();
        moved.read_at_b(0..SIZE);
        wait_until("all is at B", || {
            moved.b().status().state == LifeState::Departing
        });
        moved.change(0xb8);
        assert!(moved.a().contents() == pattern(SIZE));
        moved.a().export().handoff().unwrap();
        moved.finish();
    }
}

#[test]
fn the_first_write_at_the_old_site_takes_the_disk_back() {
    let mut moved = Moved::new(false);
    moved.a.take().unwrap().stop();
    let mut wanted = moved.returning();
    wanted.source().handoff = HandoffPolicy::FirstWrite;
    moved.a = Some(Site::start(moved.dir.path(), "a", wanted));
    let mut guest = Guest::connect(&moved.a().address());
    guest.write(512, &[0xa2; 512]);
    moved.data[512..1024].fill(0xa2);
    assert_eq!(moved.b().status().state, LifeState::Departed);
    moved.finish();
}

/// While A was away, B began to write a block whose rest is only there. Asked for before it served the old
/// copy, the handoff was refused, at every start.
#[test]
fn a_return_at_once_first_gives_what_is_still_needed() {
    let mut moved = Moved::new(false);
    moved.a.take().unwrap().stop();
    let at = (7 << 20) + 512;
    Guest::connect(&moved.b().address()).write(at as u64, &[0xb9; 512]);
    moved.data[at..at + 512].fill(0xb9);
    let mut wanted = moved.returning();
    wanted.source().handoff = HandoffPolicy::Now;
    moved.a = Some(Site::start(moved.dir.path(), "a", wanted));
    wait_until("the disk is at A", || {
        moved.a().status().state != LifeState::Standby
    });
    moved.finish();
}

/// Over a connection that stood before the handoff, B reads nothing that is written after it.
#[test]
fn nobody_reads_an_old_copy_that_is_written_into() {
    let mut moved = Moved::new(true);
    moved.a.take().unwrap().stop();
    moved.a = Some(Site::start(moved.dir.path(), "a", moved.returning()));
    let mut wanted = lazily(moved.a(), true);
    wanted.source().on_loss = SourceLoss::Error(Duration::ZERO);
    moved.b.take().unwrap().stop();
    moved.b = Some(Site::start(moved.dir.path(), "b", wanted));
    wait_until("B reaches A", || {
        moved.b().status().source_connected == Some(true)
    });
    moved.read_at_b((4 << 20)..(4 << 20) + BLOCK);
    moved.a().export().handoff().unwrap();
    let mut at_b = Guest::connect(&moved.b().address());
    for block in 1..20 {
        let at = (4 << 20) + 8 * block * BLOCK;
        Guest::connect(&moved.a().address()).write(at as u64, &[0xa5; BLOCK]);
        moved.data[at..at + BLOCK].fill(0xa5);
        assert!(at_b.try_read(at as u64, BLOCK).is_none(), "B has read it");
    }
    moved.finish();
}

/// What the image at A says against a return.
fn refused(moved: &mut Moved, change: impl FnOnce(&mut Wanted)) -> String {
    let mut wanted = moved.returning();
    change(&mut wanted);
    let why = Site::try_start(moved.dir.path(), "a", wanted).err();
    why.expect("it must be refused")
}

#[test]
fn an_old_copy_that_is_needed_is_never_overwritten() {
    let mut moved = Moved::new(true);
    let image = moved.a().image.clone();
    moved.a.take().unwrap().stop();
    let other = moved.b().image.clone();
    for option in ["--verify", "--seed-image"] {
        let why = refused(&mut moved, |wanted| match option {
            "--verify" => wanted.source().verify = true,
            _ => wanted.source().seed_images = vec![other.clone()],
        });
        assert!(why.contains(&format!("leave {option}")), "{why}");
    }
    // Something else has written to it: not even on demand.
    let before = std::fs::metadata(&image).unwrap().modified().unwrap();
    let later = before + std::time::Duration::from_secs(5);
    let touch = |time| {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(&image)
            .unwrap();
        file.set_modified(time).unwrap();
    };
    touch(later);
    let why = refused(&mut moved, |wanted| wanted.source().overwrite = true);
    assert!(why.contains("changed by something else"), "{why}");
    touch(before);
    moved.start_return();
    moved.a.take().unwrap().stop();
    touch(later);
    let why = refused(&mut moved, |_| ());
    assert!(why.contains("touch"), "{why}");
    touch(before);
    moved.start_return();
    moved.a().export().abort().unwrap();
    all_arrives_at_b(moved);
}

#[test]
fn only_the_copy_that_a_disk_comes_from_takes_it_back_early() {
    let mut moved = Moved::new(true);
    // C takes over, and has next to nothing.
    let mut wanted = lazily(moved.b(), true);
    wanted.source().handoff = HandoffPolicy::Command;
    let c = Site::start(moved.dir.path(), "c", wanted);
    c.export().handoff().unwrap();
    moved.a.take().unwrap().stop();
    for overwrite in [false, true] {
        let mut wanted = Wanted::from(On::Unix, &c.uri());
        wanted.source().comes_back = true;
        wanted.source().overwrite = overwrite;
        let why = Site::try_start(moved.dir.path(), "a", wanted)
            .err()
            .unwrap();
        assert!(why.contains("no older one"), "{why}");
    }
    // Refused, it is what it was, and C gets all of it.
    moved.a = Some(Site::start(moved.dir.path(), "a", Wanted::plain(On::Unix)));
    let all = Guest::connect(&c.address()).read(0, SIZE);
    assert!(all == moved.data);
}
