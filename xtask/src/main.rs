//! Developer chores: `cargo xtask <chore>`.

mod check;
mod compare;
mod dist;
mod fetch;
mod licences;
mod rules;
mod selftests;
mod test;

use std::process::ExitCode;

/// What a chore reports when it fails.
type Outcome = Result<(), String>;

const USAGE: &str = "\
usage: cargo xtask <chore>

  check               everything CI checks; the first failing step ends it
  check <step>…       only these steps: format, rules, licences, clippy, tests on kvm-ioctls,
                      tests, models, doctests, docs
  compare [option…]   the same program on the host, under Eptide and under QEMU TCG, as a table;
                      needs gcc and QEMU
    --exec            QEMU on Eptide instead of eptide run
    --two             two copies on two processors against one on one
    --programs        programs of Debian packages instead of guests/compare
    --rounds N        best of N (3)       --quick        a tenth of the work
    --parts a,b       only these          --engine NAME  EPTIDE_ENGINE for Eptide
    --eptide PATH     instead of this tree's
    --qemu PATH       instead of qemu-system-x86_64
    --machine NAME    QEMU's -M (pc)
  dist                an archive with the program, its man pages, completions and licences, tried
                      in a folder with a space
  fetch [package…]    guest material from Debian packages into the cache folder
                      (default: what the demo and the boot tests need)
  fetch --refresh …   the current version, even if the cache has one
  licences            the licences of all dependencies
  selftests [name…]   Linux's own tests of KVM on the preload library (all, or those whose
                      command holds a name); needs gcc, make and 2 GB in the cache folder
  test [switch…]      the tests, by cargo nextest if it is installed, else by cargo test; the
                      switches are theirs (-p eptide-mmu, --test faults, part of a test's name)";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        ["check", steps @ ..] => check::run(steps),
        ["compare", options @ ..] => compare::run(options),
        ["dist"] => dist::run(),
        ["fetch", "--refresh", packages @ ..] => fetch::run(packages, true),
        ["fetch", packages @ ..] => fetch::run(packages, false),
        ["selftests", names @ ..] => selftests::run(names),
        ["licences"] => licences::run(),
        ["test", switches @ ..] => test::run(switches),
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
