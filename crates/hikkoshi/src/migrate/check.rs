//! The check before a move: everything that must be so is looked at, and all that is wrong is told
//! at once, before anything has changed.

use std::fmt::Write as _;

use super::blocks::{self, Kind, Node};
use super::sites::{DiskState, Phase, Site, Survey, Trouble};

/// What the check is told by whoever drives the move.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// Block nodes that need no moving: the new site has what they need.
    pub leave_out: Vec<String>,
    /// The VM's disks are those of the command line, whatever QEMU's block nodes look like.
    pub disks: bool,
}

/// What is wrong, each with what to do; empty when nothing is.
pub fn problems(survey: &Survey, trust: &Trust) -> Vec<String> {
    let mut wrong = Vec::new();
    check_machines(survey, &mut wrong);
    for disk in 0..survey.new_disks.len() {
        check_disk(
            survey.old_disks[disk].as_ref(),
            &survey.new_disks[disk],
            &mut wrong,
        );
    }
    if !trust.disks {
        check_nodes(survey, trust, &mut wrong);
    }
    wrong
}

fn check_machines(survey: &Survey, wrong: &mut Vec<String>) {
    let [old, new] = &survey.vm;
    match old {
        Err(trouble) => wrong.push(format!("old site: {}", trouble.text())),
        Ok(state) if !state.running => wrong.push(format!(
            "old site: the VM does not run, it is {}; a VM that stands still needs no live \
             migration",
            state.status
        )),
        Ok(_) => {}
    }
    match new {
        Err(trouble) => wrong.push(format!("new site: {}", trouble.text())),
        Ok(state) if state.status != "inmigrate" => wrong.push(format!(
            "new site: the QEMU does not wait for a VM, it is {}; start it with the same options \
             as the old one, with the disks of the new site, and `-incoming defer` (if the VM has \
             arrived there already: --resume)",
            state.status
        )),
        Ok(_) => {}
    }
    for (site, migration) in [Site::Old, Site::New].into_iter().zip(&survey.migration) {
        let name = site_name(site);
        match migration {
            // Told already with the VM's state, in general.
            Err(Trouble::Lost(_)) => {}
            Err(trouble) => wrong.push(format!("{name} site: {}", trouble.text())),
            Ok(migration) if migration.phase == Phase::Active => wrong.push(format!(
                "{name} site: a migration is under way already; wait for its end, or cancel it"
            )),
            Ok(_) => {}
        }
    }
}

fn site_name(site: Site) -> &'static str {
    match site {
        Site::Old => "old",
        Site::New => "new",
    }
}

/// One disk, at both sites.
fn check_disk(
    old: Option<&Result<DiskState, Trouble>>,
    new: &Result<DiskState, Trouble>,
    wrong: &mut Vec<String>,
) {
    let old = match old {
        Some(Err(trouble)) => {
            wrong.push(format!("old site: {}", trouble.text()));
            None
        }
        Some(Ok(old)) => Some(old),
        None => None,
    };
    let new = match new {
        Err(trouble) => return wrong.push(format!("new site: {}", trouble.text())),
        Ok(new) => new,
    };
    let name = &new.export;
    let mut say = |what: String| wrong.push(format!("new site: disk {name:?} {what}"));
    if new.state != "standby" {
        // What is there is an old copy of this disk, which it can come back into.
        let back = match new.state == "departed" || new.old_copy_needed {
            true => " --return",
            false => "",
        };
        say(format!(
            "is {}, and must be standby: `hikkoshi serve IMAGE --from URI-OF-THE-OLD-SITE{back}`",
            new.state
        ));
    }
    if new.source_connected != Some(true) && new.state == "standby" {
        say(format!(
            "does not reach its source {}",
            new.source.as_deref().unwrap_or("(none)")
        ));
    }
    if new.poisoned {
        say("takes no writes after a failed sync: restart its daemon".into());
    }
    if new.clients == 0 {
        say("is open nowhere: does the QEMU at the new site use another server?".into());
    }
    let Some(old) = old else { return };
    if old.size_bytes != new.size_bytes {
        say(format!(
            "has {} bytes, its disk at the old site {}: its source must be another one",
            new.size_bytes, old.size_bytes
        ));
    }
    let source_export = new
        .source
        .as_deref()
        .and_then(|source| source.parse::<hikkoshi_nbd::uri::NbdUri>().ok())
        .map(|uri| uri.export);
    if let Some(export) = source_export.filter(|e| !e.is_empty() && *e != old.export) {
        say(format!(
            "comes from an export named {export:?}, not from {:?}",
            old.export
        ));
    }
    let mut say = |what: String| wrong.push(format!("old site: disk {:?} {what}", old.export));
    if old.state == "departed" {
        say("has moved on from there already, and takes no writes".into());
    } else if old.state == "arriving" && new.old_copy_needed {
        // Blocks that were written in part need their rest from there before the disk can go back.
        if old.source_connected != Some(true) {
            say(
                "does not reach its old copy at the new site, and cannot go back before it does; it \
                 tries again by itself: see `hikkoshi status` there"
                    .into(),
            );
        }
    } else if !matches!(old.state.as_str(), "local" | "departing") {
        say(format!(
            "is {}: only a disk that is there whole can move on (`hikkoshi wait`); to where it comes \
             from it can go back at once, if the old copy there was started with --return",
            old.state
        ));
    }
    if old.poisoned {
        say("takes no writes after a failed sync: restart its daemon".into());
    }
    if old.clients == 0 {
        say("is open nowhere: the VM must use another server".into());
    }
}

