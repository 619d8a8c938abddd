//! Bringing to the medium, soon, what was written and nobody has asked to be durable yet.
//!
//! A sync writes all that is dirty, whoever wrote it. What is copied in the background comes at the rate of the
//! link, and the kernel leaves it alone for up to half a minute, or until it is a tenth of the memory:
//! a guest's flush would wait for all of it. So the kernel is asked to begin with it at once, a batch at a
//! time, and whoever writes more is told when it has too much still before it.
//!
//! Nothing here makes anything durable: only a sync does. It has an open file of its own, because the kernel
//! tells of a failed write once per open file, and the sync must be told.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::pool::Pool;
use crate::suspect::{self, Mark};

/// Begun together, or more: enough to keep a medium busy, and soon written.
const BATCH_BYTES: u64 = 2 << 20;

/// Whoever writes further ahead of the medium than it takes in this time is to wait: what a flush may
/// take longer for it.
const MOST_TIME: Duration = Duration::from_millis(100);

/// The bounds of that in bytes, and what it is while it is not known how fast the medium is.
const LEAST_BYTES: u64 = 8 << 20;
const MOST_BYTES: u64 = 64 << 20;
const FIRST_BYTES: u64 = 32 << 20;

/// Over how long it is measured how fast the medium is. It has something to do all the while.
const ROUND: Duration = Duration::from_millis(250);

/// What the kernel is asked, of the bytes of an open file.
pub(crate) trait Kernel: Send + Sync {
    /// To begin to write what is dirty there.
    ///
    /// # Errors
    /// That of the medium; [`io::ErrorKind::Unsupported`] where it cannot be asked.
    fn begin(&self, bytes: &Range<u64>) -> io::Result<()>;

    /// To return once what was begun there is written.
    ///
    /// # Errors
    /// As above.
    fn wait(&self, bytes: &Range<u64>) -> io::Result<()>;
}

/// An image's; see the [module](self).
pub(crate) struct Behind {
    kernel: Box<dyn Kernel>,
    mark: Arc<dyn Mark + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Written, and not begun.
    noted: Vec<Range<u64>>,
    noted_bytes: u64,
    /// Begun, and not known to be on the medium.
    begun_bytes: u64,
    /// More than this is too much.
    most_bytes: u64,
    /// Somebody brings it to the medium.
    running: bool,
    /// The file system cannot be asked, or has failed.
    off: bool,
}

