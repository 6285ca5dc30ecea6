//! Signals whose handlers know nothing of KVM end KVM_RUN, at once and once, and run when it has
//! ended.

mod common;

use common::*;
use eptide_kvm::{VcpuExit, VcpuFd};
use kvm_bindings::{KVM_EXIT_INTR, kvm_regs};
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Counts rounds at 0x5000 for ever.
fn spinning() -> Vec<u8> {
    assemble(|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.inc(qword_ptr(0x5000))?;
        a.jmp(spin)
    })
}

/// A disposition as `sigaction` takes it.
fn disposition(handler: extern "C" fn(libc::c_int), flags: i32) -> libc::sigaction {
    // SAFETY: zeroes are a valid disposition, of which the handler and the flags are set.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = flags;
    action
}

/// Installs a disposition and returns the one before.
fn install(signal: i32, action: &libc::sigaction) -> libc::sigaction {
    // SAFETY: both are valid dispositions; handlers here are async-signal-safe or are only run
    // when no other code of their thread is in the middle of anything.
    unsafe {
        let mut old = std::mem::zeroed();
        assert_eq!(libc::sigaction(signal, action, &mut old), 0);
        old
    }
}

fn this_thread() -> libc::pthread_t {
    // SAFETY: has no conditions.
    unsafe { libc::pthread_self() }
}

fn kill(thread: libc::pthread_t, signal: i32) {
    // SAFETY: callers' threads wait for the sender to end.
    assert_eq!(unsafe { libc::pthread_kill(thread, signal) }, 0);
}

fn block(how: i32, signal: i32) -> libc::sigset_t {
    // SAFETY: sigemptyset makes the set valid.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, signal);
        assert_eq!(libc::pthread_sigmask(how, &set, std::ptr::null_mut()), 0);
        set
    }
}

/// Takes a blocked signal, waiting for nothing.
fn take(set: &libc::sigset_t) -> i32 {
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: set and time are valid.
    unsafe { libc::sigtimedwait(set, std::ptr::null_mut(), &now) }
}

/// The number of rounds of a spinning guest, readable from other threads while it runs.
fn rounds(machine: &Machine) -> impl Fn() -> u64 + Send + use<> {
    let at = machine.memory.base as usize + 0x5000;
    // SAFETY: the tests join their threads before they drop the machine.
    move || unsafe { (at as *const u64).read_volatile() }
}

/// Waits until the guest has gone on for `more` rounds.
fn wait_for(rounds: &impl Fn() -> u64, more: u64) {
    wait_until(rounds, rounds() + more);
}

/// Waits until the guest has made `count` rounds.
fn wait_until(rounds: &impl Fn() -> u64, count: u64) {
    let start = Instant::now();
    while rounds() < count {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "the guest does not run"
        );
        std::thread::yield_now();
    }
}

fn is_interrupted(vcpu: &mut VcpuFd) {
    let error = vcpu.run().map(|exit| format!("{exit:?}")).unwrap_err();
    assert_eq!(error.errno(), libc::EINTR);
    assert_eq!(vcpu.get_kvm_run().exit_reason, KVM_EXIT_INTR);
}

thread_local! {
    static HANDLED: Cell<u32> = const { Cell::new(0) };
}

extern "C" fn count(_signal: libc::c_int) {
    HANDLED.with(|handled| handled.set(handled.get() + 1));
}

#[test]
fn each_signal_ends_a_spinning_guest_once() {
    const ROUNDS: u32 = 300;
    for flags in [0, libc::SA_RESTART, libc::SA_SIGINFO | libc::SA_NODEFER] {
        let mut machine = Machine::new(Irqchip::Full, 1, &spinning());
        let old = install(libc::SIGUSR1, &disposition(count, flags));
        let (thread, rounds) = (this_thread(), rounds(&machine));
        let returned = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let returned = &returned;
            scope.spawn(move || {
                for n in 0..ROUNDS {
                    // The first also waits for the handler to be covered where it was changed
                    // while the vCPUs of other tests run.
                    wait_for(
                        &rounds,
                        if n == 0 {
                            100_000
                        } else {
                            1 + u64::from(n) * 7
                        },
                    );
                    kill(thread, libc::SIGUSR1);
                    while returned.load(Ordering::SeqCst) == n {
                        std::thread::yield_now();
                    }
                }
            });
            let before = HANDLED.with(Cell::get);
            for n in 1..=ROUNDS {
                is_interrupted(machine.vcpu());
                assert_eq!(HANDLED.with(Cell::get) - before, n);
                returned.store(n, Ordering::SeqCst);
            }
        });
        install(libc::SIGUSR1, &old);
    }
}

thread_local! {
    /// The vCPU of the test, for the handler, and what the handler read of it.
    static VCPU: Cell<*const VcpuFd> = const { Cell::new(std::ptr::null()) };
    static READ: RefCell<Option<kvm_regs>> = const { RefCell::new(None) };
}

