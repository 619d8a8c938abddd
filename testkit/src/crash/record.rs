//! What a process did to its files: the trace of its system calls, as strace writes it, read back.
//!
//! strace stops the process at the entry and at the exit of each call and goes on only after it has
//! noted that. So a call whose exit comes before another's entry in the trace was over before the
//! other began, which is all that the model of the medium relies on. Calls that failed are left
//! out; one that never returned, because the process was killed in it, may have happened.

use super::daemon::{PATIENCE, POLL};
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The longest data of one call that is recorded in full: a log is created with 4 MiB in one write.
const MAX_DATA_BYTES: u64 = 16 << 20;

/// The calls that change files, or make them durable, and those that open what is synced.
const CALLS: &str = "openat,mkdir,mkdirat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,\
                     fallocate,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,unlink,\
                     unlinkat,rmdir,fsetxattr,fremovexattr,copy_file_range,splice,sendfile";

/// The command that records what follows it, into `log`. The recorded program keeps its own
/// process id, so that it can be killed.
pub fn tracer(log: &Path) -> Result<Vec<OsString>> {
    let strace = crate::packages::require("strace")?;
    let words: [OsString; 16] = [
        strace.into(),
        "-D".into(),
        "-f".into(),
        "--timestamps=unix,ns".into(),
        "--syscall-times=ns".into(),
        "-y".into(),
        "-xx".into(),
        "-q".into(),
        "--seccomp-bpf".into(),
        "-e".into(),
        format!("trace={CALLS}").into(),
        "-e".into(),
        // The others are noise; this one is how most recordings end.
        "signal=KILL".into(),
        format!("--string-limit={MAX_DATA_BYTES}").into(),
        "-o".into(),
        log.into(),
    ];
    Ok(words.into())
}

/// What a call did. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An open that may create or truncate.
    Open {
        /// The file.
        path: PathBuf,
        /// O_TRUNC.
        truncate: bool,
    },
    /// A directory was made.
    MakeDir(PathBuf),
    /// Bytes at an offset; `None`: at the end of what was written to this descriptor so far.
    Write {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: Option<u64>,
        /// What.
        data: Vec<u8>,
    },
    /// A range was zeroed, allocated or not.
    Zero {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How long.
        len: u64,
    },
    /// The size was set.
    Resize {
        /// The file.
        path: PathBuf,
        /// To this.
        size: u64,
    },
    /// fsync or fdatasync.
    Sync {
        /// The file or directory.
        path: PathBuf,
        /// All of it, not its data alone.
        all: bool,
    },
    /// A rename.
    Rename {
        /// Old name.
        from: PathBuf,
        /// New name.
        to: PathBuf,
    },
    /// A name was removed.
    Remove(PathBuf),
    /// An attribute was set.
    Attribute {
        /// The file.
        path: PathBuf,
        /// Its value; the name is always the volume's mark.
        value: Vec<u8>,
    },
}

/// A call.
#[derive(Clone, Debug)]
pub struct Call {
    /// When it was entered, in nanoseconds since 1970.
    pub begun_ns: u64,
    /// When it returned; `None` if the process was killed in it.
    pub ended_ns: Option<u64>,
    /// What it did.
    pub change: Change,
}

/// Waits until the trace of the process `pid`, which has ended, is complete.
///
/// # Errors
/// It never is.
pub fn wait_for_end(log: &Path, pid: u32) -> Result<()> {
    let last = format!("\n{pid} ");
    let start = Instant::now();
    loop {
        let mut file = File::open(log).with_context(|| format!("open {}", log.display()))?;
        let from = file.metadata()?.len().saturating_sub(512);
        let mut end = Vec::new();
        file.seek(SeekFrom::Start(from))?;
        file.read_to_end(&mut end)?;
        // `PID TIME +++ exited with 0 +++`: the first thread is the last to be reported.
        let end = String::from_utf8_lossy(&end);
        if end.ends_with("+++\n")
            && end
                .trim_end()
                .rfind('\n')
                .is_some_and(|at| end[at..].starts_with(&last))
        {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "the recorder does not end");
        std::thread::sleep(POLL);
    }
}

