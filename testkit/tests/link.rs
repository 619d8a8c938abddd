//! The emulated link keeps what it promises: round trip, rate, loss, a cut.
//!
//! These are the bounds that every measurement across it rests on. The lower bounds of times and
//! the upper bounds of rates hold on any machine, however loaded; the others are wide.

#![allow(clippy::unwrap_used)]

use anyhow::{Result, bail, ensure};
use hikkoshi_testkit::link::{Link, LinkSpec};
use hikkoshi_testkit::netns::Namespace;
use hikkoshi_testkit::pattern;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

/// A connection from B to A across the link, both ends.
fn connect(a: &Namespace, b: &Namespace, link: &Link) -> Result<(TcpStream, TcpStream)> {
    let listener = a.enter(|| Ok(TcpListener::bind((link.address_a, 0))?))?;
    let address = listener.local_addr()?;
    let client = b.enter(|| Ok(TcpStream::connect(address)?))?;
    let (server, _) = listener.accept()?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    Ok((server, client))
}

/// CPU time that this whole process has used.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.try_into().unwrap(),
        time.tv_nsec.try_into().unwrap(),
    )
}

#[test]
fn round_trip_and_rate_are_as_asked() -> Result<()> {
    let (a, b) = (Namespace::new("link-a")?, Namespace::new("link-b")?);
    let link = Link::new(&a, &b, LinkSpec::wan(50, 400))?;
    let (mut server, mut client) = connect(&a, &b, &link)?;

    let mut byte = [0];
    let mut best = Duration::MAX;
    // One that nothing held up is enough.
    for _ in 0..50 {
        let start = Instant::now();
        client.write_all(&byte)?;
        server.read_exact(&mut byte)?;
        server.write_all(&byte)?;
        client.read_exact(&mut byte)?;
        best = best.min(start.elapsed());
        if best < Duration::from_millis(100) {
            break;
        }
    }
    println!("round trip {best:?}");
    ensure!(best >= Duration::from_millis(50), "{best:?}");
    ensure!(best < Duration::from_millis(100), "{best:?}");

    const BYTES: usize = 120 << 20;
    let before = cpu();
    let start = Instant::now();
    let sender = std::thread::spawn(move || -> Result<()> {
        let chunk = vec![7; 1 << 18];
        for _ in 0..BYTES / chunk.len() {
            server.write_all(&chunk)?;
        }
        Ok(())
    });
    let mut chunk = vec![0; 1 << 18];
    let mut half = start;
    for part in 0..BYTES / chunk.len() {
        if part == BYTES / chunk.len() / 2 {
            half = Instant::now();
        }
        client.read_exact(&mut chunk)?;
    }
    sender.join().unwrap()?;
    // The second half only: TCP needs some round trips to find the rate.
    let seconds = half.elapsed().as_secs_f64();
    let mbit = (BYTES / 2 * 8) as f64 / 1e6 / seconds;
    println!(
        "{mbit:.0} Mbit/s of payload, {:.0?} in all, CPU of emulator and both ends {:.0}%, {:?}",
        start.elapsed(),
        100.0 * (cpu() - before).as_secs_f64() / start.elapsed().as_secs_f64(),
        link.a_to_b(),
    );
    ensure!(mbit <= 400.0, "{mbit} Mbit/s through a line of 400");
    ensure!(mbit > 100.0, "only {mbit} Mbit/s through a line of 400");
    Ok(())
}

#[test]
fn a_cut_link_carries_nothing_and_a_lossy_one_loses() -> Result<()> {
    let (a, b) = (Namespace::new("cut-a")?, Namespace::new("cut-b")?);
    let spec = LinkSpec {
        loss: 0.02,
        ..LinkSpec::wan(4, 200)
    };
    let link = Link::new(&a, &b, spec)?;
    let (mut server, mut client) = connect(&a, &b, &link)?;
    let mut data = vec![0; 4 << 20];
    pattern::fill(9, &mut data);
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| server.write_all(&data));
        let mut got = vec![0; data.len()];
        client.read_exact(&mut got)?;
        sender.join().unwrap()?;
        ensure!(got == data, "bytes were changed");
        Ok(())
    })?;
    ensure!(
        link.a_to_b().lost > 0,
        "2% of some thousand packets, and none was lost"
    );

    link.set(LinkSpec { loss: 0.0, ..spec });
    link.cut();
    let carried = link.b_to_a().bytes;
    client.write_all(b"x")?;
    server.set_read_timeout(Some(Duration::from_millis(300)))?;
    ensure!(server.read(&mut [0]).is_err(), "a cut link carried a byte");
    ensure!(
        link.b_to_a().bytes == carried,
        "a cut link carried a packet"
    );
    link.restore();
    server.set_read_timeout(Some(Duration::from_secs(20)))?;
    server.read_exact(&mut [0])?;
    Ok(())
}

/// Which of some packets arrive.
fn arrivals(link: &Link, seed: u64, from: &UdpSocket, to: &UdpSocket) -> Result<Vec<u8>> {
    link.draw_losses(seed);
    for number in 0..200_u8 {
        from.send(&[number])?;
    }
    let mut arrived = Vec::new();
    let mut number = [0];
    while to.recv(&mut number).is_ok() {
        arrived.push(number[0]);
    }
    Ok(arrived)
}

#[test]
fn the_same_seed_loses_the_same_packets() -> Result<()> {
    let (a, b) = (Namespace::new("seed-a")?, Namespace::new("seed-b")?);
    let spec = LinkSpec {
        loss: 0.3,
        ..LinkSpec::wan(4, 200)
    };
    let link = Link::new(&a, &b, spec)?;
    let from = a.enter(|| Ok(UdpSocket::bind((link.address_a, 0))?))?;
    let to = b.enter(|| Ok(UdpSocket::bind((link.address_b, 0))?))?;
    from.connect(to.local_addr()?)?;
    to.set_read_timeout(Some(Duration::from_millis(300)))?;
    // A packet of the kernel's own may come between.
    for _ in 0..5 {
        let [one, again, other] = [5, 5, 6].map(|seed| arrivals(&link, seed, &from, &to));
        let (one, again, other) = (one?, again?, other?);
        ensure!((100..180).contains(&one.len()), "{} of 200", one.len());
        if one == again {
            ensure!(one != other, "another seed loses the same");
            return Ok(());
        }
    }
    bail!("the same seed loses other packets");
}
