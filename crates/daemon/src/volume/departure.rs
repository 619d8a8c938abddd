//! The source's side of a move: who copies this disk, what changes meanwhile, and the fence.
//!
//! While a destination stands by, what guests change is marked for it, after each change and before
//! its answer ([`ChangeMap`]). At the handoff no more writes are let in, those under way end, all is
//! made durable, and then the departure itself; only then is the destination told. From there on
//! nothing is written here until somebody lifts the fence: the destination, by giving up before it
//! has taken a write, or a person. What may follow what is in [`hikkoshi_engine::handover`].

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use hikkoshi_crashpoint::crash_point;
use hikkoshi_engine::changes::{ChangeMap, coarsened};
use hikkoshi_engine::geometry::{BlockRange, ByteRange, Geometry};
use hikkoshi_engine::handover::{self, Handoff, Refusal};
use hikkoshi_engine::sync::pause_for;
use hikkoshi_store::state::{Departure, StateDir, StateError};
use hikkoshi_wan::transport::limits;
use hikkoshi_wan::transport::session::{Attached, HandedOver, MoveId, OldCopy, Stance, Tell, Told};

use super::gate::{Gate, Inside};
use super::relocation::Relocation;
use super::storage::ImageAddress;
use super::{Volume, lock};
use crate::boot;
use crate::events::EventKind;
use crate::status::LifeState;

/// Destinations that copy at the same time; the one that was not heard of for longest goes.
const MAX_SESSIONS: usize = 4;

/// Moves that were given up, remembered so that a request of theirs that comes late is refused.
const MAX_GIVEN_UP: usize = 64;

/// Writes are slowed down to no less than this, in bytes per second, and for no longer at a time.
const MIN_SLOW_RATE: u64 = 256 << 10;
const MAX_SLOW_PAUSE: Duration = Duration::from_secs(1);

/// So far ahead of its rate a guest may be.
const SLOW_GRACE: Duration = Duration::from_millis(100);

/// A bound that nobody has asked for again for so long ends: whoever wanted it is gone.
const SLOW_FOR: Duration = Duration::from_secs(10);

/// How long the rests of blocks that were written in part are waited for before the disk goes back to
/// where they are, twice; together well below what an answer may take.
const REST_LIMIT: Duration = Duration::from_secs(5);
/// So many are asked for at once, and come in a moment.
pub(super) const REST_FEW: usize = 1024;
const REST_BEAT: Duration = Duration::from_millis(2);

/// Makes the durable state of a plain image, which has none until it is needed.
pub type MakeState = Box<dyn Fn() -> Result<StateDir, StateError> + Send + Sync>;

/// A destination that copies.
struct Session {
    id: MoveId,
    /// Which tracking of changes this is: what was copied before it began may have changed unseen.
    epoch: u64,
    map: ChangeMap,
    /// The old copy that it has, if it is known in what that differs: that was marked.
    base: Option<MoveId>,
    /// It has the old copy from which blocks are still fetched here.
    needed: bool,
    /// The answer to its last question, until it asks the next.
    told: Mutex<(u64, Vec<BlockRange>)>,
    /// When it was heard of last, in turns of [`Departures::turn`].
    heard: AtomicU64,
}

/// What a volume knows of those who move its disk away.
#[derive(Default)]
pub struct Departures {
    gate: Gate,
    /// Some session is there: what changes is marked.
    tracking: AtomicBool,
    sessions: RwLock<Vec<Arc<Session>>>,
    departed: Mutex<Option<Departure>>,
    has_departed: AtomicBool,
    /// Also those that were released by hand.
    given_up: Mutex<Vec<MoveId>>,
    /// All has arrived where it departed to.
    arrived: AtomicBool,
    /// It departed to where it came from, before all of it was here.
    went_back: AtomicBool,
    /// Grows whenever somebody who reads here might not be allowed to any more.
    version: AtomicU64,
    /// Whoever said who it is before this version must say so again: what it read for was fenced
    /// then, and is not any more.
    ends_before: AtomicU64,
    turn: AtomicU64,
    /// When the handoff was answered last, as the machine counts; where the process does not know, when
    /// it began.
    answered: Mutex<Option<Duration>>,
    /// Whoever the disk departed to has said since that it took it over.
    taken: AtomicBool,
    /// Held over a handoff, an abort, a release: one at a time.
    deciding: Mutex<()>,
    make_state: Option<MakeState>,
    /// Guests may change so many bytes in a second, for the sake of this move; 0: as many as they
    /// like.
    slowed: AtomicU64,
    slowed_for: Mutex<Option<(MoveId, Duration)>>,
    /// Until when what was changed has used the rate up.
    owed_until: Mutex<Duration>,
    /// The move of this site's own to another image, while there is one: no other may begin.
    storage: Mutex<Option<(MoveId, ImageAddress)>>,
}

/// A client of ours, as far as it has said who it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bound {
    who: Option<(MoveId, Stance)>,
    version: u64,
    /// Of the boots that it was told.
    news_of_boots: u64,
}

impl Departures {
    /// Those of a volume that has departed, or not: `moved_to` another image of this machine.
    /// `released`: the move that was released by hand.
    pub fn new(
        departed: Option<Departure>,
        moved_to: Option<ImageAddress>,
        released: Option<MoveId>,
        make_state: Option<MakeState>,
    ) -> Self {
        let storage = departed.map(|d| d.to).zip(moved_to);
        let this = Self {
            departed: Mutex::new(departed),
            storage: Mutex::new(storage),
            given_up: Mutex::new(released.into_iter().collect()),
            has_departed: AtomicBool::new(departed.is_some()),
            // The process before may have answered right before its end.
            answered: Mutex::new(departed.map(|_| boot::running_for())),
            make_state,
            ..Self::default()
        };
        if departed.is_some() {
            this.gate.close();
        }
        this
    }

    fn sessions(&self) -> Vec<Arc<Session>> {
        self.read_sessions().clone()
    }

