//! The link between two daemons cut at every message of a move and of the way back: exactly one side
//! accepts writes meanwhile, or none and a status names the way on; and once the link is back, the
//! move ends with everything there.
//!
//! A life goes there and back and is turned back on both ways, with a cut at each message; lives
//! differ in when the cut comes and in how. `docs/reliability.md` has the table. Each row is printed.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::client::{Answer, Client};
use hikkoshi_testkit::cut::{Break, Cut, CutLink, Way, What};
use hikkoshi_testkit::faults::content;
use hikkoshi_testkit::moving::{Guest, Site};
use rustix::process::Signal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

const SIZE: u64 = 4 << 20;
/// Where the guest works. Beyond it, one place is read and another written for the tests' own ends.
const WITHIN: u64 = SIZE - 128 * 1024;
const READ_AT: u64 = WITHIN;
const WRITE_AT: u64 = SIZE - 4096;

/// What is said, by the numbers of `docs/wire.md`: as a request and as an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Attach,
    Changes,
    Handoff,
    Abort,
    Bases,
    Done,
    Heat,
    Slow,
    Read,
}

impl Said {
    fn what(self, way: Way) -> What {
        match (self, way) {
            (Self::Attach, _) => What::Message(1),
            (Self::Changes, _) => What::Message(2),
            (Self::Handoff, _) => What::Message(3),
            // Both are answered with byte 6, whatever was said.
            (Self::Abort | Self::Slow, Way::ToDestination) => What::Message(6),
            (Self::Abort, Way::ToSource) => What::Message(4),
            (Self::Slow, Way::ToSource) => What::Message(8),
            (Self::Bases, _) => What::Message(5),
            (Self::Done, _) => What::Message(6),
            (Self::Heat, _) => What::Message(7),
            (Self::Read, Way::ToSource) => What::Frame(0x01),
            (Self::Read, Way::ToDestination) => What::Frame(0x81),
        }
    }
}

/// When the cut comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// The source does not hear what is said.
    Unheard,
    /// It hears it, at that very moment.
    Heard,
    /// It has answered, and the answer is lost.
    Unanswered,
    /// The answer is the last thing that gets through.
    Answered,
}

/// How it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Hung up on, and nobody can be reached; then connections can be made.
    Down,
    /// Silence; then all that was on its way arrives, late.
    Late,
    /// Silence; then everybody is hung up on.
    Lost,
}

/// Who accepts writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    Source,
    Destination,
    Nobody,
    /// What was cut was on its way.
    SourceOrNobody,
}

/// A way that is taken.
struct Trip<'a> {
    name: &'static str,
    from: &'a Site,
    link: &'a CutLink,
}

impl<'a> Trip<'a> {
    fn new(name: &'static str, from: &'a Site, link: &'a CutLink) -> Self {
        Self { name, from, link }
    }
}

struct Life {
    guest: Guest,
    when: When,
    how: How,
}

/// A write that may have to wait.
fn write_on_a_thread(mut client: Client) -> JoinHandle<Result<Answer>> {
    std::thread::spawn(move || client.try_write(WRITE_AT, &content(9, 0, 4096)))
}

impl Life {
    fn new(guest: Guest, when: When, how: How) -> Self {
        Self { guest, when, how }
    }

    fn arm(&self, link: &CutLink, said: Said) {
        self.arm_at(link, said, self.when);
    }

    fn arm_at(&self, link: &CutLink, said: Said, when: When) {
        let way = match when {
            When::Unheard | When::Heard => Way::ToSource,
            When::Unanswered | When::Answered => Way::ToDestination,
        };
        link.arm(Cut {
            what: said.what(way),
            way,
            passes: matches!(when, When::Heard | When::Answered),
            how: match self.how {
                How::Down => Break::Down,
                How::Late | How::Lost => Break::Silent,
            },
        });
    }

    fn mend(&self, link: &CutLink) -> Result<()> {
        if self.how == How::Lost {
            link.reset();
        }
        link.mend()
    }

    /// Waits for the cut, and looks who takes writes.
    fn look(&mut self, trip: &Trip<'_>, to: &Site, said: Said, writer: Writer) -> Result<()> {
        let (when, how) = (self.when, self.how);
        let row = format!("{} | {said:?} | {when:?} | {how:?}", trip.name);
        trip.link.wait_broken().context(row.clone())?;
        let found = self.writer(trip.from, to, writer).context(row.clone())?;
        println!("{row} | {found}");
        Ok(())
    }

