//! `hikkoshi migrate`: moves a VM that QEMU runs, and its disks with it.
//!
//! The decisions are in [`course`] (which step follows which, and the way back) and [`check`] (what
//! must be so before); both reach the world through [`sites`]. [`world`] is that world: QMP
//! ([`qmp`]) and the daemons' control sockets. How a move ended is said by [`outcome`].

pub mod args;
mod back;
mod blocks;
mod check;
mod course;
mod forward;
mod outcome;
mod qmp;
mod report;
mod sites;
mod whereabouts;
mod world;

#[cfg(test)]
mod check_tests;
#[cfg(test)]
mod course_tests;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod qmp_tests;

use std::path::Path;

use hikkoshi_daemon::control::client::ControlClient;
use hikkoshi_daemon::status::LifeState;

use crate::choose;
use crate::failure::Failure;
use crate::quantity::show_size;
use args::{DiskArg, HalfArg, Migrate};
use blocks::Kind;
use course::{Course, Options, Prepare};
use qmp::Qmp;
use report::Report;
use sites::{Site, Survey};
use world::{End, Pair, Transfer, World};

/// Moves the VM, or says what would be done.
///
/// # Errors
/// Anything but a move that is done; the text says where the VM and its disks are.
pub fn run(args: &Migrate) -> Result<(), Failure> {
    let mut qmp = [Qmp::new(args.qmp.clone()), Qmp::new(args.to_qmp.clone())];
    let pairs = disks(args, &mut qmp)?;
    let uri = args.uri.clone().unwrap_or_default();
    let transfer = Transfer {
        incoming_uri: args.incoming_uri.clone().unwrap_or_else(|| uri.clone()),
        uri,
        bandwidth: args.bandwidth,
        downtime: args.downtime,
    };
    let options = Options {
        prepare: (!args.no_prepare).then_some(Prepare {
            limit: args.prepare_for,
        }),
        timeout: args.timeout,
        keep_standby: args.keep_standby,
        detach: args.detach,
        quit_old: args.quit_old,
        old_is_gone: args.old_is_gone,
    };
    let mut world = World::new(qmp, pairs, transfer, Report::new(args.json));
    world.catch_signals()?;
    if !args.resume {
        let survey = world.survey();
        let trust = check::Trust {
            leave_out: args.leave_out.clone(),
            disks: args.trust_disks,
        };
        let problems = check::problems(&survey, &trust);
        if !problems.is_empty() {
            return Err(Failure::failed(format!(
                "nothing was changed, because not everything is ready to move:\n  {}",
                problems.join("\n  ")
            )));
        }
        if args.dry_run {
            print!("{}", plan(args, &survey, &options));
            return Ok(());
        }
    }
    let mut course = Course::new(&mut world, &options);
    let outcome = match args.resume {
        true => course.resume(),
        false => course.run(),
    };
    world.into_report().end(&outcome);
    match outcome.done {
        true => Ok(()),
        false => Err(Failure::failed(outcome.text())),
    }
}

/// What would be done.
fn plan(args: &Migrate, survey: &Survey, options: &Options) -> String {
    let mut lines = vec![
        "Everything is ready. Nothing was changed. The move would be:".to_owned(),
        format!("  VM     {} to {}", args.qmp, args.to_qmp),
    ];
    for disk in survey.new_disks.iter().flatten() {
        let source = disk.source.as_deref().unwrap_or("?");
        lines.push(format!(
            "  disk   {:?}, {}, from {source}",
            disk.export,
            show_size(disk.size_bytes)
        ));
    }
    for (old, new) in survey.old_disks.iter().zip(&survey.new_disks) {
        let old = old.as_ref().and_then(|old| old.as_ref().ok());
        let coming_back = new
            .as_ref()
            .ok()
            .and_then(|new| whereabouts::return_note(old, new));
        lines.extend(coming_back.map(|note| format!("         {note}")));
    }
    let can_prepare = survey
        .new_disks
        .iter()
        .flatten()
        .any(|disk| disk.prepared.is_some());
    if options.prepare.is_some() && can_prepare {
        lines.push("  then   as much as possible of the disks is copied".into());
    }
    let uri = args.uri.as_deref().unwrap_or_default();
    lines.push(format!(
        "  then   the VM's memory is sent to {uri}, and the VM is kept stopped there"
    ));
    lines.push("  until here any failure takes everything back".into());
    lines.push("  then   all disks are handed off, and the VM goes on at the new site".into());
    if options.quit_old {
        lines.push("  then   the QEMU at the old site is ended".into());
    }
    lines.push(match options.detach {
        true => "  the rest of the disks comes by itself".into(),
        false => "  then   the rest of the disks is waited for".into(),
    });
    lines.join("\n") + "\n"
}

