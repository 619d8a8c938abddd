//! A link between two daemons that breaks at a message of their choice: it passes on what is said,
//! frame by frame, until the one comes at which it is to end or to fall silent.
//!
//! It understands as much of the NBD handshake and of frames (`docs/wire.md`) as it takes to tell
//! where one ends; written from the documents and not with our own crates. What it has held back while
//! it was silent it delivers late, also to a side whose peer has hung up meanwhile: a tunnel does so.

use crate::daemon::LONG;
use anyhow::{Context, Result, ensure};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// NBD_OPT_EXPORT_NAME and NBD_OPT_GO, after which there are no options any more.
const EXPORT_NAME: u32 = 1;
const GO: u32 = 7;
/// NBD_REP_ACK.
const ACK: u32 = 1;
const FRAME_MAGIC: &[u8] = b"HKF5";
/// What comes before the digits of a frame that is said while hands are shaken.
const OPENING: &[u8] = b"x-hikkoshi:opening-5:";
const FRAME_HEADER: usize = 40;
const TELL: u8 = 0x10;
const TOLD: u8 = 0x90;

/// Which way something goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the destination, which has dialled.
    ToSource,
    /// From the source.
    ToDestination,
}

/// What goes past, by the numbers of `docs/wire.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A message about the move, or its answer, by its first byte.
    Message(u8),
    /// Another frame, by its kind.
    Frame(u8),
    /// What is no frame: the handshake, or plain NBD.
    Other,
}

/// What becomes of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Every connection ends, and there are no new ones.
    Down,
    /// Nothing passes, and nobody is told.
    Silent,
}

/// Where and how it breaks.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// At what.
    pub what: What,
    /// On its way where.
    pub way: Way,
    /// It still gets through.
    pub passes: bool,
    /// What happens then.
    pub how: Break,
}

struct State {
    broken: Option<Break>,
    cut: Option<Cut>,
    /// What it breaks behind is on its way; until it is there nothing else passes.
    passing: bool,
    /// Connections of an earlier time are to end.
    time: u64,
    over: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The link. Its connections end when it is dropped.
pub struct CutLink {
    shared: Arc<Shared>,
    socket: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the link is silent. Whether it was; `None`: a connection of that time is to end.
    fn silence(&self, time: u64) -> Option<bool> {
        let mut state = self.state();
        let mut waited = false;
        loop {
            if state.over || state.time != time || state.broken == Some(Break::Down) {
                return None;
            }
            if state.broken.is_none() {
                return Some(waited);
            }
            waited = true;
            state = self.wait(state);
        }
    }

    /// Takes the cut, if this is where the link is to break: in front of it, or (`passes`) behind it.
    fn take_cut(state: &mut State, what: What, way: Way, passes: bool) -> Option<Cut> {
        let here = |cut: &Cut| cut.what == what && cut.way == way && cut.passes == passes;
        match state.broken {
            Some(_) => None,
            None => state.cut.take_if(|cut| here(cut)),
        }
    }

