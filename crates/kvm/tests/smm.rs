//! System management mode.

mod common;

use common::*;
use eptide_kvm::VcpuExit;
use kvm_bindings::*;

const SMBASE: u64 = 0x3_0000;
const MOVED: u64 = 0x2_0000;
/// Where memory that only the mode sees begins.
const SMRAM: u64 = 0x2_0000;
const MSR_SMBASE: u32 = 0x9e;
const MSR_SMI_COUNT: u32 = 0x34;
const RSM: [u8; 2] = [0x0f, 0xaa];
/// `out 0x81, al`.
const LEAVE: [u8; 2] = [0xe6, 0x81];

fn runs_to(machine: &mut Machine, port: u16) {
    match machine.vcpu().run().unwrap() {
        VcpuExit::IoOut(at, _) => assert_eq!(at, port),
        other => panic!("{other:?}"),
    }
}

/// `mov dword cs:[offset], value` in 16-bit code.
fn store(offset: u16, value: u32) -> Vec<u8> {
    let mut bytes = vec![0x66, 0x2e, 0xc7, 0x06];
    bytes.extend_from_slice(&offset.to_le_bytes());
    bytes.extend_from_slice(&value.to_le_bytes());
    bytes
}

/// A machine whose SMRAM has `handler` at its start address. The VM outlives the memory's use.
fn machine(irqchip: Irqchip, code: &[u8], handler: &[u8]) -> (Machine, Memory) {
    let machine = Machine::new(irqchip, 1, code);
    let smram = Memory::new(0x2_0000);
    smram.write(SMBASE - SMRAM + 0x8000, handler);
    // SAFETY: the caller drops the machine first.
    unsafe {
        machine
            .vm
            .set_user_memory_region(smram.region(1 << 16, SMRAM))
            .unwrap();
    }
    (machine, smram)
}

fn read_msr(machine: &mut Machine, index: u32) -> u64 {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .unwrap();
    assert_eq!(machine.vcpu().get_msrs(&mut msrs).unwrap(), 1);
    msrs.as_slice()[0].data
}

#[test]
fn a_handler_runs_in_its_own_memory_and_returns() {
    let code = assemble(|a| {
        a.mov(rax, 0x1111_2222_3333_4444u64)?;
        stop(a)?;
        a.nop()?;
        stop(a)?;
        a.nop()?;
        stop(a)
    });
    let handler = [
        &LEAVE[..],
        &store(0xfff8, 0x77),
        &store(0xff00, MOVED as u32),
        &RSM,
    ]
    .concat();
    let (mut machine, smram) = machine(Irqchip::None, &code, &handler);
    machine.count(2, 0x2000, 0x5000);
    runs_to(&mut machine, 0x80);
    let before = machine.vcpu().get_sregs().unwrap();
    machine.vcpu().smi().unwrap();
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap().smi.pending, 1);

    runs_to(&mut machine, 0x81);
    let inside = machine.vcpu().get_sregs().unwrap();
    assert_eq!((inside.cs.base, inside.cs.selector), (SMBASE, 0x3000));
    assert_eq!(
        (inside.cr0 & 0x8000_0001, inside.cr4, inside.efer),
        (0, 0, 0)
    );
    let flags = machine.vcpu().get_kvm_run().flags;
    assert_eq!(flags & KVM_RUN_X86_SMM as u16, KVM_RUN_X86_SMM as u16);
    let events = machine.vcpu().get_vcpu_events().unwrap();
    assert_eq!((events.smi.smm, events.smi.pending), (1, 0));
    assert_eq!((events.nmi.masked, events.smi.smm_inside_nmi), (1, 0));
    // Saved where the mode alone sees it, in AMD's layout.
    let saved = SMBASE - SMRAM + 0xfe00;
    assert_eq!(smram.read_u64(saved + 0x1f8), 0x1111_2222_3333_4444);
    assert_eq!(smram.read_u64(saved + 0x158), before.cr0);
    assert_eq!(smram.read_u64(saved + 0xf8) >> 32, 0x2_0064);
    assert_eq!(machine.memory.read_u64(SMBASE + 0xfff8), 0);
    // What comes meanwhile waits.
    machine.vcpu().nmi().unwrap();

    runs_to(&mut machine, 0x80);
    assert_eq!(machine.memory.read_u64(0x5000), 1, "the NMI");
    let after = machine.vcpu().get_sregs().unwrap();
    assert_eq!(after.cs, before.cs);
    assert_eq!(
        (after.cr0, after.cr3, after.cr4),
        (before.cr0, before.cr3, before.cr4)
    );
    assert_eq!(
        (after.efer, after.gdt.base, after.idt.limit),
        (before.efer, before.gdt.base, before.idt.limit)
    );
    assert_eq!(
        machine.vcpu().get_regs().unwrap().rax,
        0x1111_2222_0000_0077
    );
    assert_eq!(machine.vcpu().get_kvm_run().flags, 0);
    assert_eq!(read_msr(&mut machine, MSR_SMBASE), MOVED);
    assert_eq!(read_msr(&mut machine, MSR_SMI_COUNT), 1);

    // The next one starts at the new base.
    smram.write(MOVED - SMRAM + 0x8000, &[&LEAVE[..], &RSM].concat());
    machine.vcpu().smi().unwrap();
    runs_to(&mut machine, 0x81);
    assert_eq!(machine.vcpu().get_sregs().unwrap().cs.base, MOVED);
    runs_to(&mut machine, 0x80);
}

