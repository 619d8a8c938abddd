//! Frames between two daemons: the same disk as over plain NBD, whatever happens on the way.
#![allow(clippy::unwrap_used)]

#[path = "site/proxy.rs"]
mod proxy;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

use hikkoshi_daemon::config::Transport;
use hikkoshi_nbd::client::{Handshake, HandshakeConfig, Progress};
use hikkoshi_wan::transport::frame::Side;
use hikkoshi_wan::transport::message::{Request, Wish, hashes_of};
use hikkoshi_wan::transport::pack::{Codec, Packing, Unpacker};
use hikkoshi_wan::transport::session::{Stance, Tell, Told};
use hikkoshi_wan::transport::{Decoder, Frame, Header, Kind, Priority};
use hikkoshi_wan::{
    Address, Hashes, Lane, MoveLine, MoveLink, NbdSource, Source, SourceErrorKind, Ticket,
};
use proxy::{Fault, Proxy, Way};
use site::{On, Site, Wanted};
use support::{Answer, conforms, outcome, pattern, submit_read, wait_until};
use tempfile::TempDir;

/// Not a multiple of anything large.
const SIZE: usize = (3 << 20) + 512;

fn submit_hashes(source: &dyn Source, offset: u64, len: u32, grain: u32) -> Answer<Hashes> {
    let (sender, receiver) = channel();
    let done = move |r| sender.send(r).unwrap();
    source.hashes(Lane::Bulk, offset, len, grain, Box::new(done));
    receiver
}

#[test]
fn frames_conform_over_tcp_and_unix() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(SIZE));
    for on in [On::Tcp, On::Unix] {
        let site = Site::with(dir.path(), "disk", &data, on);
        let source = NbdSource::connect(site.client()).unwrap();
        wait_until("all connections stand", || source.connections() == 4);
        assert!(source.speaks_frames());
        conforms(&*source, &data, &|| {});
        site.daemon.shutdown().unwrap();
    }
}

#[test]
fn either_side_can_do_without() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(SIZE));
    std::fs::write(dir.path().join("disk"), &data).unwrap();
    for (server, client) in [(Transport::Nbd, true), (Transport::Auto, false)] {
        let wanted = Wanted {
            transport: server,
            ..Wanted::plain(On::Tcp)
        };
        let site = Site::start(dir.path(), "disk", wanted);
        let mut config = site.client();
        config.frames = client;
        let source = NbdSource::connect(config).unwrap();
        assert!(!source.speaks_frames());
        let hashes = outcome(&submit_hashes(&*source, 0, 1 << 20, 65536)).unwrap();
        assert!(!hashes.at_source && hashes.hashes == hashes_of(&data[..1 << 20], 65536));
        conforms(&*source, &data, &|| {});
        site.daemon.shutdown().unwrap();
    }
}

#[test]
fn hashes_are_made_at_the_source() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(SIZE));
    let site = Site::with(dir.path(), "disk", &data, On::Tcp);
    let source = NbdSource::connect(site.client()).unwrap();
    for (offset, len, grain) in [(0, SIZE, 65536), (512, 4096, 512), (777, 1 << 20, 4096)] {
        let asked = u64::try_from(offset).unwrap();
        let len = len - offset % 512;
        let answer = submit_hashes(&*source, asked, u32::try_from(len).unwrap(), grain);
        let hashes = outcome(&answer).unwrap();
        assert!(hashes.at_source && hashes.offset == asked);
        let end = (offset + len).min(SIZE);
        assert!(hashes.hashes == hashes_of(&data[offset..end], grain));
        assert!(hashes.wire_bytes < 2000 + 32 * hashes.hashes.len() as u64);
    }
    let outside = submit_hashes(&*source, 4096, u32::try_from(SIZE).unwrap(), 65536);
    let refused = outcome(&outside).unwrap_err();
    assert_eq!(refused.kind, SourceErrorKind::Refused);
    source.close();
    site.daemon.shutdown().unwrap();
}

