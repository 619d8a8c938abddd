//! The NBD front end: listens, shakes hands, serves.
//!
//! A thread per listening address and a thread per client. No thread serves two clients, so that
//! none of them can hold up another.

pub mod congestion;
mod connection;
mod frames;
mod inbox;
mod outbox;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hikkoshi_nbd::server::{ExportInfo, Exports, Handshake, Outcome, ReplyStyle, Session};
use hikkoshi_nbd::wire::{self, export};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::Listen;
use crate::links::CommonCap;
use crate::slot::Slot;
use crate::volume::{Volume, lock};
use connection::Connection;
use frames::FrameSession;
use outbox::Outbox;

/// How long a client may take for its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections that may wait to be accepted: a client that connects a hundred times at once, as
/// some test suites do, is not to be turned away.
const BACKLOG: i32 = 1024;

/// How long accepting rests when the process has no file descriptors left.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// The exports, as the handshake asks for them.
pub struct Table {
    /// All of them, in the order of the configuration; those that are not open yet as well.
    pub(crate) slots: Vec<Arc<Slot>>,
    /// What caps their copies together.
    pub(crate) cap: CommonCap,
}

impl Table {
    /// Of volumes that somebody else opened.
    pub fn of(volumes: impl IntoIterator<Item = Arc<Volume>>) -> Self {
        Self {
            slots: volumes.into_iter().map(Slot::of).map(Arc::new).collect(),
            cap: CommonCap::new(None),
        }
    }

    /// The export of this name. The empty name also finds the only one there is.
    pub(crate) fn slot(&self, name: &str) -> Option<&Arc<Slot>> {
        let only = || {
            self.slots
                .first()
                .filter(|_| name.is_empty() && self.slots.len() == 1)
        };
        let named = |slot: &&Arc<Slot>| slot.name() == name;
        self.slots.iter().find(named).or_else(only)
    }

    /// The volume that has its disk now.
    pub fn find(&self, name: &str) -> Option<Arc<Volume>> {
        let export = self.slot(name)?.export()?;
        Some(export.volume())
    }
}

impl Exports for Table {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        Table::find(self, name).map(|volume| export_info(&volume))
    }

    fn is_awaited(&self, name: &str) -> bool {
        self.slot(name).is_some_and(|slot| slot.export().is_none())
    }

    fn list(&self) -> Vec<(String, String)> {
        self.slots
            .iter()
            .map(|slot| (slot.name().to_owned(), String::new()))
            .collect()
    }
}

fn export_info(volume: &Volume) -> ExportInfo {
    let mut flags = export::HAS_FLAGS
        | export::SEND_FLUSH
        | export::SEND_FUA
        | export::SEND_DF
        | export::CAN_MULTI_CONN
        | export::SEND_CACHE;
    if volume.is_read_only() || volume.has_departed() && !volume.hands_on() {
        flags |= export::READ_ONLY;
    } else {
        flags |= export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO;
    }
    let mut contexts = vec![wire::BASE_ALLOCATION, wire::RESIDENCY];
    if volume.speaks_frames() {
        contexts.push(wire::TRANSPORT);
    }
    ExportInfo {
        canonical_name: volume.name().to_owned(),
        description: String::new(),
        size_bytes: volume.geometry().size_bytes(),
        flags,
        min_block: 1,
        preferred_block: 4096,
        max_payload: wire::MAX_PAYLOAD_BYTES,
        block_size_required: false,
        contexts,
    }
}

/// All listening addresses and clients of a daemon.
pub struct Front {
    shared: Arc<Shared>,
    listeners: Vec<(Socket, JoinHandle<()>)>,
    listening: Vec<Listen>,
    /// Sockets of ours in the file system, to be removed at the end.
    paths: Vec<PathBuf>,
}

struct Shared {
    table: Arc<Table>,
    max_clients: usize,
    congestion: Option<String>,
    stopping: AtomicBool,
    next_client: AtomicU64,
    /// How to hang up on each client. `None` during the handshake.
    clients: Mutex<HashMap<u64, Client>>,
}

struct Client {
    socket: Socket,
    outbox: Option<Arc<Outbox>>,
}

