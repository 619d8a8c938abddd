//! Requests of clients: which ones are asked, and what their answers promise.

use std::sync::Arc;

use hikkoshi_daemon::volume::relocation::Relocation;
use hikkoshi_engine::geometry::ByteRange;
use hikkoshi_store::ZeroMode;

use crate::client::{self, Answer, Ask};
use crate::oracle::{NEVER, Value};
use crate::plan::SECTOR;
use crate::world::{Request, World, sector_of};

/// The error of a write before a handoff by command.
const EPERM: i32 = 1;

const SECTOR_BYTES: u64 = SECTOR as u64;

fn index(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX)
}

impl World {
    /// A client asks something.
    pub fn ask_something(&mut self) {
        let sim = Arc::clone(&self.sim);
        let client = sim.chance(|rng| rng.index(self.plan.clients));
        let fua = sim.below(8) == 0;
        let bytes = self.place();
        let ask = match sim.below(100) {
            0..=29 => Ask::Read(if sim.below(4) == 0 {
                self.unaligned(bytes)
            } else {
                bytes
            }),
            30..=64 => {
                let bytes = if sim.below(12) == 0 {
                    self.unaligned(bytes)
                } else {
                    bytes
                };
                Ask::Write(bytes.start, self.payload(bytes), fua)
            }
            65..=70 => {
                let mode = sim.chance(|rng| {
                    rng.pick(&[ZeroMode::MayPunch, ZeroMode::Allocate, ZeroMode::FastOnly])
                });
                Ask::Zero(bytes, mode, fua)
            }
            71..=76 => Ask::Trim(bytes, fua),
            77..=95 => Ask::Flush,
            _ => Ask::Cache(bytes),
        };
        self.ask(client, ask, false);
    }

    /// A range of whole sectors, sometimes of whole blocks, often where others are.
    fn place(&mut self) -> ByteRange {
        let size = self.plan.geometry.size_bytes();
        let block = self.plan.geometry.block_bytes();
        let (longest, hot_sectors) = (self.plan.longest, self.plan.hot);
        self.sim.chance(|rng| {
            let sectors = size / SECTOR_BYTES;
            // Half of all requests meet in one part of the disk.
            let hot = if rng.permille(500) {
                hot_sectors.min(sectors)
            } else {
                sectors
            };
            let mut start = rng.below(hot) * SECTOR_BYTES;
            let mut len = (1 + rng.below(longest)) * SECTOR_BYTES;
            if rng.permille(300) {
                start = start / block * block;
                len = len.next_multiple_of(block);
            }
            ByteRange {
                start,
                end: (start + len).min(size),
            }
        })
    }

    fn unaligned(&mut self, bytes: ByteRange) -> ByteRange {
        self.sim.chance(|rng| {
            let start = bytes.start + rng.below(bytes.len().min(700));
            let len = 1 + rng.below(bytes.end - start);
            ByteRange::at(start, len)
        })
    }

    /// Bytes that nobody has written before; now and then zeroes.
    fn payload(&mut self, bytes: ByteRange) -> Vec<u8> {
        let len = index(bytes.len());
        if self.sim.below(15) == 0 {
            return vec![0; len];
        }
        let mut data = Vec::with_capacity(len);
        while data.len() < len {
            let sector = sector_of(self.sim.chance(|rng| rng.any()) | 1);
            data.extend_from_slice(&sector[..SECTOR.min(len - data.len())]);
        }
        data
    }