#[test]
fn zeroes_do_not_cross_the_link() {
    let dir = TempDir::new().unwrap();
    let mut data = vec![0; 1 << 20];
    data[300_000..301_000].fill(7);
    let site = Site::with(dir.path(), "disk", &data, On::Tcp);
    let source = NbdSource::connect(site.client()).unwrap();
    let fetched = outcome(&submit_read(&*source, Lane::Bulk, 0, 1 << 20)).unwrap();
    assert!(fetched.data == data);
    // One block of 4 KiB with data; the file has no hole.
    assert!(
        fetched.wire_bytes < 4096 + 64 * 40,
        "{}",
        fetched.wire_bytes
    );
    let zero: u64 = fetched.holes.iter().map(|(_, len)| len).sum();
    assert_eq!(zero, (1 << 20) - 4096);
    source.close();
    site.daemon.shutdown().unwrap();
}

fn tcp(site: &Site) -> SocketAddr {
    let Address::Tcp { host, port } = site.address() else {
        panic!("not over TCP");
    };
    format!("{host}:{port}").parse().unwrap()
}

/// Reads the disk over a link whose first connection has a fault, until all of it has come. Gives
/// the kinds of the errors on the way, and how many were found by a checksum.
fn read_through(site: &Site, data: &[u8], fault: Fault, way: Way) -> (Vec<SourceErrorKind>, u64) {
    let plan = move |number, going| match (number, going == way) {
        (0, true) => fault,
        _ => Fault::None,
    };
    let proxy = Proxy::start(tcp(site), Arc::new(plan));
    let mut config = support::fake::config(proxy.port());
    // What is lost is missed only by waiting for it. What is changed is seen, and a connection that a slow
    // machine lets stall must not be gone before its fault comes.
    config.progress_timeout = match fault {
        Fault::Flip(_) | Fault::FlipEvery(_) | Fault::End(_) => None,
        _ => Some(Duration::from_secs(1)),
    };
    // So many bytes cross the link as the disk has.
    config.packing = Packing::None;
    let source = NbdSource::connect(config).unwrap();
    assert!(source.speaks_frames(), "the fault is behind the handshake");
    let len = 128 << 10;
    let mut errors = Vec::new();
    for at in (0..data.len()).step_by(len) {
        let end = data.len().min(at + len);
        let size = u32::try_from(end - at).unwrap();
        loop {
            let answer = submit_read(&*source, Lane::Bulk, at as u64, size);
            match outcome(&answer) {
                Ok(fetched) => {
                    assert!(
                        fetched.data == data[at..end],
                        "{fault:?}: wrong bytes at {at}"
                    );
                    break;
                }
                Err(error) => errors.push(error.kind),
            }
            wait_until("it is back", || source.is_connected());
        }
    }
    (errors, source.checksum_failures())
}

/// Bytes that are exchanged before the first frame, with room to spare.
const HANDSHAKE: usize = 600;

#[test]
fn whatever_the_link_does_no_wrong_byte_comes() {
    let dir = TempDir::new().unwrap();
    // No zeroes, so that bytes at a place of the stream are bytes of the disk.
    let data: Vec<u8> = pattern(SIZE).into_iter().map(|b| b | 1).collect();
    let site = Site::with(dir.path(), "disk", &data, On::Tcp);
    let (mut found, mut untrusted) = (0, 0);
    let mut flips: Vec<usize> = (0..48).map(|n| 70_000 + n).collect();
    flips.extend((1..40).map(|n| HANDSHAKE + n * 70_001));
    for at in flips {
        let (errors, checksums) = read_through(&site, &data, Fault::Flip(at), Way::ToClient);
        assert!(errors.contains(&SourceErrorKind::Untrusted), "flip at {at}");
        found += checksums;
        untrusted += 1;
    }
    // A flip in a magic number is seen before its checksum is looked at.
    assert!(found > untrusted * 8 / 10, "{found} of {untrusted}");
    for at in [900, 1_000_000] {
        for len in [1, 40, 4096] {
            let at = at + len;
            for fault in [
                Fault::Twice(at, len),
                Fault::Swap(at, len),
                Fault::Lose(at, len),
            ] {
                let (errors, _) = read_through(&site, &data, fault, Way::ToClient);
                assert!(!errors.is_empty(), "{fault:?} went unnoticed");
            }
        }
        let (errors, _) = read_through(&site, &data, Fault::End(at), Way::ToClient);
        assert!(errors.contains(&SourceErrorKind::Disconnected));
    }
    site.daemon.shutdown().unwrap();
}

