//! The signals by which the host reports faults of guest accesses, shared with the program.
//!
//! A processor needs some signals ([`SIGNALS`]); the program has a disposition of its own for each,
//! and what is no processor's must end as if no processor were there. So the kernel's disposition
//! is `entry`, *claimed* for good, and the program's is kept here, to the last flag:
//!
//! ```text
//! signal ─▶ entry ─┬─ raised by an instruction of this crate's ─▶ resumes behind it
//!                  └─ else ─▶ observer (a KVM_RUN that puts it off) ─▶ forward
//! forward ─┬─ default: the kernel's default is restored, and the signal comes again
//!          ├─ ignored: nothing, but what an instruction raised cannot be ignored
//!          └─ handler: with the mask the kernel would have given it; SA_RESETHAND resets it
//! ```
//!
//! A program whose `sigaction` goes through [`exchange_program`] never sees the claim. Another one's
//! dispositions are found when the signals are claimed anew ([`claim`]). Its handler may have been
//! told `entry` as its predecessor and call that: `entry` knows, since the kernel's frame is not
//! right above its return address then, and stands for the disposition before that handler's.
//!
//! Everything here is async-signal-safe and makes its system calls itself: the C library's
//! functions may be others' by way of preloading.

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

/// The kernel's `struct sigaction`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Disposition {
    /// `SIG_DFL`, `SIG_IGN` or a handler's address.
    pub handler: usize,
    /// `SA_*`.
    pub flags: u64,
    /// Where a handler returns to.
    pub restorer: usize,
    /// What is blocked, besides, while the handler runs.
    pub mask: u64,
}

/// The disposition names where its handler returns to: always so on x86-64.
const RESTORER: u64 = 0x0400_0000;
const INFORMED: u64 = libc::SA_SIGINFO as u64;
const NODEFER: u64 = libc::SA_NODEFER as u64;
const ONCE: u64 = libc::SA_RESETHAND as u32 as u64;
const ON_STACK: u64 = libc::SA_ONSTACK as u64;
const RESTART: u64 = libc::SA_RESTART as u64;
/// Size of the kernel's signal set.
const SET_SIZE: usize = size_of::<u64>();

/// Faults of host accesses, and of generated code.
pub const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

const fn bit(signal: libc::c_int) -> u64 {
    1 << (signal - 1)
}

/// A disposition that signal handlers may read while it is replaced. Two copies take turns. The
/// version's low half counts; its low bit says that the other copy is being written, and the high
/// half then names the process whose thread writes: one that a fork left behind never finishes.
struct Kept {
    version: AtomicU64,
    copies: [[AtomicU64; 4]; 2],
}

impl Kept {
    const fn new() -> Kept {
        Kept {
            version: AtomicU64::new(0),
            copies: [const { [const { AtomicU64::new(0) }; 4] }; 2],
        }
    }

    fn read(&self) -> Disposition {
        loop {
            let version = self.version.load(Ordering::Acquire) as u32 & !1;
            let copy = &self.copies[(version >> 1 & 1) as usize];
            let [handler, flags, restorer, mask] =
                [0, 1, 2, 3].map(|field| copy[field].load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            // A writer overwrites this copy only after it has finished the other one.
            let now = self.version.load(Ordering::Relaxed) as u32;
            if now.wrapping_sub(version) <= 2 {
                return Disposition {
                    handler: handler as usize,
                    flags,
                    restorer: restorer as usize,
                    mask,
                };
            }
        }
    }

    /// Replaces what `change` makes something else of, and returns what was there.
    fn update(&self, change: impl Fn(&Disposition) -> Disposition) -> Disposition {
        // A writer is done after a few instructions, unless it is interrupted or left behind.
        let mut patience = 100_000;
        let process = std::process::id();
        let version = loop {
            let version = self.version.load(Ordering::Acquire);
            let writer = (version >> 32) as u32;
            let is_free = version & 1 == 0 || patience == 0 && writer != process;
            let taken = u64::from(process) << 32 | u64::from(version as u32 | 1);
            let exchange = |new| {
                self.version
                    .compare_exchange(version, new, Ordering::AcqRel, Ordering::Relaxed)
            };
            if is_free && exchange(taken).is_ok() {
                break taken as u32 & !1;
            }
            patience -= i32::from(patience > 0);
            std::hint::spin_loop();
        };
        let old = self.read();
        let new = change(&old);
        let copy = &self.copies[(version >> 1 & 1 ^ 1) as usize];
        let fields = [new.handler as u64, new.flags, new.restorer as u64, new.mask];
        for (field, value) in copy.iter().zip(fields) {
            field.store(value, Ordering::Relaxed);
        }
        let next = version.wrapping_add(2);
        self.version.store(next.into(), Ordering::Release);
        old
    }
}

/// What is known of a signal that is claimed.
struct Claimed {
    /// The kernel has [`entry`] for it.
    is_claimed: AtomicBool,
    /// The default was restored, and the program is about to end by it.
    is_ending: AtomicBool,
    /// The program's disposition.
    program: Kept,
    /// The one before that, if the program's own may call it.
    before: Kept,
}

static CLAIMED: [Claimed; SIGNALS.len()] = [const {
    Claimed {
        is_claimed: AtomicBool::new(false),
        is_ending: AtomicBool::new(false),
        program: Kept::new(),
        before: Kept::new(),
    }
}; SIGNALS.len()];

fn claimed(signal: libc::c_int) -> Option<&'static Claimed> {
    let which = SIGNALS.iter().position(|&s| s == signal)?;
    Some(&CLAIMED[which])
}

