//! The load generator: an NBD client that does as little as it can.
//!
//! Owns the client's side of one or more connections. One thread drives all of them, sends what it
//! has in one call, receives as much as there is in one call, and looks at the data of a sample
//! only. It must never be the reason why two servers look alike; where it is, its own CPU time
//! says so.

mod connection;
mod content;
mod load;

pub use connection::{Connection, Endpoint};
pub use content::{Content, Random, mix};
pub use load::{Load, Operation, Pattern, Reading, Sample, Terms, run};
