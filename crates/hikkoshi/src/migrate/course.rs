//! The course of a move: which step follows which, and what is done when one fails.
//!
//! Has no I/O and no clock of its own: everything goes through [`Sites`]. It keeps three promises,
//! which `course_tests.rs` holds it to with a failure at every single call:
//!
//! 1. The VM never runs at both sites. The new site is told to keep the VM stopped before anything
//!    is sent (`hold`), so nothing but [`Course::commit`] ever lets it run there.
//! 2. Up to the first handoff of a disk everything can be taken back. From then on the VM is never
//!    let go on at the old site.
//! 3. Whatever happens, the statement at the end is true, and says "not certain" rather than guess.

use std::time::Duration;

use super::outcome::{DisksPlace, Outcome, VmPlace};
use super::sites::{DiskState, Migration, News, Phase, Site, Sites, Step, Trouble};

/// How often states are asked for. An event of QEMU's cuts the pause short.
const POLL: Duration = Duration::from_millis(200);

/// How long a site may give no answer while the VM moves, before its word is given up. A tunnel
/// that is set up anew takes some seconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// The same for the new site while the VM stands still: long enough for a short hiccup of the link.
const STILL_PATIENCE: Duration = Duration::from_secs(5);

/// How long QEMU may take to cancel, to go on, or to load what it has received.
const SETTLE: Duration = Duration::from_secs(60);

/// Tries of a handoff: one that a source out of reach made fail may go through a moment later.
const HANDOFF_TRIES: u32 = 3;

/// What the one who drives the move may choose.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Wait until what can be copied before is here; `None`: do not.
    pub prepare: Option<Prepare>,
    /// Give the migration up when it has not come to its end by then.
    pub timeout: Option<Duration>,
    /// After a roll-back the disks stand by as before.
    pub keep_standby: bool,
    /// Do not wait for the rest of the disks.
    pub detach: bool,
    /// End the QEMU at the old site when the VM runs at the new one.
    pub quit_old: bool,
    /// Whoever calls knows that the old QEMU does not run the VM: it need not say so itself.
    pub old_is_gone: bool,
}

/// How long to wait for the disks to be prepared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prepare {
    /// At most so long; `None`: as long as it takes.
    pub limit: Option<Duration>,
}

/// A move that is being driven.
pub struct Course<'a> {
    sites: &'a mut dyn Sites,
    options: &'a Options,
}

impl<'a> Course<'a> {
    /// A move between `sites`.
    pub fn new(sites: &'a mut dyn Sites, options: &'a Options) -> Self {
        Self { sites, options }
    }

    /// Everything from the beginning. The check must have found nothing wrong.
    pub fn run(&mut self) -> Outcome {
        if let Some(prepare) = self.options.prepare
            && let Err(reason) = self.prepare(prepare)
        {
            return self.unchanged(reason);
        }
        self.sites.tell(News::Begins(Step::Migrate));
        let steps: [(&str, Act); 3] = [
            ("have the VM kept stopped at the new site", |s| s.hold()),
            ("set up the migration", |s| s.tune()),
            ("have the new site listen for the VM", |s| s.listen()),
        ];
        for (what, act) in steps {
            if let Err(trouble) = act(self.sites) {
                return self.unchanged(format!("cannot {what}: {}", trouble.text()));
            }
        }
        match self.sites.send() {
            Ok(()) => {}
            Err(Trouble::Refused(why)) => {
                return self.unchanged(format!("cannot begin to migrate the VM: {why}"));
            }
            // Whether it has begun, the old site's state will tell.
            Err(Trouble::Lost(_)) => {}
        }
        match self.transfer().and_then(|()| self.arrival()) {
            Ok(()) => self.commit(true),
            Err(reason) => self.roll_back(reason),
        }
    }

