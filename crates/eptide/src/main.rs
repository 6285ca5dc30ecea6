//! `eptide`: boot and observe guests on a KVM that needs no hardware.

mod cli;
mod commands;
mod devices;
mod initramfs;
mod machine;
mod report;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    terminal::install_hooks();
    let result: Result<_, Box<dyn std::error::Error>> = match Cli::parse().command {
        Command::Demo(args) => commands::demo::run(&args).map_err(Into::into),
        Command::Doctor => commands::doctor::run().map_err(Into::into),
        Command::Exec(args) => commands::exec::run(&args)
            .map(|never| match never {})
            .map_err(Into::into),
        Command::Run(args) => commands::run::run(&args).map_err(Into::into),
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
