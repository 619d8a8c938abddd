//! Either daemon killed at every named step of a move, then restarted: exactly one side accepts
//! writes afterwards, or none and a status names the way on; and everything is there.
//!
//! `docs/reliability.md` has the table. Each row is printed.

#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use hikkoshi_testkit::client::{Answer, Client};
use hikkoshi_testkit::moving::{Dice, Guest, Site};
use hikkoshi_testkit::rows::play_rows;
use std::path::Path;
use std::time::{Duration, Instant};

const SIZE: u64 = 4 << 20;

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Source,
    Destination,
}

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    /// The disk moves.
    Move,
    /// The move is given up after the source has closed its fence.
    GiveUp,
}

/// A kill at a point, and at which passing of it.
const ROWS: &[(Plan, Who, &str)] = &[
    (Plan::Move, Who::Source, "fence.closed:1"),
    (Plan::Move, Who::Source, "fence.synced:1"),
    (Plan::Move, Who::Source, "volume.written:2"),
    (Plan::Move, Who::Source, "volume.synced:2"),
    (Plan::Move, Who::Source, "volume.renamed:2"),
    (Plan::Move, Who::Source, "volume.done:2"),
    (Plan::Move, Who::Source, "fence.recorded:1"),
    (Plan::Move, Who::Destination, "takeover.fenced:1"),
    (Plan::Move, Who::Destination, "handoff.begun:1"),
    (Plan::Move, Who::Destination, "volume.written:2"),
    (Plan::Move, Who::Destination, "volume.synced:2"),
    (Plan::Move, Who::Destination, "volume.renamed:2"),
    (Plan::Move, Who::Destination, "volume.done:2"),
    (Plan::Move, Who::Destination, "handoff.recorded:1"),
    (Plan::Move, Who::Destination, "handoff.taken:1"),
    (Plan::Move, Who::Destination, "handoff.done:1"),
    (Plan::GiveUp, Who::Source, "volume.written:2"),
    (Plan::GiveUp, Who::Source, "volume.renamed:2"),
    (Plan::GiveUp, Who::Source, "fence.lifted:1"),
    (Plan::GiveUp, Who::Destination, "volume.written:2"),
    (Plan::GiveUp, Who::Destination, "volume.renamed:2"),
    (Plan::GiveUp, Who::Destination, "give-up.recorded:1"),
];

/// A destination that has taken over takes writes, and then its source takes none; with none that
/// does, a status says what to do.
fn one_or_a_way_on(guest: &mut Guest, a: &Site, b: Option<&Site>) -> Result<String> {
    let here = guest.takes_writes(a)?;
    let there = match b {
        Some(b) if b.state()? != "standby" => guest.takes_writes(b)?,
        _ => false,
    };
    ensure!(
        !(here && there),
        "both take writes: {} {:?}",
        a.story(),
        b.map(Site::story)
    );
    if !here && !there {
        let told = [Some(a), b].into_iter().flatten().map(Site::notes);
        let told: Vec<String> = told.collect::<Result<_>>()?;
        let named = told.iter().any(|notes| {
            ["hikkoshi handoff", "hikkoshi abort", "hikkoshi release"]
                .iter()
                .any(|way| notes.contains(way))
        });
        ensure!(
            named,
            "nobody takes writes, and nobody says what to do: {told:?}"
        );
    }
    let state = |site: &Site| site.state();
    let b = b.map_or(Ok("refuses to start".to_owned()), state)?;
    Ok(format!(
        "A {}{}, B {b}",
        a.state()?,
        if here { " takes writes" } else { "" }
    ))
}

/// A is served, and a guest has worked there; B is not served yet.
fn sites(dir: &Path, seed: u64) -> Result<(Guest, Site, Site)> {
    let mut guest = Guest::new(SIZE, seed);
    let mut a = Site::new(dir, "a", &[], true);
    guest.make_image(a.image())?;
    a.start()?;
    guest.work(&mut a.client()?, 40)?;
    let b = Site::moving(dir, "b", &a, &[], true);
    Ok((guest, a, b))
}

