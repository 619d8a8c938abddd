//! What guests ask of a volume: reads, writes, zeroes, trims.
//!
//! The order of a write, which makes a kill lose nothing and lets a fetch never overwrite it:
//! - into blocks that are all here: (1) mark them owned and leave the record, (2) write. Marking
//!   first is safe, since a mark too many only costs a block sent on the way back, and no lock is
//!   needed, since nobody installs into what is here.
//! - into blocks of which some are missing: under the lock of the range, (1) write, (2) mark the
//!   whole blocks owned and the sectors of partly written ones valid, and leave the records. The
//!   marks are in memory that outlives the process before the write is answered. Those among them
//!   that are here are marked before (1), as above: a kill in between would leave bytes of the write in a
//!   block that passes for a copy of the source's, which no way back would copy.
//!
//! A mark and its record are one step ([`hikkoshi_engine::journal::Pending`]): a write that finds
//! nothing left to mark may count on the record.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::geometry::{BlockIndex, BlockRange, ByteRange, SECTOR_BYTES};
use hikkoshi_engine::journal::Record;
use hikkoshi_engine::mover::ReadFailure;
use hikkoshi_engine::residency::BlockState;
use hikkoshi_engine::sync::wait;
use hikkoshi_store::{Store, ZeroMode};

use super::arrival::Takeover;
use super::relocation::{ReadEnd, Relocation};
use super::{Volume, lock};
use crate::config::HandoffPolicy;
use crate::events::EventKind;
use crate::status::LifeState;

/// How a read stands after the first look.
#[derive(Debug)]
pub enum ReadNow {
    /// The buffer is filled.
    Done,
    /// All is here, but the medium would have to be waited for.
    WouldBlock,
    /// Some of it must come from the source.
    Missing,
}

/// What a mutation does to bytes that are to be written.
enum Change<'a> {
    Data { offset: u64, data: &'a [u8] },
    Zeroes(ZeroMode),
}

impl Change<'_> {
    /// Applies it to `bytes` of the image, which lie within what was asked for.
    fn apply(&self, store: &dyn Store, bytes: ByteRange) -> io::Result<()> {
        match self {
            Self::Data { offset, data } => {
                let start = usize::try_from(bytes.start - offset).map_err(io::Error::other)?;
                let len = usize::try_from(bytes.len()).map_err(io::Error::other)?;
                store.write(bytes.start, &data[start..start + len])
            }
            Self::Zeroes(mode) => store.write_zeroes(bytes.start, bytes.len(), *mode),
        }
    }
}

impl Volume {
    /// Reads without waiting, if that can be. `relocation` is the caller's copy of
    /// [`Volume::relocation`].
    ///
    /// # Errors
    /// The error of the medium.
    pub fn read_now(
        &self,
        relocation: Option<&Arc<Relocation>>,
        offset: u64,
        buf: &mut [u8],
    ) -> io::Result<ReadNow> {
        if let Some(relocation) = relocation {
            let bytes = ByteRange::at(offset, buf.len() as u64);
            if !relocation.residency.holds(bytes) {
                return Ok(ReadNow::Missing);
            }
        }
        let read = self.store.try_read(offset, buf);
        let read = read.inspect_err(|error| self.note_disk_error("read", error));
        Ok(if read? {
            ReadNow::Done
        } else {
            ReadNow::WouldBlock
        })
    }

    /// Writes. Waits for nobody but the local medium, with one exception: a write that does not
    /// begin and end on a sector waits for the block from the source.
    ///
    /// # Errors
    /// The error of the medium; permission denied before the handoff if that is to be commanded.
    pub fn write(
        &self,
        relocation: Option<&Arc<Relocation>>,
        offset: u64,
        data: &[u8],
    ) -> io::Result<()> {
        self.check_poison()?;
        let bytes = ByteRange::at(offset, data.len() as u64);
        let outcome = match relocation {
            None if self.is_plain() => self.change(bytes, || self.store.write(offset, data)),
            // Whoever writes, it is recorded.
            None => self.write_recorded(bytes, &Change::Data { offset, data }),
            Some(relocation) => self.mutate(relocation, bytes, &Change::Data { offset, data }),
        };
        self.note_write(outcome)
    }

