//! The course of a move in a simulated world, with a failure at every call.
//!
//! [`Fake`] has two machines and two disks that behave as QEMU and the daemon do, and notes every
//! moment in which a promise is broken: a VM that runs twice, one that runs at the old site on a
//! disk that was handed off, one that is let go on before its disks are. The statement at the end
//! is compared with what is really so.

use std::time::Duration;

use super::course::{Course, Options, Prepare};
use super::outcome::{DisksPlace, Outcome, VmPlace};
use super::sites::{DiskState, Migration, News, Phase, Site, Sites, Trouble, VmState};

/// What a call does instead of what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
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

const FAULTS: [Fault; 6] = [
    Fault::Refused,
    Fault::LostBefore,
    Fault::LostAfter,
    Fault::OldDies,
    Fault::NewDies,
    Fault::Interrupt,
];

#[derive(Clone, Debug)]
struct Machine {
    alive: bool,
    status: &'static str,
    running: bool,
    phase: Phase,
}

#[derive(Clone, Debug)]
struct Fake {
    old: Machine,
    new: Machine,
    held: bool,
    /// Looks at the migration until it is complete.
    looks_left: u32,
    disks: Vec<DiskState>,
    now: Duration,
    calls: usize,
    /// At this call, this happens; with `true`, from this call on.
    faults: Vec<(usize, Fault, bool)>,
    /// What a QEMU said last, for one that died since.
    said_running: [bool; 2],
    log: Vec<&'static str>,
    interrupted: bool,
    broken: Vec<&'static str>,
    /// A handoff makes everything come at once.
    arrives: bool,
    handoff_fails: Option<Trouble>,
    notes: Vec<String>,
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
    fn new() -> Self {
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
            now: Duration::ZERO,
            calls: 0,
            faults: Vec::new(),
            said_running: [true, false],
            log: Vec::new(),
            interrupted: false,
            broken: Vec::new(),
            arrives: true,
            handoff_fails: None,
            notes: Vec::new(),
        }
    }

    fn with_faults(faults: &[(usize, Fault, bool)]) -> Self {
        Self {
            faults: faults.to_vec(),
            ..Self::new()
        }
    }

    /// Whether it runs, or said so last before it died.
    fn runs(&self, site: Site) -> bool {
        match site {
            Site::Old => self.old.running || !self.old.alive && self.said_running[0],
            Site::New => self.new.running || !self.new.alive && self.said_running[1],
        }
    }

    fn drive(&mut self, options: &Options) -> Outcome {
        Course::new(self, options).run()
    }

    fn resume(&mut self, options: &Options) -> Outcome {
        self.calls = 0;
        self.faults.clear();
        self.interrupted = false;
        Course::new(self, options).resume()
    }

    fn handed(&self) -> usize {
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

    fn kill(&mut self, site: Site) {
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
        if self.old.running && self.handed() > 0 {
            self.broken
                .push("it runs at the old site, without its disks");
        }
        if self.new.running && self.handed() < self.disks.len() {
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
        let states = self.call("disks", None, |fake| Ok(fake.disks.clone()));
        match states {
            Ok(states) => states.into_iter().map(Ok).collect(),
            Err(trouble) => self.disks.iter().map(|_| Err(trouble.clone())).collect(),
        }
    }
    fn hand_off(&mut self, which: &[usize]) -> Vec<Result<(), Trouble>> {
        let which = which.to_vec();
        let one = |fake: &mut Self, disk: usize| {
            fake.call("handoff", None, |fake| {
                // The last disk fails, for whoever wants one of several to.
                if let Some(trouble) = &fake.handoff_fails
                    && disk + 1 == fake.disks.len()
                {
                    return Err(trouble.clone());
                }
                let (state, left) = match fake.arrives {
                    true => ("local", 0),
                    false => ("arriving", 1 << 29),
                };
                let disk = &mut fake.disks[disk];
                if disk.state == "given-up" {
                    return Err(Trouble::Refused("it was given up".into()));
                }
                (disk.state, disk.absent_bytes) = (state.into(), left);
                Ok(())
            })
        };
        which.into_iter().map(|disk| one(self, disk)).collect()
    }
    fn give_up(&mut self, disk: usize) -> Result<(), Trouble> {
        self.call("give up", None, |fake| {
            let disk = &mut fake.disks[disk];
            if disk.state == "standby" {
                disk.state = "given-up".into();
            }
            match disk.state == "given-up" {
                true => Ok(()),
                false => Err(Trouble::Refused("it was handed off".into())),
            }
        })
    }
}

fn options() -> Options {
    Options {
        prepare: Some(Prepare::default()),
        ..Options::default()
    }
}

/// The statement must be what is so.
fn is_true(fake: &Fake, outcome: &Outcome, story: &str) {
    assert!(fake.broken.is_empty(), "{story}: {:?}", fake.broken);
    let text = outcome.text();
    match &outcome.vm {
        VmPlace::Old => assert!(fake.runs(Site::Old), "{story}: {text}"),
        VmPlace::New => assert!(fake.runs(Site::New), "{story}: {text}"),
        VmPlace::StoppedNew => {
            assert!(!fake.old.running && !fake.new.running, "{story}: {text}");
            assert_eq!(fake.new.phase, Phase::Completed, "{story}: {text}");
        }
        VmPlace::StoppedOld => {
            assert!(!fake.old.running && !fake.new.running, "{story}: {text}");
            assert!(fake.old.alive, "{story}: {text}");
        }
        VmPlace::Unknown(_) => {}
    }
    match &outcome.disks {
        DisksPlace::OldStandby => assert_eq!(fake.handed(), 0, "{story}: {text}"),
        DisksPlace::OldGivenUp => {
            assert!(
                fake.disks.iter().all(|d| d.state == "given-up"),
                "{story}: {text}"
            );
        }
        DisksPlace::OldPartly(names) => {
            for disk in &fake.disks {
                let told = names.contains(&disk.export);
                assert!(told || disk.state == "given-up", "{story}: {text}");
            }
            assert_eq!(fake.handed(), 0, "{story}: {text}");
        }
        DisksPlace::Arriving(_) => assert_eq!(fake.handed(), 2, "{story}: {text}"),
        DisksPlace::New => {
            assert!(
                fake.disks.iter().all(|d| d.state == "local"),
                "{story}: {text}"
            );
        }
        DisksPlace::Split { handed, others } => {
            assert_eq!(handed.len() + others.len(), 2, "{story}: {text}");
            for disk in fake.disks.iter().filter(|d| handed.contains(&d.export)) {
                assert!(
                    disk.state == "local" || disk.state == "arriving",
                    "{story}: {text}"
                );
            }
        }
    }
    assert_eq!(outcome.done, outcome.reason.is_none(), "{story}");
}

fn calls_without_fault() -> Vec<&'static str> {
    let mut fake = Fake::new();
    let outcome = fake.drive(&options());
    assert!(outcome.done, "{outcome:?}");
    fake.log
}