#[test]
fn changed_requests_are_not_served() {
    let dir = TempDir::new().unwrap();
    let data = pattern(SIZE);
    let site = Site::with(dir.path(), "disk", &data, On::Tcp);
    // The client's half of the handshake has some 200 bytes; requests follow.
    for fault in [
        Fault::Flip(300),
        Fault::Flip(413),
        Fault::Lose(300, 7),
        Fault::Twice(500, 40),
        Fault::Swap(500, 40),
        Fault::End(333),
    ] {
        let (errors, _) = read_through(&site, &data, fault, Way::ToServer);
        assert!(!errors.is_empty(), "{fault:?} went unnoticed");
    }
    site.daemon.shutdown().unwrap();
}

#[test]
fn a_move_over_a_link_that_changes_bytes_is_right_in_the_end() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(16 << 20));
    let old = Site::with(dir.path(), "old", &data, On::Tcp);
    let plan = |number, way| match (number, way) {
        (0..12, Way::ToClient) => Fault::FlipEvery(300_001),
        _ => Fault::None,
    };
    let proxy = Proxy::start(tcp(&old), Arc::new(plan));
    let uri = format!("nbd://127.0.0.1:{}/", proxy.port());
    let new = Site::start(dir.path(), "new", Wanted::from(On::Unix, &uri));
    wait_until("every block is here", || new.is_local());
    assert!(proxy.connections.load(Ordering::SeqCst) > 4);
    assert!(new.status().counters.checksum_failures > 0);
    new.daemon.shutdown().unwrap();
    assert!(std::fs::read(dir.path().join("new")).unwrap() == data);
    old.daemon.shutdown().unwrap();
}

/// B has next to nothing when C moves on from it: what is missing comes from A.
#[test]
fn a_chain_of_moves_needs_no_complete_link() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(8 << 20));
    let a = Site::with(dir.path(), "a", &data, On::Tcp);
    let mut wanted = Wanted::from(On::Tcp, &a.uri());
    wanted.source().background = false;
    let b = Site::start(dir.path(), "b", wanted);
    let source = NbdSource::connect(b.client()).unwrap();
    assert!(source.speaks_frames());
    let hashes = outcome(&submit_hashes(&*source, 0, 4 << 20, 65536)).unwrap();
    assert!(hashes.at_source && hashes.hashes == hashes_of(&data[..4 << 20], 65536));
    source.close();
    let c = Site::start(dir.path(), "c", Wanted::from(On::Unix, &b.uri()));
    wait_until("every block is at C", || c.is_local());
    assert!(b.status().counters.reads_remote > 0);
    c.daemon.shutdown().unwrap();
    assert!(std::fs::read(dir.path().join("c")).unwrap() == data);
    b.daemon.shutdown().unwrap();
    a.daemon.shutdown().unwrap();
}

#[test]
fn a_move_goes_on_after_restarts_of_either_side() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(24 << 20));
    let path = dir.path().join("old.sock");
    let mut old = Some(Site::with(dir.path(), "old", &data, On::Unix));
    let uri = format!("nbd+unix:///?socket={}", path.display());
    let wanted = || {
        let mut wanted = Wanted::from(On::Unix, &uri);
        // Slow enough for the restarts to fall into the move.
        wanted.source().max_rate = Some(16 << 20);
        wanted
    };
    let mut here = 0;
    for round in 0..3 {
        let new = Site::start(dir.path(), "new", wanted());
        let before = here;
        wait_until("some of it is here", || {
            here = new.status().resident_bytes;
            here > before + (1 << 20)
        });
        if round == 1 {
            old.take().unwrap().daemon.shutdown().unwrap();
            wait_until("it is missed", || {
                new.status().source_connected == Some(false)
            });
            old = Some(Site::start(dir.path(), "old", Wanted::plain(On::Unix)));
        }
        new.daemon.shutdown().unwrap();
    }
    let new = Site::start(dir.path(), "new", wanted());
    new.export().set_limit(None).unwrap();
    wait_until("every block is here", || new.is_local());
    new.daemon.shutdown().unwrap();
    assert!(std::fs::read(dir.path().join("new")).unwrap() == data);
    old.unwrap().daemon.shutdown().unwrap();
}

/// A destination that is played by hand.
struct Raw {
    stream: TcpStream,
    decoder: Decoder,
}

