//! What the daemon sent in transmission, read with our own client's decoder where that knows the
//! command, and by the protocol's tables where it does not.

use std::collections::HashMap;

use hikkoshi_nbd::client::{ClientError, ClientErrorKind, Header, Outcome, Reply, Step};
use hikkoshi_nbd::server::{Request, Session};
use hikkoshi_nbd::wire::{self, chunk, command};

/// The extents of one context.
#[derive(Debug, PartialEq, Eq)]
pub struct StatusChunk {
    /// Its id.
    pub context: u32,
    /// Lengths and flags.
    pub extents: Vec<(u32, u32)>,
}

/// How a request was answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done, nothing to tell.
    Done,
    /// Failed, with this number on the wire.
    Error(u32),
    /// The bytes of a read.
    Data(Vec<u8>),
    /// The chunks of a block status, in order.
    Status(Vec<StatusChunk>),
}

/// A reply of which something has come.
struct Begun {
    reply: Reply,
    data: Vec<u8>,
    status: Vec<StatusChunk>,
}

/// All answers of a connection.
pub struct Replies(Vec<Option<Answer>>);

/// Bytes from the front.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
    }
}

impl Replies {
    /// Reads everything that was sent. Panics at what no server may send; an answer that is cut
    /// off is allowed only if `may_be_cut`.
    pub fn parse(sent: &[u8], session: &Session, asked: &[Request], may_be_cut: bool) -> Self {
        let mut this = Self((0..asked.len()).map(|_| None).collect());
        let mut begun = HashMap::new();
        let mut bytes = Bytes(sent);
        while this.one(&mut bytes, session, asked, &mut begun).is_some() {}
        assert!(
            may_be_cut || (bytes.0.is_empty() && begun.is_empty()),
            "the last answer is cut off"
        );
        this
    }

    /// The answer of request `n`.
    pub fn answer(&self, n: usize) -> Option<&Answer> {
        self.0[n].as_ref()
    }

    /// One simple reply or chunk; `None` at the end, also in the middle of one.
    fn one(
        &mut self,
        bytes: &mut Bytes<'_>,
        session: &Session,
        asked: &[Request],
        begun: &mut HashMap<u64, Begun>,
    ) -> Option<()> {
        let (header, len) = Header::decode(bytes.0, session.structured).expect("a reply")?;
        let mut rest = Bytes(&bytes.0[len..]);
        let (Header::Simple { cookie, .. } | Header::Chunk { cookie, .. }) = header;
        let request = asked
            .get(usize::try_from(cookie).unwrap())
            .expect("an answer to what nobody asked");
        let place = usize::try_from(cookie).unwrap();
        assert!(
            self.0[place].is_none(),
            "request {cookie} was answered twice"
        );
        let is_simple = matches!(header, Header::Simple { .. });
        assert!(
            is_simple != session.structured,
            "the style that was not agreed on"
        );
        let is_read = request.command == command::READ;
        let state = begun.entry(cookie).or_insert_with(|| {
            let len = if is_read { request.len } else { 0 };
            Begun {
                reply: Reply::to_read(request.offset, len, session.structured),
                data: vec![0; len as usize],
                status: Vec::new(),
            }
        });
        let mut done = false;
        if let Header::Chunk { chunk: head, .. } = header
            && head.kind == chunk::BLOCK_STATUS
        {
            assert_eq!(
                request.command,
                command::BLOCK_STATUS,
                "extents for nothing"
            );
            state
                .status
                .push(status_chunk(rest.take(head.len as usize)?));
            done = head.flags & chunk::FLAG_DONE != 0;
        } else {
            let legal = "a reply that our own client takes";
            let mut step = match header {
                Header::Simple { error, .. } => state.reply.on_simple(error).expect(legal),
                Header::Chunk { chunk, .. } => state.reply.on_chunk(chunk).expect(legal),
            };
            if let Step::Body(len) = step {
                step = state.reply.on_body(rest.take(len)?).expect(legal);
            }
            if let Step::Data { at, len } = step {
                let (at, len) = (at as usize, len as usize);
                state.data[at..at + len].copy_from_slice(rest.take(len)?);
            }
        }
        *bytes = rest;
        if done || state.reply.is_done() {
            let state = begun.remove(&cookie).expect("just looked at");
            self.0[place] = Some(state.finish(is_read && request.len > 0));
        }
        Some(())
    }
}

impl Begun {
    fn finish(self, is_read: bool) -> Answer {
        if !self.status.is_empty() {
            return Answer::Status(self.status);
        }
        match self.reply.finish() {
            Ok(Outcome::Read(_)) if is_read => Answer::Data(self.data),
            Ok(_) => Answer::Done,
            Err(ClientError::Request { errno, .. }) => Answer::Error(errno.code()),
            Err(error) if error.kind() == ClientErrorKind::Refused => panic!("{error}"),
            Err(error) => panic!("a reply that our own client does not take: {error}"),
        }
    }
}

fn status_chunk(body: &[u8]) -> StatusChunk {
    let word = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().unwrap());
    assert!(
        body.len() >= 12 && body.len() % 8 == 4,
        "a malformed status chunk"
    );
    StatusChunk {
        context: word(0),
        extents: (4..body.len())
            .step_by(8)
            .map(|at| (word(at), word(at + 4)))
            .collect(),
    }
}

/// One chunk for each context, in order, with extents as the protocol wants them.
pub fn check_status(told: &[StatusChunk], session: &Session, len: u32, one: bool) {
    let ids: Vec<u32> = told.iter().map(|chunk| chunk.context).collect();
    let agreed: Vec<u32> = session.contexts.iter().map(|context| context.id).collect();
    assert_eq!(ids, agreed, "not one chunk for each context");
    for (chunk, context) in told.iter().zip(&session.contexts) {
        let known = if context.name == wire::RESIDENCY {
            2
        } else {
            3
        };
        let mut left = u64::from(len);
        for (len, flags) in &chunk.extents {
            assert!(
                *len > 0 && left > 0,
                "an extent that is empty or past the end"
            );
            assert!(*flags <= known, "an unknown flag {flags:#x}");
            left = left.saturating_sub((*len).into());
        }
        if one {
            let total: u64 = chunk.extents.iter().map(|(len, _)| u64::from(*len)).sum();
            assert!(
                chunk.extents.len() == 1 && total <= len.into(),
                "REQ_ONE was not heeded"
            );
        }
    }
}
