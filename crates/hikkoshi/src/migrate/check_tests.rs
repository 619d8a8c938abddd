//! Everything that can be wrong before a move is told, with what to do, and all of it at once.

use super::blocks::{Kind, Node};
use super::check::{Trust, problems};
use super::sites::{DiskState, Migration, Phase, Survey, Trouble, VmState};

const SIZE: u64 = 1 << 30;

fn disk(state: &str, source: Option<&str>) -> DiskState {
    DiskState {
        export: "web".into(),
        size_bytes: SIZE,
        state: state.into(),
        source: source.map(Into::into),
        source_connected: source.map(|_| true),
        clients: 1,
        ..DiskState::default()
    }
}

fn node(name: &str, kind: Kind) -> Node {
    Node {
        name: name.into(),
        kind,
        read_only: false,
        size_bytes: SIZE,
        file: format!("file-{name}"),
    }
}

fn nbd(export: &str) -> Kind {
    Kind::Nbd {
        export: export.into(),
    }
}

/// Two sites where all is well.
fn well() -> Survey {
    let vm = |status: &str| {
        Ok(VmState {
            status: status.into(),
            running: status == "running",
        })
    };
    let migration = Migration {
        phase: Phase::None,
        sent_bytes: 0,
        left_bytes: 0,
        error: None,
        listens: false,
    };
    Survey {
        vm: [vm("running"), vm("inmigrate")],
        migration: [Ok(migration.clone()), Ok(migration)],
        nodes: [
            Ok(vec![node("disk0", nbd("web"))]),
            Ok(vec![node("disk0", nbd("web"))]),
        ],
        old_disks: vec![Some(Ok(disk("local", None)))],
        new_disks: vec![Ok(disk("standby", Some("nbd://old:10809/web")))],
    }
}

fn only_problem(survey: &Survey) -> String {
    let found = problems(survey, &Trust::default());
    assert_eq!(found.len(), 1, "{found:#?}");
    found[0].clone()
}

#[test]
fn where_all_is_well_nothing_is_told() {
    let mut survey = well();
    assert_eq!(problems(&survey, &Trust::default()), Vec::<String>::new());
    // A source that a session has been opened with, and one that is not ours.
    survey.old_disks = vec![Some(Ok(disk("departing", None)))];
    assert_eq!(problems(&survey, &Trust::default()), Vec::<String>::new());
    survey.old_disks = vec![None];
    assert_eq!(problems(&survey, &Trust::default()), Vec::<String>::new());
    // What cannot be written to may stay behind.
    let mut iso = node("iso", Kind::Local);
    iso.read_only = true;
    survey.nodes[0].as_mut().unwrap().push(iso);
    assert_eq!(problems(&survey, &Trust::default()), Vec::<String>::new());
}

#[test]
fn each_thing_that_is_wrong_is_told() {
    type Spoil = fn(&mut Survey);
    let cases: [(Spoil, &str); 16] = [
        (
            |s| s.vm[0].as_mut().unwrap().running = false,
            "does not run",
        ),
        (
            |s| s.vm[1].as_mut().unwrap().status = "paused".into(),
            "-incoming defer",
        ),
        (
            |s| s.vm[0] = Err(Trouble::Lost("no QEMU".into())),
            "old site: no QEMU",
        ),
        (
            |s| s.vm[1] = Err(Trouble::Lost("no QEMU".into())),
            "new site: no QEMU",
        ),
        (
            |s| s.migration[0].as_mut().unwrap().phase = Phase::Active,
            "under way already",
        ),
        (
            |s| s.new_disks[0].as_mut().unwrap().state = "arriving".into(),
            "must be standby",
        ),
        (
            |s| s.new_disks[0].as_mut().unwrap().source_connected = Some(false),
            "not reach",
        ),
        (
            |s| s.new_disks[0].as_mut().unwrap().poisoned = true,
            "restart its daemon",
        ),
        (
            |s| s.new_disks[0].as_mut().unwrap().clients = 0,
            "open nowhere",
        ),
        (
            |s| s.new_disks[0] = Err(Trouble::Lost("no daemon".into())),
            "new site: no daemon",
        ),
        (
            |s| s.old_disks[0] = Some(Err(Trouble::Lost("no daemon".into()))),
            "old site: no daemon",
        ),
        (
            |s| s.new_disks[0].as_mut().unwrap().source = Some("nbd://old/db".into()),
            "comes from an export named \"db\"",
        ),
        (
            |s| {
                if let Some(Ok(old)) = &mut s.old_disks[0] {
                    old.state = "arriving".into();
                }
            },
            "only a disk that is there whole can move on",
        ),
        (
            |s| {
                if let Some(Ok(old)) = &mut s.old_disks[0] {
                    old.clients = 0;
                }
            },
            "the VM must use another server",
        ),
        (
            |s| s.nodes[0].as_mut().unwrap().push(node("vars", Kind::Local)),
            "--leave-out vars",
        ),
        (
            |s| s.nodes[0].as_mut().unwrap().push(node("more", nbd("db"))),
            "add --disk db",
        ),
    ];
    for (spoil, told) in cases {
        let mut survey = well();
        spoil(&mut survey);
        let problem = only_problem(&survey);
        assert!(
            problem.contains(told),
            "{problem:?} says nothing of {told:?}"
        );
    }
}

