//! The NBD protocol, without I/O.
//!
//! Bytes go in, bytes and decisions come out; sockets belong to the callers. The reference is the
//! protocol document of the NBD project (`doc/proto.md`), cited by section name.

pub mod limits;
pub mod server;
pub mod uri;
pub mod wire;

pub mod client;
