//! What each client was promised, sector by sector.
//!
//! A sector's past is a list of values, each with the time in which it was being written. From
//! that follows what a read may see: whatever no newer write has certainly replaced. And what a
//! power cut may leave: whatever no flush has certainly put behind us. Times are numbers of
//! events; a request lasts from being asked to being answered, and takes effect somewhere in
//! between.
//!
//! - A write that was answered replaces all that had ended before it began. Two that overlap in
//!   time may have gone either way; a read that begins after both were answered tells which, and
//!   from then on it is settled.
//! - A write that failed, or whose answer the client never saw, may have happened or not, in each
//!   sector.
//! - A flush that was answered puts behind us all that had been replaced when it was asked for.
//!   A write with FUA does so for its own sectors.

use std::sync::Arc;

use crate::plan::SECTOR;

/// The bytes of a sector.
pub type Value = Arc<[u8; SECTOR]>;

/// When something happened, counted in events. Ends that have not come are at [`NEVER`].
pub type Time = u64;

/// Later than everything.
pub const NEVER: Time = Time::MAX;

#[derive(Debug)]
struct Entry {
    value: Value,
    /// The request that writes it; 0 for what was there before.
    by: u64,
    began: Time,
    ended: Time,
    /// It was answered with success.
    done: bool,
    /// No read that begins after this time may see it.
    unseen_from: Time,
    /// No flush that is asked for after this time leaves it to a power cut.
    replaced_at: Time,
    /// A flush has put it behind us: it can't come back, but reads under way may still tell of it.
    behind: bool,
}

/// A disk as its clients were promised it.
#[derive(Debug)]
pub struct Oracle {
    sectors: Vec<Vec<Entry>>,
    /// Sectors whose past is longer than one value; may name some that are not, never misses one.
    busy: Vec<usize>,
    oldest_read: Time,
}

fn base(value: Value, at: Time) -> Entry {
    Entry {
        value,
        by: 0,
        began: at,
        ended: at,
        done: true,
        unseen_from: NEVER,
        replaced_at: NEVER,
        behind: false,
    }
}

fn value_of(bytes: &[u8]) -> Value {
    Arc::new(bytes.try_into().expect("a whole sector"))
}

impl Oracle {
    /// A disk that holds `bytes`, durably.
    pub fn new(bytes: &[u8]) -> Self {
        let sectors = bytes
            .chunks_exact(SECTOR)
            .map(|sector| vec![base(value_of(sector), 0)])
            .collect();
        Self {
            sectors,
            busy: Vec::new(),
            oldest_read: NEVER,
        }
    }

    /// Reads that began earlier than this have all been answered.
    pub fn set_oldest_read(&mut self, oldest: Time) {
        self.oldest_read = oldest;
    }

    /// A request begins to write `value` to a sector.
    pub fn begin(&mut self, sector: usize, by: u64, value: Value, now: Time) {
        let past = &mut self.sectors[sector];
        if past.len() == 1 {
            self.busy.push(sector);
        }
        past.push(Entry {
            value,
            by,
            began: now,
            ended: NEVER,
            done: false,
            unseen_from: NEVER,
            replaced_at: NEVER,
            behind: false,
        });
    }

    /// All values that a request which changes part of a sector may start from.
    pub fn candidates(&self, sector: usize, now: Time) -> Vec<Value> {
        let mut values: Vec<Value> = Vec::new();
        for entry in &self.sectors[sector] {
            if entry.unseen_from >= now && !values.iter().any(|v| **v == *entry.value) {
                values.push(Arc::clone(&entry.value));
            }
        }
        values
    }

    /// Whether any request writes to the sector now.
    pub fn is_busy(&self, sector: usize) -> bool {
        self.sectors[sector].iter().any(|e| e.ended == NEVER)
    }

    /// The request wrote a sector, and was told so. `fua`: durably.
    pub fn written(&mut self, sector: usize, by: u64, fua: bool, now: Time) {
        let past = &mut self.sectors[sector];
        let mut began = NEVER;
        for entry in past.iter_mut().filter(|e| e.by == by) {
            entry.ended = now;
            entry.done = true;
            began = entry.began;
        }
        for entry in past.iter_mut().filter(|e| e.by != by) {
            if entry.ended < began {
                entry.unseen_from = entry.unseen_from.min(now);
                entry.replaced_at = entry.replaced_at.min(now);
                entry.behind |= fua;
            }
        }
        self.prune(sector);
    }