    /// Goes on with a move of which the VM has arrived at the new site.
    pub fn resume(&mut self) -> Outcome {
        let (old, new) = (self.sites.vm(Site::Old), self.sites.vm(Site::New));
        let old_runs = old.as_ref().ok().map(|state| state.running);
        let new = match new {
            Ok(state) => state,
            Err(trouble) => {
                let reason = format!("the QEMU at the new site: {}", trouble.text());
                return match old_runs {
                    Some(true) => self.unchanged(reason),
                    _ => self.unclear(reason, "the QEMU at the new site does not answer".into()),
                };
            }
        };
        let arrived = match self.sites.migration(Site::New) {
            Ok(migration) => migration.phase == Phase::Completed,
            Err(_) => false,
        };
        match (old_runs, new.running) {
            (Some(true), true) => Outcome {
                done: false,
                reason: Some("the VM runs at BOTH sites, by the word of both QEMUs".into()),
                vm: VmPlace::Unknown("it runs twice".into()),
                disks: self.disks_now(),
                advice: vec!["End one of them now, with `quit` in its monitor.".into()],
            },
            (Some(true), false) => self.unchanged(
                "there is nothing to resume: the VM runs at the old site; leave --resume out"
                    .into(),
            ),
            (_, true) => self.commit(false),
            (Some(false), false) if arrived => self.commit(true),
            (None, false) if arrived && self.options.old_is_gone => self.commit(true),
            (None, false) if arrived => self.unclear(
                "the QEMU at the old site does not answer".into(),
                "all of it is at the new site, stopped, but the old QEMU does not say that it is \
                 stopped there; if you know it is, add --old-is-gone"
                    .into(),
            ),
            (_, false) => self.unclear(
                format!(
                    "nothing to go on with: the VM has not arrived at the new site ({})",
                    new.status
                ),
                "it is stopped at the old site; after the QEMU at the new site was ended, `cont` \
                 in the old one's monitor lets it go on there"
                    .into(),
            ),
        }
    }

    // Before anything has changed

    fn prepare(&mut self, prepare: Prepare) -> Result<(), String> {
        self.sites.tell(News::Begins(Step::Prepare));
        let begun = self.sites.now();
        let mut lost_since = None;
        loop {
            if self.sites.interrupted() {
                return Err("interrupted while the disks were prepared".into());
            }
            let states = self.sites.disk_states();
            let known: Option<Vec<&DiskState>> = states.iter().map(|s| s.as_ref().ok()).collect();
            if let Some(states) = known {
                lost_since = None;
                if let Some(stray) = states.iter().find(|state| state.state != "standby") {
                    return Err(format!(
                        "disk {:?} is {} at the new site, and should be standby",
                        stray.export, stray.state
                    ));
                }
                if states.iter().all(|state| state.prepared.is_none()) {
                    let note = "nothing is copied before the handoff; all of it comes after";
                    self.sites.tell(News::Note(note.into()));
                    return Ok(());
                }
                self.sites.tell(News::Progress {
                    step: Step::Prepare,
                    done_bytes: states.iter().map(|state| state.ahead_bytes).sum(),
                    of_bytes: states.iter().map(|state| state.size_bytes).sum(),
                });
                if states.iter().all(|state| state.prepared != Some(false)) {
                    return Ok(());
                }
            } else if let Some(why) = self.patience(&mut lost_since, PATIENCE, first_error(&states))
            {
                return Err(why);
            }
            let spent = self.sites.now().saturating_sub(begun);
            if prepare.limit.is_some_and(|limit| spent >= limit) {
                let note = "not everything is prepared in the time given; the rest comes after";
                self.sites.tell(News::Note(note.into()));
                return Ok(());
            }
            self.sites.nap(Site::New, POLL);
        }
    }

    /// The end of a move of which nothing was sent yet.
    fn unchanged(&mut self, reason: String) -> Outcome {
        let vm = match self.sites.vm(Site::Old) {
            Ok(state) if state.running => VmPlace::Old,
            Ok(state) => VmPlace::Unknown(format!(
                "nothing of it was sent, and the QEMU at the old site says {}",
                state.status
            )),
            Err(trouble) => VmPlace::Unknown(format!(
                "nothing of it was sent, and the QEMU at the old site does not answer: {}",
                trouble.text()
            )),
        };
        Outcome {
            done: false,
            reason: Some(reason),
            vm,
            disks: self.disks_now(),
            advice: vec![],
        }
    }

    // The VM's memory

