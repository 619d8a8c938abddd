//! What is promised in a world of two sites, and its end.

use std::sync::{Arc, PoisonError};

use hikkoshi_daemon::registry::Controlled;
use hikkoshi_daemon::status::LifeState;
use hikkoshi_daemon::volume::Volume;
use hikkoshi_engine::geometry::{BlockIndex, BlockRange, ByteRange};

use crate::client::{Answer, Ask};
use crate::plan::{SECTOR, Trouble};

use super::events::sectors;
use super::opening::Stage;
use super::side::Side;
use super::{A, B, PairWorld, Request, index};

/// EPERM.
const REFUSED: i32 = 1;

/// Far more steps than the largest disk takes.
const MAX_STEPS: u64 = 300_000;

/// The handoff is commanded so often until it succeeds.
const HANDOFFS: u32 = 10;

/// A process that is to tell of a return that was given up is started so often.
const STARTS: u32 = 10;

/// The whole disk is read so often until all of it is here, and so much later each time.
const READINGS: u32 = 20;
const READ_AFTER_US: u64 = 500_000;

impl PairWorld {
    /// Never may both sites accept writes; and whoever does has the disk.
    pub fn look_at_writers(&mut self) -> Result<(), String> {
        let accepts = [A, B].map(|site| self.accepts(site));
        if accepts == [true, true] {
            return Err("both sites accept writes".into());
        }
        let other = self.other();
        if accepts[other] {
            self.take_over()?;
        }
        let has_given_up = |v: &Arc<Volume>| v.has_given_up();
        if self.moving && self.volume(other).is_some_and(has_given_up) {
            self.is_given_up();
        }
        Ok(())
    }

    /// The disk does not come back into what is there.
    fn is_refused(&mut self, site: usize) {
        self.sims[site].note("is refused", 0, 0);
        self.tally.refused += 1;
        self.given_up = true;
        self.comes_back[site] = None;
    }

    fn is_given_up(&mut self) {
        if !self.given_up {
            self.tally.given_up += 1;
        }
        self.given_up = true;
        self.comes_back[self.other()] = None;
    }

    /// The other site has the disk from here on.
    fn take_over(&mut self) -> Result<(), String> {
        if !self.moving || self.given_up {
            return Err("a site takes writes to which the disk does not move".into());
        }
        self.sims[self.other()].note("takes over", self.now, 0);
        // Where it was down at that moment, it was fenced before.
        self.old_copy = self.sides[self.owner].was_whole();
        if self.returning && self.old_copy {
            self.tally.late_takeovers += 1;
        } else if self.returning {
            self.tally.early_takeovers += 1;
        }
        self.forsake_reads();
        self.tally.handoffs += 1;
        self.owner = self.other();
        self.moving = false;
        self.comes_back[self.owner] = None;
        // What has waited here for that writes from now on, and may have written a piece by the time at which the disk moves on.
        let site = self.owner;
        let here = self.requests.values_mut().filter(|r| r.site == site);
        here.for_each(|request| request.elsewhere = false);
        Ok(())
    }

    /// Where the disk goes back before all of it was there, whoever reads there still may wait until all
    /// of it is at the new site, for what is nowhere else any more.
    fn forsake_reads(&mut self) {
        let site = self.owner;
        if self.old_copy {
            return;
        }
        let waits = |r: &Request| r.site == site && matches!(r.ask, Ask::Read(_));
        let waiting = self.requests.iter().filter(|(_, r)| waits(r));
        self.forsaken.extend(waiting.map(|(id, _)| *id));
        self.requests.retain(|_, r| !waits(r));
        self.set_oldest_read();
    }

    // Openings

    pub fn look_at_stage(&mut self, site: usize) -> Result<(), String> {
        let stage = {
            let stage = Arc::clone(&self.sides[site].stage);
            let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
            match &*stage {
                Stage::Opening | Stage::Known => return Ok(()),
                _ => std::mem::replace(&mut *stage, Stage::Known),
            }
        };
        match stage {
            Stage::Opened(volume) => {
                if self.comes_back[site].is_some() && volume.has_departed() {
                    // A power cut has taken away that it was whole.
                    self.is_refused(site);
                }
                self.sides[site].volume = Some(Arc::clone(&volume));
                let had_it = site == self.owner;
                self.look_at_writers()?;
                self.check_opened(site, &volume, had_it)?;
                self.sides[site].serve(&volume);
                self.net.serve(site, Some(volume));
                Ok(())
            }
            Stage::GivenUp if site == self.owner => {
                Err("a move that was taken over is given up".into())
            }
            Stage::GivenUp => {
                self.sides[site].rests = true;
                self.is_given_up();
                Ok(())
            }
            Stage::Spoilt | Stage::Refused if site == self.owner => {
                Err("the disk is taken for an old copy".into())
            }
            Stage::Spoilt => {
                self.sides[site].rests = true;
                Ok(())
            }
            Stage::Refused => {
                self.is_refused(site);
                self.restart(site, false);
                Ok(())
            }
            Stage::Closed => {
                self.restart(site, false);
                Ok(())
            }
            Stage::Failed(why) => Err(format!("its own state was refused: {why}")),
            Stage::Opening | Stage::Known => Ok(()),
        }
    }

