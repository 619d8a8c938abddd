//! One destination of ours in transmission: the loop that serves it frames (`docs/wire.md`).
//!
//! One thread that never waits for anything but the next event: requests are taken as they come,
//! what is most urgent is read and sent a quantum at a time, and only when the kernel has hardly
//! anything unsent left, so that the order is decided as late as it can be. What is not in memory
//! is read elsewhere meanwhile, or fetched from the volume's own source, and the others go on.

mod backlog;
mod batch;
mod held;
mod pace;
mod post;

use std::collections::{HashMap, HashSet};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_nbd::server::StatusExtents;
use hikkoshi_nbd::wire::{Errno, allocation};
use hikkoshi_wan::transport::frame::{Header, Kind, Side};
use hikkoshi_wan::transport::message::{self, Extent, Hash, Request, Wish};
use hikkoshi_wan::transport::pack::Packer;
use hikkoshi_wan::transport::session::{Tell, Told};
use hikkoshi_wan::transport::{Decoder, Frame, Priority, Scheduler, Step, Work, limits};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;

use super::outbox::errno_of;
use crate::volume::Volume;
use crate::volume::departure::Bound;
use crate::volume::guest::{ReadNow, read_error};
use crate::volume::relocation::{ReadEnd, Relocation};
use backlog::Backlog;
use batch::{Batch, Bytes, Place};
use held::Held;
use pace::Pace;
use post::{Letter, Outcome, Post};

/// What the kernel may hold of this connection that it has not sent: enough to be sending on
/// while the next quantum is read, and what demand waits behind at most, beside one quantum.
const UNSENT_BYTES: u32 = 2 * limits::QUANTUM_BYTES;

/// Bytes taken from the socket at a time: a few hundred requests.
const RECEIVE_BYTES: usize = 16 << 10;

/// What is not in memory is read this much at a time: a disk's own pace, and a multiple of a
/// quantum, so that no step crosses its end.
const FETCH_BYTES: u64 = 8 * limits::QUANTUM_BYTES as u64;

/// Bytes that a connection may have read elsewhere and not sent, beyond which only a quantum is
/// read at a time.
const MAX_FETCHED_BYTES: usize = 16 << 20;

/// How long a client that was refused has to hang up by itself.
const FAREWELL: Duration = Duration::from_secs(10);

/// What looking for extents counts as, where work between two looks at the socket is bounded.
const EXTENTS_COST: u32 = 4096;

/// What has come for a request that had to wait.
enum Ready {
    Bytes { offset: u64, data: Arc<Vec<u8>> },
    Done,
    Failed(Errno, String),
}

/// The bytes for a step.
enum Got {
    Bytes(Bytes),
    /// They are being fetched.
    Parked,
    Failed(Errno, String),
}

pub(super) struct FrameSession {
    volume: Arc<Volume>,
    /// Let go of as soon as the volume is local.
    relocation: Option<Arc<Relocation>>,
    socket: Socket,
    over_tcp: bool,
    /// How much may be on its way, where TCP tells.
    pace: Option<Pace>,
    /// The socket said that there is room, and took nothing.
    refused: bool,
    decoder: Decoder,
    scheduler: Scheduler,
    batch: Batch,
    /// What goes when the path has room.
    held: Held,
    post: Arc<Post>,
    ready: HashMap<u64, Ready>,
    /// Bytes that are being read elsewhere, or wait in `ready`.
    fetched_bytes: usize,
    /// Requests that are not hashed to their end: where they began, and the hashes from there.
    hashes: HashMap<u64, (u64, Vec<Hash>)>,
    /// Requests of which something had to come from the volume's own source.
    remote: HashSet<u64>,
    /// For which move it reads, once it has said so.
    bound: Bound,
    /// An answer about the move is on its way. It may be long, so there is one at a time, and
    /// nothing is taken meanwhile.
    telling: bool,
    /// It is not to read for its move: nothing more is taken, and when it has been told so, this ends.
    dismissed: bool,
    packer: Packer,
}

impl FrameSession {
    pub fn new(volume: Arc<Volume>, socket: Socket, early: &[u8]) -> io::Result<Self> {
        let over_tcp = !socket.local_addr()?.is_unix();
        if over_tcp {
            socket.set_tcp_notsent_lowat(UNSENT_BYTES)?;
        }
        let mut decoder = Decoder::new(Side::Client);
        decoder.push(early);
        Ok(Self {
            relocation: volume.relocation(),
            scheduler: Scheduler::new(volume.geometry().size_bytes()),
            volume,
            pace: Pace::of(&socket),
            socket,
            over_tcp,
            refused: false,
            decoder,
            batch: Batch::new(),
            held: Held::new(),
            post: Arc::new(Post::new()?),
            ready: HashMap::new(),
            fetched_bytes: 0,
            hashes: HashMap::new(),
            remote: HashSet::new(),
            bound: Bound::default(),
            telling: false,
            dismissed: false,
            packer: Packer::default(),
        })
    }