/// A disk that comes back before all of it was at the old site is not there whole, and may go.
#[test]
fn a_disk_may_come_back_before_all_of_it_was_there() {
    let coming_back = || {
        let mut survey = well();
        let mut old = disk("arriving", Some("nbd://new:10809/web"));
        old.absent_bytes = SIZE / 2;
        survey.old_disks = vec![Some(Ok(old))];
        survey.new_disks[0].as_mut().unwrap().old_copy_needed = true;
        survey
    };
    let mut survey = coming_back();
    assert_eq!(problems(&survey, &Trust::default()), Vec::<String>::new());
    let Some(Ok(old)) = &mut survey.old_disks[0] else {
        panic!("it is there")
    };
    old.source_connected = Some(false);
    assert!(only_problem(&survey).contains("does not reach its old copy"));
    // Somebody else's copy does not make it whole.
    let mut survey = coming_back();
    survey.new_disks[0].as_mut().unwrap().old_copy_needed = false;
    assert!(only_problem(&survey).contains("was started with --return"));
    // An old copy that was started without, or that gave an attempt up.
    let mut survey = well();
    survey.new_disks[0].as_mut().unwrap().state = "departed".into();
    assert!(only_problem(&survey).contains("URI-OF-THE-OLD-SITE --return`"));
    let mut survey = coming_back();
    survey.new_disks[0].as_mut().unwrap().state = "given-up".into();
    assert!(only_problem(&survey).contains("URI-OF-THE-OLD-SITE --return`"));
}

#[test]
fn another_disk_in_the_place_of_the_right_one_is_noticed() {
    // Of another size at the new site: by the daemons' word, and by QEMU's.
    let mut survey = well();
    survey.new_disks[0].as_mut().unwrap().size_bytes = 4096;
    let found = problems(&survey, &Trust::default());
    assert!(
        found[0].contains("its source must be another one"),
        "{found:#?}"
    );
    assert!(found[1].contains("no disk on export"), "{found:#?}");
    // The QEMU at the new site has another disk.
    let mut survey = well();
    survey.nodes[1] = Ok(vec![node("disk0", nbd("db"))]);
    assert!(only_problem(&survey).contains("new site: the VM has no disk on export \"web\""));
    // Whoever knows better may say so.
    let trust = Trust {
        disks: true,
        ..Trust::default()
    };
    assert!(problems(&survey, &trust).is_empty());
}

#[test]
fn a_node_that_is_left_out_is_no_problem() {
    let mut survey = well();
    survey.nodes[0]
        .as_mut()
        .unwrap()
        .push(node("vars", Kind::Local));
    let trust = Trust {
        leave_out: vec!["vars".into()],
        disks: false,
    };
    assert!(problems(&survey, &trust).is_empty());
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let mut survey = well();
    survey.vm[0].as_mut().unwrap().running = false;
    survey.vm[1] = Err(Trouble::Lost("no QEMU".into()));
    survey.new_disks[0].as_mut().unwrap().state = "local".into();
    assert_eq!(problems(&survey, &Trust::default()).len(), 3);
}
