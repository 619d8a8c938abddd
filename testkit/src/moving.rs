//! A guest that moves, and the two sites between which its disk does.
//!
//! The guest knows of every sector which version it wrote last and had answered, and which writes
//! were never answered: of those the disk may hold the one or the other, sector by sector. A write
//! that was refused has not happened, or has: it was never answered as done, so nobody may rely on
//! either.

use crate::client::{Answer, Client};
use crate::daemon::{Daemon, LONG};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const SECTOR: u64 = 512;
/// Every fourth run of this length is a hole in the image that a guest begins with.
const HOLE_SECTORS: u64 = 512;
/// Read at a time when everything is compared.
const STEP: u64 = 1 << 20;
/// How often something is tried again that comes about soon.
const POLL: Duration = Duration::from_millis(20);

/// A source of chance that a seed repeats.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// Thrown from this seed on.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }
}

/// What a guest knows of its disk.
#[derive(Debug)]
pub struct Guest {
    dice: Dice,
    /// The version of each sector that was answered last; 0: as the image was made.
    known: Vec<u32>,
    /// Versions that were asked for since and not answered as done.
    maybe: Vec<Vec<u32>>,
    version: u32,
    /// Writes beyond this are made nowhere.
    pub within: u64,
}

/// The bytes of a sector in a version.
fn sector(at: u64, version: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    if version == 0 && at / HOLE_SECTORS % 4 == 3 {
        return bytes;
    }
    let word = (at << 32 | u64::from(version) << 1 | 1).to_le_bytes();
    for place in bytes.chunks_exact_mut(8) {
        place.copy_from_slice(&word);
    }
    bytes
}

fn index(at: u64) -> usize {
    usize::try_from(at).expect("a small disk")
}

impl Guest {
    /// With a disk of `size` bytes as [`Guest::make_image`] makes it.
    pub fn new(size: u64, seed: u64) -> Self {
        let sectors = index(size / SECTOR);
        Self {
            dice: Dice::new(seed),
            known: vec![0; sectors],
            maybe: vec![Vec::new(); sectors],
            version: 0,
            within: size,
        }
    }

