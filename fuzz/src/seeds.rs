//! The inputs that fuzzing starts from, made by a program: small, and each shows what a peer does
//! that means well. `cargo run -p hikkoshi-fuzz --example seeds` writes them as `seed-*` into the
//! corpus; a test holds the files against this.

use hikkoshi_nbd::client::{Handshake, HandshakeConfig, Progress, encode_request};
use hikkoshi_nbd::wire::{self, command, info, option, reply};

use crate::nbd_client::script::op as server;
use crate::nbd_server::script::{op as client, put_option};

/// An input: target, name, content.
pub type Seed = (&'static str, String, Vec<u8>);

/// All seeds.
pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target, seeds_of: Vec<(&str, Vec<u8>)>| {
        for (name, content) in seeds_of {
            seeds.push((target, format!("seed-{name}"), content));
        }
    };
    add("nbd_server", nbd_server());
    add("nbd_client", nbd_client());
    add("state", state());
    add("transport", transport());
    add("control", control());
    add("config", config());
    add("frames", frames());
    seeds
}

/// Kind of disk, pace and luck, then parts of a program.
fn program(head: [u8; 3], parts: &[&[u8]]) -> Vec<u8> {
    let mut out = vec![head[0] | 0x80, head[1], head[2]];
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out
}

fn nbd_server() -> Vec<(&'static str, Vec<u8>)> {
    use client::{
        ABORT, CACHE, DISCONNECT, EXPORT_NAME, FLAGS, FLUSH, GO, INFO, LIST, LIST_CONTEXTS, READ,
        SET_CONTEXTS, STATUS, STRUCTURED, TRIM, WRITE, ZEROES,
    };
    // Both contexts of the default export.
    let structured: &[u8] = &[FLAGS, 3, STRUCTURED, SET_CONTEXTS, 0, 3, GO, 0, 8];
    let simple: &[u8] = &[FLAGS, 3, GO, 0, 0];
    // Ranges are unit, offset (two bytes), length; 0 is a unit of a sector, 2 of a page.
    let write: &[u8] = &[WRITE, 0, 0, 3, 9, 0, 0x55];
    let write_odd: &[u8] = &[WRITE, 1, 0x21, 7, 200, 0, 0x66];
    let write_fua: &[u8] = &[WRITE, 2, 0, 5, 2, 128, 0x77];
    let read: &[u8] = &[READ, 0, 0, 0, 40, 0];
    let read_all: &[u8] = &[READ, 2, 0, 0, 25, 0];
    let zeroes: &[u8] = &[ZEROES, 0, 0, 20, 17, 0];
    let trim: &[u8] = &[TRIM, 0, 0, 41, 30, 0];
    let flush: &[u8] = &[FLUSH, 0];
    let status: &[u8] = &[STATUS, 2, 0, 0, 25, 0];
    let cache: &[u8] = &[CACHE, 2, 0, 2, 9, 0];
    let end: &[u8] = &[DISCONNECT];
    let work: &[&[u8]] = &[
        write, read, write_odd, read_all, zeroes, trim, cache, status, flush, write_fua, read_all,
    ];
    let with = |shake: &'static [u8]| -> Vec<&[u8]> {
        let mut parts = vec![shake];
        parts.extend_from_slice(work);
        parts.push(end);
        parts
    };
    let long_write: &[u8] = &[WRITE, 2, 0, 1, 130, 0, 1];
    let long_read: &[u8] = &[READ, 2, 0, 0, 160, 0];
    let questions: &[u8] = &[
        FLAGS,
        3,
        LIST,
        INFO,
        0,
        15,
        STRUCTURED,
        LIST_CONTEXTS,
        1,
        4,
        INFO,
        2,
        1,
        ABORT,
    ];
    let mut raw = vec![0, 0, 0];
    raw.extend_from_slice(&3_u32.to_be_bytes());
    let mut go = 0_u32.to_be_bytes().to_vec();
    go.extend_from_slice(&1_u16.to_be_bytes());
    go.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    put_option(&mut raw, option::GO, &go);
    raw.extend_from_slice(&encode_request(0, command::READ, 0, 512, 700));
    raw.extend_from_slice(&encode_request(0, command::WRITE, 0, 513, 5));
    raw.extend_from_slice(b"bytes");
    raw.extend_from_slice(&encode_request(0, command::FLUSH, 0, 0, 0));
    static STRUCTURED_SHAKE: &[u8] = &[FLAGS, 3, STRUCTURED, SET_CONTEXTS, 0, 3, GO, 0, 8];
    static SIMPLE_SHAKE: &[u8] = &[FLAGS, 3, GO, 0, 0];
    let plain = with(STRUCTURED_SHAKE);
    let plain_simple = with(SIMPLE_SHAKE);
    vec![
        ("plain-structured", program([0, 0, 0], &plain)),
        ("plain-simple", program([0, 0, 0], &plain_simple)),
        ("plain-in-pieces", program([0, 200, 0], &plain)),
        (
            "plain-long",
            program(
                [2, 0, 0],
                &[structured, long_write, long_read, status, flush],
            ),
        ),
        ("arriving-structured", program([3, 0, 0], &plain)),
        ("arriving-simple", program([3, 0, 0], &plain_simple)),
        ("arriving-refusals", program([3, 0, 0b1101_1001], &plain)),
        ("arriving-losses", program([4, 140, 0b1111_0111], &plain)),
        (
            "arriving-long",
            program(
                [5, 0, 0b0010_0100],
                &[structured, long_write, long_read, cache, flush],
            ),
        ),
        ("standby-first-write", program([6, 0, 0], &plain)),
        (
            "standby-reads-only",
            program([6, 0, 0], &[structured, read, read_all, cache, status, end]),
        ),
        ("standby-by-command", program([7, 0, 0], &plain)),
        ("questions", program([0, 130, 0], &[questions])),
        (
            "old-style-read-only",
            program(
                [0, 0, 0],
                &[&[FLAGS, 0, EXPORT_NAME, 1], read, write, flush, trim],
            ),
        ),
        (
            "old-style-default",
            program(
                [1, 0, 0],
                &[&[FLAGS, 1, EXPORT_NAME, 0], read, write, zeroes, read],
            ),
        ),
        (
            "past-the-end",
            program(
                [0, 0, 0],
                &[
                    simple,
                    &[READ, 0, 0, 200, 9, 0],
                    &[WRITE, 0, 0, 200, 9, 0, 1],
                    &[TRIM, 0, 0, 200, 9, 0],
                    &[ZEROES, 0, 0, 200, 9, 136],
                ],
            ),
        ),
        ("raw", raw),
    ]
}

