//! The command line's grammar. Scripts depend on it; completions and manual pages come from it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hikkoshi_daemon::config::{
    DEFAULT_CONNECTIONS, Engine, HandoffPolicy, Listen, MAX_COMPRESSION_LEVEL as MAX_LEVEL,
    Packing, Prepare, SourceLoss, Transport,
};

use crate::migrate::args::Migrate;
use crate::{address, quantity};

const AFTER_HELP: &str = "\
Try `hikkoshi demo` for a whole move on this machine. A real one, at the new site:
  hikkoshi serve disk.img --from nbd://old-site/ --listen unix:/run/disk.sock
  hikkoshi wait && echo the old site is needed no more

Exit status: 0 done, 1 failed, 2 wrong usage.";

/// Moves the disk of a running virtual machine to another site.
#[derive(Debug, Parser)]
#[command(name = "hikkoshi", version, about, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a disk image over NBD, maybe while it moves here from elsewhere
    Serve(Box<Serve>),
    /// Show how the exports of the daemons on this machine stand
    Status(Status),
    /// Show all disks of this machine at a glance, a line each, again every second
    Top(Top),
    /// Wait until a disk has come as far as asked
    Wait(Wait),
    /// Show what has happened to an export: source lost and found, disk full, handoff
    Events(Events),
    /// Stop the background copy; what the VM reads still comes
    Pause(Target),
    /// Let the background copy go on
    Resume(Target),
    /// Cap the rate of the background copy, of one disk or of all together
    Limit(Limit),
    /// Say that the VM runs here from now on
    Handoff(Target),
    /// Give a move up before the handoff: the disk stays at the source, as it was
    Abort(Target),
    /// Lift the fence of an old copy whose disk has moved on, or end what is kept for a way back
    Release(Release),
    /// Write down how much an export is read and written where: what to copy first when it moves
    Heat(Heat),
    /// Compare a disk that moves here with its source
    Verify(Verify),
    /// Move a disk to another image of this machine (another disk or array) under a VM that stays
    Move(Move),
    /// Move a VM that QEMU runs to another site, and its disks with it
    Migrate(Box<Migrate>),
    /// Show a whole move on this machine: no root, no set-up, about a minute
    Demo(Demo),
    /// Print the completions for a shell
    Completions(Completions),
    /// Print the manual page, or write all of them to a directory
    Man(Man),
}

/// `--control`, the same for every command.
#[derive(Args, Debug)]
pub struct Control {
    /// The daemon's control socket [default: all in the user's runtime directory]
    #[arg(long, value_name = "unix:PATH", value_parser = address::parse_control)]
    pub control: Option<PathBuf>,
}

/// An export of a daemon that runs.
#[derive(Args, Debug)]
pub struct Target {
    /// The export [default: the one that is moving, or the only one]
    pub export: Option<String>,
    #[command(flatten)]
    pub control: Control,
}

/// `release`.
#[derive(Args, Debug)]
pub struct Release {
    /// The export [default: the only one]
    pub export: Option<String>,
    /// The other copy is lost, or will never be used again: writes are accepted here, and what was
    /// written there is not here. Look there first, with `hikkoshi status`; where that machine cannot be
    /// reached, switch it off first. Waits for up to 40 s while the answer to the handoff may still be
    /// taken there
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub control: Control,
}

/// `status`.
#[derive(Args, Debug)]
pub struct Status {
    /// The export [default: all]
    pub export: Option<String>,
    /// One JSON object per export, one per line
    #[arg(long)]
    pub json: bool,
    /// Again every second, until interrupted
    #[arg(long)]
    pub watch: bool,
    #[command(flatten)]
    pub control: Control,
}

/// `top`.
#[derive(Args, Debug)]
pub struct Top {
    #[command(flatten)]
    pub control: Control,
}

/// `heat`.
#[derive(Args, Debug)]
pub struct Heat {
    /// The export [default: the one that is moving, or the only one]
    pub export: Option<String>,
    /// One JSON object per region that was touched, one per line, instead of a file for
    /// serve --heat
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub control: Control,
}

/// `events`.
#[derive(Args, Debug)]
pub struct Events {
    /// The export [default: the one that is moving, or the only one]
    pub export: Option<String>,
    /// Go on and show what happens, until interrupted
    #[arg(long)]
    pub follow: bool,
    /// One JSON object per event, one per line
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub control: Control,
}

