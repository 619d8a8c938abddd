//! A small NBD client: a handshake, requests in batches, simple replies.
//!
//! Written from the protocol document and independent of `hikkoshi-nbd`, so that both sides of a
//! test do not share a mistake. It never retries, and hangs up when dropped.

use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
/// Fixed newstyle, and no zeroes after the handshake.
const CLIENT_FLAGS: u32 = 3;
const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 2;
/// The longest reply to an option that is taken.
const MAX_OPTION_REPLY_BYTES: u32 = 64 << 10;
/// Far above what any answer takes that comes at all.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What is asked for. Offsets and lengths in bytes.
#[allow(
    missing_docs,
    reason = "the fields are NBD's, and the same in every variant"
)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read.
    Read { offset: u64, len: u32 },
    /// Write, with FUA or without.
    Write {
        offset: u64,
        data: Vec<u8>,
        fua: bool,
    },
    /// Zero; `no_hole` keeps the space allocated.
    Zero {
        offset: u64,
        len: u32,
        fua: bool,
        no_hole: bool,
    },
    /// Trim.
    Trim { offset: u64, len: u32, fua: bool },
    /// Flush.
    Flush,
}

impl Request {
    /// Command, flags, offset, length.
    fn head(&self) -> Result<(u16, u16, u64, u32)> {
        let fua_flag = |fua: &bool| if *fua { FLAG_FUA } else { 0 };
        Ok(match self {
            Self::Read { offset, len } => (0, 0, *offset, *len),
            Self::Write { offset, data, fua } => {
                (1, fua_flag(fua), *offset, u32::try_from(data.len())?)
            }
            Self::Flush => (3, 0, 0, 0),
            Self::Trim { offset, len, fua } => (4, fua_flag(fua), *offset, *len),
            Self::Zero {
                offset,
                len,
                fua,
                no_hole,
            } => {
                let hole = if *no_hole { FLAG_NO_HOLE } else { 0 };
                (6, fua_flag(fua) | hole, *offset, *len)
            }
        })
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Which request of the batch it is for.
    pub index: usize,
    /// The error, 0 for none.
    pub errno: u32,
    /// What a read read.
    pub data: Vec<u8>,
}

/// A connection in transmission.
pub struct Client {
    stream: UnixStream,
    size_bytes: u64,
    next_cookie: u64,
    /// Cookies in flight: the index in the batch, and the bytes that a good reply brings.
    waiting: HashMap<u64, (usize, usize)>,
}

impl Client {
    /// Connects to the default export of the server at a Unix socket.
    ///
    /// # Errors
    /// Nobody listens, or it does not speak fixed newstyle.
    pub fn connect(path: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(path).context("connect")?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let size_bytes = shake_hands(&mut stream)?;
        Ok(Self {
            stream,
            size_bytes,
            next_cookie: 1,
            waiting: HashMap::new(),
        })
    }

    /// The export's size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Sends requests, all in one go; the answers come by [`Client::receive`].
    ///
    /// # Errors
    /// The connection is gone. Any of them may have arrived.
    pub fn send(&mut self, batch: &[Request]) -> Result<()> {
        let mut bytes = Vec::new();
        for (index, request) in batch.iter().enumerate() {
            let (command, flags, offset, len) = request.head()?;
            bytes.extend(REQUEST_MAGIC.to_be_bytes());
            bytes.extend(flags.to_be_bytes());
            bytes.extend(command.to_be_bytes());
            bytes.extend(self.next_cookie.to_be_bytes());
            bytes.extend(offset.to_be_bytes());
            bytes.extend(len.to_be_bytes());
            let mut expected = 0;
            match request {
                Request::Write { data, .. } => bytes.extend(data),
                Request::Read { len, .. } => expected = usize::try_from(*len)?,
                _ => {}
            }
            self.waiting.insert(self.next_cookie, (index, expected));
            self.next_cookie += 1;
        }
        self.stream.write_all(&bytes).context("send requests")
    }

    /// How many requests wait for their answer.
    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// The next answer, in the order in which the server gives them.
    ///
    /// # Errors
    /// The connection is gone, or the server does not keep to the protocol.
    pub fn receive(&mut self) -> Result<Answer> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).context("read a reply")?;
        let (magic, errno, cookie) = (be32(&head[..4]), be32(&head[4..8]), be64(&head[8..]));
        ensure!(
            magic == SIMPLE_REPLY_MAGIC,
            "{magic:#010x} where a reply should begin"
        );
        let Some((index, expected)) = self.waiting.remove(&cookie) else {
            bail!("a reply to cookie {cookie}, which was never sent or is answered already");
        };
        let mut data = vec![0; if errno == 0 { expected } else { 0 }];
        self.stream.read_exact(&mut data).context("read data")?;
        Ok(Answer { index, errno, data })
    }

    /// One read, with nothing else in flight.
    ///
    /// # Errors
    /// As [`Client::receive`]; or the server answers with an error.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        Ok(self.ask(Request::Read { offset, len })?.data)
    }

    /// One request, with nothing else in flight.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn ask(&mut self, request: Request) -> Result<Answer> {
        let batch = [request];
        self.send(&batch)?;
        let answer = self.receive()?;
        ensure!(
            answer.errno == 0,
            "{:?} was answered with error {}",
            batch[0].head()?,
            answer.errno
        );
        Ok(answer)
    }
}

/// Whether the server has gone away, which is no fault of a server that was killed.
pub fn is_hang_up(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| {
        matches!(
            e.kind(),
            io::ErrorKind::UnexpectedEof
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
        )
    })
}

/// Fixed newstyle up to transmission; the export's size.
fn shake_hands(stream: &mut UnixStream) -> Result<u64> {
    let mut greeting = [0; 18];
    stream
        .read_exact(&mut greeting)
        .context("read the greeting")?;
    ensure!(
        be64(&greeting[..8]) == INIT_MAGIC && be64(&greeting[8..16]) == OPTION_MAGIC,
        "no newstyle NBD server"
    );
    let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(OPTION_GO.to_be_bytes());
    hello.extend(6_u32.to_be_bytes());
    // An empty name (four bytes of length), no information asked for (two bytes of count).
    hello.extend([0; 6]);
    stream.write_all(&hello).context("ask for the export")?;
    let mut size = None;
    loop {
        let mut head = [0; 20];
        stream
            .read_exact(&mut head)
            .context("read an option's reply")?;
        ensure!(
            be64(&head[..8]) == OPTION_REPLY_MAGIC,
            "no reply to an option"
        );
        let (kind, len) = (be32(&head[12..16]), be32(&head[16..]));
        ensure!(
            len <= MAX_OPTION_REPLY_BYTES,
            "a reply of {len} bytes to an option"
        );
        let mut data = vec![0; usize::try_from(len)?];
        stream
            .read_exact(&mut data)
            .context("read an option's reply")?;
        match kind {
            REPLY_ACK => return size.context("the server did not describe the export"),
            REPLY_INFO if data.len() >= 12 && data[..2] == [0, 0] => {
                size = Some(be64(&data[2..10]))
            }
            REPLY_INFO => {}
            other => bail!("the server refuses the export: reply {other:#x}"),
        }
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().expect("four bytes are given"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("eight bytes are given"))
}
