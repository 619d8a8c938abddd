//! What a seed decides before anything happens: the disk, the policy, the clients, and which kinds
//! of trouble this world has. Each kind is left out of many worlds, so that it can't hide others.

use std::time::Duration;

use hikkoshi_daemon::config::{
    Engine, ExportConfig, HandoffPolicy, SourceConfig, SourceLoss, Transport,
};
use hikkoshi_engine::geometry::Geometry;

use crate::rng::Rng;

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// Kinds of trouble, in so many of a thousand events; 0 is never.
#[derive(Clone, Copy, Debug)]
pub struct Trouble {
    /// The process is killed.
    pub kill: u64,
    /// The machine loses its power.
    pub power_cut: u64,
    /// So many of a thousand steps in which a file of the state takes another's place are the last
    /// of the process, or of the boot.
    pub crash_in_replace: u64,
    /// The daemon is stopped in good order.
    pub close: u64,
    /// So many of a thousand writes to a medium fail.
    pub write_error: u64,
    /// So many of a thousand reads of the image fail.
    pub read_error: u64,
    /// So many of a thousand syncs fail.
    pub sync_error: u64,
    /// The medium is full for a while.
    pub full: u64,
    /// Part of the image cannot be written for a while.
    pub bad_range: u64,
    /// So many of a thousand quick reads would have to wait.
    pub would_block: u64,
    /// The longest that an operation on a medium takes, in microseconds.
    pub slow_us: u64,
    /// The connection to the source is reset.
    pub reset: u64,
    /// The source refuses a request.
    pub refuse: u64,
    /// The source sends what it must not.
    pub corrupt: u64,
    /// The source falls silent for a while.
    pub stall: u64,
    /// Somebody pauses, resumes and caps the background copy.
    pub control: u64,
    /// The source comes back at another size for a while.
    pub resize: u64,
    /// The source comes back older than it was, for a while: see [`crate::Options`].
    pub older: u64,
    /// Threads lose the processor even between two marks of the residency.
    pub torn_marks: u64,
}

/// A world before it begins.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The disk.
    pub geometry: Geometry,
    /// What the daemon is told.
    pub config: ExportConfig,
    /// Clients.
    pub clients: usize,
    /// Requests of a client that are under way at once.
    pub depth: usize,
    /// Half of all requests are made to so many sectors.
    pub hot: u64,
    /// The longest request of a client, in sectors.
    pub longest: u64,
    /// The grain at which the source tells zeroes; `None`: it does not.
    pub extents: Option<u32>,
    /// The source answers in chunks.
    pub structured: bool,
    /// The source can be asked to flush.
    pub can_flush: bool,
    /// The smallest request that the source serves.
    pub min_block: u32,
    /// The longest read that the source serves.
    pub max_read: u32,
    /// A log of so many bytes is due for a snapshot.
    pub log_limit: u64,
    /// Steps before trouble ends.
    pub steps: u64,
    /// What goes wrong.
    pub trouble: Trouble,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(rng: &mut Rng) -> Self {
        let (block, blocks) = match rng.below(10) {
            0 | 1 => (512, rng.within(40, 400)),
            2 => (1024, rng.within(20, 200)),
            3..=6 => (4096, rng.within(8, 70)),
            7 => (16_384, rng.within(4, 24)),
            _ => (65_536, rng.within(2, 10)),
        };
        let sectors = u64::from(block) / SECTOR as u64;
        let size = (blocks * sectors - rng.below(sectors)) * SECTOR as u64;
        let geometry = Geometry::new(size, block).expect("a power of two and whole sectors");
        let handoff = rng.pick(&[
            HandoffPolicy::Now,
            HandoffPolicy::Now,
            HandoffPolicy::FirstWrite,
            HandoffPolicy::Command,
        ]);
        let on_loss = if rng.permille(300) {
            SourceLoss::Error(Duration::from_millis(rng.within(20, 2000)))
        } else {
            SourceLoss::Wait
        };
        let config = ExportConfig {
            name: String::new(),
            image: "simulated".into(),
            state_dir: None,
            block_bytes: block,
            read_only: false,
            engine: Engine::Auto,
            transport: Transport::Auto,
            compress: hikkoshi_daemon::config::Packing::Auto,
            source: Some(SourceConfig {
                handoff,
                background: rng.permille(700),
                max_rate: rng.permille(300).then(|| rng.within(20, 2000) << 10),
                on_loss,
                ..SourceConfig::new("simulated")
            }),
        };
        let structured = rng.permille(750);
        let extents = if structured {
            rng.pick(&[None, Some(512), Some(4096), Some(65_536)])
        } else {
            None
        };
        let can_flush = rng.permille(800);
        Self {
            geometry,
            config,
            can_flush,
            clients: rng.index(4) + 1,
            depth: rng.index(6) + 1,
            hot: rng.pick(&[
                (blocks * sectors / 8).max(1),
                (blocks * sectors / 8).max(1),
                (2 * sectors).max(8),
            ]),
            longest: rng.pick(&[3, 8, 40, 200]),
            extents,
            structured,
            min_block: rng.pick(&[1, 1, 512, 4096]),
            max_read: rng.pick(&[8192, 65_536, 32 << 20]),
            log_limit: rng.pick(&[4096, 4096, 16_384, 4 << 20]),
            steps: rng.pick(&[300, 1000, 3000]),
            trouble: Trouble::new(rng),
        }
    }
}

impl Trouble {
    /// No trouble at all.
    pub const NONE: Self = Self {
        kill: 0,
        power_cut: 0,
        crash_in_replace: 0,
        close: 0,
        write_error: 0,
        read_error: 0,
        sync_error: 0,
        full: 0,
        bad_range: 0,
        would_block: 0,
        slow_us: 0,
        reset: 0,
        refuse: 0,
        corrupt: 0,
        stall: 0,
        control: 0,
        resize: 0,
        older: 0,
        torn_marks: 0,
    };

    fn new(rng: &mut Rng) -> Self {
        let mut maybe = |chance: u64, low: u64, high: u64| {
            let amount = rng.within(low, high);
            if rng.permille(chance) { amount } else { 0 }
        };
        Self {
            kill: maybe(700, 1, 12),
            power_cut: maybe(800, 1, 16),
            crash_in_replace: maybe(300, 10, 120),
            close: maybe(400, 1, 8),
            write_error: maybe(200, 1, 40),
            read_error: maybe(150, 1, 40),
            sync_error: maybe(200, 5, 60),
            full: maybe(150, 1, 6),
            bad_range: maybe(150, 1, 6),
            would_block: maybe(300, 10, 500),
            slow_us: maybe(400, 100, 30_000),
            reset: maybe(500, 1, 25),
            refuse: maybe(250, 5, 60),
            corrupt: maybe(300, 5, 60),
            stall: maybe(300, 1, 12),
            control: maybe(300, 2, 12),
            resize: maybe(150, 1, 5),
            older: 0,
            torn_marks: maybe(250, 1, 1),
        }
    }
}
