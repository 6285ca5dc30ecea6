//! The machines that the program runs on, and how to have it run there.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::guest::Guest;
use super::results::{Reader, Run};

/// How long one run may take. An interpreter on a busy machine needs a minute or two.
const LIMIT: Duration = Duration::from_secs(900);
/// How long after its last line a machine may take to be gone.
const GRACE: Duration = Duration::from_secs(30);
const MEMORY_MIB: &str = "512";

/// What the program is told (see its source).
#[derive(Clone, Debug, Default)]
pub(super) struct Task {
    pub(super) parts: Option<String>,
    pub(super) divide: Option<u32>,
    pub(super) copies: Option<u32>,
}

impl Task {
    fn settings(&self) -> Vec<(&'static str, String)> {
        let number = |value: Option<u32>| value.map(|value| value.to_string());
        [
            ("compare_parts", self.parts.clone()),
            ("compare_divide", number(self.divide)),
            ("compare_copies", number(self.copies)),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
    }

    /// The kernel passes on to init what it does not know itself.
    fn kernel_command_line(&self) -> String {
        let mut line = String::from("console=ttyS0 panic=-1");
        for (name, value) in self.settings() {
            line += &format!(" {name}={value}");
        }
        line
    }

    fn processors(&self) -> String {
        self.copies.unwrap_or(1).to_string()
    }
}

/// A command that boots a guest, without what it boots.
#[derive(Debug)]
pub(super) enum Machine<'a> {
    /// The host itself, which runs the program that is init elsewhere.
    Native { program: &'a Path },
    /// `eptide run`.
    Eptide {
        program: &'a Path,
        engine: Option<&'a str>,
    },
    /// QEMU's own translator.
    Tcg { qemu: &'a Path, board: &'a str },
    /// QEMU with Eptide as its KVM.
    Exec {
        program: &'a Path,
        engine: Option<&'a str>,
        qemu: &'a Path,
        board: &'a str,
    },
}

impl Machine<'_> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Machine::Native { .. } => "native",
            Machine::Eptide { .. } => "Eptide",
            Machine::Tcg { .. } => "TCG",
            Machine::Exec { .. } => "QEMU on Eptide",
        }
    }

    fn command(&self, guest: &Guest, task: &Task) -> Command {
        match self {
            Machine::Native { program } => {
                let mut command = Command::new(program);
                command.envs(task.settings());
                command
            }
            Machine::Eptide { program, engine } => {
                let mut command = eptide(program, *engine);
                command.args(["run", "--memory", &format!("{MEMORY_MIB}M")]);
                command.args(["--cpus", &task.processors()]);
                command.arg("--kernel").arg(&guest.kernel);
                command.arg("--initrd").arg(&guest.initramfs);
                command.args(["--append", &task.kernel_command_line()]);
                command
            }
            Machine::Tcg { qemu, board } => {
                let mut command = Command::new(qemu);
                command.args(qemu_arguments("tcg", board, guest, task));
                command
            }
            Machine::Exec {
                program,
                engine,
                qemu,
                board,
            } => {
                let mut command = eptide(program, *engine);
                command.arg("exec").arg(qemu);
                command.args(qemu_arguments("kvm", board, guest, task));
                command
            }
        }
    }

    /// Has the program run once.
    pub(super) fn run(&self, guest: &Guest, task: &Task) -> Result<Run, String> {
        let mut command = self.command(guest, task);
        let start = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
        let mut console = Console::new(child, start);
        let run = console.read();
        run.map_err(|message| {
            let text = console.tail();
            format!("{}: {message}\n{text}", self.name())
        })
    }
}

fn eptide(program: &Path, engine: Option<&str>) -> Command {
    let mut command = Command::new(program);
    if let Some(engine) = engine {
        command.env("EPTIDE_ENGINE", engine);
    }
    command
}

fn qemu_arguments(accelerator: &str, board: &str, guest: &Guest, task: &Task) -> Vec<OsString> {
    let plain = [
        "-accel",
        accelerator,
        "-M",
        board,
        "-cpu",
        "max",
        "-m",
        MEMORY_MIB,
        "-smp",
        &task.processors(),
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
        "-append",
        &task.kernel_command_line(),
    ];
    let mut arguments: Vec<OsString> = plain.iter().map(Into::into).collect();
    arguments.extend(["-kernel".into(), guest.kernel.clone().into()]);
    arguments.extend(["-initrd".into(), guest.initramfs.clone().into()]);
    arguments
}

/// A running machine and what it says, with the times.
struct Console {
    child: Child,
    lines: mpsc::Receiver<(Duration, String)>,
    said: Vec<String>,
    start: Instant,
}

impl Console {
    fn new(mut child: Child, start: Instant) -> Self {
        let (sender, lines) = mpsc::channel();
        if let Some(output) = child.stdout.take() {
            listen(output, start, sender.clone());
        }
        if let Some(errors) = child.stderr.take() {
            listen(errors, start, sender);
        }
        Self {
            child,
            lines,
            said: Vec::new(),
            start,
        }
    }

    /// Reads to the end of the process.
    fn read(&mut self) -> Result<Run, String> {
        let mut reader = Reader::default();
        let mut finished: Option<(Run, Instant)> = None;
        loop {
            let deadline = match &finished {
                Some((_, end)) => *end + GRACE,
                None => self.start + LIMIT,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((at, line)) => {
                    let run = reader.line(&line, at);
                    self.said.push(line);
                    if let Some(run) = run? {
                        finished = Some((run, Instant::now()));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(match finished {
                        Some(_) => "did not end after the program had".into(),
                        None => format!("not done after {} s", LIMIT.as_secs()),
                    });
                }
            }
        }
        let status = self.child.wait().map_err(|error| error.to_string())?;
        match finished {
            Some((run, _)) if status.success() => Ok(run),
            Some(_) => Err(format!("ended with {status}")),
            None => Err(format!("ended before the program had, with {status}")),
        }
    }

    fn tail(&self) -> String {
        self.said[self.said.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // After a normal end it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends on what comes, line by line, until the end.
fn listen(from: impl Read + Send + 'static, start: Instant, sender: Sender<(Duration, String)>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send((start.elapsed(), line)).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_reaches_the_program_by_the_kernel() {
        let task = Task {
            parts: Some("crc,fork".into()),
            divide: Some(10),
            copies: Some(2),
        };
        assert_eq!(
            task.kernel_command_line(),
            "console=ttyS0 panic=-1 compare_parts=crc,fork compare_divide=10 compare_copies=2"
        );
        assert_eq!(task.processors(), "2");
        assert_eq!(
            Task::default().kernel_command_line(),
            "console=ttyS0 panic=-1"
        );
    }

    fn console(script: &str) -> Console {
        let child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Console::new(child, Instant::now())
    }

    #[test]
    fn a_process_that_ends_well_has_a_result() {
        let run = console("echo hello; echo compare: start; echo compare: end 5").read();
        assert_eq!(run.unwrap().guest_time, Duration::from_micros(5));
    }

    #[test]
    fn a_process_that_does_not_is_an_error() {
        let message = console("echo compare: start").read().unwrap_err();
        assert!(message.contains("ended before"), "{message}");
        let mut failing = console("echo compare: start; echo compare: end 5; echo why; exit 3");
        let message = failing.read().unwrap_err();
        assert!(message.contains("exit status: 3"), "{message}");
        assert!(failing.tail().ends_with("why"));
    }
}
