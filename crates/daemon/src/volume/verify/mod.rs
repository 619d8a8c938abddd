//! Comparing the disk with its source, before that is let go.
//!
//! Owns whether a comparison runs, what the last one found, and whether the source may be let go.
//! Nothing of it is durable: after a restart it simply begins again. Only clean blocks are
//! compared, since owned ones are newer than the source's; the comparison itself is in `run`.
//!
//! The source is kept while a comparison runs, when one has found differences, and, if one is
//! required, until one that began with everything here has found none. A person may decide
//! otherwise ([`Volume::accept_differences`]).

mod run;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use hikkoshi_engine::mover::Phase;

use super::relocation::Relocation;
use super::{Volume, lock};
use crate::registry::CommandError;
use crate::status::LifeState;
use crate::verification::{VerifyState, VerifyStatus};
use run::Run;

/// The comparisons of one volume.
#[derive(Default)]
pub(super) struct Verification {
    /// The source must not be let go without one.
    required: bool,
    /// Ends the one that runs.
    stop: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    status: VerifyStatus,
    /// The last one began when everything was here.
    whole: bool,
    /// Whatever it found, a person wants the source to be let go.
    accepted: bool,
    thread: Option<JoinHandle<()>>,
}

impl Verification {
    pub fn new(required: bool) -> Self {
        Self {
            required,
            ..Self::default()
        }
    }

    fn change(&self, change: impl FnOnce(&mut VerifyStatus)) {
        change(&mut lock(&self.state).status);
    }

    /// How many differences are listed.
    fn differences(&self) -> usize {
        lock(&self.state).status.differences.len()
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends what runs, and waits until it has.
    pub fn end(&self) {
        self.stop.store(true, Ordering::Release);
        let thread = lock(&self.state).thread.take();
        if let Some(thread) = thread {
            // A panic was logged where it happened.
            let _ = thread.join();
        }
    }
}

/// Whether the source may be let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    Open,
    /// Not now, and what runs or was found says when.
    Shut,
    /// Not before a comparison.
    CompareFirst,
}

impl State {
    fn gate(&self, required: bool) -> Gate {
        let VerifyStatus { state, .. } = self.status;
        match state {
            _ if self.accepted => Gate::Open,
            VerifyState::Running | VerifyState::Differs => Gate::Shut,
            VerifyState::Failed if required => Gate::Shut,
            VerifyState::Equal if self.whole => Gate::Open,
            _ if required => Gate::CompareFirst,
            _ => Gate::Open,
        }
    }
}

impl Volume {
    /// Whether the source may be let go now that everything is here. If something is to be compared
    /// first, that is begun, and asks for the completion again when it ends.
    pub(super) fn may_let_go(&self) -> bool {
        let gate = lock(&self.verification.state).gate(self.verification.required);
        if gate == Gate::CompareFirst
            && let Err(e) = self.begin_verify()
        {
            tracing::error!(export = %self.name, "comparing with the source cannot begin: {e}");
        }
        gate == Gate::Open
    }

    /// Begins a comparison, unless one runs already.
    ///
    /// # Errors
    /// There is nothing to compare with, or the VM still runs there.
    pub fn begin_verify(&self) -> Result<(), CommandError> {
        if self.life() == LifeState::Standby {
            return Err(CommandError::Conflict(format!(
                "cannot verify export {:?}: the VM still runs at the source, and nothing of it is \
                 kept before the handoff; verify once the disk is arriving",
                self.name
            )));
        }
        if self.rest_is_here() && !self.is_local() {
            return Err(CommandError::Conflict(format!(
                "cannot verify export {:?}: the disk came back before all of it was at the source, so \
                 there is nothing whole to compare it with",
                self.name
            )));
        }
        let no_source = || {
            CommandError::Conflict(format!(
                "cannot verify export {:?}: it has no source to compare with; a disk that moves is \
                 compared before its source is let go with `hikkoshi serve --verify`",
                self.name
            ))
        };
        let relocation = self.unfinished().ok_or_else(no_source)?;
        let volume = relocation.volume().ok_or_else(no_source)?;
        let mut state = lock(&self.verification.state);
        if state.status.state == VerifyState::Running || self.verification.is_stopped() {
            return Ok(());
        }
        state.status = VerifyStatus {
            export: self.name.clone(),
            state: VerifyState::Running,
            size_bytes: self.geometry.size_bytes(),
            ..VerifyStatus::default()
        };
        state.whole = relocation.residency.missing_blocks() == 0;
        state.accepted = false;
        let spawned = std::thread::Builder::new()
            .name("verify".into())
            .spawn(move || volume.verify_with(&relocation));
        match spawned {
            Ok(thread) => state.thread = Some(thread),
            Err(e) => {
                state.status.state = VerifyState::Failed;
                state.status.message = format!("a thread could not be started: {e}");
                return Err(CommandError::Failed(state.status.message.clone()));
            }
        }
        Ok(())
    }

