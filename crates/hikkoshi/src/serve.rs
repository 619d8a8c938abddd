//! `hikkoshi serve`: from the command line or a configuration file to a running daemon, and its
//! end by a signal.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hikkoshi_daemon::config::{
    DEFAULT_MAX_CLIENTS, DaemonConfig, ExportConfig, Listen, SourceConfig,
};
use hikkoshi_daemon::control::place;
use hikkoshi_daemon::status::LifeState;
use hikkoshi_daemon::{Daemon, DaemonError, Starting};

use crate::cli::{ControlPlace, Serve};
use crate::failure::Failure;
use crate::plan::{NewImage, Plan};
use crate::signals::Signals;
use crate::{address, choose, config_file, quantity, supervisor};

/// Serves until SIGTERM or SIGINT, then drains and returns.
///
/// # Errors
/// The daemon could not be started, or what was in flight at the end could not be made durable.
pub fn run(args: Serve) -> Result<(), Failure> {
    let signals = Signals::catch().context("signals cannot be caught")?;
    let plan = plan(args)?;
    for image in &plan.new_images {
        create(image)?;
    }
    let config = DaemonConfig {
        listen: plan.listen,
        control: control_socket(plan.control),
        metrics: plan.metrics,
        exports: plan.exports,
        max_clients: plan.max_clients,
        max_rate_all: plan.max_rate_all,
        congestion: plan.congestion,
    };
    let Some(daemon) = start(config, &signals)? else {
        return Ok(());
    };
    announce(&daemon);
    let mut told = Told::default();
    supervisor::notify("READY=1");
    if supervisor::is_there() {
        while !signals.wait_for(TELL_EVERY) {
            told.status(&daemon.summary());
        }
    } else {
        signals.wait();
    }
    supervisor::notify("STOPPING=1");
    tracing::info!("ending: answering what is in flight; a second signal ends at once");
    daemon
        .shutdown()
        .map_err(|error| anyhow::Error::new(error).into())
}

/// How often a supervisor is told how things stand, where that has changed.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// A supervisor that waits for the start to be over is asked for more time so often, each time for
/// longer than until the next: an image that is written once more after a failed sync takes as long as
/// it is large.
const ASK_FOR_TIME_EVERY: Duration = Duration::from_secs(10);
const MORE_TIME: &str = "EXTEND_TIMEOUT_USEC=60000000";

/// What a supervisor was told last.
#[derive(Default)]
struct Told(String);

impl Told {
    fn status(&mut self, text: &str) {
        if self.0 != text {
            text.clone_into(&mut self.0);
            // A line feed would begin another variable.
            supervisor::notify(&format!("STATUS={}", text.replace('\n', " ")));
        }
    }
}

/// Starts it; `None` where a signal came first.
fn start(config: DaemonConfig, signals: &Signals) -> Result<Option<Daemon>, Failure> {
    let failed = |error| match error {
        DaemonError::Config(what) => Failure::Usage(what),
        DaemonError::Listen { ref source, .. }
            if source.kind() == std::io::ErrorKind::AddrInUse =>
        {
            Failure::from(anyhow::Error::new(error).context(
                "another server is there already; choose another address with --listen \
                 tcp://HOST:PORT or --listen unix:PATH (port 0 takes a free one)",
            ))
        }
        error => Failure::from(anyhow::Error::new(error)),
    };
    let starting = Daemon::begin(config).map_err(failed)?;
    let mut told = Told::default();
    let (begun, mut asked) = (Instant::now(), Instant::now());
    let mut go_on = |starting: &Starting| {
        if signals.wait_for(Duration::ZERO) {
            supervisor::notify("STOPPING=1");
            tracing::info!("ending before anything is served");
            return false;
        }
        // Where all is quick there is nothing to tell.
        if begun.elapsed() >= TELL_EVERY {
            told.status(&starting.summary());
        }
        if asked.elapsed() >= ASK_FOR_TIME_EVERY {
            asked = Instant::now();
            supervisor::notify(MORE_TIME);
        }
        true
    };
    starting.settle(&mut go_on).map_err(failed)
}

/// What the arguments, the configuration file and the supervisor say together.
fn plan(args: Serve) -> Result<Plan, Failure> {
    let mut plan = match &args.config {
        Some(path) => config_file::read(path).map_err(Failure::Usage)?,
        None => Plan {
            listen: Vec::new(),
            control: None,
            metrics: None,
            max_clients: DEFAULT_MAX_CLIENTS,
            max_rate_all: None,
            congestion: None,
            new_images: Vec::new(),
            exports: Vec::new(),
        },
    };
    if !args.listen.is_empty() {
        plan.listen.clone_from(&args.listen);
    }
    if args.control.is_some() {
        plan.control.clone_from(&args.control);
    }
    if args.metrics.is_some() {
        plan.metrics.clone_from(&args.metrics);
    }
    if let Some(rate) = args.max_rate_all {
        plan.max_rate_all = rate.0;
    }
    if args.congestion.is_some() {
        plan.congestion.clone_from(&args.congestion);
    }
    if args.config.is_none() {
        let (export, new_image) = one_export(args)?;
        plan.exports.push(export);
        plan.new_images.extend(new_image);
    }
    let inherited = supervisor::inherited_sockets().map_err(Failure::Usage)?;
    plan.listen.extend(inherited.map(Listen::Inherited));
    if plan.listen.is_empty() {
        plan.listen.push(Listen::Tcp(
            "127.0.0.1".into(),
            hikkoshi_nbd::wire::DEFAULT_PORT,
        ));
    }
    Ok(plan)
}

