//! What the tests of sources share: waiting for answers, and the conformance suite that every
//! implementation of `Source` must pass.
#![allow(dead_code, clippy::unwrap_used)]

pub mod fake;
pub mod servers;

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_wan::{
    ExtentsAnswer, Fetched, Lane, Source, SourceError, SourceErrorKind, SourceWatcher,
};

/// No test depends on how long something takes; this only ends one that hangs.
pub const HANG: Duration = Duration::from_secs(60);

pub type Answer<T> = Receiver<Result<T, SourceError>>;

pub fn submit_read(source: &dyn Source, lane: Lane, offset: u64, len: u32) -> Answer<Fetched> {
    let (sender, receiver) = channel();
    source.read(
        lane,
        offset,
        len,
        Box::new(move |r| sender.send(r).unwrap()),
    );
    receiver
}

pub fn submit_extents(source: &dyn Source, offset: u64, len: u64) -> Answer<ExtentsAnswer> {
    let (sender, receiver) = channel();
    source.extents(
        Lane::Bulk,
        offset,
        len,
        Box::new(move |r| sender.send(r).unwrap()),
    );
    receiver
}

/// The outcome of a request, after which there must be no second one.
pub fn outcome<T>(answer: &Answer<T>) -> Result<T, SourceError> {
    let outcome = answer.recv_timeout(HANG).expect("an answer in time");
    // The completion is gone with its one call, and with it the sending side.
    assert!(matches!(
        answer.recv_timeout(HANG),
        Err(RecvTimeoutError::Disconnected)
    ));
    outcome
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < HANG, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Bytes that tell every position apart, with runs of zeroes of 256 KiB in between.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut data = Vec::with_capacity(len);
    while data.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let hole = (data.len() >> 18) % 3 == 1;
        let word = if hole { [0; 8] } else { state.to_le_bytes() };
        data.extend_from_slice(&word[..word.len().min(len - data.len())]);
    }
    data
}

/// Records what the watcher is told.
pub struct Recorder(Mutex<Sender<Option<SourceErrorKind>>>);

impl Recorder {
    /// `None` is up, `Some` is down.
    pub fn watch(source: &dyn Source) -> Receiver<Option<SourceErrorKind>> {
        let (sender, receiver) = channel();
        source.watch(Arc::new(Self(Mutex::new(sender))));
        receiver
    }
}

impl SourceWatcher for Recorder {
    fn source_up(&self) {
        let _ = self.0.lock().unwrap().send(None);
    }
    fn source_down(&self, error: &SourceError) {
        let _ = self.0.lock().unwrap().send(Some(error.kind));
    }
}

/// What every `Source` keeps to, tried on one whose disk is `expected`. `pump` lets a source
/// without threads answer.
pub fn conforms(source: &dyn Source, expected: &[u8], pump: &dyn Fn()) {
    let size = u64::try_from(expected.len()).unwrap();
    assert_eq!(source.info().size_bytes, size);
    assert!(source.is_connected() && source.connections() >= 1);
    reads_of_any_alignment(source, expected, pump);
    many_at_once(source, expected, pump);
    extents_are_true(source, expected, pump);
    outside_is_refused(source, size, pump);
    a_flush_is_done(source, pump);
    source.close();
    let late = submit_read(source, Lane::Demand, 0, 512);
    pump();
    assert_eq!(
        outcome(&late).unwrap_err().kind,
        SourceErrorKind::Disconnected
    );
    assert!(!source.is_connected());
    source.close();
}

fn check(fetched: &Fetched, offset: u64, len: usize, expected: &[u8]) {
    let start = usize::try_from(offset).unwrap();
    assert_eq!(fetched.offset, offset);
    assert!(
        fetched.data == expected[start..start + len],
        "{len} bytes at {offset} differ"
    );
    let mut at = offset;
    for &(hole, hole_len) in &fetched.holes {
        assert!(hole >= at && hole_len > 0, "holes in order");
        at = hole + hole_len;
        let run = usize::try_from(hole).unwrap()..usize::try_from(at).unwrap();
        assert!(
            expected[run].iter().all(|&byte| byte == 0),
            "a hole has data"
        );
    }
    assert!(at <= offset + u64::try_from(len).unwrap());
}

fn reads_of_any_alignment(source: &dyn Source, expected: &[u8], pump: &dyn Fn()) {
    let size = expected.len();
    let sizes = [1, 511, 512, 4096, 5000, 65536, 300_000, size / 2];
    for (step, len) in sizes.into_iter().enumerate() {
        for start in [0, 1, 511, 4096, 262_143 + step, size - len] {
            let offset = u64::try_from(start.min(size - len)).unwrap();
            let answer = submit_read(source, Lane::Demand, offset, u32::try_from(len).unwrap());
            pump();
            let fetched = outcome(&answer).unwrap();
            check(&fetched, offset, len, expected);
            assert!(fetched.wire_bytes > 0);
        }
    }
    let nothing = submit_read(source, Lane::Bulk, 7, 0);
    pump();
    assert!(outcome(&nothing).unwrap().data.is_empty());
}

fn many_at_once(source: &dyn Source, expected: &[u8], pump: &dyn Fn()) {
    let len = 16 << 10;
    let answers: Vec<_> = (0..expected.len() / len)
        .map(|index| {
            let offset = u64::try_from(index * len).unwrap();
            let lane = if index % 3 == 0 {
                Lane::Demand
            } else {
                Lane::Bulk
            };
            (
                offset,
                submit_read(source, lane, offset, u32::try_from(len).unwrap()),
            )
        })
        .collect();
    pump();
    for (offset, answer) in answers {
        check(&outcome(&answer).unwrap(), offset, len, expected);
    }
}

fn extents_are_true(source: &dyn Source, expected: &[u8], pump: &dyn Fn()) {
    let size = u64::try_from(expected.len()).unwrap();
    for start in [0, 512, 4096 + 17, size - 1] {
        let mut at = start;
        while at < size {
            let answer = submit_extents(source, at, size - at);
            pump();
            let answer = outcome(&answer).unwrap();
            assert!(!answer.extents.is_empty());
            for extent in answer.extents {
                assert_eq!(extent.offset, at, "gapless");
                assert!(extent.len > 0 && extent.offset + extent.len <= size);
                at += extent.len;
                let run = usize::try_from(extent.offset).unwrap()..usize::try_from(at).unwrap();
                assert!(!extent.zero || expected[run].iter().all(|&byte| byte == 0));
            }
        }
    }
}

/// Where it cannot be asked, nothing more can be done.
fn a_flush_is_done(source: &dyn Source, pump: &dyn Fn()) {
    let (sender, answer) = channel();
    source.flush(Box::new(move |r| sender.send(r).unwrap()));
    pump();
    outcome(&answer).unwrap();
}

fn outside_is_refused(source: &dyn Source, size: u64, pump: &dyn Fn()) {
    for (offset, len) in [
        (size, 1),
        (size - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, u32::MAX),
    ] {
        let read = submit_read(source, Lane::Bulk, offset, len);
        let extents = submit_extents(source, offset, u64::from(len));
        pump();
        assert_eq!(outcome(&read).unwrap_err().kind, SourceErrorKind::Refused);
        assert_eq!(
            outcome(&extents).unwrap_err().kind,
            SourceErrorKind::Refused
        );
    }
}
