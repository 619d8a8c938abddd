//! A small blocking HTTP/1.1 client for the control interface, over a Unix socket.
//!
//! One request a connection. Everything that comes back is bounded in size and time, so that a
//! hung or foreign process behind the socket cannot hang a command. Used by the command line.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hikkoshi_engine::heat::HeatMap;

use super::dial;
use crate::config::{Prepare, StorageOrder};
use crate::events::Event;
use crate::status::ExportStatus;
use crate::verification::VerifyStatus;

/// Bytes the head of an answer may have.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Bytes the body of an answer may have: some ten thousand exports.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// How long a question may take; the daemon answers these at once.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// How long connecting may take: no longer than a busy daemon needs to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a command may take; a handoff waits for the disk.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);

/// Why a daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error(
        "no daemon answers at {path}: {source}; is `hikkoshi serve` running, and is this its \
         --control?"
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon answered with an error; the text is its own.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What the daemon said.
        message: String,
    },
    /// The connection broke, or the answer took too long.
    #[error(
        "the daemon at {path} did not answer: {source}; it may be stopped or overloaded (its disks \
         may be served all the same); look at its process and its log"
    )]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What came back is no answer of a hikkoshi daemon.
    #[error("what listens at {path} does not answer like a hikkoshi daemon: {what}")]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// What was wrong.
        what: String,
    },
}

/// What a daemon can be told to do with an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Stop the background copy.
    Pause,
    /// Let it go on.
    Resume,
    /// From here on the VM runs here.
    Handoff,
    /// Give the move here up, before the handoff.
    Abort,
    /// Lift the fence of an old copy.
    Release {
        /// The other copy is of no account.
        force: bool,
    },
    /// Cap the background copy, in bytes per second; `None` lifts the cap.
    Limit(Option<u64>),
}

/// A daemon, by its control socket. Holds no connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlClient {
    path: PathBuf,
}

impl ControlClient {
    /// The daemon at `path`. Connects only when asked something.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All exports, in the order of the configuration.
    ///
    /// # Errors
    /// The daemon cannot be reached, or answers strangely.
    pub fn status(&self) -> Result<Vec<ExportStatus>, ClientError> {
        let body = self.request("GET", "/v1/status", ASK_TIMEOUT)?;
        self.parse(&body)
    }

    /// One export. The empty name also finds the only one there is.
    ///
    /// # Errors
    /// As [`Self::status`], and when there is no such export.
    pub fn export(&self, name: &str) -> Result<ExportStatus, ClientError> {
        self.export_as(name)
    }

    /// One export, in a form of the caller's own, which need not know every field and every state:
    /// the daemon at another site may be of another version.
    ///
    /// # Errors
    /// As [`Self::export`].
    pub fn export_as<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, ClientError> {
        let target = format!("/v1/export?name={}", encode(name));
        let body = self.request("GET", &target, ASK_TIMEOUT)?;
        self.parse(&body)
    }

    /// How much an export is read and written, region by region.
    ///
    /// # Errors
    /// As [`Self::export`].
    pub fn heat(&self, name: &str) -> Result<HeatMap, ClientError> {
        let target = format!("/v1/heat?name={}", encode(name));
        let body = self.request("GET", &target, ASK_TIMEOUT)?;
        HeatMap::decode(&body).map_err(|error| self.garbled(error.to_string()))
    }

    /// What has happened to an export, with numbers above `since`.
    ///
    /// # Errors
    /// As [`Self::export`].
    pub fn events(&self, name: &str, since: u64) -> Result<Vec<Event>, ClientError> {
        let target = format!("/v1/events?name={}&since={since}", encode(name));
        let body = self.request("GET", &target, ASK_TIMEOUT)?;
        self.parse(&body)
    }

    /// Commands an export and tells how it stands then.
    ///
    /// # Errors
    /// As [`Self::export`], and when the daemon refuses the command.
    pub fn command(&self, name: &str, command: Command) -> Result<ExportStatus, ClientError> {
        self.command_within(name, command, COMMAND_TIMEOUT)
    }

