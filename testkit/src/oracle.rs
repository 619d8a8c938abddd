//! A disk that is right: what was written to it, byte for byte, and what of it was flushed.
//!
//! Used as the other side of a comparison. Keeps everything in memory; knows no blocks.

use std::collections::BTreeMap;

/// What a disk must hold.
///
/// Bytes come in three kinds after a power cut: those that a flush covered must be there; those
/// written since then may be old or new. [`Oracle::allows_after_power_cut`] tells.
#[derive(Clone, Debug)]
pub struct Oracle {
    now: Vec<u8>,
    /// For each byte written since the last flush: all values it has had since then, the flushed
    /// one first.
    unflushed: BTreeMap<usize, Vec<u8>>,
}

impl Oracle {
    /// A disk that holds `bytes`, flushed.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            now: bytes,
            unflushed: BTreeMap::new(),
        }
    }

    /// What it holds now.
    pub fn bytes(&self) -> &[u8] {
        &self.now
    }

    /// A write. `offset + data.len()` must lie within the disk.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, new) in (offset..).zip(data) {
            let seen = self
                .unflushed
                .entry(at)
                .or_insert_with(|| vec![self.now[at]]);
            if !seen.contains(new) {
                seen.push(*new);
            }
            self.now[at] = *new;
        }
    }

    /// A zeroing, or a trim where trimmed bytes read as zero. The range must lie within the disk.
    pub fn zero(&mut self, offset: usize, len: usize) {
        self.write(offset, &vec![0; len]);
    }

    /// A flush: all that was written before it is there for ever.
    pub fn flush(&mut self) {
        self.unflushed.clear();
    }

    /// The first byte at which `disk`, read while the disk runs or after its server was killed,
    /// is wrong; `None` if it is right.
    pub fn difference(&self, disk: &[u8]) -> Option<usize> {
        if disk.len() != self.now.len() {
            return Some(disk.len().min(self.now.len()));
        }
        self.now
            .iter()
            .zip(disk)
            .position(|(right, got)| right != got)
    }

    /// The first byte at which `disk`, read after a power cut, holds something that it can not
    /// hold; `None` if all of it is allowed.
    pub fn allows_after_power_cut(&self, disk: &[u8]) -> Option<usize> {
        if disk.len() != self.now.len() {
            return Some(disk.len().min(self.now.len()));
        }
        self.now
            .iter()
            .zip(disk)
            .enumerate()
            .find_map(|(at, (right, got))| {
                let may = right == got
                    || self
                        .unflushed
                        .get(&at)
                        .is_some_and(|seen| seen.contains(got));
                (!may).then_some(at)
            })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn flushed_bytes_must_stay_and_others_may_go() {
        let mut oracle = Oracle::new(vec![0; 8]);
        oracle.write(2, &[5, 6]);
        oracle.flush();
        oracle.write(3, &[7]);
        assert_eq!(oracle.difference(&[0, 0, 5, 7, 0, 0, 0, 0]), None);
        assert_eq!(oracle.difference(&[0, 0, 5, 6, 0, 0, 0, 0]), Some(3));
        assert_eq!(
            oracle.allows_after_power_cut(&[0, 0, 5, 6, 0, 0, 0, 0]),
            None
        );
        assert_eq!(
            oracle.allows_after_power_cut(&[0, 0, 5, 0, 0, 0, 0, 0]),
            Some(3)
        );
        assert_eq!(
            oracle.allows_after_power_cut(&[0, 0, 0, 7, 0, 0, 0, 0]),
            Some(2)
        );
        assert_eq!(oracle.difference(&[0, 0, 5, 7]), Some(4));
        oracle.zero(0, 8);
        oracle.flush();
        assert_eq!(oracle.allows_after_power_cut(&[0; 8]), None);
    }
}
