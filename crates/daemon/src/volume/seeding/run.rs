//! One walk through the disk, and what of it is in a seed.
//!
//! Windows of a few MiB are asked about first, by hashes of 64 KiB each; where one is in no seed,
//! it is asked about once more by the block, and what is in no seed then is for the background copy
//! to fetch. Several windows are under way at once, so that a long way to the source costs nothing.
//!
//! What is installed is the very buffer that was hashed, so that a seed that changes meanwhile does
//! no harm; and it is installed by the rule for what was fetched: only where blocks are missing
//! still, under the lock of their range.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use hikkoshi_engine::geometry::{BlockRange, ByteRange};
use hikkoshi_engine::mover::{Phase, SeedStep};
use hikkoshi_engine::seeding::{Advice, Gauge, REST, Why};
use hikkoshi_wan::transport::limits;
use hikkoshi_wan::transport::message::{Hash, hashes_of};
use hikkoshi_wan::{Fetched, Hashes, Lane, SourceError, SourceErrorKind};

use super::super::Volume;
use super::super::relocation::Relocation;
use super::indexing::{Built, fine_grain};
use super::{Stage, reason};

/// The grain of the first look: 32 bytes of hash for it, half a thousandth.
const COARSE_BYTES: u32 = limits::MAX_GRAIN_BYTES;

/// What one question covers. The answer has 2 KiB.
const WINDOW_BYTES: u64 = 4 << 20;

/// Windows under way at once. One is asked about twice, unless all of it is found at once, and waits its turn here in
/// between: 512 MiB keep this thread busy at 200 ms.
const MAX_WINDOWS: usize = 128;

/// Questions under way, those by the block included: a dozen for each window where 1 % of the blocks
/// differ, scattered.
const MAX_QUESTIONS: usize = 1536;

/// The most that one question by the block covers: 2048 hashes of the smallest blocks.
const FINE_PIECE_BYTES: u64 = 1 << 20;

/// Bytes of a question and its answer beside the hashes, about.
const HEADER_BYTES: u64 = 128;

/// What is read, hashed and installed at once. The image itself is read under the lock of the
/// range, which guests' writes may wait for.
pub(super) const STEP_BYTES: u64 = 1 << 20;
const OWN_STEP_BYTES: u64 = 256 << 10;

/// What one fetch of a measurement covers.
const MEASURE_PIECE_BYTES: u64 = 512 << 10;

/// So much was looked for by the block before it is judged, and less than one in so many bytes
/// found is not worth a hash for each.
const FINE_JUDGED_BYTES: u64 = 8 << 20;
const FINE_LEAST_SHARE: u64 = 64;

/// How long to wait before asking again whether more may be asked.
const PATIENCE: Duration = Duration::from_millis(20);

/// The rest after the image could not take what was found.
const STORE_REST: Duration = Duration::from_secs(5);

/// How much less than others this thread wants the processor.
const NICENESS: i32 = 10;

/// What a question is about.
#[derive(Clone, Copy, Debug)]
struct Piece {
    window: BlockRange,
    bytes: ByteRange,
    grain: u32,
}

/// A window that was begun.
struct Open {
    window: BlockRange,
    /// Questions of it that are asked or are to be asked.
    left: usize,
    found: u64,
}

/// A plain fetch that is measured.
struct Measuring {
    window: BlockRange,
    since: Duration,
    left: usize,
    bytes: u64,
}

enum Answer {
    Hashes(Piece, Result<Hashes, SourceError>),
    Plain {
        range: BlockRange,
        at: Duration,
        outcome: Result<Fetched, SourceError>,
    },
}

pub(super) struct Run<'a> {
    pub(super) volume: &'a Volume,
    pub(super) relocation: &'a Arc<Relocation>,
    stop: &'a AtomicBool,
    pub(super) gauge: Gauge,
    answers: Receiver<Answer>,
    answer_to: Sender<Answer>,
    under_way: usize,
    again: VecDeque<Piece>,
    open: Vec<Open>,
    measuring: Option<Measuring>,
    pub(super) at_end: bool,
    /// The seed that had something last is looked in first.
    best: usize,
    /// Looked for and found by the block.
    pub(super) fine: (u64, u64),
    /// Looked for in all, and not found at the same offset.
    pub(super) searched: u64,
    pub(super) missed: u64,
    /// The index, once it is used.
    pub(super) index: Option<Arc<Built>>,
    buffer: Vec<u8>,
}

