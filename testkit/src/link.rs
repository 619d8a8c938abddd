//! An emulated link between two sites: delay, rate, a bounded queue, loss, and a cut.
//!
//! Owns two TUN devices, one in each site's namespace, and a thread for each direction that
//! carries packets from one to the other. The two kernels speak their real TCP across it, with
//! its slow start, windows and retransmissions. Written because the `netem` queueing discipline
//! is not in every kernel that tests run on.
//!
//! Each direction is one first-in-first-out queue in front of a line of `bits_per_s`: a packet
//! leaves when those before it have, is lost when more than `queue_bytes` wait, and arrives half
//! a round trip after it left. Bytes are IP bytes, headers included.
//!
//! The kernel hands over a few TCP segments at once (`BURST_BYTES`), which saves most of the system
//! calls; they are charged, and lost by chance, as the packets they will become
//! (`burst.rs`). A burst for which the queue has no room is lost as a whole. And what comes in a row
//! is not taken in one by one (`MODERATION`), which saves wake-ups.

use crate::burst::Burst;
use crate::netns::{self, Namespace};
use crate::pattern::Random;
use crate::{process, tun};
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest run of TCP segments that comes as one packet: six of 1500 bytes. Small against
/// the queue of a real router, large enough to save most of the system calls.
const BURST_BYTES: &str = "9000";
/// The largest packet that IP allows, with the device's header.
const MAX_PACKET_BYTES: usize = 65_535 + tun::HEADER_BYTES;
/// How many packets are taken in before those that are due are sent again.
const READ_BATCH: usize = 64;
/// After something was taken in nothing is for so long, as a network card moderates its interrupts: a
/// packet that comes alone is taken in at once, and one of many up to this much later.
const MODERATION: Duration = Duration::from_micros(200);
/// The longest a thread sleeps before it looks whether it should stop or the link has changed.
const MAX_SLEEP: Duration = Duration::from_millis(20);
/// How often a thread notes how much CPU it has used.
const CPU_NOTE_INTERVAL: Duration = Duration::from_millis(10);
const NANOS_PER_S: u128 = 1_000_000_000;

/// What a link is like, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkSpec {
    /// The round trip of an empty link.
    pub rtt: Duration,
    /// The rate, in bits of IP packets a second. At least 1.
    pub bits_per_s: u64,
    /// What may wait in front of the line, in bytes. Less than a few packets passes nothing.
    pub queue_bytes: u64,
    /// The share of packets that is lost at random, 0.0 to 1.0.
    pub loss: f64,
}

impl LinkSpec {
    /// A link between cities: `rtt_ms` and `mbit_per_s`, a queue of one bandwidth-delay product
    /// but of 256 KiB at least, no loss.
    pub fn wan(rtt_ms: u64, mbit_per_s: u64) -> Self {
        let bits_per_s = mbit_per_s * 1_000_000;
        Self {
            rtt: Duration::from_millis(rtt_ms),
            bits_per_s,
            queue_bytes: (bits_per_s / 8 * rtt_ms / 1000).max(256 << 10),
            loss: 0.0,
        }
    }
}

/// What one direction has carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// IP bytes that arrived.
    pub bytes: u64,
    /// Packets that were lost: the queue was full, by chance, or the link was cut.
    pub lost: u64,
}

#[derive(Default)]
struct Counters {
    bytes: AtomicU64,
    lost: AtomicU64,
    cpu_nanos: AtomicU64,
    /// The kernel's number of the thread; 0 before it runs.
    thread: AtomicI32,
}

impl Counters {
    /// The emulator's thread, once it runs.
    fn thread(&self) -> i32 {
        loop {
            match self.thread.load(Ordering::Relaxed) {
                0 => std::thread::yield_now(),
                thread => return thread,
            }
        }
    }