    /// The same for whoever cannot wait so long. A daemon that has not answered by then goes on with
    /// the command.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn command_within(
        &self,
        name: &str,
        command: Command,
        timeout: Duration,
    ) -> Result<ExportStatus, ClientError> {
        let (route, more) = match command {
            Command::Pause => ("pause", String::new()),
            Command::Resume => ("resume", String::new()),
            Command::Handoff => ("handoff", String::new()),
            Command::Abort => ("abort", String::new()),
            Command::Release { force: false } => ("release", String::new()),
            Command::Release { force: true } => ("release", "&force=yes".into()),
            Command::Limit(None) => ("limit", "&bytes_per_s=none".into()),
            Command::Limit(Some(rate)) => ("limit", format!("&bytes_per_s={rate}")),
        };
        let target = format!("/v1/{route}?name={}{more}", encode(name));
        let body = self.request("POST", &target, timeout)?;
        self.parse(&body)
    }

    /// Caps what all exports of the daemon copy in the background together, in bytes per second, and
    /// tells how they stand; `None` lifts the cap.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn limit_all(&self, bytes_per_s: Option<u64>) -> Result<Vec<ExportStatus>, ClientError> {
        let rate = bytes_per_s.map_or("none".to_owned(), |rate| rate.to_string());
        let target = format!("/v1/limit-all?bytes_per_s={rate}");
        let body = self.request("POST", &target, COMMAND_TIMEOUT)?;
        self.parse(&body)
    }

    /// Begins to move an export's disk to another image of the daemon's machine, and tells how it
    /// stands then. Relative paths are the daemon's.
    ///
    /// # Errors
    /// As [`Self::command`], and where a path is no text.
    pub fn move_storage(
        &self,
        name: &str,
        order: &StorageOrder,
    ) -> Result<ExportStatus, ClientError> {
        let path = |path: &Path| match path.to_str() {
            Some(text) => Ok(encode(text)),
            None => Err(self.garbled(format!("{} is no text", path.display()))),
        };
        let mut target = format!("/v1/move?name={}&to={}", encode(name), path(&order.image)?);
        if let Some(dir) = &order.state_dir {
            target.push_str(&format!("&state={}", path(dir)?));
        }
        target.push_str(match order.prepare {
            Prepare::None => "&prepare=none",
            Prepare::Ahead => "",
            Prepare::Full => "&prepare=full",
        });
        if let Some(rate) = order.max_rate {
            target.push_str(&format!("&bytes_per_s={rate}"));
        }
        if order.overwrite {
            target.push_str("&overwrite=yes");
        }
        let body = self.request("POST", &target, COMMAND_TIMEOUT)?;
        self.parse(&body)
    }

    /// Has an export compared with its source, or, to `accept`, lets the source go whatever was
    /// found. Does not wait for the end of it.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn verify(&self, name: &str, accept: bool) -> Result<VerifyStatus, ClientError> {
        let more = if accept { "&accept=yes" } else { "" };
        let target = format!("/v1/verify?name={}{more}", encode(name));
        let body = self.request("POST", &target, COMMAND_TIMEOUT)?;
        self.parse(&body)
    }

    /// How the last comparison stands.
    ///
    /// # Errors
    /// As [`Self::export`].
    pub fn verification(&self, name: &str) -> Result<VerifyStatus, ClientError> {
        let target = format!("/v1/verify?name={}", encode(name));
        let body = self.request("GET", &target, ASK_TIMEOUT)?;
        self.parse(&body)
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.garbled(error.to_string()))
    }

    fn garbled(&self, what: impl Into<String>) -> ClientError {
        ClientError::Garbled {
            path: self.path.clone(),
            what: what.into(),
        }
    }

    /// Sends a request without a body and returns the body of a successful answer.
    fn request(
        &self,
        method: &str,
        target: &str,
        timeout: Duration,
    ) -> Result<Vec<u8>, ClientError> {
        let deadline = Instant::now() + timeout;
        let connect_by = deadline.min(Instant::now() + CONNECT_TIMEOUT);
        let stream = dial::connect(&self.path, connect_by).map_err(|source| {
            let path = self.path.clone();
            match source.kind() {
                // Somebody does listen there.
                io::ErrorKind::TimedOut => ClientError::Io { path, source },
                _ => ClientError::Unreachable { path, source },
            }
        })?;
        let raw = exchange(stream, method, target, deadline).map_err(|source| ClientError::Io {
            path: self.path.clone(),
            source,
        })?;
        self.understand(&raw).map(<[u8]>::to_vec)
    }

    /// The body of a successful answer, or the error that the daemon told.
    fn understand<'a>(&self, raw: &'a [u8]) -> Result<&'a [u8], ClientError> {
        let (status, body) = split_answer(raw).map_err(|what| self.garbled(what))?;
        if (200..300).contains(&status) {
            return Ok(body);
        }
        #[derive(serde::Deserialize)]
        struct Said {
            error: String,
        }
        let message = match serde_json::from_slice::<Said>(body) {
            Ok(said) => said.error,
            Err(_) => format!("the daemon answered with HTTP status {status}"),
        };
        Err(ClientError::Refused { status, message })
    }
}

