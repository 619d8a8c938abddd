//! How a running daemon is asked and commanded: HTTP/1.1 with JSON over a Unix socket.
//!
//! Owns the socket's life ([`serve`]), the routes, the small blocking client that the command line
//! uses ([`client`]), and where sockets are looked for ([`place`]). It reaches volumes only through
//! [`Exports`], and never touches the data path: a slow or hostile control client costs a thread
//! of the control interface, no more. Called by the daemon at its start and by the command line.
//!
//! The socket is created with mode 0600: whoever may connect may do everything, and that is the
//! user who started the daemon (and root).

pub mod client;
mod dial;
mod metrics;
pub mod place;
mod routes;
mod socket;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, oneshot};
use tracing::{debug, warn};

use crate::registry::Exports;
use socket::BoundSocket;

/// Most control connections that are served at once; the next ones wait to be accepted.
pub const MAX_CONNECTIONS: usize = 64;

/// Bytes that the head of a request (line and headers) may have. Hyper's own lower bound is 8 KiB.
pub const MAX_HEAD_BYTES: usize = 16 << 10;

/// Headers that a request may have.
pub const MAX_HEADERS: usize = 32;

/// Bytes that the body of a request may have. No route needs one.
pub const MAX_BODY_BYTES: usize = 4096;

/// How long a client may take to send the head of a request, also between two requests.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long answers that are being made may take once the control interface is told to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Threads for commands that may take a while (a handoff waits for a sync).
const COMMAND_THREADS: usize = 4;

/// Why the control interface could not start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another daemon answers at this path.
    #[error(
        "control socket {0} is in use by a running daemon; stop that one, or choose another \
         place with --control unix:PATH"
    )]
    InUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("control socket {0} cannot be created: there is a file of that name that is no socket")]
    NotASocket(PathBuf),
    /// The path is longer than the system allows for sockets.
    #[error("control socket {0} cannot be created: a socket's path may have at most {1} bytes")]
    PathTooLong(PathBuf, usize),
    /// The system refused.
    #[error("control socket {path} cannot be created: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A control interface, or an address for metrics, that is being served. Ends, and removes its
/// socket, when dropped.
#[derive(Debug)]
pub struct Server {
    place: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Where it listens.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Ends it: no new connections, a moment for answers under way, the socket is removed.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The receiver is gone only when the thread has ended already.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the control interface's thread panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Serves `exports` on a Unix socket at `path` (mode 0600), on a thread of its own. A socket that
/// nobody listens on any more is replaced.
///
/// # Errors
/// A live daemon has the socket, something else is in the way, or the system refuses.
pub fn serve(path: &Path, exports: Arc<dyn Exports>) -> Result<Server, ControlError> {
    let failed = |source| ControlError::Io {
        path: path.to_path_buf(),
        source,
    };
    let bound = BoundSocket::bind(path)?;
    let router = routes::router(exports);
    let place = path.display().to_string();
    start("hikkoshi-control", place, move || {
        let listener = bound.listener()?;
        let listening = Listening::Unix {
            listener,
            _bound: bound,
        };
        Ok((listening, router))
    })
    .map_err(failed)
}

/// Serves `GET /metrics` of `exports`, and nothing else, at a TCP address. Whoever can connect can
/// read the numbers.
///
/// # Errors
/// The system refuses the address.
pub fn serve_metrics(address: &str, exports: Arc<dyn Exports>) -> io::Result<Server> {
    let socket = std::net::TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    let place = socket.local_addr()?.to_string();
    let router = routes::metrics_router(exports);
    start("hikkoshi-metrics", place, move || {
        Ok((Listening::Tcp(TcpListener::from_std(socket)?), router))
    })
}

/// A thread with a runtime of its own that serves what `listen` gives.
fn start(
    name: &str,
    place: String,
    listen: impl FnOnce() -> io::Result<(Listening, Router)> + Send + 'static,
) -> io::Result<Server> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(COMMAND_THREADS)
        .thread_name("hikkoshi-command")
        .build()?;
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            runtime.block_on(async {
                match listen() {
                    Ok((listening, router)) => accept_until(listening, router, stopped).await,
                    Err(error) => {
                        warn!(%error, "this cannot be listened on; the daemon goes on without it");
                    }
                }
            });
            // A command that hangs must not keep the daemon from ending.
            runtime.shutdown_timeout(DRAIN_TIMEOUT);
        })?;
    Ok(Server {
        place,
        stop: Some(stop),
        thread: Some(thread),
    })
}

/// Where connections come from.
enum Listening {
    Unix {
        listener: UnixListener,
        /// Held, not read: it removes the socket's file at the end.
        _bound: BoundSocket,
    },
    Tcp(TcpListener),
}

/// A connection, of whatever kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Listening {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Unix { listener, .. } => Box::new(listener.accept().await?.0),
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// HTTP/1.1 within the limits of this interface.
fn http() -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS);
    http
}

/// Serves one connection, as one that was accepted is, until it ends.
#[cfg(feature = "fuzzing")]
pub async fn serve_one<S>(exports: Arc<dyn Exports>, stream: S)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let service = TowerToHyperService::new(routes::router(exports));
    // What ends a connection badly is the client's affair, here as there.
    let _ = http().serve_connection(TokioIo::new(stream), service).await;
}

/// Accepts connections until told to stop, then waits a moment for those that are open.
async fn accept_until(listening: Listening, router: Router, mut stopped: oneshot::Receiver<()>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let closing = Arc::new(tokio::sync::Notify::new());
    loop {
        let permit = tokio::select! {
            _ = &mut stopped => break,
            permit = Arc::clone(&slots).acquire_owned() => {
                permit.expect("the semaphore is never closed")
            }
        };
        let accepted = tokio::select! {
            _ = &mut stopped => break,
            accepted = listening.accept() => accepted,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, say: others may be freed, so go on, but not in a tight loop.
                warn!(%error, "a control connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let closing = Arc::clone(&closing);
        tokio::spawn(async move {
            let connection = http().serve_connection(TokioIo::new(stream), service);
            tokio::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = closing.notified() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                debug!(%error, "a control connection ended badly");
            }
            drop(permit);
        });
    }
    closing.notify_waiters();
    let all = u32::try_from(MAX_CONNECTIONS).expect("a small constant");
    // Whoever has not finished by then is cut off.
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, slots.acquire_many(all)).await;
}