    /// Holds what a restart finds against what was promised.
    fn check_opened(
        &mut self,
        site: usize,
        volume: &Arc<Volume>,
        had_it: bool,
    ) -> Result<(), String> {
        let standby = volume.life() == LifeState::Standby;
        let has_gone = !self.moving && volume.has_departed();
        if site == self.owner && (standby || has_gone) {
            return Err("a handoff that was answered is forgotten".into());
        }
        if site != self.owner && standby && self.given_up {
            return Err("a move that was given up goes on".into());
        }
        let Some(power) = self.unsettled[site].take() else {
            return Ok(());
        };
        if site != self.owner {
            return Ok(());
        }
        let now = self.tick();
        // A fence is not closed, and no disk taken over, before all that was answered is durable.
        let power = power && had_it && !volume.has_departed();
        let found = self.peek(site, volume);
        self.oracle.found(&found, power, now)?;
        if power {
            self.begin_again();
        }
        Ok(())
    }

    /// What waits at the other site for the handoff is under way still. What was under way there when it
    /// lost the disk happened before that or not at all: it was found, whatever its answer is.
    fn begin_again(&mut self) {
        let now = self.tick();
        for request in self.requests.values_mut() {
            request.unchecked |= !request.elsewhere;
        }
        let write_of = |ask: &Ask| match ask {
            Ask::Write(offset, data, _) => Some((*offset, data.clone())),
            _ => None,
        };
        let requests = self.requests.iter();
        let writes: Vec<_> = requests
            .filter(|(_, request)| request.elsewhere)
            .filter_map(|(id, request)| Some((*id, write_of(&request.ask)?)))
            .collect();
        for (id, (offset, data)) in writes {
            self.begin(id, offset, &data, now);
        }
    }

    /// What a guest would read of everything, without asking the volume.
    fn peek(&self, site: usize, volume: &Volume) -> Vec<u8> {
        let mut seen = self.sides[site].disk.inner().content();
        let Some(relocation) = volume.relocation() else {
            return seen;
        };
        let there = self.sides[1 - site].disk.inner().content();
        let geometry = self.plan.geometry;
        for block in (0..geometry.blocks()).map(BlockIndex) {
            if relocation.residency.state(block).is_resident() {
                continue;
            }
            let mask = relocation.residency.partial_mask(block);
            let start = index(geometry.bytes(BlockRange::one(block)).start);
            for sector in 0..geometry.sectors_in(block) {
                if !mask.as_ref().is_some_and(|m| m.has(sector)) {
                    let at = start + index(sector.into()) * SECTOR;
                    seen[at..at + SECTOR].copy_from_slice(&there[at..at + SECTOR]);
                }
            }
        }
        seen
    }

    // Answers

    pub fn answered(&mut self, id: u64, answer: Answer) -> Result<(), String> {
        let now = self.tick();
        if self.forsaken.remove(&id) {
            return Ok(());
        }
        let Some(request) = self.requests.remove(&id) else {
            return Err(format!("request {id} was answered twice"));
        };
        self.tally.answered += 1;
        match (&request.ask, answer) {
            (Ask::Read(_) | Ask::Write(..), _) if request.unchecked => {}
            (_, Answer::Failed(errno)) => {
                self.tally.failed += 1;
                if request.must_succeed {
                    return Err(format!(
                        "a request failed ({errno:?}) when nothing was wrong"
                    ));
                }
                if let Ask::Write(offset, data, _) = &request.ask {
                    // Not even its first piece: there was nothing that it could be written to.
                    let refused = errno == Some(REFUSED) && request.site != self.owner;
                    for sector in sectors(*offset, data.len()) {
                        if refused && request.elsewhere {
                            self.oracle.refused(sector, id);
                        } else {
                            self.oracle.uncertain(sector, id, now);
                        }
                    }
                }
            }
            (Ask::Read(bytes), Answer::Data(data)) => {
                let seen = data.chunks_exact(SECTOR);
                for (sector, seen) in sectors(bytes.start, data.len()).zip(seen) {
                    self.oracle
                        .read(sector, 0, seen, request.began, now)
                        .map_err(|e| format!("request {id}: {e}"))?;
                }
            }
            (Ask::Write(offset, data, fua), Answer::Done) => {
                for sector in sectors(*offset, data.len()) {
                    self.oracle.written(sector, id, *fua, now);
                }
            }
            // One at a destination that stands by is passed on to the source.
            (Ask::Flush, Answer::Done) => self.oracle.flushed(request.began),
            _ => return Err(format!("request {id} was answered with something else")),
        }
        self.set_oldest_read();
        Ok(())
    }

