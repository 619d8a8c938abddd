//! A connection that was put to work before the source has said that it may be.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::replies::Alone;
use super::script::{Script, frame, line_to, read};
use super::{Ticket, frames};
use crate::source::{Lane, SourceErrorKind};
use crate::transport::Kind;
use crate::transport::session::{Attached, Boots, HandedOver, Stance, Told};

/// What comes of a read that was sent behind [`Ticket::tell`]: its answer if it has one, and why the
/// connection ended.
fn read_behind(told: &Told, ticket: &Arc<Ticket>) -> (Option<Vec<u8>>, SourceErrorKind) {
    let script = Arc::new(Script::default());
    script.says(&frame(Kind::Told, 0, 0, &told.encode(), true));
    script.says(&frame(Kind::Data, 0, 4096, &[0x5a; 512], true));
    let line = line_to(&script, Some(ticket));
    let answer = read(&line, Lane::Demand, 4096, 512);
    assert!(line.waiting_since().is_some());
    let ended = frames::read(&line, &Alone::default(), None).unwrap();
    let data = answer.try_recv().ok().map(|answer| answer.unwrap().data);
    (data, ended.why.kind())
}

#[test]
fn what_was_asked_behind_a_refusal_is_not_believed() {
    let ticket = Ticket::new([1; 16], None, Stance::Arriving, true);
    let refused = Told::Refused("its fence is gone".to_owned());
    let (data, why) = read_behind(&refused, &ticket);
    assert_eq!((data, why), (None, SourceErrorKind::Untrusted));
    // Nor what comes behind something else than an answer.
    let (data, why) = read_behind(&Told::Fine, &ticket);
    assert_eq!((data, why), (None, SourceErrorKind::Untrusted));
    assert!(ticket.attached().is_none());
}

#[test]
fn what_was_asked_behind_a_welcome_is_answered() {
    let ticket = Ticket::new([1; 16], None, Stance::Arriving, true);
    let attached = Attached {
        generation: 7,
        ..Attached::default()
    };
    let (data, why) = read_behind(&Told::Attached(attached), &ticket);
    assert_eq!(data.unwrap(), [0x5a; 512]);
    assert_eq!(why, SourceErrorKind::Disconnected);
    assert_eq!(ticket.attached(), Some(attached));
}

/// The question had left before the handoff, and was heard after the fence was lifted by hand: the source welcomes
/// whoever stands by, and what it has is not the disk any more.
#[test]
fn a_source_that_took_the_disk_back_is_not_read() {
    let off = Attached {
        handed_over: HandedOver::Never,
        ..Attached::default()
    };
    let ticket = Ticket::new([1; 16], None, Stance::Standby, true);
    let (data, _) = read_behind(&Told::Attached(off), &ticket);
    assert!(data.is_some(), "whoever stands by may read");
    ticket.arrived();
    let (data, why) = read_behind(&Told::Attached(off), &ticket);
    assert_eq!((data, why), (None, SourceErrorKind::Untrusted));
}

/// A source whose machine was started anew has lost what nobody had flushed there.
#[test]
fn a_boot_that_has_ended_is_a_loss_before_the_handoff_alone() {
    let told = |boot: u8, departed| Attached {
        handed_over: match departed {
            false => HandedOver::NotYet,
            true => HandedOver::Already,
        },
        boots: Boots::of([boot; 16], Boots::NONE),
        ..Attached::default()
    };
    let ticket = Ticket::new([1; 16], None, Stance::Standby, true);
    ticket.was_told(told(1, false));
    ticket.was_told(told(1, false));
    assert_eq!((ticket.losses(), ticket.news_of_boots()), (0, 1));
    // Of nobody: it does not know, or nothing can be lost there.
    ticket.was_told(Attached::default());
    assert_eq!((ticket.losses(), ticket.news_of_boots()), (0, 1));
    ticket.was_told(told(2, false));
    assert_eq!((ticket.losses(), ticket.news_of_boots()), (1, 2));
    // It may have handed over under this boot, or under one that nobody here has heard of.
    ticket.was_told(told(3, true));
    assert_eq!(ticket.losses(), 2);
    // Here it had, before it ended.
    ticket.was_told(told(4, true));
    assert_eq!(ticket.losses(), 2);
    ticket.arrived();
    ticket.was_told(told(5, true));
    assert_eq!((ticket.losses(), ticket.news_of_boots()), (2, 4));
    assert_eq!(ticket.boots().known(), [[4; 16]]);
}
