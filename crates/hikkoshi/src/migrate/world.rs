//! The real world behind [`Sites`]: QMP, control sockets, the clock, signals.
//!
//! Decides nothing. What it must get right is the kind of a failure: refused means that nothing has
//! happened, lost that it may have.

use std::time::{Duration, Instant};

use hikkoshi_daemon::control::client::{ClientError, Command, ControlClient};
use hikkoshi_daemon::status::LifeState;
use serde_json::{Value, json};

use super::blocks::{self, Node};
use super::qmp::{Qmp, QmpError};
use super::report::Report;
use super::sites::{DiskState, Migration, News, Phase, Site, Sites, Survey, Trouble, VmState};
use crate::signals::Signals;

/// How long a handoff may take. The VM stands still meanwhile, and a daemon that does not reach the
/// old site tries for ever.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(15);

/// An export of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The daemon.
    pub daemon: ControlClient,
    /// The export's name.
    pub export: String,
}

/// A disk at both sites.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// At the old site; `None` where the server is not ours.
    pub old: Option<End>,
    /// At the new one.
    pub new: End,
}

/// How the VM's memory is to go.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// Where the old QEMU connects to.
    pub uri: String,
    /// Where the new one listens.
    pub incoming_uri: String,
    /// Cap, in bytes per second.
    pub bandwidth: Option<u64>,
    /// How long the VM may stand still.
    pub downtime: Option<Duration>,
}

/// Two sites, as they are.
pub struct World {
    qmp: [Qmp; 2],
    disks: Vec<Pair>,
    transfer: Transfer,
    started: Instant,
    signals: Option<Signals>,
    interrupted: bool,
    report: Report,
}

impl World {
    /// The QEMUs at the old and the new site, and the disks.
    pub fn new(qmp: [Qmp; 2], disks: Vec<Pair>, transfer: Transfer, report: Report) -> Self {
        Self {
            qmp,
            disks,
            transfer,
            started: Instant::now(),
            signals: None,
            interrupted: false,
            report,
        }
    }

    /// From now on a signal is a wish to end, and does not end the process.
    ///
    /// # Errors
    /// The system refuses.
    pub fn catch_signals(&mut self) -> std::io::Result<()> {
        self.signals = Some(Signals::catch_with_hangup()?);
        Ok(())
    }

    /// The report, at the end.
    pub fn into_report(self) -> Report {
        self.report
    }

    /// Everything that the check looks at.
    pub fn survey(&mut self) -> Survey {
        let both = [Site::Old, Site::New];
        Survey {
            vm: both.map(|site| self.vm(site)),
            migration: both.map(|site| self.migration(site)),
            nodes: both.map(|site| nodes(self.at(site))),
            old_disks: self.old_states(),
            new_disks: self.disk_states(),
        }
    }

    fn at(&mut self, site: Site) -> &mut Qmp {
        match site {
            Site::Old => &mut self.qmp[0],
            Site::New => &mut self.qmp[1],
        }
    }

    fn execute(&mut self, site: Site, command: &str, arguments: Value) -> Result<Value, Trouble> {
        self.at(site).execute(command, arguments).map_err(trouble)
    }
}

/// The block nodes of a QEMU.
///
/// # Errors
/// It does not say, or not in a way that is understood.
pub fn nodes(qmp: &mut Qmp) -> Result<Vec<Node>, Trouble> {
    let answer = qmp
        .execute("query-named-block-nodes", json!({"flat": true}))
        .map_err(trouble)?;
    blocks::nodes(&answer).map_err(Trouble::Refused)
}

fn disk_state(end: &End) -> Result<DiskState, Trouble> {
    end.daemon
        .export_as(&end.export)
        .map_err(|error| from_daemon(&error))
}

fn trouble(error: QmpError) -> Trouble {
    match error.is_refusal() {
        true => Trouble::Refused(error.to_string()),
        false => Trouble::Lost(error.to_string()),
    }
}

/// A daemon that says "makes no sense now" has done nothing; one that tried and failed may have
/// done something that lasts.
fn from_daemon(error: &ClientError) -> Trouble {
    match error {
        ClientError::Refused { status, .. } if (400..500).contains(status) => {
            Trouble::Refused(error.to_string())
        }
        _ => Trouble::Lost(error.to_string()),
    }
}

/// What `query-migrate` says.
fn migration(answer: &Value) -> Migration {
    let status = answer["status"].as_str().unwrap_or_default();
    let phase = match status {
        "" | "none" => Phase::None,
        "completed" => Phase::Completed,
        "failed" => Phase::Failed,
        "cancelled" => Phase::Cancelled,
        // setup, cancelling, active, device, pre-switchover, wait-unplug, postcopy-..., colo
        _ => Phase::Active,
    };
    let ram = |field: &str| answer["ram"][field].as_u64().unwrap_or_default();
    Migration {
        phase,
        sent_bytes: ram("transferred"),
        left_bytes: ram("remaining"),
        error: answer["error-desc"].as_str().map(str::to_owned),
        listens: answer.get("socket-address").is_some(),
    }
}

