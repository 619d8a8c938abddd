//! An export: a name, and the volume that has its disk now.
//!
//! There is one volume for as long as the disk keeps its storage, and two while that changes
//! (`transfer.rs` drives it). Owns the running volumes, from start to end. Everybody else asks
//! for [`Export::volume`] when they begin something, and keeps what they got for as long as that takes.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};
use std::thread::JoinHandle;

use hikkoshi_engine::heat::HeatMap;

use crate::config::{ExportConfig, SourceConfig, StorageOrder};
use crate::events::Event;
use crate::links::CommonCap;
use crate::registry::{CommandError, Controlled};
use crate::status::{ExportStatus, StoragePhase};
use crate::transfer::{Transfer, Underway};
use crate::verification::VerifyStatus;
use crate::volume::open::{OpenError, Running};
use crate::volume::storage::ImageAddress;
use crate::volume::storage::open::{Beside, open_beside};
use crate::volume::{Volume, lock};

/// A disk under its name.
pub struct Export {
    me: Weak<Self>,
    current: RwLock<Arc<Volume>>,
    held: Mutex<Held>,
    /// The last change of storage, if there was one.
    transfer: Mutex<Option<Arc<Transfer>>>,
    /// Volumes that had the disk before, and still have clients that have not asked for anything
    /// since.
    before: Mutex<Vec<Weak<Volume>>>,
    /// Held over the beginning of one: one at a time.
    beginning: Mutex<()>,
    /// What caps it together with others.
    cap: OnceLock<CommonCap>,
}

/// What must be closed in the end.
#[derive(Default)]
struct Held {
    /// What the current volume was opened with.
    config: Option<ExportConfig>,
    running: Option<Running>,
    /// What the current volume still reads, where the daemon ends before it has all.
    old: Option<Running>,
    /// Drives a change of storage.
    thread: Option<JoinHandle<()>>,
    closing: bool,
}

