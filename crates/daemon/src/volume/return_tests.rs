//! A return before all is at the other site: random histories of both sites, with kills, power cuts,
//! messages that are lost, and states that cannot be written.
//!
//! A has the old copy; B, which took the disk over, still fetches from it; the disk goes back to A, is
//! given up on the way, and tried again. At all times: at most one of the two takes writes; whoever
//! may write has every byte, in its image or where it may fetch it; and before the handoff back the
//! old copy is what it was.

#![allow(
    clippy::cast_possible_truncation,
    reason = "a disk of a few hundred KiB"
)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hikkoshi_engine::blocks::BlockSet;
use hikkoshi_engine::geometry::{BlockIndex, BlockRange, ByteRange, Geometry};
use hikkoshi_engine::residency::Residency;
use hikkoshi_store::medium::MemoryDirectory;
use hikkoshi_store::state::{Departure, Identity, Life, StateDir, Ties};
use hikkoshi_store::{MemoryStore, Store, ZeroMode};
use hikkoshi_wan::transport::session::{MoveId, Stance, Tell, Told};
use hikkoshi_wan::{
    Completion, ExtentsAnswer, Fetched, Lane, MoveLink, Source, SourceError, SourceErrorKind,
    SourceExtent, SourceInfo, SourceWatcher, Ticket,
};

use super::arrival::Arrival;
use super::assemble::{Moving, Parts};
use super::departure::{Bound, REST_FEW};
use super::guest::ReadNow;
use super::relocation::ReadEnd;
use super::tests::{DISK, Oracle, SharedWords, original, words};
use super::ties::settle_lacking;
use super::{Clock, Volume, lock, wayback};
use crate::config::{Engine, ExportConfig, HandoffPolicy, SourceConfig, SourceLoss, Transport};
use crate::status::LifeState;

const SECTOR: usize = 512;
const B: MoveId = [0xb; 16];

struct Chance(u64);

