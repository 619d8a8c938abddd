//! A whole daemon: its volumes, its front end, its control socket, from start to end.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hikkoshi_wan::transport::session::BootId;

use crate::config::{DaemonConfig, Listen};
use crate::control;
use crate::front::{Front, Table, congestion};
use crate::heat::Keeper;
use crate::registry::{CommandError, Controlled, Exports};
use crate::slot::Slot;
use crate::starting::{Openers, Patience, Starting};
use crate::volume::open::OpenError;

/// How long clients may take to receive what is in flight when the daemon ends.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// The same when reads wait for a source that is away. They are not answered but hung up on: a client
/// that connects again asks again, and its guest sees no error.
const HOPELESS_PATIENCE: Duration = Duration::from_secs(2);

/// Why a daemon could not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// An export could not be opened.
    #[error("cannot serve {image}: {source}")]
    Export {
        /// Its image.
        image: String,
        /// Why.
        source: Box<OpenError>,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The control socket cannot be served.
    #[error("cannot serve the control socket: {0}")]
    Control(String),
    /// A thread cannot be started.
    #[error("a thread could not be started: {source}")]
    Thread {
        /// Why.
        source: std::io::Error,
    },
    /// What was in flight at the end could not be made durable.
    #[error("export {export:?} could not be closed cleanly: {source}")]
    Close {
        /// The export.
        export: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A daemon that serves.
pub struct Daemon {
    front: Front,
    interfaces: Interfaces,
    table: Arc<Table>,
    openers: Openers,
    /// Ended before the volumes are closed, which write their heat down for the last time.
    heat: Option<Keeper>,
}

/// Where it is asked, commanded and measured.
#[derive(Default)]
pub(crate) struct Interfaces {
    pub(crate) control: Option<control::Server>,
    pub(crate) metrics: Option<control::Server>,
}

impl fmt::Debug for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemon")
            .field("listening", &self.listening())
            .finish_non_exhaustive()
    }
}

impl Daemon {
    /// Opens the exports, listens, and serves in threads of its own. Waits until all of them are open,
    /// however long a handoff takes that is to happen at the start.
    ///
    /// # Errors
    /// Anything of that fails; nothing is served then.
    pub fn start(config: DaemonConfig) -> Result<Self, DaemonError> {
        Self::start_under(config, None)
    }

    /// The same on a machine of which another boot is told, if one is given: a seam for tests.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start_under(config: DaemonConfig, boot: Option<BootId>) -> Result<Self, DaemonError> {
        Starting::begin_under(config, boot, Patience::Endless)?.with_all()
    }

    /// Begins to start one, which can be asked and commanded from here on.
    ///
    /// # Errors
    /// The configuration makes no sense, or that is not possible.
    pub fn begin(config: DaemonConfig) -> Result<Starting, DaemonError> {
        Starting::begin_under(config, None, Patience::Short)
    }

    pub(crate) fn of(
        front: Front,
        interfaces: Interfaces,
        table: Arc<Table>,
        openers: Openers,
        heat: Option<Keeper>,
    ) -> Self {
        Self {
            front,
            interfaces,
            table,
            openers,
            heat,
        }
    }

    /// As if the time had passed in which an answer to a handoff may still be taken: a seam for tests.
    pub fn let_answers_grow_old(&self) {
        for export in self.table.slots.iter().filter_map(|slot| slot.export()) {
            export.volume().let_answers_grow_old();
        }
    }

    /// What is served and what is waited for, in few words.
    pub fn summary(&self) -> String {
        summary(&self.table.slots)
    }

    /// Where clients are listened for, with the real ports.
    pub fn listening(&self) -> Vec<Listen> {
        self.front.listening().to_vec()
    }

    /// Where metrics can be read over TCP, with the real port.
    pub fn metrics(&self) -> Option<&str> {
        self.interfaces.metrics.as_ref().map(control::Server::place)
    }

    /// The exports.
    pub fn exports(&self) -> Arc<dyn Exports> {
        Arc::clone(&self.table) as Arc<dyn Exports>
    }

    /// Ends: accepts no more, answers what is in flight, makes everything durable.
    ///
    /// # Errors
    /// Something could not be made durable. What was flushed before is.
    pub fn shutdown(mut self) -> Result<(), DaemonError> {
        self.interfaces = Interfaces::default();
        self.openers.stop(&self.table.slots);
        let hopeless = |slot: &Arc<Slot>| {
            let volume = slot.export().map(|export| export.volume());
            volume.is_some_and(|v| v.waits_in_vain() || v.awaits_source())
        };
        let patience = if self.table.slots.iter().any(hopeless) {
            HOPELESS_PATIENCE
        } else {
            STOP_PATIENCE
        };
        self.front.stop(patience);
        drop(self.heat.take());
        close_all(&self.table.slots)
    }
}

pub(crate) fn close_all(slots: &[Arc<Slot>]) -> Result<(), DaemonError> {
    let mut outcome = Ok(());
    for slot in slots {
        let Some(export) = slot.export() else {
            continue;
        };
        if let Err(source) = export.close() {
            let export = slot.name().to_owned();
            outcome = Err(DaemonError::Close { export, source });
        }
    }
    outcome
}

/// What is served and what is waited for, in few words.
pub(crate) fn summary(slots: &[Arc<Slot>]) -> String {
    let open = slots.iter().filter(|slot| slot.export().is_some()).count();
    let all = slots.len();
    let disks = if all == 1 { "disk" } else { "disks" };
    let mut text = match open {
        open if open == all => format!("serving {all} {disks}"),
        open => format!("serving {open} of {all} {disks}"),
    };
    for waits in slots.iter().filter_map(|slot| slot.waits_for()) {
        text.push_str("; ");
        text.push_str(&waits);
    }
    text
}

pub(crate) fn check(config: &DaemonConfig) -> Result<(), DaemonError> {
    let refuse = |why: &str| Err(DaemonError::Config(why.to_owned()));
    if config.exports.is_empty() {
        return refuse("there is no export to serve");
    }
    if config.listen.is_empty() {
        return refuse("there is no address to listen on");
    }
    if let Some(name) = &config.congestion {
        congestion::check(name).map_err(DaemonError::Config)?;
    }
    for (n, export) in config.exports.iter().enumerate() {
        for other in &config.exports[..n] {
            if other.name == export.name {
                return Err(DaemonError::Config(format!(
                    "two exports are named {:?}; give them different names",
                    export.name
                )));
            }
        }
    }
    Ok(())
}

impl Exports for Table {
    fn all(&self) -> Vec<Arc<dyn Controlled>> {
        self.slots
            .iter()
            .map(|slot| Arc::clone(slot) as Arc<dyn Controlled>)
            .collect()
    }

    fn set_common_limit(&self, bytes_per_s: Option<u64>) {
        self.cap.set_rate(bytes_per_s);
    }

    fn find(&self, name: &str) -> Result<Arc<dyn Controlled>, CommandError> {
        self.slot(name)
            .map(|slot| Arc::clone(slot) as Arc<dyn Controlled>)
            .ok_or_else(|| CommandError::NoSuchExport(name.to_owned()))
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Inherited(number) => write!(f, "inherited socket {number}"),
        }
    }
}
