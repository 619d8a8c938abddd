//! A daemon that starts: it can be asked and commanded from its first moment, and serves as soon as what
//! can be opened is.
//!
//! Each export that has a source is opened on a thread of its own, since that may take as long as the
//! source is away; all others in turn on one. What they come to is in their [`Slot`]s. The rule for when
//! clients are let in is [`Starting::settle`]'s.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hikkoshi_wan::transport::session::BootId;

use crate::config::DaemonConfig;
use crate::control;
use crate::daemon::{Daemon, DaemonError, Interfaces, check, close_all, summary};
use crate::export::Export;
use crate::front::{Front, Table};
use crate::heat::Keeper;
use crate::links::{CommonCap, Links};
use crate::registry::Exports;
use crate::slot::{Bell, Slot, Stage};
use crate::volume::lock;

/// So long others wait for a disk that was never here: its source may be slow, or fall silent.
const FIRST_START_GRACE: Duration = Duration::from_secs(3);

/// How often whoever starts looks at whether it is to end.
const BEAT: Duration = Duration::from_millis(100);

/// How long the end of a start waits for what it has begun to open. What takes longer waits for a
/// source, and changes nothing, or for the local disk, and can be cut off as by a kill.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// How long a source that is away is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// A handoff at the start is waited for without end; a first start fails at once.
    Endless,
    /// It is not: all else is served meanwhile.
    Short,
}

/// What each opened export becomes part of.
struct Joins {
    links: Mutex<Links>,
    cap: CommonCap,
    boot: Option<BootId>,
}

impl Joins {
    fn join(&self, export: &Arc<Export>) {
        let volume = export.volume();
        if let Some(boot) = self.boot {
            volume.pretend_boot(boot);
        }
        lock(&self.links).join(&volume);
        export.cap_by(self.cap.clone());
    }
}

/// The threads that open exports.
#[derive(Default)]
pub(crate) struct Openers(Vec<JoinHandle<()>>);

impl Openers {
    /// Ends them, and waits a moment for it.
    pub fn stop(&mut self, slots: &[Arc<Slot>]) {
        slots.iter().for_each(|slot| slot.stop());
        let until = Instant::now() + END_PATIENCE;
        for thread in self.0.drain(..) {
            while !thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            if thread.is_finished() {
                // A panic there has been printed.
                let _ = thread.join();
            }
        }
    }
}

/// A daemon that can be asked and commanded, and does not serve yet. Dropped, it ends in good order.
pub struct Starting {
    config: DaemonConfig,
    table: Arc<Table>,
    bell: Arc<Bell>,
    parts: Option<(Interfaces, Openers)>,
}

impl fmt::Debug for Starting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Starting").finish_non_exhaustive()
    }
}

/// What there is to do about a start.
enum Next {
    Wait,
    Serve,
    Fail(DaemonError),
}

impl Starting {
    pub(crate) fn begin_under(
        config: DaemonConfig,
        boot: Option<BootId>,
        patience: Patience,
    ) -> Result<Self, DaemonError> {
        check(&config)?;
        let cap = CommonCap::new(config.max_rate_all);
        let slots: Vec<_> = config.exports.iter().map(Slot::new).map(Arc::new).collect();
        let table = Arc::new(Table {
            slots,
            cap: cap.clone(),
        });
        let interfaces = interfaces(&config, &table)?;
        let joins = Arc::new(Joins {
            links: Mutex::new(Links::under(cap.clone())),
            cap,
            boot,
        });
        let mut starting = Self {
            config,
            table,
            bell: Arc::default(),
            parts: Some((interfaces, Openers::default())),
        };
        starting.open(&joins, patience)?;
        Ok(starting)
    }

    fn open(&mut self, joins: &Arc<Joins>, patience: Patience) -> Result<(), DaemonError> {
        let exports = self.config.exports.iter().cloned();
        let all = self.table.slots.iter().cloned().zip(exports);
        let (moving, plain): (Vec<_>, Vec<_>) = all.partition(|(_, c)| c.source.is_some());
        let mut groups: Vec<_> = moving.into_iter().map(|one| vec![one]).collect();
        if !plain.is_empty() {
            groups.insert(0, plain);
        }
        let patient = patience == Patience::Endless;
        for group in groups {
            let (bell, joins) = (Arc::clone(&self.bell), Arc::clone(joins));
            let run = move || {
                for (slot, config) in &group {
                    slot.open(config, patient, &bell, &|export| joins.join(export));
                }
            };
            let thread = std::thread::Builder::new().name("open".into()).spawn(run);
            let thread = thread.map_err(|source| DaemonError::Thread { source })?;
            if let Some((_, openers)) = &mut self.parts {
                openers.0.push(thread);
            }
        }
        Ok(())
    }

    /// What is open and what is waited for, in few words.
    pub fn summary(&self) -> String {
        let open = |slot: &&Arc<Slot>| slot.export().is_some();
        let (open, all) = (
            self.table.slots.iter().filter(open).count(),
            self.table.slots.len(),
        );
        format!(
            "starting: {open} of {all} open; {}",
            summary(&self.table.slots)
        )
    }

