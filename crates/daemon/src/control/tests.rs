//! The control interface over a real socket, with exports that only pretend.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hikkoshi_engine::heat::{Heat, HeatMap};

use super::client::{ClientError, Command, ControlClient};
use super::{ControlError, place, serve};
use crate::events::{Event, EventKind, EventLog};
use crate::registry::{CommandError, Controlled, Exports};
use crate::status::{BackgroundState, Counters, ExportStatus, LifeState};
use crate::verification::{VerifyState, VerifyStatus};

/// An export that remembers what it was told.
struct Pretend {
    status: Mutex<ExportStatus>,
}

impl Pretend {
    fn named(name: &str, source: bool) -> Arc<Self> {
        Arc::new(Self {
            status: Mutex::new(ExportStatus {
                export: name.into(),
                size_bytes: 1 << 30,
                state: if source {
                    LifeState::Standby
                } else {
                    LifeState::Local
                },
                resident_bytes: 0,
                owned_bytes: 0,
                absent_bytes: 1 << 30,
                wire_bytes: 0,
                codec: source.then(|| "zstd:3".into()),
                source_connected: source.then_some(true),
                source_down_s: None,
                waiting: None,
                reads_waiting: 0,
                poisoned: false,
                disk_full: false,
                prepared: None,
                way_back: Default::default(),
                ahead_bytes: 0,
                seeded_bytes: 0,
                repeated_bytes: 0,
                background: BackgroundState::Running,
                rate_bytes_per_s: 0,
                eta_s: None,
                limit_bytes_per_s: None,
                common_limit_bytes_per_s: None,
                image: "disk.img".into(),
                old_copy_needed: false,
                taken_over: None,
                release_in_s: None,
                storage_move: None,
                source: source.then(|| "nbd://old/".into()),
                notes: vec![],
                clients: 0,
                counters: Counters::default(),
            }),
        })
    }

    fn change(&self, act: impl FnOnce(&mut ExportStatus)) -> Result<(), CommandError> {
        let mut status = self.status.lock().unwrap();
        if status.source.is_none() {
            return Err(CommandError::Conflict("there is no source".into()));
        }
        act(&mut status);
        Ok(())
    }
}

impl Controlled for Pretend {
    fn status(&self) -> ExportStatus {
        self.status.lock().unwrap().clone()
    }
    fn pause(&self) -> Result<(), CommandError> {
        self.change(|status| status.background = BackgroundState::Paused)
    }
    fn resume(&self) -> Result<(), CommandError> {
        self.change(|status| status.background = BackgroundState::Running)
    }
    fn set_limit(&self, rate: Option<u64>) -> Result<(), CommandError> {
        self.change(|status| status.limit_bytes_per_s = rate)
    }
    fn heat(&self) -> HeatMap {
        let heat = Heat::new(1 << 30);
        heat.read(0, 4096);
        heat.map()
    }

    fn verify(&self, accept: bool) -> Result<VerifyStatus, CommandError> {
        self.change(|status| status.notes.push(format!("verify, accept: {accept}")))?;
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
        Err(CommandError::Conflict("nothing to give up".to_owned()))
    }

    fn release(&self, force: bool) -> Result<(), CommandError> {
        if force {
            return self.change(|status| status.state = LifeState::Local);
        }
        Err(CommandError::Conflict("only by force".to_owned()))
    }

    fn handoff(&self) -> Result<(), CommandError> {
        if self.status.lock().unwrap().export == "broken" {
            return Err(CommandError::Failed("the disk is full".into()));
        }
        self.change(|status| status.state = LifeState::Arriving)
    }
    fn events(&self, since: u64) -> Vec<Event> {
        let log = EventLog::default();
        for n in 0..5 {
            log.add("web", EventKind::SourceLost, format!("for the {n}th time"));
        }
        log.since(since)
    }
}

struct Few(Vec<Arc<Pretend>>);