/// Reads a trace. Only calls on files below `root` count.
///
/// # Errors
/// A line that is not understood: nothing is guessed at.
pub fn read(log: &Path, root: &Path) -> Result<Vec<Call>> {
    let mut calls = Vec::new();
    let mut unfinished: HashMap<String, (u64, String)> = HashMap::new();
    let file = File::open(log).with_context(|| format!("open {}", log.display()))?;
    for line in BufReader::new(file).lines() {
        let line = line?;
        let understand = || format!("not understood: {}", &line[..line.len().min(300)]);
        let (pid, rest) = line.split_once(' ').with_context(understand)?;
        let (stamp, rest) = rest.trim_start().split_once(' ').with_context(understand)?;
        let stamp = nanoseconds(stamp).with_context(understand)?;
        if rest.starts_with("+++") || rest.starts_with("---") {
            continue;
        }
        if let Some(begun) = rest.strip_suffix(" <unfinished ...>") {
            unfinished.insert(pid.to_owned(), (stamp, begun.to_owned()));
            continue;
        }
        let (begun_ns, text) = match rest.strip_prefix("<... ") {
            Some(resumed) => {
                let (_, end) = resumed.split_once(" resumed>").with_context(understand)?;
                let (begun_ns, begun) = unfinished.remove(pid).with_context(understand)?;
                (begun_ns, format!("{begun}{end}"))
            }
            None => (stamp, rest.to_owned()),
        };
        let (text, outcome) = text.rsplit_once(" = ").with_context(understand)?;
        // A call that a kill ended says `?`.
        if outcome.starts_with('-') {
            continue;
        }
        let ended_ns = match outcome.rsplit_once('<') {
            Some((_, took)) if !outcome.starts_with('?') => {
                let took = nanoseconds(took.trim_end_matches('>')).with_context(understand)?;
                Some(begun_ns + took)
            }
            _ => None,
        };
        if let Some(change) = parse(text, outcome, root).with_context(understand)?
            && path_of(&change).starts_with(root)
        {
            calls.push(Call {
                begun_ns,
                ended_ns,
                change,
            });
        }
    }
    for (_, (begun_ns, text)) in unfinished {
        if let Some(change) = parse(text.trim_end(), "?", root)?
            && path_of(&change).starts_with(root)
        {
            calls.push(Call {
                begun_ns,
                ended_ns: None,
                change,
            });
        }
    }
    calls.sort_by_key(|call| call.begun_ns);
    Ok(calls)
}

fn path_of(change: &Change) -> &Path {
    match change {
        Change::Open { path, .. }
        | Change::MakeDir(path)
        | Change::Write { path, .. }
        | Change::Zero { path, .. }
        | Change::Resize { path, .. }
        | Change::Sync { path, .. }
        | Change::Rename { from: path, .. }
        | Change::Remove(path)
        | Change::Attribute { path, .. } => path,
    }
}

/// `1764057385.123456789`, or the same without so many digits.
fn nanoseconds(text: &str) -> Result<u64> {
    let (seconds, rest) = text.split_once('.').context("no time")?;
    let nanos: u64 = format!("{rest:0<9}").parse()?;
    Ok(seconds.parse::<u64>()? * 1_000_000_000 + nanos)
}

