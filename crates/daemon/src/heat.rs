//! Keeps the heat of volumes: on disk across restarts, decaying with time, and turned into the
//! order of the background copy while a volume is arriving.
//!
//! One thread for the whole daemon. It never holds anything that a guest waits for: counting needs
//! no lock (`hikkoshi_engine::heat`), and the file is written without a sync, because losing a
//! minute of counts, or all of them, costs nothing but a worse order. A file that cannot be
//! believed is ignored, with a warning.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use hikkoshi_engine::heat::{Heat, HeatError, HeatMap, MAX_MAP_BYTES};
use hikkoshi_engine::mover::CopyOrder;

use crate::config::ExportConfig;
use crate::slot::Slot;
use crate::status::LifeState;
use crate::volume::Volume;

/// The file's name in the state directory.
const NAME: &str = "heat";

/// How often what was counted is written down.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// How often the order of a copy under way is adapted to what its guest does.
const ORDER_EVERY: Duration = Duration::from_secs(5);

/// Why a heat map that somebody named cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeatFileError {
    /// It cannot be read.
    #[error("the heat map {path} cannot be read: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// It is no map of this disk.
    #[error("the heat map {path} cannot be used: {source}; leave --heat away to go without")]
    Map {
        /// The file.
        path: PathBuf,
        /// Why.
        source: HeatError,
    },
}

/// Where the heat of an export is kept; `None` where it cannot or should not be.
pub(crate) fn place_of(config: &ExportConfig, state_dir: &Path) -> Option<PathBuf> {
    // A read-only export leaves everything as it is; below /dev nothing outlives the boot.
    let kept = !config.read_only && !state_dir.starts_with("/dev");
    let memory = state_dir.starts_with("/dev/shm");
    (kept || memory && !config.read_only).then(|| state_dir.join(NAME))
}

/// The map in a file.
///
/// # Errors
/// It cannot be read, or is none.
pub(crate) fn read_map(path: &Path) -> Result<HeatMap, HeatFileError> {
    let failed = |source| HeatFileError::Io {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let limit = u64::try_from(MAX_MAP_BYTES).unwrap_or(u64::MAX) + 1;
    let file = File::open(path).map_err(failed)?;
    file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    HeatMap::decode(&bytes).map_err(|source| HeatFileError::Map {
        path: path.to_owned(),
        source,
    })
}

/// Takes a map over that the user names.
///
/// # Errors
/// It cannot be read, or is none of this disk.
pub(crate) fn replay(heat: &Heat, path: &Path) -> Result<(), HeatFileError> {
    let map = read_map(path)?;
    heat.merge(&map).map_err(|source| HeatFileError::Map {
        path: path.to_owned(),
        source,
    })
}

/// Takes over what an earlier run of the daemon wrote down.
pub(crate) fn restore(heat: &Heat, path: &Path) {
    let outcome = match read_map(path) {
        Err(HeatFileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return,
        Err(error) => Err(error.to_string()),
        Ok(map) => heat.merge(&map).map_err(|e| e.to_string()),
    };
    match outcome {
        Ok(()) => heat.decay_to(unix_seconds()),
        Err(why) => tracing::warn!(
            "what was counted earlier of reads and writes is ignored, {}: {why}",
            path.display()
        ),
    }
}

/// Writes it down, in the place of what was there.
pub(crate) fn save(heat: &Heat, path: &Path) -> io::Result<()> {
    let map = heat.map();
    if map.regions.is_empty() && !path.exists() {
        return Ok(());
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = path.with_extension("new");
    fs::write(&new, map.encode())?;
    fs::rename(&new, path)
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The thread that keeps the heat of all volumes. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Keeper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts it.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(slots: Vec<Arc<Slot>>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("heat".into())
            .spawn(move || keep(&slots, &stopping))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic there has been printed; no guest depends on it.
            let _ = thread.join();
        }
    }
}

fn keep(slots: &[Arc<Slot>], stop: &AtomicBool) {
    let mut orders: Vec<Option<CopyOrder>> = vec![None; slots.len()];
    let mut warned = vec![false; slots.len()];
    let mut saved = Instant::now();
    while !stop.load(Ordering::Acquire) {
        std::thread::park_timeout(ORDER_EVERY);
        let due = saved.elapsed() >= SAVE_EVERY;
        if due {
            saved = Instant::now();
        }
        for (n, slot) in slots.iter().enumerate() {
            if stop.load(Ordering::Acquire) {
                return;
            }
            let Some(export) = slot.export() else {
                continue;
            };
            let volume = export.volume();
            volume.heat().decay_to(unix_seconds());
            adapt_order(&volume, &mut orders[n]);
            if due && let Err(error) = volume.save_heat() {
                // Once is enough: nobody has to act, and it is tried again.
                if !std::mem::replace(&mut warned[n], true) {
                    tracing::warn!(
                        export = %volume.name(),
                        "what is counted of reads and writes cannot be kept: {error}"
                    );
                }
            }
        }
    }
}

/// What the guest reads here comes next, what it writes here comes last.
fn adapt_order(volume: &Volume, last: &mut Option<CopyOrder>) {
    let Some(relocation) = volume.relocation() else {
        *last = None;
        return;
    };
    if volume.life() != LifeState::Arriving {
        return;
    }
    let order = volume.heat().map().order(volume.geometry());
    if last.as_ref() != Some(&order) {
        relocation.set_order(order.clone());
        *last = Some(order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_survives_and_what_is_damaged_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.hikkoshi").join(NAME);
        let heat = Heat::new(64 << 20);
        save(&heat, &path).unwrap();
        assert!(!path.exists(), "nothing was counted, nothing is written");
        heat.decay_to(unix_seconds());
        heat.read(5 << 20, 4096);
        save(&heat, &path).unwrap();
        let again = Heat::new(64 << 20);
        restore(&again, &path);
        assert_eq!(again.map(), heat.map());

        let mut bytes = fs::read(&path).unwrap();
        bytes[20] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let fresh = Heat::new(64 << 20);
        restore(&fresh, &path);
        assert!(fresh.map().regions.is_empty());
        assert!(
            replay(&fresh, &path).is_err(),
            "what a user names is not ignored"
        );
        // Of another disk.
        save(&heat, &path).unwrap();
        let other = Heat::new(65 << 20);
        restore(&other, &path);
        assert!(other.map().regions.is_empty());
        let error = replay(&other, &path).unwrap_err().to_string();
        assert!(error.contains("--heat"), "{error}");
    }
}
