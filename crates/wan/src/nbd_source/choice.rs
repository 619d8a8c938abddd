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
const PATIENCE: Duration = Duration::from_millis(500);
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
    /// Bytes per second that it has brought lately.
    pub pace: u64,
}

/// Where bulk of `len` bytes at `offset` goes: to the connection that has what is near it, unless that is
/// slow or it would be answered in less than half the time elsewhere, and then to where it is answered first. A connection
/// that is slow, because its TCP has just begun or has lost something, would otherwise keep a part of
/// the window to itself. A part of the mean counts for each, so that those that are as fast as they
/// are used are used alike.
pub(super) fn quickest(lines: &[Busy], offset: u64, len: u32) -> Option<usize> {
    let count = u64::try_from(lines.len()).unwrap_or(u64::MAX);
    let mean = mean_pace(lines);
    let least = least_pace(lines);
    let time = |index: usize| lines[index].nanos(len.into(), least);
    let best = (0..lines.len()).min_by_key(|index| time(*index))?;
    let near = usize::try_from(offset / NEAR_BYTES % count).ok()?;
    let soon = time(near) <= time(best) * 2 && lines[near].pace >= mean / 2;
    Some(if soon { near } else { best })
}

/// Which connection was given so much, before it became slow, that others would be idle long before it is, and how
/// many bytes of that they should bring instead: then all are done at the same time. `lines` are those that bulk
/// may use.
pub(super) fn overloaded(lines: &[Busy]) -> Option<(usize, u64)> {
    let least = least_pace(lines);
    let time = |index: &usize| lines[*index].nanos(0, least);
    let slow = (0..lines.len()).max_by_key(time)?;
    let quick = (0..lines.len()).min_by_key(time)?;
    // At the beginning nothing is known of any.
    if mean_pace(lines) == 0
        || time(&slow) < PATIENCE.as_nanos()
        || time(&slow) < time(&quick) * UNEVEN
    {
        return None;
    }
    let pace = |line: &Busy| u128::from(line.pace.saturating_add(least));
    let all: u128 = lines.iter().map(pace).sum();
    let load: u128 = lines.iter().map(|line| u128::from(line.load)).sum();
    let fair = u64::try_from(load * pace(&lines[slow]) / all).unwrap_or(u64::MAX);
    let over = lines[slow].load.saturating_sub(fair);
    (over > 0).then_some((slow, over))
}

impl Busy {
    /// When it would have brought `more` bytes as well, in nanoseconds.
    fn nanos(&self, more: u64, least_pace: u64) -> u128 {
        let bytes = u128::from(self.load) + u128::from(more);
        bytes * 1_000_000_000 / u128::from(self.pace.saturating_add(least_pace))
    }
}

fn mean_pace(lines: &[Busy]) -> u64 {
    let count = u64::try_from(lines.len()).unwrap_or(u64::MAX);
    lines.iter().map(|line| line.pace).sum::<u64>() / count.max(1)
}

/// What is reckoned with for each besides its pace.
fn least_pace(lines: &[Busy]) -> u64 {
    (mean_pace(lines) / 4).max(LEAST_PACE)
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
                pace: *pace,
            })
            .collect();
        let (mut together, mut last) = (0, None);
        for piece in 0..400 {
            let index = quickest(&lines, piece * PIECE, 1 << 16).expect("there are some");
            lines[index].load += PIECE;
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
        assert!(shares[3] < 40 && shares[3] > 10, "{shares:?}");
        assert_eq!(quickest(&[], 0, 1), None);
    }

    #[test]
    fn what_a_slow_connection_has_too_much_of_is_the_others() {
        let line = |load, pace| Busy { load, pace };
        let idle = line(0, 9 << 20);
        let slow = line(4 << 20, 1 << 20);
        let (index, over) = overloaded(&[idle, slow, idle, idle]).unwrap();
        // A mean of 7 MiB/s, so 2.75 of 35 MiB/s in all.
        let fair = (4 << 20) / 35 * 11 / 4;
        assert_eq!(index, 1);
        assert!(
            over.abs_diff((4 << 20) - fair) < 1 << 10,
            "{over}, {fair} stay"
        );
        // What all have to wait for alike, what is soon done, and what nothing is known of.
        let busy = line(9 << 20, 9 << 20);
        for even in [
            &[busy, line(2 << 20, 1 << 20)][..],
            &[idle, line(1 << 19, 1 << 20)],
            &[line(4 << 20, 0), line(0, 0)],
            &[slow],
            &[],
        ] {
            assert_eq!(overloaded(even), None, "{even:?}");
        }
    }

    #[test]
    fn what_is_near_goes_elsewhere_where_that_takes_half_the_time() {
        let line = |load| Busy {
            load,
            pace: 1 << 20,
        };
        assert_eq!(quickest(&[line(PIECE), line(0)], 0, 1 << 16), Some(0));
        assert_eq!(quickest(&[line(PIECE * 2), line(0)], 0, 1 << 16), Some(1));
        assert_eq!(
            quickest(&[line(PIECE * 2), line(0)], NEAR_BYTES, 1 << 16),
            Some(1)
        );
    }
}
