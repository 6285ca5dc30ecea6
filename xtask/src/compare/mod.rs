//! `cargo xtask compare`: the same program on the host, under Eptide and under QEMU's translator.
//!
//! The program is `guests/compare`; in the machines it is the init of a stock kernel. Machines take
//! turns, so that what else the host does falls on all of them, and the best of some rounds counts.
//! Results that differ between machines are an error: a fast wrong answer is none.

mod guest;
mod machine;
mod options;
mod programs;
mod results;
mod table;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use self::guest::Guest;
use self::machine::{Machine, Task};
use self::options::{Mode, Options};
use self::results::Run;
use crate::{Outcome, check::cargo};

pub(crate) fn run(arguments: &[&str]) -> Outcome {
    let options = Options::parse(arguments)?;
    if options.mode != Mode::Two {
        check_qemu(&options.qemu)?;
    }
    let eptide = match &options.eptide {
        Some(program) => program.clone(),
        None => build_eptide()?,
    };
    let engine = options.engine.as_deref();
    let (qemu, board) = (options.qemu.as_path(), options.board.as_str());
    let ours = match options.mode {
        Mode::Run | Mode::Two | Mode::Programs => Machine::Eptide {
            program: &eptide,
            engine,
        },
        Mode::Exec => Machine::Exec {
            program: &eptide,
            engine,
            qemu,
            board,
        },
    };
    let task = Task {
        parts: options.parts.clone(),
        divide: options.quick.then_some(10),
        copies: None,
    };
    let theirs = Machine::Tcg { qemu, board };
    let table = match options.mode {
        Mode::Two => two(&ours, &task, options.rounds)?,
        Mode::Run | Mode::Exec => parts(&ours, &theirs, &task, options.rounds)?,
        Mode::Programs => programs(&ours, &theirs, &task, options.rounds)?,
    };
    println!("{table}");
    Ok(())
}

/// Our program on the host and in both machines.
fn parts(ours: &Machine, theirs: &Machine, task: &Task, rounds: u32) -> Result<String, String> {
    let (guest, program) = guest::prepare()?;
    let native = Machine::Native { program: &program };
    let turns = [&native, ours, theirs].map(|machine| (machine, task.clone()));
    let [on_host, our_best, their_best] = take_turns(&guest, &turns, rounds)?;
    let (ours, theirs) = ((ours.name(), &our_best), (theirs.name(), &their_best));
    Ok(table::machines(Some(&on_host), ours, theirs))
}

/// Programs of Debian packages in both machines. The host need not have what they need.
fn programs(ours: &Machine, theirs: &Machine, task: &Task, rounds: u32) -> Result<String, String> {
    let guest = programs::prepare()?;
    let turns = [ours, theirs].map(|machine| (machine, task.clone()));
    let [our_best, their_best] = take_turns(&guest, &turns, rounds)?;
    let (ours, theirs) = ((ours.name(), &our_best), (theirs.name(), &their_best));
    Ok(table::machines(None, ours, theirs))
}

/// One copy on one processor against two on two.
fn two(ours: &Machine, task: &Task, rounds: u32) -> Result<String, String> {
    let (guest, program) = guest::prepare()?;
    let native = Machine::Native { program: &program };
    let turn = |machine, copies| {
        let copies = Some(copies);
        let task = task.clone();
        (machine, Task { copies, ..task })
    };
    let turns = [
        turn(&native, 1),
        turn(&native, 2),
        turn(ours, 1),
        turn(ours, 2),
    ];
    let best = take_turns(&guest, &turns, rounds)?;
    let [native_one, native_two, one, two] = &best;
    Ok(table::copies(
        [native_one, native_two],
        (ours.name(), [one, two]),
    ))
}

/// The best of each turn.
fn take_turns<const N: usize>(
    guest: &Guest,
    turns: &[(&Machine, Task); N],
    rounds: u32,
) -> Result<[Run; N], String> {
    let mut runs = [const { Vec::new() }; N];
    for round in 1..=rounds {
        for ((machine, task), runs) in turns.iter().zip(&mut runs) {
            let (name, start) = (machine.name(), Instant::now());
            let run = machine.run(guest, task)?;
            run.has_all(task.parts.as_deref())?;
            eprintln!(
                "round {round}: {name}: {:.1} s",
                start.elapsed().as_secs_f64()
            );
            if !run.clocks_agree() {
                eprintln!(
                    "warning: {name}: {:?} by the host's clock are {:?} by the guest's",
                    run.host_time, run.guest_time
                );
            }
            runs.push(run);
        }
    }
    let named = turns.iter().zip(&runs);
    let named: Vec<(&str, &Run)> = named
        .flat_map(|((machine, _), runs)| runs.iter().map(|run| (machine.name(), run)))
        .collect();
    results::agree(&named)?;
    Ok(runs.map(|runs| Run::best(&runs)))
}

fn check_qemu(qemu: &Path) -> Outcome {
    let tried = Command::new(qemu)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    match tried {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            eprintln!("{}", text.lines().next().unwrap_or_default());
            Ok(())
        }
        Ok(output) => Err(format!("{}: {}", qemu.display(), output.status)),
        Err(error) => Err(format!(
            "{}: {error} (apt-get install qemu-system-x86, or name another by --qemu)",
            qemu.display()
        )),
    }
}

/// The release build of the command, with the preload library beside it.
fn build_eptide() -> Result<PathBuf, String> {
    let packages = ["--package", "eptide", "--package", "eptide-preload"];
    let arguments = [&["build", "--release"], &packages[..]].concat();
    cargo(&arguments, &[("EPTIDE_EMBED", "off")])?;
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let target = own.ancestors().nth(2).unwrap_or(Path::new("target"));
    Ok(target.join("release/eptide"))
}
