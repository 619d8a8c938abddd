//! A guest that writes, over plain NBD on a Unix socket.

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
        self.send_data(0, offset, data);
    }

    /// The same, durably.
    #[allow(dead_code)]
    pub fn write_fua(&mut self, offset: u64, data: &[u8]) {
        self.send_data(command_flag::FUA, offset, data);
    }

    fn send_data(&mut self, flags: u16, offset: u64, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let request = encode_request(flags, command::WRITE, 7, offset, len);
        self.stream.write_all(&request).unwrap();
        self.stream.write_all(data).unwrap();
        self.answered();
    }

    /// Makes zeroes of it.
    #[allow(dead_code)]
    pub fn zero(&mut self, offset: u64, len: u32) {
        self.ask(command::WRITE_ZEROES, offset, len);
    }

    #[allow(dead_code)]
    pub fn flush(&mut self) {
        self.ask(command::FLUSH, 0, 0);
    }

    #[allow(dead_code)]
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.ask(command::READ, offset, u32::try_from(len).unwrap());
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    fn ask(&mut self, command: u16, offset: u64, len: u32) {
        let request = encode_request(0, command, 7, offset, len);
        self.stream.write_all(&request).unwrap();
        self.answered();
    }

    fn answered(&mut self) {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "the request failed");
    }
}
