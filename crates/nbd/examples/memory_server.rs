//! A disk in memory, served on a Unix socket: how the server's half of this crate is driven.
//!
//! `cargo run -p hikkoshi-nbd --example memory_server -- /tmp/nbd.sock`, then
//! `nbdinfo nbd+unix:///?socket=/tmp/nbd.sock`. One connection at a time; ends with the process.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use hikkoshi_nbd::server::reply::{Last, push_block_status};
use hikkoshi_nbd::server::{
    Command, ExportInfo, Exports, Handshake, Outcome, ReplyStyle, Request, Rules, Session,
    StatusExtents, Verdict,
};
use hikkoshi_nbd::wire::{self, Errno, export};

const DISK_BYTES: usize = 64 << 20;

struct OneExport;

impl Exports for OneExport {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name.is_empty() || name == "memory").then(|| ExportInfo {
            canonical_name: "memory".to_owned(),
            description: "a disk that is forgotten".to_owned(),
            size_bytes: DISK_BYTES as u64,
            flags: export::SEND_FLUSH
                | export::SEND_FUA
                | export::SEND_TRIM
                | export::SEND_WRITE_ZEROES
                | export::SEND_CACHE,
            min_block: 1,
            preferred_block: 4096,
            max_payload: wire::MAX_PAYLOAD_BYTES,
            block_size_required: false,
            contexts: vec![wire::BASE_ALLOCATION],
        })
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![("memory".to_owned(), String::new())]
    }
}

fn main() -> io::Result<()> {
    let path = std::env::args()
        .nth(1)
        .ok_or_else(|| io::Error::other("usage: memory_server SOCKET"))?;
    let listener = UnixListener::bind(path)?;
    let mut disk = vec![0; DISK_BYTES];
    loop {
        let (stream, _) = listener.accept()?;
        if let Err(error) = serve(stream, &mut disk) {
            eprintln!("connection ended: {error}");
        }
    }
}

fn serve(mut stream: UnixStream, disk: &mut [u8]) -> io::Result<()> {
    let (mut handshake, mut received) = (Handshake::new(), Vec::new());
    let session = loop {
        stream.write_all(handshake.output())?;
        handshake.output().clear();
        let progress = handshake.input(&received, &OneExport);
        received.drain(..progress.consumed);
        match progress.outcome {
            Outcome::NeedMore => {
                stream.write_all(handshake.output())?;
                handshake.output().clear();
                let mut buffer = [0; 4096];
                let len = stream.read(&mut buffer)?;
                if len == 0 {
                    return Ok(());
                }
                received.extend_from_slice(&buffer[..len]);
            }
            Outcome::SendFirst => {}
            Outcome::Close => return stream.write_all(handshake.output()),
            Outcome::Begin(session) => {
                stream.write_all(handshake.output())?;
                break session;
            }
        }
    };
    // Requests may have come on the heels of the last option.
    transmit(
        &mut io::Cursor::new(received).chain(&stream),
        &stream,
        disk,
        &session,
    )
}

fn transmit(
    requests: &mut impl Read,
    mut replies: &UnixStream,
    disk: &mut [u8],
    session: &Session,
) -> io::Result<()> {
    let (rules, style) = (Rules::new(session), ReplyStyle::from(session));
    let mut out = Vec::new();
    loop {
        let mut header = [0; wire::REQUEST_BYTES];
        requests.read_exact(&mut header)?;
        let request = Request::parse(&header).map_err(io::Error::other)?;
        out.clear();
        match rules.check(&request) {
            Verdict::Run(Command::Disconnect) => return Ok(()),
            Verdict::Run(command) => {
                run(command, request.cookie, requests, disk, session, &mut out)?;
            }
            Verdict::Done => style.push_done(&mut out, request.cookie),
            Verdict::Refuse {
                errno,
                payload_bytes,
            } => {
                io::copy(&mut requests.take(payload_bytes.into()), &mut io::sink())?;
                style.push_error(&mut out, request.cookie, errno, "refused");
            }
            Verdict::Close => return Ok(()),
        }
        replies.write_all(&out)?;
    }
}

fn run(
    command: Command,
    cookie: u64,
    requests: &mut impl Read,
    disk: &mut [u8],
    session: &Session,
    out: &mut Vec<u8>,
) -> io::Result<()> {
    let style = ReplyStyle::from(session);
    let place = |offset: u64, len: u32| {
        let start = usize::try_from(offset).expect("the disk is in memory");
        start..start + len as usize
    };
    match command {
        Command::Read { offset, len, .. } => {
            style.push_read_header(out, cookie, offset, len);
            out.extend_from_slice(&disk[place(offset, len)]);
        }
        Command::Write { offset, len, .. } => {
            requests.read_exact(&mut disk[place(offset, len)])?;
            style.push_done(out, cookie);
        }
        Command::WriteZeroes { fast: true, .. } => {
            style.push_error(out, cookie, Errno::NotSup, "not faster than writing");
        }
        Command::Trim { offset, len, .. } | Command::WriteZeroes { offset, len, .. } => {
            disk[place(offset, len)].fill(0);
            style.push_done(out, cookie);
        }
        Command::BlockStatus { offset, len, one } => {
            let mut extents = StatusExtents::new(len, one);
            for block in disk[place(offset, len)].chunks(4096) {
                let zero = block.iter().all(|byte| *byte == 0);
                let flags = if zero { wire::allocation::ZERO } else { 0 };
                if !extents.push(block.len() as u64, flags) {
                    break;
                }
            }
            let id = session.contexts[0].id;
            push_block_status(out, cookie, id, extents.as_slice(), Last::Yes);
        }
        Command::Flush | Command::Cache { .. } | Command::Disconnect => {
            style.push_done(out, cookie);
        }
    }
    Ok(())
}
