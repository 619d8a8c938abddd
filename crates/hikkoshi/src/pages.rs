//! Completions and manual pages, made from the command line's grammar.

use std::io::Write as _;

use anyhow::Context as _;
use clap::CommandFactory as _;

use crate::cli::{Cli, Completions, Man};
use crate::failure::Failure;

/// Prints the completions for a shell.
///
/// # Errors
/// Nobody reads them.
pub fn completions(args: &Completions) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "hikkoshi", &mut text);
    std::io::stdout().lock().write_all(&text)?;
    Ok(())
}

/// Prints the main manual page, or writes one page per command to a directory.
///
/// # Errors
/// They cannot be written.
pub fn man(args: &Man) -> Result<(), Failure> {
    let command = Cli::command().disable_help_subcommand(true);
    match &args.dir {
        None => {
            let mut text = Vec::new();
            clap_mangen::Man::new(command).render(&mut text)?;
            std::io::stdout().lock().write_all(&text)?;
        }
        Some(dir) => {
            std::fs::create_dir_all(dir)
                .and_then(|()| clap_mangen::generate_to(command, dir))
                .with_context(|| format!("writing manual pages to {}", dir.display()))?;
        }
    }
    Ok(())
}
