//! What a volume tells about itself, and the commands that steer it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_engine::heat::HeatMap;

use super::relocation::Relocation;
use super::{Volume, lock};
use crate::config::{HandoffPolicy, SourceLoss};
use crate::events::Event;
use crate::registry::{CommandError, Controlled};
use crate::status::{BackgroundState, Counters, ExportStatus, LifeState};
use crate::verification::VerifyStatus;

/// The span over which the rate is measured.
const RATE_SPAN: Duration = Duration::from_secs(5);

/// How fast blocks become resident: samples of the last seconds.
#[derive(Debug, Default)]
pub struct RateMeter {
    samples: Mutex<Vec<(Duration, u64)>>,
}

impl RateMeter {
    /// Adds what is resident at a time; samples closer than a fifth of a second are passed over.
    pub fn sample(&self, now: Duration, resident_bytes: u64) {
        let mut samples = lock(&self.samples);
        let too_soon = samples
            .last()
            .is_some_and(|(at, _)| now.saturating_sub(*at) < RATE_SPAN / 25);
        if !too_soon {
            samples.push((now, resident_bytes));
            let keep_from = now.saturating_sub(RATE_SPAN);
            let old = samples.iter().take_while(|(at, _)| *at < keep_from).count();
            samples.drain(..old.saturating_sub(1));
        }
    }

    /// Bytes per second over the last seconds.
    pub fn rate(&self) -> u64 {
        let samples = lock(&self.samples);
        let (Some(first), Some(last)) = (samples.first(), samples.last()) else {
            return 0;
        };
        let micros = (last.0 - first.0).as_micros();
        if micros == 0 {
            return 0;
        }
        let bytes = u128::from(last.1.saturating_sub(first.1));
        u64::try_from(bytes * 1_000_000 / micros).unwrap_or(u64::MAX)
    }
}

impl Volume {
    fn notes(&self, relocation: Option<&Arc<Relocation>>) -> Vec<String> {
        let mut notes = Vec::new();
        if self.poisoned.load(Ordering::Acquire) {
            notes.push(
                "a sync failed: writes and flushes are refused; check the medium and restart"
                    .to_owned(),
            );
        }
        if self.is_disk_full() {
            notes.push(
                "there is no space: writes that need more are refused and nothing is copied; all \
                 goes on once there is"
                    .to_owned(),
            );
        }
        notes.extend(self.departure_note());
        // Also once all is here: what is lost stays lost.
        notes.extend(self.source_power_note());
        let Some(relocation) = relocation else {
            return notes;
        };
        notes.extend(self.old_copy_note());
        notes.extend(self.source_flush_note());
        if self.has_given_up() && self.rest_is_here() {
            notes.push(if self.abort_was_heard() {
                "the return was given up; the VM goes on at the source, which still fetches from here"
                    .to_owned()
            } else {
                "the return was given up, and the source has not heard of it yet: if it takes no \
                 writes, keep this running until it does"
                    .to_owned()
            });
        } else if self.has_given_up() {
            notes.push(if self.abort_was_heard() {
                "the move here was given up; the VM goes on at the source; remove this image and \
                 its state"
                    .to_owned()
            } else {
                "the move here was given up, and the source has not heard of it yet: if it takes no \
                 writes, keep this running until it does"
                    .to_owned()
            });
        } else if self.life() == LifeState::Standby
            && let Some(off) = self.off_note()
        {
            notes.push(off);
        } else if self.life() == LifeState::Standby {
            notes.extend(self.prepared_note());
            notes.extend(self.fence_note());
            notes.extend(self.awaited_note());
            notes.push(match self.handoff_policy {
                HandoffPolicy::Now => {
                    "the handoff is asked for (--handoff now); until it has happened \
                     what is read here is read at the source"
                        .to_owned()
                }
                HandoffPolicy::FirstWrite => "waiting for the first write from the VM, or for \
                     `hikkoshi handoff`; until then what is read here is read at the source"
                    .to_owned(),
                HandoffPolicy::Command => {
                    "waiting for `hikkoshi handoff`; until then what is read here is read at the \
                     source, and writes are refused"
                        .to_owned()
                }
            });
        }
        if self.went_back() {
            return notes;
        }
        if relocation.is_source_refused() || !relocation.source.is_connected() {
            let what = if relocation.is_source_refused() {
                "not believed to be the same disk"
            } else {
                "unreachable"
            };
            let fate = match self.on_loss {
                SourceLoss::Wait => "wait".to_owned(),
                SourceLoss::Error(after) => format!("fail after {} s", after.as_secs()),
            };
            let down_s = relocation.source_down().map_or(0, |d| d.as_secs());
            notes.push(format!(
                "the source is {what} (for {down_s} s); reads of what is not here {fate}"
            ));
        }
        if relocation.was_store_behind() {
            notes.push(
                "more comes over the link than the image's disk takes: copying waits for it, so that \
                 flushes need not"
                    .to_owned(),
            );
        }
        notes.extend(self.verify_note());
        notes.extend(self.seed_note());
        if let Some(trouble) = lock(&relocation.trouble).as_ref() {
            notes.push(trouble.to_string());
        }
        let refused = relocation.with_mover(|m| m.refused());
        if refused > 0 {
            notes.push(format!(
                "{refused} ranges could not be copied and are tried again"
            ));
        }
        notes
    }

