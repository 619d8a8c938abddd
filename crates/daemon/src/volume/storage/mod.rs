//! A disk that changes its storage under a VM that stays: from one image of this machine to another.
//!
//! It is a move like any other, whose source is a volume of the same process: the new image has a
//! volume of its own, with residency, journal and all that, which reads what it lacks from the old
//! volume ([`source`]) and agrees with it on the fence by the same messages ([`link`]). What is of
//! this kind alone is the switch ([`succession`]): the clients of the old volume go over to the new
//! one, and notice nothing. How it is opened is in [`open`], who drives it in `transfer.rs`.
//! See `docs/design/012-storage-under-a-vm.md`.

pub mod link;
pub mod open;
pub mod source;
pub mod succession;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};

/// What the address of an image begins with, where others have `nbd://`.
const SCHEME: &str = "image:";

/// What comes before the state directory, where that is not beside the image.
const STATE: &str = "?state=";

/// Longest text of an address, in bytes: so much is kept of the address of a source.
pub const MAX_ADDRESS_BYTES: usize = 4096;

/// An image of this machine, as the other end of a move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageAddress {
    /// The image, by its absolute path.
    pub image: PathBuf,
    /// Its state directory, where that is not beside it.
    pub state_dir: Option<PathBuf>,
}

impl ImageAddress {
    /// Of an image with this configuration.
    ///
    /// # Errors
    /// Its path cannot be written down; the text says why.
    pub fn new(image: &Path, state_dir: Option<&Path>) -> Result<Self, String> {
        let absolute = |path: &Path| {
            let path = std::path::absolute(path)
                .map_err(|error| format!("{} cannot be found: {error}", path.display()))?;
            match path.to_str() {
                Some(_) => Ok(path),
                None => Err(format!(
                    "{} is no text, and so cannot be written down; give it a name in UTF-8",
                    path.display()
                )),
            }
        };
        let address = Self {
            image: absolute(image)?,
            state_dir: state_dir.map(absolute).transpose()?,
        };
        if address.to_string().len() > MAX_ADDRESS_BYTES {
            return Err(format!(
                "the path {} is too long to be written down",
                image.display()
            ));
        }
        Ok(address)
    }

    /// A text as an address; `None` if it is another kind of source, or none.
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix(SCHEME)?;
        let (image, state_dir) = match rest.split_once(STATE) {
            Some((image, state_dir)) => (image, Some(unescape(state_dir)?)),
            None => (rest, None),
        };
        let image = unescape(image)?;
        let absolute = |path: &Path| path.is_absolute();
        (absolute(&image) && state_dir.as_deref().is_none_or(absolute))
            .then_some(Self { image, state_dir })
    }

    /// What to give to `hikkoshi serve`.
    pub fn arguments(&self) -> String {
        match &self.state_dir {
            Some(dir) => format!("{} --state {}", self.image.display(), dir.display()),
            None => self.image.display().to_string(),
        }
    }
}

/// As it is recorded.
impl fmt::Display for ImageAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", escape(&self.image))?;
        match &self.state_dir {
            Some(dir) => write!(f, "{STATE}{}", escape(dir)),
            None => Ok(()),
        }
    }
}

fn escape(path: &Path) -> String {
    let text = path.display().to_string();
    text.replace('%', "%25").replace('?', "%3F")
}

/// `None` for what [`escape`] would not have written.
fn unescape(text: &str) -> Option<PathBuf> {
    if text.is_empty() || text.contains('?') {
        return None;
    }
    let path = PathBuf::from(text.replace("%3F", "?").replace("%25", "%"));
    (escape(&path) == text).then_some(path)
}
