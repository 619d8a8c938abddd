//! Reaching a server: connect, set the socket up, shake hands.
//!
//! Owns the order of addresses tried and the deadlines, and whether options go out at once, ahead of the
//! greeting, or one by one. Otherwise it must never retry: the keeper of a connection does, with pauses. Called on the
//! keepers' threads, and by whoever talks of a move.

use std::io;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hikkoshi_nbd::client::{
    ClientError, ClientErrorKind, Handshake, HandshakeConfig, Negotiated, Progress,
};
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};

use super::address::{Address, NbdSourceConfig};
use super::attach::Ticket;
use super::line::Line;
use super::wire::SocketWire;
use crate::source::{SourceError, SourceErrorKind};

/// How many addresses of a host name are tried.
const MAX_ADDRESSES: usize = 8;
/// How often the kernel asks an idle peer whether it still lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How long a send may wait; see [`super::address::MAX_IN_FLIGHT`] for why it never should.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection on which transmission can begin.
#[derive(Debug)]
pub(super) struct Dialed {
    pub(super) socket: Arc<Socket>,
    pub(super) negotiated: Negotiated,
}

impl Dialed {
    /// The connection, ready for requests. `attaching`: the first thing that comes is the answer to
    /// having said for which move it is.
    pub(super) fn into_line(
        self,
        config: &NbdSourceConfig,
        attaching: Option<Arc<Ticket>>,
    ) -> Arc<Line> {
        let wire = Arc::new(SocketWire(self.socket));
        Line::attaching(wire, self.negotiated, config, attaching)
    }
}

/// What a server has shown of its manners: some cannot take options that are sent at once.
#[derive(Debug, Default)]
pub(super) struct Manners {
    one_by_one: AtomicBool,
}

/// Connects and shakes hands. `opened` is told of each socket before it is connected, so that
/// somebody else can shut it down; it says whether to go on. `opening`, asked once it is connected: what
/// is said first in frames.
pub(super) fn dial(
    config: &NbdSourceConfig,
    manners: &Manners,
    opened: &dyn Fn(&Arc<Socket>) -> bool,
    opening: &dyn Fn() -> Vec<u8>,
) -> Result<Dialed, SourceError> {
    let attempt = |at_once: bool| {
        let socket = connect(config, opened).map_err(|error| (error, false))?;
        let negotiated = shake_hands(&socket, config, at_once, opening())?;
        Ok(Dialed { socket, negotiated })
    };
    let last = |(error, _): (SourceError, bool)| error;
    if manners.one_by_one.load(Ordering::Relaxed) {
        return attempt(false).map_err(last);
    }
    match attempt(true) {
        Err((error, true)) => {
            tracing::debug!("options sent at once led nowhere, now one by one: {error}");
            let dialed = attempt(false).map_err(last)?;
            manners.one_by_one.store(true, Ordering::Relaxed);
            Ok(dialed)
        }
        outcome => outcome.map_err(last),
    }
}

fn connect(
    config: &NbdSourceConfig,
    opened: &dyn Fn(&Arc<Socket>) -> bool,
) -> Result<Arc<Socket>, SourceError> {
    match &config.address {
        Address::Tcp { host, port } => connect_tcp(config, host, *port, opened),
        Address::Unix(path) => SockAddr::unix(path)
            .and_then(|address| connect_one(config, Domain::UNIX, &address, opened)),
    }
    .map_err(|error| {
        SourceError::new(
            SourceErrorKind::Disconnected,
            format!("cannot connect to {}: {error}", config.shown_uri()),
        )
    })
}

fn connect_tcp(
    config: &NbdSourceConfig,
    host: &str,
    port: u16,
    opened: &dyn Fn(&Arc<Socket>) -> bool,
) -> io::Result<Arc<Socket>> {
    let addresses: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()?
        .take(MAX_ADDRESSES)
        .collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match connect_one(
            config,
            Domain::for_address(address),
            &address.into(),
            opened,
        ) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_one(
    config: &NbdSourceConfig,
    domain: Domain,
    address: &SockAddr,
    opened: &dyn Fn(&Arc<Socket>) -> bool,
) -> io::Result<Arc<Socket>> {
    let socket = Arc::new(Socket::new(domain, Type::STREAM, None)?);
    if !opened(&socket) {
        return Err(io::ErrorKind::Interrupted.into());
    }
    socket.connect_timeout(address, config.connect_timeout)?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    if domain != Domain::UNIX {
        socket.set_tcp_nodelay(true)?;
        let interval = KEEPALIVE_INTERVAL
            .min(config.dead_peer_timeout)
            .max(Duration::from_secs(1));
        socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(interval)
                .with_interval(interval),
        )?;
        // With this set it also decides how many unanswered keepalives are the end (tcp(7)).
        socket.set_tcp_user_timeout(Some(config.dead_peer_timeout))?;
    }
    Ok(socket)
}

/// Shakes hands; with an error it tells whether sending options one by one may get further.
pub(super) fn shake_hands(
    socket: &Socket,
    config: &NbdSourceConfig,
    at_once: bool,
    opening: Vec<u8>,
) -> Result<Negotiated, (SourceError, bool)> {
    let refused = |error: ClientError| {
        let kind = match error.kind() {
            ClientErrorKind::Refused => SourceErrorKind::Refused,
            ClientErrorKind::Violation => SourceErrorKind::Untrusted,
        };
        SourceError::new(kind, format!("{}: {error}", config.shown_uri()))
    };
    let broken = |error: io::Error| {
        SourceError::new(
            SourceErrorKind::Disconnected,
            format!("{}: the NBD handshake failed: {error}", config.shown_uri()),
        )
    };
    let wanted = HandshakeConfig {
        export: config.export.clone(),
        structured: true,
        allocation: true,
        transport: config.frames,
        opening,
    };
    let begun = if at_once {
        Handshake::at_once(wanted)
    } else {
        Handshake::new(wanted)
    };
    let mut handshake = begun.map_err(|error| (refused(error), false))?;
    let deadline = Instant::now() + config.handshake_timeout;
    loop {
        let greeted = handshake.is_greeted();
        let again = at_once && greeted;
        let output = handshake.take_output();
        let bytes = send_all(socket, &output)
            .and_then(|()| receive_exactly(socket, handshake.needed(), deadline))
            .map_err(|error| {
                // One that has not greeted and says nothing has nothing against our options. Where it
                // hangs up with them unread, the greeting may have been lost by that.
                let hung_up = error.kind() != io::ErrorKind::TimedOut;
                (broken(error), at_once && (greeted || hung_up))
            })?;
        let progress = handshake.receive(&bytes).map_err(|error| {
            let plain = matches!(error, ClientError::AtOnce(_));
            let confused = error.kind() == ClientErrorKind::Violation;
            (refused(error), again && (plain || confused))
        })?;
        if let Progress::Done(negotiated) = progress {
            return Ok(negotiated);
        }
    }
}

/// Sends everything or fails.
pub(super) fn send_all(socket: &Socket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::net::send(socket, bytes, rustix::net::SendFlags::NOSIGNAL) {
            Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Receives `len` bytes or fails.
pub(super) fn receive_exactly(
    socket: &Socket,
    len: usize,
    deadline: Instant,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    let mut buffer = [MaybeUninit::<u8>::uninit(); 1024];
    while bytes.len() < len {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // A zero time-out would mean none at all.
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let want = (len - bytes.len()).min(buffer.len());
        match rustix::net::recv(socket, &mut buffer[..want], rustix::net::RecvFlags::empty()) {
            Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(((got, _), _)) => bytes.extend_from_slice(got),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}
