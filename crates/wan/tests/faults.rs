//! Servers that die, lie, hang and come back.
#![allow(clippy::unwrap_used)]

mod support;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_nbd::wire::command;
use hikkoshi_wan::{Fetched, Lane, NbdSource, Source, SourceError, SourceErrorKind, SourceWatcher};
use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
use support::fake::{Fake, Haste, Peer, Request, config, slice};
use support::{HANG, Recorder, outcome, pattern, submit_extents, submit_read, wait_until};

const SIZE: u64 = 1 << 20;

fn disk() -> Vec<u8> {
    pattern(usize::try_from(SIZE).unwrap())
}

/// A server whose first connection is ruled by `wrong` and all others are honest.
fn wrong_once(
    structured: bool,
    wrong: impl Fn(&mut Peer, &[u8]) -> io::Result<()> + Send + Sync + 'static,
) -> Fake {
    Fake::start(move |number, mut peer| {
        let disk = disk();
        // An error is a client that hung up, as most of these make it do.
        let _ = if number == 0 {
            peer.greet(SIZE, structured)
                .and_then(|()| wrong(&mut peer, &disk))
        } else {
            peer.greet(SIZE, false).and_then(|()| peer.serve(&disk))
        };
    })
}

/// One read against a wrong server; the source must come back and read the truth.
fn first_read_of(fake: &Fake) -> Result<Fetched, SourceError> {
    let source = NbdSource::connect(fake.config()).unwrap();
    let told = Recorder::watch(&*source);
    let first = outcome(&submit_read(&*source, Lane::Demand, 4096, 8192));
    let kind = first.as_ref().err().map(|error| error.kind);
    assert_eq!(
        told.recv_timeout(HANG).unwrap(),
        kind,
        "told why it went down"
    );
    assert_eq!(
        told.recv_timeout(HANG).unwrap(),
        None,
        "told that it is up again"
    );
    let again = outcome(&submit_read(&*source, Lane::Demand, 4096, 8192)).unwrap();
    assert!(again.data == disk()[4096..4096 + 8192]);
    first
}

fn kind_of(fake: &Fake) -> SourceErrorKind {
    first_read_of(fake).unwrap_err().kind
}

/// Of a path on which nothing is, TCP tells what was. And over one connection, what is asked for besides would stand before
/// demand.
#[test]
fn the_path_is_seen_while_something_is_on_it_beside_the_demand() {
    for connections in [1, 2] {
        let (go, wait) = channel::<()>();
        let wait = Mutex::new(wait);
        let fake = Fake::start(move |_, mut peer| {
            let disk = disk();
            let _ = peer.greet(SIZE, false).and_then(|()| {
                let request = peer.request()?;
                if request.command == command::READ {
                    wait.lock().unwrap().recv().map_err(io::Error::other)?;
                    peer.simple(request.cookie, 0, slice(&disk, &request))?;
                }
                // It stays.
                peer.request().map(drop)
            });
        });
        let mut config = fake.config();
        config.connections = connections;
        let source = NbdSource::connect(config).unwrap();
        wait_until("all stand", || source.connections() == connections);
        assert_eq!(source.path(), None);
        let answer = submit_read(&*source, Lane::Bulk, 0, 4096);
        let seen = source.path();
        assert_eq!(
            seen.map(|seen| seen.out_of_order),
            (connections > 1).then_some(0)
        );
        go.send(()).unwrap();
        outcome(&answer).unwrap();
        wait_until("nothing is on its way", || source.path().is_none());
    }
}

#[test]
fn a_handshake_that_ends_at_any_byte_is_an_error() {
    // Greeting 18, structured refused 20, information 32, granted 20.
    for structured in [false, true] {
        let total = 90 + if structured { 20 } else { 0 };
        for left in 1..total {
            let fake = Fake::start(move |_, mut peer| {
                peer.left = left;
                let _ = peer.greet(SIZE, structured);
            });
            let error = NbdSource::connect(fake.config())
                .err()
                .expect("no connection");
            assert_eq!(error.kind, SourceErrorKind::Disconnected, "{left}: {error}");
        }
    }
}

