//! `hikkoshi demo`: a whole move on this machine, in this process.
//!
//! Two daemons, a wide-area link between them, and a guest that uses the disk all the time and
//! knows what every byte must be. Needs no root and leaves nothing behind.

mod client;
mod disk;
mod fat;
mod guest;
mod link;
mod random;
mod report;

use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hikkoshi_daemon::config::{
    DEFAULT_MAX_CLIENTS, DaemonConfig, Engine, ExportConfig, Listen, Packing, SourceConfig,
    Transport,
};
use hikkoshi_daemon::status::{ExportStatus, LifeState};
use hikkoshi_daemon::{Daemon, DaemonError};
use hikkoshi_engine::geometry::DEFAULT_BLOCK_BYTES;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli;
use crate::failure::Failure;
use crate::quantity::{show_rate, show_size};
use crate::signals::Signals;
use disk::Disk;
use guest::Guest;
use link::Link;
use report::{Felt, Report};

/// How long the guest runs at the source before the move, and at the destination after it.
const CALM: Duration = Duration::from_secs(4);

/// A move that takes this long is stuck.
const PATIENCE: Duration = Duration::from_secs(3600);

/// How often progress is looked at, and told when there is no terminal.
const TICK: Duration = Duration::from_millis(100);
const TELL_EVERY: Duration = Duration::from_secs(3);

/// Where everything is.
struct Places {
    /// Sockets and what is needed meanwhile; removed at the end.
    work: tempfile::TempDir,
    /// The disks.
    disks: PathBuf,
}

impl Places {
    fn choose(keep: Option<&Path>) -> anyhow::Result<Self> {
        let work = tempfile::Builder::new()
            .prefix("hikkoshi-demo-")
            .tempdir()
            .context("creating a temporary directory (TMPDIR says where)")?;
        let disks = match keep {
            None => work.path().to_path_buf(),
            Some(dir) => {
                std::fs::create_dir_all(dir)
                    .with_context(|| format!("creating {}", dir.display()))?;
                dir.to_path_buf()
            }
        };
        Ok(Self { work, disks })
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.disks.join(name)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }
}

/// Runs the demo.
///
/// # Errors
/// Something could not be set up, was interrupted, or a byte is wrong.
pub fn run(args: &cli::Demo) -> Result<(), Failure> {
    let signals = Signals::catch().context("signals cannot be caught")?;
    let places = Places::choose(args.keep.as_deref())?;
    let played = play(args, &places, &signals);
    let Places { work, disks } = places;
    let removed = work.close().context("removing the temporary directory");
    let report = played?;
    removed?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        say(args, &format!("\nWhat happened\n{}", report.table()));
        if args.keep.is_some() {
            say(args, &format!("The disks are in {}", disks.display()));
        }
    }
    match report.is_good() {
        true => Ok(()),
        false => Err(Failure::failed(
            "the moved disk is not what the guest wrote",
        )),
    }
}

