//! Since when this machine runs: what was written and not made durable is lost when that ends.

use std::fs;
use std::sync::OnceLock;
use std::time::Duration;

use hikkoshi_wan::transport::session::BootId;

const PATH: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel's boot id. `None` where it cannot be read: then nobody is told when it changes.
pub(crate) fn of_this_machine() -> Option<BootId> {
    static BOOT: OnceLock<Option<BootId>> = OnceLock::new();
    *BOOT.get_or_init(|| {
        let read = fs::read_to_string(PATH);
        let boot = read.as_deref().ok().and_then(parse);
        if boot.is_none() {
            tracing::warn!(
                "{PATH} cannot be read, so a site that this disk moves to cannot tell whether this \
                 machine has lost its power before the handoff; make /proc readable"
            );
        }
        boot
    })
}

/// For how long this machine has run, sleep included: what another machine may have waited meanwhile.
pub(crate) fn running_for() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // The kernel gives neither a negative time nor one of more than a second below the second.
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let now = Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or_default());
    #[cfg(test)]
    let now = now + tests::AHEAD.get();
    now
}

/// A UUID as the kernel writes it.
fn parse(text: &str) -> Option<BootId> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let right = digits.len() == 32 && digits.is_ascii();
    let number = u128::from_str_radix(&digits, 16).ok().filter(|_| right)?;
    Some(number.to_be_bytes())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// How much more time has passed, for a thread of a test.
        pub(crate) static AHEAD: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    #[test]
    fn the_boot_of_this_machine_is_known_and_stays() {
        let boot = of_this_machine();
        assert!(boot.is_some_and(|boot| boot != [0; 16]));
        assert_eq!(boot, of_this_machine());
    }

    #[test]
    fn what_is_no_uuid_is_no_boot() {
        let text = "01234567-89ab-cdef-0123-456789abcdef\n";
        assert_eq!(
            parse(text).map(|boot| boot[..2].to_vec()),
            Some(vec![1, 0x23])
        );
        for wrong in ["", "01234567", "x1234567-89ab-cdef-0123-456789abcdef"] {
            assert_eq!(parse(wrong), None);
        }
    }
}