    /// The request failed, or nobody knows: it may have written the sector or not.
    pub fn uncertain(&mut self, sector: usize, by: u64, now: Time) {
        for entry in self.sectors[sector].iter_mut().filter(|e| e.by == by) {
            entry.ended = entry.ended.min(now);
        }
    }

    /// The request was refused before it changed anything.
    pub fn refused(&mut self, sector: usize, by: u64) {
        self.sectors[sector].retain(|e| e.by != by);
    }

    /// Others changed the sector, elsewhere and durably: the VM at the source.
    pub fn changed_elsewhere(&mut self, sector: usize, value: Value, now: Time) {
        let past = &mut self.sectors[sector];
        if past.len() == 1 {
            self.busy.push(sector);
        }
        for entry in past.iter_mut() {
            entry.unseen_from = entry.unseen_from.min(now);
            entry.replaced_at = entry.replaced_at.min(now);
            entry.behind = true;
        }
        past.push(base(value, now));
        self.prune(sector);
    }

    /// A flush that was asked for at `began` was answered.
    pub fn flushed(&mut self, began: Time) {
        let busy = std::mem::take(&mut self.busy);
        for &sector in &busy {
            for entry in &mut self.sectors[sector] {
                entry.behind |= entry.replaced_at < began;
            }
        }
        self.busy = busy;
        self.prune_all();
    }

    /// A read from `began` to `now` saw `bytes` at `from` of a sector. The error says what of it
    /// cannot be.
    pub fn read(
        &mut self,
        sector: usize,
        from: usize,
        bytes: &[u8],
        began: Time,
        now: Time,
    ) -> Result<(), String> {
        let past = &mut self.sectors[sector];
        let shows = |e: &Entry| e.value[from..from + bytes.len()] == *bytes;
        let seen: Vec<usize> = (0..past.len())
            .filter(|&n| past[n].unseen_from >= began && shows(&past[n]))
            .collect();
        if seen.is_empty() {
            let stale = past.iter().any(shows);
            return Err(format!(
                "a read of sector {sector} saw {} ({})",
                if stale {
                    "what a newer write had replaced"
                } else {
                    "what nobody had written there"
                },
                self.describe(sector)
            ));
        }
        // What it does not show, of all that had ended before it began, is replaced: for readers
        // at once, and for a flush if what replaced it is itself complete.
        let settled = seen.iter().all(|&n| past[n].done && past[n].ended < began);
        for entry in past.iter_mut() {
            if entry.ended < began && !shows(entry) {
                entry.unseen_from = entry.unseen_from.min(now);
                if settled {
                    entry.replaced_at = entry.replaced_at.min(now);
                }
            }
        }
        Ok(())
    }

    /// The process was killed: what was under way may have happened or not.
    pub fn interrupted(&mut self, now: Time) {
        for &sector in &self.busy {
            for entry in &mut self.sectors[sector] {
                entry.ended = entry.ended.min(now);
            }
        }
    }

    /// What a restart finds. After a kill every answered write must be there; after a power cut
    /// all that was flushed. From here on what was found is what is there, durably after a power
    /// cut.
    pub fn found(&mut self, bytes: &[u8], power_cut: bool, now: Time) -> Result<(), String> {
        for (sector, found) in bytes.chunks_exact(SECTOR).enumerate() {
            let past = &self.sectors[sector];
            let may = |e: &&Entry| {
                if power_cut {
                    !e.behind
                } else {
                    e.unseen_from >= now
                }
            };
            if past.iter().filter(may).any(|e| e.value[..] == *found) {
                continue;
            }
            let known = past.iter().any(|e| e.value[..] == *found);
            return Err(format!(
                "after {} sector {sector} holds {} ({})",
                if power_cut { "a power cut" } else { "a kill" },
                if known {
                    "an older value than was promised"
                } else {
                    "what nobody had written there"
                },
                self.describe(sector)
            ));
        }
        if power_cut {
            for sector in std::mem::take(&mut self.busy) {
                let found = &bytes[sector * SECTOR..(sector + 1) * SECTOR];
                self.sectors[sector] = vec![base(value_of(found), now)];
            }
        } else {
            let busy = self.busy.clone();
            for sector in busy {
                let found = &bytes[sector * SECTOR..(sector + 1) * SECTOR];
                self.read(sector, 0, found, now, now)?;
            }
        }
        Ok(())
    }