/// Reads the kernel's disposition and, if `new` is given, replaces it.
fn kernel_exchange(signal: libc::c_int, new: Option<&Disposition>) -> Option<Disposition> {
    let mut old = Disposition::default();
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the structures have the kernel's layout; what is installed is `entry` with its
    // restorer, the default, or what the program had installed.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, &raw mut old, SET_SIZE) };
    (result == 0).then_some(old)
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

/// Does something while no signal's handler can come in between.
fn undisturbed<T>(body: impl FnOnce() -> T) -> T {
    let before = change_mask(libc::SIG_BLOCK, u64::MAX);
    let result = body();
    change_mask(libc::SIG_SETMASK, before);
    result
}

/// The kernel's disposition while the program's is `program`: what the kernel itself does with
/// flags (the stack, restarted calls) it does as the program wants.
fn claim_for(program: &Disposition) -> Disposition {
    let kept = match program.handler {
        libc::SIG_DFL => ON_STACK,
        // As little as can be noticed of a signal that is ignored.
        libc::SIG_IGN => ON_STACK | RESTART,
        _ => program.flags & (ON_STACK | RESTART),
    };
    Disposition {
        handler: entry as *const () as usize,
        flags: INFORMED | NODEFER | RESTORER | kept,
        restorer: restorer as *const () as usize,
        mask: 0,
    }
}

fn is_entry(found: &Disposition) -> bool {
    found.handler == entry as *const () as usize
}

/// Claims the signals once per process, in front of what handles them now.
pub(crate) fn install() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(claim);
}

/// Claims the signals of which the program has taken the disposition since without
/// [`exchange_program`]; what it set gets what is none of the processors'. Async-signal-safe.
pub fn claim() {
    for (signal, claimed) in SIGNALS.into_iter().zip(&CLAIMED) {
        if claimed.is_ending.load(Ordering::Acquire) {
            continue;
        }
        if kernel_exchange(signal, None).is_none_or(|found| is_entry(&found)) {
            continue;
        }
        undisturbed(|| {
            // Whoever comes second finds that it is done.
            let Some(found) = kernel_exchange(signal, None).filter(|found| !is_entry(found)) else {
                return;
            };
            let old = claimed.program.update(|_| found);
            if claimed.is_claimed.swap(true, Ordering::AcqRel) {
                claimed.before.update(|_| old);
            }
            kernel_exchange(signal, Some(&claim_for(&found)));
        });
    }
}

/// Reads the program's disposition of a signal that is claimed and, if `new` is given, replaces
/// it; `None` for one that is not, whose disposition the kernel has. Async-signal-safe.
pub fn exchange_program(signal: libc::c_int, new: Option<&Disposition>) -> Option<Disposition> {
    let claimed = claimed(signal)?;
    if !claimed.is_claimed.load(Ordering::Acquire) {
        return None;
    }
    let Some(new) = new else {
        return Some(claimed.program.read());
    };
    Some(undisturbed(|| {
        let new = Disposition {
            flags: new.flags | RESTORER,
            restorer: restorer as *const () as usize,
            // The kernel blocks neither of them.
            mask: new.mask & !(bit(libc::SIGKILL) | bit(libc::SIGSTOP)),
            ..*new
        };
        let old = claimed.program.update(|_| new);
        kernel_exchange(signal, Some(&claim_for(&new)));
        if new.handler == libc::SIG_IGN {
            discard(signal);
        }
        old
    }))
}

/// Takes pending signals away, as the kernel does when they come to be ignored.
fn discard(signal: libc::c_int) {
    let (set, now) = (bit(signal), [0u64; 2]);
    // SAFETY: a set of the kernel's size and a time of zero; no information is asked for.
    while unsafe {
        let (set, information) = (&raw const set, std::ptr::null_mut::<libc::siginfo_t>());
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            set,
            information,
            &raw const now,
            SET_SIZE,
        )
    } == signal.into()
    {}
}

