//! The terminal is raw while a guest runs and as it was afterwards, whichever way out is taken.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{eptide, long_tests, own_guest, run, wait};

/// A terminal with a command on it.
struct Session {
    terminal: File,
    device: File,
    child: Child,
    seen: String,
}

impl Session {
    /// Runs `command` as the foreground job of a new terminal and waits until it has said `ready`.
    fn start(command: &mut Command, ready: &str) -> Self {
        let (mut terminal, mut device) = (0, 0);
        // SAFETY: the two integers receive descriptors; name, attributes and size are optional.
        let status = unsafe {
            libc::openpty(
                &mut terminal,
                &mut device,
                std::ptr::null_mut(),
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        assert_eq!(status, 0);
        // SAFETY: both descriptors were just opened and belong to nobody else.
        let (terminal, device) =
            unsafe { (File::from_raw_fd(terminal), File::from_raw_fd(device)) };
        use std::os::unix::process::CommandExt;
        let controlling = device.as_raw_fd();
        command
            .stdin(Stdio::from(device.try_clone().unwrap()))
            .stdout(Stdio::from(device.try_clone().unwrap()))
            .stderr(Stdio::from(device.try_clone().unwrap()));
        // SAFETY: between fork and exec only async-signal-safe functions are called.
        unsafe {
            command.pre_exec(move || {
                libc::setsid();
                libc::ioctl(controlling, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let mut session = Self {
            terminal,
            device,
            child,
            seen: String::new(),
        };
        session.wait_for(ready);
        session
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(180);
        let mut chunk = [0; 1024];
        while !self.seen.contains(text) {
            assert!(Instant::now() < deadline, "no {text:?} in {:?}", self.seen);
            if !self.is_readable() {
                continue;
            }
            let count = self.terminal.read(&mut chunk).unwrap();
            self.seen
                .push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    }

    fn type_in(&mut self, keys: &[u8], expected: &str) {
        self.terminal.write_all(keys).unwrap();
        self.wait_for(expected);
    }

    /// Whether the command has written something, within a moment.
    fn is_readable(&self) -> bool {
        let descriptor = self.terminal.as_raw_fd();
        let mut poll = libc::pollfd {
            fd: descriptor,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the pointer is to one live entry, as the count says.
        unsafe { libc::poll(&mut poll, 1, 100) > 0 }
    }

    fn is_raw(&self) -> bool {
        let mut attributes = std::mem::MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: the pointer is to memory of the right size, zeroed, which is a valid value.
        let attributes = unsafe {
            assert_eq!(
                libc::tcgetattr(self.device.as_raw_fd(), attributes.as_mut_ptr()),
                0
            );
            attributes.assume_init()
        };
        attributes.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }

    fn signal(&self, number: i32) {
        // SAFETY: the child has not been waited for, so the process id is its own.
        unsafe { libc::kill(self.child.id() as i32, number) };
    }
}

fn idle_guest() -> Command {
    let mut command = eptide();
    command
        .args(["run", "--memory", "16M", "--kernel"])
        .arg(own_guest("idle.elf"));
    command
}

#[test]
fn ctrl_a_x_leaves_and_restores() {
    let mut session = Session::start(&mut idle_guest(), "idle");
    assert!(session.is_raw());
    session.terminal.write_all(b"\x01x").unwrap();
    assert_eq!(wait(&mut session.child), Some(0));
    assert!(!session.is_raw());
}

#[test]
fn signals_end_in_order_and_restore() {
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
        let mut session = Session::start(&mut idle_guest(), "idle");
        assert!(session.is_raw());
        session.signal(signal);
        assert_eq!(wait(&mut session.child), Some(128 + signal));
        assert!(!session.is_raw());
    }
}

#[test]
fn a_fatal_signal_restores_too() {
    let mut session = Session::start(&mut idle_guest(), "idle");
    assert!(session.is_raw());
    session.signal(libc::SIGABRT);
    assert_eq!(wait(&mut session.child), None);
    assert!(!session.is_raw());
}

#[test]
fn ctrl_c_belongs_to_the_guest() {
    let mut session = Session::start(&mut idle_guest(), "idle");
    // The guest answers each byte it receives with the byte plus '@'.
    session.type_in(b"\x03", "[C]");
    session.type_in(b"\x01\x01", "[A]");
    session.terminal.write_all(b"\x01x").unwrap();
    assert_eq!(wait(&mut session.child), Some(0));
}

#[test]
fn a_person_can_work_in_the_demonstration() {
    if !long_tests() {
        return;
    }
    let mut session = Session::start(eptide().arg("demo"), "guest# ");
    assert!(session.is_raw());
    session.type_in(b"echo answer: $((6 * 7))\r", "answer: 42");
    // Editing, job control and the interrupt key are the guest's.
    session.type_in(b"echo now run''ning; sleep 1000\r", "now running");
    // The shell starts the command after it has printed; until then the key would be its own.
    std::thread::sleep(Duration::from_secs(2));
    session.type_in(b"\x03", "^C");
    session.type_in(b"echo interrupted: $?\r", "interrupted: 130");
    session.type_in(b"poweroff -f\r", "time in all");
    session.wait_for("exits to user space: interrupted");
    assert_eq!(wait(&mut session.child), Some(0));
    assert!(!session.is_raw());
}

#[test]
fn the_embedded_guest_reports_where_no_kernel_can_be_had() {
    let cache = common::folder("no-packages");
    let mut command = eptide();
    command
        .arg("demo")
        .env("EPTIDE_CACHE", cache)
        .env("PATH", "/nonexistent");
    let transcript = run(&mut command);
    transcript
        .expect_status(0)
        .expect("Hello from a guest without an operating system.");
    transcript.expect("summing 8388608 words: 0200080810204081");
    assert!(
        transcript.messages.contains("no stock kernel"),
        "{}",
        transcript.text()
    );
    assert!(
        transcript.messages.contains("time in all"),
        "{}",
        transcript.text()
    );
}
