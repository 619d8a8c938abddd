//! What TCP tells of a connection.

use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime};

use socket2::Socket;

/// A round trip that is longer than the shortest by a sixteenth and this has waited in a queue.
const QUEUE_TIME: Duration = Duration::from_millis(2);

/// Of one connection, now. Times are the kernel's: a mean of the last round trips of what this end sent, small
/// requests too.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo {
    /// Bytes that the other end has acknowledged since the connection began.
    pub acknowledged: u64,
    /// Packets that were sent again, since the connection began: most often because they were lost.
    pub sent_again: u32,
    /// Packets that came before one that had been sent sooner, since the connection began: most often because that
    /// one was lost. `None` before Linux 5.4.
    pub out_of_order: Option<u32>,
    /// Of the round trips of the last minutes; `None` before the first acknowledgement.
    pub shortest_round_trip: Option<Duration>,
    /// A mean of the last ones.
    pub round_trip: Duration,
}

/// Where `struct tcp_info` of `linux/tcp.h` has them.
const RTT_AT: usize = 68;
const TOTAL_RETRANS_AT: usize = 100;
const BYTES_ACKED_AT: usize = 120;
const MIN_RTT_AT: usize = 148;
const RCV_OOOPACK_AT: usize = 224;
const LEAST_INFO_BYTES: usize = 152;
const INFO_BYTES: usize = 228;

impl TcpInfo {
    /// `None`: it is not TCP, or this kernel tells too little.
    pub fn of(socket: &Socket) -> Option<Self> {
        let mut info = [0_u8; INFO_BYTES];
        let mut len = libc::socklen_t::try_from(INFO_BYTES).ok()?;
        // SAFETY: the kernel writes at most `len` bytes to `info`, and to `len` how many.
        let outcome = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let len = usize::try_from(len).ok()?;
        if outcome != 0 || len < LEAST_INFO_BYTES {
            return None;
        }
        let number = |at: usize| Some(u32::from_ne_bytes(info[at..].first_chunk().copied()?));
        let acknowledged = info[BYTES_ACKED_AT..].first_chunk().copied()?;
        let shortest = number(MIN_RTT_AT)?;
        let known = shortest != 0 && shortest != u32::MAX;
        Some(Self {
            acknowledged: u64::from_ne_bytes(acknowledged),
            sent_again: number(TOTAL_RETRANS_AT)?,
            out_of_order: number(RCV_OOOPACK_AT).filter(|_| len == INFO_BYTES),
            shortest_round_trip: known.then(|| Duration::from_micros(shortest.into())),
            round_trip: Duration::from_micros(number(RTT_AT)?.into()),
        })
    }
}

/// Whether a round trip as long as this shows that more is on its way than fills the path, whoever let
/// it go: TCP, whose window may still be the smaller one when it has outgrown the path, makes a queue of its own.
pub fn is_queue(trip: Duration, base: Duration) -> bool {
    trip > base + base / 16 + QUEUE_TIME
}

/// The time since the epoch (1970), by the clock of the host.
pub fn since_epoch() -> Duration {
    let passed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    passed.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_queue_is_a_round_trip_that_has_grown() {
        let ms = Duration::from_millis;
        for (base, trip, queue) in [
            (200, 214, false),
            (200, 216, true),
            (10, 12, false),
            (10, 13, true),
        ] {
            assert_eq!(is_queue(ms(trip), ms(base)), queue, "{trip} of {base}");
        }
    }

    #[test]
    fn tcp_tells_of_a_connection_and_a_unix_socket_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut there, _) = listener.accept().unwrap();
        here.write_all(&[7; 1000]).unwrap();
        there.read_exact(&mut [0; 1000]).unwrap();
        let socket = Socket::from(here);
        // The acknowledgement may take a moment.
        while TcpInfo::of(&socket).unwrap().acknowledged < 1000 {
            std::thread::yield_now();
        }
        let known = TcpInfo::of(&socket).unwrap();
        let shortest = known.shortest_round_trip.unwrap();
        assert!(shortest <= known.round_trip && known.round_trip < Duration::from_secs(60));
        // Loopback loses nothing, and hardly anything is sent again in vain.
        assert!(known.sent_again < 10);
        assert_eq!(known.out_of_order.unwrap_or(0), 0);
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(TcpInfo::of(&Socket::from(one)).is_none());
    }
}
