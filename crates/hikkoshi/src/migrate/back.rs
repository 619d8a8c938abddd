//! The way back: everything as it was, up to the first handoff of a disk.

use super::course::{Course, POLL, SETTLE, STILL_PATIENCE, is_handed};
use super::outcome::{DisksPlace, Outcome, VmPlace};
use super::sites::{News, Phase, Site, Step, Trouble};

/// When it is not known that the VM runs at the old site.
const LEFT_AS_IT_IS: &str = "The QEMU at the new site was left as it is, and keeps what it has of \
                             the VM stopped. If it has all of it and the old site is lost, the \
                             same command with --resume --old-is-gone goes on there.";

impl Course<'_> {
    /// Makes everything as it was. Only before the first handoff.
    pub(super) fn roll_back(&mut self, reason: String) -> Outcome {
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
        if !strays.is_empty() {
            let names = self.names(&strays).join(", ");
            let reason = format!(
                "{reason}; and {names} was handed off by a write of some other client at the new \
                 site"
            );
            return self.split(reason, &strays);
        }
        let vm = match self.let_go_on(Site::Old) {
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
        };
        if vm != VmPlace::Old {
            // What is at the new site may be all there is: nothing of it is thrown away.
            advice.push(LEFT_AS_IT_IS.into());
            return Outcome {
                done: false,
                reason: Some(reason),
                vm,
                disks: self.disks_now(),
                each: vec![],
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
            self.disks_now()
        } else {
            self.give_up(&mut advice)
        };
        Outcome {
            done: false,
            reason: Some(reason),
            vm,
            disks,
            each: vec![],
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
            if let Err(trouble) = self.give_up_disk(disk) {
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

    /// Has the new site give a disk up; asked again when the answer is lost.
    pub(super) fn give_up_disk(&mut self, disk: usize) -> Result<(), Trouble> {
        let result = self.sites.give_up(disk);
        if !matches!(result, Err(Trouble::Lost(_))) {
            return result;
        }
        self.sites.nap(Site::New, POLL);
        self.sites.give_up(disk)
    }
}
