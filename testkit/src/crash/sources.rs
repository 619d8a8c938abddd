//! The old sites: servers of the original disk that every volume moves from.

use super::DISK_SECTORS;
use super::daemon::{Daemon, Launch};
use super::disk::make_original;
use crate::process::Process;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is looked whether nbdkit still runs.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Servers of the original, by kind.
pub struct Sources {
    hikkoshi: Daemon,
    nbdkit: Nbdkit,
    uris: [String; 2],
}

impl Sources {
    /// Starts them, their files in `dir`. They live as long as the calling thread.
    ///
    /// # Errors
    /// One does not start.
    pub fn start(hikkoshi: &Path, dir: &Path) -> Result<Self> {
        fs::create_dir(dir)?;
        let launch = Launch {
            binary: hikkoshi.to_path_buf(),
            dir: dir.to_path_buf(),
            // Many move from it, one after the other: what is read-only has no fence.
            arguments: vec!["--read-only".to_owned()],
            crash_at: None,
            tracer: Vec::new(),
        };
        make_original(&launch.image(), DISK_SECTORS)?;
        let mut daemon = launch.spawn()?;
        ensure!(daemon.wait_until_up()?, "the source was killed");
        let nbdkit = Nbdkit::start(dir, &launch.image())?;
        let uri = |path: &Path| format!("nbd+unix:///?socket={}", path.display());
        Ok(Self {
            uris: [uri(daemon.socket()), uri(&dir.join("nbdkit.sock"))],
            hikkoshi: daemon,
            nbdkit,
        })
    }

    /// The address of one of them.
    ///
    /// # Errors
    /// One has died for good, so that nothing would ever arrive from it.
    pub fn pick(&mut self, random: u64) -> Result<&str> {
        self.nbdkit.check()?;
        ensure!(!self.hikkoshi.has_been_killed()?, "the source was killed");
        Ok(if random.is_multiple_of(3) {
            &self.uris[1]
        } else {
            &self.uris[0]
        })
    }
}

/// An nbdkit that is started again when it dies. Version 1.32 at least does: it fails an assertion
/// when a client is killed in the middle of its answers. A source that comes back is nothing a
/// destination may mind.
struct Nbdkit {
    stop: Arc<AtomicBool>,
    keeper: Option<JoinHandle<Result<()>>>,
}

impl Nbdkit {
    fn start(dir: &Path, image: &Path) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (up, is_up) = mpsc::channel();
        let (stopped, dir, image) = (Arc::clone(&stop), dir.to_path_buf(), image.to_path_buf());
        let keeper = std::thread::spawn(move || {
            let mut process = serve(&dir, &image)?;
            // Nobody waits if the start was given up.
            let _ = up.send(());
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK_EVERY);
                if process.check_alive().is_err() {
                    process = serve(&dir, &image)?;
                }
            }
            Ok(())
        });
        let mut this = Self {
            stop,
            keeper: Some(keeper),
        };
        if is_up.recv_timeout(START_TIMEOUT).is_err() {
            this.check()?;
        }
        Ok(this)
    }

    /// Fails if it could not be started.
    fn check(&mut self) -> Result<()> {
        if self.keeper.as_ref().is_none_or(JoinHandle::is_finished) {
            let keeper = self.keeper.take().context("nbdkit does not start")?;
            match keeper.join() {
                Ok(outcome) => outcome?,
                Err(_) => anyhow::bail!("the thread that keeps nbdkit panicked"),
            }
        }
        Ok(())
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(keeper) = self.keeper.take() {
            // Whatever it says now, nobody needs it any more.
            let _ = keeper.join();
        }
    }
}

fn serve(dir: &Path, image: &Path) -> Result<Process> {
    let socket: PathBuf = dir.join("nbdkit.sock");
    // What a dead one left.
    let _ = fs::remove_file(&socket);
    let arguments = [
        "--foreground".to_owned(),
        "--readonly".to_owned(),
        "--unix".to_owned(),
        socket.display().to_string(),
        "file".to_owned(),
        format!("file={}", image.display()),
    ];
    let mut nbdkit = Process::start(None, "nbdkit", &arguments, &dir.join("nbdkit.log"))?;
    nbdkit.wait_until("listening socket", START_TIMEOUT, |_| {
        UnixStream::connect(&socket).is_ok()
    })?;
    Ok(nbdkit)
}
