//! The course of a move from one image of this machine to another, under clients that stay.
//!
//! One thread for each move. In order:
//! 1. the new image is copied ahead, while all goes on at the old one;
//! 2. both are synced, so that little is left for 4;
//! 3. writes that come from now on wait;
//! 4. the old volume is fenced for good and durably, then the new one recorded as the one that has the
//!    disk (both by [`Volume::hand_off`]);
//! 5. the clients go over, the writes that waited first;
//! 6. what the new image lacks comes from the old one;
//! 7. the old one is let go of.
//!
//! Until 4 has fenced the old volume, everything can be given up. From there on the disk is in the new
//! image, whatever happens to the process: a restart names it.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use hikkoshi_crashpoint::crash_point;
use hikkoshi_store::medium::is_no_space;

use crate::config::ExportConfig;
use crate::events::EventKind;
use crate::export::Export;
use crate::registry::{CommandError, Controlled as _};
use crate::status::{StorageMoveStatus, StoragePhase};
use crate::volume::open::Running;
use crate::volume::storage::open::discard;
use crate::volume::{Volume, lock};

/// How often it is looked how far the copy is.
const POLL: Duration = Duration::from_millis(50);

/// Syncs before the switch: the first may take long, and what is written meanwhile needs another.
const SYNCS: usize = 3;

/// A sync that took no longer is not worth another before the switch.
const SHORT_SYNC: Duration = Duration::from_millis(50);

/// What the status and commands share with the thread.
pub struct Transfer {
    new_config: Option<ExportConfig>,
    new: Arc<Volume>,
    from: String,
    to: String,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    phase: StoragePhase,
    switch_now: bool,
    give_up: bool,
    stopping: bool,
    switch_us: Option<u64>,
    message: String,
}

impl Transfer {
    fn new(
        new_config: Option<ExportConfig>,
        new: &Arc<Volume>,
        old: &Arc<Volume>,
        phase: StoragePhase,
    ) -> Arc<Self> {
        Arc::new(Self {
            new_config,
            new: Arc::clone(new),
            from: old.image().display().to_string(),
            to: new.image().display().to_string(),
            state: Mutex::new(State {
                phase,
                switch_now: false,
                give_up: false,
                stopping: false,
                switch_us: None,
                message: String::new(),
            }),
            changed: Condvar::new(),
        })
    }

    /// One whose switch an earlier process has made.
    pub fn resumed(new: &Arc<Volume>, old: &Arc<Volume>) -> Arc<Self> {
        Self::new(None, new, old, StoragePhase::Copying)
    }

    /// The new volume, before the switch.
    pub fn standing_by(&self) -> Option<Arc<Volume>> {
        let before = lock(&self.state).phase == StoragePhase::Preparing;
        before.then(|| Arc::clone(&self.new))
    }

    /// Whether there is still something to do.
    pub fn is_underway(&self) -> bool {
        !matches!(
            lock(&self.state).phase,
            StoragePhase::Done | StoragePhase::Failed
        )
    }

    /// How far it is.
    pub fn status(&self) -> StorageMoveStatus {
        let copied_bytes = if self.new.prepared().is_some() {
            self.new.prepared().map_or(0, |p| p.bytes)
        } else {
            self.new.status().resident_bytes
        };
        let state = lock(&self.state);
        let message = match state.phase {
            StoragePhase::Preparing if self.new.is_disk_full() => {
                "there is no space for the new image; the copy goes on once there is".to_owned()
            }
            _ => state.message.clone(),
        };
        StorageMoveStatus {
            from: self.from.clone(),
            to: self.to.clone(),
            phase: state.phase,
            copied_bytes,
            switch_us: state.switch_us,
            message,
        }
    }

    /// The configuration of the export after the switch.
    pub fn config_of_new(&self, before: &ExportConfig) -> ExportConfig {
        self.new_config.clone().unwrap_or_else(|| before.clone())
    }

    /// Does not wait until all is copied that could be.
    ///
    /// # Errors
    /// It fails. Returns once the disk is in the new image.
    pub fn switch_now(&self) -> Result<(), CommandError> {
        self.ask(|state| state.switch_now = true)?;
        let state = self.settled();
        match state.phase {
            StoragePhase::Failed => Err(CommandError::Failed(format!(
                "the disk stays where it is: {}",
                state.message
            ))),
            _ => Ok(()),
        }
    }

    /// Leaves the disk where it is. Returns when that is settled.
    ///
    /// # Errors
    /// The switch has been made.
    pub fn give_up(&self) -> Result<(), CommandError> {
        self.ask(|state| state.give_up = true)?;
        match self.settled().phase {
            StoragePhase::Failed => Ok(()),
            _ => Err(self.too_late()),
        }
    }

