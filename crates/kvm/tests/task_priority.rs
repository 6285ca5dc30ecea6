//! Accesses to the task-priority register that a VMM has reported and patched away.

mod common;

use common::*;
use eptide_kvm::ioctl::{Object, TABLE, ioctl};
use eptide_kvm::{Error, VcpuExit};
use kvm_bindings::*;

/// The word of KVM_SET_VAPIC_ADDR.
const WORD: u64 = 0x6000;

fn call<T>(machine: &Machine, name: &str, mut argument: T) -> Result<(), Error> {
    let row = TABLE.iter().find(|row| row.name == name).unwrap();
    let at = &raw mut argument as u64;
    ioctl(Object::Vcpu(&machine.vcpus[0]), row.request(), at).map(drop)
}

fn report(machine: &Machine, enabled: u32) -> Result<(), Error> {
    let control = kvm_tpr_access_ctl {
        enabled,
        ..Default::default()
    };
    call(machine, "KVM_TPR_ACCESS_REPORTING", control)
}

fn keep_word_at(machine: &Machine, vapic_addr: u64) -> Result<(), Error> {
    call(machine, "KVM_SET_VAPIC_ADDR", kvm_vapic_addr { vapic_addr })
}

/// RIP of the access and whether it was a write.
fn access(machine: &mut Machine) -> (u64, bool) {
    let exit = machine.vcpu().run().unwrap();
    assert!(matches!(exit, VcpuExit::TprAccess), "{exit:?}");
    // SAFETY: the exit names the member, which is plain data.
    let access = unsafe { machine.vcpu().get_kvm_run().__bindgen_anon_1.tpr_access };
    (access.rip, access.is_write != 0)
}

#[test]
fn accesses_are_reported_where_they_are() {
    let code = assemble(|a| {
        a.mov(rbx, APIC)?; // 10 bytes
        a.mov(dword_ptr(rbx + 0x80), 0x30)?; // 10
        a.mov(eax, dword_ptr(rbx + 0x80))?; // 6
        a.mov(ecx, dword_ptr(rbx + 0x20))?; // another register
        stop(a)?;
        a.mov(dword_ptr(rbx + 0x80), 0x40)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    report(&machine, 1).unwrap();
    assert_eq!(access(&mut machine), (CODE + 10, true));
    assert_eq!(machine.vcpu().get_regs().unwrap().rip, CODE + 20, "done");
    assert_eq!(access(&mut machine), (CODE + 20, false));
    assert_eq!(machine.vcpu().get_regs().unwrap().rax, 0x30);
    runs_to_stop(&mut machine);
    report(&machine, 0).unwrap();
    runs_to_stop(&mut machine);
    let odd = kvm_tpr_access_ctl {
        flags: 1,
        ..Default::default()
    };
    let refused = call(&machine, "KVM_TPR_ACCESS_REPORTING", odd);
    assert_eq!(refused.unwrap_err().errno(), libc::EINVAL);
}

#[test]
fn a_word_in_memory_stands_for_the_register() {
    let code = assemble(|a| {
        a.mov(r14, APIC)?;
        a.mov(dword_ptr(r14 + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(r14 + 0x80), 0x50)?;
        a.mov(dword_ptr(r14 + 0x300), 0x4_4041)?; // to itself, vector 0x41: waits
        a.sti()?;
        stop(a)?;
        a.mov(eax, dword_ptr(WORD as i64))?;
        a.mov(byte_ptr(WORD as i64), 0x20)?; // lets it through
        a.cpuid()?; // an exit
        a.nop()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    machine.gate(0x41, 0x2000);
    machine.code_at(0x2000, |a| {
        a.mov(r12d, dword_ptr(WORD as i64))?;
        a.mov(r13d, dword_ptr(r14 + 0x80))?;
        a.mov(dword_ptr(r14 + 0xb0), 0)?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    keep_word_at(&machine, WORD).unwrap();
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!(regs.r12, 0x4100_0020, "in service: 0x41, nothing waits");
    assert_eq!(regs.r13, 0x20);
    keep_word_at(&machine, 0).unwrap();
    for (address, expected) in [(0x8000_0000, libc::EINVAL), (MEMORY as u64, libc::EINVAL)] {
        let refused = keep_word_at(&machine, address).unwrap_err();
        assert_eq!(refused.errno(), expected);
    }
    let machine = Machine::new(Irqchip::None, 1, &code);
    let refused = keep_word_at(&machine, WORD).unwrap_err();
    assert_eq!(refused.errno(), libc::EINVAL, "no local APIC here");
}

/// Firmware calls the VMM by port 0x7e, and VMMs count on RIP being past the instruction.
#[test]
fn the_call_of_firmware_is_past_its_instruction() {
    let code = assemble(|a| {
        a.out(0x7e, al)?;
        a.out(0x7e, al)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let calls = |machine: &mut Machine| {
        let exit = machine.vcpu().run().unwrap();
        assert!(matches!(exit, VcpuExit::IoOut(0x7e, _)), "{exit:?}");
        machine.vcpu().get_regs().unwrap().rip
    };
    assert_eq!(calls(&mut machine), CODE + 2);
    let quirk = KVM_X86_QUIRK_OUT_7E_INC_RIP.into();
    enable(&machine.vm, KVM_CAP_DISABLE_QUIRKS2, quirk).unwrap();
    assert_eq!(calls(&mut machine), CODE + 2);
    runs_to_stop(&mut machine);
}
