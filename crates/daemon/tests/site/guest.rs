//! A guest that writes, over plain NBD on a Unix socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use hikkoshi_nbd::client::{Handshake, HandshakeConfig, Progress, encode_request};
use hikkoshi_nbd::wire::command;
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
        let len = u32::try_from(data.len()).unwrap();
        let request = encode_request(0, command::WRITE, 7, offset, len);
        self.stream.write_all(&request).unwrap();
        self.stream.write_all(data).unwrap();
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "the write failed");
    }
}
