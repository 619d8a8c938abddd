//! Bringing to the medium, soon, what was written and nobody has asked to be durable yet.
//!
//! A sync writes all that is dirty, whoever wrote it. What is copied in the background comes at the rate of the
//! link, and the kernel leaves it alone for up to half a minute, or until it is a tenth of the memory:
//! a guest's flush would wait for all of it. So the kernel is asked to begin with it at once, a batch at a
//! time, and whoever writes more is told when it has too much still before it.
//!
//! Nothing here makes anything durable: only a sync does. But the kernel may tell here, and nowhere else, that
//! something is lost. So what it is asked goes through the gate of the syncs, and where it fails it leaves the mark
//! and ends the use of the image as a sync does. Waiting is done on an open file of its own, because the kernel
//! tells once per open file of what it could not write, and the sync must be told.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::suspect::{self, Mark};
use crate::sync_gate::SyncGate;

/// Begun together, or more: enough to keep a medium busy, and soon written.
const BATCH_BYTES: u64 = 2 << 20;

/// Begun in one call: while the kernel finds a place for it others wait, guests' writes for the file's
/// records and a sync for its turn.
const PIECE_BYTES: u64 = 256 << 10;

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
    /// That of the medium. What could not be written may be lost.
    fn begin(&self, bytes: &Range<u64>) -> io::Result<()>;

    /// To return once what was begun there is written.
    ///
    /// # Errors
    /// As above.
    fn wait(&self, bytes: &Range<u64>) -> io::Result<()>;
}

/// What a failure becomes known to.
#[derive(Clone)]
pub(crate) struct Witnesses {
    /// The syncs of the image.
    pub(crate) gate: Arc<SyncGate>,
    /// Whoever opens it next.
    pub(crate) mark: Arc<dyn Mark + Send + Sync>,
}

/// An image's; see the [module](self).
pub(crate) struct Behind {
    kernel: Box<dyn Kernel>,
    told: Witnesses,
    state: Mutex<State>,
    changed: Condvar,
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
    /// The kernel does it in its own time from here on.
    off: bool,
}

impl Behind {
    /// For an open image, with a thread that lives until [`Behind::end`].
    ///
    /// # Errors
    /// The system gives no more threads.
    pub(crate) fn new(
        kernel: Box<dyn Kernel>,
        told: Witnesses,
    ) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let behind = Arc::new(Self {
            kernel,
            told,
            state: Mutex::new(State {
                noted: Vec::new(),
                noted_bytes: 0,
                begun_bytes: 0,
                most_bytes: FIRST_BYTES,
                off: false,
            }),
            changed: Condvar::new(),
        });
        let bringing = Arc::clone(&behind);
        let thread = thread::Builder::new()
            .name("write-behind".into())
            .spawn(move || bringing.bring())?;
        Ok((behind, thread))
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
    pub(crate) fn wrote(&self, written: Range<u64>) {
        let mut state = self.state();
        if state.off || written.is_empty() {
            return;
        }
        state.noted_bytes += written.end - written.start;
        match state.noted.last_mut() {
            Some(last) if last.end == written.start => last.end = written.end,
            _ => state.noted.push(written),
        }
        if state.noted_bytes >= BATCH_BYTES {
            drop(state);
            self.changed.notify_all();
        }
    }

    /// The kernel does it in its own time from here on.
    pub(crate) fn end(&self) {
        let mut state = self.state();
        state.off = true;
        state.noted = Vec::new();
        drop(state);
        self.changed.notify_all();
    }

    /// Brings batch after batch to the medium, until the end.
    fn bring(&self) {
        // Of the usual priority: a sync may wait for it.
        let mut begun = Vec::new();
        let (mut since, mut brought) = (Instant::now(), 0);
        while let Some(batch) = self.next_batch(begun.is_empty()) {
            if begun.is_empty() {
                (since, brought) = (Instant::now(), 0);
            }
            let outcome = batch
                .iter()
                .try_for_each(|range| self.begin(range))
                .and_then(|()| begun.iter().try_for_each(|range| self.wait(range)));
            match outcome {
                Ok(()) => {}
                Err(Stopped::Ended) => return,
                Err(Stopped::Failed(error)) => {
                    tracing::error!("what was copied could not be brought to the medium: {error}");
                    return self.end();
                }
            }
            let over: u64 = begun.iter().map(|range| range.end - range.start).sum();
            brought += over;
            let elapsed = since.elapsed();
            let most = (elapsed >= ROUND && brought > 0).then(|| {
                let bytes = u128::from(brought) * MOST_TIME.as_nanos() / elapsed.as_nanos();
                (since, brought) = (Instant::now(), 0);
                u64::try_from(bytes).unwrap_or(MOST_BYTES)
            });
            self.brought(over, most);
            begun = batch;
        }
    }

