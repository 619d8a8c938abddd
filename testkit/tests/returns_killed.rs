//! Either daemon killed at every named step of a return before all of the disk was there, then
//! restarted: at most one side accepts writes at any time, a status names the way on where none
//! does, and every byte is there.
//!
//! `docs/reliability.md` has the table. Each row is printed.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::client::Client;
use hikkoshi_testkit::moving::{Guest, Site};
use hikkoshi_testkit::rows::play_rows;
use std::path::Path;

const SIZE: u64 = 4 << 20;

/// Who is killed: the site that the disk comes back to, or the one that it had moved to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    A,
    B,
}

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// The disk comes back.
    Return,
    /// The return is given up after B has closed its fence.
    GiveUp,
}

/// A kill at a point, and at which passing of it.
const ROWS: &[(Plan, Who, &str)] = &[
    // A's state becomes that of the return.
    (Plan::Return, Who::A, "overwritten.renamed:1"),
    (Plan::Return, Who::A, "way-back.ended:1"),
    (Plan::Return, Who::A, "return.begun:1"),
    (Plan::Return, Who::A, "volume.renamed:2"),
    (Plan::Return, Who::A, "volume.done:2"),
    (Plan::Return, Who::A, "new.memory:1"),
    (Plan::Return, Who::A, "new.tagged:1"),
    // The handoff at B.
    (Plan::Return, Who::B, "fence.closed:1"),
    (Plan::Return, Who::B, "fence.synced:1"),
    (Plan::Return, Who::B, "volume.renamed:1"),
    (Plan::Return, Who::B, "fence.recorded:1"),
    // The handoff at A.
    (Plan::Return, Who::A, "takeover.fenced:1"),
    (Plan::Return, Who::A, "handoff.begun:1"),
    (Plan::Return, Who::A, "lacking.written:1"),
    (Plan::Return, Who::A, "lacking.renamed:1"),
    (Plan::Return, Who::A, "handoff.lacking:1"),
    (Plan::Return, Who::A, "volume.written:3"),
    (Plan::Return, Who::A, "volume.renamed:3"),
    (Plan::Return, Who::A, "handoff.recorded:1"),
    (Plan::Return, Who::A, "handoff.taken:1"),
    (Plan::Return, Who::A, "handoff.done:1"),
    // What B has comes, and the end.
    (Plan::Return, Who::A, "install.written:1"),
    (Plan::Return, Who::A, "install.marked:1"),
    (Plan::Return, Who::A, "completion.recorded:1"),
    (Plan::Return, Who::A, "completion.tag-removed:1"),
    (Plan::GiveUp, Who::A, "volume.renamed:1"),
    (Plan::GiveUp, Who::A, "give-up.recorded:1"),
    (Plan::GiveUp, Who::B, "volume.renamed:1"),
    (Plan::GiveUp, Who::B, "fence.lifted:1"),
];

/// The guest lives at B, which fetches only what it reads; A has the old copy.
struct Sites {
    guest: Guest,
    a: Site,
    b: Site,
    /// A as the site that the disk comes back to.
    back: Site,
}

impl Sites {
    fn new(dir: &Path, seed: u64) -> Result<Self> {
        let mut guest = Guest::new(SIZE, seed);
        let mut a = Site::new(dir, "a", &[], true);
        guest.make_image(a.image())?;
        a.start()?;
        guest.work(&mut a.client()?, 20)?;
        let lazily = ["--no-background", "--prepare", "none"];
        let ways: &[&str] = if seed.is_multiple_of(2) {
            &["--way-back"]
        } else {
            &[]
        };
        let arguments = [&lazily[..], ways].concat();
        let mut b = Site::moving(dir, "b", &a, &arguments, true);
        b.start()?;
        guest.insist(&b)?;
        b.wait_state("arriving")?;
        guest.work(&mut b.client()?, 30)?;
        ensure!(b.daemon().status()?["absent_bytes"] != 0, "B has all of it");
        // The VM writes whatever happens to its disk, and its client waits.
        let back = Site::moving(dir, "a", &b, &["--return", "--handoff", "command"], true);
        Ok(Self { guest, a, b, back })
    }

    /// At most one takes writes; where none does, a status says what to do.
    fn one_or_a_way_on(&mut self) -> Result<String> {
        let here = self.guest.takes_writes(&self.back)?;
        let there = self.guest.takes_writes(&self.b)?;
        ensure!(!(here && there), "both take writes");
        if !here && !there {
            let told = self.back.notes()? + &self.b.notes()?;
            ensure!(
                ["hikkoshi handoff", "hikkoshi abort"]
                    .iter()
                    .any(|way| told.contains(way)),
                "nobody takes writes, and nobody says what to do: {told}"
            );
        }
        Ok(format!(
            "A {}{}, B {}{}",
            self.back.state()?,
            if here { " takes writes" } else { "" },
            self.b.state()?,
            if there { " takes writes" } else { "" },
        ))
    }

