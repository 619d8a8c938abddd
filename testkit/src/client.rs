//! A small NBD client of our own, for tests that must see every error number and every delay.
//!
//! Written from the protocol and not with our own crate, so that a mistake there is not made twice.
//! One request at a time on a connection; tests open several.

use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Longer than any answer takes that comes at all.
const LONG: Duration = Duration::from_secs(120);

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;

/// What the server answered: the error number of the wire, 0 for success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer(pub u32);

impl Answer {
    /// Success.
    pub const OK: Self = Self(0);
    /// EPERM.
    pub const EPERM: Self = Self(1);
    /// EIO.
    pub const EIO: Self = Self(5);
    /// ENOSPC.
    pub const ENOSPC: Self = Self(28);
}

/// A connection to the default export.
pub struct Client {
    stream: UnixStream,
    next: u64,
    /// The size of the disk in bytes.
    pub size: u64,
}

impl Client {
    /// Connects and shakes hands.
    ///
    /// # Errors
    /// Nobody listens there, or it is no NBD server.
    pub fn connect(socket: &Path) -> Result<Self> {
        Self::connect_within(socket, LONG)
    }

    /// The same, waiting for an answer no longer than this, now and later.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_within(socket: &Path, time: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(time))?;
        stream.set_write_timeout(Some(LONG))?;
        let mut client = Self {
            stream,
            next: 1,
            size: 0,
        };
        let mut hello = [0; 18];
        client.stream.read_exact(&mut hello)?;
        ensure!(hello[..8] == MAGIC.to_be_bytes(), "no NBD server");
        ensure!(hello[8..16] == OPTION_MAGIC.to_be_bytes(), "an old server");
        // Fixed newstyle, no zeroes; then the default export by NBD_OPT_EXPORT_NAME.
        client.stream.write_all(&3_u32.to_be_bytes())?;
        let mut option = OPTION_MAGIC.to_be_bytes().to_vec();
        option.extend(1_u32.to_be_bytes());
        option.extend(0_u32.to_be_bytes());
        client.stream.write_all(&option)?;
        let mut export = [0; 10];
        client.stream.read_exact(&mut export)?;
        client.size = u64::from_be_bytes(export[..8].try_into()?);
        Ok(client)
    }

    fn request(&mut self, command: u16, offset: u64, len: u32) -> Result<u64> {
        let cookie = self.next;
        self.next += 1;
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(0_u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        self.stream.write_all(&request)?;
        Ok(cookie)
    }

    fn reply(&mut self, cookie: u64) -> Result<Answer> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        ensure!(reply[..4] == REPLY_MAGIC.to_be_bytes(), "a garbled reply");
        ensure!(reply[8..] == cookie.to_be_bytes(), "a reply to nobody");
        Ok(Answer(u32::from_be_bytes(reply[4..8].try_into()?)))
    }

    /// Asks for bytes without waiting; [`Client::read_answer`] takes the answer.
    ///
    /// # Errors
    /// The connection broke.
    pub fn ask(&mut self, offset: u64, len: u32) -> Result<u64> {
        self.request(READ, offset, len)
    }

    /// The answer to [`Client::ask`].
    ///
    /// # Errors
    /// The connection broke, or nothing came for minutes.
    pub fn read_answer(&mut self, cookie: u64, len: u32) -> Result<(Answer, Vec<u8>)> {
        let answer = self.reply(cookie)?;
        let mut data = Vec::new();
        if answer == Answer::OK {
            data.resize(usize::try_from(len)?, 0);
            self.stream.read_exact(&mut data)?;
        }
        Ok((answer, data))
    }

    /// Reads, and tells the server's answer.
    ///
    /// # Errors
    /// The connection broke, or nothing came for minutes.
    pub fn try_read(&mut self, offset: u64, len: u32) -> Result<(Answer, Vec<u8>)> {
        let cookie = self.ask(offset, len)?;
        self.read_answer(cookie, len)
    }

    /// Writes, and tells the server's answer.
    ///
    /// # Errors
    /// As [`Client::try_read`].
    pub fn try_write(&mut self, offset: u64, data: &[u8]) -> Result<Answer> {
        let cookie = self.request(WRITE, offset, u32::try_from(data.len())?)?;
        self.stream.write_all(data)?;
        self.reply(cookie)
    }

    /// Flushes, and tells the server's answer.
    ///
    /// # Errors
    /// As [`Client::try_read`].
    pub fn try_flush(&mut self) -> Result<Answer> {
        let cookie = self.request(FLUSH, 0, 0)?;
        self.reply(cookie)
    }

    /// Reads.
    ///
    /// # Errors
    /// As [`Client::try_read`], and when the server answers with an error.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        match self.try_read(offset, len)? {
            (Answer::OK, data) => Ok(data),
            (Answer(error), _) => bail!("a read at {offset} failed with {error}"),
        }
    }

    /// Writes.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        match self.try_write(offset, data)? {
            Answer::OK => Ok(()),
            Answer(error) => bail!("a write at {offset} failed with {error}"),
        }
    }

    /// Flushes.
    ///
    /// # Errors
    /// As [`Client::read`].
    pub fn flush(&mut self) -> Result<()> {
        match self.try_flush()? {
            Answer::OK => Ok(()),
            Answer(error) => bail!("a flush failed with {error}"),
        }
    }

    /// Whether nothing has come on the connection for as long as `time`.
    ///
    /// # Errors
    /// The connection broke.
    pub fn is_silent_for(&mut self, time: Duration) -> Result<bool> {
        self.stream.set_read_timeout(Some(time))?;
        let mut byte = [0; 1];
        let seen = rustix::net::recv(&self.stream, &mut byte, rustix::net::RecvFlags::PEEK);
        self.stream.set_read_timeout(Some(LONG))?;
        match seen {
            Err(rustix::io::Errno::AGAIN) => Ok(true),
            Ok(_) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Only politeness.
        let _ = self.request(DISCONNECT, 0, 0);
    }
}
