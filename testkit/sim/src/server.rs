//! The old site: a disk, and an NBD server in front of it that speaks in bytes.
//!
//! It answers in any order, in chunks that mix with those of other answers, with holes and data
//! as it likes; and when it is to misbehave, it breaks the protocol in the ways that a client can
//! notice. What the VM there writes is durable once it was asked to flush, and not before.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hikkoshi_nbd::client::{BlockSizes, Negotiated};
use hikkoshi_nbd::server::reply::{
    Last, data_header, done_chunk, hole_chunk, push_block_status, simple_reply,
};
use hikkoshi_nbd::server::{ReplyStyle, Request};
use hikkoshi_nbd::wire::{Errno, REQUEST_BYTES, allocation, command, export};

use crate::oracle::Time;
use crate::plan::{Plan, SECTOR};
use crate::sim::Sim;
use crate::world::sector_of;

/// The number of `base:allocation` here.
const CONTEXT: u32 = 7;

/// The old site.
pub struct Server {
    sim: Arc<Sim>,
    structured: bool,
    can_flush: bool,
    extents: Option<u64>,
    min_block: u32,
    max_read: u32,
    state: Mutex<State>,
}

struct State {
    disk: Vec<u8>,
    up: bool,
    /// It says that the disk has another size.
    resized: bool,
    /// The right disk, while an older one is served in its place.
    right: Option<Vec<u8>>,
    silent_until_us: u64,
    /// When it was written what is not durable; at first the whole disk is not.
    unflushed: Vec<Time>,
}

/// What the server still has to say to one connection.
#[derive(Default)]
pub struct Conversation {
    replies: Vec<Reply>,
}

struct Reply {
    messages: VecDeque<Message>,
}

enum Message {
    Bytes(Vec<u8>),
    /// Data of the disk, read when it is sent.
    Data {
        header: Vec<u8>,
        offset: u64,
        len: u64,
    },
    /// All that was written until then is durable.
    Flushed {
        until: Time,
        reply: Vec<u8>,
    },
}

