//! `eptide run`: boot a kernel.

use std::path::PathBuf;

use crate::cli::{RunArgs, Stats};
use crate::initramfs::{self, Initramfs, InitramfsError};
use crate::machine::outcome::Speaker;
use crate::machine::{Ending, Machine, MachineConfig, MachineError};
use crate::terminal;

/// Why a guest cannot be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Boots the kernel that `args` name; the exit status.
pub(crate) fn run(args: &RunArgs) -> Result<u8, RunError> {
    let command = initramfs::command(&args.command)?;
    let mut command_line = args.machine.command_line(args.append.as_deref());
    let initrd = match command {
        None => args.initrd.clone(),
        Some(command) => {
            command_line.insert_str(0, batch_word());
            Some(command_initramfs(args, command)?)
        }
    };
    let config = args
        .machine
        .with_kernel(args.kernel.clone(), initrd, command_line);
    let speaker = args.command.speaker();
    let config = MachineConfig {
        reports: speaker == Speaker::Command,
        ..config
    };
    Ok(boot(&config, args.machine.stats, speaker)?)
}

fn command_initramfs(args: &RunArgs, command: Vec<u8>) -> Result<PathBuf, InitramfsError> {
    let quiet = args.machine.quiet;
    let mut say = |line: &str| {
        if !quiet {
            eprintln!("eptide: {line}");
        }
    };
    let cache = packages::cache_folder()?;
    let initramfs = Initramfs {
        busybox: initramfs::busybox(&cache, None, &mut say)?,
        command: Some(command),
        plain: true,
        modules: args.modules.as_deref(),
        wanted: &[],
    };
    initramfs.store(&cache)
}

/// A word that tells the initramfs that nobody types.
pub(super) fn batch_word() -> &'static str {
    match terminal::input() {
        terminal::Input::Terminal | terminal::Input::Stream => "",
        terminal::Input::Background | terminal::Input::Nothing => "eptide.batch ",
    }
}

/// Builds and runs a machine, and says how it ended; the exit status.
pub(crate) fn boot(
    config: &MachineConfig,
    stats: Option<Stats>,
    speaker: Speaker,
) -> Result<u8, MachineError> {
    let Ending {
        outcome,
        last_lines,
        report,
    } = Machine::build(config)?.run()?;
    if let Some(remark) = outcome.remark(speaker) {
        eprintln!("\neptide: {remark}");
    }
    if outcome.wants_last_lines() && !last_lines.is_empty() {
        eprintln!("eptide: the console's last lines:");
        for line in last_lines {
            eprintln!("  | {line}");
        }
    }
    let status = outcome.exit_code(speaker);
    match stats {
        Some(Stats::Text) => eprint!("{report}"),
        Some(Stats::Json) => eprintln!("{}", report.json(status)),
        None => {}
    }
    Ok(status)
}