impl Chance {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A site as the other one sees it; `None` while it is down.
#[derive(Default)]
struct Peer(Mutex<Option<Arc<Volume>>>);

impl Peer {
    fn get(&self) -> Option<Arc<Volume>> {
        lock(&self.0).clone()
    }
}

fn gone() -> SourceError {
    SourceError::new(SourceErrorKind::Disconnected, "the connection is gone")
}

/// An answer that is on its way.
type Answer = Box<dyn FnOnce(bool) + Send>;

struct Asked {
    offset: u64,
    len: u32,
    /// The other site must have it.
    is_there: bool,
    done: Completion<Fetched>,
}

/// The other site as a source, over one connection. Nothing moves but in [`Wire::pump`].
struct Wire {
    peer: Arc<Peer>,
    ticket: Arc<Ticket>,
    /// It is A's, which after the handoff asks for nothing that B does not have.
    gets_it_whole: bool,
    size_bytes: u64,
    bound: Mutex<Bound>,
    up: AtomicBool,
    asked: Mutex<Vec<Asked>>,
    extents: Mutex<Vec<(u64, u64, Completion<ExtentsAnswer>)>>,
    /// Called with whether the connection still stood.
    answers: Arc<Mutex<Vec<Answer>>>,
    watcher: Mutex<Option<Arc<dyn SourceWatcher>>>,
}

impl Wire {
    fn new(
        peer: &Arc<Peer>,
        ticket: &Arc<Ticket>,
        gets_it_whole: bool,
        size_bytes: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            gets_it_whole,
            size_bytes,
            peer: Arc::clone(peer),
            ticket: Arc::clone(ticket),
            bound: Mutex::default(),
            up: AtomicBool::new(false),
            asked: Mutex::default(),
            extents: Mutex::default(),
            answers: Arc::default(),
            watcher: Mutex::default(),
        })
    }

    fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    fn tell(&self, error: &SourceError) {
        let watcher = lock(&self.watcher).clone();
        if let Some(watcher) = watcher {
            watcher.source_down(error);
        }
    }

    /// Everything that is on its way is lost.
    fn cut(&self) {
        let was_up = self.up.swap(false, Ordering::AcqRel);
        let asked = std::mem::take(&mut *lock(&self.asked));
        let extents = std::mem::take(&mut *lock(&self.extents));
        let answers = std::mem::take(&mut *lock(&self.answers));
        asked.into_iter().for_each(|job| (job.done)(Err(gone())));
        extents.into_iter().for_each(|(.., done)| done(Err(gone())));
        answers.into_iter().for_each(|answer| answer(false));
        if was_up {
            self.tell(&gone());
        }
    }

    fn connect(&self) {
        let Some(volume) = self.peer.get() else {
            return;
        };
        let mut bound = Bound::default();
        match volume.answer(self.ticket.tell(), &mut bound) {
            Told::Attached(attached) => {
                self.ticket.was_told(attached);
                *lock(&self.bound) = bound;
                self.up.store(true, Ordering::Release);
                let watcher = lock(&self.watcher).clone();
                if let Some(watcher) = watcher {
                    watcher.source_up();
                }
            }
            Told::Refused(why) => self.tell(&SourceError::new(SourceErrorKind::Untrusted, why)),
            told => panic!("an answer to something else: {told:?}"),
        }
    }

    /// Lets something happen, if there is anything.
    fn pump(&self, chance: &mut Chance) {
        if !self.is_up() {
            self.cut();
            return self.connect();
        }
        let Some(volume) = self.peer.get() else {
            return self.cut();
        };
        let bound = *lock(&self.bound);
        let answer = {
            let mut answers = lock(&self.answers);
            let count = answers.len() as u64;
            (count > 0 && chance.one_in(2))
                .then(|| answers.swap_remove(chance.below(count) as usize))
        };
        if let Some(answer) = answer {
            // Looked at after reading and before sending, as the front end does.
            let stands = volume.still_serves(&bound);
            answer(stands);
            if !stands {
                self.cut();
            }
            return;
        }
        let extents = lock(&self.extents).pop();
        if let Some((offset, len, done)) = extents {
            // All of it may be data.
            let extents = vec![SourceExtent {
                offset,
                len,
                zero: false,
            }];
            return done(Ok(ExtentsAnswer {
                extents,
                wire_bytes: 0,
            }));
        }
        let job = {
            let mut asked = lock(&self.asked);
            let count = asked.len() as u64;
            (count > 0).then(|| asked.swap_remove(chance.below(count) as usize))
        };
        if let Some(job) = job {
            self.serve(&volume, &bound, job);
        }
    }

    fn serve(&self, volume: &Arc<Volume>, bound: &Bound, job: Asked) {
        let Asked {
            offset,
            len,
            is_there,
            done,
        } = job;
        let relocation = match volume.reads_old_copy(bound) {
            true => None,
            false => volume.relocation(),
        };
        let answers = Arc::clone(&self.answers);
        let leave = move |read: Result<Vec<u8>, ()>| {
            let answer: Answer = Box::new(move |stands| {
                done(match read {
                    Ok(data) if stands => Ok(Fetched {
                        offset,
                        wire_bytes: data.len() as u64,
                        data,
                        holes: Vec::new(),
                    }),
                    Err(()) if stands => Err(SourceError::new(SourceErrorKind::Refused, "no")),
                    _ => Err(gone()),
                });
            });
            lock(&answers).push(answer);
        };
        let mut data = vec![0; len as usize];
        match volume.read_now(relocation.as_ref(), offset, &mut data) {
            Ok(ReadNow::Done) => leave(Ok(data)),
            Ok(ReadNow::Missing) => {
                assert!(!is_there, "B is asked for {offset}, which it does not have");
                let store = Arc::clone(volume.store());
                let done = move |end: ReadEnd<'_>| {
                    leave(match end {
                        ReadEnd::Bytes(bytes) => Ok(bytes.into_owned()),
                        ReadEnd::Failed(_) => Err(()),
                        ReadEnd::Resident => {
                            store.read(offset, &mut data).map(|()| data).map_err(drop)
                        }
                    });
                };
                let bytes = ByteRange::at(offset, len.into());
                relocation.unwrap().read(bytes, Box::new(done));
            }
            _ => leave(Err(())),
        }
    }
}

impl Source for Wire {
    fn info(&self) -> SourceInfo {
        SourceInfo {
            size_bytes: self.size_bytes,
            read_only: false,
            can_multi_conn: false,
            has_extents: true,
            can_flush: true,
            min_block_bytes: 1,
            max_read_bytes: 1 << 20,
            uri: "wire".into(),
        }
    }

    fn is_connected(&self) -> bool {
        self.is_up()
    }

    fn connections(&self) -> usize {
        usize::from(self.is_up())
    }

    fn read(&self, _: Lane, offset: u64, len: u32, done: Completion<Fetched>) {
        let stands = self.ticket.tell();
        let is_there = self.gets_it_whole
            && matches!(stands, Tell::Attach { stance, .. } if stance == Stance::Arriving);
        lock(&self.asked).push(Asked {
            offset,
            len,
            is_there,
            done,
        });
    }

    fn extents(&self, _: Lane, offset: u64, len: u64, done: Completion<ExtentsAnswer>) {
        lock(&self.extents).push((offset, len, done));
    }

    fn flush(&self, done: Completion<()>) {
        let volume = self.peer.get().filter(|_| self.is_up());
        let refused = |e: std::io::Error| SourceError::new(SourceErrorKind::Refused, e.to_string());
        done(match volume {
            Some(volume) => volume.commit().map_err(refused),
            None => Err(gone()),
        });
    }

