//! The built binary, started while the source of a disk is away: what can be asked, what is served, and
//! how it ends.
#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Far longer than anything takes that is not stuck.
const LONG: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

const DISK: u64 = 4 << 20;

fn hikkoshi() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hikkoshi"));
    for variable in ["LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command
}

fn wait_until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < LONG, "{what}: not within {LONG:?}");
        std::thread::sleep(POLL);
    }
}

/// Sockets, images and logs of a test.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A disk that is noise in its second MiB.
    fn old_disk(&self) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(DISK).unwrap()];
        for (n, byte) in data[1 << 20..2 << 20].iter_mut().enumerate() {
            *byte = (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0];
        }
        std::fs::write(self.path("old.img"), &data).unwrap();
        data
    }

    /// Its daemon, served by now.
    fn old_site(&self) -> Served {
        let served = self.old_site_at_once();
        wait_until("the old site listens", || {
            UnixStream::connect(self.path("old.nbd")).ok()
        });
        served
    }

    /// The same, and somebody may be waiting for it.
    fn old_site_at_once(&self) -> Served {
        Served::start(self, "old", &["old.img", "--listen", "unix:old.nbd"])
    }

    /// A destination of it.
    fn new_site(&self, more: &[&str]) -> Served {
        let words = ["new.img", "--from", "./old.nbd", "--listen", "unix:new.nbd"];
        Served::start(self, "new", &[&words[..], more].concat())
    }

    /// A destination that has stood by, and was ended; so was its source.
    fn stood_by(&self) {
        let old = self.old_site();
        let new = self.new_site(&["--handoff", "command", "--prepare", "none"]);
        new.wait_state("", "standby");
        assert_eq!(new.end(), Some(0));
        assert_eq!(old.end(), Some(0));
    }
}

/// A daemon that is killed with the test.
struct Served {
    child: Child,
    dir: PathBuf,
    control: String,
    log: PathBuf,
}

impl Served {
    /// Starts `hikkoshi serve` and waits for nothing.
    fn start(place: &Place, name: &str, words: &[&str]) -> Self {
        Self::start_under(place, name, words, None)
    }

    fn start_under(place: &Place, name: &str, words: &[&str], notify: Option<&Path>) -> Self {
        let control = format!("unix:{}", place.text(&format!("{name}.control")));
        let log = place.path(&format!("{name}.log"));
        let out = std::fs::File::create(&log).unwrap();
        let mut command = hikkoshi();
        if let Some(notify) = notify {
            command.env("NOTIFY_SOCKET", notify);
        }
        let child = command
            .arg("serve")
            .args(words)
            .args(["--control", &control])
            .current_dir(place.0.path())
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        Self {
            child,
            dir: place.0.path().to_owned(),
            control,
            log,
        }
    }

