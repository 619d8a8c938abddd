//! The configuration file of `hikkoshi serve --config`: many exports from one daemon.
//!
//! The keys are the options of `serve` without their dashes, and values are written the same way;
//! `docs/config.md` describes them. An unknown key is an error, so that a misspelt one is noticed.

use std::path::{Path, PathBuf};

use clap::ValueEnum as _;
use hikkoshi_daemon::config::{
    DEFAULT_CONNECTIONS, DEFAULT_MAX_CLIENTS, ExportConfig, Listen, SourceConfig, SourceLoss,
};
use hikkoshi_engine::geometry::DEFAULT_BLOCK_BYTES;
use serde::Deserialize;

use crate::cli::{self, ControlPlace, EngineName, Handoff, PrepareName, TransportName};
use crate::plan::{NewImage, Plan};
use crate::{address, quantity};

/// Bytes a configuration file may have.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Exports a configuration file may have.
const MAX_EXPORTS: usize = 4096;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    listen: Vec<String>,
    control: Option<String>,
    metrics: Option<String>,
    max_clients: Option<usize>,
    max_rate_all: Option<String>,
    congestion: Option<String>,
    #[serde(rename = "export")]
    exports: Vec<Export>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Export {
    #[serde(default)]
    name: String,
    image: PathBuf,
    state: Option<PathBuf>,
    block_size: Option<String>,
    size: Option<String>,
    #[serde(default)]
    read_only: bool,
    engine: Option<String>,
    transport: Option<String>,
    compress: Option<String>,
    from: Option<String>,
    handoff: Option<String>,
    background: Option<bool>,
    max_rate: Option<String>,
    connections: Option<usize>,
    on_source_loss: Option<String>,
    overwrite: Option<bool>,
    source_moved: Option<bool>,
    heat: Option<PathBuf>,
    verify: Option<bool>,
    prepare: Option<String>,
    seed_images: Option<Vec<PathBuf>>,
    seed_always: Option<bool>,
    way_back: Option<bool>,
    #[serde(rename = "return")]
    comes_back: Option<bool>,
}

/// Reads a configuration file.
///
/// # Errors
/// It cannot be read, is no TOML, or says something that makes no sense; the text names the key.
pub fn read(path: &Path) -> Result<Plan, String> {
    let in_file = |what: String| format!("configuration file {}: {what}", path.display());
    let length = std::fs::metadata(path)
        .map_err(|error| in_file(error.to_string()))?
        .len();
    if length > MAX_FILE_BYTES {
        return Err(in_file(format!(
            "{length} bytes are too many (at most {MAX_FILE_BYTES})"
        )));
    }
    let text = std::fs::read_to_string(path).map_err(|error| in_file(error.to_string()))?;
    parse(&text).map_err(in_file)
}

/// Reads the text of a configuration file.
///
/// # Errors
/// As [`read`].
pub fn parse(text: &str) -> Result<Plan, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    if file.exports.is_empty() || file.exports.len() > MAX_EXPORTS {
        return Err(format!(
            "there must be 1 to {MAX_EXPORTS} [[export]] tables"
        ));
    }
    let listen = file
        .listen
        .iter()
        .map(|text| address::parse_listen(text))
        .collect::<Result<Vec<Listen>, _>>()
        .map_err(|error| format!("listen: {error}"))?;
    let control = file
        .control
        .as_deref()
        .map(ControlPlace::parse)
        .transpose()
        .map_err(|error| format!("control: {error}"))?;
    let mut new_images = Vec::new();
    let mut exports = Vec::new();
    for export in file.exports {
        let name = export.name.clone();
        let (export, new_image) =
            check(export).map_err(|error| format!("export {name:?}: {error}"))?;
        exports.push(export);
        new_images.extend(new_image);
    }
    Ok(Plan {
        listen,
        control,
        metrics: value("metrics", &file.metrics, address::parse_metrics)?,
        exports,
        new_images,
        max_rate_all: value("max-rate-all", &file.max_rate_all, quantity::parse_rate)?.flatten(),
        congestion: file.congestion,
        max_clients: file.max_clients.unwrap_or(DEFAULT_MAX_CLIENTS),
    })
}

fn check(export: Export) -> Result<(ExportConfig, Option<NewImage>), String> {
    let block_bytes = value("block-size", &export.block_size, cli::parse_block_size)?;
    let size = value("size", &export.size, quantity::parse_size)?;
    let engine = value("engine", &export.engine, |text| {
        EngineName::from_str(text, false)
    })?;
    let transport = value("transport", &export.transport, |text| {
        TransportName::from_str(text, false)
    })?;
    let compress = value("compress", &export.compress, cli::parse_packing)?;
    let source = source(&export)?;
    if size.is_some() && source.is_some() {
        return Err("size: a disk that comes from elsewhere has the size it has there".into());
    }
    let new_image = size.map(|bytes| NewImage {
        path: export.image.clone(),
        bytes,
    });
    let config = ExportConfig {
        name: export.name,
        image: export.image,
        state_dir: export.state,
        block_bytes: block_bytes.unwrap_or(DEFAULT_BLOCK_BYTES),
        read_only: export.read_only,
        engine: engine.unwrap_or_default().into(),
        transport: transport.unwrap_or_default().into(),
        compress: compress.unwrap_or_default(),
        source,
    };
    Ok((config, new_image))
}

