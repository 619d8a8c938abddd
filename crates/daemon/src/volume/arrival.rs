//! The destination's side of a move from one of ours: pre-copy before the handoff, the handoff, and
//! what is to be told afterwards.
//!
//! Before the handoff guests' reads pass by to the source, as with any source. What is copied ahead
//! goes into the image and is counted apart from the residency ([`Precopy`]): the VM still writes
//! at the source. At the handoff the source stops it, tells what has changed last, and only what is
//! right then becomes resident.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::blocks::BlockSet;
use hikkoshi_engine::geometry::{BlockRange, ByteRange, Geometry};
use hikkoshi_engine::handover;
use hikkoshi_engine::heat::HeatMap;
use hikkoshi_engine::mover::Mover;
use hikkoshi_engine::precopy::{CopyId, Precopy, Wanted};
use hikkoshi_engine::sync::wait_for;
use hikkoshi_store::ZeroMode;
use hikkoshi_wan::transport::session::{Attached, HandedOver, MoveId, OldCopy, Tell, Told};
use hikkoshi_wan::{ExtentsAnswer, Fetched, Lane, MoveLink, SourceError, SourceErrorKind, Ticket};

use super::early::Changes;
use super::gate::Gate;
use super::knocks::Knocks;
use super::relocation::{Relocation, merged_zeroes, slice_of, zero_runs};
use super::{Volume, lock};
use crate::boot;
use crate::config::{HandoffPolicy, Prepare, SourceConfig, SourceLoss};
use crate::events::EventKind;
use crate::status::LifeState;

/// How often the source is asked what has changed.
const ASK_AFTER: Duration = Duration::from_millis(250);

/// How long an answer about the move may take. A handoff syncs the source's disk, and its answer counts no
/// longer.
const PATIENCE: Duration = handover::ANSWER_COUNTS_FOR;

/// How long telling the source something that it can do without may take.
const SHORT_PATIENCE: Duration = Duration::from_secs(5);

/// The pause before something is said again that did not get through.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// The pause after the image could not take what was copied.
const STORE_PAUSE: Duration = Duration::from_secs(5);

/// Copies under way at most.
const MAX_COPIES: usize = 64;

/// A copy that gains nothing on the VM for so many seconds will not catch up by itself.
const LAG_S: u32 = 3;

/// The handoff may wait no longer for `--prepare full` when so little is left to copy.
const NEARLY_ALL_BYTES: u64 = 8 << 20;

/// The source of a move, as far as it is one of ours.
pub struct Arrival {
    pub(super) ticket: Arc<Ticket>,
    link: Arc<dyn MoveLink>,
    prepare: Prepare,
    /// The image holds the disk as it was at the handoff to [`Ticket::base`].
    has_base: bool,
    /// And the source still fetches from it what it has not yet: nothing is written into it before
    /// the handoff, and the source is served it until then.
    only_here: bool,
    old_copy_over: AtomicBool,
    /// What is read most was told by a file.
    knows_heat: bool,
    /// What may have been overwritten of that: more than the source knows of, if it lost what it had
    /// not made durable.
    overwritten: Mutex<BlockSet>,
    state: Mutex<State>,
    changed: Condvar,
    /// Entered by what is copied ahead, closed at the handoff.
    installing: Gate,
    /// One handoff or giving up at a time.
    deciding: Mutex<()>,
    wants_to_give_up: AtomicBool,
    given_up: AtomicBool,
    stopping: AtomicBool,
    /// Bytes that were copied ahead, those again that had changed included.
    copied_bytes: AtomicU64,
    /// What came of asking for the handoff.
    pub(super) knocks: Knocks,
}

struct State {
    precopy: Precopy,
    /// When the last second began, what was copied until then, and what was missing.
    second: (Duration, u64, u64),
    /// The most that was copied in a second, and for how many seconds nothing was gained.
    best_per_s: u64,
    lagging_s: u32,
    /// The VM's writes are slowed down to this, in bytes per second.
    slowed_to: u64,
    /// The tracking that it relies on.
    epoch: u64,
    /// Questions about changes that were answered.
    number: u64,
    /// All was copied once since the tracking began.
    prepared: bool,
    rests_until: Duration,
    over: bool,
    /// The source knows that the move was given up.
    abort_heard: bool,
}

/// How far the pre-copy is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prepared {
    /// Everything that is worth it is here.
    pub done: bool,
    /// Bytes that are copied, and right as far as is known.
    pub bytes: u64,
    /// Bytes that were copied again because they had changed.
    pub again_bytes: u64,
}

