//! Volumes over anything that is a store, for the fuzz targets: without files, threads or a clock.
//!
//! Only compiled with the feature `fuzzing`. A volume that moves needs somebody who does what its
//! threads would do: [`attend`], now and then, from one thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::residency::Residency;
use hikkoshi_engine::witness::Witnesses;
use hikkoshi_store::Store;
use hikkoshi_store::state::StateDir;
use hikkoshi_wan::Source;

use super::assemble::{Moving, Parts};
use super::{Clock, Volume, lock};
use crate::config::ExportConfig;

/// A plain image.
pub fn plain(
    config: &ExportConfig,
    geometry: Geometry,
    store: Arc<dyn Store>,
    clock: Clock,
) -> Arc<Volume> {
    let parts = Parts {
        config,
        geometry,
        store,
        state: None,
        had_source: false,
        clock,
        heat_place: None,
        make_state: None,
    };
    parts.plain()
}

/// A volume that moves from `source`, standing where `state` says.
pub fn moving(
    config: &ExportConfig,
    store: Arc<dyn Store>,
    state: StateDir,
    residency: Residency,
    source: Arc<dyn Source>,
    clock: Clock,
) -> Arc<Volume> {
    // Which blocks bear witness is up to chance; here it is the same each time.
    let witnesses = Witnesses::new(0);
    let parts = Parts {
        config,
        geometry: residency.geometry(),
        store,
        state: Some(state),
        had_source: true,
        clock,
        heat_place: None,
        make_state: None,
    };
    let volume = parts.moving(Moving {
        arrival: None,
        wanted: config
            .source
            .as_ref()
            .expect("a volume that moves has a source"),
        source,
        residency: Arc::new(residency),
        witnesses,
        at_completion: Box::new(|| ()),
        at_release: Box::new(|| ()),
    });
    if let Some(relocation) = volume.relocation() {
        relocation.start();
    }
    volume
}

/// Does once what the threads of a volume do all the time: tells the mover the time, makes the
/// commits that are waited for. Never waits.
pub fn attend(volume: &Arc<Volume>) {
    if let Some(relocation) = volume.relocation() {
        relocation.tick();
    }
    volume.attend_source_flushes();
    volume.tell_source_losses();
    volume.attend_commits();
}

/// Lets go of a volume: whatever still waits fails, and nothing refers to it any more.
pub fn retire(volume: &Arc<Volume>) {
    if let Some(relocation) = volume.relocation() {
        relocation.retire();
    }
    volume.end_source_flushes();
    volume.attend_commits();
}

/// Whether a failed sync has poisoned it.
pub fn is_poisoned(volume: &Volume) -> bool {
    volume.poisoned.load(Ordering::Acquire)
}

/// Takes the durable state out of a volume that nobody uses any more.
pub fn take_state(volume: &Volume) -> Option<StateDir> {
    lock(&volume.journal).state.take()
}