impl Front {
    /// Listens and begins to serve.
    ///
    /// # Errors
    /// An address cannot be listened on; says which.
    pub fn start(
        table: Arc<Table>,
        listen: &[Listen],
        max_clients: usize,
        congestion: Option<String>,
    ) -> Result<Self, (Listen, io::Error)> {
        let shared = Arc::new(Shared {
            table,
            max_clients,
            congestion,
            stopping: AtomicBool::new(false),
            next_client: AtomicU64::new(0),
            clients: Mutex::default(),
        });
        let mut front = Self {
            shared,
            listeners: Vec::new(),
            listening: Vec::new(),
            paths: Vec::new(),
        };
        for address in listen {
            if let Err(e) = front.listen(address) {
                front.stop(Duration::ZERO);
                return Err((address.clone(), e));
            }
        }
        Ok(front)
    }

    /// Where clients are listened for, with the real ports.
    pub fn listening(&self) -> &[Listen] {
        &self.listening
    }

    fn listen(&mut self, address: &Listen) -> io::Result<()> {
        for socket in bind(address)? {
            let real = match (address, socket.local_addr()?.as_socket()) {
                (Listen::Tcp(host, _), Some(addr)) => Listen::Tcp(host.clone(), addr.port()),
                _ => address.clone(),
            };
            if let Listen::Unix(path) = address {
                self.paths.push(path.clone());
            }
            let accepting = socket.try_clone()?;
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new()
                .name("nbd-accept".into())
                .spawn(move || accept_all(&shared, &accepting))?;
            self.listeners.push((socket, thread));
            if !self.listening.contains(&real) {
                self.listening.push(real);
            }
        }
        Ok(())
    }

    /// Accepts no more, lets clients have what is in flight, and closes; waits at most `most`.
    pub fn stop(&mut self, most: Duration) {
        self.shared.stopping.store(true, Ordering::Release);
        for path in self.paths.drain(..) {
            let _ = std::fs::remove_file(path);
        }
        for (socket, thread) in self.listeners.drain(..) {
            // On Linux this wakes the thread that waits in accept.
            let _ = socket.shutdown(std::net::Shutdown::Both);
            let _ = thread.join();
        }
        for client in lock(&self.shared.clients).values() {
            match &client.outbox {
                Some(outbox) => outbox.hang_up(),
                None => drop(client.socket.shutdown(std::net::Shutdown::Both)),
            }
        }
        let deadline = Instant::now() + most;
        while !lock(&self.shared.clients).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        for client in lock(&self.shared.clients).values() {
            let _ = client.socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn bind(address: &Listen) -> io::Result<Vec<Socket>> {
    let socket = match address {
        Listen::Tcp(host, port) => return bind_tcp(host, *port),
        Listen::Unix(path) => bind_unix(path)?,
        Listen::Inherited(number) => {
            // SAFETY: the supervisor handed this descriptor over for us to own, and the
            // configuration names each of them once.
            Socket::from(unsafe { OwnedFd::from_raw_fd(*number) })
        }
    };
    Ok(vec![socket])
}

fn bind_tcp(host: &str, port: u16) -> io::Result<Vec<Socket>> {
    use std::net::ToSocketAddrs;
    let mut sockets = Vec::new();
    for addr in (host, port).to_socket_addrs()? {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if addr.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        sockets.push(socket);
        if port == 0 {
            // A second address would get another port.
            break;
        }
    }
    if sockets.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the host has no address",
        ));
    }
    Ok(sockets)
}

fn bind_unix(path: &Path) -> io::Result<Socket> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    if let Err(e) = socket.bind(&address) {
        if e.kind() != io::ErrorKind::AddrInUse {
            return Err(e);
        }
        let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        if probe.connect(&address).is_ok() {
            return Err(io::Error::new(
                e.kind(),
                "another server answers at this socket",
            ));
        }
        // Left over by a process that is gone.
        std::fs::remove_file(path)?;
        socket.bind(&address)?;
    }
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn accept_all(shared: &Arc<Shared>, listener: &Socket) {
    while !shared.stopping.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((socket, _)) => admit(shared, socket),
            Err(e) if shared.stopping.load(Ordering::Acquire) => drop(e),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                tracing::warn!("a client could not be accepted: {e}");
                std::thread::sleep(ACCEPT_REST);
            }
        }
    }
}