    fn watch(&self, watcher: Arc<dyn SourceWatcher>) {
        *lock(&self.watcher) = Some(watcher);
    }

    fn close(&self) {
        lock(&self.watcher).take();
    }
}

/// Where A tells B of the return. Loses questions and answers.
struct Line {
    peer: Arc<Peer>,
    ticket: Arc<Ticket>,
    chance: Mutex<Chance>,
    loses: AtomicBool,
}

impl Line {
    fn loses(&self) -> bool {
        self.loses.load(Ordering::Relaxed) && lock(&self.chance).one_in(5)
    }
}

impl MoveLink for Line {
    fn tell(&self, tell: &Tell, _: Duration) -> Result<Told, SourceError> {
        let volume = self.peer.get().ok_or_else(gone)?;
        let mut bound = Bound::default();
        let refused = |why: String| SourceError::new(SourceErrorKind::Refused, why);
        if let Told::Refused(why) = volume.answer(self.ticket.tell(), &mut bound) {
            return Err(refused(why));
        }
        if self.loses() {
            return Err(gone());
        }
        let told = volume.answer(*tell, &mut bound);
        if self.loses() {
            return Err(gone());
        }
        let size_bytes = volume.geometry().size_bytes();
        match Told::decode(&told.encode(), size_bytes).unwrap() {
            Told::Refused(why) => Err(refused(why)),
            told => Ok(told),
        }
    }

    fn interrupt(&self) {}

    fn hang_up(&self) {}
}

fn config(background: bool) -> ExportConfig {
    ExportConfig {
        name: String::new(),
        image: PathBuf::from("memory"),
        state_dir: None,
        block_bytes: 4096,
        read_only: false,
        engine: Engine::Auto,
        transport: Transport::Auto,
        compress: crate::config::Packing::None,
        source: Some(SourceConfig {
            handoff: HandoffPolicy::Command,
            // What does not get through is not tried again by itself.
            on_loss: SourceLoss::Error(Duration::ZERO),
            background,
            ..SourceConfig::new("wire")
        }),
    }
}

/// What a site has, and what of it outlives what.
struct Site {
    config: ExportConfig,
    store: Arc<MemoryStore>,
    dir: MemoryDirectory,
    words: SharedWords,
    here: Arc<Peer>,
    /// To the other site.
    wire: Option<Arc<Wire>>,
    line: Option<Arc<Line>>,
}

struct World {
    geometry: Geometry,
    /// The disk when B took it over.
    original: Vec<u8>,
    clock_ms: Arc<AtomicU64>,
    a: Site,
    b: Site,
    oracle: Oracle,
    returns: u8,
    /// Returns that were given up, of which B may not have heard.
    given_up: Vec<MoveId>,
    seen: Seen,
}

/// What has happened, to know that something has.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    handoffs: u64,
    given_up_fenced: u64,
    crashes_fenced: u64,
    crashes_after: u64,
    refetched: u64,
    partials: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    A,
    B,
}

/// How a read ended: with bytes of its own (`None`: it is in the image), or not at all.
type End = Result<Option<Vec<u8>>, ()>;

/// A read that waits, at which site, and what it may see.
struct Waiting {
    at: Who,
    bytes: ByteRange,
    allowed: Vec<Vec<u8>>,
    end: Arc<Mutex<Option<End>>>,
}

impl World {
    fn new(way_back: bool, background: bool) -> Self {
        Self::of(original(), 4096, way_back, background)
    }

    fn of(original: Vec<u8>, block_bytes: u32, way_back: bool, background: bool) -> Self {
        let geometry = Geometry::new(original.len() as u64, block_bytes).unwrap();
        let identity = |volume_id, life, ties| Identity {
            volume_id,
            geometry,
            generation: 0,
            life,
            source_uri: "wire".into(),
            incarnation: [2; 16],
            image_inode: None,
            ties,
        };
        let departed = Ties {
            departed: Some(Departure {
                to: B,
                image_mtime: None,
                intact: true,
            }),
            ..Ties::default()
        };
        let arriving = Ties {
            fenced_source: true,
            way_back,
            ..Ties::default()
        };
        let site = |content: Vec<u8>, identity, background| {
            let dir = MemoryDirectory::default();
            StateDir::create_in(Box::new(dir.clone()), identity, None).unwrap();
            Site {
                config: config(background),
                store: Arc::new(MemoryStore::with_content(content)),
                dir,
                words: words(geometry),
                here: Arc::default(),
                wire: None,
                line: None,
            }
        };
        let mut this = Self {
            geometry,
            clock_ms: Arc::default(),
            a: site(
                original.clone(),
                identity([0xa; 16], Life::Local, departed),
                true,
            ),
            b: site(
                vec![0; original.len()],
                identity(B, Life::Arriving, arriving),
                background,
            ),
            oracle: Oracle::new(original.clone()),
            original,
            returns: 0,
            given_up: Vec::new(),
            seen: Seen::default(),
        };
        this.open(Who::A, false);
        this.open(Who::B, false);
        this
    }

