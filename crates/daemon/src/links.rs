//! Which disks come over one link.
//!
//! Those whose sources have the same host are taken to: they share what the link carries (see
//! [`Path`]). Sources at several hosts may be at several distances, and what fills one way says nothing of
//! another. A source that is reached over a Unix socket has a path to itself.

use std::collections::HashMap;
use std::path::Path as FilePath;
use std::sync::Arc;

use hikkoshi_engine::mover::Path;
use hikkoshi_nbd::uri::{Address, NbdUri};

use crate::volume::Volume;

/// The links of a daemon, by the host at the other end.
#[derive(Debug, Default)]
pub struct Links {
    by_host: HashMap<String, Arc<Path>>,
}

impl Links {
    /// Puts the move of a volume, if it has one, on the link that it comes over.
    pub fn join(&mut self, volume: &Volume) {
        let Some(relocation) = volume.relocation() else {
            return;
        };
        if let Some(path) = self.to(&relocation.source().info().uri) {
            relocation.share(&path);
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
        let mut links = Links::default();
        let one = links.to("nbd://far.example:10809/disk-1").unwrap();
        let two = links.to("nbd://far.example:10810/disk-2").unwrap();
        let other = links.to("nbd://elsewhere.example/disk-1").unwrap();
        assert!(Arc::ptr_eq(&one, &two) && !Arc::ptr_eq(&one, &other));
        assert!(links.to("nbd+unix:///disk?socket=/run/old.sock").is_none());
        assert!(links.to("/run/old.sock").is_none());
    }
}
