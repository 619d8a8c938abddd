//! The place of an export in a daemon, from the daemon's start on: the export, or what it waits for.
//!
//! What is known here is opened, and served, wherever its source is. A disk that was never here cannot
//! be: only the source knows how large it is, and a client must be told at once, in the handshake. Such an
//! export is opened again and again until its source is there. Meanwhile it has a place, so that it can
//! be asked about, and nobody else waits for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use hikkoshi_engine::heat::HeatMap;
use hikkoshi_engine::sync::wait_for;

use crate::config::{ExportConfig, StorageOrder};
use crate::events::{Event, EventKind, EventLog, unix_ms};
use crate::export::Export;
use crate::registry::{CommandError, Controlled};
use crate::status::{BackgroundState, Counters, ExportStatus, LifeState, WaitingStatus};
use crate::verification::VerifyStatus;
use crate::volume::open::{OpenError, is_first_start};
use crate::volume::{Volume, lock};

/// The pauses before a source that is away is tried again: the first, and the longest. It costs a
/// connection to nobody, and an operator who has just mended something looks on.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// How far an export is.
#[derive(Debug)]
pub(crate) enum Stage {
    /// It is being opened, for the first time.
    Opening,
    /// Its source is away: it is tried again. The last error, as below.
    Waits(Option<OpenError>),
    /// It is served.
    Open,
    /// It cannot be served. The error is taken by whoever tells it.
    Failed(Option<OpenError>),
}

/// Rings whenever a slot has come further.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<()>,
    heard: Condvar,
}

impl Bell {
    fn ring(&self) {
        drop(lock(&self.rung));
        self.heard.notify_all();
    }

    /// Waits until it rings, or for `most`; returns in vain as well.
    pub fn wait(&self, most: Duration) {
        let rung = lock(&self.rung);
        drop(wait_for(&self.heard, &self.rung, rung, most));
    }
}

/// An export's place.
pub struct Slot {
    name: String,
    image: String,
    source: Option<String>,
    /// Nothing of the disk is here yet.
    is_first_start: bool,
    export: OnceLock<Arc<Export>>,
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
    /// Until the volume is there, which keeps its events here then.
    events: EventLog,
}

struct State {
    stage: Stage,
    /// When the first attempt failed.
    since: Option<(Instant, u64)>,
    attempts: u64,
    last_error: String,
    /// The daemon serves without it: what goes wrong now does not end it.
    is_late: bool,
}

impl Slot {
    /// For an export that is to be opened.
    pub(crate) fn new(config: &ExportConfig) -> Self {
        Self::with(
            config.name.clone(),
            config.image.display().to_string(),
            config.source.as_ref().map(|source| source.uri.clone()),
            is_first_start(config),
        )
    }

    fn with(name: String, image: String, source: Option<String>, is_first_start: bool) -> Self {
        Self {
            name,
            image,
            source,
            is_first_start,
            export: OnceLock::new(),
            state: Mutex::new(State {
                stage: Stage::Opening,
                since: None,
                attempts: 0,
                last_error: String::new(),
                is_late: false,
            }),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
            events: EventLog::default(),
        }
    }

    /// Of a volume that somebody else opened and closes.
    pub(crate) fn of(volume: Arc<Volume>) -> Self {
        let image = volume.image().display().to_string();
        let slot = Self::with(volume.name().to_owned(), image, None, false);
        let _ = slot.export.set(Export::of(volume));
        lock(&slot.state).stage = Stage::Open;
        slot
    }

    /// The export's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image, for people.
    pub(crate) fn image(&self) -> &str {
        &self.image
    }

    /// The export, once it is open.
    pub fn export(&self) -> Option<&Arc<Export>> {
        self.export.get()
    }

    /// Nothing of the disk was here when the daemon started, so nobody can rely on it yet.
    pub(crate) fn is_first_start(&self) -> bool {
        self.is_first_start
    }

    /// Looks at how far it is.
    pub(crate) fn look<T>(&self, at: impl FnOnce(&mut Stage) -> T) -> T {
        at(&mut lock(&self.state).stage)
    }

    /// From here on it is alone with what goes wrong. What has gone wrong before is in its stage.
    pub(crate) fn leave_alone(&self) {
        lock(&self.state).is_late = true;
    }

    /// Ends what is tried. What is open is closed by its owner.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        drop(lock(&self.state));
        self.changed.notify_all();
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// What it waits for, in few words.
    pub(crate) fn waits_for(&self) -> Option<String> {
        let status = self.status();
        let waiting = status.waiting?;
        let source = status.source.unwrap_or_default();
        Some(format!(
            "{:?} waits for its source {source}: {}",
            self.name, waiting.last_error
        ))
    }

