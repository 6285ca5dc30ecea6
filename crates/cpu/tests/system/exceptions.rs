//! Every exception: what raises it, its error code, what is pushed; gates, stacks, double and
//! triple faults.

use crate::bench::*;
use crate::guest::Guest;
use arch::control_registers::{Cr0, Cr4, Efer, Rflags};
use arch::exit::ExitReason;
use arch::interruption::{InterruptionInfo, InterruptionType};
use iced_x86::code_asm::*;

/// Name, code, preparation, vector, error code, and how far RIP moved (for traps).
type Case = (
    &'static str,
    fn(&mut CodeAssembler),
    fn(&mut Guest),
    u8,
    Option<u64>,
    u64,
);

fn nothing(_: &mut Guest) {}

fn cases() -> Vec<Case> {
    vec![
        (
            "divide error",
            |a| {
                a.div(ecx).unwrap();
            },
            nothing,
            0,
            None,
            0,
        ),
        (
            "INT1",
            |a| {
                a.int1().unwrap();
            },
            nothing,
            1,
            None,
            1,
        ),
        (
            "INT3",
            |a| {
                a.int3().unwrap();
            },
            nothing,
            3,
            None,
            1,
        ),
        (
            "INT 0x30",
            |a| {
                a.int(0x30).unwrap();
            },
            nothing,
            0x30,
            None,
            2,
        ),
        (
            "UD2",
            |a| {
                a.ud2().unwrap();
            },
            nothing,
            6,
            None,
            0,
        ),
        (
            "x87 with CR0.TS",
            |a| {
                a.fninit().unwrap();
            },
            |g| g.vcpu.state.cr0 |= Cr0::TS,
            7,
            None,
            0,
        ),
        (
            "SSE without CR4.OSFXSR",
            |a| {
                a.addps(xmm0, xmm1).unwrap();
            },
            |g| g.vcpu.state.cr4 -= Cr4::OSFXSR,
            6,
            None,
            0,
        ),
        (
            "AVX without CR4.OSXSAVE",
            |a| {
                a.vaddps(ymm0, ymm1, ymm2).unwrap();
            },
            |g| g.vcpu.state.cr4 -= Cr4::OSXSAVE,
            6,
            None,
            0,
        ),
        (
            "absent segment",
            |a| {
                a.mov(ds, ecx).unwrap();
            },
            |g| g.vcpu.state.regs[1] = ABSENT.into(),
            11,
            Some(ABSENT as u64),
            0,
        ),
        (
            "selector past the GDT",
            |a| {
                a.mov(ds, ecx).unwrap();
            },
            |g| g.vcpu.state.regs[1] = 0x100,
            13,
            Some(0x100),
            0,
        ),
        (
            "non-canonical stack",
            |a| {
                a.push(rax).unwrap();
            },
            |g| g.vcpu.state.regs[4] = 0x8000_0000_0000_0000,
            12,
            Some(0),
            0,
        ),
        (
            "non-canonical data",
            |a| {
                a.mov(rax, qword_ptr(rcx)).unwrap();
            },
            |g| g.vcpu.state.regs[1] = 0x8000_0000_0000_0000,
            13,
            Some(0),
            0,
        ),
        (
            "read of an unmapped page",
            |a| {
                a.mov(rax, qword_ptr(rcx)).unwrap();
            },
            |g| g.vcpu.state.regs[1] = 0x80_0000_0000,
            14,
            Some(0),
            0,
        ),
        (
            "write of an unmapped page",
            |a| {
                a.mov(qword_ptr(rcx), rax).unwrap();
            },
            |g| g.vcpu.state.regs[1] = 0x80_0000_0000,
            14,
            Some(2),
            0,
        ),
        (
            "jump to an unmapped page",
            |a| {
                a.jmp(rcx).unwrap();
            },
            |g| g.vcpu.state.regs[1] = 0x80_0000_0000,
            14,
            Some(0x10),
            0,
        ),
        (
            "write of a read-only page",
            |a| {
                a.mov(qword_ptr(rcx), rax).unwrap();
            },
            |g| {
                g.vcpu.state.regs[1] = 0x40_0000;
                g.memory.write_u64(0x3010, 0x40_0085);
            },
            14,
            Some(3),
            0,
        ),
        (
            "fetch from a no-execute page",
            |a| {
                a.jmp(rcx).unwrap();
            },
            |g| {
                g.vcpu.state.regs[1] = 0x40_0000;
                g.memory.write_u64(0x3010, 0x40_0087 | 1 << 63);
            },
            14,
            Some(0x11),
            0,
        ),
        (
            "SMEP",
            |a| {
                a.jmp(rcx).unwrap();
            },
            |g| {
                g.vcpu.state.regs[1] = DATA;
                g.vcpu.state.cr4 |= Cr4::SMEP;
                for i in 0..512 {
                    g.memory.write_u64(0x3000 + 8 * i, i << 21 | 0x83);
                }
                // The first 2 MiB in small pages, the data page a user page.
                g.memory.write_u64(0x3000, 0x5000 | 7);
                for i in 0..512 {
                    g.memory.write_u64(0x5000 + 8 * i, i << 12 | 3);
                }
                g.memory.write_u64(0x5000 + 8 * (DATA >> 12), DATA | 7);
            },
            14,
            Some(0x11),
            0,
        ),
        (
            "SMAP",
            |a| {
                a.mov(rax, qword_ptr(rcx)).unwrap();
            },
            |g| {
                g.vcpu.state.regs[1] = DATA;
                g.vcpu.state.cr4 |= Cr4::SMAP;
                g.memory.write_u64(0x3000, 0x5000 | 7);
                for i in 0..512 {
                    g.memory.write_u64(0x5000 + 8 * i, i << 12 | 3);
                }
                g.memory.write_u64(0x5000 + 8 * (DATA >> 12), DATA | 7);
            },
            14,
            Some(1),
            0,
        ),
        (
            "reserved bit",
            |a| {
                a.mov(rax, qword_ptr(rcx)).unwrap();
            },
            |g| {
                g.vcpu.state.regs[1] = 0x40_0000;
                g.memory.write_u64(0x3010, 0x40_0087 | 1 << 51);
            },
            14,
            Some(9),
            0,
        ),
        (
            "x87 error",
            |a| {
                a.wait().unwrap();
            },
            |g| {
                // Divide by zero is unmasked and pending.
                g.vcpu.state.extended.0[0] = 0x7b;
                g.vcpu.state.extended.0[2] = 0x84;
                g.vcpu.state.extended.0[3] = 0x80;
            },
            16,
            None,
            0,
        ),
        (
            "SIMD error",
            |a| {
                a.divss(xmm0, xmm1).unwrap();
            },
            |g| {
                g.vcpu.state.extended.set_mxcsr(0x1f80 & !(1 << 9));
                g.vcpu.state.extended.0[160..164].copy_from_slice(&1f32.to_le_bytes());
            },
            19,
            None,
            0,
        ),
        (
            "SIMD error without CR4.OSXMMEXCPT",
            |a| {
                a.divss(xmm0, xmm1).unwrap();
            },
            |g| {
                g.vcpu.state.extended.set_mxcsr(0x1f80 & !(1 << 9));
                g.vcpu.state.cr4 -= Cr4::OSXMMEXCPT;
                g.vcpu.state.extended.0[160..164].copy_from_slice(&1f32.to_le_bytes());
            },
            6,
            None,
            0,
        ),
        (
            "reserved CR4 bit",
            |a| {
                a.mov(cr4, rcx).unwrap();
            },
            |g| g.vcpu.state.regs[1] = 1 << 31,
            13,
            Some(0),
            0,
        ),
        (
            "CR0.PG without CR0.PE",
            |a| {
                a.mov(cr0, rcx).unwrap();
            },
            |g| g.vcpu.state.regs[1] = 1 << 31,
            13,
            Some(0),
            0,
        ),
        (
            "VMX instruction without CR4.VMXE",
            |a| {
                a.vmxoff().unwrap();
            },
            nothing,
            6,
            None,
            0,
        ),
        (
            "SYSCALL without EFER.SCE",
            |a| {
                a.syscall().unwrap();
            },
            |g| g.vcpu.state.efer -= Efer::SCE,
            6,
            None,
            0,
        ),
        (
            "misaligned MOVAPS",
            |a| {
                a.movaps(xmm0, xmmword_ptr(rcx)).unwrap();
            },
            |g| g.vcpu.state.regs[1] = DATA + 8,
            13,
            Some(0),
            0,
        ),
        (
            "misaligned CMPXCHG16B",
            |a| {
                a.lock().cmpxchg16b(xmmword_ptr(rcx)).unwrap();
            },
            |g| g.vcpu.state.regs[1] = DATA + 8,
            13,
            Some(0),
            0,
        ),
    ]
}