impl Raw {
    fn connect(site: &Site) -> Self {
        let mut stream = TcpStream::connect(tcp(site)).unwrap();
        let mut handshake = Handshake::new(HandshakeConfig {
            export: String::new(),
            structured: true,
            allocation: true,
            transport: true,
            opening: Vec::new(),
        })
        .unwrap();
        loop {
            stream.write_all(&handshake.take_output()).unwrap();
            let mut bytes = vec![0; handshake.needed()];
            stream.read_exact(&mut bytes).unwrap();
            if let Progress::Done(negotiated) = handshake.receive(&bytes).unwrap() {
                assert!(negotiated.transport);
                let decoder = Decoder::new(Side::Server);
                return Self { stream, decoder };
            }
        }
    }

    fn send(&mut self, request: Request) {
        self.stream.write_all(&request.encode()).unwrap();
    }

    fn read(&mut self, id: u64, priority: Priority, offset: u64, len: u32) {
        self.send(Request::Wish {
            id,
            priority,
            wish: Wish::Read {
                packing: Packing::None,
            },
            offset,
            len,
        });
    }

    /// The next frame; `None` at the end of the stream.
    fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(n) if n > 0 => self.decoder.push(&chunk[..n]),
                _ => return None,
            }
        }
    }

    /// Frames up to the last one of a request; how many others' came before it.
    fn until_last(&mut self, id: u64) -> (Frame, usize) {
        let mut others = 0;
        loop {
            let frame = self.frame().expect("the server is there");
            if frame.header.id == id && frame.header.last {
                return (frame, others);
            }
            others += usize::from(frame.header.id != id);
        }
    }
}

/// The link is full of bulk: 32 MiB are more than the kernel takes while nobody reads.
#[test]
fn what_is_urgent_overtakes_and_what_is_cancelled_ends() {
    let dir = TempDir::new().unwrap();
    let data = vec![0x5a; 96 << 20];
    let site = Site::with(dir.path(), "disk", &data, On::Tcp);
    let bulk = 32 << 20;
    let quanta = 512;
    let mut raw = Raw::connect(&site);
    raw.read(1, Priority::COLD, 0, bulk);
    assert_eq!(raw.frame().unwrap().header.kind, Kind::Data);
    raw.send(Request::Ping(2, Priority::DEMAND));
    let (end, before) = raw.until_last(2);
    assert_eq!(end.header.kind, Kind::End);
    assert!(before + 1 < quanta, "{before} quanta went before");
    raw.read(3, Priority::DEMAND, 4096, 4096);
    let (demand, _) = raw.until_last(3);
    assert_eq!(demand.payload, vec![0x5a; 4096]);
    assert_eq!(raw.until_last(1).0.header.kind, Kind::Data);

    // The second of two is promoted, and the first, which is cancelled, ends at once, whichever of them is first.
    raw.read(4, Priority::COLD, 0, bulk);
    raw.read(5, Priority::COLD, 32 << 20, 1 << 20);
    raw.send(Request::Promote(5, Priority::DEMAND));
    raw.send(Request::Cancel(4));
    let mut last = HashMap::new();
    while last.len() < 2 {
        let frame = raw.frame().expect("the server is there");
        if frame.header.last {
            last.insert(frame.header.id, frame.header);
        }
    }
    assert_eq!(last[&5].priority, Priority::DEMAND);
    assert_eq!(last[&4].kind, Kind::End);
    site.daemon.shutdown().unwrap();
}

/// What came of a disk, in order for each request.
struct InOrder<'a> {
    disk: &'a [u8],
    unpacker: Unpacker,
    /// Where each request's next byte is.
    next: HashMap<u64, u64>,
}

impl InOrder<'_> {
    fn take(&mut self, frame: &Frame) {
        let Header {
            id,
            kind,
            packing,
            offset,
            span,
            ..
        } = frame.header;
        if kind == Kind::End {
            return;
        }
        assert_eq!(kind, Kind::Data);
        let next = self.next.entry(id).or_insert(offset);
        assert_eq!(offset, *next, "of request {id}");
        *next += u64::from(span);
        let mut bytes = Vec::new();
        let span = usize::try_from(span).unwrap();
        match Codec::from_flags(packing).unwrap() {
            None => bytes.extend(&frame.payload),
            Some(codec) => {
                let whole = self
                    .unpacker
                    .unpack(codec, &frame.payload, span, &mut bytes);
                whole.expect("the stream is in order");
            }
        }
        let at = usize::try_from(offset).unwrap();
        assert!(bytes == self.disk[at..at + span]);
    }

    fn take_until_last(&mut self, raw: &mut Raw, id: u64) -> Frame {
        loop {
            let frame = raw.frame().expect("the server is there");
            self.take(&frame);
            if frame.header.id == id && frame.header.last {
                return frame;
            }
        }
    }
}