    /// A client asks this, with what it holds of the relocation.
    pub fn ask(&mut self, client: usize, ask: Ask, must_succeed: bool) {
        let Some(process) = &mut self.process else {
            return;
        };
        let Some(volume) = process.volume.clone() else {
            return;
        };
        // As the front end does between two batches.
        if self.sim.below(2) == 0 && volume.is_local() {
            process.clients[client] = None;
        }
        let relocation = process.clients[client].clone();
        let began = self.tick();
        let id = self.next_id;
        let Some(writes) = self.begin(id, &ask, relocation.as_ref()) else {
            return;
        };
        self.next_id += 1;
        let (what, place) = match &ask {
            Ask::Read(b) => ("ask read", *b),
            Ask::Write(at, data, _) => ("ask write", ByteRange::at(*at, data.len() as u64)),
            Ask::Zero(b, ..) => ("ask zero", *b),
            Ask::Trim(b, _) => ("ask trim", *b),
            Ask::Flush => ("ask flush", ByteRange::at(0, 0)),
            Ask::Cache(b) => ("ask cache", *b),
        };
        self.sim.note(what, id, place.start);
        self.sim.note("  bytes", id, place.len());
        let request = Request {
            ask: ask.clone(),
            began,
            writes,
            must_succeed,
        };
        self.requests.insert(id, request);
        self.set_oldest_read();
        let sim = Arc::clone(&self.sim);
        self.sim.spawn(
            "client",
            Box::new(move || client::serve(id, ask, volume, relocation.as_ref(), sim)),
        );
    }

    fn set_oldest_read(&mut self) {
        let reads = |r: &&Request| matches!(r.ask, Ask::Read(_));
        let began = self.requests.values().filter(reads).map(|r| r.began);
        self.oracle.set_oldest_read(began.min().unwrap_or(NEVER));
    }

    /// Enters what a request will write. `None`: nobody asks that now, because it would write part
    /// of a sector at the same time as another one.
    fn begin(
        &mut self,
        id: u64,
        ask: &Ask,
        relocation: Option<&Arc<Relocation>>,
    ) -> Option<Vec<(usize, bool)>> {
        let bytes = match ask {
            Ask::Write(at, data, _) => ByteRange::at(*at, data.len() as u64),
            Ask::Zero(bytes, ..) | Ask::Trim(bytes, _) => *bytes,
            Ask::Read(_) | Ask::Flush | Ask::Cache(_) => return Some(Vec::new()),
        };
        let sectors = bytes.start / SECTOR_BYTES..bytes.end.div_ceil(SECTOR_BYTES);
        let part = |s: u64| s * SECTOR_BYTES < bytes.start || (s + 1) * SECTOR_BYTES > bytes.end;
        let clash = sectors
            .clone()
            .any(|s| self.torn.contains(&index(s)) || part(s) && self.oracle.is_busy(index(s)));
        if clash {
            return None;
        }
        // What is surely given up by a trim: while blocks are missing only whole ones.
        let sure = match (ask, relocation) {
            (Ask::Trim(..), Some(_)) => {
                let geometry = self.plan.geometry;
                geometry.bytes(geometry.within(bytes))
            }
            _ => bytes,
        };
        self.touched |= !self.refuses_writes();
        let now = self.now;
        let mut writes = Vec::new();
        for sector in sectors {
            let (n, at) = (index(sector), sector * SECTOR_BYTES);
            writes.push((
                n,
                at < sure.start / SECTOR_BYTES * SECTOR_BYTES || at >= sure.end,
            ));
            match ask {
                Ask::Write(_, data, _) if part(sector) => {
                    self.torn.insert(n);
                    for value in self.oracle.candidates(n, now) {
                        self.oracle
                            .begin(n, id, merge(&value, at, bytes, data), now);
                    }
                }
                Ask::Write(_, data, _) => {
                    let start = index(at - bytes.start);
                    let value = data[start..start + SECTOR].try_into();
                    let value = value.expect("a whole sector of the payload");
                    self.oracle.begin(n, id, Arc::new(value), now);
                }
                _ => self.oracle.begin(n, id, Arc::new([0; SECTOR]), now),
            }
        }
        Some(writes)
    }

