//! The grammar of `hikkoshi migrate`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::qmp::Place;
use crate::{address, quantity};

const AFTER_HELP: &str = "\
Before: the daemons serve the disks at both sites (at the new one with --from, so that they stand
by), and a QEMU waits at the new site with the same machine, the disks of the new site and
`-incoming defer`. What is at the other site is reached through a tunnel:

  new$ ssh -N -L /run/old.qmp:/run/vm.qmp -L /run/old.ctl:/run/hikkoshi/control.sock old &
  new$ hikkoshi migrate --qmp unix:/run/old.qmp --control unix:/run/old.ctl \\
           --to-qmp unix:/run/vm.qmp --to-control unix:/run/hikkoshi/control.sock \\
           --uri tcp:new.example:4444

Up to the handoff of the disks any failure, or Ctrl-C, takes everything back, and the VM runs on at
the old site; from then on there is only the way forward, with --resume if need be. The last thing
said is where the VM is, and where its disks are.

Exit status: 0 done, 1 failed, 2 wrong usage.";

/// `migrate`.
#[derive(Args, Debug)]
#[command(after_long_help = AFTER_HELP)]
pub struct Migrate {
    /// The QMP socket of the QEMU that runs the VM: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "PLACE", value_parser = Place::parse)]
    pub qmp: Place,
    /// The QMP socket of the QEMU at the new site, which waits for it
    #[arg(long, value_name = "PLACE", value_parser = Place::parse)]
    pub to_qmp: Place,
    /// Where the VM's memory is sent to, in QEMU's words: tcp:HOST:PORT
    #[arg(long, value_name = "URI", required_unless_present = "resume")]
    pub uri: Option<String>,
    /// Where the QEMU at the new site listens for it [default: --uri]
    #[arg(long, value_name = "URI")]
    pub incoming_uri: Option<String>,
    /// Control socket of the daemon at the old site [default: those in the runtime directory]
    #[arg(long, value_name = "unix:PATH", value_parser = address::parse_control)]
    pub control: Option<PathBuf>,
    /// Control socket of the daemon at the new site [default: those in the runtime directory]
    #[arg(long, value_name = "unix:PATH", value_parser = address::parse_control)]
    pub to_control: Option<PathBuf>,
    /// A disk: its export, if need be with its name at the new site and the control sockets, as in
    /// web, web=web2, unix:/run/a.sock#web=unix:/run/b.sock#web; several times for several
    /// [default: all exports that the VM uses]
    #[arg(long, value_name = "DISK", value_parser = DiskArg::parse)]
    pub disk: Vec<DiskArg>,
    /// The server at the old site is not hikkoshi, and has no control socket
    #[arg(long)]
    pub plain_source: bool,
    /// A block node of the VM that need not move: the new site has what it needs
    #[arg(long, value_name = "NODE")]
    pub leave_out: Vec<String>,
    /// Do not compare the exports with QEMU's list of disks
    #[arg(long, requires = "disk")]
    pub trust_disks: bool,
    /// Do not wait until as much as possible of the disks is copied
    #[arg(long)]
    pub no_prepare: bool,
    /// Wait for that at most so long, e.g. 10m
    #[arg(long, value_name = "TIME", conflicts_with = "no_prepare",
        value_parser = quantity::parse_duration)]
    pub prepare_for: Option<Duration>,
    /// Take everything back if the VM's memory has not moved after so long
    #[arg(long, value_name = "TIME", value_parser = quantity::parse_duration)]
    pub timeout: Option<Duration>,
    /// Cap on the rate of the VM's memory, e.g. 100MB/s [default: as QEMU is set]
    #[arg(long, value_name = "RATE", value_parser = parse_bandwidth)]
    pub bandwidth: Option<u64>,
    /// How long the VM may stand still, e.g. 500ms [default: as QEMU is set]
    #[arg(long, value_name = "TIME", value_parser = quantity::parse_duration)]
    pub downtime: Option<Duration>,
    /// When everything was taken back, let the disks stand by at the new site as before
    #[arg(long)]
    pub keep_standby: bool,
    /// End when the VM runs at the new site; the rest of the disks comes by itself
    #[arg(long)]
    pub detach: bool,
    /// End the QEMU at the old site when the VM runs at the new one
    #[arg(long)]
    pub quit_old: bool,
    /// Go on with a move that failed after the VM had arrived at the new site
    #[arg(long, conflicts_with = "dry_run")]
    pub resume: bool,
    /// The QEMU at the old site does not answer, and surely does not run the VM
    #[arg(long, requires = "resume")]
    pub old_is_gone: bool,
    /// Check everything, say what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Progress and outcome as JSON, one object per line
    #[arg(long)]
    pub json: bool,
}

fn parse_bandwidth(text: &str) -> Result<u64, String> {
    quantity::parse_rate(text)?.ok_or_else(|| "to set no cap, leave --bandwidth out".into())
}

/// An export, and maybe the control socket of its daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HalfArg {
    /// The control socket.
    pub control: Option<PathBuf>,
    /// The export.
    pub export: String,
}

/// A disk on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    /// At the old site.
    pub old: HalfArg,
    /// At the new site.
    pub new: HalfArg,
}

impl DiskArg {
    /// The same export at both sites.
    pub fn same(export: &str) -> Self {
        let half = HalfArg {
            control: None,
            export: export.into(),
        };
        Self {
            old: half.clone(),
            new: half,
        }
    }

    /// `[CONTROL#]EXPORT[=[CONTROL#]EXPORT]`.
    fn parse(text: &str) -> Result<Self, String> {
        let Some((old, new)) = text.split_once('=') else {
            let old = half(text)?;
            if old.control.is_some() {
                return Err(format!(
                    "{text:?} says where one site's daemon is; say the other's, too: \
                     unix:/run/a.sock#web=unix:/run/b.sock#web"
                ));
            }
            return Ok(Self {
                new: old.clone(),
                old,
            });
        };
        Ok(Self {
            old: half(old)?,
            new: half(new)?,
        })
    }
}

fn half(text: &str) -> Result<HalfArg, String> {
    if let Some((control, export)) = text.split_once('#') {
        return Ok(HalfArg {
            control: Some(address::parse_control(control)?),
            export: export.into(),
        });
    }
    if text.starts_with("unix:") {
        return Err(format!(
            "{text:?} names no export; write {text}#EXPORT (and {text}# for the default export)"
        ));
    }
    Ok(HalfArg {
        control: None,
        export: text.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        assert_eq!(DiskArg::parse("web"), Ok(DiskArg::same("web")));
        assert_eq!(DiskArg::parse(""), Ok(DiskArg::same("")));
        let renamed = DiskArg::parse("web=web2").unwrap();
        assert_eq!(
            (&*renamed.old.export, &*renamed.new.export),
            ("web", "web2")
        );
        let full = DiskArg::parse("unix:/a.sock#web=unix:/b.sock#").unwrap();
        assert_eq!(full.old.control, Some("/a.sock".into()));
        assert_eq!(full.new.control, Some("/b.sock".into()));
        assert_eq!(full.new.export, "");
        for bad in [
            "unix:/a.sock",
            "unix:/a.sock#web",
            "x#web=y#web",
            "unix:#a=unix:/b#a",
        ] {
            assert!(DiskArg::parse(bad).is_err(), "{bad}");
        }
    }
}
