//! Every interleaving of installs, writes and reads of a block, under the model checker:
//! `RUSTFLAGS="--cfg loom" cargo test -p hikkoshi-engine --release --test loom`.
//!
//! The disk's data are relaxed atomics, one a sector, so that nothing but the residency's own
//! ordering makes a reader see them.
#![cfg(loom)]
#![allow(clippy::unwrap_used)]

use hikkoshi_engine::geometry::{BlockIndex, BlockRange, Geometry};
use hikkoshi_engine::range_lock::RangeLocks;
use hikkoshi_engine::residency::{BlockState, Residency};
use hikkoshi_engine::sync::AtomicU64;
use loom::sync::Arc;
use loom::sync::atomic::Ordering::Relaxed;
use loom::thread;

const BLOCK: BlockIndex = BlockIndex(0);
const OLD: u64 = 1;
const NEW: u64 = 2;

/// One block of two sectors.
struct Disk {
    residency: Residency,
    locks: RangeLocks,
    sectors: [AtomicU64; 2],
}

fn disk() -> Arc<Disk> {
    let geometry = Geometry::new(1024, 1024).unwrap();
    let words = (0..Residency::required_words(geometry))
        .map(|_| AtomicU64::new(0))
        .collect();
    let words: Vec<AtomicU64> = words;
    Arc::new(Disk {
        residency: Residency::new(geometry, Box::new(words)),
        locks: RangeLocks::new(),
        sectors: [AtomicU64::new(0), AtomicU64::new(0)],
    })
}

impl Disk {
    fn block() -> BlockRange {
        BlockRange::one(BLOCK)
    }

    /// As `Relocation::install`.
    fn install(&self) {
        let _guard = self.locks.lock(Self::block());
        match self.residency.state(BLOCK) {
            BlockState::Absent => {
                self.sectors.iter().for_each(|s| s.store(OLD, Relaxed));
                self.residency.mark_clean(Self::block());
            }
            BlockState::Partial => {
                let mask = self.residency.partial_mask(BLOCK).unwrap();
                for sector in mask.missing(2).flatten() {
                    self.sectors[sector as usize].store(OLD, Relaxed);
                }
                self.residency.mark_owned(Self::block());
            }
            BlockState::Clean | BlockState::Owned => {}
        }
    }

    /// As `Volume::mutate`.
    fn write(&self, sectors: std::ops::Range<u32>) {
        let data = |this: &Self| {
            for n in sectors.clone() {
                this.sectors[n as usize].store(NEW, Relaxed);
            }
        };
        if self.residency.all_resident(Self::block()) {
            self.residency.own_resident(Self::block());
            return data(self);
        }
        let _guard = self.locks.lock(Self::block());
        data(self);
        if self.residency.state(BLOCK).is_resident() || sectors.len() == 2 {
            self.residency.mark_owned(Self::block());
        } else {
            self.residency.mark_partial(BLOCK, sectors).unwrap();
        }
    }

    fn read(&self) -> Option<[u64; 2]> {
        self.residency
            .all_resident(Self::block())
            .then(|| [self.sectors[0].load(Relaxed), self.sectors[1].load(Relaxed)])
    }
}

#[test]
fn a_write_wins_over_an_install() {
    loom::model(|| {
        let disk = disk();
        let other = Arc::clone(&disk);
        let install = thread::spawn(move || other.install());
        disk.write(0..2);
        install.join().unwrap();
        assert_eq!(disk.read(), Some([NEW, NEW]));
        assert_eq!(disk.residency.state(BLOCK), BlockState::Owned);
        assert_eq!(
            (
                disk.residency.missing_blocks(),
                disk.residency.owned_blocks()
            ),
            (0, 1)
        );
    });
}

#[test]
fn a_partial_write_keeps_its_sectors_and_gets_the_rest() {
    loom::model(|| {
        let disk = disk();
        let other = Arc::clone(&disk);
        let install = thread::spawn(move || other.install());
        disk.write(0..1);
        install.join().unwrap();
        assert_eq!(
            disk.residency.state(BLOCK),
            BlockState::Owned,
            "the install came too early or not at all"
        );
        assert_eq!(disk.read(), Some([NEW, OLD]));
        assert_eq!(disk.residency.owned_blocks(), 1);
    });
}

#[test]
fn two_partial_writes_and_an_install_lose_nothing() {
    loom::model(|| {
        let disk = disk();
        let (a, b) = (Arc::clone(&disk), Arc::clone(&disk));
        let first = thread::spawn(move || a.write(0..1));
        let second = thread::spawn(move || b.write(1..2));
        disk.install();
        first.join().unwrap();
        second.join().unwrap();
        assert_eq!(disk.read(), Some([NEW, NEW]));
        assert_eq!(disk.residency.owned_blocks(), 1);
    });
}

#[test]
fn who_sees_a_block_resident_sees_all_of_it() {
    loom::model(|| {
        let disk = disk();
        let other = Arc::clone(&disk);
        let install = thread::spawn(move || other.install());
        if let Some(seen) = disk.read() {
            assert_eq!(seen, [OLD, OLD]);
        }
        install.join().unwrap();
    });
}

#[test]
fn two_installs_of_a_block_are_one() {
    loom::model(|| {
        let disk = disk();
        let other = Arc::clone(&disk);
        let install = thread::spawn(move || other.install());
        disk.install();
        install.join().unwrap();
        assert_eq!(disk.read(), Some([OLD, OLD]));
        assert_eq!(
            (
                disk.residency.resident_blocks(),
                disk.residency.owned_blocks()
            ),
            (1, 0)
        );
    });
}
