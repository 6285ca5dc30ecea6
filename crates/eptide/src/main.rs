//! `eptide`: boot and observe guests on a KVM that needs no hardware.

mod cli;
mod commands;
mod devices;
mod machine;
mod report;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => commands::run::run(&args),
    };
    match result {
        Ok(outcome) => ExitCode::from(outcome.exit_code()),
        Err(error) => {
            terminal::restore();
            eprintln!("eptide: {error}");
            ExitCode::FAILURE
        }
    }
}
