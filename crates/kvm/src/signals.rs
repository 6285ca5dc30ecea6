//! Signals end KVM_RUN.
//!
//! In the kernel, a signal that arrives while a guest runs ends the ioctl with EINTR, and its
//! handler runs after that, when the vCPU is at rest. Here the guest runs on the thread itself: a
//! handler would run in the middle of an instruction, return into it, and find the vCPU locked.
//!
//! So the handlers that the program has installed are *covered*: the disposition names a gate of
//! this module, which knows the program's handler.
//!
//! ```text
//! signal ─▶ gate ─┬─ thread not in KVM_RUN ───────────────────────────▶ handler
//!                 └─ thread in KVM_RUN: block the signal, queue it again,
//!                    make KVM_RUN end ─ vCPU unlocked ─ unblock ─ gate ─▶ handler, then EINTR
//! ```
//!
//! Only the handler's address in the disposition changes, and that it is given information on the
//! signal; other flags, mask and restorer stay. Each handler has a gate of its own for good, so a program that reads a disposition and restores it
//! later restores what it meant. Dispositions are looked at when a vCPU begins to run and every
//! millisecond while one runs.
//!
//! Not covered, and thus run at once without ending KVM_RUN: signals that instructions raise
//! (SIGSEGV and the like), handlers that are used once (`SA_RESETHAND`), a handler installed less
//! than a millisecond ago, and handlers beyond [`GATES`] different ones. A thread under a system-call filter
//! that lacks `rt_tgsigqueueinfo` must not receive signals in KVM_RUN.

use crate::mailbox::{Mailbox, Request};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// The kernel's `struct sigaction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Disposition {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Disposition flag: the handler is used once.
const ONCE: u64 = libc::SA_RESETHAND as u32 as u64;
/// Disposition flag: the kernel fills in the information on the signal.
const INFORMED: u64 = libc::SA_SIGINFO as u64;
/// Size of the kernel's signal set.
const SET_SIZE: usize = size_of::<u64>();
/// The highest signal.
const LAST: i32 = 64;
/// Signals that instructions raise: they are handled where they arise.
const SYNCHRONOUS: [i32; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGSYS,
];

/// The signal's bit in a kernel signal set.
fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// What the calling thread's KVM_RUN and its gates share.
struct ThreadState {
    /// The mailbox of the vCPU that runs; null outside KVM_RUN.
    mailbox: Cell<*const Mailbox>,
    /// Signals that KVM_SET_SIGNAL_MASK blocks: they wait for the end of KVM_RUN.
    closed: Cell<u64>,
    /// Signals that were postponed, and are blocked until KVM_RUN ends.
    held: Cell<u64>,
    /// A signal came that ends KVM_RUN.
    arrived: Cell<bool>,
}

thread_local! {
    static THREAD: ThreadState = const {
        ThreadState {
            mailbox: Cell::new(std::ptr::null()),
            closed: Cell::new(0),
            held: Cell::new(0),
            arrived: Cell::new(false),
        }
    };
}

/// KVM_RUN is in progress on this thread. Dropped after the vCPU is unlocked, which is when
/// postponed signals are handled.
pub(crate) struct Run<'a> {
    /// What a KVM_RUN further up the stack has: a handler may run another vCPU.
    outer: *const Mailbox,
    mailbox: std::marker::PhantomData<&'a Mailbox>,
}

impl<'a> Run<'a> {
    /// Signals to this thread are postponed from now on.
    pub(crate) fn begin(mailbox: &'a Mailbox) -> Run<'a> {
        THREAD.with(|thread| {
            thread.arrived.set(false);
            thread.closed.set(0);
            Run {
                outer: thread.mailbox.replace(mailbox),
                mailbox: std::marker::PhantomData,
            }
        })
    }

    /// The mask of KVM_SET_SIGNAL_MASK.
    pub(crate) fn set_mask(&self, mask: Option<u64>) {
        THREAD.with(|thread| thread.closed.set(mask.unwrap_or(0)));
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let held = THREAD.with(|thread| {
            thread.mailbox.set(self.outer);
            thread.held.take()
        });
        if held != 0 {
            // Their handlers run inside this call.
            set_blocked(libc::SIG_UNBLOCK, held);
        }
    }
}

/// Whether a signal came on this thread that ends KVM_RUN.
pub(crate) fn arrived() -> bool {
    THREAD.with(|thread| thread.arrived.get())
}

/// Whether a sleep of KVM_RUN was ended only by signals that KVM_SET_SIGNAL_MASK keeps out.
pub(crate) fn only_closed() -> bool {
    THREAD.with(|thread| {
        let held = thread.held.get();
        !thread.arrived.get() && held != 0 && held & !thread.closed.get() == 0
    })
}

/// The calling thread's pending blocked signals.
pub(crate) fn pending() -> u64 {
    let mut set = 0u64;
    // SAFETY: the kernel writes eight bytes, the size of its signal set.
    unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut set, SET_SIZE) };
    set
}

