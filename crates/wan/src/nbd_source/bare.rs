//! A connection without keeper and herald, for whoever brings a wire of their own.
//!
//! Owns nothing but one [`Line`]: requests are queued, sent and matched with their answers exactly
//! as on a socket. Its owner runs [`BareConnection::serve`], and answers what comes back undone,
//! as keeper and herald do for the connections of a real source.

use std::sync::Arc;

use hikkoshi_nbd::client::Negotiated;

use super::address::NbdSourceConfig;
use super::job::Job;
use super::line::Line;
use super::reader;
use super::replies::Alone;
use super::shared::info_of;
use super::wire::Wire;
use crate::source::{Completion, ExtentsAnswer, Fetched, Lane, SourceError, SourceInfo};

/// A request that a connection did not answer. To be failed by its owner, on a stack of its own.
pub struct Undone(Job);

impl Undone {
    /// Answers it with an error.
    pub fn fail(self, error: SourceError) {
        self.0.fail(error);
    }
}

/// One connection to a server.
pub struct BareConnection {
    line: Arc<Line>,
    info: SourceInfo,
}

impl BareConnection {
    /// A connection on which transmission can begin.
    pub fn new(wire: Arc<dyn Wire>, negotiated: Negotiated, config: &NbdSourceConfig) -> Self {
        let info = info_of(&config.shown_uri(), &negotiated);
        Self {
            line: Line::new(wire, negotiated, config),
            info,
        }
    }

    /// What the server said of its disk.
    pub fn info(&self) -> &SourceInfo {
        &self.info
    }

    /// Whether it takes requests.
    pub fn is_alive(&self) -> bool {
        self.line.is_alive()
    }

    /// Reads `len` bytes (above zero, inside the disk) at `offset`. Gives back what could not be
    /// sent or queued.
    pub fn read(
        &self,
        lane: Lane,
        offset: u64,
        len: u32,
        done: Completion<Fetched>,
    ) -> Vec<Undone> {
        let info = &self.info;
        let limits = (info.min_block_bytes, info.max_read_bytes, info.size_bytes);
        Job::reads(lane, offset, len, limits, done)
            .into_iter()
            .filter_map(|job| self.line.submit(job).err().map(Undone))
            .collect()
    }

    /// Asks for extents of `len` bytes (above zero, inside the disk) from `offset` on.
    pub fn extents(
        &self,
        lane: Lane,
        offset: u64,
        len: u64,
        done: Completion<ExtentsAnswer>,
    ) -> Vec<Undone> {
        let limits = (self.info.min_block_bytes, self.info.size_bytes);
        let job = Job::status(lane, offset, len, limits, done);
        self.line
            .submit(job)
            .err()
            .map(Undone)
            .into_iter()
            .collect()
    }

    /// Asks it to make durable what was written.
    pub fn flush(&self, done: Completion<()>) -> Vec<Undone> {
        let job = Job::flush(done);
        let undone = self.line.submit(job).err().map(Undone);
        undone.into_iter().collect()
    }

    /// Reads of `lane` within this range are wanted no more. Gives back what was not sent yet.
    pub fn cancel(&self, lane: Lane, offset: u64, len: u64) -> Vec<Undone> {
        let unsent = self.line.cancel(lane, offset, len);
        unsent.into_iter().map(Undone).collect()
    }

    /// Receives and answers until the connection ends; then says why it did, and what is left.
    pub fn serve(&self) -> (SourceError, Vec<Undone>) {
        let (error, mut jobs) = match reader::read(&self.line, &Alone::default(), None) {
            Ok(ended) => {
                let error = SourceError::new(ended.why.kind(), ended.why.to_string());
                (error, ended.unfinished)
            }
            Err(broken) => {
                let kind = crate::source::SourceErrorKind::Disconnected;
                (SourceError::new(kind, broken.to_string()), Vec::new())
            }
        };
        jobs.extend(self.line.bury());
        (error, jobs.into_iter().map(Undone).collect())
    }

    /// Says goodbye and hangs up.
    pub fn disconnect(&self) {
        self.line.disconnect();
    }
}
