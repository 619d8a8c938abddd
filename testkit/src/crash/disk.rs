//! What a disk must hold, sector by sector, with everything that each may hold after a crash.
//!
//! Shared by the clients that write and by the checks after a restart. Each sector keeps its
//! versions in order; whoever writes makes sure that no two writes of one sector are in flight at
//! once, so the order is known. Two questions are answered: what a sector may hold after a kill
//! (the last answered version, or one asked for later), and after a power cut at an instant (the
//! last version that was flushed by then, or one asked for later but before the cut).

use crate::pattern::{fill_sector, mix};
use anyhow::{Result, bail};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// The original has holes of this length, and more than one of them, in sectors.
const HOLE_SECTORS: u64 = 96;

/// Nanoseconds since 1970, the clock that the recorder's trace is stamped with.
pub fn now_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// What one sector holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// The pattern of its n-th write; 0 is the original's.
    Generation(u64),
    /// Zeroes.
    Zero,
    /// Anything, made by a write that covered only some of its bytes.
    Bytes(Box<[u8; SECTOR]>),
}

impl Content {
    /// The bytes, for sector number `sector`.
    pub fn bytes(&self, sector: u64) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        match self {
            Self::Generation(generation) => fill_sector(sector, *generation, &mut bytes),
            Self::Zero => {}
            Self::Bytes(content) => bytes = **content,
        }
        bytes
    }
}

/// One state of a sector.
#[derive(Clone, Debug)]
struct Version {
    content: Content,
    /// When it was asked for, just before the request was sent.
    asked_ns: u64,
    /// When it was answered, just after the reply was received.
    answered_ns: Option<u64>,
    fua: bool,
}

/// A flush that was answered.
#[derive(Clone, Copy, Debug)]
struct Flush {
    asked_ns: u64,
    answered_ns: u64,
}

/// What a disk must hold.
pub struct Expected {
    sectors: Vec<Mutex<Vec<Version>>>,
    flushes: Mutex<Vec<Flush>>,
    keep_history: bool,
}

/// A sector that holds what it cannot hold.
#[derive(Clone, Debug)]
pub struct Wrong {
    /// Which.
    pub sector: u64,
    /// In words: what was found and what is allowed.
    pub what: String,
}

/// What the original disk holds in a sector.
fn original(sector: u64) -> Content {
    if mix(sector / HOLE_SECTORS).is_multiple_of(4) {
        Content::Zero
    } else {
        Content::Generation(0)
    }
}

/// Writes the original disk, sparse where it is zero.
///
/// # Errors
/// The file cannot be made.
pub fn make_original(path: &Path, sectors: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = File::create(path)?;
    file.set_len(sectors * SECTOR as u64)?;
    for sector in 0..sectors {
        let content = original(sector);
        if content != Content::Zero {
            file.write_all_at(&content.bytes(sector), sector * SECTOR as u64)?;
        }
    }
    Ok(())
}

impl Expected {
    /// A copy of the original. With `keep_history` it can be asked about power cuts.
    pub fn new(sectors: u64, keep_history: bool) -> Self {
        let first = |sector| Version {
            content: original(sector),
            asked_ns: 0,
            answered_ns: Some(0),
            fua: true,
        };
        Self {
            sectors: (0..sectors).map(|s| Mutex::new(vec![first(s)])).collect(),
            flushes: Mutex::default(),
            keep_history,
        }
    }