/// Ends the KVM_RUN that is in progress on the calling thread, if any, with EINTR, as a signal
/// ends it in the kernel. Async-signal-safe: for handlers that run where no gate covers them.
pub fn interrupt_current_thread() {
    let mailbox = THREAD.with(|thread| thread.mailbox.get());
    if !mailbox.is_null() {
        // SAFETY: the pointer is set only while the vCPU, which owns the mailbox, is borrowed by
        // a call further up on this thread's stack.
        unsafe { (*mailbox).post(Request::INTERRUPT_RUN) };
    }
}

fn set_blocked(how: libc::c_int, set: u64) {
    // SAFETY: the kernel reads eight bytes, the size of its signal set.
    unsafe {
        let none = std::ptr::null_mut::<u64>();
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const set,
            none,
            SET_SIZE,
        );
    }
}

/// Starts a thread to which no signal of the program is delivered.
pub(crate) fn quiet_thread<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<std::thread::JoinHandle<T>> {
    let mut before = 0u64;
    let all = u64::MAX;
    // SAFETY: the kernel reads and writes eight bytes, the size of its signal set.
    unsafe {
        let (all, before) = (&raw const all, &raw mut before);
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            all,
            before,
            SET_SIZE,
        );
    }
    // A thread starts with the mask of the one that starts it.
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    set_blocked(libc::SIG_SETMASK, before);
    thread
}

/// How many different handlers can be covered.
pub(crate) const GATES: usize = 64;

/// The handler behind each gate; 0 while the gate is free. Set once, under [`cover`]'s lock.
static HANDLERS: [AtomicUsize; GATES] = [const { AtomicUsize::new(0) }; GATES];

extern "C" fn gate<const N: usize>(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    if postpone(signal, info, context) {
        return;
    }
    let handler = HANDLERS[N].load(Ordering::Acquire);
    // SAFETY: a gate is installed after its handler was stored, which was the address of a
    // handler in the program's disposition. On this architecture the kernel passes all three
    // arguments to handlers of either kind.
    let handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
    handler(signal, info, context);
}

macro_rules! gates {
    ($($n:literal)*) => {
        [$(gate::<$n>),*]
    };
}

static GATE_FUNCTIONS: [Handler; GATES] = gates!(
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
    32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
);

/// In a gate: if KVM_RUN is in progress on this thread, arranges that the signal is delivered
/// when it has ended. Whatever happens, KVM_RUN ends.
fn postpone(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) -> bool {
    THREAD.with(|thread| {
        let mailbox = thread.mailbox.get();
        if mailbox.is_null() {
            return false;
        }
        // SAFETY: a thread-local integer.
        let errno = unsafe { *libc::__errno_location() };
        let set = bit(signal);
        // A handler with SA_NODEFER is not blocked yet; the signal would come at once again.
        set_blocked(libc::SIG_BLOCK, set);
        // SAFETY: `info` is what the kernel handed over. The signal goes to this very thread, for
        // which every origin may be stated.
        let queued = unsafe {
            let (process, task) = (libc::getpid(), libc::syscall(libc::SYS_gettid));
            libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, task, signal, info)
        };
        let postponed = queued == 0;
        if postponed {
            // SAFETY: `context` is the kernel's ucontext of this delivery; the first word of its
            // mask is the kernel's signal set, which the return from the handler puts in force.
            unsafe {
                let mask = &raw mut (*context.cast::<libc::ucontext_t>()).uc_sigmask;
                *mask.cast::<u64>() |= set;
            }
            thread.held.set(thread.held.get() | set);
        }
        if thread.closed.get() & set == 0 {
            thread.arrived.set(true);
            // SAFETY: the pointer is set only while the vCPU, which owns the mailbox, is borrowed
            // by a call further up on this thread's stack.
            unsafe { (*mailbox).post(Request::YIELD) };
        }
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        postponed
    })
}