/// In a process that will have no processor, a child after a fork: the program's dispositions are
/// the kernel's again.
pub fn release() {
    for (signal, claimed) in SIGNALS.into_iter().zip(&CLAIMED) {
        if claimed.is_claimed.swap(false, Ordering::AcqRel) {
            kernel_exchange(signal, Some(&claimed.program.read()));
        }
    }
}

/// Looks at a signal that no instruction of the program's raised; true if it takes it, and
/// forwards it later.
pub type Observer = fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) -> bool;

static OBSERVER: AtomicUsize = AtomicUsize::new(0);

/// Has signals that were sent looked at before they are forwarded.
pub fn observe_sent(observer: Observer) {
    OBSERVER.store(observer as usize, Ordering::Release);
}

/// Whether an instruction raised the signal that `info` is about; else somebody sent it.
///
/// # Safety
/// The kernel filled in `info`.
pub unsafe fn is_raised(info: *const libc::siginfo_t) -> bool {
    // SAFETY: the caller's promise.
    unsafe { (*info).si_code > 0 }
}

/// What the kernel calls, and handlers that were told it as their predecessor. Its stack pointer
/// tells which: the kernel's frame is the return address and the context behind it.
#[unsafe(naked)]
extern "C" fn entry(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    std::arch::naked_asm!("mov rcx, rsp", "jmp {on_signal}", on_signal = sym on_signal)
}

/// Where [`entry`] returns to. Unwinders know a signal's frame by these bytes.
#[unsafe(naked)]
extern "C" fn restorer() {
    std::arch::naked_asm!(
        ".byte 0x48, 0xc7, 0xc0", // mov rax, SYS_rt_sigreturn
        ".long {number}",
        "syscall",
        number = const libc::SYS_rt_sigreturn
    )
}

thread_local! {
    /// How many handlers have called [`entry`] within each other.
    static CHAINED: Cell<u32> = const { Cell::new(0) };
}

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    stack: usize,
) {
    let Some(claimed) = claimed(signal) else {
        return;
    };
    // SAFETY: the kernel filled in what it, or a handler that it called, hands over.
    let is_raised = unsafe { is_raised(info) };
    // SAFETY: as above.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    // Also if a handler that the program has put in front hands over what is not its own.
    if is_raised && crate::host::on_fault(registers) {
        return;
    }
    if context as usize != stack + size_of::<usize>() {
        return act(
            &predecessor(claimed, signal),
            claimed,
            signal,
            info,
            context,
        );
    }
    let observer = OBSERVER.load(Ordering::Acquire);
    if !is_raised && observer != 0 {
        // SAFETY: `observe_sent` stored a function of this type.
        let observer: Observer = unsafe { std::mem::transmute(observer) };
        if observer(signal, info, context) {
            return;
        }
    }
    forward(signal, info, context);
}

/// The disposition that a handler means which calls [`entry`].
fn predecessor(claimed: &Claimed, signal: libc::c_int) -> Disposition {
    let is_claimed = kernel_exchange(signal, None).is_some_and(|found| is_entry(&found));
    let chained = CHAINED.with(|chained| chained.replace(chained.get() + 1));
    match (is_claimed, chained) {
        // It is the one that the kernel calls, and that nobody has found yet.
        (false, _) => claimed.program.read(),
        (true, 0) => claimed.before.read(),
        (true, _) => Disposition::default(),
    }
}

/// Does what the program wants to be done at a signal that is claimed.
pub fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(claimed) = claimed(signal) else {
        return;
    };
    let mut program = claimed.program.read();
    if program.flags & ONCE != 0 && !matches!(program.handler, libc::SIG_DFL | libc::SIG_IGN) {
        program = undisturbed(|| {
            claimed.program.update(|found| Disposition {
                handler: libc::SIG_DFL,
                ..*found
            })
        });
    }
    CHAINED.set(0);
    act(&program, claimed, signal, info, context);
}