fn admit(shared: &Arc<Shared>, socket: Socket) {
    let id = shared.next_client.fetch_add(1, Ordering::Relaxed);
    {
        let mut clients = lock(&shared.clients);
        if clients.len() >= shared.max_clients {
            tracing::warn!(
                "{} clients are connected, the most allowed; one more was turned away",
                clients.len()
            );
            return;
        }
        let Ok(for_hanging_up) = socket.try_clone() else {
            return;
        };
        clients.insert(
            id,
            Client {
                socket: for_hanging_up,
                outbox: None,
            },
        );
    }
    let for_thread = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name("nbd-client".into())
        .spawn(move || {
            if let Err(e) = serve(&for_thread, id, socket) {
                tracing::debug!("a client left: {e}");
            }
            lock(&for_thread.clients).remove(&id);
        });
    if let Err(e) = spawned {
        tracing::warn!("no thread for a client could be started: {e}");
        lock(&shared.clients).remove(&id);
    }
}

fn serve(shared: &Shared, id: u64, socket: Socket) -> io::Result<()> {
    if socket.local_addr()?.is_ipv4() || socket.local_addr()?.is_ipv6() {
        socket.set_tcp_nodelay(true)?;
        socket.set_keepalive(true)?;
        if let Some(name) = &shared.congestion
            && let Err(error) = congestion::choose(&socket, name)
        {
            tracing::warn!("a client is served without the congestion control {name:?}: {error}");
        }
    }
    let Some((session, early)) = shake_hands(&shared.table, &socket)? else {
        return Ok(());
    };
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    let Some(volume) = shared.table.find(&session.export_name) else {
        return Ok(());
    };
    if session.speaks_frames() {
        if shared.stopping.load(Ordering::Acquire) {
            return Ok(());
        }
        // What it has said with its question for frames, and behind the handshake.
        let early = [session.opening, early].concat();
        return FrameSession::new(volume, socket, &early)?.run();
    }
    let outbox = Outbox::new(socket.try_clone()?, ReplyStyle::from(&session));
    if let Some(client) = lock(&shared.clients).get_mut(&id) {
        client.outbox = Some(Arc::clone(&outbox));
    }
    if shared.stopping.load(Ordering::Acquire) {
        return Ok(());
    }
    Connection::new(volume, session, socket, &early, outbox).run();
    Ok(())
}

/// Serves one client on the calling thread, as a listening address would on a thread of its own.
///
/// # Errors
/// The socket fails.
#[cfg(feature = "fuzzing")]
pub fn serve_one(table: Arc<Table>, socket: Socket) -> io::Result<()> {
    let shared = Shared {
        table,
        max_clients: 1,
        congestion: None,
        stopping: AtomicBool::new(false),
        next_client: AtomicU64::new(0),
        clients: Mutex::default(),
    };
    serve(&shared, 0, socket)
}

/// The handshake. `None` if the client left or was shown the door.
fn shake_hands(table: &Table, socket: &Socket) -> io::Result<Option<(Session, Vec<u8>)>> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    let mut handshake = Handshake::new();
    let mut input: Vec<u8> = Vec::new();
    let mut chunk = [0_u8; 4096];
    loop {
        send_out(socket, handshake.output())?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        socket.set_write_timeout(Some(left))?;
        let n = (&*socket).read(&mut chunk)?;
        if n == 0 {
            return Ok(None);
        }
        input.extend_from_slice(&chunk[..n]);
        loop {
            let progress = handshake.input(&input, table);
            input.drain(..progress.consumed);
            match progress.outcome {
                Outcome::SendFirst => send_out(socket, handshake.output())?,
                Outcome::NeedMore => break,
                Outcome::Close => {
                    send_out(socket, handshake.output())?;
                    return Ok(None);
                }
                Outcome::Begin(session) => {
                    send_out(socket, handshake.output())?;
                    return Ok(Some((*session, input)));
                }
            }
        }
    }
}

fn send_out(mut socket: &Socket, output: &mut Vec<u8>) -> io::Result<()> {
    socket.write_all(output)?;
    output.clear();
    Ok(())
}
