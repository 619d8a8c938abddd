//! A wide-area link in this process: a TCP relay with a round trip and a rate.
//!
//! Each direction is one queue with one transmitter, as at a router: bytes of all connections
//! leave one after the other at the link's rate, then travel for half the round trip. So bulk
//! really delays demand, as it would outside. The queue is bounded, by time rather than by
//! dropping: who wants to send into a full queue waits, and TCP slows its sender down.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Bytes that are relayed at a time: at 200 Mbit/s, 0.65 ms of the link.
const QUANTUM_BYTES: usize = 16 << 10;

/// How much traffic may wait for the transmitter: what routers at the edge commonly buffer, and
/// enough for TCP to fill the link.
const QUEUE_TIME: Duration = Duration::from_millis(50);

/// Quanta of one connection that may be under way: 4 MiB, a common limit of TCP's window.
const IN_FLIGHT_QUANTA: usize = 256;

/// Kernel buffers at the relay's sockets: small, so that waiting happens in the queue above.
const SOCKET_BUFFER_BYTES: usize = 128 << 10;

/// Most connections over the link; more than any daemon makes to its source.
const MAX_CONNECTIONS: usize = 128;

/// One direction: when the transmitter is free again, and what it has sent.
#[derive(Debug)]
struct Direction {
    free_at: Mutex<Instant>,
    bytes: AtomicU64,
    bytes_per_s: u64,
    delay: Duration,
}

impl Direction {
    fn new(bytes_per_s: u64, delay: Duration) -> Self {
        Self {
            free_at: Mutex::new(Instant::now()),
            bytes: AtomicU64::new(0),
            bytes_per_s,
            delay,
        }
    }

    /// Takes a place in the queue for `len` bytes, waiting while it is full. Returns when the
    /// bytes arrive at the other end.
    fn send(&self, len: usize) -> Instant {
        let len = u64::try_from(len).expect("a quantum is small");
        let nanos = u128::from(len) * 1_000_000_000 / u128::from(self.bytes_per_s.max(1));
        let busy = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        loop {
            let excess = {
                let mut free_at = self.free_at.lock().expect("no holder panics");
                let now = Instant::now();
                let backlog = free_at.saturating_duration_since(now);
                match backlog.checked_sub(QUEUE_TIME) {
                    None | Some(Duration::ZERO) => {
                        *free_at = now + backlog + busy;
                        self.bytes.fetch_add(len, Ordering::Relaxed);
                        return *free_at + self.delay;
                    }
                    Some(excess) => excess,
                }
            };
            thread::sleep(excess);
        }
    }
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    to_source: Direction,
    from_source: Direction,
    stopping: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

/// The link. Ends when dropped.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Link {
    /// A link to the server at `upstream`, with a round trip and a rate (each way) of its own.
    ///
    /// # Errors
    /// The system refuses a socket or a thread.
    pub fn start(upstream: SocketAddr, rtt: Duration, bytes_per_s: u64) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            to_source: Direction::new(bytes_per_s, rtt / 2),
            from_source: Direction::new(bytes_per_s, rtt / 2),
            stopping: AtomicBool::new(false),
            streams: Mutex::new(Vec::new()),
        });
        let for_acceptor = Arc::clone(&shared);
        let acceptor = thread::Builder::new()
            .name("demo-link".into())
            .spawn(move || accept(&listener, upstream, rtt, &for_acceptor))?;
        Ok(Self {
            address,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where the near end listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that crossed it, (to the source, from the source).
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.shared.to_source.bytes.load(Ordering::Relaxed),
            self.shared.from_source.bytes.load(Ordering::Relaxed),
        )
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the acceptor; if that fails it is awake already.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            // A panic there has been printed; the demo's verdict does not depend on it.
            let _ = acceptor.join();
        }
        for stream in self
            .shared
            .streams
            .lock()
            .expect("no holder panics")
            .drain(..)
        {
            // Closed already by its end, maybe.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, upstream: SocketAddr, rtt: Duration, shared: &Arc<Shared>) {
    for near in listener.incoming() {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let Ok(near) = near else { continue };
        let shared = Arc::clone(shared);
        // A connection that cannot be relayed is closed, as an unreachable host would do.
        let _ = thread::Builder::new()
            .name("demo-link-open".into())
            .spawn(move || open(near, upstream, rtt, &shared));
    }
}

