//! A source over one connected socket, for the fuzz targets: all of the real one but its threads.
//!
//! Only compiled with the feature `fuzzing`. What keepers and the herald do on threads of their own
//! happens here one after the other, so that an input always runs the same way.

use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use socket2::Socket;

use super::attach;
use super::dial::shake_hands;
use super::line::Line;
use super::shared::{Installed, Shared, info_of};
use super::wire::SocketWire;
use super::{NbdSource, NbdSourceConfig, SOURCE_THREAD, herald, keeper};
use crate::source::SourceError;
use crate::transport::session::{Tell, Told};

/// Shakes hands with the server at the other end of `socket`, with options one by one or `at_once`, lets `ask` submit requests, and
/// receives until the connection ends. Every completion has run when it returns.
///
/// # Errors
/// The handshake failed.
pub fn converse(
    socket: Socket,
    config: NbdSourceConfig,
    at_once: bool,
    ask: impl FnOnce(&NbdSource),
) -> Result<(), SourceError> {
    let config = config.clamped();
    let socket = Arc::new(socket);
    let negotiated =
        shake_hands(&socket, &config, at_once, Vec::new()).map_err(|(error, _)| error)?;
    let info = info_of(&config.shown_uri(), &negotiated);
    let line = Line::new(Arc::new(SocketWire(socket)), negotiated, &config);
    let id = Shared::fresh_id();
    SOURCE_THREAD.set(id);
    let watcher = Arc::new(Mutex::new(None));
    let (herald, news) = channel();
    let shared = Shared::new(config, Some(info), Arc::clone(&watcher), herald, id);
    let agreed = matches!(shared.install(0, &line), Installed::Yes);
    assert!(agreed, "the first connection agrees with itself");
    // Else nothing could be asked before it was told that one stands.
    drop(news.try_recv());
    let source = NbdSource {
        shared: Arc::clone(&shared),
    };
    ask(&source);
    keeper::read(&shared, 0, &line);
    drop(source);
    drop(shared);
    herald::tell(&news, &watcher);
    Ok(())
}

/// Says something about a move of a disk of `size_bytes` over a connection that speaks frames, and
/// takes the answer.
///
/// # Errors
/// There was none, or none that makes sense.
pub fn exchange(
    socket: &Socket,
    tell: &Tell,
    size_bytes: u64,
    patience: Duration,
) -> io::Result<Told> {
    attach::exchange(socket, tell, size_bytes, patience)
}
