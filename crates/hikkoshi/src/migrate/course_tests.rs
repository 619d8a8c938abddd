//! The course of a move in a simulated world, with a failure at every call. The statement at the end is
//! compared with what is really so.

use std::time::Duration;

use super::course::{Course, Options, Prepare, is_handed};
use super::fake::{FAULTS, Fake, Fault};
use super::outcome::{DisksPlace, Outcome, VmPlace};
use super::sites::{DiskState, Phase, Site, Trouble};

fn options() -> Options {
    Options {
        prepare: Some(Prepare::default()),
        ..Options::default()
    }
}

/// The statement must be what is so.
fn is_true(fake: &Fake, outcome: &Outcome, story: &str) {
    assert!(fake.broken.is_empty(), "{story}: {:?}", fake.broken);
    let text = outcome.text();
    match &outcome.vm {
        VmPlace::Old => assert!(fake.runs(Site::Old), "{story}: {text}"),
        VmPlace::New => assert!(fake.runs(Site::New), "{story}: {text}"),
        VmPlace::StoppedNew => {
            assert!(!fake.old.running && !fake.new.running, "{story}: {text}");
            assert_eq!(fake.new.phase, Phase::Completed, "{story}: {text}");
        }
        VmPlace::StoppedOld => {
            assert!(!fake.old.running && !fake.new.running, "{story}: {text}");
            assert!(fake.old.alive, "{story}: {text}");
        }
        VmPlace::Unknown(_) => {}
    }
    match &outcome.disks {
        DisksPlace::OldStandby => {
            assert!(
                fake.disks.iter().all(|d| d.state == "standby"),
                "{story}: {text}"
            );
        }
        DisksPlace::OldGivenUp => {
            assert!(
                fake.disks.iter().all(|d| d.state == "given-up"),
                "{story}: {text}"
            );
        }
        DisksPlace::OldPartly(names) => {
            for disk in &fake.disks {
                let told = names.contains(&disk.export);
                assert!(told || disk.state == "given-up", "{story}: {text}");
            }
            assert_eq!(fake.handed(), 0, "{story}: {text}");
        }
        DisksPlace::Arriving(_) => assert_eq!(fake.handed(), 2, "{story}: {text}"),
        DisksPlace::New => {
            assert!(
                fake.disks.iter().all(|d| d.state == "local"),
                "{story}: {text}"
            );
        }
        DisksPlace::MovedOn(names) => {
            let gone = |d: &&DiskState| d.state == "departed";
            let gone: Vec<_> = fake.disks.iter().filter(gone).collect();
            assert!(gone.iter().all(|d| names.contains(&d.export)), "{text}");
        }
        DisksPlace::Split { handed, others } => {
            let told = handed.len() + others.len();
            assert_eq!(told, fake.disks.len(), "{story}: {text}");
            for disk in fake.disks.iter().filter(|d| handed.contains(&d.export)) {
                assert!(
                    disk.state == "local" || disk.state == "arriving",
                    "{story}: {text}"
                );
            }
        }
    }
    assert_eq!(outcome.done, outcome.reason.is_none(), "{story}");
    each_is_true(fake, outcome, &format!("{story}: {text}"));
}

/// So must what is said of each disk.
fn each_is_true(fake: &Fake, outcome: &Outcome, story: &str) {
    let text = outcome.text();
    let told = if outcome.done { 0 } else { fake.disks.len() };
    assert_eq!(outcome.each.len(), told, "{story}");
    for ((said, disk), fenced) in outcome.each.iter().zip(&fake.disks).zip(&fake.fenced) {
        let handed = is_handed(disk);
        assert!(
            said.new.as_ref().is_none_or(|s| *s == disk.state),
            "{story}"
        );
        let old = said.old.as_ref().map(|old| old == "departed");
        assert!(old.is_none_or(|old| old == *fenced), "{story}");
        if said.text.contains("is at the old site") {
            assert!(!handed, "{story}");
        } else if said.text.contains("is at the new site") {
            assert!(handed, "{story}");
        } else if disk.state != "departed" {
            assert_eq!(said.new, None, "{story}");
        }
        if disk.old_copy_needed && said.new.is_some() {
            assert!(said.text.contains("only in the old copy"), "{story}");
            assert!(text.contains("Keep that image"), "{story}");
        }
    }
    if fake.lacks > 0 {
        assert!(!text.contains("release --force"), "{story}");
    }
}

