//! The built binary, as a user or a script meets it.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};

fn hikkoshi() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hikkoshi"));
    for variable in ["LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command
}

fn run(words: &[&str]) -> Output {
    hikkoshi()
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A daemon that is killed with the test.
struct Served {
    child: Child,
    out: BufReader<ChildStdout>,
    control: String,
    ready: String,
}

impl Served {
    /// Starts `hikkoshi serve` and waits for its line.
    fn start(dir: &Path, name: &str, words: &[&str]) -> Self {
        let control = format!("unix:{}", dir.join(format!("{name}.control")).display());
        let mut child = hikkoshi()
            .arg("serve")
            .args(words)
            .args(["--control", &control])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        out.read_line(&mut ready).unwrap();
        assert!(ready.starts_with("serving "), "{ready:?}");
        Self {
            child,
            out,
            control,
            ready,
        }
    }

    /// A command to this daemon.
    fn ask(&self, words: &[&str]) -> Output {
        run(&[words, &["--control", &self.control]].concat())
    }

    fn json(&self, words: &[&str]) -> serde_json::Value {
        let output = self.ask(words);
        assert!(output.status.success(), "{words:?}: {}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Ends it as a supervisor would, and tells its exit status.
    fn end(mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        let status = self.child.wait().unwrap();
        let mut rest = String::new();
        self.out.read_to_string(&mut rest).unwrap();
        status.code()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Ended already, maybe.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

/// A disk of 16 MiB with 3 MiB of data at 5 MiB.
fn old_disk(dir: &Path) -> String {
    let old = path(dir, "old.img");
    let file = std::fs::File::create_new(&old).unwrap();
    file.set_len(16 << 20).unwrap();
    file.write_all_at(&vec![0x5a; 3 << 20], 5 << 20).unwrap();
    old
}

#[test]
fn wrong_usage_is_exit_status_2_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = path(dir.path(), "disk.img");
    std::fs::write(&file, [0; 512]).unwrap();
    let config = path(dir.path(), "bad.toml");
    std::fs::write(&config, "[[export]]\nimage = 'a'\nblocksize = '4k'\n").unwrap();
    for (words, hint) in [
        (&["serve"] as &[&str], "<IMAGE"),
        (&["serve", "x", "--listen", "10809"], "tcp://HOST:PORT"),
        (&["serve", "x", "--from", "nbds://h/"], "TLS"),
        (&["serve", "x", "--from", &file], "hikkoshi serve"),
        (&["serve", "x", "--block-size", "3k"], "power of two"),
        (&["serve", "--config", &config], "blocksize"),
        (&["serve", &file, "--congestion", "tortoise"], "reno"),
        (&["limit"], "RATE"),
        (&["limit", "fast"], "40MB/s"),
        (&["limit", "--all", "fast"], "40MB/s"),
        (&["limit", "--all", "web", "1MB/s"], "together"),
        (&["move"], "NEWIMAGE"),
        (&["move", "a", "b", "c"], "NEWIMAGE"),
        (&["move", "a", "--max-rate", "fast"], "40MB/s"),
        (&["wait", "--timeout", "soon"], "30s"),
        (&["status", "--control", "/x"], "unix:PATH"),
        (&["nonsense"], "--help"),
    ] {
        let output = run(words);
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        let text = stderr(&output);
        assert!(text.contains(hint), "{words:?}: {text}");
    }
}

#[test]
fn help_completions_and_manual_are_there() {
    let help = stdout(&run(&["--help"]));
    for word in [
        "serve", "status", "wait", "pause", "resume", "limit", "handoff", "heat", "verify", "demo",
    ] {
        assert!(help.contains(&format!("  {word} ")), "{word}: {help}");
    }
    assert!(stdout(&run(&["completions", "bash"])).contains("--on-source-loss"));
    let dir = tempfile::tempdir().unwrap();
    let man = path(dir.path(), "man");
    assert!(run(&["man", &man]).status.success());
    let page = std::fs::read_to_string(dir.path().join("man/hikkoshi-serve.1")).unwrap();
    assert!(page.contains("source\\-loss"), "{page}");
}

#[test]
fn a_daemon_that_is_not_there_is_exit_status_1() {
    let dir = tempfile::tempdir().unwrap();
    let control = format!("unix:{}", path(dir.path(), "none"));
    for command in ["status", "wait", "pause", "handoff"] {
        let output = run(&[command, "--control", &control]);
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(stderr(&output).contains("hikkoshi serve"), "{command}");
    }
}

#[test]
fn a_plain_disk_is_served_shown_and_ended() {
    let dir = tempfile::tempdir().unwrap();
    let image = path(dir.path(), "disk.img");
    let words = [
        &image,
        "--size",
        "20MiB",
        "--export",
        "web",
        "--listen",
        "tcp://127.0.0.1:0",
    ];
    let served = Served::start(dir.path(), "one", &words);
    assert!(
        served
            .ready
            .contains("(20.0 MiB) as \"web\" at nbd://127.0.0.1:"),
        "{}",
        served.ready
    );
    assert!(served.ready.trim_end().ends_with("/web") && !served.ready.contains(":0/"));
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 20 << 20);
    let status = served.json(&["status", "--json"]);
    assert_eq!(status["export"], "web");
    assert_eq!(status["state"], "local");
    assert_eq!(status["size_bytes"], 20 << 20);
    assert_eq!(status["absent_bytes"], 0);
    assert!(stdout(&served.ask(&["status"])).contains("\"web\"  local  20.0 MiB"));
    assert!(served.ask(&["wait", "--timeout", "5s"]).status.success());
    // There is nothing to pause.
    let output = served.ask(&["pause", "web"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let output = served.ask(&["pause", "nobody"]);
    assert!(stderr(&output).contains("\"web\""), "{}", stderr(&output));
    let control = PathBuf::from(served.control.strip_prefix("unix:").unwrap());
    assert!(control.exists());
    assert_eq!(served.end(), Some(0));
    assert!(!control.exists());
}

#[test]
fn a_control_socket_or_an_address_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = path(dir.path(), "disk.img");
    let listen = format!("unix:{}", path(dir.path(), "nbd"));
    let served = Served::start(
        dir.path(),
        "one",
        &[&image, "--size", "1M", "--listen", &listen],
    );
    let other = path(dir.path(), "other.img");
    let free = format!("unix:{}", path(dir.path(), "free"));
    let second = |listen: &str, control: &str| {
        let words = [
            "serve",
            &other,
            "--size",
            "1M",
            "--listen",
            listen,
            "--control",
            control,
        ];
        let output = run(&words);
        assert_eq!(output.status.code(), Some(1));
        stderr(&output)
    };
    let text = second(&free, &served.control);
    assert!(text.contains("in use"), "{text}");
    let text = second(&listen, "none");
    assert!(text.contains("--listen"), "{text}");
    assert!(served.ask(&["status"]).status.success());
}

#[test]
fn a_disk_moves_by_the_commands_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (old_disk(dir.path()), path(dir.path(), "new.img"));
    let socket = path(dir.path(), "old.sock");
    let listen = format!("unix:{socket}");
    let source = Served::start(dir.path(), "source", &[&old, "--listen", &listen]);
    let listen = format!("unix:{}", path(dir.path(), "new.sock"));
    let words = [
        &new,
        "--from",
        &socket,
        "--listen",
        &listen,
        "--handoff",
        "command",
        "--prepare",
        "none",
    ];
    let moving = Served::start(dir.path(), "destination", &words);
    assert!(moving.ready.contains("standby"), "{}", moving.ready);
    assert_eq!(moving.json(&["status", "--json"])["state"], "standby");
    let output = moving.ask(&["wait", "--timeout", "100ms"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("standby"), "{}", stderr(&output));
    // Paused before it begins, so that it is still arriving when it is looked at.
    assert!(moving.ask(&["pause"]).status.success());
    assert!(moving.ask(&["limit", "", "1MB/s"]).status.success());
    assert!(moving.ask(&["limit", "--all", "2MB/s"]).status.success());
    assert!(moving.ask(&["handoff"]).status.success());
    let status = moving.json(&["wait", "--for", "arriving", "--timeout", "60s", "--json"]);
    assert_eq!(status["state"], "arriving");
    assert_eq!(status["background"], "paused");
    assert_eq!(status["limit_bytes_per_s"], 1_000_000);
    assert_eq!(status["common_limit_bytes_per_s"], 2_000_000);
    assert!(moving.ask(&["limit", "none"]).status.success());
    assert!(moving.ask(&["limit", "--all", "none"]).status.success());
    assert!(moving.ask(&["resume"]).status.success());
    let status = moving.json(&["wait", "--timeout", "60s", "--json"]);
    assert_eq!(
        (&status["state"], &status["absent_bytes"]),
        (&"local".into(), &0.into())
    );
    assert_eq!(source.end(), Some(0));
    assert_eq!(moving.end(), Some(0));
    assert!(std::fs::read(&new).unwrap() == std::fs::read(&old).unwrap());
}

/// What is counted at the old site outlives its daemon, can be exported, and is taken by the new one.
#[test]
fn heat_is_counted_kept_exported_and_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (old_disk(dir.path()), path(dir.path(), "new.img"));
    let socket = path(dir.path(), "old.sock");
    let listen = format!("unix:{socket}");
    let serve = || Served::start(dir.path(), "source", &[&old, "--listen", &listen]);
    let source = serve();
    assert!(source.ask(&["heat"]).stdout.starts_with(b"HKKHEAT1"));
    assert_eq!(stdout(&source.ask(&["heat", "--json"])), "");
    let near = format!("unix:{}", path(dir.path(), "new.sock"));
    let mut words = vec![
        &new,
        "--from",
        &socket,
        "--listen",
        &near,
        "--handoff",
        "now",
        // Frames are a move's own reads, and are not counted as a guest's.
        "--transport",
        "nbd",
        "--heat",
    ];
    // Whatever is no map of this disk is refused before anything is served.
    let (other, map) = (path(dir.path(), "other"), path(dir.path(), "map"));
    std::fs::write(&other, "no map").unwrap();
    words.push(&other);
    let refused = run(&[&["serve", "--control", "none"], &words[..]].concat());
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("heat map"),
        "{}",
        stderr(&refused)
    );

    std::fs::write(&map, source.ask(&["heat"]).stdout).unwrap();
    *words.last_mut().unwrap() = &map;
    let moving = Served::start(dir.path(), "destination", &words);
    assert!(moving.ask(&["wait", "--timeout", "60s"]).status.success());
    assert_eq!(moving.end(), Some(0));
    // The move has read the source.
    let regions = stdout(&source.ask(&["heat", "--json"]));
    // It may have begun at the front before it knew where there is data.
    let read: Vec<serde_json::Value> = regions
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|region: &serde_json::Value| region["offset"] != 0)
        .collect();
    let offsets: Vec<u64> = read
        .iter()
        .map(|region| region["offset"].as_u64().unwrap())
        .collect();
    assert_eq!(offsets, [5 << 20, 6 << 20, 7 << 20]);
    for region in &read {
        assert_eq!(region["length"], 1 << 20);
        assert!(
            region["reads"].as_f64().unwrap() >= 1.0 && region["writes"] == 0.0,
            "{region}"
        );
    }
    assert_eq!(source.end(), Some(0));
    let source = serve();
    assert_eq!(stdout(&source.ask(&["heat", "--json"])), regions);
    assert_eq!(source.end(), Some(0));
}

/// A disk at a source that is served, and where it is to move, after the handoff.
struct Move {
    dir: tempfile::TempDir,
    new: String,
    socket: String,
    source: Served,
}

impl Move {
    fn of(data: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let old = path(dir.path(), "old.img");
        std::fs::write(&old, data).unwrap();
        let socket = path(dir.path(), "old.sock");
        let listen = format!("unix:{socket}");
        let source = Served::start(dir.path(), "source", &[&old, "--listen", &listen]);
        Self {
            new: path(dir.path(), "new.img"),
            dir,
            socket,
            source,
        }
    }

    fn old(&self) -> String {
        path(self.dir.path(), "old.img")
    }

    /// The destination, which compares before it lets go.
    fn destination(&self, more: &[&str]) -> Served {
        let listen = format!("unix:{}", path(self.dir.path(), "new.sock"));
        let words = [&self.new, "--from", &self.socket, "--listen", &listen];
        let words = [&words[..], &["--handoff", "now", "--verify"], more].concat();
        Served::start(self.dir.path(), "destination", &words)
    }
}

/// Waits until a destination has so much.
fn wait_for_bytes(moving: &Served, bytes: u64) -> u64 {
    loop {
        let status = moving.json(&["status", "--json"]);
        let here = status["resident_bytes"].as_u64().unwrap();
        if here >= bytes {
            return here;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Killed in the middle, twice, and begun again by the same command; compared before it ends.
#[test]
fn a_killed_move_goes_on_and_is_compared_before_the_source_is_let_go() {
    let data: Vec<u8> = (0..24 << 20_u32)
        .map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0] | 1)
        .collect();
    let whole = Move::of(&data);
    let mut here = 0;
    for _ in 0..2 {
        // Far from its end when it is killed, also where it takes seconds to see how far it is.
        let mut moving = whole.destination(&["--max-rate", "2MB/s"]);
        here = wait_for_bytes(&moving, here + (2 << 20));
        moving.child.kill().unwrap();
        moving.child.wait().unwrap();
    }
    let moving = whole.destination(&[]);
    let status = moving.json(&["wait", "--timeout", "60s", "--json"]);
    assert_eq!(status["state"], "local");
    let output = moving.ask(&["verify"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no source"), "{}", stderr(&output));
    assert_eq!(moving.end(), Some(0));
    assert_eq!(whole.source.end(), Some(0));
    assert!(std::fs::read(&whole.new).unwrap() == data);
}

#[test]
fn verify_tells_by_its_exit_status_whether_the_disks_are_equal() {
    let whole = Move::of(&vec![0x77; 4 << 20]);
    let moving = whole.destination(&["--no-background"]);
    let equal = moving.json(&["verify", "--json"]);
    assert_eq!(equal["state"], "equal");
    assert_eq!(equal["withheld"], false);
    assert_eq!(moving.end(), Some(0));

    // A byte changes at the source after it was copied, and before it is let go.
    let moving = whole.destination(&["--max-rate", "200kB/s"]);
    let image = std::fs::File::open(&whole.new).unwrap();
    let mut byte = [0];
    while byte != [0x77] {
        std::thread::sleep(std::time::Duration::from_millis(20));
        image.read_exact_at(&mut byte, 12_345).unwrap();
    }
    let options = std::fs::OpenOptions::new().write(true).open(whole.old());
    options.unwrap().write_all_at(&[0x78], 12_345).unwrap();
    assert!(moving.ask(&["limit", "none"]).status.success());
    while !stdout(&moving.ask(&["status"])).contains("bytes differ from the source") {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let output = moving.ask(&["verify"]);
    assert_eq!(output.status.code(), Some(1));
    let (out, err) = (stdout(&output), stderr(&output));
    assert!(out.contains("4096 bytes at offset 12288"), "{out}");
    assert!(err.contains("--accept"), "{err}");
    assert!(stdout(&moving.ask(&["status"])).contains("arriving"));
    assert!(moving.ask(&["verify", "--accept"]).status.success());
    assert!(moving.ask(&["wait", "--timeout", "60s"]).status.success());
    assert_eq!(moving.end(), Some(0));
    assert_eq!(whole.source.end(), Some(0));
}

#[test]
fn a_supervisor_hears_that_it_is_ready() {
    let dir = tempfile::tempdir().unwrap();
    let notify = dir.path().join("notify");
    let heard = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    let control = format!("unix:{}", path(dir.path(), "control"));
    let listen = format!("unix:{}", path(dir.path(), "nbd"));
    let image = path(dir.path(), "disk.img");
    let mut child = hikkoshi()
        .args([
            "serve",
            &image,
            "--size",
            "1M",
            "--listen",
            &listen,
            "--control",
            &control,
        ])
        .env("NOTIFY_SOCKET", &notify)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut buf = [0; 64];
    let n = heard.recv(&mut buf).unwrap();
    assert_eq!(&buf[..n], b"READY=1");
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let n = heard.recv(&mut buf).unwrap();
    assert_eq!(&buf[..n], b"STOPPING=1");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn many_exports_come_from_a_configuration_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = path(dir.path(), "hikkoshi.toml");
    let listen = format!("unix:{}", path(dir.path(), "nbd"));
    let (a, b) = (path(dir.path(), "a.img"), path(dir.path(), "b.img"));
    let text = format!(
        "listen = ['{listen}']\n\
         [[export]]\nname = 'a'\nimage = '{a}'\nsize = '1M'\n\
         [[export]]\nname = 'b'\nimage = '{b}'\nsize = '2M'\nread-only = true\n"
    );
    std::fs::write(&config, text).unwrap();
    let served = Served::start(dir.path(), "many", &["--config", &config]);
    let lines = stdout(&served.ask(&["status", "--json"]));
    let names: Vec<String> = lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["export"].to_string())
        .collect();
    assert_eq!(names, ["\"a\"", "\"b\""]);
    assert_eq!(
        served.json(&["status", "b", "--json"])["size_bytes"],
        2 << 20
    );
    // Both are here, so there is nothing to choose from; with a command there is.
    assert!(served.ask(&["wait"]).status.success());
    let output = served.ask(&["pause"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("say which export"),
        "{}",
        stderr(&output)
    );
    assert_eq!(served.end(), Some(0));
}

#[test]
fn a_socket_that_a_supervisor_passes_in_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("passed");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let image = path(dir.path(), "disk.img");
    // The shell puts its input where the first passed socket is, and becomes the daemon, so that
    // the process number is right.
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0";
    let mut child = Command::new("sh")
        .args([
            "-c",
            script,
            env!("CARGO_BIN_EXE_hikkoshi"),
            "serve",
            &image,
        ])
        .args(["--size", "1M", "--control", "none"])
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut ready).unwrap();
    let mut greeting = [0; 8];
    let mut client = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    client.read_exact(&mut greeting).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
    assert!(
        !ready.contains("tcp") && !ready.contains("127.0.0.1"),
        "{ready}"
    );
}

#[test]
fn migrate_changes_nothing_when_something_is_not_ready() {
    assert_eq!(run(&["migrate"]).status.code(), Some(2));
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str| format!("unix:{}", dir.path().join(name).display());
    let (old, new) = (place("old.qmp"), place("new.qmp"));
    let qemus = ["migrate", "--qmp", &old, "--to-qmp", &new];
    let (old_disk, new_disk) = (place("old.control"), place("new.control"));
    let disk = format!("{old_disk}#web={new_disk}#web");
    // Without --disk the VM is asked which it has, and there is none.
    let output = run(&[&qemus[..], &["--uri", "tcp:b:4444"]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("no QEMU answers at unix:"),
        "{}",
        stderr(&output)
    );
    let output = run(&[&qemus[..], &["--uri", "tcp:b:4444", "--disk", &disk]].concat());
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("nothing was changed"), "{said}");
    for missing in [&old, &new] {
        assert!(said.contains(missing.as_str()), "{said}");
    }
    // All that is wrong at once: both QEMUs, both daemons.
    assert_eq!(said.matches("site: no ").count(), 4, "{said}");
    // A move that failed is gone on with without an address; there is nothing to go on with here.
    let output = run(&[&qemus[..], &["--resume", "--json", "--disk", &disk]].concat());
    assert_eq!(output.status.code(), Some(1));
    let end: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&end["event"], &end["done"]),
        (&"end".into(), &false.into())
    );
    assert!(
        end["text"]
            .as_str()
            .unwrap()
            .contains("not certain where the VM is"),
        "{end}"
    );
}

/// Whether the hook lets a VM with these disks in, and what it says.
fn hook(program: &Path, disks: &str, operation: &[&str]) -> (bool, String) {
    use std::io::Write as _;
    let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/libvirt/hikkoshi");
    let mut child = Command::new(hook)
        .args(["vm"].iter().chain(operation))
        .env("HIKKOSHI", program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let xml = format!("<domain><devices>{disks}</devices></domain>");
    // What does not look at the VM does not read it.
    let _ = child.stdin.take().unwrap().write_all(xml.as_bytes());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        stdout(&output),
        "",
        "libvirt would take it for the VM's XML"
    );
    (output.status.success(), stderr(&output))
}

#[test]
fn the_hook_for_libvirt_lets_a_vm_in_only_if_its_disks_stand_by() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let socket = |name: &str| format!("unix:{}", dir.join(name).display());
    let image = |name: &str| dir.join(name).display().to_string();
    let (old_listen, new_listen) = (socket("old.nbd"), socket("new.nbd"));
    let old = Served::start(
        dir,
        "old",
        &[
            &image("old"),
            "--export",
            "web",
            "--size",
            "1MiB",
            "--listen",
            &old_listen,
        ],
    );
    let from = format!("nbd+unix:///web?socket={}", dir.join("old.nbd").display());
    let new = Served::start(
        dir,
        "new",
        &[
            &image("new"),
            "--export",
            "web",
            "--from",
            &from,
            "--listen",
            &new_listen,
        ],
    );
    // The hook asks the daemons of the user's runtime directory: here, one that is named.
    let at = |served: &Served| {
        let path = dir.join("hikkoshi");
        let binary = env!("CARGO_BIN_EXE_hikkoshi");
        let script = format!(
            "#!/bin/sh\nexec {binary} \"$@\" --control {}\n",
            served.control
        );
        // By a process of its own: a file that is open for writing cannot be run, and whatever another
        // test starts just then has it open as well for a moment.
        let write = "printf %s \"$1\" > \"$0\" && chmod 755 \"$0\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", write]).arg(&path).arg(script);
        assert!(shell.status().unwrap().success());
        path
    };
    let incoming = ["migrate", "begin", "-"];
    let disk = |name: &str, more: &str| {
        format!("<disk type='network'><source protocol='nbd'{name}/>{more}</disk>")
    };
    let web = disk(" name='web'", "");

    assert_eq!(hook(&at(&new), &web, &incoming), (true, String::new()));
    assert!(
        hook(&at(&new), &disk("", ""), &incoming).0,
        "the only export has no name, too"
    );
    // The old copy, also for a VM that names none.
    for disks in [&web, &disk("", "")] {
        let (let_in, said) = hook(&at(&old), disks, &incoming);
        assert!(!let_in && said.contains("must be standby"), "{said}");
    }
    // What the VM cannot write to, other disks, and what is no incoming migration.
    assert!(hook(&at(&old), &disk(" name='web'", "<readonly/>"), &incoming).0);
    assert!(hook(&at(&old), &disk(" name='db'", ""), &incoming).0);
    assert!(hook(&at(&old), "<disk type='file'/>", &incoming).0);
    assert!(hook(&at(&old), &web, &["started", "begin", "-"]).0);
    // The source is gone.
    drop(old);
    let status = || new.json(&["status", "--json"]);
    while status()["source_connected"] == true {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let (let_in, said) = hook(&at(&new), &web, &incoming);
    assert!(
        !let_in && said.contains("does not reach its source"),
        "{said}"
    );
    // No daemon: no disk of ours.
    let place = at(&new);
    drop(new);
    let (let_in, said) = hook(&place, &web, &incoming);
    assert!(let_in && said.contains("no daemon answers"), "{said}");
    // No program.
    let (let_in, said) = hook(&dir.join("nothing"), &web, &incoming);
    assert!(!let_in && said.contains("remove this hook"), "{said}");
}

