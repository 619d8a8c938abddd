//! What is said of a move over a connection of ours: one message, one answer, in turn.
//!
//! Every connection says first for which move it reads ([`Ticket`]), so that a source which must not
//! be read from any more can refuse. What else there is to say of the move goes over a connection of
//! its own ([`MoveLine`]), where waiting for the answer holds nobody up.

use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hikkoshi_nbd::client::Negotiated;
use socket2::Socket;

use super::address::NbdSourceConfig;
use super::dial::{Dialed, Manners, dial, receive_exactly, send_all};
use crate::source::{SourceError, SourceErrorKind};
use crate::transport::session::{Attached, Boots, HandedOver, MoveId, Stance, Tell, Told};
use crate::transport::{HEADER_BYTES, Header, Kind, Priority, limits};

/// How long a connection that was dialled together with those that stand is waited for, where it is not
/// here yet: it is about to be. A fresh one takes two round trips.
const SPARE_WAIT: Duration = Duration::from_secs(1);

/// Who reads, and what the source has said to that. Shared by all connections of a move.
#[derive(Debug)]
pub struct Ticket {
    id: MoveId,
    base: Option<MoveId>,
    state: Mutex<State>,
    /// See [`Ticket::losses`] and [`Ticket::boots`].
    losses: AtomicU64,
    news_of_boots: AtomicU64,
    /// Dialled together with those that are read over, for what is said of the move.
    spare: Mutex<Spare>,
    spare_news: Condvar,
}

#[derive(Debug, Default)]
enum Spare {
    /// There is none, and none will come.
    #[default]
    None,
    /// One is being dialled.
    Coming,
    Here(Dialed),
}

#[derive(Debug)]
struct State {
    stance: Stance,
    required: bool,
    /// Nothing is said: the source did not know of moves when this one began.
    silent: bool,
    epoch: u64,
    attached: Option<Attached>,
    /// Known while it stands by; behind the handoff all is durable there.
    boots: Boots,
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
                boots: Boots::NONE,
            }),
            losses: AtomicU64::new(0),
            news_of_boots: AtomicU64::new(0),
            spare: Mutex::default(),
            spare_news: Condvar::new(),
        })
    }

    fn spare(&self) -> MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection is dialled for the first message about the move: [`Ticket::keep_spare`] or
    /// [`Ticket::has_no_spare`] follows.
    pub(super) fn expect_spare(&self) {
        *self.spare() = Spare::Coming;
    }

    /// Keeps a connection on which nothing was said yet for the first message about the move.
    pub(super) fn keep_spare(&self, dialed: Dialed) {
        *self.spare() = Spare::Here(dialed);
        self.spare_news.notify_all();
    }

    /// There will be none.
    pub(super) fn has_no_spare(&self) {
        let mut spare = self.spare();
        if matches!(*spare, Spare::Coming) {
            *spare = Spare::None;
        }
        self.spare_news.notify_all();
    }

    fn take_spare(&self) -> Option<Dialed> {
        let coming = |spare: &mut Spare| matches!(spare, Spare::Coming);
        let (mut spare, _) = self
            .spare_news
            .wait_timeout_while(self.spare(), SPARE_WAIT, coming)
            .unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *spare) {
            Spare::Here(dialed) => Some(dialed),
            Spare::None | Spare::Coming => None,
        }
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

    /// Whether nothing is said of the move.
    pub fn is_silent(&self) -> bool {
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
        if state.stance == Stance::Standby {
            // One that had handed over before had made all durable first.
            let had_left = state
                .attached
                .is_some_and(|before| before.handed_over == HandedOver::Already);
            if state.boots.ended_before(&attached.boots) && !had_left {
                self.losses.fetch_add(1, Ordering::AcqRel);
            }
            let boots = state.boots.followed_by(attached.boots);
            if boots != state.boots {
                state.boots = boots;
                self.news_of_boots.fetch_add(1, Ordering::AcqRel);
            }
        }
        state.epoch = attached.epoch;
        state.attached = Some(attached);
    }

    /// How often the source, or one that it fetches from, may have lost what was written there and
    /// flushed by nobody, as far as it was told while this stood by. It is counted before anything is
    /// answered over a connection that was made after it.
    pub fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }

    /// The boots of the source and of those that it fetches from, as of the last time that a loss of
    /// power there would have mattered.
    pub fn boots(&self) -> Boots {
        self.state().boots
    }

    /// Grows whenever [`Ticket::boots`] changes.
    pub fn news_of_boots(&self) -> u64 {
        self.news_of_boots.load(Ordering::Acquire)
    }
}

