//! A link on which time is counted in round trips, and nothing else passes.
//!
//! In each round it takes what the clients have to say until they fall silent, hands all of it over,
//! takes what the servers have to say to that, and hands it back. A round that was taken to be over
//! too early only makes the count higher, so a count that is low is true on any machine.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use hikkoshi_wan::transport::Kind;
use hikkoshi_wan::transport::frame::{HEADER_BYTES, Header};

/// What was seen of one connection.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The round of its first packet; rounds count from 1.
    pub began: usize,
    /// In which round its first bytes of the disk arrived.
    pub data: Option<usize>,
    /// In which round which messages about the move were said: their first bytes.
    pub said: Vec<(u8, usize)>,
}

pub struct Rounds {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
    thread: Option<JoinHandle<()>>,
}

impl Rounds {
    /// A link to `to`. Whoever says nothing for `quiet` has nothing to say in this round.
    pub fn start(to: SocketAddr, quiet: Duration) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut link = Link {
            listener,
            to,
            quiet,
            round: 0,
            ends: Vec::new(),
            seen: Arc::clone(&seen),
        };
        let ended = Arc::clone(&over);
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::SeqCst) {
                link.pass_one_round();
            }
        });
        Self {
            address,
            over,
            seen,
            thread: Some(thread),
        }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// What was seen so far, in the order in which the connections were made.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Rounds {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Link {
    listener: TcpListener,
    to: SocketAddr,
    quiet: Duration,
    round: usize,
    ends: Vec<Ends>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// The two ends of a connection.
struct Ends {
    client: TcpStream,
    /// The server hears of it a round later, when the client has heard that it may connect.
    server: Option<TcpStream>,
    there: Vec<u8>,
    home: Vec<u8>,
    over: bool,
}

impl Link {
    fn pass_one_round(&mut self) {
        // Who connected before this round is taken for connected by now.
        let connected = self.ends.len();
        self.gather(true);
        if self.ends.is_empty() {
            return;
        }
        self.round += 1;
        let fresh = self.ends.len() - connected;
        for _ in 0..fresh {
            self.seen.lock().unwrap().push(Seen {
                began: self.round,
                ..Seen::default()
            });
        }
        for (number, ends) in self.ends[..connected].iter_mut().enumerate() {
            let server = ends.server.get_or_insert_with(|| {
                let server = TcpStream::connect(self.to).unwrap();
                server.set_nonblocking(true).unwrap();
                server
            });
            note(&ends.there, self.round, &self.seen, number);
            ends.over |= send(server, &mut ends.there).is_err();
        }
        self.gather(false);
        for (number, ends) in self.ends[..connected].iter_mut().enumerate() {
            note(&ends.home, self.round, &self.seen, number);
            ends.over |= send(&mut ends.client, &mut ends.home).is_err();
            if ends.over {
                let _ = ends.client.shutdown(Shutdown::Both);
                if let Some(server) = &ends.server {
                    let _ = server.shutdown(Shutdown::Both);
                }
            }
        }
    }

    /// Takes what clients, or servers, say, until all are silent.
    fn gather(&mut self, clients: bool) {
        let mut last = Instant::now();
        while last.elapsed() < self.quiet {
            let mut any = false;
            if clients && let Ok((client, _)) = self.listener.accept() {
                client.set_nonblocking(true).unwrap();
                client.set_nodelay(true).unwrap();
                self.ends.push(Ends {
                    client,
                    server: None,
                    there: Vec::new(),
                    home: Vec::new(),
                    over: false,
                });
                any = true;
            }
            for ends in self.ends.iter_mut().filter(|ends| !ends.over) {
                let (from, into) = if clients {
                    (Some(&mut ends.client), &mut ends.there)
                } else {
                    (ends.server.as_mut(), &mut ends.home)
                };
                let Some(from) = from else { continue };
                let mut chunk = [0; 64 << 10];
                match from.read(&mut chunk) {
                    Ok(0) => ends.over = true,
                    Ok(n) => {
                        into.extend_from_slice(&chunk[..n]);
                        any = true;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => ends.over = true,
                }
            }
            if any {
                last = Instant::now();
            } else {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn send(to: &mut TcpStream, bytes: &mut Vec<u8>) -> std::io::Result<()> {
    to.set_nonblocking(false)?;
    let outcome = to.write_all(bytes);
    to.set_nonblocking(true)?;
    bytes.clear();
    outcome
}

/// Looks for the frames that matter. What is asked and answered before data flows is short, and so
/// lies in one piece; in plain NBD any long answer is data.
fn note(bytes: &[u8], round: usize, seen: &Mutex<Vec<Seen>>, number: usize) {
    let mut seen = seen.lock().unwrap();
    let seen = &mut seen[number];
    for at in 0..bytes.len().saturating_sub(HEADER_BYTES - 1) {
        let header = bytes[at..].first_chunk::<HEADER_BYTES>().unwrap();
        if &header[..3] != b"HKF" {
            continue;
        }
        match Header::decode(header).map(|header| header.kind) {
            Ok(Kind::Data) => {
                seen.data.get_or_insert(round);
            }
            Ok(Kind::Tell) => seen.said.push((bytes[at + HEADER_BYTES], round)),
            _ => {}
        }
    }
    if bytes.len() > 8 << 10 {
        seen.data.get_or_insert(round);
    }
}
