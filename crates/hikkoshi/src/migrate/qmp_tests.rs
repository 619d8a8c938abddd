//! The QMP client, and the world behind it, against a peer that is a script on a Unix socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::qmp::{Place, Qmp, QmpError};
use super::report::Report;
use super::sites::{Phase, Site, Sites, Trouble};
use super::world::{Transfer, World};

/// What the peer does with a command.
enum Reply {
    /// Sends these lines.
    Lines(Vec<Value>),
    /// Sends this as it is.
    Raw(&'static str),
    /// Hangs up.
    HangUp,
}

fn returns(value: Value) -> Reply {
    Reply::Lines(vec![json!({ "return": value })])
}

/// Greets and answers until the script hangs up; serves one connection after the other.
fn peer(
    dir: &tempfile::TempDir,
    mut script: impl FnMut(&str, &Value) -> Reply + Send + 'static,
) -> Place {
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that has gone is nothing to a peer.
            let _ = serve(stream.unwrap(), &mut script);
        }
    });
    Place::Unix(path)
}

fn serve(
    mut stream: UnixStream,
    script: &mut impl FnMut(&str, &Value) -> Reply,
) -> std::io::Result<()> {
    writeln!(
        stream,
        "{}",
        json!({"QMP": {"version": {}, "capabilities": []}})
    )?;
    for line in BufReader::new(stream.try_clone()?).lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let command = request["execute"].as_str().unwrap_or_default().to_owned();
        let reply = match command.as_str() {
            "qmp_capabilities" => returns(json!({})),
            command => script(command, &request["arguments"]),
        };
        match reply {
            Reply::Lines(lines) => {
                for line in lines {
                    // As QEMU ends its lines.
                    write!(stream, "{line}\r\n")?;
                }
            }
            Reply::Raw(text) => stream.write_all(text.as_bytes())?,
            Reply::HangUp => return Ok(()),
        }
    }
    Ok(())
}

#[test]
fn events_are_passed_over_and_errors_told() {
    let dir = tempfile::tempdir().unwrap();
    let event = json!({"event": "STOP", "timestamp": {}});
    let place = peer(&dir, move |command, _| match command {
        "query-status" => Reply::Lines(vec![event.clone(), json!({"return": {"running": true}})]),
        _ => Reply::Lines(vec![
            json!({"error": {"class": "GenericError", "desc": "not now"}}),
        ]),
    });
    let mut qmp = Qmp::new(place);
    assert_eq!(
        qmp.execute("query-status", json!({})).unwrap(),
        json!({"running": true})
    );
    let error = qmp.execute("cont", json!({})).unwrap_err();
    assert!(error.is_refusal());
    assert_eq!(error.to_string(), "QEMU refuses cont: not now");
    // The event that was passed over cuts the next pause short, once.
    let start = Instant::now();
    qmp.nap(Duration::from_secs(60));
    assert!(start.elapsed() < Duration::from_secs(30));
    let start = Instant::now();
    qmp.nap(Duration::from_millis(50));
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert!(qmp.execute("query-status", json!({})).is_ok());
}

#[test]
fn a_lost_answer_is_no_refusal_and_the_next_command_connects_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut times = 0;
    let place = peer(&dir, move |_, _| {
        times += 1;
        match times {
            1 => Reply::HangUp,
            2 => Reply::Raw("{\"ret\n"),
            3 => Reply::Raw("garbage\r\n"),
            _ => returns(json!(times)),
        }
    });
    let mut qmp = Qmp::new(place);
    for _ in 0..3 {
        let error = qmp.execute("cont", json!({})).unwrap_err();
        assert!(matches!(error, QmpError::Lost { .. }), "{error}");
    }
    assert_eq!(qmp.execute("cont", json!({})).unwrap(), json!(4));
}