/// The disks that move: those of the command line, or all exports that the VM uses.
fn disks(args: &Migrate, qmp: &mut [Qmp; 2]) -> Result<Vec<Pair>, Failure> {
    let named = match args.disk.is_empty() {
        false => args.disk.clone(),
        true => used_exports(args, qmp)?,
    };
    let mut pairs = Vec::new();
    for disk in &named {
        let old = match args.plain_source {
            true => None,
            false => Some(end(&disk.old, args.control.as_deref(), Site::Old)?),
        };
        let new = end(&disk.new, args.to_control.as_deref(), Site::New)?;
        let pair = Pair { old, new };
        if pairs.contains(&pair) {
            return Err(Failure::Usage(format!(
                "disk {:?} is there twice; disks of different daemons are told apart by their \
                 control sockets: --disk unix:/run/a.sock#web=unix:/run/b.sock#web",
                disk.old.export
            )));
        }
        pairs.push(pair);
    }
    Ok(pairs)
}

/// The exports that the VM writes to, by the word of the QEMU that runs it, or else of the other.
fn used_exports(args: &Migrate, qmp: &mut [Qmp; 2]) -> Result<Vec<DiskArg>, Failure> {
    let [old, new] = qmp;
    let nodes = world::nodes(old)
        .or_else(|trouble| match args.resume {
            true => world::nodes(new),
            false => Err(trouble),
        })
        .map_err(|trouble| Failure::failed(trouble.text()))?;
    let exports: Vec<DiskArg> = nodes
        .iter()
        .filter(|node| !node.read_only && !args.leave_out.contains(&node.name))
        .filter_map(|node| match &node.kind {
            Kind::Nbd { export } => Some(DiskArg::same(export)),
            Kind::Local => None,
        })
        .collect();
    if exports.is_empty() {
        return Err(Failure::failed(format!(
            "the VM at {} writes to no NBD export, so there is no disk to move with it; if its \
             disks are there in a way that QEMU cannot tell, name them with --disk and add \
             --trust-disks",
            args.qmp
        )));
    }
    Ok(exports)
}

/// The daemon that has an export.
fn end(half: &HalfArg, control: Option<&Path>, site: Site) -> Result<End, Failure> {
    let named = half.control.as_deref().or(control);
    if let Some(path) = named {
        let daemon = ControlClient::new(path);
        return Ok(End {
            daemon,
            export: half.export.clone(),
        });
    }
    let (site_name, option) = match site {
        Site::Old => ("old", "--control"),
        Site::New => ("new", "--to-control"),
    };
    let found: Vec<_> = choose::all(None)?
        .into_iter()
        .filter(|one| one.status.export == half.export || half.export.is_empty())
        .filter(|one| one.status.state != LifeState::Opening)
        .filter(|one| {
            let stands_by = one.status.state == LifeState::Standby;
            stands_by == (site == Site::New)
        })
        .collect();
    match found.as_slice() {
        [one] => Ok(End {
            daemon: one.daemon.clone(),
            export: one.status.export.clone(),
        }),
        many => Err(Failure::failed(format!(
            "{} daemons of this machine have a disk {:?} as the {site_name} site should have it; \
             say which is the {site_name} site's with {option} unix:PATH (the other site's socket \
             is reached through a tunnel, such as ssh -L)",
            many.len(),
            half.export
        ))),
    }
}
