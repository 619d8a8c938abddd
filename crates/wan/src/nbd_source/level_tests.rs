//! A connection that has become slow, and what was asked for over it.
#![allow(clippy::unwrap_used)]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use hikkoshi_nbd::uri::Address;

use super::NbdSourceConfig;
use super::frames;
use super::herald::News;
use super::job::Job;
use super::line::Line;
use super::replies::{Alone, Others};
use super::script::{Script, frame, line_to, read, requests};
use super::shared::{Installed, Shared, info_of};
use crate::source::Lane;
use crate::transport::message::Request;
use crate::transport::{Kind, Priority};

const PIECE: u32 = 64 << 10;
const PIECES: u64 = 16;

fn at(piece: u64) -> u64 {
    piece * u64::from(PIECE)
}

/// What was taken back from a connection for others.
#[derive(Default)]
struct Taken(Mutex<Vec<Job>>, Mutex<()>);

impl Taken {
    fn all(&self) -> Vec<(Lane, u64)> {
        let jobs = self.0.lock().unwrap();
        jobs.iter().map(|job| (job.lane, job.offset)).collect()
    }
}

impl Others for Taken {
    fn moving(&self) -> MutexGuard<'_, ()> {
        self.1.lock().unwrap()
    }

    fn take(&self, job: Job) {
        assert!(
            self.1.try_lock().is_err(),
            "it might become urgent meanwhile"
        );
        self.0.lock().unwrap().push(job);
    }
}

fn cancelled(script: &Script) -> Vec<u64> {
    let told = requests(&script.heard()).into_iter();
    told.map(|told| match told {
        Request::Cancel(id) => id,
        other => panic!("{other:?}"),
    })
    .collect()
}

#[test]
fn what_was_asked_for_last_is_taken_back_and_nothing_that_a_guest_waits_for() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let lane = |piece| {
        if piece == 15 {
            Lane::Demand
        } else {
            Lane::Bulk
        }
    };
    let _answers: Vec<_> = (0..PIECES)
        .map(|piece| read(&line, lane(piece), at(piece), PIECE))
        .collect();
    line.promote(at(14), 1);
    script.heard();
    assert!(line.relieve(at(4) - 1).is_empty());
    assert_eq!(cancelled(&script), [13, 12, 11]);
    // That is no load any more, and is not taken back once more.
    assert_eq!(line.load(Lane::Late), at(PIECES - 3));
    assert!(line.relieve(at(1) - 1).is_empty());
    assert!(script.heard().is_empty());
    assert!(line.relieve(at(1)).is_empty());
    assert_eq!(cancelled(&script), [10]);
    // By now a guest waits for this, and nobody for that.
    line.promote(at(12), 1);
    assert!(line.cancel(Lane::Bulk, at(11), PIECE.into()).is_empty());
    assert_eq!(
        requests(&script.heard()),
        [Request::Promote(12, Priority::DEMAND)]
    );
    for id in 10..14 {
        script.says(&frame(Kind::End, id, 0, &[], true));
    }
    let taken = Taken::default();
    let ended = frames::read(&line, &taken, None).unwrap();
    assert_eq!(ended.answered, 4);
    let wanted = [(Lane::Bulk, 10), (Lane::Demand, 12), (Lane::Bulk, 13)];
    assert_eq!(taken.all(), wanted.map(|(lane, piece)| (lane, at(piece))));
    assert_eq!(line.cancelled_bytes(), PIECE.into());
    assert_eq!(line.load(Lane::Late), at(PIECES - 4));
}

#[test]
fn what_came_all_the_same_is_an_answer() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    let answer = read(&line, Lane::Bulk, 0, 512);
    line.relieve(512);
    script.says(&frame(Kind::Data, 0, 0, &[1; 512], true));
    frames::read(&line, &Alone::default(), None).unwrap();
    assert_eq!(answer.recv().unwrap().unwrap().data, [1; 512]);
    assert_eq!(line.load(Lane::Bulk), 0);
}

