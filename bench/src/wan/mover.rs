//! The ways in which a disk can come to the new site: ours and the peers'.
//!
//! Owns what they are called, with which options, and whether they can be measured here: one that
//! cannot (a program is missing, an option that the binary does not know) says why, and is left
//! out. How each is started is in `moving`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::packages;

use crate::report::Role;

/// Stands in options for the file in which the source has written down what the guest used.
pub(super) const HEAT_FILE: &str = "{heat}";

/// What serves the disk at the old site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// Ours.
    Hikkoshi,
    /// nbdkit's file plugin.
    Nbdkit,
}

/// How the disk moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// By us.
    Hikkoshi {
        /// Who serves the old site.
        source: SourceKind,
        /// More of `hikkoshi serve`'s options at the new site.
        options: Vec<String>,
        /// And at the old one, if that is ours.
        source_options: Vec<String>,
        /// Whether the source has seen the guest work before, in sections where that matters.
        heat: bool,
    },
    /// nbdcopy as it comes: what plain copying can do.
    Nbdcopy,
    /// nbdcopy with as many connections as ours has.
    NbdcopyConnections(usize),
    /// qemu-img convert with 16 requests in any order.
    Convert,
    /// qemu's copy-on-read over a qcow2 overlay, and block-stream.
    Stream,
    /// nbdkit's nbd plugin with the filters cow, scan and readahead.
    Scan,
}

/// A column of the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mover {
    /// What tables call it.
    pub name: String,
    /// How.
    pub how: How,
}

impl Mover {
    fn hikkoshi(name: &str, source: SourceKind, heat: bool, options: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            how: How::Hikkoshi {
                source,
                options: options.iter().map(|&option| option.to_owned()).collect(),
                source_options: Vec::new(),
                heat,
            },
        }
    }

    /// Ours, as users run it: hikkoshi at both sites.
    pub fn ours() -> Self {
        Self::hikkoshi("hikkoshi", SourceKind::Hikkoshi, false, &[])
    }

    /// Ours, with any NBD server as the source.
    pub fn ours_from_nbdkit() -> Self {
        Self::hikkoshi("hikkoshi, nbdkit source", SourceKind::Nbdkit, false, &[])
    }

    /// Ours, with nothing copied but what the guest asks for.
    pub fn ours_on_demand() -> Self {
        Self::hikkoshi(
            "hikkoshi, nothing copied",
            SourceKind::Hikkoshi,
            false,
            &["--no-background"],
        )
    }

    /// Ours, with another congestion control of what the source sends.
    pub fn ours_with_congestion(control: &str) -> Self {
        let name = format!("hikkoshi, {control}");
        let mut mover = Self::hikkoshi(&name, SourceKind::Hikkoshi, false, &[]);
        if let How::Hikkoshi { source_options, .. } = &mut mover.how {
            source_options.push(format!("--congestion={control}"));
        }
        mover
    }

    /// Ours, with a source that has served the guest before, and has written down where.
    pub fn ours_with_heat() -> Self {
        let option = format!("--heat={HEAT_FILE}");
        Self::hikkoshi(
            "hikkoshi, heat known",
            SourceKind::Hikkoshi,
            true,
            &[&option],
        )
    }

    /// Ours, with a previous copy of the disk at the new site.
    pub fn ours_with_seed(previous: &Path) -> Self {
        let option = format!("--seed-image={}", previous.display());
        Self::hikkoshi(
            "hikkoshi, previous copy",
            SourceKind::Hikkoshi,
            false,
            &[&option],
        )
    }

    /// One from the command line: `NAME=OPTIONS`. [`HEAT_FILE`] in them becomes a file's name.
    pub fn parse_variant(text: &str) -> Result<Self, String> {
        let (name, options) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} is not NAME=OPTIONS"))?;
        let options: Vec<&str> = options.split_whitespace().collect();
        Ok(Self::hikkoshi(name, SourceKind::Hikkoshi, true, &options))
    }

    /// One of the peers.
    pub fn peer(how: How) -> Self {
        let name = match &how {
            How::Hikkoshi { .. } => "hikkoshi".to_owned(),
            How::Nbdcopy => "nbdcopy".to_owned(),
            How::NbdcopyConnections(count) => format!("nbdcopy, {count} connections"),
            How::Convert => "qemu-img convert".to_owned(),
            How::Stream => "qemu stream".to_owned(),
            How::Scan => "nbdkit scan".to_owned(),
        };
        Self { name, how }
    }

    /// Whether it is ours or a peer.
    pub fn role(&self) -> Role {
        match self.how {
            How::Hikkoshi { .. } => Role::Subject,
            _ => Role::Reference,
        }
    }

    /// Whether a guest can use the disk meanwhile.
    pub fn serves(&self) -> bool {
        matches!(self.how, How::Hikkoshi { .. } | How::Stream | How::Scan)
    }

    /// Whether the source has seen the guest work.
    pub fn wants_heat(&self) -> bool {
        matches!(self.how, How::Hikkoshi { heat: true, .. })
    }

    /// Fails with the reason if it cannot be measured here; `help` is what `hikkoshi serve --help`
    /// prints.
    pub fn available(&self, help: &str) -> Result<()> {
        let tools: &[&str] = match &self.how {
            How::Hikkoshi {
                source,
                options,
                source_options,
                ..
            } => {
                let all = options.iter().chain(source_options);
                for option in all.filter(|option| option.starts_with("--")) {
                    let name = option.split('=').next().unwrap_or(option);
                    let known = help
                        .split(|c: char| c.is_whitespace() || c == ',' || c == '[')
                        .any(|word| word == name);
                    ensure!(known, "this hikkoshi has no {name}");
                }
                match source {
                    SourceKind::Hikkoshi => &[],
                    SourceKind::Nbdkit => &["nbdkit"],
                }
            }
            How::Nbdcopy | How::NbdcopyConnections(_) => &["nbdcopy", "nbdkit"],
            How::Convert => &["qemu-img", "nbdkit"],
            How::Stream => &["qemu-storage-daemon", "qemu-img", "nbdkit"],
            How::Scan => &["nbdkit"],
        };
        for tool in tools {
            packages::require(tool)?;
        }
        Ok(())
    }

    /// Options at the old site.
    pub fn source_options(&self) -> &[String] {
        match &self.how {
            How::Hikkoshi { source_options, .. } => source_options,
            _ => &[],
        }
    }

    /// What serves the old site.
    pub fn source(&self) -> SourceKind {
        match self.how {
            How::Hikkoshi { source, .. } => source,
            _ => SourceKind::Nbdkit,
        }
    }
}

/// What `hikkoshi serve --help` prints, to know which options there are.
pub fn serve_help(hikkoshi: &Path) -> Result<String> {
    let output = Command::new(hikkoshi)
        .args(["serve", "--help"])
        .output()
        .with_context(|| format!("run {}", hikkoshi.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
