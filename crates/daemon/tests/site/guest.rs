//! A guest that reads and writes, over plain NBD on a Unix socket.
#![allow(dead_code, reason = "not every test does all of it")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use hikkoshi_nbd::client::{Handshake, HandshakeConfig, Progress, encode_request};
use hikkoshi_nbd::wire::{command, command_flag};
use hikkoshi_wan::Address;

pub struct Guest {
    stream: UnixStream,
}

impl Guest {
    pub fn connect(address: &Address) -> Self {
        let Address::Unix(path) = address else {
            panic!("not on a Unix socket");
        };
        let mut stream = UnixStream::connect(path).unwrap();
        let mut handshake = Handshake::new(HandshakeConfig {
            export: String::new(),
            structured: false,
            allocation: false,
            transport: false,
            opening: Vec::new(),
        })
        .unwrap();
        loop {
            stream.write_all(&handshake.take_output()).unwrap();
            let mut bytes = vec![0; handshake.needed()];
            stream.read_exact(&mut bytes).unwrap();
            if let Progress::Done(_) = handshake.receive(&bytes).unwrap() {
                return Self { stream };
            }
        }
    }

    /// Writes, and waits until that is answered.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(self.try_write(offset, data), "the write failed");
    }

    /// The same; whether it was taken.
    pub fn try_write(&mut self, offset: u64, data: &[u8]) -> bool {
        self.send_data(0, offset, data)
    }

    /// Writes durably.
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) {
        assert!(self.try_write_fua(offset, data), "the write failed");
    }

    /// The same; whether it was done.
    pub fn try_write_fua(&mut self, offset: u64, data: &[u8]) -> bool {
        self.send_data(command_flag::FUA, offset, data)
    }

    fn send_data(&mut self, flags: u16, offset: u64, data: &[u8]) -> bool {
        let len = u32::try_from(data.len()).unwrap();
        let request = encode_request(flags, command::WRITE, 7, offset, len);
        self.stream.write_all(&request).unwrap();
        self.stream.write_all(data).unwrap();
        self.is_answered()
    }

    /// Makes zeroes of it.
    pub fn zero(&mut self, offset: u64, len: u32) {
        assert!(
            self.ask(command::WRITE_ZEROES, offset, len),
            "zeroing failed"
        );
    }

    pub fn flush(&mut self) {
        assert!(self.try_flush(), "the flush failed");
    }

    /// The same; whether it was done.
    pub fn try_flush(&mut self) -> bool {
        self.ask(command::FLUSH, 0, 0)
    }

    /// Reads, and waits for it.
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.try_read(offset, len).expect("the read failed")
    }

    /// The same; `None` if it failed.
    pub fn try_read(&mut self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut data = vec![0; len];
        self.ask(command::READ, offset, u32::try_from(len).unwrap())
            .then(|| self.stream.read_exact(&mut data).unwrap())?;
        Some(data)
    }

    /// Whether it was done.
    fn ask(&mut self, command: u16, offset: u64, len: u32) -> bool {
        let request = encode_request(0, command, 7, offset, len);
        self.stream.write_all(&request).unwrap();
        self.is_answered()
    }

    fn is_answered(&mut self) -> bool {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).unwrap();
        reply[4..8] == [0; 4]
    }
}
