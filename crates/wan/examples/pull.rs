//! Reads a whole export in bulk and prints how fast that was.
//!
//! `pull HOST:PORT|SOCKET [CONNECTIONS] [KIB] [WINDOW]`
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::time::Instant;

use hikkoshi_wan::{Address, Lane, NbdSource, NbdSourceConfig, Source};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| {
        arguments
            .get(at)
            .map_or(default, |text| text.parse().expect("a number"))
    };
    let place = arguments.first().expect("where the server listens");
    let address = match place.rsplit_once(':') {
        Some((host, port)) => Address::Tcp {
            host: host.to_owned(),
            port: port.parse().expect("a port"),
        },
        None => Address::Unix(PathBuf::from(place)),
    };
    let mut config = NbdSourceConfig::new(address, "");
    config.connections = usize::try_from(number(1, 4)).unwrap();
    let source = NbdSource::connect(config).unwrap();
    let len = u32::try_from(number(2, 1024)).unwrap() << 10;
    let window = number(3, 16);
    let size = source.info().size_bytes;
    let (sender, receiver) = channel();
    let (start, mut asked, mut got, mut pending) = (Instant::now(), 0, 0, 0);
    while got < size {
        while pending < window && asked < size {
            let len = u32::try_from(size - asked).unwrap_or(u32::MAX).min(len);
            let sender = sender.clone();
            let done = Box::new(move |result| sender.send(result).unwrap());
            source.read(Lane::Bulk, asked, len, done);
            asked += u64::from(len);
            pending += 1;
        }
        let fetched = receiver.recv().unwrap().unwrap();
        got += u64::try_from(fetched.data.len()).unwrap();
        pending -= 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    #[allow(clippy::cast_precision_loss)]
    let megabytes = got as f64 / 1e6;
    println!(
        "{megabytes:.0} MB over {} connections in {seconds:.2} s: {:.0} MB/s",
        source.connections(),
        megabytes / seconds
    );
}
