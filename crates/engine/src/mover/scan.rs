//! What the source has said of holes and zeroes, and what it is asked next.
//!
//! Owns which parts of the disk are known, and the questions under way: several at once, because
//! one at a time would cost a round trip for each GiB. Where the copy will be first is asked first:
//! hot ranges in their order, then the disk from its start to its end. Short questions tell early
//! where data is; while answers are complete, the next ones are twice as long and one more is asked
//! at once. Nothing of the background copy goes where the scan has not been, except before the first
//! answer, when the link has nothing else to do: what is hot, and the beginning of the disk.

use std::collections::BTreeMap;

use crate::geometry::{BlockRange, Geometry};

/// The shortest and the longest part of the disk that one question covers.
const MIN_SPAN_BYTES: u64 = 64 << 20;
const MAX_SPAN_BYTES: u64 = 1 << 30;

/// How much of the disk's start is fetched before anything is known of it, so that a move does not
/// begin with an idle round trip: what four fresh TCP connections send in their first two, ten segments
/// each and then twenty. Of a disk that begins with a hole so much may cross the link in vain.
const BLIND_BYTES: u64 = 256 << 10;

/// Questions under way at once: at first, and at most. At 200 ms the latter scan 4 TiB in half a
/// minute; no source is asked more at once than a client of ours may have in flight.
const FIRST_QUESTIONS: usize = 4;
const MAX_QUESTIONS: usize = 32;

/// Ranges of blocks without overlaps; neighbours are one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn insert(&mut self, range: BlockRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&s, &e)) = self.0.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.0.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.0.insert(start, end);
    }

    fn remove(&mut self, range: BlockRange) {
        while let Some((&s, &e)) = self.0.range(..range.end).next_back() {
            if e <= range.start || range.is_empty() {
                return;
            }
            self.0.remove(&s);
            if range.end < e {
                self.0.insert(range.end, e);
            }
            if s < range.start {
                self.0.insert(s, range.start);
                return;
            }
        }
    }

    /// Where the range ends that `at` is in; `at` if it is in none.
    fn run_end(&self, at: u64) -> u64 {
        let before = self.0.range(..=at).next_back();
        before.map_or(at, |(_, &end)| end.max(at))
    }

    /// The first part of `within` that is in no range.
    fn gap(&self, within: BlockRange) -> Option<BlockRange> {
        let start = self.run_end(within.start);
        let next = self.0.range(start..).next();
        let end = next.map_or(within.end, |(&s, _)| s.min(within.end));
        (start < end).then(|| BlockRange::new(start, end))
    }
}

/// The scan of a source's extents.
#[derive(Debug)]
pub(super) struct Scan {
    disk: BlockRange,
    /// What was answered, or will never be.
    known: Ranges,
    /// What is known, and what is being asked.
    asked: Ranges,
    questions: Vec<BlockRange>,
    /// The bounds of a question, and how long the next one is, in blocks.
    spans: (u64, u64),
    span: u64,
    /// How many may be under way.
    at_once: usize,
    /// Up to this block all counts as data until the source has said anything.
    blind_to: u64,
    /// Hot ranges before this one are known or asked.
    hot_next: usize,
    answered: bool,
}

impl Scan {
    pub fn new(geometry: Geometry, has_extents: bool) -> Self {
        let blocks = |bytes: u64| (bytes / geometry.block_bytes()).max(1);
        let mut known = Ranges::default();
        if !has_extents {
            // All of it counts as data.
            known.insert(geometry.all());
        }
        Self {
            disk: geometry.all(),
            asked: known.clone(),
            known,
            questions: Vec::new(),
            spans: (blocks(MIN_SPAN_BYTES), blocks(MAX_SPAN_BYTES)),
            span: blocks(MIN_SPAN_BYTES),
            at_once: FIRST_QUESTIONS,
            blind_to: blocks(BLIND_BYTES).min(geometry.blocks()),
            hot_next: 0,
            answered: !has_extents,
        }
    }

    /// Whether nothing is left to ask or to wait for.
    pub fn is_done(&self) -> bool {
        self.known.run_end(self.disk.start) >= self.disk.end
    }

    /// How far everything from `at` on is known.
    pub fn known_to(&self, at: u64) -> u64 {
        self.known.run_end(at)
    }

    /// The same for the pass along the disk, which begins before anything is known.
    pub fn cold_known_to(&self, at: u64) -> u64 {
        let known_to = self.known_to(at);
        if self.answered {
            known_to
        } else {
            known_to.max(self.blind_to)
        }
    }

    /// The same for what is read often: until the source has said anything it counts as data.
    pub fn hot_known_to(&self, at: u64) -> u64 {
        if self.answered {
            self.known_to(at)
        } else {
            self.disk.end
        }
    }

    /// Hot ranges are other ones from now on.
    pub fn order_changed(&mut self) {
        self.hot_next = 0;
    }

    /// The next question, if one may be asked now.
    pub fn next_question(&mut self, hot: &[BlockRange]) -> Option<BlockRange> {
        if self.questions.len() >= self.at_once {
            return None;
        }
        let question = self.hot_question(hot).or_else(|| self.next_in_row())?;
        self.asked.insert(question);
        self.questions.push(question);
        Some(question)
    }