    fn writer(&mut self, from: &Site, to: &Site, writer: Writer) -> Result<String> {
        if writer == Writer::Destination {
            // It has the answer, and records it.
            to.daemon()
                .wait_status("taken over", |s| s["state"] != "standby")?;
        }
        let state = to.state()?;
        let here = self.guest.takes_writes(from)?;
        // A first write there would begin a handoff.
        let there = state != "standby" && self.guest.takes_writes(to)?;
        let told = format!("{} {}", from.story(), to.story());
        let right = match writer {
            Writer::Source => here && !there,
            Writer::Destination => there && !here,
            Writer::Nobody => !here && !there,
            Writer::SourceOrNobody => !there,
        };
        ensure!(right, "{here} and {there} instead of {writer:?}: {told}");
        let at_source = from.notes()?;
        // What was on its way may have lifted the fence since.
        let settled = writer != Writer::SourceOrNobody || from.state()? == "departed";
        if !here && !there && settled {
            for way in ["`hikkoshi abort` there", "`hikkoshi release --force`"] {
                ensure!(at_source.contains(way), "no way on is named: {told}");
            }
            let here = match state.as_str() {
                "standby" => "`hikkoshi handoff`",
                _ => "the move here was given up",
            };
            ensure!(to.notes()?.contains(here), "no way on is named: {told}");
        }
        let who = match (here, there) {
            (true, _) => "the source takes writes",
            (_, true) => "the destination takes writes",
            _ => "nobody takes writes",
        };
        Ok(format!("{}, {state}: {who}", from.state()?))
    }

    /// Up to the handoff: everything is copied ahead, over a link that is cut at each message.
    fn prepare(&mut self, trip: &Trip<'_>, to: &mut Site) -> Result<()> {
        let link = trip.link;
        self.arm(link, Said::Heat);
        to.start()?;
        self.look(trip, to, Said::Heat, Writer::Source)?;
        self.arm(link, Said::Attach);
        self.mend(link)?;
        // Whoever is still connected does so again, and says who it is.
        link.reset();
        self.look(trip, to, Said::Attach, Writer::Source)?;
        self.arm(link, Said::Read);
        self.mend(link)?;
        self.guest.work(&mut trip.from.client()?, 40)?;
        self.look(trip, to, Said::Read, Writer::Source)?;
        self.mend(link)?;
        to.wait_prepared()?;
        self.arm(link, Said::Changes);
        self.look(trip, to, Said::Changes, Writer::Source)?;
        self.mend(link)?;
        to.wait_prepared().map(drop)
    }

    /// The disk moves.
    fn go(&mut self, trip: &Trip<'_>, to: &mut Site) -> Result<()> {
        self.prepare(trip, to)?;
        let (from, link) = (trip.from, trip.link);
        to.daemon().command(&["pause"])?;
        // To be fetched after the handoff.
        let mut client = from.client()?;
        ensure!(self.guest.write(&mut client, READ_AT / 512, 8)? == Answer::OK);
        self.guest.work(&mut client, 10)?;
        self.arm(link, Said::Handoff);
        let writing = write_on_a_thread(to.client()?);
        let writer = match self.when {
            When::Unheard => Writer::Source,
            When::Heard => Writer::SourceOrNobody,
            When::Unanswered => Writer::Nobody,
            When::Answered => Writer::Destination,
        };
        self.look(trip, to, Said::Handoff, writer)?;
        let answered = self.when == When::Answered;
        ensure!(
            answered || !writing.is_finished(),
            "a write was answered: {}",
            to.story()
        );
        self.arm(link, Said::Bases);
        self.mend(link)?;
        let answer = writing.join().expect("it does not panic")?;
        ensure!(answer == Answer::OK, "the first write: {}", answer.0);
        let mut client = to.client()?;
        ensure!(self.guest.write(&mut client, WRITE_AT / 512, 8)? == Answer::OK);
        self.look(trip, to, Said::Bases, Writer::Destination)?;
        self.arm(link, Said::Read);
        self.mend(link)?;
        let reading = std::thread::spawn(move || client.read(READ_AT, 4096));
        self.look(trip, to, Said::Read, Writer::Destination)?;
        ensure!(
            self.when == When::Answered || !reading.is_finished(),
            "what is not there was read"
        );
        self.mend(link)?;
        let read = reading.join().expect("it does not panic")?;
        self.guest.compare(READ_AT, &read)?;
        self.arm(link, Said::Done);
        to.daemon().command(&["resume"])?;
        to.wait_state("local")?;
        self.look(trip, to, Said::Done, Writer::Destination)?;
        self.mend(link)?;
        from.daemon()
            .wait_status("told that all has arrived", |s| {
                s["notes"].to_string().contains("needed no more")
            })?;
        ensure!(!self.guest.takes_writes(from)?, "{}", from.story());
        self.guest.work(&mut to.client()?, 20)?;
        self.guest.check(&mut to.client()?)
    }