/// One call without its result. `None` for one that changes nothing of a file.
fn parse(text: &str, outcome: &str, root: &Path) -> Result<Option<Change>> {
    let (name, rest) = text.split_once('(').context("no call")?;
    let rest = rest.strip_suffix(')').unwrap_or(rest);
    let words = Words(rest.trim_end_matches(", ")).collect::<Result<Vec<_>>>()?;
    let word = |n: usize| words.get(n).context("too few arguments");
    let number = |n: usize| -> Result<u64> { Ok(word(n)?.text()?.parse()?) };
    Ok(Some(match name {
        "openat" => {
            let flags = word(2)?.text()?;
            if !flags.contains("O_CREAT") && !flags.contains("O_TRUNC") {
                return Ok(None);
            }
            Change::Open {
                path: word(1)?.path()?,
                truncate: flags.contains("O_TRUNC"),
            }
        }
        "mkdir" => Change::MakeDir(word(0)?.path()?),
        "mkdirat" => Change::MakeDir(word(1)?.path()?),
        "write" | "pwrite64" => {
            let Some(path) = word(0)?.descriptor() else {
                return Ok(None);
            };
            let mut data = word(1)?.bytes()?;
            // A short write wrote so much.
            if let Some(Ok(done)) = outcome.split(' ').next().map(str::parse::<usize>) {
                data.truncate(done);
            }
            let offset = (name == "pwrite64").then(|| number(3)).transpose()?;
            Change::Write { path, offset, data }
        }
        "ftruncate" => Change::Resize {
            path: word(0)?.descriptor().context("no file")?,
            size: number(1)?,
        },
        "fallocate" => {
            let path = word(0)?.descriptor().context("no file")?;
            let mode = word(1)?.text()?;
            if !path.starts_with(root) {
                return Ok(None);
            }
            if !mode.contains("PUNCH_HOLE") && !mode.contains("ZERO_RANGE") {
                bail!("fallocate with {mode}");
            }
            Change::Zero {
                path,
                offset: number(2)?,
                len: number(3)?,
            }
        }
        "fsync" | "fdatasync" => Change::Sync {
            path: word(0)?.descriptor().context("no file")?,
            all: name == "fsync",
        },
        "rename" => Change::Rename {
            from: word(0)?.path()?,
            to: word(1)?.path()?,
        },
        "renameat" | "renameat2" => Change::Rename {
            from: word(1)?.path()?,
            to: word(3)?.path()?,
        },
        "unlink" | "rmdir" => Change::Remove(word(0)?.path()?),
        "unlinkat" => Change::Remove(word(1)?.path()?),
        "fsetxattr" => Change::Attribute {
            path: word(0)?.descriptor().context("no file")?,
            value: word(2)?.bytes()?,
        },
        // Killed on its way into a call, before anybody could see which: it was not made.
        "???" if outcome.starts_with('?') => return Ok(None),
        // It begins or awaits what the kernel would write anyway, and promises nothing of it.
        "sync_file_range" => return Ok(None),
        // From an image to a socket; sockets are no business of ours.
        "sendfile" | "writev" if word(0)?.descriptor().is_none() => return Ok(None),
        other => bail!("a call that nobody thought of: {other}"),
    }))
}

/// An argument of a call.
#[derive(Debug)]
enum Word {
    /// Quoted, decoded.
    Quoted(Vec<u8>),
    /// Anything else.
    Plain(String),
}

impl Word {
    fn text(&self) -> Result<&str> {
        match self {
            Self::Plain(text) => Ok(text),
            Self::Quoted(_) => bail!("a string where none should be"),
        }
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        match self {
            Self::Quoted(bytes) => Ok(bytes.clone()),
            Self::Plain(text) if text == "NULL" => Ok(Vec::new()),
            Self::Plain(text) => bail!("{text} where a string should be"),
        }
    }

    fn path(&self) -> Result<PathBuf> {
        Ok(String::from_utf8(self.bytes()?)?.into())
    }

    /// The path of a descriptor, `7</a/b>`; `None` for a socket or a pipe.
    fn descriptor(&self) -> Option<PathBuf> {
        let text = self.text().ok()?;
        let path = text.split_once('<')?.1.strip_suffix('>')?;
        let path = unescape(path.as_bytes()).ok()?;
        let path = String::from_utf8(path).ok()?;
        let path = path.strip_suffix(" (deleted)").unwrap_or(&path);
        path.starts_with('/').then(|| path.into())
    }
}

/// The arguments of a call, one by one.
struct Words<'a>(&'a str);

impl Iterator for Words<'_> {
    type Item = Result<Word>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        Some(self.take())
    }
}

