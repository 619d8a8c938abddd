//! The durable state from bytes: `volume`, `map` and `log` from a directory in memory, and the
//! planes that a killed process left.
//!
//! The first byte chooses one of four ways in. What must hold:
//! - whatever the files say, nothing panics, and memory is bounded by their size and the disk's;
//! - what opens says the same again when it is written out and read back;
//! - a valid state of which one place was changed does not open, or opens as it was, or, if the
//!   place is in the last commits of the log, without these;
//! - planes of any content are brought into order, and are in order from then on.

use hikkoshi_engine::geometry::{BlockIndex, BlockRange, Geometry};
use hikkoshi_engine::journal::{
    FRAME_ALIGN, Record, VolumeId, apply_snapshot, encode_frame, encode_snapshot,
};
use hikkoshi_engine::residency::{BlockState, Residency, SectorMask};
use hikkoshi_engine::sync::AtomicU64;
use hikkoshi_store::medium::{Directory, MemoryDirectory};
use hikkoshi_store::state::{Identity, Life, StateDir, StateError, Ties};

use crate::input::Input;
use crate::memory;

/// Disks of more blocks are not loaded: their planes alone would take all of a run's time.
const MOST_BLOCKS: u64 = 1 << 16;

/// The planes and the table of partial blocks (6 MiB at the most), twice for comparing.
const MEMORY_BOUND: usize = 24 << 20;

const VOLUME: &str = "volume";
const MAP: &str = "map";
const LOG: &str = "log";

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.byte();
    let bound = MEMORY_BOUND + 64 * data.len();
    memory::within(bound, "a state", || match how % 4 {
        0 => files(&mut input),
        1 => mutated(&mut input),
        2 => planes(&mut input),
        _ => identity(input.rest()),
    });
}

fn fresh(geometry: Geometry) -> Residency {
    let words: Vec<AtomicU64> = (0..Residency::required_words(geometry))
        .map(|_| AtomicU64::new(0))
        .collect();
    Residency::new(geometry, Box::new(words))
}

fn open(dir: &MemoryDirectory) -> Result<(StateDir, Option<Residency>), StateError> {
    let state = StateDir::open_in(Box::new(dir.clone()), None)?;
    if state.identity().life == Life::Local || state.identity().geometry.blocks() > MOST_BLOCKS {
        return Ok((state, None));
    }
    let residency = fresh(state.identity().geometry);
    state.load(&residency)?;
    Ok((state, Some(residency)))
}

/// Everything that a residency says.
fn told(residency: &Residency) -> Vec<u8> {
    encode_snapshot([0; 16], 0, residency)
}

fn assert_in_order(residency: &Residency) {
    let (mut resident, mut owned) = (0, 0);
    for block in (0..residency.geometry().blocks()).map(BlockIndex) {
        match residency.state(block) {
            BlockState::Absent => {}
            BlockState::Partial => {
                let mask = residency
                    .partial_mask(block)
                    .expect("a partial block has sectors");
                assert!(!mask.is_empty(), "a partial block without sectors");
            }
            BlockState::Clean => resident += 1,
            BlockState::Owned => {
                resident += 1;
                owned += 1;
            }
        }
    }
    assert_eq!(
        residency.resident_blocks(),
        resident,
        "resident blocks are miscounted"
    );
    assert_eq!(
        residency.owned_blocks(),
        owned,
        "owned blocks are miscounted"
    );
    for (block, _) in residency.partials() {
        assert_eq!(
            residency.state(block),
            BlockState::Partial,
            "a stray partial block"
        );
    }
}

// Files that say anything

/// Three files, with checksums made right if the input says so.
fn files(input: &mut Input<'_>) {
    let seal = input.byte();
    let dir = MemoryDirectory::default();
    let (volume_len, map_len) = (input.u16(), input.u16());
    let mut volume = input.take(volume_len.into()).to_vec();
    let mut map = input.take(map_len.into()).to_vec();
    if seal & 1 == 1 {
        volume = sealed_text(&volume);
    }
    if seal & 2 == 2 {
        let crc = crc32c::crc32c(&map);
        map.extend_from_slice(&crc.to_le_bytes());
    }
    let log = log_of(input, seal & 4 == 4);
    put(&dir, [&volume, &map, &log]);
    let Ok((mut state, residency)) = open(&dir) else {
        return;
    };
    let found = state.identity().clone();
    assert_eq!(
        dir.read(VOLUME).unwrap().unwrap(),
        found.encode(),
        "an identity that nobody wrote was believed"
    );
    let Some(residency) = residency else { return };
    assert_in_order(&residency);
    let again = fresh(found.geometry);
    let id = found.volume_id;
    apply_snapshot(&encode_snapshot(id, 7, &residency), id, &again).expect("our own snapshot");
    assert_eq!(
        told(&again),
        told(&residency),
        "a snapshot says something else"
    );
    // What a handoff does, and a restart: a new epoch, from which the next one starts.
    let settled = state
        .record_arriving(0)
        .and_then(|()| state.checkpoint(&residency, &mut || Ok(())));
    match settled {
        Ok(()) => {}
        // The largest generation or epoch, after which there is none.
        Err(StateError::Identity { .. } | StateError::Journal { .. }) => return,
        Err(other) => panic!("{other}"),
    }
    let (_, reopened) = open(&dir).expect("our own checkpoint");
    assert_eq!(
        told(&reopened.unwrap()),
        told(&residency),
        "a checkpoint says something else"
    );
}