    /// The answer to the handoff is lost with the link, and somebody decides against the move.
    fn turn_back(&mut self, trip: &Trip<'_>, to: &mut Site) -> Result<()> {
        let (from, link) = (trip.from, trip.link);
        to.start()?;
        to.wait_prepared()?;
        self.guest.work(&mut from.client()?, 10)?;
        self.arm_at(link, Said::Handoff, When::Unanswered);
        let writing = write_on_a_thread(to.client()?);
        link.wait_broken()?;
        self.writer(from, to, Writer::Nobody)?;
        let (giving_up, answer) = std::thread::scope(|scope| -> Result<_> {
            let giving_up = scope.spawn(|| to.daemon().try_command(&["abort"]));
            let answer = writing.join().expect("it does not panic")?;
            to.wait_state("given-up")?;
            self.writer(from, to, Writer::Nobody)?;
            self.arm(link, Said::Abort);
            self.mend(link)?;
            let writer = match self.when {
                When::Unheard => Writer::Nobody,
                When::Heard => Writer::SourceOrNobody,
                When::Unanswered | When::Answered => Writer::Source,
            };
            self.look(trip, to, Said::Abort, writer)?;
            self.mend(link)?;
            self.guest.insist(from)?;
            Ok((giving_up.join().expect("it does not panic")?, answer))
        })?;
        ensure!(answer == Answer::EPERM, "the first write: {}", answer.0);
        ensure!(giving_up.status.success(), "{}", to.story());
        ensure!(!self.guest.takes_writes(to)?, "{}", to.story());
        to.daemon().wait_status("heard of at the source", |s| {
            s["notes"].to_string().contains("remove this image")
        })?;
        to.kill()?;
        self.guest.check(&mut from.client()?)
    }
}

/// A guest that has worked at A, which is served.
fn at_home(dir: &Path, seed: u64) -> Result<(Guest, Site)> {
    let mut guest = Guest::new(SIZE, seed);
    let mut a = Site::new(dir, "a", &[], false);
    guest.make_image(a.image())?;
    guest.within = WITHIN;
    a.start()?;
    guest.work(&mut a.client()?, 40)?;
    Ok((guest, a))
}

fn live(dir: &Path, when: When, how: How, seed: u64) -> Result<()> {
    let (guest, mut a) = at_home(dir, seed)?;
    let mut life = Life::new(guest, when, how);
    let link = CutLink::new(&dir.join("there.nbd"), &a.socket())?;
    let there = ["--from", &link.uri(), "--way-back"];

    let mut nowhere = Site::new(dir, "nowhere", &there, false);
    life.turn_back(&Trip::new("A to B, given up", &a, &link), &mut nowhere)?;
    let said = nowhere.refusal()?;
    ensure!(said.contains("given up"), "{said}");

    let mut b = Site::new(dir, "b", &there, false);
    life.go(&Trip::new("A to B", &a, &link), &mut b)?;
    drop(link);
    a.take()?.stop()?;

    let link = CutLink::new(&dir.join("back.nbd"), &b.socket())?;
    let back = ["--from", &link.uri(), "--return", "--way-back"];
    let mut a = Site::new(dir, "a", &back, false);
    life.turn_back(&Trip::new("back to A, given up", &b, &link), &mut a)?;
    life.go(&Trip::new("back to A", &b, &link), &mut a)?;
    a.take()?.stop()?;
    life.guest.check_image(a.image())
}

const LIVES: &[(When, How)] = &[
    (When::Unheard, How::Down),
    (When::Unheard, How::Late),
    (When::Unheard, How::Lost),
    (When::Heard, How::Down),
    (When::Unanswered, How::Down),
    (When::Unanswered, How::Late),
    (When::Unanswered, How::Lost),
    (When::Answered, How::Down),
    (When::Answered, How::Late),
    (When::Answered, How::Lost),
];

