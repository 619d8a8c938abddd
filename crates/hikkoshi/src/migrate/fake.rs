//! A simulated world for the tests of the course: two machines and two disks that behave as QEMU and the
//! daemon do.
//!
//! It notes every moment in which a promise is broken: a VM that runs twice, one that runs at the old
//! site on a disk that was handed off, one that is let go on before its disks are.

use std::time::Duration;

use super::course::{Course, Options};
use super::outcome::Outcome;
use super::sites::{DiskState, Migration, News, Phase, Site, Sites, Trouble, VmState};

/// What a call does instead of what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is refused.
    Refused,
    /// It is not carried out, and there is no answer.
    LostBefore,
    /// It is carried out, and there is no answer.
    LostAfter,
    /// The QEMU at the old site dies before it.
    OldDies,
    /// The QEMU at the new site dies before it.
    NewDies,
    /// Somebody presses Ctrl-C before it.
    Interrupt,
}

pub(super) const FAULTS: [Fault; 6] = [
    Fault::Refused,
    Fault::LostBefore,
    Fault::LostAfter,
    Fault::OldDies,
    Fault::NewDies,
    Fault::Interrupt,
];

#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) alive: bool,
    pub(super) status: &'static str,
    pub(super) running: bool,
    pub(super) phase: Phase,
}

#[derive(Clone, Debug)]
pub(super) struct Fake {
    pub(super) old: Machine,
    pub(super) new: Machine,
    pub(super) held: bool,
    /// Looks at the migration until it is complete.
    pub(super) looks_left: u32,
    pub(super) disks: Vec<DiskState>,
    pub(super) now: Duration,
    pub(super) calls: usize,
    /// At this call, this happens; with `true`, from this call on.
    pub(super) faults: Vec<(usize, Fault, bool)>,
    /// What a QEMU said last, for one that died since.
    pub(super) said_running: [bool; 2],
    pub(super) log: Vec<&'static str>,
    pub(super) interrupted: bool,
    pub(super) broken: Vec<&'static str>,
    /// Old copies that take no writes.
    pub(super) fenced: Vec<bool>,
    /// What the old site does not have of each disk: it comes back into the old copy that has it.
    pub(super) lacks: u64,
    /// The old site hears nothing from the new one's daemons.
    pub(super) cut: bool,
    /// A handoff makes everything come at once.
    pub(super) arrives: bool,
    /// When the disks are handed off, another move takes them away.
    pub(super) taken_away: bool,
    pub(super) handoff_fails: Option<Trouble>,
    pub(super) notes: Vec<String>,
}

fn disk(name: &str) -> DiskState {
    DiskState {
        export: name.into(),
        size_bytes: 1 << 30,
        state: "standby".into(),
        absent_bytes: 1 << 30,
        prepared: Some(true),
        clients: 1,
        ..DiskState::default()
    }
}

impl Fake {
    pub(super) fn new() -> Self {
        let machine = Machine {
            alive: true,
            status: "running",
            running: true,
            phase: Phase::None,
        };
        Self {
            new: Machine {
                status: "inmigrate",
                running: false,
                ..machine.clone()
            },
            old: machine,
            held: false,
            looks_left: 2,
            disks: vec![disk("web"), disk("data")],
            fenced: vec![false; 2],
            lacks: 0,
            cut: false,
            now: Duration::ZERO,
            calls: 0,
            faults: Vec::new(),
            said_running: [true, false],
            log: Vec::new(),
            interrupted: false,
            broken: Vec::new(),
            arrives: true,
            taken_away: false,
            handoff_fails: None,
            notes: Vec::new(),
        }
    }

    /// The same with disks that come back before all of them was at the old site.
    pub(super) fn coming_back(mut self) -> Self {
        self.lacks = 1 << 28;
        for disk in &mut self.disks {
            (disk.old_copy_needed, disk.prepared) = (true, None);
        }
        self
    }

    pub(super) fn with_faults(faults: &[(usize, Fault, bool)]) -> Self {
        Self {
            faults: faults.to_vec(),
            ..Self::new()
        }
    }

    /// Whether it runs, or said so last before it died.
    pub(super) fn runs(&self, site: Site) -> bool {
        match site {
            Site::Old => self.old.running || !self.old.alive && self.said_running[0],
            Site::New => self.new.running || !self.new.alive && self.said_running[1],
        }
    }

    pub(super) fn drive(&mut self, options: &Options) -> Outcome {
        Course::new(self, options).run()
    }

