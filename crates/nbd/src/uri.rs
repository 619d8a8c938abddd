//! Where things are: the URI of an export to connect to, the address of a socket to listen on.
//!
//! Exports follow the NBD project's URI document (`doc/uri.md`): `nbd://HOST[:PORT]/EXPORT` and
//! `nbd+unix:///EXPORT?socket=PATH`, with `nbds` for TLS. Listening addresses are those of the
//! command line: `tcp://HOST[:PORT]` and `unix:PATH`. Text only: no name is looked up, no file
//! touched.

use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::limits::{EXPORT_NAME_BYTES, SOCKET_PATH_BYTES};
use crate::wire::DEFAULT_PORT;

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}`: {problem}")]
pub struct AddressError {
    /// The text as it was given.
    pub text: String,
    /// What is wrong with it, and what would be right.
    pub problem: Problem,
}

/// What is wrong with an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// An NBD URI was expected.
    #[error(
        "not an NBD URI; expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH \
         (nbds://, nbds+unix:// with TLS)"
    )]
    NotNbd,
    /// A listening address was expected.
    #[error("not an address to listen on; expected tcp://HOST:PORT or unix:PATH")]
    NotListen,
    /// `tcp://` without a host.
    #[error("the host is missing; for all interfaces write 0.0.0.0 or [::]")]
    NoHost,
    /// A host that cannot be one.
    #[error("`{0}` is not a host name or IP address")]
    BadHost(String),
    /// An IPv6 address without brackets.
    #[error("an IPv6 address needs brackets, as in [::1]:10809")]
    NeedsBrackets,
    /// The port is no port.
    #[error("`{0}` is not a port number from {min} to 65535", min = .1)]
    BadPort(String, u16),
    /// The socket parameter is missing.
    #[error("the path of the socket is missing; add ?socket=PATH")]
    NoSocket,
    /// A socket parameter without `+unix`.
    #[error("a socket= parameter needs the scheme nbd+unix:// (nbds+unix:// with TLS)")]
    StraySocket,
    /// A parameter that means nothing here.
    #[error("`{0}` is not a parameter of an NBD URI; socket=PATH is")]
    UnknownParameter(String),
    /// A host with `+unix`.
    #[error("nbd+unix:// takes no host; three slashes come before the export")]
    StrayHost,
    /// The path of a Unix socket does not fit.
    #[error("the path of the socket has {0} bytes; at most {SOCKET_PATH_BYTES} are possible")]
    LongSocket(usize),
    /// A socket path with a zero byte.
    #[error("the path of the socket has a zero byte")]
    ZeroInSocket,
    /// The export's name does not fit.
    #[error("the name of the export has {0} bytes; at most {EXPORT_NAME_BYTES} are possible")]
    LongExport(usize),
    /// The export's name is not text.
    #[error("the name of the export is not UTF-8, or has a zero byte")]
    BadExport,
    /// A percent sign that is not followed by two hexadecimal digits.
    #[error("% must be followed by two hexadecimal digits (write %25 for a percent sign)")]
    BadPercent,
    /// A `#`.
    #[error("an NBD URI has no fragment (write %23 for #)")]
    Fragment,
}

/// A socket's address. Displays as what `--listen` takes, and parses from that.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp {
        /// A name or an IP address; IPv6 without brackets.
        host: String,
        /// The port; when listening, 0 for any that is free.
        port: u16,
    },
    /// A Unix stream socket.
    Unix(PathBuf),
}

/// An export to connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// Where its server listens.
    pub address: Address,
    /// Whether the scheme demands TLS. Whoever cannot do that must refuse, not go on without.
    pub tls: bool,
    /// The export's name; empty for the default export.
    pub export: String,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parsed = if let Some(authority) = text.strip_prefix("tcp://") {
            let authority = authority.strip_suffix('/').unwrap_or(authority);
            host_and_port(authority, Purpose::Listen).map(|(host, port)| Self::Tcp { host, port })
        } else if let Some(path) = text.strip_prefix("unix:") {
            // `unix:///run/x` is what people also write: the authority is empty, the path is not.
            let path = match path.strip_prefix("//") {
                Some(rest) if rest.starts_with('/') => rest,
                _ => path,
            };
            socket_path(path.as_bytes().to_vec()).map(Self::Unix)
        } else {
            Err(Problem::NotListen)
        };
        parsed.map_err(|problem| problem.with(text))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for NbdUri {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        parse_uri(text).map_err(|problem| problem.with(text))
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = if self.tls { "s" } else { "" };
        let export = Escaped(self.export.as_bytes());
        match &self.address {
            Address::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "nbd{tls}://[{}]", Escaped(host.as_bytes()))?;
                } else {
                    write!(f, "nbd{tls}://{}", Escaped(host.as_bytes()))?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")
            }
            Address::Unix(path) => {
                let socket = Escaped(path.as_os_str().as_bytes());
                write!(f, "nbd{tls}+unix:///{export}?socket={socket}")
            }
        }
    }
}

impl Problem {
    fn with(self, text: &str) -> AddressError {
        AddressError {
            text: text.to_owned(),
            problem: self,
        }
    }
}