fn nbd_client() -> Vec<(&'static str, Vec<u8>)> {
    use server::{
        ACK, BLOCK_SIZES, CONTEXT, DATA, DONE, ERROR, EXPORT, EXPORT_NAME, GREETING, HOLE, REFUSAL,
        SIMPLE, STATUS, WHOLE,
    };
    let structured_reply = option::STRUCTURED_REPLY as u8;
    let meta = option::SET_META_CONTEXT as u8;
    let go = option::GO as u8;
    // Count, then for each: how, skew, length.
    let reads: &[u8] = &[3, 0, 0, 4, 0, 1, 2, 2, 0, 0, 0, 8, 0];
    let read_and_extents: &[u8] = &[2, 0, 0, 4, 0, 6, 0, 64, 0];
    let full: &[u8] = &[
        GREETING,
        3,
        ACK,
        structured_reply,
        CONTEXT,
        5,
        ACK,
        meta,
        EXPORT,
        16,
        1,
        0xff,
        BLOCK_SIZES,
        0,
        12,
        25,
        ACK,
        go,
    ];
    let simple: &[u8] = &[
        GREETING,
        3,
        REFUSAL,
        structured_reply,
        1,
        EXPORT,
        16,
        0,
        1,
        ACK,
        go,
    ];
    let pieces: &[u8] = &[
        DATA, 0, 8, 8, 0, DATA, 0, 0, 8, 0, DONE, 0, HOLE, 1, 0, 16, 1, DATA, 2, 0, 4, 0, HOLE, 2,
        4, 12, 0, DONE, 2,
    ];
    let put = |parts: &[&[u8]]| parts.concat();
    let mut raw = vec![0, 1, 0, 0, 0, 16];
    raw.extend_from_slice(&honest_server());
    vec![
        (
            "whole",
            put(&[&[0x80], reads, full, &[WHOLE, 0, WHOLE, 2, WHOLE, 1]]),
        ),
        ("pieces", put(&[&[0x80], reads, full, pieces])),
        (
            "simple",
            put(&[
                &[0x81],
                reads,
                simple,
                &[SIMPLE, 1, SIMPLE, 0, ERROR, 2, 11],
            ]),
        ),
        (
            "extents",
            put(&[
                &[0x82],
                read_and_extents,
                full,
                &[STATUS, 1, 5, 3, 4, 0, 0, 4, 0, 3, 8, 0, 0, 1, WHOLE, 0],
            ]),
        ),
        (
            "errors",
            put(&[
                &[0x80],
                reads,
                full,
                &[DATA, 0, 0, 4, 0, ERROR, 0, 10, ERROR, 1, 24],
            ]),
        ),
        (
            "old-style",
            put(&[&[0x80], reads, &[GREETING, 0, EXPORT_NAME, 16, 0, 1]]),
        ),
        (
            "no-go",
            put(&[
                &[0x80],
                reads,
                &[
                    GREETING,
                    3,
                    REFUSAL,
                    structured_reply,
                    1,
                    REFUSAL,
                    go,
                    1,
                    EXPORT_NAME,
                    16,
                    0,
                    1,
                    SIMPLE,
                    0,
                ],
            ]),
        ),
        (
            "unknown-export",
            put(&[
                &[0x80],
                reads,
                &[
                    GREETING,
                    3,
                    ACK,
                    structured_reply,
                    REFUSAL,
                    meta,
                    6,
                    REFUSAL,
                    go,
                    6,
                ],
            ]),
        ),
        ("raw", raw),
    ]
}

