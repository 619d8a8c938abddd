//! The lock that keeps two daemons off one image, and who holds it when it cannot be had.
//! Called when an image is opened. The lock goes with the descriptor, so also when killed.

use std::fs::{self, File};
use std::io;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// How long a holder that is just letting go is waited for: a killed daemon whose descriptors are
/// being closed, or udev looking at a block device, which it locks while it does.
const PATIENCE: Duration = Duration::from_millis(500);
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// How often the kernel's list of locks is looked through. It is read a page at a time, and what comes and goes meanwhile
/// can hide an entry.
const LOOKS: usize = 8;

/// What came of an attempt to lock.
#[derive(Debug)]
pub(crate) enum Locked {
    /// It is ours.
    Yes,
    /// Another process has it; with what is known of that process.
    HeldBy(String),
}

/// Locks the open file, shared for readers and exclusive otherwise.
///
/// # Errors
/// The error of `flock`, unless it is that somebody else has the lock.
pub(crate) fn acquire(file: &File, shared: bool) -> io::Result<Locked> {
    let operation = if shared {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    let give_up = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(Locked::Yes),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < give_up => {
                std::thread::sleep(RETRY_EVERY);
            }
            Err(Errno::WOULDBLOCK) => return Ok(Locked::HeldBy(holder(file))),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Names the holder as well as it can be known; locks of other hosts and containers have no name.
fn holder(file: &File) -> String {
    let found = rustix::fs::fstat(file).ok().and_then(|stat| {
        (0..LOOKS).find_map(|_| {
            let locks = fs::read_to_string("/proc/locks").ok()?;
            holder_pid(
                &locks,
                rustix::fs::major(stat.st_dev),
                rustix::fs::minor(stat.st_dev),
                stat.st_ino,
            )
        })
    });
    match found {
        Some(pid) => match fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(name) => format!("process {pid} ({})", name.trim_end()),
            Err(_) => format!("process {pid}"),
        },
        None => "another process".to_owned(),
    }
}

/// Finds the process that has an inode locked in the text of `/proc/locks`, whose lines read
/// `1: FLOCK  ADVISORY  WRITE 1234 fe:00:10010727 0 EOF`.
fn holder_pid(locks: &str, major: u32, minor: u32, inode: u64) -> Option<u32> {
    let wanted = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        if words.next() != Some("FLOCK") {
            return None; // also a waiter's line, which has "->" here
        }
        let pid = words.nth(2)?;
        (words.next()? == wanted)
            .then(|| pid.parse().ok())
            .flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::holder_pid;

    #[test]
    fn finds_the_holder_and_not_a_waiter_or_another_kind() {
        let text = "1: POSIX  ADVISORY  WRITE 7 fe:00:42 0 EOF\n\
                    2: FLOCK  ADVISORY  WRITE 1234 fe:00:42 0 EOF\n\
                    2: -> FLOCK  ADVISORY  WRITE 99 fe:00:42 0 EOF\n\
                    3: FLOCK  ADVISORY  READ 5 00:1a:42 0 EOF\n";
        assert_eq!(holder_pid(text, 0xfe, 0, 42), Some(1234));
        assert_eq!(holder_pid(text, 0, 0x1a, 42), Some(5));
        assert_eq!(holder_pid(text, 0xfe, 0, 43), None);
        assert_eq!(holder_pid("nonsense\n1: FLOCK", 0xfe, 0, 42), None);
    }
}
