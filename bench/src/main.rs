//! Benches of hikkoshi beside its peers, each in one run on one machine.
//!
//! Owns the command line. Prints figures and ratios, never a verdict: the machine is shared, and
//! a threshold that fails on a busy afternoon teaches nothing. `docs/bench.md` says how to read
//! the tables.

mod ahead;
mod client;
mod cpu;
mod local;
mod report;
mod server;
mod trace;
mod wan;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures hikkoshi beside its peers.
#[derive(Parser)]
#[command(name = "bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Servers side by side on this machine: hikkoshi, nbdkit, qemu-nbd.
    Local(local::Options),
    /// A guest's reads of a disk that is still beyond an emulated wide-area link; needs root.
    Ahead(ahead::Options),
    /// A disk that moves across an emulated wide-area link, beside its peers; needs root.
    Wan(Box<wan::Options>),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Local(options) => local::run(&options),
        Command::Ahead(options) => ahead::run(&options),
        Command::Wan(options) => wan::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
