//! `cargo xtask test`: the tests, by `cargo nextest` where it is installed and by `cargo test`
//! where it is not.
//!
//! Both take the switches that choose packages, targets and features, and a part of a test's name.

use std::process::Command;

use crate::Outcome;
use crate::check::cargo;

/// What chooses packages; without one of these the tests are those of the workspace.
const PACKAGES: [&str; 5] = ["-p", "--package", "--workspace", "--all", "--manifest-path"];

/// Runs the tests that `arguments` choose, or all.
pub(crate) fn run(arguments: &[&str]) -> Outcome {
    with_environment(arguments, &[])
}

/// As [`run`], with more environment variables.
pub(crate) fn with_environment(arguments: &[&str], environment: &[(&str, &str)]) -> Outcome {
    let long = std::env::var_os("EPTIDE_LONG_TESTS").is_some();
    let (words, own) = command_line(arguments, has_nextest(), long);
    cargo(&words, &[&own[..], environment].concat())
}

fn has_nextest() -> bool {
    let found = Command::new("cargo")
        .args(["nextest", "--version"])
        .output();
    found.is_ok_and(|output| output.status.success())
}

/// Cargo's arguments and the environment that goes with them.
fn command_line<'a>(
    arguments: &[&'a str],
    nextest: bool,
    long: bool,
) -> (Vec<&'a str>, Vec<(&'static str, &'static str)>) {
    let mut words = match nextest {
        true => vec!["nextest", "run"],
        false => vec!["test"],
    };
    let before_dashes = arguments.iter().take_while(|word| **word != "--");
    if !before_dashes.clone().any(|word| chooses_packages(word)) {
        words.push("--workspace");
    }
    // `.config/nextest.toml` says the same for nextest.
    if !nextest && !before_dashes.clone().any(|word| *word == "--no-fail-fast") {
        words.push("--no-fail-fast");
    }
    words.extend(arguments);
    // A guest that boots a kernel wants a processor; nextest has a group for these tests.
    let environment = match !nextest && long {
        true => vec![("RUST_TEST_THREADS", "1")],
        false => Vec::new(),
    };
    (words, environment)
}

fn chooses_packages(word: &str) -> bool {
    let name = word.split_once('=').map_or(word, |(name, _)| name);
    PACKAGES.contains(&name) || (word.starts_with("-p") && !word.starts_with("--"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(arguments: &[&'static str], nextest: bool) -> String {
        command_line(arguments, nextest, false).0.join(" ")
    }

    #[test]
    fn both_runners_get_the_same_switches() {
        assert_eq!(words(&[], true), "nextest run --workspace");
        assert_eq!(words(&[], false), "test --workspace --no-fail-fast");
        for choice in ["-p", "-peptide", "--package=eptide", "--workspace"] {
            assert_eq!(
                words(&[choice, "x"], true),
                format!("nextest run {choice} x")
            );
        }
        assert_eq!(
            words(&["-p", "eptide", "--", "--exact", "a"], false),
            "test --no-fail-fast -p eptide -- --exact a"
        );
        assert_eq!(
            words(&["paging", "--", "-p"], true),
            "nextest run --workspace paging -- -p"
        );
    }

    #[test]
    fn kernels_boot_one_at_a_time() {
        let threads = vec![("RUST_TEST_THREADS", "1")];
        assert_eq!(command_line(&[], false, true).1, threads);
        assert!(command_line(&[], true, true).1.is_empty());
        assert!(command_line(&[], false, false).1.is_empty());
    }
}
