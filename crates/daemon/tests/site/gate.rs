//! A link that holds back what the client says while it is closed, and counts what crosses it.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hikkoshi_wan::transport::Kind;
use hikkoshi_wan::transport::frame::{HEADER_BYTES, Header};

pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    to: SocketAddr,
    /// Each connection ends after so many bytes to the client.
    cut_after: u64,
    over: AtomicBool,
    closed: AtomicBool,
    connections: AtomicU64,
    to_client: AtomicU64,
    held: Mutex<Held>,
}

/// What the client has said while it was closed.
#[derive(Default)]
struct Held {
    /// What it asked for and did not take back, by connection and number.
    reads: BTreeMap<(u64, u64), Range<u64>>,
    cancels: u64,
}

impl Gate {
    pub fn start(to: SocketAddr, cut_after: u64) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            to,
            cut_after,
            over: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            to_client: AtomicU64::new(0),
            held: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        let acceptor = thread::spawn(move || {
            for client in listener.incoming() {
                if serving.over.load(Ordering::SeqCst) {
                    return;
                }
                let connection = serving.connections.fetch_add(1, Ordering::SeqCst);
                let (client, server) = (client.unwrap(), TcpStream::connect(serving.to).unwrap());
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let (there, home) = (Arc::clone(&serving), Arc::clone(&serving));
                thread::spawn(move || there.pass_requests(connection, client, server));
                thread::spawn(move || home.pass_answers(back.0, back.1));
            }
        });
        Self {
            address,
            shared,
            acceptor: Some(acceptor),
        }
    }

    pub fn uri(&self) -> String {
        format!("nbd://{}/", self.address)
    }

    pub fn close(&self, closed: bool) {
        self.shared.closed.store(closed, Ordering::SeqCst);
    }

    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Bytes that the client got.
    pub fn to_client(&self) -> u64 {
        self.shared.to_client.load(Ordering::SeqCst)
    }

    /// Reads that are held back and that the client has taken back meanwhile.
    pub fn cancels(&self) -> u64 {
        self.shared.held.lock().unwrap().cancels
    }

    /// Reads of nothing but this range that are held back and still wanted.
    pub fn wanted_within(&self, range: &Range<u64>) -> usize {
        let held = self.shared.held.lock().unwrap();
        let within = |read: &&Range<u64>| range.start <= read.start && read.end <= range.end;
        held.reads.values().filter(within).count()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.close(false);
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    /// Reads on while it is closed, so that all that the client says is seen.
    fn pass_requests(&self, connection: u64, mut from: TcpStream, mut to: TcpStream) {
        from.set_read_timeout(Some(Duration::from_millis(5)))
            .unwrap();
        let (mut chunk, mut held, mut ended) = (vec![0; 64 << 10], Vec::new(), false);
        // What was held back is noted up to here.
        let mut noted = 0;
        while !ended {
            match from.read(&mut chunk) {
                Ok(0) => ended = true,
                Ok(n) => held.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => ended = true,
            }
            if self.closed.load(Ordering::SeqCst) {
                noted += self.note(connection, &held[noted..]);
            } else {
                // Where the server's half has ended, read on: a socket that is closed over unread bytes
                // is reset, and takes with it what the client has not received yet.
                let _ = to.write_all(&held);
                held.clear();
                noted = 0;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    }

    /// Notes what is asked for and taken back; returns how many bytes need not be looked at again.
    fn note(&self, connection: u64, bytes: &[u8]) -> usize {
        let mut held = self.held.lock().unwrap();
        let mut at = 0;
        while let Some(header) = bytes[at..].first_chunk::<HEADER_BYTES>() {
            let Ok(header) = Header::decode(header) else {
                at += 1;
                continue;
            };
            let read = (connection, header.id);
            match header.kind {
                Kind::Read => {
                    let end = header.offset + u64::from(header.span);
                    held.reads.insert(read, header.offset..end);
                }
                Kind::Cancel if held.reads.remove(&read).is_some() => held.cancels += 1,
                _ => {}
            }
            at += HEADER_BYTES;
        }
        at
    }

    fn pass_answers(&self, mut from: TcpStream, mut to: TcpStream) {
        let (mut chunk, mut left) = (vec![0; 32 << 10], self.cut_after);
        while left > 0 {
            let most = chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = match from.read(&mut chunk[..most]) {
                Ok(n) if n > 0 => n,
                _ => break,
            };
            if to.write_all(&chunk[..n]).is_err() {
                break;
            }
            let n = u64::try_from(n).unwrap();
            left -= n;
            self.to_client.fetch_add(n, Ordering::SeqCst);
        }
        // All that was passed arrives; the client hangs up when it has it.
        let _ = to.shutdown(Shutdown::Write);
        let _ = from.shutdown(Shutdown::Both);
    }
}
