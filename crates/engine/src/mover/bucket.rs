//! The cap on the background copy: a token bucket that may be overdrawn by one chunk.

use std::time::Duration;

/// How much of a second's worth may be saved up: small enough that the rate looks even.
pub(super) const BURST: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct TokenBucket {
    rate: Option<u64>,
    /// Bytes that may be sent; below zero after a chunk larger than what was there.
    level: i128,
    filled_at: Duration,
}

impl TokenBucket {
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            rate,
            level: 0,
            filled_at: Duration::ZERO,
        }
    }

    pub fn rate(&self) -> Option<u64> {
        self.rate
    }

    pub fn set_rate(&mut self, now: Duration, rate: Option<u64>) {
        self.rate = rate;
        self.level = 0;
        self.filled_at = now;
    }

    /// Whether a chunk may go now.
    pub fn has_room(&mut self, now: Duration) -> bool {
        let Some(rate) = self.rate else { return true };
        let elapsed = now.saturating_sub(self.filled_at).as_nanos();
        let earned =
            i128::try_from(u128::from(rate) * elapsed / 1_000_000_000).unwrap_or(i128::MAX);
        if earned > 0 {
            let most = i128::from(rate) * i128::try_from(BURST.as_millis()).unwrap_or(0) / 1000;
            self.level = (self.level + earned).min(most.max(1));
            self.filled_at = now;
        }
        self.level > 0
    }

    pub fn take(&mut self, bytes: u64) {
        if self.rate.is_some() {
            self.level -= i128::from(bytes);
        }
    }
}