impl Words<'_> {
    fn take(&mut self) -> Result<Word> {
        let word;
        if let Some(rest) = self.0.strip_prefix('"') {
            // With -xx every byte is `\xHH`, so no quote is ever within a string.
            let (inside, after) = rest.split_once('"').context("a string without an end")?;
            if after.starts_with("...") {
                bail!("a string was cut short");
            }
            word = Word::Quoted(unescape(inside.as_bytes())?);
            self.0 = after;
        } else {
            let end = self.0.find(", ").unwrap_or(self.0.len());
            word = Word::Plain(self.0[..end].to_owned());
            self.0 = &self.0[end..];
        }
        self.0 = self.0.strip_prefix(", ").unwrap_or(self.0);
        Ok(word)
    }
}

/// `\x61b` as "ab".
fn unescape(text: &[u8]) -> Result<Vec<u8>> {
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    let mut bytes = Vec::with_capacity(text.len() / 4);
    let mut at = 0;
    while at < text.len() {
        if let [b'\\', b'x', high, low, ..] = text[at..] {
            let (high, low) = (digit(high), digit(low));
            bytes.push(high.context("bad escape")? << 4 | low.context("bad escape")?);
            at += 4;
        } else {
            bytes.push(text[at]);
            at += 1;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Lines as strace 6.1 writes them, shortened.
    const TRACE: &str = "\
7 100.000000001 openat(AT_FDCWD<\\x2f>, \"\\x2f\\x64\\x2f\\x61\", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666) = 3<\\x2f\\x64\\x2f\\x61> <0.000000002>
7 100.000000010 mkdir(\"\\x2f\\x64\\x2f\\x62\", 0777) = -1 EEXIST (File exists) <0.000009264>
7 100.000000020 pwrite64(3<\\x2f\\x64\\x2f\\x61>, \"\\x01\\x02\\x03\", 3, 4096 <unfinished ...>
8 100.000000030 fdatasync(3<\\x2f\\x64\\x2f\\x61>) = 0 <0.000000005>
7 100.000000040 <... pwrite64 resumed>) = 2 <0.000000025>
8 100.000000050 write(2<\\x2f\\x6c\\x6f\\x67>, \"\\x78\", 1) = 1 <0.000000005>
8 100.000000060 rename(\"\\x2f\\x64\\x2f\\x61\", \"\\x2f\\x64\\x2f\\x63\") = 0 <0.000000005>
8 100.000000070 fallocate(3<\\x2f\\x64\\x2f\\x63>, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 0, 512) = ?
8 100.000000080 +++ killed by SIGKILL +++
7 100.000000090 +++ killed by SIGKILL +++
";

    #[test]
    fn a_trace_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("trace");
        std::fs::write(&log, TRACE).unwrap();
        wait_for_end(&log, 7).unwrap();
        let second = 100_000_000_000;
        let calls = read(&log, Path::new("/d")).unwrap();
        let times: Vec<_> = calls
            .iter()
            .map(|c| (c.begun_ns - second, c.ended_ns.map(|e| e - second)))
            .collect();
        let right = [
            (1, Some(3)),
            (20, Some(45)),
            (30, Some(35)),
            (60, Some(65)),
            (70, None),
        ];
        assert_eq!(times, right);
        let changes: Vec<Change> = calls.into_iter().map(|c| c.change).collect();
        let (a, c) = (PathBuf::from("/d/a"), PathBuf::from("/d/c"));
        assert_eq!(
            changes,
            [
                Change::Open {
                    path: a.clone(),
                    truncate: true
                },
                Change::Write {
                    path: a.clone(),
                    offset: Some(4096),
                    data: vec![1, 2]
                },
                Change::Sync {
                    path: a.clone(),
                    all: false
                },
                Change::Rename {
                    from: a,
                    to: c.clone()
                },
                Change::Zero {
                    path: c,
                    offset: 0,
                    len: 512
                },
            ]
        );
    }

    #[test]
    fn a_call_that_nobody_thought_of_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("trace");
        let line =
            "7 100.5 copy_file_range(3<\\x2f\\x64\\x2f\\x61>, NULL, 4, NULL, 9, 0) = 9 <0.1>\n";
        std::fs::write(&log, line).unwrap();
        assert!(read(&log, Path::new("/d")).is_err());
    }
}
