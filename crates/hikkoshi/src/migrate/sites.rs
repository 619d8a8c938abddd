//! What a move can ask and do: two QEMUs, the daemons of the disks, a clock, and whoever watches.
//!
//! [`Sites`] is the seam between the decisions ([`super::course`]) and the world
//! ([`super::world`]); the tests of the decisions put a simulated world behind it.

use std::time::Duration;

use hikkoshi_daemon::status::WayBackStatus;
use serde::{Deserialize, Serialize};

use super::blocks::Node;

/// One of the two sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// Where the VM runs at first.
    Old,
    /// Where it is to run.
    New,
}

/// Why something was not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It was refused: it has not happened.
    Refused(String),
    /// No answer: it may have happened.
    Lost(String),
}

impl Trouble {
    /// The text for people.
    pub fn text(&self) -> &str {
        match self {
            Self::Refused(text) | Self::Lost(text) => text,
        }
    }
}

/// `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct VmState {
    /// QEMU's word: `running`, `paused`, `inmigrate`, `postmigrate`, ...
    pub status: String,
    /// Whether the guest's processors run.
    pub running: bool,
}

/// How far the VM's memory has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No migration was begun.
    None,
    /// Under way, in whatever way.
    Active,
    /// All of it was sent (at the old site) or received (at the new one).
    Completed,
    /// It failed.
    Failed,
    /// It was cancelled.
    Cancelled,
}

/// `query-migrate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// How far it is.
    pub phase: Phase,
    /// Bytes of memory sent.
    pub sent_bytes: u64,
    /// Bytes of memory that are still to be sent.
    pub left_bytes: u64,
    /// What QEMU says went wrong.
    pub error: Option<String>,
    /// It listens for a VM already.
    pub listens: bool,
}

/// An export's status, as far as a move needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct DiskState {
    /// The name.
    pub export: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// `local`, `standby`, `arriving`, `departing`, `departed`, `given-up`.
    pub state: String,
    /// What is here.
    pub resident_bytes: u64,
    /// What only the source has.
    pub absent_bytes: u64,
    /// Whether all that can be copied before the handoff is here; `None` where nothing is.
    #[serde(default)]
    pub prepared: Option<bool>,
    /// What is here ahead of the handoff.
    #[serde(default)]
    pub ahead_bytes: u64,
    /// While it stands by to come back: the rest of it is only in the old copy that is here.
    #[serde(default)]
    pub old_copy_needed: bool,
    /// What is recorded for a way back.
    #[serde(default)]
    pub way_back: WayBackStatus,
    /// The source's address.
    pub source: Option<String>,
    /// Whether that can be reached.
    pub source_connected: Option<bool>,
    /// A sync failed.
    #[serde(default)]
    pub poisoned: bool,
    /// Clients connected now.
    pub clients: u64,
    /// How fast it comes.
    pub rate_bytes_per_s: u64,
    /// What a person should know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What there is before a move, of all that is asked.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The VM at both sites.
    pub vm: [Result<VmState, Trouble>; 2],
    /// Its migration.
    pub migration: [Result<Migration, Trouble>; 2],
    /// The block nodes.
    pub nodes: [Result<Vec<Node>, Trouble>; 2],
    /// The disks at the old site; `None` where no daemon of ours has it.
    pub old_disks: Vec<Option<Result<DiskState, Trouble>>>,
    /// The disks at the new site.
    pub new_disks: Vec<Result<DiskState, Trouble>>,
}

/// The steps, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// What can be copied before the handoff is.
    Prepare,
    /// The VM's memory moves.
    Migrate,
    /// The disks are handed off, and the VM is let go on.
    Handoff,
    /// The rest of the disks comes.
    Arrive,
    /// Everything is made as it was before.
    #[serde(rename = "rollback")]
    RollBack,
}

/// What is told while it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A step begins.
    Begins(Step),
    /// How far it is.
    Progress {
        /// The step.
        step: Step,
        /// Bytes that are done.
        done_bytes: u64,
        /// Of these.
        of_bytes: u64,
    },
    /// Something a person should know.
    Note(String),
}

/// All that a move asks and does.
pub trait Sites {
    /// How many disks move.
    fn disks(&self) -> usize;
    /// What the disks are called, for people.
    fn disk_name(&self, disk: usize) -> String;
    /// Time since some beginning.
    fn now(&self) -> Duration;
    /// Waits a little, shorter if something happens at `site`.
    fn nap(&mut self, site: Site, time: Duration);
    /// Whether a person wants it to end.
    fn interrupted(&mut self) -> bool;
    /// Tells what goes on.
    fn tell(&mut self, news: News);

    /// `query-status`
    fn vm(&mut self, site: Site) -> Result<VmState, Trouble>;
    /// `query-migrate`
    fn migration(&mut self, site: Site) -> Result<Migration, Trouble>;
    /// Has the new site keep the VM stopped when it has arrived.
    fn hold(&mut self) -> Result<(), Trouble>;
    /// Sets up both QEMUs for the migration.
    fn tune(&mut self) -> Result<(), Trouble>;
    /// Has the new site listen for the VM.
    fn listen(&mut self) -> Result<(), Trouble>;
    /// Has the old site send the VM.
    fn send(&mut self) -> Result<(), Trouble>;
    /// Has the old site end the sending.
    fn cancel(&mut self) -> Result<(), Trouble>;
    /// Lets the VM go on.
    fn go_on(&mut self, site: Site) -> Result<(), Trouble>;
    /// Ends the QEMU there.
    fn quit(&mut self, site: Site) -> Result<(), Trouble>;

    /// How the disks stand at the new site.
    fn disk_states(&mut self) -> Vec<Result<DiskState, Trouble>>;
    /// How they stand at the old site; `None` where no daemon of ours has them.
    fn old_states(&mut self) -> Vec<Option<Result<DiskState, Trouble>>>;
    /// Whether the old site's copy of a disk takes no writes any more.
    fn fenced(&mut self, disk: usize) -> Result<bool, Trouble>;
    /// Hands off those of `which`, all at the same time. Lost: the daemon may be at it still.
    fn hand_off(&mut self, which: &[usize]) -> Vec<Result<(), Trouble>>;
    /// Gives the move of a disk up, before its handoff, or in the middle of one. Done: the new site
    /// never takes a write of it. Refused: it was handed off.
    fn give_up(&mut self, disk: usize) -> Result<(), Trouble>;
}