    /// Writes the image that the guest begins with.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn make_image(&self, path: &Path) -> Result<()> {
        let file = std::fs::File::create(path).with_context(|| path.display().to_string())?;
        file.set_len(self.known.len() as u64 * SECTOR)?;
        for at in 0..self.known.len() as u64 {
            let bytes = sector(at, 0);
            if bytes != [0; 512] {
                file.write_all_at(&bytes, at * SECTOR)?;
            }
        }
        Ok(())
    }

    /// Writes somewhere: sectors, or blocks, or more.
    ///
    /// # Errors
    /// The connection broke; what was written may be there.
    pub fn write_somewhere(&mut self, client: &mut Client) -> Result<Answer> {
        let sectors = self.within / SECTOR;
        let (at, len) = match self.dice.below(4) {
            0 => (self.dice.below(sectors), 1 + self.dice.below(7)),
            1 => (self.dice.below(sectors), 1 + self.dice.below(60)),
            _ => (
                self.dice.below(sectors / 8) * 8,
                8 * (1 + self.dice.below(4)),
            ),
        };
        self.write(client, at, len.min(sectors - at))
    }

    /// Writes `len` sectors from `at` on.
    ///
    /// # Errors
    /// As [`Guest::write_somewhere`].
    pub fn write(&mut self, client: &mut Client, at: u64, len: u64) -> Result<Answer> {
        self.version += 1;
        let version = self.version;
        let bytes: Vec<u8> = (at..at + len).flat_map(|s| sector(s, version)).collect();
        for s in at..at + len {
            self.maybe[index(s)].push(version);
        }
        let answer = client.try_write(at * SECTOR, &bytes)?;
        if answer == Answer::OK {
            for s in at..at + len {
                self.known[index(s)] = version;
                self.maybe[index(s)].clear();
            }
        }
        Ok(answer)
    }

    /// Reads somewhere, and compares.
    ///
    /// # Errors
    /// The connection broke, the read failed, or what came is wrong.
    pub fn read_somewhere(&mut self, client: &mut Client) -> Result<()> {
        let sectors = self.known.len() as u64;
        let at = self.dice.below(sectors);
        let len = (1 + self.dice.below(128)).min(sectors - at);
        let bytes = client.read(at * SECTOR, u32::try_from(len * SECTOR)?)?;
        self.compare(at * SECTOR, &bytes)
    }

    /// Compares bytes with what must be there.
    ///
    /// # Errors
    /// Something else is there; the message says where.
    pub fn compare(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        for (at, found) in (offset / SECTOR..).zip(bytes.chunks(512)) {
            let known = self.known[index(at)];
            let maybe = &self.maybe[index(at)];
            let allowed = std::iter::once(&known).chain(maybe);
            if allowed.clone().any(|version| found == sector(at, *version)) {
                continue;
            }
            let word = u64::from_le_bytes(found[..8].try_into()?);
            bail!(
                "sector {at} should have version {known} (or one of {maybe:?}) and has version {} \
                 of sector {}",
                (word & 0xffff_ffff) >> 1,
                word >> 32
            );
        }
        Ok(())
    }

    /// Compares everything, through a server.
    ///
    /// # Errors
    /// As [`Guest::read_somewhere`].
    pub fn check(&self, client: &mut Client) -> Result<()> {
        let size = self.known.len() as u64 * SECTOR;
        ensure!(client.size == size, "it has {} bytes", client.size);
        let mut at = 0;
        while at < size {
            let len = STEP.min(size - at);
            self.compare(at, &client.read(at, u32::try_from(len)?)?)?;
            at += len;
        }
        Ok(())
    }

    /// Compares an image that nobody serves.
    ///
    /// # Errors
    /// It cannot be read, or is wrong.
    pub fn check_image(&self, path: &Path) -> Result<()> {
        let bytes = std::fs::read(path)?;
        ensure!(bytes.len() == self.known.len() * 512, "another size");
        self.compare(0, &bytes)
    }

    /// Goes on for so many requests: writes, reads that are compared, flushes. All must succeed.
    ///
    /// # Errors
    /// One does not.
    pub fn work(&mut self, client: &mut Client, requests: u32) -> Result<()> {
        for _ in 0..requests {
            match self.dice.below(10) {
                0 => client.flush()?,
                1..=3 => self.read_somewhere(client)?,
                _ => {
                    let answer = self.write_somewhere(client)?;
                    ensure!(
                        answer == Answer::OK,
                        "a write was refused with {}",
                        answer.0
                    );
                }
            }
        }
        client.flush()
    }

    /// Tries to write at a site; whether it was taken, or refused for good.
    ///
    /// # Errors
    /// Anything else came of it.
    pub fn takes_writes(&mut self, site: &Site) -> Result<bool> {
        let answer = self.write_somewhere(&mut site.client()?)?;
        ensure!(
            answer == Answer::OK || answer == Answer::EPERM,
            "an error {} at {}",
            answer.0,
            site.story()
        );
        Ok(answer == Answer::OK)
    }

    /// Writes until it succeeds, over new connections where one breaks: what a VM does whose
    /// client reconnects, and whose owner lets it go on after errors.
    ///
    /// # Errors
    /// It has not succeeded within minutes.
    pub fn insist(&mut self, site: &Site) -> Result<()> {
        let start = Instant::now();
        loop {
            let done = site.client().and_then(|mut client| {
                let answer = self.write_somewhere(&mut client)?;
                Ok(answer == Answer::OK && client.try_flush()? == Answer::OK)
            });
            match done {
                Ok(true) => return Ok(()),
                done if start.elapsed() > LONG => {
                    bail!(
                        "no write succeeds at {}: {done:?}: {:?}",
                        site.name,
                        site.story()
                    )
                }
                _ => std::thread::sleep(POLL),
            }
        }
    }
}

/// A place where the disk is, or is to be.
pub struct Site {
    dir: PathBuf,
    name: String,
    image: PathBuf,
    arguments: Vec<String>,
    armed: bool,
    daemon: Option<Daemon>,
}

impl Site {
    /// One that is not served yet. `armed`: always by the binary with crash points.
    pub fn new(dir: &Path, name: &str, arguments: &[&str], armed: bool) -> Self {
        Self {
            dir: dir.to_path_buf(),
            name: name.to_owned(),
            image: dir.join(format!("{name}.img")),
            arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
            armed,
            daemon: None,
        }
    }

