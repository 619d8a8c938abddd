//! The simulator itself: a seed is a world, and the product keeps its promises in some.

use hikkoshi_sim::hunt::{Range, failed_seeds, hunt};
use hikkoshi_sim::pair::PAIR;
use hikkoshi_sim::{Options, play};

/// A world must not depend on anything but its seed: not on the order of a hash map, not on
/// another thread, not on the time of day.
#[test]
fn a_seed_is_a_world() {
    for seed in (300..324).chain(300 | PAIR..316 | PAIR) {
        let first = play(seed, Options::default());
        let second = std::thread::spawn(move || play(seed, Options::default()));
        let second = second.join().expect("a failure is told, not thrown");
        assert_eq!(first.failure, None, "seed {seed}");
        assert_eq!(
            (first.hash, first.events),
            (second.hash, second.events),
            "seed {seed} was another world the second time"
        );
    }
}

#[test]
fn different_seeds_are_different_worlds() {
    let hash = |seed| play(seed, Options::default()).hash;
    assert_ne!(hash(1), hash(2));
}

#[test]
fn what_failed_once_does_not_fail_again() {
    let seeds = failed_seeds();
    assert!(!seeds.is_empty());
    for (seed, why) in seeds {
        let outcome = play(seed, Options::default());
        assert_eq!(outcome.failure, None, "seed {seed}: {why}");
    }
}

/// Also shows that worlds are worth living in: every kind of crash happens, and most requests are
/// answered all the same.
#[test]
fn promises_are_kept_in_a_handful_of_worlds() {
    let range = Range {
        first: 1000,
        count: Some(60),
        limit: None,
    };
    let caught = hunt(range, 2, Options::default());
    assert_eq!(caught.failed, None);
    let t = caught.tally;
    assert!(
        t.kills > 0 && t.power_cuts > 0 && t.closes > 0 && t.failed_opens > 0,
        "{t:?}"
    );
    assert!(t.answered > 1000 && t.failed * 4 < t.answered, "{t:?}");
}

/// The same of worlds of two sites: the disk changes sides in most, and some moves are given up.
#[test]
fn a_disk_moves_between_two_sites() {
    let range = Range {
        first: 1000 | PAIR,
        count: Some(60),
        limit: None,
    };
    let caught = hunt(range, 2, Options::default());
    assert_eq!(caught.failed, None);
    let t = caught.tally;
    assert!(
        t.kills > 0 && t.power_cuts > 0 && t.handoffs > 30 && t.given_up > 5,
        "{t:?}"
    );
    assert!(t.answered > 1000 && t.failed * 4 < t.answered, "{t:?}");
}