    fn read(&self) -> Traffic {
        Traffic {
            bytes: self.bytes.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }
}

struct Shared {
    spec: Mutex<LinkSpec>,
    /// What the draws of losses begin with.
    seed: AtomicU64,
    /// How often they have begun.
    drawn_anew: AtomicU64,
    cut: AtomicBool,
    stop: AtomicBool,
    /// From the first site to the second, and back.
    counters: [Counters; 2],
}

impl Shared {
    fn spec(&self) -> MutexGuard<'_, LinkSpec> {
        // A copy is stored whole: it is right even if a thread that held it has panicked.
        self.spec.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A link between two sites. Removed when dropped.
pub struct Link {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The first site's address on this link.
    pub address_a: Ipv4Addr,
    /// The second site's address on this link.
    pub address_b: Ipv4Addr,
}

impl Link {
    /// Connects two sites.
    ///
    /// # Errors
    /// The TUN devices cannot be made or moved: not root, or no /dev/net/tun.
    pub fn new(a: &Namespace, b: &Namespace, spec: LinkSpec) -> Result<Self> {
        let (address_a, address_b) = netns::address_pair();
        let end_a = Arc::new(attach(a, address_a)?);
        let end_b = Arc::new(attach(b, address_b)?);
        let shared = Arc::new(Shared {
            spec: Mutex::new(spec),
            seed: AtomicU64::new(0),
            drawn_anew: AtomicU64::new(0),
            cut: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            counters: Default::default(),
        });
        let ways = [(0, &end_a, &end_b), (1, &end_b, &end_a)];
        let threads = ways
            .map(|(number, from, to)| {
                let way = Direction::new(number, from.clone(), to.clone(), shared.clone());
                std::thread::spawn(move || way.run())
            })
            .into();
        Ok(Self {
            shared,
            threads,
            address_a,
            address_b,
        })
    }

    /// Changes what the link is like from now on; what is under way arrives as it would have.
    pub fn set(&self, spec: LinkSpec) {
        *self.shared.spec() = spec;
    }

    /// Which packets are lost at random is drawn anew from the next one on: with the same seed, the same ones of
    /// each direction. Zero at first.
    pub fn draw_losses(&self, seed: u64) {
        self.shared.seed.store(seed, Ordering::Relaxed);
        self.shared.drawn_anew.fetch_add(1, Ordering::Release);
    }

    /// What the link is like.
    pub fn spec(&self) -> LinkSpec {
        *self.shared.spec()
    }

    /// Loses every packet from now on, those under way too.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::Relaxed);
    }

    /// Ends a [`Link::cut`].
    pub fn restore(&self) {
        self.shared.cut.store(false, Ordering::Relaxed);
    }

    /// CPU time that the emulator's threads have used, as of a few milliseconds ago.
    pub fn cpu_time(&self) -> Duration {
        let counters = self.shared.counters.iter();
        let nanos = counters.map(|counters| counters.cpu_nanos.load(Ordering::Relaxed));
        Duration::from_nanos(nanos.sum())
    }

    /// Lets the emulator's threads run before everything else on the machine: a packet that is
    /// carried late is a longer round trip, which a measurement would blame on somebody else.
    ///
    /// # Errors
    /// The kernel forbids it, as containers may.
    pub fn run_first(&self) -> Result<()> {
        for counters in &self.shared.counters {
            let thread = counters.thread().to_string();
            process::run("chrt", ["--fifo", "--pid", "1", &thread])
                .context("give the link's emulator real-time priority")?;
        }
        Ok(())
    }

    /// Keeps the emulator's threads, and the TCP of both kernels that they run, to these cores.
    ///
    /// # Errors
    /// The kernel forbids it.
    pub fn run_on(&self, cores: &[usize]) -> Result<()> {
        let list: Vec<String> = cores.iter().map(ToString::to_string).collect();
        for counters in &self.shared.counters {
            let thread = counters.thread().to_string();
            process::run("taskset", ["--cpu-list", "--pid", &list.join(","), &thread])
                .context("keep the link's emulator to some cores")?;
        }
        Ok(())
    }

