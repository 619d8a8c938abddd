//! How a move ended, in one statement: where the VM is, where its disks are, what to do next.

use serde::Serialize;

use super::whereabouts::Whereabouts;

use crate::quantity::show_size;

/// Where the VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmPlace {
    /// It runs at the old site.
    Old,
    /// It runs at the new site.
    New,
    /// All of it is at the new site, and it is stopped there.
    StoppedNew,
    /// It was not sent, and is stopped at the old site.
    StoppedOld,
    /// Not everybody who would know answers.
    Unknown(String),
}

/// Where its disks are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DisksPlace {
    /// At the old site; the new site stands by for them.
    OldStandby,
    /// At the old site; the new site has given them up.
    OldGivenUp,
    /// At the old site; these are not known to be given up at the new site.
    OldPartly(Vec<String>),
    /// At the new site as far as the VM can tell; so many bytes are still to come.
    Arriving(u64),
    /// At the new site, whole.
    New,
    /// Another move has taken these away from the new site meanwhile.
    MovedOn(Vec<String>),
    /// These were handed off to the new site; the others were not, or it is not known.
    Split {
        /// Handed off.
        handed: Vec<String>,
        /// Not, or not known.
        others: Vec<String>,
    },
}

/// How a move ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether all that was asked for is done.
    pub done: bool,
    /// What went wrong, if something did.
    pub reason: Option<String>,
    /// Where the VM is.
    pub vm: VmPlace,
    /// Where its disks are.
    pub disks: DisksPlace,
    /// Where each of them is, if not all that was asked for is done.
    pub each: Vec<Whereabouts>,
    /// What else there is to know or to do.
    pub advice: Vec<String>,
}

impl Outcome {
    /// The statement.
    pub fn text(&self) -> String {
        let mut text = String::new();
        if let Some(reason) = &self.reason {
            text.push_str(reason.trim_end_matches('.'));
            text.push_str(".\n");
        }
        text.push_str(&self.place());
        for disk in &self.each {
            text.push_str("\n  ");
            text.push_str(&disk.text);
        }
        for line in &self.advice {
            text.push('\n');
            text.push_str(line);
        }
        text
    }

    /// The one sentence of where everything is.
    pub fn place(&self) -> String {
        let vm = match &self.vm {
            VmPlace::Old => "The VM runs at the old site, as before".to_owned(),
            VmPlace::New => "The VM runs at the new site".to_owned(),
            VmPlace::StoppedNew => {
                "The VM is at the new site with all its memory, stopped".to_owned()
            }
            VmPlace::StoppedOld => {
                "The VM is at the old site with all its memory, stopped".to_owned()
            }
            VmPlace::Unknown(why) => format!("It is not certain where the VM is ({why})"),
        };
        let disks = match &self.disks {
            DisksPlace::OldStandby => {
                "its disks are at the old site, and the new site stands by for them".to_owned()
            }
            DisksPlace::OldGivenUp => {
                "its disks are at the old site, and the new site has given them up".to_owned()
            }
            DisksPlace::OldPartly(names) => format!(
                "its disks are at the old site, and the new site may still stand by for {}",
                names.join(", ")
            ),
            DisksPlace::Arriving(left) => format!(
                "its disks are there, too, of which {} are still to come from the old site",
                show_size(*left)
            ),
            DisksPlace::New => {
                "its disks are there whole: they need the old site no more".to_owned()
            }
            DisksPlace::MovedOn(names) => format!(
                "of its disks these have moved on from there by another move: {}",
                names.join(", ")
            ),
            DisksPlace::Split { handed, others } if others.is_empty() => {
                format!(
                    "its disks are handed off to the new site: {}",
                    handed.join(", ")
                )
            }
            DisksPlace::Split { handed, others } => format!(
                "of its disks these are handed off to the new site: {}; these are not, or it is \
                 not known: {}",
                if handed.is_empty() {
                    "none".to_owned()
                } else {
                    handed.join(", ")
                },
                others.join(", ")
            ),
        };
        format!("{vm}; {disks}.")
    }
}