fn source(export: &Export) -> Result<Option<SourceConfig>, String> {
    let Some(uri) = value("from", &export.from, address::parse_from)? else {
        let given = [
            ("handoff", export.handoff.is_some()),
            ("background", export.background.is_some()),
            ("max-rate", export.max_rate.is_some()),
            ("connections", export.connections.is_some()),
            ("on-source-loss", export.on_source_loss.is_some()),
            ("overwrite", export.overwrite.is_some()),
            ("source-moved", export.source_moved.is_some()),
            ("heat", export.heat.is_some()),
            ("verify", export.verify.is_some()),
            ("prepare", export.prepare.is_some()),
            ("seed-images", export.seed_images.is_some()),
            ("seed-always", export.seed_always.is_some()),
            ("way-back", export.way_back.is_some()),
            ("return", export.comes_back.is_some()),
        ];
        return match given.iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(format!("{key} makes no sense without from")),
            None => Ok(None),
        };
    };
    let handoff = value("handoff", &export.handoff, |text| {
        Handoff::from_str(text, false)
    })?;
    let prepare = value("prepare", &export.prepare, |text| {
        PrepareName::from_str(text, false)
    })?;
    let on_loss = value(
        "on-source-loss",
        &export.on_source_loss,
        cli::parse_source_loss,
    )?;
    let connections = export.connections.map(|n| n.to_string());
    let connections = value("connections", &connections, cli::parse_connections)?;
    Ok(Some(SourceConfig {
        uri,
        handoff: handoff.unwrap_or_default().into(),
        connections: connections.unwrap_or(DEFAULT_CONNECTIONS),
        background: export.background.unwrap_or(true),
        max_rate: value("max-rate", &export.max_rate, quantity::parse_rate)?.flatten(),
        on_loss: on_loss.unwrap_or(SourceLoss::Wait),
        overwrite: export.overwrite.unwrap_or(false),
        moved: export.source_moved.unwrap_or(false),
        heat: export.heat.clone(),
        verify: export.verify.unwrap_or(false),
        prepare: prepare.unwrap_or_default().into(),
        seed_images: export.seed_images.clone().unwrap_or_default(),
        seed_always: export.seed_always.unwrap_or(false),
        way_back: export.way_back.unwrap_or(false),
        comes_back: export.comes_back.unwrap_or(false),
    }))
}

fn value<T>(
    key: &str,
    text: &Option<String>,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, String> {
    text.as_deref()
        .map(parse)
        .transpose()
        .map_err(|error| format!("{key}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hikkoshi_daemon::config::{Engine, HandoffPolicy};
    use std::time::Duration;

    /// The example in the documentation is the one that is tested.
    fn documented_example() -> String {
        let page = include_str!("../../../docs/config.md");
        let start = page.find("```toml\n").expect("an example") + "```toml\n".len();
        let end = page[start..].find("```").expect("its end") + start;
        page[start..end].into()
    }

    #[test]
    fn the_documented_example_is_understood() {
        let plan = parse(&documented_example()).unwrap();
        assert_eq!(plan.listen.len(), 2);
        assert_eq!(plan.exports.len(), 3);
        assert_eq!(plan.max_rate_all, Some(80_000_000));
        assert_eq!(plan.congestion.as_deref(), Some("bbr"));
        let web = &plan.exports[0];
        let source = web.source.as_ref().unwrap();
        assert_eq!(source.uri, "nbd://old-site.example/web");
        assert_eq!(source.handoff, HandoffPolicy::Command);
        assert_eq!(source.max_rate, Some(40_000_000));
        assert_eq!(source.on_loss, SourceLoss::Error(Duration::from_secs(60)));
        assert_eq!(
            source.heat.as_deref(),
            Some(Path::new("/var/lib/hikkoshi/web.heat"))
        );
        assert_eq!(web.engine, Engine::Threads);
        assert!(plan.exports[1].read_only && plan.exports[1].source.is_none());
        assert_eq!(plan.new_images.len(), 1);
        assert_eq!(plan.new_images[0].bytes, 20 << 30);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("", "export"),
            ("export = []", "export"),
            ("listne = []\n[[export]]\nimage='a'", "listne"),
            ("[[export]]\nname='a'", "image"),
            ("[[export]]\nimage='a'\nblocksize='4k'", "blocksize"),
            ("[[export]]\nimage='a'\nblock-size='3k'", "block-size"),
            ("[[export]]\nimage='a'\nhandoff='now'", "handoff"),
            ("[[export]]\nimage='a'\nheat='b'", "heat"),
            (
                "[[export]]\nimage='a'\nfrom='nbd://x/'\nhandoff='soon'",
                "handoff",
            ),
            (
                "[[export]]\nimage='a'\nfrom='nbd://x/'\nconnections=0",
                "connections",
            ),
            ("[[export]]\nimage='a'\nfrom='ftp://x/'", "from"),
            ("[[export]]\nimage='a'\nfrom='nbd://x/'\nsize='1G'", "size"),
            ("listen=['x']\n[[export]]\nimage='a'", "listen"),
            ("metrics='9109'\n[[export]]\nimage='a'", "metrics"),
            ("control='x'\n[[export]]\nimage='a'", "control"),
            ("max-rate-all=5\n[[export]]\nimage='a'", "max-rate-all"),
            ("max-rate-all='fast'\n[[export]]\nimage='a'", "max-rate-all"),
        ] {
            let error = parse(text)
                .err()
                .unwrap_or_else(|| panic!("accepted: {text}"));
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(read(Path::new("/nonexistent.toml")).is_err());
    }
}
