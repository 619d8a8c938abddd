//! The control interface, both ways: a client's bytes through the real router within its limits,
//! and the bytes of an answer through the command line's client.
//!
//! The first byte chooses. What must hold of the server: it answers in well-formed HTTP with JSON
//! and the documented statuses, carries out a command just when it answers with success, and its
//! memory is bounded. Of the client: whatever it takes for an answer is one, in whole.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use hikkoshi_daemon::control::{self, client};
use hikkoshi_daemon::events::{Event, EventKind, EventLog};
use hikkoshi_daemon::registry::{CommandError, Controlled, Exports};
use hikkoshi_daemon::status::{BackgroundState, Counters, ExportStatus, LifeState};
use hikkoshi_daemon::verification::{VerifyState, VerifyStatus};
use hikkoshi_engine::heat::{Heat, HeatMap};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::input::Input;
use crate::memory;

/// Bytes that the pipe between client and server holds: more than all answers come to. To a client
/// that pipelines garbage and does not read, hyper 1.12 may send its 400 into the middle of an
/// earlier answer (`on_parse_error` does not ask `can_write_head`). That harms nobody but this
/// client, and nothing of it is ours.
const PIPE_BYTES: usize = 4 << 20;

/// The head (16 KiB, and as much again while it grows), the body (4 KiB), the answers, and what
/// this harness keeps.
const MEMORY_BOUND: usize = 4 << 20;

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() {
        0..64 => answer(input.rest()),
        pace => {
            let exports = Arc::new(Fake::new());
            let bytes = input.rest();
            let shared: Arc<dyn Exports> = Arc::clone(&exports) as _;
            let bound = MEMORY_BOUND + 16 * bytes.len();
            let said = memory::within(bound, "a control connection", || {
                converse(shared, bytes, usize::from(pace))
            });
            check(bytes, &said, &exports);
        }
    }
}

/// The client's side: what it believes must be what the bytes say.
fn answer(raw: &[u8]) {
    let bound = MEMORY_BOUND + 32 * raw.len();
    let (all, one) = memory::within(bound, "the client", || client::understand(raw));
    assert!(
        all.is_err() || one.is_err(),
        "an answer that is both one and many"
    );
    let body = raw
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .map(|at| &raw[at + 4..]);
    if let Ok(all) = all {
        let again: Vec<ExportStatus> =
            serde_json::from_slice(&serde_json::to_vec(&all).unwrap()).unwrap();
        assert_eq!(all, again);
        let body: serde_json::Value = serde_json::from_slice(body.unwrap()).unwrap();
        assert_eq!(body.as_array().map(Vec::len), Some(all.len()));
    }
    if let Ok(one) = one {
        let again: ExportStatus =
            serde_json::from_slice(&serde_json::to_vec(&one).unwrap()).unwrap();
        assert_eq!(one, again);
    }
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .max_blocking_threads(1)
        .build()
        .unwrap();
}

/// Sends `bytes` in pieces and hangs up; gives all that came back.
fn converse(exports: Arc<dyn Exports>, bytes: &[u8], pace: usize) -> Vec<u8> {
    let piece = if pace < 160 {
        bytes.len().max(1)
    } else {
        pace - 159
    };
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
            let (mut receive, mut send) = tokio::io::split(ours);
            let mut said = Vec::new();
            let talk = async {
                for piece in bytes.chunks(piece) {
                    if let Err(e) = send.write_all(piece).await {
                        assert_eq!(e.kind(), ErrorKind::BrokenPipe);
                        break;
                    }
                }
                let _ = send.shutdown().await;
            };
            let listen = async {
                let _ = receive.read_to_end(&mut said).await;
            };
            tokio::join!(control::serve_one(exports, theirs), talk, listen);
            said
        })
    })
}

/// An answer in HTTP.
struct Answer<'a> {
    status: u16,
    body: &'a [u8],
}

