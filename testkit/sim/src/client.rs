//! What clients ask, served as the NBD front end serves it: what is resident at once, the rest
//! when it has come, FUA by a commit.

use std::io;
use std::sync::Arc;

use hikkoshi_daemon::volume::Volume;
use hikkoshi_daemon::volume::guest::{ReadNow, read_error};
use hikkoshi_daemon::volume::relocation::{ReadEnd, Relocation};
use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_store::ZeroMode;

use crate::sim::{News, Sim};

/// What is asked.
#[derive(Clone, Debug)]
pub enum Ask {
    /// Bytes.
    Read(ByteRange),
    /// To write, with or without FUA.
    Write(u64, Vec<u8>, bool),
    /// To make zero.
    Zero(ByteRange, ZeroMode, bool),
    /// To give up.
    Trim(ByteRange, bool),
    /// To make durable.
    Flush,
    /// To fetch.
    Cache(ByteRange),
}

/// An answer. Of an error only its number counts, if it has one.
#[derive(Debug)]
pub enum Answer {
    /// What was read.
    Data(Vec<u8>),
    /// It was done.
    Done,
    /// It was not.
    Failed(Option<i32>),
}

impl From<io::Result<()>> for Answer {
    fn from(outcome: io::Result<()>) -> Self {
        match outcome {
            Ok(()) => Self::Done,
            Err(e) => Self::Failed(e.raw_os_error()),
        }
    }
}

/// A request under way, which tells the world once.
struct Call {
    id: u64,
    volume: Arc<Volume>,
    sim: Arc<Sim>,
}

/// Serves a request on the fiber that calls. The answer may come later, from elsewhere.
pub fn serve(
    id: u64,
    ask: Ask,
    volume: Arc<Volume>,
    relocation: Option<&Arc<Relocation>>,
    sim: Arc<Sim>,
) {
    let call = Call { id, volume, sim };
    match ask {
        Ask::Read(bytes) => call.read(relocation, bytes),
        Ask::Write(offset, data, fua) => {
            let outcome = call.write(relocation, offset, &data);
            call.finish(outcome, fua);
        }
        Ask::Zero(bytes, mode, fua) => {
            let mut outcome = call.volume.zero(relocation, bytes.start, bytes.len(), mode);
            if mode == ZeroMode::FastOnly
                && matches!(&outcome, Err(e) if e.kind() == io::ErrorKind::Unsupported)
            {
                outcome =
                    call.volume
                        .zero(relocation, bytes.start, bytes.len(), ZeroMode::MayPunch);
            }
            call.finish(outcome, fua);
        }
        Ask::Trim(bytes, fua) => {
            let outcome = call.volume.trim(relocation, bytes.start, bytes.len());
            call.finish(outcome, fua);
        }
        Ask::Flush => call.make_durable(),
        Ask::Cache(bytes) => call.cache(relocation, bytes),
    }
}

impl Call {
    fn answer(self, answer: Answer) {
        self.sim.tell(News::Answered(self.id, answer));
    }

    fn read(self, relocation: Option<&Arc<Relocation>>, bytes: ByteRange) {
        let mut data = vec![0; usize::try_from(bytes.len()).unwrap_or(0)];
        match self.volume.read_now(relocation, bytes.start, &mut data) {
            Ok(ReadNow::Done) => self.answer(Answer::Data(data)),
            Ok(ReadNow::WouldBlock) => self.read_elsewhere(bytes),
            Ok(ReadNow::Missing) => {
                let Some(relocation) = relocation else {
                    self.sim.fail("a volume without a source misses blocks");
                    return;
                };
                let done = move |end: ReadEnd<'_>| match end {
                    ReadEnd::Bytes(bytes) => self.answer(Answer::Data(bytes.into_owned())),
                    ReadEnd::Failed(why) => self.answer(Err(read_error(why)).into()),
                    ReadEnd::Resident => {
                        let mut data = vec![0; usize::try_from(bytes.len()).unwrap_or(0)];
                        match self.volume.store().try_read(bytes.start, &mut data) {
                            Ok(true) => self.answer(Answer::Data(data)),
                            Ok(false) => self.read_elsewhere(bytes),
                            Err(e) => self.answer(Err(e).into()),
                        }
                    }
                };
                relocation.read(bytes, Box::new(done));
            }
            Err(e) => self.answer(Err(e).into()),
        }
    }

    fn read_elsewhere(self, bytes: ByteRange) {
        let store = Arc::clone(self.volume.store());
        let len = usize::try_from(bytes.len()).unwrap_or(0);
        let done = move |outcome: io::Result<Vec<u8>>| match outcome {
            Ok(data) => self.answer(Answer::Data(data)),
            Err(e) => self.answer(Err(e).into()),
        };
        store.submit_read(bytes.start, len, Box::new(done));
    }

    /// A long payload comes in pieces, which end on blocks or pages.
    fn write(
        &self,
        relocation: Option<&Arc<Relocation>>,
        offset: u64,
        data: &[u8],
    ) -> io::Result<()> {
        let grain = self.volume.geometry().block_bytes().min(4096);
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let mut piece = rest.len();
            if self.sim.below(6) == 0 {
                let reached = at + self.sim.below(rest.len() as u64);
                let cut = (reached / grain * grain).saturating_sub(at);
                if cut > 0 {
                    piece = usize::try_from(cut).unwrap_or(piece);
                }
            }
            let (front, back) = rest.split_at(piece);
            self.volume.write(relocation, at, front)?;
            at += front.len() as u64;
            rest = back;
        }
        Ok(())
    }

    fn finish(self, outcome: io::Result<()>, fua: bool) {
        match outcome {
            Ok(()) if fua => self.make_durable(),
            outcome => self.answer(outcome.into()),
        }
    }

    fn make_durable(self) {
        if let Some(outcome) = self.volume.flush_inline() {
            return self.answer(outcome.into());
        }
        let volume = Arc::clone(&self.volume);
        volume.flush(Box::new(move |outcome| self.answer(outcome.into())));
    }

    fn cache(self, relocation: Option<&Arc<Relocation>>, bytes: ByteRange) {
        let Some(relocation) = relocation.filter(|r| r.is_arriving()) else {
            return self.answer(Answer::Done);
        };
        let blocks = self.volume.geometry().covering(bytes);
        if relocation.residency.all_resident(blocks) {
            return self.answer(Answer::Done);
        }
        let done = move |end: ReadEnd<'_>| match end {
            ReadEnd::Failed(why) => self.answer(Err(read_error(why)).into()),
            ReadEnd::Resident | ReadEnd::Bytes(_) => self.answer(Answer::Done),
        };
        relocation.read(bytes, Box::new(done));
    }
}