fn is_whole(guest: &Guest, site: &mut Site) -> Result<()> {
    guest.check(&mut site.client()?)?;
    site.wait_state("local")?;
    guest.check(&mut site.client()?)?;
    site.take()?.stop()?;
    guest.check_image(site.image())
}

fn play_move(dir: &Path, who: Who, point: &str, seed: u64) -> Result<String> {
    let (mut guest, mut a, mut b) = sites(dir, seed)?;
    if who == Who::Source {
        a.kill()?;
        a.start_to_die(Some(point))?;
        b.start()?;
        b.wait_prepared()?;
    } else {
        b.start_to_die(Some(point))?;
        b.wait_prepared()?;
    }
    guest.work(&mut a.client()?, 20)?;
    // The first write, which somebody does not survive.
    let mut client = b.client()?;
    let dies = if who == Who::Source {
        a.take()?
    } else {
        b.take()?
    };
    let writing = std::thread::spawn(move || {
        let answer = guest.write_somewhere(&mut client);
        (guest, answer)
    });
    dies.wait_killed()?;
    let mut outcome = String::new();
    if who == Who::Source {
        a.start()?;
    }
    let (mut guest, answer) = writing.join().expect("it does not panic");
    if who == Who::Source {
        // Held up, and no more.
        let answer = answer?;
        ensure!(answer == Answer::OK, "the first write: {}", answer.0);
    } else {
        b.start()?;
        outcome = one_or_a_way_on(&mut guest, &a, Some(&b))?;
        outcome.push_str("; ");
    }
    // The VM's client connects again and goes on.
    guest.insist(&b)?;
    let then = one_or_a_way_on(&mut guest, &a, Some(&b))?;
    ensure!(!then.contains("takes writes"), "{then}");
    a.restart()?;
    b.restart()?;
    guest.work(&mut b.client()?, 20)?;
    is_whole(&guest, &mut b)?;
    Ok(format!("{outcome}then {then}"))
}

/// The fence is closed, the answer lost with B; B is restarted and the move given up.
fn play_giving_up(dir: &Path, who: Who, point: &str, seed: u64) -> Result<String> {
    let (mut guest, mut a, mut b) = sites(dir, seed)?;
    b.start_to_die(Some("takeover.fenced:1"))?;
    b.wait_prepared()?;
    guest.work(&mut a.client()?, 20)?;
    let mut client = b.client()?;
    let dies = b.take()?;
    let _ = guest.write_somewhere(&mut client);
    dies.wait_killed()?;
    a.wait_state("departed")?;
    let began = one_or_a_way_on(&mut guest, &a, None);
    ensure!(began.is_ok(), "{began:?}");
    if who == Who::Source {
        a.kill()?;
        // Its start records once that no memory of an earlier process is to be believed.
        a.start_to_die(Some(point))?;
        b.start()?;
        let dies = a.take()?;
        let given_up = b.daemon().try_command(&["abort"]);
        dies.wait_killed()?;
        ensure!(given_up?.status.success(), "abort failed: {}", b.story());
        a.start()?;
    } else {
        // Its start records nothing but a new incarnation, and only after a boot.
        let point = point.replace(":2", ":1");
        b.start_to_die(Some(&point))?;
        let armed = b.take()?;
        let _ = armed.try_command(&["abort"])?;
        armed.wait_killed()?;
        if b.recorded()?.contains("life = given-up") {
            // It will not be served any more; but starting it tells A.
            let said = b.refusal()?;
            ensure!(said.contains("given up"), "{said}");
        } else {
            b.start()?;
            b.daemon().command(&["abort"])?;
        }
    }
    guest.insist(&a).context("A takes writes again")?;
    a.wait_state("local")?;
    if who == Who::Source {
        ensure!(!guest.takes_writes(&b)?, "B takes writes");
    }
    a.restart()?;
    guest.work(&mut a.client()?, 20)?;
    let said = b.refusal()?;
    ensure!(said.contains("given up"), "{said}");
    let end = format!("A {} takes writes, B given up", a.state()?);
    guest.check(&mut a.client()?)?;
    a.take()?.stop()?;
    guest.check_image(a.image())?;
    Ok(end)
}

