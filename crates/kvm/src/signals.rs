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
//! The same holds for other calls that take locks ([`Call`]): no handler runs while its thread holds
//! one, so a handler may make any call.
//!
//! A handler that was put off finds in its context where KVM_RUN was interrupted; changes to it
//! have no effect.
//!
//! Of signals that instructions raise, a processor needs some itself and keeps the program's
//! dispositions of them ([`cpu::faults`]). Those that were sent are put off like any other; those
//! that an instruction raised are handled at once.
//!
//! Not covered, and thus run at once without ending KVM_RUN: a handler installed a few milliseconds
//! ago while vCPUs ran, and handlers beyond [`GATES`] different ones.

use crate::mailbox::{Mailbox, Request};
use cpu::faults::{self, Disposition};
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, compiler_fence};
use std::sync::{Mutex, PoisonError};

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Disposition flag: the signal is not blocked while its handler runs.
const AGAIN: u64 = libc::SA_NODEFER as u64;
/// Disposition flag: the kernel fills in the information on the signal.
const INFORMED: u64 = libc::SA_SIGINFO as u64;
/// Size of the kernel's signal set.
const SET_SIZE: usize = size_of::<u64>();
/// The highest signal.
const LAST: i32 = 64;
/// Signals that instructions raise: those are handled where they arise.
const SYNCHRONOUS: [i32; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGSYS,
];

/// Those of them that processors need: their dispositions are kept by [`cpu::faults`].
const KEPT_SIGNALS: [i32; faults::SIGNALS.len()] = faults::SIGNALS;

/// The set of them.
fn kept_signals() -> u64 {
    KEPT_SIGNALS
        .iter()
        .fold(0, |set, &signal| set | bit(signal))
}

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
}

impl Noted {
    const NONE: Noted = Noted {
        signal: 0,
        gate: 0,
        info: MaybeUninit::uninit(),
    };
}

/// Signals that are put off at once. One blocks all others, but the kernel enters the gates of all
/// that arrive together before the first of them executes, each within the one before. Beyond this
/// number, which needs handlers that do not block their own signal, they are sent anew.
const NOTED: usize = LAST as usize;

type Notes = [Cell<Noted>; NOTED];

thread_local! {
    /// Too large for the thread-local storage that threads with small stacks begin with.
    static NOTES: OwnNotes = OwnNotes(Box::new([const { Cell::new(Noted::NONE) }; NOTED]));
}

struct OwnNotes(Box<Notes>);

impl Drop for OwnNotes {
    fn drop(&mut self) {
        // The thread ends: its handlers are put off no more.
        THREAD.with(|thread| thread.noted.set(std::ptr::null()));
    }
}

/// What the calling thread's KVM_RUN and its gates share.
struct ThreadState {
    /// The mailbox of the vCPU that runs; null outside KVM_RUN.
    mailbox: Cell<*const Mailbox>,
    /// A signal came that ends KVM_RUN.
    arrived: Cell<bool>,
    /// Those of the kept signals that the thread blocks, if that is known: some programs' threads
    /// block all. They are let through while KVM_RUN is in progress.
    blocks: Cell<Option<u64>>,
    /// Kept signals that were sent although the thread blocks them: pending in truth.
    held: [Cell<Noted>; KEPT_SIGNALS.len()],
    /// Entries of `noted` that gates took. A gate that interrupts another takes the next.
    taken: AtomicUsize,
    /// This thread's [`NOTES`], once it has put anything off.
    noted: Cell<*const Notes>,
    /// What the gates interrupted: of gates within each other, the outermost.
    interrupted: Cell<MaybeUninit<Context>>,
    /// The mask of that: what all masks that gates found have in common, since what is within
    /// blocks more.
    mask: Cell<u64>,
    /// Calls in progress, besides KVM_RUN, that hold locks.
    calls: Cell<u32>,
}

thread_local! {
    static THREAD: ThreadState = const {
        ThreadState {
            mailbox: Cell::new(std::ptr::null()),
            arrived: Cell::new(false),
            blocks: Cell::new(None),
            held: [const { Cell::new(Noted::NONE) }; KEPT_SIGNALS.len()],
            taken: AtomicUsize::new(0),
            noted: Cell::new(std::ptr::null()),
            interrupted: Cell::new(MaybeUninit::uninit()),
            mask: Cell::new(u64::MAX),
            calls: Cell::new(0),
        }
    };
}

impl ThreadState {
    /// Makes room for signals that are put off. Not for a signal handler.
    fn prepare(&self) {
        if self.noted.get().is_null() {
            let notes = NOTES.try_with(|notes| &raw const *notes.0);
            self.noted.set(notes.unwrap_or(std::ptr::null()));
        }
    }

    /// Whether handlers must not run now.
    fn puts_off(&self) -> bool {
        !self.noted.get().is_null() && (!self.mailbox.get().is_null() || self.calls.get() != 0)
    }

