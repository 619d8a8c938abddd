//! What a soak has done, as numbers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

/// How a daemon came to be restarted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `kill -9` at a random instant under load.
    UnderLoad,
    /// `kill -9` at a random instant of a start.
    AtStart,
    /// `kill -9` of a volume that is complete.
    Resident,
    /// At a named point.
    Named,
    /// The power cut, replayed from a recording.
    PowerCut,
    /// The power cut at either end of a move, or at both, replayed from a recording of both.
    MoveCut,
    /// An orderly end in between.
    Orderly,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::UnderLoad,
        Self::AtStart,
        Self::Resident,
        Self::Named,
        Self::PowerCut,
        Self::MoveCut,
        Self::Orderly,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::UnderLoad => "kill -9 under load",
            Self::AtStart => "kill -9 while starting",
            Self::Resident => "kill -9, volume complete",
            Self::Named => "kill -9 at a named point",
            Self::PowerCut => "power cut",
            Self::MoveCut => "power cut of a move",
            Self::Orderly => "orderly end (not a crash)",
        }
    }
}

/// Counters, shared by all that sweep.
#[derive(Debug, Default)]
pub struct Counts {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    restarts: BTreeMap<(Kind, &'static str), u64>,
    points: BTreeMap<String, u64>,
    writers: BTreeMap<&'static str, u64>,
    volumes: u64,
    recordings: u64,
    refused: u64,
    wrong: u64,
}

impl Counts {
    fn with<R>(&self, change: impl FnOnce(&mut Inner) -> R) -> R {
        change(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A restart, on a file system of this name.
    pub fn restart(&self, kind: Kind, file_system: &'static str) {
        self.with(|c| *c.restarts.entry((kind, file_system)).or_default() += 1);
    }

    /// A named point was reached.
    pub fn point(&self, name: &str) {
        self.with(|c| *c.points.entry(name.to_owned()).or_default() += 1);
    }

    /// How often a named point was reached.
    pub fn reached(&self, name: &str) -> u64 {
        self.with(|c| c.points.get(name).copied().unwrap_or(0))
    }

    /// After a power cut of a move this one was found to accept writes.
    pub fn writer(&self, who: &'static str) {
        self.with(|c| *c.writers.entry(who).or_default() += 1);
    }

    /// A volume was carried to its end.
    pub fn volume(&self) {
        self.with(|c| c.volumes += 1);
    }

    /// A recording was made.
    pub fn recording(&self) {
        self.with(|c| c.recordings += 1);
    }

    /// Something went wrong: a start that was refused, or a disk with wrong content.
    pub fn failure(&self, refused: bool) {
        self.with(|c| {
            if refused {
                c.refused += 1;
            } else {
                c.wrong += 1;
            }
        });
    }

    /// Restarts after a kill or a power cut.
    pub fn crashes(&self) -> u64 {
        self.with(|c| {
            c.restarts
                .iter()
                .filter(|((kind, _), _)| *kind != Kind::Orderly)
                .map(|(_, n)| n)
                .sum()
        })
    }

    /// One line, for the progress.
    pub fn line(&self) -> String {
        let crashes = self.crashes();
        self.with(|c| {
            let of = |kind| -> u64 {
                let all = c.restarts.iter();
                all.filter(|((k, _), _)| *k == kind).map(|(_, n)| n).sum()
            };
            format!(
                "{crashes} crashes: {} under load, {} starting, {} complete, {} named, {} power \
                 cuts, {} of moves; {} volumes, {} recordings; {} refused, {} wrong",
                of(Kind::UnderLoad),
                of(Kind::AtStart),
                of(Kind::Resident),
                of(Kind::Named),
                of(Kind::PowerCut),
                of(Kind::MoveCut),
                c.volumes,
                c.recordings,
                c.refused,
                c.wrong
            )
        })
    }

    /// Everything, as tables.
    pub fn table(&self, file_systems: &[&'static str]) -> String {
        let mut out = String::new();
        let crashes = self.crashes();
        self.with(|c| {
            let mut row = |name: &str, cells: Vec<String>| {
                let _ = write!(out, "{name:<28}");
                for cell in cells {
                    let _ = write!(out, "{cell:>9}");
                }
                out.push('\n');
            };
            let heads = file_systems.iter().map(|f| (*f).to_owned());
            row("restarts after", heads.chain(["all".into()]).collect());
            for kind in Kind::ALL {
                let on = |f: &&'static str| c.restarts.get(&(kind, *f)).copied().unwrap_or(0);
                let cells: Vec<u64> = file_systems.iter().map(on).collect();
                let all = cells.iter().sum::<u64>();
                let cells = cells.iter().chain([&all]).map(u64::to_string);
                row(kind.name(), cells.collect());
            }
            let _ = writeln!(out, "crashes in all: {crashes}");
            let _ = writeln!(out, "volumes carried to their end: {}", c.volumes);
            let _ = writeln!(out, "recordings replayed: {}", c.recordings);
            if !c.writers.is_empty() {
                let _ = writeln!(out, "writers after power cuts of moves: {:?}", c.writers);
            }
            let _ = writeln!(out, "starts refused: {}", c.refused);
            let _ = writeln!(out, "disks with something lost or wrong: {}", c.wrong);
            if !c.points.is_empty() {
                let _ = writeln!(out, "kills at named points:");
                for (name, n) in &c.points {
                    let _ = writeln!(out, "  {name:<34}{n:>6}");
                }
            }
        });
        out
    }
}
