//! The settings of a source.

use std::sync::Arc;
use std::time::Duration;

use hikkoshi_engine::mover::REQUESTS_IN_WINDOW;

use super::attach::Ticket;
use crate::transport::pack::Packing;

pub use hikkoshi_nbd::uri::Address;

/// The settings of an [`NbdSource`](super::NbdSource).
#[derive(Clone, Debug)]
pub struct NbdSourceConfig {
    /// Where the server listens.
    pub address: Address,
    /// The export's name; empty for the default export.
    pub export: String,
    /// What people wrote to name the source; empty: made of address and export.
    pub uri: String,
    /// Speak frames (`docs/wire.md`) with a server that knows them, and plain NBD with others.
    pub frames: bool,
    /// Connections wanted, at least 1, at most [`MAX_CONNECTIONS`]; fewer is not an error.
    pub connections: usize,
    /// Open more than one connection even to a server that does not promise they are coherent
    /// (`CAN_MULTI_CONN`). Only safe where nothing writes to the disk any more.
    pub several_without_promise: bool,
    /// How long a TCP or Unix connect may take.
    pub connect_timeout: Duration,
    /// How long the whole handshake may take: a server that admits only one client leaves the
    /// second one waiting here.
    pub handshake_timeout: Duration,
    /// The first pause before connecting again.
    pub backoff_min: Duration,
    /// The longest pause before connecting again, and the pause after the wrong disk answered.
    pub backoff_max: Duration,
    /// A connection on which requests wait and no byte comes for so long is given up; `None`:
    /// only the kernel's keepalive decides.
    pub progress_timeout: Option<Duration>,
    /// TCP keepalive and the limit for unacknowledged bytes: how long a vanished peer is believed.
    pub dead_peer_timeout: Duration,
    /// Requests in flight on a connection, at least 1, at most [`MAX_IN_FLIGHT`].
    pub in_flight: usize,
    /// Bulk requests in flight on a connection, at least 1. With fewer than [`REQUESTS_IN_WINDOW`], a window that
    /// all goes over one connection is never in flight, and the rate that is measured so is what the next
    /// window is made for.
    pub bulk_in_flight: usize,
    /// How what crosses the link is compressed, by a server that speaks frames.
    pub packing: Packing,
    /// For which move connections are; said to a server that speaks frames.
    pub ticket: Option<Arc<Ticket>>,
}

/// More connections than that help nobody.
pub const MAX_CONNECTIONS: usize = 16;
/// So many requests, of 28 bytes in NBD and at most 44 in frames, fit into any socket's send buffer
/// (4608 bytes at the least, 16 KiB and more unless somebody wanted it so), so that sending one never
/// waits for the peer. A promotion or a cancellation takes 40 bytes more.
pub const MAX_IN_FLIGHT: usize = 104;

impl NbdSourceConfig {
    /// Sensible settings for an export.
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        Self {
            address,
            export: export.into(),
            uri: String::new(),
            frames: true,
            connections: 4,
            several_without_promise: false,
            connect_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(5),
            backoff_min: Duration::from_millis(250),
            backoff_max: Duration::from_secs(10),
            progress_timeout: Some(Duration::from_secs(30)),
            dead_peer_timeout: Duration::from_secs(30),
            in_flight: 96,
            bulk_in_flight: REQUESTS_IN_WINDOW,
            packing: Packing::Auto,
            ticket: None,
        }
    }

    /// The name for people and for the recorded identity.
    pub(super) fn shown_uri(&self) -> String {
        if !self.uri.is_empty() {
            self.uri.clone()
        } else if self.export.is_empty() {
            self.address.to_string()
        } else {
            format!("{} export {:?}", self.address, self.export)
        }
    }

    /// The same with every number inside its bounds.
    pub(super) fn clamped(mut self) -> Self {
        self.connections = self.connections.clamp(1, MAX_CONNECTIONS);
        self.in_flight = self.in_flight.clamp(1, MAX_IN_FLIGHT);
        self.bulk_in_flight = self.bulk_in_flight.clamp(1, self.in_flight);
        self.backoff_max = self.backoff_max.max(self.backoff_min);
        self
    }
}
