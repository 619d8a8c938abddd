//! What happens in a world of two sites: the VM asks, and moves; people give moves up and begin them
//! anew; somebody pulls plugs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hikkoshi_daemon::config::HandoffPolicy;
use hikkoshi_daemon::registry::Controlled;
use hikkoshi_daemon::volume::Volume;
use hikkoshi_engine::geometry::ByteRange;

use crate::client::{self, Ask};
use crate::fiber::{self, Fiber, Wait};
use crate::oracle::{NEVER, Time};
use crate::plan::SECTOR;
use crate::world::sector_of;

use super::side::Side;
use super::{PairWorld, Request, index};

/// Requests of guests that are under way at once.
const DEPTH: usize = 4;

/// Moves of a world that are begun at most.
const MAX_MOVES: u8 = 6;

/// Somebody looks so often whether the source has heard, in microseconds.
const LOOK_AFTER_US: u64 = 50_000;

impl PairWorld {
    /// One of the things that can happen now.
    pub fn happen(&mut self) {
        let t = self.sims[0].trouble();
        let serves = self.volume(self.at).is_some();
        let room = self.requests.len() < DEPTH && !self.leaves;
        let standby = self.standby().is_some();
        let is_owner = self.at == self.owner;
        let by_command = self.policy == HandoffPolicy::Command;
        let when = |yes: bool, weight: u64| if yes { weight } else { 0 };
        // A disk that may come back mostly does.
        let anew = if self.may_come_back { 4 } else { 20 };
        let may_command = standby && Arc::strong_count(&self.commands) == 1;
        let weights = [
            when(serves && room && self.may_ask(), 350),
            // A VM that moves does not wait: what it wrote last is to be told of at the handoff.
            if self.leaves { 8 } else { 80 },
            when(is_owner && standby, 8),
            when(may_command, 1),
            // Mostly by a script that has brought the VM there, and now and then by mistake.
            when(may_command, if by_command && !is_owner { 30 } else { 1 }),
            when(standby && is_owner && room, 15),
            when(self.may_begin_anew() && self.moves < MAX_MOVES, anew),
            when(standby, t.control),
            t.kill,
            t.power_cut,
            t.reset,
            t.reset / 3,
            when(self.may_return() && self.moves < MAX_MOVES, 30),
            when(self.is_unheard(), 20),
            when(self.may_come_back && self.may_tamper(), 6),
            t.close,
        ];
        let mut n = self.below(weights.iter().sum());
        let mut event = 0;
        while n >= weights[event] {
            n -= weights[event];
            event += 1;
        }
        let site = index(self.below(2));
        match event {
            0 => self.ask_something(),
            1 => {
                let us = self.sims[0].chance(|rng| rng.pick(&[100, 2000, 20_000, 300_000]));
                self.pass(1 + self.below(us));
            }
            2 => self.leaves = true,
            3 => self.give_up(),
            4 => self.hand_off(),
            5 => {
                // Somebody looks at the disk at the new site, where the VM does not run yet.
                let bytes = self.some_bytes();
                self.ask(self.other(), Ask::Read(bytes), false);
            }
            6 => self.begin_anew(),
            7 => self.control(),
            8 => self.crash(site, false),
            9 => self.crash(site, true),
            10 => {
                let up = self.net.is_up();
                self.net.set_up(up);
            }
            11 => {
                let up = !self.net.is_up();
                self.net.set_up(up);
            }
            12 => self.begin_return(),
            13 => self.restart(self.other(), false),
            14 => self.tamper(),
            _ => self.close(site),
        }
        self.follow();
    }

    /// The move was given up and the source knows, so that what is left of it may be removed: a
    /// request for the handoff may still be on its way there.
    pub fn was_given_up(&self) -> bool {
        let heard = self.sides[self.other()].has_told.load(Ordering::Acquire);
        self.given_up && heard
    }

    /// Whether all of the disk is where it is, and nobody has fenced it.
    fn is_whole(&self) -> bool {
        let is_whole = |v: &Arc<Volume>| v.is_local() && !v.has_departed();
        self.volume(self.owner).is_some_and(is_whole)
    }

    /// Whether nobody needs what is at the other site: the move there was given up, or all has come from
    /// there.
    fn may_begin_anew(&self) -> bool {
        if self.returning && self.moving {
            // There is the old copy, which may be needed.
            return self.was_given_up() && self.is_whole();
        }
        self.was_given_up() || !self.moving && self.is_whole()
    }

    /// Whether the other site has the old copy, and nobody brings the disk back into it yet.
    fn may_return(&self) -> bool {
        let has_old_copy = !self.moving && self.old_copy || self.returning && self.given_up;
        let now = self.volume(self.owner).is_some() && (self.is_whole() || !self.patient);
        self.may_come_back && has_old_copy && now && self.sides[self.other()].was_whole()
    }