/// What the tests with faults are made with: a disk that moves, and one that comes back before all of
/// it had moved.
fn worlds(faults: &[(usize, Fault, bool)]) -> [Fake; 2] {
    let fake = Fake::with_faults(faults);
    [fake.clone(), fake.coming_back()]
}

fn calls_of(mut fake: Fake) -> Vec<&'static str> {
    let outcome = fake.drive(&options());
    assert!(outcome.done, "{outcome:?}");
    fake.log
}

fn calls_without_fault() -> Vec<&'static str> {
    calls_of(Fake::new())
}

#[test]
fn a_move_without_trouble() {
    let mut fake = Fake::new();
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "no fault");
    assert_eq!(
        outcome.text(),
        "The VM runs at the new site; its disks are there whole: they need the old site no more."
    );
    assert_eq!(
        fake.log,
        [
            "disks",
            "disks",
            "hold",
            "tune",
            "listen",
            "send",
            "migration",
            "migration",
            "migration",
            "handoff",
            "handoff",
            "vm",
            "go on",
            "vm",
            "disks",
            "vm"
        ]
    );
    assert!(fake.old.alive, "the old QEMU was not to be ended");
}

#[test]
fn every_call_fails_once_in_every_way() {
    let calls = calls_of(Fake::new().coming_back());
    for (at, name) in calls.iter().enumerate() {
        for (fault, mut fake) in FAULTS.into_iter().flat_map(|fault| {
            let worlds = worlds(&[(at, fault, false)]);
            worlds.map(|fake| (fault, fake))
        }) {
            let story = format!("{fault:?} at call {at} ({name}), {} lack", fake.lacks);
            let outcome = fake.drive(&options());
            is_true(&fake, &outcome, &story);
            // What passes by leaves the VM running somewhere, and said to.
            if matches!(fault, Fault::Refused | Fault::LostBefore | Fault::LostAfter) {
                assert!(
                    matches!(outcome.vm, VmPlace::Old | VmPlace::New),
                    "{story}: {}",
                    outcome.text()
                );
            }
            if fault == Fault::Interrupt && fake.handed() == 0 {
                assert_eq!(outcome.vm, VmPlace::Old, "{story}");
            }
            if fault == Fault::NewDies && fake.handed() == 0 {
                assert_eq!(outcome.vm, VmPlace::Old, "{story}: {}", outcome.text());
            }
        }
    }
}

#[test]
fn everything_fails_from_some_call_on() {
    let calls = calls_of(Fake::new().coming_back());
    let faults = [Fault::Refused, Fault::LostBefore, Fault::LostAfter];
    for (at, name) in calls.iter().enumerate() {
        for (fault, mut fake) in faults.into_iter().flat_map(|fault| {
            let worlds = worlds(&[(at, fault, true)]);
            worlds.map(|fake| (fault, fake))
        }) {
            let story = format!("{fault:?} from call {at} ({name}) on, {} lack", fake.lacks);
            let outcome = fake.drive(&options());
            is_true(&fake, &outcome, &story);
            // When all is well again, the move can be gone on with, or nothing was begun.
            let stopped = !fake.old.running && !fake.new.running;
            let resumed = fake.resume(&options());
            is_true(&fake, &resumed, &story);
            if stopped && fake.new.phase == Phase::Completed {
                assert!(resumed.done, "{story}: {}", resumed.text());
            }
        }
    }
}

