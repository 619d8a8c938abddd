//! A destination that asks for the handoff and does nothing else.
#![allow(dead_code, reason = "not every test does all of it")]

use std::time::Duration;

use hikkoshi_wan::transport::session::{MoveId, Stance, Tell, Told};
use hikkoshi_wan::{MoveLine, MoveLink, SourceError, SourceErrorKind, Ticket};

use crate::site::Site;

/// Far longer than any disk takes to sync.
const PATIENCE: Duration = Duration::from_secs(60);

/// What `site` says to a destination with this id, whose question may have waited for a link for long.
pub fn handoff_to(site: &Site, id: MoveId) -> Result<Told, SourceError> {
    let mut config = site.client();
    config.ticket = Some(Ticket::new(id, None, Stance::Standby, true));
    MoveLine::new(config).tell(&Tell::Handoff { id, epoch: 0 }, PATIENCE)
}

/// One that is handed the disk, and released against by hand.
pub const RELEASED: MoveId = [0x55; 16];

pub fn release_by_hand(site: &Site) {
    let told = handoff_to(site, RELEASED);
    assert!(matches!(told, Ok(Told::Fenced { .. })), "{told:?}");
    site.daemon.let_answers_grow_old();
    site.export().release(true).expect("there is a fence");
    assert_is_released(site);
}

/// It asks late, and gets nothing.
pub fn assert_is_released(site: &Site) {
    let error = handoff_to(site, RELEASED).expect_err("the disk was handed over");
    assert_eq!(error.kind, SourceErrorKind::Refused, "{error}");
}
