//! Recognises sequential streams among the reads of one client connection.
//!
//! A [`Detector`] is told of every read, whether its blocks are here or not, and says when a
//! stream has got on far enough that the mover should hear of it: a stream that finds everything
//! fetched already asks nobody for anything else. It belongs to one connection and one thread;
//! there is no lock and no allocation in it, and it knows nothing of residency. What is fetched
//! ahead, and how far, is decided in `mover::ahead`.
//!
//! A stream is forwards or backwards (two reads that touch), or strided (three reads at equal
//! distances). Single reads are kept apart from recognised streams, so that random reads in
//! between, however many, do not push a stream out.

/// Streams recognised at once on one connection.
const STREAMS: usize = 8;

/// Single reads that may yet turn out to begin a stream.
const CANDIDATES: usize = 8;

/// Two reads further apart than this are not taken for two steps of one stride.
const MAX_STEP_BYTES: u64 = 4 << 20;

/// A read this close to where a stream is expected to go on belongs to it: clients send several
/// reads at once and not always in order, and file systems put a block of their own in between.
const TOLERANCE_BYTES: u64 = 128 << 10;

/// Strides that leave no more than this between two reads are sequential: fetching the gaps costs
/// less than asking for the pieces one by one.
const SEQUENTIAL_GAP_BYTES: u64 = 16 << 10;

/// The mover hears of a stream after this many more bytes were read, or earlier while it is young.
const TELL_EVERY_BYTES: u64 = 256 << 10;

/// How a stream moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Each read begins where the last one ended.
    Forward,
    /// Each read ends where the last one began.
    Backward,
    /// Reads of `len` bytes, each `step` bytes after (or before) the last one.
    Strided {
        /// From the start of one read to that of the next.
        step: i64,
        /// Bytes in one read.
        len: u32,
    },
}

/// What the mover is told of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Which stream of this detector; a number is used again only for the same stream.
    pub stream: u64,
    /// How it moves.
    pub shape: Shape,
    /// Where it is: the first byte not read yet going forwards; backwards, the byte after the last
    /// one not read yet; strided, where the next read begins.
    pub front: u64,
    /// How much the stream has read.
    pub read_bytes: u64,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    id: u64,
    shape: Shape,
    front: u64,
    /// The other end of what a sequential stream has read, and how much of that was read there.
    back: u64,
    back_bytes: u64,
    read_bytes: u64,
    told_bytes: u64,
    used_at: u64,
}

/// A read that belongs to no stream, and the step from an earlier one that was near.
#[derive(Clone, Copy, Debug, Default)]
struct Candidate {
    start: u64,
    len: u32,
    step: i64,
}

/// Recognises the streams of one connection.
#[derive(Debug)]
pub struct Detector {
    streams: [Option<Stream>; STREAMS],
    candidates: [Option<Candidate>; CANDIDATES],
    /// The stream that was read last: most reads go on where the last one did.
    latest: usize,
    next_candidate: usize,
    clock: u64,
    next_id: u64,
}

impl Stream {
    /// A read at the other end. When most of the stream was read there, that is where it goes: the
    /// first reads, sent at once, had come in the wrong order.
    fn turn(&mut self, start: u64, end: u64) -> bool {
        let (shape, back) = match self.shape {
            Shape::Forward => (Shape::Backward, self.back.min(start)),
            _ => (Shape::Forward, self.back.max(end)),
        };
        self.back = back;
        self.back_bytes += end - start;
        if self.back_bytes > self.read_bytes / 2 {
            self.shape = shape;
            std::mem::swap(&mut self.front, &mut self.back);
            self.back_bytes = 0;
        }
        true
    }
}

impl Detector {
    /// A detector that has seen nothing. Its streams are numbered from `first_id` on.
    pub fn new(first_id: u64) -> Self {
        Self {
            streams: [None; STREAMS],
            candidates: [None; CANDIDATES],
            latest: 0,
            next_candidate: 0,
            clock: 0,
            next_id: first_id,
        }
    }