impl Export {
    fn new(volume: Arc<Volume>, held: Held) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            current: RwLock::new(volume),
            held: Mutex::new(held),
            transfer: Mutex::default(),
            before: Mutex::default(),
            beginning: Mutex::default(),
            cap: OnceLock::new(),
        })
    }

    /// Of a volume that somebody else opened and closes.
    pub fn of(volume: Arc<Volume>) -> Arc<Self> {
        Self::new(volume, Held::default())
    }

    /// Opens it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(config: &ExportConfig) -> Result<Arc<Self>, OpenError> {
        let mut running = Running::open(config)?;
        let volume = Arc::clone(running.volume());
        let old = running.take_old();
        let held = Held {
            config: Some(config.clone()),
            running: Some(running),
            ..Held::default()
        };
        let export = Self::new(Arc::clone(&volume), held);
        if let Some(old) = old {
            let transfer = Transfer::resumed(&volume, old.volume());
            export.drive(Underway::resumed(transfer, old))?;
        }
        Ok(export)
    }

    /// What it copies, also when it changes its storage, is under this cap from now on. Once.
    pub fn cap_by(&self, cap: CommonCap) {
        let _ = self.cap.set(cap);
    }

    /// Where its disk is now.
    pub fn volume(&self) -> Arc<Volume> {
        let current = self.current.read();
        Arc::clone(&current.unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Makes everything durable and lets go of it. A change of storage is given up before the switch,
    /// and goes on with the next start after it.
    ///
    /// # Errors
    /// Something could not be made durable. What was flushed before is.
    pub fn close(&self) -> io::Result<()> {
        let thread = {
            let mut held = lock(&self.held);
            held.closing = true;
            held.thread.take()
        };
        if let Some(transfer) = self.transfer() {
            transfer.stop();
        }
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        let (running, old) = {
            let mut held = lock(&self.held);
            (held.running.take(), held.old.take())
        };
        let closed = running.map_or(Ok(()), Running::close);
        let old_closed = old.map_or(Ok(()), Running::close);
        closed.and(old_closed)
    }

    /// Is closed with the export.
    pub(crate) fn keep_old(&self, old: Option<Running>) {
        lock(&self.held).old = old;
    }

    fn transfer(&self) -> Option<Arc<Transfer>> {
        lock(&self.transfer).clone()
    }

    /// The volume that commands to the copy are meant for.
    fn copying(&self) -> Arc<Volume> {
        let preparing = self.transfer().and_then(|transfer| transfer.standing_by());
        preparing.unwrap_or_else(|| self.volume())
    }

    fn drive(self: &Arc<Self>, underway: Underway) -> Result<(), OpenError> {
        let mut held = lock(&self.held);
        *lock(&self.transfer) = Some(underway.transfer());
        let export = Arc::clone(self);
        let driving = std::thread::Builder::new()
            .name("storage".into())
            .spawn(move || underway.run(&export));
        match driving {
            Ok(thread) => held.thread = Some(thread),
            Err(error) => {
                lock(&self.transfer).take();
                return Err(OpenError::Thread(error));
            }
        }
        Ok(())
    }

    /// The disk is in another image from now on. Gives what has run until now.
    pub(crate) fn replace(&self, running: Running) -> Option<Running> {
        let mut held = lock(&self.held);
        let volume = Arc::clone(running.volume());
        let before = {
            let mut current = self
                .current
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::replace(&mut *current, volume)
        };
        lock(&self.before).push(Arc::downgrade(&before));
        if let (Some(config), Some(transfer)) = (&mut held.config, self.transfer()) {
            *config = transfer.config_of_new(config);
        }
        held.running.replace(running)
    }

    fn begin(&self, order: &StorageOrder) -> Result<(), CommandError> {
        let _one_at_a_time = lock(&self.beginning);
        let old = self.volume();
        let conflict = |why: String| CommandError::Conflict(why);
        if let Some(why) = old.holds_storage() {
            return Err(conflict(why));
        }
        if self
            .transfer()
            .is_some_and(|transfer| transfer.is_underway())
        {
            return Err(conflict(format!(
                "the last move of export {:?} to another image is not over yet; wait for its end",
                old.name()
            )));
        }
        let (config, last) = {
            let mut held = lock(&self.held);
            let config = held.config.clone().filter(|_| !held.closing);
            (config, held.thread.take())
        };
        if let Some(last) = last {
            let _ = last.join();
        }
        let (Some(config), Some(export)) = (config, self.me.upgrade()) else {
            return Err(conflict("the daemon is ending".to_owned()));
        };
        let from = ImageAddress::new(&config.image, config.state_dir.as_deref());
        let wanted = SourceConfig {
            prepare: order.prepare,
            max_rate: order.max_rate,
            overwrite: order.overwrite,
            way_back: old.keeps_way_back(),
            // Nobody but us says when.
            handoff: crate::config::HandoffPolicy::Command,
            ..SourceConfig::new(from.map_err(conflict)?.to_string())
        };
        let new_config = ExportConfig {
            image: order.image.clone(),
            state_dir: order.state_dir.clone(),
            block_bytes: u32::try_from(old.geometry().block_bytes()).unwrap_or(config.block_bytes),
            source: Some(wanted.clone()),
            ..config
        };
        let Beside { running, made } =
            open_beside(&new_config, &wanted, &old).map_err(|error| match error {
                OpenError::Refused(why) => CommandError::Conflict(why),
                error => CommandError::Failed(error.to_string()),
            })?;
        if let Some(cap) = self.cap.get() {
            cap.join(running.volume());
        }
        running.volume().share_events(&old);
        let before = Arc::clone(&old);
        let underway = Underway::begun(new_config, running, old, made);
        export.drive(underway).map_err(|error| {
            before.forget_storage_move();
            CommandError::Failed(error.to_string())
        })
    }
}

impl Controlled for Export {
    fn status(&self) -> ExportStatus {
        let mut status = self.volume().status();
        let mut before = lock(&self.before);
        before.retain(|volume| volume.strong_count() > 0);
        for volume in before.iter().filter_map(Weak::upgrade) {
            status.clients += volume.tally.clients.load(Ordering::Relaxed);
        }
        drop(before);
        let Some(transfer) = self.transfer() else {
            return status;
        };
        if let Some(new) = transfer.standing_by() {
            let ahead = new.status();
            status.background = ahead.background;
            status.limit_bytes_per_s = ahead.limit_bytes_per_s;
            status.common_limit_bytes_per_s = ahead.common_limit_bytes_per_s;
            status.disk_full |= ahead.disk_full;
        }
        let told = transfer.status();
        status.notes.extend(told.note());
        status.storage_move = Some(told);
        status
    }

    fn heat(&self) -> HeatMap {
        Controlled::heat(&*self.volume())
    }

    fn pause(&self) -> Result<(), CommandError> {
        self.copying().pause()
    }

    fn resume(&self) -> Result<(), CommandError> {
        self.copying().resume()
    }

    fn set_limit(&self, bytes_per_s: Option<u64>) -> Result<(), CommandError> {
        self.copying().set_limit(bytes_per_s)
    }

    fn handoff(&self) -> Result<(), CommandError> {
        match self.transfer().filter(|t| t.standing_by().is_some()) {
            Some(transfer) => transfer.switch_now(),
            None => self.volume().handoff(),
        }
    }

    fn abort(&self) -> Result<(), CommandError> {
        match self.transfer().filter(|transfer| transfer.is_underway()) {
            Some(transfer) => transfer.give_up(),
            None => self.volume().abort(),
        }
    }

    fn release(&self, force: bool) -> Result<(), CommandError> {
        self.volume().release(force)
    }

    fn events(&self, since: u64) -> Vec<Event> {
        self.volume().events(since)
    }

    fn verify(&self, accept: bool) -> Result<VerifyStatus, CommandError> {
        self.volume().verify(accept)
    }

    fn verification(&self) -> VerifyStatus {
        self.volume().verification()
    }

    fn move_storage(&self, order: &StorageOrder) -> Result<(), CommandError> {
        self.begin(order)
    }
}

impl crate::status::StorageMoveStatus {
    /// The same for people.
    fn note(&self) -> Option<String> {
        let (from, to) = (&self.from, &self.to);
        let mib = self.copied_bytes >> 20;
        Some(match self.phase {
            StoragePhase::Preparing => format!(
                "the disk is being copied to {to}, {mib} MiB so far; until the switch, which comes by \
                 itself (or now, by `hikkoshi handoff`), it is in {from}, and `hikkoshi abort` leaves it \
                 there{}",
                if self.message.is_empty() { "" } else { "; " }.to_owned() + &self.message
            ),
            StoragePhase::Switching => format!("the disk is about to go over to {to}"),
            StoragePhase::Copying if !self.message.is_empty() => self.message.clone(),
            StoragePhase::Copying => format!(
                "the disk is in {to} from now on, and what it still lacks comes from {from}: keep both"
            ),
            StoragePhase::Done => format!(
                "the disk has left {from} for {to}; the old image is needed no more and takes no writes; \
                 where a configuration file or a unit names it, name {to} there"
            ),
            StoragePhase::Failed => return None,
        })
    }
}