#[test]
fn a_disk_moves_to_another_image_and_the_old_one_says_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (old_disk(dir.path()), path(dir.path(), "new.img"));
    let listen = format!("unix:{}", path(dir.path(), "nbd.sock"));
    let words = [old.as_str(), "--export", "web", "--listen", &listen];
    let served = Served::start(dir.path(), "old", &words);
    let refused = served.ask(&["move", "web", &old]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("already"), "{}", stderr(&refused));
    // Without a cap on it that would be over at once.
    let state = path(dir.path(), "state");
    let begun = served.json(&[
        "move",
        "web",
        &new,
        "--state",
        &state,
        "--max-rate",
        "100kB/s",
        "--detach",
        "--json",
    ]);
    assert_eq!(begun["storage_move"]["phase"], "preparing");
    assert_eq!(begun["limit_bytes_per_s"], 100_000);
    let shown = stdout(&served.ask(&["status"]));
    assert!(shown.contains("hikkoshi abort"), "{shown}");
    assert!(served.ask(&["abort"]).status.success());
    assert!(!Path::new(&new).exists() && !Path::new(&state).exists());

    let moved = served.ask(&["move", &new, "--state", &state]);
    assert!(moved.status.success(), "{}", stderr(&moved));
    let said = stdout(&moved);
    assert!(
        said.contains(&new) && said.contains("needed no more"),
        "{said}"
    );
    let status = served.json(&["status", "web", "--json"]);
    assert_eq!(status["storage_move"]["phase"], "done");
    assert_eq!(status["image"], new.as_str());
    assert_eq!(status["state"], "local");
    assert_eq!(served.end(), Some(0));
    assert!(std::fs::read(&old).unwrap() == std::fs::read(&new).unwrap());

    // A file of several exports that still names the old one.
    let config = path(dir.path(), "hikkoshi.toml");
    let text = format!("listen = ['{listen}']\n[[export]]\nname = 'web'\nimage = '{old}'\n");
    std::fs::write(&config, text).unwrap();
    let output = run(&["serve", "--config", &config]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    let command = format!("hikkoshi serve {new} --state {state}");
    assert!(text.contains(&command), "{text}");
    let words = [new.as_str(), "--state", &state, "--listen", &listen];
    let served = Served::start(dir.path(), "new", &words);
    assert!(served.ready.contains("16.0 MiB"), "{}", served.ready);
    assert_eq!(served.end(), Some(0));
}
