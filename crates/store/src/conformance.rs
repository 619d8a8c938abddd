//! What every [`Store`] must do, whatever it is on. Each implementation's tests call [`run`] with
//! a way to make an empty store; a new implementation has to pass it before anything else.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::{Extent, ExtentKind, Store, ZeroMode};

/// Makes a store of so many bytes that reads as zeroes.
pub(crate) type Make<'a> = dyn Fn(u64) -> Arc<dyn Store> + 'a;

const MODES: [ZeroMode; 3] = [ZeroMode::MayPunch, ZeroMode::Allocate, ZeroMode::FastOnly];

/// Runs the whole suite, with so many random sequences of calls, on stores whose sizes are
/// multiples of `sector_bytes`.
pub(crate) fn run(make: &Make<'_>, sector_bytes: u64, cases: u32) {
    size_and_new_content(make, sector_bytes);
    any_alignment(make);
    zeroes_are_exact(make);
    ranges_outside_are_refused(make);
    nothing_is_done_for_no_bytes(make);
    extents_follow_writes(make);
    extents_are_bounded_and_merged(make);
    submitted_reads_come_elsewhere(make);
    submitted_reads_outlive_the_store(make);
    concurrent_writers_keep_apart(make);
    an_extent_once_written_is_never_a_hole(make);
    agrees_with_an_oracle(make, cases);
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    // Never zero, so that it cannot be taken for a hole.
    (0..len)
        .map(|i| u8::try_from((i * 7 + seed * 13) % 255 + 1).unwrap())
        .collect()
}

fn read(store: &dyn Store, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xEE; len];
    store.read(offset, &mut buf).unwrap();
    let mut quick = vec![0xEE; len];
    if store.try_read(offset, &mut quick).unwrap() {
        assert!(quick == buf, "try_read at {offset}+{len} differs from read");
    }
    buf
}

fn submit(store: &dyn Store, offset: u64, len: usize) -> mpsc::Receiver<std::io::Result<Vec<u8>>> {
    let (tx, rx) = mpsc::channel();
    store.submit_read(
        offset,
        len,
        Box::new(move |result| tx.send(result).unwrap()),
    );
    rx
}

fn size_and_new_content(make: &Make<'_>, sector_bytes: u64) {
    for size in [sector_bytes, 4096 * 3, (1 << 20) + sector_bytes] {
        let store = make(size);
        assert_eq!(store.size_bytes(), size);
        let all = read(&*store, 0, usize::try_from(size).unwrap());
        assert!(all.iter().all(|&byte| byte == 0));
        store.sync().unwrap();
    }
}

fn any_alignment(make: &Make<'_>) {
    let size = 64 << 10;
    let store = make(size);
    let mut oracle = vec![0; 64 << 10];
    let places = [
        (0, 1),
        (1, 511),
        (511, 2),
        (4095, 2),
        (4096, 4096),
        (5000, 12_345),
        (65_535, 1),
    ];
    for (seed, (offset, len)) in places.into_iter().enumerate() {
        let data = pattern(seed, len);
        store.write(offset as u64, &data).unwrap();
        oracle[offset..offset + len].copy_from_slice(&data);
        assert!(read(&*store, offset as u64, len) == data);
    }
    assert!(read(&*store, 0, oracle.len()) == oracle);
    assert!(submit(&*store, 0, oracle.len()).recv().unwrap().unwrap() == oracle);
}

fn zeroes_are_exact(make: &Make<'_>) {
    const SIZE: usize = 64 << 10;
    let places = [
        (0, SIZE),
        (0, 1),
        (1, 4096),
        (100, 300),
        (4095, 4098),
        (4096, 8192),
        (5000, 20_000),
        (SIZE - 5000, 5000),
        (SIZE - 1, 1),
    ];
    for mode in MODES {
        let store = make(SIZE as u64);
        for (offset, len) in places {
            let mut oracle = pattern(offset, SIZE);
            store.write(0, &oracle).unwrap();
            match store.write_zeroes(offset as u64, len as u64, mode) {
                Ok(()) => oracle[offset..offset + len].fill(0),
                Err(error) => {
                    assert_eq!(mode, ZeroMode::FastOnly, "{error}");
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                }
            }
            assert!(read(&*store, 0, SIZE) == oracle, "{mode:?} {offset}+{len}");
        }
    }
}

