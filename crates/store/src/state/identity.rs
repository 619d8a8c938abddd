//! Whose state it is: the file `volume`, a few lines of text with a checksum.
//!
//! Text, so that an operator can read it; sealed, so that nobody edits it by accident.

use std::fmt::Write as _;

use hikkoshi_engine::geometry::{Geometry, GeometryError};
use hikkoshi_engine::journal::VolumeId;

const TITLE: &str = "hikkoshi-volume 1";

/// Longest address of a source that is kept.
const MAX_URI_BYTES: usize = 4096;

/// Where a volume stood when the record was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Before the handoff.
    Standby,
    /// After it, with blocks still to come.
    Arriving,
    /// Complete.
    Local,
    /// Given up before the handoff: it never takes a write.
    GivenUp,
}

impl Life {
    const ALL: [Self; 4] = [Self::Standby, Self::Arriving, Self::Local, Self::GivenUp];

    fn name(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Arriving => "arriving",
            Self::Local => "local",
            Self::GivenUp => "given-up",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|life| life.name() == name)
    }
}

/// The disk has moved on from here: what is here is the old copy, and takes no writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Departure {
    /// The volume that has it, and whose handoff this was.
    pub to: VolumeId,
    /// When the image was written last, in nanoseconds since 1970, where that is known: an image
    /// that was changed since is not the old copy any more.
    pub image_mtime: Option<i64>,
    /// Nothing of a later disk was written into it.
    pub intact: bool,
}

/// What binds a volume to its other copies. Nothing of it with servers that are not hikkoshi.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ties {
    /// Where the disk has moved on to, and since when nothing is written here.
    pub departed: Option<Departure>,
    /// The image at this site that it has moved on to, where it did not leave the site. Only with
    /// a departure.
    pub moved_to: Option<String>,
    /// The last move whose fence was lifted by hand: it never gets the disk any more, however late it
    /// asks.
    pub released: Option<VolumeId>,
    /// What was here when the move began is the old copy that this volume once took over.
    pub base: Option<VolumeId>,
    /// The source did not have all of the disk when this volume began to take it back: what it had
    /// not fetched is only in the old copy that is here. Before the handoff nothing is written into
    /// that; after it all is here but what was recorded as lacking.
    pub only_here: bool,
    /// The handoff is asked for by command alone: a write before it is refused, also after a restart.
    pub by_command: bool,
    /// This volume was a return that was given up, and its source may not have heard so: it may keep
    /// a fence for it.
    pub gave_up: bool,
    /// The source keeps a fence: the handoff is not done before it has closed it.
    pub fenced_source: bool,
    /// The source keeps none, and has not said since the handoff that what was written there is
    /// durable: no flush is answered here before it has.
    pub source_flush_owed: bool,
    /// What is written here after completion is recorded as well, so that the way back is short.
    pub way_back: bool,
    /// When the image was written last, in nanoseconds since 1970, before the volume was closed in
    /// good order: one that was written since has changes that nothing was recorded of.
    pub closed_at: Option<i64>,
}

/// What a state directory belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Made at random when the volume was created.
    pub volume_id: VolumeId,
    /// The shape of the disk.
    pub geometry: Geometry,
    /// Grows with every change of where the disk lives.
    pub generation: u64,
    /// Where the volume stands.
    pub life: Life,
    /// Address of the source, as it was given.
    pub source_uri: String,
    /// Made anew whenever the state is opened without the memory of the process before, so that
    /// this memory is not believed later.
    pub incarnation: [u8; 16],
    /// The inode of the image, where the file system keeps it over a restart.
    pub image_inode: Option<u64>,
    /// Its other copies.
    pub ties: Ties,
}

/// Why an identity cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is of another version.
    #[error("it is not of a format this version knows")]
    Format,
    /// It was changed or cut.
    #[error("its checksum is wrong")]
    Checksum,
    /// A line is missing, doubled or says what cannot be.
    #[error("the line {0:?} is missing or wrong")]
    Line(&'static str),
    /// It means something, but is not written as this program writes it.
    #[error("it is not written as this program writes it")]
    Form,
    /// The disk it speaks of cannot be.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
}

impl Identity {
    /// Whether the state tells which blocks are here, and which of them were written here.
    pub fn keeps_map(&self) -> bool {
        self.life != Life::Local || self.ties.way_back
    }

