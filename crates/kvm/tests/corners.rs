//! Guests at the corners of KVM_RUN: what the documentation says of rare states.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::{IoEventAddress, VcpuExit};
use kvm_bindings::*;

fn errno<T: std::fmt::Debug>(result: Result<T, kvm::Error>) -> i32 {
    result.unwrap_err().errno()
}

/// The interrupt controllers of a split model are the local APICs here and the 8259 in user space,
/// which KVM_INTERRUPT stands for.
#[test]
fn the_8259_of_a_split_irqchip_is_in_user_space() {
    let code = assemble(|a| {
        enable_apic(a)?;
        stop(a)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.cli()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Split, 1, &code);
    machine.count(0x61, 0x2000, 0x5000);
    runs_to_stop(&mut machine);
    let run = machine.vcpu().get_kvm_run();
    assert_eq!((run.ready_for_interrupt_injection, run.if_flag), (0, 0));
    run.request_interrupt_window = 1;
    match machine.vcpu().run().unwrap() {
        VcpuExit::IrqWindowOpen => {}
        other => panic!("{other:?}"),
    }
    let run = machine.vcpu().get_kvm_run();
    assert_eq!((run.ready_for_interrupt_injection, run.if_flag), (1, 1));
    run.request_interrupt_window = 0;
    machine.vcpu().interrupt(0x61).unwrap();
    assert_eq!(errno(machine.vcpu().interrupt(0x62)), libc::EEXIST);
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
    let mut full = Machine::new(Irqchip::Full, 1, &code);
    runs_to_stop(&mut full);
    assert_eq!(full.vcpu().get_kvm_run().ready_for_interrupt_injection, 1);
    assert_eq!(errno(full.vcpu().interrupt(0x61)), libc::ENXIO);
}

/// A halted vCPU wakes for it, too.
#[test]
fn the_8259_of_user_space_ends_a_halt() {
    let code = assemble(|a| {
        enable_apic(a)?;
        stop(a)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Split, 1, &code);
    machine.count(0x61, 0x2000, 0x5000);
    runs_to_stop(&mut machine);
    machine.vcpu().interrupt(0x61).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 1);
}

#[test]
fn strings_of_port_writes_lose_nothing_where_the_ring_is_full() {
    const COUNT: u64 = 700;
    let code = assemble(|a| {
        a.mov(rsi, 0x6000u64)?;
        a.mov(rcx, COUNT)?;
        a.mov(dx, 0x390)?;
        a.cld()?;
        a.rep().outsb()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let wanted: Vec<u8> = (0..COUNT).map(|i| (i % 251) as u8).collect();
    machine.memory.write(0x6000, &wanted);
    machine
        .vm
        .register_coalesced_mmio(IoEventAddress::Pio(0x390), 1)
        .unwrap();
    machine.vcpu().map_coalesced_mmio_ring().unwrap();
    let mut seen = Vec::new();
    loop {
        let (done, data) = match machine.vcpu().run().unwrap() {
            VcpuExit::IoOut(0x390, data) => (false, data.to_vec()),
            VcpuExit::IoOut(0x80, _) => (true, Vec::new()),
            other => panic!("{other:?}"),
        };
        while let Some(entry) = machine.vcpu().coalesced_mmio_read().unwrap() {
            seen.extend_from_slice(&entry.data[..entry.len as usize]);
        }
        seen.extend_from_slice(&data);
        if done {
            break;
        }
    }
    assert_eq!(seen, wanted);
}

/// Instructions that cannot be emulated are the VMM's business in the kernel, and #UD for a
/// program of the guest's, unless the VMM wants to hear of all.
#[test]
fn a_program_that_executes_nothing_is_told() {
    let program = |all: bool| {
        let code = assemble(|a| {
            a.mov(rax, 0x3000_0000u64)?;
            a.jmp(rax)
        });
        let mut machine = Machine::new(Irqchip::None, 1, &code);
        if all {
            enable(&machine.vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1).unwrap();
        }
        machine.gate(6, 0x2000);
        machine.code_at(0x2000, |a| {
            a.mov(rbx, qword_ptr(rsp))?;
            stop(a)
        });
        // User mode: the segments' privilege level is 3, and there is a stack for level 0.
        let mut sregs = machine.vcpu().get_sregs().unwrap();
        (sregs.cs.dpl, sregs.cs.selector) = (3, 0x1b);
        (sregs.ss.dpl, sregs.ss.selector) = (3, 0x23);
        sregs.tr = kvm_segment {
            base: 0xb000,
            limit: 0x67,
            type_: 11,
            present: 1,
            selector: 0x28,
            ..Default::default()
        };
        machine.vcpu().set_sregs(&sregs).unwrap();
        machine.memory.write_u64(0xb004, STACK);
        machine
    };
    let mut machine = program(false);
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().rbx, 0x3000_0000);
    let mut machine = program(true);
    match machine.vcpu().run().unwrap() {
        VcpuExit::InternalError => {}
        other => panic!("{other:?}"),
    }
}

/// Memory that goes away while the processor knows its address.
#[test]
fn memory_goes_and_comes_back() {
    let code = assemble(|a| {
        a.mov(rbx, 0x4000_0000u64)?;
        for i in 0..3 {
            a.mov(dword_ptr(rbx + 8), i + 1)?;
            stop(a)?;
        }
        a.mov(eax, dword_ptr(rbx + 8))?;
        stop(a)?;
        a.jmp(rbx)
    });
    // SAFETY: a new file, and a new mapping of it.
    let (file, base) = unsafe {
        let file = libc::memfd_create(c"backing".as_ptr(), 0);
        assert_eq!(libc::ftruncate(file, 0x2000), 0);
        let base = libc::mmap(
            std::ptr::null_mut(),
            0x2000,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file,
            0,
        );
        assert_ne!(base, libc::MAP_FAILED);
        (file, base)
    };
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let region = kvm_userspace_memory_region {
        slot: 1,
        flags: 0,
        guest_phys_addr: 0x4000_0000,
        memory_size: 0x2000,
        userspace_addr: base as u64,
    };
    // SAFETY: the mapping lives as long as the test.
    unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    let gone = |machine: &mut Machine| match machine.vcpu().run() {
        Ok(VcpuExit::MemoryFault { gpa, .. }) => assert_eq!(gpa, 0x4000_0000),
        other => panic!("{other:?}"),
    };
    runs_to_stop(&mut machine);
    // SAFETY: the test's own mapping and file, which only the guest uses.
    unsafe { libc::mprotect(base, 0x2000, libc::PROT_NONE) };
    gone(&mut machine);
    gone(&mut machine);
    // SAFETY: as above.
    unsafe { libc::mprotect(base, 0x2000, libc::PROT_READ | libc::PROT_WRITE) };
    runs_to_stop(&mut machine);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::ftruncate(file, 0) }, 0);
    gone(&mut machine);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::ftruncate(file, 0x2000) }, 0);
    runs_to_stop(&mut machine);
    // SAFETY: as above; the address is taken again below.
    unsafe { libc::munmap(base, 0x2000) };
    gone(&mut machine);
    // SAFETY: the place is free.
    let again = unsafe {
        libc::mmap(
            base,
            0x2000,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE,
            file,
            0,
        )
    };
    assert_eq!(again, base);
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().rax, 3);
    // Code that cannot be fetched.
    // SAFETY: as above.
    unsafe { libc::mprotect(base, 0x2000, libc::PROT_NONE) };
    gone(&mut machine);
    drop(machine);
    // SAFETY: nobody uses them any more.
    unsafe {
        libc::munmap(base, 0x2000);
        libc::close(file);
    }
}