    /// Waits until the old site has sent everything, and so has stopped the VM for good.
    fn transfer(&mut self) -> Result<(), String> {
        let begun = self.sites.now();
        let mut lost_since = None;
        loop {
            if self.sites.interrupted() {
                return Err("interrupted while the VM was migrated".into());
            }
            match self.sites.migration(Site::Old) {
                Ok(now) => {
                    lost_since = None;
                    self.sites.tell(News::Progress {
                        step: Step::Migrate,
                        done_bytes: now.sent_bytes,
                        of_bytes: now.sent_bytes.saturating_add(now.left_bytes),
                    });
                    match now.phase {
                        Phase::Completed => return Ok(()),
                        Phase::Active => {}
                        Phase::None => return Err("the migration did not begin".into()),
                        Phase::Failed => return Err(failed("the migration failed", &now)),
                        Phase::Cancelled => return Err(failed("it was cancelled", &now)),
                    }
                }
                Err(trouble) => {
                    if let Some(why) = self.patience(&mut lost_since, PATIENCE, trouble) {
                        return Err(why);
                    }
                }
            }
            let spent = self.sites.now().saturating_sub(begun);
            if self.options.timeout.is_some_and(|limit| spent >= limit) {
                return Err("the migration did not come to its end in the time given".into());
            }
            self.sites.nap(Site::Old, POLL);
        }
    }

    /// Waits until the new site has loaded what it was sent.
    fn arrival(&mut self) -> Result<(), String> {
        let begun = self.sites.now();
        let mut lost_since = None;
        loop {
            if self.sites.interrupted() {
                return Err("interrupted when the VM had just arrived".into());
            }
            match self.sites.migration(Site::New) {
                Ok(now) if now.phase == Phase::Completed => return Ok(()),
                Ok(now) if now.phase == Phase::Failed => {
                    return Err(failed("the new site could not take the VM", &now));
                }
                Ok(_) => lost_since = None,
                Err(trouble) => {
                    if let Some(why) = self.patience(&mut lost_since, STILL_PATIENCE, trouble) {
                        return Err(why);
                    }
                }
            }
            if self.sites.now().saturating_sub(begun) >= SETTLE {
                return Err("the new site has not loaded the VM within a minute".into());
            }
            self.sites.nap(Site::New, POLL);
        }
    }

    // The way back

    /// Makes everything as it was. Only before the first handoff.
    fn roll_back(&mut self, reason: String) -> Outcome {
        self.sites.tell(News::Note(reason.clone()));
        self.sites.tell(News::Begins(Step::RollBack));
        let mut advice = Vec::new();
        self.end_the_sending();
        // Somebody else's client may have written at the new site. Then the old disk is fenced, and
        // the VM must not go on there.
        let states = self.sites.disk_states();
        let strays: Vec<usize> = (0..states.len())
            .filter(|disk| matches!(&states[*disk], Ok(s) if is_handed(s)))
            .collect();
        let vm = if strays.is_empty() {
            match self.let_go_on(Site::Old) {
                Ok(()) => VmPlace::Old,
                Err((Some(state), why)) => {
                    advice.push(format!(
                        "The QEMU at the old site does not let it go on ({why}; it is {state}); \
                         `cont` in its monitor does, after the QEMU at the new site was ended."
                    ));
                    VmPlace::StoppedOld
                }
                Err((None, why)) => VmPlace::Unknown(format!(
                    "the QEMU at the old site does not answer: {why}; at the new site it was kept \
                     stopped"
                )),
            }
        } else {
            let names: Vec<_> = strays.iter().map(|d| self.sites.disk_name(*d)).collect();
            return self.split(
                format!(
                    "{reason}; and {} was handed off by a write of some other client at the new \
                     site",
                    names.join(", ")
                ),
                &strays,
            );
        };
        if vm != VmPlace::Old {
            // What is at the new site may be all there is: nothing of it is thrown away.
            advice.push(LEFT_AS_IT_IS.into());
            return Outcome {
                done: false,
                reason: Some(reason),
                vm,
                disks: self.disks_now(),
                advice,
            };
        }
        // It is stopped there, and was only let in to be moved.
        if let Err(trouble) = self.sites.quit(Site::New)
            && self.sites.vm(Site::New).is_ok()
        {
            advice.push(format!(
                "The QEMU at the new site could not be ended ({}): end it, and do not let it go \
                 on.",
                trouble.text()
            ));
        }
        let disks = if self.options.keep_standby {
            DisksPlace::OldStandby
        } else {
            self.give_up(&mut advice)
        };
        Outcome {
            done: false,
            reason: Some(reason),
            vm,
            disks,
            advice,
        }
    }