impl Exports for Few {
    fn set_common_limit(&self, bytes_per_s: Option<u64>) {
        for one in &self.0 {
            one.status.lock().unwrap().common_limit_bytes_per_s = bytes_per_s;
        }
    }
    fn all(&self) -> Vec<Arc<dyn Controlled>> {
        self.0.iter().map(|one| Arc::clone(one) as _).collect()
    }
    fn find(&self, name: &str) -> Result<Arc<dyn Controlled>, CommandError> {
        self.0
            .iter()
            .find(|one| one.status().export == name)
            .map(|one| Arc::clone(one) as _)
            .ok_or_else(|| CommandError::NoSuchExport(name.into()))
    }
}

fn few() -> Arc<Few> {
    Arc::new(Few(vec![
        Pretend::named("web & db/ü", true),
        Pretend::named("plain", false),
        Pretend::named("broken", true),
    ]))
}

fn socket() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    (dir, path)
}

/// Sends raw bytes and returns all that comes back until the daemon closes.
fn raw(path: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    // The daemon may answer and hang up before it has read all of a request it refuses.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

#[test]
fn commands_reach_the_export_they_name() {
    let (_dir, path) = socket();
    let server = serve(&path, few()).unwrap();
    let client = ControlClient::new(&path);
    let name = "web & db/ü";
    let names: Vec<_> = client
        .status()
        .unwrap()
        .into_iter()
        .map(|s| s.export)
        .collect();
    assert_eq!(names, [name, "plain", "broken"]);
    let status = client.command(name, Command::Pause).unwrap();
    assert_eq!(status.background, BackgroundState::Paused);
    let status = client.command(name, Command::Resume).unwrap();
    assert_eq!(status.background, BackgroundState::Running);
    let status = client.command(name, Command::Limit(Some(1 << 40))).unwrap();
    assert_eq!(status.limit_bytes_per_s, Some(1 << 40));
    let status = client.command(name, Command::Limit(None)).unwrap();
    assert_eq!(status.limit_bytes_per_s, None);
    let all = client.limit_all(Some(5_000_000)).unwrap();
    assert_eq!(all.len(), 3);
    assert_eq!(all[2].common_limit_bytes_per_s, Some(5_000_000));
    assert_eq!(
        client.limit_all(None).unwrap()[0].common_limit_bytes_per_s,
        None
    );
    let status = client.command(name, Command::Handoff).unwrap();
    assert_eq!(status.state, LifeState::Arriving);
    assert_eq!(client.export(name).unwrap(), status);
    for (accept, note) in [
        (false, "verify, accept: false"),
        (true, "verify, accept: true"),
    ] {
        let status = client.verify(name, accept).unwrap();
        assert_eq!(status.state, VerifyState::Running);
        assert_eq!(client.verification(name).unwrap(), status);
        let notes = client.export(name).unwrap().notes;
        assert_eq!(notes.last().map(String::as_str), Some(note));
    }
    server.shutdown();
    assert!(!path.exists());
}

#[test]
fn a_heat_map_arrives_whole() {
    let (_dir, path) = socket();
    let _server = serve(&path, few()).unwrap();
    let name = few().all()[0].status().export;
    let map = ControlClient::new(&path).heat(&name).unwrap();
    assert_eq!(map.regions.len(), 1);
    let nobody = ControlClient::new(&path).heat("nobody");
    assert!(matches!(
        nobody,
        Err(ClientError::Refused { status: 404, .. })
    ));
}

#[test]
fn refusals_carry_their_status_and_say_why() {
    let (_dir, path) = socket();
    let _server = serve(&path, few()).unwrap();
    let client = ControlClient::new(&path);
    let refused = |result: Result<ExportStatus, ClientError>| match result {
        Err(ClientError::Refused { status, message }) => (status, message),
        other => panic!("not refused: {other:?}"),
    };
    let (status, message) = refused(client.export("nobody"));
    assert_eq!(status, 404);
    assert!(message.contains("nobody"), "{message}");
    assert_eq!(refused(client.command("plain", Command::Pause)).0, 409);
    let (status, message) = refused(client.command("broken", Command::Handoff));
    assert_eq!((status, message.as_str()), (500, "the disk is full"));
}

#[test]
fn plain_http_works_and_bad_input_is_answered() {
    let (_dir, path) = socket();
    let _server = serve(&path, few()).unwrap();
    let ask = |line: &str| {
        raw(
            &path,
            format!("{line} HTTP/1.1\r\nHost: hikkoshi\r\nConnection: close\r\n\r\n").as_bytes(),
        )
    };
    let index = ask("GET /");
    assert!(index.starts_with("HTTP/1.1 200"), "{index}");
    assert!(index.contains("POST /v1/limit?name=NAME&bytes_per_s=N"));
    for (line, status) in [
        ("GET /nothing", 404),
        ("GET /v1/pause?name=plain", 405),
        ("POST /v1/status", 405),
        ("POST /v1/limit?name=broken", 400),
        ("POST /v1/limit?name=broken&bytes_per_s=0", 400),
        ("POST /v1/limit?name=broken&bytes_per_s=-1", 400),
        (
            "POST /v1/limit?name=broken&bytes_per_s=99999999999999999999",
            400,
        ),
        ("POST /v1/pause?nmae=broken", 400),
        ("POST /v1/verify?name=broken&accept=maybe", 400),
        ("GET /v1/verify?name=nobody", 404),
        ("POST /v1/verify?name=plain", 409),
        ("POST /v1/pause?name=a&name=b", 400),
    ] {
        let answer = ask(line);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{line}: {answer}"
        );
        assert!(answer.contains("{\"error\":"), "{line}: {answer}");
    }
}

