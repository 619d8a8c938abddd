//! Every `Source` against the same suite: in memory, and over NBD from other people's servers.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::mpsc::TryRecvError;

use hikkoshi_wan::{Lane, MemorySource, NbdSource, NbdSourceConfig, Source, SourceErrorKind};
use support::servers::{On, Server, nbd_server, nbdkit, qemu_nbd};
use support::{Recorder, conforms, outcome, pattern, submit_extents, submit_read, wait_until};

/// Not a multiple of anything large; 3 MiB and a sector.
const SIZE: usize = (3 << 20) + 512;

fn config(server: &Server, export: &str) -> NbdSourceConfig {
    NbdSourceConfig::new(server.address.clone(), export)
}

fn conforms_over_nbd(server: &Server, export: &str, data: &[u8], connections: usize) {
    let source = NbdSource::connect(config(server, export)).unwrap();
    wait_until("all connections stand", || {
        source.connections() == connections
    });
    conforms(&*source, data, &|| {});
}

#[test]
fn memory_conforms() {
    let data = pattern(SIZE);
    for granularity in [None, Some(512), Some(65536)] {
        let source = MemorySource::new(data.clone(), granularity);
        conforms(&*source, &data, &|| source.complete_all());
    }
}

#[test]
fn memory_answers_as_told() {
    let source = MemorySource::new(pattern(SIZE), None);
    let told = Recorder::watch(&*source);
    let answers: Vec<_> = (0..3)
        .map(|i| submit_read(&*source, Lane::Bulk, i * 512, 512))
        .collect();
    assert_eq!(source.pending(), 3);
    source.fail(1, SourceErrorKind::Refused);
    source.complete(1);
    assert_eq!(
        outcome(&answers[1]).unwrap_err().kind,
        SourceErrorKind::Refused
    );
    assert_eq!(outcome(&answers[2]).unwrap().offset, 1024);
    assert_eq!(answers[0].try_recv().unwrap_err(), TryRecvError::Empty);
    source.set_connected(false);
    assert_eq!(
        outcome(&answers[0]).unwrap_err().kind,
        SourceErrorKind::Disconnected
    );
    source.set_connected(true);
    let told: Vec<_> = told.try_iter().collect();
    assert_eq!(told, [Some(SourceErrorKind::Disconnected), None]);
}

#[test]
fn qemu_nbd_conforms() {
    let data = pattern(SIZE);
    for on in [On::Unix, On::Tcp] {
        conforms_over_nbd(&qemu_nbd(&data, on, "8", &["-r"]), "", &data, 4);
    }
}

#[test]
fn nbdkit_conforms() {
    let data = pattern(SIZE);
    for on in [On::Unix, On::Tcp] {
        conforms_over_nbd(&nbdkit(&data, on, "file", &[]), "", &data, 4);
    }
    for allocator in ["sparse", "malloc"] {
        conforms_over_nbd(&nbdkit(&data, On::Unix, allocator, &[]), "", &data, 4);
    }
}

#[test]
fn nbdkit_without_structured_replies_conforms() {
    let data = pattern(SIZE);
    let server = nbdkit(&data, On::Unix, "file", &["--no-sr"]);
    let source = NbdSource::connect(config(&server, "")).unwrap();
    assert!(!source.info().has_extents);
    let answer = outcome(&submit_extents(&*source, 5, 1000)).unwrap();
    assert_eq!(
        (
            answer.extents[0].len,
            answer.extents[0].zero,
            answer.wire_bytes
        ),
        (1000, false, 0)
    );
    conforms(&*source, &data, &|| {});
}

#[test]
fn servers_with_narrow_block_sizes_conform() {
    let data = pattern(3 << 20);
    let more = [
        "--filter=blocksize-policy",
        "blocksize-minimum=4096",
        "blocksize-preferred=65536",
        "blocksize-maximum=131072",
        "blocksize-error-policy=error",
    ];
    // The filter's parameters follow the plugin on nbdkit's command line.
    let server = Server::start(
        ("nbdkit", "nbdkit"),
        &data,
        On::Unix,
        |image, address, _| {
            let hikkoshi_wan::Address::Unix(socket) = address else {
                unreachable!("asked for")
            };
            let mut arguments = vec!["-f".to_owned(), "-r".to_owned(), "-U".to_owned()];
            arguments.push(socket.display().to_string());
            arguments.push(more[0].to_owned());
            arguments.push("file".to_owned());
            arguments.push(image.display().to_string());
            arguments.extend(more[1..].iter().map(|&a| a.to_owned()));
            arguments
        },
    );
    let source = NbdSource::connect(config(&server, "")).unwrap();
    assert_eq!(
        (source.info().min_block_bytes, source.info().max_read_bytes),
        (4096, 131_072)
    );
    conforms(&*source, &data, &|| {});
}

#[test]
fn nbd_server_conforms() {
    let data = pattern(SIZE);
    for on in [On::Unix, On::Tcp] {
        let server = nbd_server(&data, on);
        let source = NbdSource::connect(config(&server, "disk")).unwrap();
        conforms(&*source, &data, &|| {});
    }
}

#[test]
fn holes_are_found_in_real_answers() {
    let data = pattern(SIZE);
    let server = nbdkit(&data, On::Unix, "sparse", &[]);
    let source = NbdSource::connect(config(&server, "")).unwrap();
    let extents = outcome(&submit_extents(&*source, 0, 3 << 20))
        .unwrap()
        .extents;
    assert!(extents.iter().any(|extent| extent.zero), "{extents:?}");
    assert!(extents.iter().any(|extent| !extent.zero), "{extents:?}");
}

/// qemu-nbd admits one client unless told otherwise: the second waits for a greeting for ever.
#[test]
fn a_server_for_one_client_is_enough() {
    let data = pattern(SIZE);
    let server = qemu_nbd(&data, On::Unix, "1", &["-r"]);
    let source = NbdSource::connect(config(&server, "")).unwrap();
    for _ in 0..50 {
        outcome(&submit_read(&*source, Lane::Bulk, 0, 1 << 20)).unwrap();
    }
    assert_eq!(source.connections(), 1);
    conforms(&*source, &data, &|| {});
}

/// The same where all connections are dialled at once: it admits any of them.
#[test]
fn a_server_for_one_client_admits_any_connection() {
    let data = pattern(SIZE);
    let server = qemu_nbd(&data, On::Unix, "1", &["-r"]);
    let mut config = config(&server, "");
    config.several_without_promise = true;
    let source = NbdSource::connect(config).unwrap();
    assert_eq!(source.connections(), 1);
    conforms(&*source, &data, &|| {});
}

#[test]
fn a_wrong_export_is_refused_by_name() {
    let server = qemu_nbd(&pattern(SIZE), On::Unix, "1", &["-x", "right"]);
    let error = NbdSource::connect(config(&server, "wrong")).err().unwrap();
    assert_eq!(error.kind, SourceErrorKind::Refused);
    assert!(
        error.to_string().contains("no export named \"wrong\""),
        "{error}"
    );
}
