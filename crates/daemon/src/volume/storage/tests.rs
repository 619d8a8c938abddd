use super::*;
use crate::config::{Engine, ExportConfig, Packing, Transport};
use crate::export::Export;
use crate::volume::storage::link::ImageLink;
use crate::volume::storage::succession::Presence;
use hikkoshi_store::StoreError;
use hikkoshi_store::state::{Identity, StateDir};
use hikkoshi_wan::MoveLink;
use hikkoshi_wan::transport::session::{Stance, Tell, Told};
use std::sync::Arc;
use std::time::Duration;

fn config(image: &Path) -> ExportConfig {
    ExportConfig {
        name: String::new(),
        image: image.to_owned(),
        state_dir: None,
        block_bytes: 4096,
        read_only: false,
        engine: Engine::Threads,
        transport: Transport::Auto,
        compress: Packing::Auto,
        source: None,
    }
}

#[test]
fn an_address_is_read_as_it_was_written() {
    for (image, state) in [
        ("/srv/disk.img", None),
        ("/dev/vg/web", Some("/var/lib/hikkoshi/web")),
        ("/odd?state=/x %3F %25.img", Some("/100%?")),
    ] {
        let address = ImageAddress::new(Path::new(image), state.map(Path::new)).unwrap();
        assert_eq!(ImageAddress::parse(&address.to_string()), Some(address));
    }
    let relative = ImageAddress::new(Path::new("disk.img"), None).unwrap();
    assert!(relative.image.is_absolute());
    for other in [
        "",
        "/srv/disk.img",
        "nbd://old/",
        "image:",
        "image:disk.img",
        "image:/a?b",
        "image:/a%41",
        "image:/a?state=",
        "image:/a?state=b",
    ] {
        assert_eq!(ImageAddress::parse(other), None, "{other}");
    }
    let long = format!("/{}", "x".repeat(MAX_ADDRESS_BYTES));
    assert!(ImageAddress::new(Path::new(&long), None).is_err());
}

/// What an old image says, and what becomes of it when the new one has given up in the one moment
/// where both had been asked: after the fence, before the word of the new one.
#[test]
fn a_move_that_was_given_up_behind_the_fence_leaves_the_old_image_usable() {
    let dir = tempfile::tempdir().unwrap();
    let (old_image, new_image) = (dir.path().join("old"), dir.path().join("new"));
    std::fs::write(&old_image, [7; 1 << 20]).unwrap();
    let export = Export::open(&config(&old_image)).unwrap();
    let (old, id) = (export.volume(), [5; 16]);
    let address = ImageAddress::new(&new_image, None).unwrap();
    old.expect_storage_move(id, address.clone()).unwrap();
    let link = ImageLink::new(&old);
    let attach = Tell::Attach {
        id,
        stance: Stance::Standby,
        epoch: 0,
        base: None,
    };
    let told = link.tell(&attach, Duration::ZERO).unwrap();
    assert!(matches!(told, Told::Attached(a) if a.epoch != 0));
    // Nobody else may copy it away meanwhile.
    let other = Tell::Attach {
        id: [6; 16],
        stance: Stance::Standby,
        epoch: 0,
        base: None,
    };
    assert!(link.tell(&other, Duration::ZERO).is_err());
    let fence = Tell::Handoff { id, epoch: 0 };
    assert!(matches!(
        link.tell(&fence, Duration::ZERO),
        Ok(Told::Fenced { .. })
    ));
    drop(link);
    drop(old);
    export.close().unwrap();
    drop(export);
    let refused = Export::open(&config(&old_image)).err().unwrap().to_string();
    assert!(refused.contains("hikkoshi serve"), "{refused}");

    // The new volume of that moment.
    let state = dir.path().join("old.hikkoshi");
    let identity = StateDir::whose(&state).unwrap().unwrap();
    assert_eq!(identity.ties.moved_to, Some(address.to_string()));
    std::fs::write(&new_image, [0; 1 << 20]).unwrap();
    let given_up = Identity {
        volume_id: id,
        life: hikkoshi_store::state::Life::GivenUp,
        source_uri: ImageAddress::new(&old_image, None).unwrap().to_string(),
        ties: hikkoshi_store::state::Ties {
            fenced_source: true,
            ..Default::default()
        },
        ..identity
    };
    let new_state = dir.path().join("new.hikkoshi");
    drop(StateDir::create(&new_state, given_up).unwrap());
    let refused = Export::open(&config(&new_image)).err().unwrap().to_string();
    assert!(refused.contains(old_image.to_str().unwrap()), "{refused}");
    let export = Export::open(&config(&old_image)).unwrap();
    assert!(!export.volume().has_departed());
    export.close().unwrap();
}

#[test]
fn a_volume_that_is_let_go_of_is_locked_no_more_and_reads_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, [7; 1 << 20]).unwrap();
    let export = Export::open(&config(&image)).unwrap();
    let volume = export.volume();
    let twice = Export::open(&config(&image)).err().unwrap();
    let in_use = crate::volume::open::OpenError::Store(StoreError::InUse {
        path: image.clone(),
        holder: String::new(),
    });
    assert_eq!(
        std::mem::discriminant(&twice),
        std::mem::discriminant(&in_use),
        "{twice}"
    );
    export.close().unwrap();
    volume.let_go();
    let mut buf = [0; 512];
    assert!(volume.store().read(0, &mut buf).is_err());
    assert!(volume.store().write(0, &buf).is_err());
    let again = Export::open(&config(&image)).unwrap();
    again.volume().store().read(0, &mut buf).unwrap();
    assert_eq!(buf, [7; 512]);
    again.close().unwrap();
}

/// A thread that stood still between its look at the successor and its read met an image that was
/// closed, and its guest an error.
#[test]
fn a_volume_is_deserted_only_when_every_client_was_seen_between_two_requests() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, [7; 1 << 20]).unwrap();
    let export = Export::open(&config(&image)).unwrap();
    let volume = export.volume();
    let (one, other) = (Arc::default(), Arc::default());
    volume.enter(&one);
    volume.enter(&other);
    assert!(volume.is_deserted(), "idle clients keep nothing");
    Presence::begin(&one);
    assert!(!volume.is_deserted());
    let deferred = volume.deferred();
    one.end();
    assert!(!volume.is_deserted(), "its read is still under way");
    drop(deferred);
    assert!(volume.is_deserted());
    other.begin();
    assert!(!volume.is_deserted());
    volume.leave(&other);
    assert!(volume.is_deserted(), "it has gone over");
    one.begin();
    drop(one);
    assert!(volume.is_deserted(), "it has hung up");
    export.close().unwrap();
}