#[test]
fn exceptions_push_what_they_should() {
    for (name, code, prepare, vector, error, advance) in cases() {
        let mut guest = long_guest();
        guest.load(&assemble(64, CODE, code));
        prepare(&mut guest);
        let old_rsp = guest.vcpu.state.regs[4];
        if old_rsp == 0x8000_0000_0000_0000 {
            // The handler needs a stack of its own.
            let gate = gate64(HANDLERS + 16 * u64::from(vector), KERNEL_CODE, 14, 0, 1);
            guest
                .memory
                .write_u64(IDT + 16 * u64::from(vector), gate[0]);
        }
        assert_eq!(guest.run_to_handler(), vector, "{name}");
        let mut at = 0;
        if let Some(error) = error {
            assert_eq!(guest.stack(0), error, "error code of {name}");
            at = 1;
        }
        let fetch = name.contains("jump") || name.contains("fetch") || name == "SMEP";
        let rip = if fetch {
            guest.vcpu.state.regs[1]
        } else {
            CODE + advance
        };
        assert_eq!(guest.stack(at), rip, "RIP of {name}");
        assert_eq!(guest.stack(at + 1), u64::from(KERNEL_CODE), "CS of {name}");
        assert_eq!(guest.stack(at + 3), old_rsp, "RSP of {name}");
        if vector == 14 {
            assert_eq!(
                guest.vcpu.state.cr2, guest.vcpu.state.regs[1],
                "CR2 of {name}"
            );
        }
        // Faults push RF; traps do not.
        let trap = advance != 0 || vector == 1;
        assert_eq!(
            guest.stack(at + 2) >> 16 & 1,
            u64::from(!trap),
            "RF of {name}"
        );
    }
}

