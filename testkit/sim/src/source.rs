//! The source of one process: connections to the server of the old site, in bytes.
//!
//! Queues, requests, the decoder and the assembly of answers are the product's own
//! ([`BareConnection`]); what is simulated is the wire, and the dialling and telling that keeper
//! and herald do with threads and sockets. Each connection has a fiber that receives, and one
//! fiber tells of what no connection can.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hikkoshi_wan::nbd_source::{BareConnection, NbdSourceConfig, Undone, Wire};
use hikkoshi_wan::{
    Address, Completion, ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind,
    SourceExtent, SourceInfo, SourceWatcher,
};
use rustix::io::Errno;

use crate::fiber::{self, Wait};
use crate::server::{Conversation, Server};
use crate::sim::Sim;

/// Connections of a source.
const CONNECTIONS: usize = 3;

/// A connection's bytes.
struct SimWire {
    sim: Arc<Sim>,
    state: Mutex<WireState>,
}

#[derive(Default)]
struct WireState {
    to_server: Vec<u8>,
    to_client: VecDeque<u8>,
    conversation: Conversation,
    /// Neither side will say more; what was said may still be heard.
    over: bool,
    /// The client hears nothing more.
    deaf: bool,
}

impl SimWire {
    fn state(&self) -> MutexGuard<'_, WireState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to hear; how much there is. 0 is the end.
    fn wait(&self) -> usize {
        loop {
            {
                let state = self.state();
                if state.deaf || !state.to_client.is_empty() || state.over {
                    return if state.deaf { 0 } else { state.to_client.len() };
                }
            }
            fiber::pause(Wait::Others);
        }
    }
}

impl Wire for SimWire {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        if state.over {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.to_server.extend_from_slice(bytes);
        Ok(())
    }

    fn send_politely(&self, _: &[u8]) {}

    fn hang_up(&self) {
        let mut state = self.state();
        state.over = true;
        state.deaf = true;
    }

    fn set_patience(&self, _: Option<std::time::Duration>) -> io::Result<()> {
        Ok(())
    }

    fn receive(&self, room: &mut [u8], _: bool) -> Result<usize, Errno> {
        let there = self.wait().min(room.len());
        // As little at a time as a network likes.
        let take = match there {
            0 => 0,
            _ if self.sim.below(4) == 0 => 1 + self.sim.chance(|rng| rng.index(there)),
            _ => there,
        };
        for (place, byte) in room.iter_mut().zip(self.state().to_client.drain(..take)) {
            *place = byte;
        }
        Ok(take)
    }

    fn receive_more(&self, data: &mut Vec<u8>, more: usize) -> Result<usize, Errno> {
        let take = self.wait().min(more);
        data.extend(self.state().to_client.drain(..take));
        Ok(take)
    }
}

#[derive(Clone)]
struct Connection {
    bare: Arc<BareConnection>,
    wire: Arc<SimWire>,
}

enum Told {
    Failed(Vec<Undone>, SourceError),
    Answer(Box<dyn FnOnce() + Send>),
    Up,
    Down(SourceError),
}

struct State {
    info: SourceInfo,
    connections: [Option<Connection>; CONNECTIONS],
    standing: usize,
    watcher: Option<Arc<dyn SourceWatcher>>,
    told: VecDeque<Told>,
    closed: bool,
}

/// The source of one process.
pub struct SimSource {
    server: Arc<Server>,
    sim: Arc<Sim>,
    state: Mutex<State>,
}

fn config() -> NbdSourceConfig {
    NbdSourceConfig::new(
        Address::Tcp {
            host: "simulated".into(),
            port: 0,
        },
        "",
    )
}

fn error(kind: SourceErrorKind, message: &'static str) -> SourceError {
    SourceError::new(kind, message)
}

impl SimSource {
    /// A source that takes the server to be as `expected` until it is reached.
    pub fn new(server: &Arc<Server>, expected: SourceInfo, sim: &Arc<Sim>) -> Arc<Self> {
        let this = Arc::new(Self {
            server: Arc::clone(server),
            sim: Arc::clone(sim),
            state: Mutex::new(State {
                info: expected,
                connections: [const { None }; CONNECTIONS],
                standing: 0,
                watcher: None,
                told: VecDeque::new(),
                closed: false,
            }),
        });
        let herald = Arc::clone(&this);
        sim.spawn("herald", Box::new(move || herald.tell_all()));
        this
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, told: Told) {
        self.state().told.push_back(told);
    }

    /// The fiber that tells what no connection can.
    fn tell_all(&self) {
        loop {
            let (told, watcher, closed) = {
                let mut state = self.state();
                (state.told.pop_front(), state.watcher.clone(), state.closed)
            };
            match told {
                Some(Told::Failed(undone, why)) => {
                    for job in undone {
                        job.fail(why.clone());
                    }
                }
                Some(Told::Answer(answer)) => answer(),
                Some(Told::Up) => {
                    if let Some(watcher) = watcher {
                        watcher.source_up();
                    }
                }
                Some(Told::Down(why)) => {
                    if let Some(watcher) = watcher {
                        watcher.source_down(&why);
                    }
                }
                None if closed => return,
                None => fiber::pause(Wait::Others),
            }
        }
    }

    // What the network does

