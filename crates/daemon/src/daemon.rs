//! A whole daemon: its volumes, its front end, its control socket, from start to end.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hikkoshi_wan::transport::session::BootId;

use crate::config::{DaemonConfig, Listen};
use crate::control;
use crate::export::Export;
use crate::front::{Front, Table};
use crate::heat::Keeper;
use crate::links::{CommonCap, Links};
use crate::registry::{CommandError, Controlled, Exports};
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
    control: Option<control::Server>,
    metrics: Option<control::Server>,
    table: Arc<Table>,
    /// Ended before the volumes are closed, which write their heat down for the last time.
    heat: Option<Keeper>,
}

impl fmt::Debug for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemon")
            .field("listening", &self.listening())
            .finish_non_exhaustive()
    }
}

impl Daemon {
    /// Opens the exports, listens, and serves in threads of its own.
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
        check(&config)?;
        let cap = CommonCap::new(config.max_rate_all);
        let (mut exports, mut links) = (Vec::new(), Links::under(cap.clone()));
        for export in &config.exports {
            let opened = Export::open(export).map_err(|e| DaemonError::Export {
                image: export.image.display().to_string(),
                source: Box::new(e),
            })?;
            if let Some(boot) = boot {
                opened.volume().pretend_boot(boot);
            }
            links.join(&opened.volume());
            opened.cap_by(cap.clone());
            exports.push(opened);
        }
        let table = Arc::new(Table { exports, cap });
        let mut front = Front::start(Arc::clone(&table), &config.listen, config.max_clients)
            .map_err(|(address, source)| DaemonError::Listen {
                address: address.to_string(),
                source,
            })?;
        let control = match &config.control {
            None => None,
            Some(path) => match control::serve(path, Arc::clone(&table) as Arc<dyn Exports>) {
                Ok(server) => Some(server),
                Err(e) => {
                    front.stop(Duration::ZERO);
                    return Err(DaemonError::Control(e.to_string()));
                }
            },
        };
        let heat = match Keeper::start(table.exports.clone()) {
            Ok(keeper) => Some(keeper),
            Err(error) => {
                tracing::warn!("reads and writes are not kept count of over a restart: {error}");
                None
            }
        };
        let metrics = match &config.metrics {
            None => None,
            Some(address) => {
                match control::serve_metrics(address, Arc::clone(&table) as Arc<dyn Exports>) {
                    Ok(server) => Some(server),
                    Err(source) => {
                        front.stop(Duration::ZERO);
                        let address = format!("{address} for metrics");
                        return Err(DaemonError::Listen { address, source });
                    }
                }
            }
        };
        Ok(Self {
            front,
            control,
            metrics,
            table,
            heat,
        })
    }

    /// Where clients are listened for, with the real ports.
    pub fn listening(&self) -> Vec<Listen> {
        self.front.listening().to_vec()
    }

    /// Where metrics can be read over TCP, with the real port.
    pub fn metrics(&self) -> Option<&str> {
        self.metrics.as_ref().map(control::Server::place)
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
        drop(self.control.take());
        drop(self.metrics.take());
        let hopeless = |export: &Arc<Export>| export.volume().waits_in_vain();
        let patience = if self.table.exports.iter().any(hopeless) {
            HOPELESS_PATIENCE
        } else {
            STOP_PATIENCE
        };
        self.front.stop(patience);
        drop(self.heat.take());
        let mut outcome = Ok(());
        for export in &self.table.exports {
            if let Err(source) = export.close() {
                let export = export.volume().name().to_owned();
                outcome = Err(DaemonError::Close { export, source });
            }
        }
        outcome
    }
}

fn check(config: &DaemonConfig) -> Result<(), DaemonError> {
    let refuse = |why: &str| Err(DaemonError::Config(why.to_owned()));
    if config.exports.is_empty() {
        return refuse("there is no export to serve");
    }
    if config.listen.is_empty() {
        return refuse("there is no address to listen on");
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
        self.exports
            .iter()
            .map(|export| Arc::clone(export) as Arc<dyn Controlled>)
            .collect()
    }

    fn set_common_limit(&self, bytes_per_s: Option<u64>) {
        self.cap.set_rate(bytes_per_s);
    }

    fn find(&self, name: &str) -> Result<Arc<dyn Controlled>, CommandError> {
        self.export(name)
            .map(|export| Arc::clone(export) as Arc<dyn Controlled>)
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
