//! How data came over the link lately: what `status` calls the codec.
//!
//! Each connection counts what its frames brought, by codec, and forgets what was long ago. A source
//! that chooses the effort by itself changes the level while it goes on, and sends what does not
//! compress as it is, in between: what is told is what most of it was.

use std::fmt;

use crate::transport::pack::Codec;

/// How many bytes of the disk count; what came before them counts less and less.
const MEMORY_BYTES: u64 = 1 << 20;

/// How bytes were coded on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// As they are.
    Raw,
    /// LZ4.
    Lz4,
    /// Zstandard, at this level if the source has told it.
    Zstd(Option<u8>),
}

impl Coding {
    /// Of a frame with data; `level` as the stream told it last.
    pub(super) fn of(codec: Option<Codec>, level: Option<u8>) -> Self {
        match codec {
            None => Self::Raw,
            Some(Codec::Lz4) => Self::Lz4,
            Some(Codec::Zstd) => Self::Zstd(level),
        }
    }
}

/// As `--compress` has it.
impl fmt::Display for Coding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raw => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(None) => f.write_str("zstd"),
            Self::Zstd(Some(level)) => write!(f, "zstd:{level}"),
        }
    }
}

/// What came lately, in bytes of the disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lately {
    raw: u64,
    lz4: u64,
    zstd: u64,
    level: Option<u8>,
}

impl Lately {
    /// So many bytes have come.
    pub fn came(&mut self, coding: Coding, bytes: u64) {
        match coding {
            Coding::Raw => self.raw += bytes,
            Coding::Lz4 => self.lz4 += bytes,
            Coding::Zstd(level) => {
                self.zstd += bytes;
                self.level = level;
            }
        }
        if self.raw + self.lz4 + self.zstd > MEMORY_BYTES {
            for sum in [&mut self.raw, &mut self.lz4, &mut self.zstd] {
                *sum /= 2;
            }
        }
    }

    /// Together with what came over another connection.
    pub fn and(self, other: Self) -> Self {
        let busier = if other.zstd > self.zstd { other } else { self };
        Self {
            raw: self.raw + other.raw,
            lz4: self.lz4 + other.lz4,
            zstd: self.zstd + other.zstd,
            level: busier.level,
        }
    }

    /// What most of it was; `None` while nothing has come.
    pub fn mostly(self) -> Option<Coding> {
        let most = self.raw.max(self.lz4).max(self.zstd);
        match most {
            0 => None,
            _ if most == self.zstd => Some(Coding::Zstd(self.level)),
            _ if most == self.lz4 => Some(Coding::Lz4),
            _ => Some(Coding::Raw),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUANTUM: u64 = 64 << 10;

    #[test]
    fn what_most_of_it_was_is_told_and_what_was_long_ago_is_forgotten() {
        let mut one = Lately::default();
        assert_eq!(one.mostly(), None);
        for n in 0..100 {
            let coding = match n % 4 {
                0 => Coding::Raw,
                _ => Coding::Zstd(Some(3)),
            };
            one.came(coding, QUANTUM);
        }
        assert_eq!(one.mostly(), Some(Coding::Zstd(Some(3))));
        one.came(Coding::Zstd(Some(6)), QUANTUM);
        assert_eq!(one.mostly(), Some(Coding::Zstd(Some(6))));
        for _ in 0..32 {
            one.came(Coding::Lz4, QUANTUM);
        }
        assert_eq!(one.mostly(), Some(Coding::Lz4));
    }

    #[test]
    fn connections_count_together() {
        let (mut one, mut two) = (Lately::default(), Lately::default());
        one.came(Coding::Raw, 2 * QUANTUM);
        one.came(Coding::Zstd(Some(1)), QUANTUM);
        two.came(Coding::Zstd(Some(9)), 2 * QUANTUM);
        assert_eq!(one.mostly(), Some(Coding::Raw));
        assert_eq!(one.and(two).mostly(), Some(Coding::Zstd(Some(9))));
        assert_eq!(two.and(one).mostly(), Some(Coding::Zstd(Some(9))));
        assert_eq!(two.and(Lately::default()).mostly(), two.mostly());
    }

    #[test]
    fn it_is_written_as_the_option_is() {
        let written = [
            (Coding::Raw, "none"),
            (Coding::Lz4, "lz4"),
            (Coding::Zstd(None), "zstd"),
            (Coding::Zstd(Some(19)), "zstd:19"),
        ];
        for (coding, text) in written {
            assert_eq!(coding.to_string(), text);
        }
    }
}
