//! A daemon's control socket by way of which a handoff is done, and never answered.
//!
//! Owns a socket beside the daemon's own and the threads behind it. Whoever asks there for anything
//! else is answered by the daemon; whoever asks for a handoff waits until this is dropped: the
//! instant in which a disk has moved and the one who drives the move does not know it yet, held for
//! as long as a test wants.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The longest question that is understood. A question has no body, and its head fits easily.
const QUESTION_BYTES: usize = 16 << 10;

/// The socket. Nobody answers there any more when it is dropped.
pub struct Deaf {
    path: PathBuf,
    over: Arc<AtomicBool>,
    /// Those who wait for the answer to a handoff.
    waiting: Arc<Mutex<Vec<UnixStream>>>,
}

impl Deaf {
    /// A socket at `path` for the daemon whose control socket is `daemon` (`unix:PATH`).
    ///
    /// # Errors
    /// It cannot be made.
    pub fn before(daemon: &str, path: &Path) -> Result<Self> {
        let daemon = daemon.strip_prefix("unix:").context("no unix:PATH")?;
        let daemon = PathBuf::from(daemon);
        let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
        let this = Self {
            path: path.to_path_buf(),
            over: Arc::default(),
            waiting: Arc::default(),
        };
        let (over, waiting) = (Arc::clone(&this.over), Arc::clone(&this.waiting));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(client), daemon) = (client, daemon.clone()) else {
                    return;
                };
                let waiting = Arc::clone(&waiting);
                // Whoever hangs up in the middle has what it wanted, or was killed.
                std::thread::spawn(move || drop(serve(client, &daemon, &waiting)));
            }
        });
        Ok(this)
    }

    /// Its place, as `--control` takes it.
    pub fn control(&self) -> String {
        format!("unix:{}", self.path.display())
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        drop(UnixStream::connect(&self.path));
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

/// Passes one question on, and its answer back, unless it is that to a handoff.
fn serve(mut client: UnixStream, daemon: &Path, waiting: &Mutex<Vec<UnixStream>>) -> Result<()> {
    let mut question = Vec::new();
    let mut piece = [0; 1024];
    while !question.windows(4).any(|four| four == b"\r\n\r\n") {
        let len = client.read(&mut piece)?;
        anyhow::ensure!(len > 0 && question.len() < QUESTION_BYTES, "no question");
        question.extend_from_slice(&piece[..len]);
    }
    let mut server = UnixStream::connect(daemon)?;
    server.write_all(&question)?;
    if question.starts_with(b"POST /v1/handoff") {
        // Not even the end of the connection: that would tell that something has happened.
        waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(client);
        server.read_to_end(&mut Vec::new())?;
        return Ok(());
    }
    // One question a connection: the daemon ends it after its answer.
    std::io::copy(&mut server, &mut client)?;
    client.shutdown(std::net::Shutdown::Both)?;
    Ok(())
}
