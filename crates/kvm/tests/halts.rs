//! What ends a halt.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use kvm_bindings::*;
use std::time::Duration;

/// KVM_HC_KICK_CPU.
const KICK_CPU: u64 = 5;

/// KVM_RUN sleeps in the guest's halt until another thread interrupts it.
fn sleeps_until_interrupted(machine: &mut Machine) {
    let interrupter = machine.vcpus[0].interrupter();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            interrupter.interrupt();
        });
        let end = machine.vcpu().run().map(|exit| format!("{exit:?}"));
        assert_eq!(end.unwrap_err().errno(), libc::EINTR);
    });
}

/// A waiter for a lock looks at the lock, then halts with interrupts off; the kick of the owner may
/// come in between.
#[test]
fn a_kick_before_the_halt_ends_it() {
    let code = assemble(|a| {
        a.cli()?;
        a.mov(rax, KICK_CPU)?;
        a.xor(ebx, ebx)?;
        a.xor(ecx, ecx)?;
        a.vmcall()?;
        a.hlt()?;
        a.out(0x10, al)?;
        // One kick ends one halt.
        a.hlt()?;
        a.out(0x11, al)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let interrupter = machine.vcpus[0].interrupter();
    let (finished, wait) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A halt that does not end is ended here, and then the run fails.
            for seconds in [10, 1] {
                let _ = wait.recv_timeout(Duration::from_secs(seconds));
            }
            interrupter.interrupt();
        });
        let vcpu = machine.vcpu();
        assert!(matches!(vcpu.run(), Ok(VcpuExit::IoOut(0x10, _))));
        finished.send(()).unwrap();
        let end = vcpu.run().map(|exit| format!("{exit:?}"));
        assert_eq!(end.unwrap_err().errno(), libc::EINTR);
    });
}

fn disable_exits(vm: &eptide_kvm::VmFd, which: u32) -> Result<(), i32> {
    enable(vm, KVM_CAP_X86_DISABLE_EXITS, which.into())
}

/// A machine whose HLTs do not exit.
fn without_halt_exits(irqchip: Irqchip, code: &[u8]) -> Machine {
    let kvm = system();
    let vm = kvm.create_vm().unwrap();
    disable_exits(&vm, KVM_X86_DISABLE_EXITS_HLT).unwrap();
    Machine::on(kvm, vm, irqchip, 1, code)
}

#[test]
fn exits_are_disabled_before_there_are_vcpus() {
    let machine = Machine::new(Irqchip::None, 1, &[]);
    let offered = machine
        .vm
        .check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into()) as u32;
    assert_eq!(
        offered & (KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE),
        KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE
    );
    assert_eq!(disable_exits(&machine.vm, offered), Err(libc::EINVAL));
    let vm = machine.kvm.create_vm().unwrap();
    assert_eq!(disable_exits(&vm, !offered), Err(libc::EINVAL));
    disable_exits(&vm, offered).unwrap();
}

/// Interrupts end a halt that does not exit; to user space the vCPU runs all the while.
#[test]
fn a_halt_without_exit_ends_by_a_timer() {
    let code = assemble(|a| {
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rbx + 0x320), 0x41)?;
        a.mov(dword_ptr(rbx + 0x380), 2_000_000)?;
        a.sti()?;
        a.hlt()?;
        stop(a)?;
        a.cli()?;
        a.hlt()
    });
    let mut machine = without_halt_exits(Irqchip::Full, &code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        a.inc(dword_ptr(0x5000))?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
    sleeps_until_interrupted(&mut machine);
    let state = machine.vcpu().get_mp_state().unwrap().mp_state;
    assert_eq!(state, KVM_MP_STATE_RUNNABLE);
}

/// With the local APIC in user space a halt exits no more either: user space asks for the window
/// and injects.
#[test]
fn a_halt_without_exit_ends_by_an_injected_interrupt() {
    let code = assemble(|a| {
        a.sti()?;
        a.hlt()?;
        stop(a)
    });
    let mut machine = without_halt_exits(Irqchip::None, &code);
    machine.count(0x60, 0x2000, 0x5000);
    sleeps_until_interrupted(&mut machine);
    machine.vcpu().get_kvm_run().request_interrupt_window = 1;
    let exit = machine.vcpu().run().unwrap();
    assert!(matches!(exit, VcpuExit::IrqWindowOpen), "{exit:?}");
    machine.vcpu().get_kvm_run().request_interrupt_window = 0;
    machine.vcpu().interrupt(0x60).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
}