    /// What is to be begun now, in order; nothing where that is too little and something else is to be waited for.
    /// `None`: the end.
    fn next_batch(&self, none_begun: bool) -> Option<Vec<Range<u64>>> {
        let mut state = self.state();
        while none_begun && !state.off && state.noted_bytes < BATCH_BYTES {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.off {
            return None;
        }
        if state.noted_bytes < BATCH_BYTES {
            return Some(Vec::new());
        }
        state.begun_bytes += std::mem::take(&mut state.noted_bytes);
        let batch = std::mem::take(&mut state.noted);
        drop(state);
        Some(joined(batch))
    }

    fn brought(&self, bytes: u64, most: Option<u64>) {
        let mut state = self.state();
        state.begun_bytes -= bytes;
        if let Some(most) = most {
            state.most_bytes = most.clamp(LEAST_BYTES, MOST_BYTES);
        }
    }

    fn begin(&self, range: &Range<u64>) -> Result<(), Stopped> {
        let mut at = range.start;
        while at < range.end {
            self.check_end()?;
            let end = range.end.min(at + PIECE_BYTES);
            self.told
                .gate
                .begin(|| suspect::guarded(&*self.told.mark, || self.kernel.begin(&(at..end))))?;
            at = end;
        }
        Ok(())
    }

    fn wait(&self, range: &Range<u64>) -> Result<(), Stopped> {
        self.check_end()?;
        suspect::guarded(&*self.told.mark, || self.kernel.wait(range))
            .inspect_err(|error| self.told.gate.fail(error))?;
        Ok(())
    }

    fn check_end(&self) -> Result<(), Stopped> {
        match self.state().off {
            true => Err(Stopped::Ended),
            false => Ok(()),
        }
    }
}

/// In order, neighbours joined.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, range| {
        let joined = next.start == range.end;
        if joined {
            range.end = next.end;
        }
        joined
    });
    ranges
}

/// Why no more is brought to the medium.
enum Stopped {
    Ended,
    Failed(io::Error),
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// A file that is open for this alone.
pub(crate) struct OpenFile(File);

impl OpenFile {
    /// Of an open image.
    ///
    /// # Errors
    /// It cannot be opened once more, or its file system or this kernel cannot be asked.
    pub(crate) fn of(image: &File) -> io::Result<Self> {
        let file = Self(File::open(format!("/proc/self/fd/{}", image.as_raw_fd()))?);
        // Whether it may be asked at all: nothing is done without a flag. From here on a failure is the medium's.
        file.ask(&(0..1), 0)?;
        Ok(file)
    }