/// Commits, each header and payload as the input says, padded to pages.
fn log_of(input: &mut Input<'_>, seal: bool) -> Vec<u8> {
    let mut log = Vec::new();
    while !input.is_empty() && log.len() < 64 * FRAME_ALIGN {
        let len = usize::from(input.u16()) % 512;
        let start = log.len();
        let frame = input.take(len);
        log.extend_from_slice(frame);
        if seal && frame.len() >= 48 {
            let payload = (frame.len() - 48) as u32;
            log[start + 40..start + 44].copy_from_slice(&payload.to_le_bytes());
            log[start + 44..start + 48].fill(0);
            let crc = crc32c::crc32c(&log[start..]);
            log[start + 44..start + 48].copy_from_slice(&crc.to_le_bytes());
        }
        log.resize(log.len().next_multiple_of(FRAME_ALIGN), 0);
    }
    log
}

fn put(dir: &MemoryDirectory, files: [&[u8]; 3]) {
    for (name, content) in [VOLUME, MAP, LOG].into_iter().zip(files) {
        dir.replace(name, content).unwrap();
    }
}

/// The text with the line that seals it.
fn sealed_text(text: &[u8]) -> Vec<u8> {
    let mut sealed = text.to_vec();
    let crc = crc32c::crc32c(&sealed);
    sealed.extend_from_slice(format!("crc32c = {crc:08x}\n").as_bytes());
    sealed
}

/// An identity alone.
fn identity(text: &[u8]) {
    for content in [text.to_vec(), sealed_text(text)] {
        if let Ok(identity) = Identity::decode(&content) {
            assert_eq!(
                identity.encode(),
                content,
                "it would not have been written like this"
            );
        }
    }
}

// A valid state with one change

fn geometry(input: &mut Input<'_>) -> Geometry {
    let block = 512_u32 << (input.byte() % 8);
    let blocks = match input.byte() {
        n @ 0..224 => u64::from(n) + 1,
        // More than a page of the snapshot.
        n => 4000 + u64::from(n),
    };
    let short = u64::from(input.byte()) % (u64::from(block) / 512) * 512;
    Geometry::new(blocks * u64::from(block) - short, block).unwrap()
}

/// Records as they come from a volume: copies only of what is absent, sectors only of what is not
/// here.
fn records(input: &mut Input<'_>, now: &Residency) -> Vec<Record> {
    let g = now.geometry();
    let mut out = Vec::new();
    for _ in 0..input.below(8) {
        let kind = input.byte();
        let start = u64::from(input.u16()) % g.blocks();
        let end = (start + 1 + u64::from(input.byte())).min(g.blocks());
        let range = BlockRange::new(start, end);
        let record = match kind % 3 {
            0 if now
                .runs(range)
                .all(|(_, state)| state == BlockState::Absent) =>
            {
                Record::Clean(range)
            }
            1 if !now.state(BlockIndex(start)).is_resident() && g.sectors_per_block() > 1 => {
                let mut mask = now
                    .partial_mask(BlockIndex(start))
                    .unwrap_or_else(|| SectorMask::empty(g.sectors_per_block()));
                let first = u32::from(kind) % g.sectors_in(BlockIndex(start)).max(1);
                mask.add(first..first + 1);
                let block = BlockIndex(start);
                if mask.is_full(g.sectors_in(block)) {
                    Record::Owned(BlockRange::one(block))
                } else {
                    Record::Partial { block, mask }
                }
            }
            0 | 1 => continue,
            _ => Record::Owned(range),
        };
        record.apply(now).unwrap();
        out.push(record);
    }
    out
}

/// A state, and what is known of it.
struct Valid {
    dir: MemoryDirectory,
    identity: Identity,
    /// Where each commit of the log ends.
    frame_ends: Vec<usize>,
    /// What is here after the snapshot, and after each commit.
    after: Vec<Vec<u8>>,
}

