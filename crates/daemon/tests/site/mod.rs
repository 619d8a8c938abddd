//! Daemons in this process, on free ports or sockets of a directory of their own.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hikkoshi_daemon::Daemon;
use hikkoshi_daemon::config::{
    DEFAULT_MAX_CLIENTS, DaemonConfig, Engine, ExportConfig, HandoffPolicy, Listen, Packing,
    SourceConfig, Transport,
};
use hikkoshi_daemon::registry::Controlled;
use hikkoshi_daemon::status::{ExportStatus, LifeState};
use hikkoshi_wan::transport::session::BootId;
use hikkoshi_wan::{Address, NbdSourceConfig};

/// How a daemon listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    Unix,
    Tcp,
}

/// A daemon with one export.
pub struct Site {
    pub daemon: Daemon,
    pub image: PathBuf,
}

/// What is asked of a site beside its image.
pub struct Wanted {
    pub on: On,
    pub transport: Transport,
    pub compress: Packing,
    pub source: Option<SourceConfig>,
    /// Under which boot its machine is said to run; that of the machine when not given.
    pub boot: Option<BootId>,
}

impl Wanted {
    pub fn plain(on: On) -> Self {
        Self {
            on,
            transport: Transport::Auto,
            compress: Packing::Auto,
            source: None,
            boot: None,
        }
    }

    /// A destination of `uri`, after the handoff.
    pub fn from(on: On, uri: &str) -> Self {
        let source = SourceConfig {
            handoff: HandoffPolicy::Now,
            ..SourceConfig::new(uri)
        };
        Self {
            source: Some(source),
            ..Self::plain(on)
        }
    }

    pub fn source(&mut self) -> &mut SourceConfig {
        self.source.as_mut().unwrap()
    }
}

/// A daemon that serves `image`.
pub fn config_of(image: &Path, wanted: Wanted) -> DaemonConfig {
    let listen = match wanted.on {
        On::Unix => Listen::Unix(PathBuf::from(format!("{}.sock", image.display()))),
        On::Tcp => Listen::Tcp("127.0.0.1".into(), 0),
    };
    DaemonConfig {
        listen: vec![listen],
        metrics: None,
        control: None,
        exports: vec![ExportConfig {
            name: String::new(),
            image: image.to_owned(),
            state_dir: None,
            block_bytes: 4096,
            read_only: false,
            engine: Engine::Threads,
            transport: wanted.transport,
            compress: wanted.compress,
            source: wanted.source,
        }],
        max_clients: DEFAULT_MAX_CLIENTS,
        max_rate_all: None,
        congestion: None,
    }
}

impl Site {
    /// Serves `name` in `dir`, which must exist unless the disk comes from elsewhere.
    pub fn start(dir: &Path, name: &str, wanted: Wanted) -> Self {
        Self::try_start(dir, name, wanted).unwrap()
    }

    /// The same, or what is said against it.
    pub fn try_start(dir: &Path, name: &str, wanted: Wanted) -> Result<Self, String> {
        let image = dir.join(name);
        let boot = wanted.boot;
        let daemon = Daemon::start_under(config_of(&image, wanted), boot)
            .map_err(|error| error.to_string())?;
        Ok(Self { daemon, image })
    }

    /// Ends it in good order.
    pub fn stop(self) {
        self.daemon.shutdown().unwrap();
    }

    /// A plain disk of `data`.
    pub fn with(dir: &Path, name: &str, data: &[u8], on: On) -> Self {
        std::fs::write(dir.join(name), data).unwrap();
        Self::start(dir, name, Wanted::plain(on))
    }

    pub fn address(&self) -> Address {
        match &self.daemon.listening()[0] {
            Listen::Tcp(host, port) => Address::Tcp {
                host: host.clone(),
                port: *port,
            },
            Listen::Unix(path) => Address::Unix(path.clone()),
            Listen::Inherited(_) => unreachable!("none is handed over here"),
        }
    }

    pub fn uri(&self) -> String {
        match self.address() {
            Address::Tcp { host, port } => format!("nbd://{host}:{port}/"),
            Address::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
        }
    }

    /// Settings of a client of it, towards which nothing is compressed: so many bytes cross the link
    /// as there are.
    pub fn client(&self) -> NbdSourceConfig {
        NbdSourceConfig {
            packing: Packing::None,
            ..NbdSourceConfig::new(self.address(), "")
        }
    }

    pub fn export(&self) -> Arc<dyn Controlled> {
        self.daemon.exports().find("").unwrap()
    }

    pub fn status(&self) -> ExportStatus {
        self.export().status()
    }

    pub fn is_local(&self) -> bool {
        self.status().state == LifeState::Local
    }

    pub fn contents(&self) -> Vec<u8> {
        std::fs::read(&self.image).unwrap()
    }
}

/// Data that is neither zero nor compressible.
pub fn noise(len: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(usize::try_from(len).unwrap())
    .collect()
}