/// Tells how it goes: to standard output, or to standard error when that is for JSON.
fn say(args: &cli::Demo, text: &str) {
    if args.json {
        eprintln!("{text}");
    } else {
        // Nobody may be reading; the exit status tells, too.
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}

fn play(args: &cli::Demo, places: &Places, signals: &Signals) -> anyhow::Result<Report> {
    say(
        args,
        "1  Making a disk with a file system and files of this machine ...",
    );
    let disk = disk::build(&places.disk("source.img"), args.size, places.work.path())?;
    let oracle = places.disk("oracle.img");
    copy_sparse(&disk.path, &oracle, disk.size_bytes).context("copying the oracle")?;
    say(
        args,
        &format!(
            "   {} of disk, {}, {} of files",
            show_size(disk.size_bytes),
            disk.file_system,
            show_size(disk.content_bytes)
        ),
    );
    say(
        args,
        "2  The VM runs at the old site, and reads, writes and flushes all the time ...",
    );
    // Declared in this order so that whatever goes wrong, the guest ends first, then the
    // destination while its source is there, then the rest.
    let (source, source_address) = start_source(&disk, places)?;
    let link;
    let destination;
    let guest = Guest::start(&disk, &places.socket("source.sock"), &oracle)?;
    pass(&guest, signals, CALM)?;

    say(
        args,
        &format!(
            "3  The VM moves to the new site, {} ms and {} Mbit/s away; its disk follows ...",
            args.rtt.as_millis(),
            args.rate * 8 / 1_000_000
        ),
    );
    link = Link::start(source_address, args.rtt, args.rate).context("starting the link")?;
    let move_began = guest.now();
    destination = start_destination(link.address(), places)?;
    guest.move_to(&places.socket("destination.sock"))?;
    let running = guest.now() - move_began;
    follow(args, &destination, &guest, signals)?;
    let move_ended = guest.now();

    say(
        args,
        "4  Every block is here: the old site is switched off, the VM goes on ...",
    );
    let (link_up_bytes, link_down_bytes) = link.bytes();
    source.end().context("ending the source")?;
    drop(link);
    pass(&guest, signals, CALM)?;
    let status = destination.status();
    let after_end = guest.now();
    let answered = guest.stop()?;
    destination.end().context("ending the destination")?;

    say(
        args,
        "5  Comparing every byte with what the guest wrote ...",
    );
    let moved = places.disk("destination.img");
    let first_difference = first_difference(&moved, &oracle, disk.size_bytes)?;
    let mut report = Report {
        size_bytes: disk.size_bytes,
        content_bytes: disk.content_bytes,
        file_system: disk.file_system.clone(),
        rtt_ms: args.rtt.as_millis(),
        link_bytes_per_s: args.rate,
        running_after_ms: running.as_millis(),
        source_free_after_ms: (move_ended - move_began).as_millis(),
        reads_local: 0,
        reads_remote: 0,
        link_down_bytes,
        link_up_bytes,
        wire_bytes: 0,
        before: Felt::between(&answered, Duration::ZERO, move_began),
        moving: Felt::between(&answered, move_began, move_ended),
        after: Felt::between(&answered, move_ended, after_end),
        compared_bytes: disk.size_bytes,
        first_difference,
        file_system_clean: disk::check_file_system(&disk, &moved),
    };
    report.set_counters(&status);
    Ok(report)
}

/// A daemon of one export. Ends in order also when the demo fails.
struct Site(Option<Daemon>);

impl Site {
    fn start(config: DaemonConfig) -> Result<Self, DaemonError> {
        Daemon::start(config).map(|daemon| Self(Some(daemon)))
    }

    fn daemon(&self) -> &Daemon {
        self.0.as_ref().expect("it is taken only when it ends")
    }

    fn status(&self) -> ExportStatus {
        let exports = self.daemon().exports().all();
        let only = exports.first().expect("it was started with one export");
        only.status()
    }

    fn end(mut self) -> Result<(), DaemonError> {
        self.0.take().map_or(Ok(()), Daemon::shutdown)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(daemon) = self.0.take() {
            // The demo has failed already, and tells why.
            let _ = daemon.shutdown();
        }
    }
}

/// The daemon at the old site: a Unix socket for the guest, TCP for the link.
fn start_source(disk: &Disk, places: &Places) -> anyhow::Result<(Site, SocketAddr)> {
    let listen = vec![
        Listen::Unix(places.socket("source.sock")),
        Listen::Tcp("127.0.0.1".into(), 0),
    ];
    let site =
        Site::start(config(listen, disk.path.clone(), None)).context("starting the source")?;
    let listening = site.daemon().listening();
    let address = listening.into_iter().find_map(|listen| match listen {
        Listen::Tcp(host, port) => (host.as_str(), port).to_socket_addrs().ok()?.next(),
        _ => None,
    });
    Ok((site, address.context("the source does not listen on TCP")?))
}

/// The daemon at the new site.
fn start_destination(link: SocketAddr, places: &Places) -> anyhow::Result<Site> {
    let source = SourceConfig::new(format!("nbd://{link}/"));
    let listen = vec![Listen::Unix(places.socket("destination.sock"))];
    let image = places.disk("destination.img");
    Site::start(config(listen, image, Some(source))).context("starting the destination")
}

fn config(listen: Vec<Listen>, image: PathBuf, source: Option<SourceConfig>) -> DaemonConfig {
    DaemonConfig {
        listen,
        control: None,
        metrics: None,
        exports: vec![ExportConfig {
            name: String::new(),
            image,
            state_dir: None,
            block_bytes: DEFAULT_BLOCK_BYTES,
            read_only: false,
            engine: Engine::Auto,
            transport: Transport::Auto,
            compress: Packing::Auto,
            source,
        }],
        max_clients: DEFAULT_MAX_CLIENTS,
        max_rate_all: None,
        congestion: None,
    }
}

/// Lets time pass while the guest works.
fn pass(guest: &Guest, signals: &Signals, time: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        tick(guest, signals)?;
    }
    Ok(())
}