    /// A read. `missing`: it must wait for the source, so telling the mover costs nothing more.
    #[inline]
    pub fn note(&mut self, start: u64, len: u32, missing: bool) -> Option<Advance> {
        self.clock += 1;
        let latest = self.latest;
        if self.step(latest, start, len) {
            return self.tell(latest, missing);
        }
        for index in 0..STREAMS {
            if index != latest && self.step(index, start, len) {
                self.latest = index;
                return self.tell(index, missing);
            }
        }
        self.note_single(start, len)
    }

    /// Moves stream `index` on if the read belongs to it.
    #[inline]
    fn step(&mut self, index: usize, start: u64, len: u32) -> bool {
        let Some(stream) = &mut self.streams[index] else {
            return false;
        };
        let end = start + u64::from(len);
        let ours = match stream.shape {
            Shape::Forward if end <= stream.back => {
                stream.back - end <= TOLERANCE_BYTES && stream.turn(start, end)
            }
            Shape::Backward if start >= stream.back => {
                start - stream.back <= TOLERANCE_BYTES && stream.turn(start, end)
            }
            Shape::Forward => {
                let ours = start.abs_diff(stream.front) <= TOLERANCE_BYTES;
                if ours {
                    stream.front = stream.front.max(end);
                }
                ours
            }
            Shape::Backward => {
                let ours = end.abs_diff(stream.front) <= TOLERANCE_BYTES;
                if ours {
                    stream.front = stream.front.min(start);
                }
                ours
            }
            Shape::Strided { step, .. } => {
                let ours = start == stream.front;
                if ours {
                    stream.front = start.saturating_add_signed(step);
                }
                ours
            }
        };
        if ours {
            stream.read_bytes += u64::from(len);
            stream.used_at = self.clock;
        }
        ours
    }

    #[inline]
    fn tell(&mut self, index: usize, missing: bool) -> Option<Advance> {
        let stream = self.streams[index].as_mut()?;
        let since = stream.read_bytes - stream.told_bytes;
        if !missing && since < TELL_EVERY_BYTES.min(stream.read_bytes / 4) {
            return None;
        }
        stream.told_bytes = stream.read_bytes;
        Some(Advance {
            stream: stream.id,
            shape: stream.shape,
            front: stream.front,
            read_bytes: stream.read_bytes,
        })
    }

    /// A read that belongs to no stream: maybe the one that makes a stream of an earlier one.
    fn note_single(&mut self, start: u64, len: u32) -> Option<Advance> {
        let end = start + u64::from(len);
        let mut nearest = MAX_STEP_BYTES + 1;
        let mut this = Candidate {
            start,
            len,
            step: 0,
        };
        for slot in &mut self.candidates {
            let Some(before) = *slot else { continue };
            let before_end = before.start + u64::from(before.len);
            let shape = if start == before_end {
                Some((Shape::Forward, end))
            } else if end == before.start {
                Some((Shape::Backward, start))
            } else if before.step != 0
                && before.start.checked_add_signed(before.step) == Some(start)
            {
                Some(strided(before.step, start, len))
            } else {
                None
            };
            if let Some((shape, front)) = shape {
                *slot = None;
                let read_bytes = u64::from(before.len) + u64::from(len);
                return self.begin(shape, front, read_bytes);
            }
            let distance = start.abs_diff(before.start);
            if distance < nearest && distance > 0 {
                nearest = distance;
                let distance = i64::try_from(distance).unwrap_or(0);
                let forwards = start > before.start;
                this.step = if forwards { distance } else { -distance };
            }
        }
        self.candidates[self.next_candidate] = Some(this);
        self.next_candidate = (self.next_candidate + 1) % CANDIDATES;
        None
    }

    /// Takes a new stream in, in place of none or of the one that was read the longest ago.
    fn begin(&mut self, shape: Shape, front: u64, read_bytes: u64) -> Option<Advance> {
        let age = |s: &Option<Stream>| s.map_or(0, |s| s.used_at);
        let index = (0..STREAMS).min_by_key(|i| age(&self.streams[*i]))?;
        self.streams[index] = Some(Stream {
            id: self.next_id,
            shape,
            front,
            back: match shape {
                Shape::Forward => front.saturating_sub(read_bytes),
                _ => front.saturating_add(read_bytes),
            },
            back_bytes: 0,
            read_bytes,
            told_bytes: 0,
            used_at: self.clock,
        });
        self.next_id += 1;
        self.latest = index;
        self.tell(index, true)
    }
}