    /// Notes what a gate has interrupted, unless that was another gate, or what a gate let go on.
    fn note_interrupted(&self, context: Context) {
        let mask = self.mask.get();
        if context.mask & mask != context.mask {
            return;
        }
        // A gate within this one may note its own in between: this one's is further out.
        loop {
            let taken = self.taken.load(Ordering::Relaxed);
            self.interrupted.set(MaybeUninit::new(context));
            self.mask.set(context.mask);
            compiler_fence(Ordering::SeqCst);
            if self.taken.load(Ordering::Relaxed) == taken {
                return;
            }
        }
    }

    /// Runs the handlers that were put off; whether there were any.
    fn run_handlers(&self, before: Option<u64>) -> bool {
        // Gates now run handlers at once; what is there is all there will be.
        compiler_fence(Ordering::SeqCst);
        let taken = self.taken.load(Ordering::Relaxed);
        if taken != 0 {
            handle(self, taken.min(NOTED), before);
        }
        taken != 0
    }
}

/// A call is in progress on this thread that holds locks of this crate, or of its user's: handlers
/// of signals wait for its end, where they may make such a call themselves.
#[must_use]
#[derive(Debug)]
pub struct Call(std::marker::PhantomData<*const ()>);

impl Call {
    /// Handlers wait from now on until the value is dropped.
    pub fn begin() -> Call {
        THREAD.with(|thread| {
            thread.prepare();
            thread.calls.set(thread.calls.get() + 1);
        });
        compiler_fence(Ordering::SeqCst);
        Call(std::marker::PhantomData)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        THREAD.with(|thread| {
            let others = thread.calls.get() - 1;
            thread.calls.set(others);
            if others == 0 && thread.mailbox.get().is_null() {
                thread.run_handlers(None);
            }
        });
    }
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
            thread.prepare();
            thread.arrived.set(false);
            if thread.mailbox.get().is_null() && thread.blocks.get() != Some(0) {
                faults::observe_sent(put_off_sent);
                let before = change_mask(libc::SIG_UNBLOCK, kept_signals());
                thread.blocks.set(Some(before & kept_signals()));
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
            let before = self.before.take();
            if !thread.run_handlers(before)
                && let Some(before) = before
            {
                change_mask(libc::SIG_SETMASK, before);
            }
            if self.outer.is_null() && thread.blocks.get().is_some_and(|set| set != 0) {
                give_back(thread);
            }
        });
    }
}

/// Blocks the kept signals again that the thread blocks; what was sent meanwhile is pending.
#[cold]
fn give_back(thread: &ThreadState) {
    change_mask(libc::SIG_BLOCK, thread.blocks.get().unwrap_or(0));
    for held in &thread.held {
        let mut noted = held.replace(Noted::NONE);
        if noted.signal == 0 {
            continue;
        }
        let info = noted.info.as_mut_ptr();
        // SAFETY: to the calling thread or process, with what the kernel said of the signal, which
        // is there where the signal's number is.
        unsafe {
            let process = libc::syscall(libc::SYS_getpid);
            if (*info).si_code == libc::SI_TKILL {
                let thread = libc::syscall(libc::SYS_gettid);
                let call = libc::SYS_rt_tgsigqueueinfo;
                libc::syscall(call, process, thread, noted.signal, info);
            } else {
                libc::syscall(libc::SYS_rt_sigqueueinfo, process, noted.signal, info);
            }
        }
    }
}