/// Takes answers apart; panics at what is no HTTP. HEAD is the one request whose answers have
/// lengths without bodies, so input with it in is looked at only up to the first answer.
fn answers(said: &[u8], only_first: bool) -> Vec<Answer<'_>> {
    let mut rest = said;
    let mut all = Vec::new();
    while !rest.is_empty() {
        let head_len = rest
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap_or_else(|| panic!("a head that is cut off: {}", rest.escape_ascii()));
        let head = std::str::from_utf8(&rest[..head_len]).expect("a head that is no text");
        let mut lines = head.split("\r\n");
        let line = lines.next().unwrap();
        let version = line.starts_with("HTTP/1.1 ") || line.starts_with("HTTP/1.0 ");
        assert!(version, "{line:?} begins an answer");
        let status = line[9..12].parse().expect("a status");
        let mut length = 0;
        for header in lines {
            let (name, value) = header.split_once(": ").expect("a header");
            if name.eq_ignore_ascii_case("content-length") {
                length = value.parse().expect("a length");
            }
            assert!(
                !name.eq_ignore_ascii_case("transfer-encoding"),
                "a length is always known"
            );
        }
        rest = &rest[head_len + 4..];
        if only_first {
            all.push(Answer { status, body: &[] });
            return all;
        }
        let (body, after) = rest
            .split_at_checked(length)
            .expect("a body that is cut off");
        all.push(Answer { status, body });
        rest = after;
    }
    all
}

fn check(bytes: &[u8], said: &[u8], exports: &Fake) {
    let has_head = bytes.windows(4).any(|four| four == b"HEAD");
    let answers = answers(said, has_head);
    let mut done = 0;
    for answer in &answers {
        let text = String::from_utf8_lossy(answer.body);
        let text = text.as_ref();
        match answer.status {
            100 => {}
            200 if has_head => {}
            200 => {
                let what = success(answer.body);
                assert!(what.is_some(), "a success that cannot be read: {text}");
                done += u64::from(what == Some(Success::OfOne));
            }
            // What is no HTTP is answered by the library itself, without a body.
            400 | 413 | 414 | 431 if text.is_empty() => {}
            400 | 404 | 405 | 409 | 500 => {
                let value: Option<serde_json::Value> = serde_json::from_str(text).ok();
                let said = value.as_ref().is_some_and(|v| v["error"].is_string());
                assert!(said || has_head, "an error that does not say what: {text}");
            }
            other => panic!("status {other} is not documented"),
        }
    }
    let carried_out = exports.commands.load(Ordering::Relaxed);
    let asked = exports.asked.load(Ordering::Relaxed);
    assert!(carried_out <= asked);
    if !has_head {
        // A client that hangs up may miss the last answer; nothing is answered that was not done.
        assert!(
            done <= carried_out + exports.questions.load(Ordering::Relaxed),
            "more success than there was"
        );
    }
}

/// What a successful answer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Success {
    /// One export's status, or its comparison, which a command answers with.
    OfOne,
    /// Anything else.
    Other,
}

/// What a successful answer says; `None` if it is none of the documented forms.
fn success(body: &[u8]) -> Option<Success> {
    if HeatMap::decode(body).is_ok() {
        return Some(Success::Other);
    }
    let text = std::str::from_utf8(body).ok()?;
    let one = serde_json::from_str::<ExportStatus>(text).is_ok()
        || serde_json::from_str::<VerifyStatus>(text).is_ok();
    if one {
        return Some(Success::OfOne);
    }
    let other = text.starts_with("hikkoshi control interface")
        || text.starts_with("# HELP ")
        || serde_json::from_str::<Vec<ExportStatus>>(text).is_ok()
        || serde_json::from_str::<Vec<Event>>(text).is_ok();
    other.then_some(Success::Other)
}

/// Exports that count what is asked of them.
struct Fake {
    exports: Vec<Arc<Export>>,
    commands: Arc<AtomicU64>,
    asked: Arc<AtomicU64>,
    questions: AtomicU64,
}

struct Export {
    status: Mutex<ExportStatus>,
    commands: Arc<AtomicU64>,
    asked: Arc<AtomicU64>,
}