    fn site(&self, who: Who) -> &Site {
        match who {
            Who::A => &self.a,
            Who::B => &self.b,
        }
    }

    fn site_mut(&mut self, who: Who) -> &mut Site {
        match who {
            Who::A => &mut self.a,
            Who::B => &mut self.b,
        }
    }

    fn volume(&self, who: Who) -> Arc<Volume> {
        self.site(who).here.get().unwrap()
    }

    /// What a start does with what is there.
    fn open(&mut self, who: Who, kill: bool) {
        let ms = Arc::clone(&self.clock_ms);
        let clock: Clock = Arc::new(move || Duration::from_millis(ms.load(Ordering::Relaxed)));
        let geometry = self.geometry;
        let other = match who {
            Who::A => Arc::clone(&self.b.here),
            Who::B => Arc::clone(&self.a.here),
        };
        let site = self.site_mut(who);
        let mut state = StateDir::open_in(Box::new(site.dir.clone()), None).unwrap();
        let identity = state.identity().clone();
        (site.wire, site.line) = (None, None);
        let residency = identity.keeps_map().then(|| {
            let residency = if kill {
                Residency::recover(geometry, Box::new(site.words.clone()))
            } else {
                site.words = words(geometry);
                let residency = Residency::new(geometry, Box::new(site.words.clone()));
                state.load(&residency).unwrap();
                residency
            };
            let store = &site.store;
            state.checkpoint(&residency, &mut || store.sync()).unwrap();
            settle_lacking(&state, &residency).unwrap();
            if wayback::doubt(&state, None, kill).is_some() {
                state.end_way_back().unwrap();
            }
            Arc::new(residency)
        });
        let witnesses = state.witnesses(1).unwrap();
        let kept = state.identity().keeps_map();
        let parts = Parts {
            config: &site.config,
            geometry,
            store: Arc::clone(&site.store) as Arc<dyn Store>,
            state: Some(state),
            had_source: true,
            clock,
            heat_place: None,
            make_state: None,
        };
        let Some(residency) = residency.filter(|_| kept) else {
            *lock(&site.here.0) = Some(parts.plain());
            return;
        };
        let stance = match identity.life {
            Life::Standby => Stance::Standby,
            _ => Stance::Arriving,
        };
        let ticket = Ticket::new(identity.volume_id, identity.ties.base, stance, true);
        let wire = Wire::new(
            &other,
            &ticket,
            identity.ties.only_here,
            geometry.size_bytes(),
        );
        let wanted = site.config.source.as_ref().unwrap();
        let arrival = identity.ties.only_here.then(|| {
            let line = Arc::new(Line {
                peer: Arc::clone(&other),
                ticket: Arc::clone(&ticket),
                chance: Mutex::new(Chance::new(identity.generation + 7)),
                loses: AtomicBool::new(true),
            });
            site.line = Some(Arc::clone(&line));
            Arrival::new(ticket, line, wanted, geometry)
                .with_old_copy_needed(identity.life != Life::Standby)
        });
        let volume = parts.moving(Moving {
            wanted,
            source: Arc::clone(&wire) as Arc<dyn Source>,
            residency,
            witnesses,
            at_completion: Box::new(|| ()),
            at_release: Box::new(|| ()),
            arrival,
        });
        if !volume.is_local() {
            volume.relocation().unwrap().start();
            site.wire = Some(wire);
        }
        *lock(&site.here.0) = Some(volume);
    }

    fn wires(&self) -> impl Iterator<Item = &Arc<Wire>> {
        self.a.wire.iter().chain(&self.b.wire)
    }

    /// The process of a site ends, or its power; it is started again at once.
    fn crash(&mut self, who: Who, cut: Option<u64>) {
        let fenced = self.volume(Who::B).has_departed();
        match self.active() {
            None => self.seen.crashes_fenced += u64::from(fenced),
            Some(Who::A) => self.seen.crashes_after += 1,
            Some(Who::B) => {}
        }
        let was_active = self.active() == Some(who);
        self.wires().for_each(|wire| wire.cut());
        let site = self.site_mut(who);
        *lock(&site.here.0) = None;
        match cut {
            None => {
                site.store = Arc::new(site.store.kill());
                site.dir = site.dir.kill();
            }
            Some(seed) => {
                let mut chance = Chance::new(seed);
                let mut choose = move |n: u32| chance.below(n.into()) as u32;
                site.store = Arc::new(site.store.power_cut(&mut choose));
                site.dir = site.dir.power_cut(&mut choose);
            }
        }
        self.open(who, cut.is_none());
        if cut.is_some() && was_active {
            let found = self.view();
            self.oracle.settle(&found).unwrap();
        }
    }

