//! A debugger in user space and a guest that uses the same means.

mod common;

use common::*;
use eptide_kvm as kvm;
use kvm::VcpuExit;
use kvm_bindings::*;

fn debug(machine: &mut Machine, control: u32, debugreg: [u64; 8]) {
    let request = kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | control,
        arch: kvm_guest_debug_arch { debugreg },
        ..Default::default()
    };
    machine.vcpu().set_guest_debug(&request).unwrap();
}

/// Runs until an exception is the debugger's.
fn stopped(machine: &mut Machine) -> kvm_debug_exit_arch {
    match machine.vcpu().run().unwrap() {
        VcpuExit::Debug(debug) => debug,
        other => panic!("{other:?}"),
    }
}

/// A breakpoint that is not the debugger's goes back to the guest.
#[test]
fn a_breakpoint_of_the_guests_is_given_back() {
    let code = assemble(|a| {
        a.nop()?;
        a.int3()?;
        a.nop()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.gate(3, 0x3000);
    machine.code_at(0x3000, |a| {
        a.mov(r15, qword_ptr(rsp))?;
        a.iretq()
    });
    debug(&mut machine, KVM_GUESTDBG_USE_SW_BP, [0; 8]);
    let at = stopped(&mut machine);
    assert_eq!((at.exception, at.pc), (3, CODE + 1));
    debug(
        &mut machine,
        KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_INJECT_BP,
        [0; 8],
    );
    runs_to_stop(&mut machine);
    assert_eq!(machine.vcpu().get_regs().unwrap().r15, CODE + 2);
}

/// Data is watched, and the guest's own debug registers are its own meanwhile.
#[test]
fn data_is_watched() {
    let code = assemble(|a| {
        a.mov(rax, 0x1234u64)?;
        a.mov(dr1, rax)?;
        a.mov(dword_ptr(0x5000), 1)?;
        a.mov(eax, dword_ptr(0x5008))?;
        a.mov(dword_ptr(0x5008), 1)?;
        a.mov(rcx, dr1)?;
        a.mov(rdx, dr7)?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    // DR1: four bytes at 0x5008, written.
    let mut registers = [0; 8];
    (registers[1], registers[7]) = (0x5008, 0x00d0_0404);
    debug(&mut machine, KVM_GUESTDBG_USE_HW_BP, registers);
    let at = stopped(&mut machine);
    assert_eq!((at.exception, at.dr6 & 0xf), (1, 2));
    assert_eq!(machine.memory.read_u64(0x5008), 1, "a trap");
    runs_to_stop(&mut machine);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!((regs.rcx, regs.rdx), (0x1234, 0x400));
    let own = machine.vcpu().get_debug_regs().unwrap();
    assert_eq!((own.db[1], own.dr7), (0x1234, 0x400));
    machine.vcpu().set_guest_debug(&Default::default()).unwrap();
    assert_eq!(machine.vcpu().get_debug_regs().unwrap().db[1], 0x1234);
}

/// Interrupts wait while the debugger steps, if it wants.
#[test]
fn steps_go_past_interrupts_where_asked() {
    for blocks in [false, true] {
        let code = assemble(|a| {
            a.sti()?;
            for _ in 0..5 {
                a.nop()?;
            }
            stop(a)
        });
        let mut machine = Machine::new(Irqchip::None, 1, &code);
        machine.count(0x61, 0x3000, 0x5000);
        let block = if blocks { KVM_GUESTDBG_BLOCKIRQ } else { 0 };
        debug(&mut machine, KVM_GUESTDBG_SINGLESTEP | block, [0; 8]);
        machine.vcpu().interrupt(0x61).unwrap();
        let places: Vec<u64> = (0..4).map(|_| stopped(&mut machine).pc).collect();
        assert_eq!(places.iter().all(|pc| pc >> 12 == 1), blocks, "{places:x?}");
        machine.vcpu().set_guest_debug(&Default::default()).unwrap();
        runs_to_stop(&mut machine);
        assert_eq!(machine.memory.read_u64(0x5000), 1);
    }
}

/// A step over an instruction that faults is at the handler.
#[test]
fn a_step_over_a_fault_is_at_its_handler() {
    let code = assemble(|a| {
        a.ud2()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.gate(6, 0x3000);
    machine.code_at(0x3000, |a| {
        a.nop()?;
        stop(a)
    });
    debug(&mut machine, KVM_GUESTDBG_SINGLESTEP, [0; 8]);
    let at = stopped(&mut machine);
    assert!([0x3000, 0x3001].contains(&at.pc), "{:x}", at.pc);
}

/// A vCPU may be run by one thread after another.
#[test]
fn threads_take_turns() {
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(0x5000))?;
        stop(a)?;
        a.jmp(again)
    });
    let mut machine = Machine::new(Irqchip::Full, 1, &code);
    for _ in 0..20 {
        std::thread::scope(|scope| {
            let machine = &mut machine;
            scope.spawn(move || runs_to_stop(machine)).join().unwrap();
        });
    }
    assert_eq!(machine.memory.read_u64(0x5000), 20);
}

/// A single step that waits behind MOV SS while the next instruction is KVM's: one trap, behind that
/// instruction, and none at the handler's first. If the instruction faults, the trap goes with it.
#[test]
fn a_single_step_behind_mov_ss_strikes_once() {
    let cases: [(&[u8], u8); 3] = [
        (&[0x0f, 0xa2], 1),
        // IN from the 8259, RDMSR of an MSR that there is not.
        (&[0xe4, 0x21], 1),
        (&[0x0f, 0x32], 13),
    ];
    for (instruction, vector) in cases {
        let code = assemble(|a| {
            a.mov(ebx, 16)?;
            a.mov(ecx, 0x7777_7777)?;
            a.push(0x102)?;
            a.popfq()?;
            a.mov(ss, ebx)?;
            a.db(instruction)?;
            a.nop()?;
            stop(a)
        });
        let behind = CODE + code.len() as u64 - 3;
        let mut machine = Machine::new(Irqchip::Full, 1, &code);
        for (vector, handler, error) in [(1u8, 0x2000, 0), (13, 0x2100, 8)] {
            machine.gate(vector, handler);
            machine.code_at(handler, |a| {
                a.inc(qword_ptr(0x5000 + 16 * u64::from(vector)))?;
                a.mov(rax, qword_ptr(rsp + error))?;
                a.mov(qword_ptr(0x5008 + 16 * u64::from(vector)), rax)?;
                stop(a)
            });
        }
        runs_to_stop(&mut machine);
        let counts = [1, 13].map(|vector| machine.memory.read_u64(0x5000 + 16 * vector));
        let expected = if vector == 1 { [1, 0] } else { [0, 1] };
        assert_eq!(counts, expected, "{instruction:02x?}");
        let at = machine.memory.read_u64(0x5008 + 16 * u64::from(vector));
        let length = instruction.len() as u64;
        let expected = if vector == 1 { behind } else { behind - length };
        assert_eq!(at, expected, "{instruction:02x?}");
    }
}

/// A step during which an event is delivered ends at the first instruction of its handler.
#[test]
fn a_step_into_an_event_ends_before_its_handler() {
    type Raise = fn(&mut Machine);
    let cases: [(u8, Raise); 3] = [
        (0x61, |machine| machine.vcpu().interrupt(0x61).unwrap()),
        (2, |machine| machine.vcpu().nmi().unwrap()),
        // RDMSR of an MSR that there is not, which KVM finds out.
        (13, |_| {}),
    ];
    for (vector, raise) in cases {
        let code = assemble(|a| {
            a.mov(ecx, 0x7777_7777)?;
            a.sti()?;
            a.nop()?;
            a.rdmsr()?;
            stop(a)
        });
        let mut machine = Machine::new(Irqchip::None, 1, &code);
        machine.gate(vector, 0x3000);
        machine.code_at(0x3000, |a| {
            a.nop()?;
            stop(a)
        });
        debug(&mut machine, KVM_GUESTDBG_SINGLESTEP, [0; 8]);
        for _ in 0..3 {
            assert_eq!(stopped(&mut machine).pc >> 12, 1);
        }
        raise(&mut machine);
        assert_eq!(stopped(&mut machine).pc, 0x3000, "{vector:#x}");
        assert_eq!(stopped(&mut machine).pc, 0x3001, "{vector:#x}");
    }
}

/// The same with a data breakpoint on what MOV SS reads, and instructions of which KVM finds out that
/// they fault, that user space completes, or that are emulated.
#[test]
fn a_data_breakpoint_behind_mov_ss_strikes_once() {
    const WATCHED: u64 = 0x6000;
    let cases: [(&[u8], u8); 6] = [
        (&[0x0f, 0xa2], 1),             // CPUID
        (&[0xe4, 0x33], 1),             // IN from user space
        (&[0x8a, 0x06], 1),             // MOV AL from user space's memory
        (&[0x0f, 0x21, 0xf8], 1),       // MOV RAX, DR7
        (&[0x0f, 0x32], 13),            // RDMSR of none
        (&[0xf3, 0x0f, 0xc7, 0x33], 6), // VMXON
    ];
    for (instruction, vector) in cases {
        let code = assemble(|a| {
            a.mov(eax, WATCHED as i32)?;
            a.mov(dr0, rax)?;
            a.mov(eax, 0x000f_0402)?;
            a.mov(dr7, rax)?;
            a.mov(ecx, 0x7777_7777)?;
            a.mov(rbx, WATCHED)?;
            a.mov(rsi, 0xd000_0000u64)?;
            a.mov(ss, word_ptr(rbx))?;
            a.db(instruction)?;
            a.nop()?;
            stop(a)
        });
        let behind = CODE + code.len() as u64 - 3;
        let mut machine = Machine::new(Irqchip::None, 1, &code);
        machine.memory.write_u64(WATCHED, 16);
        for (vector, handler, error) in [(1u8, 0x2000, 0), (6, 0x2080, 0), (13, 0x2100, 8)] {
            machine.gate(vector, handler);
            machine.code_at(handler, |a| {
                a.inc(qword_ptr(0x5000 + 16 * u64::from(vector)))?;
                a.mov(rax, qword_ptr(rsp + error))?;
                a.mov(qword_ptr(0x5008 + 16 * u64::from(vector)), rax)?;
                stop(a)
            });
        }
        loop {
            match machine.vcpu().run().unwrap() {
                VcpuExit::IoOut(0x80, _) => break,
                VcpuExit::IoIn(0x33, data) => data[0] = 1,
                VcpuExit::MmioRead(_, data) => data[0] = 1,
                other => panic!("{other:?}"),
            }
        }
        for other in [1, 6, 13] {
            let count = machine.memory.read_u64(0x5000 + 16 * u64::from(other));
            assert_eq!(
                count,
                u64::from(other == vector),
                "{instruction:02x?} {other}"
            );
        }
        let at = machine.memory.read_u64(0x5008 + 16 * u64::from(vector));
        let length = instruction.len() as u64;
        let expected = if vector == 1 { behind } else { behind - length };
        assert_eq!(at, expected, "{instruction:02x?}");
    }
}

/// A breakpoint on a port traps behind the instruction, which KVM or user space carries out.
#[test]
fn a_port_is_watched() {
    let code = assemble(|a| {
        a.mov(rax, cr4)?;
        a.or(rax, 8)?;
        a.mov(cr4, rax)?;
        a.mov(eax, 0x33)?;
        a.mov(dr0, rax)?;
        a.mov(eax, 0x0002_0402)?;
        a.mov(dr7, rax)?;
        a.out(0x34, al)?;
        a.out(0x33, al)?;
        a.nop()?;
        stop(a)
    });
    let mut machine = Machine::new(Irqchip::None, 1, &code);
    machine.gate(1, 0x2000);
    machine.code_at(0x2000, |a| {
        a.mov(r15, qword_ptr(rsp))?;
        a.mov(r14, dr6)?;
        stop(a)
    });
    let mut ports = Vec::new();
    while let VcpuExit::IoOut(port, _) = machine.vcpu().run().unwrap() {
        ports.push(port);
        if port == 0x80 {
            break;
        }
    }
    assert_eq!(ports, [0x34, 0x33, 0x80]);
    let regs = machine.vcpu().get_regs().unwrap();
    assert_eq!(
        (regs.r15, regs.r14 & 0xf),
        (CODE + code.len() as u64 - 3, 1)
    );
}