/// Reads a disposition and, if `new` is given, replaces it.
fn exchange(signal: i32, new: Option<&Disposition>) -> Option<Disposition> {
    let mut old = Disposition::default();
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the structures have the kernel's layout. What is installed is what the program
    // installed, but for a handler that behaves as the program's.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, &raw mut old, SET_SIZE) };
    (result == 0).then_some(old)
}

/// The gate of a handler.
fn gate_of(handler: usize) -> Option<usize> {
    for (slot, gate) in HANDLERS.iter().zip(GATE_FUNCTIONS) {
        let known = slot.load(Ordering::Relaxed);
        if known == 0 {
            slot.store(handler, Ordering::Release);
        }
        if known == 0 || known == handler {
            return Some(gate as usize);
        }
    }
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!("more signal handlers than gates: some do not end KVM_RUN");
    }
    None
}

/// The disposition with its handler covered, if it has one to cover.
fn covered(found: &Disposition) -> Option<Disposition> {
    let special = [libc::SIG_DFL, libc::SIG_IGN].contains(&found.handler);
    if special || found.flags & ONCE != 0 {
        return None;
    }
    let is_gate = GATE_FUNCTIONS
        .iter()
        .any(|&gate| gate as usize == found.handler);
    let handler = if is_gate {
        found.handler
    } else {
        gate_of(found.handler)?
    };
    let flags = found.flags | INFORMED;
    let put = Disposition {
        handler,
        flags,
        ..*found
    };
    (put != *found).then_some(put)
}

/// Covers the handlers that the program has installed.
pub(crate) fn cover() {
    static TURN: Mutex<()> = Mutex::new(());
    // Who is just doing it may have looked before the caller's handler was installed.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // The C library keeps some signals between the last standard one and SIGRTMIN to itself.
    let reserved = 32..libc::SIGRTMIN();
    for signal in 1..=LAST {
        let unblockable = [libc::SIGKILL, libc::SIGSTOP].contains(&signal);
        if !unblockable && !SYNCHRONOUS.contains(&signal) && !reserved.contains(&signal) {
            cover_signal(signal);
        }
    }
}

fn cover_signal(signal: i32) {
    let Some(mut found) = exchange(signal, None) else {
        return;
    };
    let Some(mut put) = covered(&found) else {
        return;
    };
    let mut expected = found;
    // The program may set another disposition in between: then that one is what is wanted, and
    // it is covered or put back.
    while let Some(replaced) = exchange(signal, Some(&put)) {
        if replaced == expected {
            return;
        }
        (expected, found) = (put, replaced);
        put = covered(&found).unwrap_or(found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    extern "C" fn nothing(_: libc::c_int) {}

    #[test]
    fn a_handler_has_one_gate_and_keeps_flags_and_mask() {
        let mine = Disposition {
            handler: nothing as *const () as usize,
            flags: libc::SA_RESTART as u64,
            restorer: 0x1000,
            mask: 0x40,
        };
        let put = covered(&mine).unwrap();
        assert_ne!(put.handler, mine.handler);
        assert_eq!(covered(&mine), Some(put));
        let (handler, flags) = (mine.handler, mine.flags);
        assert_eq!(put.flags, flags | INFORMED);
        assert_eq!(
            Disposition {
                handler,
                flags,
                ..put
            },
            mine
        );
        assert_eq!(covered(&put), None, "a gate is not covered again");
        for handler in [libc::SIG_DFL, libc::SIG_IGN] {
            assert_eq!(covered(&Disposition { handler, ..mine }), None);
        }
        let flags = mine.flags | ONCE;
        assert_eq!(covered(&Disposition { flags, ..mine }), None);
    }
}