impl Arrival {
    /// For a source that has answered to `ticket`.
    pub fn new(
        ticket: Arc<Ticket>,
        link: Arc<dyn MoveLink>,
        wanted: &SourceConfig,
        geometry: Geometry,
    ) -> Self {
        let prepare = match wanted.prepare {
            // What is in no seed is fetched after the handoff. What is copied ahead crosses the
            // link whether a seed has it or not.
            Prepare::Ahead if !wanted.seed_images.is_empty() && ticket.base().is_none() => {
                Prepare::None
            }
            prepare => prepare,
        };
        Self {
            has_base: ticket.base().is_some(),
            only_here: false,
            old_copy_over: AtomicBool::new(false),
            knows_heat: wanted.heat.is_some(),
            ticket,
            link,
            prepare,
            overwritten: Mutex::default(),
            state: Mutex::new(State {
                precopy: match prepare {
                    Prepare::Full => Precopy::new(geometry, false).until_all_is_here(),
                    Prepare::None | Prepare::Ahead => Precopy::new(geometry, false),
                },
                second: (Duration::ZERO, 0, u64::MAX),
                best_per_s: 0,
                lagging_s: 0,
                slowed_to: 0,
                epoch: 0,
                number: 0,
                prepared: false,
                rests_until: Duration::ZERO,
                over: false,
                abort_heard: false,
            }),
            changed: Condvar::new(),
            installing: Gate::default(),
            deciding: Mutex::new(()),
            wants_to_give_up: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            copied_bytes: AtomicU64::new(0),
            knocks: Knocks::default(),
        }
    }

    /// With what an earlier run may have overwritten of the old copy.
    #[must_use]
    pub fn with_overwritten(mut self, set: BlockSet) -> Self {
        self.overwritten = Mutex::new(set);
        self
    }

    /// For a disk of which the source does not have all: the rest is only in the old copy that is
    /// here. `over`: the handoff is behind it.
    #[must_use]
    pub fn with_old_copy_needed(mut self, over: bool) -> Self {
        self.only_here = true;
        self.old_copy_over = AtomicBool::new(over);
        // What is copied ahead would be written into it.
        self.prepare = Prepare::None;
        self.installing.close();
        self
    }

    /// Lets what is copied ahead be written again.
    fn install_again(&self) {
        if self.has_base && !self.only_here {
            self.installing.open();
        }
    }

    /// What is copied ahead comes over the link of this mover, under the same caps.
    pub(super) fn share<W>(&self, mover: &Mover<W>) {
        self.state().precopy.share(mover);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What the source has said last.
    fn handed_over(&self) -> HandedOver {
        let attached = self.ticket.attached();
        attached.map_or(HandedOver::NotYet, |attached| attached.handed_over)
    }

    /// Ends whatever waits for the source.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.link.hang_up();
        drop(self.state());
        self.changed.notify_all();
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Waits for news, for at most `most`.
    fn wait<'a>(&'a self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        wait_for(&self.changed, &self.state, state, most)
    }

    pub(super) fn pause(&self, pause: Duration) {
        let state = self.state();
        if !self.is_stopping() {
            drop(self.wait(state, pause));
        }
    }
}

impl State {
    /// Begins anew if the tracking has.
    fn follow(&mut self, epoch: u64, has_base: bool) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.number = 0;
            self.prepared = false;
            self.precopy.start_over(has_base);
        }
    }
}

impl Volume {
    /// Whether the move here was given up before the handoff.
    pub fn has_given_up(&self) -> bool {
        self.arrival
            .as_ref()
            .is_some_and(|a| a.given_up.load(Ordering::Acquire))
    }

    /// Whose source the old copy here still is, while nothing was written into it.
    pub(super) fn old_copy_of(&self) -> Option<MoveId> {
        let arrival = self.arrival.as_ref().filter(|arrival| arrival.only_here)?;
        let over = arrival.old_copy_over.load(Ordering::Acquire);
        let stance = match over {
            false => handover::Stance::Standby,
            true => handover::Stance::Arriving,
        };
        handover::source_of(arrival.ticket.base(), stance)
    }

    /// Nobody reads the old copy any more, not even what was read of it before and is not sent yet:
    /// from here on it may be written into.
    pub(super) fn end_old_copy(&self) {
        if let Some(arrival) = self.arrival.as_ref().filter(|arrival| arrival.only_here) {
            arrival.old_copy_over.store(true, Ordering::Release);
            self.old_copy_is_over();
        }
    }

    /// Whether the source has only a part of the disk, and the rest is here.
    pub(super) fn rest_is_here(&self) -> bool {
        self.arrival
            .as_ref()
            .is_some_and(|arrival| arrival.only_here)
    }

    /// What a person should know of the old copy that is here.
    pub(super) fn old_copy_note(&self) -> Option<String> {
        self.old_copy_of()?;
        Some(
            "not all of the disk is at the source: the rest is only in the old copy that is here, \
             and is served to the source from it: keep the image, and this running; what was \
             written there is fetched after the handoff"
                .to_owned(),
        )
    }

    /// Whether the source has heard that the move was given up.
    pub fn abort_was_heard(&self) -> bool {
        self.arrival.as_ref().is_some_and(|a| a.state().abort_heard)
    }

    /// Whether a handoff has fenced the source, as far as it is known here, and was not recorded.
    pub(super) fn fence_note(&self) -> Option<String> {
        let arrival = self.arrival.as_ref()?;
        (arrival.handed_over() == HandedOver::Already).then(|| {
            "the source takes no more writes: `hikkoshi handoff` (or the VM's first write) \
             completes the move, `hikkoshi abort` takes it back"
                .to_owned()
        })
    }

