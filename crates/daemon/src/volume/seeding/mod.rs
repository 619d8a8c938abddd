//! Blocks of the disk that are at this site already: in an old copy of it, or in a template.
//!
//! Owns the seed images of a volume and how looking through them stands. After the handoff a thread
//! of its own asks the source for hashes, ahead of the background copy, and installs what has the
//! same hash at the same offset of a seed (`run`), or anywhere in one, as an index tells (`index`,
//! made by `indexing`); the rest is fetched as ever. Nothing of it is durable: after a restart what
//! is still absent is looked for anew.

mod elsewhere;
#[cfg(test)]
mod elsewhere_tests;
mod image;
mod index;
mod indexing;
mod run;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use hikkoshi_engine::seeding::Why;

use super::{Volume, lock};
use crate::events::EventKind;
use crate::status::LifeState;
pub use image::SeedImage;
use indexing::Index;
use run::Run;

/// The seed images of a volume.
#[derive(Debug)]
pub(super) struct Seeding {
    images: OnceLock<Vec<SeedImage>>,
    always: bool,
    stage: Mutex<Stage>,
    index: Index,
    /// Of what was found: at another offset.
    elsewhere_bytes: AtomicU64,
}

/// How it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Nothing can be asked yet.
    #[default]
    Waiting,
    Looking,
    /// For the reason given; it is tried again.
    Resting(String),
    Ended,
}

impl Seeding {
    pub fn new(always: bool) -> Self {
        Self {
            images: OnceLock::new(),
            always,
            stage: Mutex::default(),
            index: Index::default(),
            elsewhere_bytes: AtomicU64::new(0),
        }
    }

    fn images(&self) -> &[SeedImage] {
        self.images.get().map_or(&[], Vec::as_slice)
    }
}

impl Volume {
    /// Has these images looked through, by whoever calls [`Volume::run_seeding`]. Once, before
    /// anything is fetched.
    pub fn seed_from(&self, images: Vec<SeedImage>) {
        if let Some(relocation) = self.relocation()
            && !images.is_empty()
            && self.seeding.images.set(images).is_ok()
        {
            relocation.with_mover_at(|m, now| m.expect_seeds(now));
        }
    }

    /// Whether there are images to look through.
    pub fn has_seeds(&self) -> bool {
        !self.seeding.images().is_empty()
    }

    /// The loop of the thread that looks through the seeds; returns when there is nothing left to
    /// look for, or `stop` says so.
    pub fn run_seeding(&self, stop: &AtomicBool) {
        let Some(relocation) = self.relocation() else {
            return;
        };
        // However it ends, the background copy takes what is left.
        let over = Guard(|| {
            relocation.drive(|m, now, out| m.seeds_over(now, &relocation.residency, out));
        });
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let ending = Guard(|| ended.store(true, Ordering::Release));
            let is_over = || ended.load(Ordering::Acquire) || stop.load(Ordering::Acquire);
            let indexing = std::thread::Builder::new().name("seed-index".into());
            if let Err(error) = indexing.spawn_scoped(scope, move || self.index_seeds(is_over)) {
                tracing::warn!("the seed images are not indexed: no thread can be had: {error}");
                self.seeding.index.give_up();
            }
            Run::new(self, &relocation, stop).run();
            drop(ending);
        });
        self.seeding.index.end();
        drop(over);
        if !stop.load(Ordering::Acquire) {
            self.seeding_is(Stage::Ended);
        }
    }

    /// How it stands from now on; told where that is news.
    fn seeding_is(&self, stage: Stage) {
        let before = std::mem::replace(&mut *lock(&self.seeding.stage), stage.clone());
        if before == stage {
            return;
        }
        let text = match (stage, before) {
            (Stage::Waiting, _) => return,
            (Stage::Looking, Stage::Resting(_)) => "looking in the seed images again".to_owned(),
            (Stage::Looking, _) => {
                let paths = self.seeding.images().iter();
                let paths: Vec<_> = paths.map(|i| i.path().display().to_string()).collect();
                format!("looking in {} for what the source has", paths.join(", "))
            }
            (Stage::Resting(why), _) => {
                format!("the seed images are left alone for now: {why}")
            }
            (Stage::Ended, _) => {
                let seeded = self.seeded_bytes();
                let elsewhere = self.seeding.elsewhere_bytes.load(Ordering::Relaxed);
                let elsewhere = match elsewhere {
                    0 => String::new(),
                    bytes => format!(", {bytes} of these at other offsets"),
                };
                format!(
                    "looking in the seed images has ended: {seeded} bytes were in them{elsewhere}"
                )
            }
        };
        self.event(EventKind::Seeding, text);
    }

    fn seeded_bytes(&self) -> u64 {
        let relocation = self.relocation();
        let traffic = relocation
            .as_ref()
            .map_or(&self.last_traffic, |r| &r.traffic);
        traffic.seeded_bytes.load(Ordering::Relaxed)
    }

    /// What a person should know of it.
    pub(super) fn seed_note(&self) -> Option<String> {
        if !self.has_seeds() {
            return None;
        }
        let mib = self.seeded_bytes() >> 20;
        match &*lock(&self.seeding.stage) {
            Stage::Waiting if self.life() == LifeState::Standby => {
                Some("the seed images are looked through after the handoff".to_owned())
            }
            Stage::Waiting | Stage::Ended => None,
            Stage::Looking => Some(format!(
                "looking in the seed images: {mib} MiB were found so far"
            )),
            Stage::Resting(why) => Some(format!(
                "the seed images are left alone for now ({mib} MiB were found): {why}"
            )),
        }
    }
}

/// The reason for a rest, for people.
fn reason(why: Why) -> String {
    match why {
        Why::FastLink { looked, fetched } => format!(
            "the link is faster ({} MB/s) than looking ({} MB/s); --seed-always looks all the same",
            fetched / 1_000_000,
            looked / 1_000_000
        ),
        Why::Barren => "next to nothing was in them".to_owned(),
    }
}

/// Calls `at_end` when it goes, after a panic too.
struct Guard<F: FnMut()>(F);

impl<F: FnMut()> Drop for Guard<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
