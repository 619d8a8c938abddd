//! A disk whose previous copy is at the new site already: how little of it crosses the link.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Findings, Section, columns, each, movers, rows};
use crate::client::Random;
use crate::wan::Bench;
use crate::wan::disk::Disk;
use crate::wan::grid::{Better, Bound, Grid};
use crate::wan::mover::{How, Mover};
use crate::wan::site::Sites;
use crate::wan::watch::watch;

const BLOCK: usize = 4096;
/// One block in so many differs.
const ONE_IN: u64 = 100;
const SEED: u64 = 0x7365_6564;

pub(super) fn run(bench: &Bench<'_>, sites: &Sites) -> Result<Findings> {
    let case = &sites.case;
    let disk = bench.files()?;
    let previous = bench.fast_dir().join("previous");
    let differ = make_previous(&disk, bench.source_copy(&disk)?.path(), &previous)?;
    let ours = vec![Mover::ours_with_seed(&previous)];
    let movers = movers(bench, ours, &[How::Nbdcopy]);
    let [mut share, mut time] = rows(
        [
            ("on the wire, part of the disk", Better::Less),
            ("until resident, s", Better::Less),
        ],
        movers.len(),
    );
    each(
        bench,
        sites,
        Section::Seed,
        &movers,
        &disk,
        bench.fast_dir(),
        true,
        |index, attempt| {
            // Its pace is even, and `copy` has it whole; ours without a previous copy, too.
            let whole = attempt.mover.how != How::Nbdcopy;
            let limit = bench.watched_for(whole, &disk, case);
            let seen = watch(sites, &disk, limit, false, || attempt.start())?;
            let (seconds, on_wire, projected) =
                seen.until_resident(case).context("nothing has arrived")?;
            if seen.seconds.is_some() {
                let image = attempt.dir.path().join("image");
                hikkoshi_testkit::offline::images_are_equal(&disk.path, &image)?;
            }
            for (row, value) in [
                (&mut share, on_wire / disk.size_bytes as f64),
                (&mut time, seconds),
            ] {
                row.cells[index].values.push(value);
                row.cells[index].projected |= projected;
            }
            Ok(())
        },
    )?;
    share.bound = Some(Bound {
        text: "3 % of the disk".into(),
        limit: Some(0.03),
    });
    let note = format!(
        "{} MiB disk, {} MB of data. The previous copy at the new site is the same but for {differ} \
         blocks of 4 KiB, 1 % of the disk, scattered over its data. All that crosses counts, in both \
         directions, with headers and hashes.",
        disk.size_bytes >> 20,
        disk.data_bytes() / 1_000_000,
    );
    let grid = Grid {
        section: "seed",
        title: format!("With the previous copy as a seed: {}", case.name()),
        note,
        columns: columns(&movers),
        rows: vec![share, time],
    };
    Ok(Findings {
        grid,
        charts: Vec::new(),
    })
}

/// Copies the disk's `image`, and changes one block in a hundred. Tells how many.
fn make_previous(disk: &Disk, image: &Path, path: &Path) -> Result<usize> {
    if path.exists() {
        std::fs::remove_file(path).context("remove an older seed")?;
    }
    hikkoshi_testkit::cache::copy_image(image, path)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    let wanted = disk.size_bytes / BLOCK as u64 / ONE_IN;
    let wanted = wanted.min(disk.data_bytes() / BLOCK as u64 / 2);
    let mut random = Random::new(SEED);
    let mut changed = std::collections::BTreeSet::new();
    while (changed.len() as u64) < wanted {
        changed.insert(disk.random_block(&mut random));
    }
    let mut block = [0; BLOCK];
    for &at in &changed {
        file.read_exact_at(&mut block, at).context("read a block")?;
        block.iter_mut().for_each(|byte| *byte ^= 0xff);
        file.write_all_at(&block, at).context("change a block")?;
    }
    Ok(changed.len())
}
