//! A disk on its way: the programs at both sites, and how it is seen that they have finished.
//!
//! Owns the command lines of every way of moving, and the processes: all of them end when the
//! value is dropped.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hikkoshi_testkit::process::{self, Process};
use hikkoshi_testkit::qmp::Qmp;
use serde_json::{Value, json};

use super::disk::{Disk, allocated_bytes};
use super::mover::{HEAT_FILE, How, Mover, SourceKind};
use super::site::Sites;
use crate::client::{Connection, Endpoint};

/// How often it is looked whether a move has finished.
const POLL: Duration = Duration::from_millis(25);
/// A peer that does not tell when it has finished has, when the link has been quiet so long...
const QUIET: Duration = Duration::from_secs(4);
/// ...with less than this a second on it.
const QUIET_BYTES_PER_S: f64 = 100e3;
/// How long control sockets may take to appear.
const SOON: Duration = Duration::from_secs(30);

/// A copy of a disk that sources serve, and that hikkoshi may mark as departed. Where the images live, in memory by
/// default: no source is to wait for this machine's disk, and a page cache may be emptied between two measurements.
pub struct SourceCopy(PathBuf);

impl SourceCopy {
    /// Copies `disk` to `path`.
    pub fn make(disk: &Disk, path: PathBuf) -> Result<Self> {
        // Range by range: zeroes within the data stay, as on the disk. To find them is up to who moves it.
        let mut from = fs::File::open(&disk.path).context("open the disk")?;
        let mut to = fs::File::create(&path).context("make a copy of the disk")?;
        to.set_len(disk.size_bytes).context("size the copy")?;
        for &(start, length) in &disk.extents {
            from.seek(SeekFrom::Start(start))?;
            to.seek(SeekFrom::Start(start))?;
            let copied = std::io::copy(&mut (&from).take(length), &mut to)?;
            ensure!(copied == length, "the disk is shorter than it was");
        }
        // The disk is not to be busy with it while others are measured.
        to.sync_all().context("sync the copy")?;
        Ok(Self(path))
    }

    /// The image.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Forgets all that a daemon keeps about the image, so that it is a plain disk again.
    fn reset(&self) -> Result<()> {
        let state = format!("{}.hikkoshi", self.0.display());
        match fs::remove_dir_all(&state) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context("remove a source's state");
            }
            _ => {}
        }
        // There is none where the source kept no state.
        let _ = rustix::fs::removexattr(&self.0, "user.hikkoshi.volume");
        Ok(())
    }
}

/// What every move needs.
pub struct Terms<'a> {
    /// Our binary.
    pub hikkoshi: &'a Path,
    /// Where it moves.
    pub sites: &'a Sites,
    /// What moves.
    pub disk: &'a Disk,
    /// The same, as the source serves it.
    pub copy: &'a SourceCopy,
    /// For the destination's files; empty.
    pub dir: &'a Path,
    /// Whether to copy in the background, or only what is asked for.
    pub background: bool,
}

/// How the end of a move is noticed.
enum End {
    Exit,
    Absent(PathBuf),
    Job(Qmp),
    Quiet,
}

/// The disk on its way.
pub struct Moving {
    /// The destination first: it goes before its source when dropped.
    process: Process,
    _held: Option<Connection>,
    _source: Process,
    end: End,
    /// Where the guest finds its disk; `None` while there is none.
    pub endpoint: Option<Endpoint>,
    arrived: PathBuf,
    started: Instant,
}

/// The source of a move, before there is a destination.
pub struct Source(Process);

impl Mover {
    /// Starts the source.
    pub fn start_source(&self, terms: &Terms<'_>) -> Result<Source> {
        let log = terms.dir.join("source.log");
        let address = terms.sites.source_address();
        let process = match self.source() {
            SourceKind::Hikkoshi => {
                terms.copy.reset()?;
                let mut arguments = words(&[
                    "serve",
                    &terms.copy.path().display().to_string(),
                    "--listen",
                    &format!("tcp://{address}"),
                    // For a guest at the old site.
                    "--listen",
                    &format!("unix:{}", source_socket(terms.dir).display()),
                    "--control",
                    &format!("unix:{}", source_control(terms.dir).display()),
                ]);
                arguments.extend_from_slice(self.source_options());
                let program = terms.hikkoshi.display().to_string();
                terms.sites.start_source(&program, &arguments, &log)?
            }
            SourceKind::Nbdkit => {
                let arguments = words(&[
                    "--foreground",
                    "--ipaddr",
                    &address.ip().to_string(),
                    "--port",
                    &address.port().to_string(),
                    "file",
                    &terms.copy.path().display().to_string(),
                ]);
                terms.sites.start_source("nbdkit", &arguments, &log)?
            }
        };
        Ok(Source(process))
    }