/// A server's bytes as they are: a handshake with everything, and a read of sixteen sectors.
fn honest_server() -> Vec<u8> {
    use crate::nbd_client::script::option_reply;
    let mut out = Vec::new();
    out.extend_from_slice(&wire::INIT_MAGIC.to_be_bytes());
    out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&3_u16.to_be_bytes());
    option_reply(&mut out, option::STRUCTURED_REPLY, reply::ACK, &[]);
    option_reply(&mut out, option::SET_META_CONTEXT, reply::ACK, &[]);
    let mut export = info::EXPORT.to_be_bytes().to_vec();
    export.extend_from_slice(&(1_u64 << 20).to_be_bytes());
    export.extend_from_slice(&1_u16.to_be_bytes());
    option_reply(&mut out, option::GO, reply::INFO, &export);
    option_reply(&mut out, option::GO, reply::ACK, &[]);
    let shaken = out.len();
    out.extend_from_slice(&hikkoshi_nbd::server::reply::hole_chunk(
        0,
        0,
        512,
        hikkoshi_nbd::server::reply::Last::Yes,
    ));
    debug_assert!(leads_to_transmission(&out[..shaken]));
    out
}

fn leads_to_transmission(server: &[u8]) -> bool {
    let config = HandshakeConfig {
        export: String::new(),
        structured: true,
        allocation: true,
        transport: false,
        opening: Vec::new(),
    };
    let mut handshake = Handshake::new(config).unwrap();
    let mut at = 0;
    while let Some(bytes) = server.get(at..at + handshake.needed()) {
        at += bytes.len();
        match handshake.receive(bytes) {
            Ok(Progress::Done(_)) => return at == server.len(),
            Ok(Progress::More) => {}
            Err(_) => return false,
        }
    }
    false
}

