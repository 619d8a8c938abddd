//! What leaves when.
#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::transport::pack::Packing;

const DISK: u64 = 1 << 30;
const QUANTUM: u64 = limits::QUANTUM_BYTES as u64;
const BULK: u64 = limits::BULK_BYTES as u64;

fn read(id: u64, priority: Priority, offset: u64, len: u64) -> Request {
    Request::Wish {
        id,
        priority,
        wish: Wish::Read {
            packing: Packing::None,
        },
        offset,
        len: u32::try_from(len).unwrap(),
    }
}

fn with(requests: &[Request]) -> Scheduler {
    let mut scheduler = Scheduler::new(DISK);
    for request in requests {
        scheduler.submit(*request).unwrap();
    }
    scheduler
}

/// Takes a step and says whose it was.
fn step(scheduler: &mut Scheduler) -> (u64, u64) {
    let step = scheduler.peek().unwrap();
    scheduler.done(&step);
    (step.id, step.offset)
}

#[test]
fn demand_leaves_after_at_most_one_quantum() {
    let mut s = with(&[read(1, Priority::COLD, 0, 32 << 20)]);
    for n in 0..5 {
        assert_eq!(step(&mut s), (1, n * BULK));
    }
    s.submit(read(2, Priority::DEMAND, 900, 4096)).unwrap();
    s.submit(read(3, Priority::READ_AHEAD, 8192, 4096)).unwrap();
    let demand = s.peek().unwrap();
    assert!(demand.id == 2 && demand.last && demand.len == 4096);
    s.done(&demand);
    assert_eq!(step(&mut s), (3, 8192));
    assert_eq!(step(&mut s), (1, 5 * BULK));
}

#[test]
fn demand_takes_turns_and_bulk_is_in_order() {
    let mut s = with(&[
        read(1, Priority::COLD, 0, 3 * BULK),
        read(2, Priority::COLD, 0, 3 * BULK),
        read(3, Priority::DEMAND, 0, 3 * QUANTUM),
        read(4, Priority::DEMAND, 0, 1),
    ]);
    let order: Vec<u64> = std::iter::from_fn(|| s.peek().map(|_| step(&mut s).0)).collect();
    assert_eq!(order, [3, 4, 3, 3, 1, 1, 1, 2, 2, 2]);
    assert!(s.is_empty());
}

#[test]
fn what_is_waited_for_holds_up_nobody_and_what_is_cancelled_ends() {
    let mut s = with(&[
        read(1, Priority::DEMAND, 0, 2 * QUANTUM),
        read(2, Priority::COLD, 0, BULK),
    ]);
    s.park(1);
    assert_eq!(s.peek().unwrap().id, 2);
    assert!(s.resume(1));
    assert_eq!(step(&mut s), (1, 0));
    s.park(1);
    s.submit(Request::Cancel(1)).unwrap();
    let end = s.peek().unwrap();
    assert!(end.id == 1 && end.work == Work::End && end.last && end.len == 0);
    assert!(!s.resume(1), "its data is wanted no more");
    s.done(&end);
    assert!(!s.resume(1));
    s.submit(Request::Cancel(1)).unwrap();
    assert_eq!(step(&mut s), (2, 0));
    assert!(s.is_empty());
}

/// What was to come with it may be asked for elsewhere by then.
#[test]
fn the_end_of_what_is_cancelled_waits_for_nothing_that_is_copied() {
    let mut s = with(&[
        read(1, Priority::READ_HOT, 0, QUANTUM),
        read(2, Priority::COLD, QUANTUM, QUANTUM),
        read(3, Priority::DEMAND, 0, 1),
    ]);
    s.submit(Request::Cancel(2)).unwrap();
    let ids = std::iter::from_fn(|| (!s.is_empty()).then(|| step(&mut s).0));
    assert_eq!(ids.collect::<Vec<u64>>(), [3, 2, 1, 1]);
}

#[test]
fn promotion_only_goes_up() {
    let mut s = with(&[
        read(1, Priority::COLD, 0, QUANTUM),
        read(2, Priority::COLD, QUANTUM, QUANTUM),
    ]);
    s.submit(Request::Promote(2, Priority::DEMAND)).unwrap();
    assert_eq!(s.peek().unwrap().id, 2);
    s.submit(Request::Promote(2, Priority::CHECK)).unwrap();
    assert_eq!(s.peek().unwrap().priority, Priority::DEMAND);
    s.park(2);
    s.submit(Request::Promote(2, Priority::DEMAND)).unwrap();
    assert_eq!(s.peek().unwrap().id, 1);
    s.park(1);
    s.submit(Request::Promote(1, Priority::REST)).unwrap();
    assert!(s.resume(1));
    assert_eq!(s.peek().unwrap().priority, Priority::REST);
}