    /// Starts the move.
    pub fn start(&self, terms: &Terms<'_>, source: Source) -> Result<Moving> {
        let uri = terms.sites.source_uri();
        let socket = terms.dir.join("sock");
        let endpoint = Endpoint::Unix(socket.clone());
        let image = terms.dir.join("image");
        let image_name = image.display().to_string();
        let log = terms.dir.join("destination.log");
        let started = Instant::now();
        let mut endpoint_of_guest = Some(endpoint.clone());
        let mut arrived = image.clone();
        let mut held = None;
        let client = |program: &str, arguments: Vec<String>| {
            Process::start(Some(&terms.sites.new), program, arguments, &log)
        };
        let (process, end) = match &self.how {
            How::Hikkoshi { options, .. } => {
                let control = terms.dir.join("control");
                let mut arguments = words(&[
                    "serve",
                    &image_name,
                    "--from",
                    &uri,
                    "--handoff",
                    "now",
                    "--listen",
                    &endpoint.listen(),
                    "--control",
                    &format!("unix:{}", control.display()),
                ]);
                let heat = terms.dir.join("heat");
                if options.iter().any(|option| option.contains(HEAT_FILE)) {
                    write_heat(terms, &heat)?;
                }
                let heat = heat.display().to_string();
                let filled = options.iter().map(|word| word.replace(HEAT_FILE, &heat));
                arguments.extend(filled);
                if !terms.background {
                    arguments.push("--no-background".into());
                }
                let program = terms.hikkoshi.display().to_string();
                let process = terms
                    .sites
                    .start_destination(&program, &arguments, &endpoint, &log)?;
                (process, End::Absent(control))
            }
            How::Nbdcopy => {
                endpoint_of_guest = None;
                (client("nbdcopy", words(&[&uri, &image_name]))?, End::Exit)
            }
            How::NbdcopyConnections(count) => {
                endpoint_of_guest = None;
                // It has no more connections than threads.
                let arguments = words(&[
                    &format!("--connections={count}"),
                    &format!("--threads={count}"),
                    &uri,
                    &image_name,
                ]);
                (client("nbdcopy", arguments)?, End::Exit)
            }
            How::Convert => {
                endpoint_of_guest = None;
                let arguments = words(&[
                    "convert",
                    "-m",
                    "16",
                    "-W",
                    "-f",
                    "raw",
                    "-O",
                    "raw",
                    &uri,
                    &image_name,
                ]);
                (client("qemu-img", arguments)?, End::Exit)
            }
            How::Stream => {
                let control = terms.dir.join("qmp");
                let size = terms.disk.size_bytes.to_string();
                let create = ["create", "-q", "-f", "qcow2", &image_name, &size];
                process::run("qemu-img", create)?;
                let arguments = stream_arguments(terms.sites, &image, &socket, &control);
                let process = terms.sites.start_destination(
                    "qemu-storage-daemon",
                    &arguments,
                    &endpoint,
                    &log,
                )?;
                let mut qmp = Qmp::start(connect(&control)?)?;
                if terms.background {
                    let job = json!({"job-id": "stream", "device": "overlay"});
                    qmp.execute("block-stream", job)?;
                }
                (process, End::Job(qmp))
            }
            How::Scan => {
                // TMPDIR is where the cow filter keeps what it has, in a file without a name.
                let mut arguments = words(&[
                    &format!("TMPDIR={}", terms.dir.display()),
                    "nbdkit",
                    "--foreground",
                    "-U",
                    &socket.display().to_string(),
                ]);
                if terms.background {
                    arguments.push("--filter=scan".into());
                    arguments.push("--filter=readahead".into());
                }
                arguments.extend(words(&[
                    "--filter=cow",
                    "nbd",
                    &format!("uri={uri}"),
                    "cow-on-read=true",
                    "cow-on-cache=true",
                ]));
                if terms.background {
                    arguments.push("scan-forever=false".into());
                }
                let process = terms
                    .sites
                    .start_destination("env", &arguments, &endpoint, &log)?;
                // It scans only while somebody is connected.
                held = Some(Connection::open(&endpoint, 1, true)?);
                arrived = unnamed_file(process.pid()).context("find the cow filter's overlay")?;
                (process, End::Quiet)
            }
        };
        Ok(Moving {
            process,
            _held: held,
            _source: source.0,
            end,
            endpoint: endpoint_of_guest,
            arrived,
            started,
        })
    }
}

/// Has the source write down what its guest has used.
fn write_heat(terms: &Terms<'_>, to: &Path) -> Result<()> {
    let output = Command::new(terms.hikkoshi)
        .args(["heat", "--control"])
        .arg(format!("unix:{}", source_control(terms.dir).display()))
        .output()
        .context("run hikkoshi heat")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "hikkoshi heat failed: {said}");
    fs::write(to, output.stdout).context("write a heat file")
}

fn source_control(dir: &Path) -> PathBuf {
    dir.join("source.control")
}

/// Where a source that is ours can be used at the old site.
pub fn source_socket(dir: &Path) -> PathBuf {
    dir.join("source.sock")
}

