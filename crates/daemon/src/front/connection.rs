//! One client in transmission: the loop that serves it.
//!
//! All requests that one receive brought are served before one send answers them. What is resident
//! and cached is answered in this loop, read straight to its place behind the reply's header; what
//! must wait gets a [`Ticket`] and is answered from elsewhere, out of order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_engine::readahead::Detector;
use hikkoshi_nbd::server::reply::{self, Last};
use hikkoshi_nbd::server::{Command, ReplyStyle, Request, Rules, Session, StatusExtents, Verdict};
use hikkoshi_nbd::wire::{self, Errno};
use hikkoshi_store::ZeroMode;
use socket2::Socket;

use super::inbox::Inbox;
use super::outbox::{Outbox, Ticket, errno_of};
use crate::volume::Volume;
use crate::volume::guest::{ReadNow, is_not_let_in, read_error};
use crate::volume::relocation::{ReadEnd, Relocation};
use crate::volume::storage::succession::{Deferred, Presence};

/// Replies are gathered up to this before they are sent; also the most a read in one piece has.
/// Larger reads go in pieces of this, which stay in the processor's cache between the copy in and
/// the copy out.
const OUT_BYTES: usize = 256 << 10;

/// Reads that are longer than this go straight from the page cache to the socket. Below it, the
/// system call more costs what the copy less saves.
const LONG_READ_BYTES: usize = 64 << 10;

/// Room behind [`OUT_BYTES`] for a header or an error.
const OUT_SLACK_BYTES: usize = 1024;

/// How long a client that disconnects politely is still served what it asked for.
const SETTLE: Duration = Duration::from_secs(30);

/// A CACHE request fetches at most this much; the rest is left to the background copy.
const MAX_CACHE_BYTES: u64 = 32 << 20;

/// Extents of one answer to BLOCK_STATUS. The client asks again for what is beyond.
const MAX_EXTENTS: usize = 4096;

/// Numbers for the streams of all connections: so many for each, more than one can read.
const STREAM_IDS: u64 = 1 << 40;
static NEXT_STREAM_ID: AtomicU64 = AtomicU64::new(0);

pub(super) struct Connection {
    place: Place,
    /// Recognises what is read sequentially. Asked only while there is a relocation.
    detector: Detector,
    session: Session,
    style: ReplyStyle,
    rules: Rules,
    inbox: Inbox,
    out: Vec<u8>,
    out_len: usize,
    outbox: Arc<Outbox>,
    /// Counted here and added to the volume's once a batch.
    reads: u64,
    writes: u64,
}

/// Where the disk is.
struct Place {
    volume: Arc<Volume>,
    /// Let go of as soon as the volume is local.
    relocation: Option<Arc<Relocation>>,
    presence: Arc<Presence>,
}

impl Place {
    /// With its client, who is about to ask for something.
    fn new(volume: Arc<Volume>) -> Self {
        let presence = Arc::new(Presence::default());
        volume.note_losses(&presence);
        presence.begin();
        volume.enter(&presence);
        Self {
            relocation: volume.relocation(),
            volume,
            presence,
        }
    }

    /// Goes over to where the disk is now, if it has changed its storage. Looked at when a request
    /// begins: one that began before may end at the old image, which has all that was answered until
    /// then.
    #[inline]
    fn follow(&mut self) {
        while let Some(next) = self.volume.successor() {
            let next = Arc::clone(next);
            self.volume.tally.clients.fetch_sub(1, Ordering::Relaxed);
            next.tally.clients.fetch_add(1, Ordering::Relaxed);
            self.volume.hand_losses_on(&next, &self.presence);
            next.enter(&self.presence);
            self.volume.leave(&self.presence);
            self.relocation = next.relocation();
            self.volume = next;
        }
    }

    /// Makes a change where the disk is. One that is not let in because the disk is just changing its
    /// storage has not happened, and is made again when that is settled.
    fn change(
        &mut self,
        make: impl Fn(&Volume, Option<&Arc<Relocation>>) -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            let outcome = make(&self.volume, self.relocation.as_ref());
            match &outcome {
                Err(e) if is_not_let_in(e) && self.volume.awaits_switch() => self.follow(),
                _ => return outcome,
            }
        }
    }
}

/// Why a connection ends.
enum End {
    /// The client said so.
    Disconnect,
    /// The stream cannot be followed any more, or is broken.
    Broken,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Broken
    }
}