    /// What a person should know of a move to which the source hands nothing over any more.
    pub(super) fn off_note(&self) -> Option<String> {
        let arrival = self.arrival.as_ref()?;
        (arrival.handed_over() == HandedOver::Never).then(|| {
            "the source says that this move is off: it was given up, or its fence was lifted by hand \
             there, and the disk stays there; say `hikkoshi abort` here, and begin anew"
                .to_owned()
        })
    }

    /// Whether its source keeps a fence and is to be told of the move.
    pub(super) fn has_arrival(&self) -> bool {
        self.arrival.is_some()
    }

    /// What a person should know of the pre-copy.
    pub(super) fn prepared_note(&self) -> Option<String> {
        let prepared = self.prepared()?;
        let mib = prepared.bytes >> 20;
        Some(if prepared.done {
            format!("{mib} MiB are here ahead of the handoff: all that is worth it")
        } else {
            format!("{mib} MiB are here ahead of the handoff, and more is copied")
        })
    }

    /// How far the pre-copy is; `None` where there is none.
    pub fn prepared(&self) -> Option<Prepared> {
        let arrival = self.arrival.as_ref()?;
        if arrival.prepare == Prepare::None || self.life() != LifeState::Standby {
            return None;
        }
        let state = arrival.state();
        let block = self.geometry.block_bytes();
        let missing = state.precopy.missing() * block;
        Some(Prepared {
            done: state.prepared,
            bytes: self.geometry.size_bytes().saturating_sub(missing),
            again_bytes: state.precopy.repeated() * block,
        })
    }

    /// The loop of the thread that prepares, and tells the source what it should know; returns when
    /// there is nothing more to tell.
    pub fn keep_move(self: Arc<Self>) {
        let Some(arrival) = &self.arrival else {
            return;
        };
        // A handoff that is on its way is not to wait behind an answer that can come later.
        let at_once = self.handoff_policy == HandoffPolicy::Now;
        if !at_once {
            self.ask_for_heat(arrival);
        }
        while !arrival.is_stopping() && self.life() == LifeState::Standby && !self.has_given_up() {
            let Some(relocation) = self.relocation() else {
                return;
            };
            let over = at_once || arrival.state().over;
            let has_base = arrival.has_base && !arrival.only_here;
            if (self.copies_ahead(arrival) || has_base) && !over {
                self.prepare_some(arrival, &relocation);
            } else if at_once {
                // Not by whoever opens this: a source that is away is waited for here, where it can be
                // told of, commanded and ended, and one that still has to fetch from here is served.
                if let Err(error) = self.hand_off()
                    && !arrival.is_stopping()
                {
                    if !self.awaits_source() {
                        arrival.knocks.refused(&error.to_string());
                    }
                    arrival.changed.notify_all();
                    arrival.pause(RETRY_AFTER * 10);
                }
            } else {
                arrival.pause(RETRY_AFTER);
            }
        }
        // A move that was given up must be told of until the source has heard it.
        if self.has_given_up() {
            return self.say_that_it_is_given_up(arrival);
        }
        if self.life() != LifeState::Local {
            self.ask_for_heat(arrival);
        }
        if self.wants_bases() {
            self.ask_for_bases(arrival);
        }
        while !arrival.is_stopping() && self.life() != LifeState::Local {
            arrival.pause(RETRY_AFTER);
        }
        if self.life() == LifeState::Local {
            self.tell_until_heard(
                arrival,
                Tell::Done {
                    id: arrival.ticket.id(),
                },
            );
            arrival.link.hang_up();
        }
    }

    fn say_that_it_is_given_up(&self, arrival: &Arrival) {
        let id = arrival.ticket.id();
        let mut told_it = false;
        while !arrival.is_stopping() {
            match arrival.link.tell(&Tell::Abort { id }, SHORT_PATIENCE) {
                Ok(_) => {
                    told_it = true;
                    break;
                }
                // Unreachable, or it could not make it durable: its fence stands until it has.
                Err(error) if error.kind != SourceErrorKind::Untrusted => {
                    arrival.pause(RETRY_AFTER * 10);
                }
                // It is another disk by now, or has moved on by another move.
                Err(_) => break,
            }
        }
        let heard = !arrival.is_stopping();
        if told_it && arrival.has_base {
            let mut journal = lock(&self.journal);
            if let Some(state) = journal.state.as_mut() {
                let outcome = state.change(|identity| identity.ties.gave_up = false);
                // Else the next start says it once more.
                let _ = self.note_state("recording that the source has heard", outcome);
            }
        }
        arrival.state().abort_heard = heard;
        arrival.changed.notify_all();
    }

    fn tell_until_heard(&self, arrival: &Arrival, tell: Tell) {
        while !arrival.is_stopping() {
            match arrival.link.tell(&tell, SHORT_PATIENCE) {
                Err(error) if error.kind == SourceErrorKind::Disconnected => {
                    arrival.pause(RETRY_AFTER * 10);
                }
                _ => return,
            }
        }
    }