/// For which move a fresh connection is, if that is to be said over it, or was.
fn ticket_for<'a>(
    config: &'a NbdSourceConfig,
    negotiated: &Negotiated,
) -> Result<Option<&'a Arc<Ticket>>, SourceError> {
    let to_be_said = |ticket: &&Arc<Ticket>| negotiated.opened || !ticket.is_silent();
    let Some(ticket) = config.ticket.as_ref().filter(to_be_said) else {
        return Ok(None);
    };
    if negotiated.transport {
        return Ok(Some(ticket));
    }
    if ticket.is_required() {
        let message = format!(
            "{}: what answers there does not speak frames any more, and so cannot keep the fence that \
             this move relies on; serve the disk with hikkoshi there again",
            config.shown_uri()
        );
        return Err(SourceError::new(SourceErrorKind::Untrusted, message));
    }
    Ok(None)
}

/// What says for which move a connection is already while hands are shaken.
pub(super) fn opening(config: &NbdSourceConfig) -> Vec<u8> {
    let ticket = config.ticket.as_ref().filter(|ticket| !ticket.is_silent());
    ticket.map_or_else(Vec::new, |ticket| message(&ticket.tell()))
}

/// Says over a fresh connection for which move it is, if that was not said yet, and waits for the answer.
pub(super) fn attach(dialed: &Dialed, config: &NbdSourceConfig) -> Result<(), SourceError> {
    let negotiated = &dialed.negotiated;
    let Some(ticket) = ticket_for(config, negotiated)? else {
        return Ok(());
    };
    let patience = config.handshake_timeout;
    let told = if negotiated.opened {
        let deadline = Instant::now() + patience;
        receive_told(&dialed.socket, negotiated.size_bytes, deadline)
    } else {
        exchange(
            &dialed.socket,
            &ticket.tell(),
            negotiated.size_bytes,
            patience,
        )
    };
    welcome(told, ticket, config)
}

/// Says over a fresh connection for which move it is, if that was not said yet. The answer comes before
/// any other, and is for whoever reads them: the ticket to show it to, if one is to come.
pub(super) fn announce(
    dialed: &Dialed,
    config: &NbdSourceConfig,
) -> Result<Option<Arc<Ticket>>, SourceError> {
    let Some(ticket) = ticket_for(config, &dialed.negotiated)? else {
        return Ok(None);
    };
    if !dialed.negotiated.opened {
        send_all(&dialed.socket, &message(&ticket.tell()))
            .map_err(|error| not_attached(config, &error))?;
    }
    Ok(Some(Arc::clone(ticket)))
}

fn not_attached(config: &NbdSourceConfig, error: &io::Error) -> SourceError {
    let uri = config.shown_uri();
    let message = format!("{uri}: saying for which move it is failed: {error}");
    SourceError::new(SourceErrorKind::Disconnected, message)
}

/// What the answer to [`Ticket::tell`] means.
fn welcome(
    told: io::Result<Told>,
    ticket: &Ticket,
    config: &NbdSourceConfig,
) -> Result<(), SourceError> {
    let uri = config.shown_uri();
    match told {
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
        Err(error) => Err(not_attached(config, &error)),
    }
}

/// Sends a message and waits for its answer.
pub(super) fn exchange(
    socket: &Socket,
    tell: &Tell,
    size_bytes: u64,
    patience: Duration,
) -> io::Result<Told> {
    send_all(socket, &message(tell))?;
    receive_told(socket, size_bytes, Instant::now() + patience)
}

fn message(tell: &Tell) -> Vec<u8> {
    let payload = tell.encode();
    let header = Header::request(Kind::Tell, Priority::DEMAND, 0, 0, 0).with_payload(&payload);
    [&header.encode()[..], &payload].concat()
}