impl Connection {
    pub fn new(
        volume: Arc<Volume>,
        session: Session,
        socket: Socket,
        early: &[u8],
        outbox: Arc<Outbox>,
    ) -> Self {
        Self {
            detector: Detector::new(NEXT_STREAM_ID.fetch_add(STREAM_IDS, Ordering::Relaxed)),
            place: Place::new(volume),
            style: outbox.style(),
            rules: Rules::new(&session),
            session,
            inbox: Inbox::new(socket, early),
            out: vec![0; OUT_BYTES + OUT_SLACK_BYTES],
            out_len: 0,
            outbox,
            reads: 0,
            writes: 0,
        }
    }

    /// Serves until the client or the daemon ends it.
    pub fn run(mut self) {
        self.place
            .volume
            .tally
            .clients
            .fetch_add(1, Ordering::Relaxed);
        if let Err(End::Disconnect) = self.serve() {
            let _ = self.flush_out();
            self.outbox.settle(SETTLE);
        }
        self.publish_counts();
        self.place
            .volume
            .tally
            .clients
            .fetch_sub(1, Ordering::Relaxed);
        self.outbox.close();
    }

    fn serve(&mut self) -> Result<(), End> {
        loop {
            while let Some(header) = self.inbox.take_header() {
                let request = Request::parse(&header).map_err(|_| End::Broken)?;
                self.handle(&request)?;
            }
            self.flush_out()?;
            self.publish_counts();
            self.place.presence.end();
            let more = self.inbox.receive();
            self.place.presence.begin();
            if !more? {
                // The daemon hangs up like this as well: what is in flight is still answered.
                return Err(End::Disconnect);
            }
            if self.place.relocation.is_some() && self.place.volume.is_plain() {
                self.place.relocation = None;
            }
        }
    }

    fn handle(&mut self, request: &Request) -> Result<(), End> {
        let cookie = request.cookie;
        match self.rules.check(request) {
            Verdict::Run(command) => self.run_command(cookie, command),
            Verdict::Done => self.answer(cookie, Ok(())),
            Verdict::Refuse {
                errno,
                payload_bytes,
            } => {
                self.inbox.skip(payload_bytes as usize)?;
                self.answer_error(cookie, errno, "the request was refused")
            }
            Verdict::Close => Err(End::Broken),
        }
    }

    fn run_command(&mut self, cookie: u64, command: Command) -> Result<(), End> {
        self.place.follow();
        match command {
            Command::Read { offset, len, .. } => {
                self.place.volume.heat().read(offset, len.into());
                self.read(cookie, offset, len)
            }
            Command::Write { offset, len, fua } => {
                self.place.volume.heat().written(offset, len.into());
                self.write(cookie, offset, len as usize, fua)
            }
            Command::Flush => self.make_durable(cookie),
            Command::Trim { offset, len, fua } => {
                self.place.volume.heat().written(offset, len.into());
                let done = self
                    .place
                    .change(|volume, relocation| volume.trim(relocation, offset, len.into()));
                self.finish_zero(cookie, done, fua)
            }
            Command::WriteZeroes {
                offset,
                len,
                fua,
                no_hole,
                fast,
            } => {
                self.place.volume.heat().written(offset, len.into());
                let mode = match (no_hole, fast) {
                    (_, true) => ZeroMode::FastOnly,
                    (true, false) => ZeroMode::Allocate,
                    (false, false) => ZeroMode::MayPunch,
                };
                let done = self
                    .place
                    .change(|volume, relocation| volume.zero(relocation, offset, len.into(), mode));
                self.finish_zero(cookie, done, fua)
            }
            Command::Cache { offset, len } => self.cache(cookie, offset, len.into()),
            Command::BlockStatus { offset, len, one } => self.status(cookie, offset, len, one),
            Command::Disconnect => Err(End::Disconnect),
        }
    }

    // Reading

