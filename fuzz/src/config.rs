//! What people write: the configuration file, addresses and URIs, sizes, rates and durations.
//!
//! The first byte says as what the rest, a text, is read. What must hold: nothing panics; an
//! address that was understood and is written out again means the same; no number comes out of a
//! text that is larger than it says.

use hikkoshi_daemon::config::Listen;
use hikkoshi_engine::geometry::{MAX_BLOCK_BYTES, MIN_BLOCK_BYTES};
use hikkoshi_nbd::uri::{Address, NbdUri};
use hikkoshi_nbd::wire::MAX_STRING_BYTES;

use crate::input::Input;
use crate::{address, cli, config_file, memory, quantity};

/// A text of some KiB is read into structures of a few times its size; the TOML parser keeps every
/// token, and its errors quote the text.
const MEMORY_BOUND: usize = 8 << 20;

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.byte();
    let Ok(text) = std::str::from_utf8(input.rest()) else {
        return;
    };
    memory::within(MEMORY_BOUND + 64 * text.len(), "a text", || match how % 4 {
        0 => file(text),
        1 => uri(text),
        2 => addresses(text),
        _ => quantities(text),
    });
}

fn file(text: &str) {
    let Ok(plan) = config_file::parse(text) else {
        return;
    };
    assert!(!plan.exports.is_empty());
    for export in &plan.exports {
        assert!(export.block_bytes.is_power_of_two());
        assert!((MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&export.block_bytes));
        if let Some(source) = &export.source {
            assert!(source.connections > 0, "no connections to the source");
            assert!(source.max_rate != Some(0), "a rate of nothing");
        }
    }
}

fn uri(text: &str) {
    if let Ok(parsed) = text.parse::<NbdUri>() {
        assert!(parsed.export.len() <= MAX_STRING_BYTES);
        let written = parsed.to_string();
        let again = written.parse::<NbdUri>();
        assert_eq!(again.as_ref(), Ok(&parsed), "written as {written}");
    }
    if let Ok(parsed) = text.parse::<Address>() {
        let written = parsed.to_string();
        let again = written.parse::<Address>();
        assert_eq!(again.as_ref(), Ok(&parsed), "written as {written}");
    }
}

fn addresses(text: &str) {
    if let Ok(listen) = address::parse_listen(text) {
        let written = listen.to_string();
        if let Listen::Tcp(host, _) = &listen {
            assert!(!host.is_empty());
        }
        assert_eq!(
            address::parse_listen(&written),
            Ok(listen),
            "written as {written}"
        );
    }
    // Looks into the file system where the text is a path, and changes nothing there.
    if let Ok(from) = address::parse_from(text) {
        assert!(!from.is_empty());
    }
    let _ = cli::ControlPlace::parse(text);
}

fn quantities(text: &str) {
    if let Ok(size) = quantity::parse_size(text) {
        let leading: String = text
            .trim()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        let least = leading.parse::<u64>().unwrap();
        assert!(size >= least, "{text} is {size}");
        let _ = quantity::show_size(size);
    }
    if let Ok(Some(rate)) = quantity::parse_rate(text) {
        assert!(rate > 0, "a rate of nothing");
        let _ = quantity::show_rate(rate);
    }
    if let Ok(duration) = quantity::parse_duration(text) {
        let _ = quantity::show_seconds(duration.as_secs());
    }
    if let Ok(block) = cli::parse_block_size(text) {
        assert!(block.is_power_of_two());
        assert!((MIN_BLOCK_BYTES..=MAX_BLOCK_BYTES).contains(&block));
    }
    if let Ok(connections) = cli::parse_connections(text) {
        assert!(connections > 0);
    }
    let _ = cli::parse_source_loss(text);
}
