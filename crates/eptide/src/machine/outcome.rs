//! How a machine ends, and the one place where that is decided.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

/// Why the machine stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A processor shut down (a triple fault).
    TripleFault,
    /// The person at the terminal left.
    Quit,
    /// The process was told to end.
    Signal(i32),
    /// The machine cannot go on.
    Failure(String),
}

impl Outcome {
    /// The process's exit status.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Quit => 0,
            Self::Failure(_) => 1,
            Self::Reset => 3,
            Self::TripleFault => 4,
            Self::Signal(number) => 128u8.saturating_add(*number as u8),
        }
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
}