    /// Who takes writes. Never both.
    fn active(&self) -> Option<Who> {
        let (a, b) = (self.volume(Who::A), self.volume(Who::B));
        let at_a = !a.has_departed() && !a.has_given_up() && a.life() != LifeState::Standby;
        let at_b = !b.has_departed();
        assert!(!(at_a && at_b), "both take writes");
        match (at_a, at_b) {
            (true, _) => Some(Who::A),
            (_, true) => Some(Who::B),
            _ => None,
        }
    }

    /// The disk: what is in the image of whoever has it, and what that may fetch.
    fn view(&self) -> Vec<u8> {
        let who = self.active().unwrap_or(Who::B);
        let b = self.volume(Who::B);
        let there = b.relocation().map(|r| Arc::clone(&r.residency));
        let there = there.filter(|_| !b.is_local());
        let volume = self.volume(who);
        let mut seen = self.site(who).store.content();
        let Some(relocation) = volume.relocation().filter(|_| !volume.is_local()) else {
            return seen;
        };
        let elsewhere = match who {
            Who::A => self.b.store.content(),
            Who::B => self.original.clone(),
        };
        for block in (0..self.geometry.blocks()).map(BlockIndex) {
            if relocation.residency.state(block).is_resident() {
                continue;
            }
            if who == Who::A {
                assert!(
                    there.as_ref().is_none_or(|r| r.state(block).is_resident()),
                    "A would fetch block {} from B, which does not have it",
                    block.0
                );
            }
            let mask = relocation.residency.partial_mask(block);
            let bytes = self.geometry.bytes(BlockRange::one(block));
            for sector in 0..self.geometry.sectors_in(block) {
                if !mask.as_ref().is_some_and(|m| m.has(sector)) {
                    let at = bytes.start as usize + sector as usize * SECTOR;
                    seen[at..at + SECTOR].copy_from_slice(&elsewhere[at..at + SECTOR]);
                }
            }
        }
        seen
    }

    fn check(&self, waiting: &mut Vec<Waiting>) {
        if self.active() != Some(Who::A) {
            assert!(
                self.a.store.content() == self.original,
                "the old copy was written into"
            );
        }
        assert!(
            self.view() == self.oracle.now,
            "the disk is not what was written"
        );
        waiting.retain(|read| {
            let Some(end) = lock(&read.end).take() else {
                return true;
            };
            let Ok(data) = end else {
                return false;
            };
            let data = data.unwrap_or_else(|| {
                let mut data = vec![0; read.bytes.len() as usize];
                self.site(read.at)
                    .store
                    .read(read.bytes.start, &mut data)
                    .unwrap();
                data
            });
            for at in 0..data.len() {
                let right = read.allowed.iter().any(|allowed| allowed[at] == data[at]);
                assert!(right, "a wrong byte was read at {:?}", read.at);
            }
            false
        });
    }

    fn change(&mut self, chance: &mut Chance, waiting: &mut [Waiting]) {
        let sectors = DISK / 512;
        let at = chance.below(sectors);
        let count = (1 + chance.below(20)).min(sectors - at);
        let bytes = ByteRange::at(at * 512, count * 512);
        let zero = chance.one_in(6);
        let value = if zero { 0 } else { 1 + chance.below(250) as u8 };
        let data = vec![value; bytes.len() as usize];
        let write = |volume: &Volume| {
            let relocation = volume.relocation();
            match zero {
                true => volume.zero(
                    relocation.as_ref(),
                    bytes.start,
                    bytes.len(),
                    ZeroMode::MayPunch,
                ),
                false => volume.write(relocation.as_ref(), bytes.start, &data),
            }
        };
        let active = self.active();
        for who in [Who::A, Who::B] {
            let taken = write(&self.volume(who)).is_ok();
            assert_eq!(taken, active == Some(who), "a write at {who:?}");
        }
        if active.is_some() {
            self.oracle.write(bytes.start as usize, &data);
            for read in waiting {
                let range = read.bytes.start as usize..read.bytes.end as usize;
                read.allowed.push(self.oracle.now[range].to_vec());
            }
        }
    }