impl Moving {
    /// When it began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The file in which what has arrived can be seen.
    pub fn arrived_in(&self) -> PathBuf {
        self.arrived.clone()
    }

    /// Waits until all is here, for `limit` from the start at most; the seconds it took, or `None`
    /// if it has not finished by then.
    pub fn wait(&mut self, sites: &Sites, limit: Duration) -> Result<Option<f64>> {
        let mut last_traffic = (Instant::now(), sites.link.a_to_b().bytes);
        let mut quiet_since = Instant::now();
        loop {
            let now = Instant::now();
            let done = match &mut self.end {
                End::Exit => match self.process.wait(Duration::ZERO) {
                    Ok(status) => {
                        ensure!(status.success(), "{status}: {}", self.process.tail());
                        Some(now)
                    }
                    Err(_) => None,
                },
                End::Absent(control) => {
                    self.process.check_alive()?;
                    let status = status(control)?;
                    let absent = status["absent_bytes"].as_u64();
                    (absent.context("no absent_bytes")? == 0).then_some(now)
                }
                End::Job(qmp) => {
                    self.process.check_alive()?;
                    let jobs = qmp.execute("query-jobs", json!({}))?;
                    let finished = jobs.as_array().is_some_and(Vec::is_empty);
                    finished.then_some(now)
                }
                End::Quiet => {
                    self.process.check_alive()?;
                    let bytes = sites.link.a_to_b().bytes;
                    let since = now.duration_since(last_traffic.0);
                    if since > Duration::from_millis(500) {
                        let rate = (bytes - last_traffic.1) as f64 / since.as_secs_f64();
                        last_traffic = (now, bytes);
                        if rate > QUIET_BYTES_PER_S {
                            quiet_since = now;
                        }
                    }
                    (now.duration_since(quiet_since) > QUIET).then_some(quiet_since)
                }
            };
            if let Some(end) = done {
                return Ok(Some(end.duration_since(self.started).as_secs_f64()));
            }
            if now.duration_since(self.started) > limit {
                return Ok(None);
            }
            std::thread::sleep(POLL);
        }
    }

    /// What the destination printed last.
    pub fn tail(&self) -> String {
        self.process.tail()
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn stream_arguments(sites: &Sites, image: &Path, socket: &Path, control: &Path) -> Vec<String> {
    let address = sites.source_address();
    let network = json!({
        "driver": "nbd",
        "node-name": "network",
        "server": {
            "type": "inet",
            "host": address.ip().to_string(),
            "port": address.port().to_string(),
        },
    });
    let overlay = json!({
        "driver": "qcow2",
        "node-name": "overlay",
        "file": {"driver": "file", "filename": image},
        "backing": "network",
    });
    let keep = json!({"driver": "copy-on-read", "node-name": "disk", "file": "overlay"});
    let mut arguments = Vec::new();
    for node in [network, overlay, keep] {
        arguments.extend(["--blockdev".into(), node.to_string()]);
    }
    let export = json!({
        "type": "nbd", "id": "disk", "node-name": "disk", "name": "", "writable": true,
    });
    arguments.extend(words(&[
        "--nbd-server",
        &format!(
            "addr.type=unix,addr.path={},max-connections=16",
            socket.display()
        ),
        "--export",
        &export.to_string(),
        "--chardev",
        &format!(
            "socket,id=qmp,server=on,wait=off,path={}",
            control.display()
        ),
        "--monitor",
        "chardev=qmp",
    ]));
    arguments
}

/// Connects to a socket that is about to appear.
fn connect(path: &Path) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > SOON => {
                return Err(error).with_context(|| format!("connect to {}", path.display()));
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// What a daemon of ours says about its only export.
pub fn status(control: &Path) -> Result<Value> {
    let mut stream = connect(control)?;
    stream.set_read_timeout(Some(SOON))?;
    stream
        .write_all(b"GET /v1/status HTTP/1.1\r\nHost: hikkoshi\r\nConnection: close\r\n\r\n")
        .context("ask for the status")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("read the status")?;
    let Some((_, body)) = answer.split_once("\r\n\r\n") else {
        bail!("the daemon's answer has no body: {answer}");
    };
    let mut list: Value = serde_json::from_str(body).with_context(|| answer.clone())?;
    Ok(list[0].take())
}

/// The largest file without a name that a process has open, as a path through which it can be seen.
fn unnamed_file(pid: u32) -> Option<PathBuf> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let unnamed = open.map(|entry| entry.path()).filter(|path| {
        fs::read_link(path).is_ok_and(|target| target.to_string_lossy().ends_with("(deleted)"))
    });
    unnamed.max_by_key(|path| fs::metadata(path).map_or(0, |meta| meta.len()))
}

/// The part of the disk's data that has arrived in `file`, 0 to 1.
pub fn arrived_share(file: &Path, disk: &Disk) -> f64 {
    (allocated_bytes(file) as f64 / disk.data_bytes() as f64).min(1.0)
}
