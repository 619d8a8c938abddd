//! The fixed newstyle handshake, as a server holds it (section "Fixed newstyle negotiation").
//!
//! [`Handshake`] owns what was negotiated so far, the part of an option that has arrived, and the
//! bytes to send. It opens nothing: an export is looked up only once a client has named it.
//! It never keeps more of a client's bytes than [`limits::OPTION_KEPT_BYTES`], and takes not one
//! byte that belongs to the transmission phase.
//!
//! The caller's loop, with a blocking socket:
//!
//! ```text
//! loop {
//!     send(handshake.output()); handshake.output().clear();
//!     let progress = handshake.input(&received, exports);
//!     received.drain(..progress.consumed);
//!     match progress.outcome {
//!         NeedMore => receive more,
//!         SendFirst => {}                       // go round: send, then call again
//!         Close => send(handshake.output()), close,
//!         Begin(session) => send(handshake.output()), transmit; `received` may hold requests
//!     }
//! }
//! ```

mod answer;
mod option;

#[cfg(test)]
mod cve_tests;
#[cfg(test)]
mod test_client;
#[cfg(test)]
mod tests;

use crate::limits;
use crate::wire::{self, export, handshake, info, option as opt, reply};
use answer::Answers;
use option::{MetaQuery, Named, OptionHeader};

/// The exports a client can ask for.
pub trait Exports {
    /// The export that `name` chooses, the empty name being the default export. `None` if there is
    /// none. Called once an option has named it, never before; must not wait for anything.
    fn find(&self, name: &str) -> Option<ExportInfo>;

    /// Whether there is an export of this name that cannot be served yet, so that [`Exports::find`]
    /// does not have it. As above, it must not wait.
    fn is_awaited(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Names and descriptions (which may be empty) of the exports that clients may see.
    fn list(&self) -> Vec<(String, String)>;
}

/// The export that a client names, or what it is told in its place.
fn find(exports: &dyn Exports, name: &str) -> Result<ExportInfo, Refusal> {
    exports.find(name).ok_or_else(|| {
        if exports.is_awaited(name) {
            NOT_SERVED_YET
        } else {
            UNKNOWN_EXPORT
        }
    })
}

/// What a server tells of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its own name, whatever name it was found by.
    pub canonical_name: String,
    /// A line for people; empty for none.
    pub description: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Transmission flags (see [`export`]). HAS_FLAGS and SEND_DF are set and cleared here, by
    /// what was negotiated.
    pub flags: u16,
    /// The smallest unit of offsets and lengths, in bytes; a power of two. Requests that are not
    /// aligned to it are refused.
    pub min_block: u32,
    /// The unit that works best, in bytes; a power of two from 512.
    pub preferred_block: u32,
    /// The largest payload of a READ or WRITE, in bytes.
    pub max_payload: u32,
    /// Clients that do not ask for the block sizes are turned away.
    pub block_size_required: bool,
    /// The metadata contexts it has, in the order of their ids; among them
    /// [`wire::TRANSPORT`] if it may be had in frames.
    pub contexts: Vec<&'static str>,
}

/// A metadata context that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Its id on the wire.
    pub id: u32,
    /// Its name, one of [`ExportInfo::contexts`].
    pub name: &'static str,
}

/// What a handshake ended with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// The export's name as the client gave it; empty for the default one.
    pub export_name: String,
    /// The export as it was found, with the flags that the client was told.
    pub export: ExportInfo,
    /// READ and BLOCK_STATUS are answered with structured replies.
    pub structured: bool,
    /// The contexts that a BLOCK_STATUS reports, in order of id.
    pub contexts: Vec<Context>,
    /// What the client has said in frames already: it comes before all that follows. Empty unless
    /// [`Session::speaks_frames`].
    pub opening: Vec<u8>,
    /// The largest payload to accept: the export's if the client was told, otherwise at least
    /// what the protocol lets it assume.
    pub max_payload_bytes: u32,
}

