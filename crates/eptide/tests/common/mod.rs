//! Running the `eptide` command on guests.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The longest any guest may take. Far beyond what is normal: a guest that hangs must not hang CI.
const PATIENCE: Duration = Duration::from_secs(600);

/// Whether tests that boot kernels are to run. Says so when not.
pub(crate) fn long_tests() -> bool {
    let wanted = std::env::var_os("EPTIDE_LONG_TESTS").is_some();
    if !wanted {
        eprintln!("skipped: boots a kernel; set EPTIDE_LONG_TESTS=1 to run it");
    }
    wanted
}

/// A folder for one test's files, empty.
pub(crate) fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// The kernel that `cargo xtask fetch` fetches.
pub(crate) fn cloud_kernel() -> PathBuf {
    let output = eptide().args(["demo", "--prepare"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().next().unwrap().into()
}

/// Path of one of the project's own guests.
pub(crate) fn own_guest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../guests")
        .join(name)
}

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Transcript {
    /// Exit status.
    pub(crate) status: Option<i32>,
    /// The guest's console.
    pub(crate) console: String,
    /// What `eptide` itself said.
    pub(crate) messages: String,
}

impl Transcript {
    /// The rest of the first console line that contains `start`, after it.
    pub(crate) fn after(&self, start: &str) -> &str {
        let line = self.console.lines().find_map(|line| line.split_once(start));
        line.unwrap_or_else(|| panic!("no {start:?} in:\n{}", self.text()))
            .1
            .trim()
    }

    /// Everything, for the message of a failing test.
    pub(crate) fn text(&self) -> String {
        format!(
            "status {:?}\n{}\n{}",
            self.status, self.console, self.messages
        )
    }

    /// Asserts that the console holds `text`.
    pub(crate) fn expect(&self, text: &str) -> &Self {
        assert!(
            self.console.contains(text),
            "no {text:?} in:\n{}",
            self.text()
        );
        self
    }

    /// Asserts that `eptide` itself said `text`.
    pub(crate) fn expect_message(&self, text: &str) -> &Self {
        assert!(
            self.messages.contains(text),
            "no {text:?} in:\n{}",
            self.text()
        );
        self
    }

    /// Asserts how the run ended.
    pub(crate) fn expect_status(&self, status: i32) -> &Self {
        assert_eq!(self.status, Some(status), "{}", self.text());
        self
    }

    /// Asserts that the kernel complained about nothing.
    pub(crate) fn expect_health(&self) -> &Self {
        const COMPLAINTS: [&str; 17] = [
            "WARNING: CPU",
            "[Firmware Bug]",
            "[Firmware Warn]",
            "unchecked MSR access",
            "BUG:",
            "Oops",
            "Call Trace",
            "general protection fault",
            "Kernel panic",
            "unstable",
            "Unstable",
            "clocksource: timekeeping watchdog",
            "soft lockup",
            "hard LOCKUP",
            "detected stalls",
            "hung_task",
            "traps:",
        ];
        for complaint in COMPLAINTS {
            assert!(
                !self.console.contains(complaint),
                "{complaint:?} in:\n{}",
                self.text()
            );
        }
        self
    }
}

/// Starts `eptide`, with nothing to read, and waits for its end.
pub(crate) fn run(command: &mut Command) -> Transcript {
    run_to_end(command.stdin(Stdio::null()), &[])
}

/// The same, with something to read.
pub(crate) fn run_with_input(command: &mut Command, input: &[u8]) -> Transcript {
    run_to_end(command.stdin(Stdio::piped()), input)
}

fn run_to_end(command: &mut Command, input: &[u8]) -> Transcript {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    if let Some(mut pipe) = child.stdin.take() {
        pipe.write_all(input).unwrap();
    }
    let console = reader(child.stdout.take().unwrap());
    let messages = reader(child.stderr.take().unwrap());
    let status = wait(&mut child);
    let text = |thread: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&thread.join().unwrap()).replace('\r', "")
    };
    Transcript {
        status,
        console: text(console),
        messages: text(messages),
    }
}

fn reader(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

/// The child's exit status; `None` if it had to be killed or a signal ended it.
pub(crate) fn wait(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

/// The command under test.
pub(crate) fn eptide() -> Command {
    Command::new(env!("CARGO_BIN_EXE_eptide"))
}

/// How the hypervisor maps guest memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ept {
    /// With EPT.
    On,
    /// On shadow page tables.
    Off,
}

impl Ept {
    /// `test` in this mode, as a name for its files.
    pub(crate) fn name(self, test: &str) -> String {
        format!("{test}-{self:?}")
    }
}

/// `eptide demo` with a script to run in the guest.
pub(crate) fn demo(ept: Ept, test: &str, script: &str) -> Command {
    let path = folder(&ept.name(test)).join("script");
    fs::write(&path, format!("#!/bin/busybox sh\n{script}")).unwrap();
    let mut command = eptide();
    command.arg("demo").arg("--script").arg(path);
    command.arg(match ept {
        Ept::On => "--ept=on",
        Ept::Off => "--ept=off",
    });
    command
}

/// The ELF file inside a bzImage whose payload is compressed with LZ4, written beside `test`'s
/// other files.
pub(crate) fn vmlinux_of(bz_image: &Path, test: &str) -> PathBuf {
    /// Magic number of LZ4's legacy frame, and the most that one of its blocks holds.
    const LEGACY: u32 = 0x184c_2102;
    const BLOCK: usize = 8 << 20;
    let image = fs::read(bz_image).unwrap();
    let word = |bytes: &[u8], at: usize| {
        let word: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
        u32::from_le_bytes(word)
    };
    // The boot protocol's header: sectors of setup code, payload's offset behind them and length.
    let kernel = (image[0x1f1] as usize + 1) * 512;
    let payload = kernel + word(&image, 0x248) as usize;
    let payload = &image[payload..payload + word(&image, 0x24c) as usize];
    assert_eq!(word(payload, 0), LEGACY, "the payload is not LZ4's");
    // Behind the blocks stands the size of what they hold.
    let (blocks, size) = payload[4..].split_at(payload.len() - 8);
    let mut file = Vec::new();
    let mut rest = blocks;
    while let Some((length, tail)) = rest.split_at_checked(4) {
        let (block, tail) = tail.split_at(word(length, 0) as usize);
        file.extend(lz4_flex::block::decompress(block, BLOCK).unwrap());
        rest = tail;
    }
    assert_eq!(file.len(), word(size, 0) as usize);
    let path = folder(test).join("vmlinux");
    fs::write(&path, file).unwrap();
    path
}