    fn read(&mut self, cookie: u64, offset: u64, len: u32) -> Result<(), End> {
        let wanted = len as usize;
        if wanted > LONG_READ_BYTES {
            return self.read_long(cookie, offset, len);
        }
        let header = self.style.read_header_bytes();
        self.make_room(header + wanted)?;
        let at = self.out_len + header;
        let buf = &mut self.out[at..at + wanted];
        match self
            .place
            .volume
            .read_now(self.place.relocation.as_ref(), offset, buf)
        {
            Ok(ReadNow::Done) => {
                self.style
                    .put_read_header(&mut self.out[self.out_len..], cookie, offset, len);
                self.out_len = at + wanted;
                self.reads += 1;
                self.watch(offset, len, false);
                Ok(())
            }
            Ok(ReadNow::WouldBlock) => {
                self.reads += 1;
                self.watch(offset, len, false);
                let ticket = self.ticket(cookie, wanted)?;
                read_elsewhere(self.place.volume.deferred(), ticket, offset, wanted);
                Ok(())
            }
            Ok(ReadNow::Missing) => self.read_missing(cookie, offset, len),
            Err(e) => self.answer(cookie, Err(e)),
        }
    }

    /// Tells the relocation when a sequential stream has got on. Reads of what is here already
    /// reach nobody else, and yet the rest of the stream is to be here in time.
    #[inline]
    fn watch(&mut self, offset: u64, len: u32, missing: bool) {
        if let Some(relocation) = &self.place.relocation
            && !self.place.volume.is_local()
            && let Some(told) = self.detector.note(offset, len, missing)
        {
            relocation.read_ahead(told);
        }
    }