    fn ask(&self, words: &[&str]) -> Output {
        hikkoshi()
            .args(words)
            .args(["--control", &self.control])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn told(&self, words: &[&str]) -> String {
        let output = self.ask(words);
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "{words:?}: {text}");
        text
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// The status of an export, once it is as wanted; the control socket may not be there yet.
    fn status(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        wait_until(&format!("{name:?} {what}: {}", self.log()), || {
            let output = self.ask(&["status", "--json"]);
            let lines = String::from_utf8(output.stdout).unwrap();
            let found = lines
                .lines()
                .map(|line| serde_json::from_str(line).unwrap());
            let mut found = found.filter(|one: &Value| one["export"] == name);
            found.next().filter(|one| wanted(one))
        })
    }

    fn wait_state(&self, name: &str, state: &str) -> Value {
        self.status(name, state, |status| status["state"] == state)
    }

    /// Once it has tried in vain.
    fn wait_waiting(&self, name: &str) -> Value {
        self.status(name, "waits", |status| {
            status["waiting"]["attempts"].as_u64() >= Some(1)
        })
    }

    fn kinds(&self, name: &str) -> Vec<String> {
        let lines = self.told(&["events", name, "--json"]);
        let kind = |line: &str| {
            let event: Value = serde_json::from_str(line).unwrap();
            event["kind"].as_str().unwrap().to_owned()
        };
        lines.lines().map(kind).collect()
    }

    /// What anyone may read of it.
    fn metrics(&self) -> String {
        let path = self.control.strip_prefix("unix:").unwrap();
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    /// A client of an export, once somebody listens.
    fn client(&self, name: &str) -> Result<Client, String> {
        let socket = self.dir.join("new.nbd");
        let stream = wait_until(&format!("nobody listens: {}", self.log()), || {
            UnixStream::connect(&socket).ok()
        });
        Client::shake_hands(stream, name)
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn wait_end(&mut self) -> Option<i32> {
        let status = wait_until(&format!("it does not end: {}", self.log()), || {
            self.child.try_wait().unwrap()
        });
        status.code()
    }

    /// Ends it as a supervisor would; its exit status.
    fn end(mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.wait_end()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Ended already, maybe.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest's disk, one request at a time.
struct Client(UnixStream);

const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;

impl Client {
    /// Asks for an export by name; what the server says if it does not have it.
    fn shake_hands(mut stream: UnixStream, name: &str) -> Result<Self, String> {
        stream.set_read_timeout(Some(LONG)).unwrap();
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        let mut out = 3_u32.to_be_bytes().to_vec();
        let len = u32::try_from(name.len()).unwrap();
        out.extend(b"IHAVEOPT");
        out.extend(OPTION_GO.to_be_bytes());
        out.extend((6 + len).to_be_bytes());
        out.extend(len.to_be_bytes());
        out.extend(name.as_bytes());
        out.extend(0_u16.to_be_bytes());
        stream.write_all(&out).unwrap();
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).unwrap();
            let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
            let mut payload = vec![0; usize::try_from(number(16)).unwrap()];
            stream.read_exact(&mut payload).unwrap();
            match number(12) {
                REPLY_ACK => return Ok(Self(stream)),
                REPLY_INFO => {}
                code => {
                    return Err(format!(
                        "{code:#x}: {}",
                        String::from_utf8(payload).unwrap()
                    ));
                }
            }
        }
    }

    fn send(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) {
        let mut out = 0x2560_9513_u32.to_be_bytes().to_vec();
        out.extend(0_u16.to_be_bytes());
        out.extend(command.to_be_bytes());
        out.extend(7_u64.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(len.to_be_bytes());
        out.extend(data);
        self.0.write_all(&out).unwrap();
    }

    fn begin_read(&mut self, offset: u64, len: u32) {
        self.send(0, offset, len, &[]);
    }

    fn begin_write(&mut self, offset: u64, data: &[u8]) {
        self.send(1, offset, u32::try_from(data.len()).unwrap(), data);
    }

    /// The answer's error number; the connection may end instead.
    fn answer(&mut self) -> std::io::Result<u32> {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply)?;
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes());
        Ok(u32::from_be_bytes(reply[4..8].try_into().unwrap()))
    }

    fn data(&mut self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.0.read_exact(&mut data).unwrap();
        data
    }

    fn is_unanswered(&mut self) -> bool {
        self.0.set_read_timeout(Some(POLL)).unwrap();
        let mut byte = [0];
        let nothing = self.0.read(&mut byte).is_err();
        self.0.set_read_timeout(Some(LONG)).unwrap();
        nothing
    }
}

/// A destination that was ended while it stood by was started with `--handoff now` while its source was
/// away: there was no control socket, `status` and `wait` saw nothing, and only SIGKILL ended it.
#[test]
fn a_handoff_at_the_start_waits_where_it_can_be_seen_and_ended() {
    let place = Place::new();
    place.old_disk();
    place.stood_by();
    for round in 0..2 {
        let new = place.new_site(&["--handoff", "now"]);
        let status = new.wait_waiting("");
        assert_eq!(status["state"], "standby", "{status}");
        let last = status["waiting"]["last_error"].as_str().unwrap();
        assert!(last.contains("old.nbd"), "{last}");
        let since = status["waiting"]["since_unix_ms"].as_u64().unwrap();
        assert!(since > 1_600_000_000_000, "{since}");
        assert!(
            status["notes"].to_string().contains("`hikkoshi abort`"),
            "{status}"
        );
        assert!(new.kinds("").contains(&"waiting".to_owned()));
        assert!(new.told(&["top"]).contains("WAITS FOR SOURCE"));
        let metrics = new.metrics();
        let attempts = "hikkoshi_waiting_for_source_attempts{export=\"\"} ";
        let (_, attempts) = metrics.split_once(attempts).unwrap();
        assert!(!attempts.starts_with("0\n"), "{metrics}");
        let wait = new.ask(&["wait", "--for", "arriving", "--timeout", "1s"]);
        assert_eq!(wait.status.code(), Some(1));
        let said = String::from_utf8(wait.stderr).unwrap();
        assert!(said.contains("waits for its source"), "{said}");
        let mut client = new.client("").unwrap();
        client.begin_read(1 << 20, 4096);
        let mut writer = new.client("").unwrap();
        writer.begin_write(0, &[1; 512]);
        assert!(client.is_unanswered() && writer.is_unanswered());
        // Nothing of it has happened, the second time as the first.
        assert_eq!(new.end(), Some(0), "round {round}");
        assert!(client.answer().is_err() && writer.answer().is_err());
        let image = std::fs::read(place.path("new.img")).unwrap();
        assert!(image.iter().all(|byte| *byte == 0));
    }
    // The old site has the disk, and takes writes.
    assert_eq!(place.old_site().wait_state("", "local")["clients"], 0);
}

#[test]
fn the_handoff_happens_by_itself_once_the_source_is_back() {
    let place = Place::new();
    let mut data = place.old_disk();
    place.stood_by();
    let new = place.new_site(&["--handoff", "now"]);
    new.wait_waiting("");
    let mut reader = new.client("").unwrap();
    reader.begin_read(1 << 20, 4096);
    let mut writer = new.client("").unwrap();
    writer.begin_write(0, &[1; 512]);
    let old = place.old_site_at_once();
    assert_eq!(reader.answer().unwrap(), 0);
    assert!(reader.data(4096) == data[1 << 20..(1 << 20) + 4096]);
    assert_eq!(writer.answer().unwrap(), 0);
    let status = new.wait_state("", "local");
    assert_eq!(status["waiting"], Value::Null);
    assert!(new.kinds("").contains(&"handoff".to_owned()));
    old.wait_state("", "departed");
    assert_eq!(old.end(), Some(0));
    assert_eq!(new.end(), Some(0));
    data[..512].fill(1);
    assert!(std::fs::read(place.path("new.img")).unwrap() == data);
}

#[test]
fn a_move_whose_handoff_waits_can_be_given_up() {
    let place = Place::new();
    place.old_disk();
    place.stood_by();
    let new = place.new_site(&["--handoff", "now"]);
    new.wait_waiting("");
    // Only once it is served: what it then says of the source that has not heard is in the status.
    new.client("").unwrap();
    new.told(&["abort"]);
    let status = new.wait_state("", "given-up");
    assert_eq!(status["waiting"], Value::Null);
    let old = place.old_site_at_once();
    new.status("", "is heard", |status| {
        !status["notes"].to_string().contains("has not heard")
    });
    old.wait_state("", "local");
    assert_eq!(new.end(), Some(0));
}

/// As before: where the source answers, and says no, the start fails.
#[test]
fn a_handoff_at_the_start_that_is_refused_is_exit_status_1() {
    let place = Place::new();
    place.old_disk();
    place.stood_by();
    let old = place.old_site();
    let words = ["other.img", "--from", "./old.nbd", "--listen", "unix:o.nbd"];
    let words = [&words[..], &["--handoff", "now"]].concat();
    let other = Served::start(&place, "other", &words);
    other.wait_state("", "local");
    old.wait_state("", "departed");
    let mut new = place.new_site(&["--handoff", "now"]);
    assert_eq!(new.wait_end(), Some(1), "{}", new.log());
    assert!(new.log().contains("moved on"), "{}", new.log());
}

/// A source that takes a connection and says nothing, and one that is not there.
const AWAY: [&str; 2] = ["./silent.nbd", "./nobody.nbd"];

/// One disk whose source was away kept all others of its daemon from being served.
#[test]
fn other_disks_are_served_while_one_waits_for_its_source() {
    for away in AWAY {
        let place = Place::new();
        let data = place.old_disk();
        let silent = UnixListener::bind(place.path("silent.nbd")).unwrap();
        let plain = std::fs::File::create(place.path("plain.img")).unwrap();
        plain.set_len(DISK).unwrap();
        plain.write_all_at(&[9; 512], 4096).unwrap();
        let config = format!(
            "listen = ['unix:new.nbd']\n\
             [[export]]\nname = 'moving'\nimage = 'new.img'\nfrom = '{away}'\nhandoff = 'now'\n\
             [[export]]\nname = 'plain'\nimage = 'plain.img'\n"
        );
        std::fs::write(place.path("hikkoshi.toml"), config).unwrap();
        let heard = UnixDatagram::bind(place.path("notify")).unwrap();
        heard.set_read_timeout(Some(LONG)).unwrap();
        let words = ["--config", "hikkoshi.toml"];
        let notify = place.path("notify");
        let new = Served::start_under(&place, "new", &words, Some(&notify));
        let mut client = new.client("plain").unwrap();
        client.begin_read(4096, 512);
        assert_eq!(client.answer().unwrap(), 0);
        assert_eq!(client.data(512), [9; 512]);
        let status = new.wait_waiting("moving");
        assert_eq!(status["state"], "opening", "{status}");
        assert_eq!(status["source_connected"], false);
        assert!(
            status["notes"]
                .to_string()
                .contains("nothing has begun here"),
            "{status}"
        );
        assert_eq!(new.kinds("moving"), ["waiting"]);
        assert!(!place.path("new.img").exists());
        assert!(
            new.metrics()
                .contains("hikkoshi_state{export=\"moving\",state=\"opening\"} 1")
        );
        let refused = new.client("moving").err().unwrap();
        assert!(refused.contains("not served yet"), "{refused}");
        let unknown = new.client("nosuch").err().unwrap();
        assert!(unknown.contains("no such export"), "{unknown}");
        let said = new.ask(&["pause", "moving"]);
        assert_eq!(said.status.code(), Some(1));
        hear(&heard, |text| text == "READY=1");
        hear(&heard, |text| {
            text.starts_with("STATUS=serving 1 of 2 disks") && text.contains(&away[2..])
        });
        // It comes to be where it was looked for.
        drop(silent);
        let _ = std::fs::remove_file(place.path("silent.nbd"));
        let listen = format!("unix:{away}");
        let old = Served::start(&place, "old", &["old.img", "--listen", &listen]);
        new.wait_state("moving", "local");
        hear(&heard, |text| text == "STATUS=serving 2 disks");
        let kinds = new.kinds("moving");
        assert_eq!(kinds[..2], ["waiting", "opened"], "{kinds:?}");
        old.wait_state("", "departed");
        let mut client = new.client("moving").unwrap();
        client.begin_read(1 << 20, 4096);
        assert_eq!(client.answer().unwrap(), 0);
        assert!(client.data(4096) == data[1 << 20..(1 << 20) + 4096]);
        assert_eq!(new.end(), Some(0));
        assert!(std::fs::read(place.path("new.img")).unwrap() == data);
    }
}

fn hear(socket: &UnixDatagram, wanted: impl Fn(&str) -> bool) {
    let begun = Instant::now();
    loop {
        let mut bytes = [0; 4096];
        let len = socket.recv(&mut bytes).unwrap();
        if wanted(std::str::from_utf8(&bytes[..len]).unwrap()) {
            return;
        }
        assert!(begun.elapsed() < LONG, "not heard");
    }
}

/// A disk that was never here, and nothing else to serve: an address that is mistyped looks the same.
#[test]
fn a_first_start_alone_fails_where_the_source_is_away() {
    let place = Place::new();
    let mut new = place.new_site(&[]);
    assert_eq!(new.wait_end(), Some(1));
    assert!(
        new.log().contains("cannot reach the source"),
        "{}",
        new.log()
    );
    assert!(!place.path("new.img").exists());
    assert!(!place.path("new.img.hikkoshi").exists());
}

#[test]
fn a_start_that_waits_for_a_silent_source_ends_at_a_signal() {
    for signal in [Signal::TERM, Signal::INT] {
        let place = Place::new();
        let silent = UnixListener::bind(place.path("old.nbd")).unwrap();
        let mut new = place.new_site(&[]);
        // It has asked, and is not answered.
        let waits = silent.accept().unwrap();
        new.wait_state("", "opening");
        new.signal(signal);
        assert_eq!(new.wait_end(), Some(0), "{}", new.log());
        drop(waits);
        assert!(!place.path("new.img").exists());
        assert!(!place.path("new.control").exists());
    }
}