    /// The content of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = format!("{TITLE}\n");
        let mut line = |key: &str, value: &str| {
            writeln!(text, "{key} = {value}").expect("writing to a string cannot fail");
        };
        line("volume-id", &hex(&self.volume_id));
        line("size-bytes", &self.geometry.size_bytes().to_string());
        line("block-bytes", &self.geometry.block_bytes().to_string());
        line("generation", &self.generation.to_string());
        line("life", self.life.name());
        line("source", &escape(&self.source_uri));
        line("incarnation", &hex(&self.incarnation));
        line(
            "image-inode",
            &self.image_inode.map_or("none".into(), |i| i.to_string()),
        );
        let ties = &self.ties;
        // Only what there is: without ties the file is as it was before there were any.
        if let Some(departure) = ties.departed {
            line("departed", &written(departure));
        }
        if let Some(address) = &ties.moved_to {
            line("moved-to", &escape(address));
        }
        if let Some(released) = ties.released {
            line("released", &hex(&released));
        }
        if let Some(base) = ties.base {
            line("base", &hex(&base));
        }
        if ties.only_here {
            line("only-here", KEPT);
        }
        if ties.by_command {
            line("handoff", COMMAND);
        }
        if ties.gave_up {
            line("return", GIVEN_UP);
        }
        if ties.fenced_source {
            line("source-fence", KEPT);
        }
        if ties.source_flush_owed {
            line("source-flush", OWED);
        }
        if ties.way_back {
            line("way-back", KEPT);
        }
        if let Some(time) = ties.closed_at {
            line("closed", &time.to_string());
        }
        let crc = crc32c::crc32c(text.as_bytes());
        text.push_str(&format!("crc32c = {crc:08x}\n"));
        text.into_bytes()
    }

    /// Reads the content of the file.
    ///
    /// # Errors
    /// Anything that [`Identity::encode`] would not have written.
    pub fn decode(content: &[u8]) -> Result<Self, IdentityError> {
        let text = std::str::from_utf8(content).map_err(|_| IdentityError::Checksum)?;
        if !text.starts_with(TITLE) {
            return Err(IdentityError::Format);
        }
        let crc_at = text.rfind("crc32c = ").ok_or(IdentityError::Checksum)?;
        let sealed = format!(
            "crc32c = {:08x}\n",
            crc32c::crc32c(&text.as_bytes()[..crc_at])
        );
        if text[crc_at..] != sealed {
            return Err(IdentityError::Checksum);
        }
        let mut lines = text[..crc_at].lines();
        if lines.next() != Some(TITLE) {
            return Err(IdentityError::Format);
        }
        let mut value = |key: &'static str| {
            lines
                .next()
                .and_then(|l| l.strip_prefix(key)?.strip_prefix(" = "))
                .ok_or(IdentityError::Line(key))
        };
        let number = |key, text: &str| text.parse::<u64>().map_err(|_| IdentityError::Line(key));
        let volume_id = unhex(value("volume-id")?).ok_or(IdentityError::Line("volume-id"))?;
        let size = number("size-bytes", value("size-bytes")?)?;
        let block = number("block-bytes", value("block-bytes")?)?;
        let block = u32::try_from(block).map_err(|_| IdentityError::Line("block-bytes"))?;
        let generation = number("generation", value("generation")?)?;
        let life = Life::named(value("life")?).ok_or(IdentityError::Line("life"))?;
        let source_uri = unescape(value("source")?).ok_or(IdentityError::Line("source"))?;
        let incarnation = unhex(value("incarnation")?).ok_or(IdentityError::Line("incarnation"))?;
        let image_inode = match value("image-inode")? {
            "none" => None,
            text => Some(number("image-inode", text)?),
        };
        let ties = ties(lines)?;
        let geometry = Geometry::new(size, block)?;
        if source_uri.len() > MAX_URI_BYTES {
            return Err(IdentityError::Line("source"));
        }
        let identity = Self {
            volume_id,
            geometry,
            generation,
            life,
            source_uri,
            incarnation,
            image_inode,
            ties,
        };
        // Numbers can be written in more ways than one: `+5`, `007`, digits above 9 as capitals.
        if identity.encode() != content {
            return Err(IdentityError::Form);
        }
        Ok(identity)
    }
}

/// What is said of a tie that is there.
const KEPT: &str = "kept";
const GIVEN_UP: &str = "given-up";
const OWED: &str = "owed";
const COMMAND: &str = "command";

/// The lines of the ties, as many as there are.
fn ties<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Ties, IdentityError> {
    let mut ties = Ties::default();
    for line in lines {
        let (key, value) = line.split_once(" = ").ok_or(IdentityError::Line("ties"))?;
        match (key, value) {
            ("departed", text) => {
                let departure = departure(text).ok_or(IdentityError::Line("departed"))?;
                ties.departed = Some(departure);
            }
            ("moved-to", text) if ties.departed.is_some() => {
                let address = unescape(text).filter(|address| address.len() <= MAX_URI_BYTES);
                ties.moved_to = Some(address.ok_or(IdentityError::Line("moved-to"))?);
            }
            ("released", text) => {
                ties.released = Some(unhex(text).ok_or(IdentityError::Line("released"))?);
            }
            ("base", text) => {
                ties.base = Some(unhex(text).ok_or(IdentityError::Line("base"))?);
            }
            ("only-here", KEPT) => ties.only_here = true,
            ("handoff", COMMAND) => ties.by_command = true,
            ("return", GIVEN_UP) => ties.gave_up = true,
            ("source-fence", KEPT) => ties.fenced_source = true,
            ("source-flush", OWED) => ties.source_flush_owed = true,
            ("way-back", KEPT) => ties.way_back = true,
            ("closed", time) => {
                let time = time.parse().map_err(|_| IdentityError::Line("closed"))?;
                ties.closed_at = Some(time);
            }
            _ => return Err(IdentityError::Line("ties")),
        }
    }
    Ok(ties)
}

/// A departure in words: the volume, the time or `unknown`, `intact` or `spoilt`.
fn written(departure: Departure) -> String {
    let Departure {
        to,
        image_mtime,
        intact,
    } = departure;
    let time = image_mtime.map_or("unknown".into(), |time| time.to_string());
    let state = if intact { "intact" } else { "spoilt" };
    format!("{} {time} {state}", hex(&to))
}

fn departure(text: &str) -> Option<Departure> {
    let mut words = text.split(' ');
    let departure = Departure {
        to: unhex(words.next()?)?,
        image_mtime: match words.next()? {
            "unknown" => None,
            time => Some(time.parse().ok()?),
        },
        intact: words.next()? == "intact",
    };
    words.next().is_none().then_some(departure)
}

/// Sixteen bytes as 32 digits.
pub fn hex(bytes: &[u8; 16]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Keeps an address on one line.
fn escape(text: &str) -> String {
    text.replace('%', "%25").replace('\n', "%0A")
}

fn unescape(text: &str) -> Option<String> {
    Some(text.replace("%0A", "\n").replace("%25", "%"))
}