static STATUS: LazyLock<ExportStatus> = LazyLock::new(|| ExportStatus {
    export: String::new(),
    size_bytes: 1 << 40,
    state: LifeState::Arriving,
    resident_bytes: 5 << 30,
    owned_bytes: 1 << 20,
    absent_bytes: 1 << 30,
    wire_bytes: 77,
    codec: Some("zstd:3".into()),
    source_connected: Some(true),
    source_down_s: None,
    waiting: None,
    reads_waiting: 0,
    poisoned: false,
    disk_full: false,
    prepared: None,
    ahead_bytes: 0,
    seeded_bytes: 0,
    repeated_bytes: 0,
    way_back: Default::default(),
    background: BackgroundState::Running,
    rate_bytes_per_s: 1_000_000,
    eta_s: Some(3600),
    limit_bytes_per_s: None,
    common_limit_bytes_per_s: None,
    image: "/srv/disk.img".into(),
    old_copy_needed: false,
    taken_over: None,
    release_in_s: None,
    storage_move: None,
    source: Some("nbd://old-site.example/".into()),
    notes: vec!["waiting for \"something\"\n".into()],
    clients: 1,
    counters: Counters::default(),
});

impl Fake {
    fn new() -> Self {
        let (commands, asked) = (Arc::default(), Arc::default());
        let exports = ["", "web", "a b/\u{e9}%"].map(|name| {
            Arc::new(Export {
                status: Mutex::new(ExportStatus {
                    export: name.into(),
                    ..STATUS.clone()
                }),
                commands: Arc::clone(&commands),
                asked: Arc::clone(&asked),
            })
        });
        Self {
            exports: exports.to_vec(),
            commands,
            asked,
            questions: AtomicU64::new(0),
        }
    }
}

impl Exports for Fake {
    fn set_common_limit(&self, bytes_per_s: Option<u64>) {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.commands.fetch_add(1, Ordering::Relaxed);
        for export in &self.exports {
            export.status.lock().unwrap().common_limit_bytes_per_s = bytes_per_s;
        }
    }

    fn all(&self) -> Vec<Arc<dyn Controlled>> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        self.exports.iter().map(|e| Arc::clone(e) as _).collect()
    }

    fn find(&self, name: &str) -> Result<Arc<dyn Controlled>, CommandError> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        self.exports
            .iter()
            .find(|e| e.status.lock().unwrap().export == name)
            .map(|e| Arc::clone(e) as _)
            .ok_or_else(|| CommandError::NoSuchExport(name.to_owned()))
    }
}

impl Export {
    fn command(&self, change: impl FnOnce(&mut ExportStatus)) -> Result<(), CommandError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut status = self.status.lock().unwrap();
        if status.export == "web" {
            return Err(CommandError::Conflict("\"web\" has no source".into()));
        }
        change(&mut status);
        self.commands.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

impl Controlled for Export {
    fn status(&self) -> ExportStatus {
        self.status.lock().unwrap().clone()
    }

    fn events(&self, since: u64) -> Vec<Event> {
        let log = EventLog::default();
        log.add("web", EventKind::Opened, "\"it\" is served\n");
        log.since(since)
    }

    fn heat(&self) -> HeatMap {
        let heat = Heat::new(1 << 30);
        heat.read(0, 4096);
        heat.map()
    }

    fn verify(&self, accept: bool) -> Result<VerifyStatus, CommandError> {
        self.command(|status| status.notes.push(format!("verify, accept: {accept}")))?;
        Ok(self.verification())
    }

    fn verification(&self) -> VerifyStatus {
        VerifyStatus {
            export: self.status.lock().unwrap().export.clone(),
            state: VerifyState::Running,
            ..VerifyStatus::default()
        }
    }

    fn abort(&self) -> Result<(), CommandError> {
        self.command(|status| status.state = LifeState::GivenUp)
    }

    fn release(&self, force: bool) -> Result<(), CommandError> {
        self.command(|status| status.notes.push(format!("release, force: {force}")))
    }

    fn pause(&self) -> Result<(), CommandError> {
        self.command(|status| status.background = BackgroundState::Paused)
    }

    fn resume(&self) -> Result<(), CommandError> {
        self.command(|status| status.background = BackgroundState::Running)
    }

    fn set_limit(&self, bytes_per_s: Option<u64>) -> Result<(), CommandError> {
        assert!(bytes_per_s != Some(0), "a limit of nothing");
        self.command(|status| status.limit_bytes_per_s = bytes_per_s)
    }

    fn handoff(&self) -> Result<(), CommandError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        Err(CommandError::Failed("the disk is full".into()))
    }
}