    fn ask(&self, bytes: &Range<u64>, flags: libc::c_uint) -> io::Result<()> {
        let offset = i64::try_from(bytes.start).map_err(io::Error::other)?;
        let len = i64::try_from(bytes.end - bytes.start).map_err(io::Error::other)?;
        // SAFETY: the descriptor is open for as long as the file lives, and no memory is passed.
        let outcome = unsafe { libc::sync_file_range(self.0.as_raw_fd(), offset, len, flags) };
        if outcome == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Condvar;

    use super::*;
    use crate::suspect::MemoryMark;

    #[derive(Debug, Default)]
    struct Asked {
        begun: Vec<Range<u64>>,
        waited: Vec<Range<u64>>,
        begin_fails: bool,
        wait_fails: bool,
        /// What is begun takes until this is over.
        stuck: bool,
        /// It is waited for.
        waits: bool,
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

        fn outcome(fails: bool) -> io::Result<()> {
            match fails {
                true => Err(io::Error::from_raw_os_error(5)),
                false => Ok(()),
            }
        }
    }

    impl Kernel for Script {
        fn begin(&self, bytes: &Range<u64>) -> io::Result<()> {
            self.change(|asked| asked.begun.push(bytes.clone()));
            Self::outcome(self.asked().begin_fails)
        }

        fn wait(&self, bytes: &Range<u64>) -> io::Result<()> {
            self.change(|asked| asked.waits = true);
            self.until(|asked| !asked.stuck);
            self.change(|asked| asked.waited.push(bytes.clone()));
            Self::outcome(self.asked().wait_fails)
        }
    }

    struct World {
        script: Script,
        mark: Arc<MemoryMark>,
        gate: Arc<SyncGate>,
        behind: Arc<Behind>,
        thread: Option<JoinHandle<()>>,
    }

    impl World {
        fn new() -> Self {
            let (script, mark, gate) = (Script::default(), Arc::default(), Arc::default());
            let told = Witnesses {
                gate: Arc::clone(&gate),
                mark: Arc::clone(&mark) as _,
            };
            let (behind, thread) = Behind::new(Box::new(script.clone()), told).unwrap();
            Self {
                script,
                mark,
                gate,
                behind,
                thread: Some(thread),
            }
        }

        /// Until what was written is on the medium, but for what is too little to begin.
        fn rest(&self) {
            let rests = || {
                let state = self.behind.state();
                state.begun_bytes == 0 && state.noted_bytes < BATCH_BYTES
            };
            while !rests() {
                thread::yield_now();
            }
        }
    }

    impl Drop for World {
        fn drop(&mut self) {
            self.script.change(|asked| asked.stuck = false);
            self.behind.end();
            if let Some(thread) = self.thread.take() {
                thread.join().unwrap();
            }
        }
    }

    fn bytes_of(ranges: &[Range<u64>]) -> u64 {
        ranges.iter().map(|range| range.end - range.start).sum()
    }

    #[test]
    fn what_is_written_is_begun_and_waited_for_once() {
        let world = World::new();
        let piece = 64 << 10;
        let pieces = 40 * BATCH_BYTES / piece;
        // From both ends of what is written, as it may come.
        for n in 0..pieces {
            let at = if n % 2 == 0 {
                n / 2
            } else {
                pieces - 1 - n / 2
            };
            world.behind.wrote(at * piece..(at + 1) * piece);
            // Nothing was written.
            world.behind.wrote(0..0);
        }
        world.rest();
        let left = world.behind.state().noted_bytes;
        assert!(left < BATCH_BYTES, "{left} bytes are left");
        let asked = world.script.asked();
        // No more, so nothing twice: the parts do not overlap.
        assert_eq!(bytes_of(&asked.begun), pieces * piece - left);
        let (begun, waited) = (joined(asked.begun.clone()), joined(asked.waited.clone()));
        assert_eq!(begun, waited);
        assert!(begun.windows(2).all(|pair| pair[0].end < pair[1].start));
        assert!(asked.waited.len() <= 40 * 3, "in {}", asked.waited.len());
        let longest = asked
            .begun
            .iter()
            .map(|range| range.end - range.start)
            .max();
        assert_eq!(longest, Some(PIECE_BYTES));
        assert!(!world.mark.is_raised().unwrap());
        world.gate.run(|| Ok(())).unwrap();
    }

    #[test]
    fn a_medium_that_is_slow_is_waited_for() {
        let world = World::new();
        world.script.change(|asked| asked.stuck = true);
        let mut at = 0;
        while !world.behind.is_far() {
            world.behind.wrote(at..at + BATCH_BYTES);
            at += BATCH_BYTES;
            assert!(at <= 2 * MOST_BYTES, "it never is far behind");
        }
        assert!(at > LEAST_BYTES);
        world.script.change(|asked| asked.stuck = false);
        world.rest();
        assert!(!world.behind.is_far());
        assert_eq!(bytes_of(&world.script.asked().waited), at);
    }

    /// Until the end, of which nobody is told otherwise.
    fn write_until_it_fails(world: &World) {
        let mut at = 0;
        while !world.behind.state().off {
            world.behind.wrote(at..at + BATCH_BYTES);
            at += BATCH_BYTES;
            thread::yield_now();
        }
        let told = world.gate.run(|| panic!("a sync that could be believed"));
        assert_eq!(told.unwrap_err().raw_os_error(), Some(5));
        assert!(world.mark.is_raised().unwrap());
        assert!(!world.behind.is_far());
        world.behind.wrote(0..MOST_BYTES * 2);
        assert!(!world.behind.is_far(), "somebody is held up");
    }

    #[test]
    fn what_cannot_begin_fails_the_syncs_and_leaves_the_mark() {
        let world = World::new();
        world.script.change(|asked| asked.begin_fails = true);
        write_until_it_fails(&world);
        assert_eq!(world.script.asked().begun.len(), 1, "it was tried again");
    }

    #[test]
    fn what_is_not_written_fails_the_syncs_and_leaves_the_mark() {
        let world = World::new();
        world.script.change(|asked| asked.wait_fails = true);
        write_until_it_fails(&world);
        assert_eq!(world.script.asked().waited.len(), 1, "it was tried again");
    }

    #[test]
    fn nothing_is_begun_once_it_has_ended() {
        let world = World::new();
        world.script.change(|asked| asked.stuck = true);
        world.behind.wrote(0..BATCH_BYTES);
        world.script.until(|asked| asked.waits);
        world.behind.wrote(BATCH_BYTES..20 * BATCH_BYTES);
        world.behind.end();
        let script = world.script.clone();
        let gate = Arc::clone(&world.gate);
        drop(world);
        assert_eq!(bytes_of(&script.asked().begun), BATCH_BYTES);
        assert!(gate.run(|| Ok(())).is_ok());
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
        // A directory's is none, and neither is a pipe's.
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        assert!(OpenFile::of(&File::from(pipe)).is_err());
    }
}
