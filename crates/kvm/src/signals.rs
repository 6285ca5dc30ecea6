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
//! signal ─▶ gate ─┬─ thread not in KVM_RUN ────────────────────────────▶ handler
//!                 └─ thread in KVM_RUN: note the signal, block all, make
//!                    KVM_RUN end ─ vCPU unlocked ─▶ handler ─ unblock ─▶ EINTR
//! ```
//!
//! Only the handler's address in the disposition changes, and that it is given information on the
//! signal; other flags, mask and restorer stay. Each handler has a gate of its own for good, so a
//! program that reads a disposition and restores it later restores what it meant. Dispositions are
//! looked at when a vCPU begins to run and every few milliseconds while one runs, by a thread of
//! this crate's own: a vCPU's thread may be under a filter of system calls. What it needs here is
//! `rt_sigprocmask`, and that only when a signal comes.
//!
//! A handler that was put off finds in its context where KVM_RUN was interrupted; changes to it
//! have no effect.
//!
//! Not covered, and thus run at once without ending KVM_RUN: signals that instructions raise
//! (SIGSEGV and the like), handlers that are used once (`SA_RESETHAND`), a handler installed a few
//! milliseconds ago while vCPUs ran, and handlers beyond [`GATES`] different ones.

use crate::mailbox::{Mailbox, Request};
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, compiler_fence};
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
/// Disposition flag: the signal is not blocked while its handler runs.
const AGAIN: u64 = libc::SA_NODEFER as u64;
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
const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// All signals but those that instructions raise: a processor needs these for guest memory that is
/// not there, and to block one that is raised ends the program.
const ASYNCHRONOUS: u64 = {
    let (mut set, mut i) = (u64::MAX, 0);
    while i < SYNCHRONOUS.len() {
        set &= !bit(SYNCHRONOUS[i]);
        i += 1;
    }
    set
};

/// The kernel's `struct ucontext`, as far as programs see it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Context {
    head: [u64; 5],
    machine: libc::mcontext_t,
    mask: u64,
}

/// A signal that was put off.
#[derive(Clone, Copy)]
struct Noted {
    signal: i32,
    gate: usize,
    info: MaybeUninit<libc::siginfo_t>,
    context: MaybeUninit<Context>,
}

impl Noted {
    const NONE: Noted = Noted {
        signal: 0,
        gate: 0,
        info: MaybeUninit::uninit(),
        context: MaybeUninit::uninit(),
    };
}

/// Signals that are put off at once. One blocks all others; more come only in the few instructions
/// before that.
const NOTED: usize = 4;

/// What the calling thread's KVM_RUN and its gates share.
struct ThreadState {
    /// The mailbox of the vCPU that runs; null outside KVM_RUN.
    mailbox: Cell<*const Mailbox>,
    /// A signal came that ends KVM_RUN.
    arrived: Cell<bool>,
    /// The signals that instructions raise are not blocked: some programs' threads block all.
    takes_faults: Cell<bool>,
    /// Entries of `noted` that gates took. A gate that interrupts another takes the next.
    taken: AtomicUsize,
    noted: [Cell<Noted>; NOTED],
}

thread_local! {
    static THREAD: ThreadState = const {
        ThreadState {
            mailbox: Cell::new(std::ptr::null()),
            arrived: Cell::new(false),
            takes_faults: Cell::new(false),
            taken: AtomicUsize::new(0),
            noted: [const { Cell::new(Noted::NONE) }; NOTED],
        }
    };
}

/// KVM_RUN is in progress on this thread. Dropped after the vCPU is unlocked, which is when
/// signals that were put off are handled.
pub(crate) struct Run<'a> {
    /// What a KVM_RUN further up the stack has: a handler may run another vCPU.
    outer: *const Mailbox,
    /// The thread's mask, if KVM_SET_SIGNAL_MASK added to it.
    before: Option<u64>,
    mailbox: std::marker::PhantomData<&'a Mailbox>,
}