    /// Whether a return was given up of which the source is told by nobody, before the next start.
    pub fn is_unheard(&self) -> bool {
        let side = &self.sides[self.other()];
        let tells = |f: &Fiber| ["abort", "open", "close"].contains(&f.name);
        self.given_up && self.returning && !self.was_given_up() && !side.fibers.iter().any(tells)
    }

    /// Whether nobody needs the old copy that is at the other site, and nobody is at it.
    fn may_tamper(&self) -> bool {
        self.is_whole() && (!self.moving || self.returning && self.was_given_up())
    }

    /// Somebody uses the old copy for something else.
    fn tamper(&mut self) {
        let site = self.other();
        let Ask::Write(offset, data, _) = self.write(self.some_bytes()) else {
            return;
        };
        self.sims[site].note("tampers", offset, data.len() as u64);
        self.sides[site].disk.tamper(offset, &data);
    }

    /// The process of a site is ended in good order, if nobody is at it, and begun again.
    fn close(&mut self, site: usize) {
        let asks = |r: &Request| r.site == site;
        if !self.sides[site].is_quiet() || self.requests.values().any(asks) {
            return;
        }
        self.sims[site].note("closes", self.now, site as u64);
        self.tally.closes += 1;
        self.net.serve(site, None);
        self.sides[site].close();
    }

    /// The process at the other site is ended, and begun so that the disk comes back into its old copy.
    fn begin_return(&mut self) {
        let site = self.other();
        self.moves += 1;
        self.given_up = false;
        self.moving = true;
        self.returning = true;
        let overwrite = self.below(2) == 0;
        self.comes_back[site] = Some(overwrite);
        self.tally.returns += 1;
        let early = !self.is_whole();
        self.sims[site].note("goes back", self.moves.into(), early.into());
        self.restart(site, false);
    }

    /// Whether the VM is where it may run.
    fn may_ask(&self) -> bool {
        self.at == self.owner || self.moving && !self.given_up
    }

    /// The VM goes where it is to run.
    pub fn follow(&mut self) {
        if !self.requests.is_empty() {
            return;
        }
        if self.leaves {
            self.leaves = false;
            if self.standby().is_some() {
                self.at = self.other();
            }
        }
        // The move was given up, or the handoff came by a command.
        if !self.may_ask() {
            self.at = self.owner;
        }
    }

    pub fn give_up(&mut self) {
        let Some(volume) = self.standby().cloned() else {
            return;
        };
        let site = self.other();
        self.sims[site].note("gives up", 0, 0);
        let command = Arc::clone(&self.commands);
        let (sim, has_told) = (
            Arc::clone(&self.sims[site]),
            Arc::clone(&self.sides[site].has_told),
        );
        let abort = move || {
            // Too late, or recorded: the volume says which.
            let _ = volume.abort();
            drop(command);
            while volume.has_given_up() && !volume.abort_was_heard() {
                fiber::pause(Wait::Until(sim.now_us() + LOOK_AFTER_US));
            }
            has_told.store(volume.has_given_up(), Ordering::Release);
        };
        self.sims[site].spawn("abort", Box::new(abort));
    }

    /// `hikkoshi handoff`.
    pub fn hand_off(&mut self) {
        let Some(volume) = self.standby().cloned() else {
            return;
        };
        let site = self.other();
        self.sims[site].note("hands off", 0, 0);
        let command = Arc::clone(&self.commands);
        let hand_off = move || {
            // Refused, or given up meanwhile: the volume says which.
            let _ = volume.hand_off();
            drop(command);
        };
        self.sims[site].spawn("handoff", Box::new(hand_off));
    }

    /// Another image and another state at the other site: the same move once more, or the next one back.
    fn begin_anew(&mut self) {
        let site = self.other();
        self.moves += 1;
        self.given_up = false;
        self.moving = true;
        self.returning = false;
        self.comes_back[site] = None;
        self.unsettled[site] = None;
        let now = self.tick();
        self.sides[site].crash(false);
        self.net.serve(site, None);
        self.end_requests(site, false, now);
        self.sims[site].note("begins anew", self.moves.into(), 0);
        let way_back = self.plan.config.source.as_ref().is_some_and(|s| s.way_back);
        let (sim, geometry) = (&self.sims[site], self.plan.geometry);
        self.sides[site] = Side::new(sim, geometry, self.moves, true, way_back);
        self.start(site);
    }

