//! QEMU's control protocol (QMP): JSON lines over a Unix or TCP socket, one command at a time.
//!
//! Owns a connection, its limits in size and time, and the distinction that whoever moves a VM
//! depends on: a command that QEMU refused was not carried out; one whose answer did not come may
//! have been. Events are only counted: states are asked for, an event says when it is worth it.

use std::io::{self, Read as _, Write as _};
use std::net::ToSocketAddrs as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long QEMU may take to greet: it does so at once, unless it serves another client.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an answer may take. A busy QEMU answers within a second or so.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Bytes that one answer may have: the block nodes of a machine with hundreds of disks.
const MAX_LINE_BYTES: usize = 16 << 20;

/// Where a QMP socket is. Displays as it is written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:HOST:PORT`
    Tcp(String),
}

impl Place {
    /// `unix:PATH` or `tcp:HOST:PORT`, as in QEMU's own `-qmp`.
    ///
    /// # Errors
    /// The text is neither.
    pub fn parse(text: &str) -> Result<Self, String> {
        // `unix:PATH,server=on,wait=off` is what QEMU was given.
        let text = text.split_once(',').map_or(text, |(before, _)| before);
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let address = text.strip_prefix("tcp:").unwrap_or_default();
        let address = address.strip_prefix("//").unwrap_or(address);
        match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(address.into()))
            }
            _ => Err(format!(
                "{text:?} is no QMP socket; write unix:PATH or tcp:HOST:PORT"
            )),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens there: nothing was carried out.
    #[error("no QEMU answers at {place}: {source}")]
    Unreachable {
        /// The socket.
        place: Place,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody listens there, who does not greet as QEMU does: nothing was carried out.
    #[error(
        "what listens at {place} does not greet like QEMU's QMP ({what}); QEMU serves one client \
         at a time on a QMP socket: is another one connected, such as libvirt?"
    )]
    NoGreeting {
        /// The socket.
        place: Place,
        /// What came instead.
        what: String,
    },
    /// QEMU said no: the command was not carried out.
    #[error("QEMU refuses {command}: {what}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        what: String,
    },
    /// The connection broke, or the answer took too long: the command may have been carried out.
    #[error("QEMU at {place} did not answer {command}: {source}")]
    Lost {
        /// The socket.
        place: Place,
        /// The command.
        command: String,
        /// What the system said.
        source: io::Error,
    },
}

impl QmpError {
    /// Whether QEMU itself said no.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// A QEMU, by its QMP socket. Connects when it is asked something, and again after a loss.
#[derive(Debug)]
pub struct Qmp {
    place: Place,
    line: Option<Line>,
}

impl Qmp {
    /// The QEMU at `place`.
    pub fn new(place: Place) -> Self {
        Self { place, line: None }
    }

    /// Runs a command and returns what it returns.
    ///
    /// # Errors
    /// QEMU refuses, or is not there, or does not answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let mut line = match self.line.take() {
            Some(line) => line,
            None => self.connect()?,
        };
        let lost = |source| QmpError::Lost {
            place: self.place.clone(),
            command: command.into(),
            source,
        };
        let mut answer = line.execute(command, &arguments).map_err(lost)?;
        // Kept only while question and answer are in step.
        self.line = Some(line);
        if let Some(error) = answer.get("error") {
            let what = error["desc"].as_str().map(str::to_owned);
            return Err(QmpError::Refused {
                command: command.into(),
                what: what.unwrap_or_else(|| error.to_string()),
            });
        }
        Ok(answer
            .get_mut("return")
            .map(Value::take)
            .unwrap_or_default())
    }

    /// Waits until QEMU tells of some event, or has since the last time, or for `timeout`. A lost
    /// connection is noticed by the next command.
    pub fn nap(&mut self, timeout: Duration) {
        let until = Instant::now() + timeout;
        if let Some(mut line) = self.line.take() {
            if std::mem::take(&mut line.event_passed) {
                return self.line = Some(line);
            }
            match line.next_message(until) {
                Ok(_) => return self.line = Some(line),
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return self.line = Some(line);
                }
                Err(_) => {}
            }
        }
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }

    fn connect(&self) -> Result<Line, QmpError> {
        let socket = match &self.place {
            Place::Unix(path) => connect_unix(path),
            Place::Tcp(address) => connect_tcp(address),
        };
        let socket = socket.map_err(|source| QmpError::Unreachable {
            place: self.place.clone(),
            source,
        })?;
        let mut line = Line {
            socket,
            received: Vec::new(),
            event_passed: false,
        };
        let no_greeting = |what: String| QmpError::NoGreeting {
            place: self.place.clone(),
            what,
        };
        let greeting = line
            .next_message(Instant::now() + GREETING_TIMEOUT)
            .map_err(|error| no_greeting(error.to_string()))?;
        if greeting.get("QMP").is_none() {
            let text: String = greeting.to_string().chars().take(100).collect();
            return Err(no_greeting(format!("it says {text}")));
        }
        line.execute("qmp_capabilities", &json!({}))
            .map_err(|error| no_greeting(error.to_string()))?;
        Ok(line)
    }
}

fn connect_unix(path: &std::path::Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.connect_timeout(&SockAddr::unix(path)?, CONNECT_TIMEOUT)?;
    Ok(socket)
}

fn connect_tcp(address: &str) -> io::Result<Socket> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        match socket.connect_timeout(&address.into(), CONNECT_TIMEOUT) {
            Ok(()) => {
                socket.set_tcp_nodelay(true)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A connection, and what was received of the next message.
#[derive(Debug)]
struct Line {
    socket: Socket,
    received: Vec<u8>,
    /// An event came while an answer was waited for.
    event_passed: bool,
}

impl Line {
    /// Sends a command and returns its answer, passing over events.
    fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let request = json!({"execute": command, "arguments": arguments});
        self.socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        self.socket.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let message = self.next_message(deadline)?;
            if message.get("return").is_some() || message.get("error").is_some() {
                return Ok(message);
            }
            self.event_passed = true;
        }
    }

    /// The next message, of whatever kind. After a time-out it can be asked for again.
    fn next_message(&mut self, deadline: Instant) -> io::Result<Value> {
        let mut looked_at = 0;
        loop {
            if let Some(end) = self.received[looked_at..].iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.received.drain(..=looked_at + end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    looked_at = 0;
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|error| {
                    io::Error::new(io::ErrorKind::InvalidData, format!("no JSON: {error}"))
                });
            }
            looked_at = self.received.len();
            if looked_at > MAX_LINE_BYTES {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the answer is too long",
                ));
            }
            self.receive(deadline)?;
        }
    }

    fn receive(&mut self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(left))?;
        let mut chunk = [0; 16 << 10];
        match self.socket.read(&mut chunk) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the connection was closed",
            )),
            Ok(n) => {
                self.received.extend_from_slice(&chunk[..n]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::ErrorKind::TimedOut.into())
            }
            Err(error) => Err(error),
        }
    }
}