#[test]
fn every_exception_can_be_intercepted() {
    for (name, code, prepare, vector, error, _) in cases() {
        if vector >= 32 {
            continue;
        }
        let mut guest = long_guest();
        guest.load(&assemble(64, CODE, code));
        prepare(&mut guest);
        guest.controls.exception_bitmap = 1 << vector;
        let exit = guest.run_to(ExitReason::ExceptionOrNmi);
        assert_eq!(exit.interruption_info.vector(), vector, "{name}");
        assert_eq!(
            exit.interruption_info.has_error_code(),
            error.is_some(),
            "{name}"
        );
        assert_eq!(
            u64::from(exit.interruption_error_code),
            error.unwrap_or(0),
            "{name}"
        );
        assert_eq!(
            guest.vcpu.state.cr2, 0,
            "an intercepted #PF leaves CR2: {name}"
        );
        if vector == 14 {
            assert_eq!(exit.qualification, guest.vcpu.state.regs[1], "{name}");
        }
    }
}

#[test]
fn page_fault_interception_follows_mask_and_match() {
    for (mask, matching, exits) in [(0, 0, true), (2, 2, true), (2, 0, false), (1, 1, false)] {
        let mut guest = long_guest();
        guest.load(&assemble(64, CODE, |a| a.mov(qword_ptr(rcx), rax).unwrap()));
        guest.vcpu.state.regs[1] = 0x80_0000_0000;
        guest.controls.exception_bitmap = 1 << 14;
        guest.controls.page_fault_error_code_mask = mask;
        guest.controls.page_fault_error_code_match = matching;
        let expected = if exits {
            ExitReason::ExceptionOrNmi
        } else {
            ExitReason::Hlt
        };
        guest.run_to(expected);
    }
}

#[test]
fn a_fault_in_delivery_makes_a_double_fault_and_then_a_triple_fault() {
    // #PF whose gate is not present: #NP during #PF is a double fault.
    let mut guest = long_guest();
    guest.memory.write_u64(IDT + 16 * 14, 0);
    guest.memory.write_u64(IDT + 16 * 14 + 8, 0);
    guest.load(&assemble(64, CODE, |a| a.mov(rax, qword_ptr(rcx)).unwrap()));
    guest.vcpu.state.regs[1] = 0x80_0000_0000;
    assert_eq!(guest.run_to_handler(), 8);
    assert_eq!(guest.stack(0), 0, "a double fault's error code is zero");

    let mut guest = long_guest();
    guest.vcpu.state.idtr.limit = 0;
    guest.load(&assemble(64, CODE, |a| a.ud2().unwrap()));
    guest.run_to(ExitReason::TripleFault);
    assert_eq!(guest.vcpu.state.rip, CODE);
}

