//! A client's bytes through a whole connection of the daemon: the handshake's state machine, then
//! the transmission loop of the front end, over a real socket, onto a volume in memory.
//!
//! The first three bytes say what is served and how the bytes come; the rest are the client's,
//! either as they are or as a [`script`] that makes them. What must hold, whatever the client sends:
//! - the handshake answers the same, however its bytes are cut;
//! - each request is answered exactly once, in whole, in the agreed style, with what the rules
//!   demand, or the connection ends;
//! - a read gives what was written before it, or while it waited;
//! - the disk afterwards is what the accepted writes made of it, also when most of it came from a
//!   source that failed now and then, and the move comes to its end;
//! - before the handoff nothing is kept.

pub(crate) mod conversation;
pub(crate) mod disk;
pub(crate) mod model;
mod replies;
pub mod script;

use std::ops::Range;

use hikkoshi_daemon::config::Transport;
use hikkoshi_daemon::front::Table;
use hikkoshi_nbd::server::{Command, Handshake, Outcome, Request, Rules, Session, Verdict};
use hikkoshi_nbd::wire::{Errno, REQUEST_BYTES};

use crate::input::Input;
use crate::memory;
use disk::{Disk, Kind};
use model::{Fate, Model};
use replies::{Answer, Replies};

/// What the daemon may hold for one client on top of what it has received: replies that wait for
/// the source (64 MiB by the front end's own bound), its two buffers, one answer to LIST, and what
/// this harness keeps itself.
const MEMORY_BOUND: usize = 96 << 20;

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (kind, pace, luck) = (input.byte(), input.byte(), input.byte());
    let disk = Disk::new(Kind::of(kind), luck, Transport::Nbd);
    let mut client = if kind & 0x80 == 0 {
        input.rest().to_vec()
    } else {
        script::client_bytes(&mut input, disk.size())
    };
    let rehearsal = rehearse(&client, &disk.table, usize::from(pace) % 61 + 1);
    let whole = rehearse(&client, &disk.table, client.len().max(1));
    assert!(
        rehearsal == whole,
        "the handshake depends on how its bytes are cut"
    );
    let plan = rehearsal
        .session
        .as_ref()
        .map(|session| Plan::new(&mut client, rehearsal.consumed, session));
    let bound = MEMORY_BOUND + 4 * client.len();
    let received = memory::within(bound, "a connection", || {
        conversation::hold(&disk, &client, pace)
    });
    check(&disk, &rehearsal, plan.as_ref(), &client, &received);
}

/// What the handshake alone makes of the bytes.
#[derive(PartialEq)]
struct Rehearsal {
    output: Vec<u8>,
    session: Option<Session>,
    consumed: usize,
    closed: bool,
}

fn rehearse(client: &[u8], table: &Table, piece: usize) -> Rehearsal {
    let mut handshake = Handshake::new();
    let (mut output, mut consumed, mut fed) = (Vec::new(), 0, 0);
    let (mut session, mut closed) = (None, false);
    'over: loop {
        output.append(handshake.output());
        let progress = handshake.input(&client[consumed..fed], table);
        consumed += progress.consumed;
        match progress.outcome {
            Outcome::SendFirst => {}
            Outcome::NeedMore if fed < client.len() => fed = client.len().min(fed + piece),
            Outcome::NeedMore => break 'over,
            Outcome::Close => {
                closed = true;
                break 'over;
            }
            Outcome::Begin(begun) => {
                session = Some(*begun);
                break 'over;
            }
        }
    }
    output.append(handshake.output());
    if closed {
        // What follows the end of a handshake is nobody's.
        consumed = 0;
    }
    Rehearsal {
        output,
        session,
        consumed,
        closed,
    }
}

/// A request, as the rules judge it.
struct Asked {
    request: Request,
    verdict: Verdict,
    payload: Range<usize>,
}

/// How the client's bytes end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Between two requests, or in a header: everything that was asked is answered.
    Clean,
    /// In a way that costs the connection: answers may be missing.
    Broken,
}

struct Plan {
    asked: Vec<Asked>,
    ending: Ending,
    /// A write of which only a part has come: offset and length of that part.
    cut_off: Option<(u64, u64)>,
}

impl Plan {
    /// Takes the bytes behind the handshake apart, as the protocol says. Each request gets a cookie
    /// of its own, so that replies in any order find their requests.
    fn new(client: &mut [u8], start: usize, session: &Session) -> Self {
        let rules = Rules::new(session);
        let mut plan = Self {
            asked: Vec::new(),
            ending: Ending::Clean,
            cut_off: None,
        };
        let mut at = start;
        while let Some(header) = client.get_mut(at..at + REQUEST_BYTES) {
            header[8..16].copy_from_slice(&(plan.asked.len() as u64).to_be_bytes());
            let header: &[u8; REQUEST_BYTES] = (&*header).try_into().unwrap();
            let Ok(request) = Request::parse(header) else {
                plan.ending = Ending::Broken;
                break;
            };
            let verdict = rules.check(&request);
            let payload = match verdict {
                Verdict::Run(Command::Write { len, .. }) => len as usize,
                Verdict::Refuse { payload_bytes, .. } => payload_bytes as usize,
                Verdict::Run(Command::Disconnect) => break,
                Verdict::Close => {
                    plan.ending = Ending::Broken;
                    break;
                }
                _ => 0,
            };
            at += REQUEST_BYTES;
            if client.len() - at < payload {
                plan.ending = Ending::Broken;
                if let Verdict::Run(Command::Write { offset, .. }) = verdict {
                    plan.cut_off = Some((offset, (client.len() - at) as u64));
                }
                break;
            }
            plan.asked.push(Asked {
                request,
                verdict,
                payload: at..at + payload,
            });
            at += payload;
        }
        plan
    }
}