#[test]
fn a_move_without_trouble() {
    let mut fake = Fake::new();
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "no fault");
    assert_eq!(
        outcome.text(),
        "The VM runs at the new site; its disks are there whole: they need the old site no more."
    );
    assert_eq!(
        fake.log,
        [
            "disks",
            "hold",
            "tune",
            "listen",
            "send",
            "migration",
            "migration",
            "migration",
            "handoff",
            "handoff",
            "vm",
            "go on",
            "vm",
            "disks",
            "vm"
        ]
    );
    assert!(fake.old.alive, "the old QEMU was not to be ended");
}

#[test]
fn every_call_fails_once_in_every_way() {
    let calls = calls_without_fault();
    for (at, name) in calls.iter().enumerate() {
        for fault in FAULTS {
            let story = format!("{fault:?} at call {at} ({name})");
            let mut fake = Fake::with_faults(&[(at, fault, false)]);
            let outcome = fake.drive(&options());
            is_true(&fake, &outcome, &story);
            // What passes by leaves the VM running somewhere, and said to.
            if matches!(fault, Fault::Refused | Fault::LostBefore | Fault::LostAfter) {
                assert!(
                    matches!(outcome.vm, VmPlace::Old | VmPlace::New),
                    "{story}: {}",
                    outcome.text()
                );
            }
            if fault == Fault::Interrupt && fake.handed() == 0 {
                assert_eq!(outcome.vm, VmPlace::Old, "{story}");
            }
            if fault == Fault::NewDies && fake.handed() == 0 {
                assert_eq!(outcome.vm, VmPlace::Old, "{story}: {}", outcome.text());
            }
        }
    }
}

