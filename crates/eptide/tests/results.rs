//! The guest's result is the command's result: exit statuses, what is said, what is printed where.

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{
    Transcript, cloud_kernel, eptide, folder, long_tests, own_guest, run, run_with_input,
};

/// `eptide run` with one of the project's own guests.
fn run_own(guest: &str) -> Command {
    let mut command = eptide();
    command
        .args(["run", "--memory", "64M", "--kernel"])
        .arg(own_guest(guest));
    command
}

#[test]
fn a_guest_that_takes_too_long_is_ended() {
    let transcript = run(run_own("idle.elf").args(["--timeout", "500ms"]));
    transcript
        .expect_status(124)
        .expect("idle")
        .expect_message("eptide: the guest was ended after 0.5 s\n")
        .expect_message("the console's last lines:\n  | idle");
}

#[test]
fn a_guest_in_time_is_left_alone() {
    let transcript = run(run_own("hello.elf").args(["--timeout", "10m"]));
    transcript.expect_status(0);
    assert_eq!(transcript.messages, "", "{}", transcript.text());
}

#[test]
fn the_report_is_json_if_asked_for() {
    let transcript = run(run_own("hello.elf").arg("--stats=json"));
    transcript.expect_status(0);
    let report: serde_json::Value = serde_json::from_str(&transcript.messages).unwrap();
    assert_eq!(report["exit_status"], 0);
    assert!(
        report["instructions"].as_u64().unwrap() > 40_000_000,
        "{report}"
    );
    assert!(
        report["exits"]["IoInstruction"].as_u64().unwrap() > 100,
        "{report}"
    );
    let (ran, all) = (&report["processor_time"], &report["time"]);
    assert!(
        ran.as_f64().unwrap() > 0.0 && all.as_f64().unwrap() > 0.0,
        "{report}"
    );
}

#[test]
fn the_report_has_a_heading() {
    let transcript = run(run_own("hello.elf").arg("--stats"));
    transcript.expect_message("what happened (docs/running.md explains the lines)\n");
    transcript.expect_message("million a second of that)");
}

#[test]
fn what_was_named_and_is_not_there_is_an_error() {
    let cache = folder("nothing-there");
    for words in [
        &["--kernel-package", "no-such-kernel"][..],
        &["--exec", "true"],
        &["--module", "loop"],
    ] {
        let mut command = eptide();
        command.arg("demo").args(words);
        command
            .env("EPTIDE_CACHE", &cache)
            .env("PATH", "/nonexistent");
        let transcript = run(&mut command);
        let status = if words[0] == "--exec" { 125 } else { 1 };
        transcript.expect_status(status).expect_message("eptide: ");
        assert_eq!(transcript.console, "", "{}", transcript.text());
    }
    let transcript = run(eptide().args(["demo", "--script", "/no/such/script"]));
    transcript
        .expect_status(125)
        .expect_message("/no/such/script: No such file");
}

#[test]
fn the_statuses_are_documented_as_the_help_has_them() {
    let documented = include_str!("../../../docs/running.md");
    for command in ["run", "demo"] {
        let help = eptide().args([command, "--help"]).output().unwrap().stdout;
        let help = String::from_utf8(help).unwrap();
        let (_, table) = help.split_once("Exit status:").unwrap();
        let rows: Vec<&str> = table
            .lines()
            .skip(1)
            .filter(|line| !line.is_empty())
            .collect();
        assert_eq!(rows.len(), 10, "{help}");
        for row in rows {
            let cells: Vec<&str> = row
                .split("  ")
                .map(str::trim)
                .filter(|c| !c.is_empty())
                .collect();
            let row = format!("| {} |\n", cells.join(" | "));
            assert!(documented.contains(&row), "no {row:?} in docs/running.md");
        }
    }
}

/// `eptide run` with the cloud kernel and a command.
fn exec(command: &str) -> Command {
    exec_within("10m", command)
}

fn exec_within(time: &str, command: &str) -> Command {
    let mut eptide = eptide();
    eptide
        .args([
            "run",
            "--quiet",
            "--timeout",
            time,
            "--exec",
            command,
            "--kernel",
        ])
        .arg(cloud_kernel());
    eptide
}

#[test]
fn a_kernel_boots_for_a_command() {
    if !long_tests() {
        return;
    }
    let transcript = run(&mut exec("uname -s; exit 7"));
    assert_eq!(transcript.console, "Linux\n", "{}", transcript.text());
    assert_eq!(transcript.messages, "", "{}", transcript.text());
    transcript.expect_status(7);

    run(&mut exec("kill -9 $$")).expect_status(137);
    run(&mut exec("cat; test ! -s /proc/modules")).expect_status(0);
}

#[test]
fn a_kernel_boots_for_a_script() {
    if !long_tests() {
        return;
    }
    let script = folder("script").join("file");
    fs::write(
        &script,
        "#!/bin/sh\necho \"here: $0\"\n[ -b /dev/vda ] && exit 3\n",
    )
    .unwrap();
    let disk = script.with_file_name("disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let kernel = cloud_kernel();
    let release = kernel.file_name().unwrap().to_str().unwrap();
    let release = release.strip_prefix("vmlinuz-").unwrap();
    let modules = kernel
        .ancestors()
        .nth(2)
        .unwrap()
        .join("lib/modules")
        .join(release);
    let mut command = eptide();
    command.args(["run", "--kernel"]).arg(&kernel);
    command.arg("--script").arg(&script);
    command.arg("--modules").arg(modules);
    command.arg("--disk").arg(&disk);
    run(&mut command).expect_status(3).expect("here: /command");
}

#[test]
fn a_kernel_boots_for_nothing_and_the_status_says_why() {
    if !long_tests() {
        return;
    }
    let ended = |command: &str, status| -> Transcript {
        let transcript = run(&mut exec(command));
        transcript.expect_status(status);
        transcript
    };
    ended("poweroff -f", 120).expect_message("no status of its command came");
    ended("echo c > /proc/sysrq-trigger", 121)
        .expect_message("eptide: Kernel panic - not syncing: sysrq triggered crash");
    ended("reboot -f", 122).expect_message("asked for a reset");
    let transcript = run(&mut exec_within("60s", "echo started; sleep 1000"));
    transcript
        .expect_status(124)
        .expect_message("  | started\n");
}

#[test]
fn a_demonstration_boots_for_what_is_piped_to_it() {
    if !long_tests() {
        return;
    }
    let mut command = eptide();
    command.args(["demo", "--timeout", "5m"]);
    let lines = b"echo answer: $((6 * 7))\ntest -e /dev/null && echo second\n";
    let transcript = run_with_input(&mut command, lines);
    transcript
        .expect_status(0)
        .expect("\nanswer: 42\n")
        .expect("\nsecond\n")
        .expect("reboot: Power down");
    let transcript = run_with_input(&mut exec("sort; exit 4"), b"b\na\n");
    transcript.expect_status(4).expect("\na\nb\n");
}

#[test]
fn a_module_that_does_not_load_fails_a_demonstration() {
    if !long_tests() {
        return;
    }
    let demo = |module: &str| {
        let words = ["demo", "--exec", "true", "--module", module];
        run(eptide().args(words).stdin(Stdio::null()))
    };
    demo("loop").expect_status(0);
    demo("no-such-module")
        .expect_status(125)
        .expect_message("module no-such-module: neither in");
    // Needs hardware that is not there.
    demo("kvm-intel")
        .expect_status(125)
        .expect_message("the kernel does not load kvm-intel.ko");
}
