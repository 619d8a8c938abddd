//! The client's end of the socket. The daemon's end is served by a thread that lives as long as
//! the process: starting one for each run would take longer than most runs.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, LazyLock, Mutex};

use hikkoshi_daemon::front::{self, Table};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;

use super::disk::Disk;

/// Looks without sleeping before the first sleep.
const IDLE_TURNS: u32 = 40;

/// How long a look sleeps after that: something may be wanted of the volume's threads, which are us.
const SLEEP: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000,
};

struct Daemon {
    work: SyncSender<(Arc<Table>, Socket)>,
    ended: Receiver<()>,
}

static DAEMON: LazyLock<Mutex<Daemon>> = LazyLock::new(|| {
    let (work, todo) = sync_channel::<(Arc<Table>, Socket)>(1);
    let (told, ended) = sync_channel(1);
    std::thread::Builder::new()
        .name("daemon".into())
        .spawn(move || {
            while let Ok((table, socket)) = todo.recv() {
                // A client that breaks the connection is no failure of the daemon.
                let _ = front::serve_one(table, socket);
                if told.send(()).is_err() {
                    break;
                }
            }
        })
        .expect("a thread");
    Mutex::new(Daemon { work, ended })
});

/// Sends all of `client`, in pieces if `pace` says so, and receives until the daemon hangs up.
pub fn hold(disk: &Disk, client: &[u8], pace: u8) -> Vec<u8> {
    hold_until(disk, client, pace, |_| true)
}

/// The same, but the end of what the client sends is not told before it has had enough of what it
/// has received. If it never has, the daemon is waited for.
pub fn hold_until(
    disk: &Disk,
    client: &[u8],
    pace: u8,
    mut has_enough: impl FnMut(&[u8]) -> bool,
) -> Vec<u8> {
    let daemon = DAEMON.lock().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let theirs = Socket::from(std::os::fd::OwnedFd::from(theirs));
    daemon.work.send((Arc::clone(&disk.table), theirs)).unwrap();
    let piece = match pace {
        0..128 => client.len(),
        pace => usize::from(pace - 127) * 5,
    };
    let mut received = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let (mut sent, mut hung_up, mut idle) = (0, false, 0);
    loop {
        let mut moved = false;
        if sent < client.len() {
            let end = client.len().min(sent + piece);
            match ours.write(&client[sent..end]) {
                Ok(n) => {
                    sent += n;
                    moved = true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // The daemon has hung up; what it said before can still be read.
                Err(_) => sent = client.len(),
            }
        }
        if sent == client.len() && !hung_up && has_enough(&received) {
            hung_up = true;
            let _ = ours.shutdown(Shutdown::Write);
        }
        match ours.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                received.extend_from_slice(&buffer[..n]);
                moved = true;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
        disk.turn();
        idle = if moved { 0 } else { idle + 1 };
        if idle > 0 {
            wait(&ours, sent < client.len(), idle);
        }
    }
    // A daemon that has refused a client waits for it to hang up.
    drop(ours);
    // Only then is nobody using the volume any more.
    daemon.ended.recv().unwrap();
    received
}

/// Waits a moment, or until the socket has something to do.
fn wait(ours: &UnixStream, sending: bool, idle: u32) {
    if idle < IDLE_TURNS {
        std::thread::yield_now();
        return;
    }
    let mut wanted = PollFlags::IN;
    if sending {
        wanted |= PollFlags::OUT;
    }
    // Interrupted or not: the caller looks again.
    let _ = poll(&mut [PollFd::new(ours, wanted)], Some(&SLEEP));
}