    /// What is read most comes first. Only an order depends on the answer, so it is asked for once,
    /// and once more when nothing changes any more at the source. The next move knows it, too.
    fn ask_for_heat(&self, arrival: &Arrival) {
        let id = arrival.ticket.id();
        let (false, Some(relocation)) = (arrival.knows_heat, self.relocation()) else {
            return;
        };
        let map = match arrival.link.tell(&Tell::Heat { id }, PATIENCE) {
            Ok(Told::Heat(map)) => HeatMap::decode(&map).map_err(|error| error.to_string()),
            Ok(_) => Err("it answered something else".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        let outcome = map.and_then(|map| {
            self.heat.merge(&map).map_err(|error| error.to_string())?;
            Ok(self.heat.map().order(self.geometry))
        });
        match outcome {
            Ok(order) => relocation.set_order(order),
            Err(why) => tracing::debug!("what is read most at the source is not known: {why}"),
        }
    }

    /// Also when all is here already: where the way back is kept, the older copies are still known.
    fn wants_bases(&self) -> bool {
        self.life() != LifeState::Local || self.way_back.is_kept()
    }

    fn ask_for_bases(&self, arrival: &Arrival) {
        let id = arrival.ticket.id();
        while !arrival.is_stopping() && self.wants_bases() {
            match arrival.link.tell(&Tell::Bases { id }, PATIENCE) {
                Ok(Told::Bases(bases)) => {
                    let blocks_of = |ranges: Vec<ByteRange>| {
                        let covering = |range| self.geometry.covering(range);
                        ranges.into_iter().map(covering).collect()
                    };
                    let bases = bases
                        .into_iter()
                        .map(|(id, ranges)| (id, blocks_of(ranges)))
                        .collect();
                    if let Err(error) = self.inherit(bases) {
                        self.event(
                            EventKind::StateTrouble,
                            format!(
                                "what older copies of this disk lack could not be kept, so a way \
                                 back to them copies everything: {error}"
                            ),
                        );
                    }
                    return;
                }
                Err(error) if error.kind == SourceErrorKind::Disconnected => {
                    arrival.pause(RETRY_AFTER * 10);
                }
                _ => return,
            }
        }
    }

    // Before the handoff

    fn copies_ahead(&self, arrival: &Arrival) -> bool {
        arrival.prepare != Prepare::None && self.background
    }

    /// Begins anew where the source's tracking of changes has. Tells whether what was here at its
    /// beginning is an old copy that counts; `None`: it is not known, or could not be.
    fn follow_tracking(&self, arrival: &Arrival) -> Option<bool> {
        let attached = arrival.ticket.attached().filter(|a| a.epoch != 0)?;
        let all_copied = arrival.has_base && attached.old_copy == OldCopy::Known;
        let mut state = arrival.state();
        if state.epoch != attached.epoch {
            if arrival.has_base && !all_copied {
                drop(state);
                // The old copy is worth nothing: it is copied over.
                self.will_overwrite(arrival, &[self.geometry.all()]).ok()?;
                state = arrival.state();
            }
            state.follow(attached.epoch, all_copied);
            if all_copied {
                for run in lock(&arrival.overwritten).runs(self.geometry.blocks()) {
                    state.precopy.differs(run);
                }
            }
            state.precopy.connected(self.now(), true);
        }
        Some(all_copied)
    }

    /// Asks what has changed, and copies until it is time to ask again.
    fn prepare_some(&self, arrival: &Arrival, relocation: &Arc<Relocation>) {
        let Some(all_copied) = self.follow_tracking(arrival) else {
            return self.attach_again(arrival);
        };
        let tell = {
            let state = arrival.state();
            Tell::Changes {
                id: arrival.ticket.id(),
                epoch: state.epoch,
                number: state.number + 1,
            }
        };
        if !relocation.source.is_connected() {
            return arrival.pause(RETRY_AFTER);
        }
        match arrival.link.tell(&tell, PATIENCE) {
            Ok(Told::Changes { ranges }) => {
                let ranges: Vec<_> = ranges
                    .into_iter()
                    .map(|range| self.geometry.covering(range))
                    .collect();
                if arrival.has_base && self.will_overwrite(arrival, &ranges).is_err() {
                    // Asked again, the source says the same again.
                    return arrival.pause(STORE_PAUSE);
                }
                let mut state = arrival.state();
                let Tell::Changes { epoch, number, .. } = tell else {
                    return;
                };
                if state.epoch != epoch {
                    return;
                }
                state.number = number;
                if all_copied && number == 1 {
                    // What the source tells first is in what the old copy differs.
                    for range in ranges {
                        state.precopy.differs(range);
                    }
                } else {
                    state.precopy.changed(ranges);
                }
            }
            // Not tracked any more: others took its place, or another connection's tracking has.
            Err(error) if error.kind == SourceErrorKind::Refused => {
                return self.attach_again(arrival);
            }
            _ => return arrival.pause(RETRY_AFTER),
        }
        self.keep_up(arrival);
        let until = self.now() + ASK_AFTER;
        let paused = relocation.with_mover(|m| m.is_paused());
        // Of an old copy it is to be known what differs, also where nothing is copied ahead.
        let paused = paused || !self.copies_ahead(arrival);
        let mut state = arrival.state();
        while self.now() < until && !state.over && !arrival.is_stopping() {
            let now = self.now();
            while now >= state.rests_until
                && !paused
                && !relocation.is_store_behind()
                && state.precopy.in_flight() < MAX_COPIES
                && let Some(wanted) = state.precopy.next_paced(now)
            {
                drop(state);
                self.copy_ahead(relocation, wanted);
                state = arrival.state();
            }
            let idle = state.precopy.in_flight() == 0 && now >= state.rests_until;
            if idle && !paused && !state.prepared {
                let capped = state.precopy.next(1).is_some_and(|wanted| {
                    let (Wanted::Data(id, _) | Wanted::Extents(id, _)) = wanted;
                    state.precopy.failed(id);
                    true
                });
                if !capped {
                    state.prepared = true;
                    self.event(
                        EventKind::Prepared,
                        if self.from_image {
                            "all that can be copied before the switch is in the new image"
                        } else {
                            "all that can be copied before the handoff is here"
                        },
                    );
                }
            }
            state = arrival.wait(state, until.saturating_sub(self.now()).min(ASK_AFTER / 10));
        }
    }

    /// With `--prepare full`: where for some seconds nothing is gained on a VM that writes, although
    /// only what it changes is missing, it is slowed down to half of what the link carries, and
    /// further while that is not enough.
    fn keep_up(&self, arrival: &Arrival) {
        if arrival.prepare != Prepare::Full {
            return;
        }
        let now = self.now();
        let bytes_per_s = {
            let mut state = arrival.state();
            let (since, copied_before, missing_before) = state.second;
            if now.saturating_sub(since) < Duration::from_secs(1) {
                return;
            }
            let copied = arrival.copied_bytes.load(Ordering::Relaxed);
            let missing = state.precopy.missing() * self.geometry.block_bytes();
            state.second = (now, copied, missing);
            state.best_per_s = state.best_per_s.max(copied - copied_before);
            let lags = missing > NEARLY_ALL_BYTES / 2
                && missing >= missing_before
                && state.precopy.is_chasing();
            state.lagging_s = if lags { state.lagging_s + 1 } else { 0 };
            if state.lagging_s >= LAG_S {
                state.lagging_s = 0;
                state.slowed_to = match state.slowed_to {
                    0 => (state.best_per_s / 2).max(1),
                    slowed => (slowed / 2).max(1),
                };
            }
            state.slowed_to
        };
        if bytes_per_s > 0 {
            // Said again and again: a source that does not hear of it lifts the bound by itself.
            let id = arrival.ticket.id();
            let _ = arrival.link.tell(&Tell::Slow { id, bytes_per_s }, PATIENCE);
        }
    }

    /// Records, durably, what may be overwritten of the old copy from now on. The source would tell it
    /// again, but for what it loses in a power cut.
    fn will_overwrite(&self, arrival: &Arrival, ranges: &[BlockRange]) -> io::Result<()> {
        let Some(base) = arrival.ticket.base() else {
            return Ok(());
        };
        if arrival.only_here {
            return Err(io::Error::other("the old copy is needed as it is"));
        }
        let mut overwritten = lock(&arrival.overwritten);
        if ranges.iter().all(|range| overwritten.holds(*range)) {
            return Ok(());
        }
        let mut set = overwritten.clone();
        set.extend(ranges.iter().copied());
        let journal = lock(&self.journal);
        if self.life() != LifeState::Standby {
            // A handoff has overtaken the answer that told of them, and told them as well.
            return Ok(());
        }
        if let Some(state) = journal.state.as_ref() {
            let outcome = state.keep_overwritten(base, &set).map_err(|e| e.into_io());
            self.note_write(outcome)?;
        }
        *overwritten = set;
        Ok(())
    }

    /// What is left of the old copy when a return is given up: when it was written last, and whether
    /// it is what it was.
    fn leave_old_copy(&self, arrival: &Arrival) -> io::Result<(Option<i64>, bool)> {
        if !arrival.has_base {
            return Ok((None, false));
        }
        arrival.installing.close();
        let left = self.store.sync().and_then(|()| self.store.modified());
        if left.is_err() {
            arrival.install_again();
        }
        Ok((left?, lock(&arrival.overwritten).is_empty()))
    }

    /// Asks for the tracking that there is now, or for one at all: a source that stood by itself
    /// has none to offer before it has arrived.
    fn attach_again(&self, arrival: &Arrival) {
        if let Ok(Told::Attached(attached)) = arrival.link.tell(&arrival.ticket.tell(), PATIENCE) {
            arrival.ticket.was_told(attached);
        }
        arrival.pause(RETRY_AFTER);
    }

    fn copy_ahead(&self, relocation: &Arc<Relocation>, wanted: Wanted) {
        let (Wanted::Data(id, range) | Wanted::Extents(id, range)) = wanted;
        let bytes = self.geometry.bytes(range);
        let Some(volume) = relocation.volume() else {
            return;
        };
        match wanted {
            Wanted::Data(..) => {
                let len = u32::try_from(bytes.len()).expect("a region at most");
                let done = move |outcome| volume.copied_ahead(id, range, outcome);
                relocation
                    .source
                    .read(Lane::Bulk, bytes.start, len, Box::new(done));
            }
            Wanted::Extents(..) => {
                let done = move |outcome| volume.scanned_ahead(id, range, outcome);
                relocation
                    .source
                    .extents(Lane::Bulk, bytes.start, bytes.len(), Box::new(done));
            }
        }
    }

    /// On a thread of the source.
    fn copied_ahead(&self, id: CopyId, range: BlockRange, outcome: Result<Fetched, SourceError>) {
        let Some(arrival) = &self.arrival else {
            return;
        };
        let wire_bytes = outcome.as_ref().ok().map(|fetched| fetched.wire_bytes);
        arrival.state().precopy.arrived(self.now(), id, wire_bytes);
        let Ok(fetched) = outcome else {
            return self.not_copied(arrival, id, false);
        };
        if let Some(relocation) = self.relocation() {
            relocation.count_wire(&fetched);
        }
        // From here to the mark the handoff waits.
        let Some(_inside) = arrival.installing.enter() else {
            return;
        };
        let bytes = self.geometry.bytes(range);
        let installed = slice_of(&fetched, bytes.start, bytes.len()).and_then(|data| {
            for (offset, piece, zero) in zero_runs(bytes.start, data) {
                if zero {
                    let len = piece.len() as u64;
                    self.store.write_zeroes(offset, len, ZeroMode::MayPunch)?;
                } else {
                    self.store.write_behind(offset, piece)?;
                }
            }
            Ok(())
        });
        crash_point!("prepare.written");
        if self.note_write(installed).is_err() {
            return self.not_copied(arrival, id, true);
        }
        let copied = fetched.data.len() as u64;
        arrival.copied_bytes.fetch_add(copied, Ordering::Relaxed);
        arrival.state().precopy.landed(id);
        arrival.changed.notify_all();
    }

    fn scanned_ahead(
        &self,
        id: CopyId,
        range: BlockRange,
        outcome: Result<ExtentsAnswer, SourceError>,
    ) {
        let Some(arrival) = &self.arrival else {
            return;
        };
        let Ok(answer) = outcome else {
            return self.not_copied(arrival, id, false);
        };
        let Some(_inside) = arrival.installing.enter() else {
            return;
        };
        let told = answer
            .extents
            .last()
            .map_or(0, |e| e.offset.saturating_add(e.len));
        let end = self.geometry.bytes(range).end.min(told);
        let start = self.geometry.bytes(range).start;
        let told = self.geometry.within(ByteRange {
            start,
            end: end.max(start),
        });
        let zeroes: Vec<BlockRange> = merged_zeroes(&answer)
            .map(|bytes| self.geometry.within(bytes).intersection(range))
            .filter(|blocks| !blocks.is_empty())
            .collect();
        for zero in &zeroes {
            let bytes = self.geometry.bytes(*zero);
            let outcome = self
                .store
                .write_zeroes(bytes.start, bytes.len(), ZeroMode::MayPunch);
            if self.note_write(outcome).is_err() {
                return self.not_copied(arrival, id, true);
            }
        }
        // Less than a block answered: the first one counts as data, so that it gets on.
        let answered_to = told.end.max(range.start + 1);
        arrival.state().precopy.scanned(id, answered_to, &zeroes);
        arrival.changed.notify_all();
    }

    fn not_copied(&self, arrival: &Arrival, id: CopyId, store_failed: bool) {
        let mut state = arrival.state();
        state.precopy.failed(id);
        let pause = if store_failed {
            STORE_PAUSE
        } else {
            RETRY_AFTER
        };
        state.rests_until = self.now() + pause;
        drop(state);
        arrival.changed.notify_all();
    }

    // The handoff

    /// With `--handoff now`, where nothing was copied before: asks for data at the same time as for the
    /// handoff, if the source can say then what of that counts.
    pub(super) fn ask_early(&self, arrival: &Arrival) {
        let at_once = self.handoff_policy == HandoffPolicy::Now && !self.from_image;
        let nothing_is_here = !arrival.has_base && !arrival.only_here && !self.has_seeds();
        let tracked = |told: &Attached| told.epoch != 0 && told.handed_over == HandedOver::NotYet;
        let attached = arrival.ticket.attached().filter(tracked);
        let (true, Some(attached), Some(relocation)) =
            (at_once && nothing_is_here, attached, self.relocation())
        else {
            return;
        };
        if relocation.residency.missing_blocks() > 0 {
            // The handoff is asked for under the tracking that was there before the first question.
            arrival.state().follow(attached.epoch, false);
            relocation.ask_early(attached.epoch);
        }
    }

    /// Has the source stop the VM's writes there, for good, and takes what was copied ahead and is
    /// right. Waits as long as the policy for a lost source allows.
    ///
    /// # Errors
    /// The source refuses, or cannot be reached; nothing has happened here, and it may be tried
    /// again.
    pub(super) fn take_over(&self, arrival: &Arrival) -> io::Result<Takeover> {
        let since = self.now();
        if arrival.has_base && !arrival.only_here {
            // Right after the start: what is here counts, if it is the old copy.
            let _ = self.follow_tracking(arrival);
        }
        loop {
            if arrival.is_stopping() || arrival.wants_to_give_up.load(Ordering::Acquire) {
                return Err(io::Error::from_raw_os_error(1));
            }
            match self.ask_for_handoff(arrival) {
                Ok(takeover) => {
                    arrival.knocks.agreed();
                    return Ok(takeover);
                }
                Err(error) if error.kind == SourceErrorKind::Disconnected => {
                    self.handoff_unheard(&arrival.knocks, &error);
                    if let SourceLoss::Error(after) = self.on_loss
                        && self.now().saturating_sub(since) >= after
                    {
                        return Err(io::Error::other(format!(
                            "the handoff did not get through to the source: {error}"
                        )));
                    }
                    arrival.pause(RETRY_AFTER);
                }
                Err(error) => {
                    // Asked again and again, it may say the same for hours.
                    let is_news = arrival.knocks.refused(&error.to_string());
                    if is_news || !self.takes_over_at_once() {
                        self.event(
                            EventKind::SourceRefused,
                            format!("the source refuses the handoff: {error}"),
                        );
                    }
                    if let Some(relocation) = self.relocation() {
                        *lock(&relocation.trouble) = Some(error.clone());
                    }
                    return Err(io::Error::other(error.to_string()));
                }
            }
        }
    }

    /// Asks once for the handoff, and for what is to be known of the disk then.
    fn ask_for_handoff(&self, arrival: &Arrival) -> Result<Takeover, SourceError> {
        let id = arrival.ticket.id();
        let epoch = arrival.state().epoch;
        let asked = boot::running_for();
        let Told::Fenced { generation, ranges } =
            arrival.link.tell(&Tell::Handoff { id, epoch }, PATIENCE)?
        else {
            return Err(something_else());
        };
        crash_point!("takeover.fenced");
        if arrival.only_here {
            let lacking = self.ask_what_differs(arrival)?;
            arrival.state().over = true;
            let copied = complement(&lacking, self.geometry);
            return Ok(Takeover {
                asked,
                generation,
                copied,
                changes: None,
                lacking: Some(lacking),
            });
        }
        arrival.installing.close();
        let mut state = arrival.state();
        state.over = true;
        let known = state.epoch == epoch && epoch != 0;
        let blocks_of = |ranges: Vec<ByteRange>| {
            let covering = |range| self.geometry.covering(range);
            ranges.into_iter().map(covering).collect::<Vec<_>>()
        };
        let changes = ranges.filter(|_| known).map(|ranges| Changes {
            tracking: epoch,
            blocks: blocks_of(ranges),
        });
        let copied = match &changes {
            Some(changes) => {
                state.precopy.changed(changes.blocks.iter().copied());
                state.precopy.finish()
            }
            None => Vec::new(),
        };
        Ok(Takeover {
            asked,
            generation,
            copied,
            changes,
            lacking: None,
        })
    }

    /// In which blocks the disk that was handed over differs from the old copy that is here. The
    /// source has these and may lack all others.
    fn ask_what_differs(&self, arrival: &Arrival) -> Result<BlockSet, SourceError> {
        let id = arrival.ticket.id();
        let base = arrival.ticket.base().ok_or_else(something_else)?;
        let mut set = BlockSet::new();
        let mut from = 0;
        loop {
            let tell = Tell::Differs { id, base, from };
            let Told::Differs { ranges, more } = arrival.link.tell(&tell, PATIENCE)? else {
                return Err(something_else());
            };
            let before = from;
            for range in ranges {
                let blocks = self.geometry.within(range);
                // A block of which it has only a part could not be fetched.
                if range.start < from || self.geometry.bytes(blocks) != range {
                    return Err(something_else());
                }
                set.insert(blocks);
                from = range.end;
            }
            if !more {
                return Ok(set);
            }
            if from == before {
                return Err(something_else());
            }
        }
    }

    /// With `--prepare full`: waits until everything is here. Not where somebody else has handed off
    /// meanwhile, since nothing is prepared any more then; and not where the source is fenced for this
    /// move already: it tracks and tells no changes after a restart, and the VM runs nowhere meanwhile.
    /// Nor where the move is off there: nothing is prepared any more, and the handoff is refused with a
    /// reason that says what to do. Any other refusal may pass.
    pub(super) fn await_prepared(&self, arrival: &Arrival) -> io::Result<()> {
        // Without a background copy nothing comes ahead, however long it is waited for.
        if arrival.prepare != Prepare::Full || !self.background {
            return Ok(());
        }
        let is_over =
            || self.life() != LifeState::Standby || arrival.handed_over() != HandedOver::NotYet;
        let mut state = arrival.state();
        while !is_over() && !self.is_nearly_all_here(&state) {
            if arrival.is_stopping() || arrival.wants_to_give_up.load(Ordering::Acquire) {
                return Err(io::Error::from_raw_os_error(1));
            }
            state = arrival.wait(state, RETRY_AFTER);
        }
        Ok(())
    }

    fn is_nearly_all_here(&self, state: &State) -> bool {
        let missing = state.precopy.missing() * self.geometry.block_bytes();
        state.prepared && missing <= NEARLY_ALL_BYTES
    }

    /// Whether as much was copied ahead as was asked for, if anything was.
    pub(crate) fn is_prepared(&self) -> bool {
        self.arrival.as_ref().is_none_or(|arrival| {
            let state = arrival.state();
            match arrival.prepare {
                Prepare::None => true,
                Prepare::Ahead => state.prepared,
                Prepare::Full => self.is_nearly_all_here(&state),
            }
        })
    }

    pub(super) fn decide<'a>(&self, arrival: &'a Arrival) -> MutexGuard<'a, ()> {
        lock(&arrival.deciding)
    }