    /// Opens it, on the calling thread, however often that takes; `join` is called once with what was
    /// opened. `patient`: a handoff that is to happen at the start is waited for however long.
    pub(crate) fn open(
        &self,
        config: &ExportConfig,
        patient: bool,
        bell: &Bell,
        join: &dyn Fn(&Arc<Export>),
    ) {
        let mut pause = FIRST_PAUSE;
        while !self.is_stopping() {
            let goes_on = match Export::open(config) {
                Ok(export) => {
                    self.opened(&export, patient, join);
                    false
                }
                Err(error) => self.failed(error),
            };
            bell.ring();
            if !goes_on {
                return;
            }
            self.rest(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut state = lock(&self.state);
        while !self.is_stopping() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = wait_for(&self.changed, &self.state, state, left);
        }
    }

    fn opened(&self, export: &Arc<Export>, patient: bool, join: &dyn Fn(&Arc<Export>)) {
        let volume = export.volume();
        {
            let _state = lock(&self.state);
            if self.is_stopping() {
                // Nobody knows of it but us.
                if let Err(error) = export.close() {
                    tracing::warn!("{} could not be closed cleanly: {error}", self.image);
                }
                return;
            }
            volume.keep_events_in(&self.events);
            join(export);
            let _ = self.export.set(Arc::clone(export));
        }
        let first = volume.await_first_handoff(patient, &|| self.is_stopping());
        let mut state = lock(&self.state);
        state.stage = match first {
            // Later what stands in the way is told, and it is asked again and again.
            Err(error) if !state.is_late => Stage::Failed(Some(OpenError::Handoff(error))),
            _ => Stage::Open,
        };
    }

    /// Whether it is tried again.
    fn failed(&self, error: OpenError) -> bool {
        let mut state = lock(&self.state);
        if !error.is_source_away() && !state.is_late {
            state.stage = Stage::Failed(Some(error));
            return false;
        }
        let text = error.to_string();
        let is_news = state.since.is_none() || !error.is_source_away() && state.last_error != text;
        state.stage = Stage::Waits(Some(error));
        state
            .since
            .get_or_insert_with(|| (Instant::now(), unix_ms()));
        state.attempts += 1;
        state.last_error.clone_from(&text);
        drop(state);
        if is_news {
            self.events.add(
                &self.name,
                EventKind::Waiting,
                format!(
                    "{} is not served yet, and is tried again: {text}",
                    self.image
                ),
            );
        }
        true
    }

    fn waiting(&self) -> Option<WaitingStatus> {
        let state = lock(&self.state);
        let (since, since_unix_ms) = state.since?;
        Some(WaitingStatus {
            since_unix_ms,
            waited_s: since.elapsed().as_secs(),
            attempts: state.attempts,
            last_error: state.last_error.clone(),
        })
    }

    /// Of an export that is not open.
    fn own_status(&self) -> ExportStatus {
        let waiting = self.waiting();
        let note = match &waiting {
            None => "it is being opened".to_owned(),
            Some(waiting) => format!(
                "not served yet, since its source is needed for that (attempts: {}, in {} s; the last one: \
                 {}); it is tried again by itself: see to the source and to the link; where \
                 the address is wrong, correct it and restart the daemon: nothing has begun here",
                waiting.attempts, waiting.waited_s, waiting.last_error
            ),
        };
        ExportStatus {
            export: self.name.clone(),
            size_bytes: 0,
            state: LifeState::Opening,
            resident_bytes: 0,
            owned_bytes: 0,
            absent_bytes: 0,
            wire_bytes: 0,
            seeded_bytes: 0,
            codec: None,
            source_connected: waiting.as_ref().map(|_| false),
            source_down_s: waiting.as_ref().map(|waiting| waiting.waited_s),
            waiting,
            reads_waiting: 0,
            poisoned: false,
            disk_full: false,
            prepared: None,
            ahead_bytes: 0,
            repeated_bytes: 0,
            old_copy_needed: false,
            taken_over: None,
            release_in_s: None,
            way_back: Default::default(),
            background: BackgroundState::Idle,
            rate_bytes_per_s: 0,
            eta_s: None,
            limit_bytes_per_s: None,
            common_limit_bytes_per_s: None,
            image: self.image.clone(),
            storage_move: None,
            source: self.source.clone(),
            notes: vec![note],
            clients: 0,
            counters: Counters::default(),
        }
    }

    fn need(&self) -> Result<&Arc<Export>, CommandError> {
        self.export().ok_or_else(|| {
            CommandError::Conflict(format!(
                "export {:?} is not served yet; `hikkoshi status` says what it waits for",
                self.name
            ))
        })
    }
}

impl Controlled for Slot {
    fn status(&self) -> ExportStatus {
        match self.export() {
            Some(export) => export.status(),
            None => self.own_status(),
        }
    }

    fn heat(&self) -> HeatMap {
        match self.export() {
            Some(export) => export.heat(),
            None => HeatMap {
                size_bytes: 0,
                region_bytes: 0,
                decayed_at_s: 0,
                regions: Vec::new(),
            },
        }
    }

    fn pause(&self) -> Result<(), CommandError> {
        self.need()?.pause()
    }

    fn resume(&self) -> Result<(), CommandError> {
        self.need()?.resume()
    }

    fn set_limit(&self, bytes_per_s: Option<u64>) -> Result<(), CommandError> {
        self.need()?.set_limit(bytes_per_s)
    }

    fn handoff(&self) -> Result<(), CommandError> {
        self.need()?.handoff()
    }

    fn abort(&self) -> Result<(), CommandError> {
        self.need()?.abort()
    }

    fn release(&self, force: bool) -> Result<(), CommandError> {
        self.need()?.release(force)
    }

    fn move_storage(&self, order: &StorageOrder) -> Result<(), CommandError> {
        self.need()?.move_storage(order)
    }

    fn events(&self, since: u64) -> Vec<Event> {
        self.events.since(since)
    }

    fn verify(&self, accept: bool) -> Result<VerifyStatus, CommandError> {
        self.need()?.verify(accept)
    }

    fn verification(&self) -> VerifyStatus {
        match self.export() {
            Some(export) => export.verification(),
            None => VerifyStatus {
                export: self.name.clone(),
                ..VerifyStatus::default()
            },
        }
    }
}
