//! The end of a world: trouble ends, and from then on everything must work.
//!
//! Every request is answered, the move completes, the image is what was written, and after a last
//! flush and a last power cut it still is.

use std::sync::{Arc, PoisonError};

use hikkoshi_daemon::config::HandoffPolicy;
use hikkoshi_daemon::registry::Controlled;
use hikkoshi_daemon::status::LifeState;
use hikkoshi_engine::geometry::ByteRange;

use crate::client::Ask;
use crate::disk::Ailing;
use crate::fiber::Wait;
use crate::plan::Trouble;
use crate::world::World;

/// Far more steps than the largest disk and the longest queue take.
const MAX_STEPS: u64 = 400_000;

/// The cap that is lifted and the copy that is resumed are looked after so often.
const LOOK_AFTER: u64 = 500;

/// Bytes of a request that fetches what the background does not.
const FETCH_BYTES: u64 = 64 << 10;

impl World {
    /// Ends the trouble, and sees the move through.
    pub fn finish(&mut self) -> Result<(), String> {
        self.sim.note("trouble ends", 0, 0);
        self.end_trouble();
        if self.is_ill() || self.draining {
            self.crash(false);
        }
        // A daemon that is being opened or stopped gets on with it, for better or worse.
        self.live_until("the volume never serves", Self::serves)?;
        self.finishing = true;
        if let Some(source) = self.source() {
            // What misled a connection may leave it waiting for bytes that never come.
            source.reset_all();
        }
        self.live_until("a request is never answered", |w| w.requests.is_empty())?;
        self.live_until("the move never completes", |w| w.complete)?;
        self.live_until("a request is never answered", |w| w.requests.is_empty())?;
        self.compare()
    }

    fn end_trouble(&mut self) {
        self.sim.set_trouble(Trouble::NONE);
        for place in [self.disk.ailing(), self.dir.ailing()] {
            *place.lock().unwrap_or_else(PoisonError::into_inner) = Ailing::default();
        }
        self.server.set_resized(false);
        self.server.set_older(false);
        self.server.be_silent(0);
        if !self.complete {
            self.server.set_up(true);
        }
    }

    /// Life goes on, without new requests of clients, until something is so.
    fn live_until(&mut self, never: &str, so: impl Fn(&Self) -> bool) -> Result<(), String> {
        let mut steps = 0;
        while !so(self) {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(format!("{never}: {}", self.where_it_stands()));
            }
            if steps % LOOK_AFTER == 1 && self.serves() {
                self.look_after(steps / LOOK_AFTER);
            }
            self.get_on()?;
        }
        Ok(())
    }

    /// One step in which only what must happen does.
    fn get_on(&mut self) -> Result<(), String> {
        self.tally.steps += 1;
        self.sim.pass(1);
        let ready = self.ready();
        if ready.is_empty() {
            self.progress += 1;
            let source = self.source();
            if let Some(source) = &source
                && self.sim.below(4) == 0
            {
                source.dial();
            }
            if !source.is_some_and(|source| source.converse()) {
                self.sleep();
            }
            self.go_on_closing();
        } else {
            let n = self.choose_fiber(ready);
            self.resume(n)?;
        }
        self.look()
    }

    /// Nobody can do anything: until the next one wakes.
    pub fn sleep(&mut self) {
        let now = self.sim.now_us();
        let wakes = |f: &crate::fiber::Fiber| match f.wait {
            Wait::Until(us) => Some(us),
            _ => None,
        };
        let next = self.fibers.iter().filter_map(wakes).min();
        self.sim
            .pass(next.map_or(20_000, |us| us.saturating_sub(now)).max(1));
    }

    /// Does what a person would: the handoff, the copy resumed, its cap lifted; and reads what
    /// nobody copies.
    fn look_after(&mut self, round: u64) {
        let Some(volume) = self.process.as_ref().and_then(|p| p.volume.clone()) else {
            return;
        };
        if self.complete || !self.finishing {
            return;
        }
        if volume.life() == LifeState::Standby {
            self.hand_off();
            return;
        }
        let steered = Arc::clone(&volume);
        self.sim.spawn(
            "control",
            Box::new(move || {
                // Refused only where there is no source any more.
                let _ = steered.resume();
                let _ = steered.set_limit(None);
            }),
        );
        let background = self
            .plan
            .config
            .source
            .as_ref()
            .is_some_and(|s| s.background && s.handoff != HandoffPolicy::Command);
        if !background || round > 4 {
            let size = self.plan.geometry.size_bytes();
            let mut at = 0;
            while at < size && self.requests.len() < 32 {
                let bytes = ByteRange {
                    start: at,
                    end: (at + FETCH_BYTES).min(size),
                };
                let fetched = round.is_multiple_of(2);
                self.ask(
                    0,
                    if fetched {
                        Ask::Cache(bytes)
                    } else {
                        Ask::Read(bytes)
                    },
                    false,
                );
                at = bytes.end;
            }
        }
    }

    /// A last flush, a last power cut, and every byte.
    fn compare(&mut self) -> Result<(), String> {
        let image = self.disk.inner().content();
        let now = self.tick();
        self.oracle.found(&image, false, now)?;
        if !self.is_ill() {
            self.ask(0, Ask::Flush, true);
            self.live_until("the last flush is never answered", |w| {
                w.requests.is_empty()
            })?;
        }
        self.finishing = false;
        self.crash(true);
        self.live_until("the volume never serves again", Self::serves)?;
        if !self.complete {
            return Err("the move was complete, and is not any more".into());
        }
        let size = self.plan.geometry.size_bytes();
        self.ask(0, Ask::Read(ByteRange::at(0, size)), true);
        self.live_until("the last read is never answered", |w| w.requests.is_empty())
    }

    /// For the message when something never happens.
    fn where_it_stands(&self) -> String {
        let names: Vec<&str> = self.fibers.iter().map(|f| f.name).collect();
        let volume = self.process.as_ref().and_then(|p| p.volume.as_ref());
        let missing = volume
            .and_then(|v| v.relocation())
            .map_or(0, |r| r.residency.missing_blocks());
        format!(
            "{} requests wait, {missing} blocks are missing, the source is {}connected, flows of \
             control: {}",
            self.requests.len(),
            if self.source().is_some_and(|s| {
                use hikkoshi_wan::Source;
                s.is_connected()
            }) {
                ""
            } else {
                "not "
            },
            names.join(" ")
        )
    }
}
