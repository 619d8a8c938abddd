//! Requests that are wanted no more, and those whose connection is lost in the middle.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::frames;
use super::replies::Alone;
use super::script::{Script, frame, line_to, read, requests};
use crate::source::{Lane, SourceError, SourceErrorKind};
use crate::transport::message::Request;
use crate::transport::{Kind, Priority};

const QUANTUM: usize = 64 << 10;

#[test]
fn what_was_not_answered_is_taken_back_and_the_rest_is_not() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answers: Vec<_> = [
        (Lane::Bulk, 0),
        (Lane::Demand, 65536),
        (Lane::Bulk, 131_072),
    ]
    .map(|(lane, at)| read(&line, lane, at, 65536))
    .into();
    assert_eq!(requests(&script.heard()).len(), 3);
    // Another lane, another place, and only a part of it: nothing is meant by these.
    for (lane, offset, len) in [(Lane::Late, 0, 65536), (Lane::Bulk, 1, 65536)] {
        assert!(line.cancel(lane, offset, len).is_empty());
    }
    assert!(script.heard().is_empty());
    for _ in 0..2 {
        assert!(line.cancel(Lane::Bulk, 0, 131_072).is_empty());
    }
    // Once.
    assert_eq!(requests(&script.heard()), [Request::Cancel(0)]);
    script.says(&frame(Kind::End, 0, 0, &[], true));
    script.says(&frame(Kind::Data, 1, 65536, &[1; 65536], true));
    script.says(&frame(Kind::Data, 2, 131_072, &[2; 65536], true));
    let ended = frames::read(&line, &Alone::default(), None).unwrap();
    assert_eq!(ended.answered, 3);
    let kinds: Vec<_> = answers
        .iter()
        .map(|answer| answer.recv().unwrap().err().map(|error| error.kind))
        .collect();
    assert_eq!(kinds, [Some(SourceErrorKind::Cancelled), None, None]);
    assert_eq!(line.cancelled_bytes(), 65536);
    assert_eq!(line.load(Lane::Bulk), 0);
}

/// Half of it had come.
#[test]
fn what_has_begun_is_taken_back_too() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answer = read(&line, Lane::Bulk, 0, 131_072);
    script.heard();
    script.says(&frame(Kind::Data, 0, 0, &[1; QUANTUM], false));
    let (canceller, source) = (Arc::clone(&line), Arc::clone(&script));
    script.then(move || {
        assert!(canceller.cancel(Lane::Bulk, 0, 131_072).is_empty());
        assert_eq!(requests(&source.heard()), [Request::Cancel(0)]);
        source.says(&frame(Kind::End, 0, 0, &[], true));
    });
    let ended = frames::read(&line, &Alone::default(), None).unwrap();
    assert_eq!((ended.answered, ended.unfinished.len()), (1, 0));
    let error = answer.recv().unwrap().unwrap_err();
    assert_eq!(error.kind, SourceErrorKind::Cancelled);
    assert_eq!(line.cancelled_bytes(), 65536);
}

/// A source that paces what nobody waits for held back the rest of a chunk that had begun, and a guest's
/// read of it waited for the bulk of all other disks.
#[test]
fn what_has_begun_is_promoted_too() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answers = [
        (Lane::Bulk, 0),
        (Lane::Demand, 131_072),
        (Lane::Bulk, 262_144),
    ]
    .map(|(lane, at)| read(&line, lane, at, 131_072));
    script.heard();
    for (id, at) in [(0, 0), (1, 131_072), (2, 262_144)] {
        script.says(&frame(Kind::Data, id, at, &[1; QUANTUM], false));
    }
    let (guest, source) = (Arc::clone(&line), Arc::clone(&script));
    script.then(move || {
        guest.promote(0, 262_144);
        let told = requests(&source.heard());
        assert_eq!(told, [Request::Promote(0, Priority::DEMAND)]);
        for (id, at) in [(0, 65536), (1, 196_608), (2, 327_680)] {
            source.says(&frame(Kind::Data, id, at, &[2; QUANTUM], true));
        }
    });
    assert_eq!(
        frames::read(&line, &Alone::default(), None)
            .unwrap()
            .answered,
        3
    );
    for answer in answers {
        let data = answer.recv().unwrap().unwrap().data;
        assert_eq!(data, [[1; QUANTUM], [2; QUANTUM]].concat());
    }
}

/// The last frame was on its way already: that is no error.
#[test]
fn an_answer_that_crosses_its_cancellation_is_taken() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answer = read(&line, Lane::Bulk, 0, 512);
    line.cancel(Lane::Bulk, 0, 512);
    script.says(&frame(Kind::Data, 0, 0, &[1; 512], true));
    frames::read(&line, &Alone::default(), None).unwrap();
    assert_eq!(answer.recv().unwrap().unwrap().data, [1; 512]);
    assert_eq!(line.cancelled_bytes(), 0);
}

#[test]
fn the_end_of_what_was_not_cancelled_breaks_the_protocol() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let _answer = read(&line, Lane::Bulk, 0, 512);
    script.says(&frame(Kind::End, 0, 0, &[], true));
    let ended = frames::read(&line, &Alone::default(), None).unwrap();
    assert_eq!(ended.why.kind(), SourceErrorKind::Untrusted);
}

/// What came of a read before its connection was lost, told with the error.
fn come(says: &[u8], offset: u64, len: u32) -> Option<(u64, Vec<u8>)> {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answer = read(&line, Lane::Bulk, offset, len);
    script.says(says);
    let ended = frames::read(&line, &Alone::default(), None).unwrap();
    let error = SourceError::new(ended.why.kind(), ended.why.to_string());
    ended
        .unfinished
        .into_iter()
        .for_each(|job| job.fail(error.clone()));
    let error = answer.recv().unwrap().unwrap_err();
    let come = error.come?;
    Some((come.offset, come.data.clone()))
}

#[test]
fn whole_pieces_outlive_their_connection() {
    let first = frame(Kind::Data, 0, 4096, &[1; QUANTUM], false);
    let second = frame(Kind::Data, 0, 4096 + 65536, &[2; QUANTUM], false);
    let both = [&first[..], &second].concat();
    let one = Some((4096, vec![1; QUANTUM]));
    assert_eq!(come(&first, 4096, 3 * 65536), one);
    // Of a piece that is cut, nothing: its checksum is of all of it.
    assert_eq!(come(&both[..both.len() - 1], 4096, 3 * 65536), one);
    assert_eq!(come(&first[..first.len() - 1], 4096, 3 * 65536), None);
    let two = come(&both, 4096, 3 * 65536).unwrap().1;
    assert_eq!(two, [[1; QUANTUM], [2; QUANTUM]].concat());
}

#[test]
fn nothing_is_kept_of_a_connection_on_which_something_was_damaged() {
    let first = frame(Kind::Data, 0, 0, &[1; QUANTUM], false);
    let mut second = frame(Kind::Data, 0, 65536, &[2; QUANTUM], false);
    *second.last_mut().unwrap() ^= 1;
    assert_eq!(come(&[first, second].concat(), 0, 3 * 65536), None);
}