/// What to wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Goal {
    /// Every block is here and durable: for an arriving disk, the source is needed no more
    #[default]
    Resident,
    /// The handoff has happened: the VM runs here
    Arriving,
    /// The disk is a plain local one that needs nobody
    Local,
    /// All that can be copied before the handoff is here: time to migrate the VM
    Prepared,
}

/// `wait`.
#[derive(Args, Debug)]
pub struct Wait {
    /// The export [default: the one that is moving, or the only one]
    pub export: Option<String>,
    /// What to wait for
    #[arg(long = "for", value_enum, default_value_t)]
    pub goal: Goal,
    /// Give up (exit status 1) after this long, e.g. 30s or 10m
    #[arg(long, value_parser = quantity::parse_duration)]
    pub timeout: Option<Duration>,
    /// Print the export's status as JSON at the end
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub control: Control,
}

/// `verify`.
#[derive(Args, Debug)]
pub struct Verify {
    /// The export [default: the one that is moving, or the only one]
    pub export: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Compare nothing: let the source go in spite of the differences that were found
    #[arg(long)]
    pub accept: bool,
    #[command(flatten)]
    pub control: Control,
}

/// `limit`. The export comes first and may be left out, so the two are told apart by number.
#[derive(Args, Debug)]
#[command(
    override_usage = "hikkoshi limit [OPTIONS] [EXPORT] <RATE|none>\n       \
    hikkoshi limit [OPTIONS] --all <RATE|none>"
)]
pub struct Limit {
    /// The export, if not the one that is moving, and the cap: 40MB/s, 10MiB/s, 200Mbit/s or none
    #[arg(num_args = 1..=2, required = true, value_name = "[EXPORT] RATE")]
    pub words: Vec<String>,
    /// Cap what all disks of the daemon copy together, besides the caps of each
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub control: Control,
}

/// `move`. As with `limit`, the export comes first and may be left out.
#[derive(Args, Debug)]
#[command(override_usage = "hikkoshi move [OPTIONS] [EXPORT] <NEWIMAGE>")]
pub struct Move {
    /// The export, if not the only one, and the image file or block device that its disk moves to:
    /// a file is made when there is none
    #[arg(num_args = 1..=2, required = true, value_name = "[EXPORT] NEWIMAGE")]
    pub words: Vec<PathBuf>,
    /// Where the durable state of the new image lives [default: NEWIMAGE.hikkoshi]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// What is copied before the clients go over to the new image
    #[arg(long, value_enum, default_value_t)]
    pub prepare: PrepareName,
    /// Cap on the copy, e.g. 40MB/s; `hikkoshi limit` changes it
    #[arg(long, value_name = "RATE", value_parser = MaxRate::parse)]
    pub max_rate: Option<MaxRate>,
    /// Let the disk overwrite what the new image holds already
    #[arg(long)]
    pub overwrite: bool,
    /// Do not wait for the end of it
    #[arg(long)]
    pub detach: bool,
    /// Print the export's status as JSON at the end
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub control: Control,
}