#[test]
fn what_was_not_sent_yet_is_handed_out_in_its_order() {
    let script = Arc::new(Script::default());
    let line = line_to(&script, None);
    // As many as may be under way, and three more.
    let mut asked = 0;
    while line.load(Lane::Demand) == line.load(Lane::Late) {
        drop(read(&line, Lane::Bulk, asked * 512, 512));
        asked += 1;
    }
    for more in 0..2 {
        drop(read(&line, Lane::Bulk, (asked + more) * 512, 512));
    }
    script.heard();
    let unsent = line.relieve(3 * 512);
    let offsets: Vec<u64> = unsent.iter().map(|job| job.offset / 512).collect();
    assert_eq!(offsets, [asked - 1, asked, asked + 1]);
    assert!(script.heard().is_empty());
}

type Connection = (Arc<Script>, Arc<Line>);

/// Three connections, the first of which is left to demand.
fn three() -> (Arc<Shared>, Vec<Connection>, Receiver<News>) {
    let lines: Vec<Connection> = (0..3)
        .map(|_| {
            let script = Arc::new(Script::default());
            let line = line_to(&script, None);
            (script, line)
        })
        .collect();
    let (herald, news) = channel();
    let mut config = NbdSourceConfig::new(Address::Unix("/nowhere".into()), "");
    config.connections = 3;
    config.several_without_promise = true;
    let info = info_of("nbd://nowhere", &lines[0].1.negotiated);
    let shared = Shared::new(config, Some(info), Arc::default(), herald, 1);
    for (slot, (_, line)) in lines.iter().enumerate() {
        assert!(matches!(shared.install(slot, line), Installed::Yes));
    }
    // The watcher is told that the first one stands.
    drop(news.try_recv());
    (shared, lines, news)
}

/// The others were idle, since nothing more was asked for before that had come.
#[test]
fn others_bring_what_a_slow_connection_would_bring_late() {
    let (shared, lines, news) = three();
    let (slow, quick) = (&lines[1], &lines[2]);
    let answers: Vec<_> = (0..PIECES)
        .map(|piece| read(&slow.1, Lane::Bulk, at(piece), PIECE))
        .collect();
    slow.0.heard();
    slow.1.brings(100_000);
    quick.1.brings(10_000_000);
    shared.level();
    let mut taken = cancelled(&slow.0);
    taken.sort_unstable();
    // The hundredth part stays: less than one.
    assert_eq!(taken, (1..PIECES).collect::<Vec<u64>>());
    // And so soon it is not looked at again.
    shared.level();
    assert!(slow.0.heard().is_empty());
    for id in &taken {
        slow.0.says(&frame(Kind::End, *id, 0, &[], true));
    }
    frames::read(&slow.1, &*shared, None).unwrap();
    assert!(requests(&lines[0].0.heard()).is_empty());
    for (id, piece) in (0..).zip(&taken) {
        let data = vec![u8::try_from(*piece).unwrap(); PIECE as usize];
        let answer = frame(Kind::Data, id, at(*piece), &data, true);
        quick.0.says(&answer);
    }
    assert_eq!(requests(&quick.0.heard()).len(), taken.len());
    frames::read(&quick.1, &*shared, None).unwrap();
    for (piece, answer) in (0..).zip(answers) {
        match answer.try_recv() {
            Ok(come) => assert_eq!(come.unwrap().data, vec![piece; PIECE as usize]),
            Err(_) => assert!(piece < 1, "{piece} has not come"),
        }
    }
    assert!(news.try_recv().is_err(), "nothing has failed");
}

#[test]
fn where_the_others_are_gone_it_is_asked_for_once_more() {
    let (shared, lines, _news) = three();
    let (script, line) = &lines[1];
    let answer = read(line, Lane::Bulk, 0, 512);
    line.relieve(512);
    for (_, other) in [&lines[0], &lines[2]] {
        other.bury();
    }
    script.heard();
    script.says(&frame(Kind::End, 0, 0, &[], true));
    script.says(&frame(Kind::Data, 1, 0, &[7; 512], true));
    frames::read(line, &*shared, None).unwrap();
    assert_eq!(requests(&script.heard()).len(), 1);
    assert_eq!(answer.recv().unwrap().unwrap().data, [7; 512]);
}