fn strided(step: i64, start: u64, len: u32) -> (Shape, u64) {
    if step.unsigned_abs() <= u64::from(len) + SEQUENTIAL_GAP_BYTES {
        return if step > 0 {
            (Shape::Forward, start + u64::from(len))
        } else {
            (Shape::Backward, start)
        };
    }
    let front = start.saturating_add_signed(step);
    (Shape::Strided { step, len }, front)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;

    /// The streams that were told, in order, each once.
    fn shapes(reads: impl IntoIterator<Item = (u64, u32)>) -> Vec<Shape> {
        let mut detector = Detector::new(0);
        let mut seen = Vec::new();
        for (start, len) in reads {
            if let Some(advance) = detector.note(start, len, true)
                && !seen.iter().any(|(id, _)| *id == advance.stream)
            {
                seen.push((advance.stream, advance.shape));
            }
        }
        seen.into_iter().map(|(_, shape)| shape).collect()
    }

    #[test]
    fn each_direction_is_recognised() {
        let forward = (0..8).map(|n| (n * 128 * K, 128 << 10));
        assert_eq!(shapes(forward), [Shape::Forward]);
        let backward = (0..8).rev().map(|n| (n * 128 * K, 128 << 10));
        assert_eq!(shapes(backward), [Shape::Backward]);
        let step = 256 << 10;
        let strided = (0..8).map(|n| (n * 256 * K, 4096));
        assert_eq!(shapes(strided), [Shape::Strided { step, len: 4096 }]);
        let strided = (0..8).rev().map(|n| (n * 256 * K, 4096));
        let step = -step;
        assert_eq!(shapes(strided), [Shape::Strided { step, len: 4096 }]);
        // With gaps so small it is sequential.
        let dense = (0..8).map(|n| (n * 12 * K, 4096));
        assert_eq!(shapes(dense), [Shape::Forward]);
    }

    #[test]
    fn three_interleaved_streams_are_all_recognised() {
        let far = 100 << 20;
        let mixed = (0..32).flat_map(|n| {
            [
                (n * 64 * K, 64 << 10),
                (2 * far - (n + 1) * 64 * K, 64 << 10),
                (3 * far + n * 1024 * K, 4096),
            ]
        });
        let expected = [
            Shape::Forward,
            Shape::Backward,
            Shape::Strided {
                step: 1 << 20,
                len: 4096,
            },
        ];
        assert_eq!(shapes(mixed), expected);
    }

    /// Several reads in flight, whose order the client's threads change. The first two look like a
    /// stream backwards.
    #[test]
    fn a_stream_out_of_order_is_recognised() {
        let mut detector = Detector::new(0);
        let swapped = (0..64_u64).map(|n| (n ^ 1) * 32 * K);
        let told: Vec<_> = swapped
            .filter_map(|at| detector.note(at, 32 << 10, true))
            .collect();
        assert!(told.iter().all(|a| a.stream == 0), "one stream");
        assert_eq!(told[0].shape, Shape::Backward);
        assert!(told[4..].iter().all(|a| a.shape == Shape::Forward));
        assert_eq!(told.last().map(|a| a.front), Some(64 * 32 * K));
    }

    /// However many random reads come in between, the stream stays known.
    #[test]
    fn random_reads_do_not_push_a_stream_out() {
        let mut detector = Detector::new(0);
        let mut random: u64 = 1;
        let mut told = std::collections::BTreeSet::new();
        for n in 0..64 {
            if let Some(a) = detector.note(n * 64 * K, 64 << 10, false) {
                told.insert(a.stream);
            }
            for _ in 0..if n == 0 { 0 } else { 50 } {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let far = (1 << 30) + (random >> 20) / 4096 * 4096;
                assert_eq!(detector.note(far, 4096, true), None);
            }
        }
        assert_eq!(told.len(), 1);
    }

    /// What is here already is told of seldom: once in 256 KiB when a stream has grown up.
    #[test]
    fn a_stream_that_misses_nothing_is_told_of_seldom() {
        let mut detector = Detector::new(0);
        let reads = 16_384;
        let told = (0..reads).filter_map(|n| detector.note(n * 4096, 4096, false));
        let told = told.count();
        assert!((200..300).contains(&told), "told {told} times in 64 MiB");
    }
}
