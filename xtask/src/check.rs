//! `cargo xtask check`: what CI checks, in the order in which failures are cheapest to find.

use std::process::Command;
use std::time::Instant;

use crate::{Outcome, licences, rules, test};

/// A step's name and what it does.
type Step = (&'static str, fn() -> Outcome);

const STEPS: [Step; 9] = [
    ("format", || cargo(&["fmt", "--all", "--check"], &[])),
    ("rules", rules::run),
    ("licences", licences::run),
    ("clippy", || {
        cargo(
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "--deny",
                "warnings",
            ],
            &[],
        )
    }),
    ("tests on kvm-ioctls", on_kvm_ioctls),
    ("tests", || test::run(&[])),
    ("models", || {
        test::run(&[
            "-p",
            "eptide-mmu",
            "--features",
            "model",
            "--test",
            "models",
        ])
    }),
    ("doctests", || {
        cargo(&["test", "--workspace", "--doc", "--quiet"], &[])
    }),
    ("docs", || {
        let arguments = [
            "doc",
            "--workspace",
            "--no-deps",
            "--document-private-items",
            "--quiet",
        ];
        cargo(&arguments, &[("RUSTDOCFLAGS", "--deny warnings")])
    }),
];

/// Runs the named steps, or all.
pub(crate) fn run(names: &[&str]) -> Outcome {
    if let Some(unknown) = names
        .iter()
        .find(|name| !STEPS.iter().any(|(step, _)| step == *name))
    {
        let known: Vec<&str> = STEPS.iter().map(|(step, _)| *step).collect();
        return Err(format!(
            "no step {unknown:?}; there are {}",
            known.join(", ")
        ));
    }
    let chosen = STEPS
        .iter()
        .filter(|(step, _)| names.is_empty() || names.contains(step));
    for (name, step) in chosen {
        eprintln!("── {name}");
        let start = Instant::now();
        step().map_err(|message| format!("check: {name} failed: {message}"))?;
        eprintln!("── {name}: {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// The tests of the KVM API once more, as a program for `/dev/kvm` that has the preload library.
fn on_kvm_ioctls() -> Outcome {
    const RUNNER: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";
    let program = ["-p", "eptide-kvm", "--test", "on_kvm_ioctls"];
    cargo(
        &[&["clippy"], &program[..], &["--", "--deny", "warnings"]].concat(),
        &[],
    )?;
    cargo(&["build", "-p", "eptide-preload"], &[])?;
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let library = own.with_file_name("libeptide_preload.so");
    let runner = format!("env LD_PRELOAD={}", library.display());
    test::with_environment(&program, &[(RUNNER, &runner)])
}

pub(crate) fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(arguments).envs(environment.iter().copied());
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cargo {}: {status}", arguments.join(" "))),
        Err(error) => Err(format!("cargo {}: {error}", arguments.join(" "))),
    }
}