#[test]
fn a_handler_at_a_lower_level_runs_on_the_task_state_segments_stack() {
    let mut guest = long_guest();
    let code = assemble(64, CODE, |a| {
        a.push(u64::from(USER_DATA) as i32).unwrap();
        a.push(USER_STACK as i32).unwrap();
        a.push(0x202).unwrap();
        a.push(i32::from(USER_CODE)).unwrap();
        a.push((CODE + 0x100) as i32).unwrap();
        a.iretq().unwrap();
    });
    guest.load(&code);
    guest.memory.write(CODE + 0x100, &[0x0f, 0x0b]);
    assert_eq!(guest.run_to_handler(), 6);
    assert_eq!(guest.vcpu.state.regs[4], STACK - 40);
    let frame: Vec<u64> = (0..5).map(|n| guest.stack(n)).collect();
    assert_eq!(frame[0], CODE + 0x100);
    assert_eq!(frame[1], USER_CODE.into());
    assert_eq!(frame[3], USER_STACK);
    assert_eq!(frame[4], USER_DATA.into());
    assert_eq!(guest.vcpu.state.cpl(), 0);
    let stack = guest.vcpu.state.segments[2];
    assert_eq!(
        (stack.selector, stack.access.usable()),
        (0, false),
        "SS is null in a new ring 0"
    );
}

#[test]
fn user_code_is_kept_from_privileged_instructions_and_gates() {
    let privileged: [fn(&mut CodeAssembler); 8] = [
        |a| a.hlt().unwrap(),
        |a| a.cli().unwrap(),
        |a| a.mov(rax, cr0).unwrap(),
        |a| a.mov(dr7, rax).unwrap(),
        |a| a.rdmsr().unwrap(),
        |a| a.lgdt(fword_ptr(rax)).unwrap(),
        |a| a.invlpg(byte_ptr(rax)).unwrap(),
        |a| a.swapgs().unwrap(),
    ];
    for code in privileged {
        let mut guest = long_guest();
        to_user(&mut guest);
        guest.load(&assemble(64, CODE, code));
        assert_eq!(guest.run_to_handler(), 13);
        assert_eq!(guest.stack(0), 0);
    }
    let mut guest = long_guest();
    to_user(&mut guest);
    guest.load(&assemble(64, CODE, |a| a.int(0x40).unwrap()));
    assert_eq!(guest.run_to_handler(), 13);
    assert_eq!(
        guest.stack(0),
        0x40 << 3 | 2,
        "the error code names the gate"
    );
}

/// Ring 3 with the segments that IRET would load.
pub fn to_user(guest: &mut Guest) {
    let state = &mut guest.vcpu.state;
    for segment in &mut state.segments {
        segment.access.0 |= 3 << 5;
    }
    state.segments[1].selector = USER_CODE;
    state.segments[2].selector = USER_DATA;
    state.regs[4] = USER_STACK;
}

#[test]
fn alignment_checks_apply_to_user_data_only() {
    for user in [false, true] {
        let mut guest = long_guest();
        if user {
            to_user(&mut guest);
        }
        guest.vcpu.state.cr0 |= Cr0::AM;
        guest.vcpu.state.set_rflags(1 << 18 | 2);
        guest.vcpu.state.regs[1] = DATA + 1;
        guest.load(&assemble(64, CODE, |a| {
            a.mov(eax, dword_ptr(rcx)).unwrap();
            a.ud2().unwrap();
        }));
        assert_eq!(guest.run_to_handler(), if user { 17 } else { 6 });
    }
}

#[test]
fn injected_events_arrive_with_their_frames() {
    let kinds = [
        (InterruptionType::ExternalInterrupt, 0x55, None, 0),
        (InterruptionType::Nmi, 2, None, 0),
        (InterruptionType::HardwareException, 13, Some(0x18), 0),
        (InterruptionType::SoftwareInterrupt, 0x80, None, 2),
        (InterruptionType::SoftwareException, 3, None, 1),
    ];
    for (kind, vector, error, length) in kinds {
        let mut guest = long_guest();
        guest.load(&[0xf4]);
        guest.vcpu.state.set_rflags(0x202);
        guest.controls.interruption_info = InterruptionInfo::new(kind, vector, error.is_some());
        guest.controls.interruption_error_code = error.unwrap_or(0);
        guest.controls.instruction_length = length;
        assert_eq!(guest.run_to_handler(), vector, "{kind:?}");
        let at = u64::from(error.is_some());
        assert_eq!(guest.stack(at), CODE + u64::from(length), "{kind:?}");
        let blocked = guest
            .vcpu
            .state
            .interruptibility
            .contains(arch::controls::Interruptibility::NMI);
        assert_eq!(blocked, kind == InterruptionType::Nmi);
    }
}

