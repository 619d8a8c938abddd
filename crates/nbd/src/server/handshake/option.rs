//! The payloads of options, read with suspicion.
//!
//! Every length inside a payload is checked against what is there; nothing is copied. Both
//! a payload that ends early and one that goes on after its end are malformed.

use super::Refusal;
use crate::limits;
use crate::wire::{self, MAX_STRING_BYTES, reply};

const MALFORMED: Refusal = Refusal {
    code: reply::ERR_INVALID,
    text: "lengths in the option do not agree",
};
const NAME_TOO_LONG: Refusal = Refusal {
    code: reply::ERR_TOO_BIG,
    text: "export name too long",
};
const NAME_NOT_UTF8: Refusal = Refusal {
    code: reply::ERR_INVALID,
    text: "export name is not UTF-8",
};
const QUERY_TOO_LONG: Refusal = Refusal {
    code: reply::ERR_TOO_BIG,
    text: "metadata context query too long",
};
const TOO_MANY_INFOS: Refusal = Refusal {
    code: reply::ERR_TOO_BIG,
    text: "too many information requests",
};

/// What stands before the payload of an option.
#[derive(Clone, Copy, Debug)]
pub(super) struct OptionHeader {
    pub option: u32,
    pub len_bytes: u32,
}

impl OptionHeader {
    /// `None` if the magic is wrong: the stream is out of step.
    pub fn parse(bytes: &[u8; wire::OPTION_BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u64().ok()? != wire::OPTION_MAGIC {
            return None;
        }
        Some(Self {
            option: fields.u32().ok()?,
            len_bytes: fields.u32().ok()?,
        })
    }
}

/// The payload of INFO and GO: a name, and the kinds of information that are wanted.
pub(super) struct Named<'a> {
    pub name: &'a str,
    /// 16-bit numbers, big-endian.
    kinds: &'a [u8],
}

impl<'a> Named<'a> {
    pub fn parse(payload: &'a [u8]) -> Result<Self, Refusal> {
        let mut fields = Fields(payload);
        let name = fields.export_name()?;
        let count = fields.u16()?;
        let kinds = fields.bytes(usize::from(count) * 2)?;
        fields.end()?;
        if count > limits::INFO_REQUESTS {
            return Err(TOO_MANY_INFOS);
        }
        Ok(Self { name, kinds })
    }

    pub fn asks_for(&self, kind: u16) -> bool {
        self.kinds.chunks_exact(2).any(|k| k == kind.to_be_bytes())
    }
}

/// The payload of LIST_META_CONTEXT and SET_META_CONTEXT: a name, and queries.
///
/// The queries stay as they came: each context is held against all of them, so that the answer is
/// bounded by the contexts there are, not by what was asked.
pub(super) struct MetaQuery<'a> {
    pub name: &'a str,
    /// How many queries there are, and their bytes: each a 32-bit length and a string.
    count: u32,
    queries: Fields<'a>,
}

impl<'a> MetaQuery<'a> {
    pub fn parse(payload: &'a [u8]) -> Result<Self, Refusal> {
        let mut fields = Fields(payload);
        let name = fields.export_name()?;
        let count = fields.u32()?;
        let queries = fields;
        // Ends with the payload, however large `count` is: each turn takes at least four bytes.
        for _ in 0..count {
            fields.string(QUERY_TOO_LONG)?;
        }
        fields.end()?;
        Ok(Self {
            name,
            count,
            queries,
        })
    }

    /// Whether LIST shows `context`: it is asked for by name, or its namespace is (`base:`), or
    /// nothing in particular is asked for.
    pub fn lists(&self, context: &str) -> bool {
        let namespace = context.find(':').map(|colon| &context[..=colon]);
        self.count == 0
            || self.any(|query| {
                query == context.as_bytes() || Some(query) == namespace.map(str::as_bytes)
            })
    }

    /// Whether SET chooses `context`: only by its full name. What is not known is passed over.
    pub fn selects(&self, context: &str) -> bool {
        self.any(|query| query == context.as_bytes())
    }

    /// What the client has to say first in frames; nothing if it says that more than once, since
    /// nobody could tell which it meant.
    pub fn opening(&self) -> Option<Vec<u8>> {
        let mut fields = self.queries;
        let mut found = None;
        while let Ok(query) = fields.string(QUERY_TOO_LONG) {
            if let Some(opening) = wire::opening_of(query)
                && found.replace(opening).is_some()
            {
                return None;
            }
        }
        found
    }

    fn any(&self, matches: impl Fn(&[u8]) -> bool) -> bool {
        let mut fields = self.queries;
        while let Ok(query) = fields.string(QUERY_TOO_LONG) {
            if matches(query) {
                return true;
            }
        }
        false
    }
}

/// Big-endian fields, taken one by one from the front.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], Refusal> {
        let (front, rest) = self.0.split_at_checked(len).ok_or(MALFORMED)?;
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let (front, rest) = self.0.split_first_chunk().ok_or(MALFORMED)?;
        self.0 = rest;
        Ok(*front)
    }

    fn u16(&mut self) -> Result<u16, Refusal> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Refusal> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Refusal> {
        self.array().map(u64::from_be_bytes)
    }

    /// A 32-bit length and as many bytes, at most [`MAX_STRING_BYTES`].
    fn string(&mut self, too_long: Refusal) -> Result<&'a [u8], Refusal> {
        let len = self.u32()? as usize;
        let bytes = self.bytes(len)?;
        if len > MAX_STRING_BYTES {
            return Err(too_long);
        }
        Ok(bytes)
    }

    fn export_name(&mut self) -> Result<&'a str, Refusal> {
        std::str::from_utf8(self.string(NAME_TOO_LONG)?).map_err(|_| NAME_NOT_UTF8)
    }

    fn end(&self) -> Result<(), Refusal> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(MALFORMED)
        }
    }
}