/// All lives at once: they mostly wait.
#[test]
fn cut_at_every_message() {
    let failed: Vec<String> = std::thread::scope(|scope| {
        let lives: Vec<_> = (1..)
            .zip(LIVES)
            .map(|(seed, (when, how))| {
                scope.spawn(move || {
                    let dir = tempfile::tempdir().unwrap();
                    live(dir.path(), *when, *how, seed)
                        .err()
                        .map(|error| format!("{when:?} {how:?}: {error:#}"))
                })
            })
            .collect();
        lives
            .into_iter()
            .filter_map(|life| life.join().unwrap())
            .collect()
    });
    assert!(
        failed.is_empty(),
        "{} lives failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

/// A destination that cannot tell the source who it is does not begin, and is begun again.
#[test]
fn cut_while_it_attaches_for_the_first_time() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (guest, mut a) = at_home(dir.path(), 21)?;
    let mut life = Life::new(guest, When::Unheard, How::Down);
    let link = CutLink::new(&dir.path().join("there.nbd"), &a.socket())?;
    let mut b = Site::new(dir.path(), "b", &["--from", &link.uri()], false);
    let rows = [
        (When::Unheard, How::Down),
        (When::Heard, How::Down),
        (When::Unanswered, How::Down),
        (When::Unanswered, How::Lost),
    ];
    for (when, how) in rows {
        (life.when, life.how) = (when, how);
        life.arm(&link, Said::Attach);
        let said = b.refusal()?;
        // One of its connections has said it, or was still being greeted, when the link went.
        ensure!(said.contains("cannot reach the source"), "{said}");
        ensure!(
            said.contains("saying for which move it is failed")
                || said.contains("the NBD handshake failed"),
            "{said}"
        );
        link.wait_broken()?;
        ensure!(life.guest.takes_writes(&a)?, "{}", a.story());
        life.mend(&link)?;
    }
    b.start()?;
    life.guest.insist(&b)?;
    ensure!(!life.guest.takes_writes(&a)?, "{}", a.story());
    b.wait_state("local")?;
    a.kill()?;
    life.guest.check(&mut b.client()?)
}

/// With `--prepare full` the source is asked to slow the VM down, and the link is cut at that: the VM
/// is not slowed down for longer than the destination can say so, and the move goes on.
#[test]
fn cut_while_the_source_is_slowed_down() -> Result<()> {
    let rows = [
        (When::Unheard, How::Down),
        (When::Unanswered, How::Late),
        (When::Answered, How::Lost),
    ];
    std::thread::scope(|scope| {
        let rows = rows.map(|(when, how)| scope.spawn(move || slowed_down(when, how)));
        rows.into_iter().try_for_each(|row| row.join().unwrap())
    })
}

fn slowed_down(when: When, how: How) -> Result<()> {
    const LARGE: u64 = 16 << 20;
    let dir = tempfile::tempdir()?;
    let guest = Guest::new(LARGE, 22);
    let mut a = Site::new(dir.path(), "a", &[], false);
    guest.make_image(a.image())?;
    a.start()?;
    let link = CutLink::new(&dir.path().join("there.nbd"), &a.socket())?;
    let arguments = ["--from", &link.uri(), "--prepare", "full"];
    let mut b = Site::new(dir.path(), "b", &arguments, false);
    b.start()?;
    b.wait_prepared()?;
    b.daemon().command(&["limit", "1MB/s"])?;
    let mut life = Life::new(guest, when, how);
    life.arm(&link, Said::Slow);
    // All of it is written again and again, until nothing is gained on that.
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        let writing = scope.spawn(|| -> Result<()> {
            let mut client = a.client()?;
            for at in (0..LARGE / 512).step_by(2048).cycle() {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                ensure!(life.guest.write(&mut client, at, 2048)? == Answer::OK);
            }
            Ok(())
        });
        let broken = link.wait_broken();
        over.store(true, Ordering::Relaxed);
        writing.join().expect("it does not panic")?;
        broken
    })?;
    let slowed = |a: &Site| anyhow::Ok(a.notes()?.contains("slowed down"));
    ensure!(slowed(&a)? == (when != When::Unheard), "{}", a.story());
    let mut client = a.client()?;
    // Nobody repeats it: it ends by itself.
    while slowed(&a)? {
        ensure!(life.guest.takes_writes(&a)?, "{}", a.story());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    ensure!(life.guest.write(&mut client, 0, 2048)? == Answer::OK);
    println!("{when:?} {how:?}: {} {}", a.story(), b.story());
    b.daemon().command(&["limit", "none"])?;
    life.mend(&link)?;
    life.guest.insist(&b)?;
    ensure!(!life.guest.takes_writes(&a)?, "{}", a.story());
    b.wait_state("local")?;
    life.guest.check(&mut b.client()?)
}

