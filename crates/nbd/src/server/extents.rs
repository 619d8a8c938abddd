//! Extents for BLOCK_STATUS, made legal (section "Block status reply chunk").
//!
//! Whoever knows what the disk holds pushes runs as it finds them, of any length. What comes out
//! lies within the request, has 32-bit lengths above zero, no two neighbours alike, one extent
//! where one was asked for, and no more than [`limits::STATUS_EXTENTS`].

use crate::limits;

/// The extents of one context, in answer to one request.
#[derive(Debug)]
pub struct StatusExtents {
    /// Bytes of the request that nothing is said of yet.
    left_bytes: u32,
    max_extents: usize,
    full: bool,
    extents: Vec<(u32, u32)>,
}

impl StatusExtents {
    /// For a request of `len` bytes that wants one extent only, or as many as there are.
    pub fn new(len: u32, one: bool) -> Self {
        Self::with_limit(len, if one { 1 } else { limits::STATUS_EXTENTS })
    }

    /// For a request of `len` bytes, to be answered with at most `max_extents` (at least one, at
    /// most [`limits::STATUS_EXTENTS`]). An answer may stop anywhere: the client asks again.
    pub fn with_limit(len: u32, max_extents: usize) -> Self {
        Self {
            left_bytes: len,
            max_extents: max_extents.clamp(1, limits::STATUS_EXTENTS),
            full: false,
            extents: Vec::new(),
        }
    }

    /// Adds the next run: `len` bytes, right behind the last one. What goes beyond the request is
    /// cut; a run of no bytes is passed over. Gives whether more is wanted.
    pub fn push(&mut self, len: u64, flags: u32) -> bool {
        if len == 0 || !self.wants_more() {
            return self.wants_more();
        }
        let len = u32::try_from(len).map_or(self.left_bytes, |len| len.min(self.left_bytes));
        let count = self.extents.len();
        match self.extents.last_mut() {
            // No sum of these overflows: together they are no longer than the request.
            Some((last_len, last_flags)) if *last_flags == flags => *last_len += len,
            _ if count == self.max_extents => {
                self.full = true;
                return false;
            }
            _ => self.extents.push((len, flags)),
        }
        self.left_bytes -= len;
        self.wants_more()
    }

    /// Whether there is something left to say, and room to say it.
    pub fn wants_more(&self) -> bool {
        !self.full && self.left_bytes > 0
    }

    /// Lengths in bytes and flags. Empty only if nothing was pushed: no legal answer, an error has
    /// to be sent instead.
    pub fn as_slice(&self) -> &[(u32, u32)] {
        &self.extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_of_one_kind_become_one() {
        let mut extents = StatusExtents::new(100, false);
        assert!(extents.push(10, 0));
        assert!(extents.push(20, 0));
        assert!(extents.push(0, 7));
        assert!(extents.push(30, 3));
        assert!(!extents.push(1000, 0));
        assert!(!extents.push(1000, 1));
        assert_eq!(extents.as_slice(), [(30, 0), (30, 3), (40, 0)]);
    }

    #[test]
    fn one_extent_is_as_long_as_it_goes_but_not_longer() {
        let mut extents = StatusExtents::new(4096, true);
        assert!(extents.push(512, 1));
        assert!(extents.push(512, 1));
        assert!(!extents.push(512, 0));
        assert!(!extents.push(512, 1), "a gap cannot be bridged");
        assert_eq!(extents.as_slice(), [(1024, 1)]);

        let mut extents = StatusExtents::new(4096, true);
        assert!(!extents.push(1 << 40, 1));
        assert_eq!(extents.as_slice(), [(4096, 1)]);
    }

    #[test]
    fn the_number_of_extents_is_bounded() {
        let mut extents = StatusExtents::with_limit(u32::MAX, usize::MAX);
        let mut pushed = 0_u32;
        while extents.push(1, pushed & 1) {
            pushed += 1;
        }
        assert_eq!(extents.as_slice().len(), limits::STATUS_EXTENTS);
    }

    /// CVE-2025-47711 (nbdkit): a disk's extent just above 32 bits, asked for with a length just
    /// below, made the answer longer than the field for it, and the server stopped in an assertion.
    #[test]
    fn cve_2025_47711_an_extent_longer_than_32_bits() {
        for len in [u64::from(u32::MAX), 1 << 32, (1 << 32) + 1, u64::MAX] {
            let mut extents = StatusExtents::new(u32::MAX, false);
            assert!(!extents.push(len, 0));
            assert_eq!(extents.as_slice(), [(u32::MAX, 0)]);
        }
    }

    /// CVE-2025-47712 (nbdkit, blocksize filter): rounding the length of a request near 4 GiB up
    /// to a block wrapped around to zero, and a loop over it never ended. Here a length is never
    /// rounded: what is left only shrinks, and ends at zero.
    #[test]
    fn cve_2025_47712_a_request_of_nearly_4_gib_ends() {
        let mut extents = StatusExtents::new(u32::MAX, false);
        let mut turns = 0;
        while extents.push(1 << 20, turns & 1) {
            turns += 1;
            assert!(turns < 4096);
        }
        let total: u64 = extents.as_slice().iter().map(|e| u64::from(e.0)).sum();
        assert_eq!(total, u64::from(u32::MAX));
    }

    proptest! {
        #[test]
        fn what_comes_out_is_legal_and_true(
            len in 1_u32..10_000,
            max in 1_usize..20,
            runs in prop::collection::vec((0_u64..3000, 0_u32..3), 0..40),
        ) {
            let mut extents = StatusExtents::with_limit(len, max);
            for (run, flags) in &runs {
                if !extents.push(*run, *flags) {
                    break;
                }
            }
            let got = extents.as_slice();
            prop_assert!(got.len() <= max);
            prop_assert!(got.iter().all(|e| e.0 > 0));
            prop_assert!(got.windows(2).all(|w| w[0].1 != w[1].1));
            let told: Vec<u32> = got
                .iter()
                .flat_map(|e| std::iter::repeat_n(e.1, e.0 as usize))
                .collect();
            let truth: Vec<u32> = runs
                .iter()
                .flat_map(|r| std::iter::repeat_n(r.1, usize::try_from(r.0).expect("below 3000")))
                .take(len as usize)
                .collect();
            prop_assert_eq!(&told[..], &truth[..told.len()]);
            prop_assert!(got.len() == max || told.len() == truth.len());
        }
    }
}