    pub(super) fn resume(&mut self, options: &Options) -> Outcome {
        self.calls = 0;
        self.faults.clear();
        self.interrupted = false;
        Course::new(self, options).resume()
    }

    pub(super) fn handed(&self) -> usize {
        self.disks
            .iter()
            .filter(|d| d.state == "local" || d.state == "arriving")
            .count()
    }

    fn machine(&mut self, site: Site) -> &mut Machine {
        match site {
            Site::Old => &mut self.old,
            Site::New => &mut self.new,
        }
    }

    pub(super) fn kill(&mut self, site: Site) {
        let machine = self.machine(site);
        machine.alive = false;
        machine.running = false;
        machine.status = "gone";
        // A QEMU whose other side is gone while it sends gives up, and goes on.
        if site == Site::New && self.old.phase == Phase::Active {
            self.old.phase = Phase::Failed;
        }
    }

    fn examine(&mut self) {
        if self.old.running && self.new.running {
            self.broken.push("the VM runs twice");
        }
        if self.old.running && (self.handed() > 0 || self.fenced.contains(&true)) {
            self.broken
                .push("it runs at the old site, without its disks");
        }
        if self.new.running && self.handed() < self.disks.len() && !self.taken_away {
            self.broken
                .push("it runs at the new site before its disks are handed off");
        }
    }

    /// Every call passes here.
    fn call<T>(
        &mut self,
        name: &'static str,
        site: Option<Site>,
        act: impl FnOnce(&mut Self) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let number = self.calls;
        self.calls += 1;
        self.log.push(name);
        let applies = |(at, _, for_ever): &&(usize, Fault, bool)| {
            number == *at || (*for_ever && number > *at)
        };
        let fault = self.faults.iter().find(applies).map(|(_, fault, _)| *fault);
        match fault {
            Some(Fault::Refused) => return Err(Trouble::Refused("refused".into())),
            Some(Fault::LostBefore) => return Err(Trouble::Lost("no answer".into())),
            Some(Fault::OldDies) => self.kill(Site::Old),
            Some(Fault::NewDies) => self.kill(Site::New),
            Some(Fault::Interrupt) => self.interrupted = true,
            _ => {}
        }
        if site.is_some_and(|site| !self.machine(site).alive) {
            return Err(Trouble::Lost("nobody listens".into()));
        }
        let result = act(self);
        self.examine();
        match fault {
            Some(Fault::LostAfter) => Err(Trouble::Lost("no answer".into())),
            _ => result,
        }
    }

    /// The migration goes on whenever somebody looks.
    fn progress(&mut self) {
        if self.old.phase != Phase::Active || !self.old.alive || !self.new.alive {
            return;
        }
        self.looks_left -= 1;
        if self.looks_left > 0 {
            return;
        }
        (self.old.phase, self.old.status, self.old.running) =
            (Phase::Completed, "postmigrate", false);
        self.new.phase = Phase::Completed;
        (self.new.status, self.new.running) = match self.held {
            true => ("paused", false),
            false => ("running", true),
        };
    }
}