/// Runs the handlers of the signals that were put off, with the mask that the kernel would have
/// given them, then lets others come. `before` is the thread's mask if the interrupted code had
/// another.
#[cold]
fn handle(thread: &ThreadState, count: usize, before: Option<u64>) {
    // What a handler takes, a KVM_RUN within it, takes the entries anew. None comes before a mask is
    // set below: the gates left all blocked.
    // SAFETY: `prepare` set it, without which nothing is put off.
    let notes = unsafe { &*thread.noted.get() };
    let mut all: Vec<Noted> = notes[..count].iter().map(Cell::get).collect();
    // SAFETY: each gate that took an entry has seen to it that it is set.
    let interrupted = unsafe { thread.interrupted.get().assume_init() };
    let mask = before.unwrap_or(thread.mask.get());
    thread.mask.set(u64::MAX);
    thread.taken.store(0, Ordering::Relaxed);
    for noted in &mut all {
        let extra = MASKS[noted.signal as usize].load(Ordering::Relaxed);
        change_mask(libc::SIG_SETMASK, mask | extra);
        let mut context = interrupted;
        let info = noted.info.as_mut_ptr();
        call(noted.gate, noted.signal, info, (&raw mut context).cast());
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

/// In the place of a gate: the signal is one whose disposition the processors keep.
const KEPT: usize = GATES;

/// The handler behind each gate; 0 while the gate is free. Set once, under [`cover`]'s lock.
static HANDLERS: [AtomicUsize; GATES] = [const { AtomicUsize::new(0) }; GATES];

/// What is blocked, besides what the thread blocks, while a signal's handler runs.
static MASKS: [AtomicU64; LAST as usize + 1] = [const { AtomicU64::new(0) }; LAST as usize + 1];

/// The handler of a signal was installed without `SA_SIGINFO`.
static UNINFORMED: [AtomicBool; LAST as usize + 1] =
    [const { AtomicBool::new(false) }; LAST as usize + 1];

extern "C" fn gate<const N: usize>(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel filled in the information.
    let is_raised = SYNCHRONOUS.contains(&signal) && unsafe { faults::is_raised(info) };
    if is_raised || !put_off(N, signal, info, context) {
        call(N, signal, info, context);
    }
}

/// Puts off a signal that was sent and whose disposition the processors keep, if the program
/// handles it.
fn put_off_sent(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) -> bool {
    if hold(signal, info) {
        return true;
    }
    let special = [libc::SIG_DFL, libc::SIG_IGN];
    let program = faults::exchange_program(signal, None);
    program.is_some_and(|program| !special.contains(&program.handler))
        && put_off(KEPT, signal, info, context)
}

/// Keeps a signal for the end of KVM_RUN that would be pending if KVM_RUN did not let it through.
fn hold(signal: libc::c_int, info: *mut libc::siginfo_t) -> bool {
    THREAD.with(|thread| {
        let blocks = thread.blocks.get().unwrap_or(0);
        let is_held = !thread.mailbox.get().is_null() && blocks & bit(signal) != 0;
        let place = KEPT_SIGNALS.iter().position(|&kept| kept == signal);
        if let Some(place) = place.filter(|_| is_held) {
            thread.held[place].set(Noted {
                signal,
                // SAFETY: the kernel filled it in for this delivery.
                info: MaybeUninit::new(unsafe { info.read() }),
                ..Noted::NONE
            });
        }
        is_held
    })
}

/// Calls the handler behind a gate.
fn call(gate: usize, signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if gate == KEPT {
        return faults::forward(signal, info, context);
    }
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
        if !thread.puts_off() {
            return false;
        }
        let mailbox = thread.mailbox.get();
        if !mailbox.is_null() {
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
        }
        let index = thread.taken.fetch_add(1, Ordering::Relaxed);
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
        thread.note_interrupted(interrupted);
        // SAFETY: `puts_off` has seen that it is there.
        match unsafe { &*thread.noted.get() }.get(index) {
            Some(entry) => entry.set(Noted {
                signal,
                gate,
                info: MaybeUninit::new(info),
            }),
            // It is blocked when the gate returns, and comes when the handlers have run.
            None => send_again(signal, info),
        }
        true
    })
}

/// Sends a signal to the calling thread, with what the kernel said of it.
#[cold]
fn send_again(signal: i32, mut info: libc::siginfo_t) {
    change_mask(libc::SIG_BLOCK, ASYNCHRONOUS);
    // SAFETY: to the calling thread, with information that the kernel made.
    unsafe {
        let process = libc::syscall(libc::SYS_getpid);
        let thread = libc::syscall(libc::SYS_gettid);
        let call = libc::SYS_rt_tgsigqueueinfo;
        libc::syscall(call, process, thread, signal, &raw mut info);
    }
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
    if [libc::SIG_DFL, libc::SIG_IGN].contains(&found.handler) {
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
        && !KEPT_SIGNALS.contains(&signal)
        && !reserved.contains(&signal)
}

/// Covers the handlers that the program has installed.
pub(crate) fn cover() {
    faults::claim();
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
    if KEPT_SIGNALS.contains(&signal) {
        faults::claim();
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
    UNINFORMED[signal as usize].store(found.flags & INFORMED == 0, Ordering::Relaxed);
    let mut expected = found;
    // The program may set another disposition in between: then that one is what is wanted, and
    // it is covered or put back.
    while let Some(replaced) = exchange(signal, Some(&put)) {
        if replaced == expected {
            return;
        }
        (expected, found) = (put, replaced);
        UNINFORMED[signal as usize].store(found.flags & INFORMED == 0, Ordering::Relaxed);
        put = covered(&found).unwrap_or(found);
    }
}

/// What the program meant by a disposition that the kernel has: the handler behind a gate, as it
/// was installed. Async-signal-safe.
pub fn as_the_program_meant(signal: libc::c_int, found: Disposition) -> Disposition {
    let mut gates = GATE_FUNCTIONS.iter();
    let Some(gate) = gates.position(|&gate| gate as usize == found.handler) else {
        return found;
    };
    let is_uninformed = UNINFORMED
        .get(signal as usize)
        .is_some_and(|uninformed| uninformed.load(Ordering::Relaxed));
    Disposition {
        handler: HANDLERS[gate].load(Ordering::Acquire),
        flags: found.flags & !if is_uninformed { INFORMED } else { 0 },
        ..found
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
        let once = Disposition {
            flags: mine.flags | libc::SA_RESETHAND as u32 as u64,
            ..mine
        };
        let put = covered(&once).unwrap();
        assert_eq!(put.flags, once.flags | INFORMED, "the kernel resets it");
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
