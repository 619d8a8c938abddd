//! The proof that a source that comes back is still the same disk.
//!
//! Stands between the source's news and the mover: the mover hears that the source is up only
//! after the [witnesses](hikkoshi_engine::witness) of what came from it before have all been read
//! from it again and agree. They are asked for in one go, so it costs a round trip. Until then,
//! and while another disk answers, all is as if the source were away: what is here is served, and
//! reads of what is not wait or fail by policy. A source that was refused is looked at again, with
//! longer and longer pauses, and whenever it connects anew.
//!
//! Before the handoff nothing is asked: the VM still writes there, and nothing is kept.
//!
//! What it cannot see is told in `engine/witness.rs`. Besides, it looks when the first connection
//! stands, not at each further one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hikkoshi_engine::mover::Action;
use hikkoshi_engine::witness::Witness;
use hikkoshi_wan::{Fetched, Lane, SourceError, SourceErrorKind};

use super::relocation::{Reader, Relocation};
use super::{Tally, lock};
use crate::events::EventKind;

/// The pause before a source that was refused is looked at again; doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Where a source stands.
#[derive(Debug, Default)]
enum Standing {
    /// It is not reachable.
    #[default]
    Away,
    /// Witnesses are being asked.
    Asking(Round),
    /// It is the right one.
    Believed,
    /// It is reachable, but another disk or unable to prove it.
    Refused { again_at: Duration },
}

/// The answers of one attempt.
#[derive(Debug)]
struct Round {
    number: u64,
    outstanding: usize,
    agree: usize,
    differ: usize,
    unreadable: usize,
    cut_off: usize,
    /// Where the first one that differs is, in bytes.
    differs_at: Option<u64>,
}

/// What is known of whether the source is the right one.
#[derive(Debug, Default)]
pub struct Proof {
    standing: Standing,
    /// Attempts so far: tells late answers of an earlier one.
    rounds: u64,
    /// Failures since the last success.
    failures: u32,
    /// That the source is gone was told.
    told_lost: bool,
    /// That reads failed was told, in this outage.
    told_failed: bool,
}

impl Proof {
    fn pause(&mut self) -> Duration {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        pause.min(LONGEST_PAUSE)
    }
}

impl Relocation {
    /// Whether a connection stands and the disk behind it is the right one.
    pub fn is_source_usable(&self) -> bool {
        self.source.is_connected() && matches!(lock(&self.proof).standing, Standing::Believed)
    }

    /// The source as it is believed now: what is asked of it from here on is [vouched](Self::vouched) for by
    /// that.
    pub(super) fn belief(&self) -> Option<u64> {
        let proof = lock(&self.proof);
        matches!(proof.standing, Standing::Believed).then_some(proof.rounds)
    }

    /// The answer to what was asked of the source as it was `believed` then, if it is believed still.
    /// Whoever asked may have been held up between the decision and the question for so long that
    /// another disk stood in the source's place.
    pub(super) fn vouched<T>(
        &self,
        believed: Option<u64>,
        outcome: Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        if believed.is_some() && believed == self.belief() {
            return outcome;
        }
        outcome
            .and_then(|_| {
                let why = "the source was lost while it was asked";
                Err(SourceError::new(SourceErrorKind::Disconnected, why))
            })
            .map_err(|error| SourceError {
                come: None,
                ..error
            })
    }

    /// Whether another disk answers in the source's place.
    pub fn is_source_refused(&self) -> bool {
        matches!(lock(&self.proof).standing, Standing::Refused { .. })
    }

    /// For how long the source has been away, while it is.
    pub fn source_down(&self) -> Option<Duration> {
        let lost_at = lock(&self.mover).lost_at()?;
        Some((self.clock)().saturating_sub(lost_at))
    }

    /// A connection stands (again): asks for the proof, or believes at once where there is nothing
    /// to ask.
    pub(super) fn source_came(self: &Arc<Self>) {
        let witnesses = if self.is_arriving() {
            lock(&self.witnesses).all()
        } else {
            Vec::new()
        };
        let mut actions = Vec::new();
        let number = {
            let mut proof = lock(&self.proof);
            proof.rounds += 1;
            if witnesses.is_empty() {
                self.believe(&mut proof, &mut actions);
            } else {
                proof.standing = Standing::Asking(Round {
                    number: proof.rounds,
                    outstanding: witnesses.len(),
                    agree: 0,
                    differ: 0,
                    unreadable: 0,
                    cut_off: 0,
                    differs_at: None,
                });
            }
            proof.rounds
        };
        self.carry_out(actions);
        for witness in witnesses {
            let this = Arc::clone(self);
            let done = move |outcome| this.testify(number, &witness, outcome);
            self.source
                .read(Lane::Demand, witness.offset, witness.len, Box::new(done));
        }
    }

    /// At the start, when nobody told yet. The lock is held while looking, so that news of its
    /// going away comes after.
    pub(super) fn look_for_source(self: &Arc<Self>) {
        let up = {
            let proof = lock(&self.proof);
            matches!(proof.standing, Standing::Away) && self.source.is_connected()
        };
        if up {
            self.source_came();
        }
    }