#[test]
fn two_failures_one_after_the_other() {
    let calls = calls_of(Fake::new().coming_back()).len();
    let mut ends = [0; 3];
    for at in 0..calls {
        for after in 1..12 {
            for first in FAULTS {
                for second in FAULTS {
                    let faults = [(at, first, false), (at + after, second, false)];
                    for mut fake in worlds(&faults) {
                        let lacks = fake.lacks;
                        let story = format!(
                            "{first:?} at {at}, {second:?} {after} calls later, {lacks} lack"
                        );
                        let outcome = fake.drive(&options());
                        is_true(&fake, &outcome, &story);
                        let end = match outcome.vm {
                            VmPlace::Old => 0,
                            VmPlace::New => 1,
                            _ => 2,
                        };
                        ends[end] += 1;
                    }
                }
            }
        }
    }
    assert!(
        ends.iter().all(|n| *n > 0),
        "not every kind of end: {ends:?}"
    );
}

#[test]
fn a_failure_before_the_handoff_takes_everything_back() {
    let mut fake = Fake::new();
    fake.handoff_fails = Some(Trouble::Refused("the source is fenced".into()));
    fake.disks.truncate(1);
    let outcome = fake.drive(&options());
    assert_eq!(
        outcome.text(),
        "web could not be handed off: the source is fenced.\n\
         The VM runs at the old site, as before; its disks are at the old site, and the new site \
         has given them up.\n\
         \x20 disk web is at the old site, and the new site has given it up"
    );
    assert!(fake.old.running && !fake.new.alive);
}

#[test]
fn each_failure_has_its_statement() {
    let calls = calls_without_fault();
    let told = |call: &str, nth: usize, fault: Fault| {
        let mut places = calls.iter().enumerate().filter(|(_, name)| **name == call);
        let (at, _) = places.nth(nth).unwrap();
        let mut fake = Fake::with_faults(&[(at, fault, false)]);
        let outcome = fake.drive(&options());
        is_true(&fake, &outcome, call);
        let each: Vec<_> = outcome.each.iter().map(|disk| disk.text.as_str()).collect();
        let text = outcome.text();
        let rest = format!("\n  {}", each.join("\n  "));
        text.strip_suffix(&rest).unwrap_or(&text).to_owned()
    };
    let untouched = "The VM runs at the old site, as before; its disks are at the old site, and \
                     the new site stands by for them.";
    let taken_back = "The VM runs at the old site, as before; its disks are at the old site, and \
                      the new site has given them up.";
    for (call, nth, fault, reason, place) in [
        (
            "disks",
            0,
            Fault::Interrupt,
            "interrupted while the disks were prepared",
            untouched,
        ),
        (
            "disks",
            1,
            Fault::Interrupt,
            "interrupted while the VM was migrated",
            taken_back,
        ),
        (
            "hold",
            0,
            Fault::Refused,
            "cannot have the VM kept stopped at the new site: refused",
            untouched,
        ),
        (
            "tune",
            0,
            Fault::Refused,
            "cannot set up the migration: refused",
            untouched,
        ),
        (
            "listen",
            0,
            Fault::NewDies,
            "cannot have the new site listen for the VM: nobody listens",
            untouched,
        ),
        (
            "send",
            0,
            Fault::Refused,
            "cannot begin to migrate the VM: refused",
            untouched,
        ),
        (
            "migration",
            0,
            Fault::NewDies,
            "the migration failed",
            taken_back,
        ),
        (
            "migration",
            0,
            Fault::Interrupt,
            "interrupted while the VM was migrated",
            taken_back,
        ),
        ("migration", 2, Fault::NewDies, "nobody listens", taken_back),
    ] {
        assert_eq!(
            told(call, nth, fault),
            format!("{reason}.\n{place}"),
            "{call} {nth} {fault:?}"
        );
    }
}

#[test]
fn a_group_that_is_handed_off_in_part_stays_stopped_and_can_be_gone_on_with() {
    let mut fake = Fake::new();
    fake.handoff_fails = Some(Trouble::Refused("the link is down".into()));
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "one of two disks");
    assert_eq!(
        outcome.text(),
        "data could not be handed off: the link is down.\n\
         The VM is at the new site with all its memory, stopped; of its disks these are handed off \
         to the new site: web; these are not, or it is not known: data.\n\
         \x20 disk web is at the new site, whole\n\
         \x20 disk data is at the old site, and the new site stands by for it\n\
         Do not start the VM at the old site. Mend what is wrong, then the same command with \
         --resume goes on."
    );
    fake.handoff_fails = None;
    let outcome = fake.resume(&options());
    is_true(&fake, &outcome, "resumed");
    assert!(outcome.done && fake.new.running);
}

