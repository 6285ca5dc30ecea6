//! Guest memory that is not there, in programs that do what they like with signals.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// The page that is taken away.
const MISSING: u64 = 0x18_0000;

/// Touches the missing page for ever.
fn touching() -> Machine {
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(0x5000))?;
        a.mov(rax, qword_ptr(MISSING))?;
        a.jmp(again)
    });
    let machine = Machine::new(Irqchip::None, 1, &code);
    let page = machine.memory.base.wrapping_add(MISSING as usize);
    // SAFETY: a page of the machine's own memory.
    unsafe { libc::mprotect(page.cast(), 4096, libc::PROT_NONE) };
    machine
}

/// Runs into the missing page, signals aside.
fn misses(machine: &mut Machine) {
    loop {
        match machine.vcpu().run() {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => return assert_eq!(gpa, MISSING),
            Err(error) if error.errno() == libc::EINTR => {}
            other => panic!("{other:?}"),
        }
    }
}

fn install(signal: i32, handler: extern "C" fn(libc::c_int)) {
    // SAFETY: zeroes are a valid disposition, of which the handler is set.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_signal_may_come_just_before_a_fault() {
    let mut machine = touching();
    install(libc::SIGUSR1, count);
    // SAFETY: has no conditions.
    let thread = unsafe { libc::pthread_self() };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                // SAFETY: that thread waits for this one.
                unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
                for _ in 0..50 {
                    std::hint::spin_loop();
                }
            }
        });
        for _ in 0..5_000 {
            misses(&mut machine);
        }
        done.store(true, Ordering::SeqCst);
    });
    assert!(HANDLED.load(Ordering::SeqCst) > 0);
}

#[test]
fn a_thread_may_block_every_signal() {
    let mut machine = touching();
    std::thread::spawn(move || {
        // SAFETY: sigfillset makes the set valid.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigfillset(&mut set);
            libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
        }
        misses(&mut machine);
    })
    .join()
    .unwrap();
}

extern "C" fn unexpected(_: libc::c_int) {
    const TEXT: &[u8] = b"a fault of the guest's reached the program's handler\n";
    // SAFETY: writes a constant and ends the process.
    unsafe {
        libc::write(2, TEXT.as_ptr().cast(), TEXT.len());
        libc::_exit(1);
    }
}

#[test]
fn a_program_may_have_a_handler_of_its_own() {
    let mut machine = touching();
    misses(&mut machine);
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        install(signal, unexpected);
        eptide_kvm::cover_signal_handler(signal);
    }
    for _ in 0..100 {
        misses(&mut machine);
    }
}