#[test]
fn the_apic_delivers_smis_and_they_end_halts() {
    let code = assemble(|a| {
        enable_apic(a)?;
        a.mov(dword_ptr(rbx + 0x300), 0x4_4200)?; // SMI to itself
        a.nop()?;
        stop(a)?;
        a.hlt()?;
        stop(a)
    });
    let (mut machine, _smram) = machine(Irqchip::Full, &code, &[&LEAVE[..], &RSM].concat());
    runs_to(&mut machine, 0x81);
    runs_to(&mut machine, 0x80);
    let mut vcpu = machine.vcpus.pop().unwrap();
    let sender = vcpu.interrupter();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // Asleep in HLT until told to leave.
            assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
            assert_eq!(vcpu.get_mp_state().unwrap().mp_state, KVM_MP_STATE_HALTED);
            vcpu.smi().unwrap();
            assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x81, _)));
            assert!(matches!(vcpu.run().unwrap(), VcpuExit::IoOut(0x80, _)));
            vcpu
        });
        std::thread::sleep(std::time::Duration::from_millis(20));
        sender.interrupt();
        machine.vcpus.push(thread.join().unwrap());
    });
}

#[test]
fn a_corrupted_area_shuts_down_and_rsm_belongs_to_the_mode() {
    let code = assemble(|a| {
        stop(a)?;
        a.nop()?;
        stop(a)
    });
    // CR0 with paging and without protection.
    let handler = [&store(0xff58, 0x8000_0000)[..], &RSM].concat();
    let (mut corrupted, _smram) = machine(Irqchip::None, &code, &handler);
    runs_to(&mut corrupted, 0x80);
    corrupted.vcpu().smi().unwrap();
    assert!(matches!(
        corrupted.vcpu().run().unwrap(),
        VcpuExit::Shutdown
    ));
    drop(corrupted);

    let (mut outside, _smram) = machine(Irqchip::None, &RSM, &[]);
    outside.gate(6, 0x2000);
    outside.code_at(0x2000, stop);
    runs_to(&mut outside, 0x80);
}

#[test]
fn the_mode_is_saved_and_restored() {
    let code = assemble(|a| {
        stop(a)?;
        a.nop()?;
        stop(a)
    });
    let (mut machine, _smram) = machine(Irqchip::None, &code, &[&LEAVE[..], &RSM].concat());
    runs_to(&mut machine, 0x80);
    machine.vcpu().smi().unwrap();
    runs_to(&mut machine, 0x81);
    let inside = machine.vcpu().get_vcpu_events().unwrap();
    let outside = kvm_vcpu_events {
        smi: Default::default(),
        ..inside
    };
    machine.vcpu().set_vcpu_events(&outside).unwrap();
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap().smi.smm, 0);
    machine.vcpu().set_vcpu_events(&inside).unwrap();
    assert_eq!(machine.vcpu().get_vcpu_events().unwrap().smi, inside.smi);
    runs_to(&mut machine, 0x80);
}

/// A processor without long mode saves its state in the 32-bit layout.
#[test]
fn a_32_bit_processor_has_its_own_layout() {
    const EXTENDED_FEATURES: u32 = 0x8000_0001;
    const LONG_MODE: u32 = 1 << 29;
    let code = assemble32(CODE as u32, |a| {
        a.mov(eax, 0x1122_3344)?;
        a.mov(ebx, 0x5566_7788)?;
        stop(a)?;
        a.nop()?;
        stop(a)
    });
    // The handler changes EBX where it was saved.
    let handler = [&LEAVE[..], &store(0xffdc, 0x99), &RSM].concat();
    let (mut machine, smram) = machine(Irqchip::None, &code, &handler);
    let mut cpuid = machine.kvm.get_supported_cpuid(256).unwrap();
    for entry in cpuid.as_mut_slice() {
        if entry.function == EXTENDED_FEATURES {
            entry.edx &= !LONG_MODE;
        }
    }
    machine.protected_mode();
    machine.vcpu().set_cpuid2(&cpuid).unwrap();
    runs_to(&mut machine, 0x80);
    let before = machine.vcpu().get_sregs().unwrap();
    machine.vcpu().smi().unwrap();
    runs_to(&mut machine, 0x81);
    let saved = |offset: u64| {
        let at = SMBASE - SMRAM + 0xfe00 + offset;
        let word = smram.read_u64(at & !7);
        (word >> (8 * (at & 7))) as u32
    };
    assert_eq!(saved(0xfc), 0x2_0000, "revision");
    assert_eq!(u64::from(saved(0xf8)), SMBASE);
    assert_eq!((saved(0x1d0), saved(0x1dc)), (0x1122_3344, 0x5566_7788));
    assert_eq!(u64::from(saved(0x1fc)), before.cr0);
    assert_eq!((saved(0x1ac), saved(0x1b4)), (8, 16), "CS, DS");
    assert_eq!(
        (saved(0x194), saved(0x190)),
        (0xffff_ffff, 0x00c0_9b00),
        "CS"
    );

    runs_to(&mut machine, 0x80);
    let after = machine.vcpu().get_sregs().unwrap();
    assert_eq!(
        (after.cs, after.ss, after.tr),
        (before.cs, before.ss, before.tr)
    );
    assert_eq!((after.cr0, after.gdt.base), (before.cr0, before.gdt.base));
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rax, regs.rbx), (0x1122_3344, 0x99));
}