    fn background(&self, relocation: Option<&Arc<Relocation>>) -> BackgroundState {
        match relocation {
            None => BackgroundState::Idle,
            Some(_) if !self.background => BackgroundState::Off,
            Some(r) if r.with_mover(|m| m.is_paused()) => BackgroundState::Paused,
            Some(_) if self.life() == LifeState::Standby => BackgroundState::Idle,
            Some(_) => BackgroundState::Running,
        }
    }

    fn need_relocation(&self, what: &str) -> Result<Arc<Relocation>, CommandError> {
        self.unfinished().ok_or_else(|| {
            CommandError::Conflict(format!(
                "cannot {what} export {:?}: it has no source, everything is here already",
                self.name
            ))
        })
    }

    /// Whether reads wait for a source that is away.
    pub fn waits_in_vain(&self) -> bool {
        self.relocation()
            .is_some_and(|r| !r.is_source_usable() && r.with_mover(|m| m.waiting()) > 0)
    }

    fn counters(&self, relocation: Option<&Arc<Relocation>>) -> Counters {
        let get = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
        let traffic = relocation.map(|r| &r.traffic).unwrap_or(&self.last_traffic);
        Counters {
            reads_local: get(&self.tally.reads_local),
            reads_remote: get(&self.tally.reads_remote),
            writes: get(&self.tally.writes),
            flushes: get(&self.tally.flushes),
            zeroes: get(&self.tally.zeroes),
            blocks_installed: get(&traffic.blocks_installed),
            zero_bytes_skipped: get(&traffic.zero_bytes_skipped),
            hole_bytes_skipped: get(&traffic.hole_bytes_skipped),
            overwritten_bytes: get(&traffic.overwritten_bytes),
            data_bytes: get(&traffic.data_bytes),
            data_wire_bytes: get(&traffic.data_wire_bytes),
            packed_bytes_saved: get(&traffic.packed_bytes_saved),
            checksum_failures: relocation.map_or(get(&traffic.checksum_failures), |r| {
                r.source.checksum_failures()
            }),
            cancelled_bytes: relocation.map_or(get(&traffic.cancelled_bytes), |r| {
                r.source.cancelled_bytes()
            }),
            longest_remote_read_us: get(&traffic.longest_wait_us),
            source_losses: get(&self.tally.source_losses),
            source_refusals: get(&self.tally.source_refusals),
            reads_failed: get(&self.tally.reads_failed),
            disk_errors: get(&self.tally.disk_errors),
        }
    }
}

