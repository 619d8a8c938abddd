//! A directory in memory, for tests: it can lose its power, and fail after any operation.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Directory, DurableFile};
use crate::Chooser;

/// What a power cut leaves whole or tears.
const SECTOR: usize = 512;

#[derive(Clone, Debug, Default)]
struct Content {
    durable: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
}

impl Content {
    fn now(&self) -> Vec<u8> {
        let mut now = self.durable.clone();
        for (at, data) in &self.unsynced {
            overlay(&mut now, *at, data);
        }
        now
    }
}

fn overlay(content: &mut Vec<u8>, at: usize, data: &[u8]) {
    if content.len() < at + data.len() {
        content.resize(at + data.len(), 0);
    }
    content[at..at + data.len()].copy_from_slice(data);
}

#[derive(Debug, Default)]
struct Files {
    files: BTreeMap<String, Content>,
    /// Operations until everything fails.
    left: Option<u64>,
    /// Nothing more fits in.
    full: bool,
}

impl Files {
    fn step(&mut self) -> io::Result<()> {
        match &mut self.left {
            Some(0) => Err(io::Error::other("the power is off")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn check_space(&self) -> io::Result<()> {
        if self.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

/// A directory in memory. Clones are the same directory.
#[derive(Clone, Debug, Default)]
pub struct MemoryDirectory {
    files: Arc<Mutex<Files>>,
}

impl MemoryDirectory {
    fn lock(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets so many more operations succeed, and none after them; `None` for no limit.
    pub fn fail_after(&self, operations: Option<u64>) {
        self.lock().left = operations;
    }

    /// Whether every write fails for want of space, after its first half.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// What a power cut leaves: all that was synced, and of each write since whatever `choose(3)`
    /// says: nothing (0), all (1), or some of its sectors, by `choose(2)` for each.
    #[must_use]
    pub fn power_cut(&self, choose: &mut Chooser<'_>) -> Self {
        let mut files = self.lock().files.clone();
        for content in files.values_mut() {
            for (at, data) in std::mem::take(&mut content.unsynced) {
                let fate = choose(3) % 3;
                for (n, sector) in data.chunks(SECTOR).enumerate() {
                    if fate == 1 || fate == 2 && choose(2) % 2 == 1 {
                        overlay(&mut content.durable, at + n * SECTOR, sector);
                    }
                }
            }
        }
        Self {
            files: Arc::new(Mutex::new(Files {
                files,
                left: None,
                full: false,
            })),
        }
    }

    /// What the end of the process leaves: everything.
    #[must_use]
    pub fn kill(&self) -> Self {
        let files = self.lock().files.clone();
        Self {
            files: Arc::new(Mutex::new(Files {
                files,
                left: None,
                full: false,
            })),
        }
    }
}

impl Directory for MemoryDirectory {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.lock().files.get(name).map(Content::now))
    }

    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut files = self.lock();
        files.step()?;
        files.check_space()?;
        let content = Content {
            durable: content.to_vec(),
            unsynced: Vec::new(),
        };
        files.files.insert(name.to_owned(), content);
        Ok(())
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DurableFile>> {
        if !self.lock().files.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(Box::new(MemoryFile {
            dir: self.clone(),
            name: name.to_owned(),
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut files = self.lock();
        files.step()?;
        files.files.remove(name);
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("memory").join(name)
    }
}

#[derive(Debug)]
struct MemoryFile {
    dir: MemoryDirectory,
    name: String,
}

impl DurableFile for MemoryFile {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut files = self.dir.lock();
        files.step()?;
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let fits = files.check_space();
        let data = match &fits {
            Ok(()) => data,
            Err(_) => &data[..data.len() / 2],
        };
        let content = files
            .files
            .get_mut(&self.name)
            .ok_or(io::ErrorKind::NotFound)?;
        content.unsynced.push((at, data.to_vec()));
        fits
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut files = self.dir.lock();
        files.step()?;
        let content = files
            .files
            .get_mut(&self.name)
            .ok_or(io::ErrorKind::NotFound)?;
        content.durable = content.now();
        content.unsynced.clear();
        Ok(())
    }
}
