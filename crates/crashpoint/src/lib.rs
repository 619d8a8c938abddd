//! Named points in the order that durability needs, at which a test lets the process kill itself.
//!
//! `crash_point!("commit.synced")` stands between two steps. Without the feature `armed` it is
//! nothing, not even a branch; with it, the process sends itself SIGKILL at the point and the
//! passing that `arm` named. Every name is in [`NAMES`], which the crash sweep visits one by one;
//! a name that is not there does not compile.

/// All points, in the order of a volume's life. What each stands behind is said where it stands.
pub const NAMES: &[&str] = &[
    // A new volume.
    "new.image",
    "log.written",
    "log.synced",
    "log.renamed",
    "log.done",
    "map.written",
    "map.synced",
    "map.renamed",
    "map.done",
    "volume.written",
    "volume.synced",
    "volume.renamed",
    "volume.done",
    "new.state",
    "new.memory",
    "new.published",
    "new.tagged",
    // The handoff.
    "handoff.begun",
    "handoff.recorded",
    "handoff.done",
    // Guests' writes.
    "write.marked",
    "write.written",
    "change.written",
    "change.marked",
    "mark.marked",
    "mark.owned-half",
    "mark.partial-mask",
    "mark.partial-slot",
    // Blocks that arrive.
    "install.written",
    "install.marked",
    "install.merged",
    "install.zeroed",
    // A commit.
    "commit.taken",
    "commit.synced",
    "commit.appended",
    "commit.recorded",
    "commit.done",
    // What proves that the source is the same.
    "witnesses.written",
    "witnesses.synced",
    "witnesses.renamed",
    "witnesses.done",
    // A snapshot, also when the log is long.
    "snapshot.copied",
    "snapshot.synced",
    "snapshot.done",
    "snapshot-due.begun",
    "snapshot-due.done",
    // An orderly end, and the next start.
    "close.committed",
    "close.recorded",
    "close.forgotten",
    "open.incarnation",
    "open.memory",
    "open.loaded",
    "open.published",
    "open.recorded",
    "open.tagged",
    // Completion, and the start of what is complete.
    "completion.begun",
    "completion.committed",
    "completion.recorded",
    "completion.map-removed",
    "completion.log-removed",
    "completion.memory-removed",
    "completion.tag-removed",
    "local.recorded",
    "local.memory-removed",
    "local.tag-removed",
];

/// The points of a move between two daemons of ours; those of the source begin with `fence`.
pub const MOVE_NAMES: &[&str] = &[
    "fence.closed",
    "fence.synced",
    "fence.recorded",
    "fence.lifted",
    "prepare.written",
    "takeover.fenced",
    "lacking.written",
    "lacking.synced",
    "lacking.renamed",
    "lacking.done",
    "handoff.lacking",
    "handoff.taken",
    "give-up.recorded",
    "way-back.ended",
    "overwritten.written",
    "overwritten.synced",
    "overwritten.renamed",
    "overwritten.done",
    "return.begun",
    "storage.switched",
    "storage.released",
];

/// Whether there is a point of this name.
pub const fn is_known(name: &str) -> bool {
    is_in(NAMES, name) || is_in(MOVE_NAMES, name)
}

const fn is_in(names: &[&str], name: &str) -> bool {
    let mut n = 0;
    while n < names.len() {
        if equal(names[n].as_bytes(), name.as_bytes()) {
            return true;
        }
        n += 1;
    }
    false
}

const fn equal(a: &[u8], b: &[u8]) -> bool {
    let mut n = 0;
    while n < a.len() && n < b.len() {
        if a[n] != b[n] {
            return false;
        }
        n += 1;
    }
    a.len() == b.len()
}

/// Passes a point: `crash_point!("commit.synced")`, or, where one piece of code writes several
/// files, `crash_point!(file, ".written")`.
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {{
        const _: () = assert!($crate::is_known($name), "no such crash point");
        $crate::pass!($name, "");
    }};
    ($file:expr, $step:literal) => {
        $crate::pass!($file, $step)
    };
}

/// What [`crash_point`] does when it is nothing.
#[cfg(not(feature = "armed"))]
#[doc(hidden)]
#[macro_export]
macro_rules! pass {
    ($name:expr, $step:expr) => {};
}

/// What [`crash_point`] does when it is something.
#[cfg(feature = "armed")]
#[doc(hidden)]
#[macro_export]
macro_rules! pass {
    ($name:expr, $step:expr) => {
        $crate::armed::pass($name, $step)
    };
}

#[cfg(feature = "armed")]
pub use armed::arm;

#[cfg(feature = "armed")]
#[doc(hidden)]
pub mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Order {
        name: String,
        nth: u64,
        passed: AtomicU64,
    }

    static ORDER: OnceLock<Order> = OnceLock::new();

    /// Takes `NAME:N`: the process kills itself when it passes the point for the n-th time.
    ///
    /// # Errors
    /// There is no such point, or the order makes no sense.
    pub fn arm(order: &str) -> Result<(), String> {
        let (name, nth) = order.split_once(':').unwrap_or((order, "1"));
        if !super::is_known(name) {
            return Err(format!("there is no crash point {name:?}"));
        }
        let nth = nth
            .parse()
            .map_err(|_| format!("{nth:?} is no number of a passing"))?;
        let order = Order {
            name: name.to_owned(),
            nth,
            passed: AtomicU64::new(0),
        };
        ORDER
            .set(order)
            .map_err(|_| "a crash point was named before".to_owned())
    }

    /// A point, its name in two parts.
    #[inline]
    pub fn pass(name: &str, step: &str) {
        if let Some(order) = ORDER.get()
            && order.name.strip_prefix(name) == Some(step)
            && order.passed.fetch_add(1, Ordering::Relaxed) + 1 == order.nth
        {
            // Should it fail, the sweep notes that the point was not reached.
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{NAMES, is_known};

    #[test]
    fn names_are_found_and_are_different() {
        for (n, name) in NAMES.iter().enumerate() {
            assert!(is_known(name));
            assert!(!NAMES[..n].contains(name), "{name} is there twice");
        }
        for other in ["", "commit", "commit.synced ", "commit.sync"] {
            assert!(!is_known(other));
        }
    }
}
