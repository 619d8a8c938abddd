//! The simulator's command line.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::process::ExitCode;
use std::time::Duration;

use hikkoshi_sim::hunt::{Catch, Range, hunt, shorten};
use hikkoshi_sim::{Options, play};

const USAGE: &str = "\
Simulated worlds in which a volume must keep its promises

Usage: hikkoshi-sim [OPTIONS]

  --seed N              play one world
    --trace             and print what happens in it
    --steps S           and end its trouble after so many steps
  --seconds S           play new worlds for so long (60 when nothing else is said)
  --soak HOURS          the same for so many hours
  --from SEED           play worlds from this seed on (with --count, so many)
  --count N             how many
  --threads T           on so many threads; all cores when not said
  --no-shortest         do not look for the shortest beginning that fails
  --older               the source may also come back as an older disk

Worlds that failed once are played before new ones. The first that fails ends the run; it is told
with the command that plays it again. Exit status: 0 no world failed, 1 one did, 2 wrong usage.
";

#[derive(Default)]
struct Arguments {
    seed: Option<u64>,
    from: Option<u64>,
    count: Option<u64>,
    seconds: Option<u64>,
    threads: Option<u64>,
    no_shortest: bool,
    options: Options,
}

fn parse() -> Result<Option<Arguments>, String> {
    let mut parsed = Arguments::default();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let text = words.next().unwrap_or_default();
            let number = text.parse::<u64>();
            number.map_err(|_| format!("{word} needs a number, not {text:?}"))
        };
        match word.as_str() {
            "--seed" => parsed.seed = Some(number()?),
            "--from" => parsed.from = Some(number()?),
            "--count" => parsed.count = Some(number()?),
            "--seconds" => parsed.seconds = Some(number()?),
            "--soak" => parsed.seconds = Some(number()?.saturating_mul(3600)),
            "--threads" => parsed.threads = Some(number()?),
            "--steps" => parsed.options.steps = Some(number()?),
            "--trace" => parsed.options.shown = true,
            "--no-shortest" => parsed.no_shortest = true,
            "--older" => parsed.options.older = true,
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("unknown argument {word:?}; --help lists them")),
        }
    }
    Ok(Some(parsed))
}

fn main() -> ExitCode {
    let arguments = match parse() {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("hikkoshi-sim: {why}");
            return ExitCode::from(2);
        }
    };
    if !arguments.options.shown {
        // A panic is a finding, and told as one.
        std::panic::set_hook(Box::new(|_| {}));
    }
    match arguments.seed {
        Some(seed) => play_one(seed, arguments.options),
        None => play_many(&arguments),
    }
}

fn play_one(seed: u64, options: Options) -> ExitCode {
    let outcome = play(seed, options);
    println!(
        "seed {seed}: {} events, trace {:016x}, {:?}",
        outcome.events, outcome.hash, outcome.tally
    );
    match outcome.failure {
        None => ExitCode::SUCCESS,
        Some(why) => {
            println!("seed {seed} FAILED: {why}");
            ExitCode::from(1)
        }
    }
}

fn play_many(arguments: &Arguments) -> ExitCode {
    let first = arguments.from.unwrap_or_else(|| {
        // Seeded by the standard library from the system's randomness.
        RandomState::new().hash_one(0) >> 16
    });
    let seconds = match (arguments.seconds, arguments.count) {
        (None, None) => Some(60),
        (seconds, _) => seconds,
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = arguments
        .threads
        .and_then(|t| usize::try_from(t).ok())
        .unwrap_or(cores)
        .max(1);
    println!("worlds from seed {first} on, on {threads} threads");
    let range = Range {
        first,
        count: arguments.count,
        limit: seconds.map(Duration::from_secs),
    };
    let caught = hunt(range, threads, arguments.options);
    print_summary(&caught);
    let Some((seed, why)) = caught.failed else {
        return ExitCode::SUCCESS;
    };
    println!("seed {seed} FAILED: {why}");
    let older = if arguments.options.older {
        " --older"
    } else {
        ""
    };
    let command = "cargo run --profile sim --package hikkoshi-sim --";
    println!("again: {command} --seed {seed}{older}");
    if !arguments.no_shortest
        && let Some((steps, shortest)) = shorten(seed, arguments.options)
    {
        println!(
            "shortest: {command} --seed {seed}{older} --steps {steps} --trace\n  {}",
            shortest.failure.unwrap_or_default()
        );
    }
    ExitCode::from(1)
}

fn print_summary(caught: &Catch) {
    let seconds = caught.elapsed.as_secs_f64().max(0.001);
    #[allow(clippy::cast_precision_loss, reason = "for people to read")]
    let per_second = |n: u64| n as f64 / seconds;
    let t = &caught.tally;
    println!(
        "{} worlds in {seconds:.1} s: {:.0} worlds/s, {:.0} requests/s, {:.0} steps/s",
        caught.worlds,
        per_second(caught.worlds),
        per_second(t.answered),
        per_second(t.steps)
    );
    println!(
        "{} requests answered ({} with an error), {} kills, {} power cuts, {} closings, {} failed \
         openings, {} handoffs, {} moves given up, {} returns ({} refused, {} late \
         and {} early took the disk)",
        t.answered,
        t.failed,
        t.kills,
        t.power_cuts,
        t.closes,
        t.failed_opens,
        t.handoffs,
        t.given_up,
        t.returns,
        t.refused,
        t.late_takeovers,
        t.early_takeovers
    );
}