    // The end

    /// Life goes on, without new requests, until something is so.
    pub fn live_until(&mut self, never: &str, so: impl Fn(&Self) -> bool) -> Result<(), String> {
        let mut steps = 0;
        while !so(self) {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(format!("{never}: {}", self.where_it_stands()));
            }
            self.pass(1);
            self.get_on()?;
            self.follow();
        }
        Ok(())
    }

    /// For the message when something never happens.
    fn where_it_stands(&self) -> String {
        let site = |n: usize| {
            let side: &Side = &self.sides[n];
            let names: Vec<&str> = side.fibers.iter().map(|f| f.name).collect();
            // Not by what takes locks: a flow of control that has its turn no more may hold them.
            let stands = side.volume.as_ref().map(|v| (v.life(), v.has_departed()));
            format!("{stands:?} ({})", names.join(" "))
        };
        format!(
            "{} requests wait, the VM is at {}, the disk at {}; {} and {}",
            self.requests.len(),
            self.at,
            self.owner,
            site(A),
            site(B)
        )
    }

    /// Trouble ends: the VM goes on, by what the status names, and finds its disk.
    pub fn finish(&mut self) -> Result<(), String> {
        for sim in &self.sims {
            sim.note("trouble ends", 0, 0);
            sim.set_trouble(Trouble::NONE);
        }
        self.net.set_up(true);
        self.live_until("a site never serves", |w| {
            w.all_stand() || w.given_up && !w.returning && w.volume(w.owner).is_some()
        })?;
        self.live_until("a command never ends", |w| {
            Arc::strong_count(&w.controls) == 1
        })?;
        self.lift_limits();
        self.live_until("a command never ends", |w| {
            Arc::strong_count(&w.commands) == 1
        })?;
        for _ in 0..HANDOFFS {
            // Where a source that is away is not waited for, it may be told soon that it is.
            if self.standby().is_some() {
                self.hand_off();
                self.live_until("the handoff never ends", |w| {
                    Arc::strong_count(&w.commands) == 1
                })?;
            }
        }
        if self.standby().is_some() {
            return Err("the handoff fails although nothing is wrong".into());
        }
        self.live_until("a request is never answered", |w| w.requests.is_empty())?;
        for _ in 0..STARTS {
            if self.is_unheard() {
                self.restart(self.other(), false);
                self.live_until("a site never serves", Self::all_stand)?;
            }
        }
        // What is on its way still may close a fence, and is followed by what opens it again.
        self.live_until("the source never hears that the move was given up", |w| {
            let hears = |side: &Side| side.fibers.iter().any(|f| f.name == "hears");
            let told = !w.given_up || w.was_given_up();
            told && w.accepts(w.owner) && !w.sides.iter().any(hears)
        })?;
        self.follow();
        self.leaves = false;
        self.see_it_through()
    }

    /// What people have paused and capped.
    fn lift_limits(&mut self) {
        for site in [A, B] {
            if let Some(volume) = self.volume(site).cloned() {
                let resumed = move || drop((volume.resume(), volume.set_limit(None)));
                self.sims[site].spawn("control", Box::new(resumed));
            }
        }
    }

    fn see_it_through(&mut self) -> Result<(), String> {
        let size = self.plan.geometry.size_bytes();
        let at = self.owner;
        let write = self.write(ByteRange::at(0, SECTOR as u64));
        self.ask(at, write, true);
        self.live_until("the last write is never answered", |w| {
            w.requests.is_empty()
        })?;
        let is_here = |w: &Self| w.volume(at).is_some_and(|v| v.is_local());
        for _ in 0..READINGS {
            // What nobody copies is read; one that is told soon that the source is away, once more.
            self.ask(at, Ask::Read(ByteRange::at(0, size)), false);
            self.live_until("a read is never answered", |w| w.requests.is_empty())?;
            if is_here(self) {
                break;
            }
            let later = self.sims[A].now_us() + READ_AFTER_US;
            self.live_until("time never passes", |w| w.sims[A].now_us() >= later)?;
        }
        self.live_until("the move never completes", is_here)?;
        self.ask(at, Ask::Flush, true);
        self.live_until("the last flush is never answered", |w| {
            w.requests.is_empty()
        })?;
        self.crash(at, true);
        self.live_until("it never serves again", |w| w.volume(at).is_some())?;
        self.ask(at, Ask::Read(ByteRange::at(0, size)), true);
        self.live_until("the last read is never answered", |w| w.requests.is_empty())
    }
}
