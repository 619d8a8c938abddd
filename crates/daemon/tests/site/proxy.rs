//! A link between two daemons that does to the bytes what it is told to.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// What happens to the bytes of one direction, by their place in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// A bit of this byte changes.
    Flip(usize),
    /// Every so many bytes, a bit of one changes.
    FlipEvery(usize),
    /// The stream ends before this byte.
    End(usize),
    /// So many bytes before this one come twice.
    Twice(usize, usize),
    /// So many bytes before this one and as many from it on change places.
    Swap(usize, usize),
    /// So many bytes from this one on are lost.
    Lose(usize, usize),
}

/// Decides for a connection, by its number, and a direction.
pub type Plan = Arc<dyn Fn(usize, Way) -> Fault + Send + Sync>;

pub struct Proxy {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    /// Connections so far.
    pub connections: Arc<AtomicUsize>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn start(to: SocketAddr, plan: Plan) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(AtomicUsize::new(0));
        let (ended, count) = (Arc::clone(&over), Arc::clone(&connections));
        let acceptor = thread::spawn(move || {
            for client in listener.incoming() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let (client, server) = (client.unwrap(), TcpStream::connect(to));
                let Ok(server) = server else { continue };
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let number = count.fetch_add(1, Ordering::SeqCst);
                let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
                let (there, home) = (plan(number, Way::ToServer), plan(number, Way::ToClient));
                thread::spawn(move || pass(client, server, there));
                thread::spawn(move || pass(back.0, back.1, home));
            }
        });
        Self {
            address,
            over,
            connections,
            acceptor: Some(acceptor),
        }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Passes bytes on until either side ends, then ends both.
fn pass(mut from: TcpStream, mut to: TcpStream, fault: Fault) {
    let mut past = 0;
    let mut held: Vec<u8> = Vec::new();
    let mut chunk = vec![0; 32 << 10];
    loop {
        let n = match from.read(&mut chunk) {
            Ok(n) if n > 0 => n,
            _ => break,
        };
        held.extend_from_slice(&chunk[..n]);
        let (out, taken, end) = change(&held, past, fault);
        past += taken;
        held.drain(..taken);
        if to.write_all(&out).is_err() || end {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// What leaves for what has come, `past` bytes into the stream; how much was taken; whether this is
/// the end. What a fault needs to see together is held back until it is there.
fn change(held: &[u8], past: usize, fault: Fault) -> (Vec<u8>, usize, bool) {
    let all = (held.to_vec(), held.len(), false);
    let end = past + held.len();
    match fault {
        Fault::Flip(at) if (past..end).contains(&at) => {
            let mut out = held.to_vec();
            out[at - past] ^= 1 << (at % 8);
            (out, held.len(), false)
        }
        Fault::FlipEvery(every) => {
            let mut out = held.to_vec();
            let first = past.next_multiple_of(every).max(every);
            for at in (first..end).step_by(every) {
                out[at - past] ^= 1 << (at / every % 8);
            }
            (out, held.len(), false)
        }
        Fault::End(at) if end >= at => (held[..at.saturating_sub(past)].to_vec(), held.len(), true),
        Fault::Twice(at, len) | Fault::Swap(at, len) if past <= at - len && end > at - len => {
            let more = if matches!(fault, Fault::Swap(..)) {
                len
            } else {
                0
            };
            if end < at + more {
                // Not all is there yet: only what is before it goes.
                let before = at - len - past;
                return (held[..before].to_vec(), before, false);
            }
            let (a, b) = (at - len - past, at - past);
            let out = match fault {
                Fault::Twice(..) => [&held[..b], &held[a..]].concat(),
                _ => [&held[..a], &held[b..b + len], &held[a..b], &held[b + len..]].concat(),
            };
            (out, held.len(), false)
        }
        Fault::Lose(at, len) => {
            let keep = |n: &usize| !(at..at + len).contains(&(past + n));
            let out = (0..held.len()).filter(keep).map(|n| held[n]).collect();
            (out, held.len(), false)
        }
        _ => all,
    }
}
