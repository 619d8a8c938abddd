//! What a supervisor such as systemd passes in and wants to hear: sockets that listen already
//! (`LISTEN_PID`, `LISTEN_FDS`; sd_listen_fds(3)) and how far we are (`NOTIFY_SOCKET`;
//! sd_notify(3)).

use std::env;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The number of the first socket passed in, `SD_LISTEN_FDS_START`.
const FIRST_SOCKET: i32 = 3;

/// Most sockets that are taken.
const MAX_SOCKETS: i32 = 64;

/// The numbers of the sockets that were passed to this process; none when there is no supervisor.
///
/// # Errors
/// The supervisor's variables make no sense.
pub fn inherited_sockets() -> Result<std::ops::Range<i32>, String> {
    let pid = env::var("LISTEN_PID").ok();
    let count = env::var("LISTEN_FDS").ok();
    socket_numbers(pid.as_deref(), count.as_deref(), std::process::id())
}

fn socket_numbers(
    pid: Option<&str>,
    count: Option<&str>,
    own_pid: u32,
) -> Result<std::ops::Range<i32>, String> {
    let none = FIRST_SOCKET..FIRST_SOCKET;
    let (Some(pid), Some(count)) = (pid, count) else {
        return Ok(none);
    };
    // Variables that were meant for a parent of ours are none of our business.
    if pid.parse() != Ok(own_pid) {
        return Ok(none);
    }
    match count.parse::<i32>() {
        Ok(count) if (0..=MAX_SOCKETS).contains(&count) => Ok(FIRST_SOCKET..FIRST_SOCKET + count),
        _ => Err(format!(
            "LISTEN_FDS is {count:?}; it must be a number from 0 to {MAX_SOCKETS}"
        )),
    }
}

/// Whether one wants to hear how far we are.
pub fn is_there() -> bool {
    env::var_os("NOTIFY_SOCKET").is_some()
}

/// Tells the supervisor, if there is one. That it does not listen is no reason to fail.
pub fn notify(state: &str) {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let bytes = path.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::debug!(%error, "the supervisor could not be told {state}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_for_others_are_not_ours() {
        assert_eq!(socket_numbers(None, Some("1"), 7), Ok(3..3));
        assert_eq!(socket_numbers(Some("8"), Some("1"), 7), Ok(3..3));
        assert_eq!(socket_numbers(Some("7"), None, 7), Ok(3..3));
        assert_eq!(socket_numbers(Some("7"), Some("2"), 7), Ok(3..5));
        for bad in ["", "-1", "65", "x", "99999999999"] {
            assert!(socket_numbers(Some("7"), Some(bad), 7).is_err(), "{bad}");
        }
    }
}
