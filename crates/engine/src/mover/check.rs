//! What comparing with the source may cost.
//!
//! The caller decides what is compared; here is when it may ask. It shares the cap with the
//! background copy, since that is also there to spare the source, and the window, if data crosses
//! the link for it: so it gives way to demand as the background copy does.

use std::time::Duration;

use super::Mover;

impl<W> Mover<W> {
    /// Whether so many bytes of the source may be compared now. If so they count, and one of
    /// [`Mover::check_landed`] and [`Mover::check_lost`] is to follow if they cross the link.
    pub fn admit_check(&mut self, now: Duration, bytes: u64, over_link: bool) -> bool {
        let room = self.connected && self.bucket.has_room(now);
        if !room || (over_link && !self.pacer.may_send()) {
            return false;
        }
        self.bucket.take(bytes);
        if over_link {
            self.pacer.sent(bytes);
        }
        true
    }

    /// Data that crossed the link to be compared has come after `rtt`.
    pub fn check_landed(&mut self, now: Duration, rtt: Duration, bytes: u64) {
        self.pacer.landed(now, rtt, bytes, bytes);
    }

    /// Data that was to be compared will not come.
    pub fn check_lost(&mut self, bytes: u64) {
        self.pacer.lost(bytes);
    }
}
