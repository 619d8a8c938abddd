//! Flushes of guests whose source has lost its power.
//!
//! A VM may have written at the old site what nobody flushed there. If that site's machine is started
//! anew before the handoff, it is gone, and the source says truthfully that all it has is durable. So
//! a source tells under which boot it runs, and where another one is told while this stands by, whoever
//! was connected before gets an error for each flush, also behind the handoff: no flush can cover what
//! is lost. Whoever connects later has lost nothing, as far as anybody can know.
//!
//! A volume that stands by tells the boots of its own source behind its own, so that it goes along a
//! chain: whoever was told older ones is hung up on before a flush of theirs is answered
//! ([`Volume::still_serves`]), and told anew. Behind the handoff nothing is lost with the source's
//! power, and the count stands still.
//!
//! Only flushes, and writes with FUA, look at any of this.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use hikkoshi_wan::transport::session::{BootId, Boots};

use super::Volume;
use super::storage::succession::Presence;
use crate::boot;
use crate::events::EventKind;

/// In place of the count of a client that has lost something, once that is not to be compared any more.
const LOST: u64 = u64::MAX;

/// What a volume knows of the power at its own site and before it.
#[derive(Debug, Default)]
pub(super) struct SourcePower {
    /// Told in place of the machine's own boot.
    pretended: OnceLock<BootId>,
    /// Losses of which people know.
    told: AtomicU64,
}

impl Presence {
    /// The losses at the source that there were when it connected.
    pub fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }
}

impl Volume {
    /// Tells destinations of this boot and no other. A seam: tests start no machine anew. Before
    /// anybody is served.
    pub fn pretend_boot(&self, boot: BootId) {
        let _ = self.source_power.pretended.set(boot);
    }

    /// Which machines lose what was written to this disk and not flushed when they lose their power.
    pub(super) fn boots(&self) -> Boots {
        if self.read_only {
            return Boots::NONE;
        }
        let pretended = self.source_power.pretended.get().copied();
        let Some(own) = pretended.or_else(boot::of_this_machine) else {
            return Boots::NONE;
        };
        let before = self.arrival.as_ref().map(|a| a.ticket.boots());
        Boots::of(own, before.unwrap_or_default())
    }

    /// Grows whenever [`Volume::boots`] changes.
    pub(super) fn news_of_boots(&self) -> u64 {
        self.arrival
            .as_ref()
            .map_or(0, |a| a.ticket.news_of_boots())
    }

    /// How often what was written at the source and not flushed may have been lost.
    fn source_losses(&self) -> u64 {
        self.arrival.as_ref().map_or(0, |a| a.ticket.losses())
    }

    /// A client has connected.
    pub fn note_losses(&self, client: &Presence) {
        client.losses.store(self.source_losses(), Ordering::Relaxed);
    }

    /// A client goes on at the volume that takes this one's place.
    pub fn hand_losses_on(&self, next: &Self, client: &Presence) {
        if client.losses() == self.source_losses() {
            next.note_losses(client);
        } else {
            client.losses.store(LOST, Ordering::Relaxed);
        }
    }

    /// Whether a flush can cover all that a client wrote that has seen so many losses.
    ///
    /// # Errors
    /// Something of it may be lost.
    pub fn check_source_losses(&self, seen: u64) -> io::Result<()> {
        if seen == self.source_losses() {
            return Ok(());
        }
        Err(io::Error::other(
            "the source's machine was started anew, and what was written there and not flushed may be \
             lost; restart the VM",
        ))
    }

    /// Clients that were connected before the last loss.
    fn clients_with_losses(&self) -> usize {
        let now = self.source_losses();
        self.count_clients(|client| client.losses() != now)
    }

    /// Tells people of losses that they do not know of. To be called now and then.
    pub(super) fn tell_source_losses(&self) {
        let losses = self.source_losses();
        if self.source_power.told.swap(losses, Ordering::Relaxed) == losses {
            return;
        }
        match self.clients_with_losses() {
            // Nobody has ever relied on it.
            0 => tracing::info!(
                export = self.name,
                "the source's machine was started anew before the handoff"
            ),
            clients => self.event(EventKind::SourceRestarted, restarted(clients)),
        }
    }

    /// What a person should know of it, for as long as somebody is connected who may have lost
    /// something.
    pub(super) fn source_power_note(&self) -> Option<String> {
        Some(self.clients_with_losses())
            .filter(|clients| *clients > 0)
            .map(restarted)
    }
}

fn restarted(clients: usize) -> String {
    format!(
        "the source's machine was started anew before the handoff: what the VM wrote there and did not \
         flush may be lost, so flushes fail for {clients} {} since before: if the VM runs here, restart \
         it (its disk is as after a power cut); else connect anew",
        match clients {
            1 => "client that has been connected",
            _ => "clients that have been connected",
        }
    )
}
