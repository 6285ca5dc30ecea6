//! What KVM_CAP_DISABLE_QUIRKS2 says can be disabled, on and off.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::VcpuExit;
use kvm_bindings::*;

/// A machine with a quirk on or off.
fn machine(irqchip: Irqchip, quirk: u32, enabled: bool, code: &[u8]) -> Machine {
    let kvm = system();
    let vm = kvm.create_vm().unwrap();
    let can = vm.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2 as u64) as u32;
    assert_eq!(can & quirk, quirk);
    if !enabled {
        enable(&vm, KVM_CAP_DISABLE_QUIRKS2, quirk as u64).unwrap();
    }
    Machine::on(kvm, vm, irqchip, 1, code)
}

#[test]
fn the_8259_reaches_the_first_processor_at_reset() {
    for enabled in [true, false] {
        let machine = machine(
            Irqchip::Full,
            KVM_X86_QUIRK_LINT0_REENABLED,
            enabled,
            &assemble(stop),
        );
        let lapic = machine.vcpus[0].get_lapic().unwrap();
        let lint0: Vec<u8> = lapic.regs[0x350..0x354].iter().map(|&b| b as u8).collect();
        let expected = if enabled { [0, 7, 0, 0] } else { [0, 0, 1, 0] };
        assert_eq!(lint0, expected);
    }
}

#[test]
fn the_place_of_a_local_apic_that_is_elsewhere() {
    let code = assemble(|a| {
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.or(eax, 0x400)?; // x2APIC mode
        a.wrmsr()?;
        a.mov(rbx, APIC)?;
        a.mov(esi, dword_ptr(rbx + 0x30))?;
        a.mov(dword_ptr(rbx + 0x80), 5)?;
        stop(a)
    });
    let quirk = KVM_X86_QUIRK_LAPIC_MMIO_HOLE;
    let mut hole = machine(Irqchip::Full, quirk, true, &code);
    runs_to_stop(&mut hole);
    assert_eq!(hole.vcpu().get_regs().unwrap().rsi, 0xffff_ffff);
    let mut open = machine(Irqchip::Full, quirk, false, &code);
    match open.vcpu().run().unwrap() {
        VcpuExit::MmioRead(0xfee0_0030, data) => data.fill(3),
        other => panic!("{other:?}"),
    }
    match open.vcpu().run().unwrap() {
        VcpuExit::MmioWrite(0xfee0_0080, data) => assert_eq!(data, [5, 0, 0, 0]),
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut open);
    assert_eq!(open.vcpu().get_regs().unwrap().rsi, 0x0303_0303);
}
