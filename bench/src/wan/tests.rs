//! The bench itself works: everything runs on a tiny disk, and what it prints has been measured.
//! What the figures are says nothing here.

use clap::Parser;
use serde_json::Value;

use super::*;
use crate::client::Endpoint;
use crate::trace::{Kind, Request, Thinking, Trace, replay};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: Options,
}

fn options(line: &str) -> Options {
    Line::try_parse_from(format!("bench {line}").split_whitespace())
        .unwrap()
        .options
}

/// Runs the bench; its tables by section.
fn tables(line: &str) -> BTreeMap<String, Value> {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("all.json");
    let mut options = options(line);
    options.hikkoshi = Some(cache::hikkoshi().unwrap());
    options.report = Some(dir.path().join("report"));
    options.json = Some(json.clone());
    options.dir = dir.path().to_path_buf();
    options.disk = Some(dir.path().to_path_buf());
    run(&options).unwrap();
    let page = fs::read_to_string(dir.path().join("report/index.html")).unwrap();
    assert!(page.contains("<table>") && page.trim_end().ends_with("</html>"));
    if line.contains("copy") {
        assert_eq!(page.matches("<svg").count(), 3);
        let files = fs::read_dir(dir.path().join("report")).unwrap();
        assert_eq!(files.count(), 4, "the page and its charts");
    }
    let all: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let tables = all["tables"].as_array().unwrap().iter();
    tables
        .map(|table| (table["section"].as_str().unwrap().to_owned(), table.clone()))
        .collect()
}

/// The value of a figure in a column; `None` if it was not measured.
fn value(table: &Value, figure: &str, column: &str) -> Option<f64> {
    let columns = table["columns"].as_array()?;
    let index = columns.iter().position(|name| name[0] == column)?;
    let rows = table["rows"].as_array()?;
    let row = rows.iter().find(|row| {
        row["figure"]
            .as_str()
            .is_some_and(|name| name.contains(figure))
    })?;
    row["cells"][index]["values"][0].as_f64()
}

#[test]
#[ignore = "makes network namespaces: needs root"]
fn every_way_of_moving_is_measured() {
    let line = "--quick --size 16 --rtt 4 --rate 200 --full \
                --only link,incompressible,copy,cold,writes";
    let found = tables(line);
    let copy = &found["copy"];
    for column in [
        "hikkoshi",
        "hikkoshi, nbdkit source",
        "nbdcopy",
        "qemu-img convert",
        "qemu stream",
        "nbdkit scan",
    ] {
        assert!(
            value(copy, "until resident", column).unwrap() > 0.0,
            "{column}: {copy:#}"
        );
    }
    // Two megabytes of noise lie on the disk, and cross the link whoever copies.
    let wire = value(copy, "on the wire", "nbdcopy").unwrap();
    assert!((2.0..20.0).contains(&wire), "{wire} MB on the wire");
    for (section, figure) in [("cold", "median"), ("writes", "512 B and flush")] {
        for column in ["hikkoshi", "qemu stream", "nbdkit scan"] {
            let measured = value(&found[section], figure, column);
            assert!(measured.unwrap() > 0.0, "{section}, {column}");
        }
    }
    for column in ["plain volume", "plain volume, beside the same load"] {
        let measured = value(&found["writes"], "every 50 ms", column);
        assert!(measured.unwrap() > 0.0, "{column}");
    }
    let link = &found["link"];
    assert!(value(link, "idle, median", "link").unwrap() >= 4.0);
    let share = value(link, "iperf3", "link").unwrap();
    assert!((0.0001..1.01).contains(&share), "{share} of the link");
    // No answer comes back before a round trip has passed.
    assert!(value(&found["cold"], "median", "hikkoshi").unwrap() >= 3.6);
    // The line carries 25 MB of packets a second, so no more of anything.
    for column in ["iperf3", "nbdcopy", "hikkoshi"] {
        let rate = value(&found["incompressible"], "disk bytes", column).unwrap();
        assert!((0.01..25.0).contains(&rate), "{column}: {rate} MB/s");
    }
}

/// Slow enough that a small disk lasts.
#[test]
#[ignore = "makes network namespaces: needs root"]
fn what_a_move_gets_beside_others_is_measured() {
    let found = tables("--size 64 --rtt 4 --rate 20 --only company");
    for figure in ["beside", "that stream got", "after", "half as long again"] {
        for column in [
            "hikkoshi",
            "hikkoshi, nbdkit source",
            "nbdcopy, 4 connections",
        ] {
            let rate = value(&found["company"], figure, column).unwrap();
            // The line carries 2.5 MB a second, and what waited before that may come in the same one.
            assert!((0.0..10.0).contains(&rate), "{figure}, {column}: {rate}");
        }
    }
}

