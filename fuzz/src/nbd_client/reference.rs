//! The server's replies read once more, by other code than the product's: byte by byte into a map
//! of the disk. Believes whatever it can; it is for the product to have refused the rest.

use std::collections::HashMap;

use super::REGION;
use hikkoshi_nbd::client::Negotiated;
use hikkoshi_nbd::wire::{SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};

/// The disk as far as replies told of it.
pub struct Reference {
    bytes: HashMap<u64, u8>,
    wire_bytes: u64,
}

impl Reference {
    /// Reads what follows the handshake, as replies to these requests.
    pub fn read(sent: &[u8], negotiated: &Negotiated, requests: &[(u64, u32)]) -> Self {
        let mut this = Self {
            bytes: HashMap::new(),
            wire_bytes: sent.len() as u64,
        };
        let mut ended = vec![false; requests.len()];
        let mut rest = sent;
        while this
            .one(&mut rest, negotiated, requests, &mut ended)
            .is_some()
        {}
        this
    }

    /// The byte at `at`, if any reply told it.
    pub fn byte(&self, at: u64) -> Option<u8> {
        self.bytes.get(&at).copied()
    }

    /// How many bytes the server sent after the handshake.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    fn one(
        &mut self,
        rest: &mut &[u8],
        negotiated: &Negotiated,
        requests: &[(u64, u32)],
        ended: &mut [bool],
    ) -> Option<()> {
        let magic = number(take(rest, 4)?) as u32;
        let structured = match magic {
            SIMPLE_REPLY_MAGIC => false,
            STRUCTURED_REPLY_MAGIC if negotiated.structured => true,
            _ => return None,
        };
        let first = number(take(rest, 4)?) as u32;
        let cookie = usize::try_from(number(take(rest, 8)?)).ok()?;
        let (offset, len) = *requests.get(cookie)?;
        if std::mem::replace(&mut ended[cookie], !structured) {
            return None;
        }
        if !structured {
            if first == 0 {
                let data = take(rest, len as usize)?;
                self.put(offset, data.iter().copied());
            }
            return Some(());
        }
        let (flags, kind) = ((first >> 16) as u16, first as u16);
        let body_len = number(take(rest, 4)?) as usize;
        let mut body = take(rest, body_len)?;
        match kind {
            chunk::OFFSET_DATA => {
                let at = number(take(&mut body, 8)?);
                self.put(at, body.iter().copied());
            }
            chunk::OFFSET_HOLE => {
                let at = number(take(&mut body, 8)?);
                let len = number(take(&mut body, 4)?) as usize;
                // Longer ones than a question are refused, and no question is longer than that.
                self.put(at, std::iter::repeat_n(0, len.min(REGION as usize)));
            }
            _ => {}
        }
        ended[cookie] = flags & chunk::FLAG_DONE != 0;
        Some(())
    }

    fn put(&mut self, offset: u64, data: impl Iterator<Item = u8>) {
        for (n, byte) in data.enumerate() {
            self.bytes.insert(offset.wrapping_add(n as u64), byte);
        }
    }
}

fn take<'a>(rest: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (front, back) = rest.split_at_checked(len)?;
    *rest = back;
    Some(front)
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}
