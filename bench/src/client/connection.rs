//! One connection to a server: the handshake, requests out, replies in.
//!
//! Owns the socket and its two buffers. Called by `load`, which decides what to ask for. Data of
//! replies is left in the receive buffer and overwritten, except for the requests of the sample.

use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hikkoshi_nbd::wire::{
    CHUNK_BYTES, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_BYTES,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, command, export, handshake, info, option,
    reply,
};

use super::content::Content;

/// Bytes received in one call: 32 replies of 4 KiB fit, and it stays in the second-level cache.
const RECEIVE_BYTES: usize = 256 << 10;
/// The most slices one send may have (IOV_MAX on Linux).
const MAX_SLICES: usize = 1024;
/// The longest reply to an option that is taken from a server.
const MAX_OPTION_REPLY_BYTES: u32 = 64 << 10;
/// How long a server may take to answer before the bench gives up on it.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port on 127.0.0.1.
    Tcp(u16),
}

impl Endpoint {
    /// As an NBD URI, for other people's clients and for `--from`.
    pub fn uri(&self) -> String {
        match self {
            Self::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
            Self::Tcp(port) => format!("nbd://127.0.0.1:{port}"),
        }
    }

    /// As hikkoshi's `--listen` takes it.
    pub fn listen(&self) -> String {
        match self {
            Self::Unix(path) => format!("unix:{}", path.display()),
            Self::Tcp(port) => format!("tcp://127.0.0.1:{port}"),
        }
    }
}

/// A request in flight.
#[derive(Clone, Debug, Default)]
pub struct Slot {
    /// What the reply must carry; zero when nothing is in flight.
    pub cookie: u64,
    /// What was asked for, in the load's terms.
    pub command: u16,
    /// Where.
    pub offset: u64,
    /// The number of a write.
    pub write: u64,
    /// Bytes of data still to come.
    pub expected: u32,
    /// The data, when this request belongs to the sample.
    pub sample: Option<Vec<u8>>,
}

/// Where in a reply the next byte received belongs.
enum Position {
    Header,
    Data {
        slot: usize,
        left: usize,
        done: bool,
    },
}

/// A connection in transmission.
pub struct Connection {
    socket: OwnedFd,
    /// Size of the export in bytes.
    pub size_bytes: u64,
    /// Requests in flight, by the low 16 bits of their cookie.
    pub slots: Vec<Slot>,
    receive: Vec<u8>,
    filled: usize,
    position: Position,
    send: Vec<u8>,
    /// Ends of pieces of `send`, and what of the pool goes out after each.
    tails: Vec<(usize, Range<usize>)>,
    next_cookie: u64,
}

