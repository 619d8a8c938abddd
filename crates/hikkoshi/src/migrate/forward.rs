//! The way forward: the handoff, from which there is no way back, and the arrival of the rest.

use std::time::Duration;

use super::course::{Course, PATIENCE, POLL, SETTLE, STILL_PATIENCE, first_error, is_handed};
use super::outcome::{DisksPlace, Outcome, VmPlace};
use super::sites::{DiskState, Migration, News, Phase, Site, Step, Trouble};

/// Tries of a handoff: one that a source out of reach made fail may go through a moment later. The
/// VM stands still meanwhile.
const HANDOFF_TRIES: u32 = 3;
const HANDOFF_PAUSE: Duration = Duration::from_secs(1);

/// What goes on after the point of no return.
const GO_ON: &str = "Do not start the VM at the old site. Mend what is wrong, then the same \
                     command with --resume goes on.";

/// When the old site has not heard yet that a move was given up in the middle of its handoff.
const STILL_FENCED: &str = "The old site's daemon may not have heard yet that the move was given \
                            up. When `hikkoshi status` there says departed of no disk any more, \
                            `cont` in the monitor of the QEMU there lets the VM go on.";

/// When some disks were handed off and others given up. The VM has not run since.
const TORN: &str = "The VM has not run since it was stopped at the old site, so the copies of its \
                    disks there are the newest: end the QEMU at the new site and the daemons of \
                    the disks there, `hikkoshi release --force` those that are departed at the old \
                    site, and `cont` in the monitor of the QEMU there.";

/// The same where the old site has only a part of the disks, or does not say: the rest is at the new one.
const TORN_RETURN: &str = "The VM has not run since it was stopped at the old site, but the disks \
                           there are not known to be whole: release none of them. Start the \
                           daemons of those that were given up anew at the new site (with --return \
                           where they come back into an old copy); then the same command as this \
                           with --resume goes on.";

/// How to follow the rest.
const WATCH: &str = "`hikkoshi wait` at the new site tells when the old site is needed no more; \
                     `hikkoshi status` tells how far it is.";