    fn read_missing(&mut self, cookie: u64, offset: u64, wanted: u32) -> Result<(), End> {
        let len = wanted as usize;
        let ticket = self.ticket(cookie, len)?;
        let Some(relocation) = &self.place.relocation else {
            return Ok(());
        };
        self.place.volume.count_read(true);
        relocation.trace_missing(ByteRange::at(offset, len as u64));
        let volume = self.place.volume.deferred();
        let done = move |end: ReadEnd<'_>| match end {
            ReadEnd::Bytes(bytes) => ticket.data(offset, bytes.into_owned()),
            ReadEnd::Failed(why) => ticket.fail(Errno::Io, &read_error(why).to_string()),
            ReadEnd::Resident => {
                let mut data = vec![0; len];
                match volume.store().try_read(offset, &mut data) {
                    Ok(true) => ticket.data(offset, data),
                    Ok(false) => read_elsewhere(volume, ticket, offset, len),
                    Err(e) => {
                        volume.note_disk_error("read", &e);
                        ticket.outcome(Err(e));
                    }
                }
            }
        };
        relocation.read(ByteRange::at(offset, len as u64), Box::new(done));
        self.watch(offset, wanted, true);
        Ok(())
    }

    /// A long read: in pieces, in order, if all is here.
    fn read_long(&mut self, cookie: u64, offset: u64, len: u32) -> Result<(), End> {
        let bytes = ByteRange::at(offset, len.into());
        let relocation = self.place.relocation.as_ref();
        let here = relocation.is_none_or(|r| r.residency.holds(bytes));
        if !here {
            return self.read_missing(cookie, offset, len);
        }
        self.reads += 1;
        self.watch(offset, len, false);
        self.flush_out()?;
        match self.style {
            ReplyStyle::Simple => {
                self.style
                    .put_read_header(&mut self.out, cookie, offset, len);
                self.out_len = self.style.read_header_bytes();
            }
            ReplyStyle::Structured => {
                let header = reply::data_header(cookie, offset, len, Last::No);
                self.out[..header.len()].copy_from_slice(&header);
                self.out_len = header.len();
            }
        }
        let failure = self.send_pieces(bytes)?;
        if let Some(error) = &failure {
            self.place.volume.note_disk_error("read", error);
        }
        match (self.style, failure) {
            (ReplyStyle::Simple, None) => Ok(()),
            // The header promised data; there is no way left to say that there is none.
            (ReplyStyle::Simple, Some(_)) => Err(End::Broken),
            (ReplyStyle::Structured, None) => {
                let done = reply::done_chunk(cookie);
                self.append(&done)
            }
            (ReplyStyle::Structured, Some(e)) => self.answer(cookie, Err(e)),
        }
    }

    /// Sends all of `bytes`. After an error the rest is padded, so that the chunk keeps its length.
    fn send_pieces(&mut self, bytes: ByteRange) -> Result<Option<io::Error>, End> {
        let mut failure = None;
        let mut at = bytes.start;
        let outbox = Arc::clone(&self.outbox);
        // Held over all pieces: a deferred reply between two of them would be taken for data.
        let mut sending = outbox.begin()?;
        sending.send(&self.out[..std::mem::take(&mut self.out_len)])?;
        // Straight from the page cache to the socket, where that can be: half of a long read's
        // cost is copying it once more than needed.
        while at < bytes.end && failure.is_none() {
            match sending.send_from(&**self.place.volume.store(), at, bytes.end - at) {
                Ok(sent) => at += sent,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::Unsupported => break,
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Err(e.into()),
                Err(e) => failure = Some(e),
            }
        }
        while at < bytes.end {
            let room = OUT_BYTES.min(self.out.len() - self.out_len);
            let len = room.min(usize::try_from(bytes.end - at).unwrap_or(room));
            let buf = &mut self.out[self.out_len..self.out_len + len];
            if failure.is_none() {
                let store = self.place.volume.store();
                let outcome = match store.try_read(at, buf) {
                    Ok(true) => Ok(()),
                    Ok(false) => store.read(at, buf),
                    Err(e) => Err(e),
                };
                failure = outcome.err();
            }
            if failure.is_some() {
                buf.fill(0);
            }
            self.out_len += len;
            at += len as u64;
            sending.send(&self.out[..self.out_len])?;
            self.out_len = 0;
        }
        Ok(failure)
    }

    fn cache(&mut self, cookie: u64, offset: u64, len: u64) -> Result<(), End> {
        let Some(relocation) = self.place.relocation.clone().filter(|r| r.is_arriving()) else {
            return self.answer(cookie, Ok(()));
        };
        let bytes = ByteRange::at(offset, len.min(MAX_CACHE_BYTES));
        if relocation
            .residency
            .all_resident(self.place.volume.geometry().covering(bytes))
        {
            return self.answer(cookie, Ok(()));
        }
        let ticket = self.ticket(cookie, 0)?;
        let done = move |end: ReadEnd<'_>| match end {
            ReadEnd::Failed(why) => ticket.fail(Errno::Io, &read_error(why).to_string()),
            ReadEnd::Resident | ReadEnd::Bytes(_) => ticket.done(),
        };
        relocation.read(bytes, Box::new(done));
        Ok(())
    }

    // Writing

    /// Takes the payload as it comes, in pieces that end on blocks where it is longer than the
    /// buffer, so that the whole of it never has to be in memory.
    fn write(&mut self, cookie: u64, offset: u64, len: usize, fua: bool) -> Result<(), End> {
        self.writes += 1;
        let block = self.place.volume.geometry().block_bytes();
        let (mut at, mut left, mut outcome) = (offset, len, Ok(()));
        if len > self.inbox.buffered() && self.out_len > 0 {
            // The client may be waiting for these answers before it sends on.
            self.flush_out()?;
        }
        while left > 0 {
            let piece = self.inbox.fill(left)?;
            let mut usable = piece.len();
            if usable < left {
                usable = cut_at_block(at, usable, block);
            }
            if outcome.is_ok() {
                let piece = &piece[..usable];
                outcome = self
                    .place
                    .change(|volume, relocation| volume.write(relocation, at, piece));
            }
            self.inbox.consume(usable);
            at += usable as u64;
            left -= usable;
        }
        match outcome {
            Ok(()) if fua => self.make_durable(cookie),
            outcome => self.answer(cookie, outcome),
        }
    }

    fn finish_zero(&mut self, cookie: u64, done: io::Result<()>, fua: bool) -> Result<(), End> {
        self.place
            .volume
            .tally
            .zeroes
            .fetch_add(1, Ordering::Relaxed);
        match done {
            Ok(()) if fua => self.make_durable(cookie),
            done => self.answer(cookie, done),
        }
    }

    fn make_durable(&mut self, cookie: u64) -> Result<(), End> {
        self.place
            .volume
            .tally
            .flushes
            .fetch_add(1, Ordering::Relaxed);
        // What it wrote at the source may be lost: then no flush covers it.
        let losses = self.place.presence.losses();
        if let Err(lost) = self.place.volume.check_source_losses(losses) {
            return self.answer(cookie, Err(lost));
        }
        if let Some(outcome) = self.place.volume.flush_inline() {
            return self.answer(cookie, outcome);
        }
        let ticket = self.ticket(cookie, 0)?;
        let volume = self.place.volume.deferred();
        self.place.volume.flush(Box::new(move |outcome| {
            // The source may have been asked again after it was started anew.
            ticket.outcome(outcome.and_then(|()| volume.check_source_losses(losses)));
            drop(volume);
        }));
        Ok(())
    }

    // Extents

    fn status(&mut self, cookie: u64, offset: u64, len: u32, one: bool) -> Result<(), End> {
        let mut reply = Vec::new();
        let contexts = self.session.contexts.clone();
        for (n, context) in contexts.iter().enumerate() {
            let mut extents = StatusExtents::with_limit(len, if one { 1 } else { MAX_EXTENTS });
            let relocation = self.place.relocation.as_ref();
            let outcome = if context.name == wire::RESIDENCY {
                self.place
                    .volume
                    .residency_extents(relocation, offset, len, &mut extents);
                Ok(())
            } else {
                self.place
                    .volume
                    .allocation_extents(relocation, offset, len, &mut extents)
            };
            if let Err(e) = outcome {
                return self.answer(cookie, Err(e));
            }
            let last = if n + 1 == contexts.len() {
                Last::Yes
            } else {
                Last::No
            };
            reply::push_block_status(&mut reply, cookie, context.id, extents.as_slice(), last);
        }
        self.append(&reply)
    }

    // Answering

    fn ticket(&mut self, cookie: u64, reply_bytes: usize) -> Result<Ticket, End> {
        // Waiting for a place while answers sit here could be waiting for oneself.
        self.flush_out()?;
        Ok(self.outbox.admit(cookie, reply_bytes))
    }

    fn answer(&mut self, cookie: u64, outcome: io::Result<()>) -> Result<(), End> {
        match outcome {
            Ok(()) => {
                let mut reply = Vec::with_capacity(reply::DATA_HEADER_BYTES);
                self.style.push_done(&mut reply, cookie);
                self.append(&reply)
            }
            Err(e) => self.answer_error(cookie, errno_of(&e), &e.to_string()),
        }
    }

    fn answer_error(&mut self, cookie: u64, errno: Errno, message: &str) -> Result<(), End> {
        let mut reply = Vec::new();
        self.style.push_error(&mut reply, cookie, errno, message);
        self.append(&reply)
    }

    fn append(&mut self, reply: &[u8]) -> Result<(), End> {
        if reply.len() > self.out.len() {
            self.flush_out()?;
            return Ok(self.outbox.send(reply)?);
        }
        self.make_room(reply.len())?;
        self.out[self.out_len..self.out_len + reply.len()].copy_from_slice(reply);
        self.out_len += reply.len();
        Ok(())
    }

    fn make_room(&mut self, len: usize) -> Result<(), End> {
        if self.out_len + len > self.out.len() {
            self.flush_out()?;
        }
        Ok(())
    }

    fn flush_out(&mut self) -> Result<(), End> {
        if self.out_len > 0 {
            self.outbox
                .send(&self.out[..std::mem::take(&mut self.out_len)])?;
        }
        Ok(())
    }

    fn publish_counts(&mut self) {
        let tally = &self.place.volume.tally;
        tally
            .reads_local
            .fetch_add(std::mem::take(&mut self.reads), Ordering::Relaxed);
        tally
            .writes
            .fetch_add(std::mem::take(&mut self.writes), Ordering::Relaxed);
    }
}

/// How much of a piece to write now: up to the last block that it reaches, or, where blocks are
/// longer than pieces, the last page, so that no sector is ever written in halves.
fn cut_at_block(at: u64, len: usize, block: u64) -> usize {
    let reached = at + len as u64;
    [block, 4096]
        .into_iter()
        .map(|grain| usize::try_from((reached / grain * grain).saturating_sub(at)).unwrap_or(0))
        .find(|cut| *cut > 0)
        .unwrap_or(len)
}

/// All is here, but not in memory: the store's own threads or ring read it.
fn read_elsewhere(volume: Deferred, ticket: Ticket, offset: u64, len: usize) {
    let store = Arc::clone(volume.store());
    let done = move |outcome: io::Result<Vec<u8>>| match outcome {
        Ok(data) => ticket.data(offset, data),
        Err(e) => {
            volume.note_disk_error("read", &e);
            ticket.outcome(Err(e));
        }
    };
    store.submit_read(offset, len, Box::new(done));
}