    /// A destination of `source`, which need not be served.
    pub fn moving(dir: &Path, name: &str, source: &Self, arguments: &[&str], armed: bool) -> Self {
        let uri = source.uri();
        Self::new(dir, name, &[&["--from", &uri], arguments].concat(), armed)
    }

    /// Its address, whether it is served or not.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// Its socket, whether it is served or not.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(format!("{}.nbd", self.name))
    }

    /// Its image.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Its durable word.
    ///
    /// # Errors
    /// There is none.
    pub fn recorded(&self) -> Result<String> {
        let path = self.dir.join(format!("{}.img.hikkoshi/volume", self.name));
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// Serves it.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn start(&mut self) -> Result<()> {
        self.start_to_die(None)
    }

    /// Serves it, until it kills itself at a point.
    ///
    /// # Errors
    /// As [`Daemon::start_armed`].
    pub fn start_to_die(&mut self, point: Option<&str>) -> Result<()> {
        let words: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let (dir, name, image) = (&self.dir, &self.name, &self.image);
        self.daemon = None;
        self.daemon = Some(if self.armed {
            Daemon::start_armed(dir, name, image, &words, point)?
        } else {
            ensure!(point.is_none(), "only the armed binary dies at points");
            Daemon::start(dir, name, image, &words)?
        });
        Ok(())
    }

    /// Tries to serve it; it must refuse, and what it says is returned.
    ///
    /// # Errors
    /// It serves.
    pub fn refusal(&mut self) -> Result<String> {
        self.daemon = None;
        match self.start() {
            Ok(()) => bail!("it was not refused: {:?}", self.story()),
            Err(error) => {
                let text = format!("{error:#}");
                ensure!(text.contains("exit status: 1"), "no clean failure: {text}");
                Ok(text)
            }
        }
    }

    /// Its daemon.
    ///
    /// # Panics
    /// It is not served.
    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("it is served")
    }

    /// A client.
    ///
    /// # Errors
    /// As [`Daemon::client`].
    pub fn client(&self) -> Result<Client> {
        self.daemon().client()
    }

    /// Its daemon, which is the caller's from now on.
    ///
    /// # Errors
    /// It is not served.
    pub fn take(&mut self) -> Result<Daemon> {
        self.daemon
            .take()
            .with_context(|| format!("{} is not served", self.name))
    }

    /// Kills it.
    ///
    /// # Errors
    /// It had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.take()?.kill()
    }

    /// Kills it and serves it again.
    ///
    /// # Errors
    /// As [`Site::kill`] and [`Site::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.start()
    }

    /// Kills it and serves its image, with nothing said of its move.
    ///
    /// # Errors
    /// As [`Site::kill`] and [`Daemon::start`].
    pub fn restart_alone(&mut self) -> Result<()> {
        self.kill()?;
        self.daemon = Some(Daemon::start(&self.dir, &self.name, &self.image, &[])?);
        Ok(())
    }

    /// `state` of its status.
    ///
    /// # Errors
    /// As [`Daemon::status`].
    pub fn state(&self) -> Result<String> {
        Ok(self.daemon().status()?["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned())
    }

    /// Waits for a state.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait_state(&self, wanted: &str) -> Result<Value> {
        self.daemon().wait_status(wanted, |s| s["state"] == wanted)
    }

    /// Waits until all is copied ahead that is worth it.
    ///
    /// # Errors
    /// It is not.
    pub fn wait_prepared(&self) -> Result<Value> {
        self.daemon()
            .wait_status("prepared", |s| s["prepared"] == true)
    }

    /// What its status tells a person.
    pub fn story(&self) -> String {
        let status = self.daemon.as_ref().map(Daemon::status);
        match status {
            Some(Ok(status)) => format!("{}: {} {}", self.name, status["state"], status["notes"]),
            Some(Err(error)) => format!("{}: {error:#}", self.name),
            None => format!("{}: not served", self.name),
        }
    }

    /// What the status tells a person, as one text.
    ///
    /// # Errors
    /// As [`Daemon::status`].
    pub fn notes(&self) -> Result<String> {
        Ok(self.daemon().status()?["notes"].to_string())
    }
}
