//! The person's terminal: raw while a guest runs, as it was before on every way out.
//!
//! Ways out: returning, a panic in any thread (a hook), a signal that ends the process in an
//! orderly way (blocked and read by the machine's event loop), and a fatal fault (a handler that
//! restores and lets the fault happen again).

use std::io::{self, IsTerminal, Read};
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::machine::verdict::Verdict;

/// Settings from before the terminal was made raw.
static SAVED: OnceLock<libc::termios> = OnceLock::new();
/// The terminal is raw now.
static RAW: AtomicBool = AtomicBool::new(false);

/// A raw terminal; dropping it restores the settings.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

/// What standard input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    /// A terminal whose foreground this process is.
    Terminal,
    /// A terminal that another job has: touching it would stop this process.
    Background,
    /// A file or a pipe.
    Stream,
    /// Nothing that could be read, such as `/dev/null`.
    Nothing,
}

impl Input {
    /// What a person should know who gets no terminal.
    pub(crate) fn remark(self) -> Option<&'static str> {
        match self {
            Self::Terminal | Self::Nothing => None,
            // Where nobody watches, nobody would try to type.
            Self::Stream if !io::stderr().is_terminal() => None,
            Self::Background => Some(
                "the terminal belongs to another job: the guest's console takes no input; \
                 end it with a signal",
            ),
            Self::Stream => Some(
                "no terminal: the guest's console reads standard input as it is, Ctrl-A X does \
                 not leave; end it with a signal",
            ),
        }
    }
}

/// Looks at standard input.
pub(crate) fn input() -> Input {
    if !io::stdin().is_terminal() {
        return match is_null() {
            true => Input::Nothing,
            false => Input::Stream,
        };
    }
    // SAFETY: both calls take and return plain numbers.
    match unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() } {
        true => Input::Terminal,
        false => Input::Background,
    }
}

/// Whether standard input is closed or `/dev/null`.
fn is_null() -> bool {
    let Ok(input) = rustix::fs::fstat(io::stdin()) else {
        return true;
    };
    rustix::fs::stat("/dev/null").is_ok_and(|null| {
        (null.st_dev, null.st_ino) == (input.st_dev, input.st_ino)
            || (input.st_rdev != 0 && null.st_rdev == input.st_rdev)
    })
}

impl RawTerminal {
    /// Makes the terminal on standard input raw. `None` where there is none to be had.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if input() != Input::Terminal {
            return Ok(None);
        }
        let saved = match SAVED.get() {
            Some(saved) => *saved,
            None => *SAVED.get_or_init(attributes_or_default),
        };
        let mut raw = saved;
        // SAFETY: `raw` is a valid termios; the function only edits its flags.
        unsafe { libc::cfmakeraw(&mut raw) };
        RAW.store(true, Ordering::SeqCst);
        set_attributes(&raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back. Safe to call from a signal handler and when nothing was changed.
pub(crate) fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(saved) = SAVED.get()
    {
        // Nobody is left to tell when this fails.
        let _ = set_attributes(saved);
    }
}

fn attributes_or_default() -> libc::termios {
    let mut attributes = MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: the pointer is to memory of the right size; a failing call leaves the zeroes, which
    // are a valid termios too.
    unsafe {
        libc::tcgetattr(libc::STDIN_FILENO, attributes.as_mut_ptr());
        attributes.assume_init()
    }
}

fn set_attributes(attributes: &libc::termios) -> io::Result<()> {
    // SAFETY: `attributes` is a valid termios for the duration of the call.
    match unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, attributes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Installs what restores the terminal on a panic or a fatal fault. To be called once, before the
/// KVM implementation starts: it recovers from faults on guest memory with handlers of its own,
/// which must see them first.
pub(crate) fn install_hooks() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        previous(info);
    }));
    for (slot, signal) in FATAL.iter().enumerate() {
        install_fatal_handler(slot, *signal);
    }
}

/// Signals that end the process from within.
const FATAL: [libc::c_int; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
];

/// What handled each of [`FATAL`] before.
static PREVIOUS: [OnceLock<libc::sigaction>; FATAL.len()] =
    [const { OnceLock::new() }; FATAL.len()];

