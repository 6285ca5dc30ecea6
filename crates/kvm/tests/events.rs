//! Events that user space injects, saves and restores; signals that end KVM_RUN.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use kvm_bindings::*;
use std::time::Duration;

/// Code that stops again and again.
fn stops() -> Vec<u8> {
    assemble(|a| {
        for _ in 0..6 {
            stop(a)?;
            a.nop()?;
        }
        a.ud2()
    })
}

#[test]
fn pending_exceptions_travel_with_their_payload() {
    let mut machine = Machine::new(Irqchip::None, 1, &stops());
    machine.gate(14, 0x2000);
    machine.code_at(0x2000, |a| {
        a.pop(rax)?;
        a.mov(rdx, cr2)?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    let mut events = machine.vcpu().get_vcpu_events().unwrap();
    events.exception.pending = 1;
    events.exception.nr = 14;
    events.exception.has_error_code = 1;
    events.exception.error_code = 6;
    events.exception_has_payload = 1;
    events.exception_payload = 0xdead_0000;
    events.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    let refused = machine.vcpu().set_vcpu_events(&events).unwrap_err();
    assert_eq!(refused.errno(), libc::EINVAL, "without the capability");
    enable(&machine.vm, KVM_CAP_EXCEPTION_PAYLOAD, 1).unwrap();
    machine.vcpu().set_vcpu_events(&events).unwrap();
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap(), events);
    assert_eq!(machine.vcpu().get_sregs().unwrap().cr2, 0);
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rax, regs.rdx), (6, 0xdead_0000));

    events.exception.nr = 32;
    assert!(machine.vcpu().set_vcpu_events(&events).is_err());
    events.exception.nr = 14;
    events.exception.injected = 1;
    assert!(machine.vcpu().set_vcpu_events(&events).is_err());
}

#[test]
fn interrupts_and_nmis_are_saved_and_restored() {
    let mut machine = Machine::new(Irqchip::None, 1, &stops());
    for (vector, at, counter) in [(2, 0x2000, 0x5000), (0x60, 0x2100, 0x5008)] {
        machine.count(vector, at, counter);
    }
    runs_to_stop(&mut machine);
    let quiet = machine.vcpu().get_vcpu_events().unwrap();
    // A masked NMI waits.
    let mut events = quiet;
    (events.nmi.masked, events.nmi.pending) = (1, 1);
    machine.vcpu().set_vcpu_events(&events).unwrap();
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap(), events);
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 0);
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap().nmi, events.nmi);
    events.nmi.masked = 0;
    machine.vcpu().set_vcpu_events(&events).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap(), quiet);
    // An interrupt that was being delivered is delivered.
    let mut regs = machine.vcpu().get_regs().unwrap();
    regs.rflags |= 1 << 9;
    machine.vcpu().set_regs(&regs).unwrap();
    (
        events.nmi.pending,
        events.interrupt.injected,
        events.interrupt.nr,
    ) = (0, 1, 0x60);
    machine.vcpu().set_vcpu_events(&events).unwrap();
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap(), events);
    let bitmap = machine.vcpu().get_sregs().unwrap().interrupt_bitmap;
    assert_eq!(bitmap, [0, 1 << 32, 0, 0]);
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5008), 1);
}

#[test]
fn triple_faults_are_events_where_asked_for() {
    let mut machine = Machine::new(Irqchip::None, 1, &stops());
    runs_to_stop(&mut machine);
    let mut events = machine.vcpu().get_vcpu_events().unwrap();
    events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    events.triple_fault.pending = 1;
    assert!(machine.vcpu().set_vcpu_events(&events).is_err());
    enable(&machine.vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1).unwrap();
    machine.vcpu().set_vcpu_events(&events).unwrap();
    let read = machine.vcpu().get_vcpu_events().unwrap();
    assert_eq!(read.triple_fault.pending, 1);
    assert!(matches!(machine.vcpu().run().unwrap(), VcpuExit::Shutdown));
}

#[test]
fn machine_checks_are_logged_and_raised() {
    const VALID: u64 = 1 << 63;
    const UNCORRECTED: u64 = 1 << 61;
    let mut machine = Machine::new(Irqchip::None, 1, &stops());
    machine.gate(18, 0x2000);
    machine.code_at(0x2000, |a| {
        a.mov(ecx, 0x17a)?; // IA32_MCG_STATUS
        a.rdmsr()?;
        a.mov(dword_ptr(0x5000), eax)?;
        a.mov(ecx, 0x405)?; // IA32_MC1_STATUS
        a.rdmsr()?;
        a.mov(dword_ptr(0x5008), edx)?;
        stop(a)?;
        a.iretq()
    });
    let mut sregs = machine.vcpu().get_sregs().unwrap();
    sregs.cr4 |= 1 << 6;
    machine.vcpu().set_sregs(&sregs).unwrap();
    assert!(machine.vcpu().setup_mce(1000).is_err());
    machine.vcpu().setup_mce(10 | 1 << 8 | 1 << 24).unwrap();
    runs_to_stop(&mut machine);
    let mut error = kvm_x86_mce {
        status: VALID,
        bank: 1,
        mcg_status: 5,
        ..Default::default()
    };
    machine.vcpu().set_mce(&error).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(
        machine.memory.read_u64(0x5000),
        0,
        "corrected: no exception"
    );
    error.status |= UNCORRECTED;
    machine.vcpu().set_mce(&error).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 5);
    let status = machine.memory.read_u64(0x5008) as u32;
    assert_eq!(status & 0xe000_0000, 0xe000_0000, "overflowed");
    error.bank = 10;
    assert!(machine.vcpu().set_mce(&error).is_err());
    // Another while the first is being handled.
    error.bank = 1;
    machine.vcpu().set_mce(&error).unwrap();
    assert!(matches!(machine.vcpu().run().unwrap(), VcpuExit::Shutdown));
}

#[test]
fn blocked_signals_that_the_mask_lets_through_end_a_run() {
    let code = assemble(|a| {
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.jmp(spin)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    // SAFETY: the sets are plain data that sigemptyset initialises, and the thread is this one.
    let (set, thread) = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        (set, libc::pthread_self())
    };
    machine.vcpu().set_signal_mask(Some(0)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            // SAFETY: the scope keeps the thread from ending.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
        });
        let error = machine.vcpu().run().unwrap_err();
        assert_eq!(error.errno(), libc::EINTR);
    });
    assert_eq!(machine.vcpu().get_kvm_run().exit_reason, KVM_EXIT_INTR);
    // The signal is still there for the caller to take.
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: set and time are valid.
    let taken = unsafe { libc::sigtimedwait(&set, std::ptr::null_mut(), &time) };
    assert_eq!(taken, libc::SIGUSR1);
    machine.vcpu().set_signal_mask(None).unwrap();
}