    fn control(&mut self) {
        let Some(volume) = self.standby().cloned() else {
            return;
        };
        let what = self.below(4);
        let rate = 1 + self.below(2000 << 10);
        let command = Arc::clone(&self.controls);
        let control = move || {
            // Refused only where there is no source any more.
            let _ = match what {
                0 => volume.pause(),
                1 => volume.set_limit(Some(rate)),
                2 => volume.set_limit(None),
                _ => volume.resume(),
            };
            drop(command);
        };
        self.sims[self.other()].spawn("control", Box::new(control));
    }

    /// The process of a site ends, or with `power` its machine.
    pub fn crash(&mut self, site: usize, power: bool) {
        let what = if power { "power cut" } else { "kill" };
        self.sims[site].note(what, self.now, site as u64);
        if power {
            self.tally.power_cuts += 1;
        } else {
            self.tally.kills += 1;
        }
        self.restart(site, power);
    }

    /// The same, whoever wanted it.
    pub fn restart(&mut self, site: usize, power: bool) {
        let now = self.tick();
        self.sides[site].crash(power);
        self.net.serve(site, None);
        self.end_requests(site, power, now);
        self.unsettled[site] = Some(power || self.unsettled[site] == Some(true));
        self.start(site);
    }

    // Requests

    /// Whoever served a site is gone.
    fn end_requests(&mut self, site: usize, power: bool, now: Time) {
        // What was under way here may have happened or not.
        for (id, request) in &mut self.requests {
            match &request.ask {
                Ask::Write(offset, data, _) if request.site == site => {
                    for sector in sectors(*offset, data.len()) {
                        self.oracle.uncertain(sector, *id, now);
                    }
                }
                // What passes by to this site was read before the crash, or will be after it.
                Ask::Read(_) if power => request.unchecked = true,
                _ => {}
            }
        }
        self.requests.retain(|_, request| request.site != site);
        self.set_oldest_read();
    }

    fn some_bytes(&self) -> ByteRange {
        let sectors = self.plan.geometry.size_bytes() / SECTOR as u64;
        let hot = self.plan.hot.min(sectors);
        let among = if self.below(2) == 0 { hot } else { sectors };
        let first = self.below(among);
        let count = (1 + self.below(self.plan.longest)).min(sectors - first);
        ByteRange::at(first * SECTOR as u64, count * SECTOR as u64)
    }

    fn ask_something(&mut self) {
        let bytes = self.some_bytes();
        let ask = match self.below(10) {
            0..=2 => Ask::Read(bytes),
            3 => Ask::Flush,
            _ => self.write(bytes),
        };
        self.ask(self.at, ask, false);
    }

    /// A write of what nobody else writes.
    pub fn write(&self, bytes: ByteRange) -> Ask {
        let mut data = Vec::new();
        while (data.len() as u64) < bytes.len() {
            data.extend_from_slice(&sector_of(self.sims[0].chance(|rng| rng.any()) | 1));
        }
        Ask::Write(bytes.start, data, self.below(8) == 0)
    }

    /// A guest asks at a site.
    pub fn ask(&mut self, site: usize, ask: Ask, must_succeed: bool) {
        let Some(volume) = self.volume(site).cloned() else {
            return;
        };
        let id = self.next_id;
        self.next_id += 1;
        let began = self.tick();
        if let Ask::Write(offset, data, _) = &ask {
            self.begin(id, *offset, data, began);
        }
        self.sims[site].note("asks", id, site as u64);
        self.requests.insert(
            id,
            Request {
                ask: ask.clone(),
                site,
                began,
                must_succeed,
                elsewhere: site != self.owner,
                unchecked: false,
            },
        );
        self.set_oldest_read();
        let sim = Arc::clone(&self.sims[site]);
        let serve = move || {
            let relocation = volume.relocation().filter(|_| !volume.is_plain());
            client::serve(id, ask, volume, relocation.as_ref(), sim);
        };
        self.sims[site].spawn("client", Box::new(serve));
    }

    /// The oracle knows of a write from here on.
    pub fn begin(&mut self, id: u64, offset: u64, data: &[u8], now: Time) {
        let whole = data.chunks_exact(SECTOR);
        for (sector, bytes) in sectors(offset, data.len()).zip(whole) {
            let value = bytes.try_into().expect("a whole sector");
            self.oracle.begin(sector, id, Arc::new(value), now);
        }
    }

    pub fn set_oldest_read(&mut self) {
        let oldest = self.requests.values().map(|r| r.began).min();
        self.oracle.set_oldest_read(oldest.unwrap_or(NEVER));
    }
}

/// The sectors of bytes.
pub fn sectors(offset: u64, len: usize) -> std::ops::Range<usize> {
    let first = index(offset) / SECTOR;
    first..first + len / SECTOR
}