impl Session {
    /// Whether frames follow, and no NBD: the client chose [`wire::TRANSPORT`].
    pub fn speaks_frames(&self) -> bool {
        self.contexts.iter().any(|c| c.name == wire::TRANSPORT)
    }
}

/// What came of some input.
#[derive(Debug, PartialEq, Eq)]
pub struct Progress {
    /// How many bytes of the input were used. The rest must be given again, or, after
    /// [`Outcome::Begin`], belongs to the transmission phase.
    pub consumed: usize,
    /// What to do next. Whatever it is, the output is to be sent first.
    pub outcome: Outcome,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All input was used; wait for more.
    NeedMore,
    /// Much output waits. Send and clear it, then call again with the input that is left.
    SendFirst,
    /// The connection is over. Send what there is and close.
    Close,
    /// The transmission phase begins.
    Begin(Box<Session>),
}

/// A handshake in progress.
#[derive(Debug)]
pub struct Handshake {
    stage: Stage,
    /// The part of the next header or payload that has arrived.
    held: Vec<u8>,
    output: Answers,
    options_seen: u32,
    fixed_newstyle: bool,
    no_zeroes: bool,
    structured: bool,
    /// The last SET_META_CONTEXT that succeeded.
    chosen: Option<Chosen>,
}

/// What a SET_META_CONTEXT has led to.
#[derive(Debug)]
struct Chosen {
    /// The export's name as given.
    export: String,
    contexts: Vec<Context>,
    opening: Vec<u8>,
}

/// What the next bytes are.
#[derive(Clone, Copy, Debug)]
enum Stage {
    ClientFlags,
    Header,
    Payload(OptionHeader),
    /// The payload of an option that is refused unread.
    Skip {
        option: u32,
        left_bytes: u32,
        refusal: Refusal,
    },
    Over,
}

/// An error reply to an option. The text is fixed: nothing a client sent is sent back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal {
    code: u32,
    text: &'static str,
}

/// What is to become of an option, as far as its header tells.
enum Plan {
    Read,
    Refuse(Refusal),
    Close,
}

