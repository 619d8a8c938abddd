//! One comparison, from the first block to the last.
//!
//! Hashes of long pieces are asked for first, of 64 KiB each. Where one differs, that piece is
//! asked about once more in small grains, which tells where exactly, and tells a block that a
//! guest has written meanwhile from one that is wrong. Nothing is ever written here.
//!
//! A guest marks a block owned before it changes it. So if a block is still clean after it was
//! read here, what was read is what had come from the source.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use hikkoshi_engine::geometry::{BlockRange, ByteRange};
use hikkoshi_engine::residency::BlockState;
use hikkoshi_wan::transport::limits;
use hikkoshi_wan::transport::message::hashes_of;
use hikkoshi_wan::{Hashes, Lane, SourceError, SourceErrorKind};

use super::super::Volume;
use super::super::relocation::Relocation;
use crate::verification::{Difference, MAX_DIFFERENCES, VerifyMethod, VerifyState, VerifyStatus};

/// The grain of the first look.
const COARSE_BYTES: u32 = limits::MAX_GRAIN_BYTES;

/// What one question covers where the source makes the hashes. The answer has 2 KiB.
const HASHED_PIECE_BYTES: u64 = 4 << 20;

/// Questions under way then: 32 MiB a round trip, which is 160 MB/s at 200 ms.
const MAX_HASHED_PIECES: usize = 8;

/// What one question covers where the data crosses the link; the mover's window decides how many
/// are under way.
const READ_PIECE_BYTES: u64 = 256 << 10;

/// How long to wait before asking again whether more may be asked.
const PATIENCE: Duration = Duration::from_millis(20);

/// How much less than others this thread wants the processor.
const NICENESS: i32 = 10;

/// A piece of the disk that is compared.
#[derive(Clone, Copy, Debug)]
struct Piece {
    bytes: ByteRange,
    grain: u32,
    /// The second look.
    fine: bool,
}

struct Answer {
    piece: Piece,
    asked_at: Duration,
    over_link: bool,
    outcome: Result<Hashes, SourceError>,
}

pub(super) struct Run<'a> {
    volume: &'a Volume,
    relocation: &'a Arc<Relocation>,
    answers: Receiver<Answer>,
    answer_to: Sender<Answer>,
    under_way: usize,
    /// To be asked before what comes next on the disk.
    again: VecDeque<Piece>,
    /// The next block to look at.
    cursor: u64,
    buffer: Vec<u8>,
}

impl<'a> Run<'a> {
    pub fn new(volume: &'a Volume, relocation: &'a Arc<Relocation>) -> Self {
        let (answer_to, answers) = channel();
        Self {
            volume,
            relocation,
            answers,
            answer_to,
            under_way: 0,
            again: VecDeque::new(),
            cursor: 0,
            buffer: Vec::new(),
        }
    }

    /// Compares everything that is clean; tells how it ended.
    pub fn run(mut self) -> VerifyState {
        // For this thread alone. Guests' requests come first; that it fails hurts nobody.
        let _ = rustix::process::setpriority_process(None, NICENESS);
        loop {
            if self.volume.verification.is_stopped() || self.relocation.is_retired() {
                return VerifyState::Stopped;
            }
            while self.ask_next() {}
            if self.under_way == 0 && self.again.is_empty() && self.at_end() {
                return self.verdict();
            }
            if let Ok(answer) = self.answers.recv_timeout(PATIENCE) {
                self.under_way -= 1;
                self.take(answer);
            }
        }
    }

    fn verdict(&self) -> VerifyState {
        let VerifyStatus {
            differing_bytes,
            unreadable_bytes,
            ..
        } = self.volume.verify_status();
        match (differing_bytes, unreadable_bytes) {
            (1.., _) => VerifyState::Differs,
            (_, 1..) => VerifyState::Failed,
            _ => VerifyState::Equal,
        }
    }

    fn at_end(&self) -> bool {
        self.cursor >= self.volume.geometry.blocks()
    }

    /// Asks about the next piece, if it may be asked now.
    fn ask_next(&mut self) -> bool {
        let over_link = !self.relocation.source.speaks_frames();
        if !over_link && self.under_way >= MAX_HASHED_PIECES {
            return false;
        }
        let Some(piece) = self
            .again
            .pop_front()
            .or_else(|| self.next_piece(over_link))
        else {
            return false;
        };
        let len = piece.bytes.len();
        let admitted = self
            .relocation
            .with_mover_at(|m, now| m.admit_check(now, len, over_link));
        if !admitted {
            self.again.push_front(piece);
            return false;
        }
        self.under_way += 1;
        let (asked_at, answer_to) = (self.volume.now(), self.answer_to.clone());
        let done = move |outcome| {
            // Nobody listens any more when this was stopped.
            let _ = answer_to.send(Answer {
                piece,
                asked_at,
                over_link,
                outcome,
            });
        };
        let len = u32::try_from(len).expect("pieces are a few MiB");
        self.relocation.source.hashes(
            Lane::Bulk,
            piece.bytes.start,
            len,
            piece.grain,
            Box::new(done),
        );
        true
    }