    /// Cancels the migration, if it is not over, and waits until it is.
    fn end_the_sending(&mut self) {
        let begun = self.sites.now();
        let mut lost_since = None;
        loop {
            match self.sites.migration(Site::Old) {
                Ok(now) if now.phase != Phase::Active => return,
                Ok(_) => {
                    lost_since = None;
                    // Refused or lost: asked again until it is over.
                    let _ = self.sites.cancel();
                }
                Err(trouble) => {
                    let over = self.patience(&mut lost_since, STILL_PATIENCE, trouble);
                    if over.is_some() {
                        return;
                    }
                }
            }
            if self.sites.now().saturating_sub(begun) >= SETTLE {
                return;
            }
            self.sites.nap(Site::Old, POLL);
        }
    }

    /// Has the new site give the disks up.
    fn give_up(&mut self, advice: &mut Vec<String>) -> DisksPlace {
        let mut not_known = Vec::new();
        for disk in 0..self.sites.disks() {
            let mut result = self.sites.give_up(disk);
            if matches!(result, Err(Trouble::Lost(_))) {
                self.sites.nap(Site::New, POLL);
                result = self.sites.give_up(disk);
            }
            if let Err(trouble) = result {
                let name = self.sites.disk_name(disk);
                advice.push(format!(
                    "Giving up {name} at the new site failed ({}): see to it that nobody writes \
                     to it there.",
                    trouble.text()
                ));
                not_known.push(name);
            }
        }
        match not_known.is_empty() {
            true => DisksPlace::OldGivenUp,
            false => DisksPlace::OldPartly(not_known),
        }
    }

    // The way forward

    /// Hands all disks off, and lets the VM go on at the new site, where it is already; with `held`
    /// it is stopped there. The first handoff is the point of no return.
    fn commit(&mut self, held: bool) -> Outcome {
        self.sites.tell(News::Begins(Step::Handoff));
        let all: Vec<usize> = (0..self.sites.disks()).collect();
        let mut open = all.clone();
        let mut refused_all = true;
        let mut why = String::new();
        for attempt in 0..HANDOFF_TRIES {
            if attempt > 0 {
                self.sites.nap(Site::New, POLL * 5);
            }
            let results = self.sites.hand_off(&open);
            let mut still_open = Vec::new();
            for (disk, result) in open.iter().zip(results) {
                match result {
                    Ok(()) => refused_all = false,
                    Err(trouble) => {
                        refused_all &= matches!(trouble, Trouble::Refused(_));
                        let name = self.sites.disk_name(*disk);
                        why = format!("{name} could not be handed off: {}", trouble.text());
                        still_open.push(*disk);
                    }
                }
            }
            open = still_open;
            if open.is_empty() {
                break;
            }
        }
        if !open.is_empty() {
            // Nothing has happened that could not be taken back.
            if held && refused_all {
                return self.roll_back(why);
            }
            if !held {
                return self.runs_with(why, &open);
            }
            let handed: Vec<usize> = all.into_iter().filter(|d| !open.contains(d)).collect();
            return self.split(why, &handed);
        }
        if held && let Err((state, why)) = self.let_go_on(Site::New) {
            let names = self.names(&all);
            let vm = match state {
                Some(_) => VmPlace::StoppedNew,
                None => VmPlace::Unknown(
                    "it was sent to the new site, whose QEMU does not answer any more".into(),
                ),
            };
            return Outcome {
                done: false,
                reason: Some(format!("the VM does not go on at the new site: {why}")),
                vm,
                disks: DisksPlace::Split {
                    handed: names,
                    others: vec![],
                },
                advice: vec![GO_ON.into()],
            };
        }
        self.follow()
    }

    /// The VM runs at the new site, and these disks do not know it yet.
    fn runs_with(&mut self, reason: String, open: &[usize]) -> Outcome {
        let handed = (0..self.sites.disks()).filter(|d| !open.contains(d));
        let handed: Vec<usize> = handed.collect();
        Outcome {
            done: false,
            reason: Some(reason),
            vm: VmPlace::New,
            disks: DisksPlace::Split {
                handed: self.names(&handed),
                others: self.names(open),
            },
            advice: vec![GO_ON.into()],
        }
    }