    /// Serves until the client or the daemon ends it.
    ///
    /// # Errors
    /// The connection broke, or what came over it makes no sense.
    pub fn run(mut self) -> io::Result<()> {
        self.volume.tally.clients.fetch_add(1, Ordering::Relaxed);
        let outcome = self.serve();
        self.volume.tally.clients.fetch_sub(1, Ordering::Relaxed);
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        outcome
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            self.take_requests()?;
            // Only the kernel knows whether there is room for more, and it is asked at the same
            // time as for what is new, so that this is seen before the next quantum is chosen.
            let asked_at = Instant::now();
            let held_back = self.held_back(asked_at);
            let sending = held_back.is_none() && self.has_something();
            let seen = self.wait(sending, held_back)?;
            let woken_at = Instant::now();
            if seen.letters {
                self.take_letters();
            }
            if seen.input && !self.receive()? {
                return Ok(());
            }
            self.take_requests()?;
            if self.relocation.is_some() && self.volume.is_plain() {
                self.relocation = None;
            }
            // The disk has changed its storage. Who connects again reads it there.
            if self.volume.successor().is_some() {
                return Ok(());
            }
            if seen.room || !sending {
                if self.batch.is_empty() {
                    self.choose(sending);
                    // Looked at after reading: a fence is lifted before the first write behind it.
                    if !self.volume.still_serves(&self.bound) {
                        return Ok(());
                    }
                }
                self.refused = !self.batch.send(&self.socket)?;
                self.telling &= !self.batch.is_empty();
                if self.dismissed && self.batch.is_empty() {
                    return self.see_off();
                }
            }
            if self.batch.is_empty() && self.held.is_empty() {
                self.hold();
            }
            self.packer.note(woken_at - asked_at, woken_at.elapsed());
        }
    }

    /// The next step that a guest waits for.
    fn next_waited_for(&self) -> Option<Step> {
        let next = self.scheduler.peek();
        next.filter(|step| step.priority.is_waited_for())
    }

    fn has_something(&self) -> bool {
        !self.batch.is_empty() || !self.held.is_empty() || self.scheduler.peek().is_some()
    }

    /// If all that could be sent has to wait for room on the path, how long until it is to ask again.
    fn held_back(&self, now: Instant) -> Option<Duration> {
        let urgent = self.held.is_urgent() || self.next_waited_for().is_some();
        if urgent || !self.batch.is_empty() || self.held.is_empty() {
            return None;
        }
        let pace = self.pace.as_ref()?;
        pace.admit(now, self.held.wire_bytes()).err()
    }

    /// Puts into the batch what goes now: what a guest waits for, or else what is held, if there is
    /// room for it.
    fn choose(&mut self, room: bool) {
        let next = self.next_waited_for();
        let in_order = next.is_some_and(|step| self.held.has(step.id));
        if self.held.is_urgent() || in_order || (room && next.is_none()) {
            self.held.release(&mut self.batch);
        } else {
            self.fill(true);
        }
    }

    /// Makes ready what goes when there is room for it.
    fn hold(&mut self) {
        self.fill(false);
        self.held.put(&mut self.batch);
    }

    fn wait(&self, sending: bool, held_back: Option<Duration>) -> io::Result<Seen> {
        let mut wanted = PollFlags::empty();
        if !self.scheduler.is_full() && !self.telling {
            wanted |= PollFlags::IN;
        }
        if sending {
            wanted |= PollFlags::OUT;
        }
        let backlog = if sending && self.over_tcp {
            Backlog::of(&self.socket, self.refused)
        } else {
            Backlog::Short
        };
        let patience = held_back.or_else(|| backlog.patience());
        let patience = patience.map(|wait| Timespec {
            tv_sec: 0,
            tv_nsec: wait.subsec_nanos().into(),
        });
        let bell = self.post.bell();
        let mut fds = [
            PollFd::from_borrowed_fd(self.socket.as_fd(), wanted),
            PollFd::from_borrowed_fd(bell, PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, patience.as_ref()) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        let socket = fds[0].revents();
        let over = socket.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        Ok(Seen {
            // The end of the stream is found by receiving.
            input: socket.contains(PollFlags::IN) || over,
            room: socket.contains(PollFlags::OUT) || self.has_room(backlog),
            letters: !fds[1].revents().is_empty(),
        })
    }

    /// Whether there is room that `poll` does not tell of.
    fn has_room(&self, before: Backlog) -> bool {
        match before {
            Backlog::Short => false,
            Backlog::Room => true,
            Backlog::Full => Backlog::of(&self.socket, false) == Backlog::Room,
        }
    }

    // Requests

    /// Receives what there is. False at the end of the stream.
    fn receive(&mut self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); RECEIVE_BYTES];
        let flags = rustix::net::RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.socket, &mut buffer, flags) {
            Ok((_, 0)) => Ok(false),
            Ok(((received, _), _)) => {
                self.decoder.push(received);
                Ok(true)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes the requests that are here, as many as there is room for.
    fn take_requests(&mut self) -> io::Result<()> {
        while !self.scheduler.is_full()
            && !self.telling
            && let Some(frame) = self.decoder.next_frame().map_err(io::Error::other)?
        {
            if frame.header.kind == Kind::Tell {
                self.tell(&frame)?;
                self.telling = true;
                continue;
            }
            let request = Request::parse(&frame).map_err(io::Error::other)?;
            if let Request::Promote(id, priority) = request {
                self.held.promote(id, priority);
            }
            self.scheduler.submit(request).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// A message about the move. It is answered here and now: whoever hands over waits for the
    /// medium, and has a connection of its own for it.
    fn tell(&mut self, frame: &Frame) -> io::Result<()> {
        let tell = Tell::decode(&frame.payload)
            .ok_or_else(|| io::Error::other("a message about the move that makes no sense"))?;
        let told = self.volume.answer(tell, &mut self.bound);
        if !self.volume.knows_boots(&self.bound) {
            return Err(io::Error::other("it must say again for which move it is"));
        }
        // What was sent behind it counted on another answer.
        self.dismissed = matches!((tell, &told), (Tell::Attach { .. }, Told::Refused(_)));
        let told = told.encode();
        // Whoever still fetches from the old copy that is here reads just that.
        self.relocation = match self.volume.reads_old_copy(&self.bound) {
            true => None,
            false => self.volume.relocation(),
        };
        let mut pieces = told.chunks(limits::QUANTUM_BYTES as usize).peekable();
        while let Some(piece) = pieces.next() {
            let mut header = Header::request(Kind::Told, Priority::DEMAND, frame.header.id, 0, 0);
            header.last = pieces.peek().is_none();
            self.batch.frame(header, piece.to_vec());
        }
        Ok(())
    }

    /// Ends the stream towards a client that was refused, and waits for it to hang up: if we did while
    /// something of it is unread, the kernel would take the refusal back.
    fn see_off(&self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write)?;
        self.socket.set_read_timeout(Some(FAREWELL))?;
        let deadline = Instant::now() + FAREWELL;
        let mut buffer = [MaybeUninit::<u8>::uninit(); RECEIVE_BYTES];
        while Instant::now() < deadline {
            let flags = rustix::net::RecvFlags::empty();
            match rustix::net::recv(&self.socket, &mut buffer, flags) {
                Ok((_, 0)) => break,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    // Answers

    /// Fills the batch with what is most urgent, if it is of the kind that a guest waits for, or of the other.
    /// Bounded in what it does, not only in what it sends: hashing takes its time, too.
    fn fill(&mut self, waited_for: bool) {
        let most = match waited_for {
            true => limits::QUANTUM_BYTES,
            false => limits::BULK_BYTES,
        };
        let mut spent = 0;
        while let Some(step) = self.scheduler.peek() {
            if step.priority.is_waited_for() != waited_for || self.held.has(step.id) && waited_for {
                return;
            }
            let cost = match step.work {
                Work::Wish(Wish::Extents) => EXTENTS_COST,
                _ => step.len,
            };
            if spent > 0 && spent + cost > most {
                return;
            }
            spent += cost;
            if !waited_for {
                self.held.belongs_to(step.id);
            }
            self.produce(&step);
        }
    }

    fn produce(&mut self, step: &Step) {
        match step.work {
            Work::End => {
                let end = reply(Kind::End, step, 0, 0);
                self.batch.frame(end, Vec::new());
                self.finish(step);
            }
            Work::Flush => self.produce_flush(step),
            Work::Wish(Wish::Extents) => self.produce_extents(step),
            Work::Wish(Wish::Read { packing }) => match self.bytes(step) {
                Got::Bytes(bytes) => {
                    let Step {
                        id,
                        priority,
                        offset,
                        last,
                        ..
                    } = *step;
                    let place = Place {
                        id,
                        priority,
                        offset,
                        last,
                    };
                    let mut packing = self.volume.packing_towards(packing);
                    if !self.held.is_empty() {
                        packing = packing.outside_of_stream();
                    }
                    self.batch.data(place, &bytes, &mut self.packer, packing);
                    if last && !self.remote.contains(&id) {
                        self.volume.count_read(false);
                    }
                    self.finish(step);
                }
                Got::Parked => {}
                Got::Failed(errno, text) => self.fail(step, errno, &text),
            },
            Work::Wish(Wish::Hash { grain }) => match self.bytes(step) {
                Got::Bytes(bytes) => self.produce_hashes(step, grain, bytes),
                Got::Parked => {}
                Got::Failed(errno, text) => self.fail(step, errno, &text),
            },
        }
    }

    /// As a client that flushes: set aside until it is done, and answered then.
    fn produce_flush(&mut self, step: &Step) {
        match self.ready.remove(&step.id) {
            Some(Ready::Failed(errno, text)) => self.fail(step, errno, &text),
            Some(Ready::Done | Ready::Bytes { .. }) => {
                self.batch.frame(reply(Kind::End, step, 0, 0), Vec::new());
                self.finish(step);
            }
            None => {
                self.volume.tally.flushes.fetch_add(1, Ordering::Relaxed);
                self.scheduler.park(step.id);
                let (post, id) = (Arc::clone(&self.post), step.id);
                let volume = self.volume.deferred();
                let done = move |outcome: io::Result<()>| {
                    let outcome = match outcome {
                        Ok(()) => Outcome::Done,
                        Err(e) => Outcome::Failed(errno_of(&e), e.to_string()),
                    };
                    let (offset, reserved_bytes) = (0, 0);
                    post.leave(Letter {
                        id,
                        offset,
                        reserved_bytes,
                        outcome,
                    });
                    drop(volume);
                };
                self.volume.flush(Box::new(done));
            }
        }
    }

    fn produce_extents(&mut self, step: &Step) {
        let mut extents = StatusExtents::with_limit(step.len, limits::EXTENTS as usize);
        let relocation = self.relocation.as_ref();
        let outcome =
            self.volume
                .allocation_extents(relocation, step.offset, step.len, &mut extents);
        if let Err(e) = outcome {
            return self.fail(step, errno_of(&e), &e.to_string());
        }
        let extents: Vec<Extent> = extents
            .as_slice()
            .iter()
            .map(|(len, flags)| Extent {
                len: *len,
                zero: flags & allocation::ZERO != 0,
            })
            .collect();
        let span = extents.iter().map(|e| e.len).sum();
        if span == 0 {
            return self.fail(step, Errno::Io, "nothing is known of these extents");
        }
        let list = reply(Kind::ExtentList, step, step.offset, span);
        self.batch.frame(list, message::encode_extents(&extents));
        self.finish(step);
    }

    fn produce_hashes(&mut self, step: &Step, grain: u32, bytes: Bytes) {
        let fresh = message::hashes_of(self.batch.look(&bytes), grain);
        self.batch.give_back(bytes);
        let begun = || (step.offset, Vec::new());
        let (start, hashes) = self.hashes.entry(step.id).or_insert_with(begun);
        hashes.extend(fresh);
        if step.last {
            let span = step.offset + u64::from(step.len) - *start;
            let span = u32::try_from(span).expect("as long as what was asked for");
            let header = reply(Kind::Hashes, step, *start, span);
            self.batch.frame(header, hashes.concat());
        }
        self.finish(step);
    }

    fn fail(&mut self, step: &Step, errno: Errno, text: &str) {
        let header = reply(Kind::Error, step, 0, 0);
        self.batch.frame(header, message::encode_error(errno, text));
        self.scheduler.forget(step.id);
        self.let_go(step.id);
    }

    /// A step is on its way.
    fn finish(&mut self, step: &Step) {
        self.scheduler.done(step);
        let end = step.offset + u64::from(step.len);
        let used_up = match self.ready.get(&step.id) {
            Some(Ready::Bytes { offset, data }) => offset + data.len() as u64 <= end,
            _ => false,
        };
        if step.last {
            self.let_go(step.id);
        } else if used_up {
            self.drop_ready(step.id);
        }
    }

    fn let_go(&mut self, id: u64) {
        self.drop_ready(id);
        self.hashes.remove(&id);
        self.remote.remove(&id);
    }

    fn drop_ready(&mut self, id: u64) {
        if let Some(Ready::Bytes { data, .. }) = self.ready.remove(&id) {
            self.fetched_bytes -= data.len();
        }
    }

    // Reading

    /// The bytes of a step, if they can be had without waiting.
    fn bytes(&mut self, step: &Step) -> Got {
        let len = step.len as usize;
        match self.ready.get(&step.id) {
            Some(Ready::Bytes { offset, data }) => {
                let start = usize::try_from(step.offset - offset).unwrap_or(usize::MAX);
                let range = start..start.saturating_add(len);
                if range.end <= data.len() {
                    return Got::Bytes(Bytes::Fetched(Arc::clone(data), range));
                }
            }
            Some(Ready::Failed(errno, text)) => return Got::Failed(*errno, text.clone()),
            Some(Ready::Done) | None => {}
        }
        let Some(room) = self.batch.room(len) else {
            return Got::Failed(Errno::Io, "there is no room for a quantum".to_owned());
        };
        let relocation = self.relocation.clone();
        let now = self.volume.read_now(relocation.as_ref(), step.offset, room);
        match (now, relocation) {
            (Ok(ReadNow::Done), _) => Got::Bytes(self.batch.keep(len)),
            (Ok(ReadNow::Missing), Some(relocation)) => {
                self.fetch(step, &relocation);
                Got::Parked
            }
            (Ok(ReadNow::WouldBlock), _) => {
                self.read_elsewhere(step);
                Got::Parked
            }
            (Ok(ReadNow::Missing), None) => {
                Got::Failed(Errno::Io, "there is no source to fetch it from".to_owned())
            }
            (Err(e), _) => Got::Failed(errno_of(&e), e.to_string()),
        }
    }

    /// Sets a request aside, and says how much of it to fetch.
    fn park(&mut self, step: &Step) -> usize {
        self.scheduler.park(step.id);
        let left = self.scheduler.left(step.id).min(FETCH_BYTES);
        let all = usize::try_from(left).unwrap_or(0);
        let reserved = if self.fetched_bytes + all > MAX_FETCHED_BYTES {
            step.len as usize
        } else {
            all
        };
        self.fetched_bytes += reserved;
        reserved
    }

    /// All is here, but not in memory: the store's own threads or ring read it.
    fn read_elsewhere(&mut self, step: &Step) {
        let reserved_bytes = self.park(step);
        let (post, id, offset) = (Arc::clone(&self.post), step.id, step.offset);
        let done = move |outcome: io::Result<Vec<u8>>| {
            let outcome = match outcome {
                Ok(data) => Outcome::Bytes(data),
                Err(e) => Outcome::Failed(errno_of(&e), e.to_string()),
            };
            post.leave(Letter {
                id,
                offset,
                reserved_bytes,
                outcome,
            });
        };
        self.volume
            .store()
            .submit_read(step.offset, reserved_bytes, Box::new(done));
    }

    /// Only the volume's own source has it.
    fn fetch(&mut self, step: &Step, relocation: &Arc<Relocation>) {
        if self.remote.insert(step.id) {
            self.volume.count_read(true);
        }
        let reserved_bytes = self.park(step);
        let (post, id, offset) = (Arc::clone(&self.post), step.id, step.offset);
        let done = move |end: ReadEnd<'_>| {
            let outcome = match end {
                ReadEnd::Bytes(bytes) => Outcome::Bytes(bytes.into_owned()),
                ReadEnd::Resident => Outcome::Here,
                ReadEnd::Failed(why) => Outcome::Failed(Errno::Io, read_error(why).to_string()),
            };
            post.leave(Letter {
                id,
                offset,
                reserved_bytes,
                outcome,
            });
        };
        let bytes = ByteRange::at(step.offset, reserved_bytes as u64);
        relocation.read(bytes, Box::new(done));
    }

    /// What was waited for has come.
    fn take_letters(&mut self) {
        for letter in self.post.take() {
            self.fetched_bytes -= letter.reserved_bytes;
            if !self.scheduler.resume(letter.id) {
                continue;
            }
            let ready = match letter.outcome {
                Outcome::Bytes(data) => {
                    self.fetched_bytes += data.len();
                    Ready::Bytes {
                        offset: letter.offset,
                        data: Arc::new(data),
                    }
                }
                Outcome::Failed(errno, text) => Ready::Failed(errno, text),
                Outcome::Done => Ready::Done,
                Outcome::Here => continue,
            };
            self.ready.insert(letter.id, ready);
        }
    }
}

/// What a look at the socket and the post has shown.
struct Seen {
    input: bool,
    room: bool,
    letters: bool,
}

fn reply(kind: Kind, step: &Step, offset: u64, span: u32) -> Header {
    let mut header = Header::request(kind, step.priority, step.id, offset, span);
    header.last = true;
    header
}