extern "C" fn read_registers(_signal: libc::c_int) {
    let vcpu = VCPU.with(Cell::get);
    // SAFETY: the test set the pointer to a vCPU that it does not use while KVM_RUN, in which the
    // signal comes, borrows it.
    let regs = unsafe { &*vcpu }.get_regs().unwrap();
    READ.with(|read| *read.borrow_mut() = Some(regs));
}

/// kvmtool's handlers, for instance, do that.
#[test]
fn handlers_find_the_vcpu_at_rest() {
    let mut machine = Machine::new(Irqchip::None, 1, &spinning());
    let old = install(libc::SIGUSR2, &disposition(read_registers, 0));
    VCPU.with(|vcpu| vcpu.set(machine.vcpu()));
    let (thread, rounds) = (this_thread(), rounds(&machine));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            wait_for(&rounds, 100_000);
            kill(thread, libc::SIGUSR2);
        });
        is_interrupted(machine.vcpu());
    });
    let read = READ.with(|read| read.borrow_mut().take()).unwrap();
    assert_eq!(read, machine.vcpu().get_regs().unwrap());
    install(libc::SIGUSR2, &old);
}

extern "C" fn count_at_rest(signal: libc::c_int) {
    read_registers(signal);
    count(signal);
}

/// The thread's mask.
fn mask() -> u64 {
    let mut set = 0_u64;
    // SAFETY: the kernel writes eight bytes, the size of its signal set.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_BLOCK,
            0,
            &raw mut set,
            8,
        )
    };
    set
}

/// The kernel enters the handlers of signals that arrive together within each other.
#[test]
fn signals_that_arrive_together_are_all_handled_at_rest_and_none_stays_blocked() {
    const ROUNDS: u32 = 200;
    let signals: Vec<i32> = (0..20).map(|n| libc::SIGRTMIN() + n).collect();
    let mut machine = Machine::new(Irqchip::None, 1, &spinning());
    for &signal in &signals {
        install(signal, &disposition(count_at_rest, 0));
    }
    VCPU.with(|vcpu| vcpu.set(machine.vcpu()));
    let (thread, rounds) = (this_thread(), rounds(&machine));
    let (before, handled) = (mask(), HANDLED.with(Cell::get));
    let returned = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let (returned, signals) = (&returned, &signals);
        scope.spawn(move || {
            for n in 0..ROUNDS {
                wait_for(&rounds, if n == 0 { 100_000 } else { 100 });
                // One, a few, all.
                let count = [2, 5, signals.len()][n as usize % 3];
                signals[..count].iter().for_each(|&s| kill(thread, s));
                while returned.load(Ordering::SeqCst) == n {
                    std::thread::yield_now();
                }
            }
        });
        let mut sent = 0;
        for n in 0..ROUNDS {
            sent += [2, 5, signals.len() as u32][n as usize % 3];
            while HANDLED.with(Cell::get) - handled < sent {
                is_interrupted(machine.vcpu());
                assert_eq!(mask(), before, "round {n}");
            }
            returned.store(n + 1, Ordering::SeqCst);
        }
    });
}

/// Signals of a timer are the process's, with information that reaches the handler.
#[test]
fn timers_reach_a_handler_with_information() {
    static VALUE: AtomicU32 = AtomicU32::new(0);
    extern "C" fn note(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel's information on a signal that was queued with a value.
        let value = unsafe { (*info).si_value().sival_ptr } as usize as u32;
        VALUE.store(value, Ordering::SeqCst);
    }
    let signal = libc::SIGRTMIN() + 3;
    let mut machine = Machine::new(Irqchip::None, 1, &spinning());
    let mut action = disposition(count, libc::SA_SIGINFO | libc::SA_RESTART);
    action.sa_sigaction = note as *const () as usize;
    install(signal, &action);
    let rounds = rounds(&machine);
    std::thread::scope(|scope| {
        // SAFETY: has no conditions.
        let (process, task) = unsafe { (libc::getpid(), libc::gettid()) };
        scope.spawn(move || {
            wait_for(&rounds, 100_000);
            // SAFETY: zeroes are valid information; the kernel reads it.
            unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                info.si_code = libc::SI_QUEUE;
                // The value follows process and user IDs.
                (&raw mut info).cast::<u64>().add(3).write(0x1234_5678);
                let sent = libc::syscall(
                    libc::SYS_rt_tgsigqueueinfo,
                    process,
                    task,
                    signal,
                    &raw mut info,
                );
                assert_eq!(sent, 0);
            }
        });
        is_interrupted(machine.vcpu());
    });
    assert_eq!(VALUE.load(Ordering::SeqCst), 0x1234_5678);
}

#[test]
fn a_signal_ends_a_halt() {
    let code = assemble(|a| {
        a.inc(qword_ptr(0x5000))?;
        a.cli()?;
        a.hlt()
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let signal = libc::SIGRTMIN() + 4;
    install(signal, &disposition(count, libc::SA_RESTART));
    let (thread, rounds) = (this_thread(), rounds(&machine));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            wait_until(&rounds, 1);
            std::thread::sleep(Duration::from_millis(20));
            kill(thread, signal);
        });
        is_interrupted(machine.vcpu());
    });
}

