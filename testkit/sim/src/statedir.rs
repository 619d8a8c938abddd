//! The directory of the durable state on a simulated file system, and the memory that outlives a
//! kill.
//!
//! Unlike an image, files are put in the place of others; that is durable only after a further
//! step, and until then a power cut may leave either. Others get their turn between any two steps.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hikkoshi_engine::residency::{PlaneMemory, Residency};
use hikkoshi_engine::sync::{AtomicU64, Ordering};
use hikkoshi_store::live::LivePlace;
use hikkoshi_store::medium::{Directory, DurableFile};
use hikkoshi_store::state::{Identity, StateError};

use crate::disk::{Ailing, EIO, ENOSPC};
use crate::fiber::{self, Wait};
use crate::plan::SECTOR;
use crate::sim::Sim;

/// A file's bytes. Trailing zeroes are not kept: the log is mostly those.
#[derive(Clone, Debug, Default)]
struct Content {
    len: usize,
    durable: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
}

impl Content {
    fn new(bytes: &[u8]) -> Self {
        let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        Self {
            len: bytes.len(),
            durable: bytes[..used].to_vec(),
            unsynced: Vec::new(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        bytes[..self.durable.len()].copy_from_slice(&self.durable);
        for (at, data) in &self.unsynced {
            bytes[*at..at + data.len()].copy_from_slice(data);
        }
        bytes
    }

    fn write(&mut self, at: usize, data: &[u8]) {
        self.len = self.len.max(at + data.len());
        self.unsynced.push((at, data.to_vec()));
    }

    fn overlay(&mut self, at: usize, data: &[u8]) {
        if self.durable.len() < at + data.len() {
            self.durable.resize(at + data.len(), 0);
        }
        self.durable[at..at + data.len()].copy_from_slice(data);
    }

    fn sync(&mut self) {
        for (at, data) in std::mem::take(&mut self.unsynced) {
            self.overlay(at, &data);
        }
    }

    /// Of each write since the last sync nothing, all, or some sectors.
    fn power_cut(&mut self, choose: &mut dyn FnMut(u32) -> u32) {
        for (at, data) in std::mem::take(&mut self.unsynced) {
            let fate = choose(3);
            for (n, sector) in data.chunks(SECTOR).enumerate() {
                if fate == 1 || fate == 2 && choose(2) == 1 {
                    self.overlay(at + n * SECTOR, sector);
                }
            }
        }
    }
}

/// A name: what a process finds under it, and what a power cut may bring back.
#[derive(Clone, Debug, Default)]
struct Name {
    now: Option<Content>,
    /// Present while the last change of the name is not durable.
    before: Option<Option<Content>>,
}

type Names = BTreeMap<String, Name>;

/// The directory. Clones are the same one.
#[derive(Clone)]
pub struct SimDirectory {
    names: Arc<Mutex<Names>>,
    sim: Arc<Sim>,
    ailing: Arc<Mutex<Ailing>>,
}

impl std::fmt::Debug for SimDirectory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDirectory").finish_non_exhaustive()
    }
}

