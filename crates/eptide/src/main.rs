//! `eptide`: boot and observe guests on a KVM that needs no hardware.

mod cli;
mod commands;
mod devices;
mod initramfs;
mod machine;
mod report;
mod terminal;
mod watch;

use std::process::ExitCode;

use cli::Command;
use machine::outcome::Speaker;

fn main() -> ExitCode {
    terminal::install_hooks();
    let command = cli::parse().command;
    let speaker = match &command {
        Command::Run(args) => args.command.speaker(),
        Command::Demo(args) => args.command.speaker(),
        Command::Doctor | Command::Exec(_) | Command::Generate(_) => Speaker::Machine,
    };
    match run(&command) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            terminal::restore();
            eprintln!("eptide: {error}");
            ExitCode::from(speaker.error())
        }
    }
}

/// Does what was asked; the exit status.
fn run(command: &Command) -> Result<u8, Box<dyn std::error::Error>> {
    Ok(match command {
        Command::Demo(args) => commands::demo::run(args)?,
        Command::Doctor => commands::doctor::run().map(|()| 0)?,
        Command::Exec(args) => match commands::exec::run(args)? {},
        Command::Generate(args) => commands::generate::run(args).map(|()| 0)?,
        Command::Run(args) => commands::run::run(args)?,
    })
}