/// Options at once are dropped by some servers, or cost something: then they go one by one, from then
/// on without trying again.
#[test]
fn servers_that_take_no_options_at_once_are_asked_one_by_one() {
    for haste in [Haste::HangUp, Haste::Sour] {
        let dials = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&dials);
        let (go, wait) = channel::<()>();
        let wait = Mutex::new(wait);
        let fake = Fake::start(move |number, mut peer| {
            count.fetch_add(1, Ordering::SeqCst);
            let disk = disk();
            let _ = peer.greet_with(SIZE, true, haste).and_then(|()| {
                loop {
                    let read = peer.request()?;
                    peer.data(&read, read.offset, slice(&disk, &read), true)?;
                    if number == 1 {
                        // The first that stands is lost after one answer.
                        return wait.lock().unwrap().recv().map_err(io::Error::other);
                    }
                }
            });
        });
        let source = NbdSource::connect(fake.config()).unwrap();
        assert!(outcome(&submit_read(&*source, Lane::Demand, 0, 512)).is_ok());
        assert_eq!(dials.load(Ordering::SeqCst), 2, "{haste:?}");
        go.send(()).unwrap();
        wait_until("it is back", || {
            outcome(&submit_read(&*source, Lane::Demand, 0, 512)).is_ok()
        });
        assert_eq!(dials.load(Ordering::SeqCst), 3, "{haste:?}");
    }
}

/// All are dialled at the same time. The server takes one, and it is not the first; the others are left
/// waiting, or sent away.
#[test]
fn any_connection_may_be_the_first() {
    for hangs in [true, false] {
        let fake = Fake::start(move |number, mut peer| {
            let disk = disk();
            if number == 3 {
                let _ = peer.greet(SIZE, false).and_then(|()| peer.serve(&disk));
            } else if hangs {
                let _ = peer.request();
            }
        });
        let mut config = fake.config();
        config.connections = 4;
        config.several_without_promise = true;
        let source = NbdSource::connect(config).unwrap();
        for _ in 0..50 {
            assert!(outcome(&submit_read(&*source, Lane::Bulk, 0, 65536)).is_ok());
        }
        assert_eq!(source.connections(), 1);
    }
}

#[test]
fn when_no_connection_stands_the_reason_is_told() {
    let fake = Fake::start(|_, mut peer| {
        let _ = peer.send(b"HTTP/1.1 400 no\r\n\r\n");
    });
    let mut config = fake.config();
    config.connections = 4;
    config.several_without_promise = true;
    let error = NbdSource::connect(config).err().unwrap();
    assert_eq!(error.kind, SourceErrorKind::Untrusted, "{error}");
}

#[test]
fn an_answer_to_nobody_is_not_believed() {
    let fake = wrong_once(false, |peer, disk| {
        let request = peer.request()?;
        let mut cookie = request.cookie;
        cookie[0] ^= 0x80;
        peer.simple(cookie, 0, slice(disk, &request))
    });
    assert_eq!(kind_of(&fake), SourceErrorKind::Untrusted);
}

#[test]
fn too_long_too_short_and_twice_are_not_believed() {
    type Wrong = fn(&mut Peer, &Request, &[u8]) -> io::Result<()>;
    let wrongs: [Wrong; 5] = [
        |peer, request, data| peer.data(request, request.offset, &[data, &[0]].concat(), true),
        |peer, request, data| peer.data(request, request.offset, &data[1..], true),
        |peer, request, data| peer.data(request, request.offset + 1, data, true),
        |peer, request, data| {
            peer.data(request, request.offset, data, false)?;
            peer.data(request, request.offset + 5, &data[5..6], true)
        },
        |peer, request, data| peer.simple(request.cookie, 0, data),
    ];
    for wrong in wrongs {
        let fake = wrong_once(true, move |peer, disk| {
            let request = peer.request()?;
            wrong(peer, &request, slice(disk, &request))?;
            // What comes after must not matter.
            peer.request().map(|_| ())
        });
        assert_eq!(kind_of(&fake), SourceErrorKind::Untrusted);
    }
}

#[test]
fn chunks_out_of_order_are_put_in_place() {
    let fake = wrong_once(true, |peer, disk| {
        let request = peer.request()?;
        let data = slice(disk, &request);
        for (start, end, done) in [(5000, 8192, false), (100, 5000, false), (0, 100, true)] {
            let offset = request.offset + u64::try_from(start).unwrap();
            peer.data(&request, offset, &data[start..end], done)?;
        }
        peer.request().map(|_| ())
    });
    let source = NbdSource::connect(fake.config()).unwrap();
    let fetched = outcome(&submit_read(&*source, Lane::Demand, 4096, 8192)).unwrap();
    assert!(fetched.data == disk()[4096..4096 + 8192]);
    assert_eq!(fetched.wire_bytes, 28 + 3 * 28 + 8192);
}