    /// Makes bytes zero.
    ///
    /// # Errors
    /// As [`Volume::write`]; unsupported only with [`ZeroMode::FastOnly`].
    pub fn zero(
        &self,
        relocation: Option<&Arc<Relocation>>,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> io::Result<()> {
        self.check_poison()?;
        let bytes = ByteRange::at(offset, len);
        let outcome = match relocation {
            None if self.is_plain() => {
                self.change(bytes, || self.store.write_zeroes(offset, len, mode))
            }
            None => self.write_recorded(bytes, &Change::Zeroes(mode)),
            Some(relocation) => self.mutate(relocation, bytes, &Change::Zeroes(mode)),
        };
        self.note_write(outcome)
    }

    /// Gives bytes up. They read as zeroes afterwards, except for parts of a block that is not
    /// here: those are left as they are, which TRIM allows.
    ///
    /// # Errors
    /// As [`Volume::write`].
    pub fn trim(
        &self,
        relocation: Option<&Arc<Relocation>>,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let mut bytes = ByteRange::at(offset, len);
        if let Some(relocation) = relocation.filter(|_| !self.is_local()) {
            bytes = relocation.geometry.bytes(relocation.geometry.within(bytes));
            if bytes.is_empty() {
                return self.check_poison();
            }
        }
        self.zero(relocation, bytes.start, bytes.len(), ZeroMode::MayPunch)
    }

    /// From here on the VM runs here: recorded before it is believed. A source of ours keeps the VM
    /// from writing there from then on, and says so first.
    ///
    /// # Errors
    /// It could not be made durable, or the source did not agree; the volume still stands by.
    pub fn hand_off(&self) -> io::Result<()> {
        if self.life() != LifeState::Standby {
            return Ok(());
        }
        let Some(arrival) = &self.arrival else {
            return self.record_handoff(None).map(drop);
        };
        if !self.from_image && !self.takes_over_at_once() {
            // Between two images whoever drives the move waits, and may be told to wait no longer.
            self.await_prepared(arrival)?;
        }
        let _deciding = self.decide(arrival);
        if self.has_given_up() {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "this move was given up; the disk stays at the source",
            ));
        }
        if self.life() != LifeState::Standby {
            return Ok(());
        }
        self.ask_early(arrival);
        let mut takeover = self.take_over(arrival)?;
        let mut changes = takeover.changes.take();
        while !self.record_handoff(Some(takeover))? {
            tracing::warn!(
                "the answer to the handoff came too late to count; it is asked for again"
            );
            takeover = self.take_over(arrival)?;
            // What the source said the first time it need not say again.
            changes = None;
        }
        arrival.ticket.arrived();
        if let Some(relocation) = self.relocation() {
            relocation.settle_early(changes);
        }
        Ok(())
    }

    /// False, and nothing is done, where the source's word does not count any more.
    pub(super) fn record_handoff(&self, takeover: Option<Takeover>) -> io::Result<bool> {
        let mut journal = lock(&self.journal);
        if self.life() != LifeState::Standby {
            return Ok(true);
        }
        let Some(relocation) = self.relocation() else {
            return Ok(true);
        };
        // Last of all, right before it is acted on.
        if takeover.as_ref().is_some_and(|takeover| !takeover.counts()) {
            return Ok(false);
        }
        crash_point!("handoff.begun");
        let owed = self.will_owe_a_flush(&relocation);
        if let Some(state) = journal.state.as_mut() {
            let at_source = takeover.as_ref().map_or(0, |t| t.generation);
            let lacking = takeover.as_ref().and_then(|t| t.lacking.as_ref());
            let outcome = state.record_arriving_but(at_source, lacking, owed);
            self.note_state("recording the handoff", outcome)?;
        }
        crash_point!("handoff.recorded");
        // Before anything is written into it.
        self.end_old_copy();
        // Only now: until it is recorded, the disk may still go another way.
        for run in takeover.into_iter().flat_map(|t| t.copied) {
            relocation.now_clean(run);
        }
        crash_point!("handoff.taken");
        // The mover first: as soon as a write is accepted, no read may pass by it to the source.
        relocation.drive(|m, now, out| m.handoff(now, &relocation.residency, out));
        if owed {
            self.owes_a_flush();
        }
        self.set_life(LifeState::Arriving);
        crash_point!("handoff.done");
        drop(journal);
        self.attend_source_flushes();
        self.event(
            EventKind::Handoff,
            if self.from_image {
                "the switch: the disk is in its new image from now on"
            } else {
                "handoff: the disk lives here from now on"
            },
        );
        Ok(true)
    }

    fn write_recorded(&self, bytes: ByteRange, change: &Change<'_>) -> io::Result<()> {
        match self.relocation() {
            Some(relocation) => self.mutate(&relocation, bytes, change),
            // It has just been let go.
            None => self.change(bytes, || change.apply(&*self.store, bytes)),
        }
    }

    /// Makes a change, unless the disk has moved on, and marks it for those who copy. A handoff
    /// waits for it: nothing in it may wait for a source.
    #[inline]
    fn change<T>(&self, bytes: ByteRange, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _inside = self.begin_change()?;
        let outcome = make();
        self.changed(bytes);
        outcome
    }

    fn mutate(
        &self,
        relocation: &Arc<Relocation>,
        bytes: ByteRange,
        change: &Change<'_>,
    ) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.life() == LifeState::Standby {
            self.admit_first_write()?;
        }
        let blocks = relocation.geometry.covering(bytes);
        loop {
            let made = self.change(bytes, || {
                if relocation.residency.all_resident(blocks) {
                    relocation.own(blocks);
                    crash_point!("write.marked");
                    let outcome = change.apply(&*self.store, bytes);
                    crash_point!("write.written");
                    return outcome.map(|()| true);
                }
                relocation.change_missing(bytes, change)
            })?;
            if made {
                return Ok(());
            }
            // The edges need the source's bytes: fetch those blocks, then look again.
            for edge in relocation.edges(bytes) {
                relocation.fetch_and_wait(edge)?;
            }
        }
    }

    fn admit_first_write(&self) -> io::Result<()> {
        if self.handoff_policy == HandoffPolicy::Command {
            return Err(io::Error::from_raw_os_error(1));
        }
        self.hand_off()
    }
}