impl Controlled for Volume {
    fn status(&self) -> ExportStatus {
        let relocation = self.unfinished();
        let r = relocation.as_ref();
        let size_bytes = self.geometry.size_bytes();
        let absent_bytes = r.map_or(0, |r| r.residency.missing_bytes());
        let rate = r.map_or(0, |_| self.rate.rate());
        let wire = r.map_or(&self.last_traffic.wire_bytes, |r| &r.traffic.wire_bytes);
        let seeded = r.map_or(&self.last_traffic.seeded_bytes, |r| &r.traffic.seeded_bytes);
        ExportStatus {
            export: self.name.clone(),
            size_bytes,
            state: self.stands(),
            prepared: self.prepared().map(|p| p.done),
            ahead_bytes: self.prepared().map_or(0, |p| p.bytes),
            repeated_bytes: self.prepared().map_or(0, |p| p.again_bytes),
            resident_bytes: size_bytes - absent_bytes,
            owned_bytes: r.map_or(size_bytes, |r| r.residency.owned_bytes()),
            absent_bytes,
            wire_bytes: wire.load(Ordering::Relaxed),
            seeded_bytes: seeded.load(Ordering::Relaxed),
            codec: r.and_then(|r| r.source.coding()).map(|c| c.to_string()),
            source_connected: r.map(|r| r.is_source_usable()),
            source_down_s: r.and_then(|r| r.source_down()).map(|d| d.as_secs()),
            waiting: self.awaited(),
            reads_waiting: r.map_or(0, |r| r.with_mover(|m| m.waiting()) as u64),
            poisoned: self.poisoned.load(Ordering::Acquire),
            disk_full: self.is_disk_full(),
            background: self.background(r),
            rate_bytes_per_s: rate,
            eta_s: (rate > 0 && absent_bytes > 0).then(|| absent_bytes.div_ceil(rate)),
            limit_bytes_per_s: r.and_then(|r| r.with_mover(|m| m.limit())),
            common_limit_bytes_per_s: r.and_then(|r| r.with_mover(|m| m.common_limit())),
            image: self.image.display().to_string(),
            old_copy_needed: self.old_copy_of().is_some(),
            taken_over: self.has_departed().then(|| self.is_known_to_be_taken()),
            release_in_s: self.release_in().map(|left| left.as_secs() + 1),
            storage_move: None,
            source: r.map(|r| r.source.info().uri),
            notes: self.notes(r),
            way_back: self.way_back_status(),
            clients: self.tally.clients.load(Ordering::Relaxed),
            counters: self.counters(r),
        }
    }

    fn heat(&self) -> HeatMap {
        self.heat.map()
    }

    fn pause(&self) -> Result<(), CommandError> {
        self.need_relocation("pause")?.drive(|m, _, _| m.pause());
        Ok(())
    }

    fn resume(&self) -> Result<(), CommandError> {
        let relocation = self.need_relocation("resume")?;
        relocation.drive(|m, now, out| m.resume(now, &relocation.residency, out));
        Ok(())
    }

    fn set_limit(&self, bytes_per_s: Option<u64>) -> Result<(), CommandError> {
        let relocation = self.need_relocation("limit")?;
        relocation.drive(|m, now, out| m.set_limit(now, bytes_per_s, &relocation.residency, out));
        Ok(())
    }

    fn abort(&self) -> Result<(), CommandError> {
        self.give_up()
            .map_err(|e| CommandError::Conflict(format!("cannot give the move up: {e}")))
    }

    fn release(&self, force: bool) -> Result<(), CommandError> {
        if !self.has_departed() && self.way_back.is_kept() {
            return self
                .end_way_back("it was released by hand")
                .map_err(|e| CommandError::Failed(format!("the way back is still kept: {e}")));
        }
        if !self.has_departed() {
            return Err(CommandError::Conflict(format!(
                "export {:?} has neither a fence that could be lifted nor a way back that is kept",
                self.name
            )));
        }
        if !force {
            return Err(CommandError::Conflict(format!(
                "the disk was handed over to another site{}, and what was written there since is not here: if \
                 the VM ran on from this copy, there would be two. Look there first (`hikkoshi status`): \
                 standby: `hikkoshi abort` there takes the move back, and nothing is lost; given-up: start \
                 its daemon again, which lifts the fence here; arriving, local, departing or departed: the \
                 disk lives there, or further on, leave the fence; not reachable: switch that machine off \
                 first. Only when it is gone for good: `hikkoshi release --force`",
                if self.is_known_to_be_taken() {
                    ", which has said that it took it over"
                } else {
                    ""
                }
            )));
        }
        let stays = |error: std::io::Error| format!("the fence stays: {error}");
        match self.release_in() {
            Some(_) => self
                .release_fence()
                .map_err(|error| CommandError::Conflict(stays(error))),
            None => self
                .release_fence()
                .map_err(|error| CommandError::Failed(stays(error))),
        }
    }

    fn verify(&self, accept: bool) -> Result<VerifyStatus, CommandError> {
        if accept {
            self.accept_differences()?;
        } else {
            self.begin_verify()?;
        }
        Ok(self.verify_status())
    }

    fn verification(&self) -> VerifyStatus {
        self.verify_status()
    }

    fn handoff(&self) -> Result<(), CommandError> {
        if self.life() == LifeState::Standby {
            self.hand_off()
                .map_err(|e| CommandError::Failed(format!("the handoff failed: {e}")))?;
        } else if self.unfinished().is_none() && !self.had_source {
            self.need_relocation("hand over")?;
        }
        Ok(())
    }

    fn events(&self, since: u64) -> Vec<Event> {
        self.events.since(since)
    }
}