#[test]
fn what_is_too_long_or_no_http_is_refused_and_others_are_served() {
    let (_dir, path) = socket();
    let _server = serve(&path, few()).unwrap();
    let long_header = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(1 << 20));
    assert!(!raw(&path, long_header.as_bytes()).contains("200 OK"));
    let many = "A: b\r\n".repeat(10_000);
    let many_headers = format!("GET / HTTP/1.1\r\n{many}\r\n");
    assert!(!raw(&path, many_headers.as_bytes()).contains("200 OK"));
    let long_target = format!("GET /{} HTTP/1.1\r\n\r\n", "z".repeat(1 << 20));
    assert!(!raw(&path, long_target.as_bytes()).contains("200 OK"));
    assert!(!raw(&path, b"\0\xff\r\n\r\nNBDMAGIC\r\n\r\n").contains("200 OK"));
    // Somebody who connects and says nothing does not keep others out.
    let _silent: Vec<_> = (0..8)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    assert_eq!(ControlClient::new(&path).status().unwrap().len(), 3);
}

#[test]
fn the_socket_is_private_and_a_live_one_is_not_stolen() {
    let (_dir, path) = socket();
    // Stale: bound once, its listener gone.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let first = serve(&path, few()).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(serve(&path, few()), Err(ControlError::InUse(_))));
    assert_eq!(ControlClient::new(&path).status().unwrap().len(), 3);
    drop(first);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    assert!(matches!(
        serve(&path, few()),
        Err(ControlError::NotASocket(_))
    ));
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    let long = path.with_file_name("x".repeat(200));
    assert!(matches!(
        serve(&long, few()),
        Err(ControlError::PathTooLong(..))
    ));
}

#[test]
fn a_client_believes_no_foreign_or_cut_off_answer() {
    let (_dir, path) = socket();
    for answer in [
        &b""[..],
        b"NBDMAGICIHAVEOPT",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n\r\n[]",
    ] {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            stream.write_all(answer).unwrap();
        });
        let error = ControlClient::new(&path).status().unwrap_err();
        thread.join().unwrap();
        assert!(matches!(error, ClientError::Garbled { .. }), "{error}");
    }
    let _ = std::fs::remove_file(&path);
    assert!(matches!(
        ControlClient::new(&path).status(),
        Err(ClientError::Unreachable { .. })
    ));
}

#[test]
fn only_private_directories_are_believed() {
    let dir = tempfile::tempdir().unwrap();
    let open = dir.path().join("open");
    let private = dir.path().join("private");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    let places = [open.clone(), private.clone()];
    let path = place::socket_for(&places, 7).unwrap();
    assert_eq!(path, private.join("7.sock"));
    assert!(place::socket_for(std::slice::from_ref(&open), 7).is_err());
    let _evil = UnixListener::bind(open.join("1.sock")).unwrap();
    drop(UnixListener::bind(private.join("2.sock")).unwrap());
    let _server = serve(&path, few()).unwrap();
    assert_eq!(place::live_sockets(&places), [path]);
}