impl Relocation {
    /// Takes blocks that are all here as owned. No lock if they are already.
    fn own(&self, blocks: BlockRange) {
        if !self.residency.all_owned(blocks) {
            self.leave(|| {
                let added = self.residency.own_resident(blocks);
                added.then_some(Record::Owned(blocks))
            });
        }
    }

    /// A mutation of blocks of which some are missing. `false` if it cannot be made before the
    /// blocks at its edges are here; nothing was changed then.
    fn change_missing(&self, bytes: ByteRange, change: &Change<'_>) -> io::Result<bool> {
        let blocks = self.geometry.covering(bytes);
        let _guard = self.locks.lock(blocks);
        let edges = match self.plan_edges(bytes) {
            Some(edges) => edges,
            None => return Ok(false),
        };
        self.own_those_here(blocks);
        // 1. the data
        change.apply(&*self.store, bytes)?;
        crash_point!("change.written");
        // 2. the marks and the records
        let whole = self.geometry.within(bytes);
        if !whole.is_empty() {
            self.count_overwritten(whole);
            self.now_owned(whole);
        }
        for (block, sectors) in edges {
            if let Some(sectors) = sectors {
                let Some(is_whole) = self.now_partial(block, sectors) else {
                    // No room to remember the sectors: with the whole block here, none is
                    // needed, and writing the same once more does no harm.
                    return Ok(false);
                };
                if is_whole {
                    self.overwritten(BlockRange::one(block));
                }
            } else {
                self.now_owned(BlockRange::one(block));
            }
        }
        crash_point!("change.marked");
        Ok(true)
    }

    /// Takes as owned what is here of `blocks`. Under their lock: nothing else of them comes meanwhile.
    fn own_those_here(&self, blocks: BlockRange) {
        for (run, state) in self.residency.runs(blocks) {
            if state == BlockState::Clean {
                self.own(run);
            }
        }
    }

    /// Counts what is about to be whole here without the source. Under the lock of the range.
    fn count_overwritten(&self, whole: BlockRange) {
        for (run, state) in self.residency.runs(whole) {
            if matches!(state, BlockState::Absent | BlockState::Partial) {
                self.overwritten(run);
            }
        }
    }