impl Server {
    /// A server for this disk.
    pub fn new(plan: &Plan, disk: Vec<u8>, sim: &Arc<Sim>) -> Arc<Self> {
        Arc::new(Self {
            sim: Arc::clone(sim),
            structured: plan.structured,
            can_flush: plan.can_flush,
            extents: plan.extents.map(u64::from),
            min_block: plan.min_block,
            max_read: plan.max_read,
            state: Mutex::new(State {
                disk,
                up: true,
                resized: false,
                right: None,
                silent_until_us: 0,
                unflushed: vec![0],
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right disk's bytes.
    pub fn disk(&self) -> Vec<u8> {
        let state = self.state();
        state.right.as_ref().unwrap_or(&state.disk).clone()
    }

    /// From now on an older disk is served in place of the right one, or that again. To be called
    /// between two connections.
    pub fn set_older(&self, older: bool) {
        let mut state = self.state();
        match (older, state.right.take()) {
            (true, None) => {
                let sectors = state.disk.len() / SECTOR;
                let mut old = state.disk.clone();
                for sector in 0..sectors {
                    if self.sim.below(8) == 0 {
                        let value = sector_of(self.sim.chance(|rng| rng.any()));
                        old[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(&value);
                    }
                }
                state.right = Some(std::mem::replace(&mut state.disk, old));
            }
            (true, right) => state.right = right,
            (false, Some(right)) => state.disk = right,
            (false, None) => {}
        }
    }

    /// The VM, still here, writes.
    pub fn write(&self, offset: usize, bytes: &[u8], now: Time) {
        let mut state = self.state();
        state.disk[offset..offset + bytes.len()].copy_from_slice(bytes);
        state.unflushed.push(now);
    }

    /// Whether something that was written before `began` is not durable, although it could be.
    pub fn owes_a_flush_of(&self, began: Time) -> bool {
        self.can_flush && self.state().unflushed.iter().any(|at| *at < began)
    }

    /// Can it be reached?
    pub fn is_up(&self) -> bool {
        self.state().up
    }

    /// It can be reached, or not.
    pub fn set_up(&self, up: bool) {
        self.state().up = up;
    }

    /// From the next connection on it says that the disk has another size, or the right one.
    pub fn set_resized(&self, resized: bool) {
        self.state().resized = resized;
    }

    /// It answers nothing until then.
    pub fn be_silent(&self, until_us: u64) {
        self.state().silent_until_us = until_us;
    }

    /// What a handshake leads to.
    pub fn shake_hands(&self) -> Negotiated {
        let state = self.state();
        let size = state.disk.len() as u64;
        Negotiated {
            size_bytes: if state.resized { size + 4096 } else { size },
            flags: export::HAS_FLAGS
                | export::CAN_MULTI_CONN
                | if self.can_flush {
                    export::SEND_FLUSH
                } else {
                    0
                },
            block_sizes: BlockSizes {
                min: self.min_block,
                preferred: 4096,
                max: self.max_read,
            },
            structured: self.structured,
            allocation_context: self.extents.map(|_| CONTEXT),
            transport: false,
            opened: false,
        }
    }

    /// Takes the whole requests off the front of `sent`.
    pub fn listen(&self, sent: &mut Vec<u8>, conversation: &mut Conversation) {
        let mut taken = 0;
        while let Some(header) = sent[taken..].first_chunk::<REQUEST_BYTES>() {
            taken += REQUEST_BYTES;
            match Request::parse(header) {
                Ok(request) => self.take_up(&request, conversation),
                Err(bad) => self.sim.fail(format!("the client sent no request: {bad}")),
            }
        }
        sent.drain(..taken);
    }

    fn take_up(&self, request: &Request, conversation: &mut Conversation) {
        let size = self.state().disk.len() as u64;
        let end = request.offset + u64::from(request.len);
        let block = u64::from(self.min_block);
        let aligned = request.offset.is_multiple_of(block)
            && (u64::from(request.len).is_multiple_of(block) || end == size);
        let style = if self.structured {
            ReplyStyle::Structured
        } else {
            ReplyStyle::Simple
        };
        let mut messages = VecDeque::new();
        match request.command {
            command::READ | command::BLOCK_STATUS
                if request.len == 0
                    || !aligned
                    || request.command == command::READ && request.len > self.max_read =>
            {
                self.sim.fail(format!(
                    "the client asked for what the server does not serve: {request:?}"
                ));
                return;
            }
            command::FLUSH if !self.can_flush => {
                self.sim
                    .fail("the client asked a server to flush that does not know it");
                return;
            }
            command::READ | command::BLOCK_STATUS | command::FLUSH
                if end > size || self.sim.strikes(|t| t.refuse) =>
            {
                let mut bytes = Vec::new();
                style.push_error(&mut bytes, request.cookie, Errno::Io, "no");
                messages.push_back(Message::Bytes(bytes));
            }
            command::READ if self.structured => self.answer_in_chunks(request, &mut messages),
            command::READ => messages.push_back(Message::Data {
                header: simple_reply(request.cookie, None).to_vec(),
                offset: request.offset,
                len: request.len.into(),
            }),
            command::BLOCK_STATUS => messages.push_back(self.extents_of(request)),
            command::FLUSH => {
                let mut reply = Vec::new();
                style.push_done(&mut reply, request.cookie);
                let until = self.state().unflushed.last().copied().unwrap_or(0);
                messages.push_back(Message::Flushed { until, reply });
            }
            _ => return,
        }
        conversation.replies.push(Reply { messages });
    }

    /// Cuts an answer into chunks of data and of holes.
    fn answer_in_chunks(&self, request: &Request, messages: &mut VecDeque<Message>) {
        let (cookie, end) = (request.cookie, request.offset + u64::from(request.len));
        let pieces = self.sim.chance(|rng| rng.pick(&[1, 1, 2, 5]));
        let mut at = request.offset;
        let mut runs = Vec::new();
        while at < end {
            // A sector is never sent in halves, which might be of different times.
            let sector = SECTOR as u64;
            let step = (u64::from(request.len) / pieces).next_multiple_of(sector);
            let step = step.max(sector).min(end - at);
            runs.push((at, step));
            at += step;
        }
        if self.sim.below(4) == 0 {
            self.sim.chance(|rng| {
                let (a, b) = (rng.index(runs.len()), rng.index(runs.len()));
                runs.swap(a, b);
            });
        }
        let apart = self.sim.below(2) == 0;
        for (n, &(offset, len)) in runs.iter().enumerate() {
            let last = if n + 1 == runs.len() && !apart {
                Last::Yes
            } else {
                Last::No
            };
            let len_u32 = u32::try_from(len).unwrap_or(u32::MAX);
            let zero = {
                let state = self.state();
                slice(&state.disk, offset, len).iter().all(|b| *b == 0)
            };
            messages.push_back(if zero && self.sim.below(4) > 0 {
                Message::Bytes(hole_chunk(cookie, offset, len_u32, last).to_vec())
            } else {
                Message::Data {
                    header: data_header(cookie, offset, len_u32, last).to_vec(),
                    offset,
                    len,
                }
            });
        }
        if apart {
            messages.push_back(Message::Bytes(done_chunk(cookie).to_vec()));
        }
    }

    fn extents_of(&self, request: &Request) -> Message {
        let grain = self.extents.unwrap_or(SECTOR as u64);
        let state = self.state();
        let end = request.offset + u64::from(request.len);
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let mut at = request.offset;
        // It may tell less than it was asked for.
        let most = self.sim.chance(|rng| rng.pick(&[2, 8, 1000]));
        while at < end && extents.len() < most {
            let next = ((at / grain + 1) * grain).min(end);
            let zero = slice(&state.disk, at, next - at).iter().all(|b| *b == 0);
            let flags = if zero {
                allocation::ZERO | allocation::HOLE
            } else {
                0
            };
            let len = u32::try_from(next - at).unwrap_or(u32::MAX);
            match extents.last_mut() {
                Some(last) if last.1 == flags => last.0 += len,
                _ => extents.push((len, flags)),
            }
            at = next;
        }
        drop(state);
        let mut bytes = Vec::new();
        push_block_status(&mut bytes, request.cookie, CONTEXT, &extents, Last::Yes);
        Message::Bytes(bytes)
    }

    /// Says the next piece of one of its answers, and whether it hangs up after that. `None` if it
    /// has nothing to say.
    pub fn speak(&self, conversation: &mut Conversation) -> Option<(Vec<u8>, bool)> {
        let silent = self.sim.now_us() < self.state().silent_until_us;
        if silent || conversation.replies.is_empty() {
            return None;
        }
        let n = self.sim.chance(|rng| rng.index(conversation.replies.len()));
        let message = conversation.replies[n].messages.pop_front();
        if conversation.replies[n].messages.is_empty() {
            conversation.replies.remove(n);
        }
        let mut header_bytes = 0;
        let mut bytes = match message? {
            Message::Bytes(bytes) => {
                header_bytes = bytes.len();
                bytes
            }
            Message::Flushed { until, reply } => {
                self.state().unflushed.retain(|at| *at > until);
                header_bytes = reply.len();
                reply
            }
            Message::Data {
                mut header,
                offset,
                len,
            } => {
                header_bytes = header_bytes.max(header.len());
                header.extend_from_slice(slice(&self.state().disk, offset, len));
                header
            }
        };
        if self.sim.strikes(|t| t.corrupt) {
            let whole = bytes.len();
            self.spoil(&mut bytes, header_bytes);
            return Some((bytes.clone(), bytes.len() < whole));
        }
        Some((bytes, false))
    }

    /// Breaks the protocol in a way that a client notices, sooner or later: what it can't notice
    /// in a protocol without checksums (wrong data in the right place) is not done here.
    fn spoil(&self, bytes: &mut Vec<u8>, header_bytes: usize) {
        let kind = self.sim.below(8);
        self.sim.note("server: spoils", kind, bytes.len() as u64);
        match kind {
            // Another magic number.
            0 => bytes[self.sim.chance(|rng| rng.index(4))] ^= 0x41,
            // An answer to what nobody asked.
            1 => bytes[8] ^= 0x80,
            // The same again.
            2 => bytes.extend_from_within(..),
            // Garbage in between.
            3 => {
                let garbage = self.sim.chance(|rng| rng.any()).to_be_bytes();
                bytes.splice(0..0, garbage);
            }
            // Another kind of chunk; in a simple reply, an error number with data behind it.
            4 => bytes[6] ^= 0x40,
            // Another length.
            5 if self.structured && header_bytes >= 20 => bytes[19] ^= 0x11,
            // Another place on the disk.
            6 if self.structured && header_bytes >= 28 => bytes[22] ^= 0x20,
            // It ends too early, and so does the connection: with something behind it, nobody could
            // tell.
            _ => {
                let kept = self.sim.chance(|rng| rng.index(bytes.len()));
                bytes.truncate(kept);
            }
        }
    }
}

fn slice(disk: &[u8], offset: u64, len: u64) -> &[u8] {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
    &disk[start.min(disk.len())..end.min(disk.len())]
}