#[test]
fn everything_fails_from_some_call_on() {
    let calls = calls_without_fault();
    for (at, name) in calls.iter().enumerate() {
        for fault in [Fault::Refused, Fault::LostBefore, Fault::LostAfter] {
            let story = format!("{fault:?} from call {at} ({name}) on");
            let mut fake = Fake::with_faults(&[(at, fault, true)]);
            let outcome = fake.drive(&options());
            is_true(&fake, &outcome, &story);
            // When all is well again, the move can be gone on with, or nothing was begun.
            let stopped = !fake.old.running && !fake.new.running;
            let resumed = fake.resume(&options());
            is_true(&fake, &resumed, &story);
            if stopped && fake.new.phase == Phase::Completed {
                assert!(resumed.done, "{story}: {}", resumed.text());
            }
        }
    }
}

#[test]
fn two_failures_one_after_the_other() {
    let calls = calls_without_fault().len();
    let mut ends = [0; 3];
    for at in 0..calls {
        for after in 1..12 {
            for first in FAULTS {
                for second in FAULTS {
                    let story = format!("{first:?} at {at}, {second:?} {after} calls later");
                    let faults = [(at, first, false), (at + after, second, false)];
                    let mut fake = Fake::with_faults(&faults);
                    let outcome = fake.drive(&options());
                    is_true(&fake, &outcome, &story);
                    let end = match outcome.vm {
                        VmPlace::Old => 0,
                        VmPlace::New => 1,
                        _ => 2,
                    };
                    ends[end] += 1;
                }
            }
        }
    }
    assert!(
        ends.iter().all(|n| *n > 0),
        "not every kind of end: {ends:?}"
    );
}

#[test]
fn a_failure_before_the_handoff_takes_everything_back() {
    let mut fake = Fake::new();
    fake.handoff_fails = Some(Trouble::Refused("the source is fenced".into()));
    fake.disks.truncate(1);
    let outcome = fake.drive(&options());
    assert_eq!(
        outcome.text(),
        "web could not be handed off: the source is fenced.\n\
         The VM runs at the old site, as before; its disks are at the old site, and the new site \
         has given them up."
    );
    assert!(fake.old.running && !fake.new.alive);
}

#[test]
fn each_failure_has_its_statement() {
    let calls = calls_without_fault();
    let told = |call: &str, nth: usize, fault: Fault| {
        let mut places = calls.iter().enumerate().filter(|(_, name)| **name == call);
        let (at, _) = places.nth(nth).unwrap();
        let mut fake = Fake::with_faults(&[(at, fault, false)]);
        fake.drive(&options()).text()
    };
    let untouched = "The VM runs at the old site, as before; its disks are at the old site, and \
                     the new site stands by for them.";
    let taken_back = "The VM runs at the old site, as before; its disks are at the old site, and \
                      the new site has given them up.";
    for (call, nth, fault, reason, place) in [
        (
            "disks",
            0,
            Fault::Interrupt,
            "interrupted while the VM was migrated",
            taken_back,
        ),
        (
            "hold",
            0,
            Fault::Refused,
            "cannot have the VM kept stopped at the new site: refused",
            untouched,
        ),
        (
            "tune",
            0,
            Fault::Refused,
            "cannot set up the migration: refused",
            untouched,
        ),
        (
            "listen",
            0,
            Fault::NewDies,
            "cannot have the new site listen for the VM: nobody listens",
            untouched,
        ),
        (
            "send",
            0,
            Fault::Refused,
            "cannot begin to migrate the VM: refused",
            untouched,
        ),
        (
            "migration",
            0,
            Fault::NewDies,
            "the migration failed",
            taken_back,
        ),
        (
            "migration",
            0,
            Fault::Interrupt,
            "interrupted while the VM was migrated",
            taken_back,
        ),
        ("migration", 2, Fault::NewDies, "nobody listens", taken_back),
    ] {
        assert_eq!(
            told(call, nth, fault),
            format!("{reason}.\n{place}"),
            "{call} {nth} {fault:?}"
        );
    }
}

