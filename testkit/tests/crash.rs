//! The crash sweep notices what it is there for: a disk that is not what was answered.

#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use hikkoshi_testkit::cache;
use hikkoshi_testkit::crash::DISK_SECTORS;
use hikkoshi_testkit::crash::check::{self, Extent};
use hikkoshi_testkit::crash::daemon::Launch;
use hikkoshi_testkit::crash::disk::{Content, Expected};
use hikkoshi_testkit::crash::sources::Sources;
use hikkoshi_testkit::nbd::{Client, Request};
use std::fs::File;
use std::os::unix::fs::FileExt;

const SECTOR: u64 = 512;

#[test]
fn one_changed_byte_is_noticed() -> Result<()> {
    let scratch = cache::scratch()?;
    let binary = cache::hikkoshi()?;
    let mut sources = Sources::start(&binary, &scratch.path().join("sources"))?;
    let dir = scratch.path().join("volume");
    std::fs::create_dir(&dir)?;
    let from = sources.pick(0)?.to_owned();
    let arguments = ["--from", &from, "--handoff", "now", "--no-background"];
    let launch = Launch {
        binary,
        dir,
        arguments: arguments.map(str::to_owned).to_vec(),
        crash_at: None,
        tracer: Vec::new(),
    };
    let disk = Expected::new(DISK_SECTORS, false);

    let mut daemon = launch.spawn()?;
    ensure!(daemon.wait_until_up()?, "killed");
    let mut client = Client::connect(daemon.socket())?;
    for sector in [9, 100, 101] {
        let content = Content::Generation(1);
        disk.ask(sector, content.clone(), false);
        client.ask(Request::Write {
            offset: sector * SECTOR,
            data: content.bytes(sector).to_vec(),
            fua: false,
        })?;
        disk.answer(sector);
    }
    daemon.kill()?;

    let mut daemon = launch.spawn()?;
    ensure!(daemon.wait_until_up()?, "killed");
    check::after_kill(daemon.socket(), &disk, Extent::Whole)?;
    daemon.kill()?;

    let image = File::options().write(true).open(launch.image())?;
    image.write_all_at(b"?", 101 * SECTOR + 300)?;
    let mut daemon = launch.spawn()?;
    ensure!(daemon.wait_until_up()?, "killed");
    let error = check::after_kill(daemon.socket(), &disk, Extent::Touched).unwrap_err();
    ensure!(
        error
            .to_string()
            .starts_with("1 sectors are wrong: sector 101 "),
        "{error:#}"
    );
    daemon.kill()
}
