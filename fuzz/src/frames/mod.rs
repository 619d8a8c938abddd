//! Frames between two daemons (`docs/wire.md`) through the loops that use them: a client's through
//! the one that serves, a server's through the one that receives. The decoders alone are in
//! [`crate::transport`].
//!
//! The first byte chooses; the rest are bytes of one end, as they are or made by a [`script`] whose
//! frames have their checksums right, so that what is behind the checksums is reached. What must
//! hold is told in `server` and `client`.

mod client;
pub mod script;
mod server;

use hikkoshi_wan::transport::pack::{Codec, Unpacker};
use hikkoshi_wan::transport::{Frame, Header, Kind};

use crate::input::Input;

/// Bit of the first byte: what follows is a program.
pub const PROGRAM: u8 = 0x80;

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.byte();
    match how & 7 {
        0..=2 => server::run(how, &mut input),
        3..=5 => client::run(how, &mut input),
        _ => client::answer_about_a_move(how, &mut input),
    }
}

/// Takes frames from the front of `bytes` with code of our own around the header's; ends where
/// something is no frame, or not all of one.
fn frames_of(bytes: &[u8]) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut rest = bytes;
    while let Some((header, behind)) = rest.split_first_chunk() {
        let Ok(header) = Header::decode(header) else {
            break;
        };
        let Some((payload, behind)) = behind.split_at_checked(header.payload_len as usize) else {
            break;
        };
        if crc32c::crc32c(payload) != header.payload_crc {
            break;
        }
        frames.push(Frame {
            header,
            payload: payload.to_vec(),
        });
        rest = behind;
    }
    frames
}

/// The same frames of one connection, in the order in which they came, with the bytes of the disk as their
/// payload where they were compressed (the headers stay as they were). Ends where one does not
/// add up: nobody takes what follows it.
fn unpacked(frames: Vec<Frame>) -> Vec<Frame> {
    let mut unpacker = Unpacker::default();
    frames
        .into_iter()
        .map_while(|Frame { header, payload }| {
            let codec = match header.kind {
                Kind::Data => Codec::from_flags(header.packing).ok()?,
                _ => None,
            };
            let Some(codec) = codec else {
                return Some(Frame { header, payload });
            };
            let mut bytes = Vec::new();
            unpacker.unpack(codec, &payload, header.span as usize, &mut bytes)?;
            Some(Frame {
                header,
                payload: bytes,
            })
        })
        .collect()
}
