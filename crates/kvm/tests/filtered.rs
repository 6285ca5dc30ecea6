//! A vCPU's thread under a filter of system calls such as VMMs install: KVM_RUN needs few.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What Firecracker lets its vCPUs' threads call, besides KVM's ioctls, and what the thread of the
/// test itself needs to end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_write,
    libc::SYS_open,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_mmap,
    libc::SYS_madvise,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    // The C library's, to allocate and at the end of a thread.
    libc::SYS_mprotect,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
];

extern "C" fn caught(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the information on SIGSYS, where the number of the call is the 7th word.
    let number = unsafe { info.cast::<u32>().add(6).read() };
    eprintln!("system call {number} is not allowed");
    std::process::abort();
}

/// Filters the calling thread's system calls.
fn filter() {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = vec![op(LOAD, 0, 0, 0)];
    for &call in ALLOWED {
        program.push(op(JUMP_EQUAL, 0, 1, call as u32));
        program.push(op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    }
    program.push(op(RETURN, 0, 0, libc::SECCOMP_RET_TRAP));
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program is valid for the call; the handler ends the process.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = caught as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program),
            0
        );
    }
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_filtered_thread_runs_a_guest() {
    const STEAL_TIME: u32 = 0x4b56_4d03;
    const SYSTEM_TIME: u32 = 0x4b56_4d01;
    let code = assemble(|a| {
        let (mut spin, mut page) = (a.create_label(), a.create_label());
        for (msr, value) in [(STEAL_TIME, 0x6001), (SYSTEM_TIME, 0x6101)] {
            a.mov(ecx, msr)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        // Memory that nobody has touched.
        a.mov(rdi, 0x10_0000u64)?;
        a.set_label(&mut page)?;
        a.mov(qword_ptr(rdi), rdi)?;
        a.add(rdi, 0x1000)?;
        a.cmp(rdi, MEMORY as i32)?;
        a.jb(page)?;
        // A timer ends a halt.
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), 0x41)?;
        a.mov(dword_ptr(rbx + 0x380), 1_000_000)?;
        a.sti()?;
        a.hlt()?;
        a.mov(rax, 0x4000_0000u64)?;
        a.mov(eax, dword_ptr(rax))?;
        stop(a)?;
        a.set_label(&mut spin)?;
        a.inc(qword_ptr(0x5000))?;
        a.jmp(spin)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    let signal = libc::SIGRTMIN() + 1;
    // SAFETY: a handler that counts.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
    let spins = machine.memory.base as usize + 0x5000;
    let vcpu = machine.vcpu();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = &done;
        let (tell, told) = std::sync::mpsc::channel();
        scope.spawn(move || {
            // SAFETY: has no conditions.
            tell.send(unsafe { libc::pthread_self() }).unwrap();
            filter();
            loop {
                match vcpu.run().unwrap() {
                    VcpuExit::MmioRead(_, data) => data.fill(1),
                    VcpuExit::IoOut(0x80, _) => break,
                    other => panic!("{other:?}"),
                }
            }
            for _ in 0..20 {
                assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
            }
            done.store(true, Ordering::SeqCst);
        });
        let thread = told.recv().unwrap();
        let start = Instant::now();
        while !done.load(Ordering::SeqCst) {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "KVM_RUN does not end"
            );
            // SAFETY: the machine's memory outlives the scope, and the thread is not joined yet.
            unsafe {
                if (spins as *const u64).read_volatile() != 0 {
                    libc::pthread_kill(thread, signal);
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    assert!(HANDLED.load(Ordering::SeqCst) >= 20);
}
