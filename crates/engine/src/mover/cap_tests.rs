//! Disks under one cap, and what is copied before the handoff among them: who gets how much.
#![allow(clippy::unwrap_used)]

use super::path_tests::{Link, SECOND, is_near};
use super::tests::{MS, policy};
use super::*;
use crate::precopy::Precopy;

const RATE: u64 = 20_000_000;

fn mbps(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e6
}

/// Takes whatever it may, every two milliseconds, in chunks of so many bytes.
fn drain(disks: &[(&Allowance, u64)], from: Duration, time: Duration) -> Vec<f64> {
    let mut taken = vec![0; disks.len()];
    let mut now = from;
    while now < from + time {
        for (sum, (disk, chunk)) in taken.iter_mut().zip(disks) {
            while *chunk > 0 && disk.has_room(now) {
                disk.take(*chunk);
                *sum += *chunk;
            }
        }
        now += 2 * MS;
    }
    taken.into_iter().map(|sum| mbps(sum, time)).collect()
}

#[test]
fn disks_share_a_cap_equally_whatever_their_chunks_and_who_asks_first() {
    let cap = Arc::new(Cap::new(Some(RATE)));
    let disks: Vec<Allowance> = (0..3).map(|_| Allowance::new(None)).collect();
    // Their clocks began at different times.
    for (n, disk) in (0..).zip(&disks) {
        disk.share(&cap, Duration::from_secs(n));
    }
    let both = [(&disks[0], 1 << 20), (&disks[0], 0)];
    let alone = drain(&both, SECOND, 10 * SECOND);
    assert!((alone[0] - 20.0).abs() < 0.5, "{alone:?}");
    drop(disks);

    let disks: Vec<Allowance> = (0..3).map(|_| Allowance::new(None)).collect();
    disks.iter().for_each(|disk| disk.share(&cap, MS));
    let three = [
        (&disks[0], 1 << 20),
        (&disks[1], 16 << 10),
        (&disks[2], 256 << 10),
    ];
    let shares = drain(&three, 20 * SECOND, 10 * SECOND);
    assert!(
        shares.iter().all(|s| (s - 20.0 / 3.0).abs() < 0.4),
        "{shares:?}"
    );
    // One is held back by its own cap, one wants nothing.
    disks[0].set_rate(30 * SECOND, Some(2_000_000));
    let two = [(&disks[0], 64 << 10), (&disks[1], 16 << 10), (&disks[2], 0)];
    let shares = drain(&two, 30 * SECOND, 10 * SECOND);
    assert!((shares[0] - 2.0).abs() < 0.2, "{shares:?}");
    assert!((shares[1] - 18.0).abs() < 0.7, "{shares:?}");
}

#[test]
fn a_cap_is_changed_and_lifted_while_it_is_used() {
    let cap = Arc::new(Cap::new(None));
    let disk = Allowance::new(None);
    disk.share(&cap, Duration::ZERO);
    assert!(disk.has_room(MS) && disk.common_rate().is_none());
    disk.take(1 << 30);
    assert!(disk.has_room(MS), "what came before the cap counted");
    cap.set_rate(Some(1_000_000));
    assert_eq!(disk.common_rate(), Some(1_000_000));
    let slow = drain(&[(&disk, 4096)], SECOND, 4 * SECOND);
    assert!((slow[0] - 1.0).abs() < 0.1, "{slow:?}");
    // After a pause there is no more than a burst.
    disk.has_room(60 * SECOND);
    let slow = drain(&[(&disk, 4096)], 60 * SECOND, SECOND);
    assert!(slow[0] < 1.2, "{slow:?}");
    cap.set_rate(None);
    disk.take(1 << 30);
    assert!(disk.has_room(62 * SECOND));
}

/// Two disks over a link that carries much more than they may have together, and one of them with a cap
/// of its own besides.
#[test]
fn movers_keep_to_the_cap_together_and_share_it() {
    let mut link = Link::new(400, &[policy(), policy(), policy()]);
    let cap = Arc::new(Cap::new(Some(RATE)));
    for disk in &mut link.disks {
        disk.mover.share_cap(&cap, Duration::ZERO);
        assert_eq!(disk.mover.common_limit(), Some(RATE));
    }
    (0..3).for_each(|index| link.begin(index));
    link.run(2 * SECOND);
    // 20 of 50 MB/s.
    let shares = link.run(4 * SECOND);
    assert!(shares.iter().all(|s| is_near(*s, 0.4 / 3.0)), "{shares:?}");
    assert!(is_near(shares.iter().sum(), 0.4), "{shares:?}");
    link.tell(0, |m, now, r, out| {
        m.set_limit(now, Some(2_500_000), r, out)
    });
    link.disks[2].mover.pause();
    link.run(SECOND);
    let shares = link.run(4 * SECOND);
    assert!(
        is_near(shares[0], 0.05) && is_near(shares[1], 0.35),
        "{shares:?}"
    );
    assert!(shares[2] == 0.0, "{shares:?}");
    cap.set_rate(None);
    link.run(2 * SECOND);
    let shares = link.run(2 * SECOND);
    assert!(shares[1] > 0.8, "{shares:?}");
}

/// What guests read comes whatever the cap.
#[test]
fn demand_is_exempt_from_the_cap() {
    let mut link = Link::new(400, &[policy()]);
    let cap = Arc::new(Cap::new(Some(1000)));
    link.disks[0].mover.share_cap(&cap, Duration::ZERO);
    link.begin(0);
    link.run(SECOND);
    let before = link.disks[0].woken.len();
    for n in 0..20_u64 {
        let block = link.geometry.blocks() - 1 - n * 64;
        let range = BlockRange::new(block, block + 1);
        link.tell(0, |m, now, r, out| m.read(now, 1, range, r, out));
        link.run(100 * MS);
    }
    assert_eq!(link.disks[0].woken.len(), before + 20);
}

/// One disk stands by and is copied ahead; another has arrived. They have the link in equal parts,
/// keep to the cap together, and what was under way at the handoff leaves nothing behind.
#[test]
fn what_is_copied_ahead_shares_link_and_cap() {
    let mut link = Link::new(400, &[policy(), policy()]);
    let cap = Arc::new(Cap::new(None));
    for disk in &mut link.disks {
        disk.mover.share_cap(&cap, Duration::ZERO);
    }
    let mut precopy = Precopy::new(link.geometry, false);
    precopy.share(&link.disks[1].mover);
    precopy.connected(link.now, false);
    link.begin(0);
    link.ahead = Some((1, precopy));
    link.run(3 * SECOND);
    let both = link.run(4 * SECOND);
    assert!(both.iter().all(|share| is_near(*share, 0.48)), "{both:?}");
    cap.set_rate(Some(RATE));
    link.run(SECOND);
    let both = link.run(4 * SECOND);
    assert!(both.iter().all(|share| is_near(*share, 0.2)), "{both:?}");
    let capped = Some(2_500_000);
    link.tell(1, |m, now, r, out| m.set_limit(now, capped, r, out));
    link.run(SECOND);
    let both = link.run(4 * SECOND);
    assert!(is_near(both[0], 0.35) && is_near(both[1], 0.05), "{both:?}");
    cap.set_rate(None);
    link.tell(1, |m, now, r, out| m.set_limit(now, None, r, out));
    link.run(SECOND);
    let (_, mut precopy) = link.ahead.take().unwrap();
    assert!(precopy.in_flight() > 0);
    precopy.finish();
    link.forget_ahead();
    link.run(6 * SECOND / 10);
    let rest = link.run(2 * SECOND);
    assert!(rest[0] > 0.9, "{rest:?}");
}