    /// The next run of clean blocks; what is on the way to it is counted and passed over.
    fn next_piece(&mut self, over_link: bool) -> Option<Piece> {
        let geometry = self.volume.geometry;
        let most = if over_link {
            READ_PIECE_BYTES
        } else {
            HASHED_PIECE_BYTES
        };
        let step = (most / geometry.block_bytes()).max(1);
        while !self.at_end() {
            let end = geometry.blocks().min(self.cursor + step);
            let ahead = BlockRange::new(self.cursor, end);
            let (run, state) = self.relocation.residency.runs(ahead).next()?;
            self.cursor = run.end;
            let bytes = geometry.bytes(run);
            match state {
                BlockState::Clean => {
                    return Some(Piece {
                        bytes,
                        grain: COARSE_BYTES,
                        fine: false,
                    });
                }
                BlockState::Owned => self.count(bytes.len(), |s| &mut s.owned_bytes),
                BlockState::Absent | BlockState::Partial => {
                    self.count(bytes.len(), |s| &mut s.absent_bytes);
                }
            }
        }
        None
    }

    fn count(&self, bytes: u64, counter: impl Fn(&mut VerifyStatus) -> &mut u64) {
        self.volume.verification.change(|status| {
            status.checked_bytes += bytes;
            *counter(status) += bytes;
        });
    }

    fn take(&mut self, answer: Answer) {
        let Answer {
            piece,
            asked_at,
            over_link,
            outcome,
        } = answer;
        let len = piece.bytes.len();
        if over_link {
            let landed = outcome.is_ok();
            self.relocation.with_mover_at(|m, now| match landed {
                true => m.check_landed(now, now.saturating_sub(asked_at), len),
                false => m.check_lost(len),
            });
        }
        match outcome {
            Ok(hashes) => {
                let wire = &self.relocation.traffic.wire_bytes;
                wire.fetch_add(hashes.wire_bytes, Ordering::Relaxed);
                self.volume.verification.change(|status| {
                    status.wire_bytes += hashes.wire_bytes;
                    // Once data has crossed, it is no longer only hashes.
                    if status.method != Some(VerifyMethod::DataOverLink) {
                        status.method = Some(if hashes.at_source {
                            VerifyMethod::HashesAtSource
                        } else {
                            VerifyMethod::DataOverLink
                        });
                    }
                });
                if let Err(e) = self.compare(piece, &hashes) {
                    self.unreadable(len, &format!("reading the image: {e}"));
                }
            }
            Err(error) if error.kind == SourceErrorKind::Refused => {
                self.unreadable(len, &error.message);
            }
            Err(_) => {
                // Whoever cares for the connection says why. Until it stands again nothing is
                // admitted; a connection that dies at each question must not be asked in a hurry.
                self.again.push_front(piece);
                std::thread::sleep(PATIENCE);
            }
        }
    }

    fn unreadable(&self, len: u64, why: &str) {
        self.count(len, |s| &mut s.unreadable_bytes);
        self.volume.verification.change(|status| {
            if status.message.is_empty() {
                status.message = why.to_owned();
            }
        });
    }

    fn compare(&mut self, piece: Piece, there: &Hashes) -> io::Result<()> {
        let len = usize::try_from(piece.bytes.len()).map_err(io::Error::other)?;
        self.buffer.resize(len, 0);
        let store = &self.volume.store;
        store.read(piece.bytes.start, &mut self.buffer)?;
        let here = hashes_of(&self.buffer, piece.grain);
        if here.len() != there.hashes.len() {
            return Err(io::Error::other("the source gave another number of hashes"));
        }
        let mut at = piece.bytes.start;
        for (here, there) in here.iter().zip(&there.hashes) {
            let end = piece.bytes.end.min(at + u64::from(piece.grain));
            let bytes = ByteRange { start: at, end };
            if here == there {
                self.count(bytes.len(), |s| &mut s.verified_bytes);
            } else {
                self.differs(piece.fine, bytes);
            }
            at = end;
        }
        Ok(())
    }

    /// A grain differs. Called after it was read here.
    fn differs(&mut self, fine: bool, bytes: ByteRange) {
        let geometry = self.volume.geometry;
        let clean = {
            let blocks = geometry.covering(bytes);
            let mut runs = self.relocation.residency.runs(blocks);
            runs.all(|(_, state)| state == BlockState::Clean)
        };
        // Where more is found than can be told, where exactly does not matter any more.
        let told = clean && self.volume.verification.differences() >= MAX_DIFFERENCES;
        match (fine || told, clean) {
            (false, _) => {
                let block = u32::try_from(geometry.block_bytes()).unwrap_or(COARSE_BYTES);
                self.again.push_back(Piece {
                    bytes,
                    grain: block.min(COARSE_BYTES),
                    fine: true,
                });
            }
            (true, true) => {
                self.count(bytes.len(), |s| &mut s.differing_bytes);
                let found = Difference {
                    offset: bytes.start,
                    len: bytes.len(),
                };
                let verification = &self.volume.verification;
                verification.change(|status| add(&mut status.differences, found));
            }
            // A guest has written it meanwhile.
            (true, false) => self.count(bytes.len(), |s| &mut s.owned_bytes),
        }
    }
}

/// Adds a difference to an ordered list, joined to its neighbours; of too many the first stay.
pub(super) fn add(list: &mut Vec<Difference>, found: Difference) {
    let at = list.partition_point(|d| d.offset < found.offset);
    list.insert(at, found);
    for first in [at, at.saturating_sub(1)] {
        if let [before, after, ..] = &mut list[first..]
            && before.offset + before.len == after.offset
        {
            before.len += after.len;
            list.remove(first + 1);
        }
    }
    list.truncate(MAX_DIFFERENCES);
}