    /// Lets the source go whatever the last comparison has found.
    ///
    /// # Errors
    /// It has found nothing that could be accepted.
    pub fn accept_differences(&self) -> Result<(), CommandError> {
        {
            let state = lock(&self.verification.state);
            if !matches!(
                state.status.state,
                VerifyState::Differs | VerifyState::Failed
            ) {
                return Err(CommandError::Conflict(format!(
                    "export {:?} has no differences to accept: no comparison has found any",
                    self.name
                )));
            }
            tracing::warn!(
                export = %self.name,
                "{} bytes that differ from the source were accepted",
                state.status.differing_bytes
            );
        }
        // What differs was written by nobody, and so is not recorded.
        self.end_way_back("the disk differs from its source, or may, and that was accepted")
            .map_err(|e| CommandError::Failed(format!("nothing is accepted: {e}")))?;
        lock(&self.verification.state).accepted = true;
        self.ask_for_completion();
        Ok(())
    }

    /// Everything may be here already: then this was what the completion waited for.
    fn ask_for_completion(&self) {
        let complete = |r: &Arc<Relocation>| r.with_mover(|m| m.phase()) == Phase::Complete;
        if self.unfinished().as_ref().is_some_and(complete) {
            self.complete_soon();
        }
    }

    /// On a thread of its own.
    fn verify_with(&self, relocation: &Arc<Relocation>) {
        tracing::info!(export = %self.name, "comparing with the source");
        let outcome = Run::new(self, relocation).run();
        let status = {
            let mut state = lock(&self.verification.state);
            state.status.state = outcome;
            state.status.clone()
        };
        match outcome {
            VerifyState::Differs => tracing::error!(
                export = %self.name,
                "{} bytes differ from the source, the first at offset {}; the source is kept until \
                 `hikkoshi verify` finds none or `hikkoshi verify --accept` says to let it go",
                status.differing_bytes,
                status.differences.first().map_or(0, |d| d.offset)
            ),
            VerifyState::Failed => tracing::error!(
                export = %self.name,
                "{} bytes could not be compared with the source: {}",
                status.unreadable_bytes,
                status.message
            ),
            _ => tracing::info!(
                export = %self.name,
                "comparing ended: {} bytes are equal, {} were written here",
                status.verified_bytes,
                status.owned_bytes
            ),
        }
        self.ask_for_completion();
    }

    /// How the last comparison stands.
    pub fn verify_status(&self) -> VerifyStatus {
        let complete = |r: &Arc<Relocation>| r.with_mover(|m| m.phase()) == Phase::Complete;
        let all_here = self.unfinished().as_ref().is_some_and(complete);
        let state = lock(&self.verification.state);
        VerifyStatus {
            export: self.name.clone(),
            size_bytes: self.geometry.size_bytes(),
            required: self.verification.required,
            withheld: all_here && state.gate(self.verification.required) != Gate::Open,
            ..state.status.clone()
        }
    }

    /// What a person should know of it.
    pub(super) fn verify_note(&self) -> Option<String> {
        let status = self.verify_status();
        if !status.withheld {
            return None;
        }
        let what_now = "the source is kept until `hikkoshi verify` finds nothing, or `hikkoshi \
             verify --accept` lets it go regardless";
        Some(match status.state {
            VerifyState::Differs => format!(
                "everything is here, but {} bytes differ from the source; {what_now}",
                status.differing_bytes
            ),
            VerifyState::Failed => format!(
                "everything is here, but {} bytes could not be compared with the source: {}; \
                 {what_now}",
                status.unreadable_bytes, status.message
            ),
            _ => format!(
                "everything is here and is compared with the source before that is let go: {}% done",
                u128::from(status.checked_bytes) * 100 / u128::from(status.size_bytes.max(1))
            ),
        })
    }
}