#[test]
fn events_are_given_from_a_number_on() {
    let (_dir, path) = socket();
    let _server = serve(&path, few()).unwrap();
    let client = ControlClient::new(&path);
    let all = client.events("plain", 0).unwrap();
    assert_eq!(all.len(), 5);
    assert_eq!(all[0].number, 1);
    assert_eq!(all[0].kind, EventKind::SourceLost);
    // The exports here make their events anew each time, so the time may be another.
    let told = |events: &[Event]| -> Vec<(u64, String)> {
        events.iter().map(|e| (e.number, e.text.clone())).collect()
    };
    let late = client.events("plain", 3).unwrap();
    assert_eq!(told(&late), told(&all[3..]));
    assert!(matches!(
        client.events("nothing", 0),
        Err(ClientError::Refused { status: 404, .. })
    ));
    let answer = raw(
        &path,
        b"GET /v1/events?name=plain&since=x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    );
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

/// Every line of what Prometheus is given, taken apart by the rules of its format.
#[test]
fn metrics_are_well_formed_on_the_socket_and_on_tcp() {
    let (_dir, path) = socket();
    let exports = Arc::new(Few(vec![
        Pretend::named("we\"b\\\n", true),
        Pretend::named("plain", false),
    ]));
    let _server = serve(&path, Arc::clone(&exports) as _).unwrap();
    let tcp = super::serve_metrics("127.0.0.1:0", exports).unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let on_socket = raw(&path, request);
    let mut stream = std::net::TcpStream::connect(tcp.place()).unwrap();
    stream.write_all(request).unwrap();
    let mut on_tcp = String::new();
    stream.read_to_string(&mut on_tcp).unwrap();
    let body = |answer: &str| {
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.contains("text/plain; version=0.0.4"), "{head}");
        body.to_owned()
    };
    assert_eq!(body(&on_socket), body(&on_tcp));

    let (mut helped, mut samples) = (std::collections::HashSet::new(), 0);
    let mut kind = None;
    for line in body(&on_socket).lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(helped.insert(name.to_owned()), "{name} twice");
            assert!(help.ends_with('.'), "{help}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, type_) = rest.split_once(' ').unwrap();
            assert!(helped.contains(name));
            assert_eq!(type_ == "counter", name.ends_with("_total"), "{name}");
            kind = Some(name.to_owned());
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap();
            assert_eq!(Some(name), kind.as_deref(), "out of its family");
            assert!(labels.starts_with("export=\"") && labels.ends_with("\"}"));
            assert!(value.parse::<u64>().is_ok(), "{line}");
            samples += 1;
        }
    }
    assert!(samples > 40, "{samples}");
    let text = body(&on_socket);
    for line in [
        r#"hikkoshi_source_connected{export="we\"b\\\n"} 1"#,
        r#"hikkoshi_state{export="plain",state="local"} 1"#,
        r#"hikkoshi_poisoned{export="plain"} 0"#,
        r#"hikkoshi_wire_bytes_total{export="plain"} 0"#,
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains(r#"hikkoshi_source_connected{export="plain"}"#));
    // Nothing can be commanded there.
    let mut stream = std::net::TcpStream::connect(tcp.place()).unwrap();
    stream
        .write_all(b"POST /v1/pause HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
}

/// A command hung for ever on the socket of a daemon that accepts no more.
#[test]
fn a_full_backlog_is_an_error_in_bounded_time() {
    let (dir, path) = socket();
    let stuck = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    stuck
        .bind(&socket2::SockAddr::unix(&path).unwrap())
        .unwrap();
    stuck.listen(0).unwrap();
    let _waits = UnixStream::connect(&path).unwrap();
    let error = ControlClient::new(&path).status().unwrap_err();
    assert!(matches!(error, ClientError::Io { .. }), "{error}");
    assert!(
        error.to_string().contains("accepts no connections"),
        "{error}"
    );
    // It is not taken for a stale one, and does count as a daemon.
    assert!(matches!(serve(&path, few()), Err(ControlError::InUse(_))));
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let found = place::live_sockets(&[dir.path().to_path_buf()]);
    assert_eq!(found, [path]);
}