    /// What was carried from the first site to the second.
    pub fn a_to_b(&self) -> Traffic {
        self.shared.counters[0].read()
    }

    /// What was carried from the second site to the first.
    pub fn b_to_a(&self) -> Traffic {
        self.shared.counters[1].read()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has printed why.
            let _ = thread.join();
        }
    }
}

/// Makes a TUN device, moves it into `site` and gives it `address`.
fn attach(site: &Namespace, address: Ipv4Addr) -> Result<OwnedFd> {
    let name = format!("hk{}n{}", std::process::id(), netns::unique());
    let fd = tun::open(&name)?;
    crate::process::run("ip", ["link", "set", &name, "netns", site.name()])?;
    site.ip(&["address", "add", &format!("{address}/24"), "dev", &name])?;
    site.ip(&[
        "link",
        "set",
        &name,
        "mtu",
        "1500",
        "gso_max_size",
        BURST_BYTES,
        "up",
    ])?;
    Ok(fd)
}

/// The draws of a direction.
fn draws(seed: u64, number: usize) -> Random {
    Random::new(2 * seed + u64::from(number > 0))
}

struct Waiting {
    due: Instant,
    packet: Vec<u8>,
    wire_bytes: u64,
}

/// One direction, with its queue.
struct Direction {
    number: usize,
    from: Arc<OwnedFd>,
    to: Arc<OwnedFd>,
    shared: Arc<Shared>,
    /// When the line has sent all that was accepted so far.
    line_free: Instant,
    under_way: VecDeque<Waiting>,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
    random: Random,
    /// The count of beginnings that it belongs to.
    drawn_anew: u64,
    cpu_noted: Instant,
    /// When it may take in packets again.
    listens_at: Instant,
}

impl Direction {
    fn new(number: usize, from: Arc<OwnedFd>, to: Arc<OwnedFd>, shared: Arc<Shared>) -> Self {
        Self {
            number,
            from,
            to,
            shared,
            line_free: Instant::now(),
            under_way: VecDeque::new(),
            spare: Vec::new(),
            random: draws(0, number),
            drawn_anew: 0,
            cpu_noted: Instant::now(),
            listens_at: Instant::now(),
        }
    }