#[test]
fn a_handoff_that_does_not_get_through_is_given_up_and_the_fence_waited_for() {
    let stuck = || {
        let mut fake = Fake::new();
        fake.disks.truncate(1);
        fake.fenced.truncate(1);
        fake.handoff_fails = Some(Trouble::Lost("no answer".into()));
        fake
    };
    let mut fake = stuck();
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "given up");
    assert_eq!(outcome.vm, VmPlace::Old, "{outcome:?}");
    assert_eq!(outcome.disks, DisksPlace::OldGivenUp);
    // Whoever wants them to stand by hears that they do not.
    let mut fake = stuck();
    let keep = Options {
        keep_standby: true,
        ..options()
    };
    let outcome = fake.drive(&keep);
    is_true(&fake, &outcome, "given up all the same");
    assert_eq!(outcome.disks, DisksPlace::OldGivenUp);
    // The old site does not hear of it: on a disk that takes no writes the VM must not go on.
    let mut fake = stuck();
    fake.cut = true;
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "given up, and cut off");
    assert_eq!(outcome.vm, VmPlace::StoppedOld, "{outcome:?}");
    assert!(outcome.text().contains("departed of no disk any more"));
}

#[test]
fn when_the_old_site_is_lost_at_the_end_nothing_is_thrown_away() {
    let calls = calls_without_fault();
    let at = calls.iter().position(|name| *name == "migration").unwrap() + 2;
    let mut fake = Fake::with_faults(&[(at, Fault::OldDies, false)]);
    fake.disks.truncate(1);
    fake.handoff_fails = Some(Trouble::Refused("the link is down".into()));
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "old site lost");
    assert_eq!(outcome.vm, VmPlace::StoppedNew, "{outcome:?}");
    assert!(fake.new.alive && fake.disks[0].state == "standby");
    fake.handoff_fails = None;
    let without = fake.resume(&options());
    assert!(!without.done && fake.handed() == 0);
    assert!(without.text().contains("add --old-is-gone"), "{without:?}");
    let sure = Options {
        old_is_gone: true,
        ..options()
    };
    let outcome = fake.resume(&sure);
    is_true(&fake, &outcome, "resumed");
    assert!(outcome.done && fake.new.running, "{outcome:?}");
}

#[test]
fn when_the_old_site_is_lost_on_the_way_nothing_is_thrown_away_either() {
    let calls = calls_without_fault();
    let at = calls.iter().position(|name| *name == "migration").unwrap();
    let mut fake = Fake::with_faults(&[(at, Fault::OldDies, false)]);
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "old site lost");
    assert!(matches!(outcome.vm, VmPlace::Unknown(_)), "{outcome:?}");
    assert!(outcome.text().contains("left as it is"), "{outcome:?}");
    assert!(fake.new.alive && fake.disks.iter().all(|disk| disk.state == "standby"));
}