#[test]
fn death_inside_a_payload_fails_everything_outstanding_once() {
    for sent in [1, 15, 16, 17, 4000, 16 + 8191] {
        let fake = wrong_once(false, move |peer, disk| {
            let request = peer.request()?;
            peer.left = sent;
            peer.simple(request.cookie, 0, slice(disk, &request))
        });
        assert_eq!(
            kind_of(&fake),
            SourceErrorKind::Disconnected,
            "after {sent} bytes"
        );
    }
    let (go, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let fake = wrong_once(false, move |peer, disk| {
        let request = peer.request()?;
        for _ in 1..20 {
            peer.request()?;
        }
        // What is asked after its death is for the next one to answer.
        wait.lock().unwrap().recv().map_err(io::Error::other)?;
        peer.left = 5000;
        peer.simple(request.cookie, 0, slice(disk, &request))
    });
    let mut config = fake.config();
    config.bulk_in_flight = 20;
    let source = NbdSource::connect(config).unwrap();
    let answers: Vec<_> = (0..100)
        .map(|index| submit_read(&*source, Lane::Bulk, index * 8192, 8192))
        .collect();
    go.send(()).unwrap();
    for answer in answers {
        assert_eq!(
            outcome(&answer).unwrap_err().kind,
            SourceErrorKind::Disconnected
        );
    }
}

#[test]
fn an_error_is_for_one_request_only() {
    let fake = Fake::start(|_, mut peer| {
        let disk = disk();
        let _ = peer.greet(SIZE, false).and_then(|()| {
            let request = peer.request()?;
            peer.simple(request.cookie, 5, &[])?;
            peer.serve(&disk)
        });
    });
    let source = NbdSource::connect(fake.config()).unwrap();
    let error = outcome(&submit_read(&*source, Lane::Demand, 0, 512)).unwrap_err();
    assert_eq!(error.kind, SourceErrorKind::Refused);
    assert!(outcome(&submit_read(&*source, Lane::Demand, 0, 512)).is_ok());
    let local = outcome(&submit_extents(&*source, 0, SIZE)).unwrap();
    assert_eq!(local.wire_bytes, 0);
}

#[test]
fn a_silent_server_is_given_up() {
    let fake = wrong_once(false, |peer, _| {
        peer.request()?;
        peer.request().map(|_| ())
    });
    let mut config = fake.config();
    config.progress_timeout = Some(Duration::from_millis(200));
    let source = NbdSource::connect(config).unwrap();
    let error = outcome(&submit_read(&*source, Lane::Demand, 0, 512)).unwrap_err();
    assert_eq!(error.kind, SourceErrorKind::Disconnected);
    assert!(error.to_string().contains("no byte came"), "{error}");
}

#[test]
fn a_second_connection_that_hangs_disturbs_nobody() {
    let fake = Fake::start(|number, mut peer| {
        let disk = disk();
        if number == 0 {
            let _ = peer.greet(SIZE, false).and_then(|()| peer.serve(&disk));
        } else {
            // Accepted by the kernel, never greeted: ends when the client gives up.
            let _ = peer.request();
        }
    });
    let mut config = fake.config();
    config.connections = 4;
    let source = NbdSource::connect(config).unwrap();
    for _ in 0..200 {
        outcome(&submit_read(&*source, Lane::Bulk, 0, 65536)).unwrap();
    }
    assert_eq!(source.connections(), 1);
}

#[test]
fn another_disk_is_not_taken_for_the_one_before() {
    let fake = Fake::start(|number, mut peer| {
        let disk = disk();
        let size = if number == 1 { SIZE + 512 } else { SIZE };
        let _ = peer.greet(size, false).and_then(|()| match number {
            0 => peer.request().map(|_| ()),
            _ => peer.serve(&disk),
        });
    });
    let source = NbdSource::connect(fake.config()).unwrap();
    let told = Recorder::watch(&*source);
    let lost = outcome(&submit_read(&*source, Lane::Demand, 0, 512)).unwrap_err();
    assert_eq!(lost.kind, SourceErrorKind::Disconnected);
    let heard: Vec<_> = (0..3).map(|_| told.recv_timeout(HANG).unwrap()).collect();
    let (gone, wrong) = (SourceErrorKind::Disconnected, SourceErrorKind::Untrusted);
    assert_eq!(heard, [Some(gone), Some(wrong), None]);
    assert_eq!(source.info().size_bytes, SIZE);
    assert!(outcome(&submit_read(&*source, Lane::Demand, 0, 512)).is_ok());
}

#[test]
fn bulk_that_is_waited_for_overtakes_bulk_in_the_queue() {
    let lanes = [Lane::Bulk; 4];
    // The first is on its way; the last is waited for.
    assert_eq!(order_of(&lanes, Some((3 * 512 + 100, 1))), [0, 3, 1, 2]);
}

#[test]
fn demand_overtakes_bulk_in_the_queue() {
    let lanes = [
        Lane::Bulk,
        Lane::Bulk,
        Lane::Bulk,
        Lane::Demand,
        Lane::Demand,
        Lane::Demand,
    ];
    assert_eq!(order_of(&lanes, None), [0, 3, 4, 5, 1, 2]);
}

/// Plain NBD cannot tell a server what is urgent: it is asked for first.
#[test]
fn what_is_more_urgent_is_asked_for_first() {
    let lanes = [
        Lane::Bulk,
        Lane::Late,
        Lane::Bulk,
        Lane::Hot,
        Lane::Ahead,
        Lane::Rest,
        Lane::Rest,
        Lane::Demand,
    ];
    // The first of either queue is on its way before anything else is known.
    assert_eq!(order_of(&lanes, None), [0, 5, 7, 6, 4, 3, 2, 1]);
}

/// In which order sectors are asked for that are submitted in these lanes, one of bulk and two
/// altogether being on their way at a time.
fn order_of(lanes: &[Lane], promoted: Option<(u64, u64)>) -> Vec<u64> {
    let (seen, order) = channel();
    let seen = Mutex::new(seen);
    let (go, wait) = channel::<()>();
    let wait = Mutex::new(wait);
    let fake = Fake::start(move |_, mut peer| {
        let disk = disk();
        let _: io::Result<()> = peer.greet(SIZE, false).and_then(|()| {
            wait.lock().unwrap().recv().map_err(io::Error::other)?;
            loop {
                let request = peer.request()?;
                seen.lock()
                    .unwrap()
                    .send(request.offset)
                    .map_err(io::Error::other)?;
                peer.simple(request.cookie, 0, slice(&disk, &request))?;
            }
        });
    });
    let mut config = fake.config();
    config.in_flight = 2;
    config.bulk_in_flight = 1;
    let source = NbdSource::connect(config).unwrap();
    let answers: Vec<_> = (0u64..)
        .zip(lanes)
        .map(|(index, lane)| submit_read(&*source, *lane, index * 512, 512))
        .collect();
    if let Some((offset, len)) = promoted {
        source.promote(offset, len);
    }
    go.send(()).unwrap();
    answers.iter().for_each(|answer| {
        outcome(answer).unwrap();
    });
    (0..lanes.len())
        .map(|_| order.recv_timeout(HANG).unwrap() / 512)
        .collect()
}

#[test]
fn bulk_leaves_the_first_connection_alone_and_closing_is_polite() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&log);
    let fake = Fake::start(move |number, mut peer| {
        let disk = disk();
        let _ = peer.greet(SIZE, false).and_then(|()| {
            loop {
                let request = peer.request()?;
                seen.lock()
                    .unwrap()
                    .push((number, request.command, request.offset));
                if request.command == command::DISC {
                    return Ok(());
                }
                peer.simple(request.cookie, 0, slice(&disk, &request))?;
            }
        });
    });
    let mut config = fake.config();
    config.connections = 3;
    let source = NbdSource::connect(config).unwrap();
    wait_until("three connections", || source.connections() == 3);
    for index in 1..64 {
        outcome(&submit_read(&*source, Lane::Bulk, index * 512, 512)).unwrap();
    }
    outcome(&submit_read(&*source, Lane::Demand, 0, 512)).unwrap();
    assert!(
        log.lock()
            .unwrap()
            .iter()
            .all(|&(number, _, offset)| (number == 0) == (offset == 0))
    );
    source.close();
    wait_until("three goodbyes", || {
        let log = log.lock().unwrap();
        log.iter()
            .filter(|(_, command, _)| *command == command::DISC)
            .count()
            == 3
    });
}

