//! Replay: a trace's requests again, each when what it followed has been answered.
//!
//! One thread, one connection. A request is asked when the answer that it followed in the
//! recording has come and the guest has thought as long as then (scaled and capped, because the
//! recorded guest's processor was emulated). So what overlapped then overlaps now, and a slow
//! answer delays all that followed it, as it would have delayed the guest.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hikkoshi_nbd::wire::command;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Kind, Trace};
use crate::client::{Connection, Content, Endpoint, Random};

/// Requests in flight at once. A guest's virtio queue has 128 places or so.
const DEPTH: usize = 128;
/// How long a server may leave everything unanswered.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// What came of a replay.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// From the start to the last answer, or to the limit.
    pub seconds: f64,
    /// Whether all requests were answered within the limit.
    pub complete: bool,
    /// Requests answered.
    pub answered: usize,
    /// When each read was asked (seconds from the start), and how long it took (seconds).
    pub reads: Vec<(f64, f64)>,
}

/// How a guest thinks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thinking {
    /// Recorded times are multiplied by this.
    pub scale: f64,
    /// And then are at most this.
    pub cap: Duration,
}

struct Asked {
    request: usize,
    at: Instant,
}

/// Puts the requests of `trace` to the server at `endpoint`, for `limit` at most.
pub fn replay(
    trace: &Trace,
    endpoint: &Endpoint,
    thinking: Thinking,
    limit: Duration,
) -> Result<Replay> {
    let mut connection = Connection::open(endpoint, DEPTH, true)?;
    ensure!(
        connection.size_bytes >= trace.disk_bytes,
        "the trace is of a disk of {} bytes, the server's has {}",
        trace.disk_bytes,
        connection.size_bytes
    );
    // Written data: half of it compressible, like most of what guests write.
    let longest = trace.requests.iter().map(|r| r.length).max().unwrap_or(0);
    let mut data = vec![0x20; usize::try_from(longest)?];
    let mut random = Random::new(0x7472_6163);
    for chunk in data.chunks_mut(16) {
        let word = random.next().to_le_bytes();
        let bytes = chunk.len().min(8);
        chunk[..bytes].copy_from_slice(&word[..bytes]);
    }

    let mut followers: Vec<Vec<usize>> = vec![Vec::new(); trace.requests.len()];
    let mut due: BinaryHeap<Reverse<(Instant, usize)>> = BinaryHeap::new();
    let start = Instant::now();
    let think = |index: usize| {
        let recorded = Duration::from_micros(trace.requests[index].think_us);
        recorded.mul_f64(thinking.scale).min(thinking.cap)
    };
    for (index, request) in trace.requests.iter().enumerate() {
        match request.after {
            Some(after) => followers[after].push(index),
            None => due.push(Reverse((start + think(index), index))),
        }
    }

    let content = Content::new();
    let mut asked: Vec<Option<Asked>> = (0..DEPTH).map(|_| None).collect();
    let mut free: Vec<usize> = (0..DEPTH).rev().collect();
    let mut done = Vec::new();
    let mut answered = 0;
    let mut reads = Vec::new();
    let mut last_answer = start;
    while answered < trace.requests.len() {
        let now = Instant::now();
        if now.duration_since(start) >= limit {
            break;
        }
        let mut sent = false;
        while let (Some(Reverse((at, index))), Some(&slot)) = (due.peek().copied(), free.last()) {
            if at > now {
                break;
            }
            due.pop();
            free.pop();
            ask(&mut connection, slot, trace, index, &data);
            asked[slot] = Some(Asked {
                request: index,
                at: now,
            });
            sent = true;
        }
        if sent {
            connection.flush(&content)?;
        }
        let waiting = free.len() < DEPTH;
        if waiting && now.duration_since(last_answer) > SILENCE_LIMIT {
            bail!("the server has answered nothing for {SILENCE_LIMIT:?}");
        }
        let next = match due.peek() {
            // Without a free slot only an answer helps.
            Some(Reverse((at, _))) if !free.is_empty() => at.saturating_duration_since(now),
            _ => Duration::from_millis(100),
        };
        let readable = wait(&connection, next.min(start + limit - now))?;
        if !readable {
            continue;
        }
        connection.receive(&mut done)?;
        let now = Instant::now();
        for slot in done.drain(..) {
            let Asked { request, at } = asked[slot].take().context("an answer to nothing")?;
            free.push(slot);
            answered += 1;
            last_answer = now;
            if trace.requests[request].kind == Kind::Read {
                let began = at.duration_since(start).as_secs_f64();
                reads.push((began, now.duration_since(at).as_secs_f64()));
            }
            for &index in &followers[request] {
                due.push(Reverse((now + think(index), index)));
            }
        }
    }
    let complete = answered == trace.requests.len();
    let end = if complete { last_answer } else { start + limit };
    if complete {
        connection.close()?;
    }
    Ok(Replay {
        seconds: end.duration_since(start).as_secs_f64(),
        complete,
        answered,
        reads,
    })
}

fn ask(connection: &mut Connection, slot: usize, trace: &Trace, index: usize, data: &[u8]) {
    let request = &trace.requests[index];
    let command = match request.kind {
        Kind::Read => command::READ,
        Kind::Write => command::WRITE,
        Kind::Flush => command::FLUSH,
        Kind::Trim => command::TRIM,
        Kind::Zero => command::WRITE_ZEROES,
    };
    connection.request(slot, command, request.offset, request.length, false);
    if request.kind == Kind::Write {
        let length = usize::try_from(request.length).expect("at most 32 MiB");
        connection.payload_bytes(&data[..length]);
    }
}

/// Whether something can be received, after `timeout` at most.
fn wait(connection: &Connection, timeout: Duration) -> Result<bool> {
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs())?,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let socket = connection.socket();
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error).context("wait for the server"),
    }
}
