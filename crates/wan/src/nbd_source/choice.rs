//! Over which connection a request goes.
//!
//! Owns when bulk may use the connection that is kept for demand, and how bulk is divided among
//! connections that are not equally fast.

use std::time::{Duration, Instant};

use crate::source::Lane;

/// How long bulk must have gone on without any demand until it may use the connection kept for it, too.
/// Longer than a guest thinks between two reads of a boot, across a long link.
const LEND_AFTER: Duration = Duration::from_millis(500);

/// What a connection of which nothing is known is taken to bring, bytes per second: the beginning of
/// TCP's slow start over a long way.
const LEAST_PACE: u64 = 64 << 10;

/// Bulk of one such part of the disk keeps to one connection where that costs little time: what lies
/// together is alike, and each connection is compressed as a stream of its own.
const NEAR_BYTES: u64 = 512 << 10;

/// What a connection would need so long for, and this many times as long as another for its own, is divided anew.
const PATIENCE: Duration = Duration::from_secs(1);
const UNEVEN: u128 = 4;

/// Since when nobody has demanded anything.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    /// The last demand, or the first bulk if there was none before.
    since: Option<Instant>,
}

impl Quiet {
    /// Takes note of a request, and tells whether it is bulk that has gone on alone for a while.
    pub fn note(&mut self, lane: Lane, now: Instant) -> bool {
        if lane.is_urgent() {
            self.since = Some(now);
            return false;
        }
        self.since.get_or_insert(now);
        self.is_long(now)
    }

    /// Whether bulk has gone on alone for a while.
    pub fn is_long(&self, now: Instant) -> bool {
        let since = self.since;
        since.is_some_and(|at| now.saturating_duration_since(at) >= LEND_AFTER)
    }
}

/// What a connection has to do, and how fast it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Busy {
    /// Bytes that it would wait behind.
    pub load: u64,
    /// All that it has to bring.
    pub backlog: u64,
    /// Bytes per second that it has brought lately, once that is known.
    pub pace: Option<u64>,
}

/// Where bulk of `len` bytes at `offset` goes: to the connection that has what is near it, unless that is
/// slow or it would be answered in less than half the time elsewhere, and then to where it is answered first. A connection
/// that is slow, because its TCP has just begun or has lost something, would otherwise keep a part of
/// the window to itself. One that has less than half of the mean to do is not
/// slow, unless it brings less than an eighth of it: it brings what it is asked for. Half of the mean counts
/// for each, so that those that are as fast as they are used are used alike.
pub(super) fn quickest(lines: &[Busy], offset: u64, len: u32) -> Option<usize> {
    let count = u64::try_from(lines.len()).unwrap_or(u64::MAX);
    let half = |of: fn(&Busy) -> u64| lines.iter().map(of).sum::<u64>() / count.max(1) / 2;
    let half_pace = half(|line| line.pace.unwrap_or(0));
    let time = |line: &Busy| {
        let pace = line.pace.unwrap_or(0) + half_pace.max(LEAST_PACE);
        nanos(u128::from(line.load) + u128::from(len), pace)
    };
    let best = (0..lines.len()).min_by_key(|index| time(&lines[*index]))?;
    let index = usize::try_from(offset / NEAR_BYTES % count).ok()?;
    let near = &lines[index];
    let pace = near.pace.unwrap_or(0);
    let slow =
        pace < half_pace && (near.backlog > half(|line| line.backlog) || pace < half_pace / 4);
    let soon = time(near) <= time(&lines[best]) * 2 && !slow;
    Some(if soon { index } else { best })
}

/// Which connection was given so much, before it became slow, that others would be idle long before it is, and how
/// many bytes of that they should bring instead: then all are done at the same time. The first `spared` ones are for
/// nothing else than they have.
pub(super) fn overloaded(lines: &[Busy], spared: usize) -> Option<(usize, u64)> {
    let known = lines.iter().filter_map(|line| line.pace);
    let count = u64::try_from(known.clone().count()).unwrap_or(u64::MAX);
    let mean = known.sum::<u64>().checked_div(count)?;
    // What nothing is known of is as fast as the others.
    let pace = |line: &Busy| line.pace.unwrap_or(mean).max(LEAST_PACE);
    let time = |line: &Busy| nanos(line.load.into(), pace(line));
    let (_, slow) = (0..lines.len())
        .filter(|index| lines[*index].pace.is_some())
        .map(|index| (time(&lines[index]), index))
        .max()?;
    let helpers = (spared.min(lines.len())..lines.len()).filter(|index| *index != slow);
    let quick = helpers.clone().map(|index| time(&lines[index])).min()?;
    let long = time(&lines[slow]);
    if long < PATIENCE.as_nanos() || long < quick * UNEVEN {
        return None;
    }
    let together = || helpers.clone().chain([slow]).map(|index| &lines[index]);
    let load: u128 = together().map(|line| u128::from(line.load)).sum();
    let all: u128 = together().map(|line| u128::from(pace(line))).sum();
    let fair = load * u128::from(pace(&lines[slow])) / all;
    let over = lines[slow]
        .load
        .saturating_sub(u64::try_from(fair).unwrap_or(u64::MAX));
    (over > 0).then_some((slow, over))
}

