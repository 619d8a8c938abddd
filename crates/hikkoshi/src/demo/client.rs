//! The guest's disk: a small blocking NBD client, one request at a time, as a guest's virtual
//! disk would be with a queue of one.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use hikkoshi_nbd::wire::{
    INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_REPLY_BYTES,
    SIMPLE_REPLY_MAGIC, command, handshake, info, option, reply,
};

/// Bytes that an answer in the handshake may have.
const MAX_REPLY_BYTES: u32 = 64 << 10;

/// A connection to an export.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    cookie: u64,
    size_bytes: u64,
}

impl Client {
    /// Connects to the default export at a Unix socket.
    ///
    /// # Errors
    /// Nobody listens, or the handshake fails.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let mut client = Self {
            stream: UnixStream::connect(path)?,
            cookie: 0,
            size_bytes: 0,
        };
        client.handshake()?;
        Ok(client)
    }

    /// The export's size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The server's error, or that of the connection.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.send(command::READ, offset, buf.len(), &[])?;
        self.answer()?;
        self.stream.read_exact(buf)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.send(command::WRITE, offset, data.len(), data)?;
        self.answer()
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn flush(&mut self) -> io::Result<()> {
        self.send(command::FLUSH, 0, 0, &[])?;
        self.answer()
    }

    /// Says good-bye.
    ///
    /// # Errors
    /// That of the connection.
    pub fn disconnect(mut self) -> io::Result<()> {
        self.send(command::DISC, 0, 0, &[])
    }

    fn handshake(&mut self) -> io::Result<()> {
        let greeting: [u8; 18] = self.take()?;
        let magics = [INIT_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if greeting[..16] != magics[..] || flags & handshake::FIXED_NEWSTYLE == 0 {
            return Err(strange("it does not greet like an NBD server"));
        }
        let ours = handshake::C_FIXED_NEWSTYLE | handshake::C_NO_ZEROES;
        let mut message = ours.to_be_bytes().to_vec();
        message.extend(OPTION_MAGIC.to_be_bytes());
        message.extend(option::GO.to_be_bytes());
        // An empty name (4 bytes of length) and no questions (2 bytes).
        message.extend(6_u32.to_be_bytes());
        message.extend([0; 6]);
        self.stream.write_all(&message)?;
        loop {
            let head: [u8; 20] = self.take()?;
            let (magic, rest) = head.split_at(8);
            if magic != OPTION_REPLY_MAGIC.to_be_bytes() {
                return Err(strange("an answer of the handshake has no magic"));
            }
            let kind = u32::from_be_bytes([rest[4], rest[5], rest[6], rest[7]]);
            let len = u32::from_be_bytes([rest[8], rest[9], rest[10], rest[11]]);
            if len > MAX_REPLY_BYTES {
                return Err(strange("an answer of the handshake is too long"));
            }
            let mut data = vec![0; usize::try_from(len).map_err(io::Error::other)?];
            self.stream.read_exact(&mut data)?;
            match kind {
                reply::ACK => return Ok(()),
                reply::INFO => self.note(&data),
                kind => return Err(strange(&format!("it refuses the export ({kind:#x})"))),
            }
        }
    }

    fn note(&mut self, data: &[u8]) {
        if let Some((kind, rest)) = data.split_first_chunk::<2>()
            && u16::from_be_bytes(*kind) == info::EXPORT
            && let Some(size) = rest.first_chunk::<8>()
        {
            self.size_bytes = u64::from_be_bytes(*size);
        }
    }

    fn send(&mut self, kind: u16, offset: u64, len: usize, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let len = u32::try_from(len).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(REQUEST_BYTES + data.len());
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(0_u16.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(len.to_be_bytes());
        message.extend(data);
        self.stream.write_all(&message)
    }

    fn answer(&mut self) -> io::Result<()> {
        let head: [u8; SIMPLE_REPLY_BYTES] = self.take()?;
        let mut expected = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        expected.extend([0; 4]);
        expected.extend(self.cookie.to_be_bytes());
        if head[..4] != expected[..4] || head[8..] != expected[8..] {
            return Err(strange("an answer is not that to the request"));
        }
        match u32::from_be_bytes([head[4], head[5], head[6], head[7]]) {
            0 => Ok(()),
            code => Err(io::Error::other(format!(
                "the server answers with error {code}"
            ))),
        }
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn strange(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