#[test]
fn the_default_is_three_round_trips_and_the_matrix_is_all() {
    let cases = |line: &str| {
        let options = options(line);
        cases_of(&options)
    };
    let usual = cases("");
    let names: Vec<String> = usual.iter().map(|(case, _)| case.name()).collect();
    assert_eq!(
        names,
        [
            "400 Mbit/s, 10 ms",
            "400 Mbit/s, 50 ms",
            "400 Mbit/s, 200 ms",
            "400 Mbit/s, 50 ms, 0.1 % loss"
        ]
    );
    let traced = usual
        .iter()
        .filter(|(_, sections)| sections.contains(&Section::Trace));
    assert_eq!(
        traced.map(|(case, _)| case.rtt_ms).collect::<Vec<_>>(),
        [50]
    );
    let all = cases("--matrix");
    let whole = all.iter().filter(|(_, sections)| sections.len() == 8);
    assert_eq!(whole.count(), 16);
    let one = cases("--quick --only trace --rtt 20");
    assert_eq!(one.len(), 1);
    assert_eq!(one[0].1, [Section::Trace]);
}

#[test]
fn a_queue_is_a_bandwidth_delay_product_but_not_tiny() {
    let case = |mbit, rtt_ms, queue_bdp| LinkCase {
        mbit,
        rtt_ms,
        loss_percent: 0.0,
        queue_bdp,
    };
    assert_eq!(case(400, 200, 1.0).queue_bytes(), 10_000_000);
    assert_eq!(case(400, 50, 0.5).queue_bytes(), 1_250_000);
    assert_eq!(case(10, 10, 1.0).queue_bytes(), 256 << 10);
}

#[test]
fn a_mover_with_an_unknown_option_is_left_out() {
    let help =
        "  --max-rate <RATE>\n      --no-background  nothing\n  --order <ORDER> [default: heat]";
    let able = |text: &str| Mover::parse_variant(text).unwrap().available(help);
    assert!(able("x=--max-rate 4MB/s").is_ok());
    assert!(able("x=--order=linear --no-background").is_ok());
    let error = able("x=--max --no-background").unwrap_err().to_string();
    assert!(error.contains("no --max"), "{error}");
    assert!(Mover::parse_variant("without options").is_err());
}

/// A trace is replayed in its order: what follows an answer is asked after it, after thinking.
#[test]
fn a_replay_waits_for_what_it_follows() {
    let request = |kind, offset, length, after, think_us| Request {
        kind,
        offset,
        length,
        after,
        think_us,
    };
    let trace = Trace {
        disk_bytes: 1 << 20,
        requests: vec![
            request(Kind::Read, 0, 4096, None, 0),
            request(Kind::Read, 8192, 131_072, None, 0),
            request(Kind::Write, 4096, 512, Some(0), 40_000),
            request(Kind::Flush, 0, 0, Some(2), 0),
            request(Kind::Zero, 65_536, 4096, Some(2), 0),
            request(Kind::Trim, 4096, 4096, Some(4), 0),
            request(Kind::Read, 4096, 4096, Some(5), 40_000),
        ],
    };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let arguments = [
        "--foreground",
        "-U",
        &socket.display().to_string(),
        "memory",
        "1M",
    ];
    let arguments = arguments.map(str::to_owned);
    let endpoint = Endpoint::Unix(socket);
    let log = dir.path().join("log");
    let server = site::start_server(None, "nbdkit", &arguments, &endpoint, &log);
    let _server = server.unwrap();
    let thinking = |scale| Thinking {
        scale,
        cap: Duration::from_secs(1),
    };
    let minute = Duration::from_secs(60);
    let slow = replay(&trace, &endpoint, thinking(1.0), minute).unwrap();
    assert!(slow.complete && slow.answered == 7 && slow.reads.len() == 3);
    assert!(
        slow.seconds >= 0.08,
        "the guest thinks for 80 ms, and took {slow:?}"
    );
    assert!(slow.reads[2].0 >= 0.08 && slow.reads[0].0 < slow.reads[2].0);
    let hurried = replay(&trace, &endpoint, thinking(0.0), minute).unwrap();
    assert!(hurried.complete && hurried.answered == 7);
    let cut = replay(&trace, &endpoint, thinking(20.0), Duration::from_millis(50)).unwrap();
    assert!(
        !cut.complete && cut.answered < 7 && cut.seconds <= 0.06,
        "{cut:?}"
    );
}
