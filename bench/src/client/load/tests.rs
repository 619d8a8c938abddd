//! The load generator must notice a server that lies: otherwise its figures are worth nothing.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::AtomicUsize;
use std::thread;

use super::*;

const SIZE: usize = 1 << 20;

/// What is wrong with the server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Writes are answered and forgotten.
    LosesWrites,
    /// Reads give another block's data.
    MisplacesReads,
    /// Replies name a request that was never made.
    WrongCookie,
    /// Every request fails.
    Errors,
}

/// A whole server for one connection: a disk in memory, and one fault. Structured replies when
/// asked for, with each read in two chunks.
fn serve(mut stream: UnixStream, fault: Fault, flushes: &AtomicUsize) -> std::io::Result<()> {
    let content = Content::new();
    let mut disk = Vec::new();
    for offset in (0..SIZE as u64).step_by(BLOCK_BYTES) {
        disk.extend_from_slice(&Content::stamp(offset, 0));
        disk.extend_from_slice(content.bytes(Content::tail(offset, 0)));
    }
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])?;
    let mut structured = false;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes(head[12..].try_into().unwrap()) as usize;
        stream.read_exact(&mut vec![0; length])?;
        let mut reply = |kind: u32, data: &[u8]| {
            let length = u32::try_from(data.len()).unwrap().to_be_bytes();
            let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
            stream
                .write_all(&[&magic[..], &head[8..12], &kind.to_be_bytes(), &length, data].concat())
        };
        if head[11] == 8 {
            structured = true;
            reply(1, &[])?;
        } else {
            reply(
                3,
                &[&[0, 0][..], &(SIZE as u64).to_be_bytes(), &[0, 5]].concat(),
            )?;
            reply(1, &[])?;
            break;
        }
    }
    loop {
        let mut head = [0; 28];
        stream.read_exact(&mut head)?;
        let mut cookie: [u8; 8] = head[8..16].try_into().unwrap();
        let offset = u64::from_be_bytes(head[16..24].try_into().unwrap()) as usize;
        let length = u32::from_be_bytes(head[24..].try_into().unwrap()) as usize;
        let mut data = Vec::new();
        match head[7] {
            0 => {
                let from = if fault == Fault::MisplacesReads {
                    (offset + 4096) % SIZE
                } else {
                    offset
                };
                data.extend_from_slice(&disk[from..from + length]);
            }
            1 => {
                let mut payload = vec![0; length];
                stream.read_exact(&mut payload)?;
                if fault != Fault::LosesWrites {
                    disk[offset..offset + length].copy_from_slice(&payload);
                }
            }
            2 => return Ok(()),
            _ => {
                flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        if fault == Fault::WrongCookie {
            cookie[0] ^= 0x80;
        }
        let error = u32::from(fault == Fault::Errors) * 5;
        let mut out = Vec::new();
        if structured && head[7] == 0 && error == 0 {
            for (part, flag) in [(0, 0_u8), (1, 1)] {
                let half = &data[part * length / 2..][..length / 2];
                let at = (offset + part * length / 2) as u64;
                out.extend_from_slice(&[0x66, 0x8e, 0x33, 0xef, 0, flag, 0, 1]);
                out.extend_from_slice(&cookie);
                out.extend_from_slice(&u32::try_from(half.len() + 8).unwrap().to_be_bytes());
                out.extend_from_slice(&at.to_be_bytes());
                out.extend_from_slice(half);
            }
        } else {
            out.extend_from_slice(&[0x67, 0x44, 0x66, 0x98]);
            out.extend_from_slice(&error.to_be_bytes());
            out.extend_from_slice(&cookie);
            out.extend_from_slice(if error == 0 { &data } else { &[] });
        }
        stream.write_all(&out)?;
    }
}

/// Runs a load against a faulty server; returns operations answered and flushes seen.
fn drive(fault: Fault, operation: Operation, structured: bool) -> Result<(u64, u64)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path)?;
    let flushes = AtomicUsize::new(0);
    let content = Content::new();
    let load = Load {
        operation,
        pattern: Pattern::Random,
        length: 8192,
        depth: 4,
        connections: 1,
    };
    let terms = Terms {
        content: &content,
        duration: Duration::from_millis(50),
        structured,
        seed: 1,
    };
    let operations = thread::scope(|scope| {
        scope.spawn(|| {
            let (stream, _) = listener.accept().unwrap();
            // The client may hang up at any point once it has noticed the fault.
            let _ = serve(stream, fault, &flushes);
        });
        let mut driver = Driver::open(&Endpoint::Unix(path), &load, &terms)?;
        driver.start()?;
        while driver.operations < 3 * SAMPLE_EVERY {
            driver.step(&mut Vec::new())?;
        }
        let operations = driver.operations;
        driver.finish()?;
        Ok::<u64, anyhow::Error>(operations)
    })?;
    Ok((operations, u64::try_from(flushes.into_inner())?))
}

#[test]
fn an_honest_server_passes_every_check() {
    for structured in [false, true] {
        for operation in [Operation::Read, Operation::Write, Operation::WriteFlush] {
            let (operations, flushes) = drive(Fault::None, operation, structured).unwrap();
            let expected = if operation == Operation::WriteFlush {
                operations
            } else {
                0
            };
            assert!(
                flushes >= expected,
                "{operation:?}: {flushes} flushes, {operations} done"
            );
            assert!(operation == Operation::WriteFlush || flushes == 0);
        }
    }
}

#[test]
fn a_lost_write_is_noticed() {
    let error = drive(Fault::LosesWrites, Operation::Write, true).unwrap_err();
    assert!(error.to_string().contains("lost write"), "{error:#}");
}

#[test]
fn misplaced_data_is_noticed() {
    for structured in [false, true] {
        let error = drive(Fault::MisplacesReads, Operation::Read, structured).unwrap_err();
        assert!(error.to_string().contains("wrong data"), "{error:#}");
    }
}

#[test]
fn a_foreign_cookie_and_an_error_end_the_run() {
    let error = drive(Fault::WrongCookie, Operation::Read, false).unwrap_err();
    assert!(error.to_string().contains("never sent"), "{error:#}");
    let error = drive(Fault::Errors, Operation::Write, false).unwrap_err();
    assert!(error.to_string().contains("error 5"), "{error:#}");
}
