//! What a medium may hold when the power is cut at an instant of a recording.
//!
//! The model is that of `docs/on-disk.md`, no kinder:
//! - what a call wrote that was over before a completed sync of the file began is there;
//! - of any other write that had begun, each sector of 512 bytes is there or not, each for itself
//!   (lost, kept, torn, reordered);
//! - a name made, renamed or removed is durable by a sync of its directory, before that it is so
//!   or not, each for itself; a rename is atomic;
//! - an attribute is durable by an fsync of its file (not by an fdatasync).
//!
//! Calls are applied in the order of their ends. Where two writes of one sector overlap in time
//! that is a guess; nothing under test writes a sector twice at once.

use super::record::{Call, Change};
use crate::pattern::Random;
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SECTOR: usize = 512;
const PAGE: usize = 4096;
const MARK: &str = "user.hikkoshi.volume";

/// Something that happened to a file or a directory, and when.
#[derive(Clone, Debug)]
struct Step<T> {
    begun_ns: u64,
    ended_ns: u64,
    what: T,
}

/// All that happened to one file.
#[derive(Clone, Debug, Default)]
struct FileLog {
    writes: Vec<Step<FileStep>>,
    marks: Vec<Step<Vec<u8>>>,
    /// Any sync; and those that cover attributes.
    syncs: Vec<Step<()>>,
    full_syncs: Vec<Step<()>>,
    /// Where the next write without an offset goes.
    position: u64,
}

#[derive(Clone, Debug)]
enum FileStep {
    Data { offset: u64, data: Vec<u8> },
    Zero { offset: u64, len: u64 },
    Resize(u64),
}

/// What happened to the names in one directory.
#[derive(Clone, Debug, Default)]
struct DirLog {
    steps: Vec<Step<NameStep>>,
    syncs: Vec<Step<()>>,
}

#[derive(Clone, Debug)]
enum NameStep {
    Bind(PathBuf, Node),
    Rename(PathBuf, PathBuf, Node),
    Remove(PathBuf),
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    File(usize),
    Dir,
}

/// A recording, ready to be cut.
#[derive(Debug, Default)]
pub struct Medium {
    files: Vec<FileLog>,
    dirs: BTreeMap<PathBuf, DirLog>,
    /// When each call began and ended, and whether it was about the state.
    instants: Vec<(u64, u64, bool)>,
}

/// A power cut.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// When, in nanoseconds since 1970.
    pub at_ns: u64,
    /// Names what becomes of all that was not synced.
    pub seed: u64,
    /// Nothing becomes of it: this side has power, and only its process ends.
    pub spares: bool,
}

/// A file as it is found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Found {
    content: Vec<u8>,
    mark: Option<Vec<u8>>,
}

impl Medium {
    /// Sorts the calls of a recording, which began with an empty directory `root`.
    ///
    /// # Errors
    /// A call on a file that was never made.
    pub fn new(root: &Path, calls: &[Call], end_ns: u64) -> Result<Self> {
        let mut this = Self::default();
        this.dirs.insert(root.to_path_buf(), DirLog::default());
        let mut names: BTreeMap<PathBuf, Node> = BTreeMap::new();
        let mut gone: HashSet<PathBuf> = HashSet::new();
        let mut calls: Vec<(u64, &Call)> = calls
            .iter()
            .map(|call| (call.ended_ns.unwrap_or(end_ns), call))
            .collect();
        calls.sort_by_key(|(ended_ns, _)| *ended_ns);
        for (ended_ns, call) in calls {
            let about_state = this.apply(&mut names, &mut gone, call, ended_ns)?;
            this.instants.push((call.begun_ns, ended_ns, about_state));
        }
        Ok(this)
    }

    /// How many calls there are.
    pub fn calls(&self) -> usize {
        self.instants.len()
    }

    /// When each call began and ended, and whether it was about the state.
    pub fn instants(&self) -> &[(u64, u64, bool)] {
        &self.instants
    }