#[test]
fn nobody_there_and_somebody_else_there_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let mut qmp = Qmp::new(Place::Unix(dir.path().join("none")));
    let error = qmp.execute("cont", json!({})).unwrap_err();
    assert!(
        error.to_string().contains("no QEMU answers at unix:/"),
        "{error}"
    );
    let path = dir.path().join("other");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // It may have gone already.
            let _ = writeln!(stream.unwrap(), "{}", json!({"hello": "you"}));
        }
    });
    let mut qmp = Qmp::new(Place::Unix(path));
    let error = qmp.execute("cont", json!({})).unwrap_err().to_string();
    assert!(error.contains("one client at a time"), "{error}");
}

#[test]
fn places_are_written_as_for_qemu() {
    assert_eq!(Place::parse("unix:/a"), Ok(Place::Unix("/a".into())));
    assert_eq!(
        Place::parse("unix:/a,server=on,wait=off"),
        Ok(Place::Unix("/a".into()))
    );
    for text in ["tcp:h:1", "tcp://h:1"] {
        assert_eq!(Place::parse(text), Ok(Place::Tcp("h:1".into())));
    }
    for bad in ["", "unix:", "/a", "tcp:h", "tcp::1", "tcp:h:x"] {
        assert!(Place::parse(bad).is_err(), "{bad}");
    }
}

/// What the world makes of QEMU's answers: the words of 7.2 and later.
#[test]
fn the_world_speaks_to_each_qemu_and_understands_it() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (sender, asked) = std::sync::mpsc::channel();
    let places = ["old", "new"].map(|name| {
        let (dir, sender) = (&dirs[usize::from(name == "new")], sender.clone());
        peer(dir, move |command, arguments| {
            sender
                .send(format!("{name} {command} {arguments}"))
                .unwrap();
            match (name, command) {
                ("old", "query-migrate") => returns(json!({
                    "status": "failed", "error-desc": "channel error",
                    "ram": {"transferred": 5, "remaining": 7},
                })),
                ("new", "query-migrate") => returns(json!({})),
                (_, "query-status") => returns(json!({"status": "inmigrate", "running": false})),
                ("old", "migrate") => {
                    Reply::Lines(vec![json!({"error": {"class": "x", "desc": "blocked"}})])
                }
                _ => returns(json!({})),
            }
        })
    });
    let transfer = Transfer {
        uri: "tcp:b:1".into(),
        incoming_uri: "tcp:0:1".into(),
        bandwidth: Some(100),
        downtime: Some(Duration::from_millis(500)),
    };
    let mut world = World::new(places.map(Qmp::new), vec![], transfer, Report::new(true));
    let migration = world.migration(Site::Old).unwrap();
    assert_eq!(migration.phase, Phase::Failed);
    assert_eq!((migration.sent_bytes, migration.left_bytes), (5, 7));
    assert_eq!(migration.error.as_deref(), Some("channel error"));
    assert_eq!(world.migration(Site::New).unwrap().phase, Phase::None);
    assert_eq!(world.vm(Site::New).unwrap().status, "inmigrate");
    world.hold().unwrap();
    world.tune().unwrap();
    world.listen().unwrap();
    let refused = Trouble::Refused("QEMU refuses migrate: blocked".into());
    assert_eq!(world.send(), Err(refused));
    world.cancel().unwrap();
    world.go_on(Site::New).unwrap();
    let asked: Vec<String> = asked.try_iter().skip(3).collect();
    let caps =
        r#"migrate-set-capabilities {"capabilities":[{"capability":"events","state":true}]}"#;
    assert_eq!(
        asked,
        [
            "new stop {}",
            &format!("old {caps}"),
            &format!("new {caps}"),
            r#"old migrate-set-parameters {"downtime-limit":500,"max-bandwidth":100}"#,
            "new query-migrate {}",
            r#"new migrate-incoming {"uri":"tcp:0:1"}"#,
            r#"old migrate {"uri":"tcp:b:1"}"#,
            "old migrate_cancel {}",
            "new cont {}",
        ]
    );
}