fn nanos(bytes: u128, per_second: u64) -> u128 {
    bytes * 1_000_000_000 / u128::from(per_second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_lent_after_a_quiet_time_and_taken_back_at_once() {
        let (mut quiet, start) = (Quiet::default(), Instant::now());
        let ms = |n| start + Duration::from_millis(n);
        assert!(!quiet.note(Lane::Bulk, ms(0)));
        assert!(!quiet.note(Lane::Ahead, ms(499)));
        assert!(quiet.note(Lane::Bulk, ms(500)));
        assert!(!quiet.note(Lane::Demand, ms(600)));
        assert!(!quiet.note(Lane::Bulk, ms(700)));
        assert!(!quiet.note(Lane::Rest, ms(1099)));
        assert!(!quiet.note(Lane::Late, ms(1598)));
        assert!(quiet.note(Lane::Late, ms(1599)));
    }

    const PIECE: u64 = 64 << 10;

    /// How many of 400 pieces, one behind the other, each gets, while all of them bring what they can; and how
    /// many stayed with the one before.
    fn divided(paces: &[u64]) -> (Vec<u64>, usize) {
        let mut lines: Vec<Busy> = paces
            .iter()
            .map(|pace| Busy {
                load: 0,
                backlog: 0,
                pace: Some(*pace),
            })
            .collect();
        let (mut together, mut last) = (0, None);
        for piece in 0..400 {
            let index = quickest(&lines, piece * PIECE, 1 << 16).expect("there are some");
            lines[index].load += PIECE;
            lines[index].backlog += PIECE;
            together += usize::from(last.replace(index) == Some(index));
        }
        (
            lines.iter().map(|line| line.load / PIECE).collect(),
            together,
        )
    }

    #[test]
    fn equal_connections_get_the_same_and_a_slow_one_little() {
        for paces in [[10 << 20; 4], [0; 4]] {
            let (shares, together) = divided(&paces);
            assert_eq!(shares.iter().sum::<u64>(), 400);
            assert!(
                shares.iter().all(|share| (90..=110).contains(share)),
                "{shares:?}"
            );
            assert!(together > 300, "{together}");
        }
        let (shares, _) = divided(&[10 << 20, 10 << 20, 10 << 20, 1 << 20]);
        assert!(shares[3] < 60 && shares[3] > 10, "{shares:?}");
        assert_eq!(quickest(&[], 0, 1), None);
    }

    #[test]
    fn what_a_slow_connection_has_too_much_of_is_the_others() {
        let line = |load, pace| Busy {
            load,
            backlog: load,
            pace,
        };
        let idle = line(0, Some(9 << 20));
        let slow = line(4 << 20, Some(1 << 20));
        let fresh = line(0, None);
        // By pace: 1 of 28, of 14 where one is unknown and as fast as the mean, of 10.
        for (lines, spared, of) in [
            (&[idle, slow, idle, idle][..], 0, 28),
            (&[idle, slow, idle, idle], 1, 19),
            (&[slow, idle], 1, 10),
            (&[fresh, slow], 0, 2),
        ] {
            let index = lines.iter().position(|line| line.load > 0).unwrap();
            let over = (4 << 20) - (4 << 20) / of;
            let found = overloaded(lines, spared).unwrap();
            assert_eq!(found.0, index);
            assert!(found.1.abs_diff(over) <= 1, "{found:?}, {over}");
        }
        // What all have to wait for alike, what is soon done, what nothing is known of, and where there is no other.
        let busy = line(9 << 20, Some(9 << 20));
        for (even, spared) in [
            (&[busy, line(2 << 20, Some(1 << 20))][..], 0),
            (&[idle, line((1 << 20) - 1, Some(1 << 20))], 0),
            (&[line(4 << 20, None), idle], 0),
            (&[line(4 << 20, None), fresh], 0),
            (&[idle, slow], 1),
            (&[slow], 0),
            (&[], 0),
        ] {
            assert_eq!(overloaded(even, spared), None, "{even:?}");
        }
    }

    #[test]
    fn what_is_near_goes_elsewhere_where_that_takes_half_the_time() {
        let line = |load| Busy {
            load,
            backlog: load,
            pace: Some(1 << 20),
        };
        assert_eq!(quickest(&[line(PIECE - 1), line(0)], 0, 1 << 16), Some(0));
        assert_eq!(quickest(&[line(PIECE * 2), line(0)], 0, 1 << 16), Some(1));
        assert_eq!(
            quickest(&[line(PIECE * 2), line(0)], NEAR_BYTES, 1 << 16),
            Some(1)
        );
    }

    /// What is near goes to one that has brought little because it was asked for little, and not to one that
    /// has as much to do as the other, or brings next to nothing.
    #[test]
    fn a_connection_that_has_little_to_do_is_not_slow() {
        for (backlog, pace, wanted) in [
            (PIECE, 1 << 20, 0),
            (PIECE * 4, 1 << 20, 1),
            (PIECE, 1 << 19, 1),
        ] {
            let little = Busy {
                load: PIECE,
                backlog,
                pace: Some(pace),
            };
            let much = Busy {
                load: PIECE * 4,
                backlog: PIECE * 4,
                pace: Some(8 << 20),
            };
            let index = quickest(&[little, much], 0, 1 << 16);
            assert_eq!(index, Some(wanted), "{little:?}");
        }
    }
}