    /// How many sectors it has.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    fn with<R>(&self, sector: u64, look: impl FnOnce(&mut Vec<Version>) -> R) -> R {
        let at = usize::try_from(sector).expect("a disk of these tests fits into memory");
        look(
            &mut self.sectors[at]
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// What the sector holds as long as nothing happens. Nothing may be in flight for it.
    pub fn now(&self, sector: u64) -> Content {
        self.with(sector, |versions| {
            versions.last().map_or(Content::Zero, |v| v.content.clone())
        })
    }

    /// Whether the sector was ever written.
    pub fn is_touched(&self, sector: u64) -> bool {
        self.with(sector, |versions| {
            versions.len() > 1 || versions[0].content != original(sector)
        })
    }

    /// A write is about to be sent.
    pub fn ask(&self, sector: u64, content: Content, fua: bool) {
        let asked_ns = now_ns();
        self.with(sector, |versions| {
            versions.push(Version {
                content,
                asked_ns,
                answered_ns: None,
                fua,
            });
        });
    }

    /// The last write of the sector was answered.
    pub fn answer(&self, sector: u64) {
        let now = now_ns();
        self.with(sector, |versions| {
            if let Some(last) = versions.last_mut() {
                last.answered_ns = Some(now);
            }
            if !self.keep_history {
                versions.drain(..versions.len() - 1);
            }
        });
    }

    /// A flush that was asked for at `asked_ns` is answered now.
    pub fn flushed(&self, asked_ns: u64) {
        if self.keep_history {
            let answered_ns = now_ns();
            self.flushes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(Flush {
                    asked_ns,
                    answered_ns,
                });
        }
    }

    /// Takes what was read from a sector after a kill: it must be the last version that was
    /// answered or one asked for since. From now on it is the one that counts.
    ///
    /// # Errors
    /// It is none of them.
    pub fn settle(&self, sector: u64, found: &[u8]) -> Result<(), Wrong> {
        self.with(sector, |versions| {
            let answered = versions.iter().rposition(|v| v.answered_ns.is_some());
            let from = answered.unwrap_or(0);
            // The newest that fits: two versions may have the same bytes.
            let fits = |v: &Version| v.content.bytes(sector)[..] == *found;
            let Some(at) = versions[from..].iter().rposition(fits) else {
                return Err(wrong(sector, found, &versions[from..]));
            };
            versions.truncate(from + at + 1);
            if let Some(last) = versions.last_mut()
                && last.answered_ns.is_none()
            {
                last.answered_ns = Some(now_ns());
            }
            if !self.keep_history {
                versions.drain(..versions.len() - 1);
            }
            Ok(())
        })
    }

    /// Checks what was read from a sector after a power cut at `cut_ns`.
    ///
    /// # Errors
    /// A version is gone that was flushed by then, or there is one that was not asked for yet.
    pub fn check_after_cut(&self, sector: u64, found: &[u8], cut_ns: u64) -> Result<(), Wrong> {
        let flushes = self.flushes.lock().unwrap_or_else(PoisonError::into_inner);
        self.with(sector, |versions| {
            let stable = |v: &Version| {
                v.answered_ns.is_some_and(|answered| {
                    answered <= cut_ns && v.fua
                        || flushes
                            .iter()
                            .any(|f| answered <= f.asked_ns && f.answered_ns <= cut_ns)
                })
            };
            let from = versions.iter().rposition(stable).unwrap_or(0);
            let end = versions
                .iter()
                .position(|v| v.asked_ns > cut_ns)
                .unwrap_or(versions.len());
            let allowed = &versions[from..end.max(from + 1)];
            if allowed
                .iter()
                .any(|v| v.content.bytes(sector)[..] == *found)
            {
                Ok(())
            } else {
                Err(wrong(sector, found, allowed))
            }
        })
    }

    /// Writes everything that is known to `path`, for who looks into a failure.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn dump(&self, path: &Path) -> Result<()> {
        let mut out = std::io::BufWriter::new(File::create(path)?);
        for sector in 0..self.sectors() {
            if self.is_touched(sector) {
                self.with(sector, |versions| -> std::io::Result<()> {
                    for v in versions.iter() {
                        writeln!(
                            out,
                            "{sector} {} asked {} answered {:?} fua {}",
                            describe(&v.content.bytes(sector)),
                            v.asked_ns,
                            v.answered_ns,
                            v.fua
                        )?;
                    }
                    Ok(())
                })?;
            }
        }
        for flush in &*self.flushes.lock().unwrap_or_else(PoisonError::into_inner) {
            writeln!(out, "flush {flush:?}")?;
        }
        out.flush()?;
        Ok(())
    }
}

fn wrong(sector: u64, found: &[u8], allowed: &[Version]) -> Wrong {
    let list: Vec<String> = allowed
        .iter()
        .map(|v| describe(&v.content.bytes(sector)))
        .collect();
    Wrong {
        sector,
        what: format!(
            "sector {sector} holds {}; allowed: {}",
            describe(found),
            list.join(", ")
        ),
    }
}

fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|b| *b == 0) {
        return "zeroes".into();
    }
    let word = |at: usize| {
        bytes
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    };
    format!(
        "\"sector {} generation {}\" ({:02x?}...)",
        word(0),
        word(8),
        &bytes[16..20.min(bytes.len())]
    )
}

/// Fails with the first few of `wrong`.
///
/// # Errors
/// There are any.
pub fn none_wrong(wrong: &[Wrong]) -> Result<()> {
    if wrong.is_empty() {
        return Ok(());
    }
    let first: Vec<&str> = wrong.iter().take(8).map(|w| w.what.as_str()).collect();
    bail!("{} sectors are wrong: {}", wrong.len(), first.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(generation: u64) -> [u8; SECTOR] {
        Content::Generation(generation).bytes(7)
    }

    #[test]
    fn an_answered_write_must_be_there_after_a_kill() {
        let disk = Expected::new(8, false);
        disk.ask(7, Content::Generation(1), false);
        disk.answer(7);
        disk.ask(7, Content::Generation(2), false);
        assert!(disk.settle(7, &original(7).bytes(7)).is_err());
        assert!(disk.settle(7, &bytes(1)).is_ok());
        // It was read: from now on the other one would be a change out of nowhere.
        assert!(disk.settle(7, &bytes(2)).is_err());
    }

    #[test]
    fn a_flushed_write_must_be_there_after_a_power_cut() {
        let disk = Expected::new(8, true);
        disk.ask(7, Content::Generation(1), false);
        disk.answer(7);
        let between = now_ns();
        let asked = now_ns();
        disk.flushed(asked);
        let after = now_ns();
        disk.ask(7, Content::Generation(2), true);
        let asked = now_ns();
        disk.answer(7);
        let old = original(7).bytes(7);
        assert!(disk.check_after_cut(7, &old, between).is_ok());
        assert!(disk.check_after_cut(7, &bytes(1), between).is_ok());
        assert!(disk.check_after_cut(7, &bytes(2), between).is_err());
        assert!(disk.check_after_cut(7, &old, after).is_err());
        assert!(disk.check_after_cut(7, &bytes(1), after).is_ok());
        assert!(disk.check_after_cut(7, &bytes(1), asked).is_ok());
        assert!(disk.check_after_cut(7, &bytes(2), asked).is_ok());
        assert!(disk.check_after_cut(7, &bytes(1), now_ns()).is_err());
    }
}