#[test]
fn a_group_that_is_handed_off_in_part_stays_stopped_and_can_be_gone_on_with() {
    let mut fake = Fake::new();
    fake.handoff_fails = Some(Trouble::Refused("the link is down".into()));
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "one of two disks");
    assert_eq!(
        outcome.text(),
        "data could not be handed off: the link is down.\n\
         The VM is at the new site with all its memory, stopped; of its disks these are handed off \
         to the new site: web; these are not, or it is not known: data.\n\
         Do not start the VM at the old site. Mend what is wrong, then the same command with \
         --resume goes on."
    );
    fake.handoff_fails = None;
    let outcome = fake.resume(&options());
    is_true(&fake, &outcome, "resumed");
    assert!(outcome.done && fake.new.running);
}

#[test]
fn when_the_old_site_is_lost_at_the_end_nothing_is_thrown_away() {
    let calls = calls_without_fault();
    let at = calls.iter().position(|name| *name == "migration").unwrap() + 2;
    let mut fake = Fake::with_faults(&[(at, Fault::OldDies, false)]);
    fake.disks.truncate(1);
    fake.handoff_fails = Some(Trouble::Refused("the link is down".into()));
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "old site lost");
    assert!(matches!(outcome.vm, VmPlace::Unknown(_)), "{outcome:?}");
    assert!(fake.new.alive && fake.handed() == 0);
    assert!(
        outcome.text().contains("--resume --old-is-gone"),
        "{}",
        outcome.text()
    );
    fake.handoff_fails = None;
    let without = fake.resume(&options());
    assert!(!without.done && fake.handed() == 0);
    let sure = Options {
        old_is_gone: true,
        ..options()
    };
    let outcome = fake.resume(&sure);
    is_true(&fake, &outcome, "resumed");
    assert!(outcome.done && fake.new.running, "{outcome:?}");
}

#[test]
fn what_the_options_change() {
    // The rest is not waited for.
    let mut fake = Fake::new();
    fake.arrives = false;
    let detached = Options {
        detach: true,
        quit_old: true,
        ..options()
    };
    let outcome = fake.drive(&detached);
    is_true(&fake, &outcome, "detached");
    assert!(
        outcome.done && outcome.disks == DisksPlace::Arriving(1 << 30),
        "{outcome:?}"
    );
    assert!(!fake.old.alive);
    // A roll-back leaves the disks standing by.
    let mut fake = Fake::new();
    fake.looks_left = u32::MAX;
    let patient = Options {
        timeout: Some(Duration::from_secs(60)),
        keep_standby: true,
        ..options()
    };
    let outcome = fake.drive(&patient);
    is_true(&fake, &outcome, "timed out");
    assert_eq!(
        (&outcome.vm, &outcome.disks),
        (&VmPlace::Old, &DisksPlace::OldStandby)
    );
    assert!(outcome.reason.unwrap().contains("time given"));
    // What is never prepared is waited for only so long.
    let mut fake = Fake::new();
    fake.disks[1].prepared = Some(false);
    let short = Options {
        prepare: Some(Prepare {
            limit: Some(Duration::from_secs(10)),
        }),
        ..Options::default()
    };
    assert!(fake.drive(&short).done);
    assert!(fake.now >= Duration::from_secs(10) && fake.notes[0].contains("not everything"));
    // Daemons that copy nothing before are not waited for, and that is said.
    let mut fake = Fake::new();
    fake.disks.iter_mut().for_each(|disk| disk.prepared = None);
    assert!(fake.drive(&options()).done);
    assert!(fake.notes[0].contains("nothing is copied before"));
}

#[test]
fn a_stray_write_at_the_new_site_keeps_the_vm_from_going_on_at_the_old_one() {
    let mut fake = Fake::new();
    let calls = calls_without_fault();
    let at = calls.iter().position(|name| *name == "migration").unwrap() + 2;
    fake.faults = vec![(at, Fault::NewDies, false)];
    // The stray client comes while the VM is on its way.
    let skip = Options::default();
    fake.disks[1].state = "arriving".into();
    fake.old.running = false;
    let outcome = Course::new(&mut fake, &skip).run();
    assert!(!fake.log.contains(&"go on"), "{:?}", fake.log);
    assert!(!outcome.done, "{outcome:?}");
}
