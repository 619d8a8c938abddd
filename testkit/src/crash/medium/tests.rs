//! The model of the medium: what must be there, and what may be.

use super::*;

const ROOT: &str = "/d";

fn call(at: u64, change: Change) -> Call {
    Call {
        begun_ns: at,
        ended_ns: Some(at + 5),
        change,
    }
}

fn write(at: u64, byte: u8) -> Call {
    let (path, data) = ("/d/x.new".into(), vec![byte; 2 * SECTOR]);
    let offset = Some(0);
    call(at, Change::Write { path, offset, data })
}

fn sync(at: u64, path: &str) -> Call {
    let (path, all) = (path.into(), false);
    call(at, Change::Sync { path, all })
}

/// `x.new` written, synced, written again, renamed to `x`, the directory synced.
fn recording() -> Medium {
    let path: PathBuf = "/d/x.new".into();
    let calls = [
        call(
            10,
            Change::Open {
                path: path.clone(),
                truncate: true,
            },
        ),
        write(20, 1),
        sync(30, "/d/x.new"),
        write(40, 2),
        call(
            50,
            Change::Rename {
                from: path,
                to: "/d/x".into(),
            },
        ),
        sync(60, ROOT),
    ];
    Medium::new(Path::new(ROOT), &calls, 100).unwrap()
}

/// All contents of `x.new` or `x` that are found after cuts at `at_ns`, and all names.
fn after(at_ns: u64) -> (HashSet<Vec<u8>>, HashSet<Vec<PathBuf>>) {
    let medium = recording();
    let (mut contents, mut names) = (HashSet::new(), HashSet::new());
    for seed in 0..400 {
        let mut random = Random::new(seed);
        let cut = Cut {
            at_ns,
            seed,
            spares: false,
        };
        let found = medium.dirs[Path::new(ROOT)].after(cut, &mut random);
        names.insert(found.into_keys().collect());
        contents.insert(medium.files[0].after(cut, &mut random).content);
    }
    (contents, names)
}

fn sectors(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [*byte; SECTOR]).collect()
}

#[test]
fn what_was_not_synced_is_there_or_not_sector_by_sector() {
    let (contents, names) = after(27);
    // Written, the sync not begun: nothing, all, or parts, and maybe not even the name.
    for content in [vec![], sectors(&[1, 1]), sectors(&[0, 1]), sectors(&[1, 0])] {
        assert!(contents.contains(&content), "{:?}", content.get(..1));
    }
    assert_eq!(names.len(), 2);
}

#[test]
fn what_was_synced_is_there() {
    let (contents, _) = after(36);
    assert_eq!(contents, HashSet::from([sectors(&[1, 1])]));
    let (contents, _) = after(42);
    let mixtures = [[1, 1], [1, 2], [2, 1], [2, 2]];
    assert_eq!(contents, mixtures.iter().map(|m| sectors(m)).collect());
    // A sync under way promises nothing.
    assert!(after(33).0.len() > 1);
}

#[test]
fn a_name_is_durable_with_a_sync_of_its_directory() {
    let path = |name: &str| vec![PathBuf::from(format!("/d/{name}"))];
    let both = HashSet::from([vec![], path("x.new"), path("x")]);
    assert_eq!(after(57).1, both);
    assert_eq!(after(63).1, both);
    assert_eq!(after(66).1, HashSet::from([path("x")]));
}
