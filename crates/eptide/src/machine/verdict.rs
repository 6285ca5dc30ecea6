//! What a guest that was booted for a command says about it, on the second serial port.
//!
//! The port is the guest's way out that any kernel with a serial console has a driver for, and
//! that the kernel itself writes nothing to. The initramfs writes lines:
//!
//! ```text
//! eptide ready            the console's input is read from now on
//! eptide status 3         the command has ended
//! eptide failed WORDS     the set-up went wrong before it could start
//! ```
//!
//! The first line of the latter two counts. The guest goes on to switch itself off, so that its disks are written;
//! where its kernel does not know how, the machine is stopped a little later.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use super::outcome::{Outcome, Stop};

/// Longest line that is listened to; the rest of a longer one is lost.
const LINE_MAX: usize = 1024;
/// How long a guest may take to switch itself off.
const GRACE: Duration = Duration::from_secs(20);

/// What was said so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Verdict(Arc<(Mutex<Said>, Condvar)>);

#[derive(Debug, Default)]
struct Said {
    is_ready: bool,
    outcome: Option<Outcome>,
}

impl Verdict {
    /// The outcome that the guest spoke of.
    pub(crate) fn get(&self) -> Option<Outcome> {
        self.said().outcome.clone()
    }

    /// Waits until the guest reads the console's input.
    pub(crate) fn wait_until_ready(&self) {
        let mut said = self.said();
        while !said.is_ready {
            let woken = self.0.1.wait(said);
            said = woken.unwrap_or_else(|poison| poison.into_inner());
        }
    }

    fn is_ready(&self) {
        self.said().is_ready = true;
        self.0.1.notify_all();
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.0.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Notes the outcome; whether it is the first.
    fn say(&self, outcome: Outcome) -> bool {
        let mut said = self.said();
        let is_first = said.outcome.is_none();
        said.outcome.get_or_insert(outcome);
        is_first
    }
}

/// The host's end of the port.
pub(crate) struct Listener {
    verdict: Verdict,
    stop: Stop,
    line: Vec<u8>,
}

impl Listener {
    /// Passes what the guest says on to `verdict`, and stops a guest that does not end then.
    pub(crate) fn new(verdict: Verdict, stop: Stop) -> Self {
        Self {
            verdict,
            stop,
            line: Vec::new(),
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        if line.trim() == "eptide ready" {
            self.verdict.is_ready();
        }
        if let Some(outcome) = understand(line.trim())
            && self.verdict.say(outcome.clone())
        {
            let stop = self.stop.clone();
            // Ends with the process; where it cannot be started, the guest has no such limit.
            let _ = thread::Builder::new().name("grace".into()).spawn(move || {
                thread::sleep(GRACE);
                stop.request(outcome);
            });
        }
        self.line.clear();
    }
}

fn understand(line: &str) -> Option<Outcome> {
    let line = line.strip_prefix("eptide ")?;
    if let Some(words) = line.strip_prefix("failed ") {
        return Some(Outcome::Failure(words.into()));
    }
    let status = line.strip_prefix("status ")?;
    status.parse().ok().map(Outcome::Command)
}

impl Write for Listener {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                _ if self.line.len() < LINE_MAX => self.line.push(*byte),
                _ => {}
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(text: &[u8]) -> Option<Outcome> {
        let verdict = Verdict::default();
        let mut listener = Listener::new(verdict.clone(), Stop::new().unwrap());
        for byte in text {
            listener.write_all(&[*byte]).unwrap();
        }
        verdict.get()
    }

    #[test]
    fn the_first_line_that_is_understood_counts() {
        assert_eq!(
            verdict(b"\r\neptide status 3\r\n"),
            Some(Outcome::Command(3))
        );
        let failed = b"noise\neptide failed module x\neptide status 0\n";
        assert_eq!(verdict(failed), Some(Outcome::Failure("module x".into())));
    }

    #[test]
    fn input_waits_for_the_guest() {
        let verdict = Verdict::default();
        let mut listener = Listener::new(verdict.clone(), Stop::new().unwrap());
        let waiting = thread::spawn({
            let verdict = verdict.clone();
            move || verdict.wait_until_ready()
        });
        listener.write_all(b"\neptide ready\r\n").unwrap();
        waiting.join().unwrap();
        assert_eq!(verdict.get(), None);
    }

    #[test]
    fn what_is_not_understood_says_nothing() {
        for text in [
            &b"eptide status 3"[..],
            b"eptide status 256\n",
            b"eptide status -1\n",
            b"status 3\n",
            b"\xff\xfe\n",
        ] {
            assert_eq!(verdict(text), None, "{text:?}");
        }
        let mut long = vec![b'x'; 1 << 16];
        long.push(b'\n');
        assert_eq!(verdict(&long), None);
    }
}