impl Sites for Fake {
    fn disks(&self) -> usize {
        self.disks.len()
    }
    fn disk_name(&self, disk: usize) -> String {
        self.disks[disk].export.clone()
    }
    fn now(&self) -> Duration {
        self.now
    }
    fn nap(&mut self, _: Site, time: Duration) {
        self.now += time;
        self.examine();
    }
    fn interrupted(&mut self) -> bool {
        self.interrupted
    }
    fn tell(&mut self, news: News) {
        if let News::Note(note) = news {
            self.notes.push(note);
        }
    }
    fn vm(&mut self, site: Site) -> Result<VmState, Trouble> {
        self.call("vm", Some(site), |fake| {
            let machine = fake.machine(site).clone();
            fake.said_running[usize::from(site == Site::New)] = machine.running;
            Ok(VmState {
                status: machine.status.into(),
                running: machine.running,
            })
        })
    }
    fn migration(&mut self, site: Site) -> Result<Migration, Trouble> {
        self.call("migration", Some(site), |fake| {
            fake.progress();
            Ok(Migration {
                phase: fake.machine(site).phase,
                sent_bytes: 1,
                left_bytes: 1,
                error: None,
                listens: false,
            })
        })
    }
    fn hold(&mut self) -> Result<(), Trouble> {
        self.call("hold", Some(Site::New), |fake| {
            fake.held = true;
            Ok(())
        })
    }
    fn tune(&mut self) -> Result<(), Trouble> {
        self.call("tune", Some(Site::Old), |_| Ok(()))
    }
    fn listen(&mut self) -> Result<(), Trouble> {
        self.call("listen", Some(Site::New), |_| Ok(()))
    }
    fn send(&mut self) -> Result<(), Trouble> {
        self.call("send", Some(Site::Old), |fake| {
            fake.old.phase = match fake.new.alive {
                true => Phase::Active,
                false => Phase::Failed,
            };
            Ok(())
        })
    }
    fn cancel(&mut self) -> Result<(), Trouble> {
        self.call("cancel", Some(Site::Old), |fake| {
            if fake.old.phase == Phase::Active {
                fake.old.phase = Phase::Cancelled;
                fake.kill(Site::New);
            }
            Ok(())
        })
    }
    fn go_on(&mut self, site: Site) -> Result<(), Trouble> {
        self.call("go on", Some(site), |fake| {
            let machine = fake.machine(site);
            (machine.status, machine.running) = ("running", true);
            Ok(())
        })
    }
    fn quit(&mut self, site: Site) -> Result<(), Trouble> {
        self.call("quit", Some(site), |fake| {
            fake.kill(site);
            Ok(())
        })
    }
    fn disk_states(&mut self) -> Vec<Result<DiskState, Trouble>> {
        let states = self.call("disks", None, |fake| {
            if fake.taken_away && fake.handed() == fake.disks.len() {
                fake.disks
                    .iter_mut()
                    .for_each(|d| d.state = "departed".into());
            }
            Ok(fake.disks.clone())
        });
        match states {
            Ok(states) => states.into_iter().map(Ok).collect(),
            Err(trouble) => self.disks.iter().map(|_| Err(trouble.clone())).collect(),
        }
    }
    fn old_states(&mut self) -> Vec<Option<Result<DiskState, Trouble>>> {
        let states = self.call("old disks", None, |fake| {
            let old = |(disk, fenced): (&DiskState, &bool)| DiskState {
                export: disk.export.clone(),
                size_bytes: disk.size_bytes,
                state: match (fenced, fake.lacks) {
                    (true, _) => "departed".into(),
                    (false, 0) => "local".into(),
                    (false, _) => "arriving".into(),
                },
                resident_bytes: disk.size_bytes - fake.lacks,
                absent_bytes: fake.lacks,
                ..DiskState::default()
            };
            Ok(fake
                .disks
                .iter()
                .zip(&fake.fenced)
                .map(old)
                .collect::<Vec<_>>())
        });
        match states {
            Ok(states) => states.into_iter().map(|state| Some(Ok(state))).collect(),
            Err(trouble) => self
                .disks
                .iter()
                .map(|_| Some(Err(trouble.clone())))
                .collect(),
        }
    }
    fn fenced(&mut self, disk: usize) -> Result<bool, Trouble> {
        self.call("fenced", None, |fake| Ok(fake.fenced[disk]))
    }
    fn hand_off(&mut self, which: &[usize]) -> Vec<Result<(), Trouble>> {
        let which = which.to_vec();
        let one = |fake: &mut Self, disk: usize| {
            fake.call("handoff", None, |fake| {
                // The last disk fails, for whoever wants one of several to.
                let fails = fake.handoff_fails.clone();
                if let Some(trouble) = fails.filter(|_| disk + 1 == fake.disks.len()) {
                    // The source has heard of it, and its answer is lost.
                    fake.fenced[disk] |= matches!(trouble, Trouble::Lost(_));
                    return Err(trouble);
                }
                let (state, left) = match fake.arrives {
                    true => ("local", 0),
                    false => ("arriving", 1 << 29),
                };
                if fake.disks[disk].state == "given-up" {
                    return Err(Trouble::Refused("it was given up".into()));
                }
                fake.fenced[disk] = true;
                let disk = &mut fake.disks[disk];
                disk.old_copy_needed = false;
                (disk.state, disk.absent_bytes) = (state.into(), left);
                Ok(())
            })
        };
        which.into_iter().map(|disk| one(self, disk)).collect()
    }
    fn give_up(&mut self, disk: usize) -> Result<(), Trouble> {
        self.call("give up", None, |fake| {
            let state = &mut fake.disks[disk].state;
            if state == "standby" {
                *state = "given-up".into();
            }
            if state != "given-up" {
                return Err(Trouble::Refused("it was handed off".into()));
            }
            fake.fenced[disk] &= fake.cut;
            Ok(())
        })
    }
}