fn state() -> Vec<(&'static str, Vec<u8>)> {
    let identity = "hikkoshi-volume 1\nvolume-id = 01010101010101010101010101010101\n\
                    size-bytes = 66048\nblock-bytes = 4096\ngeneration = 1\nlife = arriving\n\
                    source = nbd://old/\nincarnation = 02020202020202020202020202020202\n\
                    image-inode = none\n";
    let mut map = b"HKKMAP01".to_vec();
    map.extend_from_slice(&[1; 16]);
    map.extend_from_slice(&3_u64.to_le_bytes());
    map.extend_from_slice(&66_048_u64.to_le_bytes());
    map.extend_from_slice(&4096_u64.to_le_bytes());
    // A raw page of 17 blocks: the first two clean, the next owned; one partial block.
    map.extend_from_slice(&[3, 0]);
    map.extend_from_slice(&7_u64.to_le_bytes());
    map.extend_from_slice(&4_u64.to_le_bytes());
    map.extend_from_slice(&[0, 3, 9, 1]);
    map.extend_from_slice(&3_u64.to_le_bytes());
    let frame = |seq: u64, records: &[u8]| {
        let mut frame = b"HKKLOG01".to_vec();
        frame.extend_from_slice(&[1; 16]);
        frame.extend_from_slice(&3_u64.to_le_bytes());
        frame.extend_from_slice(&seq.to_le_bytes());
        frame.extend_from_slice(&[0; 8]);
        frame.extend_from_slice(records);
        let mut out = (frame.len() as u16).to_be_bytes().to_vec();
        out.extend_from_slice(&frame);
        out
    };
    let mut files = vec![0, 7];
    files.extend_from_slice(&(identity.len() as u16).to_be_bytes());
    files.extend_from_slice(&(map.len() as u16).to_be_bytes());
    files.extend_from_slice(identity.as_bytes());
    files.extend_from_slice(&map);
    files.extend_from_slice(&frame(0, &[1, 10, 2, 2, 4, 1]));
    files.extend_from_slice(&frame(1, &[2, 9, 1]));
    let mut text = vec![3];
    text.extend_from_slice(identity.as_bytes());
    // Geometry, then how it is, batches of records, and what is changed.
    let shapes: [(&str, &[u8]); 3] = [
        (
            "changed-volume",
            &[
                1, 3, 40, 0, 0x1f, 1, 2, 0, 0, 5, 9, 2, 0, 9, 1, 1, 1, 2, 0, 1, 1, 0, 0, 0, 0, 0,
                60, 1,
            ],
        ),
        (
            "changed-map",
            &[
                1, 0, 9, 0, 0x2f, 2, 1, 1, 0, 3, 0, 0, 0, 1, 1, 2, 0, 5, 2, 1, 4, 0, 0, 0, 20, 7,
            ],
        ),
        (
            "changed-log",
            &[
                1, 5, 100, 3, 0x38, 0, 3, 1, 2, 0, 7, 3, 1, 0, 0, 3, 2, 1, 1, 0, 9, 2, 0, 1, 0, 0,
                0, 50, 9,
            ],
        ),
    ];
    let mut seeds = vec![("files", files), ("identity", text)];
    seeds.extend(shapes.map(|(name, bytes)| (name, bytes.to_vec())));
    let mut planes = vec![2, 3, 16, 0];
    for word in [0x00ff_u64, 0x1f0f, 10, 0b101, 12, 0, 3, u64::MAX] {
        planes.extend_from_slice(&word.to_be_bytes());
    }
    seeds.push(("planes", planes));
    seeds
}