#[test]
fn a_source_that_is_away_is_found_when_it_comes() {
    // Bound all the time, so that nobody else gets the port, and listened on only later.
    let bound = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&bound, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listener = TcpListener::from(bound);
    let port = listener.local_addr().unwrap().port();
    let known = {
        let other = wrong_once(false, |peer, disk| peer.serve(disk));
        NbdSource::connect(other.config()).unwrap().info()
    };
    let source = NbdSource::connect_lazily(config(port), known.clone()).unwrap();
    let told = Recorder::watch(&*source);
    let early = outcome(&submit_read(&*source, Lane::Demand, 0, 512)).unwrap_err();
    assert_eq!(early.kind, SourceErrorKind::Disconnected);
    assert_eq!(source.info().size_bytes, known.size_bytes);
    listen(&listener, 16).unwrap();
    let _fake = Fake::on(listener, |_, mut peer| {
        let disk = disk();
        let _ = peer.greet(SIZE, false).and_then(|()| peer.serve(&disk));
    });
    assert_eq!(told.recv_timeout(HANG).unwrap(), None);
    assert!(outcome(&submit_read(&*source, Lane::Demand, 0, 512)).is_ok());
}

/// Holds whoever tells it that the source went until it may go on.
struct Slow(Mutex<std::sync::mpsc::Receiver<()>>);