    fn overwritten(&self, run: BlockRange) {
        let bytes = self.geometry.bytes(run).len();
        self.traffic
            .overwritten_bytes
            .fetch_add(bytes, Ordering::Relaxed);
    }

    /// The blocks that `bytes` covers only in part.
    fn edges(&self, bytes: ByteRange) -> Vec<BlockRange> {
        let blocks = self.geometry.covering(bytes);
        let whole = self.geometry.within(bytes);
        let mut edges = Vec::new();
        for block in [blocks.start, blocks.end - 1] {
            let edge = BlockRange::one(BlockIndex(block));
            if !whole.overlaps(edge) && !edges.contains(&edge) {
                edges.push(edge);
            }
        }
        edges
    }

    /// What becomes of each edge block: `None` for one that is here, else the sectors that are
    /// written. `None` for all if an edge cannot be kept as sectors.
    fn plan_edges(&self, bytes: ByteRange) -> Option<Vec<(BlockIndex, Option<Range<u32>>)>> {
        let mut plan = Vec::new();
        for edge in self.edges(bytes) {
            let block = BlockIndex(edge.start);
            let state = self.residency.state(block);
            if matches!(state, BlockState::Clean | BlockState::Owned) {
                plan.push((block, None));
                continue;
            }
            let of_block = self.geometry.bytes(edge);
            let start = bytes.start.max(of_block.start) - of_block.start;
            let end = bytes.end.min(of_block.end) - of_block.start;
            if !start.is_multiple_of(SECTOR_BYTES) || !end.is_multiple_of(SECTOR_BYTES) {
                return None;
            }
            let sector = |at: u64| u32::try_from(at / SECTOR_BYTES).ok();
            plan.push((block, Some(sector(start)?..sector(end)?)));
        }
        Some(plan)
    }

    /// The sectors are in the image: say so. Tells whether the block is whole by that; `None` if
    /// there is no room to remember it.
    fn now_partial(&self, block: BlockIndex, sectors: Range<u32>) -> Option<bool> {
        let mut whole = None;
        self.leave(|| {
            let mask = self.residency.mark_partial(block, sectors).ok()?;
            let is_whole = self.residency.state(block) == BlockState::Owned;
            whole = Some(is_whole);
            Some(if is_whole {
                Record::Owned(BlockRange::one(block))
            } else {
                Record::Partial { block, mask }
            })
        });
        whole
    }

    /// Waits until blocks are here.
    ///
    /// # Errors
    /// The source refused them, or is lost for longer than the policy allows.
    fn fetch_and_wait(self: &Arc<Self>, blocks: BlockRange) -> io::Result<()> {
        let outcome = Arc::new((Mutex::new(None), Condvar::new()));
        let told = Arc::clone(&outcome);
        let done = move |end: ReadEnd<'_>| {
            let result = match end {
                ReadEnd::Failed(why) => Err(read_error(why)),
                ReadEnd::Resident | ReadEnd::Bytes(_) => Ok(()),
            };
            *lock(&told.0) = Some(result);
            told.1.notify_one();
        };
        self.read(self.geometry.bytes(blocks), Box::new(done));
        let mut result = lock(&outcome.0);
        loop {
            if let Some(result) = result.take() {
                // Answered, but there was no space to keep it.
                if result.is_ok() && !self.residency.all_resident(blocks) {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                return result;
            }
            result = wait(&outcome.1, &outcome.0, result);
        }
    }
}

/// Whether a change was not let in (by `begin_change`), and so has not happened.
pub fn is_not_let_in(error: &io::Error) -> bool {
    error.raw_os_error() == Some(1)
}

/// The error of a read that the source could not serve.
pub fn read_error(why: ReadFailure) -> io::Error {
    io::Error::other(match why {
        ReadFailure::SourceRefused => "the source cannot read these blocks",
        ReadFailure::SourceLost => "the source is unreachable",
        ReadFailure::StoreFailed => "the local image cannot take these blocks",
    })
}

impl Volume {
    /// Counts a read.
    pub fn count_read(&self, remote: bool) {
        let counter = if remote {
            &self.tally.reads_remote
        } else {
            &self.tally.reads_local
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