/// Whether the disks are those that the VM has, and all of them.
fn check_nodes(survey: &Survey, trust: &Trust, wrong: &mut Vec<String>) {
    // What a daemon says of the old disk, or else of the new one, whose size is the same.
    let known: Option<Vec<&DiskState>> = survey.new_disks.iter().map(|d| d.as_ref().ok()).collect();
    let Some(new) = known else { return };
    let old: Vec<Option<&DiskState>> = survey
        .old_disks
        .iter()
        .map(|disk| disk.as_ref().and_then(|disk| disk.as_ref().ok()))
        .collect();
    let exports_of = |site: Site| -> Vec<(&str, u64)> {
        new.iter()
            .zip(&old)
            .map(|(new, old)| match (site, old) {
                (Site::Old, Some(old)) => (old.export.as_str(), old.size_bytes),
                _ => (new.export.as_str(), new.size_bytes),
            })
            .collect()
    };
    for (site, nodes) in [Site::Old, Site::New].into_iter().zip(&survey.nodes) {
        let Ok(nodes) = nodes else { continue };
        let moving: Vec<&Node> = nodes
            .iter()
            .filter(|node| !trust.leave_out.contains(&node.name))
            .collect();
        let (name, exports) = (site_name(site), exports_of(site));
        let Some(assigned) = assigned(&exports, &moving, name, wrong) else {
            continue;
        };
        for (at, node) in moving.iter().enumerate() {
            if node.read_only || assigned.contains(&at) {
                continue;
            }
            // What the new site opens besides is its own business, if the old site's list is whole.
            if site == Site::Old {
                wrong.push(stays_behind(node));
            }
        }
    }
}

fn assigned(
    exports: &[(&str, u64)],
    nodes: &[&Node],
    site: &str,
    wrong: &mut Vec<String>,
) -> Option<Vec<usize>> {
    match blocks::assign(exports, nodes) {
        Ok(assigned) => Some(assigned),
        Err(export) => {
            let (name, size) = exports[export];
            let mut list = String::new();
            for node in nodes {
                // Writing to a string does not fail.
                let _ = write!(
                    list,
                    "\n    {} {} ({} bytes)",
                    node.name, node.file, node.size_bytes
                );
            }
            wrong.push(format!(
                "{site} site: the VM has no disk on export {name:?} of {size} bytes by QEMU's list \
                 (if it is there in a way that QEMU cannot tell, add --trust-disks); the list: \
                 {}",
                if list.is_empty() { "empty" } else { &list }
            ));
            None
        }
    }
}

fn stays_behind(node: &Node) -> String {
    let Node { name, file, .. } = node;
    match &node.kind {
        Kind::Nbd { export } => format!(
            "old site: the VM writes to the NBD export {export:?} ({file}), which no --disk names; \
             add --disk {export}, or --leave-out {name} if the new site reaches it as well"
        ),
        Kind::Local => format!(
            "old site: the VM writes to {file} of its host (block node {name}), which would stay \
             behind; put it on an export of hikkoshi, or say --leave-out {name} if the new site \
             has what it needs"
        ),
    }
}