    /// The VM is stopped at both sites, and some disks were handed off.
    fn split(&mut self, reason: String, handed: &[usize]) -> Outcome {
        let others = (0..self.sites.disks()).filter(|d| !handed.contains(d));
        let others: Vec<usize> = others.collect();
        let arrived = matches!(
            self.sites.migration(Site::New),
            Ok(Migration {
                phase: Phase::Completed,
                ..
            })
        );
        let vm = match arrived {
            true => VmPlace::StoppedNew,
            false => match self.sites.vm(Site::Old) {
                Ok(state) if state.running => VmPlace::Old,
                Ok(_) => VmPlace::StoppedOld,
                Err(trouble) => VmPlace::Unknown(trouble.text().to_owned()),
            },
        };
        Outcome {
            done: false,
            reason: Some(reason),
            vm,
            disks: DisksPlace::Split {
                handed: self.names(handed),
                others: self.names(&others),
            },
            advice: vec![GO_ON.into()],
        }
    }

    /// Watches the rest of the disks come.
    fn follow(&mut self) -> Outcome {
        let mut advice = Vec::new();
        if self.options.quit_old
            && let Err(trouble) = self.sites.quit(Site::Old)
        {
            advice.push(format!(
                "The QEMU at the old site could not be ended: {}",
                trouble.text()
            ));
        }
        self.sites.tell(News::Begins(Step::Arrive));
        let mut lost_since = None;
        let mut told = false;
        loop {
            let states = self.sites.disk_states();
            let known: Option<Vec<&DiskState>> = states.iter().map(|s| s.as_ref().ok()).collect();
            let (reason, left) = if let Some(states) = &known {
                lost_since = None;
                let left = states.iter().map(|state| state.absent_bytes).sum();
                let size: u64 = states.iter().map(|state| state.size_bytes).sum();
                self.sites.tell(News::Progress {
                    step: Step::Arrive,
                    done_bytes: size.saturating_sub(left),
                    of_bytes: size,
                });
                if states.iter().all(|state| state.state == "local") {
                    return self.arrived(None, DisksPlace::New, advice);
                }
                for note in states.iter().flat_map(|state| &state.notes) {
                    if !std::mem::replace(&mut told, true) {
                        self.sites.tell(News::Note(note.clone()));
                    }
                }
                (None, left)
            } else {
                let over = self.patience(&mut lost_since, PATIENCE, first_error(&states));
                (over, states.iter().flatten().map(|s| s.absent_bytes).sum())
            };
            let interrupted = self.sites.interrupted();
            if self.options.detach || interrupted || reason.is_some() {
                advice.push(WATCH.into());
                let interrupted = interrupted.then(|| "interrupted after the handoff".to_owned());
                let reason = reason.or(interrupted);
                return self.arrived(reason, DisksPlace::Arriving(left), advice);
            }
            self.sites.nap(Site::New, POLL);
        }
    }

    /// The end of a move after which the VM ran at the new site.
    fn arrived(
        &mut self,
        reason: Option<String>,
        disks: DisksPlace,
        advice: Vec<String>,
    ) -> Outcome {
        let mut lost_since = None;
        // Between the handoff and now it may have ended, by itself or by a fault of its own.
        let gone = loop {
            match self.sites.vm(Site::New) {
                Ok(state) if state.running => break None,
                Ok(state) => break Some(format!("and is {} now", state.status)),
                Err(trouble) => {
                    if let Some(why) = self.patience(&mut lost_since, STILL_PATIENCE, trouble) {
                        break Some(format!("and its QEMU does not answer any more: {why}"));
                    }
                    self.sites.nap(Site::New, POLL);
                }
            }
        };
        let vm = match &gone {
            None => VmPlace::New,
            Some(how) => VmPlace::Unknown(format!("it went on at the new site, {how}")),
        };
        let reason = reason.or(gone.map(|how| format!("the VM went on at the new site, {how}")));
        Outcome {
            done: reason.is_none(),
            reason,
            vm,
            disks,
            advice,
        }
    }

