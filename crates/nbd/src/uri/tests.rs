//! Addresses that are right, and what is said of those that are not.

use proptest::prelude::*;

use super::*;

fn tcp(host: &str, port: u16) -> Address {
    Address::Tcp {
        host: host.to_owned(),
        port,
    }
}

fn parsed(text: &str) -> (Address, bool, String) {
    let uri: NbdUri = text.parse().unwrap_or_else(|e| panic!("{e}"));
    (uri.address, uri.tls, uri.export)
}

fn problem(text: &str) -> Problem {
    text.parse::<NbdUri>().expect_err(text).problem
}

fn listen_problem(text: &str) -> Problem {
    text.parse::<Address>().expect_err(text).problem
}

/// The table of the URI document, section "NBD URI export name", and its neighbours.
#[test]
fn exports_over_tcp() {
    for (text, host, port, export) in [
        ("nbd://example.com/disk", "example.com", 10809, "disk"),
        ("nbd://example.com/", "example.com", 10809, ""),
        ("nbd://example.com", "example.com", 10809, ""),
        ("nbd://example.com//disk", "example.com", 10809, "/disk"),
        (
            "nbd://example.com/hello%20world",
            "example.com",
            10809,
            "hello world",
        ),
        ("NBD://127.0.0.1:1/a/b", "127.0.0.1", 1, "a/b"),
        ("nbd://[::1]:10810/x", "::1", 10810, "x"),
        ("nbd://[fe80::1%25eth0]", "fe80::1%eth0", 10809, ""),
        ("nbd:///disk", "localhost", 10809, "disk"),
        ("nbd://user@h:65535/%C3%A9%3F", "h", 65535, "é?"),
    ] {
        let expected = (tcp(host, port), false, export.to_owned());
        assert_eq!(parsed(text), expected, "{text}");
    }
}

#[test]
fn exports_over_unix_sockets() {
    for (text, socket, export) in [
        ("nbd+unix:///disk?socket=sock", "sock", "disk"),
        ("nbd+unix://?socket=/run/a%20b", "/run/a b", ""),
        ("nbd+unix:///?socket=/run/a", "/run/a", ""),
        (
            "nbd+unix:////disk?tls-type=psk&socket=/x?y",
            "/x?y",
            "/disk",
        ),
    ] {
        let expected = (
            Address::Unix(PathBuf::from(socket)),
            false,
            export.to_owned(),
        );
        assert_eq!(parsed(text), expected, "{text}");
    }
}

#[test]
fn tls_is_recognised_not_lost() {
    assert_eq!(
        parsed("nbds://h/e?tls-hostname=x"),
        (tcp("h", 10809), true, "e".into())
    );
    let (address, tls, _) = parsed("nbds+unix:///e?socket=/s");
    assert_eq!((address, tls), (Address::Unix("/s".into()), true));
}

#[test]
fn a_socket_path_need_not_be_text() {
    let (address, ..) = parsed("nbd+unix:///?socket=/run/%ff");
    let path = PathBuf::from(OsString::from_vec(b"/run/\xff".to_vec()));
    assert_eq!(address, Address::Unix(path));
}

#[test]
fn what_is_wrong_is_said() {
    let long = "x".repeat(5000);
    for (text, expected) in [
        ("", Problem::NotNbd),
        ("/dev/sda", Problem::NotNbd),
        ("http://h/", Problem::NotNbd),
        ("nbd:h:10809", Problem::NotNbd),
        ("nbd://h:0/", Problem::BadPort("0".into(), 1)),
        ("nbd://h:65536/", Problem::BadPort("65536".into(), 1)),
        ("nbd://h:+5/", Problem::BadPort("+5".into(), 1)),
        ("nbd://h:/", Problem::BadPort(String::new(), 1)),
        ("nbd://::1/", Problem::NeedsBrackets),
        ("nbd://[::1/", Problem::BadHost("[::1".into())),
        ("nbd://[::1]x/", Problem::BadHost("[::1]x".into())),
        ("nbd://[nine]/", Problem::BadHost("[nine]".into())),
        ("nbd://a b/", Problem::BadHost("a b".into())),
        ("nbd://h/?socket=/x", Problem::StraySocket),
        ("nbd+unix:///e", Problem::NoSocket),
        ("nbd+unix:///e?socket=", Problem::NoSocket),
        (
            "nbd+unix:///e?sokcet=/x",
            Problem::UnknownParameter("sokcet=/x".into()),
        ),
        ("nbd+unix:///e?socket=%00x", Problem::ZeroInSocket),
        ("nbd+unix://h/e?socket=/x", Problem::StrayHost),
        ("nbd://h/%", Problem::BadPercent),
        ("nbd://h/%4", Problem::BadPercent),
        ("nbd://h/%4g", Problem::BadPercent),
        ("nbd://h/%+4", Problem::BadPercent),
        ("nbd://h/%ff", Problem::BadExport),
        ("nbd://h/%00", Problem::BadExport),
        ("nbd://h/a#b", Problem::Fragment),
        (&format!("nbd://h/{long}"), Problem::LongExport(5000)),
        (
            &format!("nbd+unix:///?socket=/{long}"),
            Problem::LongSocket(5001),
        ),
    ] {
        assert_eq!(problem(text), expected, "{text}");
    }
}