impl Sites for World {
    fn disks(&self) -> usize {
        self.disks.len()
    }

    fn disk_name(&self, disk: usize) -> String {
        format!("{:?}", self.disks[disk].new.export)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn nap(&mut self, site: Site, time: Duration) {
        self.at(site).nap(time);
    }

    fn interrupted(&mut self) -> bool {
        let came = |signals: &Signals| signals.wait_for(Duration::ZERO);
        self.interrupted |= self.signals.as_ref().is_some_and(came);
        self.interrupted
    }

    fn tell(&mut self, news: News) {
        self.report.tell(&news);
    }

    fn vm(&mut self, site: Site) -> Result<VmState, Trouble> {
        let answer = self.execute(site, "query-status", json!({}))?;
        serde_json::from_value(answer).map_err(|error| Trouble::Lost(error.to_string()))
    }

    fn migration(&mut self, site: Site) -> Result<Migration, Trouble> {
        let answer = self.execute(site, "query-migrate", json!({}))?;
        Ok(migration(&answer))
    }

    fn hold(&mut self) -> Result<(), Trouble> {
        // While a QEMU waits for a VM, `stop` means: do not start it when it has come.
        self.execute(Site::New, "stop", json!({})).map(drop)
    }

    fn tune(&mut self) -> Result<(), Trouble> {
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        for site in [Site::Old, Site::New] {
            self.execute(site, "migrate-set-capabilities", events.clone())?;
        }
        let mut parameters = serde_json::Map::new();
        if let Some(rate) = self.transfer.bandwidth {
            parameters.insert("max-bandwidth".into(), rate.into());
        }
        if let Some(limit) = self.transfer.downtime {
            let ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            parameters.insert("downtime-limit".into(), ms.into());
        }
        if !parameters.is_empty() {
            self.execute(Site::Old, "migrate-set-parameters", parameters.into())?;
        }
        Ok(())
    }

    fn listen(&mut self) -> Result<(), Trouble> {
        // It was started with `-incoming URI`, and not with `-incoming defer`.
        if self.migration(Site::New)?.listens {
            return Ok(());
        }
        let uri = json!({"uri": self.transfer.incoming_uri});
        self.execute(Site::New, "migrate-incoming", uri).map(drop)
    }

    fn send(&mut self) -> Result<(), Trouble> {
        let uri = json!({"uri": self.transfer.uri});
        self.execute(Site::Old, "migrate", uri).map(drop)
    }

    fn cancel(&mut self) -> Result<(), Trouble> {
        self.execute(Site::Old, "migrate_cancel", json!({}))
            .map(drop)
    }

    fn go_on(&mut self, site: Site) -> Result<(), Trouble> {
        self.execute(site, "cont", json!({})).map(drop)
    }

    fn quit(&mut self, site: Site) -> Result<(), Trouble> {
        self.execute(site, "quit", json!({})).map(drop)
    }

    fn disk_states(&mut self) -> Vec<Result<DiskState, Trouble>> {
        self.disks
            .iter()
            .map(|pair| disk_state(&pair.new))
            .collect()
    }

    fn old_states(&mut self) -> Vec<Option<Result<DiskState, Trouble>>> {
        let old = |pair: &Pair| pair.old.as_ref().map(disk_state);
        self.disks.iter().map(old).collect()
    }

    fn fenced(&mut self, disk: usize) -> Result<bool, Trouble> {
        match &self.disks[disk].old {
            Some(end) => disk_state(end).map(|state| state.state == "departed"),
            // A server that is not ours has no fence.
            None => Ok(false),
        }
    }

    fn hand_off(&mut self, which: &[usize]) -> Vec<Result<(), Trouble>> {
        // At the same time: the VM stands still, and each may need a round trip to the old site.
        let disks = &self.disks;
        let one = |disk: usize| {
            let End { daemon, export } = &disks[disk].new;
            match daemon.command_within(export, Command::Handoff, HANDOFF_TIMEOUT) {
                Ok(status) => match status.state {
                    LifeState::Arriving | LifeState::Local | LifeState::Departing => Ok(()),
                    // A command without effect: it was given up, or has moved on.
                    state => Err(Trouble::Refused(format!(
                        "export {export:?} is {}",
                        crate::status::life(state)
                    ))),
                },
                Err(error) => Err(from_daemon(&error)),
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = which
                .iter()
                .map(|disk| scope.spawn(move || one(*disk)))
                .collect();
            let ended = threads.into_iter().map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            ended.collect()
        })
    }

    fn give_up(&mut self, disk: usize) -> Result<(), Trouble> {
        let End { daemon, export } = &self.disks[disk].new;
        match daemon.command(export, Command::Abort) {
            Ok(_) => Ok(()),
            Err(error) => Err(from_daemon(&error)),
        }
    }
}
