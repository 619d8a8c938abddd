//! What happens in a world beside the going on of its fibers.

use std::sync::{Arc, PoisonError};

use hikkoshi_daemon::config::HandoffPolicy;
use hikkoshi_daemon::registry::Controlled;
use hikkoshi_daemon::status::LifeState;

use crate::disk::Ailing;
use crate::process::{self, Stage};
use crate::world::{World, sector_of};

/// How often things happen, beside the trouble that the plan brings.
const ASK: u64 = 350;
const CONVERSE: u64 = 350;
const TIME: u64 = 80;
const DIAL: u64 = 25;
const ELSEWHERE: u64 = 15;
const HANDOFF: u64 = 3;
/// A process that can do nothing durable any more is ended sooner or later.
const END_ILL: u64 = 15;

#[derive(Clone, Copy, Debug)]
enum Event {
    Ask,
    Converse,
    Time,
    Dial,
    Elsewhere,
    Handoff,
    Kill,
    PowerCut,
    Close,
    Full,
    Bad,
    Reset,
    Down,
    Stall,
    Control,
    Resize,
    Older,
}

impl World {
    /// Something happens.
    pub fn happen(&mut self) -> Result<(), String> {
        let t = self.sim.trouble();
        let serves = self.serves();
        let when = |yes: bool, weight: u64| if yes { weight } else { 0 };
        let source = self.source().is_some();
        let wanted = serves && !self.draining && self.requests.len() < self.room();
        let moving = source && !self.complete;
        let table = [
            (Event::Ask, when(wanted, ASK)),
            (Event::Converse, when(source, CONVERSE)),
            (Event::Time, TIME),
            (Event::Dial, when(moving, DIAL)),
            (Event::Elsewhere, when(!self.touched, ELSEWHERE)),
            (Event::Handoff, when(serves && !self.handed_off, HANDOFF)),
            (
                Event::Kill,
                t.kill + when(self.is_ill() && !self.finishing, END_ILL),
            ),
            (Event::PowerCut, t.power_cut),
            (Event::Close, when(serves, t.close)),
            (Event::Full, t.full),
            (Event::Bad, t.bad_range),
            (Event::Reset, when(moving, t.reset)),
            (Event::Down, when(moving, t.reset / 3)),
            (Event::Stall, when(moving, t.stall)),
            (Event::Control, when(serves && moving, t.control)),
            (Event::Resize, when(moving, t.resize)),
            (Event::Older, when(moving && self.touched, t.older)),
        ];
        let total = table.iter().map(|(_, weight)| weight).sum();
        let mut n = self.sim.below(total);
        for (event, weight) in table {
            if n < weight {
                return self.play_event(event);
            }
            n -= weight;
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.plan.clients * self.plan.depth
    }

    fn play_event(&mut self, event: Event) -> Result<(), String> {
        let sim = Arc::clone(&self.sim);
        match event {
            Event::Ask => self.ask_something(),
            Event::Converse => {
                if let Some(source) = self.source() {
                    source.converse();
                }
            }
            Event::Time => {
                let us = sim.chance(|rng| rng.pick(&[100, 2000, 20_000, 20_000, 100_000]));
                sim.pass(1 + sim.below(us));
                if sim.below(40) == 0 {
                    sim.pass(3_000_000);
                }
            }
            Event::Dial => {
                if let Some(source) = self.source() {
                    source.dial();
                }
            }
            Event::Elsewhere => self.write_at_source(),
            Event::Handoff => self.hand_off(),
            Event::Kill => self.crash(false),
            Event::PowerCut => self.crash(true),
            Event::Close => self.draining = true,
            Event::Full => self.ail(|a, now, len| a.full_until_us = now + len),
            Event::Bad => {
                let size = self.plan.geometry.size_bytes();
                let start = sim.below(size);
                let end = start + sim.below(size / 4) + 1;
                self.ail(|a, now, len| a.bad = Some((start..end, now + len)));
            }
            Event::Reset => {
                if let Some(source) = self.source() {
                    sim.note("reset", 0, 0);
                    source.reset(sim.chance(|rng| rng.index(3)));
                }
            }
            Event::Down => {
                let up = !self.server.is_up();
                sim.note("server up", u64::from(up), 0);
                self.server.set_up(up);
                if let Some(source) = self.source().filter(|_| !up) {
                    source.reset_all();
                }
            }
            Event::Stall => {
                let us = sim.below(5_000_000);
                self.server.be_silent(sim.now_us() + us);
            }
            Event::Control => self.control(),
            Event::Resize => {
                let resized = sim.below(2) == 0;
                sim.note("resized", u64::from(resized), 0);
                self.server.set_resized(resized);
            }
            Event::Older => self.come_back_older(),
        }
        self.go_on_closing();
        Ok(())
    }

    /// The server is started again over an older image, or over the right one.
    fn come_back_older(&self) {
        let older = self.sim.below(2) == 0;
        self.sim.note("older", u64::from(older), 0);
        self.server.set_older(older);
        if let Some(source) = self.source() {
            source.reset_all();
        }
    }

    /// A medium ails for a while: that of the image, that of the state, or both.
    fn ail(&mut self, change: impl Fn(&mut Ailing, u64, u64)) {
        let (now, len) = (self.sim.now_us(), self.sim.below(3_000_000));
        let which = self.sim.below(3);
        self.sim.note("ails", which, len);
        for (n, place) in [self.disk.ailing(), self.dir.ailing()]
            .into_iter()
            .enumerate()
        {
            if which != n as u64 {
                let mut ailing = place.lock().unwrap_or_else(PoisonError::into_inner);
                change(&mut ailing, now, len);
            }
        }
    }

    /// The VM still runs at the source, and writes there.
    fn write_at_source(&mut self) {
        let sectors = self.plan.geometry.size_bytes() / 512;
        let first = self.sim.below(sectors);
        let count = (1 + self.sim.below(16)).min(sectors - first);
        let now = self.tick();
        self.sim.note("elsewhere", first, count);
        for sector in first..first + count {
            let n = usize::try_from(sector).unwrap_or(0);
            let value = sector_of(self.sim.chance(|rng| rng.any()));
            self.server.write(n * 512, &value, now);
            self.oracle.changed_elsewhere(n, Arc::new(value), now);
        }
    }

    /// Somebody says that the VM runs here now.
    pub fn hand_off(&mut self) {
        let Some(volume) = self.process.as_ref().and_then(|p| p.volume.clone()) else {
            return;
        };
        self.touched = true;
        self.sim.note("handoff", 0, 0);
        let sim = Arc::clone(&self.sim);
        self.sim.spawn(
            "handoff",
            Box::new(move || {
                let done = volume.handoff().is_ok();
                sim.tell(crate::sim::News::HandedOff(done));
            }),
        );
    }

    /// Somebody steers the background copy.
    fn control(&mut self) {
        let Some(volume) = self.process.as_ref().and_then(|p| p.volume.clone()) else {
            return;
        };
        let what = self.sim.below(4);
        let rate = self.sim.chance(|rng| rng.within(10, 4000)) << 10;
        self.sim.note("control", what, rate);
        self.sim.spawn(
            "control",
            Box::new(move || {
                // Refused only where there is no source any more.
                let _ = match what {
                    0 => volume.pause(),
                    1 => volume.resume(),
                    2 => volume.set_limit(Some(rate)),
                    _ => volume.set_limit(None),
                };
                let _ = volume.status();
            }),
        );
    }

    /// Once the clients are gone, the daemon is stopped; once its threads are, it ends.
    pub fn go_on_closing(&mut self) {
        if self.draining && self.requests.is_empty() && self.serves() {
            self.draining = false;
            self.close();
        }
        let Some(process) = &self.process else { return };
        if process::is(&process.stage, |s| matches!(s, Stage::Closing)) {
            let ended = !self
                .fibers
                .iter()
                .any(|f| matches!(f.name, "commit" | "tick"));
            if ended {
                process::set(&process.stage, Stage::Stopped);
            }
        }
    }

    /// Whether a write is refused by order now.
    pub fn refuses_writes(&self) -> bool {
        let by_command = self
            .plan
            .config
            .source
            .as_ref()
            .is_some_and(|s| s.handoff == HandoffPolicy::Command);
        let standby = self
            .process
            .as_ref()
            .and_then(|p| p.volume.as_ref())
            .is_some_and(|v| v.life() == LifeState::Standby);
        by_command && standby
    }
}