impl<'a> Run<'a> {
    /// Signals to this thread are put off from now on.
    pub(crate) fn begin(mailbox: &'a Mailbox) -> Run<'a> {
        THREAD.with(|thread| {
            thread.arrived.set(false);
            if !thread.takes_faults.replace(true) {
                change_mask(libc::SIG_UNBLOCK, !ASYNCHRONOUS);
            }
            Run {
                outer: thread.mailbox.replace(mailbox),
                before: None,
                mailbox: std::marker::PhantomData,
            }
        })
    }

    /// The mask of KVM_SET_SIGNAL_MASK: what it blocks waits for the end of KVM_RUN. (What it lets
    /// through although the thread blocks it is looked for with [`pending`].)
    pub(crate) fn set_mask(&mut self, mask: Option<u64>) {
        if let Some(mask) = mask {
            self.before = Some(change_mask(libc::SIG_BLOCK, mask & ASYNCHRONOUS));
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        THREAD.with(|thread| {
            thread.mailbox.set(self.outer);
            // Gates now run handlers at once; what is there is all there will be.
            compiler_fence(Ordering::SeqCst);
            let taken = thread.taken.load(Ordering::Relaxed);
            let before = self.before.take();
            if taken != 0 {
                thread.taken.store(0, Ordering::Relaxed);
                handle(thread, taken.min(NOTED), before);
            } else if let Some(before) = before {
                change_mask(libc::SIG_SETMASK, before);
            }
        });
    }
}

/// Runs the handlers of the signals that were put off, with the mask that the kernel would have
/// given them, then lets others come. `before` is the thread's mask if the interrupted code had
/// another.
#[cold]
fn handle(thread: &ThreadState, count: usize, before: Option<u64>) {
    // What a handler takes, a KVM_RUN within it, takes the entries anew.
    let mut all = [Noted::NONE; NOTED];
    for (copy, noted) in all.iter_mut().zip(&thread.noted) {
        *copy = noted.get();
    }
    // SAFETY: gates fill the entries they take before they return, and `count` were taken.
    let interrupted = unsafe { all[0].context.assume_init_ref() }.mask;
    let mask = before.unwrap_or(interrupted);
    for noted in &mut all[..count] {
        let extra = MASKS[noted.signal as usize].load(Ordering::Relaxed);
        change_mask(libc::SIG_SETMASK, mask | extra);
        let (info, context) = (noted.info.as_mut_ptr(), noted.context.as_mut_ptr());
        call(noted.gate, noted.signal, info, context.cast());
    }
    change_mask(libc::SIG_SETMASK, mask);
}

/// Whether a signal came on this thread that ends KVM_RUN.
pub(crate) fn arrived() -> bool {
    THREAD.with(|thread| thread.arrived.get())
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

/// Changes the thread's mask and returns what it was.
fn change_mask(how: libc::c_int, set: u64) -> u64 {
    let mut before = 0u64;
    // SAFETY: the kernel reads and writes eight bytes, the size of its signal set.
    unsafe {
        let (set, before) = (&raw const set, &raw mut before);
        libc::syscall(libc::SYS_rt_sigprocmask, how, set, before, SET_SIZE);
    }
    before
}

/// Does something while every signal is blocked.
pub(crate) fn while_blocked<T>(body: impl FnOnce() -> T) -> T {
    let before = change_mask(libc::SIG_BLOCK, ASYNCHRONOUS);
    let result = body();
    change_mask(libc::SIG_SETMASK, before);
    result
}

/// How many different handlers can be covered.
pub(crate) const GATES: usize = 64;

/// The handler behind each gate; 0 while the gate is free. Set once, under [`cover`]'s lock.
static HANDLERS: [AtomicUsize; GATES] = [const { AtomicUsize::new(0) }; GATES];

/// What is blocked, besides what the thread blocks, while a signal's handler runs.
static MASKS: [AtomicU64; LAST as usize + 1] = [const { AtomicU64::new(0) }; LAST as usize + 1];

extern "C" fn gate<const N: usize>(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    if !put_off(N, signal, info, context) {
        call(N, signal, info, context);
    }
}

/// Calls the handler behind a gate.
fn call(gate: usize, signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let handler = HANDLERS[gate].load(Ordering::Acquire);
    // SAFETY: a gate is installed after its handler was stored, which was the address of a
    // handler in the program's disposition. Handlers of one argument do not look at the others.
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

/// In a gate: if KVM_RUN is in progress on this thread, makes it end and notes the signal for
/// then. Whatever happens, KVM_RUN ends.
fn put_off(
    gate: usize,
    signal: i32,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) -> bool {
    THREAD.with(|thread| {
        let mailbox = thread.mailbox.get();
        if mailbox.is_null() {
            return false;
        }
        thread.arrived.set(true);
        // SAFETY: a thread-local integer.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above. The mailbox's pointer is set only while the vCPU, which owns it, is
        // borrowed by a call further up on this thread's stack.
        unsafe {
            let saved = *errno;
            (*mailbox).post(Request::YIELD);
            *errno = saved;
        }
        let index = thread.taken.fetch_add(1, Ordering::Relaxed);
        let Some(entry) = thread.noted.get(index) else {
            return false;
        };
        let context = context.cast::<Context>();
        // SAFETY: `info` and `context` are what the kernel handed over for this delivery; the mask
        // in the context is put in force by the return from the gate.
        let (info, mut interrupted) = unsafe {
            let read = (info.read(), context.read());
            (*context).mask |= ASYNCHRONOUS;
            read
        };
        // The floating-point state is in the kernel's frame, which goes away.
        interrupted.machine.fpregs = std::ptr::null_mut();
        entry.set(Noted {
            signal,
            gate,
            info: MaybeUninit::new(info),
            context: MaybeUninit::new(interrupted),
        });
        true
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

/// Held by whoever covers.
static TURN: Mutex<()> = Mutex::new(());

/// Whether a signal's handlers are covered.
fn is_coverable(signal: i32) -> bool {
    // The C library keeps some signals between the last standard one and SIGRTMIN to itself.
    let reserved = 32..libc::SIGRTMIN();
    let unblockable = [libc::SIGKILL, libc::SIGSTOP].contains(&signal);
    (1..=LAST).contains(&signal)
        && !unblockable
        && !SYNCHRONOUS.contains(&signal)
        && !reserved.contains(&signal)
}

/// Covers the handlers that the program has installed.
pub(crate) fn cover() {
    cpu::claim_faults();
    // Who is just doing it may have looked before the caller's handler was installed.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    (1..=LAST)
        .filter(|&signal| is_coverable(signal))
        .for_each(cover_signal);
}

/// Makes the handler that the program has just installed for a signal end KVM_RUN from now on;
/// without this call, that is so when a vCPU next begins to run, or some milliseconds later.
/// Async-signal-safe, and safe in the child of a fork.
pub fn cover_signal_handler(signal: libc::c_int) {
    if SYNCHRONOUS.contains(&signal) {
        cpu::claim_faults();
    }
    if !is_coverable(signal) {
        return;
    }
    while_blocked(|| {
        // Who has it may be a thread that a fork has left behind.
        if let Ok(_turn) = TURN.try_lock() {
            cover_signal(signal);
        }
    });
}

fn cover_signal(signal: i32) {
    let Some(mut found) = exchange(signal, None) else {
        return;
    };
    let own = if found.flags & AGAIN != 0 {
        0
    } else {
        bit(signal)
    };
    MASKS[signal as usize].store(found.mask | own, Ordering::Relaxed);
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

    #[test]
    fn faults_are_not_put_off() {
        let mailbox = crate::mailbox::tests::mailbox();
        let before = change_mask(libc::SIG_BLOCK, 0);
        // SAFETY: a handler that does nothing, and a signal to the calling thread.
        unsafe {
            libc::signal(libc::SIGUSR2, nothing as *const () as usize);
            cover_signal_handler(libc::SIGUSR2);
            let run = Run::begin(&mailbox);
            libc::raise(libc::SIGUSR2);
            assert!(arrived());
            let blocked = change_mask(libc::SIG_BLOCK, 0);
            assert_eq!(blocked & !ASYNCHRONOUS, 0);
            assert_ne!(blocked & bit(libc::SIGTERM), 0);
            drop(run);
        }
        assert_eq!(change_mask(libc::SIG_BLOCK, 0), before);
    }
}
