//! What is ready to be sent, and held back until the path has room.
//!
//! Reading and compressing take about as long as the path takes to carry what comes of it. If both began only
//! when there is room, the queue that is to keep the path full would have to be longer by that, and demand waits in
//! that queue. So what nobody waits for is made ready meanwhile, and goes the moment it may; how much it
//! is on the wire is known before anything is promised.
//!
//! What is urgent passes it, with two exceptions: the quanta of one request stay in order, and
//! what was compressed into the connection's stream is a part of that stream, so that nothing else can be
//! before this has gone.

use hikkoshi_wan::transport::Priority;

use super::batch::Batch;

pub(super) struct Held {
    batch: Batch,
    /// The requests that it belongs to.
    ids: Vec<u64>,
    /// By now somebody waits for it.
    urgent: bool,
}

impl Held {
    pub fn new() -> Self {
        Self {
            batch: Batch::new(),
            ids: Vec::new(),
            urgent: false,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    pub fn is_urgent(&self) -> bool {
        self.urgent
    }

    pub fn wire_bytes(&self) -> u64 {
        self.batch.wire_bytes()
    }

    /// Whether something of a request is in it, so that nothing else of that may pass it.
    pub fn has(&self, id: u64) -> bool {
        self.ids.contains(&id)
    }

    /// What is being made ready belongs to this request.
    pub fn belongs_to(&mut self, id: u64) {
        if !self.has(id) {
            self.ids.push(id);
        }
    }

    /// A request has become so urgent.
    pub fn promote(&mut self, id: u64, priority: Priority) {
        self.urgent |= priority.is_waited_for() && self.has(id);
    }

    /// Takes over what was made ready in `batch`, and leaves an empty one.
    pub fn put(&mut self, batch: &mut Batch) {
        debug_assert!(self.is_empty() && self.batch.has_all_room());
        std::mem::swap(batch, &mut self.batch);
        if self.is_empty() {
            self.ids.clear();
        }
    }

    /// Its turn has come: it goes to `batch`, which is empty.
    pub fn release(&mut self, batch: &mut Batch) {
        debug_assert!(batch.is_empty() && batch.has_all_room());
        std::mem::swap(batch, &mut self.batch);
        self.ids.clear();
        self.urgent = false;
    }
}

#[cfg(test)]
mod tests {
    use hikkoshi_wan::transport::frame::{Header, Kind};

    use super::*;

    fn batch(id: u64) -> Batch {
        let mut batch = Batch::new();
        let header = Header::request(Kind::End, Priority::COLD, id, 0, 0);
        batch.frame(header, Vec::new());
        batch
    }

    #[test]
    fn it_is_urgent_once_somebody_waits_for_one_of_its_requests() {
        let mut held = Held::new();
        held.belongs_to(3);
        held.belongs_to(5);
        held.put(&mut batch(3));
        assert!(held.has(3) && held.has(5) && !held.has(4));
        assert_eq!(held.wire_bytes(), batch(3).wire_bytes());
        held.promote(4, Priority::DEMAND);
        held.promote(5, Priority::READ_AHEAD);
        assert!(!held.is_urgent());
        held.promote(5, Priority::REST);
        assert!(held.is_urgent());
        let mut out = Batch::new();
        held.release(&mut out);
        assert!(!out.is_empty() && held.is_empty());
        assert!(!held.is_urgent() && !held.has(3));
    }

    #[test]
    fn what_came_to_nothing_holds_no_request_back() {
        let mut held = Held::new();
        held.belongs_to(3);
        held.put(&mut Batch::new());
        assert!(held.is_empty() && !held.has(3));
    }
}