fn ranges_outside_are_refused(make: &Make<'_>) {
    const SIZE: u64 = 8192;
    let store = make(SIZE);
    let content = pattern(3, 8192);
    store.write(0, &content).unwrap();
    let outside = [
        (SIZE, 1),
        (SIZE - 1, 2),
        (SIZE + 1, 0),
        (u64::MAX, 2),
        (1 << 40, 512),
    ];
    for (offset, len) in outside {
        let mut buf = vec![0; len];
        let invalid = |error: std::io::Error| error.kind() == ErrorKind::InvalidInput;
        assert!(store.read(offset, &mut buf).is_err_and(invalid));
        assert!(store.try_read(offset, &mut buf).is_err_and(invalid));
        assert!(store.write(offset, &buf).is_err_and(invalid));
        assert!(store.extents(offset, len as u64, 8).is_err_and(invalid));
        assert!(
            submit(&*store, offset, len)
                .recv()
                .unwrap()
                .is_err_and(invalid)
        );
        for mode in MODES {
            assert!(
                store
                    .write_zeroes(offset, len as u64, mode)
                    .is_err_and(invalid)
            );
        }
    }
    assert_eq!(store.size_bytes(), SIZE);
    assert!(read(&*store, 0, content.len()) == content);
}

fn nothing_is_done_for_no_bytes(make: &Make<'_>) {
    const SIZE: u64 = 8192;
    let store = make(SIZE);
    let content = pattern(4, 8192);
    store.write(0, &content).unwrap();
    for offset in [0, 5, SIZE] {
        assert!(store.try_read(offset, &mut []).unwrap());
        store.read(offset, &mut []).unwrap();
        store.write(offset, &[]).unwrap();
        for mode in MODES {
            store.write_zeroes(offset, 0, mode).unwrap();
        }
        assert_eq!(store.extents(offset, 0, 8).unwrap(), []);
        assert_eq!(submit(&*store, offset, 0).recv().unwrap().unwrap(), []);
    }
    assert_eq!(store.extents(0, SIZE, 0).unwrap(), []);
    assert!(read(&*store, 0, content.len()) == content);
}

/// Checks what the trait promises of extents, and against the content that the store must have.
fn check_extents(extents: &[Extent], offset: u64, len: u64, max: usize, content: &[u8]) {
    assert!(extents.len() <= max);
    let mut at = offset;
    for extent in extents {
        assert_eq!(extent.offset, at);
        assert!(extent.len > 0);
        at += extent.len;
        let (start, end) = (
            usize::try_from(extent.offset).unwrap(),
            usize::try_from(at).unwrap(),
        );
        if extent.kind != ExtentKind::Data {
            assert!(
                content[start..end].iter().all(|&b| b == 0),
                "{extent:?} holds data"
            );
        }
    }
    assert!(at <= offset + len);
    assert!(
        at == offset + len || extents.len() == max,
        "stopped at {at} without a reason"
    );
    assert!(
        extents.windows(2).all(|pair| pair[0].kind != pair[1].kind),
        "{extents:?}"
    );
}