    /// Dials one more connection, if there is a place. False if the server can't be reached, or
    /// is another disk.
    pub fn dial(self: &Arc<Self>) -> bool {
        let negotiated = self.server.shake_hands();
        let mut state = self.state();
        let Some(slot) = state.connections.iter().position(Option::is_none) else {
            return true;
        };
        if state.closed || !self.server.is_up() {
            return false;
        }
        let wire = Arc::new(SimWire {
            sim: Arc::clone(&self.sim),
            state: Mutex::default(),
        });
        let bare = BareConnection::new(Arc::clone(&wire) as Arc<dyn Wire>, negotiated, &config());
        if !bare.info().may_succeed(&state.info) {
            self.sim.note("source: another disk", 0, 0);
            return false;
        }
        let connection = Connection {
            bare: Arc::new(bare),
            wire,
        };
        if state.standing == 0 {
            state.info = connection.bare.info().clone();
            state.told.push_back(Told::Up);
        }
        state.standing += 1;
        state.connections[slot] = Some(connection.clone());
        drop(state);
        let this = Arc::clone(self);
        self.sim.spawn(
            "receiver",
            Box::new(move || {
                let (why, undone) = connection.bare.serve();
                this.lost(slot, why, undone);
            }),
        );
        true
    }

    fn lost(&self, slot: usize, why: SourceError, undone: Vec<Undone>) {
        self.sim
            .note("source: lost", slot as u64, undone.len() as u64);
        let mut state = self.state();
        state.told.push_back(Told::Failed(undone, why.clone()));
        if state.connections[slot].take().is_some() {
            state.standing -= 1;
            if state.standing == 0 && !state.closed {
                state.told.push_back(Told::Down(why));
            }
        }
    }

    /// A connection is reset: part of what was said may still be heard.
    pub fn reset(&self, slot: usize) {
        if let Some(connection) = &self.state().connections[slot % CONNECTIONS] {
            let mut wire = connection.wire.state();
            let heard = self.sim.chance(|rng| rng.index(wire.to_client.len() + 1));
            wire.to_client.truncate(heard);
            wire.over = true;
        }
    }

    /// All are.
    pub fn reset_all(&self) {
        (0..CONNECTIONS).for_each(|slot| self.reset(slot));
    }

    /// The server hears and says something on one connection. False if there was nothing.
    pub fn converse(&self) -> bool {
        let first = self.sim.chance(|rng| rng.index(CONNECTIONS));
        for n in 0..CONNECTIONS {
            let connection = self.state().connections[(first + n) % CONNECTIONS].clone();
            let Some(connection) = connection else {
                continue;
            };
            let mut guard = connection.wire.state();
            let wire = &mut *guard;
            if wire.over {
                continue;
            }
            self.server
                .listen(&mut wire.to_server, &mut wire.conversation);
            if let Some((bytes, ends)) = self.server.speak(&mut wire.conversation) {
                self.sim.note("server: says", n as u64, bytes.len() as u64);
                wire.to_client.extend(bytes);
                wire.over |= ends;
                return true;
            }
        }
        false
    }

    fn pick(&self, lane: Lane) -> Option<Arc<BareConnection>> {
        let state = self.state();
        if state.closed {
            return None;
        }
        let mut alive = state
            .connections
            .iter()
            .flatten()
            .map(|c| &c.bare)
            .filter(|bare| bare.is_alive());
        if lane.is_urgent() {
            alive.next().cloned()
        } else {
            alive.next_back().cloned()
        }
    }

    fn fail_undone(&self, undone: Vec<Undone>) {
        if !undone.is_empty() {
            let why = error(SourceErrorKind::Disconnected, "not connected");
            self.push(Told::Failed(undone, why));
        }
    }
}

impl Source for SimSource {
    fn info(&self) -> SourceInfo {
        self.state().info.clone()
    }

    fn is_connected(&self) -> bool {
        self.connections() > 0
    }

    fn connections(&self) -> usize {
        let state = self.state();
        let alive = |c: &&Connection| c.bare.is_alive();
        if state.closed {
            0
        } else {
            state.connections.iter().flatten().filter(alive).count()
        }
    }

    fn read(&self, lane: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        match self.pick(lane) {
            Some(bare) => {
                let undone = bare.read(lane, offset, len, done);
                self.fail_undone(undone);
            }
            None => self.push(Told::Answer(Box::new(move || {
                done(Err(error(SourceErrorKind::Disconnected, "not connected")));
            }))),
        }
    }

    fn extents(&self, lane: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        if !self.info().has_extents {
            let zero = false;
            return self.push(Told::Answer(Box::new(move || {
                done(Ok(ExtentsAnswer {
                    extents: vec![SourceExtent { offset, len, zero }],
                    wire_bytes: 0,
                }));
            })));
        }
        match self.pick(lane) {
            Some(bare) => {
                let undone = bare.extents(lane, offset, len, done);
                self.fail_undone(undone);
            }
            None => self.push(Told::Answer(Box::new(move || {
                done(Err(error(SourceErrorKind::Disconnected, "not connected")));
            }))),
        }
    }

    fn flush(&self, done: Completion<()>) {
        match self.pick(Lane::Demand) {
            Some(bare) => {
                let undone = bare.flush(done);
                self.fail_undone(undone);
            }
            None => self.push(Told::Answer(Box::new(move || {
                done(Err(error(SourceErrorKind::Disconnected, "not connected")));
            }))),
        }
    }

    fn cancel(&self, lane: Lane, offset: u64, len: u64) {
        let connections = self.state().connections.clone();
        for connection in connections.into_iter().flatten() {
            let unsent = connection.bare.cancel(lane, offset, len);
            if !unsent.is_empty() {
                let why = error(SourceErrorKind::Cancelled, "cancelled");
                self.push(Told::Failed(unsent, why));
            }
        }
    }

    fn watch(&self, watcher: Arc<dyn SourceWatcher>) {
        self.state().watcher = Some(watcher);
    }

    fn close(&self) {
        let (connections, watcher) = {
            let mut state = self.state();
            state.closed = true;
            (state.connections.clone(), state.watcher.take())
        };
        for connection in connections.into_iter().flatten() {
            connection.bare.disconnect();
        }
        drop(watcher);
    }
}