/// While it copies ahead, the destination is of no account to anybody.
#[test]
fn killed_while_it_copies_ahead() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut guest, a, mut b) = sites(dir.path(), 99)?;
    // It may not even come to serve.
    let _ = b.start_to_die(Some("prepare.written:3"));
    if let Ok(dies) = b.take() {
        dies.wait_killed()?;
    }
    guest.work(&mut a.client()?, 20)?;
    b.start()?;
    b.wait_prepared()?;
    guest.insist(&b)?;
    ensure!(!guest.takes_writes(&a)?, "A takes writes");
    is_whole(&guest, &mut b)
}

/// Plays rows on three threads; prints each.
#[test]
fn killed_at_every_step() {
    play_rows(
        ROWS,
        3,
        |(plan, who, point)| format!("{plan:?} | {who:?} | {point}"),
        |dir, (plan, who, point), seed| match plan {
            Plan::Move => play_move(dir, *who, point, seed),
            Plan::GiveUp => play_giving_up(dir, *who, point, seed),
        },
    );
}

/// Random kills of either side under load, and of the link, until the time is over. The seed and
/// the time can be set: `HIKKOSHI_MOVES_SEED`, `HIKKOSHI_MOVES_SECONDS`.
#[test]
fn killed_at_random() {
    let number = |name: &str, default: u64| {
        let set = std::env::var(name).ok();
        set.map_or(default, |text| text.parse().unwrap())
    };
    let seed = number("HIKKOSHI_MOVES_SEED", 20_261_125);
    let most = Duration::from_secs(number("HIKKOSHI_MOVES_SECONDS", 20));
    let began = Instant::now();
    let mut moves = 0;
    while began.elapsed() < most {
        let seed = seed + moves;
        println!("seed {seed}");
        random_move(seed).unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
        moves += 1;
    }
    println!("{moves} moves");
    assert!(moves > 0);
}

fn random_move(seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut dice = Dice::new(seed);
    let (mut guest, mut a, mut b) = sites(dir.path(), seed)?;
    b.start()?;
    let mut kills = 0;
    // Before the switch-over, at it, and after it.
    for part in 0..3 {
        for _ in 0..2 {
            let wait = Duration::from_micros(dice.below(60_000));
            let which = dice.below(3);
            let victim = if which == 1 { &a } else { &b };
            let pid = victim.daemon().pid();
            let frozen = which == 2;
            std::thread::scope(|scope| -> Result<()> {
                let killing = scope.spawn(move || {
                    std::thread::sleep(wait);
                    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                    let signal = if frozen {
                        rustix::process::Signal::STOP
                    } else {
                        rustix::process::Signal::KILL
                    };
                    rustix::process::kill_process(pid, signal)
                });
                // Until it notices, or for a while.
                let site = if part == 0 { &a } else { &b };
                let worked = (|| -> Result<()> {
                    // One that is frozen accepts connections (the kernel does) and answers none.
                    let patience = Duration::from_millis(300);
                    let mut client = Client::connect_within(&site.daemon().socket, patience)?;
                    for _ in 0..30 {
                        guest.write_somewhere(&mut client)?;
                    }
                    Ok(())
                })();
                drop(worked);
                killing.join().unwrap()?;
                Ok(())
            })?;
            kills += 1;
            let dead = if which == 1 { &mut a } else { &mut b };
            let killed = dead.take()?;
            if frozen {
                killed.kill()?;
            } else {
                killed.wait_killed()?;
            }
            dead.start()?;
            if part > 0 || b.state()? != "standby" {
                // It may have been handed over already, or still be A's: never both.
                let recorded = b.recorded()?;
                if recorded.contains("life = arriving") || recorded.contains("life = local") {
                    ensure!(!guest.takes_writes(&a)?, "both take writes");
                }
            }
        }
    }
    guest.insist(&b)?;
    ensure!(
        !guest.takes_writes(&a)?,
        "A takes writes after {kills} kills"
    );
    is_whole(&guest, &mut b)
}
