//! The guest's content: pseudo-random bytes that a seed names, and a checksum.
//!
//! Compiled twice, into the guest's workload and into the testkit, so that what the guest wrote
//! can be computed again outside of it. No dependencies, and no cryptography: it must be quick
//! under an emulated CPU, and only has to tell wrong, stale and misplaced bytes from right ones.

/// Spreads `x` over all 64 bits (the finaliser of SplitMix64).
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A stream of pseudo-random numbers.
pub struct Random(u64);

impl Random {
    /// The stream that `seed` names.
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, which must not be zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Fills `buffer` with the bytes that `seed` names.
pub fn fill(seed: u64, buffer: &mut [u8]) {
    let mut random = Random::new(seed);
    for chunk in buffer.chunks_mut(8) {
        let word = random.next().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

/// The bytes of one 512-byte sector of the sector file, for its `generation`-th write.
pub fn fill_sector(sector: u64, generation: u64, buffer: &mut [u8]) {
    fill(
        mix(sector) ^ generation.wrapping_mul(0xd6e8_feb8_6659_fd93),
        buffer,
    );
    // In plain, so that a person who looks at a dump sees what is there instead.
    buffer[..8].copy_from_slice(&sector.to_le_bytes());
    buffer[8..16].copy_from_slice(&generation.to_le_bytes());
}

/// A checksum over a stream of bytes.
pub struct Checksum {
    state: u64,
    len: u64,
}

impl Checksum {
    /// The checksum of nothing.
    pub fn new() -> Self {
        Self {
            state: 0x6869_6b6b_6f73_6869,
            len: 0,
        }
    }

    /// Takes more bytes in. All pieces but the last must be a multiple of 8 bytes long, for the
    /// result not to depend on where they were cut.
    pub fn update(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.split_at(bytes.len() - bytes.len() % 8);
        for word in words.chunks_exact(8) {
            let word = u64::from_le_bytes([
                word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7],
            ]);
            self.step(word);
        }
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            self.step(u64::from_le_bytes(word));
        }
        self.len += bytes.len() as u64;
    }

    fn step(&mut self, word: u64) {
        self.state = (self.state ^ word).wrapping_mul(0x9fb2_1c65_1e98_df25);
        self.state ^= self.state >> 32;
    }

    /// The checksum of all that was taken in.
    pub fn value(&self) -> u64 {
        mix(self.state ^ self.len)
    }

    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> u64 {
        let mut sum = Self::new();
        sum.update(bytes);
        sum.value()
    }
}

impl Default for Checksum {
    fn default() -> Self {
        Self::new()
    }
}
