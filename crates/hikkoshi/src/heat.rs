//! `hikkoshi heat`: how much an export is read and written where, for `serve --heat` or for people.

use std::io::{IsTerminal as _, Write as _};

use hikkoshi_engine::heat::{ACCESS, HeatMap};
use serde_json::json;

use crate::choose;
use crate::cli::Heat;
use crate::failure::Failure;

/// Writes the heat map of an export to standard output.
///
/// # Errors
/// It is not clear which export, the daemon does not answer, or standard output is a terminal.
pub fn run(args: &Heat) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if !args.json && out.is_terminal() {
        return Err(Failure::Usage(
            "a heat map is a binary file: send it to one (hikkoshi heat > FILE), or say --json"
                .into(),
        ));
    }
    let found = choose::all(args.control.control.as_deref())?;
    let found = choose::pick(found, args.export.as_deref())?;
    let map = found.daemon.heat(&found.status.export)?;
    let bytes = if args.json {
        json_lines(&map)
    } else {
        map.encode()
    };
    out.write_all(&bytes).and_then(|()| out.flush())?;
    Ok(())
}

/// Counts as accesses, of which age leaves fractions.
fn json_lines(map: &HeatMap) -> Vec<u8> {
    let mut lines = Vec::new();
    for region in &map.regions {
        let bytes = map.bytes_of(region.region);
        let line = json!({
            "offset": bytes.start,
            "length": bytes.len(),
            "reads": f64::from(region.reads) / f64::from(ACCESS),
            "writes": f64::from(region.writes) / f64::from(ACCESS),
        });
        lines.extend_from_slice(line.to_string().as_bytes());
        lines.push(b'\n');
    }
    lines
}
