//! The course of a move: which step follows which, and what is done when one fails. The way back is in
//! `back.rs`, the way forward from the handoff in `forward.rs`.
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
use super::whereabouts::{KEEP_OLD_COPY, Whereabouts, return_note};

/// How often states are asked for. An event of QEMU's cuts the pause short.
pub(super) const POLL: Duration = Duration::from_millis(200);

/// How long a site may give no answer while the VM moves, before its word is given up. A tunnel
/// that is set up anew takes some seconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The same for the new site while the VM stands still: long enough for a short hiccup of the link.
pub(super) const STILL_PATIENCE: Duration = Duration::from_secs(5);

/// How long QEMU may take to cancel, to go on, or to load what it has received.
pub(super) const SETTLE: Duration = Duration::from_secs(60);

/// For whoever regrets a move.
const BACK: &str = "To take the VM back now, before all of it is here: docs/recipes.md, \"The way \
                    back\".";

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
    pub(super) sites: &'a mut dyn Sites,
    pub(super) options: &'a Options,
}

impl<'a> Course<'a> {
    /// A move between `sites`.
    pub fn new(sites: &'a mut dyn Sites, options: &'a Options) -> Self {
        Self { sites, options }
    }

    /// Everything from the beginning. The check must have found nothing wrong.
    pub fn run(&mut self) -> Outcome {
        let outcome = self.go();
        self.with_each_disk(outcome)
    }

    fn go(&mut self) -> Outcome {
        self.tell_of_returns();
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
        let outcome = self.go_on_with();
        self.with_each_disk(outcome)
    }

    fn go_on_with(&mut self) -> Outcome {
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
                each: vec![],
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
                    let note = match states.iter().all(|state| state.old_copy_needed) {
                        true => {
                            "nothing is copied before the handoff; what was written there comes after"
                        }
                        false => "nothing is copied before the handoff; all of it comes after",
                    };
                    self.sites.tell(News::Note(note.into()));
                    return Ok(());
                }
                let ahead = || states.iter().filter(|state| state.prepared.is_some());
                self.sites.tell(News::Progress {
                    step: Step::Prepare,
                    done_bytes: ahead().map(|state| state.ahead_bytes).sum(),
                    of_bytes: ahead().map(|state| state.size_bytes).sum(),
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
            each: vec![],
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

    // What several steps need

    /// Lets the VM go on at `site`, where it may run already. On failure: its last state, if the
    /// site answers, and why.
    pub(super) fn let_go_on(&mut self, site: Site) -> Result<(), (Option<String>, String)> {
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
    pub(super) fn patience(
        &self,
        since: &mut Option<Duration>,
        limit: Duration,
        trouble: Trouble,
    ) -> Option<String> {
        let now = self.sites.now();
        let since = *since.get_or_insert(now);
        (now.saturating_sub(since) >= limit).then(|| trouble.text().to_owned())
    }

    pub(super) fn names(&self, disks: &[usize]) -> Vec<String> {
        disks.iter().map(|d| self.sites.disk_name(*d)).collect()
    }

    fn unclear(&mut self, reason: String, why: String) -> Outcome {
        Outcome {
            done: false,
            reason: Some(reason),
            vm: VmPlace::Unknown(why),
            disks: self.disks_now(),
            each: vec![],
            advice: vec![],
        }
    }

    /// Says of which disks the old site does not have all, and what of them will have to come.
    fn tell_of_returns(&mut self) {
        let new = self.sites.disk_states();
        if !new.iter().flatten().any(|state| state.old_copy_needed) {
            return;
        }
        let old = self.sites.old_states();
        for (old, new) in old.iter().zip(new.iter()) {
            let old = old.as_ref().and_then(|old| old.as_ref().ok());
            let note = new.as_ref().ok().and_then(|new| return_note(old, new));
            if let Some(note) = note {
                self.sites.tell(News::Note(note));
            }
        }
    }

    /// Where each disk is, and what is to be kept, where not all went well.
    fn with_each_disk(&mut self, mut outcome: Outcome) -> Outcome {
        if outcome.done {
            return outcome;
        }
        let (old, new) = (self.sites.old_states(), self.sites.disk_states());
        for (disk, (old, new)) in old.iter().zip(&new).enumerate() {
            let name = self.sites.disk_name(disk);
            outcome.each.push(Whereabouts::of(&name, old.as_ref(), new));
        }
        if new.iter().flatten().any(|state| state.old_copy_needed) {
            outcome.advice.push(KEEP_OLD_COPY.into());
        }
        let fenced = |old: &Option<_>| matches!(old, Some(Ok(DiskState { state, .. })) if state == "departed");
        if matches!(outcome.disks, DisksPlace::Arriving(_)) && old.iter().all(fenced) {
            outcome.advice.push(BACK.into());
        }
        outcome
    }

    /// Where the disks are by their own word.
    pub(super) fn disks_now(&mut self) -> DisksPlace {
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

pub(super) fn is_handed(state: &DiskState) -> bool {
    // A disk that is there may already be prepared for the next move.
    matches!(state.state.as_str(), "arriving" | "local" | "departing")
}

fn failed(what: &str, migration: &Migration) -> String {
    match &migration.error {
        Some(error) => format!("{what}: {error}"),
        None => what.to_owned(),
    }
}

pub(super) fn first_error(states: &[Result<DiskState, Trouble>]) -> Trouble {
    let error = states.iter().find_map(|state| state.as_ref().err());
    error
        .cloned()
        .unwrap_or_else(|| Trouble::Lost("no disk".into()))
}

type Act = fn(&mut dyn Sites) -> Result<(), Trouble>;