#[test]
fn a_flush_is_set_aside_while_others_go_on() {
    let mut s = with(&[
        Request::Flush(1, Priority::DEMAND),
        read(2, Priority::COLD, 0, QUANTUM),
    ]);
    let step = s.peek().unwrap();
    assert_eq!((step.id, step.work, step.last), (1, Work::Flush, true));
    s.park(1);
    assert_eq!(s.peek().unwrap().id, 2);
    assert!(s.resume(1), "somebody wants it");
    s.done(&step);
    assert_eq!((s.peek().unwrap().id, s.len()), (2, 1));
}

#[test]
fn misuse_is_found() {
    let mut s = with(&[read(5, Priority::COLD, 0, 1)]);
    for (request, misuse) in [
        (read(5, Priority::COLD, 0, 1), Misuse::Number(5)),
        (read(4, Priority::COLD, 0, 1), Misuse::Number(4)),
        (Request::Ping(5, Priority::DEMAND), Misuse::Number(5)),
        (Request::Flush(5, Priority::DEMAND), Misuse::Number(5)),
        (Request::Cancel(6), Misuse::Unknown(6)),
        (Request::Promote(9, Priority::DEMAND), Misuse::Unknown(9)),
        (read(7, Priority::COLD, DISK, 1), Misuse::Range(7)),
        (read(7, Priority::COLD, u64::MAX, 1), Misuse::Range(7)),
    ] {
        assert_eq!(s.submit(request), Err(misuse));
    }
    for id in 6.. {
        if s.is_full() {
            break;
        }
        s.submit(read(id, Priority::COLD, DISK - 1, 1)).unwrap();
    }
    assert_eq!(s.len(), limits::REQUESTS);
    assert_eq!(
        s.submit(read(9999, Priority::COLD, 0, 1)),
        Err(Misuse::TooMany)
    );
}

proptest! {
    /// Every request is answered exactly once, in quanta, each byte once and in order; and never
    /// is anything served while something more urgent could go.
    #[test]
    fn everything_is_answered_once(
        asks in vec((0..Priority::LEVELS, 1..200u64, 0..6u8), 1..60),
    ) {
        let levels = [
            Priority::DEMAND, Priority::REST, Priority::READ_AHEAD, Priority::READ_HOT,
            Priority::COLD, Priority::WRITE_HOT, Priority::CHECK,
        ];
        let mut s = Scheduler::new(DISK);
        let mut expected: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut parked: Vec<u64> = Vec::new();
        let mut ids = 1..;
        let serve = |s: &mut Scheduler, expected: &mut HashMap<u64, (u64, u64)>| {
            let Some(step) = s.peek() else { return };
            let best = s.jobs.values().filter(|j| !j.parked).map(|j| j.priority).min().unwrap();
            assert_eq!(step.priority, best);
            let (at, end) = expected.get_mut(&step.id).unwrap();
            assert!(step.offset == *at && u64::from(step.len) <= QUANTUM);
            *at += u64::from(step.len);
            assert_eq!(step.last, *at == *end);
            if step.last {
                expected.remove(&step.id);
            }
            s.done(&step);
        };
        for (level, kib, act) in asks {
            let id = ids.next().unwrap();
            s.submit(read(id, levels[level], id, kib << 10)).unwrap();
            expected.insert(id, (id, id + (kib << 10)));
            match act {
                0 => {
                    let urgent = s.peek().unwrap().id;
                    s.park(urgent);
                    parked.push(urgent);
                }
                1 => if let Some(id) = parked.pop() { assert!(s.resume(id)); },
                2 => s.submit(Request::Promote(id, levels[level / 2])).unwrap(),
                _ => serve(&mut s, &mut expected),
            }
        }
        for id in parked { s.resume(id); }
        while !s.is_empty() { serve(&mut s, &mut expected); }
        prop_assert!(expected.is_empty());
        prop_assert!(s.ready.iter().all(VecDeque::is_empty));
    }
}
