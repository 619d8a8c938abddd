//! Reads through io_uring: one ring and one thread for the whole process. Probed when first asked
//! for. Called by the file store's `submit_read`.
//!
//! The thread alone touches the ring: requests of a ring are bound to the task that made them, and
//! would be cancelled if a connection's thread made them and ended. Others put reads into a queue
//! and wake the thread through an eventfd. A buffer belongs to the thread from submission to
//! completion, together with the open image, whatever becomes of the store meanwhile.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use crate::ReadDone;
use crate::image::{Image, allocate};
use crate::pool::{self, Pool};
use crate::range::len_u64;

/// Reads in the ring at once. The completion queue is twice as large, so it never overflows.
const MAX_IN_FLIGHT: usize = 256;

/// Reads that may wait for a place in the ring; see the pool's bound of the same name.
const MAX_QUEUED: usize = 16 * 1024;

/// Bytes asked for in one entry; the kernel stops a little short of 2 GiB.
const MAX_ENTRY_BYTES: usize = 1 << 30;

/// Marks the completion of the wake-up read; reads use the index of their slot.
const WAKE: u64 = u64::MAX;

struct Read {
    image: Arc<Image>,
    offset: u64,
    len: usize,
    done: ReadDone,
}

#[derive(Default)]
struct Queue {
    reads: VecDeque<Read>,
    /// The thread has been woken and has not looked yet.
    woken: bool,
    /// The ring broke; reads go to the pool.
    broken: bool,
}

/// See the module.
pub(crate) struct Ring {
    queue: Mutex<Queue>,
    room: Condvar,
    wake: OwnedFd,
}

impl Ring {
    /// The ring of this process.
    ///
    /// # Errors
    /// Why there is none; the same for as long as the process lives.
    pub(crate) fn shared() -> io::Result<&'static Ring> {
        static RING: OnceLock<Result<Ring, Errno>> = OnceLock::new();
        static STARTED: OnceLock<Result<(), Errno>> = OnceLock::new();
        let errno = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::NOSYS);
        let ring = RING
            .get_or_init(|| Ring::new().map_err(errno))
            .as_ref()
            .map_err(|it| *it)?;
        (*STARTED.get_or_init(|| ring.start().map_err(errno)))?;
        Ok(ring)
    }

    fn new() -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self {
            queue: Mutex::default(),
            room: Condvar::new(),
            wake,
        })
    }

    /// Probes, and starts the thread. The ring is made on the thread that is to use it.
    fn start(&'static self) -> io::Result<()> {
        let (result_tx, result_rx) = std::sync::mpsc::sync_channel(1);
        thread::Builder::new()
            .name("store-uring".to_owned())
            .spawn(move || match build() {
                Ok(uring) => {
                    let _ = result_tx.send(Ok(()));
                    Reactor::new(self, uring).serve();
                }
                Err(error) => {
                    let _ = result_tx.send(Err(error));
                }
            })?;
        result_rx
            .recv()
            .unwrap_or_else(|_| Err(Errno::NOSYS.into()))
    }

    /// Has a range read that lies within the image. Returns at once unless [`MAX_QUEUED`] reads
    /// wait already.
    pub(crate) fn submit(&self, image: Arc<Image>, offset: u64, len: usize, done: ReadDone) {
        let mut queue = self.lock();
        while queue.reads.len() >= MAX_QUEUED && !queue.broken {
            queue = self
                .room
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let read = Read {
            image,
            offset,
            len,
            done,
        };
        if queue.broken {
            drop(queue);
            return read_in_pool(read);
        }
        queue.reads.push_back(read);
        let wake = !std::mem::replace(&mut queue.woken, true);
        drop(queue);
        if wake {
            self.wake();
        }
    }

    fn wake(&self) {
        // Fails only when the counter would overflow, and then the thread is awake.
        let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.wake, &1u64.to_ne_bytes()));
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn build() -> io::Result<IoUring> {
    let entries = u32::try_from(MAX_IN_FLIGHT * 2).expect("a small constant");
    let uring = IoUring::builder()
        .dontfork()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(entries)
        // Kernels before 6.1 do not know the flags.
        .or_else(|_| IoUring::builder().dontfork().build(entries))?;
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe)?;
    if !probe.is_supported(opcode::Read::CODE) || !uring.params().is_feature_nodrop() {
        return Err(Errno::OPNOTSUPP.into());
    }
    Ok(uring)
}

fn read_in_pool(read: Read) {
    let Read {
        image,
        offset,
        len,
        done,
    } = read;
    Pool::shared().submit(Box::new(move || done(image.read_vec(offset, len))));
}

/// A read in the ring, with its buffer; `buf.len()` is what has arrived.
struct InFlight {
    read: Read,
    buf: Vec<u8>,
}

/// The thread's side of the ring.
struct Reactor {
    ring: &'static Ring,
    uring: IoUring,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Where the kernel puts the eventfd's count; at an address of its own for as long as the ring
    /// is there.
    wake_count: Box<[u8; 8]>,
    wake_armed: bool,
}

impl Reactor {
    fn new(ring: &'static Ring, uring: IoUring) -> Self {
        Self {
            ring,
            uring,
            slots: (0..MAX_IN_FLIGHT).map(|_| None).collect(),
            free: (0..MAX_IN_FLIGHT).rev().collect(),
            wake_count: Box::new([0; 8]),
            wake_armed: false,
        }
    }