    fn read(&self, chance: &mut Chance, waiting: &mut Vec<Waiting>) {
        // At B, where the VM runs, or at A, where a hypervisor looks before it comes.
        let at = match self.active() {
            Some(Who::A) => Who::A,
            _ if self.a.wire.is_some() && chance.one_in(2) => Who::A,
            _ => Who::B,
        };
        let volume = self.volume(at);
        let start = chance.below(DISK / 512);
        let count = (1 + chance.below(40)).min(DISK / 512 - start);
        let bytes = ByteRange::at(start * 512, count * 512);
        let range = bytes.start as usize..bytes.end as usize;
        let now = self.oracle.now[range].to_vec();
        let relocation = volume.relocation();
        let mut data = vec![0; bytes.len() as usize];
        match volume
            .read_now(relocation.as_ref(), bytes.start, &mut data)
            .unwrap()
        {
            ReadNow::Done => assert!(data == now, "a wrong byte was read at {at:?}"),
            ReadNow::WouldBlock => panic!("memory never blocks"),
            ReadNow::Missing => {
                let end = Arc::new(Mutex::new(None));
                let told = Arc::clone(&end);
                let done = move |how: ReadEnd<'_>| {
                    let how = match how {
                        ReadEnd::Resident => Ok(None),
                        ReadEnd::Bytes(bytes) => Ok(Some(bytes.into_owned())),
                        ReadEnd::Failed(_) => Err(()),
                    };
                    assert!(lock(&told).replace(how).is_none(), "answered twice");
                };
                relocation.unwrap().read(bytes, Box::new(done));
                waiting.push(Waiting {
                    at,
                    bytes,
                    allowed: vec![now],
                    end,
                });
            }
        }
    }

    /// Time passes, and what the committing thread would do is done.
    fn pass_time(&self) {
        self.tick();
        for who in [Who::A, Who::B] {
            let volume = self.volume(who);
            if std::mem::take(&mut lock(&volume.committer.queue).complete) {
                volume.complete().unwrap();
            }
        }
    }

    fn tick(&self) {
        self.clock_ms.fetch_add(20, Ordering::Relaxed);
        for who in [Who::A, Who::B] {
            let volume = self.volume(who);
            if let Some(relocation) = volume.relocation().filter(|_| !volume.is_local()) {
                volume.tick_return(&relocation);
                relocation.tick();
            }
        }
    }

    fn pump(&self, chance: &mut Chance) {
        self.wires().for_each(|wire| wire.pump(chance));
    }

    // The return

    fn begin_return(&mut self) {
        let stands = self.volume(Who::A).has_departed() && self.active() == Some(Who::B);
        if !stands || self.volume(Who::B).is_local() {
            return;
        }
        self.returns += 1;
        self.wires().for_each(|wire| wire.cut());
        *lock(&self.a.here.0) = None;
        let state = StateDir::open_in(Box::new(self.a.dir.clone()), None).unwrap();
        let mut identity = state.identity().clone();
        assert_eq!(
            identity.ties.departed.map(|d| (d.to, d.intact)),
            Some((B, true))
        );
        identity.volume_id = [0x10 + self.returns; 16];
        identity.life = Life::Standby;
        identity.ties = Ties {
            base: Some(B),
            only_here: true,
            fenced_source: true,
            ..Ties::default()
        };
        state.keep_overwritten(B, &BlockSet::new()).unwrap();
        drop(state.begin_return(identity).unwrap());
        self.open(Who::A, false);
    }

    fn stands_by(&self) -> bool {
        let a = self.volume(Who::A);
        self.a.line.is_some() && a.life() == LifeState::Standby && !a.has_given_up()
    }

    fn hand_off(&mut self, chance: &mut Chance) {
        if !self.stands_by() {
            return;
        }
        let (a, b) = (self.volume(Who::A), self.volume(Who::B));
        self.seen.partials += b
            .relocation()
            .map_or(0, |r| r.residency.partials().len() as u64);
        // A state that cannot be written: whose it is, crashes then.
        let fails = match chance.below(6) {
            0 => Some(Who::A),
            1 => Some(Who::B),
            _ => None,
        };
        if let Some(who) = fails {
            self.site(who).dir.fail_after(Some(chance.below(6)));
        }
        let outcome = std::thread::scope(|scope| {
            let handing = scope.spawn(|| a.hand_off());
            while !handing.is_finished() {
                self.pump(chance);
                self.tick();
                std::thread::yield_now();
            }
            handing.join().unwrap()
        });
        self.seen.handoffs += u64::from(outcome.is_ok());
        if b.has_departed() {
            // All was made durable before the fence was.
            self.oracle.flushed();
        }
        if let Some(who) = fails {
            let cut = chance.one_in(2).then(|| chance.below(u64::MAX));
            self.crash(who, cut);
        }
    }

    /// A gives the return up, and B has not heard of it yet.
    fn give_up(&mut self) {
        if !self.stands_by() {
            return;
        }
        let a = self.volume(Who::A);
        let id = lock(&a.journal)
            .state
            .as_ref()
            .unwrap()
            .identity()
            .volume_id;
        // Nobody waits for B to hear of it.
        a.arrival.as_ref().unwrap().stop();
        a.give_up().unwrap();
        self.seen.given_up_fenced += u64::from(self.volume(Who::B).has_departed());
        self.given_up.push(id);
    }

    fn say_that_it_is_given_up(&mut self) {
        if let Some(id) = self.given_up.pop() {
            let told = self
                .volume(Who::B)
                .answer(Tell::Abort { id }, &mut Bound::default());
            assert_eq!(told, Told::Fine);
        }
    }

    /// All that is under way comes to its end, at whichever site.
    fn finish(mut self, chance: &mut Chance) -> Seen {
        let mut waiting = Vec::new();
        while !self.given_up.is_empty() {
            self.say_that_it_is_given_up();
        }
        if self.active().is_none() {
            // The way on that the status names.
            assert!(self.stands_by(), "nobody can write, and there is no way on");
            while self.active() != Some(Who::A) {
                self.hand_off(chance);
            }
        }
        let who = self.active().unwrap();
        let volume = self.volume(who);
        if let Some(relocation) = volume.unfinished() {
            let missing = relocation.residency.missing_blocks();
            self.seen.refetched += if who == Who::A { missing } else { 0 };
            relocation.drive(|m, now, out| m.resume(now, &relocation.residency, out));
        }
        for _ in 0..200_000 {
            if self.volume(who).is_local() {
                break;
            }
            // One that fetches only what is read.
            self.read(chance, &mut waiting);
            self.pump(chance);
            self.pass_time();
        }
        assert!(self.volume(who).is_local(), "the move never ends");
        self.check(&mut waiting);
        assert!(self.site(who).store.content() == self.oracle.now);
        self.seen
    }
}