impl Connection {
    /// Connects, shakes hands for the default export, and is ready for `depth` requests at once.
    pub fn open(endpoint: &Endpoint, depth: usize, structured: bool) -> Result<Self> {
        let (size_bytes, flags, socket) = match endpoint {
            Endpoint::Unix(path) => {
                let mut stream = UnixStream::connect(path).context("connect")?;
                stream.set_read_timeout(Some(TIMEOUT))?;
                let (size, flags) = shake_hands(&mut stream, structured)?;
                (size, flags, OwnedFd::from(stream))
            }
            Endpoint::Tcp(port) => {
                let mut stream = TcpStream::connect(("127.0.0.1", *port)).context("connect")?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(TIMEOUT))?;
                let (size, flags) = shake_hands(&mut stream, structured)?;
                (size, flags, OwnedFd::from(stream))
            }
        };
        ensure!(
            flags & export::HAS_FLAGS != 0,
            "the server sent no transmission flags"
        );
        Ok(Self {
            socket,
            size_bytes,
            slots: vec![Slot::default(); depth],
            receive: vec![0; RECEIVE_BYTES],
            filled: 0,
            position: Position::Header,
            send: Vec::new(),
            tails: Vec::new(),
            next_cookie: 1,
        })
    }

    /// The socket, to wait for.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Appends a request in slot `slot` to what the next [`Self::flush`] sends.
    pub fn request(&mut self, slot: usize, command: u16, offset: u64, length: u32, sampled: bool) {
        let cookie = (self.next_cookie << 16) | u64::try_from(slot).expect("few slots");
        self.next_cookie += 1;
        let mut header = [0; 28];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&command.to_be_bytes());
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..].copy_from_slice(&length.to_be_bytes());
        self.send.extend_from_slice(&header);
        let state = &mut self.slots[slot];
        state.cookie = cookie;
        state.command = command;
        state.offset = offset;
        state.expected = if command == self::command::READ {
            length
        } else {
            0
        };
        state.sample = sampled.then(|| Vec::with_capacity(usize::try_from(length).unwrap_or(0)));
    }

    /// Appends the pattern of one block as payload to the write just requested.
    pub fn payload(&mut self, offset: u64, number: u64) {
        self.send.extend_from_slice(&Content::stamp(offset, number));
        self.tails
            .push((self.send.len(), Content::tail(offset, number)));
    }

    /// Appends `data` as payload to the write just requested.
    pub fn payload_bytes(&mut self, data: &[u8]) {
        self.send.extend_from_slice(data);
    }

    /// Sends the requests gathered so far, in one call where that is possible.
    pub fn flush(&mut self, content: &Content) -> Result<()> {
        // What is sent is bytes gathered here (headers, stamps) with slices of the pool between.
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(2 * self.tails.len() + 1);
        let mut at = 0;
        for (end, tail) in &self.tails {
            if slices.len() + 2 > MAX_SLICES {
                send_all(self.socket.as_fd(), &mut slices)?;
                slices.clear();
            }
            slices.push(IoSlice::new(&self.send[at..*end]));
            slices.push(IoSlice::new(content.bytes(tail.clone())));
            at = *end;
        }
        if at < self.send.len() {
            slices.push(IoSlice::new(&self.send[at..]));
        }
        send_all(self.socket.as_fd(), &mut slices)?;
        self.send.clear();
        self.tails.clear();
        Ok(())
    }

    /// Receives once, waiting if there is nothing yet, and appends the slots whose replies are complete
    /// to `done`.
    pub fn receive(&mut self, done: &mut Vec<usize>) -> Result<()> {
        let space = &mut self.receive[self.filled..];
        let (count, _) =
            rustix::net::recv(&self.socket, &mut *space, rustix::net::RecvFlags::empty())
                .context("receive replies")?;
        ensure!(count > 0, "the server closed the connection");
        let end = self.filled + count;
        let mut at = 0;
        loop {
            match self.position {
                Position::Header => {
                    let Some(used) = self.header(at, end, done)? else {
                        break;
                    };
                    at += used;
                }
                Position::Data {
                    slot,
                    left,
                    done: last,
                } => {
                    let here = left.min(end - at);
                    if let Some(sample) = &mut self.slots[slot].sample {
                        sample.extend_from_slice(&self.receive[at..at + here]);
                    }
                    at += here;
                    if here < left {
                        self.position = Position::Data {
                            slot,
                            left: left - here,
                            done: last,
                        };
                        break;
                    }
                    self.position = Position::Header;
                    if last {
                        self.finish(slot, done)?;
                    }
                }
            }
        }
        self.receive.copy_within(at..end, 0);
        self.filled = end - at;
        Ok(())
    }

    /// Takes a header at `at` if all of it is there; returns its length.
    fn header(&mut self, at: usize, end: usize, done: &mut Vec<usize>) -> Result<Option<usize>> {
        let bytes = &self.receive[at..end];
        let Some(magic) = bytes.first_chunk::<4>().map(|m| u32::from_be_bytes(*m)) else {
            return Ok(None);
        };
        match magic {
            SIMPLE_REPLY_MAGIC => {
                let Some(bytes) = bytes.first_chunk::<SIMPLE_REPLY_BYTES>() else {
                    return Ok(None);
                };
                let error = u32::from_be_bytes(bytes[4..8].try_into().expect("four bytes"));
                let cookie = u64::from_be_bytes(bytes[8..].try_into().expect("eight bytes"));
                let slot = self.slot_of(cookie)?;
                ensure!(error == 0, "the server answered with error {error}");
                let left = usize::try_from(self.slots[slot].expected)?;
                self.slots[slot].expected = 0;
                self.after_header(slot, left, true, done)?;
                Ok(Some(SIMPLE_REPLY_BYTES))
            }
            STRUCTURED_REPLY_MAGIC => {
                let Some(head) = bytes.first_chunk::<CHUNK_BYTES>() else {
                    return Ok(None);
                };
                let last = u16::from_be_bytes([head[4], head[5]]) & chunk::FLAG_DONE != 0;
                let kind = u16::from_be_bytes([head[6], head[7]]);
                let cookie = u64::from_be_bytes(head[8..16].try_into().expect("eight bytes"));
                let length = u32::from_be_bytes(head[16..].try_into().expect("four bytes"));
                let body = &bytes[CHUNK_BYTES..];
                let slot = self.slot_of(cookie)?;
                match kind {
                    chunk::NONE => {
                        self.after_header(slot, 0, last, done)?;
                        Ok(Some(CHUNK_BYTES))
                    }
                    chunk::OFFSET_DATA | chunk::OFFSET_HOLE => {
                        let hole = kind == chunk::OFFSET_HOLE;
                        let fixed = if hole { 12 } else { 8 };
                        if body.len() < fixed {
                            return Ok(None);
                        }
                        let (covers, left) = if hole {
                            (
                                u32::from_be_bytes(body[8..12].try_into().expect("four bytes")),
                                0,
                            )
                        } else {
                            let data = length.checked_sub(8).context("short data chunk")?;
                            (data, usize::try_from(data)?)
                        };
                        let state = &mut self.slots[slot];
                        state.expected = state
                            .expected
                            .checked_sub(covers)
                            .context("too much data")?;
                        if let (true, Some(sample)) = (hole, &mut state.sample) {
                            sample.resize(sample.len() + usize::try_from(covers)?, 0);
                        }
                        self.after_header(slot, left, last, done)?;
                        Ok(Some(CHUNK_BYTES + fixed))
                    }
                    other => bail!("the server answered with chunk type {other:#x}"),
                }
            }
            other => bail!("the server sent {other:#010x} where a reply should begin"),
        }
    }

    fn after_header(
        &mut self,
        slot: usize,
        left: usize,
        last: bool,
        done: &mut Vec<usize>,
    ) -> Result<()> {
        if left > 0 {
            self.position = Position::Data {
                slot,
                left,
                done: last,
            };
        } else if last {
            self.finish(slot, done)?;
        }
        Ok(())
    }

    fn finish(&mut self, slot: usize, done: &mut Vec<usize>) -> Result<()> {
        ensure!(
            self.slots[slot].expected == 0,
            "a reply ended before all its data"
        );
        self.slots[slot].cookie = 0;
        done.push(slot);
        Ok(())
    }

    fn slot_of(&self, cookie: u64) -> Result<usize> {
        let slot = usize::try_from(cookie & 0xffff)?;
        let known = cookie != 0 && self.slots.get(slot).is_some_and(|s| s.cookie == cookie);
        ensure!(
            known,
            "a reply to a request that was never sent (cookie {cookie:#x})"
        );
        Ok(slot)
    }

    /// Says goodbye; nothing may be in flight.
    pub fn close(mut self) -> Result<()> {
        self.request(0, command::DISC, 0, 0, false);
        send_all(self.socket.as_fd(), &mut [IoSlice::new(&self.send)])
    }
}

