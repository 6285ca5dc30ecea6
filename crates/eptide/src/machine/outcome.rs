//! How a machine ends, and the one place where that is decided.

use std::fmt::Write as _;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// Why the machine stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The command that the guest was booted for has ended with this status.
    Command(u8),
    /// The guest asked for a reset.
    Reset,
    /// A processor shut down (a triple fault).
    TripleFault,
    /// The guest's kernel panicked; its own words.
    Panic(String),
    /// The time that the guest was given has passed.
    Timeout(Duration),
    /// The person at the terminal left.
    Quit,
    /// The process was told to end.
    Signal(i32),
    /// The machine cannot go on.
    Failure(String),
}

/// Whose the process's exit status is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Speaker {
    /// The machine's: the guest was booted for its own sake.
    Machine,
    /// A command's in the guest; what happens to the machine gets numbers of its own.
    Command,
}

impl Speaker {
    /// Exit status after an error of Eptide's own.
    pub(crate) fn error(self) -> u8 {
        match self {
            Self::Machine => 1,
            Self::Command => 125,
        }
    }
}

/// Exit statuses by what happened: the machine's, and with a command (`--exec`, `--script`). The
/// help text and [`Outcome::exit_code`] say the same; a test compares them.
const STATUSES: [(&str, &str, &str); 10] = [
    ("the command ended with status n", "-", "n"),
    ("a signal n ended the command", "-", "128 + n"),
    ("power-off, or left with Ctrl-A X", "0", "120"),
    ("error of Eptide, or in the guest's set-up", "1", "125"),
    ("wrong usage", "2", "2"),
    ("reset", "3", "122"),
    ("triple fault", "4", "123"),
    ("kernel panic", "121", "121"),
    ("--timeout has passed", "124", "124"),
    ("a signal n ended eptide", "128 + n", "128 + n"),
];

/// The table of exit statuses, for the help text.
pub(crate) fn status_table() -> String {
    let mut text =
        String::from("Exit status:                                 with --exec, --script\n");
    for (what, machine, command) in STATUSES {
        let _ = writeln!(text, "  {what:<42}  {machine:<8}  {command}");
    }
    text
}

impl Outcome {
    /// The process's exit status.
    pub(crate) fn exit_code(&self, speaker: Speaker) -> u8 {
        let own = |machine, command| match speaker {
            Speaker::Machine => machine,
            Speaker::Command => command,
        };
        match self {
            Self::Command(status) => *status,
            Self::PowerOff | Self::Quit => own(0, 120),
            Self::Failure(_) => speaker.error(),
            Self::Reset => own(3, 122),
            Self::TripleFault => own(4, 123),
            Self::Panic(_) => 121,
            Self::Timeout(_) => 124,
            Self::Signal(number) => 128u8.saturating_add(*number as u8),
        }
    }

    /// What a person should know about it; nothing about an end that was to be expected.
    pub(crate) fn remark(&self, speaker: Speaker) -> Option<String> {
        Some(match self {
            Self::Command(_) => return None,
            Self::PowerOff => match speaker {
                Speaker::Machine => return None,
                Speaker::Command => "the guest switched itself off, and no status of its command \
                     came: did the command do that, or has the kernel no driver for the second \
                     serial port, ttyS1?"
                    .into(),
            },
            Self::Reset => "the guest asked for a reset".into(),
            Self::TripleFault => "the guest's processor shut down (triple fault)".into(),
            Self::Panic(words) => words.clone(),
            Self::Timeout(time) => format!("the guest was ended after {} s", time.as_secs_f64()),
            Self::Quit => "left".into(),
            Self::Signal(number) => format!("ended by signal {number}"),
            Self::Failure(text) => text.clone(),
        })
    }

    /// Whether the guest's last words help to understand it.
    pub(crate) fn wants_last_lines(&self) -> bool {
        matches!(self, Self::Timeout(_) | Self::Panic(_))
    }
}

/// The request to stop, shared by everything that can make it. The first one counts.
#[derive(Clone)]
pub(crate) struct Stop {
    outcome: Arc<Mutex<Option<Outcome>>>,
    event: Arc<EventFd>,
}

impl Stop {
    /// Nobody has asked yet.
    pub(crate) fn new() -> io::Result<Self> {
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok(Self {
            outcome: Arc::default(),
            event,
        })
    }

    /// Asks for the machine to stop for the reason given.
    pub(crate) fn request(&self, outcome: Outcome) {
        self.lock().get_or_insert(outcome);
        // The counter cannot overflow and the descriptor is ours: nothing to report.
        let _ = self.event.write(1);
    }

    /// The reason, once there is one.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.lock().clone()
    }

    /// Readable from the first request on; never read, so that every waiter sees it.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    fn lock(&self) -> MutexGuard<'_, Option<Outcome>> {
        self.outcome
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let stop = Stop::new().unwrap();
        assert_eq!(stop.outcome(), None);
        stop.request(Outcome::Reset);
        stop.request(Outcome::PowerOff);
        assert_eq!(stop.outcome(), Some(Outcome::Reset));
    }

    #[test]
    fn the_table_says_what_the_statuses_are() {
        let rows = [
            (Outcome::PowerOff, "power-off"),
            (Outcome::Quit, "power-off"),
            (Outcome::Failure("x".into()), "error of Eptide"),
            (Outcome::Reset, "reset"),
            (Outcome::TripleFault, "triple fault"),
            (Outcome::Panic("x".into()), "kernel panic"),
            (Outcome::Timeout(Duration::ZERO), "--timeout"),
        ];
        for (outcome, start) in rows {
            let found = STATUSES.iter().find(|(what, ..)| what.starts_with(start));
            let (_, machine, command) = found.unwrap();
            assert_eq!(outcome.exit_code(Speaker::Machine).to_string(), *machine);
            assert_eq!(outcome.exit_code(Speaker::Command).to_string(), *command);
        }
        assert_eq!(Outcome::Command(7).exit_code(Speaker::Command), 7);
        assert_eq!(Outcome::Signal(15).exit_code(Speaker::Machine), 143);
    }
}