impl Behind {
    /// For an open image. `mark`: left where its medium fails.
    pub(crate) fn new(kernel: Box<dyn Kernel>, mark: Arc<dyn Mark + Send + Sync>) -> Arc<Self> {
        Arc::new(Self {
            kernel,
            mark,
            state: Mutex::new(State {
                noted: Vec::new(),
                noted_bytes: 0,
                begun_bytes: 0,
                most_bytes: FIRST_BYTES,
                running: false,
                off: false,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the medium is so far behind that nobody should write more who need not.
    pub(crate) fn is_far(&self) -> bool {
        let state = self.state();
        !state.off && state.noted_bytes + state.begun_bytes > state.most_bytes
    }

    /// A range was written.
    pub(crate) fn wrote(self: &Arc<Self>, written: Range<u64>) {
        let mut state = self.state();
        if state.off || written.is_empty() {
            return;
        }
        state.noted_bytes += written.end - written.start;
        match state.noted.last_mut() {
            Some(last) if last.end == written.start => last.end = written.end,
            _ => state.noted.push(written),
        }
        if !state.running && state.noted_bytes >= BATCH_BYTES {
            state.running = true;
            drop(state);
            let this = Arc::clone(self);
            Pool::shared().submit(Box::new(move || this.bring()));
        }
    }

    /// Brings batch after batch to the medium, until less than one is left.
    fn bring(&self) {
        let mut begun = Vec::new();
        let (mut since, mut brought) = (Instant::now(), 0);
        while let Some(batch) = self.next_batch(begun.is_empty()) {
            let asked = || {
                each(&batch, |range| self.kernel.begin(range))?;
                each(&begun, |range| self.kernel.wait(range))
            };
            let outcome = match asked() {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => return self.end(),
                outcome => suspect::guarded(&*self.mark, || outcome),
            };
            let over: u64 = begun.iter().map(|range| range.end - range.start).sum();
            brought += over;
            let elapsed = since.elapsed();
            let most = (elapsed >= ROUND).then(|| {
                let bytes = u128::from(brought) * MOST_TIME.as_nanos() / elapsed.as_nanos();
                (since, brought) = (Instant::now(), 0);
                u64::try_from(bytes).unwrap_or(MOST_BYTES)
            });
            self.brought(over, most);
            if let Err(error) = outcome {
                // The next sync is told of it, too, and that ends the use of the image.
                tracing::debug!("bringing what was copied to the medium failed: {error}");
                return self.end();
            }
            begun = batch;
        }
    }

    fn brought(&self, bytes: u64, most: Option<u64>) {
        let mut state = self.state();
        state.begun_bytes -= bytes;
        if let Some(most) = most {
            state.most_bytes = most.clamp(LEAST_BYTES, MOST_BYTES);
        }
    }

    /// What is to be begun now, in order; nothing where that is too little and something else is to be waited for.
    /// `None`: nothing is left to do.
    fn next_batch(&self, none_begun: bool) -> Option<Vec<Range<u64>>> {
        let mut state = self.state();
        if state.off {
            return None;
        }
        if state.noted_bytes < BATCH_BYTES {
            state.running = !none_begun;
            return state.running.then(Vec::new);
        }
        state.begun_bytes += std::mem::take(&mut state.noted_bytes);
        let mut batch = std::mem::take(&mut state.noted);
        drop(state);
        batch.sort_unstable_by_key(|range| range.start);
        batch.dedup_by(|next, range| {
            let joined = next.start == range.end;
            if joined {
                range.end = next.end;
            }
            joined
        });
        Some(batch)
    }

    /// The kernel does it in its own time from here on.
    fn end(&self) {
        let mut state = self.state();
        state.off = true;
        state.noted = Vec::new();
    }
}

/// A file that is open for this alone.
pub(crate) struct OpenFile(File);

impl OpenFile {
    /// Of an open image.
    ///
    /// # Errors
    /// It cannot be opened once more.
    pub(crate) fn of(image: &File) -> io::Result<Self> {
        File::open(format!("/proc/self/fd/{}", image.as_raw_fd())).map(Self)
    }

    fn ask(&self, bytes: &Range<u64>, flags: libc::c_uint) -> io::Result<()> {
        let offset = i64::try_from(bytes.start).map_err(io::Error::other)?;
        let len = i64::try_from(bytes.end - bytes.start).map_err(io::Error::other)?;
        // SAFETY: the descriptor is open for as long as the file lives, and no memory is passed.
        let outcome = unsafe { libc::sync_file_range(self.0.as_raw_fd(), offset, len, flags) };
        if outcome == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // What it can be asked of does not fail so.
            Some(libc::EINVAL | libc::ENOSYS | libc::ESPIPE | libc::EOPNOTSUPP | libc::EPERM) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            _ => Err(error),
        }
    }
}

impl Kernel for OpenFile {
    fn begin(&self, bytes: &Range<u64>) -> io::Result<()> {
        self.ask(bytes, libc::SYNC_FILE_RANGE_WRITE)
    }

    fn wait(&self, bytes: &Range<u64>) -> io::Result<()> {
        self.ask(bytes, libc::SYNC_FILE_RANGE_WAIT_BEFORE)
    }
}

/// Each of them, also behind one that failed.
fn each(
    ranges: &[Range<u64>],
    mut ask: impl FnMut(&Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let mut outcome = Ok(());
    for range in ranges {
        outcome = outcome.and(ask(range));
    }
    outcome
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Condvar;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Debug, Default)]
    struct Asked {
        begun: Vec<Range<u64>>,
        waited: Vec<Range<u64>>,
        fails: Option<io::ErrorKind>,
        /// What is begun takes until this is over.
        stuck: bool,
    }

    #[derive(Clone, Default)]
    struct Script(Arc<(Mutex<Asked>, Condvar)>);

    impl Script {
        fn asked(&self) -> MutexGuard<'_, Asked> {
            self.0.0.lock().unwrap()
        }

        fn change(&self, change: impl FnOnce(&mut Asked)) {
            change(&mut self.asked());
            self.0.1.notify_all();
        }

        /// Returns once it is so.
        fn until(&self, so: impl Fn(&Asked) -> bool) {
            drop(self.0.1.wait_while(self.asked(), |asked| !so(asked)));
        }

        fn outcome(asked: &Asked) -> io::Result<()> {
            asked.fails.map_or(Ok(()), |kind| Err(kind.into()))
        }
    }

    impl Kernel for Script {
        fn begin(&self, bytes: &Range<u64>) -> io::Result<()> {
            self.change(|asked| asked.begun.push(bytes.clone()));
            Self::outcome(&self.asked())
        }

        fn wait(&self, bytes: &Range<u64>) -> io::Result<()> {
            self.until(|asked| !asked.stuck);
            self.change(|asked| asked.waited.push(bytes.clone()));
            Self::outcome(&self.asked())
        }
    }

    #[derive(Default)]
    struct Raised(AtomicBool);

    impl Mark for Raised {
        fn raise(&self) -> io::Result<()> {
            self.0.store(true, Ordering::Release);
            Ok(())
        }

        fn is_raised(&self) -> io::Result<bool> {
            Ok(self.0.load(Ordering::Acquire))
        }

        fn clear(&self) -> io::Result<()> {
            self.0.store(false, Ordering::Release);
            Ok(())
        }
    }

    fn world() -> (Script, Arc<Raised>, Arc<Behind>) {
        let (script, mark) = (Script::default(), Arc::new(Raised::default()));
        let behind = Behind::new(Box::new(script.clone()), Arc::clone(&mark) as _);
        (script, mark, behind)
    }

    fn bytes_of(ranges: &[Range<u64>]) -> u64 {
        ranges.iter().map(|range| range.end - range.start).sum()
    }

    fn until_idle(behind: &Behind) {
        while behind.state().running {
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_is_written_is_begun_in_order_and_waited_for_once() {
        let (script, mark, behind) = world();
        let piece = 64 << 10;
        let pieces = 40 * BATCH_BYTES / piece;
        // From both ends of what is written, as it may come.
        for n in 0..pieces {
            let at = if n % 2 == 0 {
                n / 2
            } else {
                pieces - 1 - n / 2
            };
            behind.wrote(at * piece..(at + 1) * piece);
            // A piece that was not written does not count.
            behind.wrote(0..0);
        }
        until_idle(&behind);
        let left = behind.state().noted_bytes;
        assert!(left < BATCH_BYTES, "{left} bytes are left");
        let asked = script.asked();
        assert_eq!(bytes_of(&asked.begun), pieces * piece - left);
        let sorted = |ranges: &[Range<u64>]| {
            let mut ranges = ranges.to_vec();
            ranges.sort_unstable_by_key(|range| range.start);
            ranges
        };
        let begun = sorted(&asked.begun);
        assert_eq!(begun, sorted(&asked.waited));
        assert!(begun.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(asked.begun.len() < 40 * 3, "in {} parts", asked.begun.len());
        assert!(!mark.is_raised().unwrap());
    }

    #[test]
    fn a_medium_that_is_slow_is_waited_for() {
        let (script, _, behind) = world();
        script.change(|asked| asked.stuck = true);
        let mut at = 0;
        while !behind.is_far() {
            behind.wrote(at..at + BATCH_BYTES);
            at += BATCH_BYTES;
            assert!(at <= 2 * MOST_BYTES, "it never is far behind");
        }
        assert!(at > LEAST_BYTES);
        script.change(|asked| asked.stuck = false);
        until_idle(&behind);
        assert!(!behind.is_far());
        assert_eq!(bytes_of(&script.asked().waited), at);
    }

    #[test]
    fn a_medium_that_fails_leaves_the_mark_and_holds_nobody_up() {
        let (script, mark, behind) = world();
        script.change(|asked| asked.fails = Some(io::ErrorKind::StorageFull));
        for n in 0..100 {
            behind.wrote(n * BATCH_BYTES..(n + 1) * BATCH_BYTES);
        }
        script.until(|asked| !asked.begun.is_empty());
        while !behind.state().off {
            std::thread::yield_now();
        }
        assert!(mark.is_raised().unwrap());
        assert!(!behind.is_far());
        behind.wrote(0..MOST_BYTES * 2);
        assert!(!behind.is_far());
    }

    #[test]
    fn where_the_kernel_cannot_be_asked_nothing_has_failed() {
        let (script, mark, behind) = world();
        script.change(|asked| asked.fails = Some(io::ErrorKind::Unsupported));
        for n in 0..100 {
            behind.wrote(n * BATCH_BYTES..(n + 1) * BATCH_BYTES);
        }
        while !behind.state().off {
            std::thread::yield_now();
        }
        assert!(!mark.is_raised().unwrap());
        assert!(!behind.is_far());
    }

    /// The kernel tells of a failed write once per open file.
    #[test]
    fn the_file_is_opened_anew_and_can_be_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let image = File::open(&path).unwrap();
        let opened = OpenFile::of(&image).unwrap();
        let inode = |file: &File| rustix::fs::fstat(file).unwrap().st_ino;
        assert_eq!(inode(&image), inode(&opened.0));
        rustix::fs::seek(&image, rustix::fs::SeekFrom::Start(7)).unwrap();
        assert_eq!(rustix::fs::tell(&opened.0).unwrap(), 0, "one open file");
        opened.begin(&(0..1 << 20)).unwrap();
        opened.wait(&(0..1 << 20)).unwrap();
        let nothing = opened.begin(&(u64::MAX - 1..u64::MAX)).unwrap_err();
        assert_ne!(nothing.kind(), io::ErrorKind::Unsupported);
    }
}
