//! `cargo xtask selftests`: Linux's own tests of KVM, built from Debian's kernel source, on the
//! preload library.
//!
//! They are an oracle that knows nothing of Eptide. `selftests.txt` lists the programs, how they
//! are called and what is expected of each; what comes out otherwise fails the chore. Nothing of
//! the tests themselves is in this repository.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use packages::Package;

use crate::{Outcome, check::cargo};

const PACKAGE: &str = "linux-source-6.1";
const EXPECTED: &str = include_str!("../selftests.txt");
/// What of the source the tests and their headers are made from.
const PARTS: [&str; 8] = [
    "Kbuild",
    "Makefile",
    "arch/Kconfig",
    "arch/x86",
    "include",
    "scripts",
    "tools",
    "usr",
];
/// What the compiler is told for all tests: Debian's source has parts of later kernels in it that
/// name an assertion otherwise and count on a header.
const FLAGS: &str = "-DTEST_ASSERT_EQ=ASSERT_EQ -include ../../../../usr/include/linux/stddef.h";

/// What became of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Pass,
    /// It asks for what is not there.
    Skip,
    Fail,
    Timeout,
    /// There is no such program.
    Missing,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Pass => "pass",
            Verdict::Skip => "skip",
            Verdict::Fail => "fail",
            Verdict::Timeout => "timeout",
            Verdict::Missing => "missing",
        }
    }

    /// Whether a word of the list allows it. What some tests need, hosts have or have not.
    fn is_expected(self, word: &str) -> bool {
        word == self.name() || word == "host" && matches!(self, Verdict::Pass | Verdict::Skip)
    }
}

/// A line of the list.
#[derive(Debug)]
struct Test {
    expected: &'static str,
    /// How long it may take.
    limit: Duration,
    command: &'static str,
}

fn listed() -> Result<Vec<Test>, String> {
    let lines = EXPECTED.lines();
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let mut words = line.splitn(2, ' ');
            let expected = words.next();
            let rest = words.next().map_or("", str::trim_start);
            let (seconds, command) = rest.split_once(' ').unwrap_or_default();
            let seconds = seconds.parse().ok();
            let command = Some(command).filter(|command| !command.is_empty());
            match (expected, seconds, command) {
                (Some(expected), Some(seconds), Some(command)) => Ok(Test {
                    expected,
                    limit: Duration::from_secs(seconds),
                    command,
                }),
                _ => Err(format!("selftests.txt: {line:?}")),
            }
        })
        .collect()
}

/// Runs the tests whose command contains one of `names`, or all.
pub(crate) fn run(names: &[&str]) -> Outcome {
    let tests = listed()?;
    let programs = build()?;
    cargo(&["build", "--release", "--package", "eptide-preload"], &[])?;
    let library = library()?;
    let chosen = tests
        .iter()
        .filter(|test| names.is_empty() || names.iter().any(|name| test.command.contains(name)));
    let (mut counts, mut surprises) = ([0; 5], Vec::new());
    for test in chosen {
        let start = Instant::now();
        let (verdict, word) = execute(test, &programs, &library)?;
        counts[verdict as usize] += 1;
        let is_expected = verdict.is_expected(test.expected);
        let seconds = start.elapsed().as_secs_f64();
        let remark = if is_expected { "" } else { "  ← expected " };
        let wanted = if is_expected { "" } else { test.expected };
        println!(
            "{:7} {seconds:6.1} s  {}{remark}{wanted}",
            verdict.name(),
            test.command
        );
        if !is_expected {
            eprintln!("{word}");
            surprises.push(test.command);
        }
    }
    let [pass, skip, fail, timeout, missing] = counts;
    println!("{pass} pass, {skip} skip, {fail} fail, {timeout} time out, {missing} missing");
    if surprises.is_empty() {
        return Ok(());
    }
    Err(format!(
        "selftests: not as expected: {}",
        surprises.join(", ")
    ))
}

/// The folder of the built tests.
fn build() -> Result<PathBuf, String> {
    let cache = packages::cache_folder().map_err(|error| error.to_string())?;
    let package = Package::obtain(&cache, PACKAGE, &mut |line: &str| eprintln!("{line}"))
        .map_err(|error| format!("{PACKAGE}: {error}"))?;
    let folder = cache.join("selftests");
    let (source, programs) = (folder.join(PACKAGE), folder.join("programs"));
    let mark = folder.join(".package");
    if fs::read_to_string(&mark).is_ok_and(|version| version == package.version) {
        return Ok(programs);
    }
    eprintln!(
        "unpacking and building the KVM selftests of {}",
        package.version
    );
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let archive = package.root.join(format!("usr/src/{PACKAGE}.tar.xz"));
    let parts = PARTS.map(|part| format!("{PACKAGE}/{part}"));
    quietly(
        Command::new("tar")
            .arg("-xf")
            .arg(archive)
            .arg("-C")
            .arg(&folder)
            .args(parts),
    )?;
    quietly(Command::new("make").arg("-C").arg(&source).arg("headers"))?;
    let tests = source.join("tools/testing/selftests/kvm");
    // Some program that cannot be built is not what ends it: it will be missing.
    let built = quietly(
        Command::new("make")
            .arg("-C")
            .arg(tests)
            .args(["--jobs", "2", "--keep-going", "CC=gcc", "KHDR_INCLUDES="])
            .arg(format!("OUTPUT={}", programs.display()))
            .arg(format!("EXTRA_CFLAGS={FLAGS}")),
    );
    if let Err(message) = built {
        eprintln!("{message}");
    }
    fs::write(&mark, &package.version).map_err(|error| format!("{}: {error}", mark.display()))?;
    Ok(programs)
}

/// Runs a command whose output is of interest if it fails.
fn quietly(command: &mut Command) -> Outcome {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name}: {}\n{}", output.status, tail(&text)))
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// The preload library, beside this program's own folder.
fn library() -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let target = program.ancestors().nth(2).unwrap_or(Path::new("target"));
    let library = target.join("release/libeptide_preload.so");
    match library.is_file() {
        true => Ok(library),
        false => Err(format!("{} is not there", library.display())),
    }
}

/// Runs a test; what became of it and the end of what it said.
fn execute(test: &Test, programs: &Path, library: &Path) -> Result<(Verdict, String), String> {
    /// What `timeout` ends with when it had to end the program, gently or not.
    const TIMED_OUT: [Option<i32>; 2] = [Some(124), Some(137)];
    let mut words = test.command.split_whitespace();
    let program = programs.join(words.next().unwrap_or_default());
    if !program.is_file() {
        return Ok((Verdict::Missing, String::new()));
    }
    let mut preload = std::ffi::OsString::from("LD_PRELOAD=");
    preload.push(library);
    let output = Command::new("timeout")
        .args(["--kill-after=5", &test.limit.as_secs().to_string(), "env"])
        .arg(preload)
        .arg(program)
        .args(words)
        .current_dir(programs)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("timeout: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("cannot be preloaded") {
        return Err(text.into());
    }
    let verdict = match output.status.code() {
        Some(0) => Verdict::Pass,
        Some(4) => Verdict::Skip,
        code if TIMED_OUT.contains(&code) => Verdict::Timeout,
        _ => Verdict::Fail,
    };
    Ok((verdict, tail(&text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_can_be_read() {
        let tests = listed().unwrap();
        assert!(tests.len() > 50);
        for test in tests {
            assert!(["pass", "skip", "fail", "host"].contains(&test.expected));
        }
    }
}