    // What several steps need

    /// Lets the VM go on at `site`, where it may run already. On failure: its last state, if the
    /// site answers, and why.
    fn let_go_on(&mut self, site: Site) -> Result<(), (Option<String>, String)> {
        let begun = self.sites.now();
        let mut lost_since = None;
        let mut why = "it was told to".to_owned();
        loop {
            let mut known = None;
            match self.sites.vm(site) {
                Ok(state) if state.running => return Ok(()),
                Ok(state) => {
                    lost_since = None;
                    known = Some(state.status);
                    // Refused while the end of a migration is being tidied up: asked again.
                    if let Err(trouble) = self.sites.go_on(site) {
                        why = trouble.text().to_owned();
                    }
                }
                Err(trouble) => {
                    if let Some(why) = self.patience(&mut lost_since, PATIENCE, trouble) {
                        return Err((None, why));
                    }
                }
            }
            if self.sites.now().saturating_sub(begun) >= SETTLE {
                return Err((known, why));
            }
            self.sites.nap(site, POLL);
        }
    }

    /// Whether no answer has come for longer than `limit`: then why.
    fn patience(
        &self,
        since: &mut Option<Duration>,
        limit: Duration,
        trouble: Trouble,
    ) -> Option<String> {
        let now = self.sites.now();
        let since = *since.get_or_insert(now);
        (now.saturating_sub(since) >= limit).then(|| trouble.text().to_owned())
    }

    fn names(&self, disks: &[usize]) -> Vec<String> {
        disks.iter().map(|d| self.sites.disk_name(*d)).collect()
    }

    fn unclear(&mut self, reason: String, why: String) -> Outcome {
        Outcome {
            done: false,
            reason: Some(reason),
            vm: VmPlace::Unknown(why),
            disks: self.disks_now(),
            advice: vec![],
        }
    }

    /// Where the disks are by their own word.
    fn disks_now(&mut self) -> DisksPlace {
        let states = self.sites.disk_states();
        let which = |test: &dyn Fn(&DiskState) -> bool| -> Vec<usize> {
            let fits = |d: &usize| matches!(&states[*d], Ok(state) if test(state));
            (0..states.len()).filter(fits).collect()
        };
        let handed = which(&is_handed);
        if handed.is_empty() {
            let standby = which(&|state| state.state == "standby");
            if standby.len() == states.len() {
                return DisksPlace::OldStandby;
            }
            let given_up = which(&|state| state.state == "given-up");
            if given_up.len() == states.len() {
                return DisksPlace::OldGivenUp;
            }
            let open: Vec<usize> = (0..states.len())
                .filter(|d| !given_up.contains(d))
                .collect();
            return DisksPlace::OldPartly(self.names(&open));
        }
        let others: Vec<usize> = (0..states.len()).filter(|d| !handed.contains(d)).collect();
        DisksPlace::Split {
            handed: self.names(&handed),
            others: self.names(&others),
        }
    }
}

/// What goes on after the point of no return.
const GO_ON: &str = "Do not start the VM at the old site. Mend what is wrong, then the same \
                     command with --resume goes on.";

/// When it is not known that the VM runs at the old site.
const LEFT_AS_IT_IS: &str = "The QEMU at the new site was left as it is, and keeps what it has of \
                             the VM stopped. If it has all of it and the old site is lost, the \
                             same command with --resume --old-is-gone goes on there.";

/// How to follow the rest.
const WATCH: &str = "`hikkoshi wait` at the new site tells when the old site is needed no more; \
                     `hikkoshi status` tells how far it is.";

fn is_handed(state: &DiskState) -> bool {
    state.state == "arriving" || state.state == "local"
}

fn failed(what: &str, migration: &Migration) -> String {
    match &migration.error {
        Some(error) => format!("{what}: {error}"),
        None => what.to_owned(),
    }
}

fn first_error(states: &[Result<DiskState, Trouble>]) -> Trouble {
    let error = states.iter().find_map(|state| state.as_ref().err());
    error
        .cloned()
        .unwrap_or_else(|| Trouble::Lost("no disk".into()))
}

type Act = fn(&mut dyn Sites) -> Result<(), Trouble>;
