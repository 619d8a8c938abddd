//! A disk that changes its storage under clients that stay: a daemon in this process, on real files.
#![allow(clippy::unwrap_used)]

#[path = "site/guest.rs"]
mod guest;
#[path = "site/late.rs"]
mod late;
mod site;
#[path = "../../wan/tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use guest::Guest;
use hikkoshi_daemon::config::{
    Engine, ExportConfig, HandoffPolicy, Packing, Prepare, StorageOrder, Transport,
};
use hikkoshi_daemon::events::EventKind;
use hikkoshi_daemon::export::Export;
use hikkoshi_daemon::registry::CommandError;
use hikkoshi_daemon::status::{LifeState, StorageMoveStatus, StoragePhase};
use hikkoshi_daemon::volume::storage::source::ImageSource;
use hikkoshi_wan::Source;
use late::{assert_is_released, release_by_hand};
use site::{On, Site, Wanted};
use support::{pattern, wait_until};
use tempfile::TempDir;

const SIZE: usize = 8 << 20;

fn order(image: &Path) -> StorageOrder {
    StorageOrder {
        image: image.to_owned(),
        state_dir: None,
        prepare: Prepare::Ahead,
        max_rate: None,
        overwrite: false,
    }
}

fn told(site: &Site) -> StorageMoveStatus {
    site.status().storage_move.unwrap()
}

fn phase(site: &Site) -> StoragePhase {
    told(site).phase
}

fn done(site: &Site) {
    wait_until("all is in the new image", || {
        assert_ne!(phase(site), StoragePhase::Failed, "{:?}", told(site));
        phase(site) == StoragePhase::Done
    });
}

