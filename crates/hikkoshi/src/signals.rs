//! SIGTERM and SIGINT, turned into something a thread can wait for.
//!
//! A thread of its own receives them; nothing runs in a signal handler but tokio's self-pipe.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit status when a second signal cuts the orderly end short.
const CUT_SHORT: i32 = 1;

/// Caught signals.
#[derive(Debug)]
pub struct Signals {
    received: Receiver<()>,
}

impl Signals {
    /// Catches SIGTERM and SIGINT from now on. One that comes while nobody waits is kept; the one
    /// after it ends the process at once.
    ///
    /// # Errors
    /// The system refuses.
    pub fn catch() -> io::Result<Self> {
        Self::catch_these(false)
    }

    /// The same with SIGHUP: for what must not be cut short because a terminal goes away.
    ///
    /// # Errors
    /// The system refuses.
    pub fn catch_with_hangup() -> io::Result<Self> {
        Self::catch_these(true)
    }

    fn catch_these(with_hangup: bool) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        // Registered before this returns: a signal right afterwards must not kill the process.
        let (mut term, mut int, mut hangup) = {
            let _inside = runtime.enter();
            let hangup = with_hangup.then(|| signal(SignalKind::hangup()));
            (
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
                hangup.transpose()?,
            )
        };
        let (sender, received) = channel();
        std::thread::Builder::new()
            .name("hikkoshi-signals".into())
            .spawn(move || {
                runtime.block_on(async {
                    let mut first = true;
                    loop {
                        tokio::select! {
                            _ = term.recv() => {}
                            _ = int.recv() => {}
                            () = one_of(hangup.as_mut()) => {}
                        }
                        if !std::mem::take(&mut first) || sender.send(()).is_err() {
                            std::process::exit(CUT_SHORT);
                        }
                    }
                });
            })?;
        Ok(Self { received })
    }

    /// Waits for a signal.
    pub fn wait(&self) {
        // The sender's thread lives as long as the process, so there is always an answer.
        let _ = self.received.recv();
    }

    /// Waits for a signal at most this long; whether one came.
    pub fn wait_for(&self, time: Duration) -> bool {
        !matches!(
            self.received.recv_timeout(time),
            Err(RecvTimeoutError::Timeout)
        )
    }
}

/// Waits for a signal that may not be caught at all.
async fn one_of(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => {
            let _ = signal.recv().await;
        }
        None => std::future::pending().await,
    }
}
