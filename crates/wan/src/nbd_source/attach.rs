//! What is said of a move over a connection of ours: one message, one answer, in turn.
//!
//! Every connection says first for which move it reads ([`Ticket`]), so that a source which must not
//! be read from any more can refuse. What else there is to say of the move goes over a connection of
//! its own ([`MoveLine`]), where waiting for the answer holds nobody up.

use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::Socket;

use super::address::NbdSourceConfig;
use super::dial::{dial, receive_exactly, send_all};
use crate::source::{SourceError, SourceErrorKind};
use crate::transport::session::{Attached, MoveId, Stance, Tell, Told};
use crate::transport::{HEADER_BYTES, Header, Kind, Priority, limits};

/// Who reads, and what the source has said to that. Shared by all connections of a move.
#[derive(Debug)]
pub struct Ticket {
    id: MoveId,
    base: Option<MoveId>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stance: Stance,
    required: bool,
    /// Nothing is said: the source did not know of moves when this one began.
    silent: bool,
    epoch: u64,
    attached: Option<Attached>,
}

impl Ticket {
    /// For a move. `base`: the disk is here as it was at the handoff to that volume. `required`:
    /// a source that does not know of moves is refused.
    pub fn new(id: MoveId, base: Option<MoveId>, stance: Stance, required: bool) -> Arc<Self> {
        Arc::new(Self {
            id,
            base,
            state: Mutex::new(State {
                stance,
                required,
                silent: false,
                epoch: 0,
                attached: None,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The move.
    pub fn id(&self) -> MoveId {
        self.id
    }

    /// The old copy that is here, if one is.
    pub fn base(&self) -> Option<MoveId> {
        self.base
    }

    /// The handoff is behind us.
    pub fn arrived(&self) {
        let mut state = self.state();
        state.stance = Stance::Arriving;
        state.required = true;
    }

    /// What the source said last; `None`: it does not know of moves, or was never reached.
    pub fn attached(&self) -> Option<Attached> {
        self.state().attached
    }

    /// The first connection stands: from here on a source that knows of moves is held to it, and
    /// with another nothing is said of any. Tells which it is.
    pub fn settle(&self) -> bool {
        let mut state = self.state();
        let knows = state.attached.is_some();
        state.required |= knows;
        state.silent = !knows;
        knows
    }

    /// From here on nothing is said of the move.
    pub fn fall_silent(&self) {
        self.state().silent = true;
    }

    fn is_silent(&self) -> bool {
        self.state().silent
    }

    fn is_required(&self) -> bool {
        self.state().required
    }

    /// Who reads: what is said first over every connection.
    pub fn tell(&self) -> Tell {
        let state = self.state();
        Tell::Attach {
            id: self.id,
            stance: state.stance,
            epoch: state.epoch,
            base: self.base,
        }
    }

    /// What the source has said to [`Ticket::tell`].
    pub fn was_told(&self, attached: Attached) {
        let mut state = self.state();
        state.epoch = attached.epoch;
        state.attached = Some(attached);
    }
}

/// Says over a fresh connection for which move it is.
pub(super) fn attach(
    socket: &Socket,
    config: &NbdSourceConfig,
    size_bytes: u64,
    speaks_frames: bool,
) -> Result<(), SourceError> {
    let Some(ticket) = config.ticket.as_ref().filter(|t| !t.is_silent()) else {
        return Ok(());
    };
    let uri = config.shown_uri();
    if !speaks_frames {
        if ticket.is_required() {
            let message = format!(
                "{uri}: what answers there does not speak frames any more, and so cannot keep the \
                 fence that this move relies on; serve the disk with hikkoshi there again"
            );
            return Err(SourceError::new(SourceErrorKind::Untrusted, message));
        }
        return Ok(());
    }
    let patience = config.handshake_timeout;
    match exchange(socket, &ticket.tell(), size_bytes, patience) {
        Ok(Told::Attached(attached)) => {
            ticket.was_told(attached);
            Ok(())
        }
        Ok(Told::Refused(why)) => {
            let message = format!("{uri}: {why}");
            Err(SourceError::new(SourceErrorKind::Untrusted, message))
        }
        Ok(_) => {
            let message = format!("{uri}: an answer to something else was given");
            Err(SourceError::new(SourceErrorKind::Untrusted, message))
        }
        Err(error) => {
            let message = format!("{uri}: saying for which move it is failed: {error}");
            Err(SourceError::new(SourceErrorKind::Disconnected, message))
        }
    }
}

/// Sends a message and waits for its answer.
pub(super) fn exchange(
    socket: &Socket,
    tell: &Tell,
    size_bytes: u64,
    patience: Duration,
) -> io::Result<Told> {
    say(socket, tell)?;
    hear(socket, size_bytes, Instant::now() + patience)
}

fn say(socket: &Socket, tell: &Tell) -> io::Result<()> {
    let payload = tell.encode();
    let header = Header::request(Kind::Tell, Priority::DEMAND, 0, 0, 0).with_payload(&payload);
    send_all(socket, &[&header.encode()[..], &payload].concat())
}

fn hear(socket: &Socket, size_bytes: u64, deadline: Instant) -> io::Result<Told> {
    let broken = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut told = Vec::new();
    loop {
        let bytes = receive_exactly(socket, HEADER_BYTES, deadline)?;
        let bytes = bytes.first_chunk().ok_or_else(|| broken("a cut header"))?;
        let header = Header::decode(bytes).map_err(io::Error::other)?;
        let len = usize::try_from(header.payload_len).map_err(io::Error::other)?;
        if header.kind != Kind::Told || told.len() + len > limits::TOLD_BYTES {
            return Err(broken("an answer that is none"));
        }
        let payload = receive_exactly(socket, len, deadline)?;
        header.check_payload(&payload).map_err(io::Error::other)?;
        told.extend_from_slice(&payload);
        if header.last {
            let told = Told::decode(&told, size_bytes);
            return told.ok_or_else(|| broken("an answer that makes no sense"));
        }
    }
}

/// Where a destination talks to its source about the move.
pub trait MoveLink: Send + Sync {
    /// Says something and waits for the answer, for at most `patience`.
    ///
    /// # Errors
    /// The source cannot be reached, or refuses. What was said may have been heard all the same.
    fn tell(&self, tell: &Tell, patience: Duration) -> Result<Told, SourceError>;

    /// Ends what is waited for now; what is said next may get through.
    fn interrupt(&self);

    /// Ends whatever is waited for, for good.
    fn hang_up(&self);
}

/// A connection for that, dialled when it is needed.
pub struct MoveLine {
    config: NbdSourceConfig,
    /// Held while something is said.
    turn: Mutex<()>,
    /// Held while an answer is awaited. Taken before `turn` is let go of, so that answers are read in
    /// the order of what was said, and nothing waits for another answer before it is said: a handoff
    /// takes one round trip, and not also what is left of that of the last question.
    hearing: Mutex<()>,
    socket: Mutex<Line>,
}

#[derive(Default)]
struct Line {
    socket: Option<(Arc<Socket>, u64)>,
    dialing: Option<Arc<Socket>>,
    closed: bool,
}

impl MoveLine {
    /// To the server of `config`.
    pub fn new(config: NbdSourceConfig) -> Self {
        Self {
            config: config.clamped(),
            turn: Mutex::new(()),
            hearing: Mutex::new(()),
            socket: Mutex::default(),
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(&self) -> Result<(Arc<Socket>, u64), SourceError> {
        if let Some(line) = &self.line().socket {
            return Ok(line.clone());
        }
        let dialed = dial(&self.config, &|socket| {
            let mut line = self.line();
            line.dialing = Some(Arc::clone(socket));
            !line.closed
        })?;
        if !dialed.negotiated.transport {
            let message = format!("{}: it does not know of moves", self.config.shown_uri());
            return Err(SourceError::new(SourceErrorKind::Refused, message));
        }
        let line = (dialed.socket, dialed.negotiated.size_bytes);
        let mut known = self.line();
        known.dialing = None;
        if known.closed {
            let message = format!("{}: let go of", self.config.shown_uri());
            return Err(SourceError::new(SourceErrorKind::Disconnected, message));
        }
        known.socket = Some(line.clone());
        Ok(line)
    }
}

impl MoveLink for MoveLine {
    fn tell(&self, tell: &Tell, patience: Duration) -> Result<Told, SourceError> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, size_bytes) = self.connected()?;
        let deadline = Instant::now() + patience;
        let said = say(&socket, tell);
        // Until the socket is shut where that failed: nobody may take the rest of an answer for theirs.
        let _hearing = self.hearing.lock().unwrap_or_else(PoisonError::into_inner);
        drop(turn);
        match said.and_then(|()| hear(&socket, size_bytes, deadline)) {
            Ok(Told::Refused(why)) => {
                let message = format!("{}: {why}", self.config.shown_uri());
                Err(SourceError::new(SourceErrorKind::Refused, message))
            }
            Ok(told) => Ok(told),
            Err(error) => {
                // Others may have dialled again meanwhile.
                let mut line = self.line();
                if line
                    .socket
                    .as_ref()
                    .is_some_and(|s| Arc::ptr_eq(&s.0, &socket))
                {
                    line.socket = None;
                }
                drop(line);
                let _ = socket.shutdown(Shutdown::Both);
                let message = format!("{}: {error}", self.config.shown_uri());
                Err(SourceError::new(SourceErrorKind::Disconnected, message))
            }
        }
    }

    fn interrupt(&self) {
        self.shut(false);
    }

    fn hang_up(&self) {
        self.shut(true);
    }
}

impl MoveLine {
    fn shut(&self, for_good: bool) {
        let mut line = self.line();
        line.closed |= for_good;
        let known = line.socket.take().map(|(socket, _)| socket);
        for socket in known.into_iter().chain(line.dialing.take()) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
