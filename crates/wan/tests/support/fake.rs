//! A server that follows a script, to be wrong in exactly one way.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hikkoshi_nbd::wire::{self, chunk, export, info, option, reply};
use hikkoshi_wan::{Address, NbdSourceConfig};

/// A scripted server on a loopback port; it ends with this value.
pub struct Fake {
    port: u16,
    over: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl Fake {
    /// Runs `script` for each connection, with its number, on a thread of its own. A script ends
    /// when its peer hangs up.
    pub fn start(script: impl Fn(usize, Peer) + Send + Sync + 'static) -> Self {
        Self::on(TcpListener::bind(("127.0.0.1", 0)).unwrap(), script)
    }

    /// The same on a listener that exists.
    pub fn on(listener: TcpListener, script: impl Fn(usize, Peer) + Send + Sync + 'static) -> Self {
        let port = listener.local_addr().unwrap().port();
        let over = Arc::new(AtomicBool::new(false));
        let (script, ended) = (Arc::new(script), Arc::clone(&over));
        let acceptor = thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if ended.load(Ordering::SeqCst) {
                    return;
                }
                let (stream, script) = (stream.unwrap(), Arc::clone(&script));
                thread::spawn(move || {
                    script(
                        number,
                        Peer {
                            stream,
                            left: usize::MAX,
                        },
                    )
                });
            }
        });
        Self {
            port,
            over,
            acceptor: Some(acceptor),
        }
    }

    /// Settings for it: one connection, and pauses that keep a test short.
    pub fn config(&self) -> NbdSourceConfig {
        config(self.port)
    }
}

/// Settings for a server on a loopback port.
pub fn config(port: u16) -> NbdSourceConfig {
    let address = Address::Tcp {
        host: "127.0.0.1".to_owned(),
        port,
    };
    let mut config = NbdSourceConfig::new(address, "");
    config.connections = 1;
    config.backoff_min = Duration::from_millis(5);
    config.backoff_max = Duration::from_millis(50);
    config
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// What a server does to a client that sends options before it has the answer to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// Answers them in turn.
    Taken,
    HangUp,
    /// Refuses the contexts.
    Sour,
}

/// What the client sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub command: u16,
    pub cookie: [u8; 8],
    pub offset: u64,
    pub len: u32,
}

/// The server's end of a connection.
pub struct Peer {
    stream: TcpStream,
    /// How many more bytes it sends before it hangs up.
    pub left: usize,
}

pub const MULTI: u16 = export::HAS_FLAGS | export::READ_ONLY | export::CAN_MULTI_CONN;

impl Peer {
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let bytes = &bytes[..bytes.len().min(self.left)];
        self.left -= bytes.len();
        self.stream.write_all(bytes)?;
        if self.left == 0 {
            self.stream.shutdown(Shutdown::Both)?;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }

    fn receive<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// An honest handshake for a disk of `size` bytes.
    pub fn greet(&mut self, size: u64, structured: bool) -> io::Result<()> {
        self.greet_with(size, structured, Haste::Taken)
    }

    /// The same, with a manner of its own towards options that come before the answer to another.
    pub fn greet_with(&mut self, size: u64, structured: bool, haste: Haste) -> io::Result<()> {
        let greeting = [
            &wire::INIT_MAGIC.to_be_bytes()[..],
            &wire::OPTION_MAGIC.to_be_bytes(),
            &(wire::handshake::FIXED_NEWSTYLE | wire::handshake::NO_ZEROES).to_be_bytes(),
        ];
        self.send(&greeting.concat())?;
        self.receive::<4>()?;
        loop {
            self.receive::<8>()?;
            let number = u32::from_be_bytes(self.receive()?);
            let len = u32::from_be_bytes(self.receive()?);
            for _ in 0..len {
                self.receive::<1>()?;
            }
            let more = || {
                // What was sent at once has arrived at once, on a loopback.
                self.stream.set_nonblocking(true)?;
                let more = self.stream.peek(&mut [0]);
                self.stream.set_nonblocking(false)?;
                Ok::<_, io::Error>(more.is_ok())
            };
            match haste {
                Haste::Taken => {}
                Haste::HangUp if more()? => return self.stream.shutdown(Shutdown::Both),
                Haste::Sour if number == option::SET_META_CONTEXT => {
                    let code = if more()? {
                        reply::ERR_INVALID
                    } else {
                        reply::ACK
                    };
                    self.answer(number, code, &[])?;
                    continue;
                }
                Haste::HangUp | Haste::Sour => {}
            }
            match number {
                option::STRUCTURED_REPLY if structured => self.answer(number, reply::ACK, &[])?,
                option::GO => {
                    let info = [
                        &info::EXPORT.to_be_bytes()[..],
                        &size.to_be_bytes(),
                        &MULTI.to_be_bytes(),
                    ];
                    self.answer(number, reply::INFO, &info.concat())?;
                    return self.answer(number, reply::ACK, &[]);
                }
                _ => self.answer(number, reply::ERR_UNSUP, &[])?,
            }
        }
    }

    fn answer(&mut self, number: u32, code: u32, payload: &[u8]) -> io::Result<()> {
        let len = u32::try_from(payload.len()).unwrap();
        let header = [
            &wire::OPTION_REPLY_MAGIC.to_be_bytes()[..],
            &number.to_be_bytes(),
            &code.to_be_bytes(),
            &len.to_be_bytes(),
            payload,
        ];
        self.send(&header.concat())
    }

    pub fn request(&mut self) -> io::Result<Request> {
        let bytes: [u8; 28] = self.receive()?;
        Ok(Request {
            command: u16::from_be_bytes(bytes[6..8].try_into().unwrap()),
            cookie: bytes[8..16].try_into().unwrap(),
            offset: u64::from_be_bytes(bytes[16..24].try_into().unwrap()),
            len: u32::from_be_bytes(bytes[24..28].try_into().unwrap()),
        })
    }

    pub fn simple(&mut self, cookie: [u8; 8], error: u32, data: &[u8]) -> io::Result<()> {
        let magic = wire::SIMPLE_REPLY_MAGIC.to_be_bytes();
        self.send(&[&magic[..], &error.to_be_bytes(), &cookie, data].concat())
    }

    pub fn data(&mut self, of: &Request, offset: u64, data: &[u8], done: bool) -> io::Result<()> {
        let len = u32::try_from(data.len() + 8).unwrap();
        let header = [
            &wire::STRUCTURED_REPLY_MAGIC.to_be_bytes()[..],
            &u16::from(done).to_be_bytes(),
            &chunk::OFFSET_DATA.to_be_bytes(),
            &of.cookie,
            &len.to_be_bytes(),
            &offset.to_be_bytes(),
            data,
        ];
        self.send(&header.concat())
    }

    /// Answers every read honestly (with simple replies) until the peer hangs up.
    pub fn serve(&mut self, disk: &[u8]) -> io::Result<()> {
        loop {
            let request = self.request()?;
            if request.command == wire::command::DISC {
                return Ok(());
            }
            self.simple(request.cookie, 0, slice(disk, &request))?;
        }
    }
}

/// The bytes a read asks for.
pub fn slice<'a>(disk: &'a [u8], request: &Request) -> &'a [u8] {
    let start = usize::try_from(request.offset).unwrap();
    &disk[start..start + usize::try_from(request.len).unwrap()]
}