    fn describe(&self, sector: usize) -> String {
        let mut text = String::new();
        for e in &self.sectors[sector] {
            let time = |t: Time| {
                if t == NEVER {
                    "…".to_owned()
                } else {
                    t.to_string()
                }
            };
            text.push_str(&format!(
                "{}[by {} from {} to {}{}{}{}]",
                if text.is_empty() { "" } else { " " },
                e.by,
                e.began,
                time(e.ended),
                if e.done { "" } else { " uncertain" },
                if e.unseen_from == NEVER {
                    ""
                } else {
                    " replaced"
                },
                if e.behind { " flushed over" } else { "" },
            ));
        }
        text
    }

    /// Forgets what can be seen no more, by anybody.
    fn prune(&mut self, sector: usize) {
        let oldest = self.oldest_read;
        self.sectors[sector].retain(|e| !(e.behind && e.unseen_from < oldest));
    }

    fn prune_all(&mut self) {
        let mut busy = std::mem::take(&mut self.busy);
        busy.sort_unstable();
        busy.dedup();
        for &sector in &busy {
            self.prune(sector);
        }
        busy.retain(|&sector| self.sectors[sector].len() > 1);
        self.busy = busy;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(n: u8) -> Value {
        Arc::new([n; SECTOR])
    }

    fn disk() -> Oracle {
        Oracle::new(&[0; SECTOR])
    }

    fn see(oracle: &mut Oracle, n: u8, began: Time, now: Time) -> bool {
        oracle.read(0, 0, &[n; SECTOR], began, now).is_ok()
    }

    #[test]
    fn an_answered_write_is_seen_and_a_pending_one_may_be() {
        let mut oracle = disk();
        oracle.begin(0, 1, value(1), 1);
        assert!(see(&mut oracle, 0, 2, 3));
        assert!(see(&mut oracle, 1, 4, 5));
        assert!(!see(&mut oracle, 0, 6, 7), "it was seen, so it is there");
        oracle.written(0, 1, false, 8);
        assert!(!see(&mut oracle, 0, 9, 10));
        assert!(see(&mut oracle, 1, 9, 10));
        assert!(!see(&mut oracle, 2, 9, 10), "nobody wrote that");
    }

    #[test]
    fn of_two_at_once_either_wins_but_for_good() {
        let mut oracle = disk();
        oracle.begin(0, 1, value(1), 1);
        oracle.begin(0, 2, value(2), 2);
        oracle.written(0, 1, false, 3);
        oracle.written(0, 2, false, 4);
        assert!(see(&mut oracle, 1, 5, 6));
        assert!(!see(&mut oracle, 2, 7, 8));
        oracle.flushed(9);
        assert!(oracle.found(&[2; SECTOR], true, 10).is_err());
        assert!(oracle.found(&[1; SECTOR], true, 10).is_ok());
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_was_asked_for() {
        let mut oracle = disk();
        oracle.begin(0, 1, value(1), 1);
        oracle.written(0, 1, false, 2);
        oracle.begin(0, 2, value(2), 3);
        oracle.flushed(4);
        oracle.written(0, 2, false, 5);
        let mut lost_all = oracle.found(&[0; SECTOR], true, 6);
        assert!(lost_all.is_err(), "the flush was for nothing");
        lost_all = oracle.found(&[1; SECTOR], true, 6);
        assert!(lost_all.is_ok(), "the second write was not covered");
    }

    #[test]
    fn a_kill_keeps_what_was_answered_and_a_power_cut_need_not() {
        let mut oracle = disk();
        oracle.begin(0, 1, value(1), 1);
        oracle.written(0, 1, false, 2);
        assert!(oracle.found(&[0; SECTOR], false, 3).is_err());
        assert!(oracle.found(&[1; SECTOR], false, 3).is_ok());
        assert!(oracle.found(&[0; SECTOR], true, 4).is_ok());
    }

    #[test]
    fn fua_is_durable_by_itself_and_failure_is_neither() {
        let mut oracle = disk();
        oracle.begin(0, 1, value(1), 1);
        oracle.written(0, 1, true, 2);
        oracle.begin(0, 2, value(2), 3);
        oracle.uncertain(0, 2, 4);
        assert!(see(&mut oracle, 2, 5, 6));
        assert!(oracle.found(&[0; SECTOR], true, 7).is_err());
        assert!(oracle.found(&[1; SECTOR], true, 7).is_ok());
    }

    #[test]
    fn a_read_under_way_may_tell_of_what_was_flushed_over() {
        let mut oracle = disk();
        oracle.set_oldest_read(1);
        oracle.begin(0, 1, value(1), 2);
        oracle.written(0, 1, true, 3);
        assert!(see(&mut oracle, 0, 1, 4));
        assert!(!see(&mut oracle, 0, 4, 5));
    }
}