    fn run(mut self) {
        let mut buffer = vec![0; MAX_PACKET_BYTES];
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let counters = &self.shared.counters[self.number];
        counters.thread.store(thread, Ordering::Relaxed);
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.deliver();
            self.sleep();
            self.accept(&mut buffer);
        }
    }

    /// Sends what is due.
    fn deliver(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.cpu_noted) > CPU_NOTE_INTERVAL {
            self.cpu_noted = now;
            self.note_cpu();
        }
        while self.under_way.front().is_some_and(|first| first.due <= now) {
            let Some(Waiting {
                packet, wire_bytes, ..
            }) = self.under_way.pop_front()
            else {
                break;
            };
            let counters = &self.shared.counters[self.number];
            // A device that is down or gone refuses the packet: for TCP it is lost.
            if self.shared.cut.load(Ordering::Relaxed)
                || rustix::io::write(&*self.to, &packet).is_err()
            {
                counters.lost.fetch_add(1, Ordering::Relaxed);
            } else {
                counters.bytes.fetch_add(wire_bytes, Ordering::Relaxed);
            }
            self.spare.push(packet);
        }
    }

    /// Waits until a packet comes and may be taken in, or one is due.
    fn sleep(&self) {
        let now = Instant::now();
        let deaf_for = self.listens_at.saturating_duration_since(now);
        let first = self.under_way.front();
        let until_due = first.map_or(MAX_SLEEP, |first| first.due.saturating_duration_since(now));
        let mut comes = [PollFd::from_borrowed_fd(self.from.as_fd(), PollFlags::IN)];
        let (heard, longest) = match deaf_for.is_zero() {
            true => (&mut comes[..], MAX_SLEEP),
            false => (&mut [][..], deaf_for),
        };
        let wait = until_due.min(longest);
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: wait.subsec_nanos().into(),
        };
        // Whatever it says, the loop looks at everything again.
        let _ = poll(heard, Some(&timeout));
    }

    /// Takes in what has come, if it is time.
    fn accept(&mut self, buffer: &mut [u8]) {
        let now = Instant::now();
        if now < self.listens_at {
            return;
        }
        let spec = *self.shared.spec();
        for _ in 0..READ_BATCH {
            let Ok(len) = rustix::io::read(&*self.from, &mut *buffer) else {
                return;
            };
            self.listens_at = now + MODERATION;
            self.enqueue(&buffer[..len], spec);
        }
    }

    fn enqueue(&mut self, packet: &[u8], spec: LinkSpec) {
        let burst = Burst::of(packet);
        let now = Instant::now();
        let busy = self.line_free.max(now);
        let queued =
            busy.duration_since(now).as_nanos() * u128::from(spec.bits_per_s) / (8 * NANOS_PER_S);
        if queued + u128::from(burst.wire_bytes) > u128::from(spec.queue_bytes)
            || self.shared.cut.load(Ordering::Relaxed)
        {
            self.count_lost(burst.segments);
            return;
        }
        if spec.loss <= 0.0 {
            self.send(packet, burst.wire_bytes, now, spec);
            return;
        }
        let drawn_anew = self.shared.drawn_anew.load(Ordering::Acquire);
        if drawn_anew != self.drawn_anew {
            self.random = draws(self.shared.seed.load(Ordering::Relaxed), self.number);
            self.drawn_anew = drawn_anew;
        }
        // What is left when some of its packets are lost: runs of those between them.
        let mut start = 0;
        for segment in 0..=burst.segments {
            let lost = segment < burst.segments && self.draw() < spec.loss;
            if lost {
                self.count_lost(1);
            }
            if lost || segment == burst.segments {
                if start < segment {
                    let part = burst.cut(packet, start..segment);
                    self.send(&part, Burst::of(&part).wire_bytes, now, spec);
                }
                start = segment + 1;
            }
        }
    }

    /// Puts on the line what is not lost.
    fn send(&mut self, packet: &[u8], wire_bytes: u64, now: Instant, spec: LinkSpec) {
        let nanos = u128::from(wire_bytes) * 8 * NANOS_PER_S / u128::from(spec.bits_per_s.max(1));
        let nanos = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.line_free = self.line_free.max(now) + nanos;
        let mut copy = self.spare.pop().unwrap_or_default();
        copy.clear();
        copy.extend_from_slice(packet);
        // Never before the one in front of it, even if the round trip has just been shortened.
        let due =
            (self.line_free + spec.rtt / 2).max(self.under_way.back().map_or(now, |last| last.due));
        self.under_way.push_back(Waiting {
            due,
            packet: copy,
            wire_bytes,
        });
    }

    fn count_lost(&self, packets: usize) {
        let lost = &self.shared.counters[self.number].lost;
        lost.fetch_add(u64::try_from(packets).unwrap_or(0), Ordering::Relaxed);
    }

    fn note_cpu(&self) {
        let used = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let seconds = u64::try_from(used.tv_sec).unwrap_or(0);
        let nanos = seconds * 1_000_000_000 + u64::try_from(used.tv_nsec).unwrap_or(0);
        let noted = &self.shared.counters[self.number].cpu_nanos;
        noted.store(nanos, Ordering::Relaxed);
    }

    /// A number from 0.0 up to, not including, 1.0.
    fn draw(&mut self) -> f64 {
        f64::from(u32::try_from(self.random.next() >> 32).unwrap_or(u32::MAX)) / 4_294_967_296.0
    }
}