    fn read_sessions(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<Session>>> {
        self.sessions
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write_sessions(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Arc<Session>>> {
        self.sessions
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn departed(&self) -> Option<Departure> {
        *lock(&self.departed)
    }

    fn find(&self, id: MoveId) -> Option<Arc<Session>> {
        let found = self.sessions().into_iter().find(|s| s.id == id)?;
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        found.heard.store(turn, Ordering::Relaxed);
        Some(found)
    }

    /// Whether a return stands by that needs every block here to be whole or absent.
    fn returns_early(&self) -> bool {
        self.tracking.load(Ordering::Acquire) && self.read_sessions().iter().any(|s| s.needed)
    }

    fn open(&self, session: Session) -> Arc<Session> {
        let session = Arc::new(session);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        session.heard.store(turn, Ordering::Relaxed);
        let mut sessions = self.write_sessions();
        sessions.retain(|s| s.id != session.id);
        if sessions.len() >= MAX_SESSIONS {
            // A return asks nothing before its handoff, and would not notice.
            let heard = |s: &Arc<Session>| (s.needed, s.heard.load(Ordering::Relaxed));
            if let Some(oldest) = (0..sessions.len()).min_by_key(|at| heard(&sessions[*at])) {
                sessions.remove(oldest);
            }
        }
        sessions.push(Arc::clone(&session));
        // Before any write that ends from now on looks at it.
        self.tracking.store(true, Ordering::SeqCst);
        session
    }

    fn refuse_from_now_on(&self, id: MoveId) {
        let mut given_up = lock(&self.given_up);
        if !given_up.contains(&id) {
            if given_up.len() >= MAX_GIVEN_UP {
                given_up.remove(0);
            }
            given_up.push(id);
        }
    }

    fn close(&self, id: MoveId) {
        let mut sessions = self.write_sessions();
        sessions.retain(|s| s.id != id);
        self.tracking.store(!sessions.is_empty(), Ordering::SeqCst);
    }
}

impl Session {
    fn new(id: MoveId, geometry: Geometry) -> Result<Self, StateError> {
        let random = hikkoshi_store::live::random()?;
        let epoch = u64::from_le_bytes(random[..8].try_into().expect("eight of sixteen"));
        Ok(Self {
            id,
            // 0 means none.
            epoch: epoch | 1,
            map: ChangeMap::new(geometry),
            base: None,
            needed: false,
            told: Mutex::new((0, Vec::new())),
            heard: AtomicU64::new(0),
        })
    }

    fn bytes_of(&self, runs: &[BlockRange]) -> Vec<ByteRange> {
        let geometry = self.map.geometry();
        runs.iter().map(|run| geometry.bytes(*run)).collect()
    }

    /// The answer to question `number`: the one before, if that was lost, or the news. `None` to a
    /// question that comes late, from a connection that was given up: nobody hears that answer, and
    /// what it told would be told to nobody else.
    fn changes(&self, number: u64) -> Option<Vec<ByteRange>> {
        let mut told = lock(&self.told);
        if told.0.checked_add(1) == Some(number) {
            *told = (number, coarsened(self.map.take(), limits::TOLD_RANGES));
        }
        (told.0 == number).then(|| self.bytes_of(&told.1))
    }

    /// All that it may not know. Nothing changes any more.
    fn last_changes(&self) -> Vec<ByteRange> {
        // Held throughout: a question that comes late must not take away in between what it is told.
        let told = lock(&self.told);
        for run in &told.1 {
            self.map.mark(*run);
        }
        let runs = self.map.take();
        for run in &runs {
            // It may ask again.
            self.map.mark(*run);
        }
        self.bytes_of(&coarsened(runs, limits::TOLD_RANGES))
    }
}

impl Volume {
    /// Lets a guest's change begin.
    ///
    /// # Errors
    /// The disk has moved on from here.
    #[inline]
    pub(super) fn begin_change(&self) -> io::Result<Inside<'_>> {
        self.departures.gate.enter().ok_or_else(|| {
            // EPERM, as for an export that is read-only.
            io::Error::from_raw_os_error(1)
        })
    }

    /// Whether guests' changes may begin now.
    pub(super) fn lets_in(&self) -> bool {
        self.departures.gate.is_open()
    }

    /// A guest's change has been made, whatever came of it, and is not answered yet.
    #[inline]
    pub(super) fn changed(&self, bytes: ByteRange) {
        self.pay_for(bytes.len());
        if self.departures.tracking.load(Ordering::SeqCst) && !bytes.is_empty() {
            let blocks = self.geometry.covering(bytes);
            for session in self.departures.read_sessions().iter() {
                session.map.mark(blocks);
            }
        }
    }

    /// Where guests write faster than the link carries it, and all of it is to be copied before the
    /// handoff, their writes are answered later.
    fn pay_for(&self, bytes: u64) {
        let rate = self.departures.slowed.load(Ordering::Relaxed);
        if rate == 0 {
            return;
        }
        let now = self.now();
        let asked_at = lock(&self.departures.slowed_for).map(|(_, at)| at);
        if asked_at.is_none_or(|at| now.saturating_sub(at) > SLOW_FOR) {
            self.departures.slowed.store(0, Ordering::Relaxed);
            return;
        }
        let price = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate);
        let wait = {
            let mut until = lock(&self.departures.owed_until);
            *until = (*until).max(now) + price;
            until.saturating_sub(now)
        };
        if wait > SLOW_GRACE {
            std::thread::sleep((wait - SLOW_GRACE).min(MAX_SLOW_PAUSE));
        }
    }

    fn slow_down(&self, id: MoveId, bytes_per_s: u64) {
        if self.departures.find(id).is_none() {
            return;
        }
        let mut who = lock(&self.departures.slowed_for);
        if bytes_per_s == 0 && who.is_none_or(|(known, _)| known != id) {
            return;
        }
        *who = (bytes_per_s > 0).then_some((id, self.now()));
        let rate = match bytes_per_s {
            0 => 0,
            rate => rate.max(MIN_SLOW_RATE),
        };
        if self.departures.slowed.swap(rate, Ordering::Relaxed) == 0 && rate > 0 {
            self.event(
                EventKind::Slowed,
                "the VM writes faster than the link carries it, and the new site wants all of it \
                 before the handoff: its writes are slowed down until then",
            );
        }
    }

    /// Writes are as fast as ever again, if they were slowed down for this move.
    fn speed_up(&self, id: MoveId) {
        let mut who = lock(&self.departures.slowed_for);
        if who.is_some_and(|(known, _)| known == id) {
            *who = None;
            self.departures.slowed.store(0, Ordering::Relaxed);
        }
    }

    /// Whether the disk has moved on, so that what is here is its old copy.
    pub fn has_departed(&self) -> bool {
        self.departures.has_departed.load(Ordering::Acquire)
    }

    /// Where the volume stands, departures included.
    pub fn stands(&self) -> LifeState {
        let life = self.life();
        if self.has_departed() {
            LifeState::Departed
        } else if self.has_given_up() {
            LifeState::GivenUp
        } else if life == LifeState::Local && !self.departures.read_sessions().is_empty() {
            LifeState::Departing
        } else {
            life
        }
    }

    /// Whether the volume that has the disk now has said that all of it is there.
    pub fn has_arrived_elsewhere(&self) -> bool {
        self.departures.arrived.load(Ordering::Acquire)
    }

    /// The disk is about to change its storage by the move `id`, to `address`.
    ///
    /// # Errors
    /// Others copy it away already, or it cannot be now; the text says what to do.
    pub fn expect_storage_move(&self, id: MoveId, address: ImageAddress) -> Result<(), String> {
        // What begins at the same moment may slip through; the fence is closed for one of them.
        if let Some(why) = self.holds_storage() {
            return Err(why);
        }
        *lock(&self.departures.storage) = Some((id, address));
        Ok(())
    }

    /// That move was given up: the fence is lifted, if it was closed already.
    pub fn take_back_storage_move(&self) {
        let known = lock(&self.departures.storage).clone();
        if let Some((id, _)) = known
            && let Err(why) = self.abort_departure(id)
        {
            self.event(
                EventKind::StateTrouble,
                format!(
                    "it could not be recorded that the disk stays in {}: nothing is written to it; \
                     check the medium and restart the daemon: {why}",
                    self.image.display()
                ),
            );
        }
        self.forget_storage_move();
    }

    /// That move is over before anything was fenced.
    pub fn forget_storage_move(&self) {
        let known = lock(&self.departures.storage).take();
        if let Some((id, _)) = known {
            self.departures.close(id);
            self.speed_up(id);
        }
    }

    /// Whether the fence was closed for that move, and not for another one that began at the same moment.
    pub fn has_left_for_storage(&self) -> bool {
        let id = lock(&self.departures.storage).as_ref().map(|(id, _)| *id);
        let departed = self.departures.departed();
        departed.is_some_and(|departed| Some(departed.to) == id)
    }

    /// Where the disk is going at this site, for people.
    fn storage_move(&self) -> Option<String> {
        let storage = lock(&self.departures.storage);
        storage
            .as_ref()
            .map(|(_, to)| to.image.display().to_string())
    }

    /// Why the disk cannot change its storage now.
    pub(crate) fn holds_storage(&self) -> Option<String> {
        let name = &self.name;
        if self.read_only {
            return Some(format!(
                "export {name:?} is read-only: nobody writes to it, so copy its image and serve the copy"
            ));
        }
        if let Some(to) = self.storage_move() {
            return Some(format!(
                "export {name:?} is on its way to {to} already; `hikkoshi status` tells how far it is, and \
                 until the switch `hikkoshi abort` gives it up"
            ));
        }
        match self.stands() {
            LifeState::Local if self.is_poisoned() => Some(
                "an earlier sync failed, so nothing is known of what is durable; check the medium \
                 and restart the daemon first"
                    .to_owned(),
            ),
            LifeState::Local => None,
            LifeState::Departing => Some(format!(
                "a new site prepares to take export {name:?} over; complete that move or give it up \
                 there (`hikkoshi abort`), and restart this daemon if that site is gone"
            )),
            LifeState::Arriving => Some(format!(
                "export {name:?} is still arriving; wait until all of it is here (`hikkoshi wait`)"
            )),
            LifeState::Standby => Some(format!(
                "the VM does not run here yet: change the storage of export {name:?} after the \
                 handoff, once all of it is here (`hikkoshi wait`), or at the source"
            )),
            LifeState::Departed | LifeState::GivenUp | LifeState::Opening => Some(format!(
                "the disk of export {name:?} is not here: change its storage where it is"
            )),
        }
    }

    /// What a person should know of its departure.
    pub(super) fn departure_note(&self) -> Option<String> {
        if let Some(to) = self.storage_move() {
            return self.has_departed().then(|| {
                format!(
                    "the disk has moved on to {to}, and this old image of it takes no writes; if it \
                     is still shown here, the switch could not be completed: restart the daemon \
                     with {to}"
                )
            });
        }
        if self.has_departed() {
            let arrived = self.departures.arrived.load(Ordering::Acquire);
            return Some(if self.went_back() {
                if arrived {
                    "the disk has gone back to where it came from, and all of it is there: what is \
                     here is no whole disk, and can be removed"
                        .to_owned()
                } else {
                    "the disk has gone back to where it came from before all of it was here, and what \
                     was written here is still being fetched: keep this running; if it never went \
                     on there, `hikkoshi abort` there takes that back; nothing is written here until \
                     then, or until `hikkoshi release --force`"
                        .to_owned()
                }
            } else if arrived {
                "the disk has moved on, and all of it has arrived: this old copy is needed no \
                 more; it takes no writes until `hikkoshi release --force`"
                    .to_owned()
            } else {
                "the disk has moved on, and is still being fetched from here: keep this running; \
                 if the new site never took it over, `hikkoshi abort` there takes that back; this \
                 old copy takes no writes until then, or until `hikkoshi release --force`"
                    .to_owned()
            });
        }
        let slowed = self.departures.slowed.load(Ordering::Relaxed);
        if slowed > 0 {
            return Some(format!(
                "a new site wants all of the disk before the handoff (--prepare full): the VM's \
                 writes are slowed down to {} MB/s so that it can keep up",
                slowed.div_ceil(1_000_000)
            ));
        }
        let copying = self.departures.read_sessions().len();
        (copying > 0).then(|| {
            format!(
                "{copying} new {} being prepared; the VM still runs here; `hikkoshi abort` there ends \
                 that, and a restart of this daemon forgets a site that is gone",
                if copying == 1 { "site is" } else { "sites are" }
            )
        })
    }

    /// Answers a message of a destination. Waits for the medium at a handoff.
    pub fn answer(&self, tell: Tell, bound: &mut Bound) -> Told {
        let answered = match tell {
            Tell::Attach {
                id,
                stance,
                epoch,
                base,
            } => self.attach(id, stance, epoch, base, bound),
            Tell::Changes { id, epoch, number } => {
                let session = self.departures.find(id).filter(|s| s.epoch == epoch);
                let ranges = session.and_then(|session| session.changes(number));
                ranges
                    .map(|ranges| Told::Changes { ranges })
                    .ok_or_else(|| "these changes are not tracked any more".to_owned())
            }
            Tell::Handoff { id, epoch } => self.depart(id, epoch),
            Tell::Abort { id } => self.abort_departure(id),
            Tell::Bases { id } => {
                self.is_taken_by(id);
                self.tell_bases(id)
            }
            Tell::Differs { id, base, from } => self.tell_differs(id, base, from),
            Tell::Slow { id, bytes_per_s } => {
                self.slow_down(id, bytes_per_s);
                Ok(Told::Fine)
            }
            Tell::Heat { .. } => Ok(Told::Heat(self.heat().map().encode())),
            Tell::Done { id } => {
                self.is_taken_by(id);
                if self.departures.departed().is_some_and(|d| d.to == id)
                    && !self.departures.arrived.swap(true, Ordering::AcqRel)
                    // Of its own storage the export says so, once it has let go of the old.
                    && self.storage_move().is_none()
                {
                    self.event(
                        EventKind::Departed,
                        "all of the disk has arrived at its new place; this old copy is needed no \
                         more",
                    );
                    if self.went_back()
                        && let Some(relocation) = self.unfinished()
                    {
                        // Nothing comes from there any more.
                        relocation.retire();
                    }
                }
                Ok(Told::Fine)
            }
        };
        answered.unwrap_or_else(Told::Refused)
    }

    /// Whether a client that has said who it is may go on reading.
    pub fn still_serves(&self, bound: &Bound) -> bool {
        let Some((id, stance)) = bound.who else {
            return true;
        };
        if !self.knows_boots(bound) {
            return false;
        }
        let version = self.departures.version.load(Ordering::Acquire);
        bound.version == version
            || bound.version >= self.departures.ends_before.load(Ordering::Acquire)
                && self.may_attach(id, stance).is_ok()
    }

    /// Whether a client of ours knows of the power that was lost before this site. One that does not
    /// would take the answer to a flush, or to a handoff, for more than it is.
    pub fn knows_boots(&self, bound: &Bound) -> bool {
        bound.who.is_none() || bound.news_of_boots == self.news_of_boots()
    }

    fn may_attach(&self, id: MoveId, stance: Stance) -> Result<(), Refusal> {
        // Nobody writes to what is read-only: there is nothing to fence, and it may move to many.
        if self.read_only && !self.has_departed() {
            return Ok(());
        }
        let stance = match stance {
            Stance::Standby => handover::Stance::Standby,
            Stance::Arriving => handover::Stance::Arriving,
        };
        let mut departed = self.departures.departed().map(|d| d.to);
        if departed.is_none() {
            departed = self.old_copy_of().filter(|to| *to == id);
        }
        handover::attach(departed, id, stance)
    }

    /// Whether a client of ours reads the old copy that is here, and not the disk that comes back.
    pub fn reads_old_copy(&self, bound: &Bound) -> bool {
        let id = bound.who.map(|(id, _)| id);
        id.is_some() && self.old_copy_of() == id
    }

    /// Whoever read the old copy must say again who it is.
    pub(super) fn old_copy_is_over(&self) {
        self.departures.version.fetch_add(1, Ordering::AcqRel);
    }

    fn attach(
        &self,
        id: MoveId,
        stance: Stance,
        epoch: u64,
        base: Option<MoveId>,
        bound: &mut Bound,
    ) -> Result<Told, String> {
        let version = self.departures.version.load(Ordering::Acquire);
        self.may_attach(id, stance).map_err(|e| e.to_string())?;
        let other = |storage: &Option<(MoveId, _)>| storage.as_ref().is_some_and(|s| s.0 != id);
        if stance == Stance::Standby && other(&lock(&self.departures.storage)) {
            return Err(
                "the disk is changing its storage at its own site; begin this move when that is done"
                    .to_owned(),
            );
        }
        // Before they are looked at: whoever was told older ones must ask again.
        let news_of_boots = self.news_of_boots();
        *bound = Bound {
            who: Some((id, stance)),
            version,
            news_of_boots,
        };
        let departed = self.departures.departed().is_some_and(|d| d.to == id);
        if stance == Stance::Arriving {
            self.is_taken_by(id);
        }
        let off = self.is_off(id);
        let needed = self.needs(base);
        let mut attached = Attached {
            generation: self.generation(),
            epoch: 0,
            handed_over: if departed || self.old_copy_of() == Some(id) {
                HandedOver::Already
            } else if off {
                HandedOver::Never
            } else {
                HandedOver::NotYet
            },
            old_copy: if needed {
                self.needed_copy()
            } else {
                OldCopy::Unknown
            },
            boots: self.boots(),
        };
        // A volume that stands by itself does not see what changes.
        if stance == Stance::Standby && self.life() != LifeState::Standby && !off {
            let known = self.departures.find(id).filter(|s| s.epoch == epoch);
            let session = match known {
                Some(session) => {
                    if session.needed {
                        attached.old_copy = self.needed_copy();
                    } else if base.is_some() && session.base == base {
                        attached.old_copy = OldCopy::Known;
                    }
                    session
                }
                None if departed => return Ok(Told::Attached(attached)),
                None if needed => self.begin_return(id)?,
                None => self.begin_session(id, base, &mut attached)?,
            };
            attached.epoch = session.epoch;
        }
        Ok(Told::Attached(attached))
    }

    fn begin_session(
        &self,
        id: MoveId,
        base: Option<MoveId>,
        attached: &mut Attached,
    ) -> Result<Arc<Session>, String> {
        if base.is_some() && !self.is_local() {
            return Err(
                "not all of the disk has arrived here: until then only the copy that it comes from \
                 can take it back, and no older one"
                    .to_owned(),
            );
        }
        self.need_state_for_a_move()?;
        let mut session = Session::new(id, self.geometry).map_err(|e| e.to_string())?;
        // Whether it is known does not change to the better; in what it differs is asked below.
        session.base = base.filter(|base| self.knows_base(*base));
        let known = self.departures.find(id).is_some();
        // In this order: a change that is too early to be marked is in the difference.
        let session = self.departures.open(session);
        match session.base.map(|base| self.since(base)) {
            None => {}
            Some(Some(runs)) => {
                attached.old_copy = OldCopy::Known;
                for run in runs {
                    session.map.mark(run);
                }
            }
            // It has just ended.
            Some(None) => {
                self.departures.close(id);
                return Err("the way back has just been closed here; begin it anew".to_owned());
            }
        }
        if !known {
            self.tell_departing();
        }
        Ok(session)
    }

    fn tell_departing(&self) {
        self.event(
            EventKind::Departing,
            match self.storage_move() {
                None => {
                    "a new site prepares to take the disk over; the VM still runs here".to_owned()
                }
                Some(to) => format!(
                    "the disk is being copied to {to}; until the switch it is here as before"
                ),
            },
        );
    }

    // A return before all is here

    /// Whether this old copy is still needed here: it is the one that the disk comes from.
    fn needs(&self, base: Option<MoveId>) -> bool {
        base.is_some() && base == self.way_back.own_id() && !self.is_local()
    }

    fn needed_copy(&self) -> OldCopy {
        let block = self.geometry.block_bytes();
        OldCopy::Needed {
            block_bytes: u32::try_from(block).unwrap_or(u32::MAX),
        }
    }

    /// A session of the site that the disk comes from and that still has what is missing here. It
    /// copies nothing ahead, so nothing is marked for it: what differs is told after the handoff.
    fn begin_return(&self, id: MoveId) -> Result<Arc<Session>, String> {
        self.need_state_for_a_move()?;
        let mut session = Session::new(id, self.geometry).map_err(|e| e.to_string())?;
        session.needed = true;
        if self.departures.find(id).is_none() {
            self.tell_departing();
        }
        Ok(self.departures.open(session))
    }

    /// While a return stands by, the rests of blocks come at once: its handoff will wait until no block is
    /// here in part.
    pub(super) fn tick_return(&self, relocation: &Arc<Relocation>) {
        if self.departures.returns_early() {
            relocation.need_rests();
        }
    }

    /// As much as comes while the VM still writes, which may write more.
    ///
    /// # Errors
    /// So much is left that it would not come in as much time without the VM either, which need not wait
    /// for that.
    fn complete_most_partials(&self) -> Result<(), String> {
        let partials = || {
            self.unfinished()
                .map_or(0, |r| r.residency.partial_blocks())
        };
        let before = partials();
        let Err(why) = self.complete_partials(REST_LIMIT) else {
            return Ok(());
        };
        let left = partials();
        match left > before.saturating_sub(left).max(REST_FEW) {
            true => Err(why),
            false => Ok(()),
        }
    }

    /// Waits until no block is here in part, since its rest cannot be fetched any more once the disk
    /// has gone back.
    fn complete_partials(&self, limit: Duration) -> Result<(), String> {
        let Some(relocation) = self.unfinished() else {
            return Ok(());
        };
        let begun = self.now();
        loop {
            let partials = relocation.residency.partial_blocks();
            if partials == 0 {
                return Ok(());
            }
            if self.now().saturating_sub(begun) >= limit {
                return Err(format!(
                    "{partials} blocks that were written in part still wait for their rest from the \
                     old copy ({}), and the disk cannot go back before they have it",
                    if relocation.is_source_usable() {
                        "which answers"
                    } else {
                        "which cannot be reached"
                    }
                ));
            }
            relocation.need_rests();
            pause_for(REST_BEAT);
        }
    }

    /// What the old copy lacks from a place on, after the handoff: exactly, and durable here.
    fn tell_differs(&self, id: MoveId, base: MoveId, from: u64) -> Result<Told, String> {
        if self.departures.departed().is_none_or(|d| d.to != id) {
            return Err("the disk has not been handed over to you".to_owned());
        }
        let comes_from_it = self.way_back.own_id() == Some(base);
        if !comes_from_it && !self.is_local() {
            return Err("the disk did not come here from that old copy".to_owned());
        }
        let mut runs = if comes_from_it {
            self.departures.went_back.store(true, Ordering::Release);
            self.differs_exactly(from, limits::TOLD_RANGES)?
        } else {
            // It has become whole since the return began, and has moved on, to another image maybe. The
            // fence is closed by now, and there must be a way on: all of it is here.
            vec![self.blocks_from(from)]
        };
        let more = runs.len() > limits::TOLD_RANGES;
        runs.truncate(limits::TOLD_RANGES);
        // All that is told was marked before; with this it is durable.
        self.commit().map_err(|e| {
            format!("what has come here could not be made durable, so it cannot be told: {e}")
        })?;
        let bytes = |run: &BlockRange| self.geometry.bytes(*run);
        Ok(Told::Differs {
            ranges: runs.iter().map(bytes).collect(),
            more,
        })
    }

    /// The disk has gone back to where it came from before all of it was here.
    pub(super) fn went_back(&self) -> bool {
        self.has_departed() && self.departures.went_back.load(Ordering::Acquire)
    }

    fn need_state_for_a_move(&self) -> Result<(), String> {
        self.need_state().map_err(|e| {
            format!("the handoff could not be recorded at this source, so it cannot begin: {e}")
        })
    }

    /// The durable state, made now if there is none: a fence must outlive a restart.
    fn need_state(&self) -> Result<(), StateError> {
        let mut journal = lock(&self.journal);
        if journal.state.is_none()
            && !self.read_only
            && let Some(make) = &self.departures.make_state
        {
            journal.state = Some(make()?);
        }
        Ok(())
    }

    /// The handoff: from here on the VM runs elsewhere.
    fn depart(&self, id: MoveId, epoch: u64) -> Result<Told, String> {
        let _deciding = lock(&self.departures.deciding);
        if self.life() == LifeState::Standby || self.has_given_up() {
            return Err("the disk has not arrived at this source itself".to_owned());
        }
        if self.read_only && !self.has_departed() {
            // Nobody writes here; but somebody has, once, and may not have waited for the medium.
            self.commit()
                .map_err(|error| format!("the disk could not be made durable here: {error}"))?;
            return Ok(self.fenced(id, epoch));
        }
        let departed = self.departures.departed().map(|d| d.to);
        let given_up = self.is_off(id);
        match handover::handoff(departed, id, given_up).map_err(|e| e.to_string())? {
            Handoff::Repeat => {}
            // Every connection that asks for it has attached; anything else is no move.
            Handoff::Close => {
                let Some(session) = self.departures.find(id) else {
                    return Err(
                        "this move has not attached here, so nothing is handed over".to_owned()
                    );
                };
                self.need_state().map_err(|e| e.to_string())?;
                self.await_nothing_owed()?;
                if session.needed {
                    self.complete_most_partials()?;
                }
                self.departures.gate.close();
                crash_point!("fence.closed");
                if session.needed
                    && let Err(why) = self.complete_partials(REST_LIMIT)
                {
                    self.departures.gate.open();
                    return Err(why);
                }
                if let Err(error) = self.record_departure(id) {
                    // Only where it is known that nothing was recorded; a poisoned volume takes no
                    // writes anyway, and says what is to be done.
                    self.departures.gate.open();
                    return Err(format!("the fence could not be made durable: {error}"));
                }
                crash_point!("fence.recorded");
                let back = session.needed && !self.is_local();
                self.departures.went_back.store(back, Ordering::Release);
                self.event(
                    EventKind::Departed,
                    match self.storage_move() {
                        None => "handoff: the disk has moved on; nothing is written here from now on"
                            .to_owned(),
                        Some(to) => format!(
                            "the switch: the disk is in {to} from now on; nothing is written to {} any \
                             more",
                            self.image.display()
                        ),
                    },
                );
                if let Some(relocation) = self.relocation() {
                    // What the new site needs it asks for.
                    relocation.with_mover_at(|mover, _| mover.pause());
                }
            }
        }
        // From here on the answer may be on its way. Whatever held it up, it was asked for before.
        *lock(&self.departures.answered) = Some(boot::running_for());
        Ok(self.fenced(id, epoch))
    }

    /// A destination says what only one says that has taken the disk over, durably.
    fn is_taken_by(&self, id: MoveId) {
        if self.departures.departed().is_some_and(|d| d.to == id) {
            self.departures.taken.store(true, Ordering::Release);
        }
    }

    /// Whether it is known that the disk was taken over where it departed to.
    pub(super) fn is_known_to_be_taken(&self) -> bool {
        self.has_departed() && self.departures.taken.load(Ordering::Acquire)
    }

    /// In what time the fence may be lifted by hand; `None`: now, or there is none.
    pub(super) fn release_in(&self) -> Option<Duration> {
        let answered = (*lock(&self.departures.answered)).filter(|_| self.has_departed());
        handover::release_in(answered, self.is_known_to_be_taken(), boot::running_for())
    }

    /// As if the time had passed after which no answer to a handoff counts: a seam for tests.
    pub(crate) fn let_answers_grow_old(&self) {
        lock(&self.departures.answered).take();
    }

    fn fenced(&self, id: MoveId, epoch: u64) -> Told {
        let session = self.departures.find(id).filter(|s| s.epoch == epoch);
        Told::Fenced {
            generation: self.generation(),
            ranges: session.map(|session| session.last_changes()),
        }
    }

    fn record_departure(&self, id: MoveId) -> io::Result<()> {
        let mut journal = lock(&self.journal);
        self.commit_locked(&mut journal)?;
        crash_point!("fence.synced");
        let departure = Departure {
            to: id,
            image_mtime: self.store.modified().unwrap_or(None),
            intact: true,
        };
        if let Some(state) = journal.state.as_mut() {
            let storage = lock(&self.departures.storage).clone();
            let moved_to = storage.filter(|s| s.0 == id).map(|s| s.1.to_string());
            let outcome = state.change(|identity| {
                identity.ties.departed = Some(departure);
                identity.ties.moved_to = moved_to;
            });
            self.note_state("recording the departure", outcome)?;
        }
        self.set_departed(Some(departure));
        Ok(())
    }

    fn set_departed(&self, departure: Option<Departure>) {
        *lock(&self.departures.departed) = departure;
        self.departures.taken.store(false, Ordering::Release);
        let departed = departure.is_some();
        self.departures
            .has_departed
            .store(departed, Ordering::Release);
        // A connection that was made before the handoff says that its move stands by, which once
        // the fence is lifted would be welcome.
        if !departed {
            let next = self.departures.version.load(Ordering::Acquire) + 1;
            self.departures.ends_before.store(next, Ordering::Release);
        }
        self.departures.version.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether a move was given up, or released by hand: that one however many were given up since.
    fn is_off(&self, id: MoveId) -> bool {
        lock(&self.departures.given_up).contains(&id) || self.released() == Some(id)
    }

    /// A destination has given up, durably, before it took a write: all is as before.
    fn abort_departure(&self, id: MoveId) -> Result<Told, String> {
        let _deciding = lock(&self.departures.deciding);
        self.departures.refuse_from_now_on(id);
        let known = self.departures.find(id).is_some();
        self.departures.close(id);
        self.speed_up(id);
        let departed = self.departures.departed().map(|d| d.to);
        if handover::abort(departed, id) {
            self.lift_fence(None).map_err(|e| e.to_string())?;
        } else if known {
            self.departures.version.fetch_add(1, Ordering::AcqRel);
        }
        if known || departed == Some(id) {
            // Of a move at this site the new volume says so, in the same place.
            if self.storage_move().is_none() {
                self.event(
                    EventKind::MoveGivenUp,
                    "the new site has given the move up; the disk stays here, as before",
                );
            }
        }
        Ok(Told::Fine)
    }

    /// Lifts the fence. `released`: by hand, against this move.
    ///
    /// # Errors
    /// It is not recorded; the fence stays.
    fn lift_fence(&self, released: Option<MoveId>) -> io::Result<()> {
        {
            let mut journal = lock(&self.journal);
            if let Some(state) = journal.state.as_mut() {
                let outcome = state.change(|identity| {
                    identity.ties.departed = None;
                    identity.ties.moved_to = None;
                    identity.ties.released = released.or(identity.ties.released);
                    // Where this was a return that was given up, its source was to be told so. It is
                    // of no account now, and must not take writes again because of that.
                    identity.ties.gave_up &= released.is_none();
                });
                self.note_state("recording that the fence is lifted", outcome)?;
            }
            crash_point!("fence.lifted");
            // Whoever still reads for the move is cut off before the first write.
            self.set_departed(None);
        }
        self.departures.arrived.store(false, Ordering::Release);
        self.departures.went_back.store(false, Ordering::Release);
        if let Some(relocation) = self.relocation() {
            relocation.drive(|m, now, out| m.resume(now, &relocation.residency, out));
        }
        self.departures.gate.open();
        Ok(())
    }

    /// Lifts the fence because a person says that the other copy is of no account.
    ///
    /// # Errors
    /// There is none, whoever asked for it may still take the disk by an answer that is on its way, or it
    /// could not be recorded.
    pub(super) fn release_fence(&self) -> io::Result<()> {
        let _deciding = lock(&self.departures.deciding);
        let Some(departure) = self.departures.departed() else {
            return Err(io::Error::other("there is no fence here"));
        };
        if let Some(left) = self.release_in() {
            return Err(io::Error::other(format!(
                "the handoff was answered a moment ago (or this was restarted), and the new site may still \
                 take that answer: wait for {} s",
                left.as_secs() + 1
            )));
        }
        let taken = self.is_known_to_be_taken();
        // Its VM may be waiting there for the answer to a handoff that did not get through. This
        // one is older by now than what is written here.
        self.departures.close(departure.to);
        self.lift_fence(Some(departure.to))?;
        self.departures.refuse_from_now_on(departure.to);
        self.event(
            EventKind::FenceLifted,
            format!(
                "the fence was lifted by hand: writes are accepted here again; what was written at the new \
                 site is not here. {}",
                if taken {
                    "That site HAS TAKEN THE DISK OVER, and where it still runs it goes on writing to its \
                     own copy: end its VM and its daemon, or make sure that they are gone, before a VM is \
                     started here"
                } else {
                    "That site has not said that it took the disk over, since this runs, and cannot any \
                     more; but it may have, and not have been heard: `hikkoshi status` there must not say \
                     arriving or local, or it must be gone, before a VM is started here"
                }
            ),
        );
        Ok(())
    }

    /// The last move whose fence was lifted by hand.
    pub(super) fn released(&self) -> Option<MoveId> {
        let journal = lock(&self.journal);
        let state = journal.state.as_ref()?;
        state.identity().ties.released
    }

    fn tell_bases(&self, id: MoveId) -> Result<Told, String> {
        if self.departures.departed().is_none_or(|d| d.to != id) {
            return Err("the disk has not been handed over to you".to_owned());
        }
        let bases = self.bases().into_iter().take(limits::TOLD_BASES);
        let geometry = self.geometry;
        let told = bases.map(|(id, runs)| {
            let runs = coarsened(runs, limits::TOLD_RANGES);
            (id, runs.iter().map(|run| geometry.bytes(*run)).collect())
        });
        Ok(Told::Bases(told.collect()))
    }

    fn generation(&self) -> u64 {
        let journal = lock(&self.journal);
        journal
            .state
            .as_ref()
            .map_or(0, |state| state.identity().generation)
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::{Engine, ExportConfig, Packing, Prepare, StorageOrder, Transport};
    use crate::export::Export;
    use crate::registry::Controlled as _;
    use hikkoshi_engine::geometry::BlockIndex;

    /// A question waited in the network while the connection it went over was given up and the next
    /// two were asked over another. It took away what the one after these was to be told, and the
    /// destination kept a block that had changed.
    #[test]
    fn a_question_that_comes_late_takes_no_changes_away() {
        let geometry = Geometry::new(1 << 20, 4096).unwrap();
        let session = Session::new([1; 16], geometry).unwrap();
        let change = |block| session.map.mark(BlockRange::one(BlockIndex(block)));
        change(1);
        assert_eq!(session.changes(1).unwrap().len(), 1);
        // Its answer was lost: the same again.
        assert_eq!(session.changes(1).unwrap().len(), 1);
        assert_eq!(session.changes(2).unwrap(), []);
        change(2);
        assert_eq!(session.changes(1), None);
        assert_eq!(session.changes(4), None);
        let told = session.changes(3).unwrap();
        assert_eq!(told, [geometry.bytes(BlockRange::one(BlockIndex(2)))]);
    }

    /// A question that came late took the changes away between the two steps of the answer to the handoff,
    /// and nobody was told of them.
    #[test]
    fn a_question_that_comes_during_the_handoff_takes_no_changes_away() {
        // So many that the two are at it at the same time.
        let geometry = Geometry::new(1 << 28, 4096).unwrap();
        let changed = (0..geometry.blocks()).step_by(2);
        let changed: Vec<_> = changed.map(|b| BlockRange::one(BlockIndex(b))).collect();
        for _ in 0..100 {
            let session = Session::new([1; 16], geometry).unwrap();
            changed.iter().for_each(|run| session.map.mark(*run));
            let together = std::sync::Barrier::new(2);
            let told = std::thread::scope(|scope| {
                let last = scope.spawn(|| {
                    together.wait();
                    session.last_changes()
                });
                together.wait();
                session.changes(1);
                last.join().unwrap()
            });
            assert!(told == session.bytes_of(&changed), "{} runs", told.len());
        }
    }

    /// The session of a return, which says nothing between its start and its handoff, was the first to go
    /// when others came, and its handoff was refused.
    #[test]
    fn others_that_come_do_not_push_a_return_out() {
        let geometry = Geometry::new(1 << 20, 4096).unwrap();
        let departures = Departures::default();
        let session = |id: u8, needed| Session {
            needed,
            ..Session::new([id; 16], geometry).unwrap()
        };
        departures.open(session(1, true));
        for id in 2..20 {
            departures.open(session(id, false));
        }
        assert!(departures.find([1; 16]).is_some());
        assert_eq!(departures.sessions().len(), MAX_SESSIONS);
    }

    /// A disk that is here, made at the first start.
    pub(in crate::volume) fn plain(dir: &tempfile::TempDir) -> Arc<Export> {
        let image = dir.path().join("old");
        if !image.exists() {
            std::fs::write(&image, [7; 1 << 20]).unwrap();
        }
        Export::open(&ExportConfig {
            name: String::new(),
            image,
            state_dir: None,
            block_bytes: 4096,
            read_only: false,
            engine: Engine::Threads,
            transport: Transport::Auto,
            compress: Packing::Auto,
            source: None,
        })
        .unwrap()
    }

    /// So many moves were given up after one was released by hand that this one was forgotten: its first
    /// write, which still waited, fenced the VM that had gone on here.
    #[test]
    fn a_move_that_was_released_stays_refused_however_many_are_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let export = plain(&dir);
        let (volume, id) = (export.volume(), [6; 16]);
        let mut bound = Bound::default();
        let stance = Stance::Standby;
        let attach = Tell::Attach {
            id,
            stance,
            epoch: 0,
            base: None,
        };
        volume.answer(attach, &mut bound);
        let handoff = Tell::Handoff { id, epoch: 0 };
        let told = volume.answer(handoff, &mut bound);
        assert!(matches!(told, Told::Fenced { .. }), "{told:?}");
        volume.let_answers_grow_old();
        export.release(true).unwrap();
        for other in 0..=u8::try_from(MAX_GIVEN_UP).unwrap() {
            let id = [100 + other; 16];
            volume.answer(Tell::Abort { id }, &mut bound);
        }
        let told = volume.answer(attach, &mut bound);
        let said = HandedOver::Never;
        assert!(
            matches!(told, Told::Attached(a) if a.handed_over == said),
            "{told:?}"
        );
        let told = volume.answer(handoff, &mut bound);
        assert!(
            matches!(&told, Told::Refused(why) if why.contains("`hikkoshi abort`")),
            "{told:?}"
        );
        export.close().unwrap();
    }

    /// After a change of storage that had come to nothing, writes that met the gate of another site's handoff
    /// were made again and again until that was recorded, as fast as each client's processor could.
    #[test]
    fn a_write_that_another_site_keeps_out_is_refused_and_not_made_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let export = plain(&dir);
        let volume = export.volume();
        volume.begin_switch();
        volume.end_switch(None);
        // One that was kept out by that switch is made again here.
        assert!(volume.awaits_switch());
        volume.departures.gate.close();
        assert!(!volume.awaits_switch());
        volume.departures.gate.open();
        export.close().unwrap();
    }

    /// A new site attached while a change of storage began, and was the first to have the disk. The export
    /// served the new image from then on, and the new site found what it still needed no more.
    #[test]
    fn a_disk_that_another_site_has_taken_is_not_switched() {
        let dir = tempfile::tempdir().unwrap();
        let export = plain(&dir);
        let slowly = StorageOrder {
            image: dir.path().join("new"),
            state_dir: None,
            prepare: Prepare::Ahead,
            max_rate: Some(1),
            overwrite: false,
        };
        export.move_storage(&slowly).unwrap();
        let (old, id) = (export.volume(), [6; 16]);
        // Its question had been looked at before.
        old.begin_session(id, None, &mut Attached::default())
            .unwrap();
        let mut bound = Bound::default();
        let told = old.answer(Tell::Handoff { id, epoch: 0 }, &mut bound);
        assert!(matches!(told, Told::Fenced { .. }), "{told:?}");
        assert!(export.handoff().is_err());
        assert!(Arc::ptr_eq(&export.volume(), &old));
        let attach = Tell::Attach {
            id,
            stance: Stance::Arriving,
            epoch: 0,
            base: None,
        };
        let told = export.volume().answer(attach, &mut bound);
        assert!(
            matches!(told, Told::Attached(a) if a.handed_over == HandedOver::Already),
            "{told:?}"
        );
        export.close().unwrap();
    }
}