/// `completions`.
#[derive(Args, Debug)]
pub struct Completions {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// `man`.
#[derive(Args, Debug)]
pub struct Man {
    /// Where to write one page per command
    pub dir: Option<PathBuf>,
}

/// `demo`.
#[derive(Args, Clone, Debug)]
pub struct Demo {
    /// Size of the disk
    #[arg(long, default_value = "1GiB", value_parser = quantity::parse_size)]
    pub size: u64,
    /// Round trip between the two sites
    #[arg(long, default_value = "40ms", value_parser = quantity::parse_duration)]
    pub rtt: Duration,
    /// Rate of the link between the two sites, each way
    #[arg(long, default_value = "200Mbit/s", value_parser = parse_some_rate)]
    pub rate: u64,
    /// Keep the disks of both sites in this directory
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

fn parse_some_rate(text: &str) -> Result<u64, String> {
    quantity::parse_rate(text)?.ok_or_else(|| "a link without a rate is no link".into())
}

/// `serve`.
#[derive(Args, Debug)]
pub struct Serve {
    /// The disk image or block device; with --from, created when it does not exist
    #[arg(required_unless_present = "config")]
    pub image: Option<PathBuf>,
    /// Serve the exports of a configuration file (docs/config.md)
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "image", "export", "from", "state", "no_background", "on_source_loss", "handoff",
        "block_size", "max_rate", "connections", "read_only", "overwrite", "source_moved",
        "engine", "size", "heat", "verify", "transport", "prepare", "way_back", "comes_back",
        "compress", "seed_images", "seed_always",
    ])]
    pub config: Option<PathBuf>,
    /// The export's name [default: the empty name, NBD's default export]
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub export: String,
    /// Where to listen: tcp://HOST:PORT or unix:PATH; several times for several
    /// [default: tcp://127.0.0.1:10809]
    #[arg(long, value_name = "URI", value_parser = address::parse_listen)]
    pub listen: Vec<Listen>,
    /// Where the disk moves from: nbd://HOST:PORT/NAME, nbd+unix:///NAME?socket=PATH, or the
    /// path of a Unix socket
    #[arg(long, value_name = "URI", value_parser = address::parse_from)]
    pub from: Option<String>,
    /// When the VM counts as running here
    #[arg(long, value_enum, default_value_t, requires = "from")]
    pub handoff: Handoff,
    /// What is copied before the handoff, if the source is hikkoshi, too
    #[arg(long, value_enum, default_value_t, requires = "from")]
    pub prepare: PrepareName,
    /// Fetch only what is read
    #[arg(long, requires = "from")]
    pub no_background: bool,
    /// Cap on the background copy, e.g. 40MB/s, 10MiB/s or 200Mbit/s
    #[arg(long, value_name = "RATE", requires = "from", value_parser = MaxRate::parse)]
    pub max_rate: Option<MaxRate>,
    /// Cap on the background copies of all disks of this daemon together, besides those of each
    #[arg(long, value_name = "RATE", value_parser = MaxRate::parse)]
    pub max_rate_all: Option<MaxRate>,
    /// TCP's congestion control for what is sent to clients, e.g. bbr on a link that loses packets
    /// [default: the system's]
    #[arg(long, value_name = "NAME")]
    pub congestion: Option<String>,
    /// Connections to the source
    #[arg(long, value_name = "N", requires = "from", default_value_t = DEFAULT_CONNECTIONS,
        value_parser = parse_connections)]
    pub connections: usize,
    /// What a read that needs the unreachable source does: wait, or fail after error:SECONDS
    #[arg(long, value_name = "wait|error:SECONDS", requires = "from", default_value = "wait",
        value_parser = parse_source_loss)]
    pub on_source_loss: SourceLoss,
    /// Let the source's data overwrite what the image holds already
    #[arg(long, requires = "from")]
    pub overwrite: bool,
    /// What to copy first: a file that `hikkoshi heat` wrote
    #[arg(long, value_name = "FILE", requires = "from")]
    pub heat: Option<PathBuf>,
    /// The same source is at another address than the recorded one
    #[arg(long, requires = "from")]
    pub source_moved: bool,
    /// When everything is here, compare it with the source before that is let go
    #[arg(long, requires = "from")]
    pub verify: bool,
    /// An image at this site that may hold blocks of the disk (an old copy, a template): what it
    /// has, at whatever offset, does not cross the link. Up to 8; IMAGE itself with --overwrite
    #[arg(long = "seed-image", value_name = "PATH", requires = "from")]
    pub seed_images: Vec<PathBuf>,
    /// Look in the seed images even where the link is so fast that it costs time
    #[arg(long, requires = "seed_images")]
    pub seed_always: bool,
    /// Record what changes here, also when all has arrived, so that the disk can move back by
    /// copying only that
    #[arg(long, requires = "from")]
    pub way_back: bool,
    /// The image is the old copy of this disk, which comes back: copy only what has changed since
    #[arg(long = "return", requires = "from")]
    pub comes_back: bool,
    /// What is spoken with another hikkoshi, as source or destination of this disk
    #[arg(long, value_enum, default_value_t)]
    pub transport: TransportName,
    /// How what comes over the link is compressed, if the source is hikkoshi, too: auto, zstd:N
    /// (1 to 19), lz4 or none; with none this disk is not compressed for others, either
    #[arg(long, value_name = "auto|zstd:N|lz4|none", default_value = "auto",
        value_parser = parse_packing)]
    pub compress: Packing,
    /// Where the durable state lives [default: IMAGE.hikkoshi]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,
    /// Block size of the bookkeeping, a power of two from 512 to 1MiB
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_block_size)]
    pub block_size: u32,
    /// Create an empty image of this size if there is none
    #[arg(long, value_name = "SIZE", conflicts_with = "from", value_parser = quantity::parse_size)]
    pub size: Option<u64>,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// How the image is read when it is not in the page cache
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineName,
    /// Where the daemon is controlled: unix:PATH, or none
    /// [default: a socket of its own in the user's runtime directory]
    #[arg(long, value_name = "unix:PATH|none", value_parser = ControlPlace::parse)]
    pub control: Option<ControlPlace>,
    /// Let metrics be read (by anyone) at this TCP address, in the format of Prometheus
    #[arg(long, value_name = "HOST:PORT", value_parser = address::parse_metrics)]
    pub metrics: Option<String>,
    /// Log more (RUST_LOG overrides it)
    #[arg(long, short)]
    pub verbose: bool,
}