fn refusal(site: &Site, order: &StorageOrder) -> String {
    match site.export().move_storage(order) {
        Err(CommandError::Conflict(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

/// Clients that write, read what they wrote, and flush, each in a part of its own, until they are
/// stopped.
struct Busy {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<u8>>>,
}

const CLIENTS: usize = 3;
const PART: usize = SIZE / CLIENTS / 4096 * 4096;

impl Busy {
    fn on(site: &Site, data: &[u8]) -> Self {
        let (stop, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let threads = (0..CLIENTS)
            .map(|n| {
                let guest = Guest::connect(&site.address());
                let mut known = data[n * PART..(n + 1) * PART].to_vec();
                let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
                std::thread::spawn(move || {
                    work(guest, n, &mut known, &stop, &rounds);
                    known
                })
            })
            .collect();
        Self {
            stop,
            rounds,
            threads,
        }
    }

    /// Until every client has gone round often enough to have met everything.
    fn go_on(&self) {
        let until = self.rounds.load(Ordering::Relaxed) + 50 * CLIENTS as u64;
        wait_until("clients go on", || {
            self.rounds.load(Ordering::Relaxed) >= until
        });
    }

    /// What the disk must hold.
    fn end(self, data: &mut [u8]) {
        self.stop.store(true, Ordering::Relaxed);
        for (n, thread) in self.threads.into_iter().enumerate() {
            data[n * PART..(n + 1) * PART].copy_from_slice(&thread.join().unwrap());
        }
    }
}

fn work(mut guest: Guest, n: usize, known: &mut [u8], stop: &AtomicBool, rounds: &AtomicU64) {
    let base = (n * PART) as u64;
    let mut dice = 0x9e37_79b9_u64 + base;
    let mut throw = |end: usize| {
        dice = dice.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        usize::try_from(dice >> 33).unwrap() % end
    };
    let mut round = 0_u8;
    while !stop.load(Ordering::Relaxed) {
        round = round.wrapping_add(1);
        let at = throw(PART / 512 - 40) * 512;
        let len = (1 + throw(40)) * 512;
        match throw(8) {
            0 => {
                guest.zero(base + at as u64, u32::try_from(len).unwrap());
                known[at..at + len].fill(0);
            }
            1 => guest.flush(),
            2 | 3 => {
                let bytes = guest.read(base + at as u64, len);
                assert!(bytes == known[at..at + len], "client {n} at {at}");
            }
            4 => {
                known[at..at + len].fill(round);
                guest.write_fua(base + at as u64, &known[at..at + len]);
            }
            _ => {
                known[at..at + len].fill(round);
                guest.write(base + at as u64, &known[at..at + len]);
            }
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads all of the disk through the daemon.
fn disk(site: &Site) -> Vec<u8> {
    let mut guest = Guest::connect(&site.address());
    let step = 1 << 20;
    (0..SIZE)
        .step_by(step)
        .flat_map(|at| guest.read(at as u64, step))
        .collect()
}

fn names(dir: &TempDir) -> (PathBuf, PathBuf) {
    (dir.path().join("a"), dir.path().join("b"))
}

#[test]
fn clients_notice_nothing_there_and_back() {
    let dir = TempDir::new().unwrap();
    let (a, b) = names(&dir);
    let mut data = pattern(SIZE);
    let site = Site::with(dir.path(), "a", &data, On::Unix);
    let busy = Busy::on(&site, &data);
    let mut idle = Guest::connect(&site.address());
    let mut to_and_fro = 0;
    for prepare in [Prepare::Ahead, Prepare::None, Prepare::Full] {
        for image in [&b, &a] {
            busy.go_on();
            let mut order = order(image);
            order.prepare = prepare;
            // From the second time on there is an old copy.
            order.overwrite = to_and_fro > 0;
            site.export().move_storage(&order).unwrap();
            done(&site);
            busy.go_on();
            let status = site.status();
            assert_eq!(status.image, image.display().to_string());
            assert_eq!(status.state, LifeState::Local);
            assert_eq!(status.clients, CLIENTS as u64 + 1);
            assert!(told(&site).switch_us.is_some());
            to_and_fro += 1;
        }
    }
    busy.end(&mut data);
    // It slept through all of them.
    assert!(idle.read(0, SIZE / 4) == data[..SIZE / 4]);
    assert!(disk(&site) == data);
    site.stop();
    assert!(std::fs::read(&a).unwrap() == data);
    let site = Site::start(dir.path(), "a", Wanted::plain(On::Unix));
    assert!(disk(&site) == data);
}

#[test]
fn the_old_image_is_let_go_of_and_refused() {
    let dir = TempDir::new().unwrap();
    let (a, b) = names(&dir);
    let data = pattern(SIZE);
    let site = Site::with(dir.path(), "a", &data, On::Unix);
    // Its thread holds the old volume until it hears something.
    let mut idle = Guest::connect(&site.address());
    site.export().move_storage(&order(&b)).unwrap();
    done(&site);
    let events = site.export().events(0);
    let kinds: Vec<_> = events.iter().map(|event| event.kind).collect();
    for kind in [
        EventKind::Departing,
        EventKind::Handoff,
        EventKind::Complete,
        EventKind::Departed,
    ] {
        assert!(kinds.contains(&kind), "{kind:?} is not in {kinds:?}");
    }
    assert!(events.windows(2).all(|w| w[0].number + 1 == w[1].number));
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let holds = |fd: std::fs::DirEntry| {
        let target = std::fs::read_link(fd.path()).unwrap_or_default();
        target == a || target.starts_with(dir.path().join("a.hikkoshi"))
    };
    assert!(!open.flatten().any(holds), "it is still open");
    // Another daemon could have it; but it says where the disk is.
    let why = Site::try_start(dir.path(), "a", Wanted::plain(On::Tcp))
        .err()
        .unwrap();
    assert!(
        why.contains(&format!("hikkoshi serve {}", b.display())),
        "{why}"
    );
    idle.write(0, &[7; 512]);
    assert_eq!(idle.read(0, 512), [7; 512]);
    site.stop();
    assert!(
        std::fs::read(&a).unwrap() == data,
        "the old image has changed"
    );
    // Once it is in no state any more, it is an image like any other.
    std::fs::remove_dir_all(dir.path().join("a.hikkoshi")).unwrap();
    assert!(Site::start(dir.path(), "a", Wanted::plain(On::Unix)).contents() == data);
}

#[test]
fn a_flush_after_the_switch_covers_what_was_written_before_it() {
    let dir = TempDir::new().unwrap();
    let (a, b) = names(&dir);
    let site = Site::with(dir.path(), "a", &pattern(SIZE), On::Unix);
    let mut guest = Guest::connect(&site.address());
    let mut order = order(&b);
    order.prepare = Prepare::None;
    order.max_rate = Some(1 << 20);
    guest.write(4096, &[1; 4096]);
    site.export().move_storage(&order).unwrap();
    wait_until("the switch", || phase(&site) == StoragePhase::Copying);
    // What was not flushed is on the old image's medium: its record came after its sync.
    let record = std::fs::read_to_string(dir.path().join("a.hikkoshi/volume")).unwrap();
    assert!(record.contains("\nmoved-to = image:"), "{record}");
    assert_eq!(std::fs::read(&a).unwrap()[4096..8192], [1; 4096]);
    guest.write(0, &[2; 4096]);
    guest.flush();
    assert_eq!(site.status().counters.flushes, 1);
    // Durable means here: recorded, so that without the memory of the process it is still there.
    let log = std::fs::read(dir.path().join("b.hikkoshi/log")).unwrap();
    assert!(log.starts_with(b"HKKLOG01"), "nothing is in the log");
}

#[test]
fn a_restart_in_the_middle_goes_on_by_itself() {
    let dir = TempDir::new().unwrap();
    let (a, b) = names(&dir);
    let mut data = pattern(SIZE);
    let site = Site::with(dir.path(), "a", &data, On::Unix);
    let mut order = order(&b);
    (order.prepare, order.max_rate) = (Prepare::None, Some(1 << 20));
    site.export().move_storage(&order).unwrap();
    wait_until("the switch", || phase(&site) == StoragePhase::Copying);
    let mut guest = Guest::connect(&site.address());
    guest.write(5 << 20, &[9; 4096]);
    data[5 << 20..(5 << 20) + 4096].fill(9);
    site.stop();
    let why = Site::try_start(dir.path(), "a", Wanted::plain(On::Unix))
        .err()
        .unwrap();
    assert!(why.contains("hikkoshi move"), "{why}");
    // Without the old image nothing is served: a part of the disk is there.
    let hidden = dir.path().join("hidden");
    std::fs::rename(&a, &hidden).unwrap();
    let why = Site::try_start(dir.path(), "b", Wanted::plain(On::Unix))
        .err()
        .unwrap();
    assert!(why.contains(&a.display().to_string()), "{why}");
    std::fs::rename(&hidden, &a).unwrap();
    let site = Site::start(dir.path(), "b", Wanted::plain(On::Unix));
    assert!(disk(&site) == data);
    done(&site);
    assert!(disk(&site) == data);
    site.stop();
    assert!(std::fs::read(&b).unwrap() == data);
    // It needs the old image no more, after another restart either.
    std::fs::remove_file(&a).unwrap();
    let site = Site::start(dir.path(), "b", Wanted::plain(On::Unix));
    assert!(site.is_local() && disk(&site) == data);
}

#[test]
fn before_the_switch_it_can_be_given_up_and_begun_again() {
    let dir = TempDir::new().unwrap();
    let (_, b) = names(&dir);
    let mut data = pattern(SIZE);
    let site = Site::with(dir.path(), "a", &data, On::Unix);
    let mut slowly = order(&b);
    slowly.max_rate = Some(256 << 10);
    site.export().move_storage(&slowly).unwrap();
    assert_eq!(site.status().limit_bytes_per_s, Some(256 << 10));
    let again = refusal(&site, &order(&dir.path().join("c")));
    assert!(again.contains("hikkoshi abort"), "{again}");
    let mut guest = Guest::connect(&site.address());
    guest.write(0, &[3; 512]);
    data[..512].fill(3);
    site.export().abort().unwrap();
    assert_eq!(phase(&site), StoragePhase::Failed);
    assert_eq!(site.status().state, LifeState::Local);
    assert!(!b.exists() && !dir.path().join("b.hikkoshi").exists());
    assert!(site.export().abort().is_err(), "there is nothing more");
    guest.write(512, &[4; 512]);
    data[512..1024].fill(4);
    // An image that was there before is left where it was.
    std::fs::File::create(&b)
        .unwrap()
        .set_len(SIZE as u64)
        .unwrap();
    site.export().move_storage(&slowly).unwrap();
    site.export().abort().unwrap();
    assert!(b.exists() && !dir.path().join("b.hikkoshi").exists());
    let mut over = slowly.clone();
    over.overwrite = true;
    site.export().move_storage(&over).unwrap();
    // A daemon that ends gives it up as well.
    site.stop();
    let site = Site::start(dir.path(), "a", Wanted::plain(On::Unix));
    site.export().move_storage(&over).unwrap();
    // Not waiting for what is slow to come.
    site.export().handoff().unwrap();
    assert_eq!(phase(&site), StoragePhase::Copying);
    let late = site.export().abort().unwrap_err().to_string();
    assert!(late.contains("too late"), "{late}");
    site.export().set_limit(None).unwrap();
    done(&site);
    assert!(disk(&site) == data);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let (a, b) = names(&dir);
    let data = pattern(SIZE);
    let site = Site::with(dir.path(), "a", &data, On::Unix);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&a, &link).unwrap();
    for same in [&a, &link] {
        let why = refusal(&site, &order(same));
        assert!(why.contains("already"), "{why}");
    }
    std::fs::write(&b, vec![1; SIZE]).unwrap();
    let why = refusal(&site, &order(&b));
    assert!(why.contains("--overwrite"), "{why}");
    let mut over = order(&b);
    over.overwrite = true;
    std::fs::write(&b, vec![1; SIZE - 4096]).unwrap();
    let why = refusal(&site, &over);
    assert!(why.contains("they must be the same"), "{why}");
    assert!(!dir.path().join("b.hikkoshi").exists());
    // Another process has it.
    std::fs::write(&b, vec![0; SIZE]).unwrap();
    let other = Site::with(dir.path(), "b", &vec![0; SIZE], On::Unix);
    assert!(site.export().move_storage(&over).is_err());
    other.stop();
    assert_eq!(site.status().state, LifeState::Local);

    // A destination prepares to take it over, and later still arrives.
    let mut wanted = Wanted::from(On::Unix, &site.uri());
    wanted.source().handoff = HandoffPolicy::Command;
    let there = Site::start(dir.path(), "there", wanted);
    let why = refusal(&site, &over);
    assert!(why.contains("a new site"), "{why}");
    let why = refusal(&there, &order(&dir.path().join("c")));
    assert!(why.contains("handoff"), "{why}");
    there.export().abort().unwrap();
    there.stop();
    for left in ["there", "there.hikkoshi"] {
        let left = dir.path().join(left);
        let _ = std::fs::remove_file(&left);
        let _ = std::fs::remove_dir_all(&left);
    }

    // And nobody copies it away while it changes its storage.
    let mut slowly = over.clone();
    slowly.max_rate = Some(64 << 10);
    site.export().move_storage(&slowly).unwrap();
    let wanted = Wanted::from(On::Unix, &site.uri());
    let why = Site::try_start(dir.path(), "there", wanted).err().unwrap();
    assert!(why.contains("changing its storage"), "{why}");
    site.export().set_limit(None).unwrap();
    done(&site);
    assert!(disk(&site) == data);
    // Now it can move on from there.
    let there = Site::start(dir.path(), "there", Wanted::from(On::Unix, &site.uri()));
    let mut idle = order(&dir.path().join("c"));
    idle.prepare = Prepare::None;
    if there.status().state == LifeState::Arriving {
        let why = refusal(&there, &idle);
        assert!(why.contains("still arriving") || there.is_local(), "{why}");
    }
    wait_until("all is there", || there.is_local());
    there.export().move_storage(&idle).unwrap();
    done(&there);
    assert!(disk(&there) == data);
}

#[test]
fn a_way_back_is_kept_over_a_change_of_storage() {
    let dir = TempDir::new().unwrap();
    let mut data = pattern(SIZE);
    let old_site = Site::with(dir.path(), "old", &data, On::Unix);
    let mut wanted = Wanted::from(On::Unix, &old_site.uri());
    wanted.source().way_back = true;
    let site = Site::start(dir.path(), "a", wanted);
    wait_until("every block is here", || site.is_local());
    let mut guest = Guest::connect(&site.address());
    guest.write(1 << 20, &[5; 4096]);
    data[1 << 20..(1 << 20) + 4096].fill(5);
    site.export()
        .move_storage(&order(&dir.path().join("b")))
        .unwrap();
    done(&site);
    assert!(site.status().way_back.kept);
    guest.write(2 << 20, &[6; 4096]);
    data[2 << 20..(2 << 20) + 4096].fill(6);
    old_site.stop();
    let mut back = Wanted::from(On::Unix, &site.uri());
    back.source().comes_back = true;
    let back = Site::start(dir.path(), "old", back);
    wait_until("every block is back", || back.is_local());
    assert!(back.contents() == data);
    assert!(back.status().wire_bytes < 1 << 20);
}

#[test]
fn the_old_image_conforms_as_a_source() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("a");
    let mut data = pattern(SIZE);
    data[3 << 20..5 << 20].fill(0);
    std::fs::write(&image, &data).unwrap();
    let export = Export::open(&ExportConfig {
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
    .unwrap();
    let source = ImageSource::start(&export.volume(), "image:/a".into()).unwrap();
    support::conforms(&*source, &data, &|| {});
    assert!(!source.is_connected(), "it was closed");
    export.close().unwrap();
}

/// A move whose fence was lifted by hand gets the disk no more, also from another image. It was forgotten
/// with the old one.
#[test]
fn a_move_that_was_released_by_hand_stays_so_over_a_change_of_storage() {
    let dir = TempDir::new().unwrap();
    let data = pattern(SIZE);
    let site = Site::with(dir.path(), "a", &data, On::Unix);
    release_by_hand(&site);
    site.export()
        .move_storage(&order(&dir.path().join("b")))
        .unwrap();
    done(&site);
    assert_is_released(&site);
    assert_eq!(site.status().state, LifeState::Local);
    assert!(disk(&site) == data);
}

/// With `--prepare full` the switch waited behind the command for what was not copied, and giving up and the
/// end of the daemon waited with it.
#[test]
fn a_switch_by_hand_waits_for_no_full_copy() {
    let dir = TempDir::new().unwrap();
    let (_, b) = names(&dir);
    let data = pattern(SIZE);
    let site = Site::with(dir.path(), "a", &data, On::Unix);
    let mut full = order(&b);
    (full.prepare, full.max_rate) = (Prepare::Full, Some(1));
    site.export().move_storage(&full).unwrap();
    site.export().pause().unwrap();
    let export = site.export();
    let (sender, switched) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(export.handoff().map_err(|e| e.to_string())));
    let outcome = switched.recv_timeout(Duration::from_secs(60));
    assert_eq!(outcome, Ok(Ok(())));
    assert_eq!(phase(&site), StoragePhase::Copying);
    site.export().set_limit(None).unwrap();
    site.export().resume().unwrap();
    done(&site);
    assert!(disk(&site) == data);
}
