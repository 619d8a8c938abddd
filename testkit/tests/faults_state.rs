//! The durable state is deleted, cut, damaged, or that of another volume: refused, with words that
//! tell what to do, and nothing is changed.
//!
//! What is not refused is harmless by construction, and is told apart here: bytes of the log beyond
//! its last commit (`docs/on-disk.md`). Every single bit of small files is flipped in the unit tests of
//! the formats; here the real program is shown a sample.

#![allow(clippy::unwrap_used)]

use hikkoshi_testkit::daemon::Daemon;
use hikkoshi_testkit::faults::{content, make_image};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
const OLD: u8 = 1;
const NEW: u8 = 2;

/// A move in the middle, with a state whose files all matter: a snapshot, a log with commits after
/// it, and no memory of a process (as after a power cut or on another machine).
struct HalfMoved {
    dir: tempfile::TempDir,
    source: Daemon,
    files: BTreeMap<&'static str, Vec<u8>>,
    volume_id: String,
    image: Vec<u8>,
}

impl HalfMoved {
    fn new(disk: u8) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("old.img");
        make_image(&old, disk, 4 * MIB).unwrap();
        let source = Daemon::start(dir.path(), "old", &old, &[]).unwrap();
        let uri = source.uri();
        let image = dir.path().join("new.img");
        let from = ["--from", &uri, "--handoff", "now", "--no-background"];
        let here = Daemon::start(dir.path(), "new", &image, &from).unwrap();
        let mut client = here.client().unwrap();
        client.read(MIB, 1 << 20).unwrap();
        client.write(0, &content(NEW, 0, 65536)).unwrap();
        client.flush().unwrap();
        // The first end makes a snapshot, the second run a log; the kill leaves it.
        here.stop().unwrap();
        let here = Daemon::start(dir.path(), "new", &image, &from).unwrap();
        let mut client = here.client().unwrap();
        for n in 0..5 {
            let at = 2 * MIB + n * 8192;
            client.write(at, &content(NEW, at, 4096)).unwrap();
            client.flush().unwrap();
        }
        here.kill().unwrap();
        let volume = std::fs::read_to_string(dir.path().join("new.img.hikkoshi/volume")).unwrap();
        let id = volume
            .lines()
            .find_map(|line| line.strip_prefix("volume-id = "));
        let mut this = Self {
            dir,
            source,
            files: BTreeMap::new(),
            volume_id: id.unwrap().to_owned(),
            image: Vec::new(),
        };
        this.forget_memory();
        for name in ["volume", "map", "log", "witnesses"] {
            let content = std::fs::read(this.state(name)).unwrap();
            this.files.insert(name, content);
        }
        this.image = std::fs::read(this.image_path()).unwrap();
        this
    }

    fn image_path(&self) -> PathBuf {
        self.dir.path().join("new.img")
    }

    fn state(&self, name: &str) -> PathBuf {
        self.dir.path().join("new.img.hikkoshi").join(name)
    }

    /// What a boot does to the memory that outlives a kill.
    fn forget_memory(&self) {
        let memory = Path::new("/dev/shm/hikkoshi-0").join(&self.volume_id);
        let _ = std::fs::remove_file(memory);
    }

    /// Puts everything back as it was.
    fn reset(&self) {
        self.forget_memory();
        for (name, content) in &self.files {
            std::fs::write(self.state(name), content).unwrap();
        }
    }

    /// The program refuses, says `words`, and has changed neither the image nor the state.
    fn refused(&self, words: &[&str]) {
        let uri = self.source.uri();
        let from = ["--from", &uri, "--no-background"];
        let files = || -> Vec<_> {
            let read = |name: &&str| std::fs::read(self.state(name)).ok();
            self.files.keys().map(read).collect()
        };
        let before = files();
        let said = Daemon::refusal(self.dir.path(), "new", &self.image_path(), &from).unwrap();
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said}");
        }
        assert!(files() == before, "the state was changed");
        assert!(
            std::fs::read(self.image_path()).unwrap() == self.image,
            "the image was changed"
        );
    }

    /// The program starts, and everything that was flushed is there.
    fn harmless(&self) {
        let uri = self.source.uri();
        let from = ["--from", &uri, "--no-background"];
        let here = Daemon::start(self.dir.path(), "new", &self.image_path(), &from).unwrap();
        let mut client = here.client().unwrap();
        assert!(client.read(0, 65536).unwrap() == content(NEW, 0, 65536));
        for n in 0..5 {
            let at = 2 * MIB + n * 8192;
            assert!(
                client.read(at, 4096).unwrap() == content(NEW, at, 4096),
                "commit {n}"
            );
        }
        drop(client);
        here.kill().unwrap();
        std::fs::write(self.image_path(), &self.image).unwrap();
        self.reset();
    }
}

