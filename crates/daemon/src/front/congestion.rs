//! Which congestion control TCP uses towards clients.
//!
//! Most systems' own takes every lost packet for a full link. On a link that loses one in a thousand by chance, over
//! a long way, that leaves most of it unused, whoever sends. So another can be chosen for what this daemon sends.

use std::fs;
use std::io;

use socket2::{Domain, Socket, Type};

/// What the kernel has now. Others are in modules, which it loads by itself where we may have it do so.
const AVAILABLE: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";

/// Whether it can be chosen here.
///
/// # Errors
/// It cannot; says why, and what to do.
pub fn check(name: &str) -> Result<(), String> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None);
    socket
        .and_then(|socket| choose(&socket, name))
        .map_err(|error| reason(name, &error))
}

/// Chooses it for what is sent over a TCP socket (tcp(7), `TCP_CONGESTION`).
///
/// # Errors
/// The kernel does not have it, or we may not use it.
pub(super) fn choose(socket: &Socket, name: &str) -> io::Result<()> {
    socket.set_tcp_congestion(name.as_bytes())
}

fn reason(name: &str, error: &io::Error) -> String {
    let what = format!("TCP cannot use the congestion control {name:?}");
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            let available = fs::read_to_string(AVAILABLE).unwrap_or_default();
            format!(
                "{what}: this kernel has {}; others are in modules (`modprobe tcp_{name}`)",
                available.trim()
            )
        }
        Some(libc::EPERM) => format!(
            "{what}: only root may choose it, and whoever likes once it is in the sysctl \
             net.ipv4.tcp_allowed_congestion_control"
        ),
        _ => format!("{what}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_the_kernel_lacks_is_refused_with_what_it_has() {
        // Every kernel has it.
        check("reno").unwrap();
        let why = check("tortoise").unwrap_err();
        assert!(
            why.contains("\"tortoise\"") && why.contains("reno"),
            "{why}"
        );
        let forbidden = reason("bbr", &io::Error::from_raw_os_error(libc::EPERM));
        assert!(forbidden.contains("tcp_allowed_congestion_control"));
    }
}
