//! What BLOCK_STATUS tells: allocation, and residency.

use std::io;
use std::sync::Arc;

use hikkoshi_engine::geometry::{BlockRange, ByteRange};
use hikkoshi_engine::residency::BlockState;
use hikkoshi_nbd::server::StatusExtents;
use hikkoshi_nbd::wire::{allocation, residency};
use hikkoshi_store::ExtentKind;

use super::Volume;
use super::relocation::Relocation;

/// Extents asked of the store at once.
const STORE_EXTENTS: usize = 1024;

impl Volume {
    /// `x-hikkoshi:residency`. A plain image is the guest's own throughout.
    pub fn residency_extents(
        &self,
        relocation: Option<&Arc<Relocation>>,
        offset: u64,
        len: u32,
        out: &mut StatusExtents,
    ) {
        let Some(relocation) = relocation else {
            out.push(len.into(), residency::OWNED);
            return;
        };
        let bytes = ByteRange::at(offset, len.into());
        for (run, state) in relocation
            .residency
            .runs(relocation.geometry.covering(bytes))
        {
            let flags = match state {
                BlockState::Absent | BlockState::Partial => residency::ABSENT,
                BlockState::Clean => residency::CLEAN,
                BlockState::Owned => residency::OWNED,
            };
            if !out.push(self.part(run, bytes).len(), flags) {
                return;
            }
        }
    }

    /// `base:allocation`. What is not here counts as data: nobody knows better without asking.
    ///
    /// # Errors
    /// The error of the medium.
    pub fn allocation_extents(
        &self,
        relocation: Option<&Arc<Relocation>>,
        offset: u64,
        len: u32,
        out: &mut StatusExtents,
    ) -> io::Result<()> {
        let bytes = ByteRange::at(offset, len.into());
        let Some(relocation) = relocation else {
            return self.store_extents(bytes, out);
        };
        for (run, state) in relocation
            .residency
            .runs(relocation.geometry.covering(bytes))
        {
            let part = self.part(run, bytes);
            match state {
                BlockState::Absent | BlockState::Partial => {
                    out.push(part.len(), 0);
                }
                BlockState::Clean | BlockState::Owned => self.store_extents(part, out)?,
            }
            if !out.wants_more() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The bytes of `run` that lie within `bytes`.
    fn part(&self, run: BlockRange, bytes: ByteRange) -> ByteRange {
        let run = self.geometry.bytes(run);
        ByteRange {
            start: run.start.max(bytes.start),
            end: run.end.min(bytes.end),
        }
    }

    fn store_extents(&self, bytes: ByteRange, out: &mut StatusExtents) -> io::Result<()> {
        let mut at = bytes.start;
        while at < bytes.end && out.wants_more() {
            let extents = self.store.extents(at, bytes.end - at, STORE_EXTENTS)?;
            if extents.is_empty() {
                out.push(bytes.end - at, 0);
                return Ok(());
            }
            for extent in extents {
                let flags = match extent.kind {
                    ExtentKind::Data => 0,
                    ExtentKind::Zero => allocation::ZERO,
                    ExtentKind::Hole => allocation::ZERO | allocation::HOLE,
                };
                at = extent.offset.saturating_add(extent.len);
                if !out.push(extent.len, flags) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
