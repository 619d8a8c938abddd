//! x
fn main() {
    let first: u64 = std::env::args().nth(1).unwrap().parse().unwrap();
    let n: u64 = std::env::args().nth(2).unwrap().parse().unwrap();
    let shown = std::env::args().nth(3).is_some();
    let mut total = hikkoshi_sim::Tally::default();
    let t = std::time::Instant::now();
    for seed in first..first + n {
        let o = hikkoshi_sim::play(seed, None, shown);
        total.add(&o.tally);
        if let Some(f) = o.failure {
            println!("seed {seed}: {f} {:?}", o.tally);
        }
    }
    println!("{total:?} {:?}", t.elapsed());
}
