//! What is served: the default export, of some kind, and a read-only one beside it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use hikkoshi_daemon::config::{Engine, ExportConfig, HandoffPolicy, SourceConfig, Transport};
use hikkoshi_daemon::front::Table;
use hikkoshi_daemon::status::LifeState;
use hikkoshi_daemon::volume::{Clock, Volume, fuzzing};
use hikkoshi_engine::geometry::Geometry;
use hikkoshi_engine::journal::empty_snapshot;
use hikkoshi_engine::residency::Residency;
use hikkoshi_engine::sync::AtomicU64 as Word;
use hikkoshi_store::medium::{Directory, MemoryDirectory};
use hikkoshi_store::state::{Identity, Life, StateDir, Ties};
use hikkoshi_store::{MemoryStore, Store};
use hikkoshi_wan::{MemorySource, Source, SourceErrorKind};

use super::model::Model;

/// The block of residency.
pub const BLOCK: u64 = 4096;

/// A disk with a short last block, longer than what the front end reads in one piece.
const SMALL: u64 = 25 * BLOCK + 512;

/// One on which reads and writes are longer than the front end's buffers.
const LARGE: u64 = 160 * BLOCK + 512;

/// The other export.
pub const READ_ONLY_NAME: &str = "ro";
const READ_ONLY_BYTES: u64 = 8 * BLOCK;

/// Decisions about the source's answers that the input takes; after them it always answers.
const DECISIONS: u32 = 24;

/// How often the world may turn until a move must have come to its end. It takes some dozens.
const MOST_TURNS: u32 = 20_000;

/// What stands behind the default export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A plain image.
    Plain { large: bool },
    /// The VM runs here, and nothing is here yet.
    Arriving { extents: bool, large: bool },
    /// Before the handoff.
    Standby { by_command: bool },
}

impl Kind {
    /// The kind that a byte chooses.
    pub fn of(byte: u8) -> Self {
        match byte & 7 {
            0 | 1 => Self::Plain { large: false },
            2 => Self::Plain { large: true },
            3 => Self::Arriving {
                extents: true,
                large: false,
            },
            4 => Self::Arriving {
                extents: false,
                large: false,
            },
            5 => Self::Arriving {
                extents: true,
                large: true,
            },
            6 => Self::Standby { by_command: false },
            _ => Self::Standby { by_command: true },
        }
    }

    fn size(self) -> u64 {
        match self {
            Self::Plain { large: true } | Self::Arriving { large: true, .. } => LARGE,
            _ => SMALL,
        }
    }
}

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes: Vec<u8> = (0..LARGE).map(|n| (n / 512 % 251) as u8 | 1).collect();
    // Zeroes, aligned to blocks and not.
    bytes[4 * 4096..8 * 4096].fill(0);
    bytes[12 * 4096 + 512..15 * 4096 + 1024].fill(0);
    bytes[70 * 4096..140 * 4096].fill(0);
    bytes
});

/// A volume that no run changes.
static READ_ONLY: LazyLock<(Arc<Volume>, Arc<MemoryStore>)> = LazyLock::new(|| {
    let store = Arc::new(MemoryStore::with_content(read_only_content()));
    let geometry = Geometry::new(READ_ONLY_BYTES, BLOCK as u32).unwrap();
    let config = ExportConfig {
        read_only: true,
        ..config(READ_ONLY_NAME, None, Transport::Nbd)
    };
    let clock: Clock = Arc::new(|| Duration::ZERO);
    let volume = fuzzing::plain(&config, geometry, Arc::clone(&store) as _, clock);
    (volume, store)
});

/// What the read-only export holds.
pub fn read_only_content() -> Vec<u8> {
    PATTERN[..READ_ONLY_BYTES as usize].to_vec()
}

/// Panics if the read-only export was changed.
pub fn check_read_only() {
    assert!(
        READ_ONLY.1.content() == PATTERN[..READ_ONLY_BYTES as usize],
        "a read-only export was written to"
    );
}