    fn too_late(&self) -> CommandError {
        CommandError::Conflict(format!(
            "it is too late: the disk is in {} already, and what was written since is there",
            self.to
        ))
    }

    fn ask(&self, ask: impl FnOnce(&mut State)) -> Result<(), CommandError> {
        let mut state = lock(&self.state);
        if !matches!(
            state.phase,
            StoragePhase::Preparing | StoragePhase::Switching
        ) {
            return Err(self.too_late());
        }
        ask(&mut state);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until it is known where the disk is.
    fn settled(&self) -> std::sync::MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        while matches!(
            state.phase,
            StoragePhase::Preparing | StoragePhase::Switching
        ) {
            state = self.wait(state);
        }
        state
    }

    /// The daemon ends.
    pub fn stop(&self) {
        lock(&self.state).stopping = true;
        self.changed.notify_all();
    }

    fn wait<'a>(
        &self,
        state: std::sync::MutexGuard<'a, State>,
    ) -> std::sync::MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, POLL);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    fn goes_to(&self, phase: StoragePhase, message: impl Into<String>) {
        let mut state = lock(&self.state);
        state.phase = phase;
        state.message = message.into();
        drop(state);
        self.changed.notify_all();
    }
}

/// A move, and what the thread that drives it owns.
pub struct Underway {
    transfer: Arc<Transfer>,
    /// The new volume, before the switch.
    new: Option<Running>,
    /// The old volume, after it.
    old: Option<Running>,
    old_volume: Arc<Volume>,
    /// The new image was made for it.
    made: bool,
}

/// Why the disk stays where it is.
enum Stay {
    /// It was wanted.
    GivenUp(&'static str),
    Failed(String),
}

impl Underway {
    /// One that begins.
    pub fn begun(new_config: ExportConfig, new: Running, old: Arc<Volume>, made: bool) -> Self {
        let phase = StoragePhase::Preparing;
        Self {
            transfer: Transfer::new(Some(new_config), new.volume(), &old, phase),
            new: Some(new),
            old: None,
            old_volume: old,
            made,
        }
    }

    /// One whose switch an earlier process has made.
    pub fn resumed(transfer: Arc<Transfer>, old: Running) -> Self {
        Self {
            transfer,
            new: None,
            old_volume: Arc::clone(old.volume()),
            old: Some(old),
            made: false,
        }
    }

    /// What is shared of it.
    pub fn transfer(&self) -> Arc<Transfer> {
        Arc::clone(&self.transfer)
    }

    /// The thread's course; returns at its end, or that of the daemon.
    pub fn run(mut self, export: &Export) {
        if let Some(new) = self.new.take()
            && let Err((new, stay)) = self.prepare_and_switch(export, new)
        {
            return self.stay(new, &stay);
        }
        self.finish(export);
    }

    fn prepare_and_switch(&mut self, export: &Export, new: Running) -> Result<(), (Running, Stay)> {
        if let Err(stay) = self.await_prepared(new.volume()) {
            return Err((new, stay));
        }
        let began = Instant::now();
        // 3. writes wait
        self.old_volume.begin_switch();
        // 4. the fence, and then the word of the new volume
        let outcome = new.volume().hand_off();
        if let Err(error) = outcome {
            return self.not_switched(export, new, &error);
        }
        self.switched(export, new);
        let held_up = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        lock(&self.transfer.state).switch_us = Some(held_up);
        self.transfer.goes_to(StoragePhase::Copying, "");
        tracing::info!(export = %self.old_volume.name(), "the switch took {held_up} us");
        Ok(())
    }

    /// 1. and 2., and again where the VM was faster meanwhile.
    fn await_prepared(&self, new: &Arc<Volume>) -> Result<(), Stay> {
        loop {
            self.await_copied(new)?;
            self.sync_both(new)?;
            let prepared = new.is_prepared();
            let mut state = lock(&self.transfer.state);
            Self::check(&state)?;
            if prepared || state.switch_now {
                state.phase = StoragePhase::Switching;
                return Ok(());
            }
        }
    }

    fn await_copied(&self, new: &Arc<Volume>) -> Result<(), Stay> {
        let transfer = &self.transfer;
        loop {
            let prepared = new.is_prepared();
            let state = lock(&transfer.state);
            Self::check(&state)?;
            if new.is_poisoned() {
                return Err(Stay::Failed(format!("a sync of {} failed", transfer.to)));
            }
            if prepared || state.switch_now {
                return Ok(());
            }
            drop(transfer.wait(state));
        }
    }