    /// Lets clients in as soon as every export is open, but for those that have to wait for their source,
    /// for whom nobody else waits. Where all of them do, nothing could be served, and an address that is
    /// mistyped looks the same: it fails. `go_on` is called now and then; `None` if it says no.
    ///
    /// # Errors
    /// An export cannot be opened for another reason, or an address cannot be listened on. Nothing is
    /// served then.
    pub fn settle(
        self,
        go_on: &mut dyn FnMut(&Self) -> bool,
    ) -> Result<Option<Daemon>, DaemonError> {
        let begun = Instant::now();
        loop {
            let late = begun.elapsed() >= FIRST_START_GRACE;
            match self.next(late) {
                Next::Serve => return self.serve().map(Some),
                Next::Fail(error) => return Err(error),
                Next::Wait => {}
            }
            if !go_on(&self) {
                return Ok(None);
            }
            self.bell.wait(BEAT);
        }
    }

    /// Lets clients in once every export is open.
    ///
    /// # Errors
    /// As [`Starting::settle`], also where a source is away.
    pub(crate) fn with_all(self) -> Result<Daemon, DaemonError> {
        loop {
            let mut waits = self.table.slots.iter();
            if let Some(error) = waits.find_map(|slot| gives_up(slot, true)) {
                return Err(error);
            }
            let is_open = |slot: &Arc<Slot>| slot.look(|stage| matches!(stage, Stage::Open));
            if self.table.slots.iter().all(is_open) {
                return self.serve();
            }
            self.bell.wait(BEAT);
        }
    }

    fn next(&self, late: bool) -> Next {
        let slots = &self.table.slots;
        if let Some(error) = slots.iter().find_map(|slot| gives_up(slot, false)) {
            return Next::Fail(error);
        }
        let (mut served, mut to_wait_for) = (0, 0);
        for slot in slots {
            slot.look(|stage| match stage {
                Stage::Open => served += 1,
                Stage::Opening if !(late && slot.is_first_start()) => to_wait_for += 1,
                Stage::Opening | Stage::Waits(_) | Stage::Failed(_) => {}
            });
        }
        if to_wait_for > 0 {
            return Next::Wait;
        }
        if served > 0 {
            return Next::Serve;
        }
        let opening = |slot: &Arc<Slot>| slot.look(|stage| matches!(stage, Stage::Opening));
        if slots.iter().any(opening) {
            return Next::Wait;
        }
        let error = slots.iter().find_map(|slot| gives_up(slot, true));
        error.map_or(Next::Wait, Next::Fail)
    }

    fn serve(mut self) -> Result<Daemon, DaemonError> {
        self.table.slots.iter().for_each(|slot| slot.leave_alone());
        // Since they were looked at last.
        if let Some(error) = self
            .table
            .slots
            .iter()
            .find_map(|slot| gives_up(slot, false))
        {
            return Err(error);
        }
        let (table, config) = (&self.table, &self.config);
        let front = Front::start(
            Arc::clone(table),
            &config.listen,
            config.max_clients,
            config.congestion.clone(),
        )
        .map_err(|(address, source)| DaemonError::Listen {
            address: address.to_string(),
            source,
        })?;
        let heat = match Keeper::start(table.slots.clone()) {
            Ok(keeper) => Some(keeper),
            Err(error) => {
                tracing::warn!("reads and writes are not kept count of over a restart: {error}");
                None
            }
        };
        let (interfaces, openers) = self.parts.take().unwrap_or_default();
        Ok(Daemon::of(
            front,
            interfaces,
            Arc::clone(table),
            openers,
            heat,
        ))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let Some((interfaces, mut openers)) = self.parts.take() else {
            return;
        };
        drop(interfaces);
        openers.stop(&self.table.slots);
        if let Err(error) = close_all(&self.table.slots) {
            tracing::warn!("{error}");
        }
    }
}

/// Why the start fails because of this export. `also_away`: also because its source is away.
fn gives_up(slot: &Slot, also_away: bool) -> Option<DaemonError> {
    let error = slot.look(|stage| match stage {
        Stage::Failed(error) => error.take(),
        Stage::Waits(error) if also_away => error.take(),
        _ => None,
    })?;
    Some(DaemonError::Export {
        image: slot.image().to_owned(),
        source: Box::new(error),
    })
}

/// Up before anything is opened, so that whoever looks finds out what is waited for.
fn interfaces(config: &DaemonConfig, table: &Arc<Table>) -> Result<Interfaces, DaemonError> {
    let exports = || Arc::clone(table) as Arc<dyn Exports>;
    let mut interfaces = Interfaces::default();
    if let Some(path) = &config.control {
        let server = control::serve(path, exports());
        interfaces.control = Some(server.map_err(|e| DaemonError::Control(e.to_string()))?);
    }
    if let Some(address) = &config.metrics {
        let server = control::serve_metrics(address, exports());
        interfaces.metrics = Some(server.map_err(|source| DaemonError::Listen {
            address: format!("{address} for metrics"),
            source,
        })?);
    }
    Ok(interfaces)
}