fn config(name: &str, handoff: Option<HandoffPolicy>, transport: Transport) -> ExportConfig {
    ExportConfig {
        name: name.into(),
        image: PathBuf::from("memory"),
        state_dir: None,
        block_bytes: BLOCK as u32,
        read_only: false,
        engine: Engine::Auto,
        transport,
        compress: hikkoshi_daemon::config::Packing::Auto,
        source: handoff.map(|handoff| SourceConfig {
            handoff,
            ..SourceConfig::new("memory")
        }),
    }
}

/// With this bit of its luck a source cannot be asked to flush.
const CANNOT_FLUSH: u8 = 0x10;

struct Luck {
    bits: u8,
    left: u32,
    refused: bool,
}

/// The exports of one run.
pub struct Disk {
    /// As the front end wants them.
    pub table: Arc<Table>,
    kind: Kind,
    volume: Arc<Volume>,
    store: Arc<MemoryStore>,
    source: Option<Arc<MemorySource>>,
    dir: MemoryDirectory,
    now_ms: Arc<AtomicU64>,
    luck: Mutex<Luck>,
}

impl Disk {
    /// A disk of this kind; `luck` decides what its source does, and `transport` what may be spoken.
    pub fn new(kind: Kind, luck: u8, transport: Transport) -> Self {
        let now_ms = Arc::new(AtomicU64::new(0));
        let clock: Clock = {
            let now_ms = Arc::clone(&now_ms);
            Arc::new(move || Duration::from_millis(now_ms.load(Ordering::Relaxed)))
        };
        let dir = MemoryDirectory::default();
        let size = kind.size();
        let content = &PATTERN[..size as usize];
        let geometry = Geometry::new(size, BLOCK as u32).unwrap();
        let (volume, store, source) = match kind {
            Kind::Plain { .. } => {
                let store = Arc::new(MemoryStore::with_content(content.to_vec()));
                let config = config("", None, transport);
                let volume = fuzzing::plain(&config, geometry, Arc::clone(&store) as _, clock);
                (volume, store, None)
            }
            Kind::Arriving { extents, .. } => {
                let source = MemorySource::new(content.to_vec(), extents.then_some(4096));
                source.set_can_flush(luck & CANNOT_FLUSH == 0);
                let config = config("", Some(HandoffPolicy::Now), transport);
                let (volume, store) = moving(&config, geometry, &source, &dir, clock);
                (volume, store, Some(source))
            }
            Kind::Standby { by_command } => {
                let source = MemorySource::new(content.to_vec(), Some(4096));
                source.set_can_flush(luck & CANNOT_FLUSH == 0);
                let policy = if by_command {
                    HandoffPolicy::Command
                } else {
                    HandoffPolicy::FirstWrite
                };
                let config = config("", Some(policy), transport);
                let (volume, store) = moving(&config, geometry, &source, &dir, clock);
                (volume, store, Some(source))
            }
        };
        Self {
            table: Arc::new(Table::of([Arc::clone(&volume), Arc::clone(&READ_ONLY.0)])),
            kind,
            volume,
            store,
            source,
            dir,
            now_ms,
            luck: Mutex::new(Luck {
                bits: luck,
                left: DECISIONS,
                refused: false,
            }),
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.kind.size()
    }

    /// What the disk held at the beginning, here or at its source.
    pub fn content(&self) -> Vec<u8> {
        PATTERN[..self.size() as usize].to_vec()
    }

    /// Whether it came from a source.
    pub fn is_moving(&self) -> bool {
        self.source.is_some()
    }

    /// Whether writes are refused until a command comes, which never does.
    pub fn wants_command(&self) -> bool {
        self.kind == Kind::Standby { by_command: true }
    }

    /// Whether the source refused anything.
    pub fn has_refused(&self) -> bool {
        self.luck.lock().unwrap().refused
    }

    /// What the source and the volume's own threads would do meanwhile. Called by one thread.
    pub fn turn(&self) {
        let Some(source) = &self.source else {
            return fuzzing::attend(&self.volume);
        };
        self.now_ms.fetch_add(5, Ordering::Relaxed);
        let mut luck = self.luck.lock().unwrap();
        while source.pending() > 0 {
            if luck.left == 0 {
                source.complete(0);
                continue;
            }
            luck.left -= 1;
            luck.bits = luck.bits.rotate_left(3);
            match luck.bits & 7 {
                0..4 => source.complete(0),
                4 | 5 => source.complete(source.pending() - 1),
                6 => {
                    luck.refused = true;
                    source.fail(0, SourceErrorKind::Refused);
                }
                _ => source.set_connected(false),
            }
        }
        source.set_connected(true);
        fuzzing::attend(&self.volume);
    }

    /// Lets the move come to its end, and holds the image and the durable state against `model`.
    /// `last_change` and `last_flush` are numbers of requests from 1 on, 0 for none.
    pub fn check(&self, model: &Model, last_change: usize, last_flush: usize) {
        let Some(source) = &self.source else {
            model.check(&self.store.content());
            if last_flush > last_change {
                assert_eq!(
                    self.store.unsynced_writes(),
                    0,
                    "a flush left writes behind"
                );
            }
            return;
        };
        if self.volume.life() == LifeState::Standby {
            assert!(
                self.store.content().iter().all(|byte| *byte == 0),
                "something was kept before the handoff"
            );
            model.check(&self.content());
            fuzzing::retire(&self.volume);
            return;
        }
        self.luck.lock().unwrap().left = 0;
        if self.volume.has_departed() {
            // It was handed on: what the new site needs that asks for, and nothing else is copied.
            fuzzing::retire(&self.volume);
            return;
        }
        let mut turns = 0;
        while !self.volume.is_local() {
            turns += 1;
            assert!(turns < MOST_TURNS, "the move never comes to its end");
            // Ranges that the source refused are left alone for a while.
            self.now_ms.fetch_add(100, Ordering::Relaxed);
            self.turn();
        }
        // What was asked before the last block was here may still wait: guests have written what it asked for.
        self.turn();
        assert_eq!(source.pending(), 0, "a complete volume asks its source");
        assert!(!fuzzing::is_poisoned(&self.volume));
        model.check(&self.store.content());
        drop(fuzzing::take_state(&self.volume));
        let state = StateDir::open_in(Box::new(self.dir.kill()), None).unwrap();
        assert_eq!(
            state.identity().life,
            Life::Local,
            "completion was not recorded"
        );
    }
}

fn moving(
    config: &ExportConfig,
    geometry: Geometry,
    source: &Arc<MemorySource>,
    dir: &MemoryDirectory,
    clock: Clock,
) -> (Arc<Volume>, Arc<MemoryStore>) {
    let handoff = config.source.as_ref().map(|source| source.handoff);
    let identity = Identity {
        volume_id: [1; 16],
        geometry,
        generation: 0,
        life: if handoff == Some(HandoffPolicy::Now) {
            Life::Arriving
        } else {
            Life::Standby
        },
        source_uri: "memory".into(),
        incarnation: [2; 16],
        image_inode: None,
        ties: Ties {
            source_flush_owed: handoff == Some(HandoffPolicy::Now) && source.info().can_flush,
            ..Ties::default()
        },
    };
    // Not by `create_in`: that writes 4 MiB of zeroes, which a run has no time for.
    dir.replace("log", &[0; 4096]).unwrap();
    dir.replace("map", &empty_snapshot(identity.volume_id, 0, geometry))
        .unwrap();
    dir.replace("volume", &identity.encode()).unwrap();
    let state = StateDir::open_in(Box::new(dir.clone()), None).unwrap();
    let words: Vec<Word> = (0..Residency::required_words(geometry))
        .map(|_| Word::new(0))
        .collect();
    let residency = Residency::new(geometry, Box::new(words));
    let store = Arc::new(MemoryStore::new(geometry.size_bytes()));
    let image: Arc<dyn Store> = Arc::clone(&store) as _;
    let source: Arc<dyn Source> = Arc::clone(source) as _;
    let volume = fuzzing::moving(config, image, state, residency, source, clock);
    (volume, store)
}