/// Connects a newcomer through: a round trip later, as TCP's own handshake would take.
fn open(near: TcpStream, upstream: SocketAddr, rtt: Duration, shared: &Arc<Shared>) {
    thread::sleep(rtt);
    let relayed = TcpStream::connect(upstream).and_then(|far| {
        for stream in [&near, &far] {
            stream.set_nodelay(true)?;
            let socket = socket2::SockRef::from(stream);
            socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
            socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
        }
        {
            let mut streams = shared.streams.lock().expect("no holder panics");
            if streams.len() >= 2 * MAX_CONNECTIONS || shared.stopping.load(Ordering::SeqCst) {
                return Err(io::Error::other("the link takes no more connections"));
            }
            streams.push(near.try_clone()?);
            streams.push(far.try_clone()?);
        }
        relay(near.try_clone()?, far.try_clone()?, shared, |s| {
            &s.to_source
        })?;
        relay(far, near.try_clone()?, shared, |s| &s.from_source)
    });
    if relayed.is_err() {
        let _ = near.shutdown(Shutdown::Both);
    }
}

/// Two threads for one direction of one connection: one takes bytes into the queue, one delivers
/// them when their time has come.
fn relay(
    from: TcpStream,
    to: TcpStream,
    shared: &Arc<Shared>,
    direction: fn(&Shared) -> &Direction,
) -> io::Result<()> {
    let (sender, receiver) = sync_channel(IN_FLIGHT_QUANTA);
    let shared = Arc::clone(shared);
    thread::Builder::new()
        .name("demo-link-in".into())
        .spawn(move || take(from, &sender, direction(&shared)))?;
    thread::Builder::new()
        .name("demo-link-out".into())
        .spawn(move || deliver(to, &receiver))?;
    Ok(())
}

fn take(mut from: TcpStream, queue: &SyncSender<(Instant, Vec<u8>)>, direction: &Direction) {
    let mut buf = vec![0; QUANTUM_BYTES];
    loop {
        match from.read(&mut buf) {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                let arrival = direction.send(n);
                if queue.send((arrival, buf[..n].to_vec())).is_err() {
                    // The receiving end has gone; let the sender notice.
                    let _ = from.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
    }
}

fn deliver(mut to: TcpStream, queue: &Receiver<(Instant, Vec<u8>)>) {
    while let Ok((arrival, bytes)) = queue.recv() {
        thread::sleep(arrival.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            return;
        }
    }
    // The sender said that nothing more comes; pass it on.
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends back what it gets, on every connection.
    fn echo_server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut back = stream.try_clone().unwrap();
                thread::spawn(move || io::copy(&mut stream, &mut back));
            }
        });
        address
    }

    #[test]
    fn bytes_arrive_whole_and_never_early() {
        let rtt = Duration::from_millis(30);
        let link = Link::start(echo_server(), rtt, 10_000_000).unwrap();
        let began = Instant::now();
        let mut stream = TcpStream::connect(link.address()).unwrap();
        stream.write_all(b"ping").unwrap();
        let mut back = [0; 4];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"ping");
        // One round trip to connect, one for the bytes. (How late it may be is the machine's.)
        assert!(began.elapsed() >= 2 * rtt);
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let began = Instant::now();
        let mut writer = stream.try_clone().unwrap();
        let copy = sent.clone();
        let thread = thread::spawn(move || writer.write_all(&copy).unwrap());
        let mut back = vec![0; sent.len()];
        stream.read_exact(&mut back).unwrap();
        thread.join().unwrap();
        assert!(back == sent);
        // A million bytes at ten million a second.
        assert!(began.elapsed() >= Duration::from_millis(100));
        assert_eq!(link.bytes(), (1_000_004, 1_000_004));
    }

    #[test]
    fn the_rate_is_that_of_all_connections_together() {
        let direction = Direction::new(1_000_000, Duration::from_millis(5));
        let began = Instant::now();
        direction.send(10_000);
        let last = direction.send(10_000);
        assert!(last >= began + Duration::from_millis(25));
    }
}