impl<'a> Run<'a> {
    pub fn new(volume: &'a Volume, relocation: &'a Arc<Relocation>, stop: &'a AtomicBool) -> Self {
        let (answer_to, answers) = channel();
        Self {
            volume,
            relocation,
            stop,
            gauge: Gauge::new(volume.geometry.size_bytes(), volume.seeding.always),
            answers,
            answer_to,
            under_way: 0,
            again: VecDeque::new(),
            open: Vec::new(),
            measuring: None,
            at_end: false,
            best: 0,
            fine: (0, 0),
            searched: 0,
            missed: 0,
            index: None,
            buffer: Vec::new(),
        }
    }

    /// Looks for everything that is missing; returns when that was done.
    pub fn run(mut self) {
        // For this thread alone. Guests' requests come first; that it fails hurts nobody.
        let _ = rustix::process::setpriority_process(None, NICENESS);
        while !self.is_over() {
            if self.source_has_no_hashes() {
                self.rest(
                    "the source speaks plain NBD, which has no hashes; everything is fetched",
                    REST,
                );
                continue;
            }
            self.take_up_index();
            match self.advice() {
                Advice::Rest(Why::Barren) if self.volume.seeding.index.is_awaited() => {
                    let why =
                        "next to nothing is at the same offset of one; they are being indexed";
                    self.rest(why, REST);
                    continue;
                }
                Advice::Rest(why) => {
                    self.rest(&reason(why), REST);
                    continue;
                }
                Advice::Measure(bytes) => self.measure(bytes),
                Advice::Look => while !self.relocation.is_store_behind() && self.ask_next() {},
            }
            let all = self.at_end && self.open.is_empty() && self.measuring.is_none();
            // What is missing is fetched meanwhile.
            if all && !self.volume.seeding.index.is_awaited() && !self.index_came() {
                return;
            }
            if let Ok(answer) = self.answers.recv_timeout(PATIENCE) {
                self.under_way -= 1;
                if let Err(e) = self.take(answer) {
                    let why = format!("the image did not take what was found: {e}");
                    self.rest(&why, STORE_REST);
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        let complete = || self.relocation.with_mover(|m| m.phase()) == Phase::Complete;
        self.stop.load(Ordering::Acquire) || self.relocation.is_retired() || complete()
    }

    fn source_has_no_hashes(&self) -> bool {
        let source = &self.relocation.source;
        source.is_connected() && !source.speaks_frames()
    }

    fn advice(&self) -> Advice {
        let advice = self.gauge.advice(self.volume.now());
        // Under a cap the link's speed is no matter: what is found goes without it.
        let capped = || {
            let limits = self
                .relocation
                .with_mover(|m| (m.limit(), m.common_limit()));
            limits != (None, None)
        };
        match advice {
            Advice::Measure(_) | Advice::Rest(Why::FastLink { .. }) if capped() => Advice::Look,
            advice => advice,
        }
    }

    /// Lets the background copy take everything for a while.
    fn rest(&mut self, why: &str, how_long: Duration) {
        self.volume.seeding_is(Stage::Resting(why.to_owned()));
        self.again.clear();
        let windows = self.open.drain(..).map(|open| open.window);
        let measured = self.measuring.take().map(|m| m.window);
        for window in windows.chain(measured) {
            self.relocation
                .drive(|m, now, out| m.seed_passed(now, window, &self.relocation.residency, out));
        }
        self.resting(true);
        let until = self.volume.now() + how_long;
        while self.volume.now() < until && !self.is_over() && !self.index_came() {
            // What was asked before comes too late: the background copy has it.
            if let Ok(answer) = self.answers.recv_timeout(PATIENCE) {
                self.under_way -= 1;
                self.count_wire(&answer);
            }
        }
        self.gauge.rested();
        self.fine = (0, 0);
        if !self.source_has_no_hashes() {
            self.resting(false);
        }
    }

    fn resting(&self, resting: bool) {
        self.relocation
            .drive(|m, now, out| m.seed_rest(now, resting, &self.relocation.residency, out));
    }

    fn count_wire(&self, answer: &Answer) {
        let bytes = match answer {
            Answer::Hashes(_, Ok(hashes)) => hashes.wire_bytes,
            Answer::Plain { outcome, .. } => outcome.as_ref().map_or(0, |f| f.wire_bytes),
            Answer::Hashes(_, Err(_)) => 0,
        };
        let counted = &self.relocation.traffic.wire_bytes;
        counted.fetch_add(bytes, Ordering::Relaxed);
    }

    // Asking

    /// Asks about the next piece, if it may be asked now.
    fn ask_next(&mut self) -> bool {
        if self.ask_again() {
            return true;
        }
        if self.at_end || self.under_way >= MAX_QUESTIONS || self.open.len() >= MAX_WINDOWS {
            return false;
        }
        let geometry = self.volume.geometry;
        let most = WINDOW_BYTES / geometry.block_bytes();
        let cost = WINDOW_BYTES / u64::from(COARSE_BYTES) * 32 + HEADER_BYTES;
        match self.next_window(most, cost) {
            SeedStep::Look(window) => {
                self.volume.seeding_is(Stage::Looking);
                self.open.push(Open {
                    window,
                    left: 1,
                    found: 0,
                });
                self.ask(Piece {
                    window,
                    bytes: geometry.bytes(window),
                    grain: COARSE_BYTES,
                });
                true
            }
            SeedStep::Wait => {
                if self.under_way == 0 {
                    self.gauge.interrupted();
                }
                false
            }
            SeedStep::End => {
                self.at_end = true;
                false
            }
        }
    }

    /// Asks about a piece that is left over from an earlier answer.
    fn ask_again(&mut self) -> bool {
        if self.again.is_empty()
            || self.under_way >= MAX_QUESTIONS
            || !self.relocation.with_mover_at(|m, now| m.may_seed(now))
        {
            return false;
        }
        let piece = self.again.pop_front();
        piece.is_some_and(|piece| {
            self.ask(piece);
            true
        })
    }

    fn next_window(&self, most: u64, cost: u64) -> SeedStep {
        let residency = &self.relocation.residency;
        self.relocation
            .with_mover_at(|m, now| m.seed_next(now, most, cost, residency))
    }

    fn ask(&mut self, piece: Piece) {
        self.under_way += 1;
        let answer_to = self.answer_to.clone();
        let (relocation, believed) = (Arc::clone(self.relocation), self.relocation.belief());
        let done = move |outcome| {
            let outcome = relocation.vouched(believed, outcome);
            // Nobody listens any more when this was stopped.
            let _ = answer_to.send(Answer::Hashes(piece, outcome));
        };
        let len = u32::try_from(piece.bytes.len()).expect("pieces are a few MiB");
        let source = &self.relocation.source;
        source.hashes(
            Lane::Bulk,
            piece.bytes.start,
            len,
            piece.grain,
            Box::new(done),
        );
    }

    /// Fetches so much plainly, once nothing else is under way.
    pub(super) fn measure(&mut self, bytes: u64) {
        while self.measuring.is_none() && self.ask_again() {}
        if self.measuring.is_some() || self.under_way > 0 || self.at_end {
            return;
        }
        let geometry = self.volume.geometry;
        let most = bytes / geometry.block_bytes();
        let window = match self.next_window(most, 0) {
            SeedStep::Look(window) => window,
            SeedStep::Wait => return,
            SeedStep::End => {
                self.at_end = true;
                return;
            }
        };
        let len = geometry.bytes(window).len();
        let admitted = self
            .relocation
            .with_mover_at(|m, now| m.admit_check(now, len, true));
        if !admitted {
            self.relocation
                .drive(|m, now, out| m.seed_passed(now, window, &self.relocation.residency, out));
            return;
        }
        let pieces = steps(
            geometry.bytes(window),
            MEASURE_PIECE_BYTES.max(geometry.block_bytes()),
        );
        self.measuring = Some(Measuring {
            window,
            since: self.volume.now(),
            left: pieces.len(),
            bytes: 0,
        });
        for piece in pieces {
            self.under_way += 1;
            let (answer_to, clock) = (self.answer_to.clone(), Arc::clone(&self.volume.clock));
            let (range, since) = (geometry.covering(piece), clock());
            let (relocation, believed) = (Arc::clone(self.relocation), self.relocation.belief());
            let done = move |outcome| {
                let outcome = relocation.vouched(believed, outcome);
                let (at, len) = (clock(), piece.len());
                // Here, whether anybody waits for the answer still or not: else its place in the window
                // would be lost.
                relocation.with_mover_at(|m, now| match &outcome {
                    Ok(_) => m.check_landed(now, at.saturating_sub(since), len),
                    Err(_) => m.check_lost(len),
                });
                let _ = answer_to.send(Answer::Plain { range, at, outcome });
            };
            let len = u32::try_from(piece.len()).expect("pieces are half a MiB or a block");
            let source = &self.relocation.source;
            source.read(Lane::Bulk, piece.start, len, Box::new(done));
        }
    }

    // Answers

    fn take(&mut self, answer: Answer) -> io::Result<()> {
        self.count_wire(&answer);
        match answer {
            Answer::Hashes(piece, outcome) => self.take_hashes(piece, outcome),
            Answer::Plain { range, at, outcome } => self.take_plain(range, at, outcome),
        }
    }

    fn take_hashes(
        &mut self,
        piece: Piece,
        outcome: Result<Hashes, SourceError>,
    ) -> io::Result<()> {
        if !self.open.iter().any(|open| open.window == piece.window) {
            // From before a rest.
            return Ok(());
        }
        match outcome {
            Ok(hashes) => self.look(piece, &hashes.hashes)?,
            // What cannot be read there is the background copy's to tell of.
            Err(error) if error.kind == SourceErrorKind::Refused => {}
            Err(_) => {
                // Whoever cares for the connection says why. A connection that dies at each
                // question must not be asked in a hurry.
                self.again.push_front(piece);
                self.gauge.interrupted();
                std::thread::sleep(PATIENCE);
                return Ok(());
            }
        }
        self.piece_done(piece.window);
        Ok(())
    }

    fn piece_done(&mut self, window: BlockRange) {
        let Some(at) = self.open.iter().position(|open| open.window == window) else {
            return;
        };
        self.open[at].left -= 1;
        if self.open[at].left > 0 {
            return;
        }
        let open = self.open.swap_remove(at);
        let bytes = self.volume.geometry.bytes(window).len();
        self.gauge.looked(self.volume.now(), bytes, open.found);
        self.relocation
            .drive(|m, now, out| m.seed_passed(now, window, &self.relocation.residency, out));
    }

    /// Takes from the seeds what has these hashes; what has not is asked about by the block.
    fn look(&mut self, piece: Piece, there: &[Hash]) -> io::Result<()> {
        let geometry = self.volume.geometry;
        let fine_grain = fine_grain(geometry.block_bytes());
        let mut wanted = self.wanted(piece, there);
        let wanted_bytes = bytes_of(&wanted);
        let mut found = 0;
        let seeds = self.volume.seeding.images().len();
        let first = self.best;
        for seed in (0..seeds).map(|n| (first + n) % seeds) {
            if wanted.is_empty() {
                break;
            }
            let before = found;
            found += self.look_in(seed, piece.grain, &mut wanted)?;
            if found > before {
                self.best = seed;
            }
        }
        let is_fine = piece.grain == fine_grain;
        if is_fine {
            self.missed += bytes_of(&wanted);
            found += self.look_elsewhere(piece.grain, &mut wanted)?;
        }
        if piece.grain == COARSE_BYTES {
            self.searched += wanted_bytes;
        }
        self.may_want_index();
        if let Some(open) = self.open.iter_mut().find(|o| o.window == piece.window) {
            open.found += found;
        }
        if is_fine {
            self.fine.0 += wanted_bytes;
            self.fine.1 += found;
            return Ok(());
        }
        if self.fine.0 >= FINE_JUDGED_BYTES && self.fine.1 < self.fine.0 / FINE_LEAST_SHARE {
            // Whole grains differ, or none: a hash for each block is mostly for nothing. One grain
            // in nine or so is still asked about.
            self.fine.0 -= (wanted_bytes / 8).min(self.fine.0);
            self.missed += bytes_of(&wanted);
            return Ok(());
        }
        for run in joined(wanted.iter().map(|unit| unit.bytes)) {
            for bytes in steps(run, FINE_PIECE_BYTES) {
                if let Some(open) = self.open.iter_mut().find(|o| o.window == piece.window) {
                    open.left += 1;
                }
                self.again.push_back(Piece {
                    window: piece.window,
                    bytes,
                    grain: fine_grain,
                });
            }
        }
        Ok(())
    }

    /// The parts of a piece that are missing still, each with its hashes: a grain or, where that is
    /// longer, a block.
    fn wanted<'h>(&self, piece: Piece, there: &'h [Hash]) -> Vec<Unit<'h>> {
        let geometry = self.volume.geometry;
        let grain = u64::from(piece.grain);
        let unit_bytes = grain.max(geometry.block_bytes());
        let per_unit = usize::try_from(unit_bytes / grain).unwrap_or(1);
        let units = steps(piece.bytes, unit_bytes).into_iter();
        let with_hashes = units.zip(there.chunks(per_unit));
        let with_hashes = with_hashes.map(|(bytes, hashes)| Unit { bytes, hashes });
        with_hashes
            .filter(|unit| {
                let blocks = geometry.covering(unit.bytes);
                let residency = &self.relocation.residency;
                residency.next_missing(blocks.start, blocks.end).is_some()
            })
            .collect()
    }

    /// Takes what a seed has of `wanted`, and out of it. Tells how many bytes came.
    fn look_in(&mut self, seed: usize, grain: u32, wanted: &mut Vec<Unit<'_>>) -> io::Result<u64> {
        let volume = self.volume;
        let image = &volume.seeding.images()[seed];
        let step = if image.is_own() {
            OWN_STEP_BYTES
        } else {
            STEP_BYTES
        };
        let mut came = 0;
        let mut rest: Vec<Unit<'_>> = Vec::new();
        let mut units = std::mem::take(wanted).into_iter().peekable();
        while let Some(first) = units.next() {
            let mut run = vec![first];
            while let (Some(next), Some(last)) = (units.peek(), run.last())
                && next.bytes.start == last.bytes.end
                && next.bytes.end - run[0].bytes.start <= step
                && let Some(next) = units.next()
            {
                run.push(next);
            }
            let equal = if image.is_own() {
                self.keep(&run, grain, &mut came)?
            } else {
                self.install(seed, span(&run).start, &run, grain, &mut came)?
            };
            rest.extend(
                run.into_iter()
                    .zip(equal)
                    .filter(|(_, e)| !e)
                    .map(|(u, _)| u),
            );
        }
        *wanted = rest;
        self.relocation
            .traffic
            .seeded_bytes
            .fetch_add(came, Ordering::Relaxed);
        Ok(came)
    }

    /// Installs what of a run of units is in a seed, from this offset of it on; tells which.
    pub(super) fn install(
        &mut self,
        seed: usize,
        from: u64,
        run: &[Unit<'_>],
        grain: u32,
        came: &mut u64,
    ) -> io::Result<Vec<bool>> {
        let volume = self.volume;
        let all = span(run);
        let mut data = std::mem::take(&mut self.buffer);
        data.resize(usize::try_from(all.len()).map_err(io::Error::other)?, 0);
        let image = &volume.seeding.images()[seed];
        let filled = image.read(from, &mut data).unwrap_or_else(|error| {
            // As good as one that is too short.
            tracing::debug!(
                "reading the seed image {} failed: {error}",
                image.path().display()
            );
            0
        });
        let equal = equal(run, &data[..filled], grain);
        let bytes = Fetched {
            offset: all.start,
            data,
            holes: Vec::new(),
            wire_bytes: 0,
        };
        let found = run.iter().zip(&equal).filter(|(_, e)| **e);
        for found in joined(found.map(|(unit, _)| unit.bytes)) {
            let range = volume.geometry.covering(found);
            let missing = self.missing_bytes(range);
            self.relocation.install_seed(range, &bytes)?;
            *came += missing;
        }
        self.buffer = bytes.data;
        Ok(equal)
    }

    /// Keeps what of a run of units is in the image itself as it should be; tells which.
    fn keep(&mut self, run: &[Unit<'_>], grain: u32, came: &mut u64) -> io::Result<Vec<bool>> {
        let geometry = self.volume.geometry;
        let all = span(run);
        let len = usize::try_from(all.len()).map_err(io::Error::other)?;
        self.buffer.resize(len, 0);
        let mut which = Vec::new();
        let in_image = |data: &[u8]| {
            which = equal(run, data, grain);
            let found = run.iter().zip(&which).filter(|(_, e)| **e);
            joined(found.map(|(unit, _)| unit.bytes))
                .into_iter()
                .map(|bytes| geometry.covering(bytes))
                .collect()
        };
        let range = geometry.covering(all);
        // What comes from elsewhere meanwhile does not count.
        *came += self
            .relocation
            .keep_equal(range, &mut self.buffer, in_image)?;
        Ok(which)
    }

    fn missing_bytes(&self, range: BlockRange) -> u64 {
        let residency = &self.relocation.residency;
        let (mut at, mut bytes) = (range.start, 0);
        while let Some(run) = residency.next_missing(at, range.end) {
            bytes += self.volume.geometry.bytes(run).len();
            at = run.end;
        }
        bytes
    }

    fn take_plain(
        &mut self,
        range: BlockRange,
        at: Duration,
        outcome: Result<Fetched, SourceError>,
    ) -> io::Result<()> {
        let Some(measuring) = &mut self.measuring else {
            // From before a rest.
            return Ok(());
        };
        let took = at.saturating_sub(measuring.since);
        let len = self.volume.geometry.bytes(range).len();
        measuring.left -= 1;
        if let Ok(fetched) = &outcome {
            let holes: u64 = fetched.holes.iter().map(|(_, len)| len).sum();
            measuring.bytes += len.saturating_sub(holes);
        }
        let (left, window, bytes) = (measuring.left, measuring.window, measuring.bytes);
        if let Ok(fetched) = outcome {
            self.relocation.install_seed(range, &fetched)?;
        }
        if left == 0 {
            self.measuring = None;
            self.gauge.measured(self.volume.now(), took, bytes);
            self.relocation
                .drive(|m, now, out| m.seed_passed(now, window, &self.relocation.residency, out));
        }
        Ok(())
    }
}

/// The shortest stretch that can be installed, with the source's hashes of it.
pub(super) struct Unit<'h> {
    pub bytes: ByteRange,
    pub hashes: &'h [Hash],
}

fn bytes_of(units: &[Unit<'_>]) -> u64 {
    units.iter().map(|unit| unit.bytes.len()).sum()
}

/// Which units are in `data`, that begins where the first of them does and may end anywhere.
fn equal(run: &[Unit<'_>], data: &[u8], grain: u32) -> Vec<bool> {
    let base = run.first().map_or(0, |unit| unit.bytes.start);
    let of_unit = |unit: &Unit<'_>| {
        let start = usize::try_from(unit.bytes.start - base).ok()?;
        let end = usize::try_from(unit.bytes.end - base).ok()?;
        data.get(start..end)
    };
    run.iter()
        .map(|unit| of_unit(unit).is_some_and(|data| hashes_of(data, grain) == unit.hashes))
        .collect()
}

fn span(run: &[Unit<'_>]) -> ByteRange {
    ByteRange {
        start: run.first().map_or(0, |unit| unit.bytes.start),
        end: run.last().map_or(0, |unit| unit.bytes.end),
    }
}

/// `bytes` in pieces of `step`.
fn steps(bytes: ByteRange, step: u64) -> Vec<ByteRange> {
    let mut pieces = Vec::new();
    let mut at = bytes.start;
    while at < bytes.end {
        let end = bytes.end.min(at + step);
        pieces.push(ByteRange { start: at, end });
        at = end;
    }
    pieces
}

/// Neighbours joined.
fn joined(ranges: impl Iterator<Item = ByteRange>) -> Vec<ByteRange> {
    let mut runs: Vec<ByteRange> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => runs.push(range),
        }
    }
    runs
}
