use std::sync::Arc;

use proptest::prelude::*;

use super::MemoryStore;
use crate::{ExtentKind, Store, ZeroMode, conformance};

#[test]
fn conforms() {
    conformance::run(&|size| Arc::new(MemoryStore::new(size)), 512, 200);
}

#[test]
fn holes_come_back_when_punched_and_not_when_allocated() {
    let store = MemoryStore::new(16_384);
    store.write(0, &[1; 16_384]).unwrap();
    store.write_zeroes(4096, 4096, ZeroMode::MayPunch).unwrap();
    store.write_zeroes(8192, 4096, ZeroMode::Allocate).unwrap();
    let kinds: Vec<_> = store
        .extents(0, 16_384, 9)
        .unwrap()
        .into_iter()
        .map(|it| it.kind)
        .collect();
    use ExtentKind::{Data, Hole, Zero};
    assert_eq!(kinds, [Data, Hole, Zero, Data]);
}

#[test]
fn a_power_cut_keeps_what_was_synced_and_may_lose_the_rest() {
    let store = MemoryStore::new(4096);
    store.write(0, &[1; 1024]).unwrap();
    store.sync().unwrap();
    store.write(0, &[2; 1024]).unwrap();
    store.write(512, &[3; 1024]).unwrap();
    // The first write is lost; of the second only its last sector is kept.
    let mut choices = [0, 2, 0, 1].into_iter();
    let after = store.power_cut(&mut |_| choices.next().unwrap());
    assert_eq!(choices.next(), None);
    assert_eq!(after.content()[..1024], [1; 1024]);
    assert_eq!(after.content()[1024..1536], [3; 512]);
    assert_eq!(after.content()[1536..], [0; 4096 - 1536]);
    assert_eq!(store.write(0, &[9]).unwrap_err().raw_os_error(), Some(19));
    assert!(store.sync().is_err());
}

#[test]
fn a_kill_keeps_everything_and_makes_nothing_durable() {
    let store = MemoryStore::new(4096);
    store.write(0, &[1; 512]).unwrap();
    let after = store.kill();
    assert_eq!(after.content()[..512], [1; 512]);
    assert_eq!(after.unsynced_writes(), 1);
    assert_eq!(after.power_cut(&mut |_| 0).content(), [0; 4096]);
}

#[test]
fn an_early_punch_that_is_lost_leaves_no_hole_over_data() {
    let store = MemoryStore::with_content(vec![5; 8192]);
    store.write_zeroes(0, 8192, ZeroMode::MayPunch).unwrap();
    let after = store.power_cut(&mut |_| 0);
    assert_eq!(after.content(), [5; 8192]);
    assert_eq!(after.extents(0, 8192, 2).unwrap()[0].kind, ExtentKind::Data);
}

proptest! {
    /// Every sector has one of the contents that it had since the last sync.
    #[test]
    fn each_sector_is_as_it_was_at_some_time_since_the_sync(
        before in prop::collection::vec((0..4000usize, 1..2000usize), 0..6),
        after in prop::collection::vec((0..4000usize, 1..2000usize, any::<bool>()), 0..10),
        seed in any::<u32>(),
    ) {
        let store = MemoryStore::new(6144);
        for (i, (offset, len)) in before.into_iter().enumerate() {
            store.write(offset as u64, &vec![u8::try_from(i + 1).unwrap(); len]).unwrap();
        }
        store.sync().unwrap();
        let mut history = vec![store.content()];
        for (i, (offset, len, zero)) in after.into_iter().enumerate() {
            if zero {
                store.write_zeroes(offset as u64, len as u64, ZeroMode::MayPunch).unwrap();
            } else {
                store.write(offset as u64, &vec![u8::try_from(i + 100).unwrap(); len]).unwrap();
            }
            history.push(store.content());
        }
        let mut random = seed;
        let after = store.power_cut(&mut |below| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 16) % below
        });
        for (sector, got) in after.content().chunks(512).enumerate() {
            let range = sector * 512..(sector + 1) * 512;
            prop_assert!(history.iter().any(|image| image[range.clone()] == *got));
        }
    }
}