    fn sync_both(&self, new: &Arc<Volume>) -> Result<(), Stay> {
        let transfer = &self.transfer;
        for _ in 0..SYNCS {
            let began = Instant::now();
            for (volume, image) in [(new, &transfer.to), (&self.old_volume, &transfer.from)] {
                volume
                    .commit()
                    .map_err(|error| Stay::Failed(format!("syncing {image} failed: {error}")))?;
            }
            if began.elapsed() < SHORT_SYNC {
                break;
            }
        }
        Ok(())
    }

    fn check(state: &State) -> Result<(), Stay> {
        if state.give_up {
            return Err(Stay::GivenUp("it was given up"));
        }
        if state.stopping {
            return Err(Stay::GivenUp("the daemon ended before the switch"));
        }
        Ok(())
    }

    /// 5. the clients go over
    fn switched(&mut self, export: &Export, new: Running) {
        let volume = Arc::clone(new.volume());
        volume.tally.take_over(&self.old_volume.tally);
        self.old = export.replace(new);
        self.old_volume.end_switch(Some(&volume));
        crash_point!("storage.switched");
    }

    /// The handoff has failed: before the fence, or behind it.
    fn not_switched(
        &mut self,
        export: &Export,
        new: Running,
        error: &std::io::Error,
    ) -> Result<(), (Running, Stay)> {
        let why = Stay::Failed(format!("the switch failed: {error}"));
        if !self.old_volume.has_left_for_storage() {
            self.old_volume.end_switch(None);
            return Err((new, why));
        }
        // For want of space nothing was recorded: the new volume stands by, and so is no danger to
        // anybody (it could go on only behind the old one's fence).
        if is_no_space(error) && !new.volume().is_poisoned() {
            // The fence is lifted when it has given up.
            return Err((new, why));
        }
        // Nobody knows what its medium holds. It is served as it is, poisoned: it refuses writes, as
        // the old one does, and a restart tells.
        self.old = export.replace(new);
        self.old_volume.end_switch(None);
        let to = &self.transfer.to;
        let why = format!(
            "it could not be recorded that the disk is in {to} ({error}): nothing is written to either \
             image; check the medium and serve {to} again: the switch goes on then"
        );
        self.old_volume.event(EventKind::StateTrouble, why.clone());
        self.transfer.goes_to(StoragePhase::Copying, why);
        Ok(())
    }

    /// The disk stays in the old image.
    fn stay(self, new: Running, stay: &Stay) {
        let (why, wanted) = match stay {
            Stay::GivenUp(why) => ((*why).to_owned(), true),
            Stay::Failed(why) => (why.clone(), false),
        };
        let volume = Arc::clone(new.volume());
        if !wanted {
            volume.event(
                EventKind::StateTrouble,
                format!("the move to {} failed: {why}", self.transfer.to),
            );
        }
        // Durable before the fence is lifted, where there is one. Where it cannot be recorded, the
        // volume stands by for good, which is as good: see above.
        if let Err(error) = volume.abort() {
            tracing::warn!("giving up could not be recorded: {error}");
        }
        self.old_volume.take_back_storage_move();
        self.old_volume.end_switch(None);
        if let Err(error) = new.close() {
            tracing::warn!("{} could not be closed: {error}", self.transfer.to);
        }
        volume.let_go();
        if let Some(config) = &self.transfer.new_config {
            discard(config, self.made);
        }
        self.transfer.goes_to(StoragePhase::Failed, why);
    }

    /// 6. and 7.
    fn finish(self, export: &Export) {
        let new = Arc::clone(&self.transfer.new);
        loop {
            let state = lock(&self.transfer.state);
            // Its last word is that all has arrived: then it has asked for the older copies, too.
            let arrived = new.is_local() && self.old_volume.has_arrived_elsewhere();
            if arrived && self.old_volume.is_deserted() {
                break;
            }
            if state.stopping {
                // Closed after the one that still reads it.
                return export.keep_old(self.old);
            }
            drop(self.transfer.wait(state));
        }
        let closed = self.old.map_or(Ok(()), Running::close);
        if let Err(error) = closed {
            // It was durable when it was fenced, and nothing was written since.
            tracing::warn!("{} could not be closed: {error}", self.transfer.from);
        }
        self.old_volume.let_go();
        crash_point!("storage.released");
        let (from, to) = (&self.transfer.from, &self.transfer.to);
        new.event(
            EventKind::Departed,
            format!(
                "all of the disk is in {to}; the old image {from} is needed no more: it is kept, and takes \
                 no writes"
            ),
        );
        self.transfer.goes_to(StoragePhase::Done, "");
    }
}