    /// Breaks if this is where to, and tells so.
    fn breaks_before(&self, what: What, way: Way) -> bool {
        let mut state = self.state();
        let Some(cut) = Self::take_cut(&mut state, what, way, false) else {
            return false;
        };
        state.broken = Some(cut.how);
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Delivers what is let through. If the link is to break behind it, nothing else passes from
    /// before it is delivered on: whoever hears it could answer before anybody has come to break.
    fn deliver(&self, what: What, way: Way, deliver: impl FnOnce() -> bool) -> bool {
        let cut = {
            let mut state = self.state();
            let cut = Self::take_cut(&mut state, what, way, true);
            if cut.is_some() {
                state.broken = Some(Break::Silent);
                state.passing = true;
            }
            cut
        };
        let delivered = deliver();
        if let Some(cut) = cut {
            self.change(|state| {
                state.broken = Some(cut.how);
                state.passing = false;
            });
        }
        delivered
    }

    /// What is to get through: waits for when it does. Whether it does at all.
    fn lets_through(&self, what: What, way: Way, time: u64) -> bool {
        loop {
            let breaks = self.breaks_before(what, way);
            match self.silence(time) {
                None => return false,
                // The next break may be meant for what came during the one before.
                Some(true) if !breaks => {}
                Some(_) => return true,
            }
        }
    }
}

impl CutLink {
    /// At the socket `at`, to the one of `source`, which need not be served.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn new(at: &Path, source: &Path) -> Result<Self> {
        let listener = UnixListener::bind(at).with_context(|| at.display().to_string())?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                broken: None,
                cut: None,
                passing: false,
                time: 0,
                over: false,
            }),
            changed: Condvar::new(),
        });
        let (accepts, to) = (Arc::clone(&shared), source.to_path_buf());
        let acceptor = std::thread::spawn(move || {
            for client in listener.incoming() {
                if accepts.state().over {
                    return;
                }
                if let Ok(client) = client {
                    let (shared, to) = (Arc::clone(&accepts), to.clone());
                    std::thread::spawn(move || serve(&shared, client, &to));
                }
            }
        });
        Ok(Self {
            shared,
            socket: at.to_path_buf(),
            acceptor: Some(acceptor),
        })
    }

    /// Its address, for `--from`.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// From here on it breaks at the next thing of this kind.
    pub fn arm(&self, cut: Cut) {
        self.shared.change(|state| state.cut = Some(cut));
    }

    /// Waits until it has broken.
    ///
    /// # Errors
    /// It has not within minutes.
    pub fn wait_broken(&self) -> Result<()> {
        let start = Instant::now();
        let mut state = self.shared.state();
        while state.broken.is_none() || state.passing {
            let left = LONG.checked_sub(start.elapsed());
            let left = left.with_context(|| format!("it never came to {:?}", state.cut))?;
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Makes it whole. What was held back arrives now, and connections go on.
    ///
    /// # Errors
    /// It was not broken: a test that thinks so tests nothing.
    pub fn mend(&self) -> Result<()> {
        let mut state = self.shared.state();
        ensure!(state.broken.is_some(), "the link was whole");
        state.broken = None;
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Ends every connection; what was held back is lost. New ones can be made as before.
    pub fn reset(&self) {
        self.shared.change(|state| state.time += 1);
    }
}

impl Drop for CutLink {
    fn drop(&mut self) {
        self.shared.change(|state| state.over = true);
        // It waits for somebody to come.
        let _ = UnixStream::connect(&self.socket);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn serve(shared: &Arc<Shared>, client: UnixStream, to: &Path) {
    let time = shared.state().time;
    if shared.silence(time).is_none() {
        return;
    }
    let Ok(server) = UnixStream::connect(to) else {
        return;
    };
    let (Ok(from_server), Ok(to_client)) = (server.try_clone(), client.try_clone()) else {
        return;
    };
    let other = Arc::clone(shared);
    std::thread::spawn(move || {
        let way = Way::ToDestination;
        pass(&other, time, way, from_server, to_client);
    });
    // Only to end what waits for bytes.
    if let (Ok(client), Ok(server)) = (client.try_clone(), server.try_clone()) {
        let watches = Arc::clone(shared);
        std::thread::spawn(move || end_in_time(&watches, time, &client, &server));
    }
    pass(shared, time, Way::ToSource, client, server);
}

/// Waits until the connection is not to go on, and ends it. One that has ended by itself is waited
/// for as well, until the link is dropped: tests are short.
fn end_in_time(shared: &Shared, time: u64, client: &UnixStream, server: &UnixStream) {
    let mut state = shared.state();
    while !state.over && state.time == time && state.broken != Some(Break::Down) {
        state = shared.wait(state);
    }
    drop(state);
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}

/// Passes on what is said one way, until either side ends.
fn pass(shared: &Shared, time: u64, way: Way, mut from: UnixStream, mut to: UnixStream) {
    let mut units = Units::new(way);
    loop {
        let unit = units.next(&mut from);
        let goes_on = match &unit {
            Some((what, _)) => shared.lets_through(*what, way, time),
            None => shared.silence(time).is_some(),
        };
        if !goes_on {
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
            return;
        }
        let Some((what, bytes)) = unit else {
            // The other way may still have something to deliver.
            let _ = to.shutdown(Shutdown::Write);
            return;
        };
        if !shared.deliver(what, way, || to.write_all(&bytes).is_ok()) {
            let _ = from.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// What stands next in a stream.
#[derive(Clone, Copy)]
enum Next {
    /// The client's flags, or the server's greeting.
    Hello,
    /// An option, or the answer to one.
    Option,
    Frame,
    /// Whatever comes.
    Raw,
}

/// What is said within an option: a metadata context that holds a frame, in hexadecimal.
fn opening(option: &[u8]) -> Option<What> {
    let at = option
        .windows(OPENING.len())
        .position(|name| name == OPENING)?;
    // Behind the frame's header.
    let digits = option
        .get(at + OPENING.len() + 2 * FRAME_HEADER..)?
        .get(..2)?;
    let message = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16);
    message.ok().map(What::Message)
}

/// Cuts a stream into what belongs together.
struct Units {
    way: Way,
    next: Next,
}

impl Units {
    fn new(way: Way) -> Self {
        let next = Next::Hello;
        Self { way, next }
    }

    /// The next one; `None` at the end of the stream, and of what makes no sense.
    fn next(&mut self, from: &mut impl Read) -> Option<(What, Vec<u8>)> {
        match self.next {
            Next::Hello => {
                self.next = Next::Option;
                let len = match self.way {
                    Way::ToSource => 4,
                    Way::ToDestination => 18,
                };
                Some((What::Other, exactly(from, len)?))
            }
            Next::Option => {
                let bytes = self.option(from)?;
                Some((opening(&bytes).unwrap_or(What::Other), bytes))
            }
            Next::Frame => self.frame(from),
            Next::Raw => {
                let mut bytes = vec![0; 65536];
                let len = from.read(&mut bytes).ok().filter(|len| *len > 0)?;
                bytes.truncate(len);
                Some((What::Other, bytes))
            }
        }
    }

    fn option(&mut self, from: &mut impl Read) -> Option<Vec<u8>> {
        let header = match self.way {
            Way::ToSource => 16,
            Way::ToDestination => 20,
        };
        let mut bytes = exactly(from, header)?;
        let (option, answer) = (number(&bytes, 8)?, number(&bytes, 12)?);
        let len = number(&bytes, header - 4)?;
        bytes.extend(exactly(from, usize::try_from(len).ok()?)?);
        let last = match self.way {
            Way::ToSource => option == GO,
            Way::ToDestination => option == GO && answer == ACK,
        };
        if last {
            self.next = Next::Frame;
        } else if self.way == Way::ToSource && option == EXPORT_NAME {
            self.next = Next::Raw;
        }
        Some(bytes)
    }

    /// A frame; an answer about the move in several frames is one.
    fn frame(&mut self, from: &mut impl Read) -> Option<(What, Vec<u8>)> {
        let mut all = exactly(from, 4)?;
        if all != FRAME_MAGIC {
            self.next = Next::Raw;
            return Some((What::Other, all));
        }
        let mut start = 0;
        loop {
            let rest = start + FRAME_HEADER - all.len();
            all.extend(exactly(from, rest)?);
            let (kind, last) = (*all.get(start + 4)?, all.get(start + 7)? & 1 == 1);
            let len = number(&all, start + 28)?;
            all.extend(exactly(from, usize::try_from(len).ok()?)?);
            if kind == TOLD && !last {
                start = all.len();
                continue;
            }
            let what = match kind {
                TELL | TOLD => What::Message(*all.get(FRAME_HEADER)?),
                kind => What::Frame(kind),
            };
            return Some((what, all));
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_be_bytes(*bytes))
}

fn exactly(from: &mut impl Read, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).ok()?;
    Some(bytes)
}