fn parse_uri(text: &str) -> Result<NbdUri, Problem> {
    let (scheme, rest) = text.split_once("://").ok_or(Problem::NotNbd)?;
    let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => return Err(Problem::NotNbd),
    };
    if rest.contains('#') {
        return Err(Problem::Fragment);
    }
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let socket = socket_parameter(query)?;
    let address = if unix {
        if !authority.is_empty() {
            return Err(Problem::StrayHost);
        }
        Address::Unix(socket_path(socket.unwrap_or_default())?)
    } else {
        if socket.is_some() {
            return Err(Problem::StraySocket);
        }
        // A user name belongs to TLS with pre-shared keys; nobody else reads it.
        let authority = authority
            .rsplit_once('@')
            .map_or(authority, |(_, host)| host);
        let (host, port) = host_and_port(authority, Purpose::Connect)?;
        Address::Tcp { host, port }
    };
    Ok(NbdUri {
        address,
        tls,
        export: export_name(path)?,
    })
}

/// The value of `socket=`. The parameters of TLS are passed over: whoever has no TLS refuses the
/// scheme. Others are refused, as the document asks, for a misspelt one must not be lost silently.
fn socket_parameter(query: &str) -> Result<Option<Vec<u8>>, Problem> {
    let mut socket = None;
    for parameter in query.split(['&', ';']).filter(|p| !p.is_empty()) {
        match parameter.split_once('=') {
            Some(("socket", value)) => socket = Some(unescape(value)?),
            Some((name, _)) if name.starts_with("tls-") => {}
            _ => return Err(Problem::UnknownParameter(parameter.to_owned())),
        }
    }
    Ok(socket)
}

fn export_name(path: &str) -> Result<String, Problem> {
    let bytes = unescape(path)?;
    if bytes.len() > EXPORT_NAME_BYTES {
        return Err(Problem::LongExport(bytes.len()));
    }
    String::from_utf8(bytes)
        .ok()
        .filter(|name| !name.contains('\0'))
        .ok_or(Problem::BadExport)
}

fn socket_path(bytes: Vec<u8>) -> Result<PathBuf, Problem> {
    if bytes.is_empty() {
        return Err(Problem::NoSocket);
    }
    if bytes.len() > SOCKET_PATH_BYTES {
        return Err(Problem::LongSocket(bytes.len()));
    }
    if bytes.contains(&0) {
        return Err(Problem::ZeroInSocket);
    }
    Ok(PathBuf::from(OsString::from_vec(bytes)))
}

/// What a host and port are for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// The host must be said, for it decides who can reach us; port 0 is any that is free.
    Listen,
    /// No host is this one; port 0 is none.
    Connect,
}

/// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
fn host_and_port(authority: &str, purpose: Purpose) -> Result<(String, u16), Problem> {
    let (host, port) = if let Some(inner) = authority.strip_prefix('[') {
        let bad = || Problem::BadHost(authority.to_owned());
        let (address, after) = inner.split_once(']').ok_or_else(bad)?;
        // A zone (fe80::1%eth0) follows the address; its percent sign may be escaped.
        let address = address.replace("%25", "%");
        let (ip, zone) = match address.split_once('%') {
            Some((ip, zone)) => (ip, Some(zone)),
            None => (address.as_str(), None),
        };
        ip.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
        if zone.is_some_and(|zone| zone.is_empty() || !zone.chars().all(belongs_in_zone)) {
            return Err(bad());
        }
        let port = match after {
            "" => None,
            _ => Some(after.strip_prefix(':').ok_or_else(bad)?),
        };
        (address, port)
    } else {
        let (host, port) = match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => return Err(Problem::NeedsBrackets),
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        };
        let decoded = String::from_utf8(unescape(host)?)
            .ok()
            .filter(|host| host.chars().all(belongs_in_host))
            .ok_or_else(|| Problem::BadHost(host.to_owned()))?;
        (decoded, port)
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(digits) => port_number(digits, u16::from(purpose == Purpose::Connect))?,
    };
    let host = match purpose {
        _ if !host.is_empty() => host,
        Purpose::Connect => "localhost".to_owned(),
        Purpose::Listen => return Err(Problem::NoHost),
    };
    Ok((host, port))
}

fn port_number(digits: &str, min: u16) -> Result<u16, Problem> {
    digits
        .parse()
        .ok()
        .filter(|port| *port >= min && digits.bytes().all(|b| b.is_ascii_digit()))
        .ok_or_else(|| Problem::BadPort(digits.to_owned(), min))
}

/// What names of interfaces are made of.
fn belongs_in_zone(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~".contains(c)
}

/// Letters of any script, for those who have such names; digits, and what joins them.
fn belongs_in_host(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '.' | '-' | '_')
}

fn unescape(text: &str) -> Result<Vec<u8>, Problem> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || {
            let byte = bytes.next().ok_or(Problem::BadPercent)?;
            hex(byte).ok_or(Problem::BadPercent)
        };
        let (high, low) = (digit()?, digit()?);
        out.push(high << 4 | low);
    }
    Ok(out)
}

fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// Bytes with all percent-encoded that a URI could mistake for something else.
struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => f.write_char(char::from(byte))?,
                b'-' | b'.' | b'_' | b'~' | b'/' | b':' => f.write_char(char::from(byte))?,
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

impl NbdUri {
    /// The URI of `export` on a Unix socket.
    pub fn unix(socket: &Path, export: &str) -> Self {
        Self {
            address: Address::Unix(socket.to_owned()),
            tls: false,
            export: export.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