impl SimDirectory {
    /// An empty directory, on a medium that ails as it says.
    pub fn new(sim: &Arc<Sim>) -> Self {
        Self {
            names: Arc::default(),
            sim: Arc::clone(sim),
            ailing: Arc::default(),
        }
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a file holds, for the world: nobody takes time for it.
    pub fn peek(&self, name: &str) -> Option<Vec<u8>> {
        let names = self.names();
        let content = names.get(name)?.now.as_ref()?;
        Some(content.bytes())
    }

    /// What is wrong with its medium.
    pub fn ailing(&self) -> &Mutex<Ailing> {
        &self.ailing
    }

    fn with(&self, names: Names) -> Self {
        Self {
            names: Arc::new(Mutex::new(names)),
            sim: Arc::clone(&self.sim),
            ailing: Arc::clone(&self.ailing),
        }
    }

    /// What the end of the process leaves. The old directory is empty then.
    pub fn kill(&self) -> Self {
        let names = std::mem::take(&mut *self.names());
        self.with(names)
    }

    /// What a power cut leaves.
    pub fn power_cut(&self, choose: &mut dyn FnMut(u32) -> u32) -> Self {
        let mut names = std::mem::take(&mut *self.names());
        for name in names.values_mut() {
            if let Some(before) = name.before.take()
                && choose(2) == 1
            {
                name.now = before;
            }
            if let Some(content) = &mut name.now {
                content.power_cut(choose);
            }
        }
        self.with(names)
    }

    /// Fails now and then.
    fn check(&self, allocates: bool) -> io::Result<()> {
        let full = {
            let ailing = self.ailing.lock().unwrap_or_else(PoisonError::into_inner);
            self.sim.now_us() < ailing.full_until_us
        };
        if full && allocates {
            return Err(io::Error::from_raw_os_error(ENOSPC));
        }
        if self.sim.strikes(|t| t.write_error) {
            self.sim.note("state: error", 0, 0);
            return Err(io::Error::from_raw_os_error(EIO));
        }
        Ok(())
    }

    fn change(&self, name: &str, content: Option<Content>) {
        let mut names = self.names();
        let name = names.entry(name.to_owned()).or_default();
        let before = std::mem::replace(&mut name.now, content);
        name.before.get_or_insert(before);
    }

    /// The directory is synced: all its names are durable.
    fn settle(&self) {
        for name in self.names().values_mut() {
            name.before = None;
        }
    }

    fn edit<T>(&self, name: &str, edit: impl FnOnce(&mut Content) -> T) -> io::Result<T> {
        self.names()
            .get_mut(name)
            .and_then(|name| name.now.as_mut())
            .map(edit)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Directory for SimDirectory {
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        self.sim.take_time();
        if self.sim.strikes(|t| t.read_error) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let names = self.names();
        let content = names.get(name).and_then(|name| name.now.as_ref());
        Ok(content.map(Content::bytes))
    }

    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        self.sim.take_time();
        // Writing and syncing the new file: nobody sees it before it is renamed.
        self.check(true)?;
        self.sim.tempt_fate();
        self.change(name, Some(Content::new(content)));
        self.sim.tempt_fate();
        self.sim.take_time();
        // The directory's own sync.
        if self.sim.strikes(|t| t.sync_error) {
            self.sim.note("state: sync fails", 0, 0);
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.settle();
        self.sim.tempt_fate();
        self.sim.take_time();
        Ok(())
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DurableFile>> {
        self.edit(name, |_| ())?;
        Ok(Box::new(SimFile {
            dir: self.clone(),
            name: name.to_owned(),
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.sim.take_time();
        self.check(false)?;
        // Not durable before the directory is synced.
        self.change(name, None);
        self.sim.take_time();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("simulated").join(name)
    }
}

/// A file that is written in place.
#[derive(Debug)]
struct SimFile {
    dir: SimDirectory,
    name: String,
}

impl DurableFile for SimFile {
    fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let sim = Arc::clone(&self.dir.sim);
        sim.take_time();
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        if let Err(e) = self.dir.check(true) {
            // Torn: the front of it was written.
            let kept = usize::try_from(sim.below(data.len() as u64 / 512 + 1)).unwrap_or(0) * 512;
            self.dir
                .edit(&self.name, |content| content.write(at, &data[..kept]))?;
            return Err(e);
        }
        self.dir
            .edit(&self.name, |content| content.write(at, data))?;
        sim.take_time();
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let sim = Arc::clone(&self.dir.sim);
        sim.take_time();
        if sim.strikes(|t| t.sync_error) {
            sim.note("state: sync fails", 1, 0);
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.dir.edit(&self.name, Content::sync)?;
        sim.take_time();
        Ok(())
    }
}

/// Words that outlive the process.
pub struct Words {
    words: Arc<Vec<AtomicU64>>,
    sim: Arc<Sim>,
    /// In this world a thread may lose the processor between any two marks.
    torn: bool,
}

impl PlaneMemory for Words {
    fn words(&self) -> &[AtomicU64] {
        if self.torn && self.sim.below(8) == 0 {
            fiber::pause(Wait::Turn);
        }
        &self.words
    }
}

/// The memory that is there, and whose it is said to be.
struct Slot {
    owner: Option<([u8; 16], [u8; 16])>,
    words: Arc<Vec<AtomicU64>>,
}

/// Where the memory of a running volume lies. Clones are the same place.
#[derive(Clone)]
pub struct SimMemory {
    slot: Arc<Mutex<Option<Slot>>>,
    sim: Arc<Sim>,
}

impl SimMemory {
    /// A place with nothing in it: the machine was just started.
    pub fn new(sim: &Arc<Sim>) -> Self {
        Self {
            slot: Arc::default(),
            sim: Arc::clone(sim),
        }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Slot>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the end of the process leaves: a copy, which the dead one cannot reach.
    pub fn kill(&self) -> Self {
        let copy = self.slot().as_ref().map(|slot| Slot {
            owner: slot.owner,
            words: Arc::new(
                slot.words
                    .iter()
                    .map(|word| AtomicU64::new(word.load(Ordering::Acquire)))
                    .collect(),
            ),
        });
        Self {
            slot: Arc::new(Mutex::new(copy)),
            sim: Arc::clone(&self.sim),
        }
    }

    fn words_of(&self, words: &Arc<Vec<AtomicU64>>) -> Words {
        Words {
            words: Arc::clone(words),
            sim: Arc::clone(&self.sim),
            torn: self.sim.trouble().torn_marks > 0,
        }
    }

    /// The durable records say everything.
    pub fn remove(&self) {
        *self.slot() = None;
    }

    fn owner(identity: &Identity) -> ([u8; 16], [u8; 16]) {
        (identity.volume_id, identity.incarnation)
    }
}

impl LivePlace for SimMemory {
    type Memory = Words;
    type Handle = SimMemory;

    fn find(&self, identity: &Identity) -> Result<Option<(Self, Words)>, StateError> {
        self.sim.take_time();
        let slot = self.slot();
        let found = slot
            .as_ref()
            .filter(|slot| slot.owner == Some(Self::owner(identity)));
        Ok(found.map(|slot| (self.clone(), self.words_of(&slot.words))))
    }

    fn make(&self, identity: &Identity) -> Result<(Self, Words), StateError> {
        self.sim.take_time();
        let count = Residency::required_words(identity.geometry);
        let words: Arc<Vec<AtomicU64>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
        *self.slot() = Some(Slot {
            owner: None,
            words: Arc::clone(&words),
        });
        self.sim.take_time();
        Ok((self.clone(), self.words_of(&words)))
    }

    fn discard(&self, _: &Identity) {
        self.sim.take_time();
        self.remove();
    }

    fn publish(&self, _: &Self, identity: &Identity) -> Result<(), StateError> {
        self.sim.take_time();
        if let Some(slot) = self.slot().as_mut() {
            slot.owner = Some(Self::owner(identity));
        }
        self.sim.take_time();
        Ok(())
    }
}