/// A, and B that stands by, over a link on which the answer to something is to be lost.
fn stands_by(dir: &Path, seed: u64, how: How) -> Result<(Life, Site, Site, CutLink)> {
    let (guest, a) = at_home(dir, seed)?;
    let link = CutLink::new(&dir.join("there.nbd"), &a.socket())?;
    let mut b = Site::new(dir, "b", &["--from", &link.uri()], false);
    b.start()?;
    b.wait_prepared()?;
    Ok((Life::new(guest, When::Unanswered, how), a, b, link))
}

/// Lifts the fence of A, of whose answer nobody has said that it was heard.
fn release_by_force(a: &Site) -> Result<()> {
    let status = a.daemon().status()?;
    ensure!(status["taken_over"] == false, "{status}");
    ensure!(status["release_in_s"].is_u64(), "{status}");
    let output = a.daemon().try_command(&["release", "--force"])?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains("may still take that answer"), "{said}");
    ensure!(
        said.contains("has not said that it took the disk over"),
        "{said}"
    );
    Ok(())
}

/// The whole process of B stands still while the answer to the handoff waits in its socket, and a person lets
/// the VM go on at A meanwhile. Running again, B finds an answer that does not count any more.
#[test]
fn an_answer_that_is_found_after_a_standstill_is_not_taken() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut life, mut a, b, link) = stands_by(dir.path(), 24, How::Late)?;
    life.arm(&link, Said::Handoff);
    let writing = write_on_a_thread(b.client()?);
    link.wait_broken()?;
    b.daemon().freeze()?;
    life.mend(&link)?;
    release_by_force(&a)?;
    ensure!(life.guest.takes_writes(&a)?, "{}", a.story());
    b.daemon().signal(Signal::CONT)?;
    let answer = writing.join().expect("it does not panic")?;
    ensure!(answer == Answer::EIO, "the first write: {}", answer.0);
    life.writer(&a, &b, Writer::Source)?;
    a.restart()?;
    life.writer(&a, &b, Writer::Source).map(drop)
}

/// The answer to the handoff is lost with the link, and a person lets the VM go on at A. When the link
/// is back the write that has waited at B all the time does not take the disk away from it, also
/// after restarts: that VM is older than what has been written since.
#[test]
fn cut_and_released_by_hand() -> Result<()> {
    released_by_hand(How::Lost)
}

/// The same, and the answer comes after all, late: while it could still be taken the fence is not lifted.
#[test]
fn held_up_and_released_by_hand() -> Result<()> {
    released_by_hand(How::Late)
}

fn released_by_hand(how: How) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut life, mut a, mut b, link) = stands_by(dir.path(), 23, how)?;
    life.arm(&link, Said::Handoff);
    let writing = write_on_a_thread(b.client()?);
    link.wait_broken()?;
    life.writer(&a, &b, Writer::Nobody)?;
    release_by_force(&a)?;
    life.writer(&a, &b, Writer::Source)?;
    life.mend(&link)?;
    let answer = writing.join().expect("it does not panic")?;
    ensure!(answer == Answer::EIO, "the first write: {}", answer.0);
    a.restart()?;
    b.restart()?;
    let answer = write_on_a_thread(b.client()?);
    let answer = answer.join().expect("it does not panic")?;
    ensure!(answer == Answer::EIO, "the first write: {}", answer.0);
    life.writer(&a, &b, Writer::Source)?;
    let told = b.notes()?;
    ensure!(told.contains("say `hikkoshi abort` here"), "{told}");
    // What that names, and a new beginning.
    b.daemon().command(&["abort"])?;
    b.kill()?;
    let anew = ["--from", &link.uri(), "--overwrite"];
    let mut b = Site::new(dir.path(), "b", &anew, false);
    b.start()?;
    life.guest.insist(&b)?;
    ensure!(!life.guest.takes_writes(&a)?, "{}", a.story());
    b.wait_state("local")?;
    life.guest.check(&mut b.client()?)
}
