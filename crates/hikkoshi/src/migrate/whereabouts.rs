//! Where each disk is, by the word of the daemons at both sites, for when not all went well.
//!
//! The old site's word counts for the fence: one that takes writes has not handed its disk over, as
//! it is fenced before the new site is told.

use serde::Serialize;

use super::course::is_handed;
use super::sites::{DiskState, Trouble};
use crate::quantity::show_size;

/// What is left at the old site when a disk comes back before all of it was there.
pub(super) const KEEP_OLD_COPY: &str = "Not all of the disk is at the old site: the rest is only in the old copy at the new site, \
     which is served from there as before. Keep that image, and its daemon running; for another \
     attempt restart that with the same command (--return).";

/// Where one disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Whereabouts {
    /// Its name.
    pub disk: String,
    /// Its state at the old site; `None` where nobody says.
    pub old: Option<String>,
    /// Its state at the new site; `None` where nobody says.
    pub new: Option<String>,
    /// That in a sentence.
    pub text: String,
}

impl Whereabouts {
    /// Of the disk `name`, which stands so at the old site (`None`: no daemon of ours) and so at the
    /// new one.
    pub fn of(
        name: &str,
        old: Option<&Result<DiskState, Trouble>>,
        new: &Result<DiskState, Trouble>,
    ) -> Self {
        let word = |state: &DiskState| state.state.clone();
        let old_state = old.and_then(|old| old.as_ref().ok());
        let fenced = old_state.map(|old| old.state == "departed");
        let mut text = format!("disk {name} is ");
        text.push_str(&match new {
            Ok(new) => at_new_site(new),
            Err(_) if fenced == Some(false) => {
                "at the old site, which has not handed it over".to_owned()
            }
            Err(_) => "at a place that is not certain: the daemon at the new site does not answer"
                .to_owned(),
        });
        let handed = new.as_ref().is_ok_and(is_handed);
        if fenced == Some(true) && !handed {
            text.push_str("; the old site is fenced, and takes no writes of it now");
        }
        if matches!(old, Some(Err(_))) {
            text.push_str("; the daemon at the old site does not answer");
        }
        if let Ok(new) = new
            && new.old_copy_needed
        {
            text.push_str("; ");
            text.push_str(&match old_state {
                Some(old) => format!("{} of it", show_size(old.absent_bytes)),
                None => "a part of it".to_owned(),
            });
            text.push_str(" is only in the old copy at the new site");
        }
        Self {
            disk: name.to_owned(),
            old: old_state.map(word),
            new: new.as_ref().ok().map(word),
            text,
        }
    }
}

fn at_new_site(new: &DiskState) -> String {
    match new.state.as_str() {
        "standby" => "at the old site, and the new site stands by for it".to_owned(),
        "given-up" => "at the old site, and the new site has given it up".to_owned(),
        "arriving" => format!(
            "at the new site, and {} of it are still to come from the old site",
            show_size(new.absent_bytes)
        ),
        "local" | "departing" => "at the new site, whole".to_owned(),
        "departed" => "not at the new site, where an old copy is that takes no writes".to_owned(),
        other => format!("{other} at the new site"),
    }
}

/// What is to be known beforehand of a disk that comes back before all of it was at the old site.
pub fn return_note(old: Option<&DiskState>, new: &DiskState) -> Option<String> {
    if !new.old_copy_needed {
        return None;
    }
    let mut text = format!(
        "{:?} comes back before all of it was at the old site: ",
        new.export
    );
    match old {
        Some(old) => {
            let kept = old.way_back.kept;
            let crossing = match kept {
                true => old.way_back.changed_bytes,
                false => old.resident_bytes,
            };
            text.push_str(&format!(
                "{} never left, {} have to come so far",
                show_size(old.absent_bytes),
                show_size(crossing)
            ));
            if !kept {
                // What is copied there now only crosses the link to come back.
                text.push_str(
                    " (what the old site has, as it does not record what it wrote: \
                               `hikkoshi pause` there keeps that from growing)",
                );
            }
        }
        None => text.push_str("what was written there comes, and no more"),
    }
    Some(text)
}