/// What the client makes of the bytes of an answer: to a question for all exports, and for one.
///
/// # Errors
/// They are no successful answer.
#[cfg(feature = "fuzzing")]
pub fn understand(
    raw: &[u8],
) -> (
    Result<Vec<ExportStatus>, ClientError>,
    Result<ExportStatus, ClientError>,
) {
    let client = ControlClient::new("fuzzed");
    let all = client.understand(raw).and_then(|body| client.parse(body));
    let one = client.understand(raw).and_then(|body| client.parse(body));
    (all, one)
}

/// One request and all bytes of its answer, before `deadline`.
fn exchange(
    mut stream: UnixStream,
    method: &str,
    target: &str,
    deadline: Instant,
) -> io::Result<Vec<u8>> {
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: hikkoshi\r\nConnection: close\r\n\
         Content-Length: 0\r\n\r\n"
    );
    stream.set_write_timeout(Some(remaining(deadline)?))?;
    stream.write_all(request.as_bytes())?;
    let mut raw = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        stream.set_read_timeout(Some(remaining(deadline)?))?;
        let n = match stream.read(&mut chunk) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // A timeout of a Unix socket says "would block", which tells a person nothing.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        };
        if n == 0 {
            return Ok(raw);
        }
        raw.extend_from_slice(&chunk[..n]);
        if raw.len() > MAX_HEAD_BYTES + MAX_ANSWER_BYTES {
            return Err(io::Error::other("the answer is too long"));
        }
    }
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

/// Takes an answer apart into its status and its body. The connection was closed after it, and
/// the daemon always says how long the body is, so a cut-off answer is noticed.
fn split_answer(raw: &[u8]) -> Result<(u16, &[u8]), String> {
    let head_len = raw
        .windows(4)
        .take(MAX_HEAD_BYTES)
        .position(|four| four == b"\r\n\r\n")
        .ok_or("there is no HTTP head")?;
    let head = std::str::from_utf8(&raw[..head_len]).map_err(|_| "the HTTP head is not text")?;
    let body = &raw[head_len + 4..];
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1."))
        .and_then(|line| line.get(2..5))
        .and_then(|digits| digits.parse::<u16>().ok())
        .ok_or("there is no HTTP status")?;
    let mut length = None;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse::<usize>().ok();
        }
    }
    match length {
        Some(length) if length == body.len() => Ok((status, body)),
        // A request that could not be parsed is answered with an empty body.
        None if body.is_empty() => Ok((status, body)),
        _ => Err("the answer is cut off".into()),
    }
}

/// Percent-encodes a query value: everything but unreserved characters (RFC 3986, section 2.3).
fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a String does not fail");
        }
    }
    out
}
