//! What a failed sync leaves behind: a page cache that is not to be believed.
//!
//! The kernel tells of a page that it could not write once. Then it takes the page for clean: it is
//! read as before, and no later sync will write it. The process that saw the failure syncs no more;
//! the next one would believe what it reads, sync, and answer a flush for data that is nowhere. So
//! a failed sync leaves a [`Mark`] that outlives the process and not the boot (as the page cache
//! does), and whoever opens the image next writes everything that can be read once more, before
//! anything else.
//!
//! Everything, and not what changed since the last durable record: a block that is recorded may
//! have been written again since, which leaves no record.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::range::{len_u64, len_usize};
use crate::{ExtentKind, ImageIdentity, Store};

/// Read and written at once.
const PIECE_BYTES: u64 = 1 << 20;

/// Extents asked for at once.
const EXTENTS: usize = 64;

/// Says that syncs of an image have failed in this boot.
pub trait Mark {
    /// Leaves the mark. It may be there already.
    ///
    /// # Errors
    /// It cannot be left.
    fn raise(&self) -> io::Result<()>;

    /// Whether it is there.
    ///
    /// # Errors
    /// That cannot be found out.
    fn is_raised(&self) -> io::Result<bool>;

    /// Takes it away.
    ///
    /// # Errors
    /// It is still there.
    fn clear(&self) -> io::Result<()>;
}

/// In memory alone, for tests and simulators.
#[derive(Debug, Default)]
pub struct MemoryMark(AtomicBool);

impl Clone for MemoryMark {
    fn clone(&self) -> Self {
        Self(AtomicBool::new(self.0.load(Ordering::Acquire)))
    }
}

impl Mark for MemoryMark {
    fn raise(&self) -> io::Result<()> {
        self.0.store(true, Ordering::Release);
        Ok(())
    }

    fn is_raised(&self) -> io::Result<bool> {
        Ok(self.0.load(Ordering::Acquire))
    }

    fn clear(&self) -> io::Result<()> {
        self.0.store(false, Ordering::Release);
        Ok(())
    }
}

/// A file in a memory file system, named after the image.
#[derive(Debug)]
pub struct MarkFile {
    path: PathBuf,
}

impl MarkFile {
    /// The mark of an image in a directory of ours (see [`crate::live::default_dir`]).
    pub fn new(dir: &Path, image: ImageIdentity) -> Self {
        let name = format!("suspect-{:x}-{:x}", image.device, image.inode);
        Self {
            path: dir.join(name),
        }
    }
}

impl Mark for MarkFile {
    fn raise(&self) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            crate::live::prepare_dir(dir).map_err(io::Error::other)?;
        }
        File::create(&self.path).map(drop)
    }

    fn is_raised(&self) -> io::Result<bool> {
        match fs::symlink_metadata(&self.path) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn clear(&self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

/// Syncs, and leaves the mark if that fails, before anybody is told.
///
/// # Errors
/// Those of `sync`.
pub fn guarded(mark: &dyn Mark, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    sync().inspect_err(|error| {
        if let Err(e) = mark.raise() {
            tracing::error!(
                "a sync failed ({error}), and that could not be noted for the next start ({e}): \
                 restart the machine before the image is used again"
            );
        }
    })
}

/// Why an image whose syncs have failed cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "a sync failed before, so all of the image is written once more, and {what} failed: {source}; \
     nothing was lost by this attempt; mend the medium, or copy the image away, and start again"
)]
pub struct RewriteError {
    what: String,
    /// The error of the medium.
    pub source: io::Error,
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> RewriteError {
    let what = what.into();
    |source| RewriteError { what, source }
}

/// Makes an image fit to be believed: if the mark is there, everything is written once more and
/// synced, and the mark taken away. Tells how many bytes were written, if it was there. Nobody else
/// may write meanwhile. `progress` is told how far it is, now and then.
///
/// # Errors
/// The medium fails. The mark stays, and the image must not be used.
pub fn settle(
    store: &dyn Store,
    mark: &dyn Mark,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<u64>, RewriteError> {
    if !mark.is_raised().map_err(failed("looking for its mark"))? {
        return Ok(None);
    }
    let written = rewrite(store, progress)?;
    store.sync().map_err(failed("syncing it"))?;
    // Not before: what was written may have failed again.
    mark.clear().map_err(failed("taking away its mark"))?;
    Ok(Some(written))
}

fn rewrite(store: &dyn Store, progress: &mut dyn FnMut(u64)) -> Result<u64, RewriteError> {
    let (mut at, size, mut written) = (0, store.size_bytes(), 0);
    let mut piece = vec![0; len_usize(PIECE_BYTES.min(size))];
    while at < size {
        let extents = store
            .extents(at, size - at, EXTENTS)
            .map_err(failed(format!("looking for data from offset {at} on")))?;
        for extent in extents {
            let end = extent.offset + extent.len;
            at = extent.offset;
            while at < end {
                let data = &mut piece[..len_usize(PIECE_BYTES.min(end - at))];
                store
                    .read(at, data)
                    .map_err(failed(format!("reading at offset {at}")))?;
                // A file system that could not write a page may have given up its place as well:
                // data shows in what it calls a hole. The rest of a hole stays one.
                if extent.kind != ExtentKind::Hole || data.iter().any(|byte| *byte != 0) {
                    store
                        .write(at, data)
                        .map_err(failed(format!("writing at offset {at}")))?;
                    written += len_u64(data.len());
                }
                at += len_u64(data.len());
                progress(at);
            }
        }
    }
    Ok(written)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