fn control() -> Vec<(&'static str, Vec<u8>)> {
    let request = |pace: u8, text: &str| {
        let mut out = vec![pace];
        out.extend_from_slice(text.as_bytes());
        out
    };
    let head = "HTTP/1.1\r\nHost: hikkoshi\r\n";
    let all = format!(
        "GET /v1/status {head}\r\nPOST /v1/pause?name=a%20b%2F%C3%A9%25 {head}Content-Length: 0\r\n\r\n\
         POST /v1/limit?bytes_per_s=1000&name= {head}\r\nGET / {head}Connection: close\r\n\r\n"
    );
    let status = r#"{"export":"","size_bytes":1,"state":"local","resident_bytes":1,"owned_bytes":0,"absent_bytes":0,"wire_bytes":0,"source_connected":null,"background":"idle","rate_bytes_per_s":0,"eta_s":null,"limit_bytes_per_s":null,"image":"a","source":null,"notes":[],"clients":0,"counters":{"reads_local":0,"reads_remote":0,"writes":0,"flushes":0,"zeroes":0,"blocks_installed":0,"zero_bytes_skipped":0,"longest_remote_read_us":0}}"#;
    let answer = |status_line: &str, body: &str| {
        let length = body.len();
        request(
            0,
            &format!("HTTP/1.1 {status_line}\r\ncontent-length: {length}\r\n\r\n{body}"),
        )
    };
    vec![
        ("all", request(100, &all)),
        ("in-pieces", request(166, &all)),
        (
            "web",
            request(
                100,
                &format!("POST /v1/resume?name=web {head}\r\nPOST /v1/handoff {head}\r\n"),
            ),
        ),
        (
            "limit-none",
            request(100, &format!("POST /v1/limit?bytes_per_s=none {head}\r\n")),
        ),
        (
            "wrong",
            request(
                100,
                &format!(
                    "PUT /v1/status {head}\r\nGET /v2 {head}\r\nGET /v1/export?x=1 {head}\r\n"
                ),
            ),
        ),
        (
            "body",
            request(
                100,
                &format!("POST /v1/pause {head}Content-Length: 5\r\n\r\nhelloGET / {head}\r\n"),
            ),
        ),
        (
            "chunked",
            request(
                100,
                &format!(
                    "POST /v1/pause {head}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                ),
            ),
        ),
        ("old", request(100, "GET /v1/export HTTP/1.0\r\n\r\n")),
        ("answer-one", answer("200 OK", status)),
        (
            "answer-all",
            answer("200 OK", &format!("[{status},{status}]")),
        ),
        (
            "answer-refusal",
            answer("409 Conflict", r#"{"error":"no source"}"#),
        ),
    ]
}

fn config() -> Vec<(&'static str, Vec<u8>)> {
    let text = |how: u8, text: &str| {
        let mut out = vec![how];
        out.extend_from_slice(text.as_bytes());
        out
    };
    let file = "listen = [\"tcp://127.0.0.1:10809\", \"unix:/run/a.sock\"]\ncontrol = \"unix:/c\"\n\
                max-clients = 9\n[[export]]\nname = \"web\"\nimage = \"/srv/web.img\"\n\
                from = \"nbd://old/web\"\nhandoff = \"command\"\nmax-rate = \"40MB/s\"\n\
                connections = 2\non-source-loss = \"error:60s\"\nbackground = false\n\
                overwrite = true\nsource-moved = true\nengine = \"threads\"\n[[export]]\n\
                image = 'b'\nsize = \"20GiB\"\nblock-size = \"64k\"\nread-only = true\nstate = \"s\"\n";
    vec![
        ("file", text(0, file)),
        ("uri-tcp", text(1, "nbd://[::1]:10810/a%20b")),
        (
            "uri-unix",
            text(1, "nbds+unix:///disk?socket=/run/x%2Fy.sock"),
        ),
        ("uri-listen", text(1, "tcp://host.example:1/")),
        ("listen", text(2, "tcp://[::]:0")),
        ("from", text(2, "nbd+unix:///?socket=/x")),
        ("control", text(2, "unix:/c")),
        ("size", text(3, "1.5GiB")),
        ("rate", text(3, "200Mbit/s")),
        ("duration", text(3, "500ms")),
        ("loss", text(3, "error:2m")),
    ]
}

/// One of each message and frame, with their way in.
fn transport() -> Vec<(&'static str, Vec<u8>)> {
    use hikkoshi_engine::geometry::ByteRange;
    use hikkoshi_engine::heat::Heat;
    use hikkoshi_wan::transport::pack::{Packer, Packing};
    use hikkoshi_wan::transport::session::{Attached, Stance, Tell, Told};

    let id = [5; 16];
    let way = |way: u8, rest: &[u8]| [&[way][..], rest].concat();
    // Kind, priority, flags, id, offset and its shift, span and its shift, length, payload.
    let frame = |kind: u8, flags: u8, id: u8, span: u16, payload: &[u8]| {
        let len = u16::try_from(payload.len()).expect("short").to_be_bytes();
        let mut out = vec![kind, 0, 0, flags, id, 0, 1, 12];
        out.extend_from_slice(&span.to_be_bytes());
        out.push(0);
        out.extend_from_slice(&len);
        out.extend_from_slice(payload);
        out
    };
    let grain = 4096_u32.to_be_bytes();
    let attach = Tell::Attach {
        id,
        stance: Stance::Standby,
        epoch: 9,
        base: Some([6; 16]),
    };
    let asked = [
        frame(0x01, 6, 1, 4096, &[]),
        frame(0x02, 0, 2, 9000, &[]),
        frame(0x03, 0, 3, 8192, &grain),
        frame(0x05, 0, 1, 0, &[]),
        frame(0x04, 0, 2, 0, &[]),
        frame(0x06, 0, 4, 0, &[]),
    ];
    let text = b"blocks that are alike, blocks that are alike, blocks that are alike".repeat(20);
    let (_, lz4) = Packer::default()
        .pack(Packing::Lz4, 0, &text)
        .expect("it is smaller");
    let (_, zstd) = Packer::default()
        .pack(Packing::Zstd(3), 0, &text)
        .expect("it is smaller");
    let len = u16::try_from(text.len()).expect("short");
    let extents = [&2048_u32.to_be_bytes()[..], &1_u32.to_be_bytes()].concat();
    let told = [
        frame(0x81, 2, 1, len, &lz4),
        frame(0x81, 4, 1, len, &zstd),
        frame(0x82, 0, 1, 512, &[]),
        frame(0x83, 1, 2, 2048, &extents),
        frame(0x84, 1, 3, 4096, &[7; 32]),
        frame(0x85, 1, 4, 0, b"\0\0\0\x05no"),
        frame(0x86, 1, 5, 0, &[]),
        frame(0x90, 1, 6, 0, b"\x06"),
    ];
    let heat = Heat::new(64 << 20);
    heat.read(3 << 20, 4096);
    let ranges = vec![ByteRange::at(4096, 8192), ByteRange::at(1 << 20, 512)];
    let fenced = Told::Fenced {
        generation: 3,
        ranges: Some(ranges.clone()),
    };
    let attached = Told::Attached(Attached {
        epoch: 9,
        ..Attached::default()
    });
    vec![
        ("requests", way(0, &[&[13][..], &asked.concat()].concat())),
        (
            "message-frame",
            way(
                0,
                &[&[13][..], &frame(0x10, 0, 0, 0, &attach.encode())].concat(),
            ),
        ),
        ("replies", way(1, &[&[13][..], &told.concat()].concat())),
        ("attach", way(2, &attach.encode())),
        ("attached", way(2, &attached.encode())),
        ("fenced", way(2, &fenced.encode())),
        ("bases", way(2, &Told::Bases(vec![(id, ranges)]).encode())),
        (
            "lz4",
            way(3, &[&[0, 1][..], &len.to_be_bytes(), &lz4].concat()),
        ),
        (
            "zstd",
            way(3, &[&[1, 2][..], &len.to_be_bytes(), &zstd].concat()),
        ),
        ("text", way(3, &[&[1, 0, 0, 0][..], &text].concat())),
        (
            "heat",
            way(4, &[&[0, 0][..], &heat.map().encode()].concat()),
        ),
    ]
}

fn frames() -> Vec<(&'static str, Vec<u8>)> {
    use crate::frames::PROGRAM;
    use crate::frames::script::{ask, say};
    // Ranges are unit (2 is a page, 0 a sector), offset (two bytes), length.
    let reads: &[u8] = &[
        ask::READ,
        4,
        0,
        2,
        0,
        0,
        25,
        ask::READ,
        0,
        1,
        0,
        0,
        3,
        9,
        ask::READ,
        2,
        2,
        2,
        0,
        2,
        20,
        ask::READ,
        0,
        5,
        1,
        0,
        77,
        200,
    ];
    let others: &[u8] = &[
        ask::EXTENTS,
        4,
        2,
        0,
        0,
        25,
        ask::HASH,
        6,
        3,
        2,
        0,
        0,
        25,
        ask::HASH,
        6,
        0,
        0,
        0,
        8,
        30,
        ask::PING,
        0,
    ];
    let flush: &[u8] = &[ask::PING, 0x80];
    let orders: &[u8] = &[
        ask::READ,
        4,
        2,
        2,
        0,
        0,
        160,
        ask::READ,
        5,
        0,
        2,
        0,
        0,
        160,
        ask::CANCEL,
        1,
        ask::PROMOTE,
        2,
        0,
        ask::SKIP,
        1,
        0,
        ask::PING,
        3,
        ask::CANCEL,
        1,
        ask::CANCEL,
        200,
    ];
    let talk = |which: u8| [ask::TELL, which, 9, 1];
    let talks = [0, 2, 7, 5, 3, 1, 4, 6].map(talk).concat();
    let wrong: &[u8] = &[
        ask::FRAME,
        1,
        0,
        0,
        0,
        9,
        0,
        1,
        9,
        0,
        1,
        9,
        0,
        ask::READ,
        0,
        0,
        2,
        0,
        200,
        9,
    ];
    let raw = hikkoshi_wan::transport::message::Request::Ping(
        7,
        hikkoshi_wan::transport::Priority::DEMAND,
    )
    .encode();
    // Kind of disk, pace and luck of its source, then a program.
    let server = |kind: u8, pace: u8, luck: u8, parts: &[&[u8]]| {
        [&[PROGRAM, kind, pace, luck][..], &parts.concat()].concat()
    };
    // Questions: how, skew, length. Data, extents, hashes of 4 KiB, a long read in bulk, promoted.
    let questions: &[u8] = &[4, 0, 0, 16, 0, 4, 0, 64, 0, 0x66, 0, 64, 0, 0x19, 2, 200, 0];
    let client =
        |head: u8, parts: &[&[u8]]| [&[PROGRAM | head][..], questions, &parts.concat()].concat();
    let whole: &[u8] = &[
        say::WHOLE,
        0,
        2,
        say::WHOLE,
        3,
        1,
        say::WHOLE,
        2,
        0,
        say::WHOLE,
        1,
        0,
    ];
    let pieces: &[u8] = &[
        say::DATA,
        0,
        0,
        8,
        0,
        0,
        say::DATA,
        3,
        0,
        4,
        0,
        1,
        say::ZERO,
        0,
        8,
        4,
        0,
        say::DATA,
        0,
        12,
        4,
        1,
        2,
        say::EXTENTS,
        1,
        4,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        1,
        0,
        say::ERROR,
        2,
        5,
        say::ZERO,
        3,
        4,
        12,
        1,
    ];
    let wrong_order: &[u8] = &[say::DATA, 0, 8, 8, 0, 0, say::DATA, 0, 0, 8, 1, 0];
    let bomb: &[u8] = &[
        say::PACKED,
        0,
        0,
        16,
        1,
        8,
        0,
        0,
        0,
        0,
        0x28,
        0xb5,
        0x2f,
        0xfd,
    ];
    let told = |which: u8| [&[PROGRAM | 6, 2, 9, 1][..], &[say::TOLD, 0, which, 3, 0]].concat();
    vec![
        ("serve-plain", server(0, 0, 0, &[reads, others])),
        (
            "serve-in-pieces",
            server(0, 200, 0, &[reads, others, orders]),
        ),
        ("serve-large", server(2, 0, 0, &[orders, reads])),
        ("serve-arriving", server(3, 0, 0, &[reads, others, orders])),
        (
            "serve-arriving-losses",
            server(5, 0, 0b1111_0111, &[reads, orders]),
        ),
        (
            "serve-refusals",
            server(4, 0, 0b1101_1001, &[reads, others]),
        ),
        ("serve-standby", server(6, 0, 0, &[reads, others])),
        (
            "serve-flush-standby",
            server(6, 0, 0, &[reads, flush, others, flush]),
        ),
        (
            "serve-flush-arriving",
            server(3, 0, 0b0110_0110, &[flush, reads, flush]),
        ),
        ("serve-talk", server(0, 0, 0, &[&talks, reads])),
        ("serve-talk-standby", server(7, 0, 0, &[reads, &talks])),
        ("serve-wrong", server(0, 0, 0, &[reads, wrong])),
        ("serve-raw", [&[0, 0, 0, 0][..], &raw].concat()),
        ("ask-whole", client(3, &[whole])),
        ("ask-flush", client(3 | 0x10, &[whole, &[say::END, 4][..]])),
        ("ask-few-at-a-time", client(11, &[whole])),
        ("ask-pieces", client(3, &[pieces])),
        ("ask-wrong-order", client(3, &[wrong_order])),
        ("ask-bomb", client(3, &[bomb])),
        ("ask-end", client(3, &[&[say::END, 0, say::END, 1]])),
        ("told-attached", told(0)),
        ("told-changes", told(1)),
        ("told-fenced", told(2)),
        ("told-bases", told(3)),
        ("told-heat", told(4)),
        ("told-refused", told(6)),
    ]
}
