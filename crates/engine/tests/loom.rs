//! Every interleaving of installs, writes and reads of a block, under the model checker:
//! `RUSTFLAGS="--cfg loom" cargo test -p hikkoshi-engine --release --test loom`.
//!
//! The disk's data are relaxed atomics, one a sector, so that nothing but the residency's own
//! ordering makes a reader see them.
#![cfg(loom)]
#![allow(clippy::unwrap_used)]

use hikkoshi_engine::geometry::{BlockIndex, BlockRange, Geometry};
use hikkoshi_engine::journal::{Pending, Record};
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
    pending: Pending,
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
        pending: Pending::default(),
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
                self.pending.leave(|| {
                    self.residency.mark_clean(Self::block());
                    Some(Record::Clean(Self::block()))
                });
            }
            BlockState::Partial => {
                let mask = self.residency.partial_mask(BLOCK).unwrap();
                for sector in mask.missing(2).flatten() {
                    self.sectors[sector as usize].store(OLD, Relaxed);
                }
                self.now_owned();
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
            if !self.residency.all_owned(Self::block()) {
                self.pending.leave(|| {
                    let added = self.residency.own_resident(Self::block());
                    added.then_some(Record::Owned(Self::block()))
                });
            }
            return data(self);
        }
        let _guard = self.locks.lock(Self::block());
        data(self);
        if self.residency.state(BLOCK).is_resident() || sectors.len() == 2 {
            self.now_owned();
        } else {
            self.pending.leave(|| {
                let mask = self.residency.mark_partial(BLOCK, sectors).unwrap();
                Some(match self.residency.state(BLOCK) {
                    BlockState::Owned => Record::Owned(Self::block()),
                    _ => Record::Partial { block: BLOCK, mask },
                })
            });
        }
    }

    fn now_owned(&self) {
        self.pending.leave(|| {
            self.residency.mark_owned(Self::block());
            Some(Record::Owned(Self::block()))
        });
    }

    fn write_and_flush(&self) {
        self.write(1..2);
        assert!(
            Self::is_known_by(&self.pending.take().records),
            "the flush has no record of a block that was written before it"
        );
    }

    /// What the records of a commit make of the block.
    fn is_known_by(records: &[Record]) -> bool {
        records.iter().any(|record| match record {
            Record::Clean(range) | Record::Owned(range) => range.contains(BLOCK),
            Record::Partial { mask, .. } => mask.has(1),
        })
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
        let guest = Arc::clone(&disk);
        race(move || other.install(), move || guest.write(0..2));
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
        let guest = Arc::clone(&disk);
        race(move || other.install(), move || guest.write(0..1));
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
    /// Of all interleavings, so not one of the model's own.
    static SEEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    loom::model(|| {
        let disk = disk();
        let other = Arc::clone(&disk);
        race(
            move || other.install(),
            move || {
                if let Some(seen) = disk.read() {
                    SEEN.store(true, std::sync::atomic::Ordering::Relaxed);
                    assert_eq!(seen, [OLD, OLD]);
                }
            },
        );
    });
    assert!(
        SEEN.load(std::sync::atomic::Ordering::Relaxed),
        "no interleaving read the block after the install"
    );
}

#[test]
fn two_installs_of_a_block_are_one() {
    loom::model(|| {
        let disk = disk();
        let other = Arc::clone(&disk);
        let second = Arc::clone(&disk);
        race(move || other.install(), move || second.install());
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

/// A block was marked first and its record left after: a second client could write in between,
/// find nothing left to mark, and have its flush answered by a commit that did not know of the
/// block. A power cut then lost the flushed write.
#[test]
fn a_flush_knows_of_every_block_that_was_written_before_it() {
    for other in [0..2, 0..1] {
        loom::model(move || {
            let disk = disk();
            let (first, other) = (Arc::clone(&disk), other.clone());
            race(move || first.write(other), move || disk.write_and_flush());
        });
    }
}

/// The same while the block comes from the source.
#[test]
fn a_flush_knows_of_a_write_into_a_block_that_has_just_come() {
    loom::model(|| {
        let disk = disk();
        let other = Arc::clone(&disk);
        race(move || other.install(), move || disk.write_and_flush());
    });
}

/// Runs both at once. Neither on the model's main thread: the checker takes what that does right
/// after a spawn for having happened before the thread began.
fn race(a: impl FnOnce() + 'static, b: impl FnOnce() + 'static) {
    let (a, b) = (thread::spawn(a), thread::spawn(b));
    a.join().unwrap();
    b.join().unwrap();
}