/// A cap that may be `none`. (A bare nested `Option` would mean something else to clap.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxRate(pub Option<u64>);

impl MaxRate {
    fn parse(text: &str) -> Result<Self, String> {
        quantity::parse_rate(text).map(Self)
    }
}

/// Where a daemon is controlled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlPlace {
    /// Nowhere.
    None,
    /// At this socket.
    Unix(PathBuf),
}

impl ControlPlace {
    /// `unix:PATH` or `none`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            text => address::parse_control(text).map(Self::Unix),
        }
    }
}

/// When the VM counts as running here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Handoff {
    /// At the first write, trim or write-zeroes, or at `hikkoshi handoff`
    #[default]
    FirstWrite,
    /// At `hikkoshi handoff` only; a write before it is refused
    Command,
    /// At once: nobody uses the disk at the source any more
    Now,
}

impl From<Handoff> for HandoffPolicy {
    fn from(handoff: Handoff) -> Self {
        match handoff {
            Handoff::FirstWrite => Self::FirstWrite,
            Handoff::Command => Self::Command,
            Handoff::Now => Self::Now,
        }
    }
}

/// What is copied before the handoff.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PrepareName {
    /// Nothing
    None,
    /// As much as there is time for
    #[default]
    Ahead,
    /// Everything: the handoff waits for it
    Full,
}

impl From<PrepareName> for Prepare {
    fn from(prepare: PrepareName) -> Self {
        match prepare {
            PrepareName::None => Self::None,
            PrepareName::Ahead => Self::Ahead,
            PrepareName::Full => Self::Full,
        }
    }
}

/// How the image is read when it is not in the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EngineName {
    /// The best that works here
    #[default]
    Auto,
    /// A pool of threads
    Threads,
    /// io_uring; an error where it is forbidden
    IoUring,
}

impl From<EngineName> for Engine {
    fn from(engine: EngineName) -> Self {
        match engine {
            EngineName::Auto => Self::Auto,
            EngineName::Threads => Self::Threads,
            EngineName::IoUring => Self::IoUring,
        }
    }
}

/// What is spoken with another hikkoshi.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum TransportName {
    /// Frames with checksums and priorities, where the other side knows them
    #[default]
    Auto,
    /// Plain NBD
    Nbd,
}

impl From<TransportName> for Transport {
    fn from(name: TransportName) -> Self {
        match name {
            TransportName::Auto => Self::Auto,
            TransportName::Nbd => Self::Nbd,
        }
    }
}

/// Most connections to one source that make sense.
const MAX_CONNECTIONS: usize = 64;

/// How many connections to the source.
///
/// # Errors
/// Not from 1 to 64.
pub fn parse_connections(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=MAX_CONNECTIONS).contains(&n) => Ok(n),
        _ => Err(format!("{text:?} is no number from 1 to {MAX_CONNECTIONS}")),
    }
}