    /// The disk comes back, all of it, and nothing is lost.
    fn come_back(mut self) -> Result<()> {
        if self.back.state()? == "standby" {
            self.back.daemon().command(&["handoff"])?;
        }
        ensure!(!self.guest.takes_writes(&self.b)?, "B takes writes");
        self.guest.insist(&self.back)?;
        self.back.restart()?;
        self.b.restart()?;
        self.guest.work(&mut self.back.client()?, 20)?;
        self.guest.check(&mut self.back.client()?)?;
        self.back.wait_state("local")?;
        self.b.take()?.stop()?;
        self.guest.check(&mut self.back.client()?)?;
        self.back.take()?.stop()?;
        self.guest.check_image(self.back.image())
    }
}

fn play_return(dir: &Path, who: Who, point: &str, seed: u64) -> Result<String> {
    let mut sites = Sites::new(dir, seed)?;
    sites.a.take()?.stop()?;
    let told = if who == Who::A {
        // It may not even come to serve.
        if let Err(error) = sites.back.start_to_die(Some(point)) {
            let text = format!("{error:#}");
            ensure!(text.contains("signal: 9"), "not killed: {text}");
        } else {
            sites.guest.work(&mut sites.b.client()?, 10)?;
            let _ = sites.back.daemon().try_command(&["handoff"]);
            // Some die only as they write or fetch.
            if let Ok(mut client) = sites.back.client() {
                let _ = sites.guest.write_somewhere(&mut client);
            }
        }
        if let Ok(dies) = sites.back.take() {
            dies.wait_killed()?;
        }
        sites.back.start()?;
        sites.one_or_a_way_on()?
    } else {
        sites.back.start()?;
        sites.b.kill()?;
        sites.b.start_to_die(Some(point))?;
        sites.guest.work(&mut sites.b.client()?, 10)?;
        let dies = sites.b.take()?;
        let (back, b) = (&sites.back, &mut sites.b);
        let handed = std::thread::scope(|scope| -> Result<_> {
            let handing = scope.spawn(|| back.daemon().try_command(&["handoff"]));
            dies.wait_killed()?;
            b.start()?;
            handing.join().unwrap()
        })?;
        // Held up, and no more.
        ensure!(handed.status.success(), "{}", sites.back.story());
        sites.one_or_a_way_on()?
    };
    sites.come_back().with_context(|| told.clone())?;
    Ok(told)
}

fn play_giving_up(dir: &Path, who: Who, point: &str, seed: u64) -> Result<String> {
    let mut sites = Sites::new(dir, seed)?;
    sites.a.take()?.stop()?;
    sites.back.start_to_die(Some("takeover.fenced:1"))?;
    sites.guest.work(&mut sites.b.client()?, 10)?;
    let dies = sites.back.take()?;
    let _ = dies.try_command(&["handoff"])?;
    dies.wait_killed()?;
    sites.b.wait_state("departed")?;
    if who == Who::A {
        sites.back.start_to_die(Some(point))?;
        let dies = sites.back.take()?;
        let _ = dies.try_command(&["abort"])?;
        dies.wait_killed()?;
        // The old copy again, or still a return that stands by.
        sites.back.start()?;
    } else {
        sites.b.kill()?;
        sites.b.start_to_die(Some(point))?;
        sites.back.start()?;
        let dies = sites.b.take()?;
        let _ = sites.back.daemon().try_command(&["abort"])?;
        dies.wait_killed()?;
        sites.b.start()?;
    }
    let told = format!("A {}, B {}", sites.back.state()?, sites.b.state()?);
    if sites.back.state()? == "standby" && sites.b.state()? == "departed" {
        sites.back.daemon().command(&["abort"])?;
    }
    sites.guest.insist(&sites.b).with_context(|| told.clone())?;
    ensure!(!sites.guest.takes_writes(&sites.back)?, "A takes writes");
    // What B never had still comes from A.
    let mut client: Client = sites.b.client()?;
    sites.guest.check(&mut client)?;
    sites.b.take()?.stop()?;
    sites.guest.check_image(sites.b.image())?;
    Ok(told)
}

/// Plays rows on two threads; prints each.
#[test]
fn killed_at_every_step_of_an_early_return() {
    play_rows(
        ROWS,
        2,
        |(plan, who, point)| format!("{plan:?} | {who:?} | {point}"),
        |dir, (plan, who, point), seed| match plan {
            Plan::Return => play_return(dir, *who, point, seed),
            Plan::GiveUp => play_giving_up(dir, *who, point, seed),
        },
    );
}