    /// A request was answered.
    pub fn answered(&mut self, id: u64, answer: Answer) -> Result<(), String> {
        let now = self.tick();
        let Some(request) = self.requests.remove(&id) else {
            return Err(format!("request {id} was answered twice"));
        };
        self.set_oldest_read();
        self.tally.answered += 1;
        for (sector, _) in &request.writes {
            self.torn.remove(sector);
        }
        match answer {
            Answer::Failed(errno) => {
                self.tally.failed += 1;
                self.sim
                    .note("failed", id, u64::from(errno.unwrap_or(0).unsigned_abs()));
                if request.must_succeed {
                    return Err(format!(
                        "{:?} failed ({errno:?}) when nothing was wrong any more",
                        shown(&request.ask)
                    ));
                }
                for (sector, _) in request.writes {
                    if errno == Some(EPERM) {
                        self.oracle.refused(sector, id);
                    } else {
                        self.oracle.uncertain(sector, id, now);
                    }
                }
                Ok(())
            }
            Answer::Data(data) => self.read_answered(id, &request, &data),
            Answer::Done => self.done(id, &request),
        }
    }

    fn read_answered(&mut self, id: u64, request: &Request, data: &[u8]) -> Result<(), String> {
        let Ask::Read(bytes) = request.ask else {
            return Err(format!(
                "request {id} was no read and was answered with data"
            ));
        };
        if data.len() as u64 != bytes.len() {
            return Err(format!(
                "{} bytes for a read of {}",
                data.len(),
                bytes.len()
            ));
        }
        let sum = data.iter().fold(0_u64, |sum, b| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*b))
        });
        self.sim.note("read", id, sum);
        let mut at = bytes.start;
        while at < bytes.end {
            let next = ((at / SECTOR_BYTES + 1) * SECTOR_BYTES).min(bytes.end);
            let seen = &data[index(at - bytes.start)..index(next - bytes.start)];
            let (sector, from) = (index(at / SECTOR_BYTES), index(at % SECTOR_BYTES));
            self.oracle
                .read(sector, from, seen, request.began, self.now)
                .map_err(|e| format!("request {id}: {e}"))?;
            at = next;
        }
        Ok(())
    }

    fn done(&mut self, id: u64, request: &Request) -> Result<(), String> {
        self.sim.note("done", id, 0);
        let durable = match request.ask {
            Ask::Write(_, _, fua) | Ask::Zero(_, _, fua) | Ask::Trim(_, fua) => fua,
            Ask::Flush => true,
            Ask::Read(_) | Ask::Cache(_) => false,
        };
        let failed_at = self.process.as_ref().and_then(|p| p.sync_failed_at);
        if durable && failed_at.is_some_and(|at| at < request.began) {
            return Err(format!(
                "{} was answered as durable after a sync had failed",
                shown(&request.ask)
            ));
        }
        if matches!(request.ask, Ask::Flush) {
            self.oracle.flushed(request.began);
            let volume = self.process.as_ref().and_then(|p| p.volume.as_ref());
            let needs_source = volume.is_some_and(|volume| !volume.is_local());
            if needs_source && self.server.owes_a_flush_of(request.began) {
                return Err(
                    "a flush was answered while what was written at the source is not durable there"
                        .into(),
                );
            }
        }
        if !request.writes.is_empty() {
            self.handed_off |= request.writes.iter().any(|(_, unsure)| !unsure);
        }
        let now = self.now;
        for &(sector, unsure) in &request.writes {
            if unsure {
                self.oracle.uncertain(sector, id, now);
            } else {
                self.oracle.written(sector, id, durable, now);
            }
        }
        Ok(())
    }
}

/// A sector of which a payload at `bytes` covers a part.
fn merge(value: &Value, at: u64, bytes: ByteRange, data: &[u8]) -> Value {
    let mut merged = **value;
    for (n, place) in (at..).zip(merged.iter_mut()) {
        if bytes.start <= n && n < bytes.end {
            *place = data[index(n - bytes.start)];
        }
    }
    Arc::new(merged)
}

/// A request without its payload.
fn shown(ask: &Ask) -> String {
    match ask {
        Ask::Write(at, data, fua) => format!("a write of {} bytes at {at}, fua {fua},", data.len()),
        other => format!("{other:?}"),
    }
}
