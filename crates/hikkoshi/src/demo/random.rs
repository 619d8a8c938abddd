//! Numbers that look random and are the same in every run: what the demo's guest does next.

/// A generator (splitmix64): small, fast, good enough to choose offsets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence of its own for every seed.
    pub fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 when that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let wide = u128::from(self.next()) * bound as u128;
        usize::try_from(wide >> 64).expect("it is below a usize")
    }

    /// A number below `bound`, small ones far more often: the product of three, which gives the
    /// first percent a third of all picks, as hot data has it.
    pub fn skewed(&mut self, bound: usize) -> usize {
        let first = self.below(bound.max(1)) + 1;
        let second = self.below(first) + 1;
        self.below(second)
    }

    /// Fills `buf`.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }

    /// Puts `items` into another order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.below(end + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_items_are_hot_and_bounds_hold() {
        let mut random = Random::seeded(1);
        let picks: Vec<_> = (0..10_000).map(|_| random.skewed(1000)).collect();
        assert!(picks.iter().all(|&pick| pick < 1000));
        let hot = picks.iter().filter(|&&pick| pick < 100).count();
        assert!(hot > 5000, "{hot}");
        assert_eq!(random.below(0), 0);
        assert_eq!(random.skewed(0), 0);
    }
}