fn extents_follow_writes(make: &Make<'_>) {
    const SIZE: usize = 256 << 10;
    let store = make(SIZE as u64);
    let mut oracle = vec![0; SIZE];
    // Asked after every step, so that whatever is remembered is put to the test.
    let check = |oracle: &[u8]| {
        let all = store.extents(0, SIZE as u64, 1000).unwrap();
        check_extents(&all, 0, SIZE as u64, 1000, oracle);
        let some = store.extents(5000, 70_000, 2).unwrap();
        check_extents(&some, 5000, 70_000, 2, oracle);
    };
    check(&oracle);
    for (seed, offset) in [0, 100_000, 32_768, 200_001].into_iter().enumerate() {
        let data = pattern(seed, 9000);
        store.write(offset as u64, &data).unwrap();
        oracle[offset..offset + 9000].copy_from_slice(&data);
        check(&oracle);
    }
    store
        .write_zeroes(98_304, 16_384, ZeroMode::MayPunch)
        .unwrap();
    oracle[98_304..98_304 + 16_384].fill(0);
    check(&oracle);
    store.write_zeroes(0, 9000, ZeroMode::Allocate).unwrap();
    oracle[..9000].fill(0);
    check(&oracle);
    store.write(98_304, &[1]).unwrap();
    oracle[98_304] = 1;
    check(&oracle);
}

fn extents_are_bounded_and_merged(make: &Make<'_>) {
    const SIZE: u64 = 2 << 20;
    let store = make(SIZE);
    let mut oracle = vec![0; 2 << 20];
    for block in (0..16).step_by(2) {
        let start = block * (128 << 10);
        store.write(start as u64, &vec![9; 64 << 10]).unwrap();
        oracle[start..start + (64 << 10)].fill(9);
    }
    for max in [1, 2, 3, 7, 100] {
        for offset in [0, 1, 65_536, 300_001] {
            let extents = store.extents(offset, SIZE - offset, max).unwrap();
            check_extents(&extents, offset, SIZE - offset, max, &oracle);
        }
    }
}

fn submitted_reads_come_elsewhere(make: &Make<'_>) {
    let store = make(1 << 20);
    let content = pattern(8, 1 << 20);
    store.write(0, &content).unwrap();
    let (tx, rx) = mpsc::channel();
    for i in 0..700 {
        let (offset, len) = ((i * 1499) % 1_000_000, 1 + (i * 31) % 40_000);
        let tx = tx.clone();
        let done = move |result| {
            tx.send((offset, len, thread::current().id(), result))
                .unwrap()
        };
        store.submit_read(offset as u64, len, Box::new(done));
    }
    drop(tx);
    let mut answers = 0;
    for (offset, len, answered_by, result) in rx {
        assert_ne!(answered_by, thread::current().id());
        assert!(result.unwrap() == content[offset..offset + len]);
        answers += 1;
    }
    assert_eq!(answers, 700);
}

fn submitted_reads_outlive_the_store(make: &Make<'_>) {
    let store = make(1 << 20);
    let content = pattern(5, 1 << 20);
    store.write(0, &content).unwrap();
    let answers: Vec<_> = (0..64)
        .map(|i| submit(&*store, i * 4096, 500_000))
        .collect();
    drop(store);
    for (i, answer) in answers.into_iter().enumerate() {
        let got = answer.recv().unwrap().unwrap();
        assert!(got == content[i * 4096..i * 4096 + 500_000]);
    }
}

fn concurrent_writers_keep_apart(make: &Make<'_>) {
    const PART: usize = 100_003;
    let store = make(4 * 131_072);
    thread::scope(|scope| {
        for part in 0..4 {
            let store = &store;
            scope.spawn(move || {
                let base = part * PART;
                for round in 0..50 {
                    let data = pattern(round + part * 100, 3000);
                    let offset = (base + round * 1777 % (PART - 3000)) as u64;
                    store.write(offset, &data).unwrap();
                    assert!(read(&**store, offset, 3000) == data);
                    assert!(submit(&**store, offset, 3000).recv().unwrap().unwrap() == data);
                    store
                        .write_zeroes(offset, 1500, ZeroMode::MayPunch)
                        .unwrap();
                    let after = read(&**store, offset, 3000);
                    assert!(after[..1500].iter().all(|&byte| byte == 0));
                    assert!(after[1500..] == data[1500..]);
                    if round % 16 == 0 {
                        store.sync().unwrap();
                    }
                }
            });
        }
    });
}