    /// The last connection is gone, for the reason given.
    pub(super) fn source_went(&self, error: &SourceError) {
        let mut proof = lock(&self.proof);
        proof.standing = Standing::Away;
        let known = std::mem::replace(&mut proof.told_lost, true);
        if error.kind == SourceErrorKind::Untrusted {
            // Its handshake tells already that it is another one: a disk of another size, say, or
            // one that was not handed over to this move. Where the disk has gone back to it, it has
            // begun to write, and this is the end.
            if !self.went_back() {
                self.event(EventKind::SourceRefused, error.to_string());
                self.count(|tally| &tally.source_refusals);
            }
        } else if !known {
            let text = format!("the source is gone: {error}; trying to reach it again");
            self.event(EventKind::SourceLost, text);
            self.count(|tally| &tally.source_losses);
        }
        // Under the lock: an answer of the proof that comes now must not turn it round.
        lock(&self.mover).source_down((self.clock)());
    }

    /// Looks again at a source that was refused, when it is time.
    pub(super) fn tick_proof(self: &Arc<Self>) {
        let due = match &lock(&self.proof).standing {
            Standing::Refused { again_at } => (self.clock)() >= *again_at,
            _ => false,
        };
        if due && self.source.is_connected() {
            self.source_came();
        }
    }

    /// One answer. On a thread of the source.
    fn testify(
        self: &Arc<Self>,
        number: u64,
        witness: &Witness,
        outcome: Result<Fetched, SourceError>,
    ) {
        let mut actions = Vec::new();
        {
            let mut proof = lock(&self.proof);
            let Standing::Asking(round) = &mut proof.standing else {
                return;
            };
            if round.number != number {
                return;
            }
            match outcome {
                Ok(fetched) => {
                    self.count_wire(&fetched);
                    if witness.agrees(&fetched.data) {
                        round.agree += 1;
                    } else {
                        round.differ += 1;
                        let at = round.differs_at.get_or_insert(witness.offset);
                        *at = witness.offset.min(*at);
                    }
                }
                Err(error) if error.kind == SourceErrorKind::Refused => round.unreadable += 1,
                Err(_) => round.cut_off += 1,
            }
            round.outstanding -= 1;
            if round.outstanding == 0 {
                self.judge(&mut proof, &mut actions);
            }
        }
        self.carry_out(actions);
    }

    /// Every witness has answered: one that differs is enough to refuse, a bad sector is not.
    fn judge(&self, proof: &mut Proof, actions: &mut Vec<Action<Reader>>) {
        let Standing::Asking(round) = std::mem::take(&mut proof.standing) else {
            return;
        };
        let asked = round.agree + round.differ + round.unreadable + round.cut_off;
        if round.differ == 0 && round.cut_off == 0 && round.agree > 0 {
            return self.believe(proof, actions);
        }
        let pause = proof.pause();
        proof.standing = Standing::Refused {
            again_at: (self.clock)() + pause,
        };
        if round.differ == 0 && round.cut_off > 0 {
            // One of several connections broke meanwhile; nothing is known.
            return;
        }
        let uri = self.source.info().uri;
        let why = match round.differs_at {
            Some(at) => format!(
                "{uri} serves another disk than the one this move began from: {} of {asked} blocks \
                 that came from there read differently now, the first at offset {at}; nothing is \
                 fetched from it; serve the right disk there again, as it was at the handoff",
                round.differ
            ),
            None => format!(
                "{uri} cannot read any of {asked} blocks that came from there before, so it is not \
                 known whether it is the same disk; nothing is fetched from it; see why it fails"
            ),
        };
        // Once: it is tried for as long as it takes.
        if proof.failures == 1 {
            self.event(EventKind::SourceRefused, why.clone());
            self.count(|tally| &tally.source_refusals);
        }
        *lock(&self.trouble) = Some(SourceError::new(SourceErrorKind::Untrusted, why));
    }

    /// The mover hears of it under the lock of the proof, so that it never hears of the source's
    /// coming and going in the wrong order.
    fn believe(&self, proof: &mut Proof, actions: &mut Vec<Action<Reader>>) {
        proof.standing = Standing::Believed;
        proof.failures = 0;
        proof.told_lost = false;
        proof.told_failed = false;
        *lock(&self.trouble) = None;
        self.event(EventKind::SourceBack, "the source is reachable");
        let mut mover = lock(&self.mover);
        mover.source_paces(self.source.speaks_frames());
        mover.source_up((self.clock)(), &self.residency, actions);
    }

    /// Reads fail by policy: told once an outage, counted always.
    pub(super) fn note_reads_failed(&self) {
        if self.retired.load(Ordering::Acquire) {
            return;
        }
        self.count(|tally| &tally.reads_failed);
        if !std::mem::replace(&mut lock(&self.proof).told_failed, true) {
            self.event(
                EventKind::ReadsFailed,
                "reads of what is not here fail: the source has been away for longer than \
                 --on-source-loss allows",
            );
        }
    }

    fn count(&self, counter: impl Fn(&Tally) -> &AtomicU64) {
        if let Some(volume) = self.volume.upgrade() {
            counter(&volume.tally).fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether the handoff is behind us.
    pub fn is_arriving(&self) -> bool {
        !lock(&self.mover).phase().passes_through()
    }
}