#[test]
fn the_message_tells_what_was_given_and_what_to_do() {
    let error = "nbd+unix:///e".parse::<NbdUri>().expect_err("no socket");
    assert_eq!(
        error.to_string(),
        "`nbd+unix:///e`: the path of the socket is missing; add ?socket=PATH"
    );
    let error = "tcp://h:x".parse::<Address>().expect_err("no port");
    assert_eq!(
        error.to_string(),
        "`tcp://h:x`: `x` is not a port number from 0 to 65535"
    );
}

#[test]
fn addresses_to_listen_on() {
    for (text, expected, shown) in [
        (
            "tcp://127.0.0.1:0",
            tcp("127.0.0.1", 0),
            "tcp://127.0.0.1:0",
        ),
        ("tcp://h", tcp("h", 10809), "tcp://h:10809"),
        ("tcp://h:1/", tcp("h", 1), "tcp://h:1"),
        ("tcp://[::]:7", tcp("::", 7), "tcp://[::]:7"),
        ("unix:a%20b", Address::Unix("a%20b".into()), "unix:a%20b"),
        ("unix:/run/s", Address::Unix("/run/s".into()), "unix:/run/s"),
        (
            "unix:///run/s",
            Address::Unix("/run/s".into()),
            "unix:/run/s",
        ),
    ] {
        let address: Address = text.parse().unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(address, expected);
        assert_eq!(address.to_string(), shown);
    }
    assert_eq!(listen_problem("tcp://"), Problem::NoHost);
    assert_eq!(listen_problem("tcp://:10809"), Problem::NoHost);
    assert_eq!(listen_problem("tcp://::1:5"), Problem::NeedsBrackets);
    assert_eq!(listen_problem("127.0.0.1:5"), Problem::NotListen);
    assert_eq!(listen_problem("unix:"), Problem::NoSocket);
    let long = format!("unix:{}", "x".repeat(SOCKET_PATH_BYTES + 1));
    assert_eq!(listen_problem(&long), Problem::LongSocket(108));
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused(text in any::<String>()) {
        let _ = text.parse::<Address>();
        for scheme in ["nbd://", "nbd+unix:///", "nbd+unix:///?socket=", "nbd://["] {
            let _ = format!("{scheme}{text}").parse::<NbdUri>();
        }
    }

    #[test]
    fn a_uri_shown_is_the_uri_parsed(
        host in "[a-z0-9.-]{1,20}|fe80::[1-9]%eth[0-9]|::1",
        port in 1_u16..,
        tls in any::<bool>(),
        export in "[^\\x00]{0,40}",
        socket in proptest::option::of(prop::collection::vec(1_u8.., 1..100)),
    ) {
        let address = match socket {
            Some(path) => Address::Unix(PathBuf::from(OsString::from_vec(path))),
            None => Address::Tcp { host, port },
        };
        let uri = NbdUri { address, tls, export };
        prop_assert_eq!(uri.to_string().parse(), Ok(uri));
    }
}

/// Fuzzing of `config`: the zone of an IPv6 address could hold anything, control characters too, and
/// an address written out again was another one.
#[test]
fn a_zone_is_the_name_of_an_interface() {
    for good in ["nbd://[fe80::1%25eth0.7]/", "nbd://[fe80::1%eth0]:1/"] {
        let parsed: NbdUri = good.parse().unwrap();
        assert_eq!(parsed.to_string().parse(), Ok(parsed));
    }
    for bad in [
        "nbd://[::1%]/",
        "nbd://[::1%25\u{7f}]/",
        "nbd://[::1%25a%25b]/",
        "nbd://[::1%a/b]/",
    ] {
        assert!(bad.parse::<NbdUri>().is_err(), "{bad:?}");
    }
}
