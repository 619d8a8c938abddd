//! The congestion control that is chosen is that of the clients' connections.
#![allow(clippy::unwrap_used)]

mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::net::TcpStream;
use std::os::fd::BorrowedFd;

use hikkoshi_daemon::config::{DaemonConfig, Listen};
use hikkoshi_daemon::{Daemon, DaemonError};
use site::{On, Wanted, config_of, noise};
use socket2::Socket;
use support::wait_until;
use tempfile::TempDir;

fn start(dir: &TempDir, control: &str) -> Result<Daemon, DaemonError> {
    let image = dir.path().join("disk");
    std::fs::write(&image, noise(1 << 20)).unwrap();
    Daemon::start(DaemonConfig {
        listen: vec![Listen::Tcp("127.0.0.1".into(), 0)],
        congestion: Some(control.to_owned()),
        ..config_of(&image, Wanted::plain(On::Tcp))
    })
}

/// That of the daemon's end of `client`, once it has accepted it: the daemon is in this process.
fn control_of_the_other_end(client: &TcpStream) -> Option<String> {
    let (here, there) = (client.local_addr().ok()?, client.peer_addr().ok()?);
    let numbers = std::fs::read_dir("/proc/self/fd").unwrap();
    let sockets = numbers.filter_map(|entry| {
        let number = entry.ok()?.file_name().to_str()?.parse().ok()?;
        // SAFETY: it was open a moment ago, and if it is not any more, copying it fails.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        descriptor.try_clone_to_owned().ok().map(Socket::from)
    });
    let mut ends = sockets.filter(|socket| {
        let of = |end: std::io::Result<socket2::SockAddr>| end.ok()?.as_socket();
        of(socket.local_addr()) == Some(there) && of(socket.peer_addr()) == Some(here)
    });
    let name = ends.next()?.tcp_congestion().ok()?;
    let name = name.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

#[test]
fn what_is_sent_to_clients_is_under_the_control_that_was_chosen() {
    let dir = TempDir::new().unwrap();
    // Every kernel has the one, and nearly every one the other.
    let usual = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap();
    let chosen = match usual.trim() {
        "reno" => "cubic",
        _ => "reno",
    };
    let daemon = start(&dir, chosen).unwrap();
    let Listen::Tcp(host, port) = &daemon.listening()[0] else {
        panic!("not over TCP");
    };
    let client = TcpStream::connect((host.as_str(), *port)).unwrap();
    wait_until("the connection is under it", || {
        control_of_the_other_end(&client).as_deref() == Some(chosen)
    });
    drop(client);
    daemon.shutdown().unwrap();
}

#[test]
fn one_that_is_not_there_is_refused_before_anything_is_served() {
    let error = start(&TempDir::new().unwrap(), "tortoise").unwrap_err();
    assert!(matches!(error, DaemonError::Config(_)), "{error:?}");
    assert!(error.to_string().contains("tortoise"), "{error}");
}