fn install_fatal_handler(slot: usize, signal: libc::c_int) {
    let handler: extern "C" fn(libc::c_int) = on_fatal;
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: both structures are zeroed, which is a valid value; the handler has the signature
    // that sa_flags (no SA_SIGINFO) asks for and calls only async-signal-safe functions.
    unsafe {
        let fields = &mut *action.as_mut_ptr();
        fields.sa_sigaction = handler as usize;
        fields.sa_flags = libc::SA_ONSTACK;
        if libc::sigaction(signal, action.as_ptr(), previous.as_mut_ptr()) == 0 {
            let _ = PREVIOUS[slot].set(previous.assume_init());
        }
    }
}

/// Restores the terminal, puts the previous handler back and returns: the fault happens again and
/// takes its usual course.
extern "C" fn on_fatal(signal: libc::c_int) {
    restore();
    let slot = FATAL.iter().position(|fatal| *fatal == signal);
    let previous = slot.and_then(|slot| PREVIOUS[slot].get());
    // SAFETY: sigaction and raise are async-signal-safe; a null new action never occurs because
    // the default action is used where none was saved.
    unsafe {
        let default = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        libc::sigaction(signal, previous.unwrap_or(&default), std::ptr::null_mut());
        if signal == libc::SIGABRT {
            libc::raise(signal);
        }
    }
}

/// What a person typed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Typed {
    /// Bytes for the guest.
    Bytes(Vec<u8>),
    /// Ctrl-A X.
    Leave,
}

/// Finds the escape sequence Ctrl-A X in a stream of bytes; Ctrl-A Ctrl-A is one Ctrl-A.
#[derive(Debug, Default)]
pub(crate) struct EscapeFilter {
    armed: bool,
}

const CTRL_A: u8 = 1;
/// Ends a terminal's input.
const CTRL_D: u8 = 4;

impl EscapeFilter {
    /// Sorts what came in.
    pub(crate) fn filter(&mut self, input: &[u8]) -> Typed {
        let mut bytes = Vec::with_capacity(input.len());
        for byte in input {
            match (std::mem::take(&mut self.armed), *byte) {
                (true, b'x' | b'X') => return Typed::Leave,
                (true, CTRL_A) => bytes.push(CTRL_A),
                (false, CTRL_A) => self.armed = true,
                (true, other) => bytes.extend([CTRL_A, other]),
                (false, other) => bytes.push(other),
            }
        }
        Typed::Bytes(bytes)
    }
}

/// Takes what was typed.
pub(crate) type Receiver = Box<dyn FnMut(&[u8]) + Send>;

/// Reads standard input on a thread of its own and hands it on. The thread ends with the process:
/// a blocking read cannot be called back.
///
/// A guest with a `verdict` says when it listens: what comes from a file or a pipe waits for that,
/// and is followed by the key that ends input. A person sees what they do.
pub(crate) fn spawn_input(
    mut receive: Receiver,
    verdict: Option<Verdict>,
    leave: impl Fn() + Send + 'static,
) -> io::Result<()> {
    let interactive = match input() {
        Input::Terminal => true,
        Input::Stream => false,
        Input::Background | Input::Nothing => return Ok(()),
    };
    let mut filter = EscapeFilter::default();
    std::thread::Builder::new()
        .name("input".into())
        .spawn(move || {
            let verdict = verdict.filter(|_| !interactive);
            if let Some(verdict) = &verdict {
                verdict.wait_until_ready();
            }
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
                match interactive {
                    true => match filter.filter(&buffer[..count]) {
                        Typed::Bytes(bytes) => receive(&bytes),
                        Typed::Leave => return leave(),
                    },
                    false => receive(&buffer[..count]),
                }
            }
            // A shell takes the key only at its prompt, and may not be there yet.
            while verdict.is_some() {
                std::thread::sleep(Duration::from_secs(1));
                receive(&[CTRL_D]);
            }
        })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_even_across_reads() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.filter(b"ls\x01"), Typed::Bytes(b"ls".to_vec()));
        assert_eq!(filter.filter(b"x"), Typed::Leave);
    }

    #[test]
    fn ctrl_a_itself_can_be_typed() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.filter(b"\x01\x01x"), Typed::Bytes(b"\x01x".to_vec()));
        assert_eq!(filter.filter(b"\x01a"), Typed::Bytes(b"\x01a".to_vec()));
    }
}
