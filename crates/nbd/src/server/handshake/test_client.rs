//! The client's side for the tests beside: options in, replies out, and exports to find.

use std::cell::Cell;

use super::{ExportInfo, Exports, Handshake, Outcome, Progress, Session};
use crate::wire::{self, export, handshake, option as opt, reply};

/// What a client that knows nothing newer sends after the greeting.
pub(super) const MODERN: u32 = handshake::C_FIXED_NEWSTYLE | handshake::C_NO_ZEROES;

/// Exports `disk` (also the default) and `other`, counting how often they are looked up.
#[derive(Default)]
pub(super) struct TwoExports {
    pub lookups: Cell<u32>,
    pub block_size_required: bool,
}

pub(super) fn disk(name: &str) -> ExportInfo {
    ExportInfo {
        canonical_name: name.to_owned(),
        description: "a disk".to_owned(),
        size_bytes: 1 << 30,
        flags: export::SEND_FLUSH | export::SEND_FUA,
        min_block: 1,
        preferred_block: 4096,
        max_payload: 1 << 20,
        block_size_required: false,
        contexts: vec![wire::BASE_ALLOCATION, wire::RESIDENCY, wire::TRANSPORT],
    }
}

impl Exports for TwoExports {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.lookups.set(self.lookups.get() + 1);
        let canonical = match name {
            "" | "disk" => "disk",
            "other" => "other",
            _ => return None,
        };
        let block_size_required = self.block_size_required;
        Some(ExportInfo {
            block_size_required,
            ..disk(canonical)
        })
    }

    fn is_awaited(&self, name: &str) -> bool {
        name == "later"
    }

    fn list(&self) -> Vec<(String, String)> {
        ["disk", "other"]
            .map(|name| (name.to_owned(), "a disk".to_owned()))
            .to_vec()
    }
}

/// The bytes of an option whose header tells the truth.
pub(super) fn option(option: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("tests send little");
    let mut bytes = option_header(option, len);
    bytes.extend_from_slice(payload);
    bytes
}

pub(super) fn option_header(option: u32, claimed_len: u32) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&claimed_len.to_be_bytes());
    bytes
}

/// A 32-bit length and a string.
pub(super) fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("tests send little");
    [&len.to_be_bytes()[..], text.as_bytes()].concat()
}

/// The payload of INFO and GO.
pub(super) fn named(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut payload = string(name);
    let count = u16::try_from(kinds.len()).expect("tests send little");
    payload.extend_from_slice(&count.to_be_bytes());
    payload.extend(kinds.iter().flat_map(|kind| kind.to_be_bytes()));
    payload
}

/// The payload of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut payload = string(name);
    let count = u32::try_from(queries.len()).expect("tests send little");
    payload.extend_from_slice(&count.to_be_bytes());
    payload.extend(queries.iter().flat_map(|query| string(query)));
    payload
}

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub option: u32,
    pub kind: u32,
    pub payload: Vec<u8>,
}

impl Reply {
    pub fn is_error(&self) -> bool {
        self.kind & reply::ERROR_BIT != 0
    }
}

/// Takes replies apart, and insists that there is nothing else.
pub(super) fn replies(mut bytes: &[u8]) -> Vec<Reply> {
    let mut replies = Vec::new();
    while !bytes.is_empty() {
        let (header, rest) = bytes.split_at(wire::OPTION_REPLY_BYTES);
        let word = |at: usize| {
            u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes of twenty"))
        };
        assert_eq!(header[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
        let (payload, rest) = rest.split_at(word(16) as usize);
        replies.push(Reply {
            option: word(8),
            kind: word(12),
            payload: payload.to_vec(),
        });
        bytes = rest;
    }
    replies
}

/// A handshake and its exports, with the greeting and the client's flags exchanged.
pub(super) struct Talk {
    pub server: Handshake,
    pub exports: TwoExports,
}

impl Talk {
    pub fn new() -> Self {
        Self::with_flags(MODERN)
    }

    pub fn with_flags(flags: u32) -> Self {
        let mut talk = Self {
            server: Handshake::new(),
            exports: TwoExports::default(),
        };
        assert_eq!(talk.server.output().len(), wire::GREETING_BYTES);
        talk.server.output().clear();
        let progress = talk.input(&flags.to_be_bytes());
        assert_eq!(progress.outcome, Outcome::NeedMore);
        talk
    }

    pub fn input(&mut self, bytes: &[u8]) -> Progress {
        self.server.input(bytes, &self.exports)
    }

    /// Sends an option that does not end the handshake; gives the replies.
    pub fn ask(&mut self, option_number: u32, payload: &[u8]) -> Vec<Reply> {
        let bytes = option(option_number, payload);
        let progress = self.input(&bytes);
        assert_eq!(progress.outcome, Outcome::NeedMore);
        assert_eq!(progress.consumed, bytes.len());
        let replies = replies(self.server.output());
        self.server.output().clear();
        assert!(replies.iter().all(|r| r.option == option_number));
        replies
    }

    /// Sends an option that is answered with a single reply; gives its kind.
    pub fn kind_of(&mut self, option_number: u32, payload: &[u8]) -> u32 {
        let replies = self.ask(option_number, payload);
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies[0].kind
    }

    /// Sends a GO that succeeds.
    pub fn go(&mut self, name: &str, kinds: &[u16]) -> (Session, Vec<Reply>) {
        let bytes = option(opt::GO, &named(name, kinds));
        let progress = self.input(&bytes);
        assert_eq!(progress.consumed, bytes.len());
        let Outcome::Begin(session) = progress.outcome else {
            panic!("{progress:?}");
        };
        let replies = replies(self.server.output());
        self.server.output().clear();
        (*session, replies)
    }
}
