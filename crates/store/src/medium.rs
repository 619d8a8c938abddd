//! The files of the durable state, as few operations as it needs: a seam, so that a test can cut
//! the power between any two of them.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hikkoshi_crashpoint::crash_point;

/// Whether an error says that there is no room: it may go away by itself, and what was not written
/// is known.
pub fn is_no_space(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// A directory of small files.
pub trait Directory: Send + fmt::Debug {
    /// All of a file; `None` if there is none of this name.
    ///
    /// # Errors
    /// The error of the medium.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;

    /// Puts a file of this content in the place of the one before, durably and at once: after a
    /// power cut there is the old one or the new one, and after `Ok` the new one.
    ///
    /// # Errors
    /// The error of the medium. One for which [`is_no_space`] holds says besides that the old file
    /// is untouched: the new one is made beside it, and that is where space runs out. After any
    /// other it is not known which of the two is there.
    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()>;

    /// Opens a file for writing in place. It must exist.
    ///
    /// # Errors
    /// The error of the medium.
    fn open(&self, name: &str) -> io::Result<Box<dyn DurableFile>>;

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// The error of the medium.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// For messages to people.
    fn path(&self, name: &str) -> PathBuf;
}

/// A file that is written in place.
pub trait DurableFile: Send + fmt::Debug {
    /// Writes all of `data` at `offset` bytes.
    ///
    /// # Errors
    /// The error of the medium.
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The error of the medium.
    fn sync(&mut self) -> io::Result<()>;
}

/// A directory of the file system.
#[derive(Debug)]
pub struct FsDirectory {
    path: PathBuf,
}

impl FsDirectory {
    /// The directory at `path`, which exists.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }
}

impl Directory for FsDirectory {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.path.join(name)) {
            Ok(content) => Ok(Some(content)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let new = self.path.join(format!("{name}.new"));
        let made = File::create(&new).and_then(|mut file| {
            file.write_all(content)?;
            crash_point!(name, ".written");
            file.sync_all()
        });
        if let Err(error) = made {
            // Gives back what it took: where space ran out every page counts.
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        crash_point!(name, ".synced");
        let moved = fs::rename(&new, self.path.join(name)).and_then(|()| {
            crash_point!(name, ".renamed");
            File::open(&self.path)?.sync_all()
        });
        crash_point!(name, ".done");
        // Here it may not pass for a lack of space any more: the new file may be in place.
        moved.map_err(|error| io::Error::other(format!("putting it in its place failed: {error}")))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DurableFile>> {
        Ok(Box::new(
            fs::OpenOptions::new()
                .write(true)
                .open(self.path.join(name))?,
        ))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl DurableFile for File {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_all_at(data, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

mod memory;
pub use memory::MemoryDirectory;
