//! The command line of hikkoshi, which moves the disk of a running virtual machine.
//!
//! Reads arguments, configuration files and the environment, and wires the libraries together.
//! Everything that serves disks is in `hikkoshi_daemon`; nothing here touches a guest's data,
//! except the demo, which plays the guest.

mod address;
mod choose;
mod cli;
mod command;
mod config_file;
mod demo;
mod events;
mod failure;
mod heat;
mod migrate;
mod pages;
mod plan;
mod quantity;
mod serve;
mod signals;
mod status;
mod storage;
mod supervisor;
mod top;
mod verify;
mod wait;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use hikkoshi_daemon::control::client::Command as Control;
use tracing_subscriber::EnvFilter;

use cli::Command;
use failure::Failure;

fn main() -> ExitCode {
    // Wrong usage ends here, with exit status 2; so do --help and --version, with 0.
    let command = cli::Cli::parse().command;
    let verbose = matches!(&command, Command::Serve(serve) if serve.verbose);
    log_to_stderr(match (&command, verbose) {
        (Command::Serve(_), true) => "debug",
        (Command::Serve(_), false) => "info",
        _ => "warn",
    });
    #[cfg(feature = "crash-points")]
    if let Ok(order) = std::env::var("HIKKOSHI_CRASH_AT")
        && let Err(why) = hikkoshi_crashpoint::arm(&order)
    {
        eprintln!("hikkoshi: {why}");
        return ExitCode::from(2);
    }
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("hikkoshi: {failure}");
            ExitCode::from(failure.exit_status())
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Serve(args) => serve::run(*args),
        Command::Status(args) => status::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Wait(args) => wait::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Pause(target) => command::run(&target, Control::Pause),
        Command::Resume(target) => command::run(&target, Control::Resume),
        Command::Handoff(target) => command::run(&target, Control::Handoff),
        Command::Abort(target) => command::run(&target, Control::Abort),
        Command::Release(args) => command::release(args),
        Command::Heat(args) => heat::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Limit(args) => command::limit(args),
        Command::Move(args) => storage::run(&args),
        Command::Migrate(args) => migrate::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Completions(args) => pages::completions(&args),
        Command::Man(args) => pages::man(&args),
    }
}

/// `RUST_LOG` decides when it is set and makes sense.
fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