fn act(
    disposition: &Disposition,
    claimed: &Claimed,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: what the kernel handed over.
    let is_raised = unsafe { is_raised(info) };
    match disposition.handler {
        libc::SIG_IGN if !is_raised => {}
        libc::SIG_DFL | libc::SIG_IGN => end(claimed, signal, info),
        handler => {
            let own = if disposition.flags & NODEFER != 0 {
                0
            } else {
                bit(signal)
            };
            // SAFETY: as above; the mask is the first word of the set.
            let mask = unsafe {
                let set = &raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask;
                set.cast::<u64>().read()
            };
            change_mask(libc::SIG_SETMASK, mask | disposition.mask | own);
            // SAFETY: the address of a handler in the program's disposition; one of one argument
            // does not look at the others.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
    }
}

/// Ends the program by a signal, as its default does: with the registers of where it struck.
fn end(claimed: &Claimed, signal: libc::c_int, info: *mut libc::siginfo_t) {
    // Nobody must claim the signal before it has come again.
    claimed.is_ending.store(true, Ordering::Release);
    kernel_exchange(signal, Some(&Disposition::default()));
    // SAFETY: what the kernel handed over.
    let comes_again = unsafe {
        is_raised(info) && !(signal == libc::SIGBUS && (*info).si_code == libc::BUS_MCEERR_AO)
    };
    if comes_again {
        // The instruction is executed again.
        return;
    }
    // Blocked until the return from here, which restores the mask of the code that it struck.
    change_mask(libc::SIG_BLOCK, bit(signal));
    // SAFETY: to the calling thread, with what the kernel said of the signal.
    unsafe {
        let (process, thread) = (
            libc::syscall(libc::SYS_getpid),
            libc::syscall(libc::SYS_gettid),
        );
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, signal, info);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_sees_one_disposition() {
        let kept = Kept::new();
        let whole = |n: usize| Disposition {
            handler: n,
            flags: n as u64,
            restorer: n,
            mask: n as u64,
        };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let found = kept.read();
                    assert_eq!(found, whole(found.handler));
                }
            });
            scope.spawn(|| {
                for _ in 0..20_000 {
                    let old = kept.update(|old| whole(old.handler + 1));
                    assert_eq!(old, whole(old.handler));
                }
            });
            for _ in 0..20_000 {
                kept.update(|old| whole(old.handler + 1));
            }
            while kept.read().handler < 40_000 {
                std::thread::yield_now();
            }
            done.store(true, Ordering::Relaxed);
        });
    }

    static CHAIN: AtomicUsize = AtomicUsize::new(0);

    /// Calls the handler that it was told to be its predecessor.
    extern "C" fn chaining(
        signal: libc::c_int,
        info: *mut libc::siginfo_t,
        context: *mut libc::c_void,
    ) {
        // SAFETY: the handler there was, which is of this type.
        let before: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
            unsafe { std::mem::transmute(CHAIN.load(Ordering::Relaxed)) };
        before(signal, info, context);
    }

    /// A handler that was installed without [`exchange_program`], in a child that makes system
    /// calls only; the signal that the child ends by.
    fn ends_by(is_raised: bool, is_found: bool) -> libc::c_int {
        install();
        // SAFETY: a child with one thread; dispositions that are valid.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                let mut new = kernel_exchange(libc::SIGFPE, None).unwrap_or_default();
                CHAIN.store(new.handler, Ordering::Relaxed);
                new.handler = chaining as *const () as usize;
                kernel_exchange(libc::SIGFPE, Some(&new));
                if is_found {
                    claim();
                }
                let thread = libc::syscall(libc::SYS_gettid);
                if is_raised {
                    std::arch::asm!("div {0:e}", in(reg) 0, inout("eax") 1 => _, inout("edx") 0 => _);
                } else {
                    libc::syscall(libc::SYS_tkill, thread, libc::SIGFPE);
                }
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            libc::WTERMSIG(status)
        }
    }

    #[test]
    fn a_handler_may_call_the_one_that_it_was_told() {
        for is_found in [false, true] {
            assert_eq!(ends_by(true, is_found), libc::SIGFPE);
            assert_eq!(ends_by(false, is_found), libc::SIGFPE);
        }
    }

    /// A program's handler stands in front of [`entry`] and passes on what it does not know.
    #[test]
    fn a_guests_fault_that_is_passed_on_is_taken() {
        install();
        // SAFETY: a child with one thread, which ends by itself; an address where nothing is.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                let mut new = kernel_exchange(libc::SIGSEGV, None).unwrap_or_default();
                CHAIN.store(new.handler, Ordering::Relaxed);
                new.handler = chaining as *const () as usize;
                kernel_exchange(libc::SIGSEGV, Some(&new));
                let result = <u32 as crate::host::HostInt>::load(8);
                libc::_exit(if result.is_err() { 5 } else { 6 });
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            assert_eq!(
                (libc::WIFEXITED(status), libc::WEXITSTATUS(status)),
                (true, 5)
            );
        }
    }

    #[test]
    fn a_writer_that_a_fork_left_behind_does_not_stop_others() {
        let kept = Kept::new();
        kept.version.store(1, Ordering::Relaxed);
        kept.update(|_| Disposition {
            mask: 5,
            ..Disposition::default()
        });
        assert_eq!(kept.read().mask, 5);
    }
}