    /// What is around the hottest range that nothing is known of: hot regions are often close to
    /// one another.
    fn hot_question(&mut self, hot: &[BlockRange]) -> Option<BlockRange> {
        while let Some(range) = hot.get(self.hot_next) {
            if let Some(gap) = self.asked.gap(range.intersection(self.disk)) {
                let step = self.spans.0;
                let end = (gap.start / step + 1) * step;
                let around = BlockRange::new(gap.start, end.min(self.disk.end));
                return self.asked.gap(around);
            }
            self.hot_next += 1;
        }
        None
    }

    fn next_in_row(&self) -> Option<BlockRange> {
        let gap = self.asked.gap(self.disk)?;
        Some(BlockRange::new(
            gap.start,
            gap.end.min(gap.start + self.span),
        ))
    }

    /// The source has answered as much as `range` of the question that begins where it does.
    /// False if nobody asked.
    pub fn answer(&mut self, range: BlockRange) -> bool {
        let Some(question) = self.take(range.start) else {
            return false;
        };
        self.answered = true;
        self.known.insert(range);
        if range.end < question.end {
            self.asked.remove(BlockRange::new(range.end, question.end));
            self.hot_next = 0;
            self.span = range.len().clamp(self.spans.0, self.spans.1);
        } else {
            self.span = (self.span * 2).min(self.spans.1);
            self.at_once = (self.at_once + 1).min(MAX_QUESTIONS);
        }
        true
    }

    /// A question will not be answered. With `for_good` all of it counts as data; else it is to be
    /// asked again.
    pub fn unanswered(&mut self, range: BlockRange, for_good: bool) {
        let Some(question) = self.take(range.start) else {
            return;
        };
        if for_good {
            self.answered = true;
            self.known.insert(question);
        } else {
            self.asked.remove(question);
            self.hot_next = 0;
        }
    }

    fn take(&mut self, start: u64) -> Option<BlockRange> {
        let index = self.questions.iter().position(|q| q.start == start)?;
        Some(self.questions.swap_remove(index))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn scan(gib: u64) -> Scan {
        Scan::new(Geometry::new(gib << 30, 4096).unwrap(), true)
    }

    fn questions(scan: &mut Scan, hot: &[BlockRange]) -> Vec<BlockRange> {
        std::iter::from_fn(|| scan.next_question(hot)).collect()
    }

    /// 4 TiB of which everything is told at once: the rounds are few, and at most so many
    /// questions are under way as the bound says.
    #[test]
    fn a_large_empty_disk_takes_few_round_trips() {
        let mut scan = scan(4096);
        let mut rounds = 0;
        while !scan.is_done() {
            let asked = questions(&mut scan, &[]);
            assert!(!asked.is_empty() && asked.len() <= MAX_QUESTIONS);
            asked.into_iter().for_each(|q| assert!(scan.answer(q)));
            rounds += 1;
        }
        assert!(rounds < 140, "{rounds} round trips for 4096 GiB");
    }

    #[test]
    fn hot_ranges_are_asked_first_and_in_their_order() {
        let mut scan = scan(64);
        let step = MIN_SPAN_BYTES / 4096;
        let at = |n: u64| BlockRange::new(n * step + 256, n * step + 512);
        let asked = questions(&mut scan, &[at(900), at(7)]);
        let starts: Vec<u64> = asked.iter().map(|q| q.start).collect();
        assert_eq!(starts, [900 * step + 256, 7 * step + 256, 0, step]);
        assert_eq!(asked[0].end, 901 * step);
        assert!(scan.answer(asked[0]));
        assert_eq!(scan.hot_known_to(at(900).start), 901 * step);
        assert_eq!(scan.hot_known_to(at(7).start), at(7).start);
        assert_eq!(scan.known_to(0), 0);
    }

    #[test]
    fn what_an_answer_leaves_out_is_asked_again_at_once() {
        let mut scan = scan(64);
        let first = questions(&mut scan, &[])[0];
        assert!(scan.answer(BlockRange::new(0, 10)));
        let again = scan.next_question(&[]).unwrap();
        assert_eq!(again, BlockRange::new(10, first.end));
        scan.unanswered(again, false);
        assert_eq!(scan.next_question(&[]).unwrap(), again);
        scan.unanswered(again, true);
        assert_eq!(scan.known_to(0), first.end);
        assert!(!scan.answer(again), "nobody asks that any more");
    }

    proptest! {
        /// Beside a plain set of blocks.
        #[test]
        fn ranges_are_a_set(steps in prop::collection::vec((any::<bool>(), 0_u64..64, 0_u64..20), 0..60)) {
            let (mut ranges, mut set) = (Ranges::default(), [false; 84]);
            for (add, start, len) in steps {
                let range = BlockRange::new(start, start + len);
                if add { ranges.insert(range) } else { ranges.remove(range) }
                for block in start..start + len {
                    set[usize::try_from(block).unwrap()] = add;
                }
                let mut last = None;
                for (&s, &e) in &ranges.0 {
                    prop_assert!(s < e && last.is_none_or(|last| last < s));
                    last = Some(e);
                }
                for at in 0..84_u64 {
                    let rest = &set[usize::try_from(at).unwrap()..];
                    let run = rest.iter().take_while(|b| **b).count();
                    prop_assert_eq!(ranges.run_end(at), at + run as u64);
                    let gap = ranges.gap(BlockRange::new(at, 84));
                    let free = rest[run..].iter().take_while(|b| !**b).count() as u64;
                    let from = at + run as u64;
                    prop_assert_eq!(gap, (free > 0).then(|| BlockRange::new(from, from + free)));
                }
            }
        }
    }
}