impl Course<'_> {
    /// Hands all disks off, and lets the VM go on at the new site, where it is already; with `held`
    /// it is stopped there. The first handoff is the point of no return.
    pub(super) fn commit(&mut self, held: bool) -> Outcome {
        self.sites.tell(News::Begins(Step::Handoff));
        let all: Vec<usize> = (0..self.sites.disks()).collect();
        if let Err((open, why)) = self.hand_off_all(&all) {
            let handed: Vec<usize> = all.iter().copied().filter(|d| !open.contains(d)).collect();
            return match (held, handed.is_empty()) {
                (false, _) => self.runs_with(why, &open),
                (true, true) => self.give_up_instead(why),
                (true, false) => self.split(why, &handed),
            };
        }
        if held && let Err((state, why)) = self.let_go_on(Site::New) {
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
                    handed: self.names(&all),
                    others: vec![],
                },
                each: vec![],
                advice: vec![GO_ON.into()],
            };
        }
        self.follow()
    }

    /// Hands disks off. On failure: those that are not known to be, and why.
    fn hand_off_all(&mut self, disks: &[usize]) -> Result<(), (Vec<usize>, String)> {
        let mut open = disks.to_vec();
        let mut why = String::new();
        for attempt in 0..HANDOFF_TRIES {
            if attempt > 0 {
                self.sites.nap(Site::New, HANDOFF_PAUSE);
            }
            let results = self.sites.hand_off(&open);
            let mut lost = false;
            let mut still_open = Vec::new();
            for (disk, result) in open.iter().zip(results) {
                let Err(trouble) = result else { continue };
                lost |= matches!(trouble, Trouble::Lost(_));
                let name = self.sites.disk_name(*disk);
                why = format!("{name} could not be handed off: {}", trouble.text());
                still_open.push(*disk);
            }
            if lost {
                // The answer was lost, and not what it would have told.
                let states = self.sites.disk_states();
                still_open.retain(|disk| !matches!(&states[*disk], Ok(state) if is_handed(state)));
            }
            open = still_open;
            if open.is_empty() {
                return Ok(());
            }
        }
        Err((open, why))
    }

    /// No disk is known to be handed off, and the VM is stopped at both sites. A destination that has
    /// given a disk up never takes it over, so if all do, the old site may have the VM back.
    fn give_up_instead(&mut self, reason: String) -> Outcome {
        let all: Vec<usize> = (0..self.sites.disks()).collect();
        // Only if the old site can have it: else what is at the new one is all there is.
        let old_answers = self.sites.vm(Site::Old).is_ok()
            && all.iter().all(|disk| self.sites.fenced(*disk).is_ok());
        if !old_answers {
            return self.split_now(reason);
        }
        for disk in &all {
            if let Err(trouble) = self.give_up_disk(*disk) {
                let name = self.sites.disk_name(*disk);
                let reason = format!(
                    "{reason}; and {name} could not be given up: {}",
                    trouble.text()
                );
                return self.split_now(reason);
            }
        }
        // The old site lifts its fences as soon as it hears of it.
        let begun = self.sites.now();
        loop {
            let fenced: Vec<_> = all.iter().map(|disk| self.sites.fenced(*disk)).collect();
            if fenced.iter().all(|fenced| *fenced == Ok(false)) {
                return self.roll_back(reason);
            }
            if self.sites.now().saturating_sub(begun) >= SETTLE {
                break;
            }
            self.sites.nap(Site::Old, POLL);
        }
        let vm = match self.sites.vm(Site::Old) {
            Ok(state) if state.running => VmPlace::Old,
            Ok(_) => VmPlace::StoppedOld,
            Err(trouble) => VmPlace::Unknown(format!(
                "it is stopped at both sites, and the QEMU at the old one does not answer: {}",
                trouble.text()
            )),
        };
        Outcome {
            done: false,
            reason: Some(reason),
            vm,
            disks: self.disks_now(),
            each: vec![],
            advice: vec![STILL_FENCED.into()],
        }
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
            each: vec![],
            advice: vec![GO_ON.into()],
        }
    }

    /// As [`Self::split`], with what the disks themselves say.
    pub(super) fn split_now(&mut self, reason: String) -> Outcome {
        let states = self.sites.disk_states();
        let handed = |disk: &usize| matches!(&states[*disk], Ok(state) if is_handed(state));
        let handed: Vec<usize> = (0..states.len()).filter(handed).collect();
        let given_up = states
            .iter()
            .flatten()
            .any(|state| state.state == "given-up");
        let mut outcome = self.split(reason, &handed);
        if given_up {
            let old = self.sites.old_states();
            // One that does not say may lack something.
            let whole = |old: &Option<Result<DiskState, Trouble>>| match old {
                Some(Ok(old)) => old.absent_bytes == 0,
                Some(Err(_)) => false,
                None => true,
            };
            let advice = match old.iter().all(whole) {
                true => TORN,
                false => TORN_RETURN,
            };
            outcome.advice = vec![advice.into()];
        }
        outcome
    }

    /// The VM is stopped at both sites, and some disks were handed off.
    pub(super) fn split(&mut self, reason: String, handed: &[usize]) -> Outcome {
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
            each: vec![],
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
                if states.iter().all(|s| s.state != "arriving" && is_handed(s)) {
                    return self.arrived(None, DisksPlace::New, advice);
                }
                // Whoever takes them away goes on to wait for the rest.
                let gone: Vec<usize> = (0..states.len())
                    .filter(|disk| states[*disk].state == "departed")
                    .collect();
                if !gone.is_empty() {
                    let names = self.names(&gone);
                    let reason = format!(
                        "before all of it was there, another move has taken {} away from the new site",
                        names.join(", ")
                    );
                    return self.arrived(Some(reason), DisksPlace::MovedOn(names), advice);
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
            each: vec![],
            advice,
        }
    }
}