fn one_export(args: Serve) -> Result<(ExportConfig, Option<NewImage>), Failure> {
    let image = args
        .image
        .ok_or_else(|| Failure::Usage("say which IMAGE to serve, or --config FILE".into()))?;
    let source = args.from.map(|uri| SourceConfig {
        uri,
        handoff: args.handoff.into(),
        connections: args.connections,
        background: !args.no_background,
        max_rate: args.max_rate.and_then(|rate| rate.0),
        on_loss: args.on_source_loss,
        overwrite: args.overwrite,
        moved: args.source_moved,
        heat: args.heat,
        verify: args.verify,
        prepare: args.prepare.into(),
        seed_images: args.seed_images,
        seed_always: args.seed_always,
        way_back: args.way_back,
        comes_back: args.comes_back,
    });
    let new_image = args.size.map(|bytes| NewImage {
        path: image.clone(),
        bytes,
    });
    let export = ExportConfig {
        name: args.export,
        image,
        state_dir: args.state,
        block_bytes: args.block_size,
        read_only: args.read_only,
        engine: args.engine.into(),
        transport: args.transport.into(),
        compress: args.compress,
        source,
    };
    Ok((export, new_image))
}

/// Creates an empty sparse image, durably, unless there is one of that size.
fn create(image: &NewImage) -> Result<(), anyhow::Error> {
    let NewImage { path, bytes } = image;
    let shown = path.display();
    match std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
    {
        Ok(file) => file
            .set_len(*bytes)
            .and_then(|()| file.sync_all())
            .with_context(|| format!("creating {shown} with {bytes} bytes")),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let there = std::fs::metadata(path)
                .with_context(|| format!("looking at {shown}"))?
                .len();
            anyhow::ensure!(
                there == *bytes,
                "{shown} exists already and has {there} bytes, not {bytes}; leave --size out to \
                 serve it as it is"
            );
            Ok(())
        }
        Err(error) => Err(error).with_context(|| format!("creating {shown}")),
    }
}

/// The control socket. A daemon that was not told where goes on without one when the usual place
/// cannot be had: serving the disk matters more.
fn control_socket(place: Option<ControlPlace>) -> Option<PathBuf> {
    match place {
        Some(ControlPlace::None) => None,
        Some(ControlPlace::Unix(path)) => Some(path),
        None => match place::socket_for(&choose::directories(), std::process::id()) {
            Ok(path) => Some(path),
            Err(error) => {
                tracing::warn!(%error, "this daemon cannot be controlled; say --control unix:PATH");
                None
            }
        },
    }
}

/// One line per export on standard output: what is served, where, and what it waits for.
fn announce(daemon: &Daemon) {
    let listening = daemon.listening();
    let mut out = std::io::stdout().lock();
    for export in daemon.exports().all() {
        let status = export.status();
        let uris: Vec<_> = listening
            .iter()
            .map(|listen| address::uri(listen, &status.export))
            .collect();
        let source = status.source.as_deref().unwrap_or("its source");
        if status.state == LifeState::Opening {
            let _ = writeln!(
                out,
                "waiting for {source}: {} is not served as {:?} yet\n  {}",
                status.image,
                status.export,
                status.notes.join("\n  ")
            );
            continue;
        }
        let life = match status.state {
            LifeState::Local | LifeState::Departing | LifeState::Opening => String::new(),
            LifeState::Departed => "; departed: the old copy, read-only".to_owned(),
            LifeState::GivenUp => "; given up".to_owned(),
            LifeState::Standby => format!("; standby, the VM still runs at {source}"),
            LifeState::Arriving => format!("; arriving from {source}"),
        };
        let mut lines = format!(
            "serving {} ({}) as {:?} at {}{life}\n",
            status.image,
            quantity::show_size(status.size_bytes),
            status.export,
            uris.join(" and "),
        );
        for note in &status.notes {
            lines.push_str(&format!("  {note}\n"));
        }
        // Nobody may be reading; the disk is served all the same.
        let _ = out.write_all(lines.as_bytes());
    }
    if let Some(place) = daemon.metrics() {
        let _ = writeln!(out, "metrics at http://{place}/metrics");
    }
    let _ = out.flush();
}