fn receive_told(socket: &Socket, size_bytes: u64, deadline: Instant) -> io::Result<Told> {
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

fn is_attach(tell: &Tell) -> bool {
    matches!(tell, Tell::Attach { .. })
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
    manners: Manners,
    /// Held while something is said.
    turn: Mutex<()>,
    /// Held while an answer is awaited, and taken before `turn` is let go of: answers are read in
    /// the order of what was said, and nothing waits for another answer before it is said. So a
    /// handoff takes one round trip, and not also what is left of that of the last question.
    hearing: Mutex<()>,
    line: Mutex<Line>,
}

#[derive(Default)]
struct Line {
    open: Option<Open>,
    dialing: Option<Arc<Socket>>,
    closed: bool,
}

#[derive(Clone)]
struct Open {
    socket: Arc<Socket>,
    size_bytes: u64,
    /// For which move it is was said.
    attached: bool,
}

impl MoveLine {
    /// To the server of `config`.
    pub fn new(config: NbdSourceConfig) -> Self {
        Self {
            config: config.clamped(),
            manners: Manners::default(),
            turn: Mutex::new(()),
            hearing: Mutex::new(()),
            line: Mutex::default(),
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connected(&self) -> Result<Open, SourceError> {
        if let Some(open) = &self.line().open {
            return Ok(open.clone());
        }
        let spare = self.config.ticket.as_ref().and_then(|t| t.take_spare());
        let dialed = match spare {
            Some(dialed) => dialed,
            None => dial(
                &self.config,
                &self.manners,
                &|socket| {
                    let mut line = self.line();
                    line.dialing = Some(Arc::clone(socket));
                    !line.closed
                },
                &Vec::new,
            )?,
        };
        let attached = ticket_for(&self.config, &dialed.negotiated)?.is_none();
        if !dialed.negotiated.transport {
            let message = format!("{}: it does not know of moves", self.config.shown_uri());
            return Err(SourceError::new(SourceErrorKind::Refused, message));
        }
        let open = Open {
            socket: dialed.socket,
            size_bytes: dialed.negotiated.size_bytes,
            attached,
        };
        let mut line = self.line();
        line.dialing = None;
        if line.closed {
            let message = format!("{}: let go of", self.config.shown_uri());
            return Err(SourceError::new(SourceErrorKind::Disconnected, message));
        }
        line.open = Some(open.clone());
        Ok(open)
    }

    /// Says it, after saying for which move if that was not done yet (the ticket is returned then):
    /// both at once, since the source takes nothing from whom it refuses.
    fn say(&self, open: &Open, tell: &Tell) -> Result<Option<&Ticket>, SourceError> {
        let ticket = self.config.ticket.as_deref();
        let mut output = Vec::new();
        let due = ticket.filter(|_| !open.attached && !is_attach(tell));
        if let Some(ticket) = due {
            output = message(&ticket.tell());
        }
        output.extend(message(tell));
        send_all(&open.socket, &output).map_err(|error| self.broken(&error))?;
        Ok(due)
    }

    /// Waits for the answer to what was said.
    fn hear(
        &self,
        open: &Open,
        tell: &Tell,
        due: Option<&Ticket>,
        deadline: Instant,
    ) -> Result<Told, SourceError> {
        if let Some(ticket) = due {
            let told = receive_told(&open.socket, open.size_bytes, deadline);
            welcome(told, ticket, &self.config)?;
        }
        let told = receive_told(&open.socket, open.size_bytes, deadline);
        match told.map_err(|error| self.broken(&error))? {
            Told::Refused(why) => {
                if is_attach(tell) {
                    // Nothing more is taken over this connection.
                    self.forget(&open.socket);
                }
                let message = format!("{}: {why}", self.config.shown_uri());
                Err(SourceError::new(SourceErrorKind::Refused, message))
            }
            told => Ok(told),
        }
    }

    fn broken(&self, error: &io::Error) -> SourceError {
        let message = format!("{}: {error}", self.config.shown_uri());
        SourceError::new(SourceErrorKind::Disconnected, message)
    }

    fn forget(&self, socket: &Arc<Socket>) {
        let mut line = self.line();
        // Others may have dialled again meanwhile.
        line.open.take_if(|open| Arc::ptr_eq(&open.socket, socket));
        drop(line);
        let _ = socket.shutdown(Shutdown::Both);
    }
}

impl MoveLink for MoveLine {
    fn tell(&self, tell: &Tell, patience: Duration) -> Result<Told, SourceError> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let open = self.connected()?;
        let deadline = Instant::now() + patience;
        let said = self.say(&open, tell);
        // Until the connection is given up where something fails: nobody may take the rest of an
        // answer for theirs.
        let _hearing = self.hearing.lock().unwrap_or_else(PoisonError::into_inner);
        // The first message of a connection is answered before another one is said.
        let alone = is_attach(tell) || !matches!(said, Ok(None));
        let _turn = Some(turn).filter(|_| alone);
        let told = said.and_then(|due| self.hear(&open, tell, due, deadline));
        match &told {
            Err(error) if error.kind != SourceErrorKind::Refused => self.forget(&open.socket),
            _ => {
                let mut line = self.line();
                let known = line.open.as_mut();
                if let Some(known) = known.filter(|k| Arc::ptr_eq(&k.socket, &open.socket)) {
                    known.attached = true;
                }
            }
        }
        told
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
        let known = line.open.take().map(|open| open.socket);
        for socket in known.into_iter().chain(line.dialing.take()) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