#[test]
fn a_delivery_cut_short_by_ept_is_reported() {
    let mut guest = long_guest();
    guest.load(&[0xf4]);
    guest.vcpu.state.set_rflags(0x202);
    // The stack page is gone from EPT.
    guest.ept.set(STACK - 0x1000, 0);
    guest.controls.interruption_info =
        InterruptionInfo::new(InterruptionType::ExternalInterrupt, 0x55, false);
    let exit = guest.run_to(ExitReason::EptViolation);
    assert_eq!(exit.idt_vectoring_info, guest.controls.interruption_info);
    assert_eq!(exit.guest_physical_address & !0xfff, STACK - 0x1000);
    assert_eq!(guest.vcpu.state.rip, CODE, "nothing was delivered");
}

/// SDM volume 2, "LTR" and "LLDT"; volume 3, "Segment Descriptor Tables in IA-32e Mode".
#[test]
fn bases_of_system_segments_are_canonical() {
    const SELECTOR: u16 = 0x50;
    type Load = fn(&mut CodeAssembler);
    let loads: [(Load, u64); 2] = [
        (|a| a.ltr(cx).unwrap(), 0x8900),
        (|a| a.lldt(cx).unwrap(), 0x8200),
    ];
    for (load, access) in loads {
        for (high, is_good) in [
            (0x0000_7fffu32, true),
            (0xffff_8000, true),
            (0x0000_8000, false),
            (0x8000_0000, false),
        ] {
            let mut guest = long_guest();
            let low = access << 32 | 0x67;
            let at = GDT + u64::from(SELECTOR);
            guest.memory.write_u64(at, low);
            guest.memory.write_u64(at + 8, high.into());
            guest.vcpu.state.gdtr.limit = 0xff;
            guest.load(&assemble(64, CODE, |a| {
                load(a);
                a.hlt().unwrap();
            }));
            guest.vcpu.state.regs[1] = SELECTOR.into();
            if is_good {
                guest.run_to_halt();
                continue;
            }
            assert_eq!(guest.run_to_handler(), 13, "{high:#x}");
            assert_eq!(guest.stack(0), SELECTOR.into(), "the error code");
            assert_eq!(guest.memory.read_u64(at), low, "not busy");
        }
    }
}

/// SYSCALL and SYSRET single-step by the trap flag that they leave: a kernel whose IA32_FMASK clears
/// it is not stepped into, and a program whose R11 sets it traps at its first instruction.
#[test]
fn the_trap_flag_across_syscall_and_sysret_is_the_new_one() {
    const ENTRY: u64 = CODE + 0x100;
    let guest = |flags: u64, fmask: u64| {
        let mut guest = long_guest();
        guest.load(&assemble(64, CODE, |a| {
            a.nop().unwrap();
            a.syscall().unwrap();
        }));
        guest.memory.write(
            ENTRY,
            &assemble(64, ENTRY, |a| {
                a.nop().unwrap();
                a.hlt().unwrap();
            }),
        );
        let state = &mut guest.vcpu.state;
        state.efer |= Efer::SCE;
        state.msrs.lstar = ENTRY;
        state.msrs.star = u64::from(KERNEL_CODE) << 32;
        state.msrs.fmask = fmask;
        state.rip = CODE + 1;
        state.set_rflags(flags | 2);
        guest
    };
    let trap = Rflags::TF.bits();
    // Cleared: no trap until the kernel halts.
    let mut stepped = guest(trap, trap);
    stepped.run_to_halt();
    // Kept: behind SYSCALL.
    let mut stepped = guest(trap, 0);
    assert_eq!(stepped.run_to_handler(), 1);
    assert_eq!(stepped.stack(0), ENTRY);
    // SYSRET sets it: before the program's first instruction, and not again.
    for (before, after) in [(0, 0), (0, trap), (trap, 0), (trap, trap)] {
        let mut returning = guest(0, 0);
        to_user(&mut returning);
        let state = &mut returning.vcpu.state;
        state.efer |= Efer::SCE;
        state.msrs.lstar = ENTRY;
        state.msrs.star = u64::from(KERNEL_CODE) << 32 | 0x13 << 48;
        state.rip = CODE;
        returning.memory.write(
            CODE,
            &assemble(64, CODE, |a| {
                a.syscall().unwrap();
                a.ud2().unwrap();
            }),
        );
        returning.memory.write(
            ENTRY,
            &assemble(64, ENTRY, |a| {
                a.mov(r11d, 2 | after as u32).unwrap();
                a.push(2 | before as i32).unwrap();
                a.popfq().unwrap();
                a.sysretq().unwrap();
            }),
        );
        let expected = if after == 0 { 6 } else { 1 };
        assert_eq!(returning.run_to_handler(), expected, "{before:x} {after:x}");
        assert_eq!(returning.stack(0), CODE + 2);
        assert_eq!(returning.stack(2) & trap, after);
    }
}
