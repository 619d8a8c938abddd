//! The sections of `bench wan`: each asks one question of every way of moving a disk.
//!
//! Owns what they share: running one column at a time, going on when one fails. A section gives back
//! a table and, where time matters, charts.

mod cold;
mod company;
mod copy;
mod incompressible;
mod iperf;
mod link;
mod loss;
mod seed;
mod sequential;
mod trace;
mod writes;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;
use tempfile::TempDir;

use super::Bench;
use super::disk::Disk;
use super::grid::{Better, Grid, Row};
use super::guest::Guest;
use super::mover::{How, Mover};
use super::moving::{Moving, SourceCopy, Terms};
use super::plot::Chart;
use super::site::Sites;
use crate::report::Role;

/// A section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Section {
    /// What the emulated link is like
    Link,
    /// A disk that cannot be compressed, beside what iperf3 gets
    Incompressible,
    /// The disk with files until it is resident, while a guest reads
    Copy,
    /// A guest's cold reads while nothing is copied
    Cold,
    /// A guest's cold sequential read
    Sequential,
    /// A guest's writes during the move
    Writes,
    /// A recorded boot and a recorded compile, right after the switch
    Trace,
    /// The disk with files, with a previous copy of it at the new site
    Seed,
    /// A link that loses packets
    Loss,
    /// A link that another stream fills, and one that becomes longer: only when asked for
    Company,
}

/// What a section found.
pub struct Findings {
    /// The table.
    pub grid: Grid,
    /// Charts.
    pub charts: Vec<Chart>,
}

impl Section {
    /// Its name on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Asks its question on this link.
    pub fn run(self, bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
        match self {
            Self::Link => link::run(bench, sites),
            Self::Incompressible => incompressible::run(bench, sites),
            Self::Copy => copy::run(bench, sites),
            Self::Cold => cold::run(bench, sites),
            Self::Sequential => sequential::run(bench, sites),
            Self::Writes => writes::run(bench, sites),
            Self::Trace => trace::run(bench, sites),
            Self::Seed => seed::run(bench, sites),
            Self::Loss => loss::run(bench, sites),
            Self::Company => company::run(bench, sites),
        }
    }
}

/// One column being measured.
struct Attempt<'a> {
    bench: &'a Bench<'a>,
    sites: &'a Sites,
    mover: &'a Mover,
    disk: &'a Disk,
    copy: &'a SourceCopy,
    dir: TempDir,
    background: bool,
}

impl Attempt<'_> {
    fn terms(&self) -> Terms<'_> {
        Terms {
            hikkoshi: &self.bench.hikkoshi,
            sites: self.sites,
            disk: self.disk,
            copy: self.copy,
            dir: self.dir.path(),
            background: self.background,
        }
    }

    /// Starts the move.
    fn start(&self) -> Result<Moving> {
        let terms = self.terms();
        let source = self.mover.start_source(&terms)?;
        self.mover.start(&terms, source)
    }
}

/// A guest of the disk on its way.
fn guest_of(moving: &Moving) -> Result<Guest> {
    Guest::open(moving.endpoint.as_ref().context("it serves nobody")?)
}

/// The columns that a section compares: ours first, then what the command line adds, then peers.
fn movers(bench: &Bench<'_>, ours: Vec<Mover>, peers: &[How]) -> Vec<Mover> {
    let mut all = ours;
    all.extend(bench.options.variant.iter().cloned());
    all.extend(peers.iter().cloned().map(Mover::peer));
    let wanted = |mover: &Mover| {
        let only = &bench.options.movers;
        only.is_empty() || only.iter().any(|name| mover.name.contains(name))
    };
    all.retain(|mover| wanted(mover) && bench.can(mover));
    all
}

fn columns(movers: &[Mover]) -> Vec<(String, Role)> {
    let columns = movers.iter();
    columns
        .map(|mover| (mover.name.clone(), mover.role()))
        .collect()
}

fn rows<const N: usize>(figures: [(&str, Better); N], columns: usize) -> [Row; N] {
    figures.map(|(figure, better)| Row::new(figure, better, columns))
}

/// Measures every column in every round. A column that fails says why and stays empty.
#[allow(clippy::too_many_arguments)]
fn each<'a>(
    bench: &'a Bench<'a>,
    sites: &'a Sites,
    section: Section,
    movers: &[Mover],
    disk: &Disk,
    dir: &Path,
    background: bool,
    mut measure: impl FnMut(usize, &Attempt<'_>) -> Result<()>,
) -> Result<()> {
    if movers.is_empty() {
        return Ok(());
    }
    let copy = bench.source_copy(disk)?;
    for round in 0..bench.rounds() {
        for turn in 0..movers.len() {
            // What comes first after a pause may be a little slower: everyone in turn.
            let index = (round + turn) % movers.len();
            let mover = &movers[index];
            let what = format!("{}, {}: {}", sites.case.name(), section.name(), mover.name);
            bench.progress(&what);
            let attempt = Attempt {
                bench,
                sites,
                mover,
                disk,
                copy: &copy,
                dir: bench.scratch(dir)?,
                background,
            };
            // The same packets are lost for all.
            sites.link.draw_losses(seed_of(round));
            if let Err(error) = measure(index, &attempt) {
                bench.failed(&mover.name, &error);
            }
            drop(attempt);
            settle(sites);
        }
    }
    Ok(())
}

/// What the losses of a round are drawn from.
fn seed_of(round: usize) -> u64 {
    u64::try_from(round).unwrap_or(u64::MAX) + 1
}

/// Waits until the link is empty: who was ended may have left bytes on it.
fn settle(sites: &Sites) {
    let total = || sites.link.a_to_b().bytes + sites.link.b_to_a().bytes;
    let pause = Duration::from_millis(200) + 2 * sites.case.rtt();
    for _ in 0..20 {
        let before = total();
        std::thread::sleep(pause);
        if total() == before {
            return;
        }
    }
}
