//! Flushes, in both dialects: done is what the server says is done.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use hikkoshi_nbd::client::{BlockSizes, Negotiated};
use hikkoshi_nbd::server::ReplyStyle;
use hikkoshi_nbd::server::Request as NbdRequest;
use hikkoshi_nbd::server::reply::{Last, hole_chunk};
use hikkoshi_nbd::uri::Address;
use hikkoshi_nbd::wire::{Errno, REQUEST_BYTES, command};

use super::job::Job;
use super::line::Line;
use super::replies::Alone;
use super::script::{Script, frame, line_to};
use super::wire::Wire;
use super::{NbdSourceConfig, frames, reader};
use crate::source::{SourceError, SourceErrorKind};
use crate::transport::message::{Request, encode_error};
use crate::transport::{Kind, Priority};

fn flush(line: &Line) -> Receiver<Result<(), SourceError>> {
    let (sender, receiver) = channel();
    let job = Job::flush(Box::new(move |outcome| sender.send(outcome).unwrap()));
    assert!(line.submit(job).is_ok());
    receiver
}

fn kind(answer: &Receiver<Result<(), SourceError>>) -> Option<SourceErrorKind> {
    let outcome = answer.try_recv().expect("it was answered");
    outcome.err().map(|error| error.kind)
}

#[test]
fn frames_end_a_flush_or_fail_it() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answers = [flush(&line), flush(&line)];
    let asked = [0, 1].map(|id| Request::Flush(id, Priority::DEMAND).encode());
    assert_eq!(script.heard(), asked.concat());
    let error = encode_error(Errno::Io, "no");
    script.says(&frame(Kind::Error, 1, 0, &error, true));
    script.says(&frame(Kind::End, 0, 0, &[], true));
    assert_eq!(
        frames::read(&line, &Alone::default(), None)
            .unwrap()
            .answered,
        2
    );
    assert_eq!(kind(&answers[0]), None);
    assert_eq!(kind(&answers[1]), Some(SourceErrorKind::Refused));
}

/// Whatever else comes in answer to it ends the connection, and says nothing of what is durable.
#[test]
fn data_is_no_answer_to_a_flush() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answer = flush(&line);
    script.says(&frame(Kind::Data, 0, 0, &[1; 512], true));
    let ended = frames::read(&line, &Alone::default(), None).unwrap();
    assert_eq!(ended.why.kind(), SourceErrorKind::Untrusted);
    assert_eq!(ended.unfinished.len(), 1);
    assert!(answer.try_recv().is_err(), "it is not answered");
}

fn line_in_nbd(script: &Arc<Script>, structured: bool) -> Arc<Line> {
    let negotiated = Negotiated {
        size_bytes: 1 << 20,
        flags: 1,
        block_sizes: BlockSizes::DEFAULT,
        structured,
        allocation_context: None,
        transport: false,
        opened: false,
    };
    let config = NbdSourceConfig::new(Address::Unix("/nowhere".into()), "");
    Line::new(Arc::clone(script) as Arc<dyn Wire>, negotiated, &config)
}

/// With structured replies agreed on it may be answered either way.
#[test]
fn nbd_says_that_it_is_done_in_either_style() {
    let both = [ReplyStyle::Simple, ReplyStyle::Structured];
    for (structured, style) in [(false, both[0]), (true, both[0]), (true, both[1])] {
        let script = Arc::new(Script::default());
        let line = line_in_nbd(&script, structured);
        let answers = [flush(&line), flush(&line)];
        let heard = script.heard();
        let first = heard.first_chunk::<REQUEST_BYTES>().unwrap();
        let asked = NbdRequest::parse(first).unwrap();
        assert_eq!(
            (asked.command, asked.offset, asked.len),
            (command::FLUSH, 0, 0)
        );
        let mut said = Vec::new();
        style.push_error(&mut said, 1, Errno::Io, "no");
        style.push_done(&mut said, 0);
        script.says(&said);
        assert_eq!(
            reader::read(&line, &Alone::default(), None)
                .unwrap()
                .answered,
            2
        );
        assert_eq!(kind(&answers[0]), None);
        assert_eq!(kind(&answers[1]), Some(SourceErrorKind::Refused));
    }
}

#[test]
fn a_hole_is_no_answer_to_a_flush() {
    let script = Arc::new(Script::default());
    let line = line_in_nbd(&script, true);
    let answer = flush(&line);
    script.says(&hole_chunk(0, 0, 512, Last::Yes));
    let ended = reader::read(&line, &Alone::default(), None).unwrap();
    assert_eq!(ended.why.kind(), SourceErrorKind::Untrusted);
    assert!(answer.try_recv().is_err(), "it is not answered");
}