/// What waits for room on the path is compressed already: what passes it is no part of the stream. And no
/// quantum passes another one of its request, whether that has become urgent or is cancelled.
#[test]
fn what_is_held_back_stays_in_order() {
    let dir = TempDir::new().unwrap();
    // Shrinks to somewhat more than half, which is still more than the kernel takes while nobody reads.
    let mut data = vec![1; 32 << 20];
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    for block in data.chunks_mut(16) {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        block[..8].copy_from_slice(&noise.to_le_bytes());
    }
    let site = Site::with(dir.path(), "disk", &data, On::Tcp);
    let all = u32::try_from(data.len()).unwrap();
    let mut raw = Raw::connect(&site);
    let mut got = InOrder {
        disk: &data,
        unpacker: Unpacker::default(),
        next: HashMap::new(),
    };
    let wish = |id, priority, offset, len| Request::Wish {
        id,
        priority,
        wish: Wish::Read {
            packing: Packing::Zstd(1),
        },
        offset,
        len,
    };
    let mut id = 0;
    for cancelled in [false, true] {
        id += 1;
        let bulk = id;
        raw.send(wish(bulk, Priority::COLD, 0, all));
        let mut passed = false;
        while !passed {
            id += 1;
            raw.send(wish(id, Priority::DEMAND, id * 4096, 4096));
            let last = got.take_until_last(&mut raw, id);
            passed = last.header.packing == Codec::flags(None);
            let come = got.next.get(&bulk).copied().unwrap_or(0);
            assert!(come < u64::from(all), "nothing is ever held back");
        }
        let end = match cancelled {
            true => {
                raw.send(Request::Cancel(bulk));
                Kind::End
            }
            false => {
                raw.send(Request::Promote(bulk, Priority::DEMAND));
                Kind::Data
            }
        };
        let last = got.take_until_last(&mut raw, bulk);
        assert_eq!(last.header.kind, end);
        assert_eq!(cancelled, got.next[&bulk] < all.into());
    }
    site.daemon.shutdown().unwrap();
}

#[test]
fn nonsense_costs_a_client_its_connection_and_nobody_else() {
    let dir = TempDir::new().unwrap();
    let site = Site::with(dir.path(), "disk", &pattern(SIZE), On::Tcp);
    let mut good = Raw::connect(&site);
    let size = u64::try_from(SIZE).unwrap();
    let wish = |id, offset, len| Request::Wish {
        id,
        priority: Priority::DEMAND,
        wish: Wish::Read {
            packing: Packing::None,
        },
        offset,
        len,
    };
    let reply = Header::request(Kind::End, Priority::DEMAND, 1, 0, 0);
    let nonsense: [Vec<u8>; 7] = [
        vec![0; 40],
        vec![0xff; 1000],
        wish(1, size, 1).encode(),
        [wish(1, 0, 1).encode(), wish(1, 0, 1).encode()].concat(),
        Request::Cancel(7).encode(),
        Header {
            last: true,
            ..reply
        }
        .encode()
        .to_vec(),
        [&wish(1, 0, 1).encode()[..39], &[0]].concat(),
    ];
    for (number, bytes) in nonsense.iter().enumerate() {
        let mut raw = Raw::connect(&site);
        raw.stream.write_all(bytes).unwrap();
        while raw.frame().is_some() {}
        good.read(u64::try_from(number).unwrap(), Priority::DEMAND, 0, 512);
        let answer = good.frame().unwrap();
        assert!(answer.header.last, "{number}: {answer:?}");
    }
    site.daemon.shutdown().unwrap();
}