fn tick(guest: &Guest, signals: &Signals) -> anyhow::Result<()> {
    anyhow::ensure!(
        !signals.wait_for(TICK),
        "interrupted; nothing is left behind"
    );
    match guest.failure() {
        Some(failure) => anyhow::bail!("{failure}"),
        None => Ok(()),
    }
}

/// Shows the progress until the source is needed no more.
fn follow(
    args: &cli::Demo,
    destination: &Site,
    guest: &Guest,
    signals: &Signals,
) -> anyhow::Result<()> {
    let style = ProgressStyle::with_template("   [{bar:40}] {bytes} of {total_bytes}, {msg}")
        .expect("the template is a good one");
    let bar = ProgressBar::new(args.size).with_style(style.progress_chars("=> "));
    let terminal = std::io::stderr().is_terminal();
    let began = Instant::now();
    let mut told = began;
    loop {
        let status = destination.status();
        if status.state == LifeState::Local {
            break;
        }
        anyhow::ensure!(
            began.elapsed() < PATIENCE,
            "the move is stuck: {} are missing",
            show_size(status.absent_bytes)
        );
        let counters = status.counters;
        let how = format!(
            "{}, reads {} local, {} remote",
            show_rate(status.rate_bytes_per_s),
            counters.reads_local,
            counters.reads_remote
        );
        if !terminal && told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let here = show_size(status.resident_bytes);
            say(
                args,
                &format!("   {here} of {} here, {how}", show_size(args.size)),
            );
        }
        bar.set_position(status.resident_bytes);
        bar.set_message(how);
        tick(guest, signals)?;
    }
    bar.finish_and_clear();
    Ok(())
}

/// Copies a file and leaves its holes out.
fn copy_sparse(from: &Path, to: &Path, size_bytes: u64) -> std::io::Result<()> {
    let from = File::open(from)?;
    let to = File::create_new(to)?;
    to.set_len(size_bytes)?;
    let mut buf = vec![0; 1 << 20];
    let mut at = 0;
    while let Some((start, end)) = disk::next_data(&from, at, size_bytes)? {
        at = start;
        while at < end {
            let len = usize::try_from(end - at)
                .unwrap_or(buf.len())
                .min(buf.len());
            from.read_exact_at(&mut buf[..len], at)?;
            to.write_all_at(&buf[..len], at)?;
            at += u64::try_from(len).expect("a buffer's length fits");
        }
    }
    Ok(())
}

/// The first offset at which two files of a size differ.
fn first_difference(one: &Path, other: &Path, size_bytes: u64) -> anyhow::Result<Option<u64>> {
    let open = |path: &Path| {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let len = file.metadata()?.len();
        anyhow::ensure!(len == size_bytes, "{} has {len} bytes", path.display());
        Ok(file)
    };
    let (one, other) = (open(one)?, open(other)?);
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size_bytes {
        let len = usize::try_from(size_bytes - at)
            .unwrap_or(left.len())
            .min(left.len());
        one.read_exact_at(&mut left[..len], at)?;
        other.read_exact_at(&mut right[..len], at)?;
        if left[..len] != right[..len] {
            let within = left.iter().zip(&right).position(|(a, b)| a != b);
            return Ok(Some(at + u64::try_from(within.unwrap_or(0))?));
        }
        at += u64::try_from(len)?;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_wrong_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("1"), dir.path().join("2"));
        let size = (3 << 20) + 512;
        let file = File::create(&one).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(b"content", 1 << 20).unwrap();
        copy_sparse(&one, &other, size).unwrap();
        assert_eq!(first_difference(&one, &other, size).unwrap(), None);
        file.write_all_at(b"x", size - 1).unwrap();
        assert_eq!(
            first_difference(&one, &other, size).unwrap(),
            Some(size - 1)
        );
        file.set_len(size - 1).unwrap();
        assert!(first_difference(&one, &other, size).is_err());
    }
}
