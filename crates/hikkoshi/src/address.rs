//! Addresses as they are written on the command line and in a configuration file.

use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use hikkoshi_daemon::config::Listen;
use hikkoshi_nbd::wire::DEFAULT_PORT;

/// `tcp://HOST:PORT` or `unix:PATH`.
///
/// # Errors
/// The text is neither.
pub fn parse_listen(text: &str) -> Result<Listen, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path {
            "" => Err("unix: needs a path, as in unix:/run/disk.sock".into()),
            path => Ok(Listen::Unix(PathBuf::from(path))),
        };
    }
    let Some(rest) = text.strip_prefix("tcp://") else {
        return Err(format!(
            "{text:?} is no address to listen on; write tcp://HOST:PORT or unix:PATH"
        ));
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, Some(port.strip_prefix(':').unwrap_or("?"))),
        None => match rest.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (rest, None),
        },
    };
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port
            .parse()
            .map_err(|_| format!("{text:?} has no port from 0 to 65535"))?,
    };
    let bare_v6 = host.contains(':') && !rest.starts_with('[');
    if host.is_empty() || host.contains('/') || bare_v6 {
        return Err(format!(
            "{text:?} has no host; write tcp://HOST:PORT, with an IPv6 address in brackets, and \
             0.0.0.0 or [::] for all addresses"
        ));
    }
    Ok(Listen::Tcp(host.into(), port))
}

/// `unix:PATH`, where a daemon is controlled.
///
/// # Errors
/// The text is something else.
pub fn parse_control(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
        _ => Err(format!("{text:?} is no control socket; write unix:PATH")),
    }
}

/// `HOST:PORT`, for metrics.
///
/// # Errors
/// There is no port, or no host.
pub fn parse_metrics(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(text.into()),
        _ => Err("an address is HOST:PORT, such as 127.0.0.1:9109".into()),
    }
}

/// Where a disk moves from: an NBD URI, or a path to a Unix socket that speaks NBD.
///
/// # Errors
/// The text is neither, or needs what is not there yet (TLS, local files).
pub fn parse_from(text: &str) -> Result<String, String> {
    for scheme in ["nbd://", "nbd+unix://"] {
        if text
            .strip_prefix(scheme)
            .is_some_and(|rest| !rest.is_empty())
        {
            return Ok(text.into());
        }
    }
    if text.starts_with("nbds://") || text.starts_with("nbds+unix://") {
        return Err(format!(
            "{text:?} asks for TLS, which is not supported yet; use nbd:// through a tunnel (ssh \
             -L, WireGuard)"
        ));
    }
    if text.contains("://") || text.is_empty() {
        return Err(format!(
            "{text:?} is no source; write nbd://HOST[:PORT]/NAME, nbd+unix:///NAME?socket=PATH or \
             the path of a Unix socket"
        ));
    }
    let path = Path::new(text);
    // The state remembers the source, and must find it from another directory, too.
    let absolute = || {
        std::path::absolute(path)
            .map(|path| path.display().to_string())
            .map_err(|error| format!("{text:?}: {error}"))
    };
    let kind = match std::fs::metadata(path) {
        Ok(meta) => meta.file_type(),
        // A source that is away has no socket; what is no path at all was meant otherwise.
        Err(error) if error.kind() == ErrorKind::NotFound && text.contains('/') => {
            return absolute();
        }
        Err(error) => {
            return Err(format!(
                "{text:?} cannot be reached: {error}; a source is nbd://HOST[:PORT]/NAME, \
                 nbd+unix:///NAME?socket=PATH or the path of a Unix socket"
            ));
        }
    };
    if kind.is_socket() {
        return absolute();
    }
    if kind.is_file() || kind.is_block_device() {
        return Err(format!(
            "{text:?} is a disk image on this machine; serve it first: hikkoshi serve {text} \
             --listen unix:/tmp/source.sock, then --from /tmp/source.sock"
        ));
    }
    Err(format!("{text:?} is no Unix socket and no disk"))
}

/// The NBD URI by which clients reach `export` at `listen`.
pub fn uri(listen: &Listen, export: &str) -> String {
    let name = encode(export, b"/");
    match listen {
        Listen::Tcp(host, port) if host.contains(':') => format!("nbd://[{host}]:{port}/{name}"),
        Listen::Tcp(host, port) => format!("nbd://{host}:{port}/{name}"),
        Listen::Unix(path) => {
            let path = encode(&path.display().to_string(), b"/");
            format!("nbd+unix:///{name}?socket={path}")
        }
        Listen::Inherited(number) => format!("the inherited socket {number}"),
    }
}

/// Percent-encodes all but unreserved characters (RFC 3986, section 2.3) and those in `also`.
fn encode(text: &str, also: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also.contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a String does not fail");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_addresses() {
        let tcp = |host: &str, port| Ok(Listen::Tcp(host.into(), port));
        assert_eq!(parse_listen("tcp://127.0.0.1:0"), tcp("127.0.0.1", 0));
        assert_eq!(parse_listen("tcp://[::1]:10810/"), tcp("::1", 10810));
        assert_eq!(parse_listen("tcp://[::]"), tcp("::", DEFAULT_PORT));
        assert_eq!(parse_listen("tcp://host"), tcp("host", DEFAULT_PORT));
        assert_eq!(
            parse_listen("unix:/run/a.sock"),
            Ok(Listen::Unix("/run/a.sock".into()))
        );
        for bad in [
            "",
            "unix:",
            "tcp://",
            "tcp://:1",
            "tcp://h:",
            "tcp://h:65536",
            "tcp://h:x",
            "h:1",
            "tcp://::1:5",
            "tcp://[::1]5",
            "tcp://h/x:1",
            "nbd://h",
        ] {
            assert!(parse_listen(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sources() {
        assert!(parse_from("nbd://host:1/web").is_ok());
        assert!(parse_from("nbd+unix:///?socket=/x").is_ok());
        assert!(parse_from("nbds://host/").unwrap_err().contains("TLS"));
        for bad in ["", "nbd://", "http://x/", "nonexistent"] {
            assert!(parse_from(bad).is_err(), "{bad}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = parse_from(file.path().to_str().unwrap()).unwrap_err();
        assert!(error.contains("hikkoshi serve"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        assert!(parse_from(dir.path().to_str().unwrap()).is_err());
        let path = dir.path().join("s");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let path = path.to_str().unwrap();
        assert_eq!(parse_from(path).as_deref(), Ok(path));
        // Its source was away, and a restart by the same command was wrong usage.
        let away = dir.path().join("away");
        let away = away.to_str().unwrap();
        assert_eq!(parse_from(away).as_deref(), Ok(away));
    }

    #[test]
    fn uris() {
        assert_eq!(
            uri(&Listen::Tcp("::1".into(), 9), "a b"),
            "nbd://[::1]:9/a%20b"
        );
        assert_eq!(
            uri(&Listen::Unix("/run/x y".into()), ""),
            "nbd+unix:///?socket=/run/x%20y"
        );
    }
}