#[test]
fn a_restored_handler_is_the_one_that_was_saved() {
    static SECOND: AtomicU32 = AtomicU32::new(0);
    extern "C" fn second(_: libc::c_int) {
        SECOND.fetch_add(1, Ordering::SeqCst);
    }
    let signal = libc::SIGRTMIN() + 5;
    let mut machine = Machine::new(Irqchip::None, 1, &spinning());
    install(signal, &disposition(count, 0));
    let (thread, rounds) = (this_thread(), rounds(&machine));
    let run = |machine: &mut Machine| {
        let rounds = &rounds;
        std::thread::scope(|scope| {
            let rounds = rounds_of(rounds);
            scope.spawn(move || {
                wait_for(&rounds, 100_000);
                kill(thread, signal);
            });
            is_interrupted(machine.vcpu());
        });
    };
    run(&mut machine);
    assert_eq!(HANDLED.with(Cell::get), 1);
    let saved = install(signal, &disposition(second, 0));
    wait_for_cover(signal, second);
    run(&mut machine);
    assert_eq!(
        (HANDLED.with(Cell::get), SECOND.load(Ordering::SeqCst)),
        (1, 1)
    );
    install(signal, &saved);
    run(&mut machine);
    assert_eq!(
        (HANDLED.with(Cell::get), SECOND.load(Ordering::SeqCst)),
        (2, 1)
    );
}

/// Waits until a handler that was installed between two runs is covered, which on a busy machine
/// takes more than the usual milliseconds. In KVM there is nothing to wait for.
fn wait_for_cover(signal: i32, handler: extern "C" fn(libc::c_int)) {
    let start = Instant::now();
    let is_covered = || {
        // SAFETY: only reads, into a valid disposition.
        unsafe {
            let mut found: libc::sigaction = std::mem::zeroed();
            assert_eq!(libc::sigaction(signal, std::ptr::null(), &mut found), 0);
            found.sa_sigaction != handler as *const () as usize
        }
    };
    while !is_covered() && start.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn rounds_of<F: Fn() -> u64>(rounds: &F) -> impl Fn() -> u64 + '_ {
    move || rounds()
}

/// What the mask of KVM_SET_SIGNAL_MASK keeps out waits for the end of KVM_RUN.
#[test]
fn the_mask_keeps_signals_out() {
    let kept_out = libc::SIGRTMIN() + 6;
    let code = assemble(|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.inc(qword_ptr(0x5000))?;
        a.cmp(dword_ptr(0x5008), 0)?;
        a.je(spin)?;
        a.out(0x80, al)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    install(kept_out, &disposition(count, 0));
    let mask = 1u64 << (kept_out - 1);
    machine.vcpu().set_signal_mask(Some(mask)).unwrap();
    let (thread, rounds) = (this_thread(), rounds(&machine));
    let go = machine.memory.base as usize + 0x5008;
    let sent = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sent = &sent;
        scope.spawn(move || {
            wait_for(&rounds, 100_000);
            kill(thread, kept_out);
            sent.store(true, Ordering::SeqCst);
            wait_for(&rounds, 100_000);
            // SAFETY: the machine's memory outlives the thread.
            unsafe { (go as *mut u32).write_volatile(1) };
        });
        let exit = machine.vcpu().run().unwrap();
        assert!(matches!(exit, VcpuExit::IoOut(0x80, _)), "{exit:?}");
        assert!(sent.load(Ordering::SeqCst));
        assert_eq!(HANDLED.with(Cell::get), 1, "handled at the end");
    });
}

/// A blocked signal that the mask lets through, pending before KVM_RUN: the guest does not run,
/// and the signal is still pending.
#[test]
fn what_is_pending_before_the_run_ends_it() {
    let signal = libc::SIGRTMIN() + 7;
    let mut machine = Machine::new(Irqchip::None, 1, &spinning());
    let set = block(libc::SIG_BLOCK, signal);
    machine.vcpu().set_signal_mask(Some(0)).unwrap();
    kill(this_thread(), signal);
    is_interrupted(machine.vcpu());
    assert_eq!(machine.memory.read_u64(0x5000), 0, "the guest has run");
    assert_eq!(take(&set), signal);
    machine.vcpu().set_signal_mask(None).unwrap();
}

/// Handlers of a thread that is not in KVM_RUN run at once.
#[test]
fn other_threads_are_not_concerned() {
    let signal = libc::SIGRTMIN() + 8;
    let code = assemble(|a| a.out(0x80, al));
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    install(signal, &disposition(count, 0));
    machine.vcpu().run().unwrap();
    kill(this_thread(), signal);
    assert_eq!(HANDLED.with(Cell::get), 1);
}