    /// Gives the move up before the handoff: this volume never takes a write, and the source is
    /// told, now or as soon as it can be reached.
    ///
    /// # Errors
    /// It is too late, or there is nothing to give up; or it could not be recorded.
    pub(super) fn give_up(&self) -> io::Result<()> {
        let Some(arrival) = &self.arrival else {
            return Err(io::Error::other(
                "there is no move from a source of ours that could be given up",
            ));
        };
        arrival.wants_to_give_up.store(true, Ordering::Release);
        arrival.changed.notify_all();
        // A handoff may be waiting for an answer that does not come.
        arrival.link.interrupt();
        let deciding = lock(&arrival.deciding);
        if self.life() != LifeState::Standby {
            arrival.wants_to_give_up.store(false, Ordering::Release);
            return Err(io::Error::other(
                "it is too late: the VM runs here already, and what it wrote is here",
            ));
        }
        let (image_mtime, intact) = match self.leave_old_copy(arrival) {
            Ok(left) => left,
            Err(error) => {
                arrival.wants_to_give_up.store(false, Ordering::Release);
                return Err(error);
            }
        };
        let mut journal = lock(&self.journal);
        if let Some(state) = journal.state.as_mut() {
            let outcome = state.give_up(image_mtime, intact);
            let outcome = self.note_state("recording that the move is given up", outcome);
            if outcome.is_err() {
                arrival.install_again();
                arrival.wants_to_give_up.store(false, Ordering::Release);
            }
            outcome?;
        }
        drop(journal);
        crash_point!("give-up.recorded");
        arrival.given_up.store(true, Ordering::Release);
        // What it still reads is for nobody's disk: the source need not prepare for it again.
        arrival.ticket.fall_silent();
        arrival.state().over = true;
        drop(deciding);
        arrival.changed.notify_all();
        if let Some(relocation) = self.relocation() {
            relocation.settle_nothing();
            // What was being copied ahead.
            let all = self.geometry.size_bytes();
            relocation.source().cancel(Lane::Bulk, 0, all);
        }
        self.event(
            EventKind::MoveGivenUp,
            if self.from_image {
                "the move to another image was given up; the disk stays where it is"
            } else {
                "the move was given up; the VM goes on at the source"
            },
        );
        // The thread that keeps the move says so; where the source can be reached it is quick.
        arrival.link.interrupt();
        let until = self.now() + SHORT_PATIENCE;
        let mut state = arrival.state();
        while !state.abort_heard && !arrival.is_stopping() && self.now() < until {
            state = arrival.wait(state, RETRY_AFTER);
        }
        if !state.abort_heard {
            tracing::warn!(
                "the source has not heard yet that the move was given up, and is told as soon as \
                 it can be reached: keep this running until its writes are accepted"
            );
        }
        Ok(())
    }
}