/// Requests may be sent behind ATTACH. Whoever is refused gets the reason, and nothing else.
#[test]
fn nothing_is_answered_behind_a_refused_attach() {
    let dir = TempDir::new().unwrap();
    let site = Site::with(dir.path(), "disk", &pattern(1 << 20), On::Tcp);
    let mut raw = Raw::connect(&site);
    // The disk was never handed over to it, so its fence is gone, or there never was one.
    let attach = Tell::Attach {
        id: [7; 16],
        stance: Stance::Arriving,
        epoch: 0,
        base: None,
    };
    let payload = attach.encode();
    let header = Header::request(Kind::Tell, Priority::DEMAND, 0, 0, 0).with_payload(&payload);
    let read = Request::Wish {
        id: 0,
        priority: Priority::DEMAND,
        wish: Wish::Read {
            packing: Packing::None,
        },
        offset: 0,
        len: 65536,
    };
    let sent = [&header.encode()[..], &payload, &read.encode()].concat();
    raw.stream.write_all(&sent).unwrap();
    let told = raw.frame().unwrap();
    assert_eq!(told.header.kind, Kind::Told);
    let told = Told::decode(&told.payload, 1 << 20);
    assert!(matches!(told, Some(Told::Refused(_))), "{told:?}");
    assert!(raw.frame().is_none(), "the end of the stream");
    drop(raw);
    site.daemon.shutdown().unwrap();
}

/// What is last to be said of a move is said when the source is needed no more.
#[test]
fn the_connection_for_the_move_outlives_the_source() {
    let dir = TempDir::new().unwrap();
    let site = Site::with(dir.path(), "disk", &pattern(1 << 20), On::Tcp);
    let mut config = site.client();
    config.several_without_promise = true;
    config.ticket = Some(Ticket::new([7; 16], None, Stance::Standby, false));
    let source = NbdSource::connect(config.clone()).unwrap();
    wait_until("all connections stand", || source.connections() == 4);
    let line = MoveLine::new(config);
    let patience = Duration::from_secs(30);
    assert!(line.tell(&Tell::Heat { id: [7; 16] }, patience).is_ok());
    source.close();
    let told = line.tell(&Tell::Done { id: [7; 16] }, patience);
    assert_eq!(told.unwrap(), Told::Fine);
    site.daemon.shutdown().unwrap();
}

/// All connections are refused, the one for the move as well: somebody has to say so.
#[test]
fn a_source_that_refuses_the_move_says_why() {
    let dir = TempDir::new().unwrap();
    let site = Site::with(dir.path(), "disk", &pattern(1 << 20), On::Tcp);
    let mut config = site.client();
    config.several_without_promise = true;
    config.ticket = Some(Ticket::new([7; 16], None, Stance::Arriving, true));
    let error = NbdSource::connect(config).err().unwrap();
    assert_eq!(error.kind, SourceErrorKind::Untrusted, "{error}");
    site.daemon.shutdown().unwrap();
}

/// The client reads nothing while its completion waits, so the server cannot send all of the first.
#[test]
fn the_server_is_told_what_a_guest_waits_for() {
    let dir = TempDir::new().unwrap();
    let site = Site::with(dir.path(), "disk", &vec![0x5a; 96 << 20], On::Tcp);
    let mut config = site.client();
    config.connections = 1;
    let source = NbdSource::connect(config).unwrap();
    let (go, wait) = channel::<()>();
    let (told, first) = channel();
    source.read(
        Lane::Demand,
        0,
        512,
        Box::new(move |_| {
            told.send(()).unwrap();
            let _ = wait.recv();
        }),
    );
    first.recv().unwrap();
    let (done, order) = channel();
    for (index, len) in [32 << 20, 1 << 20].into_iter().enumerate() {
        let done = done.clone();
        let told = move |outcome: Result<_, _>| {
            assert!(outcome.is_ok());
            done.send(index).unwrap();
        };
        let offset = u64::try_from(index).unwrap() * (32 << 20);
        source.read(Lane::Bulk, offset, len, Box::new(told));
    }
    // What is asked for waits there, and is no queue on the path.
    assert_eq!(source.path().map(|seen| seen.queue), Some(false));
    source.promote((32 << 20) + 4096, 1);
    go.send(()).unwrap();
    let order: Vec<usize> = (0..2).map(|_| order.recv().unwrap()).collect();
    assert_eq!(order, [1, 0]);
    source.close();
    site.daemon.shutdown().unwrap();
}