/// Whether the machine can go on.
enum Step {
    Again,
    NeedMore,
    End(Outcome),
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// A new handshake. Its output holds the greeting already.
    pub fn new() -> Self {
        let mut output = Answers::default();
        output.greeting(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        Self {
            stage: Stage::ClientFlags,
            held: Vec::new(),
            output,
            options_seen: 0,
            fixed_newstyle: false,
            no_zeroes: false,
            structured: false,
            chosen: None,
        }
    }

    /// The bytes to send. Whoever has sent them clears them.
    pub fn output(&mut self) -> &mut Vec<u8> {
        self.output.bytes()
    }

    /// Takes bytes from the client, as many as it has use for.
    ///
    /// Output grows to at most [`limits::HANDSHAKE_OUTPUT_MAX_BYTES`], provided that it is cleared
    /// when [`Outcome::SendFirst`] says so. After [`Outcome::Close`] or [`Outcome::Begin`]
    /// nothing is taken any more, and the answer is `Close`.
    pub fn input(&mut self, bytes: &[u8], exports: &dyn Exports) -> Progress {
        let mut rest = bytes;
        let outcome = loop {
            if self.output.len() >= limits::HANDSHAKE_OUTPUT_BYTES {
                break Outcome::SendFirst;
            }
            match self.step(&mut rest, exports) {
                Step::Again => {}
                Step::NeedMore => break Outcome::NeedMore,
                Step::End(outcome) => {
                    self.stage = Stage::Over;
                    self.held = Vec::new();
                    break outcome;
                }
            }
        };
        Progress {
            consumed: bytes.len() - rest.len(),
            outcome,
        }
    }

    fn step(&mut self, rest: &mut &[u8], exports: &dyn Exports) -> Step {
        match self.stage {
            Stage::ClientFlags => match self.gather(rest) {
                Some(flags) => self.client_flags(u32::from_be_bytes(flags)),
                None => Step::NeedMore,
            },
            Stage::Header => match self.gather(rest) {
                Some(header) => self.header(&header),
                None => Step::NeedMore,
            },
            Stage::Payload(header) => {
                if !self.hold(rest, header.len_bytes as usize) {
                    return Step::NeedMore;
                }
                let payload = std::mem::take(&mut self.held);
                self.stage = Stage::Header;
                self.option(header.option, &payload, exports)
            }
            Stage::Skip {
                option,
                left_bytes,
                refusal,
            } => {
                let here = rest.len().min(left_bytes as usize);
                *rest = &rest[here..];
                let left_bytes =
                    left_bytes - u32::try_from(here).expect("not above left_bytes, a u32");
                if left_bytes > 0 {
                    self.stage = Stage::Skip {
                        option,
                        left_bytes,
                        refusal,
                    };
                    return Step::NeedMore;
                }
                self.stage = Stage::Header;
                self.output.error(option, refusal);
                Step::Again
            }
            Stage::Over => Step::End(Outcome::Close),
        }
    }

    /// Moves input to `held` until that has `len` bytes; whether it has.
    fn hold(&mut self, rest: &mut &[u8], len: usize) -> bool {
        let missing = len - self.held.len();
        let (taken, left) = rest.split_at(missing.min(rest.len()));
        self.held.extend_from_slice(taken);
        *rest = left;
        self.held.len() == len
    }

    /// The next `N` bytes, once they are all there.
    fn gather<const N: usize>(&mut self, rest: &mut &[u8]) -> Option<[u8; N]> {
        if !self.hold(rest, N) {
            return None;
        }
        let bytes = self.held.as_slice().try_into().ok();
        self.held.clear();
        bytes
    }

    /// Flags that are not known close the connection (section "Newstyle negotiation").
    fn client_flags(&mut self, flags: u32) -> Step {
        if flags & !(handshake::C_FIXED_NEWSTYLE | handshake::C_NO_ZEROES) != 0 {
            return Step::End(Outcome::Close);
        }
        self.fixed_newstyle = flags & handshake::C_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & handshake::C_NO_ZEROES != 0;
        self.stage = Stage::Header;
        Step::Again
    }

    fn header(&mut self, bytes: &[u8; wire::OPTION_BYTES]) -> Step {
        let Some(header) = OptionHeader::parse(bytes) else {
            return Step::End(Outcome::Close);
        };
        self.options_seen += 1;
        if self.options_seen > limits::OPTIONS {
            return Step::End(Outcome::Close);
        }
        // A client of the older newstyle knows one option, and understands no reply to another.
        if !self.fixed_newstyle && header.option != opt::EXPORT_NAME {
            return Step::End(Outcome::Close);
        }
        // Choosing contexts again discards the first choice, even if the second one fails.
        if header.option == opt::SET_META_CONTEXT {
            self.chosen = None;
        }
        self.stage = match plan(header) {
            Plan::Read => Stage::Payload(header),
            Plan::Refuse(refusal) => Stage::Skip {
                option: header.option,
                left_bytes: header.len_bytes,
                refusal,
            },
            Plan::Close => return Step::End(Outcome::Close),
        };
        Step::Again
    }

    /// Handles an option whose payload is complete.
    fn option(&mut self, option: u32, payload: &[u8], exports: &dyn Exports) -> Step {
        let answered = match option {
            opt::EXPORT_NAME => return Step::End(self.export_name(payload, exports)),
            opt::ABORT => {
                self.output.ack(option);
                return Step::End(Outcome::Close);
            }
            opt::GO => match self.go(payload, exports) {
                Ok(session) => return Step::End(Outcome::Begin(Box::new(session))),
                Err(refusal) => Err(refusal),
            },
            opt::INFO => self.info(option, payload, exports).map(|_| ()),
            opt::LIST => self.output.list(&exports.list()),
            opt::STRUCTURED_REPLY => {
                self.structured = true;
                Ok(())
            }
            opt::LIST_META_CONTEXT => self.list_contexts(payload, exports),
            opt::SET_META_CONTEXT => self.set_contexts(payload, exports),
            _ => Err(UNSUPPORTED),
        };
        match answered {
            Ok(()) => self.output.ack(option),
            Err(refusal) => self.output.error(option, refusal),
        }
        Step::Again
    }

    /// EXPORT_NAME has no reply for a failure but the end of the connection.
    fn export_name(&mut self, payload: &[u8], exports: &dyn Exports) -> Outcome {
        let Ok(name) = std::str::from_utf8(payload) else {
            return Outcome::Close;
        };
        let Some(info) = exports.find(name).filter(|info| !info.block_size_required) else {
            return Outcome::Close;
        };
        let mut session = self.session(name, info, false);
        // A client that wants frames uses GO.
        session.contexts.retain(|c| c.name != wire::TRANSPORT);
        session.opening.clear();
        self.output.export_name(
            session.export.size_bytes,
            session.export.flags,
            !self.no_zeroes,
        );
        Outcome::Begin(Box::new(session))
    }

    /// GO is INFO, and the end of the handshake if that succeeds.
    fn go(&mut self, payload: &[u8], exports: &dyn Exports) -> Result<Session, Refusal> {
        let (name, info, told_block_size) = self.info(opt::GO, payload, exports)?;
        self.output.ack(opt::GO);
        Ok(self.session(&name, info, told_block_size))
    }

    /// Answers INFO or GO up to the final ACK. Gives the name as sent, the export, and whether its
    /// block sizes were among what was told.
    fn info(
        &mut self,
        option: u32,
        payload: &[u8],
        exports: &dyn Exports,
    ) -> Result<(String, ExportInfo, bool), Refusal> {
        let named = Named::parse(payload)?;
        let found = find(exports, named.name)?;
        let told_block_size = named.asks_for(info::BLOCK_SIZE);
        let sizes = [found.min_block, found.preferred_block, found.max_payload];
        if found.block_size_required && !told_block_size {
            // Told with the refusal, which saves the client a round trip.
            self.output.info_block_size(option, sizes);
            return Err(BLOCK_SIZE_REQUIRED);
        }
        self.output
            .info_export(option, found.size_bytes, self.told_flags(&found));
        if named.asks_for(info::NAME) {
            self.output
                .info_text(option, info::NAME, &found.canonical_name);
        }
        if named.asks_for(info::DESCRIPTION) && !found.description.is_empty() {
            self.output
                .info_text(option, info::DESCRIPTION, &found.description);
        }
        if told_block_size {
            self.output.info_block_size(option, sizes);
        }
        Ok((named.name.to_owned(), found, told_block_size))
    }

    fn list_contexts(&mut self, payload: &[u8], exports: &dyn Exports) -> Result<(), Refusal> {
        let query = MetaQuery::parse(payload)?;
        let found = find(exports, query.name)?;
        for name in found.contexts {
            // A client that chooses whatever is listed must not end up without NBD.
            if name != wire::TRANSPORT && query.lists(name) {
                // The id means nothing here; the document asks for zero.
                self.output
                    .meta_context(opt::LIST_META_CONTEXT, Context { id: 0, name });
            }
        }
        Ok(())
    }

    fn set_contexts(&mut self, payload: &[u8], exports: &dyn Exports) -> Result<(), Refusal> {
        if !self.structured {
            return Err(STRUCTURED_FIRST);
        }
        let query = MetaQuery::parse(payload)?;
        let found = find(exports, query.name)?;
        let contexts: Vec<Context> = (1..)
            .zip(found.contexts)
            .map(|(id, name)| Context { id, name })
            .filter(|context| query.selects(context.name))
            .collect();
        for context in &contexts {
            self.output.meta_context(opt::SET_META_CONTEXT, *context);
        }
        let frames = contexts.iter().find(|c| c.name == wire::TRANSPORT);
        let opening = frames.and_then(|frames| Some((frames.id, query.opening()?)));
        if let Some((id, _)) = opening {
            // Like the frames themselves it reports nothing, and needs no id of its own.
            let name = wire::OPENING;
            self.output
                .meta_context(opt::SET_META_CONTEXT, Context { id, name });
        }
        self.chosen = Some(Chosen {
            export: query.name.to_owned(),
            contexts,
            opening: opening.map(|(_, opening)| opening).unwrap_or_default(),
        });
        Ok(())
    }

    /// The flags as this client may see them: DF exists only with structured replies.
    fn told_flags(&self, info: &ExportInfo) -> u16 {
        let df = if self.structured { export::SEND_DF } else { 0 };
        (info.flags & !export::SEND_DF) | df | export::HAS_FLAGS
    }

    fn session(&mut self, name: &str, mut export: ExportInfo, told_block_size: bool) -> Session {
        export.flags = self.told_flags(&export);
        // Contexts are chosen for one export, by the name as sent; they say nothing of another.
        let chosen = self.chosen.take().filter(|chosen| chosen.export == name);
        let (contexts, opening) =
            chosen.map_or_else(Default::default, |chosen| (chosen.contexts, chosen.opening));
        let max_payload_bytes = if told_block_size {
            export.max_payload
        } else {
            export.max_payload.max(wire::MAX_PAYLOAD_BYTES)
        };
        Session {
            export_name: name.to_owned(),
            export,
            structured: self.structured,
            contexts,
            opening,
            max_payload_bytes,
        }
    }
}

/// Decides by an option's header alone: whether its payload is worth reading.
fn plan(header: OptionHeader) -> Plan {
    let OptionHeader { option, len_bytes } = header;
    if len_bytes > limits::OPTION_SKIPPED_BYTES {
        return Plan::Close;
    }
    let too_long = len_bytes > limits::OPTION_KEPT_BYTES;
    match option {
        // It cannot be refused: there is no reply that says so.
        opt::EXPORT_NAME if len_bytes as usize > limits::EXPORT_NAME_BYTES => Plan::Close,
        opt::EXPORT_NAME => Plan::Read,
        opt::LIST | opt::STRUCTURED_REPLY if len_bytes > 0 => Plan::Refuse(NO_DATA_EXPECTED),
        opt::ABORT if too_long => Plan::Close,
        opt::INFO | opt::GO | opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT if too_long => {
            Plan::Refuse(TOO_LONG)
        }
        opt::ABORT
        | opt::LIST
        | opt::STRUCTURED_REPLY
        | opt::INFO
        | opt::GO
        | opt::LIST_META_CONTEXT
        | opt::SET_META_CONTEXT => Plan::Read,
        // STARTTLS and EXTENDED_HEADERS are among these until there is an implementation.
        _ => Plan::Refuse(UNSUPPORTED),
    }
}

const UNSUPPORTED: Refusal = Refusal {
    code: reply::ERR_UNSUP,
    text: "option not supported",
};
const NO_DATA_EXPECTED: Refusal = Refusal {
    code: reply::ERR_INVALID,
    text: "option takes no data",
};
const TOO_LONG: Refusal = Refusal {
    code: reply::ERR_TOO_BIG,
    text: "option too long",
};
const UNKNOWN_EXPORT: Refusal = Refusal {
    code: reply::ERR_UNKNOWN,
    text: "no such export",
};
/// Not "unknown", after which a client may take it for a mistake in the name.
const NOT_SERVED_YET: Refusal = Refusal {
    code: reply::ERR_POLICY,
    text: "this export is not served yet: try again; hikkoshi status, at the server, says what it \
           waits for",
};
const BLOCK_SIZE_REQUIRED: Refusal = Refusal {
    code: reply::ERR_BLOCK_SIZE_REQD,
    text: "ask for the block sizes of this export",
};
const STRUCTURED_FIRST: Refusal = Refusal {
    code: reply::ERR_INVALID,
    text: "metadata contexts need structured replies first",
};