/// `auto`, `zstd:N`, `lz4` or `none`.
///
/// # Errors
/// It is none of these.
pub fn parse_packing(text: &str) -> Result<Packing, String> {
    let level = |text: &str| text.parse().ok().filter(|n| (1..=MAX_LEVEL).contains(n));
    match (text, text.strip_prefix("zstd:").and_then(level)) {
        ("auto", _) => Ok(Packing::Auto),
        ("lz4", _) => Ok(Packing::Lz4),
        ("none", _) => Ok(Packing::None),
        (_, Some(level)) => Ok(Packing::Zstd(level)),
        _ => Err(format!(
            "must be auto, zstd:1 to zstd:{MAX_LEVEL}, lz4 or none"
        )),
    }
}

/// `wait` or `error:SECONDS`.
///
/// # Errors
/// The text is neither.
pub fn parse_source_loss(text: &str) -> Result<SourceLoss, String> {
    if text == "wait" {
        return Ok(SourceLoss::Wait);
    }
    match text.strip_prefix("error:") {
        Some(after) => quantity::parse_duration(after).map(SourceLoss::Error),
        None => Err(format!("{text:?} is neither wait nor error:SECONDS")),
    }
}

/// A block size in bytes.
///
/// # Errors
/// No power of two from 512 to 1 MiB.
pub fn parse_block_size(text: &str) -> Result<u32, String> {
    use hikkoshi_engine::geometry::{MAX_BLOCK_BYTES, MIN_BLOCK_BYTES};
    let bytes = quantity::parse_size(text)?;
    match u32::try_from(bytes) {
        Ok(bytes)
            if bytes.is_power_of_two() && (MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&bytes) =>
        {
            Ok(bytes)
        }
        _ => Err(format!("{text:?} is no power of two from 512 to 1MiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn serve(line: &str) -> Result<Serve, clap::Error> {
        let words = format!("hikkoshi serve {line}");
        match Cli::try_parse_from(words.split_whitespace())?.command {
            Command::Serve(serve) => Ok(*serve),
            other => panic!("not serve: {other:?}"),
        }
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_of_serve_is_understood() {
        let serve = serve(
            "disk.img --export web --listen tcp://0.0.0.0:1 --listen unix:/a --from nbd://old/ \
             --state s --control unix:/c --no-background --on-source-loss error:2.5 \
             --handoff command --block-size 64KiB --max-rate 40MB/s --connections 8 \
             --read-only --overwrite --source-moved --engine io-uring --heat boot.heat --verify \
             --transport nbd --way-back --return --seed-image a --seed-image b --seed-always --max-rate-all 1MB/s \
             --congestion bbr -v",
        )
        .unwrap();
        assert_eq!(serve.listen.len(), 2);
        assert_eq!(serve.control, Some(ControlPlace::Unix("/c".into())));
        assert_eq!(
            serve.on_source_loss,
            SourceLoss::Error(Duration::from_millis(2500))
        );
        assert_eq!(serve.handoff, Handoff::Command);
        assert_eq!(serve.block_size, 65536);
        assert_eq!(serve.max_rate, Some(MaxRate(Some(40_000_000))));
        assert_eq!(serve.max_rate_all, Some(MaxRate(Some(1_000_000))));
        assert_eq!(serve.connections, 8);
        assert_eq!(serve.congestion.as_deref(), Some("bbr"));
        assert_eq!(serve.heat, Some("boot.heat".into()));
        assert_eq!(serve.engine, EngineName::IoUring);
        assert!(serve.verify && serve.transport == TransportName::Nbd);
        assert_eq!(serve.seed_images, [PathBuf::from("a"), "b".into()]);
        assert!(serve.seed_always);
        assert!(serve.way_back && serve.comes_back);
    }

    #[test]
    fn contradictions_are_wrong_usage() {
        for line in [
            "",
            "disk.img --config f",
            "--config f --from nbd://old/",
            "disk.img --no-background",
            "disk.img --max-rate 1MB/s",
            "disk.img --heat f",
            "disk.img --verify",
            "disk.img --seed-image old.img",
            "disk.img --from nbd://old/ --seed-always",
            "disk.img --way-back",
            "disk.img --return",
            "disk.img --transport frames",
            "disk.img --size 1G --from nbd://old/",
            "disk.img --block-size 3k",
            "disk.img --block-size 2M",
            "disk.img --from nbd://old/ --connections 0",
            "disk.img --from nbd://old/ --on-source-loss error",
        ] {
            assert!(serve(line).is_err(), "{line}");
        }
    }
}