/// What KVM itself touches may go away, too, and is not the end of the process.
#[test]
fn kvm_meets_missing_memory() {
    const STRING: u64 = 0x18_0000;
    const CLOCK: u64 = 0x18_1000;
    const STEAL: u64 = 0x18_2000;
    let code = assemble(|a| {
        for at in [STRING, CLOCK, STEAL] {
            a.mov(rax, at)?;
            a.mov(qword_ptr(rax), 0x55)?;
        }
        for (register, at) in [(0x4b56_4d01, CLOCK | 1), (0x4b56_4d03, STEAL | 1)] {
            a.mov(ecx, register)?;
            a.mov(eax, at as u32)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        stop(a)?;
        a.mov(esi, STRING as u32)?;
        a.mov(ecx, 4)?;
        a.mov(dx, 0x390)?;
        a.rep().outsb()?;
        a.mov(rax, 0x4000_0000u64)?;
        a.mov(rsi, STRING)?;
        a.movzx(ecx, byte_ptr(rsi))?;
        a.mov(rdi, rax)?;
        a.movsb()?; // from what is gone to a device
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    let base = machine.memory.base.wrapping_add(STRING as usize);
    let protect = |rights| {
        // SAFETY: pages of the machine's own memory, which only the guest uses.
        unsafe { assert_eq!(libc::mprotect(base.cast(), 0x3000, rights), 0) };
    };
    runs_to_stop(&mut machine);
    protect(libc::PROT_NONE);
    let clock = machine.vm.get_clock().unwrap();
    machine.vm.set_clock(&clock).unwrap();
    for _ in 0..2 {
        match machine.vcpu().run() {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => assert_eq!(gpa, STRING),
            other => panic!("{other:?}"),
        }
    }
    protect(libc::PROT_READ | libc::PROT_WRITE);
    match machine.vcpu().run().unwrap() {
        VcpuExit::IoOut(0x390, data) => assert_eq!(data, [0x55, 0, 0, 0]),
        other => panic!("{other:?}"),
    }
    match machine.vcpu().run().unwrap() {
        VcpuExit::MmioWrite(0x4000_0000, data) => assert_eq!(data, [0x55]),
        other => panic!("{other:?}"),
    }
    let clock = machine.vm.get_clock().unwrap();
    machine.vm.set_clock(&clock).unwrap();
    runs_to_stop(&mut machine);
    assert_ne!(machine.memory.read_u64(CLOCK + 16), 0);
}

/// The guest's page tables are memory like any other.
#[test]
fn page_tables_go_and_come_back() {
    let code = assemble(|a| {
        stop(a)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(ebx, dword_ptr(0x5000))?;
        stop(a)
    });
    let mut machine = Machine::new_in(with_ept(true), Irqchip::None, 1, &code);
    machine.memory.write_u64(0x5000, 0x1234);
    runs_to_stop(&mut machine);
    let tables = machine.memory.base.wrapping_add(TABLES as usize);
    let protect = |rights| {
        // SAFETY: pages of the machine's own memory, which only the guest uses.
        unsafe { assert_eq!(libc::mprotect(tables.cast(), 0x6000, rights), 0) };
    };
    protect(libc::PROT_NONE);
    assert_eq!(machine.vcpu().translate_gva(0x5000).unwrap().valid, 0);
    for _ in 0..2 {
        match machine.vcpu().run() {
            Ok(VcpuExit::MemoryFault { gpa, .. }) => assert_eq!(gpa, TABLES),
            other => panic!("{other:?}"),
        }
    }
    protect(libc::PROT_READ | libc::PROT_WRITE);
    assert_eq!(machine.vcpu().translate_gva(0x5000).unwrap().valid, 1);
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().rbx, 0x1234);
}

/// IRET from an NMI handler whose stack is not mapped yet: NMIs stay blocked until it is done.
#[test]
fn a_return_that_faults_leaves_nmis_blocked() {
    const FRAME: u64 = 0x18_0000;
    let code = assemble(|a| {
        stop(a)?;
        a.nop()?;
        a.nop()?;
        a.nop()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.gate(2, 0x2000);
    // The handler notes where it interrupted, and returns by a copy of its frame elsewhere.
    machine.code_at(0x2000, |a| {
        a.mov(rax, qword_ptr(rsp))?;
        a.mov(rcx, qword_ptr(0x5000))?;
        a.mov(qword_ptr(rcx * 8 + 0x5008), rax)?;
        a.inc(qword_ptr(0x5000))?;
        stop(a)?;
        a.mov(rsp, FRAME)?;
        a.iretq()
    });
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    for (i, word) in [regs.rip + 2, 8, 2, STACK, 16].into_iter().enumerate() {
        machine.memory.write_u64(FRAME + 8 * i as u64, word);
    }
    machine.vcpu().nmi().unwrap();
    runs_to_stop(&mut machine);
    machine.vcpu().nmi().unwrap();
    let pending = machine.vcpu().get_vcpu_events().unwrap();
    assert_eq!((pending.nmi.masked, pending.nmi.pending), (1, 1));
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 2);
    assert_eq!(
        machine.memory.read_u64(0x5010),
        regs.rip + 2,
        "after the return"
    );
    runs_to_stop(&mut machine);
}

/// Descriptor tables among devices: the delivery of an event cannot be emulated.
#[test]
fn events_that_cannot_be_delivered_are_internal_errors() {
    let mut machine = Machine::new(Irqchip::None, 1, &assemble(|a| a.ud2()));
    let mut sregs = machine.vcpu().get_sregs().unwrap();
    sregs.idt.base = 0x4000_0000;
    machine.vcpu().set_sregs(&sregs).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::InternalError => {}
        other => panic!("{other:?}"),
    }
    let run = machine.vcpu().get_kvm_run();
    // SAFETY: the exit reason names the member.
    let error = unsafe { run.__bindgen_anon_1.internal };
    assert_eq!(error.suberror, KVM_INTERNAL_ERROR_DELIVERY_EV);
    assert!(error.ndata >= 4);
    assert_eq!(
        error.data[0], 0x8000_0306,
        "valid, a hardware exception, #UD"
    );
    machine.gate(6, 0x2000);
    machine.code_at(0x2000, stop);
    sregs.idt.base = IDT;
    machine.vcpu().set_sregs(&sregs).unwrap();
    runs_to_stop(&mut machine);
}

/// An exception and an interrupt that were both on their way are both delivered.
#[test]
fn events_are_restored_together() {
    let code = assemble(|a| {
        stop(a)?;
        a.nop()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.count(6, 0x2000, 0x5000);
    machine.count(0x60, 0x2100, 0x5008);
    machine.count(2, 0x2200, 0x5010);
    runs_to_stop(&mut machine);
    let mut regs = machine.vcpu().get_regs().unwrap();
    regs.rflags |= 1 << 9;
    machine.vcpu().set_regs(&regs).unwrap();
    let mut events = machine.vcpu().get_vcpu_events().unwrap();
    (events.exception.injected, events.exception.nr) = (1, 6);
    (events.interrupt.injected, events.interrupt.nr) = (1, 0x60);
    events.nmi.injected = 1;
    machine.vcpu().set_vcpu_events(&events).unwrap();
    runs_to_stop(&mut machine);
    let counts = [0x5000, 0x5008, 0x5010].map(|at| machine.memory.read_u64(at));
    assert_eq!(counts, [1; 3]);
}

/// Why an MSR access comes to user space, for each reason that it asked for.
#[test]
fn accesses_to_msrs_come_with_their_reason() {
    let code = assemble(|a| {
        a.mov(ecx, 0x5555)?;
        a.rdmsr()?;
        a.mov(rsi, rax)?;
        a.mov(ecx, 0xc000_0080u32)?; // EFER
        a.xor(eax, eax)?;
        a.mov(edx, 1)?;
        a.wrmsr()?;
        a.mov(ecx, 0x5556)?;
        a.rdmsr()?;
        a.ud2()
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.gate(13, 0x2000);
    machine.code_at(0x2000, stop);
    let reasons = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL;
    enable(&machine.vm, KVM_CAP_X86_USER_SPACE_MSR, reasons.into()).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::X86Rdmsr(exit) => {
            assert_eq!(exit.reason, kvm::MsrExitReason::Unknown);
            assert_eq!(exit.index, 0x5555);
            *exit.data = 0x1_0000_0007;
        }
        other => panic!("{other:?}"),
    }
    match machine.vcpu().run().unwrap() {
        VcpuExit::X86Wrmsr(exit) => {
            assert_eq!(exit.reason, kvm::MsrExitReason::Inval);
            assert_eq!((exit.index, exit.data), (0xc000_0080, 1 << 32));
        }
        other => panic!("{other:?}"),
    }
    match machine.vcpu().run().unwrap() {
        VcpuExit::X86Rdmsr(exit) => *exit.error = 1,
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rsi, regs.rip >> 12), (7, 2));
}

/// A hypercall that user space is to carry out names whole pages.
#[test]
fn hypercalls_about_pages_are_checked() {
    let code = assemble(|a| {
        for (start, pages) in [(0x1001u64, 1u64), (0x1000, 0), (0x1000, u64::MAX)] {
            a.mov(eax, 12)?;
            a.mov(rbx, start)?;
            a.mov(rcx, pages)?;
            a.vmcall()?;
            a.push(rax)?;
        }
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    enable(&machine.vm, KVM_CAP_EXIT_HYPERCALL, 1 << 12).unwrap();
    runs_to_stop(&mut machine);
    for i in 1..=3 {
        assert_eq!(machine.memory.read_u64(STACK - 8 * i) as i64, -22);
    }
}

#[test]
fn only_a_lowered_priority_ends_a_run() {
    let code = assemble(|a| {
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.mov(cr8, rax)?;
        a.mov(eax, 3)?;
        a.mov(cr8, rax)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    match machine.vcpu().run().unwrap() {
        VcpuExit::SetTpr => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(machine.vcpu().get_kvm_run().cr8, 3);
    runs_to_stop(&mut machine);
    machine.vcpu().get_kvm_run().cr8 = 16;
    assert_eq!(errno(machine.vcpu().run()), libc::EINVAL);
}

/// 32 bytes at once come in eights, the last of them in another page.
#[test]
fn wide_accesses_to_devices_come_in_eights() {
    let code = assemble(|a| {
        a.mov(rbx, 0x4000_0ff0u64)?;
        a.vmovdqu(ymm1, ymmword_ptr(rbx))?;
        a.vmovdqu(ymmword_ptr(rbx + 0x1000), ymm1)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.enable_avx();
    let (mut reads, mut writes) = (Vec::new(), Vec::new());
    loop {
        match machine.vcpu().run().unwrap() {
            VcpuExit::MmioRead(gpa, data) => {
                assert_eq!(data.len(), 8);
                reads.push(gpa);
                data.copy_from_slice(&gpa.to_le_bytes());
            }
            VcpuExit::MmioWrite(gpa, data) => {
                writes.push((gpa, u64::from_le_bytes(data.try_into().unwrap())));
            }
            VcpuExit::IoOut(0x80, _) => break,
            other => panic!("{other:?}"),
        }
    }
    let eights: Vec<u64> = (0..4).map(|i| 0x4000_0ff0 + 8 * i).collect();
    assert_eq!(reads, eights);
    let copied: Vec<_> = eights.iter().map(|&at| (at + 0x1000, at)).collect();
    assert_eq!(writes, copied);
}

/// User space may put the vCPU elsewhere instead of answering.
#[test]
fn a_read_that_is_given_up_harms_nothing() {
    let code = assemble(|a| {
        a.mov(rbx, 0x4000_0000u64)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.ud2()
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.code_at(0x3000, |a| {
        a.mov(rax, qword_ptr(rbx + 0x100))?;
        stop(a)
    });
    match machine.vcpu().run().unwrap() {
        VcpuExit::MmioRead(0x4000_0000, _) => {}
        other => panic!("{other:?}"),
    }
    let mut regs = machine.vcpu().get_regs().unwrap();
    regs.rip = 0x3000;
    machine.vcpu().set_regs(&regs).unwrap();
    match machine.vcpu().run().unwrap() {
        VcpuExit::MmioRead(0x4000_0100, data) => data.fill(7),
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
    assert_eq!(
        machine.vcpu().get_regs().unwrap().rax,
        0x0707_0707_0707_0707
    );
}

/// KVM_CAP_MSR_PLATFORM_INFO decides whether the guest may read the register.
#[test]
fn platform_information_can_be_taken_away() {
    let code = assemble(|a| {
        a.mov(ecx, 0xce)?;
        a.rdmsr()?;
        stop(a)?;
        a.rdmsr()?;
        a.ud2()
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.gate(13, 0x2000);
    machine.code_at(0x2000, stop);
    runs_to_stop(&mut machine);
    enable(&machine.vm, KVM_CAP_MSR_PLATFORM_INFO, 0).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().rip & !0xfff, 0x2000);
}

/// As many NMIs as a processor keeps, whatever user space says.
#[test]
fn restored_nmis_are_at_most_two() {
    let code = assemble(|a| {
        stop(a)?;
        for _ in 0..8 {
            a.nop()?;
        }
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.count(2, 0x2000, 0x5000);
    runs_to_stop(&mut machine);
    let mut events = machine.vcpu().get_vcpu_events().unwrap();
    events.nmi.pending = 9;
    machine.vcpu().set_vcpu_events(&events).unwrap();
    runs_to_stop(&mut machine);
    assert_eq!(machine.memory.read_u64(0x5000), 2);
}

/// A write to a read-only slot is MMIO, a read is not, and an instruction that does both reads
/// memory.
#[test]
fn read_only_memory_is_read_and_not_written() {
    let code = assemble(|a| {
        a.mov(rbx, 0x4000_0000u64)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.add(dword_ptr(rbx), 1)?;
        a.mov(ecx, dword_ptr(rbx))?;
        stop(a)?;
        a.jmp(rbx)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    let rom = Memory::new(0x1000);
    rom.write(0, &[0xe6, 0x80, 0x90, 0x90]); // out 0x80, al
    let region = kvm_userspace_memory_region {
        flags: KVM_MEM_READONLY,
        ..rom.region(1, 0x4000_0000)
    };
    // SAFETY: the memory outlives the machine's runs.
    unsafe { machine.vm.set_user_memory_region(region).unwrap() };
    match machine.vcpu().run().unwrap() {
        VcpuExit::MmioWrite(0x4000_0000, data) => assert_eq!(data, [0xe7, 0x80, 0x90, 0x90]),
        other => panic!("{other:?}"),
    }
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rax, regs.rcx), (0x9090_80e6, 0x9090_80e6));
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().rip, 0x4000_0000);
    drop(machine);
}