#[test]
fn deleted() {
    let moved = HalfMoved::new(OLD);
    for name in ["volume", "map", "log"] {
        std::fs::remove_file(moved.state(name)).unwrap();
        moved.refused(&[name, "missing", "restore"]);
        moved.reset();
    }
    // What only serves to recognise the source may go.
    std::fs::remove_file(moved.state("witnesses")).unwrap();
    moved.harmless();
    // All of it: the image itself knows that it is not complete.
    let (state, away) = (
        moved.dir.path().join("new.img.hikkoshi"),
        moved.dir.path().join("away"),
    );
    std::fs::rename(&state, &away).unwrap();
    let uri = moved.source.uri();
    for arguments in [&[][..], &["--from", &uri]] {
        let said =
            Daemon::refusal(moved.dir.path(), "new", &moved.image_path(), arguments).unwrap();
        assert!(said.contains("only partly here") && said.contains("state directory is gone"));
        assert!(!state.join("volume").exists(), "a new state was made");
    }
    assert!(std::fs::read(moved.image_path()).unwrap() == moved.image);
    std::fs::remove_dir_all(&state).unwrap_or_default();
    std::fs::rename(&away, &state).unwrap();
    moved.harmless();
}

#[test]
fn cut_short() {
    let moved = HalfMoved::new(OLD);
    for name in ["volume", "map", "witnesses"] {
        let content = &moved.files[name];
        for len in [0, 1, content.len() / 2, content.len() - 1] {
            std::fs::write(moved.state(name), &content[..len]).unwrap();
            moved.refused(&[name, "cannot be believed"]);
            moved.reset();
        }
    }
}

/// Commits of 4 KiB each are at the start of the log, and zeroes behind them.
#[test]
fn a_bit_is_flipped() {
    let moved = HalfMoved::new(OLD);
    for name in ["volume", "map", "witnesses"] {
        let len = moved.files[name].len();
        for n in 0..12 {
            let bit = (n * 7919 + 13) % (len * 8);
            let mut bad = moved.files[name].clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(moved.state(name), &bad).unwrap();
            moved.refused(&[name, "cannot be believed"]);
            moved.reset();
        }
    }
    let log = &moved.files["log"];
    // The first four commits are followed by sound ones: a flip in them is damage.
    for at in [0, 30, 44, 4096 + 8, 3 * 4096 + 36] {
        let mut bad = log.clone();
        bad[at] ^= 4;
        std::fs::write(moved.state("log"), &bad).unwrap();
        moved.refused(&["log", "cannot be believed"]);
        moved.reset();
    }
    // Padding behind a commit, and what is behind the last one, says nothing.
    for at in [4095, 6 * 4096, log.len() - 1] {
        let mut bad = log.clone();
        bad[at] ^= 4;
        std::fs::write(moved.state("log"), &bad).unwrap();
        moved.harmless();
    }
}

#[test]
fn of_another_volume() {
    let (ours, theirs) = (HalfMoved::new(OLD), HalfMoved::new(3));
    for name in ["map", "witnesses"] {
        std::fs::write(ours.state(name), &theirs.files[name]).unwrap();
        ours.refused(&[name, "another volume"]);
        ours.reset();
    }
    // The whole state: the image bears the id of its own.
    for (name, content) in &theirs.files {
        std::fs::write(ours.state(name), content).unwrap();
    }
    let uri = theirs.source.uri();
    let from = ["--from", &uri, "--no-background"];
    let said = Daemon::refusal(ours.dir.path(), "new", &ours.image_path(), &from).unwrap();
    assert!(said.contains("not the image that the state"), "{said}");
    assert!(std::fs::read(ours.image_path()).unwrap() == ours.image);
    ours.reset();
    ours.harmless();
}