    fn apply(
        &mut self,
        names: &mut BTreeMap<PathBuf, Node>,
        gone: &mut HashSet<PathBuf>,
        call: &Call,
        ended_ns: u64,
    ) -> Result<bool> {
        let begun_ns = call.begun_ns;
        fn step<T>(begun_ns: u64, ended_ns: u64, what: T) -> Step<T> {
            Step {
                begun_ns,
                ended_ns,
                what,
            }
        }
        let mut state = true;
        match &call.change {
            Change::Open { path, truncate } => match names.get(path) {
                Some(Node::File(file)) if *truncate => {
                    let file = &mut self.files[*file];
                    file.position = 0;
                    file.writes
                        .push(step(begun_ns, ended_ns, FileStep::Resize(0)));
                }
                Some(_) => {}
                None => {
                    let node = Node::File(self.files.len());
                    self.files.push(FileLog::default());
                    names.insert(path.clone(), node);
                    let bind = NameStep::Bind(path.clone(), node);
                    self.dir_of(path)?
                        .steps
                        .push(step(begun_ns, ended_ns, bind));
                }
            },
            Change::MakeDir(path) => {
                names.insert(path.clone(), Node::Dir);
                self.dirs.insert(path.clone(), DirLog::default());
                let bind = NameStep::Bind(path.clone(), Node::Dir);
                self.dir_of(path)?
                    .steps
                    .push(step(begun_ns, ended_ns, bind));
            }
            Change::Rename { from, to } => {
                let node = names
                    .remove(from)
                    .with_context(|| format!("{} was renamed, and is unknown", from.display()))?;
                ensure!(from.parent() == to.parent(), "a rename between directories");
                names.insert(to.clone(), node);
                let rename = NameStep::Rename(from.clone(), to.clone(), node);
                self.dir_of(to)?
                    .steps
                    .push(step(begun_ns, ended_ns, rename));
            }
            Change::Remove(path) => {
                if names.remove(path).is_some() {
                    gone.insert(path.clone());
                    let remove = NameStep::Remove(path.clone());
                    self.dir_of(path)?
                        .steps
                        .push(step(begun_ns, ended_ns, remove));
                }
            }
            Change::Sync { path, .. } if self.dirs.contains_key(path) => {
                if let Some(dir) = self.dirs.get_mut(path) {
                    dir.syncs.push(step(begun_ns, ended_ns, ()));
                }
            }
            change @ (Change::Write { path, .. }
            | Change::Zero { path, .. }
            | Change::Resize { path, .. }
            | Change::Sync { path, .. }
            | Change::Attribute { path, .. }) => {
                let file = match names.get(path) {
                    Some(Node::File(file)) => &mut self.files[*file],
                    // Our own log, which is no part of the disk; or a file that has no name left.
                    _ if gone.contains(path) || path.ends_with("daemon.log") => return Ok(false),
                    _ => bail!("{} was written, and is unknown", path.display()),
                };
                state = path.extension().is_none_or(|extension| extension != "img");
                match change {
                    Change::Write { offset, data, .. } => {
                        let offset = offset.unwrap_or(file.position);
                        file.position = offset + data.len() as u64;
                        let data = data.clone();
                        let what = FileStep::Data { offset, data };
                        file.writes.push(step(begun_ns, ended_ns, what));
                    }
                    Change::Zero { offset, len, .. } => {
                        let (offset, len) = (*offset, *len);
                        let what = FileStep::Zero { offset, len };
                        file.writes.push(step(begun_ns, ended_ns, what));
                    }
                    Change::Resize { size, .. } => {
                        let what = FileStep::Resize(*size);
                        file.writes.push(step(begun_ns, ended_ns, what));
                    }
                    Change::Attribute { value, .. } => {
                        state = true;
                        file.marks.push(step(begun_ns, ended_ns, value.clone()));
                    }
                    Change::Sync { all, .. } => {
                        file.syncs.push(step(begun_ns, ended_ns, ()));
                        if *all {
                            file.full_syncs.push(step(begun_ns, ended_ns, ()));
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(state)
    }

    fn dir_of(&mut self, path: &Path) -> Result<&mut DirLog> {
        path.parent()
            .and_then(|parent| self.dirs.get_mut(parent))
            .with_context(|| format!("the directory of {} is unknown", path.display()))
    }

    /// An instant to cut at: within a call or right after it, half of the time a call about the
    /// durable state.
    pub fn random_cut(&self, seed: u64) -> Result<Cut> {
        let mut random = Random::new(seed);
        let of_state: Vec<_> = self
            .instants
            .iter()
            .filter(|(_, _, state)| *state)
            .collect();
        ensure!(!of_state.is_empty(), "an empty recording");
        let (begun, ended, _) = if random.below(2) == 0 {
            *of_state[usize::try_from(random.below(of_state.len() as u64))?]
        } else {
            self.instants[usize::try_from(random.below(self.instants.len() as u64))?]
        };
        let at_ns = match random.below(4) {
            0 => ended + 1,
            1 => begun.saturating_sub(1),
            _ => begun + random.below(ended.saturating_sub(begun) + 1),
        };
        Ok(Cut {
            at_ns,
            seed: random.next(),
            spares: false,
        })
    }

    /// Makes what the medium holds after the cut, below `root`. `image` is a file that becomes
    /// the image: its inode is part of what the state knows.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn lay_out(&self, cut: Cut, root: &Path, image: &Path) -> Result<()> {
        let mut random = Random::new(cut.seed);
        let mut made: Vec<PathBuf> = Vec::new();
        for (dir, log) in &self.dirs {
            let names = log.after(cut, &mut random);
            if !made.contains(dir) && dir != root {
                continue;
            }
            for (path, node) in names {
                match node {
                    Node::Dir => {
                        fs::create_dir(&path)?;
                        made.push(path);
                    }
                    Node::File(file) => {
                        let found = self.files[file].after(cut, &mut random);
                        if path.extension().is_some_and(|extension| extension == "img") {
                            fs::hard_link(image, &path)?;
                        }
                        write_file(&path, &found)
                            .with_context(|| format!("write {}", path.display()))?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Up to when what had ended is durable: the beginning of the last sync that was over.
fn stable_until(syncs: &[Step<()>], at_ns: u64) -> u64 {
    let done = syncs.iter().filter(|sync| sync.ended_ns <= at_ns);
    done.map(|sync| sync.begun_ns).max().unwrap_or(0)
}

/// What becomes of steps that are not durable.
#[derive(Clone, Copy)]
enum Fate {
    Lost,
    Kept,
    /// Each with this chance, in eighths; of writes, each sector.
    Each(u64),
    /// Each with half a chance, as a whole.
    Whole,
}

impl Fate {
    fn of_cut(cut: Cut, random: &mut Random) -> Self {
        match cut.spares {
            true => Self::Kept,
            false => Self::random(random),
        }
    }

    fn random(random: &mut Random) -> Self {
        match random.below(8) {
            0 => Self::Lost,
            1 => Self::Kept,
            2 => Self::Each(1),
            3 => Self::Each(7),
            4 | 5 => Self::Each(4),
            _ => Self::Whole,
        }
    }

    /// Decides for a step; `None` if each part is to be decided for itself.
    fn of_step(self, random: &mut Random) -> Option<bool> {
        match self {
            Self::Lost => Some(false),
            Self::Kept => Some(true),
            Self::Whole => Some(random.below(2) == 0),
            Self::Each(_) => None,
        }
    }

    fn of_part(self, random: &mut Random) -> bool {
        match self {
            Self::Each(eighths) => random.below(8) < eighths,
            other => other.of_step(random).unwrap_or(false),
        }
    }
}

impl DirLog {
    fn after(&self, cut: Cut, random: &mut Random) -> BTreeMap<PathBuf, Node> {
        let at_ns = cut.at_ns;
        let stable = stable_until(&self.syncs, at_ns);
        let fate = Fate::of_cut(cut, random);
        let mut names = BTreeMap::new();
        for step in self.steps.iter().filter(|step| step.begun_ns <= at_ns) {
            if step.ended_ns >= stable && !fate.of_part(random) {
                continue;
            }
            match &step.what {
                NameStep::Bind(path, node) => {
                    names.insert(path.clone(), *node);
                }
                NameStep::Rename(from, to, node) => {
                    names.remove(from);
                    names.insert(to.clone(), *node);
                }
                NameStep::Remove(path) => {
                    names.remove(path);
                }
            }
        }
        names
    }
}

impl FileLog {
    fn after(&self, cut: Cut, random: &mut Random) -> Found {
        let at_ns = cut.at_ns;
        let stable = stable_until(&self.syncs, at_ns);
        let fate = Fate::of_cut(cut, random);
        // What the cache held, and what of it had reached the medium.
        let mut cache: Vec<u8> = Vec::new();
        let mut medium: Vec<u8> = Vec::new();
        let mut size = 0;
        for step in self.writes.iter().filter(|step| step.begun_ns <= at_ns) {
            let before = cache.len();
            let range = step.what.apply(&mut cache);
            if medium.len() < cache.len() {
                medium.resize(cache.len(), 0);
            }
            let durable = step.ended_ns < stable;
            let whole = if durable {
                Some(true)
            } else {
                fate.of_step(random)
            };
            if cache.len() != before && whole.unwrap_or_else(|| fate.of_part(random)) {
                size = cache.len();
            }
            let mut at = range.start / SECTOR * SECTOR;
            while at < range.end {
                let end = (at + SECTOR).min(cache.len());
                if whole.unwrap_or_else(|| fate.of_part(random)) {
                    medium[at..end].copy_from_slice(&cache[at..end]);
                }
                at += SECTOR;
            }
        }
        medium.resize(size, 0);
        let stable = stable_until(&self.full_syncs, at_ns);
        let mut mark = None;
        for step in self.marks.iter().filter(|step| step.begun_ns <= at_ns) {
            if cut.spares || step.ended_ns < stable || random.below(2) == 0 {
                mark = Some(step.what.clone());
            }
        }
        Found {
            content: medium,
            mark,
        }
    }
}

impl FileStep {
    /// Changes what the cache holds; tells which bytes.
    fn apply(&self, cache: &mut Vec<u8>) -> std::ops::Range<usize> {
        let place = |offset: u64, len: usize| {
            let start = usize::try_from(offset).expect("a file of these tests fits into memory");
            start..start + len
        };
        match self {
            Self::Data { offset, data } => {
                let range = place(*offset, data.len());
                if cache.len() < range.end {
                    cache.resize(range.end, 0);
                }
                cache[range.clone()].copy_from_slice(data);
                range
            }
            Self::Zero { offset, len } => {
                let mut range = place(*offset, usize::try_from(*len).unwrap_or(usize::MAX));
                range.end = range.end.min(cache.len());
                cache[range.clone()].fill(0);
                range
            }
            Self::Resize(size) => {
                let size = usize::try_from(*size).expect("a file of these tests fits into memory");
                let before = cache.len();
                cache.resize(size, 0);
                before.min(size)..size
            }
        }
    }
}

/// Sparse, as the file was.
fn write_file(path: &Path, found: &Found) -> Result<()> {
    let file = fs::File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .open(path)?;
    file.set_len(found.content.len() as u64)?;
    for (page, number) in found.content.chunks(PAGE).zip(0_u64..) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, number * PAGE as u64)?;
        }
    }
    let flags = rustix::fs::XattrFlags::empty();
    match &found.mark {
        Some(mark) => rustix::fs::fsetxattr(&file, MARK, mark, flags)?,
        // The inode is used again and again.
        None => match rustix::fs::fremovexattr(&file, MARK) {
            Err(rustix::io::Errno::NODATA) | Ok(()) => {}
            Err(errno) => return Err(errno.into()),
        },
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
