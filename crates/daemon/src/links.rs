//! Which disks come over one link.
//!
//! Those whose sources have the same host are taken to: they share what the link carries (see
//! [`Path`]). Sources at several hosts may be at several distances, and what fills one way says nothing of
//! another. A source that is reached over a Unix socket has a path to itself.
//!
//! And what caps all of them together, whatever they come over: [`CommonCap`].

use std::collections::HashMap;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hikkoshi_engine::mover::{Cap, Path};
use hikkoshi_nbd::uri::{Address, NbdUri};

use crate::volume::Volume;

/// The cap on what all disks of a daemon copy in the background together.
#[derive(Clone, Debug)]
pub struct CommonCap {
    cap: Arc<Cap>,
    since: Instant,
}

impl CommonCap {
    /// Of so many bytes per second.
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            cap: Arc::new(Cap::new(rate)),
            since: Instant::now(),
        }
    }

    /// Changes it; `None` lifts it.
    pub fn set_rate(&self, bytes_per_s: Option<u64>) {
        self.cap.set_rate(bytes_per_s);
    }

    /// Bytes per second.
    pub fn rate(&self) -> Option<u64> {
        self.cap.rate()
    }

    /// Puts the move of a volume, if it has one, under the cap.
    pub fn join(&self, volume: &Volume) {
        if let Some(relocation) = volume.relocation() {
            relocation.share_cap(&self.cap, self.ahead_of(volume));
        }
    }

    fn ahead_of(&self, volume: &Volume) -> Duration {
        self.since.elapsed().saturating_sub(volume.now())
    }
}

/// The links of a daemon, by the host at the other end.
#[derive(Debug)]
pub struct Links {
    by_host: HashMap<String, Arc<Path>>,
    cap: CommonCap,
}

impl Links {
    /// Under this cap.
    pub fn under(cap: CommonCap) -> Self {
        Self {
            by_host: HashMap::new(),
            cap,
        }
    }

    /// Puts the move of a volume, if it has one, on the link that it comes over.
    pub fn join(&mut self, volume: &Volume) {
        self.cap.join(volume);
        let Some(relocation) = volume.relocation() else {
            return;
        };
        if let Some(path) = self.to(&relocation.source().info().uri) {
            relocation.share(&path, self.cap.ahead_of(volume));
        }
    }

    /// The link to a source; `None` if it is not over a network.
    fn to(&mut self, uri: &str) -> Option<Arc<Path>> {
        let parsed: NbdUri = match uri.parse() {
            Ok(parsed) => parsed,
            Err(_) => NbdUri::unix(FilePath::new(uri), ""),
        };
        let Address::Tcp { host, .. } = parsed.address else {
            return None;
        };
        Some(Arc::clone(self.by_host.entry(host).or_default()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_host_decides_and_not_the_export_or_the_port() {
        let mut links = Links::under(CommonCap::new(None));
        let one = links.to("nbd://far.example:10809/disk-1").unwrap();
        let two = links.to("nbd://far.example:10810/disk-2").unwrap();
        let other = links.to("nbd://elsewhere.example/disk-1").unwrap();
        assert!(Arc::ptr_eq(&one, &two) && !Arc::ptr_eq(&one, &other));
        assert!(links.to("nbd+unix:///disk?socket=/run/old.sock").is_none());
        assert!(links.to("/run/old.sock").is_none());
    }
}