impl SourceWatcher for Slow {
    fn source_up(&self) {}
    fn source_down(&self, _: &SourceError) {
        let _ = self.0.lock().unwrap().recv();
    }
}

/// The connection was lost and another one stood, to another disk, before the volume had heard of the
/// loss: it went on fetching, and what came was of a disk that had proved nothing.
#[test]
fn nothing_is_read_from_what_came_back_before_it_was_told_that_the_source_went() {
    let dials = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&dials);
    let fake = Fake::start(move |number, mut peer| {
        let disk = disk();
        let other = vec![0xee; disk.len()];
        let _ = peer.greet(SIZE, false).and_then(|()| {
            count.fetch_add(1, Ordering::SeqCst);
            if number == 0 {
                let read = peer.request()?;
                return peer.simple(read.cookie, 0, slice(&disk, &read));
            }
            peer.serve(&other)
        });
    });
    let source = NbdSource::connect(fake.config()).unwrap();
    let (go_on, held) = channel();
    source.watch(Arc::new(Slow(Mutex::new(held))));
    assert!(outcome(&submit_read(&*source, Lane::Demand, 0, 512)).is_ok());
    wait_until("another one stands", || dials.load(Ordering::SeqCst) == 2);
    let reads: Vec<_> = (0..100)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(2));
            assert!(!source.is_connected());
            submit_read(&*source, Lane::Demand, 0, 512)
        })
        .collect();
    go_on.send(()).unwrap();
    for read in &reads {
        let kind = outcome(read).map(|_| ()).unwrap_err().kind;
        assert_eq!(kind, SourceErrorKind::Disconnected);
    }
    // Whoever is told that one stands may ask it.
    wait_until("it is told", || source.is_connected());
    let read = outcome(&submit_read(&*source, Lane::Demand, 0, 512)).unwrap();
    assert!(read.data.iter().all(|byte| *byte == 0xee));
}

/// The volume submits from completions and may let go of the source in one.
#[test]
fn completions_may_submit_and_close() {
    let fake = wrong_once(false, |peer, disk| peer.serve(disk));
    let source = NbdSource::connect(fake.config()).unwrap();
    let (sender, receiver) = channel();
    let inner = Arc::clone(&source);
    source.read(
        Lane::Demand,
        0,
        512,
        Box::new(move |first| {
            assert!(first.is_ok());
            let again = Arc::clone(&inner);
            inner.read(
                Lane::Demand,
                512,
                512,
                Box::new(move |second| {
                    again.close();
                    sender.send(second.map(|fetched| fetched.offset)).unwrap();
                }),
            );
        }),
    );
    assert_eq!(receiver.recv_timeout(HANG).unwrap().unwrap(), 512);
    assert!(!source.is_connected());
}