fn life(seed: u64) -> Seen {
    let mut chance = Chance::new(seed);
    let mut world = World::new(chance.one_in(2), chance.one_in(3));
    let mut waiting = Vec::new();
    for _ in 0..60 {
        match chance.below(24) {
            0 => {
                waiting.clear();
                let who = [Who::A, Who::B][chance.below(2) as usize];
                let cut = chance.one_in(2).then(|| chance.below(u64::MAX));
                world.crash(who, cut);
            }
            1 => {
                if world.active().is_some() {
                    world.volume(world.active().unwrap()).commit().unwrap();
                    world.oracle.flushed();
                }
            }
            2 | 3 => {
                waiting.clear();
                world.begin_return();
            }
            4 => {
                waiting.clear();
                world.hand_off(&mut chance);
            }
            5 if chance.one_in(2) => world.give_up(),
            6 => world.say_that_it_is_given_up(),
            7..=10 => world.read(&mut chance, &mut waiting),
            11..=16 => world.pump(&mut chance),
            17 => world.pass_time(),
            _ => world.change(&mut chance, &mut waiting),
        }
        world.check(&mut waiting);
    }
    world.finish(&mut chance)
}

#[test]
fn a_return_before_all_is_there_loses_nothing_and_never_has_two_writers() {
    let lives = std::env::var("HIKKOSHI_LIVES").ok();
    let lives = lives.and_then(|n| n.parse().ok()).unwrap_or(250);
    let mut all = Seen::default();
    for seed in 0..lives {
        match std::panic::catch_unwind(|| life(seed)) {
            Ok(seen) => {
                all.handoffs += seen.handoffs;
                all.given_up_fenced += seen.given_up_fenced;
                all.crashes_fenced += seen.crashes_fenced;
                all.crashes_after += seen.crashes_after;
                all.refetched += seen.refetched;
                all.partials += seen.partials;
            }
            Err(panic) => {
                eprintln!("life {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{all:?}");
    let happened = [
        all.handoffs,
        all.given_up_fenced,
        all.crashes_fenced,
        all.crashes_after,
        all.refetched,
        all.partials,
    ];
    assert!(happened.iter().all(|n| *n > 0), "{all:?}");
}

/// More runs than one answer has room for.
#[test]
fn what_lies_scattered_is_told_to_the_last_block() {
    let runs = 2 * hikkoshi_wan::transport::limits::TOLD_RANGES + 100;
    let mut world = World::of(vec![7; runs * 1024], 512, true, false);
    let mut expected = vec![7; runs * 1024];
    let b = world.volume(Who::B);
    let relocation = b.relocation();
    for run in 0..runs {
        let at = run * 1024 + 512;
        b.write(relocation.as_ref(), at as u64, &[9; 512]).unwrap();
        expected[at..at + 512].fill(9);
    }
    world.begin_return();
    let a = world.volume(Who::A);
    world
        .a
        .line
        .as_ref()
        .unwrap()
        .loses
        .store(false, Ordering::Relaxed);
    a.hand_off().unwrap();
    let lacking = a.relocation().unwrap().residency.missing_blocks();
    assert_eq!(lacking, runs as u64);
    assert!(world.view() == expected);
    // And once more from what is durable.
    world.oracle.now.clone_from(&expected);
    world.crash(Who::A, Some(1));
    assert!(world.view() == expected);
}

/// They are there when the handoff asks for them, which waits for them only so long.
#[test]
fn while_a_return_stands_by_the_rests_of_blocks_come_at_once() {
    let mut chance = Chance::new(11);
    let mut world = World::new(false, false);
    world.b.wire.as_ref().unwrap().connect();
    world.pump(&mut chance);
    let b = world.volume(Who::B);
    let relocation = b.relocation();
    let partial = || relocation.as_ref().unwrap().residency.partial_blocks();
    for block in 0..3 {
        b.write(relocation.as_ref(), block * 4096, &[9; 512])
            .unwrap();
    }
    let mut beats = |world: &World, count| {
        for _ in 0..count {
            world.tick();
            world.pump(&mut chance);
        }
    };
    beats(&world, 4);
    assert_eq!(partial(), 3, "nobody needs them");
    world.begin_return();
    assert_eq!(partial(), 3);
    world.b.wire.as_ref().unwrap().connect();
    let attach = Tell::Attach {
        id: [0x11; 16],
        stance: Stance::Standby,
        epoch: 0,
        base: Some(B),
    };
    let told = b.answer(attach, &mut Bound::default());
    assert!(matches!(told, Told::Attached(_)), "{told:?}");
    // In less than half a second: nobody would have begun to fetch them yet.
    beats(&world, 18);
    assert_eq!(partial(), 0);
}

/// Many rests that do not come: the return is refused while the VM still writes. Few: it is held up for them, and goes
/// on to write when they come too late.
#[test]
fn a_return_is_refused_before_the_vm_would_wait_for_many_rests() {
    for (partials, holds_up) in [(REST_FEW + 1, false), (REST_FEW, true)] {
        let mut world = World::of(vec![7; (REST_FEW + 1) * 4096], 4096, true, false);
        let b = world.volume(Who::B);
        let relocation = b.relocation();
        let write = |block: usize| b.write(relocation.as_ref(), block as u64 * 4096, &[9; 512]);
        (0..partials).for_each(|block| write(block).unwrap());
        world.begin_return();
        let (mut bound, id) = (Bound::default(), [0x11; 16]);
        let attach = Tell::Attach {
            id,
            stance: Stance::Standby,
            epoch: 0,
            base: Some(B),
        };
        let told = b.answer(attach, &mut bound);
        assert!(matches!(told, Told::Attached(_)), "{told:?}");
        let mut held_up = false;
        let told = std::thread::scope(|scope| {
            let handing = scope.spawn(|| b.answer(Tell::Handoff { id, epoch: 0 }, &mut bound));
            while !handing.is_finished() {
                // Seen between any two steps of the clock.
                held_up |= !b.lets_in();
                world.tick();
                std::thread::yield_now();
            }
            handing.join().unwrap()
        });
        let Told::Refused(why) = told else {
            panic!("{told:?}");
        };
        assert!(why.contains("wait for their rest"), "{why}");
        assert_eq!(held_up, holds_up, "{partials} partials");
        assert!(!b.has_departed());
        write(0).unwrap();
    }
}

/// The source has become whole since the return began, and has changed its storage: it does not know of
/// the old copy any more. It was fenced, and then refused to tell, so that nobody could write.
#[test]
fn a_whole_disk_tells_everything_to_a_return_that_it_does_not_know() {
    let mut chance = Chance::new(5);
    let mut world = World::new(false, true);
    world.begin_return();
    world.a.wire.as_ref().unwrap().connect();
    let (a, b) = (world.volume(Who::A), world.volume(Who::B));
    let identity = lock(&a.journal).state.as_ref().unwrap().identity().clone();
    let differs = |base, from| {
        let id = identity.volume_id;
        b.answer(Tell::Differs { id, base, from }, &mut Bound::default())
    };
    let fence = Tell::Handoff {
        id: identity.volume_id,
        epoch: 0,
    };
    let told = b.answer(fence, &mut Bound::default());
    assert!(matches!(told, Told::Fenced { .. }), "{told:?}");
    let other = [0xc; 16];
    assert!(matches!(differs(other, 0), Told::Refused(_)));
    b.relocation().unwrap().drive(|m, now, out| {
        m.resume(now, &b.relocation().unwrap().residency, out);
    });
    while !b.is_local() {
        world.pump(&mut chance);
        world.pass_time();
    }
    for from in [0, 4096, 8192] {
        let rest = ByteRange::at(from, DISK - from);
        let all = Told::Differs {
            ranges: vec![rest],
            more: false,
        };
        assert_eq!(differs(other, from), all);
    }
}