#[test]
fn what_the_options_change() {
    // The rest is not waited for.
    let mut fake = Fake::new();
    fake.arrives = false;
    let detached = Options {
        detach: true,
        quit_old: true,
        ..options()
    };
    let outcome = fake.drive(&detached);
    is_true(&fake, &outcome, "detached");
    assert!(
        outcome.done && outcome.disks == DisksPlace::Arriving(1 << 30),
        "{outcome:?}"
    );
    assert!(!fake.old.alive);
    // A roll-back leaves the disks standing by.
    let mut fake = Fake::new();
    fake.looks_left = u32::MAX;
    let patient = Options {
        timeout: Some(Duration::from_secs(60)),
        keep_standby: true,
        ..options()
    };
    let outcome = fake.drive(&patient);
    is_true(&fake, &outcome, "timed out");
    assert_eq!(
        (&outcome.vm, &outcome.disks),
        (&VmPlace::Old, &DisksPlace::OldStandby)
    );
    assert!(outcome.reason.unwrap().contains("time given"));
    // What is never prepared is waited for only so long.
    let mut fake = Fake::new();
    fake.disks[1].prepared = Some(false);
    let short = Options {
        prepare: Some(Prepare {
            limit: Some(Duration::from_secs(10)),
        }),
        ..Options::default()
    };
    assert!(fake.drive(&short).done);
    assert!(fake.now >= Duration::from_secs(10) && fake.notes[0].contains("not everything"));
    // Daemons that copy nothing before are not waited for, and that is said.
    let mut fake = Fake::new();
    fake.disks.iter_mut().for_each(|disk| disk.prepared = None);
    assert!(fake.drive(&options()).done);
    assert!(fake.notes[0].contains("nothing is copied before"));
}

#[test]
fn a_stray_write_at_the_new_site_keeps_the_vm_from_going_on_at_the_old_one() {
    let mut fake = Fake::new();
    let calls = calls_without_fault();
    let at = calls.iter().position(|name| *name == "migration").unwrap() + 2;
    fake.faults = vec![(at, Fault::NewDies, false)];
    // The stray client comes while the VM is on its way.
    let skip = Options::default();
    fake.disks[1].state = "arriving".into();
    fake.old.running = false;
    let outcome = Course::new(&mut fake, &skip).run();
    assert!(!fake.log.contains(&"go on"), "{:?}", fake.log);
    assert!(!outcome.done, "{outcome:?}");
}

#[test]
fn a_return_before_completion_is_told_of_and_taken_back_with_what_must_be_kept() {
    let mut fake = Fake::new().coming_back();
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "no fault");
    assert!(outcome.done, "{outcome:?}");
    assert!(fake.notes[0].contains("\"web\" comes back before all of it was at the old site"));
    assert!(fake.notes[0].contains("256.0 MiB never left, 768.0 MiB have to come so far"));
    assert!(
        fake.notes[2].contains("what was written there comes after"),
        "{:?}",
        fake.notes
    );
    // Taken back, it is no spare image that may be removed.
    let mut fake = Fake::new().coming_back();
    fake.handoff_fails = Some(Trouble::Refused("blocks wait for their rest".into()));
    fake.disks.truncate(1);
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "refused");
    assert_eq!(outcome.vm, VmPlace::Old, "{outcome:?}");
    let text = outcome.text();
    assert!(
        text.contains(
            "disk web is at the old site, and the new site has given it up; 256.0 MiB of it is only in \
             the old copy at the new site"
        ),
        "{text}"
    );
}

/// A group of which one disk was handed off and another one given up: the old site's copies, newest as
/// they are, lack what is only at the new site. The advice to release them would have lost that.
#[test]
fn a_torn_return_goes_forward() {
    let torn = |mut fake: Fake| {
        fake.old.running = false;
        (fake.fenced[0], fake.disks[0].old_copy_needed) = (true, false);
        fake.disks[0].state = "arriving".into();
        fake.disks[1].state = "given-up".into();
        let options = options();
        let mut course = Course::new(&mut fake, &options);
        course.split_now("data could not be given up".into()).text()
    };
    assert!(torn(Fake::new()).contains("release --force"));
    let text = torn(Fake::new().coming_back());
    assert!(
        !text.contains("release --force") && text.contains("release none"),
        "{text}"
    );
}

#[test]
fn a_disk_that_another_move_takes_away_is_not_waited_for() {
    let mut fake = Fake::new();
    fake.arrives = false;
    fake.taken_away = true;
    let outcome = fake.drive(&options());
    is_true(&fake, &outcome, "taken away");
    assert!(
        !outcome.done && matches!(outcome.disks, DisksPlace::MovedOn(_)),
        "{outcome:?}"
    );
    assert!(
        outcome
            .text()
            .contains("another move has taken web, data away"),
        "{outcome:?}"
    );
}