/// What a guest will read next is sent before the background copy, and that before what it is likely to
/// overwrite, however long the others have waited.
#[test]
fn the_server_sends_what_is_more_urgent_first() {
    let dir = TempDir::new().unwrap();
    let site = Site::with(dir.path(), "disk", &vec![0x5a; 128 << 20], On::Tcp);
    let mut config = site.client();
    config.connections = 1;
    let source = NbdSource::connect(config).unwrap();
    let (go, wait) = channel::<()>();
    let (told, first) = channel();
    source.read(
        Lane::Demand,
        0,
        512,
        Box::new(move |_| {
            told.send(()).unwrap();
            let _ = wait.recv();
        }),
    );
    first.recv().unwrap();
    let (done, order) = channel();
    // The first is longer than what is sent before anybody reads.
    let asked = [
        (Lane::Late, 32 << 20),
        (Lane::Bulk, 32 << 20),
        (Lane::Hot, 1 << 20),
        (Lane::Ahead, 1 << 20),
        (Lane::Rest, 1 << 20),
    ];
    for (index, (lane, len)) in asked.into_iter().enumerate() {
        let done = done.clone();
        let told = move |outcome: Result<_, _>| {
            assert!(outcome.is_ok());
            done.send(lane).unwrap();
        };
        let offset = u64::try_from(index).unwrap() << 24;
        source.read(lane, offset, len, Box::new(told));
    }
    go.send(()).unwrap();
    let order: Vec<Lane> = asked.iter().map(|_| order.recv().unwrap()).collect();
    let urgent_first: Vec<Lane> = asked.iter().rev().map(|(lane, _)| *lane).collect();
    assert_eq!(order, urgent_first);
    source.close();
    site.daemon.shutdown().unwrap();
}

/// Far more disk than one question for extents covers, with data at its ends and in the middle: all of
/// it comes, and of the rest hardly a byte.
#[test]
fn a_large_sparse_disk_is_scanned_and_only_data_comes() {
    let dir = TempDir::new().unwrap();
    let size: u64 = 40 << 30;
    let places = [0, 17 << 30, (33 << 30) + 4096, size - 8192];
    let image = std::fs::File::create(dir.path().join("old")).unwrap();
    image.set_len(size).unwrap();
    for at in places {
        image.write_all_at(&pattern(8192), at).unwrap();
    }
    for transport in [Transport::Auto, Transport::Nbd] {
        let wanted = Wanted {
            transport,
            ..Wanted::plain(On::Tcp)
        };
        let old = Site::start(dir.path(), "old", wanted);
        let name = format!("{transport:?}");
        let new = Site::start(dir.path(), &name, Wanted::from(On::Unix, &old.uri()));
        wait_until("it is local", || new.is_local());
        let arrived = std::fs::File::open(&new.image).unwrap();
        for at in places {
            let mut found = vec![0; 8192];
            arrived.read_exact_at(&mut found, at).unwrap();
            assert!(found == pattern(8192), "the data at {at}");
        }
        let wire = new.status().wire_bytes;
        assert!(wire < 1 << 20, "{wire} bytes crossed the link");
        new.daemon.shutdown().unwrap();
        old.daemon.shutdown().unwrap();
    }
}

/// What is read most at the source is what comes first, without anybody saying so.
#[test]
fn the_source_tells_what_to_copy_first() {
    let (dir, data) = (TempDir::new().unwrap(), pattern(24 << 20));
    let old = Site::with(dir.path(), "old", &data, On::Tcp);
    let mut plain = old.client();
    plain.frames = false;
    let guest = NbdSource::connect(plain).unwrap();
    for _ in 0..20 {
        let read = submit_read(&*guest, Lane::Demand, 20 << 20, 1 << 20);
        outcome(&read).unwrap();
    }
    guest.close();
    let mut wanted = Wanted::from(On::Unix, &old.uri());
    wanted.source().max_rate = Some(1 << 20);
    let new = Site::start(dir.path(), "new", wanted);
    wait_until("something is here", || {
        new.status().resident_bytes > 3 << 20
    });
    // Heat is handed on, and what was hot is here although the rest is not.
    let map = new.export().heat();
    assert!(
        map.regions
            .iter()
            .any(|region| region.region == 20 && region.reads > 0)
    );
    let counters = new.status().counters;
    let mut client = new.client();
    client.frames = false;
    let guest = NbdSource::connect(client).unwrap();
    outcome(&submit_read(&*guest, Lane::Demand, 20 << 20, 1 << 20)).unwrap();
    guest.close();
    let after = new.status();
    assert_eq!(after.counters.reads_remote, counters.reads_remote);
    assert!(after.absent_bytes > 0, "everything was here already");
    new.daemon.shutdown().unwrap();
    old.daemon.shutdown().unwrap();
}