/// What the handoff brought.
pub(super) struct Takeover {
    /// When it was asked for, as the machine counts.
    asked: Duration,
    /// The source's generation.
    pub generation: u64,
    /// What was copied ahead, or was here before, and is what the source has for good.
    pub copied: Vec<BlockRange>,
    /// What the VM has changed at the source since it told so last, or since the tracking began where it
    /// never did; `None`: nobody knows.
    pub changes: Option<Changes>,
    /// What the source has and nothing else, where all that it does not have is here.
    pub lacking: Option<BlockSet>,
}

impl Takeover {
    /// Whether the source's word may be acted on. One that was held up for too long, here or on its way, may
    /// have been taken back by hand since; asked again, the source says how it stands.
    pub fn counts(&self) -> bool {
        handover::answer_counts(self.asked, boot::running_for())
    }
}

fn something_else() -> SourceError {
    SourceError::new(
        SourceErrorKind::Refused,
        "the source answered something else",
    )
}

/// All blocks that are not in a set.
pub(super) fn complement(set: &BlockSet, geometry: Geometry) -> Vec<BlockRange> {
    let all = geometry.all();
    let mut at = all.start;
    let mut runs = Vec::new();
    for run in set.runs(all.end) {
        if at < run.start {
            runs.push(BlockRange::new(at, run.start));
        }
        at = run.end;
    }
    if at < all.end {
        runs.push(BlockRange::new(at, all.end));
    }
    runs
}