/// Others ask for extents all the time, so that whatever is remembered is filled at every moment;
/// after a write has returned, its bytes must not be called a hole.
fn an_extent_once_written_is_never_a_hole(make: &Make<'_>) {
    let store = make(4 << 20);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let extents = store.extents(0, 4 << 20, 2000).unwrap();
                    assert_eq!(extents.iter().map(|it| it.len).sum::<u64>(), 4 << 20);
                }
            });
        }
        for i in 0..600 {
            let offset = (i * 37 % 1000) * 4096;
            store.write(offset, &[7; 4096]).unwrap();
            let extents = store.extents(offset, 4096, 4).unwrap();
            assert_eq!(
                extents,
                [Extent {
                    offset,
                    len: 4096,
                    kind: ExtentKind::Data
                }]
            );
            store
                .write_zeroes(offset, 4096, ZeroMode::MayPunch)
                .unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64, ZeroMode),
    Read(u64, usize),
    Submit(u64, usize),
    Extents(u64, u64, usize),
    Sync,
}

const ORACLE_BYTES: u64 = 96 << 10;

fn step() -> impl Strategy<Value = Step> {
    let range = (0..=ORACLE_BYTES)
        .prop_flat_map(|offset| (Just(offset), 0..=(ORACLE_BYTES - offset).min(20_000)))
        .prop_flat_map(|(offset, len)| {
            let aligned = (offset / 4096 * 4096, len / 4096 * 4096);
            prop_oneof![Just((offset, len)), Just(aligned)]
        });
    let mode = prop::sample::select(&MODES[..]);
    let len = |len: u64| usize::try_from(len).unwrap();
    prop_oneof![
        4 => (range.clone(), 1..=255u8).prop_map(move |((o, l), b)| Step::Write(o, len(l), b)),
        3 => (range.clone(), mode).prop_map(|((o, l), mode)| Step::Zero(o, l, mode)),
        2 => range.clone().prop_map(move |(o, l)| Step::Read(o, len(l))),
        1 => range.clone().prop_map(move |(o, l)| Step::Submit(o, len(l))),
        3 => (range, 0..6usize).prop_map(|((o, l), max)| Step::Extents(o, l, max)),
        1 => Just(Step::Sync),
    ]
}

fn agrees_with_an_oracle(make: &Make<'_>, cases: u32) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&prop::collection::vec(step(), 1..60), |steps| {
            let store = make(ORACLE_BYTES);
            let mut oracle = vec![0; usize::try_from(ORACLE_BYTES).unwrap()];
            for step in steps {
                take(&*store, &mut oracle, step);
            }
            assert!(read(&*store, 0, oracle.len()) == oracle);
            Ok(())
        })
        .unwrap();
}

fn take(store: &dyn Store, oracle: &mut [u8], step: Step) {
    let at = |offset: u64| usize::try_from(offset).unwrap();
    match step {
        Step::Write(offset, len, byte) => {
            store.write(offset, &vec![byte; len]).unwrap();
            oracle[at(offset)..at(offset) + len].fill(byte);
        }
        Step::Zero(offset, len, mode) => match store.write_zeroes(offset, len, mode) {
            Ok(()) => oracle[at(offset)..at(offset + len)].fill(0),
            Err(error) => assert_eq!(
                (mode, error.kind()),
                (ZeroMode::FastOnly, ErrorKind::Unsupported),
                "{error}"
            ),
        },
        Step::Read(offset, len) => {
            assert!(read(store, offset, len) == oracle[at(offset)..at(offset) + len]);
        }
        Step::Submit(offset, len) => {
            let got = submit(store, offset, len).recv().unwrap().unwrap();
            assert!(got == oracle[at(offset)..at(offset) + len]);
        }
        Step::Extents(offset, len, max) => {
            let extents = store.extents(offset, len, max).unwrap();
            check_extents(&extents, offset, len, max, oracle);
        }
        Step::Sync => store.sync().unwrap(),
    }
}