fn check(disk: &Disk, rehearsal: &Rehearsal, plan: Option<&Plan>, client: &[u8], received: &[u8]) {
    let (told, rest) = received.split_at(rehearsal.output.len().min(received.len()));
    assert!(
        told == rehearsal.output || (rehearsal.output.starts_with(told) && rehearsal.closed),
        "the front end's handshake differs from the state machine's"
    );
    let (Some(plan), Some(session)) = (plan, &rehearsal.session) else {
        assert!(rest.is_empty(), "bytes after a handshake that led nowhere");
        return disk.check(&Model::new(disk.content()), 0, 0);
    };
    let asked: Vec<Request> = plan.asked.iter().map(|asked| asked.request).collect();
    let replies = Replies::parse(rest, session, &asked, plan.ending == Ending::Broken);
    let read_only = session.export_name == disk::READ_ONLY_NAME;
    let mut model = Model::new(if read_only {
        disk::read_only_content()
    } else {
        disk.content()
    });
    let (mut last_change, mut last_flush) = (0, 0);
    for (n, asked) in plan.asked.iter().enumerate() {
        let answer = replies.answer(n);
        if let Some(answer) = answer {
            check_answer(disk, asked, answer, read_only);
        } else {
            assert!(plan.ending == Ending::Broken, "request {n} has no answer");
        }
        let Verdict::Run(command) = asked.verdict else {
            continue;
        };
        match (command, answer) {
            (Command::Read { offset, .. }, Some(Answer::Data(data))) => {
                model.expect(n, offset, data);
            }
            (Command::BlockStatus { offset, len, one }, Some(Answer::Status(told))) => {
                replies::check_status(told, session, len, one);
                model.expect_zeroes(offset, told, session);
            }
            (Command::Flush, Some(Answer::Done)) => last_flush = n + 1,
            (Command::Write { offset, fua, .. }, _) => {
                let payload = &client[asked.payload.clone()];
                model.write(n, offset, payload, fate(disk, answer));
                last_change = n + 1;
                if fua && matches!(answer, Some(Answer::Done)) {
                    last_flush = n + 1;
                }
            }
            (
                Command::WriteZeroes {
                    offset, len, fua, ..
                },
                _,
            ) => {
                model.zero(n, offset, len.into(), fate(disk, answer));
                last_change = n + 1;
                if fua && matches!(answer, Some(Answer::Done)) {
                    last_flush = n + 1;
                }
            }
            (Command::Trim { offset, len, .. }, _) => {
                let grain = if disk.is_moving() { disk::BLOCK } else { 1 };
                model.trim(n, offset, len.into(), grain, fate(disk, answer));
                last_change = n + 1;
            }
            _ => {}
        }
    }
    if let Some((offset, len)) = plan.cut_off {
        model.forget(plan.asked.len(), offset, len);
        last_change = usize::MAX;
    }
    model.settle();
    if read_only {
        disk.check(&Model::new(disk.content()), 0, 0);
        return disk::check_read_only();
    }
    disk.check(&model, last_change, last_flush);
}

/// What became of a change that was answered like this.
fn fate(disk: &Disk, answer: Option<&Answer>) -> Fate {
    match answer {
        _ if disk.wants_command() => Fate::Refused,
        Some(Answer::Error(_)) => Fate::Unknown,
        // The connection ended before the answer was sent, not before it was carried out.
        None if disk.has_refused() => Fate::Unknown,
        _ => Fate::Done,
    }
}

/// Whether this is an answer that the request may have.
fn check_answer(disk: &Disk, asked: &Asked, answer: &Answer, read_only: bool) {
    let command = match asked.verdict {
        Verdict::Run(command) => command,
        Verdict::Done => {
            assert!(matches!(answer, Answer::Done), "a no-op was not done");
            return;
        }
        Verdict::Refuse { errno, .. } => {
            assert!(
                matches!(answer, Answer::Error(code) if *code == errno.code()),
                "refused in another way than the rules say"
            );
            return;
        }
        Verdict::Close => unreachable!("ends the plan"),
    };
    let Answer::Error(code) = answer else {
        let fits = match command {
            Command::Read { len, .. } => {
                matches!(answer, Answer::Data(data) if data.len() == len as usize)
            }
            Command::BlockStatus { .. } => matches!(answer, Answer::Status(_)),
            _ => matches!(answer, Answer::Done),
        };
        assert!(fits, "an answer of the wrong kind to {command:?}");
        return;
    };
    let changes = matches!(
        command,
        Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. }
    );
    let excuse = if read_only || !disk.is_moving() {
        false
    } else if changes && disk.wants_command() && *code == Errno::Perm.code() {
        true
    } else {
        // Reads need the source, and so do writes that do not begin and end on a sector, and flushes
        // until it has flushed.
        let needs_source = matches!(
            command,
            Command::Read { .. } | Command::Cache { .. } | Command::Flush
        );
        (needs_source || changes) && disk.has_refused() && *code == Errno::Io.code()
    };
    assert!(excuse, "{command:?} failed with {code} for no reason");
}