    fn serve(mut self) {
        loop {
            if !self.wake_armed {
                self.arm_wake();
            }
            self.take_queued();
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match Errno::from_io_error(&error) {
                    // Busy: completions must be taken first, which is what comes next.
                    Some(Errno::INTR | Errno::AGAIN | Errno::BUSY) => {}
                    _ => return self.give_up(&error),
                },
            }
            self.reap();
        }
    }

    fn arm_wake(&mut self) {
        let fd = types::Fd(self.ring.wake.as_raw_fd());
        let entry = opcode::Read::new(fd, self.wake_count.as_mut_ptr(), 8)
            .build()
            .user_data(WAKE);
        // SAFETY: the buffer of 8 bytes is boxed and the eventfd belongs to a static, so both
        // outlive the operation; `give_up` leaks the box when the kernel may still use it.
        unsafe { self.push(&entry) };
        self.wake_armed = true;
    }

    /// Moves queued reads into the ring, as many as there are places.
    fn take_queued(&mut self) {
        while let Some(slot) = self.free.pop() {
            let mut queue = self.ring.lock();
            // Whatever is queued from here on wakes the thread again.
            queue.woken = false;
            let was_full = queue.reads.len() >= MAX_QUEUED;
            let read = queue.reads.pop_front();
            drop(queue);
            if was_full {
                self.ring.room.notify_all();
            }
            let Some(read) = read else {
                self.free.push(slot);
                return;
            };
            match allocate(read.len) {
                Ok(buf) if read.len > 0 => {
                    self.slots[slot] = Some(InFlight { read, buf });
                    self.submit(slot);
                }
                nothing_to_read => {
                    self.free.push(slot);
                    pool::run(|| (read.done)(nothing_to_read));
                }
            }
        }
    }

    /// Asks for what is still missing of a slot's read.
    fn submit(&mut self, slot: usize) {
        let in_flight = self.slots[slot]
            .as_mut()
            .expect("called for slots in use only");
        let read = &in_flight.read;
        let have = in_flight.buf.len();
        let piece = (read.len - have).min(MAX_ENTRY_BYTES);
        let fd = types::Fd(read.image.file.as_raw_fd());
        let room = in_flight.buf.spare_capacity_mut().as_mut_ptr().cast::<u8>();
        let piece = u32::try_from(piece).expect("at most MAX_ENTRY_BYTES");
        let entry = opcode::Read::new(fd, room, piece)
            .offset(read.offset + len_u64(have))
            .build()
            .user_data(len_u64(slot));
        // SAFETY: `room` has at least `read.len - have` bytes, as the buffer was allocated with
        // `read.len`; buffer and descriptor stay in the slot until this entry's completion, and
        // `give_up` leaks the buffer when the completion will not be seen.
        unsafe { self.push(&entry) };
    }

    /// # Safety
    /// What the entry points to must stay valid until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: as the caller promises.
        unsafe { self.uring.submission().push(entry) }
            .expect("twice as many entries as slots, and each slot has one at most");
    }

    fn reap(&mut self) {
        loop {
            // One at a time, as a callback may take long and needs the reactor whole.
            let Some(completion) = self.uring.completion().next() else {
                return;
            };
            let result = completion.result();
            if completion.user_data() == WAKE {
                self.wake_armed = false;
                continue;
            }
            let slot = usize::try_from(completion.user_data()).expect("an index of ours");
            self.complete(slot, result);
        }
    }

    fn complete(&mut self, slot: usize, result: i32) {
        let in_flight = self.slots[slot]
            .as_mut()
            .expect("completions come once an entry");
        let result = match usize::try_from(result) {
            Ok(0) => Err(in_flight
                .read
                .image
                .unexpected_end(in_flight.read.offset + len_u64(in_flight.buf.len()))),
            Ok(got) => {
                let have = in_flight.buf.len() + got;
                assert!(
                    have <= in_flight.read.len,
                    "the kernel read more than was asked for"
                );
                // SAFETY: the kernel has just written the `got` bytes after the old length, and
                // the sum is within the capacity, which is at least `read.len`.
                unsafe { in_flight.buf.set_len(have) };
                Ok(have)
            }
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        if let Ok(have) = result
            && have < in_flight.read.len
        {
            return self.submit(slot); // a short read goes on where it stopped
        }
        let InFlight { read, buf } = self.slots[slot].take().expect("looked at above");
        self.free.push(slot);
        match result {
            // The kernel has finished with the buffer; what a ring cannot do, a thread can.
            Err(error) if is_transient(&error) => read_in_pool(read),
            result => pool::run(|| (read.done)(result.map(|_| buf))),
        }
    }

    /// The ring is of no more use. What is in it is read again by the pool: a read may be done
    /// twice. The kernel may still write to the old buffers, so they are never freed.
    fn give_up(mut self, error: &io::Error) {
        tracing::error!(%error, "io_uring failed; reads go on with threads");
        let mut queue = self.ring.lock();
        queue.broken = true;
        let queued = std::mem::take(&mut queue.reads);
        drop(queue);
        self.ring.room.notify_all();
        for InFlight { read, buf } in self.slots.drain(..).flatten() {
            std::mem::forget(buf);
            read_in_pool(read);
        }
        queued.into_iter().for_each(read_in_pool);
        std::mem::forget(self);
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INTR | Errno::AGAIN)
    )
}
