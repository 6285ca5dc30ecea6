//! `eptide run`: boot a kernel.

use crate::cli::RunArgs;
use crate::machine::outcome::Outcome;
use crate::machine::{Machine, MachineConfig, MachineError};

/// Boots the kernel that `args` name.
pub(crate) fn run(args: &RunArgs) -> Result<Outcome, MachineError> {
    let config = args.machine.with_kernel(
        args.kernel.clone(),
        args.initrd.clone(),
        args.append.clone(),
    );
    boot(&config, args.machine.stats)
}

/// Builds and runs a machine, and says how it ended.
pub(crate) fn boot(config: &MachineConfig, stats: bool) -> Result<Outcome, MachineError> {
    let (outcome, report) = Machine::build(config)?.run()?;
    match &outcome {
        Outcome::PowerOff => {}
        Outcome::Reset => eprintln!("eptide: the guest asked for a reset"),
        Outcome::TripleFault => eprintln!("eptide: the guest's processor shut down (triple fault)"),
        Outcome::Quit => eprintln!("\neptide: left"),
        Outcome::Signal(number) => eprintln!("eptide: ended by signal {number}"),
        Outcome::Failure(text) => eprintln!("eptide: {text}"),
    }
    if stats {
        eprint!("{report}");
    }
    Ok(outcome)
}