fn valid(input: &mut Input<'_>) -> Valid {
    let geometry = geometry(input);
    let how = input.byte();
    let volume_id: VolumeId = [how; 16];
    let epoch = u64::from(how >> 4);
    let identity = Identity {
        volume_id,
        geometry,
        generation: u64::from(how),
        life: [Life::Arriving, Life::Standby][usize::from(how & 1)],
        source_uri: ["nbd://old/", "nbd://old/a%b\nc"][usize::from(how >> 1 & 1)].into(),
        incarnation: [how ^ 0xff; 16],
        image_inode: (how & 4 == 4).then_some(u64::from(how) << 40),
        ties: Ties::default(),
    };
    let now = fresh(geometry);
    for _ in 0..input.below(4) {
        records(input, &now);
    }
    let map = encode_snapshot(volume_id, epoch, &now);
    let (mut log, mut frame_ends, mut after) = (Vec::new(), Vec::new(), vec![told(&now)]);
    for seq in 0..input.below(6) as u64 {
        let records = records(input, &now);
        log.extend_from_slice(&encode_frame(volume_id, epoch, seq, &records));
        frame_ends.push(log.len());
        after.push(told(&now));
    }
    // Behind them zeroes, and maybe commits of an epoch before.
    log.resize(log.len() + FRAME_ALIGN, 0);
    if epoch > 0 && how & 8 == 8 {
        let all = [Record::Owned(geometry.all())];
        for seq in 0..3 {
            log.extend_from_slice(&encode_frame(volume_id, epoch - 1, seq, &all));
        }
    }
    let dir = MemoryDirectory::default();
    put(&dir, [&identity.encode(), &map, &log]);
    Valid {
        dir,
        identity,
        frame_ends,
        after,
    }
}

fn mutated(input: &mut Input<'_>) {
    let valid = valid(input);
    let whole = valid.after.last().unwrap();
    let (_, residency) = open(&valid.dir).expect("a valid state opens");
    let residency = residency.unwrap();
    assert_in_order(&residency);
    assert!(
        told(&residency) == *whole,
        "a valid state says something else"
    );

    let name = [VOLUME, MAP, LOG][input.below(3)];
    let before = valid.dir.read(name).unwrap().unwrap();
    let (content, touched) = mutate(input, before.clone());
    if content == before {
        return;
    }
    valid.dir.replace(name, &content).unwrap();
    let Ok((state, found)) = open(&valid.dir) else {
        return;
    };
    assert_eq!(
        *state.identity(),
        valid.identity,
        "a changed identity was believed"
    );
    let found = told(&found.unwrap());
    if found == *whole {
        return;
    }
    assert_eq!(name, LOG, "a changed snapshot was believed");
    // The commits from the first that was touched on may be gone, if none after them is sound.
    let first = valid.frame_ends.partition_point(|end| *end <= touched.0);
    let after_touched = valid
        .frame_ends
        .iter()
        .any(|end| *end > touched.1.next_multiple_of(FRAME_ALIGN));
    assert!(
        !after_touched,
        "a commit in the middle was lost, and nobody was told"
    );
    assert!(
        valid.after[first.min(valid.after.len() - 1)..].contains(&found),
        "a changed log says something else"
    );
}

/// The content with one place changed, and that place. A shorter file is changed up to its end.
fn mutate(input: &mut Input<'_>, mut content: Vec<u8>) -> (Vec<u8>, (usize, usize)) {
    let kind = input.byte();
    let at = input.u32() as usize % content.len().max(1);
    let value = input.byte();
    let sector = at / 512 * 512..content.len().min(at / 512 * 512 + 512);
    match kind % 6 {
        0 => content[at] ^= 1 << (value % 8),
        1 => content[at] = value,
        2 => {
            let end = content.len();
            content.truncate(at);
            return (content, (at, end));
        }
        3 => {
            let end = content.len();
            content.extend(std::iter::repeat_n(value, 1 + at % 600));
            return (content, (end, end));
        }
        // A sector that was not written, and one that holds what was meant for another place.
        4 => {
            content[sector.clone()].fill(0);
            return (content, (sector.start, sector.end));
        }
        _ => {
            let from = usize::from(value) * 512 % content.len().max(1) / 512 * 512;
            let len = sector.len().min(content.len() - from);
            content.copy_within(from..from + len, sector.start);
            return (content, (sector.start, sector.end));
        }
    }
    (content, (at, at + 1))
}

// Planes of any content

fn planes(input: &mut Input<'_>) {
    let geometry = geometry(input);
    let words: Vec<AtomicU64> = (0..Residency::required_words(geometry))
        .map(|_| AtomicU64::new(if input.is_empty() { 0 } else { input.u64() }))
        .collect();
    let residency = Residency::recover(geometry, Box::new(words));
    assert_in_order(&residency);
    // As a volume goes on with it.
    let id = [1; 16];
    let again = fresh(geometry);
    apply_snapshot(&encode_snapshot(id, 0, &residency), id, &again).expect("our own snapshot");
    for block in (0..geometry.blocks()).map(BlockIndex) {
        assert_eq!(
            again.state(block),
            residency.state(block),
            "{block:?} after a snapshot"
        );
        // A mask may have bits beyond the sectors of its block, which mean nothing.
        let sectors = |r: &Residency| {
            r.partial_mask(block).map(|mask| {
                let valid = |sector: &u32| mask.has(*sector);
                (0..geometry.sectors_in(block))
                    .filter(valid)
                    .collect::<Vec<_>>()
            })
        };
        assert_eq!(
            sectors(&again),
            sectors(&residency),
            "{block:?} after a snapshot"
        );
    }
    residency.mark_owned(geometry.all());
    assert_in_order(&residency);
    assert_eq!(residency.missing_blocks(), 0);
}
