//! A deterministic simulator: one seed is one world, in which a volume must keep its promises.
//!
//! The volume is the product's own, from its front end's calls down to the store, and from the
//! bytes of the NBD server it copies from up to the image. What is simulated is around it: the
//! disk, the file system of the state, the shared memory, the old site, the clients, time, and the
//! order in which everything happens ([`fiber`]). An [`oracle`] knows what was promised.
//! `docs/design/007-simulator.md` says what that can show and what not.

pub mod client;
pub mod crash;
pub mod disk;
mod events;
pub mod fiber;
mod finish;
pub mod hunt;
pub mod oracle;
pub mod pair;
pub mod plan;
mod process;
mod requests;
pub mod rng;
pub mod server;
pub mod sim;
pub mod source;
pub mod statedir;
mod world;

pub use world::{Options, Outcome, Tally, play};