/// Sends all of `slices` on a blocking socket.
fn send_all(socket: BorrowedFd<'_>, slices: &mut [IoSlice<'_>]) -> Result<()> {
    let mut rest = slices;
    while !rest.is_empty() {
        let count = rustix::io::writev(socket, rest).context("send requests")?;
        IoSlice::advance_slices(&mut rest, count);
    }
    Ok(())
}

/// Fixed newstyle up to transmission; returns the export's size and flags.
fn shake_hands(stream: &mut (impl Read + Write), structured: bool) -> Result<(u64, u16)> {
    let mut greeting = [0; 18];
    stream
        .read_exact(&mut greeting)
        .context("read the greeting")?;
    ensure!(
        greeting[..8] == INIT_MAGIC.to_be_bytes(),
        "not an NBD server"
    );
    ensure!(
        greeting[8..16] == OPTION_MAGIC.to_be_bytes(),
        "an oldstyle NBD server"
    );
    let flags = handshake::C_FIXED_NEWSTYLE | handshake::C_NO_ZEROES;
    stream.write_all(&flags.to_be_bytes())?;
    if structured {
        send_option(stream, option::STRUCTURED_REPLY, &[])?;
        let (kind, _) = option_reply(stream, option::STRUCTURED_REPLY)?;
        ensure!(kind == reply::ACK, "the server has no structured replies");
    }
    // An empty name (four bytes of length) and no information asked for (two bytes of count).
    send_option(stream, option::GO, &[0; 6])?;
    let mut found = None;
    loop {
        let (kind, data) = option_reply(stream, option::GO)?;
        match kind {
            reply::ACK => return found.context("the server did not describe the export"),
            reply::INFO if data.len() >= 12 && data[..2] == info::EXPORT.to_be_bytes() => {
                let size = u64::from_be_bytes(data[2..10].try_into().expect("eight bytes"));
                found = Some((size, u16::from_be_bytes([data[10], data[11]])));
            }
            reply::INFO => {}
            other => bail!("the server refused the export ({other:#x})"),
        }
    }
}

fn send_option(stream: &mut impl Write, option: u32, data: &[u8]) -> Result<()> {
    let length = u32::try_from(data.len())?;
    let head = [
        &OPTION_MAGIC.to_be_bytes()[..],
        &option.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    stream
        .write_all(&[head.concat().as_slice(), data].concat())
        .context("send an option")
}

fn option_reply(stream: &mut impl Read, option: u32) -> Result<(u32, Vec<u8>)> {
    let mut head = [0; 20];
    stream
        .read_exact(&mut head)
        .context("read the reply to an option")?;
    ensure!(
        head[..8] == OPTION_REPLY_MAGIC.to_be_bytes(),
        "not a reply to an option"
    );
    ensure!(
        head[8..12] == option.to_be_bytes(),
        "a reply to another option"
    );
    let kind = u32::from_be_bytes(head[12..16].try_into().expect("four bytes"));
    let length = u32::from_be_bytes(head[16..].try_into().expect("four bytes"));
    ensure!(
        length <= MAX_OPTION_REPLY_BYTES,
        "a reply to an option of {length} bytes"
    );
    let mut data = vec![0; usize::try_from(length)?];
    stream
        .read_exact(&mut data)
        .context("read the reply to an option")?;
    Ok((kind, data))
}
